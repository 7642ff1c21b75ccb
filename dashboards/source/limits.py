"""Which limits hold, which would, whether stops work, and who goes round what."""

from .kit import Row, above, annotations, below, board, graph, heat, levels, listing, number, over, place_variables, quantiles, threshold, variable

KEPT = 'claude_agent_enforcements_total{@, mode="enforce", action!="warn"}'
WOULD = 'claude_agent_enforcements_total{@, mode="shadow", action!="warn"}'


def fine() -> Row:
    return Row("Is it fine?", [
        number("Enforced", "Limits that were enforced in this time, warnings aside. Not bad in itself; see which below.", f"sum(grown({KEPT}[$__range])) or vector(0)",
            runbook="ClaudeAgentLimitEnforced", limits=over("ClaudeAgentLimitEnforced", worse=False)),
        number("Would have been", "What limits in shadow mode would have done. Once these are what you want, set them to enforce.", f"sum(grown({WOULD}[$__range])) or vector(0)"),
        number("Kills, last hour", "Stops that had to be kills. Red: more than three on a container. What a killed turn cost is an estimate.",
            'max(sum by (@where) (grown(claude_agent_enforcements_total{@, mode="enforce", action="kill"}[1h]))) or vector(0)',
            limits=over("ClaudeAgentStopIneffective", 1), runbook="ClaudeAgentStopIneffective"),
        number("Slow stops, last hour", "Agents that were quiet only 30 s after it was decided. Bad: any.",
            'sum(grown(claude_agent_enforcement_latency_seconds_count{@}[1h])) - sum(grown(claude_agent_enforcement_latency_seconds_bucket{@, le=~"30(\\\\.0)?"}[1h]))',
            limits=over("ClaudeAgentStopIneffective"), runbook="ClaudeAgentStopIneffective"),
        number("Circles at their ceiling", "Agents that went round in circles as far as allowed, in this time. In shadow mode they go on, and spend.",
            'sum(grown(claude_agent_loop_detections_total{@, action!="warn"}[$__range]))', limits=over("ClaudeAgentLoop"), runbook="ClaudeAgentLoop"),
        number("Wait for a permission", "Agents that wait now. Bad: for half an hour: nobody answers.", 'sum(claude_agent_process_state{@, state="permission"})',
            runbook="ClaudeAgentWaitsForPerson", limits=over("ClaudeAgentWaitsForPerson", worse=False)),
        number("Tenants that met", "What agents of different tenants shared, or would have. Bad: any.", "sum(grown(claude_agent_tenant_conflicts_total{@}[$__range]))",
            limits=over("ClaudeAgentTenantConflict"), runbook="ClaudeAgentTenantConflict"),
        number("Files changed", "Ledgers, events, journals and books of budgets that somebody else changed, in this time. Bad: any.",
            "sum(grown(agent_sidecar_tampered_total{@}[$__range]))", limits=over("AgentSidecarTampered"), runbook="AgentSidecarTampered"),
    ])  # fmt: skip


def limits() -> Row:
    return Row("Limits", [
        levels("Most used, of each limit", "The fullest of all agents. Warnings come at 50, 80 and 95 %.", "max by (limit, scope) (claude_agent_limit_used_ratio{@})",
            "{{limit}} ({{scope}})", limits=above(0.95, 0.8)),
        graph("Used over time", "The fullest agent for each limit.", ("max by (limit, scope) (claude_agent_limit_used_ratio{@})", "{{limit}} ({{scope}})"), unit="percentunit", limits=above(0.95, 0.8)),
        graph("Done about limits", "Per interval; warnings aside.",
            (f"sum by (limit, action) (grown({KEPT}[$__interval])) > 0", "{{limit}}: {{action}}"), bars=True, every="1m", runbook="ClaudeAgentLimitEnforced"),
        listing("Enforced, and what shadow mode would have done", """Each limit and action in this time. A limit with much under shadow and what it would stop being unwanted: enforce
            it. One with much under enforce: too low, or agents go wrong.""", {
            "Enforced": ('sum by (limit, scope, action) (grown(claude_agent_enforcements_total{@, mode="enforce"}[$__range]))', "short"),
            "In shadow": ('sum by (limit, scope, action) (grown(claude_agent_enforcements_total{@, mode="shadow"}[$__range]))', "short"),
        }, w=12, sort="Enforced"),
        graph("Shadow", "What would have been done, per interval.", (f"sum by (limit, action) (grown({WOULD}[$__interval])) > 0", "{{limit}}: {{action}}"), bars=True, every="1m", w=12),
    ])  # fmt: skip


