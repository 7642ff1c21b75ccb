//! Reads ledger files, each line once: what a copy repeats is known by the run that wrote it and its number. What is damaged, or missing
//! from a run's numbers, is counted, so that whoever sums money knows how far to trust the sum.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use agent_sidecar_core::record::Record;

/// No line of ours is nearly as long: a longer one is damaged, and is not kept in memory.
const LONGEST: u64 = 1024 * 1024;
/// How every line begins: where one is glued to what was left of another.
const BEGINS: &[u8] = b"{\"time\":";
/// Damaged lines that are told one by one.
const TOLD: u64 = 10;

/// A file that cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("cannot read {}; name a ledger file, a directory of them, or - for standard input", path.display())]
pub(crate) struct Unreadable {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// See the module's head.
#[derive(Debug, Default)]
pub(crate) struct Books {
    runs: HashMap<Box<str>, Seen>,
    pub(crate) lines: u64,
    pub(crate) damaged: u64,
    pub(crate) repeated: u64,
}

/// The numbers of a run that were seen, as ranges: one, in a ledger that is whole.
#[derive(Debug, Default)]
struct Seen(Vec<(u64, u64)>);

impl Seen {
    /// Whether it is new.
    fn insert(&mut self, n: u64) -> bool {
        let at = self.0.partition_point(|(_, last)| *last < n);
        if self.0.get(at).is_some_and(|(first, _)| *first <= n) {
            return false;
        }
        let before = at.checked_sub(1).filter(|at| self.0[*at].1 + 1 == n);
        let after = self.0.get(at).is_some_and(|(first, _)| Some(*first) == n.checked_add(1));
        match (before, after) {
            (Some(before), true) => {
                self.0[before].1 = self.0[at].1;
                self.0.remove(at);
            }
            (Some(before), false) => self.0[before].1 = n,
            (None, true) => self.0[at].0 = n,
            (None, false) => self.0.insert(at, (n, n)),
        }
        true
    }

    /// Numbers below the last one that were not seen.
    fn missing(&self) -> u64 {
        let seen: u64 = self.0.iter().map(|(first, last)| last - first + 1).sum();
        self.0.last().map_or(0, |(_, last)| (last + 1).saturating_sub(seen))
    }
}

impl Books {
    /// Hands out each line of these files; of a directory, those of the files in it that are called `….jsonl…`, in order.
    pub(crate) fn read(&mut self, paths: &[PathBuf], mut take: impl FnMut(&Record)) -> Result<(), Unreadable> {
        for path in paths {
            let failed = |source| Unreadable { path: path.clone(), source };
            for file in files(path).map_err(failed)? {
                self.read_file(&file, &mut take).map_err(|source| Unreadable { path: file.clone(), source })?;
            }
        }
        Ok(())
    }

    /// Lines that a run has numbered and that are in no file: a disk was full, or a file is not among them.
    pub(crate) fn missing(&self) -> u64 {
        self.runs.values().map(Seen::missing).sum()
    }

    /// Says what was not right, to whoever sums.
    pub(crate) fn say(&self) {
        let (damaged, repeated, missing) = (self.damaged, self.repeated, self.missing());
        if damaged > 0 {
            tracing::warn!(damaged, "lines that are none of a ledger were left out");
        }
        if repeated > 0 {
            tracing::warn!(repeated, "lines that were read already were left out");
        }
        if missing > 0 {
            tracing::warn!(missing, "lines that were written are in none of these files: what they said is in no sum");
        }
    }

    fn read_file(&mut self, path: &Path, take: &mut impl FnMut(&Record)) -> io::Result<()> {
        let mut file = BufReader::with_capacity(256 * 1024, open(path)?);
        let mut line = Vec::new();
        for n in 1_u64.. {
            line.clear();
            if file.by_ref().take(LONGEST).read_until(b'\n', &mut line)? == 0 {
                break;
            }
            if line.len() as u64 == LONGEST && line.last() != Some(&b'\n') {
                skip_line(&mut file)?;
                self.damaged(path, n, &"it is too long");
                continue;
            }
            if line.trim_ascii().is_empty() {
                continue;
            }
            match serde_json::from_slice::<Record>(&line) {
                Ok(record) => self.line(&record, take),
                Err(error) => {
                    self.damaged(path, n, &error);
                    // A line that was written in part, by a machine that lost power, and behind it the next one.
                    let whole = memchr::memmem::rfind(&line, BEGINS).filter(|at| *at > 0);
                    if let Some(record) = whole.and_then(|at| serde_json::from_slice::<Record>(&line[at..]).ok()) {
                        self.line(&record, take);
                    }
                }
            }
        }
        Ok(())
    }

    fn line(&mut self, record: &Record, take: &mut impl FnMut(&Record)) {
        let new = match self.runs.get_mut(record.run.as_str()) {
            Some(seen) => seen.insert(record.seq),
            None => self.runs.entry(record.run.as_str().into()).or_default().insert(record.seq),
        };
        if new {
            self.lines += 1;
            take(record);
        } else {
            self.repeated += 1;
        }
    }

    fn damaged(&mut self, path: &Path, n: u64, error: &dyn std::fmt::Display) {
        self.damaged += 1;
        if self.damaged <= TOLD {
            tracing::warn!(file = %path.display(), line = n, %error, "not a line of a ledger: left out");
        }
    }
}

fn files(path: &Path) -> io::Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let mut files = Vec::new();
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().contains(".jsonl") && entry.path().is_file() {
            files.push(entry.path());
        }
    }
    files.sort();
    Ok(files)
}

fn open(path: &Path) -> io::Result<Box<dyn Read>> {
    if path == Path::new("-") { Ok(Box::new(io::stdin())) } else { Ok(Box::new(File::open(path)?)) }
}

fn skip_line(file: &mut impl BufRead) -> io::Result<()> {
    loop {
        let bytes = file.fill_buf()?;
        let (n, over) = match memchr::memchr(b'\n', bytes) {
            Some(at) => (at + 1, true),
            None => (bytes.len(), bytes.is_empty()),
        };
        file.consume(n);
        if over {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_new_once_in_any_order_and_gaps_are_known() {
        let mut seen = Seen::default();
        let new: Vec<bool> = [0, 1, 1, 5, 3, 4, 3, 2, 9].into_iter().map(|n| seen.insert(n)).collect();
        assert_eq!(new, [true, true, false, true, true, true, false, true, true]);
        assert_eq!((seen.0.as_slice(), seen.missing()), ([(0, 5), (9, 9)].as_slice(), 3));
        assert!(seen.insert(u64::MAX - 1));
    }
}
