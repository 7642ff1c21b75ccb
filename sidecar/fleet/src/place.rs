//! Several sessions in one container, each with a place of its own in there.
//!
//! The container is a session of its own (`tenant` is theirs, `owner` is empty, and its hooks are not run): kept, driven, paid for and removed like every
//! other. Who asks for a session gets a place in one that has some left, in one write of both, or has one made. So no fleet fills one beyond what it
//! takes, and there is no moment at which a session has a place that its container does not know of.
//!
//! ```text
//!   container:  requested ─► creating ─► starting ─► ready ⇄ active ⇄ idle ─────► stopping ─► stopped ─► destroyed
//!                                  ▲ update_both                                      │ all that are in it end
//!   session:    requested ─► creating ─► starting ─► ready ⇄ active ⇄ idle ─► stopping ─► stopped ─► destroyed
//!                                                                                 └ its agent ends, and its place is free
//! ```
//!
//! Where what a session has is put away, it is `paused` between, and holds no place; and a container is `pausing` before it ends: those in it see that,
//! and are put away while it stands.
//!
//! To the rest of the fleet a place is a container at a provider, [`Shared`], which is made of the store and of what the app inside says of each of its
//! sessions. What the container costs, with all its agents, is booked once: on the container.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::stream::BoxStream;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::config::Hidden;
use crate::inside::Inside;
use crate::lifecycle::Phase;
use crate::pool;
use crate::provider::{
    Capabilities, Endpoint, Error as Failed, Exec, Executed, Happened, Page, Pause, Price, Provider, Result as Done, Sandbox,
    Size, Spec, State,
};
use crate::service::{Error, Fleet};
use crate::session::{Session, SessionId, Wanted};
use crate::store::{self, Store, Within};
use crate::token::Tokens;

/// Containers that have a place left and are tried, by chance.
const TRIES: usize = 64;
/// How often another fleet may have made one in between; then one is made whoever else does.
const ROUNDS: usize = 8;
/// How often somebody else may have written in between.
const CONFLICTS: usize = 100;
const NAME: &str = "shared";

/// How many of a template's sessions share a container, as the template says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    pub sessions_per_container: usize,
    /// Each session belongs to one of so many containers, by its id. `None`: there are as many as are needed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub containers: Option<usize>,
}

/// What a session has that is one of several in a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// Which containers it may be in: see [`kind`].
    pub kind: String,
    #[serde(flatten)]
    pub share: Share,
}

/// What a container of several is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Places {
    /// Who may be in it.
    pub kind: String,
    pub most: usize,
    /// It is one of a number, and known to be there also when it is full.
    #[serde(default)]
    pub pinned: bool,
    pub taken: BTreeSet<SessionId>,
    /// Since when nobody is in it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub empty_since: Option<Timestamp>,
}

impl Places {
    pub fn free(&self) -> usize {
        self.most.saturating_sub(self.taken.len())
    }

    fn leave(&mut self, id: &SessionId, now: Timestamp) -> bool {
        let left = self.taken.remove(id);
        if left && self.taken.is_empty() {
            self.empty_since = Some(now);
        }
        left
    }
}

/// Which sessions may be in one container: those that are made of the same at the same provider, for the same tenant, by the same caller. Who reaches one of
/// them may reach its neighbours inside.
pub fn kind(session: &Session) -> String {
    let made = pool::kind(&session.provider, &session.spec);
    hex(&[&made, &session.tenant, &session.owner])
}

impl Place {
    /// Of a session that somebody has just asked for.
    pub fn of(session: &Session, share: Share) -> Self {
        Self { kind: kind(session), share }
    }

    /// Where it may be, where it would be first.
    fn kinds(&self, id: &SessionId) -> Vec<String> {
        match self.share.containers {
            None => vec![self.kind.clone()],
            Some(n) => order(id, n).into_iter().map(|n| format!("{}.{n}", self.kind)).collect(),
        }
    }
}

