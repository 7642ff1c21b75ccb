//! What the providers that are reached over HTTP share: a token that is read when it is sent, bounds in time, number and size, and one rule of
//! trying again: what does no harm twice is tried three times, what creates is not, unless it was certainly not heard.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use futures_util::{Stream, StreamExt};
use jiff::Timestamp;
use reqwest::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use reqwest::{Method, StatusCode, Url};
use serde::Deserialize as _;
use serde::de::DeserializeOwned;
use tokio::time::Instant;

use super::{ENDS_LABEL, Error, Result, Sandbox, Secret, State};
use crate::retry_after;

/// How often what is safe is tried.
const TRIES: u32 = 3;
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Who says that we shall come back later than this is told to the caller, and not waited for.
const PAUSE_MOST: Duration = Duration::from_secs(4);
/// A call that only asks or orders. Those that wait for something say how long.
const TIMEOUT: Duration = Duration::from_secs(30);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// A page of a hundred containers with all their labels is a tenth of this.
const ANSWER_MOST: usize = 8 << 20;
/// As much of a provider's own words as is repeated.
const WORDS_MOST: usize = 300;
/// Containers whose rates are remembered. Those that have been quiet go first.
const BUCKETS_MOST: usize = 4096;

/// How the token is sent.
#[derive(Clone, Copy)]
pub(super) struct Auth {
    pub(super) header: &'static str,
    /// What stands before it: `Bearer `.
    pub(super) scheme: &'static str,
}

/// How often an action may be asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rate {
    pub(super) per_second: f64,
    pub(super) burst: u32,
}

/// The rate of an action, if it has one.
type Rates = dyn Fn(&str) -> Option<Rate> + Send + Sync;

pub(super) struct Client {
    provider: &'static str,
    http: reqwest::Client,
    base: Url,
    auth: Auth,
    token: Secret,
    rate: Box<Rates>,
    /// When the next request of each kind is due, were they evenly spaced.
    due: Mutex<HashMap<String, Instant>>,
}

