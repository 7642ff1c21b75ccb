//! `doctor`, in containers that have something wrong with them.

use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::*;

/// Nothing is wrong here: an empty place to look for CLIs, and settings that hold.
fn place(name: &str) -> (Scratch, Command) {
    let dir = Scratch::new("doctor", name);
    std::fs::create_dir_all(dir.join("claude-is-here")).unwrap();
    cli(&dir.join("claude-is-here/claude"), "2.1.330");
    let install = Command::new(SIDECAR).arg("install").arg(dir.join("claude-is-here")).output().unwrap();
    assert!(install.status.success());
    let mut command = Command::new(SIDECAR);
    command.args(["doctor", "--format", "json"]).arg(dir.join("claude-is-here"));
    command.env_clear().env("PATH", "/usr/bin:/bin").env("HOME", &*dir);
    command.env("AGENT_SIDECAR_LISTEN", "127.0.0.1:0").env("AGENT_SIDECAR_MAX_COST_USD", "5");
    command.env("AGENT_SIDECAR_LEDGER", dir.join("ledger.jsonl"));
    (dir, command)
}

fn cli(path: &Path, version: &str) {
    script(path, &format!("echo '{version} (Claude Code)'"));
}

/// The exit code, and each finding that is not fine: level, check, place, what and remedy.
fn findings(command: &mut Command) -> (i32, Vec<[String; 5]>) {
    let out = command.output().unwrap();
    let said: serde_json::Value =
        serde_json::from_slice(&out.stdout).unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&out.stderr)));
    let all: Vec<[String; 5]> = said["findings"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|finding| finding["level"] != "fine")
        .map(|finding| {
            ["level", "check", "place", "what", "remedy"].map(|key| finding[key].as_str().unwrap_or_default().to_owned())
        })
        .collect();
    for level in ["broken", "warning"] {
        let n = all.iter().filter(|finding| finding[0] == level).count();
        assert_eq!(said[if level == "broken" { level } else { "warnings" }], n);
    }
    (out.status.code().unwrap(), all)
}

/// There is this one finding, and no other.
fn one(command: &mut Command, level: &str, check: &str, place: &str, what: &str) {
    let (code, all) = findings(command);
    assert_eq!(code, i32::from(level == "broken"), "{all:?}");
    let [finding] = all.as_slice() else { panic!("{all:?}") };
    assert_eq!((finding[0].as_str(), finding[1].as_str()), (level, check), "{all:?}");
    assert!(finding[2].contains(place) && finding[3].contains(what) && !finding[4].is_empty(), "{all:?}");
}

#[test]
fn where_nothing_is_wrong_nothing_is_found() {
    let (dir, mut command) = place("well");
    assert_eq!(findings(&mut command), (0, Vec::new()));
    assert!(!dir.join("ledger.jsonl").exists(), "it changes nothing");
    let mut text = Command::new(SIDECAR);
    let out =
        text.args(["doctor"]).arg(dir.join("claude-is-here")).env_clear().env("AGENT_SIDECAR_MODE", "loud").output().unwrap();
    let said = String::from_utf8(out.stdout).unwrap();
    assert_eq!(out.status.code(), Some(1));
    assert!(
        said.starts_with("broken   configuration  AGENT_SIDECAR_MODE: `limits.mode` is a mode, not `loud`; write off"),
        "{said}"
    );
    assert!(said.contains("fine     cli "), "{said}");
}

#[test]
fn a_socket_that_cannot_be_one() {
    let (dir, mut command) = place("socket");
    std::fs::write(dir.join("book"), "a book").unwrap();
    let long = dir.join("x".repeat(120));
    for (path, what) in [
        (dir.join("book"), "no socket"),
        (PathBuf::from("/proc/hub.sock"), "can make none"),
        (long, "longer than the 107 bytes"),
        (dir.join("missing/hub.sock"), "agents cannot meet there: No such file"),
    ] {
        command.env("AGENT_SIDECAR_SOCKET", &path);
        one(&mut command, "warning", "socket", path.to_str().unwrap(), what);
    }
    command.env("AGENT_SIDECAR_SOCKET", dir.join("hub.sock"));
    assert_eq!(findings(&mut command), (0, Vec::new()));
}

