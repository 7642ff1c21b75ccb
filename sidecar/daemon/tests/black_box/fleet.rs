//! What a fleet and a container have to do with each other: it is told, says how long the container may live, and takes and brings its conversation.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;

use crate::busy::posted;
use crate::support::*;

const TOKEN: &str = "0123456789abcdef0123456789abcdef";
const PROMPT: &str = r#"{"type":"user","message":{"role":"user","content":"go"}}"#;
const RESULT: &str = r#"{"type":"result","subtype":"success","is_error":false,"session_id":"s","num_turns":1,"total_cost_usd":0.01,"modelUsage":{"m":{"inputTokens":10,"outputTokens":5,"costUSD":0.01}}}"#;

/// A wrapper of a `cat` that says what it is told to say, and knows its fleet.
fn told(url: &str, dir: &Path, more: &[&str]) -> Command {
    let mut command = Command::new(SIDECAR);
    command.env("AGENT_SIDECAR_FLEET_TOKEN", TOKEN).current_dir(dir);
    command.args(["run", "--fleet-url", url, "--fleet-container", "agent-1-1", "--fleet-session", "talk", "--socket"]);
    command.arg(dir.join("hub.sock")).args(more).args(["--", "sh", "-c", "cat", "sh"]).args(STREAM_JSON);
    command
}

#[test]
fn a_fleet_is_told_what_is_done_and_spent_to_the_last() {
    // Alone, and where others may be.
    for hub in ["off", "auto"] {
        let dir = scratch(&format!("fleet-{hub}"));
        let answer = "HTTP/1.1 200 OK\r\nContent-Length: 25\r\nConnection: close\r\n\r\n{\"lease_seconds\": 3600.0}\n";
        let (url, words) = posted("/v1/containers/agent-1-1/report", answer);
        let mut running = Running::start(told(&url, &dir, &["--listen", "off", "--hub", hub, "--fleet-report-every", "1h"]));
        let mut last = 0;
        let mut next = |busy: bool| loop {
            let (key, word) = words.recv_timeout(PATIENCE).unwrap();
            assert_eq!((key.as_str(), word["session"].as_str()), (format!("Bearer {TOKEN}").as_str(), Some("talk")), "{word}");
            assert!(word["seq"].as_u64().unwrap() > last, "{word}");
            last = word["seq"].as_u64().unwrap();
            if word["busy"] == busy {
                return word;
            }
        };
        assert_eq!(next(false)["cost_usd"], 0.0, "at once: what is counted from here on is new");
        running.write(format!("{INIT}\n{PROMPT}\n").as_bytes()).unwrap();
        let word = next(true);
        assert!((1..=60).contains(&word["busy_seconds"].as_u64().unwrap()), "{word}");
        assert_eq!(word["sessions"], serde_json::json!(["s"]));
        running.write(format!("{RESULT}\n").as_bytes()).unwrap();
        // The last is told before the process is gone.
        running.close_stdin();
        assert_eq!(running.code(), Some(0));
        let spent = std::iter::from_fn(|| words.try_recv().ok()).last().map(|(_, word)| word["cost_usd"].clone());
        assert_eq!(spent, Some(serde_json::json!(0.01)), "{hub}");
        std::fs::remove_dir_all(dir).unwrap();
    }
}

#[test]
fn a_fleet_is_told_what_came_and_went_between_two_looks() {
    let dir = scratch("fleet-between");
    let answer = "HTTP/1.1 200 OK\r\nContent-Length: 25\r\nConnection: close\r\n\r\n{\"lease_seconds\": 3600.0}\n";
    let (url, words) = posted("/v1/containers/agent-1-1/report", answer);
    let mut hub = Command::new(SIDECAR);
    hub.env("AGENT_SIDECAR_FLEET_TOKEN", TOKEN).current_dir(&dir).args(["hub", "--listen", "off", "--fleet-report-every", "1h"]);
    hub.args(["--fleet-url", &url, "--fleet-container", "agent-1-1", "--fleet-session", "talk", "--socket"]);
    hub.arg(dir.join("hub.sock"));
    let _hub = Running::start(hub);
    let cost = || words.recv_timeout(PATIENCE).unwrap().1["cost_usd"].clone();
    assert_eq!(cost(), 0.0);
    let mut agent = Command::new(SIDECAR);
    agent.current_dir(&dir).args(["run", "--listen", "off", "--socket"]).arg(dir.join("hub.sock"));
    let lines = format!("{INIT}\n{RESULT}\n");
    agent.args(["--", "sh", "-c", "printf %s \"$0\"", &lines]).args(STREAM_JSON);
    assert!(agent.output().unwrap().status.success());
    // Where the hub has looked meanwhile it has also told that work had begun.
    while cost() != 0.01 {}
    std::fs::remove_dir_all(dir).unwrap();
}

