//! The relay: one thread, one poll(2), the app's stdin to the CLI and the CLI's stdout to the app.
//!
//! ```text
//!   app ──► to_cli ──► CLI          own lines only between two lines of the app
//!   CLI ──► filter ──► app          what the app does not take yet ──► backlog ──► app
//!             └──► tap              the same bytes, after they were forwarded
//! ```
//!
//! It never waits for the monitor, and never stops reading the CLI while there is room anywhere. stderr is not here: the CLI
//! inherits ours. It says next to nothing on it, nobody counts it, and what is not touched cannot be lost, delayed or reordered.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use agent_sidecar_core::monitor::EOF_HOLD;
use rustix::event::{EventfdFlags, PollFd, PollFlags};
use rustix::fs::OFlags;

use super::backlog::{Backlog, Bounds};
use super::filter::Filter;
use super::stdio::{End, Step};
use super::tap::{Mark, Stream, Tap, Urgent};
use super::{Clock, Counts, Letter, Mail, timespec};

/// One read: what a default pipe holds.
const CHUNK: usize = 64 * 1024;

/// Lines of ours that wait for the end of a line of the app's; more than a handful means that nobody reads them.
const INJECTS: usize = 64;

/// Writes to the app in a row before the other descriptors get their turn.
const TURNS: usize = 16;

/// An app that draws breath gets this long before more of what the CLI says is taken off its pipe and kept for it: what it takes in
/// time is copied once, and the CLI does not notice, because its pipe has room for as much as it says in this time.
const BREATH: Duration = Duration::from_millis(20);

/// What the relay is asked to do.
#[derive(Debug)]
enum Order {
    Inject {
        request_id: String,
        line: String,
    },
    CloseStdin,
    /// The CLI is gone, and so is all that we could end: what is in its pipe now is all there will be.
    Finish,
    /// Nobody waits for the rest.
    GiveUp,
}

/// How others speak to the relay.
#[derive(Debug)]
pub(crate) struct Orders {
    queue: Mutex<VecDeque<Order>>,
    bell: OwnedFd,
    /// The app has spoken, and its EOF was not forwarded: a line of ours may be written.
    open: AtomicBool,
}

impl Orders {
    pub(crate) fn new() -> rustix::io::Result<Self> {
        let bell = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { queue: Mutex::default(), bell, open: AtomicBool::new(false) })
    }

    /// Says at once when it is of no use to try.
    pub(crate) fn inject(&self, request_id: String, line: String) -> bool {
        let open = self.open.load(Relaxed);
        if open {
            self.give(Order::Inject { request_id, line });
        }
        open
    }

    pub(crate) fn close_stdin(&self) {
        self.give(Order::CloseStdin);
    }

    pub(crate) fn finish(&self) {
        self.give(Order::Finish);
    }

    pub(crate) fn give_up(&self) {
        self.give(Order::GiveUp);
    }

    fn give(&self, order: Order) {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).push_back(order);
        // Only fails when the counter is full, and then the bell rings already.
        rustix::io::write(&self.bell, &1u64.to_ne_bytes()).ok();
    }

    fn answer_bell(&self) {
        rustix::io::read(&self.bell, &mut [0; 8]).ok();
    }

    fn take(&self) -> Option<Order> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }
}

/// What the relay is made of.
pub(crate) struct Parts<M> {
    /// Our ends of the CLI's pipes; no stdin when the CLI inherits ours.
    pub(crate) cli_stdin: Option<OwnedFd>,
    pub(crate) cli_stdout: OwnedFd,
    pub(crate) bounds: Bounds,
    pub(crate) request_prefix: String,
    pub(crate) tap: Arc<Tap<M>>,
    pub(crate) orders: Arc<Orders>,
    pub(crate) mail: Arc<Mail>,
    pub(crate) counts: Arc<Counts>,
    pub(crate) clock: Clock,
}

/// See the module's head.
pub(crate) struct Relay<M> {
    stdin: Inlet,
    cli_stdout: Option<End>,
    filter: Filter,
    outlet: Outlet,
    /// No more orders that ask for anything but an end.
    finishing: bool,
    give_up: bool,
    told_gone: bool,
    throttled: bool,
    tap: Arc<Tap<M>>,
    orders: Arc<Orders>,
    mail: Arc<Mail>,
    counts: Arc<Counts>,
    clock: Clock,
}

