"""Without a wrapper: the CLI and the scripted API agree, so that what a wrapper says can be held against either."""

from __future__ import annotations

import re
import subprocess

import harness
import pytest
from harness import said, whole_writes

USAGE = {
    "input_tokens": 11,
    "output_tokens": 130,
    "cache_read_input_tokens": 5000,
    "cache_creation": {"ephemeral_5m_input_tokens": 700, "ephemeral_1h_input_tokens": 90},
}
TOOLS = ["--allowedTools", "Bash,Agent,Task,WebSearch"]


def bash(command: str) -> dict:
    return {"tool": "Bash", "input": {"command": command, "description": "a step"}}


def script(*rules: dict) -> dict:
    return {"defaults": {"usage": USAGE}, "rules": list(rules), "otherwise": {"blocks": ["done"]}}


def main(results: int, *blocks) -> dict:
    return {"when": {"agent": "main", "results": results}, "reply": {"blocks": list(blocks)}}


def subagent(**fields) -> list[dict]:
    """A main loop that starts one, which takes two steps."""
    own = {"input_tokens": 3, "output_tokens": 40, "cache_read_input_tokens": 600}
    steps = [bash("echo inside")], ["found it"]
    inner = [
        {"when": {"agent": "subagent", "results": n}, "reply": {"blocks": blocks, "usage": own}} for n, blocks in enumerate(steps)
    ]
    return [*inner, main(0, {"subagent": "look for it", **fields})]


SEARCHED = {**USAGE, "server_tool_use": {"web_search_requests": 2}}

# Rules, and how many requests they make.
CASES = {
    "three steps": ([main(0, bash("echo 1")), main(1, "and", bash("echo 2"))], 3),
    "parallel tools": ([main(0, bash("echo 1"), bash("echo 2"), bash("echo 3"))], 2),
    "subagent in the foreground": (subagent(), 4),
    "subagent in the background": (subagent(background=True), 5),
    "subagent on another model": (subagent(model="sonnet"), 4),
    "web search": (
        [
            {"when": {"agent": "other"}, "reply": {"blocks": [{"web_search": "x"}, "a page"], "usage": SEARCHED}},
            main(0, {"tool": "WebSearch", "input": {"query": "what is x"}}),
        ],
        3,
    ),
    "overloaded once": ([{"times": 1, "reply": {"status": 529}}], 2),
}


@pytest.mark.parametrize("case", CASES)
def test_the_result_says_what_was_served(case, version, api, session):
    rules, requests = CASES[case]
    served = api(script(*rules))
    cli = session(served, *TOOLS)
    result = cli.ask("go")
    if "background" in case:
        result = cli.result()
    assert cli.close() == 0
    assert [line["status"] for line in served.requests()].count(200) == len(served.requests()) - ("overloaded" in case)
    assert len(served.requests()) == requests, served.requests()
    assert said(result) == whole_writes(served.tokens())
    assert result["total_cost_usd"] == pytest.approx(served.cost_usd(version), abs=1e-9)


def table(name: str) -> set[str]:
    """A list of words in what the sidecar knows of the CLI's command line."""
    source = (harness.ROOT / "sidecar/core/src/launch.rs").read_text()
    return set(re.findall(r'"([^"]+)"', re.search(rf"const {name}: &\[&str\] =\s*&\[(.*?)\];", source, re.DOTALL)[1]))


def test_what_its_help_names_is_known(version, tmp_path):
    """A command that is not known is taken for a prompt, and counted; the value of a flag that is not, for a command."""
    argv = [harness.cli(version), "--help"]
    text = subprocess.run(argv, env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}, capture_output=True, text=True, timeout=60).stdout
    options, commands = text.split("\nCommands:\n")
    named = {name for line in re.findall(r"^  ([a-z][\w|-]+)", commands, re.MULTILINE) for name in line.split("|")}
    assert len(named) > 8 and named <= table("COMMANDS"), named - table("COMMANDS")
    one, many, maybe, elsewhere = map(table, ["WITH_VALUE", "WITH_VALUES", "WITH_OPTIONAL_VALUE", "ELSEWHERE"])
    flags = re.findall(r"^  ((?:-\w, )?--[\w-]+(?:, --[\w-]+)*) ([<\[]\S+)", options, re.MULTILINE)
    assert len(flags) > 20
    for names, value in flags:
        kind = many if "..." in value else one if value.startswith("<") else maybe
        assert set(names.split(", ")) <= kind | elsewhere, (names, value)
