//! `run`: everything is built and bound, then the CLI is started.

use std::ffi::OsString;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use agent_sidecar_core::ask::{self, ID_PREFIX};
use agent_sidecar_core::detect::why::Why;
use agent_sidecar_core::launch::{Launch, Mode};
use agent_sidecar_core::limit::{Ceiling, Limit, Mode as LimitMode, Rule, Scope};
use agent_sidecar_core::log::Logs;
use agent_sidecar_core::metric;
use agent_sidecar_core::order::Order;
use agent_sidecar_core::record::{Fact, Record};
use agent_sidecar_core::update::{ExitReason, Update};
use agent_sidecar_core::who::{Guarded, Learn, Shared, Who};
use agent_sidecar_core::{Exit, Input, Monitor, Output, Settings};

use crate::busy;
use crate::config::Config;
use crate::conversation::{self, Conversation, Fetched};
use crate::disk;
use crate::export::otlp;
use crate::export::otlp::pipeline::Pipeline;
use crate::export::prometheus;
use crate::feed::Feed;
use crate::fence::{self, HoldDir};
use crate::fleet::{Agents, Glance, Said, Voice};
use crate::hang::within;
use crate::hooks;
use crate::http::{self, Scrapes, Site};
use crate::hub::{self, Guest, Hours, NoSeat, Payer, Place, Seat, Share, Teller, Turn};
use crate::influence;
use crate::lines::{LineFile, Use};
use crate::patrol::{Patrol, Seal};
use crate::receive::{self, Decision, Plan, Receiver, Surroundings};
use crate::sample::{self, Sampler};
use crate::supervise::{self, BeforeExit, Clock, Ears, Ending, Failure, Handle, Ignored, Job, LastWords, Supervisor, User};
use crate::telemetry::{self, Telemetry};
use crate::tenants::{self, Guard, Home, Places, TenantsShare};

/// What the CLI itself exits with after an error.
const CUT_SHORT: u8 = 1;
/// What the CLI had sent before its end is read within this; a connection that a tool holds open ends the wait.
const SETTLE: Duration = Duration::from_millis(250);
/// What is still to be forwarded then has this long: less than the CLI itself would wait for a collector that hangs.
const FORWARD: Duration = Duration::from_secs(1);

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
    /// The file that was started under the CLI's name.
    pub(crate) shim: Option<PathBuf>,
}

impl Agent {
    /// A command, as it was typed.
    pub(crate) fn command(argv: Vec<OsString>) -> Agent {
        let program = argv.first().cloned().unwrap_or_default();
        Agent { program, arg0: None, argv, env: Vec::new(), mistaken: false, shim: None }
    }
}

