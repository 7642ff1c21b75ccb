//! OTLP: what is offered here reaches the collector, or is counted as lost, and nobody waits for it.
//!
//! ```text
//!  offer ─► intake ─► queue ──────────────► sender of traces  ─► collector
//!  (any     (memory,  (files; memory where ► sender of metrics ─►
//!  thread)  bounded)  there is no disk)    ► sender of logs    ─►
//! ```
//!
//! One thread with a runtime of its own does all behind the intake. Not the SDK's batch processors: what they hold dies with us,
//! a collector that hangs takes their whole flush, and a full queue makes it fail at once.

mod answer;
mod count;
pub(crate) mod encode;
pub(crate) mod environment;
pub(crate) mod metrics;
pub(crate) mod pipeline;
mod queue;
pub(crate) mod resource;
mod send;
pub(crate) mod turns;
mod wire;

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hyper::body::Bytes;

pub(crate) use count::{Cause, Counts};
pub(crate) use environment::OtlpConfig;

/// What there is to send. The order is that of the indices in the tables by signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Signal {
    Traces,
    Metrics,
    Logs,
}

impl Signal {
    pub(crate) const ALL: [Signal; 3] = [Signal::Traces, Signal::Metrics, Signal::Logs];

    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Signal::Traces => "traces",
            Signal::Metrics => "metrics",
            Signal::Logs => "logs",
        }
    }
}

/// An encoded `Export…ServiceRequest`: the same bytes for every protocol.
#[derive(Debug)]
struct Offer {
    signal: Signal,
    items: u32,
    payload: Bytes,
}

/// What the callers and the exporter's thread share. Held for moments, and never across I/O.
#[derive(Debug, Default)]
struct State {
    intake: VecDeque<Offer>,
    intake_bytes: u64,
    /// By signal: what is to be sent if we end without another word, if that is news.
    wills: [Option<Offer>; 3],
    /// Taken out of the intake, and not in the queue yet.
    in_hand: u64,
    /// Items on disk and in memory.
    queued: [(u64, u64); 3],
    /// Nothing of this signal will leave before the flush ends.
    hopeless: [bool; 3],
    flushing: bool,
    /// When the flush ends.
    until: Option<Instant>,
    closing: bool,
    /// The thread has ended, in whatever way.
    ended: bool,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// For the exporter's thread: something was offered, or a flush begins, or the end.
    wake: tokio::sync::Notify,
    /// For those who wait: less is queued, or the thread has ended.
    progress: Condvar,
    counts: Arc<Counts>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere changes none of these numbers halfway.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a flush has achieved, in items.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Flushed {
    pub(crate) sent: u64,
    /// For whoever runs next with the same queue directory.
    pub(crate) left_on_disk: u64,
    pub(crate) lost: u64,
}

/// The way to the collector. Dropping it ends its thread; call [`Exporter::flush`] first.
#[derive(Debug)]
pub(crate) struct Exporter {
    shared: Arc<Shared>,
    /// By signal, whether it has a collector.
    exported: [bool; 3],
}

/// How long a dropped exporter waits for its thread to tidy up.
const TIDY: Duration = Duration::from_millis(20);

impl Exporter {
    /// Starts the thread. `None`, and no thread, if nothing is to be exported.
    ///
    /// # Errors
    /// When there can be no thread.
    pub(crate) fn start(config: OtlpConfig, counts: Arc<Counts>) -> std::io::Result<Option<Exporter>> {
        let exported = config.exported();
        if exported == [false; 3] {
            return Ok(None);
        }
        let shared =
            Arc::new(Shared { state: Mutex::default(), wake: tokio::sync::Notify::new(), progress: Condvar::new(), counts });
        let theirs = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name(String::from("otlp")).stack_size(512 * 1024);
        thread.spawn(move || send::run(config, &theirs))?;
        Ok(Some(Exporter { shared, exported }))
    }

