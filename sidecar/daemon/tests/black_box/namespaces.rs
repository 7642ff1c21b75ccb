//! As PID 1, in a pid namespace of its own.

use std::process::Command;

use crate::support::*;

fn as_init(args: &[&str]) -> Option<Command> {
    let mut command = alone()?;
    command.args([SIDECAR, "run", "--listen", "off", "--"]).args(args);
    Some(command)
}

fn alone() -> Option<Command> {
    let mut command = Command::new("unshare");
    if !root() {
        // Somebody who may make user namespaces may do the same.
        command.arg("-r");
    }
    command.args(["-p", "-f", "--mount-proc", "--kill-child"]);
    let works = Command::new("unshare").args(command.get_args()).arg("true").status().is_ok_and(|s| s.success());
    if !works {
        eprintln!("not tried: no namespaces here");
        return None;
    }
    Some(command)
}

#[test]
fn the_exit_code_is_passed_on_and_the_cli_is_not_pid_1() {
    for args in [&STREAM_JSON[..], &[]] {
        let Some(command) = as_init(&[&["sh", "-c", "test $$ = 1 || echo $PPID; exit 42", "sh"], args].concat()) else { return };
        let mut running = Running::start(command);
        running.close_stdin();
        assert_eq!(running.line(), "1");
        assert_eq!(running.code(), Some(42));
    }
}

#[test]
fn orphans_are_reaped_and_ended() {
    let program = "
import os, sys, time
for _ in range(5):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0: os._exit(0)
        if os.fork() == 0: time.sleep(1000)
        os._exit(0)
    os.wait()
zombies = lambda: [p for p in os.listdir('/proc') if p.isdigit() and ') Z' in open(f'/proc/{p}/stat').read()]
while True:
    try:
        if not zombies(): break
    except OSError: pass
print('clean', flush=True)
sys.exit(9)
";
    let Some(command) = as_init(&[&["python3", "-c", program], &STREAM_JSON[..]].concat()) else { return };
    let mut running = Running::start(command);
    assert_eq!(running.line(), "clean");
    assert_eq!(running.code(), Some(9));
}

#[test]
fn signals_reach_the_cli() {
    let program = "
import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, {1, 2, 3, 15})
print('ready', flush=True)
os._exit(signal.sigwait({1, 2, 3, 15}))
";
    let Some(command) = as_init(&["python3", "-c", program]) else { return };
    let mut running = Running::start(command);
    assert_eq!(running.line(), "ready");
    // unshare's child is PID 1 inside.
    let init = children(running.pid())[0].0;
    let pid = rustix::process::Pid::from_raw(init).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert_eq!(running.code(), Some(15));
}

#[test]
fn a_hub_without_an_agent_reaps_too() {
    let Some(mut command) = alone() else { return };
    let dir = scratch("hub-as-init");
    // The orphan is there before the hub is.
    command.args(["sh", "-c", "(sleep 1000 &); echo ready; exec \"$@\"", "sh", SIDECAR, "hub", "--listen", "off", "--socket"]);
    command.arg(dir.join("hub.sock"));
    let mut running = Running::start(command);
    assert_eq!(running.line(), "ready");
    let init = children(running.pid())[0].0;
    wait_for("the hub", || dir.join("hub.sock").exists().then_some(()));
    let orphan = rustix::process::Pid::from_raw(children(init)[0].0).unwrap();
    rustix::process::kill_process(orphan, rustix::process::Signal::KILL).unwrap();
    wait_for("the orphan reaped", || children(init).is_empty().then_some(()));
    rustix::process::kill_process(rustix::process::Pid::from_raw(init).unwrap(), rustix::process::Signal::TERM).unwrap();
    assert_eq!(running.code(), Some(0));
}

#[test]
fn a_shim_whose_session_is_led_from_outside_starts_its_cli() {
    let dir = Scratch::new("namespaces", "outside");
    copy(std::path::Path::new(SIDECAR), &dir.join("claude"));
    script(&dir.join("claude.sidecar-real"), "echo up");
    let Some(mut command) = as_init(&["true"]) else { return };
    let words: Vec<_> = command.get_args().take_while(|word| *word != SIDECAR).map(std::ffi::OsStr::to_owned).collect();
    command = Command::new("unshare");
    // Neither PID 1 nor the leader of anything.
    command.args(words).args(["sh", "-c", "\"$0\" -p hi; echo $?"]).arg(dir.join("claude")).env("AGENT_SIDECAR_LISTEN", "off");
    let mut running = Running::start(command);
    running.close_stdin();
    assert_eq!(running.line(), "up");
    assert_eq!(running.line(), "0");
    assert_eq!(running.code(), Some(0));
}
