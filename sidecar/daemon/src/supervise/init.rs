//! The thread that everything else may fail beside: it starts the CLI, forwards signals, reaps, kills, and knows the exit code.
//!
//! ```text
//!   running ──CLI reaped──► orphans: TERM, grace, KILL ──► draining: app, monitor ──► lingering ──► exit
//! ```

use std::collections::HashSet;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use agent_sidecar_core::launch::Mode;
use agent_sidecar_core::monitor::{Exit, Signal as Number, Stop};
use rustix::event::{PollFd, PollFlags};
use rustix::fs::{FileType, OFlags};
use rustix::pipe::PipeFlags;
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus};

use super::child::Stdio2;
use super::relay::{self, Orders, Parts, Relay};
use super::signals::{self, Sender, Signals};
use super::tap::{Mark, Tap, Urgent};
use super::watch::{Dispatcher, Watch};
use super::{
    BeforeExit, Clock, Counts, Ending, Failure, LastWords, Letter, Mail, STDOUT_MEMORY, Supervisor, child, timespec, tree,
};

/// A monitor that says nothing to a stop for so long is not there: the signal goes its plain way.
const ANSWER: Duration = Duration::from_millis(100);

/// The same stop within this is the same request: the TypeScript SDK sends each TERM twice. After it, it is impatience.
const SAME: Duration = Duration::from_millis(300);

/// Between TERM and KILL for what the CLI left behind: shells and servers need a few milliseconds to end.
const GRACE: Duration = Duration::from_millis(500);

/// Between two looks at what is left; SIGCHLD says more often when something has changed.
const LOOK: Duration = Duration::from_millis(10);

/// Killing ends after this: what is left then hangs in the kernel, or belongs to somebody else.
const KILL_BOUND: Duration = Duration::from_secs(2);

/// After a stop the app has this long, from byte to byte, to take the rest: as long as the CLI itself would give it.
const DRAIN: Duration = Duration::from_secs(2);

/// A monitor that takes nothing for so long will not take the rest either.
const STUCK: Duration = Duration::from_secs(1);

/// The pipe that the CLI writes to: room for the moments when every core is busy. A megabyte was no faster, and a user may have only
/// 64 of pipes before all of his new ones get two pages.
const PIPE: usize = 256 * 1024;

