"""The alerts name what the sidecar says, each is tested, and each has a runbook whose commands work."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from functools import cache
from pathlib import Path

import outside
import promql
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
ALERTS, RUNBOOKS, RECORDINGS = ROOT / "alerts", ROOT / "docs/runbooks", ROOT / "sidecar/core/tests/data"
RULE_FILES = [ALERTS / "agent-sidecar.rules.yaml", ALERTS / "agent-fleet.rules.yaml"]
AGENTS_RULES, FLEET_RULES = ([rule for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]] for path in RULE_FILES)
RULE_LIST = AGENTS_RULES + FLEET_RULES
ALERT_RULES = {rule["alert"]: rule for rule in RULE_LIST if "alert" in rule}
AGENTS = [rule["alert"] for rule in AGENTS_RULES if "alert" in rule]
RECORDED = {rule["record"]: rule for rule in RULE_LIST if "record" in rule}
TESTS = sorted(ALERTS.glob("*.test.yaml"))
SECTIONS = ["Meaning", "Impact", "First commands", "Causes", "Remedy"]
# From the scrape configuration, not from the sidecar.
SCRAPED = {"namespace", "pod", "instance"}
# On every series of an agent, where they are set.
WHOSE = {"tenant", "team", "cost_center"}
# Seconds for what takes one, where two dozen CLIs may start beside it.
PATIENCE = 240


def binary() -> Path:
    named = os.environ.get("AGENT_SIDECAR_BIN")
    return Path(named) if named else next(iter(ROOT.glob("target/*-linux-*/release/agent-sidecar")))


def output(*argv: object, timeout: float = 60) -> str:
    return subprocess.run([str(word) for word in argv], capture_output=True, text=True, timeout=timeout, check=True).stdout


@cache
def catalogue() -> dict[str, dict]:
    """The sidecar's, and the fleet's."""
    return {metric["name"]: metric for program in [binary(), outside.binary()] for metric in json.loads(output(program, "catalog", "--format", "json"))}


@cache
def exposed() -> dict[str, dict[str, set[str]]]:
    """The label values that are there from the start, by metric and label."""
    values: dict[str, dict[str, set[str]]] = {}
    for line in output(binary(), "replay", "--format", "prometheus", "/dev/null").splitlines():
        name, _, labels = line.partition("{")
        for label, value in re.findall(r'(\w+)="([^"]*)"', labels):
            values.setdefault(name, {}).setdefault(label, set()).add(value)
    return values


@cache
def source_words() -> set[str]:
    """Every text of the code: where a label's values do not exist beforehand, they are among them."""
    sources = [path for crate in ["core", "daemon", "fleet"] for path in (ROOT / "sidecar" / crate / "src").rglob("*.rs")]
    return {word for path in sources for word in re.findall(r'"([\w.-]+)"', path.read_text())}


def family(name: str) -> dict | None:
    plain = re.sub(r"_(bucket|count|sum)$", "", name)
    metric = catalogue().get(plain)
    return metric if metric and metric["type"] == "histogram" else catalogue().get(name)


def labels_of(name: str) -> set[str]:
    if rule := RECORDED.get(name):
        found = promql.names(rule["expr"])
        by = {label for what, labels, _ in found.lists for label in labels if what == "by"}
        # A rule upon rules keeps their labels.
        return by.union(*(labels_of(one.metric) for one in found.selectors if one.metric in RECORDED))
    metric = family(name)
    assert metric, f"no metric is called {name}"
    more = WHOSE if name.startswith("claude_agent_") else set()
    return set(metric["labels"]) | SCRAPED | more | ({"le"} if name.endswith("_bucket") else set())


