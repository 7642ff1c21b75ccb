// What agent-fleet talks to at Cloudflare, which has no interface for containers but a Worker's own: openapi.json is this one's. A sandbox is a Durable Object
// by its key with a container; a second kind, of which there is one, knows which exist, for lists by label.
//
// A container ends when it was asked to, when its time is over, or when nobody has said for long that it works: by alarms in here, with SIGTERM first and
// SIGKILL after a grace. Cloudflare itself sends SIGTERM alone. Requests to a container's ports set back no timer, and none starts a container again, as the
// class Container of @cloudflare/containers would: what it was started with, secrets among it, is handed over once and kept nowhere.
import { DurableObject } from "cloudflare:workers";

export interface Env {
  SANDBOX: DurableObjectNamespace<Sandbox>;
  INDEX: DurableObjectNamespace<Index>;
  // 32 letters at least. Without it everything is refused.
  FLEET_TOKEN?: string;
  // The one before, while it is replaced.
  FLEET_TOKEN_OLD?: string;
  // What the containers' image is called. Who asks for another is refused.
  IMAGE?: string;
}

interface Spec {
  image?: string;
  command?: string[];
  env?: Record<string, string>;
  labels: Record<string, string>;
  ttl_s: number;
  idle_s?: number;
}

// What is known of one: as it is stored and as it is told, but for the names that begin with an underscore.
interface Told {
  key: string;
  state: "creating" | "running" | "stopping" | "stopped";
  reason?: string;
  exit_code?: number;
  labels: Record<string, string>;
  created: string;
  ends: string;
  idle_ends?: string;
  _kill?: string;
  _untold?: boolean;
}

type Answer = { told: Told } | { status: number; error: string };

// Where the token is when `authorization` is for what listens in the container.
const OURS = "x-agent-fleet-authorization";
const GRACE_MS = 30_000;
// How long Cloudflare may look for a place for it.
const START_MS = 20_000;
// How long one alarm may stay.
const AWAKE_MS = 60_000;
const PAGE = 100;
const BODY_MOST = 1 << 20;
// How long it is remembered what came of one whose time is over, and when one that should have ended by itself is ended from outside.
const REMEMBERED_MS = 86_400_000;
const OVERDUE_MS = 600_000;

const at = (time: string | undefined) => (time === undefined ? Infinity : Date.parse(time));
const time = (ms: number) => new Date(ms).toISOString();
// It is asked to end a little before its time is over.
const warned = (told: Told) => at(told.ends) - Math.min(GRACE_MS, (at(told.ends) - at(told.created)) / 10);
const message = (error: unknown) => (error instanceof Error ? error.message : String(error));

const pause = (ms: number) => new Promise<void>((done) => setTimeout(done, ms));

// How a container ended. `code` is not always said.
interface End {
  code?: number;
  why?: string;
}

export class Sandbox extends DurableObject<Env> {
  private readonly container = this.ctx.container!;
  private starting?: Promise<Answer>;
  private ended?: Promise<End>;
  private wake = () => {};

  constructor(ctx: DurableObjectState, env: Env) {
    super(ctx, env);
    if (this.container.running) this.watch();
  }

  // The runtime says how it ended to who listens when it does, and to nobody later.
  private watch(): Promise<End> {
    const over = (error: unknown): End => {
      const why = message(error);
      const [, said, code] = /(exit code|signalled the container to exit): (\d+)/i.exec(why) ?? [];
      if (code === undefined) return { why };
      return { code: Number(code), why: said.startsWith("signalled") ? "Cloudflare has ended it" : undefined };
    };
    return (this.ended = this.container.monitor().then(() => ({ code: 0 }), over));
  }

  private async kept(): Promise<Told | undefined> {
    return this.ctx.storage.get<Told>("told");
  }

  private async keep(told: Told): Promise<Told> {
    // It may have been deleted while somebody waited: that is for good.
    if (!(await this.kept())) return told;
    delete told._untold;
    await this.ctx.storage.put("told", told);
    try {
      await index(this.env).update(told);
    } catch (error) {
      console.error("the index does not hear", message(error));
      await this.ctx.storage.put("told", { ...told, _untold: true });
    }
    await this.ctx.storage.setAlarm(Date.now());
    this.wake();
    return told;
  }

