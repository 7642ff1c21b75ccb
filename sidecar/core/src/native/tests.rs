use proptest::prelude::*;

use super::*;
use crate::launch::Launch;
use crate::limit::{Ceiling, Limit, Mode, Rule, Scope};
use crate::monitor::{Action, Exit, Input, Monitor, Now, Output, Settings, Signal};

fn attributes(all: &[(&str, &str)]) -> Attributes {
    all.iter().map(|(key, value)| ((*key).to_owned(), Value::Text((*value).to_owned()))).collect()
}

fn tokens(kind: &str, start: u64, end: u64, n: f64) -> Point {
    let attributes =
        attributes(&[("session.id", "s"), ("model", "claude-opus-4-8[1m]"), ("query_source", "main"), ("type", kind)]);
    Point::of("claude_code.token.usage", &attributes, span(start, end, false), n).unwrap()
}

fn cost(session: &str, source: &str, start: u64, end: u64, usd: f64) -> Point {
    let attributes = attributes(&[("session.id", session), ("model", "claude-opus-4-8"), ("query_source", source)]);
    Point::of("claude_code.cost.usage", &attributes, span(start, end, false), usd).unwrap()
}

fn span(start: u64, end: u64, cumulative: bool) -> Span {
    Span { start: Duration::from_millis(start), end: Duration::from_millis(end), cumulative }
}

fn event(name: &str, sequence: i64, more: &[(&str, Value)]) -> Event {
    let common = [("session.id", Value::Text("s".into())), ("event.sequence", Value::Int(sequence))];
    let attributes = common.iter().chain(more).map(|(key, value)| ((*key).to_owned(), value.clone())).collect();
    Event::of(name, &attributes, Duration::from_secs(1)).unwrap()
}

fn answer(sequence: i64, five: i64, hour: i64) -> Event {
    let text = |text: &str| Value::Text(text.to_owned());
    let more = [
        ("model", text("claude-opus-4-8")),
        ("query_source", text("sdk")),
        ("cache_creation_5m_tokens", Value::Int(five)),
        ("cache_creation_1h_tokens", Value::Int(hour)),
        ("duration_ms", text("1500")),
    ];
    event("claude_code.api_request", sequence, &more)
}

fn points(points: &[Point]) -> Report {
    Report { points: points.to_vec(), events: vec![] }
}

fn events(events: &[Event]) -> Report {
    Report { points: vec![], events: events.to_vec() }
}

/// All that a book says of these, in this order.
fn total(reports: &[Report]) -> (Tokens, Usd) {
    let mut book = Book::default();
    let mut all: Vec<Increment> = reports.iter().flat_map(|report| book.take(report).0).collect();
    all.extend(book.close());
    (all.iter().map(|new| new.tokens).sum(), all.iter().map(|new| new.usd).sum())
}

#[test]
fn what_is_no_money_is_no_point() {
    let session = attributes(&[("session.id", "s"), ("type", "added")]);
    assert_eq!(Point::of("claude_code.lines_of_code.count", &session, span(0, 1, false), 9.0), None);
    assert_eq!(Point::of("claude_code.token.usage", &session, span(0, 1, false), 9.0), None);
    let nonsense = cost("s", "main", 0, 1, f64::NAN);
    assert_eq!(nonsense.amount, Amount::Cost(0));
    assert_eq!(cost("s", "main", 0, 1, -5.0).amount, Amount::Cost(0));
}

#[test]
fn a_repetition_counts_once_and_the_next_export_counts() {
    let first = points(&[cost("s", "main", 10, 20, 0.5), tokens("input", 10, 20, 7.0)]);
    let next = points(&[cost("s", "main", 20, 30, 0.25)]);
    let expected = (Tokens { input: 7, ..Tokens::default() }, Usd::from_f64(0.75));
    assert_eq!(total(&[first.clone(), first.clone(), next.clone(), first.clone()]), expected);
    assert_eq!(total(&[next, first]), expected, "a repetition may be late");
}

