"""A session that is made for a message, answers it through the fleet, sleeps, and is woken by the next: the real CLI in a real container."""

from __future__ import annotations

import http.client
import json

import engine
import pytest
import websocket
from test_sessions import PATIENCE, TOKENS, api, fleet  # noqa: F401  fixtures
from harness import wait_for

APP_TOKEN = "app-" + "0123456789abcdef" * 2
SERVE = ["agent-sidecar", "serve", "--serve-listen", "0.0.0.0:8000", "--", "claude", "--allowedTools", "Bash"]


def say(one, name: str, prompt: str, query: str = "") -> list[tuple[str, dict | None]]:
    """The events of a turn."""
    connection = http.client.HTTPConnection("127.0.0.1", one.port, timeout=PATIENCE)
    headers = {"Authorization": f"Bearer {TOKENS['shop']}", "Content-Type": "application/json"}
    connection.request("POST", f"/v1/sessions/{name}/messages{query}", json.dumps({"prompt": prompt}), headers)
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    events, event = [], ""
    for line in answer:
        field, _, value = line.decode().rstrip("\n").partition(": ")
        event = value if field == "event" else event
        if field == "data":
            events.append((event, json.loads(value) if value else None))
    connection.close()
    return events


def around(container: str | None) -> int:
    """What the app in a container answers without a token; 0 if there is none, or it does not."""
    words = ["inspect", "--format", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", container]
    address = engine.docker(*words, check=False).stdout.strip() if container else ""
    if not address:
        return 0
    # One that sleeps takes connections, and answers when it is woken.
    connection = http.client.HTTPConnection(address, 8000, timeout=5)
    try:
        connection.request("POST", "/sessions/talk/messages", '{"prompt": "hello"}')
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


def tell_token(one, directory) -> None:
    """Its app has a token of its own."""
    (directory / "app-token").write_text(APP_TOKEN)
    (directory / "app-token").chmod(0o600)
    file = f'{{ file = "{directory}/app-token" }}'
    text = one.file.read_text()
    text = text.replace('secrets = { ANTHROPIC', f'app_token = {file}\nsecrets = {{ AGENT_AUTH_TOKEN = {file}, ANTHROPIC')
    one.file.write_text(text)


@pytest.mark.parametrize("archive", [False, True], ids=["paused", "put-away"])
def test_a_message_makes_a_session_and_wakes_it(fleet, api, tmp_path, archive):  # noqa: F811
    one = fleet(f'[conversations]\nstore = "file://{tmp_path}/conversations"\n' if archive else "")
    one.template("chat", "hybrid", SERVE, idle_after="5s", max_age="10m", stop_grace="20s", app_port=8000, **({"archive": True} if archive else {}))
    tell_token(one, tmp_path)
    if archive:
        (tmp_path / "secret").write_text("of the fleet's own, and long enough for that")
        (tmp_path / "secret").chmod(0o600)
        one.file.write_text(one.file.read_text().replace("[fleet]\n", f'[fleet]\nsecret = {{ file = "{tmp_path}/secret" }}\n', 1))
    one.start()
    assert one.get("/v1/sessions/talk/messages", "POST", {"prompt": "hello"})[0] == 404
    first = say(one, "talk", "hello", "?template=chat")
    assert first[-1] == ("done", None), first
    result = first[-2][1]
    assert (result["type"], result["is_error"]) == ("ResultMessage", False)
    assert one.get("/v1/sessions/talk/messages", "POST", {"prompt": "hello"}, who="other")[0] == 404
    made = one.show("talk")
    # Whoever reaches the container past the fleet has no token, and what the fleet keeps and says has none in it.
    statuses: list[int] = []

    def answered() -> bool:
        # It may have been put to sleep, and woken in another container.
        one.wake("talk")
        statuses.append(around(one.show("talk")["container"]))
        return statuses[-1] != 0

    wait_for("an answer past the fleet", answered, PATIENCE)
    assert statuses[-1] == 401
    one.knows_what_was_served("talk", api)
    frozen = lambda: engine.docker("inspect", "--format", "{{.State.Paused}}", made["container"]).stdout.strip() == "true"  # noqa: E731
    # What is put away costs nothing.
    paused = one.reaches("talk", "paused", so=(lambda: one.containers() == []) if archive else frozen)
    assert paused["agent_usd"] == pytest.approx(api.cost_usd(), abs=1e-9) and paused["agent_usd"] > 0
    # The same conversation, in the same container or in another.
    second = say(one, "talk", "and more")
    assert second[-1] == ("done", None), second
    assert second[-2][1]["session_id"] == result["session_id"]
    # The same, over a WebSocket.
    headers = [f"Authorization: Bearer {TOKENS['shop']}"]
    socket = websocket.create_connection(f"ws://127.0.0.1:{one.port}/v1/sessions/talk/ws", header=headers, timeout=PATIENCE)
    socket.send(json.dumps({"prompt": "and a socket"}))
    heard = []
    while not heard or heard[-1]["event"] == "message":
        heard.append(json.loads(socket.recv()))
    assert (heard[-1], heard[-2]["data"]["session_id"]) == ({"event": "done"}, result["session_id"]), heard
    socket.close()
    assert (one.show("talk")["container"] == made["container"]) is not archive
    # Who ends it before may be told less.
    one.knows_what_was_served("talk", api)
    assert one.get("/v1/sessions/talk", "DELETE")[0] == 202
    over = one.reaches("talk", "destroyed")
    assert over["agent_usd"] == pytest.approx(api.cost_usd(), abs=1e-9)
    assert one.get("/v1/sessions/talk/messages", "POST", {"prompt": "hello"})[0] == 409
    for path in [tmp_path / "fleet.db", tmp_path / "fleet.db-wal", tmp_path / "log"]:
        assert not path.exists() or APP_TOKEN.encode() not in path.read_bytes(), path
    wait_for("no container", lambda: one.containers() == [], PATIENCE)


def test_two_share_a_container_and_each_has_its_own_agent(fleet, api, tmp_path):  # noqa: F811
    one = fleet()
    serve = [*SERVE[:2], "--agent-dirs", "/tmp/agents", *SERVE[2:]]
    one.template("team", "shared", serve, max_age="10m", stop_grace="20s", app_port=8000)
    one.file.write_text(one.file.read_text() + "[templates.team.shared]\nsessions_per_container = 2\n")
    tell_token(one, tmp_path)
    one.start()
    named = {}
    for name in ("a", "b"):
        turn = say(one, name, "hello", "?template=team")
        assert turn[-1] == ("done", None), turn
        named[name] = turn[-2][1]["session_id"]
    [container] = one.containers()
    assert named["a"] != named["b"]
    inside = lambda words: engine.docker("exec", container, "sh", "-c", f"cd /tmp/agents/_ && {words}", check=False).stdout.split()  # noqa: E731
    assert inside("ls") == ["a", "b"]
    # The CLI writes down what was said when it has answered.
    kept = lambda: [home.split("/") for home in inside("ls -d */config/projects/*/*.jsonl")]  # noqa: E731
    wait_for("what both have said", lambda: {home[0] for home in kept()} == {"a", "b"}, PATIENCE)
    assert {home[0]: home[-1].removesuffix(".jsonl") for home in kept()} == named
    # Each says what it has cost, and together that is all.
    # A turn that nobody has looked at leaves it ready.
    wait_for("both to rest", lambda: all(one.show(name)["phase"] in ("ready", "idle") for name in named), PATIENCE)
    cost = lambda: sum(one.show(name)["agent_usd"] for name in named)  # noqa: E731
    wait_for("what they cost", lambda: cost() == pytest.approx(api.cost_usd(), abs=1e-9), PATIENCE)
    # One ends, and the other goes on with its conversation.
    assert one.get("/v1/sessions/a", "DELETE")[0] == 202
    one.reaches("a", "destroyed")
    assert say(one, "b", "and more")[-2][1]["session_id"] == named["b"]
    assert say(one, "c", "hello", "?template=team")[-1] == ("done", None)
    assert one.containers() == [container]
    # All that are in it end with their container, and nothing is left.
    engine.docker("kill", container)
    for name in ("b", "c"):
        assert "its container has ended" in one.reaches(name, "failed")["reason"]
    wait_for("no container", lambda: one.containers() == [], PATIENCE)
