"""The real CLI against the scripted API, bare or behind the wrapper, and what each of them says it cost.

Everything runs on loopback, in the network namespace that `tests/live/run` makes; conftest.py refuses any other.
"""

from __future__ import annotations

import contextlib
import http.server
import itertools
import json
import os
import queue
import random
import select
import socket
import ssl
import subprocess
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Read at once: a test of an SDK, which runs in this process, changes the environment.
NAMED = os.environ.get("AGENT_SIDECAR_BIN")
STREAM_JSON = ["-p", "--input-format", "stream-json", "--output-format", "stream-json", "--verbose"]

# Dollars per million tokens: input, output, cache read, cache write for five minutes, for an hour.
# The list of the release, which is what a result is priced by.
PRICES = {
    "claude-opus-5-5": (4, 20, 0.20, 5, 8),
    "claude-sonnet-5-5": (2, 10, 0.10, 2.5, 4),
    "claude-opus-4-8": (5, 25, 0.50, 6.25, 10),
    "claude-sonnet-5": (2, 10, 0.20, 2.5, 4),
    "claude-sonnet-4-6": (3, 15, 0.30, 3.75, 6),
    "claude-sonnet-4-5": (3, 15, 0.30, 3.75, 6),
    "claude-haiku-4-5": (1, 5, 0.10, 1.25, 2),
}
OLD_PRICES = PRICES | {"claude-sonnet-5": (3, 15, 0.30, 3.75, 6)}
WEB_SEARCH_USD = 0.01


def binary() -> Path:
    """The wrapper under test."""
    if NAMED:
        return Path(NAMED)
    found = sorted(ROOT.glob("target/*-linux-*/release/agent-sidecar")) + [ROOT / "target/release/agent-sidecar"]
    return next(path for path in found if path.exists())


def cli(version: str) -> Path:
    """The CLI itself, `new` or `old`, from the environment or from where `tests/install` puts it."""
    package = "node_modules/@anthropic-ai/claude-code-linux-x64/claude"
    return Path(os.environ.get(f"CLAUDE_{version.upper()}", ROOT / ".cache/cli" / version / package))


# Below those that the kernel gives to who asks for any, and to connections; each worker has a thousand of its own, and takes them in turn.
FIRST_PORT = 10_000 + 1000 * (int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 20)
PORTS = itertools.cycle(random.sample(range(FIRST_PORT, FIRST_PORT + 1000), 1000))


def free_port() -> int:
    """One that nobody else is given before it is listened at."""
    for port in PORTS:
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            return port
    raise AssertionError("they have no end")


def whole_lines(file: Path) -> list[str]:
    """Of a file that somebody may be writing to: the last line may be there in part."""
    return [line for line in file.read_text().splitlines(True) if line.endswith("\n")]


def wait_for(what: str, true: Callable[[], bool], timeout: float = 60) -> None:
    """A minute is for machines that have other things to do."""
    end = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < end, f"no {what} within {timeout} s"
        time.sleep(0.02)


