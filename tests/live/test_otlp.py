"""Spans, events and metrics of the real CLI, as a collector gets them: over http/protobuf, and through a real collector over gRPC."""

from __future__ import annotations

import concurrent.futures
import contextlib
import gzip
import json
import os
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import harness
import pytest
from harness import ROOT, free_port, listens, wait_for
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from test_bare import TOOLS, bash, main, script, subagent
from test_wrapped import LONG, replayed, slow

SECRET = "canary-7f3a"
ROTEL = ROOT / ".cache/venv/lib"


def attributes(of) -> dict:
    """Of a span, a point, a resource: values as Python has them."""
    def value(any_value):
        kind = any_value.WhichOneof("value")
        return [value(one) for one in any_value.array_value.values] if kind == "array_value" else getattr(any_value, kind)

    return {pair.key: value(pair.value) for pair in of.attributes}


class Telemetry:
    """All that a collector got."""

    def __init__(self, posts: list[tuple[str, dict[str, str], bytes]]):
        self.posts = posts
        self.spans, self.events, self.points, self.resources = [], [], {}, []
        for path, headers, body in posts:
            if headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            if path.endswith("/v1/traces"):
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    self.resources.append(attributes(resource.resource))
                    self.spans += [span for scope in resource.scope_spans for span in scope.spans]
            elif path.endswith("/v1/logs"):
                for resource in ExportLogsServiceRequest.FromString(body).resource_logs:
                    self.events += [event for scope in resource.scope_logs for event in scope.log_records]
            elif path.endswith("/v1/metrics"):
                for resource in ExportMetricsServiceRequest.FromString(body).resource_metrics:
                    run = attributes(resource.resource).get("service.instance.id", "")
                    self._metrics(run, (metric for scope in resource.scope_metrics for metric in scope.metrics))

    def _metrics(self, run: str, metrics) -> None:
        """Cumulative: the last word of each run counts."""
        for metric in metrics:
            for point in getattr(metric, metric.WhichOneof("data")).data_points:
                labels = tuple(sorted(attributes(point).items()))
                value = point.sum if hasattr(point, "bucket_counts") else getattr(point, point.WhichOneof("value"))
                self.points[metric.name, run, labels] = value

    def sum(self, name: str) -> float:
        return sum(value for (known, *_), value in self.points.items() if known == name)

    def named(self, prefix: str) -> list:
        return [span for span in self.spans if span.name.startswith(prefix)]


PUBLISHED = {value for name, value in vars(gen_ai_attributes).items() if isinstance(value, str) and name.startswith("GEN_AI")}
# The conventions' own repository has renamed it since they left the general ones, which are what is packaged.
PUBLISHED |= {"gen_ai.usage.cache_write.input_tokens"}


def flags(url: str, tmp_path: Path, *more: str) -> list[str]:
    """On a busy machine a collector that is well may need longer than one is waited for."""
    patience = [] if "--otlp-flush" in more else ["--otlp-flush", "30s", "--platform-grace", "5m"]
    return ["--otlp-endpoint", url, "--otlp-queue-dir", str(tmp_path / "queue"), *patience, *more]


def test_a_session_is_a_tree_of_spans_and_its_numbers_are_the_ledgers(version, api, session, sidecar, collector, tmp_path):
    got = collector()
    wrapper = sidecar(*flags(got.url, tmp_path), "--events", str(tmp_path / "events.jsonl"), "--tenant", "acme")
    served = api(script(*subagent(), main(1, bash(f"echo {SECRET}"))))
    cli = session(served, *TOOLS, "--include-partial-messages", sidecar=wrapper)
    cli.ask(f"first {SECRET}")
    cli.ask(f"second {SECRET}")
    assert cli.close() == 0
    told = Telemetry(got.posts)
    books = replayed(wrapper.ledger_file)

    # One trace for each turn, with one root, and every parent in it.
    turns = [span for span in told.spans if "claude_agent.turn" in attributes(span)]
    assert len(turns) >= 2 and len({turn.trace_id for turn in turns}) == len(turns)
    by_id = {span.span_id: span for span in told.spans}
    for span in told.spans:
        assert span.start_time_unix_nano <= span.end_time_unix_nano
        if span.parent_span_id:
            assert by_id[span.parent_span_id].trace_id == span.trace_id
        else:
            assert span in turns or span.name == "shutdown"
    inner = next(span for span in told.named("invoke_agent") if span not in turns)
    assert by_id[inner.parent_span_id].name.startswith("execute_tool")
    tools = Counter(attributes(span)["gen_ai.tool.name"] for span in told.named("execute_tool"))
    assert tools == {tool: calls["ok"] + calls["error"] for tool, calls in books["totals"]["tool_calls"].items()}
    assert len(told.named("chat")) == len([line for line in wrapper.ledger() if line["event"] == "request_completed"])

    # The numbers of every way out are the ledger's.
    cost = books["totals"]["cost_usd"]
    assert told.sum("claude_agent_cost_usd_total") == pytest.approx(cost, abs=1e-9)
    assert told.sum("claude_agent_tokens_total") == sum(books["totals"]["tokens"].values())
    assert sum(attributes(turn)["claude_agent.cost_usd"] for turn in turns) == pytest.approx(cost, abs=1e-9)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event.event_name for event in told.events] == [event["event"] for event in events]
    assert [event["sequence"] for event in events] == list(range(len(events)))
    ended = [event for event in events if event["event"] == "turn.ended"]
    assert {event["trace_id"] for event in ended} == {turn.trace_id.hex() for turn in turns}
    resource = told.resources[0]
    assert resource["service.name"] == "agent-sidecar" and resource["claude_agent.tenant"] == "acme"

    # Nothing that anybody said or did is in any of it.
    sinks = [body for _, _, body in got.posts]
    sinks += [path.read_bytes() for path in tmp_path.rglob("*.jsonl") if path.parent == tmp_path]
    for hidden in (SECRET, str(tmp_path), "echo inside", "sk-ant-test"):
        assert not [sink for sink in sinks if hidden.encode() in sink], hidden


