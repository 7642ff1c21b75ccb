"""A conversation that is put away: its container goes, and another goes on with it, on a real daemon with the real CLI."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import tarfile
import threading
from pathlib import Path

import engine
import harness
import pytest
from conftest import LEFT_OUT, NETWORK
from harness import wait_for
from test_messages import SERVE, say, tell_token
from test_sessions import PATIENCE, fleet  # noqa: F401: a fixture

SECRET = "0123456789abcdef" * 4
# What an image of its own does at its start: a hub for all agents, and one of them that begins a conversation, or goes on with it.
AGENT = """
mkdir -p /work; cd /work
agent-sidecar hub &
claude ${AGENT_FLEET_CONVERSATION:+--resume $AGENT_FLEET_CONVERSATION} -p "Say hello" --output-format stream-json --verbose --allowedTools Bash
echo "the workspace: $(cat notes)" "$(ls)"
exec sleep 3600
"""
BASH = {"tool": "Bash", "input": {"command": "echo a-line >> notes", "description": "a step"}}
WAIT = {"tool": "Bash", "input": {"command": "while [ ! -e /tmp/go ]; do sleep 0.1; done", "description": "a step"}}


USAGE = {"input_tokens": 11, "output_tokens": 130, "cache_read_input_tokens": 5000}
SCRIPT = {
    "defaults": {"usage": USAGE},
    "rules": [
        {"when": {"agent": "main", "results": 0, "prompt_contains": "wait"}, "reply": {"blocks": [WAIT]}},
        {"when": {"agent": "main", "results": 0}, "reply": {"blocks": [BASH]}},
    ],
    "otherwise": {"blocks": ["done"]},
}


def gateway() -> str:
    """What containers find us at."""
    return engine.docker("network", "inspect", "--format", "{{(index .IPAM.Config 0).Gateway}}", NETWORK).stdout.strip()


def remembered(directory: Path) -> dict:
    with contextlib.closing(sqlite3.connect(directory / "fleet.db")) as store:
        return json.loads(store.execute("SELECT document FROM sessions").fetchone()[0])


@pytest.fixture
def api(tmp_path: Path):
    if LEFT_OUT:
        pytest.skip("AGENT_SIDECAR_TESTS_NO_DOCKER=1")
    one = harness.Api(SCRIPT, tmp_path / "api", gateway())
    yield one
    one.close()


@pytest.fixture
def store(tmp_path: Path) -> str:
    """A directory, or what somebody names: a bucket, a database."""
    return os.environ.get("AGENT_FLEET_TEST_CONVERSATIONS") or f"file://{tmp_path}/conversations"


def kept(directory: Path) -> list[Path]:
    return [path for path in (directory / "conversations").rglob("*") if path.is_file()]


def test_a_conversation_goes_on_in_another_container(fleet, api, store, tmp_path):  # noqa: F811
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    secret.chmod(0o600)
    one = fleet(f'[conversations]\nstore = "{store}"\n')
    # Where sidecars reach it: they tell by themselves.
    url = f"http://{gateway()}:{one.port}"
    text = one.file.read_text().replace("[fleet]\n", f'[fleet]\nurl = "{url}"\nsecret = {{ file = "{secret}" }}\n', 1)
    one.file.write_text(text.replace('listen = "127.0.0.1', 'listen = "0.0.0.0', 1))
    one.template("chat", "hybrid", ["sh", "-c", AGENT], archive=True, idle_after="20s", ttl="1h", stop_grace="1s")
    one.start()
    one.create("chat", "talk")
    first = one.reaches("talk", "ready", "active", "idle")
    wait_for("the first answers", lambda: len(api.requests()) == 2, PATIENCE)
    paused = one.reaches("talk", "paused")
    # Its container is gone, and what it was is kept: neither the key nor the token, and whole.
    assert one.containers() == []
    assert paused["agent_usd"] == pytest.approx(api.cost_usd(), abs=1e-9) and paused["agent_usd"] > 0
    if store.startswith("file:"):
        [archive] = kept(tmp_path)
        with tarfile.open(archive) as tar:
            names = tar.getnames()
            assert "workspace/notes" in names and any(name.endswith(".jsonl") and "/projects/" in name for name in names), names
            assert tar.extractfile("workspace/notes").read() == b"a-line\n"
    assert SECRET not in (tmp_path / "log").read_text()

    assert one.get("/v1/sessions/talk/resume", "POST")[0] == 202
    second = one.reaches("talk", "ready", "active", "idle")
    assert (first["generation"], second["generation"]) == (1, 2) and first["container"] != second["container"]
    labels = json.loads(engine.docker("inspect", "--format", "{{json .Config.Labels}}", second["container"]).stdout)
    environment = json.loads(engine.docker("inspect", "--format", "{{json .Config.Env}}", second["container"]).stdout)
    told = dict(variable.split("=", 1) for variable in environment)
    assert told["AGENT_SIDECAR_FLEET_TOKEN"] not in json.dumps(labels)
    assert told["AGENT_SIDECAR_FLEET_TOKEN"].encode() not in (tmp_path / "fleet.db").read_bytes()
    # What was said before is in what is asked now, and what was done before is there.
    wait_for("its workspace", lambda: "the workspace:" in one.get("/v1/sessions/talk/logs")[1], PATIENCE)
    assert "the workspace: a-line\na-line notes" in one.get("/v1/sessions/talk/logs")[1]
    asked = [(request["turn"], request["messages"]) for request in api.requests()]
    assert [turn for turn, _ in asked] == [1, 1, 2, 2] and asked[2][1] > asked[1][1], asked

    pushed = remembered(tmp_path)["pushed"]
    assert (pushed["generation"], pushed["seq"] > 0) == (2, True), pushed
    assert one.get("/v1/sessions/talk", "DELETE")[0] == 202
    over = one.reaches("talk", "destroyed")
    assert over["agent_usd"] == pytest.approx(api.cost_usd(), abs=1e-9)
    assert one.containers() == []
    if store.startswith("file:"):
        wait_for("nothing to be left", lambda: kept(tmp_path) == [], PATIENCE)


def test_one_of_two_in_a_container_is_put_away_while_the_other_works(fleet, api, tmp_path):  # noqa: F811
    (tmp_path / "secret").write_text(SECRET)
    (tmp_path / "secret").chmod(0o600)
    one = fleet(f'[conversations]\nstore = "file://{tmp_path}/conversations"\n')
    one.file.write_text(one.file.read_text().replace("[fleet]\n", f'[fleet]\nsecret = {{ file = "{tmp_path}/secret" }}\n', 1))
    serve = [*SERVE[:2], "--agent-dirs", "/tmp/agents", *SERVE[2:]]
    one.template("team", "shared", serve, archive=True, idle_after="5s", max_age="1h", stop_grace="20s", app_port=8000)
    one.file.write_text(one.file.read_text() + "[templates.team.shared]\nsessions_per_container = 2\n")
    tell_token(one, tmp_path)
    one.start()
    result = say(one, "a", "hello", "?template=team")[-2][1]
    turns: dict[str, list] = {}
    works = {name: threading.Thread(target=lambda name=name: turns.update({name: say(one, name, "wait", "?template=team")})) for name in ("b", "c")}

    def begins(name: str) -> None:
        works[name].start()
        wait_for(f"{name} to be there", lambda: one.get(f"/v1/sessions/{name}")[0] == 200, PATIENCE)
        one.reaches(name, "active")

    begins("b")
    paused = one.reaches("a", "paused")
    # Its place is free, nothing of it is left there, and the other one has heard nothing of it.
    [first] = one.containers()
    assert engine.docker("exec", first, "ls", "/tmp/agents/_").stdout.split() == ["b"]
    assert one.show("b")["phase"] == "active" and works["b"].is_alive() and paused["agent_usd"] > 0
    [archive] = kept(tmp_path)
    with tarfile.open(archive) as tar:
        names = tar.getnames()
        assert any(name.endswith(f"/{result['session_id']}.jsonl") for name in names), names
        assert tar.extractfile("workspace/notes").read() == b"a-line\n"
    # Somebody else takes it: it goes on in another container, with what it had.
    begins("c")
    assert one.containers() == [first]
    again = say(one, "a", "and more")
    assert (again[-1], again[-2][1]["session_id"]) == (("done", None), result["session_id"]), again
    [second] = set(one.containers()) - {first}
    assert engine.docker("exec", second, "cat", "/tmp/agents/_/a/workspace/notes").stdout == "a-line\na-line\n"
    assert all(work.is_alive() for work in works.values())
    engine.docker("exec", first, "touch", "/tmp/go")
    for work in works.values():
        work.join(PATIENCE)
    assert {name: turn[-1] for name, turn in turns.items()} == dict.fromkeys(works, ("done", None)), turns
    # Each has its part, over all containers that it was in, and together that is all.
    cost = lambda: sum(one.show(name)["agent_usd"] for name in ("a", "b", "c"))  # noqa: E731
    wait_for("what they cost", lambda: cost() == pytest.approx(api.cost_usd(), abs=1e-9), PATIENCE)
    for name in ("a", "b", "c"):
        assert one.get(f"/v1/sessions/{name}", "DELETE")[0] == 202
        one.reaches(name, "destroyed")
    wait_for("nothing to be left", lambda: kept(tmp_path) == [], PATIENCE)