#[test]
fn a_lease_that_is_over_ends_the_agent_and_a_fleet_that_is_not_there_does_not() {
    for hub in ["off", "auto"] {
        let dir = scratch(&format!("lease-{hub}"));
        let answer = "HTTP/1.1 200 OK\r\nContent-Length: 20\r\nConnection: close\r\n\r\n{\"lease_seconds\": 0}\n";
        let (url, words) = posted("/v1/containers/agent-1-1/report", answer);
        let more = ["--listen", "off", "--hub", hub, "--fleet-grace", "1s", "--fleet-report-every", "1s"];
        let mut running = Running::start(told(&url, &dir, &more));
        running.write(format!("{INIT}\n{PROMPT}\n{RESULT}\n").as_bytes()).unwrap();
        // It has its stdin, and would stay.
        assert!(running.code().is_some(), "{hub}");
        let spent = std::iter::from_fn(|| words.try_recv().ok()).last().map(|(_, word)| word["cost_usd"].clone());
        assert_eq!(spent, Some(serde_json::json!(0.01)), "{hub}");
        std::fs::remove_dir_all(dir).unwrap();
    }
    // Nobody listens there, and it has said how long: never.
    let dir = scratch("lease-none");
    let more = ["--listen", "off", "--fleet-grace", "1ms", "--fleet-report-every", "1ms"];
    let mut running = Running::start(told("http://127.0.0.1:1", &dir, &more));
    running.write(format!("{INIT}\n{PROMPT}\n{RESULT}\n").as_bytes()).unwrap();
    running.line_after(RESULT);
    running.close_stdin();
    assert_eq!(running.code(), Some(0));
    std::fs::remove_dir_all(dir).unwrap();
}

fn ask(at: SocketAddr, method: &str, token: &str, body: &[u8]) -> Option<TcpStream> {
    let mut stream = TcpStream::connect(at).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    write!(
        stream,
        "{method} /v1/conversation HTTP/1.1\r\nHost: here\r\nAuthorization: Bearer {token}\r\nContent-Length: {}\r\n\r\n",
        body.len()
    )
    .ok()?;
    stream.write_all(body).ok()?;
    Some(stream)
}

/// An answer's status, and its body as it came, pieces undone; none if that is not whole.
pub(crate) fn hear(mut from: impl Read) -> Option<(u16, Vec<u8>)> {
    let mut answer = Vec::new();
    from.read_to_end(&mut answer).ok()?;
    let end = answer.windows(4).position(|four| four == b"\r\n\r\n")?;
    let head = String::from_utf8_lossy(&answer[..end]).to_ascii_lowercase();
    let mut rest = &answer[end + 4..];
    let status = head.split(' ').nth(1)?.parse().ok()?;
    // Otherwise who reads to the end waits until somebody hangs up.
    assert!(head.contains("connection: close") || status == 404, "{head}");
    if !head.contains("transfer-encoding: chunked") {
        return Some((status, rest.to_vec()));
    }
    let mut whole = Vec::new();
    loop {
        let line = rest.windows(2).position(|two| two == b"\r\n")?;
        let size = usize::from_str_radix(str::from_utf8(&rest[..line]).ok()?, 16).ok()?;
        rest = &rest[line + 2..];
        if size == 0 {
            return Some((status, whole));
        }
        whole.extend_from_slice(rest.get(..size)?);
        rest = &rest[size + 2..];
    }
}

fn talk(at: SocketAddr, method: &str, token: &str, body: &[u8]) -> Option<(u16, Vec<u8>)> {
    hear(ask(at, method, token, body)?)
}

fn address_in(dir: &Path) -> SocketAddr {
    wait_for("an address", || std::fs::read_to_string(dir.join("hub.state/address")).ok()?.trim().parse().ok())
}

/// A wrapper of a container that gives its conversation.
fn contained(dir: &Path, container: &str, more: &[&str]) -> Running {
    for below in ["work", "config"] {
        std::fs::create_dir_all(dir.join(below)).unwrap();
    }
    let mut command = Command::new(SIDECAR);
    command.env("AGENT_SIDECAR_FLEET_TOKEN", TOKEN).env("CLAUDE_CONFIG_DIR", dir.join("config")).current_dir(dir.join("work"));
    command.args(["run", "--listen", "127.0.0.1:0", "--fleet-container", container, "--socket"]);
    command.arg(dir.join("hub.sock")).args(more).args(["--", "sh", "-c", "ls; cat", "sh"]).args(STREAM_JSON);
    Running::start(command)
}

