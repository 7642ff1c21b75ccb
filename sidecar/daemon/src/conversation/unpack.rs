//! Takes a conversation back: into a directory that is nobody else's, and into its place when all of it is there. Half of it never is.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, Dir, Mode, OFlags, Timespec, Timestamps};
use rustix::process::{Gid, Uid};

use super::pack::open_root;
use super::{Root, STAGING, Wrong};

/// Two blocks of zeros, where a header would be.
const MARK: u64 = 1024;

/// Where a root is made anew, beside what is there.
struct Stage {
    path: PathBuf,
    /// The root.
    at: OwnedFd,
    /// What it is called in the root.
    name: String,
    /// Below it, `new` and `old`.
    dir: OwnedFd,
}

impl Stage {
    fn make(path: &Path) -> io::Result<Stage> {
        std::fs::create_dir_all(path)?;
        let at = open_root(path)?;
        let name = format!("{STAGING}{:016x}", crate::supervise::random());
        rustix::fs::mkdirat(&at, &name, Mode::RWXU)?;
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::RDONLY | OFlags::CLOEXEC;
        let dir = rustix::fs::openat(&at, &name, flags, Mode::empty())?;
        for part in ["new", "old"] {
            rustix::fs::mkdirat(&dir, part, Mode::RWXU)?;
        }
        Ok(Stage { path: path.to_owned(), at, name, dir })
    }

    fn entries(at: impl AsFd, below: &str) -> io::Result<Vec<PathBuf>> {
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::RDONLY | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(at, below, flags, Mode::empty())?;
        let mut names = Vec::new();
        for entry in Dir::read_from(&fd)? {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if !matches!(name, b"." | b"..") {
                names.push(PathBuf::from(std::ffi::OsStr::from_bytes(name)));
            }
        }
        Ok(names)
    }

    /// Puts what is new in the place of what is there, and says what it has moved, also if it could not move all.
    fn swap(&self, stays: impl Fn(&Path) -> bool, moved: &mut Moved) -> io::Result<()> {
        let new = Stage::entries(&self.dir, "new")?;
        for name in Stage::entries(&self.at, ".")? {
            let own = name.as_os_str().as_bytes().starts_with(STAGING.as_bytes());
            if own || stays(&name) && !new.contains(&name) {
                continue;
            }
            match rustix::fs::renameat(&self.at, &name, &self.dir, Path::new("old").join(&name)) {
                // Something is mounted there: it is not part of this.
                Err(rustix::io::Errno::BUSY | rustix::io::Errno::XDEV) if !new.contains(&name) => continue,
                done => done?,
            }
            moved.out.push(name);
        }
        for name in new {
            rustix::fs::renameat(&self.dir, Path::new("new").join(&name), &self.at, &name)?;
            moved.put.push(name);
        }
        Ok(())
    }

    /// All is as it was.
    fn undo(&self, moved: &Moved) {
        for name in &moved.put {
            rustix::fs::renameat(&self.at, name, &self.dir, Path::new("new").join(name)).ok();
        }
        for name in &moved.out {
            rustix::fs::renameat(&self.dir, Path::new("old").join(name), &self.at, name).ok();
        }
    }
}

#[derive(Default)]
struct Moved {
    out: Vec<PathBuf>,
    put: Vec<PathBuf>,
}

impl Drop for Stage {
    fn drop(&mut self) {
        // It follows no link, and what is left of it is left out of every archive.
        std::fs::remove_dir_all(self.path.join(&self.name)).ok();
    }
}