/// Which of `n` containers a session belongs to, the first first: rendezvous hashing. With one more container only those sessions move that belong to it
/// then, and with one less those that did.
pub fn order(id: &SessionId, n: usize) -> Vec<usize> {
    let mut all: Vec<(String, usize)> = (0..n).map(|n| (hex(&[id.as_str(), &n.to_string()]), n)).collect();
    all.sort_unstable_by(|a, b| b.cmp(a));
    all.into_iter().map(|(_, n)| n).collect()
}

fn hex(parts: &[&str]) -> String {
    // No id, name or figure has this in it.
    let digest = ring::digest::digest(&ring::digest::SHA256, parts.join("\0").as_bytes());
    digest.as_ref().iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

/// Whether a container has a place for somebody who comes now: one that is old would soon be gone.
pub fn may_seat(house: &Session, now: Timestamp) -> bool {
    house.disrupted.is_none()
        && house.spare().is_some()
        && house.places.as_ref().is_some_and(|places| places.free() > 0)
        && is_young(house, now)
}

fn is_young(house: &Session, now: Timestamp) -> bool {
    house.ends - house.spec.ttl / 2 > now
}

/// One more is in it. `grace`: what a session is given to end, if it does not go on elsewhere.
pub fn seat(guest: &mut Session, house: &mut Session, grace: Option<Duration>, now: Timestamp) {
    let Some(places) = &mut house.places else { return };
    places.taken.insert(guest.id.clone());
    places.empty_since = None;
    guest.native = Some(native(&house.id, &guest.id));
    guest.holds = true;
    guest.made = Some(now);
    // Before the container does, so that it ends as it would by itself.
    if let Some(grace) = grace {
        guest.end_by((house.ends - grace).max(now));
    }
}

/// What a place is called: by the session that is its container, and its own.
fn native(house: &SessionId, guest: &SessionId) -> String {
    format!("{house}/{guest}")
}

pub(crate) fn parse(native: &str) -> Option<(SessionId, SessionId)> {
    let (house, guest) = native.split_once('/')?;
    Some((house.parse().ok()?, guest.parse().ok()?))
}

/// How its app is talked to.
pub type App = (u16, Option<Hidden>);

/// A provider whose containers are places in those of another.
pub struct Shared {
    pub store: Arc<dyn Store>,
    pub inner: Arc<dyn Provider>,
    pub inside: Arc<dyn Inside>,
    pub app: Option<App>,
    /// What its sessions have is put away: who gives it, and forgets it, knows the container by this.
    pub tokens: Option<Tokens>,
    pub now: Timestamp,
}

impl Shared {
    fn wrong(what: impl std::fmt::Display) -> Failed {
        Failed::Failed { provider: NAME, what: what.to_string() }
    }

    fn cannot<T>(verb: &'static str, hint: &'static str) -> Done<T> {
        Err(Failed::Unsupported { provider: NAME, verb, hint: Some(hint) })
    }

    /// The container, and who is in it.
    async fn house(&self, native: &str) -> Done<(Option<Session>, SessionId)> {
        let (house, guest) = parse(native).ok_or(Failed::Missing { provider: NAME })?;
        let house = self.store.get(&house).await.map_err(Self::wrong)?;
        let there = house.filter(|house| house.places.as_ref().is_some_and(|places| places.taken.contains(&guest)));
        Ok((there, guest))
    }

    /// The container of the other provider, while it runs.
    async fn runs(&self, native: &str) -> Done<String> {
        let (house, _) = self.house(native).await?;
        house.and_then(|house| stands(&house)).ok_or(Failed::Missing { provider: NAME })
    }
}

#[async_trait]
impl Provider for Shared {
    fn name(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { ttl: None, idle_timer: false, pause: Pause::No, exec: false, events: false, ..self.inner.capabilities() }
    }

    /// What it costs is the container's.
    fn price(&self, _: Size) -> Price {
        Price { running: 0.0, paused: 0.0, stopped: 0.0, source: String::from("its container pays") }
    }

    /// See [`Fleet::place`].
    async fn create(&self, _: &Spec) -> Done<Sandbox> {
        Self::cannot("create", "it is given a place")
    }

    async fn start(&self, _: &str) -> Done<()> {
        Ok(())
    }

    async fn state(&self, native: &str) -> Done<Sandbox> {
        let (house, guest) = self.house(native).await?;
        let (state, reason) = match &house {
            None => (State::Missing, None),
            Some(house) => match house.phase {
                Phase::Requested | Phase::Creating | Phase::Starting => (State::Creating, None),
                Phase::Ready | Phase::Active | Phase::Idle | Phase::Pausing => (State::Running, None),
                Phase::Failed => (State::Failed, house.reason.clone()),
                // Nothing of several is paused.
                Phase::Paused | Phase::Resuming => (State::Failed, house.reason.clone()),
                // Those in it are about to be told why: that it ends is no failure of theirs.
                Phase::Stopping => (State::Stopping, house.reason.clone()),
                Phase::Stopped | Phase::Destroyed => (State::Stopped, house.reason.clone()),
            },
        };
        let created = house.as_ref().map(|house| house.created);
        let (key, native, labels) = (Some(guest.to_string()), native.to_owned(), BTreeMap::new());
        // Who goes on elsewhere leaves with what it has; of others, who was not ready yet has a place elsewhere when its container is taken away. Until that
        // ends it may be made anew itself.
        let ends = |house: &&Session| matches!(house.phase, Phase::Stopping | Phase::Stopped | Phase::Destroyed);
        let taken = house.as_ref().filter(ends).and_then(|house| house.disrupted.clone());
        let disrupted = house.as_ref().filter(|_| self.tokens.is_some()).and_then(leaves).or(taken);
        let node = house.and_then(|house| house.node);
        Ok(Sandbox { key, native, state, reason, exit_code: None, size: None, created, deadline: None, labels, node, disrupted })
    }

    async fn list(&self, _: &BTreeMap<String, String>, _: Option<&str>) -> Done<Page> {
        Ok(Page::default())
    }

    async fn exec(&self, _: &str, _: &Exec) -> Done<Executed> {
        Self::cannot("exec", "its container has others in it")
    }

    /// Of all that are in the container: it has one output.
    async fn logs(&self, native: &str, most: usize) -> Done<Vec<u8>> {
        self.inner.logs(&self.runs(native).await?, most).await
    }

    async fn keep_alive(&self, _: &str, _: Timestamp) -> Done<()> {
        Ok(())
    }

    async fn pause(&self, _: &str) -> Done<()> {
        Self::cannot("pause", "stop it instead: its container has others in it")
    }

    async fn resume(&self, _: &str, _: &[String]) -> Done<()> {
        Ok(())
    }

    /// Its agent ends, and its place is free. The others are not touched.
    async fn stop(&self, native: &str, _: Duration) -> Done<()> {
        let (house, guest) = self.house(native).await?;
        if let (Some((port, token)), Some((house, container))) =
            (&self.app, house.and_then(|house| stands(&house).map(|container| (house, container))))
        {
            let at = self.inner.endpoint(&container, *port).await?;
            self.inside.end(&at, token.as_ref().map(Hidden::reveal), &guest).await.map_err(Self::wrong)?;
            if let Some(tokens) = &self.tokens {
                self.inside.forget(&at, &tokens.of(&house.key()), &guest).await.map_err(Self::wrong)?;
            }
        }
        self.delete(native).await
    }

    async fn delete(&self, native: &str) -> Done<()> {
        for _ in 0..CONFLICTS {
            let (Some(mut house), guest) = self.house(native).await? else { return Ok(()) };
            if let Some(places) = &mut house.places {
                places.leave(&guest, self.now);
            }
            match self.store.update(&mut house).await {
                Ok(()) => {
                    // It may have been the last: the container counts from now.
                    self.store.wake(&house.id).await.or_else(known).map_err(Self::wrong)?;
                    return Ok(());
                }
                Err(store::Error::Conflict(_) | store::Error::Missing(_)) => {}
                Err(error) => return Err(Self::wrong(error)),
            }
        }
        Err(Self::wrong("its container is always written by somebody else"))
    }

    async fn endpoint(&self, native: &str, port: u16) -> Done<Endpoint> {
        self.inner.endpoint(&self.runs(native).await?, port).await
    }

    async fn events(&self, _: &BTreeMap<String, String>) -> Done<BoxStream<'static, Done<Happened>>> {
        Self::cannot("tell", "its container is told of")
    }
}

