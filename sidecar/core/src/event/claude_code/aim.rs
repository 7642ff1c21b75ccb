//! What a call is there for: to work, or to press a key, look and wait, which agents do again and again and are well.
//!
//! Words are all that is looked at, and kept nowhere. When in doubt it works: but what is work wrongly is stopped wrongly, so the lists
//! are generous with whatever moves by itself.

use super::super::Aim;

/// By its name alone.
pub(super) fn of_tool(tool: &str) -> Aim {
    const LOOK_AFTER: [&str; 7] =
        ["BashOutput", "TaskOutput", "AgentOutputTool", "Monitor", "ScheduleWakeup", "TaskGet", "TaskList"];
    let tool = tool.rsplit("__").next().unwrap_or(tool);
    let mut words = tool.split(|c: char| !c.is_ascii_alphanumeric());
    let begins = |word: &str, verb: &str| word.get(..verb.len()).is_some_and(|w| w.eq_ignore_ascii_case(verb));
    let waits = |word: &str| ["wait", "sleep", "poll", "watch"].iter().any(|verb| begins(word, verb));
    if LOOK_AFTER.contains(&tool) || words.clone().any(waits) {
        Aim::Wait
    } else if words.clone().any(|word| word.to_ascii_lowercase().ends_with("status")) {
        Aim::Look
    } else if words.any(|word| ["press", "key", "keys", "scroll", "swipe", "drag"].contains(&word)) {
        Aim::Press
    } else {
        Aim::Work
    }
}

/// A file that the CLI writes what runs in the background says to: to read it is to look after that.
pub(super) fn of_file(path: &[u8]) -> Aim {
    if path.ends_with(b".output") && memchr::memmem::find(path, b"/tasks/").is_some() { Aim::Wait } else { Aim::Work }
}

/// A shell's command: it waits if one of its words is a verb for it, and looks if each of its parts does.
pub(super) fn of_command(command: &[u8]) -> Aim {
    let is_end = |byte: &u8| byte.is_ascii_whitespace() || b";&|()`{}$'\"".contains(byte);
    if command.split(is_end).any(|word| lets_time_pass(word) || of_file(word) == Aim::Wait) {
        return Aim::Wait;
    }
    let parts = command.split(|byte| b";&\n".contains(byte)).filter_map(of_part);
    parts.min().unwrap_or(Aim::Work)
}

fn lets_time_pass(word: &[u8]) -> bool {
    let option = |name: &[u8]| {
        word.strip_prefix(name)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with(b"=") && rest != b"=false" && rest != b"=0")
    };
    let ends = |with: &[u8]| word.len() >= with.len() && word[word.len() - with.len()..].eq_ignore_ascii_case(with);
    matches!(word, b"sleep" | b"usleep" | b"wait" | b"watch" | b"until" | b"rollout" | b"setTimeout" | b"--follow")
        || [&b"--watch"[..], b"--wait"].into_iter().any(option)
        // /bin/sleep, time.sleep, Start-Sleep
        || [&b"/sleep"[..], b".sleep", b"-sleep"].into_iter().any(ends)
}

/// What moves by itself, and these say how far.
const LOOK: &[&[u8]] = &[
    b"curl",
    b"dmesg",
    b"journalctl",
    b"lsof",
    b"nc",
    b"netstat",
    b"nvidia-smi",
    b"pgrep",
    b"ping",
    b"ps",
    b"sacct",
    b"squeue",
    b"ss",
    b"tail",
    b"top",
    b"uptime",
    b"wget",
];
/// These do, with one of the words below.
const ASKED: &[&[u8]] = &[
    b"aws",
    b"az",
    b"docker",
    b"docker-compose",
    b"flyctl",
    b"gcloud",
    b"gh",
    b"glab",
    b"kubectl",
    b"nomad",
    b"oc",
    b"podman",
    b"service",
    b"systemctl",
    b"tmux",
    b"vercel",
];
const HOW: &[&[u8]] = &[
    b"api",
    b"capture-pane",
    b"checks",
    b"describe",
    b"events",
    b"get",
    b"inspect",
    b"is-active",
    b"list",
    b"logs",
    b"ls",
    b"ps",
    b"show",
    b"stats",
    b"status",
    b"top",
    b"view",
];
/// Nothing of their own.
const ASIDE: &[&[u8]] = &[b"cd", b"date", b"do", b"done", b"echo", b"export", b"fi", b"printf", b"set", b"then", b"true"];

/// One command of several; `None` if it is none, or does nothing. What comes behind a pipe only filters.
fn of_part(part: &[u8]) -> Option<Aim> {
    let mut words = part.split(|byte| byte.is_ascii_whitespace() || b"({".contains(byte)).filter(|word| !word.is_empty());
    let first = words.next()?;
    // What `2>&1` is cut into.
    if first.iter().all(u8::is_ascii_digit) || first.starts_with(b">") || ASIDE.contains(&first) {
        return None;
    }
    let (mut words, keys) = (words.take_while(|word| !word.starts_with(b"|")), [&b"send-keys"[..], b"keyevent"]);
    let of = |word: &[u8]| HOW.contains(&word) || word.starts_with(b"describe-") || word.starts_with(b"get-");
    Some(match () {
        () if matches!(first, b"xdotool" | b"ydotool") => Aim::Press,
        () if matches!(first, b"tmux" | b"adb") && words.clone().any(|word| keys.contains(&word)) => Aim::Press,
        () if LOOK.contains(&first) || ASKED.contains(&first) && words.any(of) => Aim::Look,
        () => Aim::Work,
    })
}
