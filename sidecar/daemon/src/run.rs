//! `run`: everything is built and bound, then the CLI is started.

use std::ffi::OsString;
use std::io::IsTerminal;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Duration;

use agent_sidecar_core::ask::ID_PREFIX;
use agent_sidecar_core::detect::why::Why;
use agent_sidecar_core::launch::{Launch, Mode};
use agent_sidecar_core::limit::{Ceiling, Limit, Mode as LimitMode, Rule, Scope};
use agent_sidecar_core::metric;
use agent_sidecar_core::record::Fact;
use agent_sidecar_core::update::ExitReason;
use agent_sidecar_core::{Input, Monitor, Output, Settings};

use crate::busy;
use crate::config::Config;
use crate::export::otlp;
use crate::export::otlp::pipeline::Pipeline;
use crate::http::{self, Scrapes, Site};
use crate::hub::{Guest, NoSeat, Payer, Place, Seat, Share, Teller, Turn};
use crate::lines::{LineFile, Use};
use crate::receive::{self, Decision, Plan, Receiver, Surroundings};
use crate::sample::{self, Sampler};
use crate::supervise::{self, BeforeExit, Clock, Ending, Failure, Handle, Job, LastWords, Supervisor};
use crate::telemetry::{self, Telemetry};

/// What the CLI itself exits with after an error.
const CUT_SHORT: u8 = 1;
/// What the CLI had sent before its end is read within this; a connection that a tool holds open ends the wait.
const SETTLE: Duration = Duration::from_millis(250);
/// What is still to be forwarded then has this long: less than the CLI itself would wait for a collector that hangs.
const FORWARD: Duration = Duration::from_secs(1);

/// A disk that has not answered for so long hangs; on a machine that does much else, one that does not may take seconds.
const HANGS: Duration = Duration::from_secs(5);

/// What to start.
pub(crate) struct Agent {
    pub(crate) program: OsString,
    /// What the program finds as its own name, if not `program`.
    pub(crate) arg0: Option<OsString>,
    /// The command line as it is to be understood, a name for the program included.
    pub(crate) argv: Vec<OsString>,
    /// More for its environment.
    pub(crate) env: Vec<(OsString, OsString)>,
    /// The configuration had mistakes, and holds what could be read.
    pub(crate) mistaken: bool,
}

impl Agent {
    /// A command, as it was typed.
    pub(crate) fn command(argv: Vec<OsString>) -> Agent {
        let program = argv.first().cloned().unwrap_or_default();
        Agent { program, arg0: None, argv, env: Vec::new(), mistaken: false }
    }
}

