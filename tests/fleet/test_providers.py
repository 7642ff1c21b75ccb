"""The providers' own tests, which are Rust's, against a real daemon."""

from __future__ import annotations

import os
import subprocess

import pytest
from conftest import gvisor_starts

BINARY = os.environ.get("AGENT_FLEET_TEST_BINARY", "")
GVISOR = "gvisor_does_what_every_provider_must"
# As long as the suite of conformance waits for one case, and for some more of them.
MOST = 900


def names() -> list[str]:
    if not BINARY:
        return []
    listed = subprocess.run([BINARY, "--list", "--format=terse"], capture_output=True, text=True, check=True).stdout
    # The longest first, for two that share the work.
    return sorted((line.removesuffix(": test") for line in listed.splitlines()), key=lambda name: name != GVISOR)


def test_there_are_tests() -> None:
    assert GVISOR in names() and len(names()) > 5, "AGENT_FLEET_TEST_BINARY is not the docker tests of agent-fleet: tests/fleet/run builds them"


@pytest.mark.parametrize("name", names())
def test_provider(name: str, environment: dict[str, str]) -> None:
    if name == GVISOR:
        if why := gvisor_starts():
            pytest.skip(f"gVisor does not start here: {why}")
        environment["AGENT_FLEET_TEST_GVISOR"] = "1"
    done = subprocess.run([BINARY, name, "--exact", "--nocapture"], capture_output=True, text=True, env=environment, timeout=MOST)
    print(done.stderr)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    assert "1 passed" in done.stdout and "not tried" not in done.stderr