@pytest.mark.parametrize("edition", ["v1.36", "genai-0.1", "both"])
def test_names_are_those_of_the_published_conventions(edition, api, session, sidecar, collector, tmp_path):
    got = collector()
    wrapper = sidecar(*flags(got.url, tmp_path, "--semconv", edition))
    cli = session(api(script(*subagent())), *TOOLS, "--include-partial-messages", sidecar=wrapper)
    cli.ask("go")
    cli.close()
    told = Telemetry(got.posts)
    records = [*told.spans, *told.events, *(event for span in told.spans for event in span.events)]
    known = {key for record in records for key in attributes(record) if key.startswith("gen_ai.")}
    assert known and known <= PUBLISHED, known - PUBLISHED
    assert ("gen_ai.system" in known) == (edition != "genai-0.1")
    assert ("gen_ai.provider.name" in known) == (edition != "v1.36")
    for span in told.named("chat"):
        has = attributes(span)
        assert has["gen_ai.operation.name"] == "chat" and span.name == f"chat {has['gen_ai.request.model']}" and span.kind == 3
    names = {name for name, *_ in told.points if name.startswith("gen_ai.")}
    assert ("gen_ai.client.token.usage" in names) == (edition != "genai-0.1")


def test_the_apps_own_trace_is_the_parent(version, api, session, sidecar, collector, tmp_path):
    got = collector()
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    cli = session(api(script(main(0, bash("echo hi")))), *TOOLS, sidecar=sidecar(*flags(got.url, tmp_path)), TRACEPARENT=parent)
    cli.ask("go")
    cli.close()
    spans = Telemetry(got.posts).spans
    assert spans and {span.trace_id.hex() for span in spans} == {"0af7651916cd43dd8448eb211c80319c"}
    assert next(span for span in spans if "claude_agent.turn" in attributes(span)).parent_span_id.hex() == "b7ad6b7169203331"


def test_the_clis_own_spans_hang_below_ours_and_nothing_is_told_twice(version, api, session, sidecar, collector, tmp_path):
    got = collector()
    own = {
        "CLAUDE_CODE_ENABLE_TELEMETRY": "1",
        "CLAUDE_CODE_ENHANCED_TELEMETRY_BETA": "1",
        "OTEL_TRACES_EXPORTER": "otlp",
        # Two seconds by default, in which a busy machine may not come to it.
        "CLAUDE_CODE_OTEL_SHUTDOWN_TIMEOUT_MS": "30000",
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        "OTEL_EXPORTER_OTLP_ENDPOINT": got.url,
    }
    cli = session(api(script(main(0, bash("echo hi")))), *TOOLS, sidecar=sidecar(*flags(got.url, tmp_path)), **own)
    cli.ask("go")
    assert cli.close() == 0
    told = Telemetry(got.posts)
    (process,) = told.named("claude_agent.process")
    theirs = told.named("claude_code.")
    assert theirs and {span.trace_id for span in told.spans} == {process.trace_id}
    assert {span.parent_span_id for span in theirs if span.name == "claude_code.interaction"} == {process.span_id}
    assert told.named("invoke_agent") and not told.named("chat") and not told.named("execute_tool")


