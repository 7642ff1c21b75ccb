//! Daytona: containers and VMs from snapshots, found by our name, with a life that ends by the provider's own clock.
//!
//! Its idle timer counts what comes in, never the agent's work, and stops a container in the middle of a turn after fifteen minutes unless it is
//! told not to. It is switched off, which is safe only together with `ttlMinutes`: both are always sent.

use std::collections::BTreeMap;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::stream::BoxStream;
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::{Value, json};

use super::rest::{self, Auth, Call, Client, Rate};
use super::{
    Bounds, Capabilities, Endpoint, Error, Exec, Executed, Happened, KEY_LABEL, OUTPUT_MOST, Page, Pause, Price, Provider,
    Result, Sandbox, Secret, Size, Spec, State, secret,
};

const NAME: &str = "daytona";
const PAGE: u16 = 100;
/// What a command's time is to the network's.
const SLACK: Duration = Duration::from_secs(20);
/// How long a new container is waited for, if it has a command to begin.
const STARTS: Duration = Duration::from_secs(60);
/// What its output is packed as, to tell the two streams and the code apart: the toolbox has one string.
const OUTPUT_PACKED: usize = 16 << 20;

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    pub token: Secret,
    #[serde(default = "base_url")]
    pub base_url: String,
    /// Whose containers they are, where the token does not say.
    #[serde(default)]
    pub organization: Option<String>,
    /// The region.
    #[serde(default)]
    pub target: Option<String>,
    /// Snapshots here are of VMs, which can be paused.
    #[serde(default)]
    pub vm: bool,
    #[serde(default)]
    pub price: Option<Price>,
}

fn base_url() -> String {
    String::from("https://app.daytona.io/api")
}

pub struct Daytona {
    settings: Settings,
    api: Client,
}

impl Daytona {
    /// # Errors
    /// A sentence that says which setting is wrong.
    pub fn new(settings: Settings) -> std::result::Result<Self, String> {
        let auth = Auth { header: "authorization", scheme: "Bearer " };
        // The smallest tier's, in a minute: 300 creations, 10,000 of everything else.
        let rate = |action: &str| match action {
            "create" => Some(Rate { per_second: 5.0, burst: 30 }),
            _ => Some(Rate { per_second: 160.0, burst: 160 }),
        };
        let api = Client::new(NAME, &settings.base_url, auth, &settings.token, rate)?;
        Ok(Self { settings, api })
    }

    fn ours<'a>(&'a self, call: Call<'a>) -> Call<'a> {
        match &self.settings.organization {
            Some(organization) => call.header("x-daytona-organization-id", organization),
            None => call,
        }
    }

