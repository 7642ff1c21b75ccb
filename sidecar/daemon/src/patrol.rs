//! Looks for agents that nobody counts: CLIs that run without a wrapper of their own. It stops none; it says that they are there.
//!
//! ```text
//!   wrapper ─ CLI                       its own
//!   wrapper ─ CLI ─ shell ─ wrapper ─ CLI     a tool's agent, with a wrapper of its own
//!   wrapper ─ CLI ─ shell ─ CLI         nobody's: the agent went round the shim
//!   wrapper ─ CLI, CLI                  the later one came to the wrapper as an orphan: nobody's
//! ```
//!
//! A CLI is known by the name of its file, and a copy under another name by what the files of known CLIs look like. Another version
//! under another name is not known, and neither is a program that asks the API itself: only a proxy for what leaves the container sees
//! those.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use agent_sidecar_core::launch::Launch;

use crate::influence;
use crate::shim;
use crate::supervise::NICE;

/// How often.
const EVERY: Duration = Duration::from_secs(10);
/// Who has just been forked still looks like its parent.
const SETTLES: Duration = Duration::from_millis(100);
/// Every wrapper has these.
const THREADS: [&str; 2] = ["monitor", "sample"];
/// More are not looked at. As many as there are pids by default: nobody hides behind the crowd.
const PROCESSES: usize = 32_768;
/// Of a command line; what is longer is cut.
const WORDS: u64 = 4 * 1024;
/// Of an environment.
const ENVIRONMENT: u64 = 256 * 1024;
/// As deep as processes are nested by anybody who wants them to be found.
const DEEPEST: usize = 64;
/// Files that were told apart are remembered, so many.
const FILES: usize = 256;
/// Other programs that the CLI's file holds, started under their names.
const INSIDE: [&str; 5] = ["rg", "ugrep", "grep", "bfs", "find"];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Sidecar,
    Cli,
    Other,
}

#[derive(Clone, Debug)]
struct Process {
    parent: i32,
    /// In clock ticks since the boot; with the pid, it is that process and no later one.
    started: u64,
    role: Role,
    print: Option<Print>,
}

/// What a file looks like, without reading all of it: its length, and a page from the middle.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Print {
    length: u64,
    page: Vec<u8>,
}

/// See the module's head.
pub(crate) struct Patrol {
    proc: PathBuf,
    /// Of CLIs that were seen behind a wrapper.
    known: Vec<Print>,
    /// Whether a file is the sidecar: by device, number, time.
    files: HashMap<(u64, u64, i64), bool>,
    told: BTreeSet<(i32, u64)>,
}

impl Patrol {
    fn new() -> Patrol {
        Patrol { proc: PathBuf::from("/proc"), known: Vec::new(), files: HashMap::new(), told: BTreeSet::new() }
    }

    /// How many there are. Each is told once.
    fn look(&mut self) -> u64 {
        let mut found = self.unwrapped();
        if !found.is_empty() {
            std::thread::sleep(SETTLES);
            let still = self.unwrapped();
            found.retain(|process| still.contains(process));
        }
        for (pid, _) in found.difference(&self.told) {
            let changed = self.changed_by(*pid);
            let changed = (!changed.is_empty()).then(|| changed.join(", "));
            tracing::warn!(pid, changed, "a Claude CLI runs without the sidecar: it is neither counted nor limited");
        }
        self.told = found;
        self.told.len() as u64
    }

    /// Looks for ever, on a thread of its own: what a process says of itself may be made to come late. `tell` says whether to go on.
    pub(crate) fn walk(mut tell: impl FnMut(f64) -> bool + Send + 'static) {
        let walks = std::thread::Builder::new().name(String::from("patrol")).stack_size(256 * 1024).spawn(move || {
            rustix::process::nice(NICE).ok();
            let mut patrol = Patrol::new();
            #[expect(clippy::cast_precision_loss, reason = "a gauge speaks in floats")]
            while tell(patrol.look() as f64) {
                std::thread::sleep(EVERY);
            }
        });
        if let Err(error) = walks {
            tracing::warn!(%error, "nobody looks for agents without the sidecar");
        }
    }

    /// The variables of its environment that have code run in it, or have it ask somebody else, where we may look.
    fn changed_by(&self, pid: i32) -> Vec<String> {
        let mut environ = Vec::new();
        let read = File::open(self.proc.join(pid.to_string()).join("environ"))
            .and_then(|file| file.take(ENVIRONMENT).read_to_end(&mut environ));
        if read.is_ok() { influence::names(&environ) } else { Vec::new() }
    }

    fn unwrapped(&mut self) -> BTreeSet<(i32, u64)> {
        let processes = self.processes();
        let found = nobodys(&processes);
        for process in processes.values().filter(|process| process.role == Role::Cli) {
            if let Some(print) = process.print.as_ref().filter(|print| !self.known.contains(print))
                && self.known.len() < FILES
            {
                self.known.push(print.clone());
            }
        }
        found
    }

