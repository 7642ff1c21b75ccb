//! Vercel Sandbox: microVMs with a name, whose disk is kept between their runs.
//!
//! A *sandbox* has *sessions*, which are its runs: to pause it is to stop its session, to resume it is to begin another from the disk, with our
//! command begun anew. Whoever asks for a sandbox so that it wakes pays for that: it is always asked for without, and never by a command.

use std::collections::BTreeMap;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::stream::BoxStream;
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::{Value, json};

use super::rest::{self, Answer, Auth, Call, Client, Rate};
use super::{
    Bounds, Capabilities, ENDS_LABEL, Endpoint, Error, Exec, Executed, FLEET_LABEL, Happened, KEY_LABEL, OUTPUT_MOST, Page,
    Pause, Price, Provider, Result, SESSION_LABEL, Sandbox, Secret, Size, Spec, State, secret,
};

const NAME: &str = "vercel";
const PAGE: u16 = 50;
/// The labels that have a tag of their own. A sandbox has five, which are fewer than our labels: the others share one.
const TAGGED: [&str; 3] = [KEY_LABEL, SESSION_LABEL, FLEET_LABEL];
/// The tag of the others, as in a query: `name=value&…`.
const OTHERS: &str = "agent-fleet.labels";
/// Each sandbox has so many open ports, and no more.
const PORTS_MOST: usize = 4;
/// What a command's time is to the network's.
const SLACK: Duration = Duration::from_secs(20);
/// How long a session is waited for until its command can be begun.
const STARTS: Duration = Duration::from_secs(60);
/// What nobody came back for is not stored for ever.
const SNAPSHOT: Duration = Duration::from_secs(7 * 24 * 3600);
/// Both outputs as JSON text: six letters for a byte at the worst.
const OUTPUT_PACKED: usize = 13 * OUTPUT_MOST;

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// An access token of the team.
    pub token: Secret,
    #[serde(default = "base_url")]
    pub base_url: String,
    pub team: String,
    pub project: String,
    #[serde(default)]
    pub region: Option<String>,
    /// How long a sandbox may run: 45 minutes on the Hobby plan, 1440 on Pro.
    #[serde(default = "minutes")]
    pub max_minutes: u32,
    #[serde(default)]
    pub price: Option<Price>,
}

fn base_url() -> String {
    String::from("https://vercel.com/api")
}

fn minutes() -> u32 {
    24 * 60
}

pub struct Vercel {
    settings: Settings,
    api: Client,
}

impl Vercel {
    /// # Errors
    /// A sentence that says which setting is wrong.
    pub fn new(settings: Settings) -> std::result::Result<Self, String> {
        let auth = Auth { header: "authorization", scheme: "Bearer " };
        // 200 vCPUs in a minute.
        let rate = |action: &str| (action == "create").then_some(Rate { per_second: 3.0, burst: 20 });
        let api = Client::new(NAME, &settings.base_url, auth, &settings.token, rate)?;
        Ok(Self { settings, api })
    }

    /// Every call says whose it is.
    fn ours<'a>(&'a self, call: Call<'a>) -> Call<'a> {
        call.query("teamId", self.settings.team.as_str())
    }

    async fn look(&self, native: &str, wake: bool) -> Result<Option<Looked>> {
        let path = ["v2", "sandboxes", native];
        let call = self.ours(self.api.get("state", &path)).query("projectId", self.settings.project.as_str());
        // Said, even where it is what they do anyway.
        let answer = call.query("resume", wake.to_string()).timeout(Duration::from_secs(60)).send().await?;
        if answer.is_missing() {
            return Ok(None);
        }
        answer.ok()?.json().map(Some)
    }

    async fn present(&self, native: &str) -> Result<Looked> {
        self.look(native, false).await?.ok_or(Error::Missing { provider: NAME })
    }

    /// 2 GiB come with each CPU; there is one, or an even number.
    fn cpus(size: Size) -> u32 {
        match size.cpu_milli.div_ceil(1000).max(size.memory_mib.div_ceil(2048)) {
            0 | 1 => 1,
            more => more.next_multiple_of(2),
        }
    }

