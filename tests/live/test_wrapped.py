"""The real CLI under the wrapper: what it says is what the API served, in every way that a session can go and end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import harness
import pytest
from harness import user, wait_for
from test_bare import CASES, TOOLS, USAGE, bash, main, script

SLOW = {"first_byte_delay_ms": 100, "chunk": 4, "chunk_delay_ms": 50}
LONG = "word " * 400
# For a CLI that is asked to end something, on a machine that does other things besides.
PATIENT = ["--stop-interrupt", "20s", "--stop-end", "20s", "--stop-terminate", "20s", "--platform-grace", "2m"]


def steps(n: int, command: str = "echo step") -> list[dict]:
    return [main(i, bash(f"{command} {i}")) for i in range(n)]


def until_there(file: str) -> str:
    """A command that takes as long as there is no such file."""
    return f"python3 -c 'import os, time; [time.sleep(0.1) for _ in iter(lambda: os.path.exists(\"{file}\"), True)]'"


def slow(*blocks, **when) -> dict:
    return {"when": {"agent": "main", **when}, "reply": {"blocks": list(blocks), "pace": SLOW}}


def replayed(ledger: Path) -> dict:
    """What the ledger file adds up to."""
    out = subprocess.run(
        [harness.binary(), "replay", "--ledger", "--format", "json", ledger], capture_output=True, check=True, timeout=20
    )
    return json.loads(out.stdout)


def kinds(tokens: dict[str, dict[str, int]]) -> dict[str, int]:
    """All models together, in the ledger's kinds."""
    names = ["input", "output", "cache_read", "cache_write_5m", "cache_write_1h"]
    return {name: sum(model[name] for model in tokens.values()) for name in names}


def exact(sidecar: harness.Sidecar, served: harness.Api, version: str) -> dict:
    """The ledger says what the API served, to the last token and digit."""
    books = replayed(sidecar.ledger_file)
    told, truth = books["totals"]["tokens"], kinds(served.tokens())
    if version == "old":
        # It does not tell the two kinds of cache writes apart.
        for tokens in (told, truth):
            tokens["cache_write_5m"] += tokens.pop("cache_write_1h")
    assert told == truth
    assert not books["totals"]["cost_estimated"]
    return books


def counted(sidecar: harness.Sidecar, name: str) -> float:
    return sum(value for series, value in sidecar.metrics().items() if series.split("{")[0] == name)


def counts(sidecar: harness.Sidecar, series: str, n: int) -> None:
    """The app has heard what the CLI says before the sidecar has counted it."""
    wait_for(f"{series} {n}", lambda: sidecar.metrics()[series] == n)


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def mine(line: dict) -> bool:
    """An answer to the wrapper's own question: never to be seen here."""
    return "agent-sidecar:" in json.dumps(line.get("response", {}).get("request_id", "")) if line["type"] == "control_response" else False


@pytest.mark.parametrize("case", CASES)
def test_everything_that_was_served_is_in_the_books(case, version, api, session, sidecar):
    rules, requests = CASES[case]
    served, wrapper = api(script(*rules)), sidecar()
    cli = session(served, *TOOLS, sidecar=wrapper)
    result = cli.ask("go")
    if "background" in case:
        result = cli.result()
    cost = pytest.approx(result["total_cost_usd"], abs=1e-9)
    wait_for("cost", lambda: counted(wrapper, "claude_agent_cost_usd_total") == cost)
    live = lambda: wrapper.status()["sessions"][0]
    wait_for("the end of the turn", lambda: (live()["state"], live()["cost_usd"]) == ("idle", cost))
    assert cli.close() == 0
    assert len(served.requests()) == requests
    books = exact(wrapper, served, version)
    assert books["totals"]["cost_usd"] == pytest.approx(served.cost_usd(version), abs=1e-9)
    assert not any(map(mine, cli.lines))


