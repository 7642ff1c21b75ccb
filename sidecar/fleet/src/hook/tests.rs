use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicI64, Ordering};

use axum::Router;
use axum::body::Bytes;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use base64::Engine as _;
use proptest::prelude::*;
use tokio::io::AsyncReadExt;
use tokio::net::TcpListener;

use super::*;
use crate::config::{Config, Elsewhere, Hidden};
use crate::provider::{Size, Spec};
use crate::service::Hooks as _;
use crate::session::{Pattern, Report, Wanted};
use crate::store::{Filter, Inserted};

const OLD: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
const NEW: &str = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD";
/// So long that no busy machine comes to its end.
const LONG: Duration = Duration::from_secs(120);

// The world: a log that is a list, a clock that a test moves, secrets that are there.

#[derive(Default)]
struct Log(Mutex<Vec<HookRun>>);

impl Log {
    /// `hook attempt outcome`, a word each.
    fn lines(&self) -> Vec<String> {
        self.0.lock().unwrap().iter().map(|run| format!("{} {} {}", run.hook, run.attempt, run.outcome)).collect()
    }

    fn last(&self) -> HookRun {
        self.0.lock().unwrap().last().cloned().unwrap()
    }
}

const NONE: &str = "hooks ask for their log alone";

#[async_trait::async_trait]
impl Store for Log {
    async fn log_hook(&self, run: &HookRun) -> store::Result<()> {
        self.0.lock().unwrap().push(run.clone());
        Ok(())
    }
    async fn hook_runs(&self, _: &SessionId) -> store::Result<Vec<HookRun>> {
        Ok(self.0.lock().unwrap().clone())
    }
    async fn insert(&self, _: &Session) -> store::Result<Inserted> {
        unreachable!("{NONE}")
    }
    async fn insert_within(&self, _: &Session, _: store::Within<'_>) -> store::Result<Option<Inserted>> {
        unreachable!("{NONE}")
    }
    async fn get(&self, _: &SessionId) -> store::Result<Option<Session>> {
        unreachable!("{NONE}")
    }
    async fn update(&self, _: &mut Session) -> store::Result<()> {
        unreachable!("{NONE}")
    }
    async fn update_both(&self, _: &mut Session, _: &mut Session) -> store::Result<()> {
        unreachable!("{NONE}")
    }
    async fn spares(&self, _: &str, _: usize) -> store::Result<Vec<Session>> {
        unreachable!("{NONE}")
    }
    async fn duty(&self, _: &str, _: &str, _: Duration) -> store::Result<bool> {
        unreachable!("{NONE}")
    }
    async fn drain(&self, _: &str, _: Option<Timestamp>) -> store::Result<()> {
        unreachable!("{NONE}")
    }
    async fn drains(&self) -> store::Result<std::collections::BTreeMap<String, Timestamp>> {
        unreachable!("{NONE}")
    }
    async fn list(&self, _: &Filter, _: Option<&SessionId>, _: usize) -> store::Result<Vec<Session>> {
        unreachable!("{NONE}")
    }
    async fn count(&self) -> store::Result<Vec<(Phase, String, String, u64)>> {
        unreachable!("{NONE}")
    }
    async fn claim(&self, _: &str, _: Duration, _: usize) -> store::Result<Vec<Session>> {
        unreachable!("{NONE}")
    }
    async fn renew(&self, _: &str, _: Duration) -> store::Result<u64> {
        unreachable!("{NONE}")
    }
    async fn release(&self, _: &str, _: &SessionId, _: Option<Timestamp>) -> store::Result<()> {
        unreachable!("{NONE}")
    }
    async fn wake(&self, _: &SessionId) -> store::Result<()> {
        unreachable!("{NONE}")
    }
    async fn reserve(&self, _: &str, _: &str, _: &SessionId, _: f64, _: f64) -> store::Result<bool> {
        unreachable!("{NONE}")
    }
    async fn spend(&self, _: &str, _: &str, _: &SessionId, _: f64) -> store::Result<()> {
        unreachable!("{NONE}")
    }
    async fn want(&self, _: &SessionId, _: Wanted, _: &str, _: Timestamp) -> store::Result<bool> {
        unreachable!("{NONE}")
    }
    async fn born(&self) -> store::Result<Timestamp> {
        unreachable!("{NONE}")
    }
    async fn spent(&self, _: &str, _: &str) -> store::Result<f64> {
        unreachable!("{NONE}")
    }
    async fn with_dead_letters(&self, _: Option<&str>, _: usize) -> store::Result<Vec<SessionId>> {
        unreachable!("{NONE}")
    }
    async fn changed(&self, _: Option<(i64, &str)>, _: Option<&str>, _: usize) -> store::Result<Vec<(i64, Session)>> {
        unreachable!("{NONE}")
    }
    async fn prune(&self, _: Timestamp) -> store::Result<u64> {
        unreachable!("{NONE}")
    }
}

/// The variable is the secret.
struct Said;

impl Outside for Said {
    fn secret(&self, secret: &Secret) -> Result<Option<Hidden>, String> {
        match secret {
            Secret::Env(name) => Ok(Some(Hidden::new(name.clone()))),
            Secret::File(_) | Secret::Provider(_) | Secret::Given(_) => Err(String::from("it is not there")),
        }
    }
}

