"""One dockerd with gVisor's runtime beside its own, an image and a network: what sidecar/fleet/tests/docker.rs asks for."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "containers"))

import engine
import pytest
import worker

ROOT = Path(__file__).parents[2]
LEFT_OUT = os.environ.get("AGENT_SIDECAR_TESTS_NO_DOCKER") == "1"
IMAGE, NETWORK = "busybox", "fleet"
GATEWAY = "172.17.0.1"
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


daemon = pytest.StashKey[engine.Dockerd]()


def pytest_configure(config: pytest.Config) -> None:
    # The workers inherit our environment, and leave the daemon to us.
    if LEFT_OUT or config.option.collectonly or hasattr(config, "workerinput"):
        return
    runtimes = {"runsc": {"path": str(RUNSC), "runtimeArgs": RUNSC_FLAGS}} if RUNSC else {}
    try:
        # workerd asks the default network for its gateway, and new daemons have no word of that unless they were told one.
        config.stash[daemon] = engine.Dockerd(bridges=True, config={"runtimes": runtimes, "bip": f"{GATEWAY}/16"})
        os.environ["DOCKER_HOST"] = config.stash[daemon].host
        engine.import_root(IMAGE, write_busybox)
        engine.docker("network", "create", NETWORK)
        # Agents as people have them.
        engine.make_images()
        worker.make_proxy()
    except (RuntimeError, OSError, AssertionError) as error:
        pytest_unconfigure(config)
        pytest.exit(f"no containers to test with: {error}", returncode=4)


def pytest_sessionfinish(session: pytest.Session) -> None:
    # A test that failed leaves its own.
    if session.config.stash.get(daemon, None) and session.testsfailed == 0:
        left = lambda: engine.docker("ps", "--all", "--format", "{{.Names}} {{.Status}}").stdout  # noqa: E731
        try:
            # What was told to go may be on its way.
            engine.harness.wait_for("containers' end", lambda: not left(), 60)
        except AssertionError:
            pytest.exit(f"containers are left: {left()}", returncode=1)


def pytest_unconfigure(config: pytest.Config) -> None:
    if started := config.stash.get(daemon, None):
        started.stop()


@pytest.fixture
def environment() -> dict[str, str]:
    if LEFT_OUT:
        pytest.skip("AGENT_SIDECAR_TESTS_NO_DOCKER=1")
    return {
        **os.environ,
        "AGENT_FLEET_TEST_DOCKER": os.environ["DOCKER_HOST"],
        "AGENT_FLEET_TEST_IMAGE": IMAGE,
        "AGENT_FLEET_TEST_NETWORK": NETWORK,
    }
