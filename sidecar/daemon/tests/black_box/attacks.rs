//! A hostile agent under the wrapper, as the sidecar's own user and as another: what it is kept from, and what is seen of the rest.
//! docs/security.md has a row for each, by the name of the test.

use std::collections::BTreeSet;
use std::io::Read;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::process::Pid;

use crate::http::try_ask;
use crate::support::*;
use crate::user::{NOBODY, may_change_users};

/// An agent, its wrapper, and where they are. The agent is nobody in any case, and the sidecar, too, if they are the same.
struct Cell {
    dir: Scratch,
    same: bool,
}

/// A turn that has cost something.
const SPENT: &str =
    r#"{"type":"result","subtype":"success","is_error":false,"session_id":"s","num_turns":1,"total_cost_usd":0.5}"#;

/// Runs a test as both.
fn each(name: &str, attack: impl Fn(&Cell)) {
    if !may_change_users() {
        return;
    }
    for same in [true, false] {
        let dir = Scratch::new("attacks", &format!("{name}-{same}"));
        std::fs::set_permissions(&*dir, std::fs::Permissions::from_mode(0o755)).unwrap();
        let cell = Cell { dir, same };
        cell.ours(&cell.dir);
        attack(&cell);
    }
}

impl Cell {
    fn at(&self, name: &str) -> String {
        self.dir.join(name).to_str().unwrap().to_owned()
    }

    /// Gives something to the sidecar's user.
    fn ours(&self, path: &Path) {
        if self.same {
            chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
        }
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.dir.join(name), text).unwrap();
        self.ours(&self.dir.join(name));
    }

    /// A directory of the agent's own.
    fn lair(&self) -> String {
        let lair = self.dir.join("lair");
        std::fs::create_dir_all(&lair).unwrap();
        chown(&lair, Some(NOBODY), Some(NOBODY)).unwrap();
        lair.to_str().unwrap().to_owned()
    }

    fn sidecar(&self, what: &str, flags: &[&str]) -> Command {
        let mut command = Command::new(SIDECAR);
        command.args([what, "--listen", "127.0.0.1:0", "--socket", &self.at("hub.sock")]).args(flags).current_dir("/");
        if self.same {
            command.uid(NOBODY).gid(NOBODY);
        }
        command
    }

    /// A wrapper around the agent, a shell script. Its `$DIR` is the directory.
    fn agent(&self, flags: &[&str], script: &str) -> Command {
        self.agent_as(flags, &["sh", "-c", script, "sh"])
    }

    fn agent_as(&self, flags: &[&str], cli: &[&str]) -> Command {
        let mut command = self.sidecar("run", flags);
        if !self.same {
            command.args(["--user", &NOBODY.to_string()]);
        }
        // Cargo's, which is one that loads code.
        command.env_remove("LD_LIBRARY_PATH");
        command.arg("--").args(cli).args(ONE_SHOT).env("DIR", &*self.dir).env("SIDECAR", SIDECAR).env("LAIR", self.lair());
        command
    }

    fn hub(&self) -> Running {
        let hub = Running::start(self.sidecar("hub", &[]));
        wait_for("the hub", || self.metrics().map(drop));
        hub
    }

    fn metrics(&self) -> Option<String> {
        let address = std::fs::read_to_string(self.dir.join("hub.state/address")).ok()?.parse().ok()?;
        let (head, body) = try_ask(address, "GET /metrics")?;
        head.starts_with("HTTP/1.1 200").then_some(body)
    }

    /// Waits until the metrics say so.
    fn shows(&self, line: &str) {
        wait_for(line, || self.metrics()?.lines().any(|said| said == line).then_some(()));
    }

    /// What the agent says of its attack: it is kept from it only where it is another user.
    fn expect(&self, running: &mut Running) {
        assert_eq!(running.line(), if self.same { "done" } else { "denied" });
    }
}

