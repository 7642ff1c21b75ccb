//! A provider, or one of its nodes, is to be empty: nothing new is made there, what is idle goes at once, and what works until a deadline at most.
//!
//! That it is so is kept in the store: every fleet that shares it, and the one that is started anew, does it. What to do with each session is
//! [`crate::plan`]'s. What goes from a node goes on at another one; what goes from a provider waits until that may be used again.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, PoisonError, RwLockReadGuard};
use std::time::Duration;

use jiff::Timestamp;

use crate::lifecycle::Phase;
use crate::service::{Error, Fleet};
use crate::session::{Session, SessionId};
use crate::store::{self, Filter};

/// How soon the other fleets know of it.
const EVERY: Duration = Duration::from_secs(2);
/// Of those that are left, so many are named.
const NAMED: usize = 100;
/// Kubernetes' bound for the name of a node.
const NODE_MOST: usize = 253;

/// What is to be empty: a provider, or a node of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Where {
    pub provider: String,
    pub node: Option<String>,
}

impl Where {
    pub fn all(provider: &str) -> Self {
        Self { provider: provider.to_owned(), node: None }
    }

    pub fn node(provider: &str, node: &str) -> Self {
        Self { provider: provider.to_owned(), node: Some(node.to_owned()) }
    }

    fn has(&self, session: &Session) -> bool {
        session.provider == self.provider && (self.node.is_none() || self.node == session.node)
    }
}

/// As it is kept: neither has a `/` in its name.
impl fmt::Display for Where {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.node {
            None => f.write_str(&self.provider),
            Some(node) => write!(f, "{}/{node}", self.provider),
        }
    }
}

/// Where a session's container is, as [`Where`] is kept, if that is on a node.
pub(crate) fn node_of(session: &Session) -> Option<String> {
    Some(Where::node(&session.provider, session.node.as_deref()?).to_string())
}

/// Whether a node can be called so.
pub fn is_node(name: &str) -> bool {
    let letter = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let word = |word: &str| word.starts_with(letter) && word.ends_with(letter) && word.chars().all(|c| letter(c) || c == '-');
    name.len() <= NODE_MOST && name.split('.').all(word)
}

/// How far it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Until when what works there may go on. `None`: it is not being drained.
    pub until: Option<Timestamp>,
    /// Sessions that may have a container there.
    pub left: usize,
    /// Those of them that are put to sleep there: they wait to be wanted.
    pub asleep: usize,
    /// Those of them that are not, the first by their ids.
    pub sessions: Vec<SessionId>,
}

impl Fleet {
    /// Begins, or changes until when; `None`: it may be used again.
    pub async fn drain(&self, at: &Where, until: Option<Timestamp>) -> Result<Progress, Error> {
        self.can_drain(at).await?;
        self.store().drain(&at.to_string(), until).await?;
        self.see_drains().await?;
        for session in self.there(at).await? {
            match self.store().wake(&session.id).await {
                // It is over and forgotten meanwhile.
                Ok(()) | Err(store::Error::Missing(_)) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.due();
        self.refill.notify_one();
        self.seen(at).await
    }

    pub async fn progress(&self, at: &Where) -> Result<Progress, Error> {
        self.can_drain(at).await?;
        self.seen(at).await
    }

    async fn seen(&self, at: &Where) -> Result<Progress, Error> {
        let until = self.store().drains().await?.get(&at.to_string()).copied();
        let there = self.there(at).await?;
        let held: Vec<&Session> = there.iter().filter(|session| session.holds).collect();
        let (asleep, awake): (Vec<&Session>, Vec<&Session>) = held.iter().partition(|session| session.phase == Phase::Paused);
        let sessions = awake.into_iter().take(NAMED).map(|session| session.id.clone()).collect();
        Ok(Progress { until, left: held.len(), asleep: asleep.len(), sessions })
    }

    async fn can_drain(&self, at: &Where) -> Result<(), Error> {
        let can = self.provider(&at.provider)?.capabilities();
        // One that had nodes when it was begun can be ended.
        if at.node.is_none() || can.nodes || self.store().drains().await?.contains_key(&at.to_string()) {
            return Ok(());
        }
        Err(Error::NoNodes { provider: at.provider.clone() })
    }

    async fn there(&self, at: &Where) -> Result<Vec<Session>, Error> {
        let filter = Filter { provider: Some(at.provider.clone()), ..Filter::default() };
        Ok(self.matching(&filter).await?.into_values().filter(|session| at.has(session)).collect())
    }

    fn drained(&self) -> RwLockReadGuard<'_, BTreeMap<String, Timestamp>> {
        // Whole in every state.
        self.drained.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn drained_until(&self, provider: &str) -> Option<Timestamp> {
        self.drained().get(provider).copied()
    }

    /// The same of the node that its container is on.
    pub(crate) fn node_drained_until(&self, session: &Session) -> Option<Timestamp> {
        self.drained().get(&node_of(session)?).copied()
    }

    /// Where nothing new is to be put.
    pub(crate) fn drained_nodes(&self, provider: &str) -> Vec<String> {
        let below = |key: &String| Some(key.strip_prefix(provider)?.strip_prefix('/')?.to_owned());
        self.drained().keys().filter_map(below).collect()
    }

    pub(crate) async fn see_drains(&self) -> Result<(), Error> {
        let _alone = self.seeing_drains.lock().await;
        let drains: BTreeMap<String, Timestamp> = self.store().drains().await?;
        *self.drained.write().unwrap_or_else(PoisonError::into_inner) = drains;
        Ok(())
    }

    pub(crate) async fn see_drains_for_ever(self: Arc<Self>) {
        loop {
            if let Err(error) = self.see_drains().await {
                tracing::error!(%error, "it is not known what is drained");
            }
            tokio::time::sleep(EVERY).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_is_called_as_kubernetes_calls_them() {
        for right in ["a", "node-1", "ip-10-0-0-1.eu-central-1.compute.internal", &"x".repeat(253)] {
            assert!(is_node(right), "{right}");
        }
        for wrong in ["", ".", "..", "a/b", "A", "-a", "a-", "a..b", "a_b", "a b", &"x".repeat(254)] {
            assert!(!is_node(wrong), "{wrong}");
        }
        assert_eq!((Where::all("a").to_string(), Where::node("a", "n.b").to_string()), ("a".into(), "a/n.b".into()));
    }
}
