"""For each alert the fault that it is for: what a real CLI behind a real sidecar is made to meet. Where a program stands in, it says so."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import compress
import harness
from world import PATIENCE, Pod

ALLOWED = ("--allowedTools", "Bash,Agent,Task")
# 2 USD for an answer, by what it writes.
DEAR = {"input_tokens": 10, "output_tokens": 100_000}


@dataclass(frozen=True)
class Fault:
    alert: str
    # What happens, for the table.
    what: str
    drive: Callable[[Pod], None]
    # Whether its time is of the rule's windows, which are compressed; or the sidecar's own, which is not.
    accrues: bool = False
    # How much longer they are where they ship.
    scale: int = compress.FACTOR
    # Quick enough to be waited for with the rules as they ship.
    real: bool = False
    # Its time is long, and begins first.
    early: bool = False
    # What comes with it.
    also: frozenset[str] = frozenset()


FAULTS: list[Fault] = []


def fault(alert: str, what: str, also: tuple[str, ...] = (), **how):
    def add(drive: Callable[[Pod], None]):
        FAULTS.append(Fault(alert, what, drive, also=frozenset(also), **how))
        return drive

    return add


def bash(command: str) -> dict:
    return {"tool": "Bash", "input": {"command": command, "description": "a step"}}


def on(prompt: str, *blocks, times: int | None = None, **reply) -> dict:
    """What is answered to a prompt: with a tool in it, once per turn."""
    when = {"prompt_contains": prompt} | ({"results": 0} if blocks else {})
    return {"when": when, "reply": {"blocks": list(blocks), **reply}} | ({"times": times} if times else {})


def child(session: harness.Session) -> int:
    """The CLI below a wrapper."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    for pid in pids:
        try:
            if int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) == session.process.pid:
                return pid
        except OSError:
            pass
    raise AssertionError("the wrapper has no CLI")


@fault("ClaudeAgentTurnErrorsFast", "the API answers every third turn with an error", accrues=True, real=True, also=("ClaudeAgentTurnErrorsSlow",), early=True)
def turn_errors_fast(pod: Pod) -> None:
    cli = pod.agent(pod.api(on("break", status=400)))
    pod.scraped()
    for _ in pod.beat(0.4, 25):
        cli.ask("go", PATIENCE)
    pod.fault()
    for n in pod.beat(0.5):
        cli.ask("break" if n % 3 == 0 else "go", PATIENCE)


@fault("ClaudeAgentTurnErrorsSlow", "one turn of twenty-two fails", accrues=True, early=True)
def turn_errors_slow(pod: Pod) -> None:
    cli = pod.agent(pod.api(on("break", status=400)))
    pod.scraped()
    for _ in pod.beat(0.4, 20):
        cli.ask("go", PATIENCE)
    pod.fault()
    for n in pod.beat(0.4):
        cli.ask("break" if n % 22 == 2 else "go", PATIENCE)


@fault("ClaudeAgentResultMissing", "a CLI is killed in the middle of a turn", real=True)
def result_missing(pod: Pod) -> None:
    pod.hub()
    cli = pod.agent(pod.api(on("hang", hang=True)), hub=True)
    pod.scraped()
    cli.send(harness.user("hang"))
    pod.sees('claude_agent_process_state{state="model"} == 1')
    pod.fault()
    os.kill(child(cli), signal.SIGKILL)
    pod.wait()


@fault("ClaudeAgentFirstTokenSlow", "two of three agents wait 11 s for each answer", accrues=True, early=True)
def first_token_slow(pod: Pod) -> None:
    pod.hub()
    api = pod.api(on("late", pace={"first_byte_delay_ms": 11_000}))
    # Without partial messages the CLI does not say when an answer began.
    quick, *late = [pod.agent(api, "--include-partial-messages", hub=True) for _ in range(3)]
    pod.scraped()
    pod.fault()
    for n in pod.beat(0.9):
        quick.ask("go", PATIENCE)
        if n % 14 == 0:
            for cli in late:
                cli.send(harness.user("late"))


@fault("ClaudeAgentStuck", "a tool call does not end, and its limit is in shadow mode")
def stuck(pod: Pod) -> None:
    cli = pod.agent(pod.api(on("hang", bash("tail -f /dev/null"))), *ALLOWED, flags=("--tool-max-duration", "2s", "--mode", "shadow"))
    pod.scraped()
    pod.fault()
    cli.send(harness.user("hang"))
    pod.wait()
    cli.control("interrupt", PATIENCE)


@fault("ClaudeAgentLoop", "the model asks for the same call again and again", real=True)
def loop(pod: Pod) -> None:
    again = {"when": {"prompt_contains": "circle"}, "reply": {"blocks": [bash("echo nothing new")]}, "times": 12}
    cli = pod.agent(pod.api(again), *ALLOWED)
    pod.scraped()
    pod.fault()
    cli.ask("circle", PATIENCE)
    pod.wait()