/// The way in: app to CLI.
#[derive(Debug)]
struct Inlet {
    app: Option<End>,
    cli: Option<End>,
    /// Read from the app, not yet taken by the CLI: from `sent` on.
    bytes: Vec<u8>,
    sent: usize,
    /// A line of ours that has to be finished before anything else is written.
    own: Vec<u8>,
    own_sent: usize,
    injects: VecDeque<(String, String)>,
    /// The CLI has had a complete line of the app's.
    spoken: bool,
    /// The last byte written was the end of a line.
    boundary: bool,
    eof: Eof,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Eof {
    NotYet,
    /// The app said it; the CLI is told later, so that a last question can be asked.
    Held {
        until: Duration,
    },
    Released,
}

/// The way out: to the app, directly while it takes everything, by way of the backlog otherwise.
#[derive(Debug)]
struct Outlet {
    app: Option<End>,
    backlog: Backlog,
    /// When the app last had everything, if it does not have it now.
    behind_since: Option<Duration>,
    /// Nobody reads any more.
    gone: bool,
    /// Somebody reads, and did not get all.
    incomplete: bool,
    delivered: u64,
}

impl Outlet {
    fn deliver(&mut self, mut bytes: &[u8]) {
        let Some(app) = &self.app else { return };
        if self.backlog.is_empty() {
            while !bytes.is_empty() {
                match app.write(bytes) {
                    Step::Moved(n) => {
                        self.delivered += n as u64;
                        bytes = &bytes[n..];
                    }
                    Step::NotNow => break,
                    Step::Ended => return self.lose(),
                    Step::Refused(errno) => return self.refused(errno),
                }
            }
        }
        self.backlog.push_always(bytes);
    }

    fn catch_up(&mut self) {
        let Some(app) = &self.app else { return };
        for _ in 0..TURNS {
            let front = match self.backlog.front() {
                Ok(front) => front,
                Err(error) => {
                    // A stream with a hole in it would be worse than one that ends.
                    tracing::error!(%error, source = %error.source, "the agent's output ends here");
                    self.incomplete = true;
                    return self.lose();
                }
            };
            if front.is_empty() {
                return;
            }
            match app.write(front) {
                Step::Moved(n) => {
                    self.delivered += n as u64;
                    self.backlog.consume(n);
                }
                Step::NotNow => return,
                Step::Ended => return self.lose(),
                Step::Refused(errno) => return self.refused(errno),
            }
        }
    }

    /// As the CLI does where it cannot write, and unlike it where nobody reads.
    fn refused(&mut self, errno: rustix::io::Errno) {
        tracing::error!(error = %std::io::Error::from(errno), "stdout cannot be written: the agent's output ends here");
        self.incomplete = true;
        self.lose();
    }

    fn lose(&mut self) {
        self.gone = true;
        self.close();
    }

    /// The app gets its EOF.
    fn close(&mut self) {
        self.app = None;
        self.backlog.clear();
        replace(|null| rustix::stdio::dup2_stdout(null));
    }
}

impl<M> Relay<M> {
    pub(crate) fn new(parts: Parts<M>) -> std::io::Result<Self> {
        let app_stdin = match parts.cli_stdin {
            Some(_) => Some(End::given(std::io::stdin().as_fd(), OFlags::RDONLY)?),
            None => None,
        };
        let stdin = Inlet {
            app: app_stdin,
            cli: parts.cli_stdin.map(End::own).transpose()?,
            bytes: Vec::with_capacity(CHUNK),
            sent: 0,
            own: Vec::new(),
            own_sent: 0,
            injects: VecDeque::new(),
            spoken: false,
            boundary: true,
            eof: Eof::NotYet,
        };
        let outlet = Outlet {
            app: Some(End::given(std::io::stdout().as_fd(), OFlags::WRONLY)?),
            backlog: Backlog::new(parts.bounds),
            behind_since: None,
            gone: false,
            incomplete: false,
            delivered: 0,
        };
        Ok(Self {
            stdin,
            cli_stdout: Some(End::own(parts.cli_stdout)?),
            filter: Filter::new(&parts.request_prefix),
            outlet,
            finishing: false,
            give_up: false,
            told_gone: false,
            throttled: false,
            tap: parts.tap,
            orders: parts.orders,
            mail: parts.mail,
            counts: parts.counts,
            clock: parts.clock,
        })
    }

