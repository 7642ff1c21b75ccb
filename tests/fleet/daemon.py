"""A daemon that speaks as much of Docker's API as `agent-fleet` asks, whose containers are processes of ours, each with an address on loopback.

For suites that need a fleet with something in it, and no containers. What Docker itself answers, tests/fleet and tests/containers find out.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import signal
import subprocess
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


# Each container has another, whatever daemon it is of, and whichever worker of pytest's has that: they share a loopback.
WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw-1").removeprefix("gw")) + 1
ADDRESSES = itertools.count()


def address() -> str:
    n = next(ADDRESSES)
    return f"127.{WORKER + 1}.{n // 250}.{n % 250 + 1}"


def stamp(at: float | None = None) -> str:
    at = time.time() if at is None else at
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at)) + f".{int(at % 1 * 1e6):06}Z"


class Container:
    def __init__(self, name: str, asked: dict, address: str, log: Path):
        self.id, self.name, self.asked, self.address, self.log = hashlib.sha256(name.encode()).hexdigest(), name, asked, address, log
        self.created, self.process, self.paused = time.time(), None, False

    def start(self) -> None:
        if self.process is None:
            env = dict(one.split("=", 1) for one in self.asked.get("Env") or [])
            env = {"PATH": os.environ["PATH"], "AGENT_SIDECAR_LISTEN": f"{self.address}:9477", **env}
            with self.log.open("wb") as log:
                # Its own group: it ends with all that it has started.
                self.process = subprocess.Popen(self.asked["Entrypoint"], env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)

    def signal(self, which: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, which)

    def end(self, grace: float) -> None:
        if self.process and self.process.poll() is None:
            self.signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(grace)
            self.signal(signal.SIGKILL)
            self.process.wait(10)

    def state(self) -> dict:
        code = self.process.poll() if self.process else None
        status = "created" if not self.process else "exited" if code is not None else "paused" if self.paused else "running"
        return {"Status": status, "Running": status in {"running", "paused"}, "Paused": self.paused, "ExitCode": (code or 0) % 256, "Error": "", "OOMKilled": False,
                "Dead": False, "Restarting": False, "Pid": 1, "StartedAt": stamp(self.created), "FinishedAt": stamp(0)}  # fmt: skip

    def inspected(self) -> dict:
        networks = {"bridge": {"IPAddress": self.address}}
        return {"Id": self.id, "Name": f"/{self.name}", "Created": stamp(self.created), "State": self.state(), "Image": "sha256:0",
                "Config": {"Labels": self.asked["Labels"], "Image": "sha256:0"}, "HostConfig": {}, "NetworkSettings": {"Networks": networks, "Ports": {}}}  # fmt: skip

    def summed(self) -> dict:
        state = self.state()
        return {"Id": self.id, "Names": [f"/{self.name}"], "Created": int(self.created), "State": state["Status"], "Status": state["Status"],
                "Labels": self.asked["Labels"], "Image": "sha256:0", "ImageID": "sha256:0"}  # fmt: skip


class Daemon:
    def __init__(self, directory: Path):
        self.directory, self.containers, self.lock = directory, {}, threading.Lock()
        # Calls that change something are answered with 500 while it is set.
        self.broken = False
        directory.mkdir(parents=True, exist_ok=True)
        daemon = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def answer(self, status: int, body: object = None) -> None:
                raw = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def handle_one(self) -> None:
                asked = urllib.parse.urlsplit(self.path)
                path = re.sub(r"^/v[\d.]+", "", asked.path)
                query = {name: values[0] for name, values in urllib.parse.parse_qs(asked.query).items()}
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length) or b"{}") if length else {}
                self.answer(*daemon.asked(self.command, path, query, body))

            do_GET = do_POST = do_DELETE = do_HEAD = handle_one

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_):
                # Who asked has gone.
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"tcp://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def find(self, name: str) -> Container | None:
        # Others come and go meanwhile.
        return next((one for one in list(self.containers.values()) if name in {one.id, one.name}), None)

    def asked(self, method: str, path: str, query: dict, body: dict) -> tuple:
        if path == "/version":
            return 200, {"Version": "test", "ApiVersion": "1.47", "MinAPIVersion": "1.24"}
        if path == "/info":
            return 200, {"SystemTime": stamp()}
        if path.startswith("/images/"):
            return 200, {"Id": "sha256:0"}
        if path == "/containers/json":
            wanted = json.loads(query.get("filters", "{}")).get("label", [])
            has = lambda one: {f"{name}={value}" for name, value in one.asked["Labels"].items()}  # noqa: E731
            with self.lock:
                return 200, [one.summed() for one in self.containers.values() if set(wanted) <= has(one)]
        if self.broken and method != "GET":
            return 500, {"message": "the test wants it so"}
        if path == "/containers/create":
            with self.lock:
                if self.find(query["name"]):
                    return 409, {"message": "the name is in use"}
                one = Container(query["name"], body, address(), self.directory / f"{query['name']}.log")
                self.containers[one.id] = one
            return 201, {"Id": one.id, "Warnings": []}
        return self.one(method, path, query)

    def one(self, method: str, path: str, query: dict) -> tuple:
        _, _, name, *verb = path.split("/") if path.startswith("/containers/") else ("", "", "", "?")
        one = self.find(name)
        if not one:
            return 404, {"message": f"No such container: {name}"}
        match verb:
            case ["json"]:
                return 200, one.inspected()
            case ["start"]:
                one.start()
            case ["stop"]:
                one.end(float(query.get("t", 10)))
            case ["pause"]:
                one.signal(signal.SIGSTOP)
                one.paused = True
            case ["unpause"]:
                one.signal(signal.SIGCONT)
                one.paused = False
            case ["logs"]:
                said = one.log.read_bytes() if one.log.exists() else b""
                return 200, b"\x01\0\0\0" + len(said).to_bytes(4) + said
            case [] if method == "DELETE":
                one.end(0)
                with self.lock:
                    self.containers.pop(one.id, None)
            case _:
                # Events, too: who does not hear of them looks.
                return 501, {"message": "not here"}
        return 204, None

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        for one in list(self.containers.values()):
            one.end(0)