    /// Once more is like once: what is stopped is stopped, what is started is started.
    fn order<'a>(&'a self, action: &'static str, path: &'a [&'a str]) -> Call<'a> {
        self.ours(self.api.post(action, path)).safe().timeout(Duration::from_secs(60))
    }

    async fn make(&self, spec: &Spec) -> Result<Item> {
        let secrets = secret::read_all(NAME, spec)?;
        let mut env = spec.env.clone();
        env.extend(secrets.iter().map(|(name, value)| (name.clone(), value.expose().to_owned())));
        let mut labels = spec.labels.clone();
        labels.insert(String::from(KEY_LABEL), spec.key.clone());
        let kept: Vec<_> = spec
            .secrets
            .iter()
            .filter_map(|(name, secret)| match secret {
                Secret::Provider(kept) => Some(BTreeMap::from([(name, kept)])),
                Secret::Env(_) | Secret::File(_) | Secret::Given(_) => None,
            })
            .collect();
        let minutes = |time: Duration| time.as_secs().div_ceil(60).max(1);
        let mut body = json!({
            "name": spec.key,
            "snapshot": spec.image,
            "env": env,
            "labels": labels,
            "public": false,
            // Off, or as asked for: never the default of fifteen minutes.
            "autoStopInterval": spec.idle.map_or(0, minutes),
            // Stopped is not the end of it: its end is.
            "autoDeleteInterval": -1,
            "ttlMinutes": minutes(spec.ttl),
        });
        if !kept.is_empty() {
            body["secrets"] = json!(kept);
        }
        if self.settings.vm {
            body["autoPauseInterval"] = json!(0);
        }
        if let Some(target) = &self.settings.target {
            body["target"] = json!(target);
        }
        let hide = secrets.values().map(|value| value.expose().to_owned());
        let answer = self
            .ours(self.api.post("create", &["sandbox"]))
            .json(&body)
            .hide(hide)
            .timeout(Duration::from_secs(90))
            .send()
            .await?;
        match answer.status.as_u16() {
            404 => Err(Error::Refused { provider: NAME, what: answer.words() }),
            // Somebody was faster, perhaps we ourselves.
            400 | 409 => match self.item(&spec.key).await? {
                Some(there) => Ok(there),
                None => Err(answer.into_error()),
            },
            _ => answer.ok()?.json(),
        }
    }

    /// By its id, or by the name that is our key.
    async fn item(&self, native: &str) -> Result<Option<Item>> {
        let answer = self.ours(self.api.get("state", &["sandbox", native])).send().await?;
        if answer.status == 404 {
            return Ok(None);
        }
        answer.ok()?.json().map(Some)
    }

    async fn present(&self, native: &str) -> Result<Item> {
        self.item(native).await?.filter(|item| !item.state().is_gone()).ok_or(Error::Missing { provider: NAME })
    }

    /// Waits for a new one until a command can be begun in it, and begins it.
    async fn begin(&self, mut item: Item, key: &str, command: Option<&[String]>) -> Result<Item> {
        let until = tokio::time::Instant::now() + STARTS;
        let mut pause = Duration::from_millis(250);
        while item.state() == State::Creating && tokio::time::Instant::now() < until {
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(2));
            item = self.present(&item.id).await?;
        }
        match item.state() {
            State::Running => {}
            State::Creating => return Err(Error::Unsure { provider: NAME, what: String::from("it is still being made") }),
            // It is there, and does not run: that is said, not mended.
            _ => return Ok(item),
        }
        let begin = rest::command_line(&rest::begin(key, command));
        // The session is only what it takes to go on after the call.
        let session = json!({ "sessionId": key });
        let made = self.toolbox(&item, &["process", "session"])?.json(&session).safe().send().await?;
        if made.status != 409 {
            made.ok()?;
        }
        let run = json!({ "command": begin, "runAsync": true });
        let path = ["process", "session", key, "exec"];
        match self.toolbox(&item, &path)?.json(&run).safe().send().await?.ok() {
            Ok(_) => Ok(item),
            Err(Error::Failed { provider, what }) => Err(Error::Unsure { provider, what }),
            Err(error) => Err(error),
        }
    }