#[test]
fn killing_the_wrapper() {
    each("kill", |cell| {
        let mut running =
            Running::start(cell.agent(&[], "echo $$; read -r _; kill -9 $PPID 2>/dev/null || echo denied; read -r _"));
        let agent = running.number();
        running.write(b"\n").unwrap();
        if cell.same {
            // It has killed itself with it.
            gone(agent);
            assert_eq!(running.code(), None);
        } else {
            assert_eq!(running.line(), "denied");
            running.close_stdin();
            assert_eq!(running.code(), Some(1));
        }
    });
}

#[test]
fn killing_the_hub() {
    each("kill-hub", |cell| {
        let hub = cell.hub();
        let script = format!("kill -9 {} 2>/dev/null && echo done || echo denied; read -r _", hub.pid());
        let mut running = Running::start(cell.agent(&[], &script));
        cell.expect(&mut running);
        // Who served is served for.
        if cell.same {
            wait_for("the hub to be gone", || (!alive(hub.pid())).then_some(()));
        }
        cell.shows("agent_sidecar_hub_wrappers{state=\"live\"} 1");
        assert_eq!(alive(hub.pid()), !cell.same);
        running.close_stdin();
        running.code();
    });
}

#[test]
fn freezing_the_hub() {
    each("stop-hub", |cell| {
        let hub = cell.hub();
        let script = format!("kill -STOP {} 2>/dev/null && echo done || echo denied; read -r _; exit 3", hub.pid());
        let mut running = Running::start(cell.agent(&["--ledger", &cell.at("ledger")], &script));
        cell.expect(&mut running);
        // The page is late, and nothing else.
        running.close_stdin();
        assert_eq!(running.code(), Some(3));
        assert!(std::fs::read_to_string(cell.dir.join("ledger")).unwrap().contains("process_exited"));
        rustix::process::kill_process(Pid::from_raw(hub.pid()).unwrap(), rustix::process::Signal::CONT).unwrap();
        cell.shows("agent_sidecar_hub_retired_total 1");
    });
}

#[test]
fn changing_the_configuration() {
    each("config", |cell| {
        cell.write("config.toml", "[limits]\nmax_cost_usd = 5\n");
        let script =
            r#"read -r _; (echo 'max_turns = 1' >> "$DIR/config.toml") 2>/dev/null && echo done || echo denied; read -r _"#;
        let mut running = Running::start(cell.agent(&["--config", &cell.at("config.toml")], script));
        // It is said before anybody has done it.
        cell.shows(&format!("agent_sidecar_degraded{{component=\"config\"}} {}", u8::from(cell.same)));
        let in_force = |metrics: &str| metrics.lines().find(|line| line.contains("config_info")).unwrap().to_owned();
        let before = in_force(&cell.metrics().unwrap());
        running.write(b"\n").unwrap();
        cell.expect(&mut running);
        assert_eq!(in_force(&cell.metrics().unwrap()), before, "read once");
        running.close_stdin();
        running.code();
    });
}

#[test]
fn changing_the_book_of_budgets() {
    each("book", |cell| {
        let forged = r#"read -r _; (sed 's/[1-9]/0/g' "$DIR"/hub.state/budgets.json > "$LAIR"/book && cat "$LAIR"/book > "$DIR"/hub.state/budgets.json) 2>/dev/null && echo done || echo denied; read -r _; exit 3"#;
        let script = format!("echo '{INIT}'; echo '{SPENT}'; {forged}");
        let mut running = Running::start(cell.agent(&["--container-max-cost-usd", "5"], &script));
        running.line_after(SPENT);
        let spent = || cell.shows("claude_agent_budget_spent_usd{scope=\"container\"} 0.5");
        spent();
        running.write(b"\n").unwrap();
        cell.expect(&mut running);
        if cell.same {
            // It is put back by whoever knows better.
            cell.shows("agent_sidecar_tampered_total{file=\"budgets\"} 1");
        }
        spent();
        let book = std::fs::read_to_string(cell.dir.join("hub.state/budgets.json")).unwrap();
        assert!(book.contains("500000000000"), "{book}");
        running.close_stdin();
        assert_eq!(running.code(), Some(3), "and nobody is held up");
    });
}

