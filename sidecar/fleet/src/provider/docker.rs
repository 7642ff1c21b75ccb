//! A Docker daemon on this machine or another, and the same with gVisor's runtime.
//!
//! It ends nothing by itself: the sidecar's lease and the reconciler do. A container has few rights unless the settings give it more.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bollard::container::LogOutput;
use bollard::errors::Error as ClientError;
use bollard::exec::{CreateExecOptions, StartExecOptions, StartExecResults};
use bollard::models::{
    ContainerCreateBody, ContainerInspectResponse, ContainerState, ContainerSummary, HealthStatusEnum, HostConfig,
    HostConfigLogConfig, PortBinding,
};
use bollard::query_parameters::{
    CreateContainerOptionsBuilder, CreateImageOptionsBuilder, EventsOptionsBuilder, ListContainersOptionsBuilder,
    LogsOptionsBuilder, RemoveContainerOptionsBuilder, StopContainerOptionsBuilder,
};
use bollard::{API_DEFAULT_VERSION, Docker as Client};
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use jiff::Timestamp;
use serde::Deserialize;
use tokio::io::AsyncWriteExt;
use tokio::sync::OnceCell;

use super::secret::{self, Value};
use super::{
    Capabilities, ENDS_LABEL, Endpoint, Error, Exec, Executed, FLEET_LABEL, Happened, KEY_LABEL, OUTPUT_MOST, Page, Pause, Price,
    Provider, Result, SESSION_LABEL, Sandbox, Size, Spec, State, refusals, rest,
};

/// The image as it was asked for. The container itself is made of [`IMAGE_ID_LABEL`]'s, whatever the name means later.
pub const IMAGE_LABEL: &str = "agent-fleet.image";
pub const IMAGE_ID_LABEL: &str = "agent-fleet.image-id";

/// A daemon answers within this, or does not: on a busy machine it takes seconds to make a container.
const CALL: Duration = Duration::from_secs(60);
/// Images for agents have gigabytes.
const PULL: Duration = Duration::from_secs(900);
/// A command that goes on for so long after its output has ended has not ended its output.
const BROKE_OFF: Duration = Duration::from_secs(10);
/// What a daemon says is not ours to repeat at length.
const SAID_MOST: usize = 400;
/// What tells the processes of one command from all others, to end them.
pub(super) const EXEC_MARK: &str = "AGENT_FLEET_EXEC";
/// A daemon cannot end what it has executed. Whoever has the mark inherited it.
pub(super) const END_MARKED: &str =
    r#"for p in /proc/[0-9]*; do grep -q "$1" $p/environ 2>/dev/null && kill -9 "${p#/proc/}"; done; true"#;
/// What changes a container's state. Its health checks alone would be thousands more.
const EVENTS: [&str; 9] = ["create", "start", "restart", "die", "oom", "pause", "unpause", "destroy", "health_status"];

/// How containers are made, and where.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// The daemon: `unix:///var/run/docker.sock`, a path, or `tcp://host:port`. TLS is not spoken: a daemon elsewhere is reached through a tunnel.
    pub socket: String,
    /// A runtime that the daemon knows. Not said: its own, or `runsc` for gVisor.
    pub runtime: Option<String>,
    /// A network that the daemon has. Not said: its own.
    pub network: Option<String>,
    /// Where ports are reached.
    pub reach: Reach,
    /// The daemon's address at which ports are published.
    pub publish_at: IpAddr,
    /// Whether an image that the daemon does not have is pulled.
    pub pull: bool,
    /// Not said: the image's.
    pub user: Option<String>,
    pub cap_drop: Vec<String>,
    pub cap_add: Vec<String>,
    pub no_new_privileges: bool,
    pub read_only: bool,
    /// Directories in memory, with their options: `/tmp = "size=64m"`.
    pub tmpfs: BTreeMap<String, String>,
    /// Files and volumes, as Docker writes them: `/srv/cache:/cache:ro`.
    pub binds: Vec<String>,
    /// Names of hosts: `fleet.internal:host-gateway`.
    pub extra_hosts: Vec<String>,
    pub pids: i64,
    /// Whether the size's disk is a limit: the daemon's storage must have quotas for that.
    pub limit_disk: bool,
    /// What keeps the containers' output. The default keeps it bounded; Docker's own does not.
    pub log_driver: String,
    pub log_options: BTreeMap<String, String>,
    /// Of the machine: USD per hour for a CPU, and for a GiB of memory.
    pub cpu_usd_per_hour: f64,
    pub gib_usd_per_hour: f64,
}

impl Settings {
    /// What could be read and is no use all the same.
    ///
    /// # Errors
    /// The setting, and what is wrong with it.
    pub fn check(&self) -> std::result::Result<(), (&'static str, String)> {
        let path = self.socket.strip_prefix("unix://").unwrap_or(&self.socket);
        let host = ["tcp://", "http://"].iter().find_map(|scheme| self.socket.strip_prefix(scheme));
        let port = host.and_then(|host| host.trim_end_matches('/').rsplit_once(':')).filter(|(host, _)| !host.is_empty());
        if !path.starts_with('/') && port.is_none_or(|(_, port)| port.parse::<u16>().is_err()) {
            let what = format!("`{}` is no daemon's address: it is a path, unix:///PATH or tcp://HOST:PORT", self.socket);
            return Err(("socket", what));
        }
        for bind in &self.binds {
            let inside = bind.split(':').nth(1);
            if !inside.is_some_and(|inside| inside.starts_with('/')) {
                return Err(("binds", format!("`{bind}` is not written as Docker does: /srv/cache:/cache:ro")));
            }
        }
        if let Some(host) = self.extra_hosts.iter().find(|host| !host.contains(':')) {
            return Err(("extra_hosts", format!("`{host}` is not written as Docker does: NAME:ADDRESS")));
        }
        Ok(())
    }
}

