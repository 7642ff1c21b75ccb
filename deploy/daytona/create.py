"""A Daytona sandbox for one task: `python create.py "…"`. By itself it would be stopped after fifteen minutes without a call from outside, in the middle
of an answer: that is off, and `ttl_minutes` is the end of everything. The sidecar ends an agent that is idle.
"""

import os
import sys

from daytona import CreateSandboxFromImageParams, Daytona, Image, Resources

MINUTES = 120
ENVIRONMENT = {
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    "DISABLE_AUTOUPDATER": "1",
    "AGENT_SIDECAR_MAX_COST_USD": "5",
    "AGENT_SIDECAR_IDLE_TIMEOUT": "15m",
    # Before the end of the sandbox: so there is a result, and the last cost is sent.
    "AGENT_SIDECAR_MAX_DURATION": "110m",
    # Pushed: a scrape of the preview address would count as activity.
    "AGENT_SIDECAR_OTLP_ENDPOINT": "https://otlp.example.com",
    "AGENT_SIDECAR_LEDGER": "/tmp/ledger.jsonl",
    "AGENT_SIDECAR_OTLP_QUEUE_DIR": "/tmp/otlp",
}
# It has to stay: the task is a command of its own.
image = Image.base("registry.example.com/agent:1.0.0").entrypoint(["sleep", "infinity"])


def params(tenant: str) -> CreateSandboxFromImageParams:
    return CreateSandboxFromImageParams(
        image=image,
        labels={"tenant": tenant},
        auto_stop_interval=0,
        ttl_minutes=MINUTES,
        # Gone when it is stopped.
        ephemeral=True,
        resources=Resources(cpu=2, memory=4, disk=8),
    )


def run(task: str, tenant: str) -> str:
    keys = {name: os.environ[name] for name in ("ANTHROPIC_API_KEY", "AGENT_SIDECAR_OTLP_HEADERS")}
    sandbox = Daytona().create(params(tenant), timeout=300)
    try:
        env = {**ENVIRONMENT, **keys, "AGENT_SIDECAR_TENANT": tenant, "TASK": task}
        return sandbox.process.exec('exec python3 /app/app.py "$TASK"', env=env, timeout=MINUTES * 60).result
    finally:
        sandbox.delete()


if __name__ == "__main__":
    print(run(sys.argv[1], "acme"))
