//! Where the CLI waits before it asks the model, until what it asks for is in the book: two pipes, which the hooks that it was given
//! know ([`agent_sidecar_core::ask::doors`]).
//!
//! A hook reads from the one before it writes into the other, so it cannot be too early, however fast answers come. With us the CLI dies,
//! and our end of the pipes is closed, as it is if only this fails: whoever waits goes on.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use agent_sidecar_core::ask::{self, doors};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, Uid, chownat, mknodat};
use rustix::io::Errno;

use super::share::Share;
use crate::files;

/// A hook that waits reads at once, and so long on a machine that has no time. One that was interrupted never does.
const READS: Duration = Duration::from_millis(500);
const AGAIN: Duration = Duration::from_millis(2);

/// Our end of what the hooks read, for as long as anybody is to wait at it.
#[derive(Clone)]
pub(super) struct Turnstile {
    opens: Arc<Mutex<Option<File>>>,
    hold_file: PathBuf,
    near: Arc<Mutex<bool>>,
}

impl Turnstile {
    /// `agent`: whose the hooks are. Nobody knows yet whether the end of a budget is near: until then they knock.
    pub(super) fn new(hold_file: &Path, agent: Option<(u32, u32)>) -> io::Result<(Turnstile, File)> {
        let [knocks, opens] = paths(hold_file);
        make(&opens, agent)?;
        make(&knocks, agent)?;
        let both = || {
            let mut how = OpenOptions::new();
            how.read(true).write(true);
            how
        };
        // For both, so that neither we nor the hooks wait for the other to open it.
        let knocks = pipe(&mut both(), &knocks, OFlags::empty())?;
        let wakes = pipe(&mut both(), &opens, OFlags::empty())?;
        // To write alone: then the kernel says whether anybody reads.
        let opened = pipe(OpenOptions::new().write(true), &opens, OFlags::NONBLOCK)?;
        drop(wakes);
        let turnstile =
            Turnstile { opens: Arc::new(Mutex::new(Some(opened))), hold_file: hold_file.to_owned(), near: Arc::default() };
        turnstile.near(true);
        Ok((turnstile, knocks))
    }

    /// Attends to whoever knocks. Without it agents that are too late are interrupted, as they are where they have no hooks.
    pub(super) fn attend(&self, mut knocks: File, share: Share) -> io::Result<()> {
        let turnstile = self.clone();
        let attends = move || {
            let mut knock = [0];
            while knocks.read_exact(&mut knock).is_ok() {
                share.let_ask(knock[0] == ask::MESSAGE, || turnstile.is_waited_at());
                turnstile.let_through();
            }
        };
        std::thread::Builder::new().name(String::from("turnstile")).stack_size(256 * 1024).spawn(attends).map(drop)
    }

    /// Whether hooks are to knock, as it is near the end of a budget. What cannot be written is tried again with the next number.
    pub(super) fn near(&self, near: bool) {
        let mut said = lock(&self.near);
        if *said == near {
            return;
        }
        let path = ask::near(&self.hold_file.display().to_string());
        let done = if near {
            files::open(Path::new(&path), OpenOptions::new().write(true).create(true).truncate(false).mode(0o644)).map(drop)
        } else {
            fs::remove_file(&path)
        };
        match done {
            Ok(()) => *said = near,
            Err(error) => tracing::debug!(%error, near, "the CLI cannot be told whether to ask before it asks"),
        }
    }

    /// Whoever waits goes on.
    pub(super) fn remove(&self) {
        remove(&self.hold_file);
        lock(&self.opens).take();
    }

    fn is_waited_at(&self) -> bool {
        lock(&self.opens).as_ref().is_some_and(is_read)
    }

    /// Only for somebody who waits: what was written for one that is gone would let the next one through.
    fn let_through(&self) {
        let opens = lock(&self.opens);
        let Some(mut pipe) = opens.as_ref() else { return };
        let waits = is_read(pipe) && pipe.write(b"\n").is_ok();
        let end = Instant::now() + READS;
        while waits && is_read(pipe) && rustix::io::ioctl_fionread(pipe).is_ok_and(|left| left > 0) && Instant::now() < end {
            std::thread::sleep(AGAIN);
        }
        if !is_read(pipe) {
            // It may have died with it in front of it.
            self.drain();
        }
    }

    fn drain(&self) {
        let [_, opens] = paths(&self.hold_file);
        if let Ok(mut left) = pipe(OpenOptions::new().read(true), &opens, OFlags::NONBLOCK) {
            drop(left.read(&mut [0; 64]));
        }
    }
}

/// What somebody has left, or leaves. Who came just now waits for another end of the pipe: it finds one, and that it is closed again.
pub(super) fn remove(hold_file: &Path) {
    fs::remove_file(ask::near(&hold_file.display().to_string())).ok();
    for path in paths(hold_file) {
        if path.symlink_metadata().is_ok_and(|found| found.file_type().is_fifo()) {
            let wakes = pipe(OpenOptions::new().read(true).write(true), &path, OFlags::NONBLOCK);
            fs::remove_file(path).ok();
            drop(wakes);
        }
    }
}

/// Whether nobody listens where one knocks.
pub(super) fn is_left(hold_file: &Path) -> bool {
    let [knocks, _] = paths(hold_file);
    let listens = pipe(OpenOptions::new().write(true), &knocks, OFlags::NONBLOCK);
    listens
        .is_err_and(|error| error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(Errno::NXIO.raw_os_error()))
}

