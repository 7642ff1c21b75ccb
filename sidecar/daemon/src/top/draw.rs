//! What is shown: from what `/status` says to lines of text. No terminal, no clock.

use std::fmt::Write as _;

use serde_json::Value;

use super::source;
use super::terminal::Key;

/// Entries of a timeline that are kept to be scrolled through: as many as there ever are.
const ENTRIES: usize = agent_sidecar_core::timeline::ENTRIES;
const GAP: usize = 2;
/// Seconds without an answer, after which what is shown is not how things are.
const SILENCE: f64 = 10.0;
/// Circles that an agent may go round in: counted always, and worth a word when they are.
const CIRCLES: [&str; 6] = ["identical_call", "alternating", "error_repeat", "compaction_thrash", "fan_out", "no_progress"];

/// How something looks, beside what it says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Look {
    #[default]
    Plain,
    Soft,
    Good,
    Work,
    Wait,
    Bad,
}

impl Look {
    fn code(self) -> &'static str {
        match self {
            Look::Plain => "",
            Look::Soft => "\x1b[2m",
            Look::Good => "\x1b[32m",
            Look::Work => "\x1b[36m",
            Look::Wait => "\x1b[33m",
            Look::Bad => "\x1b[1;31m",
        }
    }
}

struct Cell {
    text: String,
    look: Look,
    /// What it is sorted by: a number, or the text.
    rank: Option<f64>,
}

fn cell(text: impl Into<String>) -> Cell {
    Cell { text: clean(&text.into()), look: Look::Plain, rank: None }
}

impl Cell {
    fn look(self, look: Look) -> Cell {
        Cell { look, ..self }
    }

    fn rank(self, rank: f64) -> Cell {
        Cell { rank: Some(rank), ..self }
    }
}

struct Column {
    head: &'static str,
    right: bool,
    /// Where there is no room, the highest goes first.
    dispensable: u8,
    /// How wide it may become on a screen.
    most: usize,
    cell: fn(&Value, f64) -> Cell,
}

/// Names are others': a long one is not to take the place of what is told beside it.
const NAMES: usize = 24;
const ANY: usize = usize::MAX;

const COLUMNS: [Column; 14] = [
    Column { head: "SESSION", right: false, dispensable: 0, most: ANY, cell: |s, _| cell(name(s)) },
    Column {
        head: "PID",
        right: true,
        dispensable: 7,
        most: ANY,
        cell: |s, _| cell(s["pid"].to_string()).rank(number(&s["pid"])),
    },
    Column { head: "FOR", right: false, dispensable: 6, most: NAMES, cell: |s, _| cell(dash(labels(s))) },
    Column { head: "STATE", right: false, dispensable: 0, most: ANY, cell: state },
    Column { head: "SINCE", right: true, dispensable: 2, most: ANY, cell: |s, now| since(&s["state_since"], now) },
    Column { head: "TURN", right: true, dispensable: 3, most: ANY, cell: turn },
    Column { head: "TOOL", right: false, dispensable: 1, most: NAMES, cell: tool },
    Column { head: "MODEL", right: false, dispensable: 8, most: ANY, cell: |s, _| cell(dash(model(s))) },
    Column { head: "CONTEXT", right: true, dispensable: 4, most: ANY, cell: context },
    Column { head: "IN", right: true, dispensable: 9, most: ANY, cell: |s, _| tokens(inputs(s)) },
    Column { head: "OUT", right: true, dispensable: 10, most: ANY, cell: |s, _| tokens(number(&s["tokens"]["output"])) },
    Column { head: "COST", right: true, dispensable: 0, most: ANY, cell: cost },
    Column { head: "LIMIT", right: false, dispensable: 5, most: ANY, cell: limit },
    Column { head: "UP", right: true, dispensable: 11, most: ANY, cell: |s, now| since(&s["started"], now) },
];

