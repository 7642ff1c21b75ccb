//! The provider of Kubernetes on a real cluster: `AGENT_FLEET_TEST_KUBECONFIG` has a current context that may do everything, and a context
//! `agent-fleet` that may do what deploy/fleet/kubernetes/rbac.yaml grants, in its namespace; `AGENT_FLEET_TEST_CLUSTER_IMAGE` is an image with a
//! busybox that the cluster's nodes have or can pull. Without a cluster nothing is tried, and that is said (docs/tests.md).

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use agent_fleet::provider::kubernetes::{Kubernetes, Settings};
use agent_fleet::provider::{KEY_LABEL, Provider, Size, Spec};
use async_trait::async_trait;
use axum::http::{Method, Request};
use conformance::{Call, Does, Fault, World};
use kube_client::Client;
use kube_client::config::{Config, KubeConfigOptions, Kubeconfig};
use serde_json::{Value, json};

mod conformance;

const CONTEXT: &str = "agent-fleet";
const USER: u32 = 1000;
const EXTENSIONS: &str = "extensions.agents.x-k8s.io/v1beta1";
/// What the suite has containers do.
const DONE: [Does; 5] = [Does::Wait, Does::Ignore, Does::Exit(0), Does::Exit(3), Does::Serve(8080)];
/// What a container can be, by the path of its kind.
const KINDS: [&str; 4] = [
    "api/v1/pods",
    "apis/batch/v1/jobs",
    "apis/agents.x-k8s.io/v1beta1/sandboxes",
    "apis/extensions.agents.x-k8s.io/v1beta1/sandboxclaims",
];

/// Makes containers do what is asked for: a busybox is in the image.
fn command(does: Does) -> Vec<String> {
    let script = match does {
        Does::Wait => String::from("trap 'exit 0' TERM; echo ready; while :; do sleep 1 & wait $!; done"),
        Does::Ignore => String::from("trap '' TERM; echo ready; while :; do sleep 1; done"),
        Does::Exit(code) => format!("echo exits with {code}; exit {code}"),
        Does::Serve(port) => format!("mkdir /tmp/www; echo here > /tmp/www/index.html; exec httpd -f -p {port} -h /tmp/www"),
    };
    ["sh", "-c", &script].map(String::from).to_vec()
}

/// The cluster, as the fleet may ask it and as who may everything.
struct Cluster {
    image: String,
    namespace: String,
    admin: Client,
    provider: Kubernetes,
    /// Templates take the place of images: what they do is in them.
    claims: bool,
}

impl Cluster {
    async fn find(test: &str, settings: Value) -> Option<Self> {
        let found = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let Some(kubeconfig) = found("AGENT_FLEET_TEST_KUBECONFIG").map(PathBuf::from) else {
            eprintln!("{test}: not tried, for there is no AGENT_FLEET_TEST_KUBECONFIG; docs/tests.md says what it needs");
            return None;
        };
        let image = found("AGENT_FLEET_TEST_CLUSTER_IMAGE").expect("AGENT_FLEET_TEST_CLUSTER_IMAGE is with the kubeconfig");
        drop(rustls::crypto::ring::default_provider().install_default());
        let read = Kubeconfig::read_from(&kubeconfig).expect("a kubeconfig");
        let named = read.contexts.iter().find(|one| one.name == CONTEXT).expect("a context `agent-fleet`");
        let namespace = named.context.as_ref().and_then(|context| context.namespace.clone()).expect("its namespace");
        let config = Config::from_custom_kubeconfig(read, &KubeConfigOptions::default()).await.expect("a current context");
        let admin = Client::try_from(config).expect("a client");
        let claims = settings["backend"] == "claim";
        let mut all = json!({ "kubeconfig": kubeconfig, "context": CONTEXT });
        if !claims {
            all["user"] = json!(USER);
            all["group"] = json!(USER);
        }
        all.as_object_mut().expect("an object").extend(settings.as_object().expect("an object").clone());
        let provider = Kubernetes::new(serde_json::from_value::<Settings>(all).expect("settings")).expect("a provider");
        Some(Self { image, namespace, admin, provider, claims })
    }

    /// What agent-sandbox brings is there.
    async fn has_sandboxes(&self, test: &str) -> bool {
        let there = self.ask(Method::GET, "apis/agents.x-k8s.io/v1beta1/sandboxes", "", None).await.is_ok();
        if !there {
            eprintln!("{test}: not tried, for agent-sandbox is not installed in the cluster");
        }
        there
    }

    /// `kind` is a path without its namespace.
    async fn ask(&self, method: Method, kind: &str, rest: &str, body: Option<Value>) -> kube_client::Result<Value> {
        let (api, plural) = kind.rsplit_once('/').expect("a path");
        let path = format!("/{api}/namespaces/{}/{plural}{rest}", self.namespace);
        let asked = Request::builder().method(method).uri(path).header("content-type", "application/json");
        let body = body.map(|body| body.to_string().into_bytes()).unwrap_or_default();
        self.admin.request(asked.body(body).expect("a request")).await
    }