/// What the provider calls a container that runs, or is about to end.
fn stands(house: &Session) -> Option<String> {
    let stands = house.phase.is_up() || house.phase == Phase::Pausing;
    house.native.clone().filter(|_| stands && house.holds)
}

/// Why those in it are to go on elsewhere, if they are.
fn leaves(house: &Session) -> Option<String> {
    let ends = matches!(house.phase, Phase::Pausing | Phase::Stopping | Phase::Stopped | Phase::Destroyed);
    ends.then(|| format!("its container is to end: {}", house.reason.as_deref().unwrap_or("nobody knows why")))
}

/// What is forgotten needs nobody.
fn known(error: store::Error) -> store::Result<()> {
    match error {
        store::Error::Missing(_) => Ok(()),
        error => Err(error),
    }
}

/// What came of making one more container.
enum Built {
    House(Box<Session>),
    Refused(String),
    /// There is one that was not seen.
    Another,
}

/// What came of the search for a place.
pub(crate) enum Found {
    /// As the session is now: in a container, or changed by somebody else.
    Session(Box<Session>),
    Nothing(Failed),
}

impl Fleet {
    /// By whom its container is made: for one of several that is the other one's place.
    pub fn provider_of(&self, session: &Session) -> Result<Arc<dyn Provider>, Error> {
        let inner = Arc::clone(self.provider(&session.provider)?);
        Ok(match session.place {
            None => inner,
            Some(_) => {
                let (inside, app) = self.inside_of(session);
                let tokens = self.tokens_of(session);
                Arc::new(Shared { store: Arc::clone(self.store()), inner, inside, app, tokens, now: self.now() })
            }
        })
    }