fn state(session: &Value, _: f64) -> Cell {
    if session["stale"] == true {
        return cell("silent").look(Look::Bad);
    }
    let (word, look) = match text(&session["state"]) {
        "permission" => ("asks permission", Look::Wait),
        "retry_backoff" => ("waits to retry", Look::Wait),
        "waiting_input" => ("waits for input", Look::Soft),
        "draining" => ("ending", Look::Soft),
        "stuck" => ("stuck", Look::Bad),
        "idle" => ("idle", Look::Soft),
        other => (other, Look::Work),
    };
    match text(&session["why"]) {
        why @ ("frozen" | "network_dead" | "uninterruptible" | "spinning" | "no_result" | "post_result") => {
            cell(words(why)).look(Look::Bad)
        }
        _ if session["refusing"] == true => cell("refuses").look(Look::Wait),
        _ => cell(word).look(look),
    }
}

fn turn(session: &Value, _: f64) -> Cell {
    match session["turn"]["number"].as_u64() {
        Some(turn) => cell(format!("{turn}/{}", session["turn"]["rounds"])).rank(turn as f64),
        None => cell(session["turns"].as_u64().map_or_else(|| String::from("-"), |turns| format!("{turns} done")))
            .rank(number(&session["turns"])),
    }
}

fn tool(session: &Value, now: f64) -> Cell {
    let mut told = String::new();
    if let Some(tool) = session["tool"]["name"].as_str() {
        told = format!("{tool} {}", age(&session["tool"]["since"], now));
    }
    if let Some(agents @ 1..) = session["subagents_active"].as_u64() {
        write!(told, "{}{agents} sub", if told.is_empty() { "" } else { " +" }).ok();
    }
    cell(dash(told))
}

fn context(session: &Value, _: f64) -> Cell {
    let context = &session["context"];
    match context["ratio"].as_f64() {
        Some(ratio) => cell(percent(ratio)).look(near(ratio)).rank(ratio),
        None => tokens(number(&context["tokens"])).rank(0.0),
    }
}

fn cost(session: &Value, _: f64) -> Cell {
    let usd = number(&session["cost_usd"]);
    let about = if session["cost_estimated"] == true { "~" } else { "" };
    cell(format!("{about}{}", money(usd))).rank(usd)
}

fn limit(session: &Value, _: f64) -> Cell {
    let told = session["limits"].as_array().into_iter().flatten();
    let told = told.filter(|l| !CIRCLES.contains(&text(&l["limit"])) || number(&l["ratio"]) >= 0.5);
    match told.max_by(|a, b| number(&a["ratio"]).total_cmp(&number(&b["ratio"]))) {
        Some(l) => {
            let ratio = number(&l["ratio"]);
            let limit = if text(&l["limit"]) == "usd" { "cost" } else { text(&l["limit"]) };
            cell(format!("{} {} {}", percent(ratio), words(limit), words(text(&l["scope"])))).look(near(ratio)).rank(ratio)
        }
        None => cell("-").rank(-1.0),
    }
}

fn tokens(n: f64) -> Cell {
    cell(count(n)).rank(n)
}

fn since(at: &Value, now: f64) -> Cell {
    cell(age(at, now)).rank(now - number(at))
}

/// The table as text, for whoever cannot watch it: every column, and nothing but text.
pub(super) fn plain(status: &Value, now: f64) -> String {
    let rows: Vec<Vec<Cell>> = sessions(status).map(|s| COLUMNS.iter().map(|column| (column.cell)(s, now)).collect()).collect();
    let shown: Vec<usize> = (0..COLUMNS.len()).collect();
    let widths = widths(&rows);
    let mut out = String::new();
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let line: Vec<String> = shown.iter().zip(cells).map(|(at, text)| pad(text, widths[*at], COLUMNS[*at].right)).collect();
        line.join("  ").trim_end().to_owned() + "\n"
    };
    out += &line(&mut COLUMNS.iter().map(|column| column.head));
    for row in &rows {
        out += &line(&mut row.iter().map(|cell| cell.text.as_str()));
    }
    out
}

pub(super) enum View {
    Table,
    /// A session, and how far its timeline is scrolled.
    Session {
        pid: u64,
        scroll: usize,
    },
}

/// See the module's head.
pub(super) struct Screen {
    pub(super) view: View,
    status: Value,
    heard: f64,
    lost: Option<String>,
    sort: usize,
    down: bool,
    selected: Option<u64>,
    /// Of the session that is open, or was last.
    timeline: (u64, Vec<Value>),
    colours: bool,
    /// As it was drawn last: how far a page is.
    page: usize,
}

