//! What is kept of machines, since nobody else does: a directory for each, in one that is ours alone.
//!
//! ```text
//! DIRECTORY/taps            locked while a network is chosen
//! DIRECTORY/KEY/            locked while the machine is changed
//!           spec.json       whose it is and what it has, without environment and secrets
//!           process.json    the Firecracker that it runs in, as it was begun
//!           started         it was told to start: what it was to do is not begun a second time
//!           falling-asleep  it is being put away
//!           asleep          it was put away, and as what
//!           console         what it printed
//!           files/          Firecracker's own (with the jailer: in its directory)
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use rustix::fs::{FlockOperation, flock};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::process::Process;
use crate::provider::Size;

/// Whoever is at it is done by then: memory of many GiB is written to a disk, or the longest grace waited for.
const LOCK_MOST: Duration = Duration::from_secs(660);
/// A console that is longer is cut to its end. Firecracker writes on behind.
const CONSOLE_MOST: u64 = 16 << 20;
const CONSOLE_KEPT: u64 = 4 << 20;

/// A machine, as it was made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) key: String,
    pub(super) image: String,
    pub(super) size: Size,
    pub(super) labels: BTreeMap<String, String>,
    pub(super) created: Timestamp,
    /// Which of the networks it has.
    pub(super) tap: u32,
}

/// What a machine's memory was put away as.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Asleep {
    pub(super) memory: String,
    pub(super) state: String,
}

#[derive(Clone, Debug)]
pub(super) struct Home(PathBuf);

/// While it is held nobody else changes what it is about.
#[derive(Debug)]
pub(super) struct Lock {
    _file: File,
}

impl Home {
    pub(super) fn new(directory: &Path) -> Self {
        Self(directory.to_owned())
    }

    pub(super) fn of(&self, key: &str) -> Machine {
        Machine(self.0.join(key))
    }

    /// All that have a record, by key: it, or why it cannot be read.
    pub(super) fn all(&self) -> io::Result<BTreeMap<String, io::Result<Record>>> {
        let entries = match fs::read_dir(&self.0) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
            entries => entries?,
        };
        let mut all = BTreeMap::new();
        for entry in entries {
            let Ok(key) = entry?.file_name().into_string() else { continue };
            if super::is_key(&key)
                && let Some(record) = self.of(&key).record().transpose()
            {
                all.insert(key, record);
            }
        }
        Ok(all)
    }

    /// A machine's directory, made if it is not there, and ours until the lock is dropped.
    pub(super) async fn make(&self, key: &str) -> io::Result<Lock> {
        fs::create_dir_all(&self.0)?;
        loop {
            let machine = self.of(key);
            match private(&machine.0) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => {}
            }
            if let Some(lock) = machine.lock().await? {
                return Ok(lock);
            }
        }
    }

    /// Writes the record with a network that no other machine has. `None`: all are taken.
    pub(super) async fn enter(&self, record: impl FnOnce(u32) -> Record, taps: u32) -> io::Result<Option<Record>> {
        let file = OpenOptions::new().create(true).append(true).mode(0o600).open(self.0.join("taps"))?;
        let _lock = held(file).await?;
        // Whose record cannot be read has a network, too: as long as nobody can say which, none is free.
        let taken: BTreeSet<u32> = self.all()?.into_values().map(|record| Ok(record?.tap)).collect::<io::Result<_>>()?;
        let Some(free) = (0..taps).find(|tap| !taken.contains(tap)) else { return Ok(None) };
        let record = record(free);
        self.of(&record.key).write("spec.json", &record)?;
        Ok(Some(record))
    }
}

/// One machine's directory.
#[derive(Clone, Debug)]
pub(super) struct Machine(PathBuf);

impl Machine {
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    pub(super) fn record(&self) -> io::Result<Option<Record>> {
        self.read("spec.json")
    }

    pub(super) fn process(&self) -> io::Result<Option<Process>> {
        Ok(self.read::<Process>("process.json")?.filter(Process::lives))
    }

