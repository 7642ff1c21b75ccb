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
