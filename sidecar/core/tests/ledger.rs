//! The ledger against a small model of the CLI: whatever turns, clears, resumes, forks, subagents, duplicates, polls, cuts and kills
//! follow each other, the increments add up to what was spent.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::collections::BTreeMap;
use std::time::Duration;

use agent_sidecar_core::event::Usage;
use agent_sidecar_core::metric::{self, Cell, Kind};
use agent_sidecar_core::price::PriceTable;
use agent_sidecar_core::record::Record;
use agent_sidecar_core::report::Report;
use agent_sidecar_core::tokens::{Tokens, Usd};
use agent_sidecar_core::update::Start;
use agent_sidecar_core::{Exit, Input, Monitor, Now, Output, Settings};
use proptest::prelude::*;
use serde_json::{Value, json};

const DAY: Duration = Duration::from_secs(1_795_392_000);
const MODELS: [&str; 3] = ["claude-opus-5-5", "claude-sonnet-5-5", "claude-opus-4-8[1m]"];

#[derive(Clone, Debug)]
struct Call {
    model: usize,
    tokens: [u64; 5],
    /// The app, or we, ask for the totals after it.
    poll: bool,
    /// Its lines come twice.
    twice: bool,
}

/// How often a result arrives.
#[derive(Clone, Copy, Debug)]
enum Told {
    Once,
    Twice,
    Lost,
}

#[derive(Clone, Debug)]
enum Op {
    /// Answers of the main loop, of a subagent in the foreground, and calls that the stream does not show.
    Turn {
        main: Vec<Call>,
        sub: Vec<Call>,
        unseen: Vec<Call>,
        told: Told,
    },
    /// A background subagent whose calls fall on both sides of a result.
    Background {
        before: Vec<Call>,
        after: Vec<Call>,
    },
    /// Money after a result, seen by a question.
    Suggestion(Call),
    Clear,
    LocalCommand,
    /// A clean end, then the same session again, or a fork of it.
    Resume {
        fork: bool,
    },
    /// Killed with answers that no result will ever confirm, then resumed.
    Kill(Vec<Call>),
}

fn call() -> impl Strategy<Value = Call> {
    (0..MODELS.len(), [0..5_000u64, 1..3_000, 0..90_000, 0..9_000, 0..900], any::<bool>(), any::<bool>())
        .prop_map(|(model, tokens, poll, twice)| Call { model, tokens, poll, twice })
}

fn calls(max: usize) -> impl Strategy<Value = Vec<Call>> {
    proptest::collection::vec(call(), 0..max)
}

fn told() -> impl Strategy<Value = Told> {
    prop_oneof![4 => Just(Told::Once), 1 => Just(Told::Twice), 1 => Just(Told::Lost)]
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (proptest::collection::vec(call(), 1..4), calls(3), calls(2), told())
            .prop_map(|(main, sub, unseen, told)| Op::Turn { main, sub, unseen, told }),
        1 => (calls(3), calls(3)).prop_map(|(before, after)| Op::Background { before, after }),
        1 => call().prop_map(Op::Suggestion),
        1 => Just(Op::Clear),
        1 => Just(Op::LocalCommand),
        2 => any::<bool>().prop_map(|fork| Op::Resume { fork }),
        1 => proptest::collection::vec(call(), 1..3).prop_map(Op::Kill),
    ]
}

#[derive(Clone, Default)]
struct Total {
    tokens: Tokens,
    usd: f64,
}

/// A CLI as the real ones behave, with the truth beside it.
struct Cli {
    old: bool,
    partial: bool,
    lines: Vec<String>,
    ids: u64,
    session: u64,
    pid: u64,
    index: u64,
    api_ms: u64,
    totals: BTreeMap<usize, Total>,
    since: BTreeMap<usize, Total>,
    saved: BTreeMap<usize, Total>,
    spent: Tokens,
    paid: Usd,
}

impl Cli {
    fn say(&mut self, mut line: Value) {
        if line["session_id"].is_null() && line["type"] != "control_response" {
            line["session_id"] = json!(format!("session-{}", self.session));
        }
        self.lines.push(line.to_string());
    }

    fn init(&mut self) {
        let version = if self.old { "2.1.197" } else { "2.1.330" };
        let mut init = json!({"type": "system", "subtype": "init", "claude_code_version": version});
        if !self.old {
            init["messaging_socket_path"] = json!(format!("/tmp/cc-socks/{}.sock", self.pid));
        }
        self.say(init);
    }

    /// The API served it and the CLI booked it.
    fn book(&mut self, call: &Call) {
        let tokens = Tokens::from_kinds(call.tokens);
        let usage = Usage { tokens, ..Usage::default() };
        let usd = PriceTable::default().answer(MODELS[call.model], DAY, &usage).unwrap();
        self.spent += tokens;
        self.paid += usd;
        for totals in [&mut self.totals, &mut self.since] {
            let total = totals.entry(call.model).or_default();
            total.tokens += tokens;
            total.usd += usd.to_f64();
        }
    }

