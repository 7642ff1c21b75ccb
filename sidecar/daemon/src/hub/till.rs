//! Where a wrapper pays into the budgets that it shares: the book of [`agent_sidecar_core::budget`], a file under a lock.
//!
//! The lock is held for the time of one reading and one writing. Who dies with it gives it back; who is frozen with it holds up
//! nobody: the others go on with what they knew.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use agent_sidecar_core::budget::share::Sharing;
use agent_sidecar_core::budget::{Amount, Book, Caps, Claim, Purse, Standing, Witness};
use agent_sidecar_core::limit::{SHARED, Scope, Shared};
use agent_sidecar_core::monitor::Asked;

use super::journal::ENDING;
use super::place::{lock_of_dead, try_lock};
use super::zone::Zone;
use crate::{files, supervise};

/// How often others are looked at that may have died with something reserved.
const LOOK: Duration = Duration::from_secs(1);
/// How long the lock is tried for, and how often: others hold it for a fraction of a millisecond.
const PATIENCE: Duration = Duration::from_millis(500);
const AGAIN: Duration = Duration::from_millis(2);

/// Whose budgets.
#[derive(Clone, Debug)]
pub(crate) struct Payer {
    pub(crate) tenant: Option<String>,
    /// Where its days begin.
    pub(crate) zone: Zone,
    /// How large its budgets are.
    pub(crate) caps: [Caps; SHARED],
    /// How they are shared out, and what the tenant weighs then.
    pub(crate) sharing: Sharing,
    pub(crate) weight: u64,
}

/// See the module's head.
pub(super) struct Till {
    dir: PathBuf,
    run: String,
    payer: Payer,
    purse: Purse,
    looked: Option<Instant>,
    /// Our line is in the book of that number, and says that we have spent so much.
    told: Option<(u64, Amount)>,
    witness: Witness,
    /// Somebody else has changed the book, since this was last asked.
    tampered: bool,
}

/// What a wrapper has to say at the till.
pub(super) struct Errand {
    pub(super) spent: Amount,
    pub(super) asks: Option<Asked>,
    /// What an answer has cost it of late.
    pub(super) answer: Amount,
    pub(super) waits: Vec<Scope>,
    /// It has something to do.
    pub(super) works: bool,
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
        let before = read(&self.dir)?;
        let mut book = before.clone();
        let (tampered, closed) = self.witness.mend(&mut book, &self.run);
        self.tampered |= tampered;
        if let Some((number, told)) = self.told.filter(|_| closed)
            && number == book.number()
        {
            // Somebody took us for dead: what we had told is kept already, and no more than that. In a new book nothing is.
            self.purse = Purse::since(told);
        }
        self.purse.spent(errand.spent, &periods);
        if self.looked.is_none_or(|at| at.elapsed() > LOOK) {
            self.looked = Some(Instant::now());
            let gone: Vec<String> = book.runs().filter(|run| *run != self.run && self.gone(run)).map(str::to_owned).collect();
            gone.iter().for_each(|run| book.close(run));
        }
        let Errand { asks, answer, waits, works, .. } = errand;
        let Payer { caps, sharing, weight, ref tenant, .. } = self.payer;
        let claim = Claim {
            tenant: tenant.as_deref(),
            asks: asks.map(|asked| asked.each),
            answer: *answer,
            answers: asks.map_or(0, |asked| asked.answers),
            request: asks.map_or(0, |asked| asked.request),
            waits,
            caps,
            sharing,
            weight,
            works: *works,
            now: unix,
        };
        let shared = book.write(&self.run, &self.purse, &claim, &periods);
        if book != before {
            store(&self.dir, &book)?;
        }
        self.witness.remember(&book, &self.run);
        self.told = Some((book.number(), errand.spent));
        Ok(shared)
    }

    /// Whether somebody else has changed the book since this was last asked. What we know of it was put back.
    pub(super) fn tampered(&mut self) -> bool {
        std::mem::take(&mut self.tampered)
    }

    /// The last of it: nothing is reserved any more.
    pub(super) fn close(&mut self, unix: Duration, spent: Amount, answer: Amount) -> io::Result<()> {
        self.settle(unix, &Errand { spent, asks: None, answer, waits: Vec::new(), works: false })?;
        let _locked = lock(&self.dir)?;
        let mut book = read(&self.dir)?;
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
    let mut book = read(dir)?;
    let raised = book.raise(scope, tenant, caps, &zone.periods(unix));
    store(dir, &book)?;
    Ok(raised)
}

/// How all budgets stand.
pub(super) fn standings(dir: &Path, zone: &Zone, unix: Duration) -> io::Result<Vec<Standing>> {
    let _locked = lock(dir)?;
    Ok(read(dir)?.standings(&zone.periods(unix), unix))
}

fn path(dir: &Path) -> PathBuf {
    dir.join("budgets.json")
}

fn lock(dir: &Path) -> io::Result<File> {
    lock_named(dir, "budgets.lock")
}

/// A lock that is held for moments.
pub(crate) fn lock_named(dir: &Path, name: &str) -> io::Result<File> {
    lock_within(PATIENCE, dir, name)
}

/// The same, for who would rather wait.
pub(crate) fn lock_within(patience: Duration, dir: &Path, name: &str) -> io::Result<File> {
    let path = dir.join(name);
    let file = files::open(&path, OpenOptions::new().write(true).create(true).truncate(false).mode(0o600))?;
    let until = Instant::now() + patience;
    loop {
        if try_lock(&file)? {
            return Ok(file);
        }
        if Instant::now() > until {
            break;
        }
        std::thread::sleep(AGAIN);
    }
    Err(io::Error::new(io::ErrorKind::WouldBlock, format!("somebody does not let go of {name}")))
}

