//! Who serves: whoever holds the lock. The others wait for it, asleep in the kernel.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::WaitOptions;

use super::desk::{All, Desk, Options, Sees};
use super::share::Share;
use super::{Place, shelf};
use crate::files;
use crate::http::{self, Bound};
use crate::patrol::Patrol;
use crate::supervise::{CHLD, HUP, INT, NICE, TERM};

/// How often the journals of those that ended are taken in when nobody asks for anything.
const TIDY: Duration = Duration::from_secs(1);
/// The hub before us may still be on its way out, and its port with it.
const AGAIN: Duration = Duration::from_millis(50);
/// Later, a port that somebody else has.
const RARELY: Duration = Duration::from_secs(1);
/// Threads are kept for as long as anybody serves.
const FOR_EVER: Duration = Duration::from_hours(24 * 365);
/// So many looks at its socket, and it does not leave.
const LEAVES: u32 = 20;

/// A wrapper's turn to serve: now, or when it comes.
pub(crate) struct Turn {
    place: Place,
    address: Option<SocketAddr>,
    now: Option<(fs::File, Option<Bound>)>,
}

impl Turn {
    /// Takes the lock if it is free, and then binds the address. What cannot be bound is said, and tried again later.
    pub(crate) fn take(place: Place, address: Option<SocketAddr>) -> std::io::Result<Turn> {
        if place.guest {
            if std::os::unix::net::UnixStream::connect(&place.socket).is_err() {
                tracing::warn!(
                    socket = %place.socket.display(),
                    "the hub that serves several users does not answer; it shows what was counted when it is back"
                );
            }
            return Ok(Turn { place, address: None, now: None });
        }
        let lock = place.lock()?;
        if lock.is_some() {
            shelf::begin_anew(&place)?;
        }
        if lock.is_some() {
            place.tidy_worlds();
        }
        let now = lock.map(|lock| {
            let bound = address.and_then(|address| match bind(&place, address) {
                Ok(bound) => Some(bound),
                Err(error) => {
                    tracing::warn!(%address, %error, "metrics are not served; choose another address with --listen, or off");
                    None
                }
            });
            (lock, bound)
        });
        if now.is_none() {
            tracing::info!(socket = %place.socket.display(), "a hub of this container serves the metrics");
        }
        Ok(Turn { place, address, now })
    }

    /// Whether the address was to be served, and is somebody else's.
    pub(crate) fn is_deaf(&self) -> bool {
        self.address.is_some() && matches!(self.now, Some((_, None)))
    }

    pub(crate) fn place(&self) -> &Place {
        &self.place
    }

    /// Serves as soon as it is our turn, on a thread of its own, until the process ends.
    pub(crate) fn attend(self, options: Options, own: Share) -> std::io::Result<()> {
        // Nobody serves what is another user's.
        if self.place.guest {
            return Ok(());
        }
        std::thread::Builder::new().name(String::from("hub")).stack_size(512 * 1024).spawn(move || {
            // The start of the agent goes first: refused nowhere, and without it all is as right.
            rustix::process::nice(NICE).ok();
            if let Err(error) = self.serve(&options, Some(own)) {
                tracing::error!(%error, "this wrapper cannot serve the others; the agent goes on");
            }
        })?;
        Ok(())
    }

    fn serve(self, options: &Options, own: Option<Share>) -> std::io::Result<()> {
        let Turn { place, address, now } = self;
        // Kept until the process ends.
        let (_lock, bound) = match now {
            Some(now) => now,
            None => (place.wait()?, None),
        };
        let desk = Arc::new(Desk::open(&place, options, own.clone()));
        if let Some(fleet) = &options.fleet {
            fleet.speak_for(All { desk: Arc::clone(&desk), ends: own.is_none() && std::process::id() == 1 });
        }
        if options.patrol {
            let told = Arc::clone(&desk);
            Patrol::walk(move |n| {
                told.unwrapped(n);
                true
            });
        }
        // Once made, they stay: an agent may see to it that no more can be made.
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(4)
            .thread_keep_alive(FOR_EVER)
            .build()?;
        runtime.block_on(async {
            let told = Arc::clone(&desk);
            tokio::spawn(async move {
                let look = || {
                    let desk = Arc::clone(&told);
                    async move { tokio::task::spawn_blocking(move || desk.status(Sees::All)).await.ok() }
                };
                told.feed().tell(look).await;
            });
            let (at, asked) = (place.clone(), Arc::clone(&desk));
            tokio::spawn(async move {
                let served = match socket(&at).await {
                    Ok(socket) => http::serve_socket(socket, asked).await,
                    Err(error) => Err(error),
                };
                if let Err(error) = served {
                    tracing::warn!(socket = %at.socket.display(), %error, "nothing is served at the hub's socket");
                }
            });
            if let Some(address) = address {
                let desk = Arc::clone(&desk);
                tokio::spawn(async move {
                    let bound = match bound {
                        Some(bound) => bound,
                        None => bind_at_last(&place, address).await,
                    };
                    if let Some(own) = own {
                        own.degraded("http", false);
                    }
                    if let Err(error) = http::serve_hub(bound, desk).await {
                        tracing::error!(%error, "metrics are no longer served; the agents go on");
                    }
                });
            }
            let mut tick = tokio::time::interval(TIDY);
            tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            loop {
                tick.tick().await;
                let desk = Arc::clone(&desk);
                // One that panics is not the end of the others.
                tokio::task::spawn_blocking(move || desk.tidy()).await.ok();
            }
        })
    }
}

