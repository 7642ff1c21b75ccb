//! What became of what was to be exported. The exporter's threads count here, the monitor's meters read it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{SystemTime, UNIX_EPOCH};

use agent_sidecar_core::metric::{self, Meters};

use super::Signal;

/// Why something will never arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    /// The queue on disk was full: the oldest had to go.
    QueueFull,
    /// The same in memory.
    MemoryFull,
    /// One batch alone is larger than the whole queue.
    TooLarge,
    /// What was read back is not what was written.
    Corrupt,
    /// The collector refused the batch, for good.
    Refused,
    /// The collector took the batch, this part of it excepted.
    Partial,
    /// The exporter has ended, or its thread has died.
    Closed,
}

impl Cause {
    pub(crate) const ALL: [Cause; 7] =
        [Cause::QueueFull, Cause::MemoryFull, Cause::TooLarge, Cause::Corrupt, Cause::Refused, Cause::Partial, Cause::Closed];

    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Cause::QueueFull => "queue_full",
            Cause::MemoryFull => "memory_full",
            Cause::TooLarge => "too_large",
            Cause::Corrupt => "corrupt",
            Cause::Refused => "refused",
            Cause::Partial => "partial",
            Cause::Closed => "closed",
        }
    }

    /// The collector's doing, or ours.
    fn outcome(self) -> &'static str {
        match self {
            Cause::Refused | Cause::Partial => "failed",
            Cause::QueueFull | Cause::MemoryFull | Cause::TooLarge | Cause::Corrupt | Cause::Closed => "dropped",
        }
    }
}

/// Items are spans, log records or data points, as their encoder counted them.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    sent: [AtomicU64; 3],
    lost: [[AtomicU64; 7]; 3],
    retries: [AtomicU64; 3],
    last_success_unix_ms: [AtomicU64; 3],
    queued: [AtomicU64; 3],
    queue_bytes: AtomicU64,
    queue_capacity_bytes: AtomicU64,
    degraded: AtomicBool,
}

impl Counts {
    pub(super) fn sent(&self, signal: Signal, items: u64) {
        self.sent[signal as usize].fetch_add(items, Relaxed);
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.last_success_unix_ms[signal as usize].store(u64::try_from(unix.as_millis()).unwrap_or(u64::MAX), Relaxed);
    }

    pub(super) fn lose(&self, signal: Signal, cause: Cause, items: u64) {
        self.lost[signal as usize][cause as usize].fetch_add(items, Relaxed);
    }

    pub(super) fn retry(&self, signal: Signal) {
        self.retries[signal as usize].fetch_add(1, Relaxed);
    }

    pub(super) fn queue(&self, items: [u64; 3], bytes: u64, capacity: u64) {
        for (gauge, n) in self.queued.iter().zip(items) {
            gauge.store(n, Relaxed);
        }
        self.queue_bytes.store(bytes, Relaxed);
        self.queue_capacity_bytes.store(capacity, Relaxed);
    }

    /// Says whether that is news.
    pub(super) fn degrade(&self, on: bool) -> bool {
        self.degraded.swap(on, Relaxed) != on
    }

    pub(crate) fn total_sent(&self) -> u64 {
        self.sent.iter().map(|n| n.load(Relaxed)).sum()
    }

    pub(crate) fn total_lost(&self) -> u64 {
        self.lost.iter().flatten().map(|n| n.load(Relaxed)).sum()
    }

    #[cfg(test)]
    pub(super) fn lost(&self, signal: Signal, cause: Cause) -> u64 {
        self.lost[signal as usize][cause as usize].load(Relaxed)
    }

    #[cfg(test)]
    pub(super) fn retried(&self, signal: Signal) -> u64 {
        self.retries[signal as usize].load(Relaxed)
    }

    #[cfg(test)]
    pub(super) fn is_degraded(&self) -> bool {
        self.degraded.load(Relaxed)
    }

    /// Brings the catalogue up to date; called before the meters are read.
    #[expect(clippy::cast_precision_loss, reason = "an exposition speaks in floats")]
    pub(crate) fn fill(&self, meters: &mut Meters) {
        let n = |counter: &AtomicU64| counter.load(Relaxed) as f64;
        for signal in Signal::ALL {
            let (i, name) = (signal as usize, signal.as_str());
            let mut outcomes = [("failed", 0.0), ("dropped", 0.0)];
            for cause in Cause::ALL {
                let lost = n(&self.lost[i][cause as usize]);
                if lost > 0.0 {
                    meters.raise(&metric::EXPORT_LOST, &[name, cause.as_str()], lost);
                }
                for (outcome, sum) in &mut outcomes {
                    *sum += if *outcome == cause.outcome() { lost } else { 0.0 };
                }
            }
            meters.raise(&metric::EXPORT_ITEMS, &[name, "sent"], n(&self.sent[i]));
            for (outcome, sum) in outcomes {
                meters.raise(&metric::EXPORT_ITEMS, &[name, outcome], sum);
            }
            meters.raise(&metric::EXPORT_RETRIES, &[name], n(&self.retries[i]));
            meters.set(&metric::EXPORT_QUEUE_ITEMS, &[name], n(&self.queued[i]));
            let last = n(&self.last_success_unix_ms[i]);
            if last > 0.0 {
                meters.set(&metric::EXPORT_LAST_SUCCESS, &[name], last / 1e3);
            }
        }
        meters.set(&metric::EXPORT_QUEUE_BYTES, &[], n(&self.queue_bytes));
        meters.set(&metric::EXPORT_QUEUE_CAPACITY, &[], n(&self.queue_capacity_bytes));
        meters.set(&metric::DEGRADED, &["otlp"], f64::from(u8::from(self.degraded.load(Relaxed))));
    }
}

#[cfg(test)]
mod tests {
    use agent_sidecar_core::metric::Cell;

    use super::*;

    #[test]
    fn every_loss_is_in_the_metrics_once_by_cause_and_once_by_outcome() {
        let (counts, mut meters) = (Counts::default(), Meters::default());
        counts.sent(Signal::Logs, 5);
        for cause in Cause::ALL {
            counts.lose(Signal::Traces, cause, 1);
        }
        // Read twice: totals are set, not added.
        counts.fill(&mut meters);
        counts.fill(&mut meters);
        let get = |metric, values: &[&str]| meters.get(metric, values).map(Cell::to_f64);
        assert_eq!(get(&metric::EXPORT_ITEMS, &["logs", "sent"]), Some(5.0));
        assert_eq!(get(&metric::EXPORT_ITEMS, &["traces", "failed"]), Some(2.0));
        assert_eq!(get(&metric::EXPORT_ITEMS, &["traces", "dropped"]), Some(5.0));
        assert_eq!(get(&metric::EXPORT_LOST, &["traces", "queue_full"]), Some(1.0));
        assert_eq!(get(&metric::EXPORT_LOST, &["logs", "queue_full"]), None);
        assert!(get(&metric::EXPORT_LAST_SUCCESS, &["logs"]) > Some(1.7e9) && counts.total_lost() == 7);
    }
}
