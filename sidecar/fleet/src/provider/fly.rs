//! Fly Machines: VMs from images, with our command, found by a name that is unique.
//!
//! It ends nothing by itself: neither is there a life that it counts nor, without a service, an idle timer. The sidecar's lease and the reconciler
//! do that. A machine that has ended stays, stopped, until it is deleted: were it to destroy itself, its name would be free, and who did not hear
//! of its end would make it again.

use std::collections::BTreeMap;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::stream::BoxStream;
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::{Value, json};

use super::rest::{self, Answer, Auth, Call, Client, Rate};
use super::{
    Capabilities, ENDS_LABEL, Endpoint, Error, Exec, Executed, Happened, KEY_LABEL, OUTPUT_MOST, Page, Pause, Price, Provider,
    Result, Sandbox, Secret, Size, Spec, State, secret,
};

const NAME: &str = "fly";
const PAGE: u16 = 100;
/// What a command's time is to the network's.
const SLACK: Duration = Duration::from_secs(20);
/// They wait no longer between asking and killing.
const GRACE_MOST: Duration = Duration::from_secs(300);
/// What is free of a root disk, in GiB.
const DISK_GIB: u32 = 8;
/// Both outputs as JSON text: six letters for a byte at the worst.
const OUTPUT_PACKED: usize = 13 * OUTPUT_MOST;

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// A deploy token of the app, and of no other.
    pub token: Secret,
    #[serde(default = "base_url")]
    pub base_url: String,
    /// The app that the machines are in. It is there already.
    pub app: String,
    #[serde(default)]
    pub region: Option<String>,
    #[serde(default)]
    pub cpu: Cpu,
    /// Creations a second: one, unless they have given more.
    #[serde(default = "one")]
    pub creates_per_second: u32,
    #[serde(default)]
    pub price: Option<Price>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Cpu {
    #[default]
    Shared,
    Performance,
}

fn base_url() -> String {
    String::from("https://api.machines.dev/v1")
}

fn one() -> u32 {
    1
}

pub struct Fly {
    settings: Settings,
    api: Client,
}

impl Fly {
    /// # Errors
    /// A sentence that says which setting is wrong.
    pub fn new(settings: Settings) -> std::result::Result<Self, String> {
        if settings.creates_per_second == 0 {
            return Err(String::from("`creates_per_second` is 0: nothing could be created"));
        }
        let auth = Auth { header: "authorization", scheme: "Bearer " };
        // For each action and machine; creations are the app's.
        let creates = f64::from(settings.creates_per_second);
        let rate = move |action: &str| match action {
            "create" => Some(Rate { per_second: creates, burst: 3 }),
            "state" => Some(Rate { per_second: 5.0, burst: 10 }),
            "list" => None,
            _ => Some(Rate { per_second: 1.0, burst: 3 }),
        };
        let api = Client::new(NAME, &settings.base_url, auth, &settings.token, rate)?;
        Ok(Self { settings, api })
    }

