//! Firecracker, against a fake of it that is a process of its own.

#![expect(clippy::unwrap_used, reason = "a fake that cannot go on fails its test")]
#![expect(clippy::print_stdout, reason = "a process of its own speaks to who began it")]
#![expect(clippy::disallowed_methods, reason = "a fake has processes of its own, and nobody else waits for them")]

mod conformance;
mod fakes {
    pub(crate) mod contract;
    pub(crate) mod firecracker;
}

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use agent_fleet::provider::firecracker::{Firecracker, Settings};
use agent_fleet::provider::{Endpoint, Error, Exec, FLEET_LABEL, Provider, Secret, Size, Spec, State};
use async_trait::async_trait;
use serde_json::{Value, json};

use conformance::{Call, Does, Fault, World};

/// What must become true does so within this, on whatever machine.
const SOON: Duration = Duration::from_secs(60);

/// A directory with everything that there is to one test, and nothing of which is left.
struct Machines {
    at: PathBuf,
}

impl Drop for Machines {
    fn drop(&mut self) {
        for pid in self.alive("") {
            drop(Command::new("kill").args(["-KILL", &pid.to_string()]).stderr(Stdio::null()).status());
        }
        drop(fs::remove_dir_all(&self.at));
    }
}

impl Machines {
    fn new() -> Self {
        // A socket's path is short.
        let unique = uuid::Uuid::now_v7().simple().to_string();
        let at = std::env::temp_dir().join(format!("fc-{}", &unique[20..]));
        for directory in ["faults", "alive", "taps"] {
            fs::create_dir_all(at.join(directory)).unwrap();
        }
        fs::write(at.join("vmlinux"), "a kernel").unwrap();
        fs::write(at.join("rootfs"), "an image").unwrap();
        let (world, program) = (at.display(), std::env::current_exe().unwrap());
        let (program, path) = (program.display(), "PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin; export PATH");
        let again = |name: &str| format!("exec '{program}' --exact --nocapture {name} --");
        script(
            &at,
            "firecracker",
            &format!("{path}\nFAKE_WORLD='{world}'; export FAKE_WORLD\n{} \"$@\"", again("a_firecracker_by_itself")),
        );
        script(&at, "serve", &format!("FAKE_PORT=$1; export FAKE_PORT\n{}", again("a_server_in_a_machine")));
        // It is told what it must be told, and does what the real one would not like to find done.
        let jailer = r#"
base= id= program= uid= gid=
while [ "$1" != -- ]; do
    case $1 in
        --id) id=$2;; --exec-file) program=$2;; --chroot-base-dir) base=$2;; --uid) uid=$2;; --gid) gid=$2;;
        *) echo "the jailer does not know $1"; exit 1;;
    esac
    shift 2
