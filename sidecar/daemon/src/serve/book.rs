//! Which conversation of the CLI's belongs to which session: kept in one small file beside the conversations themselves.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{AtFlags, Mode, OFlags};
use serde::{Deserialize, Serialize};

use crate::supervise::User;

/// Sessions that are remembered; those that were not used for longest are forgotten for new ones. A megabyte, about.
const SESSIONS: usize = 10_000;
/// A file that is larger is not ours.
const LARGEST: u64 = 8 * 1024 * 1024;

#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
struct Kept {
    version: u32,
    sessions: BTreeMap<String, Entry>,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Entry {
    /// The CLI's own name for it.
    conversation: String,
    /// When it was last heard of, in seconds since the Unix epoch.
    used: u64,
}

pub(super) struct Book {
    path: PathBuf,
    /// Whose directory it is in, if it may be nobody else's.
    owner: Option<u32>,
    kept: Kept,
    /// The file that was read or written last.
    seen: Option<Seen>,
}

/// Which file, and as it was when.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Seen(u64, i64, u64);

impl Seen {
    #[expect(clippy::useless_conversion, reason = "its types differ between architectures")]
    fn of(file: impl AsFd) -> io::Result<Seen> {
        let about = rustix::fs::fstat(file)?;
        Ok(Seen(about.st_ino.into(), about.st_mtime.into(), about.st_mtime_nsec.into()))
    }
}

impl Book {
    /// As it was left. One that cannot be read is said, and begun anew.
    pub(super) fn open(path: PathBuf, user: &User) -> Book {
        let owner = (!user.is_us()).then(|| user.uid());
        let mut book = Book { path, owner, kept: Kept { version: 1, ..Kept::default() }, seen: None };
        book.refresh();
        book
    }

    /// Reads it again where it is another: it is brought with the conversations, and that may be after the start.
    pub(super) fn refresh(&mut self) {
        match self.read() {
            Ok(Some((kept, seen))) => (self.kept, self.seen) = (Kept { version: 1, ..kept }, Some(seen)),
            Ok(None) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                tracing::error!(path = %self.path.display(), %error, "which conversations there are cannot be read: sessions begin anew");
                self.put_aside();
            }
        }
    }

    pub(super) fn find(&self, id: &str) -> Option<String> {
        Some(self.kept.sessions.get(id)?.conversation.clone())
    }

    pub(super) fn all(&self) -> impl Iterator<Item = (&str, &str)> {
        self.kept.sessions.iter().map(|(id, entry)| (id.as_str(), entry.conversation.as_str()))
    }

    /// # Errors
    /// It cannot be written; it is known all the same.
    pub(super) fn remember(&mut self, id: &str, conversation: &str) -> io::Result<()> {
        if self.find(id).as_deref() == Some(conversation) || !is_conversation(conversation) {
            return Ok(());
        }
        if self.kept.sessions.len() >= SESSIONS
            && !self.kept.sessions.contains_key(id)
            && let Some(oldest) = self.kept.sessions.iter().min_by_key(|(_, entry)| entry.used).map(|(id, _)| id.clone())
        {
            self.kept.sessions.remove(&oldest);
        }
        let used = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        self.kept.sessions.insert(id.to_owned(), Entry { conversation: conversation.to_owned(), used });
        self.write()
    }

    /// Whether it was known.
    ///
    /// # Errors
    /// That cannot be written.
    pub(super) fn forget(&mut self, id: &str) -> io::Result<bool> {
        if self.kept.sessions.remove(id).is_none() {
            return Ok(false);
        }
        self.write().map(|()| true)
    }

