"""An E2B template with the sidecar, and a sandbox of it for one task: `python template.py build`, `python template.py run "…"`.

What a template starts is frozen with its memory: clock, identity and settings of the day it was built. So it starts nothing, and the agent is
started in each sandbox. A sandbox ends at its timeout, whether its agent works or not.
"""

import os
import sys

from e2b import Sandbox, Template

NAME = "agent-with-sidecar"
template = Template().from_image("registry.example.com/agent:1.0.0")

MINUTES = 55
ENVIRONMENT = {
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    "DISABLE_AUTOUPDATER": "1",
    "AGENT_SIDECAR_MAX_COST_USD": "5",
    "AGENT_SIDECAR_IDLE_TIMEOUT": "15m",
    # Before the timeout, which kills without a word: so there is a result, and the last cost is sent.
    "AGENT_SIDECAR_MAX_DURATION": "50m",
    # Pushed: nobody outside has to know the sandbox's address.
    "AGENT_SIDECAR_OTLP_ENDPOINT": "https://otlp.example.com",
    "AGENT_SIDECAR_LEDGER": "/tmp/ledger.jsonl",
    "AGENT_SIDECAR_OTLP_QUEUE_DIR": "/tmp/otlp",
}


def run(task: str, tenant: str) -> str:
    keys = {name: os.environ[name] for name in ("ANTHROPIC_API_KEY", "AGENT_SIDECAR_OTLP_HEADERS")}
    sandbox = Sandbox.create(NAME, timeout=MINUTES * 60, metadata={"tenant": tenant})
    try:
        # In this command's environment alone: what the sandbox is given at its start, all of its processes have. The default is 60 s.
        envs = {**ENVIRONMENT, **keys, "AGENT_SIDECAR_TENANT": tenant, "TASK": task}
        return sandbox.commands.run('exec python3 /app/app.py "$TASK"', envs=envs, timeout=0).stdout
    finally:
        sandbox.kill()


if __name__ == "__main__":
    if sys.argv[1] == "build":
        Template.build(template, NAME, cpu_count=2, memory_mb=4096)
    else:
        print(run(sys.argv[2], "acme"))
