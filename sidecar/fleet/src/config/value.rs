//! The forms that a value can have, and what to write instead of what has none.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use agent_sidecar_core::written;
use jiff::tz::TimeZone;
use toml::de::{DeArray, DeValue};

use super::secret::is_key;
use crate::session::Pattern;

/// What a value is not, and what to write instead.
pub(super) struct Wrong {
    pub(super) what: String,
    pub(super) remedy: String,
}

pub(super) fn wrong<T>(what: impl Into<String>, remedy: impl Into<String>) -> Result<T, Wrong> {
    Err(Wrong { what: what.into(), remedy: remedy.into() })
}

pub(super) const IN_QUOTES: &str = "write it in quotes";
pub(super) const NAMES: &str = "write 1 to 40 small letters, digits and `-`, beginning with a letter";

pub(super) fn text(value: &DeValue<'_>) -> Result<String, Wrong> {
    match value {
        DeValue::String(text) if text.is_empty() => wrong("is empty", "write it, or remove the line"),
        DeValue::String(text) => Ok(text.to_string()),
        other => wrong(format!("is a text, not {}", form(other)), IN_QUOTES),
    }
}

pub(super) fn texts(value: &DeValue<'_>) -> Result<Vec<String>, Wrong> {
    let list = |rows: &DeArray<'_>| rows.iter().map(|row| row.get_ref().as_str().map(str::to_owned)).collect::<Option<Vec<_>>>();
    match value.as_array().and_then(list) {
        Some(texts) => Ok(texts),
        None => wrong(format!("is a list of texts, not {}", form(value)), "write it like [\"a\", \"b\"]"),
    }
}

/// What stands in labels, paths and metrics.
pub(super) fn label(value: &DeValue<'_>) -> Result<String, Wrong> {
    let text = text(value)?;
    if is_label(&text) { Ok(text) } else { wrong(format!("is no name: `{text}`"), NAMES) }
}

pub(super) fn is_label(text: &str) -> bool {
    let letter = |c: char| c.is_ascii_lowercase();
    text.len() <= 40 && text.starts_with(letter) && text.chars().all(|c| letter(c) || c.is_ascii_digit() || c == '-')
}

