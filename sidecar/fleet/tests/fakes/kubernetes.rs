//! A cluster of one namespace and two nodes: an API server with its rules, a scheduler, a kubelet that runs pods as processes of this machine, the garbage collector, and the
//! controllers of Jobs and of agent-sandbox.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::http::Response;
use futures_util::future::BoxFuture;
use futures_util::{FutureExt, SinkExt, StreamExt};
use hyper_util::rt::TokioIo;
use jiff::{Timestamp, ToSpan};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::Role;

use super::contract::Contract;
use super::machine::{Machine, kill};
use super::{Api, Content, Reply, Request, TOKEN, Upgraded};
use crate::conformance::Call;

/// However many are asked for: the API server may give fewer.
pub(crate) const PAGE: usize = 2;
pub(crate) const NAMESPACE: &str = "agents";
/// Nobody listens at this port of a pod.
pub(crate) const CLOSED: u16 = 4242;
pub(crate) const NODES: [&str; 2] = ["node-1", "node-2"];

type Sockets = WebSocketStream<TokioIo<hyper::upgrade::Upgraded>>;

pub(crate) struct Kubernetes {
    sandboxes: Contract,
    claims: Contract,
    rights: Vec<Right>,
    used: Mutex<BTreeSet<Right>>,
    /// What is not granted after all.
    denied: Mutex<BTreeSet<Right>>,
    cluster: Arc<Mutex<Cluster>>,
    kubelet: tokio::task::JoinHandle<()>,
    /// What listens in every pod, on every port.
    inside: String,
    /// Who is let in, and what makes it another: a verb.
    token: Mutex<(String, Option<(&'static str, String)>)>,
}

impl Drop for Kubernetes {
    fn drop(&mut self) {
        self.kubelet.abort();
    }
}

/// Group, resource and verb.
pub(crate) type Right = (String, String, String);

/// What deploy/fleet/kubernetes/rbac.yaml grants: its rules are of three lines each.
fn rights() -> Vec<Right> {
    let text = include_str!("../../../../deploy/fleet/kubernetes/rbac.yaml");
    let list = |line: &str| -> Vec<String> {
        let inner = line.split_once('[').and_then(|(_, rest)| rest.split_once(']')).expect("a list on one line").0;
        inner.split(',').map(|word| word.trim().trim_matches('"').to_owned()).collect()
    };
    let (mut groups, mut resources, mut all) = (vec![], vec![], vec![]);
    for line in text.lines().map(str::trim) {
        match line.split(':').next() {
            Some("- apiGroups") => groups = list(line),
            Some("resources") => resources = list(line),
            Some("verbs") => {
                for (group, resource) in groups.iter().flat_map(|group| resources.iter().map(move |one| (group, one))) {
                    all.extend(list(line).into_iter().map(|verb| (group.clone(), resource.clone(), verb)));
                }
            }
            _ => {}
        }
    }
    assert!(all.len() > 10, "{all:?}");
    all
}

/// What has to be granted for this.
fn right(request: &Request) -> Option<Right> {
    let (kind, rest) = place(request)?;
    let group = match request.segments()[..] {
        ["apis", group, ..] => group,
        _ => "",
    };
    let verb = match (request.method.as_str(), rest.len()) {
        ("POST", _) => "create",
        ("PATCH", _) => "patch",
        ("DELETE", _) => "delete",
        (_, 0) if request.query("watch").is_some() => "watch",
        (_, 0) => "list",
        _ => "get",
    };
    let resource = rest.get(1).map_or(kind.to_owned(), |below| format!("{kind}/{below}"));
    Some((group.to_owned(), resource, verb.to_owned()))
}

#[derive(Default)]
struct Cluster {
    version: u64,
    /// By kind and name.
    objects: BTreeMap<(String, String), Value>,
    running: BTreeMap<String, Process>,
    watchers: Vec<Watcher>,
    /// Lists that are under way and have become too old.
    old: Vec<String>,
    /// What containers see of secrets, by their names.
    values: BTreeMap<String, BTreeMap<String, String>>,
    /// Said instead of creating one of a kind.
    refusals: VecDeque<(&'static str, u16, Value)>,
    /// Whoever queues Jobs has a word in the next creation of one.
    queues: bool,
    /// The controller of agent-sandbox says no more.
    behind: bool,
    /// What whoever makes pods for others is told instead.
    held: Option<String>,
    /// Why kubelet does not take the next pod that it is given.
    full: Option<(&'static str, &'static str)>,
}

struct Watcher {
    kind: String,
    selector: Vec<(String, String)>,
    tell: mpsc::UnboundedSender<Vec<u8>>,
}

/// The agent of a pod.
struct Process {
    machine: Arc<Machine>,
    pid: u32,
    log: Arc<Mutex<Vec<u8>>>,
    ended: Arc<Mutex<Option<i32>>>,
    /// When it is killed.
    until: Option<Instant>,
    deadline: Option<Instant>,
}

fn now() -> String {
    Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// As the API server writes it down, whatever was asked for.
fn canonical(amount: &str) -> String {
    let whole = |amount: &str, unit: &str, larger: &str, times: u64| {
        let number: u64 = amount.strip_suffix(unit)?.parse().ok()?;
        number.is_multiple_of(times).then(|| format!("{}{larger}", number / times))
    };
    whole(amount, "m", "", 1000).or_else(|| whole(amount, "Mi", "Gi", 1024)).unwrap_or_else(|| amount.to_owned())
}

/// Variables in values and commands, as kubelet puts them in.
fn expanded(text: &str, env: &BTreeMap<String, String>) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out += &rest[..at];
        let after = &rest[at + 1..];
        if let Some(more) = after.strip_prefix('$') {
            out.push('$');
            rest = more;
        } else if let Some((name, more)) = after.strip_prefix('(').and_then(|inner| inner.split_once(')')) {
            out += &env.get(name).cloned().unwrap_or_else(|| format!("$({name})"));
            rest = more;
        } else {
            out.push('$');
            rest = after;
        }
    }
    out + rest
}

fn selector(text: &str) -> Vec<(String, String)> {
    let pairs = text.split(',').filter(|pair| !pair.is_empty());
    pairs.map(|pair| pair.split_once('=').expect("name=value")).map(|(name, value)| (name.into(), value.into())).collect()
}

fn fits(object: &Value, wanted: &[(String, String)]) -> bool {
    wanted.iter().all(|(name, value)| object["metadata"]["labels"][name] == **value)
}

/// What an event can be asked for by.
fn has_fields(object: &Value, wanted: &[(String, String)]) -> bool {
    let at = |name: &str| object.pointer(&format!("/{}", name.replace('.', "/"))).cloned();
    wanted.iter().all(|(name, value)| at(name) == Some(json!(value)))
}

fn status(code: u16, reason: &str, message: &str, kind: &str) -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message, "reason": reason,
        "details": {"kind": kind}, "code": code})
}

/// What the API server would not have for a label.
fn labels_are_legal(object: &Value) -> Result<(), String> {
    for (name, value) in object["metadata"]["labels"].as_object().into_iter().flatten() {
        let value = value.as_str().ok_or("a label is a text")?;
        let word = |text: &str| {
            text.len() <= 63
                && text.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
                && text.starts_with(|c: char| c.is_ascii_alphanumeric())
                && text.ends_with(|c: char| c.is_ascii_alphanumeric())
        };
        let name = name.rsplit_once('/').map_or(name.as_str(), |(_, name)| name);
        if !word(name) || !(value.is_empty() || word(value)) {
            return Err(format!("the label {name}={value} is not legal"));
        }
    }
    Ok(())
}

impl Cluster {
    fn put(&mut self, kind: &str, mut object: Value, event: &str) -> Value {
        self.version += 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        let name = object["metadata"]["name"].as_str().expect("it has one").to_owned();
        let line = json!({"type": event, "object": object}).to_string() + "\n";
        self.watchers.retain(|watcher| {
            watcher.kind != kind || !fits(&object, &watcher.selector) || watcher.tell.send(line.clone().into_bytes()).is_ok()
        });
        match event {
            "DELETED" => drop(self.objects.remove(&(kind.to_owned(), name))),
            _ => drop(self.objects.insert((kind.to_owned(), name), object.clone())),
        }
        object
    }

