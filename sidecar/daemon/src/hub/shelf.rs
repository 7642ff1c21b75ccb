//! The hub's side of the journals: reads what is new in each, and takes in those whose wrappers are gone.
//!
//! ```text
//!   read to its end ─► added to the totals ─► totals written ─► journal removed
//! ```
//!
//! Killed between any two of these, the next hub does the rest: the totals name the journals that are in them.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use agent_sidecar_core::hub::{Hello, Line, Registry, Stored};
use agent_sidecar_core::metric::HUB_REFUSED;

use super::Place;
use super::journal::{ENDING, READ, UNFINISHED};
use super::place::{HOLD, lock_of_dead};
use super::users::{self, Member};
use super::{story, turnstile};
use crate::files;

const TOTALS: &str = "totals.json";
/// How much is looked at.
#[derive(Clone, Copy, Debug)]
struct Bounds {
    /// Wrappers at a time.
    journals: usize,
    /// Files in the directory, journals or not.
    entries: usize,
    /// Of one journal in one reading, and of all.
    read: u64,
    scan: u64,
}

/// Our own. A container that has more has other worries.
const OURS: Bounds = Bounds { journals: 2_048, entries: usize::MAX, read: READ, scan: u64::MAX };
/// Another user's, who may want the hub to have no time and no room for the others: several times what a wrapper writes at once.
const THEIRS: Bounds = Bounds { journals: 64, entries: 4_096, read: 1024 * 1024, scan: 4 * 1024 * 1024 };
/// Of another user's, so many names of those that ended are remembered though their journals are gone.
const FOLDED: usize = 1_024;
/// What is unfinished for so long is nobody's.
const ABANDONED: Duration = Duration::from_secs(60);

/// Those that ended last, whose timelines are still told: whoever looks for one looks soon. A megabyte at most.
const ENDED: usize = 8;

/// What happened to an agent that is gone.
#[derive(Debug)]
struct Ended {
    pid: u32,
    session: Option<String>,
    entries: String,
}

/// How far a journal was read.
#[derive(Debug, Default)]
struct Tail {
    inode: u64,
    at: u64,
    who: Who,
}

/// What its first line said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Who {
    #[default]
    Unread,
    Known,
    /// In the totals already.
    Folded,
    /// Of a container that was here before, or of one that shares our files and nothing else.
    Past,
    /// Of another version, or of none. Left alone: it may be somebody's who comes back.
    Foreign,
}