    fn plain(&self, does: Does) -> Spec {
        Spec {
            key: format!("agent-{}", &uuid::Uuid::now_v7().simple().to_string()[12..]),
            image: self.image.clone(),
            command: command(does),
            env: BTreeMap::new(),
            secrets: BTreeMap::new(),
            // Several are there at once, on whatever node there is.
            size: if self.claims { Size::default() } else { Size { cpu_milli: 50, memory_mib: 32, disk_mib: 64 } },
            ports: Vec::new(),
            labels: BTreeMap::from([(String::from("team"), String::from("a&b=c d"))]),
            ttl: Duration::from_secs(3600),
            idle: None,
            avoid: Vec::new(),
        }
    }

    /// Templates by what their containers do, and a pool of each.
    async fn install(&self) {
        for does in DONE {
            let name = template(does);
            let container = json!({"name": "theirs", "image": self.image, "command": command(does),
                "securityContext": {"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}},
                "resources": {"limits": {"cpu": "50m", "memory": "32Mi"}, "requests": {"cpu": "50m", "memory": "32Mi"}}});
            let security = json!({"runAsUser": USER, "runAsNonRoot": true, "seccompProfile": {"type": "RuntimeDefault"}});
            let spec = json!({"podTemplate": {"spec": {"containers": [container], "securityContext": security, "terminationGracePeriodSeconds": 60}}});
            let pool = json!({"replicas": u8::from(does == Does::Wait), "sandboxTemplateRef": {"name": name}});
            for (kind, plural, name, spec) in [
                ("SandboxTemplate", "sandboxtemplates", name.clone(), spec),
                ("SandboxWarmPool", "sandboxwarmpools", format!("{name}-pool"), pool),
            ] {
                let body = json!({"apiVersion": EXTENSIONS, "kind": kind, "metadata": {"name": name}, "spec": spec});
                match self.ask(Method::POST, &format!("apis/{EXTENSIONS}/{plural}"), "", Some(body)).await {
                    Err(kube_client::Error::Api(said)) if said.code == 409 => {}
                    made => drop(made.expect("what is installed")),
                }
            }
        }
    }

    /// Pools first: they would make again what is theirs.
    async fn uninstall(&self) {
        for does in DONE {
            let name = template(does);
            for (plural, name) in [("sandboxwarmpools", format!("/{name}-pool")), ("sandboxtemplates", format!("/{name}"))] {
                drop(self.ask(Method::DELETE, &format!("apis/{EXTENSIONS}/{plural}"), &name, None).await.expect("it was there"));
            }
        }
    }
}

fn template(does: Does) -> String {
    match does {
        Does::Wait => String::from("test-waits"),
        Does::Ignore => String::from("test-ignores"),
        Does::Exit(code) => format!("test-exits-{code}"),
        Does::Serve(port) => format!("test-serves-{port}"),
    }
}

#[async_trait]
impl World for Cluster {
    fn spec(&self, does: Does) -> Option<Spec> {
        let spec = self.plain(does);
        Some(if self.claims { Spec { image: template(does), command: Vec::new(), ..spec } } else { spec })
    }

    fn price_usd(&self) -> f64 {
        0.031611 + 0.004237
    }

    fn page(&self) -> Option<usize> {
        None
    }

    fn arm(&self, _call: Call, _fault: Fault) -> bool {
        false
    }

    fn armed(&self) -> usize {
        0
    }

    async fn count(&self, key: &str) -> usize {
        let mut all = 0;
        for kind in KINDS {
            // What the cluster does not know is not there.
            let Ok(list) = self.ask(Method::GET, kind, &format!("?labelSelector={KEY_LABEL}%3D{key}"), None).await else {
                continue;
            };
            let controlled = |object: &&Value| object["metadata"]["ownerReferences"][0]["controller"] == true;
            all += list["items"].as_array().expect("a list").iter().filter(|object| !controlled(object)).count();
        }
        all
    }

    async fn listens(&self, native: &str) {
        for _ in 0..600 {
            let said = self.provider.logs(native, 100).await;
            if said.is_ok_and(|said| String::from_utf8_lossy(&said).contains("ready")) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        panic!("it is not ready");
    }
}

#[tokio::test]
async fn pods_do_what_every_provider_must() {
    let Some(cluster) = Cluster::find("pods", json!({})).await else { return };
    conformance::run(&cluster.provider, &cluster).await;
}

#[tokio::test]
async fn jobs_do_what_every_provider_must() {
    let Some(cluster) = Cluster::find("jobs", json!({ "backend": "job" })).await else { return };
    conformance::run(&cluster.provider, &cluster).await;
}

#[tokio::test]
async fn sandboxes_do_what_every_provider_must() {
    let Some(cluster) = Cluster::find("sandboxes", json!({ "backend": "sandbox", "keep": { "/data": "1Gi" } })).await else {
        return;
    };
    if cluster.has_sandboxes("sandboxes").await {
        conformance::run(&cluster.provider, &cluster).await;
    }
}

#[tokio::test]
async fn claims_do_what_every_provider_must() {
    let Some(cluster) = Cluster::find("claims", json!({ "backend": "claim" })).await else { return };
    if cluster.has_sandboxes("claims").await {
        cluster.install().await;
        conformance::run(&cluster.provider, &cluster).await;
        cluster.uninstall().await;
    }
}
