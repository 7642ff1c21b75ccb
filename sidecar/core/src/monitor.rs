//! The core's front door: an [`Input`] goes in with the time, [`Output`]s come out, and a deadline says when to come back.
//!
//! The caller (the daemon's dispatcher, `replay`, a test) owns every clock and every descriptor.

mod enforce;
mod inputs;
mod status;
mod views;

use std::collections::VecDeque;
use std::time::Duration;

use crate::ask::{Asker, ID_PREFIX};
use crate::budget::Amount;
use crate::detect::Streaks;
use crate::detect::memory::Growth;
use crate::detect::why::{Vitals, Why};
use crate::ladder::{Goal, Ladder, Patience};
use crate::ledger::Base;
use crate::limit::{Held, Judge, Outside, Rule, SHARED, Scope, Shared};
use crate::line::Splitter;
use crate::log::Logs;
use crate::meter;
use crate::metric::{MAX_SERIES, Meters};
use crate::native;
use crate::order::Order;
use crate::price::PriceTable;
use crate::record::{Record, Recorder};
use crate::report::Report;
use crate::sample::Sample;
use crate::session::{Opening, Session};
use crate::span::{Spans, TraceSettings};
use crate::telemetry::{LogEvent, Span};
use crate::timeline::Timeline;
use crate::update::{Decision, ExitReason, OwnRequest, Start, Step, Update};
use crate::who::{self, Guarded, Learn, Who};

pub use status::Status;

/// The time of an input: both clocks, read together by the caller.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Now {
    /// Monotonic time since the monitor was made.
    pub mono: Duration,
    /// Wall clock, as time since the Unix epoch.
    pub unix: Duration,
}