done
shift
root=$base/${program##*/}/$id/root
[ "$uid.$gid" = "$(id -u).$(id -g)" ] || exit 1
mkdir -p "$root/dev/net" "$root/run"
[ ! -e "$root/dev/kvm" ] || { echo "Failed to create /dev/kvm via mknod inside the jail: File exists (os error 17)"; exit 1; }
: >"$root/dev/kvm"
( set -C; echo $$ >"$root/${program##*/}.pid" ) || { echo "the file with the process id is there already"; exit 1; }
FAKE_ROOT=$root; export FAKE_ROOT
exec "$program" --id "$id" --start-time-us 1 --start-time-cpu-us 1 --parent-cpu-time-us 1 "$@""#;
        script(&at, "jailer", &format!("{path}\n{jailer}"));
        Self { at }
    }

    fn settings(&self, more: Value) -> Settings {
        let mut settings = json!({
            "firecracker": self.at.join("firecracker"), "kernel": self.at.join("vmlinux"), "directory": self.at.join("m"),
            "kvm": "/dev/null", "format": ["true"],
            "network": { "tap_prefix": "fc", "taps": 50, "first": "127.30.0.0", "dns": "127.30.0.1" },
        });
        settings.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        serde_json::from_value(settings).unwrap()
    }

    fn provider(&self, more: Value) -> Firecracker {
        Firecracker::new(self.settings(more)).unwrap()
    }

    fn spec(&self, key: &str, command: &[&str]) -> Spec {
        Spec {
            key: key.to_owned(),
            image: self.at.join("rootfs").display().to_string(),
            command: command.iter().map(|word| (*word).to_owned()).collect(),
            env: BTreeMap::new(),
            secrets: BTreeMap::new(),
            size: Size::default(),
            ports: Vec::new(),
            labels: BTreeMap::from([(FLEET_LABEL.to_owned(), String::from("tests"))]),
            ttl: Duration::from_secs(3600),
            idle: None,
            avoid: vec![],
        }
    }

    /// One that says so, and then nothing until it is asked to end.
    fn waits(&self, key: &str) -> Spec {
        self.spec(key, &["sh", "-c", WAITS])
    }

    fn arm(&self, call: &str, fault: &str) {
        let new = self.at.join("fault");
        fs::write(&new, fault).unwrap();
        fs::rename(new, self.at.join("faults").join(call)).unwrap();
    }

    /// The Firecrackers that live, whose machine's key begins like this.
    fn alive(&self, key: &str) -> Vec<u32> {
        let names =
            fs::read_dir(self.at.join("alive")).unwrap().flatten().filter_map(|entry| entry.file_name().into_string().ok());
        let pids = names.filter_map(|name| name.starts_with(key).then(|| name.rsplit_once('.')?.1.parse::<u32>().ok())?);
        pids.filter(|pid| fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))).collect()
    }

    fn console(&self, key: &str) -> String {
        fs::read_to_string(self.at.join("m").join(key).join("console")).unwrap_or_default()
    }

    async fn prints(&self, key: &str, what: &str) {
        soon(|| self.console(key).contains(what)).await;
    }

    fn files(&self, key: &str, end: &str) -> usize {
        let files = fs::read_dir(self.at.join("m").join(key).join("files")).unwrap().flatten();
        files.filter(|file| file.file_name().to_string_lossy().ends_with(end)).count()
    }

    /// What was asked against the contract or the order.
    fn wrong(&self) -> String {
        fs::read_to_string(self.at.join("wrong")).unwrap_or_default()
    }
}

/// They end with their init, which ends with its Firecracker.
const WAITS: &str = "trap 'exit 0' TERM; echo it hears; while kill -0 $PPID 2>/dev/null; do sleep 0.05; done";
const IGNORES: &str = "trap '' TERM; echo it hears; while kill -0 $PPID 2>/dev/null; do sleep 0.05; done";

fn script(at: &Path, name: &str, text: &str) {
    let path = at.join(name);
    fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
}

