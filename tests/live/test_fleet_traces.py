"""A session's trace over OTLP: its phases, what was done in them, and its agents' turns below, as a collector got them from the fleet and from the sidecar inside."""

from __future__ import annotations

import sys
from pathlib import Path

import harness
import pytest
from harness import wait_for
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

sys.path.append(str(Path(__file__).resolve().parents[1] / "fleet"))

import outside  # noqa: E402


@pytest.fixture
def collector():
    one = harness.Collector()
    yield one
    one.close()


@pytest.fixture
def fleet(tmp_path, collector):
    one = outside.Outside(tmp_path, harness.binary(), harness.free_port(), collector=collector.url)
    try:
        yield one.start()
    finally:
        one.close()


def spans(collector: harness.Collector) -> list:
    """Each with the service that has sent it."""
    found = []
    for path, _, body in collector.posts:
        if path == "/v1/traces":
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                service = next(one.value.string_value for one in resource.resource.attributes if one.key == "service.name")
                found += [(service, span) for scope in resource.scope_spans for span in scope.spans]
    return found


def test_a_sessions_trace_has_its_phases_and_its_agents_turns(fleet, collector):
    assert fleet.create("task", "one") == 201 and fleet.create("breaks", "bad") == 201
    fleet.reaches("one", "destroyed")
    fleet.reaches("bad", "failed")
    ours = lambda: [span for service, span in spans(collector) if service == "agent-fleet"]  # noqa: E731
    wait_for("both to their ends", lambda: [span.name for span in ours()].count("session") == 2, 60)
    of = lambda span, key: next((one.value.string_value for one in span.attributes if one.key == key), "")  # noqa: E731
    root, failed = sorted((span for span in ours() if span.name == "session"), key=lambda span: of(span, "agent_fleet.session"), reverse=True)
    assert (of(root, "agent_fleet.session"), of(failed, "agent_fleet.session")) == ("one", "bad")
    assert (root.status.code, failed.status.code, failed.status.message) == (0, 2, "failed") and not root.parent_span_id
    mine = [span for span in ours() if span.trace_id == root.trace_id]
    phases = {span.name: span for span in mine if span.parent_span_id == root.span_id}
    assert {"requested", "creating", "starting", "ready", "stopped"} <= set(phases), set(phases)
    # Each within the session, and each action within its phase.
    assert all(root.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano <= root.end_time_unix_nano for span in phases.values())
    create = next(span for span in mine if span.name == "create")
    assert create.parent_span_id == phases["creating"].span_id and of(create, "agent_fleet.outcome") == "ok"
    assert len({span.span_id for span in mine}) == len(mine), "no span is there twice"
    # What its sidecar has sent is in the same trace.
    inside = lambda: [span for service, span in spans(collector) if service != "agent-fleet" and span.trace_id == root.trace_id]  # noqa: E731
    wait_for("its turns", inside, 60)
    assert any(span.parent_span_id == root.span_id for span in inside()), [span.name for span in inside()]
    said = fleet.ask("/metrics")[1]
    assert 'agent_fleet_spans_total{outcome="dropped"} 0' in said and 'agent_fleet_spans_total{outcome="failed"} 0' in said


def test_a_collector_that_is_away_keeps_nobody(tmp_path):
    """What it does not take is lost, and said; sessions go on, and so does the end."""
    one = outside.Outside(tmp_path, harness.binary(), harness.free_port(), collector="http://127.0.0.1:9")
    try:
        one.start()
        assert one.create("breaks", "bad") == 201
        one.reaches("bad", "failed")
        lost = lambda: any(line.startswith('agent_fleet_spans_total{outcome="failed"}') and not line.endswith(" 0") for line in one.ask("/metrics")[1].splitlines())  # noqa: E731
        wait_for("lost spans", lost, 60)
        one.process.terminate()
        assert one.process.wait(60) == 0
    finally:
        one.close()
