//! The file, read as far as it can be, so that one slip does not hide the next mistake.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::tz::TimeZone;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::secret::{self, holds_key, is_key};
use super::value::{
    IN_QUOTES, NAMES, Wrong, address, count, cpus, dollars, form, is_label, is_loopback, is_variable, label, mebibytes, missing,
    nearest, number, pattern, port, ports, switch, text, texts, time, time_or_off, web_url, whole, zone,
};
use super::{Caller, Config, Fleet, Hidden, KINDS, Mistake, Mistakes, Outside, ProviderConfig, Template, Tenant};
use crate::build;
use crate::hook::{Act, Hook, sign};
use crate::lifecycle::Phase;
use crate::place::Share;
use crate::plan::Recycle;
use crate::pool::Pool;
use crate::provider::{Capabilities, Secret, Size, refusals};
use crate::session::{Pattern, SessionId};

/// What providers are told by reference: for the fleet, and not for containers.
const PROVIDER_SECRETS: [&str; 3] = ["token", "token_id", "token_secret"];
/// What they read from the fleet's own disk.
const PROVIDER_FILES: [&str; 2] = ["kubeconfig", "kernel"];

/// Whether that setting of a provider is money, or what money is multiplied by.
fn is_amount(key: &str) -> bool {
    key.ends_with("_usd_per_hour") || matches!(key, "price" | "region_factor")
}

pub(super) type Span = Range<usize>;

pub(super) struct Reader<'a> {
    path: &'a Path,
    text: &'a str,
    pub(super) outside: &'a dyn Outside,
    mistakes: Vec<Mistake>,
    /// What the providers can do whose settings are right.
    pub(super) can: BTreeMap<String, Capabilities>,
}

/// A table, and which of its keys are known.
pub(super) struct Section<'a> {
    name: String,
    pub(super) at: Span,
    table: &'a DeTable<'a>,
    pub(super) known: Vec<&'static str>,
}

pub(super) fn read(path: &Path, text: &str, outside: &dyn Outside) -> Result<Config, Mistakes> {
    let (table, errors) = DeTable::parse_recoverable(text);
    let mut reader = Reader { path, text, outside, mistakes: Vec::new(), can: BTreeMap::new() };
    for error in errors {
        let span = error.span().unwrap_or_default();
        reader.wrong(span, error.message().to_owned(), "mend the TOML here; text goes in quotes");
    }
    // The providers' own settings, as plain values.
    let plain = text.parse::<toml::Table>().unwrap_or_default();
    let config = reader.config(table.get_ref(), &plain);
    reader.mistakes.sort_by_key(|mistake| (mistake.line, mistake.column));
    if reader.mistakes.is_empty() { Ok(config) } else { Err(Mistakes(reader.mistakes)) }
}

impl<'a> Reader<'a> {
    pub(super) fn wrong(&mut self, span: Span, what: impl Into<String>, remedy: impl Into<String>) {
        let before = &self.text.as_bytes()[..span.start.min(self.text.len())];
        let line = before.iter().filter(|byte| **byte == b'\n').count() + 1;
        let start = before.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        let column = String::from_utf8_lossy(&before[start..]).chars().count() + 1;
        self.mistakes.push(Mistake { path: self.path.to_owned(), line, column, what: what.into(), remedy: remedy.into() });
    }

    fn config(&mut self, table: &'a DeTable<'a>, plain: &toml::Table) -> Config {
        let mut root = Section { name: String::new(), at: 0..0, table, known: Vec::new() };
        let fleet = self.tables_at(&mut root, "fleet");
        let (at, fleet) = match fleet {
            Some(section) => (section.at.clone(), self.fleet(section)),
            None => {
                self.wrong(0..0, "there is no [fleet]", "add [fleet] with at least name = \"…\"");
                (0..0, Fleet::default())
            }
        };
        let conversations = self.tables_at(&mut root, "conversations").and_then(|section| self.conversations(section));
        let has_secret = matches!(root.has("fleet"), Some(DeValue::Table(fleet)) if fleet.contains_key("secret"));
        if root.has("conversations").is_some() && !has_secret {
            let remedy = "add secret = { file = \"…\" } to [fleet]: containers' tokens are made of it";
            self.wrong(at.clone(), "[conversations] wants a secret of the fleet's", remedy);
        }
        let providers: BTreeMap<String, ProviderConfig> = self
            .named(&mut root, "providers")
            .into_iter()
            .map(|(name, section)| {
                let settings = plain.get("providers").and_then(|all| all.get(&name)).and_then(toml::Value::as_table);
                let provider = self.provider(&name, section, settings.cloned().unwrap_or_default());
                (name, provider)
            })
            .collect();
        let tenants: BTreeMap<String, Tenant> = self
            .named(&mut root, "tenants")
            .into_iter()
            .map(|(name, section)| (name.clone(), self.tenant(name, section)))
            .collect();
        let templates: BTreeMap<String, Template> = self
            .named(&mut root, "templates")
            .into_iter()
            .map(|(name, section)| (name.clone(), self.template(name, section, &providers)))
            .collect();
        let mut callers: BTreeMap<String, Caller> = BTreeMap::new();
        for (name, section) in self.named(&mut root, "callers") {
            let at = section.at.clone();
            let caller = self.caller(name.clone(), section, &tenants);
            if let Some(other) = callers.values().find(|other| other.digests.iter().any(|one| caller.digests.contains(one))) {
                let what = format!("`callers.{name}` and `callers.{}` have the same token", other.name);
                self.wrong(at, what, "give each its own, so that they can be told apart");
            }
            callers.insert(name, caller);
        }
        if callers.is_empty() && !fleet.listen.ip().is_loopback() {
            let remedy = "add [callers.NAME] with token = { file = \"…\" }, or listen on 127.0.0.1";
            self.wrong(at, format!("nobody may ask at {}: there is no [callers.NAME]", fleet.listen), remedy);
        }
        let hooks = self.hooks(&mut root, &templates);
        self.archives(&root, &templates, conversations.is_some());
        self.finish(root);
        Config { path: self.path.to_owned(), fleet, callers, providers, templates, tenants, hooks, conversations }
    }

