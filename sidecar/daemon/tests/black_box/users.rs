//! Wrappers of several users, served by one hub that root has started. These really change users, so only root can run them.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::http::try_ask;
use crate::support::*;
use crate::user::may_change_users;

/// Nobody's here: the hub's, two users', and somebody else's.
const HUB: u32 = 61_000;
const ONE: u32 = 61_001;
const TWO: u32 = 61_002;
const OTHER: u32 = 61_003;

/// Asks at the socket, as whoever runs it.
const ASK: &str = r#"
import socket, sys
hub = socket.socket(socket.AF_UNIX)
hub.connect(sys.argv[1])
hub.sendall((sys.argv[2] + ' HTTP/1.1\r\nHost: hub\r\nConnection: close\r\n\r\n').encode())
print(hub.makefile().read())
"#;

struct Town {
    dir: Scratch,
    user: Option<u32>,
}

/// Runs a test with a hub that stays root, and with one that becomes a user of its own.
fn each(name: &str, test: impl Fn(&Town)) {
    if !may_change_users() {
        return;
    }
    for user in [None, Some(HUB)] {
        let dir = Scratch::new("users", &format!("{name}-{}", user.unwrap_or_default()));
        std::fs::set_permissions(&*dir, std::fs::Permissions::from_mode(0o755)).unwrap();
        test(&Town { dir, user });
    }
}

impl Town {
    fn command(&self, what: &str) -> Command {
        let mut command = Command::new(SIDECAR);
        command.args([what, "--listen", "127.0.0.1:0", "--patrol=false", "--socket"]).arg(self.dir.join("hub.sock"));
        command.arg("--hub-users-dir").arg(self.dir.join("users")).current_dir("/");
        command
    }

    fn hub(&self, flags: &[&str]) -> Running {
        let mut command = self.command("hub");
        command.arg("--hub-users").arg(format!("{ONE}=acme,{TWO}"));
        if let Some(user) = self.user {
            command.args(["--hub-user", &user.to_string()]);
        }
        let hub = Running::start({
            command.args(flags);
            command
        });
        wait_for("the hub", || {
            let there = UnixStream::connect(self.door().join("hub.sock")).is_ok() && self.metrics().is_some();
            there.then_some(())
        });
        hub
    }

    fn above(&self) -> PathBuf {
        std::fs::read_dir(self.dir.join("users")).unwrap().next().unwrap().unwrap().path()
    }

    fn door(&self) -> PathBuf {
        wait_for("the hub's directory", || Some(std::fs::read_dir(self.dir.join("users")).ok()?.next()?.ok()?.path().join("hub")))
    }

    fn of(&self, uid: u32) -> PathBuf {
        self.above().join(uid.to_string())
    }

    /// An agent of a user's, which says that it is there and has had a turn.
    fn agent(&self, uid: u32, session: &str, flags: &[&str], script: &str) -> Running {
        let said = format!(
            r#"echo '{{"type":"system","subtype":"init","session_id":"{session}","model":"m"}}'
            echo '{{"type":"result","subtype":"success","is_error":false,"session_id":"{session}","num_turns":1,"total_cost_usd":0.5}}'
            {script}
            read -r _; exit 3"#
        );
        let mut command = self.command("run");
        command.args(flags).args(["--", "sh", "-c", &said, "sh"]).args(STREAM_JSON).env("DIR", self.above());
        if uid != 0 {
            command.uid(uid).gid(uid);
        }
        let mut running = Running::start(command);
        for _ in 0..2 {
            assert!(running.line().contains(session));
        }
        running
    }

    fn metrics(&self) -> Option<String> {
        Some(self.tcp("/metrics")?.1)
    }

    fn tcp(&self, path: &str) -> Option<(String, String)> {
        let address = std::fs::read_to_string(self.door().join("address")).ok()?.parse().ok()?;
        let (head, body) = try_ask(address, &format!("GET {path}"))?;
        Some((head.split(' ').nth(1)?.to_owned(), body))
    }

    /// Waits until a series says so much of a user.
    fn shows(&self, name: &str, uid: u32, value: u64) {
        let label = format!("uid=\"{uid}\"");
        wait_for(&format!("{name} of {uid}: {value}"), || {
            let metrics = self.metrics()?;
            let series: Vec<&str> = metrics.lines().filter(|line| line.starts_with(name) && line.contains(&label)).collect();
            series.iter().any(|line| line.ends_with(&format!(" {value}"))).then_some(())
        });
    }