/// Runs a command to its end, and says what to exit with.
pub(crate) fn run(config: &Config, agent: Agent) -> Result<u8, Failure> {
    let argv = agent.argv;
    let launch = Launch::of(&argv, std::io::stdin().is_terminal(), std::io::stdout().is_terminal());
    let rules = judged(config.rules(), &launch);
    let argv = match native_turns(&rules).filter(|_| launch.asks_model) {
        Some(turns) => launch.with_max_turns(&argv, turns),
        None => argv,
    };
    let nonce = format!("{:016x}", supervise::random());
    let telemetry = Telemetry::plan(config, launch.asks_model, &nonce);
    let place = config.meeting().map(|meeting| within(Duration::ZERO, move || Place::find(&meeting)).flatten());
    // Who only asks for a version takes nobody's place.
    let seat = if launch.asks_model { seat(config, place.as_ref(), &nonce)? } else { None };
    // Only now: who waits for a seat serves nobody.
    let turn = turn(config, place);
    let settings = Settings {
        nonce: nonce.clone(),
        start: launch.start,
        resume: launch.resume.clone(),
        parse: matches!(launch.mode, Mode::Parse { .. }),
        stdin_json: launch.mode == Mode::Parse { stdin_json: true },
        poll: config.poll(),
        prices: config.prices.clone(),
        rules,
        patience: config.patience(),
        max_series: config.max_series(),
        trace: telemetry.trace_settings(),
        events: telemetry.wants_events() || config.events().is_some(),
        hold_file: turn.hold_file(&nonce),
    };
    let clock = Clock::start();
    let mut monitor = Monitor::new(settings, false, clock.now());
    let meters = monitor.meters_mut();
    telemetry.prepare(meters);
    meters.set(&metric::BUILD_INFO, &[env!("CARGO_PKG_VERSION")], 1.0);
    if agent.mistaken {
        meters.set(&metric::DEGRADED, &["config"], 1.0);
    }
    meters.set(&metric::CONFIG_INFO, &[&config.fingerprint()], 1.0);
    meters.set(&metric::IDLE_TIMEOUT, &[], config.idle_timeout().unwrap_or_default().as_secs_f64());

    meters.set(&metric::DEGRADED, &["hub"], f64::from(u8::from(matches!(turn, Meet::Nowhere))));
    let alone = !matches!(turn, Meet::At(_));
    let bound = config.listen().filter(|_| alone).and_then(|address| match http::bind(address) {
        Ok(bound) => {
            // A port that we picked nobody can know but by this line.
            if address.port() == 0 {
                tracing::warn!(address = %bound.address, "serving metrics at a port that was free");
            } else {
                tracing::info!(address = %bound.address, "serving metrics");
            }
            Some(bound)
        }
        Err(error) => {
            // Another wrapper of the container, most likely. The agent matters more.
            tracing::warn!(%address, %error, "metrics are not served; choose another address with --listen, or off");
            meters.set(&metric::DEGRADED, &["http"], 1.0);
            None
        }
    });
    let receiver = native(config, &launch).and_then(|plan| match Receiver::bind() {
        Ok(receiver) => Some((receiver, plan)),
        Err(error) => {
            tracing::warn!(%error, "the CLI's own telemetry cannot be received");
            meters.set(&metric::DEGRADED, &["native"], 1.0);
            None
        }
    });
    let env = receiver.iter().flat_map(|(receiver, plan)| plan.variables(&receiver.base()));
    let env = env.map(|(name, value)| (name.into(), value.into())).chain(telemetry.variables()).chain(agent.env).collect();
    let mut ledger = config.ledger().map(|path| LineFile::open(Use::Ledger, path, meters));
    let mut events = config.events().map(|path| LineFile::open(Use::Events, path, meters));

    let job = Job {
        program: agent.program,
        arg0: agent.arg0,
        args: argv.into_iter().skip(1).collect(),
        env,
        mode: launch.mode,
        request_prefix: format!("{ID_PREFIX}{nonce}"),
        spill_dir: config.spill_dir(),
        spill_bytes: config.spill_bytes(),
    };
    let by_limit = Arc::new(AtomicBool::new(false));
    let without_result = Arc::new(AtomicBool::new(false));
    let (limited, missing) = (Arc::clone(&by_limit), Arc::clone(&without_result));
    let supervisor = Supervisor::new(job, monitor, clock)?;
    let handle = supervisor.handle();
    let counts = Arc::clone(&telemetry.counts);
    let pipeline = telemetry.start(&handle);
    let inlet = pipeline.as_ref().map(Pipeline::inlet);
    let share = if let Meet::At(turn) = turn { join(config, turn, &nonce, &handle, &counts) } else { None };
    let (teller, others) = (share.clone(), share.clone());
    let failures = handle.clone();
    let mut supervisor = supervisor.sink(Box::new(move |_, output| match output {
        Output::Record(record) => {
            if let Fact::ProcessExited { reason, .. } = &record.fact {
                limited.store(matches!(reason, ExitReason::Limit | ExitReason::Idle | ExitReason::Stuck), Relaxed);
            }
            if matches!(record.fact, Fact::ResultMissing { .. }) {
                missing.store(true, Relaxed);
            }
            if let Some(ledger) = &mut ledger {
                ledger.write(&record, &failures);
            }
            if let Some(share) = &teller {
                share.poke();
            }
        }
        Output::Decided(decision) => tracing::warn!(
            limit = decision.limit.as_str(),
            scope = decision.scope.as_str(),
            mode = decision.mode.as_str(),
            action = decision.step.as_str(),
            observed = decision.observed,
            ceiling = decision.ceiling,
            why = decision.why.map(Why::as_str),
            session = decision.session,
            "limit"
        ),
        Output::Span(span) => {
            if let Some(inlet) = &inlet {
                inlet.span(span);
            }
        }
        Output::Log(event) => {
            if let Some(events) = &mut events {
                events.write(&event, &failures);
            }
            if let Some(inlet) = &inlet {
                inlet.event(event);
            }
        }
        Output::Action(_) => {}
    }));

    let mut last: Vec<BeforeExit> = Vec::new();
    let mut words: Vec<LastWords> = Vec::new();
    let sampler = sampler();
    if let Some(sampler) = sampler.clone() {
        let handle = handle.clone();
        words.push(Box::new(move || last_reading(&sampler, &handle)));
    }
    if let Some(seat) = seat {
        last.push(Box::new(move |_| drop(within(Duration::ZERO, move || drop(seat)))));
    }
    if let Some((receiver, plan)) = receiver {
        match receiver.serve(handle.clone(), &plan) {
            Ok(served) => {
                let settled = served.clone();
                words.push(Box::new(move || settled.settle(SETTLE)));
                if plan.forwards() {
                    last.push(Box::new(move |_| served.flush(FORWARD)));
                }
            }
            Err(error) => tracing::warn!(%error, "the CLI's own telemetry is not received"),
        }
        let handle = handle.clone();
        last.push(Box::new(move |ending| reconcile(&handle, ending)));
    }
    if let Some(pipeline) = pipeline {
        let (handle, counts) = (handle.clone(), Arc::clone(&counts));
        last.push(Box::new(move |_| telemetry::end(&pipeline, &counts, &handle)));
    }
    if let Some(share) = share {
        let (linger, handle) = (config.linger(), handle.clone());
        last.push(Box::new(move |_| {
            if !linger.is_zero() {
                say_scraped(&handle);
            }
            // Of a disk that hangs nobody reads anything.
            let told = share.finish();
            let read = linger.is_zero() || told && share.linger(linger);
            if !read {
                let next = if told && share.goes_on() { "the next hub here has them, and " } else { "" };
                tracing::warn!(?linger, "nobody read the last metrics; {next}the ledger has them, if one is set");
            }
        }));
    }
    if let Some(bound) = bound {
        let scrapes = Arc::new(Scrapes::default());
        if let Err(error) = http::serve(
            bound,
            Site {
                handle: handle.clone(),
                scrapes: Arc::clone(&scrapes),
                labels: config.labels(),
                exports: counts,
                lease: config.busy().length,
            },
        ) {
            tracing::warn!(%error, "metrics are not served");
        }
        let linger = config.linger();
        if !linger.is_zero() {
            let handle = handle.clone();
            last.push(Box::new(move |_| {
                if !say_scraped(&handle) || !scrapes.wait(linger) {
                    tracing::warn!(?linger, "nobody read the last metrics; the ledger has them, if one is set");
                }
            }));
        }
    }
    last.extend(busy::tell_for_ever(config.busy(), handle.clone(), others));
    if !last.is_empty() {
        supervisor = supervisor.before_exit(Box::new(move |ending| last.into_iter().for_each(|last| last(ending))));
    }
    supervisor = supervisor.last_words(Box::new(move || words.into_iter().for_each(|say| say())));
    if let Some(sampler) = sampler {
        sample_for_ever(sampler, handle);
    }
    let code = supervisor.run()?;
    Ok(match config.limit_exit_code() {
        _ if !by_limit.load(Relaxed) => code,
        Some(chosen) => chosen,
        // Interrupted, an older CLI may end with a zero and no result: an app would take that for an answer of nothing.
        None if code == 0 && without_result.load(Relaxed) => CUT_SHORT,
        None => code,
    })
}