impl Screen {
    pub(super) fn new(status: Value, now: f64, colours: bool) -> Screen {
        // Longest running first.
        let sort = COLUMNS.len() - 1;
        let timeline = (0, Vec::new());
        let view = View::Table;
        Screen { view, status, heard: now, lost: None, sort, down: true, selected: None, timeline, colours, page: 10 }
    }

    pub(super) fn take(&mut self, status: Value, now: f64) {
        self.status = status;
        self.heard = now;
        self.lost = None;
    }

    pub(super) fn lost(&mut self, error: &source::Error) {
        let cause = std::error::Error::source(error).map(ToString::to_string);
        self.lost = Some(cause.unwrap_or_else(|| error.to_string()));
    }

    pub(super) fn happened(&mut self, pid: u64, entries: Vec<Value>) {
        if self.timeline.0 != pid {
            self.timeline = (pid, Vec::new());
        }
        let told = &mut self.timeline.1;
        let last = told.last().map_or(0, |entry| number(&entry["n"]) as u64);
        told.extend(entries.into_iter().filter(|entry| number(&entry["n"]) as u64 > last));
        let more = told.len().saturating_sub(ENTRIES);
        told.drain(..more);
    }

    pub(super) fn press(&mut self, key: Key) {
        let page = self.page;
        match &mut self.view {
            View::Session { scroll, .. } => match key {
                Key::Back | Key::Enter => self.view = View::Table,
                Key::Up => *scroll = scroll.saturating_sub(1),
                Key::Down => *scroll += 1,
                Key::PageUp => *scroll = scroll.saturating_sub(page),
                Key::PageDown => *scroll += page,
                Key::Home => *scroll = 0,
                Key::End => *scroll = usize::MAX / 2,
                Key::Quit | Key::Sort | Key::Reverse => {}
            },
            View::Table => match key {
                Key::Enter => {
                    if let Some(pid) = self.selected {
                        self.view = View::Session { pid, scroll: 0 };
                    }
                }
                Key::Up => self.step(-1),
                Key::Down => self.step(1),
                Key::PageUp => self.step(-page.cast_signed()),
                Key::PageDown => self.step(page.cast_signed()),
                Key::Home => self.step(-1_000_000),
                Key::End => self.step(1_000_000),
                Key::Sort => {
                    self.sort = (self.sort + 1) % COLUMNS.len();
                    self.down = COLUMNS[self.sort].right;
                }
                Key::Reverse => self.down = !self.down,
                Key::Quit | Key::Back => {}
            },
        }
    }

    fn step(&mut self, by: isize) {
        let pids: Vec<u64> = self.sorted(self.heard).iter().filter_map(|(session, _)| session["pid"].as_u64()).collect();
        let at = self.selected.and_then(|selected| pids.iter().position(|pid| *pid == selected)).unwrap_or(0);
        let to = at.saturating_add_signed(by).min(pids.len().saturating_sub(1));
        self.selected = pids.get(to).copied();
    }

    fn sorted(&self, now: f64) -> Vec<(&Value, Vec<Cell>)> {
        let cells = |s| COLUMNS.iter().map(|column| (column.cell)(s, now)).collect::<Vec<Cell>>();
        let mut rows: Vec<(&Value, Vec<Cell>)> = sessions(&self.status).map(|s| (s, cells(s))).collect();
        rows.sort_by(|(a, x), (b, y)| {
            let (x, y) = (&x[self.sort], &y[self.sort]);
            let order = match (x.rank, y.rank) {
                (Some(x), Some(y)) => x.total_cmp(&y),
                _ => x.text.cmp(&y.text),
            };
            let order = if self.down { order.reverse() } else { order };
            order.then_with(|| number(&a["pid"]).total_cmp(&number(&b["pid"])))
        });
        rows
    }