/// `agent-sidecar hub`: serves without an agent of its own, until a signal ends it.
pub(crate) fn alone(mut place: Place, address: Option<SocketAddr>, options: &Options) -> std::io::Result<()> {
    crate::supervise::hide();
    // All that has to be kept is kept: what is left is to go, also as PID 1, which nothing ends by default.
    let mut signals = signal_hook::iterator::Signals::new([INT, TERM, HUP, CHLD])?;
    let fleet = options.fleet.clone();
    std::thread::Builder::new().name(String::from("signals")).stack_size(128 * 1024).spawn(move || {
        loop {
            // As PID 1 it is given everybody's orphans.
            while let Ok(Some(_)) = rustix::process::wait(WaitOptions::NOHANG) {}
            if signals.wait().any(|signal| signal != CHLD) {
                if let Some(fleet) = &fleet {
                    fleet.last();
                }
                std::process::exit(0);
            }
        }
    })?;
    place.keep = true;
    files::write(&place.kept(), place.world.as_bytes())?;
    Turn::take(place, address)?.serve(options, None)
}

/// A port that is to be picked is the one that was picked before, if it is free: whoever scrapes knows that one.
fn bind(place: &Place, address: SocketAddr) -> std::io::Result<Bound> {
    let before = files::read_to_string(&place.address()).ok().and_then(|text| text.trim().parse::<SocketAddr>().ok());
    let before = before.filter(|before| address.port() == 0 && before.ip() == address.ip());
    let bound = match before.and_then(|before| http::bind(before).ok()) {
        Some(bound) => bound,
        None => http::bind(address)?,
    };
    tracing::info!(address = %bound.address, "serving metrics");
    place.tell(&place.address(), &bound.address.to_string());
    Ok(bound)
}

async fn bind_at_last(place: &Place, address: SocketAddr) -> Bound {
    let mut tries = 0_u32;
    loop {
        match bind(place, address) {
            Ok(bound) => return bound,
            Err(error) if tries == 100 => {
                tracing::warn!(%address, %error, "metrics are not served; choose another address with --listen, or off");
            }
            Err(_) => {}
        }
        tokio::time::sleep(if tries < 100 { AGAIN } else { RARELY }).await;
        tries = tries.saturating_add(1);
    }
}

/// Ours, or the spare one where somebody else is asked at it.
async fn socket(place: &Place) -> std::io::Result<UnixListener> {
    if !answers(&place.socket).await {
        return listen(&place.socket, place.door.is_some());
    }
    let Some(spare) = &place.spare else {
        let what = "a hub with another state directory has it; name another --socket";
        return Err(std::io::Error::new(std::io::ErrorKind::AddrInUse, what));
    };
    tracing::warn!(socket = %spare.display(), "the hub of another container has the usual socket; this one is asked here");
    listen(spare, false)
}

/// Whether somebody is there, and stays: the hub before us may still be on its way out.
async fn answers(socket: &Path) -> bool {
    for _ in 0..LEAVES {
        match tokio::net::UnixStream::connect(socket).await {
            // Its queue is full: it hangs, and it is there.
            Err(error) if error.kind() != std::io::ErrorKind::WouldBlock => return false,
            _ => tokio::time::sleep(AGAIN).await,
        }
    }
    true
}

/// `known`: others may ask, too, and are told by the kernel's word what is theirs.
fn listen(path: &Path, known: bool) -> std::io::Result<UnixListener> {
    match path.symlink_metadata() {
        // Nobody answers: it is a dead hub's.
        Ok(at) if at.file_type().is_socket() => fs::remove_file(path)?,
        // Named by mistake, and somebody's.
        Ok(_) => return Err(std::io::Error::new(std::io::ErrorKind::AlreadyExists, "what is there is no socket, and stays")),
        Err(_) => {}
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(if known { 0o666 } else { 0o600 }))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    #[test]
    fn a_socket_where_somebody_answers_is_left_to_them_and_so_is_what_is_no_socket() {
        let dir = std::env::temp_dir().join(format!("agent-sidecar-serve-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let place = |spare: Option<PathBuf>| Place {
            socket: dir.join("hub.sock"),
            spare,
            dir: dir.clone(),
            world: String::new(),
            keep: false,
            door: None,
            guest: false,
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let other = UnixListener::bind(dir.join("hub.sock")).unwrap();
        assert!(runtime.block_on(socket(&place(None))).is_err());
        let spare = runtime.block_on(socket(&place(Some(dir.join("hub-1.sock"))))).unwrap();
        assert!(spare.local_addr().unwrap().as_pathname().unwrap().ends_with("hub-1.sock"));
        drop(other);
        let ours = runtime.block_on(socket(&place(None))).unwrap();
        assert!(ours.local_addr().unwrap().as_pathname().unwrap().ends_with("hub.sock"));
        fs::remove_file(dir.join("hub.sock")).unwrap();
        fs::write(dir.join("hub.sock"), "a book").unwrap();
        assert!(runtime.block_on(socket(&place(None))).is_err());
        assert_eq!(fs::read_to_string(dir.join("hub.sock")).unwrap(), "a book", "a file that was named by mistake");
        fs::remove_dir_all(dir).unwrap();
    }
}