def holds(expression: str) -> None:
    """Everything that is named in an expression exists."""
    found = promql.names(expression)
    assert found.selectors, f"nothing is asked for: {expression}"
    for selector in found.selectors:
        labels = labels_of(selector.metric)
        for label, _, pattern in selector.matchers:
            assert label in labels, f"{selector.metric} has no label {label}"
            for value in pattern.split("|"):
                assert may_be(selector.metric, label, value), f'{selector.metric} never has {label}="{value}"'
    for what, labels, selectors in found.lists:
        for label in set(labels) - SCRAPED:
            # An aggregation is of what has the label; a join has to find it on some side.
            every = all if what in {"by", "without"} else any
            assert every(label in labels_of(one.metric) for one in selectors), f"{what} ({label}) of what has none: {expression}"


def may_be(metric: str, label: str, value: str) -> bool:
    if label == "le":
        return any(re.fullmatch(value, f"{bound:g}") for bound in family(metric)["buckets"])
    known = exposed().get(metric, {}).get(label, set()) if family(metric) and family(metric)["type"] == "counter" else set()
    # What the API calls its errors is not a list of ours.
    words = known if known and label != "error" else known | source_words()
    return any(re.fullmatch(value, word) for word in words)


@pytest.fixture(scope="module", autouse=True)
def promtool():
    """It has its minute while the other tests have theirs; what it says is looked at last."""
    asked = {"check": ["check", "rules", "--lint=all", "--lint-fatal", *(path.name for path in RULE_FILES)]} | {path.name: ["test", "rules", path.name] for path in TESTS}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    running = {name: subprocess.Popen(["promtool", *argv], cwd=ALERTS, **pipes) for name, argv in asked.items()}
    yield running
    for process in running.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("rule", RULE_LIST, ids=lambda rule: rule.get("alert") or rule["record"])
def test_what_a_rule_names_exists(rule: dict):
    holds(rule["expr"])


@pytest.mark.parametrize("broken", [
    "sum by (namespace) (rate(claude_agent_turn_total[5m]))",
    'claude_agent_turns_total{outcomes="crashed"}',
    'claude_agent_turns_total{outcome=~"crashed|exploded"}',
    "sum by (model) (claude_agent_turns_total)",
    'rate(claude_agent_time_to_first_token_seconds_bucket{le="11"}[5m])',
    "max by (namespace) (agent_sidecar_degraded) and on (slot) claude_agent_turns_total",
    "scope:claude_agent_budget_remaining:ratio{kind=\"usd\"}",
    'agent_fleet_actions_total{outcome="exploded"}',
    "sum by (session) (agent_fleet_sessions)",
])  # fmt: skip
def test_what_does_not_exist_is_found(broken: str):
    with pytest.raises(AssertionError):
        holds(broken)


@pytest.mark.parametrize("alert", ALERT_RULES)
def test_an_alert_is_silent_one_evaluation_before_it_fires(alert: str):
    """Says which test of promtool's asks for that; whether it is so, promtool says."""
    asked = re.compile(rf'ALERTS\{{[^}}]*alertname="{alert}"[^}}]*alertstate="firing"')
    for path in TESTS:
        file = yaml.safe_load(path.read_text())
        step = seconds(file["evaluation_interval"])
        for test in file["tests"]:
            asks = [one for one in test.get("promql_expr_test", []) if asked.search(one["expr"])]
            silent = {seconds(one["eval_time"]) for one in asks if not one.get("exp_samples")}
            fires = {seconds(one["eval_time"]) for one in asks if one.get("exp_samples")}
            if any(at - step in silent for at in fires):
                return
    pytest.fail(f"no test has {alert} firing, and silent one evaluation before")


def seconds(duration: str) -> int:
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    return sum(int(n) * units[unit] for n, unit in re.findall(r"(\d+)([smhd])", duration))