impl Client {
    /// # Errors
    /// A sentence that says which setting is wrong.
    pub(super) fn new(
        provider: &'static str,
        base: &str,
        auth: Auth,
        token: &Secret,
        rate: impl Fn(&str) -> Option<Rate> + Send + Sync + 'static,
    ) -> std::result::Result<Self, String> {
        let roots = rustls::RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
        let tls = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(|error| format!("no TLS: {error}"))?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let http = reqwest::Client::builder()
            .tls_backend_preconfigured(tls)
            .connect_timeout(CONNECT_TIMEOUT)
            // A token goes where it is meant to, and nowhere else.
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .user_agent(concat!("agent-fleet/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|error| format!("no HTTP client: {error}"))?;
        if let Secret::Provider(name) = token {
            return Err(format!("`token` is `{name}` of the provider: name a file or an environment variable"));
        }
        Ok(Self {
            provider,
            http,
            base: parse_base(base)?,
            auth,
            token: token.clone(),
            rate: Box::new(rate),
            due: Mutex::default(),
        })
    }

    pub(super) fn get<'a>(&'a self, action: &'static str, path: &'a [&'a str]) -> Call<'a> {
        self.call(action, Method::GET, path).safe()
    }

    pub(super) fn delete<'a>(&'a self, action: &'static str, path: &'a [&'a str]) -> Call<'a> {
        self.call(action, Method::DELETE, path).safe()
    }

    /// One that is not tried again, unless [`Call::safe`] says that it can be.
    pub(super) fn post<'a>(&'a self, action: &'static str, path: &'a [&'a str]) -> Call<'a> {
        self.call(action, Method::POST, path)
    }

    /// What is there when it is done is the same, however often.
    pub(super) fn put<'a>(&'a self, action: &'static str, path: &'a [&'a str]) -> Call<'a> {
        self.call(action, Method::PUT, path).safe()
    }

    pub(super) fn patch<'a>(&'a self, action: &'static str, path: &'a [&'a str]) -> Call<'a> {
        self.call(action, Method::PATCH, path).safe()
    }

    fn call<'a>(&'a self, action: &'static str, method: Method, path: &'a [&'a str]) -> Call<'a> {
        Call {
            client: self,
            action,
            of: None,
            base: self.base.clone(),
            method,
            path,
            query: Vec::new(),
            headers: HeaderMap::new(),
            body: None,
            safe: false,
            ours: true,
            timeout: TIMEOUT,
            most: ANSWER_MOST,
            hide: Vec::new(),
        }
    }

    /// Waits until a request of this kind may go.
    async fn admit(&self, action: &str, of: Option<&str>) -> Result<()> {
        let Some(rate) = (self.rate)(action) else { return Ok(()) };
        let key = of.map_or_else(|| action.to_owned(), |of| format!("{action}/{of}"));
        let wait = {
            let mut due = self.due.lock().unwrap_or_else(PoisonError::into_inner);
            let now = Instant::now();
            if due.len() >= BUCKETS_MOST {
                due.retain(|_, at| *at > now);
            }
            pace(due.entry(key).or_insert(now), rate, now)
        };
        match wait {
            Ok(wait) => tokio::time::sleep(wait).await,
            Err(after) => return Err(Error::Busy { provider: self.provider, after: Some(after) }),
        }
        Ok(())
    }

    /// Our own words for what went wrong with a request.
    fn failed(&self, what: String) -> Error {
        Error::Failed { provider: self.provider, what }
    }
}

fn parse_base(text: &str) -> std::result::Result<Url, String> {
    let wrong = || format!("`{text}` is no address: it begins with https:// or http://");
    let url = Url::parse(text).map_err(|_| wrong())?;
    if !matches!(url.scheme(), "http" | "https") || url.cannot_be_a_base() {
        return Err(wrong());
    }
    Ok(url)
}

/// How long to wait, by the generic cell rate algorithm; an error is a wait that is too long, and nothing is taken for it.
fn pace(due: &mut Instant, rate: Rate, now: Instant) -> std::result::Result<Duration, Duration> {
    let every = Duration::from_secs_f64(1.0 / rate.per_second);
    let next = (*due).max(now);
    let wait = (next - now).saturating_sub(every * rate.burst.saturating_sub(1));
    if wait > PAUSE_MOST {
        return Err(wait);
    }
    *due = next + every;
    Ok(wait)
}

/// A request that can be sent more than once.
pub(super) struct Call<'a> {
    client: &'a Client,
    action: &'static str,
    of: Option<&'a str>,
    base: Url,
    method: Method,
    path: &'a [&'a str],
    query: Vec<(&'a str, String)>,
    headers: HeaderMap,
    body: Option<Vec<u8>>,
    safe: bool,
    /// The provider's own interface, which knows our token. What runs in a container does not learn it.
    ours: bool,
    timeout: Duration,
    most: usize,
    hide: Vec<String>,
}

/// Why there is no answer.
enum Lost {
    /// It was certainly not heard.
    Unheard(String),
    /// It may have been.
    Perhaps(String),
    /// It cannot be sent.
    Unsendable(Error),
}

impl<'a> Call<'a> {
    /// Twice is like once.
    pub(super) fn safe(mut self) -> Self {
        self.safe = true;
        self
    }

    /// The rate is that of this container.
    pub(super) fn of(mut self, container: &'a str) -> Self {
        self.of = Some(container);
        self
    }

    /// Somewhere else than the provider's interface, without our token.
    pub(super) fn at(mut self, base: &str) -> Result<Self> {
        self.base = parse_base(base).map_err(|what| self.client.failed(what))?;
        self.ours = false;
        Ok(self)
    }

    /// Somewhere else, where the token is known.
    pub(super) fn at_with_token(self, base: &str) -> Result<Self> {
        Ok(Self { ours: true, ..self.at(base)? })
    }

    pub(super) fn query(mut self, name: &'a str, value: impl Into<String>) -> Self {
        self.query.push((name, value.into()));
        self
    }

    /// A header whose value may be a secret; one that no header can carry is left out.
    pub(super) fn header(mut self, name: &'static str, value: &str) -> Self {
        if let Ok(mut value) = HeaderValue::from_str(value) {
            value.set_sensitive(true);
            self.headers.insert(HeaderName::from_static(name), value);
        }
        self
    }

    pub(super) fn json(self, body: &serde_json::Value) -> Self {
        self.bytes("application/json", body.to_string().into_bytes())
    }

    pub(super) fn bytes(mut self, kind: &'static str, body: Vec<u8>) -> Self {
        self.headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
        self.body = Some(body);
        self
    }

    pub(super) fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    pub(super) fn most(mut self, bytes: usize) -> Self {
        self.most = bytes;
        self
    }

    /// Values that are in no message, even if the provider repeats them.
    pub(super) fn hide(mut self, secrets: impl IntoIterator<Item = String>) -> Self {
        self.hide.extend(secrets);
        self
    }

    /// The answer, whatever it says, but for those that are worth trying again and those that say nothing.
    pub(super) async fn send(mut self) -> Result<Answer> {
        let provider = self.client.provider;
        let mut pause = FIRST_PAUSE;
        for attempt in 1.. {
            self.client.admit(self.action, self.of).await?;
            let (error, harmless, wait) = match self.once().await {
                Ok(answer) if answer.status == StatusCode::TOO_MANY_REQUESTS => {
                    let after = answer.retry_after();
                    (Error::Busy { provider, after }, true, after)
                }
                Ok(answer) if answer.status.is_server_error() => {
                    let after = answer.retry_after();
                    (answer.into_error(), self.safe, after)
                }
                Ok(answer) => return Ok(answer),
                Err(Lost::Unheard(what)) => (Error::Failed { provider, what }, true, None),
                Err(Lost::Perhaps(what)) if self.safe => (Error::Failed { provider, what }, true, None),
                Err(Lost::Perhaps(what)) => (Error::Unsure { provider, what }, false, None),
                Err(Lost::Unsendable(error)) => return Err(error),
            };
            let wait = wait.map_or(pause, |after| after.max(pause));
            if !harmless || attempt == TRIES || wait > PAUSE_MOST {
                return Err(error);
            }
            tokio::time::sleep(wait).await;
            pause = (pause * 2).min(PAUSE_MOST);
        }
        unreachable!("the last try returns")
    }

    /// An answer that comes piece by piece. It is sent once.
    pub(super) async fn stream(mut self) -> Result<impl Stream<Item = Result<Vec<u8>>> + Send + use<>> {
        let provider = self.client.provider;
        self.client.admit(self.action, self.of).await?;
        let response = match self.open().await {
            Ok(response) => response,
            Err(Lost::Unheard(what)) => return Err(Error::Failed { provider, what }),
            Err(Lost::Perhaps(what)) => return Err(Error::Unsure { provider, what }),
            Err(Lost::Unsendable(error)) => return Err(error),
        };
        if !response.status().is_success() {
            let answer = self.read(response).await.map_err(|lost| match lost {
                Lost::Unheard(what) | Lost::Perhaps(what) => Error::Unsure { provider, what },
                Lost::Unsendable(error) => error,
            })?;
            return Err(answer.into_error());
        }
        Ok(response.bytes_stream().map(move |piece| match piece {
            Ok(piece) => Ok(piece.to_vec()),
            Err(error) => Err(Error::Unsure { provider, what: said(&error) }),
        }))
    }

    async fn once(&mut self) -> std::result::Result<Answer, Lost> {
        let response = self.open().await?;
        self.read(response).await
    }

    async fn open(&mut self) -> std::result::Result<reqwest::Response, Lost> {
        let client = self.client;
        let mut url = self.base.clone();
        url.path_segments_mut().expect("Client::new has seen that it has a path").pop_if_empty().extend(self.path);
        if !self.query.is_empty() {
            url.query_pairs_mut().extend_pairs(&self.query);
        }
        let mut request = client.http.request(self.method.clone(), url).timeout(self.timeout).headers(self.headers.clone());
        if self.ours {
            let refused = |what| Lost::Unsendable(Error::Refused { provider: client.provider, what });
            let token = client.token.read().map_err(|why| refused(format!("no token: {why}")))?;
            let mut value = HeaderValue::try_from(format!("{}{}", client.auth.scheme, token.expose()))
                .map_err(|_| refused(String::from("the token has letters in it that no header can carry")))?;
            value.set_sensitive(true);
            request = request.header(client.auth.header, value);
            self.hide.push(token.expose().to_owned());
        }
        if let Some(body) = &self.body {
            request = request.body(body.clone());
        }
        request.send().await.map_err(|error| match error {
            error if error.is_connect() => Lost::Unheard(said(&error)),
            error if error.is_builder() => Lost::Unsendable(client.failed(said(&error))),
            error => Lost::Perhaps(said(&error)),
        })
    }

    async fn read(&self, mut response: reqwest::Response) -> std::result::Result<Answer, Lost> {
        let (status, headers) = (response.status(), response.headers().clone());
        let mut body = Vec::new();
        while let Some(piece) = response.chunk().await.map_err(|error| Lost::Perhaps(said(&error)))? {
            if body.len() + piece.len() > self.most {
                return Err(Lost::Perhaps(format!("an answer of more than {} bytes", self.most)));
            }
            body.extend_from_slice(&piece);
        }
        Ok(Answer { provider: self.client.provider, status, headers, body, safe: self.safe, hide: self.hide.clone() })
    }
}

/// What reqwest says, with its causes and without the address: that has names of the customer's in it.
fn said(error: &reqwest::Error) -> String {
    let mut text = String::from(if error.is_timeout() { "no answer in time" } else { "the connection failed" });
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        write!(text, ": {error}").expect("a string has room");
        cause = error.source();
    }
    text
}

pub(super) struct Answer {
    provider: &'static str,
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: Vec<u8>,
    safe: bool,
    hide: Vec<String>,
}

impl Answer {
    pub(super) fn is_missing(&self) -> bool {
        matches!(self.status, StatusCode::NOT_FOUND | StatusCode::GONE)
    }

    /// Itself, if it is a yes.
    pub(super) fn ok(self) -> Result<Self> {
        if self.status.is_success() { Ok(self) } else { Err(self.into_error()) }
    }

    /// What is `null` is not there: many say so of a list, a text or a table that is empty.
    pub(super) fn json<T: DeserializeOwned>(&self) -> Result<T> {
        let read = serde_json::from_slice(&self.body).map(without_nulls);
        read.and_then(serde_json::from_value).map_err(|error| {
            let (provider, what) = (self.provider, format!("an answer of another shape: {error}"));
            if self.safe { Error::Failed { provider, what } } else { Error::Unsure { provider, what } }
        })
    }

    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok()).filter(|value| !value.is_empty())
    }

    fn retry_after(&self) -> Option<Duration> {
        retry_after::of(&self.headers, SystemTime::now())
    }

    /// What this no means.
    pub(super) fn into_error(self) -> Error {
        let (provider, what) = (self.provider, self.words());
        match self.status.as_u16() {
            404 | 410 => Error::Missing { provider },
            429 => Error::Busy { provider, after: self.retry_after() },
            // Too early, in the way of something else, or no room now.
            408 | 409 | 412 | 425 => Error::Failed { provider, what },
            500.. if self.safe => Error::Failed { provider, what },
            500.. => Error::Unsure { provider, what },
            _ => Error::Refused { provider, what },
        }
    }

    /// The provider's own words: its message if there is one, cut, and without a secret.
    pub(super) fn words(&self) -> String {
        let text = String::from_utf8_lossy(&self.body);
        let parsed: Option<serde_json::Value> = serde_json::from_str(&text).ok();
        let message = parsed.as_ref().and_then(|body| {
            ["/error/message", "/message", "/error"].into_iter().find_map(|at| body.pointer(at)?.as_str().map(str::to_owned))
        });
        let mut words = message.unwrap_or_else(|| text.into_owned());
        for secret in self.hide.iter().filter(|secret| !secret.is_empty()) {
            words = words.replace(secret.as_str(), "[secret]");
        }
        let words: String = words.chars().map(|c| if c.is_control() { ' ' } else { c }).take(WORDS_MOST).collect();
        let words = words.trim();
        let status = self.status.as_u16();
        if words.is_empty() { format!("it answers {status}") } else { format!("it answers {status}: {words}") }
    }
}

/// Some say that there is none of it, instead of leaving it out.
pub(super) fn without_nulls(value: serde_json::Value) -> serde_json::Value {
    use serde_json::Value;
    match value {
        Value::Object(fields) => Value::Object(
            fields.into_iter().filter(|(_, value)| !value.is_null()).map(|(name, value)| (name, without_nulls(value))).collect(),
        ),
        Value::Array(items) => Value::Array(items.into_iter().map(without_nulls).collect()),
        value => value,
    }
}

/// A time, or none where what stands there is no time: an empty text is said by some.
pub(super) fn time<'de, D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<Option<Timestamp>, D::Error> {
    let said = serde_json::Value::deserialize(deserializer)?;
    Ok(said.as_str().and_then(parse_time))
}

/// As RFC 3339 has it: with any offset, as many digits of a second as somebody likes, and letters of either size.
fn parse_time(text: &str) -> Option<Timestamp> {
    let text = text.trim();
    if let Ok(time) = text.parse() {
        return Some(time);
    }
    // What is finer than a nanosecond is not known here.
    let (whole, rest) = text.split_once('.')?;
    let zone = rest.find(|c: char| !c.is_ascii_digit())?;
    let (digits, zone) = rest.split_at(zone);
    format!("{whole}.{}{zone}", digits.get(..9)?).parse().ok()
}

/// What is good to know and nothing depends on: where it is of another shape, it is not said.
pub(super) fn lenient<'de, D, T>(deserializer: D) -> std::result::Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: DeserializeOwned + Default,
{
    Ok(serde_json::from_value(serde_json::Value::deserialize(deserializer)?).unwrap_or_default())
}

/// What a container does, in the provider's word; what is no word is one that nobody knows.
pub(super) fn word<'de, D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<String, D::Error> {
    let said: String = lenient(deserializer)?;
    Ok(if said.is_empty() { unsaid() } else { said })
}

pub(super) fn unsaid() -> String {
    String::from("unsaid")
}

/// Of a list's items those that can be read, and how many cannot.
pub(super) fn items<T: DeserializeOwned>(provider: &'static str, items: &[serde_json::Value]) -> (Vec<T>, usize) {
    let (mut read, mut unread) = (Vec::with_capacity(items.len()), 0);
    for item in items {
        match T::deserialize(item) {
            Ok(one) => read.push(one),
            Err(error) => {
                unread += 1;
                let named = ["/id", "/sandboxID", "/Id", "/key", "/name", "/metadata/name"];
                let name = named.into_iter().find_map(|at| item.pointer(at)?.as_str());
                super::tell_unread(provider, name.unwrap_or("one without a name"), &error);
            }
        }
    }
    (read, unread)
}

/// Where a container's port is, without the slash that some put at its end: paths begin with one.
pub(super) fn at(url: &str) -> String {
    url.trim_end_matches('/').to_owned()
}

/// What a deletion's answer means: what is not there is gone.
pub(super) fn gone(answer: Answer) -> Result<()> {
    if answer.is_missing() { Ok(()) } else { answer.ok().map(drop) }
}

/// What the provider knows nothing of.
pub(super) fn missing(native: &str) -> Sandbox {
    Sandbox {
        key: None,
        native: native.to_owned(),
        state: State::Missing,
        reason: None,
        exit_code: None,
        size: None,
        created: None,
        deadline: None,
        labels: BTreeMap::new(),
        node: None,
        disrupted: None,
    }
}

/// Creations whose end is not known, for providers where looking first is all that makes two of them one.
#[derive(Default)]
pub(super) struct InFlight {
    /// Who creates the same takes turns; who creates another may have to, too.
    turns: [tokio::sync::Mutex<()>; 16],
    /// Since when a creation was sent of which nothing was heard.
    sent: Mutex<HashMap<String, Instant>>,
}

impl InFlight {
    /// How long a container may be made and not be listed.
    const SETTLES: Duration = Duration::from_secs(60);
    const LOOKS: [Duration; 4] =
        [Duration::from_millis(250), Duration::from_millis(500), Duration::from_secs(1), Duration::from_secs(2)];

    pub(super) async fn lock(&self, key: &str) -> tokio::sync::MutexGuard<'_, ()> {
        let sum = key.bytes().fold(0, |sum: usize, byte| sum.wrapping_mul(31).wrapping_add(byte.into()));
        self.turns[sum % self.turns.len()].lock().await
    }

    pub(super) fn sent(&self, key: &str) {
        let mut sent = self.sent.lock().unwrap_or_else(PoisonError::into_inner);
        sent.retain(|_, at| at.elapsed() < Self::SETTLES);
        sent.insert(key.to_owned(), Instant::now());
    }

    pub(super) fn settled(&self, key: &str) {
        self.sent.lock().unwrap_or_else(PoisonError::into_inner).remove(key);
    }

    /// The pauses between looks, before it is believed that there is nothing.
    pub(super) fn patience(&self, key: &str) -> impl Iterator<Item = Duration> + Send + use<> {
        let sent = self.sent.lock().unwrap_or_else(PoisonError::into_inner);
        let fresh = sent.get(key).is_some_and(|at| at.elapsed() < Self::SETTLES);
        Self::LOOKS.into_iter().take(if fresh { Self::LOOKS.len() } else { 0 })
    }
}

/// `name=value&…`, with whatever is in them.
pub(super) fn pairs(pairs: &BTreeMap<String, String>) -> String {
    let mut url = Url::parse("query:").expect("it is one");
    url.query_pairs_mut().extend_pairs(pairs);
    url.query().unwrap_or_default().to_owned()
}

pub(super) fn unpaired(text: &str) -> BTreeMap<String, String> {
    let mut url = Url::parse("query:").expect("it is one");
    url.set_query(Some(text));
    url.query_pairs().into_owned().collect()
}

/// When its life is over, as [`super::ENDS_LABEL`] says it.
pub(super) fn ends(ttl: Duration) -> String {
    Timestamp::now().checked_add(ttl).unwrap_or(Timestamp::MAX).to_string()
}

/// What is left of it, by the label.
pub(super) fn left(labels: &BTreeMap<String, String>) -> Option<Duration> {
    let ends: Timestamp = labels.get(ENDS_LABEL)?.parse().ok()?;
    Some(ends.duration_since(Timestamp::now()).try_into().unwrap_or(Duration::ZERO))
}

/// A name that an environment variable can have, where a shell has to set it.
pub(super) fn check_names(provider: &'static str, env: &BTreeMap<String, String>) -> Result<()> {
    for name in env.keys() {
        let mut letters = name.chars();
        let right = letters.next().is_some_and(|c| c.is_ascii_alphabetic() || c == '_')
            && letters.all(|c| c.is_ascii_alphanumeric() || c == '_');
        if !right {
            return Err(Error::Refused { provider, what: format!("`{name}` is no name of a variable") });
        }
    }
    Ok(())
}

/// One word of a shell's command line.
pub(super) fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

pub(super) fn command_line(argv: &[String]) -> String {
    argv.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" ")
}

