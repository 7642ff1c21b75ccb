//! `agent-sidecar`: wraps a Claude agent's CLI, relays it exactly, counts it, limits it, and stops it without losing its last cost.

mod bill;
mod books;
mod busy;
mod cli;
mod config;
mod control;
mod conversation;
mod demo;
mod disk;
mod doctor;
mod explain;
mod export;
mod feed;
mod fence;
mod files;
mod fleet;
mod hang;
mod hooks;
mod http;
mod hub;
mod influence;
mod lines;
mod logging;
mod messages_api;
mod page;
mod patrol;
mod proxy;
mod receive;
mod reference;
mod remote;
mod replay;
mod run;
mod sample;
mod serve;
mod shim;
mod supervise;
mod telemetry;
mod tenants;
mod top;

use std::error::Error;
use std::process::ExitCode;

fn main() -> ExitCode {
    let ended = match shim::Shim::called() {
        Some(shim) => shim.main(),
        None => cli::main(),
    };
    match ended {
        Ok(code) => code,
        // Whoever reads our output has read enough.
        Err(failure) if broken_pipe(&*failure.error) => ExitCode::SUCCESS,
        Err(failure) => {
            // The chain is said once, here.
            let mut said = format!("agent-sidecar: {}", failure.error);
            let mut cause: Option<&dyn Error> = failure.error.source();
            while let Some(error) = cause {
                said += &format!(": {error}");
                cause = error.source();
            }
            eprintln!("{said}");
            failure.code
        }
    }
}

fn broken_pipe(error: &(dyn Error + 'static)) -> bool {
    let mut causes = std::iter::successors(Some(error), |error: &&(dyn Error + 'static)| (*error).source());
    causes.any(|cause| cause.downcast_ref::<std::io::Error>().is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe))
}
