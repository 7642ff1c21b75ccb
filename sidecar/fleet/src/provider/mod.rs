//! Where containers run, behind one small interface.
//!
//! A provider only does what it is told and says what is there; when, why and how often is [`crate::plan`]'s. It declares what it cannot do in
//! [`Capabilities`], and [`refusals`] reads those before anything is created.

pub mod cloudflare;
pub mod daytona;
pub mod docker;
pub mod e2b;
pub mod firecracker;
pub mod fly;
pub mod kubernetes;
pub mod modal;
mod rest;
pub mod secret;
pub mod vercel;

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::stream::BoxStream;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// The label that says whose a container is: the fleet's name. Lists are asked for by it.
pub const FLEET_LABEL: &str = "agent-fleet.fleet";
/// The label that holds [`Spec::key`].
pub const KEY_LABEL: &str = "agent-fleet.key";
/// The label that holds the session's id.
pub const SESSION_LABEL: &str = "agent-fleet.session";
/// The label that says when a container's life is over, where the provider does not end it by itself: who has lost the store can still tell.
pub const ENDS_LABEL: &str = "agent-fleet.ends";

/// Everything that must be known before the first call.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spec {
    /// Ours: the name of the container, and what makes creating it twice one.
    pub key: String,
    /// An image, a template or a snapshot: whatever the provider starts from.
    pub image: String,
    /// The program and its arguments, the sidecar's own first. Empty: the image's.
    #[serde(default)]
    pub command: Vec<String>,
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Variables whose values are secrets, by where they are found: read when the container is created, and kept nowhere.
    #[serde(default)]
    pub secrets: BTreeMap<String, Secret>,
    #[serde(default)]
    pub size: Size,
    /// Ports of the container that are to be reached from outside.
    #[serde(default)]
    pub ports: Vec<u16>,
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// How long it may exist, from its creation: by the provider where it can, see [`Capabilities::ttl`].
    pub ttl: Duration,
    /// The provider's own idle timer, behind the sidecar's word. `None`: switched off, explicitly, where there is one.
    #[serde(default)]
    pub idle: Option<Duration>,
    /// Nodes that it is not to be put on: said when it is created, and kept nowhere. Only where there are some, see [`Capabilities::nodes`].
    #[serde(skip)]
    pub avoid: Vec<String>,
}

/// Where a secret is found. Its value is in no store, log, label or message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Secret {
    /// A variable of the fleet's own environment.
    Env(String),
    /// A file that the fleet can read; a last line feed is not part of it.
    File(std::path::PathBuf),
    /// What the provider keeps under this name: the value passes us by.
    Provider(String),
    /// Made by the fleet for this one container, and never written anywhere.
    #[serde(skip)]
    Given(secret::Value),
}

/// What a container gets: 1 CPU, 1 GiB and 5 GiB unless somebody says otherwise. Providers round up, and [`Sandbox::size`] is what they gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Size {
    /// Thousandths of a CPU.
    pub cpu_milli: u32,
    pub memory_mib: u32,
    pub disk_mib: u32,
}

impl Default for Size {
    fn default() -> Self {
        Self { cpu_milli: 1000, memory_mib: 1024, disk_mib: 5 * 1024 }
    }
}

/// A container, as the provider sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct Sandbox {
    /// Our key, if it has one.
    pub key: Option<String>,
    /// What the provider calls it: the handle for every other call.
    pub native: String,
    pub state: State,
    /// Why, in the provider's words.
    pub reason: Option<String>,
    pub exit_code: Option<i32>,
    /// What it was given, where the provider says so.
    pub size: Option<Size>,
    pub created: Option<Timestamp>,
    /// When the provider itself will end it.
    pub deadline: Option<Timestamp>,
    pub labels: BTreeMap<String, String>,
    /// The machine that it is on, where the provider has several and says so.
    pub node: Option<String>,
    /// It is taken away, or was, by the provider or whoever has a say there, and why: not by us, and not for what its agent does.
    pub disrupted: Option<String>,
}

/// What a container is doing. Every provider's words are mapped to these.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// It is being made or started.
    Creating,
    /// It was made, and waits for its start.
    Created,
    Running,
    Pausing,
    Paused,
    Stopping,
    /// It ran and has ended; what it was is still there.
    Stopped,
    /// It will not run: the provider gave up.
    Failed,
    /// The provider knows it and says that it is gone.
    Destroyed,
    /// The provider knows nothing of it.
    Missing,
    /// A word that we do not know.
    Unknown(String),
}

impl State {
    /// Whether nothing is left that could run or cost.
    pub fn is_gone(&self) -> bool {
        matches!(self, State::Destroyed | State::Missing)
    }
}

