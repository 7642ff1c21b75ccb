//! The providers of Docker on a real daemon: `AGENT_FLEET_TEST_DOCKER` is its socket, `AGENT_FLEET_TEST_IMAGE` an image with a busybox, and
//! `AGENT_FLEET_TEST_NETWORK` a network of the daemon's with addresses. tests/fleet/run has them. Without a daemon nothing is tried, and that is said.
//!
//! Between the provider and the daemon is a proxy that loses, cuts and delays its answers.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use agent_fleet::provider::docker::{Docker, IMAGE_ID_LABEL, Reach, Settings};
use agent_fleet::provider::{ENDS_LABEL, Error, Exec, FLEET_LABEL, Provider, Size, Spec, State};
use async_trait::async_trait;
use bollard::query_parameters::{ListContainersOptionsBuilder, LogsOptionsBuilder};
use conformance::{Call, Does, Fault, World};
use futures_util::StreamExt;
use jiff::Timestamp;
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::{UnixListener, UnixStream};

mod conformance;

/// Makes containers do what is asked for: a busybox is in the image.
fn script(does: Does) -> String {
    match does {
        Does::Wait => String::from("trap 'exit 0' TERM; echo ready; while :; do sleep 1 & wait $!; done"),
        Does::Ignore => String::from("trap '' TERM; echo ready; while :; do sleep 1; done"),
        Does::Exit(code) => format!("echo exits with {code}; exit {code}"),
        Does::Serve(port) => format!("mkdir /www; echo here > /www/index.html; exec httpd -f -p {port} -h /www"),
    }
}

/// The daemon, directly and through the proxy.
struct Daemon {
    socket: String,
    image: String,
    network: String,
    proxy: Proxy,
}

impl Daemon {
    async fn find(test: &str) -> Option<Self> {
        let found = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let Some(socket) = found("AGENT_FLEET_TEST_DOCKER") else {
            eprintln!("{test}: not tried, for there is no AGENT_FLEET_TEST_DOCKER; tests/fleet/run has one");
            return None;
        };
        let image = found("AGENT_FLEET_TEST_IMAGE").expect("AGENT_FLEET_TEST_IMAGE is with the socket");
        let network = found("AGENT_FLEET_TEST_NETWORK").expect("AGENT_FLEET_TEST_NETWORK is with the socket");
        let proxy = Proxy::start(socket.trim_start_matches("unix://").into()).await;
        Some(Self { socket, image, network, proxy })
    }

    fn settings(&self) -> Settings {
        let socket = format!("unix://{}", self.proxy.at.display());
        Settings { socket, network: Some(self.network.clone()), ..Settings::default() }
    }

    fn command(&self, script: &str) -> Spec {
        Spec {
            key: format!("agent-{}", &uuid::Uuid::now_v7().simple().to_string()[12..]),
            image: self.image.clone(),
            command: ["sh", "-c", script].map(String::from).to_vec(),
            env: BTreeMap::new(),
            secrets: BTreeMap::new(),
            // 1 CPU is what every machine has.
            size: Size::default(),
            ports: Vec::new(),
            labels: BTreeMap::from([(String::from(FLEET_LABEL), String::from("test"))]),
            ttl: Duration::from_secs(3600),
            idle: None,
            avoid: vec![],
        }
    }

    fn client(&self) -> bollard::Docker {
        bollard::Docker::connect_with_unix(&self.socket, 60, bollard::API_DEFAULT_VERSION).expect("a socket")
    }

    /// All containers' names, in whatever state.
    async fn names(&self) -> Vec<String> {
        let client = self.client().negotiate_version().await.expect("a daemon");
        let all = client.list_containers(Some(ListContainersOptionsBuilder::new().all(true).build())).await.expect("a list");
        all.into_iter()
            .flat_map(|found| found.names.into_iter().flatten())
            .map(|name| name.trim_start_matches('/').to_owned())
            .collect()
    }
}

#[async_trait]
impl World for Daemon {
    fn spec(&self, does: Does) -> Option<Spec> {
        Some(self.command(&script(does)))
    }

    fn price_usd(&self) -> f64 {
        0.035848
    }

    fn page(&self) -> Option<usize> {
        None
    }

    fn arm(&self, call: Call, fault: Fault) -> bool {
        // What the client does not show of an answer: its headers.
        if matches!(fault, Fault::Limit(_) | Fault::LimitUntil(_)) || matches!((call, fault), (Call::State, Fault::Garbled(_))) {
            return false;
        }
        self.proxy.armed.lock().expect("nobody panics with it").push((call, fault));
        true
    }

