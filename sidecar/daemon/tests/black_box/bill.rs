//! `bill`, over ledgers that `run` wrote: rows as FOCUS 1.2 wants them, whose sums are the ledger's.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::process::Signal;
use serde_json::Value;

use crate::support::*;

fn bill(args: &[&str]) -> (Option<i32>, String, String) {
    let out = Command::new(SIDECAR).arg("bill").args(args).env_clear().output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (out.status.code(), text(out.stdout), text(out.stderr))
}

/// Runs a recording, and has its ledger appended to a file.
fn ledger(file: &Path, recording: &str, flags: &[&str]) {
    let path = format!("{}/../core/tests/data/{recording}.jsonl", env!("CARGO_MANIFEST_DIR"));
    let mut run = Command::new(SIDECAR);
    run.args(["run", "--listen", "off", "--hub", "off", "--ledger"]).arg(file).args(flags).arg("--");
    let out = run.args(["sh", "-c", "cat \"$0\"", &path, "--output-format=stream-json"]).output().unwrap();
    assert_eq!(out.stdout, std::fs::read(&path).unwrap());
}

type Fields = BTreeMap<String, String>;

/// Of RFC 4180.
fn parse(csv: &str) -> Vec<Fields> {
    let (mut rows, mut row, mut field, mut quoted) = (Vec::new(), Vec::new(), String::new(), false);
    let mut chars = csv.chars().peekable();
    while let Some(c) = chars.next() {
        match (quoted, c) {
            (true, '"') if chars.peek() == Some(&'"') => field.push(chars.next().unwrap()),
            (_, '"') => quoted = !quoted,
            (false, ',') => row.push(std::mem::take(&mut field)),
            (false, '\r') => {}
            (false, '\n') => {
                row.push(std::mem::take(&mut field));
                rows.push(std::mem::take(&mut row));
            }
            (_, c) => field.push(c),
        }
    }
    assert!(!quoted && row.is_empty() && field.is_empty(), "it ends in the middle");
    let head: Vec<String> = rows.remove(0);
    rows.into_iter()
        .map(|row| {
            assert_eq!(row.len(), head.len(), "{row:?}");
            head.iter().cloned().zip(row).collect()
        })
        .collect()
}

/// A decimal as a whole number of its twelfth place.
fn pico(text: &str) -> i128 {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    assert!(fraction.len() <= 12, "{text}");
    let digits: i128 = format!("{}{fraction:0<12}", whole.trim_start_matches('-')).parse().unwrap();
    if text.starts_with('-') { -digits } else { digits }
}

fn sum(rows: &[Fields], column: &str, wanted: impl Fn(&Fields) -> bool) -> i128 {
    rows.iter().filter(|row| wanted(row)).map(|row| pico(&row[column])).sum()
}

fn is_compute(row: &Fields) -> bool {
    row["ServiceCategory"] == "Compute"
}

/// What `replay --ledger` says of the same files, in picodollars: spend, and the container.
fn replayed(files: &[&str]) -> (i128, i128) {
    let out = Command::new(SIDECAR).args(["replay", "--ledger", "--format", "json"]).args(files).env_clear().output().unwrap();
    let told: Value = serde_json::from_slice(&out.stdout).unwrap();
    let amount = |value: &Value| pico(&format!("{:.12}", value.as_f64().unwrap_or_default()));
    (amount(&told["totals"]["cost_usd"]), amount(&told["totals"]["container"]["cost_usd"]))
}

#[derive(Clone, Copy, PartialEq)]
enum Is {
    Text,
    Decimal,
    Instant,
    Object,
    Flag,
    OneOf(&'static [&'static str]),
}
use Is::*;

