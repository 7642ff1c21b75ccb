//! The CLI as another user than the sidecar. These really change users, so only root can run them.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use rustix::process::Signal;

use crate::support::*;

/// Owns nothing here.
pub(crate) const NOBODY: u32 = 65534;

/// False, and says so, where nobody can become somebody else.
pub(crate) fn may_change_users() -> bool {
    if !root() {
        eprintln!("not tried: only root can start something as another user");
    }
    root()
}

/// A wrapper, as we are, around a CLI of another user.
fn as_nobody(flags: &[&str], cli: &[&str]) -> Command {
    let mut command = Command::new(SIDECAR);
    command.args(["run", "--listen", "off", "--user", "65534"]).args(flags).arg("--").args(cli);
    command.current_dir("/");
    command
}

fn sh_as_nobody(flags: &[&str], program: &str, args: &[&str]) -> Command {
    as_nobody(flags, &[&["sh", "-c", program, "sh"], args].concat())
}

#[test]
fn the_cli_is_that_user_and_can_become_no_other() {
    if !may_change_users() {
        return;
    }
    let program = "echo $(id -u) $(id -g) $(id -G); grep -E '^(NoNewPrivs|CapPrm|CapAmb)' /proc/self/status; echo $HOME,$USER,$LOGNAME; read -r line; echo heard $line; pwd";
    for args in [&STREAM_JSON[..], &ONE_SHOT[..], &[]] {
        let mut command = sh_as_nobody(&[], program, args);
        command.env("HOME", "/root").env("USER", "root").env_remove("LOGNAME");
        let mut running = Running::start(command);
        assert_eq!(running.line(), "65534 65534 65534");
        let rest: Vec<String> = (0..3).map(|_| running.line().replace('\t', " ")).collect();
        assert_eq!(rest, ["CapPrm: 0000000000000000", "CapAmb: 0000000000000000", "NoNewPrivs: 1"]);
        assert_eq!(running.line(), "/nonexistent,nobody,");
        running.write(b"hello\n").unwrap();
        assert_eq!(running.line(), "heard hello");
        assert_eq!(running.line(), "/");
        assert_eq!(running.code(), Some(0), "{args:?}");
    }
}

#[test]
fn a_user_that_is_not_there_or_cannot_be_had_is_an_error_and_not_left_out() {
    let refused = |mut command: Command, why: &str| {
        let out = command.stdin(Stdio::null()).output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(125), "{said}");
        assert!(said.contains(why) && out.stdout.is_empty(), "{said}");
    };
    let run = |user: &str| {
        let mut command = Command::new(SIDECAR);
        command.args(["run", "--listen", "off", "--user", user, "--", "echo", "started"]);
        command
    };
    refused(run("no-such-user"), "there is no user `no-such-user`");
    refused(run("0:no-such-group"), "there is no group `no-such-group`");
    refused(run("a user"), "`run.user` is a user, not `a user`");
    if may_change_users() {
        let mut command = run("0");
        command.uid(NOBODY).gid(NOBODY);
        refused(command, "without CAP_SETUID, CAP_SETGID, CAP_KILL");
        // Who cannot kill what it starts does not start it.
        let mut command = Command::new("setpriv");
        command.args(["--bounding-set", "-kill", "--inh-caps", "-kill", SIDECAR]).args(run("65534").get_args());
        refused(command, "without CAP_KILL");
    }
    // Who is that user already needs nothing for it.
    let mut command = run(&rustix::process::geteuid().as_raw().to_string());
    assert_eq!(command.output().unwrap().stdout, b"started\n");
}

