//! What a conversation is, as a tar: directories, files and links, each as it is. Nothing is followed, so that nothing else is taken.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat};

use super::{Root, Wrong};

/// Directories in directories: each is held open while its own are walked.
const DEPTH: usize = 100;
/// Of everything: what has no size takes room, too.
const ENTRIES: u64 = 1_000_000;
/// Of a header, beside what is in the file.
const HEADER: u64 = 512;

/// Opens a directory without following a link on the way: the agent may have made it.
pub(super) fn open_root(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut at = rustix::fs::open("/", flags | OFlags::PATH, Mode::empty())?;
    for part in path.components() {
        if let Component::Normal(name) = part {
            at = rustix::fs::openat(&at, name, flags | OFlags::PATH, Mode::empty())?;
        }
    }
    Ok(rustix::fs::openat(&at, ".", flags | OFlags::RDONLY, Mode::empty())?)
}

/// What does something with each thing that is found.
trait Visit {
    fn dir(&mut self, at: &Path, about: &Stat) -> Result<(), Wrong>;
    fn file(&mut self, at: &Path, about: &Stat, file: File) -> Result<(), Wrong>;
    fn link(&mut self, at: &Path, about: &Stat, to: &Path) -> Result<(), Wrong>;
}

/// What is left out: names, wherever they are, and paths below a root.
pub(super) struct Without<'a> {
    pub(super) names: &'a [String],
    /// Roots are not part of each other.
    pub(super) roots: &'a [(u64, u64)],
}

impl Without<'_> {
    fn has(&self, inside: &Path, name: &Path) -> bool {
        let own = name.as_os_str().as_bytes().starts_with(super::STAGING.as_bytes());
        own || self.names.iter().any(|one| name == Path::new(one) || inside == Path::new(one))
    }
}

fn walk(
    root: &Root,
    dir: OwnedFd,
    inside: &Path,
    without: &Without<'_>,
    depth: usize,
    visit: &mut dyn Visit,
) -> Result<(), Wrong> {
    if depth > DEPTH {
        return Err(Wrong::Large(format!("there are directories in each other, {DEPTH} deep")));
    }
    let own = rustix::fs::fstat(&dir)?;
    visit.dir(&Path::new(root.name).join(inside), &own)?;
    for entry in Dir::read_from(&dir)? {
        let entry = entry?;
        let name = Path::new(std::ffi::OsStr::from_bytes(entry.file_name().to_bytes()));
        if matches!(name.as_os_str().as_bytes(), b"." | b"..") {
            continue;
        }
        let below = inside.join(name);
        if without.has(&below, name) {
            continue;
        }
        let gone = |error: &rustix::io::Errno| *error == rustix::io::Errno::NOENT;
        let about = match rustix::fs::statat(&dir, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(error) if gone(&error) => continue,
            about => about?,
        };
        // It may be another thing by now: what is opened says what it is.
        let open = |flags| match rustix::fs::openat(&dir, name, flags | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty()) {
            Err(error) if gone(&error) => Ok(None),
            Err(error) => Err(error),
            Ok(fd) => rustix::fs::fstat(&fd).map(|about| Some((fd, about))),
        };
        let at = Path::new(root.name).join(&below);
        match FileType::from_raw_mode(about.st_mode) {
            // What is mounted there is not its own; and another root is walked for itself.
            FileType::Directory if about.st_dev != own.st_dev => {}
            FileType::Directory => {
                let Some((fd, about)) = open(OFlags::DIRECTORY | OFlags::RDONLY)? else { continue };
                if !without.roots.contains(&(about.st_dev, about.st_ino)) {
                    walk(root, fd, &below, without, depth + 1, visit)?;
                }
            }
            FileType::RegularFile => {
                let Some((fd, about)) = open(OFlags::RDONLY | OFlags::NONBLOCK)? else { continue };
                if FileType::from_raw_mode(about.st_mode) == FileType::RegularFile {
                    visit.file(&at, &about, File::from(fd))?;
                }
            }
            FileType::Symlink => {
                let to = match rustix::fs::readlinkat(&dir, name, Vec::new()) {
                    Err(error) if gone(&error) => continue,
                    to => to?,
                };
                visit.link(&at, &about, Path::new(std::ffi::OsStr::from_bytes(to.to_bytes())))?;
            }
            // Sockets, pipes and devices are somebody's who is not there any more.
            FileType::Socket | FileType::Fifo | FileType::CharacterDevice | FileType::BlockDevice | FileType::Unknown => {}
        }
    }
    Ok(())
}

/// How much it would be.
#[derive(Default)]
struct Measure {
    bytes: u64,
    entries: u64,
    most: u64,
}

