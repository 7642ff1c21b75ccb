"""The real CLI as another user than the wrapper: what it is allowed as root's guest, and what its tools are kept from."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import harness
import pytest
from harness import wait_for
from sdk import shim
from test_bare import TOOLS, bash, main, script

NOBODY = 65534

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can start something as another user")


@pytest.fixture
def home():
    """A directory that another user may reach; pytest's own are its user's alone."""
    made = Path(tempfile.mkdtemp(prefix="agent-sidecar-user-"))
    made.chmod(0o755)
    for name in ["", "work"]:
        (made / "home" / name).mkdir(exist_ok=True)
        os.chown(made / "home" / name, NOBODY, NOBODY)
    yield made / "home"
    shim.ended(made / "home")
    shutil.rmtree(made)


def steps(*commands: str) -> dict:
    return script(*(main(n, bash(command)) for n, command in enumerate(commands)))


def alone(guarded: harness.Sidecar) -> harness.Sidecar:
    """In sight of its own processes only: other tests have CLIs, too."""
    guarded.argv = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", *guarded.argv]
    return guarded


def heard(cli: harness.Session) -> list[str]:
    """What the tools answered."""
    content = [block for line in cli.lines if line["type"] == "user" for block in line["message"]["content"] if isinstance(block, dict)]
    return [str(block["content"]) for block in content if block.get("type") == "tool_result"]


def test_root_may_have_its_agent_skip_permissions_when_it_is_another_user(version, api, home, session, sidecar):
    wrapper = "$(ps -o ppid= -p $PPID | tr -d ' ')"
    commands = ["id -u; sudo -n id -u 2>&1 || true", f"kill -9 {wrapper}", f"cat /proc/{wrapper}/environ", "rg --version | head -1"]
    served = api(steps(*commands))
    refused = session(served, "--dangerously-skip-permissions", sidecar=sidecar(), home=home, IS_SANDBOX="0")
    assert refused.close() == 1
    shutil.rmtree(home / ".claude", ignore_errors=True)
    guarded = alone(sidecar("--user", str(NOBODY), "--patrol"))
    cli = session(served, "--dangerously-skip-permissions", sidecar=guarded, home=home, IS_SANDBOX="0", AGENT_SIDECAR_OTLP_HEADERS="x=secret")
    result = cli.ask("go")
    assert result["subtype"] == "success", cli.tail()
    said = heard(cli)
    assert said[0].startswith(str(NOBODY)) and "\n0" not in said[0]
    assert "not permitted" in said[1].lower(), said
    assert "permission denied" in said[2].lower(), said
    assert guarded.metrics()["agent_sidecar_unwrapped_processes"] == 0
    assert cli.close() == 0
    argv = [harness.binary(), "replay", "--ledger", "--format", "json", guarded.ledger_file]
    booked = json.loads(subprocess.run(argv, capture_output=True, check=True).stdout)["totals"]["cost_usd"]
    assert abs(booked - served.cost_usd(version)) < 1e-9


def test_a_shared_budget_is_refused_by_a_cli_that_cannot_look_where_wrappers_meet(version, api, home, session, sidecar, tmp_path):
    served = api(script())
    cli = session(served, *TOOLS, sidecar=sidecar("--user", str(NOBODY), "--socket", str(tmp_path / "hub.sock"), "--container-max-cost-usd", "0.03"), home=home)
    for _ in range(20):
        result = cli.ask("go")
        if "shares with others" in str(result.get("result")):
            break
    asked = len(served.requests())
    again = cli.ask("and now?")
    assert again["num_turns"] == 0 and "shares with others" in again["result"], again
    assert len(served.requests()) == asked
    # Its own: other tests have some, too.
    opened = {Path(os.path.realpath(fd)) for fd in Path(f"/proc/{cli.process.pid}/fd").iterdir()}
    [hold] = [path for path in opened if path.name.startswith("agent-sidecar-hold-")]
    assert hold.exists()
    assert cli.close() == 0
    assert not hold.exists(), "nothing is left"


def test_a_cli_that_cannot_look_where_wrappers_meet_can_be_paused(version, api, home, session, sidecar, tmp_path):
    served = api(script())
    place = ("--socket", str(tmp_path / "hub.sock"))
    cli = session(served, *TOOLS, sidecar=sidecar("--user", str(NOBODY), *place, "--hub-control"), home=home)
    assert cli.ask("go")["subtype"] == "success"

    def after(order: str, paused: bool) -> None:
        subprocess.run([harness.binary(), "control", order, *place], capture_output=True, check=True)
        wait_for(order, lambda: ("is paused" in str(cli.ask("go").get("result"))) == paused, 60)

    after("pause", True)
    after("resume", False)
    assert cli.close() == 0


def test_a_cli_that_the_agent_starts_itself_is_seen(version, api, home, session, sidecar):
    second = f"{harness.cli(version)} -p hi >/dev/null 2>&1 &\nsleep 1"
    # The second one asks, too, and waits for an answer.
    first = {"times": 1, **main(0, bash(second))}
    served = api(script(first, main(1, bash("timeout 100 tail -f /dev/null")), {"when": {"agent": "main", "results": 0}, "reply": {"hang": True}}))
    guarded = alone(sidecar("--user", str(NOBODY), "--patrol"))
    cli = session(served, "--dangerously-skip-permissions", sidecar=guarded, home=home, IS_SANDBOX="0")
    cli.send(harness.user("go"))
    wait_for("the page", lambda: harness.listens(guarded.port))
    wait_for("the second CLI to be seen", lambda: guarded.metrics()["agent_sidecar_unwrapped_processes"] == 1, 90)
