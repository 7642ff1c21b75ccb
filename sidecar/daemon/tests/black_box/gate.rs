//! Who may change something at the hub, over TCP and at its socket.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use crate::support::*;

const WORD: &str = "0123456789abcdef0123456789abcdef";
const RAISE: &str = "POST /v1/budgets/container?usd=9";

/// The code that a request with these headers is answered with.
fn code(stream: impl Read + Write, request: &str, headers: &str) -> String {
    code_at("here", stream, request, headers)
}

/// The same under another name.
fn code_at(host: &str, mut stream: impl Read + Write, request: &str, headers: &str) -> String {
    write!(stream, "{request} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{headers}\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer.split(' ').nth(1).unwrap().to_owned()
}

struct Hub {
    dir: Scratch,
    _running: Running,
}

fn hub(name: &str, flags: impl Fn(&Path) -> Vec<String>) -> Hub {
    let dir = Scratch::new("gate", name);
    let mut command = Command::new(SIDECAR);
    command.args(["hub", "--listen", "127.0.0.1:0", "--hub-control", "--socket"]).arg(dir.join("hub.sock")).args(flags(&dir));
    let hub = Hub { _running: Running::start(command), dir };
    wait_for("the hub", || UnixStream::connect(hub.dir.join("hub.sock")).ok());
    wait_for("its address", || hub.tcp());
    hub
}

impl Hub {
    fn tcp(&self) -> Option<TcpStream> {
        let address = std::fs::read_to_string(self.dir.join("hub.state/address")).ok()?;
        TcpStream::connect(address.trim()).ok()
    }

    fn both(&self, headers: &str) -> [String; 2] {
        let socket = UnixStream::connect(self.dir.join("hub.sock")).unwrap();
        [code(socket, RAISE, headers), code(self.tcp().unwrap(), RAISE, headers)]
    }
}

#[test]
fn what_a_page_of_somebody_elses_name_asks_is_not_answered() {
    // A name that its owner points at us when the browser has his page already.
    let hub = hub("rebound", |_| Vec::new());
    for (host, expected) in [("rebound.example", "421"), ("localhost", "200"), ("127.0.0.1:9477", "200")] {
        assert_eq!(code_at(host, hub.tcp().unwrap(), "GET /v1/budgets", ""), expected, "{host}");
    }
    assert_eq!(code_at("rebound.example", hub.tcp().unwrap(), "GET /metrics", ""), "200", "scrapers use any name");
}

fn token(dir: &Path, mode: u32) -> String {
    let path = dir.join("token");
    std::fs::write(&path, format!("{WORD}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn without_a_token_nothing_can_be_changed_over_tcp_whatever_is_asked_for() {
    let hub = hub("none", |_| vec![String::from("--control-tcp")]);
    assert_eq!(hub.both(""), ["200", "405"]);
    assert_eq!(hub.both(&format!("Authorization: Bearer {WORD}\r\n")), ["200", "405"]);
}

#[test]
fn a_token_is_asked_for_at_the_socket_and_opens_tcp_only_where_that_was_wanted() {
    let right = format!("Authorization: Bearer {WORD}\r\n");
    let closed = hub("closed", |dir| vec![String::from("--control-token-file"), token(dir, 0o600)]);
    assert_eq!(closed.both(""), ["401", "405"]);
    assert_eq!(closed.both(&right), ["200", "405"]);
    let open = hub("open", |dir| vec![String::from("--control-tcp"), String::from("--control-token-file"), token(dir, 0o600)]);
    assert_eq!(open.both("Authorization: Bearer nearly-the-right-one-but-not\r\n"), ["401", "401"]);
    assert_eq!(open.both(&right), ["200", "200"]);
    assert_eq!(open.both(&format!("{right}Origin: http://localhost\r\n")), ["403", "403"]);
    let mut metrics = open.tcp().unwrap();
    write!(metrics, "GET /metrics HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n").unwrap();
    let mut said = String::new();
    metrics.read_to_string(&mut said).unwrap();
    for (outcome, n) in [("allowed", 2), ("unauthorized", 2), ("cross_site", 2), ("closed", 0)] {
        assert!(
            said.contains(&format!("agent_sidecar_control_requests_total{{outcome=\"{outcome}\"}} {n}\n")),
            "{outcome}: {said}"
        );
    }
    assert!(!said.contains(WORD));
}

#[test]
fn control_says_the_token_that_it_is_given() {
    let hub = hub("control", |dir| vec![String::from("--control-token-file"), token(dir, 0o600)]);
    let control = |words: &[&str], env: Option<&str>| {
        let mut command = Command::new(SIDECAR);
        command.arg("control").args(words).arg("--socket").arg(hub.dir.join("hub.sock"));
        command.envs(env.map(|word| ("AGENT_SIDECAR_CONTROL_TOKEN", word)));
        let out = command.output().unwrap();
        (out.status.success(), String::from_utf8_lossy(&out.stderr).into_owned())
    };
    assert!(control(&["budgets"], None).0, "what is only read needs none");
    let (done, why) = control(&["pause"], None);
    assert!(!done && why.contains("Authorization"), "{why}");
    let file = hub.dir.join("token");
    assert_eq!(control(&["pause", "--control-token-file", file.to_str().unwrap()], None), (true, String::new()));
    assert_eq!(control(&["resume"], Some(WORD)), (true, String::new()));
}

#[test]
fn a_token_that_others_can_read_opens_to_nobody() {
    let hub = hub("readable", |dir| vec![String::from("--control-token-file"), token(dir, 0o644)]);
    assert_eq!(hub.both(&format!("Authorization: Bearer {WORD}\r\n")), ["401", "405"]);
}

#[test]
fn a_shim_whose_token_is_mistaken_opens_to_nobody() {
    let dir = Scratch::new("gate", "mistaken");
    std::os::unix::fs::symlink(SIDECAR, dir.join("claude")).unwrap();
    script(&dir.join("claude.sidecar-real"), "read -r _");
    let mut command = Command::new(dir.join("claude"));
    command.args(STREAM_JSON).env("AGENT_SIDECAR_LISTEN", "off").env("AGENT_SIDECAR_SOCKET", dir.join("hub.sock"));
    command.env("AGENT_SIDECAR_HUB_CONTROL", "true").env("AGENT_SIDECAR_CONTROL_TOKEN", "short");
    let mut running = Running::start(command);
    let socket = wait_for("the hub", || UnixStream::connect(dir.join("hub.sock")).ok());
    assert_eq!(code(socket, "POST /v1/pause", ""), "401");
    running.close_stdin();
    assert_eq!(running.code(), Some(1), "the end of what is read ends the CLI");
}

#[test]
fn a_secret_that_is_roots_and_our_groups_is_a_token() {
    if !crate::user::may_change_users() {
        return;
    }
    let dir = Scratch::new("gate", "secret");
    std::os::unix::fs::chown(&*dir, Some(crate::user::NOBODY), None).unwrap();
    let right = format!("Authorization: Bearer {WORD}\r\n");
    for (mode, expected) in [(0o440, "200"), (0o460, "401"), (0o444, "401")] {
        let file = token(&dir, mode);
        std::os::unix::fs::chown(&file, Some(0), Some(crate::user::NOBODY)).unwrap();
        let socket = dir.join(format!("{mode:o}.sock"));
        let mut command = Command::new(SIDECAR);
        command.args(["hub", "--listen", "off", "--hub-control", "--control-token-file", &file, "--socket"]).arg(&socket);
        command.uid(crate::user::NOBODY).gid(crate::user::NOBODY).current_dir("/");
        let _running = Running::start(command);
        let stream = wait_for("the hub", || UnixStream::connect(&socket).ok());
        assert_eq!(code(stream, RAISE, &right), expected, "{mode:o}");
    }
}

#[test]
fn control_tells_the_token_to_nobody_but_its_own_user_and_root() {
    if !crate::user::may_change_users() {
        return;
    }
    let dir = Scratch::new("gate", "stranger");
    let file = token(&dir, 0o600);
    // A hub of ours was here; who owns the directory can put another socket in the place of its own.
    std::fs::create_dir(dir.join("hub.state")).unwrap();
    std::fs::set_permissions(dir.join("hub.state"), std::fs::Permissions::from_mode(0o700)).unwrap();
    std::os::unix::fs::chown(&*dir, Some(crate::user::NOBODY), None).unwrap();
    let mut command = Command::new("python3");
    let listen = "import socket,sys; s=socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(); print('up', flush=True); c=s.accept()[0]; print(c.recv(9999), flush=True)";
    command.args(["-c", listen]).arg(dir.join("hub.sock"));
    command.uid(crate::user::NOBODY).gid(crate::user::NOBODY).current_dir("/");
    let mut fake = Running::start(command);
    assert_eq!(fake.line(), "up");
    let mut control = Command::new(SIDECAR);
    control.args(["control", "pause", "--control-token-file", &file, "--socket"]).arg(dir.join("hub.sock"));
    let out = control.output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(!out.status.success() && said.contains("is user 65534, who is not told the control token"), "{said}");
    assert_eq!(fake.line(), "b''");
}
