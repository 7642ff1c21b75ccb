//! E2B: microVMs from templates, with a deadline of their own and memory that survives a pause.
//!
//! A template is booted once and its memory copied, so a command that it starts knows nothing of the sandbox that it is in: ours is begun by the
//! daemon in the sandbox, right after creation. Nothing makes a creation one but looking first: our key is in the metadata.

use std::collections::BTreeMap;
use std::time::Duration;

use async_trait::async_trait;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::{Value, json};

use super::rest::{self, Auth, Call, Client, InFlight, Rate};
use super::{
    Bounds, Capabilities, ENDS_LABEL, Endpoint, Error, Exec, Executed, Happened, KEY_LABEL, OUTPUT_MOST, Page, Pause, Price,
    Provider, Result, Sandbox, Secret, Size, Spec, State, secret,
};

const NAME: &str = "e2b";
/// The port of the daemon in each sandbox.
const DAEMON: u16 = 49983;
/// Containers on a page: as many as they give.
const PAGE: u16 = 100;
/// A piece of standard input.
const INPUT: usize = 256 << 10;
/// What a sandbox is given of which nobody says when it ends: what they give it themselves.
const UNSAID: Duration = Duration::from_secs(300);
/// What a command's time is to the network's.
const SLACK: Duration = Duration::from_secs(20);

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// An API key of the team (`e2b_…`).
    pub token: Secret,
    #[serde(default = "base_url")]
    pub base_url: String,
    /// Where sandboxes are reached: `PORT-SANDBOX.domain`.
    #[serde(default = "domain")]
    pub domain: String,
    /// Where the daemons of all sandboxes are reached, if not there: a proxy that goes by the header.
    #[serde(default)]
    pub sandbox_url: Option<String>,
    /// Who the command runs as; the template's user if nothing is said.
    #[serde(default)]
    pub user: Option<String>,
    /// How long a sandbox may live: 1 on the Hobby plan, 24 on Pro.
    #[serde(default = "hours")]
    pub max_hours: u32,
    /// What is paid, if not the list's price.
    #[serde(default)]
    pub price: Option<Price>,
}

fn base_url() -> String {
    String::from("https://api.e2b.app")
}

fn domain() -> String {
    String::from("e2b.app")
}

fn hours() -> u32 {
    24
}

type Secrets = BTreeMap<String, secret::Value>;

pub struct E2b {
    settings: Settings,
    api: Client,
    in_flight: InFlight,
}

impl E2b {
    /// # Errors
    /// A sentence that says which setting is wrong.
    pub fn new(settings: Settings) -> std::result::Result<Self, String> {
        let auth = Auth { header: "x-api-key", scheme: "" };
        // 20,000 in 30 s for all, and 1 or 5 a second, by the plan, for creations.
        let rate = |action: &str| match action {
            "create" => Some(Rate { per_second: 5.0, burst: 5 }),
            _ => Some(Rate { per_second: 600.0, burst: 600 }),
        };
        let api = Client::new(NAME, &settings.base_url, auth, &settings.token, rate)?;
        Ok(Self { settings, api, in_flight: InFlight::default() })
    }

    /// The one that has this key. Were there two, by a creation that nobody heard of again, the younger go.
    async fn find(&self, key: &str) -> Result<Option<Sandbox>> {
        let labels = BTreeMap::from([(String::from(KEY_LABEL), key.to_owned())]);
        let (mut found, mut next) = (Vec::new(), None);
        loop {
            let page = self.list(&labels, next.as_deref()).await?;
            // A second one would be made beside it.
            if page.unread > 0 {
                return Err(super::hidden(NAME, page.unread));
            }
            found.extend(page.sandboxes);
            next = page.next;
            if next.is_none() {
                break;
            }
        }
        found.sort_by(|a, b| (a.created, &a.native).cmp(&(b.created, &b.native)));
        let mut found = found.into_iter();
        let oldest = found.next();
        for younger in found {
            self.delete(&younger.native).await?;
        }
        Ok(oldest)
    }