    fn fleet(&mut self, mut section: Section<'a>) -> Fleet {
        let default = Fleet::default();
        let name = self.need(&mut section, "name", label, "name = \"prod\": it is on every container as a label");
        let listen = self.get(&mut section, "listen", address).unwrap_or(default.listen);
        let keep = self.get(&mut section, "keep", time).unwrap_or(default.keep);
        let at = section.at_key("otlp_endpoint");
        let otlp_endpoint = self.get(&mut section, "otlp_endpoint", text);
        if let Some(endpoint) = &otlp_endpoint
            && (!["http://", "https://"].iter().any(|scheme| endpoint.starts_with(scheme)) || endpoint.contains('@'))
        {
            self.wrong(at, "`fleet.otlp_endpoint` is a URL without a password", "write it like http://collector:4318");
        }
        let (store, at) = (section.has("store"), section.at_key("store"));
        let store = match store {
            Some(DeValue::Table(_)) => {
                self.secret(&mut section, "store").and_then(|secret| self.outside(&secret, "fleet.store", at.clone()))
            }
            Some(_) => self.get(&mut section, "store", text).map(|url| {
                if is_key(&url) {
                    let remedy = "write store = { env = \"…\" } or { file = \"…\" } and put the whole URL there";
                    self.wrong(at.clone(), "`fleet.store` has a password in it", remedy);
                }
                Hidden::new(url)
            }),
            None => {
                section.known.push("store");
                None
            }
        };
        if let Some(store) = &store
            && !["sqlite:", "postgres://", "postgresql://"].iter().any(|scheme| store.reveal().starts_with(scheme))
        {
            let remedy = "write it like sqlite:///var/lib/agent-fleet/fleet.db or postgres://user@host/database";
            self.wrong(at, "`fleet.store` is the URL of a SQLite file or of a PostgreSQL database", remedy);
        } else if let Some(Err(what)) = store.as_ref().map(|store| crate::store::check(store.reveal())) {
            let remedy = "write it like sqlite:///var/lib/agent-fleet/fleet.db or postgres://user@host/database";
            self.wrong(at, format!("`fleet.store`: {what}"), remedy);
        }
        let url = self.get(&mut section, "url", web_url).map(|url| url.trim_end_matches('/').to_owned());
        let at = section.at_key("secret");
        let secret = self.secret(&mut section, "secret").and_then(|secret| self.needed(&secret, "fleet.secret", at.clone()));
        if secret.as_ref().is_some_and(|secret| secret.reveal().len() < LEAST_TOKEN) {
            let what = format!("`fleet.secret` has fewer than {LEAST_TOKEN} characters, which can be guessed");
            self.wrong(at, what, "make one with `openssl rand -hex 32`");
        }
        if url.is_some() && section.has("secret").is_none() {
            let remedy = "add secret = { file = \"…\" }: containers' tokens are made of it";
            self.wrong(section.at_key("url"), "`fleet.url` is for containers, and they have no token", remedy);
        }
        self.finish(section);
        let (name, store) = (name.unwrap_or_default(), store.unwrap_or(default.store));
        Fleet { name, listen, store, keep, url, secret, otlp_endpoint }
    }

    fn provider(&mut self, name: &str, mut section: Section<'a>, mut settings: toml::Table) -> ProviderConfig {
        let kind = self.need(&mut section, "kind", text, "kind = \"docker\"").unwrap_or_default();
        settings.remove("kind");
        let config = ProviderConfig { kind, settings };
        if KINDS.contains(&config.kind.as_str()) {
            self.settings(name, &mut section, config.clone());
        } else if !config.kind.is_empty() {
            let what = format!("there is no provider of the kind `{}`", config.kind);
            self.wrong(section.at_key("kind"), what, nearest(&config.kind, KINDS.iter().copied()));
        }
        for (key, value) in section.table {
            if let DeValue::String(text) = value.get_ref()
                && !section.known.iter().any(|known| known == key.get_ref())
                && holds_key(&format!("_{}", key.get_ref()), text)
            {
                let what = format!("`{}.{}` holds a secret", section.name, key.get_ref());
                self.wrong(value.span(), what, "name where it is: { env = \"…\" } or { file = \"…\" }");
            }
        }
        config
    }

