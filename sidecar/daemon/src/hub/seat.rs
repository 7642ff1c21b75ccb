//! How many agents may run at once: one file for each, locked by whoever has the seat, so that the dead give theirs back.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use super::Place;
use super::place::try_lock;

/// How often whoever waits looks again.
const LOOK: Duration = Duration::from_millis(50);

/// A seat, until it is dropped.
#[derive(Debug)]
pub(crate) struct Seat {
    _locked: File,
}

/// Nobody has left within this time.
#[derive(Debug, thiserror::Error)]
#[error("as many agents as may run at once ({seats}) run already, and none has ended within {waited:?}")]
pub(crate) struct Full {
    seats: u64,
    waited: Duration,
}

impl Seat {
    /// Waits for one of so many seats; no longer than that.
    ///
    /// # Errors
    /// The outer one if the seats cannot be looked at, the inner one if all stay taken.
    pub(crate) fn take(place: &Place, seats: u64, patience: Duration) -> io::Result<Result<Seat, Full>> {
        let start = Instant::now();
        loop {
            for seat in 0..seats {
                let path = place.dir.join(format!("seat{seat}"));
                let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path)?;
                if try_lock(&file)? {
                    return Ok(Ok(Seat { _locked: file }));
                }
            }
            let waited = start.elapsed();
            if waited >= patience {
                return Ok(Err(Full { seats, waited: patience }));
            }
            std::thread::sleep(LOOK.min(patience - waited));
        }
    }
}