    async fn make(&self, spec: &Spec, secrets: &Secrets) -> Result<Sandbox> {
        let mut env = spec.env.clone();
        env.extend(secrets.iter().map(|(name, value)| (name.clone(), value.expose().to_owned())));
        let now = Timestamp::now();
        let mut labels = spec.labels.clone();
        labels.insert(String::from(KEY_LABEL), spec.key.clone());
        labels.insert(String::from(ENDS_LABEL), rest::ends(spec.ttl));
        let life = spec.idle.map_or(spec.ttl, |idle| idle.min(spec.ttl)).max(Duration::from_secs(1));
        let body = json!({
            "templateID": spec.image,
            "timeout": life.as_secs(),
            // When its time is over it is gone, not asleep: what sleeps is kept for ever.
            "autoPause": false,
            "metadata": labels,
            "envVars": env,
        });
        let hide = secrets.values().map(|value| value.expose().to_owned());
        let answer = self.api.post("create", &["v2", "sandboxes"]).json(&body).hide(hide).send().await?;
        if answer.status == 404 {
            return Err(Error::Refused { provider: NAME, what: answer.words() });
        }
        let made: Made = answer.ok()?.json()?;
        Ok(Sandbox {
            key: Some(spec.key.clone()),
            native: made.id,
            state: State::Running,
            reason: None,
            exit_code: None,
            size: None,
            created: Some(now),
            deadline: Some(now + life),
            labels,
            node: None,
            disrupted: None,
        })
    }

    async fn find_or_make(&self, spec: &Spec, secrets: &Secrets) -> Result<Sandbox> {
        // Somebody has asked for it before, and did not hear what came of it: then it may be there and not yet be listed.
        let mut patience = self.in_flight.patience(&spec.key);
        loop {
            if let Some(found) = self.find(&spec.key).await? {
                self.in_flight.settled(&spec.key);
                return Ok(found);
            }
            match patience.next() {
                Some(pause) => tokio::time::sleep(pause).await,
                None => break,
            }
        }
        self.in_flight.sent(&spec.key);
        let made = self.make(spec, secrets).await;
        if !matches!(made, Err(Error::Unsure { .. })) {
            self.in_flight.settled(&spec.key);
        }
        made
    }

    /// Begins the command, if that has not been done.
    async fn begin(&self, sandbox: &Sandbox, spec: &Spec) -> Result<()> {
        if spec.command.is_empty() || sandbox.state != State::Running {
            return Ok(());
        }
        let command = Exec {
            argv: rest::begin(&spec.key, Some(&spec.command)),
            env: BTreeMap::new(),
            stdin: Vec::new(),
            timeout: Duration::from_secs(30),
            detached: true,
        };
        match self.run(&sandbox.native, &command, Some(&spec.key)).await {
            Ok(_) => Ok(()),
            // It is there without its command: the next creation begins that.
            Err(Error::Failed { provider, what }) => Err(Error::Unsure { provider, what }),
            Err(error @ Error::Refused { .. }) => {
                self.delete(&sandbox.native).await?;
                Err(error)
            }
            Err(error) => Err(error),
        }
    }

    async fn detail(&self, native: &str) -> Result<Option<Detail>> {
        let answer = self.api.get("state", &["sandboxes", native]).send().await?;
        if answer.status == 404 {
            return Ok(None);
        }
        answer.ok()?.json().map(Some)
    }

    /// One that is there.
    async fn present(&self, native: &str) -> Result<Detail> {
        self.detail(native).await?.ok_or(Error::Missing { provider: NAME })
    }

