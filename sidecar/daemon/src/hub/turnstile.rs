//! Where the CLI waits before it asks the model, until what it asks for is in the book: two pipes, which the hooks that it was given
//! know ([`agent_sidecar_core::ask::doors`]).
//!
//! A hook that writes into the one and reads from the other cannot be too early, however fast answers come. With us the CLI dies, and
//! if only this fails, the pipes are closed or the hook's time is over: it goes on.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use agent_sidecar_core::ask::doors;
use rustix::fs::{CWD, FileType, Mode, OFlags, mknodat};

use super::share::Share;

/// A hook that has knocked reads at once, and so long on a machine that has no time. One that was interrupted never does.
const READS: Duration = Duration::from_millis(500);
const AGAIN: Duration = Duration::from_millis(2);

struct Turnstile {
    knocks: File,
    opens: PathBuf,
}

/// Attends to whoever knocks. Without it agents that are too late are interrupted, as they are where they have no hooks.
pub(super) fn start(share: Share, hold_file: &Path) {
    let made = Turnstile::make(hold_file).and_then(|turnstile| {
        std::thread::Builder::new().name(String::from("turnstile")).stack_size(256 * 1024).spawn(move || turnstile.attend(&share))
    });
    if let Err(error) = made {
        remove(hold_file);
        tracing::warn!(%error, "answers that come at once may be above shared budgets by more than one");
    }
}

/// Whoever waits goes on.
pub(super) fn remove(hold_file: &Path) {
    for path in paths(hold_file) {
        if path.symlink_metadata().is_ok_and(|found| found.file_type().is_fifo()) {
            let wakes = open(&path);
            fs::remove_file(path).ok();
            drop(wakes);
        }
    }
}

fn paths(hold_file: &Path) -> [PathBuf; 2] {
    doors(&hold_file.display().to_string()).map(PathBuf::from)
}

impl Turnstile {
    fn make(hold_file: &Path) -> io::Result<Turnstile> {
        let [knocks, opens] = paths(hold_file);
        make(&opens)?;
        make(&knocks)?;
        // For both, so that neither we nor the hooks wait for the other to open it.
        let knocks = pipe(OpenOptions::new().read(true).write(true), &knocks, OFlags::empty())?;
        Ok(Turnstile { knocks, opens })
    }

    fn attend(mut self, share: &Share) {
        let mut knock = [0];
        while self.knocks.read_exact(&mut knock).is_ok() {
            share.let_ask();
            self.let_through();
        }
    }

    /// Only for somebody who waits: what was written for one that is gone would let the next one through.
    fn let_through(&self) {
        let end = Instant::now() + READS;
        while Instant::now() < end {
            match open(&self.opens) {
                Ok(mut waits) => return drop(waits.write(b"\n")),
                Err(_) => std::thread::sleep(AGAIN),
            }
        }
    }
}

fn make(path: &Path) -> io::Result<()> {
    mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)?;
    // The CLI may be another user, who then comes no further than to this directory.
    fs::set_permissions(path, Permissions::from_mode(0o666))
}

/// Fails if nobody reads.
fn open(path: &Path) -> io::Result<File> {
    pipe(OpenOptions::new().write(true), path, OFlags::NONBLOCK)
}

fn pipe(how: &mut OpenOptions, path: &Path, flags: OFlags) -> io::Result<File> {
    let file = how.custom_flags((flags | OFlags::NOFOLLOW).bits().cast_signed()).open(path)?;
    if !file.metadata()?.file_type().is_fifo() {
        return Err(io::Error::other("somebody has put something else there"));
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command, Stdio};

    use super::*;

    /// A hook, as the CLI runs it: it says when it was let through.
    fn knock(hold_file: &Path) -> Child {
        let [knocks, opens] = paths(hold_file);
        let (knocks, opens) = (knocks.display(), opens.display());
        let line = format!("echo > '{knocks}' && while [ -p '{opens}' ] && ! read -r _ < '{opens}'; do :; done; echo through");
        Command::new("sh").args(["-c", &line]).stdout(Stdio::piped()).spawn().unwrap()
    }

    #[test]
    #[expect(clippy::disallowed_methods, reason = "the test's own children, and no reaper")]
    fn each_word_is_for_one_who_waits_and_none_is_left_for_who_comes_later() {
        let dir = std::env::temp_dir().join(format!("agent-sidecar-turnstile-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let hold_file = dir.join("a.hold");
        let mut turnstile = Turnstile::make(&hold_file).unwrap();
        let heard = |turnstile: &mut Turnstile| turnstile.knocks.read_exact(&mut [0]).unwrap();
        let mut gone = knock(&hold_file);
        heard(&mut turnstile);
        gone.kill().unwrap();
        gone.wait().unwrap();
        turnstile.let_through();
        let mut waits = [knock(&hold_file), knock(&hold_file)];
        heard(&mut turnstile);
        heard(&mut turnstile);
        std::thread::sleep(READS / 5);
        let through = |waits: &mut [Child; 2]| waits.each_mut().map(|child| child.try_wait().unwrap().is_some());
        assert_eq!(through(&mut waits), [false; 2], "nothing is left of what was for the first");
        let one = |waits: &mut [Child; 2], n: usize| {
            while through(waits).into_iter().filter(|through| *through).count() < n {
                std::thread::sleep(AGAIN);
            }
        };
        turnstile.let_through();
        one(&mut waits, 1);
        // The other finds it closed again, and waits on; whoever removes the pipes lets it go.
        assert_eq!(through(&mut waits).into_iter().filter(|through| *through).count(), 1);
        remove(&hold_file);
        one(&mut waits, 2);
        fs::remove_dir_all(dir).unwrap();
    }
}
