"""One dockerd and its images for all workers, as the container tests have it; not started where no test asks for it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "containers"))
# Its conftest is not ours.
sys.path.append(str(Path(__file__).parents[1] / "fleet"))

import engine
import harness
import images
import pytest

LEFT_OUT = os.environ.get("AGENT_SIDECAR_TESTS_NO_DOCKER") == "1"
WITH_CONTAINERS = {"test_images.py", "test_compose.py", "test_pods.py", "test_fleet.py"}
daemon = pytest.StashKey[engine.Dockerd]()


def pytest_configure(config: pytest.Config) -> None:
    # The workers inherit our environment, and leave the daemon to us.
    if LEFT_OUT or config.option.collectonly or hasattr(config, "workerinput"):
        return
    files = {Path(word.split("::")[0]).name for word in config.args}
    if all(name.endswith(".py") for name in files) and not files & WITH_CONTAINERS:
        return
    if not images.is_static(harness.binary()):
        pytest.exit("the sidecar's image is the binary alone, which has to be static: `make build`, or AGENT_SIDECAR_BIN", returncode=4)
    try:
        config.stash[daemon] = engine.Dockerd(bridges=True)
        os.environ["DOCKER_HOST"] = config.stash[daemon].host
        images.stand_ins()
        images.ours()
    except (RuntimeError, OSError, AssertionError) as error:
        pytest_unconfigure(config)
        pytest.exit(f"no containers to test with: {error}", returncode=4)


def pytest_unconfigure(config: pytest.Config) -> None:
    if started := config.stash.get(daemon, None):
        started.stop()


@pytest.fixture(scope="session")
def dockerd() -> None:
    if LEFT_OUT:
        pytest.skip("AGENT_SIDECAR_TESTS_NO_DOCKER=1")