    /// A call to the daemon of a sandbox.
    fn daemon<'a>(&'a self, detail: &Detail, path: &'a [&'a str]) -> Result<Call<'a>> {
        let domain = detail.domain.as_deref().filter(|domain| !domain.is_empty()).unwrap_or(&self.settings.domain);
        let url = self.settings.sandbox_url.clone().unwrap_or_else(|| format!("https://{DAEMON}-{}.{domain}", detail.id));
        let mut call = self
            .api
            .post("exec", path)
            .at(&url)?
            .header("e2b-sandbox-id", &detail.id)
            .header("e2b-sandbox-port", &DAEMON.to_string())
            .header("connect-protocol-version", "1");
        if let Some(token) = &detail.token {
            call = call.header("x-access-token", token).hide([token.clone()]);
        }
        if let Some(user) = &self.settings.user {
            call = call.header("authorization", &format!("Basic {}", BASE64.encode(format!("{user}:"))));
        }
        Ok(call)
    }

    async fn run(&self, native: &str, command: &Exec, tag: Option<&str>) -> Result<Executed> {
        let detail = self.present(native).await?;
        if detail.state() != State::Running {
            return Err(Error::Refused { provider: NAME, what: String::from("it is paused: nothing can be executed in it") });
        }
        let Some((program, arguments)) = command.argv.split_first() else {
            return Err(Error::Refused { provider: NAME, what: String::from("a command without a word") });
        };
        let mut request = json!({
            "process": { "cmd": program, "args": arguments, "envs": command.env },
            "stdin": !command.stdin.is_empty(),
        });
        if let Some(tag) = tag {
            request["tag"] = json!(tag);
        }
        let mut call = self
            .daemon(&detail, &["process.Process", "Start"])?
            .bytes("application/connect+json", envelope(&request))
            .header("keepalive-ping-interval", "50")
            .timeout(command.timeout + SLACK);
        if !command.detached {
            call = call.header("connect-timeout-ms", &command.timeout.as_millis().to_string());
        }
        let (tell, told) = tokio::sync::oneshot::channel();
        let hear = async {
            let pieces = call.stream().await?;
            self.hear(std::pin::pin!(pieces), command.detached && command.stdin.is_empty(), tell).await
        };
        let feed = async {
            match told.await {
                Ok(pid) if !command.stdin.is_empty() => self.feed(&detail, pid, &command.stdin).await,
                _ => Ok(()),
            }
        };
        let (heard, fed) = futures_util::join!(hear, feed);
        // Who ends before he has read everything is no failure.
        match (heard, fed) {
            (Err(error), _) => Err(error),
            (Ok(done), Err(error)) if done.exit_code.is_none() => Err(error),
            (Ok(done), _) => Ok(done),
        }
    }

    async fn hear(
        &self,
        mut pieces: impl futures_util::Stream<Item = Result<Vec<u8>>> + Unpin,
        leave: bool,
        tell: tokio::sync::oneshot::Sender<u32>,
    ) -> Result<Executed> {
        let unsure = |what: String| Error::Unsure { provider: NAME, what };
        let (mut buffer, mut done, mut tell) = (Vec::new(), Executed::default(), Some(tell));
        while let Some(piece) = pieces.next().await {
            buffer.extend_from_slice(&piece?);
            while let Some((last, message)) = open(&mut buffer).map_err(&unsure)? {
                if last {
                    let end: End = serde_json::from_slice(&message).unwrap_or_default();
                    return match end.error {
                        None => Ok(done),
                        // Its time is over: it was ended, and what it printed until then counts.
                        Some(why) if why.code == "deadline_exceeded" => Ok(Executed { exit_code: None, ..done }),
                        Some(why) if matches!(why.code.as_str(), "unavailable" | "internal" | "unknown" | "aborted") => {
                            Err(unsure(why.message))
                        }
                        Some(why) => Err(Error::Refused { provider: NAME, what: why.message }),
                    };
                }
                let Message { event } =
                    serde_json::from_slice(&message).map_err(|error| unsure(format!("a message of another shape: {error}")))?;
                if let Some(Start { pid }) = event.start {
                    if let Some(tell) = tell.take() {
                        // Nobody waits for it if there is nothing to tell.
                        let _nobody = tell.send(pid);
                    }
                    if leave {
                        return Ok(done);
                    }
                }
                for (text, to) in [(event.data.stdout, &mut done.stdout), (event.data.stderr, &mut done.stderr)] {
                    let bytes = BASE64.decode(text).map_err(|error| unsure(format!("output that is no base64: {error}")))?;
                    let fits = bytes.len().min(OUTPUT_MOST - to.len());
                    to.extend_from_slice(&bytes[..fits]);
                    done.cut |= fits < bytes.len();
                }
                if let Some(end) = event.end {
                    done.exit_code = end.exited.then_some(end.exit_code);
                }
            }
        }
        Err(unsure(String::from("the command's stream ends without an end")))
    }

    async fn feed(&self, detail: &Detail, pid: u32, stdin: &[u8]) -> Result<()> {
        for piece in stdin.chunks(INPUT) {
            let input = json!({ "process": { "pid": pid }, "input": { "stdin": BASE64.encode(piece) } });
            self.daemon(detail, &["process.Process", "SendInput"])?.json(&input).send().await?.ok()?;
        }
        let close = json!({ "process": { "pid": pid } });
        self.daemon(detail, &["process.Process", "CloseStdin"])?.json(&close).send().await?.ok()?;
        Ok(())
    }

    /// Whether the command that was begun still runs.
    async fn works(&self, detail: &Detail, key: &str) -> Result<bool> {
        let answer = self.daemon(detail, &["process.Process", "List"])?.json(&json!({})).safe().send().await?.ok()?;
        let running: Running = answer.json()?;
        Ok(running.processes.iter().any(|process| process.tag.as_deref() == Some(key)))
    }

    /// Asks the command to end, and waits for that.
    async fn end(&self, detail: &Detail, key: &str, grace: Duration) -> Result<()> {
        let until = tokio::time::Instant::now() + grace;
        let signal = json!({ "process": { "tag": key }, "signal": "SIGNAL_SIGTERM" });
        self.daemon(detail, &["process.Process", "SendSignal"])?.json(&signal).send().await?.ok()?;
        while self.works(detail, key).await? && tokio::time::Instant::now() < until {
            tokio::time::sleep(Duration::from_millis(200).min(until - tokio::time::Instant::now())).await;
        }
        Ok(())
    }

    /// What is left of its life, in whole seconds: no timer is moved beyond.
    fn left(detail: &Detail) -> Duration {
        let left = rest::left(&detail.metadata).or_else(|| detail.timer());
        Duration::from_secs(left.unwrap_or(UNSAID).as_secs())
    }
}

