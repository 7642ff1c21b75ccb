from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / place) for place in ["tests/alerts", "dashboards", "tests/fleet", "tests/live"]]


def pytest_configure(config: pytest.Config) -> None:
    # The real CLI must not reach anybody.
    interfaces = [line.split(":")[0].strip() for line in Path("/proc/net/dev").read_text().splitlines()[2:]]
    if interfaces != ["lo"] and not config.option.collectonly:
        pytest.exit("not in a namespace with loopback alone; start the tests with tests/dashboards/run", returncode=4)
