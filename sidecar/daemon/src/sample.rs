//! Reads what the container and the processes below us use: cgroup files by hand, processes through `sysinfo`.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use agent_sidecar_core::Exit;
use agent_sidecar_core::sample::{CliSample, ContainerSample, OomVictim, RoleSample, Sample};
use sysinfo::{Pid, Process, ProcessRefreshKind, ProcessesToUpdate, System};

use crate::supervise;

mod sockets;

/// How often. One reading takes two milliseconds where a hundred other processes are, less in a container of one's own.
pub(crate) const EVERY: Duration = Duration::from_secs(5);

/// How the kernel takes somebody for memory, and how a shell around it tells.
const KILL: i32 = 9;
const KILLED: i32 = 128 + KILL;

/// What is kept between two readings.
pub(crate) struct Sampler {
    system: System,
    cgroup: PathBuf,
    proc: PathBuf,
    /// CPU time by role of processes that are gone: a counter must not fall when a tool ends.
    gone: BTreeMap<&'static str, Duration>,
    seen: HashMap<Pid, Seen>,
    oom_kills: Option<u64>,
    undecided: Option<Undecided>,
}

/// The kernel has killed somebody, and the largest was still there when we looked: it takes its time to be gone.
struct Undecided {
    kills: u64,
    gone: Vec<Seen>,
}

/// A process at the reading before.
#[derive(Clone, Copy)]
struct Seen {
    role: &'static str,
    cpu: Duration,
    memory_bytes: u64,
}

impl Sampler {
    pub(crate) fn new() -> Result<Sampler, sysinfo::Error> {
        Sampler::at(Path::new("/sys/fs/cgroup"), Path::new("/proc"))
    }

    fn at(cgroup: &Path, proc: &Path) -> Result<Sampler, sysinfo::Error> {
        Ok(Sampler {
            system: System::new()?,
            cgroup: cgroup.to_owned(),
            proc: proc.to_owned(),
            gone: BTreeMap::new(),
            seen: HashMap::new(),
            oom_kills: oom_kills(cgroup),
            undecided: None,
        })
    }

    /// Whether the kernel has killed somebody for memory since the last reading: then it is worth another.
    pub(crate) fn oom_killed(&self) -> bool {
        oom_kills(&self.cgroup) > self.oom_kills || self.undecided.is_some()
    }

    /// The reading after the CLI's end.
    pub(crate) fn last(&mut self, exit: Exit) -> Sample {
        if !matches!(exit, Exit::Signal(KILL) | Exit::Code(KILLED)) {
            // It is gone, and not because the kernel took it.
            let (gone, seen) = (&mut self.gone, &mut self.seen);
            seen.retain(|_, seen| {
                if seen.role == "cli" {
                    *gone.entry(seen.role).or_default() += seen.cpu;
                }
                seen.role != "cli"
            });
        }
        self.look(None, false, Some(exit))
    }

    /// One reading; `cli` is the CLI's pid, `works` whether its connections are of interest. What cannot be read is absent.
    pub(crate) fn read(&mut self, cli: Option<u32>, works: bool) -> Sample {
        self.look(cli, works, None)
    }

