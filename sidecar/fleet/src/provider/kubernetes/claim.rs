//! A claim of kubernetes-sigs/agent-sandbox: somebody else has written down what a container is (a SandboxTemplate), and its controller gives one away
//! that waits in a SandboxWarmPool, or makes one. What is claimed has a name of its own, and is known by the claim.

use jiff::Timestamp;
use serde::Deserialize;
use serde_json::{Value, json};

use super::pod;
use super::state::{Condition, Custom, Meta, Pod, words};
use crate::provider::{Sandbox, Spec, State};

const SANDBOX_NAME: &str = "agents.x-k8s.io/sandbox-name";
/// What the controller will not do for this claim, however long it is waited for.
const HOPELESS: &[&str] = &["EnvVarsInjectionRejected", "InvalidMetadata", "VolumeClaimTemplatesError"];
/// What each says for a while.
const ORDINARY: &[&str] =
    &["DependenciesNotReady", "SandboxNotReady", "SandboxMissing", "SandboxCreatePending", "AdoptionConflict"];

pub(super) fn object(spec: &Spec, pool: &str, ends: Timestamp) -> Value {
    let mut head = pod::metadata(spec, &std::collections::BTreeMap::new());
    head["name"] = json!(spec.key);
    json!({
        "apiVersion": "extensions.agents.x-k8s.io/v1beta1",
        "kind": "SandboxClaim",
        "metadata": head,
        "spec": {
            "warmPoolRef": { "name": pool },
            // It is there, as leaving, until its pod has ended.
            "lifecycle": { "shutdownPolicy": "DeleteForeground", "shutdownTime": pod::whole_seconds(ends) },
        },
    })
}