pub(super) fn is_variable(name: &str) -> bool {
    !name.is_empty()
        && !name.starts_with(|c: char| c.is_ascii_digit())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

pub(super) fn switch(value: &DeValue<'_>) -> Result<bool, Wrong> {
    value.as_bool().map_or_else(|| wrong(format!("is true or false, not {}", form(value)), "write true or false"), Ok)
}

pub(super) fn time(value: &DeValue<'_>) -> Result<Duration, Wrong> {
    match value.as_str().and_then(written::duration) {
        Some(Duration::ZERO) => wrong("is zero, which would allow nothing", TIMES),
        Some(time) => Ok(time),
        None => wrong(format!("is a duration of at most 366 days, not {}", form(value)), TIMES),
    }
}

const TIMES: &str = "write a number and a unit, like \"90s\", \"10m\" or \"1h30m\"";

pub(super) fn time_or_off(value: &DeValue<'_>) -> Result<Option<Duration>, Wrong> {
    if value.as_str() == Some("off") { Ok(None) } else { time(value).map(Some) }
}

pub(super) fn number(value: &DeValue<'_>) -> Option<f64> {
    match value {
        DeValue::Integer(n) => n.as_str().replace('_', "").parse().ok(),
        DeValue::Float(n) => n.as_str().replace('_', "").parse().ok(),
        DeValue::String(text) => text.trim_start_matches('$').parse().ok(),
        _ => None,
    }
}

pub(super) fn dollars(value: &DeValue<'_>) -> Result<f64, Wrong> {
    match number(value).filter(|usd| *usd > 0.0 && *usd < 1e7) {
        Some(usd) => Ok(usd),
        None => wrong(format!("is an amount above zero and below ten million, not {}", form(value)), "write dollars, like 2.50"),
    }
}

pub(super) fn whole(value: &DeValue<'_>) -> Result<u64, Wrong> {
    let n = value.as_integer().and_then(|n| n.as_str().replace('_', "").parse().ok());
    n.map_or_else(|| wrong(format!("is a whole number, not {}", form(value)), "write a whole number, like 3"), Ok)
}

pub(super) fn count(value: &DeValue<'_>) -> Result<u64, Wrong> {
    match whole(value)? {
        0 => wrong("is zero, which would allow nothing", "write a whole number above zero, like 40"),
        n => Ok(n),
    }
}

pub(super) fn cpus(value: &DeValue<'_>) -> Result<u32, Wrong> {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked to be in range")]
    match number(value).filter(|n| (0.05..=256.0).contains(n)) {
        Some(n) => Ok((n * 1000.0).round() as u32),
        None => wrong(format!("is a number of CPUs from 0.05 to 256, not {}", form(value)), "write it like 1.0 or 0.5"),
    }
}

pub(super) fn mebibytes(value: &DeValue<'_>) -> Result<u32, Wrong> {
    let mib = value.as_str().and_then(written::size).map(|bytes| bytes >> 20);
    match mib.and_then(|mib| u32::try_from(mib).ok()).filter(|mib| *mib >= 16) {
        Some(mib) => Ok(mib),
        None => wrong(
            format!("is a size of at least 16MiB, not {}", form(value)),
            "write a number and a unit, like \"512MiB\" or \"2GiB\"",
        ),
    }
}

pub(super) fn size(value: &DeValue<'_>) -> Result<u64, Wrong> {
    match value.as_str().and_then(written::size).filter(|bytes| *bytes > 0) {
        Some(bytes) => Ok(bytes),
        None => wrong(format!("is a size, not {}", form(value)), "write a number and a unit, like \"512MiB\" or \"2GiB\""),
    }
}

pub(super) fn port(value: &DeValue<'_>) -> Result<u16, Wrong> {
    let port = value.as_integer().and_then(|n| n.as_str().parse().ok()).filter(|port| *port > 0);
    port.map_or_else(|| wrong(format!("is a port, not {}", form(value)), "write a number from 1 to 65535"), Ok)
}

pub(super) fn ports(value: &DeValue<'_>) -> Result<Vec<u16>, Wrong> {
    let Some(rows) = value.as_array() else {
        return wrong(format!("is a list of ports, not {}", form(value)), "write it like [8080]");
    };
    let ports: Vec<u16> = rows.iter().map(|row| port(row.get_ref())).collect::<Result<_, _>>()?;
    match ports.iter().collect::<BTreeSet<_>>().len() == ports.len() {
        true => Ok(ports),
        false => wrong("has a port twice", "remove one"),
    }
}

pub(super) fn address(value: &DeValue<'_>) -> Result<SocketAddr, Wrong> {
    let parse = |text: &str| match text.strip_prefix(':') {
        Some(_) => format!("[::]{text}").parse().ok(),
        None => text.replace("localhost:", "127.0.0.1:").parse().ok(),
    };
    match value.as_str().and_then(parse) {
        Some(address) => Ok(address),
        None => wrong(
            format!("is an address and a port, not {}", form(value)),
            "write it like \"127.0.0.1:9490\", or \":9490\" for every address",
        ),
    }
}

pub(super) fn web_url(value: &DeValue<'_>) -> Result<String, Wrong> {
    let url = text(value)?;
    let remedy = "write it like https://hooks.example/fleet";
    match reqwest::Url::parse(&url) {
        // Neither says the text: it may hold a key.
        Ok(url) if !url.username().is_empty() || url.password().is_some() => {
            wrong("has a user or password in it", "remove it: requests are signed")
        }
        Ok(parsed) if matches!(parsed.scheme(), "http" | "https") && parsed.has_host() => Ok(url),
        _ => wrong("is no URL of http or https", remedy),
    }
}

pub(super) fn pattern(value: &DeValue<'_>) -> Result<Pattern, Wrong> {
    let all = [Pattern::Ephemeral, Pattern::LongRunning, Pattern::Hybrid, Pattern::Shared];
    let text = text(value)?;
    match all.into_iter().find(|pattern| super::pattern_name(*pattern) == text) {
        Some(pattern) => Ok(pattern),
        None => {
            let names = all.map(super::pattern_name);
            wrong(format!("is one of {}, not `{text}`", names.join(", ")), nearest(&text, names.into_iter()))
        }
    }
}

pub(super) fn zone(value: &DeValue<'_>) -> Result<TimeZone, Wrong> {
    // Lookups do not care for capitals; who reads the configuration does.
    let known = |name: &str| TimeZone::get(name).ok().filter(|zone| zone.iana_name() == Some(name));
    match value.as_str().and_then(known) {
        Some(zone) => Ok(zone),
        None => wrong(
            format!("is a time zone, not {}", form(value)),
            "write a name of the IANA database, like \"Europe/Berlin\", or \"UTC\"",
        ),
    }
}

pub(super) fn is_loopback(url: &reqwest::Url) -> bool {
    let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

pub(super) fn form(value: &DeValue<'_>) -> String {
    match value {
        DeValue::String(text) if is_key(text) => String::from("a secret"),
        DeValue::String(text) => format!("the text `{text}`"),
        DeValue::Integer(n) => format!("the number `{}`", n.as_str()),
        DeValue::Float(n) => format!("the number `{}`", n.as_str()),
        DeValue::Boolean(yes) => format!("`{yes}`"),
        DeValue::Datetime(_) => String::from("a date"),
        DeValue::Array(_) => String::from("a list"),
        DeValue::Table(_) => String::from("a table"),
    }
}

/// Which one was meant of those that there are, or else all of them.
pub fn nearest<'n>(name: &str, known: impl Iterator<Item = &'n str> + Clone) -> String {
    match written::near(name, known.clone(), |name| name) {
        Some(known) => format!("did you mean `{known}`?"),
        None => format!("there is {}", known.collect::<Vec<_>>().join(", ")),
    }
}

/// The same for names that the file gives itself.
pub(super) fn missing<'n>(name: &str, known: impl Iterator<Item = &'n String> + Clone, add: &str) -> String {
    match written::near(name, known.map(String::as_str), |name| name) {
        Some(known) => format!("did you mean `{known}`?"),
        None => format!("add {add}"),
    }
}