/// What a provider can do, and within which bounds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Capabilities {
    /// A command other than the image's is taken at creation. Where not, it is executed right after.
    pub command: bool,
    pub env: bool,
    /// Secrets that the provider keeps.
    pub provider_secrets: bool,
    /// A size is taken; where not, the image says it.
    pub size: bool,
    pub ports: bool,
    /// What exists is found by label. Where not, the provider's own index is ours.
    pub list: bool,
    /// It ends a container by itself; `None`: the sidecar's lease and the reconciler do.
    pub ttl: Option<Bounds>,
    /// It has an idle timer of its own.
    pub idle_timer: bool,
    pub pause: Pause,
    pub exec: bool,
    pub logs: bool,
    /// It tells what happens. Where not, we ask.
    pub events: bool,
    pub endpoint: bool,
    /// Who asks a port keeps the container awake, and pays for it: then telemetry is pushed, never pulled.
    pub traffic_keeps_awake: bool,
    /// It says which of its machines a container is on, and is told which ones not to use.
    pub nodes: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Bounds {
    pub least: Duration,
    pub most: Duration,
}

/// What is left of a container that is paused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Pause {
    /// It cannot be paused.
    No,
    /// Its processes stand still, and its price goes on.
    Frozen,
    /// Memory and disk, without the price of running.
    Memory,
    /// Its disk alone: what ran starts anew.
    Disk,
}

/// What it costs while it is there, in USD per hour.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Price {
    pub running: f64,
    pub paused: f64,
    pub stopped: f64,
    /// Where the figures are from, and when they were read.
    pub source: String,
}

/// A command inside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exec {
    pub argv: Vec<String>,
    pub env: BTreeMap<String, String>,
    pub stdin: Vec<u8>,
    /// How long it may take.
    pub timeout: Duration,
    /// It goes on when nobody listens: what it prints is not waited for.
    pub detached: bool,
}

/// What came of it. Each output is cut at [`OUTPUT_MOST`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Executed {
    pub exit_code: Option<i32>,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    /// There was more output than is kept.
    pub cut: bool,
}

pub const OUTPUT_MOST: usize = 4 << 20;

/// Where a port of a container is reached.
#[derive(Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// `http://…` or `https://…`, without a path.
    pub url: String,
    /// What has to be sent with each request. These are secrets.
    pub headers: Vec<(String, String)>,
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&str> = self.headers.iter().map(|(name, _)| name.as_str()).collect();
        f.debug_struct("Endpoint").field("url", &self.url).field("headers", &names).finish()
    }
}

/// That something has happened to a container: who is told asks what it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Happened {
    pub native: String,
    pub key: Option<String>,
    /// What [`SESSION_LABEL`] says.
    pub session: Option<String>,
}

/// Containers of a provider, with what is asked for on the next page.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Page {
    pub sandboxes: Vec<Sandbox>,
    /// How many more there are that cannot be read. As long as there is one, what is not found may be there: nothing is gone by this list, and
    /// nothing is made for want of it.
    pub unread: usize,
    pub next: Option<String>,
}

