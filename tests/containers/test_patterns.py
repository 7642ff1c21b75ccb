"""The ways to host an agent, each as containers: what is on the books is what the API served, however they end."""

from __future__ import annotations

import json
import re
import subprocess
import threading
from pathlib import Path

import engine
import harness
import pytest
from harness import wait_for

USAGE = {
    "input_tokens": 11,
    "output_tokens": 130,
    "cache_read_input_tokens": 5000,
    "cache_creation": {"ephemeral_5m_input_tokens": 700, "ephemeral_1h_input_tokens": 90},
}
STREAM = ["--output-format", "stream-json", "--verbose", "--allowedTools", "Bash"]
SLOW = {"first_byte_delay_ms": 100, "chunk": 4, "chunk_delay_ms": 50}
BOOKS = {"AGENT_SIDECAR_LEDGER": "/data/ledger.jsonl"}
STATE = {**BOOKS, "AGENT_SIDECAR_HUB_STATE_DIR": "/data/hub"}


def bash(command: str) -> dict:
    return {"tool": "Bash", "input": {"command": command, "description": "a step"}}


def main(results: int, *blocks, **when) -> dict:
    return {"when": {"agent": "main", "results": results, **when}, "reply": {"blocks": list(blocks)}}


def script(*rules: dict) -> dict:
    return {"defaults": {"usage": USAGE}, "rules": list(rules), "otherwise": {"blocks": ["done"]}}


STEPS = script(main(0, bash("echo 1")), main(1, "and", bash("echo 2")))


def books(volume: Path) -> dict:
    """What the ledger on the volume adds up to."""
    words = [harness.binary(), "replay", "--ledger", "--format", "json", volume / "ledger.jsonl"]
    return json.loads(subprocess.check_output(words, timeout=60))


def check(volume: Path, pod: engine.Pod) -> dict:
    """Every token that was served, once, and the dollars of the list."""
    totals = books(volume)["totals"]
    served = pod.tokens().values()
    assert totals["tokens"] == {kind: sum(model[kind] for model in served) for kind in totals["tokens"]}
    assert totals["cost_usd"] == pytest.approx(pod.cost_usd(), abs=1e-9)
    assert not totals["cost_estimated"]
    return totals


def on(volume: Path) -> tuple:
    return "--volume", f"{volume}:/data"


def lines(volume: Path, event: str) -> list[dict]:
    ledger = volume / "ledger.jsonl"
    parsed = map(json.loads, harness.whole_lines(ledger) if ledger.exists() else [])
    return [line for line in parsed if line["event"] == event]


def read_to_the_end(pod: engine.Pod, task: engine.Container) -> dict[str, float]:
    """The last numbers of what waits to be read; a look before it waits is none that it waits for."""
    numbers: dict[str, float] = {}

    def over() -> bool:
        status, page = pod.get("/metrics")
        if status == 200:
            numbers.update(harness.samples(page))
        return not task.running()

    wait_for("the end of what was read", over, 120)
    return numbers


# ---- ephemeral: a task, and the container is gone


def test_two_lines_put_it_into_an_image(pod):
    one = pod(STEPS)
    asked = one.start("agent-sidecar", "doctor", "--format", "json")
    assert asked.wait() == 0, asked.output()
    version = [one.start("claude", "--version", image=image) for image in (engine.BARE, engine.WRAPPED)]
    assert [each.wait() for each in version] == [0, 0]
    assert version[0].output() == version[1].output()


def test_a_task_leaves_its_bill_and_its_exit_code(pod, volume):
    one = pod(STEPS)
    task = one.start("claude", "-p", "go", *STREAM, flags=on(volume), **BOOKS)
    assert task.wait() == 0, task.errors()
    *_, result = task.lines()
    assert result["total_cost_usd"] == pytest.approx(one.cost_usd(), abs=1e-9)
    assert len(one.requests()) == 3
    check(volume, one)


