//! How much the agent keeps on disk, and how much room is left: looked at seldom, by threads that nobody waits for.
//!
//! A thread for each directory: a file system that hangs takes one of them with it, and nothing else. Links are not followed, other file
//! systems not entered; a tree that is too large is looked at in part, and that is counted. What is on a network is not walked: there each
//! look is a request, and somebody pays for it.

use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use agent_sidecar_core::metric::{DISK_BYTES, DISK_FILES, DISK_FREE, DISK_SCANS_CUT, DISK_USED, Meters, TRANSCRIPT_BYTES};
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags};

use crate::http::visit_blocking;
use crate::supervise::{Handle, NICE};
use crate::tenants::Places;

/// Of the room that is left. The first look is soon, so that a short run has one.
const EVERY: Duration = Duration::from_secs(15);
const FIRST: Duration = Duration::from_millis(500);
/// A walk takes at most a hundredth of the time, whatever was set.
const SHARE: u32 = 100;
/// The bounds of one walk: entries, time, and directories that wait to be looked into.
const ENTRIES: u64 = 200_000;
const TIME: Duration = Duration::from_secs(5);
const WAITING: usize = 20_000;
/// The place of this agent among those of its container: see the registry.
const SLOT: &str = "0";
/// File systems whose files are elsewhere.
const REMOTE: &[&str] = &["9p", "afs", "beegfs", "ceph", "cifs", "fuse", "gfs2", "glusterfs", "lustre", "nfs", "smb"];

/// A directory, and what it is for.
#[derive(Clone, Debug)]
struct Watched {
    name: &'static str,
    path: PathBuf,
    /// Whether it is the agent's own: then its size is of interest.
    interval: Option<Duration>,
    /// Where transcripts are looked for.
    places: Option<Places>,
}

/// Measures for as long as there is a monitor.
pub(crate) fn measure_for_ever(places: &Places, tmp: PathBuf, interval: Option<Duration>, handle: &Handle) {
    let config = places.config.clone().map(|path| Watched { name: "config", path, interval, places: Some(places.clone()) });
    let workspace = Watched { name: "workspace", path: places.cwd.clone(), interval, places: None };
    let tmp = Watched { name: "tmp", path: tmp, interval: None, places: None };
    for watched in [Some(workspace), config, Some(tmp)].into_iter().flatten() {
        let handle = handle.clone();
        let thread = std::thread::Builder::new().name(String::from("disk")).stack_size(256 * 1024);
        if let Err(error) = thread.spawn(move || measure(&watched, &handle)) {
            tracing::warn!(%error, "the room on disk is not measured");
        }
    }
}

fn measure(watched: &Watched, handle: &Handle) {
    // Refused nowhere, and without it all is as right.
    rustix::process::nice(NICE).ok();
    std::thread::sleep(FIRST);
    let mut next = Instant::now();
    loop {
        let kind = file_system(&watched.path);
        // A reader in user space may leave the kernel waiting, and with it our end.
        let room = if kind.starts_with("fuse") { None } else { room(&watched.path) };
        let due = watched.interval.filter(|_| next <= Instant::now() && !is_remote(&kind));
        let size = due.and_then(|interval| {
            let began = Instant::now();
            let size = size(&watched.path, ENTRIES, TIME);
            next = Instant::now() + interval.max(began.elapsed() * SHARE);
            size
        });
        let transcript = due.and_then(|_| transcript(watched, handle));
        let name = watched.name;
        let told = handle.visit(move |monitor, _| {
            let meters = monitor.meters_mut();
            if let Some((used, free)) = room {
                set(meters, &DISK_USED, &[name], used);
                set(meters, &DISK_FREE, &[name], free);
            }
            if let Some(size) = size {
                set(meters, &DISK_BYTES, &[SLOT, name], size.bytes);
                set(meters, &DISK_FILES, &[SLOT, name], size.files);
                meters.add(&DISK_SCANS_CUT, &[name], u64::from(size.cut));
            }
            if let Some(bytes) = transcript {
                set(meters, &TRANSCRIPT_BYTES, &[SLOT], bytes);
            }
        });
        if !told {
            return;
        }
        std::thread::sleep(EVERY.min(watched.interval.unwrap_or(EVERY)));
    }
}