    fn processes(&mut self) -> BTreeMap<i32, Process> {
        let entries = fs::read_dir(&self.proc).into_iter().flatten().flatten();
        let pids: Vec<i32> = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).take(PROCESSES).collect();
        pids.into_iter().filter_map(|pid| Some((pid, self.process(pid)?))).collect()
    }

    fn process(&mut self, pid: i32) -> Option<Process> {
        let dir = self.proc.join(pid.to_string());
        let stat = fs::read_to_string(dir.join("stat")).ok()?;
        let (_, fields) = stat.rsplit_once(')')?;
        let fields: Vec<&str> = fields.split_ascii_whitespace().collect();
        let (parent, started) = (fields.get(1)?.parse().ok()?, fields.get(19)?.parse().ok()?);
        let mut words = Vec::new();
        File::open(dir.join("cmdline")).ok()?.take(WORDS).read_to_end(&mut words).ok()?;
        let words: Vec<OsString> = words
            .split(|byte| *byte == 0)
            .filter(|word| !word.is_empty())
            .map(|word| OsStr::from_bytes(word).to_owned())
            .collect();
        let (role, print) = self.role(&dir, &words);
        Some(Process { parent, started, role, print })
    }

    fn role(&mut self, dir: &Path, words: &[OsString]) -> (Role, Option<Print>) {
        let first = words.first().map(|word| file_name(Path::new(word))).unwrap_or_default();
        let Ok(exe) = fs::read_link(dir.join("exe")) else {
            // Another user's, or one of us, which hides: its own word has to do, or what its threads are called, whatever it is.
            let ours = first == "agent-sidecar" || THREADS.iter().all(|name| has_thread(dir, name));
            let role = if ours { Role::Sidecar } else { self.cli_by(&first, words) };
            return (role, None);
        };
        let file = dir.join("exe");
        let name = file_name(&exe);
        let native = exe.parent().is_some_and(|dir| dir.ends_with("claude/versions"));
        if self.is_sidecar(&file, &name) {
            return (Role::Sidecar, None);
        }
        if shim::is_cli_name(&name) || native {
            let print = print(&file);
            return (if asks(&first, words) { Role::Cli } else { Role::Other }, print);
        }
        if self.known.is_empty() || !file.metadata().is_ok_and(|file| self.known.iter().any(|k| k.length == file.len())) {
            return (self.cli_by("", words), None);
        }
        let print = print(&file);
        let known = print.as_ref().is_some_and(|print| self.known.contains(print));
        (if known && asks(&first, words) { Role::Cli } else { Role::Other }, print)
    }

    /// By what it says of itself: a file that is run by node says no more.
    fn cli_by(&self, first: &str, words: &[OsString]) -> Role {
        let script = words.get(1).map(Path::new).filter(|path| path.ends_with("claude-code/cli.js"));
        match script {
            Some(_) if asks("", &words[1..]) => Role::Cli,
            None if shim::is_cli_name(first) && asks(first, words) => Role::Cli,
            _ => Role::Other,
        }
    }

    fn is_sidecar(&mut self, file: &Path, name: &str) -> bool {
        if !matches!(name, "agent-sidecar" | "claude" | "claude.exe") {
            return false;
        }
        let Ok(found) = file.metadata() else { return false };
        if self.files.len() >= FILES {
            self.files.clear();
        }
        *self.files.entry((found.dev(), found.ino(), found.mtime())).or_insert_with(|| shim::is_sidecar(file))
    }
}

/// The CLIs that have no wrapper of their own.
fn nobodys(processes: &BTreeMap<i32, Process>) -> BTreeSet<(i32, u64)> {
    let mut found = BTreeSet::new();
    // Of each wrapper, the first is its own.
    let mut first: BTreeMap<i32, (u64, i32)> = BTreeMap::new();
    for (pid, process) in processes.iter().filter(|(_, process)| process.role == Role::Cli) {
        let mut above = process.parent;
        let mut wrapper = None;
        for _ in 0..DEEPEST {
            match processes.get(&above) {
                Some(parent) if parent.role == Role::Sidecar => {
                    wrapper = Some(above);
                    break;
                }
                Some(parent) if parent.role == Role::Other => above = parent.parent,
                Some(_) | None => break,
            }
        }
        let this = (process.started, *pid);
        let unwrapped = match wrapper.map(|wrapper| first.entry(wrapper).or_insert(this)) {
            None => Some(this),
            Some(own) if *own == this => None,
            Some(own) if this < *own => Some(std::mem::replace(own, this)),
            Some(_) => Some(this),
        };
        found.extend(unwrapped.map(|(started, pid)| (pid, started)));
    }
    found
}

/// The last part of a path; the kernel says behind it when the file is gone.
fn file_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name.strip_suffix(" (deleted)").unwrap_or(&name).to_owned()
}

/// Whether a CLI that was started like this asks the model, as far as it still says how.
fn asks(first: &str, words: &[OsString]) -> bool {
    let words: Vec<OsString> = std::iter::once(OsString::from("claude")).chain(words.iter().skip(1).cloned()).collect();
    !INSIDE.contains(&first) && Launch::of(&words, false, false).asks_model
}

