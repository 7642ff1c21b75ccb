//! Where the wrappers of a container meet: a socket, and beside it a directory that nobody else can write to.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;

/// Where `:9477` meets; other ports meet elsewhere.
const USUAL_PORT: u16 = 9477;

/// What the configuration says of it.
#[derive(Clone, Debug)]
pub(crate) struct Meeting {
    pub(crate) socket: Option<PathBuf>,
    pub(crate) port: Option<u16>,
    pub(crate) state_dir: Option<PathBuf>,
}

/// See the module's head.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub(crate) socket: PathBuf,
    /// Journals, the lock and the totals; ours alone.
    pub(crate) dir: PathBuf,
    /// Which container this is, where nobody has said where the state is to be kept: what another has left there is not ours.
    pub(crate) world: String,
    /// What ended agents have counted stays, also when nobody runs any more.
    pub(crate) keep: bool,
}

impl Place {
    /// # Errors
    /// There is no directory that would do.
    pub(crate) fn find(meeting: &Meeting) -> io::Result<Place> {
        Place::at(meeting, true)
    }

    /// Whether a hub is there that serves this address. Changes nothing.
    pub(crate) fn serves(meeting: &Meeting, address: SocketAddr) -> bool {
        let served = |place: &Place| fs::read_to_string(place.address()).ok()?.trim().parse::<SocketAddr>().ok();
        let ours = |place: Place| served(&place) == Some(address) && UnixStream::connect(&place.socket).is_ok();
        Place::at(meeting, false).is_ok_and(ours)
    }

    fn at(meeting: &Meeting, make: bool) -> io::Result<Place> {
        let socket = match &meeting.socket {
            Some(socket) => socket.clone(),
            None => {
                let name = match meeting.port {
                    None | Some(USUAL_PORT) => String::from("hub.sock"),
                    Some(port) => format!("hub-{port}.sock"),
                };
                usual_dir(make)?.join(name)
            }
        };
        let dir = match &meeting.state_dir {
            Some(volume) => {
                if make {
                    fs::create_dir_all(volume)?;
                }
                volume.join("hub")
            }
            None => socket.with_extension("state"),
        };
        private(&dir, make)?;
        let named = meeting.socket.is_some() || meeting.state_dir.is_some();
        let world = if named { String::new() } else { world() };
        Ok(Place { socket, dir, world, keep: meeting.state_dir.is_some() })
    }

    /// Where it stands when somebody has last read everything.
    pub(super) fn scraped(&self) -> PathBuf {
        self.dir.join("scraped")
    }

    /// There when a hub without an agent serves here, or will again: with what it counts, counters go on.
    pub(super) fn kept(&self) -> PathBuf {
        self.dir.join("kept")
    }

    /// There while this wrapper's agent waits for a shared budget.
    pub(crate) fn hold_file(&self, run: &str) -> PathBuf {
        self.dir.join(format!("{run}.hold"))
    }

    /// Where the hub before this one was served, for a port that was picked.
    pub(super) fn address(&self) -> PathBuf {
        self.dir.join("address")
    }

    /// The hub's lock, if nobody has it.
    pub(super) fn lock(&self) -> io::Result<Option<File>> {
        let file = self.open_lock()?;
        Ok(try_lock(&file)?.then_some(file))
    }

    /// The hub's lock, when it is our turn.
    pub(super) fn wait(&self) -> io::Result<File> {
        let file = self.open_lock()?;
        loop {
            match rustix::fs::flock(&file, FlockOperation::LockExclusive) {
                Err(rustix::io::Errno::INTR) => {}
                done => return Ok(done.map(|()| file)?),
            }
        }
    }

    fn open_lock(&self) -> io::Result<File> {
        OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(self.dir.join("lock"))
    }
}

/// Whether a lock was free, and is now ours.
pub(super) fn try_lock(file: &File) -> io::Result<bool> {
    match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// A port is one of a network namespace, and a container that starts again has a new one. Nothing where that cannot be told.
fn world() -> String {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let network = fs::read_link("/proc/self/ns/net").unwrap_or_default();
    format!("{} {}", boot.trim(), network.display())
}

fn usual_dir(make: bool) -> io::Result<PathBuf> {
    let uid = rustix::process::geteuid().as_raw();
    let runtime =
        std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty()).map(|dir| Path::new(&dir).join("agent-sidecar"));
    let candidates = [
        Some(PathBuf::from("/run/agent-sidecar")),
        runtime,
        Some(PathBuf::from(format!("/tmp/agent-sidecar-{uid}"))),
        // A read-only root: this one is always there.
        Some(PathBuf::from(format!("/dev/shm/agent-sidecar-{uid}"))),
    ];
    let mut last = io::Error::from(io::ErrorKind::NotFound);
    for dir in candidates.into_iter().flatten() {
        match private(&dir, make).and_then(|()| writable(&dir)) {
            Ok(()) => return Ok(dir),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Makes the directory, if it may, or finds it ours: what others could write there would be believed.
fn private(dir: &Path, make: bool) -> io::Result<()> {
    if make {
        match DirBuilder::new().mode(0o700).create(dir) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
    }
    let found = fs::symlink_metadata(dir)?;
    if !found.is_dir() || found.uid() != rustix::process::geteuid().as_raw() || found.mode() & 0o077 != 0 {
        let what = format!("{} is not a directory of this user alone", dir.display());
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, what));
    }
    Ok(())
}

fn writable(dir: &Path) -> io::Result<()> {
    Ok(rustix::fs::access(dir, rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK)?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("agent-sidecar-place-{name}-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        dir
    }

    #[test]
    fn a_directory_that_others_can_write_to_will_not_do() {
        let root = scratch("private");
        let meeting = |name: &str| Meeting { socket: Some(root.join(name)), port: None, state_dir: None };
        let place = Place::find(&meeting("a.sock")).unwrap();
        assert_eq!(fs::metadata(&place.dir).unwrap().mode() & 0o777, 0o700);
        assert!(Place::find(&meeting("a.sock")).is_ok(), "it is there already, and ours");
        fs::create_dir(root.join("b.state")).unwrap();
        fs::set_permissions(root.join("b.state"), fs::Permissions::from_mode(0o777)).unwrap();
        assert!(Place::find(&meeting("b.sock")).is_err());
        symlink(&place.dir, root.join("c.state")).unwrap();
        assert!(Place::find(&meeting("c.sock")).is_err(), "a link is somebody's idea");
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn there_is_one_hub_at_a_time() {
        let root = scratch("lock");
        let place = Place::find(&Meeting { socket: Some(root.join("a.sock")), port: None, state_dir: None }).unwrap();
        let first = place.lock().unwrap();
        assert!(first.is_some());
        assert!(place.lock().unwrap().is_none());
        let next = std::thread::spawn(move || place.wait().is_ok());
        drop(first);
        assert!(next.join().unwrap());
        fs::remove_dir_all(root).unwrap();
    }
}