pub(super) fn run<M: Watch>(supervisor: Supervisor<M>) -> Result<u8, Failure> {
    let Supervisor { job, monitor, handle, mail, sink, last_words, before_exit, ignored, ears } = supervisor;
    let parse = matches!(job.mode, Mode::Parse { .. });
    let stdin_json = job.mode == Mode::Parse { stdin_json: true };
    // A CLI in a group of its own must not have the terminal as its stdin: it would be stopped as a background job.
    let shared_group = !parse || !stdin_json && rustix::termios::isatty(std::io::stdin());

    // Without it tools that outlive the CLI go to somebody else; nothing else depends on it.
    if let Err(error) = rustix::process::set_child_subreaper(Some(rustix::process::getpid())) {
        tracing::warn!(%error, "not a subreaper: what the CLI leaves behind cannot be ended");
    }
    // Handlers first: a child that dies at once must not die unheard.
    let signals = match ears.and_then(|ears| ears.hand_over()) {
        Some(signals) => signals,
        None => Signals::take().map_err(|e| Failure::own("signals cannot be handled", e))?,
    };

    let pipe = || rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(|e| Failure::own("no pipe can be made", e));
    let stdin = if stdin_json { Some(pipe()?) } else { None };
    let stdout = if parse { Some(pipe()?) } else { None };
    let (cli_reads, we_write) = stdin.unzip();
    let (we_read, cli_writes) = stdout.unzip();
    if let Some(pipe) = &we_read {
        // Refused when the user has many pipes already: then it is smaller.
        rustix::pipe::fcntl_setpipe_size(pipe, PIPE).ok();
    }
    let orders = match &we_read {
        Some(_) => Some(Arc::new(Orders::new().map_err(|e| Failure::own("an eventfd cannot be made", e))?)),
        None => None,
    };
    let relay = match (we_read, &orders) {
        (Some(cli_stdout), Some(orders)) => {
            let parts = Parts {
                cli_stdin: we_write,
                cli_stdout,
                bounds: job.bounds(STDOUT_MEMORY),
                request_prefix: job.request_prefix.clone(),
                tap: Arc::clone(&handle.tap),
                orders: Arc::clone(orders),
                mail: Arc::clone(&mail),
                counts: Arc::clone(&handle.counts),
                clock: handle.clock,
            };
            Some(Relay::new(parts).map_err(|e| Failure::own("stdin and stdout cannot be used", e))?)
        }
        _ => None,
    };

    let stdio = Stdio2 { stdin: cli_reads, stdout: cli_writes };
    let (cwd, user) = (job.cwd.as_deref(), job.user.as_ref());
    let pid = child::spawn(&job.program, job.arg0.as_ref(), &job.args, &job.env, cwd, user, stdio, !shared_group, ignored)?;
    if parse && !stdin_json {
        // Only the CLI has the app's stdin now: when it closes it, the app sees that.
        let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, rustix::fs::Mode::empty());
        null.and_then(rustix::stdio::dup2_stdin).ok();
    }

    let init = Init {
        cli: pid,
        mode: job.mode,
        shared_group,
        watch_stdout: !parse && is_stream(std::io::stdout().as_fd()),
        signals,
        exit: None,
        childless: false,
        stage: Stage::Running,
        killing: None,
        stops: Vec::new(),
        converted: None,
        heard: None,
        stopped: false,
        stdout_ended: relay.is_none(),
        relay_done: relay.is_none(),
        monitor_done: false,
        lingered: false,
        words_over: last_words.is_none(),
        last_words,
        before_exit,
        orders: orders.clone(),
        tap: Arc::clone(&handle.tap),
        mail: Arc::clone(&mail),
        counts: Arc::clone(&handle.counts),
        clock: handle.clock,
    };
    init.tap.urgent(Urgent::Spawned { pid: pid.as_raw_nonzero().get().unsigned_abs() });

    let dispatcher = Dispatcher {
        monitor,
        sink,
        tap: Arc::clone(&handle.tap),
        orders,
        mail: Arc::clone(&mail),
        counts: handle.counts,
        clock: handle.clock,
    };
    // Without its thread the CLI could not talk; without the monitor's it could.
    let relaying = relay.map(|relay| std::thread::Builder::new().name("relay".into()).spawn(|| relay.run()));
    if let Some(Err(error)) = relaying {
        init.signal_all(Signal::KILL);
        return Err(Failure::own("no thread can be made", error));
    }
    if let Err(error) = std::thread::Builder::new().name("monitor".into()).spawn(|| dispatcher.run()) {
        tracing::error!(%error, "no thread for the monitor: the agent goes uncounted and without limits");
        init.tap.shut();
        mail.send(Letter::Degraded);
    }
    Ok(init.run())
}

struct Init<M> {
    cli: Pid,
    mode: Mode,
    /// The CLI is in our process group: what the terminal sends, it gets without us.
    shared_group: bool,
    /// Nobody else looks whether anybody reads our stdout.
    watch_stdout: bool,
    signals: Signals,
    exit: Option<Exit>,
    childless: bool,
    stage: Stage,
    killing: Option<Killing>,
    /// The stop signals that came so far.
    stops: Vec<Stopping>,
    /// The first stop signal that the monitor made something else of, as long as the CLI was not sent it after all.
    converted: Option<i32>,
    /// The stop signal that the terminal has sent the CLI as it sent it to us.
    heard: Option<i32>,
    /// Somebody asked for the end.
    stopped: bool,
    stdout_ended: bool,
    relay_done: bool,
    monitor_done: bool,
    lingered: bool,
    /// Nobody but the CLI has anything more to say.
    words_over: bool,
    last_words: Option<LastWords>,
    before_exit: Option<BeforeExit>,
    orders: Option<Arc<Orders>>,
    tap: Arc<Tap<M>>,
    mail: Arc<Mail>,
    counts: Arc<Counts>,
    clock: Clock,
}

#[derive(Debug)]
enum Stage {
    Running,
    /// The CLI is gone; what it left was asked to go, too.
    Orphans {
        asked: HashSet<Pid>,
        until: Duration,
    },
    /// Everybody is gone, or cannot be ended: the app and the monitor take the rest.
    Draining {
        exit_given: bool,
        app: Progress,
        monitor: Progress,
    },
    Lingering,
}

/// A stop that the monitor was told of.
#[derive(Debug)]
struct Stopping {
    stop: Stop,
    sender: Sender,
    came: Duration,
    answered: bool,
}

