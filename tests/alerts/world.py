"""Pods with real agents, two Prometheus with the rules, an Alertmanager behind each, and who is told.

`fast` has the rules with their time compressed (compress.py) and looks every second; `real` has the files that ship, and looks every 15 s.
"""

from __future__ import annotations

import calendar
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import compress
import harness
import yaml

ALERTS = Path(__file__).resolve().parents[2] / "alerts"
SHIPPED = yaml.safe_load((ALERTS / "agent-sidecar.rules.yaml").read_text())
ROUTES = yaml.safe_load((ALERTS / "alertmanager.yaml").read_text())
# Each a Prometheus and an Alertmanager: how often is scraped, how long that may take, and how often is evaluated.
LANES = {"fast": ("1s", "1s", "500ms"), "real": ("15s", "10s", "15s")}
# In a namespace of our own: whatever is not said here is an ephemeral port, and those begin higher.
FIRST_PORT = 21_000
# CLIs that start at once, on two cores; each takes one for a second.
STARTING = 3
# Seconds for what takes one, on a machine that has much else to do.
PATIENCE = 240


@dataclass
class Told:
    """An alert as it came to the receiver."""

    at: float
    lane: str
    receiver: str
    status: str
    labels: dict[str, str]
    annotations: dict[str, str]
    starts_at: float


def moment(text: str) -> float:
    """RFC 3339 in UTC, whose fraction has as many digits as it likes."""
    assert text.endswith("Z"), f"{text} is not in UTC"
    whole, _, fraction = text.rstrip("Z").partition(".")
    return calendar.timegm(time.strptime(whole, "%Y-%m-%dT%H:%M:%S")) + float(f"0.{fraction or 0}")


class Receiver:
    """Takes what Alertmanager delivers: `/LANE/RECEIVER`."""

    def __init__(self):
        self.told: list[Told] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                now = time.time()
                message = json.loads(harness.whole(self))
                _, lane, name = self.path.split("/")
                for one in message["alerts"]:
                    starts_at = moment(one["startsAt"])
                    receiver.told.append(Told(now, lane, name, one["status"], one["labels"], one["annotations"], starts_at))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def first(self, lane: str, alert: str, namespace: str) -> Told | None:
        fits = (one for one in list(self.told) if one.lane == lane and one.labels["alertname"] == alert and one.status == "firing")
        return next((one for one in fits if one.labels.get("namespace") == namespace), None)