#[async_trait]
impl Provider for E2b {
    fn name(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            command: false,
            env: true,
            provider_secrets: false,
            size: false,
            // Each port is reached: there is nothing to open.
            ports: true,
            list: true,
            ttl: Some(Bounds { least: Duration::from_secs(1), most: Duration::from_secs(3600) * self.settings.max_hours }),
            idle_timer: true,
            pause: Pause::Memory,
            exec: true,
            logs: true,
            events: false,
            endpoint: true,
            traffic_keeps_awake: false,
            nodes: false,
        }
    }

    fn price(&self, size: Size) -> Price {
        self.settings.price.clone().unwrap_or_else(|| Price {
            // $0.000014 per vCPU and second, $0.0000045 per GiB and second, of what is allocated. The disk is free.
            running: 0.0504 * f64::from(size.cpu_milli) / 1000.0 + 0.0162 * f64::from(size.memory_mib) / 1024.0,
            paused: 0.0,
            stopped: 0.0,
            source: String::from("e2b.dev/docs/faq/calculate-sandbox-price, as of 2026-08-06"),
        })
    }

    async fn create(&self, spec: &Spec) -> Result<Sandbox> {
        rest::check_names(NAME, &spec.env)?;
        let _one_at_a_time = self.in_flight.lock(&spec.key).await;
        // What cannot be read refuses the container before it is looked for.
        let secrets = secret::read_all(NAME, spec)?;
        let sandbox = self.find_or_make(spec, &secrets).await?;
        self.begin(&sandbox, spec).await?;
        Ok(sandbox)
    }

    async fn start(&self, native: &str) -> Result<()> {
        // What is there runs, or is paused.
        match self.present(native).await?.state() {
            State::Paused => self.resume(native, &[]).await,
            _ => Ok(()),
        }
    }

    async fn state(&self, native: &str) -> Result<Sandbox> {
        Ok(self.detail(native).await?.map_or_else(|| rest::missing(native), Detail::into_sandbox))
    }

    async fn list(&self, labels: &BTreeMap<String, String>, page: Option<&str>) -> Result<Page> {
        let mut call = self
            .api
            .get("list", &["v2", "sandboxes"])
            .query("metadata", rest::pairs(labels))
            .query("state", "running,paused")
            .query("limit", PAGE.to_string());
        if let Some(page) = page {
            call = call.query("nextToken", page);
        }
        let answer = call.send().await?.ok()?;
        let (listed, unread) = rest::items::<Detail>(NAME, &answer.json::<Vec<Value>>()?);
        Ok(Page {
            next: answer.header("x-next-token").map(str::to_owned),
            sandboxes: listed.into_iter().map(Detail::into_sandbox).collect(),
            unread,
        })
    }

    async fn exec(&self, native: &str, command: &Exec) -> Result<Executed> {
        self.run(native, command, None).await
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
        Ok(self.run(native, &tail, None).await?.stdout)
    }

    async fn keep_alive(&self, native: &str, until: Timestamp) -> Result<()> {
        let detail = self.present(native).await?;
        let wanted = until.duration_since(Timestamp::now()).try_into().unwrap_or(Duration::ZERO).min(Self::left(&detail));
        // A timer is moved on, never back; and a second is not worth a call.
        let has = detail.timer().unwrap_or(Duration::ZERO);
        if detail.state() != State::Running || wanted <= has + Duration::from_secs(1) {
            return Ok(());
        }
        let body = json!({ "timeout": wanted.as_secs() });
        self.api.post("keep_alive", &["sandboxes", native, "timeout"]).json(&body).safe().send().await?.ok()?;
        Ok(())
    }

    async fn pause(&self, native: &str) -> Result<()> {
        let answer = self
            .api
            .post("pause", &["sandboxes", native, "pause"])
            .json(&json!({}))
            .safe()
            .timeout(Duration::from_secs(120))
            .send()
            .await?;
        // It is paused already, or something else is being done to it.
        if answer.status == 409 && self.present(native).await?.state() == State::Paused {
            return Ok(());
        }
        answer.ok().map(drop)
    }

    async fn resume(&self, native: &str, _: &[String]) -> Result<()> {
        let left = Self::left(&self.present(native).await?);
        if left.is_zero() {
            return Err(Error::Refused { provider: NAME, what: String::from("its time is over") });
        }
        let body = json!({ "timeout": left.as_secs() });
        let connect = ["v2", "sandboxes", native, "connect"];
        self.api.post("resume", &connect).json(&body).safe().timeout(Duration::from_secs(120)).send().await?.ok()?;
        Ok(())
    }

    /// Nothing that has stopped is kept here: the end of it is the end.
    async fn stop(&self, native: &str, grace: Duration) -> Result<()> {
        let Some(detail) = self.detail(native).await? else { return Ok(()) };
        if let (State::Running, Some(key)) = (detail.state(), detail.metadata.get(KEY_LABEL)) {
            // Who cannot be asked is not waited for.
            if let Err(error) = self.end(&detail, key, grace).await {
                tracing::debug!(%error, "its command could not be asked to end");
            }
        }
        self.delete(native).await
    }

    async fn delete(&self, native: &str) -> Result<()> {
        rest::gone(self.api.delete("delete", &["sandboxes", native]).send().await?)
    }

    async fn endpoint(&self, native: &str, port: u16) -> Result<Endpoint> {
        let detail = self.present(native).await?;
        let domain = detail.domain.as_deref().filter(|domain| !domain.is_empty()).unwrap_or(&self.settings.domain);
        Ok(Endpoint { url: format!("https://{port}-{native}.{domain}"), headers: Vec::new() })
    }

    async fn events(&self, _labels: &BTreeMap<String, String>) -> Result<BoxStream<'static, Result<Happened>>> {
        Err(Error::Unsupported { provider: NAME, verb: "say what happens", hint: Some("it is asked instead") })
    }
}

