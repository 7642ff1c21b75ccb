//! The core's front door: an [`Input`] goes in with the time, [`Output`]s come out, and a deadline says when to come back.
//!
//! The caller (the daemon's dispatcher, `replay`, a test) owns every clock and every descriptor.

mod status;

use std::collections::VecDeque;
use std::time::Duration;

use crate::ask::{Asker, ID_PREFIX, PAUSED_REASON, SHARED_REASON, share_reason};
use crate::budget::Amount;
use crate::content::Piece;
use crate::detect::Streaks;
use crate::detect::memory::Growth;
use crate::detect::why::{Vitals, Why, why};
use crate::event::{Answer, Broken, Event, Message, claude_code};
use crate::ladder::{Goal, Ladder, Patience};
use crate::ledger::Base;
use crate::limit::{Ceiling, Held, Judge, Limit, Mode, Outside, Reached, Rule, SHARED, Scope, Shared, Used, UsedShare};
use crate::line::{Line, Splitter};
use crate::log::Logs;
use crate::meter;
use crate::metric::{COST_RECONCILIATION_ERROR, MAX_SERIES, MEMORY_EXHAUSTION, Meters};
use crate::native;
use crate::order::Order;
use crate::price::PriceTable;
use crate::record::{Record, Recorder};
use crate::report::Report;
use crate::sample::Sample;
use crate::session::{Opening, Reconciliation, Session};
use crate::span::{Spans, TraceSettings, put};
use crate::telemetry::{self, Context, LogEvent, Span};
use crate::timeline::Timeline;
use crate::tokens::Usd;
use crate::update::{Activity, Decision, ExitReason, Outcome, OwnRequest, Start, Step, Update, Wish};
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

    pub fn meters(&self) -> &Meters {
        &self.meters
    }

    /// For what only the outside knows: bytes, scrapes, degraded parts.
    pub fn meters_mut(&mut self) -> &mut Meters {
        &mut self.meters
    }

    pub fn report(&self) -> &Report {
        &self.report
    }

    /// What would have to be told if we ended here, without a word: what is open, closed by whoever comes after us. Nothing if nothing
    /// is under way. What is kept of it must be replaced as things go on.
    pub fn last_words(&self, now: Now) -> (Vec<Span>, Vec<LogEvent>) {
        let at_rest = self.session.turn().is_none() && self.spans.as_ref().is_none_or(|spans| spans.is_idle());
        if self.exited || at_rest {
            return Default::default();
        }
        let mut spans = self.spans.clone();
        let now = Now { mono: now.mono.max(self.now.mono), unix: now.unix };
        let (mut session, mut logs, mut events) = (self.session.clone(), self.logs.clone(), Vec::new());
        // If we are killed, the CLI dies with us.
        session.exited(ExitReason::Signal, Exit::Signal(SIGKILL), false, now);
        for update in session.drain() {
            let context = spans.as_mut().and_then(|spans| spans.on(&update, now));
            events.extend(logs.as_mut().and_then(|logs| logs.on(&update, now, context)));
        }
        let mut open: Vec<Span> = Vec::new();
        if let Some(spans) = &mut spans {
            spans.finish(now);
            open.extend(spans.drain());
        }
        for span in &mut open {
            put(&mut span.attributes, "error.type", SIDECAR_LOST);
            put(&mut span.attributes, "claude_agent.closed_by", SUCCESSOR);
            span.status = telemetry::Status::Error(String::from(SIDECAR_LOST));
        }
        for event in &mut events {
            put(&mut event.attributes, "claude_agent.closed_by", SUCCESSOR);
        }
        (open, events)
    }

    /// The span of the turn that runs: what an exemplar points at.
    pub fn context(&self) -> Option<Context> {
        self.spans.as_ref().and_then(|spans| spans.context())
    }

    /// What the CLI is to find as its `TRACEPARENT`, if anything: see [`crate::span`].
    pub fn child_context(&self) -> Option<Context> {
        self.settings.trace.child_context()
    }

    /// Spans, and events of spans, that did not fit.
    pub fn spans_dropped(&self) -> u64 {
        self.spans.as_ref().map_or(0, |spans| spans.dropped())
    }

    /// For whom the agent works, as far as that is known by now.
    pub fn who(&self) -> &Who {
        &self.settings.who
    }

    pub fn activity(&self) -> Activity {
        self.session.activity()
    }

    /// What happened lately.
    pub fn timeline(&self) -> &Timeline {
        &self.timeline
    }

    /// A moment of the monotonic clock by the other one, to the millisecond.
    fn unix_of(&self, mono: Duration) -> f64 {
        ((self.epoch + mono).as_secs_f64() * 1e3).round() / 1e3
    }

    /// What the agent is about, or held up by.
    pub fn why(&self) -> Why {
        why(&self.session.doing(self.outside.input_over, self.now), &self.vitals)
    }

    /// Whether the agent works: then it is worth while to look at its connections.
    pub fn works(&self) -> bool {
        self.settings.parse && self.session.activity().is_work()
    }

    /// How far each limit is used up.
    pub fn limits(&self) -> Vec<Used> {
        self.judge.used(&self.session, &self.outside, self.now)
    }

    /// What this run has cost so far, by confirmations and live totals.
    pub fn cost(&self) -> Usd {
        self.report.totals().cost_usd
    }

    /// Whether this agent has to wait: for a shared budget, or for people.
    pub fn held(&self) -> bool {
        self.held_for().is_some()
    }

    /// The same, and why: what the app is to hear.
    pub fn held_for(&self) -> Option<HeldFor> {
        let why = match self.exited {
            true => None,
            false if self.order.paused => Some(PAUSED_REASON.to_owned()),
            // A budget that is used up is so whoever shares it.
            false => self.judge.holds().min_by_key(|held| held.share.is_some()).map(|held| match held.share {
                None => SHARED_REASON.to_owned(),
                Some(UsedShare { used, of, tenant }) => {
                    let numbers = match held.limit {
                        Limit::Tokens => format!("{used} of {of} tokens"),
                        _ => format!("{used:.2} of {of:.2} USD"),
                    };
                    let whose = if tenant { ", with the tenant's other agents" } else { "" };
                    share_reason(held.scope.in_words(), &format!("{numbers}{whose}"))
                }
            }),
        };
        Some(HeldFor { why: why?, now: self.judge.holds().next().is_some() })
    }

    /// The budgets that it waits for, each once.
    pub fn waits(&self) -> Vec<Scope> {
        let mut waits: Vec<Scope> = self.judge.holds().filter(|_| !self.exited).map(|held| held.scope).collect();
        waits.sort_unstable();
        waits.dedup();
        waits
    }

    /// What this process has spent; and, while the model is asked or an answer's price is not known yet, what that may be.
    pub fn claim(&self) -> (Amount, Option<Asked>) {
        let Requests { told, open, unpriced, since, .. } = self.requests;
        let asks = self.asks_model();
        // What is being written is not priced yet. Whoever was let through asks, whatever is told to it then.
        let begins = open.max(u64::from(asks && unpriced == 0 && self.ladder.is_none()));
        let answers = if self.exited { 0 } else { begins + unpriced };
        // What is asked for keeps its place until it is priced, whatever comes after it.
        let request = if told > 0 { told } else { u64::try_from(since.as_nanos()).unwrap_or(u64::MAX) };
        (self.outside.spent, (answers > 0).then_some(Asked { each: self.answer, answers, request }))
    }

    fn asks_model(&self) -> bool {
        self.session.turn().is_some()
            && matches!(self.session.activity(), Activity::Model | Activity::RetryBackoff | Activity::Compacting)
    }

    /// What an answer has cost of late, if there was any.
    pub fn answer(&self) -> Amount {
        self.answer
    }

    /// Whether the CLI still has to say what it has spent: it was asked, and answers at once.
    pub fn awaits_totals(&self) -> bool {
        !self.exited && self.asker.asks_usage()
    }

    /// The same of one that cannot be asked, and says it in its own time.
    pub fn awaits_telemetry(&self) -> bool {
        let Requests { passed, priced, .. } = self.requests;
        !self.exited && self.by_telemetry() && priced <= passed && !passed.is_zero()
    }

    /// Whether only the CLI's telemetry says at once what an answer has cost. It may have been told to be silent: who has said nothing
    /// by its second request will not; and who does not knock has nobody who waits for it.
    fn by_telemetry(&self) -> bool {
        let may_yet = (1..=2).contains(&self.requests.told);
        self.settings.native && !self.can_ask() && (self.session.native_heard() || may_yet)
    }

    /// Whether the next answers may use up a shared budget, or nobody knows yet that they may not.
    pub fn may_be_near(&self) -> bool {
        !self.exited && self.judge.may_be_near()
    }

    /// Whether it waits at the door for what others may need of a shared budget.
    pub fn waits_for_others(&self) -> bool {
        !self.exited && self.judge.waits_for_others()
    }

    /// Whether what is its own of shared budgets is to be kept for it: it has something to do, and may do it.
    pub fn claims(&self) -> bool {
        !self.exited && !self.order.paused && self.session.turn().is_some() && self.session.activity().is_work()
    }

    /// Whether the CLI's telemetry said anything.
    pub fn native_heard(&self) -> bool {
        self.session.native_heard()
    }

    /// What the stream and the CLI's telemetry say was spent, where both are read: compare them when the CLI has ended.
    pub fn reconciliation(&self) -> Option<Reconciliation> {
        self.session.reconciliation()
    }

    /// Whether there is a CLI still.
    pub fn running(&self) -> bool {
        !self.exited
    }

    /// The CLI's pid, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.pid.filter(|_| !self.exited)
    }

    /// Whether the agent can still be recovered: not when even a kill did not end it.
    pub fn live(&self) -> bool {
        !self.ladder.as_ref().is_some_and(|ladder| {
            ladder.step == Step::Kill
                && self.now.mono.saturating_sub(ladder.decided) > self.settings.patience.whole() + UNKILLABLE
        })
    }

    /// Whether the agent takes work: it runs and is not on its way out.
    pub fn ready(&self) -> bool {
        !self.exited
            && (self.session.spoke() || self.settings.stdin_json || !self.settings.parse)
            && !self.ladder.as_ref().is_some_and(|ladder| ladder.goal == Goal::Process)
    }

    /// Whether a limit, rather than a signal or the agent itself, ended the process.
    pub fn stopped_by_limit(&self) -> bool {
        self.ladder.as_ref().is_some_and(|ladder| {
            matches!(ladder.reason, ExitReason::Limit | ExitReason::Idle | ExitReason::Stuck) && ladder.goal == Goal::Process
        })
    }

    // ---- inputs

    fn spawned(&mut self) {
        self.session.another(self.now);
        self.drain_session();
        self.fold(Update::ProcessStarted);
        if !self.settings.stdin_json {
            self.outside.input_over = Some(self.now.mono);
            self.outside.fed_at = Some(self.now.mono);
            if self.settings.parse {
                self.session.prompted(self.now);
            }
        }
    }

    /// Limits on silence start over where they were. Those on wall clocks go on: they are about the clock.
    fn slept(&mut self, gap: Duration) {
        self.session.slept(gap);
        self.vitals.slept(gap);
        self.outside.frozen_since = self.vitals.frozen_since();
        for since in [&mut self.outside.input_over, &mut self.outside.fed_at, &mut self.outside.resumed_at].into_iter().flatten()
        {
            *since += gap;
        }
    }

    fn stdout(&mut self, bytes: Option<&[u8]>) {
        let mut splitter = std::mem::take(&mut self.stdout);
        let mut take = |line: Line<'_>| self.line(line);
        match bytes {
            Some(bytes) => splitter.push(bytes, &mut take),
            None => splitter.finish(&mut take),
        }
        self.stdout = splitter;
    }

    fn line(&mut self, line: Line<'_>) {
        let (bytes, whole) = match line {
            Line::Whole(bytes) => (bytes, true),
            Line::Unterminated(bytes) => (bytes, false),
            Line::TooLong => return self.unread(Broken::TooLong),
        };
        if bytes.len() > self.longest {
            self.longest = bytes.len();
            self.fold(Update::LongestLine { bytes: bytes.len() });
        }
        let told = self.content(bytes);
        self.understand(bytes, whole);
        if let Some(spans) = &mut self.spans {
            told.into_iter().for_each(|piece| spans.say(piece));
        }
    }

    /// What may be told of a line's content. Of a call that ends with it, that is told now: then there is still a span for it.
    fn content(&mut self, line: &[u8]) -> Vec<Piece> {
        let (gates, Some(spans)) = (&self.settings.trace.gates, &mut self.spans) else { return Vec::new() };
        if !gates.any() {
            return Vec::new();
        }
        let (ends, rest): (Vec<Piece>, Vec<Piece>) =
            gates.of_cli(line).into_iter().partition(|piece| matches!(piece, Piece::Output { .. }));
        ends.into_iter().for_each(|piece| spans.say(piece));
        rest
    }

    fn understand(&mut self, bytes: &[u8], whole: bool) {
        // With `--output-format json --verbose` one line is a list of messages.
        if bytes.trim_ascii_start().first() == Some(&b'[') {
            match claude_code::parse_array(bytes) {
                Ok(messages) => {
                    self.truncated |= matches!(messages.last(), Some(Err(Broken::Truncated)));
                    messages.into_iter().for_each(|message| self.heard(message));
                }
                Err(broken) => self.broken(broken, whole),
            }
            return;
        }
        match claude_code::parse_stdout(bytes) {
            Ok(message) => self.heard(Ok(message)),
            Err(broken) => self.broken(broken, whole),
        }
    }

    fn broken(&mut self, broken: Broken, whole: bool) {
        if !whole {
            self.truncated = true;
        }
        self.unread(if whole { broken } else { Broken::Truncated });
    }

    fn unread(&mut self, broken: Broken) {
        self.fold(Update::Unread { reason: broken.as_str(), count: 1 });
    }

    fn heard(&mut self, message: Result<Message, Broken>) {
        let message = match message {
            Ok(message) => message,
            Err(broken) => return self.unread(broken),
        };
        let kind = message.event.kind();
        if message.misshapen > 0 {
            self.fold(Update::Unread { reason: "field", count: u64::from(message.misshapen) });
        }
        let mut own = false;
        if let Event::ControlResponse { id, answer, .. } = &message.event {
            own = is_own(id, &self.settings.nonce);
            if let Some(request) = self.asker.answered(id) {
                self.fold(Update::Asked { request, answered: true });
                if request == OwnRequest::GetUsage {
                    // One that knows no totals, or not this question, has no more to say than its answers.
                    self.session.ledger.set_eager(self.stdin_closed || !matches!(answer, Answer::Usage { .. }));
                }
            }
        }
        if !own && is_protocol(&message.event) {
            self.asker.cli_spoke();
        }
        let asks = asks_money(&message.event);
        if !own {
            self.session.stuck(false, self.now);
        }
        let unknown = match &message.event {
            Event::Unknown { kind, subtype } => {
                Some(subtype.as_ref().map_or_else(|| kind.clone(), |sub| format!("{kind}/{sub}")))
            }
            _ => None,
        };
        self.session.hear(message, own, self.now);
        self.drain_session();
        // A whole circle may come in one read.
        let streaks = self.session.streaks();
        if std::mem::replace(&mut self.streaks, streaks) != streaks {
            self.judge();
        }
        // After the session has its name, so that it is counted there.
        self.fold(unknown.map_or(Update::Heard { kind }, |kind| Update::Unknown { kind }));
        if asks {
            self.asker.want_usage();
        }
    }

    fn stdin(&mut self, bytes: &[u8]) {
        let mut splitter = std::mem::take(&mut self.stdin);
        splitter.push(bytes, &mut |line| {
            let Line::Whole(bytes) = line else { return };
            if !self.asker.app_spoke() {
                // Totals before the first answer tell where a resumed session began.
                self.asker.first_line();
            }
            let message = claude_code::parse_stdin(bytes);
            // Before anything is spent on it.
            self.learn(bytes, message.as_ref().is_ok_and(|message| matches!(message.event, Event::User(_))));
            if let Ok(message) = message {
                if self.outside.fed_at.is_none() && matches!(message.event, Event::User(_)) {
                    self.outside.fed_at = Some(self.now.mono);
                }
                self.session.overhear(message, self.now);
                self.drain_session();
                if let Some(spans) = &mut self.spans
                    && let Some(piece) = self.settings.trace.gates.of_app(bytes)
                {
                    spans.say(piece);
                }
            }
        });
        self.stdin = splitter;
    }

    fn learn(&mut self, line: &[u8], is_message: bool) {
        if self.settings.learn.is_over() {
            return;
        }
        let over = self.settings.learn.read(line, is_message, &mut self.settings.who);
        self.learnt(over);
    }

    fn learnt(&mut self, over: bool) {
        let who = &self.settings.who;
        if *who != self.recorder.who {
            self.recorder.who.clone_from(who);
            if let Some(logs) = &mut self.logs {
                logs.who.clone_from(who);
            }
            if let Some(spans) = &mut self.spans {
                spans.who.clone_from(who);
            }
        }
        if over {
            self.out.push_back(Output::Known);
        }
    }

    fn conflict(&mut self, kind: who::Shared, owner: &str, action: Guarded) {
        if !self.conflicts.contains(&kind) {
            self.conflicts.push(kind);
            self.fold(Update::TenantConflict { kind, owner: owner.to_owned(), action });
        }
    }

    fn stdin_ended(&mut self) {
        let over = self.settings.learn.end();
        self.learnt(over);
        self.outside.input_over = Some(self.now.mono);
        // One more question while it can be asked; a stop under way keeps the line open for itself.
        if self.can_ask()
            && let Some(inject) = self.asker.last_usage(self.now.mono)
        {
            self.out.push_back(Output::Action(inject));
            return;
        }
        self.close_stdin();
    }

    fn close_stdin(&mut self) {
        if !self.stdin_closed {
            self.stdin_closed = true;
            self.asker.eof_forwarded();
            self.session.ledger.set_eager(true);
            self.out.push_back(Output::Action(Action::CloseStdin));
        }
    }

    fn not_injected(&mut self, id: &str) {
        self.stdin_closed = true;
        self.session.ledger.set_eager(true);
        if let Some(request) = self.asker.answered(id) {
            self.fold(Update::Asked { request, answered: false });
            let asked_to_stop = matches!(request, OwnRequest::Interrupt | OwnRequest::EndSession);
            if let Some(ladder) = self.ladder.as_mut().filter(|_| asked_to_stop) {
                ladder.enter(Step::Terminate, self.now.mono);
                self.perform(Step::Terminate);
            }
        }
    }

    fn native(&mut self, report: &native::Report) {
        let before = self.session.told_natively();
        self.session.native(report, self.now);
        self.drain_session();
        let more = self.session.told_natively().saturating_sub(before);
        if !more.is_zero() && self.by_telemetry() {
            self.answer = more.max(self.answer.half());
        }
        if let Some(until) = report.priced_until().filter(|_| self.by_telemetry()) {
            self.requests.priced(until, self.outside.at_door);
        }
        self.spent();
    }

    /// The stream of a run that cannot be asked has only part of it before the end.
    fn spent(&mut self) {
        self.outside.spent = self.heard.max(self.session.told_natively());
        self.outside.answer = self.answer;
    }

    fn sampled(&mut self, sample: &Sample) {
        self.outside.memory_bytes = sample.working_set();
        self.out_of_memory |= sample.oom_unknown > 0;
        for victim in &sample.oom_victims {
            self.out_of_memory |= victim.role == "cli";
            self.fold(Update::OomKilled { role: victim.role, memory_bytes: victim.memory_bytes });
        }
        sample.measure(&mut self.meters);
        self.vitals.sampled(sample, self.now.mono);
        self.foresee(sample);
        self.outside.frozen_since = self.vitals.frozen_since();
        self.hold(Some(self.why()));
    }

    fn foresee(&mut self, sample: &Sample) {
        let chosen = self.settings.rules.iter().find_map(|rule| match (rule.limit, rule.ceiling) {
            (Limit::Memory, Ceiling::Bytes(bytes)) if rule.mode != Mode::Off => Some(bytes),
            _ => None,
        });
        let Some(bytes) = sample.working_set() else { return };
        let limit = [chosen, sample.container.limit_bytes].into_iter().flatten().min();
        self.growth.sampled(self.now.mono, bytes, limit);
        self.outside.memory_left = self.growth.left();
        match self.growth.left() {
            Some(left) => self.meters.set(&MEMORY_EXHAUSTION, &[], (self.now.unix + left).as_secs_f64()),
            None => self.meters.clear(&MEMORY_EXHAUSTION),
        }
    }

    fn container_used(&mut self, time: Duration) {
        self.container.waits += time;
        // Who is still to say for whom it works shall pay for the beginning, too.
        if self.settings.learn.is_over() {
            self.book_container();
        }
    }

    fn book_container(&mut self) {
        let time = std::mem::take(&mut self.container.waits);
        if time.is_zero() {
            return;
        }
        // Of the whole, so that nothing is lost in the rounding.
        let before = self.settings.prices.container(self.container.booked);
        self.container.booked += time;
        let cost = self.settings.prices.container(self.container.booked) - before;
        self.fold(Update::ContainerUsed { session: self.session.id().to_owned(), time, cost });
    }

    fn shared(&mut self, shared: &[Option<Shared>; SHARED]) {
        let before = std::mem::replace(&mut self.outside.shared, *shared);
        for rule in self.settings.rules.clone().iter().filter(|rule| rule.mode != Mode::Off) {
            let Some((at, old)) = rule.scope.shared().and_then(|at| Some((at, before[at]?))) else { continue };
            // What was raised before anybody told of it was not raised now.
            let raised = match rule.limit {
                Limit::Tokens => shared[at].is_some_and(|new| new.raised.tokens > old.raised.tokens),
                _ => shared[at].is_some_and(|new| new.raised.usd > old.raised.usd),
            };
            if raised {
                self.was_told(Wish::Raise, Some((rule.limit, rule.scope, self.outside.ceiling(rule))));
            }
        }
        meter::budgets(&mut self.meters, &self.settings.rules, &self.outside);
        meter::waiting(&mut self.meters, &self.settings.rules, &self.holds);
    }

    /// Asked at each of its doors, it has at most one request for each of its threads.
    fn asks(&mut self) {
        self.requests.told += 1;
        self.requests.open = (self.requests.open + 1).min(1 + self.session.subagents_active() as u64);
        self.outside.at_door = true;
    }

    /// What it has spent so far comes with the answer, and all that it said before comes before that.
    fn knocks(&mut self) {
        if self.can_ask() {
            self.inject(OwnRequest::GetUsage);
        }
    }

    fn ordered(&mut self, order: &Order) {
        let before = std::mem::replace(&mut self.order, *order);
        (self.outside.raised, self.outside.paused) = (order.raised, order.paused);
        if before.paused != order.paused {
            self.spared = self.session.turn().filter(|_| order.paused).map(|turn| turn.started);
            self.outside.resumed_at = (!order.paused).then_some(self.now.mono);
            self.was_told(if order.paused { Wish::Pause } else { Wish::Resume }, None);
        }
        for (limit, ceiling) in order.raised.each() {
            if !before.raised.each().any(|before| before == (limit, ceiling)) {
                self.was_told(Wish::Raise, Some((limit, Scope::Session, ceiling)));
            }
        }
        if order.interrupts > before.interrupts {
            // What is paused at once is asked for one thing.
            if order.paused == before.paused {
                self.was_told(Wish::Interrupt, None);
            }
            self.begin(Goal::Turn, Scope::Session, ExitReason::Shutdown, Step::Interrupt, SIGTERM, None);
        }
        if order.stop && !before.stop {
            self.was_told(Wish::Stop, None);
            self.stop(Stop::Signal(SIGTERM));
        }
    }

    fn was_told(&mut self, order: Wish, raised: Option<(Limit, Scope, f64)>) {
        let session = self.session.id().to_owned();
        let (limit, scope, ceiling) = (raised.map(|one| one.0), raised.map(|one| one.1), raised.map(|one| one.2));
        self.fold(Update::Ordered { session, order, limit, scope, ceiling });
    }

    /// Tells what the agent is held up by, and when it is so no longer.
    fn hold(&mut self, why: Option<Why>) {
        let why = why.filter(|why| why.stall().is_some());
        let before = std::mem::replace(&mut self.held, why);
        if before != why {
            for (why, on) in [(before, false), (why, true)] {
                if let Some(kind) = why.and_then(Why::stall) {
                    self.fold(Update::Stalled { kind, on, why });
                }
            }
        }
    }

    fn stop(&mut self, stop: Stop) {
        let signal = match stop {
            Stop::Signal(signal) => signal,
            Stop::AppGone => SIGTERM,
        };
        let first = if self.can_inject() { Step::End } else { Step::Terminate };
        self.begin(Goal::Process, Scope::Session, ExitReason::Shutdown, first, signal, None);
    }

    fn exit(&mut self, exit: Exit) {
        self.book_container();
        let reason = match (&self.ladder, exit) {
            (Some(ladder), _) => ladder.reason,
            // A shell around the CLI says it with a code. That a tool was killed before is no reason to think so of the CLI.
            (None, Exit::Signal(SIGKILL) | Exit::Code(137)) if self.out_of_memory => ExitReason::Oom,
            (None, Exit::Signal(_) | Exit::Code(129 | 130 | 143)) => ExitReason::Signal,
            (None, Exit::Code(0)) => ExitReason::Clean,
            (None, Exit::Code(_)) if !self.session.spoke() && self.settings.parse => ExitReason::InitFailed,
            (None, Exit::Code(_)) => ExitReason::Error,
        };
        self.session.exited(reason, exit, self.truncated, self.now);
        self.drain_session();
        self.exited = true;
        if let Some(ladder) = &self.ladder {
            let (step, since) = (ladder.step, ladder.since);
            let enforced = self.enforced(ladder);
            self.fold(Update::StepEnded { step, lasted: self.now.mono.saturating_sub(since) });
            self.fold(enforced);
        }
        for request in self.asker.give_up() {
            self.fold(Update::Asked { request, answered: false });
        }
        if let Some(spans) = &mut self.spans {
            spans.finish(self.now);
        }
        if let Some(Reconciliation { stream, native }) = self.session.reconciliation() {
            self.meters.add_usd(&COST_RECONCILIATION_ERROR, &["over"], stream.saturating_sub(native));
            self.meters.add_usd(&COST_RECONCILIATION_ERROR, &["under"], native.saturating_sub(stream));
        }
    }

    // ---- after each input

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

    /// Holds the limits against the facts, and does what that calls for.
    fn judge(&mut self) {
        self.outside.let_through = !self.outside.at_door && self.requests.are_let_through();
        self.outside.can_refuse = self.can_inject();
        let mut told = Vec::new();
        let reached = self.judge.judge(&self.session, &self.outside, self.now, &mut told);
        for mut update in told {
            // Only now and then is there something to tell.
            match &mut update {
                Update::Decided(decision) if decision.limit.asks_why() => decision.why = Some(self.why()),
                Update::Stalled { why, on: true, .. } => *why = Some(self.why()),
                _ => {}
            }
            self.fold(update);
        }
        for reached in reached {
            self.reached(&reached);
        }
        // Somebody may have raised it.
        self.refusing &= self.judge.refuses();
        let holds: Vec<Held> = self.judge.holds().collect();
        if holds != self.holds {
            self.holds = holds;
            meter::waiting(&mut self.meters, &self.settings.rules, &self.holds);
        }
    }

    /// Has the CLI turn away what it should.
    fn tell_refusal(&mut self) {
        let wanted = match self.told {
            _ if self.refusing => Told::All,
            Told::All => Told::WhileHeld,
            // In time for what is to stop it at a tool's end.
            Told::Nothing if self.held() || self.judge.is_near() => Told::WhileHeld,
            told => told,
        };
        if wanted != self.told && self.can_inject() {
            self.told = wanted;
            self.inject(if wanted == Told::All { OwnRequest::Refuse } else { OwnRequest::Hold });
        }
    }

    fn reached(&mut self, Reached { rule, .. }: &Reached) {
        if rule.mode != Mode::Enforce {
            return;
        }
        let reason = match rule.limit {
            Limit::Idle => ExitReason::Idle,
            Limit::Startup | Limit::Stall | Limit::Result => ExitReason::Stuck,
            Limit::Turns
            | Limit::CostUsd
            | Limit::Tokens
            | Limit::Duration
            | Limit::Memory
            | Limit::MemoryForecast
            | Limit::IdenticalCalls
            | Limit::AlternatingCalls
            | Limit::SameErrors
            | Limit::Compactions
            | Limit::FanOut
            | Limit::NoProgress => ExitReason::Limit,
        };
        if rule.stall().is_some() && reason == ExitReason::Stuck {
            self.session.stuck(true, self.now);
        }
        if rule.limit == Limit::Idle {
            self.fold(Update::IdleShutdown);
        }
        if rule.refuses() && self.can_inject() {
            self.refuse(rule, reason);
            return;
        }
        // Where nothing can be said to the CLI, its process is all that can be ended.
        let first = if self.settings.parse { rule.first_step() } else { rule.first_step().max(Step::End) };
        let goal = if first == Step::Interrupt { Goal::Turn } else { Goal::Process };
        self.begin(goal, rule.scope, reason, first, SIGTERM, self.outside.spending(rule));
    }

    /// A budget of the session is used up: the turn ends with a result, and the CLI turns away what the app says next, with one too.
    fn refuse(&mut self, rule: &Rule, reason: ExitReason) {
        self.refusing |= !rule.is_shared();
        self.tell_refusal();
        // It waits to have its message turned away: an interrupt would take the reason from it.
        if rule.is_shared() && self.requests.open > 0 && self.session.turn().is_some_and(|turn| turn.rounds == 0) {
            return;
        }
        self.begin(Goal::Turn, rule.scope, reason, Step::Interrupt, SIGTERM, self.outside.spending(rule));
    }

    fn begin(&mut self, goal: Goal, scope: Scope, reason: ExitReason, first: Step, signal: Signal, ceiling: Option<Usd>) {
        // Who is already on the way out is not asked more gently.
        if self.ladder.as_ref().is_some_and(|ladder| ladder.step >= first && ladder.goal == Goal::Process) {
            return;
        }
        if goal == Goal::Turn && (self.session.turn().is_none() || self.ladder.is_some()) {
            return;
        }
        let mut ladder = Ladder::new(goal, scope, reason, first, signal, self.settings.patience, self.now.mono);
        ladder.ceiling = ceiling;
        if let Some(before) = &self.ladder {
            // The first reason is the reason.
            if before.reason != ExitReason::Shutdown {
                ladder.reason = before.reason;
            }
        }
        if reason != ExitReason::Shutdown {
            self.session.stop_as(if reason == ExitReason::Stuck { Outcome::StuckKilled } else { Outcome::LimitStopped });
        }
        if goal == Goal::Process {
            self.session.stopping(self.now);
        }
        self.ladder = Some(ladder);
        self.perform(first);
    }

    fn perform(&mut self, step: Step) {
        self.fold(Update::Stopping { step });
        let Some(ladder) = &self.ladder else { return };
        let (signal, goal) = (ladder.signal, ladder.goal);
        if goal == Goal::Process {
            self.session.stopping(self.now);
        }
        // Who is stopped hears nothing else.
        if self.outside.frozen_since.is_some() && step != Step::Kill {
            self.signal(SIGCONT);
        }
        match step {
            Step::Warn | Step::Refuse => {}
            Step::Interrupt if self.can_inject() => self.inject(OwnRequest::Interrupt),
            // One-shot: an interrupt by signal gives a result in most states, and ends the process.
            Step::Interrupt => self.signal(SIGINT),
            Step::End if self.can_inject() => {
                // Both in one breath: the totals as they are, then the end.
                self.inject(OwnRequest::GetUsage);
                self.inject(OwnRequest::EndSession);
            }
            Step::End if self.settings.parse => self.signal(SIGINT),
            Step::End | Step::Terminate => {
                if let Some(ladder) = &mut self.ladder {
                    ladder.enter(Step::Terminate, self.now.mono);
                }
                self.signal(signal);
            }
            Step::Kill => self.out.push_back(Output::Action(Action::KillAll)),
        }
    }

    fn signal(&mut self, signal: Signal) {
        self.out.push_back(Output::Action(Action::Signal(signal)));
    }

    fn inject(&mut self, request: OwnRequest) {
        let inject = self.asker.ask(request, self.now.mono);
        self.out.push_back(Output::Action(inject));
    }

    fn can_inject(&self) -> bool {
        self.settings.stdin_json && self.settings.parse && !self.stdin_closed && self.asker.may_speak()
    }

    fn can_ask(&self) -> bool {
        self.settings.poll && self.can_inject()
    }

    fn enforced(&self, ladder: &Ladder) -> Update {
        let spent = match self.outside.spent_by_all(ladder.scope) {
            Some(all) => all.usd,
            None => self.session.cost().max(self.report.current().map_or(Usd::ZERO, |session| session.sums.cost_usd)),
        };
        Update::Enforced {
            scope: ladder.scope,
            step: ladder.step,
            latency: self.now.mono.saturating_sub(ladder.decided),
            overshoot: ladder.ceiling.map(|ceiling| spent.saturating_sub(ceiling)),
        }
    }

    // ---- folds

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

/// What only the CLI says, and no echo of what the app said.
fn is_protocol(event: &Event) -> bool {
    matches!(
        event,
        Event::Init(_)
            | Event::Status { .. }
            | Event::Stream(_)
            | Event::Result(_)
            | Event::SessionState { .. }
            | Event::HookStarted { .. }
            | Event::ControlResponse { .. }
    )
}

/// Whether money may have moved, so that a question is worth asking.
fn asks_money(event: &Event) -> bool {
    use crate::event::Stream;
    matches!(
        event,
        Event::Result(_)
            | Event::Assistant(_)
            | Event::User(_)
            | Event::Stream(Stream::MessageStop)
            | Event::TaskUpdated { .. }
            | Event::TaskEnded { .. }
            | Event::TaskProgress { .. }
            | Event::Compacted { .. }
    )
}

/// Whether a control request's id is one of ours.
pub fn is_own(request_id: &str, nonce: &str) -> bool {
    request_id.strip_prefix(ID_PREFIX).is_some_and(|rest| rest.starts_with(nonce))
}
