//! Where the wrappers of a container meet: a socket, and beside it a directory that nobody else can write to.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::FlockOperation;

use crate::conversation::Fetched;
use crate::files;
use crate::supervise::User;

use super::users::{self, Member};

/// Where `:9477` meets; other ports meet elsewhere.
const USUAL_PORT: u16 = 9477;
/// What the CLI is told of shared budgets, and all that is beside it: `RUN.hold`, and longer.
pub(super) const HOLD: &str = ".hold";
/// What a world leaves is kept for so long after it was last changed, and longer where it has spent from a month's budget, or
/// knows what is whose.
const LEFT: Duration = Duration::from_hours(24);
const LEFT_SPENT: Duration = Duration::from_hours(24 * 32);

/// What the configuration says of it.
#[derive(Clone, Debug)]
pub(crate) struct Meeting {
    pub(crate) socket: Option<PathBuf>,
    pub(crate) port: Option<u16>,
    pub(crate) state_dir: Option<PathBuf>,
    /// Where wrappers of several users meet one hub.
    pub(crate) users_dir: Option<PathBuf>,
}

/// See the module's head.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub(crate) socket: PathBuf,
    /// Where to be asked when another container, which sees the same files, has that one.
    pub(super) spare: Option<PathBuf>,
    /// Journals, the lock and the totals; ours alone, or the hub's group's, too.
    pub(crate) dir: PathBuf,
    /// Which container this is, where nobody has said where the state is to be kept: what another has left there is not ours.
    pub(crate) world: String,
    /// What ended agents have counted stays, also when nobody runs any more.
    pub(crate) keep: bool,
    /// Where a hub of several users says something to them.
    pub(super) door: Option<PathBuf>,
    /// We are one of those users: the hub alone serves.
    pub(super) guest: bool,
}

impl Place {
    /// # Errors
    /// There is no directory that would do.
    pub(crate) fn find(meeting: &Meeting) -> io::Result<Place> {
        Place::at(meeting, true)
    }

    /// The same, where others have met already. Changes nothing.
    ///
    /// # Errors
    /// There is none.
    pub(crate) fn look(meeting: &Meeting) -> io::Result<Place> {
        Place::at(meeting, false)
    }

    /// Whether a hub is there that serves this address. Changes nothing.
    pub(crate) fn serves(meeting: &Meeting, address: SocketAddr) -> bool {
        let served = |place: &Place| files::read_to_string(&place.address()).ok()?.trim().parse::<SocketAddr>().ok();
        let asked = |place: &Place| {
            [Some(&place.socket), place.spare.as_ref()].into_iter().flatten().any(|socket| UnixStream::connect(socket).is_ok())
        };
        let ours = |place: Place| served(&place) == Some(address) && asked(&place);
        Place::at(meeting, false).is_ok_and(ours)
    }

    /// Where a hub may be asked. Changes nothing.
    pub(crate) fn sockets(meeting: &Meeting) -> Vec<PathBuf> {
        match Place::at(meeting, false) {
            // Of two containers that see the same files, ours.
            Ok(Place { socket, spare, .. }) => spare.into_iter().chain([socket]).collect(),
            Err(_) => meeting.socket.clone().into_iter().collect(),
        }
    }

    fn at(meeting: &Meeting, make: bool) -> io::Result<Place> {
        let name = name_of(meeting);
        if let Some(place) = Place::guest(meeting, &name)? {
            return Ok(place);
        }
        if meeting.socket.is_none() && meeting.state_dir.is_none() {
            let place = Place::usual(&usual_dir(make)?, &name, &World::here());
            private(&place.dir, make)?;
            return Ok(place);
        }
        let socket = match &meeting.socket {
            Some(socket) => socket.clone(),
            None => usual_dir(make)?.join(name).with_extension("sock"),
        };
        let dir = match &meeting.state_dir {
            Some(volume) => {
                if make {
                    fs::create_dir_all(volume).map_err(|error| at(volume, &error))?;
                }
                volume.join("hub")
            }
            None => socket.with_extension("state"),
        };
        made_private(&dir, make)?;
        let keep = meeting.state_dir.is_some();
        Ok(Place { socket, spare: None, dir, world: String::new(), keep, door: None, guest: false })
    }

