"""What `kubectl kustomize` makes of an overlay."""

from __future__ import annotations

import copy
import functools
import os
import subprocess
from pathlib import Path

import images
import yaml

KUBERNETES = images.DEPLOY / "kubernetes"
OVERLAYS = sorted(path.parent.name for path in KUBERNETES.glob("overlays/*/kustomization.yaml"))
TOOLS = images.ROOT / ".cache/deploy"
KUBECTL = Path(os.environ.get("KUBECTL", TOOLS / "kubectl"))


@functools.cache
def text(path: str) -> str:
    done = subprocess.run([KUBECTL, "kustomize", KUBERNETES / path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout


def build(overlay: str) -> list[dict]:
    return copy.deepcopy(list(yaml.safe_load_all(text(f"overlays/{overlay}"))))
