//! What may be set, where it was set, and every mistake in it at once.
//!
//! Defaults < the file < `AGENT_SIDECAR_*` < flags. [`SETTINGS`] is the one list: the file's keys, the environment's names, the flags,
//! `check --print` and the reference page are made from it. A setting has one text form wherever it comes from.

mod asked;
mod file;
mod names;
mod table;
mod value;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use agent_sidecar_core::limit::Mode;
use agent_sidecar_core::price::PriceTable;
use agent_sidecar_core::tokens::Usd;
use agent_sidecar_core::who::{self, Name};

use crate::busy;
use crate::export::otlp::environment::Headers;
use crate::files;
use crate::hub::gate::Token;

pub(crate) use names::variable;
use names::{PREFIX, WITHHELD, is_kubernetes, is_ours, renamed, slip, stranger};
use table::{RULES, is_limit};
pub(crate) use table::{SETTINGS, Setting};
pub(crate) use value::{Kind, Value};

/// Read if it is there, when no `--config` names another.
pub(crate) const DEFAULT_FILE: &str = "/etc/agent-sidecar/config.toml";

/// Where a value came from, in the order in which they are read.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Origin {
    Default,
    /// File, line and column, both from one.
    File {
        path: PathBuf,
        line: usize,
        column: usize,
    },
    Environment(String),
    Flag(&'static str),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Default => f.write_str("default"),
            Origin::File { path, line, column } => write!(f, "{}:{line}:{column}", path.display()),
            Origin::Environment(name) => f.write_str(name),
            Origin::Flag(flag) => write!(f, "--{flag}"),
        }
    }
}

/// Something that is wrong, where, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mistake {
    pub(crate) origin: Origin,
    pub(crate) what: String,
    pub(crate) remedy: String,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}; {}", self.origin, self.what, self.remedy)
    }
}

/// All that is wrong with a configuration.
#[derive(Debug, thiserror::Error)]
pub(crate) struct Mistakes(pub(crate) Vec<Mistake>);

impl fmt::Display for Mistakes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the configuration has {} mistake{}", self.0.len(), if self.0.len() == 1 { "" } else { "s" })?;
        for mistake in &self.0 {
            write!(f, "\n  {mistake}")?;
        }
        Ok(())
    }
}

/// A value in force.
#[derive(Clone, Debug)]
pub(crate) struct Effective {
    /// As it was written.
    pub(crate) text: String,
    pub(crate) value: Option<Value>,
    pub(crate) origin: Origin,
}

/// Where settings are read from: handed in, so that a test has its own.
#[derive(Debug, Default)]
pub(crate) struct Sources {
    /// The file and its text.
    pub(crate) file: Option<(PathBuf, String)>,
    /// The file that should be there and cannot be read: one more mistake, and no reason to be silent about the others.
    pub(crate) unreadable: Option<Mistake>,
    /// Variables by their whole names.
    pub(crate) environment: Vec<(String, String)>,
    /// Flags by their names, without dashes.
    pub(crate) flags: Vec<(&'static str, String)>,
}

impl Sources {
    /// The named file, or the default one if it is there, and this process's environment.
    pub(crate) fn system(config: Option<&Path>, flags: Vec<(&'static str, String)>) -> Sources {
        let (file, unreadable) = Sources::file(config, Path::new(DEFAULT_FILE));
        let environment = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.to_string_lossy().into_owned())))
            .filter(|(name, _)| name.starts_with(PREFIX))
            .collect();
        Sources { file, unreadable, environment, flags }
    }

    /// The file to read, or what is wrong with it. Where the usual one has settings that are final, no other is read instead.
    fn file(config: Option<&Path>, usual: &Path) -> (Option<(PathBuf, String)>, Option<Mistake>) {
        if let Some(other) = config.filter(|other| *other != usual)
            && let Ok(text) = std::fs::read_to_string(usual)
        {
            let known = Sources { file: Some((usual.to_owned(), text)), ..Sources::default() };
            if let Some((_, by)) = Config::read(&known).0.finals.first() {
                let origin = Origin::File { path: other.to_owned(), line: 1, column: 1 };
                let remedy = String::from("leave --config out, or have the settings changed in that file");
                let what = format!("this file is not read: another has settings that are final ({by})");
                return (known.file, Some(Mistake { origin, what, remedy }));
            }
        }
        let path = config.unwrap_or(usual);
        // One that somebody named may be a pipe; the usual one is a file, or somebody's trap.
        let read = config.map_or_else(|| files::read_linked(usual), std::fs::read_to_string);
        match read {
            Ok(text) => (Some((path.to_owned(), text)), None),
            Err(error) if config.is_none() && error.kind() == std::io::ErrorKind::NotFound => (None, None),
            Err(error) => {
                let origin = Origin::File { path: path.to_owned(), line: 1, column: 1 };
                let remedy = String::from("name a readable file with --config, or leave it out");
                (None, Some(Mistake { origin, what: format!("the file cannot be read: {error}"), remedy }))
            }
        }
    }
}

