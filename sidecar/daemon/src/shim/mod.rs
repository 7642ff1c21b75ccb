//! The binary under the name `claude`: a wrapper around the real CLI, in its place.
//!
//! ```text
//!   somebody starts `claude` ──► us ──┬─► exec the real one: a version, help, a subcommand, or we are wrapped already
//!                                     └─► run it, as `run` does
//! ```
//!
//! Every word of the command line belongs to the CLI; the configuration is the file's and the environment's alone. Whoever starts the
//! agent did not choose to have us: where we cannot do our part, the agent runs without it. What the configuration refuses is refused,
//! and what is to run as another user (`run.user`) does not run as us.

mod find;
pub(crate) mod install;

pub(crate) use find::is_sidecar;

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use agent_sidecar_core::launch::Launch;
use rustix::process::Signal;

use crate::cli::{self, Failure};
use crate::config::{Config, Mistakes, Sources};
use crate::run::{self, Agent};
use crate::supervise::{self, NOT_FOUND, OWN_FAILURE};

/// What npm calls it, on every platform, and what everybody else does.
const NAMES: [&str; 2] = ["claude", "claude.exe"];
/// How often scripts between us and the CLI have led here. Only set where the CLI is a script.
const DEPTH: &str = "AGENT_SIDECAR_SHIM_DEPTH";
/// An agent in an agent in an agent has one each; a script that leads back to us has no end.
const DEEPEST: u32 = 16;
/// What scripts run in, and what they put before a command. Not node: there it is the CLI itself.
const SCRIPTED: &[&str] =
    &["ash", "bash", "busybox", "dash", "env", "fish", "ksh", "ksh93", "mksh", "nice", "sh", "stdbuf", "time", "timeout", "zsh"];

/// This process, started under the name of the CLI.
pub(crate) struct Shim {
    /// The path that was executed.
    called: PathBuf,
    argv: Vec<OsString>,
}

impl Shim {
    /// `None` under any other name.
    pub(crate) fn called() -> Option<Shim> {
        let argv: Vec<OsString> = std::env::args_os().collect();
        // The kernel's word for it: the first argument is whatever the caller likes, and seldom says in which directory.
        let executed = PathBuf::from(OsStr::from_bytes(rustix::param::linux_execfn().to_bytes()));
        if !is_name(&executed) && !argv.first().is_some_and(|word| is_name(Path::new(word))) {
            return None;
        }
        let called = std::path::absolute(&executed).unwrap_or(executed);
        Some(Shim { called, argv })
    }

    /// Ends as the CLI ends.
    pub(crate) fn main(self) -> Result<ExitCode, Failure> {
        let (config, mistakes) = Config::read(&Sources::system(None, Vec::new()));
        let real = match config.shim_cli() {
            // A bare name would be looked for on PATH, where we are.
            Some(named) if !named.is_absolute() || find::is_sidecar(&named) => {
                return Err(failure(NOT_FOUND, Lost::Named { named }));
            }
            Some(named) => named,
            None => match find::real(&self.called) {
                Some(real) => real,
                None => return Err(failure(NOT_FOUND, Lost::Nowhere { called: self.called })),
            },
        };
        let mut env = Vec::new();
        if find::is_script(&real) {
            let depth = std::env::var(DEPTH).ok().and_then(|depth| depth.parse().ok()).unwrap_or(0_u32);
            if depth >= DEEPEST {
                return Err(failure(NOT_FOUND, Lost::Circle { called: self.called, real }));
            }
            env.push((OsString::from(DEPTH), OsString::from((depth + 1).to_string())));
        }
        // The real one may be called anything; what its words mean does not depend on it.
        let words: Vec<OsString> = std::iter::once(OsString::from(NAMES[0])).chain(self.argv.iter().skip(1).cloned()).collect();
        if !Launch::of(&words, false, false).asks_model || wrapped() {
            return Err(self.exec(&real, env));
        }
        crate::logging::start(&config);
        crate::logging::strangers(&config);
        if !mistakes.is_empty() {
            if config.shim_strict() {
                return Err(failure(OWN_FAILURE, Mistakes(mistakes)));
            }
            for mistake in &mistakes {
                tracing::error!("{mistake}; the agent runs without this setting");
            }
        }
        let agent = Agent {
            program: real.clone().into(),
            arg0: self.argv.first().cloned(),
            argv: words,
            env: env.clone(),
            mistaken: !mistakes.is_empty(),
            shim: Some(self.called.clone()),
        };
        match run::run(&config, agent) {
            Ok(code) => Ok(code.into()),
            Err(refused) if refused.exit_code == OWN_FAILURE && !refused.meant && !is_fenced(&config) => {
                tracing::error!(error = %refused.source, "the agent runs without the sidecar");
                // It outlives exec, and nobody there reaps.
                rustix::process::set_child_subreaper(None).ok();
                Err(self.exec(&real, env))
            }
            Err(refused) => Err(Failure { code: refused.exit_code.into(), error: Box::new(refused) }),
        }
    }

    /// The real CLI instead of us, in this very process. Returns only what stood in the way.
    fn exec(&self, real: &Path, env: Vec<(OsString, OsString)>) -> Failure {
        let mut command = Command::new(real);
        command.args(self.argv.iter().skip(1)).envs(env);
        if let Some(name) = self.argv.first() {
            command.arg0(name);
        }
        let refused = supervise::refused(real.as_os_str(), command.exec());
        Failure { code: refused.exit_code.into(), error: Box::new(refused) }
    }
}