    fn path<'a>(&'a self, rest: &[&'a str]) -> Vec<&'a str> {
        ["apps", &self.settings.app, "machines"].iter().chain(rest).copied().collect()
    }

    async fn machine(&self, native: &str) -> Result<Option<Machine>> {
        let answer = self.api.get("state", &self.path(&[native])).of(native).send().await?;
        if answer.status == 404 {
            return Ok(None);
        }
        answer.ok()?.json().map(Some)
    }

    async fn present(&self, native: &str) -> Result<Machine> {
        self.machine(native).await?.filter(|machine| !machine.state().is_gone()).ok_or(Error::Missing { provider: NAME })
    }

    /// An order that changes nothing when it is given twice. Its body is never empty: they refuse that.
    async fn order(&self, native: &str, verb: &'static str, body: &Value) -> Result<Answer> {
        let path = self.path(&[native, verb]);
        self.ordered(self.api.post(verb, &path), native, body).await
    }

    async fn ordered(&self, call: Call<'_>, native: &str, body: &Value) -> Result<Answer> {
        call.of(native).safe().json(body).timeout(Duration::from_secs(90)).send().await
    }

    /// What they offer of at least this size.
    fn guest(&self, size: Size) -> (u32, u32) {
        let cpus = size.cpu_milli.div_ceil(1000).max(1).next_power_of_two();
        let memory = size.memory_mib.div_ceil(256).max(1) * 256;
        let (least, most) = match self.settings.cpu {
            Cpu::Shared => (256, 2048),
            Cpu::Performance => (2048, 8192),
        };
        let cpus = cpus.max(memory.div_ceil(most).next_power_of_two());
        (cpus, memory.max(least * cpus))
    }

    fn config(&self, spec: &Spec, env: &BTreeMap<String, String>) -> Value {
        let (cpus, memory) = self.guest(spec.size);
        let mut labels = spec.labels.clone();
        labels.insert(String::from(KEY_LABEL), spec.key.clone());
        labels.insert(String::from(ENDS_LABEL), rest::ends(spec.ttl));
        let kind = match self.settings.cpu {
            Cpu::Shared => "shared",
            Cpu::Performance => "performance",
        };
        let mut config = json!({
            "image": spec.image,
            "env": env,
            "guest": { "cpu_kind": kind, "cpus": cpus, "memory_mb": memory },
            "metadata": labels,
            // Who starts it again is the fleet.
            "restart": { "policy": "no" },
            "auto_destroy": false,
            "stop_config": { "signal": "SIGTERM", "timeout": "30s" },
        });
        if !spec.command.is_empty() {
            config["init"] = json!({ "exec": spec.command });
        }
        let disk = spec.size.disk_mib.div_ceil(1024);
        if disk > DISK_GIB {
            config["rootfs"] = json!({ "size_gb": disk });
        }
        config
    }
}

/// Which machine has the name, by the words of a refusal.
fn named(words: &str) -> Option<&str> {
    let (_, rest) = words.split_once("machine ID ")?;
    rest.split(|c: char| !c.is_ascii_alphanumeric()).next().filter(|id| !id.is_empty())
}

#[async_trait]
impl Provider for Fly {
    fn name(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            command: true,
            env: true,
            provider_secrets: false,
            size: true,
            // All of them, in the private network.
            ports: true,
            list: true,
            ttl: None,
            idle_timer: false,
            pause: Pause::Memory,
            exec: true,
            logs: false,
            events: false,
            endpoint: true,
            traffic_keeps_awake: false,
            nodes: false,
        }
    }

    fn price(&self, size: Size) -> Price {
        self.settings.price.clone().unwrap_or_else(|| {
            let (cpus, memory) = self.guest(size);
            // A shared CPU with 256 MiB, or a whole one with 2 GiB; $5 for each further GB in 30 days; a disk that is not in use $0.15 for each GB.
            let (cpu, included) = match self.settings.cpu {
                Cpu::Shared => (0.003_01, 256),
                Cpu::Performance => (0.0447, 2048),
            };
            let more = f64::from(memory - included * cpus) / 1024.0;
            let disk = 0.15 / 720.0 * f64::from(size.disk_mib) / 1024.0;
            let running = cpu * f64::from(cpus) + 5.0 / 720.0 * more;
            Price {
                running,
                paused: disk.min(running),
                stopped: disk.min(running),
                source: String::from("fly.io/docs/about/pricing (region ams), as of 2026-11-23"),
            }
        })
    }

    async fn create(&self, spec: &Spec) -> Result<Sandbox> {
        let secrets = secret::read_all(NAME, spec)?;
        let mut env = spec.env.clone();
        env.extend(secrets.iter().map(|(name, value)| (name.clone(), value.expose().to_owned())));
        let mut body = json!({ "name": spec.key, "config": self.config(spec, &env), "skip_launch": false });
        if let Some(region) = &self.settings.region {
            body["region"] = json!(region);
        }
        let hide = secrets.values().map(|value| value.expose().to_owned());
        // The name is unique: twice is once.
        let path = self.path(&[]);
        let answer = self.api.post("create", &path).safe().json(&body).hide(hide).timeout(Duration::from_secs(90)).send().await?;
        if matches!(answer.status.as_u16(), 409 | 422)
            && let Some(id) = named(&answer.words())
        {
            return Ok(self.present(id).await?.into_sandbox());
        }
        if answer.status == 404 {
            return Err(Error::Refused { provider: NAME, what: answer.words() });
        }
        let made: Machine = answer.ok()?.json()?;
        Ok(made.into_sandbox())
    }