fn start() -> Timestamp {
    "2026-11-26T12:00:00Z".parse().unwrap()
}

fn seconds(n: i64) -> Timestamp {
    Timestamp::from_second(start().as_second() + n).unwrap()
}

struct World {
    hooks: Hooks,
    log: Log,
    /// Seconds since [`start`].
    now: Arc<AtomicI64>,
}

impl World {
    fn new(hooks: Vec<Hook>) -> Self {
        let now = Arc::new(AtomicI64::new(0));
        let clock = Arc::clone(&now);
        let hooks = Hooks::new("prod", hooks, Arc::new(Said)).unwrap();
        let hooks = hooks.with_clock(Arc::new(move || seconds(clock.load(Ordering::SeqCst))));
        Self { hooks, log: Log::default(), now }
    }

    fn at(&self, n: i64) -> &Self {
        self.now.store(n, Ordering::SeqCst);
        self
    }

    async fn run(&self, session: &Session) -> Verdict {
        self.hooks.run(session, session.phase, seconds(3_600), &self.log).await.unwrap()
    }

    /// The same until nothing has to wait: the clock is moved to when it is due.
    async fn through(&self, session: &Session) -> Verdict {
        loop {
            match self.run(session).await {
                Verdict::Retry(at) => self.at(at.as_second() - start().as_second() + 1),
                verdict => return verdict,
            };
        }
    }
}

fn session(phase: Phase) -> Session {
    let spec = Spec {
        key: String::from("agent-x-1"),
        image: String::from("agent:1"),
        command: vec![String::from("say-hello")],
        env: BTreeMap::from([(String::from("PROMPT"), String::from("the-prompt"))]),
        secrets: BTreeMap::from([(String::from("KEY"), Secret::Env(String::from("THE_KEY")))]),
        size: Size::default(),
        ports: Vec::new(),
        labels: BTreeMap::from([(String::from(TEMPLATE_LABEL), String::from("task"))]),
        ttl: Duration::from_secs(7_200),
        idle: None,
        avoid: vec![],
    };
    let mut session = Session::new("s-1".parse().unwrap(), ("acme", "shop"), Pattern::Ephemeral, "local", spec, start());
    session.phase = phase;
    session.cost_before_usd = 1.0;
    session.report = Some(Report {
        at: start(),
        busy_until: None,
        cost_usd: 0.25,
        conversation: Some(String::from("the-conversation")),
        memory_bytes: None,
    });
    session
}

fn command(name: &str, script: &str) -> Hook {
    let argv = ["/bin/sh", "-c", script].map(String::from).to_vec();
    Hook {
        name: String::from(name),
        on: Phase::ALL.to_vec(),
        templates: Vec::new(),
        act: Act::Command { argv, pass: Vec::new() },
        timeout: LONG,
        retries: 0,
        required: true,
        veto: true,
    }
}

fn webhook(name: &str, at: SocketAddr) -> Hook {
    let secrets = vec![Secret::Env(String::from(OLD))];
    Hook { act: Act::Webhook { url: format!("http://{at}/hook"), secrets }, ..command(name, "") }
}

