//! The binary under the name `claude`, in front of programs that stand for the real one.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use crate::support::*;

fn place(name: &str) -> Scratch {
    Scratch::new("shim", name)
}

/// A shim, with Python as the real CLI: `-c` is a flag of both.
fn before_python(name: &str) -> (Scratch, PathBuf) {
    let dir = place(name);
    let shim = dir.join("claude");
    symlink(SIDECAR, &shim).unwrap();
    symlink(python3(), dir.join("claude.sidecar-real")).unwrap();
    (dir, shim)
}

fn python3() -> PathBuf {
    let found = Command::new("python3").args(["-c", "import sys; print(sys.executable)"]).output().unwrap();
    PathBuf::from(String::from_utf8(found.stdout).unwrap().trim())
}

fn shim(path: &Path) -> Command {
    let mut command = Command::new(path);
    // Other tests have CLIs without a sidecar.
    command
        .env("AGENT_SIDECAR_PATROL", "false")
        .env("AGENT_SIDECAR_LISTEN", "off")
        .env("AGENT_SIDECAR_NATIVE_TELEMETRY", "off")
        .stdin(Stdio::null());
    command
}

fn out(command: &mut Command) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } = command.output().unwrap();
    (status.code(), String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap())
}

#[test]
fn a_link_or_a_copy_called_claude_is_the_cli() {
    let (_dir, linked) = before_python("linked");
    let [here, there] = ["copied", "elsewhere"].map(place);
    let copied = here.join("claude.exe");
    copy(Path::new(SIDECAR), &copied);
    symlink(python3(), copied.with_file_name("claude.exe.sidecar-real")).unwrap();
    let elsewhere = there.join("claude");
    symlink(&copied, &elsewhere).unwrap();
    let program = "import sys; print(sys.argv[1:]); print(open('/proc/self/cmdline').read().split('\\0')[0]); sys.exit(42)";
    for path in [&linked, &copied, &elsewhere] {
        for args in [&STREAM_JSON[..], &ONE_SHOT[..], &[]] {
            let ours = ["run", "--config", "/no/such", "--max-turns", "3", "--listen", "nowhere", "--", "-v"];
            let (code, said, log) = out(shim(path).args(["-c", program]).args(args).args(ours));
            let expected = format!("{:?}\n{}\n", [args, &ours[..]].concat(), path.display()).replace('"', "'");
            assert_eq!((code, said, log), (Some(42), expected, String::new()));
        }
    }
}

#[test]
fn the_environment_is_the_same_as_without_it() {
    let (_dir, path) = before_python("environment");
    let program = "import sys; sys.stdout.buffer.write(open('/proc/self/environ', 'rb').read())";
    for args in [&STREAM_JSON[..], &ONE_SHOT[..], &[]] {
        let with = shim(&path).env("CLAUDE_CODE_ENTRYPOINT", "sdk-py").args(["-c", program]).args(args).output().unwrap();
        let real = path.with_file_name("claude.sidecar-real");
        let without = shim(&real).env("CLAUDE_CODE_ENTRYPOINT", "sdk-py").args(["-c", program]).args(args).output().unwrap();
        assert!(!with.stdout.is_empty());
        assert_eq!(with.stdout, without.stdout);
    }
}

#[test]
fn what_asks_no_model_is_the_real_one_at_once_and_not_counted() {
    let dir = place("probe");
    symlink(SIDECAR, dir.join("claude")).unwrap();
    script(&dir.join("claude.sidecar-real"), "echo $$ $PPID; sleep 0; ls /proc/$$/task | wc -l");
    let ledger = dir.join("ledger");
    for line in ["-v", "--version", "--help", "mcp list", "update", "doctor", "--bg hello", "-v --output-format stream-json"] {
        let mut command = shim(&dir.join("claude"));
        // A mistake is no reason to be in the way.
        command.env("AGENT_SIDECAR_LEDGER", &ledger).env("AGENT_SIDECAR_MAX_TURNS", "many").args(line.split(' '));
        let mut running = Running::start(command);
        assert_eq!(running.line(), format!("{} {}", running.pid(), std::process::id()), "{line}");
        assert_eq!((running.line().as_str(), running.code()), ("1", Some(0)), "{line}");
        assert!(!ledger.exists(), "{line}");
    }
    let mut asks = shim(&dir.join("claude"));
    let mut running = Running::start({
        asks.env("AGENT_SIDECAR_LEDGER", &ledger).args(["-p", "hello"]);
        asks
    });
    assert!(running.line().ends_with(&format!(" {}", running.pid())), "a prompt is wrapped");
    assert_eq!(running.code(), Some(0));
    assert!(ledger.exists());
}

