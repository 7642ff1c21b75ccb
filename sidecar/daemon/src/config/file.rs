//! The configuration file: TOML, read as far as it can be, so that one slip does not hide the next mistake.

use std::ops::Range;
use std::path::Path;

use agent_sidecar_core::limit::Mode;
use agent_sidecar_core::price::{Price, Rates};
use agent_sidecar_core::written::near;
use toml::Spanned;
use toml::de::{DeArray, DeTable, DeValue};

use super::{Config, Kind, Mistake, Origin, RULES, SETTINGS, Value, renamed};

/// What is no single value, and how it is written.
const TABLES: &[(&str, &str)] = &[
    ("limits", "write [limits] above its keys"),
    ("limits.modes", "write [limits.modes] above lines like max_cost_usd = \"shadow\""),
    ("stop", "write [stop] above its keys"),
    ("hub", "write [hub] above its keys"),
    ("ledger", "write [ledger] above its keys"),
    ("otlp", "write [otlp] above its keys"),
    ("log", "write [log] above its keys"),
    ("relay", "write [relay] above its keys"),
    ("run", "write [run] above its keys"),
    ("policy", "write [policy] above final = [\"limits.*\"]"),
    ("policy.final", "write a list, like [\"limits.*\", \"hub.control\"]"),
    ("usage", "write [usage] above its keys"),
    ("metrics", "write [metrics] above its keys"),
    ("labels", "write [labels] above its keys"),
    ("tenants", "write [tenants] above its keys"),
    ("disk", "write [disk] above its keys"),
    ("prices", "write [prices] above its keys, and [[prices.model]] above each price"),
    ("prices.model", "write [[prices.model]] above each price"),
    ("prices.fallback", "write it like { input = 5, output = 25 }"),
];

struct Reader<'a> {
    path: &'a Path,
    text: &'a str,
    mistakes: &'a mut Vec<Mistake>,
}

pub(super) fn read(config: &mut Config, path: &Path, text: &str, mistakes: &mut Vec<Mistake>) {
    let (table, errors) = DeTable::parse_recoverable(text);
    let mut reader = Reader { path, text, mistakes };
    for error in errors {
        let span = error.span().unwrap_or_default();
        reader.wrong(span, error.message().to_owned(), "mend the TOML here; text goes in quotes");
    }
    reader.table(config, table.get_ref(), "");
}

