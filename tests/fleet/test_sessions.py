"""Sessions on a real daemon with the real CLI: created by a request, watched by the sidecar's word, and gone without a trace."""

from __future__ import annotations

import contextlib
import copy
import http.client
import json
import os
import random
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import engine
import harness
import pytest
from conftest import LEFT_OUT, NETWORK, ROOT
from harness import wait_for

BINARY = Path(os.environ.get("AGENT_FLEET_BIN") or ROOT / "target/x86_64-unknown-linux-gnu/debug/agent-fleet")
TOKENS = {name: f"{name}-{'0123456789abcdef' * 2}" for name in ("shop", "other")}
USAGE = {"input_tokens": 11, "output_tokens": 130, "cache_read_input_tokens": 5000}
BASH = {"tool": "Bash", "input": {"command": "echo 1", "description": "a step"}}
SCRIPT = {
    "defaults": {"usage": USAGE},
    "rules": [{"when": {"agent": "main", "results": 0}, "reply": {"blocks": [BASH]}}],
    "otherwise": {"blocks": ["done"]},
}
CLI = ["claude", "-p", "Say hello", "--output-format", "stream-json", "--verbose", "--allowedTools", "Bash"]
# As long as a busy machine may take for a container and a CLI.
PATIENCE = 120


class Fleet:
    """`agent-fleet serve`, with a configuration that a test adds to."""

    def __init__(self, directory: Path, api: harness.Api, more: str = "", shop: str = ""):
        self.directory, self.port = directory, harness.free_port()
        self.process: subprocess.Popen | None = None
        for name, token in TOKENS.items():
            (directory / name).write_text(token)
            (directory / name).chmod(0o600)
        callers = "".join(f'[callers.{name}]\ntoken = {{ file = "{directory / name}" }}\ntenants = ["{name}"]\n' for name in TOKENS)
        environment = {
            "ANTHROPIC_BASE_URL": api.url,
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "DISABLE_AUTOUPDATER": "1",
            "LISTEN": "0.0.0.0",
        }
        self.env = "{ " + ", ".join(f'{name} = "{value}"' for name, value in environment.items()) + " }"
        self.file = directory / "fleet.toml"
        # Tests that go on side by side are fleets of one daemon, and their directories may differ in the worker's alone.
        worker = os.environ.get("PYTEST_XDIST_WORKER", "test")
        self.name = f"{worker}-{directory.name.replace('_', '-')}"[:40]
        self.file.write_text(
            f'[fleet]\nname = "{self.name}"\nlisten = "127.0.0.1:{self.port}"\nstore = "sqlite:{directory}/fleet.db"\n{callers}'
            f'[providers.local]\nkind = "docker"\nsocket = "{os.environ["DOCKER_HOST"]}"\nnetwork = "{NETWORK}"\nreach = "container"\n{more}'
            f"[tenants.shop]\n{shop}\n[tenants.other]\n"
        )

    def template(self, name: str, pattern: str, command: list[str], **more: object) -> None:
        lines = {"pattern": pattern, "provider": "local", "image": engine.WRAPPED, "command": command, "ttl": "10m", **more}
        text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in lines.items())
        secrets = 'secrets = { ANTHROPIC_API_KEY = { env = "TEST_KEY" } }\n'
        with self.file.open("a") as file:
            file.write(f"[templates.{name}]\nenv = {self.env}\n{secrets}{text}")

    def start(self) -> Fleet:
        environment = {**os.environ, "TEST_KEY": "sk-ant-test-of-the-fleet"}
        log = (self.directory / "log").open("ab")
        self.process = subprocess.Popen([BINARY, "serve", "--config", self.file], stdin=subprocess.DEVNULL, stderr=log, env=environment)
        wait_for("the fleet", lambda: self.process.poll() is not None or self.get("/readyz")[0] == 200, PATIENCE)
        assert self.process.poll() is None, (self.directory / "log").read_text()
        return self

    def get(self, path: str, method: str = "GET", body: dict | None = None, who: str | None = "shop") -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        headers = {"Authorization": f"Bearer {TOKENS[who]}"} if who else {}
        try:
            connection.request(method, path, json.dumps(body) if body else None, {**headers, "Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        except (OSError, http.client.HTTPException):
            return 0, ""
        finally:
            connection.close()

    def create(self, template: str, name: str) -> dict:
        status, body = self.get("/v1/sessions", "POST", {"template": template, "id": name})
        assert status in (200, 201), body
        return json.loads(body)

    def show(self, name: str) -> dict:
        status, body = self.get(f"/v1/sessions/{name}")
        assert status == 200, body
        return json.loads(body)

    def reaches(self, name: str, *phases: str, so: Callable[[], bool] = lambda: True) -> dict:
        """As it was seen there; `so` is asked at the same time: a wish of before may wake who sleeps once more."""
        seen: dict = {}

        def there() -> bool:
            seen.update(self.show(name))
            wrong = seen["phase"] in ("failed", "destroyed") and seen["phase"] not in phases
            assert not wrong, f"{seen}\n{(self.directory / 'log').read_text()}"
            return seen["phase"] in phases and so()

        wait_for(f"{name} to be {phases}", there, PATIENCE)
        return seen

    def wake(self, name: str) -> int:
        return self.get(f"/v1/sessions/{name}/resume", "POST")[0]

    def knows_what_was_served(self, name: str, api: harness.Api) -> None:
        """Its app has an answer before its sidecar has counted it; and one that sleeps by then says so when it is awake."""

        def said() -> bool:
            session = self.show(name)
            known = session["agent_usd"] == pytest.approx(api.cost_usd(), abs=1e-9)
            if not known and session["phase"] in ("pausing", "paused"):
                self.wake(name)
            return known

        wait_for(f"what {name} has cost", said, PATIENCE)

    def containers(self) -> list[str]:
        words = ["ps", "--all", "--quiet", "--filter", f"label=agent-fleet.fleet={self.name}"]
        return engine.docker(*words).stdout.split()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(60)

    def close(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(60)
        for container in self.containers():
            # One may be on its way already.
            engine.docker("rm", "--force", container, check=False)


@pytest.fixture
def api(tmp_path: Path):
    if LEFT_OUT:
        pytest.skip("AGENT_SIDECAR_TESTS_NO_DOCKER=1")
    # Where containers reach it.
    gateway = engine.docker("network", "inspect", "--format", "{{(index .IPAM.Config 0).Gateway}}", NETWORK).stdout.strip()
    one = harness.Api(SCRIPT, tmp_path / "api", gateway)
    yield one
    one.close()


@pytest.fixture
def fleet(tmp_path: Path, api: harness.Api):
    made = []

    def make(*more: str) -> Fleet:
        made.append(Fleet(tmp_path, api, *more))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_a_task_is_done_once_billed_to_the_cent_and_leaves_nothing(fleet, api, tmp_path):
    one = fleet()
    # It stays until its last figures were read.
    one.template("task", "ephemeral", ["agent-sidecar", "run", "--linger", "20s", "--", *CLI])
    one.start()
    assert one.get("/v1/sessions", who=None)[0] == 401
    created = one.create("task", "first")
    assert one.create("task", "first")["id"] == created["id"]
    over = one.reaches("first", "destroyed")
    assert len(api.requests()) == 2, "the same id twice is one container"
    assert over["agent_usd"] == pytest.approx(api.cost_usd(), abs=1e-9) and over["agent_usd"] > 0
    assert over["container_usd"] > 0 and over["reason"] is None or "exit code" not in over["reason"]
    assert one.containers() == []
    # Another caller has no such session; the key is in none of what is kept or said.
    assert one.get("/v1/sessions/first", who="other")[0] == 404
    # It is counted just after it is kept.
    counted = 'agent_fleet_phases_entered_total{phase="destroyed",provider="local"} 1\n'
    wait_for("its end to be counted", lambda: counted in one.get("/metrics", who=None)[1], PATIENCE)
    for path in [tmp_path / "fleet.db", tmp_path / "fleet.db-wal", tmp_path / "log"]:
        assert not path.exists() or b"sk-ant-test-of-the-fleet" not in path.read_bytes(), path


def test_a_fleet_that_is_killed_goes_on_where_it_was(fleet, api):
    one = fleet()
    one.template("stays", "long-running", ["agent-sidecar", "hub"], stop_grace="5s")
    one.start()
    for n in range(3):
        one.create("stays", f"s{n}")
    # In the middle of making them.
    wait_for("a container", lambda: one.containers() != [], PATIENCE)
    one.kill()
    one.start()
    ready = [one.reaches(f"s{n}", "ready", "idle") for n in range(3)]
    assert sorted(session["container"] for session in ready) == sorted(
        engine.docker("inspect", "--format", "{{.Id}}", *one.containers()).stdout.split()
    )
    assert [session["generation"] for session in ready] == [1, 1, 1]
    # Somebody else takes one away: that is noticed. The others are ended.
    engine.docker("rm", "--force", ready[0]["container"])
    failed = one.reaches("s0", "failed")
    assert "its container has ended" in failed["reason"]
    one.kill()
    one.start()
    for n in (1, 2):
        assert one.get(f"/v1/sessions/s{n}", "DELETE")[0] == 202
    for n in (1, 2):
        one.reaches(f"s{n}", "destroyed")
    assert one.containers() == []


@pytest.fixture
def postgres():
    """The URL of one that is there as long as the test."""
    beside = Path(__file__).with_name("postgres")
    # As long as nobody has closed what it reads.
    words = [beside, "sh", "-c", 'echo "$AGENT_FLEET_TEST_POSTGRES"; exec cat']
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        url = server.stdout.readline().strip()
        assert url.startswith("postgres://"), url
        yield url
        server.stdin.close()


def test_of_two_fleets_one_is_killed_again_and_again_and_nothing_is_made_twice(fleet, api, postgres, tmp_path, monkeypatch):
    monkeypatch.setenv("TEST_STORE", postgres)
    fleets = [fleet(), None]
    fleets[0].template("stays", "long-running", ["agent-sidecar", "hub"], stop_grace="2s")
    text = fleets[0].file.read_text().replace(f'store = "sqlite:{tmp_path}/fleet.db"', 'store = { env = "TEST_STORE" }')
    assert "TEST_STORE" in text
    fleets[0].file.write_text(text)
    fleets[1] = copy.copy(fleets[0])
    fleets[1].port, fleets[1].file = harness.free_port(), tmp_path / "second.toml"
    fleets[1].file.write_text(text.replace(f":{fleets[0].port}", f":{fleets[1].port}"))
    chance = random.Random(11)

    def dies() -> None:
        """In the middle of whatever it does."""
        one = chance.choice(fleets)
        time.sleep(chance.random())
        one.kill()
        one.start()

    try:
        for one in fleets:
            one.start()
        names = [f"s{n}" for n in range(10)]
        for n, name in enumerate(names):
            # Whom its fleet has answered to is kept, whichever that was.
            fleets[n % 2].create("stays", name)
            if n % 2:
                dies()
        ready = [chance.choice(fleets).reaches(name, "ready", "idle") for name in names]
        made = engine.docker("inspect", "--format", "{{.Id}}", *fleets[0].containers()).stdout.split()
        assert sorted(session["container"] for session in ready) == sorted(made), "each has one, and nobody has another"
        assert [session["generation"] for session in ready] == [1] * len(names)
        for n, name in enumerate(names):
            assert fleets[n % 2].get(f"/v1/sessions/{name}", "DELETE")[0] == 202
            if n % 3 == 2:
                dies()
        for name in names:
            chance.choice(fleets).reaches(name, "destroyed")
        assert fleets[0].containers() == []
    finally:
        fleets[1].close()


def test_an_agent_that_is_idle_is_put_to_sleep_and_goes_on_when_it_is_woken(fleet, api):
    one = fleet()
    app = "agent-sidecar hub & exec python3 /app/service.py"
    one.template("chat", "hybrid", ["sh", "-c", app], idle_after="3s", max_age="10m", ports=[8080], stop_grace="10s")
    one.start()
    one.create("chat", "talk")
    up = one.reaches("talk", "ready", "active", "idle", "pausing", "paused")
    address = engine.docker("inspect", "--format", f"{{{{.NetworkSettings.Networks.{NETWORK}.IPAddress}}}}", up["container"]).stdout.strip()

    def say(text: str) -> dict:
        """Past the fleet, which may put it to sleep before it hears of it: who waits for an answer wakes it."""
        answered = threading.Event()

        def wake() -> None:
            while not answered.wait(0.5):
                one.wake("talk")

        waking = threading.Thread(target=wake)
        waking.start()
        try:
            connection = http.client.HTTPConnection(address, 8080, timeout=PATIENCE)
            connection.request("POST", "/me", text)
            return json.loads(connection.getresponse().read())
        finally:
            answered.set()
            waking.join()

    # The sidecar is there before the app is: it may have been put to sleep before that.
    def listens() -> bool:
        one.wake("talk")
        with contextlib.suppress(OSError), socket.create_connection((address, 8080), timeout=1):
            return True
        return False

    wait_for("the app", listens, PATIENCE)
    first = say("hello")
    assert first["subtype"] == "success", first
    one.knows_what_was_served("talk", api)
    paused = one.reaches("talk", "paused", so=lambda: engine.docker("inspect", "--format", "{{.State.Paused}}", up["container"]).stdout.strip() == "true")
    assert paused["agent_usd"] == pytest.approx(api.cost_usd(), abs=1e-9)
    assert one.wake("talk") == 202
    one.reaches("talk", "ready", "active", "idle")
    # The same container, and the same conversation.
    again = say("and again")
    assert (again["session_id"], again["turns"] > 0) == (first["session_id"], True)
    one.knows_what_was_served("talk", api)
    one.reaches("talk", "paused")
    assert one.get("/v1/sessions/talk", "DELETE")[0] == 202
    over = one.reaches("talk", "destroyed")
    assert over["agent_usd"] == pytest.approx(api.cost_usd(), abs=1e-9)
    assert one.containers() == []


def test_the_command_line_asks_and_says_no_clearly(fleet, api, tmp_path):
    hook = tmp_path / "hook"
    hook.write_text('#!/bin/sh\nif [ "$AGENT_FLEET_SESSION" = refused ]; then echo not today; exit 10; fi\n')
    hook.chmod(0o755)
    more = f'[[hooks]]\nname = "gate"\non = ["requested"]\ncommand = ["{hook}"]\ntimeout = "30s"\n'
    one = fleet(more, "max_sessions = 1")
    one.template("stays", "long-running", ["agent-sidecar", "hub"], stop_grace="5s")

    def run(*words: str, code: int = 0) -> str:
        environment = {**os.environ, "TEST_KEY": "sk-ant-test-of-the-fleet", "AGENT_FLEET_URL": f"http://127.0.0.1:{one.port}"}
        environment["AGENT_FLEET_TOKEN"] = TOKENS["shop"]
        done = subprocess.run([BINARY, *words], capture_output=True, text=True, env=environment, timeout=PATIENCE * 2)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    assert "no mistake" in run("check", "--config", str(one.file))
    planned = run("plan", "--config", str(one.file))
    assert "gate" in planned and "USD an hour" in planned
    assert one.containers() == []
    assert "cannot be reached" in run("list", code=1) or "refused" in run("list", code=1)
    one.start()
    refused = json.loads(run("create", "stays", "--id", "refused", "--wait", code=1))
    assert (refused["phase"], refused["reason"], refused["container"]) == ("failed", "hook `gate`: not today", None)
    assert json.loads(run("create", "stays", "--id", "one", "--wait"))["phase"] in ("ready", "idle")
    assert "has 1 sessions" in run("create", "stays", "--id", "two", code=1)
    assert "there is no template `nothing`" in run("create", "nothing", code=1)
    assert "one" in run("list") and "refused" not in run("list") and "refused" in run("list", "--over")
    assert "serving" in run("logs", "one") or run("logs", "one") is not None
    assert "gate" in run("hooks", "one")
    assert json.loads(run("destroy", "one", "--wait"))["phase"] == "destroyed"
    assert "no session `one-more`" in run("show", "one-more", code=1)
