//! Takes a conversation back: into a directory that is nobody else's, and into its place when all of it is there. Half of it never is.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat, Timespec, Timestamps};
use rustix::io::Errno;
use rustix::process::{Gid, Uid};

use super::pack::open_root;
use super::{Root, STAGING, Wrong};

/// Two blocks of zeros, where a header would be.
const MARK: u64 = 1024;

/// Directories in directories that are put together one by one: each is held open while its own are.
const DEPTH: usize = 100;
const DIR: OFlags = OFlags::DIRECTORY.union(OFlags::NOFOLLOW).union(OFlags::RDONLY).union(OFlags::CLOEXEC);

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

/// One directory, thrice.
struct Level {
    at: OwnedFd,
    /// If there is to be one.
    new: Option<OwnedFd>,
    old: OwnedFd,
}

/// What was done, to be undone; paths are below the root.
enum Step {
    /// To `old`.
    Out(PathBuf),
    /// From `new`.
    Put(PathBuf),
    /// A directory is gone that was empty by then.
    Gone(PathBuf, Mode, Owner),
    /// A directory was this.
    Was(PathBuf, Mode, Owner),
}

/// What is not part of a root although it is in it, as paths below the root.
struct Keep<'a> {
    /// Other roots, and what is mounted.
    places: Vec<PathBuf>,
    /// At the top, where nothing comes for them.
    names: &'a [String],
}

#[derive(Default)]
struct Moved {
    steps: Vec<Step>,
    /// What came for these has no place.
    left: Vec<PathBuf>,
}

impl Stage {
    fn make(path: &Path) -> io::Result<Stage> {
        std::fs::create_dir_all(path)?;
        let at = open_root(path)?;
        let name = format!("{STAGING}{:016x}", crate::supervise::random());
        rustix::fs::mkdirat(&at, &name, Mode::RWXU)?;
        let dir = rustix::fs::openat(&at, &name, DIR, Mode::empty())?;
        for part in ["new", "old"] {
            rustix::fs::mkdirat(&dir, part, Mode::RWXU)?;
        }
        Ok(Stage { path: path.to_owned(), at, name, dir })
    }

    fn entries(at: impl AsFd) -> io::Result<BTreeSet<PathBuf>> {
        let fd = rustix::fs::openat(at, ".", DIR, Mode::empty())?;
        let mut names = BTreeSet::new();
        for entry in Dir::read_from(&fd)? {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if !matches!(name, b"." | b"..") {
                names.insert(PathBuf::from(std::ffi::OsStr::from_bytes(name)));
            }
        }
        Ok(names)
    }

    fn level(&self) -> io::Result<Level> {
        let open = |at: &OwnedFd, name: &str| rustix::fs::openat(at, name, DIR, Mode::empty());
        Ok(Level { at: open(&self.at, ".")?, new: Some(open(&self.dir, "new")?), old: open(&self.dir, "old")? })
    }

