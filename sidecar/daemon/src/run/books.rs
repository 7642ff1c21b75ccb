//! Where what the monitor says goes: ledger, events, collector, hub; and how the agent ended, for the exit code.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use agent_sidecar_core::Output;
use agent_sidecar_core::detect::why::Why;
use agent_sidecar_core::record::Fact;
use agent_sidecar_core::update::{Decision, ExitReason};

use crate::export::otlp::pipeline::Inlet;
use crate::hub::Share;
use crate::lines::LineFile;
use crate::supervise::Handle;
use crate::tenants::Guard;

/// What the CLI itself exits with after an error.
const CUT_SHORT: u8 = 1;

/// How the agent ended.
#[derive(Clone, Default)]
pub(super) struct Verdict {
    by_limit: Arc<AtomicBool>,
    without_result: Arc<AtomicBool>,
}

impl Verdict {
    fn hear(&self, fact: &Fact) {
        match fact {
            Fact::ProcessExited { reason, .. } => {
                self.by_limit.store(matches!(reason, ExitReason::Limit | ExitReason::Idle | ExitReason::Stuck), Relaxed);
            }
            Fact::ResultMissing { .. } => self.without_result.store(true, Relaxed),
            _ => {}
        }
    }

    /// What to exit with, if the CLI's code is this; and somebody may have chosen one for who has reached a limit.
    pub(super) fn code(&self, code: u8, chosen: Option<u8>) -> u8 {
        match chosen {
            _ if !self.by_limit.load(Relaxed) => code,
            Some(chosen) => chosen,
            // Interrupted, an older CLI may end with a zero and no result: an app would take that for an answer of nothing.
            None if code == 0 && self.without_result.load(Relaxed) => CUT_SHORT,
            None => code,
        }
    }
}

pub(super) struct Books {
    pub(super) ledger: Option<LineFile>,
    pub(super) events: Option<LineFile>,
    pub(super) inlet: Option<Inlet>,
    pub(super) share: Option<Share>,
    pub(super) guard: Option<Guard>,
    pub(super) verdict: Verdict,
    /// Who hears that a line cannot be written.
    pub(super) failures: Handle,
}

impl Books {
    pub(super) fn take(&mut self, output: Output) {
        match output {
            Output::Record(record) => {
                self.verdict.hear(&record.fact);
                if let (Some(guard), Fact::SessionStarted { session_id, .. }) = (&self.guard, &record.fact) {
                    guard.session(session_id);
                }
                if let Some(ledger) = &mut self.ledger {
                    ledger.write(&record, &self.failures);
                    if matches!(record.fact, Fact::ProcessExited { .. }) {
                        ledger.verify(&self.failures);
                    }
                }
                if let Some(share) = &self.share {
                    share.poke();
                }
            }
            Output::Decided(decision) => say(&decision),
            Output::Span(span) => {
                if let Some(inlet) = &self.inlet {
                    inlet.span(span);
                }
            }
            Output::Log(event) => {
                if let Some(events) = &mut self.events {
                    events.write(&event, &self.failures);
                }
                if let Some(inlet) = &self.inlet {
                    inlet.event(event);
                }
            }
            Output::Known => {
                if let Some(guard) = &self.guard {
                    guard.known();
                }
            }
            Output::Action(_) => {}
        }
    }
}

fn say(decision: &Decision) {
    tracing::warn!(
        limit = decision.limit.as_str(),
        scope = decision.scope.as_str(),
        mode = decision.mode.as_str(),
        action = decision.step.as_str(),
        observed = decision.observed,
        ceiling = decision.ceiling,
        why = decision.why.map(Why::as_str),
        share = decision.share.then_some(true),
        session = decision.session,
        "limit"
    );
}