/// What claims are taken from.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct WarmPool {
    pub(super) metadata: Meta,
    spec: WarmPoolSpec,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct WarmPoolSpec {
    sandbox_template_ref: Named,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Named {
    name: String,
}

impl WarmPool {
    pub(super) fn template(&self) -> &str {
        &self.spec.sandbox_template_ref.name
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Claim {
    pub(super) metadata: Meta,
    spec: ClaimSpec,
    status: ClaimStatus,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct ClaimSpec {
    lifecycle: Lifecycle,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Lifecycle {
    shutdown_time: Option<Timestamp>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct ClaimStatus {
    conditions: Vec<Condition>,
    sandbox: Named,
}

impl Claim {
    /// The Sandbox that it has, once it has one.
    pub(super) fn bound(&self) -> Option<&str> {
        let told = Some(self.status.sandbox.name.as_str()).filter(|name| !name.is_empty());
        told.or_else(|| self.metadata.annotations.get(SANDBOX_NAME).map(String::as_str).filter(|name| !name.is_empty()))
    }

    fn condition(&self, kind: &str) -> Option<&Condition> {
        self.status.conditions.iter().find(|one| one.r#type == kind)
    }

    fn state(&self) -> State {
        let is = |kind: &str| self.condition(kind).is_some_and(|one| one.status == "True");
        let ready = self.condition("Ready").map_or("", |one| one.reason.as_str());
        if self.metadata.is_leaving() || matches!(ready, "ClaimExpired" | "SandboxExpired") {
            State::Stopping
        } else if HOPELESS.contains(&ready) {
            State::Failed
        } else if is("Finished") {
            State::Stopped
        } else if is("Ready") {
            State::Running
        } else {
            State::Creating
        }
    }

    /// By its own conditions.
    pub(super) fn sandbox(&self) -> Sandbox {
        let state = self.state();
        let ready = self.condition("Ready").filter(|one| one.status == "False" && state != State::Running);
        // That its pool is gone is said here alone; what holds up a container, by that.
        let why = ready.filter(|one| !ORDINARY.contains(&one.reason.as_str()));
        Sandbox {
            reason: why.and_then(|one| words(&one.reason, &one.message)),
            deadline: self.spec.lifecycle.shutdown_time,
            disrupted: self.metadata.deleted(),
            ..self.metadata.sandbox(state)
        }
    }

    /// With what the Sandbox that it has says, and its pod.
    pub(super) fn with(&self, custom: Option<&Custom>, pod: Option<&Pod>) -> Sandbox {
        let own = self.sandbox();
        let Some(custom) = custom else {
            let state = if matches!(own.state, State::Running | State::Stopped) { State::Creating } else { own.state.clone() };
            return Sandbox { state, ..own };
        };
        let inner = custom.with(pod);
        let decided = matches!(own.state, State::Stopping | State::Failed);
        let state = if decided { own.state.clone() } else { inner.state };
        // What has held it up may still stand there.
        let reason = inner.reason.or(own.reason.clone().filter(|_| state != State::Running));
        Sandbox {
            state,
            reason,
            exit_code: inner.exit_code,
            size: inner.size,
            deadline: [own.deadline, inner.deadline].into_iter().flatten().min(),
            node: inner.node,
            disrupted: own.disrupted.clone().or(inner.disrupted),
            ..own
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_claim_is_what_its_conditions_and_its_pod_say() {
        let claim = |condition: Value| -> Claim {
            let leaving = condition["reason"] == "leaving";
            serde_json::from_value(json!({
                "metadata": {"name": "a", "deletionTimestamp": leaving.then_some("2026-11-27T00:00:00Z")},
                "spec": {"warmPoolRef": {"name": "p"}, "lifecycle": {"shutdownTime": "2026-11-27T02:00:00Z"}},
                "status": {"conditions": [condition], "sandbox": {"name": "p-x"}},
            }))
            .unwrap()
        };
        let ready = |status: &str, reason: &str| json!({"type": "Ready", "status": status, "reason": reason, "message": "m"});
        let custom: Custom = serde_json::from_value(json!({"metadata": {"name": "p-x"}, "spec": {"operatingMode": "Running"},
            "status": {"conditions": [ready("True", "DependenciesReady")]}}))
        .unwrap();
        let pod = |phase: &str| -> Pod {
            serde_json::from_value(json!({"metadata": {"name": "p-x"}, "status": {"phase": phase, "containerStatuses": [
                {"name": "agent", "state": if phase == "Failed" { json!({"terminated": {"exitCode": 137, "reason": "OOMKilled"}}) } else { json!({}) }}]}}))
            .unwrap()
        };
        let (runs, over) = (pod("Running"), pod("Failed"));
        for (condition, alone, bound, why) in [
            (json!({}), State::Creating, State::Running, None),
            (ready("False", "SandboxMissing"), State::Creating, State::Running, None),
            (ready("False", "TemplateNotFound"), State::Creating, State::Running, Some("TemplateNotFound: m")),
            (ready("False", "ReconcilerError"), State::Creating, State::Running, Some("ReconcilerError: m")),
            (ready("False", "InvalidMetadata"), State::Failed, State::Failed, Some("InvalidMetadata: m")),
            (ready("True", "DependenciesReady"), State::Running, State::Running, None),
            (ready("False", "ClaimExpired"), State::Stopping, State::Stopping, Some("ClaimExpired: m")),
            (ready("False", "leaving"), State::Stopping, State::Stopping, Some("leaving: m")),
        ] {
            let claim = claim(condition);
            assert_eq!((claim.sandbox().state, claim.sandbox().reason.as_deref()), (alone, why), "{claim:?}");
            let with = claim.with(Some(&custom), Some(&runs));
            assert!(with.state != State::Running || with.reason.is_none(), "{claim:?}");
            assert_eq!((with.state, with.native.as_str()), (bound, "a"), "{claim:?}");
            assert_eq!(with.deadline, "2026-11-27T02:00:00Z".parse().ok());
            // What it had is gone, and the controller makes another.
            assert_ne!(claim.with(None, None).state, State::Running);
        }
        let killed = claim(ready("True", "DependenciesReady")).with(Some(&custom), Some(&over));
        assert_eq!((killed.state, killed.exit_code, killed.reason.as_deref()), (State::Stopped, Some(137), Some("OOMKilled")));
        let finished = json!({"type": "Finished", "status": "True", "reason": "PodFailed", "message": ""});
        assert_eq!(claim(finished).sandbox().state, State::Stopped);
    }
}