#[test]
fn the_next_claude_on_the_path_that_is_none_of_us_is_the_real_one() {
    let [linked, copied, shimmed] = ["path-linked", "path-copied", "path-shimmed"].map(place);
    symlink(SIDECAR, linked.join("claude")).unwrap();
    copy(Path::new(SIDECAR), &copied.join("claude"));
    // Not executable, not a file: no CLI.
    let [unfit, directory, real] = ["path-unfit", "path-directory", "path-real"].map(place);
    std::fs::write(unfit.join("claude"), "text").unwrap();
    std::fs::create_dir_all(directory.join("claude")).unwrap();
    script(&real.join("claude"), "echo the real one, \"$@\"");
    let path =
        |dirs: &[&Path]| std::env::join_paths(dirs.iter().copied().chain([Path::new("/usr/bin"), Path::new("/bin")])).unwrap();
    for words in ["-v", "-p hello"] {
        let dirs = path(&[&*linked, &*copied, &*unfit, &*directory, &*real]);
        let ran = out(shim(&linked.join("claude")).env("PATH", &dirs).args(words.split(' ')));
        assert_eq!(ran, (Some(0), format!("the real one, {words}\n"), String::new()));
        // Found by its bare name, as a shell finds it.
        let ran = out(Command::new("sh")
            .args(["-c", "claude \"$@\"", "sh"])
            .args(words.split(' '))
            .env("PATH", &dirs)
            .env("AGENT_SIDECAR_LISTEN", "off"));
        assert_eq!((ran.0, ran.1), (Some(0), format!("the real one, {words}\n")));
    }
    // One of us that `install` put there has its own real one.
    symlink(SIDECAR, shimmed.join("claude")).unwrap();
    script(&shimmed.join("claude.sidecar-real"), "echo the other one");
    let ran = out(shim(&linked.join("claude")).env("PATH", path(&[&*linked, &*shimmed, &*real])).arg("-v"));
    assert_eq!(ran.1, "the other one\n");
}

#[test]
fn without_a_real_one_it_is_127_and_what_to_do() {
    let [one, other] = ["none-one", "none-other"].map(place);
    symlink(SIDECAR, one.join("claude")).unwrap();
    copy(Path::new(SIDECAR), &other.join("claude"));
    // What lies in the working directory is not the CLI, whatever PATH says.
    script(&other.join("work/claude"), "echo planted");
    let path = std::env::join_paths([&*one, &*other, Path::new("."), Path::new(""), Path::new("/usr/bin")]).unwrap();
    for words in ["-v", "-p hello"] {
        let mut command = shim(&one.join("claude"));
        command.current_dir(other.join("work")).env("PATH", &path).args(words.split(' '));
        let (code, said, log) = out(&mut command);
        assert_eq!((code, said.as_str()), (Some(127), ""));
        assert!(log.contains("was not found") && log.contains("agent-sidecar install") && log.lines().count() == 1, "{log}");
    }
    let named = |cli: &Path| out(shim(&one.join("claude")).env("PATH", &path).env("AGENT_SIDECAR_SHIM_CLI", cli).arg("-v"));
    assert_eq!(named(&other.join("work/claude")).1, "planted\n");
    let (code, _, log) = named(&other.join("claude"));
    assert!(code == Some(127) && log.contains("the sidecar itself"), "{log}");
    let (code, _, log) = named(Path::new("claude"));
    assert!(code == Some(127) && log.contains("no full path"), "{log}");
    let (code, _, log) = named(Path::new("/no/such/claude"));
    assert!(code == Some(127) && log.contains("/no/such/claude"), "{log}");
}

