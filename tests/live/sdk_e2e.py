"""The end-to-end tests of the Python SDK's repository, with the CLI that the SDK brings and with the sidecar in its place.

    tests/loopback .cache/venv/bin/python tests/live/sdk_e2e.py CHECKOUT

They are in no package, so `make test` cannot have them; docs/tests.md says how they ended. They want a model that does what it is told:
the script below does. Ends with 0 if each test ended the same way twice.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as xml
from pathlib import Path

import harness
from sdk.shim import USAGE, bash, totals
from test_shim import PYTHON, python_sdk

# What a prompt has in it, and what the model does about it, step by step.
DOES = {
    "Run: echo": [bash("echo tested")],
    "Run this bash command": [bash("echo 'hello'")],
    "Run the command": [bash("touch {{word after touch }}")],
    "Use the Write tool": [{"tool": "Write", "input": {"file_path": "{{word after create the file }}", "content": "hello"}}],
    "mcp__test__echo": [{"tool": "mcp__test__echo", "input": {"text": "any"}}],
    "mcp__noperm__echo": [{"tool": "mcp__noperm__echo", "input": {"text": "any"}}],
    "greet 'Alice'": [{"tool": "mcp__test__greet", "input": {"name": "Alice"}}, {"tool": "mcp__test__echo", "input": {"text": "test"}}],
    "mcp__multi__echo": [{"tool": "mcp__multi__echo", "input": {"text": "test"}}, {"tool": "mcp__multi__greet", "input": {"name": "Bob"}}],
    "'greeter'": [{"subagent": "say hi", "type": "greeter"}],
    "Count how many Python files": [bash("ls"), {"tool": "StructuredOutput", "input": {"file_count": 7, "has_tests": True}}],
    "Analyze this text": [{"tool": "StructuredOutput", "input": {"analysis": {"word_count": 2, "character_count": 11}, "words": ["Hello", "world"]}}],
    "test framework": [{"tool": "StructuredOutput", "input": {"has_tests": True, "test_framework": "pytest"}}],
    "README file": [bash("ls"), {"tool": "StructuredOutput", "input": {"file_count": 3, "has_readme": False}}],
}
THINKS = {"Think": ["Two jokes, and then 2 more."]}


def script() -> dict:
    steps = [
        {"when": {"agent": "main", "prompt_contains": text, "results": n}, "reply": {"blocks": [block]}}
        for text, blocks in DOES.items()
        for n, block in enumerate(blocks)
    ]
    thinks = [{"when": {"prompt_contains": text}, "reply": {"blocks": [{"thinking": thought}, "Four."]}} for text, [thought] in THINKS.items()]
    unknown = {"when": {"model": "claude-nonexistent"}, "reply": {"status": 404}}
    return {"defaults": {"usage": USAGE}, "rules": [unknown, *steps, *thinks], "otherwise": {"blocks": ["Done."]}}


def outcomes(checkout: Path, directory: Path, wrapped: bool) -> dict[str, str]:
    directory.mkdir()
    sdk, home = python_sdk(directory / "sdk", "new"), directory / "home"
    if wrapped:
        sdk.sidecar("install")
    api, sidecar = harness.Api(script(), directory / "api"), harness.Sidecar(directory / "sidecar")
    settings = {"AGENT_SIDECAR_LEDGER": str(sidecar.ledger_file), "AGENT_SIDECAR_LISTEN": "off", "PYTHONPATH": str(sdk.root)}
    home.mkdir()
    report = directory / "report.xml"
    # The SDK that is installed, and not the checkout's.
    flags = ["-p", "no:cacheprovider", "-o", "pythonpath=", "-q", f"--junit-xml={report}"]
    try:
        subprocess.run([PYTHON, "-m", "pytest", *flags, "e2e-tests"], cwd=checkout, stdin=subprocess.DEVNULL,
                       env={**harness.environment(api, home), **sdk.environment, **settings})
        if wrapped:
            # More than that is served where a test lets go of the CLI in the middle, and where it looks whether a model is there.
            print("served", api.tokens(), "\nbooked", totals(sidecar)["tokens"])
    finally:
        api.close()
    cases = xml.parse(report).iter("testcase")
    return {f"{case.get('classname')}::{case.get('name')}": case[0].tag if len(case) else "passed" for case in cases}


def main() -> int:
    checkout = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as directory:
        bare, wrapped = (outcomes(checkout, Path(directory) / name, name == "wrapped") for name in ("bare", "wrapped"))
    for name in sorted(bare | wrapped):
        print(f"{bare.get(name, 'not run'):8} {wrapped.get(name, 'not run'):8} {name}")
    return bare != wrapped


if __name__ == "__main__":
    sys.exit(main())
