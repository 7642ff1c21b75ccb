"""The CLI's own metrics, without a sidecar: one CLI exports them by OTLP, another has a page of its own to be scraped.

Debian's Prometheus takes no OTLP yet. What came in is put into text here by the rules that a collector's Prometheus exporter and Prometheus' own
OTLP receiver follow (OpenTelemetry specification, "Prometheus and OpenMetrics compatibility"): dots to underscores, the unit, `_total`.
"""

from __future__ import annotations

import http.server
import re
import subprocess
import threading

import harness
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

UNITS = {"s": "seconds", "ms": "milliseconds", "By": "bytes", "1": ""}
# Without the last, sums arrive as deltas, which Prometheus drops.
OTLP = {
    "CLAUDE_CODE_ENABLE_TELEMETRY": "1", "OTEL_METRICS_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf", "OTEL_METRIC_EXPORT_INTERVAL": "1000",
    "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE": "cumulative",
}  # fmt: skip


def name_of(metric) -> str:
    plain = re.sub(r"\W", "_", metric.name)
    unit = UNITS.get(metric.unit, "" if metric.unit.startswith("{") else metric.unit)
    words = [word for word in plain.split("_") if word != "total"]
    if unit and unit not in words:
        words.append(unit)
    return "_".join(words) + "_total"


def lines(request: ExportMetricsServiceRequest) -> dict[str, float]:
    """Samples of an export."""
    found = {}
    for resource in request.resource_metrics:
        about = {one.key: one.value.string_value for one in resource.resource.attributes}
        for metric in (metric for scope in resource.scope_metrics for metric in scope.metrics):
            assert metric.sum.is_monotonic and metric.sum.aggregation_temporality == 2, metric
            for point in metric.sum.data_points:
                labels = {re.sub(r"\W", "_", one.key): one.value.string_value for one in point.attributes} | {"job": about["service.name"]}
                pairs = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
                found[f"{name_of(metric)}{{{pairs}}}"] = point.as_double or float(point.as_int)
    return found


class Translator:
    """Takes OTLP, and is scraped."""

    def __init__(self):
        self.samples: dict[str, float] = {}
        ours = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                ours.samples |= lines(ExportMetricsServiceRequest.FromString(harness.whole(self)))
                self.answer(b"")

            def do_GET(self):
                self.answer("".join(f"{name} {value!r}\n" for name, value in ours.samples.items()).encode())

            def answer(self, body: bytes):
                self.send_response(200)
                self.send_header("content-type", "text/plain; version=0.0.4")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def start(stage, rules: list[dict], script) -> None:
    translator, page = Translator(), harness.free_port()
    stage.closing.callback(translator.close)
    stage.native.watch(translator.server.server_port)
    stage.native.watch(page)
    scrape = {"CLAUDE_CODE_ENABLE_TELEMETRY": "1", "OTEL_METRICS_EXPORTER": "prometheus", "OTEL_EXPORTER_PROMETHEUS_PORT": str(page)}
    otlp = OTLP | {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{translator.server.server_port}"}
    for name, env in [("otlp", otlp), ("scraped", scrape)]:
        home = stage.directory / f"native-{name}"
        (home / "work").mkdir(parents=True)
        subprocess.run(["git", "init", "-q", home / "work"], check=True)
        api = stage.api(f"native-{name}", script(*rules))
        argv = [harness.cli("new"), *harness.STREAM_JSON, "--allowedTools", "Bash,Write,Edit,Agent,Task"]
        cli = harness.Session(argv, api, home, **env)
        stage.closing.callback(cli.kill)
        for text in ("edit", "agents", "commit"):
            cli.ask(text, timeout=240)