#[test]
fn a_real_one_that_cannot_be_started_is_named() {
    let dir = place("unfit");
    let no_path = place("unfit-path");
    symlink(SIDECAR, dir.join("claude")).unwrap();
    let real = dir.join("claude.sidecar-real");
    let ran = || out(shim(&dir.join("claude")).env("PATH", &*no_path).args(["-p", "hello"]));
    std::fs::write(&real, "text").unwrap();
    let (code, _, log) = ran();
    assert!(code == Some(126) && log.contains("claude.sidecar-real` cannot be executed"), "{log}");
    std::fs::remove_file(&real).unwrap();
    symlink("/no/such/version", &real).unwrap();
    let (code, _, log) = ran();
    assert!(code == Some(127) && log.contains("claude.sidecar-real` was not found"), "{log}");
    // The shim itself is no CLI, under whatever name: it would start itself for ever.
    std::fs::remove_file(&real).unwrap();
    symlink(SIDECAR, &real).unwrap();
    let (code, _, log) = ran();
    assert!(code == Some(127) && log.contains("was not found"), "{log}");
}

#[test]
fn a_script_that_leads_back_ends() {
    for (name, text) in [("circle-exec", "exec claude \"$@\""), ("circle-fork", "claude \"$@\"; exit $?")] {
        let [us, back] = [name.to_owned(), format!("{name}-back")].map(|name| place(&name));
        symlink(SIDECAR, us.join("claude")).unwrap();
        script(&back.join("claude"), text);
        let path = std::env::join_paths([&*us, &*back, Path::new("/usr/bin"), Path::new("/bin")]).unwrap();
        for words in ["-v", "-p hello"] {
            let (code, said, log) = out(shim(&us.join("claude")).env("PATH", &path).args(words.split(' ')));
            assert_eq!((code, said.as_str()), (Some(127), ""), "{name} {words}");
            assert!(log.contains("a script that leads back"), "{log}");
        }
    }
}

/// Says who wraps it, and starts another one as a tool would, by itself and by a shell.
const NESTING: &str = r#"
import os, subprocess, sys
def above(): return os.readlink('/proc/%d/exe' % os.getppid()), os.getppid()
print(*above(), flush=True)
if sys.argv[1] == 'outer':
    inner = [os.environ['CLAUDE'], '-c', os.environ['NESTING'], 'inner', '--output-format', 'json']
    print(os.getpid(), flush=True)
    for program in inner, ['sh', '-c', '"$@"; true', 'sh', *inner]: subprocess.run(program)
"#;

#[test]
fn a_wrapper_around_a_shim_is_one_wrapper_and_an_agent_of_the_agent_has_its_own() {
    let (_dir, path) = before_python("nesting");
    let beside_run: &[&str] = &[SIDECAR, "run", "--listen", "off", "--"];
    for around in [beside_run, &["setsid", "-w"], &[]] {
        let mut words: Vec<&str> = around.to_vec();
        let claude = path.to_str().unwrap();
        words.extend([claude, "-c", NESTING, "outer"]);
        words.extend(STREAM_JSON);
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).env("CLAUDE", &path).env("NESTING", NESTING);
        command.env("AGENT_SIDECAR_LISTEN", "off").env("AGENT_SIDECAR_NATIVE_TELEMETRY", "off");
        let mut running = Running::start(command);
        running.close_stdin();
        let first = running.line();
        let (exe, wrapper) = first.rsplit_once(' ').unwrap();
        assert_eq!(Path::new(exe), Path::new(SIDECAR).canonicalize().unwrap());
        if around == beside_run {
            assert_eq!(wrapper, running.pid().to_string(), "the shim steps aside");
        }
        let agent = running.line();
        for _ in 0..2 {
            let inner = running.line();
            let (exe, own) = inner.rsplit_once(' ').unwrap();
            assert_eq!(Path::new(exe), Path::new(SIDECAR).canonicalize().unwrap(), "an agent of the agent is wrapped");
            assert!(own != wrapper && own != agent, "in its own right");
        }
        assert_eq!(running.code(), Some(0));
    }
}