#[test]
fn of_a_conversation_in_which_somebody_works_meanwhile_only_a_part_is_given() {
    let dir = scratch("conversation-meanwhile");
    let mut running = contained(&dir, "agent-1-1", &["--conversation-serve"]);
    let transcript = dir.join("config/projects/work/0b5d7a52-3c1e-4a6f-9d53-1f0c2f7be001.jsonl");
    std::fs::create_dir_all(transcript.parent().unwrap()).unwrap();
    std::fs::write(&transcript, "{}\n").unwrap();
    // More than is on its way to somebody who does not read.
    std::fs::File::create(dir.join("work/large")).unwrap().set_len(64 << 20).unwrap();
    running.write(format!("{INIT}\n{PROMPT}\n{RESULT}\n").as_bytes()).unwrap();
    let address = address_in(&dir);
    let mark = || {
        let mut head = String::new();
        ask(address, "HEAD", TOKEN, b"").unwrap().read_to_string(&mut head).unwrap();
        head.lines().find_map(|line| line.strip_prefix("agent-conversation-mark: ")).map(str::to_owned)
    };
    let taken = |meanwhile: &mut dyn FnMut()| {
        let mut stream = wait_for("it to be given", || {
            let mut stream = ask(address, "GET", TOKEN, b"")?;
            let mut status = [0; 12];
            stream.read_exact(&mut status).ok()?;
            (&status == b"HTTP/1.1 200").then_some(stream)
        });
        meanwhile();
        hear((&b"HTTP/1.1 200"[..]).chain(&mut stream)).is_some()
    };
    let first = wait_for("it to be idle", || mark().filter(|mark| mark.starts_with("1-")));
    assert!(taken(&mut || {}), "nobody works");
    assert_eq!(mark().as_ref(), Some(&first));
    // A turn that is over when it is looked at again: the sidecar has seen it.
    assert!(!taken(&mut || {
        running.write(format!("{PROMPT}\n{RESULT}\n").as_bytes()).unwrap();
        wait_for("its turn", || mark().filter(|mark| mark.starts_with("2-")));
    }));
    let second = mark().unwrap();
    assert_ne!(second, first);
    // And one of an agent that it does not see.
    assert!(!taken(&mut || std::fs::write(&transcript, "{}\n{}\n").unwrap()));
    assert!(mark().is_some_and(|mark| mark.starts_with("2-") && mark != second));
    assert!(taken(&mut || {}), "it is quiet again");
    running.close_stdin();
    assert_eq!(running.code(), Some(0));
    std::fs::remove_dir_all(dir).unwrap();
}

#[test]
fn a_conversation_is_taken_from_one_container_and_another_waits_for_it() {
    let (from, to) = (scratch("conversation-from"), scratch("conversation-to"));
    let (start, at) = (contained, address_in);
    let mut first = start(&from, "agent-1-1", &["--conversation-serve"]);
    std::fs::write(from.join("work/notes"), "a line").unwrap();
    std::fs::create_dir_all(from.join("config/projects/work")).unwrap();
    std::fs::write(from.join("config/projects/work/s.jsonl"), "{}").unwrap();
    std::fs::write(from.join("config/.credentials.json"), "a key").unwrap();
    let address = at(&from);
    assert_eq!(talk(address, "GET", "another", b"").unwrap().0, 401);
    assert_eq!(talk(address, "POST", TOKEN, b"").unwrap().0, 405);
    // Nothing is taken of an agent that works.
    first.write(format!("{INIT}\n{PROMPT}\n").as_bytes()).unwrap();
    wait_for("it to work", || (talk(address, "GET", TOKEN, b"")?.0 == 409).then_some(()));
    first.write(format!("{RESULT}\n").as_bytes()).unwrap();
    let tar = wait_for("it to be idle", || talk(address, "GET", TOKEN, b"").filter(|(status, _)| *status == 200)).1;
    first.close_stdin();
    assert_eq!(first.code(), Some(0));

    let mut second = start(&to, "agent-1-2", &["--conversation-serve", "--conversation-wait", "1h"]);
    let address = at(&to);
    assert_eq!(wait_for("it to be asked", || talk(address, "PUT", "another", &tar)).0, 401);
    assert_eq!(talk(address, "PUT", TOKEN, &tar[..tar.len() - 1024]).unwrap().0, 400, "half of it");
    assert!(!to.join("work/notes").exists());
    assert_eq!(talk(address, "PUT", TOKEN, &tar).unwrap().0, 200);
    // The CLI was not started before.
    assert_eq!(second.line(), "notes");
    assert_eq!(std::fs::read_to_string(to.join("config/projects/work/s.jsonl")).unwrap(), "{}");
    assert!(!to.join("config/.credentials.json").exists(), "keys stay where they are");
    second.write(format!("{INIT}\n{PROMPT}\n").as_bytes()).unwrap();
    wait_for("it to work", || (talk(address, "GET", TOKEN, b"")?.0 == 409).then_some(()));
    assert_eq!(talk(address, "PUT", TOKEN, &tar).unwrap().0, 200, "whose answer was lost may ask again");
    second.close_stdin();
    assert_eq!(second.code(), Some(0));

    // Nobody brings anything: then nothing is begun anew.
    let mut third = start(&to, "agent-1-3", &["--conversation-serve", "--conversation-wait", "1ms"]);
    assert_eq!((third.code(), third.rest()), (Some(125), Vec::new()));
    // Where it is not opened, it is closed.
    let mut closed = start(&from, "agent-1-1", &[]);
    let refused = wait_for("an answer", || {
        let mut stream = TcpStream::connect(at(&from)).ok()?;
        write!(stream, "GET /v1/conversation HTTP/1.0\r\nAuthorization: Bearer {TOKEN}\r\n\r\n").ok()?;
        hear(stream)
    });
    assert_eq!(refused.0, 404);
    closed.close_stdin();
    assert_eq!(closed.code(), Some(0));
    for dir in [from, to] {
        std::fs::remove_dir_all(dir).unwrap();
    }
}