    pub(super) fn lines(&mut self, (width, height): (usize, usize), now: f64) -> Vec<String> {
        if now - self.heard > SILENCE && self.lost.is_none() {
            self.lost = Some(String::from("no answer"));
        }
        // Where nobody answers, time stands still: what is shown is what was.
        let clock = if self.lost.is_some() { self.heard } else { now };
        let mut lines = vec![self.head(width, now)];
        let room = height.saturating_sub(2);
        match self.view {
            View::Table => lines.extend(self.table(width, room, clock)),
            View::Session { pid, scroll } => lines.extend(self.session(pid, scroll, width, room, clock)),
        }
        lines.truncate(height.saturating_sub(1));
        lines.resize(height.saturating_sub(1), String::new());
        let keys = match self.view {
            View::Table => "q quit  ↑↓ select  Enter timeline  s sort  r reverse",
            View::Session { .. } => "q quit  Esc back  ↑↓ scroll",
        };
        lines.push(self.paint(&clip(keys, width), Look::Soft));
        lines
    }

    fn head(&self, width: usize, now: f64) -> String {
        if let Some(lost) = &self.lost {
            let ago = duration((now - self.heard).max(1.0));
            return self.paint(&clip(&format!("connection lost, last data {ago} ago ({lost})"), width), Look::Bad);
        }
        let totals = &self.status["totals"];
        let about = if totals["cost_estimated"] == true { "~" } else { "" };
        let all = inputs(totals);
        let cached = if all > 0.0 { percent(number(&totals["tokens"]["cache_read"]) / all) } else { String::from("-") };
        let head = format!(
            "{} live   {about}{} in all   {} turns   {} in ({cached} cached)   {} out",
            sessions(&self.status).count(),
            money(number(&totals["cost_usd"])),
            count(number(&totals["turns"])),
            count(all),
            count(number(&totals["tokens"]["output"])),
        );
        format!("\x1b[1m{}", clip(&head, width))
    }

    fn table(&mut self, width: usize, room: usize, now: f64) -> Vec<String> {
        let rows = self.sorted(now);
        if rows.is_empty() {
            return vec![
                String::new(),
                clip("No agent runs here now. One that is started under the sidecar appears by itself:", width),
                clip("  agent-sidecar run -- claude -p \"…\" --output-format stream-json --verbose", width),
            ];
        }
        let cells: Vec<&Vec<Cell>> = rows.iter().map(|(_, cells)| cells).collect();
        let mut widths = widths_of(cells.iter().copied());
        for (width, column) in widths.iter_mut().zip(&COLUMNS) {
            *width = (*width).min(column.most);
        }
        let mut shown: Vec<usize> = (0..COLUMNS.len()).collect();
        while shown.iter().map(|at| widths[*at] + GAP).sum::<usize>() > width + GAP && shown.len() > 3 {
            let least = shown.iter().copied().filter(|at| *at != self.sort).max_by_key(|at| COLUMNS[*at].dispensable);
            shown.retain(|at| Some(*at) != least);
        }
        let head: Vec<String> = shown
            .iter()
            .map(|at| {
                let arrow = if *at == self.sort { if self.down { "↓" } else { "↑" } } else { "" };
                pad(&format!("{}{arrow}", COLUMNS[*at].head), widths[*at], COLUMNS[*at].right)
            })
            .collect();
        let mut lines = vec![self.paint(&clip(&head.join("  "), width), Look::Soft)];
        let selected = rows.iter().position(|(session, _)| session["pid"].as_u64() == self.selected).unwrap_or(0);
        let pid = rows[selected].0["pid"].as_u64();
        let page = room.saturating_sub(1).max(1);
        let first = (selected + 1).saturating_sub(page);
        for (at, (_, cells)) in rows.iter().enumerate().skip(first).take(page) {
            let mut line = String::new();
            let mut left = width;
            for (n, column) in shown.iter().enumerate() {
                let gap = if n == 0 { 0 } else { GAP };
                let text = shorten(&cells[*column].text, widths[*column]);
                let text = clip(&pad(&text, widths[*column], COLUMNS[*column].right), left.saturating_sub(gap));
                left = left.saturating_sub(gap + wide(&text));
                // Upside down, the whole line is of one look.
                let text = if at == selected { text } else { self.paint(&text, cells[*column].look) };
                line += &" ".repeat(gap);
                line += &text;
            }
            lines.push(if at == selected { format!("\x1b[7m{line}{}", " ".repeat(left)) } else { line });
        }
        drop(rows);
        (self.selected, self.page) = (pid, page);
        lines
    }

