"""What the CLI's own telemetry tells where its stream is not read, and that its user's collector misses nothing."""

from __future__ import annotations

import contextlib
import gzip
import inspect
import json
import os
import pty
import signal
import subprocess
import threading

import harness
import pytest
from harness import wait_for, whole
from test_bare import CASES, TOOLS, USAGE, bash, main, script, subagent
from test_wrapped import PATIENT, children, kinds, replayed


def start(argv, api, home, **env) -> subprocess.Popen:
    work = home / "work"
    work.mkdir(parents=True, exist_ok=True)
    pipe = subprocess.PIPE
    argv = [str(word) for word in argv]
    return subprocess.Popen(argv, cwd=work, env=harness.environment(api, home, **env), stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe)


def ask(wrapper, version, api, tmp_path, *args, **env) -> tuple[subprocess.Popen, str]:
    """One question in text mode, to its end; the process and what it said to stderr."""
    process = start([*wrapper.argv, harness.cli(version), "-p", "go", *TOOLS, *args], api, tmp_path / "home", **env)
    _, said = process.communicate(timeout=120)
    return process, said.decode()


@pytest.mark.parametrize("case", CASES)
def test_text_mode_costs_what_was_served(case, version, api, sidecar, tmp_path):
    rules, _ = CASES[case]
    served, wrapper = api(script(*rules)), sidecar()
    process, said = ask(wrapper, version, served, tmp_path)
    assert (process.returncode, said) == (0, "")
    books = replayed(wrapper.ledger_file)["totals"]
    # An older CLI does not tell for how long it wrote to the cache, and its metrics cannot know.
    tokens, expected = books["tokens"], kinds(served.tokens())
    if version == "old":
        for sums in (tokens, expected):
            sums["cache_write_5m"] += sums.pop("cache_write_1h")
    assert tokens == expected
    assert books["cost_usd"] == pytest.approx(served.cost_usd(version), abs=1e-9)
    assert not books["cost_estimated"]
    # What a background agent brings back is a prompt of its own.
    assert books["turns"] == (2 if "background" in case else 1)
    assert sorted(books["models"]) == sorted(served.tokens())


def test_a_budget_ends_text_mode(version, api, sidecar, tmp_path):
    served, wrapper = api(script(*[main(i, bash("python3 -c 'import time; time.sleep(3)'")) for i in range(30)])), sidecar("--max-cost-usd", "0.02", *PATIENT)
    process, _ = ask(wrapper, version, served, tmp_path)
    assert process.returncode == 143
    lines = wrapper.ledger()
    (stop,) = [line for line in lines if line["event"] == "limit_decided" and line["level"] == 1.0]
    assert (stop["limit"], stop["action"]) == ("usd", "stop")
    books = replayed(wrapper.ledger_file)["totals"]
    assert books["cost_usd"] == pytest.approx(served.cost_usd(version), abs=1e-9)
    # Of thirty answers seven at most: what they cost is told each second.
    assert 0.02 <= books["cost_usd"] < 0.06


def test_a_kill_loses_an_interval_at_most(version, api, sidecar, tmp_path):
    served, wrapper = api(script(*[main(i, bash("sleep 0.2")) for i in range(100)])), sidecar()
    process = start([*wrapper.argv, harness.cli(version), "-p", "go", *TOOLS], served, tmp_path / "home")
    wait_for("some answers", lambda: len(served.requests()) >= 8)
    (pid,) = children(process.pid)
    before = len(served.requests())
    counted = lambda: replayed(wrapper.ledger_file)["totals"]["tokens"]["output"] // USAGE["output_tokens"]
    # A second, and what a busy machine takes besides; it works for more than twenty, and is killed while it does.
    wait_for("all that is older than the interval", lambda: counted() >= before)
    os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == 137
    print(f"counted {counted()} of {len(served.requests())} answers, {before} of them older than the interval")
    assert before <= counted() <= len(served.requests())


def at_a_terminal(served, wrapper, cli, home: Path) -> tuple[int, list[bytes]]:
    """A CLI that somebody works with, who has said all that it asks at its first start: its pid, and what is seen of it."""
    work = home / "work"
    work.mkdir(parents=True)
    state = {
        "hasCompletedOnboarding": True,
        "theme": "dark",
        "customApiKeyResponses": {"approved": ["sk-ant-test"[-20:]], "rejected": []},
        "projects": {str(work): {"hasTrustDialogAccepted": True, "hasCompletedProjectOnboarding": True}},
    }
    (home / ".claude.json").write_text(json.dumps(state))
    argv = [*wrapper.argv, cli, "--permission-mode", "default", *TOOLS, "--", "go"]
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(work)
        env = harness.environment(served, home, TERM="xterm-256color")
        os.execve(argv[0], [str(word) for word in argv], env)
    seen = []
    threading.Thread(target=drain, args=(terminal, seen), daemon=True).start()
    return pid, seen


