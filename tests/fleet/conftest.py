"""One dockerd with gVisor's runtime beside its own, an image and a network: what sidecar/fleet/tests/docker.rs asks for."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "containers"))

import engine
import pytest

ROOT = Path(__file__).parents[2]
LEFT_OUT = os.environ.get("AGENT_SIDECAR_TESTS_NO_DOCKER") == "1"
IMAGE, NETWORK = "busybox", "fleet"
BUSYBOX = Path(shutil.which("busybox") or "/bin/busybox")
# What tests/install has, else the machine's own, if that is not too old.
RUNSC = next((path for path in [ROOT / ".cache/gvisor/usr/bin/runsc", Path(shutil.which("runsc") or "")] if path.is_file()), None)
# The containers' networks are namespaces in one of ours, which runsc takes for the machine's own: it refuses to bring its network to that.
RUNSC_FLAGS = ["--network=host", "--platform=systrap"]


def write_busybox(out) -> None:
    """The program, and a name for each thing that it does."""
    root = engine.Root(out)
    root.directory("/tmp", 0o1777)
    root.put(BUSYBOX, "/bin/busybox", 0o755)
    for name in subprocess.run([BUSYBOX, "--list"], capture_output=True, text=True, check=True).stdout.split():
        if name != "busybox":
            root.link(f"/bin/{name}", "busybox")
    root.tar.close()


@functools.cache
def gvisor_starts() -> str:
    """Why it does not; nothing if it does."""
    if not RUNSC:
        return "there is no runsc"
    tried = engine.docker("run", "--rm", "--runtime", "runsc", "--network", NETWORK, IMAGE, "true", check=False)
    return tried.stderr.strip()[-500:]


@pytest.fixture(scope="session")
def daemon() -> Iterator[dict[str, str]]:
    """The environment of a test."""
    if LEFT_OUT:
        pytest.skip("AGENT_SIDECAR_TESTS_NO_DOCKER=1")
    runtimes = {"runsc": {"path": str(RUNSC), "runtimeArgs": RUNSC_FLAGS}} if RUNSC else {}
    daemon = engine.Dockerd(bridges=True, config={"runtimes": runtimes})
    try:
        os.environ["DOCKER_HOST"] = daemon.host
        engine.import_root(IMAGE, write_busybox)
        engine.docker("network", "create", NETWORK)
        yield {
            "AGENT_FLEET_TEST_DOCKER": daemon.host,
            "AGENT_FLEET_TEST_IMAGE": IMAGE,
            "AGENT_FLEET_TEST_NETWORK": NETWORK,
        }
    finally:
        daemon.stop()