#[derive(Deserialize)]
struct Made {
    #[serde(rename = "sandboxID")]
    id: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Detail {
    #[serde(rename = "sandboxID")]
    id: String,
    #[serde(default, deserialize_with = "rest::time")]
    started_at: Option<Timestamp>,
    #[serde(default, deserialize_with = "rest::time")]
    end_at: Option<Timestamp>,
    /// Not of every version of those that one runs oneself.
    #[serde(default, deserialize_with = "rest::lenient")]
    cpu_count: u32,
    #[serde(default, rename = "memoryMB", deserialize_with = "rest::lenient")]
    memory_mb: u32,
    #[serde(default, rename = "diskSizeMB", deserialize_with = "rest::lenient")]
    disk_mb: u32,
    #[serde(default)]
    metadata: BTreeMap<String, String>,
    #[serde(default = "rest::unsaid", deserialize_with = "rest::word")]
    state: String,
    #[serde(default, rename = "envdAccessToken", deserialize_with = "rest::lenient")]
    token: Option<String>,
    #[serde(default, deserialize_with = "rest::lenient")]
    domain: Option<String>,
}

impl Detail {
    /// What is left until its own timer ends it, if it says when.
    fn timer(&self) -> Option<Duration> {
        Some(self.end_at?.duration_since(Timestamp::now()).try_into().unwrap_or(Duration::ZERO))
    }