    fn look(&mut self, cli: Option<u32>, works: bool, exit: Option<Exit>) -> Sample {
        let kind = ProcessRefreshKind::nothing().with_memory().with_cpu();
        let us = Pid::from_u32(std::process::id());
        // Others may live here by the hundred: looking at each of them would cost more than all else that we do.
        let below = supervise::below(std::process::id().cast_signed())
            .into_iter()
            .map(|pid| Pid::from_u32(pid.as_raw_nonzero().get().cast_unsigned()));
        let pids: Vec<Pid> = below.chain([us]).collect();
        self.system.refresh_processes_specifics(ProcessesToUpdate::Some(&pids), true, kind);
        let cli = cli.map(Pid::from_u32);
        let mut roles: BTreeMap<&'static str, RoleSample> =
            ["cli", "mcp", "tool"].into_iter().map(|role| (role, RoleSample::new(role))).collect();
        let mut now = HashMap::new();
        for pid in &pids {
            let Some(process) = self.system.process(*pid) else { continue };
            let Some((role, orphan)) = self.role(*pid, process, us, cli) else { continue };
            let (cpu, memory_bytes) = (Duration::from_millis(process.accumulated_cpu_time()), process.memory());
            now.insert(*pid, Seen { role, cpu, memory_bytes });
            if let Some(sum) = roles.get_mut(role) {
                sum.processes += 1;
                sum.orphans += u64::from(orphan);
                sum.cpu += cpu;
                sum.memory_bytes += memory_bytes;
                if let Some(fds) = count(&self.proc.join(pid.to_string()).join("fd")) {
                    *sum.open_fds.get_or_insert(0) += fds;
                }
            }
        }
        let vanished: Vec<Seen> = self.seen.iter().filter(|(pid, _)| !now.contains_key(pid)).map(|(_, seen)| *seen).collect();
        for seen in &vanished {
            *self.gone.entry(seen.role).or_default() += seen.cpu;
        }
        let before = std::mem::replace(&mut self.seen, now);
        for (role, cpu) in &self.gone {
            if let Some(sum) = roles.get_mut(role) {
                sum.cpu += *cpu;
            }
        }
        let mut container = container(&self.cgroup);
        let cli = cli.and_then(|pid| {
            let process = self.proc.join(pid.to_string());
            container.frozen = frozen(&self.cgroup, &process);
            let state = supervise::state(pid.as_u32().cast_signed())?;
            Some(CliSample { state, sockets: if works { sockets::read(&process) } else { None } })
        });
        let killed = container.oom_kills.unwrap_or_default().saturating_sub(self.oom_kills.unwrap_or_default());
        self.oom_kills = container.oom_kills.or(self.oom_kills);
        let (killed, victims) = self.victims(killed, vanished, &before, exit);
        let own = self.system.process(us);
        Sample {
            roles: roles.into_values().collect(),
            cli,
            oom_unknown: killed.saturating_sub(victims.len() as u64),
            oom_victims: victims.iter().map(|seen| OomVictim { role: seen.role, memory_bytes: seen.memory_bytes }).collect(),
            container,
            sidecar_cpu: own.map(|process| Duration::from_millis(process.accumulated_cpu_time())),
            sidecar_memory_bytes: own.map(Process::memory),
        }
    }

    /// How many were killed, and who: the kernel takes the largest; who is gone and was large is who it took.
    fn victims(&mut self, killed: u64, mut gone: Vec<Seen>, before: &HashMap<Pid, Seen>, exit: Option<Exit>) -> (u64, Vec<Seen>) {
        let waited = self.undecided.take();
        let last_look = exit.is_some() || waited.is_some();
        let earlier = waited.unwrap_or(Undecided { kills: 0, gone: Vec::new() });
        let killed = killed + earlier.kills;
        if killed == 0 {
            return (0, Vec::new());
        }
        gone.extend(earlier.gone);
        // Of the CLI we know that it was killed; a tool that ended beside it may have been larger.
        let taken = exit == Some(Exit::Signal(KILL));
        gone.sort_by_key(|seen| std::cmp::Reverse((taken && seen.role == "cli", seen.memory_bytes)));
        let found = gone.get(..usize::try_from(killed).unwrap_or(usize::MAX)).and_then(<[Seen]>::last);
        let smallest = found.map_or(0, |seen| seen.memory_bytes);
        let mut larger = false;
        for (pid, seen) in &mut self.seen {
            // Who is dying has given back what it had.
            let was = before.get(pid).map_or(0, |seen| seen.memory_bytes);
            seen.memory_bytes = seen.memory_bytes.max(was);
            larger |= seen.memory_bytes > smallest;
        }
        if larger && !last_look {
            self.undecided = Some(Undecided { kills: killed, gone });
            return (0, Vec::new());
        }
        gone.truncate(usize::try_from(killed).unwrap_or(usize::MAX));
        (killed, gone)
    }

    /// What a process is to the agent: the CLI, a server in its group, or a tool, which has a session of its own. And whether it is a
    /// tool that came to us because the call that started it is over.
    fn role(&self, pid: Pid, process: &Process, us: Pid, cli: Option<Pid>) -> Option<(&'static str, bool)> {
        if Some(pid) == cli {
            return Some(("cli", false));
        }
        // Threads are listed as processes by some kernels' tools, and here.
        if pid == us || process.thread_kind().is_some() {
            return None;
        }
        let mut above = process.parent();
        for _ in 0..64 {
            match above {
                Some(parent) if parent == us || Some(parent) == cli => {
                    let same_session = process.session_id() == cli.and_then(|cli| self.system.process(cli)?.session_id());
                    return Some(if same_session { ("mcp", false) } else { ("tool", above == Some(us)) });
                }
                Some(parent) => above = self.system.process(parent).and_then(Process::parent),
                None => return None,
            }
        }
        None
    }
}

