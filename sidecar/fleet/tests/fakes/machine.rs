//! What a fake runs commands in: processes of this machine, with a home of their own, that end with it.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, mpsc};
use std::time::Duration;

pub(crate) struct Machine {
    /// What the begin of its command is marked with, outside of its home.
    key: String,
    home: PathBuf,
    env: BTreeMap<String, String>,
    groups: Mutex<Vec<u32>>,
}

/// What came of a command.
#[derive(Debug, Default)]
pub(crate) struct Done {
    /// `None`: it was killed.
    pub(crate) code: Option<i32>,
    pub(crate) timed_out: bool,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
}

impl Machine {
    pub(crate) fn new(key: &str, env: BTreeMap<String, String>) -> Self {
        let home = std::env::temp_dir().join(format!("agent-fleet-fake-{}", uuid::Uuid::now_v7().simple()));
        std::fs::create_dir_all(&home).expect("a home");
        let machine = Self { key: key.to_owned(), home, env, groups: Mutex::default() };
        // What a run that was killed has left there is not of this one's life.
        machine.forget();
        machine
    }

    /// In a group of its own, all of which is killed.
    pub(crate) fn spawn(&self, argv: &[String], env: &BTreeMap<String, String>, stdin: bool) -> std::io::Result<Child> {
        let child = Command::new(argv.first().map_or("", String::as_str))
            .args(argv.get(1..).unwrap_or_default())
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .envs(&self.env)
            .env("HOME", &self.home)
            .envs(env)
            .current_dir(&self.home)
            .stdin(if stdin { Stdio::piped() } else { Stdio::null() })
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()?;
        self.groups.lock().unwrap().push(child.id());
        Ok(child)
    }

    /// To its end, or its time's.
    pub(crate) fn run(
        &self,
        argv: &[String],
        env: &BTreeMap<String, String>,
        stdin: &[u8],
        most: Duration,
    ) -> std::io::Result<Done> {
        let mut child = self.spawn(argv, env, true)?;
        let pid = child.id();
        let (mut input, stdin) = (child.stdin.take().expect("piped"), stdin.to_vec());
        // Who does not read gets no more.
        std::thread::spawn(move || drop(input.write_all(&stdin)));
        let stdout = whole(child.stdout.take().expect("piped"));
        let stderr = whole(child.stderr.take().expect("piped"));
        let (tell, told) = mpsc::channel();
        std::thread::spawn(move || drop(tell.send(child.wait())));
        let (status, timed_out) = match told.recv_timeout(most) {
            Ok(status) => (status, false),
            Err(_) => {
                kill("-KILL", &format!("-{pid}"));
                (told.recv().expect("it is waited for"), true)
            }
        };
        let code = status?.code().filter(|_| !timed_out);
        Ok(Done { code, timed_out, stdout: stdout.recv().expect("it is read"), stderr: stderr.recv().expect("it is read") })
    }

    /// Waits until its command has said, by a file `ready`, that it hears signals as it means to. One that says nothing is not waited for for long.
    pub(crate) fn settle(&self) {
        let until = std::time::Instant::now() + Duration::from_secs(20);
        while !self.home.join("ready").exists() && std::time::Instant::now() < until {
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// All that runs ends, and what is in memory is lost.
    pub(crate) fn halt(&self) {
        for group in self.groups.lock().unwrap().drain(..) {
            kill("-KILL", &format!("-{group}"));
        }
        self.forget();
    }

    fn forget(&self) {
        for memory in ["/dev/shm", "/tmp"] {
            // It may be in neither.
            drop(std::fs::remove_dir(PathBuf::from(memory).join(&self.key)));
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.halt();
        drop(std::fs::remove_dir_all(&self.home));
    }
}

fn whole(mut from: impl Read + Send + 'static) -> mpsc::Receiver<Vec<u8>> {
    let (tell, told) = mpsc::channel();
    std::thread::spawn(move || {
        let mut all = Vec::new();
        drop(from.read_to_end(&mut all));
        drop(tell.send(all));
    });
    told
}

/// A process or, with a `-`, a group of them. It may be gone.
pub(crate) fn kill(signal: &str, whom: &str) {
    let done = Command::new("kill").args([signal, "--", whom]).stderr(Stdio::null()).status();
    done.expect("there is a kill");
}