    fn state(&self) -> State {
        match self.state.as_str() {
            "running" => State::Running,
            "paused" => State::Paused,
            other => State::Unknown(other.to_owned()),
        }
    }

    fn into_sandbox(self) -> Sandbox {
        let state = self.state();
        Sandbox {
            key: self.metadata.get(KEY_LABEL).cloned(),
            native: self.id,
            reason: None,
            exit_code: None,
            size: (self.cpu_count > 0).then(|| Size {
                cpu_milli: self.cpu_count.saturating_mul(1000),
                memory_mib: self.memory_mb,
                disk_mib: self.disk_mb,
            }),
            created: self.started_at,
            // Who sleeps has no end.
            deadline: self.end_at.filter(|_| state != State::Paused),
            state,
            labels: self.metadata,
            node: None,
            disrupted: None,
        }
    }
}

/// What the daemon says of a command, message by message.
#[derive(Deserialize)]
struct Message {
    #[serde(default)]
    event: Event,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Event {
    start: Option<Start>,
    data: Data,
    end: Option<Ended>,
}

#[derive(Deserialize)]
struct Start {
    #[serde(default)]
    pid: u32,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Data {
    stdout: String,
    stderr: String,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Ended {
    exit_code: i32,
    exited: bool,
}

/// The last of a stream.
#[derive(Default, Deserialize)]
#[serde(default)]
struct End {
    error: Option<Why>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Why {
    code: String,
    message: String,
}

#[derive(Deserialize)]
struct Running {
    #[serde(default)]
    processes: Vec<Process>,
}

#[derive(Deserialize)]
struct Process {
    #[serde(default)]
    tag: Option<String>,
}

/// A message of the Connect protocol: a byte of flags, four of length, and JSON.
fn envelope(message: &Value) -> Vec<u8> {
    let body = message.to_string().into_bytes();
    let length = u32::try_from(body.len()).expect("a command of less than four gigabytes");
    [&[0][..], &length.to_be_bytes(), &body].concat()
}

/// Takes the next message out of what has come, and says whether it is the last.
fn open(buffer: &mut Vec<u8>) -> std::result::Result<Option<(bool, Vec<u8>)>, String> {
    let Some((&[flags, a, b, c, d], rest)) = buffer.split_first_chunk::<5>() else { return Ok(None) };
    let length = u32::from_be_bytes([a, b, c, d]) as usize;
    if flags & 1 != 0 {
        return Err(String::from("a compressed message"));
    }
    if length > OUTPUT_MOST * 2 {
        return Err(format!("a message of {length} bytes"));
    }
    let Some(message) = rest.get(..length) else { return Ok(None) };
    let message = message.to_vec();
    buffer.drain(..5 + length);
    Ok(Some((flags & 2 != 0, message)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_taken_out_of_whatever_pieces_they_come_in() {
        let sent =
            [envelope(&json!({"event": {"start": {"pid": 7}}})), envelope(&json!({})), vec![2, 0, 0, 0, 2, b'{', b'}']].concat();
        for size in 1..sent.len() {
            let (mut buffer, mut seen) = (Vec::new(), Vec::new());
            for piece in sent.chunks(size) {
                buffer.extend_from_slice(piece);
                while let Some(message) = open(&mut buffer).unwrap() {
                    seen.push(message);
                }
            }
            assert_eq!(seen.iter().map(|(last, _)| *last).collect::<Vec<_>>(), [false, false, true], "in pieces of {size}");
            assert_eq!(seen[0].1, br#"{"event":{"start":{"pid":7}}}"#);
            assert!(buffer.is_empty());
        }
        assert!(open(&mut vec![1, 0, 0, 0, 0]).is_err());
        assert!(open(&mut vec![0, 255, 0, 0, 0]).is_err());
    }
}