    fn session(&mut self, pid: u64, scroll: usize, width: usize, room: usize, now: f64) -> Vec<String> {
        let found = sessions(&self.status).find(|session| session["pid"].as_u64() == Some(pid));
        let mut lines = Vec::new();
        match found {
            Some(s) => {
                let id = s["session_id"].as_str().map_or_else(|| format!("pid {pid}"), str::to_owned);
                lines.push(format!("\x1b[1m{}", clip(&clean(&id), width)));
                let state = state(s, now);
                let facts = format!(
                    "{} for {}   turn {}   {}   {} in {} out   context {}   up {}",
                    state.text,
                    age(&s["state_since"], now),
                    turn(s, now).text,
                    cost(s, now).text,
                    count(inputs(s)),
                    count(number(&s["tokens"]["output"])),
                    context(s, now).text,
                    age(&s["started"], now),
                );
                lines.push(self.paint(&clip(&facts, width), state.look));
                let more = [dash(labels(s)), model(s), tool(s, now).text, limit(s, now).text];
                lines.push(clip(&clean(&more.join("   ")), width));
            }
            None => lines.push(self.paint(&clip(&format!("pid {pid} has ended"), width), Look::Soft)),
        }
        lines.push(String::new());
        let entries = if self.timeline.0 == pid { &self.timeline.1[..] } else { &[] };
        let page = room.saturating_sub(lines.len()).max(1);
        let scroll = scroll.min(entries.len().saturating_sub(page));
        if entries.is_empty() {
            lines.push(self.paint("nothing has happened yet", Look::Soft));
        }
        for entry in entries.iter().rev().skip(scroll).take(page) {
            let (word, told, took, look) = tell(entry);
            let ago = age(&entry["at"], now);
            let took = clean(&took);
            let room = width.saturating_sub(if took.is_empty() { 0 } else { wide(&took) + 2 });
            let line = clip(&format!("{}  {}  {}", pad(&ago, 9, true), pad(word, 10, false), clean(&told)), room);
            let line = format!("{line}{}", pad(&took, width.saturating_sub(wide(&line)), true));
            lines.push(self.paint(&clip(&line, width), look));
        }
        self.page = page;
        self.view = View::Session { pid, scroll };
        lines
    }

    fn paint(&self, text: &str, look: Look) -> String {
        if self.colours || look == Look::Soft { format!("{}{text}\x1b[0m", look.code()) } else { text.to_owned() }
    }
}