#[test]
fn deleting_the_journal() {
    each("journal", |cell| {
        let _hub = cell.hub();
        let script = r#"read -r _; rm "$DIR"/hub.state/*.jsonl 2>/dev/null && echo done || echo denied; read -r _; exit 3"#;
        let ledger = cell.at("ledger");
        let mut running = Running::start(cell.agent(&["--ledger", &ledger], script));
        cell.shows("agent_sidecar_hub_wrappers{state=\"live\"} 1");
        running.write(b"\n").unwrap();
        cell.expect(&mut running);
        if cell.same {
            // What it had said holds: it is taken for ended.
            cell.shows("agent_sidecar_hub_retired_total 1");
        }
        running.close_stdin();
        assert_eq!(running.code(), Some(3));
        assert!(std::fs::read_to_string(&ledger).unwrap().contains("process_exited"), "the ledger has all of it");
    });
}

#[test]
fn changing_the_journal() {
    each("edit", |cell| {
        let _hub = cell.hub();
        let edit = r#"read -r _; (for own in "$DIR"/hub.state/*.jsonl; do sed 's/"n":1/"n":7/' "$own" > "$LAIR"/own && cat "$LAIR"/own > "$own" || exit; done) 2>/dev/null && [ -s "$LAIR"/own ] && echo done || echo denied; read -r _; exit 3"#;
        let script = format!("echo '{INIT}'; echo '{SPENT}'; {edit}");
        let mut running = Running::start(cell.agent(&[], &script));
        running.line_after(SPENT);
        let turns = || cell.shows("claude_agent_turns_total{outcome=\"success\"} 1");
        turns();
        running.write(b"\n").unwrap();
        cell.expect(&mut running);
        if cell.same {
            cell.shows("agent_sidecar_tampered_total{file=\"journal\"} 1");
        }
        // It is written anew, as it was.
        turns();
        running.close_stdin();
        assert_eq!(running.code(), Some(3));
    });
}

#[test]
fn changing_the_ledger() {
    each("bill", |cell| {
        let ledger = cell.at("ledger");
        let edit = r#"read -r _; (sed 's/[1-9]/0/g' "$DIR"/ledger > "$LAIR"/bill && cat "$LAIR"/bill > "$DIR"/ledger) 2>/dev/null && echo done || echo denied"#;
        let script = format!("echo '{INIT}'; echo '{SPENT}'; {edit}; echo '{}'; read -r _; exit 3", SPENT.replace("0.5", "0.7"));
        let mut running = Running::start(cell.agent(&["--ledger", &ledger], &script));
        running.line_after(SPENT);
        wait_for("the turn to be on it", || std::fs::read_to_string(&ledger).ok()?.contains("0.5").then_some(()));
        running.write(b"\n").unwrap();
        cell.expect(&mut running);
        cell.shows(&format!("agent_sidecar_tampered_total{{file=\"ledger\"}} {}", u8::from(cell.same)));
        running.close_stdin();
        assert_eq!(running.code(), Some(3));
        assert!(std::fs::read_to_string(&ledger).unwrap().contains("process_exited"));
    });
}

#[test]
fn having_the_next_agent_ask_somebody_else() {
    each("elsewhere", |cell| {
        let home = cell.lair();
        let agent = |flags: &[&str], script: &str| {
            let mut command = cell.agent(flags, script);
            command.env("HOME", &home);
            Running::start(command)
        };
        // The CLI of today lets a settings file win over its environment.
        let write = r#"mkdir -p "$HOME/.claude"; echo '{"env":{"ANTHROPIC_BASE_URL":"http://127.0.0.1:1"}}' > "$HOME/.claude/settings.json"; echo done; read -r _"#;
        let mut running = agent(&[], write);
        assert_eq!(running.line(), "done");
        cell.shows("agent_sidecar_cli_influences{kind=\"endpoint\",source=\"settings\"} 1");
        running.close_stdin();
        running.code();
        let ours = ["--base-urls", "https://api.anthropic.com", "--environment-policy", "refuse"];
        assert_eq!(agent(&ours, "echo up; exit 3").code(), Some(125));
        let mut told = agent(&["--base-urls", "http://127.0.0.1:1", "--environment-policy", "refuse"], "echo up; exit 3");
        assert_eq!((told.line(), told.code()), (String::from("up"), Some(3)));
    });
}