/// What went wrong, by what can be done about it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Asked too often.
    #[error("{provider}: asked too often{}", after.map_or_else(String::new, |after| format!("; again in {} s", after.as_secs())))]
    Busy { provider: &'static str, after: Option<Duration> },
    /// It may have been done, or not: ask what is there before it is tried again.
    #[error("{provider}: {what}")]
    Unsure { provider: &'static str, what: String },
    /// It was not done; trying again may help.
    #[error("{provider}: {what}")]
    Failed { provider: &'static str, what: String },
    /// It will not be done however often it is tried.
    #[error("{provider}: {what}")]
    Refused { provider: &'static str, what: String },
    /// There is no such container.
    #[error("{provider}: there is no such container")]
    Missing { provider: &'static str },
    #[error("{provider} cannot {verb}{}", hint.map_or_else(String::new, |hint| format!("; {hint}")))]
    Unsupported { provider: &'static str, verb: &'static str, hint: Option<&'static str> },
}

impl Error {
    /// Whether the same call may do better later.
    pub fn is_passing(&self) -> bool {
        matches!(self, Error::Busy { .. } | Error::Unsure { .. } | Error::Failed { .. })
    }
}

pub type Result<T> = std::result::Result<T, Error>;

/// As much of what is wrong with an item as is told.
const WRONG_MOST: usize = 200;

/// Says of an item of a list that it is left out.
fn tell_unread(provider: &'static str, item: &str, wrong: &dyn fmt::Display) {
    let wrong: String = unquoted(&wrong.to_string()).chars().take(WRONG_MOST).collect();
    tracing::warn!(provider, item, wrong, "a container on the list cannot be read: it is left out, and not taken for gone");
}

/// Without the text that stands there, which may be anything: also a secret in the wrong place.
fn unquoted(wrong: &str) -> String {
    match wrong.split_once('"').zip(wrong.rsplit_once('"')) {
        Some(((before, _), (_, after))) => format!("{before}\"…\"{after}"),
        None => wrong.to_owned(),
    }
}

/// What is looked for is not on the list, and might be what could not be read of it.
pub(crate) fn hidden(provider: &'static str, unread: usize) -> Error {
    let what = format!("of its list {unread} cannot be read, and what is looked for may be among them");
    Error::Failed { provider, what }
}

/// Each call has a bound in time of the provider's own, and may be given up at any moment.
#[async_trait]
pub trait Provider: Send + Sync {
    /// Its kind, as it is written in the configuration.
    fn name(&self) -> &'static str;
    fn capabilities(&self) -> Capabilities;
    fn price(&self, size: Size) -> Price;

    /// Makes a container, or finds the one that has this key. Where the provider starts what it makes, it runs.
    async fn create(&self, spec: &Spec) -> Result<Sandbox>;
    /// Runs what was made or has stopped. It is no mistake if it runs.
    async fn start(&self, native: &str) -> Result<()>;
    /// What is known of it, without waking it. One that is not there is [`State::Missing`], not an error.
    async fn state(&self, native: &str) -> Result<Sandbox>;
    /// The containers that have all these labels, page by page.
    async fn list(&self, labels: &BTreeMap<String, String>, page: Option<&str>) -> Result<Page>;
    async fn exec(&self, native: &str, command: &Exec) -> Result<Executed>;
    /// Its last output, at most so many bytes.
    async fn logs(&self, native: &str, most: usize) -> Result<Vec<u8>>;
    /// It is needed until then: moves the provider's timers, where there are some; never beyond its hard end.
    async fn keep_alive(&self, native: &str, until: Timestamp) -> Result<()>;
    async fn pause(&self, native: &str) -> Result<()>;
    /// Not on these nodes, where it is placed anew.
    async fn resume(&self, native: &str, avoid: &[String]) -> Result<()>;
    /// How long what has ended by itself is there, where the provider removes it then: who has not looked for longer does not know how it ended.
    fn forgets(&self) -> Option<Duration> {
        None
    }
    /// Whether what is taken away is placed anew without us.
    fn places_anew(&self) -> bool {
        false
    }
    /// Not on these nodes, when it is placed anew without us: it stays where it is.
    async fn avoid(&self, _native: &str, _nodes: &[String]) -> Result<()> {
        Ok(())
    }
    /// Asks it to end, and kills it after the grace.
    async fn stop(&self, native: &str, grace: Duration) -> Result<()>;
    /// It is gone, or will be. It is no mistake if it is.
    async fn delete(&self, native: &str) -> Result<()>;
    async fn endpoint(&self, native: &str, port: u16) -> Result<Endpoint>;
    /// The same of one that is taken away, as long as it answers: for its last words, and no new work.
    async fn last_endpoint(&self, native: &str, port: u16) -> Result<Endpoint> {
        self.endpoint(native, port).await
    }
    /// What happens to the containers with this label, from now on. It may end at any time: then everything is listed again.
    async fn events(&self, labels: &BTreeMap<String, String>) -> Result<BoxStream<'static, Result<Happened>>>;
}

/// What a provider cannot do of what is asked: each in a sentence, before anything is created.
pub fn refusals(can: &Capabilities, spec: &Spec) -> Vec<String> {
    let mut found = Vec::new();
    let mut say = |wrong: bool, what: String| {
        if wrong {
            found.push(what);
        }
    };
    say(
        !can.command && !can.exec && !spec.command.is_empty(),
        String::from("runs the image's command alone: leave `command` out"),
    );
    say(
        !(can.env || spec.env.is_empty() && spec.secrets.is_empty()),
        String::from("gives a container no environment: put it into the image"),
    );
    say(!can.ports && !spec.ports.is_empty(), String::from("opens no ports: leave `ports` out"));
    say(!can.size && spec.size != Size::default(), String::from("takes the size from the image or template: leave `size` out"));
    for (name, secret) in &spec.secrets {
        let kept = matches!(secret, Secret::Provider(_));
        say(kept && !can.provider_secrets, format!("keeps no secrets: name an environment variable or a file for `{name}`"));
    }
    if let Some(bounds) = can.ttl {
        let beyond = spec.ttl < bounds.least || spec.ttl > bounds.most;
        say(
            beyond,
            format!(
                "takes a life of {} to {} seconds: `ttl` is {}",
                bounds.least.as_secs(),
                bounds.most.as_secs(),
                spec.ttl.as_secs()
            ),
        );
    }
    say(spec.ttl.is_zero(), String::from("`ttl` is nothing: every container has an end"));
    found
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    #[test]
    fn what_cannot_be_read_is_not_repeated() {
        let said = serde_json::json!("sk-\"secret\"");
        let wrong = super::unquoted(&Vec::<u8>::deserialize(&said).unwrap_err().to_string());
        assert_eq!(wrong, "invalid type: string \"…\", expected a sequence");
        assert_eq!(super::unquoted("missing field `id`"), "missing field `id`");
    }
}