    /// Hands over an encoded request of `items` spans, data points or log records. Never waits: if there is no room, the oldest
    /// that was offered is dropped and counted. A signal that is not exported is nobody's loss.
    pub(crate) fn offer(&self, signal: Signal, payload: Vec<u8>, items: usize) {
        // An empty request says nothing, and some who answer HTTP take one for broken.
        if !self.exported[signal as usize] || payload.is_empty() {
            return;
        }
        let offer = Offer { signal, items: u32::try_from(items).unwrap_or(u32::MAX), payload: Bytes::from(payload) };
        let mut state = self.shared.lock();
        if state.ended || state.closing {
            return self.shared.counts.lose(signal, Cause::Closed, u64::from(offer.items));
        }
        state.intake_bytes += offer.payload.len() as u64;
        state.intake.push_back(offer);
        while state.intake_bytes > queue::MEMORY_BYTES
            && let Some(oldest) = state.intake.pop_front()
        {
            state.intake_bytes -= oldest.payload.len() as u64;
            self.shared.counts.lose(oldest.signal, Cause::MemoryFull, u64::from(oldest.items));
        }
        drop(state);
        self.shared.wake.notify_one();
    }

    /// The same for a message that is not encoded yet.
    pub(crate) fn offer_message(&self, signal: Signal, message: &impl prost::Message, items: usize) {
        self.offer(signal, message.encode_to_vec(), items);
    }

    /// What is to be sent in our name, by whoever comes after us, if we end without another word; it replaces what was said before. An
    /// empty payload takes it back.
    pub(crate) fn will(&self, signal: Signal, payload: Vec<u8>, items: usize) {
        if self.exported[signal as usize] {
            let items = u32::try_from(items).unwrap_or(u32::MAX);
            self.shared.lock().wills[signal as usize] = Some(Offer { signal, items, payload: Bytes::from(payload) });
            self.shared.wake.notify_one();
        }
    }

    /// Waits until everything was sent, or `deadline` has passed, or waiting longer would change nothing: then what is left is on
    /// disk, or lost where there is none.
    pub(crate) fn flush(&self, deadline: Duration) -> Flushed {
        let until = Instant::now() + deadline;
        let (sent, lost) = (self.shared.counts.total_sent(), self.shared.counts.total_lost());
        let mut state = self.shared.lock();
        state.flushing = true;
        state.until = Some(until);
        state.hopeless = [false; 3];
        self.shared.wake.notify_one();
        while !state.settled()
            && let Some(left) = until.checked_duration_since(Instant::now())
        {
            (state, _) = self.shared.progress.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
        }
        (state.flushing, state.until) = (false, None);
        self.shared.wake.notify_one();
        let in_memory = state.in_memory() + state.queued.iter().map(|(_, memory)| memory).sum::<u64>();
        Flushed {
            sent: self.shared.counts.total_sent() - sent,
            left_on_disk: state.queued.iter().map(|(disk, _)| disk).sum(),
            lost: self.shared.counts.total_lost() - lost + in_memory,
        }
    }
}

impl State {
    fn in_memory(&self) -> u64 {
        self.in_hand + self.intake.iter().map(|offer| u64::from(offer.items)).sum::<u64>()
    }

    /// Whether waiting on would change nothing.
    fn settled(&self) -> bool {
        let done = |(&(disk, memory), &hopeless): (&(u64, u64), &bool)| memory == 0 && (disk == 0 || hopeless);
        self.ended || (self.in_memory() == 0 && self.queued.iter().zip(&self.hopeless).all(done))
    }
}

impl Drop for Exporter {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.closing = true;
        self.shared.wake.notify_one();
        // The thread removes its directory if nothing is in it. If it is busy, the next process does.
        let tidied = self.shared.progress.wait_timeout_while(state, TIDY, |state| !state.ended);
        drop(tidied);
    }
}

#[cfg(test)]
mod tests;
