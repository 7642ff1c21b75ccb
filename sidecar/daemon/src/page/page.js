// What `/events` says, as a table; what `/sessions/PID/timeline` says, as a list and a chart. Text from outside becomes text and
// nothing else: there is no markup made of strings here.
"use strict";

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
/** Longer than the server is ever silent. */
const SILENCE_S = 12;
/** Seconds of past spending that the rate is made of. */
const RATE_S = 300;
/** The chart shows this much of the past at most. */
const CHART_S = 900;
/** Something is said aloud no more often than this. */
const SAY_MS = 5000;

const view = {
  sessions: new Map(), totals: null, sort: { column: "age", down: true }, filter: "", open: null, rows: new Map(), current: null,
  skew: 0, heard: 0, lost: true, spent: [], timelines: new Map(),
};

// ---- words and numbers

const STATES = {
  starting: ["starting", "work"], model: ["model", "work"], tool: ["tool", "work"], compacting: ["compacting", "work"],
  permission: ["asks permission", "wait"], retry_backoff: ["waits to retry", "wait"], waiting_input: ["waits for input", "quiet"],
  idle: ["idle", "quiet"], draining: ["ending", "quiet"], stuck: ["stuck", "bad"],
};
const HELD = new Set(["frozen", "network_dead", "uninterruptible", "spinning", "no_result", "post_result"]);

const words = (text) => String(text).replaceAll("_", " ");
/** By the server's clock; where the connection is lost, time stands still. */
const now = () => (view.lost ? view.heard : Date.now() / 1000) + view.skew;

