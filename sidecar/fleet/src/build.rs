//! A fleet, as a configuration says it.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::de::DeserializeOwned;

use crate::config::{self, Config, Machine, Place, ProviderConfig, TEMPLATE_LABEL, Template};
use crate::conversation::directory::Directory;
use crate::conversation::postgres::Postgres;
use crate::conversation::s3::S3;
use crate::conversation::{Conversations, Shelf};
use crate::hook::{self, Runner};
use crate::inside::Http;
use crate::place::App;
use crate::plan::{PauseBy, Policy};
use crate::pool::Ahead;
use crate::provider::cloudflare::Cloudflare;
use crate::provider::daytona::Daytona;
use crate::provider::docker::Docker;
use crate::provider::e2b::E2b;
use crate::provider::firecracker::Firecracker;
use crate::provider::fly::Fly;
use crate::provider::kubernetes::Kubernetes;
use crate::provider::modal::Modal;
use crate::provider::vercel::Vercel;
use crate::provider::{self, Capabilities, Provider};
use crate::service::{Clock, Fleet, Hooks, Policies};
use crate::session::Session;
use crate::store::Store;
use crate::token::Tokens;

/// How far ahead a provider's timers are moved while an agent works.
const AHEAD: std::time::Duration = std::time::Duration::from_secs(600);
/// How often a container is looked at where looking costs nothing.
const LOOK_NEAR: std::time::Duration = std::time::Duration::from_secs(5);
/// How long a connection may take: who is there answers sooner.
const CONNECT: std::time::Duration = std::time::Duration::from_secs(10);

/// Settings of a provider that it cannot be made of.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{}: {what}", match setting { Some(setting) => format!("`providers.{provider}.{setting}`"), None => format!("[providers.{provider}]") })]
pub struct Unfit {
    provider: String,
    /// Which one is wrong, if it is one: `price.running`.
    pub setting: Option<String>,
    pub what: String,
}

/// One provider.
///
/// # Errors
/// What is wrong with its settings: the first of it.
pub fn provider(name: &str, config: &ProviderConfig) -> Result<Arc<dyn Provider>, Unfit> {
    let said = |what: String| Unfit { provider: name.to_owned(), setting: None, what };
    match config.kind.as_str() {
        "docker" => Ok(Arc::new(Docker::new(docker(name, config)?))),
        "cloudflare" => Ok(Arc::new(Cloudflare::new(settings(name, config)?).map_err(said)?)),
        "daytona" => Ok(Arc::new(Daytona::new(settings(name, config)?).map_err(said)?)),
        "e2b" => Ok(Arc::new(E2b::new(settings(name, config)?).map_err(said)?)),
        "firecracker" => Ok(Arc::new(Firecracker::new(settings(name, config)?).map_err(said)?)),
        "fly" => Ok(Arc::new(Fly::new(settings(name, config)?).map_err(said)?)),
        "modal" => Ok(Arc::new(Modal::new(settings(name, config)?).map_err(said)?)),
        "kubernetes" => Ok(Arc::new(Kubernetes::new(settings(name, config)?).map_err(said)?)),
        "vercel" => Ok(Arc::new(Vercel::new(settings(name, config)?).map_err(said)?)),
        "gvisor" => Ok(Arc::new(Docker::gvisor(docker(name, config)?))),
        kind => Err(said(format!("there is no kind `{kind}`"))),
    }
}

fn settings<T: DeserializeOwned>(name: &str, config: &ProviderConfig) -> Result<T, Unfit> {
    serde_path_to_error::deserialize(toml::Value::Table(config.settings.clone())).map_err(|error| {
        let path = error.path().to_string();
        let what = error
            .inner()
            .message()
            .replace("expected a sequence", "expected a list")
            .replace("expected a map", "expected a table");
        Unfit { provider: name.to_owned(), setting: (path != ".").then_some(path), what }
    })
}

fn docker(name: &str, config: &ProviderConfig) -> Result<provider::docker::Settings, Unfit> {
    let settings: provider::docker::Settings = settings(name, config)?;
    settings.check().map_err(|(setting, what)| Unfit { provider: name.to_owned(), setting: Some(setting.to_owned()), what })?;
    Ok(settings)
}

/// Sessions are treated as their templates say.
struct Templates {
    templates: BTreeMap<String, Template>,
    can: BTreeMap<String, Capabilities>,
    pools: Vec<Ahead>,
}

impl Templates {
    fn of(&self, session: &Session) -> Option<&Template> {
        self.templates.get(session.spec.labels.get(TEMPLATE_LABEL)?)
    }
}