/// What happened outside.
#[derive(Debug)]
pub enum Input<'a> {
    /// The CLI runs under this pid. Said again, a recording goes on with another process.
    Spawned { pid: u32 },
    /// Bytes of the CLI's stdout, in order, after they were taken off its pipe.
    Stdout(&'a [u8]),
    /// The CLI's stdout ended.
    StdoutEnd,
    /// Bytes that the app wrote and that were forwarded to the CLI's stdin (ours are not among them).
    Stdin(&'a [u8]),
    /// The app closed its end of the CLI's stdin. The end is held back until [`Action::CloseStdin`], at most [`EOF_HOLD`].
    StdinEnd,
    /// This many bytes of a stream could not be kept for us (memory and spill full): counts are estimates from here on.
    Lost { bytes: u64 },
    /// A line that was to be injected could not be: the app's end was already forwarded.
    NotInjected { request_id: &'a str },
    /// What the CLI's own telemetry said, in a POST of its own.
    Native(&'a native::Report),
    /// What the container and the processes use.
    Sample(&'a Sample),
    /// The container was there for so long, on this agent's account.
    ContainerUsed(Duration),
    /// What is left of the budgets that others spend from, too.
    Shared(&'a [Option<Shared>; SHARED]),
    /// The agent shares something with that of another tenant: what, whose it is, and what was done about it.
    Conflict { kind: who::Shared, owner: &'a str, action: Guarded },
    /// The CLI is at the door: what it has spent so far is to be known before it asks.
    Knocks,
    /// The CLI is about to ask the model, and waits until it may: see [`Monitor::claim`] for what has to be told to others before.
    Asks,
    /// It waits no more: it is let through, or, if a budget is used up by now, it will be told that it may not, and does not ask.
    LetThrough,
    /// All that people ask of this agent: said again, it asks for nothing new.
    Ordered(&'a Order),
    /// Somebody wants the agent gone.
    Stop(Stop),
    /// The CLI was reaped; everything that it wrote has been handed in before.
    Exited(Exit),
    /// Nothing but time.
    Timeout,
}

/// Who wants the agent gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// A signal to the wrapper that asks for an end (TERM, INT, HUP, QUIT).
    Signal(Signal),
    /// The reader of the CLI's output is gone: the CLI would go on spending unseen.
    AppGone,
}

/// How the CLI ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    Code(i32),
    Signal(i32),
}

impl Exit {
    pub fn code(self) -> Option<i32> {
        match self {
            Exit::Code(code) => Some(code),
            Exit::Signal(_) => None,
        }
    }

    pub fn signal(self) -> Option<i32> {
        match self {
            Exit::Signal(signal) => Some(signal),
            Exit::Code(_) => None,
        }
    }
}

/// A signal for the CLI, by its number on this platform.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Signal(pub i32);

/// The same numbers on every platform that this runs on.
const SIGINT: Signal = Signal(2);
const SIGKILL: i32 = 9;
const SIGTERM: Signal = Signal(15);
const SIGCONT: Signal = Signal(18);

/// What is to be done or written outside.
#[derive(Clone, Debug, PartialEq)]
pub enum Output {
    Action(Action),
    /// A line for the ledger file.
    Record(Record),
    /// A decision about a limit, for the log.
    Decided(Decision),
    /// It has ended.
    Span(Span),
    Log(LogEvent),
    /// What the app was to say about whom the agent works for, it has said, or it will not: see [`Monitor::who`].
    Known,
}

/// What the supervisor is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Write this line (with its newline) to the CLI's stdin, between two lines of the app; its answer carries `request_id` and has
    /// to be kept from the app. If the app's end was already forwarded, say [`Input::NotInjected`].
    Inject { request_id: String, line: String },
    /// Forward the app's end now.
    CloseStdin,
    /// Send this signal to the CLI itself.
    Signal(Signal),
    /// Kill whatever is left below us: the CLI, its group, its tools in foreign sessions.
    KillAll,
}

/// How long the app's end may be held back for a last answer.
pub const EOF_HOLD: Duration = Duration::from_millis(250);
/// Time in a state is accounted for at least this often, so that counters move during long calls.
const TICK: Duration = Duration::from_secs(5);
/// The `error.type` of what we left open ourselves, and who closed it then: see [`Monitor::last_words`].
const SIDECAR_LOST: &str = "sidecar_lost";
const SUCCESSOR: &str = "successor";
/// We are woken each five seconds: who hears nothing for so long was frozen, or suspended with the machine.
const SLEPT: Duration = Duration::from_secs(60);
/// The wall clock was set, if the clocks are so far apart from how they were: else one is read a moment after the other.
const STEPPED: Duration = Duration::from_secs(1);
/// A process that survives a kill for this long is beyond us.
const UNKILLABLE: Duration = Duration::from_secs(5);

/// For how long the container was there on this agent's account.
#[derive(Debug, Default)]
struct ContainerTime {
    booked: Duration,
    waits: Duration,
}

/// What a wrapper knows before it starts.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Names this run in ids and in the ledger: unguessable, so that no tool output can pass for an answer to us.
    pub nonce: String,
    pub start: Start,
    /// The session id that the command line asks to resume.
    pub resume: Option<String>,
    /// stdout is stream-json or json, and is read.
    pub parse: bool,
    /// stdin is stream-json: the app talks over it, and so can we.
    pub stdin_json: bool,
    /// Ask the CLI for its running totals.
    pub poll: bool,
    /// Its telemetry comes to us.
    pub native: bool,
    pub prices: PriceTable,
    pub rules: Vec<Rule>,
    pub patience: Patience,
    pub max_series: usize,
    pub trace: TraceSettings,
    /// Log events are wanted.
    pub events: bool,
    /// A file that is there while there is a [`Monitor::held_for`], and says why; whoever meets others sees to it.
    pub hold_file: String,
    /// For whom it works, as far as that is known; and what the app is still to say about it.
    pub who: Who,
    pub learn: Learn,
}

impl Default for Settings {
    /// A recording: nobody can be asked, and nobody knows how it was started.
    fn default() -> Settings {
        Settings {
            nonce: String::from("replay"),
            start: Start::Fresh,
            resume: None,
            parse: true,
            stdin_json: true,
            poll: false,
            native: false,
            prices: PriceTable::default(),
            rules: Vec::new(),
            patience: Patience::default(),
            max_series: MAX_SERIES,
            trace: TraceSettings::default(),
            events: false,
            hold_file: String::new(),
            who: Who::default(),
            learn: Learn::default(),
        }
    }
}

/// What is to be reserved for an agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asked {
    /// What an answer may cost, and how many are waited for.
    pub each: Amount,
    pub answers: u64,
    /// Another one for each request.
    pub request: u64,
}

/// Why an agent has to wait.
#[derive(Clone, Debug, PartialEq)]
pub struct HeldFor {
    /// What the app is to hear.
    pub why: String,
    /// The turn that runs is not to ask the model again, either.
    pub now: bool,
}

/// What the CLI asks of the model, where that is waited for.
#[derive(Clone, Copy, Debug, Default)]
struct Requests {
    /// How often it has said that it is about to ask.
    told: u64,
    /// Of those, the ones that no answer has begun for.
    open: u64,
    /// Answers whose price nobody has told yet.
    unpriced: u64,
    /// When it was last seen to begin to ask: what tells requests apart where nobody waits at the door.
    since: Duration,
    /// When one was last let through, and until when the CLI's telemetry has told what was spent: both since the Unix epoch.
    passed: Duration,
    priced: Duration,
}

impl Requests {
    fn let_through(&mut self, turned_back: bool, now: Duration) {
        if turned_back {
            (self.open, self.passed) = (self.open.saturating_sub(1), Duration::ZERO);
        } else {
            self.passed = now;
        }
    }

    fn are_let_through(&self) -> bool {
        !self.passed.is_zero() && self.open + self.unpriced > 0
    }

    /// Whatever was asked for before is told by now.
    fn priced(&mut self, until: Duration, at_door: bool) {
        self.priced = self.priced.max(until);
        if until > self.passed {
            // What it is about to ask for is not among it.
            (self.open, self.unpriced) = (if at_door { self.open } else { self.open.saturating_sub(1) }, 0);
        }
    }
}

/// What the CLI was told to turn away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    Nothing,
    /// Every message.
    All,
    /// Those that come while the file is there.
    WhileHeld,
}

/// The pure heart of a wrapper. See the module's head.
#[derive(Debug)]
pub struct Monitor {
    settings: Settings,
    session: Session,
    judge: Judge,
    asker: Asker,
    ladder: Option<Ladder>,
    outside: Outside,
    vitals: Vitals,
    growth: Growth,
    /// As they were last judged.
    streaks: Streaks,
    /// What it is held up by, if that was told.
    held: Option<Why>,
    stdout: Splitter,
    stdin: Splitter,
    longest: usize,
    truncated: bool,
    stdin_closed: bool,
    /// The session's budget is used up: what the app says next is turned away.
    refusing: bool,
    /// The shared budgets that it waits for.
    holds: Vec<Held>,
    /// The kernel killed the CLI for memory, or somebody of whom nobody knows who it was.
    out_of_memory: bool,
    told: Told,
    order: Order,
    /// The turn that ran when the agent was paused: it may end.
    spared: Option<Duration>,
    /// The most that an answer has cost of late: what the next one may.
    answer: Amount,
    /// What was spent by what is heard of it: of the stream, or by telemetry alone.
    heard: Amount,
    requests: Requests,
    exited: bool,
    pid: Option<u32>,
    spawned_at: Duration,
    conflicts: Vec<who::Shared>,
    container: ContainerTime,
    meters: Meters,
    report: Report,
    timeline: Timeline,
    /// None of these where nobody wants them.
    spans: Option<Box<Spans>>,
    logs: Option<Box<Logs>>,
    recorder: Recorder,
    out: VecDeque<Output>,
    now: Now,
    /// When the monotonic clock was at zero, by the other one; what is told of a moment is to stay as it was told.
    epoch: Duration,
}

impl Monitor {
    /// `replaying`: the bytes are a recording; nothing is known of its start and nothing can be asked.
    pub fn new(settings: Settings, replaying: bool, now: Now) -> Monitor {
        let base = if replaying || settings.start != Start::Fresh { Base::Unknown } else { Base::Zero };
        let can_ask = settings.stdin_json && settings.poll;
        let opening = Opening {
            start: settings.start,
            resume: settings.resume.clone(),
            base,
            eager: !replaying && !can_ask,
            stdin_json: settings.stdin_json,
            blind: !settings.parse,
            live: !replaying,
        };
        let mut meters = Meters::new(settings.max_series);
        meter::at_start(&mut meters);
        let mut recorder = Recorder::new(&settings.nonce);
        recorder.who = settings.who.clone();
        let logs = settings.events.then(|| Box::new(Logs::of(settings.who.clone())));
        Monitor {
            session: Session::new(opening, settings.prices.clone(), now),
            judge: Judge::new(&settings.rules, now.mono),
            asker: Asker::new(&settings.nonce, &settings.hold_file),
            ladder: None,
            outside: Outside::default(),
            vitals: Vitals::default(),
            growth: Growth::default(),
            streaks: Streaks::default(),
            held: None,
            stdout: Splitter::default(),
            stdin: Splitter::default(),
            longest: 0,
            truncated: false,
            stdin_closed: !settings.stdin_json,
            refusing: false,
            holds: Vec::new(),
            out_of_memory: false,
            told: Told::Nothing,
            order: Order::default(),
            spared: None,
            answer: Amount::NONE,
            heard: Amount::NONE,
            requests: Requests::default(),
            exited: false,
            pid: None,
            spawned_at: now.mono,
            conflicts: Vec::new(),
            container: ContainerTime::default(),
            meters,
            report: Report::default(),
            timeline: Timeline::default(),
            spans: settings.trace.on.then(|| Box::new(Spans::new(settings.trace.clone(), settings.who.clone()))),
            logs,
            recorder,
            out: VecDeque::new(),
            now,
            epoch: now.unix.saturating_sub(now.mono),
            settings,
        }
    }

    /// Takes one input. Never fails: what cannot be understood is counted.
    pub fn handle(&mut self, now: Now, input: Input<'_>) {
        // Neither clock may run backwards here, whatever the machine's do.
        let gap = now.mono.saturating_sub(self.now.mono);
        self.now = Now { mono: self.now.mono + gap, unix: now.unix };
        let epoch = self.now.unix.saturating_sub(self.now.mono);
        if epoch.abs_diff(self.epoch) >= STEPPED {
            self.epoch = epoch;
        }
        if gap >= SLEPT {
            self.slept(gap);
        }
        let let_through = matches!(input, Input::LetThrough);
        match input {
            Input::Spawned { pid } => {
                self.pid = Some(pid);
                self.spawned_at = self.now.mono;
                self.spawned();
            }
            Input::Stdout(bytes) => self.stdout(Some(bytes)),
            Input::StdoutEnd => self.stdout(None),
            Input::Stdin(bytes) => self.stdin(bytes),
            Input::StdinEnd => self.stdin_ended(),
            Input::Lost { bytes } => self.fold(Update::Lost { bytes }),
            Input::NotInjected { request_id } => self.not_injected(request_id),
            Input::Native(report) => self.native(report),
            Input::Sample(sample) => self.sampled(sample),
            Input::ContainerUsed(time) => self.container_used(time),
            Input::Shared(shared) => self.shared(shared),
            Input::Knocks => self.knocks(),
            Input::Asks => self.asks(),
            Input::LetThrough => {
                // Judged as one that asks now.
                (self.outside.at_door, self.requests.passed) = (false, Duration::ZERO);
            }
            Input::Ordered(order) => self.ordered(order),
            Input::Conflict { kind, owner, action } => self.conflict(kind, owner, action),
            Input::Stop(stop) => self.stop(stop),
            Input::Exited(exit) => self.exit(exit),
            Input::Timeout => self.session.tick(self.now),
        }
        self.settle();
        if let_through {
            self.requests.let_through(self.held_for().is_some_and(|held| held.now), self.now.unix);
        }
        if let Some(spans) = &mut self.spans {
            self.out.extend(spans.drain().map(Output::Span));
        }
    }

    /// The next thing to do, until there is none.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.out.pop_front()
    }

    /// When [`Input::Timeout`] is due, on the monotonic clock of [`Now`]; `None` when nothing waits.
    pub fn poll_timeout(&self) -> Option<Duration> {
        if self.exited {
            return None;
        }
        let hold = self.asker.eof().map(|since| since + EOF_HOLD);
        let ladder = self.ladder.as_ref().and_then(Ladder::deadline);
        let judge = self.judge.deadline(&self.session, &self.outside, self.now);
        let asker = self.asker.deadline(self.can_ask() && self.ladder.is_none());
        [hold, ladder, judge, asker, Some(self.now.mono + TICK)].into_iter().flatten().min()
    }

    fn settle(&mut self) {
        if self.exited {
            return;
        }
        self.drain_session();
        if self.asks_model() && self.requests.unpriced == 0 {
            self.requests.since = self.session.activity_since();
        }
        for request in self.asker.expire(self.now.mono) {
            self.fold(Update::Asked { request, answered: false });
            if request == OwnRequest::GetUsage {
                self.session.ledger.set_eager(true);
            }
        }
        if self.asker.eof().is_some_and(|since| self.asker.eof_answered() || since + EOF_HOLD <= self.now.mono) {
            self.close_stdin();
        }
        self.judge();
        // It may have been so before anything could be said to the CLI.
        self.tell_refusal();
        // A message that was on its way before the refusal, or a CLI that does not know hooks.
        let spared = self.session.turn().is_none_or(|turn| Some(turn.started) == self.spared);
        let used_up = self.refusing || self.judge.holds().next().is_some();
        let reason = if used_up { ExitReason::Limit } else { ExitReason::Shutdown };
        if (used_up || self.order.paused && !spared)
            && self.ladder.is_none()
            && self.session.turn().is_some_and(|turn| turn.rounds > 0)
        {
            self.begin(Goal::Turn, Scope::Session, reason, Step::Interrupt, SIGTERM, None);
        }
        if let Some(ladder) = &mut self.ladder {
            let (was, since) = (ladder.step, ladder.since);
            if let Some(step) = ladder.climb(self.now.mono) {
                self.fold(Update::StepEnded { step: was, lasted: self.now.mono.saturating_sub(since) });
                self.perform(step);
            }
        }
        if self.can_ask() && self.ladder.is_none() {
            let busy = self.session.subagents_active() + self.session.background_tasks() > 0;
            if let Some(inject) = self.asker.usage(self.now.mono, busy) {
                self.out.push_back(Output::Action(inject));
            }
        }
        self.session.tick(self.now);
        self.drain_session();
    }

    fn drain_session(&mut self) {
        for update in self.session.drain() {
            let turn_ended = matches!(update, Update::TurnEnded { .. });
            self.fold(update);
            if turn_ended
                && self.ladder.as_ref().is_some_and(|ladder| ladder.goal == Goal::Turn)
                && let Some(ladder) = self.ladder.take()
            {
                let lasted = self.now.mono.saturating_sub(ladder.since);
                let enforced = self.enforced(&ladder);
                self.fold(Update::StepEnded { step: ladder.step, lasted });
                self.fold(enforced);
                // One-shot: there is no next turn to live for; its end is on its way.
                if self.stdin_closed && ladder.reason != ExitReason::Shutdown {
                    let mut ladder = ladder;
                    ladder.goal = Goal::Process;
                    ladder.enter(Step::End, self.now.mono);
                    self.ladder = Some(ladder);
                    self.fold(Update::Stopping { step: Step::End });
                }
            }
        }
    }

    /// Apart, so that nobody pays for it who does not want it.
    #[cold]
    fn tell(&mut self, update: &Update) {
        let context = self.spans.as_mut().and_then(|spans| spans.on(update, self.now));
        if let Some(event) = self.logs.as_mut().and_then(|logs| logs.on(update, self.now, context)) {
            self.out.push_back(Output::Log(event));
        }
    }

    fn fold(&mut self, update: Update) {
        match &update {
            Update::Spent(spent) => {
                let amount = Amount::new(spent.cost, spent.tokens.total());
                self.heard = self.heard + amount;
                if !self.settings.parse || !self.by_telemetry() {
                    // One large answer is not remembered for ever.
                    self.answer = amount.max(self.answer.half());
                    self.requests.unpriced = 0;
                }
                self.spent();
            }
            Update::Answering { .. } => {
                self.requests.open = self.requests.open.saturating_sub(1);
                // Of what cannot be asked for, all that can be known is booked with the answer.
                self.requests.unpriced += u64::from(self.can_ask() || self.by_telemetry());
            }
            Update::TurnEnded { .. } => (self.requests.open, self.requests.unpriced) = (0, 0),
            Update::Corrected { usd, tokens, .. } => {
                self.heard = self.heard.saturating_sub(Amount::new(*usd, tokens.total()));
                self.spent();
            }
            _ => {}
        }
        self.meters.set_time(self.now.unix);
        if let Some(spans) = &self.spans {
            self.meters.set_context(spans.context().filter(|context| context.sampled));
        }
        meter::on(&mut self.meters, &self.settings.prices, &update, self.now.unix);
        self.report.on(&update);
        self.timeline.on(&update, &self.settings.prices, self.now.unix);
        if self.spans.is_some() || self.logs.is_some() {
            self.tell(&update);
        }
        let out = &mut self.out;
        self.recorder.on(&update, self.now.unix, |record| out.push_back(Output::Record(record)));
        if let Update::Decided(decision) = update {
            self.out.push_back(Output::Decided(decision));
        }
    }
}

/// Whether a control request's id is one of ours.
pub fn is_own(request_id: &str, nonce: &str) -> bool {
    request_id.strip_prefix(ID_PREFIX).is_some_and(|rest| rest.starts_with(nonce))
}