class Pod:
    """A container of agents, as a scrape configuration sees it; and the driver of what happens there."""

    def __init__(self, world: World, name: str, namespace: str, drive: Callable[[Pod], None], alert: str = "", real: bool = False):
        self.world, self.name, self.namespace, self.drive, self.alert, self.real = world, name, namespace, drive, alert, real
        self.port = FIRST_PORT + len(world.pods)
        self.directory = world.directory / namespace / name
        self.directory.mkdir(parents=True)
        self.home = self.directory / "home"
        self.ledger, self.socket = self.directory / "ledger.jsonl", self.directory / "hub.sock"
        self.fault_at: float | None = None
        self.over_at: float | None = None
        self.failed: str | None = None
        self.closing = contextlib.ExitStack()

    # What is in it.

    def api(self, *rules: dict, usage: dict | None = None, **script) -> harness.Api:
        usage = usage or {"input_tokens": 10, "output_tokens": 20, "cache_read_input_tokens": 2000}
        whole = {"defaults": {"usage": usage}, "rules": list(rules), "otherwise": {"blocks": ["done"]}} | script
        started = harness.Api(whole, self.directory / f"api{time.monotonic_ns()}")
        self.closing.callback(started.close)
        return started

    def place(self, hub: bool) -> list[str]:
        """Where it is scraped: alone, or with what belongs together."""
        return ["--listen", f"127.0.0.1:{self.port}", *(["--socket", str(self.socket)] if hub else ["--hub", "off"])]

    def hub(self, *flags: str) -> subprocess.Popen:
        """Outlives agents, and keeps their counts."""
        argv = [harness.binary(), "hub", *self.place(True), *flags]
        process = subprocess.Popen([str(word) for word in argv], stdin=subprocess.DEVNULL, env=self.environment())
        self.closing.callback(end, process)
        harness.wait_for("hub", lambda: harness.listens(self.port), PATIENCE)
        return process

    def environment(self) -> dict[str, str]:
        return {"PATH": os.environ["PATH"], "HOME": str(self.home), "AGENT_SIDECAR_PATROL": "false"}

    def argv(self, *flags: object, hub: bool = False) -> list[str]:
        ledger = [] if "--ledger" in flags else ["--ledger", self.ledger]
        return [str(word) for word in [harness.binary(), "run", *self.place(hub), *ledger, *flags, "--"]]

    def agent(
        self, api: harness.Api, *args: str, flags: tuple = (), hub: bool = False, before: tuple = (), hello: bool = True, faulty: bool = False, **env: str
    ) -> harness.Session:
        """A real CLI behind a sidecar, that has answered once; `before` is what starts the sidecar, `faulty` that this is the fault."""
        cli = [harness.cli("new"), *harness.STREAM_JSON, *args]
        with self.world.starting:
            if faulty:
                self.fault()
            started = harness.Session([*before, *self.argv(*flags, hub=hub), *cli], api, self.home, **env)
            self.closing.callback(quietly, started)
            if hello:
                started.ask("hello", PATIENCE)
        return started

    def scraped(self) -> None:
        """Both have seen it twice: what is counted from now on is an increase."""
        for lane in ["fast", "real"] if self.real else ["fast"]:
            every = int(LANES[lane][0].rstrip("s"))
            asked = f'sum_over_time(up{{namespace="{self.namespace}", pod="{self.name}"}}[{every * 4}s]) >= 2'
            harness.wait_for(f"scrape of {self.name} ({lane})", lambda: bool(self.world.query(lane, asked)), PATIENCE)  # noqa: B023

    def sees(self, expression: str) -> None:
        """The quicker of both, of what this one is scraped for."""
        mine = re.sub(r"\{", f'{{namespace="{self.namespace}", pod="{self.name}", ', expression, count=1)
        harness.wait_for(expression, lambda: bool(self.world.query("fast", mine)), PATIENCE)

    # What happens to it.

    def fault(self) -> None:
        self.fault_at = time.time()

    def done(self) -> bool:
        """Whoever is to be told has been told; or the run is over."""
        lanes = ["fast", "real"] if self.real else ["fast"]
        told = self.alert and all(self.world.receiver.first(lane, self.alert, self.namespace) for lane in lanes)
        return bool(told) or self.world.over.is_set()

    def beat(self, every: float, times: int | None = None) -> Iterator[int]:
        """Turns in a rhythm that a busy machine does not slow down, until it is done."""
        start = time.monotonic()
        for n in range(times or sys.maxsize):
            if self.world.over.wait(max(0.0, start + n * every - time.monotonic())) or (times is None and self.done()):
                return
            yield n

    def wait(self, seconds: float = 1e6) -> None:
        """Until it is done, or the time is up."""
        end = time.monotonic() + seconds
        while not self.done() and time.monotonic() < end:
            self.world.over.wait(min(0.2, max(0.0, end - time.monotonic())))

    def run(self) -> None:
        try:
            with self.closing:
                self.drive(self)
        except Exception:  # noqa: BLE001 (a test says it)
            self.failed = traceback.format_exc()
        self.over_at = time.time()


def end(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGCONT)
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(5)


def quietly(session: harness.Session) -> None:
    """As an app ends its agent."""
    try:
        session.close(15)
    except (subprocess.TimeoutExpired, OSError):
        session.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            session.process.wait(15)
    session.kill()