/// The columns of FOCUS 1.2 that a bill of usage has: whether it may be null, and what it is. Written down from the specification.
#[rustfmt::skip]
const COLUMNS: &[(&str, bool, Is)] = &[
    ("BilledCost", false, Decimal),
    ("BillingAccountId", false, Text),
    ("BillingAccountName", true, Text),
    ("BillingCurrency", false, OneOf(&["USD"])),
    ("BillingPeriodEnd", false, Instant),
    ("BillingPeriodStart", false, Instant),
    ("ChargeCategory", false, OneOf(&["Usage", "Purchase", "Tax", "Credit", "Adjustment"])),
    ("ChargeClass", true, OneOf(&["Correction"])),
    ("ChargeDescription", true, Text),
    ("ChargeFrequency", false, OneOf(&["One-Time", "Recurring", "Usage-Based"])),
    ("ChargePeriodEnd", false, Instant),
    ("ChargePeriodStart", false, Instant),
    ("ConsumedQuantity", true, Decimal),
    ("ConsumedUnit", true, OneOf(&["Tokens", "Requests", "Seconds"])),
    ("ContractedCost", false, Decimal),
    ("ContractedUnitPrice", true, Decimal),
    ("EffectiveCost", false, Decimal),
    ("InvoiceId", true, Text),
    ("InvoiceIssuerName", false, Text),
    ("ListCost", false, Decimal),
    ("ListUnitPrice", true, Decimal),
    ("PricingCategory", true, OneOf(&["Standard", "Dynamic", "Committed", "Other"])),
    ("PricingQuantity", true, Decimal),
    ("PricingUnit", true, OneOf(&["1000000 Tokens", "Requests", "Hours"])),
    ("ProviderName", false, Text),
    ("PublisherName", false, Text),
    ("ResourceId", true, Text),
    ("ResourceName", true, Text),
    ("ResourceType", true, Text),
    ("ServiceCategory", false, OneOf(&["AI and Machine Learning", "Compute"])),
    ("ServiceName", false, Text),
    ("ServiceSubcategory", false, OneOf(&["Generative AI", "Containers"])),
    ("SkuId", true, Text),
    ("SkuMeter", true, Text),
    ("SkuPriceDetails", true, Object),
    ("SkuPriceId", true, Text),
    ("SubAccountId", true, Text),
    ("SubAccountName", true, Text),
    ("SubAccountType", true, Text),
    ("Tags", true, Object),
    ("x_CostEstimated", false, Flag),
    ("x_Model", true, Text),
    ("x_TokenType", true, Text),
    ("x_Unpriced", false, Flag),
];

/// Of which the one is null just where the other is.
const TOGETHER: &[(&str, &str)] = &[
    ("ConsumedQuantity", "ConsumedUnit"),
    ("PricingQuantity", "PricingUnit"),
    ("ResourceId", "ResourceType"),
    ("SkuId", "SkuMeter"),
    ("SubAccountId", "SubAccountName"),
    ("SubAccountId", "SubAccountType"),
];
/// Not null in a row of usage, and null in an adjustment that has no quantity.
const OF_USAGE: [&str; 8] = [
    "ConsumedQuantity",
    "ContractedUnitPrice",
    "ListUnitPrice",
    "PricingCategory",
    "PricingQuantity",
    "SkuId",
    "SkuMeter",
    "SkuPriceId",
];

fn is_decimal(text: &str) -> bool {
    let digits = text.strip_prefix('-').unwrap_or(text);
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, "0"));
    [whole, fraction].iter().all(|part| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit()))
}

fn is_instant(text: &str) -> bool {
    text.len() == 20
        && text.bytes().zip(b"0000-00-00T00:00:00Z").all(|(a, b)| if *b == b'0' { a.is_ascii_digit() } else { a == *b })
}

/// Decimals as whole numbers and their places.
fn places(text: &str) -> (i128, u32) {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    (format!("{whole}{fraction}").parse().unwrap(), u32::try_from(fraction.len()).unwrap())
}

