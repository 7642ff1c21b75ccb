//! Tells a fleet whether the agents of this container work and what they spend, and hears from it how long the container may live.
//!
//! ```text
//!   every ten seconds, when work begins or ends or was done meanwhile, and at the end
//!                                     ──► POST /v1/containers/NAME/report ──► so long you may live
//!     nothing heard, and that and a grace are over ──► the agents are ended
//! ```
//!
//! A platform whose sandboxes stay awake for whoever asks them is not asked, but told; and one that ends nothing by itself has somebody here who
//! does. On a thread of its own: no agent waits for a fleet.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use hyper::Uri;
use hyper::header::{AUTHORIZATION, HeaderMap, HeaderValue};
use serde::{Deserialize, Serialize};

use crate::busy::{self, Word};
use crate::export::otlp::environment::Headers;

/// How often is looked whether the agents still do what was told last.
const LOOK: Duration = Duration::from_secs(1);
/// What was not heard is said again after so long, if it is not time before.
const AGAIN: Duration = Duration::from_secs(10);
/// The end waits for the last word, and for one that is on its way.
const LAST: Duration = Duration::from_secs(5);

/// Whom to tell, and as whom.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    pub(crate) to: Uri,
    pub(crate) headers: Headers,
    pub(crate) session: String,
    pub(crate) every: Duration,
    /// Until the fleet says otherwise.
    pub(crate) lease: Option<Duration>,
    pub(crate) grace: Duration,
}

/// As whom we speak.
pub(crate) fn bearer(token: &str) -> Option<Headers> {
    let mut value = HeaderValue::from_str(&format!("Bearer {token}")).ok()?;
    value.set_sensitive(true);
    Some(Headers(HeaderMap::from_iter([(AUTHORIZATION, value)])))
}

/// What there is to say.
pub(crate) struct Said {
    pub(crate) word: Word,
    /// As somebody who scrapes would read it.
    pub(crate) metrics: String,
    pub(crate) sessions: Vec<String>,
}

/// What is looked at often.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Glance {
    /// Whether the agents work.
    pub(crate) busy: bool,
    /// What they have cost, in USD.
    pub(crate) cost_usd: f64,
}

impl Glance {
    /// Whether somebody who knows what was seen before wants to hear of it at once. What costs while it works is told from time to time; one that came and went
    /// between two looks is known by its cost alone.
    fn is_news_after(self, before: Glance) -> bool {
        self.busy != before.busy || !self.busy && self.cost_usd.to_bits() != before.cost_usd.to_bits()
    }
}

/// Who knows it, and can end the agents.
pub(crate) trait Agents: Send + 'static {
    /// `None`: nobody knows just now.
    fn say(&self) -> Option<Said>;
    /// `None`: nobody will know any more.
    fn glance(&self) -> Option<Glance>;
    fn end(&self);
}

#[derive(Serialize)]
struct Report<'a> {
    session: &'a str,
    /// Who speaks, and which word of its it is: one that comes late, or twice, changes nothing.
    run: &'a str,
    seq: u64,
    busy: bool,
    /// How long that may be believed. No time of day: clocks differ.
    busy_seconds: u64,
    every_seconds: u64,
    cost_usd: f64,
    memory_bytes: f64,
    sessions: &'a [String],
}

/// What the fleet answers.
#[derive(Deserialize)]
struct Answer {
    lease_seconds: Option<f64>,
}

const COST: &str = "claude_agent_cost_usd_total";
const MEMORY: &str = "claude_agent_container_memory_working_set_bytes";

/// Of a metric of an exposition all series, added up.
fn sum(metrics: &str, name: &str) -> f64 {
    let of = |line: &&str| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' ']));
    let values = metrics.lines().filter(of).filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
    // The sum of none is not less than zero.
    values.filter(|value| value.is_finite()).fold(0.0, |sum, value| sum + value)
}

/// When the container's life is over, on our own clock.
struct Lease {
    ends: Option<Instant>,
    grace: Duration,
}

impl Lease {
    fn new(first: Option<Duration>, grace: Duration, now: Instant) -> Lease {
        Lease { ends: first.map(|first| now + first), grace }
    }

    /// It is what was said last: a fleet may lengthen and shorten it.
    fn renew(&mut self, seconds: Option<f64>, now: Instant) {
        let seconds = seconds.filter(|seconds| seconds.is_finite() && *seconds >= 0.0);
        if let Some(length) = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
            && let Some(ends) = now.checked_add(length)
        {
            // Who is told once more that it is over was not renewed.
            let over = self.ends.filter(|before| *before <= now && ends <= now);
            self.ends = Some(over.unwrap_or(ends));
        }
    }

