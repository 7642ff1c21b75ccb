"""What `make demo STACK=1` starts runs with nothing but a PATH, has data and rules, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import urllib.request
from pathlib import Path

import test_alerts as alerts
from stage import harness

STACK = Path(__file__).resolve().parents[1] / "stack"


def get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=60) as answer:
        return answer.read()


def test_the_stack_runs_and_ends(tmp_path):
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path / "none"), "TMPDIR": str(tmp_path)}
    done = subprocess.run([STACK, "start", harness.cli("new"), alerts.binary()], env=env, capture_output=True, text=True, timeout=300)
    place = next(tmp_path.glob("agent-sidecar-stack-*"))
    try:
        assert done.returncode == 0, done.stdout + done.stderr
        server = re.search(r"name (http://127\.0\.0\.1:\d+) as", done.stdout)[1]
        page = re.search(r"agents\s+(\S+)", done.stdout)[1]
        assert f"tests/stack stop {place}" in done.stdout
        # Whoever clicks sees something.
        alerts_page, graph = (get(url).decode() for url in re.findall(r"(http://\S+/(?:alerts|graph)\S*)", done.stdout))
        assert "AgentSidecarBlind" in alerts_page or 'id="root"' in alerts_page and "<title>Prometheus" in graph
        groups = json.loads(get(f"{server}/api/v1/rules"))["data"]["groups"]
        assert sum(rule["type"] == "alerting" for group in groups for rule in group["rules"]) == len(alerts.AGENTS)
        assert b"claude_agent_cost_usd_total" in get(f"{page}metrics") and b"sessions" in get(f"{page}status")
        (cost,) = json.loads(get(f"{server}/api/v1/query?query=sum(claude_agent_cost_usd_total)"))["data"]["result"]
        assert float(cost["value"][1]) > 0
    finally:
        pid = int((place / "pid").read_text())
        subprocess.run([STACK, "stop", place], env=env, check=True, timeout=300)
    assert not place.exists() and not Path(f"/proc/{pid}").exists()
    left = lambda: [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(place).encode() in read(path)]  # noqa: E731
    # Who is killed is gone a moment later.
    harness.wait_for("the end of all", lambda: left() == [], 60)


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""  # It has ended.
