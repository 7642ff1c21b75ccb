//! What may be set, where it was set, and every mistake in it at once.
//!
//! Defaults < the file < `AGENT_SIDECAR_*` < flags. [`SETTINGS`] is the one list: the file's keys, the environment's names, the flags,
//! `check --print` and the reference page are made from it. A setting has one text form wherever it comes from.

mod file;
mod names;
mod table;
mod value;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use agent_sidecar_core::budget::Caps;
use agent_sidecar_core::budget::share::{How, Sharing};
use agent_sidecar_core::content::Gates;
use agent_sidecar_core::ladder::Patience;
use agent_sidecar_core::limit::{Ceiling, Mode, Rule, SHARED};
use agent_sidecar_core::price::PriceTable;
use agent_sidecar_core::span::Semconv;
use agent_sidecar_core::tokens::Usd;
use agent_sidecar_core::who::{self, Name, Who};

use crate::busy::{self, Lease};
use crate::conversation::{self, Root};
use crate::export::otlp::environment::{Headers, Own};
use crate::files;
use crate::fleet::{self, Voice};
use crate::hub::gate::{Keys, Token};
use crate::hub::users::{self, Member};
use crate::hub::{Meeting, Zone};
use crate::influence;
use crate::serve;
use crate::supervise::{NoUser, User};
use crate::tenants::{AgentDirs, Places, Workspace};

pub(crate) use names::variable;
use names::{PREFIX, WITHHELD, is_kubernetes, is_ours, name_of, renamed, slip, stranger};
use table::{RULES, is_limit};
pub(crate) use table::{SETTINGS, Setting};
pub(crate) use value::{Kind, Value};

/// Read if it is there, when no `--config` names another.
pub(crate) const DEFAULT_FILE: &str = "/etc/agent-sidecar/config.toml";

/// Where a lease was unset: it cannot be none.
const BUSY_LEASE: Duration = Duration::from_secs(60);

