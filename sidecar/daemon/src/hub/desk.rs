//! What the hub answers, to whoever asks.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use agent_sidecar_core::budget::{Caps, Standing};
use agent_sidecar_core::hub::Health;
use agent_sidecar_core::limit::{Limit, Scope};
use agent_sidecar_core::metric;
use agent_sidecar_core::order::What;
use agent_sidecar_core::tokens::Usd;
use agent_sidecar_core::update::Activity;
use hyper::header::HeaderMap;
use serde::Deserialize;
use serde_json::Value;

use super::gate::{Gate, Judged, Keys, Peer};
use super::share::{Share, unix_nanos};
use super::shelf::{Shelf, unix};
use super::till;
use super::zone::Zone;
use super::{Place, orders};
use crate::busy::Word;
use crate::export::prometheus;
use crate::feed::Feed;
use crate::files;

/// See the module's head.
pub(crate) struct Desk {
    shelf: Mutex<Shelf>,
    /// The hub's own agent, if it has one: it need not be late.
    own: Option<Share>,
    place: Place,
    lease: Duration,
    gate: Gate,
    zone: Zone,
    /// Who lived when it was last looked.
    living: Mutex<BTreeSet<String>>,
    page_host: Option<String>,
    feed: Feed,
}

/// What a hub is to know.
#[derive(Clone)]
pub(crate) struct Options {
    pub(crate) slots: usize,
    pub(crate) max_series: usize,
    /// Of the series that are there before any wrapper is.
    pub(crate) labels: Vec<(&'static str, String)>,
    /// For how long `/busy` may be believed.
    pub(crate) lease: Duration,
    /// Who may change something.
    pub(crate) keys: Keys,
    /// Where days begin.
    pub(crate) zone: Zone,
    /// A name under which the page is asked for.
    pub(crate) page_host: Option<String>,
    /// Whether to look for CLIs that run without a wrapper.
    pub(crate) patrol: bool,
}

impl Desk {
    pub(super) fn open(place: &Place, options: &Options, own: Option<Share>) -> Desk {
        let labels: Vec<(String, String)> =
            options.labels.iter().map(|(label, value)| ((*label).to_owned(), value.clone())).collect();
        let shelf = Shelf::open(place, options.slots, options.max_series, &labels);
        let Options { lease, .. } = *options;
        Desk {
            shelf: Mutex::new(shelf),
            own,
            place: place.clone(),
            lease,
            gate: Gate::new(options.keys.clone()),
            zone: options.zone.clone(),
            living: Mutex::default(),
            page_host: options.page_host.clone(),
            feed: Feed::default(),
        }
    }

    /// Takes in those that ended, so that their journals do not pile up.
    pub(super) fn tidy(&self) {
        let living: BTreeSet<String> = {
            let mut shelf = self.shelf();
            shelf.scan();
            shelf.registry.runs().map(str::to_owned).collect()
        };
        // What is asked of the dead is asked of nobody.
        let before = std::mem::replace(&mut *self.living.lock().unwrap_or_else(PoisonError::into_inner), living.clone());
        if before != living && orders::any(&self.place.dir) {
            orders::change(&self.place.dir, |run| living.contains(run), |_| ()).ok();
        }
    }

    /// The exposition, and when it began to be made.
    pub(crate) fn metrics(&self) -> (String, u128) {
        if let Some(own) = &self.own {
            own.flush();
        }
        let began = unix_nanos();
        let (groups, house) = {
            let mut shelf = self.shelf();
            shelf.scan();
            shelf.registry.expose(unix())
        };
        let text = prometheus::hub_text(&groups, &house);
        // Of the one before: this one is not read yet.
        self.shelf().registry.house_mut().set(&metric::LAST_SCRAPE, &[], unix());
        (text, began)
    }

    /// Somebody has read, to its end, what began to be made then.
    pub(crate) fn read(&self, began: u128) {
        // Whoever waits for it waits for nothing else: then it waits in vain.
        files::write(&self.place.scraped(), began.to_string().as_bytes()).ok();
    }

    pub(crate) fn health(&self) -> Health {
        let mut shelf = self.shelf();
        shelf.scan();
        shelf.registry.health(unix())
    }

    pub(crate) fn page_host(&self) -> Option<&str> {
        self.page_host.as_deref()
    }

    pub(crate) fn feed(&self) -> &Feed {
        &self.feed
    }

    /// What happened lately to a session that runs, or has just ended, by its id or its wrapper's pid.
    pub(crate) fn timeline(&self, key: &str, after: u64) -> Option<Vec<u8>> {
        if let Some(own) = &self.own {
            own.flush();
        }
        let mut shelf = self.shelf();
        shelf.scan();
        let (pid, entries) = shelf.timeline(key, after)?;
        Some(format!("{{\"pid\":{pid},\"entries\":[{entries}]}}").into_bytes())
    }

