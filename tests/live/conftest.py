"""Fixtures of the live tests: an API and a CLI per test, gone at its end."""

from __future__ import annotations

from pathlib import Path

import harness
import pytest


def pytest_configure(config: pytest.Config) -> None:
    # The real CLI must not reach anybody.
    interfaces = [line.split(":")[0].strip() for line in Path("/proc/net/dev").read_text().splitlines()[2:]]
    if interfaces != ["lo"] and not config.option.collectonly:
        pytest.exit("not in a namespace with loopback alone; start the tests with tests/live/run", returncode=4)


@pytest.fixture(params=["new", "old"])
def version(request: pytest.FixtureRequest) -> str:
    if not harness.cli(request.param).exists():
        pytest.fail(f"no CLI at {harness.cli(request.param)}; run tests/install or set CLAUDE_{request.param.upper()}")
    return request.param


@pytest.fixture
def api(tmp_path: Path):
    """Starts an API with a script."""
    started = []

    def start(script: dict) -> harness.Api:
        started.append(harness.Api(script, tmp_path / f"api{len(started)}"))
        return started[-1]

    yield start
    for one in started:
        one.close()


@pytest.fixture
def session(tmp_path: Path, version: str):
    """Starts the CLI, bare or behind a `harness.Sidecar`."""
    started = []

    def start(api: harness.Api, *args: str, sidecar: harness.Sidecar | None = None, home: Path | None = None, **env: str) -> harness.Session:
        wrapper = sidecar.argv if sidecar else []
        argv = [*wrapper, harness.cli(version), *harness.STREAM_JSON, *args]
        started.append(harness.Session(argv, api, home or tmp_path / "home", **env))
        return started[-1]

    yield start
    for one in started:
        one.kill()


@pytest.fixture
def sidecar(tmp_path: Path):
    """A wrapper with flags, to be given to `session`."""
    return lambda *flags: harness.Sidecar(tmp_path, *flags)


@pytest.fixture
def collector():
    """Starts a collector of HTTP requests, with manners."""
    started = []

    def start(**how) -> harness.Collector:
        started.append(harness.Collector(**how))
        return started[-1]

    yield start
    for one in started:
        one.close()
