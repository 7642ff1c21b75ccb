//! The other wrappers of the container: where they meet, how many may run, who serves them.

use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::Duration;

use agent_sidecar_core::limit::Mode as LimitMode;
use agent_sidecar_core::metric;
use agent_sidecar_core::who::Who;

use crate::config::Config;
use crate::conversation;
use crate::export::otlp;
use crate::fleet::Voice;
use crate::hang::within;
use crate::hub::{self, Guest, NoSeat, Payer, Place, Seat, Share, Teller, Turn};
use crate::supervise::{self, Ears, Failure, Handle, Ignored};

/// Where a wrapper's numbers go.
pub(super) enum Meet {
    /// They are served by itself, if at all.
    Alone,
    /// It should have met others, and there is no place to.
    Nowhere,
    At(Turn),
}

impl Meet {
    pub(super) fn hold_file(&self, run: &str) -> Option<PathBuf> {
        match self {
            Meet::At(turn) => Some(turn.place().hold_file(run)),
            Meet::Alone | Meet::Nowhere => None,
        }
    }
}

/// Whether others of this container are served together with us, and whether it is us who serves.
pub(super) fn turn(config: &Config, place: Option<std::io::Result<Place>>) -> Meet {
    let Some(place) = place else { return Meet::Alone };
    let listen = config.listen();
    match place.and_then(|place| within(Duration::ZERO, move || Turn::take(place, listen)).flatten()) {
        Ok(turn) => Meet::At(turn),
        Err(error) => {
            tracing::warn!(%error, "this agent is not served together with others, and shared budgets do not hold; name another --hub-state-dir, or --hub off");
            Meet::Nowhere
        }
    }
}

/// Whoever waits for a seat listens: PID 1 hears no signal that it does not ask for.
pub(super) fn ears(config: &Config, ignored: Ignored) -> Result<Option<Ears>, Failure> {
    if config.max_sessions().is_none() {
        return Ok(None);
    }
    let refused = |source: std::io::Error| Failure { exit_code: supervise::OWN_FAILURE, meant: false, source: source.into() };
    Ears::new(ignored).map(Some).map_err(refused)
}

/// Waits until there is room for one more agent. Without a place where they meet, nobody can be counted, and nobody waits.
pub(super) fn seat(
    config: &Config,
    place: Option<&std::io::Result<Place>>,
    run: &str,
    who: &Who,
    ears: &Ears,
) -> Result<Option<Seat>, Failure> {
    let (Some((seats, patience, mode)), Some(Ok(place))) = (config.max_sessions(), place) else { return Ok(None) };
    let shadow = mode == LimitMode::Shadow;
    let patience = if shadow { Duration::ZERO } else { patience };
    let guest = Guest { run: run.to_owned(), tenant: who.tenant.clone().unwrap_or_default(), weight: config.tenant_weight() };
    let (place, ears) = (place.clone(), ears.clone());
    match within(patience, move || Seat::take(&place, &guest, seats, patience, &ears)).flatten() {
        Ok(Ok(seat)) => Ok(Some(seat)),
        Ok(Err(full)) if shadow => {
            tracing::warn!(%full, "this agent would have had to wait");
            Ok(None)
        }
        Ok(Err(none)) => {
            let exit_code = match none {
                NoSeat::Told(signal) => u8::try_from(128 + signal).unwrap_or(supervise::OWN_FAILURE),
                NoSeat::Full { .. } => supervise::OWN_FAILURE,
            };
            Err(Failure { exit_code, meant: true, source: Box::new(none) })
        }
        Err(error) => {
            tracing::warn!(%error, "agents cannot be counted: this one is started");
            Ok(None)
        }
    }
}

#[expect(clippy::too_many_arguments, reason = "called once, with all of it")]
/// Has our numbers served by the hub, and the hub by us when it is our turn.
pub(super) fn join(
    config: &Config,
    turn: Turn,
    nonce: &str,
    who: Who,
    (hold_file, agent): (Option<PathBuf>, Option<(u32, u32)>),
    seat: Option<&Arc<Seat>>,
    handle: &Handle,
    counts: &Arc<otlp::Counts>,
    (conversation, fleet): (Option<conversation::Options>, Option<Voice>),
) -> Option<Share> {
    if turn.is_deaf() {
        handle.visit(|monitor, _| monitor.meters_mut().set(&metric::DEGRADED, &["http"], 1.0));
    }
    let shares = config.rules().iter().any(|rule| rule.is_shared() && rule.mode != LimitMode::Off);
    let options = hub::Options { labels: who.labels(), conversation, fleet, ..config.hub_options() };
    let teller = Teller {
        run: nonce.to_owned(),
        hold_file: hold_file.unwrap_or_else(|| turn.place().hold_file(nonce)),
        agent,
        payer: shares.then(|| Payer {
            tenant: who.tenant.clone(),
            zone: config.zone(),
            caps: config.caps(),
            sharing: config.sharing(),
            weight: config.tenant_weight(),
        }),
        seat: seat.map_or_else(Weak::new, Arc::downgrade),
        who,
        handle: handle.clone(),
        exports: Arc::clone(counts),
    };
    let share = Share::start(turn.place(), teller);
    let attended = share.and_then(|share| turn.attend(options, share.clone()).map(|()| share));
    match attended {
        Ok(share) => Some(share),
        Err(error) => {
            tracing::warn!(%error, "metrics are not served");
            handle.visit(|monitor, _| monitor.meters_mut().set(&metric::DEGRADED, &["hub"], 1.0));
            None
        }
    }
}
