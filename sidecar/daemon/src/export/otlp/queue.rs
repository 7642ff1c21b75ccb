//! What waits to be sent: one file for each batch, so that it outlives us, and memory where there is no disk.
//!
//! ```text
//! <queue_dir>/                            shared by every wrapper of the container
//!   <destination>-<pid>-<nonce>/          one for each process, locked while it lives
//!     lock
//!     <created>-<nonce>-<n>-<items>.traces
//!     will.traces                         what is to be sent if its process ends without another word
//!   corrupt/                              set aside, for whoever wants to know
//!   turns/                                not the queue's: see [`super::turns`]
//! ```
//!
//! A batch is written before it is sent and removed when the collector has answered: it is sent at least once. There is no
//! fsync: the page cache outlives `kill -9`, and a power failure takes the container with it. Whoever finds a directory
//! whose lock is free takes over what it holds, if it is meant for the same collector: nobody's data goes to somebody else's.

use std::collections::VecDeque;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hyper::body::Bytes;

use super::Signal;
use super::count::{Cause, Counts};
use crate::files;

/// Batches in memory where the disk does not take them, and such as come while it is waited for.
pub(super) const MEMORY_BYTES: u64 = 8 << 20;
/// Batches at most: each costs an inode, and us fifty bytes.
pub(super) const BATCHES: usize = 16_384;
/// Corrupt files that are kept; the next ones are only counted.
const SET_ASIDE: usize = 16;

const MAGIC: &[u8; 4] = b"AOQ1";
/// Magic, signal, three zeros, created, items, length, checksum.
const HEADER: usize = 28;

/// How much may wait.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    pub(super) disk: u64,
    pub(super) memory: u64,
    pub(super) batches: usize,
}

/// What waits of one signal in one place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Total {
    pub(super) items: u64,
    bytes: u64,
}

const DISK: usize = 0;
const MEMORY: usize = 1;

/// Names a batch for as long as it waits; sorts by age.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Id {
    created: u64,
    nonce: u64,
    n: u64,
}

#[derive(Debug)]
struct Entry {
    id: Id,
    items: u32,
    bytes: u64,
    /// `None` is on disk.
    memory: Option<Bytes>,
}

impl Entry {
    fn place(&self) -> usize {
        if self.memory.is_some() { MEMORY } else { DISK }
    }
}

/// The oldest batch of a signal, on its way.
#[derive(Clone, Debug)]
pub(super) struct Batch {
    pub(super) id: Id,
    pub(super) items: u32,
    pub(super) payload: Bytes,
}

/// The directory that is ours while we hold the lock in it.
#[derive(Debug)]
struct Own {
    dir: PathBuf,
    _lock: File,
}

#[derive(Debug)]
pub(super) struct Queue {
    /// Where to keep what waits; `None` is memory alone.
    root: Option<PathBuf>,
    own: Option<Own>,
    destination: u64,
    nonce: u64,
    n: u64,
    bounds: Bounds,
    waiting: [VecDeque<Entry>; 3],
    /// By signal, then by place.
    totals: [[Total; 2]; 3],
    /// Being sent right now: never the one to be dropped.
    in_flight: [Option<Id>; 3],
    /// It has been said that something was dropped.
    said_full: bool,
    counts: Arc<Counts>,
}

impl Queue {
    /// `destination` tells collectors apart. What dead processes left for it is adopted.
    pub(super) fn open(root: Option<PathBuf>, destination: u64, bounds: Bounds, counts: Arc<Counts>) -> Queue {
        let nonce = crate::supervise::random();
        let mut queue = Queue {
            root,
            own: None,
            destination,
            nonce,
            n: 0,
            bounds,
            waiting: Default::default(),
            totals: Default::default(),
            in_flight: [None; 3],
            said_full: false,
            counts,
        };
        queue.visit();
        queue
    }

    /// Takes over what was left since, and tries the disk again if it failed.
    pub(super) fn visit(&mut self) {
        let Some(root) = self.root.clone() else {
            return self.degraded(&io::Error::other("no directory is named, and neither $XDG_STATE_HOME nor $HOME names one"));
        };
        if let Err(error) = self.take_place(&root).and_then(|()| self.adopt(&root)).and_then(|()| self.settle()) {
            self.degraded(&error);
        }
        self.counted();
    }

