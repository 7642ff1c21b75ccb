//! What a token costs: a table of rows with dates and a source, and what a configuration lays over it.
//!
//! The CLI's own `costUSD` is what the ledger books. The table prices what nobody confirmed (answers cut by a kill, a turn in
//! flight), checks the CLI's arithmetic, and takes over where a configuration knows better (a discount, a model of one's own).

use std::borrow::Cow;
use std::cell::LazyCell;
use std::collections::BTreeMap;
use std::time::Duration;

use crate::event::Usage;
use crate::tokens::{Tokens, Usd};

/// US dollars for a million tokens of each kind, in [`crate::tokens::TOKEN_KINDS`] order.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates([f64; 5]);

impl Rates {
    /// # Errors
    /// A rate that is negative or no number.
    pub fn new(per_million: [f64; 5]) -> Result<Rates, BadRate> {
        if per_million.iter().all(|rate| rate.is_finite() && *rate >= 0.0) { Ok(Rates(per_million)) } else { Err(BadRate) }
    }

    fn cost(&self, tokens: &Tokens, factor: f64) -> Usd {
        tokens
            .by_kind()
            .into_iter()
            .zip(self.0)
            .map(|(n, per_million)| {
                // A million tokens at one dollar: one token is a whole number (10^6) of picodollars.
                let pico_per_token = (per_million * factor * 1e6).round();
                #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked to be positive; saturates")]
                Usd::from_pico((pico_per_token as u64).saturating_mul(n))
            })
            .sum()
    }
}

/// A rate that is negative or no number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadRate;

/// What one model costs from a day on.
#[derive(Clone, Debug, PartialEq)]
pub struct Price {
    /// The canonical name: see [`canonical`].
    pub model: Cow<'static, str>,
    /// First day on which it holds, as `YYYY-MM-DD` in UTC; the row with the latest day that is not in the future wins.
    pub from: Cow<'static, str>,
    pub rates: Rates,
    /// Above this many prompt tokens the whole request costs these.
    pub long_prompt: Option<(u64, Rates)>,
    /// Input and output in fast mode; its cache prices scale alike.
    pub fast: Option<[f64; 2]>,
}

/// Where the built-in rows are from, for people and for `…_price_table_info`.
pub const SOURCE: &str = "list prices as charged by Claude Code 2.1.330";
/// When the rows were last compared with that source.
pub const AS_OF: &str = "2026-11-23";
/// [`AS_OF`], as time since the Unix epoch.
pub fn as_of() -> Duration {
    Duration::from_secs(1_795_392_000)
}
/// A web search, on top of its tokens.
pub const WEB_SEARCH: Usd = Usd::from_pico(10_000_000_000);
/// A small container, by the hour: what providers ask for one or two cores with some memory.
pub const CONTAINER: Usd = Usd::from_pico(50_000_000_000);
/// Inference that has to stay in the United States costs this much more.
const GEO_US: f64 = 1.1;
const HOUR_NANOS: u128 = 3_600_000_000_000;
/// No price is known to have held only before a day.
const ALWAYS: &str = "1970-01-01";

