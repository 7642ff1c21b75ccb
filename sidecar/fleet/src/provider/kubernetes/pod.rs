//! What is put into the cluster: a pod, or a Sandbox around one, and the secrets of it. Nothing here asks anybody.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::{Backend, Settings, job};
use crate::provider::secret::Value as Open;
use crate::provider::{Error, KEY_LABEL, Result, Secret, Spec};

/// The container that the session is about.
pub(super) const AGENT: &str = "agent";
/// Labels as they were asked for, where Kubernetes cannot have them like that.
pub(super) const LABELS_ANNOTATION: &str = "agent-fleet.labels";
/// The port of `agent-sidecar hub`.
const SIDECAR_PORT: u16 = 9477;
/// What the sidecar beside the agent is given: CPU in thousandths, memory and disk in MiB.
pub(super) const SIDECAR_SIZE: (u32, u32, u32) = (100, 64, 64);
/// How long a pod's containers have when its time is over.
const GRACE_SECONDS: u32 = 30;
/// The longest `stop_grace`.
const LONGEST_GRACE_SECONDS: u32 = 600;

/// A name and a value that Kubernetes takes for a label's: what it does not take is known by its hash.
pub(super) fn label(name: &str, value: &str) -> (String, String) {
    let letter = |c: char| c.is_ascii_alphanumeric();
    let word = |text: &str| {
        text.len() <= 63
            && text.starts_with(letter)
            && text.ends_with(letter)
            && text.chars().all(|c| letter(c) || matches!(c, '-' | '_' | '.'))
    };
    let named = word(name) || name.split_once('/').is_some_and(|(prefix, name)| is_domain(prefix) && word(name));
    let name = if named { name.to_owned() } else { format!("agent-fleet.name-{}", hash(name)) };
    let value = if value.is_empty() || word(value) { value.to_owned() } else { format!("hash-{}", hash(value)) };
    (name, value)
}

fn is_domain(text: &str) -> bool {
    let part = |part: &str| {
        let letter = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
        part.starts_with(letter) && part.ends_with(letter) && part.chars().all(|c| letter(c) || c == '-')
    };
    text.len() <= 253 && text.split('.').all(part)
}

fn hash(text: &str) -> String {
    let digest = ring::digest::digest(&ring::digest::SHA256, text.as_bytes());
    digest.as_ref().iter().take(12).map(|byte| format!("{byte:02x}")).collect()
}

/// All of these labels, as a list is asked for.
pub(super) fn selector(labels: &BTreeMap<String, String>) -> String {
    let pairs = labels.iter().map(|(name, value)| label(name, value));
    pairs.map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(",")
}

/// The labels that were asked for, of those that something has.
pub(super) fn labels_of(labels: &BTreeMap<String, String>, annotations: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    let mut all = labels.clone();
    let told = annotations.get(LABELS_ANNOTATION).and_then(|text| serde_json::from_str(text).ok());
    let told: BTreeMap<String, String> = told.unwrap_or_default();
    for (name, value) in told {
        all.remove(&label(&name, &value).0);
        all.insert(name, value);
    }
    all
}

/// Kubernetes replaces `$(NAME)` in commands and values, and takes `$$` for one.
fn literal(text: &str) -> String {
    text.replace('$', "$$")
}

pub(super) fn metadata(spec: &Spec, annotations: &BTreeMap<String, String>) -> Value {
    let mut labels = spec.labels.clone();
    labels.insert(KEY_LABEL.to_owned(), spec.key.clone());
    let mut legal = BTreeMap::new();
    let mut others = BTreeMap::new();
    for (name, value) in &labels {
        let (as_name, as_value) = label(name, value);
        if (&as_name, &as_value) != (name, value) {
            others.insert(name, value);
        }
        legal.insert(as_name, as_value);
    }
    let mut metadata = json!({ "labels": legal });
    let mut annotations = annotations.clone();
    if !others.is_empty() {
        annotations.insert(LABELS_ANNOTATION.to_owned(), json!(others).to_string());
    }
    if !annotations.is_empty() {
        metadata["annotations"] = json!(annotations);
    }
    metadata
}

