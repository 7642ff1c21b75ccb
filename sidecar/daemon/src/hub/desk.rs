//! What the hub answers, to whoever asks.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use agent_sidecar_core::budget::{Caps, Standing};
use agent_sidecar_core::hub::Health;
use agent_sidecar_core::limit::{Limit, Scope};
use agent_sidecar_core::metric;
use agent_sidecar_core::order::What;
use agent_sidecar_core::report::Sums;
use agent_sidecar_core::tokens::Usd;
use agent_sidecar_core::update::Activity;
use hyper::header::HeaderMap;
use serde::Deserialize;
use serde_json::{Value, json};

use super::gate::{Gate, Judged, Keys, Peer};
use super::share::{Share, unix_nanos};
use super::shelf::{Shelf, unix};
use super::till;
use super::users::{self, Member};
use super::zone::Zone;
use super::{Place, orders};
use crate::busy::Word;
use crate::conversation::{self, Conversation};
use crate::export::prometheus::{self, Exposed};
use crate::feed::Feed;
use crate::fleet::{Agents, Glance, Said, Voice};

/// See the module's head.
pub(crate) struct Desk {
    /// Our own first; then those of other users, where there are any.
    shelves: Vec<Mutex<Shelf>>,
    members: Vec<Member>,
    /// The hub's own agent, if it has one: it need not be late.
    own: Option<Share>,
    place: Place,
    lease: Duration,
    gate: Gate,
    zone: Zone,
    /// Who lived when it was last looked.
    living: Mutex<Vec<BTreeSet<String>>>,
    page_host: Option<String>,
    feed: Feed,
    conversation: Option<Conversation>,
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
    /// Other users whose wrappers are served.
    pub(crate) members: Vec<Member>,
    pub(crate) conversation: Option<conversation::Options>,
    /// Who is told of all of it.
    pub(crate) fleet: Option<Voice>,
}

/// Whose sessions somebody may see. The numbers are for all that reach them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sees {
    All,
    /// A user's own.
    Of(u32),
    Nothing,
}

impl Desk {
    pub(super) fn open(place: &Place, options: &Options, own: Option<Share>) -> Desk {
        let labels: Vec<(String, String)> =
            options.labels.iter().map(|(label, value)| ((*label).to_owned(), value.clone())).collect();
        let own_shelf = Shelf::open(place, options.slots, options.max_series, &labels);
        let members = options.members.clone();
        // Each has room of its own: nobody takes another's slots, labels or series.
        let theirs = members.iter().filter_map(|one| Shelf::of_member(place, one, options.slots, options.max_series));
        let shelves = std::iter::once(own_shelf).chain(theirs).map(Mutex::new).collect();
        let Options { lease, .. } = *options;
        Desk {
            shelves,
            members,
            own,
            place: place.clone(),
            lease,
            gate: Gate::new(options.keys.clone()),
            zone: options.zone.clone(),
            living: Mutex::default(),
            page_host: options.page_host.clone(),
            feed: Feed::default(),
            conversation: options.conversation.clone().map(|options| Conversation::new(options, place.fetched())),
        }
    }

    /// Takes in those that ended, so that their journals do not pile up.
    pub(super) fn tidy(&self) {
        let living: Vec<BTreeSet<String>> = self.all().map(|mut shelf| scanned(&mut shelf)).collect();
        // What is asked of the dead is asked of nobody.
        let before = std::mem::replace(&mut *self.living.lock().unwrap_or_else(PoisonError::into_inner), living.clone());
        for (n, living) in living.iter().enumerate().filter(|(n, living)| before.get(*n) != Some(*living)) {
            let (dir, mode) = self.orders(n);
            if orders::any(&dir) {
                orders::change(&dir, mode, |run| living.contains(run), |_| ()).ok();
            }
        }
    }

    /// Where orders for a shelf's agents are, and who may look at them.
    fn orders(&self, n: usize) -> (PathBuf, u32) {
        match (n.checked_sub(1).and_then(|n| self.members.get(n)), &self.place.door) {
            (Some(member), Some(door)) => (users::orders_of(door, member.uid), 0o644),
            _ => (self.place.dir.clone(), 0o600),
        }
    }

    fn all(&self) -> impl Iterator<Item = MutexGuard<'_, Shelf>> {
        self.shelves.iter().map(|shelf| shelf.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Those whose sessions somebody sees.
    fn seen(&self, sees: Sees) -> impl Iterator<Item = MutexGuard<'_, Shelf>> {
        self.all().filter(move |shelf| match sees {
            Sees::All => true,
            Sees::Of(uid) => shelf.uid() == Some(uid),
            Sees::Nothing => false,
        })
    }