/// What the specification asks of each row.
fn validate(csv: &str) -> Vec<Fields> {
    let head: Vec<&str> = csv.lines().next().unwrap().split(',').collect();
    assert_eq!(head, COLUMNS.iter().map(|(name, _, _)| *name).collect::<Vec<_>>());
    let rows = parse(csv);
    for row in &rows {
        for (name, nullable, is) in COLUMNS {
            let value = row[*name].as_str();
            if value.is_empty() {
                assert!(nullable, "{name} is null: {row:?}");
                continue;
            }
            let fits = match is {
                Text => !value.trim().is_empty(),
                Decimal => is_decimal(value),
                Instant => is_instant(value),
                Flag => matches!(value, "true" | "false"),
                OneOf(allowed) => allowed.contains(&value),
                Object => serde_json::from_str::<serde_json::Map<String, Value>>(value)
                    .is_ok_and(|map| !map.is_empty() && map.values().all(|value| !value.is_object() && !value.is_array())),
            };
            assert!(fits, "{name} is {value:?}");
        }
        for (one, other) in TOGETHER {
            assert_eq!(row[*one].is_empty(), row[*other].is_empty(), "{one} and {other}: {row:?}");
        }
        for name in OF_USAGE {
            assert_eq!(row[name].is_empty(), row["ChargeCategory"] != "Usage", "{name}: {row:?}");
        }
        let subcategory = if is_compute(row) { "Containers" } else { "Generative AI" };
        assert_eq!(row["ServiceSubcategory"], subcategory);
        let period = |name: &str| (row[&format!("{name}Start")].clone(), row[&format!("{name}End")].clone());
        let (charge, billing) = (period("ChargePeriod"), period("BillingPeriod"));
        assert!(charge.0 < charge.1 && billing.0 <= charge.0 && charge.1 <= billing.1, "{charge:?} {billing:?}");
        if row["ChargeCategory"] == "Usage" {
            for (price, cost) in [("ListUnitPrice", "ListCost"), ("ContractedUnitPrice", "ContractedCost")] {
                assert!(!row[price].starts_with('-'), "{row:?}");
                let ((quantity, a), (price, b)) = (places(&row["PricingQuantity"]), places(&row[price]));
                let scale = 10_i128.pow(a + b);
                let off = (quantity * price * 1_000_000_000_000 - pico(&row[cost]) * scale).abs();
                assert!(off * 2 <= scale, "{cost} is no product: {row:?}");
            }
        } else {
            assert_eq!(row["ListCost"], row["BilledCost"]);
        }
    }
    rows
}