    pub(crate) fn run(mut self) {
        let mut buf = vec![0; CHUNK];
        loop {
            let now = self.clock.mono();
            while let Some(order) = self.orders.take() {
                self.obey(order);
            }
            self.filter.tick(now, |b| self.outlet.deliver(b));
            self.feed(now);
            self.settle();
            self.publish();
            if self.give_up || self.finishing && self.cli_stdout.is_none() && self.outlet.app.is_none() {
                return;
            }
            self.turn(now, &mut buf);
        }
    }

    fn obey(&mut self, order: Order) {
        match order {
            Order::Inject { request_id, line } => {
                if self.orders.open.load(Relaxed) && self.stdin.injects.len() < INJECTS {
                    self.stdin.injects.push_back((request_id, line));
                } else {
                    self.drop_inject(request_id);
                }
            }
            Order::CloseStdin => {
                if let Eof::Held { .. } = self.stdin.eof {
                    self.stdin.eof = Eof::Released;
                }
            }
            Order::Finish => {
                self.finishing = true;
                self.close_stdin(true);
            }
            Order::GiveUp => self.give_up = true,
        }
    }

    /// Waits until something can be done, and does it.
    fn turn(&mut self, now: Duration, buf: &mut [u8]) {
        let room = self.cli_stdout.is_some() && self.outlet.has_room();
        if self.cli_stdout.is_some() && !room && !self.throttled {
            self.counts.back_pressure.fetch_add(1, Relaxed);
            tracing::warn!("the app does not read and there is no room left: the agent's output is held back");
        }
        self.throttled = self.cli_stdout.is_some() && !room;

        let backlogged = !self.outlet.backlog.is_empty();
        let breath = self.outlet.breath(now);
        let read = room && breath.is_none();
        let unsent = self.stdin.has_unsent();
        // After its end was read, or while the CLI takes nothing, the app's stdin is left alone: poll(2) would report a hang-up for ever.
        let listen = self.stdin.cli.is_some() && !unsent;
        let none = PollFlags::empty();
        let wants = [
            Some((self.orders.bell.as_fd(), PollFlags::IN)),
            self.cli_stdout.as_ref().filter(|_| read).map(|e| (e.as_fd(), PollFlags::IN)),
            // Without a question poll(2) still tells when the reader is gone.
            self.outlet.app.as_ref().map(|e| (e.as_fd(), if backlogged { PollFlags::OUT } else { none })),
            self.stdin.app.as_ref().filter(|_| listen).map(|e| (e.as_fd(), PollFlags::IN)),
            self.stdin.cli.as_ref().map(|e| (e.as_fd(), if unsent { PollFlags::OUT } else { none })),
        ];
        let held = match self.stdin.eof {
            Eof::Held { until } => Some(until),
            Eof::NotYet | Eof::Released => None,
        };
        let until = self.filter.deadline().into_iter().chain(held).chain(breath).min();
        let mut timeout = until.map(|at| at.saturating_sub(now));
        if self.finishing && read {
            timeout = Some(Duration::ZERO);
        }
        let [bell, cli_out, app_out, app_in, cli_in] = poll(wants, timeout);
        let broken = PollFlags::ERR | PollFlags::HUP | PollFlags::NVAL;

        if read && (self.finishing || !cli_out.is_empty()) {
            // A full buffer means that there is more: no need to ask again, unless others have waited for long.
            for _ in 0..TURNS {
                if self.take_stdout(buf) < buf.len() || !self.outlet.backlog.is_empty() {
                    break;
                }
            }
        }
        if app_out.contains(PollFlags::OUT) {
            self.outlet.catch_up();
        } else if app_out.intersects(broken) {
            self.outlet.lose();
        }
        if cli_in.intersects(broken) {
            self.close_stdin(true);
        }
        if !app_in.is_empty() {
            self.take_stdin();
        }
        if !bell.is_empty() {
            self.orders.answer_bell();
        }
    }