/// Where a port of a container is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reach {
    /// At a port of the daemon's machine.
    Published,
    /// At the container's own address: who asks is in its network, or on the daemon's machine.
    Container,
}

impl Default for Settings {
    fn default() -> Self {
        let log_options = [("max-size", "10m"), ("max-file", "3")];
        Self {
            socket: String::from("unix:///var/run/docker.sock"),
            runtime: None,
            network: None,
            reach: Reach::Published,
            publish_at: IpAddr::V4(Ipv4Addr::LOCALHOST),
            pull: true,
            user: None,
            cap_drop: vec![String::from("ALL")],
            cap_add: Vec::new(),
            no_new_privileges: true,
            read_only: false,
            tmpfs: BTreeMap::new(),
            binds: Vec::new(),
            extra_hosts: Vec::new(),
            pids: 1024,
            limit_disk: false,
            log_driver: String::from("local"),
            log_options: log_options.map(|(name, value)| (name.to_owned(), value.to_owned())).into(),
            cpu_usd_per_hour: OPENCOST.0,
            gib_usd_per_hour: OPENCOST.1,
        }
    }
}

/// What OpenCost takes for a machine whose price it does not know.
pub(super) const OPENCOST: (f64, f64) = (0.031611, 0.004237);

pub struct Docker {
    name: &'static str,
    settings: Settings,
    /// Connected, and speaking the daemon's version, once one has answered.
    client: OnceCell<Client>,
}

impl Docker {
    /// Touches nothing: the daemon may come later.
    pub fn new(settings: Settings) -> Self {
        Self { name: "docker", settings, client: OnceCell::new() }
    }

    /// The same with gVisor, whose runtime the daemon must know.
    pub fn gvisor(mut settings: Settings) -> Self {
        settings.runtime.get_or_insert_with(|| String::from("runsc"));
        Self { name: "gvisor", ..Self::new(settings) }
    }

    /// It writes whole requests, and with them secrets, into the `log` crate's records: those must not be listened to.
    async fn client(&self) -> Result<&Client> {
        let connect = || async {
            let at = self.settings.socket.as_str();
            let seconds = CALL.as_secs();
            let client = if at.starts_with("tcp://") || at.starts_with("http://") {
                Client::connect_with_http(at, seconds, API_DEFAULT_VERSION)
            } else {
                Client::connect_with_unix(at, seconds, API_DEFAULT_VERSION)
            };
            let client = client.map_err(|error| self.wrong(error, Deed::Asked))?;
            within(CALL, client.negotiate_version()).await.map_err(|error| self.wrong(error, Deed::Asked))
        };
        self.client.get_or_try_init(connect).await
    }

    /// What can be done about it.
    fn wrong(&self, error: ClientError, deed: Deed) -> Error {
        let provider = self.name;
        match error {
            // Only the daemon's own word says that a container is gone: a proxy's 404 does not.
            ClientError::DockerResponseServerError { status_code: 404, message }
                if message.to_ascii_lowercase().contains("no such container") =>
            {
                Error::Missing { provider }
            }
            ClientError::DockerResponseServerError { status_code: 429, .. } => Error::Busy { provider, after: None },
            ClientError::DockerResponseServerError { status_code: 400..500, message } => {
                Error::Refused { provider, what: cut(&message) }
            }
            other => {
                let what = cut(&said(&other));
                match (deed, never_arrived(&other)) {
                    (Deed::Asked, _) | (Deed::Done, true) => Error::Failed { provider, what },
                    (Deed::Done, false) => Error::Unsure { provider, what },
                }
            }
        }
    }

    fn refused(&self, what: impl Into<String>) -> Error {
        Error::Refused { provider: self.name, what: what.into() }
    }

    fn failed(&self, what: impl Into<String>) -> Error {
        Error::Failed { provider: self.name, what: what.into() }
    }

    /// A call that changes nothing.
    async fn ask<T>(&self, call: impl Future<Output = std::result::Result<T, ClientError>>) -> Result<T> {
        within(CALL, call).await.map_err(|error| self.wrong(error, Deed::Asked))
    }

    /// A call that changes something.
    async fn tell<T>(&self, call: impl Future<Output = std::result::Result<T, ClientError>>) -> Result<T> {
        within(CALL, call).await.map_err(|error| self.wrong(error, Deed::Done))
    }

    async fn inspect(&self, name: &str) -> Result<ContainerInspectResponse> {
        self.ask(self.client().await?.inspect_container(name, None)).await
    }

    /// The container that has this name, if it is ours. `None`: there is none.
    async fn adopt(&self, spec: &Spec) -> Result<Option<Sandbox>> {
        let found = match self.inspect(&spec.key).await {
            Ok(found) => inspected(found),
            Err(Error::Missing { .. }) => return Ok(None),
            Err(error) => return Err(error),
        };
        if found.key.as_deref() != Some(&spec.key) || found.labels.get(FLEET_LABEL) != spec.labels.get(FLEET_LABEL) {
            return Err(self.refused(format!("there is a container `{}` already, and it is not this fleet's", spec.key)));
        }
        if matches!(found.state, State::Stopping | State::Failed) {
            return Err(self.failed(format!("the container `{}` of before is still being removed", spec.key)));
        }
        Ok(Some(found))
    }