/// `model, input, output, cache read, cache write 5m, cache write 1h, fast (input, output)`, dollars per million tokens.
type Row = (&'static str, [f64; 5], Option<[f64; 2]>);
#[rustfmt::skip]
const ROWS: &[Row] = &[
    ("claude-opus-5-5",   [4.0, 20.0, 0.20, 5.0, 8.0],     Some([8.0, 40.0])),
    ("claude-fable-5-2",  [8.0, 40.0, 0.20, 10.0, 16.0],   Some([16.0, 80.0])),
    ("claude-mythos-5-2", [8.0, 40.0, 0.20, 10.0, 16.0],   Some([16.0, 80.0])),
    ("claude-fable-5-1",  [10.0, 50.0, 0.25, 12.5, 20.0],  None),
    ("claude-mythos-5-1", [10.0, 50.0, 0.25, 12.5, 20.0],  None),
    ("claude-fable-5",    [10.0, 50.0, 1.0, 12.5, 20.0],   None),
    ("claude-mythos-5",   [10.0, 50.0, 1.0, 12.5, 20.0],   None),
    ("claude-sonnet-5-5", [2.0, 10.0, 0.10, 2.5, 4.0],     None),
    ("claude-sonnet-5",   [2.0, 10.0, 0.20, 2.5, 4.0],     None),
    ("claude-haiku-5-5",  [0.10, 0.50, 0.01, 0.125, 0.20], None),
    ("claude-opus-5",     [5.0, 25.0, 0.50, 6.25, 10.0],   Some([10.0, 50.0])),
    ("claude-opus-4-8",   [5.0, 25.0, 0.50, 6.25, 10.0],   Some([10.0, 50.0])),
    ("claude-opus-4-7",   [5.0, 25.0, 0.50, 6.25, 10.0],   Some([30.0, 150.0])),
    ("claude-opus-4-6",   [5.0, 25.0, 0.50, 6.25, 10.0],   Some([30.0, 150.0])),
    ("claude-opus-4-5",   [5.0, 25.0, 0.50, 6.25, 10.0],   None),
    ("claude-sonnet-4-6", [3.0, 15.0, 0.30, 3.75, 6.0],    None),
    ("claude-sonnet-4-5", [3.0, 15.0, 0.30, 3.75, 6.0],    None),
    ("claude-sonnet-4-0", [3.0, 15.0, 0.30, 3.75, 6.0],    None),
    ("claude-3-7-sonnet", [3.0, 15.0, 0.30, 3.75, 6.0],    None),
    ("claude-haiku-4-5",  [1.0, 5.0, 0.10, 1.25, 2.0],     None),
    ("claude-3-5-haiku",  [0.80, 4.0, 0.08, 1.0, 1.60],    None),
];
/// The only long-prompt tier there is: the whole request, from this many prompt tokens on.
const LONG_PROMPTS: &[(&str, u64, [f64; 5])] = &[("claude-haiku-5-5", 100_000, [0.50, 2.50, 0.05, 0.625, 1.0])];
/// Other names for the same model: what the CLI remaps, and older spellings.
const ALIASES: &[(&str, &str)] = &[
    ("claude-opus-4-1", "claude-opus-5-5"),
    ("claude-opus-4-0", "claude-opus-5-5"),
    ("claude-opus-4", "claude-opus-5-5"),
    ("claude-sonnet-4", "claude-sonnet-4-0"),
    ("claude-sonnet-3-7", "claude-3-7-sonnet"),
    ("opus", "claude-opus-5-5"),
    ("fable", "claude-fable-5-2"),
    ("sonnet", "claude-sonnet-5-5"),
    ("haiku", "claude-haiku-5-5"),
];

/// The table, with what a configuration laid over it.
#[derive(Clone, Debug)]
pub struct PriceTable {
    rows: Vec<Price>,
    own: Vec<Price>,
    /// For models that nobody prices.
    fallback: Option<Rates>,
    discount: f64,
    discounts: BTreeMap<String, f64>,
    /// Of the container, by the hour.
    container: Usd,
}

impl Default for PriceTable {
    fn default() -> PriceTable {
        let rows = ROWS
            .iter()
            .map(|&(model, rates, fast)| Price {
                model: model.into(),
                from: ALWAYS.into(),
                rates: Rates(rates),
                long_prompt: LONG_PROMPTS.iter().find(|tier| tier.0 == model).map(|tier| (tier.1, Rates(tier.2))),
                fast,
            })
            .collect();
        PriceTable { rows, own: Vec::new(), fallback: None, discount: 1.0, discounts: BTreeMap::new(), container: CONTAINER }
    }
}

impl PriceTable {
    /// A row of one's own; it wins over the built-in ones, and over the CLI's arithmetic.
    #[must_use]
    pub fn with_price(mut self, mut price: Price) -> PriceTable {
        price.model = canonical(&price.model).into_owned().into();
        self.own.push(price);
        self
    }

    /// What tokens cost whose model nobody prices.
    #[must_use]
    pub fn with_fallback(mut self, rates: Rates) -> PriceTable {
        self.fallback = Some(rates);
        self
    }

    /// What is paid of the list price: `0.8` for twenty percent off. For one model, or for all that have none of their own.
    #[must_use]
    pub fn with_discount(mut self, model: Option<&str>, factor: f64) -> PriceTable {
        match model {
            Some(model) => {
                self.discounts.insert(canonical(model).into_owned(), factor);
            }
            None => self.discount = factor,
        }
        self
    }

    /// What a token of each kind costs, and what it costs on the list, in picodollars before any discount: by what sums are divided
    /// among kinds.
    pub(crate) fn by_kind(&self, model: &str, at: Duration) -> Option<[[u64; 5]; 2]> {
        let model = canonical(model);
        let (own, listed) = (self.own_row(&model, at), latest(&self.rows, &model, at));
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked to be positive; saturates")]
        let whole = |row: &Price| row.rates.0.map(|per_million| (per_million * 1e6).round() as u64);
        Some([whole(own.or(listed)?), whole(listed.or(own)?)])
    }

    /// What the container costs by the hour; nothing, and nobody counts its hours.
    #[must_use]
    pub fn with_container(mut self, usd_per_hour: Usd) -> PriceTable {
        self.container = usd_per_hour;
        self
    }

    /// Whether the container's time is counted, and costs something.
    pub fn meters_container(&self) -> bool {
        !self.container.is_zero()
    }

    /// What it costs in so much time.
    pub fn container(&self, time: Duration) -> Usd {
        let pico = u128::from(self.container.pico()).saturating_mul(time.as_nanos());
        Usd::from_pico(u64::try_from((pico + HOUR_NANOS / 2) / HOUR_NANOS).unwrap_or(u64::MAX))
    }

    /// Whether a configuration changed anything for this model, so that the CLI's own figure is not what is paid.
    pub fn overrides(&self, model: &str, at: Duration) -> bool {
        let model = canonical(model);
        self.discount_of(&model) != 1.0 || self.own_row(&model, at).is_some()
    }

    /// Whether this model has a price at all, the fallback aside.
    pub fn knows(&self, model: &str, at: Duration) -> bool {
        self.row(&canonical(model), at).is_some()
    }

    /// What one answer costs. `None` where nobody prices the model and no fallback is set.
    pub fn answer(&self, model: &str, at: Duration, usage: &Usage) -> Option<Usd> {
        let model = canonical(model);
        self.priced(self.row(&model, at), usage, self.discount_of(&model))
    }

    /// The same at list prices: what the CLI will say that it costs, whatever a configuration makes of it.
    pub fn list(&self, model: &str, at: Duration, usage: &Usage) -> Option<Usd> {
        let model = canonical(model);
        self.priced(latest(&self.rows, &model, at).or_else(|| self.own_row(&model, at)), usage, 1.0)
    }

    fn priced(&self, row: Option<&Price>, usage: &Usage, factor: f64) -> Option<Usd> {
        let fast = usage.speed.as_deref() == Some("fast");
        let geo = if usage.inference_geo.as_deref() == Some("us") { GEO_US } else { 1.0 };
        let (rates, speed) = match row {
            Some(row) => {
                let rates = match row.long_prompt {
                    Some((above, long)) if usage.tokens.prompt() > above => long,
                    _ => row.rates,
                };
                // Fast mode is so many times the normal price, caches included.
                let speed = match row.fast {
                    Some([input, _]) if fast && row.rates.0[0] > 0.0 => input / row.rates.0[0],
                    _ => 1.0,
                };
                (rates, speed)
            }
            None => (self.fallback?, 1.0),
        };
        Some(rates.cost(&usage.tokens, factor * geo * speed) + scale(searches(usage.web_searches), factor))
    }

    /// What is paid for a sum that the CLI confirmed at `reported`: its own figure, unless a configuration knows better.
    pub fn confirmed(&self, model: &str, at: Duration, tokens: &Tokens, web_searches: u64, reported: Usd) -> Usd {
        let name = canonical(model);
        let factor = self.discount_of(&name);
        match self.own_row(&name, at) {
            Some(row) => row.rates.cost(tokens, factor) + scale(searches(web_searches), factor),
            None => scale(reported, factor),
        }
    }

    /// The fallback's price, for a sum whose model the CLI itself could not price.
    pub fn fallback_cost(&self, tokens: &Tokens) -> Option<Usd> {
        self.fallback.map(|rates| rates.cost(tokens, self.discount))
    }

    fn discount_of(&self, canonical: &str) -> f64 {
        self.discounts.get(canonical).copied().unwrap_or(self.discount)
    }

    fn own_row(&self, canonical: &str, at: Duration) -> Option<&Price> {
        latest(&self.own, canonical, at)
    }

    fn row(&self, canonical: &str, at: Duration) -> Option<&Price> {
        self.own_row(canonical, at).or_else(|| latest(&self.rows, canonical, at))
    }
}

fn latest<'a>(rows: &'a [Price], model: &str, at: Duration) -> Option<&'a Price> {
    // Most prices have always held, and this is asked for each answer.
    let today = LazyCell::new(|| day(at));
    let holds = |row: &&Price| *row.from == *ALWAYS || *row.from <= **today;
    // The later of two equal days wins: it was added later.
    rows.iter().filter(|row| row.model == model).filter(holds).max_by(|a, b| a.from.cmp(&b.from))
}

