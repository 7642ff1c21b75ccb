//! `agent-fleet`: creates, watches, pauses, resumes and destroys the containers that agents run in.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    match cli::run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("agent-fleet: {error}");
            ExitCode::from(cli::FAILED)
        }
    }
}
