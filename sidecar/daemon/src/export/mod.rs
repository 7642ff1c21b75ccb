//! Where the numbers go. One file for each way out; all of them read the same [`agent_sidecar_core::metric::Meters`].

pub(crate) mod otlp;
pub(crate) mod prometheus;