#[test]
fn a_shim_puts_the_cli_behind_the_same_fence_and_refuses_where_it_cannot() {
    if !may_change_users() {
        return;
    }
    let dir = Scratch::new("user", "shim");
    copy(std::path::Path::new(SIDECAR), &dir.join("claude"));
    script(&dir.join("claude.sidecar-real"), "id -u");
    let run = |user: &str| {
        let mut command = Command::new(dir.join("claude"));
        command.args(["-p", "hi"]).env("AGENT_SIDECAR_LISTEN", "off").env("AGENT_SIDECAR_USER", user);
        let out = command.stdin(Stdio::null()).output().unwrap();
        (out.status.code(), String::from_utf8(out.stdout).unwrap())
    };
    assert_eq!(run("65534"), (Some(0), String::from("65534\n")));
    assert_eq!(run("no-such-user"), (Some(125), String::new()));
    assert_eq!(run("no such user"), (Some(125), String::new()), "a mistake costs a setting elsewhere, and here the start");
    // The SDK's own option: whoever starts us is that user already.
    let mut command = Command::new(dir.join("claude"));
    command.args(["-p", "hi"]).env("AGENT_SIDECAR_LISTEN", "off").env("AGENT_SIDECAR_USER", "65534");
    let out = command.uid(NOBODY).gid(NOBODY).current_dir("/").stdin(Stdio::null()).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&out.stdout), "65534\n", "{}", String::from_utf8_lossy(&out.stderr));
}

#[test]
fn a_shim_that_cannot_do_its_part_does_not_start_the_cli_as_its_own_user() {
    if !may_change_users() {
        return;
    }
    let dir = Scratch::new("user", "starved");
    copy(std::path::Path::new(SIDECAR), &dir.join("claude"));
    script(&dir.join("claude.sidecar-real"), "id -u");
    let mut refused = 0;
    for user in ["65534", "nobody"] {
        for files in (4..20).map(|n: u32| n.to_string()) {
            let mut command = Command::new("sh");
            command.args(["-c", "ulimit -n $1; exec \"$0\" -p hi"]).arg(dir.join("claude")).arg(&files);
            command.env("AGENT_SIDECAR_LISTEN", "off").env("AGENT_SIDECAR_USER", user);
            let out = command.stdin(Stdio::null()).output().unwrap();
            let said = String::from_utf8(out.stdout).unwrap();
            assert!(["", "65534\n"].contains(&said.as_str()), "{files} files: {said}{}", String::from_utf8_lossy(&out.stderr));
            refused += u32::from(out.status.code() == Some(125));
        }
    }
    assert!(refused > 0, "so few files are enough now: take something else from it");
}

#[test]
fn when_we_are_killed_the_cli_of_another_user_dies_with_us() {
    if !may_change_users() {
        return;
    }
    for args in [&STREAM_JSON[..], &ONE_SHOT[..], &[]] {
        let mut running = Running::start(sh_as_nobody(&[], "echo $$; exec sleep 1000", args));
        let pid = running.number();
        running.signal(Signal::KILL);
        gone(pid);
    }
}

#[test]
fn what_another_user_leaves_behind_is_ended_and_so_is_the_cli() {
    if !may_change_users() {
        return;
    }
    let program = "setsid sh -c 'trap \"\" TERM; echo $$; while :; do sleep 1; done' & sleep 1000 & wait $!";
    let mut running = Running::start(sh_as_nobody(&["--stop-end", "100ms", "--stop-terminate", "100ms"], program, &STREAM_JSON));
    let tool = running.number();
    running.signal(Signal::TERM);
    running.close_stdin();
    assert_eq!(running.code(), Some(143));
    gone(tool);
}

#[test]
fn as_pid_1_it_is_the_same() {
    if !may_change_users() {
        return;
    }
    let mut command = Command::new("unshare");
    command.args(["-p", "-f", "--mount-proc", "--kill-child", SIDECAR, "run", "--listen", "off", "--user", "65534", "--"]);
    command.args(["sh", "-c", "echo $PPID $(id -u); (sleep 1000 & ); exit 9", "sh"]).args(STREAM_JSON).current_dir("/");
    let mut running = Running::start(command);
    assert_eq!(running.line(), "1 65534");
    assert_eq!(running.code(), Some(9));
}

