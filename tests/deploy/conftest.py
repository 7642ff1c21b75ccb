"""One dockerd and its images for the tests that want containers; a pod for each of those that start one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "containers"))

import engine
import images
import pytest

LEFT_OUT = os.environ.get("AGENT_SIDECAR_TESTS_NO_DOCKER") == "1"


@pytest.fixture(scope="session")
def dockerd():
    if LEFT_OUT:
        pytest.skip("AGENT_SIDECAR_TESTS_NO_DOCKER=1")
    assert images.is_static(), "the image of the sidecar has nothing but the binary, which has to be static: `make build`, or AGENT_SIDECAR_BIN"
    if os.environ.get("DEV_DOCKER"):
        os.environ["DOCKER_HOST"] = os.environ["DEV_DOCKER"]
        yield None
        return
    daemon = engine.Dockerd(bridges=True)
    try:
        os.environ["DOCKER_HOST"] = daemon.host
        images.stand_ins()
        images.ours()
        yield daemon
    finally:
        daemon.stop()