fn scratch(name: &str) -> PathBuf {
    let dir = std::env::temp_dir().join(format!("agent-fleet-{}-{name}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

// Commands.

#[tokio::test]
async fn a_command_is_told_the_event_and_its_own_variables_and_nothing_of_ours() {
    let hook = command("h", "");
    let argv = |script: &str| ["/bin/sh", "-c", script].map(String::from).to_vec();
    let session = session(Phase::Ready);
    let key = key(&session, Phase::Ready, &hook);
    let event = event::of("prod", &session, Phase::Ready, &hook);
    let told = Told { session: &session.id, tenant: "acme", generation: 1, phase: Phase::Ready, key: &key, event: &event };
    let pass = [String::from("CARGO_MANIFEST_DIR")];
    let Outcome::Ok(said) = command::run(&argv("env | sort"), &pass, &told, LONG, true).await else { panic!() };
    let names: Vec<&str> = said.lines().filter_map(|line| Some(line.split_once('=')?.0)).collect();
    let own = ["AGENT_FLEET_GENERATION", "AGENT_FLEET_KEY", "AGENT_FLEET_PHASE", "AGENT_FLEET_SESSION", "AGENT_FLEET_TENANT"];
    // The shell adds what is not ours.
    let names: Vec<&str> = names.into_iter().filter(|name| !["PWD", "OLDPWD", "SHLVL", "_"].contains(name)).collect();
    assert_eq!(names, [&own[..], &["CARGO_MANIFEST_DIR", "PATH"]].concat());
    assert!(said.contains(&format!("AGENT_FLEET_KEY={key}\n")) && said.contains("AGENT_FLEET_PHASE=ready\n"), "{said}");
    let Outcome::Ok(said) = command::run(&argv("cat"), &[], &told, LONG, true).await else { panic!() };
    assert_eq!(said, event);
}

#[tokio::test]
async fn a_no_is_heard_where_a_session_can_still_be_refused_and_nowhere_else() {
    for phase in Phase::ALL {
        for veto in [true, false] {
            let first = Hook { veto, ..command("first", "echo not today; exit 10") };
            let world = World::new(vec![first, command("second", "exit 0")]);
            let verdict = world.run(&session(phase)).await;
            if veto && matches!(phase, Phase::Requested | Phase::Creating) {
                assert_eq!(verdict, Verdict::Veto(String::from("hook `first`: not today")), "{phase}");
                assert_eq!(world.log.lines(), ["first 1 veto"]);
                // It stays a no.
                assert!(matches!(world.run(&session(phase)).await, Verdict::Veto(_)));
                assert_eq!(world.log.lines(), ["first 1 veto"]);
            } else {
                assert!(matches!(verdict, Verdict::Failed(why) if why.contains("not today")), "{phase}");
                assert_eq!(world.log.lines(), ["first 1 dead-letter"], "{phase}");
            }
        }
    }
}

#[tokio::test]
async fn what_has_done_well_is_not_run_again_until_the_phase_comes_again() {
    let world = World::new(vec![command("a", "exit 0"), command("b", "exit 0")]);
    let mut session = session(Phase::Idle);
    assert_eq!(world.run(&session).await, Verdict::Go);
    assert_eq!(world.run(&session).await, Verdict::Go);
    assert_eq!(world.log.lines(), ["a 1 ok", "b 1 ok"]);
    session.since = seconds(60);
    assert_eq!(world.run(&session).await, Verdict::Go);
    session.generation = 2;
    assert_eq!(world.run(&session).await, Verdict::Go);
    assert_eq!(world.log.lines().len(), 6);
}

#[tokio::test]
async fn a_command_that_fails_is_tried_again_later_each_time_and_fails_the_step_at_last() {
    let world = World::new(vec![Hook { retries: 2, ..command("a", "echo oh >&2; exit 3") }, command("b", "exit 0")]);
    let session = session(Phase::Ready);
    let Verdict::Retry(first) = world.run(&session).await else { panic!() };
    assert!(first > seconds(0) && first <= seconds(1), "{first}");
    // Too early, nothing is done.
    assert_eq!(world.run(&session).await, Verdict::Retry(first));
    let Verdict::Retry(second) = world.at(10).run(&session).await else { panic!() };
    assert!(second >= seconds(11) && second <= seconds(12), "{second}");
    let Verdict::Failed(why) = world.at(20).run(&session).await else { panic!() };
    assert_eq!(why, "hook `a`: exit status: 3: oh");
    assert_eq!(world.log.lines(), ["a 1 failed", "a 2 failed", "a 3 dead-letter"]);
}

#[tokio::test]
async fn nothing_is_tried_after_the_phase_has_no_time_left() {
    let world = World::new(vec![Hook { retries: 9, ..command("a", "exit 3") }]);
    let session = session(Phase::Ready);
    // The next try would be too late: this one is the last.
    let verdict =
        world.hooks.run(&session, Phase::Ready, seconds(0).checked_add(Duration::from_millis(400)).unwrap(), &world.log);
    assert!(matches!(verdict.await.unwrap(), Verdict::Failed(_)));
    assert_eq!(world.log.lines(), ["a 1 dead-letter"]);
    let world = World::new(vec![Hook { required: false, ..command("a", "exit 0") }, command("b", "exit 0")]);
    let verdict = world.at(10).hooks.run(&session, Phase::Ready, seconds(10), &world.log).await.unwrap();
    assert_eq!(verdict, Verdict::Failed(String::from("hook `b`: no time was left for it")));
    assert_eq!(world.log.lines(), Vec::<String>::new());
}

#[tokio::test]
async fn what_is_not_waited_for_is_tried_again_beside_the_step_as_it_was_told() {
    let dir = scratch("beside");
    let file = dir.join("told");
    let script = format!("cat >> {0}; echo >> {0}; [ $(wc -l < {0}) -ge 3 ]", file.display());
    let world = World::new(vec![Hook { required: false, retries: 5, ..command("a", &script) }, command("b", "exit 0")]);
    let mut session = session(Phase::Creating);
    assert_eq!(world.run(&session).await, Verdict::Go);
    assert_eq!(world.log.lines(), ["a 1 failed", "b 1 ok"]);
    let due = world.hooks.beside(&session, &world.log).await.unwrap().unwrap();
    assert!(due > seconds(0) && due <= seconds(1));
    // Meanwhile the session is somewhere else.
    (session.phase, session.since, session.cost_before_usd) = (Phase::Starting, seconds(5), 9.0);
    assert!(world.at(10).hooks.beside(&session, &world.log).await.unwrap().unwrap() > seconds(10));
    assert_eq!(world.at(20).hooks.beside(&session, &world.log).await.unwrap(), None);
    assert_eq!(world.log.lines(), ["a 1 failed", "b 1 ok", "a 2 failed", "a 3 ok"]);
    assert_eq!(world.at(90).hooks.beside(&session, &world.log).await.unwrap(), None);
    let told = std::fs::read_to_string(&file).unwrap();
    let told: Vec<&str> = told.lines().collect();
    assert!(told.len() == 3 && told.iter().all(|line| *line == told[0] && line.contains("session.creating")), "{told:?}");
    std::fs::remove_dir_all(dir).unwrap();
}

/// Whether it runs: who was killed may wait for somebody to take note.
fn runs(pid: &str) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with(['Z', 'X']))
}

async fn gone(pids: &str) {
    tokio::time::timeout(LONG, async {
        while pids.split_whitespace().any(runs) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await
    .unwrap_or_else(|_| panic!("{pids} still run"));
}

#[tokio::test]
async fn a_command_that_ignores_its_end_is_killed_with_all_that_it_began() {
    let dir = scratch("deaf");
    let pids = dir.join("pids");
    // The shell is there when its file is: only then can the test say who was killed.
    let script = format!(
        "trap '' TERM INT HUP; (trap '' TERM; sleep 600) & echo $! $$ > {0}.new; mv {0}.new {0}; while :; do sleep 600; done",
        pids.display()
    );
    let world = World::new(vec![Hook { timeout: Duration::from_secs(5), ..command("a", &script) }]);
    let verdict = world.run(&session(Phase::Ready)).await;
    assert_eq!(verdict, Verdict::Failed(String::from("hook `a`: no answer within 5 s")));
    let pids = std::fs::read_to_string(pids).unwrap();
    assert_eq!(pids.split_whitespace().count(), 2);
    gone(&pids).await;
    std::fs::remove_dir_all(dir).unwrap();
}

#[tokio::test]
async fn who_is_no_longer_waited_for_is_killed() {
    let dir = scratch("dropped");
    let pids = dir.join("pids");
    let script = format!("sleep 600 & echo $! $$ > {0}.new; mv {0}.new {0}; wait", pids.display());
    let world = World::new(vec![command("a", &script)]);
    let session = session(Phase::Ready);
    let there = async {
        while !pids.exists() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::select! {
        _ = world.run(&session) => panic!("it does not end"),
        () = there => {}
    }
    gone(&std::fs::read_to_string(&pids).unwrap()).await;
    std::fs::remove_dir_all(dir).unwrap();
}

#[tokio::test]
async fn what_a_command_leaves_running_holds_nobody_up() {
    let dir = scratch("left");
    let pids = dir.join("pids");
    // One in its group, one that has left it; both hold its output open.
    let script = format!("sleep 600 & echo $! > {0}; setsid sleep 600 & echo $! >> {0}; echo done", pids.display());
    let world = World::new(vec![Hook { timeout: Duration::from_secs(60), ..command("a", &script) }]);
    assert_eq!(world.run(&session(Phase::Ready)).await, Verdict::Go);
    assert_eq!(world.log.last().said, "done");
    let pids = std::fs::read_to_string(pids).unwrap();
    let (inside, outside) = pids.trim().split_once('\n').unwrap();
    gone(inside).await;
    Command::new("kill").args(["-9", outside]).status().unwrap();
    std::fs::remove_dir_all(dir).unwrap();
}

#[tokio::test]
async fn what_a_command_says_is_cut_and_clean_and_what_cannot_start_is_told() {
    let world = World::new(vec![
        command("a", "head -c 3000000 /dev/zero | tr '\\0' x; printf '\\033[2J'"),
        command("b", "printf '\\033[2Jé'; cat > /dev/null"),
    ]);
    assert_eq!(world.run(&session(Phase::Ready)).await, Verdict::Go);
    let runs = world.log.0.lock().unwrap().clone();
    assert_eq!(runs[0].said, "x".repeat(SAID_MOST));
    assert_eq!(runs[1].said, "\u{fffd}[2Jé");
    let mut hook = command("c", "");
    hook.act = Act::Command { argv: vec![String::from("/no/such/program")], pass: Vec::new() };
    let Verdict::Failed(why) = World::new(vec![hook]).run(&session(Phase::Ready)).await else { panic!() };
    assert!(why.contains("/no/such/program cannot be started: No such file"), "{why}");
}

// Webhooks.

type Request = (HeaderMap, String);

/// A receiver that answers what it is told to, one after the other, and at last `200`.
#[derive(Clone, Default)]
struct Receiver {
    answers: Arc<Mutex<VecDeque<Response>>>,
    requests: Arc<Mutex<Vec<Request>>>,
}

impl Receiver {
    async fn start(answers: Vec<Response>) -> (Self, SocketAddr) {
        let receiver = Self { answers: Arc::new(Mutex::new(answers.into())), ..Self::default() };
        let shared = receiver.clone();
        let handle = move |headers: HeaderMap, body: Bytes| {
            let Receiver { answers, requests } = shared.clone();
            async move {
                requests.lock().unwrap().push((headers, String::from_utf8(body.to_vec()).unwrap()));
                answers.lock().unwrap().pop_front().unwrap_or_else(|| StatusCode::OK.into_response())
            }
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, Router::new().route("/{*path}", post(handle))).await });
        (receiver, at)
    }

    fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }
}

fn header<'a>(request: &'a Request, name: &str) -> &'a str {
    request.0[name].to_str().unwrap()
}

