//! What the CLI started does not outlive it.

use rustix::process::{Pid, Signal};

use crate::support::*;

/// Starts a daemon as tools do: twice forked, in a session of its own; says its pid.
const DAEMON: &str = r#"
import os, sys, signal, time
def daemon(stubborn, keep_stdout):
    read, write = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            if stubborn: signal.signal(signal.SIGTERM, signal.SIG_IGN)
            if not keep_stdout: os.dup2(os.open("/dev/null", os.O_RDWR), 1)
            os.write(write, b"%d\n" % os.getpid())
            while True: time.sleep(100)
        os._exit(0)
    return int(os.read(read, 20))
"#;

fn program(rest: &str) -> String {
    format!("{DAEMON}{rest}")
}

#[test]
fn daemons_are_gone_after_the_clis_end() {
    let text = program("print(daemon(False, False)); print(daemon(True, False)); sys.exit(4)");
    for args in [&STREAM_JSON[..], &ONE_SHOT[..]] {
        let mut running = Running::start(python(&text, args));
        let (plain, stubborn) = (running.number(), running.number());
        assert_eq!(running.code(), Some(4));
        assert!(!alive(plain) && !alive(stubborn));
    }
}

#[test]
fn a_daemon_that_holds_stdout_does_not_hold_us() {
    let text = program("print(daemon(True, True)); print('last words'); sys.exit(4)");
    let mut running = Running::start(python(&text, &STREAM_JSON));
    let daemon = running.number();
    assert_eq!(running.rest(), b"last words\n");
    assert_eq!(running.code(), Some(4));
    assert!(!alive(daemon));
}

#[test]
fn daemons_are_gone_after_a_stop() {
    let text = program("print(daemon(True, True)); print(os.getpid()); time.sleep(1000)");
    let mut running = Running::start(python(&text, &STREAM_JSON));
    let (daemon, cli) = (running.number(), running.number());
    running.signal(Signal::TERM);
    assert_eq!(running.code(), Some(143));
    assert!(!alive(daemon) && !alive(cli));
}

#[test]
fn daemons_are_gone_after_the_cli_was_killed() {
    let text = program("print(daemon(False, True)); print(os.getpid()); time.sleep(1000)");
    let mut running = Running::start(python(&text, &STREAM_JSON));
    let (daemon, cli) = (running.number(), running.number());
    rustix::process::kill_process(Pid::from_raw(cli).unwrap(), Signal::KILL).unwrap();
    assert_eq!(running.code(), Some(137));
    assert!(!alive(daemon));
}

#[test]
fn a_stopped_daemon_is_gone_too() {
    let text = program("p = daemon(False, False); os.kill(p, signal.SIGSTOP); print(p)");
    let mut running = Running::start(python(&text, &STREAM_JSON));
    let daemon = running.number();
    assert_eq!(running.code(), Some(0));
    assert!(!alive(daemon));
}

#[test]
fn zombies_are_reaped_while_the_cli_runs() {
    // Each parent is gone before its child: they come to us.
    let text = "
import os, sys
for _ in range(30):
    if os.fork() == 0:
        if os.fork() == 0: os._exit(0)
        os._exit(0)
    os.wait()
print('done', flush=True)
sys.stdin.read()
";
    let mut running = Running::start(python(text, &STREAM_JSON));
    assert_eq!(running.line(), "done");
    let wrapper = running.pid();
    wait_for("the zombies to be reaped", || (children(wrapper).len() == 1).then_some(()));
    running.close_stdin();
    assert_eq!(running.code(), Some(0));
}

#[test]
fn the_cli_dies_with_us() {
    for args in [&STREAM_JSON[..], &ONE_SHOT[..], &[]] {
        let mut running = Running::start(sh("echo $$; exec sleep 1000", args));
        let cli = running.number();
        running.signal(Signal::KILL);
        gone(cli);
    }
}