def test_three_turns_a_clear_and_a_compaction_add_up(version, api, session, sidecar):
    served, wrapper = api(script()), sidecar()
    cli = session(served, sidecar=wrapper)
    cli.control("initialize")
    for text in ("one", "two", "/compact", "three", "/clear", "four"):
        cli.ask(text)
    assert cli.close() == 0
    books = exact(wrapper, served, version)
    assert len(books["sessions"]) == 2
    assert books["totals"]["turns"] == 6


def test_a_resume_and_a_fork_count_their_own_spending_only(version, api, session, sidecar, tmp_path):
    served = api(script())
    first = session(served, sidecar=sidecar())
    name = first.ask("one")["session_id"]
    assert first.close() == 0
    before = served.cost_usd(version)
    for n, flags in enumerate((["--resume", name], ["--resume", name, "--fork-session"])):
        wrapper = harness.Sidecar(tmp_path / f"again{n}")
        cli = session(served, *flags, sidecar=wrapper)
        cli.ask("again")
        assert cli.close() == 0
        books, now = replayed(wrapper.ledger_file), served.cost_usd(version)
        assert books["totals"]["cost_usd"] == pytest.approx(now - before, abs=1e-9)
        before = now


def test_a_resume_after_a_kill_starts_new_books(version, api, session, sidecar, tmp_path):
    served, wrapper = api(script({"when": {"turn": 2}, "reply": {"blocks": [LONG], "pace": SLOW}})), sidecar()
    cli = session(served, "--include-partial-messages", sidecar=wrapper)
    name = cli.ask("one")["session_id"]
    cli.send(user("two"))
    cli.until(lambda line: line["type"] == "stream_event" and line["event"]["type"] == "content_block_delta")
    # What is not in it cannot be resumed.
    wait_for("the transcript", lambda: harness.written(tmp_path / "home", "one"))
    (pid,) = children(cli.process.pid)
    os.kill(pid, signal.SIGKILL)
    assert cli.process.wait(60) == 137
    books = replayed(wrapper.ledger_file)
    assert books["totals"]["cost_estimated"]
    assert books["totals"]["turns"] == 2
    assert books["totals"]["tokens"]["input"] == 2 * USAGE["input_tokens"]
    again = harness.Sidecar(tmp_path / "again")
    resumed = session(served, "--resume", name, sidecar=again)
    resumed.ask("three")
    assert resumed.close() == 0
    assert replayed(again.ledger_file)["totals"]["tokens"]["input"] == USAGE["input_tokens"]


def test_a_cut_stream_is_booked_as_the_cli_books_it(version, api, session, sidecar):
    served, wrapper = api(script({"times": 1, "reply": {"blocks": [LONG], "cut": "in_text"}})), sidecar()
    cli = session(served, "--include-partial-messages", sidecar=wrapper)
    result = cli.ask("go")
    cli.close()
    assert replayed(wrapper.ledger_file)["totals"]["cost_usd"] == pytest.approx(result["total_cost_usd"], abs=1e-9)


# ---- limits


def test_a_budget_ends_the_turn_and_the_next_message_is_refused(version, api, session, sidecar):
    # The tool takes longer than the interrupt on a busy machine: else the next request is on its way already.
    served, wrapper = api(script(*steps(30, "sleep 1; echo step"))), sidecar("--max-cost-usd", "0.03")
    cli = session(served, *TOOLS, sidecar=wrapper)
    result = cli.ask("go")
    assert result["is_error"] and result["subtype"] == "error_during_execution"
    # Nobody hangs.
    refused = cli.ask("and now?", 30)
    assert refused["num_turns"] == 0
    assert "limit of this session" in refused["result"]
    assert {line["turn"] for line in served.requests()} == {1}, "nothing was asked of the model"
    counts(wrapper, 'claude_agent_enforcements_total{limit="usd",scope="session",action="refuse",mode="enforce"}', 1)
    counts(wrapper, 'claude_agent_turns_total{outcome="limit_stopped"}', 1)
    assert cli.close() in (0, 1)
    # At most one answer above the ceiling.
    one = USAGE["input_tokens"] * 4e-6 + 130 * 25e-6 + 5000 * 0.5e-6 + 700 * 6.25e-6 + 90 * 10e-6
    assert replayed(wrapper.ledger_file)["totals"]["cost_usd"] < 0.03 + one