impl Policies for Templates {
    fn policy(&self, session: &Session) -> Policy {
        let mut policy = Policy::default();
        if let Some(can) = self.can.get(&session.provider) {
            let archives = self.of(session).filter(|template| template.archive);
            policy.pause_by = match archives.and_then(|template| template.shared) {
                // Whatever its provider can: that would pause all that are in it.
                Some(_) => PauseBy::Archive,
                None => PauseBy::of(session.pattern, can.pause, archives.is_some()),
            };
            policy.keep_alive = can.idle_timer.then_some(AHEAD);
            if !can.traffic_keeps_awake {
                policy.look_every = LOOK_NEAR;
            }
        }
        // One whose template is gone from the file ends as those end that never had one.
        if let Some(template) = self.of(session) {
            policy.idle_after = template.idle_after;
            policy.ready_within = template.ready_within;
            policy.stop_grace = template.stop_grace;
            policy.recycle = template.recycle;
        }
        policy
    }

    fn port(&self, session: &Session) -> u16 {
        self.of(session).map_or(9477, |template| template.sidecar_port)
    }

    fn app(&self, session: &Session) -> Option<App> {
        let template = self.of(session)?;
        Some((template.app_port?, template.app_token.clone()))
    }

    fn pools(&self) -> &[Ahead] {
        &self.pools
    }
}

/// Hooks, with what the service runs them with.
///
/// # Errors
/// What is wrong, in words.
pub fn hooks(config: &Config, store: &Arc<dyn Store>, clock: &Clock) -> Result<Arc<dyn Hooks>, String> {
    let hooks = hook::Hooks::new(&config.fleet.name, config.hooks.clone(), Arc::new(Machine))?.with_clock(Arc::clone(clock));
    Ok(Arc::new(Runner { hooks, store: Arc::clone(store) }))
}

/// For everything that is asked over HTTP: with the roots that are built in, and to nobody but whom it was told.
///
/// # Errors
/// It cannot be made.
pub fn client() -> Result<reqwest::Client, String> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let roots = rustls::RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
    let tls = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let tls = tls.map_err(|error| error.to_string())?.with_root_certificates(roots).with_no_client_auth();
    let client = reqwest::Client::builder().tls_backend_preconfigured(tls);
    let client = client.connect_timeout(CONNECT);
    client.redirect(reqwest::redirect::Policy::none()).no_proxy().build().map_err(|error| error.to_string())
}

/// All of it. Nothing is started.
///
/// # Errors
/// What is wrong, in words.
pub fn fleet(config: &Config, store: Arc<dyn Store>, hooks: Arc<dyn Hooks>, clock: Clock) -> Result<Fleet, String> {
    let mut providers = BTreeMap::new();
    for (name, of) in &config.providers {
        providers.insert(name.clone(), provider(name, of).map_err(|unfit| unfit.to_string())?);
    }
    let can = providers.iter().map(|(name, provider)| (name.clone(), provider.capabilities())).collect();
    let pools = config.templates.values().filter_map(|template| Ahead::of(template, &config.fleet.name)).collect();
    let policies = Templates { templates: config.templates.clone(), can, pools };
    let inside = Http::new(client()?);
    let edges = (hooks, Arc::new(policies) as Arc<dyn Policies>, Arc::new(inside) as _);
    let away = config.conversations.as_ref().map(|away| conversations(&config.fleet.name, away)).transpose()?;
    let tokens = config.fleet.secret.as_ref().map(|secret| Tokens::new(secret.reveal()));
    let fleet = Fleet::new(&config.fleet.name, store, providers, edges, config.tenants.clone(), clock);
    Ok(fleet.with_conversations(away).with_tokens(tokens, config.fleet.url.clone()))
}

/// Where conversations are put away. Nothing is asked there yet.
///
/// # Errors
/// What is wrong, in words.
pub fn conversations(fleet: &str, config: &config::Conversations) -> Result<Conversations, String> {
    let client = client()?;
    let shelf: Arc<dyn Shelf> = match &config.place {
        Place::Directory(path) => Arc::new(Directory::new(path.clone())),
        Place::Postgres(url) => Arc::new(Postgres::new(url.reveal())?),
        Place::S3(s3) => {
            let bucket = (s3.bucket.as_str(), s3.prefix.as_str());
            Arc::new(S3::new(&s3.endpoint, s3.path_style, bucket, &s3.region, s3.keys.clone(), client.clone())?)
        }
    };
    let (keep, keep_for, max_size, spool) = (config.keep, config.keep_for, config.max_size, config.spool.clone());
    Ok(Conversations { fleet: fleet.to_owned(), shelf, client, spool, keep, keep_for, max_size })
}