/// An entry of a timeline: a word, a sentence, what it took, and how it looks.
fn tell(e: &Value) -> (&'static str, String, String, Look) {
    let t = |key: &str| words(text(&e[key]));
    let took = e["seconds"].as_f64().map(duration).unwrap_or_default();
    let by = if e["source"] == "subagent" { " (subagent)" } else { "" };
    let usd = |key: &str| e[key].as_f64().map(money).unwrap_or_default();
    let both = |a: String, b: String| if b.is_empty() { a } else { format!("{a} {b}") };
    match text(&e["kind"]) {
        "session" => ("session", format!("began: {}", t("start")), String::new(), Look::Plain),
        "turn_started" => ("turn", format!("turn {} began", e["turn"]), String::new(), Look::Plain),
        "turn_ended" => {
            let look = if e["outcome"] == "success" { Look::Good } else { Look::Bad };
            ("turn", format!("turn {}: {}", e["turn"], t("outcome")), both(took, usd("cost_usd")), look)
        }
        "request" => {
            let told = format!("{}{by}: {} in", text(&e["model"]), count(number(&e["input"])));
            ("request", told, both(took, usd("cost_usd")), Look::Plain)
        }
        "tool" => {
            let look = if e["outcome"] == "ok" { Look::Plain } else { Look::Bad };
            ("tool", format!("{}{by}: {}", text(&e["tool"]), t("outcome")), took, look)
        }
        "permission" => ("permission", format!("{}: {}", text(&e["tool"]), t("decision")), took, Look::Wait),
        "subagent_started" => ("subagent", format!("{} began", text(&e["agent"])), String::new(), Look::Plain),
        "subagent_ended" => ("subagent", format!("{}: {}", text(&e["agent"]), t("outcome")), took, Look::Plain),
        "compacted" => {
            let told =
                format!("{}: {} to {} tokens", t("trigger"), count(number(&e["pre_tokens"])), count(number(&e["post_tokens"])));
            ("compaction", told, took, Look::Wait)
        }
        "retried" => ("retry", t("error"), e["delay_seconds"].as_f64().map(duration).unwrap_or_default(), Look::Wait),
        "request_failed" => ("failed", t("error"), String::new(), Look::Bad),
        "limit" => {
            let look = if number(&e["level"]) >= 1.0 { Look::Bad } else { Look::Wait };
            let share = if e["share"] == true { ", fair share" } else { "" };
            let told = format!("{} {}{share}: {} of {} ({})", t("limit"), t("scope"), e["observed"], e["ceiling"], t("mode"));
            ("limit", told, t("action"), look)
        }
        "loop" => ("detector", format!("{}, {} in a row", t("detector"), e["streak"]), t("action"), Look::Wait),
        "stalled" => {
            let (over, look) = if e["on"] == true { ("", Look::Bad) } else { (" is over", Look::Plain) };
            ("stall", format!("{}{over}", t("stall")), t("why"), look)
        }
        "stopping" => ("stop", t("action"), String::new(), Look::Wait),
        "stopped" => ("stop", format!("{} worked", t("action")), took, Look::Plain),
        "ordered" => {
            let told = if e["limit"].is_null() {
                t("order")
            } else {
                format!("{} {} {}: {}", t("order"), t("limit"), t("scope"), e["ceiling"])
            };
            ("asked", told, String::new(), Look::Wait)
        }
        "tenant_conflict" => {
            ("tenants", format!("shares its {} with {}: {}", t("shared"), t("owner"), t("action")), String::new(), Look::Bad)
        }
        "oom_killed" => ("memory", format!("the kernel killed {}", t("role")), String::new(), Look::Bad),
        "result_missing" => ("no result", t("cause"), String::new(), Look::Bad),
        "exited" => ("end", t("reason"), String::new(), Look::Plain),
        _ => ("", t("kind"), String::new(), Look::Plain),
    }
}

// ---- words and numbers

fn sessions(status: &Value) -> impl Iterator<Item = &Value> {
    status["sessions"].as_array().into_iter().flatten()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or(0.0)
}

fn words(text: &str) -> String {
    text.replace('_', " ")
}

fn dash(text: String) -> String {
    if text.is_empty() { String::from("-") } else { text }
}

fn name(session: &Value) -> String {
    match session["session_id"].as_str() {
        Some(id) => id.chars().take(8).collect(),
        None => format!("pid {}", session["pid"]),
    }
}

fn labels(session: &Value) -> String {
    let labels: Vec<&str> = ["tenant", "team", "cost_center", "user"].iter().filter_map(|name| session[*name].as_str()).collect();
    labels.join("/")
}

fn model(session: &Value) -> String {
    text(&session["model"]).trim_start_matches("claude-").to_owned()
}

fn inputs(sums: &Value) -> f64 {
    ["input", "cache_read", "cache_write_5m", "cache_write_1h"].iter().map(|kind| number(&sums["tokens"][*kind])).sum()
}

fn near(ratio: f64) -> Look {
    match ratio {
        1.0.. => Look::Bad,
        0.8.. => Look::Wait,
        _ => Look::Plain,
    }
}

fn money(usd: f64) -> String {
    let digits = match usd {
        0.0 => return String::from("$0"),
        1.0.. => 2,
        0.01.. => 4,
        _ => 6,
    };
    format!("${usd:.digits$}")
}

fn count(n: f64) -> String {
    match n {
        1e9.. => format!("{:.2}G", n / 1e9),
        1e6.. => format!("{:.2}M", n / 1e6),
        1e4.. => format!("{:.1}k", n / 1e3),
        _ => format!("{n}"),
    }
}