impl Reader<'_> {
    fn origin(&self, span: &Range<usize>) -> Origin {
        let before = &self.text.as_bytes()[..span.start.min(self.text.len())];
        let line = before.iter().filter(|byte| **byte == b'\n').count() + 1;
        let start = before.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        let column = String::from_utf8_lossy(&before[start..]).chars().count() + 1;
        Origin::File { path: self.path.to_owned(), line, column }
    }

    fn wrong(&mut self, span: Range<usize>, what: String, remedy: impl Into<String>) {
        let origin = self.origin(&span);
        self.mistakes.push(Mistake { origin, what, remedy: remedy.into() });
    }

    fn table(&mut self, config: &mut Config, table: &DeTable<'_>, prefix: &str) {
        for (key, value) in table {
            let name = format!("{prefix}{}", key.get_ref());
            let at = key.span();
            match value.get_ref() {
                DeValue::Table(modes) if name == "limits.modes" => self.modes(config, modes),
                DeValue::Array(rows) if name == "prices.model" => self.prices(config, rows),
                DeValue::Table(policy) if name == "policy" => self.table(config, policy, "policy."),
                DeValue::Array(keys) if name == "policy.final" => self.finals(config, keys),
                DeValue::Table(rates) if name == "prices.fallback" => {
                    if let Some(rates) = self.rates(rates, at, "prices.fallback") {
                        config.prices = config.prices.clone().with_fallback(rates);
                    }
                }
                DeValue::Table(inner) if SETTINGS.iter().any(|setting| setting.key.starts_with(&format!("{name}."))) => {
                    self.table(config, inner, &format!("{name}."));
                }
                _ => match SETTINGS.iter().find(|setting| setting.key == name) {
                    Some(setting) => {
                        let origin = self.origin(&value.span());
                        match plain(value.get_ref(), setting.kind) {
                            Some(text) => config.set(setting, &text, origin, self.mistakes),
                            None => {
                                let what = format!("`{name}` is {}, not {}", setting.kind.noun(), form(value.get_ref()));
                                self.wrong(value.span(), what, setting.kind.remedy());
                            }
                        }
                    }
                    None => match TABLES.iter().find(|(table, _)| *table == name) {
                        Some((_, remedy)) => {
                            self.wrong(value.span(), format!("`{name}` is more than {}", form(value.get_ref())), *remedy);
                        }
                        None if renamed(&name).is_some() => {
                            let now = renamed(&name)
                                .map_or_else(String::new, |now| format!("set `{}` instead; it is {}", now.key, now.help));
                            self.wrong(at, format!("there is no setting `{name}` any more"), now);
                        }
                        None => {
                            let known = SETTINGS.iter().map(|setting| setting.key).chain(TABLES.iter().map(|(table, _)| *table));
                            let remedy = nearest(&name, known);
                            self.wrong(at, format!("there is no setting `{name}`"), remedy);
                        }
                    },
                },
            }
        }
    }

    fn modes(&mut self, config: &mut Config, modes: &DeTable<'_>) {
        for (key, value) in modes {
            let name = key.get_ref();
            let Some((known, ..)) = RULES.iter().find(|(rule, ..)| rule == name) else {
                let remedy = nearest(name, RULES.iter().map(|(rule, ..)| *rule));
                self.wrong(key.span(), format!("there is no limit `{name}`"), remedy);
                continue;
            };
            let mode = value.get_ref().as_str().and_then(|text| Mode::ALL.iter().find(|mode| mode.as_str() == text));
            match mode {
                Some(mode) => {
                    let origin = self.origin(&value.span());
                    config.modes.insert(known, (*mode, origin));
                }
                None => {
                    let what = format!("`limits.modes.{name}` is a mode, not {}", form(value.get_ref()));
                    self.wrong(value.span(), what, Kind::Mode.remedy());
                }
            }
        }
    }

    /// What nobody may loosen who comes after this file.
    fn finals(&mut self, config: &mut Config, keys: &DeArray<'_>) {
        for key in keys {
            let Some(name) = key.get_ref().as_str() else {
                let what = format!("`policy.final` is a list of settings, not of {}", form(key.get_ref()));
                self.wrong(key.span(), what, "write them in quotes, like \"limits.*\"");
                continue;
            };
            let table = name.strip_suffix('*').filter(|table| table.is_empty() || table.ends_with('.'));
            let known = match table {
                Some(table) => SETTINGS.iter().any(|setting| setting.key.starts_with(table)),
                None => SETTINGS.iter().any(|setting| setting.key == name),
            };
            if known {
                config.finals.push((name.to_owned(), self.origin(&key.span())));
            } else {
                let remedy = nearest(name, SETTINGS.iter().map(|setting| setting.key));
                self.wrong(key.span(), format!("there is no setting `{name}`"), remedy);
            }
        }
    }

    fn prices(&mut self, config: &mut Config, rows: &DeArray<'_>) {
        for row in rows {
            let DeValue::Table(table) = row.get_ref() else {
                self.wrong(row.span(), String::from("`prices.model` is a list of tables"), "write [[prices.model]] above each");
                continue;
            };
            let text = |name: &str| table.get(name).and_then(|value| value.get_ref().as_str());
            let Some(model) = text("name") else {
                self.wrong(row.span(), String::from("a price is for a model"), "add name = \"claude-…\"");
                continue;
            };
            let from = text("from").unwrap_or("1970-01-01");
            if !is_day(from) {
                let span = table.get("from").map_or_else(|| row.span(), Spanned::span);
                self.wrong(span, format!("`from` is a day, not `{from}`"), "write it like \"2026-11-23\"");
                continue;
            }
            if let Some(factor) = table.get("discount") {
                match plain(factor.get_ref(), Kind::Factor).as_deref().map(|text| Kind::Factor.parse(text)) {
                    Some(Ok(Value::Factor(factor))) => {
                        config.prices = config.prices.clone().with_discount(Some(model), factor);
                    }
                    _ => {
                        self.wrong(factor.span(), String::from("`discount` is a factor"), Kind::Factor.remedy());
                        continue;
                    }
                }
                if !table.contains_key("input") {
                    continue;
                }
            }
            if let Some(rates) = self.rates(table, row.span(), "prices.model") {
                let price =
                    Price { model: model.to_owned().into(), from: from.to_owned().into(), rates, long_prompt: None, fast: None };
                config.prices = config.prices.clone().with_price(price);
            }
        }
    }

    /// Dollars per million tokens of each kind; what caching costs follows from the input where it is not said.
    fn rates(&mut self, table: &DeTable<'_>, at: Range<usize>, name: &str) -> Option<Rates> {
        const KINDS: [&str; 5] = ["input", "output", "cache_read", "cache_write_5m", "cache_write_1h"];
        let before = self.mistakes.len();
        for (key, _) in table {
            let known = KINDS.iter().chain(&["name", "from", "discount"]);
            if !known.clone().any(|known| known == key.get_ref()) {
                let remedy = nearest(key.get_ref(), known.copied());
                self.wrong(key.span(), format!("`{name}` has no `{}`", key.get_ref()), remedy);
            }
        }
        let mut rate = |kind: &str| {
            let value = table.get(kind)?;
            let number =
                plain(value.get_ref(), Kind::Money).and_then(|text| text.parse::<f64>().ok()).filter(|rate| *rate >= 0.0);
            if number.is_none() {
                self.wrong(
                    value.span(),
                    format!("`{kind}` is dollars for a million tokens, not {}", form(value.get_ref())),
                    "write a number, like 2.50",
                );
            }
            number
        };
        let (input, output) = (rate("input"), rate("output"));
        let (read, write_5m, write_1h) = (rate("cache_read"), rate("cache_write_5m"), rate("cache_write_1h"));
        if self.mistakes.len() > before {
            return None;
        }
        let (Some(input), Some(output)) = (input, output) else {
            self.wrong(at, format!("`{name}` needs at least `input` and `output`"), "add them, in dollars for a million tokens");
            return None;
        };
        // The usual proportions of the list.
        let rates =
            [input, output, read.unwrap_or(input * 0.1), write_5m.unwrap_or(input * 1.25), write_1h.unwrap_or(input * 2.0)];
        Rates::new(rates).ok()
    }
}