/// One conversation, on its way in.
pub(super) struct Unpacker<'a> {
    roots: &'a [Root],
    names: &'a [String],
    most: u64,
    stages: BTreeMap<&'static str, Stage>,
    /// Made at the end: nothing is written through them.
    links: Vec<(&'static str, PathBuf, PathBuf, Owner)>,
    /// What may be done in them is said when all is in them.
    dirs: Vec<(&'static str, PathBuf, Mode, Owner)>,
    as_root: bool,
}

impl<'a> Unpacker<'a> {
    pub(super) fn new(roots: &'a [Root], names: &'a [String], most: u64) -> Unpacker<'a> {
        let as_root = rustix::process::geteuid().is_root();
        Unpacker { roots, names, most, stages: BTreeMap::new(), links: Vec::new(), dirs: Vec::new(), as_root }
    }

    /// Which root an entry is of, and where below it. The stage is made with the first.
    fn place(&mut self, path: &Path) -> Result<(&'static str, PathBuf), Wrong> {
        let mut parts = Vec::new();
        for part in path.components() {
            match part {
                Component::Normal(name) => parts.push(name),
                Component::Prefix(_) | Component::RootDir | Component::CurDir | Component::ParentDir => {
                    return Err(Wrong::Unfit(String::from("it has a path in it that leads out of it")));
                }
            }
        }
        let mut parts = parts.into_iter();
        let first = parts.next().unwrap_or_default();
        let Some(root) = self.roots.iter().find(|root| first == root.name) else {
            return Err(Wrong::Unfit(String::from("it has something in it that has no place here")));
        };
        if !self.stages.contains_key(root.name) {
            self.stages.insert(root.name, Stage::make(&root.path)?);
        }
        Ok((root.name, Path::new("new").join(parts.collect::<PathBuf>())))
    }

    fn stage(&self, name: &str) -> io::Result<&Stage> {
        self.stages.get(name).ok_or_else(|| io::Error::other("there is no such directory"))
    }

    /// Reads all of it, to the mark at its end.
    pub(super) fn read(&mut self, from: impl Read) -> Result<(), Wrong> {
        let mut end = Ended { from, zeros: 0, bytes: 0, most: self.most };
        let mut last = 0;
        let mut archive = tar::Archive::new(&mut end);
        for entry in archive.entries().map_err(unfit)? {
            let mut entry = entry.map_err(unfit)?;
            last = entry.raw_file_position() + entry.size().next_multiple_of(512);
            let path = entry.path().map_err(unfit)?.into_owned();
            let (root, at) = self.place(&path)?;
            let header = entry.header();
            let mode = Mode::from_raw_mode(header.mode().map_err(unfit)? & 0o777);
            let id = |id: io::Result<u64>| id.ok().and_then(|id| u32::try_from(id).ok());
            let (Some(uid), Some(gid)) = (id(header.uid()), id(header.gid())) else {
                return Err(Wrong::Unfit(String::from("it has an owner in it that is none")));
            };
            let owner = Owner(Uid::from_raw(uid), Gid::from_raw(gid));
            let mtime = i64::try_from(header.mtime().map_err(unfit)?).unwrap_or(0);
            match header.entry_type() {
                tar::EntryType::Directory => {
                    // The root itself is as it is here.
                    if at != Path::new("new") {
                        self.make_dir(root, &at)?;
                        self.dirs.push((root, at, mode, owner));
                    }
                }
                tar::EntryType::Regular => {
                    if let Some(parent) = at.parent().filter(|parent| *parent != Path::new("new")) {
                        self.make_dir(root, parent)?;
                    }
                    let dir = &self.stage(root)?.dir;
                    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                    let mut file = File::from(rustix::fs::openat(dir, &at, flags, Mode::RUSR | Mode::WUSR)?);
                    io::copy(&mut entry, &mut file)?;
                    file.flush()?;
                    rustix::fs::fchmod(&file, mode)?;
                    if self.as_root {
                        rustix::fs::fchown(&file, Some(owner.0), Some(owner.1))?;
                    }
                    let at = Timespec { tv_sec: mtime, tv_nsec: 0 };
                    rustix::fs::futimens(&file, &Timestamps { last_access: at, last_modification: at })?;
                }
                tar::EntryType::Symlink => {
                    let to = entry.link_name().map_err(unfit)?;
                    let Some(to) = to else { return Err(Wrong::Unfit(String::from("it has a link in it that leads nowhere"))) };
                    self.links.push((root, at, to.into_owned(), owner));
                }
                _ => return Err(Wrong::Unfit(String::from("it has something in it that is no file, directory or link"))),
            }
        }
        // What a cut connection leaves is no conversation.
        io::copy(&mut end, &mut io::sink())?;
        let rest = end.bytes.saturating_sub(last);
        if rest < MARK || end.zeros < rest {
            return Err(Wrong::Unfit(String::from("it has no end")));
        }
        for (root, at, to, owner) in &self.links {
            if let Some(parent) = at.parent().filter(|parent| *parent != Path::new("new")) {
                self.make_dir(root, parent)?;
            }
            let dir = &self.stage(root)?.dir;
            rustix::fs::symlinkat(to, dir, at)?;
            self.give(dir, at, *owner)?;
        }
        for (root, at, mode, owner) in self.dirs.iter().rev() {
            let dir = &self.stage(root)?.dir;
            // There is no link on the way: those below are made by now, and a directory has a name of its own.
            self.give(dir, at, *owner)?;
            rustix::fs::chmodat(dir, at, *mode, AtFlags::empty())?;
        }
        Ok(())
    }

    /// Each directory on the way, as far as it is not there.
    fn make_dir(&self, root: &str, at: &Path) -> io::Result<()> {
        let dir = &self.stage(root)?.dir;
        let mut so_far = PathBuf::new();
        for part in at.components() {
            so_far.push(part);
            match rustix::fs::mkdirat(dir, &so_far, Mode::RWXU) {
                Ok(()) | Err(rustix::io::Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn give(&self, dir: &OwnedFd, at: &Path, Owner(uid, gid): Owner) -> io::Result<()> {
        if self.as_root {
            rustix::fs::chownat(dir, at, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
        }
        Ok(())
    }

    /// Puts all of it in its place, or nothing.
    pub(super) fn finish(self) -> Result<(), Wrong> {
        let mut done: Vec<(&Stage, Moved)> = Vec::new();
        for (name, stage) in &self.stages {
            // One root may be in another.
            let holds = |entry: &Path| {
                let whole = stage.path.join(entry);
                self.roots.iter().any(|root| root.name != *name && root.path.starts_with(&whole))
            };
            let stays = |entry: &Path| self.names.iter().any(|one| entry == Path::new(one)) || holds(entry);
            let mut moved = Moved::default();
            let swapped = stage.swap(stays, &mut moved);
            done.push((stage, moved));
            if let Err(error) = swapped {
                done.iter().rev().for_each(|(stage, moved)| stage.undo(moved));
                return Err(error.into());
            }
        }
        Ok(())
    }
}

/// Whose it is. Only root can give something to somebody.
#[derive(Clone, Copy)]
struct Owner(Uid, Gid);

fn unfit(error: io::Error) -> Wrong {
    Wrong::Unfit(format!("it cannot be read: {error}"))
}

/// Counts what comes, and the zeros that it ends with.
struct Ended<R> {
    from: R,
    zeros: u64,
    bytes: u64,
    most: u64,
}

impl<R: Read> Read for Ended<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.from.read(buf)?;
        let got = &buf[..n];
        let last = got.iter().rev().take_while(|byte| **byte == 0).count() as u64;
        self.zeros = if last == n as u64 { self.zeros + last } else { last };
        self.bytes += n as u64;
        // With the mark at its end.
        if self.bytes > self.most.saturating_add(64 << 10) {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, "it is larger than `conversation.max_size`"));
        }
        Ok(n)
    }
}