/// The book. One that is there and cannot be read at the moment is not begun anew; one that makes no sense is put aside.
fn read(dir: &Path) -> io::Result<Book> {
    let path = path(dir);
    let bytes = match files::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(new_book()),
        Err(error) => return Err(error),
    };
    let why = match serde_json::from_slice::<Book>(&bytes) {
        Ok(book) if book.is_current() => return Ok(book),
        Ok(_) => String::from("it was written by another version"),
        Err(error) => error.to_string(),
    };
    let path = path.display();
    tracing::error!(%path, %why, "what was spent from shared budgets cannot be read: but for what runs now, they start again");
    // For people to look at.
    fs::rename(self::path(dir), self::path(dir).with_extension("broken")).ok();
    Ok(new_book())
}

fn new_book() -> Book {
    Book::begun(supervise::random())
}

fn store(dir: &Path, book: &Book) -> io::Result<()> {
    let new = path(dir).with_extension("tmp");
    let mut file = files::open(&new, OpenOptions::new().write(true).create(true).truncate(true).mode(0o600))?;
    file.write_all(&serde_json::to_vec(book)?)?;
    fs::rename(&new, path(dir))
}

#[cfg(test)]
mod tests {
    use agent_sidecar_core::tokens::Usd;

    use super::*;

    const NOW: Duration = Duration::from_secs(1_795_392_000);

    fn till(dir: &Path, run: &str) -> Till {
        let payer = Payer {
            tenant: None,
            zone: Zone::default(),
            caps: [Caps { usd: Some(Usd::from_f64(9.0)), tokens: None }; SHARED],
            sharing: Sharing::default(),
            weight: 1,
        };
        Till::new(dir, run, payer)
    }

    fn errand(usd: f64) -> Errand {
        Errand { spent: Amount::new(Usd::from_f64(usd), 7), asks: None, answer: Amount::NONE, waits: Vec::new(), works: true }
    }

    /// What all have spent, ever.
    fn spent(shared: &[Option<Shared>; SHARED]) -> f64 {
        shared[0].unwrap().spent.usd.to_f64()
    }

    struct Dir(PathBuf);

    impl Drop for Dir {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).ok();
        }
    }

    fn dir(name: &str) -> Dir {
        let dir = std::env::temp_dir().join(format!("agent-sidecar-till-{name}-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        Dir(dir)
    }

    #[test]
    fn a_book_that_breaks_off_anywhere_is_put_aside_and_who_runs_is_in_the_next() {
        let dir = dir("torn");
        let (mut one, mut other) = (till(&dir.0, "one"), till(&dir.0, "other"));
        // The other lives.
        let journal = File::create(dir.0.join(format!("other{ENDING}"))).unwrap();
        assert!(try_lock(&journal).unwrap());
        other.settle(NOW, &errand(2.0)).unwrap();
        till(&dir.0, "dead").settle(NOW, &errand(0.5)).unwrap();
        one.settle(NOW, &errand(1.0)).unwrap();
        let whole = fs::read(path(&dir.0)).unwrap();
        for n in 0..whole.len() {
            let broken = path(&dir.0).with_extension("broken");
            fs::remove_file(&broken).ok();
            fs::write(path(&dir.0), &whole[..n]).unwrap();
            // Of the dead it remembers what they have spent.
            assert!((spent(&one.settle(NOW, &errand(1.0)).unwrap()) - 1.5).abs() < 1e-9, "after {n} bytes");
            assert_eq!(fs::read(&broken).unwrap(), &whole[..n]);
            serde_json::from_slice::<Book>(&fs::read(path(&dir.0)).unwrap()).unwrap();
        }
        // Nobody has the other's account: all of it is told again.
        assert!((spent(&other.settle(NOW, &errand(2.0)).unwrap()) - 3.5).abs() < 1e-9);
    }

    #[test]
    fn who_is_killed_while_it_writes_leaves_the_book_as_it_was() {
        let dir = dir("killed");
        let (mut one, mut next) = (till(&dir.0, "one"), till(&dir.0, "next"));
        one.settle(NOW, &errand(1.0)).unwrap();
        let whole = fs::read(path(&dir.0)).unwrap();
        for n in 0..whole.len() {
            fs::write(path(&dir.0).with_extension("tmp"), &whole[..n]).unwrap();
            assert!((spent(&next.settle(NOW, &errand(0.5)).unwrap()) - 1.5).abs() < 1e-9, "after {n} bytes");
        }
        assert!(!path(&dir.0).with_extension("broken").exists());
    }

    #[test]
    fn a_book_of_another_version_is_put_aside_and_one_that_cannot_be_read_now_stays() {
        let dir = dir("version");
        let mut one = till(&dir.0, "one");
        one.settle(NOW, &errand(1.0)).unwrap();
        let old = fs::read_to_string(path(&dir.0)).unwrap().replacen(":2,", ":1,", 1);
        fs::write(path(&dir.0), &old).unwrap();
        one.settle(NOW, &errand(1.0)).unwrap();
        assert_eq!(fs::read_to_string(path(&dir.0).with_extension("broken")).unwrap(), old);
        // As on a disk with an error.
        fs::remove_file(path(&dir.0)).unwrap();
        fs::create_dir(path(&dir.0)).unwrap();
        one.settle(NOW, &errand(1.0)).unwrap_err();
        assert!(path(&dir.0).is_dir());
    }
}
