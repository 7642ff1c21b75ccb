//! The way from the relay and from init to the monitor's thread: bytes in order, and what cannot wait for them.
//!
//! Nobody who puts something in waits: what the monitor has not taken stays in a [`Backlog`], and what even that cannot keep is
//! counted as lost.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use agent_sidecar_core::monitor::{Exit, Monitor, Now, Stop};
use memchr::memmem;

use super::backlog::{Backlog, Bounds, Next};

/// What is urgent keeps its place behind this much, which takes the monitor less than a millisecond: a stop that overtakes the app's
/// first line would be judged without it.
const SOON: u64 = 256 * 1024;

/// How each piece of a streamed answer begins, and what is somewhere in it (never in its text, where quotes are escaped). They are most
/// of all lines and say next to nothing: the monitor is not woken for each, but for the first of them in [`LAZY`]. What comes behind
/// them, and whoever asks the monitor something, brings it up to date.
const STREAM_EVENT: &[u8] = br#"{"type":"stream_event","event":{"#;
const DELTA: &[u8] = br#""type":"content_block_delta""#;
const LAZY: Duration = Duration::from_millis(100);

/// More than this waiting, and still rising by [`POUR`] in each [`LOOK`], is a flood: a hundred times what the CLI says at its
/// fastest, one huge tool result after another. Then the bytes go first and are counted behind, but no later than [`LATEST`].
const FLOOD: u64 = 512 * 1024;
const POUR: u64 = 512 * 1024;
const LOOK: Duration = Duration::from_millis(5);
const LATEST: Duration = Duration::from_millis(250);

/// Something to do with the monitor, on its thread.
pub(crate) type Visit<M> = Box<dyn FnOnce(&mut M, Now) + Send>;

/// What does not wait behind many bytes.
pub(crate) enum Urgent<M = Monitor> {
    Spawned {
        pid: u32,
    },
    Stop(Stop),
    /// A line of ours was not written.
    Dropped {
        request_id: String,
    },
    Visit(Visit<M>),
}

/// What keeps its place among the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mark {
    StdoutEnd,
    StdinEnd,
    Exited(Exit),
}

/// Which stream bytes came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stream {
    Stdout,
    Stdin,
}

/// One piece of what comes out.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Piece<'a> {
    Bytes(Stream, &'a [u8]),
    Lost { bytes: u64 },
    Mark(Mark),
}

/// See the module's head.
pub(crate) struct Tap<M = Monitor> {
    state: Mutex<State<M>>,
    more: Condvar,
}

struct State<M> {
    /// Each with the bytes that came before it.
    urgent: VecDeque<(u64, Urgent<M>)>,
    frames: Backlog,
    /// Bytes that could not be kept since the last frame that could.
    lost: u64,
    lost_total: u64,
    /// The monitor sleeps: whoever puts something in wakes it.
    asleep: bool,
    /// When it was last woken.
    woken: Duration,
    flood: Flood,
    /// Nobody takes anything any more.
    shut: bool,
    /// Bytes taken so far: the sign of life of the other side.
    taken: u64,
    /// The end, while something urgent came before it: a block may hold what was handed in later.
    end: Option<[u8; HEAD]>,
}

impl<M> Tap<M> {
    pub(crate) fn new(bounds: Bounds) -> Self {
        let state = State {
            urgent: VecDeque::new(),
            frames: Backlog::new(bounds),
            lost: 0,
            lost_total: 0,
            asleep: false,
            woken: Duration::ZERO,
            flood: Flood::default(),
            shut: false,
            taken: 0,
            end: None,
        };
        Self { state: Mutex::new(state), more: Condvar::new() }
    }

    /// Hands in bytes that have been forwarded.
    pub(crate) fn bytes(&self, now: Duration, stream: Stream, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        let mut state = self.lock();
        if state.shut {
            return;
        }
        if !state.frames.has_room(2 * HEAD + bytes.len()) {
            state.lost += bytes.len() as u64;
            state.lost_total += bytes.len() as u64;
            return;
        }
        state.admit_losses();
        let kind = match stream {
            Stream::Stdout => STDOUT,
            Stream::Stdin => STDIN,
        };
        state.frames.push_always(&head(kind, bytes.len() as u64));
        state.frames.push_always(bytes);
        if now < state.woken + LAZY && only_deltas(bytes) {
            return;
        }
        state.woken = now;
        self.wake(state);
    }

