//! How Modal is asked: gRPC with tokens that are read when they are sent, bounds in time, number and size, and the headers of Modal's own clients.

use std::sync::OnceLock;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::http::Uri;
use axum::http::uri::PathAndQuery;
use prost::Message;
use tonic::client::Grpc;
use tonic::metadata::{AsciiMetadataValue, MetadataMap};
use tonic::transport::{Channel, ClientTlsConfig, Endpoint};
use tonic::{Code, Request, Status, Streaming};
use tonic_prost::ProstCodec;

use super::NAME;
use super::messages::{RPCRetryPolicy, RPCStatus};
use crate::provider::{Error, Result, Secret};

/// How often what is safe is tried, after the pauses of their own clients.
const TRIES: u32 = 3;
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const PAUSE_MOST: Duration = Duration::from_secs(1);
/// Who says that we shall come back later than this is told to the caller, and not waited for.
const THROTTLE_MOST: Duration = Duration::from_secs(4);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// A page of containers with all their labels is a tenth of this; theirs is 100 MB.
const MESSAGE_MOST: usize = 8 << 20;
/// As much of their own words as is repeated.
const WORDS_MOST: usize = 300;

/// What their Python client of the release says whose messages we follow: who says less is refused, and who is older may be. Who we are is in the agent.
const CLIENT: [(&str, &str); 3] =
    [("x-modal-client-type", "1"), ("x-modal-client-version", "1.6.4"), ("x-modal-python-version", "3.13.0")];

/// Where one service is.
pub(super) struct Server {
    url: String,
    /// Made when it is first needed: that takes a runtime.
    channel: OnceLock<Channel>,
    auth: Auth,
}

/// How it knows us.
pub(super) enum Auth {
    Token {
        id: Secret,
        secret: Secret,
    },
    /// The router of one container's.
    Bearer(String),
}

/// How often and how long something is tried.
#[derive(Clone, Copy)]
pub(super) struct Effort {
    /// Twice is like once.
    pub(super) safe: bool,
    pub(super) timeout: Duration,
}

/// What only asks, or does no harm twice.
pub(super) const SAFE: Effort = Effort { safe: true, timeout: Duration::from_secs(30) };

/// One call's name, with what it wants hidden.
pub(super) struct Call<'a> {
    /// `/service/method`.
    pub(super) path: &'static str,
    pub(super) effort: Effort,
    /// Values that are in no message, even if they are repeated.
    pub(super) hide: &'a [String],
}

impl Server {
    /// # Errors
    /// A sentence that says what is wrong with the address.
    pub(super) fn new(url: &str, auth: Auth) -> std::result::Result<Self, String> {
        let right =
            url.parse::<Uri>().is_ok_and(|uri| matches!(uri.scheme_str(), Some("http" | "https")) && uri.host().is_some());
        if !right {
            return Err(format!("`{url}` is no address: it begins with https:// or http://"));
        }
        endpoint(url)?;
        Ok(Self { url: url.to_owned(), channel: OnceLock::new(), auth })
    }

    pub(super) fn is_plain(&self) -> bool {
        self.url.starts_with("http://")
    }

    fn channel(&self) -> Channel {
        self.channel.get_or_init(|| endpoint(&self.url).expect("new has tried it").connect_lazy()).clone()
    }

    fn grpc(&self) -> Grpc<Channel> {
        Grpc::new(self.channel()).max_decoding_message_size(MESSAGE_MOST).max_encoding_message_size(MESSAGE_MOST)
    }