/// Where [`begin`] puts what the command prints.
pub(super) const LOG: &str = "${HOME:-/tmp}/.agent-fleet/log";

/// What begins a container's command where the provider takes none: once each time that the container is booted, however often this is run. What
/// marks that it has begun is in memory, as far as there is such a place, so that it goes when the container's processes go; what is begun is
/// remembered on the disk, so that `command` is not needed to begin it anew.
pub(super) fn begin(key: &str, command: Option<&[String]>) -> Vec<String> {
    const SCRIPT: &str = r#"m=/dev/shm; [ -d $m ] && [ -w $m ] || m=/tmp
d=${HOME:-/tmp}/.agent-fleet; mkdir -p "$d" || exit 1
if [ -n "$2" ]; then printf '%s\n' "$2" >"$d/start.$$" && mv "$d/start.$$" "$d/start" || exit 1; fi
[ -f "$d/start" ] || exit 0
mkdir "$m/$1" 2>/dev/null || { [ -d "$m/$1" ] && exit 0; exit 1; }
echo $$ >"$d/pid"
exec sh "$d/start" >>"$d/log" 2>&1 </dev/null"#;
    let what = command.map(|argv| format!("exec {}", command_line(argv))).unwrap_or_default();
    ["sh", "-c", SCRIPT, "agent-fleet", key, &what].map(String::from).to_vec()
}

