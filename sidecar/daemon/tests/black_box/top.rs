//! `top`: one table for scripts, and a view for people that leaves the terminal as it found it.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::support::*;

/// A CLI in the middle of a tool call, until its input ends.
const CLI: &str = r#"
echo '{"type":"system","subtype":"init","session_id":"'$1'","model":"claude-opus-5-5"}'
echo '{"type":"assistant","session_id":"'$1'","message":{"id":"m'$1'","model":"claude-opus-5-5","usage":{"input_tokens":5,"output_tokens":7},"content":[{"type":"tool_use","id":"t1","name":"Read","input":{}}]}}'
echo '{"type":"user","session_id":"'$1'","message":{"role":"user","content":[{"type":"tool_result","tool_use_id":"t1"}]}}'
echo '{"type":"assistant","session_id":"'$1'","message":{"id":"n'$1'","model":"claude-opus-5-5","usage":{"input_tokens":5,"output_tokens":7},"content":[{"type":"tool_use","id":"t2","name":"Bash","input":{}}]}}'
read -r _
"#;

struct Watched {
    socket: PathBuf,
    running: Vec<Running>,
}

impl Watched {
    fn new(name: &str) -> Watched {
        Watched { socket: scratch(name).join("hub.sock"), running: Vec::new() }
    }

    fn start(&mut self, id: &str) {
        let mut command = Command::new(SIDECAR);
        command.args(["run", "--listen", "127.0.0.1:0", "--tenant", "acme", "--max-turns", "40", "--socket"]).arg(&self.socket);
        command.args(["--", "sh", "-c", CLI, "sh", id]).args(ONE_SHOT);
        let mut running = Running::start(command);
        (0..4).for_each(|_| drop(running.line()));
        self.running.push(running);
    }

    fn once(&self) -> Output {
        Command::new(SIDECAR).args(["top", "--once", "--listen", "off", "--socket"]).arg(&self.socket).output().unwrap()
    }
}

#[test]
fn once_is_one_plain_table_from_the_socket_and_from_an_address() {
    let mut watched = Watched::new("top-once");
    watched.start("aaaaaaaa-1");
    watched.start("bbbbbbbb-2");
    let table = wait_for("both of them", || {
        let out = watched.once();
        let table = String::from_utf8(out.stdout).unwrap();
        (out.status.success() && table.matches("Bash").count() == 2).then_some(table)
    });
    let lines: Vec<&str> = table.lines().collect();
    assert_eq!(lines.len(), 3, "{table}");
    assert!(
        lines[0].starts_with("SESSION ") && lines[1].starts_with("aaaaaaaa ") && lines[2].starts_with("bbbbbbbb "),
        "{table}"
    );
    assert!(lines[1].contains("acme") && lines[1].contains("tool") && lines[1].contains("opus-5-5"), "{table}");
    assert!(lines[1].contains("turns turn") && !table.contains('\x1b'), "{table}");
    let address = std::fs::read_to_string(watched.socket.with_extension("state").join("address")).unwrap();
    let by_url = Command::new(SIDECAR).args(["top", "--url", &format!("http://{address}/")]).output().unwrap();
    assert!(String::from_utf8(by_url.stdout).unwrap().contains("bbbbbbbb"), "not at a terminal it is the same");
}

#[test]
fn where_nobody_serves_that_is_said_and_what_to_do() {
    let watched = Watched::new("top-nobody");
    let out = watched.once();
    let said = String::from_utf8(out.stderr).unwrap();
    assert_eq!(out.status.code(), Some(1), "{said}");
    assert!(said.contains("no sidecar answers at") && said.contains("hub.sock") && said.contains("--url"), "{said}");
    let out = Command::new(SIDECAR).args(["top", "--url", "https://there"]).output().unwrap();
    assert!(String::from_utf8(out.stderr).unwrap().contains("is no address of a sidecar"));
}

/// Plays a person at a terminal of a size that it changes. `$1` is the wrapper, `$2` the socket.
const PERSON: &str = r#"
import fcntl, os, pty, re, select, signal, struct, sys, termios, time
sidecar, socket = sys.argv[1:3]
pid, tty = pty.fork()
if pid == 0:
    os.environ.update(TERM="xterm-256color", PS1="PROMPT> ")
    os.execvp("bash", ["bash", "--norc", "--noprofile", "--noediting", "-i"])
seen = ""
def resize(rows, cols): fcntl.ioctl(tty, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))
def expect(what):
    global seen
    until = time.monotonic() + 30
    while not (found := re.search(what, seen, re.S)):
        if not select.select([tty], [], [], max(0, until - time.monotonic()))[0]: sys.exit(f"waited in vain for {what!r}, saw {seen[-2000:]!r}")
        seen += os.read(tty, 65536).decode(errors="replace")
    seen = seen[found.end():]
    return found
def type(text): os.write(tty, text.encode())
def settings():
    type("stty -g\r"); return expect(r"([0-9a-f]+(?::[0-9a-f]+){20,})\r").group(1)
def top(variables=""):
    type(f"{variables} {sidecar} top --listen off --socket {socket}\r"); expect(r"\x1b\[\?1049h")
resize(30, 160)
expect("PROMPT> ")
before = settings()
expect("PROMPT> ")
"#;

fn person(socket: &Path, plot: &str) {
    let out = Command::new("python3").args(["-c", &format!("{PERSON}{plot}"), SIDECAR]).arg(socket).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
}

#[test]
fn a_person_selects_opens_sorts_and_has_the_terminal_back() {
    let mut watched = Watched::new("top-person");
    watched.start("aaaaaaaa-1");
    watched.start("bbbbbbbb-2");
    wait_for("both", || String::from_utf8(watched.once().stdout).unwrap().contains("bbbbbbbb").then_some(()));
    person(
        &watched.socket,
        r#"
top()
expect(r"2 live.*SESSION.*UP↓"); expect(r"\x1b\[7maaaaaaaa.*bbbbbbbb"); expect(r"q quit")
type("\x1b[B"); expect(r"\x1b\[7mbbbbbbbb")
type("\r"); expect(r"bbbbbbbb-2.*Read: ok.*turn 1 began"); expect("Esc back")
type("\x1b"); expect(r"\x1b\[7mbbbbbbbb")
type("s"); expect("SESSION↑")
resize(12, 40); expect(r"SESSION↑"); expect(r"\x1b\[7mbbbbbbbb {1,30}")
type("q"); expect(r"\x1b\[\?25h\x1b\[\?1049l"); expect("PROMPT> ")
assert settings() == before
expect("PROMPT> ")
# Without colours; and ended by somebody else.
top("NO_COLOR=1")
expect("2 live"); shown = expect("(.*)q quit").group(1)
assert not re.search(r"\x1b\[(1;)?3\dm", shown), shown
type("\x03"); expect(r"\x1b\[\?1049l"); expect("PROMPT> ")
type(f"{sidecar} top --listen off --socket {socket} & echo pid $!; fg\r")
job = int(expect(r"\npid (\d+)").group(1))
expect(r"\x1b\[\?1049h"); expect("q quit")
os.kill(job, signal.SIGTERM)
expect(r"\x1b\[\?25h\x1b\[\?1049l"); expect("PROMPT> ")
type("echo code $?\r"); expect("code 143")
assert settings() == before
"#,
    );
    watched.running.remove(0).close_stdin();
    wait_for("one to be left", || (!String::from_utf8(watched.once().stdout).unwrap().contains("aaaaaaaa")).then_some(()));
}
