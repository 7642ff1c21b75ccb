//! A hook that is a program: argv without a shell, the event on its standard input, and an environment with nothing of ours in it that it was not given.

use std::process::Stdio;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;
use tokio::time::timeout;

use super::{Outcome, SAID_MOST, Told};

/// The exit code that says no.
const VETO: i32 = 10;
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// For what is still in the pipes when the program has ended: somebody else may hold them open.
const DRAIN: Duration = Duration::from_millis(250);

/// Its process group, which does not outlive whoever waits for it.
struct Group(Option<Pid>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(pid) = self.0 {
            // There may be nobody left; a number that was just free is not given to somebody else at once.
            kill_process_group(pid, Signal::KILL).ok();
        }
    }
}

pub(super) async fn run(argv: &[String], pass: &[String], told: &Told<'_>, within: Duration, may_veto: bool) -> Outcome {
    let failed = |said: String| Outcome::Failed { said, after: None };
    let Some((program, arguments)) = argv.split_first() else { return Outcome::Refused(String::from("there is no program")) };
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .env("PATH", PATH)
        .envs(pass.iter().filter_map(|name| Some((name, std::env::var_os(name)?))))
        .env("AGENT_FLEET_SESSION", told.session.as_str())
        .env("AGENT_FLEET_PHASE", told.phase.as_str())
        .env("AGENT_FLEET_TENANT", told.tenant)
        .env("AGENT_FLEET_GENERATION", told.generation.to_string())
        .env("AGENT_FLEET_KEY", told.key)
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true);
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => return failed(format!("{program} cannot be started: {error}")),
    };
    let group = Group(child.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?)));
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let said = Mutex::new(Vec::new());
    let feed = async {
        if let Some(mut stdin) = stdin {
            // It need not read it.
            stdin.write_all(told.event.as_bytes()).await.ok();
        }
    };
    let pipes = async { tokio::join!(feed, keep(stdout, &said), keep(stderr, &said)) };
    let status = {
        let mut pipes = std::pin::pin!(pipes);
        let both = async {
            let mut open = true;
            loop {
                tokio::select! {
                    biased;
                    status = child.wait() => return (status, open),
                    _ = &mut pipes, if open => open = false,
                }
            }
        };
        match timeout(within, both).await {
            Ok((status, open)) => {
                // What it left running holds the pipes, and is of no use to anybody.
                drop(group);
                if open {
                    timeout(DRAIN, &mut pipes).await.ok();
                }
                status
            }
            Err(_) => {
                drop(group);
                // Killed, it is not waited for long.
                timeout(DRAIN, child.wait()).await.ok();
                return Outcome::Timeout;
            }
        }
    };
    let said = String::from_utf8_lossy(&said.into_inner().unwrap_or_else(PoisonError::into_inner)).into_owned();
    match status.map(|status| (status.code(), status)) {
        Ok((Some(0), _)) => Outcome::Ok(said),
        Ok((Some(VETO), _)) if may_veto => Outcome::Veto(said),
        Ok((_, status)) => failed(format!("{status}: {said}")),
        Err(error) => failed(format!("{program} cannot be waited for: {error}")),
    }
}

/// Reads to the end, so that it is not held up, and keeps the beginning.
async fn keep(from: Option<impl AsyncRead + Unpin>, said: &Mutex<Vec<u8>>) {
    let Some(mut from) = from else { return };
    let mut buffer = [0; 4096];
    while let Ok(n @ 1..) = from.read(&mut buffer).await {
        let mut said = said.lock().unwrap_or_else(PoisonError::into_inner);
        let room = SAID_MOST.saturating_sub(said.len()).min(n);
        said.extend_from_slice(&buffer[..room]);
    }
}
