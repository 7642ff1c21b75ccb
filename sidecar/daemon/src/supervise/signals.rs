//! Which signals we take, where each came from, and what that makes of it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};

use signal_hook::iterator::backend::SignalDelivery;
use signal_hook::iterator::exfiltrator::WithOrigin;
use signal_hook::low_level::siginfo::{Cause, Chld, Sent};

use super::child::Ignored;

pub(crate) const HUP: i32 = 1;
pub(crate) const INT: i32 = 2;
pub(crate) const QUIT: i32 = 3;
pub(crate) const TERM: i32 = 15;
pub(crate) const CHLD: i32 = 17;
pub(crate) const CONT: i32 = 18;
pub(crate) const TSTP: i32 = 20;
pub(crate) const TTIN: i32 = 21;
pub(crate) const TTOU: i32 = 22;

/// Who sent a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sender {
    /// Typed at a terminal, or one hung up: the whole foreground group got it.
    Kernel,
    Process,
    /// Ourselves, without wanting to: a file grew over its limit.
    Ourselves,
}

/// The signals that arrived and were not handled yet.
pub(crate) struct Signals {
    delivery: SignalDelivery<UnixStream, WithOrigin>,
    us: i32,
    /// Arrived before anybody could do anything about them.
    early: Vec<(i32, Sender)>,
}

/// Hears signals before there is a CLI that they could be forwarded to.
#[derive(Clone)]
pub(crate) struct Ears {
    ignored: Ignored,
    signals: Arc<Mutex<Option<Signals>>>,
}

impl Ears {
    pub(crate) fn new(ignored: Ignored) -> io::Result<Ears> {
        Ok(Ears { ignored, signals: Arc::new(Mutex::new(Some(Signals::take()?))) })
    }

    /// Somebody asks for the end. Nothing that arrived is forgotten, but for what was to be ignored.
    pub(crate) fn told(&self) -> Option<i32> {
        let mut signals = self.signals.lock().unwrap_or_else(PoisonError::into_inner);
        let signals = signals.as_mut()?;
        signals.early = signals.pending();
        signals.early.retain(|(signal, _)| !self.ignored.has(*signal));
        let mut told = signals.early.iter().map(|(signal, _)| *signal);
        told.find(|signal| [HUP, INT, TERM].contains(signal))
    }

    /// For whoever forwards them. Nobody else hears anything from here on.
    pub(crate) fn hand_over(&self) -> Option<Signals> {
        self.signals.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl Signals {
    /// Takes every signal that can be taken, but for
    /// - faults of our own (ILL, TRAP, BUS, FPE, SEGV, SYS): returning from their handler would only repeat them;
    /// - PIPE, which our own writes raise: EPIPE says it better;
    /// - 32 and 33, which belong to the C library.
    pub(crate) fn take() -> io::Result<Self> {
        let plain = [HUP, INT, QUIT, 6, 10, 12, 14, TERM, 16, CHLD, CONT, TSTP, TTIN, TTOU, 23, 24, 25, 26, 27, 28, 29, 30];
        let (read, write) = UnixStream::pair()?;
        let all = plain.into_iter().chain(34..=64);
        let delivery = SignalDelivery::with_pipe(read, write, WithOrigin::default(), all)?;
        Ok(Self { delivery, early: Vec::new(), us: rustix::process::getpid().as_raw_nonzero().get() })
    }

    /// What arrived since the last time. Asks for no more than it finds.
    pub(crate) fn pending(&mut self) -> Vec<(i32, Sender)> {
        let us = self.us;
        let sender = |origin: &signal_hook::low_level::siginfo::Origin| match origin.cause {
            Cause::Kernel => Sender::Kernel,
            Cause::Sent(Sent::User | Sent::TKill) if origin.process.is_some_and(|p| p.pid == us) => Sender::Ourselves,
            Cause::Chld(Chld::Exited | Chld::Killed | Chld::Dumped | Chld::Trapped | Chld::Stopped | Chld::Continued) => {
                Sender::Kernel
            }
            _ => Sender::Process,
        };
        let mut arrived = std::mem::take(&mut self.early);
        arrived.extend(self.delivery.pending().map(|origin| (origin.signal, sender(&origin))));
        arrived
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.delivery.get_read().as_fd()
    }
}

/// Stops this process, and returns when it was continued. Said to this thread alone: said to the process, another thread might take
/// it, and this one would go on for a while.
pub(crate) fn stop_now() {
    signal_hook::low_level::raise(rustix::process::Signal::STOP.as_raw()).ok();
}

/// Asks for an end of the CLI.
pub(crate) fn is_stop(signal: i32) -> bool {
    matches!(signal, HUP | INT | QUIT | TERM)
}

/// What the CLI itself would have reported, had the signal reached it: it handles INT as a normal end, HUP and TERM with a code of
/// their own, and QUIT not at all.
pub(crate) fn exit_code(stop: i32) -> i32 {
    if stop == INT { 0 } else { 128 + stop }
}