    /// What is whose to see. Where all are one user, who reaches the page may look at it; where they are several, nobody may look at
    /// another's, but for the hub's user and root.
    pub(crate) fn sees(&self, peer: Peer) -> Sees {
        match peer {
            _ if self.members.is_empty() => Sees::All,
            Peer::Socket => Sees::All,
            Peer::User(uid) => Sees::Of(uid),
            Peer::Tcp(_) => Sees::Nothing,
        }
    }

    /// Whether somebody who is neither us nor root may ask at the socket.
    pub(crate) fn knows(&self, uid: u32) -> bool {
        self.members.iter().any(|member| member.uid == uid)
    }

    /// The exposition, and when it began to be made: somebody scrapes.
    pub(crate) fn metrics(&self) -> (String, u128) {
        let exposed = self.exposition();
        // Of the one before: this one is not read yet.
        self.shelf().registry.house_mut().set(&metric::LAST_SCRAPE, &[], unix());
        exposed
    }

    fn exposition(&self) -> (String, u128) {
        if let Some(own) = &self.own {
            own.flush();
        }
        let began = unix_nanos();
        let exposed = |mut shelf: MutexGuard<'_, Shelf>| {
            shelf.scan();
            let (groups, house) = shelf.registry.expose(unix());
            let labels = shelf.uid().map(|uid| (String::from("uid"), uid.to_string()));
            Exposed { labels: labels.into_iter().collect(), groups, house }
        };
        // Where nobody's agents are ours, there is nothing to say of them.
        let all: Vec<Exposed> = self.all().map(exposed).collect();
        (prometheus::hub_text(&all), began)
    }

    /// Somebody has read, to its end, what began to be made then.
    pub(crate) fn read(&self, began: u128) {
        // Whoever waits for it waits for nothing else: then it waits in vain.
        self.place.tell(&self.place.scraped(), &began.to_string());
    }

    pub(crate) fn health(&self) -> Health {
        let health = |mut shelf: MutexGuard<'_, Shelf>| {
            shelf.scan();
            shelf.registry.health(unix())
        };
        self.all().map(health).fold(Health::default(), |sum, one| Health {
            wrappers: sum.wrappers + one.wrappers,
            live: sum.live + one.live,
            ready: sum.ready + one.ready,
        })
    }

    pub(crate) fn page_host(&self) -> Option<&str> {
        self.page_host.as_deref()
    }

    pub(crate) fn conversation(&self) -> Option<&Conversation> {
        self.conversation.as_ref()
    }

    pub(crate) fn feed(&self) -> &Feed {
        &self.feed
    }

    /// What happened lately to a session that runs, or has just ended, by its id or its wrapper's pid.
    pub(crate) fn timeline(&self, sees: Sees, key: &str, after: u64) -> Option<Vec<u8>> {
        if let Some(own) = &self.own {
            own.flush();
        }
        let (pid, entries) = self.seen(sees).find_map(|mut shelf| {
            shelf.scan();
            shelf.timeline(key, after)
        })?;
        Some(format!("{{\"pid\":{pid},\"entries\":[{entries}]}}").into_bytes())
    }

    pub(crate) fn busy(&self) -> Word {
        self.busy_of(&self.status(Sees::All))
    }

    pub(crate) fn busy_of(&self, status: &Value) -> Word {
        // Who is frozen or lost says nothing of now: a lease that it had runs out.
        let sessions = status["sessions"].as_array().into_iter().flatten().filter(|session| session["stale"] != true);
        let states = sessions.filter_map(|session| Activity::deserialize(&session["state"]).ok());
        Word::of_all(states, Duration::from_secs_f64(unix()), self.lease)
    }

    pub(crate) fn status(&self, sees: Sees) -> Value {
        if let Some(own) = &self.own {
            own.flush();
        }
        let (mut sessions, mut totals) = (Vec::new(), Sums::default());
        for mut shelf in self.seen(sees) {
            shelf.scan();
            let (these, sums) = shelf.registry.sessions(unix());
            let uid = shelf.uid();
            sessions.extend(these.into_iter().map(|mut session| {
                if let (Some(uid), Some(session)) = (uid, session.as_object_mut()) {
                    session.insert(String::from("uid"), json!(uid));
                }
                session
            }));
            totals.add(&sums);
        }
        json!({ "sessions": sessions, "totals": totals })
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
        let mut asked = 0;
        for (n, (runs, living)) in self.named(whom).into_iter().enumerate().filter(|(_, (runs, _))| !runs.is_empty()) {
            tracing::warn!(whom, ?what, "somebody has asked something of an agent");
            let (dir, mode) = self.orders(n);
            orders::change(&dir, mode, |run| living.contains(run), |orders| orders.give(&runs, what))?;
            asked += runs.len();
        }
        Ok(asked)
    }

    /// Pauses all agents and those that are started later, or lets them go on: how many there are now.
    pub(crate) fn pause_all(&self, paused: bool, now: bool) -> std::io::Result<usize> {
        tracing::warn!(paused, now, "somebody has asked something of all agents");
        let mut asked = 0;
        for (n, (_, living)) in self.named("").into_iter().enumerate() {
            let (dir, mode) = self.orders(n);
            orders::change(&dir, mode, |run| living.contains(run), |orders| orders.pause_all(paused, now))?;
            asked += living.len();
        }
        Ok(asked)
    }

    /// Has all agents end: how many there are.
    fn stop_all(&self) -> std::io::Result<usize> {
        let mut asked = 0;
        for (n, (_, living)) in self.named("").into_iter().enumerate().filter(|(_, (_, living))| !living.is_empty()) {
            let (dir, mode) = self.orders(n);
            let runs: Vec<String> = living.iter().cloned().collect();
            orders::change(&dir, mode, |run| living.contains(run), |orders| orders.give(&runs, What::Stop))?;
            asked += living.len();
        }
        Ok(asked)
    }

    /// What the limits of such agents allow.
    pub(crate) fn ceilings(&self, whom: &str, limit: Limit) -> Vec<Option<f64>> {
        let named = self.named(whom);
        let of = |(shelf, (runs, _)): (MutexGuard<'_, Shelf>, &(Vec<String>, BTreeSet<String>))| {
            runs.iter().map(|run| shelf.registry.ceiling(run, limit.as_str())).collect::<Vec<_>>()
        };
        self.all().zip(&named).flat_map(of).collect()
    }

    /// Of each shelf, those that are meant and those that live.
    fn named(&self, whom: &str) -> Vec<(Vec<String>, BTreeSet<String>)> {
        if let Some(own) = &self.own {
            own.flush();
        }
        self.all()
            .map(|mut shelf| {
                let living = scanned(&mut shelf);
                (shelf.registry.named(whom), living)
            })
            .collect()
    }

    /// The session that a wrapper's CLI is in.
    pub(crate) fn session_of(&self, run: &str) -> Option<String> {
        self.all().find_map(|shelf| shelf.registry.session_of(run))
    }

    /// Our own.
    fn shelf(&self) -> MutexGuard<'_, Shelf> {
        self.shelves[0].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Of a container's, so many are named to the fleet.
