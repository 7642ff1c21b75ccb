"""The real CLI in a circle, polling, frozen, and leaving something behind: who is sick is stopped, who is healthy is not."""

from __future__ import annotations

import os
import signal

import harness
from harness import wait_for
from test_bare import TOOLS, bash, script
from test_wrapped import children, counts

# Far below the defaults, so that a healthy agent which came near them would be stopped.
STRICT = ["--loop-mode", "enforce", "--max-identical-calls", "6", "--max-stale-answers", "8", "--max-alternations", "4"]


def again(*blocks: dict, times: int | None = None) -> dict:
    """The same answer, whatever came back."""
    return {"when": {"agent": "main", "prompt_contains": "go"}, "reply": {"blocks": list(blocks)}} | ({"times": times} if times else {})


def decided(sidecar: harness.Sidecar) -> list[tuple[str, str]]:
    return [(line["limit"], line["action"]) for line in sidecar.ledger() if line["event"] == "limit_decided"]


def live(sidecar: harness.Sidecar) -> dict:
    """The session as it is now."""
    wait_for("the wrapper", lambda: harness.listens(sidecar.port) and sidecar.status()["sessions"])
    return sidecar.status()["sessions"][0]


def test_a_circle_is_warned_of_and_then_ends_the_turn_alone(version, api, session, sidecar):
    wrapper = sidecar("--loop-mode", "enforce", "--max-identical-calls", "6")
    # An answer takes longer than the interrupt on a busy machine: else the next requests are over already. A tool that did would be one that waits.
    slow = script(again(bash("echo nothing new")))
    slow["defaults"]["pace"] = {"first_byte_delay_ms": 1000}
    served = api(slow)
    cli = session(served, *TOOLS, sidecar=wrapper)
    result = cli.ask("go on", timeout=120)
    assert (result["subtype"], result["is_error"]) == ("error_during_execution", True)
    # One more request may have been on its way.
    assert 6 <= len(served.requests()) <= 8, served.requests()
    assert cli.ask("and now?")["subtype"] == "success", "the session lives on"
    for action in ("warn", "interrupt"):
        counts(wrapper, f'claude_agent_loop_detections_total{{kind="identical_call",action="{action}"}}', 1)
    counts(wrapper, 'claude_agent_turns_total{outcome="limit_stopped"}', 1)
    cli.close()
    assert decided(wrapper) == [("identical_call", "warn"), ("identical_call", "interrupt")]


def test_by_default_a_circle_is_only_told(version, api, session, sidecar):
    wrapper = sidecar("--max-identical-calls", "6")
    cli = session(api(script(again(bash("echo nothing new"), times=9))), *TOOLS, sidecar=wrapper)
    assert cli.ask("go on", timeout=120)["subtype"] == "success"
    cli.close()
    assert decided(wrapper) == [("identical_call", "warn"), ("identical_call", "interrupt")]
    assert {line["mode"] for line in wrapper.ledger() if line["event"] == "limit_decided"} == {"shadow"}


def test_who_polls_is_left_alone(version, api, session, sidecar):
    wrapper = sidecar(*STRICT)
    looks = [again(bash("sleep 0.1; echo pending"), times=12), again(bash("date +%s%N"), times=12)]
    served = api(script(*looks))
    cli = session(served, *TOOLS, sidecar=wrapper)
    assert cli.ask("go on", timeout=120)["subtype"] == "success"
    cli.close()
    assert len(served.requests()) == 25
    assert decided(wrapper) == []


def test_a_stopped_cli_is_frozen_and_comes_back(version, api, session, sidecar):
    wrapper = sidecar("--stall-timeout", "3s")
    served = api(script({"when": {"agent": "main", "results": 0}, "reply": {"blocks": [bash("echo begun; read -t 90 < <(:; tail -f /dev/null)")]}}))
    cli = session(served, *TOOLS, sidecar=wrapper)
    cli.send(harness.user("go"))
    wait_for("a tool", lambda: live(wrapper)["why"] == "tool")
    [pid] = children(cli.process.pid)
    os.kill(pid, signal.SIGSTOP)
    wait_for("frozen", lambda: live(wrapper)["why"] == "frozen")
    # A tool may take its time, a frozen CLI may not: it is woken, and its turn interrupted.
    result = cli.result(timeout=60)
    assert result["subtype"] in ("error_during_execution", "success"), result
    [limit] = [line for line in wrapper.ledger() if line["event"] == "limit_decided"]
    assert (limit["limit"], limit["action"], limit["why"]) == ("stall", "interrupt", "frozen")
    wait_for("idle", lambda: live(wrapper)["why"] == "idle")
    assert cli.ask("and now?")["subtype"] == "success", "the session lives on"
    assert cli.close() == 0


def test_what_waits_for_the_model_thinks_however_long(version, api, session, sidecar):
    wrapper = sidecar()
    cli = session(api(script({"reply": {"hang": True}})), *TOOLS, sidecar=wrapper)
    cli.send(harness.user("go"))
    wait_for("a look at its sockets", lambda: (live(wrapper)["process"]["sockets"] or {}).get("established", 0) > 0, timeout=60)
    wait_for("silence", lambda: live(wrapper)["silent_seconds"] >= 12, timeout=60)
    assert (live(wrapper)["state"], live(wrapper)["why"]) == ("model", "thinking")


def test_what_outlives_its_call_is_seen_while_it_runs(version, api, session, sidecar):
    wrapper = sidecar()
    served = api(script({"when": {"agent": "main", "results": 0}, "reply": {"blocks": [bash("(setsid tail -f /dev/null >/dev/null 2>&1 &); echo left")]}}))
    cli = session(served, *TOOLS, sidecar=wrapper)
    assert cli.ask("go")["subtype"] == "success"
    wait_for("an orphan", lambda: wrapper.metrics().get("claude_agent_orphan_processes") == 1)
    assert cli.close() == 0