    async fn make(&self, spec: &Spec) -> Result<Looked> {
        let secrets = secret::read_all(NAME, spec)?;
        let mut env = spec.env.clone();
        env.extend(secrets.iter().map(|(name, value)| (name.clone(), value.expose().to_owned())));
        let mut labels = spec.labels.clone();
        labels.insert(String::from(KEY_LABEL), spec.key.clone());
        labels.insert(String::from(ENDS_LABEL), rest::ends(spec.ttl));
        let refused = |what: String| Err(Error::Refused { provider: NAME, what });
        if spec.ports.len() > PORTS_MOST {
            return refused(format!("a sandbox has at most {PORTS_MOST} open ports: leave `ports` out"));
        }
        let life = spec.idle.map_or(spec.ttl, |idle| idle.min(spec.ttl)).max(Duration::from_secs(1));
        let mut body = json!({
            "projectId": self.settings.project,
            "name": spec.key,
            "image": spec.image,
            "resources": { "vcpus": Self::cpus(spec.size) },
            "timeout": millis(life),
            "ports": spec.ports,
            "env": env,
            "tags": pack(labels),
            "persistent": true,
            "keepLastSnapshots": { "count": 1, "deleteEvicted": true },
            "snapshotExpiration": millis(SNAPSHOT),
        });
        if let Some(region) = &self.settings.region {
            body["region"] = json!(region);
        }
        let hide = secrets.values().map(|value| value.expose().to_owned());
        // The name is unique: twice is once.
        let path = ["v3", "sandboxes"];
        let call = self.ours(self.api.post("create", &path)).safe().json(&body).hide(hide);
        let answer = call.timeout(Duration::from_secs(90)).send().await?;
        match answer.status.as_u16() {
            404 => refused(answer.words()),
            // Somebody was faster, perhaps we ourselves.
            400 | 409 | 422 => match self.look(&spec.key, false).await? {
                Some(there) => Ok(there),
                None => Err(answer.into_error()),
            },
            _ => answer.ok()?.json(),
        }
    }

    async fn command(&self, session: &str, body: &Value, most: Duration) -> Result<Answer> {
        let path = ["v2", "sandboxes", "sessions", session, "cmd"];
        let call = self.ours(self.api.post("exec", &path)).json(body).timeout(most).most(OUTPUT_PACKED);
        call.send().await?.ok()
    }

    /// Waits for the session, and begins the command in it, if that has not been done.
    async fn begin(&self, mut looked: Looked, key: &str, command: Option<&[String]>) -> Result<Looked> {
        let until = tokio::time::Instant::now() + STARTS;
        while looked.sandbox.state() == State::Creating && tokio::time::Instant::now() < until {
            tokio::time::sleep(Duration::from_millis(250)).await;
            looked = self.present(key).await?;
        }
        match looked.sandbox.state() {
            State::Running => {}
            State::Creating => return Err(Error::Unsure { provider: NAME, what: String::from("it is still being made") }),
            // It is there, and does not run: that is said, not mended.
            _ => return Ok(looked),
        }
        let argv = rest::begin(key, command);
        let body = json!({ "command": argv[0], "args": argv[1..] });
        match self.command(&looked.session.id, &body, Duration::from_secs(60)).await {
            Ok(_) => Ok(looked),
            Err(Error::Failed { provider, what }) => Err(Error::Unsure { provider, what }),
            Err(error) => Err(error),
        }
    }

    async fn run(&self, native: &str, command: &Exec) -> Result<Executed> {
        if !command.stdin.is_empty() {
            return Err(Error::Unsupported {
                provider: NAME,
                verb: "give a command its input",
                hint: Some("put it into a file"),
            });
        }
        let looked = self.present(native).await?;
        // A command would wake it, and be paid for.
        if looked.sandbox.state() != State::Running {
            let what = format!("it is {}: nothing can be executed in it", looked.sandbox.status);
            return Err(Error::Refused { provider: NAME, what });
        }
        let seconds = command.timeout.as_secs().max(1).to_string();
        let mut argv: Vec<String> = Vec::new();
        if !command.detached {
            argv.extend(["timeout", "-k", "1", &seconds].map(String::from));
        }
        argv.extend(command.argv.iter().cloned());
        let Some((program, arguments)) = argv.split_first() else {
            return Err(Error::Refused { provider: NAME, what: String::from("a command without a word") });
        };
        let mut body = json!({ "command": program, "args": arguments, "env": command.env });
        if command.detached {
            self.command(&looked.session.id, &body, Duration::from_secs(60)).await?;
            return Ok(Executed::default());
        }
        (body["wait"], body["logs"], body["timeout"]) = (json!(true), json!(true), json!(millis(command.timeout + SLACK)));
        let answer = self.command(&looked.session.id, &body, command.timeout + 2 * SLACK).await?;
        told(&answer.body)
            .ok_or_else(|| Error::Unsure { provider: NAME, what: String::from("the command's stream ends without an end") })
    }