@dataclass
class World:
    directory: Path
    pods: list[Pod] = field(default_factory=list)
    started: list[subprocess.Popen] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)
    # When the soak was looked at, and somebody may get sick.
    sick: threading.Event = field(default_factory=threading.Event)
    starting: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(STARTING))
    receiver: Receiver = field(default_factory=Receiver)
    # Lane, namespace, alert, and which other held it back when somebody looked.
    held_back: set[tuple[str, str, str, str]] = field(default_factory=set)

    def add(self, *args, **how) -> Pod:
        self.pods.append(Pod(self, *args, **how))
        return self.pods[-1]

    def port(self, tool: str, lane: str) -> int:
        return {"prometheus": 20_900, "alertmanager": 20_950}[tool] + list(LANES).index(lane)

    def start(self) -> None:
        for lane, (scrape, patience, evaluation) in LANES.items():
            home = self.directory / lane
            home.mkdir()
            receivers = {one["name"]: f"{self.receiver.url}/{lane}/{one['name']}" for one in ROUTES["receivers"]}
            fast = lane == "fast"
            routes = compress.routes(ROUTES, receivers) if fast else compress.deliver(ROUTES, receivers)
            rules = compress.rules(SHIPPED) if fast else SHIPPED
            (home / "alertmanager.yaml").write_text(yaml.safe_dump(routes))
            (home / "rules.yaml").write_text(yaml.safe_dump(rules, width=1000))
            alertmanager = f"127.0.0.1:{self.port('alertmanager', lane)}"
            targets = [{"targets": [f"localhost:{pod.port}"], "labels": {"namespace": pod.namespace, "pod": pod.name}} for pod in self.pods]
            settings = {
                "global": {"scrape_interval": scrape, "scrape_timeout": patience, "evaluation_interval": evaluation},
                "rule_files": ["rules.yaml"],
                "scrape_configs": [{"job_name": "agent-sidecar", "static_configs": targets}],
                "alerting": {"alertmanagers": [{"static_configs": [{"targets": [alertmanager]}]}]},
            }
            (home / "prometheus.yml").write_text(yaml.safe_dump(settings))
            flags = [f"--config.file={home}/prometheus.yml", f"--storage.tsdb.path={home}/tsdb"]
            self.tool(lane, "prometheus", *flags, f"--web.listen-address=127.0.0.1:{self.port('prometheus', lane)}")
            flags = [f"--config.file={home}/alertmanager.yaml", f"--storage.path={home}/alertmanager", "--cluster.listen-address="]
            self.tool(lane, "alertmanager", *flags, f"--web.listen-address={alertmanager}")

    def tool(self, lane: str, name: str, *flags: str) -> None:
        program = "prometheus-alertmanager" if name == "alertmanager" else name
        with (self.directory / lane / f"{name}.log").open("wb") as log:
            self.started.append(subprocess.Popen([program, *flags], stdin=subprocess.DEVNULL, stdout=log, stderr=log))
        harness.wait_for(name, lambda: harness.listens(self.port(name, lane)), PATIENCE)

    def ask(self, tool: str, lane: str, path: str, **query: str):
        """As soon as it answers: nobody takes silence for an answer."""
        url = f"http://127.0.0.1:{self.port(tool, lane)}{path}?" + urllib.parse.urlencode(query)
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                with urllib.request.urlopen(url, timeout=20) as answer:
                    return json.load(answer)
            except OSError as error:
                # It replays its log, or has much else to do.
                busy = not isinstance(error, urllib.error.HTTPError) or error.code == 503
                if not busy or time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    def query(self, lane: str, expression: str) -> list[dict]:
        return self.ask("prometheus", lane, "/api/v1/query", query=expression)["data"]["result"]

    def states(self, lane: str, state: str) -> list[dict[str, str]]:
        """What was in this state at any time of the run."""
        return [one["metric"] for one in self.query(lane, f'max_over_time(ALERTS{{alertstate="{state}"}}[30m])')]

    def suppressed(self, lane: str) -> list[dict[str, str]]:
        """What another alert holds back; which one does is kept for who asks later."""
        alerts = self.ask("alertmanager", lane, "/api/v2/alerts")
        names = {one["fingerprint"]: one["labels"]["alertname"] for one in alerts}
        held = [one for one in alerts if one["status"]["state"] == "suppressed"]
        for one in held:
            namespace, alert = one["labels"]["namespace"], one["labels"]["alertname"]
            self.held_back |= {(lane, namespace, alert, names.get(other, other)) for other in one["status"]["inhibitedBy"]}
        return [one["labels"] for one in held]

    def close(self) -> None:
        self.over.set()
        self.sick.set()
        for process in self.started:
            end(process)
        self.receiver.server.shutdown()
        self.receiver.server.server_close()
