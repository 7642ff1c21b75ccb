//! Cloudflare Containers, through a Worker that the fleet's owner deploys: deploy/cloudflare/fleet, whose openapi.json is what is spoken here.
//!
//! A container is begun once: the Worker keeps neither its environment nor its command, so one that has ended is not started again. Its end, its
//! idle timer and the kill after the grace are the Worker's alarms, and hold whether or not somebody asks.

use std::collections::BTreeMap;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::stream::BoxStream;
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::json;

use super::rest::{self, Answer, Auth, Call, Client};
use super::{
    Bounds, Capabilities, Endpoint, Error, Exec, Executed, Happened, KEY_LABEL, Page, Pause, Price, Provider, Result, Sandbox,
    Secret, Size, Spec, State, secret,
};

const NAME: &str = "cloudflare";
const PAGE: u16 = 100;
/// The Worker waits for a place for 20 seconds.
const CREATE: Duration = Duration::from_secs(60);
/// As the Worker has them.
const GRACE_MOST: Duration = Duration::from_secs(3600);
const LIFE_MOST: Duration = Duration::from_secs(30 * 24 * 3600);
/// Our token where `authorization` is for who listens in the container.
const AUTHORIZATION: &str = "x-agent-fleet-authorization";
const PORT: &str = "x-agent-fleet-port";

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Where the Worker is: `https://agent-fleet.example.workers.dev`.
    pub url: String,
    /// Its `FLEET_TOKEN`.
    pub token: Secret,
    /// As its wrangler.jsonc says it: what a container gets, and costs.
    #[serde(default)]
    pub instance_type: InstanceType,
    #[serde(default)]
    pub price: Option<Price>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum InstanceType {
    Lite,
    Basic,
    #[serde(rename = "standard-1")]
    Standard1,
    #[default]
    #[serde(rename = "standard-2")]
    Standard2,
    #[serde(rename = "standard-3")]
    Standard3,
    #[serde(rename = "standard-4")]
    Standard4,
}

impl InstanceType {
    /// Theirs is the decimal gigabyte for disks.
    fn size(self) -> Size {
        let of = |cpu_milli, memory_mib, disk_gb: u32| Size { cpu_milli, memory_mib, disk_mib: disk_gb * 954 };
        match self {
            Self::Lite => of(63, 256, 2),
            Self::Basic => of(250, 1024, 4),
            Self::Standard1 => of(500, 4 << 10, 8),
            Self::Standard2 => of(1000, 6 << 10, 12),
            Self::Standard3 => of(2000, 8 << 10, 16),
            Self::Standard4 => of(4000, 12 << 10, 20),
        }
    }

    /// In USD an hour, with its CPU in use all the time, and not at all.
    fn price(self) -> (f64, f64) {
        let (cpu, memory_gib, disk_gb) = match self {
            Self::Lite => (0.0625, 0.25, 2.0),
            Self::Basic => (0.25, 1.0, 4.0),
            Self::Standard1 => (0.5, 4.0, 8.0),
            Self::Standard2 => (1.0, 6.0, 12.0),
            Self::Standard3 => (2.0, 8.0, 16.0),
            Self::Standard4 => (4.0, 12.0, 20.0),
        };
        let idle = 3600.0 * (0.000_002_5 * memory_gib + 0.000_000_07 * disk_gb);
        (3600.0 * 0.000_02 * cpu + idle, idle)
    }
}

pub struct Cloudflare {
    settings: Settings,
    api: Client,
}

impl Cloudflare {
    /// # Errors
    /// A sentence that says which setting is wrong.
    pub fn new(settings: Settings) -> std::result::Result<Self, String> {
        let auth = Auth { header: "authorization", scheme: "Bearer " };
        let api = Client::new(NAME, &settings.url, auth, &settings.token, |_| None)?;
        if !matches!(reqwest::Url::parse(&settings.url), Ok(url) if url.path() == "/" && url.query().is_none()) {
            return Err(format!("`url` is the Worker's address alone, without a path: `{}`", settings.url));
        }
        Ok(Self { settings, api })
    }

    async fn sandbox(&self, native: &str) -> Result<Option<Told>> {
        let answer = self.api.get("state", &["v1", "sandboxes", native]).of(native).send().await?;
        if answer.is_missing() {
            return Ok(None);
        }
        answer.ok()?.json().map(Some)
    }

    /// An order that changes nothing when it is given twice.
    async fn order(call: Call<'_>, native: &str, body: &serde_json::Value) -> Result<Answer> {
        call.of(native).safe().json(body).send().await
    }

