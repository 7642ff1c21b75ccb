//! A provider, and the machines behind it, is to be empty: nothing new is made there, what is idle goes at once, and what works until a deadline at most.
//!
//! That it is so is kept in the store: every fleet that shares it, and the one that is started anew, does it. What to do with each session is
//! [`crate::plan`]'s.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use jiff::Timestamp;

use crate::lifecycle::Phase;
use crate::service::{Error, Fleet};
use crate::session::Session;
use crate::store::{self, Filter};

/// How soon the other fleets know of it.
const EVERY: Duration = Duration::from_secs(2);

/// How far it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Until when what works there may go on. `None`: it is not being drained.
    pub until: Option<Timestamp>,
    /// Sessions that may have a container there.
    pub left: usize,
    /// Those of them that are put to sleep there: they wait to be wanted.
    pub asleep: usize,
}

impl Fleet {
    /// Begins, or changes until when; `None`: it may be used again.
    pub async fn drain(&self, provider: &str, until: Option<Timestamp>) -> Result<Progress, Error> {
        self.provider(provider)?;
        self.store().drain(provider, until).await?;
        self.see_drains().await?;
        for session in self.there(provider).await? {
            match self.store().wake(&session.id).await {
                // It is over and forgotten meanwhile.
                Ok(()) | Err(store::Error::Missing(_)) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.due();
        self.refill.notify_one();
        self.progress(provider).await
    }

    pub async fn progress(&self, provider: &str) -> Result<Progress, Error> {
        self.provider(provider)?;
        let until = self.store().drains().await?.get(provider).copied();
        let there = self.there(provider).await?;
        let held: Vec<&Session> = there.iter().filter(|session| session.holds).collect();
        let asleep = held.iter().filter(|session| session.phase == Phase::Paused).count();
        Ok(Progress { until, left: held.len(), asleep })
    }

    async fn there(&self, provider: &str) -> Result<Vec<Session>, Error> {
        let filter = Filter { provider: Some(provider.to_owned()), ..Filter::default() };
        Ok(self.matching(&filter).await?.into_values().collect())
    }

    pub(crate) fn drained_until(&self, provider: &str) -> Option<Timestamp> {
        // Whole in every state.
        self.drained.read().unwrap_or_else(PoisonError::into_inner).get(provider).copied()
    }

    pub(crate) async fn see_drains(&self) -> Result<(), Error> {
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