    /// Tried again without each that is wrong, so that one does not hide the next.
    fn settings(&mut self, name: &str, section: &mut Section<'a>, mut config: ProviderConfig) {
        let mut wrong: BTreeSet<String> = BTreeSet::new();
        for key in PROVIDER_SECRETS {
            if section.has(key).is_none() {
                continue;
            }
            let (at, named) = (section.at_key(key), section.key(key));
            let found = self.secret(section, key);
            if let Some(secret) = &found {
                self.needed(secret, &named, at);
            }
            if matches!(found, None | Some(Secret::Provider(_))) {
                config.settings.remove(key);
                wrong.insert(key.to_owned());
            }
        }
        for key in PROVIDER_FILES {
            let path = section.has(key).and_then(DeValue::as_str);
            if let Some(path) = path.filter(|path| !self.outside.has_file(Path::new(path))) {
                let what = format!("`{}`: there is no file `{path}`", section.key(key));
                self.wrong(section.at_key(key), what, "write the path of one that the fleet can read");
            }
        }
        for (key, value) in section.table {
            let key = key.get_ref();
            // What costs less than nothing would be money for its tenant.
            let parts = value.get_ref().as_table().into_iter().flatten();
            let amounts =
                parts.map(|(part, value)| (format!("{key}.{}", part.get_ref()), value)).chain([(key.to_string(), value)]);
            for (part, value) in amounts.filter(|_| is_amount(key)) {
                if number(value.get_ref()).is_some_and(|usd| !(0.0..1e7).contains(&usd)) {
                    let what =
                        format!("`{}` is zero or more and below ten million, not {}", section.key(&part), form(value.get_ref()));
                    self.wrong(value.span(), what, "write it like 0.05");
                    config.settings.remove(key.as_ref());
                    wrong.insert(key.to_string());
                }
            }
        }
        loop {
            let unfit = match build::provider(name, &config) {
                Ok(provider) => {
                    if wrong.is_empty() {
                        self.can.insert(name.to_owned(), provider.capabilities());
                    }
                    return;
                }
                Err(unfit) => unfit,
            };
            let key = unfit.setting.as_ref().and_then(|setting| setting.split(['.', '[']).next()).unwrap_or_default();
            let known = unfit.what.strip_prefix("unknown field `").and_then(|rest| rest.split_once('`'));
            match (section.table.get_key_value(key), config.settings.remove(key)) {
                (Some((written, _)), Some(_)) if known.is_some_and(|(unknown, _)| unknown == key) => {
                    let known = known.map_or("", |(_, known)| known).split('`').skip(1).step_by(2);
                    self.wrong(written.span(), format!("there is no setting `{}`", section.key(key)), nearest(key, known));
                }
                (Some((_, value)), Some(_)) => self.wrong(value.span(), unfit.to_string(), "mend it"),
                _ => match unfit.what.strip_prefix("missing field ").map(|key| key.trim_matches('`')) {
                    // That it is missing now is our doing.
                    Some(key) if wrong.contains(key) => return,
                    Some(key) => return self.wrong(section.at.clone(), format!("`{}` has no `{key}`", section.name), "add it"),
                    None => return self.wrong(section.at.clone(), unfit.to_string(), "mend its settings"),
                },
            }
            wrong.insert(key.to_owned());
        }
    }

    fn tenant(&mut self, name: String, mut section: Section<'a>) -> Tenant {
        let budget_usd_per_day = self.get(&mut section, "budget_usd_per_day", dollars);
        let budget_usd_per_month = self.get(&mut section, "budget_usd_per_month", dollars);
        let zone = self.get(&mut section, "time_zone", zone).unwrap_or(TimeZone::UTC);
        let max_sessions = self.get(&mut section, "max_sessions", count);
        if let (Some(day), Some(month)) = (budget_usd_per_day, budget_usd_per_month)
            && day > month
        {
            let what = format!("`{}` may spend more in a day ({day}) than in a month ({month})", section.name);
            self.wrong(section.at_key("budget_usd_per_day"), what, "lower the one or raise the other");
        }
        self.finish(section);
        Tenant { name, budget_usd_per_day, budget_usd_per_month, zone, max_sessions }
    }

    fn caller(&mut self, name: String, mut section: Section<'a>, tenants: &BTreeMap<String, Tenant>) -> Caller {
        let at = section.at_key("token");
        let token = self.secrets(&mut section, "token");
        if token.is_empty() && section.has("token").is_none() {
            let what = format!("`{}` has no token", section.name);
            self.wrong(section.at.clone(), what, "add token = { file = \"…\" } or { env = \"…\" }");
        }
        let key = format!("{}.token", section.name);
        let values: Vec<Hidden> = token.iter().filter_map(|token| self.outside(token, &key, at.clone())).collect();
        if values.iter().any(|value| value.reveal().len() < LEAST_TOKEN) {
            let what = format!("`{key}` has fewer than {LEAST_TOKEN} characters, which can be guessed");
            self.wrong(at, what, "make one with `openssl rand -hex 32`");
        }
        let mut of = self.get(&mut section, "tenants", texts).unwrap_or_default();
        let admin = self.get(&mut section, "admin", switch).unwrap_or(false);
        let at = section.at_key("tenants");
        if of.is_empty() && !admin {
            let remedy = "add tenants = [\"…\"], or [\"*\"] for all of them";
            self.wrong(at.clone(), format!("`{}` may ask for no tenant", section.name), remedy);
        }
        if of.iter().any(|tenant| tenant == "*") {
            of.clear();
        }
        for tenant in of.iter().filter(|tenant| !tenants.contains_key(*tenant)) {
            let remedy = missing(tenant, tenants.keys(), &format!("[tenants.{tenant}]"));
            self.wrong(at.clone(), format!("there is no tenant `{tenant}`"), remedy);
        }
        self.finish(section);
        let digests = values.iter().map(|value| secret::digest(value.reveal())).collect();
        Caller { name, tenants: of, admin, digests }
    }

