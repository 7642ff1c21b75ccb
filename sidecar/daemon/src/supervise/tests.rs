//! Monitors that fail: what is left must be a plain init that relays.
//!
//! [`as_wrapper`] is no test of its own: the others start this binary once more, with a case in the environment, and then it is the
//! wrapper. What libtest says on stdout before is skipped.

use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use agent_sidecar_core::monitor::{Action, Exit, Input, Output, Signal};

use super::*;

const CASE: &str = "SUPERVISE_TEST_CASE";
const PROGRAM: &str = "SUPERVISE_TEST_PROGRAM";

/// A monitor with a fault.
struct Faulty {
    case: String,
    said: VecDeque<Output>,
    stdin: Vec<u8>,
    stdout: u64,
    sum: u64,
    number: u32,
    /// At the next question.
    fails: bool,
}

impl Watch for Faulty {
    fn handle(&mut self, _: Now, input: Input<'_>) {
        match (self.case.as_str(), input) {
            // Whichever comes first: a stop may overtake what the CLI said before it.
            ("panics", Input::Stdout(_) | Input::Stop(_)) => panic!("as it was asked to"),
            ("answers and panics", Input::Stop(_)) => self.fails = true,
            ("hangs", Input::Stdout(_) | Input::Stop(_)) => loop {
                std::thread::park();
            },
            // Slower than any pipe, but not by hours.
            ("slow", Input::Stdout(bytes)) => {
                std::thread::sleep(Duration::from_micros(200));
                self.stdout += bytes.len() as u64;
                self.sum = bytes.iter().fold(self.sum, |sum, b| sum.wrapping_mul(31).wrapping_add(u64::from(*b)));
            }
            ("slow", Input::Lost { .. }) => panic!("nothing should be lost"),
            ("slow", Input::Exited(exit)) => {
                assert_eq!(exit, Exit::Code(7));
                eprintln!("heard {} {:016x}", self.stdout, self.sum);
            }
            ("talks", Input::Stdin(bytes)) => {
                self.stdin.extend_from_slice(bytes);
                self.number += 1;
                let request_id = format!("agent-sidecar:test:{}", self.number);
                let line = format!("{{\"own\":{}}}\n", self.number);
                self.said.push_back(Output::Action(Action::Inject { request_id, line }));
            }
            ("asks for the end", Input::StdinEnd) => {
                let line = String::from("last question\n");
                self.said.push_back(Output::Action(Action::Inject { request_id: String::from("agent-sidecar:test:1"), line }));
                self.said.push_back(Output::Action(Action::CloseStdin));
            }
            ("kills", Input::Stdin(_)) => self.said.push_back(Output::Action(Action::KillAll)),
            ("signals", Input::Stdin(_)) => self.said.push_back(Output::Action(Action::Signal(Signal(10)))),
            _ => {}
        }
    }

    fn poll_output(&mut self) -> Option<Output> {
        assert!(!self.fails, "as it was asked to");
        self.said.pop_front()
    }

    fn poll_timeout(&self) -> Option<Duration> {
        // Always overdue: must not make anybody spin, or starve.
        (self.case == "overdue").then_some(Duration::ZERO)
    }
}

#[test]
fn as_wrapper() {
    let Ok(case) = std::env::var(CASE) else { return };
    let program = std::env::var_os(PROGRAM).unwrap();
    let job = Job {
        cwd: None,
        program: "python3".into(),
        arg0: None,
        args: vec!["-u".into(), "-c".into(), program],
        user: None,
        env: vec![],
        mode: Mode::Parse { stdin_json: true },
        request_prefix: String::from("agent-sidecar:test:"),
        spill_dir: None,
        spill_bytes: SPILL_BYTES,
    };
    let lingers = case == "lingers";
    let monitor = Faulty { case, said: VecDeque::new(), stdin: Vec::new(), stdout: 0, sum: 0, number: 0, fails: false };
    let mut supervisor = Supervisor::new(job, monitor, Clock::start()).unwrap();
    if lingers {
        supervisor = supervisor.before_exit(Box::new(|ending| {
            eprintln!("lingering with {}", ending.exit_code);
            loop {
                std::thread::park();
            }
        }));
    }
    let code = supervisor.run().unwrap();
    std::process::exit(code.into());
}

