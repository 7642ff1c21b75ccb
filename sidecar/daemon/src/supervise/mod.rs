//! Starts the CLI, relays it, watches it, ends it: the wrapper itself.
//!
//! ```text
//!   init (the thread that calls run)   signals, waitpid, kills, the exit code; owes nothing to the others
//!   relay                              app ◄──► CLI, byte for byte; only in Parse mode
//!   monitor                            takes the same bytes, decides; may be late or die
//! ```
//!
//! init must be the thread that starts the CLI: the kernel's promise to kill the CLI when its parent dies is bound to that thread.
//!
//! There is no cgroup here: `cgroup.kill` would be surer than walking /proc, but a container's own group holds us (and the app) as
//! well, and one of our own cannot be made without privileges that a wrapper should not have.

mod backlog;
mod child;
mod filter;
mod init;
mod relay;
mod signals;
mod stdio;
mod tap;
mod tree;
mod user;
mod watch;

use std::collections::VecDeque;
use std::ffi::OsString;
use std::hash::{BuildHasher, Hasher};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use agent_sidecar_core::launch::Mode;
use agent_sidecar_core::monitor::{Exit, Monitor, Now, Stop};
use rustix::event::{EventfdFlags, Timespec};

pub(crate) use child::{Ignored, refused};
pub(crate) use signals::{CHLD, Ears, HUP, INT, TERM};
pub(crate) use tree::{below, group_and_session, parent, state};
pub(crate) use user::{NoUser, User};
pub(crate) use watch::{NICE, Sink, Watch};

use backlog::Bounds;
use tap::{Tap, Urgent};

/// The wrapper failed before the CLI ran.
pub(crate) const OWN_FAILURE: u8 = 125;
/// The program is there, but is not to be executed.
pub(crate) const CANNOT_RUN: u8 = 126;
/// There is no such program.
pub(crate) const NOT_FOUND: u8 = 127;

/// What waits for the app: a megabyte is more than any app leaves unread by habit, and little beside the CLI's two hundred.
const STDOUT_MEMORY: usize = 1024 * 1024;
/// What waits for the monitor: a quarter of a second of the fastest that the CLI itself can say. Floods and stalls go to the file.
const TAP_MEMORY: usize = 1024 * 1024;
/// Where there is no file (a read-only root, a full disk). Beyond it the CLI is held back, or bytes are not counted.
const HARD_MEMORY: usize = 64 * 1024 * 1024;
/// Each of the two files may become this large: ten times the longest session seen.
pub(crate) const SPILL_BYTES: u64 = 1024 * 1024 * 1024;

/// What to run, and how.
#[derive(Clone, Debug)]
pub(crate) struct Job {
    pub(crate) program: OsString,
    /// What the program finds as its own name, if not `program`.
    pub(crate) arg0: Option<OsString>,
    pub(crate) args: Vec<OsString>,
    /// Where the CLI starts, if not where we are.
    pub(crate) cwd: Option<PathBuf>,
    /// What the CLI finds in its environment instead of what we have there; `None` is not there.
    pub(crate) env: Vec<(OsString, Option<OsString>)>,
    /// As whom it runs, if not as we do.
    pub(crate) user: Option<User>,
    pub(crate) mode: Mode,
    /// What the ids of the monitor's requests begin with; unguessable.
    pub(crate) request_prefix: String,
    /// Where to put what does not fit into memory, before `$TMPDIR`, `/tmp` and `/dev/shm`.
    pub(crate) spill_dir: Option<PathBuf>,
    /// How large each of the two files may become; 0 for none.
    pub(crate) spill_bytes: u64,
}

impl Job {
    fn bounds(&self, memory: usize) -> Bounds {
        let tmpdir = std::env::var_os("TMPDIR").filter(|dir| !dir.is_empty()).map(PathBuf::from);
        let common = ["/tmp", "/dev/shm"].map(PathBuf::from);
        let dirs = self.spill_dir.clone().into_iter().chain(tmpdir).chain(common).collect();
        Bounds { memory, file: self.spill_bytes, hard: HARD_MEMORY, dirs }
    }
}

/// How it ended, for whoever lingers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ending {
    /// The code that the wrapper will exit with.
    pub(crate) exit_code: u8,
    /// Somebody asked for the end: do not keep them waiting.
    pub(crate) stopped: bool,
}

/// Called, on a thread of its own, when all is done but the exit: the app has its EOF, the monitor has had its last input. Should
/// return soon; a further stop signal does not wait for it.
pub(crate) type BeforeExit = Box<dyn FnOnce(Ending) + Send>;