#[derive(Clone, Copy, Debug)]
struct Killing {
    until: Duration,
}

/// Whether a count still rises.
#[derive(Clone, Copy, Debug)]
struct Progress {
    count: u64,
    since: Duration,
}

impl Progress {
    fn stalled(&mut self, count: u64, now: Duration, bound: Duration) -> bool {
        if count != self.count {
            *self = Self { count, since: now };
        }
        self.since + bound <= now
    }
}

impl<M: Watch> Init<M> {
    fn run(mut self) -> u8 {
        // What arrived before there was a CLI rings no bell any more, and was not said to the CLI, not even at a terminal.
        for (signal, sender) in self.signals.pending() {
            let unheard = self.told_by_terminal(signal, sender);
            self.arrived(signal, if unheard { Sender::Process } else { sender });
        }
        loop {
            self.reap();
            while let Some(letter) = self.mail.take() {
                self.read(letter);
            }
            let now = self.clock.mono();
            if let Some(code) = self.step(now) {
                return code;
            }
            self.wait(now);
        }
    }

    // ---- waiting

    fn wait(&mut self, now: Duration) {
        let deadline = self.deadline(now);
        let stdout = std::io::stdout();
        let mut fds = vec![PollFd::new(&self.signals, PollFlags::IN), PollFd::new(&self.mail.bell, PollFlags::IN)];
        if self.watch_stdout {
            fds.push(PollFd::new(&stdout, PollFlags::empty()));
        }
        let timeout = deadline.map(|at| timespec(at.saturating_sub(now)));
        // Interrupted: a signal, which is what we wait for.
        rustix::event::poll(&mut fds, timeout.as_ref()).ok();
        let broken = PollFlags::ERR | PollFlags::HUP | PollFlags::NVAL;
        let gone = fds.get(2).is_some_and(|fd| fd.revents().intersects(broken));
        if !fds[1].revents().is_empty() {
            rustix::io::read(&self.mail.bell, &mut [0; 8]).ok();
        }
        drop(fds);
        if gone {
            self.watch_stdout = false;
            self.mail.send(Letter::AppGone);
        }
        let mut arrived = self.signals.pending();
        let continued = arrived.iter().any(|(signal, _)| *signal == signals::CONT);
        if self.shared_group && continued && !self.is_to_be_woken(&mut arrived) {
            arrived.retain(|(signal, _)| *signal != signals::CONT);
        }
        for (signal, sender) in arrived {
            self.arrived(signal, sender);
        }
    }

    /// We were continued: whether the CLI is stopped and nobody has woken it. If Ctrl-Z came right behind `fg`, it is to stay so: the
    /// terminal said that to us before the CLI stopped, so a second look finds its signal. The CLI is looked at once: one that is found
    /// awake and then stops was told to.
    fn is_to_be_woken(&mut self, arrived: &mut Vec<(i32, Sender)>) -> bool {
        if !self.cli_stopped() {
            return false;
        }
        arrived.extend(self.signals.pending());
        !arrived.iter().any(|(signal, sender)| *signal == signals::TSTP && self.told_by_terminal(*signal, *sender))
    }

    fn cli_stopped(&self) -> bool {
        self.alive() && tree::state(self.cli.as_raw_nonzero().get()) == Some('T')
    }

    fn deadline(&self, now: Duration) -> Option<Duration> {
        let answer = self.stops.iter().filter(|s| !s.answered).map(|s| s.came + ANSWER).min();
        let look = now + LOOK;
        let stage = match &self.stage {
            Stage::Running | Stage::Lingering => None,
            Stage::Orphans { .. } => Some(look),
            Stage::Draining { app, monitor, .. } => Some((app.since + DRAIN).min(monitor.since + STUCK).max(now + LOOK)),
        };
        let killing = self.killing.map(|_| look);
        [answer, stage, killing].into_iter().flatten().min()
    }

    // ---- what happens to processes

    /// The one owner of waitpid.
    fn reap(&mut self) {
        let options = if self.shared_group { WaitOptions::NOHANG | WaitOptions::UNTRACED } else { WaitOptions::NOHANG };
        loop {
            match rustix::process::wait(options) {
                Ok(Some((pid, status))) if pid == self.cli => self.cli_changed(status),
                Ok(Some((_, status))) if status.stopped() => {}
                Ok(Some(_)) => {
                    self.counts.zombies_reaped.fetch_add(1, Relaxed);
                }
                Err(rustix::io::Errno::INTR) => {}
                Ok(None) => return,
                // What is left below us would be a child of ours, or below one.
                Err(_) => {
                    self.childless = true;
                    return;
                }
            }
        }
    }