    fn template(&mut self, name: String, mut section: Section<'a>, providers: &BTreeMap<String, ProviderConfig>) -> Template {
        let s = &mut section;
        let pattern = self.need(s, "pattern", pattern, "pattern = \"ephemeral\"").unwrap_or(Pattern::Ephemeral);
        let provider = self.need(s, "provider", text, "provider = \"…\", the name of one of [providers]").unwrap_or_default();
        if !provider.is_empty() && !providers.contains_key(&provider) {
            let remedy = missing(&provider, providers.keys(), &format!("[providers.{provider}]"));
            self.wrong(s.at_key("provider"), format!("there is no provider `{provider}`"), remedy);
        }
        let image = self.need(s, "image", text, "image = \"registry.example/agent@sha256:…\"").unwrap_or_default();
        if image.chars().any(char::is_whitespace) {
            let what = format!("`{}.image` has a space in it: `{}`", s.name, image.escape_debug());
            self.wrong(s.at_key("image"), what, "write it like registry.example/agent:1, and what runs in it in `command`");
        }
        let command = self.get(s, "command", texts).unwrap_or_default();
        if command.iter().any(|word| is_key(word)) {
            let what = format!("`{}.command` holds a secret, which everybody sees who lists processes", s.name);
            self.wrong(s.at_key("command"), what, "put it into `secrets`, as a variable");
        }
        let (env, secrets) = self.environment(s);
        let size = self.size(s);
        let ports = self.get(s, "ports", ports).unwrap_or_default();
        let sidecar_port = self.get(s, "sidecar_port", port).unwrap_or(SIDECAR_PORT);
        let app_port = self.get(s, "app_port", port);
        if app_port == Some(sidecar_port) {
            let what = format!("`{}.app_port` is {sidecar_port}, where its sidecar listens", s.name);
            self.wrong(s.at_key("app_port"), what, "take another for one of the two: 8000, say");
        }
        let at = s.at_key("app_token");
        let app_token = self.secret(s, "app_token").and_then(|token| {
            let key = format!("{}.app_token", s.name);
            if let Secret::Provider(_) = token {
                self.wrong(at.clone(), format!("`{key}` is needed here, not in a container"), "name a variable or a file");
            }
            self.outside(&token, &key, at.clone())
        });
        if s.has("app_token").is_some() && app_port.is_none() {
            let what = format!("`{}.app_token` is said to nobody without `app_port`", s.name);
            self.wrong(at, what, "add app_port = 8000, or leave it out");
        }
        let labels = self.labels(s);

        let ttl = self.get(s, "ttl", time).unwrap_or(TTL);
        let idle_after = self.get(s, "idle_after", time_or_off).unwrap_or(match pattern {
            Pattern::Hybrid => Some(IDLE_AFTER),
            Pattern::Ephemeral | Pattern::LongRunning | Pattern::Shared => None,
        });
        let provider_idle = self.get(s, "provider_idle", time_or_off).flatten();
        let ready_within = self.get(s, "ready_within", time).unwrap_or(READY_WITHIN);
        let stop_grace = self.get(s, "stop_grace", time).unwrap_or(STOP_GRACE);
        let max_age = self.get(s, "max_age", time).unwrap_or(match pattern {
            Pattern::Hybrid => ttl.max(HYBRID_AGE),
            Pattern::Ephemeral | Pattern::LongRunning | Pattern::Shared => ttl,
        });
        let life = format!("`{}.ttl` is {}", s.name, super::time(ttl));
        for (key, within) in [("idle_after", idle_after), ("ready_within", Some(ready_within)), ("provider_idle", provider_idle)]
        {
            if within.is_some_and(|within| within >= ttl) && (s.has(key).is_some() || s.has("ttl").is_some()) {
                let at = if s.has(key).is_some() { s.at_key(key) } else { s.at_key("ttl") };
                let what =
                    format!("`{}.{key}` is {}, which never comes: {life}", s.name, super::time(within.unwrap_or_default()));
                self.wrong(at, what, format!("lower `{key}` or raise `ttl`"));
            }
        }
        if stop_grace > MOST_GRACE {
            let what = format!("`{}.stop_grace` is longer than {}", s.name, super::time(MOST_GRACE));
            self.wrong(s.at_key("stop_grace"), what, "lower it: no provider waits longer for a container to end");
        }
        if max_age < ttl {
            let what = format!("`{}.max_age` is {}, shorter than one container's life: {life}", s.name, super::time(max_age));
            self.wrong(s.at_key("max_age"), what, "raise `max_age` or lower `ttl`");
        }
        if pattern == Pattern::Hybrid && s.has("idle_after").is_some() && idle_after.is_none() {
            let what = format!("`{}` is hybrid and is never idle", s.name);
            self.wrong(s.at_key("idle_after"), what, "set a time, or make it long-running");
        }
        let archive = self.get(s, "archive", switch).unwrap_or(false);
        if archive && pattern != Pattern::Hybrid && s.has("shared").is_none() {
            let what = format!(
                "`{}` is {}, and `archive` is for what is put away and gone on with",
                s.name,
                super::pattern_name(pattern)
            );
            self.wrong(s.at_key("archive"), what, "make it hybrid or shared, or leave `archive` out");
        }
        let (pool, recycle) = (self.pool(s, ttl), self.recycle(s));
        if pattern == Pattern::Ephemeral && s.has("pool").is_some() && app_port.is_none() {
            let what =
                format!("`{}.pool`: a task begins when its container is made, and is done before anybody asks for it", s.name);
            let remedy = "leave the pool out, or name the `app_port` of an app that waits for a message";
            self.wrong(s.at_key("pool"), what, remedy);
        }
        for (key, beyond) in [
            ("age", recycle.age.is_some_and(|age| age >= ttl)),
            ("memory", recycle.memory_bytes.is_some_and(|bytes| bytes > u64::from(size.memory_mib) << 20)),
        ] {
            if beyond {
                let what = format!("`{}.recycle.{key}` never comes: a container ends, or has no more memory, before", s.name);
                self.wrong(s.at_key("recycle"), what, format!("lower `{key}`"));
            }
        }
        let shared = self.shared(s, pattern, app_port.is_some());
        if pattern == Pattern::Shared && s.has("shared").is_none() {
            let what = format!("`{}` is shared, and does not say by how many", s.name);
            self.wrong(s.at_key("pattern"), what, "add shared = { sessions_per_container = 8 }, or make it long-running");
        }
        let at = section.at.clone();
        self.finish(section);
        let template = Template {
            name,
            pattern,
            provider,
            image,
            command,
            env,
            secrets,
            size,
            ports,
            ttl,
            idle_after,
            ready_within,
            stop_grace,
            max_age,
            labels,
            sidecar_port,
            app_port,
            app_token,
            provider_idle,
            archive,
            pool,
            recycle,
            shared,
        };
        if let Some(can) = self.can.get(&template.provider) {
            let refused = refusals(can, &template.spec_for("", &SessionId::fresh(), "", 1));
            for what in refused {
                let remedy = "change the template, or take another provider";
                self.wrong(at.clone(), format!("`templates.{}`: `{}` {what}", template.name, template.provider), remedy);
            }
        }
        template
    }