    pub(crate) fn mark(&self, mark: Mark) {
        let mut state = self.lock();
        if state.shut {
            return;
        }
        state.admit_losses();
        let head = match mark {
            Mark::StdoutEnd => head(STDOUT_END, 0),
            Mark::StdinEnd => head(STDIN_END, 0),
            Mark::Exited(Exit::Code(n)) => head(EXITED, n.cast_unsigned().into()),
            Mark::Exited(Exit::Signal(n)) => head(KILLED, n.cast_unsigned().into()),
        };
        // What was found out about the end is known before it.
        if matches!(mark, Mark::Exited(_)) && !state.urgent.is_empty() {
            state.end = Some(head);
        } else {
            state.frames.push_always(&head);
        }
        self.wake(state);
    }

    /// Hands in what does not wait; says whether anybody is there to take it.
    pub(crate) fn urgent(&self, urgent: Urgent<M>) -> bool {
        let mut state = self.lock();
        if state.shut {
            return false;
        }
        let before = state.taken + state.frames.len();
        state.urgent.push_back((before, urgent));
        self.wake(state);
        true
    }

    /// From now on everything that is handed in is forgotten: the monitor is no more.
    pub(crate) fn shut(&self) {
        let mut state = self.lock();
        state.shut = true;
        state.urgent.clear();
        state.frames.clear();
        state.end = None;
    }

    pub(crate) fn is_shut(&self) -> bool {
        self.lock().shut
    }

    /// Whether nothing waits. Asked on the monitor's own thread: then it has heard all that was relayed.
    pub(crate) fn is_empty(&self) -> bool {
        self.lock().frames.len() == 0
    }

    /// Bytes taken and bytes lost so far.
    pub(crate) fn progress(&self) -> (u64, u64) {
        let state = self.lock();
        (state.taken, state.lost_total)
    }

