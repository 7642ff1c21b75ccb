//! Which limits hold for this CLI, and how it is made to keep them and to say what it spends.

use std::ffi::OsString;
use std::path::Path;

use agent_sidecar_core::ask;
use agent_sidecar_core::launch::{Launch, Mode};
use agent_sidecar_core::limit::{Ceiling, Limit, Mode as LimitMode, Rule, Scope};

use crate::config::Config;
use crate::hooks;
use crate::http;
use crate::receive::{self, Decision, Plan, Surroundings};
use crate::supervise::{Ending, Handle};

/// The rules that can be judged. Of a CLI whose stream is not read, nobody knows whether it is silent or busy.
pub(super) fn judged(rules: Vec<Rule>, launch: &Launch) -> Vec<Rule> {
    let blind = !matches!(launch.mode, Mode::Parse { .. });
    let (deaf, judged): (Vec<Rule>, Vec<Rule>) = rules.into_iter().partition(|rule| blind && needs_stream(rule.limit));
    if launch.asks_model {
        for rule in deaf.iter().filter(|rule| rule.mode == LimitMode::Enforce || !rule.limit.is_loop()) {
            tracing::warn!(
                limit = rule.limit.as_str(),
                "this limit needs --output-format stream-json or json, and does not hold here"
            );
        }
    }
    judged
}

fn needs_stream(limit: Limit) -> bool {
    matches!(limit, Limit::Startup | Limit::Stall | Limit::Result | Limit::Idle) || limit.is_loop()
}

/// The ceiling on turns that the CLI itself can hold.
pub(super) fn native_turns(rules: &[Rule]) -> Option<u64> {
    rules.iter().find_map(|rule| match (rule.limit, rule.scope, rule.mode, rule.ceiling) {
        (Limit::Turns, Scope::Turn, LimitMode::Enforce, Ceiling::Count(turns)) => Some(turns),
        _ => None,
    })
}

/// Whether, and how, the CLI's own telemetry comes to us.
pub(super) fn native(config: &Config, launch: &Launch, pays: bool) -> Option<Plan> {
    let blind = launch.asks_model && !matches!(launch.mode, Mode::Parse { .. });
    match receive::decide(config.native(), launch.asks_model, blind || pays && launch.asks_model, &Surroundings::here()) {
        Decision::On(plan) => Some(plan),
        Decision::Off => None,
        Decision::StayOut(why) if blind => {
            tracing::warn!(%why, "the CLI's own telemetry is left alone: what it spends is not known here");
            None
        }
        Decision::StayOut(why) => {
            tracing::warn!(%why, "the CLI's own telemetry is left alone: what an answer cost may be known late");
            None
        }
    }
}

/// The command line with hooks for the CLI, if it can be given any.
pub(super) fn with_hooks(launch: &Launch, argv: Vec<OsString>, hold_file: &Path, cwd: Option<&Path>) -> Vec<OsString> {
    if !launch.takes_settings() {
        return argv;
    }
    let ours = ask::hooks(Some(&hold_file.display().to_string()));
    match hooks::settings(launch.settings.as_deref(), ours, cwd) {
        Ok(settings) => launch.with_settings(&argv, &settings),
        Err(error) => {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "the app's own --settings are left alone; answers may be above shared budgets by more than one"
            );
            argv
        }
    }
}

/// Says what the telemetry and the stream do not agree on, or that there was none.
pub(super) fn reconcile(handle: &Handle, blind: bool, ending: Ending) {
    let Some((heard, both)) = http::visit_blocking(handle, |monitor, _| (monitor.native_heard(), monitor.reconciliation()))
    else {
        return;
    };
    // Who fails at once has had nothing to export.
    if !heard && blind && ending.exit_code == 0 {
        tracing::warn!("the CLI exported no telemetry: what it spent is not known here");
    }
    if let Some(both) = both.filter(|both| both.stream != both.native) {
        let (stream, native) = (both.stream.to_f64(), both.native.to_f64());
        tracing::warn!(stream, native, "the CLI's stream and its telemetry do not agree on what was spent");
    }
}