    fn environment(&mut self, s: &mut Section<'a>) -> (BTreeMap<String, String>, BTreeMap<String, Secret>) {
        let mut env = BTreeMap::new();
        for (name, value, at) in self.entries(s, "env") {
            let DeValue::String(text) = value.get_ref() else {
                self.wrong(value.span(), format!("`{}.env.{name}` is a text, not {}", s.name, form(value.get_ref())), IN_QUOTES);
                continue;
            };
            if holds_key(&name, text) {
                let what = format!("`{}.env.{name}` holds a secret", s.name);
                let remedy = format!("write secrets = {{ {name} = {{ env = \"{name}\" }} }}, or {{ file = \"…\" }}");
                self.wrong(value.span(), what, remedy);
            }
            self.variable(&s.name, &name, at);
            env.insert(name, text.to_string());
        }
        let mut secrets = BTreeMap::new();
        for (name, value, at) in self.entries(s, "secrets") {
            self.variable(&s.name, &name, at.clone());
            if env.contains_key(&name) {
                let what = format!("`{}` has `{name}` twice, in `env` and in `secrets`", s.name);
                self.wrong(at, what, "remove one of them");
            }
            let key = format!("{}.secrets.{name}", s.name);
            if let Some(secret) = self.reference(value, &key) {
                self.outside(&secret, &key, value.span());
                secrets.insert(name, secret);
            }
        }
        (env, secrets)
    }

    fn variable(&mut self, section: &str, name: &str, at: Span) {
        if !is_variable(name) {
            let what = format!("`{name}` in `{section}` is no name of a variable");
            self.wrong(at, what, "write letters, digits and `_`, not beginning with a digit");
        } else if name.starts_with("AGENT_FLEET_") {
            self.wrong(at, format!("`{name}` in `{section}` is the fleet's own"), "remove it; the fleet sets what begins so");
        }
    }

    fn size(&mut self, s: &mut Section<'a>) -> Size {
        let default = Size::default();
        let Some(mut size) = self.tables_at(s, "size") else { return default };
        let cpu_milli = self.get(&mut size, "cpu", cpus).unwrap_or(default.cpu_milli);
        let memory_mib = self.get(&mut size, "memory", mebibytes).unwrap_or(default.memory_mib);
        let disk_mib = self.get(&mut size, "disk", mebibytes).unwrap_or(default.disk_mib);
        self.finish(size);
        Size { cpu_milli, memory_mib, disk_mib }
    }

    fn pool(&mut self, s: &mut Section<'a>, ttl: Duration) -> Option<Pool> {
        let mut pool = self.tables_at(s, "pool")?;
        let size = self.need(&mut pool, "size", count, "size = 3: how many are to wait").unwrap_or(1);
        let max_age = self.get(&mut pool, "max_age", time).unwrap_or(ttl / 2);
        let per_minute = self.get(&mut pool, "per_minute", count).unwrap_or(PER_MINUTE);
        if size > MOST_POOL {
            let what = format!("`{}.size` is {size}, more than {MOST_POOL}", pool.name);
            self.wrong(pool.at_key("size"), what, "lower it: each of them costs while it waits");
        }
        if max_age >= ttl {
            let what =
                format!("`{}.max_age` is {}: nothing is left of a life of {}", pool.name, super::time(max_age), super::time(ttl));
            self.wrong(pool.at_key("max_age"), what, "lower it, or raise `ttl`: who takes a container has the rest of its life");
        }
        self.finish(pool);
        let whole = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
        Some(Pool { size: whole(size), max_age, per_minute: whole(per_minute) })
    }

    fn shared(&mut self, s: &mut Section<'a>, pattern: Pattern, talks: bool) -> Option<Share> {
        let mut shared = self.tables_at(s, "shared")?;
        let most = self.need(&mut shared, "sessions_per_container", count, "sessions_per_container = 8").unwrap_or(1);
        let containers = self.get(&mut shared, "containers", count);
        for (key, n) in [("sessions_per_container", most), ("containers", containers.unwrap_or(1))] {
            if !(1..=MOST_SHARED).contains(&n) {
                let what = format!("`{}.{key}` is {n}", shared.name);
                self.wrong(shared.at_key(key), what, format!("say 1 to {MOST_SHARED}"));
            }
        }
        self.finish(shared);
        if !matches!(pattern, Pattern::Shared | Pattern::LongRunning) {
            let what = format!("`{}` is {}, and has its container for itself", s.name, super::pattern_name(pattern));
            self.wrong(s.at_key("shared"), what, "make it shared or long-running, or leave `shared` out");
        }
        if !talks {
            let what = format!("`{}.shared` needs `app_port`: sessions in one container are told apart by its app", s.name);
            self.wrong(s.at_key("shared"), what, "add app_port = 8000, where `agent-sidecar serve` answers");
        }
        let whole = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
        Some(Share { sessions_per_container: whole(most), containers: containers.map(whole) })
    }

