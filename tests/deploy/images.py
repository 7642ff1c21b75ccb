"""Our two images, built from deploy/docker as they are, and stand-ins for those that they and compose.yaml name: nothing can be pulled here.

A stand-in has the name of what it stands for, this machine's files, and of the original only what is used: Debian's Prometheus and
Alertmanager; a `cargo` and a `pip` that check what they are asked for and hand out what is there already; a collector that writes down what it got.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import engine
import harness
import outside
import yaml

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose/compose.yaml").read_text())
SIDECAR, AGENT, FLEET = "agent-sidecar:0.1.0", "agent:1.0.0", "agent-fleet:0.1.0"

CARGO = """#!/bin/bash
# Stands in for cargo: crates cannot be fetched here.
set -eu
target=x86_64-unknown-linux-gnu
[[ "$*" =~ ^"build --release --locked -p "agent-(sidecar|fleet)" --target $target"$ ]]
[ "$RUSTFLAGS" = "-C target-feature=+crt-static -C link-arg=-Wl,-z,pack-relative-relocs" ]
[ -e Cargo.toml ] && [ -e Cargo.lock ] && [ -e sidecar/core/src/lib.rs ] && [ -e sidecar/daemon/src/main.rs ]
[ ! -e target ] && [ ! -e tests ] && [ ! -e .git ]
mkdir -p target/$target/release
cp "/prebuilt/$5" target/$target/release/
"""

PIP = """#!/bin/bash
# Stands in for pip: the SDK is in this image already, in just that version.
set -eu
[ "$1 $2" = "install --no-cache-dir" ]
python3 -c "import importlib.metadata as m, sys; sys.exit(sys.argv[1] != 'claude-agent-sdk==' + m.version('claude-agent-sdk'))" "$3"
[ $# = 3 ]
"""

COLLECTOR = """
import http.server

class Collector(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        print(self.path, len(body), flush=True)
        self.send_response(200)
        self.end_headers()

http.server.ThreadingHTTPServer(("", 4318), Collector).serve_forever()
"""


def base(dockerfile: str) -> str:
    """What the last stage of a Dockerfile is made from, with the defaults of its arguments."""
    text = (DEPLOY / "docker" / dockerfile).read_text()
    given = dict(re.findall(r"^ARG (\w+)=(\S+)$", text, re.MULTILINE))
    names = [re.sub(r"\$\{(\w+)\}", lambda name: given[name[1]], line) for line in re.findall(r"^FROM (\S+)", text, re.MULTILINE)]
    return next(name for name in names if name not in {"scratch", SIDECAR})


def build(tag: str, dockerfile: str, *flags: object, **files: str | Path) -> None:
    with tempfile.TemporaryDirectory() as context:
        for name, content in files.items():
            to = Path(context) / name
            if isinstance(content, Path):
                shutil.copy2(content, to)
            else:
                to.write_text(content)
                to.chmod(0o755)
        (Path(context) / "Dockerfile").write_text(dockerfile)
        engine.docker("build", "--network", "none", "--tag", tag, *flags, context, timeout=300)


def served(name: str, program: str, entry: str, owner: int, directory: str) -> None:
    """An image of one program of Debian's, with what that reads of its own."""

    def write(out) -> None:
        root = engine.Root(out)
        root.link("/lib64", "usr/lib64")
        root.link("/lib", "usr/lib")
        root.put(Path(shutil.which(program)), entry)
        root.directory("/tmp", 0o1777)
        root.directory(directory, owner=owner)
        own = Path("/usr/share/prometheus/alertmanager")
        root.tree(own, str(own), lambda path: path.suffix != ".tmpl")
        root.tar.close()

    engine.import_root(name, write, f'ENTRYPOINT ["{entry}"]')


def stand_ins() -> None:
    engine.make_bare()
    tools = {name: Path(shutil.which(name)) for name in ("chmod", "chown", "uname")}
    more = f"FROM {engine.BARE}\nCOPY {' '.join(tools)} /usr/bin/\n"
    with tempfile.TemporaryDirectory() as directory:
        fleet = Path(directory) / "agent-fleet"
        # Of a debug build most is not for the machine.
        subprocess.run(["strip", "--strip-debug", "-o", fleet, outside.binary()], check=True)
        prebuilt = {"agent-sidecar": harness.binary(), "agent-fleet": fleet}
        copied = "COPY cargo /usr/local/bin/\nCOPY agent-sidecar agent-fleet /prebuilt/\n"
        build(base("Dockerfile"), more + copied, **tools, cargo=CARGO, **prebuilt)
    build(base("agent.Dockerfile"), more + "COPY pip /usr/local/bin/\n", **tools, pip=PIP)
    services = COMPOSE["services"]
    served(services["prometheus"]["image"], "prometheus", "/bin/prometheus", 65534, "/prometheus")
    served(services["alertmanager"]["image"], "prometheus-alertmanager", "/bin/alertmanager", 65534, "/alertmanager")
    listens = f'FROM {engine.BARE}\nCOPY collector /collector\nENTRYPOINT ["python3", "/collector"]\n'
    build(services["otel-collector"]["image"], listens, collector=COLLECTOR)


def ours() -> None:
    """As deploy/README.md says it."""
    engine.docker("build", "--network", "none", "-f", DEPLOY / "docker/Dockerfile", "-t", SIDECAR, ROOT, timeout=300)
    if is_static(outside.binary()):
        engine.docker("build", "--network", "none", "-f", DEPLOY / "fleet/Dockerfile", "-t", FLEET, ROOT, timeout=300)
    engine.docker("build", "--network", "none", "-f", DEPLOY / "docker/agent.Dockerfile", "-t", AGENT, DEPLOY / "docker", timeout=300)


def is_static(binary: Path) -> bool:
    """What ships is; a developer's binary need not be, and an image without anything else cannot run it."""
    listed = subprocess.run(["ldd", binary], capture_output=True, text=True)
    return "statically linked" in listed.stdout or "not a dynamic executable" in listed.stderr
