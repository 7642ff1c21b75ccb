//! What the sidecar in a container says: whether its agents work, until when to believe it, and what they have cost.

use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use reqwest::{Method, Response, StatusCode};
use serde::Deserialize;

use crate::conversation::{OF_SESSION, is_conversation};
use crate::provider::Endpoint;
use crate::session::{Report, SessionId};

/// How long a sidecar may take for an answer.
const ANSWER: Duration = Duration::from_secs(5);
/// A container has at most 1,500 series; more than this is no sidecar.
const MOST: usize = 4 << 20;
/// A container may say what it likes: more than this is not believed. Infinity has no JSON, and a session that has it could not be read again.
pub(crate) const USD_MOST: f64 = 1e9;
/// How long it is believed that one of several works: it is asked again before that.
const WORKS: Duration = Duration::from_secs(60);
const MEMORY: &str = "claude_agent_container_memory_working_set_bytes ";
const COST: &str = "claude_agent_cost_usd_total";

/// Who is asked.
#[async_trait]
pub trait Inside: Send + Sync {
    /// What it says now.
    ///
    /// # Errors
    /// It does not answer, or not as a sidecar would: in words.
    async fn report(&self, at: &Endpoint, now: Timestamp) -> Result<Report, String>;

    /// What its app says of one of the sessions in it: `GET /sessions/{id}`, as `agent-sidecar serve` answers it.
    ///
    /// # Errors
    /// It does not answer: in words.
    async fn session(&self, _at: &Endpoint, _token: Option<&str>, _id: &SessionId, _now: Timestamp) -> Result<Report, String> {
        Err(String::from("it cannot be asked for one of its sessions"))
    }

    /// One of the sessions in it is to end: `DELETE /sessions/{id}`.
    ///
    /// # Errors
    /// It does not answer: in words.
    async fn end(&self, _at: &Endpoint, _token: Option<&str>, _id: &SessionId) -> Result<(), String> {
        Err(String::from("it cannot be told of one of its sessions"))
    }

    /// Nothing of it is needed there any more: `DELETE /sessions/{id}/conversation`, with the container's token.
    ///
    /// # Errors
    /// It does not answer, or the session works: in words.
    async fn forget(&self, _at: &Endpoint, _token: &str, _id: &SessionId) -> Result<(), String> {
        Err(String::from("it cannot be told of one of its sessions"))
    }
}

/// Asked over HTTP, at the sidecar's own port.
pub struct Http {
    client: reqwest::Client,
}

/// As `/busy` says it.
#[derive(Deserialize)]
struct Word {
    busy: bool,
    /// Seconds since the Unix epoch.
    until: Option<i64>,
}

/// As `/sessions/{id}` says it.
#[derive(Deserialize)]
struct One {
    state: String,
    conversation: Option<String>,
    cost_usd: Option<f64>,
}

impl Http {
    pub fn new(client: reqwest::Client) -> Self {
        Self { client }
    }

    async fn send(&self, method: Method, at: &Endpoint, path: &str, token: Option<&str>) -> Result<Response, String> {
        let mut asked = self.client.request(method, format!("{}{path}", at.url)).timeout(ANSWER);
        for (name, value) in &at.headers {
            asked = asked.header(name, value);
        }
        if let Some(token) = token {
            asked = asked.bearer_auth(token);
        }
        asked.send().await.map_err(|error| error.without_url().to_string())
    }

    async fn get(&self, at: &Endpoint, path: &str) -> Result<Vec<u8>, String> {
        let answer = self.send(Method::GET, at, path, None).await?;
        if !answer.status().is_success() {
            return Err(format!("{path} answers {}", answer.status()));
        }
        Self::body(answer, path).await
    }

    async fn body(mut answer: Response, path: &str) -> Result<Vec<u8>, String> {
        let mut body = Vec::new();
        while let Some(chunk) = answer.chunk().await.map_err(|error| error.without_url().to_string())? {
            if body.len() + chunk.len() > MOST {
                return Err(format!("{path} says more than a sidecar would"));
            }
            body.extend_from_slice(&chunk);
        }
        Ok(body)
    }
}

#[async_trait]
impl Inside for Http {
    async fn report(&self, at: &Endpoint, now: Timestamp) -> Result<Report, String> {
        let word: Word = serde_json::from_slice(&self.get(at, "/busy").await?).map_err(|error| format!("/busy: {error}"))?;
        let metrics = self.get(at, "/metrics").await?;
        let metrics = String::from_utf8_lossy(&metrics);
        let (cost_usd, memory_bytes) = (cost(&metrics), memory(&metrics));
        // A lease without an end would never run out.
        let busy_until = word.until.filter(|_| word.busy).and_then(|until| Timestamp::from_second(until).ok());
        Ok(Report { at: now, busy_until, cost_usd, conversation: None, memory_bytes })
    }

