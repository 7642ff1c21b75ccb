"""Agents that are well, and busy, slow, waited for, restarted, or not looked at for a while: no alert is for them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import harness
from faults import ALLOWED, bash, on
from world import PATIENCE, Pod

NAMESPACE = "shop"
# 0.01 USD for a turn.
USUAL = {"input_tokens": 100, "output_tokens": 300, "cache_read_input_tokens": 20_000}
AGENTS: dict[str, Callable[[Pod], None]] = {}
# One who gets sick at the end, to see that it would have been told of.
SICK = "polling"


def healthy(drive: Callable[[Pod], None]) -> Callable[[Pod], None]:
    AGENTS[drive.__name__.replace("_", "-")] = drive
    return drive


@healthy
def tools_subagents_retries(pod: Pod) -> None:
    """Three agents of two tenants, that share a budget; the hub is not there for ten seconds (ten minutes) in between."""
    hub = pod.hub()
    inner = {"when": {"agent": "subagent", "results": 0}, "reply": {"blocks": [bash("echo inside")]}}
    busy = {"when": {"prompt_contains": "busy", "attempt": 1}, "reply": {"status": 529}}
    rules = [inner, busy, on("subagent", {"subagent": "look for it"}), on("tools", bash("echo 1"), bash("false"))]
    api = pod.api(*rules, usage=USUAL)
    flags = ("--container-day-max-cost-usd", "100", "--agent-dirs", pod.directory / "agents", "--agent-workspace", "always")
    clis = [pod.agent(api, *ALLOWED, hub=True, flags=(*flags, "--tenant", tenant)) for tenant in ["acme", "acme", "zoo"]]
    for n in pod.beat(1):
        clis[n % 3].ask(["tools", "go", "subagent", "go", "tools", "go", "busy", "go", "go", "go"][n % 10], PATIENCE)
        if n == 60:
            hub.send_signal(signal.SIGSTOP)
        if n == 70:
            hub.send_signal(signal.SIGCONT)


@healthy
def long_tool(pod: Pod) -> None:
    """One call takes most of the time, and may."""
    cli = pod.agent(pod.api(on("build", bash("timeout 100 tail -f /dev/null; echo built")), usage=USUAL), *ALLOWED, flags=("--tool-max-duration", "10m", "--stall-timeout", "7m"))
    for _ in pod.beat(1, 1):
        cli.ask("build", 3 * PATIENCE)
    pod.wait()


@healthy
def polling(pod: Pod) -> None:
    """The same question until the answer is another; in its own container, whose patrol finds nobody."""
    looks = {"when": {"prompt_contains": "poll"}, "reply": {"blocks": [bash("sleep 0.5; date +%s%N")]}, "times": 60}
    circle = {"when": {"prompt_contains": "circle"}, "reply": {"blocks": [bash("echo nothing new")]}, "times": 12}
    before = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
    cli = pod.agent(pod.api(looks, circle, usage=USUAL), *ALLOWED, before=before, AGENT_SIDECAR_PATROL="true")
    cli.ask("poll", 2 * PATIENCE)
    pod.world.sick.wait()
    pod.fault()
    cli.ask("circle", PATIENCE)
    pod.world.over.wait()


@healthy
def waits_for_its_person(pod: Pod) -> None:
    """Permissions that are given or refused within minutes, turns that are broken off, and pauses."""
    flags = ("--permission-mode", "default", "--permission-prompt-tool", "stdio")
    cli = pod.agent(pod.api(on("write", bash("touch a-file")), on("think", pace={"first_byte_delay_ms": 2000}), usage=USUAL), *flags)
    for n in pod.beat(12):
        cli.send(harness.user("write"))
        asked = cli.until(lambda line: line["type"] == "control_request", PATIENCE)
        pod.world.over.wait(4)
        decision = {"behavior": "allow", "updatedInput": asked["request"]["input"]} if n % 2 else {"behavior": "deny", "message": "no"}
        response = {"subtype": "success", "request_id": asked["request_id"], "response": decision}
        cli.send({"type": "control_response", "response": response})
        cli.result(PATIENCE)
        cli.send(harness.user("think"))
        pod.world.over.wait(0.5)
        cli.control("interrupt", PATIENCE)
        cli.result(PATIENCE)


@healthy
def idle(pod: Pod) -> None:
    """Nobody asks it anything, and it may stay."""
    pod.agent(pod.api(usage=USUAL))
    pod.wait()


@healthy
def idle_ends(pod: Pod) -> None:
    """Ended when nobody asks it any more, as it was said, and started again when somebody does."""
    pod.hub()
    api = pod.api(usage=USUAL)
    for _ in pod.beat(25):
        cli = pod.agent(api, hub=True, flags=("--idle-timeout", "6s"))
        cli.process.wait(PATIENCE)


@healthy
def resumed(pod: Pod) -> None:
    """A session that goes on in one process after the other."""
    pod.hub()
    api, session = pod.api(usage=USUAL), None
    for _ in pod.beat(20):
        cli = pod.agent(api, *(["--resume", session] if session else []), hub=True)
        session = cli.ask("go", PATIENCE)["session_id"]
        cli.close(PATIENCE)


def deployed(pod: Pod, delay: float, life: float) -> None:
    """Works, and is told to go in the middle of an answer."""
    pod.wait(delay)
    if pod.done():
        return
    api = pod.api(on("long", "a text " * 40, pace={"chunk": 4, "chunk_delay_ms": 100}), usage=USUAL)
    cli = pod.agent(api, flags=("--linger", "3s"))
    for _ in pod.beat(1, int(life)):
        cli.ask("go", PATIENCE)
    cli.send(harness.user("long"))
    pod.world.over.wait(1)
    cli.process.terminate()
    cli.process.wait(PATIENCE)


@healthy
def deploy_1(pod: Pod) -> None:
    deployed(pod, 0, 50)


@healthy
def deploy_2(pod: Pod) -> None:
    deployed(pod, 45, 50)


@healthy
def deploy_3(pod: Pod) -> None:
    deployed(pod, 95, 60)


@healthy
def one_shots(pod: Pod) -> None:
    """A process for each question, with its own counters from zero; every other one speaks text."""
    api = pod.api(on("step", bash("echo a step")), usage=USUAL)
    for n in pod.beat(12):
        speaks = ["--output-format", ["stream-json", "text"][n % 2], *(["--verbose"] if n % 2 == 0 else [])]
        argv = [*pod.argv("--linger", "4s"), harness.cli("new"), "-p", "step", *speaks, *ALLOWED]
        with pod.world.starting:
            work = pod.home / "work"
            work.mkdir(parents=True, exist_ok=True)
            asked = {"cwd": work, "env": harness.environment(api, pod.home), "stdin": subprocess.DEVNULL, "capture_output": True}
            done = subprocess.run([str(word) for word in argv], timeout=PATIENCE, **asked)
        assert done.returncode == 0, done.stderr


@healthy
def shadow_limits(pod: Pod) -> None:
    """What is only tried reaches its limit with every turn."""
    flags = ("--mode", "shadow", "--max-cost-usd", "0.02", "--turn-max-tokens", "100", "--turn-max-duration", "1ms")
    cli = pod.agent(pod.api(usage=USUAL), flags=flags)
    for _ in pod.beat(3):
        cli.ask("go", PATIENCE)


SERVER = """
import json, sys
for line in sys.stdin:
    asked = json.loads(line)
    answers = {
        "initialize": {"protocolVersion": "2024-11-05", "capabilities": {"tools": {}}, "serverInfo": {"name": "sums", "version": "1"}},
        "tools/list": {"tools": [{"name": "add", "description": "adds", "inputSchema": {"type": "object"}}]},
        "tools/call": {"content": [{"type": "text", "text": "3"}]},
    }
    if "id" in asked:
        print(json.dumps({"jsonrpc": "2.0", "id": asked["id"], "result": answers.get(asked["method"], {})}), flush=True)
"""


@healthy
def mcp_and_collector(pod: Pod) -> None:
    """An MCP server that is there, and a collector that is not, for a while."""
    posts: list[int] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            harness.whole(self)
            posts.append(1)
            self.send_response(503 if 5 < len(posts) < 9 else 200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    pod.closing.callback(server.shutdown)
    program = pod.directory / "server.py"
    program.write_text(SERVER)
    servers = {"mcpServers": {"sums": {"command": sys.executable, "args": [str(program)]}}}
    flags = ("--otlp-endpoint", f"http://127.0.0.1:{server.server_port}", "--otlp-queue-dir", pod.directory / "queue")
    api = pod.api(on("sum", {"tool": "mcp__sums__add", "input": {}}), usage=USUAL)
    cli = pod.agent(api, "--mcp-config", json.dumps(servers), "--allowedTools", "mcp__sums__add", flags=flags)
    for _ in pod.beat(3):
        cli.ask("sum", PATIENCE)
