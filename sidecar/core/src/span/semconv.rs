//! Names of attributes: what the GenAI semantic conventions call a thing, by their version, and what only we have a word for.

use crate::telemetry::{Attributes, Value};

/// Which names backends are to find.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Semconv {
    /// As up to v1.36 of the general conventions.
    V136,
    /// As in the first release of the GenAI conventions of their own.
    #[default]
    GenAi01,
    Both,
}

impl Semconv {
    pub const ALL: [Semconv; 3] = [Semconv::V136, Semconv::GenAi01, Semconv::Both];

    /// Its name in the configuration.
    pub fn as_str(self) -> &'static str {
        match self {
            Semconv::V136 => "v1.36",
            Semconv::GenAi01 => "genai-0.1",
            Semconv::Both => "both",
        }
    }

    pub fn of(name: &str) -> Option<Semconv> {
        Semconv::ALL.into_iter().find(|semconv| semconv.as_str() == name)
    }

    /// Says it under the name, or the names, that are wanted.
    pub(super) fn put(self, attributes: &mut Attributes, name: Name, value: impl Into<Value>) {
        let (old, new) = match self {
            Semconv::V136 => (name.old, None),
            Semconv::GenAi01 => (None, name.new),
            Semconv::Both => (name.old, name.new),
        };
        let value = value.into();
        for key in [old, new].into_iter().flatten() {
            put(attributes, key, value.clone());
        }
    }
}

/// A thing whose name changed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Name {
    old: Option<&'static str>,
    new: Option<&'static str>,
}

// The whole difference between the versions, as far as it concerns us.
/// Of a request.
pub(super) const PROVIDER: Name = Name { old: Some("gen_ai.system"), new: Some("gen_ai.provider.name") };
/// Of an agent in the same process the newer conventions do not ask for it.
pub(super) const AGENT_PROVIDER: Name = Name { old: Some("gen_ai.system"), new: None };
/// v1.36 has no names for cached tokens; most backends know the ones that came between it and the first release.
pub(super) const CACHE_READ: Name =
    Name { old: Some("gen_ai.usage.cache_read.input_tokens"), new: Some("gen_ai.usage.cache_read.input_tokens") };
pub(super) const CACHE_WRITE: Name =
    Name { old: Some("gen_ai.usage.cache_creation.input_tokens"), new: Some("gen_ai.usage.cache_write.input_tokens") };

/// From the request to the first of its answer, in seconds.
pub(super) const FIRST_CHUNK: Name =
    Name { old: Some("claude_agent.time_to_first_token_seconds"), new: Some("gen_ai.response.time_to_first_chunk") };

/// No key twice: what is said later holds.
pub(crate) fn put(attributes: &mut Attributes, key: &'static str, value: impl Into<Value>) {
    let value = value.into();
    match attributes.iter_mut().find(|(known, _)| *known == key) {
        Some((_, old)) => *old = value,
        None => attributes.push((key, value)),
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Value {
        Value::Str(text.to_owned())
    }
}

impl From<String> for Value {
    fn from(text: String) -> Value {
        Value::Str(text)
    }
}

impl From<u64> for Value {
    fn from(n: u64) -> Value {
        Value::Int(i64::try_from(n).unwrap_or(i64::MAX))
    }
}

impl From<f64> for Value {
    fn from(x: f64) -> Value {
        Value::Float(x)
    }
}

impl From<bool> for Value {
    fn from(b: bool) -> Value {
        Value::Bool(b)
    }
}

impl From<std::time::Duration> for Value {
    /// In seconds, as everywhere.
    fn from(duration: std::time::Duration) -> Value {
        Value::Float(duration.as_secs_f64())
    }
}

impl From<crate::tokens::Usd> for Value {
    fn from(usd: crate::tokens::Usd) -> Value {
        Value::Float(usd.to_f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_version_gets_its_names() {
        let keys = |semconv: Semconv| {
            let mut attributes = Attributes::new();
            for name in [PROVIDER, AGENT_PROVIDER, CACHE_READ, CACHE_WRITE] {
                semconv.put(&mut attributes, name, 1u64);
            }
            attributes.into_iter().map(|(key, _)| key).collect::<Vec<_>>()
        };
        let old = ["gen_ai.system", "gen_ai.usage.cache_read.input_tokens", "gen_ai.usage.cache_creation.input_tokens"];
        let new = ["gen_ai.provider.name", "gen_ai.usage.cache_read.input_tokens", "gen_ai.usage.cache_write.input_tokens"];
        assert_eq!(keys(Semconv::V136), old);
        assert_eq!(keys(Semconv::GenAi01), new);
        let both = keys(Semconv::Both);
        assert!(old.iter().chain(&new).all(|key| both.contains(key)) && both.len() == 5, "{both:?}");
        for semconv in Semconv::ALL {
            assert_eq!(Semconv::of(semconv.as_str()), Some(semconv));
        }
        assert_eq!(Semconv::of("v1.37"), None);
    }
}
