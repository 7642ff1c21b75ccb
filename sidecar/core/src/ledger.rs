//! What has been spent, each token once: the CLI's running totals and deltas, reconciled with what its stream shows.
//!
//! ```text
//!            answers open ──────────────┐ (priced by the table only if nobody ever confirms them)
//!  get_usage ─► totals since the result ─┼─► increments ─► Spent
//!  result ────► the exact delta ─────────┘        └─ what was counted too much ─► Corrected
//! ```
//!
//! A confirmation covers everything since the last result. What has been counted of that already ([`Ledger::ahead`]) is taken off,
//! so increments can come in any order and number and still add up to the confirmed total.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use crate::event::{ModelTotal, TurnResult, Usage};
use crate::native::Increment;
use crate::price::{PriceTable, canonical};
use crate::tokens::{Tokens, Usd};
use crate::update::{Basis, Direction, ResetCause, Source, Spent, Update};

/// Answers that are remembered as done, so that a late repetition does not count again. More than any session has in flight.
const DONE: usize = 4_096;
/// Answers in flight at once, subagents included; the oldest is taken as done beyond.
const OPEN: usize = 1_024;
/// The CLI itself takes three characters for a token when an answer is cut (seen: 85 characters 28, 95 characters 32 tokens).
const BYTES_PER_TOKEN: u64 = 3;

/// A sum of tokens and of the CLI's own money.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Book {
    tokens: Tokens,
    usd: Usd,
    searches: u64,
}

impl Book {
    fn minus(self, other: Book) -> Book {
        Book {
            tokens: self.tokens.saturating_sub(other.tokens),
            usd: self.usd.saturating_sub(other.usd),
            searches: self.searches.saturating_sub(other.searches),
        }
    }

    fn plus(self, other: Book) -> Book {
        Book {
            tokens: self.tokens + other.tokens,
            usd: self.usd + other.usd,
            searches: self.searches.saturating_add(other.searches),
        }
    }

    fn covers(&self, other: &Book) -> bool {
        self.tokens.covers(&other.tokens) && self.searches >= other.searches
    }

    fn is_zero(&self) -> bool {
        *self == Book::default()
    }
}

type Books = BTreeMap<String, Book>;

fn books(models: &[ModelTotal]) -> Books {
    let mut books = Books::new();
    for total in models {
        let book = Book { tokens: total.tokens, usd: Usd::from_f64(total.cost_usd), searches: total.web_searches };
        let entry = books.entry(name_of(total)).or_default();
        *entry = entry.plus(book);
    }
    books
}

/// The name under which a model is booked: the key may carry a suffix, or change between processes.
fn name_of(total: &ModelTotal) -> String {
    canonical(total.canonical.as_deref().unwrap_or(&total.model)).into_owned()
}

/// An answer that nobody has confirmed yet.
#[derive(Clone, Debug)]
struct Open {
    model: String,
    source: Source,
    parent: Option<String>,
    usage: Usage,
    /// Text, thinking and tool input so far.
    bytes: u64,
    /// The API told the final usage.
    settled: bool,
    /// No more of it will come.
    complete: bool,
    /// Already counted as an estimate.
    counted: Book,
}

impl Open {
    /// The usage, its output guessed from what was written where the API did not get to tell.
    fn estimate(&self) -> Usage {
        let mut usage = self.usage.clone();
        if !self.settled {
            usage.tokens.output = usage.tokens.output.max((self.bytes + BYTES_PER_TOKEN / 2) / BYTES_PER_TOKEN);
        }
        usage
    }
}

/// How the CLI's totals began: a resumed session may start where its transcript ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Base {
    /// At zero.
    Zero,
    /// Somewhere; the first totals before the first answer tell, or the first delta.
    Unknown,
}

/// What the session knows of a result beyond its words.
#[derive(Clone, Copy, Debug)]
pub struct Known<'a> {
    /// The model of the main loop.
    pub model: Option<&'a str>,
    /// How the totals began, if no totals told it.
    pub start: Began,
    /// The turn was stopped in the middle of an answer, which older CLIs then leave out of their books, though the API has billed its
    /// prompt: what they do not cover is kept as an estimate.
    pub cut: bool,
    /// A result before this one was lost.
    pub missed: bool,
    /// One process, of which nothing was missed: not a recording.
    pub live: bool,
}

