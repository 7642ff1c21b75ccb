//! The busy lease: tells a platform that the agent works, and until when to believe it.
//!
//! Platforms judge by inbound traffic and stop agents in the middle of a tool call. The same word is said in three ways: `/busy`, a
//! file, a webhook. It is a lease: a sidecar that dies says nothing more, and the last word runs out by itself.
//!
//! ```text
//!   idle ──works──► told busy until T ──a third of the lease──► told again ──idle──► told idle
//! ```

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use agent_sidecar_core::update::Activity;
use agent_sidecar_core::{Monitor, Now};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::header::{CONTENT_TYPE, HeaderValue, USER_AGENT};
use hyper::{Method, Request, Uri};
use hyper_rustls::HttpsConnectorBuilder;
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use serde::Serialize;

use crate::export::otlp::environment::Headers;
use crate::http::visit_blocking;
use crate::hub::Share;
use crate::proxy::Way;
use crate::supervise::{BeforeExit, Handle};

/// How often the agent is looked at. Short beside every lease, and nothing beside the agent's own work.
const LOOK: Duration = Duration::from_secs(1);
/// A webhook has this long for its answer; at the end of the agent, too.
pub(crate) const ANSWER: Duration = Duration::from_secs(2);

/// What is said.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Word {
    pub(crate) busy: bool,
    pub(crate) state: Activity,
    /// Seconds since the Unix epoch: until then it may be believed. Absent when idle.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) until: Option<u64>,
}

impl Word {
    /// Of this moment. An agent on its way out is busy to the last: its last cost is on its way, too.
    pub(crate) fn of(monitor: &Monitor, now: Now, lease: Duration) -> Word {
        let state = monitor.activity();
        let busy = monitor.running() && works(state);
        Word { busy, state, until: busy.then(|| (now.unix + lease).as_secs()) }
    }

    /// Of several agents: the platform is to wait for the last of them.
    pub(crate) fn of_all(states: impl Iterator<Item = Activity>, unix: Duration, lease: Duration) -> Word {
        let mut word = Word { busy: false, state: Activity::Idle, until: None };
        if let Some(state) = states.into_iter().find(|state| works(*state)) {
            word = Word { busy: true, state, until: Some((unix + lease).as_secs()) };
        }
        word
    }

    /// How long it may be believed from now.
    pub(crate) fn for_seconds(&self) -> u64 {
        self.until.map_or(0, |until| until.saturating_sub(crate::supervise::unix().as_secs()))
    }

    pub(crate) fn json(&self) -> Vec<u8> {
        let mut json = serde_json::to_vec(self).expect("a word has no keys but names");
        json.push(b'\n');
        json
    }
}

fn works(state: Activity) -> bool {
    !matches!(state, Activity::WaitingInput | Activity::Idle)
}

/// Where the word goes, and for how long it holds.
#[derive(Clone, Debug)]
pub(crate) struct Lease {
    pub(crate) length: Duration,
    pub(crate) file: Option<PathBuf>,
    pub(crate) webhook: Option<Uri>,
    pub(crate) headers: Headers,
}

/// When it is to be said again.
#[derive(Debug, Default)]
struct Told {
    busy: Option<bool>,
    at: Duration,
}

impl Told {
    fn due(&mut self, word: &Word, now: Duration, lease: Duration) -> bool {
        let due = self.busy != Some(word.busy) || word.busy && now.saturating_sub(self.at) >= lease / 3;
        if due {
            *self = Told { busy: Some(word.busy), at: now };
        }
        due
    }
}

/// Says it for as long as there is a monitor; what is returned says the last of it. Does nothing where nobody is to be told.
/// Where wrappers meet, one speaks for all of them, and whoever ends says nothing while another works.
pub(crate) fn tell_for_ever(lease: Lease, handle: Handle, share: Option<Share>) -> Option<BeforeExit> {
    if lease.file.is_none() && lease.webhook.is_none() {
        return None;
    }
    let (last, others) = (lease.clone(), share.clone());
    let started = std::thread::Builder::new().name(String::from("busy")).stack_size(512 * 1024).spawn(move || {
        let mut teller = Teller::new(lease);
        let mut told = Told::default();
        let length = teller.lease.length;
        let target = format!("{:?} {:?}", teller.lease.file, teller.lease.webhook);
        // Kept until the process ends.
        let mut speaker = None;
        while let Some((word, now)) = visit_blocking(&handle, move |monitor, now| (Word::of(monitor, now, length), now)) {
            let mut word = word;
            let mut silent = false;
            if let Some(share) = &share {
                if speaker.is_none() {
                    // Where that cannot be found out, twice is better than never.
                    let turn = share.speaker(&target);
                    silent = matches!(turn, Ok(None));
                    speaker = turn.ok().flatten();
                }
                if !silent && !word.busy {
                    let all = Word::of_all(share.others().into_iter(), now.unix, length);
                    word = if all.busy { all } else { word };
                }
            }
            if !silent && told.due(&word, now.mono, length) {
                teller.tell(&word);
            }
            std::thread::sleep(LOOK.min(length / 6).max(LOOK / 20));
        }
    });
    if let Err(error) = started {
        tracing::warn!(%error, "nobody is told whether the agent is busy");
        return None;
    }
    Some(Box::new(move |_| {
        if !others.is_some_and(|share| share.others().into_iter().any(works)) {
            Teller::new(last).tell(&Word { busy: false, state: Activity::Draining, until: None });
        }
    }))
}

