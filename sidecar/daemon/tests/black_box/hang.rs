//! A disk that hangs: a file system of which the server never answers. The kernel has one for those who may mount it.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::support::*;

/// The server of the file system is descriptor 3, of which nobody reads. With its last holder the file system is gone.
const MOUNT: &str = r#"mount -i -t fuse hangs -o fd=3,rootmode=040000,user_id=0,group_id=0"#;

/// The same command, for which this directory hangs, if there is one.
fn where_it_hangs(dir: Option<&Path>, inner: &Command) -> Command {
    let mount = dir.map_or_else(String::new, |_| format!("{MOUNT} \"$1\" || exit 77; "));
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-c", &format!("exec 3<>/dev/fuse || exit 77; {mount}shift; exec \"$@\""), "sh"]);
    command.arg(dir.unwrap_or(Path::new("-"))).arg(inner.get_program()).args(inner.get_args());
    for (name, value) in inner.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command
}

/// False, and says so, where nothing can be made to hang.
fn disks_may_hang(test: &str) -> bool {
    let dir = Scratch::new("hang", &format!("{test}-probe"));
    let may = root() && where_it_hangs(Some(&dir), &Command::new("true")).status().is_ok_and(|status| status.success());
    if !may {
        eprintln!("not tried: only root, with /dev/fuse, can have a file system that hangs");
    }
    may
}

struct Yard {
    dir: Scratch,
    hung: PathBuf,
}

impl Yard {
    fn new(name: &str) -> Yard {
        let dir = Scratch::new("hang", name);
        let hung = dir.join("hung");
        std::fs::create_dir_all(&hung).unwrap();
        Yard { dir, hung }
    }

    fn command(&self, flags: &[&str], program: &str) -> Command {
        let mut command = Command::new(SIDECAR);
        command.args(["run", "--listen", "127.0.0.1:0", "--native-telemetry", "off", "--socket"]).arg(self.dir.join("hub.sock"));
        command.args(flags).args(["--", "sh", "-c", program, "claude"]).args(STREAM_JSON);
        command.env("CLAUDE_CONFIG_DIR", self.dir.join("config"));
        command
    }

    fn files(&self) -> [String; 4] {
        let file = |name: &str| self.hung.join(name).display().to_string();
        ["--ledger".to_owned(), file("ledger.jsonl"), "--events".to_owned(), file("events.jsonl")]
    }
}

/// Says that it is there, and what it hears of results.
const ECHO: &str = r#"
echo '{"type":"system","subtype":"init","session_id":"s","model":"m"}'
grep --line-buffered '"type":"result"'
exit 3"#;

#[test]
fn a_ledger_on_a_disk_that_hangs_holds_up_no_agent() {
    if !disks_may_hang("ledger") {
        return;
    }
    let yard = Yard::new("ledger");
    let files = yard.files();
    let files: Vec<&str> = files.iter().map(String::as_str).collect();
    let mut agent = Running::start(where_it_hangs(Some(&yard.hung), &yard.command(&files, ECHO)));
    assert!(agent.line().contains("init"));
    for n in 0..50 {
        let line = format!("{{\"type\":\"result\",\"subtype\":\"success\",\"session_id\":\"s\",\"num_turns\":{n}}}");
        agent.write(format!("{line}\n").as_bytes()).unwrap();
        assert_eq!(agent.line(), line);
    }
    // What cannot be written is counted, so the monitor is not held up, either.
    let address = || std::fs::read_to_string(yard.dir.join("hub.state/address")).ok()?.parse().ok();
    wait_for("the lines that are lost", || {
        let (_, page) = crate::http::try_ask(address()?, "GET /metrics")?;
        let lost = page.lines().find_map(|line| line.strip_prefix("agent_sidecar_ledger_errors_total "))?;
        let degraded = page.lines().any(|line| line == "agent_sidecar_degraded{component=\"ledger\"} 1");
        (degraded && lost.parse::<u64>().unwrap() > 50).then_some(())
    });
    agent.close_stdin();
    assert_eq!(agent.code(), Some(3));
}

#[test]
fn whether_the_agent_may_change_what_hangs_is_not_waited_for() {
    if !disks_may_hang("fence") {
        return;
    }
    let yard = Yard::new("fence");
    let files = yard.files();
    let flags: Vec<&str> = ["--user", "65534"].into_iter().chain(files.iter().map(String::as_str)).collect();
    let mut command = where_it_hangs(Some(&yard.hung), &yard.command(&flags, ECHO));
    command.current_dir("/");
    let mut agent = Running::start(command);
    assert!(agent.line().contains("init"));
    agent.close_stdin();
    assert_eq!(agent.code(), Some(3));
}

#[test]
fn who_is_refused_hears_of_it_where_the_ledger_hangs() {
    if !disks_may_hang("refused") {
        return;
    }
    let yard = Yard::new("refused");
    let mut first = Running::start(yard.command(&["--tenant", "acme"], ECHO));
    assert!(first.line().contains("init"));
    let files = yard.files();
    let flags: Vec<&str> =
        ["--tenant", "globex", "--tenant-guard", "enforce"].into_iter().chain(files.iter().map(String::as_str)).collect();
    let mut second = where_it_hangs(Some(&yard.hung), &yard.command(&flags, ECHO));
    let mut second = Running::start_as_is({
        second.stdin(Stdio::null()).stdout(Stdio::null());
        second
    });
    assert_eq!(second.code(), Some(125));
    first.close_stdin();
    assert_eq!(first.code(), Some(3));
}

#[test]
fn an_agents_directory_that_hangs_does_not_hold_up_the_exit() {
    if !disks_may_hang("removal") {
        return;
    }
    let yard = Yard::new("removal");
    let dirs = yard.dir.join("agents").display().to_string();
    let program = format!("mkdir \"$CLAUDE_CONFIG_DIR/projects\" && {MOUNT} \"$CLAUDE_CONFIG_DIR/projects\" || exit 77; {ECHO}");
    let mut command = yard.command(&["--tenant", "acme", "--agent-dirs", &dirs, "--agent-dirs-at-end", "remove"], &program);
    command.env_remove("CLAUDE_CONFIG_DIR");
    let mut agent = Running::start(where_it_hangs(None, &command));
    assert!(agent.line().contains("init"));
    assert!(yard.dir.join("agents/acme/_1").exists());
    agent.close_stdin();
    // What is left is named as such, and the next agent finds a place of its own.
    wait_for("the directory to be given up", || (!yard.dir.join("agents/acme/_1").exists()).then_some(()));
    assert_eq!(agent.code(), Some(3));
}