    pub(super) fn put(&mut self, signal: Signal, items: u32, payload: Bytes, unix_ns: u64) {
        let bytes = (payload.len() + HEADER) as u64;
        let newest = self.waiting[signal as usize].back().map_or(0, |entry| entry.id.created);
        self.n += 1;
        // A clock that is set back changes no order.
        let id = Id { created: unix_ns.max(newest), nonce: self.nonce, n: self.n };
        let room = if self.own.is_some() { self.bounds.disk } else { self.bounds.memory };
        if bytes > room {
            self.full();
            return self.counts.lose(signal, Cause::TooLarge, u64::from(items));
        }
        let written = self.own.as_ref().map(|own| write(&own.dir, signal, id, items, &payload));
        let memory = match written {
            Some(Ok(())) => {
                self.healthy();
                None
            }
            Some(Err(error)) => {
                self.degraded(&error);
                if error.kind() == io::ErrorKind::NotFound {
                    // Somebody has cleared the directory away; the next visit makes another.
                    self.own = None;
                }
                Some(payload)
            }
            None => Some(payload),
        };
        self.push(signal, Entry { id, items, bytes, memory });
        self.make_room();
        self.counted();
    }

    /// Keeps what is to be sent in our name if we end without another word, instead of what it was before; empty is nothing. On disk
    /// alone: memory dies with us.
    pub(super) fn will(&self, signal: Signal, items: u32, payload: &[u8], unix_ns: u64) {
        let Some(Own { dir, .. }) = &self.own else { return };
        let path = dir.join(will(signal));
        let id = Id { created: unix_ns, nonce: self.nonce, n: 0 };
        let written = if payload.is_empty() { fs::remove_file(&path) } else { write_to(&path, signal, id, items, payload) };
        if let Err(error) = written
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::debug!(%error, "what is under way cannot be kept on disk");
        }
    }

    /// The oldest batch of a signal, from now on in flight until one of the next three is called.
    ///
    /// # Errors
    /// When it cannot be read now, and may be later.
    pub(super) fn head(&mut self, signal: Signal) -> io::Result<Option<Batch>> {
        while let Some(entry) = self.waiting[signal as usize].front() {
            let (id, items) = (entry.id, entry.items);
            let payload = match (&entry.memory, &self.own) {
                (Some(payload), _) => Ok(payload.clone()),
                (None, Some(own)) => read(&own.dir.join(name(signal, id, items)), signal, id, items),
                (None, None) => Err(io::ErrorKind::NotFound.into()),
            };
            match payload {
                Ok(payload) => {
                    self.in_flight[signal as usize] = Some(id);
                    return Ok(Some(Batch { id, items, payload }));
                }
                Err(error) if matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::NotFound) => {
                    tracing::warn!(signal = signal.as_str(), items, %error, "a batch that waited on disk is not as it was written");
                    self.counts.lose(signal, Cause::Corrupt, u64::from(items));
                    self.set_aside(signal, id, items);
                    self.remove(signal, 0);
                    self.counted();
                }
                // Out of descriptors, or a disk that fails for a moment.
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// The collector has answered for good.
    pub(super) fn done(&mut self, signal: Signal, id: Id) {
        self.in_flight[signal as usize] = None;
        if let Some(at) = self.place_of(signal, id) {
            self.remove(signal, at);
        }
        self.counted();
    }

    /// It has to be sent again.
    pub(super) fn failed(&mut self, signal: Signal) {
        self.in_flight[signal as usize] = None;
    }

    /// It has to be sent again, the others first.
    pub(super) fn postpone(&mut self, signal: Signal, id: Id) {
        self.in_flight[signal as usize] = None;
        if let Some(at) = self.place_of(signal, id)
            && let Some(entry) = self.waiting[signal as usize].remove(at)
        {
            self.waiting[signal as usize].push_back(entry);
        }
    }

    fn place_of(&self, signal: Signal, id: Id) -> Option<usize> {
        self.waiting[signal as usize].iter().position(|entry| entry.id == id)
    }

    /// Items on disk, and items in memory.
    pub(super) fn items(&self) -> [(u64, u64); 3] {
        self.totals.map(|[disk, memory]| (disk.items, memory.items))
    }

    /// Leaves no directory behind if nothing waits in it. What is in memory alone ends here.
    pub(super) fn close(&mut self) {
        for signal in Signal::ALL {
            self.counts.lose(signal, Cause::Closed, self.totals[signal as usize][MEMORY].items);
        }
        if let Some(Own { dir, .. }) = &self.own {
            for signal in Signal::ALL {
                // All of it was said.
                drop(fs::remove_file(dir.join(will(signal))));
            }
            clear_away(dir);
        }
    }

    // ---- the bounds

    /// Drops the oldest of the signal that takes most of the room: a flood of spans must not push out the metrics.
    fn make_room(&mut self) {
        for (place, max, cause) in [(DISK, self.bounds.disk, Cause::QueueFull), (MEMORY, self.bounds.memory, Cause::MemoryFull)] {
            loop {
                let used = self.totals.map(|totals| totals[place].bytes);
                let batches = self.waiting.iter().map(VecDeque::len).sum::<usize>();
                if used.iter().sum::<u64>() <= max && batches <= self.bounds.batches {
                    break;
                }
                let victims = Signal::ALL.into_iter().filter_map(|signal| {
                    let spared = self.in_flight[signal as usize];
                    let mut oldest = self.waiting[signal as usize].iter();
                    let at = oldest.position(|entry| entry.place() == place && Some(entry.id) != spared)?;
                    Some((used[signal as usize], signal, at))
                });
                let Some((_, signal, at)) = victims.max() else { break };
                let items = self.waiting[signal as usize][at].items;
                self.full();
                self.counts.lose(signal, cause, u64::from(items));
                self.remove(signal, at);
            }
        }
    }

    /// Said once: the metrics have the numbers.
    fn full(&mut self) {
        if !std::mem::replace(&mut self.said_full, true) {
            let (max, dir) = (self.bounds.disk, self.root.as_deref().unwrap_or(Path::new("")).display());
            tracing::warn!(%dir, max, "what waits for the collector has no room: the oldest is dropped; see --otlp-queue-max");
        }
    }

    fn push(&mut self, signal: Signal, entry: Entry) {
        let total = &mut self.totals[signal as usize][entry.place()];
        total.items += u64::from(entry.items);
        total.bytes += entry.bytes;
        self.waiting[signal as usize].push_back(entry);
    }

    fn remove(&mut self, signal: Signal, at: usize) {
        let Some(entry) = self.waiting[signal as usize].remove(at) else { return };
        let total = &mut self.totals[signal as usize][entry.place()];
        total.items -= u64::from(entry.items);
        total.bytes -= entry.bytes;
        if let (None, Some(Own { dir, .. })) = (&entry.memory, &self.own) {
            // Gone already, or on a disk that fails: it would be sent twice, not lost.
            drop(fs::remove_file(dir.join(name(signal, entry.id, entry.items))));
        }
    }

    fn counted(&self) {
        let items = self.items().map(|(disk, memory)| disk + memory);
        let bytes = self.totals.iter().flatten().map(|total| total.bytes).sum();
        let capacity = if self.own.is_some() { self.bounds.disk } else { self.bounds.memory };
        self.counts.queue(items, bytes, capacity);
    }

    fn degraded(&self, error: &io::Error) {
        if self.counts.degrade(true) {
            let dir = self.root.as_deref().unwrap_or(Path::new("")).display();
            tracing::warn!(%dir, %error, "what waits for the collector is kept in memory alone; choose another --otlp-queue-dir");
        }
    }

    fn healthy(&self) {
        if self.counts.degrade(false) {
            tracing::info!("what waits for the collector is kept on disk again");
        }
    }

    // ---- the directory

    /// Makes our own directory and locks it, if we have none.
    fn take_place(&mut self, root: &Path) -> io::Result<()> {
        if self.own.is_some() {
            return Ok(());
        }
        DirBuilder::new().mode(0o700).recursive(true).create(root)?;
        // Between its making and its locking somebody may take it for a dead one's and clear it away.
        for _ in 0..8 {
            let dir = root.join(format!("{:016x}-{}-{:016x}", self.destination, std::process::id(), crate::supervise::random()));
            DirBuilder::new().mode(0o700).create(&dir)?;
            if let Ok(Some(lock)) = lock(&dir) {
                self.own = Some(Own { dir, _lock: lock });
                return Ok(());
            }
        }
        Err(io::Error::other("no directory could be locked"))
    }

    /// Takes over what dead processes left, in the order in which it was made.
    fn adopt(&mut self, root: &Path) -> io::Result<()> {
        let Some(own) = self.own.as_ref().map(|own| own.dir.clone()) else { return Ok(()) };
        let ours = format!("{:016x}-", self.destination);
        let (mut adopted, mut failed) = (0, Ok(()));
        for entry in fs::read_dir(root)?.flatten() {
            let dir = entry.path();
            if dir == own || !entry.file_name().to_string_lossy().starts_with(&ours) || !is_our_own(&dir) {
                continue;
            }
            // It lives, or somebody else was faster.
            let Ok(Some(_lock)) = lock(&dir) else { continue };
            for file in fs::read_dir(&dir).into_iter().flatten().flatten() {
                let file_name = file.file_name();
                let found = file_name.to_str().and_then(|name| parse(name).or_else(|| self.inherited(&file.path(), name)));
                let Some(Found { signal, id, items, torn }) = found else { continue };
                if torn {
                    // Its writer died over it.
                    self.counts.lose(signal, Cause::Corrupt, u64::from(items));
                    drop(fs::remove_file(file.path()));
                    continue;
                }
                let bytes = file.metadata().map_or(0, |metadata| metadata.len());
                match fs::rename(file.path(), own.join(name(signal, id, items))) {
                    Ok(()) => {
                        self.push(signal, Entry { id, items, bytes, memory: None });
                        adopted += 1;
                    }
                    // It stays where it is, for the next visit.
                    Err(error) => failed = Err(error),
                }
            }
            clear_away(&dir);
        }
        if adopted > 0 {
            for waiting in &mut self.waiting {
                waiting.make_contiguous().sort_by_key(|entry| entry.id);
            }
            tracing::info!(batches = adopted, "took over what a wrapper before us could not send");
            self.make_room();
        }
        failed
    }

    /// A will: it says of itself when it was made and what is in it.
    fn inherited(&mut self, path: &Path, file: &str) -> Option<Found> {
        let torn = file.strip_suffix(TORN);
        let signal = Signal::ALL.into_iter().find(|signal| torn.unwrap_or(file) == will(*signal))?;
        self.n += 1;
        let (nonce, n) = (self.nonce, self.n);
        let found = || {
            let mut header = [0; HEADER];
            files::open(path, OpenOptions::new().read(true))?.read_exact(&mut header)?;
            let created = u64::from_le_bytes(std::array::from_fn(|i| header[8 + i]));
            let items = u32::from_le_bytes(std::array::from_fn(|i| header[16 + i]));
            let id = Id { created, nonce, n };
            // It counts what it is worth itself: only if it is as it was written.
            read(path, signal, id, items).map(|_| Found { signal, id, items, torn: false })
        };
        if torn.is_none() {
            match found() {
                Ok(found) => return Some(found),
                Err(error) if matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof) => {
                    self.counts.lose(signal, Cause::Corrupt, 1);
                }
                // It stays for the next visit.
                Err(_) => return None,
            }
        }
        // Of one whose writer died over it, the one before is whole.
        drop(fs::remove_file(path));
        None
    }

    /// Writes down what had to stay in memory.
    fn settle(&mut self) -> io::Result<()> {
        let Some(Own { dir, .. }) = &self.own else { return Ok(()) };
        for signal in Signal::ALL {
            for entry in &mut self.waiting[signal as usize] {
                let Some(payload) = &entry.memory else { continue };
                write(dir, signal, entry.id, entry.items, payload)?;
                entry.memory = None;
                let [disk, memory] = &mut self.totals[signal as usize];
                memory.items -= u64::from(entry.items);
                memory.bytes -= entry.bytes;
                disk.items += u64::from(entry.items);
                disk.bytes += entry.bytes;
                if self.counts.degrade(false) {
                    tracing::info!("what waits for the collector is kept on disk again");
                }
            }
        }
        self.make_room();
        Ok(())
    }

    fn set_aside(&self, signal: Signal, id: Id, items: u32) {
        let (Some(root), Some(Own { dir, .. })) = (&self.root, &self.own) else { return };
        let (from, aside) = (dir.join(name(signal, id, items)), root.join("corrupt"));
        let kept = DirBuilder::new().mode(0o700).recursive(true).create(&aside).and_then(|()| fs::read_dir(&aside));
        let room = kept.is_ok_and(|kept| kept.count() < SET_ASIDE);
        if !room || fs::rename(&from, aside.join(name(signal, id, items))).is_err() {
            drop(fs::remove_file(&from));
        }
    }
}

