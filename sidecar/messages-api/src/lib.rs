//! A scripted Messages API on loopback: what a client of the real one would see, its faults included, and a log of what was served.
//!
//! Counts of tokens and money are compared with that log. It knows nothing of prices, of the wrapper, or of what an answer should say:
//! a [`Script`] does.

mod answer;
mod log;
mod request;
mod script;
mod server;
#[cfg(test)]
mod tests;

pub use log::{Log, Tokens};
pub use request::Agent;
pub use script::{Script, ScriptError};
pub use server::Server;

/// The script of the demo: three user messages with tools, subagents, two models, a cache and one overloaded moment.
pub const DEMO: &str = include_str!("../scripts/demo.json");

/// Serves on a bound listener until `shutdown` is over. For a thread of its own, with a current-thread runtime that has I/O and time.
pub async fn serve(
    listener: std::net::TcpListener,
    script: Script,
    log: Log,
    shutdown: impl Future<Output = ()>,
) -> std::io::Result<()> {
    listener.set_nonblocking(true)?;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    Server::new(listener, script)?.with_log(log).run(shutdown).await;
    Ok(())
}
