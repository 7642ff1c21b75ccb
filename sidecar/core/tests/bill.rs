//! The rows of a bill add up to the lines of the ledger, to the last token and picodollar, however they are divided.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::path::PathBuf;
use std::time::Duration;

use agent_sidecar_core::bill::{Bill, By, Item, Row};
use agent_sidecar_core::price::{Price, PriceTable, Rates};
use agent_sidecar_core::record::{Fact, Record};
use agent_sidecar_core::tokens::{Tokens, Usd};
use agent_sidecar_core::update::{Basis, Direction, Outcome, Source};
use agent_sidecar_core::who::Who;
use agent_sidecar_core::{Exit, Input, Monitor, Now, Output, Settings};
use proptest::prelude::*;

const DAY: Duration = Duration::from_secs(1_795_392_000);

fn recordings() -> Vec<PathBuf> {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    let all = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    all.filter(|path| path.extension().is_some_and(|end| end == "jsonl") && !path.to_string_lossy().contains(".wire.")).collect()
}

/// What a wrapper writes whose CLI says this and cannot be asked: the first to be counted early.
fn ledger(path: &PathBuf, prices: &PriceTable) -> (Vec<Record>, Monitor) {
    let now = Now { mono: Duration::ZERO, unix: DAY };
    let settings = Settings { nonce: path.display().to_string(), parse: true, prices: prices.clone(), ..Settings::default() };
    // What goes on from another session is told by the command line, which a recording has none of.
    let recorded = ["resume", "fork"].iter().any(|word| path.display().to_string().contains(word));
    let mut monitor = Monitor::new(settings, recorded, now);
    let mut records = Vec::new();
    for input in [Input::Spawned { pid: 1 }, Input::ContainerUsed(Duration::from_millis(1_234))] {
        monitor.handle(now, input);
    }
    for line in std::fs::read(path).unwrap().split_inclusive(|byte| *byte == b'\n') {
        monitor.handle(now, Input::Stdout(line));
    }
    for input in [Input::StdoutEnd, Input::ContainerUsed(Duration::from_secs(90)), Input::Exited(Exit::Code(0))] {
        monitor.handle(now, input);
    }
    while let Some(output) = monitor.poll_output() {
        if let Output::Record(record) = output {
            records.push(record);
        }
    }
    (records, monitor)
}

fn rows(by: By, prices: &PriceTable, records: &[Record]) -> Vec<Row> {
    let mut bill = Bill::new(by, prices.clone());
    records.iter().for_each(|record| bill.on(record, 7, true));
    bill.rows().collect()
}

fn cost(rows: &[Row], container: bool) -> i128 {
    rows.iter().filter(|row| (row.item == Item::Container) == container).map(|row| row.cost).sum()
}

fn pico(usd: Usd) -> i128 {
    usd.pico().into()
}

#[test]
fn a_bill_of_a_recording_is_what_its_report_says() {
    let prices = PriceTable::default().with_discount(None, 0.7);
    for path in recordings() {
        let (records, monitor) = ledger(&path, &prices);
        let totals = monitor.report().totals();
        for by in [By::Session, By::Tenant, By::Model] {
            let rows = rows(by, &prices, &records);
            assert_eq!(cost(&rows, false), pico(totals.cost_usd), "{} {by:?}", path.display());
            assert_eq!(cost(&rows, true), pico(totals.container.cost_usd));
            assert_eq!(cost(&rows, true), (91_234 * 50_000_000_000_i128 + 1_800_000) / 3_600_000, "91.234 seconds at five cents");
            let (mut tokens, mut nanos) = ([0; 5], 0);
            for row in &rows {
                match &row.item {
                    Item::Tokens { kind, .. } => tokens[*kind] += row.quantity,
                    Item::Container => nanos += row.quantity,
                    Item::WebSearches { .. } => assert_eq!(row.cost, row.quantity * 7_000_000_000),
                    Item::Rest { .. } => panic!("a recording has no money without tokens: {}", path.display()),
                }
                assert!(row.cost >= 0 && row.quantity > 0, "{} {row:?}", path.display());
            }
            assert_eq!(nanos, 91_234_000_000);
            assert_eq!(tokens, totals.tokens.by_kind().map(i128::from), "{} {by:?}", path.display());
            let estimated = rows.iter().any(|row| row.estimated);
            assert_eq!(estimated, totals.cost_estimated, "{} {by:?}", path.display());
        }
    }
}