    fn toolbox<'a>(&'a self, item: &'a Item, path: &'a [&'a str]) -> Result<Call<'a>> {
        let base = format!("{}/{}", item.toolbox.as_deref().unwrap_or_default().trim_end_matches('/'), item.id);
        self.ours(self.api.post("exec", path)).at_with_token(&base)
    }

    async fn run(&self, native: &str, command: &Exec) -> Result<Executed> {
        if !command.stdin.is_empty() {
            return Err(Error::Unsupported {
                provider: NAME,
                verb: "give a command its input",
                hint: Some("put it into a file"),
            });
        }
        rest::check_names(NAME, &command.env)?;
        let item = self.present(native).await?;
        if item.state() != State::Running {
            return Err(Error::Refused { provider: NAME, what: format!("it is {}: nothing can be executed in it", item.state) });
        }
        if command.detached {
            let session = json!({ "sessionId": format!("exec-{}", uuid::Uuid::now_v7().simple()) });
            let id = session["sessionId"].as_str().expect("it is one");
            self.toolbox(&item, &["process", "session"])?.json(&session).send().await?.ok()?;
            let set: String = command.env.iter().map(|(name, value)| format!("{name}={} ", rest::quoted(value))).collect();
            let run = json!({ "command": format!("env {set}{}", rest::command_line(&command.argv)), "runAsync": true });
            self.toolbox(&item, &["process", "session", id, "exec"])?.json(&run).send().await?.ok()?;
            return Ok(Executed::default());
        }
        // One string comes back, of both outputs: so they are kept apart, packed, and told one after the other.
        let script = format!(
            "d=$(mktemp -d) || exit 125; timeout -k 1 {} {} >\"$d/o\" 2>\"$d/e\" </dev/null; c=$?; \
             for f in o e; do wc -c <\"$d/$f\"; head -c {OUTPUT_MOST} \"$d/$f\" | base64 -w 0; echo; done; rm -r \"$d\"; exit $c",
            command.timeout.as_secs().max(1),
            rest::command_line(&command.argv),
        );
        let body = json!({
            "command": format!("sh -c {}", rest::quoted(&script)),
            "envs": command.env,
            "timeout": (command.timeout + SLACK).as_secs(),
        });
        let call =
            self.toolbox(&item, &["process", "execute"])?.json(&body).timeout(command.timeout + 2 * SLACK).most(OUTPUT_PACKED);
        let done: Done = call.send().await?.ok()?.json()?;
        unpack(&done).ok_or_else(|| Error::Refused {
            provider: NAME,
            what: format!(
                "a command's output of another shape: the image has no `timeout`, `mktemp` or `base64` ({})",
                done.exit_code
            ),
        })
    }
}

/// Both outputs and the code, as the script of [`Daytona::run`] tells them.
fn unpack(done: &Done) -> Option<Executed> {
    use base64::Engine as _;
    let mut lines = done.result.lines();
    let mut read = || {
        let length: usize = lines.next()?.trim().parse().ok()?;
        let bytes = base64::engine::general_purpose::STANDARD.decode(lines.next()?).ok()?;
        Some((length > bytes.len(), bytes))
    };
    let ((cut_out, stdout), (cut_err, stderr)) = (read()?, read()?);
    // 124, and 137 after it did not hear: `timeout` ended it.
    let exit_code = Some(done.exit_code).filter(|code| !matches!(code, 124 | 137));
    Some(Executed { exit_code, stdout, stderr, cut: cut_out || cut_err })
}

#[async_trait]
impl Provider for Daytona {
    fn name(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            command: false,
            env: true,
            provider_secrets: true,
            // The snapshot's.
            size: false,
            ports: true,
            list: true,
            ttl: Some(Bounds { least: Duration::from_secs(60), most: Duration::from_secs(30 * 24 * 3600) }),
            idle_timer: true,
            pause: if self.settings.vm { Pause::Memory } else { Pause::Disk },
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
            // $0.0504 per vCPU and hour, $0.0162 per GiB and hour; of the disk 5 GiB are free, the others $0.000108 per GiB and hour.
            let disk = 0.000_108 * (f64::from(size.disk_mib) / 1024.0 - 5.0).max(0.0);
            Price {
                running: 0.0504 * f64::from(size.cpu_milli) / 1000.0 + 0.0162 * f64::from(size.memory_mib) / 1024.0 + disk,
                paused: disk,
                stopped: disk,
                source: String::from("daytona.io/pricing, as of 2026-05-25"),
            }
        })
    }

    async fn create(&self, spec: &Spec) -> Result<Sandbox> {
        rest::check_names(NAME, &spec.env)?;
        let item = self.make(spec).await;
        // Not heard is not undone: it has a name.
        let item = match item {
            Err(error @ Error::Unsure { .. }) => self.item(&spec.key).await?.ok_or(error)?,
            item => item?,
        };
        if spec.command.is_empty() {
            return Ok(item.into_sandbox());
        }
        let id = item.id.clone();
        match self.begin(item, &spec.key, Some(&spec.command)).await {
            Ok(item) => Ok(item.into_sandbox()),
            Err(error @ Error::Refused { .. }) => {
                self.delete(&id).await?;
                Err(error)
            }
            Err(error) => Err(error),
        }
    }

    async fn start(&self, native: &str) -> Result<()> {
        let item = self.present(native).await?;
        let Some(key) = item.labels.get(KEY_LABEL).cloned() else {
            return Err(Error::Refused { provider: NAME, what: String::from("it is not one of ours: it has no key") });
        };
        if !matches!(item.state(), State::Running | State::Creating) {
            let answer = self.order("start", &["sandbox", native, "start"]).send().await?;
            // Somebody was faster.
            if !matches!(answer.status.as_u16(), 400 | 409) || self.present(native).await?.state() != State::Running {
                answer.ok()?;
            }
        }
        let mut item = self.present(native).await?;
        // It has been asked for, and may not look like it yet.
        let until = tokio::time::Instant::now() + STARTS;
        while item.state() != State::Running
            && !matches!(item.state(), State::Failed | State::Unknown(_))
            && tokio::time::Instant::now() < until
        {
            tokio::time::sleep(Duration::from_millis(250)).await;
            item = self.present(native).await?;
        }
        // What ran before is not brought back by a start from the disk: it is begun anew.
        self.begin(item, &key, None).await.map(drop)
    }

    async fn state(&self, native: &str) -> Result<Sandbox> {
        Ok(self.item(native).await?.map_or_else(|| rest::missing(native), Item::into_sandbox))
    }

    async fn list(&self, labels: &BTreeMap<String, String>, page: Option<&str>) -> Result<Page> {
        let mut call = self
            .ours(self.api.get("list", &["sandbox"]))
            .query("labels", json!(labels).to_string())
            .query("limit", PAGE.to_string());
        if let Some(page) = page {
            call = call.query("cursor", page);
        }
        let listed: Listed = call.send().await?.ok()?.json()?;
        let (items, unread) = rest::items::<Item>(NAME, &listed.items);
        Ok(Page {
            sandboxes: items.into_iter().map(Item::into_sandbox).collect(),
            unread,
            next: listed.next_cursor.filter(|next| !next.is_empty()),
        })
    }

    async fn exec(&self, native: &str, command: &Exec) -> Result<Executed> {
        self.run(native, command).await
    }

    async fn logs(&self, native: &str, most: usize) -> Result<Vec<u8>> {
        let most = most.min(OUTPUT_MOST);
        let tail = Exec {
            argv: rest::tail(most),
            env: BTreeMap::new(),
            stdin: Vec::new(),
            timeout: Duration::from_secs(30),
            detached: false,
        };
        Ok(self.run(native, &tail).await?.stdout)
    }

    /// The idle timer begins anew; the end stays where it is.
    async fn keep_alive(&self, native: &str, _until: Timestamp) -> Result<()> {
        self.order("keep_alive", &["sandbox", native, "last-activity"]).send().await?.ok().map(drop)
    }

    async fn pause(&self, native: &str) -> Result<()> {
        let item = self.present(native).await?;
        if matches!(item.state(), State::Paused | State::Pausing | State::Stopped | State::Stopping) {
            return Ok(());
        }
        let verb = if self.settings.vm { "pause" } else { "stop" };
        self.order("pause", &["sandbox", native, verb]).send().await?.ok().map(drop)
    }

    async fn resume(&self, native: &str, _: &[String]) -> Result<()> {
        self.start(native).await
    }

    /// Without `force` it asks and waits for ever: what does not hear is forced after the grace.
    async fn stop(&self, native: &str, grace: Duration) -> Result<()> {
        let over =
            |item: &Option<Item>| item.as_ref().is_none_or(|item| item.state() == State::Stopped || item.state().is_gone());
        if over(&self.item(native).await?) {
            return Ok(());
        }
        let until = tokio::time::Instant::now() + grace;
        self.order("stop", &["sandbox", native, "stop"]).query("force", "false").send().await?.ok()?;
        while !over(&self.item(native).await?) {
            if tokio::time::Instant::now() >= until {
                return self.order("stop", &["sandbox", native, "stop"]).query("force", "true").send().await?.ok().map(drop);
            }
            tokio::time::sleep(Duration::from_millis(500).min(until - tokio::time::Instant::now())).await;
        }
        Ok(())
    }

    async fn delete(&self, native: &str) -> Result<()> {
        rest::gone(self.ours(self.api.delete("delete", &["sandbox", native])).send().await?)
    }

    async fn endpoint(&self, native: &str, port: u16) -> Result<Endpoint> {
        let port = port.to_string();
        let preview: Preview = self
            .ours(self.api.get("endpoint", &["sandbox", native, "ports", &port, "preview-url"]))
            .send()
            .await?
            .ok()?
            .json()?;
        Ok(Endpoint { url: rest::at(&preview.url), headers: vec![(String::from("x-daytona-preview-token"), preview.token)] })
    }

    async fn events(&self, _labels: &BTreeMap<String, String>) -> Result<BoxStream<'static, Result<Happened>>> {
        Err(Error::Unsupported { provider: NAME, verb: "say what happens", hint: Some("it is asked instead") })
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Item {
    id: String,
    #[serde(default = "rest::unsaid", deserialize_with = "rest::word")]
    state: String,
    #[serde(default, deserialize_with = "rest::lenient")]
    error_reason: Option<String>,
    #[serde(default)]
    labels: BTreeMap<String, String>,
    #[serde(default, deserialize_with = "rest::lenient")]
    cpu: Option<f64>,
    #[serde(default, deserialize_with = "rest::lenient")]
    memory: Option<f64>,
    #[serde(default, deserialize_with = "rest::lenient")]
    disk: Option<f64>,
    #[serde(default, deserialize_with = "rest::time")]
    created_at: Option<Timestamp>,
    #[serde(default, deserialize_with = "rest::time")]
    auto_destroy_at: Option<Timestamp>,
    #[serde(default, rename = "toolboxProxyUrl", deserialize_with = "rest::lenient")]
    toolbox: Option<String>,
}