/// Called, on a thread of its own, when the CLI is gone and before the monitor hears of it: whoever else listened to the CLI hands in
/// what is left. Should return at once.
pub(crate) type LastWords = Box<dyn FnOnce(Exit) + Send>;

/// Why the CLI was never started, with the exit code that says so.
#[derive(Debug, thiserror::Error)]
#[error("the agent was not started")]
pub(crate) struct Failure {
    pub(crate) exit_code: u8,
    /// Nothing failed: it was not to be started.
    pub(crate) meant: bool,
    #[source]
    pub(crate) source: Box<dyn std::error::Error + Send + Sync>,
}

impl Failure {
    fn own(what: &'static str, source: impl Into<std::io::Error>) -> Self {
        #[derive(Debug, thiserror::Error)]
        #[error("{what}")]
        struct Own {
            what: &'static str,
            source: std::io::Error,
        }
        Self { exit_code: OWN_FAILURE, meant: false, source: Box::new(Own { what, source: source.into() }) }
    }
}

/// A wrapper that has everything it needs and was not started yet.
pub(crate) struct Supervisor<M = Monitor> {
    job: Job,
    monitor: M,
    handle: Handle<M>,
    mail: Arc<Mail>,
    sink: Sink,
    last_words: Option<LastWords>,
    before_exit: Option<BeforeExit>,
    ignored: Ignored,
    ears: Option<Ears>,
}

impl<M: Watch> Supervisor<M> {
    /// `clock` is the one that `monitor` was made with.
    pub(crate) fn new(job: Job, monitor: M, clock: Clock) -> Result<Self, Failure> {
        let tap = Arc::new(Tap::new(job.bounds(TAP_MEMORY)));
        let mail = Arc::new(Mail::new().map_err(|e| Failure::own("an eventfd cannot be made", e))?);
        let handle = Handle { tap, counts: Arc::default(), clock, waits: Arc::default() };
        let ignored = Ignored::on_entry();
        let sink: Sink = Box::new(|_, _| {});
        Ok(Self { job, monitor, handle, mail, sink, last_words: None, before_exit: None, ignored, ears: None })
    }

    /// What was ignored before anybody listened, and who has listened since.
    #[must_use]
    pub(crate) fn heard(mut self, ignored: Ignored, ears: Option<Ears>) -> Self {
        (self.ignored, self.ears) = (ignored, ears);
        self
    }

    /// Where what the monitor says goes, besides actions.
    #[must_use]
    pub(crate) fn sink(mut self, sink: Sink) -> Self {
        self.sink = sink;
        self
    }

    #[must_use]
    pub(crate) fn last_words(mut self, last_words: LastWords) -> Self {
        self.last_words = Some(last_words);
        self
    }

    #[must_use]
    pub(crate) fn before_exit(mut self, before_exit: BeforeExit) -> Self {
        self.before_exit = Some(before_exit);
        self
    }

    /// For everybody who wants to look at the monitor while it works.
    pub(crate) fn handle(&self) -> Handle<M> {
        self.handle.clone()
    }

    /// Runs the CLI to its end, and says what to exit with. Call it on the main thread, and exit when it returns: a monitor that
    /// hangs is left behind.
    pub(crate) fn run(self) -> Result<u8, Failure> {
        init::run(self)
    }
}

/// A way to the monitor and to the relay's counts, from any thread.
pub(crate) struct Handle<M = Monitor> {
    tap: Arc<Tap<M>>,
    counts: Arc<Counts>,
    clock: Clock,
    /// The CLI is not to be started yet, and so nobody answers a visit.
    waits: Arc<AtomicBool>,
}

impl<M> Clone for Handle<M> {
    fn clone(&self) -> Self {
        Self { tap: Arc::clone(&self.tap), counts: Arc::clone(&self.counts), clock: self.clock, waits: Arc::clone(&self.waits) }
    }
}

impl<M> Handle<M> {
    /// Does something with the monitor on its own thread, before it takes any more bytes; what that makes it say is performed.
    /// False when the monitor is no more. `visit` may be late when the monitor is busy: send the result through a channel, and
    /// wait for it with a timeout.
    pub(crate) fn visit(&self, visit: impl FnOnce(&mut M, Now) + Send + 'static) -> bool {
        self.tap.urgent(Urgent::Visit(Box::new(visit)))
    }

