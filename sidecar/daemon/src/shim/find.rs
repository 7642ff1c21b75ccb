//! Which file is the real CLI, and which is one of us.

use std::ffi::{OsStr, OsString};
use std::fs::{File, Metadata, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Access, OFlags};

use super::NAMES;

/// What the name of a CLI is followed by once a shim has its place. Nobody else calls a file so: what is there is ours to replace.
pub(super) const REAL: &str = ".sidecar-real";
/// In every edition of this program, and in nothing else: how one copy knows another. It must never change.
const MARK: &[u8] = b"agent-sidecar, which stands before the CLI and is not the CLI: 6b1f0d52-c8a9-4e37-9d52-1f7be3c00a64";
/// Ten times a copy of us; what is larger is not read to find out. The CLI itself has 240 MB and more.
const LARGEST: u64 = 96 * 1024 * 1024;

/// Where `install` puts the CLI that stood at `path`.
pub(super) fn beside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(REAL);
    name.into()
}

/// The CLI behind a shim that was started as `called`: what stands beside it, by this name or where the links end, or else the first on
/// PATH that is none of us.
pub(super) fn real(called: &Path) -> Option<PathBuf> {
    let places = |shim: &Path| [Some(shim.to_owned()), shim.canonicalize().ok()].into_iter().flatten().map(|shim| beside(&shim));
    let behind = |shim: &Path| places(shim).find(|real| runs(real) && !is_self(real));
    let on_path = || {
        let path = std::env::var_os("PATH").unwrap_or_default();
        // A relative entry is the agent's working directory, which holds whatever the agent was given.
        let dirs = std::env::split_paths(&path).filter(|dir| dir.is_absolute()).collect::<Vec<_>>();
        let found = dirs.iter().map(|dir| dir.join(NAMES[0])).filter(|file| runs(file));
        found.into_iter().find_map(|file| if is_sidecar(&file) { behind(&file) } else { Some(file) })
    };
    // One that is there and does not run: why, the kernel says best.
    let unfit = || places(called).find(|real| real.symlink_metadata().is_ok() && !is_sidecar(real));
    behind(called).or_else(on_path).or_else(unfit)
}

/// A file that this user may execute.
pub(super) fn runs(path: &Path) -> bool {
    path.metadata().is_ok_and(|file| file.is_file()) && rustix::fs::access(path, Access::EXEC_OK).is_ok()
}

/// Whether it is this program, of whatever version.
pub(crate) fn is_sidecar(path: &Path) -> bool {
    if is_self(path) {
        return true;
    }
    let Some(mut file) = open(path) else { return false };
    let mut head = [0; 4];
    if !file.metadata().is_ok_and(|file| file.len() <= LARGEST) || file.read_exact(&mut head).is_err() || head != *b"\x7fELF" {
        return false;
    }
    let mut rest = Vec::new();
    file.take(LARGEST).read_to_end(&mut rest).is_ok() && memchr::memmem::find(&rest, MARK).is_some()
}

/// The very file that this process runs.
fn is_self(path: &Path) -> bool {
    let id = |path: &Path| path.metadata().map(|file| (file.dev(), file.ino())).ok();
    id(path).is_some_and(|file| id(Path::new("/proc/self/exe")) == Some(file))
}

/// Starts with the name of an interpreter: it may lead anywhere.
pub(super) fn is_script(path: &Path) -> bool {
    let mut head = [0; 2];
    open(path).is_some_and(|mut file| file.read_exact(&mut head).is_ok()) && head == *b"#!"
}

/// A file, and nothing else: a pipe that is called like one has no end, and a device may do something when it is opened.
fn open(path: &Path) -> Option<File> {
    let is_file = |file: &Metadata| file.is_file();
    path.metadata().ok().filter(is_file)?;
    // It may be another one by now.
    let file = OpenOptions::new().read(true).custom_flags(OFlags::NONBLOCK.bits().cast_signed()).open(path).ok()?;
    file.metadata().ok().filter(is_file)?;
    Some(file)
}

/// In `<name>`'s directory, hidden, for as long as it is not complete.
pub(super) fn unfinished(path: &Path, what: &str) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(path.file_name().unwrap_or(OsStr::new(NAMES[0])));
    name.push(".agent-sidecar-");
    name.push(what);
    path.with_file_name(name)
}
