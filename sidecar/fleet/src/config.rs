//! What a fleet is told: one file, `agent-fleet.toml`, and every mistake in it at once.
//!
//! Secrets are named here and never written: what is kept of a caller's token is its digest.

use std::collections::BTreeMap;
use std::fmt;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;
use jiff::tz::TimeZone;

use crate::conversation::credentials::Keys;
use crate::hook::Hook;
use crate::place::Share;
use crate::plan::{PauseBy, Recycle};
use crate::pool::Pool;
use crate::provider::{Capabilities, FLEET_LABEL, KEY_LABEL, Pause, SESSION_LABEL, Secret, Size, Spec};
use crate::session::{Pattern, SessionId, container_key};

mod away;
mod read;
mod secret;
#[cfg(test)]
mod tests;
mod value;

pub use secret::{Elsewhere, Hidden, Machine, Outside};
pub use value::nearest;

/// The label that says which template a container is made from.
pub const TEMPLATE_LABEL: &str = "agent-fleet.template";
/// The label that says whose it is.
pub const TENANT_LABEL: &str = "agent-fleet.tenant";

/// Kinds of providers: those that [`crate::build::provider`] knows.
pub const KINDS: &[&str] =
    &["cloudflare", "daytona", "docker", "e2b", "firecracker", "fly", "gvisor", "kubernetes", "modal", "vercel"];

#[derive(Clone, Debug)]
pub struct Config {
    pub path: PathBuf,
    pub fleet: Fleet,
    /// Who may ask, by their names.
    pub callers: BTreeMap<String, Caller>,
    pub providers: BTreeMap<String, ProviderConfig>,
    pub templates: BTreeMap<String, Template>,
    pub tenants: BTreeMap<String, Tenant>,
    /// In the order in which they run.
    pub hooks: Vec<Hook>,
    pub conversations: Option<Conversations>,
}

#[derive(Clone, Debug)]
pub struct Fleet {
    /// On every container as a label: two fleets that share a provider and a name would destroy each other's containers.
    pub name: String,
    pub listen: SocketAddr,
    /// `sqlite:///var/lib/agent-fleet/fleet.db` or `postgres://…`.
    pub store: Hidden,
    /// How long sessions that are over are remembered.
    pub keep: Duration,
    /// Where containers reach the fleet, if they do.
    pub url: Option<String>,
    /// What containers' tokens are made of.
    pub secret: Option<Hidden>,
    /// Where traces of sessions go: `http://collector:4318`.
    pub otlp_endpoint: Option<String>,
}

/// Where conversations are kept that are put away.
#[derive(Clone, Debug, PartialEq)]
pub struct Conversations {
    pub place: Place,
    /// So many of a session, the last.
    pub keep: usize,
    /// How long after its end. `None`: not at all.
    pub keep_for: Option<Duration>,
    /// How large one may be, compressed.
    pub max_size: u64,
    /// Where one is while it is on its way.
    pub spool: PathBuf,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Place {
    Directory(PathBuf),
    Postgres(Hidden),
    S3(S3),
}

#[derive(Clone, Debug, PartialEq)]
pub struct S3 {
    pub bucket: String,
    pub prefix: String,
    pub endpoint: String,
    pub region: String,
    pub path_style: bool,
    pub keys: Keys,
}

/// Somebody with a token.
#[derive(Clone, PartialEq)]
pub struct Caller {
    pub name: String,
    /// The tenants for whom sessions may be asked for. Empty: all there are.
    pub tenants: Vec<String>,
    /// Reaches what others own, too.
    pub admin: bool,
    /// SHA-256 of each token that is taken: several while one replaces another.
    digests: Vec<[u8; 32]>,
}

impl Caller {
    pub fn may_use(&self, tenant: &str) -> bool {
        self.tenants.is_empty() || self.tenants.iter().any(|own| own == tenant)
    }
}

impl fmt::Debug for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, tenants, admin, digests: _ } = self;
        f.debug_struct("Caller").field("name", name).field("tenants", tenants).field("admin", admin).finish_non_exhaustive()
    }
}

#[derive(Clone, PartialEq)]
pub struct ProviderConfig {
    /// One of [`KINDS`].
    pub kind: String,
    /// The rest, which is the provider's own business.
    pub settings: toml::Table,
}

