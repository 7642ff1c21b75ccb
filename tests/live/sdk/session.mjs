// One session of the TypeScript SDK: `node session.mjs SCENARIO EXECUTABLE WORK`; without a name the SDK finds the executable by itself. Prints all that the caller sees, callbacks
// included, as JSON lines; an iteration that throws is a line of its own.
import { spawn } from "node:child_process";
import { existsSync } from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";
import { pathToFileURL } from "node:url";

const modules = process.env.SDK_MODULES ? pathToFileURL(`${process.env.SDK_MODULES}/`) : new URL("../../../.cache/sdk-ts/node_modules/", import.meta.url);
const { createSdkMcpServer, query, tool } = await import(new URL("@anthropic-ai/claude-agent-sdk/sdk.mjs", modules));
const { z } = await import(new URL("zod/index.js", modules));

const [scenario, executable, work] = process.argv.slice(2);
const options = (more = {}) => ({ pathToClaudeCodeExecutable: executable || undefined, cwd: work, allowedTools: ["Bash"], settingSources: [], ...more });

const saw = (message) => process.stdout.write(`${JSON.stringify(message)}\n`);

async function until(what, holds) {
  const end = Date.now() + 60_000;
  while (!holds()) {
    if (Date.now() > end) throw new Error(`no ${what} within 60 s`);
    await sleep(20);
  }
}
const working = () => until("tool call", () => existsSync(`${work}/started`));

async function all(messages) {
  for await (const message of messages) saw(message);
}

// A conversation: `ask` sends a message and returns its result.
function conversation(more) {
  const waiting = [];
  let wake = () => {};
  async function* prompts() {
    for (;;) {
      while (waiting.length === 0) await new Promise((resolve) => (wake = resolve));
      const text = waiting.shift();
      if (text === null) return;
      yield { type: "user", message: { role: "user", content: text }, parent_tool_use_id: null, session_id: "" };
    }
  }
  const put = (text) => (waiting.push(text), wake());
  const messages = query({ prompt: prompts(), options: options(more) });
  const result = async () => {
    for (;;) {
      const { value, done } = await messages.next();
      if (done) throw new Error("ended without a result");
      saw(value);
      if (value.type === "result") return value;
    }
  };
  const ask = async (text) => (put(text), await result());
  const end = async () => (put(null), await all(messages));
  return { messages, put, result, ask, end };
}

const scenarios = {
  async one_shot() {
    await all(query({ prompt: "go", options: options() }));
  },
  async turns() {
    const talk = conversation();
    for (const text of ["one", "two", "three"]) {
      const since = Date.now();
      await talk.ask(text);
      saw({ type: "asked", duration_ms: Date.now() - since });
    }
    await talk.end();
  },
  // Until it was turned away by somebody's pause, and then answered again.
  async patient() {
    const talk = conversation();
    for (let paused = false, end = Date.now() + 100_000; Date.now() < end; await sleep(100)) {
      const { result } = await talk.ask("go");
      if (paused && !result.includes("is paused")) break;
      paused ||= result.includes("is paused");
    }
    await talk.end();
  },
  async permissions() {
    const canUseTool = async (name, input) => {
      saw(["asked", name, input.command]);
      return input.command.includes("denied") ? { behavior: "deny", message: "not this one" } : { behavior: "allow", updatedInput: input };
    };
    const talk = conversation({ allowedTools: [], canUseTool });
    await talk.ask("go");
    await talk.end();
  },
  async hooks() {
    const before = async ({ tool_name, tool_input }) => {
      saw(["hook", tool_name, tool_input]);
      const refused = tool_input.command.includes("refused");
      const decision = refused ? { permissionDecision: "deny", permissionDecisionReason: "a hook says no" } : {};
      return { hookSpecificOutput: { hookEventName: "PreToolUse", ...decision } };
    };
    await all(query({ prompt: "go", options: options({ hooks: { PreToolUse: [{ matcher: "Bash", hooks: [before] }] } }) }));
  },
  async mcp() {
    const add = tool("add", "Adds two numbers", { a: z.number(), b: z.number() }, async ({ a, b }) => {
      saw(["called", { a, b }]);
      return { content: [{ type: "text", text: String(a + b) }] };
    });
    const sums = createSdkMcpServer({ name: "sums", tools: [add] });
    const talk = conversation({ mcpServers: { sums }, allowedTools: ["mcp__sums__add"] });
    await talk.ask("go");
    await talk.end();
  },
  async interrupt() {
    const talk = conversation();
    talk.put("work forever");
    const [result] = await Promise.all([talk.result(), working().then(() => talk.messages.interrupt())]);
    if (result.terminal_reason !== "aborted_tools") throw new Error(result.terminal_reason);
    await talk.ask("and now?");
    await talk.end();
  },
  async control() {
    const talk = conversation({ permissionMode: "default" });
    await talk.ask("one");
    for (const [what, answer] of Object.entries({
      commands: await talk.messages.supportedCommands(),
      models: await talk.messages.supportedModels(),
      servers: await talk.messages.mcpServerStatus(),
    })) saw({ type: what, answer });
    await talk.messages.setModel("claude-sonnet-4-6");
    await talk.ask("two");
    await talk.messages.setPermissionMode("acceptEdits");
    await talk.messages.setModel();
    await talk.ask("three");
    await talk.end();
  },
  async resume() {
    let session;
    const one = async (more) => {
      for await (const message of query({ prompt: "go", options: options(more) })) {
        saw(message);
        session = message.session_id ?? session;
      }
    };
    await one();
    await one({ resume: session });
    await one({ resume: session, forkSession: true });
    await one({ continue: true });
  },
  async partial() {
    await all(query({ prompt: "go", options: options({ includePartialMessages: true, maxTurns: 5, stderr: (text) => saw(["stderr", text]) }) }));
  },
  async spawned() {
    const spawnClaudeCodeProcess = ({ command, args, cwd, env, signal }) => {
      saw(["spawned", args]);
      return spawn(command, args, { cwd, env, signal, stdio: ["pipe", "pipe", "ignore"] });
    };
    const talk = conversation({ spawnClaudeCodeProcess, env: { ...process.env, OF_THE_APP: "seen by a tool" } });
    await talk.ask("go");
    await talk.end();
  },
  async large() {
    const talk = conversation();
    await talk.ask("go");
    await talk.end();
  },
  async refused() {
    await all(query({ prompt: "go", options: options({ resume: "00000000-0000-4000-8000-000000000000" }) }));
  },
  async abort() {
    const abortController = new AbortController();
    working().then(() => abortController.abort());
    await all(query({ prompt: "go", options: options({ abortController }) }));
  },
  async close() {
    const messages = query({ prompt: "go", options: options() });
    working().then(() => messages.close());
    await all(messages);
  },
  // One app, two customers: the environment that it gives each agent says whose it is.
  async tenants() {
    const of = (customer) => all(query({ prompt: "go", options: options({ env: { ...process.env, CUSTOMER_ID: customer } }) }));
    await Promise.all(["acme", "globex"].map(of));
  },
  // For somebody who kills this process.
  async stay() {
    const talk = conversation();
    await talk.ask("go");
  },
};

try {
  await scenarios[scenario]();
} catch (error) {
  saw({ type: "thrown", name: error.name, message: error.message });
}
