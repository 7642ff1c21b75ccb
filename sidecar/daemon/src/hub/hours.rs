//! A container's time, divided among the agents that run in it: each second is somebody's, and no second is two agents'.
//!
//! ```text
//!   container-TAG.json   { until, owed: { run: nanoseconds } }      a file under a lock
//!
//!   whoever comes by:  now - until, in equal parts to those who are in the list and live; takes its own
//! ```
//!
//! Who comes by more often pays no more, as it divides for all. Nobody pays for time in which no agent ran. What a killed agent had not
//! taken is nobody's: no other has used it.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use rustix::time::ClockId;
use serde::{Deserialize, Serialize};

use super::journal;
use super::place::{Place, world_tag};
use super::till::lock_named;
use crate::files;

/// What is left of a container that is no more goes after this; a living one is written to every half minute.
const LEFT: Duration = Duration::from_hours(1);
const PREFIX: &str = "container-";

/// See the module's head.
pub(crate) struct Hours {
    run: String,
    /// Where it is divided; without, all of it is ours.
    place: Option<(Place, String)>,
    /// Since when nothing was taken, if it is ours alone.
    since: Instant,
    ended: bool,
}

/// How far it is divided, and what of it waits to be taken. Moments are the machine's own: nanoseconds since it was started, without
/// those in which it was suspended.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Book {
    until: u64,
    owed: BTreeMap<String, u64>,
}

impl Hours {
    pub(crate) fn new(place: Option<Place>, run: &str) -> Hours {
        let place = place.map(|place| (place, world_tag()));
        Hours { run: run.to_owned(), place, since: Instant::now(), ended: false }
    }

    /// What is ours since the last time. The first time puts us on the list; the last one takes us off, and after it there is nothing.
    ///
    /// # Errors
    /// It cannot be divided now; nothing is lost by that.
    pub(crate) fn take(&mut self, end: bool) -> io::Result<Option<Duration>> {
        if self.ended {
            return Ok(None);
        }
        let taken = match &self.place {
            None => {
                let now = Instant::now();
                now - std::mem::replace(&mut self.since, now)
            }
            Some((place, tag)) => {
                let name = format!("{PREFIX}{tag}.json");
                let path = place.dir.join(&name);
                let _locked = lock_named(&place.dir, &format!("{PREFIX}{tag}.lock"))?;
                // What cannot be read begins anew: that loses half a minute.
                let mut book: Book =
                    files::read(&path).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default();
                if !book.owed.contains_key(&self.run) {
                    tidy(place, &name);
                }
                let taken = book.divide(&self.run, now(), end, |run| journal::lives(place, run));
                let new = path.with_extension("tmp");
                let mut file = files::open(&new, OpenOptions::new().write(true).create(true).truncate(true).mode(0o600))?;
                file.write_all(&serde_json::to_vec(&book)?)?;
                fs::rename(&new, &path)?;
                taken
            }
        };
        self.ended = end;
        Ok(Some(taken))
    }
}

impl Book {
    fn divide(&mut self, run: &str, now: u64, end: bool, lives: impl Fn(&str) -> bool) -> Duration {
        let passed = now.saturating_sub(self.until);
        self.until = now;
        self.owed.retain(|other, _| other == run || lives(other));
        let n = self.owed.len() as u64;
        for owed in self.owed.values_mut() {
            *owed = owed.saturating_add(passed / n);
        }
        // Only who was there before has used any of it.
        let mine = self.owed.remove(run).map_or(0, |owed| owed.saturating_add(passed % n));
        if !end {
            self.owed.insert(run.to_owned(), 0);
        }
        Duration::from_nanos(mine)
    }
}

fn now() -> u64 {
    let now = rustix::time::clock_gettime(ClockId::Monotonic);
    let nanos = i128::from(now.tv_sec) * 1_000_000_000 + i128::from(now.tv_nsec);
    u64::try_from(nanos).unwrap_or_default()
}

