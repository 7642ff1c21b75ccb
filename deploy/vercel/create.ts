// A Vercel Sandbox for one task. An image is a file system there and starts nothing by itself: the agent is a command, with the sidecar before its CLI.
import { Sandbox } from "@vercel/sandbox";

export const minutes = 45;
export const environment: Record<string, string> = {
  CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC: "1",
  DISABLE_AUTOUPDATER: "1",
  AGENT_SIDECAR_MAX_COST_USD: "5",
  AGENT_SIDECAR_IDLE_TIMEOUT: "15m",
  // Before the sandbox's own end: so there is a result, and the last cost is sent.
  AGENT_SIDECAR_MAX_DURATION: "40m",
  // Pushed: a port would be public, and without a password.
  AGENT_SIDECAR_OTLP_ENDPOINT: "https://otlp.example.com",
  AGENT_SIDECAR_LEDGER: "/tmp/ledger.jsonl",
  AGENT_SIDECAR_OTLP_QUEUE_DIR: "/tmp/otlp",
};

export async function run(task: string, tenant: string): Promise<string> {
  const sandbox = await Sandbox.create({
    image: "agent:1.0.0",
    resources: { vcpus: 2 },
    timeout: minutes * 60_000,
    tags: { tenant },
    persistent: false,
  });
  try {
    const keys = {
      ANTHROPIC_API_KEY: process.env.ANTHROPIC_API_KEY ?? "",
      AGENT_SIDECAR_OTLP_HEADERS: process.env.AGENT_SIDECAR_OTLP_HEADERS ?? "",
    };
    const command = await sandbox.runCommand({
      cmd: "python3",
      args: ["/app/app.py", task],
      env: { ...environment, ...keys, AGENT_SIDECAR_TENANT: tenant },
    });
    return await command.stdout();
  } finally {
    await sandbox.stop();
  }
}
