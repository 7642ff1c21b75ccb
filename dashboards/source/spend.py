"""What was spent, by whom, on what, and whether the figure can be trusted: for finance."""

from .kit import PLACE, Row, above, annotations, below, board, graph, levels, listing, note, number, over, place_variables, quantiles, threshold, variable

COST = 'claude_agent_cost_usd_total{@, model=~"$model"}'
TOKENS = 'claude_agent_tokens_total{@, model=~"$model"}'
# Every tenant's series tell the container's budgets alike: once each.
LEFT = """(min by (@where, limit, scope) (claude_agent_budget_remaining_ratio{@, scope=~"container.*"})
    or min by (@where, tenant, limit, scope) (claude_agent_budget_remaining_ratio{@, scope=~"tenant.*"}))"""


def once(metric: str) -> str:
    return f'max by (@where, scope) ({metric}{{@, scope=~"container.*"}}) or max by (@where, tenant, scope) ({metric}{{@, scope=~"tenant.*"}})'


def fine() -> Row:
    runaway = threshold("ClaudeAgentSpendRunaway")
    return Row("Is it fine?", [
        number("Spent in this time", "By all agents chosen, those that have ended included; choose the month above for a month's. For an invoice, take the ledgers.",
            f"sum(grown({COST}[$__range]))", "currencyUSD", decimals=2),
        number("A month at this pace", "What 30 days cost, if they are like this time. Of less than a day nothing is said.",
            f"sum(grown({COST}[$__range])) / $__range_s * 2592000 and on () vector($__range_s) >= 86400", "currencyUSD", decimals=2, none="choose a day or more"),
        number("Spent in the last hour", "By all agents chosen.", f"sum(grown({COST}[1h]))", "currencyUSD", decimals=2, runbook="ClaudeAgentSpendAnomaly"),
        number("Dearest, per hour", "The container that spends most, as in the last ten minutes. Red: a container that spends like this for five minutes is a runaway.",
            f"max(sum by (@where) (grown({COST}[10m])) * 6)", "currencyUSD", limits=over("ClaudeAgentSpendRunaway", yellow=runaway / 3), runbook="ClaudeAgentSpendRunaway", decimals=2),
        number("Least left of a budget", "Of all budgets that agents share. Red: agents will soon refuse messages.", f"min({LEFT})", "percentunit",
            limits=below(threshold("ClaudeAgentBudgetNearlyUsed"), 0.25), runbook="ClaudeAgentBudgetNearlyUsed", decimals=0),
        number("Cost per turn", "Mean. Bad: it grows while the work does not.",
            f"sum(grown({COST}[$__range])) / (sum(grown(claude_agent_turns_total{{@}}[$__range])) > 0)", "currencyUSD", decimals=3),
        number("Saved by the cache", "What reading from the cache cost less than sending the same tokens anew, less what writing to it cost more. Bad: below zero.",
            'sum(grown(claude_agent_cache_saved_usd_total{@, model=~"$model"}[$__range])) - sum(grown(claude_agent_cache_write_premium_usd_total{@, model=~"$model"}[$__range]))',
            "currencyUSD", decimals=2, limits=below(0)),
        number("Estimated part", "Of what was spent: what nobody confirmed, because a CLI was killed or cut off. Bad: much of it; then agents die rather than end.",
            "sum(grown(claude_agent_cost_estimated_usd_total{@}[$__range])) / (sum(grown(claude_agent_cost_usd_total{@}[$__range])) > 0)", "percentunit", decimals=1, limits=above(None, 0.1)),
    ])  # fmt: skip


