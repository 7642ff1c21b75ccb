"""deploy/fleet: the fleet's image, its compose file as it is on a daemon that it is given the socket of, and an example of each pattern."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from pathlib import Path

import engine
import images
import outside
import pytest
from harness import wait_for
from test_images import config, dockers_own, files

FLEET = images.DEPLOY / "fleet"
EXAMPLES = [*sorted(FLEET.glob("*.toml")), *sorted(FLEET.glob("patterns/*.toml"))]


@pytest.fixture(scope="module")
def image(dockerd) -> str:
    if not images.is_static(outside.binary()):
        pytest.skip("the fleet's image is the binary alone, and this one is not static")
    return images.FLEET


def said(*words: object, code: int = 0, **env: str) -> str:
    done = subprocess.run([outside.binary(), *map(str, words)], capture_output=True, text=True, env=os.environ | env, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_has_no_mistake_and_asks_for_nothing_that_cannot_be(example: Path):
    assert "no mistake" in said("check", "--elsewhere", "--config", example)
    planned = said("plan", "--elsewhere", "--config", example)
    assert "USD an hour" in planned and "REFUSED" not in planned
    # What it says it is.
    if example.parent.name == "patterns":
        assert f'pattern = "{example.stem}"' in said("check", "--print", "--elsewhere", "--config", example)


def test_there_is_an_example_of_each_pattern():
    assert {path.stem for path in EXAMPLES if path.parent.name == "patterns"} == {"ephemeral", "long-running", "hybrid", "shared"}


def test_the_image_is_the_binary_and_nothing_else(image: str):
    ours = {file.name: file for file in files(image) if not dockers_own(file.name)}
    assert {name for name, file in ours.items() if file.isfile()} == {"agent-fleet"}
    assert (ours["var/lib/agent-fleet"].uid, ours["var/lib/agent-fleet"].mode & 0o777) == (10001, 0o700)
    assert config(image)["Config"]["User"] == "10001:10001"
    version = engine.docker("run", "--rm", "--network", "none", image, "--version").stdout
    assert config(image)["Config"]["Labels"]["org.opencontainers.image.version"] in version


def test_one_that_does_not_answer_is_unhealthy(image: str):
    probe = config(image)["Config"]["Healthcheck"]["Test"][2:]
    assert engine.docker("run", "--rm", "--network", "none", image, *probe, check=False).returncode == 1


def test_a_session_is_made_by_the_fleet_of_the_compose_file(image: str, tmp_path: Path):
    """As the file's head says it, but for what it stands beside: a copy, whose secrets are here."""
    for name in ("compose.yaml", "compose.toml"):
        (tmp_path / name).write_text((FLEET / name).read_text())
    (tmp_path / "secrets").mkdir()
    for name, secret in {"ops": outside.TOKENS["ops"], "anthropic_api_key": "sk-ant-test-of-the-fleet"}.items():
        (tmp_path / "secrets" / name).write_text(secret)
        os.chown(tmp_path / "secrets" / name, 10001, -1)
        (tmp_path / "secrets" / name).chmod(0o400)
    socket = os.environ["DOCKER_HOST"].removeprefix("unix://")
    assert stat.S_ISSOCK(os.stat(socket).st_mode)
    env = os.environ | {"DOCKER_SOCKET": socket, "DOCKER_GROUP": str(os.stat(socket).st_gid), "COMPOSE_PROJECT_NAME": "fleet"}

    def compose(*words: str) -> str:
        done = subprocess.run(["docker-compose", *words], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    name = ""
    try:
        compose("up", "--detach")
        name = compose("ps", "--quiet", "fleet").strip()
        wait_for("health", lambda: config(name)["State"]["Health"]["Status"] == "healthy", 120)
        fleet = {"AGENT_FLEET_URL": "http://127.0.0.1:9490", "AGENT_FLEET_TOKEN": outside.TOKENS["ops"]}
        # It has been up: what its CLI says then, without anybody to ask, is not the fleet's.
        made = json.loads(said("create", "task", "--id", "one", "--tenant", "acme", **fleet))
        assert made["provider"] == "local"
        phases = lambda: {one["phase"] for one in [json.loads(said("show", "one", **fleet))]}  # noqa: E731
        wait_for("it to be up", lambda: phases() & {"ready", "active", "idle"}, 120)
        container = engine.docker("ps", "--quiet", "--filter", "label=agent-fleet.fleet=compose").stdout.strip()
        host = config(container)["HostConfig"]
        assert not host["Privileged"] and not any("docker.sock" in bind for bind in host["Binds"] or [])
        said("destroy", "one", "--wait", **fleet)
        assert engine.docker("ps", "--all", "--quiet", "--filter", "label=agent-fleet.fleet=compose").stdout == ""
        # Nothing but its store is written, and it ends when it is told.
        assert config(name)["HostConfig"]["ReadonlyRootfs"]
        engine.docker("stop", "--time", "30", name)
        assert config(name)["State"]["ExitCode"] == 0
    finally:
        if name:
            print(engine.docker("logs", name, check=False).stderr)
        subprocess.run(["docker-compose", "down", "--volumes", "--timeout", "5"], cwd=tmp_path, env=env, capture_output=True, timeout=300)
