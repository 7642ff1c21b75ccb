"""The Python SDK with a wrapper where it expects the CLI: it must not be able to tell."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import time

import harness
import pytest
from claude_agent_sdk import (
    ClaudeAgentOptions,
    ClaudeSDKClient,
    HookMatcher,
    PermissionResultAllow,
    PermissionResultDeny,
    ProcessError,
    ResultMessage,
    create_sdk_mcp_server,
    query,
    tool,
)
from sdk import shim

# For a whole session; none of them works for more than a few seconds.
PATIENCE = 150


class Recorder:
    """What a scenario uses: options around the executable, and a list of all that the caller saw, callbacks included."""

    def __init__(self, run: shim.Run, allowed: list[str]):
        self.run = run
        self.allowed = allowed
        self.seen: list = []

    def options(self, **more) -> ClaudeAgentOptions:
        return ClaudeAgentOptions(
            **{"cli_path": self.run.path, "cwd": self.run.work, "allowed_tools": self.allowed, **more}
        )

    def saw(self, message: object) -> None:
        # A callback's entry is data already.
        self.seen.append({"type": type(message).__name__, **dataclasses.asdict(message)} if dataclasses.is_dataclass(message) else message)

    async def answer(self, client: ClaudeSDKClient) -> ResultMessage:
        async for message in client.receive_response():
            self.saw(message)
        assert isinstance(message, ResultMessage)
        return message

    async def ask(self, client: ClaudeSDKClient, text: str) -> ResultMessage:
        await client.query(text)
        return await self.answer(client)


async def until(what: str, true) -> None:
    await asyncio.to_thread(harness.wait_for, what, true, 60)


async def one_shot(sees: Recorder) -> None:
    async for message in query(prompt="go", options=sees.options()):
        sees.saw(message)


async def turns(sees: Recorder) -> None:
    async with ClaudeSDKClient(sees.options()) as client:
        for text in ["one", "two", "three"]:
            await sees.ask(client, text)


async def permissions(sees: Recorder) -> None:
    async def decide(name, given, context):
        sees.saw(["asked", name, given["command"]])
        if "denied" in given["command"]:
            return PermissionResultDeny(message="not this one")
        return PermissionResultAllow()

    async with ClaudeSDKClient(sees.options(allowed_tools=[], can_use_tool=decide)) as client:
        await sees.ask(client, "go")
    assert [path.name for path in sees.run.work.iterdir()] == ["allowed"]


async def hooks(sees: Recorder) -> None:
    async def before(given, tool_use_id, context):
        sees.saw(["hook", given["tool_name"], given["tool_input"]])
        refused = "refused" in given["tool_input"]["command"]
        decision = {"permissionDecision": "deny", "permissionDecisionReason": "a hook says no"} if refused else {}
        return {"hookSpecificOutput": {"hookEventName": "PreToolUse", **decision}}

    matchers = {"PreToolUse": [HookMatcher(matcher="Bash", hooks=[before])]}
    async with ClaudeSDKClient(sees.options(hooks=matchers)) as client:
        await sees.ask(client, "go")


async def mcp(sees: Recorder) -> None:
    @tool("add", "Adds two numbers", {"a": int, "b": int})
    async def add(given):
        sees.saw(["called", given])
        return {"content": [{"type": "text", "text": str(given["a"] + given["b"])}]}

    servers = {"sums": create_sdk_mcp_server("sums", tools=[add])}
    async with ClaudeSDKClient(sees.options(mcp_servers=servers, allowed_tools=["mcp__sums__add"])) as client:
        await sees.ask(client, "go")


async def interrupt(sees: Recorder) -> None:
    async with ClaudeSDKClient(sees.options()) as client:
        await client.query("work forever")
        answer = asyncio.create_task(sees.answer(client))
        await until("tool call", sees.run.started)
        await client.interrupt()
        assert (await answer).terminal_reason == "aborted_tools"
        assert (await sees.ask(client, "and now?")).result == "done"


SCENARIOS = {
    scenario.__name__: (scenario, requests)
    for scenario, requests in [(one_shot, 3), (turns, 6), (permissions, 3), (hooks, 3), (mcp, 2), (interrupt, 2)]
}


@pytest.fixture
def start(api, tmp_path, monkeypatch):
    """Runs a scenario to its end, bare or wrapped."""

    def start(scenario, name: str, version: str, sidecar: harness.Sidecar | None = None) -> Recorder:
        served = api(shim.script(name))
        run = shim.Run(tmp_path / ("wrapped" if sidecar else "bare"), served, version, sidecar and sidecar.argv)
        # The SDK hands its own environment on.
        for name in list(os.environ):
            monkeypatch.delenv(name)
        for name, value in run.environment.items():
            monkeypatch.setenv(name, value)
        recorder = Recorder(run, ["Bash"])
        asyncio.run(asyncio.wait_for(scenario(recorder), PATIENCE))
        return recorder

    return start


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_caller_sees_the_same(name, version, start, sidecar):
    scenario, requests = SCENARIOS[name]
    wrapper = sidecar()
    bare, wrapped = start(scenario, name, version), start(scenario, name, version, wrapper)
    assert shim.plain(wrapped.seen, wrapped.run.home) == shim.plain(bare.seen, bare.run.home)
    shim.ended(wrapped.run.home)
    assert len(wrapped.run.api.requests()) == requests
    assert shim.spent(wrapper) == pytest.approx(wrapped.run.api.cost_usd(version), abs=1e-9)


async def disconnected(sees: Recorder) -> None:
    client = ClaudeSDKClient(sees.options())
    await client.connect()
    await client.query("go")
    await until("tool call", sees.run.started)
    await client.disconnect()


async def cancelled(sees: Recorder) -> None:
    task = asyncio.create_task(one_shot(sees))
    await until("tool call", sees.run.started)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def test_nothing_is_left_of_a_turn_that_was_left(version, start, sidecar):
    wrapper = sidecar()
    run = start(disconnected, "abort", version, wrapper).run
    shim.ended(run.home)
    assert shim.spent(wrapper) == pytest.approx(run.api.cost_usd(version), abs=1e-9)


def test_nothing_is_left_of_a_query_that_was_cancelled(version, start, sidecar):
    wrapper = sidecar()
    run = start(cancelled, "abort", version, wrapper).run
    shim.ended(run.home)
    # For a prompt that is a string the SDK closes stdin at once, so nobody can ask the CLI, and SIGTERM leaves no result.
    shim.check_spent_or_estimated(wrapper, run.api, version)


def test_the_pages_say_what_was_served(version, start, sidecar):
    wrapper = sidecar()

    async def looks(sees: Recorder) -> None:
        async with ClaudeSDKClient(sees.options()) as client:
            for text in ["one", "two"]:
                await sees.ask(client, text)
                served = pytest.approx(sees.run.api.cost_usd(version), abs=1e-9)
                shown = lambda: sum(usd for name, usd in wrapper.metrics().items() if name.startswith("claude_agent_cost_usd_total"))
                # We have heard what the CLI says before the sidecar has counted it.
                await until("the cost", lambda: shown() == served)  # noqa: B023

    start(looks, "turns", version, wrapper)


# The first answer alone is above the limit. With it the turn is over, or it works on.
@pytest.mark.parametrize("name, reason", [("plain", "completed"), ("abort", "aborted_tools")])
def test_a_session_without_money_answers_at_once(name, reason, version, start, sidecar):
    wrapper = sidecar("--max-cost-usd", "0.001")

    async def goes_on(sees: Recorder) -> None:
        async with ClaudeSDKClient(sees.options()) as client:
            assert (await sees.ask(client, "one")).terminal_reason == reason
            for text in ["two", "three"]:
                since = time.monotonic()
                refused = await sees.ask(client, text)
                assert time.monotonic() - since < 20
                assert (refused.subtype, refused.is_error, refused.num_turns) == ("success", False, 0)
                assert "a limit of this session is used up" in refused.result

    run = start(goes_on, name, version, wrapper).run
    shim.ended(run.home)
    assert len(run.api.requests()) == 1
    assert shim.spent(wrapper) == pytest.approx(run.api.cost_usd(version), abs=1e-9)


def test_who_is_paused_is_answered_with_the_reason_and_goes_on(version, start, sidecar, tmp_path):
    place = ("--socket", str(tmp_path / "hub.sock"))

    async def is_paused(sees: Recorder) -> None:
        async def until(paused: bool) -> ResultMessage:
            for _ in range(200):
                result = await sees.ask(client, "go")
                if ("is paused" in result.result) == paused:
                    return result
                await asyncio.sleep(0.1)
            raise AssertionError(f"not {paused} at last")

        async with ClaudeSDKClient(sees.options()) as client:
            first = await sees.ask(client, "go")
            await asyncio.to_thread(shim.control, *place, "pause", first.session_id)
            paused = await until(True)
            assert (paused.subtype, paused.is_error, paused.num_turns) == ("success", False, 0)
            asked = len(sees.run.api.requests())
            await asyncio.to_thread(shim.control, *place, "resume", first.session_id)
            assert (await until(False)).session_id == first.session_id
            assert len(sees.run.api.requests()) == asked + 1

    start(is_paused, "plain", version, sidecar(*place, "--hub-control"))


def test_a_query_without_money_ends(version, start, sidecar):
    wrapper = sidecar("--max-cost-usd", "0.001")

    async def ends(sees: Recorder) -> None:
        try:
            await one_shot(sees)
        except ProcessError:
            # An older CLI may end without a result: then the exit code says that it was cut short.
            return
        assert any(message["type"] == "ResultMessage" for message in sees.seen if isinstance(message, dict))

    sees = start(ends, "unhurried", version, wrapper)
    shim.ended(sees.run.home)
    # Three without a limit. Nothing can be asked of a CLI whose stdin is closed, so the next request may be on its way.
    assert 1 <= len(sees.run.api.requests()) < 3