def test_a_kill_in_mid_turn_closes_every_span(api, session, sidecar, collector, tmp_path):
    got = collector()
    wrapper = sidecar(*flags(got.url, tmp_path))
    cli = session(api(script(slow(LONG))), "--include-partial-messages", sidecar=wrapper)
    cli.send(harness.user("go"))
    cli.until(lambda line: line["type"] == "stream_event" and line["event"]["type"] == "content_block_delta")
    pid = int(Path(f"/proc/{cli.process.pid}/task/{cli.process.pid}/children").read_text().split()[0])
    os.kill(pid, signal.SIGKILL)
    assert cli.process.wait(60) == 137
    told = Telemetry(got.posts)
    (turn,) = [span for span in told.spans if "claude_agent.turn" in attributes(span)]
    assert told.named("chat") and turn.status.code == 2
    for span in [turn, *told.named("chat")]:
        assert attributes(span)["claude_agent.closed_by"] == "sidecar" and attributes(span)["error.type"]
    assert told.sum("claude_agent_cost_usd_total") == pytest.approx(replayed(wrapper.ledger_file)["totals"]["cost_usd"], abs=1e-9)


def test_a_kill_of_ours_in_mid_turn_is_told_by_the_next_start(api, session, sidecar, collector, tmp_path):
    got = collector()
    wrapper = sidecar(*flags(got.url, tmp_path))
    cli = session(api(script(slow(LONG))), "--include-partial-messages", sidecar=wrapper)
    cli.send(harness.user("go"))
    cli.until(lambda line: line["type"] == "stream_event" and line["event"]["type"] == "content_block_delta")
    wills = lambda: [path.read_bytes() for path in (tmp_path / "queue").rglob("will.traces")]
    wait_for("what is open to be on disk", lambda: any(b"chat claude" in will for will in wills()))
    cli.process.kill()
    cli.process.wait(60)
    assert not Telemetry(got.posts).spans
    other = harness.Sidecar(tmp_path / "other", *flags(got.url, tmp_path))
    cli = session(api(script()), sidecar=other, home=tmp_path / "home2")
    cli.ask("second")
    assert cli.close() == 0
    told = Telemetry(got.posts)
    first, _ = sorted((span for span in told.spans if "claude_agent.turn" in attributes(span)), key=lambda span: span.start_time_unix_nano)
    lost = [span for span in told.spans if span.trace_id == first.trace_id]
    assert {span.name.split()[0] for span in lost} == {"invoke_agent", "chat"}
    for span in lost:
        has = attributes(span)
        assert (has["error.type"], has["claude_agent.closed_by"], span.status.code) == ("sidecar_lost", "successor", 2)
    ids = [span.span_id for span in told.spans]
    assert len(ids) == len(set(ids))


def test_what_a_collector_that_is_down_did_not_get_is_sent_by_the_next_start(api, session, sidecar, collector, tmp_path):
    port = free_port()
    down = flags(f"http://127.0.0.1:{port}", tmp_path)
    wrapper = sidecar(*down)
    cli = session(api(script()), sidecar=wrapper)
    cli.ask("first")
    # One that is down is not waited for.
    assert cli.close(25) == 0 and list((tmp_path / "queue").rglob("*"))
    first = replayed(wrapper.ledger_file)["totals"]["cost_usd"]
    got = collector(port=port)
    other = harness.Sidecar(tmp_path / "other", *down)
    cli = session(api(script()), sidecar=other, home=tmp_path / "home2")
    cli.ask("second")
    cli.close()
    told = Telemetry(got.posts)
    assert len([span for span in told.spans if "claude_agent.turn" in attributes(span)]) == 2
    costs = [attributes(span)["claude_agent.cost_usd"] for span in told.spans if "claude_agent.turn" in attributes(span)]
    assert sum(costs) == pytest.approx(first + replayed(other.ledger_file)["totals"]["cost_usd"], abs=1e-9)


@pytest.mark.parametrize("how", [{"delay": 600}, {"refusals": 10**6}], ids=["hangs", "refuses"])
def test_a_bad_collector_changes_nothing_for_the_app(how, api, session, sidecar, collector, tmp_path):
    kinds = lambda cli: [(line["type"], line.get("subtype")) for line in cli.lines if line["type"] != "system"]
    rules = script(main(0, bash("echo hi")))
    bare = session(api(rules), *TOOLS)
    bare.ask("go")
    bare.close()
    wrapped = session(
        api(rules), *TOOLS, sidecar=sidecar(*flags(collector(**how).url, tmp_path, "--otlp-flush", "1s")), home=tmp_path / "home2"
    )
    wrapped.ask("go")
    assert wrapped.close() == 0
    assert kinds(wrapped) == kinds(bare)
    assert list((tmp_path / "queue").rglob("*")), "what was not sent waits on disk"