@pytest.mark.parametrize("alert", ALERT_RULES)
def test_an_alert_says_what_is_to_be_done(alert: str):
    rule = ALERT_RULES[alert]
    assert rule["labels"]["severity"] in {"critical", "warning", "info"}
    said = rule["annotations"]
    assert said["summary"] and said["description"]
    page = re.fullmatch(r"https://github\.com/agent-sidecar/agent-sidecar/blob/main/(docs/runbooks/\w+\.md)", said["runbook_url"])
    assert page and page[1] == f"docs/runbooks/{alert}.md" and (ROOT / page[1]).is_file()
    listed = f"| [{alert}]({alert}.md) | {rule['labels']['severity']} | {rule.get('for', '–')} |"
    assert listed in (RUNBOOKS / "README.md").read_text()


def test_the_page_says_how_long_each_takes():
    """Who adds an alert has a fault for it, and has measured (AGENT_SIDECAR_WRITE_DOCS=1 tests/alerts/run test_live.py)."""
    assert re.findall(r"^\| (\w+) \| .* s / .* s \|", (ROOT / "docs/alerts.md").read_text(), re.MULTILINE) == AGENTS
    assert f": {len(AGENTS)} alerts, " in (ROOT / "docs/for-sre.md").read_text()
    assert f"[{len(AGENTS)} alerts](docs/alerts.md)" in (ROOT / "README.md").read_text()


# Told by the panel of another: the same turns, in longer windows.
SHOWN_BY = {"ClaudeAgentTurnErrorsSlow": "ClaudeAgentTurnErrorsFast"}


@cache
def dashboards() -> dict[str, set[str]]:
    """The variables of each, by uid."""
    read = [json.loads(path.read_text()) for path in sorted((ROOT / "dashboards").glob("*.json"))]
    return {one["uid"]: {variable["name"] for variable in one["templating"]["list"]} for one in read if "templating" in one}


@cache
def explained(uid: str) -> set[str]:
    """The alerts that panels of it have the runbook of."""
    (text,) = [text for text in (path.read_text() for path in (ROOT / "dashboards").glob("*.json")) if json.loads(text)["uid"] == uid]
    return set(re.findall(r'"Runbook: (\w+)"', text))


@pytest.mark.parametrize("alert", ALERT_RULES)
def test_an_alert_leads_to_a_dashboard_of_what_it_is_about(alert: str):
    link = ALERT_RULES[alert]["annotations"]["dashboard_url"]
    uid = re.match(r"http://localhost:3000/d/([\w-]+)\?from=now-6h", link)[1]
    assert uid in dashboards(), f"no dashboard has the uid {uid}"
    assert SHOWN_BY.get(alert, alert) in explained(uid), f"no panel of {uid} is about it"
    asked = re.findall(r"(?:(?:with )?\$labels\.(\w+) \}\})?&var-(\w+)=\{\{ urlquery (\S+) \}\}", link)
    assert asked and {variable for _, variable, _ in asked} <= dashboards()[uid]
    found = promql.names(ALERT_RULES[alert]["expr"])
    labels = {label for what, labels, _ in found.lists if what == "by" for label in labels}
    labels = labels.union(*(labels_of(one.metric) for one in found.selectors if one.metric in RECORDED))
    for where, variable, value in asked:
        # What may be absent is left out with its name: an empty variable would find nothing.
        assert (where or value.removeprefix("$labels.")) == variable and value == ("." if where else "$labels.instance")
        assert variable in labels, f"{alert} has no label {variable}"
    assert {label for label in labels & {"namespace", "pod", "instance", "tenant"} & dashboards()[uid]} <= {variable for _, variable, _ in asked}


def test_every_runbook_is_an_alerts():
    assert {path.stem for path in RUNBOOKS.glob("*.md")} - {"README"} == set(ALERT_RULES)


def commands(alert: str) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", (RUNBOOKS / f"{alert}.md").read_text(), re.MULTILINE | re.DOTALL)
    assert [language for language, _ in blocks] == ["sh"], "one block, of sh"
    return blocks[0][1].splitlines()


@cache
def flags(*verbs: str, program: Path | None = None) -> str:
    return output(program or binary(), *verbs, "--help")