/// The effective configuration.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    values: BTreeMap<&'static str, Effective>,
    modes: BTreeMap<&'static str, (Mode, Origin)>,
    pub(crate) prices: PriceTable,
    /// The file that was read.
    file: Option<PathBuf>,
    /// Settings, or tables of them (`limits.*`), that environment and flags cannot loosen, and where that is said.
    finals: Vec<(String, Origin)>,
    /// Variables under our prefix that are nobody's here.
    strangers: Vec<Mistake>,
}

impl Config {
    /// # Errors
    /// Every mistake of every source.
    pub(crate) fn load(sources: &Sources) -> Result<Config, Mistakes> {
        let (config, mistakes) = Config::read(sources);
        if mistakes.is_empty() { Ok(config) } else { Err(Mistakes(mistakes)) }
    }

    /// What can be read, and what is wrong with the rest. A setting with a mistake in it stays as an earlier source has it.
    pub(crate) fn read(sources: &Sources) -> (Config, Vec<Mistake>) {
        let mut mistakes: Vec<Mistake> = sources.unreadable.iter().cloned().collect();
        let mut values = BTreeMap::new();
        for setting in SETTINGS {
            let value = (!setting.default.is_empty())
                .then(|| setting.kind.parse(setting.default).expect("defaults are right: a test reads them all"));
            values.insert(setting.key, Effective { text: setting.default.to_owned(), value, origin: Origin::Default });
        }
        let mut config = Config {
            values,
            modes: BTreeMap::new(),
            prices: PriceTable::default(),
            file: None,
            finals: Vec::new(),
            strangers: Vec::new(),
        };
        if let Some((path, text)) = &sources.file {
            config.file = Some(path.clone());
            file::read(&mut config, path, text, &mut mistakes);
        }
        for (name, text) in &sources.environment {
            match SETTINGS.iter().find(|setting| variable(setting) == *name) {
                Some(setting) => config.set(setting, text, Origin::Environment(name.clone()), &mut mistakes),
                None if is_ours(name) || is_kubernetes(name, text) => {}
                None => match slip(name) {
                    Some(mistake) => mistakes.push(mistake),
                    None => config.strangers.push(stranger(name)),
                },
            }
        }
        for (flag, text) in &sources.flags {
            if let Some(setting) = SETTINGS.iter().find(|setting| setting.flag == *flag) {
                config.set(setting, text, Origin::Flag(setting.flag), &mut mistakes);
            }
        }
        if let Some(Value::Factor(factor)) = config.value("prices.discount") {
            config.prices = config.prices.clone().with_discount(None, *factor);
        }
        if let Some(Value::Money(usd)) = config.value("prices.container_usd_per_hour") {
            config.prices = config.prices.clone().with_container(Usd::from_f64(*usd));
        }
        config.contradictions(&mut mistakes);
        // What was not understood may have been the token: then no word is right, and not none asked for.
        if !mistakes.is_empty() && config.switch("hub.control") && !config.has_token() {
            config.values.get_mut("hub.control_token").expect("it is a setting").value = Some(Value::Token(Token::Lost));
        }
        mistakes.sort_by(|a, b| a.origin.cmp(&b.origin));
        (config, mistakes)
    }

    fn set(&mut self, setting: &'static Setting, text: &str, origin: Origin, mistakes: &mut Vec<Mistake>) {
        let text = text.trim();
        // What has no default can be unset again by a later source, and every limit.
        let unset = (setting.default.is_empty() || is_limit(setting.key)) && matches!(text, "" | "off" | "none");
        let value = match setting.kind.parse(text) {
            _ if unset => None,
            Ok(value) => Some(value),
            Err(wrong) => {
                mistakes.push(Mistake {
                    origin: origin.clone(),
                    what: format!("`{}` {wrong}", setting.key),
                    remedy: setting.kind.remedy(),
                });
                // A fence that is not understood is not left out: nobody is called so, and nothing is started.
                if setting.kind == Kind::User {
                    self.values.insert(setting.key, Effective { text: text.to_owned(), value: Some(Value::Text), origin });
                }
                return;
            }
        };
        if let Some(refused) = self.loosens(setting, value.as_ref(), text, &origin) {
            mistakes.push(refused);
            return;
        }
        // Keys are kept as values alone, which do not print: not in `check --print`, and not in the fingerprint.
        let hidden = matches!(value, Some(Value::Headers(_) | Value::Secret(_) | Value::Token(_)));
        let text = if hidden { "(hidden)" } else { text };
        self.values.insert(setting.key, Effective { text: text.to_owned(), value, origin });
    }

