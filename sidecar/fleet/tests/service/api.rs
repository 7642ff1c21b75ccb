//! What callers are answered: over a real socket, with a provider in memory behind it.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use agent_fleet::api::{self, Api};
use agent_fleet::config::{Config, Machine};
use agent_fleet::lifecycle::Phase;
use agent_fleet::metric::{CATALOG, Metric};
use agent_sidecar_core::metric::Kind;
use serde_json::{Value, json};

use crate::town::{Running, Town, run};

/// Who may ask, and what for. The tokens are made by the test: each is its owner's name, again and again.
fn config(dir: &Path) -> Config {
    for name in ["shop", "bank", "ops", "app"] {
        std::fs::write(dir.join(name), name.repeat(12)).unwrap();
        std::os::unix::fs::chown(dir.join(name), None, None).unwrap();
        std::fs::set_permissions(dir.join(name), std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    }
    let file = |name: &str| dir.join(name).display().to_string();
    let text = format!(
        r#"
        [fleet]
        name = "town"
        store = "sqlite:{}"
        [callers.shop]
        token = {{ file = "{}" }}
        tenants = ["acme"]
        [callers.bank]
        token = {{ file = "{}" }}
        tenants = ["acme", "globex"]
        [callers.ops]
        token = {{ file = "{}" }}
        tenants = ["*"]
        admin = true
        [tenants.acme]
        [tenants.globex]
        max_sessions = 1
        [providers.cloud]
        kind = "docker"
        [templates.task]
        pattern = "ephemeral"
        provider = "cloud"
        image = "i"
        ttl = "1h"
        [templates.chat]
        pattern = "hybrid"
        provider = "cloud"
        image = "i"
        ttl = "1h"
        idle_after = "3s"
        app_port = 8000
        app_token = {{ file = "{}" }}
        "#,
        file("db"),
        file("shop"),
        file("bank"),
        file("ops"),
        file("app")
    );
    Config::parse(Path::new("test.toml"), &text, &Machine).unwrap()
}

pub(crate) struct Served {
    pub(crate) town: Town,
    pub(crate) url: String,
    pub(crate) client: reqwest::Client,
    running: Running,
    end: tokio::sync::watch::Sender<bool>,
    serving: Option<tokio::task::JoinHandle<()>>,
    dir: std::path::PathBuf,
}

impl Served {
    pub(crate) async fn new(name: &str) -> Self {
        Self::with(name, Town::fleet).await
    }

    async fn with(name: &str, made: impl FnOnce(&Town) -> Arc<agent_fleet::service::Fleet>) -> Self {
        let dir = std::env::temp_dir().join(format!("agent-fleet-api-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let config = Arc::new(config(&dir));
        let mut town = Town::new(0).await;
        town.tenants = config.tenants.clone();
        let fleet = made(&town);
        let running = run(&fleet);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (end, ended) = tokio::sync::watch::channel(false);
        let serving = Some(tokio::spawn(agent_fleet::serve::serve(listener, api::router(Api { fleet, config }), ended)));
        Served { town, url, client: agent_fleet::build::client().unwrap(), running, end, serving, dir }
    }

    /// As `agent-fleet serve` ends; waits until nobody is talked to any more.
    pub(crate) async fn ends(&mut self) {
        self.running.end.send(true).unwrap();
        self.end.send(true).unwrap();
        self.serving.take().unwrap().await.unwrap();
    }

    pub(crate) async fn ask(&self, who: &str, method: &str, path: &str, body: Option<Value>) -> (u16, Value) {
        let mut request = self.client.request(method.parse().unwrap(), format!("{}{path}", self.url));
        if !who.is_empty() {
            request = request.bearer_auth(who.repeat(12));
        }
        if let Some(body) = body {
            request = request.json(&body);
        }
        let answer = request.send().await.unwrap();
        let status = answer.status().as_u16();
        let text = answer.text().await.unwrap();
        (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    pub(crate) async fn create(&self, who: &str, body: Value) -> (u16, Value) {
        self.ask(who, "POST", "/v1/sessions", Some(body)).await
    }

    fn listed(answer: &(u16, Value)) -> Vec<&str> {
        assert_eq!(answer.0, 200, "{answer:?}");
        answer.1["sessions"].as_array().unwrap().iter().map(|session| session["id"].as_str().unwrap()).collect()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.dir).ok();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_caller_reaches_its_own_sessions_and_no_other() {
    let served = Served::new("own").await;
    for (who, path) in
        [("", "/v1/sessions"), ("nobody", "/v1/sessions"), ("", "/v1/sessions/a"), ("nobody", "/v1/sessions/a/logs")]
    {
        let (status, said) = served.ask(who, "GET", path, None).await;
        assert!(status == 401 && said["error"].as_str().unwrap().contains("bearer token"), "{said}");
    }
    let (status, made) = served.create("shop", json!({ "template": "task", "id": "a" })).await;
    assert_eq!((status, made["tenant"].as_str(), made["owner"].as_str()), (201, Some("acme"), Some("shop")), "its only tenant");
    assert_eq!(served.create("shop", json!({ "template": "task", "id": "a" })).await.0, 200, "the same is the same");
    let (status, said) = served.create("shop", json!({ "template": "chat", "id": "a" })).await;
    assert!(status == 409 && said["error"].as_str().unwrap().contains("made from template `task`"), "{said}");
    // An id that another has is neither told of nor taken over.
    let (status, said) = served.create("bank", json!({ "template": "task", "id": "a", "tenant": "acme" })).await;
    assert!(status == 409 && said.get("phase").is_none(), "{said}");
    assert_eq!(served.create("bank", json!({ "template": "task", "id": "b", "tenant": "acme" })).await.0, 201);
    let (status, said) = served.create("bank", json!({ "template": "task", "id": "b", "tenant": "globex" })).await;
    assert!(status == 409 && said["error"].as_str().unwrap().contains("of tenant `acme`"), "{said}");
    for (method, path) in
        [("GET", ""), ("DELETE", ""), ("POST", "/pause"), ("POST", "/resume"), ("GET", "/logs"), ("GET", "/hooks")]
    {
        let mine = served.ask("bank", method, &format!("/v1/sessions/a{path}"), None).await;
        let none = served.ask("bank", method, &format!("/v1/sessions/x{path}"), None).await;
        assert_eq!((mine.0, none.0), (404, 404), "{method} {path}: what is another's is as if it were not there");
    }
    served.town.reaches("a", Phase::Ready).await;
    assert_eq!(Served::listed(&served.ask("shop", "GET", "/v1/sessions", None).await), ["a"]);
    assert_eq!(Served::listed(&served.ask("ops", "GET", "/v1/sessions", None).await), ["a", "b"]);
    assert_eq!(served.ask("ops", "DELETE", "/v1/sessions/a", None).await.0, 202);
    for wish in ["pause", "resume"] {
        let (status, _) = served.ask("shop", "POST", &format!("/v1/sessions/a/{wish}"), None).await;
        assert_eq!(status, 409, "{wish}: what is to end stays so, and nobody is told otherwise");
    }
    served.town.reaches("a", Phase::Destroyed).await;
    // Over is over: it can be seen, and ended again, and nothing else.
    assert_eq!(served.ask("shop", "GET", "/v1/sessions/a", None).await.1["phase"], "destroyed");
    assert_eq!(served.ask("shop", "POST", "/v1/sessions/a/resume", None).await.0, 409);
    assert_eq!(served.ask("shop", "GET", "/v1/sessions/a/logs", None).await.0, 409, "it is there, and has no container");
    assert_eq!(served.ask("shop", "DELETE", "/v1/sessions/a", None).await.0, 202);
    assert!(Served::listed(&served.ask("shop", "GET", "/v1/sessions", None).await).is_empty());
    assert_eq!(Served::listed(&served.ask("shop", "GET", "/v1/sessions?over=true", None).await), ["a"]);
    assert_eq!(Served::listed(&served.ask("shop", "GET", "/v1/sessions?phase=destroyed", None).await), ["a"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_wrong_is_said_and_nothing_is_created() {
    let served = Served::new("wrong").await;
    for (body, status, why) in [
        (json!({ "template": "none" }), 400, "no template `none`"),
        (json!({ "template": "task", "id": "../x" }), 400, "a session id has"),
        (json!({ "template": "task", "tenant": "globex" }), 403, "may not ask for tenant `globex`"),
        (json!({ "template": "task", "prompt": "hi" }), 400, "unknown field `prompt`"),
        (json!({ "id": "x" }), 400, "missing field `template`"),
        (json!([]), 400, ""),
    ] {
        let (said, answer) = served.create("shop", body.clone()).await;
        assert!(said == status && answer["error"].as_str().unwrap().contains(why), "{body}: {said} {answer}");
    }
    assert_eq!(served.create("bank", json!({ "template": "task" })).await.0, 400, "which of its tenants?");
    for path in ["?limit=0", "?limit=501", "?limit=x", "?phase=gone", "?after=%20", "?nothing=1"] {
        assert_eq!(served.ask("shop", "GET", &format!("/v1/sessions{path}"), None).await.0, 400, "{path}");
    }
    assert_eq!(served.ask("shop", "PUT", "/v1/sessions", None).await.0, 405);
    let (status, said) = served.ask("shop", "GET", "/v1/sessions/%ff", None).await;
    assert!(status == 404 && said["error"].as_str().unwrap().contains("there is no session"), "{status} {said}");
    assert_eq!(served.ask("shop", "GET", "/v2", None).await.0, 404);
    let large = served.client.post(format!("{}/v1/sessions", served.url)).bearer_auth("shop".repeat(12));
    let large = large.json(&json!({ "template": "x".repeat(100_000) })).send().await.unwrap();
    // What is not read to its end has nothing behind it.
    assert_eq!((large.status().as_u16(), large.headers()["connection"].to_str().unwrap()), (413, "close"));
    assert_eq!(served.create("bank", json!({ "template": "task", "id": "one", "tenant": "globex" })).await.0, 201);
    let (status, said) = served.create("bank", json!({ "template": "task", "id": "two", "tenant": "globex" })).await;
    assert!(status == 429 && said["error"].as_str().unwrap().contains("has 1 sessions"), "{said}");
    served.town.reaches("one", Phase::Ready).await;
    assert_eq!(served.ask("bank", "GET", "/v1/sessions/one/logs", None).await.0, 501, "this provider keeps none");
    assert_eq!(served.town.cloud.created.lock().unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_tells_what_it_is_and_what_it_counts() {
    let served = Served::new("tells").await;
    served.create("bank", json!({ "template": "task", "id": "a", "tenant": "globex" })).await;
    served.town.reaches("a", Phase::Ready).await;
    // It may have one.
    assert_eq!(served.create("bank", json!({ "template": "task", "id": "b", "tenant": "globex" })).await.0, 429);
    for path in ["/livez", "/readyz"] {
        assert_eq!(served.ask("", "GET", path, None).await.0, 200, "{path}");
    }
    let lines = [
        "agent_fleet_sessions{phase=\"ready\",provider=\"cloud\",tenant=\"globex\"} 1",
        "agent_fleet_phases_entered_total{phase=\"ready\",provider=\"cloud\"} 1",
        "agent_fleet_phases_entered_total{phase=\"failed\",provider=\"cloud\"} 0",
        "agent_fleet_phase_duration_seconds_count{phase=\"starting\",provider=\"cloud\"} 1",
        "agent_fleet_phase_oldest_seconds{phase=\"creating\",provider=\"cloud\"} 0",
        "agent_fleet_ready_seconds_count{provider=\"cloud\"} 1",
        "agent_fleet_actions_total{action=\"create\",provider=\"cloud\",outcome=\"ok\"} 1",
        "agent_fleet_actions_total{action=\"create\",provider=\"cloud\",outcome=\"busy\"} 0",
        "agent_fleet_refusals_total{reason=\"full\",tenant=\"globex\"} 1",
        "agent_fleet_orphans_removed_total{provider=\"cloud\"} 0",
        "agent_fleet_agent_cost_usd_total{provider=\"cloud\",tenant=\"globex\"} 0.5",
        "agent_fleet_store_duration_seconds_count{operation=\"insert\"} 1",
    ];
    // The store has a phase before it is counted.
    let mut metrics = String::new();
    for _ in 0..3000 {
        served.ask("", "GET", "/metrics", None).await.1.as_str().unwrap().clone_into(&mut metrics);
        if lines.iter().all(|line| metrics.lines().any(|found| found == *line)) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    for line in lines {
        assert!(metrics.lines().any(|found| found == line), "{line}\n{metrics}");
    }
    // What is told is what the catalogue says: names, kinds, and labels, and nothing beside.
    let heads: Vec<String> = metrics.lines().filter_map(|line| line.strip_prefix("# TYPE ")).map(str::to_owned).collect();
    let kind = |metric: &Metric| if metric.kind == Kind::Info { Kind::Gauge } else { metric.kind };
    let listed: Vec<String> = CATALOG.iter().map(|metric| format!("{} {}", metric.name, kind(metric).as_str())).collect();
    assert_eq!(heads, listed);
    for line in metrics.lines().filter(|line| !line.starts_with('#')) {
        let name = line.split(['{', ' ']).next().unwrap();
        let of = |metric: &&&Metric| match metric.kind {
            Kind::Histogram => ["_bucket", "_sum", "_count"].iter().any(|end| name.strip_suffix(end) == Some(metric.name)),
            Kind::Counter | Kind::Gauge | Kind::Info => name == metric.name,
        };
        let metric = CATALOG.iter().find(of).unwrap_or_else(|| panic!("{line} is in no catalogue"));
        let labels: Vec<&str> = line.split("=\"").map(|part| part.rsplit(['{', ',']).next().unwrap()).collect();
        let labels: Vec<&str> = labels[..labels.len() - 1].iter().copied().filter(|label| *label != "le").collect();
        assert_eq!(labels, metric.labels, "{line}");
    }
    let (_, document) = served.ask("", "GET", "/openapi.json", None).await;
    let paths: Vec<&String> = document["paths"].as_object().unwrap().keys().collect();
    // What it says of phases is what there is.
    let asked = document["paths"]["/v1/sessions"]["get"]["parameters"].as_array().unwrap();
    let phase = asked.iter().find(|asked| asked["name"] == "phase").unwrap()["schema"]["pattern"].as_str().unwrap();
    let phases: Vec<&str> = Phase::ALL.iter().map(|phase| phase.as_str()).collect();
    assert_eq!(phase, format!("^({})$", phases.join("|")));
    for path in ["/v1/sessions", "/v1/sessions/{id}", "/v1/sessions/{id}/pause", "/v1/sessions/{id}/hooks", "/metrics"] {
        assert!(paths.iter().any(|found| *found == path), "{path}: {paths:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_is_drained_by_its_name() {
    let served = Served::new("drain").await;
    let (all, one) = ("/v1/providers/cloud/drain", "/v1/providers/cloud/nodes/n1/drain");
    let seconds = |n: u64| Some(json!({ "seconds": n }));
    // This provider has none yet.
    let (status, said) = served.ask("ops", "POST", one, seconds(60)).await;
    assert!(status == 422 && said["error"].as_str().unwrap().contains("`agent-fleet drain cloud` empties all of it"), "{said}");
    assert_eq!(served.ask("ops", "GET", one, None).await.0, 422);
    *served.town.cloud.nodes.lock().unwrap() = vec![String::from("n1"), String::from("n2")];
    for (who, path, method, body, status) in [
        ("", one, "GET", None, 401),
        ("shop", one, "GET", None, 403),
        ("shop", one, "POST", seconds(60), 403),
        ("shop", one, "DELETE", None, 403),
        ("ops", "/v1/providers/nowhere/nodes/n1/drain", "POST", seconds(60), 404),
        ("ops", "/v1/providers/cloud/nodes/N1/drain", "POST", seconds(60), 400),
        ("ops", "/v1/providers/cloud/nodes/n1%2fx/drain", "GET", None, 400),
        ("ops", "/v1/providers/cloud/nodes/%ff/drain", "GET", None, 404),
        ("ops", one, "POST", seconds(604_801), 400),
        ("ops", one, "POST", Some(json!({ "hours": 1 })), 400),
    ] {
        let (is, said) = served.ask(who, method, path, body).await;
        assert!(is == status && said["error"].is_string(), "{who} {method} {path}: {is} {said}");
    }
    *served.town.words.0.lock().unwrap() = Some((true, 0.0));
    for id in ["a", "b"] {
        served.create("shop", json!({ "template": "chat", "id": id })).await;
        served.town.reaches(id, Phase::Active).await;
    }
    let node = async |id: &str| served.ask("shop", "GET", &format!("/v1/sessions/{id}"), None).await.1["node"].clone();
    let here = if node("a").await == "n1" { "a" } else { "b" };
    let (status, begun) = served.ask("ops", "POST", one, seconds(3600)).await;
    assert_eq!(
        (status, &begun["left"], &begun["asleep"], &begun["sessions"]),
        (202, &json!(1), &json!(0), &json!([here])),
        "{begun}"
    );
    assert!(begun["until"].is_string());
    assert_eq!(served.ask("ops", "GET", one, None).await.1, begun);
    let (_, whole) = served.ask("ops", "GET", all, None).await;
    assert_eq!((&whole["until"], &whole["left"]), (&Value::Null, &json!(2)), "the other goes on, and sessions are made");
    assert_eq!(served.create("shop", json!({ "template": "chat", "id": "c" })).await.0, 201);
    served.town.reaches("c", Phase::Active).await;
    assert_eq!(node("c").await, "n2");
    let (_, metrics) = served.ask("", "GET", "/metrics", None).await;
    for line in [
        "agent_fleet_drains{provider=\"cloud\",scope=\"node\"} 1",
        "agent_fleet_drains{provider=\"cloud\",scope=\"provider\"} 0",
        "agent_fleet_disruptions_total{provider=\"cloud\"} 0",
    ] {
        assert!(metrics.as_str().unwrap().lines().any(|found| found == line), "{line}\n{metrics}");
    }
    let (status, ended) = served.ask("ops", "DELETE", one, None).await;
    assert_eq!((status, &ended["until"]), (200, &Value::Null));
    let (_, document) = served.ask("", "GET", "/openapi.json", None).await;
    let path = &document["paths"]["/v1/providers/{name}/nodes/{node}/drain"];
    assert!(["get", "post", "delete"].iter().all(|method| path[*method].is_object()), "{path}");
    let names: Vec<&Value> = path["post"]["parameters"].as_array().unwrap().iter().map(|one| &one["name"]).collect();
    assert_eq!(names, ["name", "node"]);
}

/// What comes in an answer that does not end, until it has come.
async fn read_until(answer: &mut reqwest::Response, so: impl Fn(&str) -> bool) -> String {
    let mut text = String::new();
    let reading = async {
        while !so(&text) {
            let piece = answer.chunk().await.unwrap().unwrap_or_else(|| panic!("it has ended: {text}"));
            text.push_str(std::str::from_utf8(&piece).unwrap());
        }
    };
    let done = tokio::time::timeout(Duration::from_secs(60), reading).await;
    done.unwrap_or_else(|_| panic!("waited in vain"));
    text
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_listens_hears_of_its_own_sessions_and_misses_nothing_while_it_was_away() {
    let served = Served::new("events").await;
    let listen = async |who: &str, last: Option<&str>| {
        let request = served.client.get(format!("{}/v1/events", served.url)).bearer_auth(who.repeat(12));
        last.into_iter().fold(request, |request, last| request.header("last-event-id", last)).send().await.unwrap()
    };
    assert_eq!(listen("nobody", None).await.status(), 401);
    assert_eq!(listen("shop", Some("not a number")).await.status(), 400);
    let mut shop = listen("shop", None).await;
    assert_eq!(shop.status(), 200);
    served.create("shop", json!({ "template": "task", "id": "a" })).await;
    served.create("bank", json!({ "template": "task", "id": "b", "tenant": "acme" })).await;
    served.town.reaches("a", Phase::Ready).await;
    served.town.reaches("b", Phase::Ready).await;
    let text = read_until(&mut shop, |text| text.contains("\"phase\":\"ready\"")).await;
    assert!(text.contains("event: phase") && text.contains("\"id\":\"a\"") && !text.contains("\"id\":\"b\""), "{text}");
    let last = text.lines().filter_map(|line| line.strip_prefix("id: ")).next_back().unwrap().to_owned();
    drop(shop);
    // Nobody listens while it ends.
    served.ask("shop", "DELETE", "/v1/sessions/a", None).await;
    served.town.reaches("a", Phase::Destroyed).await;
    let mut again = listen("shop", Some(&last)).await;
    let text = read_until(&mut again, |text| text.contains("\"phase\":\"destroyed\"")).await;
    assert!(text.contains("event: phase"), "{text}");
    // An admin hears of all.
    let mut ops = listen("ops", None).await;
    served.ask("bank", "DELETE", "/v1/sessions/b", None).await;
    read_until(&mut ops, |text| text.contains("\"id\":\"b\"") && text.contains("\"phase\":\"destroyed\"")).await;
    // A fleet that ends does not wait for who listens.
    served.running.end.send(true).unwrap();
    let rest = async { while ops.chunk().await.unwrap().is_some() {} };
    tokio::time::timeout(Duration::from_secs(60), rest).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_hook_was_told_in_vain_is_told_again() {
    use agent_fleet::config::Elsewhere;
    use agent_fleet::hook::{Act, Hook, Hooks, Runner};

    let file = std::env::temp_dir().join(format!("agent-fleet-{}-letters", std::process::id()));
    let script = format!("cat >> {0}.told; test -e {0}", file.display());
    let act = Act::Command { argv: ["/bin/sh", "-c", &script].map(String::from).to_vec(), pass: vec![] };
    let (name, timeout) = (String::from("tell"), Duration::from_secs(60));
    let hook = Hook { name, on: vec![Phase::Ready], templates: vec![], act, timeout, retries: 0, required: false, veto: false };
    let served = Served::with("letters", |town| {
        let hooks = Hooks::new("town", vec![hook], Arc::new(Elsewhere)).unwrap();
        town.fleet_with(Arc::new(Runner { hooks, store: Arc::clone(&town.store) }))
    })
    .await;
    served.create("shop", json!({ "template": "task", "id": "a" })).await;
    served.create("bank", json!({ "template": "task", "id": "b", "tenant": "acme" })).await;
    let letters = async |who: &str| {
        let (status, letters) = served.ask(who, "GET", "/v1/dead-letters", None).await;
        assert_eq!(status, 200, "{letters}");
        letters.as_array().unwrap().clone()
    };
    for _ in 0..3000 {
        if letters("ops").await.len() == 2 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let mine = letters("shop").await;
    assert_eq!((mine.len(), letters("ops").await.len()), (1, 2), "each sees its own");
    assert_eq!((mine[0]["session"].as_str(), mine[0]["outcome"].as_str()), (Some("a"), Some("dead-letter")));
    let again = async |who: &str, id: &str, body: Value| {
        served.ask(who, "POST", &format!("/v1/sessions/{id}/redeliver"), Some(body)).await
    };
    assert_eq!(again("shop", "b", json!({})).await.0, 404, "another's is as if it were not there");
    assert_eq!(again("shop", "a", json!({ "key": "no such" })).await.0, 404);
    assert_eq!(again("shop", "a", json!({ "kee": "no such" })).await.0, 400);
    let (_, told) = again("shop", "a", json!({})).await;
    assert_eq!(told[0]["outcome"], "dead-letter", "in vain once more");
    std::fs::write(&file, "").unwrap();
    let (status, told) = again("shop", "a", json!({ "key": mine[0]["key"] })).await;
    assert_eq!((status, told[0]["outcome"].as_str(), told[0]["event"].is_null()), (200, Some("ok"), true));
    assert_eq!((letters("shop").await.len(), letters("ops").await.len()), (0, 1));
    let heard = std::fs::read_to_string(format!("{}.told", file.display())).unwrap();
    let event = mine[0]["event"].as_str().unwrap();
    assert_eq!(heard.matches(event).count(), 3, "each time the same: {heard}");
    let (_, metrics) = served.ask("", "GET", "/metrics", None).await;
    let line = "agent_fleet_hook_runs_total{hook=\"tell\",outcome=\"ok\"} 1";
    assert!(metrics.as_str().unwrap().lines().any(|found| found == line), "{metrics}");
    std::fs::remove_file(format!("{}.told", file.display())).unwrap();
    std::fs::remove_file(file).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_page_loads_nothing_from_elsewhere_and_tells_nothing() {
    let served = Served::new("page").await;
    for (path, kind) in [("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript")] {
        let answer = served.client.get(format!("{}{path}", served.url)).send().await.unwrap();
        let header = |name: &str| answer.headers().get(name).map(|value| value.to_str().unwrap().to_owned()).unwrap_or_default();
        assert!(answer.status() == 200 && header("content-type").starts_with(kind), "{path}");
        let policy = header("content-security-policy");
        assert!(
            policy.starts_with("default-src 'none'; script-src 'self';") && policy.contains("frame-ancestors 'none'"),
            "{policy}"
        );
        assert_eq!((header("x-content-type-options").as_str(), header("set-cookie").as_str()), ("nosniff", ""));
        let text = answer.text().await.unwrap();
        assert!(
            !text.contains("http://") && !text.contains("https://") && !text.contains("//cdn") && !text.contains("innerHTML"),
            "{path}"
        );
    }
}
