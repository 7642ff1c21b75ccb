//! Who runs, what each of them has counted, and what those have counted that run no more.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::wire::{self, Hello, Line, Number, VERSION};
use crate::metric::{
    self, Cell, HUB_REFUSED, HUB_RETIRED, HUB_WRAPPERS, Kind, Merge, Meters, Metric, OTHER, SERIES_LIMIT_HITS, SESSIONS_ACTIVE,
    bounded,
};
use crate::report::Sums;

/// Sets of labels that are told apart; whoever comes later works for `other`.
const GROUPS: usize = 50;
/// Those labels, and how long a value may be.
const LABELS: [&str; 3] = ["tenant", "team", "cost_center"];
const MAX_LABEL: usize = 64;
/// Of a series: several times what a wrapper writes.
const MAX_VALUE: usize = 512;
/// Series of one wrapper: more than its own bound ever lets through.
const SERIES: usize = 4_096;
/// What all sessions of a wrapper are in JSON: many times what they are. It takes sixteen times as much memory.
const SESSIONS: usize = 64 * 1024;
/// A wrapper writes every five seconds if it can. One that has not for so long does not answer.
pub const STALE: f64 = 20.0;
/// What the catalogue calls the place of a CLI among the others.
const SLOT: &str = "slot";

type Labels = Vec<(String, String)>;

/// What is summed under the same labels.
#[derive(Debug)]
struct Group {
    labels: Labels,
    /// Of those that are gone; and of those that run, the label values that were let in.
    retired: Meters,
    /// Somebody has worked for them. The one that is there from the start may be nobody's.
    used: bool,
    /// Of those that are gone there is something.
    kept: bool,
}

#[derive(Debug)]
struct Held {
    metric: &'static Metric,
    /// Where it is counted, which may be under `other`.
    values: Vec<String>,
    cell: Cell,
}

#[derive(Debug)]
struct Live {
    hello: Hello,
    group: usize,
    slot: Option<usize>,
    held: BTreeMap<(&'static str, Vec<String>), Held>,
    last: Line,
    /// The last session that it told of: one that has ended is no longer among those of its last line.
    session: Option<String>,
}

impl Live {
    fn stale(&self, unix: f64) -> bool {
        !self.last.blind && unix - self.last.unix.max(self.hello.started) > STALE
    }
}

impl Live {
    fn session(&self) -> Option<&str> {
        self.last.sessions.first()?["session_id"].as_str()
    }
}

/// How the wrappers are, for probes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Health {
    pub wrappers: usize,
    /// Those that have not lost the power to end their agent, and say so.
    pub live: usize,
    pub ready: usize,
}

/// What has to outlive the hub.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Stored {
    pub hub: u32,
    /// See [`Hello::world`].
    #[serde(default)]
    pub world: String,
    /// Counted below, though their journals may still be there.
    folded: BTreeSet<String>,
    groups: Vec<StoredGroup>,
    house: Vec<(String, Vec<String>, Number)>,
    totals: Sums,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct StoredGroup {
    labels: Labels,
    series: Vec<(String, Vec<String>, Number)>,
}

/// See the module's head.
#[derive(Debug)]
pub struct Registry {
    slots: usize,
    max_series: usize,
    groups: Vec<Group>,
    /// The sidecars' own numbers, which are no tenant's.
    house: Meters,
    live: BTreeMap<String, Live>,
    folded: BTreeSet<String>,
    totals: Sums,
}

impl Registry {
    /// `labels` are those that are there from the start, with zeros.
    pub fn new(slots: usize, max_series: usize, labels: &[(String, String)], stored: &Stored) -> Registry {
        let mut registry = Registry {
            slots,
            max_series,
            groups: Vec::new(),
            house: Meters::new(max_series),
            live: BTreeMap::new(),
            folded: BTreeSet::new(),
            totals: Sums::default(),
        };
        if stored.hub == VERSION {
            registry.folded.clone_from(&stored.folded);
            registry.totals.add(&stored.totals);
            restore(&mut registry.house, &stored.house);
            for group in &stored.groups {
                let at = registry.group(&group.labels);
                restore(&mut registry.groups[at].retired, &group.series);
                (registry.groups[at].used, registry.groups[at].kept) = (true, true);
            }
        }
        registry.group(labels);
        registry
    }

    /// What to keep, for [`Registry::new`].
    pub fn stored(&self) -> Stored {
        let group = |group: &Group| StoredGroup { labels: group.labels.clone(), series: lasting(&group.retired) };
        Stored {
            hub: VERSION,
            world: String::new(),
            folded: self.folded.clone(),
            groups: self.groups.iter().filter(|group| group.used).map(group).collect(),
            house: lasting(&self.house),
            totals: self.totals.clone(),
        }
    }