    async fn start(&self, native: &str) -> Result<()> {
        if matches!(self.present(native).await?.state(), State::Running | State::Creating) {
            return Ok(());
        }
        self.order(native, "start", &json!({})).await?.ok().map(drop)
    }

    async fn state(&self, native: &str) -> Result<Sandbox> {
        Ok(self.machine(native).await?.map_or_else(|| rest::missing(native), Machine::into_sandbox))
    }

    async fn list(&self, labels: &BTreeMap<String, String>, page: Option<&str>) -> Result<Page> {
        let names: Vec<(String, &String)> = labels.iter().map(|(name, value)| (format!("metadata.{name}"), value)).collect();
        let path = self.path(&[]);
        let mut call = self.api.get("list", &path).query("limit", PAGE.to_string());
        for (name, value) in &names {
            call = call.query(name, value.as_str());
        }
        if let Some(page) = page {
            call = call.query("cursor", page);
        }
        let answer = call.send().await?.ok()?;
        let (listed, mut unread) = rest::items::<Machine>(NAME, &answer.json::<Vec<Value>>()?);
        let mut sandboxes = Vec::with_capacity(listed.len());
        for machine in listed {
            let Some(config) = machine.config() else {
                super::tell_unread(NAME, &machine.id, &"it has no configuration, which would say whose it is");
                unread += 1;
                continue;
            };
            // Who does not know how to filter gives everything.
            if labels.iter().all(|(name, value)| config.metadata.get(name) == Some(value)) {
                sandboxes.push(machine.into_sandbox());
            }
        }
        Ok(Page { next: answer.header("fly-next-cursor").map(str::to_owned), sandboxes, unread })
    }

    async fn exec(&self, native: &str, command: &Exec) -> Result<Executed> {
        rest::check_names(NAME, &command.env)?;
        let machine = self.present(native).await?;
        if machine.state() != State::Running {
            return Err(Error::Refused {
                provider: NAME,
                what: format!("it is {}: nothing can be executed in it", machine.state),
            });
        }
        let Ok(stdin) = String::from_utf8(command.stdin.clone()) else {
            return Err(Error::Unsupported {
                provider: NAME,
                verb: "give a command bytes that are no text",
                hint: Some("encode them"),
            });
        };
        let mut argv: Vec<String> = if command.detached {
            ["sh", "-c", "exec \"$@\" >/dev/null 2>&1 </dev/null &", "sh"].map(String::from).to_vec()
        } else {
            // Their own time is over without a word of what was printed until then.
            ["timeout", "-k", "1", &command.timeout.as_secs().max(1).to_string()].map(String::from).to_vec()
        };
        if !command.env.is_empty() {
            argv.push(String::from("env"));
            argv.extend(command.env.iter().map(|(name, value)| format!("{name}={value}")));
        }
        argv.extend(command.argv.iter().cloned());
        let mut body = json!({ "command": argv, "timeout": (command.timeout + SLACK).as_secs() });
        if !stdin.is_empty() {
            body["stdin"] = json!(stdin);
        }
        let path = self.path(&[native, "exec"]);
        let call = self.api.post("exec", &path).of(native).json(&body).timeout(command.timeout + 2 * SLACK).most(OUTPUT_PACKED);
        let done: Done = call.header("accept", "application/json").send().await?.ok()?.json()?;
        let whole = done.stdout.len().max(done.stderr.len()) <= OUTPUT_MOST;
        let cut = |text: String| {
            let mut bytes = text.into_bytes();
            bytes.truncate(OUTPUT_MOST);
            bytes
        };
        let exit_code = Some(done.exit_code).filter(|code| command.detached || !matches!(code, 124 | 137));
        Ok(Executed {
            exit_code: exit_code.filter(|_| done.exit_signal == 0),
            stdout: cut(done.stdout),
            stderr: cut(done.stderr),
            cut: !whole,
        })
    }