def test_a_terminal_costs_what_was_served(version, api, sidecar, tmp_path):
    rules, requests = CASES["three steps"]
    served, wrapper = api(script(*rules)), sidecar()
    pid, seen = at_a_terminal(served, wrapper, harness.cli(version), tmp_path / "home")
    try:
        wait_for("the answers", lambda: len(served.requests()) >= requests)
        cost = lambda: wrapper.status()["totals"]["cost_usd"]
        wait_for("the cost, while it runs", lambda: cost() == pytest.approx(served.cost_usd(version), abs=1e-9), 30)
        os.kill(pid, signal.SIGTERM)
        wait_for("the end", lambda: os.waitpid(pid, os.WNOHANG)[0] == pid)
    except BaseException:
        print(b"".join(seen)[-2000:])
        os.kill(pid, signal.SIGKILL)
        raise
    books = replayed(wrapper.ledger_file)["totals"]
    assert books["cost_usd"] == pytest.approx(served.cost_usd(version), abs=1e-9)
    assert books["turns"] == 1


def test_a_terminal_waits_at_the_door_of_a_shared_budget(version, api, sidecar, tmp_path):
    answers, usage = 6, {"input_tokens": 0, "output_tokens": 500, "cache_read_input_tokens": 0, "cache_creation": {}}
    served = api({**script(*(main(n, bash(f"true # {n}")) for n in range(30))), "defaults": {"usage": usage}})
    wrapper = sidecar("--socket", str(tmp_path / "hub.sock"), "--container-max-tokens", str(answers * 500))
    pid, seen = at_a_terminal(served, wrapper, harness.cli(version), tmp_path / "home")
    try:
        # Nothing can be said to it: it is interrupted, and ends.
        wait_for("the end", lambda: os.waitpid(pid, os.WNOHANG)[0] == pid, 90)
    except BaseException:
        print(b"".join(seen)[-2000:])
        os.kill(pid, signal.SIGKILL)
        raise
    asked = sum(1 for line in served.requests() if line["usage"])
    assert 1 < asked <= answers + 1, f"{asked} answers for {answers}"


def drain(terminal: int, seen: list[bytes]) -> None:
    try:
        while chunk := os.read(terminal, 65536):
            seen.append(chunk)
    except OSError:
        pass


@pytest.mark.parametrize("case", ["three steps", "subagent in the foreground", "web search"])
def test_both_witnesses_agree(case, version, api, session, sidecar):
    rules, _ = CASES[case]
    served, wrapper = api(script(*rules)), sidecar("--native-telemetry", "on", "--linger", "2m", "--platform-grace", "5m")
    cli = session(served, *TOOLS, sidecar=wrapper)
    result = cli.ask("go")
    cli.process.stdin.close()
    metrics = {}

    def over() -> bool:
        # Whoever has read the last numbers is the last to read any.
        with contextlib.suppress(OSError):
            metrics.update(wrapper.metrics())
        return cli.process.poll() is not None

    wait_for("the end", over)
    assert cli.close() == 0 and metrics["claude_agent_process_exits_total{reason=\"clean\"}"] == 1
    assert metrics["agent_sidecar_native_reports_total{signal=\"metrics\",outcome=\"taken\"}"] > 0
    assert sum(n for name, n in metrics.items() if name.startswith("claude_agent_cost_usd_total")) == pytest.approx(result["total_cost_usd"], abs=1e-9)
    for direction in ("over", "under"):
        assert metrics[f"claude_agent_cost_reconciliation_error_usd_total{{direction=\"{direction}\"}}"] == 0
    assert "do not agree" not in cli.tail()


@pytest.mark.parametrize("protocol", ["http/protobuf", "http/json"])
@pytest.mark.parametrize("compression", ["none", "gzip"])
def test_a_collector_gets_the_same_bytes(protocol, compression, version, api, sidecar, collector, tmp_path):
    """A second receiver stands between the CLI and the wrapper's own, so that both ends can be compared."""
    served, wrapper, his = api(script(*subagent())), sidecar("--otlp-endpoint", "off"), collector(refusals=1)
    user = {
        "CLAUDE_CODE_ENABLE_TELEMETRY": "1",
        "OTEL_METRICS_EXPORTER": "otlp",
        "OTEL_LOGS_EXPORTER": "otlp",
        "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
        "OTEL_EXPORTER_OTLP_ENDPOINT": his.url,
        "OTEL_EXPORTER_OTLP_HEADERS": "authorization=secret",
        "OTEL_EXPORTER_OTLP_COMPRESSION": compression,
        # Two seconds by default, in which a busy machine may not come to it.
        "CLAUDE_CODE_OTEL_SHUTDOWN_TIMEOUT_MS": "30000",
    }
    # The CLI is started through a tap on what it sends to the wrapper.
    tap = tmp_path / "claude"
    tap.write_text(TAP.format(whole=inspect.getsource(whole), cli=harness.cli(version), log=tmp_path / "tap"))
    tap.chmod(0o755)
    process = start([*wrapper.argv, tap, "-p", "go", *TOOLS], served, tmp_path / "home", **user)
    _, said = process.communicate(timeout=120)
    assert (process.returncode, said) == (0, b""), said.decode()
    sent = [line.split(" ", 1) for line in (tmp_path / "tap").read_text().splitlines()]
    assert [(path, body.hex()) for path, _, body in his.posts] == [(path, body) for path, body in sent]
    assert {path for path, _, _ in his.posts} == {"/v1/metrics", "/v1/logs"}
    for _, headers, body in his.posts:
        assert headers["authorization"] == "secret"
        assert headers["content-type"] == ("application/json" if protocol == "http/json" else "application/x-protobuf")
        assert (headers.get("content-encoding") == "gzip") == (compression == "gzip")
        if compression == "gzip":
            gzip.decompress(body)
    books = replayed(wrapper.ledger_file)["totals"]
    assert books["cost_usd"] == pytest.approx(served.cost_usd(version), abs=1e-9)