impl fmt::Debug for ProviderConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&String> = self.settings.keys().collect();
        f.debug_struct("ProviderConfig").field("kind", &self.kind).field("settings", &names).finish()
    }
}

/// What sessions are made from.
#[derive(Clone, Debug, PartialEq)]
pub struct Template {
    pub name: String,
    pub pattern: Pattern,
    /// The provider's name in the configuration.
    pub provider: String,
    pub image: String,
    pub command: Vec<String>,
    pub env: BTreeMap<String, String>,
    pub secrets: BTreeMap<String, Secret>,
    pub size: Size,
    pub ports: Vec<u16>,
    /// How long one container may exist.
    pub ttl: Duration,
    /// How long the agent is idle before its pattern acts. `None`: it never does.
    pub idle_after: Option<Duration>,
    /// How long the sidecar may take to speak.
    pub ready_within: Duration,
    pub stop_grace: Duration,
    /// How long a session may exist, over all its containers.
    pub max_age: Duration,
    pub labels: BTreeMap<String, String>,
    /// Where the sidecar inside listens.
    pub sidecar_port: u16,
    /// Where the app inside is talked to. `None`: nobody does, through us.
    pub app_port: Option<u16>,
    /// The token that is said to it: its own, not the caller's.
    pub app_token: Option<Hidden>,
    /// The provider's own idle timer, behind the sidecar's word.
    pub provider_idle: Option<Duration>,
    /// Its conversation is put away when it is idle, and gone on with in another container.
    pub archive: bool,
    /// How many containers are made ahead.
    pub pool: Option<Pool>,
    /// When a container is given up though its time is not over.
    pub recycle: Recycle,
    /// How many sessions are in one container. `None`: one.
    pub shared: Option<Share>,
}

impl Template {
    /// What becomes of its sessions, in a line.
    pub fn course(&self, can: &Capabilities) -> String {
        let archives = self.archive && self.shared.is_some();
        let idle = match (self.pattern, PauseBy::of(self.pattern, can.pause, self.archive)) {
            _ if archives => "is put away into [conversations], and leaves its place",
            (Pattern::Hybrid, PauseBy::Archive) => "is put away into [conversations], and goes on in another container",
            (Pattern::Hybrid, PauseBy::Provider) => match can.pause {
                Pause::Frozen => "is frozen by the provider, at the price of running",
                Pause::Memory => "is paused by the provider, with its memory",
                Pause::Disk | Pause::No => "is paused by the provider, with its disk alone",
            },
            (Pattern::Hybrid, PauseBy::Nothing) => "cannot sleep here, and ends",
            (Pattern::Ephemeral | Pattern::LongRunning | Pattern::Shared, _) => "ends",
        };
        let mut line = pattern_name(self.pattern).to_owned();
        if let Some(share) = self.shared {
            line.push_str(&format!(", {} in a container", share.sessions_per_container));
        }
        if self.pattern == Pattern::Ephemeral {
            line.push_str(": ends when its work is done");
        }
        if let Some(after) = self.idle_after {
            line.push_str(&format!("; when idle for {} it {idle}", time(after)));
        }
        line.push_str(&format!("; is over after {}, each container after {}", time(self.max_age), time(self.ttl)));
        line.replace('"', "")
    }

    /// What a session's container of that generation is made of.
    pub fn spec_for(&self, fleet: &str, id: &SessionId, tenant: &str, generation: u32) -> Spec {
        let key = container_key(fleet, id, generation);
        let own = [
            (FLEET_LABEL, fleet),
            (KEY_LABEL, key.as_str()),
            (SESSION_LABEL, id.as_str()),
            (TEMPLATE_LABEL, self.name.as_str()),
            (TENANT_LABEL, tenant),
        ];
        let mut labels = self.labels.clone();
        labels.extend(own.map(|(name, value)| (name.to_owned(), value.to_owned())));
        Spec {
            key,
            image: self.image.clone(),
            command: self.command.clone(),
            env: self.env.clone(),
            secrets: self.secrets.clone(),
            size: self.size,
            ports: self.ports.iter().copied().chain(self.app_port.filter(|port| !self.ports.contains(port))).collect(),
            labels,
            ttl: self.ttl,
            idle: self.provider_idle,
            avoid: Vec::new(),
        }
    }
}