    /// The id of an image, which is pulled if it is not there.
    async fn image(&self, name: &str) -> Result<String> {
        let client = self.client().await?;
        let absent = |error: &ClientError| matches!(error, ClientError::DockerResponseServerError { status_code: 404, .. });
        let mut found = within(CALL, client.inspect_image(name)).await;
        if self.settings.pull && found.as_ref().is_err_and(absent) {
            self.pull(client, name).await?;
            found = within(CALL, client.inspect_image(name)).await;
        }
        match found {
            Ok(image) => image.id.ok_or_else(|| self.failed(format!("the image `{name}` has no id"))),
            Err(error) if absent(&error) && !self.settings.pull => {
                Err(self.refused(format!("the daemon has no image `{name}`, and `pull` is off")))
            }
            Err(error) if absent(&error) => Err(self.failed(format!("the image `{name}` was pulled, and is not there"))),
            Err(error) => Err(self.wrong(error, Deed::Asked)),
        }
    }

    async fn pull(&self, client: &Client, name: &str) -> Result<()> {
        // A name without a tag would be all its tags.
        let last = name.rsplit('/').next().unwrap_or(name);
        let tag = if last.contains([':', '@']) { "" } else { "latest" };
        let options = CreateImageOptionsBuilder::new().from_image(name).tag(tag).build();
        let pulling = async {
            let mut progress = client.create_image(Some(options), None, None);
            while let Some(step) = progress.next().await {
                step?;
            }
            Ok(())
        };
        within(PULL, pulling).await.map_err(|error| match error {
            ClientError::DockerResponseServerError { status_code: 404, message } => {
                self.refused(format!("the image `{name}` cannot be pulled: {}", cut(&message)))
            }
            // By the registry's word, which comes when the answer has begun.
            ClientError::DockerStreamError { error }
                if ["not found", "manifest unknown", "denied"].iter().any(|no| error.contains(no)) =>
            {
                self.refused(format!("the image `{name}` cannot be pulled: {}", cut(&error)))
            }
            other => self.failed(format!("the image `{name}` cannot be pulled now: {}", cut(&said(&other)))),
        })
    }

    fn body(&self, spec: &Spec, image: String, secrets: &BTreeMap<String, Value>) -> ContainerCreateBody {
        let settings = &self.settings;
        let open = secrets.iter().map(|(name, value)| (name, value.expose()));
        let plain = spec.env.iter().map(|(name, value)| (name, value.as_str())).filter(|(name, _)| !secrets.contains_key(*name));
        let env = plain.chain(open).map(|(name, value)| format!("{name}={value}")).collect();
        let mut labels: HashMap<String, String> = spec.labels.clone().into_iter().collect();
        labels.insert(KEY_LABEL.to_owned(), spec.key.clone());
        labels.insert(ENDS_LABEL.to_owned(), ends(Timestamp::now(), spec.ttl).to_string());
        labels.insert(IMAGE_LABEL.to_owned(), spec.image.clone());
        labels.insert(IMAGE_ID_LABEL.to_owned(), image.clone());
        let memory = i64::from(spec.size.memory_mib) << 20;
        let ports: Vec<String> = spec.ports.iter().map(|port| format!("{port}/tcp")).collect();
        let published = PortBinding { host_ip: Some(settings.publish_at.to_string()), host_port: Some(String::new()) };
        let bindings = ports.iter().map(|port| (port.clone(), Some(vec![published.clone()])));
        let host = HostConfig {
            runtime: settings.runtime.clone(),
            network_mode: settings.network.clone(),
            port_bindings: (settings.reach == Reach::Published).then(|| bindings.collect()),
            nano_cpus: Some(i64::from(spec.size.cpu_milli) * 1_000_000),
            memory: Some(memory),
            // No swap beside it: a container that swaps is slow, and nobody sees why.
            memory_swap: Some(memory),
            storage_opt: settings.limit_disk.then(|| [(String::from("size"), format!("{}M", spec.size.disk_mib))].into()),
            pids_limit: Some(settings.pids),
            cap_drop: Some(settings.cap_drop.clone()),
            cap_add: Some(settings.cap_add.clone()),
            security_opt: settings.no_new_privileges.then(|| vec![String::from("no-new-privileges:true")]),
            readonly_rootfs: Some(settings.read_only),
            tmpfs: Some(settings.tmpfs.clone().into_iter().collect()),
            binds: Some(settings.binds.clone()),
            extra_hosts: Some(settings.extra_hosts.clone()),
            log_config: Some(HostConfigLogConfig {
                typ: Some(settings.log_driver.clone()),
                config: Some(settings.log_options.clone().into_iter().collect()),
            }),
            ..HostConfig::default()
        };
        ContainerCreateBody {
            image: Some(image),
            // The whole command: an image's entry point does not come before it.
            entrypoint: (!spec.command.is_empty()).then(|| spec.command.clone()),
            env: Some(env),
            user: settings.user.clone(),
            labels: Some(labels),
            exposed_ports: (!ports.is_empty()).then_some(ports),
            host_config: Some(host),
            ..ContainerCreateBody::default()
        }
    }