/// By the scheme's own words, and not by our code.
fn is_signed(request: &Request, secret: &str) -> bool {
    let key = base64::engine::general_purpose::STANDARD.decode(secret.strip_prefix("whsec_").unwrap()).unwrap();
    let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, &key);
    let signed = format!("{}.{}.{}", header(request, "webhook-id"), header(request, "webhook-timestamp"), request.1);
    header(request, "webhook-signature").split(' ').any(|one| {
        let tag = base64::engine::general_purpose::STANDARD.decode(one.strip_prefix("v1,").unwrap()).unwrap();
        ring::hmac::verify(&key, signed.as_bytes(), &tag).is_ok()
    })
}

#[tokio::test]
async fn a_webhook_is_a_signed_cloud_event_without_what_is_nobodys_business() {
    let (receiver, at) = Receiver::start(vec![]).await;
    let mut hook = webhook("h", at);
    let Act::Webhook { secrets, .. } = &mut hook.act else { panic!() };
    secrets.push(Secret::Env(String::from(NEW)));
    let world = World::new(vec![hook]);
    assert_eq!(world.run(&session(Phase::Ready)).await, Verdict::Go);
    let requests = receiver.requests();
    let request = &requests[0];
    // Both, while one replaces the other.
    assert!(is_signed(request, OLD) && is_signed(request, NEW));
    assert_eq!(header(request, "content-type"), "application/cloudevents+json; charset=utf-8");
    assert_eq!(header(request, "webhook-timestamp"), start().as_second().to_string());
    let event: serde_json::Value = serde_json::from_str(&request.1).unwrap();
    assert_eq!(header(request, "webhook-id"), event["id"]);
    assert_eq!(
        event,
        serde_json::json!({
            "specversion": "1.0",
            "id": "s-1/1/ready/1795694400000/h",
            "source": "/agent-fleet/prod",
            "type": "dev.agent-fleet.session.ready",
            "subject": "s-1",
            "time": "2026-11-26T12:00:00Z",
            "datacontenttype": "application/json",
            "data": {
                "session": "s-1", "tenant": "acme", "owner": "shop", "pattern": "ephemeral", "provider": "local",
                "template": "task", "image": "agent:1", "generation": 1, "container": session(Phase::Ready).key(),
                "phase": "ready", "since": "2026-11-26T12:00:00Z", "created": "2026-11-26T12:00:00Z",
                "ends": "2026-11-26T14:00:00Z", "cost_usd": 1.25, "hook": "h",
            },
        })
    );
    for secret in ["the-prompt", "THE_KEY", "say-hello", "the-conversation"] {
        assert!(!request.1.contains(secret), "{secret}");
    }
}

