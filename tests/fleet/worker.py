"""Cloudflare on this machine: `wrangler dev` with the Worker of deploy/cloudflare/fleet, its containers on the daemon of the tests.

What stands in for something: docker's client, which pulls nothing and builds as old clients do; the proxy before the containers (proxy.py); and for the image
one of ours, with the sidecar. Nothing is asked outside: there is no way there.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import engine
import harness
import jsonschema

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
WORKER = ROOT / "deploy/cloudflare/fleet"
CONTRACT = json.loads((WORKER / "openapi.json").read_text())
NODE = ROOT / ".cache/wrangler/node_modules"
IMAGE, PROXY = engine.WRAPPED, "proxy-everything"
TOKEN = "cloudflare-" + "0123456789abcdef" * 2
# Neither pulls nor knows what new builders know.
DOCKER = """#!/bin/sh
[ "$1" = pull ] && exit 0
if [ "$1" = build ]; then
  for word in "$@"; do
    shift
    case $word in --load | --provenance=* | --platform) continue ;; linux/amd64) continue ;; esac
    set -- "$@" "$word"
  done
fi
exec docker "$@"
"""
# As long as a busy machine may take.
PATIENCE = 120


def make_proxy() -> None:
    """Out of what has a Python."""
    with tempfile.TemporaryDirectory() as context:
        shutil.copy2(HERE / "proxy.py", context)
        (Path(context) / "Dockerfile").write_text(f'FROM {engine.BARE}\nCOPY proxy.py /\nENTRYPOINT ["python3", "/proxy.py"]\n')
        engine.docker("build", "--network", "none", "--tag", PROXY, context)


def config() -> dict:
    """Ours, as its text has it."""
    lines = (WORKER / "wrangler.jsonc").read_text().splitlines()
    return json.loads("\n".join(line for line in lines if not line.lstrip().startswith("//")))


class Worker:
    def __init__(self, directory: Path, **secrets: str):
        self.directory, self.port = directory, harness.free_port()
        self.log = directory / "log"
        shutil.copy2(WORKER / "worker.ts", directory)
        (directory / "node_modules").symlink_to(NODE)
        (directory / "docker").write_text(DOCKER)
        (directory / "docker").chmod(0o755)
        # Wrangler removes what else has its image: each has one of its own.
        (directory / "Dockerfile").write_text(f"FROM {IMAGE}\nEXPOSE 8080\nLABEL worker={self.port}\n")
        settings = config()
        # Its containers are named after it.
        self.name = settings["name"] = f"agent-fleet-{self.port}"
        settings["containers"][0]["image"] = "./Dockerfile"
        settings["vars"]["IMAGE"] = IMAGE
        (directory / "wrangler.json").write_text(json.dumps(settings))
        (directory / ".dev.vars").write_text("".join(f"{name}={value}\n" for name, value in secrets.items()))
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("CLOUDFLARE_", "CF_", "WRANGLER_"))}
        environment |= {
            "HOME": str(directory),
            "CI": "1",
            "DOCKER_BUILDKIT": "0",
            "WRANGLER_SEND_METRICS": "false",
            "WRANGLER_SEND_ERROR_REPORTS": "false",
            "WRANGLER_DOCKER_BIN": str(directory / "docker"),
            "WRANGLER_DOCKER_HOST": os.environ["DOCKER_HOST"],
            "MINIFLARE_CONTAINER_EGRESS_IMAGE": PROXY,
        }
        argv = ["setpriv", "--pdeathsig", "TERM", "node", NODE / "wrangler/bin/wrangler.js", "dev", "--ip", "127.0.0.1", "--port", self.port]
        # Two of them would have one.
        argv += ["--inspector-port", harness.free_port()]
        argv += ["--config", "wrangler.json", "--show-interactive-dev-session=false", "--log-level", "info"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                list(map(str, argv)), cwd=directory, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def ready(self) -> Worker:
        harness.wait_for("wrangler", lambda: self.process.poll() is not None or self.ask("GET", "/v1/sandboxes")[0] in (200, 403), PATIENCE)
        assert self.process.poll() is None, self.said()
        return self

    def said(self) -> str:
        return re.sub(r"\x1b\[[0-9;]*m", "", self.log.read_text(errors="replace"))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, method: str, path: str, body: object = None, token: str | None = TOKEN, headers: dict | None = None) -> tuple[int, object]:
        """Status 0: nobody answers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        given = {"authorization": f"Bearer {token}"} if token else {}
        try:
            connection.request(method, path, None if body is None else json.dumps(body), {**given, **(headers or {})})
            answer = connection.getresponse()
            text = answer.read().decode()
            said = json.loads(text) if "json" in (answer.getheader("content-type") or "") else text
        except (OSError, http.client.HTTPException):
            return 0, ""
        finally:
            connection.close()
        if path.startswith("/v1/") and "/ports/" not in path and answer.status != 204:
            kind = "Error" if answer.status >= 400 else "Page" if path.split("?")[0] == "/v1/sandboxes" else "Sandbox"
            jsonschema.Draft202012Validator({**CONTRACT, "$ref": f"#/components/schemas/{kind}"}).validate(said)
        return answer.status, said

    def running(self) -> list[str]:
        """Containers of agents, by the daemon's word."""
        named = engine.docker("ps", "--format", "{{.Names}}", "--filter", f"name=workerd-{self.name}-").stdout.split()
        return [name for name in named if not name.endswith("-proxy")]

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(30)
        # Wrangler has told the daemon to remove some of them, too.
        harness.wait_for("its containers' end", self._is_empty, PATIENCE)

    def _is_empty(self) -> bool:
        left = engine.docker("ps", "--all", "--quiet", "--filter", f"name=workerd-{self.name}-").stdout.split()
        if left:
            engine.docker("rm", "--force", *left, check=False)
        return not left
