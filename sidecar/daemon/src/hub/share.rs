//! A wrapper's side: sees to it that what it has counted is in its journal, soon and without anybody waiting for it.

use std::fs::{File, OpenOptions, Permissions};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError, Weak, mpsc};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use agent_sidecar_core::hub::{Hello, Line, STALE, VERSION};
use agent_sidecar_core::limit::{SHARED, Shared};
use agent_sidecar_core::metric;
use agent_sidecar_core::monitor::HeldFor;
use agent_sidecar_core::update::Activity;
use agent_sidecar_core::who::Who;
use agent_sidecar_core::{Input, Monitor};
use serde::Deserialize;

use super::Place;
use super::journal::{self, Journal};
use super::orders::Look;
use super::seat::Seat;
use super::story::{News, Story};
use super::till::{Errand, Payer, Till};
use super::turnstile::{self, Turnstile};
use super::{place, shelf};
use crate::export::otlp;
use crate::files;
use crate::http::{relayed, visit_blocking};
use crate::supervise::{Handle, NICE};

/// Two lines are at least this far apart. An answer is in the journal twice as soon as a kill could follow it that somebody meant.
const GAP: Duration = Duration::from_millis(25);
/// What moves without an event that anybody hears of is told this often.
const TICK: Duration = Duration::from_secs(1);
/// Something is written at least this often, so that silence means something.
const HEARTBEAT: Duration = Duration::from_secs(5);
/// The end waits for the last numbers to be written, this long: a disk that hangs must not keep the container.
const FINISH: Duration = Duration::from_secs(5);
/// How long a CLI that is about to ask waits for its own word of what it has spent (20 ms, on a machine with time), for others of this
/// wrapper who are at the book, and how often is looked.
const TOTALS: Duration = Duration::from_millis(500);
/// The same of one that cannot be asked, and says it about once a second.
const TELEMETRY: Duration = Duration::from_secs(6);
/// How long it waits for what others may need, who came before: for their answers. A message has more time, as it may be the very first
/// answer that it waits for, by which it can be told what others cost. Less than the hooks have.
const OTHERS: Duration = Duration::from_secs(4);
const FIRST: Duration = Duration::from_secs(45);
const OTHERS_AGAIN: Duration = Duration::from_millis(20);
const AT_DOOR: Duration = Duration::from_secs(3);
const AGAIN: Duration = Duration::from_millis(2);
/// How often a wrapper that waits to be read looks whether it was.
const LOOK: Duration = Duration::from_millis(20);

/// See the module's head.
#[derive(Clone)]
pub(crate) struct Share {
    inner: Arc<Inner>,
}

struct Inner {
    run: String,
    poked: Mutex<bool>,
    bell: Condvar,
    written: Mutex<Written>,
    story: Mutex<Story>,
    /// Who writes the last of it: there already when nobody can be made any more.
    finisher: Mutex<Option<mpsc::Sender<mpsc::Sender<()>>>>,
    /// Where budgets are shared.
    purse: Option<Mutex<Held>>,
    hold: Mutex<Hold>,
    handle: Handle,
    exports: Arc<otlp::Counts>,
    place: Place,
    hold_file: PathBuf,
    /// Where the CLI waits before it asks, if it can be made to.
    turnstile: Option<Turnstile>,
    seat: Weak<Seat>,
}

struct Written {
    journal: Journal,
    last: Line,
    at: Option<Instant>,
    failed: bool,
}

/// What the CLI turns messages away for, as its file says it.
#[derive(Default)]
struct Hold {
    said: Option<HeldFor>,
    failed: bool,
}

/// What was found at the till.
struct Held {
    till: Till,
    last: Option<[Option<Shared>; SHARED]>,
    failed: bool,
    closed: bool,
}

/// Who tells, and what.
pub(crate) struct Teller {
    pub(crate) run: String,
    /// Where the CLI is told of shared budgets.
    pub(crate) hold_file: PathBuf,
    /// As whom it looks there, if not as us: user and group.
    pub(crate) agent: Option<(u32, u32)>,
    /// For whom it works, as far as that is known.
    pub(crate) who: Who,
    /// If it spends from shared budgets.
    pub(crate) payer: Option<Payer>,
    /// Its seat, where those are few, for as long as it has it.
    pub(crate) seat: Weak<Seat>,
    pub(crate) handle: Handle,
    pub(crate) exports: Arc<otlp::Counts>,
}