    fn recycle(&mut self, s: &mut Section<'a>) -> Recycle {
        let Some(mut recycle) = self.tables_at(s, "recycle") else { return Recycle::default() };
        let age = self.get(&mut recycle, "age", time);
        let bytes = |mib: u32| u64::from(mib) << 20;
        let memory_bytes = self.get(&mut recycle, "memory", mebibytes).map(bytes);
        let growth_per_hour_bytes = self.get(&mut recycle, "memory_growth_per_hour", mebibytes).map(bytes);
        self.finish(recycle);
        Recycle { age, memory_bytes, growth_per_hour_bytes }
    }

    fn labels(&mut self, s: &mut Section<'a>) -> BTreeMap<String, String> {
        let mut labels = BTreeMap::new();
        for (name, value, at) in self.entries(s, "labels") {
            let own = name.starts_with("agent-fleet.");
            match value.get_ref() {
                _ if own => {
                    self.wrong(at, format!("the label `{name}` in `{}` is the fleet's own", s.name), "remove it");
                }
                DeValue::String(text) if is_key(text) => {
                    let what = format!("the label `{name}` in `{}` holds a secret", s.name);
                    self.wrong(value.span(), what, "remove it; labels are seen by everybody");
                }
                DeValue::String(text) => {
                    labels.insert(name, text.to_string());
                }
                other => {
                    self.wrong(value.span(), format!("the label `{name}` is a text, not {}", form(other)), IN_QUOTES);
                }
            }
        }
        labels
    }

    fn hooks(&mut self, root: &mut Section<'a>, templates: &BTreeMap<String, Template>) -> Vec<Hook> {
        root.known.push("hooks");
        let Some(value) = root.table.get("hooks") else { return Vec::new() };
        let DeValue::Array(rows) = value.get_ref() else {
            self.wrong(value.span(), "`hooks` is a list", "write [[hooks]] above each");
            return Vec::new();
        };
        let mut names = BTreeSet::new();
        let mut hooks = Vec::new();
        for (n, row) in rows.into_iter().enumerate() {
            let DeValue::Table(table) = row.get_ref() else {
                self.wrong(row.span(), "`hooks` is a list of tables", "write [[hooks]] above each");
                continue;
            };
            let section = Section { name: format!("hooks.{}", n + 1), at: row.span(), table, known: Vec::new() };
            let hook = self.hook(section, templates);
            if !names.insert(hook.name.clone()) && !hook.name.is_empty() {
                let what = format!("two hooks are called `{}`", hook.name);
                self.wrong(row.span(), what, "give each its own name: the log tells them apart by it");
            }
            hooks.push(hook);
        }
        hooks
    }

    fn hook(&mut self, mut section: Section<'a>, templates: &BTreeMap<String, Template>) -> Hook {
        let s = &mut section;
        let name = self.need(s, "name", label, "name = \"…\"").unwrap_or_default();
        if !name.is_empty() {
            s.name = format!("hooks.{name}");
        }
        let on = self.phases(s);
        let of = self.get(s, "templates", texts).unwrap_or_default();
        for template in of.iter().filter(|template| !templates.contains_key(*template)) {
            let remedy = missing(template, templates.keys(), &format!("[templates.{template}]"));
            self.wrong(s.at_key("templates"), format!("there is no template `{template}`"), remedy);
        }
        let act = self.act(s);
        let timeout = self.need(s, "timeout", time, "timeout = \"5s\": no hook is waited for without an end").unwrap_or_default();
        if timeout > MOST_TIMEOUT {
            let what = format!("`{}.timeout` is longer than {}", s.name, super::time(MOST_TIMEOUT));
            self.wrong(s.at_key("timeout"), what, "lower it: a session waits as long");
        }
        let retries = self.get(s, "retries", whole).unwrap_or(0);
        if retries > MOST_RETRIES {
            let what = format!("`{}.retries` is {retries}", s.name);
            self.wrong(s.at_key("retries"), what, format!("write at most {MOST_RETRIES}"));
        }
        let required = self.get(s, "required", switch).unwrap_or(true);
        let veto = self.get(s, "veto", switch);
        let deaf: Vec<&str> = on.iter().filter(|phase| !phase.can_be_vetoed()).map(|phase| phase.as_str()).collect();
        if veto == Some(true) && !deaf.is_empty() {
            let what = format!("`{}.veto`: nobody can say no to {}", s.name, deaf.join(", "));
            self.wrong(s.at_key("veto"), what, "a veto is heard on requested and creating alone");
        }
        self.finish(section);
        let retries = u32::try_from(retries).unwrap_or(u32::MAX);
        Hook { name, on, templates: of, act, timeout, retries, required, veto: veto.unwrap_or(true) }
    }

    fn phases(&mut self, s: &mut Section<'a>) -> Vec<Phase> {
        let names = self.need(s, "on", texts, "on = [\"ready\"]").unwrap_or_default();
        let at = s.at_key("on");
        if names.is_empty() && s.has("on").is_some() {
            self.wrong(at.clone(), format!("`{}` runs on no phase", s.name), "add on = [\"ready\"]");
        }
        let mut phases: Vec<Phase> = Vec::new();
        for name in names {
            match Phase::ALL.into_iter().find(|phase| phase.as_str() == name) {
                Some(phase) if phases.contains(&phase) => {
                    self.wrong(at.clone(), format!("`{}.on` has `{name}` twice", s.name), "remove one");
                }
                Some(phase) => phases.push(phase),
                None => {
                    let remedy = nearest(&name, Phase::ALL.iter().map(|phase| phase.as_str()));
                    self.wrong(at.clone(), format!("there is no phase `{name}`"), remedy);
                }
            }
        }
        phases
    }

