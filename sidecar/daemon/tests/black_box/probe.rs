//! `probe`: for images without a shell, whether the sidecar is alive, ready or busy.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use crate::support::*;

/// A CLI that answers once it is told to, and then waits.
const CLI: &str = r#"
echo '{"type":"system","subtype":"init","session_id":"s","model":"claude-opus-5-5"}'
echo '{"type":"assistant","session_id":"s","message":{"id":"m","model":"claude-opus-5-5","usage":{"input_tokens":5,"output_tokens":7},"content":[{"type":"tool_use","id":"t","name":"Bash","input":{}}]}}'
read -r _
echo '{"type":"result","subtype":"success","is_error":false,"session_id":"s","num_turns":1,"total_cost_usd":0.01}'
read -r _
"#;

fn probe(page: &str, at: &[&str]) -> Output {
    Command::new(SIDECAR).args(["probe", page]).args(at).env_remove("AGENT_SIDECAR_LISTEN").output().unwrap()
}

/// The exit code, and what was said where.
fn asked(page: &str, at: &[&str]) -> (Option<i32>, String, String) {
    let out = probe(page, at);
    (out.status.code(), String::from_utf8(out.stdout).unwrap(), String::from_utf8(out.stderr).unwrap())
}

fn at_socket(socket: &Path) -> [&str; 4] {
    ["--listen", "off", "--socket", socket.to_str().unwrap()]
}

#[test]
fn a_hub_is_asked_at_its_socket_and_an_agent_that_works_is_busy() {
    let socket = scratch("probe-hub").join("hub.sock");
    let mut command = Command::new(SIDECAR);
    command.args(["run", "--listen", "127.0.0.1:0", "--socket"]).arg(&socket);
    command.args(["--", "sh", "-c", CLI, "sh"]).args(ONE_SHOT);
    let mut running = Running::start(command);
    let at = at_socket(&socket);
    wait_for("a tool call", || (asked("busy", &at).0 == Some(0)).then_some(()));
    assert_eq!(asked("livez", &at), (Some(0), String::from("ok\n"), String::new()));
    // One that begins is busy, and ready when its CLI is up.
    wait_for("an agent that is up", || (asked("readyz", &at) == (Some(0), String::from("ok\n"), String::new())).then_some(()));
    // At the address it is the same.
    let address = std::fs::read_to_string(socket.with_extension("state").join("address")).unwrap();
    assert_eq!(asked("livez", &["--hub", "off", "--listen", &address]).0, Some(0));
    running.write(b"go\n").unwrap();
    wait_for("its end", || {
        let (code, said, _) = asked("busy", &at);
        (code == Some(1) && said.contains("\"busy\":false")).then_some(())
    });
    drop(running);
}

#[test]
fn where_nobody_answers_the_answer_is_no() {
    let socket = scratch("probe-nobody").join("hub.sock");
    for page in ["livez", "readyz", "busy"] {
        let (code, said, error) = asked(page, &at_socket(&socket));
        assert_eq!((code, said.as_str()), (Some(1), ""), "{error}");
        assert!(error.contains("no sidecar answers at") && error.contains("hub.sock"), "{error}");
    }
    assert_eq!(asked("healthz", &at_socket(&socket)).0, Some(2), "a page that there is not");
}

#[test]
fn what_hangs_is_not_waited_for_and_what_answers_no_is_no() {
    let socket = scratch("probe-hangs").join("hub.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let began = Instant::now();
    assert_eq!(asked("livez", &at_socket(&socket)).0, Some(1));
    assert!(began.elapsed() < Duration::from_secs(60), "it gave up by itself");
    drop(listener);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let answers = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        assert_ne!(stream.read(&mut [0; 1024]).unwrap(), 0, "its question");
        stream.write_all(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 5\r\nConnection: close\r\n\r\nlost\n").unwrap();
    });
    let (code, said, error) = asked("livez", &["--hub", "off", "--listen", &address]);
    assert_eq!((code, said.as_str(), error.as_str()), (Some(1), "lost\n", ""));
    answers.join().unwrap();
}