impl Share {
    /// Starts telling.
    pub(crate) fn start(place: &Place, teller: Teller) -> std::io::Result<Share> {
        let Teller { run, hold_file, agent, who, payer, seat, handle, exports } = teller;
        let hello = Hello {
            hub: VERSION,
            run: run.clone(),
            pid: std::process::id(),
            started: shelf::unix(),
            world: place.world.clone(),
            labels: labels(&who),
        };
        let written = Written { journal: Journal::new(place, hello), last: Line::default(), at: None, failed: false };
        let turnstile = payer.is_some().then(|| Turnstile::new(&hold_file, agent)).and_then(|made| {
            let unmade = |error: &std::io::Error| {
                turnstile::remove(&hold_file);
                tracing::warn!(%error, "answers that come at once may be above shared budgets by more than one");
            };
            made.inspect_err(unmade).ok()
        });
        let (turnstile, knocks) = turnstile.unzip();
        let (ask, asked) = mpsc::channel::<mpsc::Sender<()>>();
        let inner = Inner {
            finisher: Mutex::new(Some(ask)),
            // The first line at once.
            poked: Mutex::new(true),
            bell: Condvar::new(),
            written: Mutex::new(written),
            story: Mutex::new(Story::new(place, &run)),
            purse: payer.map(|payer| {
                let till = Till::new(&place.dir, &run, payer);
                Mutex::new(Held { till, last: None, failed: false, closed: false })
            }),
            hold: Mutex::default(),
            hold_file,
            turnstile,
            seat,
            run,
            handle,
            exports,
            place: place.clone(),
        };
        let share = Share { inner: Arc::new(inner) };
        let last = share.clone();
        std::thread::Builder::new().name(String::from("finish")).stack_size(256 * 1024).spawn(move || {
            if let Ok(said) = asked.recv() {
                last.say_last();
                drop(said);
            }
        })?;
        if let Some((turnstile, knocks)) = share.inner.turnstile.as_ref().zip(knocks)
            && let Err(error) = turnstile.attend(knocks, share.clone())
        {
            // Whoever came would wait for nobody.
            turnstile.remove();
            return Err(error);
        }
        let teller = share.clone();
        std::thread::Builder::new().name(String::from("share")).stack_size(256 * 1024).spawn(move || teller.tell())?;
        Ok(share)
    }

    /// Something was counted that must not be lost.
    pub(crate) fn poke(&self) {
        let mut poked = lock(&self.inner.poked);
        if !std::mem::replace(&mut *poked, true) {
            self.inner.bell.notify_one();
        }
    }

    /// Writes what is not written yet. False when there is no monitor to ask.
    pub(crate) fn flush(&self) -> bool {
        let mut written = lock(&self.inner.written);
        let mut story = lock(&self.inner.story);
        let (since, untold) = (written.journal.since(), story.since());
        let (handle, exports) = (self.inner.handle.clone(), Arc::clone(&self.inner.exports));
        let told = visit_blocking(&self.inner.handle, move |monitor, _| {
            relayed(monitor.meters_mut(), handle.counts());
            exports.fill(monitor.meters_mut());
            let news = News::of(monitor.timeline(), untold);
            (monitor.journal(since), monitor.held_for(), news, monitor.who().clone())
        });
        let Some(((line, mark), held_for, news, who)) = told else { return false };
        // Nobody's sums rest on it: what could not be written is written with what comes next.
        story.tell(&news).ok();
        drop(story);
        if written.journal.works_for(labels(&who)) && since > 0 {
            // Said anew, and then all of it.
            drop(written);
            return self.flush();
        }
        let same = news.is_empty() && line.series.is_empty() && line.cleared.is_empty();
        let same = same && (line.live, line.ready) == (written.last.live, written.last.ready);
        if same && since > 0 && written.at.is_some_and(|at| at.elapsed() < HEARTBEAT) {
            drop(written);
            self.pay(held_for, &who, Duration::ZERO);
            return true;
        }
        self.write(&mut written, line, mark);
        // The journal says that we live: it has to be there first.
        let told = !written.failed;
        drop(written);
        if told {
            self.pay(held_for, &who, Duration::ZERO);
        }
        true
    }

