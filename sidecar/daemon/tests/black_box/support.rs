//! Starting the wrapper, and waiting for what must come.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{LazyLock, mpsc};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};

/// Makes the wrapper read the CLI's output and talk to its input.
pub(crate) const STREAM_JSON: [&str; 4] = ["--output-format", "stream-json", "--input-format", "stream-json"];
/// Makes it read the output alone; the CLI inherits stdin.
pub(crate) const ONE_SHOT: [&str; 2] = ["--output-format", "stream-json"];

/// Far more than anything here takes, on a machine that does other things besides.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// What ships, where it is named at build time; else the one that was built for these tests.
pub(crate) const SIDECAR: &str = match option_env!("AGENT_SIDECAR_BIN") {
    Some(named) => named,
    None => env!("CARGO_BIN_EXE_agent-sidecar"),
};

/// What only the real CLI says: whoever does not is never spoken to.
pub(crate) const INIT: &str = r#"{"type":"system","subtype":"init","session_id":"s","model":"m"}"#;

pub(crate) fn sidecar() -> Command {
    let mut command = Command::new(SIDECAR);
    command.args(["run", "--listen", "off", "--"]);
    command
}

/// A CLI in Python, with `args` behind the program text.
pub(crate) fn python(program: &str, args: &[&str]) -> Command {
    with_python(sidecar(), program, args)
}

/// The same, under a wrapper that waits long for an answer to a stop before it asks harder: a busy machine may be late with it.
pub(crate) fn patient_python(program: &str, args: &[&str]) -> Command {
    let mut command = Command::new(SIDECAR);
    command.args(["run", "--listen", "off", "--stop-end", "60s", "--stop-terminate", "60s", "--platform-grace", "5m", "--"]);
    with_python(command, program, args)
}

fn with_python(mut command: Command, program: &str, args: &[&str]) -> Command {
    command.args(["python3", "-u", "-c", program]).args(args);
    command
}

/// A CLI in sh.
pub(crate) fn sh(program: &str, args: &[&str]) -> Command {
    let mut command = sidecar();
    command.args(["sh", "-c", program, "sh"]).args(args);
    command
}

/// A running wrapper, killed (and with it the CLI) when a test fails.
pub(crate) struct Running {
    pub(crate) child: Child,
    lines: Option<BufReader<std::process::ChildStdout>>,
    /// Dropped with this; until then a watchdog sees to it that a read which waits in vain ends.
    _watched: mpsc::Sender<()>,
}

/// Longer than anything here takes that is not stuck.
const STUCK: Duration = Duration::from_secs(90);

fn watch(child: &Child) -> mpsc::Sender<()> {
    let pid = Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        if receiver.recv_timeout(STUCK) == Err(mpsc::RecvTimeoutError::Timeout) {
            rustix::process::kill_process(pid, Signal::KILL).ok();
        }
    });
    sender
}

impl Running {
    /// With stdin and stdout as pipes.
    pub(crate) fn start(mut command: Command) -> Self {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let lines = child.stdout.take().map(BufReader::new);
        let _watched = watch(&child);
        Self { child, lines, _watched }
    }

    /// With stdin and stdout as the command has them.
    pub(crate) fn start_as_is(mut command: Command) -> Self {
        let child = command.spawn().unwrap();
        let _watched = watch(&child);
        Self { child, lines: None, _watched }
    }

