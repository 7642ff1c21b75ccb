//! Which conversation of the CLI's belongs to which session: kept in one small file beside the conversations themselves.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
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
}

impl Book {
    /// As it was left. One that cannot be read is said, and begun anew.
    pub(super) fn open(path: PathBuf, user: &User) -> Book {
        let owner = (!user.is_us()).then(|| user.uid());
        let mut book = Book { path, owner, kept: Kept::default() };
        match book.read() {
            Ok(kept) => book.kept = kept,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                tracing::error!(path = %book.path.display(), %error, "which conversations there are cannot be read: sessions begin anew");
                book.put_aside();
            }
        }
        book.kept.version = 1;
        book
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

    fn read(&self) -> io::Result<Kept> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::openat(self.dir()?, self.name()?, flags, Mode::empty())?);
        if !file.metadata()?.is_file() {
            return Err(io::Error::other("it is no file"));
        }
        let mut bytes = Vec::new();
        if file.take(LARGEST + 1).read_to_end(&mut bytes)? as u64 > LARGEST {
            return Err(io::Error::other("it is too large"));
        }
        let mut kept: Kept = serde_json::from_slice(&bytes)?;
        kept.sessions.retain(|_, entry| is_conversation(&entry.conversation));
        Ok(kept)
    }

    /// A reader sees the one before or this one.
    fn write(&self) -> io::Result<()> {
        let (dir, name) = (self.dir()?, self.name()?);
        let mut beside = name.to_owned();
        beside.push(format!(".{}", std::process::id()));
        // Whatever has this name is not written through.
        rustix::fs::unlinkat(&dir, &beside, AtFlags::empty()).ok();
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&dir, &beside, flags, Mode::from_raw_mode(0o600));
        let written = file.map_err(io::Error::from).and_then(|file| {
            File::from(file).write_all(&serde_json::to_vec(&self.kept)?)?;
            Ok(rustix::fs::renameat(&dir, &beside, &dir, name)?)
        });
        if written.is_err() {
            rustix::fs::unlinkat(&dir, &beside, AtFlags::empty()).ok();
        }
        written
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
