//! What others have a say in: commands and webhooks that run when a session comes into a phase.
//!
//! What is done next is decided by [`next`] from what the store has logged, so that a fleet that dies between two tries, or hands a session to another
//! fleet, goes on where it was. A try that was logged as well done is not made again; one that was cut short before it could be logged is.
//!
//! ```text
//!            ok ─────────────► the next hook ──► Go
//! try ──┬──► veto ───────────► Veto
//!       ├──► failed, timeout ► the same again, after a while ──► Retry; where it is not required, the next hook, and the same again beside it
//!       └──► dead-letter ────► Failed; where it is not required, the next hook
//! ```

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use tracing::warn;

use crate::config::{Outside, TEMPLATE_LABEL, time};
use crate::lifecycle::Phase;
use crate::provider::Secret;
use crate::session::{Session, SessionId};
use crate::store::{self, HookRun, Store};

mod command;
mod event;
mod plan;
pub mod sign;
#[cfg(test)]
mod tests;
mod webhook;

pub use event::key;
pub use plan::plan_hooks;

/// Something that is run on phases.
#[derive(Clone, Debug, PartialEq)]
pub struct Hook {
    /// In the log and in what makes a run the same when it is tried again.
    pub name: String,
    pub on: Vec<Phase>,
    /// For sessions of these alone. Empty: of all.
    pub templates: Vec<String>,
    pub act: Act,
    /// For one try.
    pub timeout: Duration,
    /// How often it is tried again.
    pub retries: u32,
    /// It is waited for. Where not, the session goes on after the first try, and it is tried again beside it.
    pub required: bool,
    /// Its no is heard, where one can be.
    pub veto: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Act {
    Command {
        /// The program's whole path and its arguments.
        argv: Vec<String>,
        /// Variables of the fleet's environment that it gets.
        pass: Vec<String>,
    },
    Webhook {
        url: String,
        /// Each signs: the old and the new one, while one replaces the other.
        secrets: Vec<Secret>,
    },
}

impl Hook {
    /// Whether it runs for this session on this phase.
    pub fn is_for(&self, session: &Session, phase: Phase) -> bool {
        let template = session.spec.labels.get(TEMPLATE_LABEL);
        self.on.contains(&phase) && (self.templates.is_empty() || template.is_some_and(|name| self.templates.contains(name)))
    }

    /// Whether a no of its is heard there.
    pub fn may_veto(&self, phase: Phase) -> bool {
        self.veto && phase.can_be_vetoed()
    }
}

/// As it could be written.
impl fmt::Display for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Hook { name, on, templates, act, timeout, retries, required, veto } = self;
        let on: Vec<&str> = on.iter().map(|phase| phase.as_str()).collect();
        writeln!(f, "[[hooks]]\nname = {name:?}\non = {on:?}")?;
        if !templates.is_empty() {
            writeln!(f, "templates = {templates:?}")?;
        }
        match act {
            Act::Command { argv, pass } => writeln!(f, "command = {argv:?}\npass = {pass:?}")?,
            Act::Webhook { url, .. } => writeln!(f, "webhook = {url:?}")?,
        }
        write!(f, "timeout = {}\nretries = {retries}\nrequired = {required}\nveto = {veto}", time(*timeout))
    }
}

/// What hooks say to a step.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    Go,
    /// Somebody has said no, and why.
    Veto(String),
    /// One that is required has failed, and is tried again then.
    Retry(Timestamp),
    /// One that is required has failed for good.
    Failed(String),
}

/// What comes next.
#[derive(Debug, PartialEq)]
enum Next<'a> {
    Try { hook: &'a Hook, attempt: u32 },
    Done(Verdict),
}

/// What a try has come to.
#[derive(Debug, PartialEq)]
enum Outcome {
    /// With what it said.
    Ok(String),
    Veto(String),
    /// Trying again may help; not before that time is over, by its own word.
    Failed {
        said: String,
        after: Option<Duration>,
    },
    Timeout,
    /// Trying again will not help.
    Refused(String),
}

/// Hooks, and what they are run with.
pub struct Hooks {
    hooks: Vec<Hook>,
    fleet: String,
    outside: Arc<dyn Outside + Send>,
    client: reqwest::Client,
    clock: Arc<dyn Fn() -> Timestamp + Send + Sync>,
}

