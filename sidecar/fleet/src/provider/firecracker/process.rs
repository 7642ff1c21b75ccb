//! Processes that outlive us: found again by their id, and by when they began, so that another with the same id is not taken for them.

use std::fs;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

/// What is killed is gone within this, unless the kernel holds it.
const GONE: Duration = Duration::from_secs(20);

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Process {
    pub(super) pid: i32,
    /// In the kernel's ticks since it booted.
    start: u64,
    /// Which boot that was.
    boot: String,
}

impl Process {
    /// The one that has this id now. `None`: there is none, or it has ended and nobody has asked how.
    pub(super) fn of(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // Its name is in brackets, and may have some of its own.
        let (_, rest) = stat.rsplit_once(')')?;
        let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
        let state = *fields.first()?;
        // Its first thread may have ended while others still hold memory, disk and network.
        let threads: u32 = fields.get(17)?.parse().ok()?;
        if state == "X" || state == "Z" && threads <= 1 {
            return None;
        }
        Some(Self { pid, start: fields.get(19)?.parse().ok()?, boot: boot() })
    }

    pub(super) fn lives(&self) -> bool {
        Self::of(self.pid).as_ref() == Some(self)
    }

    /// Ends it at once, and waits until it has. Whoever has its id by then is not touched.
    pub(super) async fn kill(&self) -> io::Result<()> {
        let pid = Pid::from_raw(self.pid).ok_or(io::ErrorKind::InvalidInput)?;
        let began = Instant::now();
        // The descriptor is the process that was looked at, whatever happens to the id.
        let fd = match pidfd_open(pid, PidfdFlags::empty()) {
            Err(rustix::io::Errno::SRCH) => return Ok(()),
            fd => fd?,
        };
        if !self.lives() {
            return Ok(());
        }
        match pidfd_send_signal(&fd, Signal::KILL) {
            Err(rustix::io::Errno::SRCH) => return Ok(()),
            sent => sent?,
        }
        while self.lives() {
            if began.elapsed() > GONE {
                return Err(io::Error::other("it was killed, and does not end"));
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }
}

/// Those that were begun for this machine: `--id`, and its socket as they see it.
pub(super) fn find(id: &str, socket: &Path) -> Vec<Process> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let ours = |pid: &i32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let arguments: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
        let has = |name: &str, value: &[u8]| arguments.windows(2).any(|two| two == [name.as_bytes(), value]);
        has("--id", id.as_bytes()) && has("--api-sock", socket.as_os_str().as_encoded_bytes())
    };
    pids.filter(ours).filter_map(Process::of).collect()
}

fn boot() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").map(|id| id.trim().to_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_that_is_somebody_elses_now_is_not_ours() {
        let me = Process::of(i32::try_from(std::process::id()).unwrap()).unwrap();
        assert!(me.lives());
        for other in [
            Process { start: me.start + 1, ..me.clone() },
            Process { boot: String::from("another"), ..me.clone() },
            Process { pid: i32::MAX, ..me.clone() },
        ] {
            assert!(!other.lives(), "{other:?}");
        }
    }

    #[tokio::test]
    async fn only_the_one_that_was_meant_is_killed() {
        let mut child = tokio::process::Command::new("sleep").arg("600").kill_on_drop(true).spawn().unwrap();
        let process = Process::of(i32::try_from(child.id().unwrap()).unwrap()).unwrap();
        Process { start: process.start + 1, ..process.clone() }.kill().await.unwrap();
        assert!(process.lives());
        let (killed, ended) = tokio::join!(process.kill(), child.wait());
        killed.unwrap();
        assert!(!ended.unwrap().success() && !process.lives());
        process.kill().await.unwrap();
    }

    #[tokio::test]
    async fn it_is_found_by_its_arguments() {
        let socket = format!("/nowhere/{}", uuid::Uuid::now_v7());
        let at = Path::new(&socket);
        // A shell whose arguments are these, and which waits for itself: a child of it would outlive it.
        let script = ["-c", "read word", "x", "--id", "k", "--api-sock", &socket];
        let stdin = std::process::Stdio::piped();
        let mut shell = tokio::process::Command::new("sh").args(script).stdin(stdin).kill_on_drop(true).spawn().unwrap();
        let began = Instant::now();
        while find("k", at).is_empty() {
            assert!(began.elapsed() < Duration::from_secs(60));
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(find("k", at)[0].pid, i32::try_from(shell.id().unwrap()).unwrap());
        assert!(find("l", at).is_empty() && find("k", Path::new("/else")).is_empty());
        shell.kill().await.unwrap();
    }
}