#[test]
fn rows_are_those_of_the_specification_and_add_up_to_the_ledger() {
    let dir = Scratch::new("bill", "rows");
    let files: Vec<PathBuf> = ["a.jsonl", "b.jsonl.1"].iter().map(|name| dir.join(name)).collect();
    let acme = ["--tenant", "acme, \"inc\"", "--team", "search", "--cost-center", "4711", "--price-discount", "0.9"];
    ledger(&files[0], "05a_subagent", &acme);
    ledger(&files[0], "06b_websearch", &acme);
    // Killed: nobody has confirmed what it cost.
    ledger(&files[1], "04j_kill9", &["--tenant", "umbrella", "--container-usd-per-hour", "7.3"]);
    ledger(&files[1], "01_basic_text", &["--container-usd-per-hour", "0"]);
    let (code, csv, error) = bill(&[dir.to_str().unwrap(), "--strict", "--time-zone", "Asia/Kolkata"]);
    assert_eq!((code, error.as_str()), (Some(0), ""));
    let rows = validate(&csv);
    let named: Vec<&str> = files.iter().map(|file| file.to_str().unwrap()).collect();
    let (spend, container) = replayed(&named);
    assert!(spend > 0 && container > 0);
    for column in ["BilledCost", "EffectiveCost", "ContractedCost"] {
        assert_eq!((sum(&rows, column, |row| !is_compute(row)), sum(&rows, column, is_compute)), (spend, container), "{column}");
    }
    // Two of them have ten percent off: 0.1939292 and 0.09.
    let off = sum(&rows, "ListCost", |_| true) - sum(&rows, "BilledCost", |_| true);
    assert_eq!(off, pico("0.02839292"));
    let of = |tenant: &str| rows.iter().filter(|row| row["SubAccountId"] == tenant).collect::<Vec<_>>();
    assert!(of("acme, \"inc\"").iter().all(|row| row["Tags"] == r#"{"cost_center":"4711","team":"search"}"#));
    assert!(of("umbrella").iter().any(|row| row["x_CostEstimated"] == "true"));
    assert!(of("").iter().all(|row| row["Tags"].is_empty() && !is_compute(row)), "a container that costs nothing is no row");
    let prices = |tenant: &str| {
        of(tenant).iter().filter(|row| is_compute(row)).map(|row| row["ListUnitPrice"].clone()).collect::<Vec<_>>()
    };
    assert_eq!((prices("acme, \"inc\""), prices("umbrella")), (vec![String::from("0.05"); 2], vec![String::from("7.3")]));
    // Midnight in Kolkata is half past six in the evening before.
    assert!(rows.iter().all(|row| row["ChargePeriodStart"].ends_with("T18:30:00Z")));

    // The same rows, in other words; and less far apart, the same sums.
    let (_, json, _) = bill(&[dir.to_str().unwrap(), "--format", "json", "--time-zone", "Asia/Kolkata"]);
    let objects: Vec<serde_json::Map<String, Value>> = json.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(objects.len(), rows.len());
    assert!(objects.iter().all(|object| object.len() == COLUMNS.len() && object["Tags"].as_str().is_none()));
    for by in ["tenant", "model"] {
        let (_, csv, _) = bill(&[dir.to_str().unwrap(), "--by", by]);
        let fewer = validate(&csv);
        assert!(fewer.len() < rows.len() && fewer.iter().all(|row| row["ResourceId"].is_empty()), "{by}");
        assert_eq!(sum(&fewer, "BilledCost", |_| true), spend + container, "{by}");
    }
}

#[test]
fn no_line_is_billed_twice_and_what_is_damaged_or_missing_is_told() {
    let dir = Scratch::new("bill", "copies");
    let file = dir.join("a.jsonl");
    ledger(&file, "01_basic_text", &["--container-usd-per-hour", "0"]);
    let whole = std::fs::read_to_string(&file).unwrap();
    let billed = |csv: &str| sum(&validate(csv), "BilledCost", |_| true);
    let write = |name: &str, text: &str| {
        let path = dir.join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let a = file.display().to_string();
    let copy = write("copy", &format!("{whole}{whole}"));
    for files in [vec![a.as_str()], vec![&a, &a], vec![&a, &copy], vec![&copy]] {
        let (code, csv, error) = bill(&[files.as_slice(), &["--strict"]].concat());
        assert_eq!((code, billed(&csv)), (Some(0), pico("0.025344")), "{files:?}");
        assert_eq!(error.contains("lines that were read already were left out"), files != [&a], "{error}");
        assert_eq!(replayed(&files).0, pico("0.025344"), "{files:?}");
    }
    // The power failed in the middle of a line, and what came next was written behind it.
    let lines: Vec<&str> = whole.lines().collect();
    let torn = write("torn", &format!("{}{}\n{}", &lines[0][..30], lines.join("\n"), "\u{0}{]\n"));
    let (code, csv, error) = bill(&[&torn]);
    assert_eq!((code, billed(&csv)), (Some(0), pico("0.025344")));
    assert!(error.contains("damaged=2") && !error.contains("missing="), "{error}");
    assert_eq!(bill(&[&torn, "--strict"]).0, Some(1));
    // A line that is nowhere.
    let spent = lines.iter().position(|line| line.contains(r#""event":"spent""#)).unwrap();
    let gap = write("gap", &[&lines[..spent], &lines[spent + 1..]].concat().join("\n"));
    let (code, csv, error) = bill(&[&gap, "--strict"]);
    assert!(code == Some(1) && billed(&csv) < pico("0.025344") && error.contains("missing=1"), "{error}");
    // Two megabytes without an end, and a line behind them.
    let long = write("long", &format!("{}\n{whole}", "x".repeat(2 << 20)));
    let (_, csv, error) = bill(&[&long]);
    assert!(billed(&csv) == pico("0.025344") && error.contains("it is too long"), "{error}");
}

#[test]
fn days_can_be_left_out_and_a_bill_takes_its_place_when_it_is_whole() {
    let dir = Scratch::new("bill", "days");
    let file = dir.join("a.jsonl");
    ledger(&file, "01_basic_text", &["--container-usd-per-hour", "0"]);
    // An hour before midnight in Greenwich, and half an hour after midnight in Berlin.
    let text = std::fs::read_to_string(&file).unwrap();
    let at = |time: &str| {
        let moved = text.lines().map(|line| format!("{{\"time\":{time}{}\n", &line[line.find(',').unwrap()..]));
        std::fs::write(&file, moved.collect::<String>()).unwrap();
    };
    at("1795388400.5");
    let a = file.to_str().unwrap();
    let billed = |args: &[&str]| sum(&validate(&bill(&[&[a], args].concat()).1), "BilledCost", |_| true);
    let all = pico("0.025344");
    assert_eq!(
        [billed(&["--from", "2026-11-22"]), billed(&["--from", "2026-11-23"]), billed(&["--to", "2026-11-23"])],
        [all, 0, all]
    );
    let berlin = ["--time-zone", "Europe/Berlin"];
    assert_eq!(
        [billed(&[&berlin[..], &["--from", "2026-11-23"]].concat()), billed(&[&berlin[..], &["--to", "2026-11-23"]].concat())],
        [all, 0]
    );
    let out = dir.join("bill.csv");
    let (code, said, _) = bill(&[a, "--output", out.to_str().unwrap()]);
    assert_eq!((code, said.as_str()), (Some(0), ""));
    assert_eq!(sum(&validate(&std::fs::read_to_string(&out).unwrap()), "BilledCost", |_| true), all);
    let (code, _, error) = bill(&[a, "--from", "yesterday"]);
    assert!(code == Some(1) && error.contains("`yesterday` is no day"), "{error}");
    let (code, _, error) = bill(&[a, "--output", "/no/such/dir/bill.csv"]);
    assert!(code == Some(1) && error.contains("/no/such/dir/bill.csv"), "{error}");
    assert!(bill(&[]).2.contains("no ledger is named"));
    // Nothing is a bill, too.
    assert!(validate(&bill(&["/dev/null"]).1).is_empty());
    assert_eq!(std::fs::read_dir(&*dir).unwrap().count(), 2, "nothing half is left");
}

/// Seconds that a ledger says the container was there for.
fn hours(file: &Path) -> f64 {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    lines.filter(|line| line["event"] == "container_used").filter_map(|line| line["seconds"].as_f64()).sum()
}

const WAITS: &str = r#"echo '{"type":"system","subtype":"init","session_id":"'$1'","model":"m"}'; read -r _; exit 0"#;

#[test]
fn the_containers_seconds_are_divided_among_its_agents() {
    let dir = Scratch::new("bill", "shared");
    let file = |id: &str| dir.join(format!("{id}.jsonl"));
    let start = |id: &str| {
        let mut command = Command::new(SIDECAR);
        command.args(["run", "--listen", "127.0.0.1:0", "--socket"]).arg(dir.join("hub.sock")).arg("--ledger").arg(file(id));
        command.args(["--", "sh", "-c", WAITS, "sh", id]).args(ONE_SHOT);
        Running::start(command)
    };
    let began = std::time::Instant::now();
    let mut agents: Vec<(String, Running)> = (0..3).map(|n| (format!("s{n}"), start(&format!("s{n}")))).collect();
    agents.iter_mut().for_each(|(_, agent)| drop(agent.line()));
    // All are on the list when each has booked something.
    for (id, _) in &agents {
        wait_for("a line about the container", || (hours(&file(id)) > 0.0).then_some(()));
    }
    // What this one has not booked is lost, and nobody else's.
    let (killed, mut other) = agents.remove(0);
    other.signal(Signal::KILL);
    other.code();
    let written = hours(&file(&killed));
    for (_, agent) in &mut agents {
        agent.close_stdin();
        assert_eq!(agent.code(), Some(0));
    }
    let all: f64 = ["s0", "s1", "s2"].iter().map(|id| hours(&file(id))).sum();
    let lived = began.elapsed().as_secs_f64();
    assert!(written > 0.0 && hours(&file(&killed)) == written);
    assert!(all <= lived, "{all} seconds in {lived}");
    let files: Vec<String> = ["s0", "s1", "s2"].iter().map(|id| file(id).display().to_string()).collect();
    let rows = validate(&bill(&files.iter().map(String::as_str).collect::<Vec<_>>()).1);
    assert_eq!(
        rows.iter().filter(|row| is_compute(row)).map(|row| row["ResourceId"].as_str()).collect::<Vec<_>>(),
        ["s0", "s1", "s2"]
    );
    assert!((sum(&rows, "ConsumedQuantity", is_compute) - pico(&format!("{all:.9}"))).abs() < 1_000_000);
}