    /// Whether this one's totals are kept already: then its journal says nothing new.
    pub fn is_folded(&self, run: &str) -> bool {
        self.folded.contains(run)
    }

    /// Nobody will ask of this one again: its journal is gone.
    pub fn forget(&mut self, run: &str) {
        self.folded.remove(run);
    }

    /// The same of all but these, where more than so many are remembered.
    pub fn forget_but(&mut self, runs: &BTreeSet<String>, most: usize) {
        if self.folded.len() > most {
            self.folded.retain(|run| runs.contains(run));
        }
    }

    pub fn runs(&self) -> impl Iterator<Item = &str> {
        self.live.keys().map(String::as_str)
    }

    /// The session that a wrapper's CLI is in, once it has said so.
    pub fn session_of(&self, run: &str) -> Option<String> {
        self.live.get(run)?.session().map(str::to_owned)
    }

    /// The wrappers that somebody means by a session's name, a slot or a run.
    pub fn named(&self, name: &str) -> Vec<String> {
        let slot = name.parse::<usize>().ok();
        let meant = |run: &str, live: &Live| run == name || live.session() == Some(name) || slot.is_some() && live.slot == slot;
        self.live.iter().filter(|(run, live)| meant(run, live)).map(|(run, _)| run.clone()).collect()
    }

    /// What a limit of a wrapper's session allows, if it has that one.
    pub fn ceiling(&self, run: &str, limit: &str) -> Option<f64> {
        let limits = self.live.get(run)?.last.sessions.first()?["limits"].as_array()?;
        limits.iter().find(|one| one["limit"] == limit && one["scope"] == "session")?["ceiling"].as_f64()
    }

    /// A journal is read from its start. False if it is of another version, or was counted already.
    pub fn join(&mut self, mut hello: Hello) -> bool {
        if hello.hub != VERSION {
            self.house.add(&HUB_REFUSED, &["version"], 1);
            return false;
        }
        hello.labels = known(&hello.labels);
        if self.is_folded(&hello.run) {
            return false;
        }
        let group = self.group(&hello.labels);
        self.groups[group].used = true;
        let (slot, before) = match self.live.get(&hello.run) {
            Some(known) => (known.slot, Some(known.group)),
            None => (self.free_slot(), None),
        };
        if let Some(before) = before.filter(|before| *before != group) {
            // It has learnt for whom it works. Where it was the only one, nobody was.
            let others = self.live.iter().any(|(run, live)| *run != hello.run && live.group == before);
            self.groups[before].used = self.groups[before].kept || others;
        }
        let last = Line { unix: hello.started, live: true, ..Line::default() };
        self.live.insert(hello.run.clone(), Live { hello, group, slot, held: BTreeMap::new(), last, session: None });
        true
    }

    /// A line of a journal. What it cannot mean is left out and counted.
    pub fn update(&mut self, run: &str, mut line: Line) {
        let Some(live) = self.live.get_mut(run) else { return };
        let group = &mut self.groups[live.group].retired;
        for name in &line.cleared {
            live.held.retain(|(metric, _), _| metric != name);
        }
        for (name, source, number) in line.series.drain(..) {
            let short = source.iter().all(|value| value.len() <= MAX_VALUE);
            let metric = metric::named(&name).filter(|metric| short && metric.labels.len() == source.len());
            let Some((metric, cell)) = metric.and_then(|metric| Some((metric, number.cell(metric)?))) else {
                self.house.add(&HUB_REFUSED, &["shape"], 1);
                continue;
            };
            if let Some(held) = live.held.get_mut(&(metric.name, source.clone())) {
                held.cell = later(&held.cell, cell);
                continue;
            }
            if live.held.len() >= SERIES {
                self.house.add(&HUB_REFUSED, &["room"], 1);
                continue;
            }
            let store = if is_house(metric) { &mut self.house } else { &mut *group };
            let values: Vec<&str> = source.iter().map(String::as_str).collect();
            // A counter has its place from here on, so that its sum never changes places.
            let values = match metric.kind {
                Kind::Counter | Kind::Histogram => store.admit_series(metric, &values),
                Kind::Gauge | Kind::Info => Some(store.admit_values(metric, &values)),
            };
            if let Some(values) = values {
                live.held.insert((metric.name, source), Held { metric, values, cell });
            }
        }
        // What is kept of it is bounded, whoever wrote it.
        line.cleared = Vec::new();
        let totals = std::mem::take(&mut line.totals);
        line.totals.add(&totals);
        if serde_json::to_string(&line.sessions).map_or(true, |text| text.len() > SESSIONS) {
            self.house.add(&HUB_REFUSED, &["room"], 1);
            line.sessions = Vec::new();
        }
        line.unix = line.unix.max(live.last.unix);
        if let Some(id) = line.sessions.last().and_then(|session| session["session_id"].as_str()) {
            live.session = Some(id.to_owned());
        }
        live.last = line;
    }