    /// Says whether the start waits for something, which may take long: then nobody is to wait for the answer to a visit.
    pub(crate) fn wait(&self, waits: bool) {
        self.waits.store(waits, std::sync::atomic::Ordering::Relaxed);
    }

    pub(crate) fn waits(&self) -> bool {
        self.waits.load(std::sync::atomic::Ordering::Relaxed)
    }

    /// On a visit: whether the monitor has heard all that was relayed by now.
    pub(crate) fn has_heard_all(&self) -> bool {
        self.tap.is_empty()
    }

    pub(crate) fn counts(&self) -> &Counts {
        let (_, lost) = self.tap.progress();
        self.counts.lost_bytes.store(lost, std::sync::atomic::Ordering::Relaxed);
        &self.counts
    }
}

/// What the wrapper itself did, since the beginning.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    /// Read from the CLI.
    pub(crate) stdout_bytes: AtomicU64,
    /// Taken by the app.
    pub(crate) delivered_bytes: AtomicU64,
    /// Read from the CLI, not yet taken by the app. A level, not a count.
    pub(crate) waiting_bytes: AtomicU64,
    /// Of the app's bytes, what went through a file.
    pub(crate) spilled_bytes: AtomicU64,
    /// How often the CLI was held back because there was no room left.
    pub(crate) back_pressure: AtomicU64,
    /// Taken by the CLI, ours not included.
    pub(crate) stdin_bytes: AtomicU64,
    pub(crate) injected: AtomicU64,
    pub(crate) injects_dropped: AtomicU64,
    /// Answers to us that were kept from the app.
    pub(crate) answers_kept: AtomicU64,
    /// Bytes that the monitor never saw.
    pub(crate) lost_bytes: AtomicU64,
    /// Processes that outlived the CLI and were ended.
    pub(crate) orphans_terminated: AtomicU64,
    /// Children reaped that were not the CLI.
    pub(crate) zombies_reaped: AtomicU64,
    /// The app's stdout could not be written to the end.
    pub(crate) output_incomplete: AtomicBool,
    /// The monitor panicked.
    pub(crate) degraded: AtomicBool,
}

/// The one source of time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    start: Instant,
}

impl Clock {
    pub(crate) fn start() -> Self {
        Self { start: Instant::now() }
    }

    pub(crate) fn now(&self) -> Now {
        Now { mono: self.mono(), unix: unix() }
    }

    fn mono(&self) -> Duration {
        self.start.elapsed()
    }
}

/// What the other threads tell init.
#[derive(Debug)]
enum Letter {
    /// The monitor has been told of this stop, and has said what it wants done.
    Answer(Stop),
    Signal(i32),
    KillAll,
    Degraded,
    MonitorDone,
    /// Nobody reads what the CLI says.
    AppGone,
    /// All that the CLI wrote was handed on.
    StdoutEnded,
    RelayDone,
    /// Nobody has more to say of what the CLI did.
    LastWords,
    /// Nobody wants to look at us any more.
    Lingered,
}

/// init's letter box, with a bell for poll(2).
#[derive(Debug)]
struct Mail {
    letters: Mutex<VecDeque<Letter>>,
    bell: OwnedFd,
}

impl Mail {
    fn new() -> rustix::io::Result<Self> {
        let bell = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { letters: Mutex::default(), bell })
    }

    fn send(&self, letter: Letter) {
        self.letters.lock().unwrap_or_else(PoisonError::into_inner).push_back(letter);
        // Only fails when the counter is full, and then the bell rings already.
        rustix::io::write(&self.bell, &1u64.to_ne_bytes()).ok();
    }

    fn take(&self) -> Option<Letter> {
        self.letters.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }
}

fn timespec(d: Duration) -> Timespec {
    // Rounded up: waking early would mean to spin until it is time.
    let d = d + Duration::from_nanos(999);
    Timespec { tv_sec: i64::try_from(d.as_secs()).unwrap_or(i64::MAX), tv_nsec: d.subsec_nanos().into() }
}

/// Time since the Unix epoch.
pub(crate) fn unix() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

/// Keeps our memory, environment and descriptors from other processes of this user, who is most likely the agent's, too. Root sees them.
pub(crate) fn hide() {
    // Refused nowhere, and without it all else is as right.
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable).ok();
}

/// A number that nobody can guess: the standard library seeds its hash tables from the kernel.
pub(crate) fn random() -> u64 {
    std::collections::hash_map::RandomState::new().build_hasher().finish()
}

#[cfg(test)]
mod tests;
