//! A Job of one pod, which is never made twice: what the cluster says of it, with what its pod says. Its controller counts its life from its creation,
//! and removes it when nobody has done so long after its end.

use std::time::Duration;

use jiff::Timestamp;
use serde::Deserialize;
use serde_json::{Value, json};

use super::pod::AGENT;
use super::state::{Condition, Container, Meta, Pod, Template, words};
use crate::provider::{Sandbox, State};

/// What its controller puts on its pods. Kubernetes 1.27.
const NAME_LABEL: &str = "batch.kubernetes.io/job-name";

/// The exit code of what has heard SIGTERM.
const TOLD_TO_END: i32 = 143;
/// That its pod has failed is its pod's to explain, if that is there.
const POD_FAILED: [&str; 2] = ["BackoffLimitExceeded", POD_FAILURE_POLICY];
const POD_FAILURE_POLICY: &str = "PodFailurePolicy";

/// The spec around a pod's template.
pub(super) fn spec(template: &Value, ttl_seconds: u64, finished_seconds: u32) -> Value {
    json!({
        // A task that was begun has cost money: whether it is begun again is the fleet's to say.
        "backoffLimit": 0,
        // Counted by the controller also while no node is found, and by kubelet for itself.
        "activeDeadlineSeconds": ttl_seconds,
        "ttlSecondsAfterFinished": finished_seconds,
        // While one is ending there is no second one.
        "podReplacementPolicy": "Failed",
        // It is over in any case: how its pod has ended is in its condition then, and there also when the pod is gone with its node.
        "podFailurePolicy": { "rules": [
            { "action": "FailJob", "onPodConditions": [{ "type": "DisruptionTarget", "status": "True" }] },
            { "action": "FailJob", "onExitCodes": { "containerName": AGENT, "operator": "NotIn", "values": [0] } },
        ] },
        "template": template,
    })
}

