"""One app, several tenants: the real CLI and both SDKs, with a directory, series and a budget for each."""

from __future__ import annotations

import asyncio
import json
import subprocess
from pathlib import Path

import harness
import pytest
from claude_agent_sdk import ClaudeAgentOptions, ResultMessage, query
from harness import wait_for
from sdk import shim

PATIENCE = 150
TENANTS = ["acme", "globex"]


async def python(run: shim.Run, env: dict) -> list:
    """Two agents of one app, at the same time."""

    async def of(customer: str) -> list:
        # The SDK adds these to its own environment, which is not the one that the test has made.
        options = ClaudeAgentOptions(cli_path=run.path, cwd=run.work, allowed_tools=["Bash"], env={**env, "CUSTOMER_ID": customer})
        messages = [message async for message in query(prompt="go", options=options)]
        return [message for message in messages if isinstance(message, ResultMessage)]

    results = await asyncio.gather(*map(of, TENANTS))
    return [result.subtype for messages in results for result in messages]


def typescript(run: shim.Run, env: dict) -> list:
    argv = ["node", Path(__file__).parent / "sdk/session.mjs", "tenants", run.path, run.work]
    out = subprocess.run(argv, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=PATIENCE, check=True)
    lines = [json.loads(line) for line in out.stdout.splitlines()]
    assert not [line for line in lines if line["type"] == "thrown"]
    return [line["subtype"] for line in lines if line["type"] == "result"]


@pytest.fixture
def hub(tmp_path):
    """Keeps the counts of agents that have ended."""
    port = harness.free_port()
    argv = [harness.binary(), "hub", "--listen", f"127.0.0.1:{port}", "--socket", tmp_path / "hub.sock"]
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
    wait_for("hub", lambda: harness.listens(port))
    yield port
    process.terminate()
    process.wait(30)


@pytest.mark.parametrize("language", ["python", "typescript"])
def test_the_environment_of_each_agent_says_whose_it_is(language, version, api, hub, tmp_path):
    served = api(shim.script("one_shot"))
    agents = tmp_path / "agents"
    flags = ["--tenant-from", "env:CUSTOMER_ID", "--agent-dirs", str(agents), "--tenant-max-cost-usd", "5"]
    wrapper = harness.Sidecar(tmp_path, "--socket", str(tmp_path / "hub.sock"), *flags)
    run = shim.Run(tmp_path / "home", served, version, wrapper.argv)
    if language == "python":
        outcomes = asyncio.run(asyncio.wait_for(python(run, run.environment), PATIENCE))
    else:
        outcomes = typescript(run, run.environment)
    assert outcomes == ["success"] * 2

    shim.ended(run.home)
    # Each has what it keeps in a place of its own, and nothing is anywhere else.
    sessions = {}
    for tenant in TENANTS:
        (transcript,) = agents.glob(f"{tenant}/_1/config/projects/*/*.jsonl")
        assert (agents / tenant / "_1/config/.claude.json").exists()
        sessions[tenant] = transcript.stem
    assert not (run.home / ".claude").exists() and not (run.home / ".claude.json").exists()

    lines = wrapper.ledger()
    for tenant, session in sessions.items():
        own = [line for line in lines if line.get("session_id") == session]
        assert own and all(line["tenant"] == tenant for line in own)
    shared = {(line["kind"], line["action"]) for line in lines if line["event"] == "tenant_conflict"}
    assert shared == {("cwd", "flagged")}, "both have the app's working directory, and only that"

    def cost(tenant: str) -> float:
        metrics = wrapper_metrics(hub)
        return sum(value for name, value in metrics.items() if name.startswith("claude_agent_cost_usd_total{") and f'tenant="{tenant}"' in name)

    booked = {tenant: sum(line["cost_usd"] for line in lines if line["event"] == "spent" and line["tenant"] == tenant) for tenant in TENANTS}
    wait_for("both in the sums", lambda: all(abs(cost(tenant) - booked[tenant]) < 1e-9 for tenant in TENANTS))
    assert sum(booked.values()) == pytest.approx(served.cost_usd(version), abs=1e-9)
    assert min(booked.values()) > 0
    (state,) = tmp_path.glob("hub.state/budgets.json")
    assert all(tenant in state.read_text() for tenant in TENANTS)


def wrapper_metrics(port: int) -> dict[str, float]:
    class Page(harness.Sidecar):
        def __init__(self):
            self.port = port

    return Page().metrics()


