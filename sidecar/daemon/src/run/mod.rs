//! `run`: everything is built and bound, then the CLI is started.

mod apart;
mod books;
mod ends;
mod measure;
mod meet;
mod rules;

use std::ffi::OsString;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use agent_sidecar_core::ask::ID_PREFIX;
use agent_sidecar_core::launch::{Launch, Mode};
use agent_sidecar_core::limit::Mode as LimitMode;
use agent_sidecar_core::metric::{self, Meters};
use agent_sidecar_core::order::Order;
use agent_sidecar_core::who::Guarded;
use agent_sidecar_core::{Input, Monitor, Settings};

use crate::busy;
use crate::config::Config;
use crate::conversation::{Conversation, Fetched};
use crate::disk;
use crate::export::otlp::pipeline::Pipeline;
use crate::export::prometheus;
use crate::feed::Feed;
use crate::fence::HoldDir;
use crate::fleet::{Agents, Glance, Said};
use crate::hang::within;
use crate::http::{self, Bound, Scrapes, Site};
use crate::hub::Place;
use crate::lines::{LineFile, Use};
use crate::patrol::{Patrol, Seal};
use crate::receive::Receiver;
use crate::supervise::{self, Clock, Failure, Handle, Ignored, Job, Supervisor, User};
use crate::telemetry::{self, Telemetry};
use crate::tenants::Places;
use books::{Books, Verdict};
use ends::Ends;
use meet::Meet;

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
    let user = apart::user(config)?;
    let agent_user = user.clone().unwrap_or_else(User::ours);
    let open = apart::is_open(config, &agent_user);
    let argv = agent.argv;
    let launch = Launch::of(&argv, std::io::stdin().is_terminal(), std::io::stdout().is_terminal());
    let rules = rules::judged(config.rules(), &launch);
    let argv = match rules::native_turns(&rules).filter(|_| launch.asks_model) {
        Some(turns) => launch.with_max_turns(&argv, turns),
        None => argv,
    };
    let nonce = format!("{:016x}", supervise::random());
    let (who, learn) = apart::who(config, &argv, &launch);
    let telemetry = Telemetry::plan(config, launch.asks_model, &nonce, learn.settled(&who));
    let place = config.meeting().map(|meeting| within(Duration::ZERO, move || Place::find(&meeting)).flatten());
    // Who only asks for a version takes nobody's place.
    let ears = if launch.asks_model { meet::ears(config, ignored)? } else { None };
    let seat = match &ears {
        Some(ears) => meet::seat(config, place.as_ref(), &nonce, &who, ears)?.map(Arc::new),
        None => None,
    };
    let (home, homeless) = apart::home(config, &who, &launch, &argv, user.as_ref())?;
    let (own_env, cwd) = home.as_ref().map(|home| (home.env.clone(), home.cwd.clone())).unwrap_or_default();
    let whose: Vec<_> = user.iter().flat_map(User::variables).collect();
    let at_home: Vec<_> =
        whose.iter().filter_map(|(name, value)| Some((name.clone(), value.clone()?))).chain(own_env.clone()).collect();
    let places = Places::of(&at_home, cwd.as_deref());
    let tmp = own_env.iter().find(|(name, _)| name == "TMPDIR").map_or_else(std::env::temp_dir, |(_, path)| path.into());
    let influenced = apart::influenced(config, &launch, &places, &agent_user)?;
    let guard = apart::guard(config, place.as_ref(), &nonce, &who, learn.is_over(), &launch, &places, &agent_user)?;
    // Only now: who waits for a seat serves nobody.
    let turn = meet::turn(config, place);
    let alone = !matches!(turn, Meet::At(_));
    let fetched = match &turn {
        Meet::At(turn) => turn.place().fetched(),
        Meet::Alone | Meet::Nowhere => Fetched::default(),
    };
    let conversation = config.conversation(&places);
    // Who only asks for a version has nothing to tell, and may be gone before it is told.
    let fleet = if launch.asks_model { config.fleet() } else { None };
    let agent_ids = user.as_ref().filter(|user| !user.is_us()).map(|user| (user.uid(), user.gid()));
    let hold_dir = if turn.hold_file(&nonce).is_some() { apart::hold_dir(user.as_ref(), &nonce) } else { None };
    let hold_file = hold_dir.as_ref().map(HoldDir::file).or_else(|| turn.hold_file(&nonce));
    // Of a process that shares a budget is to be known what each of its answers cost, at once.
    let pays = !alone && rules.iter().any(|rule| rule.is_shared() && rule.mode == LimitMode::Enforce);
    let receiver = rules::native(config, &launch, pays).map(|plan| Receiver::bind().map(|receiver| (receiver, plan)));
    let told = matches!(receiver, Some(Ok(_)));
    let argv = match hold_file.as_deref().filter(|_| pays && config.budget_hooks()) {
        // Of others nobody knows what they spend before they end.
        Some(file) if told || matches!(launch.mode, Mode::Parse { .. }) => rules::with_hooks(&launch, argv, file, cwd.as_deref()),
        Some(_) | None => argv,
    };
    let settings = Settings {
        nonce: nonce.clone(),
        start: launch.start,
        resume: launch.resume.clone(),
        parse: matches!(launch.mode, Mode::Parse { .. }),
        stdin_json: launch.mode == Mode::Parse { stdin_json: true },
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
    apart::say_open(config, open, user.as_ref());
    let blind = guard.as_ref().is_some_and(|(guard, _)| guard.is_blind());
    let nowhere = matches!(turn, Meet::Nowhere);
    if agent.mistaken || open {
        meters.set(&metric::DEGRADED, &["config"], 1.0);
    }
    meters.set(&metric::DEGRADED, &["tenants"], f64::from(u8::from(homeless || blind)));
    meters.set(&metric::DEGRADED, &["hub"], f64::from(u8::from(nowhere)));
    meters.set(&metric::BUILD_INFO, &[env!("CARGO_PKG_VERSION")], 1.0);
    meters.set(&metric::CONFIG_INFO, &[&config.fingerprint()], 1.0);
    meters.set(&metric::IDLE_TIMEOUT, &[], config.idle_timeout().unwrap_or_default().as_secs_f64());
    let bound = if alone { bind(config, meters) } else { None };
    let receiver = receiver.and_then(|receiver| {
        receiver
            .inspect_err(|error| {
                tracing::warn!(%error, "the CLI's own telemetry cannot be received");
                meters.set(&metric::DEGRADED, &["native"], 1.0);
            })
            .ok()
    });
    let mut ledger = config.ledger().map(|path| LineFile::open(Use::Ledger, path, user.as_ref()));
    let mut events = config.events().map(|path| LineFile::open(Use::Events, path, user.as_ref()));
    LineFile::wait(ledger.iter_mut().chain(&mut events), meters);

    let received = receiver.iter().flat_map(|(receiver, plan)| plan.variables(&receiver.base()));
    let more = received.map(|(name, value)| (name.into(), value.into()));
    let more = more.chain(telemetry.variables()).chain(own_env).chain(agent.env);
    let job = Job {
        program: agent.program,
        arg0: agent.arg0,
        args: argv.into_iter().skip(1).collect(),
        cwd,
        env: environment(config, whose, more, influenced.stripped),
        user,
        mode: launch.mode,
        request_prefix: format!("{ID_PREFIX}{nonce}"),
        spill_dir: config.spill_dir(),
        spill_bytes: config.spill_bytes(),
    };
    let supervisor = Supervisor::new(job, monitor, clock)?.heard(ignored, ears);
    let handle = supervisor.handle();
    let counts = Arc::clone(&telemetry.counts);
    let pipeline = telemetry.start(&handle);
    let hours = launch.asks_model.then(|| measure::hours(config, &turn, &nonce)).flatten();
    let share = if let Meet::At(turn) = turn {
        meet::join(
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
    let guard = guard.map(|(guard, conflicts)| {
        for (kind, owner) in conflicts {
            handle.visit(move |monitor, now| {
                monitor.handle(now, Input::Conflict { kind, owner: &owner, action: Guarded::Flagged });
            });
        }
        guard.watch(handle.clone());
        guard
    });
    let verdict = Verdict::default();
    let mut books = Books {
        ledger,
        events,
        inlet: pipeline.as_ref().map(Pipeline::inlet),
        share: share.clone(),
        guard: guard.clone(),
        verdict: verdict.clone(),
        failures: handle.clone(),
    };
    let supervisor = supervisor.sink(Box::new(move |_, output| books.take(output)));

    let mut ends = Ends::default();
    let sampler = measure::sampler();
    if let Some(sampler) = sampler.clone() {
        let handle = handle.clone();
        ends.first(move |exit| measure::last_reading(&sampler, &handle, exit));
    }
    if let Some(hours) = hours {
        let (meter, told) = (Arc::clone(&hours), handle.clone());
        ends.first(move |_| measure::last_hours(&meter, &told));
        measure::meter_for_ever(hours, handle.clone());
    }
    if let Some(guard) = guard {
        ends.then(move |_| guard.end());
    }
    if let Some(seat) = seat {
        ends.then(move |_| drop(within(Duration::ZERO, move || drop(seat))));
    }
    if let Some((receiver, plan)) = receiver {
        match receiver.serve(handle.clone(), &plan) {
            Ok(served) => {
                let settled = served.clone();
                ends.first(move |_| settled.settle(SETTLE));
                if plan.forwards() {
                    ends.then(move |_| served.flush(FORWARD));
                }
            }
            Err(error) => tracing::warn!(%error, "the CLI's own telemetry is not received"),
        }
        let handle = handle.clone();
        let blind = !matches!(launch.mode, Mode::Parse { .. });
        ends.then(move |ending| rules::reconcile(&handle, blind, ending));
    }
    if let Some(pipeline) = pipeline {
        let (handle, counts) = (handle.clone(), Arc::clone(&counts));
        ends.then(move |_| telemetry::end(&pipeline, &counts, &handle));
    }
    let others = share.clone();
    if let Some(share) = share {
        ends.linger_at(share, config.linger(), handle.clone());
    }
    if let Some(fleet) = fleet {
        if alone {
            fleet.speak_for(Own { handle: handle.clone(), lease: config.busy().length });
        }
        // When all that there is was counted; before others are told that it works no more, and while it may be scraped.
        ends.then(move |_| fleet.last());
    }
    if let Some(hold_dir) = hold_dir {
        ends.then(move |_| drop(within(Duration::ZERO, move || drop(hold_dir))));
    }
    if let Some(bound) = bound {
        let scrapes = Arc::new(Scrapes::default());
        let site = Site {
            handle: handle.clone(),
            scrapes: Arc::clone(&scrapes),
            exports: counts,
            lease: config.busy().length,
            feed: Feed::default(),
            page_host: config.page_host(),
            conversation: conversation.clone().map(|options| Conversation::new(options, fetched.clone())),
        };
        if let Err(error) = http::serve(bound, site) {
            tracing::warn!(%error, "metrics are not served");
        }
        ends.linger(scrapes, config.linger(), handle.clone());
    }
    if let Some(tell) = busy::tell_for_ever(config.busy(), handle.clone(), others) {
        ends.then(tell);
    }
    if let Some(home) = home {
        // When everything is told: it may take its time.
        ends.then(move |_| home.close());
    }
    let supervisor = ends.of(supervisor);
    if let Some(sampler) = sampler {
        measure::sample_for_ever(sampler, handle.clone(), agent.shim.as_deref().map(Seal::of));
    }
    if let Some(files) = influenced.files {
        files.watch(influenced.found, &handle);
    }
    if launch.asks_model {
        disk::measure_for_ever(&places, tmp, config.disk_interval(), &handle);
    }
    // Otherwise who serves for all looks for all.
    if alone && config.patrol() {
        let handle = handle.clone();
        Patrol::walk(move |n| handle.visit(move |monitor, _| monitor.meters_mut().set(&metric::UNWRAPPED, &[], n)));
    }
    if let Some(options) = conversation.filter(|_| launch.asks_model && !config.conversation_wait().is_zero()) {
        handle.wait(true);
        wait_for(&fetched, &options.container, config.conversation_wait())?;
        handle.wait(false);
    }
    let code = supervisor.run()?;
    Ok(verdict.code(code, config.limit_exit_code()))
}

/// Where metrics are served by this wrapper alone. What cannot be bound is said: the agent matters more.
fn bind(config: &Config, meters: &mut Meters) -> Option<Bound> {
    let address = config.listen()?;
    match http::bind(address) {
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
            // Another wrapper of the container, most likely.
            tracing::warn!(%address, %error, "metrics are not served; choose another address with --listen, or off");
            meters.set(&metric::DEGRADED, &["http"], 1.0);
            None
        }
    }
}

/// A variable, and what it is to be: `None` takes it out.
type Variable = (OsString, Option<OsString>);

/// How the CLI's environment differs from ours; the later of two wins.
fn environment(
    config: &Config,
    whose: Vec<Variable>,
    more: impl Iterator<Item = (OsString, OsString)>,
    stripped: Vec<OsString>,
) -> Vec<Variable> {
    // What is not there need not be taken out: an environment that nobody changes keeps its order.
    let without = Config::secrets().filter(|name| std::env::var_os(name).is_some()).map(|name| (name.into(), None));
    let told = config.for_those_below().into_iter().map(|(name, value)| (name.into(), Some(value.into())));
    whose
        .into_iter()
        .chain(more.map(|(name, value)| (name, Some(value))))
        .chain(without)
        .chain(stripped.into_iter().map(|name| (name, None)))
        .chain(told)
        .collect()
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