    /// Where a hub of several users expects us, if one does. Who keeps state elsewhere is not among them.
    fn guest(meeting: &Meeting, name: &str) -> io::Result<Option<Place>> {
        let Some(root) = meeting.users_dir.as_ref().filter(|_| meeting.state_dir.is_none()) else { return Ok(None) };
        let (key, world) = together(meeting, name);
        let found = users::find(root, &key)?;
        Ok(found.map(|(dir, door)| Place {
            socket: door.join("hub.sock"),
            spare: None,
            dir,
            world,
            keep: true,
            door: Some(door),
            guest: true,
        }))
    }

    /// The place of a hub that serves several users, made by root. Then we are the hub's user, for good.
    pub(crate) fn of_users(meeting: &Meeting, members: &[Member], hub: Option<&User>) -> io::Result<Place> {
        let name = name_of(meeting);
        let Some(root) = &meeting.users_dir else { return Err(io::ErrorKind::InvalidInput.into()) };
        if !rustix::process::geteuid().is_root() {
            let what = "only root can give directories to the users of `hub.users`: start it as root, and say in `hub.user` who it is to become";
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, what));
        }
        let (key, world) = together(meeting, &name);
        let ours = User::ours();
        let door = users::make(root, &key, members, hub.unwrap_or(&ours))?;
        if let Some(hub) = hub {
            hub.become_for_good()?;
        }
        users::make_orders(&door, members)?;
        let dir = match &meeting.state_dir {
            Some(volume) => volume.join("hub"),
            None => door.join("state"),
        };
        made_private(&dir, true)?;
        let socket = door.join("hub.sock");
        Ok(Place { socket, spare: None, dir, world, keep: true, door: Some(door), guest: false })
    }

    /// Containers may see the same files, and yet each has a port of its own: each has state of its own.
    fn usual(dir: &Path, name: &str, world: &World) -> Place {
        let ours = format!("{name}-{}", world.tag());
        Place {
            socket: dir.join(name).with_extension("sock"),
            spare: Some(dir.join(&ours).with_extension("sock")),
            dir: dir.join(&ours).with_extension("state"),
            world: world.text(),
            keep: false,
            door: None,
            guest: false,
        }
    }

    /// Removes what other worlds have left here, if they have ended.
    pub(super) fn tidy_worlds(&self) {
        let Some(beside) = self.dir.parent().filter(|_| self.spare.is_some()) else { return };
        let boot = World::here().boot_tag();
        for entry in fs::read_dir(beside).into_iter().flatten().flatten() {
            let dir = entry.path();
            let Some(tag) = dir.file_name().and_then(|name| tag_of(name.to_str()?)) else { continue };
            if dir == self.dir || tag.starts_with(&boot) && !is_left(&dir) {
                continue;
            }
            let lock = files::open(&dir.join("lock"), OpenOptions::new().write(true));
            // Nobody serves there, and so nobody runs.
            if lock.and_then(|file| Ok(try_lock(&file)?.then_some(file))).is_ok_and(|locked| locked.is_some()) {
                fs::remove_file(dir.with_extension("sock")).ok();
                fs::remove_dir_all(&dir).ok();
            }
        }
    }

    /// Where it stands when somebody has last read everything.
    pub(super) fn scraped(&self) -> PathBuf {
        self.told().join("scraped")
    }

    /// There when a hub without an agent serves here, or will again: with what it counts, counters go on.
    pub(super) fn kept(&self) -> PathBuf {
        self.dir.join("kept")
    }

    /// Whether counters go on when nobody runs.
    pub(super) fn keeps(&self) -> bool {
        self.keep || files::read_to_string(&self.kept()).is_ok_and(|world| world == self.world)
    }

    /// There while this wrapper's agent waits for a shared budget.
    pub(crate) fn hold_file(&self, run: &str) -> PathBuf {
        self.dir.join(format!("{run}{HOLD}"))
    }

    /// Says which container a conversation was brought into: no other that sees the same files.
    pub(crate) fn fetched(&self) -> Fetched {
        Fetched::new(Some(self.told().join("fetched")))
    }

    /// Where the hub before this one was served, for a port that was picked.
    pub(super) fn address(&self) -> PathBuf {
        self.told().join("address")
    }

    /// What the hub tells the wrappers.
    fn told(&self) -> &Path {
        self.door.as_ref().unwrap_or(&self.dir)
    }

    /// Writes what wrappers may look at, if they are another user's, too. Whoever waits for it waits for nothing else.
    pub(super) fn tell(&self, file: &Path, text: &str) {
        let told = files::write(file, text.as_bytes());
        if told.is_ok() && self.door.is_some() {
            fs::set_permissions(file, fs::Permissions::from_mode(0o644)).ok();
        }
    }

    /// Where what people ask of us is written: where we could not have written it, if the hub is another user.
    pub(super) fn orders(&self) -> PathBuf {
        match &self.door {
            Some(door) if self.guest => users::orders_of(door, rustix::process::geteuid().as_raw()),
            _ => self.dir.clone(),
        }
    }

    /// What others may do with files that are for the hub.
    pub(super) fn mode(&self) -> u32 {
        if self.guest { 0o640 } else { 0o600 }
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
        files::open(&self.dir.join("lock"), OpenOptions::new().write(true).create(true).truncate(false).mode(0o600))
    }
}