    fn get(&self, kind: &str, name: &str) -> Option<&Value> {
        self.objects.get(&(kind.to_owned(), name.to_owned()))
    }

    fn change(&mut self, kind: &str, name: &str, change: impl FnOnce(&mut Value)) -> Option<Value> {
        let mut object = self.get(kind, name)?.clone();
        change(&mut object);
        Some(self.put(kind, object, "MODIFIED"))
    }

    fn create(&mut self, kind: &str, mut object: Value) -> Value {
        object["metadata"]["uid"] = json!(uuid::Uuid::now_v7().to_string());
        object["metadata"]["creationTimestamp"] = json!(now());
        object["metadata"]["namespace"] = json!(NAMESPACE);
        if kind == "pods" {
            object["status"] = json!({"phase": "Pending"});
            for container in object["spec"]["containers"].as_array_mut().into_iter().flatten() {
                for list in ["requests", "limits"] {
                    for (_, amount) in
                        container.pointer_mut(&format!("/resources/{list}")).and_then(Value::as_object_mut).into_iter().flatten()
                    {
                        *amount = json!(canonical(amount.as_str().unwrap()));
                    }
                }
            }
        }
        if kind == "secrets" {
            object["stringData"].take();
        }
        if kind == "jobs" && std::mem::take(&mut self.queues) {
            object["spec"]["suspend"] = json!(true);
        }
        self.put(kind, object, "ADDED")
    }

    /// Somebody tells of an object: of the same once, and when that was last.
    fn tell(&mut self, (kind, name): (&str, &str), word: &str, reason: &str, message: &str) {
        let called = format!("{name}.{}", reason.to_lowercase());
        let event = json!({"apiVersion": "v1", "kind": "Event", "metadata": {"name": called}, "involvedObject": {"kind": kind, "name": name},
            "type": word, "reason": reason, "message": message, "firstTimestamp": now(), "lastTimestamp": now(), "eventTime": null, "count": 1});
        match self.get("events", &called) {
            Some(_) => drop(self.change("events", &called, |event| {
                event["lastTimestamp"] = json!(now());
                event["count"] = json!(event["count"].as_u64().unwrap() + 1);
            })),
            None => drop(self.create("events", event)),
        }
    }

    fn names(&self, kind: &str) -> Vec<String> {
        self.objects.keys().filter(|(of, _)| of == kind).map(|(_, name)| name.clone()).collect()
    }

    fn delete(&mut self, kind: &str, name: &str, options: &Value) -> Option<Value> {
        let grace = options["gracePeriodSeconds"].as_u64();
        let object = self.get(kind, name)?.clone();
        match kind {
            "pods" => {
                let before = object["metadata"]["deletionGracePeriodSeconds"].as_u64();
                let grace = grace.or(object["spec"]["terminationGracePeriodSeconds"].as_u64()).unwrap_or(30);
                let grace = before.map_or(grace, |before| before.min(grace));
                if let Some(process) = self.running.get_mut(name) {
                    if before.is_none() {
                        process.term();
                    }
                    let until = Instant::now() + Duration::from_secs(grace);
                    process.until = Some(process.until.map_or(until, |at| at.min(until)));
                }
                self.change(kind, name, |pod| {
                    pod["metadata"]["deletionTimestamp"] = json!((Timestamp::now() + (grace as i64).seconds()).to_string());
                    pod["metadata"]["deletionGracePeriodSeconds"] = json!(grace);
                })
            }
            "jobs" | "sandboxes" | "sandboxclaims" => {
                assert_eq!(options["propagationPolicy"], "Foreground", "else nobody knows when its pod has ended");
                self.change(kind, name, |custom| custom["metadata"]["deletionTimestamp"] = json!(now()))
            }
            _ => {
                self.values.remove(name);
                Some(self.put(kind, object, "DELETED"))
            }
        }
    }

    /// What all the controllers and kubelet see to, once.
    fn tick(&mut self) {
        for name in self.names("sandboxwarmpools") {
            self.replenish(&name);
        }
        for name in self.names("sandboxclaims") {
            self.claim(&name);
        }
        for name in self.names("sandboxes") {
            self.reconcile(&name);
        }
        for name in self.names("jobs") {
            self.job(&name);
        }
        for name in self.names("pods") {
            self.sync(&name);
        }
        // Whose owner is gone goes, too.
        let alive: Vec<Value> = self.objects.values().map(|object| object["metadata"]["uid"].clone()).collect();
        for (kind, name) in self.objects.keys().cloned().collect::<Vec<_>>() {
            let object = self.objects[&(kind.clone(), name.clone())].clone();
            let owners = object["metadata"]["ownerReferences"].as_array().cloned().unwrap_or_default();
            if !owners.is_empty()
                && owners.iter().all(|owner| !alive.contains(&owner["uid"]))
                && object["metadata"]["deletionTimestamp"].is_null()
            {
                self.delete(&kind, &name, &json!({"propagationPolicy": "Foreground"}));
            }
        }
    }

    /// A Sandbox of a template, which is somebody's.
    fn sandbox_of(&mut self, template: &str, name: &str, owner: &Value, word: &str) -> Option<Value> {
        let template = self.get("sandboxtemplates", template)?;
        let custom = json!({"apiVersion": "agents.x-k8s.io/v1beta1", "kind": "Sandbox",
            "metadata": {"name": name, "annotations": {"agents.x-k8s.io/pod-name": name}, "ownerReferences": [{"apiVersion": "extensions.agents.x-k8s.io/v1beta1",
                "kind": word, "name": owner["metadata"]["name"], "uid": owner["metadata"]["uid"], "controller": true, "blockOwnerDeletion": true}]},
            "spec": {"podTemplate": template["spec"]["podTemplate"], "operatingMode": "Running"}});
        Some(self.create("sandboxes", custom))
    }

    fn owned_by(&self, owner: &Value) -> Vec<String> {
        let of = |object: &Value| object["metadata"]["ownerReferences"][0]["uid"] == owner["metadata"]["uid"];
        let all = self.objects.iter().filter(|((kind, _), object)| kind == "sandboxes" && of(object));
        all.map(|((_, name), _)| name.clone()).collect()
    }

    /// The controller of pools.
    fn replenish(&mut self, name: &str) {
        let pool = self.get("sandboxwarmpools", name).expect("it is there").clone();
        let wanted = pool["spec"]["replicas"].as_u64().unwrap_or(1) as usize;
        if self.owned_by(&pool).len() < wanted {
            let made = format!("{name}-{}", &uuid::Uuid::now_v7().simple().to_string()[27..]);
            self.sandbox_of(pool["spec"]["sandboxTemplateRef"]["name"].as_str().unwrap(), &made, &pool, "SandboxWarmPool");
        }
    }

    /// The controller of claims.
    fn claim(&mut self, name: &str) {
        let claim = self.get("sandboxclaims", name).expect("it is there").clone();
        let mine = self.owned_by(&claim);
        if !claim["metadata"]["deletionTimestamp"].is_null() {
            for of in &mine {
                self.delete("sandboxes", of, &json!({"propagationPolicy": "Foreground"}));
            }
            if mine.is_empty() {
                self.put("sandboxclaims", claim, "DELETED");
            }
            return;
        }
        let lifecycle = &claim["spec"]["lifecycle"];
        let ends: Timestamp = lifecycle["shutdownTime"].as_str().expect("we say when").parse().expect("a time");
        if ends <= Timestamp::now() {
            assert_eq!(lifecycle["shutdownPolicy"], "DeleteForeground");
            self.delete("sandboxclaims", name, &json!({"propagationPolicy": "Foreground"}));
            return;
        }
        let no = |reason: &str| {
            vec![json!({"type": "Ready", "status": "False", "reason": reason, "message": "", "lastTransitionTime": now()})]
        };
        let pool = self.get("sandboxwarmpools", claim["spec"]["warmPoolRef"]["name"].as_str().unwrap()).cloned();
        let of = mine.first().cloned().or_else(|| {
            let pool = pool.as_ref()?;
            // The oldest that waits, else one is made under the claim's name.
            if let Some(waits) = self.owned_by(pool).first().cloned() {
                self.change("sandboxes", &waits, |custom| {
                    custom["metadata"]["ownerReferences"][0] = json!({"apiVersion": "extensions.agents.x-k8s.io/v1beta1", "kind": "SandboxClaim",
                        "name": name, "uid": claim["metadata"]["uid"], "controller": true, "blockOwnerDeletion": true});
                });
                return Some(waits);
            }
            self.sandbox_of(pool["spec"]["sandboxTemplateRef"]["name"].as_str().unwrap(), name, &claim, "SandboxClaim")?;
            Some(name.to_owned())
        });
        let conditions = match (&of, &pool) {
            (None, None) => no("WarmPoolNotFound"),
            (None, Some(_)) => no("TemplateNotFound"),
            (Some(of), _) => match &self.get("sandboxes", of).expect("it is there")["status"]["conditions"] {
                Value::Array(all) => {
                    all.iter().filter(|one| one["type"] == "Ready" || one["type"] == "Finished").cloned().collect()
                }
                _ => no("SandboxNotReady"),
            },
        };
        let status = json!({"conditions": conditions, "sandbox": {"name": of.unwrap_or_default()}});
        let differs =
            |has: &Value| has["sandbox"] != status["sandbox"] || words(&has["conditions"]) != words(&status["conditions"]);
        if differs(&claim["status"]) {
            self.change("sandboxclaims", name, |claim| claim["status"] = status);
        }
    }