    fn armed(&self) -> usize {
        self.proxy.armed.lock().expect("nobody panics with it").len()
    }

    async fn count(&self, key: &str) -> usize {
        self.names().await.iter().filter(|name| *name == key).count()
    }

    async fn listens(&self, native: &str) {
        let all = LogsOptionsBuilder::new().stdout(true).follow(true).build();
        let mut said = self.client().logs(native, Some(all));
        let ready = async { while !said.next().await.expect("it has ended").expect("a log").to_string().contains("ready") {} };
        tokio::time::timeout(Duration::from_secs(60), ready).await.expect("it is not ready");
    }
}

/// One connection is one request: the client keeps none.
struct Proxy {
    at: PathBuf,
    armed: Arc<Mutex<Vec<(Call, Fault)>>>,
}

impl Proxy {
    async fn start(daemon: PathBuf) -> Self {
        let at = std::env::temp_dir().join(format!("agent-fleet-{}.sock", uuid::Uuid::now_v7()));
        let armed = Arc::<Mutex<Vec<(Call, Fault)>>>::default();
        let listener = UnixListener::bind(&at).expect("a socket");
        let faults = armed.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                // A connection that breaks is the client's to notice.
                tokio::spawn(pass(client, daemon.clone(), faults.clone()));
            }
        });
        Self { at, armed }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        std::fs::remove_file(&self.at).expect("our socket");
    }
}

fn call(head: &str) -> Option<Call> {
    let mut words = head.split(' ');
    let (method, path) = (words.next()?, words.next()?.split('?').next()?);
    let parts: Vec<&str> = path.split('/').skip_while(|part| *part != "containers").collect();
    match (method, parts.as_slice()) {
        ("POST", ["containers", "create"]) => Some(Call::Create),
        ("GET", ["containers", "json"]) => Some(Call::List),
        ("GET", ["containers", _, "json"]) => Some(Call::State),
        ("DELETE", ["containers", _]) => Some(Call::Delete),
        _ => None,
    }
}

