"""deploy/kubernetes: what kustomize makes of it is valid, would be let into a strict cluster, and says what the sidecar understands."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import tomllib
from pathlib import Path

import kustomize
import policies
import pytest
import settings
import yaml
from images import ROOT

WORKLOADS = {"Deployment", "StatefulSet", "Job"}
# The one that needs more, and says so.
FENCE = "fence"
RULES = ROOT / "alerts/agent-sidecar.rules.yaml"
MONITORING = kustomize.KUBERNETES / "components/monitoring"


def workload(overlay: str) -> dict:
    (found,) = [each for each in kustomize.build(overlay) if each["kind"] in WORKLOADS]
    return found


def pod(overlay: str) -> dict:
    return workload(overlay)["spec"]["template"]["spec"]


def the(overlay: str, kind: str) -> dict:
    (found,) = [each for each in kustomize.build(overlay) if each["kind"] == kind]
    return found


# ---- schemas


def said(release: str, *files: Path) -> subprocess.CompletedProcess:
    argv = [kustomize.TOOLS / "venv/bin/python", "-m", "kubernetes_validate", "--strict", "-k", release, *files]
    return subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120)


@pytest.mark.parametrize("release", ["1.29", "1.31", "1.33", "1.35", "1.37"])
def test_core_kinds_are_as_kubernetes_has_them(release: str, tmp_path: Path):
    """From the oldest that the page names to the newest that there are schemas of. The operator's kinds are below."""
    files, number = [], 0
    for overlay in kustomize.OVERLAYS:
        core = [each for each in kustomize.build(overlay) if "monitoring.coreos.com" not in each["apiVersion"]]
        files.append(tmp_path / f"{overlay}.yaml")
        files[-1].write_text(yaml.safe_dump_all(core))
        number += len(core)
    done = said(release, *files)
    assert done.returncode == 0 and "WARN" not in done.stdout and done.stdout.count("passed") == number, done.stdout


def test_a_field_that_kubernetes_does_not_have_is_found(tmp_path: Path):
    broken = workload("native-sidecar")
    broken["spec"]["template"]["spec"]["initContainers"][0]["restartPolice"] = "Always"
    (tmp_path / "broken.yaml").write_text(yaml.safe_dump(broken))
    done = said("1.37", tmp_path / "broken.yaml")
    assert done.returncode != 0 and "restartPolice" in done.stdout


