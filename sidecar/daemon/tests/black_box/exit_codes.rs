//! The wrapper ends as the CLI ended.

use std::process::Stdio;

use crate::support::*;

#[test]
fn every_exit_code_is_passed_on() {
    for args in [&STREAM_JSON[..], &ONE_SHOT[..], &[]] {
        for code in 0..=255 {
            let mut command = sidecar();
            command.args(["sh", "-c", &format!("exit {code}"), "sh"]).args(args).stdin(Stdio::null());
            assert_eq!(Running::start_as_is(command).code(), Some(code));
        }
    }
}

#[test]
fn a_death_by_signal_is_128_and_its_number() {
    for args in [&STREAM_JSON[..], &[]] {
        for signal in [1, 2, 3, 6, 8, 9, 10, 11, 13, 14, 15, 31, 34, 64] {
            let program = "import os, sys, resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n\
                           import signal; n = int(sys.argv[1])\n\
                           if n not in (9, ): signal.signal(n, signal.SIG_DFL)\n\
                           os.kill(os.getpid(), n)";
            let n = signal.to_string();
            let mut command = python(program, &[&[n.as_str()], args].concat());
            command.stdin(Stdio::null());
            assert_eq!(Running::start_as_is(command).code(), Some(128 + signal));
        }
    }
}

fn refused(args: &[&str]) -> (i32, String) {
    let out = std::process::Command::new(SIDECAR).args(args).stdin(Stdio::null()).output().unwrap();
    assert!(out.stdout.is_empty(), "nothing of ours goes to stdout");
    (out.status.code().unwrap(), String::from_utf8(out.stderr).unwrap())
}

#[test]
fn a_program_that_is_not_there_is_127() {
    for program in ["no-such-program-anywhere", "/no/such/program", "/etc/passwd/program"] {
        let (code, said) = refused(&["run", "--listen", "off", "--", program, "--output-format", "stream-json"]);
        assert_eq!(code, 127);
        assert!(said.contains(program) && said.contains("not found"), "{said}");
    }
}

#[test]
fn a_program_that_cannot_be_executed_is_126() {
    for program in ["/etc/passwd", "/etc"] {
        let (code, said) = refused(&["run", "--listen", "off", "--", program]);
        assert_eq!(code, 126);
        assert!(said.contains(program) && said.contains("cannot be executed"), "{said}");
    }
}

#[test]
fn a_failure_of_our_own_is_125() {
    assert_eq!(refused(&["run"]).0, 125);
    // Not one more process for this user: only a limit that root does not have either can show it.
    let script = "ulimit -n 6; exec \"$@\"";
    let mut command = std::process::Command::new("sh");
    command.args(["-c", script, "sh", SIDECAR, "run", "--listen", "off", "--", "true", "--output-format", "stream-json"]);
    let out = command.stdin(Stdio::null()).output().unwrap();
    assert_eq!(out.status.code(), Some(125), "{}", String::from_utf8_lossy(&out.stderr));
}