    /// What is left of its life: no timer is moved beyond.
    fn left(sandbox: &Named) -> Duration {
        rest::left(&unpack(sandbox.tags.clone())).unwrap_or(Duration::ZERO)
    }

    async fn end_session(&self, session: &str) -> Result<()> {
        let path = ["v2", "sandboxes", "sessions", session, "stop"];
        let answer = self.ours(self.api.post("stop", &path)).safe().timeout(Duration::from_secs(120)).send().await?;
        // It has ended by itself.
        if answer.is_missing() || answer.status == 422 { Ok(()) } else { answer.ok().map(drop) }
    }
}

/// Labels as tags.
fn pack(labels: BTreeMap<String, String>) -> BTreeMap<String, String> {
    let (mut tags, others): (BTreeMap<_, _>, BTreeMap<_, _>) =
        labels.into_iter().partition(|(name, _)| TAGGED.contains(&name.as_str()));
    tags.insert(String::from(OTHERS), rest::pairs(&others));
    tags
}

/// Tags as labels.
fn unpack(mut tags: BTreeMap<String, String>) -> BTreeMap<String, String> {
    if let Some(others) = tags.remove(OTHERS) {
        tags.extend(rest::unpaired(&others));
    }
    tags
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// What a command has printed, line by line, and how it ended.
fn told(lines: &[u8]) -> Option<Executed> {
    let mut done = Executed::default();
    for line in lines.split(|byte| *byte == b'\n').filter(|line| !line.trim_ascii().is_empty()) {
        let line: Line = serde_json::from_slice(line).ok()?;
        if let Some(exit) = line.command.and_then(|command| command.exit_code) {
            // 124, and 137 after it did not hear: `timeout` ended it.
            done.exit_code = Some(exit).filter(|code| !matches!(code, 124 | 137));
            return Some(done);
        }
        let to = match line.stream.as_deref() {
            Some("stdout") => &mut done.stdout,
            Some("stderr") => &mut done.stderr,
            Some("error") => return None,
            _ => continue,
        };
        let bytes = line.data.as_str().unwrap_or_default().as_bytes();
        let fits = bytes.len().min(OUTPUT_MOST - to.len());
        to.extend_from_slice(&bytes[..fits]);
        done.cut |= fits < bytes.len();
    }
    None
}

#[async_trait]
impl Provider for Vercel {
    fn name(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            command: false,
            env: true,
            provider_secrets: false,
            size: true,
            ports: true,
            list: true,
            ttl: Some(Bounds { least: Duration::from_secs(1), most: Duration::from_secs(60) * self.settings.max_minutes }),
            idle_timer: true,
            pause: Pause::Disk,
            exec: true,
            logs: true,
            events: false,
            endpoint: true,
            traffic_keeps_awake: false,
            nodes: false,
        }
    }

    fn price(&self, size: Size) -> Price {
        self.settings.price.clone().unwrap_or_else(|| {
            let cpus = f64::from(Self::cpus(size));
            // $0.08 per GB and month of what is stored.
            let stored = 0.08 / 730.0 * f64::from(size.disk_mib) / 1024.0;
            Price {
                // $0.128 per hour of a CPU that computes, $0.0212 per GB and hour, 2 GB for each CPU. One that waits for a model costs a quarter:
                // this is the most.
                running: cpus * (0.128 + 2.0 * 0.0212),
                paused: stored,
                stopped: stored,
                source: String::from("vercel.com/docs/vercel-sandbox/pricing, as of 2026-11-23"),
            }
        })
    }

    async fn create(&self, spec: &Spec) -> Result<Sandbox> {
        let looked = match self.make(spec).await {
            Err(error @ Error::Unsure { .. }) => self.look(&spec.key, false).await?.ok_or(error)?,
            looked => looked?,
        };
        if spec.command.is_empty() {
            return Ok(looked.into_sandbox());
        }
        match self.begin(looked, &spec.key, Some(&spec.command)).await {
            Ok(looked) => Ok(looked.into_sandbox()),
            Err(error @ Error::Refused { .. }) => {
                self.delete(&spec.key).await?;
                Err(error)
            }
            Err(error) => Err(error),
        }
    }

    async fn start(&self, native: &str) -> Result<()> {
        let looked = self.present(native).await?;
        if matches!(looked.sandbox.state(), State::Running | State::Creating) {
            return Ok(());
        }
        let left = Self::left(&looked.sandbox);
        if left < Duration::from_secs(1) {
            return Err(Error::Refused { provider: NAME, what: String::from("its time is over") });
        }
        // Each session would have the whole of the first one's time.
        let path = ["v2", "sandboxes", native];
        let call = self.ours(self.api.patch("update", &path)).query("projectId", self.settings.project.as_str());
        call.json(&json!({ "timeout": millis(left) })).send().await?.ok()?;
        let looked = self.look(native, true).await?.ok_or(Error::Missing { provider: NAME })?;
        self.begin(looked, native, None).await.map(drop)
    }

    async fn state(&self, native: &str) -> Result<Sandbox> {
        Ok(self.look(native, false).await?.map_or_else(|| rest::missing(native), Looked::into_sandbox))
    }

    /// They filter by one tag: by the one that fits the fewest.
    async fn list(&self, labels: &BTreeMap<String, String>, page: Option<&str>) -> Result<Page> {
        let path = ["v2", "sandboxes"];
        let mut call = self
            .ours(self.api.get("list", &path))
            .query("project", self.settings.project.as_str())
            .query("limit", PAGE.to_string());
        if let Some((name, value)) = TAGGED.into_iter().find_map(|name| labels.get_key_value(name)) {
            call = call.query("tags", format!("{name}:{value}"));
        }
        if let Some(page) = page {
            call = call.query("cursor", page);
        }
        let listed: Listed = call.send().await?.ok()?.json()?;
        let fits = |sandbox: &Sandbox| labels.iter().all(|(name, value)| sandbox.labels.get(name) == Some(value));
        let (named, unread) = rest::items::<Named>(NAME, &listed.sandboxes);
        let sandboxes = named.into_iter().map(|sandbox| sandbox.into_sandbox(None)).filter(fits).collect();
        Ok(Page { sandboxes, unread, next: listed.pagination.next })
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

    /// They add to what there is: what is added is what is missing. Sent once, for twice would be twice as much.
    async fn keep_alive(&self, native: &str, until: Timestamp) -> Result<()> {
        let looked = self.present(native).await?;
        let Some(deadline) = looked.session.deadline().filter(|_| looked.sandbox.state() == State::Running) else {
            return Ok(());
        };
        let wanted: Duration = until.duration_since(Timestamp::now()).try_into().unwrap_or_default();
        let wanted = Timestamp::now() + wanted.min(Self::left(&looked.sandbox));
        let more: Duration = wanted.duration_since(deadline).try_into().unwrap_or_default();
        if more < Duration::from_secs(1) {
            return Ok(());
        }
        let path = ["v2", "sandboxes", "sessions", &looked.session.id, "extend-timeout"];
        self.ours(self.api.post("keep_alive", &path)).json(&json!({ "duration": millis(more) })).send().await?.ok().map(drop)
    }

    async fn pause(&self, native: &str) -> Result<()> {
        let looked = self.present(native).await?;
        match looked.sandbox.state() {
            State::Running | State::Creating => self.end_session(&looked.session.id).await,
            _ => Ok(()),
        }
    }

    async fn resume(&self, native: &str, _: &[String]) -> Result<()> {
        self.start(native).await
    }

    async fn stop(&self, native: &str, grace: Duration) -> Result<()> {
        let Some(looked) = self.look(native, false).await? else { return Ok(()) };
        if looked.sandbox.state() != State::Running {
            return Ok(());
        }
        let argv = rest::end(grace);
        let body = json!({ "command": argv[0], "args": argv[1..], "wait": true, "timeout": millis(grace + SLACK) });
        // Who cannot be asked is not waited for.
        if let Err(error) = self.command(&looked.session.id, &body, grace + 2 * SLACK).await {
            tracing::debug!(%error, "its command could not be asked to end");
        }
        self.end_session(&looked.session.id).await
    }

    async fn delete(&self, native: &str) -> Result<()> {
        let path = ["v2", "sandboxes", native];
        let call = self.ours(self.api.delete("delete", &path)).query("projectId", self.settings.project.as_str());
        rest::gone(call.query("deleteOrphanSnapshots", "true").send().await?)
    }

    /// Open to the world: what listens there asks for a token itself.
    async fn endpoint(&self, native: &str, port: u16) -> Result<Endpoint> {
        let looked = self.present(native).await?;
        match looked.routes.into_iter().find(|route| route.port == port) {
            Some(route) => Ok(Endpoint { url: rest::at(&route.url), headers: Vec::new() }),
            None => Err(Error::Refused {
                provider: NAME,
                what: format!("port {port} was not opened when it was made: name it in `ports`"),
            }),
        }
    }

    async fn events(&self, _labels: &BTreeMap<String, String>) -> Result<BoxStream<'static, Result<Happened>>> {
        Err(Error::Unsupported { provider: NAME, verb: "say what happens", hint: Some("it is asked instead") })
    }
}