    /// Asks once, or as often as it does no harm.
    pub(super) async fn ask<Q, A>(&self, call: &Call<'_>, question: Q) -> Result<A>
    where
        Q: Message + Clone + 'static,
        A: Message + Default + 'static,
    {
        self.ask_for_code(call, question).await.map_err(|(_, error)| error)
    }

    /// The same, for who makes something of the kind of a no.
    pub(super) async fn ask_for_code<Q, A>(&self, call: &Call<'_>, question: Q) -> std::result::Result<A, (Code, Error)>
    where
        Q: Message + Clone + 'static,
        A: Message + Default + 'static,
    {
        let idempotent = uuid::Uuid::now_v7().to_string();
        let (mut pause, mut tries, mut throttled) = (FIRST_PAUSE, 0, 0);
        loop {
            let mut hide = call.hide.to_vec();
            let mut request = Request::new(question.clone());
            self.sign(request.metadata_mut(), &mut hide).map_err(|error| (Code::Unauthenticated, error))?;
            let head = request.metadata_mut();
            put(head, "x-idempotency-key", &idempotent);
            put(head, "x-retry-attempt", &tries.to_string());
            put(head, "x-throttle-retry-attempt", &throttled.to_string());
            request.set_timeout(call.effort.timeout);
            let mut grpc = self.grpc();
            let asked = async {
                grpc.ready().await.map_err(|error| Status::unavailable(chain(&error)))?;
                grpc.unary(request, PathAndQuery::from_static(call.path), ProstCodec::<Q, A>::default()).await
            };
            let status = match tokio::time::timeout(call.effort.timeout, asked).await {
                Ok(Ok(answer)) => return Ok(answer.into_inner()),
                Ok(Err(status)) => status,
                Err(_) => Status::deadline_exceeded("no answer in time"),
            };
            let wait = if status.code() == Code::ResourceExhausted {
                throttled += 1;
                // Without a word about when, it is a quota, and no matter of seconds.
                retry_after(&status).filter(|after| *after <= THROTTLE_MOST && throttled < TRIES)
            } else {
                tries += 1;
                let again = call.effort.safe && is_passing(status.code()) && tries < TRIES;
                let wait = again.then_some(pause);
                pause = (pause * 2).min(PAUSE_MOST);
                wait
            };
            match wait {
                Some(wait) => tokio::time::sleep(wait).await,
                None => return Err((status.code(), error(&status, call.effort.safe, &hide))),
            }
        }
    }

    /// Asks once for an answer in pieces.
    pub(super) async fn stream<Q, A>(&self, call: &Call<'_>, question: Q) -> Result<Streaming<A>>
    where
        Q: Message + 'static,
        A: Message + Default + 'static,
    {
        let mut hide = call.hide.to_vec();
        let mut request = Request::new(question);
        self.sign(request.metadata_mut(), &mut hide)?;
        request.set_timeout(call.effort.timeout);
        let mut grpc = self.grpc();
        let asked = async {
            grpc.ready().await.map_err(|error| Status::unavailable(chain(&error)))?;
            grpc.server_streaming(request, PathAndQuery::from_static(call.path), ProstCodec::<Q, A>::default()).await
        };
        let answered = tokio::time::timeout(call.effort.timeout, asked).await;
        let answered = answered.unwrap_or_else(|_| Err(Status::deadline_exceeded("no answer in time")));
        answered.map(tonic::Response::into_inner).map_err(|status| error(&status, call.effort.safe, &hide))
    }

    fn sign(&self, head: &mut MetadataMap, hide: &mut Vec<String>) -> Result<()> {
        match &self.auth {
            Auth::Token { id, secret } => {
                for (name, secret) in [("x-modal-token-id", id), ("x-modal-token-secret", secret)] {
                    let refused = |what| Error::Refused { provider: NAME, what };
                    let value = secret.read().map_err(|why| refused(format!("no token: {why}")))?;
                    let mut sent = AsciiMetadataValue::try_from(value.expose())
                        .map_err(|_| refused(String::from("the token has letters in it that no header can carry")))?;
                    sent.set_sensitive(true);
                    head.insert(name, sent);
                    hide.push(value.expose().to_owned());
                }
                for (name, value) in CLIENT {
                    put(head, name, value);
                }
                let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                put(head, "x-modal-timestamp", &format!("{:.6}", now.as_secs_f64()));
                if let Some(host) = self.url.parse::<Uri>().ok().as_ref().and_then(Uri::host) {
                    put(head, "x-modal-host", host);
                }
            }
            Auth::Bearer(token) => {
                put(head, "authorization", &format!("Bearer {token}"));
                hide.push(token.clone());
            }
        }
        Ok(())
    }
}

fn endpoint(url: &str) -> std::result::Result<Endpoint, String> {
    let said = |error: tonic::transport::Error| format!("`{url}`: {}", chain(&error));
    let endpoint = Endpoint::from_shared(url.to_owned()).map_err(said)?;
    let endpoint = if url.starts_with("https://") {
        endpoint.tls_config(ClientTlsConfig::new().with_webpki_roots()).map_err(said)?
    } else {
        endpoint
    };
    let endpoint = endpoint.user_agent(concat!("agent-fleet/", env!("CARGO_PKG_VERSION"))).map_err(said)?;
    // As their clients do: a connection that a middlebox has forgotten is found out about.
    Ok(endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(Duration::from_secs(30))
        .keep_alive_timeout(Duration::from_secs(10))
        .keep_alive_while_idle(true))
}

/// One that no header can carry is left out.
fn put(head: &mut MetadataMap, name: &'static str, value: &str) {
    if let Ok(mut value) = AsciiMetadataValue::try_from(value) {
        value.set_sensitive(true);
        head.insert(name, value);
    }
}

/// What their own clients try again.
pub(super) fn is_passing(code: Code) -> bool {
    matches!(code, Code::DeadlineExceeded | Code::Unavailable | Code::Cancelled | Code::Internal | Code::Unknown)
}

/// When they say that we may come again. It is among the details, in a message of theirs.
fn retry_after(status: &Status) -> Option<Duration> {
    let details = RPCStatus::decode(status.details()).ok()?;
    let policy = details.details.iter().find(|detail| detail.type_url.ends_with("/modal.client.RPCRetryPolicy"))?;
    let policy = RPCRetryPolicy::decode(&policy.value[..]).ok()?;
    Duration::try_from_secs_f32(policy.retry_after_secs.max(0.1)).ok()
}

/// What this no means.
pub(super) fn error(status: &Status, safe: bool, hide: &[String]) -> Error {
    let (provider, what) = (NAME, words(status, hide));
    match status.code() {
        Code::NotFound => Error::Missing { provider },
        Code::ResourceExhausted => Error::Busy { provider, after: retry_after(status) },
        // In the way of something else.
        Code::Aborted | Code::FailedPrecondition | Code::DataLoss => Error::Failed { provider, what },
        Code::DeadlineExceeded | Code::Unavailable | Code::Cancelled | Code::Internal | Code::Unknown if safe => {
            Error::Failed { provider, what }
        }
        Code::DeadlineExceeded | Code::Unavailable | Code::Cancelled | Code::Internal | Code::Unknown => {
            Error::Unsure { provider, what }
        }
        Code::Ok
        | Code::InvalidArgument
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::OutOfRange
        | Code::Unimplemented
        | Code::Unauthenticated => Error::Refused { provider, what },
    }
}

/// Their own words, cut, and without a secret.
fn words(status: &Status, hide: &[String]) -> String {
    let mut words = status.message().to_owned();
    for secret in hide.iter().filter(|secret| !secret.is_empty()) {
        words = words.replace(secret.as_str(), "[secret]");
    }
    let words: String = words.chars().map(|c| if c.is_control() { ' ' } else { c }).take(WORDS_MOST).collect();
    let (code, words) = (format!("{:?}", status.code()), words.trim());
    if words.is_empty() { format!("it answers {code}") } else { format!("it answers {code}: {words}") }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_no_is_told_in_their_words_without_a_secret() {
        let status = Status::permission_denied("bad as-s3cret\nhere");
        let said = error(&status, true, &[String::from("as-s3cret")]);
        assert!(
            matches!(&said, Error::Refused { what, .. } if what == "it answers PermissionDenied: bad [secret] here"),
            "{said:?}"
        );
        assert!(words(&Status::unknown("x".repeat(10_000)), &[]).len() < WORDS_MOST + 50);
    }

    #[test]
    fn what_can_be_done_about_it_is_in_the_error() {
        let kind = |code, safe| error(&Status::new(code, ""), safe, &[]);
        assert!(matches!(kind(Code::NotFound, false), Error::Missing { .. }));
        assert!(matches!(kind(Code::Unavailable, false), Error::Unsure { .. }), "it may have been done");
        assert!(matches!(kind(Code::Unavailable, true), Error::Failed { .. }));
        assert!(matches!(kind(Code::ResourceExhausted, true), Error::Busy { after: None, .. }));
        assert!(matches!(kind(Code::Unauthenticated, true), Error::Refused { .. }));
    }

    #[test]
    fn an_address_is_one_of_http() {
        let auth = || Auth::Bearer(String::from("x"));
        for wrong in ["", "api.modal.com", "file:///etc", "unix:/x", "https://"] {
            assert!(Server::new(wrong, auth()).is_err(), "{wrong}");
        }
        assert!(Server::new("https://api.modal.com", auth()).is_ok());
        assert!(Server::new("http://127.0.0.1:1", auth()).unwrap().is_plain());
    }
}