def samples(page: str) -> dict[str, float]:
    """What a page of metrics has, by name and labels as they stand."""
    lines = (line.rsplit(" ", 1) for line in page.splitlines() if line and not line.startswith("#"))
    return {name: float(value) for name, value in lines}


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Api:
    """The scripted Messages API, and its log: the truth."""

    def __init__(self, script: dict, directory: Path, address: str = "127.0.0.1"):
        directory.mkdir(parents=True, exist_ok=True)
        self.log_file = directory / "api.jsonl"
        script_file = directory / "script.json"
        script_file.write_text(json.dumps(script))
        # A port that was free may be taken by the time it is listened at, where dozens start at once: it picks its own, and says which.
        flags = ["--script", script_file, "--listen", f"{address}:0", "--log", self.log_file]
        self.process = subprocess.Popen([binary(), "messages-api", *flags], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
        try:
            wait_for("messages API", lambda: bool(select.select([self.process.stdout], [], [], 0)[0]))
            self.url = self.process.stdout.readline().strip()
            assert self.url.startswith("http://"), "the messages API has ended"
        except AssertionError:
            self.close()
            raise

    def requests(self) -> list[dict]:
        """What was asked and is over, in the order of asking."""
        if not self.log_file.exists():
            return []
        return sorted(map(json.loads, whole_lines(self.log_file)), key=lambda line: line["n"])

    def tokens(self) -> dict[str, dict[str, int]]:
        """What was served, by model."""
        models: dict[str, dict[str, int]] = {}
        for line in self.requests():
            usage = line["usage"]
            if usage is None:
                continue
            written = usage.get("cache_creation") or {"ephemeral_5m_input_tokens": usage["cache_creation_input_tokens"]}
            kinds = {
                "input": usage["input_tokens"],
                "output": usage["output_tokens"],
                "cache_read": usage["cache_read_input_tokens"],
                "cache_write_5m": written.get("ephemeral_5m_input_tokens", 0),
                "cache_write_1h": written.get("ephemeral_1h_input_tokens", 0),
                "web_search_requests": usage.get("server_tool_use", {}).get("web_search_requests", 0),
            }
            sums = models.setdefault(line["model"], dict.fromkeys(kinds, 0))
            for kind, n in kinds.items():
                sums[kind] += n
        return models

    def cost_usd(self, version: str = "new") -> float:
        """What that costs by the list of a release of the CLI."""
        listed = {"new": PRICES, "old": OLD_PRICES}[version]
        total = 0.0
        for model, tokens in self.tokens().items():
            *counts, searches = tokens.values()
            # The longest name first: sonnet-5-5 is no sonnet-5.
            prices = next(listed[name] for name in sorted(listed, key=len, reverse=True) if model.startswith(name))
            total += sum(n * price for n, price in zip(counts, prices, strict=True)) / 1e6 + searches * WEB_SEARCH_USD
        return total

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(30)
        self.process.stdout.close()


def environment(api: Api, home: Path, **more: str) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "ANTHROPIC_API_KEY": "sk-ant-test",
        "ANTHROPIC_BASE_URL": api.url,
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_AUTOUPDATER": "1",
        "IS_SANDBOX": "1",
        # Other tests have CLIs, too, and some of them no sidecar.
        "AGENT_SIDECAR_PATROL": "false",
        **more,
    }


class Session:
    """A CLI that speaks stream-json: lines go in, lines come out, with timeouts. `argv` is the CLI, or a wrapper around it."""

    def __init__(self, argv: list, api: Api, home: Path, **env: str):
        self.work = home / "work"
        self.work.mkdir(parents=True, exist_ok=True)
        self.lines: list[dict] = []
        self.raw = b""
        self.unread: queue.Queue[dict | None] = queue.Queue()
        self.stderr = tempfile.TemporaryFile()
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [str(word) for word in argv], cwd=self.work, env=environment(api, home, **env), stdin=pipe, stdout=pipe, stderr=self.stderr
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.raw += line
            # Of whoever is killed in the middle of one.
            if not line.endswith(b"\n"):
                break
            parsed = json.loads(line)
            self.lines.append(parsed)
            self.unread.put(parsed)
        self.unread.put(None)

    def send(self, *messages: dict) -> None:
        """All of them in one write."""
        self.process.stdin.write(b"".join(json.dumps(message).encode() + b"\n" for message in messages))
        self.process.stdin.flush()

    def until(self, wanted: Callable[[dict], bool], timeout: float = 120) -> dict:
        """The next line that is wanted; those before it are passed over (and kept in `lines`)."""
        end = time.monotonic() + timeout
        while True:
            try:
                line = self.unread.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"not seen within {timeout} s; {self.tail()}") from None
            assert line is not None, f"stdout ended; {self.tail()}"
            if wanted(line):
                return line

    def result(self, timeout: float = 120) -> dict:
        return self.until(lambda line: line["type"] == "result", timeout)

    def ask(self, text: str, timeout: float = 120) -> dict:
        """A user message and its result."""
        self.send(user(text))
        return self.result(timeout)

    def control(self, subtype: str, timeout: float = 120, **fields) -> dict:
        """A control request and its response."""
        name = f"test-{len(self.lines)}"
        self.send(control(name, subtype, **fields))
        answers = lambda line: line["type"] == "control_response" and line["response"]["request_id"] == name
        return self.until(answers, timeout)["response"]

    def close(self, timeout: float = 120) -> int:
        """End of input; the exit code."""
        if not self.process.stdin.closed:
            self.process.stdin.close()
        return self.process.wait(timeout)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(30)
        self.stderr.close()

    def tail(self) -> str:
        # Its place in the file is also the CLI's.
        said = os.pread(self.stderr.fileno(), 1 << 20, 0)
        last = [(line["type"], line.get("subtype")) for line in self.lines[-5:]]
        return f"last lines {last}, exit code {self.process.poll()}, stderr {said[-500:]!r}"


