//! OTLP: the same numbers, and spans and events, as OpenTelemetry's protocol says them.

#[allow(dead_code, reason = "until something sends it")]
pub(crate) mod encode;
#[allow(dead_code, reason = "until something sends it")]
pub(crate) mod metrics;
