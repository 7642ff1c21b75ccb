//! What can be asked and changed at the hub, below `/v1`.
//!
//! ```text
//!   GET  /v1/budgets                                    how all shared budgets stand
//!   POST /v1/budgets/SCOPE?usd=7.50&tokens=9000&tenant=NAME    makes one larger
//!   POST /v1/pause?now=true  /v1/resume                 all agents, those that are started later, too
//!   POST /v1/sessions/ID/pause?now=true  …/resume  …/interrupt  …/stop
//!   POST /v1/sessions/ID/limits?max_cost_usd=9&max_tokens=9&session_max_turns=9
//! ```
//!
//! `ID` is a session's id, or its slot.

use std::sync::Arc;

use agent_sidecar_core::budget::share::{Part, Shares};
use agent_sidecar_core::budget::{Amount, Caps, Standing};
use agent_sidecar_core::limit::Scope;
use agent_sidecar_core::order::{Raised, What};
use agent_sidecar_core::tokens::Usd;
use hyper::{Method, StatusCode};
use serde_json::{Value as Json, json};

use crate::config::{Kind, Value};
use crate::hub::Desk;

const WHAT_THERE_IS: &str = "not here; there are /v1/budgets, /v1/budgets/SCOPE, /v1/pause, /v1/resume, and \
    /v1/sessions/ID/ with pause, resume, interrupt, stop or limits";

/// Why something was not done: a sentence for people.
type Refusal = (StatusCode, String);

/// What is answered: an object, or why not.
pub(crate) type Answer = Result<Json, Refusal>;

/// Answers a request below `/v1`; nothing if it is none of these. Who posts may do so: [`crate::hub::gate`] was asked before.
pub(crate) async fn answer(desk: &Arc<Desk>, method: &Method, path: &str, query: Option<&str>) -> Option<Answer> {
    let path = path.strip_prefix("/v1/")?;
    let ask = match Ask::of(method, path, &Query::of(query.unwrap_or_default())) {
        Ok(ask) => ask,
        Err(refusal) => return Some(Err(refusal)),
    };
    let desk = Arc::clone(desk);
    // A disk that hangs holds up this answer and no other.
    let done = tokio::task::spawn_blocking(move || ask.perform(&desk)).await;
    Some(done.unwrap_or_else(|_| Err((StatusCode::INTERNAL_SERVER_ERROR, String::from("the hub failed at it")))))
}

/// What is asked.
#[derive(Clone, Debug, PartialEq)]
enum Ask {
    Budgets,
    Raise {
        scope: Scope,
        tenant: Option<String>,
        caps: Caps,
    },
    /// Of one, or of all.
    Order {
        whom: Option<String>,
        what: What,
    },
}

impl Ask {
    fn of(method: &Method, path: &str, query: &Query) -> Result<Ask, Refusal> {
        let parts: Vec<&str> = path.split('/').collect();
        let wanted = match parts[..] {
            ["budgets"] => Method::GET,
            ["budgets" | "pause" | "resume", ..] if parts.len() < 3 => Method::POST,
            ["sessions", _, _] => Method::POST,
            _ => return Err((StatusCode::NOT_FOUND, String::from(WHAT_THERE_IS))),
        };
        if *method != wanted && !(wanted == Method::GET && *method == Method::HEAD) {
            return Err((StatusCode::METHOD_NOT_ALLOWED, format!("ask this with {wanted}")));
        }
        match parts[..] {
            ["budgets", scope] => Ask::raise(scope, query),
            [verb @ ("pause" | "resume")] => Ok(Ask::Order { whom: None, what: Ask::what(verb, query)? }),
            ["sessions", whom, verb] => Ok(Ask::Order { whom: Some(decoded(whom)), what: Ask::what(verb, query)? }),
            ["budgets"] => Ok(Ask::Budgets),
            _ => Err((StatusCode::NOT_FOUND, String::from(WHAT_THERE_IS))),
        }
    }