    /// A place in a container that has one left, or in one that is made for it.
    pub(crate) async fn place(&self, session: &Session, grace: Option<Duration>) -> Result<Found, Error> {
        let Some(place) = session.place.clone() else { return Ok(Found::Session(Box::new(session.clone()))) };
        // Who comes at the same time is to find what is made for the first.
        let _one_by_one = self.placing.lock().await;
        for kind in place.kinds(&session.id) {
            if let Some(found) = self.place_of(session, &kind, place.share, grace).await? {
                return Ok(found);
            }
        }
        Ok(Found::Nothing(Shared::wrong("all of its containers are full")))
    }

    /// In one of these. `None`: it is full, and there is not to be another.
    async fn place_of(
        &self,
        session: &Session,
        kind: &str,
        share: Share,
        grace: Option<Duration>,
    ) -> Result<Option<Found>, Error> {
        for round in 1.. {
            let mut houses = self.store().spares(kind, TRIES).await?;
            let known: Vec<SessionId> = houses.iter().map(|house| house.id.clone()).collect();
            // The fullest first: those that have few in them are empty sooner.
            houses.sort_by_key(|house| house.places.as_ref().map_or(0, Places::free));
            let mut full = false;
            for house in houses {
                // Of those that are full only one of a number is found.
                full |= is_young(&house, self.now()) && !self.is_leaving(&house);
                if let Some(found) = self.sit(session, house, grace).await? {
                    return Ok(Some(Found::Session(Box::new(found))));
                }
            }
            if full && share.containers.is_some() {
                return Ok(None);
            }
            // Where there are more than can be looked at some are never known.
            let beside = (round < ROUNDS).then_some(known.as_slice());
            return Ok(Some(match self.build(session, kind, share, beside).await? {
                Built::House(house) => match self.sit(session, *house, grace).await? {
                    Some(found) => Found::Session(Box::new(found)),
                    None => Found::Nothing(Shared::wrong("the container that was made for it is another's")),
                },
                Built::Refused(what) => Found::Nothing(Failed::Refused { provider: NAME, what }),
                Built::Another => continue,
            }));
        }
        Ok(None)
    }

