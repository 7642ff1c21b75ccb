//! Containers for agents, from the outside: created when somebody asks, watched by the word of the sidecar inside, put to sleep, woken and
//! destroyed, and none forgotten.
//!
//! [`lifecycle`] and [`plan`] decide and touch nothing; [`provider`], [`store`] and [`hook`] are the edges; [`service`] drives one with the
//! others, step by step, so that whoever dies in between leaves what the next can go on from.

pub mod api;
pub mod budget;
pub mod build;
pub mod config;
pub mod conversation;
pub mod drain;
pub mod hook;
pub mod inside;
pub mod lifecycle;
pub mod metric;
pub mod place;
pub mod plan;
pub mod pool;
pub mod provider;
mod proxy;
mod retry_after;
pub mod serve;
pub mod service;
pub mod session;
pub mod store;
pub mod token;
pub mod trace;
mod websocket;
