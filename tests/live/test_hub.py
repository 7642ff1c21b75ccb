"""Several real CLIs that share an address and a budget."""

from __future__ import annotations

import json
import socket
import subprocess
import threading
from pathlib import Path

import harness
import pytest
from harness import wait_for
from test_bare import TOOLS, bash, main, script


def post(path: Path, request: str) -> str:
    with socket.socket(socket.AF_UNIX) as hub:
        hub.connect(str(path))
        hub.sendall(f"POST {request} HTTP/1.1\r\nHost: hub\r\nConnection: close\r\n\r\n".encode())
        return hub.makefile().readline()


def test_two_are_served_as_one_and_share_a_budget_that_can_be_raised(version, api, session, sidecar, tmp_path):
    served = api(script())
    flags = ("--socket", str(tmp_path / "hub.sock"), "--hub-control", "--container-max-cost-usd", "0.03")
    # They write the same ledger, too.
    first, second = sidecar(*flags), sidecar(*flags)
    one = session(served, *TOOLS, sidecar=first)
    # Whoever is first serves, at its own address.
    wait_for("the first to serve", lambda: harness.listens(first.port))
    other = session(served, *TOOLS, sidecar=second)
    clis = [one, other]
    refused = None
    for turn in range(20):
        result = clis[turn % 2].ask("go")
        if "shares with others" in str(result.get("result")):
            refused = clis[turn % 2]
            break
    assert refused, "the money is used up at some time"
    asked = len(served.requests())
    again = refused.ask("and now?")
    assert again["num_turns"] == 0 and "shares with others" in again["result"]
    assert len(served.requests()) == asked, "nothing was asked of the model"

    def books() -> float:
        argv = [harness.binary(), "replay", "--ledger", "--format", "json", first.ledger_file]
        out = subprocess.run(argv, capture_output=True, check=True)
        return json.loads(out.stdout)["totals"]["cost_usd"]

    def shown() -> float:
        return sum(value for name, value in first.metrics().items() if name.startswith("claude_agent_cost_usd_total"))

    # The second has no page of its own: it is served with the first.
    wait_for("both in the sum", lambda: abs(shown() - books()) < 1e-9 and first.metrics()['agent_sidecar_hub_wrappers{state="live"}'] == 2)
    assert len(first.status()["sessions"]) == 2
    assert "200" in post(tmp_path / "hub.sock", "/v1/budgets/container?usd=5")
    wait_for("the same session to go on", lambda: "shares with others" not in str(refused.ask("once more")["result"]))
    assert len(served.requests()) > asked
    for cli in clis:
        cli.close()


def test_who_is_paused_is_refused_with_a_reason_and_goes_on_in_the_same_session(version, api, session, sidecar, tmp_path):
    served = api(script())
    place = ("--socket", str(tmp_path / "hub.sock"))
    cli = session(served, *TOOLS, sidecar=sidecar(*place, "--hub-control", "--max-cost-usd", "0.005"))

    def control(*words: str) -> None:
        subprocess.run([harness.binary(), "control", *words, *place], capture_output=True, check=True)

    def until_it_answers(what: str, *words: str) -> dict:
        """Asks until the result says this, or, without, until the model has answered."""
        heard: dict = {}

        def hears() -> bool:
            heard.update(cli.ask("go"))
            return words[0] in str(heard["result"]) if words else "agent-sidecar" not in str(heard.get("result")) and heard["num_turns"] > 0

        wait_for(what, hears, 120)
        return heard

    first = cli.ask("go")
    used_up = until_it_answers("refusal", "a limit of this session is used up")
    assert used_up["num_turns"] == 0 and not used_up["is_error"]
    # The CLI forgets the refusal that it was told, with what it is told next.
    control("limits", first["session_id"], "--max-cost-usd", "9")
    until_it_answers("the session to go on")
    control("pause", first["session_id"])
    paused = until_it_answers("the pause", "is paused")
    asked = len(served.requests())
    again = cli.ask("and now?")
    assert (again["num_turns"], again["is_error"], again["session_id"]) == (0, False, first["session_id"])
    assert "is paused" in again["result"] and paused["session_id"] == first["session_id"]
    assert len(served.requests()) == asked, "nothing was asked of the model"
    control("resume", first["session_id"])
    assert until_it_answers("the session to go on")["session_id"] == first["session_id"]
    assert len(served.requests()) > asked
    cli.close()