/// See [`Known::start`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Began {
    /// At zero, resumed or not.
    Zero,
    /// Where the transcript ended.
    Restored,
    /// Either.
    Unknown,
}

/// See the module's head.
#[derive(Clone, Debug)]
pub struct Ledger {
    prices: PriceTable,
    session: String,
    /// The CLI's totals at the last result of this process; `None` while nobody knows where they began.
    settled: Option<Books>,
    /// Its total cost then, for a CLI that tells no more.
    settled_usd: Usd,
    /// Tokens written to the cache for an hour since then, by model: older CLIs' totals do not tell them apart.
    hours: BTreeMap<String, u64>,
    /// What has been counted since then.
    ahead: Books,
    /// How much of it before this turn.
    ahead_before: Books,
    open: BTreeMap<String, Open>,
    order: VecDeque<String>,
    done: BTreeSet<String>,
    done_order: VecDeque<String>,
    /// Tokens that answers are known to have used and that no increment has taken up yet, by model.
    main: BTreeMap<String, Tokens>,
    /// What the main thread's answers since the last result were asked with.
    main_prompts: u64,
    subagents_seen: bool,
    /// The CLI asked the model in ways that its stream does not show: compaction, web search.
    unseen_calls: bool,
    in_turn: bool,
    answers: u64,
    /// What the answers seen so far were asked with: totals above it hold history.
    asked: u64,
    /// Whether complete answers are counted before they are confirmed.
    eager: bool,
    basis_unknown: BTreeSet<String>,
    out: Vec<Update>,
}

impl Ledger {
    /// `eager`: count complete answers as estimates at once, because the CLI cannot be asked before its result.
    pub fn new(prices: PriceTable, base: Base, eager: bool) -> Ledger {
        Ledger {
            prices,
            session: String::new(),
            settled: (base == Base::Zero).then(Books::new),
            settled_usd: Usd::ZERO,
            hours: BTreeMap::new(),
            ahead: Books::new(),
            ahead_before: Books::new(),
            open: BTreeMap::new(),
            order: VecDeque::new(),
            done: BTreeSet::new(),
            done_order: VecDeque::new(),
            main: BTreeMap::new(),
            main_prompts: 0,
            subagents_seen: false,
            unseen_calls: false,
            in_turn: false,
            answers: 0,
            asked: 0,
            eager,
            basis_unknown: BTreeSet::new(),
            out: Vec::new(),
        }
    }

