//! `/events`: what changes in `/status`, told as it happens (server-sent events).
//!
//! ```text
//!   nobody listens: asleep ──a client──► look ──► changes ──► each client, or its end if it does not take them
//! ```
//!
//! Looks at most four times a second, and less where a look takes long. A client that comes back says which event it saw last, and is
//! told the rest, or everything.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use hyper::body::Bytes;
use serde_json::{Value, json};
use tokio::sync::{Notify, mpsc};

/// People who watch at once; a page is open in a few windows.
const CLIENTS: usize = 16;
/// Events that a client has not taken yet. One that is so far behind is cut off, and comes back for all of it.
const BEHIND: usize = 16;
/// Past events for those who come back.
const RECENT: usize = 32;
const LOOK: Duration = Duration::from_millis(250);
/// A look takes this share of the time at most.
const SHARE: u32 = 10;
/// After so long without a change a sign of life is sent, so that silence means something.
const QUIET: Duration = Duration::from_secs(5);
/// What grows with the clock alone: whoever wants it has the moment that it grows from.
const CLOCKS: [&str; 2] = ["state_seconds", "silent_seconds"];

/// See the module's head.
#[derive(Debug, Default)]
pub(crate) struct Feed {
    told: Mutex<Told>,
    woken: Notify,
}

#[derive(Debug, Default)]
struct Told {
    clients: Vec<Client>,
    /// Tells the events of this process from those of another that had the address before.
    epoch: u128,
    seq: u64,
    sessions: BTreeMap<String, Value>,
    totals: Value,
    recent: VecDeque<(u64, Bytes)>,
}

#[derive(Debug)]
struct Client {
    to: mpsc::Sender<Bytes>,
    /// Ends its connection.
    cut: Arc<Notify>,
    /// What it has seen, if it is new here: all of it, or up to an event.
    new: Option<Option<u64>>,
}

impl Feed {
    /// One more client, if there is room. `last` is the id of the last event that it saw.
    pub(crate) fn join(&self, last: Option<&str>, cut: Arc<Notify>) -> Option<mpsc::Receiver<Bytes>> {
        let (to, from) = mpsc::channel(BEHIND);
        let mut told = self.told();
        told.clients.retain(|client| !client.to.is_closed());
        if told.clients.len() >= CLIENTS {
            return None;
        }
        let epoch = told.epoch.to_string();
        let seen = last.and_then(|id| id.split_once('-')).filter(|(of, _)| *of == epoch).and_then(|(_, seq)| seq.parse().ok());
        told.clients.push(Client { to, cut, new: Some(seen) });
        drop(told);
        self.woken.notify_one();
        Some(from)
    }

    /// Tells what `look` finds, for ever. It finds nothing where nobody can say.
    pub(crate) async fn tell<L>(&self, mut look: impl FnMut() -> L)
    where
        L: Future<Output = Option<Value>>,
    {
        self.told().epoch = unix().as_nanos();
        let mut last = Instant::now();
        loop {
            if self.told().clients.is_empty() {
                self.woken.notified().await;
            }
            let start = Instant::now();
            let status = look().await;
            let quiet = last.elapsed() >= QUIET;
            if status.is_some_and(|status| self.told().take(&status, quiet)) {
                last = Instant::now();
            }
            let pause = LOOK.max(start.elapsed() * SHARE);
            tokio::time::sleep(pause).await;
        }
    }

    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Told {
    /// Tells the clients what is new; says whether those who know everything were told anything.
    fn take(&mut self, status: &Value, quiet: bool) -> bool {
        let now = unix().as_secs_f64();
        let change = self.change(status, now);
        let changed = change.is_some();
        if let Some(change) = &change {
            self.recent.push_back((self.seq, change.clone()));
            if self.recent.len() > RECENT {
                self.recent.pop_front();
            }
        }
        let sign = (quiet && !changed).then(|| Bytes::from(format!(": still here\nevent: now\ndata: {{\"now\":{now}}}\n\n")));
        let mut clients = std::mem::take(&mut self.clients);
        clients.retain_mut(|client| {
            let events = match client.new.take() {
                Some(seen) => self.since(seen, now),
                None => change.iter().chain(&sign).cloned().collect(),
            };
            let took = events.into_iter().all(|event| client.to.try_send(event).is_ok());
            if !took {
                client.cut.notify_one();
            }
            took
        });
        self.clients = clients;
        changed || sign.is_some()
    }

    /// What is different from what was told before.
    fn change(&mut self, status: &Value, now: f64) -> Option<Bytes> {
        let mut sessions = BTreeMap::new();
        for session in status["sessions"].as_array().into_iter().flatten() {
            let mut session = session.clone();
            // In containers that share a hub, many are called by the same pid.
            let key = format!("{}-{}", session["pid"], session["started"]);
            if let Some(object) = session.as_object_mut() {
                CLOCKS.iter().for_each(|clock| drop(object.remove(*clock)));
                object.insert(String::from("key"), json!(key));
            }
            sessions.insert(key, session);
        }
        let changed: Vec<&Value> = sessions
            .iter()
            .filter(|(key, session)| self.sessions.get(*key) != Some(session))
            .map(|(_, session)| session)
            .collect();
        let gone: Vec<&String> = self.sessions.keys().filter(|key| !sessions.contains_key(*key)).collect();
        let totals = &status["totals"];
        if changed.is_empty() && gone.is_empty() && *totals == self.totals {
            return None;
        }
        self.seq += 1;
        let change = event(
            &format!("{}-{}", self.epoch, self.seq),
            &json!({"now": now, "whole": false, "sessions": changed, "gone": gone, "totals": totals}),
        );
        self.totals = totals.clone();
        self.sessions = sessions;
        Some(change)
    }

    fn since(&self, seen: Option<u64>, now: f64) -> Vec<Bytes> {
        let id = format!("{}-{}", self.epoch, self.seq);
        match seen {
            Some(seen) if seen == self.seq => vec![Bytes::from(format!("event: now\ndata: {{\"now\":{now}}}\n\n"))],
            Some(seen) if self.recent.front().is_some_and(|(first, _)| (*first..=self.seq).contains(&(seen + 1))) => {
                self.recent.iter().filter(|(seq, _)| *seq > seen).map(|(_, event)| event.clone()).collect()
            }
            _ => {
                let sessions: Vec<&Value> = self.sessions.values().collect();
                vec![event(&id, &json!({"now": now, "whole": true, "sessions": sessions, "gone": [], "totals": self.totals}))]
            }
        }
    }
}

fn event(id: &str, data: &Value) -> Bytes {
    Bytes::from(format!("id: {id}\nevent: status\ndata: {data}\n\n"))
}

fn unix() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(states: &[(u64, &str)]) -> Value {
        let sessions: Vec<Value> =
            states.iter().map(|(pid, state)| json!({"pid": pid, "state": state, "state_seconds": 7.5})).collect();
        json!({"sessions": sessions, "totals": {"turns": 1}})
    }

