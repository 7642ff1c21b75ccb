//! `explain`: what a session cost and why, from its ledger.

use std::io::{self, Write};
use std::path::PathBuf;

use agent_sidecar_core::explain::{Explainer, Session, Spend};
use agent_sidecar_core::report::Container;

use crate::books::Unreadable;
use crate::replay;

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Read(#[from] Unreadable),
    #[error("cannot write the explanation")]
    Write(#[from] io::Error),
    #[error("no ledger is named; give --ledger FILE, or set ledger.path")]
    NoLedger,
    #[error("there is no session in {files}; was the agent run with this ledger?")]
    Empty { files: String },
    #[error("no session begins with {wanted:?}; there are {known}")]
    Unknown { wanted: String, known: String },
    #[error("{n} sessions; name one of {known}")]
    Several { n: usize, known: String },
}

/// Explains one session: the only one, or the one whose id begins with `wanted`.
pub(crate) fn explain(wanted: Option<&str>, files: &[PathBuf], json: bool, out: &mut impl Write) -> Result<(), Error> {
    if files.is_empty() {
        return Err(Error::NoLedger);
    }
    let mut explainer = Explainer::default();
    replay::records(files, |record| explainer.on(record))?;
    let sessions = explainer.sessions();
    let known = |sessions: &[&Session]| {
        let more = if sessions.len() > LISTED { " …" } else { "" };
        sessions.iter().take(LISTED).map(|s| s.session_id.as_str()).collect::<Vec<_>>().join(" ") + more
    };
    if sessions.is_empty() {
        let files = files.iter().map(|file| file.display().to_string()).collect::<Vec<_>>().join(" ");
        return Err(Error::Empty { files });
    }
    let all: Vec<&Session> = sessions.iter().collect();
    let found: Vec<&Session> = all.iter().copied().filter(|s| wanted.is_none_or(|id| s.session_id.starts_with(id))).collect();
    let session = match (found.as_slice(), wanted) {
        ([session], _) => session,
        ([], wanted) => return Err(Error::Unknown { wanted: wanted.unwrap_or_default().to_owned(), known: known(&all) }),
        (several, _) => return Err(Error::Several { n: several.len(), known: known(several) }),
    };
    if json {
        serde_json::to_writer_pretty(&mut *out, session).map_err(io::Error::from)?;
        writeln!(out)?;
    } else {
        text(session, out)?;
    }
    Ok(())
}

/// Sessions that an error lists.
const LISTED: usize = 10;

/// Rows of a table that can be long.
const ROWS: usize = 12;

fn text(session: &Session, out: &mut impl Write) -> io::Result<()> {
    let outcome = session.outcome.map_or("no turn ended", |outcome| outcome.as_str());
    let with = match (session.exit_code, session.signal) {
        (_, Some(signal)) => format!(" by signal {signal}"),
        (Some(code), None) => format!(" with code {code}"),
        (None, None) => String::new(),
    };
    let exit = session.exit.map_or(String::new(), |exit| format!(", process ended{with}: {}", exit.as_str()));
    writeln!(out, "session {} ({outcome}{exit})", session.session_id)?;
    if let Some(from) = session.from.as_ref().filter(|from| **from != session.session_id) {
        writeln!(out, "  goes on from {from}")?;
    }
    let total = session.spend.cost_usd();
    let tokens = session.spend.tokens();
    writeln!(out, "  {} for {} tokens in {}", usd(total), tokens.total(), time(session.last - session.began))?;
    for (n, what) in [
        (tokens.input, "sent anew"),
        (tokens.output, "said by the model"),
        (tokens.cache_read, "read from the cache"),
        (tokens.cache_write_5m, "written to it for five minutes"),
        (tokens.cache_write_1h, "written to it for an hour"),
    ] {
        if n > 0 {
            writeln!(out, "  {n:>12} {what}")?;
        }
    }
    if session.unpriced {
        writeln!(out, "  some of it is of a model that nobody prices")?;
    }

    let share = |spend: &Spend| if total > 0.0 { format!("{:>4.0} %", 100.0 * spend.cost_usd() / total) } else { String::new() };
    heading(out, "what it was spent on")?;
    for (model, part) in &session.models {
        let spend = &part.spend;
        writeln!(
            out,
            "  {model:<34} {:>12} {} {:>5} requests, {}",
            usd(spend.cost_usd()),
            share(spend),
            part.requests,
            time(part.seconds)
        )?;
    }
    for (source, spend) in &session.sources {
        writeln!(out, "  {:<34} {:>12} {}", source.as_str(), usd(spend.cost_usd()), share(spend))?;
    }
    if session.web_searches > 0 {
        writeln!(out, "  {:<34} {:>12}", "web searches", session.web_searches)?;
    }
    if session.container != Container::default() {
        let Container { seconds, cost_usd } = session.container;
        writeln!(out, "  {:<34} {:>12} for {}", "beside it, the container", usd(cost_usd.to_f64()), time(seconds.as_secs_f64()))?;
    }

    heading(out, "turns")?;
    for turn in &session.turns {
        let outcome = turn.outcome.map_or("goes on, or was never ended", |outcome| outcome.as_str());
        let spend = &turn.spend;
        write!(out, "  {:>4} {outcome:<29} {:>12} {}", turn.turn, usd(spend.cost_usd()), share(spend))?;
        write!(out, " {:>5} requests, {} tool calls, {}", turn.requests, turn.tool_calls, time(turn.duration_seconds))?;
        for (n, what) in [(turn.retries, "retries"), (turn.cache_misses, "cache misses")] {
            if n > 0 {
                write!(out, ", {n} {what}")?;
            }
        }
        writeln!(out)?;
    }
    if session.between_turns != Spend::default() {
        let spend = &session.between_turns;
        writeln!(out, "       {:<29} {:>12} {}", "between turns", usd(spend.cost_usd()), share(spend))?;
    }

    if !session.time.is_empty() {
        heading(out, "where the time went")?;
        let whole: f64 = session.time.values().sum();
        let mut states: Vec<_> = session.time.iter().collect();
        states.sort_by(|a, b| b.1.total_cmp(a.1));
        for (state, seconds) in states {
            writeln!(
                out,
                "  {:<34} {:>12} {:>4.0} %",
                state.as_str(),
                time(*seconds),
                100.0 * seconds / whole.max(f64::MIN_POSITIVE)
            )?;
        }
    }
    if !session.tools.is_empty() {
        heading(out, "tools")?;
        let mut tools: Vec<_> = session.tools.iter().collect();
        tools.sort_by(|a, b| b.1.seconds.total_cmp(&a.1.seconds));
        for (tool, part) in tools.iter().take(ROWS) {
            let slowest = time(part.slowest_seconds);
            writeln!(out, "  {tool:<34} {:>12} {:>5} ok, {} not, slowest {slowest}", time(part.seconds), part.ok, part.error)?;
        }
        more(out, tools.len())?;
    }
    if !session.subagents.is_empty() {
        heading(out, "subagents")?;
        for one in session.subagents.iter().take(ROWS) {
            let outcome = one.outcome.as_deref().unwrap_or("never ended");
            let place = if one.background { ", in the background" } else { "" };
            writeln!(
                out,
                "  {:<34} {:>12} {:>5} requests, {} tool calls, {outcome}{place}",
                one.kind,
                time(one.duration_seconds),
                one.requests,
                one.tool_calls
            )?;
        }
        more(out, session.subagents.len())?;
    }
    if let Some(ratio) = session.cache_hit_ratio {
        heading(out, "the cache")?;
        writeln!(out, "  {:.0} % of all prompts were read from it", 100.0 * ratio)?;
        for miss in session.cache_misses.iter().take(ROWS) {
            let turn = miss.turn.map_or(String::from("between turns"), |turn| format!("turn {turn}"));
            writeln!(out, "  {turn}: {} tokens were not, of {}: {}", miss.tokens, miss.model, miss.cause)?;
        }
        more(out, session.cache_misses.len())?;
    }
    if !(session.retries.is_empty() && session.failed_requests.is_empty() && session.compactions.is_empty()) {
        heading(out, "what went wrong, or was slow")?;
        for (error, n) in &session.retries {
            writeln!(out, "  {n} retries after {error}")?;
        }
        if session.retry_seconds > 0.0 {
            writeln!(out, "  {} waited for retries", time(session.retry_seconds))?;
        }
        for (error, n) in &session.failed_requests {
            writeln!(out, "  {n} requests failed for good: {error}")?;
        }
        for compaction in &session.compactions {
            let Some(saved) = compaction.pre_tokens.checked_sub(compaction.post_tokens) else { continue };
            writeln!(out, "  compacted ({}): {saved} tokens fewer from {}", compaction.trigger, compaction.pre_tokens)?;
        }
    }
    if !session.orders.is_empty() {
        heading(out, "what people asked")?;
        for told in &session.orders {
            write!(out, "  after {}: {}", time(told.time - session.began), told.order.as_str())?;
            if let (Some(limit), Some(scope), Some(ceiling)) = (&told.limit, &told.scope, told.ceiling) {
                write!(out, " {limit} of the {scope} to {ceiling}")?;
            }
            writeln!(out)?;
        }
    }
    if !(session.limits.is_empty() && session.oom_kills.is_empty() && session.results_missing.is_empty()) {
        heading(out, "limits and ends")?;
        for limit in &session.limits {
            let at = time(limit.time - session.began);
            let scope = &limit.scope;
            let share = if limit.share { ", its fair share" } else { "" };
            write!(
                out,
                "  after {at}: {} of the {scope}{share}: {} of {}, {}",
                limit.limit, limit.observed, limit.ceiling, limit.action
            )?;
            if let Some(why) = &limit.why {
                write!(out, ", while {why}")?;
            }
            if limit.mode != "enforce" {
                write!(out, " ({} only)", limit.mode)?;
            }
            if let Some(latency) = limit.latency_seconds {
                write!(out, ", quiet after {}", time(latency))?;
            }
            if let Some(over) = limit.overshoot_usd {
                write!(out, ", {} over", usd(over.to_f64()))?;
            }
            writeln!(out)?;
        }
        for kill in &session.oom_kills {
            let at = time(kill.time - session.began);
            writeln!(out, "  after {at}: the kernel killed a {} for memory: {} MiB", kill.role, kill.memory_bytes >> 20)?;
        }
        for cause in &session.results_missing {
            writeln!(out, "  a turn has no result: {}", cause.as_str())?;
        }
    }
    Ok(())
}

fn heading(out: &mut impl Write, text: &str) -> io::Result<()> {
    writeln!(out, "\n{text}")
}

fn more(out: &mut impl Write, n: usize) -> io::Result<()> {
    if n > ROWS { writeln!(out, "  and {} more; --format json has them all", n - ROWS) } else { Ok(()) }
}

fn usd(usd: f64) -> String {
    format!("${usd:.6}")
}

/// Seconds as a person says them.
fn time(seconds: f64) -> String {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "saturates; it is only shown")]
    let whole = seconds.max(0.0) as u64;
    match whole {
        0..10 => format!("{:.1} s", seconds.max(0.0)),
        10..60 => format!("{whole} s"),
        60..3_600 => format!("{} min {} s", whole / 60, whole % 60),
        _ => format!("{} h {} min", whole / 3_600, whole % 3_600 / 60),
    }
}