/// Whether the CLI is to be somebody else: then the agent would run with our rights where it ran without us. Who cannot find out is.
fn is_fenced(config: &Config) -> bool {
    config.user().map_or(true, |user| user.is_some_and(|user| !user.is_us()))
}

/// A file of this name is a CLI, or the shim before it.
pub(crate) fn is_cli_name(name: &str) -> bool {
    let name = name.strip_suffix(find::REAL).unwrap_or(name);
    NAMES.contains(&name)
}

fn is_name(path: &Path) -> bool {
    path.file_name().is_some_and(|name| NAMES.iter().any(|known| name == *known))
}

/// Whether the process that started us is a wrapper that takes us for its CLI: `agent-sidecar run -- claude …`, or a shim whose real CLI
/// is a script that ends here. A tool of the agent that starts another agent is not that: its parent is the agent, or a shell.
///
/// The promise to be killed with the wrapper outlives exec and is not passed on by fork, so it tells the CLI itself from all below it,
/// orphans included, whose parent the wrapper becomes. No variable could, and none is added to the agent's environment.
fn wrapped() -> bool {
    let Some(parent) = rustix::process::getppid().map(|pid| pid.as_raw_nonzero().get()) else { return false };
    let us = rustix::process::getpid().as_raw_nonzero().get();
    let promised = rustix::process::parent_process_death_signal().ok().flatten() == Some(Signal::KILL);
    if promised || changed_user(us, parent) { takes_it_for_its_cli(parent) } else { started_by_a_script(us, parent) }
}

/// Whether a process is a wrapper of a CLI, as we would be.
fn takes_it_for_its_cli(wrapper: i32) -> bool {
    let wrapper = proc(wrapper);
    let Ok(words) = std::fs::read(wrapper.join("cmdline")) else { return false };
    let mut words: Vec<OsString> = words.split(|byte| *byte == 0).map(|word| OsStr::from_bytes(word).to_owned()).collect();
    words.pop(); // what follows the last end
    let Some(name) = words.first().map(Path::new) else { return false };
    let exe = std::fs::read_link(wrapper.join("exe"));
    let shim = is_name(name) || exe.as_deref().is_ok_and(is_name);
    // Another user's program may not be looked at: then its name has to do.
    let ours = if exe.is_ok() { find::is_sidecar(&wrapper.join("exe")) } else { shim || name.ends_with("agent-sidecar") };
    ours && (shim || cli::command_of(words).is_some_and(|command| Launch::of(&command, false, false).asks_model))
}

/// Whether a wrapper's CLI is a script, and the script waits for us: `/opt/claude "$@"`, without `exec`. What is below it and starts
/// something for its arguments' sake is part of that; the agent itself is not, nor is a tool of it that the wrapper has inherited.
fn started_by_a_script(us: i32, parent: i32) -> bool {
    let session = |pid| supervise::group_and_session(pid).map(|(_, session)| session);
    let mut below = parent;
    for _ in 0..DEEPEST {
        let exe = std::fs::read_link(proc(below).join("exe")).ok();
        let name = exe.as_deref().and_then(Path::file_name).and_then(OsStr::to_str);
        if !name.is_some_and(|name| SCRIPTED.contains(&name)) {
            return false;
        }
        let Some(above) = supervise::parent(below) else { return false };
        if takes_it_for_its_cli(above) {
            return stands_as_a_cli(below, above) && session(us) == session(above);
        }
        below = above;
    }
    false
}

fn proc(pid: i32) -> PathBuf {
    Path::new("/proc").join(pid.to_string())
}

/// Whether we are the child of another user, in the session and the group that it gave us. `gosu` and its like make us that by exec,
/// which takes the promise away.
fn changed_user(us: i32, parent: i32) -> bool {
    let owner = std::fs::metadata(proc(parent)).map(|parent| parent.uid());
    owner.is_ok_and(|owner| owner != rustix::process::getuid().as_raw()) && stands_as_a_cli(us, parent)
}

/// Whether a child of a wrapper has the session and the group of its CLI. A tool of an agent is in a session of its own.
fn stands_as_a_cli(child: i32, wrapper: i32) -> bool {
    let (Some(its), Some(theirs)) = (supervise::group_and_session(child), supervise::group_and_session(wrapper)) else {
        return false;
    };
    its.1 == theirs.1 && (its.0 == child || its.0 == theirs.0)
}

/// Why there is no CLI to start.
#[derive(Debug, thiserror::Error)]
enum Lost {
    #[error(
        "the Claude CLI was not found: there is no {0}{real}, and no other `claude` on PATH; install the CLI, then run `agent-sidecar install`, or name it with AGENT_SIDECAR_SHIM_CLI",
        .called.display(), real = find::REAL
    )]
    Nowhere { called: PathBuf },
    #[error("`shim.cli` is `{}`, which is no full path or the sidecar itself; write the full path of the real CLI", .named.display())]
    Named { named: PathBuf },
    #[error(
        "{} leads to {}, a script that leads back; name the real CLI with AGENT_SIDECAR_SHIM_CLI, or change the script",
        .called.display(), .real.display()
    )]
    Circle { called: PathBuf, real: PathBuf },
}

fn failure(code: u8, error: impl std::error::Error + 'static) -> Failure {
    Failure { error: Box::new(error), code: code.into() }
}