/// Whether it is a directory of our own making. A volume is often open to everybody (`emptyDir` is): whatever others put there we would
/// send in our name.
pub(super) fn is_our_own(dir: &Path) -> bool {
    let me = rustix::process::geteuid().as_raw();
    fs::symlink_metadata(dir).is_ok_and(|metadata| metadata.is_dir() && metadata.uid() == me)
}

/// The lock of a directory, unless somebody holds it or has cleared the directory away meanwhile.
fn lock(dir: &Path) -> io::Result<Option<File>> {
    let path = dir.join("lock");
    let file = files::open(&path, OpenOptions::new().create(true).append(true).mode(0o600))?;
    if file.try_lock().is_err() {
        return Ok(None);
    }
    let still_there = fs::metadata(&path)?.ino() == file.metadata()?.ino();
    Ok(still_there.then_some(file))
}

/// The lock first: a directory with nothing in it can be removed, one that somebody has begun to use cannot.
fn clear_away(dir: &Path) {
    let others = fs::read_dir(dir).map_or(0, |entries| entries.flatten().filter(|entry| entry.file_name() != "lock").count());
    if others == 0 {
        drop(fs::remove_file(dir.join("lock")));
        drop(fs::remove_dir(dir));
    }
}

fn name(signal: Signal, id: Id, items: u32) -> String {
    format!("{:020}-{:016x}-{:08}-{items}.{}", id.created, id.nonce, id.n, signal.as_str())
}