/// The lock of a journal whose wrapper is gone: nobody holds it, and it is still the one of that name. A wrapper that begins a new
/// file gives up the old one, and lives.
pub(super) fn lock_of_dead(path: &Path, file: &File) -> io::Result<bool> {
    Ok(try_lock(file)? && fs::symlink_metadata(path)?.ino() == file.metadata()?.ino())
}

/// Whether a lock was free, and is now ours.
pub(crate) fn try_lock(file: &File) -> io::Result<bool> {
    match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn name_of(meeting: &Meeting) -> String {
    match meeting.port {
        None | Some(USUAL_PORT) => String::from("hub"),
        Some(port) => format!("hub-{port}"),
    }
}

/// What those that belong together call their directory, and their world: a port's is its network's, a socket's its own.
fn together(meeting: &Meeting, name: &str) -> (String, String) {
    match &meeting.socket {
        Some(socket) => (format!("socket-{}", short(&socket.display().to_string())), String::new()),
        None => {
            let world = World::here();
            (format!("{name}-{}", world.tag()), world.text())
        }
    }
}

/// A port is one of a network namespace, and a container that starts again has a new one. Empty where that cannot be told.
struct World {
    boot: String,
    network: String,
}

/// Tells apart what is paid for on its own: a container, or a pod, for as long as it runs.
pub(super) fn world_tag() -> String {
    World::here().tag()
}

impl World {
    fn here() -> World {
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let network = fs::read_link("/proc/self/ns/net").unwrap_or_default();
        World { boot: boot.trim().to_owned(), network: network.display().to_string() }
    }

    fn text(&self) -> String {
        format!("{} {}", self.boot, self.network)
    }

    /// For names of files: first the boot, then the network.
    fn tag(&self) -> String {
        format!("{}{}", self.boot_tag(), short(&self.network))
    }

    fn boot_tag(&self) -> String {
        short(&self.boot)
    }
}

/// The same in every version: FNV-1a.
pub(super) fn short(text: &str) -> String {
    let hash = text.bytes().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    format!("{hash:08x}")
}

/// Of which world a directory is, by its name.
fn tag_of(name: &str) -> Option<&str> {
    let (_, tag) = name.strip_prefix("hub-")?.strip_suffix(".state").map(|name| name.rsplit_once('-').unwrap_or(("", name)))?;
    Some(tag).filter(|tag| tag.len() == 16 && tag.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

/// Whether nobody has come back to it for long.
fn is_left(dir: &Path) -> bool {
    let kept_for = if ["budgets.json", "tenants.json"].iter().any(|book| dir.join(book).exists()) { LEFT_SPENT } else { LEFT };
    let changed = fs::symlink_metadata(dir).and_then(|found| found.modified());
    changed.is_ok_and(|at| at.elapsed().is_ok_and(|age| age > kept_for))
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
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(at(dir, &error)),
            _ => {}
        }
    }
    let found = fs::symlink_metadata(dir).map_err(|error| at(dir, &error))?;
    if !found.is_dir() || found.uid() != rustix::process::geteuid().as_raw() || found.mode() & 0o077 != 0 {
        let what = format!("{} is not a directory of this user alone", dir.display());
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, what));
    }
    Ok(())
}

