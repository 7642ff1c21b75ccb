//! Signals to the wrapper reach the CLI, each once.

use rustix::process::{Pid, Signal};

use crate::support::*;

/// Says each signal that it gets; `end` ends it. Handlers would not do: what comes right before a read that blocks is kept until it ends.
const LISTENER: &str = "
import os, signal, sys, threading
heard = set(range(1, 65)) - {9, 13, 17, 19, 32, 33}
signal.pthread_sigmask(signal.SIG_BLOCK, heard)
threading.Thread(target=lambda: (sys.stdin.readline(), os._exit(0))).start()
os.write(1, b'ready\\n')
while True: os.write(1, b'%d\\n' % signal.sigwait(heard))
";

fn kill(pid: i32, signal: i32) {
    let status = std::process::Command::new("sh").args(["-c", &format!("kill -{signal} {pid}")]).status().unwrap();
    assert!(status.success());
}

#[test]
fn every_signal_that_can_be_taken_is_forwarded() {
    let all = [6, 10, 12, 14, 16, 18, 23, 24, 25, 26, 27, 28, 29, 30, 34, 40, 64];
    for args in [&STREAM_JSON[..], &[]] {
        let mut running = Running::start(patient_python(LISTENER, args));
        assert_eq!(running.line(), "ready");
        for signal in all {
            if args.is_empty() && signal == 18 {
                // In our own group only a stopped CLI needs it from us.
                continue;
            }
            kill(running.pid(), signal);
            assert_eq!(running.number(), signal);
        }
        running.write(b"end\n").unwrap();
        running.close_stdin();
        assert_eq!(running.code(), Some(0));
    }
}

#[test]
fn a_stop_is_forwarded_at_once_where_nobody_judges_it() {
    for signal in [1, 2, 3, 15] {
        let mut running = Running::start(patient_python(LISTENER, &[]));
        assert_eq!(running.line(), "ready");
        kill(running.pid(), signal);
        assert_eq!(running.number(), signal);
        kill(running.pid(), signal);
        assert_eq!(running.number(), signal);
    }
}

#[test]
fn a_stop_before_the_app_has_spoken_is_forwarded() {
    for signal in [1, 2, 3, 15] {
        let mut running = Running::start(patient_python(LISTENER, &STREAM_JSON));
        assert_eq!(running.line(), "ready");
        kill(running.pid(), signal);
        assert_eq!(running.number(), signal);
    }
}

/// Ends as the real one does when it is asked to: by a request, with a result and a code of its own; by TERM with another. It has started
/// when we have asked it something: then we know that it can be asked to end.
const POLITE: &str = r#"
import sys, json, signal, os
signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
print("ready")
for line in sys.stdin:
    said = json.loads(line)
    if said["type"] == "user": print(json.dumps({"type": "system", "subtype": "init"}))
    if said.get("request", {}).get("subtype") == "get_usage": print("started")
    if said.get("request", {}).get("subtype") == "end_session":
        print(json.dumps({"type": "control_response", "response": {"subtype": "success", "request_id": said["request_id"]}}))
        print("result")
        sys.exit(1)
"#;

#[test]
fn a_stop_becomes_a_request_and_still_reports_the_signal() {
    // Several times: whether we may speak, and whether the monitor knows that, is decided on two threads.
    for (signal, code) in [(Signal::TERM, 143), (Signal::HUP, 129), (Signal::INT, 0)].repeat(4) {
        let mut running = Running::start(patient_python(POLITE, &STREAM_JSON));
        assert_eq!(running.line(), "ready");
        running.write(b"{\"type\":\"user\"}\n").unwrap();
        running.line_after("started");
        running.signal(signal);
        running.line_after("result");
        assert_eq!(running.code(), Some(code));
    }
}

#[test]
fn the_same_stop_said_twice_in_one_breath_is_one_request() {
    let mut running = Running::start(patient_python(POLITE, &STREAM_JSON));
    assert_eq!(running.line(), "ready");
    running.write(b"{\"type\":\"user\"}\n").unwrap();
    running.line_after("started");
    running.signal(Signal::TERM);
    running.signal(Signal::TERM);
    running.line_after("result");
    assert_eq!(running.code(), Some(143));
}

#[test]
fn a_cli_that_ignores_every_request_is_killed() {
    let program = "
import os, signal, sys, time
for n in (1, 2, 3, 15): signal.signal(n, signal.SIG_IGN)
print(os.getpid(), flush=True)
while True: time.sleep(100)
";
    let mut running = Running::start(python(program, &STREAM_JSON));
    let cli = running.number();
    running.signal(Signal::TERM);
    gone(cli);
    assert_eq!(running.code(), Some(137));
}

#[test]
fn after_the_end_a_stop_does_not_wait_for_a_reader_that_does_not_read() {
    let mut running = Running::start(sh("echo $$; head -c 3000000 /dev/zero", &STREAM_JSON));
    let cli = running.number();
    gone(cli);
    running.signal(Signal::TERM);
    assert_eq!(running.code(), Some(0));
}

#[test]
fn stopping_us_stops_the_cli_and_continuing_us_continues_it() {
    let mut running = Running::start(sh("echo $$; exec sleep 1000", &STREAM_JSON));
    let cli = running.number();
    let wrapper = running.pid();
    running.signal(Signal::TSTP);
    wait_for("both to stop", || (state(cli) == Some('T') && state(wrapper) == Some('T')).then_some(()));
    running.signal(Signal::CONT);
    wait_for("both to go on", || (state(cli) == Some('S') && state(wrapper) == Some('S')).then_some(()));
    rustix::process::kill_process(Pid::from_raw(cli).unwrap(), Signal::KILL).unwrap();
    assert_eq!(running.code(), Some(137));
}
