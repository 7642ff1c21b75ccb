//! What is served while the agent works, and that nobody who asks for it can hold anybody up.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::*;

/// A wrapper around a program that waits for the end of its input, and where its metrics are.
struct Served {
    running: Running,
    address: SocketAddr,
    log: BufReader<std::process::ChildStderr>,
}

fn serve(flags: &[&str], cli: &[&str]) -> Served {
    let mut command = Command::new(SIDECAR);
    command.args(["run", "--listen", "127.0.0.1:0"]).args(flags).arg("--").args(cli).stderr(Stdio::piped());
    let mut running = Running::start(command);
    let mut log = BufReader::new(running.child.stderr.take().unwrap());
    let mut line = String::new();
    log.read_line(&mut line).unwrap();
    let address = line.trim_end().rsplit_once("address=").and_then(|(_, address)| address.parse().ok());
    Served { running, address: address.unwrap_or_else(|| panic!("no address in: {line}")), log }
}

/// The head, and the body.
fn ask(address: SocketAddr, request: &str) -> (String, String) {
    try_ask(address, request).unwrap()
}

/// `None` when there is nobody any more.
pub(crate) fn try_ask(address: SocketAddr, request: &str) -> Option<(String, String)> {
    let mut stream = TcpStream::connect(address).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).ok()?;
    write!(stream, "{request} HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    Some((head.to_owned(), body.to_owned()))
}

fn status(address: SocketAddr, request: &str) -> u16 {
    ask(address, request).0.split(' ').nth(1).unwrap().parse().unwrap()
}

#[test]
fn each_page_answers_and_nothing_can_be_changed() {
    let served = serve(&["--tenant", "acme"], &["cat"]);
    let at = served.address;
    for (request, code) in [
        ("GET /metrics", 200),
        ("HEAD /metrics", 200),
        ("GET /livez", 200),
        ("GET /readyz", 200),
        ("GET /status", 200),
        ("GET /busy", 200),
        ("GET /", 200),
        ("GET /nope", 404),
        ("POST /metrics", 405),
        ("DELETE /", 405),
    ] {
        assert_eq!(status(at, request), code, "{request}");
    }
    // Who asks at once may be answered before there is an agent.
    let (head, body) = wait_for("the agent to be started", || {
        let told = ask(at, "GET /metrics");
        told.1.contains("claude_agent_process_starts_total{tenant=\"acme\"} 1\n").then_some(told)
    });
    assert!(head.contains("text/plain; version=0.0.4"), "{head}");
    assert!(body.contains("agent_sidecar_build_info{version="), "{body}");
    assert!(ask(at, "HEAD /metrics").1.is_empty());
    let (head, body) = ask(at, "GET /status");
    assert!(head.contains("application/json"), "{head}");
    let status: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert!(status["sessions"].is_array(), "{body}");
}

#[test]
fn slow_clients_keep_no_probe_out() {
    let served = serve(&[], &["cat"]);
    let half = |request: &[u8]| {
        let mut stream = TcpStream::connect(served.address).unwrap();
        stream.write_all(request).unwrap();
        stream
    };
    // Some never end their request, some never read the answers.
    let slow: Vec<TcpStream> = (0..100).map(|_| half(b"GET /metrics HTTP/1.1\r\n")).collect();
    let deaf: Vec<TcpStream> = (0..100).map(|_| half(&b"GET /metrics HTTP/1.1\r\nHost: here\r\n\r\n".repeat(50))).collect();
    let start = Instant::now();
    assert_eq!(status(served.address, "GET /livez"), 200);
    assert_eq!(status(served.address, "GET /metrics"), 200);
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    drop((slow, deaf));
}