impl Item {
    fn state(&self) -> State {
        match self.state.as_str() {
            "creating" | "restoring" | "pending_build" | "building_snapshot" | "pulling_snapshot" | "starting" | "resuming" => {
                State::Creating
            }
            // It runs while its picture is taken.
            "started" | "resizing" | "snapshotting" | "forking" => State::Running,
            "pausing" => State::Pausing,
            "paused" => State::Paused,
            "stopping" | "destroying" => State::Stopping,
            "stopped" | "archiving" | "archived" => State::Stopped,
            "error" | "build_failed" => State::Failed,
            "destroyed" => State::Destroyed,
            other => State::Unknown(other.to_owned()),
        }
    }

    fn into_sandbox(self) -> Sandbox {
        // As casts do: what is no number of MiB is none.
        let mib = |gib: f64| (gib * 1024.0) as u32;
        Sandbox {
            key: self.labels.get(KEY_LABEL).cloned(),
            state: self.state(),
            native: self.id,
            reason: self.error_reason,
            exit_code: None,
            size: self.cpu.zip(self.memory).map(|(cpu, memory)| Size {
                cpu_milli: (cpu * 1000.0) as u32,
                memory_mib: mib(memory),
                disk_mib: self.disk.map_or(0, mib),
            }),
            created: self.created_at,
            deadline: self.auto_destroy_at,
            labels: self.labels,
            node: None,
            disrupted: None,
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Listed {
    items: Vec<Value>,
    next_cursor: Option<String>,
}

#[derive(Deserialize)]
struct Preview {
    url: String,
    token: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Done {
    #[serde(default)]
    exit_code: i32,
    result: String,
}