    fn told(&self, told: Told) -> Sandbox {
        let mut sandbox = told.into_sandbox();
        sandbox.size = Some(self.settings.instance_type.size());
        sandbox
    }
}

fn unsupported<T>(verb: &'static str, hint: &'static str) -> Result<T> {
    Err(Error::Unsupported { provider: NAME, verb, hint: Some(hint) })
}

#[async_trait]
impl Provider for Cloudflare {
    fn name(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            command: true,
            env: true,
            provider_secrets: false,
            // The Worker's configuration says it, for all.
            size: false,
            // All of them, through the Worker.
            ports: true,
            list: true,
            ttl: Some(Bounds { least: Duration::from_secs(1), most: LIFE_MOST }),
            idle_timer: true,
            pause: Pause::No,
            exec: false,
            logs: false,
            events: false,
            endpoint: true,
            // The Worker's timer is moved by its word alone.
            traffic_keeps_awake: false,
            nodes: false,
        }
    }

    fn price(&self, _size: Size) -> Price {
        self.settings.price.clone().unwrap_or_else(|| Price {
            running: self.settings.instance_type.price().0,
            paused: 0.0,
            stopped: 0.0,
            source: String::from("developers.cloudflare.com/containers/pricing, as of 2026-08-03"),
        })
    }

    async fn create(&self, spec: &Spec) -> Result<Sandbox> {
        let secrets = secret::read_all(NAME, spec)?;
        let mut env = spec.env.clone();
        env.extend(secrets.iter().map(|(name, value)| (name.clone(), value.expose().to_owned())));
        let mut labels = spec.labels.clone();
        labels.insert(String::from(KEY_LABEL), spec.key.clone());
        let mut body = json!({ "env": env, "labels": labels, "ttl_s": spec.ttl.as_secs().max(1) });
        if !spec.image.is_empty() {
            body["image"] = json!(spec.image);
        }
        if !spec.command.is_empty() {
            body["command"] = json!(spec.command);
        }
        if let Some(idle) = spec.idle {
            body["idle_s"] = json!(idle.as_secs().clamp(1, LIFE_MOST.as_secs()));
        }
        let hide = secrets.values().map(|value| value.expose().to_owned());
        let path = ["v1", "sandboxes", &spec.key];
        let answer = self.api.put("create", &path).json(&body).hide(hide).timeout(CREATE).send().await?;
        if answer.status == 404 {
            return Err(Error::Refused { provider: NAME, what: answer.words() });
        }
        Ok(self.told(answer.ok()?.json()?))
    }

    async fn start(&self, native: &str) -> Result<()> {
        match self.sandbox(native).await? {
            None => Err(Error::Missing { provider: NAME }),
            Some(told) if matches!(told.state.as_str(), "stopping" | "stopped") => {
                unsupported("start again what has ended", "its environment is kept nowhere: create another")
            }
            Some(_) => Ok(()),
        }
    }

    async fn state(&self, native: &str) -> Result<Sandbox> {
        Ok(self.sandbox(native).await?.map_or_else(|| rest::missing(native), |told| self.told(told)))
    }

    async fn list(&self, labels: &BTreeMap<String, String>, page: Option<&str>) -> Result<Page> {
        let names: Vec<(String, &String)> = labels.iter().map(|(name, value)| (format!("label.{name}"), value)).collect();
        let mut call = self.api.get("list", &["v1", "sandboxes"]).query("limit", PAGE.to_string());
        for (name, value) in &names {
            call = call.query(name, value.as_str());
        }
        if let Some(page) = page {
            call = call.query("cursor", page);
        }
        let listed: Listed = call.send().await?.ok()?.json()?;
        let (all, unread) = rest::items::<Told>(NAME, &listed.sandboxes);
        Ok(Page { sandboxes: all.into_iter().map(|told| self.told(told)).collect(), unread, next: listed.next })
    }

    async fn exec(&self, _native: &str, _command: &Exec) -> Result<Executed> {
        unsupported("execute a command", "what runs is the container's own command")
    }

    async fn logs(&self, _native: &str, _most: usize) -> Result<Vec<u8>> {
        unsupported("give the last output", "Cloudflare has it in the Worker's logs, with `observability` on")
    }

    async fn keep_alive(&self, native: &str, until: Timestamp) -> Result<()> {
        let path = ["v1", "sandboxes", native, "keepalive"];
        Self::order(self.api.post("keepalive", &path), native, &json!({ "until": until.to_string() })).await?.ok().map(drop)
    }

    async fn pause(&self, _native: &str) -> Result<()> {
        unsupported("pause a container", "end the session, or let it run")
    }

    async fn resume(&self, _native: &str, _: &[String]) -> Result<()> {
        unsupported("resume a container", "create another")
    }

    /// The Worker asks, and kills by itself, even if nobody is there any more.
    async fn stop(&self, native: &str, grace: Duration) -> Result<()> {
        let path = ["v1", "sandboxes", native, "stop"];
        let body = json!({ "grace_s": grace.min(GRACE_MOST).as_secs() });
        rest::gone(Self::order(self.api.post("stop", &path), native, &body).await?)
    }

    async fn delete(&self, native: &str) -> Result<()> {
        rest::gone(self.api.delete("delete", &["v1", "sandboxes", native]).of(native).send().await?)
    }

    /// The Worker's own address: which container and which port is meant is in a header, so that paths stay as they are.
    async fn endpoint(&self, native: &str, port: u16) -> Result<Endpoint> {
        let token =
            self.settings.token.read().map_err(|why| Error::Refused { provider: NAME, what: format!("no token: {why}") })?;
        Ok(Endpoint {
            url: self.settings.url.trim_end_matches('/').to_owned(),
            headers: vec![
                (String::from(PORT), format!("{native}:{port}")),
                (String::from(AUTHORIZATION), format!("Bearer {}", token.expose())),
            ],
        })
    }

    async fn events(&self, _labels: &BTreeMap<String, String>) -> Result<BoxStream<'static, Result<Happened>>> {
        unsupported("say what happens", "it is asked instead")
    }
}

