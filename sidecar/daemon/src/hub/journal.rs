//! A wrapper's journal: its totals, line by line, in a file that is locked while it lives.
//!
//! A line that could not be written, or only in part, is no line: the next one begins a new file with everything, and takes the
//! place of the old one in one step. The same is done when a file has grown too long.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use agent_sidecar_core::hub::{Hello, Line};

use super::Place;
use super::place::{lock_of_dead, try_lock};
use crate::files;

/// Journals end in this, and what becomes one in the other.
pub(super) const ENDING: &str = ".jsonl";
pub(super) const UNFINISHED: &str = ".new";
/// A file may grow to this, and to four times what it began with.
const LONG: u64 = 256 * 1024;

/// Of one journal in one reading. Twice what one may grow to by itself, many times over.
pub(super) const READ: u64 = 16 * 1024 * 1024;

/// See the module's head.
pub(super) struct Journal {
    path: PathBuf,
    hello: Hello,
    mode: u32,
    /// Locked.
    file: Option<File>,
    size: u64,
    first_size: u64,
    mark: u64,
    ended: bool,
    /// The file as we have left it.
    left: Option<Look>,
    /// Somebody else has changed it, since this was last asked.
    tampered: bool,
}

/// Nobody can change a file, or what the file system says of it, without its last change moving.
type Look = (u64, u64, i64, i64);

fn look(found: &fs::Metadata) -> Look {
    (found.ino(), found.len(), found.ctime(), found.ctime_nsec())
}

impl Journal {
    pub(super) fn new(place: &Place, hello: Hello) -> Journal {
        let path = place.dir.join(format!("{}{ENDING}", hello.run));
        Journal {
            path,
            hello,
            mode: place.mode(),
            file: None,
            size: 0,
            first_size: 0,
            mark: 0,
            ended: false,
            left: None,
            tampered: false,
        }
    }

    /// What the next line has to tell: the changes since this mark.
    pub(super) fn since(&self) -> u64 {
        if self.file.is_none() || self.size > LONG.max(4 * self.first_size) { 0 } else { self.mark }
    }

    /// Writes a line with the changes since [`Journal::since`].
    pub(super) fn write(&mut self, line: &Line, mark: u64) -> io::Result<()> {
        if self.ended {
            return Ok(());
        }
        let mut bytes = Vec::with_capacity(4 * 1024);
        let whole = self.since() == 0;
        if whole {
            serde_json::to_writer(&mut bytes, &self.hello)?;
            bytes.push(b'\n');
        }
        serde_json::to_writer(&mut bytes, line)?;
        bytes.push(b'\n');
        let written = if whole { self.begin(&bytes) } else { self.append(&bytes) };
        if written.is_err() {
            // Whatever is there now is not trusted; but its lock says that we live.
            self.size = u64::MAX;
        }
        written?;
        self.mark = mark;
        Ok(())
    }

    /// Says that it works for somebody else than it said. The next line begins the journal anew.
    pub(super) fn works_for(&mut self, labels: Vec<(String, String)>) -> bool {
        let news = self.hello.labels != labels;
        if news {
            self.hello.labels = labels;
            self.size = u64::MAX;
        }
        news
    }

    /// Whether somebody else has changed it since this was last asked. The next line begins it anew, with everything.
    pub(super) fn tampered(&mut self) -> bool {
        std::mem::take(&mut self.tampered)
    }

    /// No line follows. The journal is for the hub to take.
    pub(super) fn end(&mut self) {
        self.ended = true;
        self.file = None;
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let Some(file) = &mut self.file else { return Err(io::Error::other("no file")) };
        // Whoever reads it by its name reads this one.
        let found = fs::symlink_metadata(&self.path).ok();
        if self.left.is_some() && found.as_ref().map(look) != self.left {
            self.tampered = true;
            let what = if found.is_none() { "somebody has removed our journal" } else { "somebody has changed our journal" };
            return Err(io::Error::other(format!("{what}; it is written anew")));
        }
        let n = file.write(bytes)?;
        if n < bytes.len() {
            return Err(io::Error::new(io::ErrorKind::StorageFull, "the line was written in part"));
        }
        self.size += n as u64;
        self.left = file.metadata().ok().as_ref().map(look);
        Ok(())
    }

    fn begin(&mut self, bytes: &[u8]) -> io::Result<()> {
        let new = self.path.with_extension(&UNFINISHED[1..]);
        let mut file = files::open(&new, OpenOptions::new().append(true).create(true).mode(0o600))?;
        // Locked before it has its name: a journal without a lock is that of a dead wrapper.
        let ready = try_lock(&file)
            .and_then(|ours| if ours { Ok(()) } else { Err(io::Error::other("somebody has locked our journal")) })
            // Whatever our umask is.
            .and_then(|()| file.set_permissions(fs::Permissions::from_mode(self.mode)))
            .and_then(|()| file.set_len(0))
            .and_then(|()| file.write_all(bytes))
            .and_then(|()| fs::rename(&new, &self.path));
        if let Err(error) = ready {
            fs::remove_file(&new).ok();
            return Err(error);
        }
        self.size = bytes.len() as u64;
        self.first_size = self.size;
        self.left = file.metadata().ok().as_ref().map(look);
        // The old one is given up only now.
        self.file = Some(file);
        Ok(())
    }
}

/// What each wrapper that lives here has written last, without that of one.
pub(super) fn living(place: &Place, but: &str) -> Vec<Line> {
    let journals = fs::read_dir(&place.dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let named = |path: &PathBuf| path.file_name()?.to_str()?.strip_suffix(ENDING).map(|run| run != but);
    journals.filter(|path| named(path) == Some(true)).filter_map(|path| last_line(place, &path).ok().flatten()).collect()
}

/// The wrappers that live here, by their pids.
pub(crate) fn pids(place: &Place) -> Vec<u32> {
    let journals = fs::read_dir(&place.dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let first = |path: PathBuf| -> Option<u32> {
        let run = path.file_name()?.to_str()?.strip_suffix(ENDING)?;
        let head = lives(place, run).then(|| files::open(&path, OpenOptions::new().read(true)).ok())??;
        let mut line = String::new();
        io::BufRead::read_line(&mut io::BufReader::new(head.take(READ)), &mut line).ok()?;
        serde_json::from_str::<Hello>(&line).ok().filter(|hello| hello.world == place.world).map(|hello| hello.pid)
    };
    journals.filter_map(first).collect()
}

/// Whether a wrapper goes on: it holds its journal.
pub(crate) fn lives(place: &Place, run: &str) -> bool {
    let path = place.dir.join(format!("{run}{ENDING}"));
    let file = files::open(&path, OpenOptions::new().write(true));
    file.and_then(|file| lock_of_dead(&path, &file)).is_ok_and(|dead| !dead)
}

fn last_line(place: &Place, path: &Path) -> io::Result<Option<Line>> {
    let file = files::open(path, OpenOptions::new().read(true))?;
    if try_lock(&file)? {
        return Ok(None);
    }
    let mut bytes = Vec::new();
    file.take(READ).read_to_end(&mut bytes)?;
    // What is not a whole line yet is said next time.
    let whole = bytes.iter().rposition(|byte| *byte == b'\n').unwrap_or(0);
    let mut lines = bytes[..whole].split(|byte| *byte == b'\n');
    let hello = lines.next().and_then(|line| serde_json::from_slice::<Hello>(line).ok());
    let ours = hello.is_some_and(|hello| hello.world == place.world);
    Ok(lines.next_back().filter(|_| ours).and_then(|line| serde_json::from_slice(line).ok()))
}