/// Nobody runs, and nobody wants to keep what those counted who did: counters start again, as those of a wrapper alone do.
pub(super) fn begin_anew(place: &Place) -> io::Result<()> {
    if place.keeps() {
        return Ok(());
    }
    let mut dead: Vec<(PathBuf, File)> = Vec::new();
    for entry in fs::read_dir(&place.dir)? {
        let path = entry?.path();
        if !path.to_str().is_some_and(|path| path.ends_with(ENDING)) {
            continue;
        }
        let Ok(file) = files::open(&path, OpenOptions::new().read(true)) else { continue };
        match lock_of_dead(&path, &file) {
            Ok(true) => dead.push((path, file)),
            // Its wrapper lives: all goes on.
            Ok(false) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    for (path, _locked) in dead {
        fs::remove_file(path.with_extension(&story::ENDING[1..])).ok();
        fs::remove_file(path)?;
    }
    match fs::remove_file(place.dir.join(TOTALS)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// See the module's head.
pub(super) struct Shelf {
    dir: PathBuf,
    totals: PathBuf,
    /// Another user, whose alone everything in it is; and for whom all of that one's agents work, if that was said.
    owner: Option<Member>,
    bounds: Bounds,
    /// What may still be read in this scan.
    left: u64,
    world: String,
    pub(super) registry: Registry,
    tails: BTreeMap<String, Tail>,
    ended: VecDeque<Ended>,
    /// Totals that are not on disk yet.
    unstored: bool,
    warned: bool,
}

impl Shelf {
    /// With what earlier hubs have kept.
    pub(super) fn open(place: &Place, slots: usize, max_series: usize, labels: &[(String, String)]) -> Shelf {
        Shelf::of(place, place.dir.clone(), place.dir.join(TOTALS), None, (slots, max_series, labels))
    }

    /// Another user's.
    pub(super) fn of_member(place: &Place, member: &Member, slots: usize, max_series: usize) -> Option<Shelf> {
        let dir = users::dir_of(place.door.as_ref()?, member.uid);
        let totals = place.dir.join(format!("totals-{}.json", member.uid));
        let labels: Vec<(String, String)> = member.tenant.iter().map(|tenant| (String::from("tenant"), tenant.clone())).collect();
        Some(Shelf::of(place, dir, totals, Some(member.clone()), (slots, max_series, &labels)))
    }

    fn of(
        place: &Place,
        dir: PathBuf,
        path: PathBuf,
        owner: Option<Member>,
        (slots, max_series, labels): (usize, usize, &[(String, String)]),
    ) -> Shelf {
        let stored = match files::read(&path) {
            Ok(bytes) => serde_json::from_slice::<Stored>(&bytes).unwrap_or_else(|error| {
                tracing::error!(path = %path.display(), %error, "the totals of ended agents cannot be read: counters start again");
                // For people to look at.
                fs::rename(&path, path.with_extension("broken")).ok();
                Stored::default()
            }),
            Err(_) => Stored::default(),
        };
        // Those of a container that was here before start again with this one, as every counter does.
        let stored = if stored.world == place.world { stored } else { Stored::default() };
        Shelf {
            dir,
            totals: path,
            bounds: if owner.is_some() { THEIRS } else { OURS },
            owner,
            left: 0,
            world: place.world.clone(),
            registry: Registry::new(slots, max_series, labels, &stored),
            tails: BTreeMap::new(),
            ended: VecDeque::new(),
            unstored: false,
            warned: false,
        }
    }

    /// Brings the registry up to date.
    pub(super) fn scan(&mut self) {
        let runs = match self.list() {
            Ok(runs) => runs,
            Err(error) => return self.warn(&error),
        };
        self.left = self.bounds.scan;
        // Locked until they are removed.
        let mut ended: Vec<(String, File)> = Vec::new();
        for run in &runs {
            match self.read(run) {
                Ok(Some(file)) => ended.push((run.clone(), file)),
                Ok(None) => {}
                // It was removed or replaced meanwhile: next time.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                // Not what a wrapper of that user has written.
                Err(_) if self.owner.is_some() => self.registry.house_mut().add(&HUB_REFUSED, &["owner"], 1),
                Err(error) => self.warn(&error),
            }
        }
        let lost: Vec<String> = self.registry.runs().filter(|run| !runs.contains(*run)).map(str::to_owned).collect();
        // Somebody removed its journal. What it had said holds, and what it says elsewhere is not counted again.
        for run in lost {
            self.registry.retire(&run);
            self.tails.remove(&run);
            self.unstored = true;
        }
        // In the order in which they ended: of the first, less is remembered.
        ended.sort_by_key(|(_, journal)| journal.metadata().and_then(|found| found.modified()).ok());
        for (run, _) in &ended {
            if !self.registry.is_folded(run) {
                self.remember(run);
                self.registry.retire(run);
                self.unstored = true;
            }
        }
        if self.owner.is_some() {
            self.registry.forget_but(&runs, FOLDED);
        }
        if self.unstored {
            match self.store() {
                Ok(()) => self.unstored = false,
                Err(error) => return self.warn(&error),
            }
        }
        for (run, _locked) in ended {
            // It was killed while it waited for a budget.
            self.let_go(&self.dir.join(format!("{run}{HOLD}")));
            fs::remove_file(story::path(&self.dir, &run)).ok();
            if fs::remove_file(self.path(&run)).is_ok() {
                self.registry.forget(&run);
                self.tails.remove(&run);
            }
        }
    }

    fn path(&self, run: &str) -> PathBuf {
        self.dir.join(format!("{run}{ENDING}"))
    }

    fn list(&self) -> io::Result<BTreeSet<String>> {
        let mut runs = BTreeSet::new();
        for entry in fs::read_dir(&self.dir)?.take(self.bounds.entries) {
            let entry = entry?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            let abandoned = || entry.metadata().and_then(|found| found.modified()).is_ok_and(is_abandoned);
            if let Some(run) = name.strip_suffix(ENDING).filter(|_| runs.len() < self.bounds.journals) {
                runs.insert(run.to_owned());
            } else if (name.ends_with(UNFINISHED) || self.is_orphan(&name)) && abandoned() {
                fs::remove_file(entry.path()).ok();
            } else if let Some(hold_file) = self.left_early(&name).filter(|_| abandoned()) {
                self.let_go(&hold_file);
            }
        }
        Ok(runs)
    }

    fn remember(&mut self, run: &str) {
        let Some((pid, session)) = self.registry.who(run) else { return };
        let Ok(entries) = story::read(&self.dir, run, 0, self.uid()) else { return };
        // One that was soon over may never have been live for us.
        let session = story::session(&entries).or_else(|| session.map(str::to_owned));
        self.ended.push_back(Ended { pid, session, entries });
        if self.ended.len() > ENDED {
            self.ended.pop_front();
        }
    }

    /// What happened to an agent, by its session or its wrapper's pid: the pid, and the entries after a number.
    pub(super) fn timeline(&self, key: &str, after: u64) -> Option<(u32, String)> {
        if let Some((run, pid)) = self.registry.find(key) {
            // Where nothing is written, nothing has happened yet.
            return Some((pid, story::read(&self.dir, run, after, self.uid()).unwrap_or_default()));
        }
        let is = |ended: &&Ended| ended.session.as_deref() == Some(key) || ended.pid.to_string() == key;
        let ended = self.ended.iter().rev().find(is)?;
        Some((ended.pid, story::since(&format!("[{}]", ended.entries), after)))
    }

    /// A timeline whose journal is gone: somebody died between the two.
    /// Of what a wrapper makes before its journal, if it was killed in between: where its CLI would have looked.
    fn left_early(&self, name: &str) -> Option<PathBuf> {
        let (run, _) = name.split_once(HOLD)?;
        let hold_file = self.dir.join(format!("{run}{HOLD}"));
        (!self.path(run).exists() && turnstile::is_left(&hold_file)).then_some(hold_file)
    }

    /// Removes what its CLI was told, and where it waited.
    fn let_go(&self, hold_file: &Path) {
        fs::remove_file(hold_file).ok();
        turnstile::remove(hold_file);
    }

    fn is_orphan(&self, name: &str) -> bool {
        name.strip_suffix(story::ENDING).is_some_and(|run| !self.path(run).exists())
    }

    /// Reads what is new in a journal. The file, locked by us, if its wrapper is gone.
    fn read(&mut self, run: &str) -> io::Result<Option<File>> {
        let path = self.path(run);
        // What is another's is not written to.
        let mut file = files::open(&path, OpenOptions::new().read(true).write(self.owner.is_none()))?;
        files::check_owner(&file, self.uid())?;
        let gone = lock_of_dead(&path, &file)?;
        let found = file.metadata()?;
        // Replaced since it was opened: the new one says all of it.
        if fs::symlink_metadata(&path)?.ino() != found.ino() {
            return Ok(None);
        }
        let tail = self.tails.entry(run.to_owned()).or_default();
        if tail.inode != found.ino() || found.len() < tail.at && tail.at != u64::MAX {
            *tail = Tail { inode: found.ino(), ..Tail::default() };
        }
        let mut all = true;
        if found.len() > tail.at {
            file.seek(SeekFrom::Start(tail.at))?;
            let mut bytes = Vec::new();
            let limit = self.bounds.read.min(self.left);
            (&mut file).take(limit).read_to_end(&mut bytes)?;
            self.left -= bytes.len() as u64;
            all = (bytes.len() as u64) < limit;
            // A wrapper in the middle of a line has not said it yet.
            let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
            for line in bytes[..whole].split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
                take(&mut self.registry, &self.world, run, tail, line, self.owner.as_ref());
            }
            tail.at += whole as u64;
            if whole == 0 && bytes.len() as u64 == self.bounds.read {
                // No wrapper says that much at once.
                tail.who = Who::Foreign;
                tail.at = u64::MAX;
            }
        }
        Ok(Some(file).filter(|_| gone && all && tail.who != Who::Foreign))
    }

    /// Whose everything here is, if not ours.
    pub(super) fn uid(&self) -> Option<u32> {
        self.owner.as_ref().map(|owner| owner.uid)
    }

    fn store(&self) -> io::Result<()> {
        let path = &self.totals;
        let new = path.with_extension("json.tmp");
        let mut file = files::open(&new, OpenOptions::new().write(true).create(true).truncate(true).mode(0o600))?;
        let mut stored = self.registry.stored();
        stored.world.clone_from(&self.world);
        file.write_all(&serde_json::to_vec(&stored)?)?;
        fs::rename(&new, path)
    }

    fn warn(&mut self, error: &io::Error) {
        if !std::mem::replace(&mut self.warned, true) {
            tracing::warn!(dir = %self.dir.display(), %error, "the hub cannot keep the totals of all agents");
        }
    }
}

/// One that has its name by now, or is gone, is not.
fn is_abandoned(modified: SystemTime) -> bool {
    modified.elapsed().is_ok_and(|age| age > ABANDONED)
}

fn take(registry: &mut Registry, world: &str, run: &str, tail: &mut Tail, line: &[u8], owner: Option<&Member>) {
    match tail.who {
        Who::Unread if registry.is_folded(run) => tail.who = Who::Folded,
        Who::Unread => {
            let mut hello = serde_json::from_slice::<Hello>(line).ok().filter(|hello| hello.run == run);
            if let (Some(tenant), Some(hello)) = (owner.and_then(|owner| owner.tenant.clone()), &mut hello) {
                // Whatever it says itself.
                hello.labels.retain(|(label, _)| label != "tenant");
                hello.labels.push((String::from("tenant"), tenant));
            }
            tail.who = match hello {
                Some(hello) if hello.world != world => Who::Past,
                Some(hello) if registry.join(hello.clone()) => Who::Known,
                _ => Who::Foreign,
            };
        }
        Who::Known => match serde_json::from_slice::<Line>(line) {
            Ok(line) => registry.update(run, line),
            Err(_) => registry.house_mut().add(&HUB_REFUSED, &["shape"], 1),
        },
        Who::Folded | Who::Past | Who::Foreign => {}
    }
}

/// The time as journals have it.
pub(super) fn unix() -> f64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

#[cfg(test)]
mod tests {
    use agent_sidecar_core::hub::VERSION;
    use agent_sidecar_core::metric::{Cell, Meters, TURNS};

    use super::super::journal::Journal;
    use super::*;

    fn place(name: &str, world: &str) -> Place {
        let dir = std::env::temp_dir().join(format!("agent-sidecar-shelf-{name}-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        Place { socket: dir.join("hub.sock"), spare: None, dir, world: world.to_owned(), keep: true, door: None, guest: false }
    }

    fn journal(place: &Place, run: &str) -> Journal {
        let hello =
            Hello { hub: VERSION, run: run.to_owned(), pid: 1, started: 0.0, world: place.world.clone(), labels: Vec::new() };
        Journal::new(place, hello)
    }

    /// Says that there were so many turns more.
    fn turns(journal: &mut Journal, meters: &mut Meters, n: u64) {
        meters.add(&TURNS, &["success"], n);
        let mut line = Line::default();
        let mark = agent_sidecar_core::hub::changes(meters, journal.since(), &mut line);
        journal.write(&line, mark).unwrap();
    }

    fn shelf(place: &Place) -> Shelf {
        let mut shelf = Shelf::open(place, 8, 1_500, &[]);
        shelf.scan();
        shelf
    }

    fn counted(shelf: &Shelf) -> u64 {
        match shelf.registry.expose(0.0).0[0].1.get(&TURNS, &["success"]) {
            Some(Cell::Count(n)) => *n,
            _ => 0,
        }
    }

    #[test]
    fn a_journal_is_read_as_it_grows_and_taken_in_when_it_is_let_go() {
        let place = place("grows", "");
        let (mut journal, mut meters) = (journal(&place, "a"), Meters::default());
        turns(&mut journal, &mut meters, 1);
        let mut hub = shelf(&place);
        assert_eq!(counted(&hub), 1);
        // Long enough to be begun anew several times.
        for _ in 0..2_000 {
            meters.observe(&agent_sidecar_core::metric::TURN_COST, &[], 1.0);
            turns(&mut journal, &mut meters, 1);
        }
        hub.scan();
        assert_eq!(counted(&hub), 2_001);
        assert!(fs::metadata(hub.path("a")).unwrap().len() < 300 * 1024);
        assert_eq!(counted(&shelf(&place)), 2_001, "whoever comes later reads the same");
        let kept = fs::read(hub.path("a")).unwrap();
        journal.end();
        hub.scan();
        assert!(!hub.path("a").exists());
        assert_eq!(counted(&hub), 2_001);
        // Killed before it was removed.
        fs::write(hub.path("a"), kept).unwrap();
        let hub = shelf(&place);
        assert_eq!(counted(&hub), 2_001);
        assert!(!hub.path("a").exists(), "what is in the totals is cleared away");
        fs::remove_dir_all(&place.dir).unwrap();
    }

    #[test]
    fn of_agents_that_are_taken_in_together_the_last_to_end_is_remembered_last() {
        let place = place("last", "");
        for (ended, (run, pid)) in (1..).zip([("z", 1), ("a", 2), ("m", 3)]) {
            let hello = Hello { hub: VERSION, run: run.to_owned(), pid, started: 0.0, world: String::new(), labels: Vec::new() };
            let (mut journal, mut meters) = (Journal::new(&place, hello), Meters::default());
            turns(&mut journal, &mut meters, 1);
            fs::write(story::path(&place.dir, run), "").unwrap();
            journal.end();
            let file = OpenOptions::new().write(true).open(place.dir.join(format!("{run}{ENDING}"))).unwrap();
            file.set_modified(std::time::UNIX_EPOCH + std::time::Duration::from_secs(ended)).unwrap();
        }
        let ended: Vec<u32> = shelf(&place).ended.iter().map(|ended| ended.pid).collect();
        assert_eq!(ended, [1, 2, 3]);
        fs::remove_dir_all(&place.dir).unwrap();
    }

    #[test]
    fn of_one_that_was_killed_before_it_had_a_journal_nothing_is_left() {
        let place = place("early", "");
        let made = turnstile::Turnstile::new(&place.dir.join(format!("a{HOLD}")), None).unwrap();
        let holds =
            || fs::read_dir(&place.dir).unwrap().flatten().filter(|entry| entry.file_name().to_string_lossy().contains(HOLD));
        let made_at = |at: SystemTime| {
            for entry in holds() {
                OpenOptions::new().read(true).write(true).open(entry.path()).unwrap().set_modified(at).unwrap();
            }
        };
        let mut hub = shelf(&place);
        made_at(SystemTime::UNIX_EPOCH);
        hub.scan();
        assert_eq!(holds().count(), 3, "it is about to have one");
        drop(made);
        made_at(SystemTime::now());
        hub.scan();
        assert_eq!(holds().count(), 3, "nor may one that makes them this moment lose them");
        made_at(SystemTime::UNIX_EPOCH);
        hub.scan();
        assert_eq!(holds().count(), 0);
        fs::remove_dir_all(&place.dir).unwrap();
    }

    #[test]
    fn what_an_earlier_container_has_left_is_not_ours() {
        let before = place("world", "before");
        for run in ["a", "b"] {
            let (mut journal, mut meters) = (journal(&before, run), Meters::default());
            turns(&mut journal, &mut meters, 3);
            journal.end();
            if run == "a" {
                assert_eq!(counted(&shelf(&before)), 3);
            }
        }
        let now = place("world", "now");
        let hub = shelf(&now);
        assert_eq!(counted(&hub), 0);
        assert!(!hub.path("b").exists(), "nobody will ask for it");
        fs::remove_dir_all(&now.dir).unwrap();
    }

    #[test]
    fn counters_start_again_when_nobody_runs_unless_a_hub_keeps_them() {
        let place = Place { keep: false, ..place("anew", "here") };
        let ended = |run: &str| {
            let (mut journal, mut meters) = (journal(&place, run), Meters::default());
            turns(&mut journal, &mut meters, 3);
            journal.end();
        };
        ended("a");
        assert_eq!(counted(&shelf(&place)), 3);
        ended("b");
        let (mut lives, mut meters) = (journal(&place, "c"), Meters::default());
        turns(&mut lives, &mut meters, 1);
        begin_anew(&place).unwrap();
        assert_eq!(counted(&shelf(&place)), 7, "one still runs");
        lives.end();
        fs::write(place.kept(), "here").unwrap();
        begin_anew(&place).unwrap();
        assert_eq!(counted(&shelf(&place)), 7, "a hub keeps them");
        fs::write(place.kept(), "elsewhere").unwrap();
        ended("d");
        begin_anew(&place).unwrap();
        assert_eq!(counted(&shelf(&place)), 0);
        fs::remove_dir_all(&place.dir).unwrap();
    }

    #[test]
    fn a_journal_that_was_removed_is_counted_once() {
        let place = place("removed", "");
        let (mut journal, mut meters) = (journal(&place, "a"), Meters::default());
        turns(&mut journal, &mut meters, 5);
        let mut hub = shelf(&place);
        let whole = fs::read(hub.path("a")).unwrap();
        fs::remove_file(hub.path("a")).unwrap();
        hub.scan();
        assert_eq!(counted(&hub), 5);
        fs::write(hub.path("a"), whole).unwrap();
        hub.scan();
        assert_eq!(counted(&hub), 5);
        assert_eq!(counted(&shelf(&place)), 5);
        fs::remove_dir_all(&place.dir).unwrap();
    }

    #[test]
    fn junk_is_counted_and_harms_nobody() {
        let place = place("junk", "");
        let (mut good, mut meters) = (journal(&place, "good"), Meters::default());
        turns(&mut good, &mut meters, 2);
        fs::write(place.dir.join("bad.jsonl"), b"\xff\xfe no json\n{}\n").unwrap();
        fs::write(place.dir.join("empty.jsonl"), b"").unwrap();
        let other = format!("{{\"hub\":{VERSION},\"run\":\"good\",\"pid\":1,\"started\":0}}\n");
        fs::write(place.dir.join("thief.jsonl"), other).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", place.dir.join("link.jsonl")).unwrap();
        fs::write(place.dir.join(TOTALS), b"{torn").unwrap();
        assert_eq!(counted(&shelf(&place)), 2);
        assert!(place.dir.join("totals.broken").exists());
        fs::remove_dir_all(&place.dir).unwrap();
    }
}
