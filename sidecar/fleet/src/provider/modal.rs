//! Modal: sandboxes from images of a registry, with a name, tags and a life of their own, asked for over gRPC. A sandbox that has ended stays known for
//! good, and costs nothing.
//!
//! Modal kills without asking. So the command is started by a shell that writes down who it is, and a stop asks it through a command in the sandbox.

mod client;
mod messages;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use futures_util::stream::BoxStream;
use jiff::Timestamp;
use prost::Message as _;
use serde::Deserialize;
use tokio::time::Instant;

use self::client::{Auth, Call, Effort, SAFE, Server};
use self::messages as m;
use self::messages::status;
use super::rest::{self, InFlight};
use super::{
    Bounds, Capabilities, ENDS_LABEL, Endpoint, Error, Exec, Executed, Happened, KEY_LABEL, OUTPUT_MOST, Page, Pause, Price,
    Provider, Result, Sandbox, Secret, Size, Spec, State, secret,
};

const NAME: &str = "modal";
/// Says that there is an idle timer, which a sign of life has to move.
const IDLE_LABEL: &str = "agent-fleet.idle";
/// How long an image may be built before it is looked at again.
const BUILT: Duration = Duration::from_secs(240);
/// What a command's time is to the network's.
const SLACK: Duration = Duration::from_secs(20);
/// Who has ended has this long to be read to the end: a process that it left behind may hold its output open.
const REST: Duration = Duration::from_secs(5);
/// How long a command's end is waited for in one request.
const WAITS: Duration = Duration::from_secs(60);
/// A piece of standard input.
const INPUT: usize = 256 << 10;
/// A log that runs on is read until nothing has come for this long.
const QUIET: Duration = Duration::from_millis(1500);
/// What is remembered of containers and images. It can all be asked for again.
const REMEMBERED: usize = 4096;

/// Writes down who the command is, and becomes it. Where that cannot be written, it is begun all the same.
const BEGIN: &str = r#"{ echo $$ >"/tmp/.$0.pid"; } 2>/dev/null; exec "$@""#;
/// Asks it to end.
const END: &str = r#"p=$(cat "/tmp/.$0.pid") && kill -TERM "$p""#;

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// `ak-…`.
    pub token_id: Secret,
    /// `as-…`.
    pub token_secret: Secret,
    /// The app that all sandboxes are in. It is made if it is not there.
    pub app: String,
    /// The workspace's default if nothing is said.
    #[serde(default)]
    pub environment: String,
    #[serde(default = "server_url")]
    pub server_url: String,
    /// Where they may run: `us-east`, `eu`. Anywhere if nothing is said, which is the cheapest.
    #[serde(default)]
    pub regions: Vec<String>,
    /// A secret kept at Modal with `REGISTRY_USERNAME` and `REGISTRY_PASSWORD`, for images that are not public.
    #[serde(default)]
    pub registry_secret: Option<String>,
    /// What images are built by. From 2025.06 on nothing of Modal's is put into them.
    #[serde(default = "image_builder")]
    pub image_builder: String,
    /// What the regions cost more, by their list.
    #[serde(default = "one")]
    pub region_factor: f64,
    /// What is paid, if not the list's price.
    #[serde(default)]
    pub price: Option<Price>,
}

fn server_url() -> String {
    String::from("https://api.modal.com")
}

fn image_builder() -> String {
    String::from("2025.06")
}

fn one() -> f64 {
    1.0
}

pub struct Modal {
    settings: Settings,
    api: Server,
    in_flight: InFlight,
    known: Mutex<Known>,
}

/// What need not be asked for again.
#[derive(Default)]
struct Known {
    app: Option<String>,
    /// By the lines that they are built of.
    images: HashMap<Vec<String>, String>,
    /// The task of a sandbox, from when it has one.
    tasks: HashMap<String, String>,
    /// Sandboxes that had ended by themselves and were deleted then: Modal keeps what it knows of them.
    deleted: BTreeSet<String>,
}

/// A page of the list.
struct Before {
    found: Vec<Sandbox>,
    unread: usize,
    /// From where the next one is asked for.
    next: Option<f64>,
}

/// A message for `method` of Modal's own interface.
macro_rules! api {
    ($method:literal) => {
        Call { path: concat!("/modal.client.ModalClient/", $method), effort: SAFE, hide: &[] }
    };
}

macro_rules! router {
    ($method:literal) => {
        Call { path: concat!("/modal.task_command_router.TaskCommandRouter/", $method), effort: SAFE, hide: &[] }
    };
}