def test_agents_that_share_a_budget_of_tokens_are_above_it_by_one_answer_at_most(api, session, sidecar, tmp_path):
    # Slow enough for the others to see what is reserved.
    slow = script()
    slow["defaults"]["pace"] = {"first_byte_delay_ms": 1500}
    served = api(slow)
    flags = ("--socket", str(tmp_path / "hub.sock"), "--container-max-tokens", "40000")
    clis = [session(served, *TOOLS, sidecar=sidecar(*flags)) for _ in range(2)]
    refused = set()
    for _ in range(40):
        for n, cli in enumerate(clis):
            if n not in refused:
                cli.send(harness.user("go"))
        for n, cli in enumerate(clis):
            if n not in refused and "shares with others" in str(cli.result().get("result")):
                refused.add(n)
        if len(refused) == 2:
            break
    assert len(refused) == 2, "the tokens are used up at some time"
    answers = [sum(value for key, value in line["usage"].items() if isinstance(value, int)) for line in served.requests() if line["usage"]]
    assert 40_000 <= sum(answers) <= 40_000 + max(answers), f"{sum(answers)} of {answers}"
    for cli in clis:
        cli.close()


def test_five_at_once_are_above_a_budget_by_one_answer_at_most(version, api, session, sidecar, tmp_path):
    """The API answers at once, and their tools end at once: whoever is not at the door in time is above."""
    cent = {"input_tokens": 0, "output_tokens": 500, "cache_read_input_tokens": 0, "cache_creation": {}}
    served = api({**script(*(main(n, bash(f"true # {n}")) for n in range(60))), "defaults": {"usage": cent}})
    budget = 0.3
    # A machine that has no time is not to have them ended.
    flags = ("--socket", str(tmp_path / "hub.sock"), "--container-max-cost-usd", str(budget), "--stop-interrupt", "60s")
    clis = [session(served, *TOOLS, sidecar=sidecar(*flags), home=tmp_path / f"home{n}") for n in range(5)]
    said: dict[int, str] = {}

    def work(n: int) -> None:
        clis[n].control("initialize", 120)
        # Whoever is interrupted tries again.
        while "shares with others" not in said.get(n, ""):
            said[n] = str(clis[n].ask("go", 120).get("result"))

    workers = [threading.Thread(target=work, args=(n,)) for n in range(5)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(said) == 5 and all("shares with others" in why for why in said.values()), said
    answers = [line for line in served.requests() if line["usage"]]
    one = served.cost_usd(version) / len(answers)
    # Without the hooks it was two or three of them.
    assert budget - 2 * one < served.cost_usd(version) < budget + one + 1e-9, f"{len(answers)} answers of {one:.4f} USD for {budget}"
    for cli in clis:
        cli.close()


@pytest.mark.parametrize("fails", [False, True], ids=["tools that work", "tools that fail"])
def test_a_budget_that_is_used_up_is_noticed_at_the_end_of_a_tool(version, api, session, sidecar, tmp_path, fails):
    """The API answers at once: an interrupt alone would come too late for the next request."""
    step = "sleep 0.1; exit 3" if fails else "sleep 0.1"
    served = api(script(*(main(n, bash(f"{step} # {n}")) for n in range(60))))
    flags = ("--socket", str(tmp_path / "hub.sock"), "--container-max-tokens", "40000")
    cli = session(served, *TOOLS, sidecar=sidecar(*flags))
    cli.control("initialize", 120)
    stopped = cli.ask("go", 120)
    assert stopped["subtype"] == "error_during_execution" and stopped["terminal_reason"].startswith("aborted"), stopped
    answers = [sum(value for value in line["usage"].values() if isinstance(value, int)) for line in served.requests() if line["usage"]]
    assert sum(answers[:-1]) < 40_000 <= sum(answers), "the one that reached it was the last"
    again = cli.ask("and now?", 60)
    assert again["num_turns"] == 0 and "shares with others" in again["result"]
    assert len(served.requests()) == len(answers)
    cli.close()


def test_each_has_its_fair_share_and_the_rest_when_the_other_ends(version, api, session, sidecar, tmp_path):
    served = api(script())
    flags = ("--socket", str(tmp_path / "hub.sock"), "--container-max-tokens", "60000", "--budget-share", "fair", "--share-kept", "10m")
    greedy, other = (session(served, *TOOLS, sidecar=sidecar(*flags)) for _ in range(2))

    def used() -> int:
        """What the ledger of both has."""
        answers = (line["usage"] for line in served.requests() if line["usage"])
        return sum(value for usage in answers for value in usage.values() if isinstance(value, int))

    def refused(cli) -> str:
        """Asks until the CLI turns it away, and says why."""
        for _ in range(40):
            said = str(cli.ask("go", 120).get("result"))
            if "shares with others" in said:
                return said
        raise AssertionError("never refused")

    other.ask("go", 120)
    one = used()
    why = refused(greedy)
    assert "fair share of the container budget" in why and "of 30000 tokens" in why, why
    assert 30_000 <= used() - one < 30_000 + 2 * one
    # What is the other's is there for it.
    assert "shares with others" not in str(other.ask("go", 120).get("result"))
    other.close()
    wait_for("the same session to go on", lambda: "shares with others" not in str(greedy.ask("go", 120)["result"]))
    assert "fair share" not in refused(greedy), "now all of it is used up"
    assert 60_000 <= used() < 60_000 + one
    greedy.close()


@pytest.mark.parametrize(
    ("how", "agents", "answers", "steps"),
    [("stream-json", 10, 40, 60), ("text", 10, 40, 60), ("json", 6, 3, 0)],
    ids=["ten that are read", "ten that print text", "six first answers"],
)
def test_one_shot_runs_that_start_at_once_are_above_a_budget_by_one_answer_at_most(how, agents, answers, steps, api, tmp_path):
    """Nothing can be asked of them; all that they spend is told by their telemetry. Each version has half of it."""
    version = "old" if how == "stream-json" else "new"
    cent = {"input_tokens": 0, "output_tokens": 500, "cache_read_input_tokens": 0, "cache_creation": {}}
    served = api({**script(*(main(n, bash(f"true # {n}")) for n in range(steps))), "defaults": {"usage": cent}})
    budget = answers * 500
    flags = ("--socket", str(tmp_path / "hub.sock"), "--container-max-tokens", str(budget), "--stop-interrupt", "60s")
    verbose = ["--verbose"] if how == "stream-json" else []
    runs = []
    for n in range(agents):
        work = tmp_path / f"home{n}" / "work"
        work.mkdir(parents=True)
        argv = [*harness.Sidecar(tmp_path, *flags).argv, harness.cli(version), "-p", "go", "--output-format", how, *verbose, *TOOLS]
        env = harness.environment(served, tmp_path / f"home{n}")
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        runs.append(subprocess.Popen([str(word) for word in argv], cwd=work, env=env, **quiet))
    try:
        for run in runs:
            run.wait(180)
    finally:
        for run in runs:
            run.kill()
    asked = sum(1 for line in served.requests() if line["usage"])
    # Who was too late has ended while others still had something reserved.
    assert answers - agents < asked <= answers + 1, f"{asked} answers for {answers}"
    assert asked > 1