fn count(dir: &Path) -> Option<u64> {
    fs::read_dir(dir).ok().map(|entries| entries.count() as u64)
}

fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// One value of a file of `name value` lines.
fn field(path: &Path, name: &str) -> Option<u64> {
    let text = fs::read_to_string(path).ok()?;
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
}

/// A limit that nobody set is a number near the top in version 1, and a word in version 2.
const NO_LIMIT: u64 = 1 << 60;

fn container(root: &Path) -> ContainerSample {
    let limit = |n: Option<u64>| n.filter(|n| *n < NO_LIMIT);
    if root.join("memory.current").exists() || root.join("cgroup.controllers").exists() {
        let used = number(&root.join("memory.current"));
        let inactive = field(&root.join("memory.stat"), "inactive_file").unwrap_or_default();
        let pressure = [("cpu", "cpu.pressure"), ("memory", "memory.pressure"), ("io", "io.pressure")]
            .into_iter()
            .flat_map(|(resource, file)| pressure(resource, &root.join(file)))
            .collect();
        return ContainerSample {
            working_set_bytes: used.map(|used| used.saturating_sub(inactive)),
            limit_bytes: limit(number(&root.join("memory.max"))),
            oom_kills: oom_kills(root),
            cpu: field(&root.join("cpu.stat"), "usage_usec").map(Duration::from_micros),
            throttled: field(&root.join("cpu.stat"), "throttled_usec").map(Duration::from_micros),
            pids: number(&root.join("pids.current")),
            pids_limit: number(&root.join("pids.max")),
            forks_refused: field(&root.join("pids.events"), "max"),
            frozen: None,
            pressure,
        };
    }
    let memory = root.join("memory");
    let inactive = field(&memory.join("memory.stat"), "total_inactive_file").unwrap_or_default();
    ContainerSample {
        working_set_bytes: number(&memory.join("memory.usage_in_bytes")).map(|used| used.saturating_sub(inactive)),
        limit_bytes: limit(number(&memory.join("memory.limit_in_bytes"))),
        oom_kills: oom_kills(root),
        cpu: number(&root.join("cpuacct/cpuacct.usage")).map(Duration::from_nanos),
        throttled: field(&root.join("cpu/cpu.stat"), "throttled_time").map(Duration::from_nanos),
        pids: number(&root.join("pids/pids.current")),
        pids_limit: number(&root.join("pids/pids.max")),
        forks_refused: field(&root.join("pids/pids.events"), "max"),
        frozen: None,
        pressure: Vec::new(),
    }
}

fn oom_kills(root: &Path) -> Option<u64> {
    field(&root.join("memory.events"), "oom_kill").or_else(|| field(&root.join("memory/memory.oom_control"), "oom_kill"))
}

/// Whether the freezer holds a process: in a group of its own, or we would not be here to ask.
fn frozen(root: &Path, process: &Path) -> Option<bool> {
    let groups = fs::read_to_string(process.join("cgroup")).ok()?;
    let group = |prefix: &str| groups.lines().find_map(|line| line.split_once(prefix)?.1.strip_prefix('/'));
    let frozen = group("0::").and_then(|path| field(&root.join(path).join("cgroup.events"), "frozen"));
    // Version 1 has a tree of its own for it, and calls what it holds uninterruptible.
    let state =
        group(":freezer:").and_then(|path| fs::read_to_string(root.join("freezer").join(path).join("freezer.state")).ok());
    frozen.map(|frozen| frozen == 1).or_else(|| state.map(|state| state.trim_end() == "FROZEN"))
}

