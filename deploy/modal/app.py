"""A sandbox of Modal's for one task: `modal run app.py --task "…"`. Its clock for idleness counts calls from outside and not the agent's work, so none
is set: the sidecar ends an agent that is idle, and `timeout` is the end of everything.
"""

import modal

app = modal.App("agents")
image = modal.Image.from_registry("registry.example.com/agent:1.0.0").entrypoint([])
secrets = [modal.Secret.from_name("anthropic"), modal.Secret.from_name("otlp-headers")]

HOURS = 2
ENVIRONMENT = {
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    "DISABLE_AUTOUPDATER": "1",
    "AGENT_SIDECAR_MAX_COST_USD": "5",
    "AGENT_SIDECAR_IDLE_TIMEOUT": "15m",
    # Before `timeout`, which kills without a word: so there is a result, and the last cost is sent.
    "AGENT_SIDECAR_MAX_DURATION": "110m",
    # Pushed: a scrape through a tunnel would keep the sandbox awake. What stays at the end is in the volume.
    "AGENT_SIDECAR_OTLP_ENDPOINT": "https://otlp.example.com",
    "AGENT_SIDECAR_LEDGER": "/data/ledger.jsonl",
    "AGENT_SIDECAR_OTLP_QUEUE_DIR": "/data/otlp",
}


def start(task: str, tenant: str) -> modal.Sandbox:
    return modal.Sandbox.create(
        *["python3", "/app/app.py", task],
        app=app,
        image=image,
        secrets=secrets,
        env={**ENVIRONMENT, "AGENT_SIDECAR_TENANT": tenant},
        volumes={"/data": modal.Volume.from_name("agents", create_if_missing=True)},
        tags={"tenant": tenant},
        cpu=1.0,
        memory=4096,
        timeout=HOURS * 3600,
    )


@app.local_entrypoint()
def main(task: str, tenant: str = "acme"):
    sandbox = start(task, tenant)
    sandbox.wait()
    print(sandbox.stdout.read())