fn has_thread(dir: &Path, name: &str) -> bool {
    let tasks = fs::read_dir(dir.join("task")).into_iter().flatten().flatten().take(DEEPEST);
    tasks.into_iter().any(|task| fs::read_to_string(task.path().join("comm")).is_ok_and(|comm| comm.trim_end() == name))
}

fn print(file: &Path) -> Option<Print> {
    let file = File::open(file).ok()?;
    let length = file.metadata().ok()?.len();
    let mut page = vec![0; 4 * 1024];
    let n = file.read_at(&mut page, length / 2).ok()?;
    page.truncate(n);
    Some(Print { length, page })
}

/// Whether a file is still the one that it was.
pub(crate) struct Seal {
    path: PathBuf,
    was: Option<(u64, u64, u64, i64)>,
}

impl Seal {
    pub(crate) fn of(path: &Path) -> Seal {
        Seal { path: path.to_owned(), was: look_of(path) }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn is_broken(&self) -> bool {
        self.was.is_some() && look_of(&self.path) != self.was
    }
}

fn look_of(path: &Path) -> Option<(u64, u64, u64, i64)> {
    path.metadata().ok().map(|file| (file.dev(), file.ino(), file.len(), file.mtime()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_no_wrapper_of_its_own_is_found() {
        let process = |parent, role| Process { parent, started: 0, role, print: None };
        let of = |list: &[(i32, i32, Role)]| {
            let processes = list
                .iter()
                .map(|(pid, parent, role)| (*pid, Process { started: u64::try_from(*pid).unwrap(), ..process(*parent, *role) }));
            nobodys(&processes.collect()).into_iter().map(|(pid, _)| pid).collect::<Vec<i32>>()
        };
        use Role::{Cli, Other, Sidecar};
        assert_eq!(of(&[(1, 0, Sidecar), (2, 1, Cli)]), [0; 0]);
        assert_eq!(of(&[(1, 0, Sidecar), (2, 1, Other), (3, 2, Cli)]), [0; 0], "started by a script, or gosu");
        assert_eq!(of(&[(1, 0, Sidecar), (2, 1, Cli), (3, 2, Other), (4, 3, Sidecar), (5, 4, Cli)]), [0; 0]);
        assert_eq!(of(&[(1, 0, Sidecar), (2, 1, Cli), (3, 2, Other), (4, 3, Cli)]), [4]);
        assert_eq!(of(&[(1, 0, Sidecar), (2, 1, Cli), (4, 1, Cli)]), [4], "an orphan");
        assert_eq!(of(&[(1, 0, Other), (2, 1, Cli)]), [2]);
        assert_eq!(of(&[(2, 0, Cli)]), [2], "from another namespace");
        assert_eq!(of(&[(2, 3, Other), (3, 2, Other), (4, 3, Cli)]), [4], "pids that were used again have no end");
    }

    #[test]
    fn a_cli_is_told_from_what_is_called_like_it() {
        let mut patrol = Patrol::new();
        let words = |line: &str| line.split(' ').map(OsString::from).collect::<Vec<_>>();
        let mut by = |line: &str| patrol.role(Path::new("/no/such/process"), &words(line)).0;
        assert_eq!(by("claude -p hi"), Role::Cli);
        assert_eq!(by("/opt/x/claude.sidecar-real -p hi"), Role::Cli);
        assert_eq!(by("claude --version"), Role::Other);
        assert_eq!(by("claude mcp list"), Role::Other);
        assert_eq!(by("/usr/bin/node /x/@anthropic-ai/claude-code/cli.js -p hi"), Role::Cli);
        assert_eq!(by("/usr/bin/node /x/cli.js"), Role::Other);
        assert_eq!(by("agent-sidecar run -- claude"), Role::Sidecar);
        assert!(!asks("rg", &words("rg pattern")));
        // Under any name, where its file is not ours to look at.
        let process = std::env::temp_dir().join(format!("agent-sidecar-patrol-{}", std::process::id()));
        for (n, thread) in ["wrapper", "monitor", "sample"].iter().enumerate() {
            assert_eq!(patrol.role(&process, &words("wrapper run -- claude")).0, Role::Other);
            fs::create_dir_all(process.join(format!("task/{n}"))).unwrap();
            fs::write(process.join(format!("task/{n}/comm")), format!("{thread}\n")).unwrap();
        }
        assert_eq!(patrol.role(&process, &words("wrapper run -- claude")).0, Role::Sidecar);
        fs::remove_dir_all(process).unwrap();
    }

    #[test]
    fn a_file_that_was_changed_or_is_gone_breaks_its_seal() {
        let path = std::env::temp_dir().join(format!("agent-sidecar-seal-{}", std::process::id()));
        assert!(!Seal::of(&path).is_broken(), "nothing there, nothing to watch");
        fs::write(&path, "one").unwrap();
        let seal = Seal::of(&path);
        assert!(!seal.is_broken());
        fs::write(&path, "other").unwrap();
        assert!(seal.is_broken());
        fs::remove_file(&path).unwrap();
        assert!(seal.is_broken());
    }
}