#[test]
fn a_change_of_user_in_between_hides_no_wrapper() {
    let dir = place("user");
    copy(Path::new(SIDECAR), &dir.join("claude"));
    // Whose parents we are, and those of an agent that it starts as a tool does.
    let text = "echo $PPID; [ \"$1\" = inner ] || setsid -w \"$CLAUDE\" inner --output-format json";
    script(&dir.join("claude.sidecar-real"), text);
    let user: &[&str] = &["setpriv", "--reuid=1234", "--regid=1234", "--clear-groups"];
    let reaches = Command::new(user[0]).args(&user[1..]).arg("test").arg("-x").arg(dir.join("claude.sidecar-real")).status();
    if !root() || !reaches.is_ok_and(|reached| reached.success()) {
        eprintln!("not tried: not root, or out of the other user's reach");
        return;
    }
    for args in [&STREAM_JSON[..], &ONE_SHOT[..]] {
        let mut command = sidecar();
        command
            .args(user)
            .arg(dir.join("claude"))
            .args(args)
            .env("CLAUDE", dir.join("claude"))
            .env("AGENT_SIDECAR_LISTEN", "off");
        let mut running = Running::start(command);
        running.close_stdin();
        assert_eq!(running.number(), running.pid(), "the shim steps aside");
        assert_ne!(running.number(), running.pid(), "an agent of the agent is wrapped");
        assert_eq!(running.code(), Some(0));
    }
}

#[test]
fn an_orphan_of_the_agent_has_its_own_wrapper_too() {
    // Its parent has become the wrapper before it turns into an agent: only that it was forked tells it apart.
    let (_dir, path) = before_python("orphan");
    let program = "
import os, sys, time
read, write = os.pipe()
wrapper = os.getppid()
if os.fork() == 0:
    if os.fork() == 0:
        while os.getppid() != wrapper: time.sleep(0.001)
        print(os.getppid(), flush=True)
        program = 'import os; print(os.getppid()); os.close(%d)' % write
        os.set_inheritable(write, True)
        os.execv(os.environ['CLAUDE'], [os.environ['CLAUDE'], '-c', program, '--output-format', 'json'])
    os._exit(0)
os.close(write)
os.wait()
os.read(read, 1)
";
    let mut command = shim(&path);
    command.args(["-c", program]).args(STREAM_JSON).env("CLAUDE", &path);
    let mut running = Running::start(command);
    assert_eq!(running.number(), running.pid(), "the wrapper takes the orphan in");
    assert_ne!(running.number(), running.pid());
    assert_eq!(running.code(), Some(0));
}

#[test]
fn a_script_that_starts_the_cli_and_waits_for_it_is_one_agent_and_not_two() {
    let dir = place("waits");
    let (real, own) = (dir.join("real"), dir.join("own"));
    for place in [&real, &own] {
        std::fs::create_dir_all(place).unwrap();
        symlink(SIDECAR, place.join("claude")).unwrap();
    }
    script(&real.join("claude.sidecar-real"), "echo agent");
    let runs = |ledger: &Path| {
        let lines = std::fs::read_to_string(ledger).unwrap_or_default();
        lines.lines().filter(|line| line.contains("\"process_exited\"")).count()
    };
    let inner = real.join("claude").display().to_string();
    for (n, (body, agents)) in [
        (format!("{inner} \"$@\"; echo over"), 1),
        (format!("timeout 60 {inner} \"$@\" | cat; echo over"), 1),
        (format!("(sh -c '{inner} \"$@\"; true' sh \"$@\"); echo over"), 1),
        // A tool of the agent, which has a session of its own.
        (format!("setsid sh -c '{inner} \"$@\"; true' sh \"$@\"; echo over"), 2),
    ]
    .into_iter()
    .enumerate()
    {
        let ledger = dir.join(format!("ledger-{n}"));
        script(&own.join("claude.sidecar-real"), &body);
        let mut command = shim(&own.join("claude"));
        let ran = out(command.env("AGENT_SIDECAR_LEDGER", &ledger).args(["-p", "hello"]));
        assert_eq!(ran, (Some(0), String::from("agent\nover\n"), String::new()), "{body}");
        assert_eq!(runs(&ledger), agents, "{body}");
    }
    // What the agent has left behind is the wrapper's child, in the agent's session.
    let left = format!(
        "import os, time; os.fork() and os._exit(0); time.sleep(0.1); os.execvp('sh', ['sh', '-c', '{inner} -p x; true'])"
    );
    symlink(python3(), dir.join("claude.sidecar-real")).unwrap();
    symlink(SIDECAR, dir.join("claude")).unwrap();
    let ledger = dir.join("ledger");
    let program = format!("import subprocess, sys; subprocess.run([{:?}, '-c', {left:?}]); sys.stdin.read()", python3());
    let mut command = shim(&dir.join("claude"));
    command.env("AGENT_SIDECAR_LEDGER", &ledger).args(["-c", &program]).args(STREAM_JSON);
    let mut running = Running::start(command);
    assert_eq!(running.line(), "agent");
    wait_for("a second agent", || (runs(&ledger) == 1).then_some(()));
    running.close_stdin();
    assert_eq!((running.code(), runs(&ledger)), (Some(0), 2));
}

