//! The processes below us, from /proc: tools of the CLI live in sessions of their own, where no signal to a group reaches them.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use rustix::process::{Pid, Signal};

/// Every process below `root`, which is not among them. As PID 1 everything in sight is ours: what has another parent was put
/// into our container from outside, and dies with us anyway.
pub(crate) fn below(root: i32) -> Vec<Pid> {
    let all = processes(Path::new("/proc"));
    let mut pids = if root == 1 { all.into_iter().map(|p| p.pid).collect() } else { descendants(&all, root) };
    pids.retain(|pid| *pid != root);
    pids.into_iter().filter_map(Pid::from_raw).collect()
}

/// Sends `signal` to each; those that are gone do not matter.
pub(crate) fn signal_all(pids: &[Pid], signal: Signal) {
    for pid in pids {
        // ESRCH is what we want, EPERM (another user's, by way of setuid) what we cannot help.
        rustix::process::kill_process(*pid, signal).ok();
    }
}

/// The state of one process (`R`, `S`, `T`, `Z`, …).
pub(crate) fn state(pid: i32) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    Some(parse(&stat)?.state)
}

/// The group and the session of a process. The system's own calls answer zero for what is led from outside of our namespace, as after
/// `nsenter`, which is no pid.
pub(crate) fn group_and_session(pid: i32) -> Option<(i32, i32)> {
    let [_, group, session] = family(pid)?;
    Some((group, session))
}

pub(crate) fn parent(pid: i32) -> Option<i32> {
    family(pid).map(|[parent, ..]| parent)
}

/// A process's parent, group and session.
fn family(pid: i32) -> Option<[i32; 3]> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_ascii_whitespace().skip(1).map_while(|field| field.parse().ok());
    Some([fields.next()?, fields.next()?, fields.next()?])
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Process {
    pid: i32,
    state: char,
    parent: i32,
    kernel: bool,
}

/// Everything that lives, threads of the kernel left out.
fn processes(proc: &Path) -> Vec<Process> {
    let Ok(entries) = std::fs::read_dir(proc) else { return Vec::new() };
    entries
        .flatten()
        .filter(|e| e.file_name().as_encoded_bytes().first().is_some_and(u8::is_ascii_digit))
        .filter_map(|e| parse(&std::fs::read_to_string(e.path().join("stat")).ok()?))
        .filter(|p| !p.kernel && !matches!(p.state, 'Z' | 'X'))
        .collect()
}

fn descendants(all: &[Process], root: i32) -> Vec<i32> {
    let mut children: HashMap<i32, Vec<i32>> = HashMap::new();
    for p in all {
        children.entry(p.parent).or_default().push(p.pid);
    }
    let (mut found, mut seen) = (vec![root], HashSet::from([root]));
    let mut at = 0;
    while let Some(pid) = found.get(at) {
        let next: Vec<i32> = children.get(pid).into_iter().flatten().copied().filter(|p| seen.insert(*p)).collect();
        found.extend(next);
        at += 1;
    }
    found
}

/// `pid (name) state ppid pgrp session tty tpgid flags …`; the name may hold anything, brackets too.
fn parse(stat: &str) -> Option<Process> {
    const PF_KTHREAD: u64 = 0x0020_0000;
    let (head, tail) = stat.rsplit_once(')')?;
    let pid = head.split_once(' ')?.0.parse().ok()?;
    let mut fields = tail.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    let parent = fields.next()?.parse().ok()?;
    let flags: u64 = fields.nth(4)?.parse().ok()?;
    Some(Process { pid, state, parent, kernel: flags & PF_KTHREAD != 0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_may_hold_anything() {
        let stat = "7 (a) R (b) c) S 3 7 7 0 -1 4194304 1 2 3";
        assert_eq!(parse(stat), Some(Process { pid: 7, state: 'S', parent: 3, kernel: false }));
        assert!(parse("2 (kthreadd) S 0 0 0 0 -1 2129984 0 0").unwrap().kernel);
    }

    #[test]
    fn grandchildren_are_found_and_strangers_are_not() {
        let p = |pid, parent| Process { pid, state: 'S', parent, kernel: false };
        let mut found = descendants(&[p(9, 5), p(5, 2), p(6, 1), p(2, 1), p(3, 3)], 2);
        found.sort_unstable();
        assert_eq!(found, [2, 5, 9]);
    }
}
