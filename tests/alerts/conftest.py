"""The live tests' harness is used here, too; and as there, the real CLI must not reach anybody."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

for suite in ["live", "fleet"]:
    # Without the conftest of the other's.
    sys.path.append(str(Path(__file__).resolve().parents[1] / suite))


def pytest_configure(config: pytest.Config) -> None:
    interfaces = [line.split(":")[0].strip() for line in Path("/proc/net/dev").read_text().splitlines()[2:]]
    if interfaces != ["lo"] and not config.option.collectonly:
        pytest.exit("not in a namespace with loopback alone; start the tests with tests/alerts/run", returncode=4)