def over_grpc(port: int, tmp_path: Path) -> list[str]:
    return flags(f"http://127.0.0.1:{port}", tmp_path, "--otlp-protocol", "grpc", "--otlp-compression", "gzip")


@contextlib.contextmanager
def rotel(tmp_path: Path, behind: str, grpc: int):
    """A real collector: gRPC comes in, http/protobuf goes out. Unbatched: its batcher loses metrics, of a thousand requests some."""
    agent, http = next(ROTEL.glob("python*/site-packages/rotel/rotel-agent")), free_port()
    argv = [agent, "start", "--otlp-grpc-endpoint", f"127.0.0.1:{grpc}", "--otlp-http-endpoint", f"127.0.0.1:{http}"]
    argv += ["--otlp-exporter-endpoint", behind, "--otlp-exporter-protocol", "http", "--disable-batching"]
    with (tmp_path / "rotel.log").open("wb") as log, subprocess.Popen(argv, stdout=log, stderr=log) as process:
        try:
            wait_for("collector", lambda: listens(grpc))
            yield
        finally:
            process.terminate()


def test_a_version_is_told_without_a_collector(version, collector, tmp_path):
    got = collector(delay=600)
    argv = [harness.binary(), "run", "--listen", "off", *flags(got.url, tmp_path), "--", harness.cli(version), "--version"]
    began = time.monotonic()
    assert b"Claude Code" in subprocess.run(argv, capture_output=True, check=True, timeout=60, env={"HOME": str(tmp_path)}).stdout
    assert not list((tmp_path / "queue").rglob("*")) and time.monotonic() - began < 20


def test_a_real_collector_takes_it_over_grpc(api, session, sidecar, collector, tmp_path):
    got, grpc = collector(), free_port()
    with rotel(tmp_path, got.url, grpc):
        wrapper = sidecar(*over_grpc(grpc, tmp_path))
        cli = session(api(script(main(0, bash("echo hi")))), *TOOLS, sidecar=wrapper)
        cli.ask("go")
        assert cli.close() == 0
        cost = replayed(wrapper.ledger_file)["totals"]["cost_usd"]

        def arrived() -> bool:
            told = Telemetry(got.posts)
            exact = abs(told.sum("claude_agent_cost_usd_total") - cost) < 1e-9
            return bool(exact and told.named("chat") and told.named("execute_tool Bash") and told.events)

        wait_for("the session behind the collector", arrived)


def test_a_thousand_short_sessions_lose_nothing(collector, tmp_path):
    """Containers that live for a moment, a real collector that is away at first, and one ledger."""
    recording = ROOT / "sidecar/core/tests/data/01_basic_text.jsonl"
    ledger, got, grpc = tmp_path / "ledger.jsonl", collector(), free_port()
    cat = ["sh", "-c", f"cat {recording}", "sh", "--output-format", "stream-json"]
    argv = [harness.binary(), "run", "--listen", "off", "--ledger", ledger, *over_grpc(grpc, tmp_path), "--", *cat]

    def many(n: int) -> None:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            run = lambda _: subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, check=True, timeout=60)
            list(pool.map(run, range(n)))

    many(100)
    assert not got.posts and list((tmp_path / "queue").rglob("*"))
    with rotel(tmp_path, got.url, grpc):
        many(900)
        books = replayed(ledger)["totals"]
        assert books["turns"] == 1000 and books["cost_usd"] == pytest.approx(25.344, abs=1e-6)

        def arrived() -> bool:
            told = Telemetry(got.posts)
            exact = abs(told.sum("claude_agent_cost_usd_total") - books["cost_usd"]) < 1e-6
            return exact and told.sum("claude_agent_tokens_total") == sum(books["tokens"].values())

        wait_for("a thousand sessions behind the collector", arrived, 60)


def test_what_became_of_it_is_in_the_metrics(api, session, sidecar, collector, tmp_path):
    got = collector()
    wrapper = sidecar(*flags(got.url, tmp_path))
    cli = session(api(script()), sidecar=wrapper, OTEL_BSP_SCHEDULE_DELAY="50")
    cli.ask("go")
    spans = lambda: wrapper.metrics()['agent_sidecar_export_items_total{signal="traces",outcome="sent"}']
    # One that has come is counted a moment later, when it was answered.
    wait_for("spans", lambda: 0 < spans() == len(Telemetry(got.posts).spans))
    assert cli.close() == 0