/// Asks the command that was begun to end, and waits for that, no longer than the grace.
pub(super) fn end(grace: Duration) -> Vec<String> {
    // Five looks a second.
    let script = format!(
        "p=$(cat \"${{HOME:-/tmp}}/.agent-fleet/pid\" 2>/dev/null) || exit 0; kill -TERM \"$p\" 2>/dev/null || exit 0; i={}; \
         while [ $i -gt 0 ] && kill -0 \"$p\" 2>/dev/null; do sleep 0.2; i=$((i-1)); done",
        grace.as_millis().div_ceil(200)
    );
    ["sh", "-c", &script].map(String::from).to_vec()
}

/// Prints the last of what the command has printed.
pub(super) fn tail(most: usize) -> Vec<String> {
    let script = format!("f=\"{LOG}\"; [ ! -f \"$f\" ] || tail -c {most} \"$f\"");
    ["sh", "-c", &script].map(String::from).to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(status: u16, body: &str) -> Answer {
        Answer {
            provider: "fake",
            status: StatusCode::from_u16(status).unwrap(),
            headers: HeaderMap::new(),
            body: body.as_bytes().to_vec(),
            safe: false,
            hide: vec![String::from("t0ken")],
        }
    }

    #[test]
    fn a_no_is_told_in_the_providers_words_without_a_secret() {
        let said = |status, body: &str| answer(status, body).into_error().to_string();
        assert_eq!(said(400, r#"{"code":400,"message":"bad t0ken\nhere"}"#), "fake: it answers 400: bad [secret] here");
        assert_eq!(said(422, r#"{"error":{"code":"x","message":"no"}}"#), "fake: it answers 422: no");
        assert_eq!(said(500, "<html>"), "fake: it answers 500: <html>");
        assert_eq!(said(403, ""), "fake: it answers 403");
        assert!(said(400, &"x".repeat(10_000)).len() < WORDS_MOST + 50);
    }

    #[test]
    fn what_can_be_done_about_it_is_in_the_error() {
        let error = |status| answer(status, "").into_error();
        assert!(matches!(error(404), Error::Missing { .. }));
        assert!(matches!(error(429), Error::Busy { .. }));
        assert!(matches!(error(409), Error::Failed { .. }));
        assert!(matches!(error(401), Error::Refused { .. }));
        assert!(matches!(error(502), Error::Unsure { .. }), "it may have been done");
        assert!(matches!(Answer { safe: true, ..answer(502, "") }.into_error(), Error::Failed { .. }));
    }

    #[test]
    fn what_is_null_is_not_there_and_what_is_no_time_is_none() {
        #[derive(Debug, PartialEq, serde::Deserialize)]
        struct Said {
            #[serde(default)]
            labels: BTreeMap<String, String>,
            #[serde(default)]
            items: Vec<Said>,
            #[serde(default)]
            word: String,
            #[serde(default, deserialize_with = "time")]
            at: Option<Timestamp>,
        }
        let said = |body: &str| answer(200, body).json::<Said>().unwrap();
        let none = said("{}");
        assert_eq!(said(r#"{"labels":null,"items":null,"word":null,"at":null,"more":[1]}"#), none);
        assert_eq!(said(r#"{"items":[{"labels":{"a":null},"at":""}]}"#).items, [none]);
        for (text, second) in
            [("1970-01-01T01:00:01+01:00", 1), ("1970-01-01T00:00:01.999999999Z", 1), ("0001-01-01T00:00:00Z", -62_135_596_800)]
        {
            let at = said(&format!(r#"{{"at":"{text}"}}"#)).at.unwrap();
            assert_eq!(at.as_nanosecond().div_euclid(1_000_000_000), second, "{text}");
        }
        assert_eq!(at("https://8000-x.example/"), "https://8000-x.example");
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_asked_for_too_often_is_spaced_and_then_refused() {
        let rate = Rate { per_second: 1.0, burst: 3 };
        let mut due = Instant::now();
        let waits: Vec<_> = (0..7).map(|_| pace(&mut due, rate, Instant::now()).map(|wait| wait.as_secs())).collect();
        assert_eq!(waits, [Ok(0), Ok(0), Ok(0), Ok(1), Ok(2), Ok(3), Ok(4)]);
        assert_eq!(pace(&mut due, rate, Instant::now()), Err(Duration::from_secs(5)));
        tokio::time::advance(Duration::from_secs(60)).await;
        assert_eq!(pace(&mut due, rate, Instant::now()), Ok(Duration::ZERO));
    }

    #[test]
    fn an_address_is_one_of_http() {
        for wrong in ["", "api.example.com", "file:///etc", "mailto:a@example.com"] {
            assert!(parse_base(wrong).is_err(), "{wrong}");
        }
        assert!(parse_base("http://127.0.0.1:1/v1").is_ok());
    }

    /// By a real shell, in a home of its own.
    #[test]
    fn a_command_is_begun_once_for_each_boot() {
        let key = format!("agent-test-{}", uuid::Uuid::now_v7().simple());
        let home = std::env::temp_dir().join(&key);
        std::fs::create_dir(&home).unwrap();
        let run = |argv: Vec<String>| std::process::Command::new(&argv[0]).args(&argv[1..]).env("HOME", &home).output().unwrap();
        let command = ["printf", "%s|", "it's", "$HOME", "a b"].map(String::from);
        for _ in 0..3 {
            assert!(run(begin(&key, Some(&command))).status.success());
        }
        assert_eq!(run(tail(100)).stdout, b"it's|$HOME|a b|");
        for shm in ["/dev/shm", "/tmp"] {
            let _gone = std::fs::remove_dir(std::path::Path::new(shm).join(&key));
        }
        // After a boot, without being told what: and once more only.
        for _ in 0..2 {
            assert!(run(begin(&key, None)).status.success());
        }
        assert_eq!(run(tail(5)).stdout, b"|a b|");
        assert_eq!(run(tail(1000)).stdout.len(), 2 * b"it's|$HOME|a b|".len());
        for shm in ["/dev/shm", "/tmp"] {
            let _gone = std::fs::remove_dir(std::path::Path::new(shm).join(&key));
        }
        std::fs::remove_dir_all(&home).unwrap();
    }
}