  async create(intent: Told, spec: Spec): Promise<Answer> {
    const told = (await this.kept()) ?? intent;
    if (told.state !== "creating") return { told };
    return (this.starting ??= this.begin(told, spec).finally(() => (this.starting = undefined)));
  }

  private async begin(told: Told, spec: Spec): Promise<Answer> {
    // Its end is certain before it begins.
    await this.ctx.storage.put("told", told);
    await this.keep(told);
    const deleted = { status: 409, error: "it was deleted meanwhile" };
    if (!(await this.kept())) return deleted;
    const entrypoint = spec.command?.length ? spec.command : undefined;
    if (!this.container.running) {
      this.container.start({ env: spec.env ?? {}, entrypoint, enableInternet: true });
      this.watch();
    }
    const end = await Promise.race([this.ended!, this.begun()]);
    const now = await this.kept();
    if (!now) {
      if (this.container.running) await this.container.destroy();
      return deleted;
    }
    if (end === "begun") {
      if (now.state === "creating") now.state = "running";
      return { told: await this.keep(now) };
    }
    if (end !== "late" && end.code !== undefined) return { told: await this.over(now, end) };
    if (end === "late") await this.container.destroy();
    const error = end === "late" ? "it did not start in time" : (end.why ?? "it did not start");
    await this.keep({ ...now, reason: error });
    return { status: /too many containers/i.test(error) ? 429 : 503, error };
  }

  // It is there when it says of a port that nobody listens: to start is only an order.
  private async begun(): Promise<"begun" | "late"> {
    for (const until = Date.now() + START_MS; Date.now() < until; await pause(200)) {
      try {
        await this.container.getTcpPort(33).fetch("http://127.0.0.1/", { signal: AbortSignal.timeout(5000) });
        return "begun";
      } catch (error) {
        if (/not listening/i.test(message(error)) && this.container.running) return "begun";
      }
    }
    return "late";
  }

  async told(): Promise<Told | undefined> {
    return this.kept();
  }

  async keepAlive(until: string): Promise<Told | undefined> {
    const told = await this.kept();
    if (!told?.idle_ends) return told;
    return this.keep({ ...told, idle_ends: time(Math.max(at(told.idle_ends), Math.min(at(until), at(told.ends)))) });
  }

  async end(graceMs: number, reason: string): Promise<Told | undefined> {
    const told = await this.kept();
    if (!told || !this.container.running) return told;
    const kill = time(Math.min(at(told._kill), Date.now() + graceMs));
    const now = await this.keep({ ...told, state: "stopping", reason: told.reason ?? reason, _kill: kill });
    this.container.signal(15);
    return now;
  }

  private async over(told: Told, end: End): Promise<Told> {
    return this.keep({ ...told, state: "stopped", exit_code: end.code, reason: told.reason ?? end.why });
  }

  // Gone without a word, in whatever state. It is known until it is: who fails here is asked again.
  async remove(): Promise<void> {
    if (this.container.running) await this.container.destroy();
    await this.ctx.storage.deleteAll();
    await this.ctx.storage.deleteAlarm();
    this.wake();
  }

  // Whatever is due; and when the next is.
  private async look(): Promise<number> {
    const told = await this.kept();
    if (!told) {
      if (this.container.running && !this.starting) await this.container.destroy();
      return Infinity;
    }
    if (told._untold) await this.keep(told);
    if (told.state === "stopped") return Infinity;
    const now = Date.now();
    if (!this.container.running && !this.starting && told.state !== "creating") {
      const unseen = pause(5000).then((): End => ({ why: "its end was not seen" }));
      await this.over(told, await Promise.race([this.ended ?? unseen, unseen]));
      return Infinity;
    }
    if (Math.min(at(told._kill), at(told.ends)) <= now) {
      const reason = `${told.reason ?? "its time was over"}, and it did not end by itself`;
      if (this.container.running) {
        await this.ctx.storage.put("told", { ...told, state: "stopping", reason });
        await this.container.destroy();
        return now + 1000;
      }
      await this.keep({ ...told, state: "stopped", reason: told.reason ?? "it was never started" });
      return Infinity;
    }
    if (told.state !== "running") return Math.min(at(told._kill), at(told.ends));
    const due = Math.min(at(told.idle_ends), warned(told));
    if (due <= now) await this.end(GRACE_MS, warned(told) <= now ? "its time was over" : "it was idle");
    return due;
  }

