"""A scenario of the Python SDK with the CLI that it finds by itself: `own_lookup.py SCENARIO WORK`. Prints all that the caller saw."""

import asyncio
import json
import sys
from pathlib import Path

import test_sdk_python as sdk


class Here:
    """What a scenario needs of a run."""

    path = None

    def __init__(self, work: Path):
        self.work = work

    def started(self) -> bool:
        return (self.work / "started").exists()


scenario, _ = sdk.SCENARIOS[sys.argv[1]]
recorder = sdk.Recorder(Here(Path(sys.argv[2])), ["Bash"])
asyncio.run(asyncio.wait_for(scenario(recorder), sdk.PATIENCE))
print(json.dumps(recorder.seen, default=str))
