//! The monitor's thread: takes what happened off the tap, hands it to the monitor with the time, and has done what it answers.
//!
//! It may be late, or end in a panic: then the relay and init go on as if it had never been there.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use agent_sidecar_core::monitor::{Action, Input, Monitor, Now, Output};

use super::relay::Orders;
use super::tap::{Mark, Piece, Portion, Stream, Tap, Urgent};
use super::{Clock, Counts, Letter, Mail};

/// A deadline that stays in the past after it was reported must not make us spin.
const TICK: Duration = Duration::from_millis(1);

/// Who counts does not get in the way of who works: in a flood, or on a busy machine, the relay and the agent go first.
pub(crate) const NICE: i32 = 5;

/// What the thread asks: [`Monitor`], or something worse in a test.
pub(crate) trait Watch: Send + 'static {
    fn handle(&mut self, now: Now, input: Input<'_>);
    fn poll_output(&mut self) -> Option<Output>;
    fn poll_timeout(&self) -> Option<Duration>;
}

impl Watch for Monitor {
    fn handle(&mut self, now: Now, input: Input<'_>) {
        self.handle(now, input);
    }

    fn poll_output(&mut self) -> Option<Output> {
        self.poll_output()
    }

    fn poll_timeout(&self) -> Option<Duration> {
        self.poll_timeout()
    }
}

/// Where everything goes that the monitor says and that is no action: measurements, spans, logs. Must not block for long.
pub(crate) type Sink = Box<dyn FnMut(Now, Output) + Send>;

/// See the module's head.
pub(crate) struct Dispatcher<M> {
    pub(crate) monitor: M,
    pub(crate) sink: Sink,
    pub(crate) tap: Arc<Tap<M>>,
    /// No relay, no orders: the descriptors are the CLI's.
    pub(crate) orders: Option<Arc<Orders>>,
    pub(crate) mail: Arc<Mail>,
    pub(crate) counts: Arc<Counts>,
    pub(crate) clock: Clock,
}

impl<M: Watch> Dispatcher<M> {
    pub(crate) fn run(mut self) {
        // On Linux this is for the calling thread alone. Refused nowhere, and without it all is as right, only slower.
        rustix::process::nice(NICE).ok();
        let (tap, mail, counts) = (Arc::clone(&self.tap), Arc::clone(&self.mail), Arc::clone(&self.counts));
        // Whatever state the monitor was left in, nobody looks at it again.
        let end = std::panic::catch_unwind(AssertUnwindSafe(|| self.serve()));
        if end.is_err() {
            tap.shut();
            counts.degraded.store(true, Relaxed);
            mail.send(Letter::Degraded);
            tracing::error!("the monitor failed: the agent goes on, uncounted and without limits");
        }
    }

    fn serve(&mut self) {
        let mut portion = Portion::default();
        let mut tried = None;
        loop {
            let due = self.monitor.poll_timeout();
            let now = self.clock.mono();
            let floor = if due.is_some() && due == tried { TICK } else { Duration::ZERO };
            let timeout = due.map(|at| at.saturating_sub(now).max(floor));
            match self.tap.take(now, &mut portion, timeout) {
                Some(urgent) => self.urgent(urgent),
                None => self.portion(&mut portion),
            }
            let now = self.clock.now();
            if self.monitor.poll_timeout().is_some_and(|at| at <= now.mono) {
                tried = self.monitor.poll_timeout();
                self.monitor.handle(now, Input::Timeout);
                self.perform(now);
            }
        }
    }

    fn urgent(&mut self, urgent: Urgent<M>) {
        let now = self.clock.now();
        match urgent {
            Urgent::Spawned { pid } => {
                self.monitor.handle(now, Input::Spawned { pid });
                self.perform(now);
            }
            Urgent::Stop(stop) => {
                self.monitor.handle(now, Input::Stop(stop));
                // The answer first: what is performed may undo what it means.
                self.mail.send(Letter::Answer(stop));
                self.perform(now);
            }
            Urgent::Dropped { request_id } => {
                self.monitor.handle(now, Input::NotInjected { request_id: &request_id });
                self.perform(now);
            }
            Urgent::Visit(visit) => {
                visit(&mut self.monitor, now);
                self.perform(now);
            }
        }
    }

    fn portion(&mut self, portion: &mut Portion) {
        while let Some(piece) = portion.next() {
            let now = self.clock.now();
            let input = match piece {
                Piece::Bytes(Stream::Stdout, bytes) => Input::Stdout(bytes),
                Piece::Bytes(Stream::Stdin, bytes) => Input::Stdin(bytes),
                Piece::Lost { bytes } => Input::Lost { bytes },
                Piece::Mark(Mark::StdoutEnd) => Input::StdoutEnd,
                Piece::Mark(Mark::StdinEnd) => Input::StdinEnd,
                Piece::Mark(Mark::Exited(exit)) => Input::Exited(exit),
            };
            let last = matches!(input, Input::Exited(_));
            self.monitor.handle(now, input);
            self.perform(now);
            if last {
                self.mail.send(Letter::MonitorDone);
            }
        }
    }

    fn perform(&mut self, now: Now) {
        while let Some(output) = self.monitor.poll_output() {
            let action = match output {
                Output::Action(action) => action,
                said => {
                    (self.sink)(now, said);
                    continue;
                }
            };
            match action {
                Action::Inject { request_id, line } => {
                    let given = self.orders.as_ref().is_some_and(|o| o.inject(request_id.clone(), line));
                    if !given {
                        self.counts.injects_dropped.fetch_add(1, Relaxed);
                        self.monitor.handle(now, Input::NotInjected { request_id: &request_id });
                    }
                }
                Action::CloseStdin => {
                    self.orders.as_ref().inspect(|o| o.close_stdin());
                }
                Action::Signal(signal) => self.mail.send(Letter::Signal(signal.0)),
                Action::KillAll => self.mail.send(Letter::KillAll),
            }
        }
    }
}