    fn act(&mut self, s: &mut Section<'a>) -> Act {
        let argv = self.get(s, "command", texts);
        let pass = self.get(s, "pass", texts);
        let url = self.get(s, "webhook", web_url);
        let at = s.at_key("secret");
        let secrets = self.secrets(s, "secret");
        let insecure = self.get(s, "insecure", switch).unwrap_or(false);
        match (s.has("command").is_some(), s.has("webhook").is_some()) {
            (true, true) => {
                let what = format!("`{}` is a command and a webhook", s.name);
                self.wrong(s.at_key("webhook"), what, "make two hooks of it");
            }
            (false, false) => {
                let what = format!("`{}` does nothing", s.name);
                self.wrong(s.at.clone(), what, "add command = [\"…\"] or webhook = \"https://…\"");
            }
            (true, false) | (false, true) => {}
        }
        if let Some(argv) = argv {
            match argv.first() {
                None => self.wrong(
                    s.at_key("command"),
                    format!("`{}.command` is empty", s.name),
                    "write the program and its arguments",
                ),
                // It is run with a PATH of ours, so that nobody's `.` is in it.
                Some(program) if !program.starts_with('/') => {
                    let what = format!("`{}.command` begins with `{program}`", s.name);
                    self.wrong(s.at_key("command"), what, "write the program's whole path");
                }
                Some(program) if !self.outside.has_program(Path::new(program)) => {
                    let what = format!("`{}.command`: there is no program `{program}`", s.name);
                    self.wrong(s.at_key("command"), what, "write the whole path of one that may be executed");
                }
                Some(_) if argv.iter().any(|word| is_key(word)) => {
                    let what = format!("`{}.command` holds a secret, which everybody sees who lists processes", s.name);
                    self.wrong(s.at_key("command"), what, "put it into a variable of the fleet's, and name it in `pass`");
                }
                Some(_) => {}
            }
            for key in ["secret", "insecure"] {
                if s.has(key).is_some() {
                    self.wrong(s.at_key(key), format!("`{}.{key}` is for webhooks", s.name), "remove it");
                }
            }
            return Act::Command { argv, pass: pass.unwrap_or_default() };
        }
        let url = url.unwrap_or_default();
        if s.has("pass").is_some() {
            self.wrong(s.at_key("pass"), format!("`{}.pass` is for commands", s.name), "remove it");
        }
        if let Ok(parsed) = reqwest::Url::parse(&url) {
            if parsed.scheme() == "http" && !is_loopback(&parsed) && !insecure {
                let what = format!("`{}.webhook` goes over http to another machine", s.name);
                self.wrong(s.at_key("webhook"), what, "use https, or set insecure = true");
            }
            if secrets.is_empty() && s.has("secret").is_none() {
                let what = format!("`{}` is not signed: whoever finds its receiver can speak for the fleet", s.name);
                self.wrong(s.at.clone(), what, "add secret = { file = \"…\" }, with whsec_ and `openssl rand -base64 32` in it");
            }
        }
        let key = format!("{}.secret", s.name);
        for secret in &secrets {
            if let Some(value) = self.outside(secret, &key, at.clone())
                && let Err(what) = sign::Key::of(value.reveal())
            {
                self.wrong(at.clone(), format!("`{key}` {what}"), "write whsec_ and what `openssl rand -base64 32` prints");
            }
        }
        Act::Webhook { url, secrets }
    }

    // What every table is read with.

