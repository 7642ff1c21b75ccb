//! The hub's side of the journals: reads what is new in each, and takes in those whose wrappers are gone.
//!
//! ```text
//!   read to its end ─► added to the totals ─► totals written ─► journal removed
//! ```
//!
//! Killed between any two of these, the next hub does the rest: the totals name the journals that are in them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use agent_sidecar_core::hub::{Hello, Line, Registry, Stored};
use agent_sidecar_core::metric::HUB_REFUSED;

use super::journal::{ENDING, UNFINISHED};
use super::place::try_lock;

const TOTALS: &str = "totals.json";
/// Wrappers at a time. A container that has more has other worries.
const JOURNALS: usize = 2_048;
/// Of one journal in one reading. Twice what one may grow to by itself, many times over.
const READ: u64 = 16 * 1024 * 1024;
/// What is unfinished for so long is nobody's.
const ABANDONED: Duration = Duration::from_secs(60);

/// How far a journal was read.
#[derive(Debug, Default)]
struct Tail {
    inode: u64,
    at: u64,
    who: Who,
}

/// What its first line said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Who {
    #[default]
    Unread,
    Known,
    /// In the totals already.
    Folded,
    /// Of another version, or of none. Left alone: it may be somebody's who comes back.
    Foreign,
}

/// See the module's head.
pub(super) struct Shelf {
    dir: PathBuf,
    pub(super) registry: Registry,
    tails: BTreeMap<String, Tail>,
    /// Totals that are not on disk yet.
    unstored: bool,
    warned: bool,
}

impl Shelf {
    /// With what earlier hubs have kept.
    pub(super) fn open(dir: &Path, slots: usize, max_series: usize, labels: &[(String, String)]) -> Shelf {
        let path = dir.join(TOTALS);
        let stored = match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice::<Stored>(&bytes).unwrap_or_else(|error| {
                tracing::error!(path = %path.display(), %error, "the totals of ended agents cannot be read: counters start again");
                // For people to look at.
                fs::rename(&path, path.with_extension("broken")).ok();
                Stored::default()
            }),
            Err(_) => Stored::default(),
        };
        Shelf {
            dir: dir.to_owned(),
            registry: Registry::new(slots, max_series, labels, &stored),
            tails: BTreeMap::new(),
            unstored: false,
            warned: false,
        }
    }

    /// Brings the registry up to date.
    pub(super) fn scan(&mut self) {
        let runs = match self.list() {
            Ok(runs) => runs,
            Err(error) => return self.warn(&error),
        };
        // Locked until they are removed.
        let mut ended: Vec<(String, File)> = Vec::new();
        for run in &runs {
            match self.read(run) {
                Ok(Some(file)) => ended.push((run.clone(), file)),
                Ok(None) => {}
                // It was removed or replaced meanwhile: next time.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => self.warn(&error),
            }
        }
        let lost: Vec<String> = self.registry.runs().filter(|run| !runs.contains(*run)).map(str::to_owned).collect();
        for run in lost {
            self.registry.lose(&run);
            self.tails.remove(&run);
            self.unstored = true;
        }
        for (run, _) in &ended {
            if !self.registry.is_folded(run) {
                self.registry.retire(run);
                self.unstored = true;
            }
        }
        if self.unstored {
            match self.store() {
                Ok(()) => self.unstored = false,
                Err(error) => return self.warn(&error),
            }
        }
        for (run, _locked) in ended {
            // It was killed while it waited for a budget.
            fs::remove_file(self.dir.join(format!("{run}.hold"))).ok();
            if fs::remove_file(self.path(&run)).is_ok() {
                self.registry.forget(&run);
                self.tails.remove(&run);
            }
        }
    }

    fn path(&self, run: &str) -> PathBuf {
        self.dir.join(format!("{run}{ENDING}"))
    }

    fn list(&self) -> io::Result<BTreeSet<String>> {
        let mut runs = BTreeSet::new();
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            if let Some(run) = name.strip_suffix(ENDING).filter(|_| runs.len() < JOURNALS) {
                runs.insert(run.to_owned());
            } else if name.ends_with(UNFINISHED) && entry.metadata()?.modified()?.elapsed().is_ok_and(|age| age > ABANDONED) {
                fs::remove_file(entry.path()).ok();
            }
        }
        Ok(runs)
    }

    /// Reads what is new in a journal. The file, locked by us, if its wrapper is gone.
    fn read(&mut self, run: &str) -> io::Result<Option<File>> {
        let path = self.path(run);
        let flags = rustix::fs::OFlags::NOFOLLOW.bits().cast_signed();
        let mut file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(&path)?;
        let ours = try_lock(&file)?;
        let found = file.metadata()?;
        // Replaced since it was opened: its wrapper lives, and holds the lock of the new one.
        let gone = ours && fs::symlink_metadata(&path)?.ino() == found.ino();
        if ours && !gone {
            return Ok(None);
        }
        let tail = self.tails.entry(run.to_owned()).or_default();
        if tail.inode != found.ino() || found.len() < tail.at {
            *tail = Tail { inode: found.ino(), ..Tail::default() };
        }
        if found.len() > tail.at {
            file.seek(SeekFrom::Start(tail.at))?;
            let mut bytes = Vec::new();
            (&mut file).take(READ).read_to_end(&mut bytes)?;
            // A wrapper in the middle of a line has not said it yet.
            let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
            for line in bytes[..whole].split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
                take(&mut self.registry, run, tail, line);
            }
            tail.at += whole as u64;
        }
        Ok(Some(file).filter(|_| gone && tail.who != Who::Foreign))
    }

    fn store(&self) -> io::Result<()> {
        let path = self.dir.join(TOTALS);
        let new = path.with_extension("json.tmp");
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        file.write_all(&serde_json::to_vec(&self.registry.stored())?)?;
        fs::rename(&new, &path)
    }

    fn warn(&mut self, error: &io::Error) {
        if !std::mem::replace(&mut self.warned, true) {
            tracing::warn!(dir = %self.dir.display(), %error, "the hub cannot keep the totals of all agents");
        }
    }
}

fn take(registry: &mut Registry, run: &str, tail: &mut Tail, line: &[u8]) {
    match tail.who {
        Who::Unread if registry.is_folded(run) => tail.who = Who::Folded,
        Who::Unread => {
            let hello = serde_json::from_slice::<Hello>(line).ok().filter(|hello| hello.run == run);
            tail.who = if hello.is_some_and(|hello| registry.join(hello)) { Who::Known } else { Who::Foreign };
        }
        Who::Known => match serde_json::from_slice::<Line>(line) {
            Ok(line) => registry.update(run, line),
            Err(_) => registry.house_mut().add(&HUB_REFUSED, &["shape"], 1),
        },
        Who::Folded | Who::Foreign => {}
    }
}

/// The time as journals have it.
pub(super) fn unix() -> f64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}