@fault("ClaudeAgentCrashLooping", "three CLIs are killed, one after the other", real=True)
def crash_looping(pod: Pod) -> None:
    pod.hub()
    api = pod.api()
    clis = [pod.agent(api, hub=True) for _ in range(3)]
    pod.scraped()
    pod.fault()
    for cli in clis:
        os.kill(child(cli), signal.SIGKILL)
        time.sleep(1)
    pod.wait()


@fault("ClaudeAgentMcpServerDown", "an MCP server ends when it is started")
def mcp_server_down(pod: Pod) -> None:
    servers = {"mcpServers": {"broken": {"command": "false"}}}
    pod.agent(pod.api(), "--mcp-config", json.dumps(servers), faulty=True)
    pod.wait()


def removed(group: Path) -> bool:
    """As soon as nobody is in it any more."""
    with contextlib.suppress(OSError):
        group.rmdir()
    return not group.exists()


def memory_group(pod: Pod, megabytes: int) -> tuple[Path, list[str]]:
    """A cgroup with a limit, and what starts a program in it that sees it as its container's, whichever version there is."""
    name = f"agent-sidecar-test-{os.getpid()}"
    root, aside = Path("/sys/fs/cgroup"), pod.directory / "cgroup"
    aside.mkdir()
    second = (root / "cgroup.controllers").exists()
    group = root / name if second else root / "memory" / name
    group.mkdir()
    pod.closing.callback(harness.wait_for, "the group's end", lambda: removed(group), PATIENCE)
    if second:
        (group / "memory.max").write_text(f"{megabytes}M")
    else:
        (group / "memory.limit_in_bytes").write_text(f"{megabytes}M")
    seen = 'mount --bind "$1" /sys/fs/cgroup' if second else "mount -t tmpfs none /sys/fs/cgroup; mkdir /sys/fs/cgroup/memory; mount --bind \"$1\" /sys/fs/cgroup/memory"
    script = f'echo $$ > "$0/cgroup.procs"; set -e; mount --bind "$0" "$1"; {seen}; shift; exec "$@"'
    return group, ["unshare", "--mount", "sh", "-c", script, str(group), str(aside)]


@fault("ClaudeAgentMemoryExhaustion", "a tool takes more memory than the container has, and the kernel ends it", real=True, early=True)
def memory_exhaustion(pod: Pod) -> None:
    _, before = memory_group(pod, 900)
    eats = f'{sys.executable} -c "x = bytes(1) * 2**20; y = [x + bytes([n % 256]) for n in range(4000)]"'
    cli = pod.agent(pod.api(on("eat", bash(eats))), *ALLOWED, before=tuple(before))
    pod.scraped()
    pod.fault()
    cli.ask("eat", PATIENCE)
    pod.wait()


@fault("ClaudeAgentDiskFilling", "a tool fills the disk of the working directory")
def disk_filling(pod: Pod) -> None:
    work = pod.home / "work"
    before = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=16m none "$0" && cd "$0" && exec "$@"', str(work))
    cli = pod.agent(pod.api(on("fill", bash("head -c 15500000 /dev/zero > filler"))), *ALLOWED, before=before)
    pod.scraped()
    pod.fault()
    cli.ask("fill", PATIENCE)
    pod.wait()


@fault("ClaudeAgentTenantConflict", "agents of two tenants have one config directory", real=True)
def tenant_conflict(pod: Pod) -> None:
    pod.hub()
    api = pod.api()
    pod.agent(api, hub=True, flags=("--tenant", "acme"))
    pod.scraped()
    pod.agent(api, hub=True, flags=("--tenant", "zoo"), faulty=True)
    pod.wait()


@fault("ClaudeAgentWaitsForPerson", "nobody answers a permission")
def waits_for_person(pod: Pod) -> None:
    asks = ("--permission-mode", "default", "--permission-prompt-tool", "stdio")
    cli = pod.agent(pod.api(on("write", bash("touch a-file"))), *asks)
    pod.scraped()
    pod.fault()
    cli.send(harness.user("write"))
    pod.wait()


@fault("ClaudeAgentIdleWaste", "an idle agent whose timeout is in shadow mode")
def idle_waste(pod: Pod) -> None:
    cli = pod.agent(pod.api(), flags=("--idle-timeout", "2s", "--mode", "shadow"))
    pod.scraped()
    cli.ask("go", PATIENCE)
    pod.fault()
    pod.wait()


