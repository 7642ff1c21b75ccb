//! What can be asked and changed at the hub's socket, below `/v1`.
//!
//! ```text
//!   GET  /v1/budgets                                    how all shared budgets stand
//!   POST /v1/budgets/SCOPE?usd=7.50&tokens=9000&tenant=NAME    makes one larger
//! ```

use std::sync::Arc;

use agent_sidecar_core::budget::{Amount, Caps, Standing};
use agent_sidecar_core::limit::Scope;
use agent_sidecar_core::tokens::Usd;
use hyper::{Method, StatusCode};
use serde_json::{Value as Json, json};

use crate::config::{Kind, Value};
use crate::hub::Desk;

/// Why something was not done: a sentence for people.
type Refusal = (StatusCode, String);

/// What is answered: an object, or why not.
pub(crate) type Answer = Result<Json, Refusal>;

/// Answers a request below `/v1`; nothing if it is none of these.
pub(crate) async fn answer(desk: &Arc<Desk>, method: &Method, path: &str, query: Option<&str>) -> Option<Answer> {
    let path = path.strip_prefix("/v1/")?;
    let ask = match Ask::of(method, path, &Query::of(query.unwrap_or_default())) {
        Ok(ask) => ask,
        Err(refusal) => return Some(Err(refusal)),
    };
    if ask.changes()
        && let Err(refusal) = allowed(desk)
    {
        return Some(Err(refusal));
    }
    let desk = Arc::clone(desk);
    // A disk that hangs holds up this answer and no other.
    let done = tokio::task::spawn_blocking(move || ask.perform(&desk)).await;
    Some(done.unwrap_or_else(|_| Err((StatusCode::INTERNAL_SERVER_ERROR, String::from("the hub failed at it")))))
}

/// Whether whoever asks may change anything: the one place where that is decided.
fn allowed(desk: &Desk) -> Result<(), Refusal> {
    if desk.control() {
        return Ok(());
    }
    let what = "control is off: nothing can be changed here without `hub.control` (--hub-control) where the hub was started";
    Err((StatusCode::FORBIDDEN, String::from(what)))
}

/// What is asked.
#[derive(Clone, Debug, PartialEq)]
enum Ask {
    Budgets,
    Raise { scope: Scope, tenant: Option<String>, caps: Caps },
}

impl Ask {
    fn of(method: &Method, path: &str, query: &Query) -> Result<Ask, Refusal> {
        let parts: Vec<&str> = path.split('/').collect();
        let wanted = match parts[..] {
            ["budgets"] => Method::GET,
            ["budgets", _] => Method::POST,
            _ => return Err((StatusCode::NOT_FOUND, String::from("not here; there is /v1/budgets"))),
        };
        if *method != wanted && !(wanted == Method::GET && *method == Method::HEAD) {
            return Err((StatusCode::METHOD_NOT_ALLOWED, format!("ask this with {wanted}")));
        }
        match parts[..] {
            ["budgets", scope] => Ask::raise(scope, query),
            _ => Ok(Ask::Budgets),
        }
    }

    fn raise(scope: &str, query: &Query) -> Result<Ask, Refusal> {
        let known = Scope::ALL.iter().find(|known| known.as_str() == scope && known.shared().is_some());
        let Some(&scope) = known else {
            let what = format!("there is no budget `{scope}`: container, tenant, and each with _day or _month");
            return Err((StatusCode::NOT_FOUND, what));
        };
        let (usd, tokens) = (query.money("usd")?, query.count("tokens")?);
        if usd.is_none() && tokens.is_none() {
            return Err(bad("say how much: usd=7.50, or tokens=9000"));
        }
        let tenant = query.get("tenant").filter(|_| scope.of_tenant());
        if scope.of_tenant() && tenant.is_none() {
            return Err(bad("say whose: tenant=NAME"));
        }
        Ok(Ask::Raise { scope, tenant, caps: Caps { usd, tokens } })
    }

    fn changes(&self) -> bool {
        !matches!(self, Ask::Budgets)
    }

    fn perform(self, desk: &Desk) -> Answer {
        let failed = |error: std::io::Error| {
            (StatusCode::SERVICE_UNAVAILABLE, format!("the hub's state directory cannot be read or written: {error}"))
        };
        match self {
            Ask::Budgets => {
                let standings = desk.standings().map_err(failed)?;
                let shown = standings.iter().flat_map(|standing| shown(standing, |run| desk.session_of(run)));
                Ok(json!({ "budgets": shown.collect::<Vec<Json>>() }))
            }
            Ask::Raise { scope, tenant, caps } => match desk.raise(scope, tenant.as_deref(), caps).map_err(failed)? {
                true => Ok(json!({ "raised": scope.as_str() })),
                false => Err((
                    StatusCode::INSUFFICIENT_STORAGE,
                    String::from("too many budgets were raised; wait until their time is over"),
                )),
            },
        }
    }
}

