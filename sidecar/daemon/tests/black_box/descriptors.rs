//! Ends of streams: whoever closes one, and whatever kind it is.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::Stdio;

use rustix::fs::OFlags;
use rustix::process::Signal;

use crate::support::*;

#[test]
fn the_apps_end_of_input_reaches_the_cli() {
    let mut running = Running::start(sh("cat >/dev/null; echo over", &STREAM_JSON));
    running.write(b"{}\n").unwrap();
    running.close_stdin();
    assert_eq!(running.line(), "over");
    assert_eq!(running.code(), Some(0));
}

#[test]
fn half_a_line_before_the_end_of_input_reaches_the_cli() {
    let mut running = Running::start(sh("cat", &STREAM_JSON));
    running.write(b"half").unwrap();
    running.close_stdin();
    assert_eq!(running.rest(), b"half");
}

#[test]
fn a_cli_that_closes_its_stdin_is_noticed_by_the_app() {
    for args in [&STREAM_JSON[..], &ONE_SHOT[..]] {
        let mut running = Running::start(sh("exec <&-; echo closed; exec sleep 100", args));
        assert_eq!(running.line(), "closed");
        let error = wait_for("the broken pipe", || running.write(&[b'x'; 65536]).err());
        assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
        running.signal(Signal::KILL);
    }
}

#[test]
fn a_cli_that_closes_its_stdout_is_noticed_by_the_app() {
    let mut running = Running::start(sh("echo last; exec >&-; exec cat >/dev/null", &STREAM_JSON));
    assert_eq!(running.rest(), b"last\n");
    running.close_stdin();
    assert_eq!(running.code(), Some(0));
}

#[test]
fn a_cli_whose_reader_is_gone_is_ended() {
    // Does not mind a closed pipe, like the real one.
    let program = "
import os, sys, signal, time
signal.signal(signal.SIGPIPE, signal.SIG_IGN)
print(os.getpid(), flush=True)
while True:
    try: os.write(1, b'x' * 1000 + b'\\n')
    except BrokenPipeError: pass
    time.sleep(0.001)
";
    for args in [&STREAM_JSON[..], &ONE_SHOT[..]] {
        let mut running = Running::start(python(program, args));
        let pid = running.number();
        running.stop_reading();
        gone(pid);
        running.code();
    }
}

#[test]
fn a_silent_cli_whose_reader_is_gone_is_ended() {
    let mut running = Running::start(sh("echo $$; exec sleep 1000", &STREAM_JSON));
    let pid = running.number();
    running.stop_reading();
    gone(pid);
    assert_eq!(running.code(), Some(143));
}

#[test]
fn sockets_will_do() {
    let (mut app_in, cli_in) = UnixStream::pair().unwrap();
    let (mut app_out, cli_out) = UnixStream::pair().unwrap();
    let (shared_in, shared_out) = (cli_in.try_clone().unwrap(), cli_out.try_clone().unwrap());
    let mut command = sh("cat", &STREAM_JSON);
    command.stdin(OwnedFd::from(cli_in)).stdout(OwnedFd::from(cli_out));
    let mut child = command.spawn().unwrap();
    drop(command);
    let said: Vec<u8> = noise(8_000_000, 3).iter().map(|b| if *b == b'\n' { 0 } else { *b }).collect();
    let expected = said.clone();
    let writer = std::thread::spawn(move || {
        app_in.write_all(&said).unwrap();
        app_in.shutdown(std::net::Shutdown::Write).unwrap();
        app_in
    });
    let mut heard = vec![0; expected.len()];
    app_out.read_exact(&mut heard).unwrap();
    assert!(heard == expected);
    for shared in [shared_in, shared_out] {
        assert!(!rustix::fs::fcntl_getfl(&shared).unwrap().contains(OFlags::NONBLOCK));
    }
    drop(writer.join().unwrap());
    #[expect(clippy::disallowed_methods, reason = "here is no reaper")]
    let status = child.wait().unwrap();
    assert_eq!(status.code(), Some(0));
    // Nobody else holds the app's end by now.
    assert_eq!(app_out.read(&mut [0; 10]).unwrap(), 0);
}

