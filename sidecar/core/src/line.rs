//! Bytes in any chunking become lines, in bounded memory however long a line is.
//!
//! A line of JSON that grows long is *shortened* while it comes: of a string longer than [`KEEP`] only the beginning, the length
//! and a hash are kept, so that a tool's output of a hundred megabytes becomes a kilobyte of the same JSON. What is cut is content, which nothing
//! here reads. A long line that is a list of objects (a whole session as `json`) is handed out element by element.

use memchr::{memchr, memchr2};

use crate::hash::Hash;

/// Lines longer than this are shortened. The CLI's longest structural lines (`initialize` answers) stay below it.
const SHORTEN_FROM: usize = 64 * 1024;
/// What is kept of a long string: more than any id or name has.
const KEEP: usize = 512;
/// The longest line that is kept, after shortening. What is longer is no message of any CLI.
pub const MAX_LINE: usize = 1024 * 1024;

/// A line, without its newline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Line<'a> {
    Whole(&'a [u8]),
    /// The stream ended inside it.
    Unterminated(&'a [u8]),
    /// It was longer than [`MAX_LINE`] even when shortened, and is gone.
    TooLong,
}

/// See the module's head.
#[derive(Debug, Default)]
pub struct Splitter {
    /// The line so far; empty between lines.
    partial: Vec<u8>,
    /// How the line goes on, once it is being shortened.
    shortening: Option<Shortener>,
    too_long: bool,
}

impl Splitter {
    /// Hands out every line that `chunk` completes. A line inside the chunk is not copied, unless it is to be shortened: how a line
    /// reads must not depend on where chunks end.
    pub fn push(&mut self, mut chunk: &[u8], take: &mut impl FnMut(Line<'_>)) {
        while let Some(end) = memchr(b'\n', chunk) {
            let (head, rest) = (&chunk[..end], &chunk[end + 1..]);
            if self.partial.is_empty() && !self.too_long && head.len() <= SHORTEN_FROM {
                give(head, take);
            } else {
                self.extend(head, take);
                if std::mem::take(&mut self.too_long) {
                    take(Line::TooLong);
                } else {
                    give(&self.partial, take);
                }
                self.clear();
            }
            chunk = rest;
        }
        self.extend(chunk, take);
    }

    /// The stream ended: what is left is a line without its newline.
    pub fn finish(&mut self, take: &mut impl FnMut(Line<'_>)) {
        if std::mem::take(&mut self.too_long) {
            take(Line::TooLong);
        } else if !trim(&self.partial).is_empty() {
            take(Line::Unterminated(trim(&self.partial)));
        }
        self.clear();
    }

    /// Bytes that are held.
    pub fn held(&self) -> usize {
        self.partial.capacity()
    }

    fn clear(&mut self) {
        self.shortening = None;
        self.partial.clear();
        // The room that one long line took is not kept for ever.
        self.partial.shrink_to(SHORTEN_FROM);
    }

    fn extend(&mut self, bytes: &[u8], take: &mut impl FnMut(Line<'_>)) {
        if self.too_long {
            return;
        }
        match &mut self.shortening {
            Some(shortener) => shortener.feed(bytes, &mut self.partial, take),
            None if self.partial.len() + bytes.len() <= SHORTEN_FROM => self.partial.extend_from_slice(bytes),
            None => {
                let whole = std::mem::take(&mut self.partial);
                let mut start = whole.iter().chain(bytes).filter(|byte| !byte.is_ascii_whitespace());
                let list = start.next() == Some(&b'[') && start.next() == Some(&b'{');
                let mut shortener = Shortener { list, ..Shortener::default() };
                shortener.feed(&whole, &mut self.partial, take);
                shortener.feed(bytes, &mut self.partial, take);
                self.shortening = Some(shortener);
            }
        }
        if self.partial.len() > MAX_LINE {
            self.too_long = true;
            self.clear();
        }
    }
}

fn give(line: &[u8], take: &mut impl FnMut(Line<'_>)) {
    let line = trim(line);
    if !line.is_empty() {
        take(Line::Whole(line));
    }
}

/// Without the carriage return that a foreign line end leaves, and without blanks around it.
fn trim(line: &[u8]) -> &[u8] {
    line.trim_ascii()
}

/// Where in a JSON text the next byte stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum At {
    #[default]
    Outside,
    /// In a string of which this much has been kept.
    String(usize),
    /// Behind its backslash.
    Escape(usize),
    /// Before its last so many hexadecimal digits.
    Unicode(usize, u8),
    /// In what is dropped of a string, this much so far, up to its closing quote.
    Dropped(usize),
    DroppedEscape(usize),
}

#[derive(Debug, Default)]
struct Shortener {
    at: At,
    /// Of what is dropped of a string.
    dropped: Hash,
    /// The line is a list of objects, of which each is a line of its own.
    list: bool,
    /// How many brackets are open, in a list.
    depth: usize,
    /// The element is too long, even shortened.
    lost: bool,
}

impl Shortener {
    fn feed(&mut self, mut bytes: &[u8], out: &mut Vec<u8>, take: &mut impl FnMut(Line<'_>)) {
        while let Some(&byte) = bytes.first() {
            let mut used = 1;
            match self.at {
                At::Outside => {
                    used = memchr(b'"', bytes).map_or(bytes.len(), |quote| quote + 1);
                    if self.list {
                        self.structure(&bytes[..used], out, take);
                    } else {
                        out.extend_from_slice(&bytes[..used]);
                    }
                    if bytes[used - 1] == b'"' {
                        self.at = At::String(0);
                    }
                }
                At::String(kept) if kept < KEEP && byte != b'"' && byte != b'\\' => {
                    let room = &bytes[..bytes.len().min(KEEP - kept)];
                    used = memchr2(b'"', b'\\', room).unwrap_or(room.len());
                    out.extend_from_slice(&bytes[..used]);
                    self.at = At::String(kept + used);
                }
                // Only between characters: a continuation byte belongs to the one before, and so does half a surrogate pair.
                At::String(kept) if kept >= KEEP && byte != b'"' && byte & 0xC0 != 0x80 && !(byte == b'\\' && half_pair(out)) => {
                    used = 0;
                    (self.at, self.dropped) = (At::Dropped(0), Hash::default());
                }
                At::String(kept) => {
                    out.push(byte);
                    self.at = match byte {
                        b'"' => At::Outside,
                        b'\\' => At::Escape(kept + 1),
                        _ => At::String(kept + 1),
                    };
                }
                At::Escape(kept) => {
                    out.push(byte);
                    self.at = if byte == b'u' { At::Unicode(kept + 1, 4) } else { At::String(kept + 1) };
                }
                At::Unicode(kept, left) => {
                    out.push(byte);
                    self.at = if left > 1 { At::Unicode(kept + 1, left - 1) } else { At::String(kept + 1) };
                }
                At::Dropped(dropped) => {
                    let (end, next) = rest_of_string(bytes);
                    // In one piece: there is much of it.
                    self.dropped.put(&bytes[..end]);
                    (used, self.at) = match next {
                        At::Outside => {
                            // Two calls whose inputs only begin alike are not taken for the same one.
                            let hash = self.dropped.finish();
                            out.extend_from_slice(format!("…+{} {hash:016x}\"", dropped + end).as_bytes());
                            (end + 1, At::Outside)
                        }
                        At::DroppedEscape(_) => (end, At::DroppedEscape(dropped + end)),
                        _ => (end, At::Dropped(dropped + end)),
                    };
                }
                At::DroppedEscape(dropped) => {
                    self.dropped.put(&bytes[..1]);
                    self.at = At::Dropped(dropped + 1);
                }
            }
            self.bound(out);
            bytes = &bytes[used..];
        }
    }

    /// What stands between two strings of a list: its own brackets and commas end elements and are no part of them.
    fn structure(&mut self, bytes: &[u8], out: &mut Vec<u8>, take: &mut impl FnMut(Line<'_>)) {
        for &byte in bytes {
            match (byte, self.depth) {
                (b'[', 0) => {
                    self.depth = 1;
                    continue;
                }
                (b',' | b']', 1) => {
                    if std::mem::take(&mut self.lost) {
                        take(Line::TooLong);
                    } else {
                        give(out, take);
                    }
                    out.clear();
                    self.depth = usize::from(byte == b',');
                    continue;
                }
                (b'[' | b'{', depth) => self.depth = depth + 1,
                (b']' | b'}', depth) => self.depth = depth.saturating_sub(1),
                _ => {}
            }
            out.push(byte);
            self.bound(out);
        }
    }

    /// An element that is too long does not cost the list.
    fn bound(&mut self, out: &mut Vec<u8>) {
        if self.list && out.len() > MAX_LINE {
            out.clear();
            self.lost = true;
        }
    }
}

/// What is left of a string that was shortened, and how many bytes are not; nothing of one that is whole.
pub(crate) fn shortened(text: &str) -> Option<(&str, &str)> {
    let (kept, rest) = text.rsplit_once("…+")?;
    let (bytes, hash) = rest.split_once(' ')?;
    let ours =
        bytes.bytes().all(|byte| byte.is_ascii_digit()) && hash.len() == 16 && hash.bytes().all(|byte| byte.is_ascii_hexdigit());
    ours.then_some((kept, bytes))
}

/// How much of the bytes is in the string that they begin in, and where that leaves us.
fn rest_of_string(bytes: &[u8]) -> (usize, At) {
    let mut at = 0;
    while let Some(found) = memchr2(b'"', b'\\', &bytes[at..]) {
        at += found;
        if bytes[at] == b'"' {
            return (at, At::Outside);
        }
        if at + 1 == bytes.len() {
            return (bytes.len(), At::DroppedEscape(0));
        }
        at += 2;
    }
    (bytes.len(), At::Dropped(0))
}

/// Whether the text so far ends in an escaped high surrogate, whose other half is still to come.
fn half_pair(out: &[u8]) -> bool {
    matches!(out, [.., b'\\', b'u', b'd' | b'D', b'8' | b'9' | b'a' | b'b' | b'A' | b'B', _, _])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn lines(chunks: &[&[u8]]) -> Vec<Vec<u8>> {
        let mut splitter = Splitter::default();
        let mut lines = Vec::new();
        let mut take = |line: Line<'_>| match line {
            Line::Whole(bytes) | Line::Unterminated(bytes) => lines.push(bytes.to_vec()),
            Line::TooLong => lines.push(b"too long".to_vec()),
        };
        for chunk in chunks {
            splitter.push(chunk, &mut take);
        }
        splitter.finish(&mut take);
        assert!(splitter.held() <= SHORTEN_FROM, "{} bytes held", splitter.held());
        lines
    }

    #[test]
    fn a_long_line_keeps_its_structure_in_little_room() {
        let long = "x\\\"é".repeat(10_000_000);
        let text = format!("{{\"type\":\"user\",\"content\":[{{\"text\":\"{long}\",\"is_error\":true}}],\"n\":17}}\n");
        let mut splitter = Splitter::default();
        let mut seen = Vec::new();
        for chunk in text.as_bytes().chunks(65_536) {
            splitter.push(chunk, &mut |line| match line {
                Line::Whole(bytes) => seen = bytes.to_vec(),
                other => panic!("{other:?}"),
            });
            assert!(splitter.held() <= 2 * SHORTEN_FROM);
        }
        let value: serde_json::Value = serde_json::from_slice(&seen).unwrap();
        assert_eq!(value["n"], 17);
        assert_eq!(value["content"][0]["is_error"], true);
        assert!(seen.len() < 2 * KEEP, "{} bytes", seen.len());
    }

    #[test]
    fn a_pair_of_surrogates_is_not_torn_apart() {
        for lead in 0..12 {
            let text = format!("{{\"a\":\"{}{}\"}}", "x".repeat(KEEP - lead), "\\ud83d\\ude00".repeat(20));
            let (mut shortener, mut out) = (Shortener::default(), Vec::new());
            shortener.feed(text.as_bytes(), &mut out, &mut |_| ());
            serde_json::from_slice::<serde_json::Value>(&out).unwrap();
        }
    }

    #[test]
    fn what_cannot_be_shortened_is_dropped_and_the_next_line_is_not() {
        let numbers = "1,".repeat(MAX_LINE);
        let text = format!("[{numbers}1]\n{{\"a\":1}}\n");
        for size in [1_000, 65_536, text.len()] {
            let chunks: Vec<&[u8]> = text.as_bytes().chunks(size).collect();
            assert_eq!(lines(&chunks), [b"too long".to_vec(), b"{\"a\":1}".to_vec()], "chunks of {size}");
        }
    }

    #[test]
    fn inputs_that_only_begin_alike_stay_different() {
        let line = |n: usize| format!("{{\"a\":\"{}\"}}\n", "x".repeat(SHORTEN_FROM + n));
        let of = |n| lines(&[line(n).as_bytes()]);
        assert_ne!(of(1), of(2));
        assert_eq!(of(1), lines(&line(1).as_bytes().chunks(777).collect::<Vec<_>>()));
    }

    #[test]
    fn a_long_list_is_as_many_lines() {
        let long = "y".repeat(3_000);
        let some = ["{\"a\":[1,{\"b\":\"],[\\\"\"}]}".to_owned(), "{}".to_owned(), format!("{{\"c\":\"{long}\"}}")];
        let numbers = format!("{{\"d\":[{}1]}}", "1,".repeat(MAX_LINE));
        let elements: Vec<&str> = some.iter().cycle().take(100).chain([&numbers]).chain(&some).map(String::as_str).collect();
        let hash = Hash::of(&long.as_bytes()[KEEP..]);
        let short = format!("{{\"c\":\"{}…+{} {hash:016x}\"}}", &long[KEEP..][..KEEP], long.len() - KEEP);
        let expected: Vec<&[u8]> = elements
            .iter()
            .map(|element| {
                if *element == some[2] {
                    &*short
                } else if *element == numbers {
                    "too long"
                } else {
                    *element
                }
            })
            .map(str::as_bytes)
            .collect();
        for text in [format!("[{}]", elements.join(",")), format!(" [ {} ]\r\n", elements.join(" , "))] {
            for size in [1, 7, 1_000, 65_536, text.len()] {
                let chunks: Vec<&[u8]> = text.as_bytes().chunks(size).collect();
                assert_eq!(lines(&chunks), expected, "chunks of {size}");
            }
        }
        // One that is cut off ends in what there is of its last element.
        let text = format!("[{},{{\"a\":", elements[..100].join(","));
        let cut = lines(&[text.as_bytes()]);
        assert_eq!((cut.len(), cut.last().unwrap().as_slice()), (101, &b"{\"a\":"[..]));
    }

    proptest! {
        #[test]
        fn any_chunking_gives_the_same_lines(text in proptest::collection::vec(any::<u8>(), 0..2_000), cuts in proptest::collection::vec(1usize..200, 1..40)) {
            let expected: Vec<Vec<u8>> = text.split(|b| *b == b'\n').map(|line| trim(line).to_vec()).filter(|line| !line.is_empty()).collect();
            let (mut chunks, mut rest, mut cuts) = (Vec::new(), &text[..], cuts.into_iter().cycle());
            while !rest.is_empty() {
                let (head, tail) = rest.split_at(cuts.next().unwrap_or(1).min(rest.len()));
                chunks.push(head);
                rest = tail;
            }
            prop_assert_eq!(lines(&chunks), expected);
        }

        #[test]
        fn shortening_keeps_json_json(strings in proptest::collection::vec("(?s).{0,900}", 1..6), cut in 1usize..700) {
            let value = serde_json::json!({ "a": strings, "n": [1, 2.5, null, true], "b": { "c": strings[0] } });
            let text = serde_json::to_vec(&value).unwrap();
            let (mut shortener, mut out) = (Shortener::default(), Vec::new());
            for chunk in text.chunks(cut) {
                shortener.feed(chunk, &mut out, &mut |_| ());
            }
            let short: serde_json::Value = serde_json::from_slice(&out).unwrap();
            prop_assert_eq!(&short["n"], &value["n"]);
            for (short, long) in short["a"].as_array().unwrap().iter().zip(&strings) {
                let short = short.as_str().unwrap();
                let kept = short.rsplit_once("…+").filter(|_| short != long).map_or(short, |(kept, _)| kept);
                prop_assert!(long.starts_with(kept) && kept.len() >= long.len().min(KEEP / 6));
            }
        }
    }
}