#[test]
fn half_off_is_half_whatever_was_counted_early() {
    let half = PriceTable::default().with_discount(None, 0.5);
    for path in recordings() {
        let [(full, _), (less, monitor)] = [&PriceTable::default(), &half].map(|prices| ledger(&path, prices));
        let sums = |records: &[Record]| {
            let rows = rows(By::Model, &PriceTable::default(), records);
            (cost(&rows, false), rows.iter().filter(|row| row.item != Item::Container).map(|row| row.list).sum::<i128>())
        };
        let ((paid, list), (paid_less, list_less)) = (sums(&full), sums(&less));
        assert_eq!((paid, list_less), (list, list), "{}: the list is the same for all", path.display());
        assert_eq!(paid_less * 2, paid, "{}", path.display());
        assert_eq!(pico(monitor.report().totals().cost_usd), paid_less);
    }
}

#[test]
fn each_kind_is_billed_at_its_own_price() {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/06b_websearch.jsonl");
    let (records, _) = ledger(&path, &PriceTable::default());
    for row in rows(By::Session, &PriceTable::default(), &records) {
        let each = match &row.item {
            Item::Tokens { kind, .. } => [4_000_000, 20_000_000, 200_000, 5_000_000, 8_000_000][*kind],
            Item::WebSearches { .. } => 10_000_000_000,
            Item::Rest { .. } | Item::Container => continue,
        };
        assert_eq!((row.cost, row.list), (row.quantity * each, row.quantity * each), "{row:?}");
        assert!(row.payer.session.is_some() && !row.estimated, "{row:?}");
    }
}

#[test]
fn own_prices_divide_what_is_paid_and_the_list_what_is_listed() {
    let row = |rates: [f64; 5]| Price {
        model: "claude-opus-5-5".into(),
        from: "1970-01-01".into(),
        rates: Rates::new(rates).unwrap(),
        long_prompt: None,
        fast: None,
    };
    let billed = |own: [f64; 5], pico: u64| {
        let Fact::Spent { session_id, model, source, basis, tokens, cost_usd, web_searches, unpriced, .. } =
            spent("claude-opus-5-5", Basis::Confirmed, [10, 3, 0, 0, 0], pico, 0)
        else {
            unreachable!("it says what was spent")
        };
        let list_usd = Some(Usd::from_pico(10 * 4_000_000 + 3 * 20_000_000));
        let fact = Fact::Spent { session_id, model, source, basis, tokens, cost_usd, list_usd, web_searches, unpriced };
        let rows = rows(By::Session, &PriceTable::default().with_price(row(own)), &[record(0, "r", fact)]);
        rows.iter().map(|row| (row.quantity, row.cost, row.list)).collect::<Vec<_>>()
    };
    let list = [40_000_000, 60_000_000];
    // Input dearer than output, as nowhere on the list.
    let own = billed([30.0, 2.0, 1.0, 1.0, 1.0], 306_000_000);
    assert_eq!(own, [(10, 300_000_000, list[0]), (3, 6_000_000, list[1])]);
    assert_eq!(billed([0.0; 5], 0), [(10, 0, list[0]), (3, 0, list[1])], "all of it for nothing");
}

fn record(seq: u64, run: &str, fact: Fact) -> Record {
    Record::new(run, seq, DAY, &Who { tenant: Some(String::from("acme")), ..Who::default() }, fact)
}

fn spent(model: &str, basis: Basis, tokens: [u64; 5], pico: u64, searches: u64) -> Fact {
    let (session_id, tokens, cost_usd) = (String::from("s"), Tokens::from_kinds(tokens), Usd::from_pico(pico));
    let (model, source) = (model.to_owned(), Source::Main);
    Fact::Spent { session_id, model, source, basis, tokens, cost_usd, list_usd: None, web_searches: searches, unpriced: false }
}

fn ended(confirmed: bool) -> Fact {
    let session_id = String::from("s");
    Fact::TurnEnded { session_id, turn: 1, outcome: Outcome::Success, cost_usd: Usd::ZERO, duration_seconds: 1.0, confirmed }
}

