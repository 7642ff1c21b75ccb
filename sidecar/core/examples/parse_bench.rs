//! How fast lines become messages, beside `serde_json::Value` on the same bytes in the same run.
//!
//! `cargo run --release -p agent-sidecar-core --example parse_bench -- FILES…`, where FILES are recorded stdouts of the CLI. Their
//! lines are repeated with ids of their own until a corpus is large enough; rounds of the two are interleaved, medians are printed.

#![expect(clippy::disallowed_methods, clippy::print_stdout, reason = "a bench reads a clock and prints")]

use std::hint::black_box;
use std::io::Write as _;
use std::time::{Duration, Instant};

use agent_sidecar_core::event::claude_code::{parse_array, parse_stdout};
use agent_sidecar_core::line::{Line, Splitter};

/// Large enough to leave the caches, small enough for a round in a fraction of a second.
const CORPUS: usize = 16 << 20;
/// What the relay reads at once.
const CHUNK: usize = 64 * 1024;
const ROUNDS: usize = 9;

fn main() {
    let mut lines: Vec<Vec<u8>> = Vec::new();
    for file in std::env::args().skip(1) {
        let text = std::fs::read(&file).unwrap_or_else(|error| panic!("cannot read {file}: {error}"));
        lines.extend(text.split(|b| *b == b'\n').filter(|line| line.first() == Some(&b'{')).map(<[u8]>::to_vec));
    }
    // A stream that was cut off ends inside a line.
    lines.retain(|line| serde_json::from_slice::<serde_json::Value>(line).is_ok());
    assert!(!lines.is_empty(), "give recorded stdouts as arguments");
    let has = |line: &[u8], what: &[u8]| memchr::memmem::find(line, what).is_some();
    // Session mirrors are rare and carry whole prompts: they would be most of the bytes.
    lines.retain(|line| !has(line, b"\"transcript_mirror\""));
    let delta: Vec<_> = lines.iter().filter(|line| has(line, b"\"content_block_delta\"")).cloned().collect();
    let results: Vec<_> = lines.iter().filter(|line| has(line, b"\"tool_use_result\"")).cloned().collect();
    println!(
        "{:>8} {:>8} {:>9} {:>10} {:>10} {:>10} {:>10} {:>7}",
        "corpus", "lines", "avg B", "ours MB/s", "ns/line", "Value MB/s", "ns/line", "ratio"
    );
    row("delta", &repeated(&delta));
    row("heavy", &repeated(&results.iter().map(|line| enlarged(line, 6 << 10)).collect::<Vec<_>>()));
    row("mix", &repeated(&lines));
    row("huge", &enlarged_all(&results));
}

/// The lines over and over, each with ids of its own.
fn repeated(lines: &[Vec<u8>]) -> Vec<u8> {
    let mut corpus = Vec::with_capacity(CORPUS + (1 << 20));
    for (n, line) in (0u32..).zip(lines.iter().cycle()) {
        let at = corpus.len();
        corpus.extend_from_slice(line);
        for key in [&b"\"uuid\":\""[..], b"\"session_id\":\"", b"\"api_message_id\":\"msg_", b"\"id\":\"msg_"] {
            let found = memchr::memmem::find(&corpus[at..], key).map(|found| at + found + key.len());
            if let Some(id) = found.and_then(|id| corpus.get_mut(id..id + 8)) {
                (&mut *id).write_all(format!("{n:08x}").as_bytes()).expect("the room was measured");
            }
        }
        corpus.push(b'\n');
        if corpus.len() >= CORPUS {
            return corpus;
        }
    }
    corpus
}

/// A tool's result with this much more of a program's text in it, as the CLI says it: twice.
fn enlarged(line: &[u8], bytes: usize) -> Vec<u8> {
    let text =
        "    if let Some(\\\"x\\\") = next {\\n        return Err(Error::new(\\\"no é\\\"));\\n    }\\n".repeat(bytes / 80);
    let mut line = String::from_utf8(line.to_vec()).expect("recordings are UTF-8");
    for key in ["\"content\":\"", "\"stdout\":\""] {
        if let Some(at) = line.find(key) {
            line.insert_str(at + key.len(), &text);
        }
    }
    line.into_bytes()
}

fn enlarged_all(results: &[Vec<u8>]) -> Vec<u8> {
    let sizes = [10 << 20, 25 << 20];
    results.iter().zip(sizes).flat_map(|(line, size)| [enlarged(line, size), b"\n".to_vec()].concat()).collect()
}

fn ours(corpus: &[u8]) -> usize {
    let (mut splitter, mut read) = (Splitter::default(), 0);
    let mut take = |line: Line<'_>| {
        if let Line::Whole(bytes) | Line::Unterminated(bytes) = line {
            read += match bytes.first() {
                Some(b'[') => parse_array(bytes).map_or(0, |messages| messages.len()),
                _ => usize::from(black_box(parse_stdout(bytes)).is_ok()),
            };
        }
    };
    for chunk in corpus.chunks(CHUNK) {
        splitter.push(chunk, &mut take);
    }
    splitter.finish(&mut take);
    read
}

fn value(corpus: &[u8]) -> usize {
    let (mut start, mut read) = (0, 0);
    for end in memchr::memchr_iter(b'\n', corpus) {
        read += usize::from(black_box(serde_json::from_slice::<serde_json::Value>(&corpus[start..end])).is_ok());
        start = end + 1;
    }
    read
}

fn row(name: &str, corpus: &[u8]) {
    let lines = memchr::memchr_iter(b'\n', corpus).count();
    if lines == 0 {
        return;
    }
    let (mut a, mut b) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        for (times, f) in [(&mut a, ours as fn(&[u8]) -> usize), (&mut b, value)] {
            let start = Instant::now();
            let read = f(corpus);
            times.push(start.elapsed());
            assert_eq!(read, lines, "every line is a message");
        }
    }
    let median = |times: &mut Vec<Duration>| {
        times.sort_unstable();
        times[times.len() / 2].as_secs_f64()
    };
    let (a, b) = (median(&mut a), median(&mut b));
    #[expect(clippy::cast_precision_loss, reason = "for people to read")]
    let (bytes, count) = (corpus.len() as f64, lines as f64);
    println!(
        "{name:>8} {lines:>8} {:>9.0} {:>10.0} {:>10.0} {:>10.0} {:>10.0} {:>6.1}x",
        bytes / count,
        bytes / a / 1e6,
        a / count * 1e9,
        bytes / b / 1e6,
        b / count * 1e9,
        b / a
    );
}