/// `some avg10=0.00 avg60=0.00 avg300=0.00 total=123`, in microseconds.
fn pressure(resource: &'static str, path: &Path) -> Vec<(&'static str, &'static str, Duration)> {
    let text = fs::read_to_string(path).unwrap_or_default();
    ["some", "full"]
        .into_iter()
        .filter_map(|kind| {
            let line = text.lines().find(|line| line.starts_with(kind))?;
            let total = line.split("total=").nth(1)?.trim().parse().ok()?;
            Some((resource, kind, Duration::from_micros(total)))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fixture(name: &str, files: &[(&str, &str)]) -> PathBuf {
        let root = std::env::temp_dir().join(format!("agent-sidecar-sample-{name}-{}", std::process::id()));
        for (file, text) in files {
            let path = root.join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    #[test]
    fn both_versions_of_cgroups_are_read() {
        let v2 = fixture(
            "v2",
            &[
                ("cgroup.controllers", "cpu memory\n"),
                ("memory.current", "1000\n"),
                ("memory.max", "max\n"),
                ("memory.stat", "anon 600\ninactive_file 300\n"),
                ("memory.events", "low 0\noom 1\noom_kill 2\n"),
                ("cpu.stat", "usage_usec 5000000\nthrottled_usec 3000000\n"),
                ("pids.current", "17\n"),
                ("pids.max", "max\n"),
                ("pids.events", "max 5\n"),
                ("agent/cgroup.events", "populated 1\nfrozen 1\n"),
                ("7/cgroup", "0::/agent\n"),
                (
                    "memory.pressure",
                    "some avg10=0.00 avg60=0.00 avg300=0.00 total=250000\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n",
                ),
            ],
        );
        let sample = container(&v2);
        assert_eq!((sample.working_set_bytes, sample.limit_bytes, sample.oom_kills), (Some(700), None, Some(2)));
        assert_eq!((sample.cpu, sample.throttled), (Some(Duration::from_secs(5)), Some(Duration::from_secs(3))));
        assert_eq!((frozen(&v2, &v2.join("7")), frozen(&v2, &v2.join("8"))), (Some(true), None));
        assert_eq!((sample.pids, sample.pids_limit, sample.forks_refused), (Some(17), None, Some(5)));
        assert_eq!(sample.pressure[0], ("memory", "some", Duration::from_millis(250)));

        let v1 = fixture(
            "v1",
            &[
                ("freezer/agent/freezer.state", "FROZEN\n"),
                ("freezer/freezer.state", "THAWED\n"),
                ("7/cgroup", "6:freezer:/agent\n4:memory:/agent\n0::/\n"),
                ("8/cgroup", "6:freezer:/\n"),
                ("memory/memory.usage_in_bytes", "1000\n"),
                ("memory/memory.limit_in_bytes", "4096\n"),
                ("memory/memory.stat", "cache 1\ntotal_inactive_file 100\n"),
                ("memory/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n"),
                ("cpuacct/cpuacct.usage", "2000000000\n"),
                ("pids/pids.max", "100\n"),
            ],
        );
        let sample = container(&v1);
        assert_eq!((sample.working_set_bytes, sample.limit_bytes, sample.oom_kills), (Some(900), Some(4096), Some(3)));
        assert_eq!(sample.cpu, Some(Duration::from_secs(2)));
        assert_eq!((sample.pids, sample.pids_limit, sample.forks_refused), (None, Some(100), None));
        assert_eq!((frozen(&v1, &v1.join("7")), frozen(&v1, &v1.join("8"))), (Some(true), Some(false)));
        for root in [v1, v2] {
            fs::remove_dir_all(root).unwrap();
        }
    }

    #[test]
    fn what_a_process_used_is_not_forgotten_when_it_ends() {
        let mut sampler = Sampler::new().unwrap();
        let sample = sampler.read(None, false);
        assert!(sample.sidecar_memory_bytes.unwrap() > 100_000);
        // No child of another test is taken for one of these.
        let seen = Seen { role: "mcp", cpu: Duration::from_secs(7), memory_bytes: 0 };
        sampler.seen.insert(Pid::from_u32(u32::MAX - 1), seen);
        assert_eq!(sampler.read(None, false).cpu("mcp"), Duration::from_secs(7));
        assert_eq!(sampler.read(None, false).cpu("mcp"), Duration::from_secs(7));
    }

    #[test]
    fn who_was_large_and_is_gone_was_killed_for_memory() {
        let cgroup = fixture("oom", &[("cgroup.controllers", "memory\n"), ("memory.events", "oom_kill 4\n")]);
        let mut sampler = Sampler::at(&cgroup, Path::new("/proc")).unwrap();
        // What was killed before us is not ours.
        assert!(!sampler.oom_killed());
        assert_eq!(sampler.read(None, false).oom_unknown, 0);
        for (n, role, memory_bytes) in [(1, "tool", 10), (2, "mcp", 3 << 40), (3, "tool", 5 << 40)] {
            sampler.seen.insert(Pid::from_u32(u32::MAX - n), Seen { role, cpu: Duration::ZERO, memory_bytes });
        }
        fs::write(cgroup.join("memory.events"), "oom_kill 5\n").unwrap();
        let victim = |role, memory_bytes| OomVictim { role, memory_bytes };
        assert!(sampler.oom_killed());
        assert_eq!(sampler.read(None, false).oom_victims, [victim("tool", 5 << 40)]);
        assert_eq!(sampler.read(None, false).oom_victims, []);
        // A CLI that ended by itself was not killed, whoever was.
        for (n, exit, victims) in [(7, Exit::Code(0), &[][..]), (8, Exit::Signal(9), &[victim("cli", 9 << 40)])] {
            let seen = Seen { role: "cli", cpu: Duration::from_secs(1), memory_bytes: 9 << 40 };
            sampler.seen.insert(Pid::from_u32(u32::MAX - n), seen);
            fs::write(cgroup.join("memory.events"), format!("oom_kill {n}\n")).unwrap();
            sampler.oom_kills = Some(u64::from(n) - 1);
            let last = sampler.last(exit);
            assert_eq!((last.oom_victims.as_slice(), last.oom_unknown), (victims, u64::from(victims.is_empty())));
        }
        sampler.oom_kills = Some(5);
        sampler.seen.clear();
        fs::write(cgroup.join("memory.events"), "oom_kill 6\n").unwrap();
        // The last reading decides, also where children of other tests live.
        let sample = sampler.last(Exit::Code(0));
        assert_eq!((sample.oom_victims, sample.oom_unknown), (Vec::new(), 1));
        fs::remove_dir_all(cgroup).unwrap();
    }

    #[test]
    #[expect(clippy::disallowed_methods, reason = "here is no reaper: the test owns the process")]
    fn a_victim_that_dies_slowly_is_waited_for() {
        let cgroup = fixture("slow", &[("cgroup.controllers", "memory\n"), ("memory.events", "oom_kill 4\n")]);
        let mut agent = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        let mut sampler = Sampler::at(&cgroup, Path::new("/proc")).unwrap();
        let (large, small) = (9 << 40, 5 << 40);
        // The kernel has counted its kill, the largest still dies, and a tool has ended by itself.
        let killed = |sampler: &mut Sampler, n: u32| {
            let seen = |role, memory_bytes| Seen { role, cpu: Duration::ZERO, memory_bytes };
            sampler.seen.insert(Pid::from_u32(agent.id()), seen("cli", large));
            sampler.seen.insert(Pid::from_u32(u32::MAX - n), seen("tool", small));
            fs::write(cgroup.join("memory.events"), format!("oom_kill {n}\n")).unwrap();
            let sample = sampler.read(Some(agent.id()), false);
            assert_eq!((sample.oom_victims, sample.oom_unknown), (Vec::new(), 0));
            assert!(sampler.oom_killed(), "there is something to say yet");
        };
        let victim = |role, memory_bytes| OomVictim { role, memory_bytes };
        // Who is still there at the next look was not it.
        killed(&mut sampler, 5);
        let sample = sampler.read(Some(agent.id()), false);
        assert_eq!((sample.oom_victims, sample.oom_unknown), (vec![victim("tool", small)], 0));
        assert!(!sampler.oom_killed());
        killed(&mut sampler, 6);
        agent.kill().unwrap();
        agent.wait().unwrap();
        assert_eq!(sampler.last(Exit::Signal(KILL)).oom_victims, [victim("cli", large)]);
        fs::remove_dir_all(cgroup).unwrap();
    }

    #[test]
    fn of_two_that_are_gone_the_one_that_was_killed_is_the_victim() {
        let cgroup = fixture("two", &[("cgroup.controllers", "memory\n"), ("memory.events", "oom_kill 4\n")]);
        let mut sampler = Sampler::at(&cgroup, Path::new("/proc")).unwrap();
        // It has grown since it was looked at.
        for (n, role, memory_bytes) in [(1, "tool", 9 << 40), (2, "cli", 5 << 40)] {
            sampler.seen.insert(Pid::from_u32(u32::MAX - n), Seen { role, cpu: Duration::ZERO, memory_bytes });
        }
        fs::write(cgroup.join("memory.events"), "oom_kill 5\n").unwrap();
        assert_eq!(sampler.last(Exit::Signal(KILL)).oom_victims, [OomVictim { role: "cli", memory_bytes: 5 << 40 }]);
        fs::remove_dir_all(cgroup).unwrap();
    }
}