#[test]
fn loading_code_into_the_cli() {
    each("loader", |cell| {
        for (policy, line, code) in [("report", "--preload x", 3), ("strip", "none", 3), ("refuse", "", 125)] {
            let mut command = cell.agent(&["--environment-policy", policy], "echo \"${BUN_OPTIONS-none}\"; read -r _; exit 3");
            command.env("BUN_OPTIONS", "--preload x").env("HOME", cell.lair());
            let mut running = Running::start(command);
            assert_eq!(running.line(), line, "{policy}");
            if code == 3 {
                cell.shows("agent_sidecar_cli_influences{kind=\"loader\",source=\"environment\"} 1");
            }
            running.close_stdin();
            assert_eq!(running.code(), Some(code), "{policy}");
        }
    });
}

/// Makes processes of which each makes more, as long as there is room, and then again. Never without a bound around it.
const BOMB: &str = r#"
import os, sys, time
def say(line): print(line, flush=True)
say(sys.argv[1]); say(sys.argv[2])
sys.stdin.readline()
top = os.getpid()
while True:
    try:
        os.fork()
    except OSError:
        if os.getpid() == top:
            break
        time.sleep(0.1)
say('full')
sys.stdin.readline()
sys.exit(3)
"#;

#[test]
fn starting_processes_without_end() {
    if !may_change_users() {
        return;
    }
    // Nobody else's: another run of these tests has bombs of its own.
    let uid = 1_000_000 + 2 * std::process::id();
    for (same, uid) in [(true, uid), (false, uid + 1)] {
        let dir = Scratch::new("attacks", &format!("bomb-{same}"));
        std::fs::set_permissions(&*dir, std::fs::Permissions::from_mode(0o777)).unwrap();
        let cell = Cell { dir, same };
        let ledger = cell.at("ledger");
        // A bound on the processes of this user, who has no others; as the `pids` of a container are one.
        let mut command = Command::new("prlimit");
        command.args(["--nproc=60", SIDECAR, "run", "--listen", "127.0.0.1:0"]);
        command.args(["--socket", &cell.at("hub.sock"), "--ledger", &ledger]).current_dir("/");
        if same {
            command.uid(uid).gid(uid);
        } else {
            command.args(["--user", &uid.to_string()]);
        }
        command.args(["--", "python3", "-c", BOMB, INIT, SPENT]).args(ONE_SHOT).stderr(Stdio::piped());
        let mut running = Running::start(command);
        running.line_after(SPENT);
        cell.shows("claude_agent_turns_total{outcome=\"success\"} 1");
        running.write(b"\n").unwrap();
        running.line_after("full");
        // Nobody can be made any more, and nobody needs to be.
        let first = cell.metrics().unwrap();
        assert!(first.contains("claude_agent_turns_total{outcome=\"success\"} 1"));
        running.signal(rustix::process::Signal::TERM);
        running.code();
        let bill = std::fs::read_to_string(&ledger).unwrap();
        assert!(bill.contains("process_exited") && bill.contains("0.5"), "{bill}");
        // All of it was ended; what is quicker than that is ended here.
        let left = || {
            std::fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| {
                let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
                let status = std::fs::read_to_string(entry.path().join("status")).ok()?;
                status.contains(&format!("Uid:\t{uid}\t")).then_some(pid)
            })
        };
        wait_for("nobody of it to be left", || {
            let all: Vec<i32> = left().collect();
            for pid in all.iter().filter_map(|pid| Pid::from_raw(*pid)) {
                rustix::process::kill_process(pid, rustix::process::Signal::KILL).ok();
            }
            all.is_empty().then_some(())
        });
        let mut said = String::new();
        running.child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        assert!(!said.contains("last numbers"), "the hub was told: {said}");
    }
}

