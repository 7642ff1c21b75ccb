//! Whose the agent is, what is its own, and what keeps it from what is not.

use std::ffi::OsString;
use std::path::Path;
use std::time::Duration;

use agent_sidecar_core::launch::{Launch, Mode};
use agent_sidecar_core::limit::Mode as LimitMode;
use agent_sidecar_core::log::Logs;
use agent_sidecar_core::metric;
use agent_sidecar_core::record::{Fact, Record};
use agent_sidecar_core::update::Update;
use agent_sidecar_core::who::{Guarded, Learn, Shared, Who};

use crate::config::Config;
use crate::fence::{self, HoldDir};
use crate::hang::within;
use crate::hub::{self, Place};
use crate::influence;
use crate::lines::{LineFile, Use};
use crate::supervise::{self, Clock, Failure, User};
use crate::tenants::{self, Guard, Home, Places, TenantsShare};

/// As whom the CLI is to run. A fence that cannot be put up is not left out: then it is not started.
pub(super) fn user(config: &Config) -> Result<Option<User>, Failure> {
    let refused = |source| Failure { exit_code: supervise::OWN_FAILURE, meant: true, source: Box::new(source) };
    config.user().map_err(refused)
}

/// Whether the agent may change the file that its limits come from, as far as the disk says.
pub(super) fn is_open(config: &Config, agent: &User) -> bool {
    let Some(file) = config.file().map(Path::to_owned) else { return false };
    let agent = agent.clone();
    within(Duration::ZERO, move || fence::is_open(&file, &agent)).unwrap_or_else(|error| {
        tracing::warn!(%error, "whether the agent may change the configuration is not known");
        false
    })
}

/// For whom the agent works, and what the app is still to say about it.
pub(super) fn who(config: &Config, argv: &[OsString], launch: &Launch) -> (Who, Learn) {
    let (who, learn) = tenants::find(config, argv, launch.mode == Mode::Parse { stdin_json: true });
    if launch.asks_model && learn.is_over() {
        for name in tenants::silent(config, &who) {
            let name = name.as_str();
            tracing::warn!("`labels.{name}_from` finds nothing: this agent has no {name}");
        }
    }
    (who, learn)
}

/// The agent's own directory, if each is to have one; and whether there should be one, and is none.
pub(super) fn home(
    config: &Config,
    who: &Who,
    launch: &Launch,
    argv: &[OsString],
    user: Option<&User>,
) -> Result<(Option<Home>, bool), Failure> {
    match Some(launch).filter(|launch| launch.asks_model).and_then(|launch| Home::open(config, who, launch, argv, user)) {
        None => Ok((None, false)),
        Some(Ok(home)) => Ok((Some(home), false)),
        // Who insists on tenants being apart does not want it to share with others.
        Some(Err(error)) if config.guard() == LimitMode::Enforce => {
            let source = std::io::Error::new(error.kind(), format!("there is no directory for it below --agent-dirs: {error}"));
            Err(Failure { exit_code: supervise::OWN_FAILURE, meant: true, source: source.into() })
        }
        Some(Err(error)) => {
            tracing::error!(%error, "the agent gets no directory of its own, and shares with others what it keeps");
            Ok((None, true))
        }
    }
}

/// What the guard knows, and what it has found.
pub(super) type Guarding = Option<(Guard, Vec<(Shared, String)>)>;

#[expect(clippy::too_many_arguments, reason = "called once, with all of it")]
/// Looks whether the agent would share anything with another tenant's.
pub(super) fn guard(
    config: &Config,
    place: Option<&std::io::Result<Place>>,
    nonce: &str,
    who: &Who,
    known: bool,
    launch: &Launch,
    places: &Places,
    agent: &User,
) -> Result<Guarding, Failure> {
    let (mode, Some(Ok(place))) = (config.guard(), place) else { return Ok(None) };
    if mode == LimitMode::Off || !launch.asks_model || !config.has_tenants() {
        return Ok(None);
    }
    let owner = known.then(|| who.tenant.clone().unwrap_or_default());
    match Guard::begin(place, nonce, mode, owner, launch, places, agent) {
        Ok(guard) => Ok(Some(guard)),
        Err(refused) => {
            let (told, config, place) = (refused.clone(), config.clone(), place.clone());
            let (run, who) = (nonce.to_owned(), who.clone());
            if let Err(error) = within(Duration::ZERO, move || say_refused(&config, &place, &run, &who, &told)) {
                tracing::warn!(%error, "that this agent was refused is not written down");
            }
            Err(Failure { exit_code: supervise::OWN_FAILURE, meant: true, source: Box::new(refused) })
        }
    }
}