#[tokio::test]
async fn a_receiver_that_fails_thrice_is_told_the_same_four_times() {
    let error = || StatusCode::INTERNAL_SERVER_ERROR.into_response();
    let (receiver, at) = Receiver::start(vec![error(), error(), error()]).await;
    let world = World::new(vec![Hook { retries: 3, ..webhook("h", at) }]);
    let mut session = session(Phase::Ready);
    assert!(matches!(world.run(&session).await, Verdict::Retry(_)));
    // What is known of it later is not what it was told.
    session.cost_before_usd = 9.0;
    assert_eq!(world.at(5).through(&session).await, Verdict::Go);
    assert_eq!(world.log.lines(), ["h 1 failed", "h 2 failed", "h 3 failed", "h 4 ok"]);
    let requests = receiver.requests();
    assert_eq!(requests.len(), 4);
    for request in &requests {
        assert_eq!((&request.1, header(request, "webhook-id")), (&requests[0].1, header(&requests[0], "webhook-id")));
        assert!(is_signed(request, OLD));
    }
    assert_ne!(header(&requests[0], "webhook-timestamp"), header(&requests[3], "webhook-timestamp"));
}

#[tokio::test]
async fn an_answer_says_whether_and_when_it_is_asked_again() {
    let after = |status: u16, seconds: &str| {
        Response::builder().status(status).header("retry-after", seconds).body(axum::body::Body::from("busy")).unwrap()
    };
    // By the receiver's own clock.
    let at = |date: &str| {
        let mut answer = after(429, date);
        answer.headers_mut().insert("date", "Sun, 06 Nov 1994 08:49:37 GMT".parse().unwrap());
        answer
    };
    for (answer, verdict, outcome) in [
        (after(429, "120"), Verdict::Retry(seconds(120)), "failed"),
        (after(503, "90"), Verdict::Retry(seconds(90)), "failed"),
        (at("Sun, 06 Nov 1994 08:51:37 GMT"), Verdict::Retry(seconds(120)), "failed"),
        // Longer than the phase: nobody waits for it.
        (after(503, "999999999"), Verdict::Failed(String::from("hook `h`: 503 Service Unavailable: busy")), "dead-letter"),
        (after(404, "1"), Verdict::Failed(String::from("hook `h`: 404 Not Found: busy")), "dead-letter"),
        (after(401, "1"), Verdict::Failed(String::from("hook `h`: 401 Unauthorized: busy")), "dead-letter"),
    ] {
        let (receiver, at) = Receiver::start(vec![answer]).await;
        let world = World::new(vec![Hook { retries: 5, ..webhook("h", at) }]);
        assert_eq!(world.run(&session(Phase::Requested)).await, verdict);
        assert_eq!(world.log.last().outcome, outcome);
        assert_eq!(world.run(&session(Phase::Requested)).await, verdict);
        assert_eq!(receiver.requests().len(), 1);
    }
}