    pub(super) fn asleep(&self) -> io::Result<Option<Asleep>> {
        self.read("asleep")
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.path(name).exists()
    }

    /// All of it or nothing, and for nobody else.
    pub(super) fn write(&self, name: &str, content: &impl Serialize) -> io::Result<()> {
        let new = self.path(&format!("{name}.new"));
        let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&new)?;
        file.write_all(&serde_json::to_vec(content)?)?;
        file.sync_all()?;
        fs::rename(new, self.path(name))
    }

    pub(super) fn remove(&self, name: &str) -> io::Result<()> {
        absent(fs::remove_file(self.path(name)))
    }

    fn read<T: DeserializeOwned>(&self, name: &str) -> io::Result<Option<T>> {
        match fs::read(self.path(name)) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map(Some)
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, format!("{}: {error}", self.path(name).display()))),
            // In the place of a directory there may be a file of somebody's.
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// `None`: it is not there (any more).
    pub(super) async fn lock(&self) -> io::Result<Option<Lock>> {
        let file = match File::open(&self.0) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            file => file?,
        };
        let inode = file.metadata()?.ino();
        let lock = held(file).await?;
        // Whoever had it may have removed what was locked.
        Ok(fs::metadata(&self.0).ok().filter(|now| now.ino() == inode).map(|_| lock))
    }

    /// `None`: it is not there, or somebody is at it.
    pub(super) fn lock_now(&self) -> io::Result<Option<Lock>> {
        let file = match File::open(&self.0) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            file => file?,
        };
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(Lock { _file: file })),
            Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// With a new console, behind which what was there before is lost.
    pub(super) fn console(&self) -> io::Result<File> {
        OpenOptions::new().create(true).append(true).mode(0o600).open(self.path("console"))
    }

    /// The console's last bytes.
    pub(super) fn printed(&self, most: usize) -> io::Result<Vec<u8>> {
        let mut file = match File::open(self.path("console")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            file => file?,
        };
        let (length, most) = (file.metadata()?.len(), most as u64);
        file.seek(SeekFrom::Start(length.saturating_sub(most)))?;
        let mut last = Vec::new();
        file.take(most).read_to_end(&mut last)?;
        Ok(last)
    }

    /// What a machine prints is bounded by nothing but this. What it prints in the meantime is lost.
    pub(super) fn trim(&self) -> io::Result<()> {
        let path = self.path("console");
        if fs::metadata(&path)?.len() > CONSOLE_MOST {
            let last = self.printed(CONSOLE_KEPT as usize)?;
            let mut file = OpenOptions::new().append(true).open(path)?;
            file.set_len(0)?;
            file.write_all(&last)?;
        }
        Ok(())
    }

    /// Whose it is goes last: until then it is found, and can be removed again.
    pub(super) fn empty(&self) -> io::Result<()> {
        for entry in fs::read_dir(&self.0)? {
            let entry = entry?;
            match entry.file_type()?.is_dir() {
                true => fs::remove_dir_all(entry.path())?,
                false if entry.file_name() == "spec.json" => {}
                false => fs::remove_file(entry.path())?,
            }
        }
        self.remove("spec.json")
    }

    pub(super) fn clear(&self) -> io::Result<()> {
        absent(fs::remove_dir(&self.0))
    }
}

/// For nobody else.
pub(super) fn private(path: &Path) -> io::Result<()> {
    DirBuilder::new().mode(0o700).create(path)
}

/// It is no mistake if it is not there.
pub(super) fn absent(done: io::Result<()>) -> io::Result<()> {
    match done {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

async fn held(file: File) -> io::Result<Lock> {
    let began = Instant::now();
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(Lock { _file: file }),
            Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) if began.elapsed() < LOCK_MOST => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(io::Error::other("somebody else is at it, and does not end")),
            Err(error) => return Err(error.into()),
        }
    }
}