    /// What it is now, if a call was refused that leads to `state`: it is no mistake if it is so already.
    async fn unless(&self, native: &str, state: State, done: Result<()>) -> Result<()> {
        match done {
            Err(Error::Refused { .. } | Error::Unsure { .. }) if self.state(native).await?.state == state => Ok(()),
            done => done,
        }
    }

    /// What is killed while it stands still is a zombie for a while, of which the daemon says that it cannot be removed: gVisor's do.
    async fn thaw(&self, native: &str) -> Result<()> {
        if self.state(native).await?.state == State::Paused {
            self.resume(native, &[]).await?;
        }
        Ok(())
    }

    /// Ends what was executed, if the container has a shell and `grep`.
    async fn end_marked(&self, native: &str, mark: &str) -> std::result::Result<(), ClientError> {
        let Ok(client) = self.client().await else { return Ok(()) };
        let argv = ["sh", "-c", END_MARKED, "sh", mark];
        let options = CreateExecOptions { cmd: Some(argv.map(String::from).to_vec()), ..CreateExecOptions::default() };
        let exec = client.create_exec(native, options).await?;
        client.start_exec(&exec.id, Some(StartExecOptions { detach: true, ..StartExecOptions::default() })).await?;
        Ok(())
    }
}

/// Whether a call that failed may have changed something.
#[derive(Clone, Copy)]
enum Deed {
    Asked,
    Done,
}

