"""A real Prometheus scrapes a live session, and then says what it cost."""

from __future__ import annotations

import json
import shutil
import subprocess
import urllib.error
import urllib.parse
import urllib.request

import harness
import pytest

USAGE = {"input_tokens": 11, "output_tokens": 130, "cache_read_input_tokens": 5000}
# A turn of about a second, so that several scrapes fall into it.
PACE = {"chunk": 4, "chunk_delay_ms": 40}
TEXT = "a hundred characters that come slowly, so that the scraper sees the counters move while they do so."
STEP = {"tool": "Bash", "input": {"command": "echo a step", "description": "a step"}}
SCRIPT = {
    "defaults": {"usage": USAGE, "pace": PACE},
    "rules": [{"when": {"agent": "main", "results": 0}, "reply": {"blocks": [TEXT, STEP]}}],
    "otherwise": {"blocks": ["done"]},
}
# `sum` alone would miss a session that is over: its series are stale as soon as a scrape fails.
COST = "sum(last_over_time(claude_agent_cost_usd_total[5m]))"


class Prometheus:
    def __init__(self, directory, target: int = 0, targets: list[dict] | None = None):
        self.port = harness.free_port()
        config = directory / "prometheus.yml"
        scrape = {"job_name": "agent", "scrape_interval": "1s", "static_configs": targets or [{"targets": [f"127.0.0.1:{target}"]}]}
        config.write_text(json.dumps({"scrape_configs": [scrape]}))  # JSON is YAML.
        flags = [f"--config.file={config}", f"--storage.tsdb.path={directory / 'tsdb'}", f"--web.listen-address=127.0.0.1:{self.port}"]
        self.log = (directory / "prometheus.log").open("wb")
        self.process = subprocess.Popen(["prometheus", *flags], stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)

    def query(self, expression: str) -> list[dict]:
        url = f"http://127.0.0.1:{self.port}/api/v1/query?" + urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(url, timeout=30) as answer:
            return json.load(answer)["data"]["result"]

    def value(self, expression: str) -> float | None:
        found = self.query(expression)
        return float(found[0]["value"][1]) if found else None

    def up(self) -> bool:
        try:
            return self.value("up") == 1
        except urllib.error.URLError:
            return False  # Not listening, or still replaying its log.

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(60)
        self.log.close()


@pytest.fixture
def prometheus(tmp_path):
    for tool in ["prometheus", "promtool"]:
        assert shutil.which(tool), f"no {tool}; run tests/install"
    started = []

    def start(target: int) -> Prometheus:
        started.append(Prometheus(tmp_path, target))
        return started[-1]

    yield start
    for one in started:
        one.close()


def lint(exposition: str) -> tuple[int, str]:
    checked = subprocess.run(["promtool", "check", "metrics"], input=exposition, capture_output=True, text=True, timeout=60)
    return checked.returncode, checked.stdout + checked.stderr


def test_prometheus_says_what_was_served(version, api, session, sidecar, prometheus):
    served, wrapper = api(SCRIPT), sidecar("--linger", "2m", "--platform-grace", "5m")
    cli = session(served, "--allowedTools", "Bash", sidecar=wrapper)
    scraper = prometheus(wrapper.port)
    harness.wait_for("first scrape", scraper.up)
    cost = lambda: pytest.approx(served.cost_usd(version), abs=1e-9)
    seen = []
    for turn in range(3):
        cli.ask(f"turn {turn}")
        harness.wait_for("a scrape", lambda: scraper.value(COST) == cost())
        seen.append(scraper.value(COST))
        assert lint(wrapper.get("/metrics")) == (0, "")
    assert seen == sorted(set(seen)), "rises with every turn"

    # The last turn ends with the session, which stays until it was scraped once more, and far shorter than it would unread.
    cli.ask("and out")
    assert cli.close(timeout=60) == 0
    harness.wait_for("end of the wrapped session", lambda: scraper.value("up") == 0)
    assert scraper.value(COST) == cost()
    assert len(served.requests()) == 8
    assert scraper.value("sum(last_over_time(claude_agent_turns_total[5m]))") == 4