  override async alarm(): Promise<void> {
    let next = Date.now() + 5000;
    try {
      next = await this.look();
      if (this.container.running) {
        // As long as its container runs it stays, or nobody hears how that ends.
        const woken = new Promise<void>((done) => (this.wake = done));
        await Promise.race([woken, this.ended, pause(Math.min(AWAKE_MS, Math.max(0, next - Date.now())))]);
        next = Date.now() + 50;
      }
    } catch (error) {
      console.error("alarm", message(error));
    }
    if (next !== Infinity && (await this.ctx.storage.getAlarm()) === null) await this.ctx.storage.setAlarm(Math.max(next, Date.now()));
  }

  // To one of its ports. None is started by that.
  override async fetch(request: Request): Promise<Response> {
    if (!this.container.running) return refuse(409, "it does not run");
    const port = Number(new URL(request.url).port || 80);
    try {
      return await this.container.getTcpPort(port).fetch(request);
    } catch (error) {
      return refuse(502, `port ${port}: ${message(error)}`);
    }
  }
}

export class Index extends DurableObject<Env> {
  constructor(ctx: DurableObjectState, env: Env) {
    super(ctx, env);
    ctx.storage.sql.exec(`
      CREATE TABLE IF NOT EXISTS sandboxes (key TEXT PRIMARY KEY, state TEXT NOT NULL, ends INTEGER NOT NULL, told TEXT NOT NULL) WITHOUT ROWID;
      CREATE TABLE IF NOT EXISTS labels (name TEXT, value TEXT, key TEXT, PRIMARY KEY (name, value, key)) WITHOUT ROWID;
      CREATE INDEX IF NOT EXISTS labels_key ON labels (key);`);
  }

  // That there may be one, before there is. Of two the first is meant.
  async intend(told: Told): Promise<Told> {
    const known = this.find(told.key);
    if (known) return known;
    const { sql } = this.ctx.storage;
    sql.exec("INSERT INTO sandboxes VALUES (?, ?, ?, ?)", told.key, told.state, at(told.ends), JSON.stringify(told));
    for (const [name, value] of Object.entries(told.labels)) sql.exec("INSERT INTO labels VALUES (?, ?, ?)", name, value, told.key);
    if ((await this.ctx.storage.getAlarm()) === null) await this.ctx.storage.setAlarm(Date.now() + OVERDUE_MS);
    return told;
  }

  find(key: string): Told | undefined {
    const [row] = this.ctx.storage.sql.exec<{ told: string }>("SELECT told FROM sandboxes WHERE key = ?", key);
    return row && JSON.parse(row.told);
  }

  // Nobody is brought back by what is heard late.
  update(told: Told): void {
    this.ctx.storage.sql.exec("UPDATE sandboxes SET state = ?, told = ? WHERE key = ?", told.state, JSON.stringify(told), told.key);
  }

  forget(key: string): void {
    this.ctx.storage.sql.exec("DELETE FROM sandboxes WHERE key = ?", key);
    this.ctx.storage.sql.exec("DELETE FROM labels WHERE key = ?", key);
  }

  list(labels: [string, string][], after: string, most: number): Told[] {
    const has = "AND EXISTS (SELECT 1 FROM labels l WHERE l.name = ? AND l.value = ? AND l.key = s.key) ";
    const query = `SELECT told FROM sandboxes s WHERE key > ? ${has.repeat(labels.length)}ORDER BY key LIMIT ?`;
    return [...this.ctx.storage.sql.exec<{ told: string }>(query, after, ...labels.flat(), most)].map((row) => JSON.parse(row.told));
  }