def test_the_first_message_says_whose_it_is(version, api, session, sidecar):
    served = api(shim.script("plain"))
    wrapper = sidecar("--tenant-from", "message:metadata.tenant", "--end-user-from", "message:metadata.user")
    cli = session(served, sidecar=wrapper)
    cli.send(harness.user("hello", metadata={"tenant": "acme", "user": "anna"}))
    assert cli.result()["subtype"] == "success"
    status = lambda: wrapper.status()["sessions"][0]
    wait_for("whose it is", lambda: (status()["tenant"], status()["user"]) == ("acme", "anna"))
    wait_for("the cost", lambda: 'claude_agent_cost_usd_total{' in wrapper.get("/metrics"))
    metrics = wrapper.metrics()
    assert all('tenant="acme"' in name for name in metrics if name.startswith("claude_agent_"))
    assert not [name for name in metrics if "anna" in name]
    assert cli.close() == 0
    lines = wrapper.ledger()
    assert lines and all((line["tenant"], line["user"]) == ("acme", "anna") for line in lines)
    assert shim.spent(wrapper) == pytest.approx(served.cost_usd(version), abs=1e-9)


def test_a_session_is_resumed_in_its_own_directory_and_by_its_own_tenant(version, api, session, sidecar, tmp_path):
    served = api(shim.script("plain"))
    agents = tmp_path / "agents"
    flags = ["--socket", str(tmp_path / "hub.sock"), "--agent-dirs", str(agents), "--tenant-guard", "enforce", "--agent-workspace", "always"]
    of = lambda tenant: sidecar("--tenant", tenant, *flags)
    first, second = session(served, sidecar=of("acme")), session(served, sidecar=of("acme"))
    ids = [cli.ask("hello")["session_id"] for cli in [first, second]]
    transcripts = lambda id: list(agents.glob(f"acme/*/config/projects/*/{id}.jsonl"))
    wait_for("both transcripts", lambda: all(map(transcripts, ids)))
    found = [transcripts(id)[0].relative_to(agents).parts[1] for id in ids]
    assert sorted(found) == ["_1", "_2"]
    for cli in [first, second]:
        assert cli.close() == 0
    resumed = session(served, "--resume", ids[1], sidecar=of("acme"))
    assert resumed.ask("go on")["session_id"] == ids[1]
    init = next(line for line in resumed.lines if line.get("subtype") == "init")
    assert init["cwd"] == str((agents / "acme" / found[1] / "workspace").resolve())
    assert resumed.close() == 0
    thief = session(served, "--resume", ids[1], sidecar=of("globex"))
    thief.process.stdin.close()
    assert thief.process.wait(60) == 125
    assert f"the session that it would go on with, {ids[1]}, is that of tenant `acme`" in thief.tail()
    asked = len(served.requests())
    assert asked == 3, "the thief has asked nobody"


def test_a_cli_that_was_replaced_by_the_shim_has_a_place_of_its_own(version, api, tmp_path):
    served = api(shim.script("plain"))
    (tmp_path / "claude").symlink_to(harness.binary())
    ledger, agents = tmp_path / "ledger.jsonl", tmp_path / "agents"
    settings = {
        "SHIM_CLI": harness.cli(version), "LEDGER": ledger, "LISTEN": f"127.0.0.1:{harness.free_port()}", "SOCKET": tmp_path / "hub.sock",
        "TENANT_FROM": "env:CUSTOMER_ID", "TENANT_GUARD": "enforce", "AGENT_DIRS": agents, "AGENT_FROM": "env:AGENT",
    }
    env = {f"AGENT_SIDECAR_{name}": str(value) for name, value in settings.items()}
    argv = [tmp_path / "claude", *harness.STREAM_JSON]
    cli = harness.Session(argv, served, tmp_path / "home", **env, CUSTOMER_ID="acme", AGENT="mailer")
    id = cli.ask("hello")["session_id"]
    assert cli.close() == 0
    wait_for("the transcript", lambda: list(agents.glob(f"acme/mailer/config/projects/*/{id}.jsonl")))
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert lines and all(line["tenant"] == "acme" for line in lines)
    # The same app's next customer, in the same working directory.
    refused = harness.Session(argv, served, tmp_path / "home", **env, CUSTOMER_ID="globex", AGENT="mailer")
    refused.process.stdin.close()
    assert refused.process.wait(60) == 125
    assert "its working directory" in refused.tail() and len(served.requests()) == 1