    /// The controller of agent-sandbox.
    fn reconcile(&mut self, name: &str) {
        let custom = self.get("sandboxes", name).expect("it is there").clone();
        let pod = self.get("pods", name).cloned();
        if !custom["metadata"]["deletionTimestamp"].is_null() {
            match pod {
                Some(pod) if pod["metadata"]["deletionTimestamp"].is_null() => drop(self.delete("pods", name, &json!({}))),
                Some(_) => {}
                None => drop(self.put("sandboxes", custom, "DELETED")),
            }
            return;
        }
        // Of one that is claimed, the claim's controller counts.
        let owned = !custom["metadata"]["ownerReferences"].is_null();
        let ends: Option<Timestamp> = custom["spec"]["shutdownTime"].as_str().map(|ends| ends.parse().expect("a time"));
        assert!(owned || ends.is_some(), "we say when");
        if ends.is_some_and(|ends| ends <= Timestamp::now()) {
            self.delete("sandboxes", name, &json!({"propagationPolicy": "Foreground"}));
            return;
        }
        let suspended = custom["spec"]["operatingMode"] == "Suspended";
        match &pod {
            Some(pod) if suspended && pod["metadata"]["deletionTimestamp"].is_null() => {
                drop(self.delete("pods", name, &json!({"gracePeriodSeconds": 1})))
            }
            None if !suspended && self.held.is_none() => {
                let mut made = json!({"apiVersion": "v1", "kind": "Pod"});
                made["metadata"] = custom["spec"]["podTemplate"]["metadata"].clone();
                made["metadata"]["name"] = json!(name);
                made["metadata"]["ownerReferences"] = json!([{"apiVersion": "agents.x-k8s.io/v1beta1", "kind": "Sandbox", "name": name,
                    "uid": custom["metadata"]["uid"], "controller": true, "blockOwnerDeletion": true}]);
                made["spec"] = custom["spec"]["podTemplate"]["spec"].clone();
                self.create("pods", made);
            }
            _ => {}
        }
        let phase = pod.as_ref().map_or("", |pod| pod["status"]["phase"].as_str().unwrap());
        let is = |yes: bool| if yes { "True" } else { "False" };
        let mut conditions =
            vec![json!({"type": "Suspended", "status": is(suspended && pod.is_none()), "reason": "PodTerminated"})];
        let reason = match phase {
            _ if suspended => "SandboxSuspended",
            "Succeeded" => "PodSucceeded",
            "Failed" => "PodFailed",
            "Running" => "DependenciesReady",
            _ => "DependenciesNotReady",
        };
        if reason.starts_with("Pod") {
            conditions.push(json!({"type": "Finished", "status": "True", "reason": reason}));
        }
        conditions.push(json!({"type": "Ready", "status": is(reason == "DependenciesReady"), "reason": reason}));
        if let (Some(held), None, false) = (&self.held, &pod, suspended) {
            *conditions.last_mut().unwrap() = json!({"type": "Ready", "status": "False", "reason": "ReconcilerError", "message": format!("Error seen: {held}")});
        }
        if custom["status"]["conditions"] != json!(conditions) && !self.behind {
            self.change("sandboxes", name, |custom| custom["status"]["conditions"] = json!(conditions));
        }
    }

    /// The controller of Jobs, and the one that removes those that have ended.
    fn job(&mut self, name: &str) {
        let job = self.get("jobs", name).expect("it is there").clone();
        let of = |object: &Value| object["metadata"]["ownerReferences"][0]["uid"] == job["metadata"]["uid"];
        let pods: Vec<Value> =
            self.objects.iter().filter(|((kind, _), object)| kind == "pods" && of(object)).map(|(_, pod)| pod.clone()).collect();
        let name_of = |pod: &Value| pod["metadata"]["name"].as_str().unwrap().to_owned();
        let leaving = |object: &Value| !object["metadata"]["deletionTimestamp"].is_null();
        let over = |pod: &Value| matches!(pod["status"]["phase"].as_str().unwrap(), "Succeeded" | "Failed");
        let end = |cluster: &mut Self, pods: &[Value]| {
            for pod in pods.iter().filter(|pod| !leaving(pod) && !over(pod)) {
                cluster.delete("pods", &name_of(pod), &json!({}));
            }
        };
        if leaving(&job) {
            for pod in &pods {
                if !leaving(pod) {
                    self.delete("pods", &name_of(pod), &json!({}));
                }
                self.release(&name_of(pod));
            }
            if pods.is_empty() {
                self.put("jobs", job, "DELETED");
            }
            return;
        }
        let spec = &job["spec"];
        let mut status = if job["status"].is_object() { job["status"].clone() } else { json!({"conditions": []}) };
        let is = |status: &Value, kind: &str| status["conditions"].as_array().unwrap().iter().any(|one| one["type"] == kind);
        let say = |status: &mut Value, kind: &str, reason: &str, message: &str| {
            let one = json!({"type": kind, "status": "True", "reason": reason, "message": message, "lastTransitionTime": now()});
            status["conditions"].as_array_mut().unwrap().push(one);
        };
        if is(&status, "Failed") || is(&status, "Complete") {
            let ended: Timestamp = status["conditions"][1]["lastTransitionTime"].as_str().unwrap().parse().unwrap();
            if ended + spec["ttlSecondsAfterFinished"].as_i64().expect("we say how long").seconds() <= Timestamp::now() {
                self.delete("jobs", name, &json!({"propagationPolicy": "Foreground"}));
            }
            return;
        }
        // Each that has ended is counted once.
        let mut judged = None;
        for pod in pods.iter().filter(|pod| over(pod) && !pod["metadata"]["finalizers"].is_null()) {
            judged = judged.or(by_policy(&spec["podFailurePolicy"], pod));
            let which = if pod["status"]["phase"] == "Succeeded" { "succeeded" } else { "failed" };
            status[which] = json!(status[which].as_u64().unwrap_or(0) + 1);
            self.release(&name_of(pod));
        }
        let open = pods.iter().filter(|pod| !over(pod)).count();
        if spec["suspend"] == true {
            end(self, &pods);
            if !is(&status, "Suspended") {
                say(&mut status, "Suspended", "JobSuspended", "Job suspended");
            }
            drop(status.as_object_mut().unwrap().remove("startTime"));
        } else {
            status["conditions"].as_array_mut().unwrap().retain(|one| one["type"] != "Suspended");
            if status["startTime"].is_null() {
                status["startTime"] = json!(now());
            }
            let started: Timestamp = status["startTime"].as_str().unwrap().parse().unwrap();
            let late = started + spec["activeDeadlineSeconds"].as_i64().expect("we say how long").seconds() <= Timestamp::now();
            if status["conditions"][0].is_null() {
                if let Some(message) = judged {
                    say(&mut status, "FailureTarget", "PodFailurePolicy", &message);
                } else if status["failed"].as_u64() > spec["backoffLimit"].as_u64().or(Some(6)) {
                    say(&mut status, "FailureTarget", "BackoffLimitExceeded", "Job has reached the specified backoff limit");
                } else if late {
                    say(&mut status, "FailureTarget", "DeadlineExceeded", "Job was active longer than specified deadline");
                } else if status["succeeded"].as_u64() >= Some(1) {
                    say(&mut status, "SuccessCriteriaMet", "CompletionsReached", "Reached expected number of succeeded pods");
                }
            }
            let target = status["conditions"][0].clone();
            // What is ending counts where nothing is said of it.
            let there = match spec["podReplacementPolicy"].as_str() {
                Some("Failed") => open,
                _ => pods.iter().filter(|pod| !over(pod) && !leaving(pod)).count(),
            };
            if target.is_object() {
                end(self, &pods);
                if open == 0 {
                    let last = if target["type"] == "FailureTarget" { "Failed" } else { "Complete" };
                    say(&mut status, last, target["reason"].as_str().unwrap(), target["message"].as_str().unwrap());
                }
            } else if let (0, Some(held)) = (there, self.held.clone()) {
                self.tell(("Job", name), "Warning", "FailedCreate", &format!("Error creating: {held}"));
            } else if there == 0 {
                let made = format!("{name}-{}", &uuid::Uuid::now_v7().simple().to_string()[27..]);
                let mut pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": spec["template"]["metadata"], "spec": spec["template"]["spec"]});
                for label in ["job-name", "batch.kubernetes.io/job-name"] {
                    pod["metadata"]["labels"][label] = json!(name);
                }
                pod["metadata"]["name"] = json!(made);
                pod["metadata"]["finalizers"] = json!(["batch.kubernetes.io/job-tracking"]);
                pod["metadata"]["ownerReferences"] = json!([{"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": job["metadata"]["uid"],
                    "controller": true, "blockOwnerDeletion": true}]);
                self.create("pods", pod);
                self.tell(("Job", name), "Normal", "SuccessfulCreate", &format!("Created pod: {made}"));
            }
        }
        let active = pods.iter().filter(|pod| !over(pod) && !leaving(pod));
        let ready = active.clone().filter(|pod| pod["status"]["phase"] == "Running").count();
        (status["active"], status["ready"]) = (json!(active.count()), json!(ready));
        if job["status"] != status {
            self.change("jobs", name, |job| job["status"] = status);
        }
    }