impl Modal {
    /// # Errors
    /// A sentence that says which setting is wrong.
    pub fn new(settings: Settings) -> std::result::Result<Self, String> {
        for (name, secret) in [("token_id", &settings.token_id), ("token_secret", &settings.token_secret)] {
            if let Secret::Provider(kept) = secret {
                return Err(format!("`{name}` is `{kept}` of the provider: name a file or an environment variable"));
            }
        }
        if !is_name(&settings.app) {
            return Err(format!("`app` is `{}`: letters, digits, `-`, `_` and `.`, less than 64 of them", settings.app));
        }
        if !(settings.region_factor.is_finite() && settings.region_factor > 0.0) {
            return Err(String::from("`region_factor` is no factor"));
        }
        let auth = Auth::Token { id: settings.token_id.clone(), secret: settings.token_secret.clone() };
        let api = Server::new(&settings.server_url, auth)?;
        Ok(Self { settings, api, in_flight: InFlight::default(), known: Mutex::default() })
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn app(&self) -> Result<String> {
        if let Some(app) = self.known().app.clone() {
            return Ok(app);
        }
        let request = m::AppGetOrCreateRequest {
            app_name: self.settings.app.clone(),
            environment_name: self.settings.environment.clone(),
            object_creation_type: m::CREATE_IF_MISSING,
        };
        let app: m::AppGetOrCreateResponse = self.api.ask(&api!("AppGetOrCreate"), request).await.map_err(refuse_missing)?;
        self.known().app = Some(app.app_id.clone());
        Ok(app.app_id)
    }

    /// What is kept at Modal under this name, and has that variable in it.
    async fn kept_secret(&self, name: &str, keys: &[&str]) -> Result<String> {
        let request = m::SecretGetOrCreateRequest {
            deployment_name: name.to_owned(),
            environment_name: self.settings.environment.clone(),
            required_keys: keys.iter().map(|key| String::from(*key)).collect(),
            ..m::SecretGetOrCreateRequest::default()
        };
        let kept: Result<m::SecretGetOrCreateResponse> = self.api.ask(&api!("SecretGetOrCreate"), request).await;
        match kept {
            Ok(kept) => Ok(kept.secret_id),
            Err(Error::Missing { provider }) => {
                Err(Error::Refused { provider, what: format!("it keeps no secret `{name}` with `{}` in it", keys.join("`, `")) })
            }
            Err(error) => Err(error),
        }
    }

    /// The image's id, once it is built. Modal builds the same lines once.
    async fn image(&self, app: &str, spec: &Spec) -> Result<String> {
        let mut lines = vec![format!("FROM {}", spec.image)];
        if !spec.command.is_empty() {
            // A command takes the place of the image's alone: its entrypoint would be put before it.
            lines.push(String::from("ENTRYPOINT []"));
        }
        if let Some(id) = self.known().images.get(&lines).cloned() {
            return Ok(id);
        }
        let image_registry_config = match &self.settings.registry_secret {
            Some(name) => Some(m::ImageRegistryConfig {
                registry_auth_type: m::STATIC_CREDS,
                secret_id: self.kept_secret(name, &["REGISTRY_USERNAME", "REGISTRY_PASSWORD"]).await?,
            }),
            None => None,
        };
        let request = m::ImageGetOrCreateRequest {
            image: Some(m::Image { dockerfile_commands: lines.clone(), image_registry_config }),
            app_id: app.to_owned(),
            builder_version: self.settings.image_builder.clone(),
        };
        let made: m::ImageGetOrCreateResponse = self.api.ask(&api!("ImageGetOrCreate"), request).await.map_err(refuse_missing)?;
        let result = match made.result.filter(|result| result.status != 0) {
            Some(result) => result,
            None => self.built(&made.image_id).await?,
        };
        let image = &spec.image;
        match result.status {
            status::SUCCESS => {}
            // Something of Modal's, and not of the image's.
            status::TERMINATED | status::TIMEOUT | status::INTERNAL_FAILURE => {
                let what = format!("the image {image} was not built: {}", plain(&result.exception));
                return Err(Error::Failed { provider: NAME, what });
            }
            _ => {
                let what = format!("the image {image} cannot be built: {}", plain(&result.exception));
                return Err(Error::Refused { provider: NAME, what });
            }
        }
        let mut known = self.known();
        if known.images.len() >= REMEMBERED {
            known.images.clear();
        }
        known.images.insert(lines, made.image_id.clone());
        Ok(made.image_id)
    }

    /// How the building of an image ends.
    async fn built(&self, image: &str) -> Result<m::GenericResult> {
        let (until, mut last_entry_id, mut failures) = (Instant::now() + BUILT, String::new(), 0);
        let late = || Error::Failed { provider: NAME, what: String::from("the image is still being built") };
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(late());
            }
            let timeout = left.min(Duration::from_secs(55));
            let request = m::ImageJoinStreamingRequest {
                image_id: image.to_owned(),
                timeout: timeout.as_secs_f32(),
                last_entry_id: last_entry_id.clone(),
            };
            let call = Call { effort: Effort { timeout: timeout + SLACK, ..SAFE }, ..api!("ImageJoinStreaming") };
            let join = async {
                let mut pieces = self.api.stream::<_, m::ImageJoinStreamingResponse>(&call, request).await?;
                while let Some(piece) = pieces.message().await.map_err(|status| client::error(&status, true, &[]))? {
                    if !piece.entry_id.is_empty() {
                        last_entry_id = piece.entry_id;
                    }
                    if let Some(result) = piece.result.filter(|result| result.status != 0) {
                        return Ok(Some(result));
                    }
                }
                Ok::<_, Error>(None)
            };
            let began = Instant::now();
            match tokio::time::timeout(timeout + SLACK, join).await {
                Ok(Ok(Some(result))) => return Ok(result),
                Ok(Ok(None)) => {}
                Ok(Err(error)) if !error.is_passing() => return Err(refuse_missing(error)),
                Ok(Err(error)) => {
                    failures += 1;
                    if failures == 3 {
                        return Err(error);
                    }
                }
                Err(_) => return Err(late()),
            }
            // Who ends without a word is not asked without a pause.
            if began.elapsed() < Duration::from_secs(1) {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }

    /// What is in the container's environment, as secrets of Modal's: its values are not shown there, whatever they are.
    async fn environment(&self, app: &str, spec: &Spec, secrets: &BTreeMap<String, secret::Value>) -> Result<Vec<String>> {
        let mut ids = Vec::new();
        let mut env_dict: HashMap<String, String> = spec.env.clone().into_iter().collect();
        env_dict.extend(secrets.iter().map(|(name, value)| (name.clone(), value.expose().to_owned())));
        for (variable, secret) in &spec.secrets {
            if let Secret::Provider(name) = secret {
                ids.push(self.kept_secret(name, &[variable]).await?);
            }
        }
        if !env_dict.is_empty() {
            let hide: Vec<String> = secrets.values().map(|value| value.expose().to_owned()).collect();
            let request = m::SecretGetOrCreateRequest {
                environment_name: self.settings.environment.clone(),
                object_creation_type: m::ANONYMOUS_OWNED_BY_APP,
                env_dict,
                app_id: app.to_owned(),
                ..m::SecretGetOrCreateRequest::default()
            };
            let call = Call { hide: &hide, ..api!("SecretGetOrCreate") };
            let made: m::SecretGetOrCreateResponse = self.api.ask(&call, request).await.map_err(refuse_missing)?;
            ids.push(made.secret_id);
        }
        Ok(ids)
    }

    /// The one that was made with this key, though it may have ended.
    async fn find(&self, app: &str, key: &str) -> Result<Option<Sandbox>> {
        let tags = tags(&BTreeMap::from([(String::from(KEY_LABEL), key.to_owned())]));
        let (mut found, mut before) = (Vec::new(), None);
        loop {
            let page = self.page(app, tags.clone(), true, before).await?;
            // A second one would be made beside it.
            if page.unread > 0 {
                return Err(super::hidden(NAME, page.unread));
            }
            found.extend(page.found.into_iter().filter(|sandbox| !sandbox.state.is_gone()));
            before = page.next;
            if before.is_none() {
                break;
            }
        }
        // A name is unique while it runs: who runs is the one.
        found.sort_by_key(|sandbox| (sandbox.exit_code.is_some(), sandbox.created));
        Ok(found.into_iter().next())
    }

    /// A page of the newest before that moment, and from where the next one is asked for.
    async fn page(&self, app: &str, tags: Vec<m::SandboxTag>, include_finished: bool, before: Option<f64>) -> Result<Before> {
        let request = m::SandboxListRequest {
            app_id: app.to_owned(),
            before_timestamp: before.unwrap_or_default(),
            environment_name: self.settings.environment.clone(),
            include_finished,
            tags,
        };
        let listed: m::SandboxListResponse = self.api.ask(&api!("SandboxList"), request).await.map_err(refuse_missing)?;
        let (mut rows, mut unread) = (Vec::with_capacity(listed.sandboxes.len()), 0);
        for row in &listed.sandboxes {
            match m::SandboxInfo::decode(row.as_slice()) {
                Ok(row) if !row.id.is_empty() => rows.push(row),
                wrong => {
                    let wrong = wrong.map_or_else(|error| error.to_string(), |_| String::from("it has no id"));
                    super::tell_unread(NAME, "one of which nothing is known", &wrong);
                    unread += 1;
                }
            }
        }
        // Where none is read, nobody can say from where it goes on: that there is more is said by those that are not.
        let oldest = rows.iter().map(|row| row.created_at).reduce(f64::min);
        if let (Some(oldest), Some(before)) = (oldest, before)
            && oldest >= before
        {
            // Half a list would make orphans of the rest.
            return Err(Error::Failed { provider: NAME, what: String::from("its list does not go on") });
        }
        // Each of ours has tags: a row without any does not say them.
        for row in rows.iter_mut().filter(|row| row.tags.is_empty()) {
            row.tags = match self.tags(&row.id).await {
                Err(Error::Missing { .. }) => Vec::new(),
                tags => tags?,
            };
        }
        Ok(Before { found: rows.into_iter().map(|row| self.listed(row)).collect(), unread, next: oldest })
    }

    fn listed(&self, row: m::SandboxInfo) -> Sandbox {
        let task = row.task_info.unwrap_or_default();
        let result = task.result.unwrap_or_default();
        let running = if task.started_at > 0.0 { State::Running } else { State::Creating };
        let created = Timestamp::from_nanosecond((row.created_at * 1e9) as i128).ok();
        let mut sandbox = self.seen(row.id, &result, running, row.tags);
        sandbox.created = created;
        if sandbox.deadline.is_none() && row.timeout_secs > 0 {
            sandbox.deadline = created.and_then(|at| at.checked_add(Duration::from_secs(row.timeout_secs.into())).ok());
        }
        sandbox
    }

    /// What a result means; without one it is `running`.
    fn seen(&self, native: String, result: &m::GenericResult, running: State, tags: Vec<m::SandboxTag>) -> Sandbox {
        let (state, exit_code, why) = match result.status {
            0 => (running, None, None),
            _ if self.known().deleted.contains(&native) => (State::Destroyed, None, None),
            status::SUCCESS | status::FAILURE => (State::Stopped, Some(result.exitcode), None),
            status::TERMINATED => (State::Destroyed, None, Some("it was terminated")),
            // They have no code of its own to tell.
            status::TIMEOUT => (State::Stopped, None, Some("its time was over")),
            status::IDLE_TIMEOUT => (State::Stopped, None, Some("it was idle for too long")),
            status::INIT_FAILURE => (State::Failed, None, Some("it could not be started")),
            status::INTERNAL_FAILURE => (State::Failed, None, Some("Modal has failed")),
            status::MEMORY_MANAGER_EVICTION | status::MEMORY_THRASHING_EVICTION | status::KERNEL_OOM_KILL => {
                (State::Failed, None, Some("it was out of memory"))
            }
            other => (State::Unknown(format!("status {other}")), None, None),
        };
        let labels: BTreeMap<String, String> = tags.into_iter().map(|tag| (tag.tag_name, tag.tag_value)).collect();
        let words = plain(&result.exception);
        let reason = match (why, words.is_empty()) {
            (Some(why), true) => Some(why.to_owned()),
            (Some(why), false) => Some(format!("{why}: {words}")),
            (None, true) => None,
            (None, false) => Some(words),
        };
        Sandbox {
            key: labels.get(KEY_LABEL).cloned(),
            native,
            state,
            reason,
            exit_code,
            size: None,
            created: None,
            deadline: labels.get(ENDS_LABEL).and_then(|ends| ends.parse().ok()),
            labels,
            node: None,
            disrupted: None,
        }
    }

    /// How it has ended, if it has; `None`: nobody knows it.
    async fn result(&self, native: &str) -> Result<Option<m::GenericResult>> {
        let request = m::SandboxWaitRequest { sandbox_id: native.to_owned(), timeout: 0.0 };
        match self.api.ask::<_, m::SandboxWaitResponse>(&api!("SandboxWait"), request).await {
            Ok(waited) => Ok(Some(waited.result.unwrap_or_default())),
            Err(Error::Missing { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn tags(&self, native: &str) -> Result<Vec<m::SandboxTag>> {
        let request = m::SandboxTagsGetRequest { sandbox_id: native.to_owned() };
        let has: m::SandboxTagsGetResponse = self.api.ask(&api!("SandboxTagsGet"), request).await?;
        Ok(has.tags)
    }

    /// The task that a sandbox is run as; `None`: it has no place yet.
    async fn task(&self, native: &str) -> Result<Option<String>> {
        if let Some(task) = self.known().tasks.get(native).cloned() {
            return Ok(Some(task));
        }
        let call = Call { effort: Effort { safe: true, timeout: Duration::from_secs(10) }, ..api!("SandboxGetTaskId") };
        let request = m::SandboxGetTaskIdRequest { sandbox_id: native.to_owned() };
        let task = self.api.ask::<_, m::SandboxGetTaskIdResponse>(&call, request).await?;
        let task = task.task_id.filter(|task| !task.is_empty());
        if let Some(task) = &task {
            let mut known = self.known();
            if known.tasks.len() >= REMEMBERED {
                known.tasks.clear();
            }
            known.tasks.insert(native.to_owned(), task.clone());
        }
        Ok(task)
    }

    /// One that has not ended.
    async fn alive(&self, native: &str) -> Result<()> {
        let missing = Error::Missing { provider: NAME };
        let result = self.result(native).await?.ok_or(missing)?;
        let sandbox = self.seen(native.to_owned(), &result, State::Running, Vec::new());
        match sandbox.state {
            State::Running => Ok(()),
            state if state.is_gone() => Err(Error::Missing { provider: NAME }),
            _ => Err(Error::Refused { provider: NAME, what: String::from("it has ended, and is not started again") }),
        }
    }

    async fn make(&self, spec: &Spec, secrets: &BTreeMap<String, secret::Value>, app: &str) -> Result<Sandbox> {
        let image_id = self.image(app, spec).await?;
        let secret_ids = self.environment(app, spec, secrets).await?;
        let mut labels = spec.labels.clone();
        labels.insert(String::from(KEY_LABEL), spec.key.clone());
        labels.insert(String::from(ENDS_LABEL), rest::ends(spec.ttl));
        if let Some(idle) = spec.idle {
            labels.insert(String::from(IDLE_LABEL), idle.as_secs().to_string());
        }
        // Of the most that it may use, too: what is used beyond what was asked for is paid for.
        let (memory, cpu) = (spec.size.memory_mib, cores_milli(spec.size));
        let definition = m::Sandbox {
            entrypoint_args: begun(&spec.key, &spec.command),
            image_id,
            secret_ids,
            resources: Some(m::Resources { memory_mb: memory, memory_mb_max: memory, milli_cpu: cpu, milli_cpu_max: cpu }),
            timeout_secs: seconds(spec.ttl),
            scheduler_placement: (!self.settings.regions.is_empty())
                .then(|| m::SchedulerPlacement { regions: self.settings.regions.clone() }),
            open_ports: Some(m::PortSpecs {
                ports: spec.ports.iter().map(|port| m::PortSpec { port: (*port).into() }).collect(),
            }),
            network_access: Some(m::NetworkAccess { network_access_type: m::OPEN }),
            name: Some(spec.key.clone()),
            idle_timeout_secs: spec.idle.map(seconds),
        };
        // Sent once: one that has ended meanwhile would have left its name free.
        let call = Call { effort: Effort { safe: false, ..SAFE }, ..api!("SandboxCreate") };
        let request = m::SandboxCreateRequest { app_id: app.to_owned(), definition: Some(definition), tags: tags(&labels) };
        let made = self.api.ask_for_code::<_, m::SandboxCreateResponse>(&call, request).await;
        let native = match made {
            Ok(made) => made.sandbox_id,
            Err((tonic::Code::AlreadyExists, _)) => self.named(&spec.key).await?,
            // What it is made of is gone: the next try makes it anew.
            Err((tonic::Code::NotFound | tonic::Code::FailedPrecondition, error)) => {
                *self.known() = Known { tasks: std::mem::take(&mut self.known().tasks), ..Known::default() };
                return Err(refuse_missing(error));
            }
            Err((_, error)) => return Err(error),
        };
        Ok(Sandbox {
            key: Some(spec.key.clone()),
            native,
            state: State::Creating,
            reason: None,
            exit_code: None,
            size: None,
            created: None,
            deadline: labels.get(ENDS_LABEL).and_then(|ends| ends.parse().ok()),
            labels,
            node: None,
            disrupted: None,
        })
    }

    /// The one that runs under this name.
    async fn named(&self, name: &str) -> Result<String> {
        let request = m::SandboxGetFromNameRequest {
            sandbox_name: name.to_owned(),
            environment_name: self.settings.environment.clone(),
            app_name: self.settings.app.clone(),
        };
        match self.api.ask::<_, m::SandboxGetFromNameResponse>(&api!("SandboxGetFromName"), request).await {
            Ok(found) => Ok(found.sandbox_id),
            // It has ended in between.
            Err(Error::Missing { provider }) => {
                Err(Error::Failed { provider, what: String::from("its name was taken, and is not any more") })
            }
            Err(error) => Err(error),
        }
    }

    /// Whether its command could be asked.
    async fn ask_to_end(&self, native: &str, grace: Duration) -> Result<bool> {
        let key = self.tags(native).await?.into_iter().find(|tag| tag.tag_name == KEY_LABEL);
        let Some(key) = key else { return Ok(false) };
        let ask = Exec {
            argv: ["sh", "-c", END, &key.tag_value].map(String::from).to_vec(),
            env: BTreeMap::new(),
            stdin: Vec::new(),
            timeout: grace.max(Duration::from_secs(1)),
            detached: false,
        };
        Ok(self.run(native, &ask).await?.exit_code == Some(0))
    }

    async fn terminate(&self, native: &str) -> Result<()> {
        let request = m::SandboxTerminateRequest { sandbox_id: native.to_owned() };
        match self.api.ask::<_, m::SandboxTerminateResponse>(&api!("SandboxTerminate"), request).await {
            Ok(_) | Err(Error::Missing { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// The router of the host that a container is on.
    async fn router(&self, native: &str) -> Result<(Server, String)> {
        self.alive(native).await?;
        let task = self.task(native).await?;
        let task = task.ok_or_else(|| Error::Failed { provider: NAME, what: String::from("it has no place to run yet") })?;
        let request = m::TaskGetCommandRouterAccessRequest { task_id: task.clone() };
        let access: m::TaskGetCommandRouterAccessResponse = self.api.ask(&api!("TaskGetCommandRouterAccess"), request).await?;
        let failed = |what| Error::Failed { provider: NAME, what };
        let router = Server::new(&access.url, Auth::Bearer(access.jwt)).map_err(failed)?;
        // Its token goes nowhere in plain text, but to who is beside a plain interface: a test.
        if router.is_plain() && !self.api.is_plain() {
            return Err(failed(String::from("its router is not reached over TLS")));
        }
        Ok((router, task))
    }

    async fn run(&self, native: &str, command: &Exec) -> Result<Executed> {
        if command.argv.is_empty() {
            return Err(Error::Refused { provider: NAME, what: String::from("a command without a word") });
        }
        let (router, task_id) = self.router(native).await?;
        let exec_id = uuid::Uuid::now_v7().to_string();
        let kept = if command.detached { 0 } else { m::PIPE };
        let start = m::TaskExecStartRequest {
            task_id: task_id.clone(),
            exec_id: exec_id.clone(),
            command_args: command.argv.clone(),
            stdout_config: kept,
            stderr_config: kept,
            timeout_secs: (!command.detached).then(|| seconds(command.timeout)),
            env: command.env.clone().into_iter().collect(),
        };
        // By its id it is started once, however often that is asked for.
        let started = router.ask::<_, m::TaskExecStartResponse>(&router!("TaskExecStart"), start).await;
        started.map_err(|error| match error {
            // The container was there just now: it is the program that is not.
            Error::Missing { provider } => Error::Refused { provider, what: format!("there is no `{}` to run", command.argv[0]) },
            error => error,
        })?;
        let ran = Ran { router: &router, task_id, exec_id };
        if command.detached {
            ran.feed(&command.stdin).await?;
            return Ok(Executed::default());
        }
        let began = Instant::now();
        let (mut out, mut err) = (Kept::default(), Kept::default());
        let heard = async {
            let read = async {
                futures_util::try_join!(ran.read(m::EXEC_STDOUT, &mut out), ran.read(m::EXEC_STDERR, &mut err)).map(drop)
            };
            let end = async {
                // Who ends before he has read everything is no failure.
                let (fed, ended) = futures_util::join!(ran.feed(&command.stdin), ran.end());
                ended.map(|ended| (fed, ended))
            };
            let (mut read, mut end) = (std::pin::pin!(read), std::pin::pin!(end));
            tokio::select! {
                done = &mut read => {
                    done?;
                    end.await.map(|(_, ended)| ended)
                }
                done = &mut end => {
                    let (_, ended) = done?;
                    // What holds the output open after its end is not waited for for ever.
                    tokio::time::timeout(REST, read).await.unwrap_or(Ok(()))?;
                    Ok(ended)
                }
            }
        };
        let ended = match tokio::time::timeout(command.timeout + SLACK, heard).await {
            Ok(ended) => ended?,
            Err(_) => Ended::default(),
        };
        // A command that was killed when its time was over is told like any that was killed.
        let late = began.elapsed() >= command.timeout;
        let exit_code = match (ended.code, ended.signal) {
            (Some(code), _) => Some(code),
            (None, Some(signal)) if !late => Some(128 + signal),
            (None, _) => None,
        };
        let cut = out.cut || err.cut;
        Ok(Executed { exit_code, stdout: out.bytes, stderr: err.bytes, cut })
    }

    /// What one of its outputs has said last, with when.
    async fn output(&self, native: &str, file_descriptor: i32, most: usize) -> Result<VecDeque<(f64, String)>> {
        let request = m::SandboxGetLogsRequest {
            sandbox_id: native.to_owned(),
            file_descriptor,
            timeout: QUIET.as_secs_f32(),
            last_entry_id: String::new(),
        };
        let (mut kept, mut length) = (VecDeque::new(), 0);
        let read = async {
            let mut batches = self.api.stream::<_, m::TaskLogsBatch>(&api!("SandboxGetLogs"), request).await?;
            // One that runs on has no end.
            while let Ok(next) = tokio::time::timeout(QUIET, batches.message()).await {
                let Some(batch) = next.map_err(|status| client::error(&status, true, &[]))? else { break };
                for item in batch.items {
                    length += item.data.len();
                    kept.push_back((item.timestamp, item.data));
                    while let Some((_, first)) = kept.front().filter(|(_, first)| length - first.len() >= most) {
                        length -= first.len();
                        kept.pop_front();
                    }
                }
                if batch.eof {
                    break;
                }
            }
            Ok(())
        };
        // What has come until then counts: it is the last that there was.
        tokio::time::timeout(Duration::from_secs(30), read).await.unwrap_or(Ok(()))?;
        Ok(kept)
    }
}

/// A command that was started.
struct Ran<'a> {
    router: &'a Server,
    task_id: String,
    exec_id: String,
}

#[derive(Default)]
struct Ended {
    code: Option<i32>,
    signal: Option<i32>,
}

/// As much of an output as is kept.
#[derive(Default)]
struct Kept {
    bytes: Vec<u8>,
    cut: bool,
    /// How much there was: from here it is read on.
    offset: u64,
}

impl Ran<'_> {
    async fn feed(&self, stdin: &[u8]) -> Result<()> {
        let mut offset = 0;
        loop {
            let rest = &stdin[offset..];
            let data = rest[..rest.len().min(INPUT)].to_vec();
            let (next, eof) = (offset + data.len(), rest.len() <= INPUT);
            let request = m::TaskExecStdinWriteRequest {
                task_id: self.task_id.clone(),
                exec_id: self.exec_id.clone(),
                offset: offset as u64,
                data,
                eof,
            };
            self.router.ask::<_, m::TaskExecStdinWriteResponse>(&router!("TaskExecStdinWrite"), request).await?;
            if eof {
                return Ok(());
            }
            offset = next;
        }
    }

    /// Reads an output to its end, and goes on where it was when the connection breaks.
    async fn read(&self, file_descriptor: i32, into: &mut Kept) -> Result<()> {
        let mut failures = 0;
        loop {
            let request = m::TaskExecStdioReadRequest {
                task_id: self.task_id.clone(),
                exec_id: self.exec_id.clone(),
                offset: into.offset,
                file_descriptor,
            };
            // As long as the command takes: the caller has the bound.
            let call =
                Call { effort: Effort { timeout: Duration::from_secs(24 * 3600), ..SAFE }, ..router!("TaskExecStdioRead") };
            let error = match self.router.stream::<_, m::TaskExecStdioReadResponse>(&call, request).await {
                Err(error) => error,
                Ok(mut pieces) => loop {
                    match pieces.message().await {
                        Ok(None) => return Ok(()),
                        Ok(Some(piece)) => {
                            failures = 0;
                            into.offset += piece.data.len() as u64;
                            let fits = piece.data.len().min(OUTPUT_MOST - into.bytes.len());
                            into.bytes.extend_from_slice(&piece.data[..fits]);
                            into.cut |= fits < piece.data.len();
                        }
                        Err(status) => break client::error(&status, true, &[]),
                    }
                },
            };
            failures += 1;
            if !error.is_passing() || failures == 3 {
                return Err(unsure(error));
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Waits for its end, however long that takes: the caller has the bound.
    async fn end(&self) -> Result<Ended> {
        let mut failures = 0;
        loop {
            let request = m::TaskExecWaitRequest { task_id: self.task_id.clone(), exec_id: self.exec_id.clone() };
            let call = Call { effort: Effort { safe: false, timeout: WAITS }, ..router!("TaskExecWait") };
            let began = Instant::now();
            match self.router.ask::<_, m::TaskExecWaitResponse>(&call, request).await {
                Ok(m::TaskExecWaitResponse { code, signal }) => return Ok(Ended { code, signal }),
                // It goes on.
                Err(error) if error.is_passing() && began.elapsed() >= WAITS => {}
                Err(error) => {
                    failures += 1;
                    if !error.is_passing() || failures == 3 {
                        return Err(unsure(error));
                    }
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            }
        }
    }
}

#[async_trait]
impl Provider for Modal {
    fn name(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            command: true,
            env: true,
            provider_secrets: true,
            size: true,
            ports: true,
            list: true,
            ttl: Some(Bounds { least: Duration::from_secs(1), most: Duration::from_secs(24 * 3600) }),
            idle_timer: true,
            // Its snapshots are new sandboxes, and those of memory are an experiment.
            pause: Pause::No,
            exec: true,
            logs: true,
            events: false,
            endpoint: true,
            traffic_keeps_awake: true,
            nodes: false,
        }
    }

    fn price(&self, size: Size) -> Price {
        self.settings.price.clone().unwrap_or_else(|| {
            // $0.00003942 per physical core and second, $0.00000667 per GiB and second. The disk is free.
            let cores = f64::from(cores_milli(size)) / 1000.0;
            let gib = f64::from(size.memory_mib) / 1024.0;
            Price {
                running: 3600.0 * (0.000_039_42 * cores + 0.000_006_67 * gib) * self.settings.region_factor,
                paused: 0.0,
                stopped: 0.0,
                source: String::from("modal.com/pricing (sandboxes), as of 2026-10-08"),
            }
        })
    }

    async fn create(&self, spec: &Spec) -> Result<Sandbox> {
        if !is_name(&spec.key) {
            return Err(Error::Refused { provider: NAME, what: format!("`{}` is no name for a sandbox", spec.key) });
        }
        if spec.image.is_empty() || spec.image.contains(char::is_whitespace) {
            return Err(Error::Refused { provider: NAME, what: format!("`{}` is no image", spec.image) });
        }
        rest::check_names(NAME, &spec.env)?;
        let _one_at_a_time = self.in_flight.lock(&spec.key).await;
        // What cannot be read refuses the container before it is looked for.
        let secrets = secret::read_all(NAME, spec)?;
        let app = self.app().await?;
        let made = match self.find(&app, &spec.key).await? {
            Some(found) => found,
            None => self.make(spec, &secrets, &app).await?,
        };
        // A place for it may have been found already.
        if made.state != State::Creating || self.task(&made.native).await.ok().flatten().is_none() {
            return Ok(made);
        }
        Ok(Sandbox { state: State::Running, ..made })
    }

    /// What is there runs, or has ended for good.
    async fn start(&self, native: &str) -> Result<()> {
        self.alive(native).await
    }

    async fn state(&self, native: &str) -> Result<Sandbox> {
        let (result, tags) = futures_util::join!(self.result(native), self.tags(native));
        let Some(result) = result? else { return Ok(rest::missing(native)) };
        let tags = match tags {
            Err(Error::Missing { .. }) => Vec::new(),
            tags => tags?,
        };
        let running = match result.status {
            0 if self.task(native).await?.is_none() => State::Creating,
            _ => State::Running,
        };
        Ok(self.seen(native.to_owned(), &result, running, tags))
    }

    /// Those that have not ended: those that have are listed for good, and cost nothing.
    async fn list(&self, labels: &BTreeMap<String, String>, page: Option<&str>) -> Result<Page> {
        let before = match page.map(str::parse) {
            Some(Err(_)) => return Err(Error::Refused { provider: NAME, what: String::from("there is no such page") }),
            before => before.and_then(std::result::Result::ok),
        };
        let app = self.app().await?;
        let Before { found, unread, next } = self.page(&app, tags(labels), false, before).await?;
        Ok(Page { sandboxes: found, unread, next: next.map(|next| next.to_string()) })
    }

    async fn exec(&self, native: &str, command: &Exec) -> Result<Executed> {
        self.run(native, command).await
    }

    async fn logs(&self, native: &str, most: usize) -> Result<Vec<u8>> {
        let result = self.result(native).await?.ok_or(Error::Missing { provider: NAME })?;
        if self.seen(native.to_owned(), &result, State::Running, Vec::new()).state.is_gone() {
            return Err(Error::Missing { provider: NAME });
        }
        let most = most.min(OUTPUT_MOST);
        let (out, err) = futures_util::try_join!(self.output(native, m::STDOUT, most), self.output(native, m::STDERR, most))?;
        let mut both: Vec<(f64, String)> = out.into_iter().chain(err).collect();
        both.sort_by(|a, b| a.0.total_cmp(&b.0));
        let all: Vec<u8> = both.into_iter().flat_map(|(_, data)| data.into_bytes()).collect();
        Ok(all[all.len().saturating_sub(most)..].to_vec())
    }

    /// Its end stays where it is. An idle timer is set back by a command that is run in it: nothing else of ours is one of its signs of life.
    async fn keep_alive(&self, native: &str, _until: Timestamp) -> Result<()> {
        if !self.tags(native).await?.iter().any(|tag| tag.tag_name == IDLE_LABEL) {
            return Ok(());
        }
        let nothing = Exec {
            argv: vec![String::from("true")],
            env: BTreeMap::new(),
            stdin: Vec::new(),
            timeout: Duration::from_secs(30),
            detached: false,
        };
        self.run(native, &nothing).await.map(drop)
    }

    async fn pause(&self, _native: &str) -> Result<()> {
        Err(Error::Unsupported { provider: NAME, verb: "pause", hint: Some("end it, and go on in another") })
    }

    async fn resume(&self, _native: &str, _: &[String]) -> Result<()> {
        Err(Error::Unsupported { provider: NAME, verb: "resume", hint: Some("end it, and go on in another") })
    }

    /// Asks our command to end, and waits for that; then it is terminated, which gives no time for anything.
    async fn stop(&self, native: &str, grace: Duration) -> Result<()> {
        let until = Instant::now() + grace;
        let over = async || Ok(self.result(native).await?.is_none_or(|result| result.status != 0));
        if over().await? {
            return Ok(());
        }
        // Who cannot be asked is not waited for.
        match tokio::time::timeout_at(until, self.ask_to_end(native, grace)).await {
            Ok(Ok(false)) => return self.terminate(native).await,
            Ok(Err(error)) => tracing::debug!(%error, "its command could not be asked to end, or has ended meanwhile"),
            Ok(Ok(true)) | Err(_) => {}
        }
        while !over().await? && Instant::now() < until {
            tokio::time::sleep_until(until.min(Instant::now() + Duration::from_millis(250))).await;
        }
        if over().await? { Ok(()) } else { self.terminate(native).await }
    }

    /// One that has ended by itself cannot be made unknown to Modal: we remember that it is not to be seen any more.
    async fn delete(&self, native: &str) -> Result<()> {
        self.terminate(native).await?;
        let mut known = self.known();
        if known.deleted.len() >= REMEMBERED {
            known.deleted.pop_first();
        }
        known.deleted.insert(native.to_owned());
        known.tasks.remove(native);
        Ok(())
    }

    async fn endpoint(&self, native: &str, port: u16) -> Result<Endpoint> {
        let request = m::SandboxGetTunnelsRequest { sandbox_id: native.to_owned(), timeout: 10.0 };
        let has: m::SandboxGetTunnelsResponse = self.api.ask(&api!("SandboxGetTunnels"), request).await?;
        if has.result.is_some_and(|result| result.status == status::TIMEOUT) {
            return Err(Error::Failed { provider: NAME, what: String::from("its ports are not open yet") });
        }
        let tunnel = has.tunnels.into_iter().find(|tunnel| tunnel.container_port == u32::from(port));
        let tunnel = tunnel
            .ok_or_else(|| Error::Refused { provider: NAME, what: format!("port {port} was not opened when it was created") })?;
        let port = if tunnel.port == 443 { String::new() } else { format!(":{}", tunnel.port) };
        Ok(Endpoint { url: format!("https://{}{port}", tunnel.host), headers: Vec::new() })
    }

    async fn events(&self, _labels: &BTreeMap<String, String>) -> Result<BoxStream<'static, Result<Happened>>> {
        Err(Error::Unsupported { provider: NAME, verb: "say what happens", hint: Some("it is asked instead") })
    }
}

/// As their clients take names.
fn is_name(name: &str) -> bool {
    let right = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    !name.is_empty() && name.len() < 64 && name.chars().all(right)
}

fn begun(key: &str, command: &[String]) -> Vec<String> {
    if command.is_empty() {
        return Vec::new();
    }
    ["sh", "-c", BEGIN, key].into_iter().map(String::from).chain(command.iter().cloned()).collect()
}

/// A physical core is two of what others call a CPU; less than an eighth of one is not sold.
fn cores_milli(size: Size) -> u32 {
    size.cpu_milli.div_ceil(2).max(125)
}

/// In whole seconds, and never none: that would be theirs to say.
fn seconds(time: Duration) -> u32 {
    let whole = time.as_secs() + u64::from(time.subsec_nanos() > 0);
    u32::try_from(whole).unwrap_or(u32::MAX).max(1)
}

fn tags(labels: &BTreeMap<String, String>) -> Vec<m::SandboxTag> {
    labels.iter().map(|(name, value)| m::SandboxTag { tag_name: name.clone(), tag_value: value.clone() }).collect()
}

/// What is not there is none of our containers: an app, an image, an environment. That is no container's being gone.
fn refuse_missing(error: Error) -> Error {
    match error {
        Error::Missing { provider } => {
            Error::Refused { provider, what: String::from("the environment, the app or the image is not there") }
        }
        error => error,
    }
}

/// A command that was started may have done its work.
fn unsure(error: Error) -> Error {
    match error {
        Error::Failed { provider, what } => Error::Unsure { provider, what },
        error => error,
    }
}

/// Their words in a line.
fn plain(text: &str) -> String {
    let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(300).collect();
    text.trim().to_owned()
}