struct Teller {
    lease: Lease,
    /// Failing is said once, until it works again.
    failing: bool,
}

impl Teller {
    fn new(lease: Lease) -> Teller {
        Teller { lease, failing: false }
    }

    fn tell(&mut self, word: &Word) {
        let json = word.json();
        let written = self.lease.file.as_deref().map_or(Ok(()), |path| replace(path, &json));
        let written = written.map_err(|error| format!("the file cannot be written: {error}"));
        let posted =
            self.lease.webhook.as_ref().map_or(Ok(()), |uri| post("the webhook", uri, &self.lease.headers, json).map(drop));
        let failed = written.and(posted).err();
        match (&failed, self.failing) {
            (Some(error), false) => {
                tracing::warn!(%error, "the platform was not told whether the agent is busy; it is told again")
            }
            (None, true) => tracing::info!("the platform is told again whether the agent is busy"),
            _ => {}
        }
        self.failing = failed.is_some();
    }
}

/// A reader sees the word before or this one, never half of one.
fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}", std::process::id()));
    let beside = PathBuf::from(name);
    // Whatever has this name, a link above all, is not written through.
    std::fs::remove_file(&beside).ok();
    let made = OpenOptions::new().write(true).create_new(true).open(&beside);
    let written = made.and_then(|mut file| file.write_all(content)).and_then(|()| std::fs::rename(&beside, path));
    if written.is_err() {
        // Not there, or the disk is full: then it is in the way.
        std::fs::remove_file(&beside).ok();
    }
    written
}

/// An answer is a line.
const ANSWER_MOST: usize = 16 * 1024;

/// A client for each post: they are rare, and a connection that lies idle between them would be dead as often as not. What is answered.
pub(crate) fn post(whom: &str, uri: &Uri, headers: &Headers, json: Vec<u8>) -> Result<Vec<u8>, String> {
    let roots = rustls::RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let connector =
        HttpsConnectorBuilder::new().with_tls_config(tls).https_or_http().enable_http1().wrap_connector(Way::out(ANSWER));
    let mut request = Request::new(Full::new(Bytes::from(json)));
    *request.method_mut() = Method::POST;
    *request.uri_mut() = uri.clone();
    request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    request.headers_mut().insert(USER_AGENT, HeaderValue::from_static(concat!("agent-sidecar/", env!("CARGO_PKG_VERSION"))));
    for (name, value) in &headers.0 {
        request.headers_mut().append(name, value.clone());
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| error.to_string())?;
    let answer = runtime.block_on(async {
        let client = Client::builder(TokioExecutor::new()).build::<_, Full<Bytes>>(connector);
        tokio::time::timeout(ANSWER, async {
            let response = client.request(request).await?;
            let status = response.status();
            // Whether it is all of it matters to nobody who does not read it.
            let body = Limited::new(response.into_body(), ANSWER_MOST).collect().await;
            Ok::<_, hyper_util::client::legacy::Error>((status, body.map(|body| body.to_bytes().to_vec()).unwrap_or_default()))
        })
        .await
    });
    match answer {
        Ok(Ok((status, body))) if status.is_success() => Ok(body),
        Ok(Ok((status, _))) => Err(format!("{whom} answers {status}")),
        // The address may hold a token: it is not repeated.
        Ok(Err(error)) if error.is_connect() => Err(format!("{whom} cannot be reached")),
        Ok(Err(_)) => Err(format!("{whom} breaks off")),
        Err(_) => Err(format!("{whom} does not answer within {ANSWER:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(busy: bool) -> Word {
        Word { busy, state: if busy { Activity::Tool } else { Activity::Idle }, until: busy.then_some(1) }
    }

    #[test]
    fn it_is_said_when_it_changes_and_again_before_it_runs_out() {
        let lease = Duration::from_secs(60);
        let mut told = Told::default();
        let said: Vec<u64> =
            (0..100).filter(|second| told.due(&word((10..70).contains(second)), Duration::from_secs(*second), lease)).collect();
        assert_eq!(said, [0, 10, 30, 50, 70]);
    }

    #[test]
    fn a_word_is_one_line_of_json() {
        assert_eq!(word(true).json(), b"{\"busy\":true,\"state\":\"tool\",\"until\":1}\n");
        assert_eq!(word(false).json(), b"{\"busy\":false,\"state\":\"idle\"}\n");
    }
}
