"""One container's agents: what they do, what they have done, and what they run out of. For whoever is on call."""

from .kit import BAD_TURNS, Row, above, annotations, below, board, graph, levels, listing, number, over, place_variables, quantiles, states, threshold, timeline, variable

STATES = {
    "starting": (1, "#8ab8ff"), "model": (2, "green"), "tool": (3, "blue"), "permission": (4, "yellow"), "retry_backoff": (5, "orange"), "compacting": (6, "purple"),
    "waiting_input": (7, "#808080"), "idle": (8, "#b0b0b0"), "draining": (9, "#ffb357"), "stuck": (10, "red"),
}  # fmt: skip
STATE = " or ".join(f'(claude_agent_process_state{{@, state="{state}"}} > 0) * 0 + {n}' for state, (n, _) in STATES.items())
MEMORY = threshold("ClaudeAgentMemoryExhaustion")


def fine() -> Row:
    return Row("Is it fine?", [
        number("State", "Of each agent. Red: stuck; the runbook says what to do. `agent-sidecar top` shows the same with its tool and its message.",
            f"max by (instance, slot) ({STATE})", legend="{{instance}} {{slot}}", mappings=states(STATES), unit="none", runbook="ClaudeAgentStuck", w=6, name=True),
        number("Stuck", "Agents past a time limit, or held up by something; by what, see below. Bad: any for five minutes.",
            "sum(max by (@where, slot) (claude_agent_stalled{@} > bool 0))", limits=over("ClaudeAgentStuck"), runbook="ClaudeAgentStuck"),
        number("Quiet for", "Since the agent or its app last said anything. Bad: more than twice the idle timeout while it is idle: it should have been ended.",
            "time() - max(claude_agent_last_activity_timestamp_seconds{@})", "s", runbook="ClaudeAgentIdleWaste", decimals=0),
        number("Nearest limit", "The limit that is used most. Red: it will be reached next.", "max(claude_agent_limit_used_ratio{@})", "percentunit", limits=above(0.95, 0.8), decimals=0),
        number("Spent in this time", "By the agents of this container.", "sum(grown(claude_agent_cost_usd_total{@}[$__range]))", "currencyUSD", decimals=2),
        number("CLIs that ended badly", "In fifteen minutes: with an error, by a signal, for memory, or before a word. Red: three.",
            'sum(grown(claude_agent_process_exits_total{@, reason=~"error|signal|oom|init_failed"}[15m]))', limits=over("ClaudeAgentCrashLooping"), runbook="ClaudeAgentCrashLooping"),
        number("Memory used", "Of the container's limit; without a limit there is nothing to show. Red: the alert fires here if it grows on.",
            "max(claude_agent_container_memory_working_set_bytes{@} / claude_agent_container_memory_limit_bytes{@})", "percentunit", limits=above(MEMORY, MEMORY * 0.8),
            runbook="ClaudeAgentMemoryExhaustion", decimals=0),
    ])  # fmt: skip


def doing() -> Row:
    return Row("What it does", [
        timeline("States", "Each agent of the container on a line. Much yellow: it waits for a person; orange: for the API; red: stuck.",
            f"max by (instance, slot) ({STATE})", "{{instance}} {{slot}}", states(STATES), runbook="ClaudeAgentWaitsForPerson"),
        graph("Time in each state", "Agents in it, on average of the interval. Adds up to the agents that run.",
            ("sum by (state) (rate(claude_agent_time_seconds_total{@}[$__rate_interval]))", "{{state}}"), stack=True),
        graph("Window used", "How full the model's window was at the last answer. Bad: near the top; it will be compacted, which costs, and forgets.",
            ("max by (instance, slot) (claude_agent_context_used_ratio{@})", "{{instance}} {{slot}}"), unit="percentunit", high=1, limits=above(0.95, 0.8)),
        graph("Compactions", "Per interval. Bad: one after the other: the work does not fit into the window.",
            ("sum by (trigger) (grown(claude_agent_compactions_total{@}[$__interval]))", "{{trigger}}"), bars=True, every="1m"),
        graph("Held up by", "Agents, by what holds them up. Bad: any for five minutes.", ("sum by (kind) (claude_agent_stalled{@})", "{{kind}}"), stack=True, runbook="ClaudeAgentStuck"),
        graph("Tool calls", "Per interval, by tool and outcome.", ("sum by (tool, outcome) (grown(claude_agent_tool_calls_total{@}[$__interval])) > 0", "{{tool}} {{outcome}}"), bars=True, every="1m"),
        quantiles("Duration of tool calls", "p95, the wait for a permission included.", "claude_agent_tool_duration_seconds{@}", "tool_class", shares=(0.95,)),
        graph("Turns", "Per interval, by how they ended.", ("sum by (outcome) (grown(claude_agent_turns_total{@}[$__interval])) > 0", "{{outcome}}"), bars=True, every="1m"),
        graph("Retries and errors of the API", "Per interval. Bad: errors: those were given up.",
            ("sum by (error) (grown(claude_agent_api_retries_total{@}[$__interval])) > 0", "retry: {{error}}"),
            ("sum by (error) (grown(claude_agent_api_errors_total{@}[$__interval])) > 0", "error: {{error}}"), bars=True, every="1m", runbook="ClaudeAgentProviderDegraded"),
        timeline("MCP servers", "As the CLI reports them.", "min by (instance, server) (claude_agent_mcp_server_up{@})", "{{instance}} {{server}}",
            states({"not connected": (0, "red"), "connected": (1, "green")}), w=8, h=8, runbook="ClaudeAgentMcpServerDown"),
    ])  # fmt: skip