#[expect(clippy::cast_precision_loss, reason = "gauges speak in floats")]
fn set(meters: &mut Meters, metric: &'static agent_sidecar_core::metric::Metric, values: &[&str], n: u64) {
    meters.set(metric, values, n as f64);
}

/// Of the session that goes on.
fn transcript(watched: &Watched, handle: &Handle) -> Option<u64> {
    let project = watched.places.as_ref()?.project()?;
    let session =
        visit_blocking(handle, |monitor, _| monitor.report().current().and_then(|session| session.session_id.clone()))??;
    // It comes from the CLI, and names a file.
    let plain = session.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    let found = std::fs::symlink_metadata(project.join(format!("{session}.jsonl")).as_path());
    found.ok().filter(|found| plain && found.is_file()).map(|found| found.len())
}

/// Used and free on the file system of a path; of one that is not there yet, where it will be.
fn room(path: &Path) -> Option<(u64, u64)> {
    let stat = path.ancestors().find_map(|path| rustix::fs::statvfs(path).ok())?;
    let used = stat.f_blocks.saturating_sub(stat.f_bfree).saturating_mul(stat.f_frsize);
    Some((used, stat.f_bavail.saturating_mul(stat.f_frsize)))
}

/// What a directory and all below it take on disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Size {
    bytes: u64,
    files: u64,
    /// It has more than was looked at.
    cut: bool,
}

fn size(root: &Path, entries: u64, time: Duration) -> Option<Size> {
    let began = Instant::now();
    // The root itself may be a link: whoever named it meant what it leads to.
    let top = rustix::fs::open(root, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).ok()?;
    let device = rustix::fs::fstat(&top).ok()?.st_dev;
    let (mut size, mut seen, mut left) = (Size::default(), HashSet::new(), entries);
    let mut waiting: Vec<PathBuf> = Vec::new();
    let mut next = Some((root.to_owned(), top));
    while let Some((path, dir)) = next {
        if !look_into(&path, dir, device, &mut size, &mut seen, &mut waiting, &mut left) {
            size.cut = true;
        }
        if left == 0 || began.elapsed() > time {
            size.cut |= !waiting.is_empty();
            break;
        }
        next = None;
        while next.is_none()
            && let Some(path) = waiting.pop()
        {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            // Gone, or not for us.
            let Ok(dir) = rustix::fs::open(&path, flags, Mode::empty()) else { continue };
            // Replaced meanwhile by somebody who would like us elsewhere.
            if rustix::fs::fstat(&dir).is_ok_and(|found| found.st_dev == device) {
                next = Some((path, dir));
            }
        }
    }
    Some(size)
}

/// Adds one directory up, without those below. False if not all of it was looked at.
fn look_into(
    path: &Path,
    dir: OwnedFd,
    device: u64,
    size: &mut Size,
    seen: &mut HashSet<u64>,
    waiting: &mut Vec<PathBuf>,
    left: &mut u64,
) -> bool {
    let Ok(mut entries) = Dir::read_from(&dir) else { return false };
    let mut whole = true;
    while let Some(Ok(entry)) = entries.read() {
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        if *left == 0 {
            return false;
        }
        *left -= 1;
        let Ok(found) = rustix::fs::statat(&dir, name, AtFlags::SYMLINK_NOFOLLOW) else { continue };
        // A file with several names takes its room once.
        let again =
            found.st_nlink > 1 && FileType::from_raw_mode(found.st_mode) == FileType::RegularFile && !seen.insert(found.st_ino);
        if found.st_dev != device || again {
            continue;
        }
        size.bytes = size.bytes.saturating_add(u64::try_from(found.st_blocks).unwrap_or(0).saturating_mul(512));
        if FileType::from_raw_mode(found.st_mode) != FileType::Directory {
            size.files += 1;
        } else if waiting.len() < WAITING {
            use std::os::unix::ffi::OsStrExt;
            waiting.push(path.join(std::ffi::OsStr::from_bytes(name.to_bytes())));
        } else {
            whole = false;
        }
    }
    whole
}