impl Measure {
    fn add(&mut self, bytes: u64) -> Result<(), Wrong> {
        self.entries += 1;
        self.bytes = self.bytes.saturating_add(HEADER).saturating_add(bytes.next_multiple_of(HEADER));
        if self.bytes > self.most {
            return Err(Wrong::Large(format!("it is larger than `conversation.max_size`, {} bytes", self.most)));
        }
        if self.entries > ENTRIES {
            return Err(Wrong::Large(format!("it has more than {ENTRIES} files")));
        }
        Ok(())
    }
}

impl Visit for Measure {
    fn dir(&mut self, _: &Path, _: &Stat) -> Result<(), Wrong> {
        self.add(0)
    }

    fn file(&mut self, _: &Path, about: &Stat, _: File) -> Result<(), Wrong> {
        self.add(size(about))
    }

    fn link(&mut self, _: &Path, _: &Stat, _: &Path) -> Result<(), Wrong> {
        self.add(0)
    }
}

struct Packer<W: Write> {
    tar: tar::Builder<W>,
    measure: Measure,
}

impl<W: Write> Packer<W> {
    fn header(about: &Stat, kind: tar::EntryType, size: u64) -> tar::Header {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(about.st_mode & 0o777);
        header.set_uid(about.st_uid.into());
        header.set_gid(about.st_gid.into());
        header.set_mtime(u64::try_from(about.st_mtime).unwrap_or(0));
        header.set_size(size);
        header
    }
}

impl<W: Write> Visit for Packer<W> {
    fn dir(&mut self, at: &Path, about: &Stat) -> Result<(), Wrong> {
        self.measure.add(0)?;
        Ok(self.tar.append_data(&mut Self::header(about, tar::EntryType::Directory, 0), at, io::empty())?)
    }

    fn file(&mut self, at: &Path, about: &Stat, file: File) -> Result<(), Wrong> {
        let size = size(about);
        self.measure.add(size)?;
        let mut exact = Exact { file: file.take(size), left: size, short: false };
        self.tar.append_data(&mut Self::header(about, tar::EntryType::Regular, size), at, &mut exact)?;
        // Half of what it was is not what it is.
        if exact.short { Err(Wrong::Busy(String::from("a file became shorter while it was read"))) } else { Ok(()) }
    }

    fn link(&mut self, at: &Path, about: &Stat, to: &Path) -> Result<(), Wrong> {
        self.measure.add(0)?;
        Ok(self.tar.append_link(&mut Self::header(about, tar::EntryType::Symlink, 0), at, to)?)
    }
}

fn size(about: &Stat) -> u64 {
    u64::try_from(about.st_size).unwrap_or(0)
}

/// As many bytes as were announced, whatever becomes of the file.
struct Exact {
    file: io::Take<File>,
    left: u64,
    short: bool,
}

impl Read for Exact {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(buf.len());
        let buf = &mut buf[..most];
        let mut n = self.file.read(buf)?;
        if n == 0 && most > 0 {
            self.short = true;
            buf.fill(0);
            n = most;
        }
        self.left -= n as u64;
        Ok(n)
    }
}

/// The roots that are there, opened, and what each of them is to the file system.
pub(super) struct Opened<'a> {
    roots: Vec<(&'a Root, OwnedFd)>,
    ids: Vec<(u64, u64)>,
}

impl<'a> Opened<'a> {
    pub(super) fn open(roots: &'a [Root]) -> io::Result<Opened<'a>> {
        let mut opened = Opened { roots: Vec::new(), ids: Vec::new() };
        for root in roots {
            match open_root(&root.path) {
                Ok(fd) => {
                    let about = rustix::fs::fstat(&fd)?;
                    opened.ids.push((about.st_dev, about.st_ino));
                    opened.roots.push((root, fd));
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(opened)
    }

    fn each(&self, names: &[String], visit: &mut dyn Visit) -> Result<(), Wrong> {
        let without = Without { names, roots: &self.ids };
        for (root, fd) in &self.roots {
            // A directory is read once: again from its beginning.
            let fd = rustix::fs::openat(fd, ".", OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
            walk(root, fd, &PathBuf::new(), &without, 0, visit)?;
        }
        Ok(())
    }

    /// Whether it is larger than it may be.
    pub(super) fn measure(&self, names: &[String], most: u64) -> Result<(), Wrong> {
        self.each(names, &mut Measure { most, ..Measure::default() })
    }

    pub(super) fn pack(&self, names: &[String], most: u64, out: impl Write) -> Result<(), Wrong> {
        let mut packer = Packer { tar: tar::Builder::new(out), measure: Measure { most, ..Measure::default() } };
        self.each(names, &mut packer)?;
        packer.tar.into_inner()?.flush()?;
        Ok(())
    }
}