    /// The wrapper is gone, and its journal was read to the end: what it has counted stays.
    pub fn retire(&mut self, run: &str) {
        let Some(live) = self.live.remove(run) else { return };
        self.groups[live.group].kept = true;
        let group = &mut self.groups[live.group].retired;
        for Held { metric, values, cell } in live.held.into_values() {
            if matches!(metric.kind, Kind::Counter | Kind::Histogram) {
                let store = if is_house(metric) { &mut self.house } else { &mut *group };
                let values: Vec<&str> = values.iter().map(String::as_str).collect();
                store.merge(metric, &values, &cell, metric.merge);
            }
        }
        self.totals.add(&live.last.totals);
        self.house.add(&HUB_RETIRED, &[], 1);
        self.folded.insert(run.to_owned());
    }

    /// For the sidecars' own numbers that the hub itself counts.
    pub fn house_mut(&mut self) -> &mut Meters {
        &mut self.house
    }

    /// Everything to be exposed: a store for each set of labels, whose `claude_agent_*` count, and one for `agent_sidecar_*`.
    pub fn expose(&self, unix: f64) -> (Vec<(Labels, Meters)>, Meters) {
        let mut house = self.house.clone();
        let mut groups: Vec<(Labels, Meters)> = self.groups.iter().map(|g| (g.labels.clone(), g.retired.clone())).collect();
        for (_, meters) in &mut groups {
            meters.set(&SESSIONS_ACTIVE, &[], 0.0);
        }
        let mut live: Vec<&Live> = self.live.values().collect();
        live.sort_by(|a, b| a.last.unix.total_cmp(&b.last.unix));
        let mut stale = 0;
        for live in &live {
            stale += usize::from(live.stale(unix));
            let slot = self.slot(live);
            for Held { metric, values, cell } in live.held.values() {
                let store = if is_house(metric) { &mut house } else { &mut groups[live.group].1 };
                let value = |(label, value): (&&str, &String)| if *label == SLOT { slot.clone() } else { value.clone() };
                let values: Vec<String> = metric.labels.iter().zip(values).map(value).collect();
                let values: Vec<&str> = values.iter().map(String::as_str).collect();
                store.merge(metric, &values, cell, metric.merge);
            }
        }
        for (_, meters) in &groups {
            for series in meters.family(&SERIES_LIMIT_HITS).into_iter().flat_map(metric::Family::series) {
                let values: Vec<&str> = series.values.iter().map(String::as_str).collect();
                house.merge(&SERIES_LIMIT_HITS, &values, &series.cell, Merge::Sum);
            }
        }
        #[expect(clippy::cast_precision_loss, reason = "a gauge speaks in floats")]
        for (state, n) in [("live", live.len() - stale), ("stale", stale)] {
            house.set(&HUB_WRAPPERS, &[state], n as f64);
        }
        let nobody = !self.groups.iter().any(|group| group.used);
        let mut used = self.groups.iter().map(|group| group.used || nobody);
        groups.retain(|_| used.next().unwrap_or(true));
        (groups, house)
    }

    pub fn health(&self, unix: f64) -> Health {
        let count = |of: fn(&Line) -> bool| self.live.values().filter(|live| !live.stale(unix) && of(&live.last)).count();
        Health { wrappers: self.live.len(), live: count(|line| line.live || line.blind), ready: count(|line| line.ready) }
    }

    /// What `/status` says of all of them: the object that a wrapper alone has, with every live session.
    pub fn status(&self, unix: f64) -> Value {
        let (sessions, totals) = self.sessions(unix);
        json!({ "sessions": sessions, "totals": totals })
    }

