//! From the monitor's thread to the exporter: spans and events gathered into batches, the meters read at their interval, all of it
//! encoded here. Who hands something in never waits; what does not fit is counted as lost.
//!
//! A `kill -9` of ours must not take along what is known: what waits here for its batch, what is still open and what the meters say is
//! left as a will with the queue, renewed every second (the meters less often), for whoever comes after us to send.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use agent_sidecar_core::telemetry::{Context, LogEvent, Span};
use opentelemetry_proto::tonic::collector::metrics::v1::ExportMetricsServiceRequest;
use opentelemetry_proto::tonic::metrics::v1::metric::Data;
use prost::Message;

use super::encode::{self, Origin};
use super::environment::Batching;
use super::metrics::{Metrics, MetricsOptions};
use super::{Cause, Counts, Exporter, Flushed, OtlpConfig, Signal, turns};
use crate::http::visit_blocking;
use crate::supervise::Handle;

/// What a pipeline says of the process it serves.
pub(crate) struct Identity {
    pub(crate) origin: Origin,
    pub(crate) options: MetricsOptions,
    /// Labels of each series of the agent.
    pub(crate) labels: Vec<(&'static str, String)>,
}

/// So much may be lost with us.
const RENEW: Duration = Duration::from_secs(1);
/// Of the meters: what they say is a hundred kilobytes.
const RENEW_METERS: Duration = Duration::from_secs(10);
/// A will that is out of date says things twice; but in a flood of spans it is not worth to be renewed behind each batch.
const RENEW_BEHIND_A_BATCH: Duration = Duration::from_millis(100);

/// A batch is no larger than this, if it can be helped: proxies take a megabyte, by default, and gRPC servers four.
const LARGE: usize = 768 * 1024;

/// Things of one kind that wait for their batch.
struct Waiting<T> {
    items: VecDeque<T>,
    since: Option<Instant>,
    batching: Batching,
}

impl<T> Waiting<T> {
    fn new(batching: Batching) -> Self {
        Self { items: VecDeque::new(), since: None, batching }
    }

    /// Says whether somebody has to look, and whether the oldest had to go.
    fn push(&mut self, item: T) -> (bool, bool) {
        let full = self.items.len() >= self.batching.max_queue;
        if full {
            self.items.pop_front();
        }
        self.items.push_back(item);
        let first = self.since.is_none();
        self.since.get_or_insert_with(Instant::now);
        (first || self.items.len() >= self.batching.max_batch, full)
    }

    fn due(&self) -> Option<Instant> {
        let since = self.since?;
        Some(if self.items.len() >= self.batching.max_batch { since } else { since + self.batching.delay })
    }

    /// A batch, if it is time for one.
    fn take(&mut self, now: Instant, all: bool) -> Vec<T> {
        if self.items.is_empty() || !all && self.due().is_none_or(|due| now < due) {
            return Vec::new();
        }
        let n = self.items.len().min(self.batching.max_batch.max(1));
        let batch = self.items.drain(..n).collect();
        self.since = (!self.items.is_empty()).then_some(now);
        batch
    }
}

struct State {
    spans: Waiting<Span>,
    events: Waiting<LogEvent>,
    ending: bool,
    /// The thread has handed over all that there was.
    done: bool,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    counts: Arc<Counts>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Whoever panicked did so between two whole states.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hand_in(&self, signal: Signal, push: impl FnOnce(&mut State) -> (bool, bool)) {
        let (look, lost) = push(&mut self.lock());
        if look {
            self.changed.notify_all();
        }
        if lost {
            self.counts.lose(signal, Cause::MemoryFull, 1);
        }
    }
}

/// What the monitor's thread hands spans and events to.
#[derive(Clone)]
pub(crate) struct Inlet(Arc<Shared>);

impl Inlet {
    /// Of a trace that nobody keeps, nothing is sent.
    pub(crate) fn span(&self, span: Span) {
        if !span.context.sampled {
            return;
        }
        self.0.hand_in(Signal::Traces, |state| state.spans.push(span));
    }