fn searches(n: u64) -> Usd {
    Usd::from_pico(WEB_SEARCH.pico().saturating_mul(n))
}

fn scale(usd: Usd, factor: f64) -> Usd {
    if factor == 1.0 { usd } else { Usd::from_f64(usd.to_f64() * factor) }
}

/// The UTC day of a moment, as `YYYY-MM-DD`: days compare as text.
/// The day that it is, in UTC: `YYYY-MM-DD`.
pub(crate) fn day(at: Duration) -> String {
    // Civil-from-days, after Howard Hinnant's public algorithm; days since 1970 are never negative here.
    let z = at.as_secs() / 86_400 + 719_468;
    let era = z / 146_097;
    let doe = z % 146_097;
    let yoe = (doe - doe / 1_460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let (d, m) = (doy - (153 * mp + 2) / 5 + 1, if mp < 10 { mp + 3 } else { mp - 9 });
    let y = yoe + era * 400 + u64::from(m <= 2);
    format!("{y:04}-{m:02}-{d:02}")
}

/// One name for one model: without the context suffix (`[1m]`), the date, and what Bedrock and Vertex put around it.
pub fn canonical(model: &str) -> Cow<'_, str> {
    let mut name = model.trim();
    if let Some(at) = name.find('[') {
        name = &name[..at];
    }
    // us.anthropic.claude-sonnet-4-5-20250929-v1:0, anthropic.claude-…, arn:…/us.anthropic.claude-…
    if let Some(at) = name.find("anthropic.") {
        name = &name[at + "anthropic.".len()..];
        name = name.split(':').next().unwrap_or(name);
        if let Some((head, version)) = name.rsplit_once("-v")
            && version.bytes().all(|b| b.is_ascii_digit())
        {
            name = head;
        }
    }
    // claude-sonnet-4-5@20250929
    name = name.split('@').next().unwrap_or(name);
    if let Some((head, date)) = name.rsplit_once('-')
        && date.len() == 8
        && date.bytes().all(|b| b.is_ascii_digit())
    {
        name = head;
    }
    name = name.strip_suffix("-latest").unwrap_or(name);
    match ALIASES.iter().find(|(alias, _)| *alias == name) {
        Some((_, model)) => Cow::Borrowed(*model),
        None => Cow::Borrowed(name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::from_secs(1_795_392_000); // 2026-11-23

    fn usage(tokens: [u64; 5]) -> Usage {
        Usage { tokens: Tokens::from_kinds(tokens), ..Usage::default() }
    }

    #[test]
    fn an_answer_costs_what_the_cli_says_it_does() {
        let table = PriceTable::default();
        let cost = |model, usage: &Usage| table.answer(model, NOW, usage).map(|usd| usd.to_string());
        // The first answer of a recorded session: 12 in, 120 out, 5,000 read, 800 written.
        assert_eq!(cost("claude-opus-5-5", &usage([12, 120, 5000, 800, 0])).as_deref(), Some("0.007448"));
        assert_eq!(cost("claude-opus-4-8[1m]", &usage([36, 360, 30_000, 2400, 0])).as_deref(), Some("0.03918"));
        assert_eq!(cost("claude-haiku-5-5", &usage([100_000, 0, 0, 0, 0])).as_deref(), Some("0.01"));
        assert_eq!(cost("claude-haiku-5-5", &usage([100_001, 0, 0, 0, 0])).as_deref(), Some("0.0500005"));
        let mut search = usage([0, 1000, 0, 0, 0]);
        search.web_searches = 3;
        assert_eq!(cost("opus", &search).as_deref(), Some("0.05"));
        let us = Usage { inference_geo: Some("us".into()), ..usage([1000, 0, 0, 0, 0]) };
        assert_eq!(cost("claude-opus-5-5", &us).as_deref(), Some("0.0044"));
        let fast = Usage { speed: Some("fast".into()), ..usage([1000, 1000, 0, 0, 0]) };
        assert_eq!(cost("claude-opus-4-7", &fast).as_deref(), Some("0.18"));
        assert_eq!(cost("gpt-5", &usage([1, 0, 0, 0, 0])), None);
    }

    #[test]
    fn a_model_has_one_name() {
        for (name, expected) in [
            ("claude-opus-4-8[1m]", "claude-opus-4-8"),
            ("us.anthropic.claude-sonnet-4-5-20250929-v1:0", "claude-sonnet-4-5"),
            ("claude-sonnet-4-5@20250929", "claude-sonnet-4-5"),
            ("claude-3-5-haiku-20241022", "claude-3-5-haiku"),
            ("claude-opus-4-1-20250805", "claude-opus-5-5"),
            ("claude-bogus-9", "claude-bogus-9"),
        ] {
            assert_eq!(canonical(name), expected, "{name}");
        }
    }

    #[test]
    fn a_configuration_wins_from_its_day_on() {
        let table = PriceTable::default()
            .with_price(Price {
                model: "house-model".into(),
                from: "2026-11-24".into(),
                rates: Rates::new([1.0; 5]).unwrap(),
                long_prompt: None,
                fast: None,
            })
            .with_discount(None, 0.5)
            .with_fallback(Rates::new([2.0; 5]).unwrap());
        let one = usage([1_000_000, 0, 0, 0, 0]);
        assert_eq!(table.answer("house-model", NOW, &one), Some(Usd::from_f64(1.0)), "the fallback, half off, a day before");
        let tomorrow = NOW + Duration::from_secs(86_400);
        assert_eq!(table.answer("house-model", tomorrow, &one), Some(Usd::from_f64(0.5)));
        assert_eq!(table.confirmed("claude-opus-5-5", NOW, &one.tokens, 0, Usd::from_f64(4.0)), Usd::from_f64(2.0));
        assert_eq!(Rates::new([-1.0, 0.0, 0.0, 0.0, 0.0]), Err(BadRate));
    }

    #[test]
    fn days_are_days() {
        for (secs, expected) in [(0, "1970-01-01"), (951_782_400, "2000-02-29"), (1_795_392_000, "2026-11-23")] {
            assert_eq!(day(Duration::from_secs(secs)), expected);
        }
        assert_eq!(day(as_of()), AS_OF);
    }
}