    /// The scheduler: on the node with the fewest pods of those that fit.
    fn place(&self, pod: &Value) -> Option<&'static str> {
        let required = &pod["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"];
        let terms = required["nodeSelectorTerms"].as_array();
        let fits = |node: &&&str| terms.is_none_or(|terms| terms.iter().any(|term| meets(term, node)));
        let on = |node: &&&str| {
            let pods = self.objects.iter().filter(|((kind, _), _)| kind == "pods");
            pods.filter(|(_, pod)| pod["spec"]["nodeName"] == **node).count()
        };
        NODES.iter().filter(fits).min_by_key(on).copied()
    }

    /// Of a pod: somebody with a say takes it away, as this word for it.
    fn disrupt(&mut self, name: &str, reason: &str, message: &str) {
        let condition = json!({"type": "DisruptionTarget", "status": "True", "reason": reason, "message": message, "lastTransitionTime": now()});
        self.change("pods", name, |pod| {
            if pod["status"]["conditions"].is_null() {
                pod["status"]["conditions"] = json!([]);
            }
            pod["status"]["conditions"].as_array_mut().unwrap().push(condition);
        });
    }

    /// It was counted, and may go.
    fn release(&mut self, pod: &str) {
        if self.get("pods", pod).is_some_and(|pod| !pod["metadata"]["finalizers"].is_null()) {
            self.change("pods", pod, |pod| drop(pod["metadata"].as_object_mut().unwrap().remove("finalizers")));
        }
    }

    /// Its last process is gone, and nobody needs it any more.
    fn remove_pod(&mut self, name: &str) {
        let pod = self.get("pods", name).expect("it is there").clone();
        if pod["metadata"]["finalizers"].is_null() {
            self.running.remove(name);
            self.put("pods", pod, "DELETED");
        } else if matches!(pod["status"]["phase"].as_str().unwrap(), "Pending" | "Running") {
            self.change("pods", name, |pod| pod["status"]["phase"] = json!("Failed"));
        }
    }

    /// Kubelet.
    fn sync(&mut self, name: &str) {
        let pod = self.get("pods", name).expect("it is there").clone();
        let leaving = !pod["metadata"]["deletionTimestamp"].is_null();
        let phase = pod["status"]["phase"].as_str().unwrap().to_owned();
        if let Some(process) = self.running.get_mut(name) {
            let late = |at: Option<Instant>| at.is_some_and(|at| at <= Instant::now());
            if late(process.until) {
                kill("-KILL", &format!("-{}", process.pid));
            }
            let overdue = late(process.deadline) && phase == "Running";
            if overdue {
                kill("-KILL", &format!("-{}", process.pid));
            }
            let ended = *process.ended.lock().unwrap();
            if let Some(code) = ended {
                // What does not say that it runs once is begun anew, and waits for that.
                let again = pod["spec"]["restartPolicy"].as_str().is_none_or(|policy| policy != "Never");
                if phase == "Running" && again && !overdue && pod["status"]["containerStatuses"][0]["lastState"].is_null() {
                    self.change("pods", name, |pod| {
                        let reason = if code == 0 { "Completed" } else { "Error" };
                        let agent = &mut pod["status"]["containerStatuses"][0];
                        agent["state"] = json!({"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 10s restarting failed container"}});
                        agent["lastState"] = json!({"terminated": {"exitCode": code, "reason": reason, "finishedAt": now()}});
                    });
                } else if phase == "Running" && !again || overdue {
                    self.change("pods", name, |pod| {
                        pod["status"]["phase"] = json!(if code == 0 { "Succeeded" } else { "Failed" });
                        let reason = if code == 0 { "Completed" } else { "Error" };
                        pod["status"]["containerStatuses"][0]["state"] =
                            json!({"terminated": {"exitCode": code, "reason": reason}});
                        if overdue {
                            pod["status"]["reason"] = json!("DeadlineExceeded");
                            pod["status"]["message"] = json!("Pod was active on the node longer than the specified deadline");
                        }
                    });
                }
                if leaving {
                    self.remove_pod(name);
                }
            }
            return;
        }
        if leaving {
            self.remove_pod(name);
            return;
        }
        if phase != "Pending" {
            return;
        }
        if pod["spec"]["nodeName"].is_null() {
            let placed = self.place(&pod);
            let unplaced = json!([{"type": "PodScheduled", "status": "False", "reason": "Unschedulable",
                "message": format!("0/{} nodes are available", NODES.len())}]);
            match placed {
                Some(node) => drop(self.change("pods", name, |pod| {
                    pod["spec"]["nodeName"] = json!(node);
                    pod["status"]["conditions"] = json!([]);
                })),
                None if pod["status"]["conditions"] != unplaced => {
                    drop(self.change("pods", name, |pod| pod["status"]["conditions"] = unplaced));
                }
                None => {}
            }
            return;
        }
        if let Some((reason, message)) = self.full.take() {
            // Nothing of it has run, and it stays until somebody removes it.
            self.change("pods", name, |pod| {
                pod["status"] = json!({"phase": "Failed", "reason": reason, "message": message, "startTime": now()});
            });
            return;
        }
        let agent = &pod["spec"]["containers"][0];
        let waits = |cluster: &mut Self, reason: &str, message: String| {
            let state = json!([{"name": agent["name"], "state": {"waiting": {"reason": reason, "message": message}}}]);
            if cluster.get("pods", name).expect("it is there")["status"]["containerStatuses"] != state {
                cluster.change("pods", name, |pod| pod["status"]["containerStatuses"] = state);
            }
        };
        match agent["image"].as_str().unwrap() {
            "nowhere" => return waits(self, "ImagePullBackOff", String::from("Back-off pulling image \"nowhere\"")),
            "unmounted" => {
                return self.tell(("Pod", name), "Warning", "FailedMount", "MountVolume.SetUp failed for volume \"keep-0\"");
            }
            "UPPER" => return waits(self, "InvalidImageName", String::from("couldn't parse image name \"UPPER\"")),
            _ => {}
        }
        let mut env = BTreeMap::new();
        for variable in agent["env"].as_array().into_iter().flatten() {
            let from = &variable["valueFrom"]["secretKeyRef"];
            let value = match variable["value"].as_str() {
                Some(text) => expanded(text, &env),
                None => {
                    let (of, key) = (from["name"].as_str().unwrap(), from["key"].as_str().unwrap());
                    let value = self.values.get(of).and_then(|has| has.get(key)).cloned();
                    let Some(value) = value else {
                        return waits(self, "CreateContainerConfigError", format!("secret \"{of}\" not found"));
                    };
                    value
                }
            };
            env.insert(variable["name"].as_str().unwrap().to_owned(), value);
        }
        let argv: Vec<String> = serde_json::from_value(agent["command"].clone()).unwrap_or_default();
        let argv: Vec<String> = argv.iter().map(|word| expanded(word, &env)).collect();
        let argv = if argv.is_empty() { ["sleep", "1000"].map(String::from).to_vec() } else { argv };
        let life = pod["spec"]["activeDeadlineSeconds"].as_u64().map(Duration::from_secs);
        self.running.insert(name.to_owned(), Process::start(env, &argv, life));
        self.change("pods", name, |pod| {
            pod["status"] = json!({"phase": "Running", "podIP": "127.0.0.1", "startTime": now(),
                "containerStatuses": [{"name": agent["name"], "state": {"running": {"startedAt": now()}}}]});
        });
    }
}