def test_a_session_that_used_up_its_turns_is_refused_without_asking(version, api, session, sidecar):
    served, wrapper = api(script()), sidecar("--session-max-turns", "2")
    cli = session(served, sidecar=wrapper)
    assert not any(cli.ask("go")["is_error"] for _ in range(2))
    # In the ledger it is before it is done.
    counts(wrapper, 'claude_agent_enforcements_total{limit="turns",scope="session",action="refuse",mode="enforce"}', 1)
    refused = cli.ask("go")
    assert (refused["num_turns"], refused["is_error"]) == (0, False)
    assert len(served.requests()) == 2
    assert cli.close() == 0


def test_a_resumed_session_in_json_costs_its_own_turn(version, api, tmp_path):
    """Its totals hold what was before, where the CLI restores them, and nobody can ask."""
    served = api(script(*steps(2)))
    home, wrapper = tmp_path / "home", harness.Sidecar(tmp_path / "wrapper")
    (home / "work").mkdir(parents=True)
    flags = ["-p", "go", "--output-format", "json", *TOOLS]

    def run(*argv) -> dict:
        words = [str(word) for word in argv]
        out = subprocess.run(
            words, cwd=home / "work", env=harness.environment(served, home), stdin=subprocess.DEVNULL, capture_output=True, timeout=60
        )
        return json.loads(out.stdout)

    first = run(harness.cli(version), *flags)
    before, earlier = kinds(served.tokens()), served.cost_usd(version)
    run(*wrapper.argv, harness.cli(version), *flags, "--resume", first["session_id"])
    after = kinds(served.tokens())
    books = replayed(wrapper.ledger_file)["totals"]
    assert books["tokens"] == {kind: after[kind] - before[kind] for kind in after}
    assert books["cost_usd"] == pytest.approx(served.cost_usd(version) - earlier, abs=1e-9)


def test_a_shadow_budget_only_says_so(version, api, session, sidecar):
    served, wrapper = api(script(*steps(3))), sidecar("--max-cost-usd", "0.001", "--mode", "shadow")
    cli = session(served, *TOOLS, sidecar=wrapper)
    assert not cli.ask("go")["is_error"]
    counts(wrapper, 'claude_agent_enforcements_total{limit="usd",scope="session",action="refuse",mode="shadow"}', 1)
    assert cli.close() == 0
    exact(wrapper, served, version)


@pytest.mark.parametrize(
    ("flags", "subtype"),
    [
        (["--max-turns", "2"], "error_max_turns"),
        (["--turn-max-cost-usd", "0.02"], "error_during_execution"),
        (["--turn-max-tokens", "9000"], "error_during_execution"),
        (["--turn-max-duration", "6s", *PATIENT], "error_during_execution"),
    ],
)
def test_a_limit_of_the_turn_leaves_the_session_alive(flags, subtype, version, api, session, sidecar):
    rules = [*({**rule, "when": {**rule["when"], "turn": 1}} for rule in steps(40, "sleep 0.2; echo"))]
    served, wrapper = api(script(*rules)), sidecar(*flags)
    cli = session(served, *TOOLS, sidecar=wrapper)
    first = cli.ask("go")
    assert first["subtype"] == subtype
    second = cli.ask("again")
    assert second["subtype"] == "success"
    assert cli.close() == 0
    assert replayed(wrapper.ledger_file)["totals"]["turns"] == 2


def test_a_tool_that_takes_too_long_is_interrupted(version, api, session, sidecar):
    served, wrapper = api(script(main(0, bash("python3 -c 'import time; time.sleep(60)'")))), sidecar("--tool-max-duration", "2s", *PATIENT)
    cli = session(served, *TOOLS, sidecar=wrapper)
    result = cli.ask("go")
    assert result["subtype"] == "error_during_execution"
    counts(wrapper, 'claude_agent_turns_total{outcome="limit_stopped"}', 1)
    cli.close()


