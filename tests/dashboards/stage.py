"""What dashboards are to show: real CLIs under sidecars, each in a situation of its own, scraped by a real Prometheus that has the rules.

Most stay up, idle or in what they are stuck in, until they were looked at. Half of the targets have the labels of Kubernetes, half have none.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/live"))

import harness  # noqa: E402
import native  # noqa: E402
import outside  # noqa: E402
from harness import STREAM_JSON, user, wait_for  # noqa: E402

RECORDINGS = ROOT / "sidecar/core/tests/data"
USAGE = {
    "input_tokens": 1100, "output_tokens": 900, "cache_read_input_tokens": 42000,
    "cache_creation": {"ephemeral_5m_input_tokens": 3700, "ephemeral_1h_input_tokens": 90},
}  # fmt: skip
INSIDE = {"input_tokens": 300, "output_tokens": 400, "cache_read_input_tokens": 9000}
SEARCHED = {**USAGE, "server_tool_use": {"web_search_requests": 2}}
TOOLS = ["--allowedTools", "Bash,Agent,Task,WebSearch,mcp__shelf"]
# The CLI refuses to sleep for long.
FOREVER = "timeout 600 tail -f /dev/null"
# Seconds for whatever takes one, on a machine that has much else to do.
PATIENCE = 240
TOKEN = "sixteen-letters-0r-more"
# An MCP server of the fewest words.
SHELF = """
import json, sys
for line in sys.stdin:
    said = json.loads(line)
    if "id" not in said:
        continue
    tool = {"name": "look", "description": "Looks.", "inputSchema": {"type": "object", "properties": {}}}
    answers = {
        "initialize": {"protocolVersion": said.get("params", {}).get("protocolVersion"), "capabilities": {"tools": {}}, "serverInfo": {"name": "shelf", "version": "1"}},
        "tools/list": {"tools": [tool]},
        "tools/call": {"content": [{"type": "text", "text": "a book"}]},
    }
    print(json.dumps({"jsonrpc": "2.0", "id": said["id"], "result": answers.get(said["method"], {})}), flush=True)