/// Who pays.
#[derive(Clone, Debug, PartialEq)]
pub struct Tenant {
    pub name: String,
    pub budget_usd_per_day: Option<f64>,
    pub budget_usd_per_month: Option<f64>,
    /// Where its days begin.
    pub zone: TimeZone,
    /// How many of its sessions may exist at a time.
    pub max_sessions: Option<u64>,
}

impl Tenant {
    /// The periods that `now` is in and that have a budget: what the store calls them, and the limit in USD.
    pub fn periods(&self, now: Timestamp) -> Vec<(String, f64)> {
        let date = now.to_zoned_datetime(self.zone.clone()).date();
        let day = self.budget_usd_per_day.map(|usd| (date.to_string(), usd));
        let month = self.budget_usd_per_month.map(|usd| (format!("{:04}-{:02}", date.year(), date.month()), usd));
        day.into_iter().chain(month).collect()
    }
}

/// Something that is wrong, where, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mistake {
    pub path: PathBuf,
    /// Both from one.
    pub line: usize,
    pub column: usize,
    pub what: String,
    pub remedy: String,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}: {}; {}", self.path.display(), self.line, self.column, self.what, self.remedy)
    }
}

/// All that is wrong with a configuration.
#[derive(Debug, thiserror::Error)]
pub struct Mistakes(pub Vec<Mistake>);

impl fmt::Display for Mistakes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the configuration has {} mistake{}", self.0.len(), if self.0.len() == 1 { "" } else { "s" })?;
        for mistake in &self.0 {
            write!(f, "\n  {mistake}")?;
        }
        Ok(())
    }
}

/// Every mistake in the file and in what it refers to on this machine.
pub fn check(path: &Path) -> Vec<Mistake> {
    Config::read(path).err().map(|mistakes| mistakes.0).unwrap_or_default()
}

impl Config {
    /// What is no mistake, and may not be meant: each with what to do.
    pub fn warnings(&self) -> Vec<String> {
        let none = "there is no [templates.NAME]: nobody can ask for a session; add one with pattern, provider and image";
        let mut found: Vec<String> = self.templates.is_empty().then(|| String::from(none)).into_iter().collect();
        for (name, of) in &self.providers {
            for (key, value) in &of.settings {
                let url = value.as_str().and_then(|text| reqwest::Url::parse(text).ok());
                let Some(url) = url.filter(|url| matches!(url.scheme(), "http" | "tcp") && !value::is_loopback(url)) else {
                    continue;
                };
                let at = format!("`providers.{name}.{key}` is another machine, and {} is not encrypted", url.scheme());
                found.push(format!("{at}: who is in between sees tokens and secrets; use https, or a tunnel"));
            }
        }
        for template in self.templates.values() {
            let provider =
                self.providers.get(&template.provider).and_then(|of| crate::build::provider(&template.provider, of).ok());
            let Some(provider) = provider else { continue };
            let usd = crate::budget::life(template.ttl, &provider.price(template.size));
            for tenant in self.tenants.values() {
                let budgets = [("day", tenant.budget_usd_per_day), ("month", tenant.budget_usd_per_month)];
                for (period, limit) in budgets.into_iter().filter_map(|(period, limit)| Some((period, limit?))) {
                    if usd > limit {
                        found.push(format!(
                            "`tenants.{}` may spend {limit} USD in a {period}, and {usd:.4} are set aside for a container of `templates.{}` in its `ttl`: it \
                             never gets one; raise the one or shorten the other",
                            tenant.name, template.name
                        ));
                    }
                }
            }
        }
        found
    }

    /// Reads the file, and the secrets it names from where they are.
    ///
    /// # Errors
    /// Every mistake there is.
    pub fn read(path: &Path) -> Result<Config, Mistakes> {
        Config::read_with(path, &Machine)
    }

    /// The same with other surroundings: [`Elsewhere`] checks a file for a machine that this is not.
    ///
    /// # Errors
    /// Every mistake there is.
    pub fn read_with(path: &Path, outside: &dyn Outside) -> Result<Config, Mistakes> {
        match std::fs::read_to_string(path) {
            Ok(text) => Config::parse(path, &text, outside),
            Err(error) => Err(Mistakes(vec![Mistake {
                path: path.to_owned(),
                line: 1,
                column: 1,
                what: format!("the file cannot be read: {error}"),
                remedy: String::from("name a readable file with --config"),
            }])),
        }
    }