#[async_trait]
impl Provider for Docker {
    fn name(&self) -> &'static str {
        self.name
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            command: true,
            env: true,
            provider_secrets: false,
            size: true,
            ports: true,
            list: true,
            ttl: None,
            idle_timer: false,
            pause: Pause::Frozen,
            exec: true,
            logs: true,
            events: true,
            endpoint: true,
            traffic_keeps_awake: false,
            nodes: false,
        }
    }

    fn price(&self, size: Size) -> Price {
        let Settings { cpu_usd_per_hour, gib_usd_per_hour, .. } = self.settings;
        let running =
            f64::from(size.cpu_milli) / 1000.0 * cpu_usd_per_hour + f64::from(size.memory_mib) / 1024.0 * gib_usd_per_hour;
        let source = match (cpu_usd_per_hour, gib_usd_per_hour) == OPENCOST {
            true => "OpenCost's default.json, read 2026-11-23",
            false => "the configuration",
        };
        // Frozen, it still has its memory, and its CPU waits for it.
        Price { running, paused: running, stopped: 0.0, source: source.to_owned() }
    }

    async fn create(&self, spec: &Spec) -> Result<Sandbox> {
        let wrong = refusals(&self.capabilities(), spec);
        if !wrong.is_empty() {
            return Err(self.refused(wrong.join("; ")));
        }
        if let Some(known) = self.adopt(spec).await? {
            return Ok(known);
        }
        let secrets = secret::read_all(self.name, spec)?;
        let image = self.image(&spec.image).await?;
        let options = CreateContainerOptionsBuilder::new().name(&spec.key).build();
        let body = self.body(spec, image, &secrets);
        let client = self.client().await?;
        match within(CALL, client.create_container(Some(options), body)).await {
            Ok(made) => match self.inspect(&made.id).await {
                Ok(found) => Ok(inspected(found)),
                Err(error) => Err(Error::Unsure { provider: self.name, what: format!("it was made, and then: {error}") }),
            },
            // Somebody was quicker, or we were before.
            Err(ClientError::DockerResponseServerError { status_code: 409, message }) => match self.adopt(spec).await? {
                Some(known) => Ok(known),
                None => Err(self.failed(cut(&message))),
            },
            Err(error) => Err(hide(self.wrong(error, Deed::Done), &secrets)),
        }
    }

    async fn start(&self, native: &str) -> Result<()> {
        let done = self.tell(self.client().await?.start_container(native, None)).await;
        self.unless(native, State::Running, done).await
    }

    async fn state(&self, native: &str) -> Result<Sandbox> {
        match within(CALL, self.client().await?.inspect_container(native, None)).await {
            Ok(found) => Ok(inspected(found)),
            Err(error) => match (unknown(&error), self.wrong(error, Deed::Asked)) {
                (_, Error::Missing { .. }) => Ok(bare(native, State::Missing)),
                (Some(word), _) => Ok(bare(native, State::Unknown(word))),
                (None, error) => Err(error),
            },
        }
    }

    async fn list(&self, labels: &BTreeMap<String, String>, _page: Option<&str>) -> Result<Page> {
        let options = ListContainersOptionsBuilder::new().all(true).filters(&filters(labels)).build();
        // What a list says is enough: no container is asked about by itself.
        let (all, mut unread): (Vec<Listed>, usize) =
            match within(CALL, self.client().await?.list_containers(Some(options))).await {
                Ok(all) => (all.into_iter().map(Listed::from).collect(), 0),
                // The client reads all or nothing. What it does not know of one container hides none of the others.
                Err(error) => match one_by_one(&error) {
                    Some(items) => rest::items(self.name, &items),
                    None => return Err(self.wrong(error, Deed::Asked)),
                },
            };
        let mut sandboxes: Vec<Sandbox> = all.into_iter().map(summed).collect();
        // What has no id cannot be asked about.
        unread += sandboxes.extract_if(.., |one| one.native.is_empty()).count();
        Ok(Page { sandboxes, unread, next: None })
    }

    async fn exec(&self, native: &str, command: &Exec) -> Result<Executed> {
        let client = self.client().await?;
        let mark = format!("{EXEC_MARK}={}", uuid::Uuid::now_v7());
        let mut env: Vec<String> = command.env.iter().map(|(name, value)| format!("{name}={value}")).collect();
        env.push(mark.clone());
        let options = CreateExecOptions {
            attach_stdin: Some(!command.stdin.is_empty() && !command.detached),
            attach_stdout: Some(!command.detached),
            attach_stderr: Some(!command.detached),
            env: Some(env),
            cmd: Some(command.argv.clone()),
            ..CreateExecOptions::default()
        };
        let exec = self.tell(client.create_exec(native, options)).await?.id;
        let options = StartExecOptions { detach: command.detached, ..StartExecOptions::default() };
        let (mut output, mut input) = match self.tell(client.start_exec(&exec, Some(options))).await? {
            StartExecResults::Detached => return Ok(Executed::default()),
            StartExecResults::Attached { output, input } => (output, input),
        };
        let mut done = Executed::default();
        let give = async {
            // Who does not read it has no use for it.
            drop(input.write_all(&command.stdin).await);
            drop(input.shutdown().await);
        };
        let take = async {
            while let Some(piece) = output.next().await {
                let (all, bytes) = match piece? {
                    LogOutput::StdOut { message } | LogOutput::Console { message } => (&mut done.stdout, message),
                    LogOutput::StdErr { message } => (&mut done.stderr, message),
                    LogOutput::StdIn { .. } => continue,
                };
                let kept = bytes.len().min(OUTPUT_MOST - all.len());
                all.extend_from_slice(&bytes[..kept]);
                done.cut |= kept < bytes.len();
            }
            Ok::<(), ClientError>(())
        };
        let run = async {
            futures_util::join!(give, take).1?;
            let silent = Instant::now();
            loop {
                let now = client.inspect_exec(&exec).await?;
                if now.running != Some(true) && now.exit_code.is_some() {
                    return Ok((now.exit_code, silent.elapsed()));
                }
                // Its output ends a little before it does.
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        match tokio::time::timeout(command.timeout, run).await {
            // It went on, and what it said then we have not heard: the connection has broken off, or it had closed its output.
            Ok(Ok((_, silent))) if silent > BROKE_OFF => {
                return Err(Error::Unsure { provider: self.name, what: String::from("the command's output broke off") });
            }
            Ok(Ok((code, _))) => done.exit_code = code.and_then(|code| i32::try_from(code).ok()),
            Ok(Err(error)) => return Err(self.wrong(error, Deed::Done)),
            Err(_) => {
                if let Err(error) = within(CALL, self.end_marked(native, &mark)).await {
                    tracing::warn!(
                        provider = self.name,
                        native,
                        error = said(&error),
                        "a command that takes too long could not be ended"
                    );
                }
            }
        }
        Ok(done)
    }

    async fn logs(&self, native: &str, most: usize) -> Result<Vec<u8>> {
        // A line has a byte or more.
        let options = LogsOptionsBuilder::new().stdout(true).stderr(true).tail(&most.to_string()).build();
        let mut pieces = self.client().await?.logs(native, Some(options));
        let read = async {
            let mut last = Vec::new();
            while let Some(piece) = pieces.next().await {
                last.extend_from_slice(&piece?.into_bytes());
                // Now and then, so that not every piece moves the whole.
                if last.len() > 2 * most {
                    last.drain(..last.len() - most);
                }
            }
            last.drain(..last.len().saturating_sub(most));
            Ok(last)
        };
        self.ask(read).await
    }

    async fn keep_alive(&self, _native: &str, _until: Timestamp) -> Result<()> {
        // There are no timers.
        Ok(())
    }

    async fn pause(&self, native: &str) -> Result<()> {
        let done = self.tell(self.client().await?.pause_container(native)).await;
        self.unless(native, State::Paused, done).await
    }

    async fn resume(&self, native: &str, _: &[String]) -> Result<()> {
        let done = self.tell(self.client().await?.unpause_container(native)).await;
        self.unless(native, State::Running, done).await
    }

    async fn stop(&self, native: &str, grace: Duration) -> Result<()> {
        self.thaw(native).await?;
        // In whole seconds, and never less than asked for.
        let seconds = grace.as_secs() + u64::from(grace.subsec_nanos() > 0);
        let options = StopContainerOptionsBuilder::new().t(i32::try_from(seconds).unwrap_or(i32::MAX)).build();
        let most = CALL.saturating_add(Duration::from_secs(seconds));
        let client = self.client().await?.clone().with_timeout(most);
        within(most, client.stop_container(native, Some(options))).await.map_err(|error| self.wrong(error, Deed::Done))
    }

    async fn delete(&self, native: &str) -> Result<()> {
        self.thaw(native).await?;
        let options = RemoveContainerOptionsBuilder::new().force(true).v(true).build();
        match within(CALL, self.client().await?.remove_container(native, Some(options))).await {
            // Somebody else is at it.
            Err(ClientError::DockerResponseServerError { status_code: 409, message })
                if message.contains("already in progress") =>
            {
                Ok(())
            }
            Err(error) => match self.wrong(error, Deed::Done) {
                Error::Missing { .. } => Ok(()),
                error => Err(error),
            },
            Ok(()) => Ok(()),
        }
    }

    async fn endpoint(&self, native: &str, port: u16) -> Result<Endpoint> {
        let found = self.inspect(native).await?;
        let running = found.state.as_ref().and_then(|state| state.running) == Some(true);
        let Some(networks) = found.network_settings.filter(|_| running) else {
            return Err(self.failed("it does not run: none of its ports is reached"));
        };
        let at = match self.settings.reach {
            Reach::Published => {
                let bound = networks.ports.and_then(|mut ports| ports.remove(&format!("{port}/tcp")).flatten());
                let port = bound.into_iter().flatten().find_map(|binding| binding.host_port?.parse::<u16>().ok());
                port.map(|port| std::net::SocketAddr::new(self.settings.publish_at, port))
            }
            Reach::Container => {
                let addresses =
                    networks.networks.into_iter().flatten().filter_map(|(_, network)| network.ip_address?.parse().ok());
                addresses.into_iter().next().map(|ip: IpAddr| std::net::SocketAddr::new(ip, port))
            }
        };
        match at {
            Some(at) => Ok(Endpoint { url: format!("http://{at}"), headers: Vec::new() }),
            None => Err(self.refused(format!("port {port} is not open: name it in `ports`, and give the containers a network"))),
        }
    }

    async fn events(&self, labels: &BTreeMap<String, String>) -> Result<BoxStream<'static, Result<Happened>>> {
        let client = self.client().await?;
        // From now on, by the daemon's clock: it is asked when somebody listens, and what happens until then is not lost.
        let now = self.ask(client.info()).await?.system_time.and_then(|time| time.parse::<Timestamp>().ok());
        let now = now.ok_or_else(|| self.failed("the daemon does not say what time it is"))?;
        let since = format!("{}.{:09}", now.as_second(), now.subsec_nanosecond());
        let mut wanted = filters(labels);
        wanted.insert("type", vec![String::from("container")]);
        wanted.insert("event", EVENTS.map(String::from).to_vec());
        let options = EventsOptionsBuilder::new().since(&since).filters(&wanted).build();
        let provider = self.name;
        let heard = client.events(Some(options)).filter_map(move |event| async move {
            match event {
                Ok(event) => {
                    let actor = event.actor?;
                    let mut labels = actor.attributes.unwrap_or_default();
                    let (key, session) = (labels.remove(KEY_LABEL), labels.remove(SESSION_LABEL));
                    Some(Ok(Happened { native: actor.id?, key, session }))
                }
                Err(error) => Some(Err(Error::Failed { provider, what: cut(&said(&error)) })),
            }
        });
        Ok(heard.boxed())
    }
}

