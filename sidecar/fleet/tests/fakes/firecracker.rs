//! A Firecracker that does not exist: a real process with the real one's arguments and socket, whose machine is a process that runs the real init.
//!
//! It judges every request by the published contract and by the real one's order, and writes down what was wrong. Of a machine's memory it keeps
//! what the machine was told: what wakes up begins anew, which the real one's does not.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio, exit};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{HeaderMap, Method, StatusCode, Uri};
use axum::response::Response;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream, UnixListener};

use crate::fakes::contract::Contract;

const CONTRACT: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/specs/firecracker/api.json"));

pub(crate) struct Firecracker {
    /// The test's own directory.
    world: PathBuf,
    /// The jailer's, or `/`.
    root: PathBuf,
    id: String,
    payload_most: usize,
    contract: Contract,
    vm: Mutex<Vm>,
    /// One request after the other, whether or not anybody waits for the answer.
    turn: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct Vm {
    state: &'static str,
    told: BTreeMap<String, Value>,
    metadata: Option<Value>,
    tap: Option<File>,
    guest: Option<u32>,
}

type Answer = Result<Value, (u16, String)>;

fn fault(what: impl Into<String>) -> (u16, String) {
    (400, what.into())
}

/// As a process: never returns.
pub(crate) fn run(world: &Path, root: &Path, arguments: &[String]) -> ! {
    let mut given = BTreeMap::new();
    for two in arguments.chunks(2) {
        let [name, value] = two else { refuse(world, &format!("{arguments:?}")) };
        let jailed =
            root != Path::new("/") && ["--start-time-us", "--start-time-cpu-us", "--parent-cpu-time-us"].contains(&name.as_str());
        if !jailed && !["--api-sock", "--id", "--http-api-max-payload-size", "--level"].contains(&name.as_str()) {
            refuse(world, &format!("the argument {name}"));
        }
        given.insert(name.as_str(), value.as_str());
    }
    // Cargo's are in the environment of whoever begins it.
    if std::env::vars().any(|(name, _)| name.starts_with("CARGO")) {
        refuse(world, "it has its parent's environment");
    }
    let socket = root.join(given["--api-sock"].trim_start_matches('/'));
    let firecracker = Arc::new(Firecracker {
        world: world.to_owned(),
        root: root.to_owned(),
        id: given["--id"].to_owned(),
        payload_most: given.get("--http-api-max-payload-size").map_or(51200, |most| most.parse().unwrap()),
        contract: Contract::parse(CONTRACT),
        vm: Mutex::new(Vm { state: "Not started", ..Vm::default() }),
        turn: tokio::sync::Mutex::default(),
    });
    if given.get("--level").is_none_or(|level| *level == "Info") {
        println!("2026-11-27T07:30:27.910486045 [{}:main] Running Firecracker v1.17.0", firecracker.id);
    }
    fs::write(world.join("alive").join(format!("{}.{}", firecracker.id, std::process::id())), "").unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async move {
        let Ok(listener) = UnixListener::bind(&socket) else {
            println!("Failed to open the API socket at: {}. Check that it is not already used.", socket.display());
            exit(1);
        };
        let handler = move |method: Method, uri: Uri, headers: HeaderMap, body: Bytes| {
            let firecracker = firecracker.clone();
            async move {
                let handled = tokio::spawn(async move {
                    let _turn = firecracker.turn.lock().await;
                    firecracker.clone().handle(&method, &uri, &headers, &body).await
                });
                // What unwinds takes its connection along.
                handled.await.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
            }
        };
        axum::serve(listener, axum::Router::new().fallback(handler)).await.unwrap();
    });
    exit(0)
}

fn refuse(world: &Path, what: &str) -> ! {
    note(world, what);
    println!("{what}");
    exit(153)
}

fn note(world: &Path, what: &str) {
    let mut file = OpenOptions::new().create(true).append(true).open(world.join("wrong")).unwrap();
    writeln!(file, "{what}").unwrap();
}

/// Taken by whoever is first: of all processes.
fn armed(world: &Path, call: &str) -> Option<String> {
    let path = world.join("faults").join(call);
    let mine = world.join(format!("taken-{}", std::process::id()));
    let fault = fs::read_to_string(&path).ok()?;
    fs::rename(path, mine).ok().map(|()| fault)
}