function money(usd) {
  if (!usd) return "$0";
  const digits = usd >= 1 ? 2 : usd >= 0.01 ? 4 : 6;
  return "$" + usd.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

function count(n) {
  if (n < 10000) return n.toLocaleString("en");
  const [unit, name] = n < 1e6 ? [1e3, "k"] : n < 1e9 ? [1e6, "M"] : [1e9, "G"];
  return (n / unit).toLocaleString("en", { maximumSignificantDigits: 3 }) + name;
}

function duration(s) {
  s = Math.max(0, s);
  if (s < 1) return Math.round(s * 1000) + " ms";
  if (s < 10) return s.toFixed(1) + " s";
  if (s < 60) return Math.round(s) + " s";
  const two = (n) => String(Math.floor(n)).padStart(2, "0");
  if (s < 3600) return `${Math.floor(s / 60)} m ${two(s % 60)} s`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${two((s % 3600) / 60)} m`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}

/** Of something that goes on: no digits that change faster than one can read. */
const age = (since) => { const s = now() - since; return s < 1 ? "now" : s < 60 ? Math.floor(s) + " s" : duration(s); };
const percent = (ratio) => (ratio < 0.1 ? (ratio * 100).toFixed(1) : Math.round(ratio * 100)) + " %";
const inputs = (tokens) => tokens.input + tokens.cache_read + tokens.cache_write_5m + tokens.cache_write_1h;
const cost = (sums) => (sums.cost_estimated ? "≈ " : "") + money(sums.cost_usd ?? 0);
const NONE = { input: 0, output: 0, cache_read: 0, cache_write_5m: 0, cache_write_1h: 0 };
const tokensOf = (session) => session.tokens ?? NONE;
const short = (session) => (session.session_id ? session.session_id.slice(0, 8) : `pid ${session.pid}`);
const LABELS = { tenant: "Tenant", team: "Team", cost_center: "Cost centre", user: "User" };
const labels = (session) => Object.keys(LABELS).map((name) => session[name]).filter(Boolean);

function stateOf(session) {
  if (session.stale) return ["silent", "bad"];
  const [word, look] = STATES[session.state] ?? [words(session.state), "quiet"];
  return HELD.has(session.why) ? [word, "bad"] : [word, look];
}

function whyOf(session) {
  if (session.stale) return "the wrapper says nothing";
  if (session.refusing) return "budget used up, refuses";
  return session.why === session.state ? "" : words(session.why ?? "");
}

/** Circles that an agent may go round in: counted always, and worth a word when they are. */
const CIRCLES = new Set(["identical_call", "alternating", "error_repeat", "compaction_thrash", "fan_out", "no_progress"]);
/** The limit that is nearest to its end. */
const tightest = (session) => (session.limits ?? []).filter((l) => !CIRCLES.has(l.limit) || l.ratio >= 0.5).sort((a, b) => b.ratio - a.ratio)[0];
const LIMITS = { usd: "cost" };
const limitName = (limit) => LIMITS[limit] ?? words(limit);
const brief = (model) => model.replace(/^claude-/, "");

function amount(limit, value) {
  if (limit === "usd") return money(value);
  if (["duration", "idle", "startup", "stall", "result", "memory_forecast"].includes(limit)) return duration(value);
  if (limit === "memory") return (value / 2 ** 20).toFixed(0) + " MiB";
  return count(Math.round(value));
}

// ---- elements

function make(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name === "class") element.className = value;
    else if (name in element && name !== "role") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

function put(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** A main text, a smaller one below, and how full something is. */
function fill(cell, main, sub = "", ratio = null) {
  const key = `${main}\n${sub}\n${ratio === null ? "" : Math.round(ratio * 100)}`;
  if (cell.dataset.key === key) return;
  cell.dataset.key = key;
  const top = make("span", { class: ratio >= 1 ? "over" : ratio >= 0.8 ? "near" : "" }, main);
  if (ratio !== null) top.append(gauge(ratio));
  cell.replaceChildren(top);
  if (sub) cell.append(make("span", { class: "sub" }, sub));
}

function gauge(ratio) {
  const bar = make("span");
  bar.style.width = Math.min(100, ratio * 100) + "%";
  return make("span", { class: "gauge", "aria-hidden": "true" }, bar);
}

// ---- the table

const COLUMNS = [
  { id: "session", head: "Session", wide: true, by: (s) => s.session_id ?? "", draw: drawName },
  {
    id: "state", head: "State", wide: true, by: (s) => stateOf(s)[0],
    draw: (cell, s) => {
      const [word, look] = stateOf(s);
      const key = `${word}\n${look}\n${age(s.state_since)}\n${whyOf(s)}`;
      if (cell.dataset.key === key) return;
      cell.dataset.key = key;
      const sub = [whyOf(s), age(s.state_since)].filter(Boolean).join(" · ");
      cell.replaceChildren(make("span", { class: `state ${look}` }, word), make("span", { class: "sub" }, sub));
    },
  },
  {
    id: "turn", head: "Turn", by: (s) => s.turn?.number ?? s.turns ?? 0,
    draw: (cell, s) => (s.turn ? fill(cell, String(s.turn.number), `round ${s.turn.rounds} · ${age(s.turn.since)}`) : fill(cell, s.turns ? `${s.turns} done` : "–", s.outcome ? words(s.outcome) : "")),
  },
  {
    id: "tool", head: "Tool in flight", by: (s) => s.tool?.name ?? "",
    draw: (cell, s) => {
      const more = [];
      if (s.tool) more.push(age(s.tool.since));
      if (s.tools_in_flight > 1) more.push(`+ ${s.tools_in_flight - 1} more`);
      if (s.subagents_active) more.push(`${s.subagents_active} subagent${s.subagents_active > 1 ? "s" : ""}`);
      if (s.background_tasks) more.push(`${s.background_tasks} in background`);
      const name = s.tool?.name ?? "–";
      fill(cell, name, more.join(" · "));
      cell.firstChild.className = "name";
      cell.title = name.length > 20 ? name : "";
    },
  },
  { id: "model", head: "Model", by: (s) => s.model ?? "", draw: (cell, s) => fill(cell, s.model ? brief(s.model) : "–") },
  {
    id: "context", head: "Context", by: (s) => s.context?.ratio ?? 0,
    draw: (cell, s) => {
      const { tokens, window, ratio } = s.context ?? {};
      if (tokens === undefined) fill(cell, "–");
      else if (window) fill(cell, percent(ratio), `${count(tokens)} of ${count(window)}`, ratio);
      else fill(cell, count(tokens), "window unknown");
    },
  },
  {
    id: "in", head: "Tokens in", num: true, by: (s) => inputs(tokensOf(s)),
    draw: (cell, s) => { const all = inputs(tokensOf(s)); fill(cell, count(all), all ? `${percent(tokensOf(s).cache_read / all)} cached` : ""); },
  },
  { id: "out", head: "Out", num: true, by: (s) => tokensOf(s).output, draw: (cell, s) => fill(cell, count(tokensOf(s).output)) },
  {
    id: "cost", head: "Cost", num: true, by: (s) => s.cost_usd ?? 0,
    draw: (cell, s) => fill(cell, cost(s), s.cost_estimated ? "part estimated" : s.turn ? `turn ${money(s.turn.cost_usd)}` : ""),
  },
  {
    id: "budget", head: "Nearest limit", by: (s) => tightest(s)?.ratio ?? -1,
    draw: (cell, s) => {
      const l = tightest(s);
      if (!l) return fill(cell, "–");
      const of = l.scope === "session" ? "" : `, ${words(l.scope)}`;
      fill(cell, percent(l.ratio), `${limitName(l.limit)}${of}: ${amount(l.limit, l.ceiling)}`, l.ratio);
    },
  },
  {
    id: "last", head: "Last event", by: (s) => -(s.last_event?.at ?? 0),
    draw: (cell, s) => (s.last_event ? fill(cell, words(s.last_event.kind), `${age(s.last_event.at)}${now() - s.last_event.at < 1 ? "" : " ago"}`) : fill(cell, "–")),
  },
  { id: "age", head: "Runs for", num: true, by: (s) => -(s.started ?? 0), draw: (cell, s) => fill(cell, age(s.started)) },
];

function drawName(cell, session) {
  let button = cell.querySelector("button");
  if (!button) {
    button = make("button", { class: "open id", type: "button", tabIndex: -1 });
    cell.append(button, make("span", { class: "sub" }));
  }
  put(button, short(session));
  button.setAttribute("aria-expanded", String(view.open === session.key));
  const slot = session.slot === "other" ? "" : `slot ${session.slot}`;
  const whose = [...labels(session), slot].filter(Boolean).join(" · ");
  put(cell.lastChild, whose);
  cell.title = whose.length > 24 ? whose : "";
}

function makeHeads() {
  for (const column of COLUMNS) {
    const button = make("button", { type: "button" }, column.head);
    const head = make("th", { scope: "col", role: "columnheader", class: column.num ? "num" : "" }, button);
    button.addEventListener("click", () => {
      const same = view.sort.column === column.id;
      view.sort = { column: column.id, down: same ? !view.sort.down : Boolean(column.num || column.id === "budget" || column.id === "context") };
      draw();
    });
    $("heads").append(head);
    column.element = head;
  }
}

function makeRow(key) {
  const row = make("tr", { role: "row" });
  row.dataset.key = key;
  COLUMNS.forEach((column, at) => {
    const look = [column.num ? "num" : "", column.wide ? "wide" : ""].join(" ").trim();
    const cell = at === 0 ? make("th", { scope: "row", role: "rowheader", class: look }) : make("td", { role: "cell", class: look });
    cell.dataset.head = column.head;
    row.append(cell);
  });
  row.addEventListener("click", () => open(key));
  return row;
}

function matches(session) {
  const text = [session.session_id, session.pid, ...stateOf(session), session.why, session.model, session.tool?.name, ...labels(session)].join(" ").toLowerCase();
  return view.filter.toLowerCase().split(/\s+/).every((word) => text.includes(word));
}

function draw() {
  const column = COLUMNS.find((column) => column.id === view.sort.column);
  for (const other of COLUMNS) {
    if (other === column) other.element.setAttribute("aria-sort", view.sort.down ? "descending" : "ascending");
    else other.element.removeAttribute("aria-sort");
  }
  const compare = (a, b) => {
    const [x, y] = [column.by(a), column.by(b)];
    const order = typeof x === "string" ? x.localeCompare(y) : x - y;
    return (view.sort.down ? -order : order) || a.started - b.started || a.pid - b.pid;
  };
  const shown = [...view.sessions.values()].filter(matches).sort(compare);
  const focused = document.activeElement?.closest?.("#rows tr")?.dataset.key;
  const rows = shown.map((session) => {
    let row = view.rows.get(session.key);
    if (!row) view.rows.set(session.key, (row = makeRow(session.key)));
    COLUMNS.forEach((column, at) => column.draw(row.children[at], session));
    if (view.open === session.key) row.setAttribute("aria-current", "true");
    else row.removeAttribute("aria-current");
    return row;
  });
  for (const key of view.rows.keys()) if (!view.sessions.has(key)) view.rows.delete(key);
  const body = $("rows");
  if (rows.length !== body.children.length || rows.some((row, at) => body.children[at] !== row)) {
    const had = document.activeElement;
    body.replaceChildren(...rows);
    if (focused && body.contains(had)) had.focus({ preventScroll: true });
  }
  if (!shown.some((session) => session.key === view.current)) view.current = shown[0]?.key ?? null;
  for (const row of rows) row.querySelector(".open").tabIndex = row.dataset.key === view.current ? 0 : -1;
  const none = view.totals !== null && view.sessions.size === 0;
  $("empty").hidden = !none;
  $("table-box").hidden = none;
  put($("shown"), view.filter ? `${shown.length} of ${view.sessions.size}` : "");
  drawTotals();
  drawDetail();
}

function drawTotals() {
  if (!view.totals) return;
  const sessions = [...view.sessions.values()];
  const tokens = view.totals.tokens;
  const all = inputs(tokens);
  put($("total-sessions"), String(sessions.length));
  put($("total-working"), String(sessions.filter((s) => !s.stale && STATES[s.state]?.[1] !== "quiet").length));
  put($("total-cost"), cost(view.totals));
  put($("total-in"), count(all));
  put($("total-cached"), all ? percent(tokens.cache_read / all) : "–");
  put($("total-out"), count(tokens.output));
  put($("total-turns"), count(view.totals.turns));
  put($("total-rate"), rate());
  document.title = view.lost ? "Agents: connection lost" : `(${sessions.length}) Agents`;
}

function rate() {
  const [first, last] = [view.spent[0], view.spent.at(-1)];
  const seconds = first ? now() - first.at : 0;
  return seconds < 10 ? "–" : money(Math.max(0, (last.usd - first.usd) / seconds) * 3600) + "/h";
}

// ---- one session

function open(key) {
  if (!view.sessions.has(key)) return;
  view.open = view.current = key;
  draw();
  $("detail-title").focus();
}

function close() {
  const row = view.rows.get(view.open);
  view.open = null;
  draw();
  (row?.isConnected ? row.querySelector(".open") : $("sessions")).focus();
}

function drawDetail() {
  const session = view.sessions.get(view.open) ?? view.timelines.get(view.open)?.session;
  $("detail").hidden = !session;
  if (!session) return;
  const ended = !view.sessions.has(session.key);
  const timeline = view.timelines.get(session.key) ?? { entries: [], last: 0, tries: 0 };
  timeline.session = session;
  view.timelines.set(session.key, timeline);
  for (const key of view.timelines.keys()) if (key !== session.key) view.timelines.delete(key);
  put($("detail-title"), session.session_id ?? `pid ${session.pid}`);
  const tokens = tokensOf(session);
  const calls = Object.values(session.tool_calls ?? {}).reduce(([ok, bad], call) => [ok + call.ok, bad + call.error], [0, 0]);
  const facts = [
    ["State", ended ? "ended" : [stateOf(session)[0], whyOf(session)].filter(Boolean).join(", ")],
    ["In this state for", ended ? "–" : age(session.state_since)],
    ["Cost", cost(session) + (session.cost_estimated ? " (part estimated)" : "")],
    ["Turn", session.turn ? `${session.turn.number}, round ${session.turn.rounds}, ${money(session.turn.cost_usd)}` : `${session.turns ?? 0} done`],
    ["Answers of the model", count(session.rounds ?? 0)],
    ["Model", session.model ?? "–"],
    ["Context", session.context ? `${count(session.context.tokens)} tokens${session.context.ratio === null ? "" : ", " + percent(session.context.ratio)}` : "–"],
    ["Tokens in", `${count(inputs(tokens))} (${count(tokens.cache_read)} from cache)`],
    ["Tokens out", count(tokens.output)],
    ["Tool calls", `${count(calls[0])} ok, ${count(calls[1])} failed`],
    ["Subagents", `${session.subagents_active} run, ${count(session.subagents ?? 0)} in all`],
    ["Waiting permissions", String(session.permissions_pending)],
    ["Retries", count(session.api_retries ?? 0)],
    ["Runs for", ended ? "–" : age(session.started)],
    ["CLI", `${session.cli_version ?? "version not told"}, pid ${session.cli_pid ?? "–"}`],
    ["Wrapper", `pid ${session.pid}, slot ${session.slot}`],
    ...Object.entries(LABELS).filter(([name]) => session[name]).map(([name, word]) => [word, session[name]]),
  ];
  const list = $("facts");
  if (list.children.length !== facts.length) list.replaceChildren(...facts.map(() => make("div", {}, make("dt"), make("dd"))));
  facts.forEach(([name, value], at) => { put(list.children[at].firstChild, name); put(list.children[at].lastChild, value); });
  const [set, resting] = [[], []];
  for (const limit of session.limits ?? []) (CIRCLES.has(limit.limit) && !limit.ratio ? resting : set).push(limit);
  const items = set.map(limitItem);
  if (resting.length) items.push(make("li", { class: "note" }, `${resting.length} detectors see no circle`));
  $("limits").replaceChildren(...(items.length ? items : [make("li", { class: "note" }, "none set")]));
  // The hub still knows how it ended.
  const last = ended && !view.lost && timeline.tries < 3 && timeline.entries.at(-1)?.kind !== "exited";
  if (!timeline.asked && (ended ? last : session.timeline > timeline.last)) {
    if (ended) timeline.tries++;
    askTimeline(session, timeline);
  }
  drawChart(session, timeline.entries, ended);
}

function limitItem(limit) {
  const text = `${amount(limit.limit, limit.used)} of ${amount(limit.limit, limit.ceiling)}`;
  const look = limit.ratio >= 1 ? "over" : limit.ratio >= 0.8 ? "near" : "";
  return make("li", {},
    make("span", {}, `${limitName(limit.limit)}, ${words(limit.scope)}${limit.mode === "enforce" ? "" : ` (${limit.mode})`}`),
    make("span", { class: look }, `${text}, ${percent(limit.ratio)}`, gauge(limit.ratio)));
}

async function askTimeline(session, timeline) {
  timeline.asked = true;
  try {
    const answer = await fetch(`sessions/${encodeURIComponent(session.session_id ?? session.pid)}/timeline?after=${timeline.last}`, { credentials: "same-origin" });
    if (answer.ok) {
      const { entries } = await answer.json();
      const fresh = entries.filter((entry) => entry.n > timeline.last);
      timeline.last = fresh.at(-1)?.n ?? timeline.last;
      timeline.entries = [...timeline.entries, ...fresh].slice(-500);
      if (view.open === session.key) {
        const list = $("timeline");
        if (list.dataset.key !== session.key) { list.replaceChildren(); list.dataset.key = session.key; }
        list.prepend(...fresh.map(entryItem).reverse());
        while (list.children.length > 500) list.lastChild.remove();
      }
    }
  } catch { /* The connection is lost: that is said elsewhere. */ }
  // Another look with the next change, and not at once where nothing came.
  setTimeout(() => { timeline.asked = false; }, 250);
}

/** A word, a sentence, a look, and a number at the end. */
function tell(e) {
  const by = e.source === "subagent" ? " (subagent)" : "";
  const took = e.seconds === undefined ? "" : duration(e.seconds);
  switch (e.kind) {
    case "session": return ["session", `began: ${words(e.start)}`, "turn"];
    case "turn_started": return ["turn", `turn ${e.turn} began`, "turn"];
    case "turn_ended": return ["turn", `turn ${e.turn}: ${words(e.outcome)}${e.confirmed ? "" : ", cost not confirmed"}`, `turn ${e.outcome === "success" ? "good" : e.outcome === "interrupted" ? "wait" : "bad"}`, `${took} · ${money(e.cost_usd)}`];
    case "request": return ["request", `${e.model}${by}${e.input ? `: ${count(e.input)} in (${count(e.cached)} cached)` : ""}${e.output === undefined ? "" : `, ${count(e.output)} out`}`, "", [took, e.cost_usd === undefined ? "" : "≈ " + money(e.cost_usd)].filter(Boolean).join(" · ")];
    case "tool": return ["tool", `${e.tool}${by}: ${words(e.outcome)}`, e.outcome === "ok" ? "" : "bad", took];
    case "permission": return ["permission", `${e.tool}: ${words(e.decision)}`, "wait", took];
    case "subagent_started": return ["subagent", `${e.agent} began${e.background ? " in the background" : ""}`, ""];
    case "subagent_ended": return ["subagent", `${e.agent}: ${words(e.outcome)}`, "", took];
    case "compacted": return ["compaction", `${words(e.trigger)}: ${count(e.pre_tokens)} to ${count(e.post_tokens)} tokens`, "wait", took];
    case "retried": return ["retry", `${words(e.error)}${e.status ? ` (${e.status})` : ""}`, "wait", e.delay_seconds === undefined ? "" : `after ${duration(e.delay_seconds)}`];
    case "request_failed": return ["failed", words(e.error), "bad"];
    case "limit": return ["limit", `${limitName(e.limit)}, ${words(e.scope)}${e.share ? ", fair share" : ""}: ${amount(e.limit, e.observed)} of ${amount(e.limit, e.ceiling)}${e.mode === "enforce" ? "" : ` (${e.mode})`}`, e.level >= 1 ? "bad" : "wait", words(e.action)];
    case "loop": return ["detector", `${words(e.detector)}, ${count(e.streak)} in a row`, "wait", words(e.action)];
    case "stalled": return ["stall", `${words(e.stall)}${e.why ? `: ${words(e.why)}` : ""}${e.on ? "" : " is over"}`, e.on ? "bad" : ""];
    case "stopping": return ["stop", words(e.action), "wait"];
    case "stopped": return ["stop", `${words(e.action)} worked`, "", [took, e.overshoot_usd ? `${money(e.overshoot_usd)} over` : ""].filter(Boolean).join(" · ")];
    case "ordered": return ["asked", `${words(e.order)}${e.limit ? ` ${limitName(e.limit)}, ${words(e.scope)}: ${amount(e.limit, e.ceiling)}` : ""}`, "wait"];
    case "tenant_conflict": return ["tenants", `shares its ${words(e.shared)} with ${e.owner}: ${words(e.action)}`, "bad"];
    case "oom_killed": return ["memory", `the kernel killed ${words(e.role)} at ${(e.memory_bytes / 2 ** 20).toFixed(0)} MiB`, "bad"];
    case "result_missing": return ["no result", words(e.cause), "bad"];
    case "exited": return ["end", `${words(e.reason)}${e.exit_code === undefined ? "" : `, exit code ${e.exit_code}`}${e.signal === undefined ? "" : `, signal ${e.signal}`}`, e.reason === "clean" ? "turn good" : "turn bad"];
    default: return [words(e.kind), "", ""];
  }
}

function entryItem(entry) {
  const [word, text, look, took = ""] = tell(entry);
  const at = new Date(entry.at * 1000);
  const clock = at.toLocaleTimeString("en-GB");
  return make("li", { class: look, value: entry.n },
    make("time", { dateTime: at.toISOString() }, clock), make("b", {}, word), make("span", {}, text), make("span", { class: "took" }, took));
}

const LANES = [
  ["turns", "turn", (e) => e.kind === "turn_ended"],
  ["model", "request", (e) => e.kind === "request"],
  ["tools", "tool", (e) => e.kind === "tool"],
  ["subagents", "agent", (e) => e.kind === "subagent_ended"],
  ["waits", "wait", (e) => ["permission", "retried", "compacted"].includes(e.kind)],
];

function drawChart(session, entries, ended) {
  const box = $("chart");
  const width = Math.max(260, box.clientWidth - 20);
  const [left, lane, height] = [74, 18, LANES.length * 18 + 22];
  const end = ended ? entries.at(-1)?.at ?? now() : now();
  const first = entries.length ? entries[0].at - (entries[0].seconds ?? 0) : session.started;
  const start = Math.max(end - CHART_S, Math.min(first, end - 10));
  const x = (at) => left + ((Math.max(start, Math.min(end, at)) - start) / (end - start)) * (width - left);
  const svg = document.createElementNS(SVG, "svg");
  const shape = (tag, props, text) => {
    const element = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(props)) element.setAttribute(name, value);
    if (text !== undefined) element.textContent = text;
    svg.append(element);
    return element;
  };
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  for (let tick = 0; tick <= 4; tick++) {
    const at = start + ((end - start) * tick) / 4;
    const place = x(at);
    shape("line", { x1: place, x2: place, y1: 0, y2: height - 18, class: "grid" });
    const anchor = tick === 4 ? "end" : tick === 0 ? "start" : "middle";
    shape("text", { x: place, y: height - 4, "text-anchor": anchor }, tick === 4 ? (ended ? "end" : "now") : `− ${duration(Math.max(1, Math.round(end - at)))}`);
  }
  const sums = [];
  let bad = 0;
  LANES.forEach(([name, look, belongs], at) => {
    const y = at * lane;
    shape("text", { x: 0, y: y + 12 }, name);
    const mine = entries.filter((entry) => belongs(entry) && entry.at >= start);
    const bars = mine.map((e) => [e.at - (e.seconds ?? 0), e.at + (e.kind === "retried" ? e.delay_seconds ?? 0 : 0), (e.kind === "tool" && e.outcome !== "ok") || (e.kind === "turn_ended" && e.outcome !== "success") ? "bad" : look]);
    if (!ended && name === "turns" && session.turn) bars.push([session.turn.since, end, look]);
    if (!ended && name === "tools" && session.tool) bars.push([session.tool.since, end, look]);
    for (const [from, to, colour] of bars) {
      bad += colour === "bad";
      shape("rect", { x: x(from), y: y + 3, width: Math.max(1.5, x(to) - x(from)), height: lane - 7, rx: 1.5, class: `b-${colour}` });
    }
    if (mine.length) sums.push(`${name} ${mine.length} (${duration(mine.reduce((sum, e) => sum + (e.seconds ?? e.delay_seconds ?? 0), 0))})`);
  });
  box.replaceChildren(svg);
  put($("chart-words"), `Last ${duration(Math.round(end - start))}: ${sums.length ? sums.join(", ") : "nothing ended yet"}.${bad ? ` Red: ${bad} failed or cut short.` : ""}`);
}

// ---- what is said aloud, in moderation

const saying = { waiting: [], timer: null };

function say(text) {
  saying.waiting.push(text);
  saying.timer ??= setTimeout(() => {
    const { waiting } = saying;
    put($("said"), waiting.length > 3 ? `${waiting.length} sessions changed. ${waiting.at(-1)}` : waiting.join(" "));
    Object.assign(saying, { waiting: [], timer: null });
  }, SAY_MS);
}

function sayChange(before, session) {
  const [word, look] = stateOf(session);
  if (!before) return say(`Session ${short(session)} began.`);
  if (stateOf(before)[0] !== word && (look === "wait" || look === "bad")) say(`Session ${short(session)}: ${word}.`);
}

// ---- the connection

function take({ now: at, whole, sessions, gone, totals }) {
  heard(at);
  const first = view.totals === null;
  const left = new Set(whole ? [...view.sessions.keys()].filter((key) => !sessions.some((s) => s.key === key)) : gone);
  for (const key of left) {
    const session = view.sessions.get(key);
    if (session) say(`Session ${short(session)} ended.`);
    view.sessions.delete(key);
  }
  for (const session of sessions) {
    if (!first) sayChange(view.sessions.get(session.key), session);
    view.sessions.set(session.key, session);
  }
  view.totals = totals;
  if (totals.cost_usd < (view.spent.at(-1)?.usd ?? 0)) view.spent = [];
  view.spent.push({ at, usd: totals.cost_usd });
  while (view.spent.length > 2 && (at - view.spent[1].at > RATE_S || view.spent.length > 5000)) view.spent.shift();
  draw();
}

function heard(at) {
  view.heard = Date.now() / 1000;
  view.skew = at - view.heard;
  if (!view.lost) return;
  view.lost = false;
  if (view.totals !== null) say("Connected again.");
  drawLink();
}

function drawLink() {
  document.body.classList.toggle("stale-page", view.lost && view.totals !== null);
  $("link").className = view.lost ? (view.heard ? "lost" : "") : "live";
  const ago = Math.round(Date.now() / 1000 - view.heard);
  put($("link-text"), !view.lost ? "live" : view.heard ? `connection lost, last data ${duration(Math.max(1, ago))} ago` : "connecting …");
}

const link = { source: null, retry: null };

function connect() {
  clearTimeout(link.retry);
  link.source?.close();
  const source = (link.source = new EventSource("events"));
  source.addEventListener("status", (event) => take(JSON.parse(event.data)));
  source.addEventListener("now", (event) => { heard(JSON.parse(event.data).now); draw(); });
  source.addEventListener("error", () => {
    lose();
    // It comes back by itself, but not from an answer that is no stream.
    if (source.readyState === EventSource.CLOSED) link.retry = setTimeout(connect, 2000);
  });
}

function lose() {
  if (!view.lost) { view.lost = true; say("Connection lost."); draw(); }
  drawLink();
}

setInterval(() => {
  if (document.hidden) return;
  if (!view.lost && Date.now() / 1000 - view.heard > SILENCE_S) { lose(); connect(); }
  if (view.lost) drawLink();
  else if (view.totals) draw();
}, 1000);

// A page that nobody sees asks for nothing.
document.addEventListener("visibilitychange", () => {
  if (document.hidden) { clearTimeout(link.retry); link.source?.close(); view.lost = true; drawLink(); } else connect();
});

// ---- hands

function move(step) {
  const rows = [...$("rows").children];
  if (!rows.length) return;
  const at = rows.findIndex((row) => row.dataset.key === view.current);
  const next = rows[Math.max(0, Math.min(rows.length - 1, step === Infinity ? rows.length - 1 : step === -Infinity ? 0 : at + step))];
  view.current = next.dataset.key;
  for (const row of rows) row.querySelector(".open").tabIndex = row === next ? 0 : -1;
  next.querySelector(".open").focus();
}

document.addEventListener("keydown", (event) => {
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  const typing = event.target === $("filter");
  if (event.key === "Escape") {
    if (typing && view.filter) { $("filter").value = view.filter = ""; draw(); } else if (view.open !== null) close();
  } else if (event.key === "/" && !typing) {
    event.preventDefault();
    $("filter").focus();
  } else if ($("rows").contains(event.target) || (typing && event.key === "ArrowDown")) {
    const step = { ArrowDown: 1, ArrowUp: -1, Home: -Infinity, End: Infinity }[event.key];
    if (step !== undefined) { event.preventDefault(); move(typing ? 0 : step); }
  }
});
$("filter").addEventListener("input", (event) => { view.filter = event.target.value.trim(); draw(); });
$("close").addEventListener("click", close);
addEventListener("resize", () => drawDetail());

makeHeads();
connect();