    pub(crate) fn event(&self, event: LogEvent) {
        self.0.hand_in(Signal::Logs, |state| state.events.push(event));
    }
}

/// See the module's head.
pub(crate) struct Pipeline {
    shared: Arc<Shared>,
    exporter: Arc<Exporter>,
    flush: Duration,
}

impl Pipeline {
    /// Starts its threads; `None` if nothing is to be exported.
    ///
    /// # Errors
    /// When there can be no thread.
    pub(crate) fn start(
        config: OtlpConfig,
        counts: Arc<Counts>,
        identity: Identity,
        handle: Handle,
    ) -> std::io::Result<Option<Pipeline>> {
        let (spans, logs, interval, flush) = (config.spans, config.logs, config.metrics.interval, config.flush);
        let queue_dir = config.queue_dir.clone();
        let metered = config.exported()[Signal::Metrics as usize];
        let Some(exporter) = Exporter::start(config, Arc::clone(&counts))? else { return Ok(None) };
        let exporter = Arc::new(exporter);
        let state = State { spans: Waiting::new(spans), events: Waiting::new(logs), ending: false, done: false };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new(), counts });
        let now = Instant::now();
        let reader = metered.then(|| Reader {
            metrics: Arc::new(Mutex::new(Metrics::new(identity.options, &identity.labels, unix()))),
            interval,
            next: now + interval,
            renew: now + RENEW_METERS,
        });
        let worker = Worker {
            shared: Arc::clone(&shared),
            exporter: Arc::clone(&exporter),
            origin: Arc::new(identity.origin),
            handle,
            queue_dir,
            reader,
            will: Will { next: now + RENEW, last: now, open: Vec::new(), events: Vec::new(), said: [false; 2], remembered: None },
        };
        std::thread::Builder::new().name(String::from("telemetry")).stack_size(512 * 1024).spawn(move || worker.run())?;
        Ok(Some(Pipeline { shared, exporter, flush }))
    }

    pub(crate) fn inlet(&self) -> Inlet {
        Inlet(Arc::clone(&self.shared))
    }

    /// Hands over what there is, reads the meters for the last time, and waits for the collector, no longer than configured.
    pub(crate) fn end(&self) -> Flushed {
        let until = Instant::now() + self.flush;
        let mut state = self.shared.lock();
        state.ending = true;
        self.shared.changed.notify_all();
        while !state.done
            && let Some(left) = until.checked_duration_since(Instant::now())
        {
            (state, _) = self.shared.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
        }
        drop(state);
        self.exporter.flush(until.saturating_duration_since(Instant::now()))
    }
}

/// Reads the meters, on the monitor's thread.
struct Reader {
    metrics: Arc<Mutex<Metrics>>,
    interval: Duration,
    next: Instant,
    /// When they are read for the will.
    renew: Instant,
}

/// What the monitor had open when it was asked last.
struct Will {
    next: Instant,
    last: Instant,
    open: Vec<Span>,
    events: Vec<LogEvent>,
    /// Spans and events: there is something in it.
    said: [bool; 2],
    /// The open turn that was remembered.
    remembered: Option<Context>,
}

struct Worker {
    shared: Arc<Shared>,
    exporter: Arc<Exporter>,
    origin: Arc<Origin>,
    handle: Handle,
    queue_dir: Option<PathBuf>,
    reader: Option<Reader>,
    will: Will,
}

impl Worker {
    fn run(mut self) {
        /// Nobody waits for a thread that panicked.
        struct Done(Arc<Shared>);
        impl Drop for Done {
            fn drop(&mut self) {
                self.0.lock().done = true;
                self.0.changed.notify_all();
            }
        }
        let done = Done(Arc::clone(&self.shared));
        loop {
            let (spans, events, ending) = self.wait();
            self.offer(Signal::Traces, &spans, |spans| encode::spans(spans, &self.origin).encode_to_vec());
            self.offer(Signal::Logs, &events, |events| encode::logs(events, &self.origin).encode_to_vec());
            self.remember(&spans);
            if ending && !(spans.is_empty() && events.is_empty()) {
                continue;
            }
            if !(spans.is_empty() && events.is_empty()) {
                self.will.next = self.will.next.min(Instant::now().max(self.will.last + RENEW_BEHIND_A_BATCH));
            }
            self.meters(ending);
            if ending {
                self.abandoned();
                // All is said; what is not sent yet is in the queue.
                Signal::ALL.into_iter().for_each(|signal| self.exporter.will(signal, Vec::new(), 0));
                break;
            }
            self.renew();
        }
        drop(done);
    }

