//! Which hooks would run, without running them.

use std::time::Duration;

use super::{Act, FIRST_BACKOFF, Hook, LONGEST_BACKOFF};
use crate::config::{Config, time};
use crate::lifecycle::Phase;

/// For a template's sessions: a line for each hook of each phase, in the order in which they run.
pub fn plan_hooks(config: &Config, template: &str) -> Vec<String> {
    let of = |hook: &&Hook| hook.templates.is_empty() || hook.templates.iter().any(|name| name == template);
    let on =
        |phase: Phase| config.hooks.iter().filter(of).filter(move |hook| hook.on.contains(&phase)).map(move |hook| (phase, hook));
    Phase::ALL.into_iter().flat_map(on).map(|(phase, hook)| line(phase, hook)).collect()
}

fn line(phase: Phase, hook: &Hook) -> String {
    let what = match &hook.act {
        Act::Command { argv, .. } => format!("command {}", argv.first().map_or("", String::as_str)),
        Act::Webhook { url, .. } => format!("webhook {}", without_query(url)),
    };
    let tries = match hook.retries {
        0 => format!("within {}", time(hook.timeout)),
        n => format!("within {}, {n} more tries, at most {} in all", time(hook.timeout), time(longest(hook))),
    };
    let mut then = vec![if hook.required { "must do well" } else { "is not waited for when it fails" }];
    if hook.may_veto(phase) {
        then.push("may say no");
    }
    format!("{phase}: {} ({what}) {tries}; {}", hook.name, then.join(", ")).replace('"', "")
}

/// All its tries and what is between them, if each takes as long as it can.
fn longest(hook: &Hook) -> Duration {
    let waits = (0..hook.retries).map(|n| FIRST_BACKOFF.saturating_mul(2_u32.saturating_pow(n)).min(LONGEST_BACKOFF));
    hook.timeout.saturating_mul(hook.retries.saturating_add(1)).saturating_add(waits.sum())
}

/// What is after the `?` may be a key.
fn without_query(url: &str) -> &str {
    url.split(['?', '#']).next().unwrap_or_default()
}