struct Wrapper(Child);

impl Wrapper {
    fn start(case: &str, program: &str) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "supervise::tests::as_wrapper", "--nocapture", "--test-threads=1"]);
        let program = format!("import os, sys, time, signal\nprint('\\nbegin')\n{program}");
        command.env(CASE, case).env(PROGRAM, program).env("RUST_BACKTRACE", "0");
        let mut wrapper = Self(command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap());
        while wrapper.line() != "begin" {}
        wrapper
    }

    fn line(&mut self) -> String {
        let mut line = Vec::new();
        let mut byte = [0];
        while self.0.stdout.as_mut().unwrap().read(&mut byte).unwrap() == 1 && byte != *b"\n" {
            line.extend(byte);
        }
        String::from_utf8(line).unwrap()
    }

    fn write(&mut self, bytes: &[u8]) {
        self.0.stdin.as_mut().unwrap().write_all(bytes).unwrap();
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_raw(self.0.id().cast_signed()).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// The rest of stdout, stderr, and the exit code.
    fn end(mut self) -> (Vec<u8>, String, i32) {
        self.0.stdin = None;
        let (mut out, mut err) = (Vec::new(), String::new());
        self.0.stdout.take().unwrap().read_to_end(&mut out).unwrap();
        self.0.stderr.take().unwrap().read_to_string(&mut err).unwrap();
        (out, err, self.code())
    }

    #[expect(clippy::disallowed_methods, reason = "here is no reaper: the test owns the wrapper")]
    fn code(&mut self) -> i32 {
        self.0.wait().unwrap().code().unwrap()
    }
}

/// Ten megabytes, more than the backlog keeps in memory, then the app's words, then a code.
const SPEAKS: &str = "
for n in range(160): sys.stdout.buffer.write(bytes([n]) * 65536)
sys.stdout.flush()
print(sys.stdin.read(), end='')
sys.exit(7)
";

fn spoken(last: &[u8]) -> Vec<u8> {
    (0..160u8).flat_map(|n| [n; 65536]).chain(last.iter().copied()).collect()
}

#[test]
fn a_monitor_that_panics_leaves_the_relay() {
    let mut wrapper = Wrapper::start("panics", SPEAKS);
    wrapper.write(b"hello\n");
    let (out, err, code) = wrapper.end();
    assert!(out == spoken(b"hello\n"));
    assert_eq!(code, 7);
    assert_eq!(err.matches("as it was asked to").count(), 1, "{err}");
}

#[test]
fn a_monitor_that_hangs_leaves_the_relay() {
    let mut wrapper = Wrapper::start("hangs", SPEAKS);
    wrapper.write(b"hello\n");
    let (out, _, code) = wrapper.end();
    assert!(out == spoken(b"hello\n"));
    assert_eq!(code, 7);
}

#[test]
fn a_stop_goes_its_plain_way_without_a_monitor() {
    for case in ["panics", "hangs", "answers and panics"] {
        let program = "signal.pthread_sigmask(0, [15])\nprint('up')\nsignal.sigwait([15])\nprint('heard')\nsys.exit(9)";
        let mut wrapper = Wrapper::start(case, program);
        assert_eq!(wrapper.line(), "up");
        wrapper.signal(rustix::process::Signal::TERM);
        assert_eq!(wrapper.line(), "heard");
        assert_eq!(wrapper.end().2, 9);
    }
}

#[test]
fn a_cli_without_a_reader_is_ended_without_a_monitor() {
    for case in ["panics", "hangs"] {
        let mut wrapper = Wrapper::start(case, "print('up')\ntime.sleep(1000)");
        assert_eq!(wrapper.line(), "up");
        wrapper.0.stdout = None;
        assert_eq!(wrapper.code(), 143);
    }
}

#[test]
fn a_slow_monitor_hears_everything() {
    let mut wrapper = Wrapper::start("slow", SPEAKS);
    wrapper.write(b"hello\n");
    let (out, err, code) = wrapper.end();
    assert!(out == spoken(b"hello\n"));
    let sum = b"\nbegin\n".iter().chain(&out).fold(0u64, |sum, b| sum.wrapping_mul(31).wrapping_add(u64::from(*b)));
    assert_eq!(err, format!("heard {} {sum:016x}\n", out.len() + 7));
    assert_eq!(code, 7);
}