/// A budget, once in each of its units.
fn shown(standing: &Standing, session: impl Fn(&str) -> Option<String>) -> Vec<Json> {
    let Standing { scope, tenant, caps, raised, spent, reserved, period, waits } = standing;
    let most = caps.max(*raised);
    let waits: Vec<String> = waits.iter().map(|run| session(run).unwrap_or_else(|| run.clone())).collect();
    let one = |unit: &str, limit: Json, raised: Json, of: &dyn Fn(Amount) -> Json| {
        let mut one = json!({
            "scope": scope.as_str(), "unit": unit, "limit": limit,
            "used": of(*spent), "reserved": of(*reserved), "waits": waits,
        });
        // What does not apply is not there.
        let more = [
            ("tenant", json!(tenant)),
            ("raised", raised),
            ("period", json!(period.as_ref().map(|(name, _)| name))),
            ("ends_unix", json!(period.as_ref().map(|(_, ends)| ends.as_secs()))),
        ];
        if let Some(object) = one.as_object_mut() {
            object.extend(more.into_iter().filter(|(_, value)| !value.is_null()).map(|(key, value)| (key.to_owned(), value)));
        }
        one
    };
    let usd = most.usd.map(|usd| one("usd", json!(usd), json!(raised.usd), &|amount| json!(amount.usd)));
    let tokens = most.tokens.map(|tokens| one("tokens", json!(tokens), json!(raised.tokens), &|amount| json!(amount.tokens)));
    usd.into_iter().chain(tokens).collect()
}

fn bad(what: &str) -> Refusal {
    (StatusCode::BAD_REQUEST, what.to_owned())
}

/// What stands behind the question mark.
struct Query(Vec<(String, String)>);

impl Query {
    fn of(text: &str) -> Query {
        let pairs = text.split('&').filter_map(|pair| pair.split_once('='));
        Query(pairs.map(|(key, value)| (decoded(key), decoded(value))).collect())
    }

    fn get(&self, name: &str) -> Option<String> {
        self.0.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone())
    }

    fn value(&self, name: &str, kind: Kind) -> Result<Option<Value>, Refusal> {
        let Some(text) = self.get(name) else { return Ok(None) };
        kind.parse(&text).map(Some).map_err(|wrong| bad(&format!("`{name}` {wrong}; {}", kind.remedy())))
    }

    fn money(&self, name: &str) -> Result<Option<Usd>, Refusal> {
        Ok(self.value(name, Kind::Money)?.map(|value| Usd::from_f64(value.number())))
    }

    fn count(&self, name: &str) -> Result<Option<u64>, Refusal> {
        Ok(self.value(name, Kind::Count)?.and_then(|value| match value {
            Value::Count(n) => Some(n),
            _ => None,
        }))
    }
}

/// `%20` and the like, undone; what is no such thing stays as it is.
fn decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let byte =
            after.get(..2).filter(|_| first == b'%').and_then(|two| u8::from_str_radix(str::from_utf8(two).ok()?, 16).ok());
        bytes.push(byte.unwrap_or(first));
        rest = if byte.is_some() { &after[2..] } else { after };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(method: &Method, path: &str, query: &str) -> Result<Ask, u16> {
        Ask::of(method, path, &Query::of(query)).map_err(|(status, _)| status.as_u16())
    }

    #[test]
    fn what_is_asked_is_understood_or_refused() {
        let raise = |scope, tenant: Option<&str>, usd: Option<f64>, tokens| {
            Ok(Ask::Raise { scope, tenant: tenant.map(str::to_owned), caps: Caps { usd: usd.map(Usd::from_f64), tokens } })
        };
        let (get, post) = (&Method::GET, &Method::POST);
        for (method, path, query, expected) in [
            (get, "budgets", "", Ok(Ask::Budgets)),
            (post, "budgets", "", Err(405)),
            (get, "budgets/container", "usd=1", Err(405)),
            (post, "budgets/container", "usd=7.50", raise(Scope::Container, None, Some(7.5), None)),
            (post, "budgets/container_day", "tokens=9&tenant=a", raise(Scope::ContainerDay, None, None, Some(9))),
            (post, "budgets/tenant", "usd=1&tenant=a%20b%C3%BC%zz%", raise(Scope::Tenant, Some("a bü%zz%"), Some(1.0), None)),
            (post, "budgets/tenant", "usd=1", Err(400)),
            (post, "budgets/container", "usd=-1", Err(400)),
            (post, "budgets/container", "tokens=1.5", Err(400)),
            (post, "budgets/container", "", Err(400)),
            (post, "budgets/turn", "usd=1", Err(404)),
            (post, "budgets/container/x", "usd=1", Err(404)),
        ] {
            assert_eq!(ask(method, path, query), expected, "{method} {path} {query}");
        }
    }
}