#[tokio::test]
async fn a_receivers_no_is_heard_where_it_can_be_and_an_answer_that_may_have_been_one_is_no_yes() {
    let no = || r#"{"allow": false, "reason": "the budget is for people"}"#.into_response();
    for phase in Phase::ALL {
        let (_, at) = Receiver::start(vec![no()]).await;
        let verdict = World::new(vec![webhook("h", at)]).run(&session(phase)).await;
        if phase.can_be_vetoed() {
            assert_eq!(verdict, Verdict::Veto(String::from("hook `h`: the budget is for people")));
        } else {
            assert_eq!(verdict, Verdict::Go, "{phase}");
        }
    }
    for (answer, allowed) in [
        (String::new(), true),
        (String::from("ok"), true),
        (String::from(r#"{"allow": true}"#), true),
        (String::from(r#"{"allow": false}"#), false),
        (String::from(r#"{"allow": false, "reason": 7}"#), false),
        (String::from(r#"{"allow": "false"}"#), false),
        (format!("{{\"padding\": \"{}\", \"allow\": false}}", "x".repeat(1 << 20)), false),
    ] {
        let (_, at) = Receiver::start(vec![answer.clone().into_response()]).await;
        let verdict = World::new(vec![webhook("h", at)]).run(&session(Phase::Requested)).await;
        assert_eq!(verdict == Verdict::Go, allowed, "{verdict:?} for {}", &answer[..answer.len().min(40)]);
        let (_, at) = Receiver::start(vec![answer.into_response()]).await;
        assert_eq!(World::new(vec![webhook("h", at)]).run(&session(Phase::Ready)).await, Verdict::Go);
    }
}

#[tokio::test]
async fn nobody_is_followed_to_another_place() {
    let (other, elsewhere) = Receiver::start(vec![]).await;
    for status in [301, 302, 303, 307, 308] {
        let moved = Response::builder().status(status).header("location", format!("http://{elsewhere}/hook"));
        let (_, at) = Receiver::start(vec![moved.body(axum::body::Body::empty()).unwrap()]).await;
        let Verdict::Failed(why) = World::new(vec![Hook { retries: 5, ..webhook("h", at) }]).run(&session(Phase::Ready)).await
        else {
            panic!("{status}")
        };
        assert!(why.contains("nobody is followed"), "{why}");
    }
    assert_eq!(other.requests().len(), 0);
}

#[tokio::test]
async fn a_receiver_that_is_slow_or_breaks_off_or_is_not_there_is_asked_again() {
    // Takes the request and says nothing.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let hook = Hook { retries: 1, timeout: Duration::from_millis(300), ..webhook("h", silent.local_addr().unwrap()) };
    let world = World::new(vec![hook]);
    assert!(matches!(world.run(&session(Phase::Ready)).await, Verdict::Retry(_)));
    assert_eq!(world.log.lines(), ["h 1 timeout"]);

    // Reads some and goes away.
    let rude = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = rude.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = rude.accept().await {
            stream.read_exact(&mut [0; 16]).await.unwrap();
        }
    });
    let world = World::new(vec![Hook { retries: 1, ..webhook("h", at) }]);
    assert!(matches!(world.run(&session(Phase::Ready)).await, Verdict::Retry(_)));
    assert_eq!(world.log.lines(), ["h 1 failed"]);
    // Its path may be a secret.
    assert!(!world.log.last().said.contains("/hook"), "{}", world.log.last().said);

    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let world = World::new(vec![Hook { retries: 1, ..webhook("h", nobody) }]);
    assert!(matches!(world.run(&session(Phase::Ready)).await, Verdict::Retry(_)));
    assert!(world.log.last().said.contains("no connection"), "{}", world.log.last().said);

    // Without its secret nothing is sent.
    let (receiver, at) = Receiver::start(vec![]).await;
    let mut hook = webhook("h", at);
    let Act::Webhook { secrets, .. } = &mut hook.act else { panic!() };
    secrets.push(Secret::File(PathBuf::from("/gone")));
    let Verdict::Failed(why) = World::new(vec![hook]).run(&session(Phase::Ready)).await else { panic!() };
    assert_eq!((why.as_str(), receiver.requests().len()), ("hook `h`: its secret: it is not there", 0));
}

#[tokio::test]
async fn a_dead_letter_is_kept_and_told_again_when_somebody_asks() {
    let bad = || StatusCode::BAD_GATEWAY.into_response();
    let (receiver, at) = Receiver::start(vec![bad(), bad(), bad()]).await;
    let world = World::new(vec![Hook { retries: 1, required: false, ..webhook("h", at) }]);
    let mut session = session(Phase::Ready);
    assert_eq!(world.run(&session).await, Verdict::Go);
    assert_eq!(world.at(10).hooks.beside(&session, &world.log).await.unwrap(), None);
    let runs = world.log.0.lock().unwrap().clone();
    let keys: Vec<&str> = dead_letters(&runs).map(|run| run.key.as_str()).collect();
    assert_eq!(keys, ["s-1/1/ready/1795694400000/h"]);
    // Much later.
    (session.phase, session.since) = (Phase::Destroyed, seconds(9_000));
    let redeliver = async |key: &str| world.hooks.redeliver(&session, key, &world.log).await.unwrap().map(|run| run.outcome);
    assert_eq!(redeliver("s-1/1/idle/0/h").await, None);
    assert_eq!(redeliver(keys[0]).await.as_deref(), Some("dead-letter"));
    assert_eq!(redeliver(keys[0]).await.as_deref(), Some("ok"));
    assert_eq!(redeliver(keys[0]).await, None);
    assert_eq!(world.log.lines(), ["h 1 failed", "h 2 dead-letter", "h 3 dead-letter", "h 4 ok"]);
    let requests = receiver.requests();
    assert!(requests.len() == 4 && requests.iter().all(|request| request.1 == requests[0].1 && is_signed(request, OLD)));
}

#[tokio::test]
async fn the_service_is_told_to_come_back_and_for_how_long_at_most() {
    let dir = scratch("runner");
    let file = dir.join("tries");
    let beside = Hook { required: false, retries: 1, ..command("b", "exit 1") };
    let hooks = vec![Hook { retries: 20, ..command("a", &format!("echo x >> {}; exit 1", file.display())) }, beside];
    let World { hooks, now, .. } = World::new(hooks);
    let store = store::memory().await.unwrap();
    let mut session = session(Phase::Creating);
    store.insert(&session).await.unwrap();
    let runner = Runner { hooks, store: Arc::clone(&store) };
    // It came into the phase when no fleet was there.
    let came_back = 50_000;
    now.store(came_back, Ordering::SeqCst);
    let (mut tries, why) = (
        0,
        loop {
            match runner.run(&session).await {
                Verdict::Retry(at) => now.store(at.as_second() + 1 - start().as_second(), Ordering::SeqCst),
                Verdict::Failed(why) => break why,
                other => panic!("{other:?}"),
            };
        },
    );
    assert!(why.starts_with("hook `a`: exit status: 1"), "{why}");
    let held = now.load(Ordering::SeqCst) - came_back;
    assert!(held < 600, "{held}");
    tries += std::fs::read_to_string(&file).unwrap().lines().count();
    assert!((8..21).contains(&tries), "{tries}");
    assert_eq!(runner.beside(&session).await, None);
    session.phase = Phase::Failed;
    session.spec.labels.clear();
    assert!(matches!(runner.run(&session).await, Verdict::Retry(_)), "`a` is for failed, too");
    // One that was forgotten has nothing beside it.
    session.id = "unknown".parse().unwrap();
    assert_eq!(runner.beside(&session).await, None);
    assert!(matches!(runner.run(&session).await, Verdict::Retry(_)), "what cannot be logged is not done with");
    std::fs::remove_dir_all(dir).unwrap();
}

// Order, for whatever hooks come to.

#[derive(Clone, Debug)]
enum Came {
    Ok,
    Veto,
    Failed,
    Timeout,
    Refused,
}

fn came() -> impl Strategy<Value = Came> {
    prop_oneof![4 => Just(Came::Ok), 1 => Just(Came::Veto), 3 => Just(Came::Failed), 1 => Just(Came::Timeout), 1 => Just(Came::Refused)]
}

proptest! {
    #[test]
    fn no_hook_is_tried_too_often_and_nothing_is_tried_after_a_no(
        shapes in prop::collection::vec((0_u32..4, any::<bool>(), any::<bool>(), any::<bool>()), 0..5),
        phase in prop::sample::select(Phase::ALL.to_vec()),
        outcomes in prop::collection::vec(came(), 40),
        life in 1_i64..200,
    ) {
        let hooks: Vec<Hook> = shapes
            .iter()
            .enumerate()
            .map(|(n, (retries, required, veto, here))| Hook {
                retries: *retries,
                required: *required,
                veto: *veto,
                on: if *here { vec![phase] } else { Vec::new() },
                ..command(&format!("h{n}"), "")
            })
            .collect();
        let session = session(phase);
        let (mut runs, mut now, until) = (Vec::new(), start(), seconds(life));
        let mut outcomes = outcomes.into_iter();
        let mut came = |hook: &Hook| match outcomes.next().unwrap_or(Came::Ok) {
            Came::Veto if hook.may_veto(phase) => Outcome::Veto(String::from("no")),
            Came::Ok => Outcome::Ok(String::new()),
            Came::Veto | Came::Failed => Outcome::Failed { said: String::from("oh"), after: None },
            Came::Timeout => Outcome::Timeout,
            Came::Refused => Outcome::Refused(String::from("go away")),
        };
        let tell = |hook: &Hook, attempt: u32, at: Timestamp, until: Option<Timestamp>, outcome: Outcome| {
            let key = key(&session, phase, hook);
            let told = Told { session: &session.id, tenant: "acme", generation: 1, phase, key: &key, event: "{}" };
            logged(hook, &told, attempt, until, at, at, outcome)
        };
        let verdict = loop {
            match next(&hooks, &session, phase, &runs, now, until) {
                Next::Try { hook, attempt } => {
                    prop_assert!(now < until, "tried when there was no time left");
                    let run = tell(hook, attempt, now, hook.required.then_some(until), came(hook));
                    runs.push(run);
                }
                Next::Done(Verdict::Retry(at)) => {
                    prop_assert!(at > now && at < until);
                    now = at;
                }
                Next::Done(verdict) => break verdict,
            }
            prop_assert!(runs.len() <= 40, "it does not end");
        };
        let of = |hook: &Hook, runs: &[HookRun]| runs.iter().filter(|run| run.hook == hook.name).cloned().collect::<Vec<_>>();
        let vetoes = runs.iter().filter(|run| run.outcome == "veto").count();
        prop_assert!(vetoes == 0 || vetoes == 1 && runs.last().unwrap().outcome == "veto");
        prop_assert_eq!(vetoes == 1, matches!(verdict, Verdict::Veto(_)));
        // In order: who comes later has not begun before.
        let order: Vec<&String> = runs.iter().map(|run| &run.hook).collect();
        prop_assert!(order.is_sorted());
        if verdict == Verdict::Go {
            let right = |hook: &Hook| !hook.on.contains(&phase) || of(hook, &runs).last().is_some_and(|run| run.outcome == "ok");
            prop_assert!(hooks.iter().filter(|hook| hook.required).all(right));
        }
        // And what is not waited for, beside it.
        let mut rounds = 0;
        let due = |runs: &[HookRun]| waiting(&hooks, runs).next().map(|(hook, last)| (hook.clone(), last.clone()));
        while let Some((hook, last)) = due(&runs) {
            runs.push(tell(&hook, last.attempt + 1, last.again.unwrap(), None, came(&hook)));
            rounds += 1;
            prop_assert!(rounds < 40, "it does not end");
        }
        for hook in &hooks {
            let tries = of(hook, &runs);
            prop_assert!(tries.len() <= hook.retries as usize + 1);
            prop_assert!(tries.iter().zip(1..).all(|(run, n)| run.attempt == n));
            let ended = tries.iter().position(|run| matches!(run.outcome.as_str(), "ok" | "veto" | "dead-letter"));
            prop_assert!(ended.is_none_or(|n| n + 1 == tries.len()));
            prop_assert!(tries.iter().all(|run| run.event.is_some() != matches!(run.outcome.as_str(), "ok" | "veto")));
        }
    }
}

#[test]
fn each_wait_is_about_twice_the_last_and_sessions_do_not_come_back_together() {
    for n in 1..=20 {
        let wait = backoff("k", n).as_secs_f64();
        let whole = f64::from(2_u32.saturating_pow(n - 1)).min(60.0);
        assert!(wait > whole / 2.0 && wait <= whole, "{n}: {wait}");
    }
    let waits: std::collections::BTreeSet<Duration> = (0..100).map(|n| backoff(&n.to_string(), 5)).collect();
    assert!(waits.len() > 50);
    assert_eq!(backoff("k", 3), backoff("k", 3));
}

// What is documented.

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

#[test]
fn a_plan_says_what_would_run_in_which_order() {
    let config = Config::read_with(&repository().join("deploy/fleet/agent-fleet.toml"), &Elsewhere).unwrap();
    assert_eq!(
        plan_hooks(&config, "task"),
        [
            "requested: admission (webhook https://hooks.example/agent-fleet) within 5s, 2 more tries, at most 18s in all; must do well, may say no",
            "ready: audit (command /usr/local/bin/audit) within 10s, 5 more tries, at most 1m31s in all; is not waited for when it fails",
            "stopped: audit (command /usr/local/bin/audit) within 10s, 5 more tries, at most 1m31s in all; is not waited for when it fails",
            "failed: audit (command /usr/local/bin/audit) within 10s, 5 more tries, at most 1m31s in all; is not waited for when it fails",
        ]
    );
    assert_eq!(plan_hooks(&config, "chat").len(), 1);
}

#[test]
fn the_documented_event_has_what_an_event_has() {
    let page = std::fs::read_to_string(repository().join("docs/fleet-hooks.md")).unwrap();
    let block = page.split("```json\n").nth(1).and_then(|rest| rest.split("```").next()).expect("a block of JSON");
    let documented: serde_json::Value = serde_json::from_str(block).unwrap();
    let sent = event::of("prod", &session(Phase::Ready), Phase::Ready, &command("audit", ""));
    let sent: serde_json::Value = serde_json::from_str(&sent).unwrap();
    let keys = |value: &serde_json::Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    assert_eq!(keys(&documented), keys(&sent));
    assert_eq!(keys(&documented["data"]), keys(&sent["data"]));
}

/// The verifier of the page for whoever receives, run by Python on what we send.
#[tokio::test]
async fn the_documented_verifier_takes_what_we_send_and_nothing_else() {
    let page = std::fs::read_to_string(repository().join("docs/fleet-hooks.md")).unwrap();
    let verifier = page.split("```python\n").nth(1).and_then(|rest| rest.split("```").next()).expect("a block of Python");
    let (receiver, at) = Receiver::start(vec![]).await;
    let world = World::new(vec![webhook("h", at)]);
    let now = Timestamp::now().as_second() - start().as_second();
    assert_eq!(
        world.at(now).hooks.run(&session(Phase::Ready), Phase::Ready, Timestamp::MAX, &world.log).await.unwrap(),
        Verdict::Go
    );
    let requests = receiver.requests();
    let (headers, body) = &requests[0];
    let headers: BTreeMap<&str, &str> = headers.iter().map(|(name, value)| (name.as_str(), value.to_str().unwrap())).collect();
    let verify = |secret: &str, body: &str, headers: &BTreeMap<&str, &str>| {
        let call =
            format!("{verifier}\nimport json, sys\nprint(verify({secret:?}, json.loads(sys.argv[1]), sys.argv[2].encode()))");
        let headers = serde_json::to_string(headers).unwrap();
        let mut python = Command::new("python3");
        let output =
            python.args(["-c", &call, &headers, body]).output().expect("python3 is there: the other suites need it, too");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim() == "True"
    };
    assert!(verify(OLD, body, &headers));
    assert!(!verify(NEW, body, &headers));
    assert!(!verify(OLD, &body.replace("acme", "evil"), &headers));
    let mut old = headers.clone();
    old.insert("webhook-timestamp", "1614265330");
    assert!(!verify(OLD, body, &old));
}
