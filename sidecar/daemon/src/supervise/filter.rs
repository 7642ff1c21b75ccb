//! Keeps the answers to our own requests from the app; lets every other byte through as it came.
//!
//! ```text
//!   nothing asked ──expect──► examining lines ──last answer seen, or waited for long enough──► nothing asked
//! ```
//!
//! A line is never changed, only kept back. While nothing was asked nothing is looked at but the last byte.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

use memchr::memmem;

/// An incomplete line is held back no longer than this: our own answers are written in one piece.
const HOLD: Duration = Duration::from_secs(1);

/// Nor when it is longer than this: our own answers have a few kilobytes.
const HOLD_BYTES: usize = 64 * 1024;

/// An answer that takes longer than this reaches the app, which ignores it: both SDKs drop answers to ids that they do not know.
const ANSWER_WAIT: Duration = Duration::from_secs(5);

/// See the module's head. What leaves it is given to `out`, in order.
#[derive(Debug)]
pub(crate) struct Filter {
    /// What the ids of our requests begin with.
    prefix: memmem::Finder<'static>,
    /// Requests without an answer, and until when it is waited for.
    asked: BTreeMap<String, Duration>,
    /// The last byte that came was not the end of a line.
    inside: bool,
    /// The beginning of a line, not yet let through.
    held: Vec<u8>,
    held_until: Duration,
    kept: u64,
}

impl Filter {
    pub(crate) fn new(prefix: &str) -> Self {
        Self {
            prefix: memmem::Finder::new(prefix.as_bytes()).into_owned(),
            asked: BTreeMap::new(),
            inside: false,
            held: Vec::new(),
            held_until: Duration::ZERO,
            kept: 0,
        }
    }

    /// A request of ours is about to be written.
    pub(crate) fn expect(&mut self, request_id: String, now: Duration) {
        self.asked.insert(request_id, now + ANSWER_WAIT);
    }

    /// How many answers were kept from the app.
    pub(crate) fn kept(&self) -> u64 {
        self.kept
    }

    pub(crate) fn push(&mut self, now: Duration, chunk: &[u8], mut out: impl FnMut(&[u8])) {
        let Some(&last) = chunk.last() else { return };
        let mut let_through = 0..0;
        let mut at = 0;
        while !self.asked.is_empty() && at < chunk.len() {
            let end = memchr::memchr(b'\n', &chunk[at..]).map(|n| at + n + 1);
            // The rest of a line whose beginning went through, or was never looked at.
            if self.inside && self.held.is_empty() {
                let Some(end) = end else { break };
                self.inside = false;
                let_through.end = end;
                at = end;
                continue;
            }
            let Some(end) = end else {
                self.hold(now, chunk, at, &mut let_through, &mut out);
                at = chunk.len();
                break;
            };
            self.inside = false;
            if self.held.is_empty() {
                if self.is_ours(&chunk[at..end]) {
                    emit(chunk, let_through, &mut out);
                    let_through = end..end;
                } else {
                    let_through.end = end;
                }
            } else {
                let mut line = std::mem::take(&mut self.held);
                line.extend_from_slice(&chunk[at..end]);
                if !self.is_ours(&line) {
                    out(&line);
                }
                let_through = end..end;
            }
            at = end;
        }
        if at < chunk.len() {
            // Nothing is asked (any more), or a line goes on that is let through.
            let_through.end = chunk.len();
        }
        emit(chunk, let_through, &mut out);
        self.inside = last != b'\n';
    }

    /// Holds `chunk[at..]`, the beginning of a line, unless it is too long by now.
    fn hold(&mut self, now: Duration, chunk: &[u8], at: usize, through: &mut Range<usize>, out: &mut impl FnMut(&[u8])) {
        let rest = &chunk[at..];
        if self.held.len() + rest.len() > HOLD_BYTES {
            // What is held is older than this chunk, so nothing of the chunk was let through yet when there is any.
            if !self.held.is_empty() {
                out(&std::mem::take(&mut self.held));
            }
            through.end = chunk.len();
            return;
        }
        emit(chunk, std::mem::replace(through, chunk.len()..chunk.len()), out);
        if self.held.is_empty() {
            self.held_until = now + HOLD;
        }
        self.held.extend_from_slice(rest);
    }

    /// When [`Self::tick`] is due.
    pub(crate) fn deadline(&self) -> Option<Duration> {
        let held = (!self.held.is_empty()).then_some(self.held_until);
        held.into_iter().chain(self.asked.values().copied()).min()
    }

    /// Lets go of what was waited for too long.
    pub(crate) fn tick(&mut self, now: Duration, mut out: impl FnMut(&[u8])) {
        self.asked.retain(|_, until| now < *until);
        if !self.held.is_empty() && (self.asked.is_empty() || self.held_until <= now) {
            out(&std::mem::take(&mut self.held));
        }
    }

    /// The stream ended: lets go of everything.
    pub(crate) fn finish(&mut self, mut out: impl FnMut(&[u8])) {
        self.asked.clear();
        if !self.held.is_empty() {
            out(&std::mem::take(&mut self.held));
        }
    }

    fn is_ours(&mut self, line: &[u8]) -> bool {
        // Nearly always the end of it: the prefix has a nonce.
        if self.prefix.find(line).is_none() {
            return false;
        }
        #[derive(serde::Deserialize)]
        struct Answer<'a> {
            #[serde(rename = "type", borrow)]
            kind: std::borrow::Cow<'a, str>,
            #[serde(borrow)]
            response: Response<'a>,
        }
        #[derive(serde::Deserialize)]
        struct Response<'a> {
            #[serde(borrow)]
            request_id: std::borrow::Cow<'a, str>,
        }
        let Ok(answer) = serde_json::from_slice::<Answer<'_>>(line) else { return false };
        if answer.kind != "control_response" || !answer.response.request_id.as_bytes().starts_with(self.prefix.needle()) {
            return false;
        }
        self.asked.remove(answer.response.request_id.as_ref());
        self.kept += 1;
        true
    }
}