    async fn logs(&self, _native: &str, _most: usize) -> Result<Vec<u8>> {
        Err(Error::Unsupported {
            provider: NAME,
            verb: "give the last output",
            hint: Some("it ships logs over NATS: see fly-log-shipper"),
        })
    }

    /// There is no timer to move.
    async fn keep_alive(&self, _native: &str, _until: Timestamp) -> Result<()> {
        Ok(())
    }

    async fn pause(&self, native: &str) -> Result<()> {
        if matches!(self.present(native).await?.state(), State::Paused | State::Pausing | State::Stopped) {
            return Ok(());
        }
        self.order(native, "suspend", &json!({})).await?.ok().map(drop)
    }

    async fn resume(&self, native: &str, _: &[String]) -> Result<()> {
        self.start(native).await
    }

    /// They ask and kill by themselves, even if nobody is there any more.
    async fn stop(&self, native: &str, grace: Duration) -> Result<()> {
        match self.machine(native).await? {
            None => return Ok(()),
            Some(machine) if matches!(machine.state(), State::Stopped | State::Stopping | State::Failed | State::Destroyed) => {
                return Ok(());
            }
            Some(_) => {}
        }
        let body = json!({ "signal": "SIGTERM", "timeout": format!("{}s", grace.min(GRACE_MOST).as_secs()) });
        rest::gone(self.order(native, "stop", &body).await?)
    }

    async fn delete(&self, native: &str) -> Result<()> {
        let path = self.path(&[native]);
        rest::gone(self.api.delete("delete", &path).of(native).query("force", "true").send().await?)
    }

    /// In the private network: who asks is in it, on Fly or by WireGuard. Nothing is opened to the world.
    async fn endpoint(&self, native: &str, port: u16) -> Result<Endpoint> {
        let machine = self.present(native).await?;
        let Some(address) = machine.private_ip.filter(|address| !address.is_empty()) else {
            return Err(Error::Failed { provider: NAME, what: String::from("it has no address yet") });
        };
        let host = if address.contains(':') { format!("[{address}]") } else { address };
        Ok(Endpoint { url: format!("http://{host}:{port}"), headers: Vec::new() })
    }

    async fn events(&self, _labels: &BTreeMap<String, String>) -> Result<BoxStream<'static, Result<Happened>>> {
        Err(Error::Unsupported { provider: NAME, verb: "say what happens", hint: Some("it is asked instead") })
    }
}