TAP = """#!/usr/bin/env python3
from __future__ import annotations
import http.client, http.server, os, subprocess, sys, threading, urllib.parse
env, log = dict(os.environ), open("{log}", "w", buffering=1)
lock = threading.Lock()
{whole}
base = {{s: urllib.parse.urlsplit(env[f"OTEL_EXPORTER_OTLP_{{s}}_ENDPOINT"]) for s in ("METRICS", "LOGS")}}
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        body = whole(self)
        to = base[self.path.strip("/")]
        with lock:
            log.write("/v1/" + self.path.strip("/").lower() + " " + body.hex() + "\\n")
            hop = http.client.HTTPConnection(to.hostname, to.port)
            hop.request("POST", to.path, body, {{k: v for k, v in self.headers.items() if k.lower() not in ("host", "content-length", "transfer-encoding")}})
            answer = hop.getresponse()
            told = answer.read()
        self.send_response(answer.status)
        self.send_header("content-type", answer.headers["content-type"] or "")
        self.send_header("content-length", str(len(told)))
        self.end_headers()
        self.wfile.write(told)
    def log_message(self, *_): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
for s in base: env[f"OTEL_EXPORTER_OTLP_{{s}}_ENDPOINT"] = f"http://127.0.0.1:{{server.server_port}}/{{s}}"
sys.exit(subprocess.run(["{cli}", *sys.argv[1:]], env=env).returncode)
"""


def test_a_collector_behind_tls_is_reached(version, api, sidecar, collector, tmp_path):
    certificate = tmp_path / "certificate.pem"
    flags = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1 -addext basicConstraints=critical,CA:FALSE"
    key = tmp_path / "key.pem"
    subprocess.run(["openssl", *flags.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    chain = tmp_path / "chain.pem"
    chain.write_text(key.read_text() + certificate.read_text())
    served, wrapper, his = api(script()), sidecar("--otlp-endpoint", "off"), collector(certificate=chain)
    user = {
        "CLAUDE_CODE_ENABLE_TELEMETRY": "1",
        "OTEL_METRICS_EXPORTER": "otlp",
        "OTEL_LOGS_EXPORTER": "otlp",
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        "OTEL_EXPORTER_OTLP_ENDPOINT": his.url,
        "NODE_EXTRA_CA_CERTS": str(certificate),
    }
    process, said = ask(wrapper, version, served, tmp_path, **user)
    assert (process.returncode, said) == (0, "")
    assert {path for path, _, _ in his.posts} == {"/v1/metrics", "/v1/logs"}


def test_a_dead_collector_holds_nobody_up(version, api, sidecar, collector, tmp_path):
    served, wrapper, his = api(script()), sidecar("--otlp-endpoint", "off"), collector(delay=600)
    user = {
        "CLAUDE_CODE_ENABLE_TELEMETRY": "1",
        "OTEL_METRICS_EXPORTER": "otlp",
        "OTEL_LOGS_EXPORTER": "otlp",
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        "OTEL_EXPORTER_OTLP_ENDPOINT": his.url,
    }
    # Who waited for an answer would be waited for in vain.
    process, said = ask(wrapper, version, served, tmp_path, **user)
    assert process.returncode == 0
    assert "not forwarded in time" in said
    assert replayed(wrapper.ledger_file)["totals"]["cost_usd"] == pytest.approx(served.cost_usd(version), abs=1e-9)


def test_what_cannot_be_forwarded_is_left_alone(version, api, sidecar, tmp_path):
    served, wrapper = api(script(main(0, bash("env > told")))), sidecar()
    user = {"CLAUDE_CODE_ENABLE_TELEMETRY": "1", "OTEL_METRICS_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}
    process, said = ask(wrapper, version, served, tmp_path, **user)
    assert process.returncode == 0
    assert "left alone" in said and "grpc" in said


@pytest.mark.parametrize("name,value", [("CLAUDE_CODE_ENABLE_TELEMETRY", "0"), ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "http://127.0.0.1:9/v1/metrics")])
def test_a_settings_file_that_wins_is_said(name, value, version, api, sidecar, tmp_path):
    served, wrapper = api(script()), sidecar()
    settings = tmp_path / "home/.claude/settings.json"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps({"env": {name: value}}))
    process, said = ask(wrapper, version, served, tmp_path)
    assert process.returncode == 0
    assert name in said