    /// The same in parts.
    pub fn sessions(&self, unix: f64) -> (Vec<Value>, Sums) {
        let mut totals = self.totals.clone();
        let mut live: Vec<&Live> = self.live.values().collect();
        live.sort_by(|a, b| a.hello.started.total_cmp(&b.hello.started));
        let mut sessions = Vec::new();
        for live in live {
            totals.add(&live.last.totals);
            let since = (unix - live.last.unix).max(0.0);
            for mut session in live.last.sessions.iter().cloned() {
                let Some(object) = session.as_object_mut() else { continue };
                if let Some(seconds) = object.get("state_seconds").and_then(Value::as_f64) {
                    object.insert(String::from("state_seconds"), json!(seconds + since));
                }
                // Those without a number of their own have none.
                object.insert(String::from(SLOT), live.slot.map_or_else(|| json!(OTHER), |slot| json!(slot)));
                object.insert(String::from("pid"), json!(live.hello.pid));
                object.insert(String::from("stale"), json!(live.stale(unix)));
                object.extend(live.hello.labels.iter().map(|(label, value)| (label.clone(), json!(value))));
                sessions.push(session);
            }
        }
        (sessions, totals)
    }

    /// Who runs a session, by its id, or by the wrapper's pid if one alone has it: its run and its pid.
    pub fn find(&self, key: &str) -> Option<(&str, u32)> {
        let pid = key.parse::<u32>().ok();
        let named = |live: &&Live| live.session.as_deref() == Some(key);
        // In containers that share a hub, many have the same.
        let mut of_pid = self.live.values().filter(|live| Some(live.hello.pid) == pid);
        let alone = of_pid.next().filter(|_| of_pid.next().is_none());
        let found = self.live.values().find(named).or(alone)?;
        Some((&found.hello.run, found.hello.pid))
    }

    /// Whose run it is: the pid and the session, while it is not retired.
    pub fn who(&self, run: &str) -> Option<(u32, Option<&str>)> {
        self.live.get(run).map(|live| (live.hello.pid, live.session.as_deref()))
    }

    fn slot(&self, live: &Live) -> String {
        live.slot.map_or_else(|| OTHER.to_owned(), |slot| slot.to_string())
    }

    fn free_slot(&self) -> Option<usize> {
        let taken: BTreeSet<usize> = self.live.values().filter_map(|live| live.slot).collect();
        (0..self.slots).find(|slot| !taken.contains(slot))
    }

    fn group(&mut self, labels: &[(String, String)]) -> usize {
        let mut labels = known(labels);
        let at = |groups: &[Group], labels: &Labels| groups.iter().position(|group| group.labels == *labels);
        if let Some(at) = at(&self.groups, &labels) {
            return at;
        }
        if self.groups.iter().filter(|group| group.used).count() >= GROUPS {
            labels = LABELS.iter().map(|label| ((*label).to_owned(), OTHER.to_owned())).collect();
            if let Some(at) = at(&self.groups, &labels) {
                return at;
            }
        }
        self.groups.push(Group { labels, retired: Meters::new(self.max_series), used: false, kept: false });
        self.groups.len() - 1
    }
}

/// Those by which sums are kept apart, each once.
fn known(labels: &[(String, String)]) -> Labels {
    LABELS
        .iter()
        .filter_map(|name| labels.iter().find(|(label, _)| label == name))
        .map(|(label, value)| (label.clone(), bounded(value, MAX_LABEL).to_owned()))
        .collect()
}

fn is_house(metric: &Metric) -> bool {
    !metric.name.starts_with("claude_agent_")
}

/// A total does not fall, whoever says so.
fn later(before: &Cell, now: Cell) -> Cell {
    match (before, now) {
        (Cell::Count(a), Cell::Count(b)) => Cell::Count(b.max(*a)),
        (Cell::Usd(a), Cell::Usd(b)) => Cell::Usd(b.max(*a)),
        (Cell::Time(a), Cell::Time(b)) => Cell::Time(b.max(*a)),
        (Cell::Histogram(a), Cell::Histogram(b)) if b.count < a.count => Cell::Histogram(a.clone()),
        (_, now) => now,
    }
}

/// What has a total, and not what was so at some moment. The container's own counters are no total of ours: those of the next one begin
/// with zeros.
fn lasting(meters: &Meters) -> Vec<(String, Vec<String>, Number)> {
    wire::series(
        meters
            .changed(0)
            .filter(|(metric, _)| matches!(metric.kind, Kind::Counter | Kind::Histogram) && metric.merge != Merge::Max),
    )
}

fn restore(meters: &mut Meters, series: &[(String, Vec<String>, Number)]) {
    for (name, values, number) in series {
        let Some(metric) = metric::named(name).filter(|metric| metric.labels.len() == values.len()) else { continue };
        let Some(cell) = number.clone().cell(metric) else { continue };
        let values: Vec<&str> = values.iter().map(String::as_str).collect();
        meters.merge(metric, &values, &cell, metric.merge);
    }
}
