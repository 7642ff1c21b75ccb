//! What is asked for and kept: a session, which wants a container.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::lifecycle::Phase;
use crate::place::{Place, Places};
use crate::provider::{FLEET_LABEL, Spec};

/// Names a session to whoever asked for it: 1 to 64 letters, digits, `-` and `_`, beginning with a letter or digit.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SessionId(String);

impl SessionId {
    pub const MOST: usize = 64;

    /// A new one, of which there is no other; in the order of time.
    pub fn fresh() -> Self {
        Self(uuid::Uuid::now_v7().to_string())
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for SessionId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let letter = |c: char| c.is_ascii_alphanumeric();
        let right = text.starts_with(letter) && text.chars().all(|c| letter(c) || matches!(c, '-' | '_'));
        if !right || text.len() > Self::MOST {
            return Err(format!(
                "a session id has 1 to {} letters, digits, `-` or `_`, and begins with a letter or digit",
                Self::MOST
            ));
        }
        Ok(Self(text.to_owned()))
    }
}

impl TryFrom<String> for SessionId {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<SessionId> for String {
    fn from(id: SessionId) -> String {
        id.0
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// How sessions and containers belong together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pattern {
    /// One task, one container, destroyed when the task is done.
    Ephemeral,
    /// The container stays, whether it works or not, until its time is over.
    LongRunning,
    /// Put away when it is idle, and gone on with in another container.
    Hybrid,
    /// Several agents in one container.
    Shared,
}

/// What somebody wants of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Wanted {
    Running,
    Paused,
    Gone,
}

/// What the sidecar inside has said last. Totals of this container, not of the session.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    pub at: Timestamp,
    /// Until when it works, by its own word; `None`: it is idle.
    pub busy_until: Option<Timestamp>,
    /// What its agents have cost, in USD.
    pub cost_usd: f64,
    /// What to resume: the CLI's own name of the conversation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub conversation: Option<String>,
    /// What the container uses of memory and cannot be reclaimed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
}

/// What a sidecar has told by itself last, beside its [`Report`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Pushed {
    /// Of which container.
    pub generation: u32,
    /// Who spoke, and which word of its it was.
    pub run: String,
    pub seq: u64,
    /// When it came, by the fleet's clock.
    pub at: Timestamp,
    pub every_seconds: u64,
    /// What the container's memory is.
    pub memory_bytes: f64,
    /// Who spoke before, and is over: what they say late is not counted once more.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub over: Vec<String>,
}

/// A session, as it is kept. What changes it goes through [`crate::store::Store`], with its `version`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Session {
    pub id: SessionId,
    pub tenant: String,
    /// Who may talk to it and stop it: the name of a caller's token.
    pub owner: String,
    pub pattern: Pattern,
    /// The provider's name in the configuration.
    pub provider: String,
    /// What its container is made of. No secret is in it: those are named, and read when it is created.
    pub spec: Spec,

    pub wanted: Wanted,
    pub phase: Phase,
    /// When it came into this phase.
    pub since: Timestamp,
    pub created: Timestamp,
    /// When it is destroyed, whatever it does.
    pub ends: Timestamp,
    /// When that would be but for the container that it has: see [`Session::end_by`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub own_ends: Option<Timestamp>,
    /// The how-manieth container this is. With the id it makes the container's name, so that nobody can create it twice.
    pub generation: u32,
    /// The hooks of this phase have run.
    #[serde(default)]
    pub hooked: bool,
    /// A container of this generation may exist: said before it is created, and taken back when it is known to be gone.
    #[serde(default)]
    pub holds: bool,
    /// When the provider was last told to make it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub made: Option<Timestamp>,
    /// It was made ahead, for nobody yet: which sessions it fits, see [`crate::pool::kind`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<String>,
    /// To whom what was made ahead has been given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub given: Option<SessionId>,
    /// The key of this container, where it was made ahead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub taken: Option<String>,
    /// It is one of several in a container: see [`crate::place`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub place: Option<Place>,
    /// It is a container of several, and who they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub places: Option<Places>,
    /// What the provider calls the container, once it has said so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub native: Option<String>,
    /// The node that its container is on, where its provider has nodes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// Its container is taken away, or was, without our doing, and why: see [`crate::provider::Sandbox::disrupted`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disrupted: Option<String>,
    /// How many containers of it were taken away in a row before they were ready.
    #[serde(default, skip_serializing_if = "is_none")]
    pub lost: u32,
    /// Nodes that its container is not to be on when it is placed anew, as that was told last.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub avoids: Vec<String>,
    /// What was put away has been brought into this container.
    #[serde(default)]
    pub hydrated: bool,
    /// What it has was put away, in this pause.
    #[serde(default)]
    pub persisted: bool,
    /// Until when the provider's timers were moved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept_until: Option<Timestamp>,
    /// Since when its agent is idle.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_since: Option<Timestamp>,
    /// What it has in the store of conversations, if it was put away.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub archive: Option<String>,
    /// What the CLI calls its conversation, as far as anybody has said so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub conversation: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub report: Option<Report>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pushed: Option<Pushed>,
    /// How much memory its container used once it was warm, and when that was, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warm: Option<(Timestamp, u64)>,
    /// What its earlier containers' agents have cost, in USD.
    #[serde(default)]
    pub cost_before_usd: f64,
    /// How long the containers have run, in seconds, and what that costs, in USD: of those that are gone.
    #[serde(default)]
    pub container_seconds: f64,
    #[serde(default)]
    pub container_usd: f64,
    /// Since when this container is paid for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metered_since: Option<Timestamp>,
    /// What it had cost in all when each period of its tenant's budget began, in USD.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub cost_at: BTreeMap<String, f64>,
    /// How often in a row the provider has failed at what this phase needs.
    #[serde(default)]
    pub failures: u32,
    /// Not before then is it tried again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_at: Option<Timestamp>,
    /// Why it is where it is, in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Counts its changes: who writes must have read the last.
    #[serde(default)]
    pub version: i64,
}