def where() -> Row:
    bars = {"unit": "currencyUSD", "bars": True, "every": "1m"}
    return Row("Where it goes", [
        graph("By model", "Spent in each interval; the bars add up to the sum above. Bad: a dearer model than the work needs.",
            (f"sum by (model) (grown({COST}[$__interval])) > 0", "{{model}}"), w=12, **bars),
        graph("By tenant", "The same by tenant.", (f'label_replace(sum by (tenant) (grown({COST}[$__interval])) > 0, "tenant", "(none)", "tenant", "")', "{{tenant}}"), w=12, **bars),
        graph("By source", "Main loop and subagents; unattributed: known only as a sum. Bad: subagents that cost more than the main loop without need.",
            (f"sum by (source) (grown({COST}[$__interval])) > 0", "{{source}}"), w=8, **bars),
        listing("Containers, the dearest first", "The ten that spent most in this time. The name leads to the container.", {
            "Spent": (f"topk(10, sum by (@where) (grown({COST}[$__range])))", "currencyUSD")}, w=16, sort="Spent", link=True),
        listing("Charge-back", """Each row for whom it was, and by which model. Export it as CSV by the panel's menu (Inspect, Data). What Prometheus did not scrape is not in
            it: for invoices, the ledgers.""", {
            "Spent": (f"sum by (tenant, team, cost_center, model) (grown({COST}[$__range]))", "currencyUSD"),
            "Input": ("sum by (tenant, team, cost_center, model) (grown(claude_agent_tokens_total{@, model=~\"$model\", type=\"input\"}[$__range]))", "short"),
            "Output": ("sum by (tenant, team, cost_center, model) (grown(claude_agent_tokens_total{@, model=~\"$model\", type=\"output\"}[$__range]))", "short"),
            "Cache read": ("sum by (tenant, team, cost_center, model) (grown(claude_agent_tokens_total{@, model=~\"$model\", type=\"cache_read\"}[$__range]))", "short"),
            "Cache written": ("sum by (tenant, team, cost_center, model) (grown(claude_agent_tokens_total{@, model=~\"$model\", type=~\"cache_write_.*\"}[$__range]))", "short"),
        }, sort="Spent"),
    ])  # fmt: skip


def units() -> Row:
    return Row("What a turn and a session cost", [
        quantiles("Cost of a turn", "Bad: p99 far above p95: single turns that run away; set turn_max_cost_usd.", "claude_agent_turn_cost_usd{@}", unit="currencyUSD"),
        quantiles("Cost of a session", "Counted when it ends; as exact as the buckets are narrow. Bad: it grows: sessions that go on for too long.", "claude_agent_session_cost_usd{@}", unit="currencyUSD"),
        graph("Searches that the provider billed", "Per interval, by tool; they are in the spend.",
            ("sum by (tool) (grown(claude_agent_server_tool_requests_total{@}[$__interval]))", "{{tool}}"), bars=True, every="1m"),
    ])  # fmt: skip


def tokens() -> Row:
    sent = 'claude_agent_tokens_total{@, model=~"$model", type!="output"}'
    read = 'claude_agent_tokens_total{@, model=~"$model", type="cache_read"}'
    return Row("Tokens and cache", [
        graph("Tokens by kind", "A minute. Input excludes what was cached.", (f"sum by (type) (rate({TOKENS}[$__rate_interval])) * 60", "{{type}}"), unit="cpm", stack=True),
        graph("Read from the cache", "Of all tokens that were sent, by model, in the last hour. Bad: half of yesterday's; the same work then costs several times as much.",
            (f"sum by (model) (increase({read}[1h])) / (sum by (model) (increase({sent}[1h])) > 0)", "{{model}}"), unit="percentunit", high=1, runbook="ClaudeAgentCacheCollapse"),
        graph("Cache: saved, and paid for writing", "Per interval. Bad: more paid than saved: what is written is not read again.",
            ('sum(grown(claude_agent_cache_saved_usd_total{@, model=~"$model"}[$__interval]))', "saved"),
            ('sum(grown(claude_agent_cache_write_premium_usd_total{@, model=~"$model"}[$__interval]))', "paid for writing"), unit="currencyUSD", every="1m"),
    ])  # fmt: skip