#[test]
fn a_mistake_in_the_configuration_costs_that_setting_and_not_the_agent() {
    let (_dir, path) = before_python("mistake");
    let ledger = path.with_file_name("ledger");
    let mistaken = || {
        let mut command = shim(&path);
        command.env("AGENT_SIDECAR_MAX_TURNS", "many").env("AGENT_SIDECAR_LEDGER", &ledger);
        command.args(["-c", "print('works')"]).args(ONE_SHOT);
        command
    };
    let (code, said, log) = out(&mut mistaken());
    assert_eq!((code, said.as_str()), (Some(0), "works\n"));
    assert!(log.contains("AGENT_SIDECAR_MAX_TURNS: `limits.max_turns`") && log.contains("runs without this setting"), "{log}");
    assert!(ledger.exists(), "the rest holds");
    let (code, said, log) = out(mistaken().env("AGENT_SIDECAR_SHIM_STRICT", "true"));
    assert_eq!((code, said.as_str()), (Some(125), ""));
    assert!(log.contains("1 mistake") && log.contains("AGENT_SIDECAR_MAX_TURNS"), "{log}");
}

#[test]
fn where_the_sidecar_cannot_work_the_agent_does() {
    let (_dir, path) = before_python("starved");
    // Not one more descriptor than the CLI itself needs.
    let script = "ulimit -n 6; exec \"$@\"";
    let mut command = Command::new("sh");
    command.args(["-c", script, "sh"]).arg(&path).args(["-c", "import os; print(os.getpid())"]).args(STREAM_JSON);
    command.env("AGENT_SIDECAR_LISTEN", "off").stderr(Stdio::piped());
    let mut running = Running::start(command);
    running.close_stdin();
    assert_eq!(running.number(), running.pid());
    assert_eq!(running.code(), Some(0));
}

#[test]
fn one_agent_too_many_is_refused_and_not_run_without_the_sidecar() {
    let dir = place("full");
    symlink(SIDECAR, dir.join("claude")).unwrap();
    script(&dir.join("claude.sidecar-real"), "echo started; read line; echo over");
    let start = |patience: &str| {
        let mut command = Command::new(dir.join("claude"));
        command.args(["-p", "hello"]).env("AGENT_SIDECAR_LISTEN", "off").env("AGENT_SIDECAR_NATIVE_TELEMETRY", "off");
        command.env("AGENT_SIDECAR_SOCKET", dir.join("hub.sock")).env("AGENT_SIDECAR_MAX_SESSIONS", "1");
        command.env("AGENT_SIDECAR_QUEUE_TIMEOUT", patience).stdin(Stdio::piped());
        command
    };
    let mut first = Running::start(start("60s"));
    assert_eq!(first.line(), "started");
    let (code, said, log) = out(start("100ms").stdin(Stdio::null()));
    assert_eq!((code, said.as_str()), (Some(125), ""), "{log}");
    assert!(log.contains("as many agents as may run at once"), "{log}");
    first.write(b"\n").unwrap();
    assert_eq!((first.line().as_str(), first.code()), ("over", Some(0)));
    let (code, said, _) = out(start("60s").stdin(Stdio::null()));
    assert_eq!((code, said.as_str()), (Some(0), "started\nover\n"), "there is room again");
}
