//! Several tenants in one container: who an agent works for, what tenants must not share, and a directory for each agent.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::process::Signal;
use serde_json::Value;

use crate::http::try_ask;
use crate::support::*;

/// Says that it is there, has one turn of fifty cents for each line of the app's, and says where it is.
const CLI: &str = r#"
echo '{"type":"system","subtype":"init","session_id":"'${SESSION:-s}'","model":"claude-opus-5-5"}'
echo "{\"type\":\"here\",\"cwd\":\"$(pwd -P)\",\"config\":\"$CLAUDE_CONFIG_DIR\",\"tmp\":\"$TMPDIR\",\"pwd\":\"$PWD\"}"
n=0
while read -r line; do
  case $line in *'"user"'*) n=$((n+1)) ;; *) continue ;; esac
  used='{"claude-opus-5-5":{"inputTokens":'$((n*10))',"outputTokens":5,"costUSD":'$((n*50))'e-2}}'
  echo '{"type":"result","subtype":"success","is_error":false,"session_id":"'${SESSION:-s}'","num_turns":1,"total_cost_usd":'$((n*50))'e-2,"modelUsage":'$used'}'
done
"#;

struct Yard {
    dir: Scratch,
}

impl Yard {
    fn new(name: &str) -> Yard {
        let dir = Scratch::new("tenants", name);
        for sub in ["home", "work"] {
            std::fs::create_dir_all(dir.join(sub)).unwrap();
        }
        script(&dir.join("bin/claude"), CLI);
        Yard { dir }
    }

    fn at(&self, path: &str) -> PathBuf {
        self.dir.join(path)
    }

    /// A wrapper in `work`, with a home, where all of this yard meet.
    fn command(&self, flags: &[&str], args: &[&str]) -> Command {
        let mut command = Command::new(SIDECAR);
        command.args(["run", "--listen", "127.0.0.1:0", "--native-telemetry", "off", "--socket"]).arg(self.at("hub.sock"));
        command.arg("--ledger").arg(self.at("ledger.jsonl")).arg("--events").arg(self.at("events.jsonl"));
        command.args(flags).arg("--").arg(self.at("bin/claude")).args(STREAM_JSON).args(args);
        self.settle(&mut command);
        command
    }

    fn settle(&self, command: &mut Command) {
        command.current_dir(self.at("work")).env("HOME", self.at("home"));
        for name in ["CLAUDE_CONFIG_DIR", "TMPDIR", "PWD", "SESSION", "CUSTOMER", "OTEL_RESOURCE_ATTRIBUTES"] {
            command.env_remove(name);
        }
    }

    fn start(&self, flags: &[&str], args: &[&str]) -> Running {
        let mut running = Running::start(self.command(flags, args));
        assert!(running.line().contains("init"));
        running
    }

    /// Starts it, and lets it end; what it says of where it is.
    fn run(&self, flags: &[&str], args: &[&str]) -> Value {
        let mut running = self.start(flags, args);
        let here = serde_json::from_str(&running.line()).unwrap();
        running.close_stdin();
        assert_eq!(running.code(), Some(0));
        here
    }

    /// Starts it, and says with what code and with what words it was refused.
    fn refused(&self, flags: &[&str], args: &[&str]) -> (Option<i32>, String) {
        let out = self.command(flags, args).stdin(std::process::Stdio::null()).output().unwrap();
        (out.status.code(), String::from_utf8(out.stderr).unwrap())
    }

