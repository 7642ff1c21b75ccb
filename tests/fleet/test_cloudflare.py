"""Cloudflare's own runtime with the Worker of deploy/cloudflare/fleet and a real daemon under it: what it begins, reaches, ends and forgets; and the fleet
with it, up to the cent.
"""

from __future__ import annotations

import base64
import contextlib
import os
import socket
import subprocess

import harness
import pytest
from conftest import GATEWAY, LEFT_OUT
from harness import wait_for
from test_sessions import CLI, SCRIPT, Fleet
from worker import IMAGE, PATIENCE, TOKEN, Worker

HOSTED = os.environ.get("AGENT_FLEET_TEST_HOSTED", "")
WAITS = "while :; do sleep 0.1; done"
# What is said over a WebSocket is said back, once.
ECHO = """
import base64, hashlib, socket
server = socket.create_server(("0.0.0.0", 8080))
connection, _ = server.accept()
head = b""
while b"\\r\\n\\r\\n" not in head:
    head += connection.recv(4096)
lines = dict(line.lower().split(": ", 1) for line in head.decode().split("\\r\\n")[1:] if ": " in line)
key = [line.split(": ", 1)[1] for line in head.decode().split("\\r\\n") if line.lower().startswith("sec-websocket-key")][0]
accept = base64.b64encode(hashlib.sha1((key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11").encode()).digest()).decode()
connection.sendall(f"HTTP/1.1 101 Switching Protocols\\r\\nUpgrade: websocket\\r\\nConnection: Upgrade\\r\\nSec-WebSocket-Accept: {accept}\\r\\n\\r\\n".encode())
frame = connection.recv(4096)
size, mask = frame[1] & 127, frame[2:6]
said = bytes(byte ^ mask[n % 4] for n, byte in enumerate(frame[6 : 6 + size]))
said += b" " + lines.get("authorization", "nothing").encode()
connection.sendall(bytes([129, len(said)]) + said)
connection.recv(4096)
"""


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    if LEFT_OUT:
        pytest.skip("AGENT_SIDECAR_TESTS_NO_DOCKER=1")
    one = Worker(tmp_path_factory.mktemp("worker"), FLEET_TOKEN=TOKEN)
    try:
        yield one.ready()
    finally:
        one.close()


def begin(worker: Worker, key: str, command: list[str], **more: object) -> dict:
    answers: list[tuple[int, object]] = []

    def begun() -> bool:
        answers.append(worker.ask("PUT", f"/v1/sandboxes/{key}", {"command": command, "labels": {"key": key}, "ttl_s": 600, **more}))
        # One that was not there in time is asked for again, as the fleet does it.
        return answers[-1][0] not in (0, 503)

    wait_for(f"{key} to begin", begun, PATIENCE)
    status, told = answers[-1]
    assert status == 200, (told, worker.said()[-3000:])
    return told


def becomes(worker: Worker, key: str, state: str) -> dict:
    told: dict = {}

    def there() -> bool:
        told.update(worker.ask("GET", f"/v1/sandboxes/{key}")[1])
        return told.get("state") == state

    wait_for(f"{key} to be {state}", there, PATIENCE)
    return told


def test_the_provider_does_with_it_what_every_provider_must(worker):
    assert HOSTED, "AGENT_FLEET_TEST_HOSTED is not the hosted tests of agent-fleet: tests/fleet/run builds them"
    named = {"AGENT_FLEET_TEST_CLOUDFLARE": worker.url, "AGENT_FLEET_TEST_CLOUDFLARE_TOKEN": TOKEN, "AGENT_FLEET_TEST_CLOUDFLARE_IMAGE": IMAGE}
    argv = [HOSTED, "hosted::cloudflare::its_worker_does_what_every_provider_must", "--exact", "--nocapture"]
    done = subprocess.run(argv, capture_output=True, text=True, env={**os.environ, **named}, timeout=900)
    print(done.stderr)
    assert done.returncode == 0, done.stderr[-6000:] + worker.said()[-3000:]
    assert "1 passed" in done.stdout and "not tried" not in done.stderr


