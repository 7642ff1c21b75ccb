"""The sidecar itself: does it see everything, does everything get out, and what does it take?"""

from .kit import Row, above, annotations, board, graph, listing, number, over, place_variables

LOST = 'agent_sidecar_export_items_total{@, outcome=~"failed|dropped"}'


def fine() -> Row:
    blind, loss = "AgentSidecarBlind", "AgentSidecarTelemetryLoss"
    return Row("Is it fine?", [
        number("Degraded", "Sidecars of which a part does not work; the relay goes on. Bad: any.", "sum(max by (@where) (agent_sidecar_degraded{@})) or vector(0)",
            limits=above(1), runbook=blind),
        number("Unknown lines", "Of types that nobody told us of, on the worst container, in 15 minutes. Red: above 20: a new CLI, most likely.",
            'max(sum by (@where) (grown(agent_sidecar_events_total{@, type="unknown"}[15m]))) or vector(0)', limits=over(blind), runbook=blind),
        number("Lines not understood", "Not JSON, cut off, too long. Bad: any.", "sum(grown(agent_sidecar_parse_errors_total{@}[$__range]))", limits=over(blind, 1), runbook=blind),
        number("Bytes not counted", "Relayed, but not looked at. Bad: any: costs may be missing.", "sum(grown(agent_sidecar_lost_bytes_total{@}[$__range]))", "bytes", limits=over(blind, 2), runbook=blind),
        number("Items not exported", "Spans, data points, log records that failed or were dropped. Bad: any.", f"sum(grown({LOST}[$__range]))", limits=over(loss), runbook=loss),
        number("Lines not written", "To ledgers and files of events. Bad: any: what a ledger lacks, a bill lacks.",
            "sum(grown(agent_sidecar_ledger_errors_total{@}[$__range])) + sum(grown(agent_sidecar_events_file_errors_total{@}[$__range]))", limits=over(loss, 1), runbook=loss),
        number("No room for a series", "Updates that found no room. Bad: any; see by metric.", "sum(grown(agent_sidecar_series_limit_hits_total{@}[$__range])) or vector(0)", limits=over(loss, 3), runbook=loss),
        number("CLIs without a sidecar", "Neither counted nor limited. Bad: any.", "sum(max by (@where) (agent_sidecar_unwrapped_processes{@}))", limits=over("AgentSidecarUnwrapped"), runbook="AgentSidecarUnwrapped"),
    ])  # fmt: skip


def reading() -> Row:
    return Row("Relay and reading", [
        graph("Relayed", "Bytes a second, by stream.", ("sum by (stream) (rate(agent_sidecar_forwarded_bytes_total{@}[$__rate_interval]))", "{{stream}}"), unit="Bps"),
        graph("Not read by the app yet", "In memory and spilled to a file. Bad: it only grows: the app has stopped reading. Nothing is lost.",
            ("sum by (@where) (agent_sidecar_backlog_bytes{@})", "{{pod}} {{instance}}"), unit="bytes", link=True),
        graph("Spilled, and held back", "Output through a file, per second; and how often the CLI had to wait because there was no room left. Bad: held back.",
            ("sum(rate(agent_sidecar_spilled_bytes_total{@}[$__rate_interval]))", "spilled"), ("sum(rate(agent_sidecar_backpressure_total{@}[$__rate_interval]))", "held back, times"), unit="Bps"),
        graph("Lines by type", "A minute.", ("sum by (type) (rate(agent_sidecar_events_total{@}[$__rate_interval])) * 60", "{{type}}"), unit="cpm", stack=True),
        graph("Lines not understood", "Per interval, by reason. Bad: any.", ("sum by (reason) (grown(agent_sidecar_parse_errors_total{@}[$__interval]))", "{{reason}}"), bars=True, every="1m", runbook="AgentSidecarBlind"),
        graph("Longest line", "So far, of each container. Above 1 MiB they are cut for reading, never for the app.", ("max by (@where) (agent_sidecar_line_bytes_max{@})", "{{pod}} {{instance}}"), unit="bytes", link=True),
        graph("Questions to the CLI", "A minute, by what was asked and how it went. Bad: not answered: costs between results are estimates.",
            ("sum by (request, outcome) (rate(agent_sidecar_own_requests_total{@}[$__rate_interval])) * 60 > 0", "{{request}} {{outcome}}"), unit="cpm"),
        graph("The CLI's own telemetry", "Exports that came in (text and terminals), and what became of those that were to be forwarded. Bad: failed.",
            ("sum by (signal, outcome) (grown(agent_sidecar_native_reports_total{@}[$__interval]))", "in: {{signal}} {{outcome}}"),
            ("sum by (outcome) (grown(agent_sidecar_native_forwards_total{@}[$__interval]))", "forwarded: {{outcome}}"), bars=True, every="1m"),
        graph("Degraded parts", "By part. Bad: any.", ("sum by (component) (agent_sidecar_degraded{@})", "{{component}}"), runbook="AgentSidecarBlind"),
    ])  # fmt: skip