#[test]
fn keys_of_ours_do_not_reach_the_cli_and_limits_do() {
    let program = "env | grep ^AGENT_SIDECAR_ | sort";
    for user in ["65534", "off"] {
        if user != "off" && !may_change_users() {
            continue;
        }
        let mut command = Command::new(SIDECAR);
        command.args(["run", "--listen", "off", "--user", user, "--", "sh", "-c", program]).current_dir("/");
        command.env_remove("AGENT_SIDECAR_BIN").env("AGENT_SIDECAR_OTLP_HEADERS", "authorization=Bearer%20secret");
        command.env("AGENT_SIDECAR_BUSY_WEBHOOK_HEADERS", "x-key=secret").env("AGENT_SIDECAR_MAX_COST_USD", "5");
        command.env("AGENT_SIDECAR_HUB_CONTROL", "true").env("AGENT_SIDECAR_CONTROL_TOKEN", "0123456789abcdef0123456789abcdef");
        command.env("AGENT_SIDECAR_END_USER_HASH", "true").env("AGENT_SIDECAR_END_USER_HASH_KEY", "secret");
        let out = command.stdin(Stdio::null()).output().unwrap();
        // Whoever is hub after us, without the token, is none that can be told to change something; who has no key tells no user.
        let expected = "AGENT_SIDECAR_END_USER_HASH=true\nAGENT_SIDECAR_END_USER_HASH_KEY=withheld\nAGENT_SIDECAR_HUB_CONTROL=false\nAGENT_SIDECAR_MAX_COST_USD=5\n";
        assert_eq!(String::from_utf8(out.stdout).unwrap(), expected);
    }
}

#[test]
fn no_descriptor_of_ours_is_passed_to_another_user() {
    if !may_change_users() {
        return;
    }
    let dir = Scratch::new("user", "descriptors");
    let (ledger, socket) = (dir.join("ledger"), dir.join("hub.sock"));
    let flags = ["--ledger", ledger.to_str().unwrap(), "--socket", socket.to_str().unwrap(), "--busy-lease", "1s"];
    let list = "ls /proc/self/fd";
    let out = sh_as_nobody(&flags, list, &STREAM_JSON).stdin(Stdio::null()).output().unwrap();
    let bare = Command::new("sh").args(["-c", list]).output().unwrap();
    assert_eq!(String::from_utf8(out.stdout).unwrap(), String::from_utf8(bare.stdout).unwrap());
}

#[test]
fn a_link_that_the_agent_has_made_does_not_lead_us_elsewhere() {
    if !may_change_users() {
        return;
    }
    let dir = Scratch::new("user", "links");
    let (elsewhere, lair) = (dir.join("elsewhere"), dir.join("lair"));
    std::fs::write(&elsewhere, "as it was").unwrap();
    std::fs::create_dir(&lair).unwrap();
    for name in ["ledger", "events"] {
        std::os::unix::fs::symlink(&elsewhere, lair.join(name)).unwrap();
    }
    let at = |name: &str| lair.join(name).to_str().unwrap().to_owned();
    let run = || {
        let mut command =
            as_nobody(&["--ledger", &at("ledger"), "--events", &at("events"), "--busy-file", &at("busy")], &["true"]);
        let out = command.stdin(Stdio::null()).output().unwrap();
        assert_eq!(out.status.code(), Some(0));
        String::from_utf8(out.stderr).unwrap()
    };
    std::os::unix::fs::chown(&lair, Some(NOBODY), None).unwrap();
    let log = run();
    assert!(log.contains("the agent's user may change or replace what `ledger.path` names"), "{log}");
    assert_eq!(std::fs::read_to_string(&elsewhere).unwrap(), "as it was");
    // One of our own is followed.
    std::os::unix::fs::chown(&lair, Some(0), None).unwrap();
    std::fs::remove_file(lair.join("events")).unwrap();
    run();
    assert!(std::fs::read_to_string(&elsewhere).unwrap().contains("process_exited"));
}