    /// Nobody new comes into one whose node is to be empty, or that is taken away.
    fn is_leaving(&self, house: &Session) -> bool {
        house.disrupted.is_some() || self.node_drained_until(house).is_some()
    }

    /// `None`: there is no place.
    async fn sit(&self, session: &Session, mut house: Session, grace: Option<Duration>) -> Result<Option<Session>, Error> {
        for _ in 0..CONFLICTS {
            let now = self.now();
            if !may_seat(&house, now) || self.is_leaving(&house) {
                return Ok(None);
            }
            let (mut guest, mut with) = (session.clone(), house.clone());
            seat(&mut guest, &mut with, grace, now);
            match self.store().update_both(&mut guest, &mut with).await {
                Ok(()) => {
                    tracing::info!(session = %guest.id, container = %with.id, "a session has a place");
                    return Ok(Some(guest));
                }
                Err(store::Error::Conflict(_)) => {
                    let kept = self.store().get(&session.id).await?;
                    if let Some(changed) = kept.filter(|kept| kept.version != session.version) {
                        return Ok(Some(changed));
                    }
                    let Some(now) = self.store().get(&house.id).await? else { return Ok(None) };
                    house = now;
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(None)
    }

    /// One more container, which is driven like a session, unless there is one beside those that are known.
    async fn build(&self, session: &Session, kind: &str, share: Share, beside: Option<&[SessionId]>) -> Result<Built, Error> {
        let now = self.now();
        let mut spec = session.spec.clone();
        // Its traces are not the first one's.
        spec.env.remove(crate::trace::VARIABLE);
        let owner = (session.tenant.as_str(), "");
        let mut house = Session::new(SessionId::fresh(), owner, session.pattern, &session.provider, spec, now);
        let (most, pinned) = (share.sessions_per_container, share.containers.is_some());
        house.places = Some(Places { kind: kind.to_owned(), most, pinned, taken: BTreeSet::new(), empty_since: Some(now) });
        let price = self.provider(&house.provider)?.price(house.spec.size);
        if let Err(why) = self.budgets().admit(&house, &price, now).await? {
            return Ok(Built::Refused(why));
        }
        self.label(&mut house);
        let inserted = match beside {
            Some(known) => self.store().insert_within(&house, Within::Beside(known)).await,
            None => self.store().insert(&house).await.map(Some),
        };
        match inserted {
            Ok(Some(_)) => {}
            // Another fleet has made one meanwhile.
            Ok(None) => {
                self.budgets().release(&house, now).await?;
                return Ok(Built::Another);
            }
            Err(error) => {
                // It may be there all the same.
                if let Ok(None) = self.store().get(&house.id).await {
                    self.budgets().release(&house, now).await?;
                }
                return Err(error.into());
            }
        }
        self.due();
        Ok(Built::House(Box::new(house)))
    }

    /// It is not ready yet: it may have a place elsewhere.
    async fn is_on_its_way(&self, guest: &SessionId) -> bool {
        let guest = self.store().get(guest).await.ok().flatten();
        guest.is_some_and(|guest| matches!(guest.phase, Phase::Creating | Phase::Starting))
    }

    /// Those in a container hear at once what becomes of it.
    pub(crate) async fn tell_guests(&self, house: &Session) {
        let Some(places) = &house.places else { return };
        // Who goes on elsewhere sees for itself that it is to leave.
        let leave = self.tokens_of(house).is_some();
        for guest in &places.taken {
            let told = match house.phase {
                Phase::Stopping | Phase::Stopped if house.disrupted.is_some() && self.is_on_its_way(guest).await => {
                    self.store().wake(guest).await.or_else(known).map_err(Error::from)
                }
                Phase::Stopping | Phase::Stopped if !leave => {
                    let why = house.reason.as_deref().unwrap_or("nobody knows why");
                    self.want(guest, Wanted::Gone, &format!("its container is to end: {why}")).await.map(drop)
                }
                Phase::Ready | Phase::Pausing | Phase::Stopping | Phase::Stopped | Phase::Failed | Phase::Destroyed => {
                    self.store().wake(guest).await.or_else(known).map_err(Error::from)
                }
                Phase::Requested
                | Phase::Creating
                | Phase::Starting
                | Phase::Active
                | Phase::Idle
                | Phase::Paused
                | Phase::Resuming => Ok(()),
            };
            if let Err(error) = told {
                tracing::warn!(session = %guest, %error, "it sees for itself what has become of its container");
            }
        }
        self.due();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::Pattern;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn with_one_more_container_only_those_move_that_are_its_own(id in "[a-z0-9][a-z0-9-]{0,40}", n in 1_usize..40) {
            let id: SessionId = id.parse().unwrap();
            let (before, after) = (order(&id, n), order(&id, n + 1));
            prop_assert_eq!(before.iter().copied().collect::<BTreeSet<_>>(), (0..n).collect::<BTreeSet<_>>());
            // Without the new one everything is as it was: the first, and who comes after it.
            prop_assert_eq!(after.into_iter().filter(|at| *at != n).collect::<Vec<_>>(), before);
        }
    }

    #[test]
    fn nobody_comes_into_a_container_that_is_old_full_or_to_end() {
        let now: Timestamp = "2026-11-26T12:00:00Z".parse().unwrap();
        let at = |seconds: u64| now + Duration::from_secs(seconds);
        let spec =
            serde_json::from_value(serde_json::json!({"key": "k", "image": "i", "ttl": {"secs": 600, "nanos": 0}})).unwrap();
        let mut house = Session::new("house".parse().unwrap(), ("t", ""), Pattern::Shared, "p", spec, now);
        house.places = Some(Places { kind: String::from("k"), most: 1, pinned: true, taken: BTreeSet::new(), empty_since: None });
        assert!(may_seat(&house, at(299)) && !may_seat(&house, at(300)));
        let (mut guest, before) = (house.clone(), house.clone());
        (guest.id, guest.places) = ("guest".parse().unwrap(), None);
        let mut away = guest.clone();
        seat(&mut guest, &mut house, Some(Duration::from_secs(20)), now);
        assert!(!may_seat(&house, now) && house.spare().is_some(), "it is full, and known to be there");
        assert_eq!((guest.native.as_deref(), guest.ends), (Some("house/guest"), at(580)));
        // Its container is taken away, and it has its own end again: the next one may be there for longer.
        let price = crate::provider::Price { running: 0.0, paused: 0.0, stopped: 0.0, source: String::new() };
        (guest.phase, guest.holds) = (Phase::Starting, false);
        crate::plan::enter_phase(&mut guest, Phase::Creating, None, &price, now);
        assert_eq!((guest.ends, guest.own_ends), (at(600), None));
        let mut young = Session { ends: at(900), ..before.clone() };
        seat(&mut guest, &mut young, Some(Duration::from_secs(20)), now);
        assert_eq!(guest.ends, at(600));
        seat(&mut away, &mut before.clone(), None, now);
        assert_eq!(away.ends, at(600), "who is put away does not end with it");
        assert!(!may_seat(&Session { wanted: Wanted::Gone, ..before.clone() }, now));
        assert!(!may_seat(&Session { phase: Phase::Stopping, ..before }, now));
    }

    #[test]
    fn each_container_has_its_part_of_the_sessions() {
        let first = |n: usize, id: usize| order(&format!("session-{id}").parse().unwrap(), n)[0];
        let mut parts = [0_usize; 8];
        (0..4000).for_each(|id| parts[first(8, id)] += 1);
        assert!(parts.iter().all(|part| (400..=600).contains(part)), "{parts:?}");
        let moved = (0..4000).filter(|id| first(8, *id) != first(9, *id)).count();
        assert!((360..=530).contains(&moved), "a ninth is 444, and {moved} have moved");
    }
}