impl fmt::Debug for Docker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Docker").field("name", &self.name).field("socket", &self.settings.socket).finish_non_exhaustive()
    }
}

/// Of which no more is known.
fn bare(native: &str, state: State) -> Sandbox {
    Sandbox {
        key: None,
        native: native.to_owned(),
        state,
        reason: None,
        exit_code: None,
        size: None,
        created: None,
        deadline: None,
        labels: BTreeMap::new(),
        node: None,
        disrupted: None,
    }
}

async fn within<T>(
    most: Duration,
    call: impl Future<Output = std::result::Result<T, ClientError>>,
) -> std::result::Result<T, ClientError> {
    tokio::time::timeout(most, call).await.unwrap_or(Err(ClientError::RequestTimeoutError))
}

/// Whether the daemon has not even been reached.
fn never_arrived(error: &ClientError) -> bool {
    match error {
        ClientError::SocketNotFoundError(_) => true,
        ClientError::HyperLegacyError { err } => err.is_connect(),
        _ => false,
    }
}

/// With its causes: what a client says of its own is little.
fn said(error: &ClientError) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

fn cut(text: &str) -> String {
    let text = text.trim();
    match text.char_indices().nth(SAID_MOST) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

/// A daemon repeats what it does not like of a container's environment.
fn hide(error: Error, secrets: &BTreeMap<String, Value>) -> Error {
    let open = |what: &str| secrets.values().any(|secret| what.contains(secret.expose()));
    match error {
        Error::Refused { provider, what } if open(&what) => {
            Error::Refused { provider, what: String::from("it refuses the environment") }
        }
        Error::Failed { provider, what } if open(&what) => {
            Error::Failed { provider, what: String::from("it fails at the environment") }
        }
        Error::Unsure { provider, what } if open(&what) => {
            Error::Unsure { provider, what: String::from("it fails at the environment") }
        }
        error => error,
    }
}

/// The state that a client did not know.
fn unknown(error: &ClientError) -> Option<String> {
    let ClientError::JsonDataError { message, .. } = error else { return None };
    let (_, after) = message.split_once("unknown variant `")?;
    after.split_once('`').map(|(word, _)| cut(word))
}

fn filters(labels: &BTreeMap<String, String>) -> HashMap<&'static str, Vec<String>> {
    HashMap::from([("label", labels.iter().map(|(name, value)| format!("{name}={value}")).collect())])
}

fn ends(now: Timestamp, ttl: Duration) -> Timestamp {
    now.checked_add(ttl).unwrap_or(Timestamp::MAX)
}

/// The words of the daemon.
fn state(word: &str) -> State {
    match word {
        // It is between two runs: nobody but the daemon's administrator lets it.
        "restarting" => State::Creating,
        "created" => State::Created,
        "running" => State::Running,
        "paused" => State::Paused,
        "removing" | "stopping" => State::Stopping,
        "exited" => State::Stopped,
        "dead" => State::Failed,
        other => State::Unknown(other.to_owned()),
    }
}