    /// What the last calls found out.
    pub fn drain(&mut self) -> impl Iterator<Item = Update> + '_ {
        self.out.drain(..)
    }

    pub fn set_eager(&mut self, eager: bool) {
        self.eager = eager;
    }

    /// From here on money is spent on this session.
    pub fn set_session(&mut self, session: &str) {
        if self.session != session {
            self.session.clear();
            self.session.push_str(session);
        }
    }

    pub fn turn_started(&mut self) {
        self.in_turn = true;
        self.ahead_before.clone_from(&self.ahead);
    }

    /// A subagent is at work: tokens that the main thread does not explain may be its own.
    pub fn subagent_seen(&mut self) {
        self.subagents_seen = true;
    }

    /// The CLI asks the model on its own account.
    pub fn unseen_call(&mut self) {
        self.unseen_calls = true;
    }

    /// A frame of an answer: `usage` is that of its start, repeated on each of its frames. Returns whether the answer is new.
    pub fn answer(&mut self, id: &str, model: &str, parent: Option<&str>, usage: Option<&Usage>) -> bool {
        if let Some(open) = self.open.get_mut(id) {
            // The stream's usage is final once told; a later frame only repeats the first.
            if let (false, Some(usage)) = (open.settled, usage) {
                let hours = open.usage.tokens.cache_write_1h;
                open.usage = merge(&open.usage, usage);
                *self.hours.entry(open.model.clone()).or_default() += open.usage.tokens.cache_write_1h - hours;
            }
            return false;
        }
        if self.done.contains(id) {
            return false;
        }
        if self.open.len() >= OPEN
            && let Some(oldest) = self.order.pop_front()
        {
            self.open.remove(&oldest);
        }
        self.answers += 1;
        let prompt = usage.map_or(0, |usage| usage.tokens.prompt());
        self.asked = self.asked.saturating_add(prompt);
        let model = canonical(model).into_owned();
        if let Some(hours) = usage.map(|usage| usage.tokens.cache_write_1h).filter(|hours| *hours > 0) {
            let sum = self.hours.entry(model.clone()).or_default();
            *sum = sum.saturating_add(hours);
        }
        if parent.is_none() {
            self.main_prompts = self.main_prompts.saturating_add(prompt);
        }
        if parent.is_some() {
            self.subagents_seen = true;
        }
        self.open.insert(
            id.to_owned(),
            Open {
                model,
                source: if parent.is_some() { Source::Subagent } else { Source::Main },
                parent: parent.map(str::to_owned),
                usage: usage.cloned().unwrap_or_default(),
                bytes: 0,
                settled: false,
                complete: false,
                counted: Book::default(),
            },
        );
        self.order.push_back(id.to_owned());
        true
    }

    /// More of an answer was written.
    pub fn grow(&mut self, id: &str, bytes: usize) {
        if let Some(open) = self.open.get_mut(id) {
            open.bytes = open.bytes.saturating_add(bytes as u64);
        }
    }

    /// The API told what an answer used in the end.
    pub fn final_usage(&mut self, id: &str, usage: &Usage) {
        if let Some(open) = self.open.get_mut(id) {
            open.usage = merge(&open.usage, usage);
            open.settled = true;
        }
    }

    /// No more of an answer will come.
    pub fn complete(&mut self, id: &str, at: Duration) {
        let Some(open) = self.open.get_mut(id) else { return };
        if std::mem::replace(&mut open.complete, true) {
            return;
        }
        if open.source == Source::Main {
            // Without the API's last word the output is not known: only what cannot be too much is counted early.
            let known = open.usage.tokens;
            *self.main.entry(open.model.clone()).or_default() += known;
            if self.eager {
                self.count_early(id, at);
            }
        }
    }

    /// All complete: the thread went on to something else.
    pub fn complete_thread(&mut self, parent: Option<&str>, except: Option<&str>, at: Duration) {
        let ids: Vec<String> = self
            .open
            .iter()
            .filter(|(id, open)| !open.complete && open.parent.as_deref() == parent && Some(id.as_str()) != except)
            .map(|(id, _)| id.clone())
            .collect();
        for id in ids {
            self.complete(&id, at);
        }
    }

    fn count_early(&mut self, id: &str, at: Duration) {
        let Some(open) = self.open.get_mut(id) else { return };
        let prices = &self.prices;
        let priced = prices.answer(&open.model, at, &open.usage).zip(prices.list(&open.model, at, &open.usage));
        let Some((usd, list)) = priced else { return };
        let book = Book { tokens: open.usage.tokens, usd: list, searches: open.usage.web_searches };
        if book.is_zero() {
            return;
        }
        open.counted = Book { usd, ..book };
        let (model, source) = (open.model.clone(), open.source);
        // In the money of the confirmation that it will be held against: the CLI's own.
        let ahead = self.ahead.entry(model.clone()).or_default();
        *ahead = ahead.plus(book);
        self.out.push(Update::Spent(Spent {
            session: self.session.clone(),
            model,
            source,
            basis: Basis::Estimate,
            tokens: book.tokens,
            cost: usd,
            list,
            reported: Usd::ZERO,
            web_searches: book.searches,
            unpriced: false,
        }));
    }

    /// The CLI's running totals, as `get_usage` tells them.
    pub fn totals(&mut self, models: &[ModelTotal], live: bool, at: Duration) {
        let totals = books(models);
        self.note_basis(models);
        if self.settled.is_none() {
            if self.answers == 0 {
                // Totals before the first answer are what a resumed session brought along.
                self.settled = Some(totals);
                return;
            }
            if !self.explains(&totals) {
                return;
            }
            self.settled = Some(Books::new());
        }
        let fell = self.settled.as_ref().is_some_and(|settled| fell(settled, &totals));
        let nothing = self.settled.as_ref().is_some_and(|settled| settled.values().all(Book::is_zero));
        if fell {
            self.reset(ResetCause::Decrease);
        }
        if !live && self.open.is_empty() && (fell || nothing) {
            // In a recording another process speaks, and has not been answered yet: it brought these along.
            self.settled = Some(totals);
            return;
        }
        let settled = self.settled.clone().unwrap_or_default();
        let delta = self.tell_apart(since(&totals, &settled), models);
        self.count(&delta, at, false);
        self.forget_complete();
    }

    /// The confirmation of a turn. Says whether all of it is confirmed.
    pub fn result(&mut self, result: &TurnResult, known: Known<'_>, at: Duration) -> bool {
        let models = result.model_usage.as_deref().unwrap_or_default();
        let totals = books(models);
        self.note_basis(models);
        if let Some(usage) = &result.usage {
            self.explain_main(usage);
            if let [only] = models {
                // `json` shows no answers.
                let hours = self.hours.entry(name_of(only)).or_default();
                *hours = usage.tokens.cache_write_1h.max(*hours);
            }
        }
        let delta = self.delta(result, &totals, known).map(|delta| self.tell_apart(delta, models));
        let confirmed = match delta {
            Some(delta) => {
                let left_out = known.cut && self.main_prompts > prompts(&delta);
                self.count(&delta, at, !left_out);
                if left_out {
                    self.estimate_uncovered(self.main_prompts - prompts(&delta), at);
                }
                !left_out
            }
            // Nobody can tell history from this turn: what the stream and the main loop's usage show is all there is.
            None => {
                self.estimate_turn(result.usage.as_ref(), &totals, known.model, at);
                false
            }
        };
        self.settled_usd = result.total_cost_usd.map_or_else(|| totals.values().map(|book| book.usd).sum(), Usd::from_f64);
        // Where it told none, the next totals are what is behind it.
        self.settled = result.model_usage.as_ref().map(|_| totals);
        if self.settled.is_none() {
            (self.answers, self.asked) = (0, 0);
        }
        self.ahead.clear();
        self.main.clear();
        self.main_prompts = 0;
        self.hours.clear();
        self.subagents_seen = false;
        self.unseen_calls = false;
        self.in_turn = false;
        confirmed
    }

    /// What a result adds to the one before, if anybody can tell.
    fn delta(&mut self, result: &TurnResult, totals: &Books, known: Known<'_>) -> Option<Books> {
        if result.model_usage.is_none() && result.since_last.is_none() {
            return self.delta_of_total(result, known.model);
        }
        let delta = result.since_last.as_deref().map(books);
        match (delta, &self.settled) {
            // What the lost result would have told is in the totals.
            (Some(_), Some(settled)) if known.missed && !fell(settled, totals) => Some(since(totals, settled)),
            (Some(delta), _) => Some(delta),
            (None, Some(settled)) => {
                // Totals that are this turn's and nothing else are those of another process: before it there was something.
                let alone = |usage: &Usage| whole(usage.tokens) == totals.values().map(|book| whole(book.tokens)).sum();
                let another = !known.live && prompts(settled) > 0 && result.usage.as_ref().is_some_and(alone);
                if fell(settled, totals) || another {
                    self.reset(ResetCause::Decrease);
                }
                Some(since(totals, self.settled.as_ref().unwrap_or(&Books::new())))
            }
            (None, None) if known.start == Began::Zero || self.explains(totals) => Some(totals.clone()),
            (None, None) if known.start == Began::Restored => None,
            // A recording of one result: it is a fresh session's, unless there is more in the totals than anything in it accounts for.
            (None, None) => (!self.holds_history(result, totals)).then(|| totals.clone()),
        }
    }

    /// Of a CLI that has no totals by model.
    fn delta_of_total(&mut self, result: &TurnResult, model: Option<&str>) -> Option<Books> {
        let usd = Usd::from_f64(result.total_cost_usd?);
        let new = if usd < self.settled_usd { usd } else { usd - self.settled_usd };
        let usage = result.usage.clone().unwrap_or_default();
        let book = Book { tokens: usage.tokens, usd: new, searches: usage.web_searches };
        Some(Books::from([(self.main_model(&Books::new(), model), book)]))
    }

    /// Whether totals hold more than the main loop's usage, where nothing else can have used it.
    fn holds_history(&self, result: &TurnResult, totals: &Books) -> bool {
        let Some(usage) = &result.usage else { return false };
        let alone = result.subagents_spawned == Some(0) && !self.subagents_seen && !self.unseen_calls && usage.web_searches == 0;
        let whole = result.subtype.as_deref() == Some("success") && !result.is_error;
        alone && whole && prompts(totals) > usage.tokens.prompt()
    }

    /// Under which name the main loop's tokens are booked.
    fn main_model(&self, totals: &Books, model: Option<&str>) -> String {
        let seen = self.order.iter().rev().filter_map(|id| self.open.get(id)).find(|open| open.source == Source::Main);
        let told = model.map(|model| canonical(model).into_owned());
        let dearest = || totals.iter().max_by_key(|(_, book)| book.usd).map(|(model, _)| model.clone());
        seen.map(|open| open.model.clone())
            .or_else(|| told.clone().filter(|model| totals.contains_key(model)))
            .or_else(dearest)
            .or(told)
            .unwrap_or_else(|| String::from("unknown"))
    }

    /// Cache writes that a total does not tell apart, as the answers do.
    fn tell_apart(&self, mut delta: Books, models: &[ModelTotal]) -> Books {
        for model in models.iter().filter(|total| !total.told_apart).map(name_of) {
            if let Some((book, hours)) = delta.get_mut(&model).zip(self.hours.get(&model)) {
                let hours = book.tokens.cache_write_5m.min(*hours);
                book.tokens.cache_write_5m -= hours;
                book.tokens.cache_write_1h += hours;
            }
        }
        delta
    }

    /// Spending that nobody but the CLI's telemetry tells of: never of a session whose stream is read.
    pub fn native(&mut self, new: Increment, at: Duration) {
        let cost = self.worth(&new, at);
        let unpriced = !self.prices.knows(&new.model, at);
        let Increment { session, model, source, tokens, usd } = new;
        let (basis, reported, web_searches) = (Basis::Confirmed, usd, 0);
        let list = if unpriced { cost } else { usd };
        self.out.push(Update::Spent(Spent {
            session,
            model,
            source,
            basis,
            tokens,
            cost,
            list,
            reported,
            web_searches,
            unpriced,
        }));
    }

    /// What is paid for it.
    pub fn worth(&self, new: &Increment, at: Duration) -> Usd {
        let fallback = if self.prices.knows(&new.model, at) { None } else { self.prices.fallback_cost(&new.tokens) };
        fallback.unwrap_or_else(|| self.prices.confirmed(&new.model, at, &new.tokens, 0, new.usd))
    }

    /// A result covers every answer that was seen: what background agents go on with comes as new ones.
    pub fn forget(&mut self) {
        for id in self.open.keys().cloned().collect::<Vec<_>>() {
            self.finish(&id);
        }
    }

    fn forget_complete(&mut self) {
        let gone: Vec<String> = self.open.iter().filter(|(_, open)| open.complete).map(|(id, _)| id.clone()).collect();
        for id in gone {
            self.finish(&id);
        }
    }

    fn finish(&mut self, id: &str) {
        self.open.remove(id);
        self.order.retain(|open| open != id);
        if self.done.insert(id.to_owned()) {
            self.done_order.push_back(id.to_owned());
            if self.done_order.len() > DONE
                && let Some(oldest) = self.done_order.pop_front()
            {
                self.done.remove(&oldest);
            }
        }
    }

    /// The CLI's totals start again at zero.
    pub fn reset(&mut self, cause: ResetCause) {
        self.settled = Some(Books::new());
        self.settled_usd = Usd::ZERO;
        self.ahead.clear();
        self.out.push(Update::CounterReset { cause });
    }

    /// A new process spoke since the last result: what was heard in this turn is its own, its totals began anew. What was counted between
    /// the two is the other's.
    pub fn rebase(&mut self) {
        let before = if self.in_turn { std::mem::take(&mut self.ahead_before) } else { self.ahead.clone() };
        for (model, book) in before {
            let ahead = self.ahead.entry(model).or_default();
            *ahead = ahead.minus(book);
        }
        self.settled = None;
        self.settled_usd = Usd::ZERO;
        self.done.clear();
        self.done_order.clear();
        self.answers = self.open.len() as u64;
        self.asked = self.open.values().fold(0, |sum, open| sum.saturating_add(open.usage.tokens.prompt()));
    }

    /// A new process speaks: nothing of the old one's totals holds.
    pub fn restart(&mut self, base: Base) {
        self.settled = (base == Base::Zero).then(Books::new);
        self.settled_usd = Usd::ZERO;
        self.hours.clear();
        self.ahead.clear();
        self.main.clear();
        self.main_prompts = 0;
        self.open.clear();
        self.order.clear();
        self.done.clear();
        self.done_order.clear();
        self.answers = 0;
        self.asked = 0;
        self.subagents_seen = false;
        self.unseen_calls = false;
        self.in_turn = false;
    }

    /// Nothing will be confirmed any more: what is open is spent by our own estimate.
    pub fn close(&mut self, at: Duration) {
        self.estimate_open(at);
        let unconfirmed: Usd = self.ahead_estimates();
        if !unconfirmed.is_zero() {
            self.out.push(Update::Unconfirmed { session: self.session.clone(), usd: unconfirmed });
        }
        self.ahead.clear();
    }

    /// What the answers in flight have cost so far, by our own estimate: for limits, never booked.
    pub fn in_flight(&self, at: Duration) -> (Usd, u64) {
        let mut usd = Usd::ZERO;
        let mut tokens = 0u64;
        for open in self.open.values().filter(|open| open.counted.is_zero()) {
            let usage = open.estimate();
            usd += self.prices.answer(&open.model, at, &usage).unwrap_or_default();
            tokens = tokens.saturating_add(usage.tokens.total());
        }
        (usd, tokens)
    }

    /// What an answer in flight used, as far as the API told, and whether it told the end of it.
    pub fn used(&self, id: &str) -> Option<(Tokens, bool)> {
        self.open.get(id).map(|open| (open.usage.tokens, open.settled))
    }

    /// Whether answers wait for a confirmation.
    pub fn has_open(&self) -> bool {
        !self.open.is_empty()
    }

    fn ahead_estimates(&self) -> Usd {
        // What was counted early and never confirmed; live totals are the CLI's word and need no confirmation.
        self.open.values().map(|open| open.counted.usd).sum()
    }

    /// The last answers of the main thread, up to as many prompt tokens as the CLI left out.
    fn estimate_uncovered(&mut self, mut prompt: u64, at: Duration) {
        let mut ids = Vec::new();
        for id in self.order.iter().rev() {
            let Some(open) = self.open.get(id).filter(|open| open.source == Source::Main) else { continue };
            let needs = open.usage.tokens.prompt();
            if needs > prompt {
                break;
            }
            prompt -= needs;
            ids.push(id.clone());
        }
        let mut unconfirmed = Usd::ZERO;
        for id in ids {
            if let Some(open) = self.open.get_mut(&id) {
                // What the CLI put behind a cut answer is no final usage.
                open.settled = false;
            }
            self.estimate(&id, at);
            unconfirmed += self.open.get(&id).map_or(Usd::ZERO, |open| open.counted.usd);
        }
        if !unconfirmed.is_zero() {
            self.out.push(Update::Unconfirmed { session: self.session.clone(), usd: unconfirmed });
        }
    }

    /// A turn of which no total tells: the main loop's own usage, and what the stream shows of subagents.
    fn estimate_turn(&mut self, usage: Option<&Usage>, totals: &Books, model: Option<&str>, at: Duration) {
        let Some(usage) = usage else { return self.estimate_open(at) };
        let model = self.main_model(totals, model);
        let mut seen = Book::default();
        for id in self.order.iter().cloned().collect::<Vec<_>>() {
            if let Some(open) = self.open.get_mut(&id) {
                // The sum tells what these wrote.
                open.settled |= open.source == Source::Main;
            }
            self.estimate(&id, at);
            if let Some(open) = self.open.get(&id).filter(|open| open.source == Source::Main) {
                seen = seen.plus(open.counted);
            }
        }
        let tokens = usage.tokens.saturating_sub(seen.tokens);
        let rest = Usage { tokens, web_searches: usage.web_searches.saturating_sub(seen.searches), ..usage.clone() };
        if rest.tokens.is_zero() {
            return;
        }
        let price = self.prices.answer(&model, at, &rest);
        let list = self.prices.list(&model, at, &rest);
        self.out.push(Update::Spent(Spent {
            session: self.session.clone(),
            model,
            source: Source::Main,
            basis: Basis::Estimate,
            tokens: rest.tokens,
            cost: price.unwrap_or_default(),
            list: list.unwrap_or_default(),
            reported: Usd::ZERO,
            web_searches: rest.web_searches,
            unpriced: price.is_none(),
        }));
    }

    fn estimate_open(&mut self, at: Duration) {
        let ids: Vec<String> = self.order.iter().cloned().collect();
        for id in ids {
            self.estimate(&id, at);
        }
    }

    fn estimate(&mut self, id: &str, at: Duration) {
        let Some(open) = self.open.get_mut(id) else { return };
        let usage = open.estimate();
        let tokens = usage.tokens.saturating_sub(open.counted.tokens);
        let price = self.prices.answer(&open.model, at, &usage);
        let cost = price.unwrap_or_default().saturating_sub(open.counted.usd);
        let before = Usage { tokens: open.counted.tokens, web_searches: open.counted.searches, ..usage.clone() };
        let list = |usage| self.prices.list(&open.model, at, usage).unwrap_or_default();
        let list = list(&usage).saturating_sub(list(&before));
        let searches = usage.web_searches.saturating_sub(open.counted.searches);
        open.counted = Book { tokens: usage.tokens, usd: price.unwrap_or_default(), searches: usage.web_searches };
        if tokens.is_zero() && cost.is_zero() {
            return;
        }
        let (model, source) = (open.model.clone(), open.source);
        self.out.push(Update::Spent(Spent {
            session: self.session.clone(),
            model,
            source,
            basis: Basis::Estimate,
            tokens,
            cost,
            list,
            reported: Usd::ZERO,
            web_searches: searches,
            unpriced: price.is_none(),
        }));
    }

    /// The main loop's own usage of the turn, where the stream did not tell the output of each answer.
    fn explain_main(&mut self, usage: &Usage) {
        // With one model in the main thread, as nearly always, the sum belongs to it.
        if let [(_, known)] = self.main.iter_mut().collect::<Vec<_>>().as_mut_slice() {
            **known = known.max(usage.tokens);
        }
    }

    /// Whether the answers that were seen account for all of these totals: then they began at zero.
    fn explains(&self, totals: &Books) -> bool {
        prompts(totals) <= self.asked
    }

    fn note_basis(&mut self, models: &[ModelTotal]) {
        for total in models {
            if total.cost_basis.as_deref() == Some("unknown") {
                self.basis_unknown.insert(name_of(total));
            }
        }
    }

    /// Counts what a confirmation covers beyond what has been counted; at a result the rest is settled, too much included.
    fn count(&mut self, confirmed: &Books, at: Duration, at_result: bool) {
        for (model, &book) in confirmed {
            let ahead = self.ahead.get(model).copied().unwrap_or_default();
            let more = book.minus(ahead);
            if !more.is_zero() {
                self.ahead.insert(model.clone(), ahead.plus(more));
                self.spend(model, more, at);
            }
        }
        if at_result {
            for (model, ahead) in std::mem::take(&mut self.ahead) {
                let confirmed = confirmed.get(&model).copied().unwrap_or_default();
                let over = ahead.minus(confirmed);
                if !over.is_zero() {
                    let usd = self.prices.confirmed(&model, at, &over.tokens, over.searches, over.usd);
                    self.out.push(Update::Corrected {
                        session: self.session.clone(),
                        model,
                        direction: Direction::Over,
                        usd,
                        list: over.usd,
                        tokens: over.tokens,
                    });
                }
            }
        }
    }

    /// Books an increment, split by who is known to have used it.
    fn spend(&mut self, model: &str, book: Book, at: Duration) {
        let explained = self.main.get(model).copied().unwrap_or_default();
        let main = Tokens::from_kinds(std::array::from_fn(|i| book.tokens.by_kind()[i].min(explained.by_kind()[i])));
        if let Some(rest) = self.main.get_mut(model) {
            *rest = rest.saturating_sub(main);
        }
        let rest = book.tokens.saturating_sub(main);
        let other = if self.subagents_seen {
            Source::Subagent
        } else if self.unseen_calls || !self.in_turn {
            Source::Unattributed
        } else {
            Source::Main
        };
        let unpriced = self.basis_unknown.contains(model) && !self.prices.knows(model, at);
        let fallback = if unpriced { self.prices.fallback_cost(&book.tokens) } else { None };
        let cost = fallback.unwrap_or_else(|| self.prices.confirmed(model, at, &book.tokens, book.searches, book.usd));
        let parts = if other == Source::Main || rest.is_zero() && book.searches == 0 {
            vec![(Source::Main, book.tokens, cost, book.usd, book.searches)]
        } else if main.is_zero() {
            vec![(other, book.tokens, cost, book.usd, book.searches)]
        } else {
            // The main thread's share by the price table, never more than all; the rest of the money goes with the rest.
            let share = Usage { tokens: main, ..Usage::default() };
            let main_usd = self.prices.list(model, at, &share).unwrap_or_default().min(book.usd);
            let main_cost = self.prices.confirmed(model, at, &main, 0, main_usd).min(cost);
            vec![
                (Source::Main, main, main_cost, main_usd, 0),
                (other, rest, cost - main_cost, book.usd - main_usd, book.searches),
            ]
        };
        for (source, tokens, cost, reported, web_searches) in parts {
            if tokens.is_zero() && cost.is_zero() && web_searches == 0 {
                continue;
            }
            self.out.push(Update::Spent(Spent {
                session: self.session.clone(),
                model: model.to_owned(),
                source,
                basis: Basis::Confirmed,
                tokens,
                cost,
                // Nobody has a list where it stands.
                list: if unpriced { cost } else { reported },
                reported,
                web_searches,
                unpriced,
            }));
        }
    }
}