impl Hooks {
    /// # Errors
    /// There is no TLS.
    pub fn new(fleet: &str, hooks: Vec<Hook>, outside: Arc<dyn Outside + Send>) -> Result<Self, String> {
        let clock = Arc::new(Timestamp::now);
        Ok(Self { hooks, fleet: fleet.to_owned(), outside, client: webhook::client()?, clock })
    }

    /// With a clock that can be moved.
    #[must_use]
    pub fn with_clock(self, clock: Arc<dyn Fn() -> Timestamp + Send + Sync>) -> Self {
        Self { clock, ..self }
    }

    /// Runs the hooks of a phase that the session has come into, as far as they come before one that has to wait. Nothing is tried after `until`.
    ///
    /// # Errors
    /// The store's: then a hook may have run and run again.
    pub async fn run(&self, session: &Session, phase: Phase, until: Timestamp, store: &dyn Store) -> store::Result<Verdict> {
        loop {
            let runs = store.hook_runs(&session.id).await?;
            let now = (self.clock)();
            let (hook, attempt) = match next(&self.hooks, session, phase, &runs, now, until) {
                Next::Try { hook, attempt } => (hook, attempt),
                Next::Done(verdict) => return Ok(verdict),
            };
            let key = key(session, phase, hook);
            // What was tried again is what was tried before, whatever the session is now.
            let before = runs.iter().rev().find(|run| run.key == key).and_then(|run| run.event.clone());
            let event = before.unwrap_or_else(|| event::of(&self.fleet, session, phase, hook));
            let told = Told {
                session: &session.id,
                tenant: &session.tenant,
                generation: session.generation,
                phase,
                key: &key,
                event: &event,
            };
            // What is not waited for has its retries beside the step, however short that is.
            let until = hook.required.then_some(until);
            store.log_hook(&self.attempt(hook, &told, attempt, until).await).await?;
        }
    }

    /// Tries again what has failed and was not waited for, in whatever phase. When the next of these is due.
    ///
    /// # Errors
    /// The store's.
    pub async fn beside(&self, session: &Session, store: &dyn Store) -> store::Result<Option<Timestamp>> {
        let runs = store.hook_runs(&session.id).await?;
        let mut due = Vec::new();
        for (hook, last) in waiting(&self.hooks, &runs) {
            let (Some(again), Some(event)) = (last.again, &last.event) else { continue };
            if again > (self.clock)() {
                due.push(again);
                continue;
            }
            let told = Told::of(last, &session.tenant, event);
            let run = self.attempt(hook, &told, last.attempt.saturating_add(1), None).await;
            due.extend(run.again);
            store.log_hook(&run).await?;
        }
        Ok(due.into_iter().min())
    }

    /// Tells a dead letter once more, as it was. `None`: there is none of this key, or its hook is not in the configuration any more.
    ///
    /// # Errors
    /// The store's.
    pub async fn redeliver(&self, session: &Session, key: &str, store: &dyn Store) -> store::Result<Option<HookRun>> {
        let runs = store.hook_runs(&session.id).await?;
        let Some(last) = dead_letters(&runs).find(|run| run.key == key) else { return Ok(None) };
        let hook = self.hooks.iter().find(|hook| hook.name == last.hook);
        let (Some(hook), Some(event)) = (hook, &last.event) else { return Ok(None) };
        let told = Told::of(last, &session.tenant, event);
        // Who wants it tried again after that asks again.
        let never = Some(Timestamp::MIN);
        let mut run = self.attempt(hook, &told, last.attempt.saturating_add(1), never).await;
        if run.outcome == "veto" {
            // What was asked is long decided.
            run.outcome = String::from("ok");
        }
        store.log_hook(&run).await?;
        Ok(Some(run))
    }

    async fn attempt(&self, hook: &Hook, told: &Told<'_>, attempt: u32, until: Option<Timestamp>) -> HookRun {
        let at = (self.clock)();
        let left = until.filter(|until| *until > at).map_or(hook.timeout, |until| between(at, until));
        let timeout = hook.timeout.min(left);
        let outcome = match &hook.act {
            Act::Command { argv, pass } => command::run(argv, pass, told, timeout, hook.may_veto(told.phase)).await,
            Act::Webhook { url, secrets } => self.post(url, secrets, told, timeout, hook.may_veto(told.phase)).await,
        };
        let run = logged(hook, told, attempt, until, at, (self.clock)(), outcome);
        if !matches!(run.outcome.as_str(), "ok" | "veto") {
            let HookRun { session, phase, outcome, said, .. } = &run;
            warn!(hook = hook.name, %session, %phase, attempt, outcome, said, "a hook failed");
        }
        run
    }
}

