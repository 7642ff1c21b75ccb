"""The images of deploy/docker."""

from __future__ import annotations

import io
import json
import re
import subprocess
import tarfile
from pathlib import Path

import engine
import images
import pytest
from harness import wait_for

pytestmark = pytest.mark.usefixtures("dockerd")


def config(image: str) -> dict:
    return json.loads(engine.docker("inspect", image).stdout)[0]


def files(image: str) -> list[tarfile.TarInfo]:
    """What a container of it has."""
    return exported(engine.docker("create", image).stdout.strip())


def exported(name: str) -> list[tarfile.TarInfo]:
    try:
        out = subprocess.run(["docker", "export", name], capture_output=True, check=True).stdout
        with tarfile.open(fileobj=io.BytesIO(out)) as tar:
            return tar.getmembers()
    finally:
        engine.docker("rm", name)


def test_what_is_sent_to_be_built_is_the_source_and_nothing_else(tmp_path: Path):
    """Beside it here are a target of gigabytes, CLIs, and what nobody should have in an image."""
    assert (images.ROOT / ".cache").exists() and (images.ROOT / "docs").exists()
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY . /context/\n")
    engine.docker("build", "--network", "none", "-f", tmp_path / "Dockerfile", "-t", "context:test", images.ROOT, timeout=300)
    try:
        # An image without a command makes no container otherwise.
        name = engine.docker("create", "context:test", "none").stdout.strip()
        sent = [file for file in exported(name) if file.isfile() and file.name.startswith("context/")]
    finally:
        engine.docker("rmi", "--force", "context:test")
    assert {file.name.split("/")[1] for file in sent} == {"Cargo.lock", "Cargo.toml", "LICENSE", "sidecar"}
    assert not any({"target", "node_modules", ".git", ".cache"} & set(file.name.split("/")) for file in sent)
    # Recordings are most of it.
    assert 1_000_000 < sum(file.size for file in sent) < 20_000_000


def dockers_own(name: str) -> bool:
    """What docker itself lays into every container."""
    return bool(re.fullmatch(r"(\.dockerenv|dev|etc|proc|sys)(/.*)?", name))


def test_the_sidecars_image_is_the_binary_and_nothing_else():
    ours = {file.name: file for file in files(images.SIDECAR) if not dockers_own(file.name)}
    assert {name for name, file in ours.items() if file.isfile()} == {"agent-sidecar"}
    for directory in ("run/agent-sidecar", "var/lib/agent-sidecar"):
        assert (ours[directory].uid, ours[directory].mode & 0o777) == (10001, 0o700)


@pytest.mark.parametrize("image", [images.SIDECAR, images.AGENT])
def test_an_image_is_nobody_privileged(image: str):
    assert config(image)["Config"]["User"] == "10001:10001"


def test_the_sidecars_image_says_what_it_is():
    labels = config(images.SIDECAR)["Config"]["Labels"]
    version = engine.docker("run", "--rm", "--network", "none", images.SIDECAR, "version").stdout
    assert labels["org.opencontainers.image.version"] in version
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"


def test_the_sidecar_runs_where_nothing_can_be_written():
    flags = ["--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--network", "none", "--tmpfs", "/run/agent-sidecar:uid=10001"]
    name = engine.docker("run", "--detach", *flags, images.SIDECAR).stdout.strip()
    try:
        wait_for("health", lambda: config(name)["State"]["Health"]["Status"] == "healthy", 120)
        engine.docker("stop", "--time", engine.GRACE, name)
        assert config(name)["State"]["ExitCode"] == 0
    finally:
        engine.docker("rm", "--force", name)


def test_a_sidecar_that_does_not_answer_is_unhealthy():
    said = engine.docker("run", "--rm", "--network", "none", images.SIDECAR, *config(images.SIDECAR)["Config"]["Healthcheck"]["Test"][2:], check=False)
    assert said.returncode == 1, said.stdout + said.stderr


def test_every_cli_of_the_agents_image_is_behind_the_sidecar():
    flags = ["--rm", "--network", "none", "--entrypoint", "agent-sidecar"]
    said = json.loads(engine.docker("run", *flags, images.AGENT, "doctor", "--format", "json", timeout=300).stdout)
    assert said["broken"] == 0, said
    clis = [finding for finding in said["findings"] if finding["check"] == "cli"]
    assert [finding["level"] for finding in clis] == ["fine"] and "a shim" in clis[0]["what"], clis
