//! What the CLI gets from whoever started us: the same as without us.

use std::process::Command;

use crate::support::*;

/// What a program says, without the wrapper and with it, after `setup` in a shell.
fn both(setup: &str, program: &[&str]) -> (Vec<u8>, Vec<u8>) {
    let run = |wrapper: &[&str]| {
        let mut command = Command::new("env");
        // Names and values that a shell would not make.
        command.args(["ODD.NAME=a\nb", "PATH_=", "A=1"]).args(["bash", "-c", &format!("{setup}; exec \"$@\""), "sh"]);
        command.args(wrapper).args(program).output().unwrap().stdout
    };
    (run(&[]), run(&[SIDECAR, "run", "--listen", "off", "--"]))
}

const ENVIRONMENT: &str = "import sys; sys.stdout.buffer.write(open('/proc/self/environ', 'rb').read())";

#[test]
fn the_environment_is_the_same() {
    for args in [&[][..], &ONE_SHOT[..], &STREAM_JSON[..]] {
        let (without, with) = both(":", &[&["python3", "-c", ENVIRONMENT][..], args].concat());
        assert!(memchr::memmem::find(&without, b"ODD.NAME=a\nb\0").is_some());
        assert_eq!(with, without);
    }
}

/// Without 32 and 33, which the C library keeps to itself.
const SIGNALS: &str = "
for l in open('/proc/self/status'):
    if l[:3] == 'Sig' and l[3] in 'BIC': print(l[:6], hex(int(l[7:], 16) & ~(3 << 31)))
";

#[test]
fn signals_are_as_they_were() {
    for setup in [":", "trap '' HUP", "trap '' INT QUIT TERM CHLD USR1 RTMIN+3"] {
        for args in [&[][..], &ONE_SHOT[..], &STREAM_JSON[..]] {
            let (without, with) = both(setup, &[&["python3", "-c", SIGNALS][..], args].concat());
            assert!(!without.is_empty());
            assert_eq!(String::from_utf8(with), String::from_utf8(without), "{setup}");
        }
    }
}

#[test]
fn nohup_holds_for_the_cli() {
    let mut command = Command::new("nohup");
    command.args([SIDECAR, "run", "--listen", "off", "--", "sh", "-c", "echo $$; read line; echo $line", "sh"]).args(STREAM_JSON);
    let mut running = Running::start(command);
    let cli = running.number();
    rustix::process::kill_process(rustix::process::Pid::from_raw(cli).unwrap(), rustix::process::Signal::HUP).unwrap();
    running.write(b"alive\n").unwrap();
    assert_eq!(running.line(), "alive");
    running.close_stdin();
    assert_eq!(running.code(), Some(0));
}
