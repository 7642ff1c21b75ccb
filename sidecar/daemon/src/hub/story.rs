//! What happened to a wrapper's agent lately, in a file beside its journal, for whoever serves it to those who ask.
//!
//! It counts nothing: a line that is torn or missing is one that nobody sees. Written like a journal (appended, and begun anew when it
//! has grown), read only when somebody asks, removed with the journal: the hub keeps nothing of it in memory.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use agent_sidecar_core::timeline::Timeline;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::Place;
use crate::files;

/// Of the files.
pub(super) const ENDING: &str = ".timeline";
/// A file may grow to this, and to twice what it began with: a whole timeline is half of it at most.
const LONG: u64 = 128 * 1024;
/// Of one file in one reading: more than one may grow to.
const READ: u64 = 1024 * 1024;

/// See the module's head.
pub(super) struct Story {
    path: PathBuf,
    mode: u32,
    file: Option<File>,
    size: u64,
    first_size: u64,
    told: u64,
}

/// Lines that are not told yet, and the number of the last.
pub(super) struct News {
    lines: Vec<u8>,
    last: u64,
}

impl News {
    pub(super) fn of(timeline: &Timeline, after: u64) -> News {
        let mut lines = Vec::new();
        for entry in timeline.after(after) {
            let start = lines.len();
            match serde_json::to_writer(&mut lines, entry) {
                Ok(()) => lines.push(b'\n'),
                Err(_) => lines.truncate(start),
            }
        }
        News { lines, last: timeline.last() }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }
}

pub(super) fn path(dir: &Path, run: &str) -> PathBuf {
    dir.join(format!("{run}{ENDING}"))
}

impl Story {
    pub(super) fn new(place: &Place, run: &str) -> Story {
        Story { path: path(&place.dir, run), mode: place.mode(), file: None, size: 0, first_size: 0, told: 0 }
    }

    /// What is to be told next: what comes after this number.
    pub(super) fn since(&self) -> u64 {
        if self.file.is_none() || self.size > LONG.max(2 * self.first_size) { 0 } else { self.told }
    }

    pub(super) fn tell(&mut self, news: &News) -> io::Result<()> {
        if news.is_empty() {
            return Ok(());
        }
        let written = match self.file.as_mut().filter(|_| self.told > 0 && self.size <= LONG.max(2 * self.first_size)) {
            Some(file) => file.write_all(&news.lines),
            None => self.begin(&news.lines),
        };
        match &written {
            Ok(()) => {
                self.size += news.lines.len() as u64;
                self.told = news.last;
            }
            // All of it again, when there is something new.
            Err(_) => self.file = None,
        }
        written
    }

    fn begin(&mut self, bytes: &[u8]) -> io::Result<()> {
        let new = self.path.with_extension("timeline.tmp");
        let mut file = files::open(&new, OpenOptions::new().write(true).create(true).truncate(true).mode(0o600))?;
        let mode = fs::Permissions::from_mode(self.mode);
        let written = file.set_permissions(mode).and_then(|()| file.write_all(bytes)).and_then(|()| fs::rename(&new, &self.path));
        if written.is_err() {
            fs::remove_file(&new).ok();
        }
        written?;
        self.file = Some(file);
        self.size = 0;
        self.first_size = bytes.len() as u64;
        Ok(())
    }
}

/// The entries after a number, as JSON, one after the other.
pub(super) fn read(dir: &Path, run: &str, after: u64, owner: Option<u32>) -> io::Result<String> {
    let file = files::open(&path(dir, run), OpenOptions::new().read(true))?;
    files::check_owner(&file, owner)?;
    let mut bytes = Vec::new();
    file.take(READ).read_to_end(&mut bytes)?;
    // What is torn is no JSON.
    let lines = bytes.split(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice::<&RawValue>(line).ok());
    Ok(join(lines, after))
}

/// The same of a list of them.
pub(super) fn since(list: &str, after: u64) -> String {
    let list: Vec<&RawValue> = serde_json::from_str(list).unwrap_or_default();
    join(list.into_iter(), after)
}

/// The session that a list of entries tells of last.
pub(super) fn session(entries: &str) -> Option<String> {
    #[derive(Deserialize)]
    struct Named {
        session_id: Option<String>,
    }
    let named: Vec<Named> = serde_json::from_str(&format!("[{entries}]")).ok()?;
    named.into_iter().rev().find_map(|entry| entry.session_id)
}

fn join<'a>(entries: impl Iterator<Item = &'a RawValue>, after: u64) -> String {
    #[derive(Deserialize)]
    struct Numbered {
        n: u64,
    }
    let new = entries.filter(|raw| serde_json::from_str::<Numbered>(raw.get()).is_ok_and(|entry| entry.n > after));
    new.map(RawValue::get).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use agent_sidecar_core::price::PriceTable;
    use agent_sidecar_core::update::Update;

    use super::*;

    #[test]
    fn it_grows_is_begun_anew_and_a_torn_line_is_none() {
        let dir = std::env::temp_dir().join(format!("agent-sidecar-story-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let (mut story, mut timeline, mut longest) =
            (Story { path: path(&dir, "a"), mode: 0o600, file: None, size: 0, first_size: 0, told: 0 }, Timeline::default(), 0);
        for turn in 1..=5_000 {
            let started = Update::TurnStarted { session: String::from("s"), turn };
            timeline.on(&started, &PriceTable::default(), Duration::from_secs(turn));
            story.tell(&News::of(&timeline, story.since())).unwrap();
            longest = longest.max(fs::metadata(path(&dir, "a")).unwrap().len());
        }
        assert!(longest < LONG + 1_024, "{longest}");
        let read = |after| -> Vec<u64> {
            let entries: serde_json::Value =
                serde_json::from_str(&format!("[{}]", read(&dir, "a", after, None).unwrap())).unwrap();
            entries.as_array().unwrap().iter().map(|entry| entry["n"].as_u64().unwrap()).collect()
        };
        let all = read(0);
        assert!(all.len() >= 500 && all.is_sorted() && all.last() == Some(&5_000), "{all:?}");
        assert_eq!(read(4_998), [4_999, 5_000]);
        let mut bytes = fs::read(path(&dir, "a")).unwrap();
        bytes.truncate(bytes.len() - 3);
        fs::write(path(&dir, "a"), bytes).unwrap();
        assert_eq!(read(4_998), [4_999]);
        fs::remove_dir_all(dir).unwrap();
    }
}