    fn cli_changed(&mut self, status: WaitStatus) {
        if let Some(code) = status.exit_status() {
            self.exit = Some(Exit::Code(code));
        } else if let Some(signal) = status.terminating_signal() {
            self.exit = Some(Exit::Signal(signal));
        } else if status.stopped() && tree::state(self.cli.as_raw_nonzero().get()) == Some('T') {
            // It stopped itself, as editors do on Ctrl-Z: whoever looks after us must see a stopped job.
            self.stop_ourselves();
        }
    }

    /// Returns when somebody has continued us.
    fn stop_ourselves(&self) {
        if rustix::process::getpid() == Pid::INIT {
            // Nobody stops PID 1, and nobody would wake the CLI.
            self.send(Signal::CONT);
        } else {
            signals::stop_now();
        }
    }

    fn alive(&self) -> bool {
        self.exit.is_none()
    }

    fn send(&self, signal: Signal) {
        if self.alive() {
            rustix::process::kill_process(self.cli, signal).ok();
        }
    }

    /// Everything below us; the CLI is among them as long as it lives.
    fn signal_all(&self, signal: Signal) -> usize {
        let pids = tree::below(rustix::process::getpid().as_raw_nonzero().get());
        tree::signal_all(&pids, signal);
        pids.len()
    }

    // ---- signals

    fn arrived(&mut self, signal: i32, sender: Sender) {
        match signal {
            signals::CHLD => {}
            _ if sender == Sender::Ourselves => {}
            signals::CONT => self.resumed(),
            _ if signals::is_stop(signal) => self.stop_arrived(signal, sender),
            signals::TSTP | signals::TTIN | signals::TTOU => {
                self.forward(signals::TSTP, sender);
                // A CLI that shares our group decides for both: were we stopped before it, the shell would take the terminal back
                // while the CLI still reads from it.
                if !self.shared_group && rustix::process::getpid() != Pid::INIT {
                    signals::stop_now();
                }
            }
            _ => self.forward(signal, sender),
        }
    }

    fn resumed(&self) {
        if !self.alive() {
            return;
        }
        if !self.shared_group {
            rustix::process::kill_process_group(self.cli, Signal::CONT).ok();
        } else {
            // Sent to us alone; a shell's `fg` wakes the CLI itself.
            self.send(Signal::CONT);
        }
    }

    fn stop_arrived(&mut self, signal: i32, sender: Sender) {
        self.stopped = true;
        let now = self.clock.mono();
        match &mut self.stage {
            Stage::Running => {}
            Stage::Orphans { until, .. } => *until = now,
            Stage::Draining { .. } => {}
            Stage::Lingering => self.lingered = true,
        }
        if !self.alive() {
            return;
        }
        if !matches!(self.mode, Mode::Parse { .. }) {
            return self.forward(signal, sender);
        }
        let stop = Stop::Signal(Number(signal));
        if let Some(before) = self.stops.iter().find(|s| s.stop == stop) {
            if before.came + SAME <= now {
                self.converted = None;
                self.forward(signal, sender);
            }
            return;
        }
        self.ask(stop, sender, now);
    }

    /// Tells the monitor, which answers by a letter; or does the plain thing.
    fn ask(&mut self, stop: Stop, sender: Sender, now: Duration) {
        if let Stop::Signal(Number(signal)) = stop
            && self.told_by_terminal(signal, sender)
        {
            self.heard = Some(signal);
        }
        let answered = !self.tap.urgent(Urgent::Stop(stop));
        self.stops.push(Stopping { stop, sender, came: now, answered });
        if answered {
            self.plain(stop, sender);
        }
    }

    /// What happens to a stop that no monitor takes up.
    fn plain(&mut self, stop: Stop, sender: Sender) {
        match stop {
            Stop::Signal(Number(signal)) => {
                if self.converted == Some(signal) {
                    self.converted = None;
                }
                self.forward(signal, sender);
            }
            // It would go on spending, unseen. What only passes through does not spend, or ends by itself.
            Stop::AppGone if matches!(self.mode, Mode::Parse { .. }) => self.send(Signal::TERM),
            Stop::AppGone => {}
        }
    }