    /// The stream does not show it. What it wrote for an hour nobody could tell of an older CLI.
    fn unseen(&mut self, call: &Call) {
        let mut call = call.clone();
        if self.old {
            call.tokens[4] = 0;
        }
        self.book(&call);
    }

    fn answer(&mut self, call: &Call, parent: Option<&str>) {
        self.ids += 1;
        let id = format!("msg_{}", self.ids);
        let [input, output, read, w5, w1] = call.tokens;
        let usage = |output: u64| {
            json!({"input_tokens": input, "output_tokens": output, "cache_read_input_tokens": read,
                "cache_creation_input_tokens": w5 + w1,
                "cache_creation": {"ephemeral_5m_input_tokens": w5, "ephemeral_1h_input_tokens": w1}})
        };
        let message =
            json!({"id": id, "model": MODELS[call.model], "usage": usage(1), "content": [{"type": "text", "text": "x"}]});
        let times = if call.twice { 2 } else { 1 };
        let streamed = self.partial && parent.is_none();
        if streamed {
            self.say(json!({"type": "stream_event", "event": {"type": "message_start", "message": message}}));
        }
        for _ in 0..times {
            self.say(json!({"type": "assistant", "message": message, "parent_tool_use_id": parent}));
        }
        self.book(call);
        if streamed {
            self.say(json!({"type": "stream_event", "event": {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": usage(output)}}));
            self.say(json!({"type": "stream_event", "event": {"type": "message_stop"}}));
            if call.twice {
                self.say(json!({"type": "assistant", "message": message, "parent_tool_use_id": parent}));
            }
        }
        if call.poll {
            self.usage();
        }
    }

    fn table(&self, totals: &BTreeMap<usize, Total>) -> Value {
        let rows = totals.iter().map(|(model, total)| {
            let t = total.tokens;
            let mut row = json!({"inputTokens": t.input, "outputTokens": t.output, "cacheReadInputTokens": t.cache_read,
                "cacheCreationInputTokens": t.cache_write_5m + t.cache_write_1h,
                "cacheCreationEphemeral5mInputTokens": t.cache_write_5m,
                "cacheCreationEphemeral1hInputTokens": t.cache_write_1h, "costUSD": total.usd, "webSearchRequests": 0});
            if self.old {
                // Only its answers tell how long what they wrote is kept.
                row.as_object_mut().unwrap().retain(|key, _| !key.contains("Ephemeral"));
            }
            (MODELS[*model].to_owned(), row)
        });
        Value::Object(rows.collect())
    }

    fn usage(&mut self) {
        let table = self.table(&self.totals);
        self.say(json!({"type": "control_response", "response": {"subtype": "success", "request_id": "q",
            "response": {"session": {"total_cost_usd": 0, "model_usage": table}}}}));
    }

    fn result(&mut self, command: bool, told: Told) {
        self.api_ms += 10;
        let mut result = json!({"type": "result", "subtype": "success", "is_error": false, "terminal_reason": "completed",
            "num_turns": 1, "duration_api_ms": if command { 0 } else { self.api_ms }, "modelUsage": self.table(&self.totals)});
        if !self.old {
            result["model_usage_since_last_result"] = self.table(&self.since);
            result["result_index"] = json!(self.index);
        }
        result["uuid"] = json!(format!("result-{}-{}", self.pid, self.index));
        self.index += 1;
        self.since.clear();
        match told {
            Told::Once => self.say(result),
            Told::Twice => {
                self.say(result.clone());
                self.say(result);
            }
            // The next one still tells of it.
            Told::Lost => {
                self.init();
                self.result(true, Told::Once);
            }
        }
    }

    /// Another process; what it starts with depends on its version and on how the one before ended.
    fn process(&mut self, fork: bool, graceful: bool) {
        if graceful {
            self.saved = self.totals.clone();
        }
        self.totals = if self.old { BTreeMap::new() } else { self.saved.clone() };
        self.since.clear();
        self.index = 0;
        self.api_ms = 0;
        self.pid += 1;
        if fork {
            self.session += 1;
        }
        self.lines.push(String::from("PROCESS"));
        // Before the first turn the totals tell where it begins.
        self.usage();
    }

    fn run(&mut self, op: &Op) {
        match op {
            Op::Turn { main, sub, unseen, told } => {
                self.init();
                for call in main {
                    self.answer(call, None);
                }
                for call in sub {
                    self.answer(call, Some("toolu_sub"));
                }
                for call in unseen {
                    self.unseen(call);
                }
                self.result(false, *told);
            }
            Op::Background { before, after } => {
                self.init();
                self.say(json!({"type": "system", "subtype": "task_started", "task_id": "t", "tool_use_id": "toolu_bg",
                    "task_type": "local_agent", "is_backgrounded": true, "subagent_type": "general-purpose"}));
                for call in before {
                    self.answer(call, Some("toolu_bg"));
                }
                self.result(false, Told::Once);
                for call in after {
                    self.answer(call, Some("toolu_bg"));
                }
                self.say(json!({"type": "system", "subtype": "task_notification", "task_id": "t", "status": "completed"}));
                self.init();
                self.result(false, Told::Once);
                // Held back results come twice in the same moment; the second has nothing new.
                self.result(false, Told::Once);
            }
            Op::Suggestion(call) => {
                self.unseen(call);
                self.usage();
            }
            Op::Clear => {
                self.say(json!({"type": "conversation_reset"}));
                self.session += 1;
                self.totals.clear();
                self.since.clear();
                self.init();
                self.result(true, Told::Once);
            }
            Op::LocalCommand => {
                self.init();
                self.result(true, Told::Once);
            }
            Op::Resume { fork } => self.process(*fork, true),
            Op::Kill(calls) => {
                self.init();
                for call in calls {
                    self.answer(call, None);
                }
                self.process(false, false);
            }
        }
    }
}

fn records(monitor: &mut Monitor, into: &mut Vec<Record>) {
    while let Some(output) = monitor.poll_output() {
        if let Output::Record(record) = output {
            into.push(record);
        }
    }
}

fn counter(monitor: &Monitor, metric: &'static metric::Metric) -> u64 {
    let family = monitor.meters().families().find(|family| std::ptr::eq(family.metric, metric)).unwrap();
    family
        .series()
        .map(|series| match &series.cell {
            Cell::Count(n) => *n,
            Cell::Usd(usd) => usd.pico(),
            other => panic!("{other:?}"),
        })
        .sum()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1_000, ..ProptestConfig::default() })]

    #[test]
    fn increments_add_up_to_what_was_spent(old in any::<bool>(), ops in proptest::collection::vec(op(), 1..12)) {
        // Answers that nobody confirms are known to the token only where the stream tells their final usage.
        let kills = ops.iter().any(|op| matches!(op, Op::Kill(_)));
        let mut cli = Cli {
            old, partial: true, lines: Vec::new(), ids: 0, session: 1, pid: 100, index: 0, api_ms: 0,
            totals: BTreeMap::new(), since: BTreeMap::new(), saved: BTreeMap::new(), spent: Tokens::default(), paid: Usd::ZERO,
        };
        for op in &ops {
            cli.run(op);
        }
        let now = Now { mono: Duration::ZERO, unix: DAY };
        let settings = Settings { start: Start::Fresh, ..Settings::default() };
        let mut monitor = Monitor::new(settings, false, now);
        let mut written = Vec::new();
        let mut last = (0, 0);
        monitor.handle(now, Input::Spawned { pid: 1 });
        for line in &cli.lines {
            match line.as_str() {
                "PROCESS" => monitor.handle(now, Input::Spawned { pid: 1 }),
                line => monitor.handle(now, Input::Stdout(format!("{line}\n").as_bytes())),
            }
            records(&mut monitor, &mut written);
            let counters = (counter(&monitor, &metric::COST), counter(&monitor, &metric::TOKENS));
            prop_assert!(counters.0 >= last.0 && counters.1 >= last.1, "a counter fell");
            last = counters;
        }
        monitor.handle(now, Input::Exited(Exit::Code(0)));
        records(&mut monitor, &mut written);

        let totals = monitor.report().totals();
        prop_assert_eq!(totals.tokens, cli.spent);
        prop_assert_eq!(totals.cost_usd, cli.paid);
        prop_assert!(kills || !totals.cost_estimated, "all of it was confirmed");
        // The exposition, the ledger file and the report are one and the same.
        prop_assert_eq!(counter(&monitor, &metric::COST), totals.cost_usd.pico() + counter(&monitor, &metric::COST_RECONCILIATION_ERROR));
        prop_assert_eq!(metric::COST.kind, Kind::Counter);
        let mut again = Report::default();
        for (i, record) in written.iter().enumerate() {
            let line = serde_json::to_string(record).unwrap();
            let read: Record = serde_json::from_str(&line).unwrap();
            prop_assert_eq!(read.seq, i as u64);
            if let Some(update) = read.fact.to_update() {
                again.on(&update);
            }
        }
        prop_assert_eq!(again.totals().cost_usd, totals.cost_usd);
        prop_assert_eq!(again.totals().tokens, totals.tokens);
        prop_assert_eq!(again.totals().turns, totals.turns);
    }

    #[test]
    fn no_bytes_at_all_break_it(bytes in proptest::collection::vec(any::<u8>(), 0..400), garbled in proptest::collection::vec(0usize..100_000, 0..20)) {
        let now = Now { mono: Duration::ZERO, unix: DAY };
        let mut monitor = Monitor::new(Settings::default(), false, now);
        monitor.handle(now, Input::Spawned { pid: 1 });
        monitor.handle(now, Input::Stdin(&bytes));
        monitor.handle(now, Input::Stdout(&bytes));
        // A real session with bytes turned over.
        let mut real = std::fs::read([env!("CARGO_MANIFEST_DIR"), "tests/data/03d_compact_clear.jsonl"].join("/")).unwrap();
        for at in garbled {
            let at = at % real.len();
            real[at] ^= 0x15;
        }
        monitor.handle(now, Input::Stdout(&real));
        monitor.handle(now, Input::StdoutEnd);
        monitor.handle(now, Input::Exited(Exit::Signal(9)));
    }
}
