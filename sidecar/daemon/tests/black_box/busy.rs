//! Whether the agent is busy, as a platform is told.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::process::Command;
use std::sync::mpsc;

use serde_json::{Value, json};

use crate::http::try_ask;
use crate::support::*;

/// A webhook: each request's authorization, and what it said.
fn webhook(answer: &'static str) -> (String, mpsc::Receiver<(String, Value)>) {
    let (url, words) = posted("/lease?box=7", answer);
    (format!("{url}/lease?box=7"), words)
}

/// The same below any path.
pub(crate) fn posted(path: &'static str, answer: &'static str) -> (String, mpsc::Receiver<(String, Value)>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (say, hear) = mpsc::channel();
    std::thread::spawn(move || {
        'next: for stream in listener.incoming() {
            let mut reader = BufReader::new(stream.unwrap());
            let (mut length, mut key) = (0, String::new());
            loop {
                let mut line = String::new();
                // Who has waited two seconds for us hangs up, and comes again.
                if reader.read_line(&mut line).unwrap_or(0) == 0 {
                    continue 'next;
                }
                let Some((name, value)) = line.trim_end().split_once(": ") else {
                    assert!(line.trim_end().is_empty() || line.starts_with(&format!("POST {path} ")), "{line}");
                    if line.trim_end().is_empty() {
                        break;
                    }
                    continue;
                };
                match name.to_ascii_lowercase().as_str() {
                    "content-length" => length = value.parse().unwrap(),
                    "authorization" => value.clone_into(&mut key),
                    _ => {}
                }
            }
            let mut body = vec![0; length];
            if reader.read_exact(&mut body).is_err() {
                continue;
            }
            // Heard first: who waits for the answer may be gone with it.
            say.send((key, serde_json::from_slice(&body).unwrap())).ok();
            reader.get_mut().write_all(answer.as_bytes()).ok();
        }
    });
    (url, hear)
}

const PROMPT: &str = r#"{"type":"user","message":{"role":"user","content":"go"}}"#;
const TAKEN: &str = "HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n";
const REFUSED: &str = "HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";

#[test]
fn a_platform_is_told_when_the_agent_works_and_when_it_does_not() {
    let dir = scratch("busy");
    let file = dir.join("busy.json");
    let (url, words) = webhook(TAKEN);
    let mut command = Command::new(SIDECAR);
    command.args(["run", "--listen", "off", "--busy-lease", "1h", "--busy-webhook", &url, "--busy-file"]).arg(&file);
    // What the app says comes back as what the CLI says.
    command.args(["--busy-webhook-headers", "authorization=Bearer%20k", "--", "sh", "-c", "cat", "sh"]).args(STREAM_JSON);
    let mut running = Running::start(command);
    let next = |busy: bool, state: Option<&str>| loop {
        let (key, word) = words.recv_timeout(PATIENCE).unwrap();
        assert_eq!(key, "Bearer k");
        if word["busy"] == busy && state.is_none_or(|state| word["state"] == state) {
            return word;
        }
    };
    let written = || serde_json::from_slice::<Value>(&std::fs::read(&file).unwrap()).unwrap();

    running.write(format!("{INIT}\n{PROMPT}\n").as_bytes()).unwrap();
    let word = next(true, None);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let until = word["until"].as_u64().unwrap();
    assert!((now + 3_500..=now + 3_600).contains(&until), "{until} at {now}");
    wait_for("the file", || (written()["busy"] == true).then_some(()));

    running.write(b"{\"type\":\"result\",\"subtype\":\"success\",\"session_id\":\"s\"}\n").unwrap();
    assert_eq!(next(false, Some("idle")), json!({"busy": false, "state": "idle"}));
    assert_eq!(written()["busy"], false);

    running.write(format!("{PROMPT}\n").as_bytes()).unwrap();
    next(true, None);
    running.close_stdin();
    assert_eq!(next(false, Some("draining")), json!({"busy": false, "state": "draining"}));
    assert_eq!(running.code(), Some(0));
    assert_eq!(written()["busy"], false);
    assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 1, "nothing lies beside it");
    std::fs::remove_dir_all(dir).unwrap();
}

#[test]
fn a_platform_that_does_not_listen_is_named_once_and_holds_nobody_up() {
    let (url, words) = webhook(REFUSED);
    let dir = scratch("busy-refused");
    let mut command = Command::new(SIDECAR);
    command.args(["run", "--listen", "off", "--busy-lease", "1h", "--busy-webhook", &url]);
    command.args(["--busy-file", "/nowhere/busy.json", "--", "sh", "-c", "cat", "sh"]).args(STREAM_JSON);
    let log = dir.join("log");
    command.stderr(std::fs::File::create(&log).unwrap());
    let mut running = Running::start(command);
    running.write(format!("{INIT}\n{PROMPT}\n").as_bytes()).unwrap();
    while words.recv_timeout(PATIENCE).unwrap().1["busy"] != true {}
    running.close_stdin();
    assert_eq!(running.code(), Some(0));
    let said = std::fs::read_to_string(log).unwrap();
    // The last word is said anew: by then somebody may listen.
    assert!((1..=2).contains(&said.matches("was not told").count()), "{said}");
    assert!(said.contains("the file cannot be written"), "{said}");
    std::fs::remove_dir_all(dir).unwrap();
}

#[test]
fn who_ends_says_nothing_while_another_works() {
    let dir = scratch("busy-two");
    let file = dir.join("busy.json");
    let start = || {
        let mut command = Command::new(SIDECAR);
        command.args(["run", "--listen", "127.0.0.1:0", "--busy-lease", "1h", "--socket"]).arg(dir.join("hub.sock"));
        command.arg("--busy-file").arg(&file).args(["--", "sh", "-c", "cat", "sh"]).args(STREAM_JSON);
        let mut running = Running::start(command);
        running.write(format!("{INIT}\n{PROMPT}\n").as_bytes()).unwrap();
        running
    };
    let says = |busy: bool| {
        let word = serde_json::from_slice::<Value>(&std::fs::read(&file).ok()?).unwrap();
        (word["busy"] == busy).then_some(())
    };
    let work = |wanted: usize| {
        let address = std::fs::read_to_string(dir.join("hub.state/address")).ok()?.parse().ok()?;
        let status: Value = serde_json::from_str(&try_ask(address, "GET /status")?.1).ok()?;
        let states = status["sessions"].as_array()?.iter().map(|session| session["state"].as_str().unwrap().to_owned());
        (states.filter(|state| !matches!(state.as_str(), "idle" | "waiting_input")).count() == wanted).then_some(())
    };
    let mut first = start();
    wait_for("the first to be told", || says(true));
    let mut second = start();
    wait_for("both to work", || work(2));
    first.close_stdin();
    assert_eq!(first.code(), Some(0));
    assert!(says(true).is_some(), "the second works");
    second.write(b"{\"type\":\"result\",\"subtype\":\"success\",\"session_id\":\"s\"}\n").unwrap();
    wait_for("the second to speak", || says(false));
    second.write(format!("{PROMPT}\n").as_bytes()).unwrap();
    wait_for("the second to work again", || says(true));
    second.close_stdin();
    assert_eq!(second.code(), Some(0));
    assert!(says(false).is_some(), "the last one out");
    std::fs::remove_dir_all(dir).unwrap();
}