#[test]
fn whoever_spends_at_the_same_time_spends_too() {
    let both = points(&[cost("s", "main", 10, 20, 0.5), cost("s", "subagent", 10, 20, 0.5), cost("t", "main", 10, 20, 0.5)]);
    assert_eq!(total(&[both]).1, Usd::from_f64(1.5));
}

#[test]
fn cache_writes_wait_for_who_tells_them_apart() {
    let mut book = Book::default();
    assert_eq!(book.take(&points(&[tokens("cacheCreation", 0, 1, 790.0)])).0, []);
    let (told, _) = book.take(&events(&[answer(0, 700, 90)])).clone();
    assert_eq!(told[0].tokens, Tokens { cache_write_5m: 700, cache_write_1h: 90, ..Tokens::default() });
    assert_eq!(book.close(), []);
    // Told first, and never told.
    book.take(&events(&[answer(1, 0, 5)]));
    let (counted, _) = book.take(&points(&[tokens("cacheCreation", 1, 2, 8.0)]));
    assert_eq!(counted[0].tokens, Tokens { cache_write_1h: 5, ..Tokens::default() });
    assert_eq!(book.close()[0].tokens, Tokens { cache_write_5m: 3, ..Tokens::default() });
}

#[test]
fn an_event_happens_once() {
    let mut book = Book::default();
    let report = events(&[event("user_prompt", 0, &[]), answer(1, 0, 0)]);
    assert_eq!(book.take(&report).1.len(), 2);
    assert_eq!(book.take(&report).1.len(), 0);
}

#[test]
fn nobody_can_make_it_overflow() {
    let much: Vec<Point> = (0..5).map(|n| tokens("cacheCreation", n, n + 1, f64::MAX)).collect();
    let more: Vec<Point> = (0..5).map(|n| cost("s", "main", n, n + 1, f64::MAX)).collect();
    let told: Vec<Event> = (0..5).map(|n| answer(n, i64::MAX, i64::MAX)).collect();
    let (tokens, usd) = total(&[points(&much), points(&more), events(&told)]);
    assert_eq!((tokens.total(), usd.pico()), (u64::MAX, u64::MAX));
}

/// A CLI whose calls are exported in batches.
#[derive(Clone, Debug)]
struct Exported {
    /// Tokens of each batch, by source.
    batches: Vec<[u32; 3]>,
    cumulative: bool,
}

const SOURCES: [&str; 3] = ["main", "subagent", "auxiliary"];

impl Exported {
    /// What each export says, running totals beginning anew at each `reset`.
    fn reports(&self, reset: usize) -> Vec<Report> {
        let mut sums = [0u64; 3];
        let mut began = 0;
        let mut reports = Vec::new();
        for (n, batch) in self.batches.iter().enumerate() {
            let n = n as u64;
            if reset > 0 && n > 0 && n.is_multiple_of(reset as u64) {
                (sums, began) = ([0; 3], n);
            }
            let mut report = Report::default();
            for (source, (tokens, sum)) in SOURCES.iter().zip(batch.iter().zip(&mut sums)) {
                *sum += u64::from(*tokens);
                let (start, value) = if self.cumulative { (began, *sum) } else { (n, u64::from(*tokens)) };
                let attributes = attributes(&[("session.id", "s"), ("model", "m"), ("query_source", source), ("type", "input")]);
                let span = span(start, n + 1, self.cumulative);
                report.points.extend(Point::of("claude_code.token.usage", &attributes, span, value as f64));
            }
            reports.push(report);
        }
        reports
    }

    fn sum(&self) -> u64 {
        self.batches.iter().flatten().map(|n| u64::from(*n)).sum()
    }
}

