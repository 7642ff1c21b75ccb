"""One dockerd and its images for all workers; a pod for each test that wants one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import engine
import pytest

LEFT_OUT = os.environ.get("AGENT_SIDECAR_TESTS_NO_DOCKER") == "1"
dockerd = pytest.StashKey[engine.Dockerd]()


def pytest_configure(config: pytest.Config) -> None:
    # The workers inherit our environment, and leave the daemon to us.
    if LEFT_OUT or config.option.collectonly or hasattr(config, "workerinput"):
        return
    try:
        config.stash[dockerd] = engine.Dockerd()
        os.environ["DOCKER_HOST"] = config.stash[dockerd].host
        engine.make_images()
    except (RuntimeError, OSError, AssertionError) as error:
        pytest.exit(f"no containers to test with: {error}", returncode=4)


def pytest_unconfigure(config: pytest.Config) -> None:
    if started := config.stash.get(dockerd, None):
        started.stop()


@pytest.fixture
def pod(tmp_path: Path):
    """Makes pods, each with an API that follows a script."""
    if LEFT_OUT:
        pytest.skip("AGENT_SIDECAR_TESTS_NO_DOCKER=1")
    made = []

    def make(script: dict) -> engine.Pod:
        made.append(engine.Pod(tmp_path / f"pod{len(made)}", script))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """A directory that outlives containers, and is anybody's."""
    directory = tmp_path / "volume"
    directory.mkdir()
    directory.chmod(0o777)
    return directory