#[test]
fn clis_without_a_shim_or_with_the_wrong_one_or_without_a_cli() {
    let (dir, mut command) = place("clis");
    let here = dir.join("claude-is-here");
    let uninstall = || assert!(Command::new(SIDECAR).arg("uninstall").arg(&here).output().unwrap().status.success());
    uninstall();
    one(
        &mut command,
        "warning",
        "cli",
        "claude-is-here/claude",
        "CLI 2.1.330: whoever finds it here runs it without the sidecar",
    );
    cli(&here.join("claude"), "2.0.99");
    let (code, all) = findings(&mut command);
    assert!(code == 0 && all.len() == 2 && all[1][3].contains("older than 2.1.197"), "{all:?}");
    cli(&here.join("claude"), "2.1.330");
    assert!(Command::new(SIDECAR).arg("install").arg(&here).output().unwrap().status.success());
    let older = "cat \"$1\" > \"$2\" && echo older >> \"$2\"";
    assert!(Command::new("sh").args(["-c", older, "sh", SIDECAR]).arg(here.join("claude")).status().unwrap().success());
    one(&mut command, "warning", "cli", "claude-is-here/claude", "a shim of another version, before CLI 2.1.330");
    script(&here.join("claude.sidecar-real"), "exit 3");
    one(&mut command, "broken", "cli", "claude-is-here/claude", "claude.sidecar-real");
    std::fs::remove_file(here.join("claude.sidecar-real")).unwrap();
    one(&mut command, "broken", "cli", "claude-is-here/claude", "its CLI is gone");
    std::fs::remove_file(here.join("claude")).unwrap();
    one(&mut command, "warning", "cli", "claude", "no Claude CLI was found");
    symlink(SIDECAR, here.join("claude")).unwrap();
    cli(&dir.join("bin/claude"), "2.1.330");
    assert_eq!(findings(command.env("PATH", format!("{}:/usr/bin:/bin", dir.join("bin").display()))), (0, Vec::new()), "by hand");
}

#[test]
fn settings_that_are_wrong_or_hold_nothing() {
    let (dir, mut command) = place("settings");
    one(command.env("AGENT_SIDECAR_MODE", "shadow"), "warning", "limits", "limits.mode", "no limit is enforced");
    command.env_remove("AGENT_SIDECAR_MODE");
    one(command.env("AGENT_SIDECAR_MAX_COST_USD", "off"), "warning", "limits", "limits", "none is set");
    command.env("AGENT_SIDECAR_MAX_COST_USD", "5");
    let grace = "a stop may take";
    one(command.env("AGENT_SIDECAR_PLATFORM_GRACE", "3s"), "broken", "configuration", "AGENT_SIDECAR_PLATFORM_GRACE", grace);
    command.env_remove("AGENT_SIDECAR_PLATFORM_GRACE");
    one(command.env("AGENT_SIDECAR_LEDGER", "off"), "warning", "files", "ledger.path", "unset");
    let no = dir.join("no/such/ledger.jsonl");
    one(command.env("AGENT_SIDECAR_LEDGER", &no), "broken", "files", "no/such/ledger.jsonl", "cannot be written");
    one(command.env("AGENT_SIDECAR_LEDGER", "/etc/passwd/ledger"), "broken", "files", "/etc/passwd/ledger", "cannot be written");
    one(command.env("AGENT_SIDECAR_LEDGER", &*dir), "broken", "files", "settings", "Is a directory");
    command.env("AGENT_SIDECAR_LEDGER", dir.join("ledger"));
    one(command.env("AGENT_SIDECAR_EVENTS", &no), "broken", "files", "no/such", "`events.path` cannot be written");
    command.env_remove("AGENT_SIDECAR_EVENTS");
    one(command.env("AGENT_SIDECAR_BUSY_FILE", &no), "broken", "files", "no/such", "`busy.file` cannot be written");
    command.env_remove("AGENT_SIDECAR_BUSY_FILE").env("AGENT_SIDECAR_SOCKET", dir.join("hub.sock"));
    let state = "`hub.state_dir` cannot be written";
    one(command.env("AGENT_SIDECAR_HUB_STATE_DIR", "/etc/passwd/state"), "broken", "files", "/etc/passwd/state", state);
    let state = dir.join("no/such/state");
    assert_eq!(findings(command.env("AGENT_SIDECAR_HUB_STATE_DIR", &state)), (0, Vec::new()), "it is made when it is needed");
    assert!(!state.exists(), "and not before");
    command.env_remove("AGENT_SIDECAR_HUB_STATE_DIR").env_remove("AGENT_SIDECAR_SOCKET");
    one(command.env("AGENT_SIDECAR_SPILL_DIR", "/no/such"), "broken", "spill", "/no/such", "cannot be written");
    command.env_remove("AGENT_SIDECAR_SPILL_DIR").env("AGENT_SIDECAR_OTLP_ENDPOINT", "http://127.0.0.1:1");
    let queue = dir.join("queue/otlp");
    assert_eq!(findings(command.env("AGENT_SIDECAR_OTLP_QUEUE_DIR", &queue)), (0, Vec::new()), "it is made when it is needed");
    one(
        command.env("AGENT_SIDECAR_OTLP_QUEUE_DIR", "/etc/passwd/queue"),
        "broken",
        "queue",
        "/etc/passwd/queue",
        "`otlp.queue_dir`",
    );
    command.env("AGENT_SIDECAR_OTLP_QUEUE_DIR", &queue);
    one(command.env("OTEL_BSP_SCHEDULE_DELAY", "soon"), "broken", "queue", "OTEL_*", "OTEL_BSP_SCHEDULE_DELAY");
}