#[test]
fn forging_the_numbers_of_another_user() {
    each("users", |cell| {
        let mut hub = Command::new(SIDECAR);
        hub.args(["hub", "--listen", "127.0.0.1:0", "--socket", &cell.at("hub.sock"), "--hub-users-dir", &cell.at("users")]);
        hub.args(["--hub-users", &format!("{NOBODY}=acme,61031"), "--hub-user", "61030"]).current_dir("/");
        let _hub = Running::start(hub);
        let of = |uid: u32| {
            wait_for("the directories", || {
                let above = std::fs::read_dir(cell.dir.join("users")).ok()?.next()?.ok()?.path();
                above.join("hub/hub.sock").exists().then(|| above.join(uid.to_string()))
            })
        };
        // The agent's own wrapper is of its user, or root's; somebody else's is there in any case.
        let other = of(61_031).join("0.jsonl");
        std::fs::write(&other, "").unwrap();
        chown(&other, Some(61_031), Some(61_030)).unwrap();
        let script = r#"cd "$USERS"; for dir in 0 61031 hub; do (ls $dir || : > $dir/1.jsonl || rm $dir/*.jsonl || mv $dir old || ln $dir/0.jsonl "$LAIR"/0.jsonl) 2>/dev/null && echo done; done; echo denied; read -r _"#;
        let mut command = cell.agent(&["--hub-users-dir", &cell.at("users"), "--tenant", "globex"], script);
        command.env("USERS", of(0).parent().unwrap());
        let mut running = Running::start(command);
        assert_eq!(running.line(), "denied");
        let address = of(0).with_file_name("hub").join("address");
        let (uid, tenant) = if cell.same { (NOBODY, "acme") } else { (0, "globex") };
        let said = format!("tenant=\"{tenant}\",uid=\"{uid}\"");
        wait_for("its numbers", || {
            let (_, body) = try_ask(std::fs::read_to_string(&address).ok()?.parse().ok()?, "GET /metrics")?;
            let sessions = body.lines().find(|line| line.starts_with("claude_agent_sessions_active{") && line.contains(&said));
            sessions.is_some().then_some(())
        });
        running.close_stdin();
        running.code();
    });
}

#[test]
fn forging_a_journal() {
    each("forge", |cell| {
        let _hub = cell.hub();
        let script = r#"
            read -r _
            cd "$DIR"/hub.state 2>/dev/null && own=$(ls *.jsonl) && sed "s/${own%.jsonl}/0000000000000000/" "$own" > 0000000000000000.jsonl && echo done || echo denied
            read -r _"#;
        let mut running = Running::start(cell.agent(&[], script));
        cell.shows("agent_sidecar_hub_wrappers{state=\"live\"} 1");
        running.write(b"\n").unwrap();
        cell.expect(&mut running);
        // One that ended, and nobody has started.
        cell.shows(&format!("agent_sidecar_hub_retired_total {}", u8::from(cell.same)));
        running.close_stdin();
        running.code();
    });
}

/// Asks the socket for a larger budget; what was answered, or why nothing was.
const RAISE: &str = r#"
import os, socket, sys
sys.stdin.readline()
def ask(word):
    try:
        hub = socket.socket(socket.AF_UNIX)
        hub.connect(os.environ['DIR'] + '/hub.sock')
    except PermissionError:
        return 'denied'
    hub.sendall(b'POST /v1/budgets/container?usd=9 HTTP/1.1\r\nHost: hub\r\nConnection: close\r\n' + word + b'\r\n')
    return hub.makefile().readline().split(' ')[1]
print(ask(b''), ask(b'Authorization: Bearer guessed-guessed-guessed\r\n'))
sys.stdin.readline()
"#;