/// Where a wrapper's numbers go.
enum Meet {
    /// They are served by itself, if at all.
    Alone,
    /// It should have met others, and there is no place to.
    Nowhere,
    At(Turn),
}

impl Meet {
    fn hold_file(&self, run: &str) -> String {
        match self {
            Meet::At(turn) => turn.place().hold_file(run).display().to_string(),
            Meet::Alone | Meet::Nowhere => String::new(),
        }
    }
}

/// Whether others of this container are served together with us, and whether it is us who serves.
fn turn(config: &Config, place: Option<std::io::Result<Place>>) -> Meet {
    let Some(place) = place else { return Meet::Alone };
    let listen = config.listen();
    match place.and_then(|place| within(Duration::ZERO, move || Turn::take(place, listen)).flatten()) {
        Ok(turn) => Meet::At(turn),
        Err(error) => {
            tracing::warn!(%error, "this agent is not served together with others, and shared budgets do not hold; name another --hub-state-dir, or --hub off");
            Meet::Nowhere
        }
    }
}

/// Waits until there is room for one more agent. Without a place where they meet, nobody can be counted, and nobody waits.
fn seat(config: &Config, place: Option<&std::io::Result<Place>>, run: &str) -> Result<Option<Seat>, Failure> {
    let (Some((seats, patience, mode)), Some(Ok(place))) = (config.max_sessions(), place) else { return Ok(None) };
    let shadow = mode == LimitMode::Shadow;
    let patience = if shadow { Duration::ZERO } else { patience };
    let guest = Guest { run: run.to_owned(), tenant: config.tenant().unwrap_or_default(), weight: config.tenant_weight() };
    let place = place.clone();
    match within(patience, move || Seat::take(&place, &guest, seats, patience)).flatten() {
        Ok(Ok(seat)) => Ok(Some(seat)),
        Ok(Err(full)) if shadow => {
            tracing::warn!(%full, "this agent would have had to wait");
            Ok(None)
        }
        Ok(Err(none)) => {
            let exit_code = match none {
                NoSeat::Told(signal) => u8::try_from(128 + signal).unwrap_or(supervise::OWN_FAILURE),
                NoSeat::Full { .. } => supervise::OWN_FAILURE,
            };
            Err(Failure { exit_code, meant: true, source: Box::new(none) })
        }
        Err(error) => {
            tracing::warn!(%error, "agents cannot be counted: this one is started");
            Ok(None)
        }
    }
}

