"""Containers for agents, from the outside: are they made, do they end, and what do they cost? What several fleets read in one store is taken once."""

from .kit import RED, Row, annotation, board, graph, heat, levels, listing, number, over, place_variables, quantiles

FAILED = 'action!~"hooks|ask", outcome=~"busy|failed|refused|unsure"'
FIRING = 'ALERTS{alertname=~"AgentFleet.+", alertstate="firing", namespace=~"$namespace"}'


def fine() -> Row:
    stalled, failing = "AgentFleetStalled", "AgentFleetProviderFailing"
    return Row("Is it fine?", [
        number("Sessions", "That are not over.", 'sum(max by (phase, provider, tenant) (agent_fleet_sessions{@, phase!~"destroyed|failed"})) or vector(0)'),
        number("Since something was taken on", "By whichever fleet asked the store last. Red: above two minutes: nobody drives sessions.",
            "time() - max(agent_fleet_claimed_timestamp_seconds{@})", "s", limits=over(stalled), runbook=stalled, decimals=0),
        number("Longest in a passing phase", "Of all sessions. Red: above a quarter of an hour.", "max(agent_fleet_phase_oldest_seconds{@})", "s",
            limits=over("AgentFleetSessionsStuck"), runbook="AgentFleetSessionsStuck", decimals=0),
        number("Calls that failed", "Of those to the worst provider, in ten minutes. Red: above a quarter.",
            f"max(sum by (provider) (increase(agent_fleet_actions_total{{@, {FAILED}}}[10m])) / (sum by (provider) (increase(agent_fleet_actions_total{{@, action!~\"hooks|ask\"}}[10m])) > 0)) or vector(0)",
            "percentunit", limits=over(failing, 1), runbook=failing),
        number("Orphans removed", "Containers that no session held. Bad: any.", "sum(grown(agent_fleet_orphans_removed_total{@}[$__range]))", limits=over("AgentFleetOrphans"), runbook="AgentFleetOrphans"),
        number("Strange containers", "Older than the store, and left alone. Bad: any: it may be the wrong store.", "sum(max by (provider) (agent_fleet_strange_containers{@}))",
            limits=over("AgentFleetStrangeContainers"), runbook="AgentFleetStrangeContainers"),
        number("Dead letters of hooks", "Calls that were given up. Bad: any: `agent-fleet redeliver` tells them again.",
            'sum(grown(agent_fleet_hook_runs_total{@, outcome="dead-letter"}[$__range])) or vector(0)', limits=over("AgentFleetHookDeadLetters"), runbook="AgentFleetHookDeadLetters"),
        number("Store errors", "In five minutes, of the worst fleet. Red: above three.", "max(sum by (@where) (increase(agent_fleet_store_errors_total{@}[5m])))",
            limits=over("AgentFleetStoreFailing"), runbook="AgentFleetStoreFailing", decimals=0),
    ])  # fmt: skip


def sessions() -> Row:
    fail, slow = "AgentFleetSessionsFail", "AgentFleetReadySlow"
    return Row("Sessions", [
        graph("Sessions by phase", "That are not over.", ('sum by (phase) (max by (phase, provider, tenant) (agent_fleet_sessions{@, phase!~"destroyed|failed"}))', "{{phase}}"), stack=True),
        graph("Sessions by tenant", "That are not over.", ('sum by (tenant) (max by (phase, provider, tenant) (agent_fleet_sessions{@, phase!~"destroyed|failed"}))', "{{tenant}}"), stack=True),
        graph("Sessions by provider", "That are not over.", ('sum by (provider) (max by (phase, provider, tenant) (agent_fleet_sessions{@, phase!~"destroyed|failed"}))', "{{provider}}"), stack=True),
        graph("How they ended", "Per interval. Bad: many that failed; `agent-fleet list --phase failed` says why each.",
            ('sum by (phase) (grown(agent_fleet_phases_entered_total{@, phase=~"destroyed|failed"}[$__interval]))', "{{phase}}"), bars=True, every="1m", runbook=fail),
        heat("Until they are ready", "From the request to the sidecar's first word. Bad: more than 30 s.", "agent_fleet_ready_seconds{@}", runbook=slow),
        quantiles("How long a phase takes", "The slowest tenth, by phase, of those that have left it.", "agent_fleet_phase_duration_seconds{@}", "phase", shares=(0.9,)),
        graph("Longest in a passing phase", "By phase. Bad: it only grows.", ("max by (phase) (agent_fleet_phase_oldest_seconds{@})", "{{phase}}"), unit="s", limits=over("AgentFleetSessionsStuck"), runbook="AgentFleetSessionsStuck"),
        graph("Refused", "Requests for sessions that were not made, per interval.", ("sum by (tenant, reason) (grown(agent_fleet_refusals_total{@}[$__interval]))", "{{tenant}}: {{reason}}"),
            bars=True, every="1m", runbook="AgentFleetRequestsRefused"),
        graph("Made ahead", "Sessions that found a container of their template's pool, or did not, and those made ahead that did not come up, per interval. Bad: many missed; any that failed.",
            ("sum by (outcome) (grown(agent_fleet_pool_claims_total{@}[$__interval]))", "{{outcome}}"),
            ("sum by (template) (grown(agent_fleet_pool_failures_total{@}[$__interval]))", "{{template}}: failed"), bars=True, every="1m", runbook="AgentFleetPoolFailing"),
        listing("Where they are", "By provider, tenant and phase.", {"Sessions": ("max by (provider, tenant, phase) (agent_fleet_sessions{@}) > 0", "short")}, w=8),
    ])  # fmt: skip