fn emit(chunk: &[u8], range: Range<usize>, out: &mut impl FnMut(&[u8])) {
    if !range.is_empty() {
        out(&chunk[range]);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PREFIX: &str = "agent-sidecar:0123456789abcdef:";
    const T0: Duration = Duration::ZERO;

    fn answer(n: usize) -> String {
        format!("{{\"response\":{{\"subtype\":\"success\",\"request_id\":\"{PREFIX}{n}\"}},\"type\":\"control_response\"}}\n")
    }

    fn relayed(filter: &mut Filter, now: Duration, bytes: &[u8]) -> Vec<u8> {
        let mut app = Vec::new();
        filter.push(now, bytes, |b| app.extend_from_slice(b));
        app
    }

    #[test]
    fn an_answer_of_ours_is_kept_and_a_line_that_only_quotes_it_is_not() {
        let mut f = Filter::new(PREFIX);
        f.expect(format!("{PREFIX}1"), T0);
        f.expect(format!("{PREFIX}2"), T0);
        let quote = format!("{{\"type\":\"assistant\",\"text\":\"{PREFIX}1\"}}\n");
        let nested = format!("{{\"type\":\"control_response\",\"response\":{{\"request_id\":\"x\",\"r\":\"{PREFIX}1\"}}}}\n");
        let input = [quote.as_str(), &answer(1), &nested].concat();
        assert_eq!(relayed(&mut f, T0, input.as_bytes()), [quote, nested].concat().into_bytes());
        assert_eq!(f.kept(), 1);
    }

    #[test]
    fn without_a_question_nothing_is_kept() {
        let mut f = Filter::new(PREFIX);
        assert_eq!(relayed(&mut f, T0, answer(1).as_bytes()), answer(1).into_bytes());
    }

    #[test]
    fn a_line_that_was_begun_before_the_question_goes_through_whole() {
        let mut f = Filter::new(PREFIX);
        assert_eq!(relayed(&mut f, T0, b"{\"a\":"), b"{\"a\":");
        f.expect(format!("{PREFIX}1"), T0);
        assert_eq!(relayed(&mut f, T0, b"1"), b"1");
        assert_eq!(relayed(&mut f, T0, b"2}\n{"), b"2}\n");
    }

    #[test]
    fn half_a_line_waits_a_second_and_no_longer() {
        let mut f = Filter::new(PREFIX);
        f.expect(format!("{PREFIX}1"), T0);
        assert_eq!(relayed(&mut f, T0, b"half"), b"");
        assert_eq!(f.deadline(), Some(HOLD));
        let mut app = Vec::new();
        f.tick(HOLD, |b| app.extend_from_slice(b));
        assert_eq!(app, b"half");
        assert_eq!(relayed(&mut f, HOLD, b" of it\nnext\n"), b" of it\nnext\n");
    }

    #[test]
    fn an_answer_that_never_comes_ends_the_search() {
        let mut f = Filter::new(PREFIX);
        f.expect(format!("{PREFIX}1"), T0);
        f.tick(ANSWER_WAIT, |_| {});
        assert_eq!(f.deadline(), None);
        assert_eq!(relayed(&mut f, ANSWER_WAIT, b"half"), b"half");
    }

    #[derive(Clone, Debug)]
    enum Line {
        Ours,
        Other(Vec<u8>),
        Long(usize),
    }

    fn line() -> impl Strategy<Value = Line> {
        prop_oneof![
            2 => Just(Line::Ours),
            4 => proptest::collection::vec(any::<u8>().prop_filter("one line", |b| *b != b'\n'), 0..40).prop_map(Line::Other),
            1 => (HOLD_BYTES - 50..2 * HOLD_BYTES).prop_map(Line::Long),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

        /// However it is cut: the app's bytes are the CLI's without our answers.
        #[test]
        fn the_app_sees_everything_but_our_answers(
            lines in proptest::collection::vec(line(), 0..12),
            tail in proptest::collection::vec(any::<u8>(), 0..20),
            cuts in proptest::collection::vec(1..3000usize, 1..40),
        ) {
            let mut f = Filter::new(PREFIX);
            let (mut input, mut expected) = (Vec::new(), Vec::new());
            for (n, line) in lines.iter().enumerate() {
                let bytes = match line {
                    Line::Ours => {
                        f.expect(format!("{PREFIX}{n}"), T0);
                        input.extend_from_slice(answer(n).as_bytes());
                        continue;
                    }
                    Line::Other(bytes) => [bytes, &b"\n"[..]].concat(),
                    Line::Long(n) => [vec![b'x'; *n], b"\n".to_vec()].concat(),
                };
                input.extend_from_slice(&bytes);
                expected.extend_from_slice(&bytes);
            }
            input.extend_from_slice(&tail);
            expected.extend_from_slice(&tail);

            let mut app = Vec::new();
            let mut rest = &input[..];
            for cut in cuts.iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let (chunk, after) = rest.split_at((*cut).min(rest.len()));
                f.push(T0, chunk, |b| app.extend_from_slice(b));
                rest = after;
            }
            f.finish(|b| app.extend_from_slice(b));
            prop_assert!(app == expected);
        }
    }
}
