//! The exporter's thread: takes in what was offered, and sends each signal's batches one after the other until each was taken or
//! refused. A collector that is slow for one signal holds back no other.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, sleep_until};

use super::answer::{Answer, Blame};
use super::count::{Cause, Counts};
use super::environment::{OtlpConfig, Target};
use super::queue::{BATCHES, Batch, Bounds, MEMORY_BYTES, Queue};
use super::wire::{Collector, Wire};
use super::{Offer, Shared, Signal};

/// How often to look for what dead wrappers left, and whether the disk is well again.
const VISIT: Duration = Duration::from_secs(60);
/// A batch over which the collector fails so often lets the others pass.
const BLAMED: u32 = 4;
/// So many failures in a flush, and what is on disk stays there: nobody waits for a collector that is down.
const HOPELESS: u32 = 4;

/// Pauses that double, up to a bound, half of each left to chance: a fleet must not knock in step.
#[derive(Clone, Copy, Debug)]
struct Backoff {
    failures: u32,
}

impl Backoff {
    const FIRST: Duration = Duration::from_secs(1);
    const LONGEST: Duration = Duration::from_secs(30);
    /// While somebody waits for the end.
    const FIRST_IN_A_HURRY: Duration = Duration::from_millis(100);

    /// How long to wait now; `chance` is from 0 to 1.
    fn next(&mut self, asked: Option<Duration>, hurry: bool, chance: f64) -> Duration {
        let first = if hurry { Backoff::FIRST_IN_A_HURRY } else { Backoff::FIRST };
        let pause = first.saturating_mul(1 << self.failures.min(16)).min(Backoff::LONGEST);
        self.failures += 1;
        let pause = pause.mul_f64(0.5 + chance / 2.0);
        asked.map_or(pause, |asked| asked.max(pause))
    }
}

/// What the futures on the thread share.
struct Bench<'a> {
    queue: RefCell<Queue>,
    /// By signal: something waits.
    more: [Notify; 3],
    hurry: watch::Sender<bool>,
    /// By signal: it has been said that it is refused.
    refusing: [Cell<bool>; 3],
    shared: &'a Shared,
}

impl Bench<'_> {
    fn new(queue: Queue, shared: &Shared) -> Bench<'_> {
        let (more, refusing) = (Default::default(), Default::default());
        Bench { queue: RefCell::new(queue), more, hurry: watch::Sender::new(false), refusing, shared }
    }

    fn counts(&self) -> &Counts {
        &self.shared.counts
    }

    /// What was offered since, what is left behind, whether a flush begins, and whether this is the end.
    fn fetch(&self, flushing: &mut bool) -> (VecDeque<Offer>, [Option<Offer>; 3], bool, bool) {
        let mut state = self.shared.lock();
        let (offers, wills) = (std::mem::take(&mut state.intake), std::mem::take(&mut state.wills));
        state.intake_bytes = 0;
        state.in_hand = offers.iter().map(|offer| u64::from(offer.items)).sum();
        let begins = state.flushing && !*flushing;
        *flushing = state.flushing;
        (offers, wills, begins, state.closing)
    }

    /// Tells those who wait for a flush.
    fn publish(&self) {
        let items = self.queue.borrow().items();
        let mut state = self.shared.lock();
        state.in_hand = 0;
        state.queued = items;
        drop(state);
        self.shared.progress.notify_all();
    }

    /// Whether a flush that has begun lasts for so long.
    fn has_time_for(&self, pause: Duration) -> bool {
        self.shared.lock().until.is_some_and(|until| std::time::Instant::now() + pause < until)
    }

    fn hopeless(&self, signal: Signal) {
        self.shared.lock().hopeless[signal as usize] = true;
        self.shared.progress.notify_all();
    }
}

/// The thread's whole life.
pub(super) fn run(config: OtlpConfig, shared: &Arc<Shared>) {
    let _ended = Ended(shared);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        // Names are looked up on a thread of their own.
        .max_blocking_threads(3)
        .thread_stack_size(256 * 1024)
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => return tracing::error!(%error, "nothing is exported; the agent goes on"),
    };
    let bounds = Bounds { disk: config.queue_max, memory: MEMORY_BYTES, batches: BATCHES };
    let queue = Queue::open(config.queue_dir.clone(), config.destination(), bounds, Arc::clone(&shared.counts));
    let bench = Bench::new(queue, shared);
    bench.publish();
    runtime.block_on(async {
        let [traces, metrics, logs] = config.targets;
        tokio::select! {
            () = take_in(&bench) => {}
            () = send(Signal::Traces, traces, &bench) => {}
            () = send(Signal::Metrics, metrics, &bench) => {}
            () = send(Signal::Logs, logs, &bench) => {}
        }
    });
    bench.queue.borrow_mut().close();
    bench.publish();
    // A name that is still being looked up keeps nobody waiting.
    runtime.shutdown_background();
}

/// Says that the thread has ended, however that came.
struct Ended<'a>(&'a Shared);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.0.lock().ended = true;
        self.0.progress.notify_all();
        if std::thread::panicking() {
            self.0.counts.degrade(true);
            tracing::error!("the exporter has failed; the agent goes on, unexported");
        }
    }
}