@fault("ClaudeAgentSpendRunaway", "an agent spends 2 USD a second", accrues=True)
def spend_runaway(pod: Pod) -> None:
    cli = pod.agent(pod.api(on("dear", usage=DEAR)), "--model", "claude-opus-5-5")
    pod.scraped()
    pod.fault()
    for _ in pod.beat(1):
        cli.ask("dear", PATIENCE)


@fault("ClaudeAgentSpendAnomaly", "a fleet spends forty times what it spent", accrues=True, also=("ClaudeAgentSpendRunaway",), early=True)
def spend_anomaly(pod: Pod) -> None:
    cheap, dear = {"output_tokens": 2_500}, {"output_tokens": 100_000}
    cli = pod.agent(pod.api(on("dear", usage=dear), usage=cheap), "--model", "claude-opus-5-5")
    pod.scraped()
    # As it has been for hours, until "a week ago" is well inside of it.
    for _ in pod.beat(1, 70):
        cli.ask("go", PATIENCE)
    pod.fault()
    for _ in pod.beat(1):
        cli.ask("dear", PATIENCE)


@fault("ClaudeAgentBudgetNearlyUsed", "an answer takes nineteen twentieths of a day's budget")
def budget_nearly_used(pod: Pod) -> None:
    flags = ("--container-day-max-cost-usd", "1", "--tenant", "acme")
    cli = pod.agent(pod.api(on("dear", usage={"output_tokens": 47_500})), "--model", "claude-opus-5-5", hub=True, flags=flags)
    pod.scraped()
    pod.fault()
    cli.ask("dear", PATIENCE)
    pod.wait()


def noon() -> str:
    """The offset from UTC where it is noon or later, and the day has hours to go."""
    hours = 12 - time.gmtime().tm_hour
    return f"{'+' if hours >= 0 else '-'}{abs(hours):02}:00"


@fault("ClaudeAgentBudgetForecast", "a day's budget is used evenly, and would end in an afternoon", accrues=True, scale=120, early=True)
def budget_forecast(pod: Pod) -> None:
    flags = ("--container-day-max-cost-usd", "20", "--time-zone", noon())
    cli = pod.agent(pod.api(usage={"output_tokens": 15_000}), "--model", "claude-opus-5-5", hub=True, flags=flags)
    pod.scraped()
    pod.fault()
    # Never faster, however late it is: the budget is to last.
    while not pod.done():
        cli.ask("go", PATIENCE)
        pod.wait(5)


@fault("ClaudeAgentLimitEnforced", "a session has spent what it may", real=True)
def limit_enforced(pod: Pod) -> None:
    cli = pod.agent(pod.api(on("dear", usage=DEAR)), "--model", "claude-opus-5-5", flags=("--max-cost-usd", "1"))
    pod.scraped()
    pod.fault()
    cli.ask("dear", PATIENCE)
    cli.ask("and now?", PATIENCE)
    pod.wait()


@fault("ClaudeAgentStopIneffective", "six agents are stopped with no time to end", also=("ClaudeAgentLimitEnforced", "ClaudeAgentResultMissing"))
def stop_ineffective(pod: Pod) -> None:
    pod.hub()
    steps = ("--stop-interrupt", "1ms", "--stop-end", "1ms", "--stop-terminate", "1ms", "--turn-max-duration", "3s")
    api = pod.api(on("hang", hang=True))
    clis = [pod.agent(api, hub=True, flags=steps, hello=False) for _ in range(6)]
    pod.scraped()
    pod.fault()
    for cli in clis:
        cli.send(harness.user("hang"))
    pod.wait()


@fault("ClaudeAgentCostUntrustworthy", "a model that no price list has")
def cost_untrustworthy(pod: Pod) -> None:
    pod.agent(pod.api(), "--model", "house-model-7", faulty=True)
    pod.wait()


@fault("ClaudeAgentCacheCollapse", "each prompt is new to the cache, where nine tenths of it were known", accrues=True, early=True)
def cache_collapse(pod: Pod) -> None:
    kept, lost = {"input_tokens": 10_000, "cache_read_input_tokens": 90_000}, {"input_tokens": 190_000, "cache_read_input_tokens": 10_000}
    cli = pod.agent(pod.api(on("changed", usage=lost), usage=kept), "--model", "claude-haiku-4-5")
    pod.scraped()
    for _ in pod.beat(1, 65):
        cli.ask("go", PATIENCE)
    pod.fault()
    for _ in pod.beat(1):
        cli.ask("changed", PATIENCE)


@fault("ClaudeAgentProviderDegraded", "every request is answered with 529 once", accrues=True)
def provider_degraded(pod: Pod) -> None:
    busy = {"when": {"prompt_contains": "busy", "attempt": 1}, "reply": {"status": 529}}
    cli = pod.agent(pod.api(busy))
    pod.scraped()
    for _ in pod.beat(0.5, 10):
        cli.ask("go", PATIENCE)
    pod.fault()
    for _ in pod.beat(1):
        cli.ask("busy", PATIENCE)