impl Process {
    fn start(env: BTreeMap<String, String>, argv: &[String], life: Option<Duration>) -> Self {
        let machine = Arc::new(Machine::new(env));
        let mut child = machine.spawn(argv, &BTreeMap::new(), false).expect("it is a program");
        let (log, ended) = (Arc::<Mutex<Vec<u8>>>::default(), Arc::<Mutex<Option<i32>>>::default());
        let pid = child.id();
        let outputs: [Box<dyn Read + Send>; 2] = [Box::new(child.stdout.take().unwrap()), Box::new(child.stderr.take().unwrap())];
        let readers = outputs.map(|mut output| {
            let log = log.clone();
            std::thread::spawn(move || {
                let mut piece = [0; 4096];
                while let Ok(n @ 1..) = output.read(&mut piece) {
                    log.lock().unwrap().extend_from_slice(&piece[..n]);
                }
            })
        });
        let told = ended.clone();
        std::thread::spawn(move || {
            let status = child.wait().expect("it is ours");
            for reader in readers {
                drop(reader.join());
            }
            *told.lock().unwrap() = Some(status.code().unwrap_or_else(|| 128 + status.signal().expect("else it has a code")));
        });
        Self { machine, pid, log, ended, until: None, deadline: life.map(|life| Instant::now() + life) }
    }

    fn term(&self) {
        let (machine, pid) = (self.machine.clone(), self.pid);
        std::thread::spawn(move || {
            machine.settle();
            kill("-TERM", &pid.to_string());
        });
    }
}

impl Kubernetes {
    pub(crate) async fn new() -> Self {
        let cluster = Arc::<Mutex<Cluster>>::default();
        let for_kubelet = cluster.clone();
        let kubelet = tokio::spawn(async move {
            loop {
                for_kubelet.lock().unwrap().tick();
                tokio::time::sleep(Duration::from_millis(15)).await;
            }
        });
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let inside = listener.local_addr().unwrap().to_string();
        tokio::spawn(async move {
            let app = axum::Router::new().fallback(|| async { "inside" });
            axum::serve(listener, app).await.unwrap();
        });
        let theirs = BTreeMap::from([(String::from("key"), String::from("of the namespace"))]);
        cluster.lock().unwrap().values.insert(String::from("theirs"), theirs);
        let sandboxes = Contract::parse(include_str!("../../../../tests/specs/agent-sandbox/sandbox.json"));
        let claims = Contract::parse(include_str!("../../../../tests/specs/agent-sandbox/claim.json"));
        let (rights, used, denied) = (rights(), Mutex::default(), Mutex::default());
        Self { sandboxes, claims, rights, used, denied, cluster, kubelet, inside, token: Mutex::new((TOKEN.to_owned(), None)) }
    }

    pub(crate) fn count(&self, key: &str) -> usize {
        let cluster = self.cluster.lock().unwrap();
        let own = |object: &&Value| object["metadata"]["labels"]["agent-fleet.key"] == key && object["kind"] != "Secret";
        let uncontrolled = |object: &&Value| object["metadata"]["ownerReferences"][0]["controller"] != true;
        cluster.objects.values().filter(own).filter(uncontrolled).count()
    }

    pub(crate) fn object(&self, kind: &str, name: &str) -> Option<Value> {
        self.cluster.lock().unwrap().get(kind, name).cloned()
    }

    pub(crate) fn secrets(&self) -> Vec<Value> {
        let cluster = self.cluster.lock().unwrap();
        cluster.objects.iter().filter(|((kind, _), _)| kind == "secrets").map(|(_, object)| object.clone()).collect()
    }

    pub(crate) fn names(&self, kind: &str) -> Vec<String> {
        self.cluster.lock().unwrap().names(kind)
    }

    /// Its container has ended at that time, and was begun anew.
    pub(crate) fn restarted(&self, pod: &str, at: &str) {
        self.cluster.lock().unwrap().change("pods", pod, |pod| {
            let ended = json!({"exitCode": 1, "reason": "Error", "finishedAt": at});
            pod["status"]["containerStatuses"][0]["lastState"] = json!({"terminated": ended});
        });
    }

    /// Somebody removes it.
    pub(crate) fn lose(&self, kind: &str, name: &str) {
        self.cluster.lock().unwrap().delete(kind, name, &json!({}));
    }

    /// It is evicted, as `kubectl drain` does it.
    pub(crate) fn evict(&self, pod: &str) {
        let mut cluster = self.cluster.lock().unwrap();
        cluster.disrupt(pod, "EvictionByEvictionAPI", "Eviction API: evicting");
        cluster.delete("pods", pod, &json!({}));
    }

    /// Its agent is at its end.
    pub(crate) fn crash(&self, pod: &str) {
        kill("-KILL", &format!("-{}", self.cluster.lock().unwrap().running[pod].pid));
    }

    /// Its node has no room, or ends: kubelet says so, and ends it at once.
    pub(crate) fn kill(&self, pod: &str) {
        let mut cluster = self.cluster.lock().unwrap();
        cluster.disrupt(pod, "TerminationByKubelet", "The node was low on resource: memory");
        kill("-KILL", &format!("-{}", cluster.running[pod].pid));
    }

    /// Its node is removed from the cluster, and what was there is forgotten, without a grace.
    pub(crate) fn vanish(&self, pod: &str) {
        let mut cluster = self.cluster.lock().unwrap();
        cluster.disrupt(pod, "DeletionByPodGC", "PodGC: node no longer exists");
        if let Some(process) = cluster.running.remove(pod) {
            kill("-KILL", &format!("-{}", process.pid));
        }
        let gone = cluster.get("pods", pod).expect("it is there").clone();
        cluster.put("pods", gone, "DELETED");
    }

    /// Kubelet does not take the next pod, for what it has left.
    pub(crate) fn refuse_next_pod(&self, reason: &'static str, message: &'static str) {
        self.cluster.lock().unwrap().full = Some((reason, message));
    }

    /// Somebody else's object.
    pub(crate) fn put(&self, kind: &str, object: Value) {
        self.cluster.lock().unwrap().create(kind, object);
    }

    /// What is granted of these resources and was never needed.
    pub(crate) fn unused(&self, resources: &[&str]) -> Vec<Right> {
        let used = self.used.lock().unwrap();
        let of = |right: &&Right| resources.contains(&right.1.as_str()) && !used.contains(*right);
        self.rights.iter().filter(of).cloned().collect()
    }

    /// No controller can make a pod, or each can again.
    pub(crate) fn hold_pods(&self, why: Option<&str>) {
        self.cluster.lock().unwrap().held = why.map(String::from);
    }

    /// What rbac.yaml grants is not granted here.
    pub(crate) fn deny(&self, group: &str, resource: &str, verb: &str) {
        let right = [group, resource, verb].map(String::from).into();
        assert!(self.rights.contains(&right));
        self.denied.lock().unwrap().insert(right);
    }

