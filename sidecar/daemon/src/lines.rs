//! Files of JSON lines: opened once, appended to line by line, each line in one write. They never hold anybody up but the monitor.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
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
    opening: Option<Begun<io::Result<File>>>,
    /// The last line was written in part: the next one starts on a line of its own.
    torn: bool,
    warned: bool,
}

impl LineFile {
    /// Begins to open or make it, for the owner only. A file that cannot be opened is tried again with each line.
    /// `user`: as whom the agent runs. A link in the file's place is not followed if that one could have put it there.
    pub(crate) fn open(what: Use, path: PathBuf, user: Option<&User>) -> LineFile {
        let user = user.filter(|user| !user.is_us()).cloned();
        let mut lines = LineFile { what, path, user, file: None, opening: None, torn: false, warned: false };
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

    fn append(&mut self, what: &impl Serialize) -> io::Result<()> {
        let mut line = if self.torn { vec![b'\n'] } else { Vec::new() };
        serde_json::to_writer(&mut line, what)?;
        line.push(b'\n');
        let file = self.ready()?;
        let written = file.write(&line)?;
        self.torn = written > 0 && written < line.len();
        if written < line.len() {
            return Err(io::Error::new(io::ErrorKind::StorageFull, "the line was written in part"));
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

    fn begin(&self) -> io::Result<Begun<io::Result<File>>> {
        let (path, user) = (self.path.clone(), self.user.clone());
        Begun::begin(move || {
            let links = user.is_none_or(|user| !user.may_change(&path));
            // What it says is money and ids: for the owner.
            // A pipe that nobody reads keeps nobody waiting.
            let pipe = OFlags::NONBLOCK | if links { OFlags::empty() } else { OFlags::NOFOLLOW };
            OpenOptions::new().append(true).create(true).mode(0o600).custom_flags(pipe.bits().cast_signed()).open(&path)
        })
    }

    fn finish(&mut self, opening: Begun<io::Result<File>>, patience: Duration) -> io::Result<()> {
        match opening.wait(patience) {
            Ok(opened) => self.file = Some(opened?),
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
