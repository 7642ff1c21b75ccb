"""Is it fine? And if not, where: for whoever runs many agents."""

from .kit import AGENT_OF_SERIES, BAD_TURNS, FIRING, Row, above, annotations, below, board, graph, heat, listing, number, over, place_variables, quantiles, states, threshold, timeline, variable  # noqa: E501

BAD = f'claude_agent_turns_total{{@, outcome=~"{BAD_TURNS}"}}'
ALL = "claude_agent_turns_total{@}"
GOAL = threshold("ClaudeAgentTurnErrorsSlow", 2)
RETRIED = 'claude_agent_api_retries_total{@, error=~"overloaded|rate_limit|server_error"}'
MODEL = 'model=~"$model"'


def fine() -> Row:
    return Row("Is it fine?", [
        number("Firing alerts", """Critical and warning. Bad: any. Each says what to do; see the list of runbooks. Needs the rules of alerts/ in this
            data source; without them it stays at 0.""",
            f'count({FIRING.replace("}", ", severity=~" + chr(34) + "critical|warning" + chr(34) + "}")}) or vector(0)', limits=above(1)),
        number("Turns that fail", """Of the turns in this time, those that ended with neither a result nor anybody's wish. Yellow: above what was promised (1 %).
            Red: burning the month's allowance within days. See by outcome below.""",
            f"sum(grown({BAD}[$__range])) / (sum(grown({ALL}[$__range])) > 0)", "percentunit",
            limits=above(threshold("ClaudeAgentTurnErrorsFast"), GOAL), runbook="ClaudeAgentTurnErrorsFast", decimals=1),
        number("Error budget left", """What is left of the 1 % of turns that may fail, if this time were the whole period. Bad: below zero.""",
            f"1 - sum(grown({BAD}[$__range])) / (sum(grown({ALL}[$__range])) > 0) / {GOAL}", "percentunit", limits=below(0, 0.25), decimals=0),
        number("Agents", "CLIs that run.", "sum(claude_agent_sessions_active{@})"),
        number("Stuck agents", "Past a time limit, or held up by something. Bad: any for five minutes. See the agent's dashboard for where it is.",
            "sum(max by (@where, slot) (claude_agent_stalled{@} > bool 0))", limits=over("ClaudeAgentStuck"), runbook="ClaudeAgentStuck"),
        number("Idle agents", "They wait for their app. Much idle time is paid for: set idle_timeout.",
            'sum(claude_agent_process_state{@, state=~"idle|waiting_input"})'),
        number("Spent, last hour", "By all agents chosen, those that have ended included. Whether that is much, the spend dashboard tells.",
            "sum(grown(claude_agent_cost_usd_total{@}[1h]))", "currencyUSD", decimals=2),
        number("Enforced, last hour", "Not bad in itself: limits do what they were set for. Many mean limits that are too low, or agents that go wrong.",
            'sum(grown(claude_agent_enforcements_total{@, mode="enforce", action!="warn"}[1h])) or vector(0)', runbook="ClaudeAgentLimitEnforced",
            limits=over("ClaudeAgentLimitEnforced", worse=False)),
    ])  # fmt: skip


def agents() -> Row:
    return Row("Agents", [
        graph("What agents do", "Each agent is in one state. Bad: many stuck, in permission or in retry_backoff.",
            ("sum by (state) (claude_agent_process_state{@})", "{{state}}"), stack=True, w=10),
        listing("Containers, the dearest first", """The twenty that spent most in this time. Bad: stuck agents, failed turns, a full window. The name leads to the
            container's own dashboard.""", {
            "Spent": ("topk(20, sum by (@where) (grown(claude_agent_cost_usd_total{@}[$__range])))", "currencyUSD"),
            "Agents": ("sum by (@where) (claude_agent_sessions_active{@})", "short"),
            "Stuck": ("sum by (@where) (max by (@where, slot) (claude_agent_stalled{@} > bool 0))", "short"),
            "Failed turns": (f"sum by (@where) (grown({BAD}[$__range]))", "short"),
            "Fullest window": ("max by (@where) (claude_agent_context_used_ratio{@})", "percentunit"),
        }, w=14, sort="Spent", link=True, limits={"Stuck": over("ClaudeAgentStuck"), "Fullest window": above(0.95, 0.8)}),
    ])  # fmt: skip


def turns() -> Row:
    return Row("Turns", [
        graph("Turns by outcome", "Per interval. Bad: no_result, crashed, stuck_killed and the errors. Neutral: interrupted, limit_stopped and the limits that were reached.",
            ("sum by (outcome) (grown(claude_agent_turns_total{@}[$__interval])) > 0", "{{outcome}}"), bars=True, every="1m"),
        graph("Turns that fail, of the last hour", "The lower line is what was promised, the upper one where the alert fires.",
            (f"sum(increase({BAD}[1h])) / (sum(increase({ALL}[1h])) > 0)", "failed"), unit="percentunit",
            limits=above(threshold("ClaudeAgentTurnErrorsFast"), GOAL), runbook="ClaudeAgentTurnErrorsFast"),
        heat("How long turns take", "Darker: more turns. Bad: a band that moves up. With metrics by OTLP and exemplars kept, a point leads to the turn's trace.",
            "claude_agent_turn_duration_seconds{@}"),
        quantiles("Turn duration", "Bad: p95 that grows while requests per turn do not: the provider or the tools are slower.", "claude_agent_turn_duration_seconds{@}"),
        graph("Why turns end", "The reason that the CLI gave, per interval. Bad: api_error, prompt_too_long, malformed_tool_use_exhausted.",
            ("sum by (reason) (grown(claude_agent_turn_terminations_total{@}[$__interval])) > 0", "{{reason}}"), bars=True, every="1m"),
        quantiles("Model requests per turn", "Bad: p95 that grows: agents need more steps, or go round in circles. Bounded by max_turns.",
            "claude_agent_turn_model_requests{@}", unit="short"),
    ])  # fmt: skip