/// What is logged of a try. It is the last if there are no more, if more would not help, or if the next would be after `until`.
fn logged(
    hook: &Hook,
    told: &Told<'_>,
    attempt: u32,
    until: Option<Timestamp>,
    at: Timestamp,
    end: Timestamp,
    outcome: Outcome,
) -> HookRun {
    let after = match outcome {
        Outcome::Ok(_) | Outcome::Veto(_) | Outcome::Refused(_) => None,
        Outcome::Failed { after, .. } => Some(backoff(told.key, attempt).max(after.unwrap_or_default().min(LONGEST_AFTER))),
        Outcome::Timeout => Some(backoff(told.key, attempt)),
    };
    let again = after
        .filter(|_| attempt <= hook.retries)
        .and_then(|after| end.checked_add(after).ok())
        .filter(|again| until.is_none_or(|until| *again < until));
    let late = || format!("no answer within {} s", hook.timeout.as_secs_f64());
    let (word, said) = match outcome {
        Outcome::Ok(said) => ("ok", said),
        Outcome::Veto(said) => ("veto", said),
        Outcome::Failed { said, .. } if again.is_some() => ("failed", said),
        Outcome::Timeout if again.is_some() => ("timeout", late()),
        Outcome::Failed { said, .. } | Outcome::Refused(said) => ("dead-letter", said),
        Outcome::Timeout => ("dead-letter", late()),
    };
    HookRun {
        session: told.session.clone(),
        generation: told.generation,
        phase: told.phase,
        hook: hook.name.clone(),
        at,
        seconds: between(at, end).as_secs_f64(),
        attempt,
        outcome: String::from(word),
        said: cut(&said),
        key: told.key.to_owned(),
        again,
        event: (!matches!(word, "ok" | "veto")).then(|| told.event.to_owned()),
    }
}

/// Hooks, as the service runs them.
pub struct Runner {
    pub hooks: Hooks,
    pub store: Arc<dyn Store>,
}

/// How long the hooks of one phase hold a session up, from the first try.
const HELD_MOST: Duration = Duration::from_secs(600);
/// The store may be back then.
const STORE_AGAIN: Duration = Duration::from_secs(5);

#[async_trait]
impl crate::service::Hooks for Runner {
    async fn run(&self, session: &Session) -> Verdict {
        let phase = session.phase;
        let tried = async {
            let keys: Vec<String> = self.hooks.hooks.iter().map(|hook| key(session, phase, hook)).collect();
            let runs = self.store.hook_runs(&session.id).await?;
            // Not from when it came into the phase: then nobody may have been there to run them.
            let first = runs.iter().filter(|run| keys.contains(&run.key)).map(|run| run.at).min();
            let until = first.unwrap_or_else(|| (self.hooks.clock)()) + HELD_MOST;
            self.hooks.run(session, phase, until, &*self.store).await
        };
        tried.await.unwrap_or_else(|error: store::Error| {
            warn!(session = %session.id, %phase, %error, "hooks cannot be run now");
            Verdict::Retry((self.hooks.clock)() + STORE_AGAIN)
        })
    }

    async fn beside(&self, session: &Session) -> Option<Timestamp> {
        match self.hooks.beside(session, &*self.store).await {
            Ok(again) => again,
            // There is none of it any more.
            Err(store::Error::Missing(_)) => None,
            Err(error) => {
                warn!(session = %session.id, %error, "hooks cannot be run again now");
                Some((self.hooks.clock)() + STORE_AGAIN)
            }
        }
    }

    async fn redeliver(&self, session: &Session, key: &str) -> store::Result<Option<HookRun>> {
        self.hooks.redeliver(session, key, &*self.store).await
    }
}

/// What a hook is told, and how it is known again.
struct Told<'a> {
    session: &'a SessionId,
    tenant: &'a str,
    generation: u32,
    phase: Phase,
    key: &'a str,
    event: &'a str,
}

