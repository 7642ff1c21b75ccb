//! The ledger file: opened once, appended to line by line, each line in one write. It never holds anybody up but the monitor.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use agent_sidecar_core::metric::{self, Meters};
use agent_sidecar_core::record::Record;

use crate::supervise::Handle;

/// See the module's head.
pub(crate) struct LedgerFile {
    path: PathBuf,
    file: Option<File>,
    /// The last line was written in part: the next one starts on a line of its own.
    torn: bool,
    warned: bool,
}

impl LedgerFile {
    /// Opens or makes it, for the owner only. A file that cannot be opened is tried again with each line.
    pub(crate) fn open(path: PathBuf, meters: &mut Meters) -> LedgerFile {
        let mut ledger = LedgerFile { path, file: None, torn: false, warned: false };
        if let Err(error) = ledger.ready() {
            ledger.warn(&error);
            meters.set(&metric::DEGRADED, &["ledger"], 1.0);
        }
        ledger
    }

    /// Appends a line; what cannot be written is counted and said once.
    pub(crate) fn write(&mut self, record: &Record, handle: &Handle) {
        let written = self.append(record);
        let failed = written.is_err();
        if let Err(error) = &written {
            self.warn(error);
        }
        if failed || self.warned {
            self.warned = failed;
            handle.visit(move |monitor, _| {
                monitor.meters_mut().add(&metric::LEDGER_ERRORS, &[], u64::from(failed));
                monitor.meters_mut().set(&metric::DEGRADED, &["ledger"], f64::from(u8::from(failed)));
            });
        }
    }

    fn append(&mut self, record: &Record) -> io::Result<()> {
        let mut line = if self.torn { vec![b'\n'] } else { Vec::new() };
        serde_json::to_writer(&mut line, record)?;
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
            self.file = Some(OpenOptions::new().append(true).create(true).mode(0o600).open(&self.path)?);
        }
        self.file.as_mut().ok_or_else(|| io::Error::other("no file"))
    }

    fn warn(&mut self, error: &io::Error) {
        if !std::mem::replace(&mut self.warned, true) {
            tracing::error!(path = %self.path.display(), %error, "the ledger cannot be written; make room, or choose another --ledger");
        }
    }
}