/// The same error, with where.
fn at(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// One that was named for us. Kubernetes gives volumes to a group (`fsGroup`), and new directories in them with it.
fn made_private(dir: &Path, make: bool) -> io::Result<()> {
    let Err(refused) = private(dir, make) else { return Ok(()) };
    // Not through a link, and not what others made.
    let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::DIRECTORY;
    let found = OpenOptions::new().read(true).custom_flags(flags.bits().cast_signed()).open(dir);
    let Ok(found) = found else { return Err(refused) };
    let what = found.metadata()?;
    if what.uid() != rustix::process::geteuid().as_raw() || what.mode() & 0o007 != 0 {
        return Err(refused);
    }
    if !make {
        return Ok(());
    }
    found.set_permissions(fs::Permissions::from_mode(0o700))?;
    private(dir, make)
}

fn writable(dir: &Path) -> io::Result<()> {
    Ok(rustix::fs::access(dir, rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK)?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("agent-sidecar-place-{name}-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        dir
    }

    #[test]
    fn a_directory_that_others_can_write_to_will_not_do() {
        let root = scratch("private");
        let meeting = |name: &str| Meeting { socket: Some(root.join(name)), port: None, state_dir: None, users_dir: None };
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
    fn what_is_ours_and_a_groups_is_made_ours_alone_where_it_was_named() {
        let root = scratch("group");
        let dir = root.join("hub");
        fs::create_dir(&dir).unwrap();
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o2770)).unwrap();
        assert!(private(&dir, true).is_err());
        Place::find(&Meeting { socket: None, port: None, state_dir: Some(root.clone()), users_dir: None }).unwrap();
        assert_eq!(fs::metadata(&dir).unwrap().mode() & 0o777, 0o700);
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn containers_that_see_the_same_files_have_state_of_their_own_and_leave_none() {
        let root = scratch("worlds");
        let world = |boot: &str, network: &str| World { boot: boot.to_owned(), network: network.to_owned() };
        let boot = World::here().boot;
        let [ours, beside, before] = [world(&boot, "a"), world(&boot, "b"), world("long ago", "a")].map(|world| {
            let place = Place::usual(&root, "hub-9478", &world);
            private(&place.dir, true).unwrap();
            place.lock().unwrap();
            place
        });
        assert_eq!(ours.socket, beside.socket);
        assert_ne!((&ours.dir, &ours.spare), (&beside.dir, &beside.spare));
        assert_ne!(ours.dir, before.dir);
        let held = before.lock().unwrap();
        ours.tidy_worlds();
        assert!(before.dir.exists(), "somebody runs there");
        drop(held);
        ours.tidy_worlds();
        assert!(!before.dir.exists());
        assert!(ours.dir.exists() && beside.dir.exists(), "both of this boot");
        let old = std::time::SystemTime::now() - LEFT * 2;
        let age = || File::open(&beside.dir).unwrap().set_modified(old).unwrap();
        fs::write(beside.dir.join("budgets.json"), "").unwrap();
        age();
        ours.tidy_worlds();
        assert!(beside.dir.exists(), "a month's budget is not over");
        fs::remove_file(beside.dir.join("budgets.json")).unwrap();
        age();
        ours.tidy_worlds();
        assert!(!beside.dir.exists());
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn a_journal_that_was_begun_anew_is_not_that_of_a_dead_wrapper() {
        let root = scratch("dead");
        let path = root.join("a.jsonl");
        fs::write(&path, "").unwrap();
        let before = File::open(&path).unwrap();
        let new = File::create(root.join("a.new")).unwrap();
        assert!(try_lock(&new).unwrap());
        fs::rename(root.join("a.new"), &path).unwrap();
        assert!(!lock_of_dead(&path, &before).unwrap(), "locked, and no longer of that name");
        assert!(!lock_of_dead(&path, &File::open(&path).unwrap()).unwrap());
        drop(new);
        assert!(lock_of_dead(&path, &File::open(&path).unwrap()).unwrap());
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn there_is_one_hub_at_a_time() {
        let root = scratch("lock");
        let place =
            Place::find(&Meeting { socket: Some(root.join("a.sock")), port: None, state_dir: None, users_dir: None }).unwrap();
        let first = place.lock().unwrap();
        assert!(first.is_some());
        assert!(place.lock().unwrap().is_none());
        let next = std::thread::spawn(move || place.wait().is_ok());
        drop(first);
        assert!(next.join().unwrap());
        fs::remove_dir_all(root).unwrap();
    }
}