fn is_remote(kind: &str) -> bool {
    REMOTE.iter().any(|remote| kind.starts_with(remote))
}

/// The type of the file system that a path is on, from what the kernel lists: without asking the file system itself, which may hang.
fn file_system(path: &Path) -> String {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    mounted(&std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default(), &path)
}

fn mounted(mounts: &str, path: &Path) -> String {
    let parsed = mounts.lines().filter_map(|line| {
        let (place, kind) = line.split_once(" - ")?;
        // Spaces are written so.
        let at = place.split(' ').nth(4)?.replace("\\040", " ");
        Some((at, kind.split(' ').next()?))
    });
    // Of two at the same place the later one covers the other.
    let found = parsed.filter(|(at, _)| path.starts_with(at)).max_by_key(|(at, _)| at.len());
    found.map_or_else(String::new, |(_, kind)| kind.to_owned())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, symlink};

    use super::*;

    #[test]
    fn a_directory_is_added_up_without_links_and_not_for_ever() {
        let root = std::env::temp_dir().join(format!("agent-sidecar-disk-{}", std::process::id()));
        fs::create_dir_all(root.join("a/b")).unwrap();
        fs::write(root.join("a/one"), vec![7; 100_000]).unwrap();
        fs::write(root.join("a/b/two"), vec![7; 50_000]).unwrap();
        fs::hard_link(root.join("a/one"), root.join("again")).unwrap();
        symlink("/usr", root.join("far")).unwrap();
        symlink(&root, root.join("a/round")).unwrap();
        let long = Duration::from_secs(60);
        let found = size(&root, ENTRIES, long).unwrap();
        let blocks = |name: &str| fs::symlink_metadata(root.join(name)).unwrap().blocks() * 512;
        let expected: u64 = ["a", "a/b", "a/one", "a/b/two", "far", "a/round"].into_iter().map(blocks).sum();
        assert_eq!(found, Size { bytes: expected, files: 4, cut: false });
        assert_eq!(size(&root.join("a"), ENTRIES, long).unwrap().files, 3);
        let cut = size(&root, 3, long).unwrap();
        assert!(cut.cut && cut.bytes <= expected, "{cut:?}");
        assert!(size(&root, ENTRIES, Duration::ZERO).unwrap().cut);
        assert_eq!(size(&root.join("none"), ENTRIES, long), None);
        assert!(room(&root.join("not/there/yet")).unwrap().1 > 0);
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn other_file_systems_are_not_entered() {
        // /proc is one of its own everywhere, and without end.
        let found = size(Path::new("/"), 5_000, Duration::from_secs(60)).unwrap();
        assert!(found.cut);
        let Ok(proc) = rustix::fs::stat("/proc") else { return };
        let (mut size, mut waiting) = (Size::default(), Vec::new());
        let root = rustix::fs::open("/", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).unwrap();
        let device = rustix::fs::fstat(&root).unwrap().st_dev;
        assert_ne!(proc.st_dev, device);
        look_into(Path::new("/"), root, device, &mut size, &mut HashSet::new(), &mut waiting, &mut 10_000);
        assert!(!waiting.is_empty() && !waiting.contains(&PathBuf::from("/proc")), "{waiting:?}");
    }

    #[test]
    fn what_is_on_a_network_is_known_without_asking_it() {
        let mounts = "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n\
                      30 22 0:40 / /srv rw - nfs4 server:/x rw\n\
                      31 30 0:41 / /srv/local\\040disk rw - ext4 /dev/sdb rw\n\
                      32 22 0:42 / /over rw - ext4 /dev/sdc rw\n\
                      33 22 0:43 / /over rw - fuse.sshfs x rw\n";
        for (path, kind, remote) in [
            ("/srv2/a", "ext4", false),
            ("/srv/a", "nfs4", true),
            ("/srv/local disk/a", "ext4", false),
            ("/over/a", "fuse.sshfs", true),
        ] {
            let found = mounted(mounts, Path::new(path));
            assert_eq!((found.as_str(), is_remote(&found)), (kind, remote), "{path}");
        }
        assert!(!file_system(&std::env::temp_dir()).is_empty());
    }
}
