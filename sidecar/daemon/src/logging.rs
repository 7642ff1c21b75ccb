//! Our own log, on stderr: changes of life and what went wrong, never a line of the agent's, an argument or a variable.

use crate::config::Config;

pub(crate) fn start(config: &Config) {
    let log = tracing_subscriber::fmt().with_writer(std::io::stderr).with_max_level(config.log_level()).with_target(false);
    if config.json_log() {
        log.json().flatten_event(true).init();
    } else {
        log.without_time().with_ansi(false).init();
    }
}

/// Says which variables look like settings and are none: a limit that somebody believes in may not be there.
pub(crate) fn strangers(config: &Config) {
    let all: Vec<String> = config.strangers().iter().map(|one| format!("{} ({})", one.origin, one.remedy)).collect();
    if !all.is_empty() {
        tracing::warn!(variables = %all.join(", "), "nothing reads these: no settings are called so");
    }
}
