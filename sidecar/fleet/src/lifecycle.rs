//! The phases of a session, and which may follow which.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Where a session is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Somebody has asked, and hooks may say no.
    Requested,
    /// Its container is being made.
    Creating,
    /// Its container runs, and the sidecar in it has not spoken yet.
    Starting,
    /// It has spoken, and nobody has asked anything of it.
    Ready,
    /// It works, by the sidecar's word.
    Active,
    /// It does not.
    Idle,
    Pausing,
    /// Nothing of it runs.
    Paused,
    Resuming,
    Stopping,
    /// Nothing of it will run again, and its container is being removed.
    Stopped,
    Destroyed,
    /// It could not be done. What there was of a container is removed.
    Failed,
}

impl Phase {
    pub const ALL: [Phase; 13] = [
        Phase::Requested,
        Phase::Creating,
        Phase::Starting,
        Phase::Ready,
        Phase::Active,
        Phase::Idle,
        Phase::Pausing,
        Phase::Paused,
        Phase::Resuming,
        Phase::Stopping,
        Phase::Stopped,
        Phase::Destroyed,
        Phase::Failed,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            Phase::Requested => "requested",
            Phase::Creating => "creating",
            Phase::Starting => "starting",
            Phase::Ready => "ready",
            Phase::Active => "active",
            Phase::Idle => "idle",
            Phase::Pausing => "pausing",
            Phase::Paused => "paused",
            Phase::Resuming => "resuming",
            Phase::Stopping => "stopping",
            Phase::Stopped => "stopped",
            Phase::Destroyed => "destroyed",
            Phase::Failed => "failed",
        }
    }

    /// Whether nothing follows.
    pub fn is_last(self) -> bool {
        matches!(self, Phase::Destroyed | Phase::Failed)
    }

    /// Whether its agent can be talked to.
    pub fn is_up(self) -> bool {
        matches!(self, Phase::Ready | Phase::Active | Phase::Idle)
    }

    /// Whether a hook's no is heard.
    pub fn can_be_vetoed(self) -> bool {
        matches!(self, Phase::Requested | Phase::Creating)
    }

    /// Whether `next` may come after this.
    pub fn leads_to(self, next: Phase) -> bool {
        use Phase::*;
        match self {
            Requested => matches!(next, Creating | Destroyed | Failed),
            Creating => matches!(next, Starting | Stopping | Failed),
            // Once more, if its container was taken away before it spoke.
            Starting => matches!(next, Ready | Creating | Resuming | Pausing | Stopping | Failed),
            Ready | Active | Idle => {
                next != self && matches!(next, Active | Idle | Pausing | Paused | Stopping | Stopped | Failed)
            }
            // Back again, if it cannot be put away: nothing is thrown away for that.
            Pausing => matches!(next, Paused | Idle | Stopping | Failed),
            Paused => matches!(next, Resuming | Stopping | Failed),
            Resuming => matches!(next, Creating | Starting | Stopping | Failed),
            Stopping => matches!(next, Stopped),
            Stopped => matches!(next, Destroyed),
            Destroyed | Failed => false,
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_phase_is_reached_and_each_but_the_last_is_left() {
        for phase in Phase::ALL {
            let reached = Phase::ALL.iter().any(|from| from.leads_to(phase));
            assert!(reached || phase == Phase::Requested, "{phase}");
            assert_eq!(Phase::ALL.iter().all(|to| !phase.leads_to(*to)), phase.is_last(), "{phase}");
            assert_eq!(serde_json::to_value(phase).unwrap(), phase.as_str());
            assert!(!phase.leads_to(phase));
        }
    }

    #[test]
    fn from_everywhere_there_is_a_way_to_the_end() {
        for phase in Phase::ALL.into_iter().filter(|phase| *phase != Phase::Failed) {
            let mut reached = vec![phase];
            while let Some(more) =
                Phase::ALL.into_iter().find(|to| !reached.contains(to) && reached.iter().any(|from| from.leads_to(*to)))
            {
                reached.push(more);
            }
            assert!(reached.contains(&Phase::Destroyed), "{phase}");
        }
    }
}
