//! A Kubernetes cluster: a container is a pod, a Job of one pod or, where kubernetes-sigs/agent-sandbox is installed, a Sandbox around one, or what is
//! claimed from a pool of them.
//!
//! A pod is not stopped, it is deleted with a grace; and it runs once. What ends by itself stays until it is deleted, with its log and exit code.
//! A life is counted by the cluster: `activeDeadlineSeconds` by kubelet, from when it has taken the pod, and of a Job by its controller, as
//! `shutdownTime` of a Sandbox by its own.

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use axum::http::Method;
use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};
use jiff::Timestamp;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use self::api::{Answer, Api, Ask, JSON, Kind, MERGE_PATCH};
use self::claim::{Claim, WarmPool};
use self::inside::Forwards;
use self::job::Job;
use self::notes::Notes;
use self::state::{Container, Custom, Event, List, Meta, Pod};
use super::secret::{self, Value as Open};
use super::{
    Bounds, Capabilities, Endpoint, Error, Exec, Executed, FLEET_LABEL, Happened, KEY_LABEL, Page, Pause, Price, Provider,
    Result, SESSION_LABEL, Sandbox, Size, Spec, State, docker, refusals, rest,
};

mod api;
mod claim;
mod inside;
mod job;
mod notes;
mod pod;
mod state;

const NAME: &str = "kubernetes";
const PAGE: u16 = 100;
/// Kubernetes counts a life in 31 bits.
const TTL_MOST: Duration = Duration::from_secs(i32::MAX as u64);
/// How long a Job that has ended is there, if nobody deletes it: longer than a fleet is away, mostly. It holds nothing but its log.
const FINISHED_SECONDS: u32 = 24 * 3600;
const FINISHED_LEAST: u32 = 60;
/// The least that a pod is given to end in. Nothing at all would be to forget it, whether it has ended or not.
const AT_ONCE: u64 = 1;
/// After so long the API server ends a watch; a connection that is dead without a word is noticed a little later.
const WATCH: Duration = Duration::from_secs(600);
const WATCH_SLACK: Duration = Duration::from_secs(60);
/// A line of a watch is an object.
const LINE_MOST: usize = 4 << 20;

/// How pods are made, and where.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Not said: the service account of the pod that the fleet runs in.
    pub kubeconfig: Option<PathBuf>,
    /// Of the kubeconfig. Not said: its current one.
    pub context: Option<String>,
    /// Not said: the context's, or the service account's.
    pub namespace: Option<String>,
    pub backend: Backend,
    /// Of claims: the SandboxWarmPool that they are taken from. Not said: the first of the template that a session's `image` names.
    pub warm_pool: Option<String>,
    /// Where ports are reached. Not said: at the pod by whoever runs in the cluster, else forwarded.
    pub reach: Option<Reach>,
    /// Of the pods. Its token is not given to them.
    pub service_account: Option<String>,
    pub runtime_class: Option<String>,
    pub priority_class: Option<String>,
    pub node_selector: BTreeMap<String, String>,
    /// Of the pods, as Kubernetes writes it.
    pub affinity: Option<Value>,
    pub tolerations: Vec<Toleration>,
    /// Names of secrets of the namespace that images are pulled with.
    pub pull_secrets: Vec<String>,
    pub pull: Option<Pull>,
    pub annotations: BTreeMap<String, String>,
    /// Not said: the image's, as a number.
    pub user: Option<u32>,
    /// Of the processes, and of what is written to volumes.
    pub group: Option<u32>,
    pub non_root: bool,
    pub cap_add: Vec<String>,
    pub read_only: bool,
    /// Directories that can be written to, and go with the pod.
    pub writable: Vec<String>,
    /// Directories that are there again after a pause, with their sizes: `/data = "10Gi"`. Sandboxes alone have them.
    pub keep: BTreeMap<String, String>,
    pub storage_class: Option<String>,
    /// Of Jobs: how long one that has ended stays if the fleet does not remove it. Not said: a day.
    pub finished_seconds: Option<u32>,
    /// An image whose entry point is `agent-sidecar`: `hub` runs beside the agent, from before it begins until after it has ended.
    pub sidecar_image: Option<String>,
    /// Of the nodes: USD per hour for a CPU, and for a GiB of memory.
    pub cpu_usd_per_hour: f64,
    pub gib_usd_per_hour: f64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            kubeconfig: None,
            context: None,
            namespace: None,
            backend: Backend::Pod,
            warm_pool: None,
            reach: None,
            service_account: None,
            runtime_class: None,
            priority_class: None,
            node_selector: BTreeMap::new(),
            affinity: None,
            tolerations: Vec::new(),
            pull_secrets: Vec::new(),
            pull: None,
            annotations: BTreeMap::new(),
            user: None,
            group: None,
            non_root: true,
            cap_add: Vec::new(),
            read_only: false,
            writable: vec![String::from("/tmp")],
            keep: BTreeMap::new(),
            storage_class: None,
            finished_seconds: None,
            sidecar_image: None,
            cpu_usd_per_hour: docker::OPENCOST.0,
            gib_usd_per_hour: docker::OPENCOST.1,
        }
    }
}