@pytest.mark.parametrize("alert", ALERT_RULES)
def test_a_runbook_has_its_parts(alert: str):
    text = (RUNBOOKS / f"{alert}.md").read_text()
    assert text.startswith(f"# {alert}\n")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == SECTIONS
    for page in re.findall(r"\]\(([^)#]+)\)", text):
        assert (RUNBOOKS / page).resolve().is_file(), f"{page} is not there"
    for metric in re.findall(r"`((?:claude_agent|agent_sidecar|agent_fleet)_\w+)", text):
        assert family(metric), f"no metric is called {metric}"
    assert len(commands(alert)) == 3
    # Those of the text, too.
    quoted = [line for line in re.findall(r"`(agent-(?:sidecar|fleet) [^`]*)`", text) if line.split()[1].isalpha()]
    for line in [*commands(alert), *quoted]:
        words = shlex.split(line)
        if words[0] in {"agent-sidecar", "agent-fleet"}:
            verbs = words[1:3] if words[1] == "control" else words[1:2]
            program = binary() if words[0] == "agent-sidecar" else outside.binary()
            for flag in ["", *(word for word in words if re.fullmatch(r"--[a-z-]+", word))]:
                assert re.search(rf"(^|\s){flag}\b", flags(*verbs, program=program)), f"{' '.join(verbs)} has no {flag}"
        if words[:3] == ["promtool", "query", "instant"]:
            assert words[3] == "$PROMETHEUS"
            holds(words[4])


class Scene:
    """An agent under the sidecar with something on its books, and a Prometheus with the rules that scrapes it: what the commands ask."""

    def __init__(self, directory: Path):
        self.directory, self.started, self.ran = directory, [], {}
        ledger, bin_dir, home = directory / "ledger.jsonl", directory / "bin", directory / "home"
        for path in [bin_dir, home]:
            path.mkdir()
        (bin_dir / "agent-sidecar").symlink_to(binary().resolve())
        (bin_dir / "agent-fleet").symlink_to(outside.binary().resolve())
        self.env = {
            "PATH": f"{bin_dir}:{os.environ['PATH']}", "HOME": str(home), "LEDGER": str(ledger), "SIDECAR": "http://localhost:9477",
            "PROMETHEUS": "http://localhost:9090", "AGENT_SIDECAR_SOCKET": str(directory / "hub.sock"), "AGENT_SIDECAR_LEDGER": str(ledger),
            "AGENT_SIDECAR_CONTAINER_DAY_MAX_COST_USD": "20", "AGENT_SIDECAR_TENANT": "acme",
        }  # fmt: skip
        # Where the fleet's commands ask.
        self.fleet = outside.Outside(directory / "fleet", binary(), 9490).start()
        self.env |= self.fleet.environment()
        # It says what a real one has said, and stays until its input ends.
        agent = directory / "claude"
        agent.write_text(f"#!/bin/sh\ncat {shlex.quote(str(RECORDINGS / '05a_subagent.jsonl'))}\ncat >/dev/null\n")
        agent.chmod(0o755)
        argv = ["agent-sidecar", "run", "--listen", "127.0.0.1:9477", "--", agent, "-p", "--output-format", "stream-json", "--verbose"]
        self.start("agent", argv, stdin=subprocess.PIPE)
        config = directory / "prometheus.yml"
        scrape = {"job_name": "agent", "scrape_interval": "1s", "static_configs": [{"targets": ["localhost:9477", "localhost:9490"]}]}
        settings = {"global": {"evaluation_interval": "1s"}, "rule_files": [str(path) for path in RULE_FILES], "scrape_configs": [scrape]}
        config.write_text(yaml.safe_dump(settings))
        flags = [f"--config.file={config}", f"--storage.tsdb.path={directory / 'tsdb'}", "--web.listen-address=127.0.0.1:9090"]
        self.start("prometheus", ["prometheus", *flags], stdin=subprocess.DEVNULL)

    def start(self, name: str, argv: list, **how):
        with (self.directory / f"{name}.log").open("wb") as log:
            self.started.append(subprocess.Popen([str(word) for word in argv], env=self.env, cwd=self.directory, stdout=log, stderr=log, **how))

    def query(self, expression: str) -> list[dict]:
        url = "http://localhost:9090/api/v1/query?" + urllib.parse.urlencode({"query": expression})
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)["data"]["result"]
        except (urllib.error.URLError, ConnectionError):
            return []  # It is not up yet.

    def wait_for(self, expression: str) -> list[dict]:
        deadline = time.monotonic() + PATIENCE
        while not (found := self.query(expression)):
            assert time.monotonic() < deadline, f"{expression} has stayed empty; see {self.directory}"
            time.sleep(0.3)
        return found

    def shell(self, command: str) -> subprocess.CompletedProcess:
        """Once each: `doctor` looks through every directory there is."""
        if command not in self.ran:
            how = {"env": self.env, "cwd": self.directory, "capture_output": True, "text": True, "timeout": 600}
            self.ran[command] = subprocess.run(["sh", "-c", command], **how)
        return self.ran[command]

    def close(self):
        self.fleet.close()
        for process in self.started:
            if process.stdin:
                process.stdin.close()
        for process in self.started:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    one = Scene(tmp_path_factory.mktemp("scene"))
    try:
        one.wait_for("sum(claude_agent_cost_usd_total) > 0")
        # What the agent says is over, and on its books.
        one.wait_for("sum(claude_agent_turns_total) > 0")
        one.wait_for("agent_fleet_claimed_timestamp_seconds")
        yield one
    finally:
        one.close()