#[test]
fn nothing_that_we_write_is_the_other_users_to_read_or_change() {
    if !may_change_users() {
        return;
    }
    let dir = Scratch::new("user", "files");
    std::fs::set_permissions(&*dir, std::fs::Permissions::from_mode(0o755)).unwrap();
    let at = |name: &str| dir.join(name).to_str().unwrap().to_owned();
    let mut command = Command::new(SIDECAR);
    command.args(["run", "--user", "65534", "--listen", "127.0.0.1:0", "--socket", &at("hub.sock"), "--ledger", &at("ledger")]);
    command.args(["--events", &at("events"), "--busy-file", &at("busy"), "--otlp-queue-dir", &at("queue")]);
    command.args(["--otlp-endpoint", "http://127.0.0.1:9", "--otlp-flush", "100ms", "--container-max-cost-usd", "5", "--"]);
    // The busy file is for others to read; the rest is for nobody.
    let program = r#"
        echo "$1"; read -r _
        find "$0" -writable ! -type l 2>/dev/null; find "$0" -type f -readable 2>/dev/null; ls "$0"/hub.state "$0"/queue 2>/dev/null; echo over"#;
    command.args(["sh", "-c", program, dir.to_str().unwrap(), INIT]).args(ONE_SHOT).current_dir("/");
    let mut running = Running::start(command);
    running.line_after(INIT);
    for name in ["ledger", "events", "busy", "queue", "hub.state/budgets.json", "hub.sock"] {
        wait_for(name, || dir.join(name).exists().then_some(()));
    }
    running.write(b"\n").unwrap();
    let said = String::from_utf8(running.rest()).unwrap();
    assert_eq!(said.replace(&format!("{}\n", at("busy")), ""), "over\n");
}

#[test]
fn without_the_right_to_give_directories_away_that_is_said_and_tenants_are_not_mixed() {
    if !may_change_users() {
        return;
    }
    let root = scratch("dirs-powerless");
    std::fs::set_permissions(&root, std::fs::Permissions::from_mode(0o755)).unwrap();
    let run = |capabilities: &str, more: &[&str]| {
        let (dirs, socket) = (root.join("agents"), root.join("hub.sock"));
        let flags = ["--agent-dirs", dirs.to_str().unwrap(), "--agent-workspace", "always", "--tenant-guard", "enforce"];
        let flags = [&flags[..], &["--socket", socket.to_str().unwrap()]].concat();
        let inner =
            sh_as_nobody(&[&flags[..], more].concat(), "pwd; touch $CLAUDE_CONFIG_DIR/mine && echo written", &STREAM_JSON);
        let mut command = Command::new("setpriv");
        command.args(["--bounding-set", capabilities, "--inh-caps", capabilities, SIDECAR]).args(inner.get_args());
        let out = command.current_dir("/").stdin(Stdio::null()).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (out.status.code(), text(out.stdout), text(out.stderr))
    };
    let (code, _, said) = run("-all,+setuid,+setgid,+kill", &[]);
    assert_eq!(code, Some(125), "{said}");
    assert!(said.contains("without CAP_CHOWN, CAP_DAC_READ_SEARCH"), "{said}");
    let enough = "-all,+setuid,+setgid,+kill,+chown,+dac_read_search";
    let (code, wrote, said) = run(enough, &[]);
    assert_eq!((code, wrote), (Some(0), format!("{}/agents/_/_1/workspace\nwritten\n", root.display())), "{said}");
    let (code, _, said) = run(enough, &["--agent-dirs-at-end", "remove"]);
    assert_eq!(code, Some(125), "{said}");
    assert!(said.contains("without CAP_DAC_OVERRIDE"), "{said}");
}

#[test]
fn what_is_mounted_read_only_the_agent_cannot_change_whatever_its_mode() {
    let mount = || Command::new("unshare").args(["-m", "true"]).status().is_ok_and(|status| status.success());
    if !may_change_users() || !mount() {
        return;
    }
    let root = scratch("read-only");
    std::fs::set_permissions(&root, std::fs::Permissions::from_mode(0o755)).unwrap();
    let volume = root.join("volume");
    std::fs::create_dir(&volume).unwrap();
    std::fs::set_permissions(&volume, std::fs::Permissions::from_mode(0o777)).unwrap();
    let file = volume.join("config.toml");
    std::fs::write(&file, "").unwrap();
    let run = |first: &str| {
        let mut command = Command::new("unshare");
        let program = format!("{first} && exec \"$@\"");
        command.args(["-m", "sh", "-c", &program, "sh", SIDECAR, "run", "--listen", "off", "--user", "65534", "--config"]);
        command.arg(&file).args(["--", "echo", "up"]).env("VOLUME", &volume).current_dir("/");
        let out = command.stdin(Stdio::null()).output().unwrap();
        assert_eq!(String::from_utf8(out.stdout).unwrap(), "up\n");
        String::from_utf8(out.stderr).unwrap().contains("the agent may change the file")
    };
    assert!(run("true"));
    assert!(!run("mount --bind $VOLUME $VOLUME && mount -o remount,bind,ro $VOLUME"));
}

