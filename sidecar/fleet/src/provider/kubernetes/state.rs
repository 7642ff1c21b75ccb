//! What the cluster says of a pod or a Sandbox, in our words.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use serde::Deserialize;

use super::api::{ListMeta, cut};
use super::pod::{AGENT, labels_of};
use crate::provider::{KEY_LABEL, Sandbox, Size, State, rest};

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct List<T> {
    pub(super) metadata: ListMeta,
    pub(super) items: Vec<T>,
}

/// A line of a watch.
#[derive(Debug, Deserialize)]
pub(super) struct Event {
    pub(super) r#type: String,
    pub(super) object: Watched,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Watched {
    pub(super) metadata: Meta,
    /// Of the error that ends it.
    pub(super) code: Option<u16>,
    pub(super) message: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct Meta {
    pub(super) name: String,
    pub(super) uid: String,
    pub(super) resource_version: String,
    pub(super) labels: BTreeMap<String, String>,
    pub(super) annotations: BTreeMap<String, String>,
    #[serde(deserialize_with = "rest::time")]
    creation_timestamp: Option<Timestamp>,
    /// When its grace is over.
    deletion_timestamp: Option<Timestamp>,
    deletion_grace_period_seconds: Option<u64>,
    owner_references: Vec<Owner>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct Owner {
    controller: bool,
    uid: String,
}

impl Meta {
    pub(super) fn labels(&self) -> BTreeMap<String, String> {
        labels_of(&self.labels, &self.annotations)
    }

    /// Somebody makes it, and would make it again: it is not ours to tell of.
    pub(super) fn is_controlled(&self) -> bool {
        self.owner_references.iter().any(|owner| owner.controller)
    }

    pub(super) fn is_owned_by(&self, uid: &str) -> bool {
        self.owner_references.iter().any(|owner| owner.uid == uid)
    }

    pub(super) fn is_leaving(&self) -> bool {
        self.deletion_timestamp.is_some()
    }

    /// The grace that it has to end in, where that runs.
    pub(super) fn grace_seconds(&self) -> Option<u64> {
        self.deletion_grace_period_seconds.filter(|_| self.is_leaving())
    }

    /// When it was told to.
    fn leaves_since(&self) -> Option<Timestamp> {
        let grace = Duration::from_secs(self.deletion_grace_period_seconds.unwrap_or(0));
        self.deletion_timestamp?.checked_sub(grace).ok()
    }

    /// That somebody removes it: whether that is us is for who asks.
    pub(super) fn deleted(&self) -> Option<String> {
        self.is_leaving().then(|| String::from("it is being deleted, and not by the fleet"))
    }

    pub(super) fn created(&self) -> Option<Timestamp> {
        self.creation_timestamp
    }

    pub(super) fn sandbox(&self, state: State) -> Sandbox {
        let labels = self.labels();
        Sandbox {
            key: labels.get(KEY_LABEL).cloned(),
            native: self.name.clone(),
            state,
            reason: None,
            exit_code: None,
            size: None,
            created: self.creation_timestamp,
            deadline: None,
            labels,
            node: None,
            disrupted: None,
        }
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Pod {
    pub(super) metadata: Meta,
    pub(super) spec: PodSpec,
    pub(super) status: PodStatus,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct PodSpec {
    active_deadline_seconds: Option<u64>,
    restart_policy: String,
    node_name: Option<String>,
    pub(super) containers: Vec<Container>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Container {
    name: String,
    resources: Resources,
    pub(super) env: Vec<Variable>,
}

impl Container {
    pub(super) fn size(&self) -> Option<Size> {
        let limits = &self.resources.limits;
        let of = |name: &str| {
            limits.get(name).and_then(|value| match value {
                serde_json::Value::String(text) => quantity(text),
                other => other.as_f64(),
            })
        };
        let whole = |amount: f64| amount.round().clamp(0.0, f64::from(u32::MAX)) as u32;
        let mib = |bytes: f64| whole(bytes / f64::from(1 << 20));
        Some(Size {
            cpu_milli: whole(of("cpu")? * 1000.0),
            memory_mib: mib(of("memory")?),
            disk_mib: of("ephemeral-storage").map_or(0, mib),
        })
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Resources {
    limits: BTreeMap<String, serde_json::Value>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct Variable {
    pub(super) name: String,
    pub(super) value_from: Option<From>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct From {
    pub(super) secret_key_ref: Option<SecretKey>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct SecretKey {
    pub(super) name: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct PodStatus {
    phase: String,
    reason: String,
    message: String,
    #[serde(rename = "podIP")]
    pub(super) pod_ip: String,
    start_time: Option<Timestamp>,
    conditions: Vec<Condition>,
    init_container_statuses: Vec<ContainerStatus>,
    container_statuses: Vec<ContainerStatus>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct Condition {
    pub(super) r#type: String,
    pub(super) status: String,
    pub(super) reason: String,
    pub(super) message: String,
    last_transition_time: Option<Timestamp>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct ContainerStatus {
    name: String,
    state: ContainerState,
    /// How it ended before it was begun anew.
    last_state: ContainerState,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct ContainerState {
    running: Option<serde::de::IgnoredAny>,
    waiting: Option<Word>,
    terminated: Option<Terminated>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Word {
    reason: String,
    message: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Terminated {
    exit_code: i32,
    reason: String,
    message: String,
    finished_at: Option<Timestamp>,
}

pub(super) fn words(reason: &str, message: &str) -> Option<String> {
    let text = match (reason, message) {
        ("", "") => return None,
        ("", text) | (text, "") => text.to_owned(),
        (reason, message) => format!("{reason}: {message}"),
    };
    Some(cut(&text))
}

/// What a container waits for before it has begun, other than its turn.
fn waits(status: &ContainerStatus) -> Option<&Word> {
    let ordinary = ["", "ContainerCreating", "PodInitializing"];
    status.state.waiting.as_ref().filter(|waiting| !ordinary.contains(&waiting.reason.as_str()))
}

/// That never comes to a good end, however long it is waited for.
fn hopeless(waiting: &Word) -> bool {
    waiting.reason == "InvalidImageName"
        || waiting.reason == "CreateContainerConfigError" && waiting.message.contains("runAsNonRoot")
}

/// Kubelet would not have it, for what its node has or is about to do: words of pods that nothing of has run.
fn turned_away(reason: &str, message: &str) -> bool {
    let words = ["NodeAffinity", "NodeShutdown", "UnexpectedAdmissionError"];
    reason.starts_with("OutOf")
        || words.contains(&reason)
        // One that uses more than it may itself is evicted in other words.
        || reason == "Evicted" && message.starts_with("The node had condition")
}

/// How kubelet and the runtime say that they do not know what became of a container: its node was begun anew, or taken away, in between.
fn unknown(ended: &Terminated) -> bool {
    ended.reason == "ContainerStatusUnknown" || ended.reason == "Unknown" && ended.exit_code == 255
}

impl PodSpec {
    /// The one that it is about: ours, or the first of those that somebody else has written down.
    pub(super) fn agent(&self) -> Option<&Container> {
        self.containers.iter().find(|container| container.name == AGENT).or(self.containers.first())
    }
}

impl Pod {
    /// What it is called, the container that it is about.
    pub(super) fn agent_name(&self) -> &str {
        self.spec.agent().map_or(AGENT, |agent| &agent.name)
    }

    fn agent(&self) -> Option<&ContainerStatus> {
        self.status.container_statuses.iter().find(|status| status.name == self.agent_name())
    }

    pub(super) fn agent_spec(&self) -> Option<&Container> {
        self.spec.agent()
    }

    pub(super) fn is_over(&self) -> bool {
        matches!(self.status.phase.as_str(), "Succeeded" | "Failed") || self.outlived()
    }

    /// Its agent has ended, and its pod goes on: kubelet begins the agent anew, as whoever has written the pod wants it, or what somebody has put beside it
    /// has not ended, as a proxy that was injected as an ordinary container. Of a sidecar of ours the pod's end is the end.
    fn outlived(&self) -> bool {
        let mut beside = self.status.container_statuses.iter().filter(|status| status.name != self.agent_name());
        self.ended().is_some() && (self.restarts() || beside.any(|status| status.state.running.is_some()))
    }

    /// Kubelet begins its containers again when they have ended. That is so of every pod that does not say otherwise, and what the API gives says it always.
    fn restarts(&self) -> bool {
        matches!(self.spec.restart_policy.as_str(), "Always" | "OnFailure")
    }

    /// As whoever has claimed it at that time has it: what ended before was the end of nothing of theirs.
    pub(super) fn claimed_at(mut self, at: Option<Timestamp>) -> Self {
        let name = self.agent_name().to_owned();
        let before = |ended: &Terminated| ended.finished_at.zip(at).is_some_and(|(ended, at)| ended < at);
        let agents = self.status.container_statuses.iter_mut().filter(|status| status.name == name);
        for agent in agents.filter(|agent| agent.last_state.terminated.as_ref().is_some_and(before)) {
            agent.last_state = ContainerState::default();
        }
        self
    }

    /// Somebody may still answer in there.
    pub(super) fn runs(&self) -> bool {
        self.status.phase == "Running"
    }

    /// The end of its agent, which runs once: also where it runs again.
    fn ended(&self) -> Option<&Terminated> {
        let agent = self.agent()?;
        agent.state.terminated.as_ref().or(agent.last_state.terminated.as_ref().filter(|_| self.restarts()))
    }

    /// Why it is not further, by whoever says it first.
    fn held_up(&self) -> Option<String> {
        let statuses = self.status.init_container_statuses.iter().chain(&self.status.container_statuses);
        let waiting = statuses.filter_map(waits).map(|waiting| words(&waiting.reason, &waiting.message)).next().flatten();
        let failed = self.status.init_container_statuses.iter().find_map(|status| {
            let ended = status.state.terminated.as_ref().filter(|ended| ended.exit_code != 0)?;
            let why = words(&ended.reason, &ended.message).map_or_else(String::new, |why| format!(" ({why})"));
            Some(format!("its init container `{}` has ended with exit code {}{why}", status.name, ended.exit_code))
        });
        waiting.or(failed).or_else(|| {
            let unplaced = self.status.conditions.iter().find(|one| one.r#type == "PodScheduled" && one.status == "False");
            unplaced.and_then(|one| words(&one.reason, &one.message))
        })
    }

    fn state(&self) -> State {
        if self.metadata.is_leaving() {
            return State::Stopping;
        }
        let statuses = || self.status.init_container_statuses.iter().chain(&self.status.container_statuses);
        match self.status.phase.as_str() {
            // Nobody has looked at it yet.
            "" => State::Creating,
            "Pending" if statuses().filter_map(waits).any(hopeless) => State::Failed,
            "Pending" => State::Creating,
            "Running" if self.outlived() => State::Stopped,
            // Its sidecar ends after it.
            "Running" if self.ended().is_some() => State::Stopping,
            "Running" if self.agent().is_some_and(|agent| agent.state.waiting.is_some()) => State::Creating,
            "Running" => State::Running,
            "Succeeded" => State::Stopped,
            "Failed" if self.ended().is_some() => State::Stopped,
            "Failed" => State::Failed,
            other => State::Unknown(cut(other)),
        }
    }

    fn reason(&self) -> Option<String> {
        // Of the pod: Evicted, DeadlineExceeded, NodeLost.
        words(&self.status.reason, &self.status.message).or_else(|| {
            let ended = self.ended().filter(|ended| !matches!(ended.reason.as_str(), "" | "Completed" | "Error"));
            ended.map(|ended| match ended.reason.as_str() {
                // What the container itself has written is not repeated.
                "OOMKilled" => Some(ended.reason.clone()),
                _ => words(&ended.reason, &ended.message),
            })?
        })
    }

    /// Why it is taken away, or was, other than by its own end: an eviction, a taint, a pod that comes first, a node that ends, or somebody's word.
    fn disrupted(&self) -> Option<String> {
        let PodStatus { phase, reason, message, conditions, .. } = &self.status;
        let told =
            |how: &str, said: Option<String>| format!("{how}{}", said.map_or_else(String::new, |said| format!(" ({said})")));
        let ended = self.ended().and_then(|ended| ended.finished_at);
        let target = conditions.iter().find(|one| one.r#type == "DisruptionTarget" && one.status == "True");
        if let Some(target) = target.filter(|_| phase != "Succeeded") {
            // What had ended by then has ended by itself.
            let before = ended.zip(target.last_transition_time).is_some_and(|(ended, at)| ended < at);
            return (!before).then(|| told("the cluster takes its pod away", words(&target.reason, &target.message)));
        }
        if phase == "Failed" && turned_away(reason, message) {
            return Some(told("its node did not take its pod", words(reason, message)));
        }
        // What the pod itself says of its end is known.
        let over = (phase == "Failed" || self.restarts()) && reason.is_empty();
        if let Some(ended) = self.ended().filter(|ended| over && unknown(ended)) {
            return Some(told("its node has lost its container", words(&ended.reason, &ended.message)));
        }
        // Or it ends for that.
        let before = ended.zip(self.metadata.leaves_since()).is_some_and(|(ended, at)| ended < at);
        self.metadata.deleted().filter(|_| phase != "Succeeded" && !before)
    }

    /// By kubelet's count, which begins when it has taken the pod.
    fn deadline(&self) -> Option<Timestamp> {
        let seconds = Duration::from_secs(self.spec.active_deadline_seconds?);
        self.status.start_time?.checked_add(seconds).ok()
    }

    pub(super) fn sandbox(&self) -> Sandbox {
        let state = self.state();
        let reason =
            self.reason().or_else(|| if matches!(state, State::Creating | State::Failed) { self.held_up() } else { None });
        Sandbox {
            exit_code: self.ended().map(|ended| ended.exit_code),
            reason,
            size: self.agent_spec().and_then(Container::size),
            deadline: self.deadline(),
            node: self.spec.node_name.clone(),
            disrupted: self.disrupted(),
            ..self.metadata.sandbox(state)
        }
    }
}

/// `500m`, `1Gi`, `2`, `1e3`: an amount as Kubernetes writes it.
fn quantity(text: &str) -> Option<f64> {
    let end = text.find(|c: char| !(c.is_ascii_digit() || matches!(c, '.' | '+' | '-'))).unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let number: f64 = number.parse().ok()?;
    let times = match unit {
        "n" => 1e-9,
        "u" => 1e-6,
        "m" => 1e-3,
        "" => 1.0,
        "k" => 1e3,
        "M" => 1e6,
        "G" => 1e9,
        "T" => 1e12,
        "P" => 1e15,
        "E" => 1e18,
        "Ki" => 1024.0,
        "Mi" => 1024f64.powi(2),
        "Gi" => 1024f64.powi(3),
        "Ti" => 1024f64.powi(4),
        "Pi" => 1024f64.powi(5),
        "Ei" => 1024f64.powi(6),
        other => 10f64.powi(other.strip_prefix(['e', 'E'])?.parse().ok()?),
    };
    Some(number * times)
}

/// A Sandbox of kubernetes-sigs/agent-sandbox.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Custom {
    pub(super) metadata: Meta,
    spec: CustomSpec,
    status: CustomStatus,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct CustomSpec {
    operating_mode: String,
    shutdown_time: Option<Timestamp>,
    pod_template: Template,
    volume_claim_templates: Vec<serde::de::IgnoredAny>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Template {
    pub(super) spec: PodSpec,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct CustomStatus {
    conditions: Vec<Condition>,
}

impl Custom {
    /// A pod that was taken from a pool has a name of its own.
    pub(super) fn pod_name(&self) -> &str {
        let named = self.metadata.annotations.get("agents.x-k8s.io/pod-name").filter(|name| !name.is_empty());
        named.unwrap_or(&self.metadata.name)
    }

    pub(super) fn agent_spec(&self) -> Option<&Container> {
        self.spec.pod_template.spec.agent()
    }

    /// Its volumes are there when its pod is another.
    fn keeps(&self) -> bool {
        !self.spec.volume_claim_templates.is_empty()
    }

    fn is_suspended(&self) -> bool {
        self.spec.operating_mode == "Suspended"
    }

    fn condition(&self, kind: &str) -> Option<&Condition> {
        self.status.conditions.iter().find(|one| one.r#type == kind)
    }

    /// By its own conditions.
    fn state(&self) -> State {
        let is = |kind: &str| self.condition(kind).is_some_and(|one| one.status == "True");
        let ready = self.condition("Ready").map_or("", |one| one.reason.as_str());
        if self.metadata.is_leaving() || ready == "SandboxExpired" {
            State::Stopping
        } else if self.is_suspended() {
            // What was said of it before it was told to sleep may still stand there.
            if is("Suspended") { State::Paused } else { State::Pausing }
        } else if is("Finished") {
            State::Stopped
        } else if is("Ready") {
            State::Running
        } else {
            State::Creating
        }
    }

    fn told(&self, state: State) -> Sandbox {
        // It looks for its pod as soon as it is there.
        let ready = self.condition("Ready").filter(|one| one.status == "False" && one.reason != "DependenciesNotReady");
        let unplaced = self.condition("PodScheduled").filter(|one| one.status == "False");
        let why = ready.or(unplaced).filter(|_| !matches!(state, State::Paused | State::Running));
        Sandbox {
            reason: why.and_then(|one| words(&one.reason, &one.message)),
            size: self.agent_spec().and_then(Container::size),
            deadline: self.spec.shutdown_time,
            disrupted: self.metadata.deleted(),
            ..self.metadata.sandbox(state)
        }
    }

    pub(super) fn sandbox(&self) -> Sandbox {
        self.told(self.state())
    }

    /// With what its pod says, which is more and sooner. `None`: there is no pod.
    pub(super) fn with(&self, pod: Option<&Pod>) -> Sandbox {
        let state = self.state();
        let Some(pod) = pod else {
            return self.told(match state {
                State::Pausing => State::Paused,
                State::Running | State::Stopped => State::Creating,
                other => other,
            });
        };
        let inner = pod.sandbox();
        let state = match (state, inner.state) {
            (State::Stopping, _) => State::Stopping,
            _ if self.is_suspended() => State::Pausing,
            // The one of before: another is made when it is gone, with what was kept.
            (_, State::Stopping) if pod.metadata.is_leaving() && self.keeps() => State::Creating,
            // Its node did not take it: what is kept is there as before.
            (_, State::Failed) if self.keeps() && inner.disrupted.is_some() => State::Stopped,
            (_, of_pod) => of_pod,
        };
        // What is over is not made anew as long as it stays.
        let stays = pod.is_over() && !pod.metadata.is_leaving();
        let disrupted = inner.disrupted.filter(|_| (!self.keeps() || stays) && !self.is_suspended());
        let own = self.told(state);
        let deadline = match (own.deadline, inner.deadline) {
            (Some(one), Some(other)) => Some(one.min(other)),
            (one, other) => one.or(other),
        };
        Sandbox {
            reason: inner.reason.or(own.reason.clone()),
            exit_code: inner.exit_code,
            deadline,
            node: inner.node,
            disrupted: own.disrupted.clone().or(disrupted),
            ..own
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn told(pod: Value) -> (State, Option<i32>, Option<String>) {
        let pod: Pod = serde_json::from_value(pod).unwrap();
        let sandbox = pod.sandbox();
        (sandbox.state, sandbox.exit_code, sandbox.reason)
    }

    fn agent(state: Value) -> Value {
        json!([{"name": "agent", "state": state}])
    }

    #[test]
    fn a_pods_words_are_ours() {
        let back_off = "Back-off pulling image \"nowhere/x\"";
        let table = [
            (json!({}), State::Creating, None, None),
            (json!({"phase": "Pending"}), State::Creating, None, None),
            (
                json!({"phase": "Pending", "conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes are available"}]}),
                State::Creating,
                None,
                Some("Unschedulable: 0/3 nodes are available"),
            ),
            (
                json!({"phase": "Pending", "containerStatuses": agent(json!({"waiting": {"reason": "ContainerCreating"}}))}),
                State::Creating,
                None,
                None,
            ),
            (
                json!({"phase": "Pending", "containerStatuses": agent(json!({"waiting": {"reason": "ImagePullBackOff", "message": back_off}}))}),
                State::Creating,
                None,
                Some("ImagePullBackOff: Back-off pulling image \"nowhere/x\""),
            ),
            (
                json!({"phase": "Pending", "containerStatuses": agent(json!({"waiting": {"reason": "InvalidImageName", "message": "no"}}))}),
                State::Failed,
                None,
                Some("InvalidImageName: no"),
            ),
            (
                json!({"phase": "Pending", "containerStatuses": agent(json!({"waiting": {"reason": "CreateContainerConfigError", "message": "secret \"a\" not found"}}))}),
                State::Creating,
                None,
                Some("CreateContainerConfigError: secret \"a\" not found"),
            ),
            (
                json!({"phase": "Pending", "containerStatuses": agent(json!({"waiting": {"reason": "CreateContainerConfigError",
                    "message": "container has runAsNonRoot and image will run as root"}}))}),
                State::Failed,
                None,
                Some("CreateContainerConfigError: container has runAsNonRoot and image will run as root"),
            ),
            (
                json!({"phase": "Pending", "initContainerStatuses": [{"name": "sidecar", "state": {"waiting": {"reason": "CrashLoopBackOff", "message": "m"}}}],
                    "containerStatuses": agent(json!({"waiting": {"reason": "PodInitializing"}}))}),
                State::Creating,
                None,
                Some("CrashLoopBackOff: m"),
            ),
            (json!({"phase": "Running", "containerStatuses": agent(json!({"running": {}}))}), State::Running, None, None),
            (
                json!({"phase": "Running", "containerStatuses": agent(json!({"terminated": {"exitCode": 0, "reason": "Completed"}}))}),
                State::Stopping,
                Some(0),
                None,
            ),
            (
                json!({"phase": "Succeeded", "containerStatuses": agent(json!({"terminated": {"exitCode": 0, "reason": "Completed"}}))}),
                State::Stopped,
                Some(0),
                None,
            ),
            (
                json!({"phase": "Failed", "containerStatuses": agent(json!({"terminated": {"exitCode": 3, "reason": "Error", "message": "its own words"}}))}),
                State::Stopped,
                Some(3),
                None,
            ),
            (
                json!({"phase": "Failed", "containerStatuses": agent(json!({"terminated": {"exitCode": 137, "reason": "OOMKilled", "message": "its own words"}}))}),
                State::Stopped,
                Some(137),
                Some("OOMKilled"),
            ),
            (
                json!({"phase": "Failed", "reason": "DeadlineExceeded", "message": "Pod was active on the node longer than the specified deadline",
                    "containerStatuses": agent(json!({"terminated": {"exitCode": 137, "reason": "Error"}}))}),
                State::Stopped,
                Some(137),
                Some("DeadlineExceeded: Pod was active on the node longer than the specified deadline"),
            ),
            (
                json!({"phase": "Failed", "reason": "Evicted", "message": "low on memory"}),
                State::Failed,
                None,
                Some("Evicted: low on memory"),
            ),
            (
                json!({"phase": "Failed", "containerStatuses": agent(json!({"terminated": {"exitCode": 128, "reason": "StartError", "message": "no such file"}}))}),
                State::Stopped,
                Some(128),
                Some("StartError: no such file"),
            ),
            (
                json!({"phase": "Failed", "initContainerStatuses": [{"name": "ready", "state": {"terminated": {"exitCode": 0, "reason": "Completed"}}},
                    {"name": "proxy", "state": {"terminated": {"exitCode": 255, "reason": "Error", "message": "iptables: denied"}}}],
                    "containerStatuses": agent(json!({"waiting": {"reason": "PodInitializing"}}))}),
                State::Failed,
                None,
                Some("its init container `proxy` has ended with exit code 255 (Error: iptables: denied)"),
            ),
            (json!({"phase": "Unknown", "reason": "NodeLost"}), State::Unknown(String::from("Unknown")), None, Some("NodeLost")),
        ];
        for (status, state, code, reason) in table {
            let said = told(json!({"metadata": {"name": "a"}, "status": status}));
            assert_eq!(said, (state, code, reason.map(String::from)), "{status}");
        }
        // A proxy of a mesh is beside it, and does not end.
        let meshed = |policy: &str, proxy: &str| {
            let statuses =
                json!([{"name": "proxy", "state": {proxy: {}}}, {"name": "agent", "state": {"terminated": {"exitCode": 3}}}]);
            let spec = json!({"restartPolicy": policy, "containers": [{"name": "proxy"}, {"name": "agent"}]});
            let pod =
                json!({"metadata": {"name": "a"}, "spec": spec, "status": {"phase": "Running", "containerStatuses": statuses}});
            let over = serde_json::from_value::<Pod>(pod.clone()).unwrap().is_over();
            let (state, code, _) = self::told(pod);
            (state, code, over)
        };
        assert_eq!(meshed("Never", "running"), (State::Stopped, Some(3), true));
        assert_eq!(meshed("Never", "terminated"), (State::Stopping, Some(3), false));
        assert_eq!(meshed("Always", "running"), (State::Stopped, Some(3), true));
        // What kubelet begins anew has ended, whichever of its lives is looked at.
        let ended = json!({"terminated": {"exitCode": 3, "finishedAt": "2026-11-27T00:00:10Z"}});
        for state in [&json!({"running": {}}), &json!({"waiting": {"reason": "CrashLoopBackOff", "message": "back-off"}}), &ended]
        {
            let pod = |policy: &str| {
                json!({"metadata": {"name": "a"}, "spec": {"restartPolicy": policy, "containers": [{"name": "agent"}]}, "status": {"phase": "Running",
                    "containerStatuses": [{"name": "agent", "restartCount": 1, "state": state, "lastState": &ended}]}})
            };
            assert_eq!(told(pod("Always")), (State::Stopped, Some(3), None), "{state}");
            assert_eq!(told(pod("OnFailure")).0, State::Stopped, "{state}");
            let claimed = |at: &str| serde_json::from_value::<Pod>(pod("Always")).unwrap().claimed_at(at.parse().ok()).sandbox();
            assert_eq!(claimed("2026-11-27T00:00:10Z").exit_code, Some(3), "{state}");
            let before = claimed("2026-11-27T00:00:11Z");
            let now = if state.get("terminated").is_some() {
                (State::Stopped, Some(3))
            } else if state.get("running").is_some() {
                (State::Running, None)
            } else {
                (State::Creating, None)
            };
            assert_eq!((before.state, before.exit_code), now, "{state}");
        }
        let leaving = json!({"metadata": {"name": "a", "deletionTimestamp": "2026-11-27T00:00:00Z"}, "status": {"phase": "Running", "reason": "NodeLost"}});
        assert_eq!(told(leaving), (State::Stopping, None, Some(String::from("NodeLost"))));
    }

    #[test]
    fn what_takes_a_pod_away_is_no_end_of_its_own() {
        let target = |status: &str, reason: &str| json!([{"type": "DisruptionTarget", "status": status, "reason": reason, "message": "m", "lastTransitionTime": "2026-11-27T00:00:05Z"}]);
        let ended = |at: &str| json!([{"name": "agent", "state": {"terminated": {"exitCode": 137, "finishedAt": at}}}]);
        let told = |leaving: bool, status: Value| -> Option<String> {
            let at = leaving.then_some("2026-11-27T00:00:35Z");
            let pod: Pod =
                serde_json::from_value(json!({"metadata": {"name": "a", "deletionTimestamp": at}, "status": status})).unwrap();
            pod.sandbox().disrupted
        };
        for reason in [
            "EvictionByEvictionAPI",
            "DeletionByTaintManager",
            "TerminationByKubelet",
            "PreemptionByScheduler",
            "DeletionByPodGC",
        ] {
            let said = told(reason != "TerminationByKubelet", json!({"phase": "Running", "conditions": target("True", reason)}));
            assert_eq!(said, Some(format!("the cluster takes its pod away ({reason}: m)")));
        }
        let deleted = Some(String::from("it is being deleted, and not by the fleet"));
        for (leaving, status, expected) in [
            (false, json!({"phase": "Running"}), None),
            (false, json!({"phase": "Running", "conditions": target("False", "PreemptionByScheduler")}), None),
            (true, json!({"phase": "Running"}), deleted.clone()),
            (true, json!({"phase": "Pending"}), deleted.clone()),
            // Kubelet says how it has ended before it is gone.
            (true, json!({"phase": "Failed"}), deleted.clone()),
            (true, json!({"phase": "Failed", "containerStatuses": ended("2026-11-27T00:00:36Z")}), deleted),
            (true, json!({"phase": "Succeeded", "containerStatuses": ended("2026-11-27T00:00:36Z")}), None),
            // It had come to its end before somebody removed what was left of it.
            (true, json!({"phase": "Failed", "containerStatuses": ended("2026-11-27T00:00:01Z")}), None),
            (true, json!({"phase": "Succeeded", "conditions": target("True", "EvictionByEvictionAPI")}), None),
            (
                true,
                json!({"phase": "Failed", "conditions": target("True", "EvictionByEvictionAPI"), "containerStatuses": ended("2026-11-27T00:00:01Z")}),
                None,
            ),
            (
                false,
                json!({"phase": "Failed", "conditions": target("True", "TerminationByKubelet"), "containerStatuses": ended("2026-11-27T00:00:05Z")}),
                Some(String::from("the cluster takes its pod away (TerminationByKubelet: m)")),
            ),
            // Beyond what it may have itself.
            (false, json!({"phase": "Failed", "reason": "Evicted", "message": "exceeds its limit"}), None),
            // Its node had not the room that the scheduler saw, or was about to end.
            (
                false,
                json!({"phase": "Failed", "reason": "OutOfcpu", "message": "Pod was rejected"}),
                Some(String::from("its node did not take its pod (OutOfcpu: Pod was rejected)")),
            ),
            (
                false,
                json!({"phase": "Failed", "reason": "NodeShutdown", "message": "Pod was rejected as the node is shutting down."}),
                Some(String::from(
                    "its node did not take its pod (NodeShutdown: Pod was rejected as the node is shutting down.)",
                )),
            ),
            (
                false,
                json!({"phase": "Failed", "reason": "Evicted", "message": "The node had condition: [DiskPressure]. "}),
                Some(String::from("its node did not take its pod (Evicted: The node had condition: [DiskPressure].)")),
            ),
            (false, json!({"phase": "Failed", "reason": "SysctlForbidden", "message": "forbidden sysctl"}), None),
            // Its node was begun anew below it.
            (
                false,
                json!({"phase": "Failed", "containerStatuses": [{"name": "agent", "state": {"terminated": {"exitCode": 255, "reason": "Unknown"}}}]}),
                Some(String::from("its node has lost its container (Unknown)")),
            ),
            (
                false,
                json!({"phase": "Failed", "containerStatuses": [{"name": "agent", "state": {"terminated": {"exitCode": 255, "reason": "Error"}}}]}),
                None,
            ),
            (
                false,
                json!({"phase": "Failed", "reason": "Evicted", "message": "exceeds its limit", "containerStatuses":
                    [{"name": "agent", "state": {"terminated": {"exitCode": 137, "reason": "ContainerStatusUnknown"}}}]}),
                None,
            ),
        ] {
            assert_eq!(told(leaving, status.clone()), expected, "{status}");
        }
    }

    #[test]
    fn its_size_is_what_it_was_given_however_that_is_written() {
        for (text, expected) in [
            ("500m", 0.5),
            ("2", 2.0),
            ("1.5", 1.5),
            ("1Gi", 1073741824.0),
            ("128974848", 128974848.0),
            ("129e6", 129e6),
            ("129M", 129e6),
            ("2E", 2e18),
            ("2E3", 2e3),
            ("1Pi", 1125899906842624.0),
            ("123Mi", 128974848.0),
        ] {
            assert_eq!(quantity(text), Some(expected), "{text}");
        }
        for wrong in ["", "Gi", "1Zi", "x"] {
            assert_eq!(quantity(wrong), None, "{wrong}");
        }
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": "a"},
            "spec": {"activeDeadlineSeconds": 3600, "containers": [{"name": "agent", "resources": {"limits": {"cpu": 2, "memory": "1Gi", "ephemeral-storage": "5Gi"}}}]},
            "status": {"startTime": "2026-11-27T00:00:00Z"},
        }))
        .unwrap();
        let told = pod.sandbox();
        assert_eq!(told.size, Some(Size { cpu_milli: 2000, memory_mib: 1024, disk_mib: 5120 }));
        assert_eq!(told.deadline, "2026-11-27T01:00:00Z".parse().ok());
    }

    #[test]
    fn a_sandbox_is_what_its_pod_is_and_what_it_is_told_to_be() {
        let kept = |mode: &str, conditions: Value, volumes: Value| -> Custom {
            serde_json::from_value(json!({"metadata": {"name": "a"}, "spec": {"operatingMode": mode, "podTemplate": {"spec": {}}, "volumeClaimTemplates": volumes},
                "status": {"conditions": conditions}}))
            .unwrap()
        };
        let custom = |mode: &str, conditions: Value| kept(mode, conditions, json!([{}]));
        let pod = |text: Value| -> Pod { serde_json::from_value(text).unwrap() };
        let running = || pod(json!({"metadata": {"name": "a"}, "status": {"phase": "Running"}}));
        let leaving = || {
            pod(json!({"metadata": {"name": "a", "deletionTimestamp": "2026-11-27T00:00:00Z"}, "status": {"phase": "Running"}}))
        };
        let over = || {
            pod(
                json!({"metadata": {"name": "a"}, "status": {"phase": "Failed", "containerStatuses": agent(json!({"terminated": {"exitCode": 3}}))}}),
            )
        };
        let ready = json!([{"type": "Ready", "status": "True", "reason": "DependenciesReady"}]);
        // Of before it was told to sleep, or to wake.
        let suspended =
            json!([{"type": "Suspended", "status": "True"}, {"type": "Ready", "status": "False", "reason": "SandboxSuspended"}]);
        for (mode, conditions, pod, by_itself, with_pod) in [
            ("Running", json!([]), None, State::Creating, State::Creating),
            ("Running", ready.clone(), Some(running()), State::Running, State::Running),
            ("Running", ready.clone(), None, State::Running, State::Creating),
            ("Running", ready.clone(), Some(leaving()), State::Running, State::Creating),
            ("Suspended", ready.clone(), Some(leaving()), State::Pausing, State::Pausing),
            ("Suspended", ready.clone(), None, State::Pausing, State::Paused),
            ("Suspended", suspended.clone(), None, State::Paused, State::Paused),
            ("Running", suspended, Some(running()), State::Creating, State::Running),
            (
                "Running",
                json!([{"type": "Finished", "status": "True", "reason": "PodFailed"}]),
                Some(over()),
                State::Stopped,
                State::Stopped,
            ),
            (
                "Running",
                json!([{"type": "Ready", "status": "False", "reason": "SandboxExpired"}]),
                None,
                State::Stopping,
                State::Stopping,
            ),
        ] {
            let custom = custom(mode, conditions);
            let what = format!("{custom:?} {pod:?}");
            assert_eq!((custom.sandbox().state, custom.with(pod.as_ref()).state), (by_itself, with_pod), "{what}");
        }
        assert_eq!(custom("Running", json!([])).with(Some(&over())).exit_code, Some(3));
        // What comes after it has nothing of it: it is this one that ends.
        let without = kept("Running", ready.clone(), json!([])).with(Some(&leaving()));
        assert!(without.state == State::Stopping && without.disrupted.is_some(), "{without:?}");
        assert_eq!(custom("Running", ready.clone()).with(Some(&leaving())).disrupted, None);
        // Its controller makes no other beside one that kubelet has ended: somebody has to remove that.
        let ended = json!({"metadata": {"name": "a"}, "status": {"phase": "Failed", "containerStatuses": agent(json!({"terminated": {"exitCode": 137}})),
            "conditions": [{"type": "DisruptionTarget", "status": "True", "reason": "TerminationByKubelet"}]}});
        let ended = custom("Running", ready.clone()).with(Some(&pod(ended)));
        assert!(ended.state == State::Stopped && ended.disrupted.is_some(), "{ended:?}");
        let refused = json!({"metadata": {"name": "a"}, "status": {"phase": "Failed", "reason": "OutOfcpu"}});
        let refused = custom("Running", ready.clone()).with(Some(&pod(refused)));
        assert!(refused.state == State::Stopped && refused.disrupted.is_some(), "{refused:?}");
        assert_eq!(kept("Suspended", ready, json!([])).with(Some(&leaving())).disrupted, None, "it was told to sleep");
    }
}