def test_idle_ends_the_process_cleanly_and_work_does_not(version, api, session, sidecar):
    served, wrapper = api(script(main(0, bash("sleep 3; echo done")))), sidecar("--idle-timeout", "1500ms")
    cli = session(served, *TOOLS, sidecar=wrapper)
    assert not cli.ask("go")["is_error"], "three silent seconds of a tool are work"
    assert cli.process.wait(60) == 0
    books = [line for line in wrapper.ledger() if line["event"] == "process_exited"]
    assert [line["reason"] for line in books] == ["idle"]
    exact(wrapper, served, version)


def test_the_wall_clock_ends_the_session_with_a_result(version, api, session, sidecar):
    served, wrapper = api(script(slow(LONG))), sidecar("--max-duration", "12s", "--limit-exit-code", "77", *PATIENT)
    cli = session(served, sidecar=wrapper)
    assert cli.ask("go")["subtype"] == "error_during_execution"
    assert cli.process.wait(60) == 77


# ---- stops

STATES = {
    "before the first message": (script(), None),
    "idle": (script(), "result"),
    "waiting for the API": (script({"reply": {"hang": True}}), "asked"),
    "streaming": (script(slow(LONG)), "delta"),
    "in a tool": (script(main(0, bash("touch started; python3 -c 'import time; time.sleep(600)'"))), "tool"),
}


def reach(cli: harness.Session, served: harness.Api, until: str | None) -> None:
    cli.control("initialize")
    if until is None:
        return
    cli.send(user("go"))
    if until == "result":
        cli.result()
    elif until == "asked":
        cli.until(lambda line: line.get("subtype") == "status" and line["status"] == "requesting")
        # On its way, most likely: what is not over is in nobody's log.
        time.sleep(0.3)
    elif until == "delta":
        cli.until(lambda line: line["type"] == "stream_event" and line["event"]["type"] == "content_block_delta")
    else:
        wait_for("the tool", (cli.work / "started").exists)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 0), (signal.SIGHUP, 129)])
def test_a_signal_ends_everything_and_keeps_the_last_cost(state, number, code, version, api, session, sidecar):
    rules, until = STATES[state]
    # Four tests share two cores: the polite way gets the time that it has on a machine of its own.
    served, wrapper = api(rules), sidecar("--stop-end", "12s", "--stop-terminate", "12s", "--platform-grace", "60s")
    cli = session(served, *TOOLS, "--include-partial-messages", sidecar=wrapper)
    reach(cli, served, until)
    (pid,) = children(cli.process.pid)
    tools = children(pid)
    cli.process.send_signal(number)
    assert cli.process.wait(90) == code
    wait_for("end of all", lambda: all(map(gone, [pid, *tools])))
    books = replayed(wrapper.ledger_file)
    if until in ("delta", "tool"):
        # The turn has a result, and what was spent is the CLI's own word, where it books answers that were cut.
        told = cli.until(lambda line: line["type"] == "result")["total_cost_usd"]
        leaves_out = version == "old" and until == "delta"
        assert books["totals"]["cost_estimated"] == leaves_out
        assert leaves_out or told == pytest.approx(books["totals"]["cost_usd"])
        assert books["totals"]["tokens"]["input"] == USAGE["input_tokens"]
    elif until == "result":
        exact(wrapper, served, version)


def test_an_app_that_closes_its_input_gets_the_whole_turn(version, api, session, sidecar):
    served, wrapper = api(script(*steps(3, "sleep 0.3; echo"))), sidecar()
    cli = session(served, *TOOLS, sidecar=wrapper)
    cli.send(user("go"))
    assert cli.close() == 0
    wait_for("the last line", lambda: cli.lines and cli.lines[-1]["type"] == "result")
    exact(wrapper, served, version)


