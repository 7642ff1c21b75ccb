"""The TypeScript SDK with a wrapper where it expects the CLI: it must not be able to tell. `sdk/session.mjs` is the caller."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import harness
import pytest
from sdk import shim

# For a whole session; none of them works for more than a few seconds.
PATIENCE = 150
# How many requests each makes, where it does not depend on the release.
SCENARIOS = {"one_shot": 3, "turns": 6, "permissions": 3, "hooks": 3, "mcp": 2, "interrupt": 2, "control": None, "partial": 2, "spawned": 2, "large": 1}


@pytest.fixture
def start(api, tmp_path):
    """Starts a scenario, bare or wrapped."""
    started = []

    def start(scenario: str, rules: str, version: str, sidecar: harness.Sidecar | None = None) -> tuple[shim.Run, subprocess.Popen]:
        served = api(shim.script(rules))
        run = shim.Run(tmp_path / ("wrapped" if sidecar else "bare"), served, version, sidecar and sidecar.argv)
        argv = ["node", Path(__file__).parent / "sdk/session.mjs", scenario, run.path, run.work]
        started.append(subprocess.Popen(argv, env=run.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE))
        return run, started[-1]

    yield start
    for node in started:
        node.kill()
        node.wait(30)


@pytest.fixture
def session(start):
    """Runs a scenario to its end: its lines."""

    def session(scenario: str, rules: str, version: str, sidecar: harness.Sidecar | None = None) -> tuple[shim.Run, list]:
        run, node = start(scenario, rules, version, sidecar)
        lines, _ = node.communicate(timeout=PATIENCE)
        assert node.returncode == 0
        return run, [json.loads(line) for line in lines.splitlines()]

    return session


def typed(lines: list, kind: str) -> list[dict]:
    return [line for line in lines if isinstance(line, dict) and line["type"] == kind]


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_caller_sees_the_same(name, version, session, sidecar):
    wrapper = sidecar()
    (bare, expected), (wrapped, seen) = session(name, name, version), session(name, name, version, wrapper)
    assert typed(expected, "result") and not typed(expected, "thrown")
    assert shim.plain(seen, wrapped.home) == shim.plain(expected, bare.home)
    shim.ended(wrapped.home)
    assert len(wrapped.api.requests()) == (SCENARIOS[name] or len(bare.api.requests()))
    assert shim.spent(wrapper) == pytest.approx(wrapped.api.cost_usd(version), abs=1e-9)


# A session that goes on in four processes, and one that there never was.
@pytest.mark.parametrize("name, requests, thrown", [("resume", 5, 0), ("refused", 0, 1)])
def test_a_session_is_resumed_as_without_it(name, requests, thrown, version, session, sidecar):
    wrapper = sidecar()
    (bare, expected), (wrapped, seen) = session(name, name, version), session(name, name, version, wrapper)
    assert shim.plain(seen, wrapped.home) == shim.plain(expected, bare.home)
    assert len(typed(seen, "thrown")) == thrown
    shim.ended(wrapped.home)
    assert len(wrapped.api.requests()) == len(bare.api.requests()) == requests
    assert shim.spent(wrapper) == pytest.approx(wrapped.api.cost_usd(version), abs=1e-9)


@pytest.mark.parametrize("ending", ["abort", "close"])
def test_nothing_is_left_of_a_turn_that_was_left(ending, version, session, sidecar):
    wrapper = sidecar()
    run, _ = session(ending, "abort", version, wrapper)
    shim.ended(run.home)
    # The CLI may be gone before it says what it spent: seen once on an abort of the older one.
    shim.check_spent_or_estimated(wrapper, run.api, version)


def test_nothing_is_left_of_an_app_that_was_killed(version, start, sidecar):
    wrapper = sidecar()
    run, node = start("stay", "abort", version, wrapper)
    harness.wait_for("tool call", run.started)
    node.kill()
    node.wait(30)
    shim.ended(run.home)
    assert shim.spent(wrapper) == pytest.approx(run.api.cost_usd(version), abs=1e-9)


# The first answer alone is above the limit. With it the turn is over, or it works on.
@pytest.mark.parametrize("rules, reason", [("plain", "completed"), ("abort", "aborted_tools")])
def test_a_session_without_money_answers_at_once(rules, reason, version, session, sidecar):
    wrapper = sidecar("--max-cost-usd", "0.001")
    run, lines = session("turns", rules, version, wrapper)
    first, *refused = typed(lines, "result")
    assert first["terminal_reason"] == reason
    assert [(result["subtype"], result["is_error"], result["num_turns"]) for result in refused] == [("success", False, 0)] * 2
    assert all("a limit of this session is used up" in result["result"] for result in refused)
    assert all(asked["duration_ms"] < 20_000 for asked in typed(lines, "asked")[1:])
    assert not typed(lines, "thrown")
    shim.ended(run.home)
    assert len(run.api.requests()) == 1
    assert shim.spent(wrapper) == pytest.approx(run.api.cost_usd(version), abs=1e-9)


def test_who_is_paused_is_answered_with_the_reason_and_goes_on(version, start, sidecar, tmp_path):
    place = ("--socket", str(tmp_path / "hub.sock"))
    run, node = start("patient", "plain", version, sidecar(*place, "--hub-control"))
    lines = []
    for line in node.stdout:
        lines.append(json.loads(line))
        if typed(lines[-1:], "result") and len(typed(lines, "result")) == 1:
            shim.control(*place, "pause")
        elif "is paused" in lines[-1].get("result", ""):
            shim.control(*place, "resume")
    assert node.wait(PATIENCE) == 0
    results = typed(lines, "result")
    paused = [result for result in results if "is paused" in result["result"]]
    assert paused and {(result["subtype"], result["is_error"], result["num_turns"]) for result in paused} == {("success", False, 0)}
    assert results[-1] not in paused and not typed(lines, "thrown")
    assert len({result["session_id"] for result in results}) == 1
    assert len(run.api.requests()) == len(results) - len(paused)


def test_a_query_without_money_ends(version, session, sidecar):
    wrapper = sidecar("--max-cost-usd", "0.001")
    run, lines = session("one_shot", "abort", version, wrapper)
    assert [result["terminal_reason"] for result in typed(lines, "result")] == ["aborted_tools"]
    shim.ended(run.home)
    assert len(run.api.requests()) == 1