def export() -> Row:
    loss = "AgentSidecarTelemetryLoss"
    return Row("Export", [
        graph("Items by outcome", "A minute. Failed is the collector's doing, dropped ours. Bad: either.",
            ("sum by (signal, outcome) (rate(agent_sidecar_export_items_total{@}[$__rate_interval])) * 60", "{{signal}} {{outcome}}"), unit="cpm", runbook=loss),
        graph("Why items were lost", "Per interval.", ("sum by (signal, cause) (grown(agent_sidecar_export_lost_items_total{@}[$__interval]))", "{{signal}}: {{cause}}"), bars=True, every="1m", runbook=loss),
        graph("Queue", "Of what may wait, how much is used. Bad: near 100 %: the oldest is dropped next.",
            ("max by (@where) (agent_sidecar_export_queue_bytes{@} / agent_sidecar_export_queue_capacity_bytes{@})", "{{pod}} {{instance}}"), unit="percentunit", high=1, link=True, runbook=loss),
        graph("Items that wait", "In memory and on disk.", ("sum by (signal) (agent_sidecar_export_queue_items{@})", "{{signal}}")),
        graph("Batches sent once more", "A minute. Bad: all the time: the collector is slow or too small.",
            ("sum by (signal) (rate(agent_sidecar_export_retries_total{@}[$__rate_interval])) * 60", "{{signal}}"), unit="cpm"),
        graph("Since the collector took something", "The longest of all. Bad: minutes, while agents work.",
            ("time() - min by (signal) (agent_sidecar_export_last_success_timestamp_seconds{@})", "{{signal}}"), unit="s"),
        graph("Last numbers", "Whether the last numbers of an agent were read or taken after its end, per interval. Bad: missed: use linger.",
            ("sum by (outcome) (grown(agent_sidecar_final_flush_total{@}[$__interval]))", "{{outcome}}"), bars=True, every="1m"),
        graph("Since the last scrape", "Of each container. Bad: more than the scrape interval, often: the network or Prometheus.",
            ("time() - max by (@where) (agent_sidecar_last_scrape_timestamp_seconds{@})", "{{pod}} {{instance}}"), unit="s", link=True),
        graph("No room for a series", "Per interval, by metric. Bad: any; its numbers are too low.",
            ("sum by (metric) (grown(agent_sidecar_series_limit_hits_total{@}[$__interval]))", "{{metric}}"), bars=True, every="1m", runbook=loss),
    ], collapsed=True)  # fmt: skip


def itself() -> Row:
    return Row("What it takes, and what it is", [
        graph("Processor", "Cores, of all chosen.", ("sum(rate(agent_sidecar_cpu_seconds_total{@}[$__rate_interval]))", "all"), ("max(rate(agent_sidecar_cpu_seconds_total{@}[$__rate_interval]))", "the busiest")),
        graph("Memory", "Resident. Bad: it grows on.", ("max by (@where) (agent_sidecar_resident_memory_bytes{@})", "{{pod}} {{instance}}"), unit="bytes", link=True),
        graph("Wrappers at hubs", "Live, and those that have said nothing for too long. Bad: silent ones.", ("sum by (state) (agent_sidecar_hub_wrappers{@})", "{{state}}"), stack=True),
        graph("Retired wrappers", "That ended, and whose totals hubs keep, per interval; and what hubs could not take. Bad: refused.",
            ("sum(grown(agent_sidecar_hub_retired_total{@}[$__interval]))", "retired"), ("sum by (reason) (grown(agent_sidecar_hub_refused_total{@}[$__interval]))", "refused: {{reason}}"), bars=True, every="1m"),
        listing("Versions and configurations", "Bad: more of them than you rolled out.", {
            "Version": ("count by (version) (agent_sidecar_build_info{@})", "short"), "Configuration": ("count by (hash) (agent_sidecar_config_info{@})", "short")}, w=16),
    ], collapsed=True)  # fmt: skip


def dashboard():
    return board("agent-sidecar-internals", "Agents: sidecar internals", "Whether the sidecars see everything, whether everything gets out, and what they take.",
        [fine(), reading(), export(), itself()], place_variables("agent_sidecar_build_info"), marks=annotations(tenants=False, enforcement=False))  # fmt: skip
