//! The forms that a value can have, and what is said of one that has none of them.

use std::net::SocketAddr;
use std::time::Duration;

use agent_sidecar_core::limit::Mode;
use agent_sidecar_core::who::Sources;
use agent_sidecar_core::written::{duration, size};

use crate::export::otlp::environment::{self, Headers};
use crate::hub::Zone;
use crate::hub::gate::Token;
use crate::hub::users;

/// What a setting takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Count,
    Money,
    Time,
    /// A time that may be none at all.
    Pause,
    Size,
    Factor,
    /// Dollars, or nothing.
    Price,
    Switch,
    Mode,
    /// The value of a label.
    Label,
    /// An exit code.
    Code,
    /// Where days begin.
    Zone,
    Path,
    Address,
    Choice(&'static [&'static str]),
    /// Of somebody who is told something: a collector, a platform.
    Url,
    /// Several of those that are asked.
    Urls,
    /// Of its requests: secret.
    Headers,
    /// Where a label is read from.
    Sources,
    /// A key.
    Secret,
    /// As whom a process runs.
    User,
    /// Whose wrappers a hub serves.
    Users,
    /// A word that lets in: secret.
    Token,
    /// Of files, or paths of them.
    Names,
}

/// What a setting was given.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value {
    Count(u64),
    Money(f64),
    Time(Duration),
    Size(u64),
    Factor(f64),
    Switch(bool),
    Mode(Mode),
    Code(u8),
    Zone(Zone),
    /// `None` is off.
    Address(Option<SocketAddr>),
    /// The text itself is the value.
    Text,
    Headers(Headers),
    Sources(Sources),
    Secret(Secret),
    Token(Token),
}

/// A text that does not print.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Secret(pub(crate) String);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("(hidden)")
    }
}

impl Value {
    /// For comparisons between settings of one kind.
    pub(crate) fn number(&self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "compared, not computed with")]
        match self {
            Value::Count(n) | Value::Size(n) => *n as f64,
            Value::Money(n) | Value::Factor(n) => *n,
            Value::Time(time) => time.as_secs_f64(),
            Value::Switch(_)
            | Value::Mode(_)
            | Value::Code(_)
            | Value::Zone(_)
            | Value::Address(_)
            | Value::Text
            | Value::Headers(_)
            | Value::Sources(_)
            | Value::Secret(_)
            | Value::Token(_) => 0.0,
        }
    }
}