fn inspected(found: ContainerInspectResponse) -> Sandbox {
    let labels: BTreeMap<String, String> = found.config.and_then(|config| config.labels).into_iter().flatten().collect();
    let now = found.state.unwrap_or_default();
    let state = state(now.status.as_ref().map_or("", |word| word.as_ref()));
    let over = matches!(state, State::Stopped | State::Failed);
    let size = found.host_config.and_then(|host| {
        Some(Size {
            cpu_milli: u32::try_from(host.nano_cpus? / 1_000_000).ok()?,
            memory_mib: u32::try_from(host.memory? >> 20).ok()?,
            // Nothing is no limit.
            disk_mib: host.storage_opt.and_then(|options| options.get("size")?.strip_suffix('M')?.parse().ok()).unwrap_or(0),
        })
    });
    Sandbox {
        key: labels.get(KEY_LABEL).cloned(),
        native: found.id.unwrap_or_default(),
        reason: reason(&now),
        exit_code: now.exit_code.filter(|_| over).and_then(|code| i32::try_from(code).ok()),
        state,
        size,
        created: found.created.and_then(|time| time.parse().ok()),
        deadline: None,
        labels,
        node: None,
        disrupted: None,
    }
}

fn reason(now: &ContainerState) -> Option<String> {
    if now.oom_killed == Some(true) {
        return Some(String::from("out of memory"));
    }
    if let Some(error) = now.error.as_deref().filter(|error| !error.is_empty()) {
        return Some(cut(error));
    }
    let ill = now.health.as_ref().and_then(|health| health.status) == Some(HealthStatusEnum::UNHEALTHY);
    ill.then(|| String::from("unhealthy"))
}

/// What a list says of a container, as far as it is of interest.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Listed {
    id: String,
    #[serde(default)]
    labels: Option<HashMap<String, String>>,
    #[serde(default = "rest::unsaid", deserialize_with = "rest::word")]
    state: String,
    #[serde(default, deserialize_with = "rest::lenient")]
    status: String,
    #[serde(default, deserialize_with = "rest::lenient")]
    created: Option<i64>,
}

impl From<ContainerSummary> for Listed {
    fn from(found: ContainerSummary) -> Self {
        Self {
            id: found.id.unwrap_or_default(),
            labels: found.labels,
            state: found.state.as_ref().map_or("", |word| word.as_ref()).to_owned(),
            status: found.status.unwrap_or_default(),
            created: found.created,
        }
    }
}

/// The items of a list that the client could not read as a whole.
fn one_by_one(error: &ClientError) -> Option<Vec<serde_json::Value>> {
    let ClientError::JsonDataError { contents, .. } = error else { return None };
    serde_json::from_str(contents).ok()
}

