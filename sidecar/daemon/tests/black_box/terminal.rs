//! At a terminal, under a shell with job control: as if the wrapper were not there.

use std::process::Command;

use crate::support::*;

/// Plays a person at a terminal: types, and waits for what appears. `$1` is the wrapper.
const PERSON: &str = r#"
import json, os, pty, re, select, signal, struct, fcntl, termios, sys, time
pid, tty = pty.fork()
if pid == 0:
    # Whoever runs tests in the background ignores it, and what a shell was given it gives on.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ["PS1"] = "PROMPT> "
    os.execvp("bash", ["bash", "--norc", "--noprofile", "--noediting", "-i"])
seen = b""
def expect(what):
    global seen
    until = time.monotonic() + 30
    while True:
        found = re.search(what.encode(), seen)
        if found:
            seen = seen[found.end():]
            return found
        if not select.select([tty], [], [], max(0, until - time.monotonic()))[0]:
            sys.exit(f"waited in vain for {what!r}, saw {seen!r}")
        try: seen += os.read(tty, 65536)
        except OSError: sys.exit(f"the terminal closed while waiting for {what!r}, saw {seen!r}")
def type(text): os.write(tty, text.encode())
TUI = '''
import os, signal, sys, fcntl, termios, struct, threading
counts = {}
def listen():
    while True:
        n = signal.sigwait({2, 28})
        counts[n] = counts.get(n, 0) + 1
        rows, cols = struct.unpack("HH", fcntl.ioctl(0, termios.TIOCGWINSZ, b"0000"))
        os.write(1, b"[heard %d time %d size %dx%d]" % (n, counts[n], rows, cols))
signal.pthread_sigmask(signal.SIG_BLOCK, {2, 28})
threading.Thread(target=listen, daemon=True).start()
os.write(1, b"[up %d %d %d]" % (os.isatty(0), os.isatty(1), os.getpid()))
while True:
    line = sys.stdin.readline()
    if not line or line.strip() == "quit": break
    os.write(1, b"[read " + line.strip().encode() + b" ints %d]" % counts.get(2, 0))
os.write(1, b"[bye]")
sys.exit(6)
'''
open(sys.argv[2], "w").write(TUI)
expect("PROMPT> ")
type(f"{sys.argv[1]} run --listen off -- python3 -u {sys.argv[2]}\r")
"#;

fn at_a_terminal(name: &str, plot: &str) {
    let dir = scratch(name);
    let mut command = Command::new("python3");
    command.args(["-c", &format!("{PERSON}{plot}"), SIDECAR]).arg(dir.join("tui.py"));
    let out = command.output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    std::fs::remove_dir_all(dir).unwrap();
}

#[test]
fn the_cli_has_the_terminal_and_its_exit_code_is_the_jobs() {
    at_a_terminal(
        "tty",
        r#"
expect(r"\[up 1 1 \d+\]")
type("hello\r"); expect(r"\[read hello ints 0\]")
type("quit\r"); expect(r"\[bye\]")
type("echo code $?\r"); expect("code 6")
"#,
    );
}

#[test]
fn ctrl_c_reaches_the_cli_once() {
    at_a_terminal(
        "ctrl-c",
        r#"
expect(r"\[up 1 1 \d+\]")
type("\x03"); expect(r"\[heard 2 time 1 ")
type("on\r"); expect(r"\[read on ints 1\]")
type("\x03"); expect(r"\[heard 2 time 2 ")
type("on\r"); expect(r"\[read on ints 2\]")
type("quit\r"); expect(r"\[bye\]")
"#,
    );
}

#[test]
fn ctrl_c_between_the_seat_and_the_start_reaches_the_cli() {
    at_a_terminal(
        "early-ctrl-c",
        r#"
expect(r"\[up 1 1 \d+\]")
type("quit\r"); expect("PROMPT> ")
state = os.path.join(os.path.dirname(sys.argv[2]), "hub.state")
os.mkdir(state, 0o700)
# Whoever wants to know who serves waits here, with its seat and without a CLI.
os.mkfifo(os.path.join(state, "lock"))
where = f"--listen 127.0.0.1:0 --socket {os.path.dirname(sys.argv[2])}/hub.sock --max-sessions 1 --queue-timeout 5m"
def sits():
    try: places = json.load(open(os.path.join(state, "seats.json")))["places"].values()
    except (OSError, ValueError): return False
    return [place["number"] for place in places] == [None]
# On a busy machine it may have a CLI before it is typed, and be about something else: once in three is how it is meant.
for n in range(3):
    type(f"{sys.argv[1]} run {where} -- sh -c 'exec cat' sh --output-format stream-json\r")
    until = time.monotonic() + 30
    while not sits(): time.sleep(0.02 if time.monotonic() < until else sys.exit("no seat"))
    # The CLI has the terminal as its input, and would wait for it.
    type("\x03"); expect("PROMPT> ")
    type(f"echo {n} code $?\r")
    if expect(rf"{n} code (130|137)\r").group(1) == b"130": break
else: sys.exit("killed, thrice")
expect("PROMPT> ")
"#,
    );
}