    pub(crate) fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    /// The next line, without its end.
    pub(crate) fn line(&mut self) -> String {
        let mut line = String::new();
        self.lines.as_mut().unwrap().read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    /// Lines until this one.
    pub(crate) fn line_after(&mut self, expected: &str) {
        loop {
            let line = self.line();
            if line == expected {
                return;
            }
            assert!(!line.is_empty(), "the output ended before `{expected}`");
        }
    }

    pub(crate) fn number(&mut self) -> i32 {
        self.line().parse().unwrap()
    }

    pub(crate) fn rest(&mut self) -> Vec<u8> {
        let mut rest = Vec::new();
        self.lines.as_mut().unwrap().read_to_end(&mut rest).unwrap();
        rest
    }

    pub(crate) fn stop_reading(&mut self) {
        self.lines = None;
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.child.stdin.as_mut().unwrap().write_all(bytes)
    }

    pub(crate) fn close_stdin(&mut self) {
        self.child.stdin = None;
    }

    pub(crate) fn signal(&self, signal: Signal) {
        rustix::process::kill_process(Pid::from_raw(self.pid()).unwrap(), signal).unwrap();
    }

    #[expect(clippy::disallowed_methods, reason = "here is no reaper: the test owns the wrapper")]
    pub(crate) fn code(&mut self) -> Option<i32> {
        wait_for("the wrapper to exit", || self.child.try_wait().unwrap()).code()
    }
}

impl Drop for Running {
    #[expect(clippy::disallowed_methods, reason = "here is no reaper: the test owns the wrapper")]
    fn drop(&mut self) {
        // Gone already, when the test went well.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Asks again and again until there is an answer.
pub(crate) fn wait_for<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(start.elapsed() < PATIENCE, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub(crate) fn gone(pid: i32) {
    wait_for(&format!("process {pid} to be gone"), || (!alive(pid)).then_some(()));
}

/// Lives, and is not merely waited for.
pub(crate) fn alive(pid: i32) -> bool {
    matches!(state(pid), Some(state) if state != 'Z')
}

pub(crate) fn state(pid: i32) -> Option<char> {
    stat(pid)?.first()?.chars().next()
}

/// The fields of /proc/PID/stat from the state on.
fn stat(pid: i32) -> Option<Vec<String>> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    Some(stat.rsplit_once(')')?.1.split_ascii_whitespace().map(str::to_owned).collect())
}

/// The children of a process, zombies too, with their states.
pub(crate) fn children(pid: i32) -> Vec<(i32, char)> {
    let all = std::fs::read_dir("/proc").unwrap().flatten().filter_map(|e| e.file_name().to_str()?.parse().ok());
    let parent = |pid: i32| stat(pid).and_then(|s| s.get(1)?.parse::<i32>().ok());
    all.filter(|child| parent(*child) == Some(pid)).filter_map(|child| Some((child, state(child)?))).collect()
}

/// Resident memory.
pub(crate) fn rss_kib(pid: i32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// The same bytes each time, and nothing that a line or a character could hide in.
pub(crate) fn noise(n: usize, seed: u64) -> Vec<u8> {
    let mut x = seed | 1;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x
    };
    let mut bytes: Vec<u8> = (0..n.div_ceil(8)).flat_map(|_| next().to_le_bytes()).collect();
    bytes.truncate(n);
    bytes
}

/// Not below the build: a socket's path has 107 bytes, and where somebody builds may be far down.
pub(crate) fn scratch(name: &str) -> PathBuf {
    static BASE: LazyLock<PathBuf> = LazyLock::new(|| {
        let name = |pid: &dyn std::fmt::Display| std::env::temp_dir().join(format!("black-box-{pid}"));
        // What a run before this one has left: nobody looks at it any more.
        for entry in std::fs::read_dir(std::env::temp_dir()).into_iter().flatten().flatten() {
            let pid = entry.file_name().to_str().and_then(|name| name.strip_prefix("black-box-")?.parse().ok());
            if let Some(pid) = pid.filter(|pid| !alive(*pid)) {
                std::fs::remove_dir_all(name(&pid)).ok();
            }
        }
        name(&std::process::id())
    });
    let dir = BASE.join(name);
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

/// A directory that goes with its test: copies of the binary are large.
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    pub(crate) fn new(of: &str, name: &str) -> Self {
        let dir = scratch(of).join(name);
        std::fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }
}

impl std::ops::Deref for Scratch {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Somebody wants to look at it, when the test has failed.
        if !std::thread::panicking() {
            std::fs::remove_dir_all(&self.0).ok();
        }
    }
}

pub(crate) fn root() -> bool {
    rustix::process::geteuid().is_root()
}

/// An executable script. Written by another process: one of ours that is just being forked might hold it open, and then it cannot be run.
pub(crate) fn script(path: &Path, text: &str) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let write = "printf '#!/bin/sh\\n%s\\n' \"$2\" > \"$1\" && chmod 755 \"$1\"";
    assert!(Command::new("sh").args(["-c", write, "sh"]).arg(path).arg(text).status().unwrap().success());
}

/// The same of any file, mode and all.
pub(crate) fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to.parent().unwrap()).unwrap();
    assert!(Command::new("cp").arg("-p").args([from, to]).status().unwrap().success());
}