#[test]
fn lines_of_ours_stand_between_lines_of_the_apps() {
    // Checks that each line is whole, and says how many of each kind there were.
    let program = "
import json
app = own = 0
for line in sys.stdin:
    said = json.loads(line)
    if 'own' in said: own += 1
    else:
        app += 1
        assert said['app'] == app
print(app, own > 0)
";
    let mut wrapper = Wrapper::start("talks", program);
    for n in 1..=300 {
        for part in format!("{{\"app\": {n}, \"pad\": \"{}\"}}\n", "x".repeat(n)).as_bytes().chunks(13) {
            wrapper.write(part);
        }
    }
    let (out, err, code) = wrapper.end();
    assert_eq!(String::from_utf8(out).unwrap(), "300 True\n", "{err}");
    assert_eq!(code, 0);
}

#[test]
fn a_last_question_comes_before_the_end() {
    let mut wrapper = Wrapper::start("asks for the end", "print(repr(sys.stdin.read()))");
    wrapper.write(b"hello\n");
    assert_eq!(wrapper.end().0, b"'hello\\nlast question\\n'\n");
}

#[test]
fn without_a_complete_line_there_is_no_question_and_no_wait() {
    let mut wrapper = Wrapper::start("asks for the end", "print(repr(sys.stdin.read()))");
    wrapper.write(b"hello");
    assert_eq!(wrapper.end().0, b"'hello'\n");
}

#[test]
fn the_end_is_not_held_for_ever() {
    let mut wrapper = Wrapper::start("says nothing", "print(repr(sys.stdin.read()))");
    wrapper.write(b"hello\n");
    assert_eq!(wrapper.end().0, b"'hello\\n'\n");
}

#[test]
fn a_kill_leaves_nobody() {
    let program = "
for n in (1, 2, 3, 15): signal.signal(n, signal.SIG_IGN)
for n in range(20):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0: time.sleep(1000)
        time.sleep(1000)
print(os.getpid())
time.sleep(1000)
";
    let mut wrapper = Wrapper::start("kills", program);
    let cli: i32 = wrapper.line().parse().unwrap();
    assert!(tree::below(wrapper.0.id().cast_signed()).iter().any(|pid| pid.as_raw_nonzero().get() == cli));
    let below = tree::below(wrapper.0.id().cast_signed());
    wrapper.write(b"{}\n");
    assert_eq!(wrapper.code(), 137);
    assert!(below.len() > 20 && below.iter().all(|pid| tree::state(pid.as_raw_nonzero().get()).is_none_or(|s| s == 'Z')));
}

#[test]
fn a_signal_of_the_monitors_reaches_the_cli() {
    let program = "signal.pthread_sigmask(0, [10])\nprint('up')\nsignal.sigwait([10])\nprint('ten')\nsys.exit(3)";
    let mut wrapper = Wrapper::start("signals", program);
    assert_eq!(wrapper.line(), "up");
    wrapper.write(b"{}\n");
    assert_eq!(wrapper.line(), "ten");
    assert_eq!(wrapper.end().2, 3);
}

#[test]
fn a_deadline_in_the_past_starves_nobody() {
    let mut wrapper = Wrapper::start("overdue", SPEAKS);
    wrapper.write(b"hello\n");
    let (out, _, code) = wrapper.end();
    assert!(out == spoken(b"hello\n"));
    assert_eq!(code, 7);
}

#[test]
fn the_app_has_its_end_before_we_linger_and_a_stop_ends_that() {
    let mut wrapper = Wrapper::start("lingers", "print('over')\nsys.exit(5)");
    assert_eq!(wrapper.line(), "over");
    let mut rest = Vec::new();
    wrapper.0.stdout.as_mut().unwrap().read_to_end(&mut rest).unwrap();
    let mut err = wrapper.0.stderr.take().unwrap();
    let mut said = [0; 16];
    err.read_exact(&mut said).unwrap();
    assert_eq!(&said, b"lingering with 5");
    wrapper.signal(rustix::process::Signal::TERM);
    assert_eq!(wrapper.code(), 5);
}
