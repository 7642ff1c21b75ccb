"""Pods that live for seconds: what Prometheus saw of their money, what the collector got, what the ledgers say, and what the bill does."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
from decimal import Decimal

import harness
import pytest
from test_otlp import Telemetry
from test_prometheus import Prometheus

SCRIPT = {
    "defaults": {"usage": {"input_tokens": 11, "output_tokens": 130, "cache_read_input_tokens": 5000}},
    "otherwise": {"blocks": ["done"]},
}
# Who lingers is read to the end; the others are gone when it is their turn, or are not.
PODS = {"a": "2m", "b": "2m", "c": "0s", "d": "0s"}
PAGE = harness.ROOT / "docs/ephemeral.md"


def query(heading: str) -> str:
    """The query that the page has under a heading."""
    return re.search(rf"^## {heading}$.*?```promql\n(.*?)```", PAGE.read_text(), re.M | re.S)[1].strip()


def sidecar(*argv: object) -> str:
    return subprocess.run([harness.binary(), *map(str, argv)], capture_output=True, text=True, timeout=60, check=True).stdout


def replayed(*ledgers: object) -> dict:
    return json.loads(sidecar("replay", "--ledger", "--format", "json", *ledgers), parse_float=Decimal)["totals"]


def billed(*argv: object) -> list[dict]:
    return list(csv.DictReader(io.StringIO(sidecar("bill", "--strict", *argv))))


@pytest.mark.parametrize("version", ["new"], indirect=True)
def test_the_ledger_has_it_all_and_prometheus_what_it_was_shown(version, api, session, tmp_path, collector, capsys):
    served, taker = api(SCRIPT), collector()
    pods = {}
    for name, linger in PODS.items():
        flags = ["--linger", linger, "--tenant", f"tenant-{name}", "--price-discount", "0.5", "--otlp-endpoint", taker.url, "--otlp-queue-dir", str(tmp_path / "queue")]
        # Each has as long as it takes on a busy machine.
        flags += ["--otlp-flush", "30s", "--platform-grace", "5m"]
        pods[name] = harness.Sidecar(tmp_path / name, *flags)
    targets = [{"targets": [f"127.0.0.1:{pod.port}"], "labels": {"pod": name}} for name, pod in pods.items()]
    scraper = Prometheus(tmp_path, targets=targets)
    try:
        harness.wait_for("prometheus", lambda: harness.listens(scraper.port))
        for name, pod in pods.items():
            cli = session(served, sidecar=pod, home=tmp_path / f"home-{name}")
            for turn in range(2):
                cli.ask(f"turn {turn}")
            assert cli.close(timeout=180) == 0

        ledgers = [pod.ledger_file for pod in pods.values()]
        totals = replayed(*ledgers)
        assert float(totals["cost_usd"]) == pytest.approx(served.cost_usd(version) / 2, abs=1e-12), "half off"

        truth = {name: float(replayed(pod.ledger_file)["cost_usd"]) for name, pod in pods.items()}
        saw = lambda: {found["metric"]["pod"]: float(found["value"][1]) for found in scraper.query(query("What Prometheus saw"))}
        waited = [name for name, linger in PODS.items() if linger != "0s"]
        harness.wait_for("what waited until it was read", lambda: all(saw().get(name) == pytest.approx(truth[name], abs=1e-12) for name in waited))
        seen = saw()
        assert all(seen.get(name, 0) <= truth[name] + 1e-12 for name in PODS)
        grown = scraper.value("sum(increase(claude_agent_cost_usd_total[1h]))") or 0
        assert grown < sum(truth.values()), "no first value has an increase"

        pushed = Telemetry(taker.posts).sum("claude_agent_cost_usd_total")
        assert pushed == pytest.approx(sum(truth.values()), abs=1e-12), "pushed at the end, lingering or not"
        with capsys.disabled():
            gap = sum(truth.values()) - sum(seen.values())
            print(f"\nledgers ${sum(truth.values()):.6f}, Prometheus ${sum(seen.values()):.6f} (gap ${gap:.6f}), increase() ${grown:.6f}")
    finally:
        scraper.close()


def test_a_bill_is_what_was_served_and_what_metrics_say(version, api, session, sidecar_with_state):
    served, wrapper = api(SCRIPT), sidecar_with_state
    cli = session(served, sidecar=wrapper)
    cli.ask("one")
    told = wrapper.status()["sessions"][0]
    cli.ask("two")
    before = wrapper.metrics()
    cli.process.stdin.close()
    harness.wait_for("end", lambda: "process_exited" in wrapper.ledger_file.read_text())
    after = wrapper.metrics()
    assert cli.process.wait(60) == 0
    rows = billed(wrapper.ledger_file)
    spend = sum(Decimal(row["BilledCost"]) for row in rows if row["ServiceCategory"] != "Compute")
    compute = sum(Decimal(row["BilledCost"]) for row in rows if row["ServiceCategory"] == "Compute")
    assert float(spend) == pytest.approx(served.cost_usd(version), abs=1e-12)
    total = lambda metrics, name: sum(value for key, value in metrics.items() if key.split("{")[0] == name)
    assert float(spend) == total(after, "claude_agent_cost_usd_total")
    assert float(compute) == total(after, "claude_agent_container_cost_usd_total") > 0
    assert total(before, "claude_agent_container_cost_usd_total") <= float(compute)
    totals = replayed(wrapper.ledger_file)
    assert (totals["cost_usd"], totals["container"]["cost_usd"]) == (spend, compute)
    # Beside the spend, in the same units as everywhere.
    assert told["cost_usd"] < float(spend) and told.get("container", {}).get("cost_usd", 0) <= float(compute)
    assert {row["ResourceId"] for row in rows} == {told["session_id"]}
    kinds = {row["x_TokenType"]: int(row["ConsumedQuantity"]) for row in rows if row["x_TokenType"]}
    [tokens] = served.tokens().values()
    assert kinds == {kind: n for kind, n in tokens.items() if n and kind != "web_search_requests"}
    assert all(row["x_CostEstimated"] == "false" for row in rows)


def test_who_is_killed_has_paid_for_the_time_it_booked(version, api, session, sidecar, tmp_path):
    served, wrapper = api(SCRIPT), sidecar("--container-usd-per-hour", "3600")
    cli = session(served, sidecar=wrapper)
    cli.ask("one")
    harness.wait_for("booked time", lambda: '"container_used"' in wrapper.ledger_file.read_text())
    harness.wait_for("booked spend", lambda: float(replayed(wrapper.ledger_file)["cost_usd"]) == pytest.approx(served.cost_usd(version), abs=1e-12))
    session_id = wrapper.status()["sessions"][0]["session_id"]
    # What is not in the transcript yet cannot be resumed.
    harness.wait_for("the transcript", lambda: harness.written(tmp_path / "home", "one", session=session_id))
    os.kill(cli.process.pid, 9)
    cli.process.wait(30)
    # In another container it goes on, with a ledger of its own; one bill has both, and each line once.
    second = harness.Sidecar(wrapper.ledger_file.parent / "second", "--container-usd-per-hour", "3600")
    again = session(served, "--resume", session_id, sidecar=second)
    again.ask("two")
    assert again.close() == 0
    files = [wrapper.ledger_file, second.ledger_file]
    rows = billed(*files, *files)
    compute = [row for row in rows if row["ServiceCategory"] == "Compute"]
    booked = [line for file in files for line in map(json.loads, file.read_text().splitlines()) if line["event"] == "container_used"]
    assert len(compute) == 1 and compute[0]["ResourceId"] == session_id and compute[0]["ListUnitPrice"] == "3600"
    # A line has a float, the bill whole picodollars.
    assert Decimal(compute[0]["BilledCost"]) == sum(round(Decimal(str(line["cost_usd"])), 12) for line in booked) > 0
    assert Decimal(compute[0]["ConsumedQuantity"]) == sum(round(Decimal(str(line["seconds"])), 12) for line in booked)
    spend = sum(Decimal(row["BilledCost"]) for row in rows if row["ServiceCategory"] != "Compute")
    assert float(spend) == pytest.approx(served.cost_usd(version), abs=1e-12)
    assert spend == replayed(*files)["cost_usd"]


@pytest.fixture
def sidecar_with_state(sidecar):
    return sidecar("--linger", "20s")