impl<'a> Told<'a> {
    fn of(run: &'a HookRun, tenant: &'a str, event: &'a str) -> Self {
        Self { session: &run.session, tenant, generation: run.generation, phase: run.phase, key: &run.key, event }
    }
}

/// The first that has something to do, in the order of the file.
fn next<'a>(hooks: &'a [Hook], session: &Session, phase: Phase, runs: &[HookRun], now: Timestamp, until: Timestamp) -> Next<'a> {
    for hook in hooks.iter().filter(|hook| hook.is_for(session, phase)) {
        let key = key(session, phase, hook);
        let late = now >= until;
        let reason = |said: &str| format!("hook `{}`: {said}", hook.name);
        match runs.iter().rev().find(|run| run.key == key) {
            None if late && hook.required => return Next::Done(Verdict::Failed(reason("no time was left for it"))),
            None if late => {}
            None => return Next::Try { hook, attempt: 1 },
            Some(run) => match run.outcome.as_str() {
                "ok" => {}
                "veto" => return Next::Done(Verdict::Veto(reason(&run.said))),
                // A failed try, and there is another.
                "failed" | "timeout" if !hook.required => {}
                "failed" | "timeout" => match run.again {
                    Some(again) if again > now && again < until => return Next::Done(Verdict::Retry(again)),
                    Some(_) if !late && run.attempt <= hook.retries => {
                        return Next::Try { hook, attempt: run.attempt.saturating_add(1) };
                    }
                    _ => return Next::Done(Verdict::Failed(reason(&run.said))),
                },
                _ if hook.required => return Next::Done(Verdict::Failed(reason(&run.said))),
                _ => {}
            },
        }
    }
    Next::Done(Verdict::Go)
}

/// The last runs of hooks that are not waited for and are not done with.
fn waiting<'a>(hooks: &'a [Hook], runs: &'a [HookRun]) -> impl Iterator<Item = (&'a Hook, &'a HookRun)> {
    last_of_each(runs).filter_map(|run| {
        let hook = hooks.iter().find(|hook| hook.name == run.hook && !hook.required && run.attempt <= hook.retries)?;
        run.again.map(|_| (hook, run))
    })
}

/// What was told in vain, and can be told again.
pub fn dead_letters(runs: &[HookRun]) -> impl Iterator<Item = &HookRun> {
    last_of_each(runs).filter(|run| run.outcome == "dead-letter")
}

fn last_of_each(runs: &[HookRun]) -> impl Iterator<Item = &HookRun> {
    let is_last = |n: usize, run: &HookRun| runs.iter().skip(n + 1).all(|later| later.key != run.key);
    runs.iter().enumerate().filter(move |(n, run)| is_last(*n, run)).map(|(_, run)| run)
}

const FIRST_BACKOFF: Duration = Duration::from_secs(1);
const LONGEST_BACKOFF: Duration = Duration::from_secs(60);
/// Who asks for more than that with `Retry-After` is asked before.
const LONGEST_AFTER: Duration = Duration::from_secs(3_600);

/// How long until the next try: twice as long each time, and up to a half of that sooner, by what is told, so that a thousand sessions do not come back
/// at once.
fn backoff(key: &str, attempt: u32) -> Duration {
    let whole = FIRST_BACKOFF.saturating_mul(2_u32.saturating_pow(attempt.saturating_sub(1))).min(LONGEST_BACKOFF);
    let digest = ring::digest::digest(&ring::digest::SHA256, format!("{key} {attempt}").as_bytes());
    let sooner = digest.as_ref().first().map_or(0.0, |byte| f64::from(*byte) / 256.0);
    whole.mul_f64(1.0 - sooner / 2.0)
}

fn between(from: Timestamp, to: Timestamp) -> Duration {
    Duration::try_from(to.duration_since(from)).unwrap_or_default()
}

/// What a hook says goes into the log, and on from there to terminals and pages.
const SAID_MOST: usize = 1024;

fn cut(said: &str) -> String {
    let clean = said.trim().chars().map(|c| if c.is_control() && c != '\n' { char::REPLACEMENT_CHARACTER } else { c });
    let mut kept = String::new();
    for c in clean {
        if kept.len() + c.len_utf8() > SAID_MOST {
            break;
        }
        kept.push(c);
    }
    kept
}