def test_rules_speak_of_what_was_scraped(scene: Scene):
    """Once for all tenants, with the labels that they are to have."""
    # Since something was spent.
    (left,) = scene.wait_for('scope:claude_agent_budget_remaining:ratio{limit="usd"} < 1')
    assert left["metric"]["scope"] == "container_day" and "tenant" not in left["metric"] and float(left["value"][1]) > 0.9
    with urllib.request.urlopen("http://localhost:9090/api/v1/rules", timeout=60) as answer:
        groups = json.load(answer)["data"]["groups"]
    assert [rule["lastError"] for group in groups for rule in group["rules"] if rule.get("lastError")] == []
    assert len([rule for group in groups for rule in group["rules"] if rule["type"] == "alerting"]) == len(ALERT_RULES)


@pytest.mark.parametrize("alert", ALERT_RULES)
def test_the_first_commands_work(alert: str, scene: Scene):
    for command in commands(alert):
        done = scene.shell(command)
        # `doctor` says with 1 that something is broken here, as there is: no CLI is installed.
        allowed = {0, 1} if command == "agent-sidecar doctor" else {0}
        assert done.returncode in allowed and "error" not in done.stderr, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize(("command", "said"), [
    ('curl -s "$SIDECAR/status"', '"session_id":"bdf696de-'),
    ('agent-sidecar top --once --url "$SIDECAR"', "bdf696de"),
    ('agent-sidecar explain --ledger "$LEDGER"', "what it was spent on"),
    ("agent-sidecar control budgets", "container_day"),
    ("agent-sidecar doctor", "ledger"),
    ('curl -s "$FLEET/readyz"', "ok"),
    ("agent-sidecar check --print | grep hub", "hub.socket"),
    ("""promtool query instant "$PROMETHEUS" 'claude_agent_sessions_active'""", 'instance="localhost:9477"'),
])  # fmt: skip
def test_commands_say_something(command: str, said: str, scene: Scene):
    assert said in scene.shell(command).stdout


@pytest.mark.parametrize("what", ["check", *(path.name for path in TESTS)])
def test_promtool_is_content(what: str, promtool: dict[str, subprocess.Popen]):
    said, _ = promtool[what].communicate(timeout=900)
    assert promtool[what].returncode == 0, said