class Sidecar:
    """The wrapper's command line, its pages and its ledger."""

    def __init__(self, directory: Path, *flags: str):
        directory.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.ledger_file = directory / "ledger.jsonl"
        self.argv = [binary(), "run", *([] if "--socket" in flags else ["--hub", "off"]), "--listen", f"127.0.0.1:{self.port}", "--ledger", self.ledger_file, *flags, "--"]

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as answer:
            return answer.read().decode()

    def status(self) -> dict:
        return json.loads(self.get("/status"))

    def metrics(self) -> dict[str, float]:
        return samples(self.get("/metrics"))

    def ledger(self) -> list[dict]:
        return list(map(json.loads, whole_lines(self.ledger_file)))


def whole(request: http.server.BaseHTTPRequestHandler) -> bytes:
    """A body, in one piece or in chunks."""
    if length := request.headers["content-length"]:
        return request.rfile.read(int(length))
    body = b""
    while size := int(request.rfile.readline(), 16):
        body += request.rfile.read(size)
        request.rfile.readline()
    request.rfile.readline()
    return body


def written(home: Path, *texts: str, session: str = "*") -> bool:
    """Whether a transcript below a home has each of what was said, and an answer behind it: the CLI writes up to a second after it has answered."""
    lines = [json.loads(line) for file in home.glob(f"**/projects/*/{session}.jsonl") for line in whole_lines(file)]

    def answered(text: str) -> bool:
        kinds = ["asked" if line.get("type") == "user" and text in json.dumps(line["message"]) else line.get("type") for line in lines]
        return "assistant" in kinds[kinds.index("asked") :] if "asked" in kinds else False

    return all(map(answered, texts))


class Collector:
    """Takes every POST, and keeps its head and its bytes."""

    def __init__(self, delay: float = 0, refusals: int = 0, certificate: Path | None = None, port: int = 0):
        self.posts: list[tuple[str, dict[str, str], bytes]] = []
        collector = self
        left = [refusals]

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = whole(self)
                time.sleep(delay)
                status = 503 if left[0] > 0 else 200
                left[0] -= 1
                if status == 200:
                    headers = {name.lower(): value for name, value in self.headers.items()}
                    collector.posts.append((self.path, headers, body))
                self.send_response(status)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
            self.url = self.url.replace("http", "https")
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def user(text: str, **fields) -> dict:
    message = {"role": "user", "content": text}
    return {"type": "user", "message": message, "parent_tool_use_id": None, "session_id": "", **fields}


def control(name: str, subtype: str, **fields) -> dict:
    return {"type": "control_request", "request_id": name, "request": {"subtype": subtype, **fields}}


def said(result: dict) -> dict[str, dict[str, int]]:
    """A result's tokens by model, in the API's kinds as far as every version tells them."""
    models: dict[str, dict[str, int]] = {}
    for name, usage in result["modelUsage"].items():
        models[usage.get("canonicalModel", name.removesuffix("[1m]"))] = {
            "input": usage["inputTokens"],
            "output": usage["outputTokens"],
            "cache_read": usage["cacheReadInputTokens"],
            "cache_write": usage["cacheCreationInputTokens"],
            "web_search_requests": usage["webSearchRequests"],
        }
    return models


def whole_writes(served: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """What was served in the kinds of `said`, where cache writes are not told apart."""
    def merged(tokens: dict[str, int]) -> Iterator[tuple[str, int]]:
        for kind, n in tokens.items():
            if kind == "cache_write_5m":
                yield "cache_write", n + tokens["cache_write_1h"]
            elif kind != "cache_write_1h":
                yield kind, n

    return {model: dict(merged(tokens)) for model, tokens in served.items()}