    async fn session(&self, at: &Endpoint, token: Option<&str>, id: &SessionId, now: Timestamp) -> Result<Report, String> {
        let path = format!("/sessions/{id}");
        let answer = self.send(Method::GET, at, &path, token).await?;
        let idle = Report { at: now, busy_until: None, cost_usd: 0.0, conversation: None, memory_bytes: None };
        match answer.status() {
            // Nobody has said anything to it yet.
            StatusCode::NOT_FOUND => Ok(idle),
            status if status.is_success() => {
                let one: One =
                    serde_json::from_slice(&Self::body(answer, &path).await?).map_err(|error| format!("{path}: {error}"))?;
                Ok(Report {
                    busy_until: (one.state == "working").then_some(now + WORKS),
                    cost_usd: one.cost_usd.filter(|usd| usd.is_finite() && *usd > 0.0).unwrap_or_default().min(USD_MOST),
                    conversation: one.conversation.filter(|name| is_conversation(name)),
                    ..idle
                })
            }
            status => Err(format!("{path} answers {status}")),
        }
    }

    async fn end(&self, at: &Endpoint, token: Option<&str>, id: &SessionId) -> Result<(), String> {
        let path = format!("/sessions/{id}");
        let answer = self.send(Method::DELETE, at, &path, token).await?;
        match answer.status() {
            // An app that knows nothing of sessions has none to end.
            StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED => Ok(()),
            status if status.is_success() => Ok(()),
            status => Err(format!("{path} answers {status}")),
        }
    }

    async fn forget(&self, at: &Endpoint, token: &str, id: &SessionId) -> Result<(), String> {
        let path = format!("/sessions/{id}{OF_SESSION}");
        let answer = self.send(Method::DELETE, at, &path, Some(token)).await?;
        match answer.status() {
            StatusCode::NOT_FOUND => Ok(()),
            status if status.is_success() => Ok(()),
            status => Err(format!("{path} answers {status}")),
        }
    }
}

/// The sum of what all agents of the container have cost, in USD, from what `/metrics` says.
fn cost(metrics: &str) -> f64 {
    let series = metrics.lines().filter(|line| line.starts_with(COST) && line[COST.len()..].starts_with(['{', ' ']));
    let values = series.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
    values.filter(|value| value.is_finite() && *value > 0.0).sum::<f64>().min(USD_MOST)
}

/// What the container uses of memory, in bytes, if its sidecar can see it.
fn memory(metrics: &str) -> Option<u64> {
    bytes(metrics.lines().find_map(|line| line.strip_prefix(MEMORY)?.trim().parse::<f64>().ok())?)
}

/// An amount of memory, if it can be one.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked to be in range")]
pub(crate) fn bytes(value: f64) -> Option<u64> {
    (0.0..1e15).contains(&value).then_some(value as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn costs_are_added_up_over_models_and_slots_and_nothing_else_is() {
        let text = "# HELP claude_agent_cost_usd_total x\n# TYPE claude_agent_cost_usd_total counter\n\
            claude_agent_cost_usd_total{model=\"a b\",slot=\"0\"} 0.5\nclaude_agent_cost_usd_total{model=\"c\",slot=\"1\"} 0.25\n\
            claude_agent_cost_usd_total{model=\"d\"} NaN\nclaude_agent_cost_usd_totally 7\n";
        assert_eq!(cost(text), 0.75);
        assert_eq!(cost(""), 0.0);
    }

    #[test]
    fn memory_is_what_the_container_uses() {
        let text = "claude_agent_container_memory_working_set_bytes 1.5e8\nclaude_agent_container_memory_limit_bytes 3e8\n";
        assert_eq!(memory(text), Some(150_000_000));
        for none in
            ["", "claude_agent_container_memory_working_set_bytes NaN", "claude_agent_container_memory_working_set_bytes -1"]
        {
            assert_eq!(memory(none), None);
        }
    }

    #[test]
    fn what_no_agent_can_have_cost_is_still_a_number() {
        let text = "claude_agent_cost_usd_total{slot=\"0\"} 1e308\nclaude_agent_cost_usd_total{slot=\"1\"} 1.7e308\n";
        assert_eq!(cost(text), USD_MOST);
    }
}