impl Kind {
    /// What is wrong with the text, as the end of a sentence that begins with the setting's name.
    pub(crate) fn parse(self, text: &str) -> Result<Value, String> {
        let not = |()| format!("is {}, not `{text}`", self.noun());
        match self {
            Kind::Count => match text.replace('_', "").parse::<u64>() {
                Ok(0) => Err(String::from("is zero, which would allow nothing")),
                Ok(n) => Ok(Value::Count(n)),
                Err(_) => Err(not(())),
            },
            Kind::Money => match text.trim_start_matches('$').parse::<f64>() {
                Ok(usd) if usd > 0.0 && usd < 1e7 => Ok(Value::Money(usd)),
                Ok(_) => Err(format!("is an amount above zero and below ten million, not `{text}`")),
                Err(_) => Err(not(())),
            },
            Kind::Price => match text.trim_start_matches('$').parse::<f64>() {
                Ok(usd) if (0.0..1e7).contains(&usd) => Ok(Value::Money(usd)),
                Ok(_) => Err(format!("is an amount of zero or more and below ten million, not `{text}`")),
                Err(_) => Err(not(())),
            },
            Kind::Time => match duration(text) {
                Some(Duration::ZERO) => Err(String::from("is zero, which would allow nothing")),
                Some(time) => Ok(Value::Time(time)),
                None => Err(not(())),
            },
            Kind::Pause if text == "0" => Ok(Value::Time(Duration::ZERO)),
            Kind::Pause => duration(text).map(Value::Time).ok_or(()).map_err(not),
            Kind::Size => match size(text) {
                Some(0) => Err(String::from("is zero, which would allow nothing")),
                Some(bytes) => Ok(Value::Size(bytes)),
                None => Err(not(())),
            },
            Kind::Factor => match text.parse::<f64>() {
                Ok(factor) if factor > 0.0 && factor <= 10.0 => Ok(Value::Factor(factor)),
                _ => Err(not(())),
            },
            Kind::Switch => match text {
                "true" | "on" | "yes" => Ok(Value::Switch(true)),
                "false" | "off" | "no" => Ok(Value::Switch(false)),
                _ => Err(not(())),
            },
            Kind::Mode => {
                Mode::ALL.iter().find(|mode| mode.as_str() == text).map(|mode| Value::Mode(*mode)).ok_or(()).map_err(not)
            }
            Kind::Label if text.is_empty() || text.len() > MAX_LABEL || text.chars().any(char::is_control) => {
                Err(format!("is a text of 1 to {MAX_LABEL} bytes in one line"))
            }
            Kind::Label => Ok(Value::Text),
            Kind::Code => match text.parse::<u8>() {
                Ok(code) => Ok(Value::Code(code)),
                Err(_) => Err(not(())),
            },
            Kind::Zone => Zone::of(text).map(Value::Zone).ok_or(()).map_err(not),
            Kind::Path if text.is_empty() => Err(String::from("is empty")),
            Kind::Path => Ok(Value::Text),
            Kind::Address => address(text).map(Value::Address).ok_or(()).map_err(not),
            Kind::Choice(words) if words.contains(&text) => Ok(Value::Text),
            Kind::Choice(_) => Err(not(())),
            // Neither says the text: it may hold a key.
            Kind::Url => environment::check_endpoint(text).map(|()| Value::Text).map_err(|what| format!("is wrong: {what}")),
            Kind::Urls => urls(text).map(|_| Value::Text).ok_or(()).map_err(not),
            Kind::Sources => text.parse().map(Value::Sources).map_err(|wrong| format!("is wrong: {wrong}")),
            Kind::Secret if text.is_empty() => Err(String::from("is empty")),
            Kind::Secret => Ok(Value::Secret(Secret(text.to_owned()))),
            Kind::Headers => environment::headers(text).map(Value::Headers).map_err(|what| format!("is wrong: {what}")),
            Kind::User if is_user(text) => Ok(Value::Text),
            Kind::User => Err(not(())),
            Kind::Users => users::split(text).map(|_| Value::Text),
            Kind::Names if text.split(',').all(|name| is_inside(name.trim())) => Ok(Value::Text),
            Kind::Names => Err(not(())),
            // Not what it is, either.
            Kind::Token => Token::of(text).map(Value::Token).map_err(|what| format!("is wrong: {what}")),
        }
    }

    /// What it is, in a sentence.
    pub(crate) fn noun(self) -> String {
        match self {
            Kind::Count => String::from("a whole number"),
            Kind::Money | Kind::Price => String::from("an amount of dollars"),
            Kind::Time | Kind::Pause => String::from("a duration"),
            Kind::Size => String::from("a size"),
            Kind::Factor => String::from("a factor above 0 and up to 10"),
            Kind::Switch => String::from("true or false"),
            Kind::Mode => String::from("a mode"),
            Kind::Label => String::from("a text"),
            Kind::Code => String::from("an exit code"),
            Kind::Zone => String::from("a time zone"),
            Kind::Path => String::from("a path"),
            Kind::Address => String::from("an address"),
            Kind::Choice(words) => format!("one of {}", words.join(", ")),
            Kind::Url => String::from("a URL"),
            Kind::Urls => String::from("a list of URLs"),
            Kind::Headers => String::from("a list of headers"),
            Kind::Sources => String::from("a list of sources"),
            Kind::Secret => String::from("a text"),
            Kind::User => String::from("a user"),
            Kind::Users => String::from("a list of users"),
            Kind::Token => String::from("a token"),
            Kind::Names => String::from("a list of names"),
        }
    }

