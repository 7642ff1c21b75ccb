"""The fleet's alerts on the running thing: what can be had within a minute, with time compressed as for the agents' (compress.py)."""

from __future__ import annotations

import itertools
import json
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path

import compress
import harness
import outside
import pytest
import yaml
from test_alerts import ALERTS, FLEET_RULES, binary

SHIPPED = yaml.safe_load((ALERTS / "agent-fleet.rules.yaml").read_text())
# Of each: the fault. The others take longer than a test may: they are tried on made-up series alone.
FAULTS = {
    "AgentFleetProviderFailing": "the daemon answers 500 to whatever changes something",
    "AgentFleetSessionsFail": "the command of one session after the other ends with 1",
    "AgentFleetStrangeContainers": "a container of this fleet's name is older than its store",
    "AgentFleetHookDeadLetters": "a hook ends with 1, and is not tried again",
    "AgentFleetBudgetNearlyUsed": "a session's container may cost more than nine tenths of a day's budget",
    "AgentFleetRequestsRefused": "and the next one is refused",
    "AgentFleetStalled": "the fleet is killed, and its last word is of two minutes ago",
}
PATIENCE = 240


class Watch:
    """A Prometheus with the compressed rules."""

    def __init__(self, directory: Path, targets: list[int]):
        self.port = outside.free_port()
        rules, config = directory / "rules.yaml", directory / "prometheus.yml"
        rules.write_text(yaml.safe_dump(compress.rules(SHIPPED)))
        scrape = {"job_name": "fleet", "static_configs": [{"targets": [f"127.0.0.1:{port}" for port in targets]}]}
        every = {"scrape_interval": "1s", "evaluation_interval": "500ms"}
        config.write_text(yaml.safe_dump({"global": every, "rule_files": [str(rules)], "scrape_configs": [scrape]}))
        flags = [f"--config.file={config}", f"--storage.tsdb.path={directory / 'tsdb'}", f"--web.listen-address=127.0.0.1:{self.port}"]
        with (directory / "prometheus.log").open("wb") as log:
            self.process = subprocess.Popen(["prometheus", *flags], stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def query(self, expression: str, **at: float) -> list[dict]:
        """As soon as it answers: nothing is no answer."""
        url = f"http://127.0.0.1:{self.port}/api/v1/query?" + urllib.parse.urlencode({"query": expression, **at})
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                with urllib.request.urlopen(url, timeout=20) as answer:
                    return json.load(answer)["data"]["result"]
            except OSError:
                assert self.process.poll() is None and time.monotonic() < deadline, "Prometheus does not answer"
                time.sleep(0.2)

    def ever_fired(self) -> set[str]:
        return {one["metric"]["alertname"] for one in self.query('max by (alertname) (max_over_time(ALERTS{alertstate="firing"}[1h]))')}

    def fires(self, alert: str, again: Callable[[], object] = lambda: None) -> None:
        """What came too seldom for a window, on a machine that is late, comes again until it has."""
        deadline = time.monotonic() + PATIENCE
        while alert not in self.ever_fired():
            assert time.monotonic() < deadline, f"{alert} did not fire: {FAULTS[alert]}"
            again()
            time.sleep(0.5)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(60)


@pytest.fixture
def watched(tmp_path):
    fleet = outside.Outside(tmp_path / "fleet", binary())
    watch = None
    try:
        watch = Watch(tmp_path, [fleet.port])
        yield fleet, watch
    finally:
        fleet.close()
        if watch:
            watch.close()


def test_what_is_caused_is_told_of_and_not_before(watched):
    fleet, watch = watched
    fleet.start()
    fleet.wait_for("a scrape", lambda: watch.query("agent_fleet_reconciles_total > 0"))
    # One that is well, to its end.
    (fleet.directory / "heard").touch()
    assert fleet.create("task", "well") == 201
    fleet.reaches("well", "destroyed")
    assert watch.ever_fired() == set()

    (fleet.directory / "heard").unlink()
    assert fleet.create("task", "unheard") == 201
    watch.fires("AgentFleetHookDeadLetters")
    # A container's hour is more than nine tenths of what it has.
    assert (fleet.create("stays", "dear", "poor"), fleet.create("stays", "dearer", "poor")) == (201, 429)
    watch.fires("AgentFleetBudgetNearlyUsed")
    watch.fires("AgentFleetRequestsRefused")
    # Where there is room for one more.
    new = itertools.count()
    watch.fires("AgentFleetSessionsFail", lambda: fleet.create("breaks", f"breaks-{next(new)}"))
    assert "AgentFleetProviderFailing" not in watch.ever_fired()
    fleet.daemon.broken = True
    # Each is tried ever later; ten minutes are seconds here, and so there is always a new one.
    watch.fires("AgentFleetProviderFailing", lambda: fleet.create("hurries", f"in-vain-{next(new)}", "crowd"))
    fleet.daemon.broken = False
    assert watch.ever_fired() == set(FAULTS) - {"AgentFleetStrangeContainers", "AgentFleetStalled"}


def test_a_container_that_is_older_than_the_store_is_told_of_and_left(watched):
    fleet, watch = watched
    labels = {"agent-fleet.fleet": fleet.name, "agent-fleet.session": "old", "agent-fleet.key": "agent-old-1"}
    fleet.daemon.asked("POST", "/containers/create", {"name": "agent-old-1"}, {"Labels": labels, "Entrypoint": ["true"]})
    next(iter(fleet.daemon.containers.values())).created -= 3600
    fleet.start()
    watch.fires("AgentFleetStrangeContainers")
    assert [one.name for one in fleet.daemon.containers.values()] == ["agent-old-1"]
    # As if two minutes had gone by since it was last heard of: the rule's own figure is not compressed.
    fleet.process.kill()
    fleet.process.wait(60)
    stalled = next(rule["expr"] for rule in FLEET_RULES if rule["alert"] == "AgentFleetStalled")
    # Nothing of it is on its way any more.
    harness.wait_for("its end to be seen", lambda: bool(watch.query("up == 0")), PATIENCE)
    now = time.time()
    said = watch.query("max(last_over_time(agent_fleet_claimed_timestamp_seconds[1h]))")
    at = float(said[0]["value"][1])
    sooner = stalled.replace("> 120", f"> {now + 3 - at}")
    assert sooner != stalled and watch.query(sooner, time=now) == []
    harness.wait_for("its silence to be seen", lambda: bool(watch.query(sooner)), PATIENCE)


def test_every_fault_is_of_an_alert():
    assert set(FAULTS) <= {rule["alert"] for rule in FLEET_RULES}