def test_a_task_that_fails_fails_as_without_it(pod, volume):
    one = pod({"otherwise": {"status": 400}})
    bare, wrapped = (one.start("claude", "-p", "go", *STREAM, image=image, flags=on(volume), **BOOKS) for image in (engine.BARE, engine.WRAPPED))
    assert bare.wait() == wrapped.wait() == 1
    assert [line["type"] for line in bare.lines()] == [line["type"] for line in wrapped.lines()]
    assert bare.errors() == wrapped.errors()


def test_a_task_that_is_over_waits_to_be_read_once(pod, volume):
    one = pod(STEPS)
    task = one.start("claude", "-p", "go", *STREAM, flags=on(volume), AGENT_SIDECAR_LINGER="5m", AGENT_SIDECAR_PLATFORM_GRACE="6m", **BOOKS)
    wait_for("the end of the agent", lambda: lines(volume, "process_exited"))
    assert task.running(), "nobody has read its numbers"
    numbers = read_to_the_end(one, task)
    assert sum(usd for name, usd in numbers.items() if name.startswith("claude_agent_cost_usd_total")) == pytest.approx(one.cost_usd(), abs=1e-9)
    assert numbers['claude_agent_process_exits_total{reason="clean"}'] == 1
    assert task.wait() == 0, "and is gone, long before the five minutes are over"
    check(volume, one)