impl Session {
    /// One that somebody has just asked for, of `(tenant, owner)`.
    pub fn new(
        id: SessionId,
        (tenant, owner): (&str, &str),
        pattern: Pattern,
        provider: &str,
        spec: Spec,
        now: Timestamp,
    ) -> Self {
        Self {
            id,
            tenant: tenant.to_owned(),
            owner: owner.to_owned(),
            pattern,
            provider: provider.to_owned(),
            ends: now + spec.ttl,
            own_ends: None,
            spec,
            wanted: Wanted::Running,
            phase: Phase::Requested,
            since: now,
            created: now,
            generation: 1,
            hooked: false,
            holds: false,
            made: None,
            pool: None,
            given: None,
            taken: None,
            place: None,
            places: None,
            native: None,
            node: None,
            disrupted: None,
            lost: 0,
            avoids: vec![],
            hydrated: false,
            persisted: false,
            kept_until: None,
            idle_since: None,
            archive: None,
            conversation: None,
            report: None,
            pushed: None,
            warm: None,
            cost_before_usd: 0.0,
            container_seconds: 0.0,
            container_usd: 0.0,
            metered_since: None,
            cost_at: BTreeMap::new(),
            failures: 0,
            retry_at: None,
            reason: None,
            version: 0,
        }
    }

    /// The name and label of its container, the same whoever asks: fit for every provider (a DNS label of at most 40 characters).
    pub fn key(&self) -> String {
        let fleet = self.spec.labels.get(FLEET_LABEL).map_or("", String::as_str);
        self.taken.clone().unwrap_or_else(|| container_key(fleet, &self.id, self.generation))
    }

    /// It ends by then at the latest, because its container does. In another one it has its own end again.
    pub fn end_by(&mut self, at: Timestamp) {
        if at < self.ends {
            self.own_ends.get_or_insert(self.ends);
            self.ends = at;
        }
    }

    /// Which sessions may have its container, if it waits for one, or a place in it, if it has one left.
    pub fn spare(&self) -> Option<&str> {
        if let Some(places) = &self.places {
            // One of a number is known to be there also when it is full.
            let found = places.free() > 0 || places.pinned;
            return (found && self.is_coming_or_up()).then_some(&places.kind);
        }
        let waits = matches!(self.phase, Phase::Ready | Phase::Idle) && self.wanted == Wanted::Running && self.holds;
        // What has worked already is no longer as it was made.
        self.pool.as_deref().filter(|_| waits && self.given.is_none() && self.native.is_some() && self.cost_usd() == 0.0)
    }

    fn is_coming_or_up(&self) -> bool {
        let comes = matches!(self.phase, Phase::Requested | Phase::Creating | Phase::Starting);
        self.wanted == Wanted::Running && (comes || self.phase.is_up())
    }

    /// Whether nothing is left to be done: what has failed may still have a container.
    pub fn is_over(&self) -> bool {
        self.phase.is_last() && !self.holds
    }

    /// What it has cost, in USD: agents and containers.
    pub fn total_usd(&self) -> f64 {
        self.cost_usd() + self.container_usd
    }

    /// What its agents have cost, in USD, in all its containers.
    pub fn cost_usd(&self) -> f64 {
        self.cost_before_usd + self.report.as_ref().map_or(0.0, |report| report.cost_usd)
    }
}

fn is_none(n: &u32) -> bool {
    *n == 0
}

/// See [`Session::key`]. The id's own letters are not for every provider: two that differ in case are two. Of one id's sessions in two
/// fleets at one provider each has its own.
pub fn container_key(fleet: &str, id: &SessionId, generation: u32) -> String {
    let digest = ring::digest::digest(&ring::digest::SHA256, format!("{fleet}/{id}").as_bytes());
    let hex: String = digest.as_ref().iter().take(10).map(|byte| format!("{byte:02x}")).collect();
    format!("agent-{hex}-{generation}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_is_named_by_letters_that_are_no_path_and_no_option() {
        for right in ["a", "A_1-b", &"x".repeat(64)] {
            assert_eq!(right.parse::<SessionId>().unwrap().as_str(), right);
        }
        for wrong in ["", "-a", "_", "a/b", "..", "a b", "é", &"x".repeat(65)] {
            assert!(wrong.parse::<SessionId>().is_err(), "{wrong}");
            assert!(serde_json::from_value::<SessionId>(wrong.into()).is_err());
        }
        assert!(SessionId::fresh().as_str().parse::<SessionId>().is_ok());
    }

    #[test]
    fn a_container_is_named_alike_by_all_and_unlike_every_other() {
        let key = |id: &str, generation| container_key("prod", &id.parse().unwrap(), generation);
        assert_eq!(key("a", 1), key("a", 1));
        assert_ne!(key("a", 1), key("a", 2));
        assert_ne!(key("a", 1), container_key("staging", &"a".parse().unwrap(), 1), "of another fleet at the same provider");
        assert_ne!(key("a", 1), key("A", 1));
        let longest = key(&"x".repeat(64), u32::MAX);
        assert!(
            longest.len() <= 40 && longest.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-'),
            "{longest}"
        );
    }
}