    fn forward(&self, number: i32, sender: Sender) {
        if !self.alive() {
            return;
        }
        let Some(signal) = child::signal(number) else { return };
        match (sender, self.shared_group) {
            _ if self.told_by_terminal(number, sender) => {}
            // What the terminal says to a group, it says to all of it: servers of the CLI's are in there.
            (Sender::Kernel, false) => {
                rustix::process::kill_process_group(self.cli, signal).ok();
            }
            (Sender::Kernel | Sender::Process | Sender::Ourselves, _) => self.send(signal),
        }
    }

    /// A terminal tells its whole group. But a hang-up is said to the leader of the session alone.
    fn told_by_terminal(&self, number: i32, sender: Sender) -> bool {
        sender == Sender::Kernel && self.shared_group && (number != signals::HUP || !leads_session())
    }

    // ---- letters

    fn read(&mut self, letter: Letter) {
        match letter {
            Letter::Answer(stop) => {
                let waiting = self.stops.iter_mut().find(|s| s.stop == stop && !s.answered);
                if let (Some(waiting), Stop::Signal(Number(signal))) = (waiting, stop) {
                    waiting.answered = true;
                    self.converted.get_or_insert(signal);
                }
                for other in self.stops.iter_mut().filter(|s| s.stop == stop) {
                    other.answered = true;
                }
            }
            Letter::Signal(number) => {
                if self.converted == Some(number) {
                    self.converted = None;
                }
                // A second one would be an order to end at once.
                let heard = self.heard.take_if(|heard| *heard == number).is_some();
                if let Some(signal) = child::signal(number).filter(|_| !heard) {
                    self.send(signal);
                }
            }
            Letter::KillAll => self.kill_all(),
            Letter::Degraded => {
                self.monitor_done = true;
                // What it has answered, it may not have done; and nobody will climb the ladder for it.
                self.stops.iter_mut().for_each(|stop| stop.answered = false);
                self.overdue(Duration::MAX);
            }
            Letter::MonitorDone => self.monitor_done = true,
            Letter::AppGone => {
                if self.alive() {
                    self.ask(Stop::AppGone, Sender::Process, self.clock.mono());
                }
            }
            Letter::StdoutEnded => self.stdout_ended = true,
            Letter::RelayDone => self.relay_done = true,
            Letter::LastWords => self.words_over = true,
            Letter::Lingered => self.lingered = true,
        }
    }

    fn kill_all(&mut self) {
        self.stopped = true;
        self.signal_all(Signal::KILL);
        self.killing = Some(Killing { until: self.clock.mono() + KILL_BOUND });
        if let Stage::Orphans { until, .. } = &mut self.stage {
            *until = Duration::ZERO;
        }
    }

    /// Stops that the monitor should have answered by `now`.
    fn overdue(&mut self, now: Duration) {
        let late = |s: &&mut Stopping| !s.answered && s.came.saturating_add(ANSWER) <= now;
        let mut plain = Vec::new();
        for stopping in self.stops.iter_mut().filter(late) {
            stopping.answered = true;
            plain.push((stopping.stop, stopping.sender));
        }
        for (stop, sender) in plain {
            tracing::warn!(?stop, "the monitor does not answer: the signal goes its plain way");
            self.plain(stop, sender);
        }
    }

    // ---- stages

    /// Does what is due; the exit code when all is done.
    fn step(&mut self, now: Duration) -> Option<u8> {
        self.overdue(now);
        if let Some(killing) = self.killing {
            // Children of what was just killed are ours now, and those that were being born are seen now.
            if self.signal_all(Signal::KILL) == 0 || killing.until <= now {
                self.killing = None;
            }
        }
        if let (Stage::Running, Some(exit)) = (&self.stage, self.exit) {
            tracing::debug!(?exit, "the agent has ended");
            self.watch_stdout = false;
            if let Some(last_words) = self.last_words.take() {
                self.words_over = !self.beside("words", Letter::LastWords, Box::new(move || last_words(exit)));
            }
            self.stage = Stage::Orphans { asked: HashSet::new(), until: now + GRACE };
        }
        if let Stage::Orphans { .. } = self.stage
            && self.orphans_gone(now)
        {
            self.orders.as_ref().inspect(|o| o.finish());
            let progress = Progress { count: 0, since: now };
            self.stage = Stage::Draining { exit_given: false, app: progress, monitor: progress };
        }
        if let Stage::Draining { .. } = self.stage
            && self.drained(now)
        {
            self.linger();
        }
        (matches!(self.stage, Stage::Lingering) && self.lingered).then(|| self.exit_code())
    }