    /// What is wrong with a value that comes after the file, where the file is to have the last word: a ceiling may be lowered, a mode
    /// made stricter, and nothing else be changed.
    fn loosens(&self, setting: &Setting, value: Option<&Value>, text: &str, origin: &Origin) -> Option<Mistake> {
        if !matches!(origin, Origin::Environment(_) | Origin::Flag(_)) {
            return None;
        }
        let of = |name: &str| match name.strip_suffix('*') {
            Some(table) => setting.key.starts_with(table),
            None => setting.key == name,
        };
        let (_, by) = self.finals.iter().find(|(name, _)| of(name))?;
        let before = &self.values[setting.key];
        let lowers = (is_limit(setting.key) || setting.key == "limits.max_sessions") && setting.key != "limits.memory_horizon";
        let well = match (value, &before.value) {
            // A key has no business in a file that all can read, and control is less without than with.
            (Some(Value::Token(_)), None) => !self.has_token(),
            (Some(Value::Headers(_) | Value::Secret(_)), None) => true,
            (Some(Value::Switch(false)), _) if setting.key == "hub.control" => true,
            (Some(Value::Mode(new)), Some(Value::Mode(old))) => new >= old,
            (Some(new), Some(old)) if lowers => new.number() <= old.number(),
            (Some(_), None) if lowers => true,
            (new, old) => new == old.as_ref() && (text == before.text || !matches!(new, None | Some(Value::Text))),
        };
        let may = if lowers { "only be lowered" } else { "not be changed" };
        let is = if before.text.is_empty() { "unset" } else { &before.text };
        (!well).then(|| Mistake {
            origin: origin.clone(),
            what: format!("`{}` is {is}, and may {may} here: it is final ({by})", setting.key),
            remedy: String::from("leave it out, or have it changed in that file"),
        })
    }