async fn pass(mut client: UnixStream, daemon: PathBuf, armed: Arc<Mutex<Vec<(Call, Fault)>>>) -> std::io::Result<()> {
    let mut asked = Vec::new();
    let end = loop {
        if client.read_buf(&mut asked).await? == 0 {
            return Ok(());
        }
        if let Some(end) = asked.windows(4).position(|four| four == b"\r\n\r\n") {
            break end + 4;
        }
    };
    let head = String::from_utf8_lossy(&asked[..end]).into_owned();
    let fault = {
        let mut armed = armed.lock().expect("nobody panics with it");
        let at = armed.iter().position(|(on, _)| Some(*on) == call(&head));
        at.map(|at| armed.remove(at).1)
    };
    let Some(fault) = fault else {
        let mut daemon = UnixStream::connect(daemon).await?;
        daemon.write_all(&asked).await?;
        copy_bidirectional(&mut client, &mut daemon).await?;
        return Ok(());
    };
    if let Fault::Status(status) = fault {
        let said = r#"{"message":"as it was told to"}"#;
        let answer =
            format!("HTTP/1.1 {status} Told\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{said}", said.len());
        return client.write_all(answer.as_bytes()).await;
    }
    let length = head.lines().find_map(|line| line.to_ascii_lowercase().strip_prefix("content-length:")?.trim().parse().ok());
    while asked.len() < end + length.unwrap_or(0) {
        client.read_buf(&mut asked).await?;
    }
    // Its whole answer, which ends with the connection.
    let mut upstream = UnixStream::connect(daemon).await?;
    upstream.write_all(&asked[..end - 2]).await?;
    upstream.write_all(b"Connection: close\r\n\r\n").await?;
    upstream.write_all(&asked[end..]).await?;
    let mut answer = Vec::new();
    upstream.read_to_end(&mut answer).await?;
    match fault {
        Fault::LoseAnswer => return Ok(()),
        Fault::CutAnswer => answer.truncate(answer.len() - 5),
        Fault::Slow(by) => tokio::time::sleep(by).await,
        // Of the same length, so that the answer's still is.
        Fault::UnknownState => answer = replaced(&answer, r#""Status":"created""#, r#""Status":"wobbles""#),
        Fault::UnknownField => answer = replaced(&answer, r#""HostnamePath""#, r#""WobblingPath""#),
        // The first of a list.
        Fault::Garbled(n) if n % 2 == 0 => answer = replaced_once(&answer, r#""Id":""#, r#""Ix":""#),
        Fault::Garbled(_) => answer = replaced_once(&answer, r#""State":"running""#, r#""State":"wobbles""#),
        Fault::Status(_) | Fault::Limit(_) | Fault::LimitUntil(_) => unreachable!("answered above, and never armed"),
    }
    client.write_all(&answer).await
}

fn replaced(answer: &[u8], old: &str, new: &str) -> Vec<u8> {
    let text = String::from_utf8_lossy(answer);
    assert!(text.contains(old), "the daemon does not say {old}: {text}");
    text.replace(old, new).into_bytes()
}

fn replaced_once(answer: &[u8], old: &str, new: &str) -> Vec<u8> {
    let text = String::from_utf8_lossy(answer);
    assert!(text.contains(old), "the daemon does not say {old}: {text}");
    text.replacen(old, new, 1).into_bytes()
}

fn shell(script: &str) -> Exec {
    let argv = ["sh", "-c", script].map(String::from).to_vec();
    Exec { argv, env: BTreeMap::new(), stdin: Vec::new(), timeout: Duration::from_secs(60), detached: false }
}

#[tokio::test]
async fn docker_does_what_every_provider_must() {
    let Some(daemon) = Daemon::find("docker").await else { return };
    conformance::run(&Docker::new(daemon.settings()), &daemon).await;
}

#[tokio::test]
async fn gvisor_does_what_every_provider_must() {
    let Some(daemon) = Daemon::find("gvisor").await else { return };
    if std::env::var("AGENT_FLEET_TEST_GVISOR").as_deref() != Ok("1") {
        eprintln!("gvisor: not tried, for the daemon has no runtime of that name (AGENT_FLEET_TEST_GVISOR=1)");
        return;
    }
    let provider = Docker::gvisor(daemon.settings());
    // That it is gVisor is seen from the inside: its kernel is its own.
    let spec = daemon.command("dmesg; sleep 1000");
    let made = provider.create(&spec).await.expect("create");
    provider.start(&made.native).await.expect("start");
    let said = provider.exec(&made.native, &shell("dmesg")).await.expect("exec");
    assert!(String::from_utf8_lossy(&said.stdout).contains("gVisor"), "{said:?}");
    provider.delete(&made.native).await.expect("delete");
    conformance::run(&provider, &daemon).await;
}

/// A container that is deleted with its test.
struct Up<'a> {
    provider: &'a Docker,
    native: String,
}

impl<'a> Up<'a> {
    async fn start(provider: &'a Docker, spec: &Spec) -> Self {
        let native = provider.create(spec).await.expect("create").native;
        provider.start(&native).await.expect("start");
        Self { provider, native }
    }

    async fn run(&self, script: &str) -> String {
        let done = self.provider.exec(&self.native, &shell(script)).await.expect("exec");
        assert_eq!(done.exit_code, Some(0), "{script}: {done:?}");
        String::from_utf8(done.stdout).expect("text").trim().to_owned()
    }

    async fn over(&self) -> agent_fleet::provider::Sandbox {
        for _ in 0..600 {
            let now = self.provider.state(&self.native).await.expect("state");
            if now.state == State::Stopped {
                return now;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        panic!("it does not end");
    }

    async fn delete(self) {
        self.provider.delete(&self.native).await.expect("delete");
    }
}

#[tokio::test]
async fn a_container_has_few_rights_and_bounds() {
    let Some(daemon) = Daemon::find("rights").await else { return };
    let settings = Settings {
        read_only: true,
        tmpfs: [(String::from("/scratch"), String::from("size=1m"))].into(),
        pids: 77,
        ..daemon.settings()
    };
    let provider = Docker::new(settings);
    let before = Timestamp::now();
    let up = Up::start(
        &provider,
        &Spec { size: Size { cpu_milli: 250, memory_mib: 64, disk_mib: 0 }, ..daemon.command(&script(Does::Wait)) },
    )
    .await;
    assert_eq!(up.run("grep CapEff /proc/self/status | cut -f 2").await, "0000000000000000");
    assert_eq!(up.run("grep NoNewPrivs /proc/self/status | cut -f 2").await, "1");
    assert_eq!(up.run("touch /x 2>&1 || true").await, "touch: /x: Read-only file system");
    assert_eq!(up.run("touch /scratch/x && echo yes").await, "yes");
    let now = provider.state(&up.native).await.expect("state");
    assert_eq!(now.size, Some(Size { cpu_milli: 250, memory_mib: 64, disk_mib: 0 }));
    let ends: Timestamp = now.labels[ENDS_LABEL].parse().expect("a time");
    let life = ends.duration_since(before).unsigned_abs();
    assert!(life >= Duration::from_secs(3600) && life < Duration::from_secs(3700), "{life:?}");
    assert!(now.labels[IMAGE_ID_LABEL].starts_with("sha256:"), "{:?}", now.labels);
    let host = daemon.client().inspect_container(&up.native, None).await.expect("inspect").host_config.expect("a host config");
    assert_eq!((host.pids_limit, host.memory_swap), (Some(77), Some(64 << 20)));
    assert_eq!(host.log_config.and_then(|log| log.typ).as_deref(), Some("local"));
    up.delete().await;
}

#[tokio::test]
async fn who_takes_too_much_memory_is_said_to() {
    let Some(daemon) = Daemon::find("memory").await else { return };
    let provider = Docker::new(daemon.settings());
    // The shell itself grows, so that it is the container's first process that is killed.
    let grows = "x=xxxxxxxxxxxxxxxx; while :; do x=$x$x; done";
    let up = Up::start(&provider, &Spec { size: Size { memory_mib: 16, ..Size::default() }, ..daemon.command(grows) }).await;
    let over = up.over().await;
    assert_eq!((over.exit_code, over.reason.as_deref()), (Some(137), Some("out of memory")));
    let listed = provider.list(&over.labels, None).await.expect("list").sandboxes;
    assert_eq!(listed.first().and_then(|found| found.exit_code), Some(137));
    up.delete().await;
}

#[tokio::test]
async fn a_name_that_is_somebody_elses_is_refused_and_left_alone() {
    let Some(daemon) = Daemon::find("name").await else { return };
    let provider = Docker::new(daemon.settings());
    let spec = daemon.command(&script(Does::Wait));
    let other = Spec { labels: [(String::from(FLEET_LABEL), String::from("another"))].into(), ..spec.clone() };
    let theirs = Up::start(&provider, &other).await;
    let refused = provider.create(&spec).await;
    assert!(matches!(&refused, Err(Error::Refused { what, .. }) if what.contains("not this fleet's")), "{refused:?}");
    assert_eq!(provider.state(&theirs.native).await.expect("state").state, State::Running);
    theirs.delete().await;
}

#[tokio::test]
async fn what_cannot_be_made_leaves_nothing() {
    let Some(daemon) = Daemon::find("nothing").await else { return };
    let spec = daemon.command(&script(Does::Wait));
    let no_pull = Docker::new(Settings { pull: false, ..daemon.settings() });
    let provider = Docker::new(daemon.settings());
    let away = Spec { image: String::from("127.0.0.1:1/no/such:image"), ..spec.clone() };
    let refused = no_pull.create(&away).await;
    assert!(matches!(&refused, Err(Error::Refused { what, .. }) if what.contains("`pull` is off")), "{refused:?}");
    let failed = provider.create(&away).await;
    assert!(matches!(&failed, Err(Error::Failed { what, .. }) if what.contains("127.0.0.1:1/no/such:image")), "{failed:?}");
    let too_much = Spec { size: Size { cpu_milli: 1_000_000, ..Size::default() }, ..spec.clone() };
    let refused = provider.create(&too_much).await;
    assert!(matches!(&refused, Err(Error::Refused { .. })), "{refused:?}");
    assert!(!daemon.names().await.contains(&spec.key));

    let no_program = Spec { command: vec![String::from("/no/such/program")], ..spec };
    let native = provider.create(&no_program).await.expect("create").native;
    let refused = provider.start(&native).await;
    assert!(matches!(&refused, Err(Error::Refused { what, .. }) if what.contains("/no/such/program")), "{refused:?}");
    assert!(provider.state(&native).await.expect("state").reason.is_some_and(|why| why.contains("/no/such/program")));
    provider.delete(&native).await.expect("delete");
}

#[tokio::test]
async fn a_daemon_that_is_away_is_a_passing_failure_and_comes_back() {
    let Some(daemon) = Daemon::find("away").await else { return };
    let at = std::env::temp_dir().join(format!("agent-fleet-{}.sock", uuid::Uuid::now_v7()));
    let provider = Docker::new(Settings { socket: at.display().to_string(), ..daemon.settings() });
    let spec = daemon.command(&script(Does::Wait));
    for tcp in [false, true] {
        let nobody = Docker::new(Settings { socket: String::from("tcp://127.0.0.1:1"), ..daemon.settings() });
        let failed = if tcp { nobody.create(&spec).await } else { provider.create(&spec).await };
        assert!(matches!(&failed, Err(Error::Failed { .. })), "{failed:?}");
    }
    std::os::unix::fs::symlink(Path::new(daemon.socket.trim_start_matches("unix://")), &at).expect("a link");
    let up = Up::start(&provider, &spec).await;
    std::fs::remove_file(&at).expect("a link");
    // It is not known what became of it: that is not that it is gone.
    let unknown = provider.state(&up.native).await;
    assert!(matches!(&unknown, Err(Error::Failed { .. })), "{unknown:?}");
    let lost = provider.delete(&up.native).await;
    assert!(matches!(&lost, Err(error) if error.is_passing()), "{lost:?}");
    Docker::new(daemon.settings()).delete(&up.native).await.expect("delete");
}

#[tokio::test]
async fn a_proxys_404_does_not_say_that_a_container_is_gone() {
    let Some(daemon) = Daemon::find("404").await else { return };
    let provider = Docker::new(daemon.settings());
    let up = Up::start(&provider, &daemon.command(&script(Does::Wait))).await;
    assert!(daemon.arm(Call::State, Fault::Status(404)));
    let told = provider.state(&up.native).await;
    assert!(matches!(&told, Err(Error::Refused { .. })), "{told:?}");
    up.delete().await;
}

#[tokio::test]
async fn a_port_is_reached_at_the_containers_own_address() {
    let Some(daemon) = Daemon::find("address").await else { return };
    let provider = Docker::new(Settings { reach: Reach::Container, ..daemon.settings() });
    let up = Up::start(&provider, &Spec { ports: vec![8080], ..daemon.command(&script(Does::Serve(8080))) }).await;
    let at = provider.endpoint(&up.native, 8080).await.expect("endpoint");
    assert!(!at.url.contains("127.0.0.1"), "{at:?}");
    conformance::serves(&at).await;
    let published = Docker::new(daemon.settings());
    let refused = published.endpoint(&up.native, 9).await;
    assert!(matches!(&refused, Err(Error::Refused { .. })), "{refused:?}");
    up.delete().await;
}

#[tokio::test]
async fn a_daemon_is_reached_over_tcp() {
    let Some(daemon) = Daemon::find("tcp").await else { return };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let socket = format!("tcp://{}", listener.local_addr().expect("a port"));
    let behind = daemon.socket.trim_start_matches("unix://").to_owned();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let behind = behind.clone();
            tokio::spawn(async move {
                let mut daemon = UnixStream::connect(behind).await?;
                copy_bidirectional(&mut client, &mut daemon).await
            });
        }
    });
    let provider = Docker::new(Settings { socket, ..daemon.settings() });
    let up = Up::start(&provider, &daemon.command(&script(Does::Wait))).await;
    let said = provider.exec(&up.native, &Exec { stdin: b"here\n".to_vec(), ..shell("cat") }).await.expect("exec");
    assert_eq!((said.exit_code, said.stdout), (Some(0), b"here\n".to_vec()));
    up.delete().await;
}

/// A command that has closed its output is waited for; one whose connection breaks off is not taken for one that has said all.
#[tokio::test]
async fn a_command_that_says_no_more_is_waited_for() {
    let Some(daemon) = Daemon::find("silent").await else { return };
    let provider = Docker::new(daemon.settings());
    let up = Up::start(&provider, &daemon.command(&script(Does::Wait))).await;
    let said = provider.exec(&up.native, &shell("echo said; exec >&- 2>&-; sleep 1; exit 5")).await.expect("exec");
    assert_eq!((said.exit_code, said.stdout), (Some(5), b"said\n".to_vec()));
    up.delete().await;
}

/// A daemon that says what a test has written down, and counts what it is asked.
struct Scripted {
    at: PathBuf,
    list: Arc<Mutex<String>>,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Scripted {
    fn start() -> Self {
        let at = std::env::temp_dir().join(format!("agent-fleet-{}.sock", uuid::Uuid::now_v7()));
        let listener = UnixListener::bind(&at).expect("a socket");
        let (list, asked) = (Arc::<Mutex<String>>::default(), Arc::<Mutex<Vec<String>>>::default());
        let scripted = Self { at, list: list.clone(), asked: asked.clone() };
        tokio::spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") && client.read_buf(&mut head).await.expect("a request") > 0 {}
                let head = String::from_utf8_lossy(&head).into_owned();
                let path = head.split(' ').nth(1).unwrap_or_default().split('?').next().unwrap_or_default().to_owned();
                let body = match path.ends_with("/containers/json") {
                    true => list.lock().expect("nobody panics with it").clone(),
                    false => String::from(r#"{"ApiVersion": "1.47", "Version": "27.0"}"#),
                };
                asked.lock().expect("nobody panics with it").push(path);
                let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close";
                let answer = format!("{head}\r\nContent-Length: {}\r\n\r\n{body}", body.len());
                client.write_all(answer.as_bytes()).await.expect("it listens");
            }
        });
        scripted
    }

    fn says(&self, list: &str) {
        list.clone_into(&mut self.list.lock().expect("nobody panics with it"));
    }

    fn provider(&self) -> Docker {
        Docker::new(Settings { socket: format!("unix://{}", self.at.display()), ..Settings::default() })
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        std::fs::remove_file(&self.at).expect("our socket");
    }
}

fn listed(n: usize, more: &str) -> String {
    let labels = format!(r#"{{"agent-fleet.key": "agent-{n}-1", "agent-fleet.fleet": "test"}}"#);
    format!(
        r#"{{"Id": "id-{n}", "State": "running", "Status": "Up 2 minutes", "Created": 1800000000, "Labels": {labels}{more}}}"#
    )
}

#[tokio::test]
async fn a_list_of_many_containers_is_one_request() {
    let daemon = Scripted::start();
    let provider = daemon.provider();
    let all: Vec<String> = (0..500).map(|n| listed(n, "")).collect();
    daemon.says(&format!("[{}]", all.join(",")));
    for _ in 0..2 {
        let page = provider.list(&BTreeMap::new(), None).await.expect("list");
        assert_eq!((page.sandboxes.len(), page.unread, page.next), (500, 0, None));
        let last = &page.sandboxes[499];
        assert_eq!((last.native.as_str(), last.key.as_deref(), &last.state), ("id-499", Some("agent-499-1"), &State::Running));
        assert_eq!(last.created, Timestamp::from_second(1_800_000_000).ok());
    }
    let asked = daemon.asked.lock().expect("nobody panics with it").clone();
    // What it speaks is asked for once.
    let lists = asked.iter().filter(|path| path.ends_with("/containers/json")).count();
    assert_eq!((lists, asked.len()), (2, 3), "{asked:?}");
}

#[tokio::test]
async fn what_the_client_does_not_know_of_one_container_hides_no_other() {
    let daemon = Scripted::start();
    let provider = daemon.provider();
    let well = listed(1, "");
    for (other, state) in [
        (well.replace("id-1", "id-2").replace("running", "wobbles"), Some(State::Unknown(String::from("wobbles")))),
        (well.replace("id-1", "id-2").replace(r#""running""#, "7"), Some(State::Unknown(String::from("unsaid")))),
        (well.replace("id-1", "id-2").replace("1800000000", r#""yesterday""#), Some(State::Running)),
        (listed(2, r#", "Ports": "all of them""#), Some(State::Running)),
        (well.replace(r#""id-1""#, "[1]"), None),
        (well.replace(r#""agent-1-1""#, "1"), None),
        (String::from("{}"), None),
        (String::from("null"), None),
    ] {
        daemon.says(&format!("[{other}, {well}]"));
        let page = provider.list(&BTreeMap::new(), None).await.expect("list");
        let of = |native: &str| page.sandboxes.iter().find(|one| one.native == native).map(|one| one.state.clone());
        assert_eq!(of("id-1"), Some(State::Running), "{other}");
        assert_eq!((of("id-2"), page.unread), (state.clone(), usize::from(state.is_none())), "{other}");
    }
    for none in [r#"{"message": "[]"}"#, r#"[{"Id": "#, "<html>"] {
        daemon.says(none);
        let failed = provider.list(&BTreeMap::new(), None).await;
        assert!(failed.as_ref().is_err_and(Error::is_passing), "{none}: {failed:?}");
    }
}
