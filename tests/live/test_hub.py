"""Several real CLIs that share an address and a budget."""

from __future__ import annotations

import json
import socket
import subprocess
from pathlib import Path

import harness
from harness import wait_for
from test_bare import TOOLS, script


def post(path: Path, request: str) -> str:
    with socket.socket(socket.AF_UNIX) as hub:
        hub.connect(str(path))
        hub.sendall(f"POST {request} HTTP/1.1\r\nHost: hub\r\nConnection: close\r\n\r\n".encode())
        return hub.makefile().readline()


def test_two_are_served_as_one_and_share_a_budget_that_can_be_raised(version, api, session, sidecar, tmp_path):
    served = api(script())
    flags = ("--socket", str(tmp_path / "hub.sock"), "--hub-control", "--container-max-cost-usd", "0.03")
    # They write the same ledger, too.
    first, second = sidecar(*flags), sidecar(*flags)
    one, other = session(served, *TOOLS, sidecar=first), session(served, *TOOLS, sidecar=second)
    clis = [one, other]
    refused = None
    for turn in range(20):
        result = clis[turn % 2].ask("go")
        if "shares with others" in str(result.get("result")):
            refused = clis[turn % 2]
            break
    assert refused, "the money is used up at some time"
    asked = len(served.requests())
    again = refused.ask("and now?")
    assert again["num_turns"] == 0 and "shares with others" in again["result"]
    assert len(served.requests()) == asked, "nothing was asked of the model"

    def books() -> float:
        argv = [harness.binary(), "replay", "--ledger", "--format", "json", first.ledger_file]
        out = subprocess.run(argv, capture_output=True, check=True)
        return json.loads(out.stdout)["totals"]["cost_usd"]

    def shown() -> float:
        return sum(value for name, value in first.metrics().items() if name.startswith("claude_agent_cost_usd_total"))

    # The second has no page of its own: it is served with the first.
    wait_for("both in the sum", lambda: abs(shown() - books()) < 1e-9 and first.metrics()['agent_sidecar_hub_wrappers{state="live"}'] == 2)
    assert len(first.status()["sessions"]) == 2
    assert "200" in post(tmp_path / "hub.sock", "/v1/budgets/container?usd=5")
    wait_for("the same session to go on", lambda: "shares with others" not in str(refused.ask("once more")["result"]))
    assert len(served.requests()) > asked
    for cli in clis:
        cli.close()