#[derive(Deserialize)]
struct Looked {
    sandbox: Named,
    session: Session,
    #[serde(default, deserialize_with = "rest::lenient")]
    routes: Vec<Route>,
}

impl Looked {
    fn into_sandbox(self) -> Sandbox {
        let deadline = self.session.deadline();
        self.sandbox.into_sandbox(deadline)
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Named {
    name: String,
    #[serde(default = "rest::unsaid", deserialize_with = "rest::word")]
    status: String,
    #[serde(default, deserialize_with = "rest::lenient")]
    vcpus: Option<f64>,
    #[serde(default, deserialize_with = "rest::lenient")]
    memory: Option<f64>,
    #[serde(default, deserialize_with = "rest::lenient")]
    created_at: Option<i64>,
    #[serde(default)]
    tags: BTreeMap<String, String>,
}

impl Named {
    fn state(&self) -> State {
        match self.status.as_str() {
            "pending" => State::Creating,
            "running" => State::Running,
            "snapshotting" => State::Pausing,
            "stopping" => State::Stopping,
            "stopped" => State::Stopped,
            "failed" | "aborted" => State::Failed,
            other => State::Unknown(other.to_owned()),
        }
    }

    fn into_sandbox(self, deadline: Option<Timestamp>) -> Sandbox {
        let state = self.state();
        // As casts do: what is no size is none. They say nothing of the disk.
        let size = self.vcpus.zip(self.memory).map(|(cpus, memory)| Size {
            cpu_milli: (cpus * 1000.0) as u32,
            memory_mib: memory as u32,
            disk_mib: Size::default().disk_mib,
        });
        Sandbox {
            key: self.tags.get(KEY_LABEL).cloned(),
            native: self.name,
            reason: None,
            exit_code: None,
            size,
            created: self.created_at.and_then(|at| Timestamp::from_millisecond(at).ok()),
            deadline: deadline.filter(|_| state == State::Running),
            state,
            labels: unpack(self.tags),
            node: None,
            disrupted: None,
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Session {
    id: String,
    /// In milliseconds, as all here.
    #[serde(default, deserialize_with = "rest::lenient")]
    timeout: Option<i64>,
    #[serde(default, deserialize_with = "rest::lenient")]
    started_at: Option<i64>,
    #[serde(default, deserialize_with = "rest::lenient")]
    requested_at: Option<i64>,
}

impl Session {
    fn deadline(&self) -> Option<Timestamp> {
        Timestamp::from_millisecond(self.started_at.or(self.requested_at)?.checked_add(self.timeout?)?).ok()
    }
}

#[derive(Deserialize)]
struct Route {
    url: String,
    port: u16,
}

#[derive(Deserialize)]
struct Listed {
    #[serde(default)]
    sandboxes: Vec<Value>,
    #[serde(default)]
    pagination: Pagination,
}

#[derive(Default, Deserialize)]
struct Pagination {
    next: Option<String>,
}

#[derive(Deserialize)]
struct Line {
    #[serde(default)]
    command: Option<Command>,
    #[serde(default)]
    stream: Option<String>,
    #[serde(default)]
    data: Value,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Command {
    #[serde(default)]
    exit_code: Option<i32>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_is_one_that_there_is() {
        let cpus = |cpu_milli, memory_mib| Vercel::cpus(Size { cpu_milli, memory_mib, disk_mib: 0 });
        assert_eq!([cpus(0, 0), cpus(1000, 2048), cpus(1000, 2049), cpus(2500, 1), cpus(4000, 1)], [1, 1, 2, 4, 4]);
    }

    #[test]
    fn a_stream_without_an_end_is_none() {
        let begun = br#"{"command":{"exitCode":null}}
{"stream":"stdout","data":"a"}
"#;
        assert_eq!(told(begun), None);
        let done = told(&[&begun[..], br#"{"command":{"exitCode":3}}"#].concat()).unwrap();
        assert_eq!((done.exit_code, done.stdout), (Some(3), b"a".to_vec()));
        assert_eq!(told(br#"{"stream":"error","data":{"code":"x","message":"y"}}"#), None);
    }
}