struct Found {
    signal: Signal,
    id: Id,
    items: u32,
    /// It was not written to its end.
    torn: bool,
}

/// What a file's name says; `None` for any other file.
fn parse(name: &str) -> Option<Found> {
    let (whole, torn) = name.strip_suffix(TORN).map_or((name, false), |whole| (whole, true));
    let (stem, signal) = whole.split_once('.')?;
    let signal = Signal::ALL.into_iter().find(|known| known.as_str() == signal)?;
    let mut parts = stem.split('-');
    let created = parts.next()?.parse().ok()?;
    let nonce = u64::from_str_radix(parts.next()?, 16).ok()?;
    let n = parts.next()?.parse().ok()?;
    let items = parts.next()?.parse().ok()?;
    parts.next().is_none().then_some(Found { signal, id: Id { created, nonce, n }, items, torn })
}

/// Until it is whole, a file is called something else.
const TORN: &str = ".tmp";

fn will(signal: Signal) -> String {
    format!("will.{}", signal.as_str())
}

fn write(dir: &Path, signal: Signal, id: Id, items: u32, payload: &[u8]) -> io::Result<()> {
    write_to(&dir.join(name(signal, id, items)), signal, id, items, payload)
}

fn write_to(path: &Path, signal: Signal, id: Id, items: u32, payload: &[u8]) -> io::Result<()> {
    let mut torn = path.as_os_str().to_owned();
    torn.push(TORN);
    let torn = PathBuf::from(torn);
    let written = (|| {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&torn)?;
        file.write_all(&header(signal, id, items, payload)?)?;
        file.write_all(payload)?;
        fs::rename(&torn, path)
    })();
    if written.is_err() {
        drop(fs::remove_file(&torn));
    }
    written
}

fn header(signal: Signal, id: Id, items: u32, payload: &[u8]) -> io::Result<[u8; HEADER]> {
    let length = u32::try_from(payload.len()).map_err(io::Error::other)?;
    let mut header = [0; HEADER];
    header[..4].copy_from_slice(MAGIC);
    header[4] = signal as u8;
    header[8..16].copy_from_slice(&id.created.to_le_bytes());
    header[16..20].copy_from_slice(&items.to_le_bytes());
    header[20..24].copy_from_slice(&length.to_le_bytes());
    let mut crc = flate2::Crc::new();
    crc.update(&header[..24]);
    crc.update(payload);
    header[24..].copy_from_slice(&crc.sum().to_le_bytes());
    Ok(header)
}

fn read(path: &Path, signal: Signal, id: Id, items: u32) -> io::Result<Bytes> {
    let mut all = Vec::new();
    File::open(path)?.read_to_end(&mut all)?;
    let whole = Bytes::from(all);
    if whole.len() < HEADER || header(signal, id, items, &whole[HEADER..])? != whole[..HEADER] {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "its checksum is wrong"));
    }
    Ok(whole.slice(HEADER..))
}

#[cfg(test)]
mod tests;