impl Firecracker {
    async fn handle(self: Arc<Self>, method: &Method, uri: &Uri, headers: &HeaderMap, body: &[u8]) -> Response {
        let path = uri.path();
        let call = match path {
            "/" => "State",
            "/actions" if body.windows(13).any(|part| part == b"InstanceStart") => "Create",
            "/snapshot/create" => "Snapshot",
            _ => "",
        };
        let fault = armed(&self.world, call);
        let (word, number) = fault.as_deref().and_then(|fault| fault.split_once(' ')).unwrap_or_default();
        if word == "Status" {
            return respond(Err((number.parse().unwrap(), String::from("told to"))));
        }
        if word == "Full" {
            return respond(Err((400, String::from("Cannot write memory: No space left on device (os error 28)"))));
        }
        let parts: Vec<String> = path.trim_start_matches('/').split('/').map(str::to_owned).collect();
        let mut answer = match self.contract.request(method.as_str(), &parts, &[], body) {
            Err(why) => Err((400, why)),
            Ok(()) if body.len() > self.payload_most => Err((400, String::from("Request payload too large"))),
            Ok(()) if !body.is_empty() && headers.get("content-type").is_none_or(|kind| kind != "application/json") => {
                Err((400, String::from("a body that is no JSON")))
            }
            Ok(()) => self.clone().answer(method, path, serde_json::from_slice(body).unwrap_or_default()),
        };
        if let Err((_, why)) = &answer
            && !why.contains("(os error")
        {
            note(&self.world, &format!("{method} {path}: {why}"));
        }
        match word {
            "LoseAnswer" => std::panic::resume_unwind(Box::new("told to")),
            "Slow" => tokio::time::sleep(Duration::from_millis(number.parse().unwrap())).await,
            "UnknownState" => answer.as_mut().unwrap()["state"] = json!("Hibernating"),
            "UnknownField" => answer.as_mut().unwrap()["newer"] = json!([1]),
            _ => {}
        }
        respond(answer)
    }

    fn here(&self, told: &Value) -> PathBuf {
        self.root.join(told.as_str().unwrap().trim_start_matches('/'))
    }

    fn answer(self: Arc<Self>, method: &Method, path: &str, body: Value) -> Answer {
        let mut vm = self.vm.lock().unwrap();
        if method == Method::GET {
            return Ok(json!({ "app_name": "Firecracker", "id": self.id, "state": vm.state, "vmm_version": "1.17.0" }));
        }
        let booted = vm.state != "Not started";
        let before = |what: &str| match booted {
            true => Err(fault(format!("{what}: not supported after starting the microVM"))),
            false => Ok(()),
        };
        match path {
            "/vm" if !booted => return Err(fault("The requested operation is not supported before starting the microVM.")),
            "/vm" => {
                let (state, signal) = match body["state"].as_str().unwrap() {
                    "Paused" => ("Paused", "-STOP"),
                    _ => ("Running", "-CONT"),
                };
                vm.state = state;
                kill(signal, &format!("-{}", vm.guest.unwrap()));
            }
            "/snapshot/create" if vm.state != "Paused" => return Err(fault("the microVM is not paused")),
            "/snapshot/create" => {
                for name in ["mem_file_path", "snapshot_path"] {
                    if self.here(&body[name]).exists() {
                        return Err(fault("a snapshot over one that may be somebody's memory"));
                    }
                }
                fs::write(self.here(&body["mem_file_path"]), json!(vm.metadata).to_string()).unwrap();
                fs::write(self.here(&body["snapshot_path"]), json!(vm.told).to_string()).unwrap();
            }
            "/snapshot/load" => {
                before(path)?;
                if vm.told.keys().any(|path| path != "/logger") {
                    return Err(fault("Loading a microVM snapshot not allowed after configuring boot-specific resources."));
                }
                let memory = fs::read(self.here(&body["mem_backend"]["backend_path"]));
                let state = fs::read(self.here(&body["snapshot_path"]));
                let (Ok(memory), Ok(state)) = (memory, state) else {
                    // It says so, and then it is no more.
                    tokio::spawn(async {
                        tokio::time::sleep(Duration::from_millis(50)).await;
                        exit(1)
                    });
                    return Err(fault(
                        "Load snapshot error: Failed to restore from snapshot: Failed to load guest memory: No such file or directory (os error 2)",
                    ));
                };
                vm.told = serde_json::from_slice(&state).unwrap();
                vm.metadata = serde_json::from_slice(&memory).unwrap();
                self.boot(&mut vm)?;
                vm.state = "Paused";
                kill("-STOP", &format!("-{}", vm.guest.unwrap()));
                if body["resume_vm"] == true {
                    return Err(fault("it was to be resumed by hand"));
                }
            }
            "/actions" if body["action_type"] == "SendCtrlAltDel" && vm.state == "Running" => {
                kill("-INT", &vm.guest.unwrap().to_string());
            }
            "/actions" if body["action_type"] == "InstanceStart" => {
                before(path)?;
                if !vm.told.contains_key("/boot-source") {
                    return Err(fault("Cannot start microvm without kernel configuration."));
                }
                self.boot(&mut vm)?;
                vm.state = "Running";
            }
            "/mmds" if !vm.told.contains_key("/mmds/config") => return Err(fault("The MMDS data store is not initialized")),
            "/mmds" => vm.metadata = Some(body),
            "/mmds/config" if !vm.told.contains_key("/network-interfaces/eth0") => {
                return Err(fault("The list of network interface IDs that allow forwarding MMDS requests is empty"));
            }
            "/actions" => return Err(fault("not now")),
            _ => {
                before(path)?;
                for name in ["kernel_image_path", "path_on_host", "log_path"] {
                    if body.get(name).is_some_and(|told| File::open(self.here(told)).is_err()) {
                        return Err(fault(format!("{path}: {name} cannot be opened")));
                    }
                }
                let named = path.strip_prefix("/drives/").or(path.strip_prefix("/network-interfaces/"));
                if named.is_some_and(|id| [&body["drive_id"], &body["iface_id"]].iter().all(|has| *has != id)) {
                    return Err(fault(format!("{path}: the id in the path is not the body's")));
                }
                vm.told.insert(path.to_owned(), body);
            }
        }
        Ok(Value::Null)
    }

