//! How many agents may run at once, and who is next: a list under a lock, and for each who is in it a file that it holds a lock on
//! while it lives, so that the dead give their seats and their places back.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant, SystemTime};

use agent_sidecar_core::fair::Queue;

use super::Place;
use super::place::try_lock;
use super::till::lock_named;
use crate::files;
use crate::supervise::Ears;

/// How often whoever waits looks again.
const LOOK: Duration = Duration::from_millis(50);
/// How often it looks for those that have died.
const PROBE: Duration = Duration::from_millis(500);
/// Who has not looked for so long is frozen, and the others go before it.
const FROZEN: Duration = Duration::from_secs(5);

/// Who wants a seat.
#[derive(Clone, Debug)]
pub(crate) struct Guest {
    pub(crate) run: String,
    pub(crate) tenant: String,
    /// What its tenant weighs when seats are few.
    pub(crate) weight: u64,
}

/// A seat, until it is dropped.
#[derive(Debug)]
pub(crate) struct Seat {
    dir: PathBuf,
    run: String,
    weight: u64,
    lock: File,
    /// Whose it is taken for.
    tenant: Mutex<String>,
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
    pub(crate) fn take(
        place: &Place,
        guest: &Guest,
        seats: u64,
        patience: Duration,
        ears: &Ears,
    ) -> io::Result<Result<Seat, NoSeat>> {
        let start = Instant::now();
        let path = place.dir.join(&guest.run).with_extension(ENDING);
        let file = files::open(&path, OpenOptions::new().write(true).create(true).truncate(false).mode(0o600))?;
        if !try_lock(&file)? {
            return Err(io::Error::other("somebody has our place in the line"));
        }
        // Given back when it is dropped, whether it is one yet or a place in the line.
        let tenant = Mutex::new(guest.tenant.clone());
        let seat = Seat { dir: place.dir.clone(), run: guest.run.clone(), weight: guest.weight, lock: file, tenant };
        let mut probed: Option<Instant> = None;
        loop {
            seat.lock.set_modified(SystemTime::now())?;
            let probe = probed.is_none_or(|at| at.elapsed() >= PROBE);
            if seat.ask(guest, seats, probe)? {
                return Ok(Ok(seat));
            }
            probed = if probe { Some(Instant::now()) } else { probed };
            let waited = start.elapsed();
            if waited >= patience {
                return Ok(Err(NoSeat::Full { seats, waited: patience }));
            }
            if let Some(signal) = ears.told() {
                return Ok(Err(NoSeat::Told(signal)));
            }
            std::thread::sleep(LOOK.min(patience - waited));
        }
    }

    /// The first message has told whose it is.
    pub(crate) fn works_for(&self, tenant: &str) {
        // Whoever is at it may hang with its disk.
        let Ok(mut known) = self.tenant.try_lock() else { return };
        if *known == tenant {
            return;
        }
        match change(&self.dir, |queue| queue.learn(&self.run, tenant, self.weight)) {
            Ok(()) => tenant.clone_into(&mut known),
            // Asked again with the next number that is told.
            Err(error) => tracing::debug!(%error, "whose seat this is cannot be told"),
        }
    }

    fn ask(&self, guest: &Guest, seats: u64, probe: bool) -> io::Result<bool> {
        change(&self.dir, |queue| {
            if probe {
                let gone: Vec<String> =
                    queue.runs().filter(|run| *run != self.run && self.gone(run)).map(str::to_owned).collect();
                for run in &gone {
                    fs::remove_file(self.dir.join(run).with_extension(ENDING)).ok();
                }
                queue.keep(|run| !gone.iter().any(|gone| gone == run));
            }
            queue.join(&guest.run, &guest.tenant, guest.weight);
            queue.sit(&guest.run, seats, |run| run == self.run || self.asks(run))
        })
    }

    /// Whether nobody holds its file any more.
    fn gone(&self, run: &str) -> bool {
        let file = files::open(&self.dir.join(run).with_extension(ENDING), OpenOptions::new().write(true));
        file.and_then(|file| try_lock(&file)).unwrap_or_else(|error| error.kind() == io::ErrorKind::NotFound)
    }

    /// Whether somebody in the line still looks.
    fn asks(&self, run: &str) -> bool {
        let looked = fs::metadata(self.dir.join(run).with_extension(ENDING)).and_then(|found| found.modified());
        looked.is_ok_and(|at| at.elapsed().map_or(true, |since| since < FROZEN))
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        // What cannot be given back is found by whoever looks for the dead.
        change(&self.dir, |queue| queue.leave(&self.run)).ok();
        fs::remove_file(self.dir.join(&self.run).with_extension(ENDING)).ok();
    }
}

const ENDING: &str = "seat";

fn change<T>(dir: &Path, change: impl FnOnce(&mut Queue) -> T) -> io::Result<T> {
    let _locked = lock_named(dir, "seats.lock")?;
    let path = dir.join("seats.json");
    let before = match files::read(&path) {
        Ok(bytes) => serde_json::from_slice::<Queue>(&bytes).unwrap_or_else(|error| {
            tracing::error!(path = %path.display(), %error, "who runs and who waits cannot be read: agents are counted anew");
            Queue::default()
        }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Queue::default(),
        Err(error) => return Err(error),
    };
    let before = before.checked();
    let mut queue = before.clone();
    let out = change(&mut queue);
    if queue != before {
        let new = path.with_extension("tmp");
        let mut file = files::open(&new, OpenOptions::new().write(true).create(true).truncate(true).mode(0o600))?;
        file.write_all(&serde_json::to_vec(&queue)?)?;
        fs::rename(&new, path)?;
    }
    Ok(out)
}
