"""The fleet's document of its own API, by schemathesis: what it says is asked for and refused is so, whatever is asked, and nothing makes it answer 5xx."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import harness
import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "fleet"))

import outside  # noqa: E402

TOOL = Path(os.environ.get("SCHEMATHESIS", harness.ROOT / ".cache/schemathesis/venv/bin/schemathesis"))
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,missing_required_header,unsupported_method,use_after_free,ignored_auth"


@pytest.fixture
def fleet(tmp_path):
    one = outside.Outside(tmp_path, harness.binary(), harness.free_port())
    try:
        yield one.start()
    finally:
        one.close()


def test_the_api_is_what_its_document_says(fleet, tmp_path):
    # Something to be asked about, among it what hooks were told in vain.
    assert fleet.create("task", "a") == 201 and fleet.create("stays", "b") == 201
    fleet.reaches("b", "ready", "active", "idle")
    argv = [TOOL, "run", f"{fleet.url}/openapi.json", "--checks", CHECKS, "--phases", "examples,coverage,fuzzing", "--max-examples", "15", "--seed", "1",
            # Its answer has no end.
            "--exclude-path", "/v1/events", "--header", f"Authorization: Bearer {outside.TOKENS['ops']}", "--continue-on-failure", "--no-color"]  # fmt: skip
    done = subprocess.run([str(word) for word in argv], cwd=tmp_path, capture_output=True, text=True, timeout=600, env={**os.environ, "HOME": str(tmp_path)})
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) generated, \d+ passed", done.stdout)[1]) > 100, done.stdout[-2000:]
    assert fleet.ask("/readyz")[0] == 200