/// What is created: the object, with the name of the secret that its container waits for.
pub(super) fn object(settings: &Settings, spec: &Spec, secret: &str, ends: jiff::Timestamp) -> Result<Value> {
    let mut head = metadata(spec, &BTreeMap::new());
    head["name"] = json!(spec.key);
    let mut template = template(settings, spec, secret)?;
    Ok(match settings.backend {
        Backend::Claim => unreachable!("a claim is made of nothing of this"),
        Backend::Pod => {
            let mut head = template["metadata"].clone();
            head["name"] = json!(spec.key);
            json!({ "apiVersion": "v1", "kind": "Pod", "metadata": head, "spec": template["spec"] })
        }
        Backend::Job => {
            let kept = settings.finished_seconds.unwrap_or(super::FINISHED_SECONDS);
            json!({ "apiVersion": "batch/v1", "kind": "Job", "metadata": head, "spec": job::spec(&template, life_seconds(spec), kept) })
        }
        Backend::Sandbox => {
            // Its pod is deleted by the cluster first, without a grace of ours; what we ask for after that can only be shorter.
            template["spec"]["terminationGracePeriodSeconds"] = json!(LONGEST_GRACE_SECONDS);
            let mut own = json!({
                "podTemplate": template,
                "operatingMode": "Running",
                "service": false,
                "shutdownPolicy": "Delete",
                "shutdownTime": whole_seconds(ends),
            });
            let claims = settings.keep.iter().enumerate().map(|(n, (_, size))| {
                let mut claim = json!({ "accessModes": ["ReadWriteOnce"], "resources": { "requests": { "storage": size } } });
                if let Some(class) = &settings.storage_class {
                    claim["storageClassName"] = json!(class);
                }
                json!({ "metadata": { "name": format!("keep-{n}") }, "spec": claim })
            });
            let claims: Vec<Value> = claims.collect();
            if !claims.is_empty() {
                own["volumeClaimTemplates"] = json!(claims);
            }
            json!({ "apiVersion": "agents.x-k8s.io/v1beta1", "kind": "Sandbox", "metadata": head, "spec": own })
        }
    })
}