def operators(objects: list[dict]) -> str:
    """What the models of the Prometheus operator's API say is wrong."""
    ask = """
      import * as models from "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1";
      import { readFileSync } from "node:fs";
      for (const object of JSON.parse(readFileSync(0, "utf8"))) {
        try { new models[object.kind](object).validate(); } catch (error) { console.log(object.kind, error.message); }
      }"""
    argv = ["node", "--input-type=module", "--eval", ask]
    done = subprocess.run(argv, cwd=kustomize.TOOLS / "npm", input=json.dumps(objects), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_operators_kinds_are_as_it_has_them():
    objects = [each for each in kustomize.build("native-sidecar") if "monitoring.coreos.com" in each["apiVersion"]]
    assert {each["kind"] for each in objects} == {"PodMonitor", "PrometheusRule"}
    assert operators(objects) == ""
    broken = copy.deepcopy(objects)
    for each in broken:
        if each["kind"] == "PodMonitor":
            each["spec"]["podMetricsEndpoints"][0]["interval"] = "often"
        else:
            each["spec"]["groups"][0]["rules"][0]["expr"] = ["a", "b"]
    assert re.findall(r"^\w+", operators(broken), re.MULTILINE) == [each["kind"] for each in broken]


def test_the_operators_rules_are_the_alerts():
    made = subprocess.run([MONITORING / "prometheusrule"], capture_output=True, text=True, check=True).stdout
    assert (MONITORING / "prometheusrule.yaml").read_text() == made, "deploy/kubernetes/components/monitoring/prometheusrule > prometheusrule.yaml"
    assert the("native-sidecar", "PrometheusRule")["spec"] == yaml.safe_load(RULES.read_text())


# ---- admission


@pytest.mark.parametrize("overlay", kustomize.OVERLAYS)
def test_a_strict_cluster_lets_it_in(overlay: str):
    level = policies.baseline if overlay == FENCE else policies.restricted
    assert [*level(pod(overlay)), *policies.library(pod(overlay))] == []


def test_the_fence_is_the_exception_that_it_says_it_is():
    assert list(policies.restricted(pod(FENCE))) != []


BREAKS = {
    "the node's network": (policies.baseline, lambda pod, one: pod.update(hostNetwork=True)),
    "the node's files": (policies.baseline, lambda pod, one: pod["volumes"].append({"name": "x", "hostPath": {"path": "/"}})),
    "a port of the node's": (policies.baseline, lambda pod, one: one["ports"][0].update(hostPort=80)),
    "privileged": (policies.baseline, lambda pod, one: one["securityContext"].update(privileged=True)),
    "a capability": (policies.baseline, lambda pod, one: one["securityContext"]["capabilities"].update(add=["SYS_ADMIN"])),
    "a small capability": (policies.restricted, lambda pod, one: one["securityContext"]["capabilities"].update(add=["KILL"])),
    "capabilities": (policies.restricted, lambda pod, one: one["securityContext"].pop("capabilities")),
    "root": (policies.restricted, lambda pod, one: one["securityContext"].update(runAsUser=0)),
    "perhaps root": (policies.restricted, lambda pod, one: pod["securityContext"].pop("runAsNonRoot")),
    "no seccomp": (policies.restricted, lambda pod, one: pod["securityContext"].pop("seccompProfile")),
    "escalation": (policies.restricted, lambda pod, one: one["securityContext"].pop("allowPrivilegeEscalation")),
    "a volume": (policies.restricted, lambda pod, one: pod["volumes"].append({"name": "x", "nfs": {}})),
    "the sidecar's root": (policies.library, lambda pod, one: pod["initContainers"][0]["securityContext"].pop("readOnlyRootFilesystem")),
    "latest": (policies.library, lambda pod, one: one.update(image="registry.example.com/agent:latest")),
    "no tag": (policies.library, lambda pod, one: one.update(image="registry.example.com:5000/agent")),
    "no registry": (policies.library, lambda pod, one: one.update(image="agent:1.0.0")),
    "no readiness": (policies.library, lambda pod, one: one.pop("readinessProbe")),
    "no sign of the sidecar's life": (policies.library, lambda pod, one: pod["initContainers"][0].pop("livenessProbe")),
    "no limit": (policies.library, lambda pod, one: one["resources"]["limits"].pop("memory")),
    "a token": (policies.library, lambda pod, one: pod.pop("automountServiceAccountToken")),
    "the default account": (policies.library, lambda pod, one: pod.pop("serviceAccountName")),
    "a key in the environment": (policies.library, lambda pod, one: one["env"].append({"name": "KEY", "valueFrom": {"secretKeyRef": {}}})),
    "a volume without end": (policies.library, lambda pod, one: pod["volumes"][-1].update(emptyDir={})),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_and_does_not_let_in(broken: str):
    policy, how = BREAKS[broken]
    good = pod("native-sidecar")
    assert list(policy(good)) == []
    how(good, good["containers"][0])
    assert len(list(policy(good))) >= 1


@pytest.mark.parametrize("overlay", kustomize.OVERLAYS)
def test_nobody_is_given_a_right_in_the_cluster(overlay: str):
    kinds = {each["kind"] for each in kustomize.build(overlay)}
    assert not kinds & {"Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding"}
    assert the(overlay, "ServiceAccount")["automountServiceAccountToken"] is False
    assert {each["metadata"].get("namespace") for each in kustomize.build(overlay)} == {"agents"}


@pytest.mark.parametrize("overlay", kustomize.OVERLAYS)
def test_the_network_is_shut_but_for_what_is_needed(overlay: str):
    policy = the(overlay, "NetworkPolicy")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    asked = the(overlay, "ConfigMap")["data"]["config.toml"]
    collector = int(tomllib.loads(asked)["otlp"]["endpoint"].rpartition(":")[2])
    assert [port["port"] for rule in policy["egress"] for port in rule["ports"]] == [53, 53, collector, 443]
    assert [port["port"] for rule in policy["ingress"] for port in rule["ports"]] == [8080, 9477]
    assert all(rule.get("to") for rule in policy["egress"]) and all(rule.get("from") for rule in policy["ingress"])
    labels = workload(overlay)["spec"]["template"]["metadata"]["labels"]
    assert policy["podSelector"].get("matchLabels", {}).items() <= labels.items()


# ---- what belongs together


@pytest.mark.parametrize("overlay", kustomize.OVERLAYS)
def test_prometheus_finds_the_port(overlay: str):
    monitor = the(overlay, "PodMonitor")["spec"]
    template = workload(overlay)["spec"]["template"]
    assert monitor["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    ports = [port for one in policies.containers(template["spec"]) for port in one.get("ports", []) if port["name"] == monitor["podMetricsEndpoints"][0]["port"]]
    assert [port["containerPort"] for port in ports] == [9477], "one, or it is scraped twice"
    listen = tomllib.loads(the(overlay, "ConfigMap")["data"]["config.toml"])["listen"]
    assert listen == f":{ports[0]['containerPort']}"


@pytest.mark.parametrize("overlay", kustomize.OVERLAYS)
def test_the_grace_is_what_the_sidecar_counts_on(overlay: str):
    settings_of = tomllib.loads(the(overlay, "ConfigMap")["data"]["config.toml"])
    assert settings_of["stop"]["platform_grace"] == f"{pod(overlay)['terminationGracePeriodSeconds']}s"


@pytest.mark.parametrize("overlay", kustomize.OVERLAYS)
def test_the_sidecar_understands_its_settings(overlay: str, tmp_path: Path):
    config = tmp_path / "config.toml"
    config.write_text(the(overlay, "ConfigMap")["data"]["config.toml"])
    for one in policies.containers(pod(overlay)):
        settings.check({each["name"]: each.get("value", "x") for each in one.get("env", [])}, config)


@pytest.mark.parametrize("overlay", kustomize.OVERLAYS)
def test_what_the_pod_is_asked_for_is_there(overlay: str):
    template = workload(overlay)["spec"]["template"]
    labels, annotations = template["metadata"]["labels"], template["metadata"]["annotations"]
    for sources in tomllib.loads(the(overlay, "ConfigMap")["data"]["config.toml"])["labels"].values():
        for source in sources.split(","):
            kind, _, key = source.strip().partition(":")
            assert key in {"pod": labels, "annotation": annotations, "env": {key}}[kind]
    named = {volume["name"] for volume in template["spec"]["volumes"]}
    named |= {claim["metadata"]["name"] for claim in workload(overlay)["spec"].get("volumeClaimTemplates", [])}
    assert {mount["name"] for one in policies.containers(template["spec"]) for mount in one["volumeMounts"]} <= named


@pytest.mark.parametrize("overlay", kustomize.OVERLAYS)
def test_selectors_select(overlay: str):
    labels = workload(overlay)["spec"]["template"]["metadata"]["labels"]
    for each in kustomize.build(overlay):
        if each["kind"] in {"Service", "PodDisruptionBudget", "Deployment", "StatefulSet"}:
            selector = each["spec"]["selector"]
            selector = selector.get("matchLabels", selector)
            assert selector and selector.items() <= labels.items(), each["kind"]


# ---- what the fleet asks of a cluster

FLEET = ROOT / "deploy/fleet/kubernetes/rbac.yaml"
DISRUPTION = ROOT / "deploy/fleet/kubernetes/disruption.yaml"
# Written by the fleet's own tests, which hold them against what it sends.
MANIFESTS = ROOT / "sidecar/fleet/tests/manifests"


def manifests() -> list[dict]:
    made = [json.loads(path.read_text()) for path in sorted(MANIFESTS.glob("*.json"))]
    # The Sandbox's own kind and the claim's are held against their definitions there; the pod in the Sandbox is one like the others, and so is the Job's.
    made = [each for each in made if each["kind"] != "SandboxClaim"]
    return [
        each if each["kind"] != "Sandbox" else {"apiVersion": "v1", "kind": "Pod", "metadata": each["metadata"], "spec": each["spec"]["podTemplate"]["spec"]}
        for each in made
    ]


@pytest.mark.parametrize("release", ["1.29", "1.33", "1.37"])
def test_what_the_fleet_makes_is_as_kubernetes_has_it(release: str, tmp_path: Path):
    made = manifests()
    assert {each["kind"] for each in made} == {"Job", "Pod", "Secret"} and len(made) == 5
    (tmp_path / "made.yaml").write_text(yaml.safe_dump_all(made))
    done = said(release, tmp_path / "made.yaml", FLEET, DISRUPTION)
    theirs = [each for path in [FLEET, DISRUPTION] for each in yaml.safe_load_all(path.read_text())]
    assert done.returncode == 0 and "WARN" not in done.stdout and done.stdout.count("passed") == len(made) + len(theirs), done.stdout


def test_a_strict_cluster_lets_the_fleets_pods_in():
    specs = [(each["spec"].get("template") or each)["spec"] for each in manifests() if each["kind"] in {"Job", "Pod"}]
    assert len(specs) == 4
    for spec in specs:
        assert [*policies.restricted(spec)] == []


def test_who_evicts_waits_for_the_pods_of_the_fleet_that_is_set_up_here():
    budget = yaml.safe_load(DISRUPTION.read_text())
    example = tomllib.loads((ROOT / "deploy/fleet/agent-fleet.toml").read_text())
    assert budget["spec"]["selector"]["matchLabels"] == {"agent-fleet.fleet": example["fleet"]["name"]}
    assert budget["metadata"]["namespace"] == example["providers"]["cluster"]["namespace"]


def test_the_fleet_reads_no_secrets():
    (role,) = [each for each in yaml.safe_load_all(FLEET.read_text()) if each["kind"] == "Role"]
    granted = {(resource, verb) for rule in role["rules"] for resource in rule["resources"] for verb in rule["verbs"]}
    assert {verb for resource, verb in granted if resource == "secrets"} == {"create"}
    assert "*" not in {word for pair in granted for word in pair}
    # What is claimed is written down by others: templates and pools are read, and never changed.
    assert {verb for resource, verb in granted if resource in {"sandboxtemplates", "sandboxwarmpools"}} == {"get", "list"}