    /// One read, and how much it gave.
    fn take_stdout(&mut self, buf: &mut [u8]) -> usize {
        let Some(cli) = &self.cli_stdout else { return 0 };
        match cli.read(buf) {
            Step::Moved(n) => {
                let chunk = &buf[..n];
                let now = self.clock.mono();
                self.filter.push(now, chunk, |b| self.outlet.deliver(b));
                self.tap.bytes(now, Stream::Stdout, chunk);
                self.counts.stdout_bytes.fetch_add(n as u64, Relaxed);
                return n;
            }
            Step::NotNow if !self.finishing => {}
            // Somebody out of our reach still holds the pipe: what he may say is not the CLI's.
            Step::NotNow | Step::Ended | Step::Refused(_) => {
                self.cli_stdout = None;
                self.filter.finish(|b| self.outlet.deliver(b));
                self.tap.mark(Mark::StdoutEnd);
                self.mail.send(Letter::StdoutEnded);
            }
        }
        0
    }

    fn take_stdin(&mut self) {
        let Some(app) = &self.stdin.app else { return };
        self.stdin.bytes.resize(CHUNK, 0);
        self.stdin.sent = 0;
        let n = match app.read(&mut self.stdin.bytes) {
            Step::Moved(n) => n,
            Step::NotNow => 0,
            Step::Ended | Step::Refused(_) => {
                self.stdin.app = None;
                0
            }
        };
        self.stdin.bytes.truncate(n);
        // At once, not after the next poll.
        self.feed(self.clock.mono());
    }

    /// Writes to the CLI what there is to write, ours only between two lines, and the EOF when its time has come.
    fn feed(&mut self, now: Duration) {
        loop {
            let stdin = &mut self.stdin;
            let Some(cli) = &stdin.cli else { return };
            if stdin.own_sent < stdin.own.len() {
                match cli.write(&stdin.own[stdin.own_sent..]) {
                    Step::Moved(n) => stdin.own_sent += n,
                    Step::NotNow => return,
                    Step::Ended | Step::Refused(_) => return self.close_stdin(true),
                }
                if stdin.own_sent == stdin.own.len() {
                    stdin.own.clear();
                    stdin.own_sent = 0;
                    self.counts.injected.fetch_add(1, Relaxed);
                }
                continue;
            }
            if stdin.boundary
                && stdin.spoken
                && let Some((request_id, line)) = stdin.injects.pop_front()
            {
                stdin.own = line.into_bytes();
                self.filter.expect(request_id, now);
                continue;
            }
            if stdin.sent < stdin.bytes.len() {
                let unsent = &stdin.bytes[stdin.sent..];
                let line = memchr::memchr(b'\n', unsent).filter(|_| !stdin.spoken || !stdin.injects.is_empty());
                // Up to the next place where a line of ours can be put, if one waits.
                let end = if stdin.injects.is_empty() { unsent.len() } else { line.map_or(unsent.len(), |n| n + 1) };
                match cli.write(&unsent[..end]) {
                    Step::Moved(n) => {
                        let sent = &unsent[..n];
                        stdin.spoken |= line.is_some_and(|at| at < n);
                        stdin.boundary = sent.ends_with(b"\n");
                        stdin.sent += n;
                        // Before the monitor hears of it: it may answer at once.
                        self.orders.open.store(stdin.spoken, Relaxed);
                        self.tap.bytes(now, Stream::Stdin, sent);
                        self.counts.stdin_bytes.fetch_add(n as u64, Relaxed);
                    }
                    Step::NotNow => return,
                    Step::Ended | Step::Refused(_) => return self.close_stdin(true),
                }
                continue;
            }
            if stdin.app.is_some() {
                return;
            }
            match stdin.eof {
                Eof::NotYet => {
                    self.tap.mark(Mark::StdinEnd);
                    // A question can only be asked behind a complete line, and only when somebody is there to ask it.
                    let hold = stdin.spoken && stdin.boundary && !self.tap.is_shut();
                    stdin.eof = if hold { Eof::Held { until: now + EOF_HOLD } } else { Eof::Released };
                }
                Eof::Held { until } if now < until => return,
                Eof::Held { .. } | Eof::Released => return self.close_stdin(false),
            }
        }
    }