#[test]
fn ports_that_somebody_has() {
    let (_dir, mut command) = place("ports");
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = taken.local_addr().unwrap();
    one(command.env("AGENT_SIDECAR_LISTEN", at.to_string()), "warning", "listen", &at.to_string(), "somebody listens there");
    one(command.env("AGENT_SIDECAR_LISTEN", "192.0.2.1:9477"), "broken", "listen", "192.0.2.1:9477", "cannot be served");
    command.env("AGENT_SIDECAR_LISTEN", "127.0.0.1:0");
    // What the CLI is told by its user.
    command.env("CLAUDE_CODE_ENABLE_TELEMETRY", "1").env("OTEL_METRICS_EXPORTER", "prometheus");
    let port = at.port().to_string();
    command.env("OTEL_EXPORTER_PROMETHEUS_PORT", &port);
    one(&mut command, "broken", "telemetry", &port, "somebody else has it");
    drop(taken);
    one(&mut command, "warning", "telemetry", &port, "the second one of this container cannot");
    command.env("AGENT_SIDECAR_LISTEN", format!("127.0.0.1:{port}"));
    one(&mut command, "broken", "telemetry", &port, "where the sidecar does");
    command.env("AGENT_SIDECAR_LISTEN", "127.0.0.1:0").env("OTEL_METRICS_EXPORTER", "otlp");
    command.env("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc").env("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4317");
    let (code, all) = findings(&mut command);
    assert!(code == 0 && all.iter().any(|finding| finding[2] == "native.telemetry"), "{all:?}");
}