    fn is_over(&self, now: Instant) -> bool {
        self.ends.is_some_and(|ends| now.saturating_duration_since(ends) >= self.grace && now > ends)
    }
}

/// Speaks for this process, once it is its turn to.
#[derive(Clone)]
pub(crate) struct Voice {
    options: Arc<Options>,
    /// To the thread, while it speaks: who asks for the last word hears when it was said.
    ask: Arc<Mutex<Option<mpsc::Sender<mpsc::Sender<()>>>>>,
}

impl Voice {
    pub(crate) fn new(options: Options) -> Voice {
        Voice { options: Arc::new(options), ask: Arc::default() }
    }

    /// Tells for as long as there is somebody who knows.
    pub(crate) fn speak_for(&self, agents: impl Agents) {
        let (ask, asked) = mpsc::channel();
        *self.ask.lock().unwrap_or_else(PoisonError::into_inner) = Some(ask);
        let options = Arc::clone(&self.options);
        let begun = std::thread::Builder::new().name(String::from("fleet")).stack_size(512 * 1024).spawn(move || {
            rustix::process::nice(crate::supervise::NICE).ok();
            speak(&options, &agents, &asked);
        });
        if let Err(error) = begun {
            tracing::warn!(%error, "the fleet is not told what the agents spend");
        }
    }

    /// Says the last of it, if it is us who speak: what was counted then is told, or was never heard of by the fleet.
    pub(crate) fn last(&self) {
        let ask = self.ask.lock().unwrap_or_else(PoisonError::into_inner).take();
        let (say, said) = mpsc::channel();
        if ask.is_some_and(|ask| ask.send(say).is_ok()) && said.recv_timeout(LAST) == Err(RecvTimeoutError::Timeout) {
            tracing::warn!("the fleet has not taken the last of what the agents spent");
        }
    }
}

