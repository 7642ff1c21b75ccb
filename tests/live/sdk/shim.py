"""What both SDKs' tests share: the executable that an SDK is given as its CLI, what the API says, and what of a message must be equal."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import harness
import pytest

USAGE = {
    "input_tokens": 11,
    "output_tokens": 130,
    "cache_read_input_tokens": 5000,
    "cache_creation": {"ephemeral_5m_input_tokens": 700, "ephemeral_1h_input_tokens": 90},
}
FREE = {kind: 0 for kind in USAGE if kind.endswith("tokens")} | {"cache_creation": {}}
# Says that it runs, and never ends.
ENDLESS = "touch started; exec tail -f /dev/null"


def bash(command: str) -> dict:
    return {"tool": "Bash", "input": {"command": command, "description": "a step"}}


def main(results: int, *blocks, **when) -> dict:
    return {"when": {"agent": "main", "results": results, **when}, "reply": {"blocks": list(blocks)}}


RULES = {
    "plain": [],
    "one_shot": [main(0, bash("echo 1")), main(1, "and", bash("echo 2"))],
    "turns": [main(0, bash("echo a step"))],
    "permissions": [main(0, bash("touch allowed")), main(1, bash("touch denied"))],
    "hooks": [main(0, bash("echo fine")), main(1, bash("echo refused"))],
    "mcp": [main(0, {"tool": "mcp__sums__add", "input": {"a": 19, "b": 23}})],
    # Told another model, a newer CLI asks it for a word first, to see that it is there; that is in none of its sums.
    "control": [{"when": {"stream": False}, "reply": {"blocks": ["y"], "usage": FREE}}],
    "resume": [main(0, bash("echo a step"), turn=1)],
    "partial": [main(0, {"thinking": "Hm."}, "Well,", bash("echo 1"))],
    # Whoever is to end it has time for that.
    "unhurried": [main(n, bash(f"python3 -c 'import time; time.sleep(3)'; echo {n}")) for n in range(2)],
    "spawned": [main(0, bash("echo $OF_THE_APP"))],
    # An answer and its result are lines of more than a megabyte.
    "large": [{"reply": {"blocks": ["wörd " * 300_000], "pace": {"chunk": 100_000}}}],
    "refused": [],
    "interrupt": [main(0, bash(ENDLESS), prompt_contains="forever")],
    # The older CLI, told to end, may take the killed tool's result to the model, and be gone before it says what that cost: nothing, here.
    "abort": [main(0, bash(ENDLESS)), {"when": {"agent": "main", "results": 1}, "reply": {"blocks": ["ended"], "usage": FREE}}],
}


def script(scenario: str) -> dict:
    return {"defaults": {"usage": USAGE}, "rules": RULES[scenario], "otherwise": {"blocks": ["done"]}}


def processes(home: Path) -> dict[int, str]:
    """What is alive of a session: whatever was started with its home, in whichever process group."""
    wanted = f"HOME={home}".encode()
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if int(process.name) != os.getpid() and wanted in (process / "environ").read_bytes().split(b"\0"):
                found[int(process.name)] = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:120]
        except OSError:
            continue  # It ended meanwhile.
    return found


def ended(home: Path) -> None:
    """Then its books are closed: an SDK lets go of a CLI that has not ended yet."""
    harness.wait_for("end of all processes", lambda: not processes(home))


class Run:
    """One session of an SDK in a home of its own. `path` is what the SDK starts: the CLI itself, or a script that wraps it."""

    def __init__(self, directory: Path, api: harness.Api, version: str, wrapper: list | None):
        self.api = api
        self.home = directory
        self.work = directory / "work"
        self.work.mkdir(parents=True)
        self.environment = harness.environment(api, self.home)
        self.path = harness.cli(version)
        if wrapper is not None:
            words = shlex.join(str(word) for word in [*wrapper, self.path])
            self.path = directory / "claude"
            self.path.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
            self.path.chmod(0o755)

    def processes(self) -> dict[int, str]:
        return processes(self.home)

    def started(self) -> bool:
        """Whether the endless tool call runs."""
        return (self.work / "started").exists()


def totals(sidecar: harness.Sidecar) -> dict:
    """What the ledger file sums to, by the binary's own reading of it."""
    command = [harness.binary(), "replay", "--format", "json", "--ledger", sidecar.ledger_file]
    return json.loads(subprocess.check_output(command, timeout=60))["totals"]


def spent(sidecar: harness.Sidecar) -> float:
    return totals(sidecar)["cost_usd"]


def check_spent_or_estimated(sidecar: harness.Sidecar, api: harness.Api, version: str) -> None:
    """Of a CLI that ended before it could be asked, all but the output is on record; that is an estimate, and said to be one."""
    sums = totals(sidecar)
    if not sums["cost_estimated"]:
        assert sums["cost_usd"] == pytest.approx(api.cost_usd(version), abs=1e-9)
        return
    (served,) = api.tokens().values()
    assert [sums["tokens"][kind] for kind in ["input", "cache_read"]] == [served[kind] for kind in ["input", "cache_read"]]
    assert 0 < sums["tokens"]["output"] <= served["output"]
    assert 0 < sums["cost_usd"] <= api.cost_usd(version)


# Of a run, not of what was said.
OF_A_RUN = re.compile(r"uuids?$|_ids?$|^id$|timestamp|duration|(^|_)ms$|_time$|messaging_socket_path|^pid$", re.IGNORECASE)
IDS = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|\b(toolu|msg|req)_[A-Za-z0-9_]+")


def plain(value: object, home: Path) -> object:
    """Without ids, times, durations, and where it ran."""
    if isinstance(value, dict):
        return {key: plain(inner, home) for key, inner in value.items() if not OF_A_RUN.search(key)}
    if isinstance(value, list):
        return [plain(inner, home) for inner in value]
    if isinstance(value, str):
        dashed = re.sub(r"[^A-Za-z0-9]", "-", str(home))
        return IDS.sub("ID", value.replace(str(home), "HOME").replace(dashed, "HOME"))
    return value


def control(flag: str, socket: str, *words: str) -> None:
    """Asks the hub at a socket."""
    subprocess.run([harness.binary(), "control", *words, flag, socket], stdout=subprocess.DEVNULL, check=True)