def test_only_who_has_the_token_is_let_in(worker, tmp_path):
    begin(worker, "closed", ["sh", "-c", "cd /app && exec python3 -m http.server 8080"])
    wait_for("its port", lambda: worker.ask("GET", "/v1/sandboxes/closed/ports/8080/service.py")[0] == 200, PATIENCE)
    ways = [("GET", "/v1/sandboxes/closed"), ("GET", "/v1/sandboxes"), ("DELETE", "/v1/sandboxes/closed"), ("GET", "/v1/sandboxes/closed/ports/8080/"), ("GET", "/")]
    for method, path in ways:
        for token in (None, "", TOKEN[:-1], TOKEN + "x"):
            assert worker.ask(method, path, token=token)[0] == 401, (method, path, token)
        assert worker.ask(method, path, token=None, headers={"x-agent-fleet-port": "closed:8080"})[0] == 401
    assert worker.ask("GET", "/v1/sandboxes/closed")[1]["state"] == "running"
    assert worker.ask("PUT", "/v1/sandboxes/x", {"labels": {}, "ttl_s": 0})[0] == 400
    assert worker.ask("PUT", "/v1/sandboxes/x", {"labels": {}, "ttl_s": 60, "image": "another"})[0] == 400
    assert worker.ask("GET", "/v1/sandboxes/x")[0] == 404
    # One that was given no secret, or half of one, lets nobody in with it.
    for name in ("none", "short"):
        (tmp_path / name).mkdir()
    none, short = Worker(tmp_path / "none"), Worker(tmp_path / "short", FLEET_TOKEN="short", FLEET_TOKEN_OLD=TOKEN)
    try:
        none.ready(), short.ready()
        assert [none.ask("GET", "/v1/sandboxes", token=token)[0] for token in (None, "", "undefined", TOKEN)] == [403] * 4
        assert [short.ask("GET", "/v1/sandboxes", token=token)[0] for token in (None, "", "short")] == [401] * 3
        # The token before is good while it is replaced.
        assert short.ask("GET", "/v1/sandboxes", token=TOKEN)[0] == 200
    finally:
        none.close()
        short.close()


def test_the_sidecar_hears_that_it_shall_end_and_what_does_not_hear_is_killed(worker):
    # It listens when it can hear.
    hears = f"trap 'exit 5' TERM; cd /app; python3 -m http.server 8080 & {WAITS}"
    begin(worker, "hears", ["agent-sidecar", "run", "--", "sh", "-c", hears], env={"A": "b"})
    for page in ("9477/metrics", "8080/service.py"):
        wait_for(page, lambda page=page: worker.ask("GET", f"/v1/sandboxes/hears/ports/{page}")[0] == 200, PATIENCE)
    status, told = worker.ask("POST", "/v1/sandboxes/hears/stop", {"grace_s": 120})
    assert (status, told["state"]) == (200, "stopping")
    over = becomes(worker, "hears", "stopped")
    assert (over["exit_code"], over["reason"]) == (5, "it was asked to end")
    # By its ports it is not begun again.
    assert worker.ask("GET", "/v1/sandboxes/hears/ports/9477/metrics")[0] == 409
    # The first process of a container hears no TERM that it does not handle.
    begin(worker, "deaf", ["sleep", "10000"])
    assert worker.ask("POST", "/v1/sandboxes/deaf/stop", {"grace_s": 2})[0] == 200
    over = becomes(worker, "deaf", "stopped")
    assert (over["exit_code"], over["reason"]) == (137, "it was asked to end, and it did not end by itself")


def test_its_time_is_over_though_nobody_asks(worker):
    before = set(worker.running())
    # Long enough to see it first.
    begin(worker, "late", ["sh", "-c", f"trap '' TERM; {WAITS}"], ttl_s=20)
    (mine,) = set(worker.running()) - before
    # Not one request until it is gone.
    wait_for("its end", lambda: mine not in worker.running(), PATIENCE)
    over = becomes(worker, "late", "stopped")
    assert over["reason"] == "its time was over, and it did not end by itself" and over["exit_code"] == 137


def test_requests_to_its_port_set_back_no_timer_and_the_fleets_word_does(worker):
    # First, and it would be over first.
    asked = begin(worker, "busy", ["sh", "-c", f"trap 'exit 0' TERM; {WAITS}"], idle_s=20)
    until = "2999-01-01T00:00:00.000Z"
    status, told = worker.ask("POST", "/v1/sandboxes/busy/keepalive", {"until": until})
    # Never beyond its end.
    assert (status, told["idle_ends"]) == (200, asked["ends"])
    begin(worker, "idle", ["sh", "-c", "cd /app && exec agent-sidecar run -- python3 -m http.server 8080"], idle_s=20)

    def ended() -> bool:
        worker.ask("GET", "/v1/sandboxes/idle/ports/8080/service.py")
        return worker.ask("GET", "/v1/sandboxes/idle")[1]["state"] == "stopped"

    wait_for("the end of who is idle", ended, PATIENCE)
    assert worker.ask("GET", "/v1/sandboxes/idle")[1]["reason"] == "it was idle"
    assert worker.ask("GET", "/v1/sandboxes/busy")[1]["state"] == "running"