    fn what(verb: &str, query: &Query) -> Result<What, Refusal> {
        Ok(match verb {
            "pause" => What::Pause { now: matches!(query.value("now", Kind::Switch)?, Some(Value::Switch(true))) },
            "resume" => What::Resume,
            "interrupt" => What::Interrupt,
            "stop" => What::Stop,
            "limits" => {
                let (usd, tokens) = (query.money("max_cost_usd")?, query.count("max_tokens")?);
                let raised = Raised { usd, tokens, turns: query.count("session_max_turns")? };
                if raised.is_empty() {
                    return Err(bad("say what: max_cost_usd=9, max_tokens=9 or session_max_turns=9"));
                }
                What::Raise(raised)
            }
            _ => return Err((StatusCode::NOT_FOUND, String::from(WHAT_THERE_IS))),
        })
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
            Ask::Order { whom: None, what } => {
                let now = what == What::Pause { now: true };
                let agents = desk.pause_all(what != What::Resume, now).map_err(failed)?;
                Ok(json!({ "agents": agents }))
            }
            Ask::Order { whom: Some(whom), what } => {
                if let What::Raise(raised) = what {
                    raisable(desk, &whom, &raised)?;
                }
                match desk.order(&whom, what).map_err(failed)? {
                    0 => Err((StatusCode::NOT_FOUND, format!("no session `{whom}` runs here; /status lists those that do"))),
                    agents => Ok(json!({ "agents": agents })),
                }
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

/// A limit that is not there, or is as large already, cannot be raised.
fn raisable(desk: &Desk, whom: &str, raised: &Raised) -> Result<(), Refusal> {
    for (limit, wanted) in raised.each() {
        for ceiling in desk.ceilings(whom, limit) {
            let what = match ceiling {
                None => format!("the session has no limit of its {}", limit.as_str()),
                Some(ceiling) if ceiling >= wanted => {
                    format!("the session's limit of its {} is {ceiling} already", limit.as_str())
                }
                Some(_) => continue,
            };
            return Err((StatusCode::CONFLICT, what));
        }
    }
    Ok(())
}

/// A budget, once in each of its units.
fn shown(standing: &Standing, session: impl Fn(&str) -> Option<String>) -> Vec<Json> {
    let Standing { scope, tenant, caps, raised, spent, reserved, period, waits, shares } = standing;
    let most = caps.max(*raised);
    let named = |run: &String| session(run).unwrap_or_else(|| run.clone());
    let waits: Vec<String> = waits.iter().map(named).collect();
    let shares_in = |part: &dyn Fn(&Shares) -> Option<Part>, amount: &dyn Fn(u64) -> Json| {
        let each = shares.iter().filter_map(|(run, shares)| Some((named(run), part(shares)?)));
        let each: Vec<Json> = each
            .map(|(session, part)| {
                json!({ "session": session, "used": amount(part.had), "of": amount(part.of), "tenant": part.tenants })
            })
            .collect();
        if each.is_empty() { Json::Null } else { Json::from(each) }
    };
    let one = |unit: &str, limit: Json, raised: Json, shares: Json, of: &dyn Fn(Amount) -> Json| {
        let mut one = json!({
            "scope": scope.as_str(), "unit": unit, "limit": limit,
            "used": of(*spent), "reserved": of(*reserved), "waits": waits,
        });
        // What does not apply is not there.
        let more = [
            ("tenant", json!(tenant)),
            ("raised", raised),
            ("shares", shares),
            ("period", json!(period.as_ref().map(|(name, _)| name))),
            ("ends_unix", json!(period.as_ref().map(|(_, ends)| ends.as_secs()))),
        ];
        if let Some(object) = one.as_object_mut() {
            object.extend(more.into_iter().filter(|(_, value)| !value.is_null()).map(|(key, value)| (key.to_owned(), value)));
        }
        one
    };
    let usd = most.usd.map(|usd| {
        let shares = shares_in(&|shares| shares.usd, &|pico| json!(Usd::from_pico(pico)));
        one("usd", json!(usd), json!(raised.usd), shares, &|amount| json!(amount.usd))
    });
    let tokens = most.tokens.map(|tokens| {
        let shares = shares_in(&|shares| shares.tokens, &|tokens| json!(tokens));
        one("tokens", json!(tokens), json!(raised.tokens), shares, &|amount| json!(amount.tokens))
    });
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
        let order = |whom: Option<&str>, what| Ok(Ask::Order { whom: whom.map(str::to_owned), what });
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
            (post, "pause", "", order(None, What::Pause { now: false })),
            (post, "pause", "now=true", order(None, What::Pause { now: true })),
            (post, "pause", "now=perhaps", Err(400)),
            (get, "pause", "", Err(405)),
            (post, "pause/x", "", Err(404)),
            (post, "sessions/a%2Fb/resume", "", order(Some("a/b"), What::Resume)),
            (post, "sessions/0/stop", "", order(Some("0"), What::Stop)),
            (post, "sessions/0/interrupt", "", order(Some("0"), What::Interrupt)),
            (
                post,
                "sessions/0/limits",
                "max_tokens=7",
                order(Some("0"), What::Raise(Raised { tokens: Some(7), ..Raised::default() })),
            ),
            (post, "sessions/0/limits", "max_duration=7s", Err(400)),
            (post, "sessions/0/limits", "max_cost_usd=0", Err(400)),
            (post, "sessions/0/sing", "", Err(404)),
        ] {
            assert_eq!(ask(method, path, query), expected, "{method} {path} {query}");
        }
    }
}