def provider() -> Row:
    ttft = "claude_agent_time_to_first_token_seconds"
    return Row("Provider", [
        quantiles("Time to the first token", "95 % are to begin within 10 s. Bad: above the line; usually the provider is busy, see retries.",
            f"{ttft}{{@, {MODEL}}}", shares=(0.5, 0.95), limits=above(10), runbook="ClaudeAgentFirstTokenSlow"),
        graph("Answers that begin later than 10 s", "Of the last half hour. Bad: above the line.",
            (f'1 - sum(increase({ttft}_bucket{{@, {MODEL}, le=~"10(\\\\.0)?"}}[30m])) / (sum(increase({ttft}_count{{@, {MODEL}}}[30m])) > 0)', "late"),
            unit="percentunit", limits=above(threshold("ClaudeAgentFirstTokenSlow", 1)), runbook="ClaudeAgentFirstTokenSlow"),
        quantiles("Duration of requests", "From asking the model to the end of its answer, p95. Bad: it grows for one model only: another one may serve.",
            f"claude_agent_request_duration_seconds{{@, {MODEL}}}", "model", shares=(0.95,)),
        graph("Requests that had to be repeated", "Of all, in ten minutes. Bad: above the line: the API is overloaded, fails, or the rate limit is reached.",
            (f"sum(increase({RETRIED}[10m])) / (sum(increase(claude_agent_model_requests_total{{@}}[10m])) + sum(increase({RETRIED}[10m])) > 0)", "repeated"),
            unit="percentunit", limits=over("ClaudeAgentProviderDegraded", 1), runbook="ClaudeAgentProviderDegraded"),
        graph("Retries and errors", "Per interval, by what the API said. Bad: any error: those were given up. authentication_failed and billing_error stop every agent with that key.",
            ("sum by (error) (grown(claude_agent_api_retries_total{@}[$__interval])) > 0", "retry: {{error}}"),
            ("sum by (error) (grown(claude_agent_api_errors_total{@}[$__interval])) > 0", "error: {{error}}"), bars=True, every="1m", runbook="ClaudeAgentAuthFailure"),
        graph("Subscription windows used", "Told with a subscription's login only, not with an API key. Bad: near 100 %: agents will be turned away until the window starts again.",
            ("max by (window) (claude_agent_rate_limit_utilization_ratio{@})", "{{window}}"), unit="percentunit", high=1),
    ])  # fmt: skip


def tools() -> Row:
    up = states({"not connected": (0, "red"), "connected": (1, "green")})
    return Row("Tools and MCP", [
        graph("Tool calls", "Per interval, by tool.", ("sum by (tool) (grown(claude_agent_tool_calls_total{@}[$__interval])) > 0", "{{tool}}"), bars=True, every="1m"),
        graph("Tool calls that fail", "Of each tool's calls. Some failing is an agent's daily work; bad: a tool that always fails.",
            ('sum by (tool) (grown(claude_agent_tool_calls_total{@, outcome!="ok"}[$__interval])) / (sum by (tool) (grown(claude_agent_tool_calls_total{@}[$__interval])) > 0)', "{{tool}}"),
            unit="percentunit", high=1, every="5m"),
        quantiles("Duration of tool calls", "p95, the wait for a permission included. Bad: a class that grows without a new kind of work.",
            "claude_agent_tool_duration_seconds{@}", "tool_class", shares=(0.95,)),
        timeline("MCP servers", "As the CLI reports them. Bad: red for five minutes: the agent works without that server's tools.",
            "min by (@where, server) (claude_agent_mcp_server_up{@})", "{{pod}} {{instance}} {{server}}", up, w=8, h=8, runbook="ClaudeAgentMcpServerDown", link=True),
        quantiles("Duration of MCP calls", "p95 by server.", "claude_agent_mcp_tool_duration_seconds{@}", "server", shares=(0.95,)),
        graph("Hooks", "Per interval, by event and outcome. Bad: errors; a hook that fails may let through what it should have held.",
            ("sum by (event, outcome) (grown(claude_agent_hook_executions_total{@}[$__interval])) > 0", "{{event}} {{outcome}}"), bars=True, every="1m"),
    ])  # fmt: skip


def versions() -> Row:
    return Row("Versions", [
        graph("CLI versions", "Agents by version. Watch the other panels where a new one appears (annotation).",
            ("count by (cli_version) (claude_agent_info{@})", "{{cli_version}}"), stack=True),
        graph("Sidecar versions", "Sidecars by version. Bad: an old one that stays after a rollout.", ("count by (version) (agent_sidecar_build_info{@})", "{{version}}"), stack=True),
        listing("What runs", "Versions, permission mode, where the key comes from, provider. Bad: bypassPermissions where nobody meant it.", {
            "Agents": ("count by (cli_version, permission_mode, api_key_source, provider) (claude_agent_info{@})", "short")}, w=8),
    ], collapsed=True)  # fmt: skip


def dashboard():
    variables = place_variables("agent_sidecar_build_info") + [
        variable("tenant", "claude_agent_sessions_active", ["cluster", "namespace", "job", "pod", "instance"], all_value=".*"),
        variable("model", "claude_agent_cost_usd_total", ["cluster", "namespace", "job", "pod", "instance"], all_value=".*"),
    ]
    return board("agent-sidecar-fleet", "Agents: fleet", """Are the agents fine, and if not, where: turns, provider, tools, versions. For whoever runs them.""",
        [fine(), agents(), turns(), provider(), tools(), versions()], variables, marks=annotations())  # fmt: skip
