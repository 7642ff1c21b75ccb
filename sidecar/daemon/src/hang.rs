//! What may hang with the disk that it is on: done on a thread of its own, which is left behind if it does.

use std::io;
use std::sync::mpsc;
use std::time::Duration;

/// A disk that has not answered for so long hangs; on a machine that does much else, one that does not may take seconds.
pub(crate) const HANGS: Duration = Duration::from_secs(5);

/// Something that was begun.
pub(crate) struct Begun<T>(mpsc::Receiver<T>);

impl<T: Send + 'static> Begun<T> {
    pub(crate) fn begin(what: impl FnOnce() -> T + Send + 'static) -> io::Result<Begun<T>> {
        let (say, hear) = mpsc::channel();
        std::thread::Builder::new().name(String::from("disk")).stack_size(256 * 1024).spawn(move || drop(say.send(what())))?;
        Ok(Begun(hear))
    }

    /// What came of it, if that is known by then.
    pub(crate) fn wait(&self, patience: Duration) -> io::Result<T> {
        let hangs = |_| io::Error::new(io::ErrorKind::TimedOut, "its file system does not answer");
        self.0.recv_timeout(patience).map_err(hangs)
    }
}

/// Does it, and does not wait for it beyond what it takes anyhow.
pub(crate) fn within<T: Send + 'static>(takes: Duration, what: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
    Begun::begin(what)?.wait(takes + HANGS)
}