    fn lines(&self, file: &str) -> Vec<Value> {
        let text = std::fs::read_to_string(self.at(file)).unwrap_or_default();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// What the ledger tells of conflicts: kind, tenant, owner, what was done.
    fn conflicts(&self) -> Vec<String> {
        let of = |line: &Value, key: &str| line[key].as_str().unwrap_or("-").to_owned();
        let lines = self.lines("ledger.jsonl").into_iter().filter(|line| line["event"] == "tenant_conflict");
        lines.map(|line| ["kind", "tenant", "owner", "action"].map(|key| of(&line, key)).join(" ")).collect()
    }

    fn ask(&self, what: &str) -> Option<String> {
        let address = std::fs::read_to_string(self.at("hub.state/address")).ok()?.parse().ok()?;
        let (head, body) = try_ask(address, what)?;
        head.starts_with("HTTP/1.1 200").then_some(body)
    }

    /// Waits until a series says this.
    fn series(&self, series: &str) {
        wait_for(series, || self.ask("GET /metrics")?.lines().any(|line| line == series).then_some(()));
    }
}

#[test]
fn the_first_message_says_who_pays_and_that_is_who_is_charged() {
    let yard = Yard::new("message");
    let flags =
        ["--tenant-from", "message:metadata.tenant,env:CUSTOMER", "--end-user-from", "message:metadata.user", "--end-user-hash"];
    let budget = ["--tenant-max-cost-usd", "0.4", "--container-max-cost-usd", "100"];
    let flags = [&flags[..], &budget].concat();
    let mut early = yard.command(&flags, &[]);
    early.env("CUSTOMER", "early").env("SESSION", "another");
    let mut running = [Running::start(early), yard.start(&flags, &[])];
    yard.series("claude_agent_process_starts_total{tenant=\"early\"} 1");
    for (running, tenant) in running.iter_mut().zip(["acme", "globex"]) {
        let message =
            format!("{{\"type\":\"user\",\"metadata\":{{\"tenant\":\"{tenant}\",\"user\":\"anna\"}},\"message\":{{}}}}\n");
        running.write(message.as_bytes()).unwrap();
    }
    for tenant in ["acme", "globex"] {
        yard.series(&format!("claude_agent_cost_usd_total{{model=\"claude-opus-5-5\",source=\"main\",tenant=\"{tenant}\"}} 0.5"));
        yard.series(&format!("claude_agent_process_starts_total{{tenant=\"{tenant}\"}} 1"));
        // Each from its own budget.
        yard.series(&format!("claude_agent_limit_used_ratio{{limit=\"usd\",scope=\"tenant\",tenant=\"{tenant}\"}} 1.25"));
        yard.series(&format!("claude_agent_limit_used_ratio{{limit=\"usd\",scope=\"container\",tenant=\"{tenant}\"}} 0.01"));
    }
    assert!(!yard.ask("GET /metrics").unwrap().contains("early"), "nobody has worked for them");
    let status: Value = serde_json::from_str(&yard.ask("GET /status").unwrap()).unwrap();
    let hash = status["sessions"][0]["user"].as_str().unwrap().to_owned();
    assert!(hash.len() == 32 && hash != "anna", "{hash}");
    for wrapper in &mut running {
        wrapper.close_stdin();
        assert!(wrapper.code().is_some());
    }
    for file in ["ledger.jsonl", "events.jsonl"] {
        let lines = yard.lines(file);
        let (tenant, user) = if file == "ledger.jsonl" { ("tenant", "user") } else { ("claude_agent.tenant", "user.id") };
        for name in ["acme", "globex"] {
            assert!(lines.iter().filter(|line| line[tenant] == name && line[user] == hash.as_str()).count() > 3, "{file} {name}");
        }
        let money = ["cost_usd", "claude_agent.cost_usd"];
        let spent = lines.iter().filter(|line| money.iter().any(|key| line[key].as_f64().is_some_and(|usd| usd > 0.0)));
        assert_eq!(spent.filter(|line| line[tenant] == "early").count(), 0, "{file}");
    }
}

#[test]
fn pods_arguments_and_directories_say_it_too() {
    let yard = Yard::new("sources");
    let labels = yard.at("labels");
    std::fs::write(&labels, "app=\"x\"\ntenant=\"of-pod\"\n").unwrap();
    std::fs::create_dir_all(yard.at("work/of-cwd/src")).unwrap();
    let cwd = format!("cwd:{}/{{}}/", std::fs::canonicalize(yard.at("work")).unwrap().display());
    for (sources, expected) in [
        ("pod:tenant", "of-pod"),
        ("pod:none,resource:tenant.id", "of-resource"),
        ("arg:--name", "of-arg"),
        (cwd.as_str(), "of-cwd"),
        ("env:CUSTOMER", "-"),
    ] {
        let mut command =
            yard.command(&["--tenant-from", sources, "--pod-labels", labels.to_str().unwrap()], &["--name", "of-arg"]);
        command.env("OTEL_RESOURCE_ATTRIBUTES", "tenant.id=of-resource").current_dir(yard.at("work/of-cwd/src"));
        std::fs::remove_file(yard.at("ledger.jsonl")).ok();
        let out = command.stdin(std::process::Stdio::null()).output().unwrap();
        assert!(out.status.success());
        let lines = yard.lines("ledger.jsonl");
        assert!(!lines.is_empty() && lines.iter().all(|line| line["tenant"].as_str().unwrap_or("-") == expected), "{sources}");
        let warned = String::from_utf8(out.stderr).unwrap().contains("`labels.tenant_from` finds nothing");
        assert_eq!(warned, expected == "-", "{sources}");
    }
}

#[test]
fn what_two_tenants_share_is_flagged_or_refused() {
    let yard = Yard::new("guard");
    symlink(yard.at("work"), yard.at("link")).unwrap();
    yard.run(&["--tenant", "acme"], &[]);
    yard.run(&["--tenant", "acme"], &[]);
    assert!(yard.conflicts().is_empty(), "one's own is not shared");
    // By another name, and as links lead.
    let shadow = yard.command(&["--tenant", "globex"], &["--session-id", "s"]).current_dir(yard.at("link")).output().unwrap();
    assert!(shadow.status.success());
    let told = String::from_utf8(shadow.stderr).unwrap();
    assert!(told.contains("its config directory, ") && told.contains("is that of tenant `acme`"), "{told}");
    let flagged = ["config_dir", "cwd", "session"].map(|kind| format!("{kind} globex acme flagged"));
    assert_eq!(yard.conflicts(), flagged);
    assert_eq!(yard.lines("events.jsonl").iter().filter(|line| line["event"] == "tenant.conflict").count(), 3);

    // A hub keeps the count of those that never ran.
    let mut hub = Command::new(SIDECAR);
    hub.args(["hub", "--listen", "127.0.0.1:0", "--socket"]).arg(yard.at("hub.sock"));
    let hub = Running::start(hub);
    wait_for("the hub to serve", || yard.ask("GET /metrics"));
    let enforce = ["--tenant", "globex", "--tenant-guard", "enforce"];
    let (code, said) = yard.refused(&enforce, &[]);
    assert_eq!(code, Some(125), "{said}");
    assert!(said.contains("the agent of tenant `globex` was not started: its config directory, "), "{said}");
    assert!(said.contains("(and cwd); give each tenant its own"), "{said}");
    yard.series("claude_agent_tenant_conflicts_total{kind=\"config_dir\",action=\"refused\",tenant=\"globex\"} 1");
    assert_eq!(yard.conflicts()[3..], ["config_dir globex acme refused", "cwd globex acme refused"]);

    // What is its own it may have.
    std::fs::create_dir_all(yard.at("other/work")).unwrap();
    let mut own = yard.command(&enforce, &[]);
    own.current_dir(yard.at("other/work")).env("CLAUDE_CONFIG_DIR", yard.at("other/config")).env("SESSION", "s2");
    let mut own = Running::start(own);
    assert!(own.line().contains("init"));
    own.close_stdin();
    assert_eq!(own.code(), Some(0));
    // Its session is its own from then on, wherever somebody resumes it.
    let mut thief = yard.command(&["--tenant", "initech", "--tenant-guard", "enforce"], &["--resume", "s2", "--fork-session"]);
    let thief = thief.current_dir(yard.at("other")).env("CLAUDE_CONFIG_DIR", yard.at("third")).output().unwrap();
    let said = String::from_utf8(thief.stderr).unwrap();
    assert_eq!(thief.status.code(), Some(125), "{said}");
    assert!(said.contains("the session that it would go on with, s2, is that of tenant `globex`"), "{said}");

    // Off is off, and who has no tenant and needs none is not looked at.
    let before = yard.conflicts().len();
    yard.run(&["--tenant", "initech", "--tenant-guard", "off"], &[]);
    yard.run(&[], &[]);
    assert_eq!(yard.conflicts().len(), before);
    // Who should have one is nobody's, which is not acme.
    let (code, said) = yard.refused(&["--tenant-from", "env:CUSTOMER", "--tenant-guard", "enforce"], &[]);
    assert_eq!(code, Some(125), "{said}");
    assert!(said.contains("the agent of no known tenant was not started"), "{said}");
    hub.signal(Signal::TERM);
}

#[test]
fn of_many_that_start_at_once_one_tenant_gets_the_directory() {
    let yard = Yard::new("at-once");
    let start = |tenant: usize| {
        let name = format!("t{tenant}");
        let mut command = yard.command(&["--tenant", &name, "--tenant-guard", "enforce"], &[]);
        command.env("SESSION", &name).stdin(std::process::Stdio::null()).stdout(std::process::Stdio::null());
        command.stderr(std::process::Stdio::null());
        Running::start_as_is(command)
    };
    let codes: Vec<Option<i32>> = (0..6).map(start).collect::<Vec<_>>().iter_mut().map(Running::code).collect();
    assert_eq!(codes.iter().filter(|code| **code == Some(0)).count(), 1, "{codes:?}");
    assert_eq!(codes.iter().filter(|code| **code == Some(125)).count(), 5, "{codes:?}");
}

/// As where dozens start at once, and each has its turn at the book before.
#[test]
fn who_must_not_share_waits_until_it_is_known_what_is_whose() {
    let yard = Yard::new("patient");
    yard.run(&["--tenant", "acme"], &[]);
    let book = std::fs::File::open(yard.at("hub.state/tenants.lock")).unwrap();
    rustix::fs::flock(&book, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let mut command = yard.command(&["--tenant", "globex", "--tenant-guard", "enforce"], &[]);
    command.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
    let mut late = Running::start_as_is(command);
    // It has opened the book, and is there for longer than others are let to hold it.
    let waits = || {
        std::fs::read_dir(format!("/proc/{}/fd", late.pid()))
            .ok()?
            .flatten()
            .find(|fd| std::fs::read_link(fd.path()).is_ok_and(|file| file.ends_with("tenants.lock")))
    };
    wait_for("the book to be opened", waits);
    std::thread::sleep(std::time::Duration::from_millis(800));
    drop(book);
    assert_eq!(late.code(), Some(125));
    assert_eq!(yard.conflicts(), ["config_dir globex acme refused", "cwd globex acme refused"]);
}

#[test]
fn a_directory_that_was_wiped_is_another_one() {
    let yard = Yard::new("wiped");
    let flags = |tenant: &'static str| ["--tenant", tenant, "--tenant-guard", "enforce"];
    let run = |tenant: &'static str, session: &str| {
        let mut command = yard.command(&flags(tenant), &[]);
        command.env("CLAUDE_CONFIG_DIR", yard.at(&format!("config-{tenant}"))).env("SESSION", session);
        command.stdin(std::process::Stdio::null()).output().unwrap().status.code()
    };
    assert_eq!(run("acme", "a"), Some(0));
    assert_eq!(run("globex", "b"), Some(125));
    std::fs::remove_dir_all(yard.at("work")).unwrap();
    std::fs::create_dir(yard.at("work")).unwrap();
    assert_eq!(run("globex", "c"), Some(0), "the next of a pool of sandboxes");
    assert_eq!(run("acme", "d"), Some(125));
}

#[test]
fn who_says_late_whom_it_works_for_is_ended_late() {
    let yard = Yard::new("late");
    yard.run(&["--tenant", "acme"], &[]);
    let flags =
        ["--tenant-from", "message:tenant", "--tenant-guard", "enforce", "--stop-end", "50ms", "--stop-terminate", "50ms"];
    let mut late = yard.start(&flags, &[]);
    late.write(b"{\"type\":\"user\",\"tenant\":\"globex\",\"message\":{}}\n").unwrap();
    assert!(late.code().is_some());
    let told = yard.conflicts();
    for kind in ["config_dir", "cwd"] {
        assert!(told.contains(&format!("{kind} globex acme ended")), "{told:?}");
    }
}

#[test]
fn a_shim_guards_and_gives_directories_as_well() {
    let yard = Yard::new("shim");
    std::fs::create_dir_all(yard.at("shim")).unwrap();
    let shim = yard.at("shim/claude");
    symlink(SIDECAR, &shim).unwrap();
    script(&yard.at("shim/claude.sidecar-real"), CLI);
    let run = |customer: &str, dirs: bool| {
        let mut command = Command::new(&shim);
        yard.settle(&mut command);
        command.args(STREAM_JSON).env("CUSTOMER", customer).env("SESSION", customer).stdin(std::process::Stdio::null());
        for (name, value) in [("LISTEN", "127.0.0.1:0"), ("TENANT_FROM", "env:CUSTOMER"), ("TENANT_GUARD", "enforce")] {
            command.env(format!("AGENT_SIDECAR_{name}"), value);
        }
        command.env("AGENT_SIDECAR_SOCKET", yard.at("hub.sock"));
        if dirs {
            command.env("AGENT_SIDECAR_AGENT_DIRS", yard.at("agents"));
            command.env("AGENT_SIDECAR_AGENT_WORKSPACE", "always");
        }
        let out = command.output().unwrap();
        (out.status.code(), String::from_utf8(out.stdout).unwrap(), String::from_utf8(out.stderr).unwrap())
    };
    assert_eq!(run("acme", false).0, Some(0));
    let (code, said, why) = run("globex", false);
    assert_eq!((code, said.as_str()), (Some(125), ""), "{why}");
    assert!(why.contains("is that of tenant `acme`"), "{why}");
    let (code, said, why) = run("globex", true);
    assert_eq!(code, Some(0), "each in its own place: {why}");
    assert!(said.contains(&format!("\"config\":\"{}\"", yard.at("agents/globex/_1/config").display())), "{said}");
}

#[test]
fn each_agent_finds_a_directory_of_its_own() {
    let yard = Yard::new("dirs");
    let agents = yard.at("agents");
    let flags = ["--tenant", "Acme & Co", "--agent-dirs", agents.to_str().unwrap(), "--agent-from", "env:CUSTOMER"];
    let mut both: Vec<Running> = (0..2).map(|_| yard.start(&flags, &[])).collect();
    let mut seen: Vec<Value> = both.iter_mut().map(|one| serde_json::from_str(&one.line()).unwrap()).collect();
    seen.sort_by_key(|here| here["config"].to_string());
    let tenant = std::fs::read_dir(&agents).unwrap().next().unwrap().unwrap();
    assert!(tenant.file_name().to_str().unwrap().starts_with("acme---co~"), "{tenant:?}");
    for (n, here) in (1..).zip(&seen) {
        let own = tenant.path().join(format!("_{n}"));
        assert_eq!(here["config"], own.join("config").to_str().unwrap());
        assert_eq!(here["tmp"], own.join("tmp").to_str().unwrap());
        // The test started it elsewhere than it is itself: that is where the app wants it.
        assert_eq!(here["cwd"], std::fs::canonicalize(yard.at("work")).unwrap().to_str().unwrap());
        for part in ["config", "tmp", "workspace"] {
            assert_eq!(std::fs::metadata(own.join(part)).unwrap().permissions().mode() & 0o777, 0o700);
        }
    }
    for one in &mut both {
        one.close_stdin();
        assert_eq!(one.code(), Some(0));
    }
    // Started by an agent that has one.
    let within = tenant.path().join("_1/config");
    let mut nested = yard.command(&[&flags[..], &["--agent-workspace", "always"]].concat(), &[]);
    nested.env("CLAUDE_CONFIG_DIR", &within).stdin(std::process::Stdio::null());
    let said = String::from_utf8(nested.output().unwrap().stdout).unwrap();
    let here: Value = serde_json::from_str(said.lines().nth(1).unwrap()).unwrap();
    assert_eq!((&here["config"], &here["tmp"]), (&Value::from(within.to_str().unwrap()), &Value::from("")));
    assert_eq!(here["cwd"], seen[0]["cwd"], "it stays where its tool has started it");
    // By a name, in the workspace, where nobody chose another; what the app has set stays.
    let mut named = Command::new("sh");
    named.args(["-c", "\"$@\"; exit $?", "sh"]).arg(SIDECAR);
    named.args(yard.command(&[&flags[..], &["--agent-dirs-at-end", "remove"]].concat(), &[]).get_args());
    yard.settle(&mut named);
    named.env("CUSTOMER", "mailer").env("TMPDIR", "/var/tmp").stdin(std::process::Stdio::null());
    let out = named.output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let here: Value = serde_json::from_str(String::from_utf8(out.stdout).unwrap().lines().nth(1).unwrap()).unwrap();
    let own = tenant.path().join("mailer");
    assert_eq!(here["cwd"], std::fs::canonicalize(tenant.path()).unwrap().join("mailer/workspace").to_str().unwrap());
    assert_eq!(here["pwd"], own.join("workspace").to_str().unwrap());
    assert_eq!((&here["config"], &here["tmp"]), (&Value::from(own.join("config").to_str().unwrap()), &Value::from("/var/tmp")));
    assert!(!own.exists() && tenant.path().join("_1").exists(), "only what is to go goes");
}

#[test]
fn whoever_is_not_started_leaves_no_directory() {
    let yard = Yard::new("not-started");
    let agents = yard.at("agents");
    let flags = ["--agent-dirs", agents.to_str().unwrap(), "--agent-dirs-at-end", "remove", "--tenant-guard", "enforce"];
    let left = |tenant: &str| std::fs::read_dir(agents.join(tenant)).unwrap().count();
    let mut missing = Command::new(SIDECAR);
    missing.args(["run", "--listen", "off", "--socket"]).arg(yard.at("hub.sock")).args(["--tenant", "acme"]).args(flags);
    yard.settle(missing.args(["--", "/nowhere/claude"]).args(STREAM_JSON));
    let out = missing.stdin(std::process::Stdio::null()).output().unwrap();
    assert_eq!((out.status.code(), left("acme")), (Some(127), 0), "{}", String::from_utf8_lossy(&out.stderr));
    // The working directory is another's.
    yard.run(&["--tenant", "acme"], &[]);
    let (code, said) = yard.refused(&[&flags[..], &["--tenant", "globex", "--agent-workspace", "never"]].concat(), &[]);
    assert_eq!((code, left("globex")), (Some(125), 0), "{said}");
}

#[test]
fn without_room_for_directories_the_agent_runs_unless_tenants_must_be_apart() {
    let yard = Yard::new("no-dirs");
    let file = yard.at("file");
    std::fs::write(&file, "").unwrap();
    let flags = ["--tenant", "acme", "--agent-dirs", file.to_str().unwrap()];
    let mut running = yard.start(&flags, &[]);
    let here: Value = serde_json::from_str(&running.line()).unwrap();
    assert_eq!(here["config"], "");
    yard.series("agent_sidecar_degraded{component=\"tenants\"} 1");
    running.close_stdin();
    assert_eq!(running.code(), Some(0));
    let (code, said) = yard.refused(&[&flags[..], &["--tenant-guard", "enforce"]].concat(), &[]);
    assert_eq!(code, Some(125));
    assert!(said.contains("there is no directory for it below --agent-dirs"), "{said}");
}

#[test]
fn what_the_agent_keeps_on_disk_is_measured() {
    let yard = Yard::new("disk");
    std::fs::create_dir_all(yard.at("home/.claude/projects")).unwrap();
    std::fs::write(yard.at("home/.claude/history"), vec![7; 300_000]).unwrap();
    std::fs::write(yard.at("work/file"), vec![7; 100_000]).unwrap();
    symlink("/", yard.at("work/all")).unwrap();
    let project: String = std::fs::canonicalize(yard.at("work")).unwrap().to_str().unwrap().to_owned();
    let project = project.replace(|c: char| !c.is_ascii_alphanumeric(), "-");
    let project = yard.at("home/.claude/projects").join(project);
    std::fs::create_dir_all(&project).unwrap();
    std::fs::write(project.join("s.jsonl"), "x".repeat(12_345)).unwrap();
    let mut running = yard.start(&["--disk-interval", "1s"], &[]);
    yard.series("claude_agent_disk_files{slot=\"0\",dir=\"workspace\"} 2");
    yard.series("claude_agent_transcript_bytes{slot=\"0\"} 12345");
    let metrics = wait_for("the config directory", || {
        let metrics = yard.ask("GET /metrics")?;
        metrics.contains("claude_agent_disk_files{slot=\"0\",dir=\"config\"} 2\n").then_some(metrics)
    });
    let bytes = |dir: &str| {
        let series = format!("claude_agent_disk_bytes{{slot=\"0\",dir=\"{dir}\"}} ");
        metrics.lines().find_map(|line| line.strip_prefix(&series)?.parse::<f64>().ok()).unwrap()
    };
    assert!((100_000.0..300_000.0).contains(&bytes("workspace")), "{}", bytes("workspace"));
    assert!((300_000.0..600_000.0).contains(&bytes("config")), "{}", bytes("config"));
    assert!(metrics.contains("claude_agent_disk_free_bytes{mount=\"config\"}"));
    running.close_stdin();
    assert_eq!(running.code(), Some(0));
    let mut off = yard.start(&["--disk-interval", "0"], &[]);
    wait_for("room to be measured", || yard.ask("GET /metrics")?.contains("disk_free_bytes{mount=\"tmp\"}").then_some(()));
    assert!(!yard.ask("GET /metrics").unwrap().contains("claude_agent_disk_bytes"));
    off.close_stdin();
    off.code();
}

#[test]
fn no_path_is_told_to_anybody_by_default() {
    let yard = Yard::new("paths");
    let agents = yard.at("agents");
    yard.run(&["--tenant", "acme"], &[]);
    yard.run(&["--tenant", "globex", "--agent-dirs", agents.to_str().unwrap(), "--agent-workspace", "never"], &[]);
    assert_eq!(yard.conflicts(), ["cwd", "session"].map(|kind| format!("{kind} globex acme flagged")));
    let secret = yard.dir.file_name().unwrap().to_str().unwrap().to_owned();
    for file in ["ledger.jsonl", "events.jsonl"] {
        let text = std::fs::read_to_string(yard.at(file)).unwrap();
        assert!(!text.contains(&secret) && !text.contains(Path::new("/work").to_str().unwrap()), "{file}");
    }
}