    /// # Errors
    /// Every mistake there is.
    pub fn parse(path: &Path, text: &str, outside: &dyn Outside) -> Result<Config, Mistakes> {
        read::read(path, text, outside)
    }

    /// Whose token this is.
    pub fn caller(&self, token: &str) -> Option<&Caller> {
        let digest = secret::digest(token);
        self.callers.values().find(|caller| caller.digests.contains(&digest))
    }

    /// What is in force, as it could be written. No secret is in it.
    pub fn print(&self) -> String {
        let mut out = String::new();
        self.print_to(&mut out).expect("a String takes everything");
        out
    }

    fn print_to(&self, out: &mut String) -> fmt::Result {
        let Fleet { name, listen, store, keep, url, secret, otlp_endpoint } = &self.fleet;
        writeln!(out, "[fleet]\nname = {name:?}\nlisten = \"{listen}\"")?;
        writeln!(out, "store = {:?}\nkeep = {}", secret::without_password(store.reveal()), time(*keep))?;
        if let Some(url) = url {
            writeln!(out, "url = {url:?}")?;
        }
        if secret.is_some() {
            writeln!(out, "# secret is set")?;
        }
        if let Some(endpoint) = otlp_endpoint {
            writeln!(out, "otlp_endpoint = {endpoint:?}")?;
        }
        if let Some(conversations) = &self.conversations {
            conversations.print_to(out)?;
        }
        for caller in self.callers.values() {
            let tenants: &[String] = if caller.tenants.is_empty() { &[String::from("*")] } else { &caller.tenants };
            writeln!(out, "\n[callers.{}]\ntenants = {tenants:?}\nadmin = {}", caller.name, caller.admin)?;
        }
        for (name, provider) in &self.providers {
            writeln!(out, "\n[providers.{name}]\nkind = {:?}", provider.kind)?;
            for key in provider.settings.keys() {
                writeln!(out, "# {key} is set")?;
            }
        }
        for template in self.templates.values() {
            template.print_to(out)?;
        }
        for tenant in self.tenants.values() {
            writeln!(out, "\n[tenants.{}]", tenant.name)?;
            let amounts =
                [("budget_usd_per_day", tenant.budget_usd_per_day), ("budget_usd_per_month", tenant.budget_usd_per_month)];
            for (key, usd) in amounts {
                if let Some(usd) = usd {
                    writeln!(out, "{key} = {usd}")?;
                }
            }
            writeln!(out, "time_zone = {:?}", tenant.zone.iana_name().unwrap_or("UTC"))?;
            if let Some(most) = tenant.max_sessions {
                writeln!(out, "max_sessions = {most}")?;
            }
        }
        for hook in &self.hooks {
            writeln!(out, "\n{hook}")?;
        }
        Ok(())
    }
}

impl Conversations {
    fn print_to(&self, out: &mut String) -> fmt::Result {
        let Conversations { place, keep, keep_for, max_size, spool } = self;
        let store = match place {
            Place::Directory(path) => format!("file://{}", path.display()),
            Place::Postgres(url) => secret::without_password(url.reveal()),
            Place::S3(s3) => format!("s3://{}/{}", s3.bucket, s3.prefix),
        };
        writeln!(out, "\n[conversations]\nstore = {store:?}\nkeep = {keep}")?;
        writeln!(out, "keep_for = {}", keep_for.map_or_else(|| String::from("\"off\""), time))?;
        writeln!(out, "max_size = \"{max_size}B\"\nspool = {spool:?}")?;
        if let Place::S3(s3) = place {
            let S3 { endpoint, region, path_style, .. } = s3;
            writeln!(out, "endpoint = {endpoint:?}\nregion = {region:?}\npath_style = {path_style}")?;
            match &s3.keys {
                Keys::Kept { access_key, secret_key, session_token } => {
                    let all = [
                        ("access_key", Some(access_key)),
                        ("secret_key", Some(secret_key)),
                        ("session_token", session_token.as_ref()),
                    ];
                    for (name, secret) in all.into_iter().filter_map(|(name, secret)| Some((name, secret?))) {
                        writeln!(out, "{name} = {}", secret::reference(secret))?;
                    }
                }
                Keys::WebIdentity { role, .. } => {
                    writeln!(out, "# the keys are those of {role}, for the token of the environment")?
                }
                Keys::Container { .. } => writeln!(out, "# the keys are those of who runs the container")?,
            }
        }
        Ok(())
    }
}

