//! The start of the CLI, and signals to it. The only unsafe code of the project: what has to happen between fork and exec, and
//! numbers of signals that have no name.
#![expect(unsafe_code, reason = "pre_exec, dispositions of signals and real-time signals have no safe form; all of it is here")]

use std::ffi::{CString, OsStr, OsString};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal};

use super::{CANNOT_RUN, Failure, NOT_FOUND, OWN_FAILURE, User};

/// The signals that whoever started us wants to be ignored (`nohup`, a shell's background).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ignored(u64);

impl Ignored {
    /// Whether this one is.
    pub(crate) fn has(self, signal: i32) -> bool {
        self.0 & 1 << (signal - 1) != 0
    }

    /// Before any handler is set.
    pub(crate) fn on_entry() -> Self {
        let ignored = |n: &i32| {
            let mut action = std::mem::MaybeUninit::<libc::sigaction>::zeroed();
            // SAFETY: only asks; `action` is written by a call that succeeds, and zeroes are a valid value of it.
            let action = unsafe {
                libc::sigaction(*n, std::ptr::null(), action.as_mut_ptr());
                action.assume_init()
            };
            action.sa_sigaction == libc::SIG_IGN
        };
        // PIPE is ignored by the runtime of this program, before anything of it runs: how it was before is not known.
        Self((1..=64).filter(|n| *n != libc::SIGPIPE).filter(ignored).fold(0, |set, n| set | 1 << (n - 1)))
    }

    fn restore(self) -> io::Result<()> {
        for n in 1..=64 {
            // SAFETY: async-signal-safe, and no handler is lost that anybody needs: exec follows.
            if self.0 & 1 << (n - 1) != 0 && unsafe { libc::signal(n, libc::SIG_IGN) } == libc::SIG_ERR {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    }
}

/// What the CLI gets as its stdin and stdout; `None` is what we have.
pub(crate) struct Stdio2 {
    pub(crate) stdin: Option<OwnedFd>,
    pub(crate) stdout: Option<OwnedFd>,
}

#[expect(clippy::too_many_arguments, reason = "called once, with all of it")]
/// Starts the CLI, from the thread that outlives it: the kernel kills it when *that thread* ends.
pub(crate) fn spawn(
    program: &OsString,
    arg0: Option<&OsString>,
    args: &[OsString],
    env: &[(OsString, Option<OsString>)],
    cwd: Option<&Path>,
    user: Option<&User>,
    stdio: Stdio2,
    own_group: bool,
    ignored: Ignored,
) -> Result<Pid, Failure> {
    let us = rustix::process::getpid();
    // Found from where we are, not from where it starts.
    let found = cwd.filter(|_| program.as_encoded_bytes().contains(&b'/')).and_then(|_| std::path::absolute(program).ok());
    let mut command = Command::new(found.as_ref().map_or(program.as_os_str(), |found| found.as_os_str()));
    if found.is_some() {
        command.arg0(program);
    }
    command.args(args);
    for (name, value) in env {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    if let Some(arg0) = arg0 {
        command.arg0(arg0);
    }
    if let Some(stdin) = stdio.stdin {
        command.stdin(Stdio::from(stdin));
    }
    if let Some(stdout) = stdio.stdout {
        command.stdout(Stdio::from(stdout));
    }
    if own_group {
        command.process_group(0);
    }
    let user = user.cloned();
    let nul = |error: std::ffi::NulError| refused(program, error.into());
    let cwd = cwd.map(|cwd| CString::new(cwd.as_os_str().as_bytes())).transpose().map_err(nul)?;
    let between = move || {
        ignored.restore()?;
        // Before the promise below: whoever changes users loses it.
        if let Some(user) = &user {
            user.assume()?;
        }
        // As that user: what is its own need not be open to us.
        if let Some(cwd) = &cwd {
            rustix::process::chdir(cwd.as_c_str())?;
        }
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        // Died before the line above: then nobody will ever tell us.
        if rustix::process::getppid() != Some(us) {
            return Err(io::ErrorKind::Interrupted.into());
        }
        Ok(())
    };
    // SAFETY: only system calls between fork and exec: no allocation, no lock.
    unsafe { command.pre_exec(between) };
    let child = command.spawn().map_err(|source| refused(program, source))?;
    // Dropping the handle neither waits nor kills: the reaper owns the pid.
    Ok(Pid::from_raw(child.id().cast_signed()).expect("a child has a pid"))
}

/// Which exit code an error of `exec` deserves, after the custom of shells and `env`.
pub(crate) fn refused(program: &OsStr, source: io::Error) -> Failure {
    let name = program.to_string_lossy().into_owned();
    let (exit_code, what) = match source.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR) => (NOT_FOUND, Refusal::NotFound { name, source }),
        Some(
            libc::EACCES
            | libc::EPERM
            | libc::ENOEXEC
            | libc::EISDIR
            | libc::ELOOP
            | libc::ENAMETOOLONG
            | libc::E2BIG
            | libc::ETXTBSY,
        ) => (CANNOT_RUN, Refusal::CannotRun { name, source }),
        _ => (OWN_FAILURE, Refusal::Spawn { name, source }),
    };
    Failure { exit_code, meant: false, source: what.into() }
}

#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("`{name}` was not found (or the interpreter its first line names); give a full path, or put it on PATH")]
    NotFound { name: String, source: io::Error },
    #[error("`{name}` cannot be executed; it must be a program for this machine, with the execute permission for this user")]
    CannotRun { name: String, source: io::Error },
    #[error("no process could be made for `{name}`; look at the limits on processes and memory")]
    Spawn { name: String, source: io::Error },
}

/// The signal of a number, real-time ones included; `None` for what is no signal, or the C library's own.
pub(crate) fn signal(n: i32) -> Option<Signal> {
    // SAFETY: in the range that kill(2) takes, and not one of those that the C library keeps for itself.
    Signal::from_named_raw(n).or_else(|| (34..=64).contains(&n).then(|| unsafe { Signal::from_raw_unchecked(n) }))
}