  // What should have ended by itself is ended, and what ended long ago is forgotten.
  override async alarm(): Promise<void> {
    const now = Date.now();
    const { sql } = this.ctx.storage;
    const query = "SELECT key FROM sandboxes WHERE ends < ? OR (ends < ? AND state <> 'stopped') LIMIT 100";
    const due = [...sql.exec<{ key: string }>(query, now - REMEMBERED_MS, now - OVERDUE_MS)];
    for (const { key } of due) {
      try {
        await this.env.SANDBOX.getByName(key).remove();
        this.forget(key);
      } catch (error) {
        console.error("sweep", key, message(error));
      }
    }
    const left = sql.exec("SELECT 1 FROM sandboxes LIMIT 1").toArray().length > 0;
    if (left) await this.ctx.storage.setAlarm(now + OVERDUE_MS);
  }
}

const index = (env: Env) => env.INDEX.getByName("index");
const refuse = (status: number, error: string) => Response.json({ error }, { status, headers: status === 429 ? { "retry-after": "2" } : {} });

async function same(said: string | null, token: string | undefined): Promise<boolean> {
  if (!said?.startsWith("Bearer ") || !token || token.length < 32) return false;
  // Of one length, whatever was said.
  const digest = (text: string) => crypto.subtle.digest("SHA-256", new TextEncoder().encode(text));
  return crypto.subtle.timingSafeEqual(await digest(said.slice(7)), await digest(token));
}

const strings = (value: unknown): value is Record<string, string> =>
  typeof value === "object" && value !== null && !Array.isArray(value) && Object.values(value).every((each) => typeof each === "string");
const seconds = (value: unknown, least: number, most: number): value is number => typeof value === "number" && value >= least && value <= most;

// What is wrong with it.
function wrong(spec: Spec, env: Env): string | undefined {
  if (typeof spec !== "object" || spec === null) return "the body is no object";
  if (!seconds(spec.ttl_s, 1, 30 * 86_400)) return "`ttl_s` is 1 to 2592000";
  if (spec.idle_s !== undefined && !seconds(spec.idle_s, 1, 30 * 86_400)) return "`idle_s` is 1 to 2592000";
  if (!strings(spec.labels) || Object.keys(spec.labels).length > 64) return "`labels` has up to 64 names with texts";
  if (spec.env !== undefined && !strings(spec.env)) return "`env` has names with texts";
  if (spec.command !== undefined && !(Array.isArray(spec.command) && spec.command.every((word) => typeof word === "string"))) return "`command` is a list of texts";
  if (spec.image && env.IMAGE && spec.image !== env.IMAGE) return `the image here is ${env.IMAGE}`;
}

async function body<T>(request: Request): Promise<T | undefined> {
  const text = await request.text();
  if (text.length > BODY_MOST) return undefined;
  try {
    return text === "" ? ({} as T) : JSON.parse(text);
  } catch {
    return undefined;
  }
}

const shown = (told: Told) => Object.fromEntries(Object.entries(told).filter(([name]) => !name.startsWith("_")));
const say = (told: Told | undefined) => (told ? Response.json(shown(told)) : refuse(404, "there is no such sandbox"));

// Gives it to a container, without what is ours.
async function pass(request: Request, env: Env, key: string, port: string, rest: string): Promise<Response> {
  if (!/^\d{1,5}$/.test(port) || Number(port) < 1 || Number(port) > 65535) return refuse(400, "there is no such port");
  const headers = new Headers(request.headers);
  for (const name of [headers.has(OURS) ? OURS : "authorization", "x-agent-fleet-port"]) headers.delete(name);
  const { method, body } = request;
  return env.SANDBOX.getByName(key).fetch(`http://127.0.0.1:${port}${rest}`, { method, headers, body, redirect: "manual" });
}