    /// Waits until there is something, or for so long. Either gives an urgent one, or fills `portion`.
    pub(crate) fn take(&self, now: Duration, portion: &mut Portion, timeout: Option<Duration>) -> Option<Urgent<M>> {
        let mut state = self.lock();
        if state.urgent.is_empty()
            && let Some(end) = state.end.take()
        {
            state.frames.push_always(&end);
        }
        let (waiting, handed) = (state.frames.len(), state.taken + state.frames.len());
        if state.urgent.is_empty() && state.flood.rises(now, waiting, handed) {
            // Not asleep: bytes do not wake it. What is urgent waits for a few milliseconds.
            drop(state);
            std::thread::sleep(LOOK);
            state = self.lock();
        }
        if state.urgent.is_empty() && state.frames.is_empty() && timeout != Some(Duration::ZERO) {
            state.asleep = true;
            state = match timeout {
                Some(timeout) => self.more.wait_timeout(state, timeout).unwrap_or_else(PoisonError::into_inner).0,
                None => self.more.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
            state.asleep = false;
        }
        let many = state.frames.len() > SOON;
        if state.urgent.front().is_some_and(|(before, _)| many || *before <= state.taken) {
            return state.urgent.pop_front().map(|(_, urgent)| urgent);
        }
        let part = match state.frames.next(portion.room()) {
            Next::Nothing => return None,
            Next::Block => {
                state.taken += portion.bytes.len() as u64;
                return None;
            }
            Next::InFile(part) => part,
        };
        // The relay does not wait for the disk: nobody else reads, and what is read is not written to.
        drop(state);
        let read = part.read(portion.room());
        let mut state = self.lock();
        if state.shut {
            return None;
        }
        match state.frames.read(part, read) {
            Ok(done_with) => {
                state.taken += portion.bytes.len() as u64;
                drop(state);
                // Outside again: it may be large, and then this takes long.
                drop(done_with);
            }
            Err(error) => {
                tracing::error!(%error, source = %error.source, "some of what the agent said is not counted");
                state.taken += error.bytes;
                state.lost += error.bytes;
                state.lost_total += error.bytes;
                // Frames are cut somewhere: start anew behind the gap.
                *portion = Portion::default();
            }
        }
        None
    }

    fn wake(&self, state: MutexGuard<'_, State<M>>) {
        let asleep = state.asleep;
        drop(state);
        if asleep {
            self.more.notify_one();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<M>> {
        // A panic elsewhere must not stop the relay: every state of this struct is a whole one.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<M> State<M> {
    fn admit_losses(&mut self) {
        if self.lost > 0 {
            let lost = head(LOST, std::mem::take(&mut self.lost));
            self.frames.push_always(&lost);
        }
    }
}

/// Whole lines, and none that says more than the next few words of an answer.
fn only_deltas(bytes: &[u8]) -> bool {
    let delta = |line: &[u8]| line.starts_with(STREAM_EVENT) && memmem::find(line, DELTA).is_some();
    bytes.ends_with(b"\n") && bytes.split_inclusive(|byte| *byte == b'\n').all(delta)
}

/// Whether the monitor stands back.
#[derive(Debug, Default)]
struct Flood {
    /// When it began.
    since: Option<Duration>,
    /// The last look, and how much had been handed in by then.
    looked: Duration,
    handed: u64,
}

impl Flood {
    fn rises(&mut self, now: Duration, waiting: u64, handed: u64) -> bool {
        if waiting < FLOOD {
            self.since = None;
            return false;
        }
        if now < self.looked + LOOK {
            return false;
        }
        let pours = POUR <= handed - self.handed;
        (self.looked, self.handed) = (now, handed);
        if !pours {
            self.since = None;
        }
        pours && now < *self.since.get_or_insert(now) + LATEST
    }
}

const HEAD: usize = 9;

const STDOUT: u8 = 0;
const STDIN: u8 = 1;
const LOST: u8 = 2;
const STDOUT_END: u8 = 3;
const STDIN_END: u8 = 4;
const EXITED: u8 = 5;
const KILLED: u8 = 6;

fn head(kind: u8, n: u64) -> [u8; HEAD] {
    let mut head = [kind; HEAD];
    head[1..].copy_from_slice(&n.to_le_bytes());
    head
}

/// What was taken at once: a block of the backlog, cut wherever blocks end. [`Self::next`] makes pieces of it.
#[derive(Debug, Default)]
pub(crate) struct Portion {
    bytes: Vec<u8>,
    at: usize,
    /// The beginning of a head whose end is in the next block.
    head: Vec<u8>,
    /// How much of the current frame's bytes is still to come.
    frame: Option<(Stream, u64)>,
}

impl Portion {
    /// Where the next block goes, now that this one is used up.
    fn room(&mut self) -> &mut Vec<u8> {
        self.at = 0;
        self.bytes.clear();
        &mut self.bytes
    }

    pub(crate) fn next(&mut self) -> Option<Piece<'_>> {
        let there = self.bytes.len() - self.at;
        if there == 0 {
            return None;
        }
        let Some((stream, left)) = self.frame else {
            let n = there.min(HEAD - self.head.len());
            self.head.extend_from_slice(&self.bytes[self.at..self.at + n]);
            self.at += n;
            let head = *self.head.first_chunk::<HEAD>()?;
            self.head.clear();
            return self.begin(head);
        };
        let n = there.min(usize::try_from(left).unwrap_or(usize::MAX));
        self.frame = (n as u64 != left).then_some((stream, left - n as u64));
        self.at += n;
        Some(Piece::Bytes(stream, &self.bytes[self.at - n..self.at]))
    }

    fn begin(&mut self, head: [u8; HEAD]) -> Option<Piece<'_>> {
        let [kind, n @ ..] = head;
        let n = u64::from_le_bytes(n);
        let number = || i32::try_from(n).unwrap_or_default();
        match kind {
            STDOUT | STDIN => {
                self.frame = Some((if kind == STDOUT { Stream::Stdout } else { Stream::Stdin }, n));
                self.next()
            }
            LOST => Some(Piece::Lost { bytes: n }),
            STDOUT_END => Some(Piece::Mark(Mark::StdoutEnd)),
            STDIN_END => Some(Piece::Mark(Mark::StdinEnd)),
            EXITED => Some(Piece::Mark(Mark::Exited(Exit::Code(number())))),
            KILLED => Some(Piece::Mark(Mark::Exited(Exit::Signal(number())))),
            kind => unreachable!("nobody writes a frame of kind {kind}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tap(memory: usize, hard: usize) -> Tap<()> {
        Tap::new(Bounds { memory, file: 0, hard, dirs: vec![] })
    }

    fn drain(tap: &Tap<()>) -> String {
        let mut portion = Portion::default();
        let mut said = String::new();
        loop {
            let before = tap.progress().0;
            assert!(tap.take(Duration::ZERO, &mut portion, Some(Duration::ZERO)).is_none());
            while let Some(piece) = portion.next() {
                said += &match piece {
                    Piece::Bytes(Stream::Stdout, b) => String::from_utf8_lossy(b).into_owned(),
                    Piece::Bytes(Stream::Stdin, b) => String::from_utf8_lossy(b).to_uppercase(),
                    Piece::Lost { bytes } => format!("[lost {bytes}]"),
                    Piece::Mark(mark) => format!("[{mark:?}]"),
                };
            }
            if tap.progress().0 == before {
                return said;
            }
        }
    }

    #[test]
    fn bytes_and_marks_keep_their_order() {
        let tap = tap(1000, 1000);
        tap.bytes(Duration::ZERO, Stream::Stdout, b"one ");
        tap.bytes(Duration::ZERO, Stream::Stdin, b"two ");
        tap.mark(Mark::StdinEnd);
        tap.bytes(Duration::ZERO, Stream::Stdout, b"three");
        tap.mark(Mark::StdoutEnd);
        tap.mark(Mark::Exited(Exit::Code(3)));
        assert_eq!(drain(&tap), "one TWO [StdinEnd]three[StdoutEnd][Exited(Code(3))]");
    }

    #[test]
    fn what_cannot_be_kept_is_counted_where_it_was_lost() {
        let tap = tap(50, 50);
        tap.bytes(Duration::ZERO, Stream::Stdout, b"kept ");
        tap.bytes(Duration::ZERO, Stream::Stdout, &[b'x'; 60]);
        tap.bytes(Duration::ZERO, Stream::Stdout, &[b'y'; 40]);
        tap.mark(Mark::StdoutEnd);
        assert_eq!(drain(&tap), "kept [lost 100][StdoutEnd]");
        tap.bytes(Duration::ZERO, Stream::Stdout, b"later");
        assert_eq!(drain(&tap), "later");
    }

    #[test]
    fn only_the_next_words_of_an_answer_can_wait() {
        let delta = [STREAM_EVENT, DELTA, br#","delta":{"text":"word"}}}"#, b"\n"].concat();
        assert!(only_deltas(&delta) && only_deltas(&delta.repeat(3)));
        let result = b"{\"type\":\"result\"}\n".as_slice();
        let quoted = [STREAM_EVENT, br#""type":"x","text":"\"type\":\"content_block_delta\""}}"#, b"\n"].concat();
        for more in
            [&delta[..delta.len() - 1], &delta[1..], result, &quoted, &[&delta, result].concat(), &[&delta, &delta[..9]].concat()]
        {
            assert!(!only_deltas(more), "{}", String::from_utf8_lossy(more));
        }
    }

    #[test]
    fn in_a_flood_the_bytes_go_first_but_not_for_long() {
        let mut flood = Flood::default();
        let mut handed = 0;
        let mut looks = |n: u64, waiting: u64, each: u64| {
            (1..=n)
                .filter(|_| {
                    handed += each;
                    flood.rises(LOOK * u32::try_from(handed / each).unwrap(), waiting, handed)
                })
                .count() as u64
        };
        // From the second look on it is seen to rise; after that it may take its time, once.
        assert_eq!(looks(10, FLOOD - 1, 2 * POUR), 0, "what is waiting is taken soon");
        assert_eq!(looks(200, FLOOD, 2 * POUR), (LATEST.as_millis() / LOOK.as_millis()) as u64);
    }

    #[test]
    fn what_is_urgent_overtakes_much_and_not_little() {
        let tap = tap(usize::MAX / 4, usize::MAX / 4);
        let mut portion = Portion::default();
        tap.bytes(Duration::ZERO, Stream::Stdin, b"hello");
        tap.urgent(Urgent::Spawned { pid: 1 });
        assert!(tap.take(Duration::ZERO, &mut portion, None).is_none());
        assert_eq!(portion.next(), Some(Piece::Bytes(Stream::Stdin, b"hello")));
        assert!(matches!(tap.take(Duration::ZERO, &mut portion, None), Some(Urgent::Spawned { pid: 1 })));
        tap.bytes(Duration::ZERO, Stream::Stdout, &vec![b'x'; 300_000]);
        tap.urgent(Urgent::Spawned { pid: 2 });
        assert!(matches!(tap.take(Duration::ZERO, &mut portion, None), Some(Urgent::Spawned { pid: 2 })));
    }

    #[test]
    fn what_was_said_before_the_end_is_heard_before_it() {
        let tap = tap(1000, 1000);
        let mut portion = Portion::default();
        tap.bytes(Duration::ZERO, Stream::Stdout, b"killed");
        tap.urgent(Urgent::Visit(Box::new(|(), _| {})));
        tap.mark(Mark::StdoutEnd);
        tap.mark(Mark::Exited(Exit::Signal(9)));
        assert!(tap.take(Duration::ZERO, &mut portion, None).is_none());
        assert_eq!(portion.next(), Some(Piece::Bytes(Stream::Stdout, b"killed")));
        assert_eq!(portion.next(), Some(Piece::Mark(Mark::StdoutEnd)));
        assert_eq!(portion.next(), None);
        assert!(matches!(tap.take(Duration::ZERO, &mut portion, None), Some(Urgent::Visit(_))));
        assert_eq!(drain(&tap), "[Exited(Signal(9))]");
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn the_bytes_come_out_as_they_went_in(chunks in proptest::collection::vec(0..150_000usize, 0..20)) {
            let tap = tap(usize::MAX / 4, usize::MAX / 4);
            let mut expected = String::new();
            for (n, len) in chunks.into_iter().enumerate() {
                let text = char::from(b'a' + u8::try_from(n).unwrap()).to_string().repeat(len);
                tap.bytes(Duration::ZERO, Stream::Stdout, text.as_bytes());
                expected += &text;
            }
            prop_assert!(drain(&tap) == expected);
        }
    }
}
