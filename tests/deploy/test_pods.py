"""The pods of deploy/kubernetes, run from their YAML: each container of theirs as a container of dockerd with the same rights, volumes and neighbours."""

from __future__ import annotations

import json
import subprocess
import threading
from pathlib import Path

import engine
import harness
import kustomize
import pods
import pytest
from harness import wait_for
from test_compose import SCRIPT, USAGE, bash

SERVICES = ["in-image", "native-sidecar", "stateful"]
# Its own name, and what is not to be had: our books, our state's name, our environment, our end.
TRIES = """
id -u > tried
(echo >> /data/ledger.jsonl) 2>/dev/null && echo yes >> tried || echo no >> tried
mv /data/hub /data/hid 2>/dev/null && echo yes >> tried || echo no >> tried
cat /proc/1/environ >/dev/null 2>&1 && echo yes >> tried || echo no >> tried
kill -9 1 2>/dev/null && echo yes >> tried || echo no >> tried
"""


@pytest.fixture
def start(dockerd, tmp_path: Path):
    made: list[pods.Pod] = []

    def one(overlay: str, script: dict = SCRIPT) -> pods.Pod:
        objects = kustomize.build(overlay)
        (template,) = [each["spec"]["template"] for each in objects if each["kind"] in {"Deployment", "StatefulSet", "Job"}]
        claims = [claim for each in objects for claim in each.get("spec", {}).get("volumeClaimTemplates", [])]
        # A volume that is kept is a directory here, too.
        template["spec"]["volumes"] += [{"name": claim["metadata"]["name"], "emptyDir": {}} for claim in claims]
        configs = {each["metadata"]["name"]: each["data"] for each in objects if each["kind"] == "ConfigMap"}
        volumes = tmp_path / f"volumes{len(made)}"
        volumes.mkdir()
        network = engine.Pod(tmp_path / f"pod{len(made)}", script)
        made.append(pods.Pod(template, configs, network, volumes, {"anthropic": {"api-key": "sk-ant-test"}}))
        made[-1].start()
        return made[-1]

    yield one
    for pod in made:
        pod.network.close()


def books(pod: pods.Pod) -> float:
    said = subprocess.check_output([harness.binary(), "replay", "--ledger", "--format", "json", pod.directory / "data/ledger.jsonl"])
    return json.loads(said)["totals"]["cost_usd"]


def on_the_books(pod: pods.Pod, cost: float) -> None:
    """Its line comes after the answer."""
    wait_for(f"{cost} USD on the books", lambda: books(pod) == pytest.approx(cost, abs=1e-9), 60)


def work(pod: pods.Pod, text: str = "go") -> dict:
    wait_for("the app", lambda: pod.network.get("/", 8080)[0] == 200, 120)
    status, body = pod.network.get("/", 8080, text)
    assert status == 200, body + pod.containers["agent"].errors()
    return json.loads(body)


def complaints(pod: pods.Pod) -> list[str]:
    """What the sidecars say went wrong, but that nobody collects here."""
    said = [line for one in pod.containers.values() for line in one.errors().splitlines()]
    return [line for line in said if ("WARN" in line or "ERROR" in line) and "collector" not in line]


def probes(pod: pods.Pod) -> dict[str, bool]:
    every = [(one, kind) for one in pod.spec.get("initContainers", []) + pod.spec["containers"] for kind in pods.PROBED if kind in one]
    return {f"{one['name']}'s {kind}": pod.ask(one, one[kind]) for one, kind in every}


@pytest.mark.parametrize("overlay", SERVICES)
def test_a_pod_works_with_what_its_yaml_gives_it(start, overlay: str):
    pod = start(overlay)
    result = work(pod)
    assert result["subtype"] == "success", result
    assert result["cost_usd"] == pytest.approx(pod.network.cost_usd(), abs=1e-9)
    on_the_books(pod, result["cost_usd"])
    # Whom it works for says the pod.
    last = json.loads((pod.directory / "data/ledger.jsonl").read_text().splitlines()[-1])
    assert (last["tenant"], last["team"], last["cost_center"]) == ("acme", "search", "cc-4711")
    assert set(probes(pod).values()) == {True}, probes(pod)
    assert complaints(pod) == []