    /// Puts what is new in the place of what is there, and says what it has moved, also if it could not move all.
    fn swap(&self, below: &Path, level: &Level, keep: &Keep<'_>, moved: &mut Moved) -> io::Result<()> {
        let mut new = level.new.as_ref().map_or_else(|| Ok(BTreeSet::new()), Stage::entries)?;
        for name in Stage::entries(&level.at)? {
            let inside = below.join(&name);
            let comes = new.contains(&name);
            let excluded = !comes && below == Path::new("") && keep.names.iter().any(|one| name == Path::new(one));
            if excluded || name.as_os_str().as_bytes().starts_with(STAGING.as_bytes()) {
                continue;
            }
            let about = rustix::fs::statat(&level.at, &name, AtFlags::SYMLINK_NOFOLLOW)?;
            let is_dir = FileType::from_raw_mode(about.st_mode) == FileType::Directory;
            let out = || rustix::fs::renameat(&level.at, &name, &level.old, &name);
            let outcome = if keep.places.contains(&inside) {
                Err(Errno::BUSY)
            } else if is_dir && keep.places.iter().any(|place| place.starts_with(&inside)) {
                // What is mounted would go with it.
                Err(Errno::XDEV)
            } else {
                match out() {
                    // To have another parent is to be written to.
                    Err(Errno::ACCESS) if is_dir => unlock(&level.at, &name, &inside, moved).and_then(|_| out()),
                    outcome => outcome,
                }
            };
            match outcome {
                Ok(()) => moved.steps.push(Step::Out(inside)),
                // A directory of the image's is in another layer.
                Err(Errno::XDEV) if is_dir => match self.descend(&name, &inside, level, keep, moved)? {
                    Then::Nothing => {}
                    Then::Taken => {
                        new.remove(&name);
                    }
                },
                // Something is mounted there, or it is another root.
                Err(Errno::BUSY) => {
                    if new.remove(&name) {
                        moved.left.push(inside);
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
        if let Some(from) = &level.new {
            for name in new {
                rustix::fs::renameat(from, &name, &level.at, &name)?;
                moved.steps.push(Step::Put(below.join(name)));
            }
        }
        Ok(())
    }

    /// The same with what is in a directory that cannot be moved.
    fn descend(&self, name: &Path, inside: &Path, level: &Level, keep: &Keep<'_>, moved: &mut Moved) -> io::Result<Then> {
        if inside.components().count() > DEPTH {
            return Err(io::Error::other("there are directories in each other, too deep"));
        }
        let at = unlock(&level.at, name, inside, moved)?;
        rustix::fs::mkdirat(&level.old, name, Mode::RWXU)?;
        let old = rustix::fs::openat(&level.old, name, DIR, Mode::empty())?;
        let new = match level.new.as_ref().map(|new| rustix::fs::openat(new, name, DIR, Mode::empty())) {
            Some(Ok(new)) => Some(new),
            Some(Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP)) | None => None,
            Some(Err(error)) => return Err(error.into()),
        };
        let next = Level { at, new, old };
        self.swap(inside, &next, keep, moved)?;
        if next.new.is_some() {
            return Ok(Then::Taken);
        }
        let was = rustix::fs::fstat(&next.at)?;
        match rustix::fs::unlinkat(&level.at, name, AtFlags::REMOVEDIR) {
            Ok(()) => {
                moved.steps.push(Step::Gone(inside.to_owned(), mode_of(&was), Owner::of(&was)));
                Ok(Then::Nothing)
            }
            // Something stays in it.
            Err(Errno::NOTEMPTY | Errno::EXIST | Errno::BUSY) => {
                moved.left.push(inside.to_owned());
                Ok(Then::Taken)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// A directory has the mode, owner and time that it had.
    fn settle(&self, inside: &Path, about: &DirIs, as_root: bool, moved: &mut Moved) -> io::Result<()> {
        let fd = open_below(&self.at, inside)?;
        let was = rustix::fs::fstat(&fd)?;
        moved.steps.push(Step::Was(inside.to_owned(), mode_of(&was), Owner::of(&was)));
        if as_root {
            rustix::fs::fchown(&fd, Some(about.owner.0), Some(about.owner.1))?;
        }
        // Last of all: it may be nobody's to change from here on.
        rustix::fs::futimens(&fd, &whole(about.mtime))?;
        Ok(rustix::fs::fchmod(&fd, about.mode)?)
    }

    fn undo(&self, step: &Step) -> io::Result<()> {
        let parent = |from: &OwnedFd, inside: &Path| open_below(from, inside.parent().unwrap_or(Path::new("")));
        let beside = |part: &str| rustix::fs::openat(&self.dir, part, DIR, Mode::empty());
        let give = |fd: &OwnedFd, mode: Mode, owner: Owner| {
            rustix::fs::fchown(fd, Some(owner.0), Some(owner.1)).ok();
            rustix::fs::fchmod(fd, mode)
        };
        match step {
            Step::Out(inside) => {
                let name = inside.file_name().unwrap_or_default();
                rustix::fs::renameat(parent(&beside("old")?, inside)?, name, parent(&self.at, inside)?, name)?;
            }
            Step::Put(inside) => {
                let name = inside.file_name().unwrap_or_default();
                rustix::fs::renameat(parent(&self.at, inside)?, name, parent(&beside("new")?, inside)?, name)?;
            }
            Step::Gone(inside, mode, owner) => {
                rustix::fs::mkdirat(parent(&self.at, inside)?, inside.file_name().unwrap_or_default(), Mode::RWXU)?;
                give(&open_below(&self.at, inside)?, *mode, *owner)?;
            }
            Step::Was(inside, mode, owner) => give(&open_below(&self.at, inside)?, *mode, *owner)?,
        }
        Ok(())
    }
}

/// What is to be done yet of a name.
enum Then {
    /// What is new may have it.
    Nothing,
    /// It has it, or cannot.
    Taken,
}

/// Opens a directory that we may change, and makes it one if it is ours.
fn unlock(at: &OwnedFd, name: &Path, inside: &Path, moved: &mut Moved) -> Result<OwnedFd, Errno> {
    let path = rustix::fs::openat(at, name, DIR | OFlags::PATH, Mode::empty())?;
    let was = rustix::fs::fstat(&path)?;
    let mode = mode_of(&was);
    if !mode.contains(Mode::RWXU) && !rustix::process::geteuid().is_root() {
        moved.steps.push(Step::Was(inside.to_owned(), mode, Owner::of(&was)));
        // By its name: what is opened as a path alone cannot be changed, and a link would have been found out.
        rustix::fs::chmodat(at, name, mode | Mode::RWXU, AtFlags::empty())?;
    }
    rustix::fs::openat(at, name, DIR, Mode::empty())
}

/// Opens a directory below another, and follows no link on the way.
fn open_below(at: &OwnedFd, inside: &Path) -> io::Result<OwnedFd> {
    let mut fd = rustix::fs::openat(at, ".", DIR, Mode::empty())?;
    for name in inside.components() {
        fd = rustix::fs::openat(&fd, name.as_os_str(), DIR, Mode::empty())?;
    }
    Ok(fd)
}

fn mode_of(about: &Stat) -> Mode {
    Mode::from_raw_mode(about.st_mode & 0o7777)
}

fn whole(mtime: i64) -> Timestamps {
    let at = Timespec { tv_sec: mtime, tv_nsec: 0 };
    Timestamps { last_access: at, last_modification: at }
}

/// Where something is mounted, as this process sees it.
fn mounts() -> io::Result<Vec<PathBuf>> {
    let table = std::fs::read("/proc/self/mountinfo")?;
    Ok(table.split(|byte| *byte == b'\n').filter_map(|line| line.split(|byte| *byte == b' ').nth(4)).map(unescaped).collect())
}

/// `\040` is a space there.
fn unescaped(field: &[u8]) -> PathBuf {
    let (mut bytes, mut rest) = (Vec::with_capacity(field.len()), field);
    while let Some((first, more)) = rest.split_first() {
        let code = match more.get(..3) {
            Some(digits) if *first == b'\\' => {
                std::str::from_utf8(digits).ok().and_then(|digits| u8::from_str_radix(digits, 8).ok())
            }
            _ => None,
        };
        bytes.push(code.unwrap_or(*first));
        rest = if code.is_some() { &more[3..] } else { more };
    }
    PathBuf::from(std::ffi::OsString::from_vec(bytes))
}

impl Drop for Stage {
    fn drop(&mut self) {
        let path = self.path.join(&self.name);
        // It follows no link, and what is left of it is left out of every archive.
        match mounts() {
            Ok(mounts) if !mounts.iter().any(|mount| mount.starts_with(&path)) => {
                unlock_all(&path);
                std::fs::remove_dir_all(&path).ok();
            }
            _ => tracing::warn!("what was there before is left beside the conversation: something is mounted in it, or may be"),
        }
    }
}

/// What is in a directory without write permission cannot be removed, but by root.
pub(crate) fn unlock_all(path: &Path) {
    if rustix::process::geteuid().is_root() {
        return;
    }
    let mut dirs = vec![path.to_owned()];
    while let Some(dir) = dirs.pop() {
        std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o700)).ok();
        let below = std::fs::read_dir(&dir).into_iter().flatten().flatten();
        dirs.extend(below.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path()));
    }
}

/// One conversation, on its way in.
pub(super) struct Unpacker<'a> {
    roots: &'a [Root],
    names: &'a [String],
    most: u64,
    stages: BTreeMap<&'static str, Stage>,
    /// Made at the end: nothing is written through them.
    links: Vec<(&'static str, PathBuf, PathBuf, Owner, i64)>,
    /// What may be done in them is said when all is in them.
    dirs: Vec<(&'static str, PathBuf, DirIs)>,
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
                        let inside = at.strip_prefix("new").unwrap_or(&at).to_owned();
                        self.dirs.push((root, inside, DirIs { mode, owner, mtime }));
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
                    rustix::fs::futimens(&file, &whole(mtime))?;
                }
                tar::EntryType::Symlink => {
                    let to = entry.link_name().map_err(unfit)?;
                    let Some(to) = to else { return Err(Wrong::Unfit(String::from("it has a link in it that leads nowhere"))) };
                    self.links.push((root, at, to.into_owned(), owner, mtime));
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
        for (root, at, to, owner, mtime) in &self.links {
            if let Some(parent) = at.parent().filter(|parent| *parent != Path::new("new")) {
                self.make_dir(root, parent)?;
            }
            let dir = &self.stage(root)?.dir;
            rustix::fs::symlinkat(to, dir, at)?;
            self.give(dir, at, *owner)?;
            rustix::fs::utimensat(dir, at, &whole(*mtime), AtFlags::SYMLINK_NOFOLLOW)?;
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
    pub(super) fn finish(mut self) -> Result<(), Wrong> {
        // Those in others first: whose mode is set can keep us out.
        self.dirs.sort_by_key(|(_, inside, _)| std::cmp::Reverse(inside.components().count()));
        let mounts = mounts()?;
        let mut moved: BTreeMap<&str, Moved> = BTreeMap::new();
        let outcome = self.place_all(&mounts, &mut moved);
        if outcome.is_err() {
            // One root may be in another, but what is done in it is done in its own place.
            for (stage, moved) in self.stages.iter().rev().filter_map(|(name, stage)| Some((stage, moved.get(name)?))) {
                let failed = moved.steps.iter().rev().filter(|step| stage.undo(step).is_err()).count();
                if failed > 0 {
                    tracing::error!(failed, "what was there before the conversation cannot be put back");
                }
            }
        } else if moved.values().any(|moved| !moved.left.is_empty()) {
            tracing::warn!("the conversation has something where something else is mounted here, or kept: that stays as it is");
        }
        outcome.map_err(Wrong::Io)
    }

    fn place_all<'s>(&'s self, mounts: &[PathBuf], moved: &mut BTreeMap<&'s str, Moved>) -> io::Result<()> {
        for (name, stage) in &self.stages {
            let others = self.roots.iter().map(|root| &root.path);
            let below = |path: &PathBuf| path.strip_prefix(&stage.path).ok().map(Path::to_owned);
            let places = others.chain(mounts).filter_map(below).filter(|inside| inside != Path::new("")).collect();
            let keep = Keep { places, names: self.names };
            stage.swap(Path::new(""), &stage.level()?, &keep, moved.entry(name).or_default())?;
        }
        for (name, inside, about) in &self.dirs {
            let (stage, moved) = (self.stage(name)?, moved.entry(name).or_default());
            if !moved.left.iter().any(|left| inside.starts_with(left)) {
                stage.settle(inside, about, self.as_root, moved)?;
            }
        }
        Ok(())
    }
}

/// Whose it is. Only root can give something to somebody.
#[derive(Clone, Copy)]
struct Owner(Uid, Gid);

impl Owner {
    fn of(about: &Stat) -> Owner {
        Owner(Uid::from_raw(about.st_uid), Gid::from_raw(about.st_gid))
    }
}

/// What a directory is to be.
struct DirIs {
    mode: Mode,
    owner: Owner,
    mtime: i64,
}

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