    /// The directory, held open: what an agent makes of its name meanwhile is its own business.
    fn dir(&self) -> io::Result<OwnedFd> {
        let parent = self.path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(std::path::Path::new("."));
        if self.owner.is_none() {
            std::fs::create_dir_all(parent)?;
        }
        let dir = rustix::fs::open(parent, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        match self.owner {
            // Into nobody else's with our rights.
            Some(owner) if rustix::fs::fstat(&dir)?.st_uid != owner => {
                Err(io::Error::new(io::ErrorKind::PermissionDenied, "its directory is not the agent's own"))
            }
            _ => Ok(dir),
        }
    }

    fn name(&self) -> io::Result<&std::ffi::OsStr> {
        self.path.file_name().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "it is no file's name"))
    }

    /// `None`: that is known.
    fn read(&self) -> io::Result<Option<(Kept, Seen)>> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::openat(self.dir()?, self.name()?, flags, Mode::empty())?);
        if !file.metadata()?.is_file() {
            return Err(io::Error::other("it is no file"));
        }
        let seen = Seen::of(&file)?;
        if self.seen == Some(seen) {
            return Ok(None);
        }
        let mut bytes = Vec::new();
        if file.take(LARGEST + 1).read_to_end(&mut bytes)? as u64 > LARGEST {
            return Err(io::Error::other("it is too large"));
        }
        let mut kept: Kept = serde_json::from_slice(&bytes)?;
        kept.sessions.retain(|_, entry| is_conversation(&entry.conversation));
        Ok(Some((kept, seen)))
    }

    /// A reader sees the one before or this one.
    fn write(&mut self) -> io::Result<()> {
        let (dir, name) = (self.dir()?, self.name()?);
        let mut beside = name.to_owned();
        beside.push(format!(".{}", std::process::id()));
        // Whatever has this name is not written through.
        rustix::fs::unlinkat(&dir, &beside, AtFlags::empty()).ok();
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&dir, &beside, flags, Mode::from_raw_mode(0o600));
        let written = file.map_err(io::Error::from).and_then(|file| {
            let mut file = File::from(file);
            file.write_all(&serde_json::to_vec(&self.kept)?)?;
            let seen = Seen::of(&file)?;
            rustix::fs::renameat(&dir, &beside, &dir, name)?;
            Ok(seen)
        });
        if written.is_err() {
            rustix::fs::unlinkat(&dir, &beside, AtFlags::empty()).ok();
        }
        self.seen = Some(written?);
        Ok(())
    }

    /// Somebody may want to see what it was.
    fn put_aside(&self) {
        if let (Ok(dir), Ok(name)) = (self.dir(), self.name()) {
            let mut broken = name.to_owned();
            broken.push(".broken");
            rustix::fs::renameat(&dir, name, &dir, &broken).ok();
        }
    }
}

/// The CLI names them by UUIDs: what stands in a file that an agent can write is no option, and no path.
fn is_conversation(text: &str) -> bool {
    let letter = |c: char| c.is_ascii_alphanumeric();
    text.starts_with(letter) && text.len() <= 64 && text.chars().all(|c| letter(c) || c == '-' || c == '_')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("agent-sidecar-book-{}-{name}", std::process::id()));
        std::fs::remove_dir_all(&dir).ok();
        std::fs::create_dir_all(&dir).unwrap();
        dir
    }

    #[test]
    fn what_was_remembered_is_there_after_a_restart_and_what_was_forgotten_is_not() {
        let dir = scratch("kept");
        let open = || Book::open(dir.join("deep/book.json"), &User::ours());
        let mut book = open();
        book.remember("a", "6f9c").unwrap();
        book.remember("b", "1").unwrap();
        book.remember("a", "7a").unwrap();
        assert!(book.forget("b").unwrap() && !book.forget("b").unwrap());
        book.remember("c", "--resume").unwrap();
        assert_eq!(open().all().collect::<Vec<_>>(), [("a", "7a")]);
        assert_eq!(std::fs::read_dir(dir.join("deep")).unwrap().count(), 1, "nothing is left beside it");
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn one_that_is_brought_later_is_read_before_anything_is_written_over_it() {
        let (dir, brought) = (scratch("here"), scratch("brought"));
        let mut book = Book::open(dir.join("book.json"), &User::ours());
        let mut other = Book::open(brought.join("book.json"), &User::ours());
        for (id, conversation) in [("a", "1"), ("b", "2")] {
            other.remember(id, conversation).unwrap();
            std::fs::rename(brought.join("book.json"), dir.join("book.json")).unwrap();
            book.refresh();
            assert_eq!(book.find(id).as_deref(), Some(conversation));
        }
        book.remember("c", "3").unwrap();
        book.refresh();
        let all = [("a", "1"), ("b", "2"), ("c", "3")];
        assert_eq!(book.all().collect::<Vec<_>>(), all);
        assert_eq!(Book::open(dir.join("book.json"), &User::ours()).all().collect::<Vec<_>>(), all);
        // What cannot be written is known all the same.
        std::fs::remove_dir_all(&dir).unwrap();
        std::fs::write(&dir, "").unwrap();
        assert!(book.remember("d", "4").is_err());
        book.refresh();
        assert_eq!(book.find("d").as_deref(), Some("4"));
        std::fs::remove_file(dir).unwrap();
        std::fs::remove_dir_all(brought).unwrap();
    }

    #[test]
    fn one_that_is_broken_is_put_aside_and_one_that_is_no_file_is_not_followed() {
        let dir = scratch("broken");
        std::fs::write(dir.join("book.json"), "{").unwrap();
        let mut book = Book::open(dir.join("book.json"), &User::ours());
        assert_eq!(book.all().count(), 0);
        assert_eq!(std::fs::read_to_string(dir.join("book.json.broken")).unwrap(), "{");
        std::fs::write(dir.join("victim"), "kept").unwrap();
        std::os::unix::fs::symlink(dir.join("victim"), dir.join("book.json")).unwrap();
        book.remember("a", "1").unwrap();
        assert_eq!(std::fs::read_to_string(dir.join("victim")).unwrap(), "kept");
        std::fs::remove_dir_all(dir).unwrap();
    }
}