impl Template {
    fn print_to(&self, out: &mut String) -> fmt::Result {
        let pattern = pattern_name(self.pattern);
        writeln!(out, "\n[templates.{}]\npattern = \"{pattern}\"\nprovider = {:?}", self.name, self.provider)?;
        writeln!(out, "image = {:?}\ncommand = {:?}", self.image, self.command)?;
        let pairs = |pairs: &BTreeMap<String, String>| {
            pairs.iter().map(|(name, value)| format!("{name:?} = {value:?}")).collect::<Vec<_>>().join(", ")
        };
        writeln!(out, "env = {{ {} }}", pairs(&self.env))?;
        let secrets: Vec<String> =
            self.secrets.iter().map(|(name, secret)| format!("{name} = {}", secret::reference(secret))).collect();
        writeln!(out, "secrets = {{ {} }}", secrets.join(", "))?;
        let Size { cpu_milli, memory_mib, disk_mib } = self.size;
        let cpu = f64::from(cpu_milli) / 1000.0;
        writeln!(out, "size = {{ cpu = {cpu:?}, memory = \"{memory_mib}MiB\", disk = \"{disk_mib}MiB\" }}")?;
        writeln!(out, "ports = {:?}\nsidecar_port = {}", self.ports, self.sidecar_port)?;
        if let Some(port) = self.app_port {
            writeln!(out, "app_port = {port}")?;
        }
        if self.app_token.is_some() {
            writeln!(out, "# app_token is set")?;
        }
        writeln!(out, "ttl = {}\nmax_age = {}", time(self.ttl), time(self.max_age))?;
        writeln!(out, "idle_after = {}", self.idle_after.map_or_else(|| String::from("\"off\""), time))?;
        writeln!(out, "provider_idle = {}", self.provider_idle.map_or_else(|| String::from("\"off\""), time))?;
        writeln!(out, "ready_within = {}\nstop_grace = {}", time(self.ready_within), time(self.stop_grace))?;
        writeln!(out, "archive = {}", self.archive)?;
        writeln!(out, "labels = {{ {} }}", pairs(&self.labels))?;
        let Recycle { age, memory_bytes, growth_per_hour_bytes } = self.recycle;
        let size = |bytes: u64| format!("\"{}MiB\"", bytes >> 20);
        let recycle = [
            ("age", age.map(time)),
            ("memory", memory_bytes.map(size)),
            ("memory_growth_per_hour", growth_per_hour_bytes.map(size)),
        ];
        let recycle: Vec<String> = recycle.into_iter().filter_map(|(key, value)| Some(format!("{key} = {}", value?))).collect();
        if !recycle.is_empty() {
            writeln!(out, "recycle = {{ {} }}", recycle.join(", "))?;
        }
        if let Some(Share { sessions_per_container, containers }) = self.shared {
            let containers = containers.map_or_else(String::new, |n| format!(", containers = {n}"));
            writeln!(out, "shared = {{ sessions_per_container = {sessions_per_container}{containers} }}")?;
        }
        let Some(Pool { size, max_age, per_minute }) = &self.pool else { return Ok(()) };
        writeln!(out, "pool = {{ size = {size}, max_age = {}, per_minute = {per_minute} }}", time(*max_age))
    }
}

pub(crate) fn pattern_name(pattern: Pattern) -> &'static str {
    match pattern {
        Pattern::Ephemeral => "ephemeral",
        Pattern::LongRunning => "long-running",
        Pattern::Hybrid => "hybrid",
        Pattern::Shared => "shared",
    }
}

/// `"1h30m"`, in quotes.
pub(crate) fn time(time: Duration) -> String {
    let (all, milli) = (time.as_secs(), time.subsec_millis());
    let parts = [(all / 86_400, "d"), (all / 3_600 % 24, "h"), (all / 60 % 60, "m"), (all % 60, "s"), (milli.into(), "ms")];
    let text: String = parts.iter().filter(|(n, _)| *n > 0).map(|(n, unit)| format!("{n}{unit}")).collect();
    format!("\"{}\"", if text.is_empty() { "0s" } else { &text })
}