    fn heard(from: &mut mpsc::Receiver<Bytes>) -> Vec<(String, Value)> {
        let mut all = Vec::new();
        while let Ok(event) = from.try_recv() {
            let text = String::from_utf8(event.to_vec()).unwrap();
            let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().to_owned();
            all.push((field("id: "), serde_json::from_str(&field("data: ")).unwrap()));
        }
        all
    }

    fn join(feed: &Feed, last: Option<&str>) -> mpsc::Receiver<Bytes> {
        feed.join(last, Arc::default()).unwrap()
    }

    #[test]
    fn first_everything_then_what_changes_and_nothing_twice() {
        let feed = Feed::default();
        let mut client = join(&feed, None);
        let take = |states: &[(u64, &str)], quiet| feed.told().take(&status(states), quiet);
        take(&[(1, "idle"), (2, "tool")], false);
        let first = heard(&mut client);
        assert_eq!((first.len(), first[0].1["sessions"].as_array().unwrap().len()), (1, 2), "{first:?}");
        assert!(first[0].1["sessions"][0].get("state_seconds").is_none(), "a clock is no change");
        assert!(!take(&[(1, "idle"), (2, "tool")], false) && heard(&mut client).is_empty());
        assert!(take(&[(1, "model")], false));
        let second = heard(&mut client);
        assert_eq!(second[0].1["sessions"], json!([{"key": "1-null", "pid": 1, "state": "model"}]));
        assert_eq!(second[0].1["gone"], json!(["2-null"]));
        assert!(take(&[(1, "model")], true));
        assert!(heard(&mut client)[0].1["now"].as_f64().unwrap() > 0.0, "a sign of life");
        // Somebody who had seen the first event comes back; and somebody who had seen another process's.
        let mut back = join(&feed, Some(&first[0].0));
        let mut lost = join(&feed, Some("17-1"));
        take(&[(1, "model")], false);
        assert_eq!(heard(&mut back), second);
        assert_eq!(heard(&mut lost)[0].1["whole"], true);
    }

    #[test]
    fn who_takes_nothing_is_cut_off_and_there_is_an_end_to_how_many_watch() {
        let feed = Feed::default();
        let slow = join(&feed, None);
        let mut others: Vec<_> = (1..CLIENTS).map(|_| join(&feed, None)).collect();
        assert!(feed.join(None, Arc::default()).is_none());
        for n in 0..2 * BEHIND as u64 {
            feed.told().take(&status(&[(n, "idle")]), false);
            others.iter_mut().for_each(|other| drop(heard(other)));
        }
        assert_eq!(feed.told().clients.len(), CLIENTS - 1);
        drop((slow, others));
        assert!(feed.join(None, Arc::default()).is_some(), "those who hung up make room");
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_looks_while_nobody_listens() {
        let feed = Arc::new(Feed::default());
        let looks = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let (told, counted) = (Arc::clone(&feed), Arc::clone(&looks));
        let teller = tokio::spawn(async move {
            told.tell(|| {
                counted.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                std::future::ready(Some(status(&[(1, "idle")])))
            })
            .await;
        });
        tokio::time::sleep(Duration::from_mins(1)).await;
        assert_eq!(looks.load(std::sync::atomic::Ordering::Relaxed), 0);
        let mut client = join(&feed, None);
        assert!(client.recv().await.is_some());
        teller.abort();
    }
}