    /// Says what was spent and is asked for, by whoever it works for by now, and has the agent held to what is left.
    /// False if the book could not be had.
    fn pay(&self, held_for: Option<HeldFor>, who: &Who, patience: Duration) -> bool {
        if let Some(seat) = self.inner.seat.upgrade() {
            seat.works_for(who.tenant.as_deref().unwrap_or_default());
        }
        // At once: its next tool may be done soon.
        if held_for.is_some() {
            self.hold(held_for.clone());
        }
        let Some(purse) = &self.inner.purse else {
            self.hold(held_for);
            return true;
        };
        // Whoever is at it may hang with its disk.
        let Some(mut purse) = lock_within(purse, patience) else { return false };
        if purse.closed {
            return true;
        }
        purse.till.works_for(who.tenant.clone());
        // Only now: what was asked for before somebody else was here has been told.
        let told = visit_blocking(&self.inner.handle, |monitor, _| (errand(monitor), monitor.held_for()));
        let Some((errand, held_for)) = told else { return true };
        let settled = purse.till.settle(unix(), &errand);
        let failed = settled.is_err();
        if purse.till.tampered() {
            self.tampered("budgets");
            tracing::error!("somebody else has changed the book of shared budgets; what this agent knows of it was put back");
        }
        let mut held_for = held_for;
        match settled {
            Ok(shared) if purse.last != Some(shared) => {
                purse.last = Some(shared);
                let told = visit_blocking(&self.inner.handle, move |monitor: &mut Monitor, now| {
                    monitor.handle(now, Input::Shared(&shared));
                    (monitor.held_for(), monitor.may_be_near())
                });
                if let Some((held, near)) = told {
                    held_for = held;
                    self.near(near);
                }
            }
            Ok(_) => {}
            Err(error) if !purse.failed => {
                tracing::warn!(%error, "shared budgets are held to as far as they were known");
            }
            Err(_) => {}
        }
        self.hold(held_for);
        if failed != std::mem::replace(&mut purse.failed, failed) {
            self.degraded("hub", failed);
        }
        !failed
    }

    fn near(&self, near: bool) {
        if let Some(turnstile) = &self.inner.turnstile {
            turnstile.near(near);
        }
    }

    /// The CLI is about to ask the model, and waits: says so in the book, with all that was spent before, and has the CLI turned back if
    /// there is nothing left for it.
    pub(super) fn let_ask(&self, message: bool, waits: impl Fn() -> bool) {
        let end = Instant::now() + TOTALS;
        // A visit is before what was said earlier and is still on its way.
        let who = loop {
            std::thread::sleep(AGAIN);
            let (handle, late) = (self.inner.handle.clone(), Instant::now() >= end);
            let asks = move |monitor: &mut Monitor, now| {
                let ready = late || handle.has_heard_all();
                ready.then(|| {
                    monitor.handle(now, Input::Knocks);
                    monitor.who().clone()
                })
            };
            match visit_blocking(&self.inner.handle, asks) {
                None => return,
                Some(None) => {}
                Some(Some(who)) => break who,
            }
        };
        self.wait(end, AGAIN, &waits, |monitor| monitor.awaits_totals());
        self.wait(end - TOTALS + TELEMETRY, AGAIN, &waits, |monitor| monitor.awaits_telemetry());
        // Only now: what it has asked for before keeps its place until it is priced.
        visit_blocking(&self.inner.handle, |monitor: &mut Monitor, now| monitor.handle(now, Input::Asks));
        let end = Instant::now() + AT_DOOR;
        // Others may be at the book.
        while !self.pay(None, &who, GAP) && Instant::now() < end {
            std::thread::sleep(AGAIN);
        }
        let end = Instant::now() + if message { FIRST } else { OTHERS };
        let others = || {
            self.pay(None, &who, GAP);
            waits()
        };
        self.wait(end, OTHERS_AGAIN, others, |monitor| monitor.waits_for_others());
        visit_blocking(&self.inner.handle, |monitor: &mut Monitor, now| monitor.handle(now, Input::LetThrough));
        let held_for = visit_blocking(&self.inner.handle, |monitor, _| monitor.held_for()).flatten();
        if held_for.is_some() {
            self.hold(held_for);
        }
        self.poke();
    }

    /// While this is so, and there is somebody who waits, but not for longer.
    fn wait(&self, end: Instant, again: Duration, waits: impl Fn() -> bool, is_so: fn(&Monitor) -> bool) {
        while Instant::now() < end
            && waits()
            && visit_blocking(&self.inner.handle, move |monitor, _| is_so(monitor)) == Some(true)
        {
            std::thread::sleep(again);
        }
    }