/// The pods of a Job, as a list is asked for: whose they are is said by their owner.
pub(super) fn selector(name: &str) -> String {
    format!("{NAME_LABEL}={name}")
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Job {
    pub(super) metadata: Meta,
    spec: JobSpec,
    status: JobStatus,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct JobSpec {
    suspend: bool,
    active_deadline_seconds: Option<u64>,
    template: Template,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct JobStatus {
    start_time: Option<Timestamp>,
    conditions: Vec<Condition>,
    active: u32,
    ready: u32,
}

impl Job {
    fn condition(&self, kind: &str) -> Option<&Condition> {
        self.status.conditions.iter().find(|one| one.r#type == kind && one.status == "True")
    }

    fn failed(&self) -> Option<&Condition> {
        self.condition("Failed")
    }

    pub(super) fn is_over(&self) -> bool {
        self.failed().or(self.condition("Complete")).is_some()
    }

    /// It is over, and its pod is still ending. Kubernetes 1.31.
    fn is_ending(&self) -> bool {
        self.condition("FailureTarget").or(self.condition("SuccessCriteriaMet")).is_some()
    }

    pub(super) fn agent_spec(&self) -> Option<&Container> {
        self.spec.template.spec.agent()
    }

    /// The pod that it is about, of those that have its label.
    pub(super) fn pod(&self, found: Vec<Pod>) -> Option<Pod> {
        let own = found.into_iter().filter(|pod| pod.metadata.is_owned_by(&self.metadata.uid));
        // There is one, unless somebody has suspended it meanwhile.
        own.max_by_key(|pod| (!pod.metadata.is_leaving(), pod.metadata.created()))
    }

    /// The exit code of its pod, which may be gone.
    fn exit_code(&self) -> Option<i32> {
        // Of its one pod everything has ended well.
        if self.condition("Complete").is_some() {
            return Some(0);
        }
        let told = self.failed().or(self.condition("FailureTarget")).filter(|one| one.reason == POD_FAILURE_POLICY)?;
        told.message.split_once("failed with exit code ")?.1.split(' ').next()?.parse().ok()
    }

    /// By its own conditions.
    fn state(&self) -> State {
        if self.metadata.is_leaving() {
            State::Stopping
        } else if self.is_over() {
            State::Stopped
        } else if self.is_ending() {
            State::Stopping
        } else if self.status.active > 0 && self.status.ready > 0 {
            State::Running
        } else {
            State::Creating
        }
    }

    fn told(&self, state: State) -> Sandbox {
        let failed = self.failed().or(self.condition("FailureTarget")).filter(|one| !POD_FAILED.contains(&one.reason.as_str()));
        // Nothing is made until somebody lets it: that is waited for.
        let queued = self.condition("Suspended").filter(|_| self.spec.suspend && state == State::Creating);
        let life = self.spec.active_deadline_seconds.map(Duration::from_secs);
        let deadline = life.zip(self.status.start_time).and_then(|(life, start)| start.checked_add(life).ok());
        Sandbox {
            reason: failed.or(queued).and_then(|one| words(&one.reason, &one.message)),
            exit_code: self.exit_code(),
            size: self.agent_spec().and_then(Container::size),
            deadline,
            disrupted: self.metadata.deleted(),
            ..self.metadata.sandbox(state)
        }
    }

    /// Without its pod: what a list says.
    pub(super) fn sandbox(&self) -> Sandbox {
        self.told(self.state())
    }

    /// With what its pod says, which is more and sooner. `None`: there is no pod.
    pub(super) fn with(&self, pod: Option<&Pod>) -> Sandbox {
        let state = self.state();
        let Some(pod) = pod else {
            let late = self.failed().is_some_and(|one| one.reason == "DeadlineExceeded");
            // Who is told to end is told by whoever takes its pod away.
            let by_itself = self.exit_code().is_some_and(|code| code != TOLD_TO_END);
            let (state, gone) = match state {
                // It was taken away before anybody has seen how it ended.
                State::Stopped if self.failed().is_some() && !late && !by_itself => (State::Failed, true),
                // What is counted as running is seen soon.
                State::Running => (State::Creating, false),
                other => (other, false),
            };
            let told = self.told(state);
            let why = self.failed().filter(|_| gone).map(|one| format!("its pod is gone: {}", one.message));
            let disrupted = told.disrupted.or(why.clone());
            return Sandbox { reason: told.reason.or(why), disrupted, ..told };
        };
        let inner = pod.sandbox();
        let ending = self.is_over() || self.is_ending() || self.spec.suspend;
        let state = match (state, inner.state) {
            (State::Stopping, _) => State::Stopping,
            // It is told to end, if not yet itself.
            (_, State::Creating | State::Running) if ending => State::Stopping,
            (_, of_pod) => of_pod,
        };
        let own = self.told(state);
        let deadline = [own.deadline, inner.deadline].into_iter().flatten().min();
        // By its controller: its time is over, or it waits for its turn again.
        let by_its_own = self.failed().or(self.condition("FailureTarget")).is_some_and(|one| one.reason == "DeadlineExceeded");
        let disrupted = inner.disrupted.filter(|_| !by_its_own && !self.spec.suspend);
        Sandbox {
            reason: own.reason.or(inner.reason),
            exit_code: inner.exit_code.or(own.exit_code),
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

    fn condition(kind: &str, reason: &str) -> Value {
        json!({"type": kind, "status": "True", "reason": reason, "message": "m"})
    }

    fn job(status: Value) -> Job {
        serde_json::from_value(json!({"metadata": {"name": "a", "uid": "u"}, "spec": {"activeDeadlineSeconds": 60, "suspend": status["suspend"] == true},
            "status": status}))
        .unwrap()
    }

    fn pod(name: &str, phase: &str, more: Value) -> Pod {
        let mut pod = json!({"metadata": {"name": name, "ownerReferences": [{"uid": "u", "controller": true}]}, "status": {"phase": phase}});
        for (at, value) in more.as_object().unwrap() {
            *pod.pointer_mut("/metadata").unwrap().as_object_mut().unwrap().entry(at.clone()).or_insert(Value::Null) =
                value.clone();
            pod["status"][at] = value.clone();
        }
        serde_json::from_value(pod).unwrap()
    }

    fn ended(code: i32) -> Value {
        json!({"containerStatuses": [{"name": "agent", "state": {"terminated": {"exitCode": code, "reason": if code == 0 { "Completed" } else { "Error" }}}}]})
    }

    #[test]
    fn a_job_is_what_its_conditions_and_its_pod_say() {
        let leaving = json!({"deletionTimestamp": "2026-11-27T00:00:00Z"});
        let late = json!([condition("FailureTarget", "DeadlineExceeded"), condition("Failed", "DeadlineExceeded")]);
        let spent = json!([condition("FailureTarget", "BackoffLimitExceeded"), condition("Failed", "BackoffLimitExceeded")]);
        let none: Option<Pod> = None;
        for (status, pod, alone, with, why) in [
            (json!({}), none, State::Creating, State::Creating, None),
            // Its controller has made one, and it is not seen yet.
            (json!({"active": 1, "ready": 1}), None, State::Running, State::Creating, None),
            (json!({"active": 1, "ready": 0}), Some(pod("a", "Pending", json!({}))), State::Creating, State::Creating, None),
            (json!({"active": 1, "ready": 1}), Some(pod("a", "Running", json!({}))), State::Running, State::Running, None),
            (json!({"active": 1, "ready": 1}), Some(pod("a", "Running", leaving.clone())), State::Running, State::Stopping, None),
            (json!({"active": 1}), Some(pod("a", "Succeeded", ended(0))), State::Creating, State::Stopped, None),
            (
                json!({"conditions": [condition("SuccessCriteriaMet", "CompletionsReached"), condition("Complete", "CompletionsReached")]}),
                Some(pod("a", "Succeeded", ended(0))),
                State::Stopped,
                State::Stopped,
                None,
            ),
            (json!({"conditions": spent}), Some(pod("a", "Failed", ended(3))), State::Stopped, State::Stopped, None),
            // Evicted, and gone with its node.
            (json!({"conditions": spent}), None, State::Stopped, State::Failed, Some("its pod is gone: m")),
            (
                json!({"active": 1, "conditions": [condition("FailureTarget", "DeadlineExceeded")]}),
                Some(pod("a", "Running", leaving)),
                State::Stopping,
                State::Stopping,
                Some("DeadlineExceeded: m"),
            ),
            (json!({"conditions": late}), None, State::Stopped, State::Stopped, Some("DeadlineExceeded: m")),
            // Its controller takes its pod away in a moment.
            (
                json!({"conditions": late}),
                Some(pod("a", "Running", json!({}))),
                State::Stopped,
                State::Stopping,
                Some("DeadlineExceeded: m"),
            ),
            (
                json!({"suspend": true, "conditions": [condition("Suspended", "JobSuspended")]}),
                None,
                State::Creating,
                State::Creating,
                Some("JobSuspended: m"),
            ),
            (
                json!({"suspend": true, "active": 1, "ready": 1}),
                Some(pod("a", "Running", json!({}))),
                State::Running,
                State::Stopping,
                None,
            ),
        ] {
            let told = job(status.clone()).with(pod.as_ref());
            assert_eq!((job(status.clone()).sandbox().state, told.state, told.reason.as_deref()), (alone, with, why), "{status}");
            assert_eq!(told.native, "a");
        }
        assert_eq!(job(json!({})).with(Some(&pod("a", "Failed", ended(3)))).exit_code, Some(3));
        // Nobody removes the pod of a Job that is over but somebody who is not its controller.
        for (conditions, says) in [
            (json!([condition("Failed", "BackoffLimitExceeded")]), Some("its pod is gone: m")),
            (json!([condition("Failed", "DeadlineExceeded")]), None),
            (json!([]), None),
        ] {
            assert_eq!(job(json!({ "conditions": conditions })).with(None).disrupted.as_deref(), says, "{conditions}");
        }
        // One that has done its work has, whoever has removed its pod.
        let done = job(
            json!({"conditions": [condition("SuccessCriteriaMet", "CompletionsReached"), condition("Complete", "CompletionsReached")]}),
        );
        for told in [done.sandbox(), done.with(None)] {
            assert_eq!((told.state, told.exit_code, told.disrupted), (State::Stopped, Some(0), None));
        }
        let policy = |message: &str| {
            let mut failed = condition("Failed", "PodFailurePolicy");
            failed["message"] = json!(message);
            job(json!({ "conditions": [failed] }))
        };
        let ended = policy("Container agent for pod agents/a-x failed with exit code 3 matching FailJob rule at index 1");
        for told in [ended.sandbox(), ended.with(None)] {
            assert_eq!((told.state, told.exit_code, told.reason, told.disrupted), (State::Stopped, Some(3), None, None));
        }
        let told =
            policy("Container agent for pod agents/a-x failed with exit code 143 matching FailJob rule at index 1").with(None);
        assert!(told.state == State::Failed && told.disrupted.is_some(), "{told:?}");
        let taken = policy("Pod agents/a-x has condition DisruptionTarget matching FailJob rule at index 0").with(None);
        assert_eq!((&taken.state, taken.exit_code), (&State::Failed, None));
        assert!(taken.disrupted.is_some_and(|why| why.contains("has condition DisruptionTarget")));
        let begun = job(json!({"startTime": "2026-11-27T00:00:00Z"}));
        assert_eq!(begun.sandbox().deadline, "2026-11-27T00:01:00Z".parse().ok());
    }

    #[test]
    fn of_several_pods_it_is_about_the_one_that_stays() {
        let made = |name: &str, at: &str, leaving: bool| {
            pod(name, "Running", json!({"creationTimestamp": at, "deletionTimestamp": leaving.then_some("2026-11-27T00:00:00Z")}))
        };
        let (old, new) = ("2026-11-27T00:00:00Z", "2026-11-27T00:01:00Z");
        let name = |found: Vec<Pod>| job(json!({})).pod(found).map(|pod| pod.metadata.name);
        assert_eq!(name(vec![made("a", new, false), made("b", old, false)]).as_deref(), Some("a"));
        assert_eq!(name(vec![made("a", new, true), made("b", old, false)]).as_deref(), Some("b"));
        // Of a Job of the same name that was there before.
        let foreign: Pod = serde_json::from_value(json!({"metadata": {"name": "c", "ownerReferences": [{"uid": "x"}]}})).unwrap();
        assert_eq!(name(vec![foreign]), None);
    }
}
