//! What belongs to which tenant: whoever used it first. Pure, but for the two questions that are handed in.

use std::collections::BTreeMap;

use agent_sidecar_core::who::Shared;
use serde::{Deserialize, Serialize};

/// Of each kind; the one that was used longest ago makes room.
const ENTRIES: usize = 1_024;
/// Tenants that are told once of the same thing; more are told each time.
const TOLD: usize = 64;
/// What nobody has used for so long is nobody's, in seconds: sessions are resumed after weeks.
const KEPT: f64 = 32.0 * 86_400.0;

/// Something that an agent uses.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Claim {
    pub(super) kind: Shared,
    /// A path without links and dots, or a session's id.
    pub(super) key: String,
    /// Of what is there: its device and inode, and when it was made.
    pub(super) file: Option<Identity>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Identity {
    pub(super) device: u64,
    pub(super) inode: u64,
    /// In seconds since the Unix epoch, where the file system knows it.
    pub(super) made: Option<f64>,
}

impl Identity {
    fn is(self, (device, inode): (u64, u64)) -> bool {
        self.device == device && self.inode == inode
    }
}

/// Whose something is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Owned {
    /// Empty where it is to have a tenant, and nobody says which.
    owner: String,
    /// Who of the owner's has used it last, and when.
    run: String,
    used: f64,
    #[serde(default)]
    file: Option<(u64, u64)>,
    /// Who was told that it is not his: once is enough for the log.
    #[serde(default)]
    told: Vec<String>,
}

/// A claim to what is another's.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Conflict {
    pub(super) kind: Shared,
    pub(super) key: String,
    pub(super) owner: String,
    /// The claimant has not been told before.
    pub(super) fresh: bool,
}

/// See the module's head.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Book {
    things: BTreeMap<Shared, BTreeMap<String, Owned>>,
}

/// Who claims.
pub(super) struct Claimant<'a> {
    pub(super) owner: &'a str,
    pub(super) run: &'a str,
    pub(super) now: f64,
    /// Whether a run goes on.
    pub(super) lives: &'a dyn Fn(&str) -> bool,
    /// What stands at a path now.
    pub(super) stands: &'a dyn Fn(&str) -> Option<(u64, u64)>,
}

impl Book {
    /// What of it is somebody else's. What is nobody's is the claimant's from now on, unless it gets nothing where it does not get all.
    pub(super) fn claim(&mut self, by: &Claimant<'_>, claims: &[Claim], all: bool) -> Vec<Conflict> {
        for things in self.things.values_mut() {
            things.retain(|_, owned| by.now - owned.used < KEPT);
        }
        let mut conflicts: Vec<Conflict> = claims.iter().filter_map(|claim| self.conflict(by, claim)).collect();
        if all && !conflicts.is_empty() {
            return conflicts;
        }
        for conflict in &mut conflicts {
            let owned = self.things.get_mut(&conflict.kind).and_then(|things| things.get_mut(&conflict.key));
            if let Some(Owned { told, .. }) = owned {
                conflict.fresh = !told.iter().any(|one| one == by.owner);
                if conflict.fresh && told.len() < TOLD {
                    told.push(by.owner.to_owned());
                }
            }
        }
        let free = claims.iter().filter(|claim| !conflicts.iter().any(|c| c.kind == claim.kind && c.key == claim.key));
        for claim in free {
            let things = self.things.entry(claim.kind).or_default();
            let file = claim.file.map(|file| (file.device, file.inode));
            // Who was told stays told while it is the same owner's.
            let told = things.get(&claim.key).filter(|old| old.owner == by.owner).map(|old| old.told.clone());
            let told = told.unwrap_or_default();
            let owned = Owned { owner: by.owner.to_owned(), run: by.run.to_owned(), used: by.now, file, told };
            things.insert(claim.key.clone(), owned);
            while things.len() > ENTRIES
                && let Some(oldest) = things.iter().min_by(|a, b| a.1.used.total_cmp(&b.1.used)).map(|(key, _)| key.clone())
            {
                things.remove(&oldest);
            }
        }
        conflicts
    }

    /// Says that a run still uses what it has.
    pub(super) fn touch(&mut self, run: &str, now: f64) {
        for owned in self.things.values_mut().flat_map(BTreeMap::values_mut).filter(|owned| owned.run == run) {
            owned.used = owned.used.max(now);
        }
    }

