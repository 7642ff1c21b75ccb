"""What Claude Code tells of itself, without a sidecar: cost, tokens, sessions, code. No turn, error, latency, limit or process is among it.

By OTLP (a collector, or Prometheus' own receiver) names carry their unit; on the page that the CLI serves itself they do not. Both fit here.
"""

from __future__ import annotations

from .kit import Row, board, graph, listing, models, note, number, variable
from .kit import dashboard as builders

ALL = 'job=~"$job", instance=~"$instance"'
COST = f'{{__name__=~"claude_code_cost_usage(_USD)?_total", {ALL}, model=~"$model"}}'
TOKENS = f'__name__=~"claude_code_token_usage(_tokens)?_total", {ALL}, model=~"$model"'
ACTIVE = f'{{__name__=~"claude_code_active_time(_seconds)?_total", {ALL}}}'
SESSIONS = f"claude_code_session_count_total{{{ALL}}}"


def tokens(kinds: str) -> str:
    return f'{{{TOKENS}, type=~"{kinds}"}}'


def fine() -> Row:
    return Row("Spend and use", [
        number("Spent in this time", "As the CLIs estimate it by their list of prices. For an invoice: the provider's.", f"sum(grown({COST}[$__range]))", "currencyUSD", decimals=2, w=4),
        number("Spent in the last hour", "By all sessions chosen.", f"sum(grown({COST}[1h]))", "currencyUSD", decimals=2, w=4),
        number("Dearest session", "What the session that spent most has spent in this time. Bad: far above a usual day's; nothing here stops it.",
            f"max(sum by (session_id) (grown({COST}[$__range])))", "currencyUSD", decimals=2, w=4),
        number("Sessions", "Started in this time.", f"sum(grown({SESSIONS}[$__range]))", w=4),
        number("Read from the cache", "Of all tokens that were sent. Bad: it falls: the same work costs several times as much.",
            f'sum(grown({tokens("cacheRead")}[$__range])) / (sum(grown({tokens("input|cacheRead|cacheCreation")}[$__range])) > 0)', "percentunit", decimals=0, w=4),
        number("Active time", "Of people and of CLIs, in this time.", f"sum(grown({ACTIVE}[$__range]))", "s", decimals=0, w=4),
        note("What is not here", """The CLI exports every 60 s and when it ends: what is killed, or ends badly, misses its last minute. By OTLP it sends deltas unless told otherwise, and Prometheus
            drops those: set `OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE=cumulative`. With `agent-sidecar` in front there are turns, errors, latencies, limits and processes, too.""", h=3),
    ])  # fmt: skip


def where() -> Row:
    bars = {"bars": True, "every": "1m", "w": 8}
    return Row("Where it goes", [
        graph("Spend by model", "Per interval.", (f"sum by (model) (grown({COST}[$__interval])) > 0", "{{model}}"), unit="currencyUSD", **bars),
        graph("Spend by source", "Main loop, subagents and what the CLI asks on its own.", (f"sum by (query_source) (grown({COST}[$__interval])) > 0", "{{query_source}}"), unit="currencyUSD", **bars),
        graph("Spend by agent", "Of the main loop and of subagents, by their type.",
            (f'label_replace(sum by (agent_name) (grown({COST}[$__interval])) > 0, "agent_name", "(main)", "agent_name", "")', "{{agent_name}}"), unit="currencyUSD", **bars),
        graph("Tokens by kind", "Per interval. Input excludes what was cached.", (f'sum by (type) (grown({tokens(".+")}[$__interval])) > 0', "{{type}}"), **bars),
        graph("Read from the cache", "Of all tokens that were sent, by model, in the last hour.",
            (f'sum by (model) (grown({tokens("cacheRead")}[1h])) / (sum by (model) (grown({tokens("input|cacheRead|cacheCreation")}[1h])) > 0)', "{{model}}"), unit="percentunit", high=1, w=16),
        listing("Users", "Who spent most in this time. A login has an e-mail address; an API key only the CLI's own id of the machine's user.", {
            "Spent": (f"topk(20, sum by (user_email, user_id) (grown({COST}[$__range])))", "currencyUSD"),
            "Sessions": (f"sum by (user_email, user_id) (grown({SESSIONS}[$__range]))", "short"),
        }, w=24, h=6, sort="Spent"),
    ])  # fmt: skip


def work() -> Row:
    bars = {"bars": True, "every": "1m", "w": 8}
    return Row("Work", [
        graph("Sessions", "Per interval, by how they started.", (f"sum by (start_type) (grown({SESSIONS}[$__interval])) > 0", "{{start_type}}"), **bars),
        graph("Lines of code", "Per interval.", (f"sum by (type) (grown(claude_code_lines_of_code_count_total{{{ALL}}}[$__interval])) > 0", "{{type}}"), **bars),
        graph("Edits that were allowed and not", "Per interval. Bad: many rejects: people do not want what agents do.",
            (f"sum by (tool_name, decision) (grown(claude_code_code_edit_tool_decision_total{{{ALL}}}[$__interval])) > 0", "{{tool_name}}: {{decision}}"), **bars),
        graph("Commits", "Per interval.", (f"sum(grown(claude_code_commit_count_total{{{ALL}}}[$__interval]))", "commits"), **bars),
        graph("Active time", "Per interval, of people (user) and of CLIs.", (f"sum by (type) (grown({ACTIVE}[$__interval])) > 0", "{{type}}"), unit="s", **bars),
        graph("Sessions that export", "With new numbers within five minutes.", (f"count(count by (session_id) ({COST}))", "sessions"), w=8),
    ])  # fmt: skip


def dashboard():
    source = builders.DatasourceVariable("datasource").label("Data source").type("prometheus").current(models.VariableOption(text="default", value="default"))
    # The CLI names no instance of itself: by OTLP there may be no such label.
    variables = [source, variable("job", "claude_code_session_count_total", [], all_value=".+"), variable("instance", "claude_code_session_count_total", ["job"], all_value=".*"),
                 variable("model", "claude_code_lines_of_code_count_total", ["job", "instance"], all_value=".*")]  # fmt: skip
    return board("claude-code-native", "Claude Code without a sidecar", "Cost, tokens, sessions and code from the CLI's own OpenTelemetry metrics alone.",
        [fine(), where(), work()], variables, since="now-24h", refresh="1m", tags=("claude-code",))  # fmt: skip
