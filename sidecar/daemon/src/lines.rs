//! Files of JSON lines: opened once, appended to line by line, each line in one write. They never hold anybody up but the monitor.
//!
//! Who writes remembers what: where each of its lines is, and a hash of it under a key that is nowhere else. A file that was removed, cut
//! short or changed in our lines is told of, before the next line and at the end. Others may append, and a file may be renamed.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Seek, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use agent_sidecar_core::metric::{self, Meters};
use rustix::fs::OFlags;
use serde::Serialize;

use crate::hang::{Begun, HANGS};
use crate::supervise::{Handle, User};

/// What a file is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    Ledger,
    Events,
}

impl Use {
    fn component(self) -> &'static str {
        match self {
            Use::Ledger => "ledger",
            Use::Events => "events",
        }
    }

    fn lost(self, meters: &mut Meters, lines: u64) {
        match self {
            Use::Ledger => meters.add(&metric::LEDGER_ERRORS, &[], lines),
            Use::Events => meters.add(&metric::EVENTS_FILE_ERRORS, &[], lines),
        }
    }
}

/// A disk that hangs keeps the monitor so long, and once.
const SOON: Duration = Duration::from_millis(500);

/// See the module's head.
pub(crate) struct LineFile {
    what: Use,
    path: PathBuf,
    /// As whom the agent runs, if not as we do.
    user: Option<User>,
    file: Option<File>,
    /// The disk has not answered yet.
    opening: Option<Begun<io::Result<Opened>>>,
    /// The last line was written in part: the next one starts on a line of its own.
    torn: bool,
    warned: bool,
    /// The same file, to look whether it still says what we wrote.
    reader: Option<File>,
    /// The lines that we remember, the last ones.
    lines: VecDeque<Written>,
    key: RandomState,
    tampered: bool,
}

/// To append to; and to look at, if it is a file that has a past: a pipe or a device has none.
type Opened = (File, Option<File>);

/// A line of ours: where it is, how long, and its hash.
#[derive(Clone, Copy, Debug)]
struct Written {
    at: u64,
    bytes: u32,
    hash: u64,
}

/// So many lines are looked at once more at the end: those of some hundred turns.
const REMEMBERED: usize = 16_384;

impl LineFile {
    /// Begins to open or make it, for the owner only. A file that cannot be opened is tried again with each line.
    /// `user`: as whom the agent runs. A link in the file's place is not followed if that one could have put it there.
    pub(crate) fn open(what: Use, path: PathBuf, user: Option<&User>) -> LineFile {
        let user = user.filter(|user| !user.is_us()).cloned();
        let mut lines = LineFile {
            what,
            path,
            user,
            file: None,
            opening: None,
            torn: false,
            warned: false,
            reader: None,
            lines: VecDeque::new(),
            key: RandomState::new(),
            tampered: false,
        };
        lines.opening = lines.begin().ok();
        lines
    }

