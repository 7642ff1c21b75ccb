//! What several wrappers of a container make together: their journals' lines, and the registry that adds them up.
//!
//! ```text
//!   wrapper ──► journal (absolute totals, line by line) ──► registry: live ──(the wrapper is gone)──► retired
//! ```
//!
//! A line never says how much was added, only how much there is. Whoever reads a journal once more, from the start or from
//! anywhere, knows no more and no less than before; nothing can be lost or doubled by who reads, or by who dies while reading.

mod registry;
mod wire;

pub use registry::{Health, Registry, STALE, Stored};
pub use wire::{Hello, Line, Number, VERSION, changes};