fn exported() -> impl Strategy<Value = Exported> {
    (proptest::collection::vec(any::<[u32; 3]>(), 1..12), any::<bool>())
        .prop_map(|(batches, cumulative)| Exported { batches, cumulative })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever is repeated and however late: everything that arrives at all counts once.
    #[test]
    fn each_export_counts_once_in_any_order(cli in exported(), reset in 0..4usize, picks in proptest::collection::vec(any::<prop::sample::Index>(), 0..30)) {
        let reports = cli.reports(reset);
        let mut order: Vec<Report> = picks.iter().map(|pick| pick.get(&reports).clone()).collect();
        order.extend(reports.iter().rev().cloned());
        prop_assert_eq!(total(&order).0.input, cli.sum());
    }

    /// What is lost is lost; nothing else is, and a running total makes up for it.
    #[test]
    fn a_lost_export_costs_itself_alone(cli in exported(), lost in proptest::collection::vec(any::<bool>(), 12)) {
        let reports = cli.reports(0);
        let last = reports.len() - 1;
        let kept = |n: usize| !lost[n] || n == last;
        let arrived: Vec<Report> = reports.iter().enumerate().filter(|(n, _)| kept(*n)).map(|(_, r)| r.clone()).collect();
        let expected: u64 = if cli.cumulative {
            cli.sum()
        } else {
            cli.batches.iter().enumerate().filter(|(n, _)| kept(*n)).flat_map(|(_, b)| b).map(|n| u64::from(*n)).sum()
        };
        prop_assert_eq!(total(&arrived).0.input, expected);
    }

    /// However the metrics and the events of the same calls come: the writes add up, and each duration gets its own in the end.
    #[test]
    fn writes_add_up(calls in proptest::collection::vec((0..1000i64, 0..1000i64), 1..10), order in any::<prop::sample::Index>()) {
        let mut reports: Vec<Report> = Vec::new();
        for (n, (five, hour)) in calls.iter().enumerate() {
            let at = n as u64;
            reports.push(points(&[tokens("cacheCreation", at, at + 1, (five + hour) as f64)]));
            reports.push(events(&[answer(n as i64, *five, *hour)]));
        }
        let at = order.index(reports.len());
        reports.rotate_left(at);
        let (tokens, _) = total(&reports);
        let (five, hour) = calls.iter().fold((0, 0), |sum, call| (sum.0 + call.0, sum.1 + call.1));
        prop_assert_eq!((tokens.cache_write_5m, tokens.cache_write_1h), (five as u64, hour as u64));
    }
}

// ---- a whole session

fn now(seconds: u64) -> Now {
    let unix = Duration::from_secs(1_795_392_000 + seconds);
    Now { mono: Duration::from_secs(seconds), unix }
}

fn text_mode(rules: Vec<Rule>) -> Monitor {
    let argv = ["claude", "-p", "hi"].map(std::ffi::OsString::from);
    let launch = Launch::of(&argv, false, false);
    let settings = Settings { parse: false, stdin_json: false, start: launch.start, rules, ..Settings::default() };
    let mut monitor = Monitor::new(settings, false, now(0));
    monitor.handle(now(0), Input::Spawned { pid: 1 });
    monitor
}

fn actions(monitor: &mut Monitor) -> Vec<Action> {
    let outputs = std::iter::from_fn(|| monitor.poll_output());
    outputs.filter_map(|output| if let Output::Action(action) = output { Some(action) } else { None }).collect()
}