#[derive(Deserialize)]
struct Machine {
    id: String,
    #[serde(default = "rest::unsaid", deserialize_with = "rest::word")]
    state: String,
    #[serde(default)]
    config: Option<Config>,
    /// What there is of it in the place of that, while its host cannot be reached.
    #[serde(default)]
    incomplete_config: Option<Config>,
    #[serde(default, deserialize_with = "rest::time")]
    created_at: Option<Timestamp>,
    #[serde(default, deserialize_with = "rest::lenient")]
    private_ip: Option<String>,
    #[serde(default, deserialize_with = "rest::lenient")]
    host_status: Option<String>,
    /// The newest first.
    #[serde(default, deserialize_with = "rest::lenient")]
    events: Vec<Event>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Config {
    metadata: BTreeMap<String, String>,
    #[serde(deserialize_with = "rest::lenient")]
    guest: Guest,
    #[serde(deserialize_with = "rest::lenient")]
    rootfs: Rootfs,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Guest {
    cpus: u32,
    memory_mb: u32,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Rootfs {
    size_gb: Option<u32>,
}

#[derive(Deserialize)]
struct Event {
    #[serde(default, rename = "type")]
    kind: String,
    #[serde(default)]
    request: Value,
}

impl Machine {
    fn config(&self) -> Option<&Config> {
        self.config.as_ref().or(self.incomplete_config.as_ref())
    }

    fn state(&self) -> State {
        match self.state.as_str() {
            "created" => State::Created,
            "creating" | "starting" | "restarting" | "updating" | "replacing" => State::Creating,
            "started" => State::Running,
            "suspending" => State::Pausing,
            "suspended" => State::Paused,
            "stopping" | "destroying" => State::Stopping,
            "stopped" => State::Stopped,
            "failed" | "launch_failed" => State::Failed,
            "destroyed" | "replaced" | "migrated" => State::Destroyed,
            other => State::Unknown(other.to_owned()),
        }
    }

    fn into_sandbox(self) -> Sandbox {
        let state = self.state();
        let exit = self
            .events
            .iter()
            .find(|event| event.kind == "exit")
            .filter(|_| matches!(state, State::Stopped | State::Failed | State::Destroyed));
        let exit = exit.map(|event| &event.request["exit_event"]);
        let oom = exit.is_some_and(|exit| exit["oom_killed"] == true);
        let host = self.host_status.filter(|status| status != "ok").map(|status| format!("its host is {status}"));
        let Config { metadata, guest, rootfs } = self.config.or(self.incomplete_config).unwrap_or_default();
        let Guest { cpus, memory_mb } = guest;
        let disk_mib = rootfs.size_gb.unwrap_or(DISK_GIB).saturating_mul(1024);
        Sandbox {
            key: metadata.get(KEY_LABEL).cloned(),
            native: self.id,
            reason: if oom { Some(String::from("out of memory")) } else { host },
            exit_code: exit.and_then(|exit| exit["exit_code"].as_i64()?.try_into().ok()),
            size: (cpus > 0).then_some(Size { cpu_milli: cpus.saturating_mul(1000), memory_mib: memory_mb, disk_mib }),
            created: self.created_at,
            deadline: None,
            state,
            labels: metadata,
            node: None,
            disrupted: None,
        }
    }
}

#[derive(Deserialize)]
struct Done {
    #[serde(default)]
    exit_code: i32,
    #[serde(default)]
    exit_signal: i32,
    #[serde(default)]
    stdout: String,
    #[serde(default)]
    stderr: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_is_rounded_up_to_one_that_there_is() {
        let fly = |cpu| {
            Fly::new(Settings {
                token: Secret::Env(String::from("X")),
                base_url: base_url(),
                app: String::from("app"),
                region: None,
                cpu,
                creates_per_second: 1,
                price: None,
            })
            .unwrap()
        };
        let guest = |cpu, cpu_milli, memory_mib| fly(cpu).guest(Size { cpu_milli, memory_mib, disk_mib: 0 });
        assert_eq!(guest(Cpu::Shared, 1000, 1024), (1, 1024));
        assert_eq!(guest(Cpu::Shared, 250, 100), (1, 256));
        assert_eq!(guest(Cpu::Shared, 2500, 1000), (4, 1024));
        assert_eq!(guest(Cpu::Shared, 1000, 4096), (2, 4096));
        assert_eq!(guest(Cpu::Performance, 1000, 1024), (1, 2048));
        let month = |cpu, cpu_milli, memory_mib| 720.0 * fly(cpu).price(Size { cpu_milli, memory_mib, disk_mib: 5120 }).running;
        assert!((month(Cpu::Shared, 1000, 1024) - 5.92).abs() < 0.01);
        assert!((month(Cpu::Performance, 1000, 2048) - 32.19).abs() < 0.05);
    }

    #[test]
    fn a_machine_whose_host_is_away_is_known_all_the_same() {
        let said = json!({
            "id": "148e3d", "state": "started", "host_status": "unreachable", "created_at": "",
            "incomplete_config": { "metadata": { KEY_LABEL: "agent-1" } },
        });
        let seen = serde_json::from_value::<Machine>(said).unwrap().into_sandbox();
        assert_eq!((seen.key.as_deref(), seen.state, seen.created), (Some("agent-1"), State::Running, None));
        assert_eq!(seen.reason.as_deref(), Some("its host is unreachable"));
    }

    #[test]
    fn who_has_the_name_is_in_the_refusal() {
        let words = r#"it answers 409: already_exists: unique machine name violation, machine ID 148e3d already exists with name "agent-1""#;
        assert_eq!(named(words), Some("148e3d"));
        assert_eq!(named("it answers 409: no"), None);
    }
}
