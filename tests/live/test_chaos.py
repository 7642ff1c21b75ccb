"""Agents, wrappers and hubs that are killed, frozen and told to go, at random: what is on the books is what the API served.

A run can be made again with its seed, which is in the first line of what it prints: `CHAOS_SEED=… tests/live/run test_chaos.py`. What
happens is the same then; the machine says when.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import harness
import pytest
from harness import wait_for
from sdk import shim
from sdk.shim import USAGE

FAKE = [sys.executable, "-u", Path(__file__).parent / "sdk/fake_cli.py", *harness.STREAM_JSON]
# An answer that was whole so long before a kill is on the books; a second, and as much again for a busy machine.
MARGIN = 2.0
# Of five-minute caches alone, which the fake can tell in its own words.
PLAIN = {**USAGE, "cache_creation": {"ephemeral_5m_input_tokens": 790, "ephemeral_1h_input_tokens": 0}}
ANSWER_USD = 11 * 4e-6 + 130 * 20e-6 + 5000 * 0.2e-6 + 790 * 5e-6


@dataclass
class Run:
    """A process of an agent, from its start to its end."""

    process: subprocess.Popen
    session: str = ""
    # When it was told to go, or killed; what was served later may be missing.
    struck: float | None = None
    ended: float | None = None
    read: int = 0


@dataclass
class Yard:
    """Where they meet."""

    directory: Path
    api: harness.Api
    flags: list
    thinks: str = "0.05"
    port: int = field(default_factory=harness.free_port)

    def __post_init__(self) -> None:
        self.directory.mkdir()
        self.state, self.socket = self.directory / "state", self.directory / "hub.sock"
        self.home = self.directory / "home"
        self.home.mkdir()

    def argv(self, what: str) -> list:
        return [harness.binary(), what, "--listen", f"127.0.0.1:{self.port}", "--socket", self.socket, "--hub-state-dir", self.state]

    def start(self, argv: list, **pipes) -> subprocess.Popen:
        environment = harness.environment(self.api, self.home, FAKE_THINKS=self.thinks)
        return subprocess.Popen(list(map(str, argv)), cwd=self.home, env=environment, stderr=subprocess.DEVNULL, **pipes)

    def hub(self) -> subprocess.Popen:
        return self.start(self.argv("hub"), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    def serves(self) -> int | None:
        """Whoever it is, by the kernel's word."""
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as hub:
            hub.settimeout(5)
            hub.connect(str(self.socket))
            return struct.unpack("3i", hub.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        return None

    def metrics(self) -> dict[str, float]:
        return harness.Sidecar.metrics(self)

    def get(self, path: str) -> str:
        return harness.Sidecar.get(self, path)

    def left(self) -> dict[int, str]:
        return shim.processes(self.home)


class Agent(threading.Thread):
    """An app that talks to one CLI after the other, each under a wrapper, all of them for one tenant and into one ledger."""

    def __init__(self, name: str, yard: Yard, cli: list, seed: int, turns: int | None = None):
        super().__init__(name=name, daemon=True)
        self.yard, self.cli, self.random, self.turns = yard, cli, random.Random(seed), turns
        self.ledger = yard.directory / f"{name}.jsonl"
        self.runs: list[Run] = []
        self.over = threading.Event()
        self.fault: Exception | None = None
        self.refused = 0

    def run(self) -> None:
        try:
            while not self.over.is_set():
                self.session()
        except Exception as error:
            self.fault = error

    def session(self) -> None:
        flags = ["--tenant", self.name, "--ledger", self.ledger, "--stop-end", "12s", "--platform-grace", "60s", *self.yard.flags, "--"]
        process = self.yard.start([*self.yard.argv("run"), *flags, *self.cli], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        run = Run(process)
        self.runs.append(run)
        whole = False
        with contextlib.suppress(BrokenPipeError):
            # As the SDKs begin: they wait until the CLI can be spoken to.
            self.send(run, harness.control("first", "initialize"))
            self.until(run, b"control_response")
            for _ in range(self.random.randint(3, 8)):
                if self.over.is_set():
                    break
                self.send(run, harness.user(str(self.random.randint(1, 4))))
                if not self.until(run, b"result"):
                    break
            process.stdin.close()
        while line := process.stdout.readline():
            whole = self.check(run, line)
        process.wait(120)
        run.ended = time.time()
        if run.struck is None:
            # Nobody meant it: then all of it was heard, to the last line.
            assert process.returncode == 0, process.returncode
            assert whole or self.cli is not FAKE, "the last line is missing"

    @staticmethod
    def send(run: Run, message: dict) -> None:
        run.process.stdin.write(json.dumps(message).encode() + b"\n")
        run.process.stdin.flush()

    def until(self, run: Run, kind: bytes) -> bool:
        while line := run.process.stdout.readline():
            self.check(run, line)
            if b'"type": "%s"' % kind in line or b'"type":"%s"' % kind in line:
                self.refused += b"shares with others" in line
                return True
        return False

    def check(self, run: Run, line: bytes) -> bool:
        """Whether it is the last; every line is whole, and none is missing."""
        if not line.endswith(b"\n"):
            assert run.struck is not None, line
            return False
        said = json.loads(line)
        run.session = said.get("session_id") or run.session
        if "n" in said:
            # The wrapper keeps answers to its own questions.
            assert said["n"] > run.read, said
            run.read = said["n"]
        return said.get("subtype") == "bye" and said["lines"] == said["n"]

    def sums(self) -> dict[str, dict]:
        """What the ledger says, by session."""
        if not self.ledger.exists():
            return {}
        argv = [harness.binary(), "replay", "--ledger", "--format", "json", self.ledger]
        return {one["session_id"]: one for one in json.loads(subprocess.check_output(argv, timeout=60))["sessions"]}


KILLS = ["kill cli", "kill wrapper", "terminate wrapper", "kill hub"]
FREEZES = ["freeze cli", "freeze wrapper", "freeze hub"]


class Chaos:
    """What is done to them, in an order that the seed says."""

    def __init__(self, yard: Yard, agents: list[Agent], seed: int, actions: list[str]):
        self.yard, self.agents, self.random, self.actions = yard, agents, random.Random(seed), actions
        self.hub = yard.hub()
        self.done: list[str] = []

    def rest(self) -> None:
        time.sleep(self.random.uniform(0.2, 1.0))

    def one(self) -> None:
        action = self.random.choice(self.actions)
        agent = self.random.choice(self.agents)
        what, whom = action.split()
        self.done.append(f"{action} {agent.name}")
        if whom == "hub":
            self.at_hub(what)
        else:
            self.at_agent(agent, what, whom)

    def at_hub(self, what: str) -> None:
        pid = self.yard.serves()
        if pid is None:
            return
        run = next((agent.runs[-1] for agent in self.agents if agent.runs and agent.runs[-1].process.pid == pid), None)
        self.hit(what, pid, run)
        if pid == self.hub.pid and what == "kill":
            self.hub.wait(60)
            self.hub = self.yard.hub()

    def at_agent(self, agent: Agent, what: str, whom: str) -> None:
        if not agent.runs or agent.runs[-1].ended:
            return
        run = agent.runs[-1]
        pid = run.process.pid
        if whom == "cli":
            # `exec` and `fork` of a start are no aim.
            below = Path(f"/proc/{pid}/task/{pid}/children")
            try:
                pid = int(below.read_text().split()[0])
            except (OSError, IndexError):
                return
        self.hit(what, pid, run)

    def hit(self, what: str, pid: int, run: Run | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            if what == "freeze":
                os.kill(pid, signal.SIGSTOP)
                time.sleep(self.random.uniform(0.3, 1.5))
                os.kill(pid, signal.SIGCONT)
                # What it has slept through it reads first.
                time.sleep(0.5)
                return
            if run is not None:
                run.struck = run.struck or time.time()
            os.kill(pid, signal.SIGTERM if what == "terminate" else signal.SIGKILL)

    def stop(self) -> None:
        """Everybody ends by themselves; then the hub, so that whoever asks next has it from the files alone."""
        for agent in self.agents:
            agent.over.set()
        for agent in self.agents:
            agent.join(180)
            assert not agent.is_alive(), f"{agent.name} hangs after: {self.done}"
        self.close()

    def close(self) -> None:
        """Nothing is left, of a run that failed neither."""
        for agent in self.agents:
            agent.over.set()
            for run in agent.runs:
                if run.process.poll() is None:
                    run.process.kill()
        self.hub.kill()
        self.hub.wait(60)


def seed() -> int:
    chosen = int(os.environ.get("CHAOS_SEED") or random.SystemRandom().randrange(1_000_000))
    print(f"CHAOS_SEED={chosen}")
    return chosen


def check(yard: Yard, agents: list[Agent], final: dict[str, float]) -> None:
    """By session, what was whole in time is on the books, and nothing is there twice; the hub's sums are the ledgers'."""
    print({agent.name: [(run.struck is not None, run.read) for run in agent.runs] for agent in agents})
    served: dict[str, list[dict]] = {}
    for line in yard.api.requests():
        if line["usage"] is not None:
            served.setdefault(line["session"], []).append(line)
    for agent in agents:
        books, by_ledger, by_hub_at_least = agent.sums(), 0, 0
        for run in agent.runs:
            answers = served.get(run.session, [])
            struck = float("inf") if run.struck is None else run.struck - MARGIN
            due = sum(line["t"] + line["ms"] / 1000 < struck and not line["client_gone"] for line in answers)
            one = books.get(run.session)
            counted = one["tokens"]["input"] // USAGE["input_tokens"] if one else 0
            assert due <= counted <= len(answers), f"{agent.name} {run}: {due} <= {counted} <= {len(answers)}"
            if one and run.struck is None:
                assert one["cost_usd"] == pytest.approx(counted * ANSWER_USD, abs=1e-9) and not one["cost_estimated"], one
            by_ledger += counted
            by_hub_at_least += due
        name = f'tenant="{agent.name}"'
        hub = sum(n for series, n in final.items() if series.startswith("claude_agent_tokens_total{") and name in series and 'type="input"' in series)
        assert by_hub_at_least <= hub / USAGE["input_tokens"] <= by_ledger, f"{agent.name}: {by_hub_at_least} <= {hub / 11} <= {by_ledger}"
        if all(run.struck is None for run in agent.runs):
            assert hub == by_ledger * USAGE["input_tokens"]


def ended(yard: Yard) -> dict[str, float]:
    """The last hub's numbers, when it has taken over from all; and nothing else is left."""
    wait_for("end of all processes", lambda: not yard.left())
    hub = yard.hub()
    try:
        wait_for("the last hub", lambda: harness.listens(yard.port))
        wait_for("all to be taken over", lambda: not list(yard.state.rglob("*.jsonl")))
        final = yard.metrics()
        assert final['agent_sidecar_hub_wrappers{state="live"}'] == 0
        # Of one that was killed before it had a journal it goes after a minute.
        kept = lambda: sorted(yard.state.rglob("*"))
        with contextlib.suppress(AssertionError):
            wait_for("little to be kept", lambda: len(kept()) < 14, 120)
        assert len(kept()) < 14, kept()
        return final
    finally:
        hub.terminate()
        hub.wait(60)


def slow_script() -> dict:
    pace = {"first_byte_delay_ms": 40}
    return {"defaults": {"usage": PLAIN, "pace": pace}, "rules": [], "otherwise": {"blocks": ["done"]}}


ROUNDS = 45


def test_whoever_is_killed_the_books_say_what_was_served(api, tmp_path, request):
    chosen = seed()
    yard = Yard(tmp_path / "yard", api(slow_script()), ["--container-max-cost-usd", "1000"])
    real = [harness.cli("new"), *harness.STREAM_JSON]
    agents = [Agent(f"t{n}", yard, FAKE, chosen + n) for n in range(8)]
    agents += [Agent(f"r{n}", yard, real, chosen + 100 + n) for n in range(2)]
    chaos = Chaos(yard, agents, chosen, KILLS + FREEZES)
    request.addfinalizer(chaos.close)
    for agent in agents:
        agent.start()
    for _ in range(ROUNDS):
        chaos.rest()
        chaos.one()
    chaos.stop()
    print(chaos.done)
    for agent in agents:
        assert agent.fault is None, repr(agent.fault)
    check(yard, agents, ended(yard))


def test_a_shared_budget_holds_whoever_is_killed(api, tmp_path, request):
    chosen = seed()
    limit = 30 * ANSWER_USD
    yard = Yard(tmp_path / "yard", api(slow_script()), ["--container-max-cost-usd", f"{limit:.6f}"], thinks="2")
    agents = [Agent(f"t{n}", yard, FAKE, chosen + n) for n in range(6)]
    chaos = Chaos(yard, agents, chosen, KILLS)
    request.addfinalizer(chaos.close)
    for agent in agents:
        agent.start()
    deadline = time.monotonic() + 300
    while sum(agent.refused for agent in agents) < 8:
        assert time.monotonic() < deadline, "the budget is never used up"
        assert not any(agent.fault for agent in agents), [agent.fault for agent in agents]
        chaos.rest()
        chaos.one()
    chaos.stop()
    print(chaos.done)
    for agent in agents:
        assert agent.fault is None, repr(agent.fault)
    final = ended(yard)
    check(yard, agents, final)
    # One answer above it, and one for each who was struck before it was booked.
    struck = sum(run.struck is not None for agent in agents for run in agent.runs)
    asked = len(yard.api.requests())
    assert 28 <= asked <= 31 + struck, (asked, struck)