    /// Settings that are each right and cannot all be meant.
    fn contradictions(&self, mistakes: &mut Vec<Mistake>) {
        for (inner, outer) in [
            ("limits.turn_max_cost_usd", "limits.max_cost_usd"),
            ("limits.turn_max_tokens", "limits.max_tokens"),
            ("limits.turn_max_duration", "limits.max_duration"),
            ("limits.tool_max_duration", "limits.max_duration"),
            ("limits.subagent_max_duration", "limits.max_duration"),
            ("limits.max_turns", "limits.session_max_turns"),
        ] {
            if let (Some(turn), Some(session)) = (self.value(inner), self.value(outer))
                && turn.number() > session.number()
            {
                mistakes.push(Mistake {
                    origin: self.values[inner].origin.clone(),
                    what: format!("`{inner}` ({}) is above `{outer}` ({})", self.text(inner), self.text(outer)),
                    remedy: String::from("lower it, or raise the other"),
                });
            }
        }
        // A signal skips the interrupt: what has to fit is the rest, and the reading of the last numbers.
        let flush = if self.value("otlp.endpoint").is_some() { self.time("otlp.flush") } else { None };
        let webhook = self.value("busy.webhook").map(|_| busy::ANSWER);
        let fleet = self.value("fleet.url").map(|_| busy::ANSWER);
        let after = self.linger() + flush.unwrap_or_default() + webhook.unwrap_or_default() + fleet.unwrap_or_default();
        let needed = self.patience().end + self.patience().terminate + after;
        let grace = self.time("stop.platform_grace").unwrap_or(Duration::MAX);
        if needed >= grace {
            mistakes.push(Mistake {
                origin: self.values["stop.platform_grace"].origin.clone(),
                what: format!(
                    "a stop may take {needed:?} (stop.end + stop.terminate + linger, and where they are used otlp.flush and 2s each for busy.webhook and fleet.url), and the platform kills after {grace:?}"
                ),
                remedy: String::from(
                    "raise the platform's grace period and `stop.platform_grace` with it, or shorten the others",
                ),
            });
        }
        for (one, other) in [("otlp.client_certificate", "otlp.client_key"), ("otlp.client_key", "otlp.client_certificate")] {
            if self.value(one).is_some() && self.value(other).is_none() {
                mistakes.push(Mistake {
                    origin: self.values[one].origin.clone(),
                    what: format!("`{one}` is of no use without `{other}`"),
                    remedy: String::from("set both, or none"),
                });
            }
        }
        let shared = RULES.iter().filter(|(_, _, scope)| scope.shared().is_some());
        for (name, _, scope) in shared {
            let key = format!("limits.{name}");
            let Some(effective) = self.values.get(key.as_str()).filter(|effective| effective.value.is_some()) else { continue };
            let of_tenant = scope.of_tenant();
            let (what, remedy) = if self.meeting().is_none() {
                ("and agents that do not meet share nothing", "set `listen` to an address with a port, or name `hub.socket`")
            } else if of_tenant && self.fixed_who().tenant.is_none() && self.sources_of(Name::Tenant).is_none() {
                ("and there is no tenant", "set `labels.tenant` or `labels.tenant_from`")
            } else {
                continue;
            };
            let what = format!("`{key}` is a budget that agents share, {what}");
            mistakes.push(Mistake { origin: effective.origin.clone(), what, remedy: remedy.to_owned() });
        }
        if self.guard() == Mode::Enforce && self.meeting().is_none() {
            mistakes.push(Mistake {
                origin: self.values["tenants.guard"].origin.clone(),
                what: String::from("`tenants.guard` knows what agents share that meet, and these do not"),
                remedy: String::from("set `listen` to an address with a port, or name `hub.socket`"),
            });
        }
        if self.sources("tenants.agent_from").is_some_and(who::Sources::is_late) {
            mistakes.push(Mistake {
                origin: self.values["tenants.agent_from"].origin.clone(),
                what: String::from("`tenants.agent_from` names a directory that has to be there before the app says anything"),
                remedy: String::from("leave message: out, and use env: or arg:"),
            });
        }
        if self.value("labels.user_hash_key").is_some() && !self.switch("labels.user_hash") {
            mistakes.push(Mistake {
                origin: self.values["labels.user_hash_key"].origin.clone(),
                what: String::from("`labels.user_hash_key` is of no use without `labels.user_hash`"),
                remedy: String::from("set `labels.user_hash`, or leave the key out"),
            });
        }
        if self.max_sessions().is_some() && self.meeting().is_none() {
            mistakes.push(Mistake {
                origin: self.values["limits.max_sessions"].origin.clone(),
                what: String::from("`limits.max_sessions` is for agents that meet, and these do not"),
                remedy: String::from("set `listen` to an address with a port, or name `hub.socket`"),
            });
        }
        let has_token = self.value("fleet.token").is_some() || self.value("fleet.token_file").is_some();
        for key in ["conversation.serve", "fleet.url"] {
            let wants = if key == "fleet.url" { self.value(key).is_some() } else { self.switch(key) };
            if wants && !has_token {
                mistakes.push(Mistake {
                    origin: self.values[key].origin.clone(),
                    what: format!("`{key}` is for who knows the container's token, and there is none"),
                    remedy: String::from("set `fleet.token` or `fleet.token_file`"),
                });
            }
        }
        if !self.conversation_wait().is_zero() && !self.switch("conversation.serve") {
            mistakes.push(Mistake {
                origin: self.values["conversation.wait"].origin.clone(),
                what: String::from("`conversation.wait` waits for what nobody can bring"),
                remedy: String::from("set `conversation.serve`, or leave it out"),
            });
        }
        if !self.linger().is_zero() && self.listen().is_none() {
            mistakes.push(Mistake {
                origin: self.values["linger"].origin.clone(),
                what: String::from("`linger` waits for somebody to read the metrics, and `listen` is off"),
                remedy: String::from("set `listen`, or leave `linger` out"),
            });
        }
    }

    /// Variables that look like settings and are none, so many of them at most as anybody reads.
    pub(crate) fn strangers(&self) -> &[Mistake] {
        &self.strangers[..self.strangers.len().min(10)]
    }

    fn value(&self, key: &str) -> Option<&Value> {
        self.values.get(key).and_then(|effective| effective.value.as_ref())
    }

    fn text(&self, key: &str) -> &str {
        self.values.get(key).map_or("", |effective| effective.text.as_str())
    }

    fn time(&self, key: &str) -> Option<Duration> {
        match self.value(key) {
            Some(Value::Time(time)) => Some(*time),
            _ => None,
        }
    }

    fn count(&self, key: &str) -> Option<u64> {
        match self.value(key) {
            Some(Value::Count(n) | Value::Size(n)) => Some(*n),
            _ => None,
        }
    }

    fn switch(&self, key: &str) -> bool {
        matches!(self.value(key), Some(Value::Switch(true)))
    }

    fn path(&self, key: &str) -> Option<PathBuf> {
        self.value(key).map(|_| PathBuf::from(self.text(key)))
    }

    fn headers(&self, key: &str) -> Option<Headers> {
        match self.value(key) {
            Some(Value::Headers(headers)) => Some(headers.clone()),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests;
