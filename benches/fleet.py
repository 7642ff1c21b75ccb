"""The fleet's figures, for `benches/run`: with the real CLI on a dockerd of its own, and its own benches on one core."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHON = ROOT / ".cache/venv/bin/python"
FOUND = sorted(ROOT.glob("target/*-linux-*/release/agent-fleet")) + [ROOT / "target/release/agent-fleet"]
os.environ.setdefault("AGENT_FLEET_BIN", str(next((path for path in FOUND if path.exists()), FOUND[-1])))
ROUNDS = 15
# What each container may have, whoever makes it: the fleet's own size.
SIZE = ["--cpus", "1", "--memory", "1g", "--memory-swap", "1g", "--pids-limit", "1024"]
RIGHTS = ["--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--log-driver", "local"]
CLAUDE = ["claude", "--include-partial-messages"]
SERVE = ["agent-sidecar", "serve", "--serve-listen", "0.0.0.0:8000", "--", *CLAUDE]
SAY = ["-p", "hello", "--output-format", "stream-json", "--verbose"]
TOKEN = "content_block_delta"
APP_TOKEN = "app-" + "0123456789abcdef" * 2


def first_token(directory: Path) -> None:
    """From the request, or the command, to the first token of the real CLI in a container: four ways in turn."""
    if os.environ.get("ON_LOOPBACK") != "1":
        # The real CLI must reach nothing but our API.
        run = [ROOT / "tests/loopback", PYTHON if PYTHON.exists() else sys.executable, ROOT / "benches/run", "first_token"]
        subprocess.run(run, check=True, env=os.environ | {"ON_LOOPBACK": "1"})
        return
    sys.path.insert(0, str(ROOT / "tests/fleet"))
    # Before another suite's: what is imported next looks there first.
    import conftest  # noqa: F401, I001
    import engine

    with contextlib.ExitStack() as end:
        daemon = engine.Dockerd(bridges=True)
        end.callback(daemon.stop)
        os.environ["DOCKER_HOST"] = daemon.host
        engine.make_images()
        engine.docker("network", "create", "--subnet", "172.30.0.0/16", "--gateway", "172.30.0.1", "fleet")
        ways = Ways(directory, end)
        took = {name: [] for name in ("run", "serve", "fleet", "pool")}
        for n in range(ROUNDS + 1):
            for name, times in took.items():
                seconds = getattr(ways, name)(n)
                # The first of each does not count.
                times.extend([seconds] if n else [])
    middle = {name: statistics.median(times) for name, times in took.items()}

    def line(what: str, ours: str, theirs: str, goal: str) -> None:
        pairs = statistics.median(a / b for a, b in zip(took[ours], took[theirs], strict=True))
        print(f"first token      {pairs:5.2f} x {what}     {middle[ours] * 1e3:5.0f} ms against {middle[theirs] * 1e3:5.0f}     {goal}")

    line("docker run of the same command", "fleet", "serve", "goal <= 1.05")
    line("docker run of the CLI alone   ", "fleet", "run", "")
    line("that, from a warm pool        ", "pool", "run", "")


class Ways:
    """To the first token. What is left of each is gone before the next begins."""

    def __init__(self, directory: Path, end: contextlib.ExitStack):
        import engine
        import harness
        from test_sessions import Fleet

        self.engine, self.wait_for = engine, harness.wait_for
        api = harness.Api({"otherwise": {"blocks": ["done"]}}, directory / "api", "172.30.0.1")
        end.callback(api.close)
        environment = {
            "ANTHROPIC_BASE_URL": api.url,
            "ANTHROPIC_API_KEY": "sk-ant-bench",
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "DISABLE_AUTOUPDATER": "1",
            "AGENT_AUTH_TOKEN": APP_TOKEN,
        }
        words = [word for name, value in environment.items() for word in ("--env", f"{name}={value}")]
        self.flags = ["--network", "fleet", *SIZE, *RIGHTS, *words]
        (directory / "app-token").write_text(APP_TOKEN)
        (directory / "app-token").chmod(0o600)
        one = self.one = Fleet(directory, api)
        end.callback(one.close)
        one.template("chat", "long-running", SERVE, app_port=8000)
        one.template("ahead", "long-running", SERVE, app_port=8000)
        with one.file.open("a") as file:
            file.write('[templates.ahead.pool]\nsize = 1\nmax_age = "5m"\nper_minute = 60\n')
        token = f'{{ file = "{directory}/app-token" }}'
        text = one.file.read_text().replace("secrets = {", f"app_token = {token}\nsecrets = {{ AGENT_AUTH_TOKEN = {token},")
        one.file.write_text(text)
        one.start()

    def run(self, n: int) -> float:
        began = time.perf_counter()
        argv = ["docker", "run", "--rm", "--name", "bare", *self.flags, self.engine.WRAPPED, *CLAUDE, *SAY]
        with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as running:
            took = first(running.stdout, began)
            running.stdout.read()
        return took

    def serve(self, n: int) -> float:
        began = time.perf_counter()
        # An address that is known needs no asking.
        argv = ["docker", "run", "--detach", "--name", "bare", "--ip", "172.30.9.9", *self.flags, self.engine.WRAPPED, *SERVE]
        subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
        while True:
            with contextlib.suppress(OSError):
                took = say("172.30.9.9", 8000, "/sessions/one/messages", APP_TOKEN, began)
                break
            time.sleep(0.005)
        self.engine.docker("rm", "--force", "bare")
        return took

    def fleet(self, n: int, template: str = "chat") -> float:
        from test_sessions import TOKENS

        name = f"{template}-{n}"
        took = say("127.0.0.1", self.one.port, f"/v1/sessions/{name}/messages?template={template}", TOKENS["shop"], time.perf_counter())
        container = self.one.show(name)["container"]
        self.one.get(f"/v1/sessions/{name}", "DELETE")
        self.wait_for("end", lambda: self.engine.docker("inspect", container, check=False).returncode != 0, 60)
        return took

    def pool(self, n: int) -> float:
        # Its place is filled again while the session begins.
        ready = lambda: 'agent_fleet_sessions{phase="ready",' in self.one.get("/metrics", who=None)[1]  # noqa: E731
        self.wait_for("a container that was made ahead", ready, 60)
        return self.fleet(n, "ahead")


def say(host: str, port: int, path: str, token: str, began: float) -> float:
    connection = http.client.HTTPConnection(host, port, timeout=120)
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    connection.request("POST", path, json.dumps({"prompt": "hello"}), headers)
    answer = connection.getresponse()
    if answer.status != 200:
        raise RuntimeError(f"{path}: {answer.status} {answer.read()!r}")
    took = first((line.decode() for line in answer), began)
    answer.read()
    connection.close()
    return took


def first(lines, began: float) -> float:
    for line in lines:
        if TOKEN in line:
            return time.perf_counter() - began
    raise RuntimeError("it ended without a token")


def on_one_core(bench: str, stores: bool = True) -> None:
    """A bench of the crate's own, with each store where it has one."""
    built = ["cargo", "bench", "-q", "--locked", "-p", "agent-fleet", "--bench", bench, "--no-run", "--message-format=json"]
    artifacts = map(json.loads, subprocess.run(built, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout.splitlines())
    binary = next(one["executable"] for one in artifacts if one["reason"] == "compiler-artifact" and one["target"]["name"] == bench)
    pinned = ["taskset", "--cpu-list", "0", binary]
    if not stores:
        for line in subprocess.run(pinned, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines():
            print(f"fleet            {line}", flush=True)
        return
    shell = 'exec "$@" "$AGENT_FLEET_TEST_POSTGRES"'
    ways = {"SQLite": pinned, "PostgreSQL": [ROOT / "tests/fleet/postgres", "sh", "-c", shell, "sh", *pinned]}
    for name, argv in ways.items():
        # As servers are: what is to last is on the disk.
        env = os.environ | {"AGENT_FLEET_TEST_POSTGRES_FSYNC": "on"}
        out = subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True, env=env).stdout
        print(*(f"fleet            {name:<10} {line}" for line in out.splitlines()), sep="\n", flush=True)


def fleet_store(_: Path) -> None:
    """Ten thousand sessions in a store: what it can do in a second, and claims from a warm pool."""
    on_one_core("store")


def fleet_drive(_: Path) -> None:
    """Ten thousand simulated containers: looks, decisions and bills in a second, and memory."""
    on_one_core("drive")


def fleet_decide(_: Path) -> None:
    """What is decided of ten thousand simulated containers in a second, with nothing around it."""
    on_one_core("decide", stores=False)


BENCHES = (first_token, fleet_decide, fleet_store, fleet_drive)