    fn orphans_gone(&mut self, now: Duration) -> bool {
        let Stage::Orphans { asked, until } = &mut self.stage else { return true };
        // A subcommand that starts something in the background does so on purpose.
        if self.childless || self.mode == Mode::PassThrough {
            return true;
        }
        let left = tree::below(rustix::process::getpid().as_raw_nonzero().get());
        if left.is_empty() || *until + KILL_BOUND <= now {
            return true;
        }
        if *until <= now {
            tree::signal_all(&left, Signal::KILL);
            return false;
        }
        let new: Vec<Pid> = left.into_iter().filter(|pid| asked.insert(*pid)).collect();
        self.counts.orphans_terminated.fetch_add(new.len() as u64, Relaxed);
        tree::signal_all(&new, Signal::TERM);
        // A stopped process does not hear a TERM before it goes on.
        tree::signal_all(&new, Signal::CONT);
        false
    }

    fn drained(&mut self, now: Duration) -> bool {
        let Stage::Draining { exit_given, app, monitor } = &mut self.stage else { return false };
        if self.stdout_ended && self.words_over && !*exit_given {
            *exit_given = true;
            if let Some(exit) = self.exit {
                self.tap.mark(Mark::Exited(exit));
            }
        }
        let (taken, _) = self.tap.progress();
        if *exit_given && !self.monitor_done && monitor.stalled(taken, now, STUCK) {
            tracing::error!("the monitor does not take the agent's last words: its counts are not complete");
            self.monitor_done = true;
        }
        let delivered = self.counts.delivered_bytes.load(Relaxed);
        if !self.relay_done && app.stalled(delivered, now, DRAIN) && self.stopped {
            tracing::warn!("the app does not take the rest of the agent's output");
            self.orders.as_ref().inspect(|o| o.give_up());
        }
        self.relay_done && self.monitor_done
    }

    fn linger(&mut self) {
        self.stage = Stage::Lingering;
        let ending = Ending { exit_code: self.exit_code(), stopped: self.stopped };
        let Some(before_exit) = self.before_exit.take() else {
            self.lingered = true;
            return;
        };
        // The app waits for the end of the agent's output, and we held it beside the agent. A relay has let go of it already.
        if self.orders.is_none() {
            relay::replace(|null| rustix::stdio::dup2_stdout(null));
        }
        self.lingered = !self.beside("linger", Letter::Lingered, Box::new(move || before_exit(ending)));
    }

    /// Does something on a thread of its own, and has us told when it is over, even by a panic. Says whether there is such a thread.
    fn beside(&self, name: &str, done: Letter, what: Box<dyn FnOnce() + Send>) -> bool {
        struct Tell(Arc<Mail>, Option<Letter>);
        impl Drop for Tell {
            fn drop(&mut self) {
                self.1.take().into_iter().for_each(|letter| self.0.send(letter));
            }
        }
        let mail = Arc::clone(&self.mail);
        let thread = std::thread::Builder::new().name(name.into()).spawn(move || {
            let _tell = Tell(mail, Some(done));
            what();
        });
        thread.is_ok()
    }

    fn exit_code(&self) -> u8 {
        let code = match (self.exit, self.converted) {
            (Some(Exit::Code(_)), Some(stop)) => signals::exit_code(stop),
            // A zero would say that it is all there.
            (Some(Exit::Code(0)), None) if self.counts.output_incomplete.load(Relaxed) => 1,
            (Some(Exit::Code(code)), None) => code,
            (Some(Exit::Signal(signal)), _) => 128 + signal,
            (None, _) => super::OWN_FAILURE.into(),
        };
        // Linux knows exit codes up to 255 and signals up to 64.
        u8::try_from(code).unwrap_or(u8::MAX)
    }
}

fn leads_session() -> bool {
    let us = rustix::process::getpid().as_raw_nonzero().get();
    tree::group_and_session(us).is_some_and(|(_, session)| session == us)
}

/// Whether poll(2) can tell that the other end is gone.
fn is_stream(fd: BorrowedFd<'_>) -> bool {
    rustix::fs::fstat(fd).is_ok_and(|stat| matches!(FileType::from_raw_mode(stat.st_mode), FileType::Fifo | FileType::Socket))
}