fn percent(ratio: f64) -> String {
    if ratio < 0.1 { format!("{:.1}%", ratio * 100.0) } else { format!("{:.0}%", ratio * 100.0) }
}

fn duration(seconds: f64) -> String {
    let whole = std::time::Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or_default();
    let s = whole.as_secs();
    match s {
        0 => format!("{}ms", whole.as_millis()),
        1..10 => format!("{seconds:.1}s"),
        10..60 => format!("{s}s"),
        60..3_600 => format!("{}m{:02}s", s / 60, s % 60),
        3_600..86_400 => format!("{}h{:02}m", s / 3_600, s % 3_600 / 60),
        _ => format!("{}d{:02}h", s / 86_400, s % 86_400 / 3_600),
    }
}

/// Of something that goes on: no digits that change faster than one can read.
fn age(at: &Value, now: f64) -> String {
    match at.as_f64() {
        Some(at) => duration((now - at).max(0.0).floor()).replace("0ms", "0s").replace(".0s", "s"),
        None => String::from("-"),
    }
}

// ---- columns of text

fn widths(rows: &[Vec<Cell>]) -> Vec<usize> {
    widths_of(rows.iter())
}

fn widths_of<'a>(rows: impl Iterator<Item = &'a Vec<Cell>>) -> Vec<usize> {
    // Room for the arrow that says what is sorted by.
    let mut widths: Vec<usize> = COLUMNS.iter().map(|column| column.head.len() + 1).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(wide(&cell.text));
        }
    }
    widths
}

/// Names are others': none of them moves the cursor, or hides a part of the line.
fn clean(text: &str) -> String {
    let bad = |c: char| {
        c.is_control() || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
    };
    let short: String = text.chars().map(|c| if bad(c) { '·' } else { c }).take(96).collect();
    if text.chars().count() > 96 { short + "…" } else { short }
}

/// Columns of a terminal.
fn wide(text: &str) -> usize {
    text.chars().map(columns).sum()
}

fn columns(c: char) -> usize {
    match u32::from(c) {
        0x0300..=0x036f => 0,
        0x1100..=0x115f | 0x2e80..=0xa4cf | 0xac00..=0xd7a3 | 0xf900..=0xfaff | 0xfe30..=0xfe6f => 2,
        0xff00..=0xff60 | 0xffe0..=0xffe6 | 0x1f300..=0x1faff | 0x20000..=0x3fffd => 2,
        _ => 1,
    }
}

fn clip(text: &str, width: usize) -> String {
    let mut left = width;
    let fits = |c: &char| {
        let fits = columns(*c) <= left;
        left = left.saturating_sub(columns(*c));
        fits
    };
    text.chars().take_while(fits).collect()
}

/// Its middle goes: who it is stands in front, and since when at the end.
fn shorten(text: &str, width: usize) -> String {
    if wide(text) <= width {
        return text.to_owned();
    }
    let room = width.saturating_sub(1);
    let mut end: Vec<char> = Vec::new();
    let mut left = room / 2;
    for c in text.chars().rev() {
        let Some(rest) = left.checked_sub(columns(c)) else { break };
        left = rest;
        end.push(c);
    }
    let start = clip(text, room - room / 2);
    start + "…" + &end.into_iter().rev().collect::<String>()
}

