"""The Python SDK's own examples and tests, with the CLI that it brings and with the sidecar in its place: the outcome is the same."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import shutil
import subprocess
import xml.etree.ElementTree as xml
from pathlib import Path

import harness
import pytest
from sdk import shim
from sdk.shim import bash, main
from test_shim import PYTHON, Sdk, python_sdk

SOURCE = Path(os.environ.get("SDK_PYTHON_SOURCE", harness.ROOT / ".cache/sdk-py/source"))
PATIENCE = 300


def write(name: str, text: str) -> dict:
    return {"tool": "Write", "input": {"file_path": f"WORK/{name}", "content": text}}


def calc(name: str, **numbers: float) -> dict:
    return {"tool": f"mcp__calc__{name}", "input": numbers}


def agent(kind: str) -> dict:
    return {"tool": "Agent", "input": {"description": "a part of it", "prompt": "Look.", "subagent_type": kind}}


# What a prompt has in it, and what the model does about it, step by step. What is not here is answered with a text.
DOES = {
    "hello.txt": [write("hello.txt", "Hello, World!")],
    "simple hello.txt": [write("hello.txt", "Hello!")],
    "./foo.sh": [bash("./foo.sh --help")],
    "from hooks example": [bash("echo 'Hello from hooks example!'")],
    "ls /nonexistent": [bash("ls /nonexistent_directory")],
    "important_config": [write("important_config.txt", "test data")],
    "regular_file": [write("regular_file.txt", "test data")],
    "CRITICAL ERROR": [bash("echo 'CRITICAL ERROR: system failure'")],
    "15 + 27": [calc("add", a=15, b=27)],
    "100 divided by 7": [calc("divide", a=100, b=7)],
    "Calculate the square root": [calc("sqrt", n=144)],
    "power of 8": [calc("power", base=2, exponent=8)],
    "(12 + 8) * 3": [calc("add", a=12, b=8), calc("multiply", a=20, b=3), calc("subtract", a=60, b=10)],
    "code-reviewer": [agent("code-reviewer")],
    "doc-writer": [agent("doc-writer")],
    "analyzer": [agent("analyzer")],
    "README.md": [{"tool": "Read", "input": {"file_path": "WORK/README.md"}}],
    "echo command": [bash("echo 'Hello from bash!'")],
    "sleep command": [bash("sleep 5")],
    "List the files": [bash("ls"), write("hello.py", "print('hello')"), bash("python3 hello.py")],
}
# Its first words, and no more until somebody interrupts it.
SLOWLY = {"blocks": ["one two three " * 100], "pace": {"chunk": 14}, "stall_after_events": 4}
LANGUAGES = "Python, Java, Go, Rust and Ruby."


def script(work: Path) -> dict:
    steps = [main(n, block, prompt_contains=text) for text, blocks in DOES.items() for n, block in enumerate(blocks)]
    others = [
        # The main agent goes on beside it: what both say at once comes in any order, so it is the later one.
        {"when": {"agent": "subagent"}, "reply": {"blocks": ["This is what I found."], "pace": {"first_byte_delay_ms": 3000}}},
        {"when": {"prompt_contains": "slowly"}, "reply": SLOWLY},
        {"when": {"prompt_contains": "three jokes"}, "reply": {"blocks": [{"thinking": "One, two, three."}, "A joke."]}},
        {"when": {"prompt_contains": "programming languages"}, "reply": {"blocks": [LANGUAGES]}},
    ]
    rules = [others[0], *steps, *others[1:]]
    plain = {"defaults": {"usage": shim.USAGE}, "rules": rules, "otherwise": {"blocks": ["Four."]}}
    return replaced(plain, str(work))


def replaced(value: object, work: str) -> object:
    if isinstance(value, dict):
        return {key: replaced(inner, work) for key, inner in value.items()}
    if isinstance(value, list):
        return [replaced(inner, work) for inner in value]
    return value.replace("WORK", work) if isinstance(value, str) else value


STREAMING = """basic_streaming multi_turn_conversation concurrent_responses with_interrupt manual_message_handling with_options
async_iterable_prompt bash_command control_protocol error_handling"""
# Those that another service is needed for (session_stores), and the one that is to be pasted into a notebook, are left out.
EXAMPLES = [
    *["agents", "filesystem_agents", "hooks all", "include_partial_messages", "max_budget_usd", "mcp_calculator", "plugin_example"],
    *["quick_start", "setting_sources all", "stderr_callback_example", "streaming_mode_trio", "system_prompt"],
    *["tool_permission_callback", "tools_option", *(f"streaming_mode {name}" for name in STREAMING.split())],
]
# It lets an exception of the SDK pass.
FAILS = {"max_budget_usd": 1}
# Numbers that are another run's: times, and what is unique.
OF_A_RUN = re.compile(
    r"""(?P<name>\w*(?:duration|_ms|time|uuid|pid|socket)\w*['"]?(?:=|:\s?))['"]?[\w.:/-]+['"]?"""
    r"|(?P<duration>Duration: )\d+|\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d[.,]\d+Z?"
)


def plain(text: str, home: Path) -> list[str]:
    """Without ids, times, durations, and where it ran."""
    known = shim.plain(text, home)
    return OF_A_RUN.sub(lambda found: (found["name"] or found["duration"] or "") + "N", known).splitlines()


@pytest.fixture(scope="module")
def sdks(tmp_path_factory):
    """The SDK twice, in one of them with the sidecar before its CLI; 400 MB each, so they go with the tests."""
    if not SOURCE.exists():
        pytest.fail(f"nothing at {SOURCE}; run tests/install")
    found = {how: python_sdk(tmp_path_factory.mktemp(how), "new") for how in ("bare", "wrapped")}
    found["wrapped"].sidecar("install")
    yield found
    for sdk in found.values():
        shutil.rmtree(sdk.root)


class Example:
    """A run of one of them, in a home of its own."""

    def __init__(self, name: str, sdk: Sdk, directory: Path, api, **environment: str):
        self.sdk, self.home = sdk, directory
        self.work = directory / "work"
        # Some look at what is beside them, and in the directory above.
        shutil.copytree(SOURCE / "examples", self.work / "examples")
        (self.work / "README.md").write_text("# An SDK\n")
        (self.work / ".claude/agents").mkdir(parents=True)
        (self.work / ".claude/agents/test-agent.md").write_text("---\nname: test-agent\ndescription: Tests.\n---\nYou test.\n")
        self.api = api(script(self.work))
        script_name, *arguments = name.split()
        argv = [PYTHON, self.work / "examples" / f"{script_name}.py", *arguments]
        known = {**harness.environment(self.api, self.home), **sdk.environment, "PYTHONHASHSEED": "0", **environment}
        self.process = subprocess.Popen(
            argv, cwd=self.work, env=known, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def outcome(self) -> list[str]:
        """Its exit code, what it printed, and what it complained of."""
        said = self.process.communicate(timeout=PATIENCE)
        out, err = (plain(text.replace(str(self.sdk.root), "SDK"), self.home) for text in said)
        return [f"exit code {self.process.returncode}", *out, "--- stderr", *err]


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_ends_as_without_it(name, sdks, api, sidecar, tmp_path):
    wrapper = sidecar()
    settings = {"AGENT_SIDECAR_LEDGER": str(wrapper.ledger_file), "AGENT_SIDECAR_LISTEN": f"127.0.0.1:{wrapper.port}"}
    bare = Example(name, sdks["bare"], tmp_path / "bare", api)
    wrapped = Example(name, sdks["wrapped"], tmp_path / "wrapped", api, **settings)
    expected, seen = bare.outcome(), wrapped.outcome()
    different = "\n".join(difflib.unified_diff(expected, seen, "bare", "wrapped", lineterm="", n=1))
    assert not different, different
    assert expected[0] == f"exit code {FAILS.get(name, 0)}", "\n".join(expected)
    for run in (bare, wrapped):
        shim.ended(run.home)
    served = lambda run: sorted((line["agent"], line["turn"], line["results"]) for line in run.api.requests())
    # Of an answer that nobody hears to its end the API knows when it finds that out.
    with contextlib.suppress(AssertionError):
        harness.wait_for("the same requests", lambda: served(bare) == served(wrapped))
    assert served(bare) == served(wrapped)
    totals, cost_usd = shim.totals(wrapper), wrapped.api.cost_usd()
    cut = sum(line["client_gone"] for line in wrapped.api.requests())
    if cut or totals["cost_estimated"]:
        # What an answer that was cut has used is the CLI's guess; and an SDK may let go of the CLI before it can be asked.
        whole_usd = shim.USAGE["output_tokens"] * harness.PRICES["claude-opus-5-5"][1] / 1e6
        assert totals["cost_usd"] <= cost_usd + cut * whole_usd + 1e-9
    else:
        assert totals["cost_usd"] == pytest.approx(cost_usd, abs=1e-9)


# Of the SDK's tests those that start something; the others start nothing, and want to.
STARTERS = ["close_cancellation", "run_end_subprocess", "streaming_client", "transport"]


class Suite:
    """The SDK's own tests, where whatever they start as a CLI is wrapped, or not."""

    def __init__(self, directory: Path, wraps: str):
        directory.mkdir()
        self.report, self.spawned = directory / "report.xml", directory / "spawned"
        environment = {
            **{name: os.environ[name] for name in ("PATH",)},
            "HOME": str(directory),
            "PYTHONPATH": os.pathsep.join(map(str, [Path(__file__).parent / "sdk", SOURCE / "src"])),
            "PYTHONDONTWRITEBYTECODE": "1",
            "AGENT_SIDECAR_WRAPS": wraps,
            "AGENT_SIDECAR_SPAWNED": str(self.spawned),
        }
        plugins = [word for name in ("spawned", "no:cacheprovider", "no:xdist", "no:rerunfailures") for word in ("-p", name)]
        files = [SOURCE / f"tests/test_{name}.py" for name in STARTERS]
        argv = [PYTHON, "-m", "pytest", *plugins, "-q", f"--junit-xml={self.report}", f"--rootdir={SOURCE}", *files]
        self.process = subprocess.Popen(argv, cwd=SOURCE, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)

    def outcomes(self) -> dict[str, str]:
        said, _ = self.process.communicate(timeout=PATIENCE)
        assert self.process.returncode == 0, said[-3000:]
        cases = xml.parse(self.report).iter("testcase")
        return {f"{case.get('classname')}::{case.get('name')}": case[0].tag if len(case) else "passed" for case in cases}


def test_the_sdks_own_tests_end_as_without_it(tmp_path):
    bare = Suite(tmp_path / "bare", "")
    wrapped = Suite(tmp_path / "wrapped", f"{harness.binary()} run --hub off --listen off --")
    expected = bare.outcomes()
    assert wrapped.outcomes() == expected
    assert set(expected.values()) == {"passed"} and len(expected) > 100
    started = [sorted(suite.spawned.read_text().splitlines()) for suite in (bare, wrapped)]
    assert started[0] == started[1] and len(started[0]) >= 18