const SESSIONS: usize = 100;

/// All agents of the container, to the fleet.
pub(super) struct All {
    pub(super) desk: Arc<Desk>,
    /// The container ends with us, when they have ended.
    pub(super) ends: bool,
}

impl Agents for All {
    fn say(&self) -> Option<Said> {
        let status = self.desk.status(Sees::All);
        let sessions = status["sessions"].as_array().into_iter().flatten();
        let sessions = sessions.filter_map(|session| Some(session["session_id"].as_str()?.to_owned()));
        let sessions = sessions.take(SESSIONS).collect();
        Some(Said { word: self.desk.busy(), metrics: self.desk.exposition().0, sessions })
    }

    fn glance(&self) -> Option<Glance> {
        let status = self.desk.status(Sees::All);
        let cost_usd = status["totals"]["cost_usd"].as_f64().unwrap_or_default();
        Some(Glance { busy: self.desk.busy_of(&status).busy, cost_usd })
    }

    fn end(&self) {
        match self.desk.stop_all() {
            Ok(0) if self.ends => std::process::exit(0),
            Ok(_) => {}
            Err(error) => tracing::error!(%error, "the agents cannot be told to end"),
        }
    }
}

/// Brings it up to date: who lives there.
fn scanned(shelf: &mut Shelf) -> BTreeSet<String> {
    shelf.scan();
    shelf.registry.runs().map(str::to_owned).collect()
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
        let place =
            Place { socket: dir.join("hub.sock"), spare: None, dir, world: String::new(), keep: false, door: None, guest: false };
        let hello =
            Hello { hub: VERSION, run: String::from("a"), pid: 1, started: 0.0, world: String::new(), labels: Vec::new() };
        let mut journal = Journal::new(&place, hello);
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
            members: Vec::new(),
            conversation: None,
            fleet: None,
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