/// What a container is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    Pod,
    /// `batch/v1`, of one pod that is never made again.
    Job,
    /// `agents.x-k8s.io/v1beta1`, which must be installed.
    Sandbox,
    /// A SandboxClaim of `extensions.agents.x-k8s.io/v1beta1`: `image` names a SandboxTemplate.
    Claim,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reach {
    /// At the pod's own address.
    Pod,
    /// At a port of this machine's loopback, through the API server.
    Forward,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub enum Pull {
    Always,
    IfNotPresent,
    Never,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Toleration {
    #[serde(default)]
    pub key: Option<String>,
    /// Not said: whatever value the taint has.
    #[serde(default)]
    pub value: Option<String>,
    /// Not said: every effect.
    #[serde(default)]
    pub effect: Option<Effect>,
    /// How long `NoExecute` is borne.
    #[serde(default)]
    pub seconds: Option<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub enum Effect {
    NoSchedule,
    PreferNoSchedule,
    NoExecute,
}

impl Toleration {
    fn object(&self) -> Value {
        let operator = if self.value.is_some() { "Equal" } else { "Exists" };
        let mut object = json!({ "operator": operator });
        for (name, value) in [
            ("key", json!(self.key)),
            ("value", json!(self.value)),
            ("effect", json!(self.effect)),
            ("tolerationSeconds", json!(self.seconds)),
        ] {
            if !value.is_null() {
                object[name] = value;
            }
        }
        object
    }
}

impl Settings {
    /// A sentence about the first that cannot be meant.
    fn wrong(&self) -> Option<String> {
        let absolute = |at: &String| at.starts_with('/') && at.len() > 1;
        let sandbox = self.backend == Backend::Sandbox;
        if !self.keep.is_empty() && !sandbox {
            return Some(String::from("`keep` is for `backend = \"sandbox\"`: a pod is never paused"));
        }
        if self.finished_seconds.is_some() && self.backend != Backend::Job {
            return Some(String::from("`finished_seconds` is for `backend = \"job\"`: nobody else removes what has ended"));
        }
        // Between its end and the fleet's next look there are a log and an exit code to be read.
        if self.finished_seconds.is_some_and(|seconds| seconds < FINISHED_LEAST || i32::try_from(seconds).is_err()) {
            return Some(format!("`finished_seconds` is {FINISHED_LEAST} to {}", i32::MAX));
        }
        if !self.keep.is_empty() && self.group.is_none() {
            return Some(String::from("`keep` needs `group`: who is not root can write to a new volume by its group alone"));
        }
        if let Some(at) = self.writable.iter().chain(self.keep.keys()).find(|at| !absolute(at)) {
            return Some(format!("`{at}` is no directory: write it from the root"));
        }
        if let Some(at) = self.writable.iter().find(|at| self.keep.contains_key(*at)) {
            return Some(format!("`{at}` is in `writable` and in `keep`: it is there again or not"));
        }
        if self.user == Some(0) && self.non_root {
            return Some(String::from("`user` is 0, and `non_root` is on"));
        }
        if let Some(affinity) = &self.affinity {
            let required = affinity.pointer("/nodeAffinity/requiredDuringSchedulingIgnoredDuringExecution");
            let terms = |required: &Value| required["nodeSelectorTerms"].as_array().is_some_and(|terms| !terms.is_empty());
            if !affinity.is_object() || required.is_some_and(|required| !terms(required)) {
                return Some(String::from(
                    "`affinity` is a table as a pod has it, and what it requires of nodes has `nodeSelectorTerms`",
                ));
            }
        }
        for bears in &self.tolerations {
            if bears.seconds.is_some() && bears.effect != Some(Effect::NoExecute) {
                return Some(String::from(
                    "`seconds` of a toleration is for `effect = \"NoExecute\"`: a cluster refuses it with any other",
                ));
            }
            if bears.value.is_some() && bears.key.as_ref().is_none_or(String::is_empty) {
                return Some(String::from("`value` of a toleration is of a `key`: a cluster refuses it without"));
            }
        }
        if self.warm_pool.is_some() && self.backend != Backend::Claim {
            return Some(String::from("`warm_pool` is for `backend = \"claim\"`"));
        }
        if self.backend == Backend::Claim {
            let Settings { kubeconfig, context, namespace, backend, reach, warm_pool, .. } = self.clone();
            let (cpu_usd_per_hour, gib_usd_per_hour) = (self.cpu_usd_per_hour, self.gib_usd_per_hour);
            let own = Self {
                kubeconfig,
                context,
                namespace,
                backend,
                reach,
                warm_pool,
                cpu_usd_per_hour,
                gib_usd_per_hour,
                ..Self::default()
            };
            if *self != own {
                return Some(String::from(
                    "with `backend = \"claim\"` the SandboxTemplate says what a pod is: leave out all but `kubeconfig`, `context`, `namespace`, `reach`, `warm_pool` and the prices",
                ));
            }
        }
        if self.context.is_some() && self.kubeconfig.is_none() {
            return Some(String::from("`context` is one of a `kubeconfig`, which is not named"));
        }
        None
    }
}

pub struct Kubernetes {
    settings: Settings,
    api: Arc<Api>,
    forwards: Forwards,
    notes: Notes,
}

impl Kubernetes {
    /// Touches nothing: the cluster may come later.
    ///
    /// # Errors
    /// A sentence that says which setting is wrong.
    pub fn new(settings: Settings) -> std::result::Result<Self, String> {
        if let Some(wrong) = settings.wrong() {
            return Err(wrong);
        }
        let api = Api::new(settings.kubeconfig.clone(), settings.context.clone(), settings.namespace.clone());
        Ok(Self { settings, api: Arc::new(api), forwards: Forwards::default(), notes: Notes::default() })
    }

    fn kind(&self) -> Kind {
        match self.settings.backend {
            Backend::Pod => Kind::Pods,
            Backend::Job => Kind::Jobs,
            Backend::Sandbox => Kind::Sandboxes,
            Backend::Claim => Kind::Claims,
        }
    }

    fn refused(&self, what: impl Into<String>) -> Error {
        Error::Refused { provider: NAME, what: what.into() }
    }

    fn failed(&self, what: impl Into<String>) -> Error {
        Error::Failed { provider: NAME, what: what.into() }
    }

    /// One of them, if it is there.
    async fn find<T: DeserializeOwned>(&self, kind: Kind, name: &str) -> Result<Option<T>> {
        let answer = self.api.get(kind, &[name]).send().await?;
        if answer.is_missing() {
            return Ok(None);
        }
        answer.ok()?.json().map(Some)
    }

    /// What is told of it, with the pod that is in it.
    async fn look(&self, native: &str) -> Result<Option<(Sandbox, Option<Pod>)>> {
        match self.settings.backend {
            Backend::Pod => Ok(self.find::<Pod>(Kind::Pods, native).await?.map(|pod| (pod.sandbox(), Some(pod)))),
            Backend::Job => {
                let Some(job) = self.find::<Job>(Kind::Jobs, native).await? else { return Ok(None) };
                let pod = job.pod(self.pods_of(native).await?);
                Ok(Some((job.with(pod.as_ref()), pod)))
            }
            Backend::Sandbox => {
                let Some(custom) = self.find::<Custom>(Kind::Sandboxes, native).await? else { return Ok(None) };
                let pod = self.find::<Pod>(Kind::Pods, custom.pod_name()).await?;
                Ok(Some((custom.with(pod.as_ref()), pod)))
            }
            Backend::Claim => {
                let Some(claim) = self.find::<Claim>(Kind::Claims, native).await? else { return Ok(None) };
                let custom = self.claimed(&claim).await?;
                let pod = match &custom {
                    Some(custom) => self.find::<Pod>(Kind::Pods, custom.pod_name()).await?,
                    None => None,
                };
                let pod = pod.map(|pod| pod.claimed_at(claim.metadata.created()));
                Ok(Some((claim.with(custom.as_ref(), pod.as_ref()), pod)))
            }
        }
    }

    /// The pods that say that they are of this Job: one, or two while it is suspended and let go again.
    async fn pods_of(&self, job: &str) -> Result<Vec<Pod>> {
        let ask = self.api.get(Kind::Pods, &[]).query("labelSelector", job::selector(job)).query("limit", PAGE.to_string());
        Ok(ask.send().await?.ok()?.json::<List<Pod>>()?.items)
    }

    /// The Sandbox that a claim has, if it is its own by now.
    async fn claimed(&self, claim: &Claim) -> Result<Option<Custom>> {
        let Some(name) = claim.bound() else { return Ok(None) };
        let custom = self.find::<Custom>(Kind::Sandboxes, name).await?;
        Ok(custom.filter(|custom| custom.metadata.is_owned_by(&claim.metadata.uid)))
    }

    /// The pool that a container of this template is claimed from.
    async fn pool_of(&self, template: &str) -> Result<String> {
        let mut next = String::new();
        let mut fits = None;
        loop {
            let ask = self.api.get(Kind::WarmPools, &[]).query("limit", PAGE.to_string());
            let ask = if next.is_empty() { ask } else { ask.query("continue", next) };
            let list: List<WarmPool> = ask.send().await?.ok()?.json()?;
            for pool in list.items {
                let name = pool.metadata.name.as_str();
                match &self.settings.warm_pool {
                    Some(wanted) if name == wanted && pool.template() != template => {
                        let what =
                            format!("SandboxWarmPool `{name}` is of the template `{}`, not of `{template}`", pool.template());
                        return Err(self.refused(what));
                    }
                    Some(wanted) if name != wanted => {}
                    _ if pool.template() == template => fits = fits.or(Some(pool.metadata.name)),
                    _ => {}
                }
            }
            next = list.metadata.r#continue;
            if fits.is_some() || next.is_empty() {
                break;
            }
        }
        let Some(pool) = fits else {
            return Err(self.refused(match &self.settings.warm_pool {
                Some(wanted) => format!("there is no SandboxWarmPool `{wanted}`"),
                None => format!(
                    "there is no SandboxWarmPool of the template `{template}`: a claim needs one, if only with `replicas: 0`"
                ),
            }));
        };
        // Without it the controller would wait, and we with it.
        match self.find::<serde::de::IgnoredAny>(Kind::Templates, template).await? {
            Some(_) => Ok(pool),
            None => Err(self.refused(format!("there is no SandboxTemplate `{template}`"))),
        }
    }

    async fn present(&self, native: &str) -> Result<(Sandbox, Option<Pod>)> {
        self.look(native).await?.ok_or(Error::Missing { provider: NAME })
    }

    /// The name of the pod that runs.
    async fn running(&self, native: &str) -> Result<Pod> {
        match self.present(native).await? {
            (Sandbox { state: State::Running, .. }, Some(pod)) => Ok(pod),
            (Sandbox { state, reason, .. }, _) => {
                let why = reason.map_or_else(String::new, |reason| format!(" ({reason})"));
                Err(self.failed(format!("it does not run, it is {state:?}{why}")))
            }
        }
    }

    async fn at(&self, native: &str, pod: &Pod, port: u16) -> Result<Endpoint> {
        let at = match self.reach() {
            Reach::Forward => self.forwards.open(&self.api, native, &pod.metadata.name, port).await?,
            Reach::Pod => {
                let ip = pod.status.pod_ip.parse().map_err(|_| self.failed("it has no address yet"))?;
                std::net::SocketAddr::new(ip, port)
            }
        };
        Ok(Endpoint { url: format!("http://{at}"), headers: Vec::new() })
    }

    /// What was made, or was there before, if it is ours.
    async fn made(&self, spec: &Spec, answer: Answer, values: &BTreeMap<String, Open>) -> Result<Sandbox> {
        #[derive(Default, Deserialize)]
        #[serde(default)]
        struct Anything {
            metadata: Meta,
        }
        let head = answer.json::<Anything>()?.metadata;
        let labels = head.labels();
        if labels.get(KEY_LABEL) != Some(&spec.key)
            || labels.get(FLEET_LABEL) != spec.labels.get(FLEET_LABEL)
            || head.is_controlled()
        {
            return Err(self.refused(format!("there is something called `{}` already, and it is not this fleet's", spec.key)));
        }
        if head.is_leaving() {
            return Err(self.failed(format!("`{}` of before is still being removed", spec.key)));
        }
        let secret_of = |agent: Option<&Container>| {
            let used = agent?.env.iter().filter(|variable| values.contains_key(&variable.name));
            used.filter_map(|variable| Some(variable.value_from.as_ref()?.secret_key_ref.as_ref()?.name.clone())).next()
        };
        let (sandbox, secret) = match self.settings.backend {
            Backend::Pod => {
                let pod: Pod = answer.json()?;
                (pod.sandbox(), secret_of(pod.agent_spec()).filter(|_| !pod.is_over()))
            }
            Backend::Job => {
                let job: Job = answer.json()?;
                (job.with(None), secret_of(job.agent_spec()).filter(|_| !job.is_over()))
            }
            Backend::Sandbox => {
                let custom: Custom = answer.json()?;
                (custom.sandbox(), secret_of(custom.agent_spec()))
            }
            Backend::Claim => (answer.json::<Claim>()?.sandbox(), None),
        };
        if let Some(name) = secret {
            // It belongs to what is there already, so that none is left of a fleet that dies in between; the container waits for it.
            let body = pod::secrets(&self.settings, spec, &name, &head.uid, values);
            let hide = values.values().map(|value| value.expose().to_owned());
            let told = self.create_in(Kind::Secrets, &body).hide(hide).send().await?;
            // Its name is known to nobody else: it is from before, and the same.
            if !told.exists() {
                told.ok()?;
            }
        }
        Ok(sandbox)
    }

    fn create_in<'a>(&'a self, kind: Kind, body: &Value) -> Ask<'a> {
        let ask = self.api.ask(Method::POST, kind, &[]).body(JSON, body);
        // A field that the cluster does not know is a rule that nobody keeps.
        ask.query("fieldManager", "agent-fleet").query("fieldValidation", "Strict")
    }

    async fn remove(&self, kind: Kind, name: &str, options: Value) -> Result<()> {
        let mut body = json!({ "apiVersion": "v1", "kind": "DeleteOptions" });
        for (name, value) in options.as_object().into_iter().flatten() {
            body[name] = value.clone();
        }
        let answer = self.api.ask(Method::DELETE, kind, &[name]).body(JSON, &body).send().await?;
        if answer.is_missing() { Ok(()) } else { answer.ok().map(drop) }
    }

    /// It is told to end, and is there until it has.
    async fn end(&self, native: &str, seconds: u64) -> Result<()> {
        // The controllers let alone what is being deleted; else they would make the pod anew.
        let foreground = || json!({ "propagationPolicy": "Foreground" });
        let pod = match self.settings.backend {
            Backend::Pod => Some(native.to_owned()),
            Backend::Job => match self.find::<Job>(Kind::Jobs, native).await? {
                Some(job) => {
                    // Its pod first, with our grace: the cluster's own does not change it, and there is no second pod.
                    let first = job.pod(self.pods_of(native).await?).map(|pod| pod.metadata.name);
                    if let Some(pod) = &first {
                        self.remove(Kind::Pods, pod, json!({ "gracePeriodSeconds": seconds })).await?;
                    }
                    self.remove(Kind::Jobs, native, foreground()).await?;
                    // One that was made between the two.
                    let last = job.pod(self.pods_of(native).await?).map(|pod| pod.metadata.name);
                    last.filter(|pod| first.as_ref() != Some(pod))
                }
                None => None,
            },
            Backend::Sandbox => match self.find::<Custom>(Kind::Sandboxes, native).await? {
                Some(custom) => {
                    self.remove(Kind::Sandboxes, native, foreground()).await?;
                    Some(custom.pod_name().to_owned())
                }
                None => None,
            },
            Backend::Claim => match self.find::<Claim>(Kind::Claims, native).await? {
                Some(_) => {
                    self.remove(Kind::Claims, native, foreground()).await?;
                    // What it had been given until then.
                    let claim = self.find::<Claim>(Kind::Claims, native).await?.unwrap_or_default();
                    match self.claimed(&claim).await? {
                        Some(custom) => {
                            self.remove(Kind::Sandboxes, &custom.metadata.name, foreground()).await?;
                            Some(custom.pod_name().to_owned())
                        }
                        None => None,
                    }
                }
                None => None,
            },
        };
        if let Some(pod) = pod {
            self.remove(Kind::Pods, &pod, json!({ "gracePeriodSeconds": seconds })).await?;
        }
        self.forwards.close(native);
        Ok(())
    }

    async fn operate(&self, native: &str, mode: &str) -> Result<()> {
        self.change(native, &json!({ "operatingMode": mode })).await
    }

    async fn change(&self, native: &str, spec: &Value) -> Result<()> {
        let body = json!({ "spec": spec });
        let ask = self.api.ask(Method::PATCH, Kind::Sandboxes, &[native]).query("fieldManager", "agent-fleet");
        ask.body(MERGE_PATCH, &body).send().await?.ok().map(drop)
    }

    /// What its next pod is made of, which knows the nodes that were not to be used when it was made. The pod that is there is left as it is.
    fn placed(&self, avoid: &[String]) -> Value {
        let required = pod::required(self.settings.affinity.as_ref(), avoid);
        json!({ "spec": { "affinity": { "nodeAffinity": { pod::REQUIRED: required } } } })
    }

    fn can_pause(&self) -> bool {
        self.settings.backend == Backend::Sandbox && !self.settings.keep.is_empty()
    }

    fn no_pause<T>(&self, verb: &'static str) -> Result<T> {
        let hint = "backend = \"sandbox\" can, with directories to `keep`";
        Err(Error::Unsupported { provider: NAME, verb, hint: Some(hint) })
    }

    fn reach(&self) -> Reach {
        self.settings.reach.unwrap_or(if self.settings.kubeconfig.is_some() { Reach::Forward } else { Reach::Pod })
    }

    async fn watch(&self, selector: &str, version: &str) -> Result<BoxStream<'static, Result<Vec<u8>>>> {
        let ask = self.api.get(self.kind(), &[]).query("watch", "true").query("allowWatchBookmarks", "true");
        let ask = ask.query("labelSelector", selector).query("resourceVersion", version);
        Ok(ask.query("timeoutSeconds", WATCH.as_secs().to_string()).stream().await?.boxed())
    }
}

