//! The built binary around real programs. Nothing here sleeps to be in time: it waits for a line, an exit, a process to be gone.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed; helpers are tests, too")]
mod attacks;
mod busy;
mod bytes;
mod check;
mod descriptors;
mod doctor;
mod exit_codes;
mod explain;
mod gate;
mod http;
mod hub;
mod inherited;
mod install;
mod namespaces;
mod native;
mod orphans;
mod otlp;
mod shim;
mod signals;
mod support;
mod tenants;
mod terminal;
mod top;
mod user;
mod users;