async fn soon(what: impl Fn() -> bool) {
    let began = Instant::now();
    while !what() {
        assert!(began.elapsed() < SOON, "it does not come to pass");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn state(provider: &Firecracker, native: &str) -> State {
    provider.state(native).await.unwrap().state
}

async fn becomes(provider: &Firecracker, native: &str, wanted: State) {
    let began = Instant::now();
    loop {
        let now = state(provider, native).await;
        if now == wanted {
            return;
        }
        assert!(began.elapsed() < SOON, "it is {now:?}, not {wanted:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// By hand: whatever the provider would say.
fn patch(socket: &Path, body: &str) {
    let mut stream = UnixStream::connect(socket).unwrap();
    let length = body.len();
    write!(stream, "PATCH /vm HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}")
        .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 204"), "{answer}");
}

/// Not a test: what the script `firecracker` is.
#[test]
fn a_firecracker_by_itself() {
    if let Ok(world) = std::env::var("FAKE_WORLD") {
        let root = std::env::var("FAKE_ROOT").unwrap_or_else(|_| String::from("/"));
        let arguments: Vec<String> = std::env::args().skip_while(|argument| argument != "--").skip(1).collect();
        fakes::firecracker::run(Path::new(&world), Path::new(&root), &arguments);
    }
}

/// Not a test: what the script `serve` is, in a machine.
#[test]
fn a_server_in_a_machine() {
    if let (Ok(port), Ok(address)) = (std::env::var("FAKE_PORT"), std::env::var("GUEST_ADDRESS")) {
        let at = (address, port.parse::<u16>().unwrap());
        // The one of before is being ended.
        let began = Instant::now();
        let listener = loop {
            match std::net::TcpListener::bind(&at) {
                Ok(listener) => break listener,
                Err(error) => assert!(began.elapsed() < SOON, "{error}"),
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            drop(stream.read(&mut [0; 4096]));
            drop(stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi"));
        }
    }
}

/// Not a test: a fleet that makes a machine, and then is killed.
#[tokio::test]
async fn a_fleet_by_itself() {
    if let Ok(settings) = std::env::var("FAKE_FLEET") {
        let given: Value = serde_json::from_str(&settings).unwrap();
        let provider = Firecracker::new(serde_json::from_value(given["settings"].clone()).unwrap()).unwrap();
        provider.create(&serde_json::from_value(given["spec"].clone()).unwrap()).await.unwrap();
        println!("it is made");
        std::future::pending().await
    }
}

struct Conformance {
    machines: Machines,
    directory: PathBuf,
}

#[async_trait]
impl World for Conformance {
    fn spec(&self, does: Does) -> Option<Spec> {
        let exit;
        let serve = self.machines.at.join("serve").display().to_string();
        let port;
        let command: &[&str] = match does {
            Does::Wait => &["sh", "-c", WAITS],
            Does::Ignore => &["sh", "-c", IGNORES],
            Does::Exit(code) => {
                exit = format!("echo exits with {code}; exit {code}");
                &["sh", "-c", &exit]
            }
            Does::Serve(at) => {
                port = at.to_string();
                &["setpriv", "--pdeathsig", "KILL", "sh", &serve, &port]
            }
        };
        Some(self.machines.spec("", command))
    }

    fn price_usd(&self) -> f64 {
        0.0358
    }

    fn page(&self) -> Option<usize> {
        None
    }

    fn arm(&self, call: Call, fault: Fault) -> bool {
        let call = match call {
            Call::Create => "Create",
            Call::State => "State",
            // A directory and a signal: nobody is asked.
            Call::List | Call::Delete => return false,
        };
        let fault = match fault {
            Fault::LoseAnswer => String::from("LoseAnswer"),
            Fault::Status(status) => format!("Status {status}"),
            Fault::Slow(late) => format!("Slow {}", late.as_millis()),
            Fault::UnknownState => String::from("UnknownState 0"),
            Fault::UnknownField => String::from("UnknownField 0"),
            // It has no such answer, and none with a body to the one request.
            Fault::CutAnswer | Fault::Limit(_) | Fault::LimitUntil(_) | Fault::Garbled(_) => return false,
        };
        self.machines.arm(call, &if fault.contains(' ') { fault } else { format!("{fault} 0") });
        true
    }

    fn armed(&self) -> usize {
        fs::read_dir(self.machines.at.join("faults")).unwrap().count()
    }

    async fn count(&self, key: &str) -> usize {
        self.machines.alive(key).len().max(usize::from(self.directory.join(key).exists()))
    }

    async fn listens(&self, native: &str) {
        self.machines.prints(native, "it hears").await;
    }
}

#[tokio::test]
async fn it_does_what_every_provider_must() {
    let machines = Machines::new();
    let provider = machines.provider(json!({}));
    let world = Conformance { directory: machines.at.join("m"), machines };
    conformance::run(&provider, &world).await;
    assert_eq!(world.machines.wrong(), "");
}

#[tokio::test]
async fn in_a_jail_and_over_vsock_it_does_the_same() {
    let machines = Machines::new();
    let identity = |what: &str| {
        let said = Command::new("id").arg(what).output().unwrap();
        String::from_utf8(said.stdout).unwrap().trim().parse::<u32>().unwrap()
    };
    let base = machines.at.join("jails");
    let jailer =
        json!({ "program": machines.at.join("jailer"), "uid": identity("-u"), "gid": identity("-g"), "chroot_base": base });
    let provider = machines.provider(json!({ "jailer": jailer, "reach": "vsock" }));
    let serve = machines.at.join("serve").display().to_string();
    let spec =
        Spec { ports: vec![8080], ..machines.spec("agent-jail-1", &["setpriv", "--pdeathsig", "KILL", "sh", &serve, "8080"]) };
    assert_eq!(provider.create(&spec).await.unwrap().state, State::Running);
    let endpoint = provider.endpoint("agent-jail-1", 8080).await.unwrap();
    assert!(endpoint.url.starts_with("http://127.0.0.1:"), "{endpoint:?}");
    conformance::serves(&endpoint).await;
    for _ in 0..2 {
        provider.pause("agent-jail-1").await.unwrap();
        assert_eq!((state(&provider, "agent-jail-1").await, machines.alive("").len()), (State::Paused, 0));
        provider.resume("agent-jail-1", &[]).await.unwrap();
        assert_eq!(state(&provider, "agent-jail-1").await, State::Running);
    }
    let again: Endpoint = provider.endpoint("agent-jail-1", 8080).await.unwrap();
    conformance::serves(&again).await;
    provider.delete("agent-jail-1").await.unwrap();
    assert!(!base.join("firecracker/agent-jail-1").exists() && machines.alive("").is_empty());
    // Its port is nobody's any more: who listens there ends a moment later.
    let began = Instant::now();
    while !is_free(&again.url).await {
        assert!(began.elapsed() < Duration::from_secs(60), "{again:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(machines.wrong(), "");
}

/// Whether nobody listens there.
async fn is_free(url: &str) -> bool {
    let at = url.trim_start_matches("http://");
    tokio::net::TcpStream::connect(at).await.is_err()
}

#[tokio::test]
async fn a_fleet_that_is_killed_finds_its_machines_again() {
    let machines = Machines::new();
    let settings = json!({
        "firecracker": machines.at.join("firecracker"), "kernel": machines.at.join("vmlinux"), "directory": machines.at.join("m"),
        "kvm": "/dev/null", "format": ["true"], "network": { "tap_prefix": "fc", "taps": 5, "first": "127.30.0.0" },
    });
    let spec = machines.waits("agent-kept-1");
    let mut fleet = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--nocapture", "a_fleet_by_itself"])
        .env("FAKE_FLEET", json!({ "settings": settings, "spec": spec }).to_string())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = fleet.stdout.take().unwrap();
    let mut all = String::new();
    while !all.contains("it is made") {
        let mut some = [0; 256];
        let n = said.read(&mut some).unwrap();
        assert!(n > 0, "{all}");
        all += &String::from_utf8_lossy(&some[..n]);
    }
    fleet.kill().unwrap();
    fleet.wait().unwrap();
    machines.prints("agent-kept-1", "it hears").await;
    let before = machines.alive("agent-kept-1");
    let provider = Firecracker::new(serde_json::from_value(settings).unwrap()).unwrap();
    let listed = provider.list(&spec.labels, None).await.unwrap().sandboxes;
    assert_eq!(
        listed.iter().map(|one| (one.native.as_str(), one.state.clone())).collect::<Vec<_>>(),
        [("agent-kept-1", State::Running)]
    );
    assert_eq!(provider.create(&spec).await.unwrap().native, "agent-kept-1");
    assert_eq!((machines.alive("agent-kept-1"), before.len()), (before, 1));
    provider.stop("agent-kept-1", SOON).await.unwrap();
    let over = provider.state("agent-kept-1").await.unwrap();
    assert_eq!((over.state, over.exit_code), (State::Stopped, Some(0)));
    assert_eq!(machines.wrong(), "");
}

#[tokio::test]
async fn a_process_with_the_id_of_before_is_neither_taken_for_it_nor_killed() {
    let machines = Machines::new();
    let provider = machines.provider(json!({}));
    provider.create(&machines.waits("agent-id-1")).await.unwrap();
    let [pid] = machines.alive("agent-id-1")[..] else { panic!("it is not one") };
    let mut other = Command::new("sleep").arg("600").spawn().unwrap();
    let at = machines.at.join("m/agent-id-1/process.json");
    let mut process: Value = serde_json::from_slice(&fs::read(&at).unwrap()).unwrap();
    assert_eq!(process["pid"], pid);
    Command::new("kill").args(["-KILL", &pid.to_string()]).status().unwrap();
    soon(|| machines.alive("agent-id-1").is_empty()).await;
    process["pid"] = json!(other.id());
    fs::write(&at, process.to_string()).unwrap();
    let over = provider.state("agent-id-1").await.unwrap();
    assert_eq!((over.state, over.exit_code), (State::Stopped, None));
    assert!(over.reason.is_some());
    provider.delete("agent-id-1").await.unwrap();
    assert!(other.try_wait().unwrap().is_none(), "somebody else was killed");
    other.kill().unwrap();
    other.wait().unwrap();
}

#[tokio::test]
async fn what_was_half_made_is_made_anew_and_is_one() {
    let machines = Machines::new();
    let provider = machines.provider(json!({}));
    let spec = machines.waits("agent-half-1");
    // A fleet was killed when Firecracker had begun, and before it was written down.
    let files = machines.at.join("m/agent-half-1/files");
    fs::create_dir_all(&files).unwrap();
    let record = json!({
        "key": spec.key, "image": spec.image, "size": spec.size, "labels": spec.labels, "created": "2026-11-27T00:00:00Z", "tap": 0,
    });
    fs::write(machines.at.join("m/agent-half-1/spec.json"), record.to_string()).unwrap();
    let mut left = Command::new(machines.at.join("firecracker"))
        .args(["--id", "agent-half-1", "--api-sock"])
        .arg(files.join("api.sock"))
        .env_clear()
        .spawn()
        .unwrap();
    soon(|| files.join("api.sock").exists()).await;
    assert_eq!(state(&provider, "agent-half-1").await, State::Creating);
    assert_eq!(provider.create(&spec).await.unwrap().state, State::Running);
    left.wait().unwrap();
    let alive = machines.alive("agent-half-1");
    assert!(alive.len() == 1 && alive[0] != left.id(), "{alive:?}");
    // The network of the other is its.
    assert!(fs::read_to_string(machines.at.join("m/agent-half-1/spec.json")).unwrap().contains("\"tap\":0"));
    provider.delete("agent-half-1").await.unwrap();
    assert!(machines.alive("agent-half-1").is_empty());
    assert_eq!(machines.wrong(), "");
}

#[tokio::test]
async fn environment_and_secrets_are_in_the_machine_and_in_no_file_and_no_argument() {
    let machines = Machines::new();
    let provider = machines.provider(json!({}));
    let secret = format!("s3cret-{}", uuid::Uuid::now_v7());
    fs::write(machines.at.join("token"), &secret).unwrap();
    let seen = machines.at.join("seen");
    let script = format!("printf '%s|%s|%s' \"$TOKEN\" \"$SAID\" \"$1\" > {}; exec sleep 600", seen.display());
    let mut spec = machines.spec("agent-env-1", &["sh", "-c", &script, "x", "it's $(one) \"word\"\n"]);
    spec.secrets.insert(String::from("TOKEN"), Secret::File(machines.at.join("token")));
    spec.env.insert(String::from("SAID"), String::from("a 'b' $c;\n\u{e9}"));
    provider.create(&spec).await.unwrap();
    let expected = format!("{secret}|a 'b' $c;\n\u{e9}|it's $(one) \"word\"\n");
    soon(|| fs::read_to_string(&seen).is_ok_and(|has| has == expected)).await;
    fs::remove_file(&seen).unwrap();
    fs::remove_file(machines.at.join("token")).unwrap();
    let found = Command::new("grep").args(["-rl", "s3cret-"]).arg(&machines.at).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&found.stdout), "");
    let [pid] = machines.alive("agent-env-1")[..] else { panic!("it is not one") };
    for what in ["cmdline", "environ"] {
        let all = fs::read(format!("/proc/{pid}/{what}")).unwrap();
        assert!(!String::from_utf8_lossy(&all).contains(&secret), "{what}");
    }
    let unfit = Spec { env: BTreeMap::from([(String::from("A B"), String::new())]), ..machines.waits("agent-env-2") };
    assert!(matches!(provider.create(&unfit).await, Err(Error::Refused { what, .. }) if what.contains("`A B`")));
    assert_eq!(machines.wrong(), "");
}

#[tokio::test]
async fn what_sleeps_has_no_process_and_what_woke_up_sleeps_again() {
    let machines = Machines::new();
    let provider = machines.provider(json!({}));
    provider.create(&machines.waits("agent-nap-1")).await.unwrap();
    for _ in 0..3 {
        provider.pause("agent-nap-1").await.unwrap();
        assert_eq!((machines.alive("").len(), machines.files("agent-nap-1", ".memory")), (0, 1));
        provider.resume("agent-nap-1", &[]).await.unwrap();
        assert_eq!(machines.alive("").len(), 1);
    }
    assert!(!machines.console("agent-nap-1").contains("Running Firecracker"), "the console is the machine's");
    // No room: it goes on, and nothing of it is left.
    machines.arm("Snapshot", "Full 0");
    let full = provider.pause("agent-nap-1").await;
    assert!(matches!(&full, Err(Error::Failed { what, .. }) if what.contains("No space left")), "{full:?}");
    assert_eq!(state(&provider, "agent-nap-1").await, State::Running);
    assert_eq!(machines.files("agent-nap-1", ".memory"), 1, "the memory that it woke up from");
    // Its fleet was killed half-way: it is not taken for one that sleeps, and can be put away.
    let at = machines.at.join("m/agent-nap-1");
    fs::write(at.join("falling-asleep"), "{}").unwrap();
    patch(&at.join("files/api.sock"), r#"{"state": "Paused"}"#);
    assert_eq!(state(&provider, "agent-nap-1").await, State::Running);
    provider.pause("agent-nap-1").await.unwrap();
    assert_eq!((state(&provider, "agent-nap-1").await, machines.alive("").len()), (State::Paused, 0));
    // What cannot be loaded sleeps on, and says why.
    let memory = fs::read_dir(at.join("files")).unwrap().flatten().map(|file| file.path());
    let memory = memory.filter(|path| path.extension().is_some_and(|kind| kind == "memory")).collect::<Vec<_>>();
    fs::rename(&memory[0], at.join("elsewhere")).unwrap();
    let lost = provider.resume("agent-nap-1", &[]).await;
    assert!(matches!(&lost, Err(Error::Failed { what, .. }) if what.contains("Failed to restore from snapshot")), "{lost:?}");
    assert_eq!((state(&provider, "agent-nap-1").await, machines.alive("").len()), (State::Paused, 0));
    fs::rename(at.join("elsewhere"), &memory[0]).unwrap();
    // Its fleet was killed when it was to wake up: it sleeps, and the process that was begun for it is no second one.
    fs::remove_file(at.join("files/api.sock")).unwrap();
    let mut left = Command::new(machines.at.join("firecracker"));
    let mut left = left.args(["--id", "agent-nap-1", "--api-sock"]).arg(at.join("files/api.sock")).env_clear().spawn().unwrap();
    soon(|| at.join("files/api.sock").exists()).await;
    assert_eq!(state(&provider, "agent-nap-1").await, State::Paused);
    provider.resume("agent-nap-1", &[]).await.unwrap();
    left.wait().unwrap();
    assert_eq!(machines.alive("").len(), 1);
    // Killed when it had woken up, before it went on: what was put away is not its memory any more.
    patch(&at.join("files/api.sock"), r#"{"state": "Paused"}"#);
    assert_eq!(state(&provider, "agent-nap-1").await, State::Paused);
    provider.resume("agent-nap-1", &[]).await.unwrap();
    becomes(&provider, "agent-nap-1", State::Running).await;
    provider.pause("agent-nap-1").await.unwrap();
    provider.stop("agent-nap-1", SOON).await.unwrap();
    assert_eq!((state(&provider, "agent-nap-1").await, machines.files("agent-nap-1", ".memory")), (State::Stopped, 0));
    assert_eq!(machines.wrong(), "");
}

#[tokio::test]
async fn a_machine_whose_memory_is_slow_to_be_put_away_goes_on() {
    let machines = Machines::new();
    let provider = machines.provider(json!({ "snapshot_seconds": 1 }));
    let spec = machines.spec("agent-slow-1", &["sh", "-c", "while kill -0 $PPID 2>/dev/null; do echo tick; sleep 0.05; done"]);
    provider.create(&spec).await.unwrap();
    // Slower than it may be, and slower than it is waited for after that.
    for late in [1_600, 4_000] {
        machines.arm("Snapshot", &format!("Slow {late}"));
        let slow = provider.pause("agent-slow-1").await.unwrap_err();
        assert!(slow.is_passing(), "{slow}");
        // Whoever asks what it does hears what is so, or that nobody knows.
        let began = Instant::now();
        while provider.state("agent-slow-1").await.map(|now| now.state).ok() != Some(State::Running) {
            assert!(began.elapsed() < SOON, "it does not go on");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let ticks = || machines.console("agent-slow-1").matches("tick").count();
        let before = ticks();
        soon(|| ticks() > before + 2).await;
    }
    let provider = machines.provider(json!({}));
    provider.pause("agent-slow-1").await.unwrap();
    assert_eq!((state(&provider, "agent-slow-1").await, machines.alive("").len()), (State::Paused, 0));
    assert_eq!(machines.files("agent-slow-1", ".memory"), 1, "what was half written is not kept");
    assert_eq!(machines.wrong(), "");
}

#[tokio::test]
async fn what_is_missing_is_said_and_nothing_is_left() {
    let machines = Machines::new();
    let spec = machines.waits("agent-none-1");
    let file = machines.at.join("rootfs");
    let long = machines.at.join("x".repeat(80));
    for (more, said) in [
        (json!({ "kvm": "/nowhere/kvm" }), "/nowhere/kvm cannot be opened"),
        (json!({ "firecracker": "/nowhere/firecracker" }), "no program `/nowhere/firecracker`"),
        (json!({ "kernel": "/nowhere/vmlinux" }), "no kernel `/nowhere/vmlinux`"),
        (json!({ "directory": long }), "longer than a socket's path"),
        (json!({ "format": ["/nowhere/mkfs"] }), "`/nowhere/mkfs`, which makes file systems, cannot be run"),
        (json!({ "format": ["false"] }), "`false`: exit status: 1"),
        (json!({ "directory": file.join("under") }), "Not a directory"),
        (json!({ "firecracker": "/bin/false" }), "its Firecracker has ended at once"),
    ] {
        let provider = machines.provider(more);
        let error = provider.create(&spec).await.unwrap_err();
        assert!(error.to_string().contains(said), "{error}");
        assert!(!machines.at.join("m/agent-none-1").exists(), "{said}");
    }
    let image = Spec { image: String::from("/nowhere/rootfs"), ..spec.clone() };
    let error = machines.provider(json!({})).create(&image).await.unwrap_err();
    assert!(matches!(&error, Error::Refused { what, .. } if what.contains("no image `/nowhere/rootfs`")), "{error}");
    // As many machines as networks.
    let network = json!({ "network": { "tap_prefix": "fc", "taps": 1, "first": "127.30.0.0" } });
    let provider = machines.provider(network);
    provider.create(&spec).await.unwrap();
    let second = machines.waits("agent-none-2");
    let error = provider.create(&second).await.unwrap_err();
    assert!(error.is_passing() && error.to_string().contains("all 1 networks are taken"), "{error}");
    provider.delete("agent-none-1").await.unwrap();
    provider.create(&second).await.unwrap();
    assert_eq!(machines.wrong(), "");
}

#[tokio::test]
async fn names_that_are_paths_reach_nothing() {
    let machines = Machines::new();
    let provider = machines.provider(json!({}));
    fs::create_dir_all(machines.at.join("m")).unwrap();
    for name in ["..", "../rootfs", "", "a/b", ".", "-x", "taps/"] {
        assert_eq!(state(&provider, name).await, State::Missing, "{name}");
        provider.delete(name).await.unwrap();
        assert!(matches!(provider.create(&machines.waits(name)).await, Err(Error::Refused { .. })), "{name}");
    }
    assert!(machines.at.join("rootfs").exists() && machines.at.join("m").exists());
    let exec = Exec { argv: vec![], env: BTreeMap::new(), stdin: vec![], timeout: SOON, detached: false };
    assert!(matches!(provider.exec("agent-1", &exec).await, Err(Error::Unsupported { hint: Some(_), .. })));
}

#[tokio::test]
async fn a_record_that_nobody_can_read_hides_no_other_and_is_not_gone() {
    let machines = Machines::new();
    let provider = machines.provider(json!({}));
    for key in ["agent-torn-1", "agent-torn-2"] {
        provider.create(&machines.waits(key)).await.unwrap();
    }
    let labels = BTreeMap::new();
    for (file, unread) in [("spec.json", 1), ("process.json", 0)] {
        let path = machines.at.join("m/agent-torn-1").join(file);
        let whole = fs::read(&path).unwrap();
        for torn in [r#"{"key": 7}"#, "{}", "", "\"?\""] {
            fs::write(&path, torn).unwrap();
            let page = provider.list(&labels, None).await.unwrap();
            let found: BTreeMap<String, State> = page.sandboxes.into_iter().map(|one| (one.native, one.state)).collect();
            assert_eq!(found.get("agent-torn-2"), Some(&State::Running), "{file}: {torn}");
            assert_eq!((found.len(), page.unread), (2 - unread, unread), "{file}: {torn}");
            assert!(found.values().all(|state| !state.is_gone()));
            assert!(provider.state("agent-torn-1").await.is_err_and(|error| error.is_passing()));
            assert!(provider.create(&machines.waits("agent-torn-1")).await.is_err_and(|error| error.is_passing()));
            assert_eq!(machines.alive("agent-torn-1").len(), 1, "it was made again");
            // Which network it has is not known, and no other gets it.
            assert_eq!(provider.create(&machines.waits("agent-torn-3")).await.is_ok(), unread == 0, "{file}: {torn}");
            provider.delete("agent-torn-3").await.unwrap();
        }
        fs::write(&path, whole).unwrap();
    }
    assert_eq!(state(&provider, "agent-torn-1").await, State::Running);
    assert_eq!(provider.list(&labels, None).await.unwrap().sandboxes.len(), 2);
}