    /// Waits until these are open, all of them together no longer than for a disk that hangs.
    pub(crate) fn wait<'a>(files: impl Iterator<Item = &'a mut LineFile>, meters: &mut Meters) {
        let until = Instant::now() + HANGS;
        for lines in files {
            let opening = lines.opening.take().map_or_else(|| lines.begin(), Ok);
            let opened = opening.and_then(|opening| lines.finish(opening, until.saturating_duration_since(Instant::now())));
            if let Err(error) = opened {
                lines.warn(&error);
                meters.set(&metric::DEGRADED, &[lines.what.component()], 1.0);
            }
        }
    }

    /// Appends a line where no agent runs that could count what cannot be written.
    pub(crate) fn write_alone(&mut self, line: &impl Serialize) {
        if let Err(error) = self.append(line) {
            self.warn(&error);
        }
    }

    /// Appends a line; what cannot be written is counted and said once.
    pub(crate) fn write(&mut self, line: &impl Serialize, handle: &Handle) {
        if let Some(how) = self.changed(1) {
            self.say_changed(how, handle);
        }
        let written = self.append(line);
        let failed = written.is_err();
        if let Err(error) = &written {
            self.warn(error);
        }
        if failed || self.warned {
            self.warned = failed;
            let what = self.what;
            handle.visit(move |monitor, _| {
                what.lost(monitor.meters_mut(), u64::from(failed));
                monitor.meters_mut().set(&metric::DEGRADED, &[what.component()], f64::from(u8::from(failed)));
            });
        }
    }

    /// Looks once more at all that we remember, before the end.
    pub(crate) fn verify(&mut self, handle: &Handle) {
        if let Some(how) = self.changed(REMEMBERED) {
            self.say_changed(how, handle);
        }
    }

    /// What somebody else has done to our last lines. It is told once.
    fn changed(&mut self, last: usize) -> Option<&'static str> {
        let (Some(reader), Some(end)) = (&self.reader, self.lines.back()) else { return None };
        let found = reader.metadata().ok()?;
        if found.nlink() == 0 {
            // What is written from now on is in a file that somebody finds.
            (self.file, self.reader) = (None, None);
            self.lines.clear();
            return Some("was removed; it is begun anew");
        }
        if found.len() < end.at + u64::from(end.bytes) {
            self.lines.clear();
            return Some("was cut short");
        }
        let says = |line: &Written| {
            let mut bytes = vec![0; line.bytes as usize];
            // What cannot be read is no proof of anything.
            reader.read_exact_at(&mut bytes, line.at).is_err() || self.key.hash_one(&bytes) == line.hash
        };
        if self.lines.iter().rev().take(last).all(says) {
            return None;
        }
        self.lines.clear();
        Some("was changed in lines that are already written")
    }

    fn say_changed(&mut self, how: &str, handle: &Handle) {
        if !std::mem::replace(&mut self.tampered, true) {
            let (what, path) = (self.what.component(), self.path.display());
            tracing::error!(%path, "the {what} file {how}, by somebody else");
        }
        let what = self.what.component();
        handle.visit(move |monitor, _| monitor.meters_mut().add(&metric::TAMPERED, &[what], 1));
    }

    fn append(&mut self, what: &impl Serialize) -> io::Result<()> {
        let mut line = if self.torn { vec![b'\n'] } else { Vec::new() };
        serde_json::to_writer(&mut line, what)?;
        line.push(b'\n');
        let file = self.ready()?;
        let written = file.write(&line)?;
        let end = file.stream_position().ok();
        self.torn = written > 0 && written < line.len();
        if written < line.len() {
            return Err(io::Error::new(io::ErrorKind::StorageFull, "the line was written in part"));
        }
        // Appended, it ends where the file did.
        if let (Some(_), Some(end), Ok(bytes)) = (&self.reader, end, u32::try_from(written)) {
            if self.lines.len() >= REMEMBERED {
                self.lines.pop_front();
            }
            self.lines.push_back(Written { at: end.saturating_sub(written as u64), bytes, hash: self.key.hash_one(&line) });
        }
        Ok(())
    }

    fn ready(&mut self) -> io::Result<&mut File> {
        if self.file.is_none() {
            let (opening, patience) = match self.opening.take() {
                Some(late) => (late, Duration::ZERO),
                None => (self.begin()?, SOON),
            };
            self.finish(opening, patience)?;
        }
        self.file.as_mut().ok_or_else(|| io::Error::other("no file"))
    }

    fn begin(&self) -> io::Result<Begun<io::Result<Opened>>> {
        let (path, user) = (self.path.clone(), self.user.clone());
        Begun::begin(move || {
            let links = user.is_none_or(|user| !user.may_change(&path));
            // What it says is money and ids: for the owner.
            // A pipe that nobody reads keeps nobody waiting.
            let pipe = OFlags::NONBLOCK | if links { OFlags::empty() } else { OFlags::NOFOLLOW };
            let file =
                OpenOptions::new().append(true).create(true).mode(0o600).custom_flags(pipe.bits().cast_signed()).open(&path)?;
            // The very same, whatever has the name by now.
            let plain = file.metadata().is_ok_and(|found| found.is_file());
            let reader = if plain { File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).ok() } else { None };
            Ok((file, reader))
        })
    }

    fn finish(&mut self, opening: Begun<io::Result<Opened>>, patience: Duration) -> io::Result<()> {
        match opening.wait(patience) {
            Ok(opened) => {
                let (file, reader) = opened?;
                (self.file, self.reader) = (Some(file), reader);
            }
            Err(hangs) => {
                self.opening = Some(opening);
                return Err(hangs);
            }
        }
        Ok(())
    }

    fn warn(&mut self, error: &io::Error) {
        if !std::mem::replace(&mut self.warned, true) {
            let (what, path) = (self.what.component(), self.path.display());
            tracing::error!(%path, %error, "the {what} file cannot be written; make room, or choose another");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn what_somebody_else_does_to_our_lines_is_seen_and_what_others_append_is_not() {
        let dir = std::env::temp_dir().join(format!("agent-sidecar-lines-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let open = |name: &str| {
            let mut lines = LineFile::open(Use::Ledger, dir.join(name), None);
            LineFile::wait(std::iter::once(&mut lines), &mut Meters::default());
            for n in 0..3 {
                lines.append(&format!("line {n}")).unwrap();
            }
            lines
        };
        let (mut one, mut two) = (open("shared"), open("shared"));
        one.append(&"more").unwrap();
        assert_eq!((one.changed(REMEMBERED), two.changed(REMEMBERED)), (None, None));
        fs::rename(dir.join("shared"), dir.join("rotated")).unwrap();
        assert_eq!(one.changed(REMEMBERED), None, "it is the same file");

        let mut edited = open("edited");
        let text = fs::read_to_string(dir.join("edited")).unwrap();
        fs::write(dir.join("edited"), text.replace("line 0", "line 9")).unwrap();
        assert_eq!(edited.changed(1), None, "the last line is as it was");
        assert_eq!(edited.changed(REMEMBERED), Some("was changed in lines that are already written"));
        assert_eq!(edited.changed(REMEMBERED), None, "told once");
        edited.append(&"more").unwrap();
        File::options().write(true).open(dir.join("edited")).unwrap().set_len(20).unwrap();
        assert_eq!(edited.changed(1), Some("was cut short"));
        edited.append(&"more").unwrap();
        // As whoever rotates it does who copies and empties it.
        File::options().write(true).open(dir.join("edited")).unwrap().set_len(0).unwrap();
        assert_eq!(edited.changed(1), Some("was cut short"));
        edited.append(&"emptied").unwrap();
        assert_eq!((edited.changed(1), fs::read_to_string(dir.join("edited")).unwrap()), (None, String::from("\"emptied\"\n")));
        fs::remove_file(dir.join("edited")).unwrap();
        assert!(edited.changed(1).unwrap().starts_with("was removed"));
        edited.append(&"anew").unwrap();
        assert_eq!(fs::read_to_string(dir.join("edited")).unwrap(), "\"anew\"\n");
        fs::remove_dir_all(dir).unwrap();
    }
}
