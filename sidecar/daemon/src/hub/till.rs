//! Where a wrapper pays into the budgets that it shares: the book of [`agent_sidecar_core::budget`], a file under a lock.
//!
//! The lock is held for the time of one reading and one writing. Who dies with it gives it back; who is frozen with it holds up
//! nobody: the others go on with what they knew.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use agent_sidecar_core::budget::{Amount, Book, Caps, Claim, Purse, Standing, Witness};
use agent_sidecar_core::limit::{SHARED, Scope, Shared};

use super::journal::ENDING;
use super::place::{lock_of_dead, try_lock};
use super::zone::Zone;
use crate::files;

/// How often others are looked at that may have died with something reserved.
const LOOK: Duration = Duration::from_secs(1);
/// How long the lock is tried for, and how often: others hold it for a fraction of a millisecond.
const TRIES: u32 = 250;
const AGAIN: Duration = Duration::from_millis(2);

/// Whose budgets.
#[derive(Clone, Debug)]
pub(crate) struct Payer {
    pub(crate) tenant: Option<String>,
    /// Where its days begin.
    pub(crate) zone: Zone,
    /// How large its budgets are.
    pub(crate) caps: [Caps; SHARED],
}

/// See the module's head.
pub(super) struct Till {
    dir: PathBuf,
    run: String,
    payer: Payer,
    purse: Purse,
    looked: Option<Instant>,
    /// Our line is in the book, and says that we have spent so much.
    told: Option<Amount>,
    witness: Witness,
    /// Somebody else has changed the book, since this was last asked.
    tampered: bool,
}

/// What a wrapper has to say at the till.
pub(super) struct Errand {
    pub(super) spent: Amount,
    pub(super) asks: Option<Amount>,
    pub(super) waits: Vec<Scope>,
}

impl Till {
    pub(super) fn new(dir: &Path, run: &str, payer: Payer) -> Till {
        Till {
            dir: dir.to_owned(),
            run: run.to_owned(),
            payer,
            purse: Purse::default(),
            looked: None,
            told: None,
            witness: Witness::default(),
            tampered: false,
        }
    }

    /// What is spent is paid by this one.
    pub(super) fn works_for(&mut self, tenant: Option<String>) {
        self.payer.tenant = tenant;
    }

    /// Writes what was spent and what is asked for; what is spoken for by then.
    pub(super) fn settle(&mut self, unix: Duration, errand: &Errand) -> io::Result<[Option<Shared>; SHARED]> {
        let periods = self.payer.zone.periods(unix);
        let _locked = lock(&self.dir)?;
        let before = read(&self.dir);
        let mut book = before.clone();
        let (tampered, closed) = self.witness.mend(&mut book, &self.run);
        self.tampered |= tampered;
        if let Some(told) = self.told.filter(|_| closed) {
            // Somebody took us for dead: what we had told is kept already, and no more than that.
            self.purse = Purse::since(told);
        }
        self.purse.spent(errand.spent, &periods);
        if self.looked.is_none_or(|at| at.elapsed() > LOOK) {
            self.looked = Some(Instant::now());
            let gone: Vec<String> = book.runs().filter(|run| *run != self.run && self.gone(run)).map(str::to_owned).collect();
            gone.iter().for_each(|run| book.close(run));
        }
        let Errand { asks, waits, .. } = errand;
        let claim = Claim { tenant: self.payer.tenant.as_deref(), asks: *asks, waits, caps: self.payer.caps };
        let shared = book.write(&self.run, &self.purse, &claim, &periods);
        if book != before {
            store(&self.dir, &book)?;
        }
        self.witness.remember(&book, &self.run);
        self.told = Some(errand.spent);
        Ok(shared)
    }

    /// Whether somebody else has changed the book since this was last asked. What we know of it was put back.
    pub(super) fn tampered(&mut self) -> bool {
        std::mem::take(&mut self.tampered)
    }

    /// The last of it: nothing is reserved any more.
    pub(super) fn close(&mut self, unix: Duration, spent: Amount) -> io::Result<()> {
        self.settle(unix, &Errand { spent, asks: None, waits: Vec::new() })?;
        let _locked = lock(&self.dir)?;
        let mut book = read(&self.dir);
        book.close(&self.run);
        store(&self.dir, &book)
    }

    /// Whether a wrapper is no more: its journal is taken in, or nobody holds it.
    fn gone(&self, run: &str) -> bool {
        let path = self.dir.join(format!("{run}{ENDING}"));
        let file = files::open(&path, OpenOptions::new().write(true));
        file.and_then(|file| lock_of_dead(&path, &file)).unwrap_or_else(|error| error.kind() == io::ErrorKind::NotFound)
    }
}

/// Makes a budget larger than whoever started the agents has said. False if there is no room for one more that was raised.
pub(super) fn raise(dir: &Path, zone: &Zone, unix: Duration, scope: Scope, tenant: Option<&str>, caps: Caps) -> io::Result<bool> {
    let _locked = lock(dir)?;
    let mut book = read(dir);
    let raised = book.raise(scope, tenant, caps, &zone.periods(unix));
    store(dir, &book)?;
    Ok(raised)
}

/// How all budgets stand.
pub(super) fn standings(dir: &Path, zone: &Zone, unix: Duration) -> io::Result<Vec<Standing>> {
    let _locked = lock(dir)?;
    Ok(read(dir).standings(&zone.periods(unix)))
}

fn path(dir: &Path) -> PathBuf {
    dir.join("budgets.json")
}

fn lock(dir: &Path) -> io::Result<File> {
    lock_named(dir, "budgets.lock")
}

/// A lock that is held for moments.
pub(crate) fn lock_named(dir: &Path, name: &str) -> io::Result<File> {
    let path = dir.join(name);
    let file = files::open(&path, OpenOptions::new().write(true).create(true).truncate(false).mode(0o600))?;
    for _ in 0..TRIES {
        if try_lock(&file)? {
            return Ok(file);
        }
        std::thread::sleep(AGAIN);
    }
    Err(io::Error::new(io::ErrorKind::WouldBlock, format!("somebody does not let go of {name}")))
}

fn read(dir: &Path) -> Book {
    let path = path(dir);
    let Ok(bytes) = files::read(&path) else { return Book::default().checked() };
    match serde_json::from_slice::<Book>(&bytes) {
        Ok(book) => book.checked(),
        Err(error) => {
            tracing::error!(path = %path.display(), %error, "what was spent from shared budgets cannot be read: they start again");
            // For people to look at.
            fs::rename(&path, path.with_extension("broken")).ok();
            Book::default().checked()
        }
    }
}

fn store(dir: &Path, book: &Book) -> io::Result<()> {
    let new = path(dir).with_extension("tmp");
    let mut file = files::open(&new, OpenOptions::new().write(true).create(true).truncate(true).mode(0o600))?;
    file.write_all(&serde_json::to_vec(book)?)?;
    fs::rename(&new, path(dir))
}
