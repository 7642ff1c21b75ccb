//! `replay`: what a recorded stream, or a ledger file, would have measured. Reads, sums, prints; nothing is started or sent.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use agent_sidecar_core::limit::{Mode, Rule};
use agent_sidecar_core::record::Record;
use agent_sidecar_core::report::{Container, Report, Sums};
use agent_sidecar_core::{Exit, Input, Monitor, Now, Settings};

use crate::books::{Books, Unreadable};
use crate::config::Config;

/// How the numbers are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    /// For people.
    Text,
    /// One object: the contract that tools rest on.
    Json,
    /// What `/metrics` would have said.
    Prometheus,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("cannot read {}; name a file that the agent's stdout was written to, or - for standard input", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Ledger(#[from] Unreadable),
    #[error("cannot write the report")]
    Write(#[from] io::Error),
    #[error("a ledger holds no metrics; ask for --format text or json")]
    NoMetrics,
}

/// Reads recorded stdout, one file after another, each with a process of its own or several.
pub(crate) fn streams(files: &[PathBuf], config: &Config, format: Format, out: &mut impl Write) -> Result<(), Error> {
    let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let now = Now { mono: Duration::ZERO, unix };
    // Circles need no clock.
    let loops = config.rules().into_iter().filter(|rule| rule.limit.is_loop());
    let rules = loops.map(|rule| Rule { mode: rule.mode.min(Mode::Shadow), ..rule }).collect();
    let mut monitor = Monitor::new(Settings { prices: config.prices.clone(), rules, ..Settings::default() }, true, now);
    let mut chunk = vec![0; 64 * 1024];
    for path in files {
        let failed = |source| Error::Read { path: path.clone(), source };
        let mut file = open(path).map_err(failed)?;
        monitor.handle(now, Input::Spawned { pid: 0 });
        loop {
            let n = file.read(&mut chunk).map_err(failed)?;
            if n == 0 {
                break;
            }
            monitor.handle(now, Input::Stdout(&chunk[..n]));
            while monitor.poll_output().is_some() {}
        }
        monitor.handle(now, Input::StdoutEnd);
    }
    monitor.handle(now, Input::Exited(Exit::Code(0)));
    match format {
        Format::Prometheus => out.write_all(crate::export::prometheus::text(monitor.meters(), &[]).as_bytes())?,
        Format::Json => json(monitor.report(), out)?,
        Format::Text => bill(monitor.report(), out)?,
    }
    Ok(())
}

/// Sums ledger files. Lines that are none are said on stderr, and left out.
pub(crate) fn ledgers(files: &[PathBuf], format: Format, out: &mut impl Write) -> Result<(), Error> {
    let report = read_ledgers(files)?;
    match format {
        Format::Prometheus => return Err(Error::NoMetrics),
        Format::Json => json(&report, out)?,
        Format::Text => bill(&report, out)?,
    }
    Ok(())
}

/// What ledger files add up to.
pub(crate) fn read_ledgers(files: &[PathBuf]) -> Result<Report, Error> {
    let mut report = Report::default();
    records(files, |record| record.fact.to_update().iter().for_each(|update| report.on(update)))?;
    Ok(report)
}

/// Each line of ledger files, once.
pub(crate) fn records(files: &[PathBuf], take: impl FnMut(&Record)) -> Result<(), Unreadable> {
    let mut books = Books::default();
    books.read(files, take)?;
    books.say();
    Ok(())
}

fn open(path: &Path) -> io::Result<Box<dyn Read>> {
    if path == Path::new("-") { Ok(Box::new(io::stdin())) } else { Ok(Box::new(File::open(path)?)) }
}

fn json(report: &Report, out: &mut impl Write) -> io::Result<()> {
    serde_json::to_writer_pretty(&mut *out, report)?;
    writeln!(out)
}

/// The bill, for people.
pub(crate) fn bill(report: &Report, out: &mut impl Write) -> io::Result<()> {
    for session in report.sessions() {
        let outcome = session.outcome.map_or("no turn ended", |outcome| outcome.as_str());
        writeln!(out, "session {} ({outcome})", session.session_id.as_deref().unwrap_or("without a name"))?;
        sums(&session.sums, out)?;
    }
    if report.sessions().len() != 1 {
        writeln!(out, "total of {} sessions", report.sessions().len())?;
        sums(&report.totals(), out)?;
    }
    Ok(())
}

fn sums(sums: &Sums, out: &mut impl Write) -> io::Result<()> {
    let estimated = if sums.cost_estimated { "  (partly our estimate: no result told it)" } else { "" };
    writeln!(out, "  {:<28} {:>14}{estimated}", "cost", format!("${:.6}", sums.cost_usd.to_f64()))?;
    writeln!(out, "  {:<28} {:>14}", "turns", sums.turns)?;
    for (name, n) in [
        ("tokens in", sums.tokens.input),
        ("tokens out", sums.tokens.output),
        ("  read from the cache", sums.tokens.cache_read),
        ("  written to it for 5 min", sums.tokens.cache_write_5m),
        ("  written to it for 1 h", sums.tokens.cache_write_1h),
        ("subagents", sums.subagents),
        ("API retries", sums.api_retries),
        ("lines not understood", sums.parse_errors + sums.unknown_events),
    ] {
        if n > 0 {
            writeln!(out, "  {name:<28} {n:>14}")?;
        }
    }
    for (model, spend) in &sums.models {
        writeln!(out, "  {model:<28} {:>14} {:>12} tokens", format!("${:.6}", spend.cost_usd.to_f64()), spend.tokens.total())?;
    }
    if sums.container != Container::default() {
        let Container { seconds, cost_usd } = sums.container;
        let cost = format!("${:.6}", cost_usd.to_f64());
        writeln!(out, "  {:<28} {cost:>14} {:>10.0} s, beside the cost", "container", seconds.as_secs_f64())?;
    }
    for (tool, calls) in &sums.tool_calls {
        writeln!(out, "  {tool:<28} {:>14} ok {:>9} not", calls.ok, calls.error)?;
    }
    Ok(())
}