    /// Hands on what people ask.
    fn obey(&self, look: &mut Look) {
        match look.changed() {
            Ok(None) => {}
            Ok(Some(order)) => {
                let told = visit_blocking(&self.inner.handle, move |monitor: &mut Monitor, now| {
                    monitor.handle(now, Input::Ordered(&order));
                    monitor.held_for()
                });
                let Some(held_for) = told else { return look.again() };
                tracing::warn!(paused = order.paused, stop = order.stop, "somebody has asked something of this agent");
                look.told(order);
                self.hold(held_for);
            }
            Err(error) => tracing::debug!(%error, "what is asked of this agent cannot be read"),
        }
    }

    /// Sees to it that the CLI turns prompts away for a reason, or takes them again. What fails is tried again with the next number that
    /// is told: an agent must not be kept waiting for ever by a file that could not be removed for a moment.
    fn hold(&self, why: Option<HeldFor>) {
        let mut hold = lock(&self.inner.hold);
        let path = &self.inner.hold_file;
        if hold.said == why && (why.is_none() || path.symlink_metadata().is_ok()) {
            hold.failed = false;
            return;
        }
        let done = match &why {
            Some(why) => {
                // In one step: half a reason is none.
                let new = path.with_extension("hold.new");
                let now = if why.now { "now\n" } else { "" };
                files::write(&new, format!("{}\n{now}", why.why).as_bytes())
                    // Also for a CLI of another user, and whatever our umask is.
                    .and_then(|()| std::fs::set_permissions(&new, Permissions::from_mode(0o644)))
                    .and_then(|()| std::fs::rename(&new, path))
            }
            None => std::fs::remove_file(path).or_else(|error| match error.kind() {
                std::io::ErrorKind::NotFound => Ok(()),
                _ => Err(error),
            }),
        };
        match done {
            Ok(()) => *hold = Hold { said: why, failed: false },
            Err(error) if !std::mem::replace(&mut hold.failed, true) => {
                tracing::warn!(%error, held = why.is_some(), "the CLI cannot be told to wait, or to go on; turns are interrupted instead");
            }
            Err(_) => {}
        }
    }

    pub(super) fn degraded(&self, what: &'static str, on: bool) {
        self.inner.handle.visit(move |monitor, _| {
            monitor.meters_mut().set(&metric::DEGRADED, &[what], f64::from(u8::from(on)));
        });
    }

    /// Somebody else has written where only we and those like us should.
    fn tampered(&self, file: &'static str) {
        self.inner.handle.visit(move |monitor, _| monitor.meters_mut().add(&metric::TAMPERED, &[file], 1));
    }

    /// The last line. The journal is the hub's from here on. A disk that hangs is waited for so long, and no longer: false
    /// if it does.
    pub(crate) fn finish(&self) -> bool {
        let (say, hear) = mpsc::channel::<()>();
        let asked = lock(&self.inner.finisher).take().is_some_and(|finisher| finisher.send(say).is_ok());
        let told = asked && hear.recv_timeout(FINISH) != Err(mpsc::RecvTimeoutError::Timeout);
        if !told {
            tracing::warn!(dir = %self.inner.place.dir.display(), "the hub was not told of the agent's last numbers; the ledger has them, if one is set");
        }
        told
    }

    fn say_last(&self) {
        self.flush();
        if let Some(purse) = &self.inner.purse {
            let mut purse = lock(purse);
            let told = visit_blocking(&self.inner.handle, |monitor, _| (monitor.claim().0, monitor.answer()));
            // What could not be closed is closed by whoever finds our journal gone.
            if let Some((spent, answer)) = told {
                purse.till.close(unix(), spent, answer).ok();
            }
            purse.closed = true;
        }
        self.hold(None);
        if let Some(turnstile) = &self.inner.turnstile {
            turnstile.remove();
        }
        lock(&self.inner.written).journal.end();
    }

    /// What the others that live here do.
    pub(crate) fn others(&self) -> Vec<Activity> {
        let others = journal::living(&self.inner.place, &self.inner.run);
        let now = shelf::unix();
        let heard = others.into_iter().filter(|line| line.blind || now - line.unix <= STALE);
        heard.flat_map(|line| line.sessions).filter_map(|session| Activity::deserialize(&session["state"]).ok()).collect()
    }

    /// Whether what this wrapper has counted is counted on when it is gone.
    pub(crate) fn goes_on(&self) -> bool {
        self.inner.place.keeps() || !journal::living(&self.inner.place, &self.inner.run).is_empty()
    }