@fault("ClaudeAgentAuthFailure", "the API does not take the key any more (401)", real=True)
def auth_failure(pod: Pod) -> None:
    cli = pod.agent(pod.api(on("revoked", status=401)))
    pod.scraped()
    pod.fault()
    # The CLI itself tries for three minutes.
    cli.send(harness.user("revoked"))
    pod.wait()


@fault("AgentSidecarTelemetryLoss", "a collector refuses what it gets (400)")
def telemetry_loss(pod: Pod) -> None:
    refuses = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            harness.whole(self)
            self.send_response(400 if refuses else 200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    pod.closing.callback(server.server_close)
    pod.closing.callback(server.shutdown)
    cli = pod.agent(pod.api(), flags=("--otlp-endpoint", f"http://127.0.0.1:{server.server_port}", "--otlp-queue-dir", pod.directory / "queue"))
    pod.scraped()
    pod.fault()
    refuses.append(True)
    for _ in pod.beat(2):
        cli.ask("go", PATIENCE)


# What can be neither sent nor kept is dropped some day: on a machine that is late, before the run is over.
@fault("AgentSidecarBlind", "the queue's directory cannot be written", also=("AgentSidecarTelemetryLoss",))
def blind(pod: Pod) -> None:
    where = pod.directory / "a-file"
    where.touch()
    pod.agent(pod.api(), flags=("--otlp-endpoint", "http://127.0.0.1:9", "--otlp-queue-dir", where / "queue"), faulty=True)
    pod.wait()


@fault("AgentSidecarUnwrapped", "a tool starts a CLI by its path, round the shim")
def unwrapped(pod: Pod) -> None:
    bare = f"{harness.cli('new')} -p hang >/dev/null 2>&1 & sleep 1"
    # Pids of its own: others' CLIs are not in sight.
    before = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
    cli = pod.agent(pod.api(on("hang", hang=True), on("round", bash(bare))), *ALLOWED, before=before, AGENT_SIDECAR_PATROL="true")
    pod.scraped()
    pod.fault()
    cli.ask("round", PATIENCE)
    pod.wait()


@fault("AgentSidecarControlRefused", "somebody guesses at the token", real=True)
def control_refused(pod: Pod) -> None:
    pod.agent(pod.api(), hub=True, flags=("--hub-control", "--control-tcp"), AGENT_SIDECAR_CONTROL_TOKEN="a-long-word-nobody-knows")
    pod.scraped()
    pod.fault()
    for n in range(12):
        asked = urllib.request.Request(f"http://127.0.0.1:{pod.port}/v1/pause", method="POST", headers={"Authorization": f"Bearer guess-number-{n:06}"})
        try:
            urllib.request.urlopen(asked, timeout=PATIENCE)
        except urllib.error.HTTPError as error:
            assert error.code in (401, 429), error
    pod.wait()


@fault("AgentSidecarTampered", "a tool cuts the ledger that its agent is billed by", real=True)
def tampered(pod: Pod) -> None:
    ledger = pod.home / "work/ledger.jsonl"
    cli = pod.agent(pod.api(on("cut", bash("truncate -s 0 ledger.jsonl"))), *ALLOWED, flags=("--ledger", ledger))
    pod.scraped()
    assert ledger.stat().st_size, "there is nothing to cut"
    pod.fault()
    cli.ask("cut", PATIENCE)
    pod.wait()


def budget_of_a_blind_one(pod: Pod) -> None:
    """No fault of its own: what one alert says is held back by another."""
    (pod.directory / "a-file").touch()
    lost = ("--otlp-endpoint", "http://127.0.0.1:9", "--otlp-queue-dir", pod.directory / "a-file/queue")
    flags = (*lost, "--container-day-max-cost-usd", "1")
    cli = pod.agent(pod.api(on("dear", usage={"output_tokens": 47_500})), "--model", "claude-opus-5-5", hub=True, flags=flags)
    harness.wait_for("the alert that holds back", lambda: bool(pod.world.receiver.first("fast", "AgentSidecarBlind", pod.namespace)), PATIENCE)
    cli.ask("dear", PATIENCE)
    by = ("fast", pod.namespace, "ClaudeAgentBudgetNearlyUsed", "AgentSidecarBlind")
    held = lambda: pod.world.suppressed("fast") and by in pod.world.held_back  # noqa: E731
    harness.wait_for("the alert that is held back", lambda: bool(held()), PATIENCE)
    # Longer than a group waits, compressed.
    pod.world.over.wait(2)