def money() -> Row:
    nearly = "AgentFleetBudgetNearlyUsed"
    return Row("Money", [
        levels("Budgets", "What a tenant has spent or set aside, of what it may. Red: above nine tenths.",
            "max by (tenant, period) (agent_fleet_budget_used_usd{@}) / (max by (tenant, period) (agent_fleet_budget_limit_usd{@}) > 0)", "{{tenant}}, {{period}}", limits=over(nearly, 1), runbook=nearly),
        graph("Agents' spend", "In an hour, by tenant, by the word of their sidecars.", ("sum by (tenant) (rate(agent_fleet_agent_cost_usd_total{@}[$__rate_interval])) * 3600", "{{tenant}}"), unit="currencyUSD", stack=True),
        graph("Containers' cost", "In an hour, by provider, by its price.", ("sum by (provider) (rate(agent_fleet_container_cost_usd_total{@}[$__rate_interval])) * 3600", "{{provider}}"), unit="currencyUSD", stack=True),
        listing("Who spent what", "In this time.", {
            "Agents": ("sum by (tenant, provider) (grown(agent_fleet_agent_cost_usd_total{@}[$__range]))", "currencyUSD"),
            "Containers": ("sum by (tenant, provider) (grown(agent_fleet_container_cost_usd_total{@}[$__range]))", "currencyUSD"),
            "Time of containers": ("sum by (tenant, provider) (grown(agent_fleet_container_seconds_total{@}[$__range]))", "s")}, sort="Agents"),
    ])  # fmt: skip


def providers() -> Row:
    failing = "AgentFleetProviderFailing"
    return Row("Providers and hooks", [
        graph("Calls by outcome", "A minute, but those that hooks and sidecars answered. Bad: all but ok. Busy is a rate limit, unsure no answer.",
            ('sum by (provider, outcome) (rate(agent_fleet_actions_total{@, action!~"hooks|ask"}[$__rate_interval])) * 60', "{{provider}} {{outcome}}"), unit="cpm", runbook=failing),
        quantiles("How long a call takes", "The slowest tenth, by what is done.", "agent_fleet_action_duration_seconds{@}", "action", shares=(0.9,)),
        graph("Since all was listed", "And held against what is kept. Bad: minutes: orphans are not found.",
            ("time() - max by (provider) (agent_fleet_reconciled_timestamp_seconds{@})", "{{provider}}"), unit="s", runbook="AgentFleetUnreconciled"),
        graph("Hooks by outcome", "Tries per interval. Bad: dead letters.", ("sum by (hook, outcome) (grown(agent_fleet_hook_runs_total{@}[$__interval]))", "{{hook}}: {{outcome}}"),
            bars=True, every="1m", runbook="AgentFleetHookDeadLetters"),
        quantiles("How long a hook takes", "The slowest tenth of its tries.", "agent_fleet_hook_duration_seconds{@}", "hook", shares=(0.9,)),
        graph("Lists that failed", "Per interval.", ('sum by (provider) (grown(agent_fleet_reconciles_total{@, outcome="failed"}[$__interval]))', "{{provider}}"), bars=True, every="1m", runbook="AgentFleetUnreconciled"),
    ])  # fmt: skip


def itself() -> Row:
    failing = "AgentFleetStoreFailing"
    return Row("The fleets and their store", [
        graph("Taken on", "Sessions that were due, a second.", ("sum by (@where) (rate(agent_fleet_claims_total{@}[$__rate_interval]))", "{{pod}} {{instance}}"), runbook="AgentFleetStalled"),
        graph("Held", "Sessions under a lease, and listeners to events.", ("sum by (@where) (agent_fleet_leases{@})", "held by {{pod}} {{instance}}"), ("sum(agent_fleet_event_listeners{@})", "listeners")),
        quantiles("The store's answers", "The slowest hundredth, by what it was asked.", "agent_fleet_store_duration_seconds{@}", "operation", shares=(0.99,)),
        graph("The store's errors", "Per interval. Bad: any for long.", ("sum by (operation) (grown(agent_fleet_store_errors_total{@}[$__interval]))", "{{operation}}"), bars=True, every="1m", runbook=failing),
        listing("Versions", "Bad: more of them than you rolled out.", {"Fleets": ("count by (version) (agent_fleet_build_info{@})", "short")}, w=8),
    ], collapsed=True)  # fmt: skip


def dashboard():
    marks = [annotation("Firing alerts", f"group by (alertname, severity) ({FIRING})", RED, "{{alertname}}", "{{severity}}", "severity")]
    return board("agent-fleet", "Agents: containers", "Whether agent-fleet makes and ends containers as it should, and what they cost.",
        [fine(), sessions(), money(), providers(), itself()], place_variables("agent_fleet_build_info"), marks=marks)  # fmt: skip