#[test]
fn ctrl_z_stops_the_job_and_fg_continues_it() {
    at_a_terminal(
        "ctrl-z",
        r#"
expect(r"\[up 1 1 \d+\]")
for n in range(3):
    type("\x1a"); expect(r"Stopped"); expect("PROMPT> ")
    type("fg\r"); expect(r"python3 -u [^\n]*\n")
    type(f"again{n}\r"); expect(rf"\[read again{n} ints 0\]")
type("quit\r"); expect(r"\[bye\]")
"#,
    );
}

#[test]
fn a_cli_that_stops_itself_gives_the_prompt_back() {
    at_a_terminal(
        "self-stop",
        r#"
cli = int(expect(r"\[up 1 1 (\d+)\]").group(1))
import signal
os.kill(cli, signal.SIGSTOP)
expect(r"Stopped"); expect("PROMPT> ")
type("fg\r"); expect(r"python3 -u [^\n]*\n")
type("again\r"); expect(r"\[read again ints 0\]")
type("quit\r"); expect(r"\[bye\]")
"#,
    );
}

#[test]
fn a_new_window_size_reaches_the_cli_once() {
    at_a_terminal(
        "winch",
        r#"
expect(r"\[up 1 1 \d+\]")
for n, (rows, cols) in enumerate([(30, 100), (40, 120)], 1):
    fcntl.ioctl(tty, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))
    expect(rf"\[heard 28 time {n} size {rows}x{cols}\]")
    type("on\r"); expect(r"\[read on ints 0\]")
type("quit\r"); expect(r"\[bye\]")
"#,
    );
}

#[test]
fn a_signal_from_a_process_to_us_reaches_the_cli() {
    at_a_terminal(
        "kill",
        r#"
cli = int(expect(r"\[up 1 1 (\d+)\]").group(1))
import signal
wrapper = int(open(f"/proc/{cli}/stat").read().rsplit(")", 1)[1].split()[1])
os.kill(wrapper, signal.SIGINT); expect(r"\[heard 2 time 1 ")
os.kill(wrapper, signal.SIGTERM); expect("Terminated|PROMPT> ")
type("echo code $?\r"); expect("code 143")
"#,
    );
}

#[test]
fn a_closed_terminal_ends_the_cli() {
    at_a_terminal(
        "hangup",
        r#"
cli = int(expect(r"\[up 1 1 (\d+)\]").group(1))
os.close(tty)
until = time.monotonic() + 30
while os.path.exists(f"/proc/{cli}") and ") Z" not in open(f"/proc/{cli}/stat").read():
    if time.monotonic() > until: sys.exit("still there")
    time.sleep(0.01)
"#,
    );
}

#[test]
fn a_one_shot_that_is_read_has_the_terminal_as_its_stdin() {
    // Parse mode: stdout is a pipe, stdin the terminal. In a group of its own it would be stopped for reading.
    at_a_terminal(
        "one-shot",
        r#"
expect(r"\[up 1 1 \d+\]")
type("quit\r"); expect(r"\[bye\]"); expect("PROMPT> ")
type(f"{sys.argv[1]} run --listen off --stop-terminate 60s --platform-grace 90s -- python3 -u {sys.argv[2]} --output-format stream-json\r")
expect(r"\[up 1 0 \d+\]")
type("hello\r"); expect(r"\[read hello ints 0\]")
type("\x03"); expect(r"\[heard 2 time 1 ")
type("on\r"); expect(r"\[read on ints 1\]")
type("\x1a"); expect(r"Stopped"); expect("PROMPT> ")
type("fg\r"); expect(r"stream-json\r?\n")
type("quit\r"); expect(r"\[bye\]")
type("echo code $?\r"); expect("code 6")
"#,
    );
}