def bounds() -> Row:
    return Row("Limits, budgets, circles", [
        levels("Limits used", "Of each limit. Red: it will be reached next.", "max by (limit, scope) (claude_agent_limit_used_ratio{@})", "{{limit}} ({{scope}})", limits=above(0.95, 0.8)),
        graph("Left of shared budgets", "Below the line agents will soon refuse messages.",
            ("min by (tenant, limit, scope) (claude_agent_budget_remaining_ratio{@})", "{{tenant}} {{scope}} ({{limit}})"), unit="percentunit", high=1,
            limits=below(threshold("ClaudeAgentBudgetNearlyUsed")), runbook="ClaudeAgentBudgetNearlyUsed"),
        graph("Spend", "Dollars an hour, of each interval. The line is where a container is a runaway.",
            ("sum by (model) (grown(claude_agent_cost_usd_total{@}[$__interval])) / $__interval_ms * 3600000", "{{model}}"), unit="currencyUSD", stack=True, every="1m",
            limits=over("ClaudeAgentSpendRunaway"), runbook="ClaudeAgentSpendRunaway"),
        graph("The same again", "How often in a row an agent did the same, or failed alike. Bad: it grows; the detectors' ceilings are set by max_identical_calls and others.",
            ("max by (instance, slot) (claude_agent_repeat_streak{@})", "{{instance}} {{slot}}"), runbook="ClaudeAgentLoop"),
        graph("Circles that were found", "Per interval, by kind and by what was done.",
            ("sum by (kind, action) (grown(claude_agent_loop_detections_total{@}[$__interval])) > 0", "{{kind}} {{action}}"), bars=True, every="1m", runbook="ClaudeAgentLoop"),
        graph("Subagents and background tasks", "At work, how deep, and what keeps the agent from being idle. Bad: depth that grows.",
            ("sum(claude_agent_subagents_active{@})", "subagents"), ("max(claude_agent_subagent_depth{@})", "depth"), ("sum by (kind) (claude_agent_background_tasks{@})", "background: {{kind}}")),
    ])  # fmt: skip


