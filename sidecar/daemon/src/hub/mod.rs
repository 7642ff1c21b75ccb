//! One set of numbers for all wrappers of a container.
//!
//! ```text
//!   wrapper ─► share ─► its journal ┐
//!   wrapper ─► share ─► its journal ┼─► shelf ─► registry ─► /metrics /status …     whoever holds the lock: the hub
//!   (dead)              its journal ┘      └──► totals of those that ended
//! ```
//!
//! Each wrapper appends what it has counted, as totals, to a file of its own, and holds a lock on that file while it lives. The first
//! that gets the hub's lock serves for all; when it dies, the kernel gives the lock to the next. Nothing is sent and nothing is
//! answered, so nobody waits for a hub that hangs, and nothing is lost with a process: what was written is there for whoever reads.

mod desk;
pub(crate) mod gate;
mod hours;
mod journal;
mod orders;
mod place;
mod seat;
mod serve;
mod share;
mod shelf;
mod story;
mod till;
mod turnstile;
pub(crate) mod users;
mod zone;

pub(crate) use desk::{Desk, Options, Sees};
pub(crate) use hours::Hours;
pub(crate) use journal::{lives, pids};
pub(crate) use place::{Meeting, Place, try_lock};
pub(crate) use seat::{Guest, NoSeat, Seat};
pub(crate) use serve::{Turn, alone, beside};
pub(crate) use share::{Share, Teller, testify};
pub(crate) use till::{Payer, lock_named, lock_within};
pub(crate) use zone::{Day, Zone};