def test_a_web_socket_is_passed_on_without_the_token(worker):
    begin(worker, "socket", ["python3", "-c", ECHO])

    def said() -> str:
        with socket.create_connection(("127.0.0.1", worker.port), timeout=PATIENCE) as connection:
            key = base64.b64encode(os.urandom(16)).decode()
            lines = ["GET /talk HTTP/1.1", f"Host: 127.0.0.1:{worker.port}", "Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13"]
            lines += [f"Sec-WebSocket-Key: {key}", "x-agent-fleet-port: socket:8080", f"x-agent-fleet-authorization: Bearer {TOKEN}", "authorization: Bearer theirs"]
            connection.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
            head = b""
            while b"\r\n\r\n" not in head:
                piece = connection.recv(4096)
                assert piece, head
                head += piece
            if b" 101 " not in head.split(b"\r\n")[0]:
                return ""
            word = b"hello"
            connection.sendall(bytes([129, 128 | len(word), 0, 0, 0, 0]) + word)
            frame = head.split(b"\r\n\r\n", 1)[1]
            while len(frame) < 2 or len(frame) < 2 + frame[1]:
                piece = connection.recv(4096)
                assert piece, frame
                frame += piece
            return frame[2 : 2 + frame[1]].decode()

    answers: list[str] = []

    def echoed() -> bool:
        answers.append(said())
        return bool(answers[-1])

    wait_for("an echo", echoed, PATIENCE)
    assert answers[-1] == "hello bearer theirs"


def test_lists_have_pages_and_what_is_deleted_is_forgotten(worker):
    keys, before = [f"page-{n}" for n in range(3)], set(worker.running())
    for key in keys:
        begin(worker, key, ["sleep", "10000"], labels={"of": "page", "n": key})
    got, cursor = [], ""
    while True:
        status, page = worker.ask("GET", f"/v1/sandboxes?label.of=page&limit=2{cursor}")
        assert status == 200 and len(page["sandboxes"]) <= 2
        got += [told["key"] for told in page["sandboxes"]]
        if "next" not in page:
            break
        cursor = f"&cursor={page['next']}"
    assert got == keys
    assert [told["key"] for told in worker.ask("GET", "/v1/sandboxes?label.of=page&label.n=page-1")[1]["sandboxes"]] == ["page-1"]
    mine = set(worker.running()) - before
    assert len(mine) == 3
    for key in [*keys, *keys]:
        assert worker.ask("DELETE", f"/v1/sandboxes/{key}")[0] == 204
    assert worker.ask("GET", "/v1/sandboxes?label.of=page")[1] == {"sandboxes": []}
    assert worker.ask("GET", "/v1/sandboxes/page-1")[0] == 404
    wait_for("their end", lambda: not mine & set(worker.running()), PATIENCE)


def test_a_session_of_the_fleet_is_done_and_billed_and_its_key_is_kept_nowhere(worker, tmp_path):
    api = harness.Api(SCRIPT, tmp_path / "api", GATEWAY)
    token = tmp_path / "worker-token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    fleet = Fleet(tmp_path, api, f'[providers.cf]\nkind = "cloudflare"\nurl = "{worker.url}"\ntoken = {{ file = "{token}" }}\n')
    try:
        fleet.template("task", "ephemeral", ["agent-sidecar", "run", "--linger", "20s", "--", *CLI], provider="cf")
        fleet.start()
        fleet.create("task", "first")
        over = fleet.reaches("first", "destroyed")
        assert len(api.requests()) == 2
        assert over["agent_usd"] == pytest.approx(api.cost_usd(), abs=1e-9) and over["agent_usd"] > 0
        assert over["container_usd"] > 0
        listed = worker.ask("GET", f"/v1/sandboxes?label.agent-fleet.fleet={fleet.name}")[1]
        assert listed == {"sandboxes": []}
    finally:
        fleet.close()
        api.close()
    kept = [path for path in worker.directory.rglob("*") if path.is_file() and not path.is_symlink()]
    assert any(path.suffix == ".sqlite" for path in kept), "the Worker keeps something"
    for path in kept:
        # Its stores have files that come and go.
        with contextlib.suppress(FileNotFoundError):
            assert b"sk-ant-test-of-the-fleet" not in path.read_bytes(), path