fn paths(hold_file: &Path) -> [PathBuf; 2] {
    doors(&hold_file.display().to_string()).map(PathBuf::from)
}

/// Whether anybody has it open to read.
fn is_read(pipe: &File) -> bool {
    let mut fds = [PollFd::new(pipe, PollFlags::empty())];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut fds, Some(&now)).is_ok() && !fds[0].revents().contains(PollFlags::ERR)
}

/// For the agent alone: whoever else could write into one could let it through.
fn make(path: &Path, agent: Option<(u32, u32)>) -> io::Result<()> {
    mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)?;
    if let Some((uid, gid)) = agent {
        chownat(CWD, path, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)), AtFlags::SYMLINK_NOFOLLOW)?;
    }
    Ok(())
}

fn pipe(how: &mut OpenOptions, path: &Path, flags: OFlags) -> io::Result<File> {
    let file = how.custom_flags((flags | OFlags::NOFOLLOW).bits().cast_signed()).open(path)?;
    if !file.metadata()?.file_type().is_fifo() {
        return Err(io::Error::other("somebody has put something else there"));
    }
    Ok(file)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;
    use std::process::{Child, Command, Stdio};

    use super::*;

    struct Dir(PathBuf);

    impl Drop for Dir {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).ok();
        }
    }

    impl Dir {
        fn new(name: &str) -> Dir {
            let dir = std::env::temp_dir().join(format!("agent-sidecar-turnstile-{name}-{}", std::process::id()));
            fs::create_dir_all(&dir).unwrap();
            Dir(dir)
        }

        fn hold_file(&self) -> PathBuf {
            self.0.join("it's a.hold")
        }
    }

    /// A hook after tools, as the CLI runs it.
    fn knock(hold_file: &Path) -> Child {
        let hooks = ask::hooks(Some(hold_file.to_str().unwrap()));
        let line = hooks["PostToolBatch"][0]["hooks"][0]["command"].as_str().unwrap().to_owned();
        Command::new("sh").args(["-c", &line]).stdout(Stdio::piped()).spawn().unwrap()
    }

    #[expect(clippy::disallowed_methods, reason = "the test's own children, and no reaper")]
    fn through(waits: &mut [Child]) -> usize {
        waits.iter_mut().filter_map(|child| child.try_wait().unwrap()).count()
    }

    fn until(waits: &mut [Child], n: usize) {
        while through(waits) < n {
            std::thread::sleep(AGAIN);
        }
        assert_eq!(through(waits), n);
    }

    #[test]
    #[expect(clippy::disallowed_methods, reason = "the test's own children, and no reaper")]
    fn each_word_is_for_one_who_waits_and_none_is_left_for_who_comes_later() {
        let dir = Dir::new("words");
        let (turnstile, mut knocks) = Turnstile::new(&dir.hold_file(), None).unwrap();
        let mut heard = || {
            let mut knock = [0];
            knocks.read_exact(&mut knock).unwrap();
            assert_ne!(knock[0], ask::MESSAGE);
        };
        let mut gone = knock(&dir.hold_file());
        heard();
        assert!(turnstile.is_waited_at());
        gone.kill().unwrap();
        gone.wait().unwrap();
        assert!(!turnstile.is_waited_at());
        turnstile.let_through();
        let mut waits = [knock(&dir.hold_file()), knock(&dir.hold_file())];
        heard();
        heard();
        std::thread::sleep(READS / 5);
        assert_eq!(through(&mut waits), 0, "nothing is left of what was for the first");
        turnstile.let_through();
        until(&mut waits, 1);
        // Whoever removes the pipes lets the other go.
        turnstile.remove();
        until(&mut waits, 2);
        assert_eq!(fs::read_dir(&dir.0).unwrap().count(), 0);
    }

    #[test]
    fn who_waits_for_one_that_is_gone_goes_on() {
        let dir = Dir::new("gone");
        let (turnstile, mut knocks) = Turnstile::new(&dir.hold_file(), None).unwrap();
        let mut waits = [knock(&dir.hold_file())];
        knocks.read_exact(&mut [0]).unwrap();
        // As when the process is killed: what it had open is closed, and its files stay.
        drop((turnstile, knocks));
        until(&mut waits, 1);
    }

    #[test]
    fn far_from_the_end_of_a_budget_nobody_knocks() {
        let dir = Dir::new("far");
        let (turnstile, knocks) = Turnstile::new(&dir.hold_file(), None).unwrap();
        turnstile.near(false);
        let mut passes = [knock(&dir.hold_file())];
        until(&mut passes, 1);
        assert_eq!(rustix::io::ioctl_fionread(&knocks).unwrap(), 0);
        turnstile.near(true);
        turnstile.near(true);
        assert!(Path::new(&ask::near(dir.hold_file().to_str().unwrap())).exists());
    }

    #[test]
    fn the_pipes_are_the_agents_alone() {
        let dir = Dir::new("owner");
        let root = rustix::process::geteuid().is_root();
        let agent = root.then_some((12_345, 23_456));
        let _made = Turnstile::new(&dir.hold_file(), agent).unwrap();
        for path in paths(&dir.hold_file()) {
            let found = path.symlink_metadata().unwrap();
            assert_eq!(found.mode() & 0o777, 0o600);
            assert!(agent.is_none_or(|agent| agent == (found.uid(), found.gid())));
        }
    }
}