#[test]
fn pipes_that_others_share_stay_as_they_are() {
    let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let (stdin, app) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let mut command = sh("echo up; cat", &STREAM_JSON);
    command.stdin(stdin.try_clone().unwrap()).stdout(writer.try_clone().unwrap());
    let mut running = Running::start_as_is(command);
    let mut heard = [0; 3];
    File::from(reader.try_clone().unwrap()).read_exact(&mut heard).unwrap();
    for fd in [&writer, &stdin, &reader, &app] {
        assert!(!rustix::fs::fcntl_getfl(fd).unwrap().contains(OFlags::NONBLOCK));
    }
    drop((app, stdin));
    assert_eq!(running.code(), Some(0));
}

#[test]
fn files_will_do() {
    let dir = scratch("files");
    let (input, output) = (dir.join("in"), dir.join("out"));
    let said: Vec<u8> = noise(3_000_000, 4);
    std::fs::write(&input, &said).unwrap();
    std::fs::write(&output, b"before\n").unwrap();
    for args in [&STREAM_JSON[..], &ONE_SHOT[..], &[]] {
        let mut command = python(crate::descriptors::STRIP, args);
        command.stdin(File::open(&input).unwrap());
        command.stdout(File::options().append(true).open(&output).unwrap());
        let mut running = Running::start_as_is(command);
        assert_eq!(running.code(), Some(0));
    }
    let heard = std::fs::read(&output).unwrap();
    assert!(heard == [&b"before\n"[..], &said, &said, &said].concat());
    std::fs::remove_dir_all(dir).unwrap();
}

/// Says back what it hears, without our questions.
pub(crate) const STRIP: &str = r#"
import sys, re
said = sys.stdin.buffer.read()
sys.stdout.buffer.write(re.sub(rb'(?m)^\{[^\n]*"agent-sidecar:[0-9a-f]+:\d+"[^\n]*\n', b'', said))
"#;

#[test]
fn nothing_at_all_will_do() {
    for args in [&STREAM_JSON[..], &ONE_SHOT[..], &[]] {
        for redirect in ["</dev/null >/dev/null", "<&- >&-", "<&- >&- 2>&-", "</dev/full >/dev/full"] {
            let script = format!("exec \"$@\" {redirect}");
            let mut command = std::process::Command::new("sh");
            command.args(["-c", &script, "sh", SIDECAR, "run", "--listen", "off", "--", "sh", "-c", "exit 5", "sh"]).args(args);
            let mut running = Running::start_as_is(command);
            assert_eq!(running.code(), Some(5), "{redirect} {args:?}");
        }
    }
}

#[test]
fn a_full_disk_as_the_reader_is_a_reader_that_is_gone() {
    let mut command = sh("echo one; exec sleep 1000", &STREAM_JSON);
    command.stdin(Stdio::null()).stdout(File::options().write(true).open("/dev/full").unwrap());
    assert_eq!(Running::start_as_is(command).code(), Some(143));
}

#[test]
fn what_could_not_be_written_is_no_success() {
    let full = |program: &str, args: &[&str]| {
        let mut command = sh(program, args);
        command.stdin(Stdio::null()).stdout(File::options().write(true).open("/dev/full").unwrap());
        let out = command.stderr(Stdio::piped()).output().unwrap();
        (out.status.code(), String::from_utf8(out.stderr).unwrap())
    };
    for args in [&STREAM_JSON[..], &ONE_SHOT[..]] {
        // It may be told to go before it has gone by itself.
        let (code, said) = full("echo one", args);
        assert!(matches!(code, Some(1 | 143)), "{code:?} {said}");
        assert!(said.contains("stdout cannot be written") && said.contains("No space left"), "{said}");
        let (code, _) = full("echo one; exit 5", args);
        assert!(matches!(code, Some(5 | 143)), "{code:?}");
        assert_eq!(full("true", args), (Some(0), String::new()));
    }
}

#[test]
fn another_descriptor_passes_and_none_of_ours_does() {
    let dir = scratch("fd3");
    let path = dir.join("three");
    let run = |wrapper: &[&str]| {
        let script = format!("exec \"$@\" 3>{}", path.display());
        let mut command = std::process::Command::new("sh");
        command.args(["-c", &script, "sh"]).args(wrapper).args(["sh", "-c", "echo three >&3; ls /proc/self/fd", "sh"]);
        let out = command.args(ONE_SHOT).output().unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "three\n");
        String::from_utf8(out.stdout).unwrap()
    };
    assert_eq!(run(&[SIDECAR, "run", "--listen", "off", "--"]), run(&[]));
    std::fs::remove_dir_all(dir).unwrap();
}