#[test]
fn a_port_that_the_next_wrapper_shares() {
    let (dir, mut command) = place("shared");
    let socket = dir.join("hub.sock");
    command.env("AGENT_SIDECAR_SOCKET", &socket);
    assert_eq!(findings(&mut command), (0, Vec::new()));
    assert!(!dir.join("hub.state").exists(), "it changes nothing");
    let mut wrapper = Command::new(SIDECAR);
    wrapper.args(["run", "--listen", "127.0.0.1:0", "--socket"]).arg(&socket).args(["--", "sh", "-c", "echo started; read line"]);
    let mut running = Running::start(wrapper);
    assert_eq!(running.line(), "started");
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while std::os::unix::net::UnixStream::connect(&socket).is_err() && std::time::Instant::now() < deadline {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let at = std::fs::read_to_string(dir.join("hub.state/address")).unwrap();
    assert_eq!(findings(command.env("AGENT_SIDECAR_LISTEN", &at)), (0, Vec::new()));
    // Not if it serves itself alone.
    one(command.env("AGENT_SIDECAR_HUB", "off"), "warning", "listen", &at, "somebody listens there");
    command.env_remove("AGENT_SIDECAR_HUB").env("AGENT_SIDECAR_SOCKET", dir.join("other.sock"));
    one(&mut command, "warning", "listen", &at, "somebody listens there");
    running.write(b"\n").unwrap();
    assert_eq!(running.code(), Some(0));
}

#[test]
fn a_disk_without_room() {
    let (dir, command) = place("machine");
    let words: Vec<_> = command.get_args().map(std::ffi::OsStr::to_owned).collect();
    let small = dir.join("small");
    std::fs::create_dir_all(&small).unwrap();
    // A file system of one megabyte, in a namespace of its own.
    let mut inside = Command::new("unshare");
    if !root() {
        inside.arg("-r");
    }
    inside.args(["-m", "sh", "-c", "mount -t tmpfs -o size=1m small \"$1\" && shift && exec \"$@\"", "sh"]).arg(&small);
    let mounts = Command::new("unshare").args(inside.get_args()).arg("true").status().is_ok_and(|status| status.success());
    if mounts {
        inside.arg(SIDECAR).args(&words).env_clear().envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
        one(inside.env("AGENT_SIDECAR_LEDGER", small.join("ledger")), "warning", "files", "small/ledger", "has 1 MiB left");
    } else {
        eprintln!("not tried: no namespaces here");
    }
}

#[test]
fn tenants_that_nobody_names_and_agents_that_share() {
    let (dir, mut command) = place("tenants");
    let labels = dir.join("labels");
    command.env("AGENT_SIDECAR_SOCKET", dir.join("hub.sock"));
    let from = |command: &mut Command, sources: &str| {
        command.env("AGENT_SIDECAR_TENANT_FROM", sources).env("AGENT_SIDECAR_POD_LABELS", &labels);
    };
    from(&mut command, "env:CUSTOMER");
    one(
        &mut command,
        "warning",
        "tenants",
        "labels.tenant_from",
        "finds nothing: an agent that is started as this was has no tenant",
    );
    from(&mut command, "pod:tenant");
    one(&mut command, "warning", "tenants", "labels", "`labels.tenant_from` reads it, and it is not there");
    std::fs::write(&labels, "tenant=\"acme\"\n").unwrap();
    assert_eq!(findings(&mut command), (0, Vec::new()));
    from(&mut command, "message:metadata.tenant");
    assert_eq!(findings(&mut command), (0, Vec::new()), "the app will say it");
    command.env("AGENT_SIDECAR_AGENT_DIRS", dir.join("labels/agents"));
    one(&mut command, "broken", "tenants", "labels/agents", "`tenants.agent_dirs` cannot be written");
    command.env("AGENT_SIDECAR_AGENT_DIRS", dir.join("agents/of/all"));
    assert_eq!(findings(&mut command), (0, Vec::new()), "it is made when it is needed");

    let agent = |config: &str| {
        let mut agent = Command::new(SIDECAR);
        agent.args(["run", "--listen", "127.0.0.1:0", "--socket"]).arg(dir.join("hub.sock"));
        agent.args(["--", "sh", "-c", "echo up; read -r _"]).args(ONE_SHOT);
        let mut agent = Running::start({
            agent.env("HOME", &*dir).env("CLAUDE_CONFIG_DIR", dir.join(config));
            agent
        });
        assert_eq!(agent.line(), "up");
        agent
    };
    let _agents = [agent("one"), agent("other")];
    assert_eq!(findings(&mut command), (0, Vec::new()));
    let _third = agent("one");
    wait_for("the third one's journal", || {
        let (_, all) = findings(&mut command);
        all.first().map(|finding| assert!(finding[3].contains("2 agents that run keep their sessions"), "{all:?}"))
    });
}

#[test]
fn a_variable_that_no_setting_has_is_found_and_its_value_not_told() {
    let (_dir, mut command) = place("stranger");
    command.env("AGENT_SIDECAR_COST_LIMIT_USD", "5.4321").env("AGENT_SIDECAR_PORT_9477_TCP", "tcp://10.0.0.7:9477");
    one(&mut command, "warning", "configuration", "AGENT_SIDECAR_COST_LIMIT_USD", "no setting is called so");
    assert!(!String::from_utf8(command.output().unwrap().stdout).unwrap().contains("5.4321"));
}

#[test]
fn a_socket_in_a_directory_of_somebody_else() {
    if !crate::user::may_change_users() {
        return;
    }
    let (dir, mut command) = place("others");
    // What another user may look at, but not change.
    std::fs::create_dir(dir.join("roots")).unwrap();
    std::fs::set_permissions(dir.join("roots"), std::fs::Permissions::from_mode(0o755)).unwrap();
    let (socket, ledger) = (dir.join("roots/hub.sock"), dir.join("ledger.jsonl"));
    std::fs::write(&ledger, "").unwrap();
    std::os::unix::fs::chown(&ledger, Some(65534), Some(65534)).unwrap();
    let free = |command: &mut Command| String::from_utf8(command.output().unwrap().stdout).unwrap().contains("\"free\"");
    command.env("AGENT_SIDECAR_SOCKET", &socket).env("AGENT_SIDECAR_LISTEN", "off");
    assert!(free(&mut command), "root may make one there");
    command.uid(65534).gid(65534);
    one(&mut command, "warning", "socket", socket.to_str().unwrap(), "uid 65534 can make none");
}
