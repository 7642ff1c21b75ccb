"""Both SDKs and a shell find a CLI by themselves, and `install` has put the sidecar in its place: nobody can tell but the ledger.

The SDKs are copies: nothing below .cache is changed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import claude_agent_sdk
import harness
import pytest
from sdk import shim
from test_sdk_python import PATIENCE, SCENARIOS

HERE = Path(__file__).parent
PYTHON = harness.ROOT / ".cache/venv/bin/python"
MODULES = harness.ROOT / ".cache/sdk-ts/node_modules"
PLATFORM = "@anthropic-ai/claude-agent-sdk-linux-x64"


class Sdk:
    """A copy of an SDK, the CLI that it brings, and how a scenario is started with it."""

    def __init__(self, root: Path, cli: Path, argv: list, environment: dict):
        self.root, self.cli, self.argv, self.environment = root, cli, argv, environment

    def sidecar(self, *words: str) -> str:
        done = subprocess.run([harness.binary(), *words, self.root], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def run(self, scenario: str, run: shim.Run, **environment: str) -> list:
        """What the caller saw."""
        argv = [*self.argv[:-1], scenario, *self.argv[-1], run.work]
        done = subprocess.run(argv, env={**run.environment, **self.environment, **environment}, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, timeout=PATIENCE)
        assert done.returncode == 0
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        assert not any(isinstance(line, dict) and line["type"] == "thrown" for line in lines)
        return lines


def python_sdk(root: Path, version: str) -> Sdk:
    package = root / "claude_agent_sdk"
    shutil.copytree(Path(claude_agent_sdk.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__", "claude"))
    found = package / "_bundled/claude"
    shutil.copy2(harness.cli(version), found)
    path = os.pathsep.join(map(str, [root, HERE]))
    return Sdk(root, found, [PYTHON, HERE / "sdk/own_lookup.py", []], {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"})


def typescript_sdk(root: Path, version: str) -> Sdk:
    modules = root / "node_modules"
    for package in [*MODULES.iterdir(), *(MODULES / "@anthropic-ai").iterdir()]:
        copied = modules / package.relative_to(MODULES)
        copied.parent.mkdir(parents=True, exist_ok=True)
        if package.name == "claude-agent-sdk":
            shutil.copytree(package, copied)
        elif package.name not in ["@anthropic-ai", Path(PLATFORM).name]:
            copied.symlink_to(package)
    found = modules / PLATFORM / "claude"
    found.parent.mkdir()
    shutil.copy2(MODULES / PLATFORM / "package.json", found.parent)
    shutil.copy2(harness.cli(version), found)
    return Sdk(root, found, ["node", HERE / "sdk/session.mjs", [""]], {"SDK_MODULES": str(modules)})


@pytest.fixture(scope="module")
def sdk(tmp_path_factory):
    """A copy for each SDK and release; 400 MB each, so they go with the tests."""
    made: dict[tuple, Sdk] = {}

    def sdk(language: str, version: str) -> Sdk:
        if (language, version) not in made:
            root = tmp_path_factory.mktemp(f"{language}-{version}")
            made[language, version] = {"python": python_sdk, "typescript": typescript_sdk}[language](root, version)
        return made[language, version]

    yield sdk
    for one in made.values():
        shutil.rmtree(one.root)


@pytest.mark.parametrize("language", ["python", "typescript"])
@pytest.mark.parametrize("name", SCENARIOS)
def test_the_caller_sees_the_same(name, language, version, sdk, api, sidecar, tmp_path):
    found = sdk(language, version)
    # An own copy of the release, as a stranger would have it.
    before = found.cli.stat()
    bare, wrapped = (shim.Run(tmp_path / how, api(shim.script(name)), version, None) for how in ["bare", "wrapped"])
    expected = found.run(name, bare)
    wrapper = sidecar()
    assert "installed" in found.sidecar("install")
    try:
        assert "in place" in found.sidecar("install")
        seen = found.run(
            name, wrapped, AGENT_SIDECAR_LEDGER=str(wrapper.ledger_file), AGENT_SIDECAR_LISTEN=f"127.0.0.1:{wrapper.port}"
        )
        version_said = subprocess.check_output([found.cli, "--version"], text=True, env=wrapped.environment, timeout=60)
        assert version_said.endswith("(Claude Code)\n")
    finally:
        assert "restored" in found.sidecar("uninstall")
    assert shim.plain(seen, wrapped.home) == shim.plain(expected, bare.home)
    shim.ended(wrapped.home)
    assert len(wrapped.api.requests()) == SCENARIOS[name][1]
    assert shim.spent(wrapper) == pytest.approx(wrapped.api.cost_usd(version), abs=1e-9)
    assert len({line["session_id"] for line in wrapper.ledger() if line.get("session_id")}) == 1
    after = found.cli.stat()
    kept = ["st_ino", "st_mode", "st_uid", "st_gid", "st_size", "st_mtime_ns", "st_nlink"]
    assert [getattr(after, field) for field in kept] == [getattr(before, field) for field in kept]


def test_pip_has_nothing_to_complain_about(tmp_path):
    environment = tmp_path / "venv"
    subprocess.run([PYTHON, "-m", "venv", "--without-pip", environment], check=True, timeout=60)
    (site,) = environment.glob("lib/python*/site-packages")
    source = Path(claude_agent_sdk.__file__).parent
    (metadata,) = source.parent.glob("claude_agent_sdk-*.dist-info")
    shutil.copytree(source, site / source.name)
    shutil.copytree(metadata, site / metadata.name)

    def pip(*words: str) -> tuple[int, str]:
        command = [PYTHON, "-m", "pip", "--disable-pip-version-check", "--python", environment / "bin/python", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        return done.returncode, done.stdout

    before = pip("check"), pip("list")
    install = subprocess.run([harness.binary(), "install", environment], capture_output=True, text=True, timeout=60)
    assert install.returncode == 0, install.stdout
    assert (pip("check"), pip("list")) == before
    assert pip("uninstall", "-y", "claude-agent-sdk")[0] == 0
    left = [path.relative_to(site) for path in site.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert left == [Path("claude_agent_sdk/_bundled/claude.sidecar-real")]
    shutil.rmtree(environment)


def test_npm_has_nothing_to_complain_about(sdk, version):
    found = sdk("typescript", version)
    npm = lambda: subprocess.run(["npm", "ls", "--all"], cwd=found.root, capture_output=True, text=True, timeout=120).stdout
    before = npm()
    assert PLATFORM in before
    found.sidecar("install")
    try:
        assert npm() == before
    finally:
        found.sidecar("uninstall")
