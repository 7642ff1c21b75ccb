//! A hook that is a server: the event is posted, signed, and what it answers is read as far as it is of interest.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use reqwest::header::CONTENT_TYPE;
use reqwest::{Response, StatusCode};
use serde_json::Value;
use tokio::time::timeout;

use super::{Hooks, Outcome, Told, sign};
use crate::provider::Secret;
use crate::retry_after;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// No answer that means something is longer.
const ANSWER_MOST: usize = 64 * 1024;
/// Connections that are kept for the next event, per receiver.
const KEPT_OPEN: usize = 4;

pub(super) fn client() -> Result<reqwest::Client, String> {
    let roots = rustls::RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
    let tls = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| format!("no TLS: {error}"))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    reqwest::Client::builder()
        .tls_backend_preconfigured(tls)
        .connect_timeout(CONNECT_TIMEOUT)
        .pool_max_idle_per_host(KEPT_OPEN)
        // What is signed for one receiver is not carried to another, by a redirect or by whoever sets HTTP_PROXY.
        .redirect(reqwest::redirect::Policy::none())
        .no_proxy()
        .user_agent(concat!("agent-fleet/", env!("CARGO_PKG_VERSION")))
        .build()
        .map_err(|error| format!("no HTTP client: {error}"))
}

impl Hooks {
    pub(super) async fn post(&self, url: &str, secrets: &[Secret], told: &Told<'_>, within: Duration, may_veto: bool) -> Outcome {
        let keys = match self.keys(secrets) {
            Ok(keys) => keys,
            Err(said) => return Outcome::Failed { said, after: None },
        };
        let timestamp = (self.clock)().as_second();
        let request = self
            .client
            .post(url)
            .header(CONTENT_TYPE, "application/cloudevents+json; charset=utf-8")
            .header("webhook-id", told.key)
            .header("webhook-timestamp", timestamp)
            .header("webhook-signature", sign::signatures(&keys, told.key, timestamp, told.event))
            .body(told.event.to_owned());
        let answered = timeout(within, async {
            let mut response = request.send().await?;
            let body = body(&mut response).await;
            Ok::<_, reqwest::Error>((response, body))
        });
        match answered.await {
            Err(_) => Outcome::Timeout,
            Ok(Err(error)) => Outcome::Failed { said: chain(&error), after: None },
            Ok(Ok((response, body))) => judge(&response, body, may_veto),
        }
    }

    /// Read each time, so that a file can be replaced.
    fn keys(&self, secrets: &[Secret]) -> Result<Vec<sign::Key>, String> {
        let key = |secret: &Secret| match self.outside.secret(secret) {
            Ok(Some(value)) => sign::Key::of(value.reveal()).map_err(|what| format!("its secret {what}")),
            Ok(None) => Err(String::from("its secret is not here")),
            Err(what) => Err(format!("its secret: {what}")),
        };
        secrets.iter().map(key).collect()
    }
}

fn judge(response: &Response, body: Result<Vec<u8>, String>, may_veto: bool) -> Outcome {
    let status = response.status();
    let text = |body: &[u8]| format!("{status}: {}", String::from_utf8_lossy(body).trim());
    if status.is_success() {
        return match body {
            // Nobody waits for what it has to say.
            Err(_) if !may_veto => Outcome::Ok(status.to_string()),
            Ok(body) if !may_veto => Outcome::Ok(text(&body)),
            // It may have been a no.
            Err(what) => Outcome::Failed { said: what, after: None },
            Ok(body) => match serde_json::from_slice::<Value>(&body).ok().as_ref().and_then(|answer| answer.get("allow")) {
                None | Some(Value::Bool(true)) => Outcome::Ok(text(&body)),
                Some(Value::Bool(false)) => Outcome::Veto(reason(&body)),
                Some(_) => Outcome::Failed { said: format!("`allow` is true or false; {}", text(&body)), after: None },
            },
        };
    }
    let said = text(&body.unwrap_or_default());
    let after = retry_after::of(response.headers(), SystemTime::now());
    match status {
        StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_EARLY | StatusCode::TOO_MANY_REQUESTS => Outcome::Failed { said, after },
        _ if status.is_server_error() => Outcome::Failed { said, after },
        _ if status.is_redirection() => Outcome::Refused(format!("{status}: it is somewhere else, and nobody is followed")),
        _ => Outcome::Refused(said),
    }
}

fn reason(body: &[u8]) -> String {
    let answer: Value = serde_json::from_slice(body).unwrap_or_default();
    match answer.get("reason").and_then(Value::as_str) {
        Some(reason) if !reason.trim().is_empty() => reason.to_owned(),
        _ => String::from("it gave no reason"),
    }
}

/// All of it, or why not.
async fn body(response: &mut Response) -> Result<Vec<u8>, String> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(|error| chain(&error))? {
        if body.len() + chunk.len() > ANSWER_MOST {
            return Err(format!("its answer is longer than {} KiB", ANSWER_MOST / 1024));
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

/// What went wrong, without the URL: its path may be a secret.
fn chain(error: &reqwest::Error) -> String {
    let mut said = String::from(if error.is_connect() { "no connection" } else { "no answer" });
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        said = format!("{said}: {error}");
        cause = error.source();
    }
    said
}
