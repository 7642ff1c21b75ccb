//! `bill`: what ledger files come to, as rows of FOCUS 1.2, the open format of cost and usage data. Reads, sums, writes; nothing is sent.
//!
//! All numbers are decimals of whole picodollars, tokens and nanoseconds: no float is on the way from the ledger to a row.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use agent_sidecar_core::bill::{Bill, By, Item, Row};
use agent_sidecar_core::tokens::TOKEN_KINDS;
use jiff::Timestamp;
use serde_json::json;

use crate::books::{Books, Unreadable};
use crate::config::Config;
use crate::hub::{Day, Zone};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    Csv,
    /// An object in each line.
    Json,
}

/// What to write, and what the ledger does not know: who sends the invoice.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) files: Vec<PathBuf>,
    pub(crate) output: Option<PathBuf>,
    pub(crate) format: Format,
    pub(crate) by: By,
    /// Days, as `2026-11-23`: from the first on, and before the second.
    pub(crate) from: Option<String>,
    pub(crate) to: Option<String>,
    pub(crate) account: String,
    pub(crate) provider: String,
    pub(crate) container_provider: String,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Read(#[from] Unreadable),
    #[error("no ledger is named; give its files or their directory, or set ledger.path")]
    NoLedger,
    #[error("`{0}` is no day; write it like 2026-11-23")]
    Day(String),
    #[error("cannot write the bill")]
    Write(#[from] io::Error),
    #[error("cannot write {}", path.display())]
    Output {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

const PUBLISHER: &str = "Anthropic";
/// By kind, in their order.
const METERS: [&str; 5] =
    ["Input Tokens", "Output Tokens", "Cache Read Tokens", "Cache Write Tokens (5 Minutes)", "Cache Write Tokens (1 Hour)"];
/// The decimals of a dollar.
const PICO: u32 = 12;
/// Of a unit price: so many that quantity times price is the cost again, to the picodollar, up to a billion tokens.
const PRICE_DECIMALS: u32 = 15;

/// Of an amount of hours, which most are no decimal of: enough for the same.
const QUANTITY_DECIMALS: u32 = 15;

/// Writes the bill; says whether every line of the ledger could be read, and none is missing.
pub(crate) fn bill(request: &Request, config: &Config, out: &mut impl Write) -> Result<bool, Error> {
    if request.files.is_empty() {
        return Err(Error::NoLedger);
    }
    let mut calendar = Calendar { zone: config.zone(), days: BTreeMap::new(), last: None };
    let midnight = |day: &Option<String>| match day {
        None => Ok(None),
        Some(day) => calendar.zone.midnight(day).map(Some).ok_or_else(|| Error::Day(day.clone())),
    };
    let (from, to) = (midnight(&request.from)?.unwrap_or(i64::MIN), midnight(&request.to)?.unwrap_or(i64::MAX));
    let mut bill = Bill::new(request.by, config.prices.clone());
    let mut books = Books::default();
    books.read(&request.files, |record| {
        #[expect(clippy::cast_possible_truncation, reason = "saturates")]
        let second = record.time as i64;
        let billed = (from..to).contains(&second);
        bill.on(record, calendar.day(second), billed);
    })?;
    books.say();
    let nothing = focus(&Row::nothing(), &Day { number: 0, hours: 0..0, month: 0..0 }, request);
    let rows = bill.rows().map(|row| focus(&row, &calendar.days[&row.day], request));
    match &request.output {
        None => write(rows, &nothing, request.format, &mut BufWriter::new(out))?,
        Some(path) => {
            save(rows, &nothing, request.format, path).map_err(|source| Error::Output { path: path.clone(), source })?
        }
    }
    Ok(books.damaged == 0 && books.missing() == 0)
}

/// The days that the ledger has lines of.
struct Calendar {
    zone: Zone,
    days: BTreeMap<u32, Day>,
    last: Option<Day>,
}

impl Calendar {
    fn day(&mut self, second: i64) -> u32 {
        if let Some(day) = self.last.as_ref().filter(|day| day.hours.contains(&second)) {
            return day.number;
        }
        let day = self.zone.day(second);
        self.days.insert(day.number, day.clone());
        self.last.insert(day).number
    }
}

/// One value of a row.
enum Value {
    Null,
    Text(String),
    Number(String),
    Flag(bool),
    Object(serde_json::Map<String, serde_json::Value>),
}

type Columns = Vec<(&'static str, Value)>;

fn text(text: impl Into<String>) -> Value {
    Value::Text(text.into())
}

fn maybe(value: Option<impl Into<String>>) -> Value {
    value.map_or(Value::Null, |value| Value::Text(value.into()))
}

fn number(value: Option<String>) -> Value {
    value.map_or(Value::Null, Value::Number)
}

/// An item in the words of the format.
struct Words {
    model: Option<String>,
    kind: Option<&'static str>,
    /// What is counted, and in what it is priced: so many of the one are one of the other.
    consumed: (Decimal, &'static str),
    priced: (&'static str, i128),
    sku: String,
    meter: &'static str,
}

/// A whole number of a decimal place.
type Decimal = (i128, u32);

fn words(item: &Item, quantity: i128) -> Option<Words> {
    let counted = |model: &str, kind, meter, consumed, priced| {
        Some(Words { model: Some(model.to_owned()), kind: Some(kind), consumed, priced, sku: format!("{model}/{kind}"), meter })
    };
    match item {
        Item::Tokens { model, kind } => {
            counted(model, TOKEN_KINDS[*kind], METERS[*kind], ((quantity, 0), "Tokens"), ("1000000 Tokens", 1_000_000))
        }
        Item::WebSearches { model } => counted(model, "web_search", "Web Searches", ((quantity, 0), "Requests"), ("Requests", 1)),
        Item::Container => Some(Words {
            model: None,
            kind: None,
            consumed: ((quantity, 9), "Seconds"),
            priced: ("Hours", 3_600_000_000_000),
            sku: String::from("container/hour"),
            meter: "Container Hours",
        }),
        Item::Rest { .. } => None,
    }
    .filter(|_| quantity != 0)
}

fn focus(row: &Row, day: &Day, request: &Request) -> Columns {
    let is_container = row.item == Item::Container;
    let words = words(&row.item, row.quantity);
    let per = words.as_ref().map(|words| words.priced.1);
    // Without a unit price there is no list either.
    let list = if words.is_some() { row.list } else { row.cost };
    let price = |cost| per.map(|per| unit_price(cost, row.quantity, per));
    let model = match &row.item {
        Item::Tokens { model, .. } | Item::WebSearches { model } | Item::Rest { model } => Some(model.to_string()),
        Item::Container => None,
    };
    let provider = if is_container { &request.container_provider } else { &request.provider };
    let (category, service, subcategory) = match is_container {
        true => ("Compute", "Agent Container", "Containers"),
        false => ("AI and Machine Learning", "Claude API", "Generative AI"),
    };
    let description = match (&words, price(row.cost)) {
        (Some(words), Some(price)) => {
            let of = words.model.as_ref().map_or(String::new(), |model| format!(" of {model}"));
            format!("{}{of} at {price} USD for {}", words.meter, one(words.priced.0))
        }
        _ => format!("Cost of {} that no quantity explains", model.as_deref().unwrap_or("the container")),
    };
    let mut tags = serde_json::Map::new();
    for (name, value) in [("team", &row.payer.team), ("cost_center", &row.payer.cost_center)] {
        if let Some(value) = value {
            tags.insert(name.to_owned(), json!(**value));
        }
    }
    let mut details = serde_json::Map::new();
    if let Some(words) = &words {
        for (name, value) in [("x_Model", words.model.as_deref()), ("x_TokenType", words.kind)] {
            if let Some(value) = value {
                details.insert(name.to_owned(), json!(value));
            }
        }
    }
    let object = |map: serde_json::Map<_, _>| if map.is_empty() { Value::Null } else { Value::Object(map) };
    let money = |pico| Value::Number(decimal((pico, PICO)));
    let payer = |value: &Option<std::sync::Arc<str>>| maybe(value.as_deref());
    let is = |known: bool, what: &'static str| maybe(known.then_some(what));
    let (session, tenant) = (row.payer.session.is_some(), row.payer.tenant.is_some());
    let quantity = words.as_ref().map(|words| pricing_quantity(row.quantity, words.priced.1));
    vec![
        ("BilledCost", money(row.cost)),
        ("BillingAccountId", text(&request.account)),
        ("BillingAccountName", Value::Null),
        ("BillingCurrency", text("USD")),
        ("BillingPeriodEnd", text(instant(day.month.end))),
        ("BillingPeriodStart", text(instant(day.month.start))),
        ("ChargeCategory", text(if words.is_some() { "Usage" } else { "Adjustment" })),
        ("ChargeClass", Value::Null),
        ("ChargeDescription", text(description)),
        ("ChargeFrequency", text("Usage-Based")),
        ("ChargePeriodEnd", text(instant(day.hours.end))),
        ("ChargePeriodStart", text(instant(day.hours.start))),
        ("ConsumedQuantity", number(words.as_ref().map(|words| decimal(words.consumed.0)))),
        ("ConsumedUnit", maybe(words.as_ref().map(|words| words.consumed.1))),
        ("ContractedCost", money(row.cost)),
        ("ContractedUnitPrice", number(price(row.cost))),
        ("EffectiveCost", money(row.cost)),
        ("InvoiceId", Value::Null),
        ("InvoiceIssuerName", text(provider)),
        ("ListCost", money(list)),
        ("ListUnitPrice", number(price(list))),
        ("PricingCategory", is(words.is_some(), "Standard")),
        ("PricingQuantity", number(quantity)),
        ("PricingUnit", maybe(words.as_ref().map(|words| words.priced.0))),
        ("ProviderName", text(provider)),
        ("PublisherName", text(if is_container { provider } else { PUBLISHER })),
        ("ResourceId", payer(&row.payer.session)),
        ("ResourceName", Value::Null),
        ("ResourceType", is(session, "Agent Session")),
        ("ServiceCategory", text(category)),
        ("ServiceName", text(service)),
        ("ServiceSubcategory", text(subcategory)),
        ("SkuId", maybe(words.as_ref().map(|words| words.sku.as_str()))),
        ("SkuMeter", maybe(words.as_ref().map(|words| words.meter))),
        ("SkuPriceDetails", object(details)),
        ("SkuPriceId", maybe(words.as_ref().map(|words| words.sku.as_str()))),
        ("SubAccountId", payer(&row.payer.tenant)),
        ("SubAccountName", payer(&row.payer.tenant)),
        ("SubAccountType", is(tenant, "Tenant")),
        ("Tags", object(tags)),
        ("x_CostEstimated", Value::Flag(row.estimated)),
        ("x_Model", maybe(model)),
        ("x_TokenType", maybe(words.as_ref().and_then(|words| words.kind))),
        ("x_Unpriced", Value::Flag(row.unpriced)),
    ]
}

/// `1000000 Tokens` stays, `Hours` is an hour.
fn one(unit: &str) -> &str {
    match unit {
        "Hours" => "an hour",
        "Requests" => "a request",
        many => many,
    }
}

fn instant(second: i64) -> String {
    Timestamp::from_second(second).unwrap_or(Timestamp::MAX).strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// In the unit that has a price.
fn pricing_quantity(quantity: i128, per: i128) -> String {
    decimal((rounded(quantity.saturating_mul(10_i128.pow(QUANTITY_DECIMALS)), per), QUANTITY_DECIMALS))
}

/// The shortest price that makes the cost again when it is multiplied with the quantity.
fn unit_price(cost: i128, quantity: i128, per: i128) -> String {
    let whole = 10_i128.pow(PICO);
    let mut best = (0, 0);
    for decimals in 0..=PRICE_DECIMALS {
        let shift = 10_i128.pow(decimals);
        let product = |price: i128| Some(rounded(price.checked_mul(quantity)?.checked_mul(whole)?, per.checked_mul(shift)?));
        let price = || Some(rounded(cost.checked_mul(per)?.checked_mul(shift)?, quantity.checked_mul(whole)?));
        // Beyond what such numbers can hold, the price before is as good.
        let Some((price, product)) = price().and_then(|price| Some((price, product(price)?))) else { break };
        best = (price, decimals);
        if product == cost {
            break;
        }
    }
    decimal(best)
}

/// A quotient to the nearest whole number.
fn rounded(a: i128, b: i128) -> i128 {
    let (quotient, rest) = (a / b, a % b);
    let up = rest.abs() >= b.abs() - rest.abs();
    if up && rest != 0 { quotient + a.signum() * b.signum() } else { quotient }
}

/// `(-1500, 3)` is `-1.5`.
fn decimal((value, decimals): Decimal) -> String {
    let sign = if value < 0 { "-" } else { "" };
    let digits = format!("{:0>width$}", value.unsigned_abs(), width = decimals as usize + 1);
    let (whole, fraction) = digits.split_at(digits.len() - decimals as usize);
    let fraction = fraction.trim_end_matches('0');
    if fraction.is_empty() { format!("{sign}{whole}") } else { format!("{sign}{whole}.{fraction}") }
}

/// Half a bill is none: it takes its place when it is whole.
fn save(rows: impl Iterator<Item = Columns>, nothing: &Columns, format: Format, path: &Path) -> io::Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    let new = PathBuf::from(name);
    let written = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new).and_then(|file: File| {
        let mut out = BufWriter::new(file);
        write(rows, nothing, format, &mut out)?;
        out.flush()
    });
    written.and_then(|()| fs::rename(&new, path)).inspect_err(|_| drop(fs::remove_file(&new)))
}

fn write(rows: impl Iterator<Item = Columns>, nothing: &Columns, format: Format, out: &mut impl Write) -> io::Result<()> {
    if format == Format::Csv {
        // A bill of nothing has its columns, too.
        let names: Vec<&str> = nothing.iter().map(|(name, _)| *name).collect();
        write!(out, "{}\r\n", names.join(","))?;
    }
    for row in rows {
        match format {
            Format::Csv => csv(&row, out)?,
            Format::Json => json_line(&row, out)?,
        }
    }
    out.flush()
}

fn csv(row: &Columns, out: &mut impl Write) -> io::Result<()> {
    for (n, (_, value)) in row.iter().enumerate() {
        if n > 0 {
            out.write_all(b",")?;
        }
        match value {
            Value::Null => {}
            Value::Number(number) => out.write_all(number.as_bytes())?,
            Value::Flag(flag) => write!(out, "{flag}")?,
            Value::Text(text) => quoted(text, out)?,
            Value::Object(map) => quoted(&serde_json::to_string(map)?, out)?,
        }
    }
    out.write_all(b"\r\n")
}

/// As RFC 4180 says.
fn quoted(text: &str, out: &mut impl Write) -> io::Result<()> {
    if text.contains(['"', ',', '\r', '\n']) {
        write!(out, "\"{}\"", text.replace('"', "\"\""))
    } else {
        out.write_all(text.as_bytes())
    }
}

fn json_line(row: &Columns, out: &mut impl Write) -> io::Result<()> {
    for (n, (name, value)) in row.iter().enumerate() {
        write!(out, "{}\"{name}\":", if n == 0 { '{' } else { ',' })?;
        match value {
            Value::Null => out.write_all(b"null")?,
            Value::Number(number) => out.write_all(number.as_bytes())?,
            Value::Flag(flag) => write!(out, "{flag}")?,
            Value::Text(text) => serde_json::to_writer(&mut *out, text)?,
            Value::Object(map) => serde_json::to_writer(&mut *out, map)?,
        }
    }
    out.write_all(b"}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decimals_are_exact() {
        for (value, expected) in
            [((0, 12), "0"), ((1, 12), "0.000000000001"), ((-1_500, 3), "-1.5"), ((20, 0), "20"), ((1_000, 2), "10")]
        {
            assert_eq!(decimal(value), expected);
        }
        let rounds = [(5, 2, 3), (-5, 2, -3), (5, -2, -3), (4, 3, 1), (-4, 3, -1), (6, 3, 2), (0, 7, 0)];
        for (a, b, expected) in rounds {
            assert_eq!(rounded(a, b), expected, "{a}/{b}");
        }
    }

    #[test]
    fn a_price_is_as_short_as_it_can_be() {
        // 238 tokens at 20 dollars a million; three searches; 17 seconds at five cents an hour.
        assert_eq!(unit_price(4_760_000_000, 238, 1_000_000), "20");
        assert_eq!(unit_price(30_000_000_000, 3, 1), "0.01");
        assert_eq!(unit_price(236_111_111, 17_000_000_000, 3_600_000_000_000), "0.05");
        // What was taken back has the price that it had.
        assert_eq!(unit_price(-4_760_000_000, -238, 1_000_000), "20");
        // A third more than that, for one token: no short price.
        assert_eq!(unit_price(26_666_667, 1, 1_000_000), "26.666667");
    }
}