/// Of a time, whole seconds alone are understood.
pub(super) fn whole_seconds(at: jiff::Timestamp) -> String {
    at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

fn life_seconds(spec: &Spec) -> u64 {
    spec.ttl.as_secs().clamp(1, super::TTL_MOST.as_secs())
}

/// Where a pod's `nodeAffinity` has what must be.
pub(super) const REQUIRED: &str = "requiredDuringSchedulingIgnoredDuringExecution";

/// What must be of the node: what is asked for, and that it is none of these. Of several terms one has to hold, so each of them leaves them out.
pub(super) fn required(asked: Option<&Value>, avoid: &[String]) -> Value {
    let mut required = asked.map_or(Value::Null, |affinity| affinity["nodeAffinity"][REQUIRED].clone());
    // A field is compared with one value.
    let not = |node: &String| json!({ "key": "metadata.name", "operator": "NotIn", "values": [node] });
    let not: Vec<Value> = avoid.iter().map(not).collect();
    if not.is_empty() {
        return required;
    }
    let Some(terms) = required["nodeSelectorTerms"].as_array_mut() else {
        return json!({ "nodeSelectorTerms": [{ "matchFields": not }] });
    };
    let has = |term: &Value, what: &str| term[what].as_array().is_some_and(|all| !all.is_empty());
    // A term that asks for nothing is no node's, and would be many's.
    for term in terms.iter_mut().filter(|term| has(term, "matchExpressions") || has(term, "matchFields")) {
        let mut fields = term["matchFields"].as_array().cloned().unwrap_or_default();
        fields.extend(not.iter().cloned());
        term["matchFields"] = json!(fields);
    }
    required
}

fn affinity(asked: Option<&Value>, avoid: &[String]) -> Option<Value> {
    let required = required(asked, avoid);
    let mut affinity = asked.cloned();
    if !required.is_null() {
        affinity.get_or_insert_with(|| json!({}))["nodeAffinity"][REQUIRED] = required;
    }
    affinity
}

fn template(settings: &Settings, spec: &Spec, secret: &str) -> Result<Value> {
    let mut mounts = Vec::new();
    let mut volumes = Vec::new();
    for (n, at) in settings.writable.iter().enumerate() {
        let name = format!("writable-{n}");
        mounts.push(json!({ "name": name, "mountPath": at }));
        volumes.push(json!({ "name": name, "emptyDir": { "sizeLimit": format!("{}Mi", spec.size.disk_mib) } }));
    }
    // The volumes of these are the controller's to name.
    for (n, at) in settings.keep.keys().enumerate().filter(|_| settings.backend == Backend::Sandbox) {
        mounts.push(json!({ "name": format!("keep-{n}"), "mountPath": at }));
    }
    // What the agent writes is the hub's to see: it is who gives the conversation, and takes it.
    let shared = mounts.clone();
    if settings.sidecar_image.is_some() {
        mounts.push(json!({ "name": "sidecar", "mountPath": "/run/agent-sidecar" }));
        volumes.push(json!({ "name": "sidecar", "emptyDir": { "sizeLimit": "64Mi" } }));
    }
    let agent_env = environment(spec, secret)?;
    let mut agent = json!({
        "name": AGENT,
        "image": spec.image,
        "env": agent_env,
        "resources": resources((spec.size.cpu_milli, spec.size.memory_mib, spec.size.disk_mib)),
        "securityContext": container_rights(settings),
        "volumeMounts": mounts,
    });
    if !spec.command.is_empty() {
        // The whole command: an image's entry point does not come before it.
        agent["command"] = spec.command.iter().map(|word| literal(word)).collect();
    }
    if !spec.ports.is_empty() {
        agent["ports"] = spec.ports.iter().map(|port| json!({ "containerPort": port })).collect();
    }
    if let Some(pull) = settings.pull {
        agent["imagePullPolicy"] = json!(pull);
    }
    let mut pod = json!({
        // Who starts it again is the fleet.
        "restartPolicy": "Never",
        "activeDeadlineSeconds": life_seconds(spec),
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "automountServiceAccountToken": false,
        "enableServiceLinks": false,
        "securityContext": pod_rights(settings),
        "containers": [agent],
        "volumes": volumes,
    });
    if let Some(image) = &settings.sidecar_image {
        pod["initContainers"] = json!([sidecar(settings, image, &agent_env, &shared)]);
        // Whose CLI runs without a sidecar is seen by the processes.
        pod["shareProcessNamespace"] = json!(true);
    }
    let words = [
        ("serviceAccountName", &settings.service_account),
        ("runtimeClassName", &settings.runtime_class),
        ("priorityClassName", &settings.priority_class),
    ];
    for (name, word) in words {
        if let Some(word) = word {
            pod[name] = json!(word);
        }
    }
    if !settings.node_selector.is_empty() {
        pod["nodeSelector"] = json!(settings.node_selector);
    }
    if let Some(affinity) = affinity(settings.affinity.as_ref(), &spec.avoid) {
        pod["affinity"] = affinity;
    }
    if !settings.tolerations.is_empty() {
        pod["tolerations"] = settings.tolerations.iter().map(super::Toleration::object).collect();
    }
    if !settings.pull_secrets.is_empty() {
        pod["imagePullSecrets"] = settings.pull_secrets.iter().map(|name| json!({ "name": name })).collect();
    }
    Ok(json!({ "metadata": metadata(spec, &settings.annotations), "spec": pod }))
}

fn environment(spec: &Spec, secret: &str) -> Result<Vec<Value>> {
    let plain = spec.env.iter().filter(|(name, _)| !spec.secrets.contains_key(*name));
    let mut all: Vec<Value> = plain.map(|(name, value)| json!({ "name": name, "value": literal(value) })).collect();
    for (name, from) in &spec.secrets {
        let (of, key) = match from {
            Secret::Provider(theirs) => match theirs.split_once('/') {
                Some((of, key)) if !of.is_empty() && !key.is_empty() && !key.contains('/') => (of, key),
                _ => {
                    let what = format!("`{theirs}` is no secret of a namespace: write it as \"name/key\"");
                    return Err(Error::Refused { provider: super::NAME, what });
                }
            },
            Secret::Env(_) | Secret::File(_) | Secret::Given(_) => (secret, name.as_str()),
        };
        all.push(json!({ "name": name, "valueFrom": { "secretKeyRef": { "name": of, "key": key } } }));
    }
    Ok(all)
}

/// What is asked for is what there is: nothing is lent by others, and nothing is taken away.
fn resources((cpu_milli, memory_mib, disk_mib): (u32, u32, u32)) -> Value {
    let amounts = json!({
        "cpu": format!("{cpu_milli}m"),
        "memory": format!("{memory_mib}Mi"),
        "ephemeral-storage": format!("{disk_mib}Mi"),
    });
    json!({ "requests": amounts, "limits": amounts })
}

/// Passes Pod Security "restricted", but for what the settings take away.
fn pod_rights(settings: &Settings) -> Value {
    let mut rights = Map::new();
    rights.insert(String::from("runAsNonRoot"), json!(settings.non_root));
    rights.insert(String::from("seccompProfile"), json!({ "type": "RuntimeDefault" }));
    if let Some(user) = settings.user {
        rights.insert(String::from("runAsUser"), json!(user));
    }
    if let Some(group) = settings.group {
        rights.insert(String::from("runAsGroup"), json!(group));
        rights.insert(String::from("fsGroup"), json!(group));
        rights.insert(String::from("fsGroupChangePolicy"), json!("OnRootMismatch"));
    }
    Value::Object(rights)
}

fn container_rights(settings: &Settings) -> Value {
    let mut capabilities = json!({ "drop": ["ALL"] });
    if !settings.cap_add.is_empty() {
        capabilities["add"] = json!(settings.cap_add);
    }
    json!({
        "allowPrivilegeEscalation": false,
        "readOnlyRootFilesystem": settings.read_only,
        "capabilities": capabilities,
    })
}

/// It starts before the agent, which waits until it answers, and ends after it. It serves and reports for the agent's own sidecar, so it is told
/// what that is told.
fn sidecar(settings: &Settings, image: &str, env: &[Value], shared: &[Value]) -> Value {
    let told = |variable: &&Value| variable["name"].as_str().is_some_and(|name| name.starts_with("AGENT_SIDECAR_"));
    let env: Vec<&Value> = env.iter().filter(told).collect();
    let mut mounts = shared.to_vec();
    mounts.push(json!({ "name": "sidecar", "mountPath": "/run/agent-sidecar" }));
    let mut rights = container_rights(settings);
    rights["readOnlyRootFilesystem"] = json!(true);
    // What the agent is given more is the agent's.
    rights["capabilities"] = json!({ "drop": ["ALL"] });
    let mut sidecar = json!({
        "name": "sidecar",
        "image": image,
        "restartPolicy": "Always",
        "args": ["hub", "--listen", format!(":{SIDECAR_PORT}")],
        "env": env,
        "ports": [{ "name": "metrics", "containerPort": SIDECAR_PORT }],
        "startupProbe": { "httpGet": { "path": "/livez", "port": "metrics" }, "periodSeconds": 1, "failureThreshold": 60 },
        // One that answers nobody is begun anew: the agent goes on without it, and joins the new one.
        "livenessProbe": { "httpGet": { "path": "/livez", "port": "metrics" }, "periodSeconds": 10, "timeoutSeconds": 5, "failureThreshold": 3 },
        "resources": resources(SIDECAR_SIZE),
        "securityContext": rights,
        "volumeMounts": mounts,
    });
    if let Some(pull) = settings.pull {
        sidecar["imagePullPolicy"] = json!(pull);
    }
    sidecar
}

/// The secrets that are ours to read, belonging to what they are for: they go when it goes.
pub(super) fn secrets(settings: &Settings, spec: &Spec, name: &str, uid: &str, values: &BTreeMap<String, Open>) -> Value {
    let (version, kind) = match settings.backend {
        Backend::Pod | Backend::Claim => ("v1", "Pod"),
        Backend::Job => ("batch/v1", "Job"),
        Backend::Sandbox => ("agents.x-k8s.io/v1beta1", "Sandbox"),
    };
    let mut head = metadata(spec, &BTreeMap::new());
    head["name"] = json!(name);
    head["ownerReferences"] = json!([{ "apiVersion": version, "kind": kind, "name": spec.key, "uid": uid }]);
    let data: BTreeMap<&String, &str> = values.iter().map(|(name, value)| (name, value.expose())).collect();
    json!({ "apiVersion": "v1", "kind": "Secret", "metadata": head, "type": "Opaque", "immutable": true, "stringData": data })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(name, value)| (String::from(*name), String::from(*value))).collect()
    }

    #[test]
    fn a_label_that_kubernetes_cannot_have_is_found_and_read_all_the_same() {
        for (name, value) in [("agent-fleet.fleet", "prod"), ("example.com/team", "a.b_c-d"), ("a", ""), ("a", &"x".repeat(63))] {
            assert_eq!(label(name, value), (name.to_owned(), value.to_owned()));
        }
        let long = "x".repeat(64);
        for value in ["a b", "-a", "a_", "é", "a/b", &long] {
            let (name, hashed) = label("team", value);
            assert!(name == "team" && hashed.starts_with("hash-") && hashed.len() <= 63, "{value}: {hashed}");
            assert_ne!(label("team", "other value").1, hashed);
        }
        for name in ["a b", "A/b/c", "UPPER.example/x", "/x", "x/", &long] {
            let (hashed, _) = label(name, "v");
            assert!(hashed.starts_with("agent-fleet.name-") && hashed.len() <= 63, "{name}: {hashed}");
        }
        let asked = pairs(&[("team", "a&b=c d"), ("plain", "x"), ("odd name", "y")]);
        let spec: Spec =
            serde_json::from_value(json!({"key": "agent-1", "image": "i", "ttl": {"secs": 60, "nanos": 0}, "labels": asked}))
                .unwrap();
        let made = metadata(&spec, &BTreeMap::new());
        let has = |at: &str| -> BTreeMap<String, String> { serde_json::from_value(made[at].clone()).unwrap() };
        let mut read = labels_of(&has("labels"), &has("annotations"));
        assert_eq!(read.remove(KEY_LABEL).as_deref(), Some("agent-1"));
        assert_eq!(read, asked);
        // What somebody has written there that is no such list is no label.
        assert_eq!(labels_of(&pairs(&[("a", "b")]), &pairs(&[(LABELS_ANNOTATION, "[1")])), pairs(&[("a", "b")]));
    }

    #[test]
    fn a_node_that_is_not_to_be_used_is_left_out_of_all_that_is_asked_for() {
        let not = |node: &str| json!({"key": "metadata.name", "operator": "NotIn", "values": [node]});
        let (one, two) = (vec![String::from("a")], ["a", "b"].map(String::from).to_vec());
        let wants = |terms: Value| json!({"nodeAffinity": {REQUIRED: {"nodeSelectorTerms": terms}}});
        let (zone, name) = (
            json!([{"key": "zone", "operator": "In", "values": ["x"]}]),
            json!({"key": "metadata.name", "operator": "In", "values": ["c"]}),
        );
        let prefers = json!({"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 1, "preference": {"matchExpressions": zone}}]},
            "podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": []}});
        let mut both = prefers.clone();
        both["nodeAffinity"][REQUIRED] = json!({"nodeSelectorTerms": [{"matchFields": [not("a")]}]});
        for (asked, avoid, expected) in [
            (None, vec![], None),
            (Some(prefers.clone()), vec![], Some(prefers.clone())),
            (None, one.clone(), Some(wants(json!([{"matchFields": [not("a")]}])))),
            // Each has its own requirement: the API takes one value in each.
            (None, two.clone(), Some(wants(json!([{"matchFields": [not("a"), not("b")]}])))),
            (Some(prefers), one.clone(), Some(both)),
            // Of these one has to hold: each leaves them out, and one that no node meets is still such a one.
            (
                Some(wants(json!([{"matchExpressions": zone}, {"matchFields": [name]}, {}, {"matchExpressions": []}]))),
                two,
                Some(wants(json!([
                    {"matchExpressions": zone, "matchFields": [not("a"), not("b")]}, {"matchFields": [name, not("a"), not("b")]}, {},
                    {"matchExpressions": []}]))),
            ),
        ] {
            assert_eq!(affinity(asked.as_ref(), &avoid), expected, "{asked:?} without {avoid:?}");
        }
    }

    #[test]
    fn a_secret_of_the_namespace_is_named_with_its_key() {
        let with = |theirs: &str| -> Result<Vec<Value>> {
            let spec = json!({"key": "agent-1", "image": "i", "ttl": {"secs": 60, "nanos": 0}, "env": {"A": "$(B) $"}, "secrets": {"T": {"provider": theirs}}});
            environment(&serde_json::from_value(spec).unwrap(), "ours")
        };
        let made = with("keys/anthropic").unwrap();
        assert_eq!(made[0], json!({"name": "A", "value": "$$(B) $$"}));
        assert_eq!(made[1], json!({"name": "T", "valueFrom": {"secretKeyRef": {"name": "keys", "key": "anthropic"}}}));
        for wrong in ["keys", "/x", "x/", "a/b/c"] {
            assert!(matches!(with(wrong), Err(Error::Refused { .. })), "{wrong}");
        }
    }
}
