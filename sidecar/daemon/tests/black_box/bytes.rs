//! What the app and the CLI say to each other arrives as it was said.

use std::io::Write;
use std::process::Stdio;

use crate::support::*;

/// Says back what it hears, but for our questions, which stand on lines of their own.
const ECHO: &str = r#"
import sys, re
print('{"type":"system","subtype":"init","session_id":"s","model":"m"}', flush=True)
said = sys.stdin.buffer.read()
said = re.sub(rb'(?m)^\{[^\n]*"agent-sidecar:[0-9a-f]+:\d+"[^\n]*\n', b'', said)
sys.stdout.buffer.write(said)
"#;

fn echoed(said: Vec<u8>, cut: usize) {
    let mut running = Running::start(python(ECHO, &STREAM_JSON));
    let mut stdin = running.child.stdin.take().unwrap();
    let expected = said.clone();
    let writer = std::thread::spawn(move || {
        for (n, chunk) in said.chunks(cut).enumerate() {
            stdin.write_all(chunk).unwrap();
            if n % 16 == 0 {
                std::thread::yield_now();
            }
        }
    });
    assert_eq!(running.line(), INIT);
    let heard = running.rest();
    writer.join().unwrap();
    assert!(heard == expected, "{} bytes were said, {} heard, or not the same", expected.len(), heard.len());
    assert_eq!(running.code(), Some(0));
}

#[test]
fn random_bytes_go_both_ways_in_small_pieces() {
    echoed(noise(300_000, 1), 17);
}

#[test]
fn random_bytes_go_both_ways_in_large_pieces() {
    echoed(noise(20_000_000, 2), 300_001);
}

#[test]
fn lines_go_both_ways_with_our_own_between_them() {
    let lines: Vec<u8> = (0..20_000).flat_map(|n| format!("{{\"n\":{n}}}\n").into_bytes()).collect();
    echoed(lines.clone(), 7);
    echoed(lines, 5000);
}

#[test]
fn a_line_of_a_hundred_megabytes_goes_through() {
    let program = r"
import sys
block = bytes(range(256)) * 256
block = block.replace(b'\n', b'\0')
for _ in range(1600): sys.stdout.buffer.write(block)
sys.stdout.buffer.write(b'\n')
";
    for args in [&STREAM_JSON[..], &ONE_SHOT[..]] {
        let mut running = Running::start(python(program, args));
        running.close_stdin();
        let heard = running.rest();
        assert_eq!(heard.len(), 1600 * 65536 + 1);
        let mut block: Vec<u8> = (0..=255).cycle().take(65536).collect();
        block.iter_mut().filter(|b| **b == b'\n').for_each(|b| *b = 0);
        assert!(heard.chunks_exact(65536).all(|chunk| chunk == block));
        assert_eq!(running.code(), Some(0));
    }
}

#[test]
fn a_hundred_megabytes_go_in_as_one_line() {
    let program = "
import sys
n = 0
while chunk := sys.stdin.buffer.read(1 << 20):
    n += len(chunk)
print(n)
";
    let mut running = Running::start(python(program, &STREAM_JSON));
    running.write(&vec![b'x'; 100_000_000]).unwrap();
    running.close_stdin();
    assert_eq!(running.rest(), b"100000000\n");
}

#[test]
fn an_answer_to_us_is_kept_from_the_app_and_nothing_else_is() {
    // Answers each question of ours between two lines of its own, one of them a look-alike.
    let program = r#"
import sys, json
for line in sys.stdin:
    said = json.loads(line)
    if said.get("request_id", "").startswith("agent-sidecar:"):
        sys.stdout.write('{"n":"before"}\n' + json.dumps({"type": "control_response", "response":
            {"subtype": "success", "request_id": said["request_id"], "response": {}}}) + '\n{"n":"after"}\n')
        sys.stdout.flush()
        break
    # Until it has said something that only a CLI says, nothing of ours comes.
    print('{"type":"system","subtype":"init"}', flush=True)
print('{"type":"control_response","response":{"request_id":"agent-sidecar:0:1"}}')
"#;
    let mut running = Running::start(python(program, &STREAM_JSON));
    running.write(b"{\"type\":\"user\",\"message\":{\"role\":\"user\",\"content\":\"hi\"}}\n").unwrap();
    let rest = String::from_utf8(running.rest()).unwrap();
    let look_alike = r#"{"type":"control_response","response":{"request_id":"agent-sidecar:0:1"}}"#;
    let init = r#"{"type":"system","subtype":"init"}"#;
    assert_eq!(rest, format!("{init}\n{{\"n\":\"before\"}}\n{{\"n\":\"after\"}}\n{look_alike}\n"));
    running.close_stdin();
}