    /// What to write instead.
    pub(crate) fn remedy(self) -> String {
        match self {
            Kind::Count => String::from("write a whole number above zero, like 40"),
            Kind::Money => String::from("write dollars, like 2.50"),
            Kind::Price => String::from("write dollars, like 0.05, or 0"),
            Kind::Time | Kind::Pause => {
                String::from("write a number and a unit, like 90s, 10m, 1h30m or 500ms; in a file in quotes")
            }
            Kind::Size => String::from("write a number and a unit, like 512MiB or 2GiB"),
            Kind::Factor => String::from("write a factor, like 0.8 for twenty percent off"),
            Kind::Switch => String::from("write true or false"),
            Kind::Mode => String::from("write off, shadow or enforce"),
            Kind::Code => String::from("write a number from 0 to 255"),
            Kind::Zone => {
                String::from("write a name of the IANA database, like Europe/Berlin, or UTC, or an offset, like +05:30")
            }
            Kind::Path => String::from("write a path"),
            Kind::Label => String::from("write a name, like \"research\""),
            Kind::Address => String::from("write an address and a port, like 127.0.0.1:9477 or :9477, or off"),
            Kind::Choice(words) => format!("write {}", words.join(" or ")),
            Kind::Urls => String::from("write them like https://api.anthropic.com, https://gateway.example/claude"),
            Kind::Url => String::from("write it like http://collector:4318"),
            Kind::Headers => String::from(environment::HEADERS_REMEDY),
            Kind::Sources => String::from("write sources in the order in which they are asked, like env:CUSTOMER_ID, pod:tenant"),
            Kind::Secret => String::from("write a text that nobody guesses"),
            Kind::Token => String::from("make one with `openssl rand -hex 32`"),
            Kind::Names => {
                String::from("write names, or paths that begin with none of `/` and `..`, like node_modules, target/debug")
            }
            Kind::Users => String::from("write names or numbers, like app, worker=acme, 1003"),
            Kind::User => String::from("write a name or a number, like agent, 1000 or 1000:1000; in a file in quotes"),
        }
    }

    /// The name of the form, for the reference page.
    pub(crate) fn name(self) -> String {
        match self {
            Kind::Count => String::from("count"),
            Kind::Money => String::from("dollars"),
            Kind::Price => String::from("dollars or 0"),
            Kind::Time => String::from("duration"),
            Kind::Pause => String::from("duration or 0"),
            Kind::Size => String::from("size"),
            Kind::Factor => String::from("factor"),
            Kind::Switch => String::from("true or false"),
            Kind::Mode => String::from("off, shadow or enforce"),
            Kind::Code => String::from("exit code"),
            Kind::Zone => String::from("time zone"),
            Kind::Path => String::from("path"),
            Kind::Label => String::from("text"),
            Kind::Address => String::from("address or off"),
            Kind::Choice(words) => words.join(" or "),
            Kind::Url => String::from("URL or off"),
            Kind::Urls => String::from("URL,URL,…"),
            Kind::Headers => String::from("name=value,…"),
            Kind::Sources => String::from("source:key,…"),
            Kind::Secret => String::from("text"),
            Kind::Token => String::from("token"),
            Kind::User => String::from("name or uid, and `:group`"),
            Kind::Users => String::from("user,user=tenant,…"),
            Kind::Names => String::from("name,path/name,…"),
        }
    }
}

/// `agent`, `1000`, `agent:staff`, `1000:1000`.
fn is_user(text: &str) -> bool {
    let name = |text: &str| !text.is_empty() && !text.contains(|c: char| c.is_whitespace() || c.is_control() || c == ':');
    text.split_once(':').map_or_else(|| name(text), |(who, of)| name(who) && name(of))
}

/// A name, or a path that leads nowhere else.
fn is_inside(path: &str) -> bool {
    path.split('/').all(|part| !matches!(part, "" | "." | ".."))
}

/// `https://one.example, https://two.example/path`.
pub(super) fn urls(text: &str) -> Option<Vec<String>> {
    let one =
        |url: &str| url.strip_prefix("https://").or_else(|| url.strip_prefix("http://")).is_some_and(|rest| !rest.is_empty());
    let list: Vec<String> = text.split(',').map(|url| url.trim().to_owned()).collect();
    list.iter().all(|url| one(url) && !url.contains(char::is_whitespace)).then_some(list)
}

/// A label is repeated on every series.
const MAX_LABEL: usize = 64;

/// `127.0.0.1:9477`, `[::1]:9477`, `:9477` for every address of both families, `off`.
fn address(text: &str) -> Option<Option<SocketAddr>> {
    match text {
        "off" => Some(None),
        _ if text.starts_with(':') => format!("[::]{text}").parse().ok().map(Some),
        _ => text.replace("localhost:", "127.0.0.1:").parse().ok().map(Some),
    }
}