"""


def bash(command: str) -> dict:
    return {"tool": "Bash", "input": {"command": command, "description": "a step"}}


def script(*rules: dict, **defaults) -> dict:
    pace = {"chunk": 16, "chunk_delay_ms": 20}
    return {"defaults": {"usage": USAGE, "pace": pace} | defaults, "rules": list(rules), "otherwise": {"blocks": ["That is done, and nothing is left to do."]}}


def asked(word: str, results: int, *blocks, **reply) -> dict:
    """What the main loop is answered to a message with this word in it, after so many results of tools."""
    return {"when": {"agent": "main", "prompt_contains": word, "results": results}, "reply": {"blocks": list(blocks), **reply}}


class Prometheus:
    """Targets come and go in a file."""

    def __init__(self, directory: Path, rules: Path | None, *, honor_labels: bool = False):
        directory.mkdir()
        self.directory, self.port, self.lock = directory, harness.free_port(), threading.Lock()
        self.targets_file, self.targets = directory / "targets.json", []
        self.targets_file.write_text("[]")
        found = [{"files": [str(self.targets_file)], "refresh_interval": "1s"}]
        config = {
            "global": {"scrape_interval": "2s", "scrape_timeout": "2s", "evaluation_interval": "2s"},
            "rule_files": [str(rules)] if rules else [],
            "scrape_configs": [{"job_name": "agent-sidecar", "file_sd_configs": found, "honor_labels": honor_labels}],
        }
        (directory / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML.
        flags = [f"--config.file={directory / 'prometheus.yml'}", f"--storage.tsdb.path={directory / 'tsdb'}", f"--web.listen-address=127.0.0.1:{self.port}"]
        self.log = (directory / "prometheus.log").open("wb")
        self.process = subprocess.Popen(["prometheus", *flags], stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)

    def watch(self, port: int, **labels: str) -> None:
        with self.lock:
            self.targets.append({"targets": [f"127.0.0.1:{port}"], "labels": labels})
            fresh = self.targets_file.with_suffix(".new")
            fresh.write_text(json.dumps(self.targets))
            fresh.rename(self.targets_file)

    def ask(self, path: str, get: bool = False, **fields) -> dict:
        data = None if get else urllib.parse.urlencode(fields).encode()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api/v1/{path}", data=data, timeout=30) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            return json.load(error)

    def query(self, expression: str) -> list[dict]:
        try:
            return self.ask("query", query=expression)["data"]["result"]
        except (urllib.error.URLError, json.JSONDecodeError):
            return []  # Not listening yet, or not ready: that it says in plain text.

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(60)
        self.log.close()


class Stage:
    def __init__(self, directory: Path):
        self.directory, self.started, self.closing = directory, time.time(), contextlib.ExitStack()
        self.apis: list[harness.Api] = []
        self.prometheus = Prometheus(directory / "prometheus", ROOT / "alerts/agent-sidecar.rules.yaml")
        # Whoever has no sidecar has none of its series.
        self.native = Prometheus(directory / "native", None, honor_labels=True)
        # Nor has a fleet, which is scraped beside its agents.
        self.outside = Prometheus(directory / "outside-prometheus", ROOT / "alerts/agent-fleet.rules.yaml")
        for one in [self.prometheus, self.native, self.outside]:
            self.closing.callback(one.close)

    # The parts.

    def api(self, name: str, made: dict) -> harness.Api:
        one = harness.Api(made, self.directory / name)
        self.apis.append(one)
        self.closing.callback(one.close)
        return one

    def wrapper(self, name: str, *flags: str, port: int | None = None, kubernetes: bool = True) -> harness.Sidecar:
        one = harness.Sidecar(self.directory / name, "--linger", "300s", "--platform-grace", "400s", *flags)
        if port:
            one.argv[one.argv.index("--listen") + 1], one.port = f"127.0.0.1:{port}", port
        else:
            self.prometheus.watch(one.port, **({"cluster": "eu", "namespace": "agents", "pod": f"{name}-0"} if kubernetes else {}))
        return one

    def cli(self, name: str, api: harness.Api, *args: str, wrapper: harness.Sidecar, home: Path | None = None, bare: bool = False, **env: str) -> harness.Session:
        form = [] if bare else STREAM_JSON
        one = harness.Session([*wrapper.argv, harness.cli("new"), *form, *args], api, home or self.directory / name / "home", **env)
        self.closing.callback(end, one)
        return one

    def sees(self, expression: str) -> None:
        """Waits until the scraper has come by and seen it."""
        wait_for(expression, lambda: bool(self.prometheus.query(expression)), PATIENCE)

    # The situations.

    def works(self) -> None:
        """Tools that work and fail, subagents, an MCP server and one that does not start, hooks, a busy API, a clear and a compaction, a collector."""
        shelf, collector = self.directory / "shelf.py", harness.Collector(refusals=1)
        self.closing.callback(collector.close)
        shelf.write_text(SHELF)
        servers = {"shelf": {"command": sys.executable, "args": [str(shelf)]}, "attic": {"command": "/bin/false", "args": []}}
        hook = [{"matcher": "Bash", "hooks": [{"type": "command", "command": "true"}]}]
        rules = [
            {"when": {"agent": "subagent", "results": 0}, "reply": {"blocks": [bash("echo inside")], "usage": INSIDE}},
            {"when": {"agent": "subagent", "results": 1}, "reply": {"blocks": ["found it"], "usage": INSIDE}},
            {"when": {"agent": "other", "last_contains": "search"}, "reply": {"blocks": [{"web_search": "x"}, "a page"], "usage": SEARCHED}},
            {"when": {"prompt_contains": "busy"}, "times": 1, "reply": {"status": 529}},
            {"when": {"prompt_contains": "refused"}, "reply": {"status": 400, "error": "invalid_request_error"}},
            asked("tools", 0, bash("sleep 0.3; echo 1"), bash("exit 3")),
            asked("tools", 2, {"tool": "mcp__shelf__look", "input": {}}),
            asked("tools", 3, {"tool": "Write", "input": {"file_path": "x", "content": "y"}}),
            asked("agents", 0, {"subagent": "look for it"}, {"subagent": "look again", "model": "sonnet"}),
            asked("search", 0, {"tool": "WebSearch", "input": {"query": "what is x"}}),
            asked("long", 0, bash(FOREVER)),
        ]
        flags = ("--max-cost-usd", "5", "--max-turns", "40", "--otlp-endpoint", collector.url)
        wrapper = self.wrapper("works", *flags)
        args = ["--mcp-config", json.dumps({"mcpServers": servers}), "--settings", json.dumps({"hooks": {"PreToolUse": hook, "Stop": [{"hooks": hook[0]["hooks"]}]}})]
        cli = self.cli("works", self.api("works", script(*rules)), *TOOLS, *args, "--include-hook-events", "--include-partial-messages", wrapper=wrapper)
        cli.control("initialize", timeout=PATIENCE)
        for text in ("tools", "agents", "search it", "busy", "refused", "tools again", "/compact", "tools", "/clear", "agents"):
            cli.ask(text, timeout=PATIENCE)
        cli.send(user("a long one"))

    def is_held(self) -> None:
        """Limits that are enforced: a tool's time, a circle, the cost of a turn."""
        # One answer is dear enough: on a busy machine each tool is a chance to be held for its time instead.
        dear = {"usage": {**USAGE, "output_tokens": 30_000}}
        again = {"slow": (FOREVER, {"times": 1}, {}), "circle": ("echo nothing new", {}, {}), "dear": ("date +%s%N", {}, dear)}
        rules = [{"when": {"agent": "main", "prompt_contains": word}, "reply": {"blocks": [bash(command)]} | reply} | how for word, (command, how, reply) in again.items()]
        # On a busy machine a tool may take its time, and so may its end: the session is to go on.
        flags = ("--stop-interrupt", "3m", "--loop-mode", "enforce", "--max-identical-calls", "4", "--turn-max-cost-usd", "0.45", "--tool-max-duration", "15s", "--max-turns", "20")
        wrapper = self.wrapper("held", *flags)
        cli = self.cli("held", self.api("held", script(*rules)), *TOOLS, wrapper=wrapper)
        # It says nothing until it is asked: how long that took is counted between two scrapes, which is what a rate is.
        self.sees(f'up{{instance="127.0.0.1:{wrapper.port}"}} == 1')
        for text in ("slow", "circle", "dear"):
            cli.ask(text, timeout=PATIENCE)

    def would_be_held(self) -> None:
        """The same in shadow mode; its last tool goes on for ever."""
        rules = [*[asked("dear", n, bash(f"echo {n}")) for n in range(4)], asked("slow", 0, bash(FOREVER))]
        flags = ("--mode", "shadow", "--turn-max-cost-usd", "0.05", "--tool-max-duration", "2s", "--idle-timeout", "30m")
        cli = self.cli("shadow", self.api("shadow", script(*rules)), *TOOLS, wrapper=self.wrapper("shadow", *flags))
        cli.ask("dear", timeout=PATIENCE)
        cli.send(user("slow"))

    def asks(self) -> None:
        """Permissions: given, refused, and one that nobody answers; and a server of the app's own, which is spoken to over stdin."""
        rules = [asked("look", 0, {"tool": "mcp__lamp__look", "input": {}})] + [asked("may I", n, bash(f"touch x{n}")) for n in range(5)]
        wrapper = self.wrapper("asks", kubernetes=False)
        args = ["--permission-prompt-tool", "stdio", "--allowedTools", "mcp__lamp", "--mcp-config", json.dumps({"mcpServers": {"lamp": {"type": "sdk", "name": "lamp"}}})]
        cli = self.cli("asks", self.api("asks", script(*rules)), *args, wrapper=wrapper)

        def reply(line: dict, answer: dict) -> None:
            cli.send({"type": "control_response", "response": {"subtype": "success", "request_id": line["request_id"], "response": answer}})

        def until(wanted) -> dict:
            def seen(line: dict) -> bool:
                asked_of_us = line["request"] if line["type"] == "control_request" else {}
                if asked_of_us.get("subtype") == "mcp_message":
                    message = asked_of_us["message"]
                    answer = json.loads(subprocess.run([sys.executable, "-c", SHELF], input=json.dumps(message), capture_output=True, text=True, check=True).stdout or "null")
                    reply(line, {"mcp_response": answer or {"jsonrpc": "2.0", "result": {}, "id": 0}})
                return wanted(line, asked_of_us)

            return cli.until(seen, PATIENCE)

        name = "the-first"
        cli.send(harness.control(name, "initialize", sdkMcpServers=["lamp"]))
        until(lambda line, _: line["type"] == "control_response" and line["response"]["request_id"] == name)
        for looks in (1, 2):
            cli.send(user("look"))
            until(lambda line, _: line["type"] == "result")
            self.sees(f"sum(claude_agent_mcp_tool_duration_seconds_count) >= {looks}")
        cli.send(user("may I"))
        waits = 0
        for decision in [{"behavior": "allow", "updatedInput": {"command": "echo ok"}}, {"behavior": "deny", "message": "no"}] * 2:
            request = until(lambda _, asked_of_us: asked_of_us.get("subtype") == "can_use_tool")
            reply(request, decision)
            # Each by itself, or there is no rate.
            waits += 1
            self.sees(f"sum(claude_agent_permission_wait_seconds_count) >= {waits}")
        until(lambda _, asked_of_us: asked_of_us.get("subtype") == "can_use_tool")

    def share(self) -> None:
        """Two tenants at one hub with budgets of the day; one is paused, one budget raised, somebody knocks without the token."""
        token = self.directory / "token"
        token.write_text(TOKEN)
        token.chmod(0o600)
        place = ("--hub", "auto", "--socket", str(self.directory / "hub.sock"), "--control-token-file", str(token), "--hub-control", "--control-tcp", "--tenant-guard", "shadow")
        budgets = ("--container-day-max-cost-usd", "2", "--tenant-day-max-cost-usd", "1", "--container-month-max-tokens", "5000000", "--tenant-day-max-tokens", "2000000")
        served = self.api("share", script(asked("go", 0, bash("echo 1"))))
        acme = self.wrapper("acme", *place, *budgets, "--tenant", "acme", "--team", "search", "--cost-center", "cc-7")
        first = self.cli("acme", served, *TOOLS, wrapper=acme)
        first.ask("go", timeout=PATIENCE)
        wait_for("the hub", lambda: harness.listens(acme.port), PATIENCE)
        globex = self.wrapper("globex", *place, *budgets, "--tenant", "globex", port=acme.port)
        second = self.cli("globex", served, *TOOLS, "--model", "claude-sonnet-5-5", wrapper=globex, home=self.directory / "acme/home")
        name = second.ask("go", timeout=PATIENCE)["session_id"]
        third = self.cli("third", served, *TOOLS, wrapper=self.wrapper("third", *place, *budgets, "--tenant", "globex", port=acme.port))
        third.ask("go", timeout=PATIENCE)
        third.close(PATIENCE)
        for order in (["raise", "container_day", "--usd", "3"], ["pause", name]):
            argv = [harness.binary(), "control", *order, "--socket", self.directory / "hub.sock", "--control-token-file", token]
            tried: list[subprocess.CompletedProcess] = []
            # The hub has to have heard of whom it is told.
            taken = lambda: tried.append(subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE)) or tried[-1].returncode == 0  # noqa: B023, E731
            with contextlib.suppress(AssertionError):
                wait_for("an order to be taken", taken, PATIENCE)
            assert tried[-1].returncode == 0, (order, tried[-1].stdout, tried[-1].stderr)
        request = urllib.request.Request(f"http://127.0.0.1:{acme.port}/v1/pause", method="POST")
        with contextlib.suppress(urllib.error.HTTPError):
            urllib.request.urlopen(request, timeout=PATIENCE).close()

    def dies(self) -> None:
        """Killed in the middle of a turn, and gone on with by the next."""
        rules = [asked("first", 0, bash("echo 1")), asked("second", 0, bash(FOREVER))]
        served, home = self.api("dies", script(*rules)), self.directory / "dies/home"
        wrapper = self.wrapper("dies", kubernetes=False)
        cli = self.cli("dies", served, *TOOLS, wrapper=wrapper, home=home)
        name = cli.ask("first", timeout=PATIENCE)["session_id"]
        cli.send(user("second"))
        cli.until(lambda line: line["type"] == "assistant" and any(block["type"] == "tool_use" for block in line["message"]["content"]), PATIENCE)
        self.sees(f'claude_agent_process_state{{instance="127.0.0.1:{wrapper.port}", state="tool"}} == 1')
        for pid in children(cli.process.pid):
            os.kill(pid, signal.SIGKILL)
        again = self.cli("again", served, *TOOLS, "--resume", name, wrapper=self.wrapper("again", kubernetes=False), home=home)
        again.ask("first again", timeout=PATIENCE)

    def has_no_room(self) -> None:
        """Allowed hardly more series than it begins with. Those of its money are among the refused; what it is answered costs nothing."""
        free = {"input_tokens": 0, "output_tokens": 0}
        cli = self.cli("crowded", self.api("crowded", script(usage=free)), wrapper=self.wrapper("crowded", "--max-series", "300", kubernetes=False))
        cli.ask("hello", timeout=PATIENCE)

    def is_ended(self) -> None:
        """Idle for too long."""
        cli = self.cli("idle", self.api("idle", script()), wrapper=self.wrapper("idle", "--idle-timeout", "15s", kubernetes=False))
        cli.ask("hello", timeout=PATIENCE)

    def speaks_text(self) -> None:
        """In text mode, where its own telemetry is read, and forwarded to its user's collector. Its model has no price."""
        his = harness.Collector()
        self.closing.callback(his.close)
        env = {"CLAUDE_CODE_ENABLE_TELEMETRY": "1", "OTEL_METRICS_EXPORTER": "otlp", "OTEL_LOGS_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
               "OTEL_EXPORTER_OTLP_ENDPOINT": his.url}  # fmt: skip
        served = self.api("text", script(asked("go", 0, bash("sleep 2; echo 1"))))
        wrapper = self.wrapper("text", "--otlp-endpoint", "off", kubernetes=False)
        argv = [*wrapper.argv, harness.cli("new"), "-p", "go", *TOOLS]
        home = self.directory / "text/home"
        home.mkdir(parents=True, exist_ok=True)
        process = subprocess.Popen([str(word) for word in argv], cwd=home, env=harness.environment(served, home, **env), stdin=subprocess.DEVNULL,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        self.closing.callback(process.wait)
        self.closing.callback(process.terminate)
        self.sees(f'sum(last_over_time(claude_agent_process_exits_total{{instance="127.0.0.1:{wrapper.port}"}}[1h])) > 0')

    def has_a_subscription(self) -> None:
        """What a real CLI with a subscription's login has said, again: the scripted API has none."""
        agent, port, ledger = self.directory / "claude", harness.free_port(), self.directory / "subscription/ledger.jsonl"
        agent.write_text(f"#!/bin/sh\ncat '{RECORDINGS / '14f2_ratelimit_oauth.jsonl'}'\necho 'no JSON'\necho '{{\"type\":\"news\"}}'\nexec cat >/dev/null\n")
        agent.chmod(0o755)
        # Its collector is none, and says so.
        served = self.api("subscription", script())
        flags = ["--hub", "off", "--listen", f"127.0.0.1:{port}", "--ledger", ledger, "--max-tokens", "100000", "--otlp-endpoint", served.url]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen([str(word) for word in [harness.binary(), "run", *flags, "--", agent, *STREAM_JSON]], env={"PATH": os.environ["PATH"]}, **pipes)
        self.closing.callback(process.wait)
        self.closing.callback(process.stdin.close)
        self.prometheus.watch(port)

    def is_native(self) -> None:
        """Without a sidecar: by OTLP, and by the CLI's own page."""
        rules = [
            {"when": {"agent": "subagent"}, "reply": {"blocks": ["found it"], "usage": INSIDE}},
            asked("edit", 0, {"tool": "Write", "input": {"file_path": "x.py", "content": "print(1)\n"}}),
            asked("agents", 0, {"subagent": "look for it", "model": "sonnet"}),
            asked("commit", 0, bash("git add x.py && git -c user.name=a -c user.email=a@b commit -q -m x")),
        ]
        native.start(self, rules, script)

    def is_made_from_outside(self) -> None:
        """Sessions of a fleet: done, asleep, failed, refused; a hook that nobody hears, a container that nobody knows, and a daemon that fails for a while."""
        fleet = outside.Outside(self.directory / "outside", harness.binary())
        self.closing.callback(fleet.close)
        strange = {"agent-fleet.fleet": fleet.name, "agent-fleet.session": "old", "agent-fleet.key": "agent-old-1"}
        fleet.daemon.asked("POST", "/containers/create", {"name": "agent-old-1"}, {"Labels": strange, "Entrypoint": ["true"]})
        next(iter(fleet.daemon.containers.values())).created -= 3600
        with fleet.file.open("a") as file:
            # Who is to be made ahead ends at once.
            file.write('[templates.ahead]\npattern = "long-running"\nprovider = "local"\nimage = "i"\nports = [9477]\nttl = "1h"\ncommand = ["false"]\n[templates.ahead.pool]\nsize = 1\n')
        fleet.start()
        self.outside.watch(fleet.port, cluster="eu", namespace="fleets", pod="fleet-0")
        wait_for("a scrape", lambda: self.outside.query("agent_fleet_build_info"), PATIENCE)
        listener = urllib.request.Request(f"{fleet.url}/v1/events", headers={"Authorization": f"Bearer {outside.TOKENS['shop']}"})
        self.closing.callback(urllib.request.urlopen(listener, timeout=PATIENCE).close)
        assert fleet.create("task", "done") == 201 and fleet.create("stays", "sleeps") == 201
        fleet.reaches("sleeps", "ready", "active", "idle")
        fleet.ask("/v1/sessions/sleeps/pause", "POST")
        fleet.reaches("sleeps", "paused")
        fleet.reaches("done", "destroyed")
        fleet.create("ahead", "alone")
        fleet.reaches("alone", "failed")
        fleet.create("breaks", "breaks")
        fleet.reaches("breaks", "failed")
        assert (fleet.create("stays", "dear", "poor"), fleet.create("stays", "dearer", "poor")) == (201, 429)
        fleet.daemon.broken = True
        fleet.create("hurries", "in-vain")
        fleet.reaches("in-vain", "failed")
        fleet.daemon.broken = False
        # What the store could not do: what it cannot write while somebody else holds it.
        with contextlib.closing(sqlite3.connect(fleet.directory / "fleet.db", timeout=PATIENCE, isolation_level=None)) as store:
            store.execute("BEGIN IMMEDIATE")
            wait_for("an error", lambda: self.outside.query('sum(agent_fleet_store_errors_total{operation="claim"}) > 0'), PATIENCE)

    def play(self) -> None:
        """All of them at once, and then until Prometheus has seen the end of it."""
        acts = [self.works, self.is_held, self.would_be_held, self.asks, self.share, self.dies, self.has_no_room, self.is_ended, self.speaks_text, self.has_a_subscription, self.is_native,
                self.is_made_from_outside]  # fmt: skip
        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(act) for act in acts]:
                done.result()
        # What was counted at the end, too, and what the rules make of it; on a machine that has other things to do, some scrapes are late.
        self.sees('ALERTS{alertname="ClaudeAgentLimitEnforced", alertstate="firing"}')
        self.sees('sum(last_over_time(claude_agent_idle_shutdowns_total[1h])) == 1')
        self.sees("max(claude_agent_transcript_bytes) > 0")
        for metric in ["sum(agent_fleet_hook_runs_total) > 0", "sum(agent_fleet_pool_failures_total) > 0", "agent_fleet_agent_cost_usd_total > 0", 'ALERTS{alertname="AgentFleetHookDeadLetters", alertstate="firing"}']:
            wait_for(metric, lambda metric=metric: self.outside.query(metric), PATIENCE)
        # A few times, by all of them: what is asked for the whole time is asked in steps.
        self.sees(f"min(timestamp(up)) > {time.time() + 8}")

    def close(self) -> None:
        self.closing.close()


def end(session: harness.Session) -> None:
    """At once, and its tools with it: to their own devices they would go on."""
    below = [session.process.pid]
    for pid in below:
        with contextlib.suppress(OSError):
            below += children(pid)
    session.kill()
    for pid in below[1:]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def children(pid: int) -> list[int]:
    return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]