def stops() -> Row:
    return Row("Do stops work?", [
        quantiles("From the decision until it is quiet", "By action. Bad: above 30 s.", "claude_agent_enforcement_latency_seconds{@}", "action", shares=(0.5, 0.95),
            limits=above(30), runbook="ClaudeAgentStopIneffective"),
        heat("Spent above a limit", "What was spent beyond it before it held: the answer that was under way. Bad: a band that moves up.", "claude_agent_enforcement_overshoot_usd{@}", "currencyUSD"),
        graph("Overshoot, mean", "Of each enforcement of the last hour, by scope. Bad: it grows: answers get dearer.",
            ("sum by (scope) (grown(claude_agent_enforcement_overshoot_usd_sum{@}[1h])) / (sum by (scope) (grown(claude_agent_enforcement_overshoot_usd_count{@}[1h])) > 0)", "{{scope}}"), unit="currencyUSD"),
        quantiles("Steps of a stop", "p95 of each phase.", "claude_agent_shutdown_seconds{@}", "phase", shares=(0.95,)),
        graph("Ends", "CLIs that ended, per interval, by reason. limit, idle and stuck are ours.",
            ("sum by (reason) (grown(claude_agent_process_exits_total{@}[$__interval])) > 0", "{{reason}}"), bars=True, every="1m"),
        graph("Ended because idle", "Per interval. Bad: none, where agents are idle for long: shadow mode, or the stop does not work.",
            ("sum(grown(claude_agent_idle_shutdowns_total{@}[$__interval]))", "ended"), bars=True, every="1m", runbook="ClaudeAgentIdleWaste"),
    ])  # fmt: skip


def circles() -> Row:
    return Row("Circles and permissions", [
        graph("Circles, by kind", "Per interval; warn: half the ceiling.", ("sum by (kind, action) (grown(claude_agent_loop_detections_total{@}[$__interval])) > 0", "{{kind}} {{action}}"),
            bars=True, every="1m", runbook="ClaudeAgentLoop"),
        graph("Longest streak", "How often in a row an agent did the same, or failed alike.", ("max by (@where) (claude_agent_repeat_streak{@})", "{{pod}} {{instance}}"), link=True, runbook="ClaudeAgentLoop"),
        quantiles("Waiting for a permission", "By decision. Bad: minutes: people are the bottleneck, or nobody is there.", "claude_agent_permission_wait_seconds{@}", "decision", shares=(0.5, 0.95),
            runbook="ClaudeAgentWaitsForPerson"),
        graph("Denied", "Tool calls that were not allowed, per interval. Bad: the same tool again and again: tell the agent, or allow it.",
            ("sum by (tool) (grown(claude_agent_permission_denials_total{@}[$__interval]))", "{{tool}}"), bars=True, every="1m"),
        graph("Subagents", "Started per interval, by type. Bad: a burst; bounded by max_subagents.", ("sum by (type) (grown(claude_agent_subagents_started_total{@}[$__interval]))", "{{type}}"), bars=True, every="1m"),
        quantiles("Duration of subagents", "p95 by outcome; bounded by subagent_max_duration.", "claude_agent_subagent_duration_seconds{@}", "outcome", shares=(0.95,)),
    ])  # fmt: skip


def people() -> Row:
    return Row("People and tenants", [
        graph("Orders", "What people have asked of running agents, per interval.", ("sum by (order) (grown(claude_agent_orders_total{@}[$__interval]))", "{{order}}"), bars=True, every="1m"),
        graph("Paused agents", "They take no messages until resumed. Bad: forgotten ones.", ("sum by (@where) (claude_agent_paused{@})", "{{pod}} {{instance}}"), link=True),
        graph("Requests to control agents", "Per interval, by whether they were let in. Bad: unauthorized or limited: somebody without a right to tries.",
            ("sum by (outcome) (grown(agent_sidecar_control_requests_total{@}[$__interval]))", "{{outcome}}"), bars=True, every="1m", runbook="AgentSidecarControlRefused"),
        graph("Tenants that met", "Per interval, by what they shared and what was done. Bad: any; flagged means that the agent runs.",
            ("sum by (kind, action) (grown(claude_agent_tenant_conflicts_total{@}[$__interval]))", "{{kind}} {{action}}"), bars=True, every="1m", h=6, runbook="ClaudeAgentTenantConflict"),
        graph("CLIs without a sidecar", "By container. Bad: any.", ("max by (@where) (agent_sidecar_unwrapped_processes{@})", "{{pod}} {{instance}}"), h=6, runbook="AgentSidecarUnwrapped", link=True),
        graph("Files changed by somebody else", "Ledgers, events, journals and books of budgets, per interval. Bad: any: what a ledger lacks, a bill lacks.",
            ("sum by (file) (grown(agent_sidecar_tampered_total{@}[$__interval]))", "{{file}}"), bars=True, every="1m", h=6, runbook="AgentSidecarTampered"),
    ], collapsed=True)  # fmt: skip


def dashboard():
    return board("agent-sidecar-limits", "Agents: limits and safety", "Which limits are reached, what was done or in shadow mode would have been, whether stops work, circles, permissions, tenants.",
        [fine(), limits(), stops(), circles(), people()],
        place_variables("agent_sidecar_build_info") + [variable("tenant", "claude_agent_sessions_active", ["cluster", "namespace", "job", "pod", "instance"], all_value=".*")],
        marks=annotations(), since="now-24h", refresh="1m")  # fmt: skip