#[test]
fn a_taken_port_is_said_once_and_the_agent_runs() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let socket = scratch("taken").join("hub.sock").display().to_string();
    for hub in [["--hub", "off"], ["--socket", &socket]] {
        let mut command = Command::new(SIDECAR);
        let out = command.args(["run", "--listen", &address]).args(hub).args(["--", "echo", "done"]).output().unwrap();
        let said = String::from_utf8(out.stderr).unwrap();
        assert_eq!((out.status.code(), out.stdout.as_slice()), (Some(0), b"done\n".as_slice()), "{said}");
        assert_eq!(said.matches("metrics are not served").count(), 1, "{said}");
        assert!(said.contains("--listen"), "{said}");
    }
}

#[test]
fn the_last_numbers_wait_for_one_more_reader_and_the_app_does_not() {
    for args in [&["cat"][..], &["sh", "-c", "cat", "sh", "--input-format", "stream-json", "--output-format", "stream-json"]] {
        let mut served = serve(&["--linger", "20s", "--platform-grace", "60s"], args);
        served.running.close_stdin();
        let start = Instant::now();
        assert!(served.running.rest().is_empty());
        assert!(start.elapsed() < Duration::from_secs(15), "the app has its end before the numbers are read");
        // The agent is gone. Until somebody has read that, it can be read.
        let last = wait_for("the exit to be read", || {
            let body = try_ask(served.address, "GET /metrics")?.1;
            body.contains("claude_agent_process_exits_total{reason=\"clean\"} 1\n").then_some(body)
        });
        assert!(last.contains("claude_agent_sessions_active 0\n"), "{last}");
        // Whoever read it before the wait began has not ended it.
        wait_for("the wrapper to go", || try_ask(served.address, "GET /metrics").is_none().then_some(()));
        assert_eq!(served.running.code(), Some(0));
        let mut rest = String::new();
        served.log.read_to_string(&mut rest).unwrap();
        assert!(!rest.contains("nobody read"), "{rest}");
    }
}

#[test]
fn the_exposition_pleases_the_linter() {
    let served = serve(&[], &["cat"]);
    let (_, body) = ask(served.address, "GET /metrics");
    let mut lint = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool comes with the package `prometheus`");
    lint.stdin.take().unwrap().write_all(body.as_bytes()).unwrap();
    let out = lint.wait_with_output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
}

/// Asks with these headers, and reads until what was read is enough.
fn read_until(address: SocketAddr, path: &str, headers: &str, enough: impl Fn(&str) -> bool) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\n{headers}\r\n").unwrap();
    let (mut read, mut buffer) = (String::new(), [0; 16 * 1024]);
    while !enough(&read) {
        let n = stream.read(&mut buffer).unwrap();
        assert!(n > 0, "it ended with: {read}");
        read += std::str::from_utf8(&buffer[..n]).unwrap();
    }
    read
}

#[test]
fn a_browser_gets_the_page_and_curl_a_word_and_other_names_neither() {
    let served = serve(&["--page-host", "agents.example.com"], &["cat"]);
    let get = |path: &str, headers: &str| {
        read_until(served.address, path, &format!("{headers}Connection: close\r\n"), |read| {
            read.split_once("\r\n\r\n").is_some_and(|(head, body)| {
                let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap();
                body.len() >= length.parse().unwrap()
            })
        })
    };
    let browser = "Host: localhost:9477\r\nAccept: text/html,application/xhtml+xml\r\n";
    let page = get("/", browser);
    assert!(page.contains("<!doctype html>") && page.contains("text/html"), "{page}");
    for header in [
        "script-src 'self'",
        "frame-ancestors 'none'",
        "x-content-type-options: nosniff",
        "referrer-policy: no-referrer",
        "cross-origin-resource-policy: same-origin",
        "x-frame-options: DENY",
    ] {
        assert!(page.contains(header), "{header}: {page}");
    }
    assert!(!page.to_lowercase().contains("access-control"), "{page}");
    assert!(get("/page.js", browser).contains("text/javascript") && get("/page.css", browser).contains("text/css"));
    let word = get("/", "Host: here\r\nAccept: */*\r\n");
    assert!(word.contains("text/plain") && word.contains("/metrics"), "{word}");
    // A name that somebody else can have, and one that is ours.
    for path in ["/", "/events", "/sessions/1/timeline", "/page.js"] {
        assert!(get(path, "Host: rebound.example\r\nAccept: text/html\r\n").starts_with("HTTP/1.1 421"), "{path}");
    }
    assert!(get("/", "Host: agents.example.com\r\nAccept: text/html\r\n").starts_with("HTTP/1.1 200"));
    for path in ["/metrics", "/status", "/livez"] {
        assert!(get(path, "Host: whatever.example\r\n").starts_with("HTTP/1.1 200"), "scrapers use any name: {path}");
    }
}