/// Where these were unset.
const REPORT_EVERY: Duration = Duration::from_secs(10);
const LEASE_GRACE: Duration = Duration::from_secs(60);

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

    // ---- what the rest of the program asks

    fn mode(&self, key: &str) -> Mode {
        match self.value(key) {
            Some(Value::Mode(mode)) => *mode,
            _ => Mode::Enforce,
        }
    }

    /// Every ceiling that is set, with its mode.
    pub(crate) fn rules(&self) -> Vec<Rule> {
        let common = self.mode("limits.mode");
        let loops = common.min(self.mode("limits.loop_mode"));
        RULES
            .iter()
            .filter_map(|&(name, limit, scope)| {
                let ceiling = match self.value(&format!("limits.{name}"))? {
                    Value::Count(n) => Ceiling::Count(*n),
                    Value::Size(n) => Ceiling::Bytes(*n),
                    Value::Money(usd) => Ceiling::Usd(Usd::from_f64(*usd)),
                    Value::Time(time) => Ceiling::Time(*time),
                    Value::Switch(_)
                    | Value::Mode(_)
                    | Value::Code(_)
                    | Value::Factor(_)
                    | Value::Text
                    | Value::Headers(_)
                    | Value::Sources(_)
                    | Value::Secret(_)
                    | Value::Token(_)
                    | Value::Zone(_)
                    | Value::Address(_) => return None,
                };
                let usual = if limit.is_loop() { loops } else { common };
                let mode = self.modes.get(name).map_or(usual, |(mode, _)| *mode);
                Some(Rule { limit, scope, ceiling, mode })
            })
            .collect()
    }

    /// How large the budgets are that agents share.
    pub(crate) fn caps(&self) -> [Caps; SHARED] {
        let mut caps = [Caps::default(); SHARED];
        for rule in self.rules().iter().filter(|rule| rule.mode != Mode::Off) {
            let Some(caps) = rule.scope.shared().and_then(|at| caps.get_mut(at)) else { continue };
            match rule.ceiling {
                Ceiling::Usd(usd) => caps.usd = Some(usd),
                Ceiling::Count(tokens) => caps.tokens = Some(tokens),
                Ceiling::Time(_) | Ceiling::Bytes(_) => {}
            }
        }
        caps
    }

    pub(crate) fn patience(&self) -> Patience {
        let usual = Patience::default();
        Patience {
            interrupt: self.time("stop.interrupt").unwrap_or(usual.interrupt),
            end: self.time("stop.end").unwrap_or(usual.end),
            terminate: self.time("stop.terminate").unwrap_or(usual.terminate),
        }
    }

    pub(crate) fn linger(&self) -> Duration {
        self.time("linger").unwrap_or_default()
    }

    pub(crate) fn listen(&self) -> Option<std::net::SocketAddr> {
        match self.value("listen") {
            Some(Value::Address(address)) => *address,
            _ => None,
        }
    }

    /// Where the wrappers of this container meet, if they are to.
    pub(crate) fn meeting(&self) -> Option<Meeting> {
        if self.text("hub.mode") != "auto" {
            return None;
        }
        let socket = self.path("hub.socket");
        // Nobody can know the port that will be picked: whoever asks for one asks for it alone.
        let port = self.listen().map(|address| address.port()).filter(|port| *port != 0);
        let (state_dir, users_dir) = (self.path("hub.state_dir"), self.path("hub.users_dir"));
        (socket.is_some() || port.is_some()).then_some(Meeting { socket, port, state_dir, users_dir })
    }

    pub(crate) fn hub_options(&self) -> crate::hub::Options {
        let slots = self.count("hub.slots").and_then(|n| usize::try_from(n).ok()).unwrap_or(8);
        crate::hub::Options {
            slots,
            max_series: self.max_series(),
            labels: self.fixed_who().labels(),
            keys: self.keys(),
            zone: self.zone(),
            lease: self.busy().length,
            page_host: self.page_host(),
            patrol: self.patrol(),
            members: Vec::new(),
            conversation: self.conversation(&Places::of(&[], None)),
            fleet: self.fleet(),
        }
    }

    /// The users that a hub serves, and who it is to become.
    ///
    /// # Errors
    /// One of them is not there, or is not kept apart from the hub.
    pub(crate) fn hub_users(&self) -> std::io::Result<Option<(Vec<Member>, Option<User>)>> {
        let Some(_) = self.value("hub.users") else { return Ok(None) };
        let hub = self.value("hub.user").map(|_| User::named(self.text("hub.user"))).transpose();
        let hub = hub.map_err(std::io::Error::other)?;
        Ok(Some((users::members(self.text("hub.users"), hub.as_ref())?, hub)))
    }

    pub(crate) fn patrol(&self) -> bool {
        self.switch("patrol")
    }

    pub(crate) fn page_host(&self) -> Option<String> {
        Some(self.text("page_host")).filter(|name| !name.is_empty()).map(str::to_owned)
    }

    /// Who may change something at the hub. A token that cannot be read opens to nobody.
    fn keys(&self) -> Keys {
        let control = self.switch("hub.control");
        let token = if control { self.token() } else { Ok(Token::None) };
        let token = token.unwrap_or_else(|error| {
            tracing::error!(%error, "the control token cannot be read: nothing can be changed at the hub");
            Token::Lost
        });
        Keys { control, tcp: self.switch("hub.control_tcp"), token }
    }

    fn has_token(&self) -> bool {
        self.value("hub.control_token").is_some() || self.value("hub.control_token_file").is_some()
    }

    /// # Errors
    /// There should be one, and it cannot be read.
    pub(crate) fn token(&self) -> Result<Token, String> {
        match (self.value("hub.control_token"), self.path("hub.control_token_file")) {
            (Some(Value::Token(token)), _) => Ok(token.clone()),
            (_, Some(path)) => Token::read(&path).map_err(|error| format!("{}: {error}", path.display())),
            _ => Ok(Token::None),
        }
    }

    /// How sessions are served over HTTP.
    ///
    /// # Errors
    /// There is no token where one is needed, or it cannot be read.
    pub(crate) fn serve(&self) -> Result<serve::Options, serve::Error> {
        let Some(Value::Address(Some(address))) = self.value("serve.listen") else { return Err(serve::Error::NoAddress) };
        let other = std::env::var(serve::OTHER_TOKEN).ok().filter(|token| !token.is_empty());
        let token = match (self.value("serve.token"), self.path("serve.token_file"), other) {
            (Some(Value::Token(token)), _, _) => Ok(token.clone()),
            (_, Some(path), _) => Token::read(&path).map_err(|error| format!("{}: {error}", path.display())),
            (_, _, Some(token)) => Token::of(&token).map_err(|error| format!("{}: {error}", serve::OTHER_TOKEN)),
            _ => Ok(Token::None),
        };
        let token = token.map_err(serve::Error::BadToken)?;
        let open = self.switch("serve.open");
        match token {
            Token::None if !open => return Err(serve::Error::NoToken),
            Token::None if !address.ip().is_loopback() => return Err(serve::Error::OpenToAll),
            Token::None | Token::Is(_) | Token::Lost => {}
        }
        Ok(serve::Options {
            address: *address,
            token,
            open,
            book: self.path("serve.state"),
            agents: self.count("serve.max_agents").and_then(|n| usize::try_from(n).ok()).unwrap_or(usize::MAX),
            allow: self.text("serve.permissions") == "allow",
            form: if self.text("serve.messages") == "cli" { serve::Form::Cli } else { serve::Form::Sdk },
            interrupt: self.switch("serve.interrupt_when_gone"),
            grace: self.time("stop.platform_grace"),
            page_host: self.page_host(),
        })
    }

    /// The container's token, which the fleet knows. One that cannot be read opens to nobody.
    fn fleet_token(&self) -> Token {
        let token = match (self.value("fleet.token"), self.path("fleet.token_file")) {
            (Some(Value::Token(token)), _) => return token.clone(),
            (_, Some(path)) => Token::read(&path).map_err(|error| format!("{}: {error}", path.display())),
            _ => return Token::None,
        };
        token.unwrap_or_else(|error| {
            tracing::error!(%error, "the fleet's token cannot be read: nothing is told to it, and nothing taken from it");
            Token::Lost
        })
    }

    /// What is served of a conversation whose CLI finds its directories there, if anything is.
    pub(crate) fn conversation(&self, places: &Places) -> Option<conversation::Options> {
        if !self.switch("conversation.serve") {
            return None;
        }
        let config = self.path("conversation.config").or_else(|| places.config.clone());
        let workspace = self.path("conversation.workspace").unwrap_or_else(|| places.cwd.clone());
        let roots = [("config", config), ("workspace", Some(workspace))];
        let roots = roots.into_iter().filter_map(|(name, path)| Some(Root { name, path: conversation::settled(&path?) }));
        // The whole of a container's files is no workspace.
        let roots = roots.filter(|root| root.path != Path::new("/")).collect();
        let exclude = self.value("conversation.exclude").map(|_| self.text("conversation.exclude"));
        Some(conversation::Options {
            token: self.fleet_token(),
            roots,
            exclude: exclude.into_iter().flat_map(|text| text.split(',')).map(|name| name.trim().to_owned()).collect(),
            max_size: self.count("conversation.max_size").unwrap_or(u64::MAX),
            container: self.text("fleet.container").to_owned(),
        })
    }

    /// Who tells the fleet, if there is one.
    pub(crate) fn fleet(&self) -> Option<Voice> {
        let url = self.value("fleet.url").map(|_| self.text("fleet.url").trim_end_matches('/'))?;
        let to = format!("{url}/v1/containers/{}/report", self.text("fleet.container"));
        let options = fleet::Options {
            to: to
                .parse()
                .inspect_err(|_| tracing::error!("`fleet.url` and `fleet.container` make no URL: the fleet is told nothing"))
                .ok()?,
            headers: fleet::bearer(self.fleet_token().word()?)?,
            session: self.text("fleet.session").to_owned(),
            every: self.time("fleet.report_every").unwrap_or(REPORT_EVERY),
            lease: self.time("fleet.lease"),
            grace: self.time("fleet.grace").unwrap_or(LEASE_GRACE),
        };
        Some(Voice::new(options))
    }

    /// How long a start waits for a conversation.
    pub(crate) fn conversation_wait(&self) -> Duration {
        self.time("conversation.wait").unwrap_or_default()
    }

    pub(crate) fn ledger(&self) -> Option<PathBuf> {
        self.path("ledger.path")
    }

    pub(crate) fn events(&self) -> Option<PathBuf> {
        self.path("events.path")
    }

    pub(crate) fn semconv(&self) -> Semconv {
        Semconv::of(self.text("otlp.semconv")).unwrap_or_default()
    }

    pub(crate) fn agent_name(&self) -> String {
        self.text("otlp.agent_name").to_owned()
    }

    /// The table `[otlp]`, for [`crate::export::otlp::environment::read`].
    pub(crate) fn otlp(&self) -> Own {
        let text = |key: &str| self.value(key).map(|_| self.text(key).to_owned());
        // `off` unsets what has no default, and here it is also what is meant.
        let switch = |key: &str| match self.value(key) {
            Some(Value::Switch(on)) => Some(*on),
            _ => matches!(self.text(key), "off" | "none").then_some(false),
        };
        Own {
            endpoint: text("otlp.endpoint"),
            off: matches!(self.text("otlp.endpoint"), "off" | "none"),
            protocol: text("otlp.protocol"),
            headers: self.headers("otlp.headers"),
            timeout: self.time("otlp.timeout"),
            compression: text("otlp.compression").or_else(|| (self.text("otlp.compression") == "none").then(|| "none".into())),
            certificate: self.path("otlp.certificate"),
            client_certificate: self.path("otlp.client_certificate"),
            client_key: self.path("otlp.client_key"),
            signals: ["otlp.traces", "otlp.metrics", "otlp.logs"].map(switch),
            queue_dir: self.path("otlp.queue_dir"),
            queue_max: self.count("otlp.queue_max"),
            flush: self.time("otlp.flush"),
        }
    }

    /// What may be told of content; nothing, unless somebody says so. `secrets` never.
    pub(crate) fn gates(&self, max: Option<usize>, secrets: Vec<String>) -> Gates {
        let shut = Gates::default();
        Gates {
            prompts: self.switch("content.prompts"),
            answers: self.switch("content.answers"),
            tool_inputs: self.switch("content.tool_inputs"),
            tool_outputs: self.switch("content.tool_outputs"),
            max: max.unwrap_or(shut.max),
            secrets,
        }
    }

    pub(crate) fn busy(&self) -> Lease {
        Lease {
            length: self.time("busy.lease").unwrap_or(BUSY_LEASE),
            file: self.path("busy.file"),
            webhook: self.value("busy.webhook").and_then(|_| self.text("busy.webhook").parse().ok()),
            headers: self.headers("busy.webhook_headers").unwrap_or_default(),
        }
    }

    pub(crate) fn json_log(&self) -> bool {
        self.text("log.format") == "json"
    }

    pub(crate) fn log_level(&self) -> tracing::Level {
        match self.text("log.level") {
            _ if self.switch("log.quiet") => tracing::Level::ERROR,
            "error" => tracing::Level::ERROR,
            "info" => tracing::Level::INFO,
            "debug" => tracing::Level::DEBUG,
            _ => tracing::Level::WARN,
        }
    }

    pub(crate) fn spill_dir(&self) -> Option<PathBuf> {
        self.path("relay.spill_dir")
    }

    pub(crate) fn spill_bytes(&self) -> u64 {
        self.count("relay.spill_max").unwrap_or(crate::supervise::SPILL_BYTES)
    }

    /// As whom the CLI is to run; as we do, if nobody says.
    ///
    /// # Errors
    /// There is no such user, or we may not start anything as somebody else.
    pub(crate) fn user(&self) -> Result<Option<User>, NoUser> {
        self.value("run.user").map(|_| User::find(self.text("run.user"))).transpose()
    }

    pub(crate) fn file(&self) -> Option<&Path> {
        self.file.as_deref()
    }

    /// What is named to be written to, by the settings that name it.
    pub(crate) fn own_paths(&self) -> Vec<(&'static str, PathBuf)> {
        let keys = ["ledger.path", "events.path", "busy.file", "otlp.queue_dir", "hub.state_dir", "hub.socket"];
        keys.into_iter().filter_map(|key| Some((key, self.path(key)?))).collect()
    }

    /// The variables of ours that hold keys: nobody below us needs them.
    pub(crate) fn secrets() -> impl Iterator<Item = String> {
        SETTINGS.iter().filter(|setting| matches!(setting.kind, Kind::Headers | Kind::Token | Kind::Secret)).map(variable)
    }

    /// What agents that tools start are to be told otherwise than we were: nobody there has the keys, and where we ask for one, no
    /// hub of theirs is to go without.
    pub(crate) fn for_those_below(&self) -> Vec<(String, String)> {
        let given = |key: &str| matches!(self.values[key].origin, Origin::Environment(_) | Origin::Flag(_));
        let mut told = Vec::new();
        let lost = matches!(self.value("hub.control_token"), Some(Value::Token(Token::Lost)));
        let flag = matches!(self.values["hub.control_token_file"].origin, Origin::Flag(_));
        if lost || given("hub.control_token") || flag {
            told.push((name_of("hub.control"), String::from("false")));
        }
        if self.switch("labels.user_hash") && given("labels.user_hash_key") {
            told.push((name_of("labels.user_hash_key"), String::from(WITHHELD)));
            // Not everybody inherits a flag.
            if matches!(self.values["labels.user_hash"].origin, Origin::Flag(_)) {
                told.push((name_of("labels.user_hash"), String::from("true")));
            }
        }
        told
    }

    /// What is done about what changes the CLI, and whom it may ask.
    pub(crate) fn influence(&self) -> (influence::Policy, influence::Expected) {
        let policy = match self.text("policy.environment") {
            "strip" => influence::Policy::Strip,
            "refuse" => influence::Policy::Refuse,
            _ => influence::Policy::Report,
        };
        (policy, self.value("policy.base_urls").and_then(|_| value::urls(self.text("policy.base_urls"))))
    }

    pub(crate) fn shim_cli(&self) -> Option<PathBuf> {
        self.path("shim.cli")
    }

    pub(crate) fn shim_strict(&self) -> bool {
        self.switch("shim.strict")
    }

    pub(crate) fn poll(&self) -> bool {
        self.switch("usage.poll")
    }

    pub(crate) fn native(&self) -> crate::receive::Choice {
        match self.text("native.telemetry") {
            "on" => crate::receive::Choice::On,
            "off" => crate::receive::Choice::Off,
            _ => crate::receive::Choice::Auto,
        }
    }

    pub(crate) fn max_series(&self) -> usize {
        self.count("metrics.max_series").and_then(|n| usize::try_from(n).ok()).unwrap_or(agent_sidecar_core::metric::MAX_SERIES)
    }

    pub(crate) fn limit_exit_code(&self) -> Option<u8> {
        match self.value("limits.exit_code") {
            Some(Value::Code(code)) => Some(*code),
            _ => None,
        }
    }

    /// For whom everything here works that nothing else is known of.
    pub(crate) fn fixed_who(&self) -> Who {
        let mut who = Who::default();
        for name in Name::ALL {
            let key = format!("labels.{}", name.as_str());
            if !(*name == Name::User && self.withholds_user()) && self.value(&key).is_some() {
                who.set(*name, self.text(&key).to_owned());
            }
        }
        who
    }

    /// Where else that is asked for, if anywhere.
    pub(crate) fn sources_of(&self, name: Name) -> Option<&who::Sources> {
        self.sources(&format!("labels.{}_from", name.as_str())).filter(|_| name != Name::User || !self.withholds_user())
    }

    /// Whether users are hashed, with a key that is not here: with another, or none, the hash would tell who they are, or of two.
    fn withholds_user(&self) -> bool {
        matches!(self.value("labels.user_hash_key"), Some(Value::Secret(key)) if key.0 == WITHHELD)
    }

    fn sources(&self, key: &str) -> Option<&who::Sources> {
        match self.value(key) {
            Some(Value::Sources(sources)) => Some(sources),
            _ => None,
        }
    }

    /// The files of the downward API: labels and annotations.
    pub(crate) fn pod_files(&self) -> [PathBuf; 2] {
        ["labels.pod_labels", "labels.pod_annotations"].map(|key| self.path(key).unwrap_or_default())
    }

    /// The key that users are hashed with, if they are.
    pub(crate) fn user_hash(&self) -> Option<Vec<u8>> {
        let key = match self.value("labels.user_hash_key") {
            Some(Value::Secret(key)) => key.0.clone().into_bytes(),
            _ => Vec::new(),
        };
        self.switch("labels.user_hash").then_some(key)
    }

    pub(crate) fn guard(&self) -> Mode {
        self.mode("tenants.guard")
    }

    /// Whether anything tells tenants apart here.
    pub(crate) fn has_tenants(&self) -> bool {
        self.value("labels.tenant").is_some() || self.sources_of(Name::Tenant).is_some()
    }

    pub(crate) fn agent_dirs(&self) -> Option<AgentDirs> {
        Some(AgentDirs {
            root: self.path("tenants.agent_dirs")?,
            name: self.sources("tenants.agent_from").cloned(),
            workspace: match self.text("tenants.agent_workspace") {
                "always" => Workspace::Always,
                "never" => Workspace::Never,
                _ => Workspace::Auto,
            },
            remove: self.text("tenants.agent_dirs_at_end") == "remove",
        })
    }

    /// How often directories are measured, if they are.
    pub(crate) fn disk_interval(&self) -> Option<Duration> {
        self.time("disk.interval").filter(|interval| !interval.is_zero())
    }

    /// How many agents may run at once, how long one more waits, and what becomes of it.
    pub(crate) fn max_sessions(&self) -> Option<(u64, Duration, Mode)> {
        let mode = self.mode("limits.mode");
        let seats = self.count("limits.max_sessions").filter(|_| mode != Mode::Off)?;
        Some((seats, self.time("limits.queue_timeout").unwrap_or_default(), mode))
    }

    pub(crate) fn tenant_weight(&self) -> u64 {
        self.count("limits.tenant_weight").unwrap_or(1)
    }

    /// How shared budgets are shared out.
    pub(crate) fn sharing(&self) -> Sharing {
        let chosen = How::ALL.iter().find(|how| how.as_str() == self.text("limits.budget_share"));
        Sharing { how: chosen.copied().unwrap_or(How::Tenants), kept: self.time("limits.share_kept").unwrap_or_default() }
    }

    /// Whether CLIs that share a budget are to ask before they ask the model.
    pub(crate) fn budget_hooks(&self) -> bool {
        self.switch("limits.budget_hooks")
    }

    /// Where days begin.
    pub(crate) fn zone(&self) -> Zone {
        match self.value("limits.time_zone") {
            Some(Value::Zone(zone)) => zone.clone(),
            _ => Zone::default(),
        }
    }

    pub(crate) fn idle_timeout(&self) -> Option<Duration> {
        self.time("limits.idle_timeout")
    }

    /// Each setting, in the order of [`SETTINGS`].
    pub(crate) fn effective(&self) -> impl Iterator<Item = (&'static Setting, &Effective)> {
        SETTINGS.iter().map(|setting| (setting, &self.values[setting.key]))
    }

    /// The modes of single limits, and where they were set.
    pub(crate) fn modes(&self) -> impl Iterator<Item = (&'static str, Mode, &Origin)> {
        self.modes.iter().map(|(name, (mode, origin))| (*name, *mode, origin))
    }

    /// Tells configurations apart: of what is in force, not of how it was written.
    pub(crate) fn fingerprint(&self) -> String {
        let mut text: String =
            self.effective().map(|(setting, effective)| format!("{}={}\n", setting.key, effective.text)).collect();
        text.extend(self.modes().map(|(limit, mode, _)| format!("{limit}={}\n", mode.as_str())));
        text += &format!("{:?}", self.prices);
        let hash =
            text.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
        format!("{hash:016x}")
    }
}

#[cfg(test)]
mod tests;