async function answer(request: Request, env: Env): Promise<Response> {
  const said = request.headers.get(OURS) ?? request.headers.get("authorization");
  if (!env.FLEET_TOKEN) return refuse(403, "nobody is let in: wrangler secret put FLEET_TOKEN");
  const [now, before] = await Promise.all([same(said, env.FLEET_TOKEN), same(said, env.FLEET_TOKEN_OLD)]);
  if (!now && !before) return refuse(401, "the token is another");

  const url = new URL(request.url);
  const to = /^([\w.-]{1,128}):(\d+)$/.exec(request.headers.get("x-agent-fleet-port") ?? "");
  if (to) return pass(request, env, to[1], to[2], url.pathname + url.search);
  const ported = /^\/v1\/sandboxes\/([\w.-]{1,128})\/ports\/(\d+)(\/.*)?$/.exec(url.pathname);
  if (ported) return pass(request, env, ported[1], ported[2], (ported[3] ?? "/") + url.search);

  if (url.pathname === "/v1/sandboxes" && request.method === "GET") {
    const labels = [...url.searchParams].filter(([name]) => name.startsWith("label.")).map(([name, value]): [string, string] => [name.slice(6), value]);
    if (labels.length > 16) return refuse(400, "16 labels at most");
    const most = Math.min(PAGE, Number(url.searchParams.get("limit") ?? PAGE));
    if (!(most >= 1)) return refuse(400, "`limit` is a number");
    const found = await index(env).list(labels, url.searchParams.get("cursor") ?? "", most + 1);
    const sandboxes = found.slice(0, most).map(shown);
    return Response.json({ sandboxes, ...(found.length > most && { next: found[most - 1].key }) });
  }

  const [, key, verb] = /^\/v1\/sandboxes\/([\w.-]{1,128})(?:\/(stop|keepalive))?$/.exec(url.pathname) ?? [];
  if (!key) return refuse(404, "there is no such path");
  const sandbox = env.SANDBOX.getByName(key);
  switch (`${request.method} ${verb ?? ""}`) {
    case "PUT ": {
      const spec = await body<Spec>(request);
      const why = spec ? wrong(spec, env) : `the body is no JSON of at most ${BODY_MOST} bytes`;
      if (!spec || why) return refuse(400, why!);
      const born = Date.now();
      const ends = born + spec.ttl_s * 1000;
      const idle = spec.idle_s === undefined ? {} : { idle_ends: time(Math.min(ends, born + spec.idle_s * 1000)) };
      const intent: Told = { key, state: "creating", labels: spec.labels, created: time(born), ends: time(ends), ...idle };
      const made = await sandbox.create(await index(env).intend(intent), spec);
      return "told" in made ? say(made.told) : refuse(made.status, made.error);
    }
    case "GET ": {
      const told = await sandbox.told();
      if (told) return say(told);
      // One that is about to be created is in the index alone; and so is one whose removal was broken off.
      const known = await index(env).find(key);
      if (known && known.state !== "creating") await index(env).forget(key);
      return say(known?.state === "creating" ? known : undefined);
    }
    case "DELETE ":
      await sandbox.remove();
      await index(env).forget(key);
      return new Response(null, { status: 204 });
    case "POST stop": {
      const asked = await body<{ grace_s: number }>(request);
      if (!seconds(asked?.grace_s, 0, 3600)) return refuse(400, "`grace_s` is 0 to 3600");
      return say(await sandbox.end(asked.grace_s * 1000, "it was asked to end"));
    }
    case "POST keepalive": {
      const asked = await body<{ until: string }>(request);
      if (!asked || Number.isNaN(Date.parse(asked.until))) return refuse(400, "`until` is a time");
      return say(await sandbox.keepAlive(asked.until));
    }
    default:
      return refuse(405, "it has no such verb");
  }
}

export default {
  async fetch(request, env): Promise<Response> {
    try {
      return await answer(request, env);
    } catch (error) {
      console.error(message(error));
      return refuse(503, message(error));
    }
  },
} satisfies ExportedHandler<Env>;
