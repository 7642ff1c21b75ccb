"""Each alert on the running thing: a fault that sets it off, agents that are well and do not, and how long it takes to be told."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import compress
import healthy
import pytest
from faults import FAULTS, Fault, budget_of_a_blind_one
from world import ALERTS, LANES, PATIENCE, ROUTES, SHIPPED, Pod, Told, World

PAGE = ALERTS.parent / "docs/alerts.md"
RULES = {rule["alert"]: rule for group in SHIPPED["groups"] for rule in group["rules"] if "alert" in rule}
SHORT = {rule["alert"]: rule for group in compress.rules(SHIPPED)["groups"] for rule in group["rules"] if "alert" in rule}
BY_ALERT = {fault.alert: fault for fault in FAULTS}
# Three hours, compressed.
SOAK = 180
# Faults that have not been told of by then are not told of in time.
LONGEST = 900
HELD = "blind-and-spent"


@dataclass
class Run:
    world: World
    pods: dict[str, Pod]
    soak_seconds: float
    # While nobody was sick yet.
    fired: list[dict]
    pending: list[dict]
    worked: dict[str, float]
    # To the end.
    states: dict[str, list[dict]]

    def told(self, lane: str, alert: str, namespace: str | None = None) -> Told | None:
        return self.world.receiver.first(lane, alert, namespace or alert.lower())


@contextlib.contextmanager
def played(directory: Path) -> Iterator[Run]:
    for tool in ["prometheus", "prometheus-alertmanager"]:
        assert shutil.which(tool), f"no {tool}; run tests/install"
    world = World(directory)
    pods = {fault.alert: world.add("agent-1", fault.alert.lower(), fault.drive, alert=fault.alert, real=fault.real) for fault in FAULTS}
    pods[HELD] = world.add("agent-1", HELD, budget_of_a_blind_one)
    pods |= {name: world.add(name, healthy.NAMESPACE, drive) for name, drive in healthy.AGENTS.items()}
    threads = {name: threading.Thread(target=pod.run, daemon=True) for name, pod in pods.items()}
    try:
        world.start()
        start = time.monotonic()
        for name in sorted(threads, key=lambda name: name in BY_ALERT and not BY_ALERT[name].early):
            threads[name].start()
        faulty = [threads[name] for name in [*BY_ALERT, HELD]]
        while (any(thread.is_alive() for thread in faulty) or time.monotonic() - start < SOAK) and time.monotonic() - start < LONGEST:
            for lane in LANES:
                world.suppressed(lane)
            time.sleep(1)
        mine = f'namespace="{healthy.NAMESPACE}"'
        of_shop = lambda state: [one for lane in LANES for one in world.states(lane, state) if one["namespace"] == healthy.NAMESPACE]  # noqa: E731
        counted = ["claude_agent_turns_total", "claude_agent_process_starts_total", "claude_agent_api_retries_total", "claude_agent_enforcements_total"]
        # Containers end, and their counters begin anew: what was counted at most is less than all, and enough.
        sums = {name: world.query("fast", f"sum(max_over_time({name}{{{mine}}}[30m]))") for name in counted}
        worked = {name: float(found[0]["value"][1]) if found else 0.0 for name, found in sums.items()}
        soaked, fired, pending = time.monotonic() - start, of_shop("firing"), of_shop("pending")
        world.sick.set()
        wanted = lambda: bool(world.receiver.first("fast", "ClaudeAgentLoop", healthy.NAMESPACE))  # noqa: E731
        # It may be asking for the last time still, as it did when it was well.
        end = time.monotonic() + PATIENCE
        while not wanted() and threads[healthy.SICK].is_alive() and time.monotonic() < end:
            time.sleep(0.2)
        states = {lane: world.states(lane, "firing") for lane in LANES}
        yield Run(world, pods, soaked, fired, pending, worked, states)
    finally:
        world.over.set()
        world.sick.set()
        for thread in threads.values():
            if thread.ident:
                thread.join(60)
        world.close()


class Runs:
    """One for all tests; and a second, when one of them is asked again: of the same run it would be told the same."""

    def __init__(self, directory: Callable[[], Path]):
        self.directory, self.playing, self.begun, self.run = directory, contextlib.ExitStack(), 0, None

    def last(self, again: bool) -> Run:
        if self.run is None or again and self.begun < 2:
            assert self.begun < 2, "the second run has not come to its end, either"
            self.begun, self.run = self.begun + 1, None
            # They have one machine, and the same ports.
            self.playing.close()
            self.run = self.playing.enter_context(played(self.directory()))
        return self.run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    all_of_them = Runs(lambda: tmp_path_factory.mktemp("live"))
    with all_of_them.playing:
        yield all_of_them


@pytest.fixture
def run(runs: Runs, request: pytest.FixtureRequest) -> Run:
    # Counted by whoever asks again.
    return runs.last(again=getattr(request.node, "execution_count", 1) > 1)


def said_well(told: Told, fault: Fault, pod: Pod) -> None:
    """Who reads it sees what it is about, without a gap, and where to go on."""
    rule = RULES[fault.alert]
    assert told.labels["severity"] == rule["labels"]["severity"] and told.labels["namespace"] == pod.namespace
    assert told.receiver == {"critical": "page", "warning": "ticket", "info": "chat"}[told.labels["severity"]]
    assert set(told.annotations) == {"summary", "description", "runbook_url", "dashboard_url"}
    for text in told.annotations.values():
        assert text and not re.search(r"<no value>|\{\{|\}\}|%!|<error|NaN", text), text
    if "pod" in told.labels:
        assert told.labels["pod"] == pod.name and told.labels["instance"] == f"localhost:{pod.port}"
    # The reader knows whose it is without opening anything.
    assert pod.name in told.annotations["summary"] or pod.namespace in told.annotations["summary"] or "model" in told.labels
    link = urllib.parse.urlsplit(told.annotations["dashboard_url"])
    asked = dict(urllib.parse.parse_qsl(link.query))
    for label in ["namespace", "pod", "instance", "tenant", "model"]:
        assert asked.get(f"var-{label}", told.labels.get(label)) == told.labels.get(label), link.query


@pytest.mark.parametrize("alert", RULES)
def test_a_fault_sets_it_off_and_somebody_is_told(alert: str, run: Run):
    fault, pod = BY_ALERT[alert], run.pods[alert]
    assert pod.failed is None, pod.failed
    told = run.told("fast", alert)
    assert told, f"{alert} was not told of; firing: {run.states['fast']}"
    assert told.starts_at >= pod.fault_at, "it fired before there was a fault"
    said_well(told, fault, pod)


@pytest.mark.parametrize("alert", [fault.alert for fault in FAULTS if fault.real])
def test_the_rule_that_ships_fires_in_its_own_time(alert: str, run: Run):
    told = run.told("real", alert)
    assert told, f"{alert} was not told of; firing: {run.states['real']}"
    said_well(told, BY_ALERT[alert], run.pods[alert])


def test_nothing_else_fires(run: Run):
    allowed = {(fault.alert.lower(), alert) for fault in FAULTS for alert in {fault.alert} | fault.also}
    allowed |= {(HELD, "AgentSidecarBlind"), (HELD, "AgentSidecarTelemetryLoss"), (HELD, "ClaudeAgentBudgetNearlyUsed"), (healthy.NAMESPACE, "ClaudeAgentLoop")}
    assert {(one["namespace"], one["alertname"]) for one in run.states["fast"]} - allowed == set()
    # Money that is spent at the pace of compressed hours is a runaway to the rules as they ship.
    real = {(one["namespace"], one["alertname"]) for one in run.states["real"] if one["alertname"] != "ClaudeAgentSpendRunaway" or one["namespace"] == healthy.NAMESPACE}
    assert real - allowed == set()


def test_what_another_alert_says_already_is_not_told(run: Run):
    assert run.pods[HELD].failed is None, run.pods[HELD].failed
    assert ("fast", HELD, "ClaudeAgentBudgetNearlyUsed", "AgentSidecarBlind") in run.world.held_back
    assert ("fast", "claudeagentturnerrorsfast", "ClaudeAgentTurnErrorsSlow", "ClaudeAgentTurnErrorsFast") in run.world.held_back
    assert run.told("fast", "AgentSidecarBlind", HELD)
    held_back(run, "ClaudeAgentBudgetNearlyUsed", "AgentSidecarBlind", HELD)
    # When the fast one is over, the slow one is still true, and told.
    slow = run.told("fast", "ClaudeAgentTurnErrorsSlow", "claudeagentturnerrorsfast")
    if slow and slow.at <= run.pods["ClaudeAgentTurnErrorsFast"].over_at:
        held_back(run, "ClaudeAgentTurnErrorsSlow", "ClaudeAgentTurnErrorsFast", "claudeagentturnerrorsfast")


def held_back(run: Run, alert: str, by: str, namespace: str) -> None:
    """On a machine that is late with scrapes both begin anew, and the one that holds back may do so second; what is told is on its way for some seconds."""
    if told := run.told("fast", alert, namespace):
        firing = f'ALERTS{{alertname="{by}", alertstate="firing", namespace="{namespace}"}}'
        seen = run.world.query("fast", f"count_over_time({firing}[10s:1s] @ {told.at:.3f})")
        assert not seen or float(seen[0]["value"][1]) < 10, "it was told while another said it already"


def test_nobody_is_told_of_agents_that_are_well(run: Run):
    failed = {name: run.pods[name].failed for name in healthy.AGENTS if run.pods[name].failed}
    assert failed == {}, "\n".join(failed.values())
    assert run.soak_seconds >= SOAK
    busy = run.worked["claude_agent_turns_total"] >= 200 and run.worked["claude_agent_process_starts_total"] >= 15
    assert busy and run.worked["claude_agent_api_retries_total"] > 0 and run.worked["claude_agent_enforcements_total"] > 0, run.worked
    print(f"\n{run.soak_seconds:.0f} s with {run.worked}; pending for a while: {sorted({one['alertname'] for one in run.pending})}", file=sys.stderr)
    assert run.fired == []


def test_one_of_them_who_gets_sick_is_told_of(run: Run):
    told = run.told("fast", "ClaudeAgentLoop", healthy.NAMESPACE)
    assert told and told.labels["pod"] == healthy.SICK and told.starts_at >= run.pods[healthy.SICK].fault_at


def row(fault: Fault, run: Run) -> str:
    """What was measured with time compressed, and what that is at most with the rules as they ship."""
    alert, told, pod = fault.alert, run.told("fast", fault.alert), run.pods[fault.alert]
    waits = compress.milliseconds(RULES[alert].get("for", "0s")) / 1000
    brief = compress.milliseconds(SHORT[alert].get("for", "0s")) / 1000
    holds = max(0.0, told.starts_at - pod.fault_at - brief)
    scrape, evaluation = 15, 15
    # The sidecar is not compressed, windows are.
    bound = (holds * fault.scale if fault.accrues else holds) + scrape + evaluation + waits
    group = next(route for route in ROUTES["route"]["routes"] if RULES[alert]["labels"]["severity"] in route["matchers"][0])
    grouped = compress.milliseconds(group.get("group_wait", ROUTES["route"]["group_wait"])) / 1000
    real = run.told("real", alert) if fault.real else None
    measured = f"{span(real.starts_at - pod.fault_at)} / {span(real.at - pod.fault_at)}" if real else "–"
    took = f"{told.starts_at - pod.fault_at:.1f} s / {told.at - pod.fault_at:.1f} s"
    how = "windows" if fault.accrues else "the sidecar"
    return f"| {alert} | {fault.what} | {took} | {how} | {span(bound)} / {span(bound + grouped)} | {measured} |"


def span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


BEGIN, END = "<!-- made by tests/alerts/test_live.py -->\n", "<!-- until here -->\n"


def test_how_long_it_took(run: Run):
    """As the page has it; with AGENT_SIDECAR_WRITE_DOCS the run writes it there."""
    head = ["| alert | the fault | compressed: fires / told | until it holds | at most: fires / told | measured: fires / told |", "|---|---|---|---|---|---|"]
    table = "\n".join(head + [row(BY_ALERT[alert], run) for alert in RULES]) + "\n"
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    if os.environ.get("AGENT_SIDECAR_WRITE_DOCS"):
        PAGE.write_text(before + BEGIN + table + END + after)
    print("\n" + table, file=sys.stderr)
