// What the page shows: the sessions of whoever's token it was given, as they change. Everything that comes from outside is written as text.
"use strict";

const at = (id) => document.getElementById(id);
const PASSING = new Set(["requested", "creating", "starting", "pausing", "resuming", "stopping", "stopped"]);
const OVER = new Set(["destroyed", "failed"]);
// Those that are over, at most: the page is for what is.
const KEPT = 200;
const KEY = "agent-fleet-token";
const sessions = new Map();
let token = sessionStorage.getItem(KEY);
let last = null;
let running = null;

const usd = (n) => `$${n.toFixed(4)}`;

function time(seconds) {
  if (seconds < 90) return `${Math.max(0, Math.floor(seconds))} s`;
  if (seconds < 5400) return `${Math.floor(seconds / 60)} min`;
  return seconds < 172800 ? `${Math.floor(seconds / 3600)} h` : `${Math.floor(seconds / 86400)} d`;
}

function say(text, lost) {
  at("link").className = lost ? "lost" : "";
  if (at("link").textContent !== text) at("link").textContent = text;
}

class Refused extends Error {}

async function ask(path, more = {}) {
  const answer = await fetch(path, { headers: { authorization: `Bearer ${token}`, ...more.headers }, signal: more.signal, cache: "no-store" });
  if (answer.status === 401) throw new Refused();
  if (!answer.ok) throw new Error(`${answer.status}`);
  return answer;
}

// What a later word has said of a session stands.
function told(view, when) {
  const known = sessions.get(view.id);
  if (!known || known.when <= when) sessions.set(view.id, { ...view, when });
  const over = [...sessions.values()].filter((one) => OVER.has(one.phase)).sort((a, b) => a.when - b.when);
  for (const one of over.slice(0, Math.max(0, over.length - KEPT))) sessions.delete(one.id);
}

async function all(signal) {
  const there = new Set();
  let after = "";
  do {
    const page = await (await ask(`v1/sessions?limit=500${after && `&after=${encodeURIComponent(after)}`}`, { signal })).json();
    for (const view of page.sessions) {
      there.add(view.id);
      told(view, 0);
    }
    after = page.next;
  } while (after);
  // Those of which nobody has heard how they ended.
  for (const [id, one] of sessions) if (!there.has(id) && !OVER.has(one.phase) && one.when === 0) sessions.delete(id);
}

async function listen(signal) {
  const headers = last === null ? {} : { "last-event-id": last };
  const stream = await ask("v1/events", { headers, signal });
  // Listening already: what changes while the list is read is told, too.
  await all(signal);
  say("live");
  draw();
  const reader = stream.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await heard(reader);
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const fields = Object.fromEntries(part.split("\n").filter((line) => !line.startsWith(":")).map((line) => [line.slice(0, line.indexOf(":")), line.slice(line.indexOf(":") + 1).trimStart()]));
      if (!fields.data) continue;
      last = fields.id;
      told(JSON.parse(fields.data), Number(fields.id));
    }
    if (parts.length) draw();
  }
}

// A word comes every ten seconds: who says nothing for three of them is gone.
function heard(reader) {
  let late;
  const silence = new Promise((_, gone) => { late = setTimeout(() => gone(new Error("silent")), 30000); });
  return Promise.race([reader.read(), silence]).finally(() => clearTimeout(late));
}

async function run() {
  running?.abort();
  const mine = (running = new AbortController());
  at("enter").hidden = true;
  at("sessions").hidden = at("leave").hidden = false;
  say("connecting …");
  let lost = null;
  for (let wait = 500; !mine.signal.aborted; wait = Math.min(wait * 2, 10000)) {
    const began = Date.now();
    try {
      await listen(mine.signal);
    } catch (error) {
      if (mine.signal.aborted) return;
      if (error instanceof Refused) return leave("That is nobody's token here.");
    }
    if (Date.now() - began > 5000) { wait = 500; lost = null; }
    lost ??= new Date();
    say(`connection lost, last data of ${lost.toLocaleTimeString()}`, true);
    await new Promise((go) => setTimeout(go, wait));
  }
}

function leave(why) {
  running?.abort();
  running = null;
  token = null;
  last = null;
  sessions.clear();
  sessionStorage.removeItem(KEY);
  at("sessions").hidden = at("leave").hidden = true;
  at("enter").hidden = false;
  at("wrong").textContent = why;
  at("rows").replaceChildren();
  say("");
  at("token").focus();
}

function cell(kind, text, name) {
  const made = document.createElement(kind);
  made.textContent = text;
  if (name) made.className = name;
  return made;
}

function row(one, now) {
  const made = document.createElement("tr");
  const head = cell("th", one.id);
  head.scope = "row";
  const phase = cell("td", one.phase + (one.wanted === "gone" && !OVER.has(one.phase) ? ", to end" : ""), PASSING.has(one.phase) ? "passing" : one.phase);
  const since = (moment) => time((now - Date.parse(moment)) / 1000);
  made.append(head, phase, cell("td", since(one.since)), cell("td", one.tenant), cell("td", one.template ?? "–"), cell("td", one.provider),
    cell("td", usd(one.agent_usd), "number"), cell("td", usd(one.container_usd), "number"), cell("td", since(one.created)), cell("td", one.reason ?? "", "why"));
  return made;
}

function draw() {
  if (!token) return;
  const now = Date.now();
  const every = [...sessions.values()];
  const live = every.filter((one) => !OVER.has(one.phase));
  const sum = (name) => live.reduce((all, one) => all + one[name], 0);
  at("total-sessions").textContent = live.length;
  at("total-working").textContent = live.filter((one) => one.phase === "active").length;
  at("total-agents").textContent = usd(sum("agent_usd"));
  at("total-containers").textContent = usd(sum("container_usd"));
  const words = at("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const text = (one) => [one.id, one.phase, one.provider, one.tenant, one.template, one.owner, one.reason].join(" ").toLowerCase();
  const shown = (at("over").checked ? every : live).filter((one) => words.every((word) => text(one).includes(word)));
  shown.sort((a, b) => Date.parse(b.since) - Date.parse(a.since) || (a.id < b.id ? -1 : 1));
  at("rows").replaceChildren(...shown.slice(0, 1000).map((one) => row(one, now)));
  at("shown").textContent = words.length || shown.length > 1000 ? `${Math.min(shown.length, 1000)} of ${every.length}` : "";
  at("empty").hidden = shown.length > 0 || words.length > 0;
}

function enter() {
  token = at("token").value.trim();
  at("token").value = "";
  at("wrong").textContent = "";
  // What is no header is no token.
  if (!/^[\x21-\x7e]+$/.test(token)) return leave("A token is missing.");
  sessionStorage.setItem(KEY, token);
  run();
  at("sessions").focus();
}

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  enter();
});
at("leave").addEventListener("click", () => leave(""));
at("filter").addEventListener("input", draw);
at("over").addEventListener("change", draw);
setInterval(() => { if (running && !document.hidden) draw(); }, 5000);
if (token) run();