#[async_trait]
impl Provider for Kubernetes {
    fn name(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> Capabilities {
        // Of what is claimed, all this is the template's.
        let ours = self.settings.backend != Backend::Claim;
        Capabilities {
            command: ours,
            env: ours,
            provider_secrets: ours,
            size: ours,
            ports: true,
            list: true,
            ttl: Some(Bounds { least: Duration::from_secs(1), most: TTL_MOST }),
            idle_timer: false,
            pause: if self.can_pause() { Pause::Disk } else { Pause::No },
            exec: true,
            logs: true,
            events: true,
            endpoint: true,
            traffic_keeps_awake: false,
            nodes: ours,
        }
    }

    fn price(&self, size: Size) -> Price {
        let Settings { cpu_usd_per_hour, gib_usd_per_hour, .. } = self.settings;
        let beside = self.settings.sidecar_image.as_ref().map_or((0, 0, 0), |_| pod::SIDECAR_SIZE);
        let cpus = f64::from(size.cpu_milli + beside.0) / 1000.0;
        let gib = f64::from(size.memory_mib + beside.1) / 1024.0;
        let source = match (cpu_usd_per_hour, gib_usd_per_hour) == docker::OPENCOST {
            true => "OpenCost's default.json, read 2026-11-23",
            false => "the configuration",
        };
        // What has ended or sleeps holds no CPU and no memory. The price of its volume is not known.
        Price { running: cpus * cpu_usd_per_hour + gib * gib_usd_per_hour, paused: 0.0, stopped: 0.0, source: source.to_owned() }
    }

    async fn create(&self, spec: &Spec) -> Result<Sandbox> {
        let wrong = refusals(&self.capabilities(), spec);
        if !wrong.is_empty() {
            return Err(self.refused(wrong.join("; ")));
        }
        let values = secret::read_all(NAME, spec)?;
        // Of these letters all are random.
        let unique = uuid::Uuid::now_v7().simple().to_string().split_off(20);
        let ends = Timestamp::now().checked_add(spec.ttl).unwrap_or(Timestamp::MAX);
        let body = match self.settings.backend {
            Backend::Claim if !spec.command.is_empty() => {
                return Err(self.refused("what is claimed runs what its SandboxTemplate says: leave `command` out"));
            }
            Backend::Claim => claim::object(spec, &self.pool_of(&spec.image).await?, ends),
            Backend::Pod | Backend::Job | Backend::Sandbox => {
                pod::object(&self.settings, spec, &format!("{}-{unique}", spec.key), ends)?
            }
        };
        let answer = self.create_in(self.kind(), &body).send().await?;
        if !answer.exists() {
            return self.made(spec, answer.ok()?, &values).await;
        }
        let known = self.api.get(self.kind(), &[&spec.key]).send().await?;
        let away = || self.failed(format!("`{}` was there, and is no more", spec.key));
        if known.is_missing() {
            return Err(away());
        }
        self.made(spec, known.ok()?, &values).await?;
        // Of one that was there, its pod says more than its controller has by now.
        Ok(self.look(&spec.key).await?.ok_or_else(away)?.0)
    }

    /// It is started by the cluster.
    async fn start(&self, native: &str) -> Result<()> {
        match self.present(native).await?.0.state {
            State::Stopped | State::Failed => Err(self.refused("it has ended, and a pod runs once")),
            State::Paused | State::Pausing if self.settings.backend == Backend::Claim => self.no_pause("resume a claim"),
            State::Paused | State::Pausing => self.operate(native, "Running").await,
            _ => Ok(()),
        }
    }

    async fn state(&self, native: &str) -> Result<Sandbox> {
        let Some((sandbox, pod)) = self.look(native).await? else {
            self.forwards.close(native);
            self.notes.forget(native);
            // What has ended is there until somebody removes it: whether that was us, or its time for that has come, is for who asks.
            let disrupted = Some(String::from("it is gone, and was not removed by the fleet"));
            let reason = self.forgets().map(|after| {
                format!("it is gone, as a Job is {} s after its end, and how it ended was not seen", after.as_secs())
            });
            return Ok(Sandbox { reason, disrupted, ..rest::missing(native) });
        };
        if sandbox.state != State::Creating || sandbox.reason.is_some() {
            self.notes.forget(native);
            return Ok(sandbox);
        }
        // By whoever makes it, or has it.
        let about = match (&pod, self.settings.backend) {
            (Some(pod), _) => ("Pod", pod.metadata.name.as_str()),
            (None, Backend::Pod) => ("Pod", native),
            (None, Backend::Job) => ("Job", native),
            (None, Backend::Sandbox) => ("Sandbox", native),
            (None, Backend::Claim) => ("SandboxClaim", native),
        };
        Ok(Sandbox { reason: self.notes.of(&self.api, native, about).await, ..sandbox })
    }

    /// The cluster removes a Job some time after its end.
    fn forgets(&self) -> Option<Duration> {
        let seconds = self.settings.finished_seconds.unwrap_or(FINISHED_SECONDS);
        (self.settings.backend == Backend::Job).then(|| Duration::from_secs(u64::from(seconds)))
    }

    async fn list(&self, labels: &BTreeMap<String, String>, page: Option<&str>) -> Result<Page> {
        let ask = |from: Option<&str>| {
            let ask =
                self.api.get(self.kind(), &[]).query("labelSelector", pod::selector(labels)).query("limit", PAGE.to_string());
            match from {
                Some(from) => ask.query("continue", from),
                None => ask,
            }
        };
        let mut answer = ask(page).send().await?;
        // A list that took too long goes on as it is now: what was there all the time is on it once.
        if let Some(from) = answer.goes_on().map(str::to_owned) {
            answer = ask(Some(&from)).send().await?;
        }
        let answer = answer.ok()?;
        let List::<Value> { metadata, items } = answer.json()?;
        let (found, unread) = match self.settings.backend {
            Backend::Pod => told(&items, |pod: &Pod| !pod.metadata.is_controlled(), Pod::sandbox),
            Backend::Job => told(&items, |job: &Job| !job.metadata.is_controlled(), Job::sandbox),
            Backend::Sandbox => told(&items, |_| true, Custom::sandbox),
            Backend::Claim => told(&items, |_| true, Claim::sandbox),
        };
        // Two values may have one hash, however unlikely that is.
        let fits = |one: &Sandbox| labels.iter().all(|(name, value)| one.labels.get(name) == Some(value));
        let next = Some(metadata.r#continue).filter(|next| !next.is_empty());
        Ok(Page { sandboxes: found.into_iter().filter(fits).collect(), unread, next })
    }

    async fn exec(&self, native: &str, command: &Exec) -> Result<Executed> {
        rest::check_names(NAME, &command.env)?;
        let pod = self.running(native).await?;
        let mark = format!("{}={}", docker::EXEC_MARK, uuid::Uuid::now_v7());
        let mut argv: Vec<String> = match command.detached {
            true => ["sh", "-c", "exec \"$@\" >/dev/null 2>&1 </dev/null &", "sh"].map(String::from).to_vec(),
            false => Vec::new(),
        };
        argv.extend([String::from("env"), mark.clone()]);
        argv.extend(command.env.iter().map(|(name, value)| format!("{name}={value}")));
        argv.extend(command.argv.iter().cloned());
        let path = [pod.metadata.name.as_str(), "exec"];
        let ask = |argv: &[String]| {
            let ask = self.api.get(Kind::Pods, &path).query("container", pod.agent_name());
            argv.iter().fold(ask, |ask, word| ask.query("command", word.as_str()))
        };
        let mut done = Executed::default();
        let stdin = if command.detached { &[][..] } else { &command.stdin[..] };
        match tokio::time::timeout(command.timeout, inside::run(&self.api, ask(&argv), stdin, &mut done)).await {
            Ok(Ok(())) => Ok(done),
            Ok(Err(error)) => Err(error),
            // Who hangs up ends nothing.
            Err(_) => {
                let end = ["sh", "-c", docker::END_MARKED, "sh", &mark].map(String::from);
                let ended =
                    tokio::time::timeout(WATCH_SLACK, inside::run(&self.api, ask(&end), &[], &mut Executed::default())).await;
                if !matches!(ended, Ok(Ok(()))) {
                    tracing::warn!(provider = NAME, native, ?ended, "a command that takes too long could not be ended");
                }
                Ok(Executed { exit_code: None, ..done })
            }
        }
    }

    async fn logs(&self, native: &str, most: usize) -> Result<Vec<u8>> {
        let pod = match self.present(native).await? {
            (_, Some(pod)) => pod,
            // It sleeps, or is about to be made.
            (_, None) => return Ok(Vec::new()),
        };
        let path = [pod.metadata.name.as_str(), "log"];
        // A line has a byte or more. Counted in bytes, it would be the beginning.
        let ask = self.api.get(Kind::Pods, &path).query("container", pod.agent_name()).query("tailLines", most.to_string());
        let read = async {
            let mut pieces = match ask.stream().await {
                Ok(pieces) => pieces.boxed(),
                // Nothing of it has begun.
                Err(Error::Refused { what, .. }) if what.contains("waiting to start") || what.contains("not available") => {
                    return Ok(Vec::new());
                }
                Err(error) => return Err(error),
            };
            let mut last = Vec::new();
            while let Some(piece) = pieces.next().await {
                last.extend_from_slice(&piece?);
                // Now and then, so that not every piece moves the whole.
                if last.len() > 2 * most {
                    last.drain(..last.len() - most);
                }
            }
            last.drain(..last.len().saturating_sub(most));
            Ok(last)
        };
        tokio::time::timeout(WATCH_SLACK, read).await.unwrap_or_else(|_| Err(self.failed("its log does not end")))
    }

    /// There are no timers to move.
    async fn keep_alive(&self, _native: &str, _until: Timestamp) -> Result<()> {
        Ok(())
    }

    async fn pause(&self, native: &str) -> Result<()> {
        if !self.can_pause() {
            return self.no_pause("pause a pod");
        }
        self.forwards.close(native);
        self.operate(native, "Suspended").await
    }

    async fn resume(&self, native: &str, avoid: &[String]) -> Result<()> {
        if !self.can_pause() {
            return self.no_pause("resume a pod");
        }
        self.change(native, &json!({ "operatingMode": "Running", "podTemplate": self.placed(avoid) })).await?;
        // As long as there is one that kubelet has ended its controller makes no other.
        if let (_, Some(pod)) = self.present(native).await?
            && pod.is_over()
        {
            self.remove(Kind::Pods, &pod.metadata.name, json!({ "gracePeriodSeconds": AT_ONCE })).await?;
        }
        Ok(())
    }

    /// The controller of Sandboxes makes a pod anew that is gone, if there is anything to go on with.
    fn places_anew(&self) -> bool {
        self.can_pause()
    }

    async fn avoid(&self, native: &str, nodes: &[String]) -> Result<()> {
        if !self.places_anew() {
            return Ok(());
        }
        self.change(native, &json!({ "podTemplate": self.placed(nodes) })).await
    }

    async fn stop(&self, native: &str, grace: Duration) -> Result<()> {
        // In whole seconds, and never less than asked for.
        let seconds = grace.as_secs() + u64::from(grace.subsec_nanos() > 0);
        // A grace that runs is not made longer. One that is longer is another's: its node is drained, or its Sandbox's own.
        if let Some((sandbox, pod)) = self.look(native).await?
            && sandbox.state == State::Stopping
            && pod.is_none_or(|pod| pod.metadata.grace_seconds().is_none_or(|runs| runs <= seconds))
        {
            return Ok(());
        }
        self.end(native, seconds.max(AT_ONCE)).await
    }

    async fn delete(&self, native: &str) -> Result<()> {
        self.end(native, AT_ONCE).await
    }

    async fn endpoint(&self, native: &str, port: u16) -> Result<Endpoint> {
        self.at(native, &self.running(native).await?, port).await
    }

    async fn last_endpoint(&self, native: &str, port: u16) -> Result<Endpoint> {
        match self.present(native).await? {
            // Its agent may have ended: a sidecar beside it ends after it.
            (Sandbox { state: State::Running | State::Stopping, .. }, Some(pod)) if pod.runs() => {
                self.at(native, &pod, port).await
            }
            _ => Err(self.failed("it has ended")),
        }
    }

    async fn events(&self, labels: &BTreeMap<String, String>) -> Result<BoxStream<'static, Result<Happened>>> {
        let selector = pod::selector(labels);
        // From now on: of all that there is only where the list ends is asked for.
        let now = self.api.get(self.kind(), &[]).query("labelSelector", selector.as_str()).query("limit", "1").send().await?;
        let now: List<serde::de::IgnoredAny> = now.ok()?.json()?;
        let pieces = self.watch(&selector, &now.metadata.resource_version).await?;
        let lines = Lines { pieces, held: Vec::new(), ready: VecDeque::new() };
        let own = !matches!(self.settings.backend, Backend::Pod | Backend::Job);
        Ok(stream::unfold(Some(lines), move |lines| async move {
            let mut lines = lines?;
            loop {
                match lines.next().await {
                    Ok(Some(event)) => match happened(event, own) {
                        Ok(Some(happened)) => return Some((Ok(happened), Some(lines))),
                        Ok(None) => {}
                        Err(error) => return Some((Err(error), None)),
                    },
                    Ok(None) => return None,
                    Err(error) => return Some((Err(error), None)),
                }
            }
        })
        .boxed())
    }
}

/// Of a list's items those that are ours to tell of; and how many cannot be read.
fn told<T: DeserializeOwned>(items: &[Value], own: impl Fn(&T) -> bool, tell: impl Fn(&T) -> Sandbox) -> (Vec<Sandbox>, usize) {
    let (read, unread) = rest::items(NAME, items);
    let found: Vec<Sandbox> = read.iter().filter(|one| own(one)).map(tell).collect();
    // What has no name cannot be asked about.
    let nameless = found.iter().filter(|one| one.native.is_empty()).count();
    (found.into_iter().filter(|one| !one.native.is_empty()).collect(), unread + nameless)
}

/// What a line of a watch is about, if that is anything of ours.
fn happened(event: Event, controlled: bool) -> Result<Option<Happened>> {
    match event.r#type.as_str() {
        "ADDED" | "MODIFIED" | "DELETED" => {}
        // Too old, mostly: 410.
        "ERROR" => {
            let what = format!("the watch ends with {}: {}", event.object.code.unwrap_or(0), api::cut(&event.object.message));
            return Err(Error::Failed { provider: NAME, what });
        }
        _ => return Ok(None),
    }
    let head = event.object.metadata;
    if !controlled && head.is_controlled() {
        return Ok(None);
    }
    let mut labels = head.labels();
    Ok(Some(Happened { native: head.name, key: labels.remove(KEY_LABEL), session: labels.remove(SESSION_LABEL) }))
}

/// A watch, as it comes: each line is an event.
struct Lines {
    pieces: BoxStream<'static, Result<Vec<u8>>>,
    held: Vec<u8>,
    ready: VecDeque<Event>,
}

impl Lines {
    /// `None`: the API server has ended it.
    async fn next(&mut self) -> Result<Option<Event>> {
        let failed = |what: String| Error::Failed { provider: NAME, what };
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Ok(Some(event));
            }
            let next = tokio::time::timeout(WATCH + WATCH_SLACK, self.pieces.next()).await;
            let Some(piece) = next.map_err(|_| failed(String::from("the watch has gone silent")))? else { return Ok(None) };
            self.held.extend_from_slice(&piece?);
            while let Some(end) = self.held.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.held.drain(..=end).collect();
                let event = serde_json::from_slice(&line).map(rest::without_nulls).and_then(serde_json::from_value);
                let event = event.map_err(|error| failed(format!("a watch of another shape: {error}")))?;
                self.ready.push_back(event);
            }
            if self.held.len() > LINE_MOST {
                return Err(failed(format!("a line of more than {LINE_MOST} bytes")));
            }
        }
    }
}
