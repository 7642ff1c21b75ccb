use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use agent_fleet::drain::Where;
use agent_fleet::hook::Verdict;
use agent_fleet::inside::Inside;
use agent_fleet::lifecycle::Phase;
use agent_fleet::metric::Metrics;
use agent_fleet::plan::{PauseBy, Policy};
use agent_fleet::provider::kubernetes::{Kubernetes, Settings};
use agent_fleet::provider::{
    Endpoint, Error, Exec, FLEET_LABEL, KEY_LABEL, Provider, SESSION_LABEL, Sandbox, Secret, Size, Spec, State,
};
use agent_fleet::service::{Fleet, Hooks, Policies};
use agent_fleet::session::{Pattern, Report, Session, Wanted};
use agent_fleet::store::{self, Store};
use async_trait::async_trait;
use futures_util::StreamExt;
use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::conformance::{self, Call, Does, Fault, World};
use crate::fakes::{self, Fake, TOKEN};
use crate::{sh, spec};

struct Cluster {
    fake: Fake<fakes::kubernetes::Kubernetes>,
    kubeconfig: PathBuf,
    provider: Kubernetes,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        drop(std::fs::remove_file(&self.kubeconfig));
    }
}

impl Cluster {
    async fn new(more: Value) -> Self {
        let made = fakes::kubernetes::Kubernetes::new().await;
        let fake = Fake::serve(|_| made).await;
        let kubeconfig = std::env::temp_dir().join(format!("agent-fleet-{}", uuid::Uuid::now_v7()));
        write(&kubeconfig, &fake.address, TOKEN);
        let mut settings = json!({ "kubeconfig": kubeconfig, "context": "here" });
        settings.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let settings: Settings = serde_json::from_value(settings).unwrap();
        let provider = Kubernetes::new(settings).unwrap();
        Self { fake, kubeconfig, provider }
    }