    /// The machine: a process with the real init, that is asked for by the metadata service that it alone reaches.
    fn boot(self: &Arc<Self>, vm: &mut Vm) -> Result<(), (u16, String)> {
        let tap = vm.told["/network-interfaces/eth0"]["host_dev_name"].as_str().unwrap();
        let tap = OpenOptions::new().create(true).append(true).open(self.world.join("taps").join(tap)).unwrap();
        if rustix::fs::flock(&tap, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_err() {
            return Err(fault("Open tap device failed: Resource busy (os error 16)"));
        }
        vm.tap = Some(tap);
        let arguments = vm.told["/boot-source"]["boot_args"].as_str().unwrap();
        let address = arguments.split_once(" ip=").unwrap().1.split(':').next().unwrap().to_owned();
        if let Some(vsock) = vm.told.get("/vsock") {
            let listener =
                UnixListener::bind(self.here(&vsock["uds_path"])).map_err(|_| fault("the vsock's socket is in use"))?;
            tokio::spawn(vsock_to(listener, address.clone()));
        }
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let metadata = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(serve_metadata(TcpListener::from_std(listener).unwrap(), vm.metadata.clone().unwrap_or_default()));
        // A shell cannot hear what was ignored when it began, and whoever runs tests in the background ignores SIGINT.
        let mut command = Command::new("env");
        command
            .args(["--default-signal=INT", "setpriv", "--pdeathsig", "KILL", "sh"])
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy/firecracker/init"));
        command.env("AGENT_INIT_METADATA", metadata).env("GUEST_ADDRESS", address);
        // It would be root's, and so is whatever watches over it: it ends with us.
        let mut guest = command.stdin(Stdio::null()).process_group(0).spawn().unwrap();
        vm.guest = Some(guest.id());
        std::thread::spawn(move || {
            halt(&mut guest);
        });
        Ok(())
    }
}

/// What restarts ends, and Firecracker with it.
fn halt(guest: &mut Child) -> ! {
    drop(guest.wait());
    println!("[    1.234567] reboot: Restarting system");
    exit(0)
}

fn kill(signal: &str, whom: &str) {
    assert!(Command::new("kill").args([signal, "--", whom]).status().unwrap().success());
}

fn respond(answer: Answer) -> Response {
    let (status, body) = match answer {
        Ok(Value::Null) => return Response::builder().status(204).body(Body::empty()).unwrap(),
        Ok(body) => (200, body),
        Err((status, why)) => (status, json!({ "fault_message": why })),
    };
    let answer = Response::builder().status(StatusCode::from_u16(status).unwrap()).header("content-type", "application/json");
    answer.body(Body::from(body.to_string())).unwrap()
}

/// Version 2: a token first, and then leaves as plain text.
async fn serve_metadata(listener: TcpListener, data: Value) {
    let handler = move |method: Method, uri: Uri, headers: HeaderMap| {
        let data = data.clone();
        async move {
            let answer = |status: u16, text: &str| Response::builder().status(status).body(Body::from(text.to_owned())).unwrap();
            match (method.as_str(), uri.path()) {
                ("PUT", "/latest/api/token") if headers.contains_key("x-metadata-token-ttl-seconds") => answer(200, "a-token="),
                ("GET", _) if headers.get("x-metadata-token").is_none_or(|token| token != "a-token=") => answer(401, ""),
                ("GET", path) => data.pointer(path).and_then(Value::as_str).map_or(answer(404, ""), |leaf| answer(200, leaf)),
                _ => answer(405, ""),
            }
        }
    };
    axum::serve(listener, axum::Router::new().fallback(handler)).await.unwrap();
}

/// As Firecracker does it: what the machine does not listen to is closed.
async fn vsock_to(listener: UnixListener, address: String) {
    while let Ok((stream, _)) = listener.accept().await {
        let address = address.clone();
        tokio::spawn(async move {
            let mut stream = BufReader::new(stream);
            let mut line = String::new();
            stream.read_line(&mut line).await.unwrap();
            let port = line.strip_prefix("CONNECT ").and_then(|port| port.strip_suffix('\n')?.parse::<u16>().ok());
            let Ok(mut guest) = TcpStream::connect((address.as_str(), port.unwrap_or(0))).await else { return };
            stream.write_all(b"OK 1073741824\n").await.unwrap();
            drop(tokio::io::copy_bidirectional(&mut stream, &mut guest).await);
        });
    }
}