#[test]
fn text_mode_has_a_bill() {
    let mut monitor = text_mode(vec![]);
    let failed = event("api_error", 2, &[("status_code", Value::Text("529".into()))]);
    let text = |text: &str| Value::Text(text.to_owned());
    let title = event("api_request", 9, &[("query_source", text("generate_session_title")), ("model", text("m"))]);
    monitor.handle(now(1), Input::Native(&events(&[title])));
    let tool = event("tool_result", 3, &[("tool_name", Value::Text("Bash".into())), ("success", Value::Text("true".into()))]);
    monitor.handle(now(1), Input::Native(&events(&[event("user_prompt", 0, &[]), answer(1, 0, 0), failed, tool])));
    monitor.handle(now(2), Input::Native(&points(&[cost("s", "main", 0, 1, 0.25), cost("s", "subagent", 0, 1, 0.5)])));
    monitor.handle(now(3), Input::Native(&events(&[event("user_prompt", 4, &[]), answer(5, 0, 0)])));
    monitor.handle(now(4), Input::Native(&points(&[cost("s", "main", 1, 2, 0.25)])));
    monitor.handle(now(5), Input::Exited(Exit::Code(0)));
    let session = &monitor.report().sessions()[0];
    assert_eq!(session.session_id.as_deref(), Some("s"));
    assert_eq!(session.outcome, Some(crate::update::Outcome::Success));
    assert_eq!((session.sums.turns, session.sums.cost_usd, session.sums.cost_estimated), (2, Usd::from_f64(1.0), false));
    assert_eq!(session.sums.tool_calls["Bash"].ok, 1);
    let cell = |metric, values: &[&str]| monitor.meters().get(metric, values).map(crate::metric::Cell::to_f64);
    assert_eq!(cell(&crate::metric::TURNS, &["success_is_error"]), Some(1.0), "the first turn's last request failed");
    assert_eq!(cell(&crate::metric::COST, &["claude-opus-4-8", "subagent"]), Some(0.5));
    // The last POST may be read after the end.
    monitor.handle(now(6), Input::Native(&points(&[cost("s", "main", 2, 3, 1.0)])));
    assert_eq!(monitor.cost(), Usd::from_f64(2.0));
}

#[test]
fn a_budget_ends_what_cannot_be_interrupted() {
    for scope in [Scope::Session, Scope::Turn] {
        let ceiling = Ceiling::Usd(Usd::from_f64(1.0));
        let mut monitor = text_mode(vec![Rule { limit: Limit::CostUsd, scope, ceiling, mode: Mode::Enforce }]);
        monitor.handle(now(1), Input::Native(&events(&[event("user_prompt", 0, &[])])));
        monitor.handle(now(1), Input::Native(&points(&[cost("s", "main", 0, 1, 0.9)])));
        assert_eq!(actions(&mut monitor), []);
        monitor.handle(now(2), Input::Native(&points(&[cost("s", "main", 1, 2, 0.2)])));
        assert_eq!(actions(&mut monitor), [Action::Signal(Signal(15))], "{scope:?}");
        monitor.handle(now(3), Input::Exited(Exit::Code(143)));
        assert_eq!(monitor.report().sessions()[0].outcome, Some(crate::update::Outcome::LimitStopped));
        assert!(monitor.stopped_by_limit());
    }
}

#[test]
fn beside_a_stream_it_only_bears_witness() {
    for (native, over, under) in [(0.5, 0.0, 0.0), (0.2, 0.3, 0.0), (0.75, 0.0, 0.25)] {
        let mut monitor = Monitor::new(Settings { stdin_json: false, ..Settings::default() }, false, now(0));
        monitor.handle(now(0), Input::Spawned { pid: 1 });
        monitor.handle(now(1), Input::Native(&events(&[event("user_prompt", 0, &[]), answer(1, 0, 0)])));
        monitor.handle(now(1), Input::Native(&points(&[cost("s", "main", 0, 1, native)])));
        assert_eq!(monitor.cost(), Usd::ZERO);
        let result = r#"{"type":"result","subtype":"success","is_error":false,"session_id":"s","total_cost_usd":0.5,"modelUsage":{"claude-opus-4-8":{"inputTokens":10,"outputTokens":1,"cacheReadInputTokens":0,"cacheCreationInputTokens":0,"webSearchRequests":0,"costUSD":0.5}}}"#;
        monitor.handle(now(2), Input::Stdout(format!("{result}\n").as_bytes()));
        monitor.handle(now(3), Input::Exited(Exit::Code(0)));
        assert_eq!(monitor.cost(), Usd::from_f64(0.5));
        assert_eq!(monitor.report().totals().turns, 1);
        let cell = |direction| {
            let cell = monitor.meters().get(&crate::metric::COST_RECONCILIATION_ERROR, &[direction]);
            cell.map(crate::metric::Cell::to_f64)
        };
        assert_eq!((cell("over"), cell("under")), (Some(over), Some(under)), "{native}");
    }
}
