//! Bytes in, decisions out: what a Claude agent says on its pipes, as events, a ledger, limits and metrics.
//!
//! Nothing here reads a clock, a file, the environment or a socket: the caller hands in bytes, samples and the time, and performs
//! what comes back. `Cargo.toml` (no runtime among the dependencies) and `clippy.toml` (no clock, no file) hold this to be so.
#![forbid(unsafe_code)]

pub mod ask;
pub mod bill;
pub mod budget;
pub mod content;
pub mod detect;
pub mod event;
pub mod explain;
pub mod exponential;
pub mod fair;
mod hash;
pub mod hub;
pub mod ladder;
pub mod launch;
pub mod ledger;
pub mod limit;
pub mod line;
pub mod log;
pub mod meter;
pub mod metric;
pub mod monitor;
pub mod native;
pub mod order;
pub mod price;
pub mod record;
pub mod report;
pub mod sample;
pub mod session;
pub mod span;
pub mod telemetry;
pub mod timeline;
pub mod tokens;
pub mod update;
pub mod who;
pub mod written;

pub use monitor::{Action, Exit, Input, Monitor, Now, Output, Settings, Signal, Stop};
