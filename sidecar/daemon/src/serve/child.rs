//! Wrappers as children: started, talked to over pipes, and reaped by the one who reaps everybody, since this may be PID 1.

use std::collections::HashMap;
use std::io;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::process::{Pid, Signal, WaitOptions};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::sync::{oneshot, watch};

use crate::supervise::{CHLD, HUP, INT, TERM};

/// The longest line that is passed on: answers have kilobytes, and pictures some megabytes.
const LINE: usize = 16 * 1024 * 1024;
/// How much is read at once.
const CHUNK: usize = 64 * 1024;
/// A wrapper reads its stdin whatever the CLI does: one that does not for so long is stuck.
const WRITE: Duration = Duration::from_secs(30);

/// The one owner of `waitpid`, as PID 1 of everybody's orphans, too.
pub(super) struct Reaper {
    /// Who waits for whose end. Held while one is started: nobody reaps whom nobody knows yet.
    waiting: Mutex<HashMap<i32, oneshot::Sender<i32>>>,
    ending: watch::Receiver<bool>,
}

impl Reaper {
    /// # Errors
    /// Signals cannot be heard.
    pub(super) fn start() -> io::Result<Arc<Reaper>> {
        let mut signals = signal_hook::iterator::Signals::new([INT, TERM, HUP, CHLD])?;
        let (end, ending) = watch::channel(false);
        let reaper = Arc::new(Reaper { waiting: Mutex::default(), ending });
        let own = Arc::clone(&reaper);
        std::thread::Builder::new().name(String::from("signals")).stack_size(128 * 1024).spawn(move || {
            loop {
                own.reap();
                if signals.wait().any(|signal| signal != CHLD) {
                    end.send_replace(true);
                }
            }
        })?;
        Ok(reaper)
    }

    /// True when somebody wants this to end.
    pub(super) fn ending(&self) -> watch::Receiver<bool> {
        self.ending.clone()
    }

    fn reap(&self) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
            let code = status.exit_status().or_else(|| status.terminating_signal().map(|signal| 128 + signal));
            if let (Some(code), Some(waits)) = (code, waiting.remove(&pid.as_raw_nonzero().get())) {
                // Who waited may have given up.
                waits.send(code).ok();
            }
        }
    }

    /// Sends a signal to one that is not reaped yet, and so is still itself.
    fn signal(&self, pid: i32, signal: Signal) {
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pid) = Pid::from_raw(pid).filter(|_| waiting.contains_key(&pid)) {
            rustix::process::kill_process(pid, signal).ok();
        }
    }

    pub(super) fn has_children(&self) -> bool {
        !self.waiting.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    /// The wrappers; the kernel sees to it that nothing of theirs goes on without them.
    pub(super) fn kill_all(&self) {
        let pids: Vec<i32> = self.waiting.lock().unwrap_or_else(PoisonError::into_inner).keys().copied().collect();
        pids.into_iter().for_each(|pid| self.signal(pid, Signal::KILL));
    }
}

/// One line of an agent's.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Line {
    Whole(Vec<u8>),
    /// Longer than is passed on: how it begins.
    Cut(Vec<u8>),
}

/// A wrapper that runs, and the agent behind it.
pub(super) struct Child {
    pid: i32,
    reaper: Arc<Reaper>,
    exit: oneshot::Receiver<i32>,
    stdin: Option<pipe::Sender>,
    stdout: Lines<pipe::Receiver>,
}

impl Child {
    /// # Errors
    /// It cannot be started.
    pub(super) fn start(mut command: Command, reaper: &Arc<Reaper>) -> io::Result<Child> {
        let mut waiting = reaper.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let (ended, exit) = oneshot::channel();
        let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
        waiting.insert(pid, ended);
        drop(waiting);
        let missing = || io::Error::other("a pipe is missing");
        let stdin = pipe::Sender::from_owned_fd(child.stdin.take().ok_or_else(missing)?.into())?;
        let stdout = pipe::Receiver::from_owned_fd(child.stdout.take().ok_or_else(missing)?.into())?;
        Ok(Child { pid, reaper: Arc::clone(reaper), exit, stdin: Some(stdin), stdout: Lines::new(stdout) })
    }