/// What is to be done before the agent starts, on a disk that may hang: that is not waited for, beyond what it takes anyhow.
fn within<T: Send + 'static>(takes: Duration, what: impl FnOnce() -> T + Send + 'static) -> std::io::Result<T> {
    let (say, hear) = mpsc::channel();
    std::thread::Builder::new().name(String::from("start")).stack_size(256 * 1024).spawn(move || drop(say.send(what())))?;
    let hangs = |_| std::io::Error::new(std::io::ErrorKind::TimedOut, "the hub's state directory does not answer");
    hear.recv_timeout(takes + HANGS).map_err(hangs)
}

/// Has our numbers served by the hub, and the hub by us when it is our turn.
fn join(config: &Config, turn: Turn, nonce: &str, handle: &Handle, counts: &Arc<otlp::Counts>) -> Option<Share> {
    if turn.is_deaf() {
        handle.visit(|monitor, _| monitor.meters_mut().set(&metric::DEGRADED, &["http"], 1.0));
    }
    let shares = config.rules().iter().any(|rule| rule.is_shared() && rule.mode != LimitMode::Off);
    let teller = Teller {
        run: nonce.to_owned(),
        labels: config.labels(),
        payer: shares.then(|| Payer { tenant: config.tenant(), zone: config.zone(), caps: config.caps() }),
        handle: handle.clone(),
        exports: Arc::clone(counts),
    };
    let share = Share::start(turn.place(), teller);
    let attended = share.and_then(|share| turn.attend(config.hub_options(), share.clone()).map(|()| share));
    match attended {
        Ok(share) => Some(share),
        Err(error) => {
            tracing::warn!(%error, "metrics are not served");
            handle.visit(|monitor, _| monitor.meters_mut().set(&metric::DEGRADED, &["hub"], 1.0));
            None
        }
    }
}

/// The reader's own scrape already says that it happened. False if nobody can be told.
fn say_scraped(handle: &Handle) -> bool {
    http::visit_blocking(handle, |monitor, _| monitor.meters_mut().add(&metric::FINAL_FLUSH, &["scraped"], 1)).is_some()
}

