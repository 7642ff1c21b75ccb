// One container for each name that is asked for: /run/NAME with a task. It is put to sleep ten minutes after the last request, and asks for nothing but
// SIGTERM then; an agent that works makes no request. So the sidecar tells the Worker that it is busy (--busy-webhook), as long as it is.
import { Container, getContainer } from "@cloudflare/containers";

export interface Env {
  AGENT: DurableObjectNamespace<Agent>;
  ANTHROPIC_API_KEY: string;
  BUSY_TOKEN: string;
  OTLP_ENDPOINT: string;
  OTLP_HEADERS: string;
  PUBLIC_URL: string;
}

export const environment: Record<string, string> = {
  CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC: "1",
  DISABLE_AUTOUPDATER: "1",
  AGENT_SIDECAR_MAX_COST_USD: "5",
  AGENT_SIDECAR_CONTAINER_DAY_MAX_COST_USD: "50",
  AGENT_SIDECAR_IDLE_TIMEOUT: "15m",
  AGENT_SIDECAR_LEDGER: "/tmp/ledger.jsonl",
  AGENT_SIDECAR_OTLP_QUEUE_DIR: "/tmp/otlp",
  // Said again after a third of it, and well within sleepAfter.
  AGENT_SIDECAR_BUSY_LEASE: "5m",
};

export class Agent extends Container<Env> {
  defaultPort = 8080;
  sleepAfter = "10m";

  async work(name: string, task: string): Promise<Response> {
    await this.startAndWaitForPorts({
      startOptions: {
        envVars: {
          ...environment,
          ANTHROPIC_API_KEY: this.env.ANTHROPIC_API_KEY,
          // Pushed: a scrape through the Worker would be a request, and nothing would ever sleep.
          AGENT_SIDECAR_OTLP_ENDPOINT: this.env.OTLP_ENDPOINT,
          AGENT_SIDECAR_OTLP_HEADERS: this.env.OTLP_HEADERS,
          AGENT_SIDECAR_BUSY_WEBHOOK: `${this.env.PUBLIC_URL}/busy/${name}`,
          AGENT_SIDECAR_BUSY_WEBHOOK_HEADERS: `authorization=Bearer%20${this.env.BUSY_TOKEN}`,
          AGENT_SIDECAR_TENANT: name,
        },
      },
    });
    return this.containerFetch("http://agent/", { method: "POST", body: task });
  }

  async busy(): Promise<void> {
    // No container is woken by this: it is what one of them has said.
    this.renewActivityTimeout();
  }
}

export default {
  async fetch(request: Request, env: Env): Promise<Response> {
    const [, verb, name] = new URL(request.url).pathname.split("/");
    if (request.method !== "POST" || !name) return new Response("POST /run/NAME", { status: 404 });
    const agent = getContainer(env.AGENT, name);
    if (verb === "busy") {
      if (request.headers.get("authorization") !== `Bearer ${env.BUSY_TOKEN}`) return new Response(null, { status: 401 });
      const said = await request.json<{ busy: boolean }>();
      if (said.busy) await agent.busy();
      return new Response(null, { status: 204 });
    }
    if (verb === "run") return agent.work(name, await request.text());
    return new Response("POST /run/NAME", { status: 404 });
  },
} satisfies ExportedHandler<Env>;
