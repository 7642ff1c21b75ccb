"""A fleet with something in it, where there are no containers: `agent-fleet serve` on the daemon of daemon.py, with real sidecars whose agent says again what a real one has said."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

from daemon import Daemon
from harness import free_port

ROOT = Path(__file__).resolve().parents[2]
# The largest of what is replayed: it costs something.
RECORDING = ROOT / "sidecar/core/tests/data/05a_subagent.jsonl"
TOKENS = {name: f"{name}-{'0123456789abcdef' * 2}" for name in ("ops", "shop", "poor", "crowd")}
PATIENCE = 120


def binary() -> Path:
    named = os.environ.get("AGENT_FLEET_BIN")
    return Path(named) if named else next(path for path in [*ROOT.glob("target/*-linux-*/debug/agent-fleet"), ROOT / "target/debug/agent-fleet"] if path.is_file())


class Outside:
    """`shop` may have three sessions and 20 USD a day, `poor` one container's hour, `crowd` as many as it likes; `ops` reaches all."""

    def __init__(self, directory: Path, sidecar: Path, port: int | None = None, name: str = "outside", collector: str = ""):
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self.port, self.name = directory, port or free_port(), name
        self.url, self.daemon, self.process = f"http://127.0.0.1:{self.port}", Daemon(directory / "daemon"), None
        for who, token in TOKENS.items():
            (directory / who).write_text(token)
            (directory / who).chmod(0o600)
        agent = directory / "claude"
        agent.write_text(f"#!/bin/sh\ncat {shlex.quote(str(RECORDING))}\nexec sleep ${{STAYS:-0}}\n")
        agent.chmod(0o755)
        traced = ["--otlp-endpoint", collector] if collector else []
        cli = ["--", str(agent), "-p", "--output-format", "stream-json", "--verbose"]
        # Whose work is done waits for the fleet, which looks every five seconds; who is told to end has no more than its grace.
        work, stays = ([str(sidecar), "run", "--hub", "off", "--linger", linger, *traced, *cli] for linger in ("20s", "3s"))
        template = '[templates.{0}]\nprovider = "local"\nimage = "i"\nports = [9477]\nttl = "1h"\n{1}\n'
        templates = {
            "task": f'pattern = "ephemeral"\ncommand = {json.dumps(work)}',
            # Where the daemon is broken it is not waited for.
            "hurries": f'pattern = "ephemeral"\nready_within = "4s"\ncommand = {json.dumps(work)}',
            "stays": f'pattern = "long-running"\nstop_grace = "5s"\ncommand = {json.dumps(stays)}\nenv = {{ STAYS = "600" }}',
            "breaks": 'pattern = "ephemeral"\ncommand = ["false"]',
        }
        self.file = directory / "fleet.toml"
        self.file.write_text(
            f'[fleet]\nname = "{name}"\nlisten = "127.0.0.1:{self.port}"\nstore = "sqlite:{directory}/fleet.db"\n'
            + (f'otlp_endpoint = "{collector}"\n' if collector else "") +
            f'[callers.ops]\ntoken = {{ file = "{directory}/ops" }}\ntenants = ["*"]\nadmin = true\n'
            f'[callers.shop]\ntoken = {{ file = "{directory}/shop" }}\ntenants = ["shop"]\n'
            f'[callers.poor]\ntoken = {{ file = "{directory}/poor" }}\ntenants = ["poor"]\n'
            f'[callers.crowd]\ntoken = {{ file = "{directory}/crowd" }}\ntenants = ["crowd"]\n'
            '[tenants.shop]\nbudget_usd_per_day = 20\nmax_sessions = 3\n[tenants.poor]\nbudget_usd_per_day = 0.037\n[tenants.crowd]\n'
            f'[providers.local]\nkind = "docker"\nsocket = "{self.daemon.url}"\nreach = "container"\n'
            '[[hooks]]\nname = "tell"\non = ["ready"]\ntemplates = ["task"]\ncommand = ["/bin/sh", "-c", "cat >/dev/null; test -e '
            f'{directory}/heard"]\nrequired = false\nretries = 0\ntimeout = "10s"\n'
            + "".join(template.format(*one) for one in templates.items())
        )  # fmt: skip

    def start(self) -> Outside:
        with (self.directory / "fleet.log").open("ab") as log:
            self.process = subprocess.Popen([binary(), "serve", "--config", self.file], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.wait_for("the fleet", lambda: self.ask("/readyz")[0] == 200)
        return self

    def environment(self, who: str = "ops") -> dict[str, str]:
        return {"AGENT_FLEET_URL": self.url, "AGENT_FLEET_TOKEN": TOKENS[who], "FLEET": self.url}

    def ask(self, path: str, method: str = "GET", body: dict | None = None, who: str = "ops") -> tuple[int, str]:
        data = json.dumps(body).encode() if body is not None else None
        headers = {"Authorization": f"Bearer {TOKENS[who]}", "Content-Type": "application/json"}
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, data, headers, method=method), timeout=30) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def create(self, template: str, name: str, who: str = "shop") -> int:
        return self.ask("/v1/sessions", "POST", {"template": template, "id": name}, who)[0]

    def phase(self, name: str) -> str:
        status, said = self.ask(f"/v1/sessions/{name}")
        return json.loads(said)["phase"] if status == 200 else ""

    def reaches(self, name: str, *phases: str) -> None:
        self.wait_for(f"{name} to be {phases}", lambda: self.phase(name) in phases)

    def wait_for(self, what: str, so) -> None:
        deadline = time.monotonic() + PATIENCE
        while not so():
            assert self.process is None or self.process.poll() is None, f"the fleet has ended; see {self.directory}/fleet.log"
            assert time.monotonic() < deadline, f"waited in vain for {what}; see {self.directory}"
            time.sleep(0.2)

    def close(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(60)
        self.daemon.close()