def test_an_app_that_is_gone_takes_the_agent_with_it(version, api, session, sidecar):
    served, wrapper = api(script(*steps(60, "sleep 1; echo"))), sidecar()
    cli = session(served, *TOOLS, sidecar=wrapper)
    cli.send(user("go"))
    cli.until(lambda line: line["type"] == "assistant")
    (pid,) = children(cli.process.pid)
    os.close(os.dup(cli.process.stdout.fileno()))
    # Both ends, as when the app dies.
    cli.process.stdin.close()
    os.dup2(os.open(os.devnull, os.O_RDONLY), cli.process.stdout.fileno())
    cli.process.wait(60)
    wait_for("end of the CLI", lambda: gone(pid))
    asked = len(served.requests())
    assert asked < 20, "it did not go on spending"
    assert replayed(wrapper.ledger_file)["totals"]["cost_usd"] > 0


def test_a_killed_wrapper_takes_the_cli_with_it(version, api, session, sidecar):
    served, wrapper = api(script({"reply": {"hang": True}})), sidecar()
    cli = session(served, sidecar=wrapper)
    cli.send(user("go"))
    cli.until(lambda line: line["type"] == "system")
    (pid,) = children(cli.process.pid)
    cli.process.kill()
    wait_for("end of the CLI", lambda: gone(pid))


def test_daemons_of_a_tool_do_not_outlive_the_stop(version, api, session, sidecar, tmp_path):
    mark = tmp_path / "daemon.pid"
    command = f"setsid nohup sh -c 'echo $$ > {mark}; exec sleep 300' >/dev/null 2>&1 & sleep 0.5; echo started"
    served, wrapper = api(script(main(0, bash(command)))), sidecar()
    cli = session(served, *TOOLS, sidecar=wrapper)
    cli.ask("go")
    wait_for("daemon", lambda: mark.exists() and harness.whole_lines(mark))
    daemon = int(mark.read_text())
    assert cli.close() == 0
    wait_for("end of the daemon", lambda: gone(daemon))


def test_a_reader_that_stalls_loses_nothing(version, api, session, sidecar, tmp_path):
    """Unwrapped, the CLI drops what is not read within two seconds of its end, the result first."""
    served = api(script(*({**rule, "reply": {**rule["reply"], "pace": {"chunk": 2}}} for rule in [main(0, LONG * 20, bash("echo"))])))
    wrapper = sidecar()
    argv = [*wrapper.argv, harness.cli(version), "-p", "go", "--output-format", "stream-json", "--verbose", "--include-partial-messages", *TOOLS]
    home = tmp_path / "home"
    (home / "work").mkdir(parents=True)
    process = subprocess.Popen(
        [str(word) for word in argv], cwd=home / "work", env=harness.environment(served, home), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    )
    wait_for("all requests", lambda: len(served.requests()) == 2)
    wait_for("the end of the CLI, of which nobody has read a word", lambda: not children(process.pid))
    out = process.stdout.read()
    assert process.wait(60) == 0
    lines = [json.loads(line) for line in out.splitlines()]
    assert len(out) > 200_000 and lines[-1]["type"] == "result"
    exact(wrapper, served, version)


def test_the_last_numbers_can_be_read_after_the_end(version, api, session, sidecar):
    served, wrapper = api(script()), sidecar("--linger", "2m", "--platform-grace", "5m")
    cli = session(served, sidecar=wrapper)
    cost = cli.ask("go")["total_cost_usd"]
    cli.process.stdin.close()
    wait_for("end of stdout", lambda: cli.unread.qsize() and cli.unread.queue[-1] is None)
    assert cli.process.poll() is None, "it waits to be read"
    seen = []

    def read() -> bool:
        try:
            seen.append(counted(wrapper, "claude_agent_cost_usd_total"))
        except OSError:
            pass
        return cli.process.poll() is not None

    # Far earlier than it would go unread.
    wait_for("exit", read)
    assert seen[-1] == pytest.approx(cost, abs=1e-9)
    assert cli.process.returncode == 0