/// From the intake into the queue, until the end.
async fn take_in(bench: &Bench<'_>) {
    let mut visit = Instant::now() + VISIT;
    let mut flushing = false;
    loop {
        let (offers, wills, begins, closing) = bench.fetch(&mut flushing);
        let mut came = [false; 3];
        let unix_ns = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        let unix_ns = u64::try_from(unix_ns).unwrap_or(u64::MAX);
        for offer in offers {
            bench.queue.borrow_mut().put(offer.signal, offer.items, offer.payload, unix_ns);
            came[offer.signal as usize] = true;
        }
        // Behind the batches: what is in both for a moment is sent twice, not lost.
        for Offer { signal, items, payload } in wills.into_iter().flatten() {
            bench.queue.borrow().will(signal, items, &payload, unix_ns);
        }
        if begins || Instant::now() >= visit {
            bench.queue.borrow_mut().visit();
            visit = Instant::now() + VISIT;
            came = [true; 3];
        }
        bench.publish();
        if closing {
            return;
        }
        bench.more.iter().zip(came).filter(|(_, came)| *came).for_each(|(more, _)| more.notify_one());
        // Only now: what was offered before a flush is sent in it.
        bench.hurry.send_if_modified(|hurry| std::mem::replace(hurry, flushing) != flushing);
        tokio::select! {
            () = bench.shared.wake.notified() => {}
            () = sleep_until(visit) => {}
        }
    }
}

async fn send(signal: Signal, target: Option<Target>, bench: &Bench<'_>) {
    match target {
        Some(target) => send_by(signal, &target.name(), &mut Collector::new(target), bench).await,
        // Nothing is offered, and what others left is for those who send it.
        None => std::future::pending().await,
    }
}

/// Sends one signal's batches, the oldest first, one at a time: so their order is kept.
async fn send_by(signal: Signal, collector: &str, wire: &mut impl Wire, bench: &Bench<'_>) {
    let mut backoff = Backoff { failures: 0 };
    let (mut blamed, mut hurried, mut failing) = (0, 0, false);
    let mut hurry = bench.hurry.subscribe();
    loop {
        let head = bench.queue.borrow_mut().head(signal);
        let (batch, answer) = match head {
            Ok(Some(batch)) => {
                let answer = wire.send(&batch.payload).await;
                (batch, answer)
            }
            Ok(None) => {
                bench.publish();
                bench.more[signal as usize].notified().await;
                continue;
            }
            Err(error) => {
                tracing::debug!(%error, "the queue cannot be read now");
                sleep(Backoff::FIRST).await;
                continue;
            }
        };
        let (why, asked, blame) = match answer {
            Answer::Taken { except, said } => {
                taken(signal, collector, &batch, except, &said, bench);
                if std::mem::take(&mut failing) {
                    tracing::info!(signal = signal.as_str(), collector, "the collector takes what is sent again");
                }
                (backoff.failures, blamed, hurried) = (0, 0, 0);
                continue;
            }
            Answer::Refused { why } => {
                refused(signal, collector, &batch, &why, bench);
                (backoff.failures, blamed, hurried) = (0, 0, 0);
                continue;
            }
            Answer::Again { why, asked, blame } => (why, asked, blame),
        };

        bench.counts().retry(signal);
        if !std::mem::replace(&mut failing, true) {
            let signal = signal.as_str();
            tracing::warn!(signal, collector, error = why, "the collector does not take what is sent; it is kept and sent again");
        }
        blamed = if blame == Blame::Unclear { blamed + 1 } else { 0 };
        // Points that arrive out of order are refused by most who store them: metrics wait.
        if blamed >= BLAMED && signal != Signal::Metrics {
            bench.queue.borrow_mut().postpone(signal, batch.id);
            blamed = 0;
        } else {
            bench.queue.borrow_mut().failed(signal);
        }
        let hurrying = *hurry.borrow_and_update();
        hurried = if hurrying { hurried + 1 } else { 0 };
        let pause = backoff.next(asked, hurrying, chance());
        if hurried >= HOPELESS || (hurrying && asked.is_some() && !bench.has_time_for(pause)) {
            bench.hopeless(signal);
        }
        let mut pause = std::pin::pin!(sleep(pause));
        let mut calm = !hurrying;
        loop {
            tokio::select! {
                () = &mut pause => break,
                _ = hurry.wait_for(|hurry| *hurry), if calm => match asked {
                    // Somebody waits for the end: once more.
                    None => {
                        backoff.failures = 0;
                        break;
                    }
                    // Unless the collector asked for peace: for how long is what counts.
                    Some(_) => {
                        calm = false;
                        if !bench.has_time_for(pause.deadline().saturating_duration_since(Instant::now())) {
                            bench.hopeless(signal);
                        }
                    }
                },
            }
        }
    }
}

fn taken(signal: Signal, collector: &str, batch: &Batch, except: u64, said: &str, bench: &Bench<'_>) {
    let items = u64::from(batch.items);
    let except = except.min(items);
    if except > 0 {
        bench.counts().lose(signal, Cause::Partial, except);
        say_refused(signal, collector, except, said, bench);
    } else {
        bench.refusing[signal as usize].set(false);
    }
    bench.counts().sent(signal, items - except);
    bench.queue.borrow_mut().done(signal, batch.id);
    bench.publish();
}

fn refused(signal: Signal, collector: &str, batch: &Batch, why: &str, bench: &Bench<'_>) {
    bench.counts().lose(signal, Cause::Refused, u64::from(batch.items));
    say_refused(signal, collector, u64::from(batch.items), why, bench);
    bench.queue.borrow_mut().done(signal, batch.id);
    bench.publish();
}

/// Once, until something is taken again: the metrics have the numbers.
fn say_refused(signal: Signal, collector: &str, items: u64, error: &str, bench: &Bench<'_>) {
    if !bench.refusing[signal as usize].replace(true) {
        let signal = signal.as_str();
        tracing::error!(
            signal,
            collector,
            items,
            error,
            "the collector refuses what is sent; check the endpoint, its path and the headers"
        );
    }
}

/// From 0 to 1.
#[expect(clippy::cast_precision_loss, reason = "chance needs no precision")]
fn chance() -> f64 {
    crate::supervise::random() as f64 / u64::MAX as f64
}

#[cfg(test)]
mod tests;