def budgets() -> Row:
    end = once("claude_agent_budget_window_end_timestamp_seconds")
    return Row("Budgets that agents share", [
        levels("Left of each", "Red: under a tenth. At nothing, agents refuse messages until the day or month ends or somebody raises it.", LEFT,
            "{{pod}} {{instance}} {{tenant}} {{scope}} ({{limit}})", limits=below(threshold("ClaudeAgentBudgetNearlyUsed"), 0.25), runbook="ClaudeAgentBudgetNearlyUsed"),
        graph("Left over time", "Below the line agents will soon refuse messages. A line that falls steeply: see the forecast.",
            (LEFT, "{{instance}} {{tenant}} {{scope}} ({{limit}})"), unit="percentunit", high=1,
            limits=below(threshold("ClaudeAgentBudgetNearlyUsed")), runbook="ClaudeAgentBudgetNearlyUsed", link=True),
        listing("Budgets in dollars", "As raised; reserved is what answers may cost that are waited for. Of one container each: other containers have their own.", {
            "Budget": (once("claude_agent_budget_limit_usd"), "currencyUSD"),
            "Spent": (once("claude_agent_budget_spent_usd"), "currencyUSD"),
            "Reserved": (once("claude_agent_budget_reserved_usd"), "currencyUSD"),
            "Starts afresh in": (f"(({end}) - time()) and on (@where, tenant, scope) ({once('claude_agent_budget_limit_usd')})", "s"),
        }, w=8, runbook="ClaudeAgentBudgetForecast", hide=("cluster", "namespace")),
        listing("Budgets in tokens", "The same in tokens, cached ones included.", {
            "Budget": (once("claude_agent_budget_limit_tokens"), "short"),
            "Spent": (once("claude_agent_budget_spent_tokens"), "short"),
            "Reserved": (once("claude_agent_budget_reserved_tokens"), "short"),
        }, w=12, h=6, hide=("cluster", "namespace")),
        graph("Spent above limits", """What was spent beyond a limit before it held, per interval: the answer that was under way. What enforcement saved is not known and not shown.""",
            ("sum by (scope) (grown(claude_agent_enforcement_overshoot_usd_sum{@}[$__interval]))", "{{scope}}"), unit="currencyUSD", bars=True, every="1m", w=12, h=6),
    ])  # fmt: skip


def trust() -> Row:
    off = "claude_agent_cost_reconciliation_error_usd_total{@}"
    return Row("Can it be trusted?", [
        note("", """These are the numbers that Prometheus saw. A pod that ended between two scrapes is missing what it spent since the last one: run it with `--linger`. The ledger
            files have all of it, to the last digit: `agent-sidecar replay --ledger`.""", h=2),
        number("Unpriced tokens", "Of models that nobody prices. Bad: any; their cost is missing or a guess, and limits in dollars do not hold. Override the price.",
            "sum(grown(claude_agent_unpriced_tokens_total{@}[$__range])) or vector(0)", limits=over("ClaudeAgentCostUntrustworthy"), runbook="ClaudeAgentCostUntrustworthy", w=4),
        number("Corrected later", "Of what was spent: what a confirmation took back or added. Red: above 2 %.",
            f"sum(grown({off}[$__range])) / (sum(grown(claude_agent_cost_usd_total{{@}}[$__range])) > 0)", "percentunit",
            limits=over("ClaudeAgentCostUntrustworthy", 2), runbook="ClaudeAgentCostUntrustworthy", w=4, decimals=2),
        number("Price table", "When it was last compared with its source. Old prices are only used for what the CLI does not price itself.",
            "min(claude_agent_price_table_timestamp_seconds{@}) * 1000", "dateTimeAsIso", w=4),
        graph("Ours and the CLI's own figure", "Spent per interval: as booked here, what of it is an estimate, and as the CLI says. Bad: they drift apart for long.",
            ("sum(grown(claude_agent_cost_usd_total{@}[$__interval]))", "booked"), ("sum(grown(claude_agent_cost_estimated_usd_total{@}[$__interval]))", "of it estimated"),
            ("sum(grown(claude_agent_cost_cli_reported_usd_total{@}[$__interval]))", "the CLI's"), unit="currencyUSD", every="1m", w=6),
        graph("Totals that started again", "How often the CLI's running totals fell and were caught; by cause.",
            ("sum by (cause) (grown(claude_agent_usage_resets_total{@}[$__interval]))", "{{cause}}"), bars=True, every="1m", w=6),
        listing("Price tables", "Which prices sidecars use. Bad: several; old sidecars price differently.", {
            "Sidecars": ("count by (version, source) (claude_agent_price_table_info{@})", "short")}, w=24, h=4),
    ], collapsed=True)  # fmt: skip


def dashboard():
    metric = "claude_agent_cost_usd_total"
    variables = place_variables("agent_sidecar_build_info") + [
        variable("tenant", "claude_agent_sessions_active", PLACE, all_value=".*"),
        variable("model", metric, PLACE, all_value=".*"),
    ]
    return board("agent-sidecar-spend", "Agents: spend", "What agents cost, for whom, on what, against which budgets, and whether the figures can be trusted. For finance.",
        [fine(), where(), units(), tokens(), budgets(), trust()], variables, marks=annotations(), since="now/M", until="now", refresh="5m")  # fmt: skip
