"""The pages for each audience: their links lead somewhere, what they name exists, and their commands work where an agent runs."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from test_alerts import RECORDINGS, ROOT, Scene, binary, family, flags, scene  # noqa: F401: a fixture

DOCS = ROOT / "docs"
PAGES = ["for-sre", "for-finance", "for-platform", "migrate", "ephemeral", "guide"]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (DOCS / f"{page}.md").read_text(), re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[str]:
    lines = "".join(blocks(page, "sh")).replace("\\\n", "").splitlines()
    # The runbooks' test has `doctor`, which looks through every directory there is.
    return [line for line in lines if line and line != "agent-sidecar doctor"]


RUN = [(page, command) for page in PAGES for command in commands(page)]


@pytest.mark.parametrize("page", [*PAGES, "../README"])
def test_what_a_page_names_is_there(page: str):
    path = DOCS / f"{page}.md"
    text = path.read_text()
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert link.startswith("https://") or (path.parent / link).resolve().exists(), f"{link} is not there"
    for metric in re.findall(r"`((?:claude_agent|agent_sidecar)_[a-z_]+[a-z])[`{]", text):
        assert family(metric), f"no metric is called {metric}"
    settings = (DOCS / "settings.md").read_text()
    for flag in re.findall(r"`(?:agent-sidecar run )?(--[a-z-]+)", text):
        known = [settings, *(flags(verb) for verb in ["bill", "replay", "explain", "install", "top"])]
        # Of the CLI itself, where a page compares, and of Prometheus.
        assert flag in {"--enable-feature", "--max-budget-usd", "--help", "--output-format", "--version", "--bg", "--tmux", "--bare", "--config"} or any(flag in one for one in known), flag


@pytest.fixture(scope="module")
def books(scene: Scene):  # noqa: F811
    """What the pages' commands look at, under another name."""
    shutil.copy(RECORDINGS / "01_basic_text.jsonl", scene.directory / "recording.jsonl")
    logs = scene.directory / "agents"
    logs.mkdir()
    (logs / "agent.jsonl").write_bytes((scene.directory / "ledger.jsonl").read_bytes())
    return logs


@pytest.mark.parametrize(("page", "command"), RUN)
def test_commands_of_a_page_work(page: str, command: str, scene: Scene, books):  # noqa: F811
    if command.startswith("agent-sidecar run "):
        for flag in re.findall(r"\s(--[a-z-]+)", command.partition(" -- ")[0]):
            assert flag in flags("run")
        return
    done = scene.shell(command.replace("/var/log/agents", str(books)))
    assert done.returncode == 0 and "error" not in done.stderr, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
    assert done.stdout or "--output" in command, f"{command} says nothing"


def test_the_bill_that_finance_makes_has_rows(scene: Scene, books):  # noqa: F811
    wanted = next(command for page, command in RUN if "| jq -r '[.SubAccountId" in command)
    rows = [line.split("\t") for line in scene.shell(wanted.replace("/var/log/agents", str(books))).stdout.splitlines()]
    assert {"claude-opus-5-5/output", "claude-opus-5-5/cache_read"} <= {row[1] for row in rows}
    assert all(row[0] == "acme" for row in rows)


def test_the_platforms_configuration_is_right(tmp_path):
    [config] = blocks("for-platform", "toml")
    file = tmp_path / "config.toml"
    file.write_text(config)
    done = subprocess.run([binary(), "check", "--config", file], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (0, "the configuration is right\n"), done.stderr