    async fn becomes(&self, native: &str, like: impl Fn(&Sandbox) -> bool) -> Sandbox {
        let began = Instant::now();
        loop {
            let now = self.provider.state(native).await.unwrap();
            if like(&now) {
                return now;
            }
            assert!(began.elapsed() < Duration::from_secs(60), "{now:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

fn write(path: &Path, server: &str, token: &str) {
    let namespace = fakes::kubernetes::NAMESPACE;
    let text = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: elsewhere\nclusters: [{{name: c, cluster: {{server: '{server}'}}}}]\n\
         users: [{{name: u, user: {{token: {token}}}}}]\ncontexts: [{{name: here, context: {{cluster: c, user: u, namespace: {namespace}}}}}]\n"
    );
    std::fs::write(path, text).unwrap();
}

fn sandboxes() -> Value {
    json!({ "backend": "sandbox", "keep": { "/data": "10Gi" }, "group": 1000 })
}

/// What is installed in a cluster that claims are made in: templates by what their containers do, and a pool of each.
fn install(world: &Cluster) {
    let api = "extensions.agents.x-k8s.io/v1beta1";
    let ignores = crate::command(Does::Ignore).unwrap();
    let waits = crate::command(Does::Wait).unwrap();
    let exits = |code: u8| sh(&format!("echo exits with {code}; exit {code}"));
    // One of those that only wait is there before.
    for (name, command, replicas) in
        [("waits", waits, 1), ("ignores", ignores, 0), ("exits-0", exits(0), 0), ("exits-3", exits(3), 0)]
    {
        // Its container is not called as ours are.
        let container = json!({"name": "theirs", "image": "base", "command": command,
            "resources": {"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": "1", "memory": "1Gi"}}});
        // Most do not say what is to become of what has ended, and kubelet begins it anew.
        let policy = if name == "exits-3" { "Never" } else { "Always" };
        world.fake.api.put(
            "sandboxtemplates",
            json!({"apiVersion": api, "kind": "SandboxTemplate", "metadata": {"name": name},
            "spec": {"podTemplate": {"metadata": {}, "spec": {"restartPolicy": policy, "containers": [container]}}}}),
        );
        world.fake.api.put(
            "sandboxwarmpools",
            json!({"apiVersion": api, "kind": "SandboxWarmPool", "metadata": {"name": format!("{name}-pool")},
            "spec": {"replicas": replicas, "sandboxTemplateRef": {"name": name}}}),
        );
    }
}

fn claimed(key: &str, template: &str) -> Spec {
    Spec { image: template.to_owned(), command: Vec::new(), ..fleets(key) }
}

/// A cluster whose containers are claimed.
struct Claims(Cluster);

#[async_trait]
impl World for Claims {
    fn spec(&self, does: Does) -> Option<Spec> {
        let template = match does {
            Does::Wait | Does::Serve(_) => String::from("waits"),
            Does::Ignore => String::from("ignores"),
            Does::Exit(code) => format!("exits-{code}"),
        };
        Some(Spec { image: template, ..spec("") })
    }

    fn price_usd(&self) -> f64 {
        self.0.price_usd()
    }

    fn page(&self) -> Option<usize> {
        self.0.page()
    }

    fn arm(&self, call: Call, fault: Fault) -> bool {
        self.0.arm(call, fault)
    }

    fn armed(&self) -> usize {
        self.0.armed()
    }

    async fn count(&self, key: &str) -> usize {
        self.0.count(key).await
    }
}

#[async_trait]
impl World for Cluster {
    fn spec(&self, does: Does) -> Option<Spec> {
        let command = match does {
            Does::Exit(code) => sh(&format!("echo exits with {code}; exit {code}")),
            other => crate::command(other)?,
        };
        Some(Spec { command, ..spec("") })
    }

    fn price_usd(&self) -> f64 {
        0.031611 + 0.004237
    }

    fn page(&self) -> Option<usize> {
        Some(fakes::kubernetes::PAGE)
    }

    fn arm(&self, call: Call, fault: Fault) -> bool {
        self.fake.arm(call, fault);
        true
    }

    fn armed(&self) -> usize {
        self.fake.armed()
    }

    async fn count(&self, key: &str) -> usize {
        self.fake.api.count(key)
    }
}

impl Cluster {
    /// A secret goes with what it is for, but not at once: the cluster collects it.
    async fn secrets_are_gone(&self) {
        let began = Instant::now();
        while !self.fake.api.secrets().is_empty() {
            assert!(
                began.elapsed() < Duration::from_secs(60),
                "a secret has outlived what it was for: {:?}",
                self.fake.api.secrets()
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

#[tokio::test]
async fn pods_do_what_every_provider_must() {
    let world = Cluster::new(json!({})).await;
    conformance::run(&world.provider, &world).await;
    assert_eq!(world.fake.wrong(), Vec::<String>::new());
    world.secrets_are_gone().await;
}

#[tokio::test]
async fn jobs_do_what_every_provider_must() {
    let world = Cluster::new(json!({ "backend": "job" })).await;
    conformance::run(&world.provider, &world).await;
    assert_eq!(world.fake.wrong(), Vec::<String>::new());
    // The last of them are still ending.
    let began = Instant::now();
    let left = || ["jobs", "pods", "secrets"].map(|kind| world.fake.api.names(kind)).concat();
    while !left().is_empty() {
        assert!(began.elapsed() < Duration::from_secs(60), "they have outlived their Jobs: {:?}", left());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // All that is granted for it is needed.
    assert_eq!(world.fake.api.unused(&["jobs"]), vec![]);
    assert!(
        !world.fake.seen().iter().any(|what| what.starts_with("POST") && what.ends_with("/pods")),
        "its controller makes them"
    );
}

#[tokio::test]
async fn sandboxes_do_what_every_provider_must() {
    let world = Cluster::new(sandboxes()).await;
    conformance::run(&world.provider, &world).await;
    assert_eq!(world.fake.wrong(), Vec::<String>::new());
    world.secrets_are_gone().await;
}

#[tokio::test]
async fn one_that_is_there_is_what_its_pod_says_before_its_controller_does() {
    let world = Cluster::new(sandboxes()).await;
    world.fake.api.fall_behind();
    let native = world.provider.create(&fleets("agent-1")).await.unwrap().native;
    world.becomes(&native, |now| now.state == State::Running).await;
    assert_eq!(world.provider.create(&fleets("agent-1")).await.unwrap().state, State::Running);
    assert_eq!(world.fake.wrong(), Vec::<String>::new());
}

#[tokio::test]
async fn claims_do_what_every_provider_must() {
    let world = Claims(Cluster::new(json!({ "backend": "claim" })).await);
    install(&world.0);
    conformance::run(&world.0.provider, &world).await;
    assert_eq!(world.0.fake.wrong(), Vec::<String>::new());
    // All that is granted for it is needed.
    assert_eq!(world.0.fake.api.unused(&["sandboxclaims", "sandboxwarmpools", "sandboxtemplates"]), vec![]);
    let seen = world.0.fake.seen();
    let made = seen.iter().filter(|what| what.starts_with("POST") && !what.ends_with("/sandboxclaims"));
    assert_eq!(made.collect::<Vec<_>>(), Vec::<&String>::new(), "it makes nothing but claims");
    assert!(!seen.iter().any(|what| what.starts_with("PATCH")), "it changes nothing");
}

#[tokio::test]
async fn a_claim_has_what_waited_and_what_it_needs_is_asked_for_before() {
    let world = Cluster::new(json!({ "backend": "claim" })).await;
    install(&world);
    let began = Instant::now();
    let warm = loop {
        let there: Vec<String> = world.fake.api.names("sandboxes");
        if let Some(warm) = there
            .first()
            .filter(|name| world.fake.api.object("pods", name).is_some_and(|pod| pod["status"]["phase"] == "Running"))
        {
            break warm.clone();
        }
        assert!(began.elapsed() < Duration::from_secs(60), "nothing is warm: {there:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    // What it did while it waited is nobody's.
    world.fake.api.restarted(&warm, "2026-01-01T00:00:00Z");
    let native = world.provider.create(&claimed("agent-1", "waits")).await.unwrap().native;
    assert_eq!(native, "agent-1", "it is known by the claim");
    let up = world.becomes(&native, |now| now.state == State::Running).await;
    assert_eq!(
        (up.labels.get(SESSION_LABEL).map(String::as_str), up.size.map(|size| size.memory_mib)),
        (Some("0199-x"), Some(1024))
    );
    assert_eq!(
        sent(&world, "POST /apis/extensions.agents.x-k8s.io/v1beta1/namespaces/agents/sandboxclaims")["spec"]["warmPoolRef"],
        json!({"name": "waits-pool"})
    );
    is_kept("claim", sent(&world, "POST /apis/extensions.agents.x-k8s.io/v1beta1/namespaces/agents/sandboxclaims"));
    let has = world.fake.api.object("sandboxclaims", "agent-1").unwrap()["status"]["sandbox"]["name"].clone();
    assert_eq!(has, json!(warm), "what waited is what it has");
    conformance::serves(&world.provider.endpoint(&native, 8080).await.unwrap()).await;
    world.provider.delete(&native).await.unwrap();
    world.becomes(&native, |now| now.state.is_gone()).await;
    assert!(world.fake.api.object("pods", &warm).is_none() && world.fake.api.object("sandboxes", &warm).is_none());

    let refused = |spec: Spec| {
        let provider = &world.provider;
        async move {
            match provider.create(&spec).await {
                Err(Error::Refused { what, .. }) => what,
                other => panic!("{other:?}"),
            }
        }
    };
    assert!(refused(claimed("agent-2", "nowhere")).await.contains("no SandboxWarmPool of the template `nowhere`"));
    let api = "extensions.agents.x-k8s.io/v1beta1";
    world.fake.api.put(
        "sandboxwarmpools",
        json!({"apiVersion": api, "kind": "SandboxWarmPool", "metadata": {"name": "empty"},
        "spec": {"replicas": 0, "sandboxTemplateRef": {"name": "gone"}}}),
    );
    assert!(refused(claimed("agent-2", "gone")).await.contains("no SandboxTemplate `gone`"));
    assert!(refused(Spec { command: sh("true"), ..claimed("agent-2", "waits") }).await.contains("`command`"));
    let env = BTreeMap::from([(String::from("A"), String::from("b"))]);
    assert!(refused(Spec { env, ..claimed("agent-2", "waits") }).await.contains("environment"));
    let size = Size { cpu_milli: 4000, ..Size::default() };
    assert!(refused(Spec { size, ..claimed("agent-2", "waits") }).await.contains("`size`"));
    assert_eq!(world.fake.api.count("agent-2"), 0);

    // By the pool's name.
    let named = Cluster::new(json!({ "backend": "claim", "warm_pool": "ignores-pool" })).await;
    install(&named);
    let other = named.provider.create(&claimed("agent-1", "waits")).await.unwrap_err().to_string();
    assert!(other.contains("`ignores-pool` is of the template `ignores`, not of `waits`"), "{other}");
    named.provider.create(&claimed("agent-1", "ignores")).await.unwrap();
    named.becomes("agent-1", |now| now.state == State::Running).await;
    let none = Cluster::new(json!({ "backend": "claim", "warm_pool": "x" })).await;
    let none = none.provider.create(&claimed("agent-1", "waits")).await.unwrap_err().to_string();
    assert!(none.contains("no SandboxWarmPool `x`"), "{none}");
}

#[tokio::test]
async fn a_claim_whose_pool_goes_says_why_and_one_whose_time_is_over_goes() {
    let world = Cluster::new(json!({ "backend": "claim" })).await;
    install(&world);
    world.fake.api.lose("sandboxtemplates", "ignores");
    // It was there when it was asked for: the controller is the one who says that it is gone.
    world.fake.api.put(
        "sandboxclaims",
        json!({"apiVersion": "extensions.agents.x-k8s.io/v1beta1", "kind": "SandboxClaim", "metadata": {"name": "agent-1"},
        "spec": {"warmPoolRef": {"name": "ignores-pool"}, "lifecycle": {"shutdownTime": "2999-01-01T00:00:00Z"}}}),
    );
    let waits = world.becomes("agent-1", |now| now.reason.is_some()).await;
    assert_eq!((waits.state, waits.reason.as_deref()), (State::Creating, Some("TemplateNotFound")));
    let short = Spec { ttl: Duration::from_secs(1), ..claimed("agent-2", "waits") };
    world.provider.create(&short).await.unwrap();
    world.becomes("agent-2", |now| now.state.is_gone()).await;
}

fn fleets(key: &str) -> Spec {
    let labels = [(FLEET_LABEL, "prod"), (SESSION_LABEL, "0199-x"), ("team", "a&b=c d")];
    let labels = labels.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    Spec { labels, ttl: Duration::from_secs(7200), command: sh("sleep 1000"), ..spec(key) }
}

fn secret(content: &str) -> (PathBuf, Secret) {
    let path = std::env::temp_dir().join(format!("agent-fleet-{}", uuid::Uuid::now_v7()));
    std::fs::write(&path, content).unwrap();
    (path.clone(), Secret::File(path))
}

/// What is kept in tests/manifests, where the API's own schemas judge it.
fn is_kept(name: &str, mut object: Value) {
    fn settle(value: &mut Value) {
        match value {
            // What is another one each time.
            Value::Object(members) => {
                for (name, value) in members.iter_mut() {
                    match name.as_str() {
                        "uid" => *value = json!("00000000-0000-0000-0000-000000000000"),
                        "shutdownTime" => *value = json!("2026-11-27T00:00:00Z"),
                        "name" if value.as_str().is_some_and(|name| name.len() == "agent-1-".len() + 12) => {
                            *value = json!("agent-1-0123456789ab")
                        }
                        _ => settle(value),
                    }
                }
            }
            Value::Array(items) => items.iter_mut().for_each(settle),
            _ => {}
        }
    }
    settle(&mut object);
    let text = serde_json::to_string_pretty(&object).unwrap() + "\n";
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/manifests").join(format!("{name}.json"));
    if std::env::var_os("AGENT_FLEET_WRITE_MANIFESTS").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    let kept = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(kept == text, "{} is not what is made now; write it with AGENT_FLEET_WRITE_MANIFESTS=1:\n{text}", path.display());
}

/// As it was sent, by its kind.
fn sent(world: &Cluster, path: &str) -> Value {
    world
        .fake
        .bodies()
        .into_iter()
        .rfind(|(what, _)| what == path)
        .map(|(_, body)| serde_json::from_slice(&body).unwrap())
        .unwrap()
}

#[tokio::test]
async fn what_is_made_is_written_down_and_safe() {
    let (path, token) = secret("s3cret");
    let theirs = Secret::Provider(String::from("theirs/key"));
    let secrets = BTreeMap::from([(String::from("TOKEN"), token), (String::from("THEIRS"), theirs)]);
    let env = BTreeMap::from([(String::from("COSTS"), String::from("$5 $(HOME)"))]);
    let asked = Spec { secrets, env, ports: vec![8080, 9477], ..fleets("agent-1") };
    let pods = "POST /api/v1/namespaces/agents/pods";

    let world = Cluster::new(json!({})).await;
    world.provider.create(&asked).await.unwrap();
    let pod = sent(&world, pods);
    let (whole, agent) = (&pod["spec"], &pod["spec"]["containers"][0]);
    assert_eq!(whole["automountServiceAccountToken"], false);
    assert_eq!(whole["securityContext"], json!({"runAsNonRoot": true, "seccompProfile": {"type": "RuntimeDefault"}}));
    assert_eq!(
        agent["securityContext"],
        json!({"allowPrivilegeEscalation": false, "readOnlyRootFilesystem": false, "capabilities": {"drop": ["ALL"]}})
    );
    assert_eq!(agent["resources"]["requests"], agent["resources"]["limits"]);
    assert_eq!((&whole["restartPolicy"], &whole["activeDeadlineSeconds"]), (&json!("Never"), &json!(7200)));
    assert!(!pod.to_string().contains("s3cret"));
    let held = sent(&world, "POST /api/v1/namespaces/agents/secrets");
    assert_eq!(held["stringData"], json!({"TOKEN": "s3cret"}));
    let made = world.fake.api.object("pods", "agent-1").unwrap();
    assert_eq!(held["metadata"]["ownerReferences"][0]["uid"], made["metadata"]["uid"]);
    is_kept("pod", pod);
    is_kept("secret", held);
    assert_eq!(world.fake.wrong(), Vec::<String>::new());

    // In a cluster where a node is drained.
    let asked = Spec { avoid: vec![String::from("node-9")], ..asked };
    let every = json!({
        "affinity": { "nodeAffinity": { "requiredDuringSchedulingIgnoredDuringExecution": { "nodeSelectorTerms": [
            { "matchExpressions": [{ "key": "topology.kubernetes.io/zone", "operator": "In", "values": ["a"] }] } ] } } },
        "service_account": "agent", "runtime_class": "gvisor", "priority_class": "batch", "node_selector": { "pool": "agents" },
        "tolerations": [{ "key": "agents", "value": "yes", "effect": "NoSchedule" }, { "key": "spot", "effect": "NoExecute", "seconds": 60 }],
        "pull_secrets": ["registry"], "pull": "IfNotPresent", "annotations": { "example.com/owner": "somebody" }, "user": 1000, "group": 1000,
        "cap_add": ["NET_BIND_SERVICE"], "read_only": true, "writable": ["/tmp", "/home/agent"], "sidecar_image": "registry.example/agent-sidecar:1",
    });
    let world = Cluster::new(every).await;
    world.provider.create(&asked).await.unwrap();
    is_kept("pod-with-everything", sent(&world, pods));
    let asked = Spec { avoid: vec![], ..asked };
    let price = world.provider.price(Size::default());
    assert!((price.running - (1.1 * 0.031611 + 1.0625 * 0.004237)).abs() < 1e-9, "the sidecar has its price: {price:?}");

    let world = Cluster::new(sandboxes()).await;
    world.provider.create(&asked).await.unwrap();
    is_kept("sandbox", sent(&world, "POST /apis/agents.x-k8s.io/v1beta1/namespaces/agents/sandboxes"));
    assert_eq!(world.fake.wrong(), Vec::<String>::new());

    let more =
        json!({ "backend": "job", "finished_seconds": 600, "sidecar_image": "registry.example/agent-sidecar:1", "user": 1000 });
    let mut asked = asked;
    asked.env.insert(String::from("AGENT_SIDECAR_FLEET_URL"), String::from("http://fleet:9490"));
    asked.secrets.insert(String::from("AGENT_SIDECAR_FLEET_TOKEN"), Secret::File(path.clone()));
    let world = Cluster::new(more).await;
    world.provider.create(&asked).await.unwrap();
    let job = sent(&world, "POST /apis/batch/v1/namespaces/agents/jobs");
    let (spec, pod) = (&job["spec"], &job["spec"]["template"]["spec"]);
    assert_eq!((&spec["backoffLimit"], &spec["ttlSecondsAfterFinished"]), (&json!(0), &json!(600)));
    assert_eq!((&spec["activeDeadlineSeconds"], &pod["activeDeadlineSeconds"]), (&json!(7200), &json!(7200)));
    assert_eq!((&spec["podReplacementPolicy"], &pod["restartPolicy"]), (&json!("Failed"), &json!("Never")));
    assert_eq!(spec["template"]["metadata"]["labels"], job["metadata"]["labels"], "its pod is found by them, too");
    let hub = &pod["initContainers"][0];
    assert_eq!(
        (&hub["restartPolicy"], &hub["args"][0]),
        (&json!("Always"), &json!("hub")),
        "it ends by itself when the agent has"
    );
    assert!(hub["startupProbe"].is_object() && hub["livenessProbe"].is_object());
    // What the fleet tells a sidecar the one that serves is told, and nothing else of the agent's.
    let names: Vec<&str> = hub["env"].as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["AGENT_SIDECAR_FLEET_URL", "AGENT_SIDECAR_FLEET_TOKEN"]);
    assert!(hub["env"][1]["valueFrom"]["secretKeyRef"].is_object());
    // Both see the one socket, and what the agent writes.
    let mounts = |container: &Value| container["volumeMounts"].as_array().unwrap().clone();
    let run = json!({"name": "sidecar", "mountPath": "/run/agent-sidecar"});
    assert!(mounts(hub).contains(&run) && mounts(hub).len() == 2, "{hub}");
    assert_eq!(mounts(hub), mounts(&pod["containers"][0]));
    let held = sent(&world, "POST /api/v1/namespaces/agents/secrets");
    let made = world.fake.api.object("jobs", "agent-1").unwrap();
    let owner = json!([{"apiVersion": "batch/v1", "kind": "Job", "name": "agent-1", "uid": made["metadata"]["uid"]}]);
    assert_eq!(held["metadata"]["ownerReferences"], owner);
    is_kept("job", job);
    assert_eq!(world.fake.wrong(), Vec::<String>::new());
    std::fs::remove_file(path).unwrap();
}

/// What a Job's controller does when nobody of ours is there.
#[tokio::test]
async fn a_job_has_one_pod_and_neither_outlives_the_other() {
    let jobs = || json!({ "backend": "job" });
    let shared = BTreeMap::from([(FLEET_LABEL.to_owned(), String::from("prod"))]);
    let world = Cluster::new(jobs()).await;
    let native = world.provider.create(&fleets("agent-1")).await.unwrap().native;
    let up = world.becomes(&native, |now| now.state == State::Running).await;
    let left = up.deadline.unwrap().duration_since(up.created.unwrap());
    assert!((7198..=7202).contains(&left.as_secs()), "{left}");
    let pod = || world.fake.api.names("pods").into_iter().next();
    let first = pod().unwrap();
    // The Job and its pod have the same labels, and are one: for this provider, and for one of pods in the same namespace.
    assert_eq!(world.provider.list(&shared, None).await.unwrap().sandboxes.len(), 1);
    let kubeconfig = world.kubeconfig.clone();
    let pods = Kubernetes::new(serde_json::from_value(json!({ "kubeconfig": kubeconfig, "context": "here" })).unwrap()).unwrap();
    assert_eq!(pods.list(&shared, None).await.unwrap().sandboxes, []);

    // Evicted: no second one is made, not even while the first one ends.
    world.fake.api.lose("pods", &first);
    let gone = world.becomes(&native, |now| now.state == State::Failed).await;
    assert!(gone.reason.unwrap().contains("its pod is gone"));
    assert_eq!(pod(), None);
    world.provider.delete(&native).await.unwrap();
    world.becomes(&native, |now| now.state.is_gone()).await;

    // It has ended by itself: log and code are there, and a day later nothing is.
    let exits = Spec { command: sh("echo printed; exit 3"), ..fleets("agent-2") };
    let native = world.provider.create(&exits).await.unwrap().native;
    let over = world.becomes(&native, |now| now.state == State::Stopped).await;
    assert_eq!((over.exit_code, over.reason), (Some(3), None));
    assert_eq!(world.provider.logs(&native, 100).await.unwrap(), b"printed\n");
    assert!(matches!(world.provider.start(&native).await, Err(Error::Refused { .. })), "it runs once");
    assert_eq!(world.fake.api.names("pods").len(), 1);
    // Its pod's end is known before its controller has said so.
    let began = Instant::now();
    while !world.fake.api.pass_day(&native) {
        assert!(began.elapsed() < Duration::from_secs(60), "it is not over");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    world.becomes(&native, |now| now.state.is_gone()).await;
    assert_eq!(pod(), None);

    // Its time is over: also for one that does not hear.
    let native = world.provider.create(&Spec { ttl: Duration::from_secs(1), ..fleets("agent-3") }).await.unwrap().native;
    let late = world.becomes(&native, |now| now.state == State::Stopped).await;
    assert!(late.reason.unwrap().starts_with("DeadlineExceeded"));
    assert_eq!(world.fake.wrong(), Vec::<String>::new());
}

#[tokio::test]
async fn a_job_that_somebody_queues_is_waited_for() {
    let world = Cluster::new(json!({ "backend": "job" })).await;
    world.fake.api.suspend_next();
    let native = world.provider.create(&fleets("agent-1")).await.unwrap().native;
    let queued = world.becomes(&native, |now| now.reason.is_some()).await;
    assert_eq!((queued.state, queued.reason.as_deref()), (State::Creating, Some("JobSuspended: Job suspended")));
    world.provider.start(&native).await.unwrap();
    assert_eq!(world.fake.api.object("jobs", &native).unwrap()["spec"]["suspend"], true, "who queues it says when");
    world.fake.api.suspend(&native, false);
    world.becomes(&native, |now| now.state == State::Running).await;
    // Taken away again by whoever queues: what ran is told to end.
    let ignores = Spec { command: crate::command(Does::Ignore).unwrap(), ..fleets("agent-2") };
    let other = world.provider.create(&ignores).await.unwrap().native;
    world.becomes(&other, |now| now.state == State::Running).await;
    world.fake.api.suspend(&other, true);
    world.becomes(&other, |now| now.state == State::Stopping).await;
    assert!(matches!(world.provider.pause(&native).await, Err(Error::Unsupported { .. })));
    for name in [native, other] {
        world.provider.delete(&name).await.unwrap();
        world.becomes(&name, |now| now.state.is_gone()).await;
    }
    assert_eq!(world.fake.wrong(), Vec::<String>::new());
}

const QUOTA: &str =
    "pods \"agent-1-x\" is forbidden: exceeded quota: agents, requested: limits.cpu=1, used: limits.cpu=4, limited: limits.cpu=4";

/// Its controller makes the pod, and is told no: the object says nothing of it, or in words of its own.
#[tokio::test]
async fn what_holds_up_the_pod_that_a_controller_makes_is_told() {
    for (more, says) in [
        (json!({ "backend": "job" }), "FailedCreate: Error creating: "),
        (json!({ "backend": "sandbox" }), "ReconcilerError: Error seen: "),
        (json!({ "backend": "claim" }), "ReconcilerError: Error seen: "),
    ] {
        let world = Cluster::new(more.clone()).await;
        world.fake.api.hold_pods(Some(QUOTA));
        let asked = match more["backend"] == "claim" {
            true => claimed("agent-1", "ignores"),
            false => fleets("agent-1"),
        };
        install(&world);
        let native = world.provider.create(&asked).await.unwrap().native;
        let held = world.becomes(&native, |now| now.reason.is_some()).await;
        assert_eq!((held.state, held.reason), (State::Creating, Some(format!("{says}{QUOTA}"))), "{more}");
        // There is room again.
        world.fake.api.hold_pods(None);
        let up = world.becomes(&native, |now| now.state == State::Running).await;
        assert_eq!(up.reason, None, "{more}");
        assert_eq!(world.fake.wrong(), Vec::<String>::new());
    }
    // What kubelet waits for is told in the same way.
    let world = Cluster::new(json!({})).await;
    let native = world.provider.create(&Spec { image: String::from("unmounted"), ..fleets("agent-1") }).await.unwrap().native;
    let held = world.becomes(&native, |now| now.reason.is_some()).await;
    let volume = "FailedMount: MountVolume.SetUp failed for volume \"keep-0\"";
    assert_eq!((held.state, held.reason.as_deref()), (State::Creating, Some(volume)));
    assert_eq!(world.fake.api.unused(&["events"]), vec![]);
    // Who may not know it says what has to be granted, and that is all that is missing.
    let world = Cluster::new(json!({ "backend": "job" })).await;
    world.fake.api.deny("", "events", "list");
    world.fake.api.hold_pods(Some(QUOTA));
    let native = world.provider.create(&fleets("agent-1")).await.unwrap().native;
    let held = world.becomes(&native, |now| now.reason.is_some()).await;
    let reason = held.reason.unwrap();
    assert!(held.state == State::Creating && reason.contains("may not list") && reason.contains("rbac.yaml"), "{reason}");
    world.fake.api.hold_pods(None);
    world.becomes(&native, |now| now.state == State::Running).await;
}

#[tokio::test]
async fn a_session_that_is_late_says_what_held_up_its_job() {
    let world = Cluster::new(json!({ "backend": "job" })).await;
    world.fake.api.hold_pods(Some(QUOTA));
    let driven = Driven::new(&world, json!({ "backend": "job" }), Pattern::Ephemeral).await;
    let waits = driven.becomes(|now| now.phase == Phase::Starting && now.reason.is_some()).await;
    driven.stop().await;
    let store = kept_for(Duration::from_secs(121), &waits).await;
    let late = Driven::again(&world, json!({ "backend": "job" }), Pattern::Ephemeral, store).await;
    let failed = late.ends().await;
    let says = format!("it was not ready within 120 s: FailedCreate: Error creating: {QUOTA}");
    assert_eq!((failed.phase, failed.reason), (Phase::Failed, Some(says)));
    late.stop().await;
}

/// Its Job has ended and is gone, and nobody was there to see it.
#[tokio::test]
async fn work_that_is_done_is_not_done_again_because_its_job_was_removed_meanwhile() {
    let jobs = json!({ "backend": "job", "finished_seconds": 60 });
    let world = Cluster::new(jobs.clone()).await;
    let driven = Driven::new(&world, jobs.clone(), Pattern::Ephemeral).await;
    let begun = driven.becomes(|now| now.phase == Phase::Starting && now.native.is_some()).await;
    driven.stop().await;
    let native = begun.native.clone().unwrap();
    world.becomes(&native, |now| now.state == State::Running).await;
    // It does not hear, and is ended: that is its end, and its Job's.
    let pod = world.fake.api.names("pods").remove(0);
    world.fake.api.crash(&pod);
    until(|| world.fake.api.pass_day(&native)).await;
    until(|| world.fake.api.object("jobs", &native).is_none()).await;
    let store = kept_for(Duration::from_secs(61), &begun).await;
    let later = Driven::again(&world, jobs, Pattern::Ephemeral, store).await;
    let failed = later.ends().await;
    let says = "it was gone before it was ready: it is gone, as a Job is 60 s after its end, and how it ended was not seen";
    assert_eq!((failed.phase, failed.generation, failed.reason.as_deref()), (Phase::Failed, 1, Some(says)));
    let told = later.fleet.metrics().exposition([]);
    assert!(told.contains("agent_fleet_disruptions_total{provider=\"cluster\"} 0\n"), "{told}");
    later.stop().await;
    let made = world.fake.seen().iter().filter(|what| what.starts_with("POST") && what.ends_with("/jobs")).count();
    assert_eq!(made, 1);
}

/// Its pod is gone with its node, after it had ended: its Job has kept how.
#[tokio::test]
async fn a_job_knows_how_its_pod_has_ended_when_that_is_gone() {
    let world = Cluster::new(json!({ "backend": "job" })).await;
    for (key, code) in [("agent-1", 0), ("agent-2", 3)] {
        let native = world.provider.create(&Spec { command: sh(&format!("exit {code}")), ..fleets(key) }).await.unwrap().native;
        world.becomes(&native, |now| now.state == State::Stopped).await;
        let over = || world.fake.api.object("jobs", &native).unwrap()["status"]["conditions"][1].is_object();
        until(over).await;
        for pod in world.fake.api.names("pods") {
            world.fake.api.lose("pods", &pod);
        }
        until(|| world.fake.api.names("pods").is_empty()).await;
        let told = world.provider.state(&native).await.unwrap();
        assert_eq!((told.state, told.exit_code, told.disrupted), (State::Stopped, Some(code), None));
    }
    assert_eq!(world.fake.wrong(), Vec::<String>::new());
}

async fn until(is: impl Fn() -> bool) {
    let began = Instant::now();
    while !is() {
        assert!(began.elapsed() < Duration::from_secs(60), "it does not come about");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// As if its fleet had ended so long ago.
async fn kept_for(long: Duration, session: &Session) -> Arc<dyn Store> {
    let store = store::memory().await.unwrap();
    let (since, made) = (session.since - long, session.made.map(|made| made - long));
    store.insert(&Session { since, made, ..session.clone() }).await.unwrap();
    store
}

#[tokio::test]
async fn a_secret_comes_after_its_pod_and_goes_with_it() {
    let (path, token) = secret("s3cret");
    let theirs = Secret::Provider(String::from("theirs/key"));
    let secrets = BTreeMap::from([(String::from("TOKEN"), token), (String::from("THEIRS"), theirs)]);
    let asked = Spec { secrets, ..fleets("agent-1") };
    for more in [json!({}), json!({ "backend": "job" }), sandboxes()] {
        let world = Cluster::new(more).await;
        // As if the fleet had died between the two.
        world.fake.api.refuse_next("secrets", 500, "InternalError", "told to s3cret");
        world.fake.api.refuse_next("secrets", 500, "InternalError", "told to s3cret");
        world.fake.api.refuse_next("secrets", 500, "InternalError", "told to s3cret");
        let failed = world.provider.create(&asked).await.unwrap_err();
        assert!(failed.is_passing() && !failed.to_string().contains("s3cret"), "{failed}");
        let waits = world.becomes("agent-1", |now| now.reason.is_some()).await;
        assert_eq!(waits.state, State::Creating);
        assert!(waits.reason.unwrap().starts_with("CreateContainerConfigError: secret"), "its secret is waited for");
        world.provider.create(&asked).await.unwrap();
        world.becomes("agent-1", |now| now.state == State::Running).await;
        let said = agent_fleet::provider::Exec {
            argv: sh("printf %s:%s \"$TOKEN\" \"$THEIRS\""),
            env: BTreeMap::new(),
            stdin: Vec::new(),
            timeout: Duration::from_secs(60),
            detached: false,
        };
        assert_eq!(world.provider.exec("agent-1", &said).await.unwrap().stdout, b"s3cret:of the namespace");
        // Again: there is one.
        world.provider.create(&asked).await.unwrap();
        assert_eq!(world.fake.api.secrets().len(), 1);
        world.provider.delete("agent-1").await.unwrap();
        world.becomes("agent-1", |now| now.state.is_gone()).await;
        world.secrets_are_gone().await;
        assert_eq!(world.fake.wrong(), Vec::<String>::new());
    }
    std::fs::remove_file(path).unwrap();
}

#[tokio::test]
async fn what_is_somebody_elses_is_left_alone() {
    let world = Cluster::new(json!({})).await;
    let foreign = |labels: Value| {
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "agent-1", "labels": labels},
        "spec": {"containers": [{"name": "agent", "image": "base"}]}})
    };
    world.fake.api.put("pods", foreign(json!({KEY_LABEL: "agent-1", FLEET_LABEL: "test"})));
    let refused = world.provider.create(&fleets("agent-1")).await;
    assert!(matches!(&refused, Err(Error::Refused { what, .. }) if what.contains("agent-1")), "{refused:?}");
    // Of a controller, whatever its labels say.
    let mut owned = foreign(json!({KEY_LABEL: "agent-2", FLEET_LABEL: "prod"}));
    owned["metadata"]["name"] = json!("agent-2");
    owned["metadata"]["ownerReferences"] =
        json!([{"uid": world.fake.api.object("pods", "agent-1").unwrap()["metadata"]["uid"], "controller": true}]);
    world.fake.api.put("pods", owned);
    assert!(matches!(world.provider.create(&fleets("agent-2")).await, Err(Error::Refused { .. })));
    let listed = world.provider.list(&BTreeMap::from([(FLEET_LABEL.to_owned(), String::from("prod"))]), None).await.unwrap();
    assert_eq!(listed.sandboxes, []);
    // Ours of before, that is still ending.
    let ignores = crate::command(Does::Ignore).unwrap();
    world.provider.create(&Spec { command: ignores, ..fleets("agent-3") }).await.unwrap();
    world.becomes("agent-3", |now| now.state == State::Running).await;
    world.provider.stop("agent-3", Duration::from_secs(600)).await.unwrap();
    assert_eq!(world.provider.state("agent-3").await.unwrap().state, State::Stopping);
    assert!(matches!(world.provider.create(&fleets("agent-3")).await, Err(Error::Failed { .. })));
    world.provider.delete("agent-3").await.unwrap();
    world.becomes("agent-3", |now| now.state.is_gone()).await;
    world.provider.create(&fleets("agent-3")).await.unwrap();
}

#[tokio::test]
async fn a_no_is_told_in_the_clusters_words() {
    let world = Cluster::new(json!({})).await;
    let quota = "pods \"agent-1\" is forbidden: exceeded quota: agents, requested: limits.cpu=1, used: limits.cpu=4, limited: limits.cpu=4";
    world.fake.api.refuse_next("pods", 403, "Forbidden", quota);
    let full = world.provider.create(&fleets("agent-1")).await;
    assert!(matches!(&full, Err(Error::Failed { what, .. }) if what.contains(quota)), "{full:?}");
    let policy = "admission webhook \"policy.example\" denied the request: no latest tags";
    world.fake.api.refuse_next("pods", 400, "BadRequest", policy);
    let denied = world.provider.create(&fleets("agent-1")).await;
    assert!(matches!(&denied, Err(Error::Refused { what, .. }) if what.contains(policy)), "{denied:?}");
    assert_eq!(world.fake.api.count("agent-1"), 0);

    let waits = world.provider.create(&Spec { image: String::from("nowhere"), ..fleets("agent-1") }).await.unwrap().native;
    let told = world.becomes(&waits, |now| now.reason.is_some()).await;
    assert_eq!(
        (told.state, told.reason.as_deref()),
        (State::Creating, Some("ImagePullBackOff: Back-off pulling image \"nowhere\""))
    );
    assert_eq!(world.provider.logs(&waits, 100).await.unwrap(), b"", "it has printed nothing yet");
    let failed = world.provider.endpoint(&waits, 80).await;
    assert!(matches!(&failed, Err(Error::Failed { what, .. }) if what.contains("ImagePullBackOff")), "{failed:?}");
    let never = world.provider.create(&Spec { image: String::from("UPPER"), ..fleets("agent-2") }).await.unwrap().native;
    world.becomes(&never, |now| now.state == State::Failed).await;

    let wrong = Secret::Provider(String::from("no-key"));
    let refused =
        world.provider.create(&Spec { secrets: BTreeMap::from([(String::from("T"), wrong)]), ..fleets("agent-3") }).await;
    assert!(matches!(&refused, Err(Error::Refused { what, .. }) if what.contains("name/key")), "{refused:?}");
    assert_eq!(world.fake.api.count("agent-3"), 0);
}

#[tokio::test]
async fn the_cluster_ends_what_has_lived_too_long() {
    let world = Cluster::new(json!({})).await;
    let ignores = crate::command(Does::Ignore).unwrap();
    let short = Spec { ttl: Duration::from_secs(1), command: ignores, ..fleets("agent-1") };
    let native = world.provider.create(&short).await.unwrap().native;
    let over = world.becomes(&native, |now| now.state == State::Stopped).await;
    assert!(over.reason.unwrap().starts_with("DeadlineExceeded"));
    assert!(over.deadline.is_some());
    assert!(matches!(world.provider.start(&native).await, Err(Error::Refused { .. })), "it runs once");

    let world = Cluster::new(sandboxes()).await;
    let native = world.provider.create(&short).await.unwrap().native;
    world.becomes(&native, |now| now.state.is_gone()).await;
}

#[tokio::test]
async fn a_list_and_a_watch_that_are_too_old_are_gone_on_with() {
    let world = Cluster::new(json!({})).await;
    let shared = BTreeMap::from([(FLEET_LABEL.to_owned(), String::from("prod"))]);
    for n in 1..=3 {
        world.provider.create(&fleets(&format!("agent-{n}"))).await.unwrap();
    }
    let first = world.provider.list(&shared, None).await.unwrap();
    let next = first.next.unwrap();
    world.fake.api.age(next.split_once('/').unwrap().0);
    let second = world.provider.list(&shared, Some(&next)).await.unwrap();
    let all: Vec<String> = first.sandboxes.into_iter().chain(second.sandboxes).map(|one| one.native).collect();
    assert_eq!(all, ["agent-1", "agent-2", "agent-3"]);
    assert_eq!(second.next, None);

    let mut events = world.provider.events(&shared).await.unwrap();
    world.fake.api.end_watches();
    let last = async {
        loop {
            // What was under way before is told first.
            match events.next().await.expect("it says why") {
                Ok(_) => {}
                Err(error) => return error,
            }
        }
    };
    let error = tokio::time::timeout(Duration::from_secs(60), last).await.unwrap();
    assert!(error.is_passing() && error.to_string().contains("410"), "{error}");
    assert!(events.next().await.is_none(), "everything is listed again");
}

#[tokio::test]
async fn credentials_that_change_are_read_again() {
    let world = Cluster::new(json!({})).await;
    write(&world.kubeconfig, &world.fake.address, "of-yesterday");
    let refused = world.provider.state("agent-1").await.unwrap_err();
    assert!(refused.is_passing() && refused.to_string().contains("401"), "{refused}");
    write(&world.kubeconfig, &world.fake.address, TOKEN);
    assert_eq!(world.provider.state("agent-1").await.unwrap().state, State::Missing);
}

/// Another address, or another certificate: who does not answer any more does not say 401.
#[tokio::test]
async fn a_cluster_that_is_elsewhere_is_found_again() {
    let (world, other) = (Cluster::new(json!({})).await, Cluster::new(json!({})).await);
    assert_eq!(world.provider.state("agent-1").await.unwrap().state, State::Missing);
    other.provider.create(&fleets("agent-1")).await.unwrap();
    // Nobody is at the first address any more.
    let nobody = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let gone = format!("http://{}", nobody.local_addr().unwrap());
    drop(nobody);
    let moved =
        Kubernetes::new(serde_json::from_value(json!({ "kubeconfig": world.kubeconfig, "context": "here" })).unwrap()).unwrap();
    write(&world.kubeconfig, &gone, TOKEN);
    let lost = moved.state("agent-1").await.unwrap_err();
    assert!(lost.is_passing(), "{lost}");
    let before = std::fs::metadata(&world.kubeconfig).unwrap().modified().unwrap();
    while std::fs::metadata(&world.kubeconfig).unwrap().modified().unwrap() == before {
        write(&world.kubeconfig, &other.fake.address, TOKEN);
    }
    assert_ne!(moved.state("agent-1").await.unwrap().state, State::Missing);
}

/// Each of what goes on for long is the first that is asked with a token that is no longer valid.
#[tokio::test]
async fn a_token_that_is_rotated_is_picked_up_by_whatever_is_asked_first() {
    let world = Cluster::new(json!({})).await;
    let asked = Spec { command: sh("echo printed; sleep 1000"), ..fleets("agent-1") };
    let native = world.provider.create(&asked).await.unwrap().native;
    world.becomes(&native, |now| now.state == State::Running).await;
    let at = world.provider.endpoint(&native, 8080).await.unwrap();
    conformance::serves(&at).await;
    let rotate_at = |verb, to: &str| {
        write(&world.kubeconfig, &world.fake.address, to);
        world.fake.api.rotate_at(verb, to);
    };
    rotate_at("portforward", "second");
    conformance::serves(&at).await;
    rotate_at("exec", "third");
    let (env, stdin) = (BTreeMap::new(), Vec::new());
    let hello = Exec { argv: sh("echo hello"), env, stdin, timeout: Duration::from_secs(60), detached: false };
    assert_eq!(world.provider.exec(&native, &hello).await.unwrap().stdout, b"hello\n");
    rotate_at("log", "fourth");
    assert_eq!(world.provider.logs(&native, 100).await.unwrap(), b"printed\n");
    rotate_at("watch", "fifth");
    drop(world.provider.events(&BTreeMap::new()).await.unwrap());
    // Who comes with nothing better is told so, and read again the next time.
    world.fake.api.rotate_at("exec", "sixth");
    let refused = world.provider.exec(&native, &hello).await.unwrap_err();
    assert!(refused.is_passing() && refused.to_string().contains("401"), "{refused}");
    write(&world.kubeconfig, &world.fake.address, "sixth");
    conformance::serves(&at).await;
    assert_eq!(world.fake.wrong(), Vec::<String>::new());
}

#[tokio::test]
async fn a_port_is_forwarded_at_one_place_until_the_pod_is_gone() {
    let world = Cluster::new(json!({})).await;
    let native = world.provider.create(&fleets("agent-1")).await.unwrap().native;
    world.becomes(&native, |now| now.state == State::Running).await;
    let at = world.provider.endpoint(&native, 8080).await.unwrap();
    assert_eq!(world.provider.endpoint(&native, 8080).await.unwrap(), at);
    assert_ne!(world.provider.endpoint(&native, 8081).await.unwrap(), at);
    for _ in 0..3 {
        conformance::serves(&at).await;
    }
    // Nobody listens there: that is known at once.
    let closed = world.provider.endpoint(&native, fakes::kubernetes::CLOSED).await.unwrap();
    let mut refused = tokio::net::TcpStream::connect(closed.url.trim_start_matches("http://")).await.unwrap();
    let mut said = Vec::new();
    let end = tokio::io::AsyncReadExt::read_to_end(&mut refused, &mut said);
    assert!(tokio::time::timeout(Duration::from_secs(60), end).await.is_ok(), "it is kept waiting");
    world.provider.delete(&native).await.unwrap();
    let began = Instant::now();
    let Endpoint { url, .. } = at;
    while tokio::net::TcpStream::connect(url.trim_start_matches("http://")).await.is_ok() {
        assert!(began.elapsed() < Duration::from_secs(60), "it is still forwarded");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let direct = Cluster::new(json!({ "reach": "pod" })).await;
    let native = direct.provider.create(&fleets("agent-1")).await.unwrap().native;
    direct.becomes(&native, |now| now.state == State::Running).await;
    assert_eq!(direct.provider.endpoint(&native, 9477).await.unwrap().url, "http://127.0.0.1:9477");
}

#[tokio::test]
async fn nothing_is_put_on_a_node_that_is_to_be_empty() {
    let [one, two] = fakes::kubernetes::NODES.map(String::from);
    for more in [json!({}), json!({ "backend": "job" }), sandboxes(), json!({ "backend": "sandbox" })] {
        let world = Cluster::new(more).await;
        assert!(world.provider.capabilities().nodes);
        // By turns, if nobody says otherwise.
        for (n, avoid) in [vec![], vec![], vec![one.clone()], vec![one.clone()], vec![two.clone()]].into_iter().enumerate() {
            let native =
                world.provider.create(&Spec { avoid: avoid.clone(), ..fleets(&format!("agent-{n}")) }).await.unwrap().native;
            let up = world.becomes(&native, |now| now.state == State::Running).await;
            let on = up.node.expect("it says where it is");
            assert!(!avoid.contains(&on), "{on} of {avoid:?}");
            assert!(n > 1 || on == fakes::kubernetes::NODES[n], "{on}");
        }
        // Where there is none left it waits, and says so.
        let native =
            world.provider.create(&Spec { avoid: vec![one.clone(), two.clone()], ..fleets("agent-9") }).await.unwrap().native;
        let waits = world.becomes(&native, |now| now.reason.is_some()).await;
        assert_eq!((waits.state, waits.node), (State::Creating, None));
        assert_eq!(waits.reason.as_deref(), Some("Unschedulable: 0/2 nodes are available"));
        assert_eq!(world.fake.wrong(), Vec::<String>::new());
    }
    // Of what is claimed its template says where it goes.
    assert!(!Cluster::new(json!({ "backend": "claim" })).await.provider.capabilities().nodes);
}

#[tokio::test]
async fn what_sleeps_wakes_where_it_may_by_then() {
    let [one, two] = fakes::kubernetes::NODES.map(String::from);
    let world = Cluster::new(sandboxes()).await;
    let native = world.provider.create(&fleets("agent-1")).await.unwrap().native;
    let up = world.becomes(&native, |now| now.state == State::Running).await;
    assert_eq!((up.node, up.disrupted), (Some(one.clone()), None));
    for (avoid, on) in [(vec![one.clone()], &two), (vec![two.clone()], &one), (vec![], &one)] {
        world.provider.pause(&native).await.unwrap();
        let asleep = world.becomes(&native, |now| now.state == State::Paused).await;
        assert_eq!((asleep.node, asleep.disrupted), (None, None), "it is nowhere, and by our own wish");
        world.provider.resume(&native, &avoid).await.unwrap();
        let up = world.becomes(&native, |now| now.state == State::Running).await;
        assert_eq!(up.node.as_ref(), Some(on), "not on {avoid:?}");
    }
    // What was not to be used is not held against it for ever.
    let template = world.fake.api.object("sandboxes", &native).unwrap()["spec"]["podTemplate"].clone();
    assert!(!template.to_string().contains("metadata.name"), "{template}");
    assert_eq!(world.fake.wrong(), Vec::<String>::new());
}

#[tokio::test]
async fn what_the_cluster_takes_away_is_told_and_answers_to_the_last() {
    const EVICTED: &str = "the cluster takes its pod away (EvictionByEvictionAPI: Eviction API: evicting)";
    let ignores = Spec { command: crate::command(Does::Ignore).unwrap(), ..fleets("agent-1") };
    for more in [json!({}), json!({ "backend": "job" }), json!({ "backend": "sandbox" })] {
        let kind = more["backend"].as_str().unwrap_or("pod").to_owned();
        let world = Cluster::new(more).await;
        let native = world.provider.create(&ignores).await.unwrap().native;
        let up = world.becomes(&native, |now| now.state == State::Running).await;
        assert_eq!(up.disrupted, None, "{kind}");
        let pod = world.fake.api.names("pods").remove(0);
        world.fake.api.evict(&pod);
        let going = world.becomes(&native, |now| now.disrupted.is_some()).await;
        assert_eq!((going.state, going.disrupted.as_deref()), (State::Stopping, Some(EVICTED)), "{kind}");
        let refused = world.provider.endpoint(&native, 8080).await;
        assert!(matches!(refused, Err(Error::Failed { .. })), "{kind}: it gets no new work: {refused:?}");
        conformance::serves(&world.provider.last_endpoint(&native, 8080).await.unwrap()).await;
        world.provider.delete(&native).await.unwrap();
        world.becomes(&native, |now| now.state.is_gone()).await;
        assert!(world.provider.last_endpoint(&native, 8080).await.is_err(), "{kind}");
        assert_eq!(world.fake.wrong(), Vec::<String>::new());
    }

    // Somebody removes it, who is not the fleet.
    let world = Cluster::new(json!({})).await;
    let native = world.provider.create(&ignores).await.unwrap().native;
    world.becomes(&native, |now| now.state == State::Running).await;
    world.fake.api.lose("pods", &native);
    let going = world.becomes(&native, |now| now.disrupted.is_some()).await;
    assert_eq!(going.disrupted.as_deref(), Some("it is being deleted, and not by the fleet"));

    // Kubelet has no room for it: it has failed, and is still there.
    let native = world.provider.create(&fleets("agent-2")).await.unwrap().native;
    world.becomes(&native, |now| now.state == State::Running).await;
    world.fake.api.kill(&native);
    let over = world.becomes(&native, |now| now.state == State::Stopped).await;
    let low = "the cluster takes its pod away (TerminationByKubelet: The node was low on resource: memory)";
    assert_eq!((over.exit_code, over.disrupted.as_deref()), (Some(137), Some(low)));

    // What is claimed is told of by its pod.
    let world = Cluster::new(json!({ "backend": "claim" })).await;
    install(&world);
    let native = world.provider.create(&claimed("agent-1", "ignores")).await.unwrap().native;
    world.becomes(&native, |now| now.state == State::Running).await;
    world.fake.api.evict("agent-1");
    let going = world.becomes(&native, |now| now.disrupted.is_some()).await;
    assert_eq!((going.state, going.disrupted.as_deref()), (State::Stopping, Some(EVICTED)));

    // Seen when nothing of it is left: a pod stays until somebody removes it.
    let world = Cluster::new(json!({})).await;
    let native = world.provider.create(&ignores).await.unwrap().native;
    world.becomes(&native, |now| now.state == State::Running).await;
    world.fake.api.vanish(&native);
    let gone = world.provider.state(&native).await.unwrap();
    assert_eq!((gone.state, gone.disrupted.as_deref()), (State::Missing, Some("it is gone, and was not removed by the fleet")));

    // With what it keeps its controller makes it anew, and nothing is lost.
    let world = Cluster::new(sandboxes()).await;
    let hears = Spec { command: crate::command(Does::Wait).unwrap(), ..fleets("agent-1") };
    let native = world.provider.create(&hears).await.unwrap().native;
    world.becomes(&native, |now| now.state == State::Running).await;
    let first = world.fake.api.object("pods", &native).unwrap()["metadata"]["uid"].clone();
    world.fake.api.evict(&native);
    let another = |now: &Sandbox| {
        assert_eq!(now.disrupted, None);
        now.state == State::Running && world.fake.api.object("pods", &native).is_some_and(|pod| pod["metadata"]["uid"] != first)
    };
    world.becomes(&native, another).await;
    // But not beside one that kubelet has ended, and that is still there.
    let second = world.fake.api.object("pods", &native).unwrap()["metadata"]["uid"].clone();
    world.fake.api.kill(&native);
    let over = world.becomes(&native, |now| now.state == State::Stopped).await;
    assert!(over.disrupted.is_some_and(|why| why.contains("TerminationByKubelet")));
    world.provider.resume(&native, &[]).await.unwrap();
    let another = |now: &Sandbox| {
        now.state == State::Running && world.fake.api.object("pods", &native).is_some_and(|pod| pod["metadata"]["uid"] != second)
    };
    world.becomes(&native, another).await;
    assert_eq!(world.fake.wrong(), Vec::<String>::new());
}

#[tokio::test]
async fn what_kubelet_does_not_take_has_not_failed_by_itself() {
    let world = Cluster::new(json!({})).await;
    world.fake.api.refuse_next_pod("OutOfcpu", "Pod was rejected: Node didn't have enough resource: cpu");
    let native = world.provider.create(&fleets("agent-1")).await.unwrap().native;
    let refused = world.becomes(&native, |now| now.state == State::Failed).await;
    let why = "its node did not take its pod (OutOfcpu: Pod was rejected: Node didn't have enough resource: cpu)";
    assert_eq!(refused.disrupted.as_deref(), Some(why));
    world.provider.delete(&native).await.unwrap();
    world.becomes(&native, |now| now.state.is_gone()).await;
}

/// A Sandbox's pods have ten minutes, so that ours can only be shorter.
#[tokio::test]
async fn what_is_taken_away_with_a_long_grace_ends_in_ours() {
    let world = Cluster::new(json!({ "backend": "sandbox" })).await;
    let ignores = Spec { command: crate::command(Does::Ignore).unwrap(), ..fleets("agent-1") };
    let native = world.provider.create(&ignores).await.unwrap().native;
    world.becomes(&native, |now| now.state == State::Running).await;
    world.fake.api.evict(&native);
    let runs = || world.fake.api.object("pods", &native).unwrap()["metadata"]["deletionGracePeriodSeconds"].clone();
    assert_eq!(runs(), 600);
    // A longer one changes nothing.
    world.provider.stop(&native, Duration::from_secs(900)).await.unwrap();
    assert_eq!(runs(), 600);
    world.provider.stop(&native, Duration::from_secs(1)).await.unwrap();
    world.becomes(&native, |now| now.state.is_gone()).await;
    assert_eq!(world.fake.wrong(), Vec::<String>::new());
}

/// What sidecars say: nothing, until they may.
#[derive(Default)]
struct Sidecars(AtomicBool);

#[async_trait]
impl Inside for Sidecars {
    async fn report(&self, _: &Endpoint, at: Timestamp) -> Result<Report, String> {
        let report = Report { at, busy_until: None, cost_usd: 0.0, conversation: None, memory_bytes: None };
        self.0.load(Ordering::SeqCst).then_some(report).ok_or(String::from("it does not answer"))
    }
}

struct Quiet;

#[async_trait]
impl Hooks for Quiet {
    async fn run(&self, _: &Session) -> Verdict {
        Verdict::Go
    }
}

struct Same(Policy);

impl Policies for Same {
    fn policy(&self, _: &Session) -> Policy {
        self.0.clone()
    }

    fn port(&self, _: &Session) -> u16 {
        9477
    }
}

/// A fleet that drives one session in a cluster.
struct Driven {
    fleet: Arc<Fleet>,
    sidecars: Arc<Sidecars>,
    end: watch::Sender<bool>,
    task: tokio::task::JoinHandle<()>,
}

impl Driven {
    async fn new(world: &Cluster, more: Value, pattern: Pattern) -> Self {
        let driven = Self::again(world, more, pattern, store::memory().await.unwrap()).await;
        let can = driven.fleet.provider("cluster").unwrap().capabilities();
        let spec = match can.command {
            true => Spec { command: crate::command(Does::Ignore).unwrap(), ..spec("") },
            false => Spec { image: String::from("ignores"), ..spec("") },
        };
        let session = Session::new("a".parse().unwrap(), ("t", "o"), pattern, "cluster", spec, Timestamp::now());
        driven.fleet.create(session).await.unwrap();
        driven
    }

    /// Another, of the same store.
    async fn again(world: &Cluster, more: Value, pattern: Pattern, store: Arc<dyn Store>) -> Self {
        let mut settings = json!({ "kubeconfig": world.kubeconfig, "context": "here" });
        settings.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let provider = Kubernetes::new(serde_json::from_value(settings).unwrap()).unwrap();
        let can = provider.capabilities();
        let policy = Policy {
            backoff: Duration::from_millis(5),
            look_every: Duration::from_millis(50),
            settle: Duration::from_secs(1),
            pause_by: PauseBy::of(pattern, can.pause, false),
            ..Policy::default()
        };
        let sidecars = Arc::<Sidecars>::default();
        let edges =
            (Arc::new(Quiet) as Arc<dyn Hooks>, Arc::new(Same(policy)) as Arc<dyn Policies>, sidecars.clone() as Arc<dyn Inside>);
        let providers = BTreeMap::from([(String::from("cluster"), Arc::new(provider) as Arc<dyn Provider>)]);
        let fleet = Fleet::new("prod", store, providers, edges, BTreeMap::new(), Arc::new(Timestamp::now));
        let fleet = Arc::new(fleet.with_metrics(Arc::new(Metrics::new(["cluster"], [], []))));
        let (end, ended) = watch::channel(false);
        let task = tokio::spawn(Arc::clone(&fleet).run(ended));
        Self { fleet, sidecars, end, task }
    }

    async fn becomes(&self, like: impl Fn(&Session) -> bool) -> Session {
        let began = Instant::now();
        loop {
            let now = self.fleet.store().get(&"a".parse().unwrap()).await.unwrap().unwrap();
            if like(&now) {
                return now;
            }
            assert!(began.elapsed() < Duration::from_secs(60) && !now.phase.is_last(), "{now:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// When it is over, or has failed.
    async fn ends(&self) -> Session {
        let began = Instant::now();
        loop {
            let now = self.fleet.store().get(&"a".parse().unwrap()).await.unwrap().unwrap();
            if now.is_over() {
                return now;
            }
            assert!(began.elapsed() < Duration::from_secs(60), "{now:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn stop(self) {
        self.end.send(true).unwrap();
        self.task.await.unwrap();
    }
}

#[tokio::test]
async fn a_session_whose_pod_is_taken_away_before_it_is_ready_has_another() {
    let claim = json!({ "backend": "claim" });
    for more in [json!({}), json!({ "backend": "job" }), json!({ "backend": "sandbox" }), sandboxes(), claim] {
        let world = Cluster::new(more.clone()).await;
        if more["backend"] == "claim" {
            install(&world);
        }
        let driven = Driven::new(&world, more.clone(), Pattern::Hybrid).await;
        // The pod that is its own, while it runs: of the warm ones none is.
        let pod_of = |native: &str| {
            let runs = |name: &String| world.fake.api.object("pods", name).is_some_and(|pod| pod["status"]["phase"] == "Running");
            world.fake.api.names("pods").into_iter().find(|name| name.starts_with(native) && runs(name))
        };
        let begins = |now: &Session| now.phase == Phase::Starting && now.native.as_deref().and_then(pod_of).is_some();
        let first = driven.becomes(begins).await;
        let pod = pod_of(first.native.as_deref().unwrap()).unwrap();
        // That of a Sandbox that keeps something comes again by itself, but for one that kubelet has ended.
        match more["keep"].is_object() {
            true => world.fake.api.kill(&pod),
            false => world.fake.api.evict(&pod),
        }
        let next = driven.becomes(|now| now.generation == 2 && begins(now)).await;
        assert_ne!(next.native, first.native, "{more}");
        assert_eq!((world.fake.api.count(&first.key()), world.fake.api.object("pods", &pod)), (0, None), "{more}");
        // And at once, when its node has no room after all, or is not there any more.
        if more == json!({}) {
            world.fake.api.vanish(next.native.as_deref().unwrap());
            world.fake.api.refuse_next_pod("OutOfmemory", "Pod was rejected: Node didn't have enough resource: memory");
            driven.becomes(|now| now.generation == 4 && begins(now)).await;
        }
        driven.sidecars.0.store(true, Ordering::SeqCst);
        let up = driven.becomes(|now| now.phase == Phase::Ready).await;
        assert_eq!((up.lost, up.disrupted), (0, None), "{more}");
        let told = driven.fleet.metrics().exposition([]);
        let lost = format!("agent_fleet_disruptions_total{{provider=\"cluster\"}} {}\n", up.generation - 1);
        assert!(told.contains(&lost) && told.contains("{phase=\"failed\",provider=\"cluster\"} 0\n"), "{more}: {told}");
        driven.fleet.want(&up.id, Wanted::Gone, "enough").await.unwrap();
        driven.becomes(|now| now.phase == Phase::Destroyed).await;
        driven.stop().await;
        assert_eq!(world.fake.wrong(), Vec::<String>::new(), "{more}");
    }
}

#[tokio::test]
async fn a_pod_that_its_controller_makes_anew_is_put_where_it_may_be_by_then() {
    let [one, two] = fakes::kubernetes::NODES.map(String::from);
    let world = Cluster::new(sandboxes()).await;
    let native =
        world.provider.create(&Spec { command: crate::command(Does::Wait).unwrap(), ..fleets("agent-1") }).await.unwrap().native;
    let up = world.becomes(&native, |now| now.state == State::Running).await;
    assert_eq!(up.node.as_ref(), Some(&one));
    let uid = || world.fake.api.object("pods", &native).map(|pod| pod["metadata"]["uid"].clone());
    for (avoid, on) in [(vec![one.clone()], &two), (vec![two.clone()], &one)] {
        let first = uid();
        world.provider.avoid(&native, &avoid).await.unwrap();
        assert_eq!(world.provider.state(&native).await.unwrap().state, State::Running);
        assert_eq!(uid(), first, "what runs is left where it is");
        world.fake.api.evict(&native);
        let up = world.becomes(&native, |now| now.state == State::Running && uid() != first).await;
        assert_eq!(up.node.as_ref(), Some(on));
    }
    world.provider.avoid(&native, &[]).await.unwrap();
    let template = || world.fake.api.object("sandboxes", &native).unwrap()["spec"]["podTemplate"].to_string();
    assert!(!template().contains("metadata.name"), "{}", template());

    // Wherever it is: each that may come to that node is told, and told again when the drain is over.
    let world = Cluster::new(sandboxes()).await;
    let driven = Driven::new(&world, sandboxes(), Pattern::Hybrid).await;
    driven.sidecars.0.store(true, Ordering::SeqCst);
    let up = driven.becomes(|now| now.phase == Phase::Ready && now.node.is_some()).await;
    let (native, place) = (up.native.unwrap(), Where::node("cluster", &two));
    assert_eq!(up.node.as_ref(), Some(&one));
    for (until, knows) in [(Some(Timestamp::now() + Duration::from_secs(3600)), true), (None, false)] {
        driven.fleet.drain(&place, until).await.unwrap();
        let began = Instant::now();
        let template = || world.fake.api.object("sandboxes", &native).unwrap()["spec"]["podTemplate"].to_string();
        while template().contains(&two) != knows {
            assert!(began.elapsed() < Duration::from_secs(60), "{}", template());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    driven.becomes(|now| now.phase.is_up() && now.generation == 1).await;
    driven.stop().await;
    assert_eq!(world.fake.wrong(), Vec::<String>::new());
}

/// Evicted at the moment at which its node is drained: its controller did not know yet.
#[tokio::test]
async fn what_comes_back_to_a_node_that_is_drained_goes_from_there_again() {
    let [one, two] = fakes::kubernetes::NODES.map(String::from);
    let world = Cluster::new(sandboxes()).await;
    let driven = Driven::new(&world, sandboxes(), Pattern::Hybrid).await;
    driven.sidecars.0.store(true, Ordering::SeqCst);
    let up = driven.becomes(|now| now.phase == Phase::Ready && now.node.as_ref() == Some(&one)).await;
    let native = up.native.clone().unwrap();
    let uid = || world.fake.api.object("pods", &native).map(|pod| pod["metadata"]["uid"].clone());
    let first = uid();
    world.fake.api.vanish(&native);
    until(|| uid().is_some_and(|now| Some(now) != first)).await;
    let hour = Timestamp::now() + Duration::from_secs(3600);
    driven.fleet.drain(&Where::node("cluster", &one), Some(hour)).await.unwrap();
    driven.becomes(|now| now.phase == Phase::Paused).await;
    until(|| uid().is_none()).await;
    driven.fleet.want(&up.id, Wanted::Running, "a message").await.unwrap();
    let woken = driven.becomes(|now| now.phase == Phase::Ready && now.node.is_some()).await;
    assert_eq!((woken.node, woken.generation), (Some(two), 1));
    driven.stop().await;
    assert_eq!(world.fake.wrong(), Vec::<String>::new());
}

#[test]
fn settings_that_cannot_be_meant_are_said() {
    let wrong = |text: &str| Kubernetes::new(toml::from_str(text).unwrap()).err().unwrap_or_default();
    for (text, says) in [
        ("keep = { '/data' = '1Gi' }", "sandbox"),
        ("backend = 'sandbox'\nkeep = { '/data' = '1Gi' }", "`group`"),
        ("writable = ['tmp']", "`tmp`"),
        ("user = 0", "`non_root`"),
        ("context = 'x'", "`kubeconfig`"),
        ("warm_pool = 'x'", "`backend = \"claim\"`"),
        ("backend = 'job'\ngroup = 7\nkeep = { '/data' = '1Gi' }", "sandbox"),
        ("finished_seconds = 600", "`backend = \"job\"`"),
        ("backend = 'job'\nfinished_seconds = 1", "60 to"),
        ("backend = 'claim'\nsidecar_image = 'x'", "SandboxTemplate"),
        ("backend = 'claim'\nuser = 7", "SandboxTemplate"),
        ("tolerations = [{ key = 'gpu', effect = 'NoSchedule', seconds = 5 }]", "NoExecute"),
        ("tolerations = [{ key = 'gpu', seconds = 5 }]", "NoExecute"),
        ("tolerations = [{ value = 'gpu' }]", "`key`"),
        ("affinity = 'zone'", "`affinity`"),
        (
            "affinity = { nodeAffinity = { requiredDuringSchedulingIgnoredDuringExecution = { nodeSelectorTerms = [] } } }",
            "`nodeSelectorTerms`",
        ),
        ("backend = 'claim'\naffinity = {}", "SandboxTemplate"),
        ("backend = 'sandbox'\ngroup = 1\nwritable = ['/a']\nkeep = { '/a' = '1Gi' }", "`/a`"),
    ] {
        assert!(wrong(text).contains(says), "{text}: {}", wrong(text));
    }
    assert_eq!(wrong(""), "");
    assert_eq!(wrong("tolerations = [{ key = 'gpu', value = 'a', effect = 'NoExecute', seconds = 5 }, {}]"), "");
    assert_eq!(wrong("backend = 'job'\nfinished_seconds = 60\nsidecar_image = 'x'"), "");
    assert!(toml::from_str::<Settings>("backend = 'deployment'").is_err());
    assert!(toml::from_str::<Settings>("namespaces = 'x'").is_err());
}