/// The CLI says this much and is gone before the app reads any of it.
fn read_late(n: usize, mut command: std::process::Command) {
    let mut child = Running::start({
        command.stderr(Stdio::inherit());
        command
    });
    child.close_stdin();
    // Not the `mount` that ran before it.
    let speaks = |pid: &i32| std::fs::read_to_string(format!("/proc/{pid}/cmdline")).is_ok_and(|c| c.contains("array.array"));
    let pid = wait_for("the CLI's pid", || children(child.pid()).into_iter().map(|(pid, _)| pid).find(speaks));
    gone(pid);
    let heard = child.rest();
    assert_eq!(heard.len(), n);
    assert!(heard == noise_like_python(n));
    assert_eq!(child.code(), Some(3));
}

fn noise_like_python(n: usize) -> Vec<u8> {
    (0..n / 4).flat_map(|i| u32::try_from(i).unwrap().to_le_bytes()).collect()
}

const SPEAKER: &str = r"
import sys, array
n = int(sys.argv[1]) // 4
for at in range(0, n, 1 << 18):
    sys.stdout.buffer.write(array.array('I', range(at, min(n, at + (1 << 18)))).tobytes())
sys.stdout.flush()
sys.exit(3)
";

#[test]
fn what_the_cli_said_before_its_end_arrives_however_late_it_is_read() {
    // In the pipe alone, in memory, in the file.
    for n in [4_000, 600_000, 40_000_000] {
        let n_arg = n.to_string();
        read_late(n, python(SPEAKER, &[&[n_arg.as_str()], &STREAM_JSON[..]].concat()));
        read_late(n, python(SPEAKER, &[&[n_arg.as_str()], &ONE_SHOT[..]].concat()));
    }
}

#[test]
fn without_a_place_for_the_file_memory_is_used() {
    if !root() {
        eprintln!("not tried: needs to mount");
        return;
    }
    // A small and full /tmp, a read-only /dev/shm, no TMPDIR.
    // The wrapper may lie in /tmp itself: it is opened before.
    let script =
        "exec 9<$0 && mount -t tmpfs -o size=2m none /tmp && mount -t tmpfs -o ro none /dev/shm && exec /proc/self/fd/9 \"$@\"";
    let mut command = std::process::Command::new("unshare");
    command.args(["-m", "sh", "-c", script, SIDECAR, "run", "--listen", "off", "--", "python3", "-c", SPEAKER, "20000000"]);
    command.args(STREAM_JSON).env("TMPDIR", "/nonexistent").current_dir("/");
    read_late(20_000_000, command);
}

#[test]
fn without_any_room_the_cli_is_held_back_and_nothing_is_lost() {
    if !root() {
        eprintln!("not tried: needs to mount");
        return;
    }
    // The wrapper may lie in /tmp itself: it is opened before.
    let script =
        "exec 9<$0 && mount -t tmpfs -o ro none /tmp && mount -t tmpfs -o ro none /dev/shm && exec /proc/self/fd/9 \"$@\"";
    let n = 200_000_000;
    let mut command = std::process::Command::new("unshare");
    command
        .args(["-m", "sh", "-c", script, SIDECAR, "run", "--listen", "off", "--", "python3", "-c", SPEAKER])
        .arg(n.to_string());
    command.args(STREAM_JSON).env("TMPDIR", "/nonexistent").current_dir("/");
    let mut child = Running::start(command);
    child.close_stdin();
    // As full as it gets: 64 MiB, and then the CLI waits.
    let wrapper = child.pid();
    wait_for("the memory to fill", || (rss_kib(wrapper) > 60_000).then_some(()));
    assert!(!children(wrapper).is_empty(), "the CLI still has something to say");
    let heard = child.rest();
    assert!(heard == noise_like_python(n));
    assert_eq!(child.code(), Some(3));
}