    /// What a user is answered at the socket: the code, and the body.
    fn asked(&self, uid: u32, request: &str) -> Option<(String, String)> {
        let mut command = Command::new("python3");
        command.args(["-c", ASK]).arg(self.door().join("hub.sock")).arg(request).stderr(Stdio::null());
        let out = command.uid(uid).gid(uid).current_dir("/").output().unwrap();
        let text = String::from_utf8(out.stdout).unwrap().replace('\r', "");
        let (head, body) = text.split_once("\n\n")?;
        Some((head.split(' ').nth(1)?.to_owned(), body.to_owned()))
    }

    fn sessions(&self, uid: u32) -> Vec<Value> {
        let (code, body) = self.asked(uid, "GET /status").unwrap();
        assert_eq!(code, "200");
        serde_json::from_str::<Value>(&body).unwrap()["sessions"].as_array().unwrap().clone()
    }

    fn ids(&self, uid: u32) -> Vec<String> {
        let mut ids: Vec<String> =
            self.sessions(uid).iter().map(|one| one["session_id"].as_str().unwrap_or_default().to_owned()).collect();
        ids.sort();
        ids
    }
}

#[test]
fn one_hub_serves_the_wrappers_of_several_users_each_under_its_own_name() {
    each("serves", |town| {
        let hub = town.hub(&[]);
        let status = std::fs::read_to_string(format!("/proc/{}/status", hub.pid())).unwrap();
        if town.user.is_some() {
            assert!(
                status.contains("CapPrm:\t0000000000000000") && status.contains("Uid:\t61000\t61000\t61000\t61000"),
                "{status}"
            );
        }
        let mut all =
            [(ONE, "one"), (TWO, "two"), (0, "three")].map(|(uid, id)| (uid, town.agent(uid, id, &["--tenant", "globex"], "")));
        for (uid, _) in &all {
            town.shows("claude_agent_turns_total{", *uid, 1);
        }
        let metrics = town.metrics().unwrap();
        // The tenant of one's agents is not theirs to say.
        let turns: Vec<&str> =
            metrics.lines().filter(|line| line.starts_with("claude_agent_turns_total{") && line.ends_with(" 1")).collect();
        for labels in ["tenant=\"acme\",uid=\"61001\"", "tenant=\"globex\",uid=\"61002\"", "tenant=\"globex\",uid=\"0\""] {
            assert_eq!(turns.iter().filter(|line| line.contains(labels)).count(), 1, "{labels}: {turns:#?}");
        }
        assert_eq!(turns.len(), 3, "{turns:#?}");

        // Who sees whose sessions.
        assert_eq!(town.ids(0), ["one", "three", "two"]);
        assert_eq!(town.ids(ONE), ["one"]);
        assert_eq!(town.ids(TWO), ["two"]);
        assert!(town.asked(OTHER, "GET /status").is_none());
        assert_eq!(town.asked(ONE, "GET /sessions/one/timeline").unwrap().0, "200");
        assert_eq!(town.asked(ONE, "GET /sessions/two/timeline").unwrap().0, "404");
        assert_eq!(town.asked(ONE, "GET /events").unwrap().0, "403");
        for (path, code) in
            [("/status", "403"), ("/", "403"), ("/sessions/one/timeline", "403"), ("/livez", "200"), ("/busy", "200")]
        {
            assert_eq!(town.tcp(path).unwrap().0, code, "{path}");
        }

        // A hub that is gone is missed by nobody, and the next one goes on where it was.
        drop(hub);
        let (uid, first) = &mut all[0];
        first.close_stdin();
        assert_eq!(first.code(), Some(3));
        let _hub = town.hub(&[]);
        town.shows("claude_agent_turns_total{", *uid, 1);
        town.shows("agent_sidecar_hub_retired_total{", *uid, 1);
        assert!(
            std::fs::read_dir(town.of(ONE))
                .unwrap()
                .flatten()
                .all(|file| file.path().extension().is_none_or(|end| end != "jsonl"))
        );
        assert_eq!(town.ids(0), ["three", "two"]);
    });
}