@pytest.mark.parametrize("overlay", ["native-sidecar", "stateful"])
def test_beside_the_hub_numbers_stay_when_the_agent_is_gone(start, overlay: str):
    pod = start(overlay)
    assert pod.network.get("/metrics")[0] == 200, "before the first agent"
    cost = work(pod)["cost_usd"]
    wait_for("the agent's end", lambda: pod.network.counted("claude_agent_process_exits_total") == 1, 120)
    assert pod.network.counted("claude_agent_cost_usd_total") == pytest.approx(cost, abs=1e-9)
    cost += work(pod)["cost_usd"]
    wait_for("both", lambda: pod.network.counted("claude_agent_process_exits_total") == 2, 120)
    assert pod.network.counted("claude_agent_cost_usd_total") == pytest.approx(cost, abs=1e-9)
    (series,) = [name for name in pod.network.metrics() if name.startswith("claude_agent_cost_usd_total")]
    assert 'tenant="acme"' in series and 'team="search"' in series


def test_the_hub_sees_a_cli_that_goes_round_it(start):
    """Processes are shared, as the YAML says."""
    pod = start("native-sidecar")
    work(pod)
    assert pod.network.counted("agent_sidecar_unwrapped_processes") == 0
    real = "$(python3 -c 'import claude_agent_sdk as sdk; print(sdk.__path__[0])')/_bundled/claude.sidecar-real"
    engine.docker("exec", "--detach", pod.containers["agent"].id, "sh", "-c", f"sleep 300 | {real} -p --input-format stream-json --output-format stream-json --verbose")
    wait_for("the hub's look", lambda: pod.network.counted("agent_sidecar_unwrapped_processes") == 1, 120)


@pytest.mark.parametrize("overlay", ["in-image", "native-sidecar"])
def test_a_pod_that_is_deleted_ends_its_agent_in_order(start, overlay: str):
    step = {"when": {"results": 0}, "reply": {"blocks": [bash("touch /tmp/begun; sleep 600")]}}
    # Should the tool end before the CLI hears that it shall: what is asked for then is not answered before it does.
    pod = start(overlay, {"defaults": {"usage": USAGE}, "rules": [step], "otherwise": {"blocks": ["done"], "pace": {"first_byte_delay_ms": 60_000}}})
    asking = threading.Thread(target=lambda: pod.network.get("/", 8080, "go"))
    wait_for("the app", lambda: pod.network.get("/", 8080)[0] == 200, 120)
    asking.start()
    wait_for("the tool", (pod.directory / "tmp/begun").exists, 120)
    # As kubelet does it: the app first, the native sidecar when that is over.
    for name in reversed(pod.containers):
        assert pod.containers[name].stop(pod.spec["terminationGracePeriodSeconds"]) == 0, pod.containers[name].errors()
    asking.join()
    assert books(pod) == pytest.approx(pod.network.cost_usd(), abs=1e-9)
    assert complaints(pod) == []


def test_a_job_ends_and_its_numbers_can_still_be_scraped(start):
    pod = start("job")
    assert pod.containers["agent"].wait() == 0, pod.containers["agent"].errors()
    (result,) = pod.containers["agent"].lines()
    assert result["cost_usd"] == pytest.approx(pod.network.cost_usd(), abs=1e-9) == books(pod)
    # This long kubelet leaves the sidecar alone (preStop), and that is longer than from one scrape to the next.
    (monitor,) = [each for each in kustomize.build("job") if each["kind"] == "PodMonitor"]
    assert pod.spec["initContainers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"] > int(monitor["spec"]["podMetricsEndpoints"][0]["interval"].rstrip("s"))
    wait_for("the last number", lambda: pod.network.counted("claude_agent_cost_usd_total") == pytest.approx(result["cost_usd"], abs=1e-9), 120)
    assert pod.containers["sidecar"].stop() == 0
    assert complaints(pod) == []


def test_behind_the_fence_the_agent_is_somebody_else(start):
    script = {"defaults": {"usage": USAGE}, "rules": [{"when": {"agent": "main", "results": 0}, "reply": {"blocks": [bash(TRIES)]}}], "otherwise": {"blocks": ["done"]}}
    pod = start("fence", script)
    result = work(pod)
    assert result["subtype"] == "success", result
    tried = next(path for path in (pod.directory / "data/agents").rglob("tried"))
    assert tried.read_text().split() == ["10001", "no", "no", "no", "no"]
    assert tried.stat().st_uid == 10001
    assert result["cost_usd"] == pytest.approx(pod.network.cost_usd(), abs=1e-9)
    on_the_books(pod, result["cost_usd"])
    assert complaints(pod) == []
