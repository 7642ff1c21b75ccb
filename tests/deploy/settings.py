"""Whether the sidecar understands what an example gives it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import harness

# What `run` and `hub` take before the command, and the CLI after it.
OWN = "AGENT_SIDECAR_"


def check(environment: dict[str, str], config: Path | None = None, flags: list[str] = ()) -> str:
    """`agent-sidecar check` with that file, those variables, and the flags that `run` was given; fails on any mistake and on any warning."""
    known = {name: value for name, value in environment.items() if name.startswith((OWN, "OTEL_"))}
    argv = [harness.binary(), "check", *flags, *(["--config", config] if config else [])]
    done = subprocess.run([str(word) for word in argv], env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", **known}, capture_output=True, text=True, timeout=60)
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "warning" not in said.lower(), said
    return said
