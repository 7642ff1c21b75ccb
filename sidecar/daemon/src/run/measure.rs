//! What is measured while it runs: the container's hours, memory and CPU.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use agent_sidecar_core::metric;
use agent_sidecar_core::{Exit, Input};

use super::meet::Meet;
use crate::config::Config;
use crate::hang::within;
use crate::http;
use crate::hub::Hours;
use crate::patrol::Seal;
use crate::sample::{self, Sampler};
use crate::supervise::Handle;

/// What counts the container's time, for its own thread and for the end.
pub(super) type Meter = Arc<Mutex<Hours>>;

/// How often the container's time is booked: what a killed agent has not booked is lost. Sooner while it is young, so that of a short
/// life not much is.
const BOOK: Duration = Duration::from_secs(30);
const FIRST_BOOK: Duration = Duration::from_secs(1);

pub(super) fn hours(config: &Config, turn: &Meet, run: &str) -> Option<Meter> {
    let place = match turn {
        Meet::At(turn) => Some(turn.place().clone()),
        // Who meets nobody has the container to itself, as far as it knows.
        Meet::Alone | Meet::Nowhere => None,
    };
    config.prices.meters_container().then(|| Arc::new(Mutex::new(Hours::new(place, run))))
}

pub(super) fn meter_for_ever(hours: Meter, handle: Handle) {
    let started = std::thread::Builder::new().name(String::from("hours")).stack_size(256 * 1024).spawn(move || {
        let mut pause = FIRST_BOOK;
        loop {
            if !book_hours(&hours, &handle, false) {
                return;
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(BOOK);
        }
    });
    if let Err(error) = started {
        tracing::warn!(%error, "the container's hours are counted at the end alone");
    }
}

/// False if there is no monitor to tell, or nothing more to count.
fn book_hours(hours: &Meter, handle: &Handle, end: bool) -> bool {
    // Handed in before anybody takes more: the last time may be the end's.
    let mut hours = lock(hours);
    match hours.take(end) {
        Ok(Some(time)) => handle.visit(move |monitor, now| monitor.handle(now, Input::ContainerUsed(time))),
        Ok(None) => false,
        Err(error) if end => {
            tracing::warn!(%error, "the last of the container's hours are not booked");
            false
        }
        Err(error) => {
            // What is not taken now is taken next time.
            tracing::debug!(%error, "the container's hours cannot be divided");
            true
        }
    }
}

pub(super) fn last_hours(hours: &Meter, handle: &Handle) {
    let (hours, handle) = (Arc::clone(hours), handle.clone());
    if let Err(error) = within(Duration::ZERO, move || book_hours(&hours, &handle, true)) {
        tracing::warn!(%error, "the last of the container's hours are not booked");
    }
}

/// The sampler, for its own thread and for a last reading.
pub(super) type Readings = Arc<Mutex<Sampler>>;

pub(super) fn sampler() -> Option<Readings> {
    match Sampler::new() {
        Ok(sampler) => Some(Arc::new(Mutex::new(sampler))),
        Err(error) => {
            tracing::warn!(%error, "memory and CPU are not measured");
            None
        }
    }
}

/// Readings for as long as there is a monitor. The first one soon, so that a short run has one.
pub(super) fn sample_for_ever(sampler: Readings, handle: Handle, mut shim: Option<Seal>) {
    let started = std::thread::Builder::new().name(String::from("sample")).stack_size(512 * 1024).spawn(move || {
        // A command that ends at once is not kept waiting for the machine to be looked at.
        std::thread::sleep(sample::EVERY / 10);
        loop {
            let (cli, works) = http::visit_blocking(&handle, |monitor, _| (monitor.pid(), monitor.works())).unwrap_or_default();
            {
                // Handed in before anybody takes another: the last one may be the end's.
                let mut sampler = lock(&sampler);
                let sample = sampler.read(cli, works);
                if !handle.visit(move |monitor, now| monitor.handle(now, Input::Sample(&sample))) {
                    return;
                }
            }
            check(&mut shim, &handle);
            std::thread::sleep(sample::EVERY);
        }
    });
    if let Err(error) = started {
        tracing::warn!(%error, "memory and CPU are not measured");
    }
}

/// Says once when the file that was started under the CLI's name is another, or gone.
fn check(shim: &mut Option<Seal>, handle: &Handle) {
    if let Some(seal) = shim.take_if(|seal| seal.is_broken()) {
        tracing::warn!(
            shim = %seal.path().display(),
            "the shim was replaced or removed: the next agent may run without the sidecar; run `agent-sidecar install` again"
        );
        handle.visit(|monitor, _| monitor.meters_mut().set(&metric::DEGRADED, &["shim"], 1.0));
    }
}

/// Who was killed for memory is known before its end is told.
pub(super) fn last_reading(sampler: &Readings, handle: &Handle, exit: Exit) {
    let mut sampler = lock(sampler);
    if sampler.oom_killed() {
        let sample = sampler.last(exit);
        handle.visit(move |monitor, now| monitor.handle(now, Input::Sample(&sample)));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