fn pad(text: &str, width: usize, right: bool) -> String {
    let space = " ".repeat(width.saturating_sub(wide(text)));
    if right { space + text } else { text.to_owned() + &space }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn status() -> Value {
        json!({
            "sessions": [
                {"session_id": "11111111-aaaa", "pid": 10, "tenant": "acme", "state": "tool", "state_since": 990.0, "started": 100.0,
                 "model": "claude-opus-5-5", "turn": {"number": 3, "rounds": 2}, "tool": {"name": "Bash", "since": 960.0},
                 "context": {"tokens": 1000, "window": 200_000, "ratio": 0.005}, "cost_usd": 0.4211,
                 "tokens": {"input": 10, "output": 700, "cache_read": 64_000, "cache_write_5m": 0, "cache_write_1h": 0},
                 "limits": [{"limit": "usd", "scope": "session", "ratio": 0.84}, {"limit": "fan_out", "scope": "turn", "ratio": 0.01}]},
                {"session_id": null, "pid": 9, "state": "idle", "state_since": 1000.0, "started": 900.0, "turns": 1,
                 "tool": {"name": "\u{1b}[2J名前", "since": 1000.0}, "cost_usd": 1.5, "cost_estimated": true, "limits": []},
            ],
            "totals": {"turns": 4, "cost_usd": 1.9211, "tokens": {}},
        })
    }

    #[test]
    fn the_plain_table_is_plain() {
        assert_eq!(
            plain(&status(), 1000.0),
            "\
SESSION    PID  FOR   STATE    SINCE    TURN  TOOL         MODEL      CONTEXT     IN   OUT     COST  LIMIT                 UP
11111111    10  acme  tool       10s     3/2  Bash 40s     opus-5-5      0.5%  64.0k   700  $0.4211  84% cost session  15m00s
pid 9        9  -     idle        0s  1 done  ·[2J名前 0s  -                0      0     0   ~$1.50  -                  1m40s
"
        );
    }

    fn text_of(lines: &[String]) -> String {
        let mut out = String::new();
        let mut escaped = false;
        for c in lines.join("\n").chars() {
            match c {
                '\u{1b}' => escaped = true,
                'A'..='z' if escaped && c != '[' => escaped = false,
                _ if escaped => {}
                _ => out.push(c),
            }
        }
        out
    }

    #[test]
    fn long_names_leave_room_for_the_rest_and_keep_their_ends() {
        let mut status = status();
        status["sessions"][0]["tool"]["name"] = json!("mcp__a_server_with_a_long_name__do_something_quite_long");
        status["sessions"][0]["tenant"] = json!("a tenant that has a rather long name");
        let mut screen = Screen::new(status, 1000.0, true);
        let shown = text_of(&screen.lines((160, 10), 1000.0));
        assert!(shown.contains("  mcp__a_serve…te_long 40s  "), "{shown}");
        assert!(shown.contains("  a tenant tha…r long name  "), "{shown}");
        for head in COLUMNS.map(|column| column.head) {
            assert!(shown.contains(head), "{head} has its place: {shown}");
        }
        screen.press(Key::Enter);
        let conflict = json!({"n": 1, "at": 995.0, "kind": "tenant_conflict", "shared": "config_dir", "owner": "globex", "action": "flagged"});
        screen.happened(10, vec![conflict]);
        let shown = text_of(&screen.lines((80, 24), 1000.0));
        assert!(shown.contains("shares its config dir with globex: flagged"), "{shown}");
    }

    #[test]
    fn keys_move_sort_and_open_and_every_size_is_filled() {
        let mut screen = Screen::new(status(), 1000.0, true);
        for (width, height) in [(200, 50), (80, 24), (40, 5), (10, 3), (1, 1)] {
            let lines = screen.lines((width, height), 1000.0);
            assert_eq!(lines.len(), height);
            for line in text_of(&lines).lines() {
                assert!(wide(line) <= width, "{width}: {line}");
            }
        }
        let first = |screen: &mut Screen| text_of(&screen.lines((160, 10), 1000.0)).lines().nth(2).unwrap()[..8].to_owned();
        assert_eq!(first(&mut screen), "11111111");
        screen.press(Key::Reverse);
        assert_eq!(first(&mut screen), "pid 9   ");
        screen.press(Key::Sort);
        assert_eq!(first(&mut screen), "11111111", "by name");
        screen.press(Key::Home);
        screen.press(Key::Enter);
        screen.happened(10, vec![json!({"n": 1, "at": 995.0, "kind": "tool", "tool": "Read", "outcome": "ok", "seconds": 0.25})]);
        let shown = text_of(&screen.lines((100, 20), 1000.0));
        assert!(
            shown.contains("11111111-aaaa") && shown.contains("5s  tool        Read: ok") && shown.contains("250ms"),
            "{shown}"
        );
        screen.press(Key::Back);
        screen.lost(&source::Error::Other { asked: String::from("there") });
        assert!(text_of(&screen.lines((100, 20), 1012.0)).starts_with("connection lost, last data 12s ago"), "it is said");
    }
}