#[test]
fn orders_reach_the_agents_of_every_user_and_come_from_the_hubs_user_and_root_alone() {
    each("orders", |town| {
        let _hub = town.hub(&["--hub-control"]);
        let _agents = [town.agent(ONE, "one", &[], ""), town.agent(TWO, "two", &[], "")];
        wait_for("both", || (town.ids(0).len() == 2).then_some(()));
        assert_eq!(town.asked(ONE, "POST /v1/sessions/two/pause").unwrap().0, "405");
        assert_eq!(town.asked(ONE, "POST /v1/sessions/one/pause").unwrap().0, "405");
        assert_eq!(town.asked(0, "POST /v1/sessions/two/pause").unwrap().0, "200");
        wait_for("the one that was meant", || (town.sessions(TWO)[0]["paused"] == true).then_some(()));
        assert_ne!(town.sessions(ONE)[0]["paused"], true);
        assert_eq!(town.asked(0, "POST /v1/pause").unwrap().0, "200");
        wait_for("the other", || (town.sessions(ONE)[0]["paused"] == true).then_some(()));
    });
}

#[test]
fn what_a_user_leaves_there_harms_nobody_else() {
    each("junk", |town| {
        let _hub = town.hub(&[]);
        let _two = town.agent(TWO, "two", &[], "");
        town.shows("claude_agent_turns_total{", TWO, 1);
        // A copy of another's journal (root's doing: nobody else gets at it), one with a second name, links, pipes, and a crowd.
        let theirs = town.of(ONE);
        let journal = std::fs::read_dir(town.of(TWO))
            .unwrap()
            .flatten()
            .map(|file| file.path())
            .find(|path| path.extension().is_some_and(|end| end == "jsonl"))
            .unwrap();
        std::fs::hard_link(&journal, theirs.join(journal.file_name().unwrap())).unwrap();
        std::fs::copy(&journal, theirs.join("copy.jsonl")).unwrap();
        std::os::unix::fs::symlink(&journal, theirs.join("link.jsonl")).unwrap();
        wait_for("what was refused", || {
            let metrics = town.metrics()?;
            let refused = metrics
                .lines()
                .find(|line| line.starts_with("agent_sidecar_hub_refused_total{reason=\"owner\",uid=\"61001\"}"))?;
            (!refused.ends_with(" 0")).then_some(())
        });
        let crowd = "cd \"$0\" && mkfifo pipe.jsonl && head -c 3000000 /dev/zero > long.jsonl && for i in $(seq 500); do echo '{}' > junk$i.jsonl; done";
        let made = Command::new("sh").args(["-c", crowd]).arg(&theirs).uid(ONE).gid(ONE).status().unwrap();
        assert!(made.success());
        // Whoever comes now is counted as ever.
        let _more = town.agent(TWO, "more", &[], "");
        town.shows("claude_agent_turns_total{", TWO, 2);
        let metrics = town.metrics().unwrap();
        let turns = |line: &&str| {
            line.starts_with("claude_agent_turns_total{") && line.contains("uid=\"61001\"") && !line.ends_with(" 0")
        };
        assert_eq!(metrics.lines().find(turns), None, "nothing of it is counted");
        assert!(metrics.contains("agent_sidecar_hub_refused_total{reason=\"owner\",uid=\"61002\"} 0"));
        let found = std::fs::metadata(&journal).unwrap();
        assert_eq!((found.uid(), found.mode() & 0o007), (TWO, 0));
    });
}

#[test]
fn a_hub_for_several_users_is_made_by_root_and_shares_its_group_with_nobody() {
    if !may_change_users() {
        return;
    }
    let dir = Scratch::new("users", "refused");
    std::fs::set_permissions(&*dir, std::fs::Permissions::from_mode(0o777)).unwrap();
    let refused = |root: bool, users: &str, user: &str, why: &str| {
        let mut command = Command::new(SIDECAR);
        command.args(["hub", "--listen", "127.0.0.1:0", "--socket"]).arg(dir.join("hub.sock")).current_dir("/");
        command.arg("--hub-users-dir").arg(dir.join("users")).args(["--hub-users", users, "--hub-user", user]);
        if !root {
            command.uid(ONE).gid(ONE);
        }
        let out = command.stdin(Stdio::null()).output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(!out.status.success() && said.contains(why), "{said}");
        assert!(!dir.join("users").exists());
    };
    refused(false, "61001", "61000", "only root can give directories");
    refused(true, "61001", "61000:61001", "give `hub.user` a group of its own");
    refused(true, "61001", "61001:61000", "give `hub.user` a group of its own");
    refused(true, "no-such-user", "61000", "there is no user `no-such-user`");
    // Without such a hub, all is as it was.
    let mut command = Command::new(SIDECAR);
    command.args(["run", "--listen", "off", "--hub-users-dir"]).arg(dir.join("users")).args(["--", "sh", "-c", "exit 3"]);
    assert_eq!(Running::start(command).code(), Some(3));
}