    pub(super) fn get<T>(
        &mut self,
        section: &mut Section<'a>,
        key: &'static str,
        parse: fn(&DeValue<'_>) -> Result<T, Wrong>,
    ) -> Option<T> {
        section.known.push(key);
        let value = section.table.get(key)?;
        match parse(value.get_ref()) {
            Ok(value) => Some(value),
            Err(Wrong { what, remedy }) => {
                self.wrong(value.span(), format!("`{}` {what}", section.key(key)), remedy);
                None
            }
        }
    }

    /// The same of what must be there.
    fn need<T>(
        &mut self,
        section: &mut Section<'a>,
        key: &'static str,
        parse: fn(&DeValue<'_>) -> Result<T, Wrong>,
        remedy: &str,
    ) -> Option<T> {
        if section.has(key).is_none() {
            section.known.push(key);
            self.wrong(section.at.clone(), format!("`{}` has no `{key}`", section.name), format!("add {remedy}"));
            return None;
        }
        self.get(section, key, parse)
    }

    fn tables_at(&mut self, section: &mut Section<'a>, key: &'static str) -> Option<Section<'a>> {
        section.known.push(key);
        let (written, value) = section.table.get_key_value(key)?;
        let name = section.key(key);
        match value.get_ref() {
            DeValue::Table(table) => Some(Section { name, at: written.span(), table, known: Vec::new() }),
            other => {
                self.wrong(
                    value.span(),
                    format!("`{name}` is a table, not {}", form(other)),
                    format!("write [{name}] above its keys"),
                );
                None
            }
        }
    }

    /// The tables of a table, by their names.
    fn named(&mut self, root: &mut Section<'a>, key: &'static str) -> Vec<(String, Section<'a>)> {
        let mut found = Vec::new();
        for (name, value, at) in self.entries(root, key) {
            let what = format!("{key}.{name}");
            if !is_label(&name) {
                self.wrong(at.clone(), format!("`{name}` in [{key}] is no name"), NAMES);
            }
            match value.get_ref() {
                DeValue::Table(table) => found.push((name, Section { name: what, at, table, known: Vec::new() })),
                other => {
                    self.wrong(
                        value.span(),
                        format!("`{what}` is a table, not {}", form(other)),
                        format!("write [{key}.NAME] above its keys"),
                    );
                }
            }
        }
        found
    }

    fn entries(&mut self, section: &mut Section<'a>, key: &'static str) -> Vec<(String, &'a Spanned<DeValue<'a>>, Span)> {
        let Some(table) = self.tables_at(section, key) else { return Vec::new() };
        table.table.iter().map(|(name, value)| (name.get_ref().to_string(), value, name.span())).collect()
    }

    pub(super) fn secret(&mut self, section: &mut Section<'a>, key: &'static str) -> Option<Secret> {
        section.known.push(key);
        self.reference(section.table.get(key)?, &section.key(key))
    }

    /// One, or a list of several: all of them are right while one replaces another.
    fn secrets(&mut self, section: &mut Section<'a>, key: &'static str) -> Vec<Secret> {
        section.known.push(key);
        let Some(value) = section.table.get(key) else { return Vec::new() };
        let name = section.key(key);
        let found: Vec<Secret> = match value.get_ref() {
            DeValue::Array(rows) => rows.into_iter().filter_map(|row| self.reference(row, &name)).collect(),
            _ => self.reference(value, &name).into_iter().collect(),
        };
        if found.iter().any(|secret| matches!(secret, Secret::Provider(_))) {
            self.wrong(value.span(), format!("`{name}` is needed here, not in a container"), "name a variable or a file");
        }
        found.into_iter().filter(|secret| !matches!(secret, Secret::Provider(_))).collect()
    }

    /// `{ env = "…" }`, `{ file = "…" }`, `{ provider = "…" }`.
    fn reference(&mut self, value: &Spanned<DeValue<'_>>, key: &str) -> Option<Secret> {
        // What a provider keeps reaches its containers alone.
        let remedy = if key.starts_with("templates.") && key.contains(".secrets.") {
            "write { env = \"NAME\" }, { file = \"/path\" } or { provider = \"name\" }"
        } else {
            "write { env = \"NAME\" } or { file = \"/path\" }"
        };
        let DeValue::Table(table) = value.get_ref() else {
            // Not what it is: it may be the secret itself.
            self.wrong(value.span(), format!("`{key}` says where a secret is"), remedy);
            return None;
        };
        let one = table.iter().next().filter(|_| table.len() == 1);
        let secret = one.and_then(|(kind, value)| {
            let text = value.get_ref().as_str().filter(|text| !text.is_empty())?;
            match kind.get_ref().as_ref() {
                "env" => Some(Secret::Env(text.to_owned())),
                "file" => Some(Secret::File(PathBuf::from(text))),
                "provider" => Some(Secret::Provider(text.to_owned())),
                _ => None,
            }
        });
        if secret.is_none() {
            self.wrong(value.span(), format!("`{key}` says where one secret is"), remedy);
        }
        secret
    }

    pub(super) fn outside(&mut self, secret: &Secret, key: &str, at: Span) -> Option<Hidden> {
        match self.outside.secret(secret) {
            Ok(value) => value,
            Err(what) => {
                let remedy = match secret {
                    Secret::Env(_) => String::from("set it where the fleet runs"),
                    Secret::File(path) => format!("write it there, and `chmod 640 {}`", path.display()),
                    Secret::Provider(_) | Secret::Given(_) => String::from("keep it there"),
                };
                self.wrong(at, format!("`{key}`: {what}"), remedy);
                None
            }
        }
    }

    pub(super) fn finish(&mut self, section: Section<'a>) {
        for (key, _) in section.table {
            let name = key.get_ref();
            if !section.known.iter().any(|known| known == name) {
                let remedy = nearest(name, section.known.iter().copied());
                self.wrong(key.span(), format!("there is no setting `{}`", section.key(name)), remedy);
            }
        }
    }
}

impl<'a> Section<'a> {
    fn key(&self, key: &str) -> String {
        if self.name.is_empty() { key.to_owned() } else { format!("{}.{key}", self.name) }
    }

    pub(super) fn has(&self, key: &str) -> Option<&'a DeValue<'a>> {
        self.table.get(key).map(Spanned::get_ref)
    }

    /// Where the key's value is, or else the table.
    pub(super) fn at_key(&self, key: &str) -> Span {
        self.table.get(key).map_or_else(|| self.at.clone(), Spanned::span)
    }
}

impl Default for Fleet {
    fn default() -> Self {
        Fleet {
            name: String::new(),
            listen: SocketAddr::from(([127, 0, 0, 1], 9490)),
            store: Hidden::new(String::from("sqlite:///var/lib/agent-fleet/fleet.db")),
            keep: Duration::from_secs(30 * 86_400),
            url: None,
            secret: None,
            otlp_endpoint: None,
        }
    }
}

/// How long a container may exist where nobody says so.
const TTL: Duration = Duration::from_secs(3_600);
/// How long a hybrid session may exist, over all its containers.
const HYBRID_AGE: Duration = Duration::from_secs(7 * 86_400);
const IDLE_AFTER: Duration = Duration::from_secs(600);
const READY_WITHIN: Duration = Duration::from_secs(120);
/// Containers that are made ahead in a minute, at most: a provider that ends them at once is not asked for thousands.
const PER_MINUTE: u64 = 30;
const MOST_POOL: u64 = 1000;
/// Sessions in a container, which are kept with it, and containers that a session may belong to.
const MOST_SHARED: u64 = 256;
const STOP_GRACE: Duration = Duration::from_secs(30);
const MOST_GRACE: Duration = Duration::from_secs(600);
/// The sidecar's own default.
const SIDECAR_PORT: u16 = 9477;
/// For one try of a hook: a session waits as long.
const MOST_TIMEOUT: Duration = Duration::from_secs(600);
const MOST_RETRIES: u64 = 20;
const LEAST_TOKEN: usize = 32;