/// Says what the agent may change of what holds it.
pub(super) fn say_open(config: &Config, open: bool, user: Option<&User>) {
    if open {
        tracing::warn!(file = ?config.file(), "the agent may change the file that its limits come from; give it and its directories to root, and take the write permission from others");
    }
    if let Some(user) = user.filter(|user| !user.is_us()) {
        let (paths, user) = (config.own_paths(), user.clone());
        if let Err(error) = within(Duration::ZERO, move || fence::check(paths, &user)) {
            tracing::warn!(%error, "whether the agent may change what is the sidecar's is not known");
        }
    }
}

/// An agent that never runs has no numbers of its own to be read.
fn say_refused(config: &Config, place: &Place, nonce: &str, who: &Who, refused: &TenantsShare) {
    let mut meters = metric::Meters::new(config.max_series());
    let user = config.user().ok().flatten();
    let mut ledger = config.ledger().map(|path| LineFile::open(Use::Ledger, path, user.as_ref()));
    let mut events = config.events().map(|path| LineFile::open(Use::Events, path, user.as_ref()));
    LineFile::wait(ledger.iter_mut().chain(&mut events), &mut meters);
    let (action, now) = (Guarded::Refused, Clock::start().now());
    let mut logs = Logs::of(who.clone());
    for (seq, (kind, owner)) in (0..).zip(refused.kinds()) {
        meters.add(&metric::TENANT_CONFLICTS, &[kind.as_str(), action.as_str()], 1);
        let owner = owner.to_owned();
        if let (Some(events), Some(event)) =
            (&mut events, logs.on(&Update::TenantConflict { kind, owner: owner.clone(), action }, now, None))
        {
            events.write_alone(&event);
        }
        if let Some(ledger) = &mut ledger {
            let fact = Fact::TenantConflict { session_id: String::new(), kind, owner, action };
            ledger.write_alone(&Record::new(nonce, seq, now.unix, who, fact));
        }
    }
    if let Err(error) = hub::testify(place, nonce, who, meters) {
        tracing::warn!(%error, "that this agent was refused is not counted");
    }
}

/// Where the CLI is told to turn messages away, if it cannot look where we meet.
pub(super) fn hold_dir(user: Option<&User>, nonce: &str) -> Option<HoldDir> {
    user.filter(|user| !user.is_us())?;
    let run = nonce.to_owned();
    within(Duration::ZERO, move || HoldDir::make(&run))
        .flatten()
        .inspect_err(|error| tracing::warn!(%error, "the CLI cannot be told to wait; turns are interrupted instead"))
        .ok()
}

/// What changes the CLI, as far as the disk says.
#[derive(Default)]
pub(super) struct Influenced {
    pub(super) found: Vec<influence::Finding>,
    pub(super) files: Option<influence::Files>,
    /// Variables that are taken from the CLI.
    pub(super) stripped: Vec<OsString>,
}

/// What is found of it, and what becomes of that: a CLI that is not to be changed is not started.
pub(super) fn influenced(config: &Config, launch: &Launch, places: &Places, agent: &User) -> Result<Influenced, Failure> {
    let refused = |source| Failure { exit_code: supervise::OWN_FAILURE, meant: true, source };
    if !launch.asks_model {
        return Ok(Influenced::default());
    }
    let (policy, expected) = config.influence();
    let (found, files) = influences(places, agent, &expected);
    if policy == influence::Policy::Refuse && files.is_none() {
        let what = "what the CLI's settings files say is not known, and `policy.environment` is `refuse`";
        return Err(refused(std::io::Error::other(what).into()));
    }
    let stripped = influence::judge(policy, &found, &expected).map_err(|error| refused(Box::new(error)))?;
    say_stripped(&found, &stripped);
    Ok(Influenced { found, files, stripped })
}

type Found = (Vec<influence::Finding>, Option<influence::Files>);

fn influences(places: &Places, agent: &User, expected: &influence::Expected) -> Found {
    let mut found = influence::in_environment(std::env::vars_os(), expected);
    let mut files = influence::Files::of(places, agent, expected);
    let looked = within(Duration::ZERO, move || {
        let found = files.look();
        (files, found)
    });
    match looked {
        Ok((files, more)) => {
            found.extend(more);
            (found, Some(files))
        }
        Err(error) => {
            tracing::warn!(%error, "what the CLI's settings files say is not known");
            (found, None)
        }
    }
}

fn say_stripped(found: &[influence::Finding], stripped: &[OsString]) {
    for one in found.iter().filter(|one| one.file.is_none()) {
        let taken = stripped.iter().any(|name| *name == *one.name);
        match one.kind {
            _ if taken => {
                tracing::warn!(name = one.name, "a variable was taken from the CLI's environment (`policy.environment`)")
            }
            // Somebody has said whom it may ask.
            influence::Kind::Endpoint => {
                tracing::warn!(name = one.name, "the CLI is told to ask somebody whom `policy.base_urls` does not name")
            }
            _ => tracing::info!(name = one.name, "a variable has code run in the CLI"),
        }
    }
}