    fn conflict(&self, by: &Claimant<'_>, claim: &Claim) -> Option<Conflict> {
        let things = self.things.get(&claim.kind)?;
        // A mount can give the same directory two paths.
        let elsewhere = |(key, owned): (&String, &Owned)| {
            let file = claim.file?;
            let same = owned.file.is_some_and(|old| file.is(old)) && (by.stands)(key).is_some_and(|now| file.is(now));
            same.then_some(owned.clone())
        };
        let owned = things.get(&claim.key).cloned().or_else(|| things.iter().find_map(elsewhere))?;
        // Wiped and made again since its owner was last seen: only the name is the same. Layers of a container's root copy a
        // directory when it is first written to, and it looks new then; but that is while its owner is there.
        let anew = claim.file.and_then(|file| file.made).is_some_and(|made| made > owned.used) && !(by.lives)(&owned.run);
        (owned.owner != by.owner && !anew).then(|| Conflict {
            kind: claim.kind,
            key: claim.key.clone(),
            owner: owned.owner,
            fresh: true,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn dir(key: &str, inode: u64, made: f64) -> Claim {
        Claim { kind: Shared::Cwd, key: key.to_owned(), file: Some(Identity { device: 1, inode, made: Some(made) }) }
    }

    fn session(id: &str) -> Claim {
        Claim { kind: Shared::Session, key: id.to_owned(), file: None }
    }

    /// Whose the things are that a tenant wants.
    fn owners(book: &mut Book, owner: &str, now: f64, claims: &[Claim], alive: bool) -> Vec<String> {
        let lives = |_: &str| alive;
        let stands = |path: &str| (path != "/gone").then_some((1, path.len() as u64));
        let by = Claimant { owner, run: owner, now, lives: &lives, stands: &stands };
        book.claim(&by, claims, false).into_iter().map(|conflict| format!("{} {}", conflict.key, conflict.owner)).collect()
    }

    #[test]
    fn it_is_his_who_used_it_first() {
        let mut book = Book::default();
        let claims = [dir("/a", 2, 0.0), session("s")];
        assert!(owners(&mut book, "acme", 10.0, &claims, false).is_empty());
        assert!(owners(&mut book, "acme", 11.0, &claims, false).is_empty(), "again");
        assert_eq!(owners(&mut book, "globex", 12.0, &claims, false), ["/a acme", "s acme"]);
        assert_eq!(owners(&mut book, "globex", 13.0, &claims, false), ["/a acme", "s acme"], "asking makes nobody an owner");
        assert!(owners(&mut book, "globex", 11.0 + KEPT, &claims, false).is_empty(), "for ever is too long");
    }

    #[test]
    fn the_log_is_told_once() {
        let mut book = Book::default();
        let mut fresh = |owner: &str| {
            let by = Claimant { owner, run: owner, now: 1.0, lives: &|_| false, stands: &|_| None };
            book.claim(&by, &[session("s")], false).iter().map(|conflict| conflict.fresh).collect::<Vec<_>>()
        };
        let said = ["acme", "globex", "globex", "acme", "globex", "initech"].map(&mut fresh);
        assert_eq!(said, [vec![], vec![true], vec![false], vec![], vec![false], vec![true]]);
    }

    #[test]
    fn a_directory_is_known_by_another_name_and_one_made_anew_is_another() {
        let mut book = Book::default();
        owners(&mut book, "acme", 10.0, &[dir("/aaa", 4, 1.0), dir("/gone", 9, 1.0)], false);
        assert_eq!(owners(&mut book, "globex", 11.0, &[dir("/mount", 4, 1.0)], false), ["/mount acme"]);
        assert!(owners(&mut book, "globex", 11.0, &[dir("/new", 9, 1.0)], false).is_empty(), "an inode is used again");
        assert_eq!(owners(&mut book, "globex", 12.0, &[dir("/aaa", 5, 11.0)], true), ["/aaa acme"], "its owner is still there");
        book.touch("acme", 12.0);
        assert_eq!(owners(&mut book, "globex", 13.0, &[dir("/aaa", 5, 11.0)], false), ["/aaa acme"], "made while it was there");
        assert!(owners(&mut book, "globex", 14.0, &[dir("/aaa", 5, 13.0)], false).is_empty());
        assert_eq!(owners(&mut book, "acme", 15.0, &[dir("/aaa", 5, 13.0)], false), ["/aaa globex"], "and now it is his");
    }

    #[test]
    fn who_does_not_get_all_gets_nothing_where_that_is_meant() {
        let mut book = Book::default();
        owners(&mut book, "acme", 1.0, &[session("a")], false);
        let by = Claimant { owner: "globex", run: "g", now: 2.0, lives: &|_| false, stands: &|_| None };
        let before = book.clone();
        assert_eq!(book.claim(&by, &[session("b"), session("a")], true).len(), 1);
        assert_eq!(book, before);
        assert!(owners(&mut book, "initech", 3.0, &[session("b")], false).is_empty());
    }

    proptest! {
        #[test]
        fn nothing_is_ever_two_tenants_where_that_is_enforced(
            starts in proptest::collection::vec((0..4_usize, proptest::collection::btree_set(0..5_u64, 1..4)), 1..60)
        ) {
            let (mut book, mut whose) = (Book::default(), BTreeMap::new());
            for (n, (tenant, things)) in (0_u32..).zip(starts) {
                let claims: Vec<Claim> = things.iter().map(|thing| dir(&format!("/{thing}"), *thing, 0.0)).collect();
                let owner = ["a", "b", "c", "d"][tenant];
                let by = Claimant { owner, run: owner, now: f64::from(n), lives: &|_| false, stands: &|_| None };
                let free = things.iter().all(|thing| whose.get(thing).is_none_or(|known| *known == owner));
                prop_assert_eq!(book.claim(&by, &claims, true).is_empty(), free);
                if free {
                    whose.extend(things.iter().map(|thing| (*thing, owner)));
                }
                book = serde_json::from_slice(&serde_json::to_vec(&book).unwrap()).unwrap();
            }
        }
    }

    #[test]
    fn there_is_no_room_for_ever_more() {
        let mut book = Book::default();
        for n in 0..2 * ENTRIES {
            #[expect(clippy::cast_precision_loss, reason = "small")]
            owners(&mut book, "acme", n as f64, &[session(&n.to_string())], false);
        }
        assert_eq!(book.things[&Shared::Session].len(), ENTRIES);
        assert!(owners(&mut book, "globex", 1e4, &[session("0")], false).is_empty());
        assert_eq!(owners(&mut book, "globex", 1e4, &[session("2047")], false), ["2047 acme"]);
    }
}