    /// A Job is let go, or no more.
    pub(crate) fn suspend(&self, name: &str, suspend: bool) {
        self.cluster.lock().unwrap().change("jobs", name, |job| job["spec"]["suspend"] = json!(suspend));
    }

    /// Who queues Jobs sees the next one first.
    pub(crate) fn suspend_next(&self) {
        self.cluster.lock().unwrap().queues = true;
    }

    /// A Job that is over has been so for a day.
    /// `false`: it is not over.
    pub(crate) fn pass_day(&self, name: &str) -> bool {
        let ended = (Timestamp::now() - 24.hours()).to_string();
        let mut cluster = self.cluster.lock().unwrap();
        let over = cluster.get("jobs", name).is_some_and(|job| job["status"]["conditions"][1].is_object());
        if over {
            cluster.change("jobs", name, |job| job["status"]["conditions"][1]["lastTransitionTime"] = json!(ended));
        }
        over
    }

    /// The controller of agent-sandbox says nothing of what it sees from now on.
    pub(crate) fn fall_behind(&self) {
        self.cluster.lock().unwrap().behind = true;
    }

    /// The next creation is answered like this.
    pub(crate) fn refuse_next(&self, kind: &'static str, code: u16, reason: &str, message: &str) {
        self.cluster.lock().unwrap().refusals.push_back((kind, code, status(code, reason, message, kind)));
    }

    /// The next who asks for this is the first who has to come with another token.
    pub(crate) fn rotate_at(&self, verb: &'static str, token: &str) {
        self.token.lock().unwrap().1 = Some((verb, token.to_owned()));
    }

    /// All lists that are under way have taken too long.
    pub(crate) fn age(&self, version: &str) {
        self.cluster.lock().unwrap().old.push(version.to_owned());
    }

    /// Who watches is told that it has taken too long, and no more.
    pub(crate) fn end_watches(&self) {
        let line = json!({"type": "ERROR", "object": status(410, "Expired", "too old resource version", "")}).to_string() + "\n";
        for watcher in std::mem::take(&mut self.cluster.lock().unwrap().watchers) {
            drop(watcher.tell.send(line.clone().into_bytes()));
        }
    }

    fn manage(&self, request: &Request) -> Reply {
        let no = |code: u16, reason: &str, message: &str, kind: &str| Reply::json(code, status(code, reason, message, kind));
        let (kind, rest) = place(request).expect("it was judged");
        let known = {
            let mut token = self.token.lock().unwrap();
            let verb = if request.query("watch").is_some() { "watch" } else { rest.get(1).copied().unwrap_or_default() };
            if let Some((_, next)) = token.1.take_if(|(at, _)| *at == verb) {
                token.0 = next;
            }
            request.header("authorization") == format!("Bearer {}", token.0)
        };
        if !known {
            return no(401, "Unauthorized", "Unauthorized", "");
        }
        let right = right(request).expect("it was judged");
        if self.denied.lock().unwrap().contains(&right) {
            let (group, resource, verb) = right;
            let said = format!(
                "{kind} is forbidden: User \"fleet\" cannot {verb} resource \"{resource}\" in API group \"{group}\" in the namespace \"{NAMESPACE}\""
            );
            return no(403, "Forbidden", &said, kind);
        }
        let mut cluster = self.cluster.lock().unwrap();
        let missing = |name: &str| no(404, "NotFound", &format!("{kind} \"{name}\" not found"), kind);
        match (request.method.as_str(), &rest[..]) {
            ("POST", []) => {
                let object = request.json();
                let name = object["metadata"]["name"].as_str().unwrap_or_default();
                let refused = cluster.refusals.iter().position(|(of, ..)| *of == kind).and_then(|at| cluster.refusals.remove(at));
                if let Some((_, code, said)) = refused {
                    return Reply::json(code, said);
                }
                if cluster.get(kind, name).is_some() {
                    return no(409, "AlreadyExists", &format!("{kind} \"{name}\" already exists"), kind);
                }
                if kind == "secrets" {
                    let data: BTreeMap<String, String> = serde_json::from_value(object["stringData"].clone()).unwrap();
                    cluster.values.insert(name.to_owned(), data);
                }
                Reply::json(201, cluster.create(kind, object))
            }
            ("GET", []) if request.query("watch") == Some("true") => {
                let (tell, told) = mpsc::unbounded_channel();
                let wanted = selector(request.query("labelSelector").unwrap_or_default());
                let from: u64 = request.query("resourceVersion").unwrap().parse().unwrap();
                // What has happened since the list.
                for ((of, _), object) in &cluster.objects {
                    let version: u64 = object["metadata"]["resourceVersion"].as_str().unwrap().parse().unwrap();
                    if of == kind && version > from && fits(object, &wanted) {
                        drop(tell.send((json!({"type": "ADDED", "object": object}).to_string() + "\n").into_bytes()));
                    }
                }
                let mark = json!({"type": "BOOKMARK", "object": {"kind": "Pod", "metadata": {"resourceVersion": cluster.version.to_string()}}});
                drop(tell.send((mark.to_string() + "\n").into_bytes()));
                cluster.watchers.push(Watcher { kind: kind.to_owned(), selector: wanted, tell });
                Reply { status: 200, headers: Vec::new(), content: Content::Stream("application/json", told) }
            }
            ("GET", []) => {
                let wanted = selector(request.query("labelSelector").unwrap_or_default());
                let limit: usize = request.query("limit").map_or(PAGE, |limit| limit.parse().unwrap()).min(PAGE);
                let from = request.query("continue").unwrap_or_default();
                let (version, after) = from.split_once('/').unwrap_or(("", ""));
                if cluster.old.iter().any(|old| old == version) && !version.is_empty() {
                    let mut said = status(410, "Expired", "The provided continue parameter is too old", "");
                    said["metadata"] = json!({"continue": format!("{}+/{after}", cluster.version)});
                    return Reply::json(410, said);
                }
                let fields = selector(request.query("fieldSelector").unwrap_or_default());
                let of_kind = cluster.objects.iter().filter(|((of, name), object)| {
                    of == kind && name.as_str() > after && fits(object, &wanted) && has_fields(object, &fields)
                });
                let mut items: Vec<Value> = of_kind.map(|(_, object)| object.clone()).collect();
                let mut head = json!({"resourceVersion": cluster.version.to_string()});
                if items.len() > limit {
                    items.truncate(limit);
                    head["continue"] =
                        json!(format!("{}/{}", cluster.version, items[limit - 1]["metadata"]["name"].as_str().unwrap()));
                }
                for item in &mut items {
                    let item = item.as_object_mut().unwrap();
                    drop((item.remove("kind"), item.remove("apiVersion")));
                }
                Reply::json(200, json!({"kind": "List", "apiVersion": "v1", "metadata": head, "items": items}))
            }
            ("GET", [name]) => cluster.get(kind, name).map_or_else(|| missing(name), |object| Reply::json(200, object.clone())),
            ("DELETE", [name]) => {
                let done = cluster.delete(kind, name, &request.json());
                done.map_or_else(|| missing(name), |object| Reply::json(200, object))
            }
            ("PATCH", [name]) => {
                let patch = request.json();
                let done = cluster.change(kind, name, |object| merge(object, &patch));
                done.map_or_else(|| missing(name), |object| Reply::json(200, object))
            }
            ("GET", [name, "log"]) => {
                let Some(process) = cluster.running.get(*name) else {
                    return match cluster.get(kind, name) {
                        Some(_) => no(
                            400,
                            "BadRequest",
                            &format!("container \"agent\" in pod \"{name}\" is waiting to start: ContainerCreating"),
                            "",
                        ),
                        None => missing(name),
                    };
                };
                let all = process.log.lock().unwrap().clone();
                let lines: usize = request.query("tailLines").unwrap().parse().unwrap();
                let all: Vec<&[u8]> = all.split_inclusive(|byte| *byte == b'\n').collect();
                Reply {
                    status: 200,
                    headers: Vec::new(),
                    content: Content::Bytes("text/plain", all[all.len().saturating_sub(lines)..].concat()),
                }
            }
            ("GET", [name, verb @ ("exec" | "portforward")]) => {
                let Some(process) =
                    cluster.running.get(*name).filter(|_| cluster.get(kind, name).unwrap()["status"]["phase"] == "Running")
                else {
                    return match cluster.get(kind, name) {
                        Some(_) => no(500, "InternalError", "unable to upgrade connection: container not found (\"agent\")", ""),
                        None => missing(name),
                    };
                };
                if *verb == "exec" {
                    let words = request.query.iter().filter(|(name, _)| name == "command").map(|(_, word)| word.clone());
                    let (machine, argv, stdin) =
                        (process.machine.clone(), words.collect(), request.query("stdin") == Some("true"));
                    return upgrade("v5.channel.k8s.io", request, move |socket| exec(socket, machine, argv, stdin).boxed());
                }
                let (inside, port) = (self.inside.clone(), request.query("ports").unwrap().parse().unwrap());
                upgrade("v4.channel.k8s.io", request, move |socket| forward(socket, inside, port).boxed())
            }
            other => no(405, "MethodNotAllowed", &format!("{other:?}"), kind),
        }
    }
}