HARDENED = {
    "read-only": ("--read-only", "--tmpfs", "/tmp", "--tmpfs", "/root"),
    "read-only, another user": ("--read-only", "--tmpfs", "/tmp", "--user", "1000:1000", "--env", "HOME=/tmp", "--workdir", "/tmp"),
    "another user": ("--user", "1000:1000", "--env", "HOME=/home/app", "--workdir", "/home/app"),
    "a user without a name": ("--user", "4711:4711", "--env", "HOME=/tmp", "--workdir", "/tmp"),
    "no capabilities": ("--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
    "docker's own init": ("--init",),
    "few processes": ("--pids-limit", "100"),
    "little memory": ("--memory", "700m", "--memory-swap", "700m", "--cpus", "1.5"),
}


@pytest.mark.parametrize("how", HARDENED)
def test_a_container_that_may_little_is_served_as_well(how, pod, volume):
    one = pod(STEPS)
    asked = {"AGENT_SIDECAR_LINGER": "5m", "AGENT_SIDECAR_PLATFORM_GRACE": "6m"}
    task = one.start("claude", "-p", "go", *STREAM, flags=(*on(volume), *HARDENED[how]), **BOOKS, **asked)
    wait_for("the end of the agent", lambda: lines(volume, "process_exited"))
    numbers = read_to_the_end(one, task)
    assert task.wait() == 0, task.errors()
    assert not [name for name, on in numbers.items() if name.startswith("agent_sidecar_degraded") and on], task.errors()
    assert task.lines()[-1]["total_cost_usd"] == pytest.approx(one.cost_usd(), abs=1e-9)
    assert not task.errors()
    check(volume, one)


# ---- the sidecar as the container's first process


def talk(pod: engine.Pod, volume: Path, *flags: str) -> tuple[engine.Container, subprocess.Popen]:
    """A CLI whose stdin is held open, under `agent-sidecar run` as PID 1."""
    task = pod.start(
        *["agent-sidecar", "run", "--ledger", "/data/ledger.jsonl", *flags, "--", "claude", "-p", "--input-format", "stream-json"],
        *[*STREAM, "--include-partial-messages"],
        flags=(*on(volume), "--interactive"),
    )
    held = subprocess.Popen(["docker", "attach", "--sig-proxy=false", task.id], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    held.stdin.write(json.dumps(harness.user("go")).encode() + b"\n")
    held.stdin.flush()
    return task, held


WORKING = {
    "in a tool": (script(main(0, bash("touch /data/started; exec sleep 600"))), lambda task, volume: (volume / "started").exists()),
    "while it streams": (
        script({"when": {"agent": "main"}, "reply": {"blocks": ["word " * 400], "pace": SLOW}}),
        lambda task, volume: "content_block_delta" in task.output(),
    ),
}


@pytest.mark.parametrize("state", WORKING)
def test_docker_stop_gets_a_result_and_the_last_cost(state, pod, volume):
    rules, reached = WORKING[state]
    one = pod(rules)
    task, held = talk(one, volume)
    wait_for(state, lambda: reached(task, volume), 60)
    # Docker's own ten seconds are enough on a machine that does nothing else.
    assert task.stop(20) == 143
    held.wait(60)
    *_, result = (line for line in task.lines() if line["type"] == "result")
    assert result["total_cost_usd"] == pytest.approx(books(volume)["totals"]["cost_usd"], abs=1e-9)
    assert len(lines(volume, "process_exited")) == 1
    if state == "in a tool":
        check(volume, one)


def test_docker_kill_leaves_what_was_answered(pod, volume):
    one = pod(script(main(0, bash("echo 1")), main(1, bash("touch /data/started; exec sleep 600"))))
    task, held = talk(one, volume)
    wait_for("the tool", (volume / "started").exists, 60)
    wait_for("two answers on the books", lambda: books(volume)["totals"]["tokens"]["input"] == 2 * USAGE["input_tokens"])
    engine.docker("kill", task.id)
    assert task.wait() == 137
    held.wait(60)
    totals, (served,) = books(volume)["totals"], one.tokens().values()
    assert [totals["tokens"][kind] for kind in ("input", "cache_read", "cache_write_5m")] == [
        served[kind] for kind in ("input", "cache_read", "cache_write_5m")
    ]
    assert 0 < totals["cost_usd"] <= one.cost_usd() + 1e-9


# ---- long-running: an app that stays


class Service:
    """The app in a container of its own."""

    def __init__(self, pod: engine.Pod, volume: Path, *flags: str, **environment: str):
        self.pod = pod
        self.container = pod.start("python3", "/app/service.py", flags=(*on(volume), *flags), **{**BOOKS, **environment})
        self.ready()

    def ready(self) -> None:
        wait_for("the app", lambda: self.pod.get("/", 8080)[0] or not self.container.running(), 60)
        assert self.container.running(), self.container.errors()

    def ask(self, name: str, text: str) -> dict:
        status, body = self.pod.get(f"/{name}", 8080, text)
        assert status == 200, self.container.errors()
        return json.loads(body)

    def ask_all(self, names: list[str], text: str) -> list[dict]:
        """At the same time."""
        answers: dict[str, dict] = {}
        threads = [threading.Thread(target=lambda name=name: answers.update({name: self.ask(name, text)})) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [answers[name] for name in names]


def test_an_app_that_stays_is_healthy_stops_and_starts_again(pod, volume):
    one = pod(STEPS)
    alive = "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9477/livez')"
    health = ("--health-cmd", f'python3 -c "{alive}"', "--health-interval", "1s", "--health-retries", "30")
    app = Service(one, volume, *health)
    for _ in range(2):
        for name in ("ada", "bob"):
            assert app.ask(name, "go")["subtype"] == "success"
    wait_for("a healthy container", lambda: app.container.inspect(".State.Health.Status") == "healthy")
    wait_for("all on one page", lambda: one.counted("claude_agent_cost_usd_total") == pytest.approx(one.cost_usd(), abs=1e-9))
    assert app.container.stop() == 0, app.container.errors()
    check(volume, one)
    engine.docker("restart", "--time", engine.GRACE, app.container.id)
    app.ready()
    assert app.ask("ada", "go")["subtype"] == "success"
    engine.docker("restart", "--time", engine.GRACE, app.container.id)
    check(volume, one)


def test_an_app_that_is_stopped_in_the_middle_has_its_last_cost(pod, volume):
    one = pod(script(main(0, bash("touch /data/started; exec sleep 600"), prompt_contains="forever")))
    app = Service(one, volume)
    assert app.ask("ada", "go")["subtype"] == "success"
    asked = threading.Thread(target=lambda: one.get("/ada", 8080, "work forever"))
    asked.start()
    wait_for("the tool", (volume / "started").exists, 60)
    assert app.container.stop() == 0, app.container.errors()
    asked.join()
    check(volume, one)


def test_an_app_of_roots_whose_agents_are_not(pod, volume):
    one = pod(script(main(0, bash("id -u > /data/who"))))
    app = Service(one, volume, AGENT_USER="app")
    assert app.ask("ada", "go")["subtype"] == "success", app.container.errors()
    assert (volume / "who").read_text() == "1000\n"
    assert (volume / "ledger.jsonl").stat().st_uid == 1000
    wait_for("the page", lambda: one.counted("claude_agent_cost_usd_total") == pytest.approx(one.cost_usd(), abs=1e-9))
    assert app.container.stop() == 0
    check(volume, one)


# Large, and then until it is told no larger, so that somebody has seen it before it is gone.
EATER = "python3 -c 'import os, time\nx = bytearray(300 << 20)\nwhile not os.path.exists(\"/data/eat\"): time.sleep(0.1)\ny = bytearray(3 << 30)'"


def test_a_tool_that_the_kernel_kills_for_memory_is_told_from_the_agent(pod, volume):
    one = pod(script(main(0, bash(EATER), prompt_contains="eat")))
    app = Service(one, volume, "--memory", "1g", "--memory-swap", "1g")
    asked = threading.Thread(target=lambda: one.get("/ada", 8080, "eat"))
    asked.start()
    tool = 'claude_agent_resident_memory_bytes{role="tool"}'
    wait_for("the tool on the page", lambda: one.get("/metrics")[0] == 200 and one.metrics().get(tool, 0) > 300 << 20, 60)
    (volume / "eat").touch()
    asked.join()
    assert app.container.running()
    told = lambda: (one.counted("claude_agent_oom_kills_total"), one.counted("claude_agent_container_oom_kills_total"))
    wait_for("the kill on the page", lambda: told() == (1, 1))
    assert one.metrics()['claude_agent_oom_kills_total{role="tool"}'] == 1
    assert [line["role"] for line in lines(volume, "oom_killed")] == ["tool"]
    assert app.ask("ada", "go on")["subtype"] == "success", "the agent lives"
    assert app.container.stop() == 0
    check(volume, one)


def test_an_agent_that_the_kernel_kills_for_memory_says_so_in_its_bill(pod, volume):
    one = pod(STEPS)
    task = one.start("claude", "-p", "go", *STREAM, flags=(*on(volume), "--memory", "64m", "--memory-swap", "64m"), **BOOKS)
    assert task.wait() == 137
    (end,) = lines(volume, "process_exited")
    assert end["reason"] == "oom"
    # It may have come as far as to ask once.
    assert books(volume)["totals"]["cost_usd"] <= one.cost_usd() + 1e-9


# ---- hybrid: the container goes, the session stays


def test_a_session_goes_on_in_the_next_container(pod, volume):
    one = pod(script())
    (volume / "home").mkdir()
    environment = {"HOME": "/data/home", "WORK": "/data/home", **STATE}
    first = Service(one, volume, **environment)
    name = first.ask("ada", "remember the number 23")["session_id"]
    assert first.container.stop() == 0
    first.container.remove()
    check(volume, one)
    second = Service(one, volume, **environment)
    again = second.ask(f"ada?resume={name}", "which number?")
    assert again["session_id"] == name
    *_, last = one.requests()
    assert last["messages"] >= 3, "it knows what was said in the container before"
    # The counters go on, too.
    wait_for("the sum of both", lambda: one.counted("claude_agent_cost_usd_total") == pytest.approx(one.cost_usd(), abs=1e-9))
    assert second.container.stop() == 0
    totals = check(volume, one)
    assert totals["turns"] == 2


def test_a_budget_of_the_day_holds_in_the_next_container(pod, volume):
    one = pod(script())
    environment = {**STATE, "AGENT_SIDECAR_CONTAINER_DAY_MAX_COST_USD": "0.02"}
    containers = 0
    for _ in range(10):
        app = Service(one, volume, **environment)
        answers = [app.ask("ada", "go") for _ in range(2)]
        asked = len(one.requests())
        assert app.container.stop() == 0
        app.container.remove()
        containers += 1
        if any("shares with others" in str(answer["result"]) for answer in answers):
            break
    assert containers > 1, "there was money for more than one container"
    answer_usd = one.cost_usd() / asked
    assert 0.02 <= one.cost_usd() < 0.02 + answer_usd
    last = Service(one, volume, **environment)
    refused = [last.ask("ada", "and now?") for _ in range(2)][-1]
    assert "shares with others" in refused["result"] and refused["turns"] == 0
    assert len(one.requests()) <= asked + 1
    assert last.container.stop() == 0
    assert books(volume)["totals"]["cost_usd"] == pytest.approx(one.cost_usd(), abs=1e-9)


# ---- many agents in a container

CREW = ["ada", "bob", "cyd", "dan"]


def test_many_in_a_container_are_one_to_the_outside_whoever_is_killed(pod, volume):
    one = pod(STEPS)
    app = Service(one, volume, "--memory", "3g", AGENT_SIDECAR_HUB_STATE_DIR="/data/hub")
    for _ in range(2):
        assert [answer["subtype"] for answer in app.ask_all(CREW, "go")] == ["success"] * 4
    served = lambda: one.counted("claude_agent_cost_usd_total") == pytest.approx(one.cost_usd(), abs=1e-9)
    wait_for("the sum of all", served)
    slots = {slot for name in one.metrics() if (slot := re.search(r'slot="(\w+)"', name))}
    assert {slot[1] for slot in slots} == {"0", "1", "2", "3"}
    status = json.loads(one.get("/status")[1])
    assert len({session["slot"] for session in status["sessions"]}) == 4

    # The one that serves is killed, and its agent with it; the others go on.
    hub = app.container.run("python3", "-c", PEER).strip()
    app.container.run("kill", "-9", hub)
    wait_for("another to serve", lambda: one.get("/metrics")[0] == 200)
    answers = app.ask_all(CREW, "go")
    assert sorted(answer["subtype"] for answer in answers).count("success") == 3, answers
    wait_for("the sum of all, the dead included", served)
    assert app.container.stop() == 0
    assert books(volume)["totals"]["cost_usd"] == pytest.approx(one.cost_usd(), abs=1e-9)


# Who serves, by the kernel's word.
PEER = """
import socket, struct
hub = socket.socket(socket.AF_UNIX)
hub.connect("/run/agent-sidecar/hub.sock")
print(struct.unpack("3i", hub.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0])
"""


def test_apps_of_several_users_have_one_hub_which_is_nobody(pod):
    one = pod(STEPS)
    # What it needs at the start, and nothing else.
    powers = ("--cap-drop", "ALL", "--cap-add", "CHOWN", "--cap-add", "SETUID", "--cap-add", "SETGID")
    hub = one.start("agent-sidecar", "hub", "--hub-users", "1000=acme,4711", "--hub-user", "4000", flags=powers)
    wait_for("the hub", lambda: one.get("/readyz")[0] == 200)
    status = hub.run("cat", "/proc/1/status")
    assert re.search(r"Uid:\s+4000\s", status) and re.search(r"CapPrm:\s+0+\n", status)
    for user in ("1000", "4711"):
        words = ["docker", "exec", "--user", user, "--env", "HOME=/tmp", "--workdir", "/tmp", "--env", "CLAUDE_CONFIG_DIR=/tmp/" + user]
        subprocess.run([*words, hub.id, "claude", "-p", "go", *STREAM], check=True, capture_output=True, timeout=120)
    by_user = lambda: {
        uid: sum(usd for name, usd in one.metrics().items() if name.startswith("claude_agent_cost_usd_total") and f'uid="{uid}"' in name)
        for uid in ("1000", "4711")
    }
    half = pytest.approx(one.cost_usd() / 2, abs=1e-9)
    wait_for("both of them", lambda: by_user() == {"1000": half, "4711": half})
    assert any('tenant="acme",uid="1000"' in name for name in one.metrics())
    assert one.get("/status")[0] == 403
    assert hub.stop() == 0