def resources() -> Row:
    return Row("Processor, memory, disk", [
        graph("Processor by role", "Cores. Bad: tools that stay busy after their call; throttled: the container's quota is too small.",
            ("sum by (role) (rate(claude_agent_cpu_seconds_total{@}[$__rate_interval]))", "{{role}}"),
            ("max(rate(claude_agent_container_cpu_throttled_seconds_total{@}[$__rate_interval]))", "throttled"),
            ("max(rate(claude_agent_container_cpu_seconds_total{@}[$__rate_interval]))", "whole container")),
        graph("Memory by role", "Resident. Bad: a role that grows on and on.", ("sum by (role) (claude_agent_resident_memory_bytes{@})", "{{role}}"), unit="bytes", stack=True,
            runbook="ClaudeAgentMemoryExhaustion"),
        graph("Memory of the container", "Bad: the working set comes near the limit.",
            ("max by (instance) (claude_agent_container_memory_working_set_bytes{@})", "{{instance}} working set"), ("max by (instance) (claude_agent_container_memory_limit_bytes{@})", "{{instance}} limit"),
            unit="bytes", runbook="ClaudeAgentMemoryExhaustion"),
        graph("Waiting for resources", "Share of time in which tasks of the container waited (pressure stall). Bad: much `full`: nothing got on.",
            ("max by (resource, kind) (rate(claude_agent_container_pressure_seconds_total{@}[$__rate_interval]))", "{{resource}} {{kind}}"), unit="percentunit"),
        graph("Descriptors", "Open, by role. Bad: a line that only rises.", ("sum by (role) (claude_agent_open_fds{@})", "{{role}}")),
        graph("Processes", "Below the sidecar, by role, and those that outlived their tool call. Bad: orphans that pile up.",
            ("sum by (role) (claude_agent_child_processes{@})", "{{role}}"), ("sum(claude_agent_orphan_processes{@})", "orphans")),
        graph("Disk that is free", "Of each file system the agent works on. Red line: the alert.",
            ("min by (instance, mount) (claude_agent_disk_free_bytes{@} / (claude_agent_disk_free_bytes{@} + claude_agent_disk_used_bytes{@}))", "{{instance}} {{mount}}"),
            unit="percentunit", high=1, limits=below(threshold("ClaudeAgentDiskFilling")), runbook="ClaudeAgentDiskFilling"),
        graph("What the agent keeps on disk", "Working directory, config directory, transcript. Bad: transcripts of many megabytes: resumes get slow.",
            ("max by (slot, dir) (claude_agent_disk_bytes{@})", "{{slot}} {{dir}}"), ("max by (slot) (claude_agent_transcript_bytes{@})", "{{slot}} transcript"), unit="bytes"),
        graph("Killed for memory", "By the kernel, per interval. Bad: any.",
            ("max(increase(claude_agent_container_oom_kills_total{@}[$__rate_interval]))", "container"), ("sum by (role) (grown(claude_agent_oom_kills_total{@}[$__interval]))", "{{role}}"),
            bars=True, every="1m", runbook="ClaudeAgentMemoryExhaustion"),
        listing("When memory will reach its limit", "If it grows on as in the last ten minutes; empty where it does not. Bad: within 15 minutes.",
            {"Runs out in": ("claude_agent_memory_exhaustion_timestamp_seconds{@} - time()", "s")}, w=24, h=4, runbook="ClaudeAgentMemoryExhaustion"),
    ])  # fmt: skip


def ends() -> Row:
    return Row("Starts and ends", [
        graph("Starts and ends of CLIs", "Per interval. Bad: error, signal, oom, init_failed.",
            ("sum(grown(claude_agent_process_starts_total{@}[$__interval]))", "started"), ("sum by (reason) (grown(claude_agent_process_exits_total{@}[$__interval])) > 0", "ended: {{reason}}"),
            bars=True, every="1m", runbook="ClaudeAgentCrashLooping"),
        graph("Turns without a result", "Per interval, by cause. Bad: any: the app waits for a result that does not come.",
            ("sum by (cause) (grown(claude_agent_results_missing_total{@}[$__interval]))", "{{cause}}"), bars=True, every="1m", runbook="ClaudeAgentResultMissing"),
        graph("Sessions", "Per interval, by how they started; resumes by whether they worked.",
            ("sum by (start) (grown(claude_agent_sessions_total{@}[$__interval])) > 0", "{{start}}"), ("sum by (outcome) (grown(claude_agent_resume_total{@}[$__interval])) > 0", "resume: {{outcome}}"),
            bars=True, every="1m"),
        quantiles("From start to the first word", "p95. Bad: it grows: slow disk, slow MCP servers, hooks.", "claude_agent_startup_seconds{@}", shares=(0.5, 0.95)),
        quantiles("How long stops take", "p95 of each step. Bad: terminate and kill: what comes before does not work.", "claude_agent_shutdown_seconds{@}", "phase", shares=(0.95,)),
        listing("What runs", "Versions and modes.", {"Agents": ("count by (instance, cli_version, permission_mode, api_key_source, provider) (claude_agent_info{@})", "short")}, w=8),
    ], collapsed=True)  # fmt: skip


def dashboard():
    return board("agent-sidecar-agent", "Agents: one container", "One container's agents: state, limits, memory, ends. For whoever is on call; events and traces are in the collector.",
        [fine(), doing(), bounds(), resources(), ends()],
        place_variables("claude_agent_sessions_active", one_agent=True)
        + [variable("tenant", "claude_agent_sessions_active", ["cluster", "namespace", "job", "pod", "instance"], all_value=".*")],
        marks=annotations(), since="now-3h")  # fmt: skip
