//! What stands in events alone: why a Job's controller can make no pod (a quota, a limit range, Pod Security, a webhook), and why kubelet does not begin one
//! (a network, a volume, a runtime). The object itself says nothing of it.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde::Deserialize;

use super::NAME;
use super::api::{Answer, Api, Kind, RIGHTS};
use super::state::{List, Meta, words};
use crate::provider::{Result, rest};

/// What begins as it should is not asked about: for each question the API server reads all events of the namespace.
const PATIENCE: Duration = Duration::from_secs(3);
/// How often the same is asked about.
const EVERY: Duration = Duration::from_secs(10);
/// Who is not looked at for so long is somebody else's by now, or gone.
const FORGOTTEN: Duration = Duration::from_secs(600);
/// How long may be waited for what only explains.
const CALL: Duration = Duration::from_secs(5);
const PAGE: u16 = 100;

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct Note {
    metadata: Meta,
    r#type: String,
    reason: String,
    message: String,
    // Who writes them in the old way has these two, who does in the new way the other two.
    #[serde(deserialize_with = "rest::time")]
    first_timestamp: Option<Timestamp>,
    #[serde(deserialize_with = "rest::time")]
    last_timestamp: Option<Timestamp>,
    #[serde(deserialize_with = "rest::time")]
    event_time: Option<Timestamp>,
    series: Series,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Series {
    #[serde(deserialize_with = "rest::time")]
    last_observed_time: Option<Timestamp>,
}

impl Note {
    /// When it was so last.
    fn at(&self) -> Option<Timestamp> {
        let told = [self.series.last_observed_time, self.last_timestamp, self.event_time, self.first_timestamp];
        told.into_iter().chain([self.metadata.created()]).flatten().max()
    }
}

/// Why it does not get on, by the last that was said of it. What went wrong before something went well is over.
fn why(mut notes: Vec<Note>) -> Option<String> {
    // Of one second several are told, and their names are in the order of time.
    notes.sort_by(|a, b| (a.at(), &a.metadata.name).cmp(&(b.at(), &b.metadata.name)));
    let last = notes.pop()?;
    let slow = last.reason == "Pulling";
    words(&last.reason, &last.message).filter(|_| last.r#type == "Warning" || slow)
}

/// What was asked about those that do not begin.
#[derive(Default)]
pub(super) struct Notes(Mutex<HashMap<String, Asked>>);

struct Asked {
    again: Instant,
    said: Option<String>,
}

impl Notes {
    /// What was said of it last; `None`: it is to be asked now.
    fn known(&self, native: &str, now: Instant) -> Option<Option<String>> {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(asked) = held.get_mut(native) {
            if asked.again > now {
                return Some(asked.said.clone());
            }
            asked.again = now + EVERY;
            return None;
        }
        held.retain(|_, asked| asked.again + FORGOTTEN > now);
        held.insert(native.to_owned(), Asked { again: now + PATIENCE, said: None });
        Some(None)
    }

    fn hold(&self, native: &str, said: &Option<String>) {
        if let Some(asked) = self.0.lock().unwrap_or_else(PoisonError::into_inner).get_mut(native) {
            asked.said.clone_from(said);
        }
    }

    /// It gets on, or says why not by itself.
    pub(super) fn forget(&self, native: &str) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(native);
    }

    /// Why it does not begin, by what is told of this object.
    pub(super) async fn of(&self, api: &Api, native: &str, (kind, name): (&str, &str)) -> Option<String> {
        if let Some(known) = self.known(native, Instant::now()) {
            return known;
        }
        let fields = format!("involvedObject.kind={kind},involvedObject.name={name}");
        let ask = api.get(Kind::Events, &[]).query("fieldSelector", fields).query("limit", PAGE.to_string());
        let answered = tokio::time::timeout(CALL, ask.send()).await;
        let said = match answered.map(|answer| answer.and_then(read)) {
            Ok(Ok(said)) => said,
            // It only explains.
            Ok(Err(error)) => {
                tracing::debug!(provider = NAME, native, %error, "what is told of it cannot be read");
                None
            }
            Err(_) => None,
        };
        self.hold(native, &said);
        said
    }
}

fn read(answer: Answer) -> Result<Option<String>> {
    if answer.is_no_right() {
        return Ok(Some(format!("why would be in the events of the namespace, and the fleet may not list them{RIGHTS}")));
    }
    let list: List<Note> = answer.ok()?.json()?;
    Ok(why(list.items))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn said(notes: Value) -> Option<String> {
        why(serde_json::from_value(notes).unwrap())
    }

    #[test]
    fn the_last_word_is_the_reason_unless_it_is_a_good_one() {
        let old = |name: &str, kind: &str, reason: &str, at: &str| {
            json!({"metadata": {"name": name}, "type": kind, "reason": reason, "message": "m", "firstTimestamp": "2026-11-27T00:00:00Z", "lastTimestamp": at,
                "eventTime": ""})
        };
        let new = |reason: &str, at: &str, again: Value| json!({"metadata": {"name": "n"}, "type": "Warning", "reason": reason, "message": "m", "eventTime": at, "series": again});
        let (first, then) = ("2026-11-27T00:00:01Z", "2026-11-27T00:00:09Z");
        let again = json!({"count": 7, "lastObservedTime": "2026-11-27T00:00:20.000000Z"});
        for (notes, expected) in [
            (json!([]), None),
            (json!([old("a", "Warning", "FailedCreate", first)]), Some("FailedCreate: m")),
            (
                json!([old("a", "Warning", "FailedCreate", then), old("b", "Normal", "SuccessfulCreate", first)]),
                Some("FailedCreate: m"),
            ),
            // The quota has room again.
            (json!([old("a", "Warning", "FailedCreate", first), old("b", "Normal", "SuccessfulCreate", then)]), None),
            // In one second.
            (json!([old("b", "Normal", "SuccessfulCreate", first), old("a", "Warning", "FailedCreate", first)]), None),
            // An image that is large is waited for, and that is all.
            (json!([old("a", "Normal", "Scheduled", first), old("b", "Normal", "Pulling", then)]), Some("Pulling: m")),
            (json!([old("a", "Normal", "Pulling", first), old("b", "Normal", "Pulled", then)]), None),
            // In the new way, and again and again.
            (json!([new("FailedMount", first, again), old("b", "Normal", "Pulled", then)]), Some("FailedMount: m")),
            (json!([new("FailedMount", first, json!({})), old("b", "Normal", "Pulled", then)]), None),
        ] {
            assert_eq!(said(notes.clone()).as_deref(), expected, "{notes}");
        }
    }

    #[test]
    fn who_does_not_begin_is_asked_about_now_and_then() {
        let (notes, began) = (Notes::default(), Instant::now());
        let at = |seconds: u64| began + Duration::from_secs(seconds);
        let why = Some(String::from("why"));
        assert_eq!(notes.known("a", at(0)), Some(None), "it may begin at once");
        assert_eq!(notes.known("a", at(2)), Some(None));
        assert_eq!(notes.known("a", at(3)), None);
        assert_eq!(notes.known("a", at(3)), Some(None), "it is being asked");
        notes.hold("a", &why);
        assert_eq!((notes.known("a", at(12)), notes.known("a", at(13))), (Some(why.clone()), None));
        // It has begun, and another time it does not.
        notes.forget("a");
        notes.hold("a", &why);
        assert_eq!(notes.known("a", at(14)), Some(None));
        // Nothing is kept of who is not asked about any more.
        notes.known("b", at(3600));
        assert_eq!(notes.0.lock().unwrap().keys().collect::<Vec<_>>(), ["b"]);
    }
}