#[test]
fn raising_its_own_budget() {
    each("raise", |cell| {
        std::fs::write(cell.dir.join("token"), "0123456789abcdef0123456789abcdef\n").unwrap();
        std::fs::set_permissions(cell.dir.join("token"), std::fs::Permissions::from_mode(0o600)).unwrap();
        // Where both are one user, the token has to come from elsewhere: an environment that the CLI does not have.
        let word = "0123456789abcdef0123456789abcdef";
        for (flags, env, expected) in
            [(&[][..], None, "403 403"), (&["--hub-control"], None, "200 200"), (&["--hub-control"], Some(word), "401 401")]
        {
            let flags = [&["--container-max-cost-usd", "5"], flags].concat();
            let mut command = cell.agent_as(&flags, &["python3", "-c", RAISE]);
            if let Some(word) = env.filter(|_| cell.same) {
                command.env("AGENT_SIDECAR_CONTROL_TOKEN", word);
            } else if env.is_some() {
                command.env("AGENT_SIDECAR_CONTROL_TOKEN_FILE", cell.at("token"));
            }
            let mut running = Running::start(command);
            wait_for("the socket", || std::os::unix::net::UnixStream::connect(cell.dir.join("hub.sock")).ok());
            running.write(b"\n").unwrap();
            assert_eq!(running.line(), if cell.same { expected } else { "denied denied" });
            if expected == "401 401" && cell.same {
                cell.shows("agent_sidecar_control_requests_total{outcome=\"unauthorized\"} 2");
            }
            running.close_stdin();
            running.code();
        }
    });
}

