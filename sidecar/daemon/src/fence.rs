//! What stands between the agent and us where the CLI runs as another user, and what it leaves open.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, OFlags};

use crate::supervise::User;

/// Whether whoever must not can change the file that our settings come from: the agent, or everybody. An agent that runs as root can
/// change everything, and then it is no news.
pub(crate) fn is_open(file: &Path, agent: &User) -> bool {
    let stranger = User::stranger();
    let reader = if agent.is_root() { &stranger } else { agent };
    reader.may_change(file)
}

/// Says what of ours an agent of another user could change all the same.
pub(crate) fn check(paths: Vec<(&'static str, PathBuf)>, agent: &User) {
    for (key, path) in paths.into_iter().filter(|(_, path)| agent.may_change(path)) {
        tracing::warn!(
            path = %path.display(),
            "the agent's user may change or replace what `{key}` names; choose a place where only the sidecar's user may write"
        );
    }
}

/// Where the CLI of another user looks whether it is to turn messages away. It may look, and nothing else.
pub(crate) struct HoldDir {
    path: PathBuf,
    /// Held while we live: who finds it free finds what somebody who was killed has left.
    _lock: File,
}

const HOLD: &str = "agent-sidecar-hold-";
/// Whoever else uses such a place may have filled it: no more of it is looked at.
const LOOKED_AT: usize = 10_000;

impl HoldDir {
    /// `/run` first: in the others anybody may be in the way, though nobody can take away what is ours.
    pub(crate) fn make(run: &str) -> io::Result<HoldDir> {
        let mut last = io::Error::from(io::ErrorKind::NotFound);
        for place in ["/run", "/tmp", "/dev/shm"] {
            match HoldDir::at(Path::new(place), run) {
                Ok(dir) => return Ok(dir),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    fn at(place: &Path, run: &str) -> io::Result<HoldDir> {
        tidy(place);
        let path = place.join(format!("{HOLD}{run}"));
        // Made by nobody else, and no link: it must not have been there.
        DirBuilder::new().mode(0o700).create(&path)?;
        let lock = directory(&path)?;
        rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive)?;
        // Others may look only now, when nobody who tidies can take it for left.
        fs::set_permissions(&path, Permissions::from_mode(0o755))?;
        Ok(HoldDir { path, _lock: lock })
    }

    pub(crate) fn file(&self) -> PathBuf {
        self.path.join("hold")
    }
}

/// Removes what others of this user have left here who were killed.
fn tidy(place: &Path) {
    let us = rustix::process::geteuid().as_raw();
    for entry in fs::read_dir(place).into_iter().flatten().flatten().take(LOOKED_AT) {
        if !entry.file_name().to_str().is_some_and(|name| name.starts_with(HOLD)) {
            continue;
        }
        // One that is not open to others yet is being made.
        let left = entry.metadata().is_ok_and(|dir| dir.is_dir() && dir.uid() == us && dir.mode() & 0o777 == 0o755);
        // What is not ours is not opened: it may be a pipe that nobody writes to.
        let lock = if left { directory(&entry.path()).ok() } else { None };
        if lock.is_some_and(|lock| rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok()) {
            fs::remove_dir_all(entry.path()).ok();
        }
    }
}

fn directory(path: &Path) -> io::Result<File> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    OpenOptions::new().read(true).custom_flags(flags.bits().cast_signed()).open(path)
}

impl Drop for HoldDir {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.path).ok();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_somebody_who_was_killed_has_left_is_removed_and_nothing_else() {
        let root = std::env::temp_dir().join(format!("agent-sidecar-fence-{}", std::process::id()));
        fs::create_dir_all(&root).unwrap();
        let lives = HoldDir::at(&root, "a").unwrap();
        let left = root.join(format!("{HOLD}b"));
        let fresh = root.join(format!("{HOLD}c"));
        for (dir, mode) in [(&left, 0o755), (&fresh, 0o700)] {
            fs::create_dir(dir).unwrap();
            fs::set_permissions(dir, Permissions::from_mode(mode)).unwrap();
        }
        fs::write(left.join("hold"), "").unwrap();
        // Anybody can leave one in /tmp; whoever opened it would wait for ever.
        let pipe = root.join(format!("{HOLD}zz"));
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0).unwrap();
        fs::set_permissions(&pipe, Permissions::from_mode(0o755)).unwrap();
        tidy(&root);
        assert!(pipe.exists());
        assert!(lives.path.exists() && fresh.exists() && !left.exists());
        assert!(HoldDir::at(&root, "a").is_err(), "it must not have been there");
        let file = lives.file();
        fs::write(&file, "").unwrap();
        drop(lives);
        assert!(!file.exists());
        fs::remove_dir_all(root).unwrap();
    }
}