/// What the policy of a Job says of a pod that has failed.
fn by_policy(policy: &Value, pod: &Value) -> Option<String> {
    let failed = pod["status"]["phase"] == "Failed";
    let rules = policy["rules"].as_array().filter(|_| failed)?;
    let name = format!("{NAMESPACE}/{}", pod["metadata"]["name"].as_str().unwrap());
    rules.iter().enumerate().find_map(|(n, rule)| {
        assert_eq!(rule["action"], "FailJob");
        let matching = format!("matching FailJob rule at index {n}");
        let conditions = pod["status"]["conditions"].as_array().into_iter().flatten();
        let mut wanted = rule["onPodConditions"].as_array().into_iter().flatten();
        if let Some(one) = wanted.next() {
            let has = conditions.clone().any(|has| has["type"] == one["type"] && has["status"] == one["status"]);
            return has.then(|| format!("Pod {name} has condition {} {matching}", one["type"].as_str().unwrap()));
        }
        let codes = &rule["onExitCodes"];
        let of = codes["containerName"].as_str().unwrap();
        let ended = pod["status"]["containerStatuses"].as_array().into_iter().flatten().find(|status| status["name"] == of)?;
        let code = ended["state"]["terminated"]["exitCode"].as_i64().filter(|code| *code != 0)?;
        assert!(codes["operator"] == "NotIn" && codes["values"] == json!([0]), "{codes}");
        Some(format!("Container {of} for pod {name} failed with exit code {code} {matching}"))
    })
}

/// Conditions, without when they came about.
fn words(conditions: &Value) -> Vec<(Value, Value, Value)> {
    let all = conditions.as_array().into_iter().flatten();
    all.map(|one| (one["type"].clone(), one["status"].clone(), one["reason"].clone())).collect()
}

fn merge(into: &mut Value, patch: &Value) {
    let Some(members) = patch.as_object() else {
        *into = patch.clone();
        return;
    };
    if !into.is_object() {
        *into = json!({});
    }
    for (name, value) in members {
        match value {
            Value::Null => drop(into.as_object_mut().expect("it is one").remove(name)),
            value => merge(&mut into[name], value),
        }
    }
}

/// Whether a node meets a term of what is required: one that asks for nothing is met by none.
fn meets(term: &Value, node: &str) -> bool {
    // Of labels, our nodes have none.
    let asked = |what: &str| term[what].as_array().cloned().unwrap_or_default();
    let (labels, fields) = (asked("matchExpressions"), asked("matchFields"));
    let is = |field: &Value| (field["operator"] == "In") == (field["values"][0] == node);
    labels.is_empty() && !fields.is_empty() && fields.iter().all(is)
}

/// The API's rules for what a pod requires of nodes.
fn affinity_is_legal(pod: &Value) -> Result<(), String> {
    let required = &pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"];
    if required.is_null() {
        return Ok(());
    }
    let terms =
        required["nodeSelectorTerms"].as_array().filter(|terms| !terms.is_empty()).ok_or("nodeSelectorTerms: Required value")?;
    for field in terms.iter().flat_map(|term| term["matchFields"].as_array().into_iter().flatten()) {
        if field["key"] != "metadata.name" || !["In", "NotIn"].iter().any(|one| field["operator"] == *one) {
            return Err(format!("matchFields: {field} is not a valid field selector"));
        }
        if field["values"].as_array().is_none_or(|values| values.len() != 1) {
            return Err(format!("{field}: must be only one value when `operator` is 'In' or 'NotIn' for node field selector"));
        }
    }
    Ok(())
}

/// The kind, and what is below it.
fn place(request: &Request) -> Option<(&'static str, Vec<&str>)> {
    match &request.segments()[..] {
        ["api", "v1", "namespaces", NAMESPACE, "pods", rest @ ..] => Some(("pods", rest.to_vec())),
        ["api", "v1", "namespaces", NAMESPACE, "secrets", rest @ ..] => Some(("secrets", rest.to_vec())),
        ["api", "v1", "namespaces", NAMESPACE, "events", rest @ ..] => Some(("events", rest.to_vec())),
        ["apis", "batch", "v1", "namespaces", NAMESPACE, "jobs", rest @ ..] => Some(("jobs", rest.to_vec())),
        ["apis", "agents.x-k8s.io", "v1beta1", "namespaces", NAMESPACE, "sandboxes", rest @ ..] => {
            Some(("sandboxes", rest.to_vec()))
        }
        ["apis", "extensions.agents.x-k8s.io", "v1beta1", "namespaces", NAMESPACE, plural, rest @ ..] => {
            let known = ["sandboxclaims", "sandboxwarmpools", "sandboxtemplates"];
            known.into_iter().find(|known| known == plural).map(|kind| (kind, rest.to_vec()))
        }
        _ => None,
    }
}

fn upgrade(
    protocol: &'static str,
    request: &Request,
    serve: impl FnOnce(Sockets) -> BoxFuture<'static, ()> + Send + 'static,
) -> Reply {
    let asked = request.header("sec-websocket-protocol");
    assert!(asked.split(',').any(|one| one.trim() == protocol), "{protocol} is not among {asked}");
    let accept = tokio_tungstenite::tungstenite::handshake::derive_accept_key(request.header("sec-websocket-key").as_bytes());
    let answer = Response::builder().status(101).header("connection", "Upgrade").header("upgrade", "websocket");
    let answer =
        answer.header("sec-websocket-accept", accept).header("sec-websocket-protocol", protocol).body(Body::empty()).unwrap();
    let serve = move |upgraded: Upgraded| -> BoxFuture<'static, ()> {
        async move {
            let Ok(upgraded) = upgraded.await else { return };
            serve(WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Server, None).await).await;
        }
        .boxed()
    };
    Reply { status: 101, headers: Vec::new(), content: Content::Upgrade(answer, Box::new(serve)) }
}

/// A command, whose standard input ends when that is said. It goes on when nobody listens any more.
async fn exec(socket: Sockets, machine: Arc<Machine>, argv: Vec<String>, stdin: bool) {
    let (mut there, mut here) = socket.split();
    let last = |status: Value| Message::binary([&[3], status.to_string().as_bytes()].concat());
    let mut child = match machine.spawn(&argv, &BTreeMap::new(), true) {
        Ok(child) => child,
        Err(error) => {
            let message =
                format!("error executing command in container: exec: {:?}: {error}", argv[0]).replace("No such", "no such");
            drop(there.send(last(status(500, "InternalError", &message, ""))).await);
            return;
        }
    };
    let (tell, mut told) = mpsc::unbounded_channel::<Option<Vec<u8>>>();
    let outputs: [(u8, Box<dyn Read + Send>); 2] =
        [(1, Box::new(child.stdout.take().unwrap())), (2, Box::new(child.stderr.take().unwrap()))];
    for (channel, mut output) in outputs {
        let tell = tell.clone();
        std::thread::spawn(move || {
            let mut piece = [0; 8192];
            while let Ok(n @ 1..) = output.read(&mut piece) {
                drop(tell.send(Some([&[channel], &piece[..n]].concat())));
            }
            drop(tell.send(None));
        });
    }
    let mut input = child.stdin.take().filter(|_| stdin);
    let listen = async move {
        while let Some(Ok(message)) = here.next().await {
            match &message.into_data()[..] {
                [0, bytes @ ..] => {
                    if let Some(mut open) = input.take() {
                        let bytes = bytes.to_vec();
                        input =
                            tokio::task::spawn_blocking(move || std::io::Write::write_all(&mut open, &bytes).map(|()| open).ok())
                                .await
                                .unwrap();
                    }
                }
                [255, 0] => input = None,
                _ => {}
            }
        }
        std::future::pending::<()>().await;
    };
    let speak = async move {
        let mut open = 2;
        while open > 0 {
            match told.recv().await.expect("two tell") {
                Some(piece) => drop(there.send(Message::binary(piece)).await),
                None => open -= 1,
            }
        }
        let code = tokio::task::spawn_blocking(move || child.wait()).await.unwrap().unwrap().code().unwrap_or(137);
        let said = match code {
            0 => json!({"metadata": {}, "status": "Success"}),
            code => json!({"metadata": {}, "status": "Failure", "reason": "NonZeroExitCode",
                "message": format!("command terminated with non-zero exit code: exit status {code}"),
                "details": {"causes": [{"reason": "ExitCode", "message": code.to_string()}]}}),
        };
        drop(there.send(last(said)).await);
        drop(there.close().await);
    };
    tokio::select! {
        () = listen => {}
        () = speak => {}
    }
}