/// Runs a command to its end, and says what to exit with.
pub(crate) fn run(config: &Config, agent: Agent) -> Result<u8, Failure> {
    supervise::hide();
    // Before anybody listens.
    let ignored = Ignored::on_entry();
    let user = user(config)?;
    let agent_user = user.clone().unwrap_or_else(User::ours);
    let open = is_open(config, &agent_user);
    let argv = agent.argv;
    let launch = Launch::of(&argv, std::io::stdin().is_terminal(), std::io::stdout().is_terminal());
    let rules = judged(config.rules(), &launch);
    let argv = match native_turns(&rules).filter(|_| launch.asks_model) {
        Some(turns) => launch.with_max_turns(&argv, turns),
        None => argv,
    };
    let nonce = format!("{:016x}", supervise::random());
    let stdin_json = launch.mode == Mode::Parse { stdin_json: true };
    let (who, learn) = who(config, &argv, &launch);
    let telemetry = Telemetry::plan(config, launch.asks_model, &nonce, learn.settled(&who));
    let place = config.meeting().map(|meeting| within(Duration::ZERO, move || Place::find(&meeting)).flatten());
    // Who only asks for a version takes nobody's place.
    let ears = if launch.asks_model { ears(config, ignored)? } else { None };
    let seat = match &ears {
        Some(ears) => seat(config, place.as_ref(), &nonce, &who, ears)?.map(Arc::new),
        None => None,
    };
    let (home, homeless) = home(config, &who, &launch, &argv, user.as_ref())?;
    let (own_env, cwd) = home.as_ref().map(|home| (home.env.clone(), home.cwd.clone())).unwrap_or_default();
    let whose: Vec<_> = user.iter().flat_map(User::variables).collect();
    let at_home: Vec<_> =
        whose.iter().filter_map(|(name, value)| Some((name.clone(), value.clone()?))).chain(own_env.clone()).collect();
    let places = Places::of(&at_home, cwd.as_deref());
    let tmp = own_env.iter().find(|(name, _)| name == "TMPDIR").map_or_else(std::env::temp_dir, |(_, path)| path.into());
    let (policy, expected) = config.influence();
    let influenced = if launch.asks_model { influences(&places, &agent_user, &expected) } else { Influenced::default() };
    if policy == influence::Policy::Refuse && launch.asks_model && influenced.files.is_none() {
        let source =
            std::io::Error::other("what the CLI's settings files say is not known, and `policy.environment` is `refuse`");
        return Err(Failure { exit_code: supervise::OWN_FAILURE, meant: true, source: source.into() });
    }
    let stripped = influence::judge(policy, &influenced.found, &expected).map_err(|refused| Failure {
        exit_code: supervise::OWN_FAILURE,
        meant: true,
        source: Box::new(refused),
    })?;
    say_stripped(&influenced.found, &stripped);
    let guard = guard(config, place.as_ref(), &nonce, &who, learn.is_over(), &launch, &places, &agent_user)?;
    // Only now: who waits for a seat serves nobody.
    let turn = turn(config, place);
    let fetched = match &turn {
        Meet::At(turn) => turn.place().fetched(),
        Meet::Alone | Meet::Nowhere => Fetched::default(),
    };
    let conversation = config.conversation(&places);
    // Who only asks for a version has nothing to tell, and may be gone before it is told.
    let fleet = if launch.asks_model { config.fleet() } else { None };
    let agent_ids = user.as_ref().filter(|user| !user.is_us()).map(|user| (user.uid(), user.gid()));
    let hold_dir = if turn.hold_file(&nonce).is_some() { hold_dir(user.as_ref(), &nonce) } else { None };
    let hold_file = hold_dir.as_ref().map(HoldDir::file).or_else(|| turn.hold_file(&nonce));
    // Of a process that shares a budget is to be known what each of its answers cost, at once.
    let pays = matches!(turn, Meet::At(_)) && rules.iter().any(|rule| rule.is_shared() && rule.mode == LimitMode::Enforce);
    let receiver = native(config, &launch, pays).map(|plan| Receiver::bind().map(|receiver| (receiver, plan)));
    let told = matches!(receiver, Some(Ok(_)));
    let argv = match hold_file.as_deref().filter(|_| pays && config.budget_hooks()) {
        // Of others nobody knows what they spend before they end.
        Some(file) if told || matches!(launch.mode, Mode::Parse { .. }) => with_hooks(&launch, argv, file, cwd.as_deref()),
        Some(_) | None => argv,
    };
    let settings = Settings {
        nonce: nonce.clone(),
        start: launch.start,
        resume: launch.resume.clone(),
        parse: matches!(launch.mode, Mode::Parse { .. }),
        stdin_json,
        poll: config.poll(),
        native: told,
        prices: config.prices.clone(),
        rules,
        patience: config.patience(),
        max_series: config.max_series(),
        trace: telemetry.trace_settings(),
        events: telemetry.wants_events() || config.events().is_some(),
        hold_file: hold_file.as_ref().map_or(String::new(), |file| file.display().to_string()),
        who: who.clone(),
        learn,
    };
    let clock = Clock::start();
    let mut monitor = Monitor::new(settings, false, clock.now());
    let meters = monitor.meters_mut();
    telemetry.prepare(meters);
    meters.set(&metric::BUILD_INFO, &[env!("CARGO_PKG_VERSION")], 1.0);
    if open {
        tracing::warn!(file = ?config.file(), "the agent may change the file that its limits come from; give it and its directories to root, and take the write permission from others");
    }
    if let Some(user) = user.as_ref().filter(|user| !user.is_us()) {
        let (paths, user) = (config.own_paths(), user.clone());
        if let Err(error) = within(Duration::ZERO, move || fence::check(paths, &user)) {
            tracing::warn!(%error, "whether the agent may change what is the sidecar's is not known");
        }
    }
    if agent.mistaken || open {
        meters.set(&metric::DEGRADED, &["config"], 1.0);
    }
    meters.set(&metric::CONFIG_INFO, &[&config.fingerprint()], 1.0);
    meters.set(&metric::IDLE_TIMEOUT, &[], config.idle_timeout().unwrap_or_default().as_secs_f64());

    let blind = guard.as_ref().is_some_and(|(guard, _)| guard.is_blind());
    meters.set(&metric::DEGRADED, &["tenants"], f64::from(u8::from(homeless || blind)));
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
    let receiver = receiver.and_then(|receiver| {
        receiver
            .inspect_err(|error| {
                tracing::warn!(%error, "the CLI's own telemetry cannot be received");
                meters.set(&metric::DEGRADED, &["native"], 1.0);
            })
            .ok()
    });
    let env = receiver.iter().flat_map(|(receiver, plan)| plan.variables(&receiver.base()));
    let env = env.map(|(name, value)| (name.into(), value.into()));
    let more = env.chain(telemetry.variables()).chain(own_env).chain(agent.env);
    // What is not there need not be taken out: an environment that nobody changes keeps its order.
    let without = Config::secrets().filter(|name| std::env::var_os(name).is_some()).map(|name| (name.into(), None));
    let stripped = stripped.into_iter().map(|name| (name, None));
    let told = config.for_those_below().into_iter().map(|(name, value)| (name.into(), Some(value.into())));
    let env = whose
        .into_iter()
        .chain(more.map(|(name, value)| (name, Some(value))))
        .chain(without)
        .chain(stripped)
        .chain(told)
        .collect();
    let mut ledger = config.ledger().map(|path| LineFile::open(Use::Ledger, path, user.as_ref()));
    let mut events = config.events().map(|path| LineFile::open(Use::Events, path, user.as_ref()));
    LineFile::wait(ledger.iter_mut().chain(&mut events), meters);

    let job = Job {
        program: agent.program,
        arg0: agent.arg0,
        args: argv.into_iter().skip(1).collect(),
        cwd,
        env,
        user,
        mode: launch.mode,
        request_prefix: format!("{ID_PREFIX}{nonce}"),
        spill_dir: config.spill_dir(),
        spill_bytes: config.spill_bytes(),
    };
    let by_limit = Arc::new(AtomicBool::new(false));
    let without_result = Arc::new(AtomicBool::new(false));
    let (limited, missing) = (Arc::clone(&by_limit), Arc::clone(&without_result));
    let supervisor = Supervisor::new(job, monitor, clock)?.heard(ignored, ears);
    let handle = supervisor.handle();
    let counts = Arc::clone(&telemetry.counts);
    let pipeline = telemetry.start(&handle);
    let inlet = pipeline.as_ref().map(Pipeline::inlet);
    let hours = launch.asks_model.then(|| hours(config, &turn, &nonce)).flatten();
    let share = if let Meet::At(turn) = turn {
        join(
            config,
            turn,
            &nonce,
            who,
            (hold_file, agent_ids),
            seat.as_ref(),
            &handle,
            &counts,
            (conversation.clone(), fleet.clone()),
        )
    } else {
        None
    };
    let (teller, others) = (share.clone(), share.clone());
    let failures = handle.clone();
    let watcher = guard.as_ref().map(|(guard, conflicts)| {
        for (kind, owner) in conflicts.clone() {
            handle.visit(move |monitor, now| {
                monitor.handle(now, Input::Conflict { kind, owner: &owner, action: Guarded::Flagged });
            });
        }
        guard.watch(handle.clone());
        guard.clone()
    });
    let mut supervisor = supervisor.sink(Box::new(move |_, output| match output {
        Output::Record(record) => {
            if let Fact::ProcessExited { reason, .. } = &record.fact {
                limited.store(matches!(reason, ExitReason::Limit | ExitReason::Idle | ExitReason::Stuck), Relaxed);
            }
            if matches!(record.fact, Fact::ResultMissing { .. }) {
                missing.store(true, Relaxed);
            }
            if let (Some(guard), Fact::SessionStarted { session_id, .. }) = (&watcher, &record.fact) {
                guard.session(session_id);
            }
            if let Some(ledger) = &mut ledger {
                ledger.write(&record, &failures);
                if matches!(record.fact, Fact::ProcessExited { .. }) {
                    ledger.verify(&failures);
                }
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
            share = decision.share.then_some(true),
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
        Output::Known => {
            if let Some(guard) = &watcher {
                guard.known();
            }
        }
        Output::Action(_) => {}
    }));

    let mut last: Vec<BeforeExit> = Vec::new();
    let mut words: Vec<LastWords> = Vec::new();
    let sampler = sampler();
    if let Some(sampler) = sampler.clone() {
        let handle = handle.clone();
        words.push(Box::new(move |exit| last_reading(&sampler, &handle, exit)));
    }
    if let Some(hours) = hours {
        let (meter, told) = (Arc::clone(&hours), handle.clone());
        words.push(Box::new(move |_| last_hours(&meter, &told)));
        meter_for_ever(hours, handle.clone());
    }
    if let Some((guard, _)) = guard {
        last.push(Box::new(move |_| guard.end()));
    }
    if let Some(seat) = seat {
        last.push(Box::new(move |_| drop(within(Duration::ZERO, move || drop(seat)))));
    }
    if let Some((receiver, plan)) = receiver {
        match receiver.serve(handle.clone(), &plan) {
            Ok(served) => {
                let settled = served.clone();
                words.push(Box::new(move |_| settled.settle(SETTLE)));
                if plan.forwards() {
                    last.push(Box::new(move |_| served.flush(FORWARD)));
                }
            }
            Err(error) => tracing::warn!(%error, "the CLI's own telemetry is not received"),
        }
        let handle = handle.clone();
        let blind = !matches!(launch.mode, Mode::Parse { .. });
        last.push(Box::new(move |ending| reconcile(&handle, blind, ending)));
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
    if let Some(fleet) = fleet {
        if alone {
            fleet.speak_for(Own { handle: handle.clone(), lease: config.busy().length });
        }
        // When all that there is was counted; before others are told that it works no more, and while it may be scraped.
        last.push(Box::new(move |_| fleet.last()));
    }
    if let Some(hold_dir) = hold_dir {
        last.push(Box::new(move |_| drop(within(Duration::ZERO, move || drop(hold_dir)))));
    }
    if let Some(bound) = bound {
        let scrapes = Arc::new(Scrapes::default());
        if let Err(error) = http::serve(
            bound,
            Site {
                handle: handle.clone(),
                scrapes: Arc::clone(&scrapes),
                exports: counts,
                lease: config.busy().length,
                feed: Feed::default(),
                page_host: config.page_host(),
                conversation: conversation.clone().map(|options| Conversation::new(options, fetched.clone())),
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
    if let Some(home) = home {
        // When everything is told: it may take its time.
        last.push(Box::new(move |_| home.close()));
    }
    if !last.is_empty() {
        supervisor = supervisor.before_exit(Box::new(move |ending| last.into_iter().for_each(|last| last(ending))));
    }
    supervisor = supervisor.last_words(Box::new(move |exit| words.into_iter().for_each(|say| say(exit))));
    if let Some(sampler) = sampler {
        sample_for_ever(sampler, handle.clone(), agent.shim.as_deref().map(Seal::of));
    }
    if let Some(files) = influenced.files {
        files.watch(influenced.found, &handle);
    }
    if launch.asks_model {
        disk::measure_for_ever(&places, tmp, config.disk_interval(), &handle);
    }
    let waiting = handle.clone();
    // Otherwise who serves for all looks for all.
    if alone && config.patrol() {
        Patrol::walk(move |n| handle.visit(move |monitor, _| monitor.meters_mut().set(&metric::UNWRAPPED, &[], n)));
    }
    if let Some(options) = conversation.filter(|_| launch.asks_model && !config.conversation_wait().is_zero()) {
        waiting.wait(true);
        wait_for(&fetched, &options.container, config.conversation_wait())?;
        waiting.wait(false);
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

/// An agent that meets no other, to the fleet.
struct Own {
    handle: Handle,
    lease: Duration,
}

impl Agents for Own {
    fn say(&self) -> Option<Said> {
        let lease = self.lease;
        http::visit_blocking(&self.handle, move |monitor, now| {
            let sessions = monitor.report().sessions().iter().filter_map(|session| session.session_id.clone()).collect();
            let metrics = prometheus::text(monitor.meters(), &monitor.who().labels());
            Said { word: busy::Word::of(monitor, now, lease), metrics, sessions }
        })
    }

    fn glance(&self) -> Option<Glance> {
        let lease = self.lease;
        let seen = http::visit_blocking(&self.handle, move |monitor, now| Glance {
            busy: busy::Word::of(monitor, now, lease).busy,
            cost_usd: monitor.report().totals().cost_usd.to_f64(),
        });
        // Too busy to say.
        seen.or_else(|| self.handle.visit(|_, _| {}).then_some(Glance { busy: true, cost_usd: 0.0 }))
    }

    fn end(&self) {
        let order = Order { stop: true, ..Order::default() };
        self.handle.visit(move |monitor, now| monitor.handle(now, Input::Ordered(&order)));
    }
}

/// Waits for the conversation that the agent is to go on with: without it, it would begin another.
fn wait_for(fetched: &Fetched, container: &str, most: Duration) -> Result<(), Failure> {
    let failed = |meant, exit_code, what: String| Failure { exit_code, meant, source: std::io::Error::other(what).into() };
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [supervise::TERM, supervise::INT] {
        let registered = signal_hook::flag::register(signal, Arc::clone(&stop));
        registered.map_err(|error| failed(false, supervise::OWN_FAILURE, error.to_string()))?;
    }
    if fetched.wait(container, most, &stop) {
        return Ok(());
    }
    if stop.load(Relaxed) {
        return Err(failed(true, 128 + 15, String::from("it was told to end while it waited for its conversation")));
    }
    Err(failed(true, supervise::OWN_FAILURE, format!("nobody has brought its conversation within {most:?}")))
}

/// What changes the CLI, as far as the disk says.
#[derive(Default)]
struct Influenced {
    found: Vec<influence::Finding>,
    files: Option<influence::Files>,
}

fn influences(places: &Places, agent: &User, expected: &influence::Expected) -> Influenced {
    let mut found = influence::in_environment(std::env::vars_os(), expected);
    let mut files = influence::Files::of(places, agent, expected);
    let looked = within(Duration::ZERO, move || {
        let found = files.look();
        (files, found)
    });
    match looked {
        Ok((files, more)) => {
            found.extend(more);
            Influenced { found, files: Some(files) }
        }
        Err(error) => {
            tracing::warn!(%error, "what the CLI's settings files say is not known");
            Influenced { found, files: None }
        }
    }
}

fn say_stripped(found: &[influence::Finding], stripped: &[OsString]) {
    for one in found.iter().filter(|one| one.file.is_none()) {
        let taken = stripped.iter().any(|name| *name == *one.name);
        match one.kind {
            _ if taken => {
                tracing::warn!(name = one.name, "a variable was taken from the CLI's environment (`policy.environment`)")
            }
            // Somebody has said whom it may ask.
            influence::Kind::Endpoint => {
                tracing::warn!(name = one.name, "the CLI is told to ask somebody whom `policy.base_urls` does not name")
            }
            _ => tracing::info!(name = one.name, "a variable has code run in the CLI"),
        }
    }
}

/// For whom the agent works, and what the app is still to say about it.
fn who(config: &Config, argv: &[OsString], launch: &Launch) -> (Who, Learn) {
    let (who, learn) = tenants::find(config, argv, launch.mode == Mode::Parse { stdin_json: true });
    if launch.asks_model && learn.is_over() {
        for name in tenants::silent(config, &who) {
            let name = name.as_str();
            tracing::warn!("`labels.{name}_from` finds nothing: this agent has no {name}");
        }
    }
    (who, learn)
}

/// The agent's own directory, if each is to have one; and whether there should be one, and is none.
fn home(
    config: &Config,
    who: &Who,
    launch: &Launch,
    argv: &[OsString],
    user: Option<&User>,
) -> Result<(Option<Home>, bool), Failure> {
    match Some(launch).filter(|launch| launch.asks_model).and_then(|launch| Home::open(config, who, launch, argv, user)) {
        None => Ok((None, false)),
        Some(Ok(home)) => Ok((Some(home), false)),
        // Who insists on tenants being apart does not want it to share with others.
        Some(Err(error)) if config.guard() == LimitMode::Enforce => {
            let source = std::io::Error::new(error.kind(), format!("there is no directory for it below --agent-dirs: {error}"));
            Err(Failure { exit_code: supervise::OWN_FAILURE, meant: true, source: source.into() })
        }
        Some(Err(error)) => {
            tracing::error!(%error, "the agent gets no directory of its own, and shares with others what it keeps");
            Ok((None, true))
        }
    }
}

/// What the guard knows, and what it has found.
type Guarding = Option<(Guard, Vec<(Shared, String)>)>;

#[expect(clippy::too_many_arguments, reason = "called once, with all of it")]
/// Looks whether the agent would share anything with another tenant's.
fn guard(
    config: &Config,
    place: Option<&std::io::Result<Place>>,
    nonce: &str,
    who: &Who,
    known: bool,
    launch: &Launch,
    places: &Places,
    agent: &User,
) -> Result<Guarding, Failure> {
    let (mode, Some(Ok(place))) = (config.guard(), place) else { return Ok(None) };
    if mode == LimitMode::Off || !launch.asks_model || !config.has_tenants() {
        return Ok(None);
    }
    let owner = known.then(|| who.tenant.clone().unwrap_or_default());
    match Guard::begin(place, nonce, mode, owner, launch, places, agent) {
        Ok(guard) => Ok(Some(guard)),
        Err(refused) => {
            let (told, config, place) = (refused.clone(), config.clone(), place.clone());
            let (run, who) = (nonce.to_owned(), who.clone());
            if let Err(error) = within(Duration::ZERO, move || say_refused(&config, &place, &run, &who, &told)) {
                tracing::warn!(%error, "that this agent was refused is not written down");
            }
            Err(Failure { exit_code: supervise::OWN_FAILURE, meant: true, source: Box::new(refused) })
        }
    }
}

/// Whether the agent may change the file that its limits come from, as far as the disk says.
fn is_open(config: &Config, agent: &User) -> bool {
    let Some(file) = config.file().map(Path::to_owned) else { return false };
    let agent = agent.clone();
    within(Duration::ZERO, move || fence::is_open(&file, &agent)).unwrap_or_else(|error| {
        tracing::warn!(%error, "whether the agent may change the configuration is not known");
        false
    })
}

/// An agent that never runs has no numbers of its own to be read.
fn say_refused(config: &Config, place: &Place, nonce: &str, who: &Who, refused: &TenantsShare) {
    let mut meters = metric::Meters::new(config.max_series());
    let user = config.user().ok().flatten();
    let mut ledger = config.ledger().map(|path| LineFile::open(Use::Ledger, path, user.as_ref()));
    let mut events = config.events().map(|path| LineFile::open(Use::Events, path, user.as_ref()));
    LineFile::wait(ledger.iter_mut().chain(&mut events), &mut meters);
    let (action, now) = (Guarded::Refused, Clock::start().now());
    let mut logs = Logs::of(who.clone());
    for (seq, (kind, owner)) in (0..).zip(refused.kinds()) {
        meters.add(&metric::TENANT_CONFLICTS, &[kind.as_str(), action.as_str()], 1);
        let owner = owner.to_owned();
        if let (Some(events), Some(event)) =
            (&mut events, logs.on(&Update::TenantConflict { kind, owner: owner.clone(), action }, now, None))
        {
            events.write_alone(&event);
        }
        if let Some(ledger) = &mut ledger {
            let fact = Fact::TenantConflict { session_id: String::new(), kind, owner, action };
            ledger.write_alone(&Record::new(nonce, seq, now.unix, who, fact));
        }
    }
    if let Err(error) = hub::testify(place, nonce, who, meters) {
        tracing::warn!(%error, "that this agent was refused is not counted");
    }
}

/// As whom the CLI is to run. A fence that cannot be put up is not left out: then it is not started.
fn user(config: &Config) -> Result<Option<User>, Failure> {
    let refused = |source| Failure { exit_code: supervise::OWN_FAILURE, meant: true, source: Box::new(source) };
    config.user().map_err(refused)
}

/// Where the CLI is told to turn messages away, if it cannot look where we meet.
fn hold_dir(user: Option<&User>, nonce: &str) -> Option<HoldDir> {
    user.filter(|user| !user.is_us())?;
    let run = nonce.to_owned();
    within(Duration::ZERO, move || HoldDir::make(&run))
        .flatten()
        .inspect_err(|error| tracing::warn!(%error, "the CLI cannot be told to wait; turns are interrupted instead"))
        .ok()
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
    fn hold_file(&self, run: &str) -> Option<PathBuf> {
        match self {
            Meet::At(turn) => Some(turn.place().hold_file(run)),
            Meet::Alone | Meet::Nowhere => None,
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

/// Whoever waits for a seat listens: PID 1 hears no signal that it does not ask for.
fn ears(config: &Config, ignored: Ignored) -> Result<Option<Ears>, Failure> {
    if config.max_sessions().is_none() {
        return Ok(None);
    }
    let refused = |source: std::io::Error| Failure { exit_code: supervise::OWN_FAILURE, meant: false, source: source.into() };
    Ears::new(ignored).map(Some).map_err(refused)
}

/// Waits until there is room for one more agent. Without a place where they meet, nobody can be counted, and nobody waits.
fn seat(
    config: &Config,
    place: Option<&std::io::Result<Place>>,
    run: &str,
    who: &Who,
    ears: &Ears,
) -> Result<Option<Seat>, Failure> {
    let (Some((seats, patience, mode)), Some(Ok(place))) = (config.max_sessions(), place) else { return Ok(None) };
    let shadow = mode == LimitMode::Shadow;
    let patience = if shadow { Duration::ZERO } else { patience };
    let guest = Guest { run: run.to_owned(), tenant: who.tenant.clone().unwrap_or_default(), weight: config.tenant_weight() };
    let (place, ears) = (place.clone(), ears.clone());
    match within(patience, move || Seat::take(&place, &guest, seats, patience, &ears)).flatten() {
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

#[expect(clippy::too_many_arguments, reason = "called once, with all of it")]
/// Has our numbers served by the hub, and the hub by us when it is our turn.
fn join(
    config: &Config,
    turn: Turn,
    nonce: &str,
    who: Who,
    (hold_file, agent): (Option<PathBuf>, Option<(u32, u32)>),
    seat: Option<&Arc<Seat>>,
    handle: &Handle,
    counts: &Arc<otlp::Counts>,
    (conversation, fleet): (Option<conversation::Options>, Option<Voice>),
) -> Option<Share> {
    if turn.is_deaf() {
        handle.visit(|monitor, _| monitor.meters_mut().set(&metric::DEGRADED, &["http"], 1.0));
    }
    let shares = config.rules().iter().any(|rule| rule.is_shared() && rule.mode != LimitMode::Off);
    let options = hub::Options { labels: who.labels(), conversation, fleet, ..config.hub_options() };
    let teller = Teller {
        run: nonce.to_owned(),
        hold_file: hold_file.unwrap_or_else(|| turn.place().hold_file(nonce)),
        agent,
        payer: shares.then(|| Payer {
            tenant: who.tenant.clone(),
            zone: config.zone(),
            caps: config.caps(),
            sharing: config.sharing(),
            weight: config.tenant_weight(),
        }),
        seat: seat.map_or_else(Weak::new, Arc::downgrade),
        who,
        handle: handle.clone(),
        exports: Arc::clone(counts),
    };
    let share = Share::start(turn.place(), teller);
    let attended = share.and_then(|share| turn.attend(options, share.clone()).map(|()| share));
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
fn native(config: &Config, launch: &Launch, pays: bool) -> Option<Plan> {
    let blind = launch.asks_model && !matches!(launch.mode, Mode::Parse { .. });
    match receive::decide(config.native(), launch.asks_model, blind || pays && launch.asks_model, &Surroundings::here()) {
        Decision::On(plan) => Some(plan),
        Decision::Off => None,
        Decision::StayOut(why) if blind => {
            tracing::warn!(%why, "the CLI's own telemetry is left alone: what it spends is not known here");
            None
        }
        Decision::StayOut(why) => {
            tracing::warn!(%why, "the CLI's own telemetry is left alone: what an answer cost may be known late");
            None
        }
    }
}

/// The command line with hooks for the CLI, if it can be given any.
fn with_hooks(launch: &Launch, argv: Vec<OsString>, hold_file: &Path, cwd: Option<&Path>) -> Vec<OsString> {
    if !launch.takes_settings() {
        return argv;
    }
    let ours = ask::hooks(Some(&hold_file.display().to_string()));
    match hooks::settings(launch.settings.as_deref(), ours, cwd) {
        Ok(settings) => launch.with_settings(&argv, &settings),
        Err(error) => {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "the app's own --settings are left alone; answers may be above shared budgets by more than one"
            );
            argv
        }
    }
}

/// Says what the telemetry and the stream do not agree on, or that there was none.
fn reconcile(handle: &Handle, blind: bool, ending: Ending) {
    let Some((heard, both)) = http::visit_blocking(handle, |monitor, _| (monitor.native_heard(), monitor.reconciliation()))
    else {
        return;
    };
    // Who fails at once has had nothing to export.
    if !heard && blind && ending.exit_code == 0 {
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

/// What counts the container's time, for its own thread and for the end.
type Meter = Arc<Mutex<Hours>>;

/// How often the container's time is booked: what a killed agent has not booked is lost. Sooner while it is young, so that of a short
/// life not much is.
const BOOK: Duration = Duration::from_secs(30);
const FIRST_BOOK: Duration = Duration::from_secs(1);

fn hours(config: &Config, turn: &Meet, run: &str) -> Option<Meter> {
    let place = match turn {
        Meet::At(turn) => Some(turn.place().clone()),
        // Who meets nobody has the container to itself, as far as it knows.
        Meet::Alone | Meet::Nowhere => None,
    };
    config.prices.meters_container().then(|| Arc::new(Mutex::new(Hours::new(place, run))))
}

fn meter_for_ever(hours: Meter, handle: Handle) {
    let started = std::thread::Builder::new().name(String::from("hours")).stack_size(256 * 1024).spawn(move || {
        let mut pause = FIRST_BOOK;
        loop {
            if !book_hours(&hours, &handle, false) {
                return;
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(BOOK);
        }
    });
    if let Err(error) = started {
        tracing::warn!(%error, "the container's hours are counted at the end alone");
    }
}

/// False if there is no monitor to tell, or nothing more to count.
fn book_hours(hours: &Meter, handle: &Handle, end: bool) -> bool {
    // Handed in before anybody takes more: the last time may be the end's.
    let mut hours = lock(hours);
    match hours.take(end) {
        Ok(Some(time)) => handle.visit(move |monitor, now| monitor.handle(now, Input::ContainerUsed(time))),
        Ok(None) => false,
        Err(error) if end => {
            tracing::warn!(%error, "the last of the container's hours are not booked");
            false
        }
        Err(error) => {
            // What is not taken now is taken next time.
            tracing::debug!(%error, "the container's hours cannot be divided");
            true
        }
    }
}

fn last_hours(hours: &Meter, handle: &Handle) {
    let (hours, handle) = (Arc::clone(hours), handle.clone());
    if let Err(error) = within(Duration::ZERO, move || book_hours(&hours, &handle, true)) {
        tracing::warn!(%error, "the last of the container's hours are not booked");
    }
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
fn sample_for_ever(sampler: Readings, handle: Handle, mut shim: Option<Seal>) {
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
            check(&mut shim, &handle);
            std::thread::sleep(sample::EVERY);
        }
    });
    if let Err(error) = started {
        tracing::warn!(%error, "memory and CPU are not measured");
    }
}

/// Says once when the file that was started under the CLI's name is another, or gone.
fn check(shim: &mut Option<Seal>, handle: &Handle) {
    if let Some(seal) = shim.take_if(|seal| seal.is_broken()) {
        tracing::warn!(
            shim = %seal.path().display(),
            "the shim was replaced or removed: the next agent may run without the sidecar; run `agent-sidecar install` again"
        );
        handle.visit(|monitor, _| monitor.meters_mut().set(&metric::DEGRADED, &["shim"], 1.0));
    }
}

/// Who was killed for memory is known before its end is told.
fn last_reading(sampler: &Readings, handle: &Handle, exit: Exit) {
    let mut sampler = lock(sampler);
    if sampler.oom_killed() {
        let sample = sampler.last(exit);
        handle.visit(move |monitor, now| monitor.handle(now, Input::Sample(&sample)));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