/// Whether, and how, the CLI's own telemetry comes to us.
fn native(config: &Config, launch: &Launch) -> Option<Plan> {
    let blind = launch.asks_model && !matches!(launch.mode, Mode::Parse { .. });
    match receive::decide(config.native(), launch.asks_model, blind, &Surroundings::here()) {
        Decision::On(plan) => Some(plan),
        Decision::Off => None,
        Decision::StayOut(why) => {
            tracing::warn!(%why, "the CLI's own telemetry is left alone: what it spends is not known here");
            None
        }
    }
}

/// Says what the telemetry and the stream do not agree on, or that there was none.
fn reconcile(handle: &Handle, ending: Ending) {
    let Some((heard, both)) = http::visit_blocking(handle, |monitor, _| (monitor.native_heard(), monitor.reconciliation()))
    else {
        return;
    };
    // Who fails at once has had nothing to export.
    if !heard && ending.exit_code == 0 {
        tracing::warn!("the CLI exported no telemetry: what it spent is not known here");
    }
    if let Some(both) = both.filter(|both| both.stream != both.native) {
        let (stream, native) = (both.stream.to_f64(), both.native.to_f64());
        tracing::warn!(stream, native, "the CLI's stream and its telemetry do not agree on what was spent");
    }
}

/// The rules that can be judged. Of a CLI whose stream is not read, nobody knows whether it is silent or busy.
fn judged(rules: Vec<Rule>, launch: &Launch) -> Vec<Rule> {
    let blind = !matches!(launch.mode, Mode::Parse { .. });
    let (deaf, judged): (Vec<Rule>, Vec<Rule>) = rules.into_iter().partition(|rule| blind && needs_stream(rule.limit));
    if launch.asks_model {
        for rule in deaf.iter().filter(|rule| rule.mode == LimitMode::Enforce || !rule.limit.is_loop()) {
            tracing::warn!(
                limit = rule.limit.as_str(),
                "this limit needs --output-format stream-json or json, and does not hold here"
            );
        }
    }
    judged
}

fn needs_stream(limit: Limit) -> bool {
    matches!(limit, Limit::Startup | Limit::Stall | Limit::Result | Limit::Idle) || limit.is_loop()
}

/// The ceiling on turns that the CLI itself can hold.
fn native_turns(rules: &[Rule]) -> Option<u64> {
    rules.iter().find_map(|rule| match (rule.limit, rule.scope, rule.mode, rule.ceiling) {
        (Limit::Turns, Scope::Turn, LimitMode::Enforce, Ceiling::Count(turns)) => Some(turns),
        _ => None,
    })
}

/// The sampler, for its own thread and for a last reading.
type Readings = Arc<Mutex<Sampler>>;

fn sampler() -> Option<Readings> {
    match Sampler::new() {
        Ok(sampler) => Some(Arc::new(Mutex::new(sampler))),
        Err(error) => {
            tracing::warn!(%error, "memory and CPU are not measured");
            None
        }
    }
}

/// Readings for as long as there is a monitor. The first one soon, so that a short run has one.
fn sample_for_ever(sampler: Readings, handle: Handle) {
    let started = std::thread::Builder::new().name(String::from("sample")).stack_size(512 * 1024).spawn(move || {
        // A command that ends at once is not kept waiting for the machine to be looked at.
        std::thread::sleep(sample::EVERY / 10);
        loop {
            let (cli, works) = http::visit_blocking(&handle, |monitor, _| (monitor.pid(), monitor.works())).unwrap_or_default();
            {
                // Handed in before anybody takes another: the last one may be the end's.
                let mut sampler = lock(&sampler);
                let sample = sampler.read(cli, works);
                if !handle.visit(move |monitor, now| monitor.handle(now, Input::Sample(&sample))) {
                    return;
                }
            }
            std::thread::sleep(sample::EVERY);
        }
    });
    if let Err(error) = started {
        tracing::warn!(%error, "memory and CPU are not measured");
    }
}

/// Who was killed for memory is known before its end is told.
fn last_reading(sampler: &Readings, handle: &Handle) {
    let mut sampler = lock(sampler);
    if sampler.oom_killed() {
        let sample = sampler.read(None, false);
        handle.visit(move |monitor, now| monitor.handle(now, Input::Sample(&sample)));
    }
}

fn lock(sampler: &Readings) -> MutexGuard<'_, Sampler> {
    sampler.lock().unwrap_or_else(PoisonError::into_inner)
}