    /// # Errors
    /// Nobody reads it.
    pub(super) async fn say(&mut self, value: &serde_json::Value) -> io::Result<()> {
        let mut line = serde_json::to_vec(value)?;
        line.push(b'\n');
        let stdin = self.stdin.as_mut().ok_or(io::ErrorKind::BrokenPipe)?;
        tokio::time::timeout(WRITE, stdin.write_all(&line)).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
    }

    /// The next line; `None`: it says no more. May be given up at any time, and nothing is lost.
    pub(super) async fn line(&mut self) -> Option<Line> {
        self.stdout.next().await
    }

    /// No more is said to it: an agent that waits ends.
    pub(super) fn close(&mut self) {
        self.stdin = None;
    }

    /// Its turn ends with its last cost, and then it does.
    pub(super) fn terminate(&self) {
        self.reaper.signal(self.pid, Signal::TERM);
    }

    /// Its exit code, when it is over; killed, if that takes longer.
    pub(super) async fn exit(mut self, within: Duration) -> i32 {
        self.close();
        // What it still says is read, or it could not end.
        let read = async { while self.stdout.next().await.is_some() {} };
        if tokio::time::timeout(within, read).await.is_err() {
            self.terminate();
        }
        for _ in 0..2 {
            if let Ok(Ok(code)) = tokio::time::timeout(within, &mut self.exit).await {
                return code;
            }
            self.reaper.signal(self.pid, Signal::KILL);
        }
        128 + Signal::KILL.as_raw()
    }
}

/// Bytes as lines of bounded length.
struct Lines<R> {
    from: R,
    bytes: Vec<u8>,
    /// So many of them have no end of a line.
    looked: usize,
    /// The rest of one that was cut.
    skips: bool,
    chunk: Box<[u8]>,
}

impl<R: tokio::io::AsyncRead + Unpin> Lines<R> {
    fn new(from: R) -> Self {
        Self { from, bytes: Vec::new(), looked: 0, skips: false, chunk: vec![0; CHUNK].into() }
    }

    async fn next(&mut self) -> Option<Line> {
        loop {
            if let Some(at) = memchr::memchr(b'\n', &self.bytes[self.looked..]) {
                let mut line: Vec<u8> = self.bytes.drain(..=self.looked + at).collect();
                line.pop();
                self.looked = 0;
                if std::mem::take(&mut self.skips) {
                    continue;
                }
                return Some(Line::Whole(line));
            }
            self.looked = self.bytes.len();
            if self.looked > LINE {
                let mut begin = std::mem::take(&mut self.bytes);
                begin.truncate(CHUNK);
                self.looked = 0;
                if !std::mem::replace(&mut self.skips, true) {
                    return Some(Line::Cut(begin));
                }
            }
            // Everything else is done when this is: nothing is lost where it is given up.
            match self.from.read(&mut self.chunk).await {
                Ok(0) | Err(_) => return None,
                Ok(n) => self.bytes.extend_from_slice(&self.chunk[..n]),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn lines(bytes: &[u8]) -> Vec<Line> {
        let mut lines = Lines::new(bytes);
        let mut found = Vec::new();
        while let Some(line) = lines.next().await {
            found.push(line);
        }
        found
    }

    #[tokio::test]
    async fn lines_are_whole_whatever_the_chunks_and_what_has_no_end_is_none() {
        let long = vec![b'x'; CHUNK * 2 + 1];
        let text = [b"a\n\n", &long[..], b"\nlast"].concat();
        assert_eq!(lines(&text).await, [b"a".to_vec(), Vec::new(), long].map(Line::Whole));
    }

    #[tokio::test]
    async fn a_line_without_measure_is_told_by_its_beginning_and_the_next_one_is_whole() {
        let text = [&vec![b'x'; LINE * 2 + 5][..], b"\nnext\n"].concat();
        assert_eq!(lines(&text).await, [Line::Cut(vec![b'x'; CHUNK]), Line::Whole(b"next".to_vec())]);
    }
}
