//! How many agents may run at once: one file for each, locked by whoever has the seat, so that the dead give theirs back.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use super::Place;
use super::place::try_lock;
use crate::files;
use crate::supervise::{HUP, INT, TERM};

/// How often whoever waits looks again.
const LOOK: Duration = Duration::from_millis(50);

/// A seat, until it is dropped.
#[derive(Debug)]
pub(crate) struct Seat {
    _locked: File,
}

/// Why there is no seat.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NoSeat {
    #[error("as many agents as may run at once ({seats}) run already, and none has ended within {waited:?}")]
    Full { seats: u64, waited: Duration },
    #[error("signal {0} while this one waited for another agent's end")]
    Told(i32),
}

impl Seat {
    /// Waits for one of so many seats; no longer than that.
    ///
    /// # Errors
    /// The outer one if the seats cannot be looked at, the inner one if all stay taken.
    pub(crate) fn take(place: &Place, seats: u64, patience: Duration) -> io::Result<Result<Seat, NoSeat>> {
        let start = Instant::now();
        // PID 1 hears none that it does not ask for.
        let mut told = if patience.is_zero() { None } else { Some(signal_hook::iterator::Signals::new([HUP, INT, TERM])?) };
        loop {
            for seat in 0..seats {
                let path = place.dir.join(format!("seat{seat}"));
                let file = files::open(&path, OpenOptions::new().write(true).create(true).truncate(false).mode(0o600))?;
                if try_lock(&file)? {
                    return Ok(Ok(Seat { _locked: file }));
                }
            }
            let waited = start.elapsed();
            if waited >= patience {
                return Ok(Err(NoSeat::Full { seats, waited: patience }));
            }
            if let Some(signal) = told.as_mut().and_then(|told| told.pending().next()) {
                return Ok(Err(NoSeat::Told(signal)));
            }
            std::thread::sleep(LOOK.min(patience - waited));
        }
    }
}