fn speak(options: &Options, agents: &impl Agents, asked: &mpsc::Receiver<mpsc::Sender<()>>) {
    let run = format!("{:016x}", crate::supervise::random());
    let mut lease = Lease::new(options.lease, options.grace, Instant::now());
    let (mut told, mut seq, mut failing, mut over) = (None::<(Instant, Glance)>, 0, false, None::<Instant>);
    loop {
        let asking = match asked.recv_timeout(if told.is_none() { Duration::ZERO } else { LOOK.min(options.every) }) {
            Ok(asking) => Some(asking),
            Err(RecvTimeoutError::Timeout) => None,
            // The last was said.
            Err(RecvTimeoutError::Disconnected) => return,
        };
        let Some(glance) = agents.glance() else { return };
        let every = if failing { options.every.min(AGAIN) } else { options.every };
        let due = told.is_none_or(|(at, before)| at.elapsed() >= every || glance.is_news_after(before));
        if due || asking.is_some() {
            let Some(said) = agents.say() else {
                std::thread::sleep(LOOK);
                continue;
            };
            seq += 1;
            let report = Report {
                session: &options.session,
                run: &run,
                seq,
                busy: said.word.busy && asking.is_none(),
                busy_seconds: said.word.for_seconds(),
                every_seconds: options.every.as_secs().max(1),
                cost_usd: sum(&said.metrics, COST),
                memory_bytes: sum(&said.metrics, MEMORY),
                sessions: &said.sessions,
            };
            let json = serde_json::to_vec(&report).expect("a report has no keys but names");
            let answer = busy::post("the fleet", &options.to, &options.headers, json);
            let answer = answer
                .and_then(|body| serde_json::from_slice::<Answer>(&body).map_err(|_| String::from("the fleet's answer is none")));
            match &answer {
                Ok(answer) => lease.renew(answer.lease_seconds, Instant::now()),
                Err(error) if !failing => tracing::warn!(%error, "the fleet is not told what the agents spend; it is told again"),
                Err(_) => {}
            }
            failing = answer.is_err();
            // What was not heard is said again, too, but not each second. What counts is what was said, and not what was seen before that.
            told = Some((Instant::now(), Glance { busy: report.busy, ..glance }));
            if let Some(asking) = asking {
                // Who asked may be gone.
                asking.send(()).ok();
                return;
            }
        }
        // Again and again: some may have been started since.
        if lease.is_over(Instant::now()) && over.is_none_or(|at| at.elapsed() >= options.every) {
            if over.is_none() {
                tracing::error!("the container's lease is over and was not renewed: its agents are ended");
            }
            over = Some(Instant::now());
            agents.end();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Read, Write};
    use std::net::TcpListener;
    use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

    use agent_sidecar_core::update::Activity;

    use super::*;

    #[test]
    fn a_lease_is_over_when_it_was_not_renewed_for_its_grace() {
        let (start, second) = (Instant::now(), Duration::from_secs(1));
        let mut lease = Lease::new(None, second * 60, start);
        assert!(!lease.is_over(start + second * 100_000), "nobody has said how long");
        for nonsense in [None, Some(f64::NAN), Some(-1.0), Some(f64::INFINITY), Some(1e300)] {
            lease.renew(nonsense, start);
            assert!(!lease.is_over(start + second * 100_000), "{nonsense:?}");
        }
        lease.renew(Some(10.0), start);
        assert!(!lease.is_over(start + second * 69));
        assert!(lease.is_over(start + second * 70));
        lease.renew(Some(10.0), start + second * 65);
        assert!(!lease.is_over(start + second * 134), "it was renewed in its grace");
        assert!(lease.is_over(start + second * 135));
        assert!(!Lease::new(Some(second), Duration::ZERO, start).is_over(start));
        let mut ended = Lease::new(None, second * 60, start);
        (0..=60).for_each(|n| ended.renew(Some(0.0), start + second * n));
        assert!(ended.is_over(start + second * 60), "told again and again that it is over");
    }

    #[test]
    fn what_begins_ends_or_was_done_between_two_looks_is_told_at_once() {
        let (idle, works) = (Glance { busy: false, cost_usd: 0.5 }, Glance { busy: true, cost_usd: 0.5 });
        assert!(works.is_news_after(idle) && idle.is_news_after(works));
        assert!(!idle.is_news_after(idle) && !works.is_news_after(works));
        assert!(Glance { cost_usd: 0.75, ..idle }.is_news_after(idle), "it came and went");
        assert!(!Glance { cost_usd: 0.75, ..works }.is_news_after(works), "its end is told");
    }

    /// Too busy to be looked at when it begins, and idle when it is asked what to say; then it works.
    struct Beginner(AtomicU32);

    impl Agents for Beginner {
        fn say(&self) -> Option<Said> {
            let word = Word { busy: self.0.load(Relaxed) > 1, state: Activity::Idle, until: None };
            Some(Said { word, metrics: String::new(), sessions: vec![] })
        }

        fn glance(&self) -> Option<Glance> {
            self.0.fetch_add(1, Relaxed);
            Some(Glance { busy: true, cost_usd: 0.0 })
        }

        fn end(&self) {}
    }

    #[test]
    fn work_that_was_seen_before_it_was_said_is_said() {
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = format!("http://{}/", server.local_addr().unwrap()).parse().unwrap();
        let (ask, asked) = mpsc::channel();
        let options = Options {
            to,
            headers: bearer("t").unwrap(),
            session: String::from("s"),
            every: Duration::from_secs(3600),
            lease: None,
            grace: Duration::ZERO,
        };
        std::thread::spawn(move || speak(&options, &Beginner(AtomicU32::new(0)), &asked));
        let (tell, told) = mpsc::channel();
        std::thread::spawn(move || {
            for line in server.incoming() {
                let mut line = BufReader::new(line.unwrap());
                let (mut head, mut length) = (String::new(), 0);
                while line.read_line(&mut head).unwrap() > 2 {
                    let lower = head.to_ascii_lowercase();
                    length = lower.strip_prefix("content-length:").map_or(length, |value| value.trim().parse().unwrap());
                    head.clear();
                }
                let mut body = vec![0; length];
                line.read_exact(&mut body).unwrap();
                let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 23\r\nconnection: close\r\n\r\n{\"lease_seconds\": null}";
                line.get_mut().write_all(&answer[..]).unwrap();
                tell.send(serde_json::from_slice::<serde_json::Value>(&body).unwrap()["busy"] == true).ok();
            }
        });
        let hear = || told.recv_timeout(Duration::from_secs(60)).unwrap();
        assert_eq!((hear(), hear()), (false, true));
        drop(ask);
    }

    #[test]
    fn what_is_told_is_what_a_scrape_would_say() {
        let text = "# TYPE claude_agent_cost_usd_total counter\nclaude_agent_cost_usd_total{model=\"a b\"} 0.5\n\
            claude_agent_cost_usd_total 0.25\nclaude_agent_cost_usd_totally 7\nclaude_agent_cost_usd_total{} NaN\n";
        assert_eq!(sum(text, COST), 0.75);
        assert_eq!(sum("", COST), 0.0);
    }
}