fn summed(found: Listed) -> Sandbox {
    let labels: BTreeMap<String, String> = found.labels.into_iter().flatten().collect();
    let said = found.status;
    Sandbox {
        key: labels.get(KEY_LABEL).cloned(),
        native: found.id,
        state: state(&found.state),
        reason: said.ends_with("(unhealthy)").then(|| String::from("unhealthy")),
        // `Exited (137) 2 minutes ago`.
        exit_code: said.strip_prefix("Exited (").and_then(|after| after.split_once(')')?.0.parse().ok()),
        size: None,
        created: found.created.and_then(|second| Timestamp::from_second(second).ok()),
        deadline: None,
        labels,
        node: None,
        disrupted: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn docker() -> Docker {
        Docker::new(Settings::default())
    }

    fn spec() -> Spec {
        let text = r#"{"key": "agent-1", "image": "an-image", "ttl": {"secs": 60, "nanos": 0}, "env": {"A": "1", "B": "2"}, "ports": [8080]}"#;
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn what_is_not_set_is_safe() {
        let body = docker().body(&spec(), String::from("sha256:1"), &BTreeMap::new());
        assert_eq!((body.entrypoint, body.cmd, body.user), (None, None, None));
        assert_eq!(body.image.as_deref(), Some("sha256:1"));
        let host = body.host_config.unwrap();
        assert_eq!(host.cap_drop, Some(vec![String::from("ALL")]));
        assert_eq!(host.security_opt, Some(vec![String::from("no-new-privileges:true")]));
        assert_eq!((host.privileged, host.network_mode.as_deref(), host.restart_policy), (None, None, None));
        let bound = host.port_bindings.unwrap().remove("8080/tcp").flatten().unwrap();
        assert_eq!(bound[0].host_ip.as_deref(), Some("127.0.0.1"));
    }

    #[test]
    fn settings_are_read_and_a_slip_in_them_is_said() {
        let read = |text: &str| serde_json::from_str::<Settings>(text).map_err(|error| error.to_string());
        assert_eq!(read("{}").unwrap(), Settings::default());
        let some = read(r#"{"reach": "container", "publish_at": "::1", "tmpfs": {"/tmp": "size=64m"}}"#).unwrap();
        assert_eq!((some.reach, some.publish_at.to_string().as_str()), (Reach::Container, "::1"));
        assert!(read(r#"{"cap_dorp": []}"#).unwrap_err().contains("cap_dorp"));
        assert!(read(r#"{"reach": "nowhere"}"#).is_err());
    }

    #[test]
    fn a_secret_comes_before_a_variable_of_its_name_and_is_in_the_environment_alone() {
        let path = std::env::temp_dir().join(format!("agent-fleet-{}", uuid::Uuid::now_v7()));
        std::fs::write(&path, "s3cret").unwrap();
        let mut spec = spec();
        spec.secrets.insert(String::from("A"), super::super::Secret::File(path.clone()));
        let secrets = secret::read_all("docker", &spec).unwrap();
        std::fs::remove_file(path).unwrap();
        let mut body = docker().body(&spec, String::from("sha256:1"), &secrets);
        assert_eq!(body.env.take().unwrap(), ["B=2", "A=s3cret"]);
        assert!(!format!("{body:?}").contains("s3cret"));

        let said =
            |status_code, message: &str| ClientError::DockerResponseServerError { status_code, message: message.to_owned() };
        let refused = hide(docker().wrong(said(400, "invalid environment: A=s3cret"), Deed::Done), &secrets);
        assert!(matches!(&refused, Error::Refused { what, .. } if !what.contains("s3cret")), "{refused:?}");
        let unsure = hide(docker().wrong(said(500, "oops: s3cret"), Deed::Done), &secrets);
        assert!(matches!(&unsure, Error::Unsure { what, .. } if !what.contains("s3cret")), "{unsure:?}");
        let other = hide(docker().wrong(said(400, "no such thing"), Deed::Done), &secrets);
        assert!(matches!(&other, Error::Refused { what, .. } if what == "no such thing"), "{other:?}");
    }

    #[test]
    fn errors_are_told_by_what_can_be_done() {
        let said =
            |status_code, message: &str| ClientError::DockerResponseServerError { status_code, message: message.to_owned() };
        let name = |error: Error| match error {
            Error::Busy { .. } => "busy",
            Error::Unsure { .. } => "unsure",
            Error::Failed { .. } => "failed",
            Error::Refused { .. } => "refused",
            Error::Missing { .. } => "missing",
            Error::Unsupported { .. } => "unsupported",
        };
        let refused = || ClientError::IOError { err: std::io::ErrorKind::ConnectionReset.into() };
        for (error, asked, done) in [
            (said(404, "No such container: agent-1"), "missing", "missing"),
            (said(404, "page not found"), "refused", "refused"),
            (said(404, "network fleet not found"), "refused", "refused"),
            (said(400, "invalid CPU"), "refused", "refused"),
            (said(409, "Container 1 is not running"), "refused", "refused"),
            (said(429, ""), "busy", "busy"),
            (said(500, "oops"), "failed", "unsure"),
            (said(503, ""), "failed", "unsure"),
            (ClientError::RequestTimeoutError, "failed", "unsure"),
            (refused(), "failed", "unsure"),
            (ClientError::SocketNotFoundError(String::from("/nowhere")), "failed", "failed"),
        ] {
            let again = match &error {
                ClientError::DockerResponseServerError { status_code, message } => said(*status_code, message),
                ClientError::RequestTimeoutError => ClientError::RequestTimeoutError,
                ClientError::SocketNotFoundError(at) => ClientError::SocketNotFoundError(at.clone()),
                _ => refused(),
            };
            let what = format!("{error:?}");
            assert_eq!(
                (name(docker().wrong(error, Deed::Asked)), name(docker().wrong(again, Deed::Done))),
                (asked, done),
                "{what}"
            );
        }
    }

    #[test]
    fn a_daemons_words_are_ours() {
        let listed = |text: &str| summed(serde_json::from_str::<ContainerSummary>(text).unwrap().into());
        let over = listed(
            r#"{"Id": "1", "State": "exited", "Status": "Exited (137) 2 minutes ago", "Labels": {"agent-fleet.key": "k"}, "Created": 5}"#,
        );
        assert_eq!((over.state, over.exit_code, over.key.as_deref()), (State::Stopped, Some(137), Some("k")));
        assert_eq!(over.created, Timestamp::from_second(5).ok());
        let ill = listed(r#"{"Id": "1", "State": "running", "Status": "Up 2 minutes (unhealthy)"}"#);
        assert_eq!((ill.state, ill.exit_code, ill.reason.as_deref()), (State::Running, None, Some("unhealthy")));
        for (word, ours) in [("removing", State::Stopping), ("dead", State::Failed), ("", State::Unknown(String::new()))] {
            assert_eq!(state(word), ours);
        }
        let first = r#"{"Id": "1", "Created": "2026-11-26T22:00:00.5Z", "State": {"Status": "created", "ExitCode": 0, "Error": "no program"},
            "HostConfig": {"NanoCpus": 250000000, "Memory": 67108864}, "Config": {"Labels": null}}"#;
        let made = inspected(serde_json::from_str(first).unwrap());
        assert_eq!((made.state, made.exit_code, made.reason.as_deref()), (State::Created, None, Some("no program")));
        assert_eq!(made.size, Some(Size { cpu_milli: 250, memory_mib: 64, disk_mib: 0 }));
    }

    #[test]
    fn a_life_has_an_end_however_long_it_is() {
        assert_eq!(ends(Timestamp::MIN, Duration::MAX), Timestamp::MAX);
    }

    #[test]
    fn a_machine_costs_what_its_owner_says() {
        let own = Docker::new(Settings { cpu_usd_per_hour: 1.0, gib_usd_per_hour: 0.5, ..Settings::default() });
        let price = own.price(Size { cpu_milli: 500, memory_mib: 2048, disk_mib: 0 });
        assert_eq!((price.running, price.paused, price.stopped, price.source.as_str()), (1.5, 1.5, 0.0, "the configuration"));
    }
}
