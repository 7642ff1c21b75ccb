//! `run`: everything is built and bound, then the CLI is started.

use std::ffi::OsString;
use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use agent_sidecar_core::ask::ID_PREFIX;
use agent_sidecar_core::launch::{Launch, Mode};
use agent_sidecar_core::limit::{Ceiling, Limit, Mode as LimitMode, Rule, Scope};
use agent_sidecar_core::metric;
use agent_sidecar_core::record::Fact;
use agent_sidecar_core::span::TraceSettings;
use agent_sidecar_core::update::ExitReason;
use agent_sidecar_core::{Input, Monitor, Output, Settings};

use crate::config::Config;
use crate::http::{self, Scrapes, Site};
use crate::ledger::LedgerFile;
use crate::sample::{self, Sampler};
use crate::supervise::{self, Clock, Failure, Handle, Job, Supervisor};

/// What the CLI itself exits with after an error.
const CUT_SHORT: u8 = 1;

/// Runs a command to its end, and says what to exit with.
pub(crate) fn run(config: &Config, argv: Vec<OsString>) -> Result<u8, Failure> {
    let launch = Launch::of(&argv, std::io::stdin().is_terminal(), std::io::stdout().is_terminal());
    let rules = config.rules();
    let argv = match native_turns(&rules).filter(|_| launch.asks_model) {
        Some(turns) => launch.with_max_turns(&argv, turns),
        None => argv,
    };
    let nonce = format!("{:016x}", supervise::random());
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
        trace: TraceSettings::default(),
        events: false,
    };
    let clock = Clock::start();
    let mut monitor = Monitor::new(settings, false, clock.now());
    let meters = monitor.meters_mut();
    meters.set(&metric::BUILD_INFO, &[env!("CARGO_PKG_VERSION")], 1.0);
    meters.set(&metric::CONFIG_INFO, &[&config.fingerprint()], 1.0);
    meters.set(&metric::IDLE_TIMEOUT, &[], config.idle_timeout().unwrap_or_default().as_secs_f64());

    let bound = config.listen().and_then(|address| match http::bind(address) {
        Ok(bound) => {
            tracing::info!(address = %bound.address, "serving metrics");
            Some(bound)
        }
        Err(error) => {
            // Another wrapper of the container, most likely. The agent matters more.
            tracing::warn!(%address, %error, "metrics are not served; choose another address with --listen, or off");
            meters.set(&metric::DEGRADED, &["http"], 1.0);
            None
        }
    });
    let mut ledger = config.ledger().map(|path| LedgerFile::open(path, meters));

    let mut argv = argv.into_iter();
    let job = Job {
        program: argv.next().unwrap_or_default(),
        arg0: None,
        args: argv.collect(),
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
        }
        Output::Decided(decision) => tracing::warn!(
            limit = decision.limit.as_str(),
            scope = decision.scope.as_str(),
            mode = decision.mode.as_str(),
            action = decision.step.as_str(),
            observed = decision.observed,
            ceiling = decision.ceiling,
            session = decision.session,
            "limit"
        ),
        Output::Action(_) | Output::Span(_) | Output::Log(_) => {}
    }));

    if let Some(bound) = bound {
        let scrapes = Arc::new(Scrapes::default());
        if let Err(error) =
            http::serve(bound, Site { handle: handle.clone(), scrapes: Arc::clone(&scrapes), labels: config.labels() })
        {
            tracing::warn!(%error, "metrics are not served");
        }
        let linger = config.linger();
        if !linger.is_zero() {
            let handle = handle.clone();
            supervisor = supervisor.before_exit(Box::new(move |_| {
                // The reader's own scrape already says that it happened.
                let told =
                    http::visit_blocking(&handle, |monitor, _| monitor.meters_mut().add(&metric::FINAL_FLUSH, &["scraped"], 1));
                if told.is_none() || !scrapes.wait(linger) {
                    tracing::warn!(?linger, "nobody read the last metrics; the ledger has them, if one is set");
                }
            }));
        }
    }
    sample_for_ever(handle);
    let code = supervisor.run()?;
    Ok(match config.limit_exit_code() {
        _ if !by_limit.load(Relaxed) => code,
        Some(chosen) => chosen,
        // Interrupted, an older CLI may end with a zero and no result: an app would take that for an answer of nothing.
        None if code == 0 && without_result.load(Relaxed) => CUT_SHORT,
        None => code,
    })
}

/// The ceiling on turns that the CLI itself can hold.
fn native_turns(rules: &[Rule]) -> Option<u64> {
    rules.iter().find_map(|rule| match (rule.limit, rule.scope, rule.mode, rule.ceiling) {
        (Limit::Turns, Scope::Turn, LimitMode::Enforce, Ceiling::Count(turns)) => Some(turns),
        _ => None,
    })
}

/// Readings for as long as there is a monitor. The first one soon, so that a short run has one.
fn sample_for_ever(handle: Handle) {
    let started = std::thread::Builder::new().name(String::from("sample")).stack_size(512 * 1024).spawn(move || {
        // A command that ends at once is not kept waiting for the machine to be looked at.
        std::thread::sleep(sample::EVERY / 10);
        let mut sampler = match Sampler::new() {
            Ok(sampler) => sampler,
            Err(error) => return tracing::warn!(%error, "memory and CPU are not measured"),
        };
        loop {
            let sample = sampler.read(http::visit_blocking(&handle, |monitor, _| monitor.pid()).flatten());
            if !handle.visit(move |monitor, now| monitor.handle(now, Input::Sample(&sample))) {
                return;
            }
            std::thread::sleep(sample::EVERY);
        }
    });
    if let Err(error) = started {
        tracing::warn!(%error, "memory and CPU are not measured");
    }
}