    /// The CLI's stdin ends: with the app's own end, or because nobody reads it. Then the app must see that, as it would without us.
    fn close_stdin(&mut self, unread: bool) {
        self.orders.open.store(false, Relaxed);
        if self.stdin.cli.take().is_some() && unread {
            self.stdin.app = None;
            self.stdin.bytes.clear();
            self.stdin.sent = 0;
            replace(|null| rustix::stdio::dup2_stdin(null));
        }
        for (request_id, _) in std::mem::take(&mut self.stdin.injects) {
            self.drop_inject(request_id);
        }
    }

    fn drop_inject(&self, request_id: String) {
        self.counts.injects_dropped.fetch_add(1, Relaxed);
        self.tap.urgent(Urgent::Dropped { request_id });
    }

    /// What follows from what has just happened to the app's end.
    fn settle(&mut self) {
        if self.outlet.gone && !self.told_gone {
            self.told_gone = true;
            self.counts.output_incomplete.store(self.outlet.incomplete, Relaxed);
            self.mail.send(Letter::AppGone);
        }
        // The app has it all: now its EOF, whatever we still have to do.
        if self.cli_stdout.is_none() && self.outlet.app.is_some() && self.outlet.backlog.is_empty() {
            self.outlet.close();
        }
    }

    fn publish(&self) {
        self.counts.delivered_bytes.store(self.outlet.delivered, Relaxed);
        self.counts.waiting_bytes.store(self.outlet.backlog.len(), Relaxed);
        self.counts.spilled_bytes.store(self.outlet.backlog.spilled(), Relaxed);
        self.counts.answers_kept.store(self.filter.kept(), Relaxed);
    }
}

impl<M> Drop for Relay<M> {
    /// Also when it panics: nobody may wait for it then.
    fn drop(&mut self) {
        if self.cli_stdout.is_some() {
            self.tap.mark(Mark::StdoutEnd);
            self.mail.send(Letter::StdoutEnded);
        }
        self.orders.open.store(false, Relaxed);
        self.mail.send(Letter::RelayDone);
    }
}

impl Inlet {
    fn has_unsent(&self) -> bool {
        self.own_sent < self.own.len() || self.sent < self.bytes.len() || self.boundary && self.spoken && !self.injects.is_empty()
    }
}

impl Outlet {
    /// Until when the app may draw breath.
    fn breath(&mut self, now: Duration) -> Option<Duration> {
        if self.app.is_none() || self.backlog.is_empty() {
            self.behind_since = None;
            return None;
        }
        let until = *self.behind_since.get_or_insert(now) + BREATH;
        (now < until).then_some(until)
    }

    fn has_room(&mut self) -> bool {
        self.app.is_none() || self.backlog.is_empty() || self.backlog.has_room(CHUNK)
    }
}

/// Puts /dev/null in the place of a standard descriptor, which closes it for whoever is at the other end.
pub(super) fn replace(dup2: impl FnOnce(&OwnedFd) -> rustix::io::Result<()>) {
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, rustix::fs::Mode::empty());
    // Without /dev/null the descriptor stays open until we exit.
    if let Err(error) = null.and_then(|null| dup2(&null)) {
        tracing::warn!(%error, "a standard descriptor cannot be closed before the exit");
    }
}

/// poll(2) over what is wanted; what is not there has no events.
fn poll<const N: usize>(wants: [Option<(BorrowedFd<'_>, PollFlags)>; N], timeout: Option<Duration>) -> [PollFlags; N] {
    let mut events = [PollFlags::empty(); N];
    let mut fds: Vec<PollFd<'_>> = Vec::with_capacity(N);
    fds.extend(wants.iter().flatten().map(|(fd, flags)| PollFd::from_borrowed_fd(*fd, *flags)));
    // Interrupted, or out of memory: nothing happened, come again.
    if rustix::event::poll(&mut fds, timeout.map(timespec).as_ref()).is_ok() {
        let wanted = events.iter_mut().zip(&wants).filter(|(_, want)| want.is_some());
        for ((event, _), fd) in wanted.zip(&fds) {
            *event = fd.revents();
        }
    }
    events
}
