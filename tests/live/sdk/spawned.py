"""A plugin for the SDK's own tests: what the SDK starts as its CLI is started under `AGENT_SIDECAR_WRAPS`, where that is set. Counts in
`AGENT_SIDECAR_SPAWNED` what was started."""

import os
import shlex

import anyio

start = anyio.open_process
wrapper = shlex.split(os.environ.get("AGENT_SIDECAR_WRAPS", ""))


async def open_process(command, **how):
    with open(os.environ["AGENT_SIDECAR_SPAWNED"], "a") as spawned:
        spawned.write(os.environ.get("PYTEST_CURRENT_TEST", "?") + "\n")
    return await start([*wrapper, *command], **how)


anyio.open_process = open_process
