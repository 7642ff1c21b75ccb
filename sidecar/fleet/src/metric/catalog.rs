//! Every metric that there is.

use agent_sidecar_core::metric::{Kind, Merge, Unit};

use super::Metric;

type Labels = &'static [&'static str];

const fn metric(kind: Kind, merge: Merge, name: &'static str, unit: Unit, labels: Labels, help: &'static str) -> Metric {
    Metric { name, kind, unit, labels, buckets: &[], merge, help }
}

const fn counter(name: &'static str, unit: Unit, labels: Labels, help: &'static str) -> Metric {
    metric(Kind::Counter, Merge::Sum, name, unit, labels, help)
}

/// Of what all fleets with one store read there, or of what each has for itself.
const fn gauge(merge: Merge, name: &'static str, unit: Unit, labels: Labels, help: &'static str) -> Metric {
    metric(Kind::Gauge, merge, name, unit, labels, help)
}

const fn histogram(name: &'static str, labels: Labels, buckets: &'static [f64], help: &'static str) -> Metric {
    Metric { buckets, ..metric(Kind::Histogram, Merge::Sum, name, Unit::Seconds, labels, help) }
}

/// From a container that was warm to one whose image had to be fetched.
const READY_SECONDS: &[f64] = &[0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0];
/// From one that is passed through to a day asleep.
const PHASE_SECONDS: &[f64] = &[0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3_600.0, 14_400.0, 86_400.0];
const ACTION_SECONDS: &[f64] = &[0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0];
const STORE_SECONDS: &[f64] = &[0.001, 0.005, 0.025, 0.1, 0.5, 2.5, 10.0];

/// Declares each as a `static`, and lists them all.
macro_rules! catalog {
    ($($id:ident = $metric:expr;)*) => {
        $(pub static $id: Metric = $metric;)*
        /// Every metric there is.
        pub static CATALOG: &[&Metric] = &[$(&$id),*];
    };
}

use Merge::{Max, Sum};
use Unit::{None as Plain, Seconds, Usd};

#[rustfmt::skip]
catalog! {
    // Sessions: where are they, how long does it take?
    SESSIONS = gauge(Max, "agent_fleet_sessions", Plain, &["phase", "provider", "tenant"], "Sessions that are remembered, by phase.");
    PHASES_ENTERED = counter("agent_fleet_phases_entered_total", Plain, &["phase", "provider"], "How often a session came into a phase.");
    PHASE_DURATION = histogram("agent_fleet_phase_duration_seconds", &["phase", "provider"], PHASE_SECONDS, "How long sessions were in a phase that they have left.");
    PHASE_OLDEST = gauge(Max, "agent_fleet_phase_oldest_seconds", Seconds, &["phase", "provider"], "How long the session has been in it that came into it first, of phases that pass; `failed` is one whose container is not gone yet.");
    READY = histogram("agent_fleet_ready_seconds", &["provider"], READY_SECONDS, "From the request to the first word of the sidecar in the container.");
    REFUSALS = counter("agent_fleet_refusals_total", Plain, &["reason", "tenant"], "Sessions that were asked for and not made: the budget, the number of sessions, what the provider cannot do, or that it is drained.");

    POOL_CLAIMS = counter("agent_fleet_pool_claims_total", Plain, &["outcome"], "Sessions of a template with a pool: `taken`, they had a container made ahead; `missed`, none was left.");
    POOL_FAILURES = counter("agent_fleet_pool_failures_total", Plain, &["template"], "Containers that were made ahead and did not come up, or ended within a minute: after each, nothing is made for longer, up to ten minutes.");

    DISRUPTIONS = counter("agent_fleet_disruptions_total", Plain, &["provider"], "Containers that were taken away by their provider, or by somebody there, before they were to end: evicted, preempted, deleted. No failures of their agents.");
    DRAINS = gauge(Max, "agent_fleet_drains", Plain, &["provider", "scope"], "What is being drained until somebody says otherwise: the `provider`, or so many of its `node`s.");

    // What is done for them, and by whom.
    ACTIONS_DONE = counter("agent_fleet_actions_total", Plain, &["action", "provider", "outcome"], "What was done for sessions. `busy` is a rate limit, `unsure` no answer, `refused` a no that stays one.");
    ACTION_DURATION = histogram("agent_fleet_action_duration_seconds", &["action", "provider"], ACTION_SECONDS, "How long that took, whatever came of it.");
    ORPHANS_REMOVED = counter("agent_fleet_orphans_removed_total", Plain, &["provider"], "Containers that no session held, and were removed.");
    STRANGERS = gauge(Max, "agent_fleet_strange_containers", Plain, &["provider"], "Containers of the fleet's name that are older than its store, and left alone: it may be the wrong store.");
    UNREAD = gauge(Max, "agent_fleet_unread_containers", Plain, &["provider"], "Containers on a provider's list that could not be read when it was last listed, or do not say when they were made: they are left as they are.");
    RECONCILES = counter("agent_fleet_reconciles_total", Plain, &["provider", "outcome"], "How often all that exists at a provider was listed and held against what is kept.");
    RECONCILED_AT = gauge(Max, "agent_fleet_reconciled_timestamp_seconds", Seconds, &["provider"], "When that last was done to the end.");

    // Hooks.
    HOOK_RUNS = counter("agent_fleet_hook_runs_total", Plain, &["hook", "outcome"], "Tries of hooks. `failed` and `timeout` are tried again; `dead-letter` is not, until somebody delivers it anew.");
    HOOK_DURATION = histogram("agent_fleet_hook_duration_seconds", &["hook"], ACTION_SECONDS, "How long a try took.");

    // Money.
    AGENT_COST = counter("agent_fleet_agent_cost_usd_total", Usd, &["provider", "tenant"], "What agents have cost, by the word of their sidecars.");
    CONTAINER_COST = counter("agent_fleet_container_cost_usd_total", Usd, &["provider", "tenant"], "What containers have cost, by the provider's price.");
    CONTAINER_SECONDS = counter("agent_fleet_container_seconds_total", Seconds, &["provider", "tenant"], "How long containers have been paid for.");
    BUDGET_USED = gauge(Max, "agent_fleet_budget_used_usd", Usd, &["tenant", "period"], "What a tenant has spent or set aside in the day or month that is now.");
    BUDGET_LIMIT = gauge(Max, "agent_fleet_budget_limit_usd", Usd, &["tenant", "period"], "What it may spend in that period.");

    // The fleet itself, and its store.
    CLAIMS = counter("agent_fleet_claims_total", Plain, &[], "Sessions that were due and taken on.");
    CLAIMED_AT = gauge(Max, "agent_fleet_claimed_timestamp_seconds", Seconds, &[], "When the store last said what is due. While as many are driven as may be, nobody asks.");
    LEASES = gauge(Sum, "agent_fleet_leases", Plain, &[], "Sessions that this fleet held when it last renewed its leases.");
    STORE_DURATION = histogram("agent_fleet_store_duration_seconds", &["operation"], STORE_SECONDS, "How long the store took for an answer.");
    STORE_ERRORS = counter("agent_fleet_store_errors_total", Plain, &["operation"], "What the store could not do. Who was outrun by another's write is none of it.");
    LISTENERS = gauge(Sum, "agent_fleet_event_listeners", Plain, &[], "Who listens to `/v1/events`.");
    SPANS = counter("agent_fleet_spans_total", Plain, &["outcome"], "Spans by what became of them, where they are sent anywhere: failed is the collector's doing, dropped ours.");
    BUILD_INFO = metric(Kind::Info, Max, "agent_fleet_build_info", Plain, &["version"], "Version of the fleet.");
}