/// A value as it would be written in the environment, if TOML's type suits the setting.
fn plain(value: &DeValue<'_>, kind: Kind) -> Option<String> {
    match (value, kind) {
        (DeValue::String(text), _) => Some(text.to_string()),
        (DeValue::Boolean(yes), Kind::Switch) => Some(yes.to_string()),
        (DeValue::Integer(n), Kind::Count | Kind::Money | Kind::Price | Kind::Code | Kind::Factor | Kind::Size) => {
            Some(n.as_str().replace('_', ""))
        }
        (DeValue::Float(n), Kind::Money | Kind::Price | Kind::Factor) => Some(n.as_str().to_owned()),
        _ => None,
    }
}

fn form(value: &DeValue<'_>) -> String {
    match value {
        DeValue::String(text) => format!("the text `{text}`"),
        DeValue::Integer(n) => format!("the number `{}`", n.as_str()),
        DeValue::Float(n) => format!("the number `{}`", n.as_str()),
        DeValue::Boolean(yes) => format!("`{yes}`"),
        DeValue::Datetime(_) => String::from("a date"),
        DeValue::Array(_) => String::from("a list"),
        DeValue::Table(_) => String::from("a table"),
    }
}

fn is_day(text: &str) -> bool {
    let bytes = text.as_bytes();
    bytes.len() == 10
        && bytes.iter().enumerate().all(|(i, byte)| if i == 4 || i == 7 { *byte == b'-' } else { byte.is_ascii_digit() })
}

/// "Did you mean", where something was meant: a key of another table, or one that is nearly the same.
fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str> + Clone) -> String {
    let last = |name: &str| name.rsplit('.').next().unwrap_or(name).to_owned();
    let elsewhere = known.clone().find(|known| *known != name && last(known) == last(name));
    match elsewhere.or_else(|| near(name, known, |name| name)) {
        Some(known) => format!("did you mean `{known}`?"),
        None => String::from("remove it; `agent-sidecar check --print` lists what there is"),
    }
}