/// One connection to a port: data on channel 0, errors on channel 1, each beginning with the port.
async fn forward(socket: Sockets, inside: String, port: u16) {
    let (mut there, mut here) = socket.split();
    for channel in [0, 1] {
        drop(there.send(Message::binary([&[channel], &port.to_le_bytes()[..]].concat())).await);
    }
    if port == CLOSED {
        let said = b"error forwarding port: dial tcp4 127.0.0.1: connect: connection refused";
        drop(there.send(Message::binary([&[1], &said[..]].concat())).await);
        // It is left open, by a runtime that does so.
        while let Some(Ok(_)) = here.next().await {}
        return;
    }
    let connected = tokio::net::TcpStream::connect(inside).await.unwrap();
    let (mut read, mut write) = connected.into_split();
    let down = async {
        let mut piece = vec![0; 4096];
        while let Ok(n @ 1..) = tokio::io::AsyncReadExt::read(&mut read, &mut piece).await {
            if there.send(Message::binary([&[0], &piece[..n]].concat())).await.is_err() {
                return;
            }
        }
    };
    let up = async {
        while let Some(Ok(message)) = here.next().await {
            if let [0, bytes @ ..] = &message.into_data()[..]
                && tokio::io::AsyncWriteExt::write_all(&mut write, bytes).await.is_err()
            {
                return;
            }
        }
    };
    tokio::select! {
        () = down => {}
        () = up => {}
    }
    drop(there.close().await);
}

impl Api for Kubernetes {
    fn call(&self, request: &Request) -> Option<Call> {
        let (kind, rest) = place(request)?;
        let own = kind != "secrets";
        let controlled = |name: &str| {
            self.object(kind, name).is_some_and(|object| object["metadata"]["ownerReferences"][0]["controller"] == true)
        };
        let unbound = |name: &str| {
            self.object(kind, name)
                .is_some_and(|claim| claim["status"]["sandbox"]["name"].as_str().unwrap_or_default().is_empty())
        };
        // Of a Sandbox and of a Job, the pod is the state: it is told by that.
        let of_job = request.query("labelSelector").is_some_and(|wanted| wanted.starts_with("batch.kubernetes.io/job-name="));
        match (request.method.as_str(), &rest[..]) {
            ("POST", []) if own => Some(Call::Create),
            ("GET", []) if kind == "pods" && of_job => Some(Call::State),
            ("GET", []) if request.query("watch").is_none() && !["sandboxwarmpools", "events"].contains(&kind) => {
                Some(Call::List)
            }
            ("GET", [_]) if kind == "pods" => Some(Call::State),
            // Of a claim that has nothing yet, there is nothing else that tells it.
            ("GET", [name]) if kind == "sandboxclaims" && unbound(name) => Some(Call::State),
            ("DELETE", [name]) if !controlled(name) => Some(Call::Delete),
            _ => None,
        }
    }

    /// The API server's own rules about how it is asked.
    fn judge(&self, request: &Request) -> Result<(), String> {
        let (kind, rest) = place(request).ok_or("there is no such path")?;
        let right = right(request).expect("it has a place");
        if !self.rights.contains(&right) {
            return Err(format!("deploy/fleet/kubernetes/rbac.yaml does not grant {right:?}"));
        }
        self.used.lock().unwrap().insert(right);
        let known: &[&str] = match (request.method.as_str(), &rest[..]) {
            ("POST", []) => &["fieldManager", "fieldValidation"],
            ("PATCH", [_]) => &["fieldManager"],
            ("GET", []) if kind == "events" => {
                let known = ["involvedObject.kind", "involvedObject.name", "involvedObject.uid", "reason", "type"];
                let asked = selector(request.query("fieldSelector").unwrap_or_default());
                if let Some((name, _)) = asked.iter().find(|(name, _)| !known.contains(&name.as_str())) {
                    return Err(format!("{name} is not a known field selector"));
                }
                &["fieldSelector", "limit"]
            }
            ("GET", []) => {
                &["labelSelector", "limit", "continue", "watch", "allowWatchBookmarks", "resourceVersion", "timeoutSeconds"]
            }
            ("GET", [_, "log"]) => &["container", "tailLines"],
            ("GET", [_, "exec"]) => &["command", "container", "stdin", "stdout", "stderr"],
            ("GET", [_, "portforward"]) => &["ports", ""],
            ("GET" | "DELETE", [_]) => &[],
            other => return Err(format!("{other:?} is not asked like this")),
        };
        if let Some((name, _)) = request.query.iter().find(|(name, _)| !known.contains(&name.as_str())) {
            return Err(format!("there is no parameter `{name}`"));
        }
        let media = match request.method.as_str() {
            "POST" | "DELETE" => "application/json",
            "PATCH" => "application/merge-patch+json",
            _ => "",
        };
        if request.header("content-type") != media {
            return Err(format!("the media type is {:?}, not {media:?}", request.header("content-type")));
        }
        let object = request.json();
        if request.method == "POST" {
            let (version, word) = match kind {
                "pods" => ("v1", "Pod"),
                "secrets" => ("v1", "Secret"),
                "jobs" => ("batch/v1", "Job"),
                "sandboxclaims" => ("extensions.agents.x-k8s.io/v1beta1", "SandboxClaim"),
                _ => ("agents.x-k8s.io/v1beta1", "Sandbox"),
            };
            if object["apiVersion"] != version || object["kind"] != word {
                return Err(format!("this is no {version} {word}"));
            }
            labels_are_legal(&object)?;
            let pod = match kind {
                "pods" => &object["spec"],
                "jobs" => &object["spec"]["template"]["spec"],
                _ => &object["spec"]["podTemplate"]["spec"],
            };
            affinity_is_legal(pod)?;
            if kind == "jobs" {
                labels_are_legal(&object["spec"]["template"])?;
            }
            if kind == "sandboxclaims" {
                self.claims.request("POST", &["sandboxclaims"].map(String::from), &[], &request.body)?;
            }
            if kind == "sandboxes" {
                labels_are_legal(&object["spec"]["podTemplate"])?;
                let path = ["sandboxes"].map(String::from);
                self.sandboxes.request("POST", &path, &[], &request.body)?;
            }
        }
        if request.method == "PATCH" {
            affinity_is_legal(&object["spec"]["podTemplate"]["spec"])?;
        }
        if request.method == "DELETE" && (object["kind"] != "DeleteOptions" || object["apiVersion"] != "v1") {
            return Err(String::from("these are no DeleteOptions"));
        }
        Ok(())
    }

    fn judge_reply(&self, _request: &Request, _reply: &Reply) -> Result<(), String> {
        Ok(())
    }

    fn answer<'a>(&'a self, request: &'a Request) -> BoxFuture<'a, Reply> {
        async move { self.manage(request) }.boxed()
    }

    fn refuse(&self, code: u16, message: &str) -> Value {
        let reason = if code == 429 { "TooManyRequests" } else { "InternalError" };
        status(code, reason, message, "")
    }

    fn unknown_state(&self, body: &mut Value) {
        let pod = if body["items"].is_array() { &mut body["items"][0] } else { body };
        pod["status"]["phase"] = json!("Hibernating");
    }
}
