//! What a fake runs commands in: processes of this machine, with a home, a `/tmp` and a memory of their own, that end with it.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, mpsc};
use std::time::Duration;

pub(crate) struct Machine {
    root: PathBuf,
    home: PathBuf,
    /// How often it has lost what was in memory.
    lost: AtomicU32,
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
    pub(crate) fn new(env: BTreeMap<String, String>) -> Self {
        let root = std::env::temp_dir().join(format!("agent-fleet-fake-{}", uuid::Uuid::now_v7().simple()));
        let machine = Self { home: root.join("home"), root, lost: AtomicU32::new(0), env, groups: Mutex::default() };
        for place in [machine.home.clone(), machine.root.join("tmp"), machine.memory()] {
            std::fs::create_dir_all(place).expect("a place of its own");
        }
        machine
    }

    /// Another one in each of its lives: what is killed may still write a file there.
    fn memory(&self) -> PathBuf {
        self.root.join(format!("memory-{}", self.lost.load(Ordering::SeqCst)))
    }

    /// In a group of its own, all of which is killed. What it finds in the places that every machine has is this one's alone: others have sessions of the
    /// same name, also in another run of the tests.
    pub(crate) fn spawn(&self, argv: &[String], env: &BTreeMap<String, String>, stdin: bool) -> std::io::Result<Child> {
        let (tmp, memory) = (self.root.join("tmp"), self.memory());
        let own = |word: &String| {
            let (tmp, memory) = (tmp.to_string_lossy(), memory.to_string_lossy());
            word.split("/dev/shm").map(|part| part.replace("/tmp", &tmp)).collect::<Vec<_>>().join(&memory)
        };
        let child = Command::new(argv.first().map_or("", String::as_str))
            .args(argv.iter().skip(1).map(own))
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
        self.lost.fetch_add(1, Ordering::SeqCst);
        std::fs::create_dir_all(self.memory()).expect("a memory");
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.halt();
        drop(std::fs::remove_dir_all(&self.root));
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