/// A volume outlives containers: what they had here does not stay. Nobody writes to a lock: by its book is seen whether it is used.
fn tidy(place: &Place, ours: &str) {
    for entry in fs::read_dir(&place.dir).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let other = name.starts_with(PREFIX) && name.ends_with(".json") && name != ours;
        let old = || entry.metadata().and_then(|file| file.modified()).is_ok_and(|at| at.elapsed().is_ok_and(|age| age > LEFT));
        if other && old() {
            for ending in ["tmp", "lock", "json"] {
                fs::remove_file(entry.path().with_extension(ending)).ok();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Divides at these seconds, and says what each has paid in all.
    fn paid(events: &[(u64, &str, bool)], dead: &[(&str, u64)]) -> BTreeMap<String, u64> {
        let mut book = Book::default();
        let mut paid = BTreeMap::new();
        for (second, run, end) in events {
            let lives = |other: &str| !dead.iter().any(|(run, at)| *run == other && at <= second);
            let taken = book.divide(run, second * 1_000_000_000, *end, lives);
            *paid.entry((*run).to_owned()).or_default() += taken.as_nanos() as u64 / 1_000_000_000;
        }
        paid
    }

    fn sums(sums: &[(&str, u64)]) -> BTreeMap<String, u64> {
        sums.iter().map(|(run, seconds)| ((*run).to_owned(), *seconds)).collect()
    }

    #[test]
    fn one_pays_for_the_time_in_which_it_runs() {
        assert_eq!(paid(&[(100, "a", false), (101, "a", false), (131, "a", false), (140, "a", true)], &[]), sums(&[("a", 40)]));
    }

    #[test]
    fn each_second_is_paid_once_however_often_who_comes_by() {
        // Together from 110 to 150; b looks ten times as often.
        let mut events = vec![(100, "a", false), (110, "b", false)];
        events.extend((1..10).map(|n| (110 + 4 * n, "b", false)));
        events.extend([(150, "b", true), (160, "a", true)]);
        assert_eq!(paid(&events, &[]), sums(&[("a", 10 + 20 + 10), ("b", 20)]));
    }

    #[test]
    fn nobody_pays_for_what_nobody_used() {
        let events = [(100, "a", false), (110, "a", true), (500, "b", false), (510, "b", true)];
        assert_eq!(paid(&events, &[]), sums(&[("a", 10), ("b", 10)]));
    }

    #[test]
    fn what_a_killed_one_had_not_taken_is_nobodys() {
        // a is owed five seconds when it is killed.
        let events = [(100, "a", false), (100, "b", false), (110, "b", false), (130, "b", true)];
        assert_eq!(paid(&events, &[("a", 120)]), sums(&[("a", 0), ("b", 5 + 20)]));
    }

    #[test]
    fn the_lock_of_a_container_that_runs_beside_us_stays_however_old_it_is() {
        let dir = std::env::temp_dir().join(format!("agent-sidecar-hours-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let place = Place {
            socket: dir.join("hub.sock"),
            spare: None,
            dir: dir.clone(),
            world: String::new(),
            keep: true,
            door: None,
            guest: false,
        };
        let made = |name: &str, age: Duration| {
            let file = fs::File::create(dir.join(name)).unwrap();
            file.set_modified(std::time::SystemTime::now() - age).unwrap();
        };
        for (name, age) in [("lives", Duration::ZERO), ("gone", LEFT * 2), ("ours", LEFT * 2)] {
            made(&format!("{PREFIX}{name}.json"), age);
            made(&format!("{PREFIX}{name}.lock"), LEFT * 2);
        }
        tidy(&place, &format!("{PREFIX}ours.json"));
        let mut left: Vec<String> =
            fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        left.sort();
        assert_eq!(left, ["container-lives.json", "container-lives.lock", "container-ours.json", "container-ours.lock"]);
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_clock_that_stands_or_falls_adds_nothing() {
        assert_eq!(paid(&[(100, "a", false), (90, "a", false), (95, "a", true)], &[]), sums(&[("a", 5)]));
    }
}