/// A later frame's usage over an earlier one's: absent or zero input fields do not undo what the start said.
fn merge(start: &Usage, later: &Usage) -> Usage {
    Usage {
        tokens: Tokens { output: start.tokens.output.max(later.tokens.output), ..start.tokens.max(later.tokens) },
        web_searches: start.web_searches.max(later.web_searches),
        inference_geo: later.inference_geo.clone().or_else(|| start.inference_geo.clone()),
        speed: later.speed.clone().or_else(|| start.speed.clone()),
        has_input: start.has_input || later.has_input,
    }
}

/// Whether running totals are below what they were: the CLI started them again.
fn fell(before: &Books, now: &Books) -> bool {
    before.iter().any(|(model, book)| !now.get(model).copied().unwrap_or_default().covers(book))
}

/// Not told apart by how long the cache keeps it.
fn whole(tokens: Tokens) -> Tokens {
    let cache_write_5m = tokens.cache_write_5m.saturating_add(tokens.cache_write_1h);
    Tokens { cache_write_5m, cache_write_1h: 0, ..tokens }
}

fn prompts(books: &Books) -> u64 {
    books.values().fold(0, |sum, book| sum.saturating_add(book.tokens.prompt()))
}

fn since(now: &Books, before: &Books) -> Books {
    now.iter().map(|(model, book)| (model.clone(), book.minus(before.get(model).copied().unwrap_or_default()))).collect()
}