    /// For one of those that would say the same: a lock, if it is the one.
    pub(crate) fn speaker(&self, what: &str) -> std::io::Result<Option<File>> {
        let path = self.inner.place.dir.join(format!("busy-{}.lock", place::short(what)));
        let file = files::open(&path, OpenOptions::new().write(true).create(true).truncate(false).mode(0o600))?;
        Ok(place::try_lock(&file)?.then_some(file))
    }

    /// Waits until some hub has shown to somebody what was written last, or for so long; says whether one did.
    pub(crate) fn linger(&self, timeout: Duration) -> bool {
        let told = unix_nanos();
        let deadline = Instant::now() + timeout;
        loop {
            if scraped(&self.inner.place).is_some_and(|at| at > told) {
                return true;
            }
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(LOOK);
        }
    }

    fn tell(&self) {
        // Refused nowhere, and without it all is as right.
        rustix::process::nice(NICE).ok();
        let mut look = Look::new(&self.inner.place.orders(), &self.inner.run);
        loop {
            self.obey(&mut look);
            let poked = lock(&self.inner.poked);
            let (mut poked, _) =
                self.inner.bell.wait_timeout_while(poked, TICK, |poked| !*poked).unwrap_or_else(PoisonError::into_inner);
            *poked = false;
            drop(poked);
            if !self.flush() && !self.inner.handle.visit(|_, _| {}) {
                return self.blind();
            }
            std::thread::sleep(GAP);
        }
    }

    /// The monitor is no more, and the agent goes on without it. The numbers stay as they are, and nothing is held to any more.
    fn blind(&self) {
        self.hold(None);
        if let Some(turnstile) = &self.inner.turnstile {
            turnstile.remove();
        }
        let mut written = lock(&self.inner.written);
        let line = Line { unix: shelf::unix(), ready: false, blind: true, ..written.last.clone() };
        // Whether the journal is to be begun anew: then there is nothing to begin it with.
        let mark = written.journal.since();
        if mark > 0 {
            self.write(&mut written, line, mark);
        }
    }

    fn write(&self, written: &mut Written, mut line: Line, mark: u64) {
        let done = written.journal.write(&line, mark);
        if written.journal.tampered() {
            self.tampered("journal");
        }
        line.series.clear();
        line.cleared.clear();
        written.last = line;
        written.at = Some(Instant::now());
        let failed = done.is_err();
        if failed != std::mem::replace(&mut written.failed, failed) {
            if let Err(error) = done {
                tracing::warn!(dir = %self.inner.place.dir.display(), %error, "the hub is not told what this agent counts");
            }
            self.degraded("hub", failed);
        }
    }
}

fn labels(who: &Who) -> Vec<(String, String)> {
    who.labels().into_iter().map(|(label, value)| (label.to_owned(), value)).collect()
}

/// Leaves with the hub what was counted by one that never ran.
pub(crate) fn testify(place: &Place, run: &str, who: &Who, mut meters: metric::Meters) -> std::io::Result<()> {
    let hello = Hello {
        hub: VERSION,
        run: run.to_owned(),
        pid: std::process::id(),
        started: shelf::unix(),
        world: place.world.clone(),
        labels: labels(who),
    };
    let mut line = Line { unix: shelf::unix(), ..Line::default() };
    let mark = agent_sidecar_core::hub::changes(&mut meters, 0, &mut line);
    let mut journal = Journal::new(place, hello);
    journal.write(&line, mark)?;
    journal.end();
    Ok(())
}

fn errand(monitor: &Monitor) -> Errand {
    let (spent, asks) = monitor.claim();
    Errand { spent, asks, answer: monitor.answer(), waits: monitor.waits(), works: monitor.claims() }
}

/// When a hub began to collect what somebody has then read to the end: nanoseconds since the Unix epoch.
fn scraped(place: &Place) -> Option<u128> {
    files::read_to_string(&place.scraped()).ok()?.trim().parse().ok()
}

pub(super) fn unix_nanos() -> u128 {
    unix().as_nanos()
}

fn unix() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// Nothing if others have it for longer.
fn lock_within<T>(mutex: &Mutex<T>, patience: Duration) -> Option<MutexGuard<'_, T>> {
    let end = Instant::now() + patience;
    loop {
        match mutex.try_lock() {
            Ok(guard) => return Some(guard),
            Err(TryLockError::Poisoned(guard)) => return Some(guard.into_inner()),
            Err(TryLockError::WouldBlock) if Instant::now() >= end => return None,
            Err(TryLockError::WouldBlock) => std::thread::sleep(AGAIN),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