#[test]
fn a_wrapper_alone_tells_what_changes_and_what_happened() {
    let flags = ["--output-format", "stream-json"];
    let cli = format!("echo '{INIT}'; read -r _; echo '{}'; read -r _", RESULT);
    let mut served = serve(&["--tenant", "acme"], &[&["sh", "-c", &cli, "sh"][..], &flags].concat());
    let host = "Host: localhost\r\n";
    let first = read_until(served.address, "/events", host, |read| read.contains("\"session_id\":\"s\""));
    assert!(
        first.contains("text/event-stream") && first.contains("\"whole\":true") && first.contains("\"tenant\":\"acme\""),
        "{first}"
    );
    let id = first.lines().rev().find_map(|line| line.strip_prefix("id: ")).unwrap().to_owned();
    served.running.write(b"go\n").unwrap();
    // Whoever comes back is told what it has missed, and not everything.
    let rest = wait_for("the change", || {
        let rest =
            read_until(served.address, "/events", &format!("{host}Last-Event-ID: {id}\r\n"), |read| read.contains("data: "));
        rest.contains("\"outcome\":\"success\"").then_some(rest)
    });
    assert!(!rest.contains("\"whole\":true"), "{rest}");
    let (head, body) = ask(served.address, "GET /sessions/s/timeline");
    assert!(head.contains("200") && body.contains("\"kind\":\"turn_ended\""), "{body}");
    let told: serde_json::Value = serde_json::from_str(&body).unwrap();
    let last = told["entries"].as_array().unwrap().last().unwrap()["n"].as_u64().unwrap();
    let by_pid = ask(served.address, &format!("GET /sessions/{}/timeline?after={}", served.running.pid(), last - 1)).1;
    // More may have happened since.
    let told: serde_json::Value = serde_json::from_str(&by_pid).unwrap();
    assert_eq!(told["entries"][0]["n"].as_u64(), Some(last), "{by_pid}");
    assert_eq!(status(served.address, "GET /sessions/nobody/timeline"), 404);
}

const RESULT: &str = r#"{"type":"result","subtype":"success","is_error":false,"session_id":"s","num_turns":1,"total_cost_usd":0.01,"modelUsage":{"m":{"inputTokens":10,"outputTokens":5,"costUSD":0.01}}}"#;

#[test]
fn those_who_watch_and_do_not_read_keep_nobody_out_and_there_is_an_end_to_them() {
    let served = serve(&[], &["cat"]);
    let watch = || {
        let mut stream = TcpStream::connect(served.address).unwrap();
        write!(stream, "GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
        stream
    };
    let mut watching: Vec<TcpStream> = (0..16).map(|_| watch()).collect();
    for stream in &mut watching {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        assert!(stream.read(&mut [0; 64]).unwrap() > 0);
    }
    let refused = read_until(served.address, "/events", "Host: localhost\r\n", |read| read.contains("\r\n\r\n"));
    assert!(refused.starts_with("HTTP/1.1 503"), "{refused}");
    assert_eq!(status(served.address, "GET /livez"), 200);
    drop(watching);
    wait_for("room", || {
        read_until(served.address, "/events", "Host: localhost\r\n", |read| read.contains("\r\n\r\n"))
            .starts_with("HTTP/1.1 200")
            .then_some(())
    });
}