#[test]
fn an_estimate_is_one_until_a_result_confirms_it() {
    let marked = |facts: Vec<Fact>| {
        let records: Vec<Record> = (0..).zip(facts).map(|(seq, fact)| record(seq, "r", fact)).collect();
        rows(By::Session, &PriceTable::default(), &records).iter().map(|row| row.estimated).collect::<Vec<_>>()
    };
    let early = || spent("claude-opus-5-5", Basis::Estimate, [10, 0, 0, 0, 0], 40_000_000, 0);
    assert_eq!(marked(vec![early(), ended(true)]), [false]);
    assert_eq!(marked(vec![early(), ended(false)]), [true]);
    assert_eq!(marked(vec![early()]), [true], "killed");
}

#[test]
fn money_that_no_tokens_explain_is_an_adjustment() {
    let own = Rates::new([3.0; 5]).unwrap();
    let prices = PriceTable::default().with_fallback(own);
    let records = [
        record(0, "r", spent("mystery", Basis::Confirmed, [0; 5], 5, 0)),
        record(1, "r", spent("claude-opus-5-5", Basis::Confirmed, [0, 3, 0, 0, 1], 1_000, 0)),
    ];
    let rows = rows(By::Session, &prices, &records);
    assert!(
        rows.iter().any(|row| matches!(&row.item, Item::Rest { model } if &**model == "mystery") && row.cost == 5),
        "{rows:?}"
    );
    assert_eq!(cost(&rows, false), 1_005);
}

#[test]
fn the_container_of_a_run_is_its_sessions() {
    let used =
        |session: &str, seconds| Fact::ContainerUsed { session_id: session.to_owned(), seconds, cost_usd: Usd::from_pico(9) };
    let records = [
        record(0, "r", used("", 1.0)),
        record(0, "q", used("", 2.0)),
        record(1, "r", used("s", 4.0)),
        record(2, "r", used("", 8.0)),
    ];
    let found: Vec<(Option<String>, i128)> = rows(By::Session, &PriceTable::default(), &records)
        .into_iter()
        .map(|row| (row.payer.session.map(|id| id.to_string()), row.quantity / 1_000_000_000))
        .collect();
    assert_eq!(found, [(None, 2), (Some(String::from("s")), 13)]);
}

proptest! {
    #[test]
    fn whatever_is_in_the_lines_is_in_the_rows(
        lines in prop::collection::vec((0_usize..3, any::<bool>(), any::<bool>(), prop::array::uniform5(0_u64..2_000_000), 0_u64..4, 0_u64..9_000_000_000_000, 0_u32..3), 0..40)
    ) {
        let mut bill = Bill::new(By::Session, PriceTable::default());
        let (mut money, mut counted) = (0_i128, [0_i128; 5]);
        for (seq, (model, estimate, back, tokens, searches, pico, day)) in (0..).zip(lines) {
            let model = ["claude-opus-5-5", "claude-haiku-5-5", "nobody-knows"][model];
            let basis = if estimate { Basis::Estimate } else { Basis::Confirmed };
            let sign = if back { -1 } else { 1 };
            let fact = match back {
                false => spent(model, basis, tokens, pico, searches),
                true => Fact::Corrected {
                    session_id: String::from("s"),
                    model: model.to_owned(),
                    direction: Direction::Over,
                    cost_usd: Usd::from_pico(pico),
                    list_usd: None,
                    tokens: Tokens::from_kinds(tokens),
                },
            };
            bill.on(&record(seq, "r", fact), day, true);
            money += sign * i128::from(pico);
            counted.iter_mut().zip(tokens).for_each(|(sum, n)| *sum += sign * i128::from(n));
        }
        let rows: Vec<Row> = bill.rows().collect();
        prop_assert_eq!(rows.iter().map(|row| row.cost).sum::<i128>(), money);
        for row in &rows {
            if let Item::Tokens { kind, .. } = row.item {
                counted[kind] -= row.quantity;
            }
            // A price is nothing negative.
            prop_assert!(row.cost.signum() * row.quantity.signum() >= 0 || matches!(row.item, Item::Rest { .. }), "{:?}", row);
        }
        prop_assert_eq!(counted, [0; 5]);
    }
}