#[test]
fn an_agent_reaches_its_directories_whatever_the_umask_and_whoever_made_them() {
    if !may_change_users() {
        return;
    }
    let root = scratch("dirs-umask");
    std::fs::set_permissions(&root, std::fs::Permissions::from_mode(0o755)).unwrap();
    let run = |dirs: &std::path::Path, user: &[&str], cli: &str, more: &[&str]| {
        let mut command = Command::new("sh");
        command.args(["-c", "umask 077; exec \"$@\"", "sh", SIDECAR, "run", "--listen", "off", "--agent-dirs"]).arg(dirs);
        command.args(["--agent-workspace", "always"]).args(user).args(["--", "sh", "-c", cli, "sh"]).args(STREAM_JSON).args(more);
        let out = command.current_dir("/").stdin(Stdio::null()).output().unwrap();
        (String::from_utf8(out.stdout).unwrap(), format!("{:?} {}", out.status.code(), String::from_utf8(out.stderr).unwrap()))
    };
    let (nobody, writes) = (["--user", "65534"], "touch $CLAUDE_CONFIG_DIR/mine && echo written");
    let (wrote, said) = run(&root.join("new/agents"), &nobody, writes, &[]);
    assert_eq!(wrote, "written\n", "{said}");
    assert!(!said.contains("cannot pass"), "{said}");
    // One that was made before there was another user.
    let old = root.join("new/old");
    std::fs::create_dir(&old).unwrap();
    run(&old, &[], "mkdir -p $CLAUDE_CONFIG_DIR/projects/-w; echo {} >$CLAUDE_CONFIG_DIR/projects/-w/0b-1.jsonl", &[]);
    std::fs::set_permissions(&old, std::fs::Permissions::from_mode(0o711)).unwrap();
    let (wrote, said) = run(&old, &nobody, writes, &["--resume", "0b-1"]);
    assert_eq!(wrote, "written\n", "{said}");
    std::fs::set_permissions(&old, std::fs::Permissions::from_mode(0o700)).unwrap();
    let (wrote, said) = run(&old, &nobody, "pwd", &[]);
    assert!(said.contains("the agent's user cannot pass through this directory"), "{said}");
    // It is that user who goes to where it is to work, not we, who could.
    assert!(wrote.is_empty() && said.starts_with("Some(126)"), "{wrote} {said}");
}

#[test]
fn the_directories_of_an_agent_are_its_users_and_what_is_above_them_is_not() {
    if !may_change_users() {
        return;
    }
    let root = scratch("dirs-of-nobody");
    std::fs::set_permissions(&root, std::fs::Permissions::from_mode(0o755)).unwrap();
    let dirs = root.join("agents");
    let program = "pwd; touch $CLAUDE_CONFIG_DIR/mine $TMPDIR/mine && echo written; touch $CLAUDE_CONFIG_DIR/../mine 2>/dev/null || echo refused";
    for _ in 0..2 {
        let flags = ["--agent-dirs", dirs.to_str().unwrap(), "--agent-workspace", "always", "--tenant", "acme"];
        let mut running = Running::start(sh_as_nobody(&flags, program, &STREAM_JSON));
        let home = dirs.join("acme/_1");
        assert_eq!(running.line(), home.join("workspace").to_str().unwrap());
        assert_eq!(running.line(), "written");
        assert_eq!(running.line(), "refused");
        running.close_stdin();
        assert_eq!(running.code(), Some(0));
        let mode = |path: &std::path::Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&home), mode(&home.join("config"))), (0o711, 0o700));
    }
}