    pub(crate) fn busy(&self) -> Word {
        let status = self.status();
        // Who is frozen or lost says nothing of now: a lease that it had runs out.
        let sessions = status["sessions"].as_array().into_iter().flatten().filter(|session| session["stale"] != true);
        let states = sessions.filter_map(|session| Activity::deserialize(&session["state"]).ok());
        Word::of_all(states, Duration::from_secs_f64(unix()), self.lease)
    }

    pub(crate) fn status(&self) -> Value {
        if let Some(own) = &self.own {
            own.flush();
        }
        let mut shelf = self.shelf();
        shelf.scan();
        shelf.registry.status(unix())
    }

    /// Whether who asks may change something here. It is counted.
    pub(crate) fn judge(&self, peer: Peer, headers: &HeaderMap) -> Judged {
        let judged = self.gate.judge(peer, headers, Instant::now());
        self.shelf().registry.house_mut().add(&metric::CONTROL_REQUESTS, &[judged.as_str()], 1);
        judged
    }

    /// So many CLIs run without a wrapper.
    pub(super) fn unwrapped(&self, n: f64) {
        self.shelf().registry.house_mut().set(&metric::UNWRAPPED, &[], n);
    }

    /// Makes a shared budget larger; the agents hear of it within a second. False if too many were raised.
    pub(crate) fn raise(&self, scope: Scope, tenant: Option<&str>, caps: Caps) -> std::io::Result<bool> {
        let now = Duration::from_secs_f64(unix().max(0.0));
        let raised = till::raise(&self.place.dir, &self.zone, now, scope, tenant, caps)?;
        if raised {
            let Caps { usd, tokens } = caps;
            tracing::warn!(scope = scope.as_str(), tenant, usd = usd.map(Usd::to_f64), tokens, "a shared budget was raised");
        }
        Ok(raised)
    }

    /// How all shared budgets stand.
    pub(crate) fn standings(&self) -> std::io::Result<Vec<Standing>> {
        till::standings(&self.place.dir, &self.zone, Duration::from_secs_f64(unix().max(0.0)))
    }

    /// Asks something of the agents that somebody means by a session's name or a slot: how many there are.
    pub(crate) fn order(&self, whom: &str, what: What) -> std::io::Result<usize> {
        let (runs, living) = self.named(whom);
        if !runs.is_empty() {
            tracing::warn!(whom, ?what, "somebody has asked something of an agent");
            orders::change(&self.place.dir, |run| living.contains(run), |orders| orders.give(&runs, what))?;
        }
        Ok(runs.len())
    }

    /// Pauses all agents and those that are started later, or lets them go on: how many there are now.
    pub(crate) fn pause_all(&self, paused: bool, now: bool) -> std::io::Result<usize> {
        let (_, living) = self.named("");
        tracing::warn!(paused, now, "somebody has asked something of all agents");
        orders::change(&self.place.dir, |run| living.contains(run), |orders| orders.pause_all(paused, now))?;
        Ok(living.len())
    }

    /// What the limits of such agents allow.
    pub(crate) fn ceilings(&self, whom: &str, limit: Limit) -> Vec<Option<f64>> {
        let (runs, _) = self.named(whom);
        let shelf = self.shelf();
        runs.iter().map(|run| shelf.registry.ceiling(run, limit.as_str())).collect()
    }

    fn named(&self, whom: &str) -> (Vec<String>, BTreeSet<String>) {
        if let Some(own) = &self.own {
            own.flush();
        }
        let mut shelf = self.shelf();
        shelf.scan();
        (shelf.registry.named(whom), shelf.registry.runs().map(str::to_owned).collect())
    }

    /// The session that a wrapper's CLI is in.
    pub(crate) fn session_of(&self, run: &str) -> Option<String> {
        self.shelf().registry.session_of(run)
    }

    fn shelf(&self) -> MutexGuard<'_, Shelf> {
        self.shelf.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use agent_sidecar_core::hub::{Hello, Line, VERSION};

    use super::super::journal::Journal;
    use super::*;

    #[test]
    fn who_has_long_been_silent_is_not_busy() {
        let dir = std::env::temp_dir().join(format!("agent-sidecar-desk-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let place = Place { socket: dir.join("hub.sock"), spare: None, dir, world: String::new(), keep: false };
        let hello =
            Hello { hub: VERSION, run: String::from("a"), pid: 1, started: 0.0, world: String::new(), labels: Vec::new() };
        let mut journal = Journal::new(&place.dir, hello);
        let lease = Duration::from_secs(60);
        let options = Options {
            slots: 8,
            max_series: 1_500,
            labels: Vec::new(),
            lease,
            keys: Keys::default(),
            zone: Zone::default(),
            page_host: None,
            patrol: false,
        };
        let desk = Desk::open(&place, &options, None);
        let mut busy = |at: f64| {
            let line = Line { unix: at, sessions: vec![serde_json::json!({"state": "tool"})], ..Line::default() };
            journal.write(&line, 1).unwrap();
            desk.busy().busy
        };
        assert!(!busy(unix() - 600.0));
        assert!(busy(unix()));
        std::fs::remove_dir_all(&place.dir).unwrap();
    }
}
