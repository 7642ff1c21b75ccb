"""`agent-sidecar serve` in front of the real CLI: the hosting cookbook's contract, conversations that outlive the server, and the bill."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import harness
import pytest
import websocket
from harness import wait_for
from test_wrapped import TOOLS, replayed, script, steps, until_there

TOKEN = "a-token-of-the-tests"


class Serve:
    """A server, and what it answers. Started again in the same home, it is the same container after a restart."""

    def __init__(self, directory: Path, api: harness.Api, version: str, *flags: str, tools: list[str] = TOOLS):
        self.directory, self.port, self.metrics_port = directory, harness.free_port(), harness.free_port()
        self.ledger = directory / "ledger.jsonl"
        home = directory / "home"
        (home / "work").mkdir(parents=True, exist_ok=True)
        own = ["--serve-listen", f"127.0.0.1:{self.port}", "--listen", f"127.0.0.1:{self.metrics_port}", "--socket", directory / "hub.sock"]
        argv = [harness.binary(), "serve", *own, "--ledger", self.ledger, *flags, "--", harness.cli(version), *tools]
        environment = harness.environment(api, home, AGENT_SIDECAR_SERVE_TOKEN=TOKEN)
        with (directory / "log").open("ab") as log:
            self.process = subprocess.Popen(list(map(str, argv)), cwd=home / "work", env=environment, stdin=subprocess.DEVNULL, stderr=log)
        wait_for("server", lambda: harness.listens(self.port) or self.process.poll() is not None)
        assert self.process.poll() is None, (directory / "log").read_text()

    def request(self, method: str, path: str, body: dict | None = None, token: str = TOKEN) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, json.dumps(body) if body is not None else None, {"Authorization": f"Bearer {token}"})
        return connection, connection.getresponse()

    def get(self, path: str) -> tuple[int, dict]:
        connection, answer = self.request("GET", path)
        with contextlib.closing(connection):
            return answer.status, json.loads(answer.read() or b"null")

    def events(self, session: str, prompt: str) -> Iterator[tuple[str, dict | None]]:
        connection, answer = self.request("POST", f"/sessions/{session}/messages", {"prompt": prompt})
        with contextlib.closing(connection):
            assert (answer.status, answer.headers["content-type"]) == (200, "text/event-stream"), answer.read()
            name = ""
            for line in answer:
                field, _, value = line.decode().rstrip("\n").partition(": ")
                name = value if field == "event" else name
                if field == "data":
                    yield name, json.loads(value) if value else None

    def say(self, session: str, prompt: str) -> tuple[dict, str, dict | None]:
        """The result, and the last event."""
        events = list(self.events(session, prompt))
        results = [data for name, data in events if name == "message" and data["type"] == "ResultMessage"]
        return results[-1] if results else {}, *events[-1]

    def has_written(self, prompt: str, cost_usd: float) -> None:
        """The CLI its transcript, and the sidecar its ledger: a moment after the answer."""
        wait_for("the transcript", lambda: harness.written(self.directory / "home", prompt))
        wait_for("the ledger", lambda: replayed(self.ledger)["totals"]["cost_usd"] == pytest.approx(cost_usd, abs=1e-9))

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(120)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(30)


@pytest.fixture
def serve(tmp_path: Path, version: str):
    started = []

    def start(api: harness.Api, *flags: str, **how) -> Serve:
        started.append(Serve(tmp_path, api, version, *flags, **how))
        return started[-1]

    yield start
    for one in started:
        one.kill()


def test_a_conversation_by_the_contract_goes_on_over_turns_idleness_and_restarts(version, api, serve):
    served = api(script())
    server = serve(served, "--idle-timeout", "5s")
    assert server.get("/health") == (200, {"status": "ok"})
    for path, token, status in [("/sessions/a/messages", "wrong-token-wrong-token", 401), ("/sessions/-a/messages", TOKEN, 400)]:
        connection, answer = server.request("POST", path, {"prompt": "hello"}, token)
        assert answer.status == status
        connection.close()
    events = list(server.events("a", "hello"))
    names = [(name, data and data["type"]) for name, data in events]
    assert names[-1] == ("done", None) and names[-2] == ("message", "ResultMessage")
    assert ("message", "SystemMessage") in names and ("message", "AssistantMessage") in names
    first = events[-2][1]
    assert not first["is_error"] and first["total_cost_usd"] > 0
    second, last, _ = server.say("a", "and more")
    assert (second["session_id"], last) == (first["session_id"], "done")
    # What the model was asked has the turn before in it.
    asked = [line for line in served.requests() if line["usage"]]
    assert len(asked) == 2
    # Its agent is ended for idleness, and the next message finds its conversation.
    wait_for("rest", lambda: server.get("/sessions/a")[1]["state"] == "resting", 60)
    third, last, _ = server.say("a", "after a rest")
    assert (third["session_id"], last) == (first["session_id"], "done")
    assert server.get("/sessions/a")[1]["cost_usd"] == pytest.approx(served.cost_usd(), abs=1e-9)
    assert server.stop() == 0
    # The same container after a restart: what it costs is told from then on.
    again, before = serve(served), served.cost_usd(version)
    assert again.get("/sessions/a")[1] == {"id": "a", "state": "resting", "conversation": first["session_id"], "cost_usd": 0}
    fourth, last, _ = again.say("a", "after a restart")
    assert (fourth["session_id"], last) == (first["session_id"], "done")
    assert again.get("/sessions/a")[1]["cost_usd"] == pytest.approx(served.cost_usd(version) - before, abs=1e-9)
    # Killed, with what it wrote: so it is after a crash.
    again.has_written("after a restart", served.cost_usd(version))
    again.kill()
    after = serve(served)
    fifth, last, _ = after.say("a", "after a crash")
    assert (fifth["session_id"], last) == (first["session_id"], "done")
    assert after.stop() == 0
    transcripts = list(after.directory.glob("home/.claude/projects/*/*.jsonl"))
    assert [path.stem for path in transcripts] == [first["session_id"]], "it was one conversation"
    prompts = transcripts[0].read_text()
    assert all(text in prompts for text in ("hello", "and more", "after a rest", "after a restart", "after a crash"))
    assert (after.directory / "home/.claude/agent-sidecar-sessions.json").exists(), "beside the conversation, whoever puts that away"
    assert replayed(after.ledger)["totals"]["cost_usd"] == pytest.approx(served.cost_usd(version), abs=1e-9)


def test_sessions_beside_each_other_are_served_as_one_and_billed_to_the_cent(version, api, serve):
    served = api(script(*steps(2)))
    server = serve(served)
    for session in ("a", "b"):
        result, last, _ = server.say(session, "go")
        assert (result["subtype"], last) == ("success", "done")

    def shown() -> float:
        metrics = harness.urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=30).read().decode()
        return sum(float(line.rsplit(" ", 1)[1]) for line in metrics.splitlines() if line.startswith("claude_agent_cost_usd_total{"))

    # Wrappers tell the hub when they come to it.
    wait_for("the cost of both", lambda: shown() == pytest.approx(served.cost_usd(version), abs=1e-9))
    assert server.stop() == 0
    assert replayed(server.ledger)["totals"]["cost_usd"] == pytest.approx(served.cost_usd(version), abs=1e-9)


def test_a_websocket_says_the_same_in_the_order_of_its_messages(version, api, serve):
    served = api(script())
    server = serve(served)
    first, last, _ = server.say("a", "hello")
    assert last == "done"
    socket = websocket.create_connection(f"ws://127.0.0.1:{server.port}/sessions/a/ws", header=[f"Authorization: Bearer {TOKEN}"], timeout=60)
    for prompt in ("over a socket", "and once more"):
        socket.send(json.dumps({"prompt": prompt}))
    socket.ping("there?")
    events: list[dict] = []
    while [event["event"] for event in events].count("done") < 2:
        events.append(json.loads(socket.recv()))
        assert events[-1]["event"] != "error", events
    results = [event["data"] for event in events if event["event"] == "message" and event["data"]["type"] == "ResultMessage"]
    assert [result["session_id"] for result in results] == [first["session_id"]] * 2
    wait_for("the transcript", lambda: harness.written(server.directory / "home", "over a socket", "and once more"))
    [transcript] = server.directory.glob("home/.claude/projects/*/*.jsonl")
    said = transcript.read_text()
    assert 0 < said.find("over a socket") < said.find("and once more")
    # The end of the server has a code, too.
    server.process.terminate()
    code, _ = socket.recv_data()
    assert code == websocket.ABNF.OPCODE_CLOSE
    assert server.process.wait(120) == 0
    assert replayed(server.ledger)["totals"]["cost_usd"] == pytest.approx(served.cost_usd(version), abs=1e-9)


def test_a_client_that_goes_away_leaves_a_turn_that_ends_and_is_booked(version, api, serve):
    # It works until it is told that it was seen.
    served = api(script(*steps(3, f"{until_there('seen')}; echo")))
    server = serve(served)
    events = server.events("a", "go")
    assert next(events)[0] == "message"
    events.close()
    assert server.get("/sessions/a")[1]["state"] == "working"
    (server.directory / "home/work/seen").touch()
    wait_for("its end", lambda: server.get("/sessions/a")[1]["state"] == "waiting", 60)
    assert len([line for line in served.requests() if line["usage"]]) == 4
    assert server.stop() == 0
    assert replayed(server.ledger)["totals"]["cost_usd"] == pytest.approx(served.cost_usd(version), abs=1e-9)


def test_a_turn_that_nobody_listens_to_is_interrupted_where_that_was_asked_for(version, api, serve):
    served = api(script(*steps(60, "sleep 0.5; echo")))
    server = serve(served, "--serve-interrupt-when-gone")
    events = server.events("a", "go")
    for name, data in events:
        if data["type"] == "AssistantMessage":
            break
    events.close()
    wait_for("its end", lambda: server.get("/sessions/a")[1]["state"] == "waiting", 60)
    assert len(served.requests()) < 60
    assert server.stop() == 0


def test_what_needs_permission_is_denied_and_the_model_is_told(version, api, serve):
    served = api(script(*steps(1, "touch never")))
    server = serve(served, tools=[])
    result, last, _ = server.say("a", "go")
    assert last == "done" and len(result["permission_denials"]) == 1
    assert not list(server.directory.glob("home/work/never*"))
    assert server.stop() == 0
    allowing = serve(served, "--serve-permissions", "allow", tools=[])
    result, last, _ = allowing.say("b", "go")
    assert last == "done" and not result["permission_denials"]
    assert list(allowing.directory.glob("home/work/never*"))


def test_a_budget_that_is_used_up_is_an_error_and_so_is_every_message_after_it(version, api, serve):
    served = api(script(*steps(30, "sleep 1; echo step")))
    server = serve(served, "--max-cost-usd", "0.03")
    result, last, said = server.say("a", "go")
    assert (result["is_error"], last) == (True, "error"), said
    _, last, said = server.say("a", "and now?")
    assert (last, said["message"]) == ("error", "a limit of this session is used up")
    assert {line["turn"] for line in served.requests()} == {1}, "nothing was asked of the model"
    assert server.stop() == 0


def test_it_ends_in_the_middle_of_a_turn_with_its_cost_on_the_books(version, api, serve):
    served = api(script(*steps(30, "sleep 1; echo step")))
    server = serve(served)
    events = server.events("a", "go")
    for name, data in events:
        if data["type"] == "UserMessage":
            break
    os.kill(server.process.pid, signal.SIGTERM)
    rest = list(events)
    assert rest[-1][0] == "error"
    assert server.process.wait(120) == 0
    booked = replayed(server.ledger)["totals"]
    # Of an answer that was asked for at that very moment nobody may have heard.
    total, answers = served.cost_usd(version), len(served.requests())
    assert 0 < booked["cost_usd"] <= total * 1.3 and booked["cost_usd"] >= 0.7 * total * max(answers - 1, 1) / answers