    fn remember<'a>(&self, spans: impl IntoIterator<Item = &'a Span>) {
        if let Some(queue_dir) = &self.queue_dir {
            turns::remember(queue_dir, spans);
        }
    }

    /// What is open, and what waits, goes into the will.
    fn renew(&mut self) {
        let now = Instant::now();
        if now < self.will.next {
            return;
        }
        (self.will.next, self.will.last) = (now + RENEW, now);
        // A monitor that has failed leaves what it said last.
        if let Some(words) = visit_blocking(&self.handle, |monitor, now| monitor.last_words(now)) {
            (self.will.open, self.will.events) = words;
            self.will.open.retain(|span| span.context.sampled);
        }
        // An open turn is one that a successor may go on from.
        if let Some(turn) = self.will.open.iter().find(|span| span.attributes.iter().any(|(key, _)| *key == "claude_agent.turn"))
            && self.will.remembered != Some(turn.context)
        {
            self.remember([turn]);
            self.will.remembered = Some(turn.context);
        }
        // What has ended since is among those that wait, and nothing leaves those but by this thread.
        let (mut spans, mut events): (Vec<Span>, Vec<LogEvent>) = {
            let state = self.shared.lock();
            (state.spans.items.iter().cloned().collect(), state.events.items.iter().cloned().collect())
        };
        let ended = spans.len();
        for open in &self.will.open {
            if !spans[..ended].iter().any(|span| span.context == open.context) {
                spans.push(open.clone());
            }
        }
        let next = events.last().map_or(0, |event| event.sequence + 1);
        events.extend(self.will.events.iter().filter(|event| event.sequence >= next).cloned());
        if !spans.is_empty() || self.will.said[0] {
            let message = encode::spans(&spans, &self.origin);
            self.leave(Signal::Traces, &message, spans.len());
        }
        if !events.is_empty() || self.will.said[1] {
            let message = encode::logs(&events, &self.origin);
            self.leave(Signal::Logs, &message, events.len());
        }
        self.will.said = [!spans.is_empty(), !events.is_empty()];
        self.renew_meters();
    }

    fn leave(&self, signal: Signal, message: &impl prost::Message, items: usize) {
        self.exporter.will(signal, if items == 0 { Vec::new() } else { message.encode_to_vec() }, items);
    }

    fn renew_meters(&mut self) {
        let Some(reader) = &mut self.reader else { return };
        let now = Instant::now();
        if now < reader.renew || reader.next < now + RENEW {
            return;
        }
        reader.renew = now + RENEW_METERS;
        // A copy: nothing has been said by it.
        if let Some(request) = self.read(true) {
            self.leave(Signal::Metrics, &request, points(&request));
        }
    }

    /// Where the monitor has died, nobody closes what it had open: it goes as it was seen last.
    fn abandoned(&mut self) {
        if self.will.open.is_empty() && self.will.events.is_empty() || visit_blocking(&self.handle, |_, _| ()).is_some() {
            return;
        }
        let (spans, events) = (std::mem::take(&mut self.will.open), std::mem::take(&mut self.will.events));
        self.offer(Signal::Traces, &spans, |spans| encode::spans(spans, &self.origin).encode_to_vec());
        self.offer(Signal::Logs, &events, |events| encode::logs(events, &self.origin).encode_to_vec());
    }

    /// Hands over a batch, in halves while it is too large.
    fn offer<T>(&self, signal: Signal, items: &[T], encode: impl Fn(&[T]) -> Vec<u8> + Copy) {
        if items.is_empty() {
            return;
        }
        let payload = encode(items);
        if payload.len() > LARGE && items.len() > 1 {
            let (first, second) = items.split_at(items.len() / 2);
            self.offer(signal, first, encode);
            self.offer(signal, second, encode);
        } else {
            self.exporter.offer(signal, payload, items.len());
        }
    }

    /// Until there is something to do, and what that is.
    fn wait(&self) -> (Vec<Span>, Vec<LogEvent>, bool) {
        let mut state = self.shared.lock();
        loop {
            let now = Instant::now();
            let ending = state.ending;
            let (spans, events) = (state.spans.take(now, ending), state.events.take(now, ending));
            let read = self.reader.as_ref().map_or(self.will.next, |reader| reader.next.min(self.will.next));
            if ending || !spans.is_empty() || !events.is_empty() || read <= now {
                return (spans, events, ending);
            }
            let due = [state.spans.due(), state.events.due()].into_iter().flatten().fold(read, Instant::min);
            let left = due.saturating_duration_since(now);
            state = self.shared.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn meters(&mut self, last: bool) {
        let Some(reader) = &mut self.reader else { return };
        let now = Instant::now();
        if !last && now < reader.next {
            return;
        }
        // Readings that were missed are not made up for.
        reader.next = now + reader.interval;
        if let Some(request) = self.read(false) {
            self.exporter.offer_message(Signal::Metrics, &request, points(&request));
            self.exporter.will(Signal::Metrics, Vec::new(), 0);
        }
    }

    fn read(&self, only_look: bool) -> Option<ExportMetricsServiceRequest> {
        let metrics = Arc::clone(&self.reader.as_ref()?.metrics);
        let (origin, counts) = (Arc::clone(&self.origin), Arc::clone(&self.shared.counts));
        visit_blocking(&self.handle, move |monitor, now| {
            counts.fill(monitor.meters_mut());
            let mut metrics = metrics.lock().unwrap_or_else(PoisonError::into_inner);
            metrics.works_for(&monitor.who().labels());
            if only_look {
                metrics.clone().request(monitor.meters(), &origin, now.unix)
            } else {
                metrics.request(monitor.meters(), &origin, now.unix)
            }
        })
    }
}

fn points(request: &ExportMetricsServiceRequest) -> usize {
    let scopes = request.resource_metrics.iter().flat_map(|resource| &resource.scope_metrics);
    let points = |data: &Data| match data {
        Data::Gauge(gauge) => gauge.data_points.len(),
        Data::Sum(sum) => sum.data_points.len(),
        Data::Histogram(histogram) => histogram.data_points.len(),
        Data::ExponentialHistogram(histogram) => histogram.data_points.len(),
        Data::Summary(summary) => summary.data_points.len(),
    };
    scopes.flat_map(|scope| &scope.metrics).filter_map(|metric| metric.data.as_ref()).map(points).sum()
}

fn unix() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}