#[derive(Deserialize)]
struct Listed {
    sandboxes: Vec<serde_json::Value>,
    #[serde(default)]
    next: Option<String>,
}

#[derive(Deserialize)]
struct Told {
    key: String,
    #[serde(default = "rest::unsaid", deserialize_with = "rest::word")]
    state: String,
    #[serde(default, deserialize_with = "rest::lenient")]
    reason: Option<String>,
    #[serde(default, deserialize_with = "rest::lenient")]
    exit_code: Option<i32>,
    #[serde(default)]
    labels: BTreeMap<String, String>,
    #[serde(default, deserialize_with = "rest::time")]
    created: Option<Timestamp>,
    #[serde(default, deserialize_with = "rest::time")]
    ends: Option<Timestamp>,
    #[serde(default, deserialize_with = "rest::time")]
    idle_ends: Option<Timestamp>,
}

impl Told {
    fn into_sandbox(self) -> Sandbox {
        let state = match self.state.as_str() {
            "creating" => State::Creating,
            "running" => State::Running,
            "stopping" => State::Stopping,
            "stopped" => State::Stopped,
            other => State::Unknown(other.to_owned()),
        };
        Sandbox {
            key: Some(self.key.clone()),
            native: self.key,
            state,
            reason: self.reason,
            exit_code: self.exit_code,
            size: None,
            created: self.created,
            deadline: self.idle_ends.or(self.ends),
            labels: self.labels,
            node: None,
            disrupted: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instance_type_has_its_size_and_its_price() {
        let price = |of: InstanceType| of.price();
        let (busy, idle) = price(InstanceType::Basic);
        assert!((busy - 0.0280).abs() < 0.0001 && (idle - 0.0100).abs() < 0.0001, "{busy} {idle}");
        let (busy, idle) = price(InstanceType::Standard2);
        assert!((busy - 0.1290).abs() < 0.0001 && (idle - 0.0570).abs() < 0.0001, "{busy} {idle}");
        for (name, cpu) in [("lite", 63), ("basic", 250), ("standard-1", 500), ("standard-3", 2000), ("standard-4", 4000)] {
            let of: InstanceType = serde_json::from_value(json!(name)).unwrap();
            assert_eq!(of.size().cpu_milli, cpu, "{name}");
        }
    }

    #[test]
    fn an_address_with_a_path_is_refused() {
        let new = |url: &str| {
            let settings = Settings {
                url: String::from(url),
                token: Secret::Env(String::from("X")),
                instance_type: InstanceType::default(),
                price: None,
            };
            Cloudflare::new(settings).map(drop)
        };
        assert_eq!(new("https://fleet.example.workers.dev"), Ok(()));
        assert_eq!(new("https://fleet.example.workers.dev/"), Ok(()));
        assert!(new("https://fleet.example.workers.dev/v1").unwrap_err().contains("without a path"));
    }
}
