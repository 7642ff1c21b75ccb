//! What the sidecar in a container says: whether its agents work, until when to believe it, and what they have cost.

use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use serde::Deserialize;

use crate::provider::Endpoint;
use crate::session::Report;

/// How long a sidecar may take for an answer.
const ANSWER: Duration = Duration::from_secs(5);
/// A container has at most 1,500 series; more than this is no sidecar.
const MOST: usize = 4 << 20;
/// A container may say what it likes: more than this is not believed. Infinity has no JSON, and a session that has it could not be read again.
pub(crate) const USD_MOST: f64 = 1e9;
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

impl Http {
    pub fn new(client: reqwest::Client) -> Self {
        Self { client }
    }

    async fn get(&self, at: &Endpoint, path: &str) -> Result<Vec<u8>, String> {
        let mut asked = self.client.get(format!("{}{path}", at.url)).timeout(ANSWER);
        for (name, value) in &at.headers {
            asked = asked.header(name, value);
        }
        let mut answer = asked.send().await.map_err(|error| error.without_url().to_string())?;
        if !answer.status().is_success() {
            return Err(format!("{path} answers {}", answer.status()));
        }
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
