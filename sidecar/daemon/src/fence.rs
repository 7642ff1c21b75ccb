//! What stands between the agent and us where the CLI runs as another user, and what it leaves open.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crate::config::Config;
use crate::supervise::User;

/// Whether whoever must not can change the file that our settings come from: the agent, or everybody. An agent that runs as root can
/// change everything, and then it is no news.
pub(crate) fn config_is_open(config: &Config, agent: &User) -> bool {
    let stranger = User::stranger();
    let reader = if agent.is_root() { &stranger } else { agent };
    config.file().is_some_and(|file| reader.may_change(file))
}

/// Says what of ours an agent of another user could change all the same.
pub(crate) fn check(config: &Config, agent: &User) {
    for (key, path) in config.own_paths().into_iter().filter(|(_, path)| agent.may_change(path)) {
        tracing::warn!(
            path = %path.display(),
            "the agent's user may change or replace what `{key}` names; choose a place where only the sidecar's user may write"
        );
    }
}

/// Where the CLI of another user looks whether it is to turn messages away. It may look, and nothing else.
pub(crate) struct HoldDir(PathBuf);

impl HoldDir {
    /// `/run` first: in the others anybody may be in the way, though nobody can take away what is ours.
    pub(crate) fn make(run: &str) -> io::Result<HoldDir> {
        let mut last = io::Error::from(io::ErrorKind::NotFound);
        for place in ["/run", "/tmp", "/dev/shm"] {
            let dir = Path::new(place).join(format!("agent-sidecar-hold-{run}"));
            // Made by nobody else, and no link: it must not have been there.
            match DirBuilder::new()
                .mode(0o700)
                .create(&dir)
                .and_then(|()| fs::set_permissions(&dir, Permissions::from_mode(0o755)))
            {
                Ok(()) => return Ok(HoldDir(dir)),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    pub(crate) fn file(&self) -> PathBuf {
        self.0.join("hold")
    }
}

impl Drop for HoldDir {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).ok();
    }
}