/// A CLI by its name, which is a shell, that waits for a word before it does something. Alone in sight: others have CLIs, too.
fn as_cli(cell: &Cell, script: &str) -> Running {
    let cli = cell.at("claude.sidecar-real");
    copy(Path::new("/bin/sh"), Path::new(&cli));
    let inside = cell.agent_as(&[], &[&cli, "-c", &format!("read -r _; {script}\nread -r _"), "sh"]);
    let mut command = Command::new("unshare");
    command.args(["-p", "-f", "--mount-proc", "--kill-child"]);
    if cell.same {
        command.args(["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]);
    }
    command.arg(SIDECAR).args(inside.get_args()).current_dir("/");
    command.envs(inside.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let mut running = Running::start(command);
    // It has looked once, and knows the CLI behind the wrapper.
    cell.shows("agent_sidecar_unwrapped_processes 0");
    cell.shows("agent_sidecar_hub_wrappers{state=\"live\"} 1");
    running.write(b"\n").unwrap();
    running
}

/// For as long as somebody reads.
const WORK: &str = "-c 'while :; do sleep 1; done' </dev/null >/dev/null &";

#[test]
fn starting_the_cli_behind_the_shim() {
    each("behind", |cell| {
        let mut running = as_cli(cell, &format!("\"$DIR\"/claude.sidecar-real {WORK}"));
        cell.shows("agent_sidecar_unwrapped_processes 1");
        running.close_stdin();
        running.code();
    });
}

#[test]
fn starting_a_copy_of_the_cli() {
    each("copy", |cell| {
        let script = format!("cp \"$DIR\"/claude.sidecar-real \"$LAIR\"/innocent; \"$LAIR\"/innocent {WORK}");
        let mut running = as_cli(cell, &script);
        cell.shows("agent_sidecar_unwrapped_processes 1");
        running.close_stdin();
        running.code();
    });
}

#[test]
fn putting_another_cli_first_on_the_path() {
    each("path", |cell| {
        let script = format!("cp \"$DIR\"/claude.sidecar-real \"$LAIR\"/claude; PATH=$LAIR:$PATH; setsid claude {WORK}");
        let mut running = as_cli(cell, &script);
        cell.shows("agent_sidecar_unwrapped_processes 1");
        running.close_stdin();
        running.code();
    });
}

#[test]
fn giving_its_own_agents_other_limits() {
    each("limits", |cell| {
        cell.write("config.toml", "[policy]\nfinal = [\"limits.*\"]\n[limits]\nmax_cost_usd = 5\n");
        let script = r#"
            run() { "$SIDECAR" run --config "$DIR/config.toml" --listen off "$@" -- echo started 2>&1 | grep -c -e 'it is final' -e started; }
            run --max-cost-usd 1000; AGENT_SIDECAR_MAX_COST_USD=off run; AGENT_SIDECAR_MODE=off run; run --max-cost-usd 4 | sed s/^/lower/"#;
        let mut running = Running::start(cell.agent(&["--config", &cell.at("config.toml")], script));
        let said: Vec<String> = (0..4).map(|_| running.line()).collect();
        assert_eq!(said, ["1", "1", "1", "lower1"]);
        running.close_stdin();
        running.code();
    });
}

#[test]
fn replacing_the_shim() {
    each("shim", |cell| {
        copy(Path::new(SIDECAR), &cell.dir.join("claude"));
        cell.ours(&cell.dir.join("claude"));
        let real = cell.dir.join("claude.sidecar-real");
        script(
            &real,
            r#"read -r _; (mv "$DIR"/claude "$DIR"/old && cp /bin/true "$DIR"/claude) 2>/dev/null && echo done || echo denied; read -r _"#,
        );
        let mut command = Command::new(cell.dir.join("claude"));
        command.args(ONE_SHOT).args(["-p", "hi"]).env("DIR", &*cell.dir).current_dir("/");
        command.env("AGENT_SIDECAR_LISTEN", "127.0.0.1:0").env("AGENT_SIDECAR_SOCKET", cell.dir.join("hub.sock"));
        if cell.same {
            command.uid(NOBODY).gid(NOBODY);
        } else {
            command.env("AGENT_SIDECAR_USER", NOBODY.to_string());
        }
        let mut running = Running::start(command);
        cell.shows("agent_sidecar_degraded{component=\"shim\"} 0");
        running.write(b"\n").unwrap();
        cell.expect(&mut running);
        cell.shows(&format!("agent_sidecar_degraded{{component=\"shim\"}} {}", u8::from(cell.same)));
        running.close_stdin();
        running.code();
    });
}

#[test]
fn reading_our_environment_memory_and_files() {
    each("memory", |cell| {
        let program = r#"
import ctypes, os, sys
us = f'/proc/{os.getppid()}/'
def denied(what):
    try: what()
    except PermissionError: return True
print(denied(lambda: open(us + 'environ').read()), denied(lambda: open(us + 'mem', 'r+b')), denied(lambda: os.listdir(us + 'fd')))
libc = ctypes.CDLL(None, use_errno=True)
PTRACE_SEIZE = 0x4206
print(libc.ptrace(PTRACE_SEIZE, os.getppid(), 0, 0), 'AGENT_SIDECAR_OTLP_HEADERS' in os.environ)
"#;
        let mut command = cell.agent_as(&[], &["python3", "-c", program]);
        command.env("AGENT_SIDECAR_OTLP_HEADERS", "authorization=secret");
        let mut running = Running::start(command);
        assert_eq!(running.line(), "True True True");
        assert_eq!(running.line(), "-1 False");
        assert_eq!(running.code(), Some(0));
    });
}

#[test]
fn outliving_the_end() {
    each("outlive", |cell| {
        let script = r#"setsid sh -c '(trap "" TERM HUP INT; echo $$; exec sleep 1000) & exit' ; read -r _"#;
        let mut running = Running::start(cell.agent(&[], script));
        let tool = running.number();
        running.close_stdin();
        running.code();
        gone(tool);
    });
}

#[test]
fn forging_what_the_cli_says() {
    each("frames", |cell| {
        // A tool, whose own output is its own, writes to its parent's.
        let script = r#"sh -c 'echo forged 2>/dev/null >/proc/$PPID/fd/1' 2>/dev/null || echo denied; read -r _"#;
        let mut running = Running::start(cell.agent(&[], script));
        assert_eq!(running.line(), if cell.same { "forged" } else { "denied" });
        running.close_stdin();
        running.code();
    });
}

#[test]
fn filling_the_disk_of_the_ledger() {
    each("disk", |cell| {
        let script = format!("echo '{INIT}'; read -r _; exit 3");
        let mut running = Running::start(cell.agent(&["--ledger", "/dev/full"], &script));
        assert_eq!(running.line(), INIT);
        cell.shows("agent_sidecar_degraded{component=\"ledger\"} 1");
        running.close_stdin();
        assert_eq!(running.code(), Some(3));
    });
}

#[test]
fn leaving_pipes_where_files_are() {
    each("pipes", |cell| {
        let (ledger, home) = (cell.at("ledger"), cell.lair());
        let busy = cell.at("busy");
        let flags = ["--ledger", &ledger, "--container-max-cost-usd", "5", "--max-sessions", "3", "--busy-file", &busy];
        let flags = [&flags[..], &["--tenant", "acme"]].concat();
        let agent = |script: &str| {
            let mut command = cell.agent(&flags, script);
            command.env("HOME", &home);
            Running::start(command)
        };
        let script = r#"mkdir -p "$HOME/.claude"; mkfifo "$HOME/.claude/settings.json"; cd "$DIR"/hub.state 2>/dev/null && echo done || echo denied; read -r _"#;
        let mut first = agent(script);
        cell.expect(&mut first);
        first.close_stdin();
        first.code();
        // When nobody is there who would put things right: somebody of that user has waited for it.
        let files = "totals.json budgets.json budgets.lock budgets.tmp tenants.json tenants.lock address kept scraped lock seat0 0.jsonl ../ledger";
        let plant = format!("cd hub.state && for file in {files}; do rm -f $file; mkfifo $file || exit 9; done");
        let planted = Command::new("sh")
            .args(["-c", &plant])
            .current_dir(&*cell.dir)
            .uid(NOBODY)
            .gid(NOBODY)
            .stderr(Stdio::null())
            .status();
        assert_eq!(planted.unwrap().success(), cell.same);
        let mut next = agent("echo up; exit 3");
        assert_eq!(next.line(), "up");
        assert_eq!(next.code(), Some(3));
    });
}

#[test]
fn holding_the_lock_of_the_budgets() {
    each("lock", |cell| {
        let program = r#"
import fcntl, glob, os, sys
sys.stdin.readline()
try:
    for lock in [os.environ['DIR'] + '/hub.state/budgets.lock']:
        file = open(lock, 'r+')
        fcntl.flock(file, fcntl.LOCK_EX)
    print('done', flush=True)
except PermissionError:
    print('denied', flush=True)
print('{"type":"result","subtype":"success","is_error":false,"session_id":"s","num_turns":1,"total_cost_usd":0.5}', flush=True)
sys.stdin.readline()
sys.exit(3)
"#;
        let mut running = Running::start(cell.agent_as(&["--container-max-cost-usd", "5"], &["python3", "-c", program]));
        wait_for("the lock", || cell.dir.join("hub.state/budgets.lock").exists().then_some(()));
        running.write(b"\n").unwrap();
        cell.expect(&mut running);
        if cell.same {
            cell.shows("agent_sidecar_degraded{component=\"hub\"} 1");
        }
        running.close_stdin();
        assert_eq!(running.code(), Some(3));
    });
}

#[test]
fn reading_the_ledger_of_another_tenant() {
    each("ledger", |cell| {
        let other = cell.at("ledger-of-another");
        let mut before = cell.agent(&["--ledger", &other, "--tenant", "other"], "true");
        assert!(before.stdin(Stdio::null()).status().unwrap().success());
        let script = r#"cat "$DIR"/ledger-of-another >/dev/null 2>&1 && echo done || echo denied; read -r _"#;
        let mut running = Running::start(cell.agent(&[], script));
        cell.expect(&mut running);
        running.close_stdin();
        running.code();
    });
}

#[test]
fn the_page_has_a_row_for_each_and_no_other() {
    let read = |path: &str| std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap();
    let source = read("tests/black_box/attacks.rs");
    let tests = source.split("#[test]\nfn ").skip(1).filter_map(|text| text.split_once("()")).map(|(name, _)| name.to_owned());
    let tests: BTreeSet<String> = tests.filter(|name| !name.starts_with("the_page_has")).collect();
    let page = read("../../docs/security.md");
    let (_, page) = page.split_once("## What was tried").unwrap();
    let rows = page.lines().filter(|line| line.starts_with("| ")).filter_map(|line| line.rsplit('`').nth(1));
    let rows: BTreeSet<String> = rows.map(str::to_owned).filter(|name| name.contains('_')).collect();
    assert!(tests.len() >= 15, "{tests:?}");
    assert_eq!(rows, tests);
}
