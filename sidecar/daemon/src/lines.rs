//! Files of JSON lines: opened once, appended to line by line, each line in one write. They never hold anybody up but the monitor.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use agent_sidecar_core::metric::{self, Meters};
use rustix::fs::OFlags;
use serde::Serialize;

use crate::supervise::Handle;

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

/// See the module's head.
pub(crate) struct LineFile {
    what: Use,
    path: PathBuf,
    /// A link at its place is followed.
    links: bool,
    file: Option<File>,
    /// The last line was written in part: the next one starts on a line of its own.
    torn: bool,
    warned: bool,
}

impl LineFile {
    /// Opens or makes it, for the owner only. A file that cannot be opened is tried again with each line.
    /// `links` is false where others could make one, to have us write elsewhere.
    pub(crate) fn open(what: Use, path: PathBuf, links: bool, meters: &mut Meters) -> LineFile {
        let mut lines = LineFile { what, path, links, file: None, torn: false, warned: false };
        if let Err(error) = lines.ready() {
            lines.warn(&error);
            meters.set(&metric::DEGRADED, &[what.component()], 1.0);
        }
        lines
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
            // What it says is money and ids: for the owner.
            // A pipe that nobody reads keeps nobody waiting.
            let pipe = OFlags::NONBLOCK | if self.links { OFlags::empty() } else { OFlags::NOFOLLOW };
            self.file = Some(
                OpenOptions::new()
                    .append(true)
                    .create(true)
                    .mode(0o600)
                    .custom_flags(pipe.bits().cast_signed())
                    .open(&self.path)?,
            );
        }
        self.file.as_mut().ok_or_else(|| io::Error::other("no file"))
    }

    fn warn(&mut self, error: &io::Error) {
        if !std::mem::replace(&mut self.warned, true) {
            let (what, path) = (self.what.component(), self.path.display());
            tracing::error!(%path, %error, "the {what} file cannot be written; make room, or choose another");
        }
    }
}
