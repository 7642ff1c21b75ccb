"""The dashboards are what their code makes, name what the sidecar says, and have no dead panel: every query is asked of a Prometheus that has
scraped real runs."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import subprocess
import time
import urllib.parse
from collections.abc import Callable
from pathlib import Path

import boards
import lint
import promql
import pytest
import render
import source.__main__ as made
import test_alerts as alerts
import yaml
from boards import BOARDS, ROOT, Query
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from source.kit import expand
from stage import Stage

UIDS = {
    "fleet": "agent-sidecar-fleet", "spend": "agent-sidecar-spend", "agent": "agent-sidecar-agent", "limits": "agent-sidecar-limits", "internals": "agent-sidecar-internals",
    "agent-fleet": "agent-fleet", "native": "claude-code-native",
}  # fmt: skip
OURS = [name for name in UIDS if name != "native"]
QUERIES = [query for name in UIDS for query in boards.queries(name)]
EXCLUSIONS = yaml.safe_load((ROOT / "dashboards/.lint").read_text())["exclusions"]
SCRAPED = {"cluster", "namespace", "job", "pod", "instance"}
# What stays empty here for so many seconds, and why. With data in it before that, it is no exception.
EMPTY = {
    ("agent", "When memory will reach its limit"): (600, "nothing is foretold before memory has grown for ten minutes"),
}
# For what is scraped a moment later, on a machine that has other things to do.
LATE = 60
# What not every machine has; where a target tells it, it has to be in the panels.
OF_THE_MACHINE = {
    "claude_agent_container_memory_limit_bytes": "a container without a limit has none to tell",
    "claude_agent_container_pressure_seconds_total": "kernels without pressure stall information, and cgroups of the first version",
}


# What they are.


def test_there_are_seven():
    assert {name: board["uid"] for name, board in BOARDS.items()} == UIDS


@pytest.mark.parametrize("name", UIDS)
def test_the_file_is_what_the_code_makes(name: str):
    assert made.texts()[name] == (ROOT / f"dashboards/{name}.json").read_text(), "run `python -m source` in dashboards/"


def round_trip(board: dict) -> dict:
    """Through the types that Grafana publishes: what they do not know is lost, what is of another type is refused."""
    register_default_plugins()
    return made.plain(Dashboard.from_json(copy.deepcopy(board)))


@pytest.mark.parametrize("name", UIDS)
def test_grafanas_own_types_know_every_field(name: str):
    assert round_trip(BOARDS[name]) == BOARDS[name]


@pytest.mark.parametrize("path", [["panels", 1, "options", "colourMode"], ["panels", 1, "titel"], ["panels", 1, "fieldConfig", "defaults", "unti"], ["templating", "list", 1, "quarry"]])
def test_a_field_that_is_none_is_found(path: list):
    board = copy.deepcopy(BOARDS["fleet"])
    at = board
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = "x"
    assert round_trip(board) != board


def compiled(directory: Path, boards: dict[str, dict]) -> list[str]:
    """What TypeScript says of them as values of the types that Grafana itself is built with."""
    cache = ROOT / ".cache"
    (directory / "node_modules").mkdir()
    (directory / "node_modules/@grafana").symlink_to((cache / "grafana/node_modules/@grafana").resolve())
    (directory / "board.ts").write_text((Path(__file__).parent / "board.ts").read_text())
    for name, board in boards.items():
        (directory / f"{name}.ts").write_text(f'import type {{ Board }} from "./board";\nexport const board: Board = {json.dumps(board, indent=1)};\n')
    flags = ["--noEmit", "--strict", "--skipLibCheck", "--target", "es2022", "--module", "esnext", "--moduleResolution", "bundler"]
    argv = [cache / "deploy/npm/node_modules/.bin/tsc", *flags, *(f"{name}.ts" for name in boards)]
    return subprocess.run(argv, cwd=directory, capture_output=True, text=True, timeout=300).stdout.splitlines()


def test_grafanas_schema_takes_them(tmp_path: Path):
    """Of the newest release; the SDK that they are made with has types of its own."""
    assert compiled(tmp_path, BOARDS) == []


def test_grafanas_schema_does_not_take_others(tmp_path: Path):
    changes = {
        "titel": lambda board, panel: panel.update(titel="x"),
        "palette": lambda board, panel: panel["fieldConfig"]["defaults"].update(color={"mode": "rainbow"}),
        "drawStyle": lambda board, panel: panel["fieldConfig"]["defaults"]["custom"].update(drawStyle="scribble"),
        "tooltip": lambda board, panel: panel["options"].update(tooltips={}),
        "a panel of no kind": lambda board, panel: panel.update(type="graph"),
        "exprs": lambda board, panel: panel["targets"][0].update(exprs="up"),
        "refresh": lambda board, panel: board.update(refresh=30),
        "quarry": lambda board, panel: board["templating"]["list"][1].update(quarry="x"),
    }
    broken = {}
    for n, change in enumerate(changes.values()):
        broken[f"broken{n}"] = copy.deepcopy(BOARDS["internals"])
        change(broken[f"broken{n}"], next(panel for panel in boards.panels(broken[f"broken{n}"]) if panel["type"] == "timeseries"))
    assert {line.partition(".ts(")[0] for line in compiled(tmp_path, broken)} == set(broken)


@pytest.mark.parametrize("name", UIDS)
def test_the_linters_rules_hold(name: str):
    left = [breach for breach in lint.found(BOARDS[name]) if not lint.excluded(EXCLUSIONS, BOARDS[name], *breach[:2])]
    assert left == []


def test_an_exclusion_is_needed():
    breaches = {(rule, name) for name in UIDS for rule, *_ in lint.found(BOARDS[name])}
    assert set(EXCLUSIONS) == {rule for rule, _ in breaches}


@pytest.mark.parametrize(("rule", "change"), [
    ("panel-units-rule", lambda panel: panel["fieldConfig"]["defaults"].update(unit="dollars")),
    ("panel-title-description-rule", lambda panel: panel.update(description="")),
    ("panel-datasource-rule", lambda panel: panel.update(datasource={"uid": "prometheus"})),
    ("target-rate-interval-rule", lambda panel: panel["targets"][0].update(expr="rate(x{}[5m])")),
    ("target-job-rule", lambda panel: panel["targets"][0].update(expr="x{}")),
    ("target-counter-agg-rule", lambda panel: panel["targets"][0].update(expr="sum(x_total{})")),
])  # fmt: skip
def test_the_linter_finds(rule: str, change):
    board = copy.deepcopy(BOARDS["internals"])
    change(next(panel for panel in boards.panels(board) if panel["type"] == "timeseries"))
    assert rule in [breach[0] for breach in lint.found(board)]


@pytest.mark.parametrize("name", OURS)
def test_bare_counters_are_only_in_what_counts_their_first_value(name: str):
    for query in boards.queries(name):
        # As it is made, with everything else as it is.
        rest = query.expr
        for counter in set(re.findall(r"last_over_time\((\w+{[^}]*})\[", rest)):
            for span in ["$__range", "$__interval", "$__rate_interval", "1h", "10m", "15m"]:
                rest = rest.replace(expand(f"grown({counter}[{span}])"), "")
        assert "last_over_time" not in rest.replace("last_over_time(claude_agent_info", "") and "resets" not in rest, f"{query}: {rest}"


@pytest.mark.parametrize("name", UIDS)
def test_panels_have_their_place(name: str):
    board, taken = BOARDS[name], {}
    for panel in boards.panels(board):
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        for cell in ((x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])):
            assert taken.setdefault(cell, panel["id"]) == panel["id"], f"{panel['title']} is on top of another"
    ids = [panel["id"] for panel in boards.panels(board)]
    assert len(ids) == len(set(ids))
    first = board["panels"][0]
    assert (first["type"], first["title"]) == ("row", "Spend and use" if name == "native" else "Is it fine?")
    assert (board["graphTooltip"], board["schemaVersion"], board["editable"]) == (1, 42, True)


@pytest.mark.parametrize("name", UIDS)
def test_links_lead_somewhere(name: str):
    board = BOARDS[name]
    texts = json.dumps(board)
    for page in re.findall(r"agent-sidecar/blob/main/([\w/.]+)", texts):
        assert (ROOT / page).is_file(), page
    uids = {one["uid"]: one for one in BOARDS.values()}
    for uid, rest in re.findall(r"/d/([\w-]+)\?([^\"]*)", texts):
        variables = {one["name"] for one in uids[uid]["templating"]["list"]}
        assert set(re.findall(r"var-(\w+)=", rest)) <= variables and "${__url_time_range}" in rest
    across = [link for link in board["links"] if link["type"] == "dashboards"]
    assert [(link["includeVars"], link["keepTime"]) for link in across] == [(True, True)]
    assert any(set(across[0]["tags"]) & set(other["tags"]) for other in BOARDS.values() if other is not board)


def numbers(alert: str) -> set[float]:
    """What an alert compares with; a panel's mark for more than nothing is a little above it."""
    expr = alerts.ALERT_RULES[alert]["expr"]
    found = [math.prod(map(float, product.split("*"))) for product in re.findall(r"(?:[<>]=?|==) *((?:[\d.e]+ *\* *)*[\d.e]+)(?![\w*(])", expr)]
    found += [float(bound) for bound in re.findall(r'le=~"(\d+)', expr)]
    return {round(one, 9) or 0.001 for one in found} | ({1.0} if 0.0 in found else set())


@pytest.mark.parametrize("name", OURS)
def test_thresholds_are_the_alerts(name: str):
    checked = 0
    for panel in boards.panels(BOARDS[name]):
        alert = next((link["title"].removeprefix("Runbook: ") for link in panel.get("links") or [] if link["title"].startswith("Runbook: ")), None)
        marks = {step["value"] for step in panel.get("fieldConfig", {}).get("defaults", {}).get("thresholds", {}).get("steps", [])} - {None}
        if alert and marks and panel["type"] != "state-timeline":
            assert marks & numbers(alert), f"{panel['title']}: {marks}, and {alert} compares with {numbers(alert)}"
            checked += 1
    assert checked >= 3


# What they name.


def holds(expr: str) -> None:
    """Each metric, label and value is the catalogue's; `.*` stands for whatever was chosen."""
    found = promql.names(expr)
    assert found.selectors, expr
    labels = {}
    for selector in found.selectors:
        fixed = {"alertname", "alertstate", "severity"} if selector.metric == "ALERTS" else alerts.labels_of(selector.metric)
        labels[id(selector)] = fixed | SCRAPED
        for label, _, pattern in selector.matchers:
            assert label in labels[id(selector)], f"{selector.metric} has no label {label}"
            if selector.metric != "ALERTS" and label not in SCRAPED | {"tenant"} and pattern not in {".*", ".+"}:
                for value in pattern.split("|"):
                    assert alerts.may_be(selector.metric, label, value), f'{selector.metric} never has {label}="{value}"'
    for what, by, selectors in found.lists:
        for label in set(by) - SCRAPED:
            every = all if what in {"by", "without"} else any
            assert every(label in labels[id(one)] for one in selectors), f"{what} ({label}) of what has none: {expr}"


@pytest.mark.parametrize("query", [query for query in QUERIES if query.board in OURS], ids=str)
def test_what_a_query_names_exists(query: Query):
    holds(boards.put_in(query.expr, boards.everything(BOARDS[query.board])))
    if query.kind == "variable":
        assert query.legend in SCRAPED | alerts.labels_of(promql.names(query.expr).selectors[0].metric)
    for label in re.findall(r"{{(\w+)}}", query.legend):
        inside = promql.names(query.expr)
        assert label in SCRAPED or any(label in by for _, by, _ in inside.lists) or all(label in alerts.labels_of(one.metric) for one in inside.selectors), f"no {label} in the legend's series"


@pytest.mark.parametrize("broken", [
    'sum(claude_agent_turn_total{job=~".+"})', 'sum by (slot) (claude_agent_turns_total{job=~".+"})', 'claude_agent_turns_total{outcome="exploded"}', 'claude_agent_turns_total{model=~".*"}',
])  # fmt: skip
def test_what_does_not_exist_is_found(broken: str):
    with pytest.raises(AssertionError):
        holds(broken)


# What they show.


FAILED: list[BaseException] = []


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    # A test that is asked again has it set up again: two tries are enough for all of them.
    if len(FAILED) > 1:
        pytest.fail(f"the stage failed twice, at last by {FAILED[-1]!r}")
    one = Stage(tmp_path_factory.mktemp("stage"))
    try:
        try:
            one.play()
        except BaseException as error:
            FAILED.append(error)
            raise
        yield one
        if directory := os.environ.get("PICTURES"):
            pictures(one, Path(directory))
    finally:
        one.close()


def ask(stage: Stage, query: Query, step: int = boards.STEP) -> list[dict]:
    """As Grafana would, with all chosen."""
    expr = boards.put_in(query.expr, boards.everything(BOARDS[query.board]))
    server = {"native": stage.native, "agent-fleet": stage.outside}.get(query.board, stage.prometheus)
    if query.kind == "variable":
        answer = server.ask(f"label/{query.legend}/values?" + urllib.parse.urlencode({"match[]": expr}), get=True)
        assert answer["status"] == "success", answer
        return [{"values": [(0, "1")]} for _ in answer["data"]]
    if query.instant:
        answer = server.ask("query", query=expr)
    else:
        answer = server.ask("query_range", query=expr, start=stage.started, end=time.time(), step=step)
    assert answer["status"] == "success", f"{answer['error']}: {expr}"
    return answer["data"]["result"]


def figures(result: list[dict]) -> list[float]:
    values = [float(value) for one in result for _, value in one.get("values") or [one["value"]]]
    return [value for value in values if math.isfinite(value)]


@pytest.mark.parametrize("query", QUERIES, ids=str)
def test_no_panel_is_dead(query: Query, stage: Stage):
    absent = [metric for metric in OF_THE_MACHINE if metric in query.expr and not stage.prometheus.query(metric)]
    for_seconds, _ = EMPTY.get((query.board, query.panel), (0, ""))
    excused = for_seconds > 0 or bool(absent)
    said = figures(ask(stage, query))
    if excused:
        assert not said or not absent and time.time() - stage.started > for_seconds, f"there is data: {query} is no exception any more"
        return
    wanted = lambda said: bool(said) and (query.kind != "heatmap" or max(said) > 0)  # noqa: E731
    deadline = time.monotonic() + LATE
    while not wanted(said) and time.monotonic() < deadline:
        time.sleep(1)
        said = figures(ask(stage, query))
    assert said, f"nothing to see: {query.expr}"
    assert wanted(said), "nothing but zeros"


def test_a_dead_panel_is_found(stage: Stage):
    dead = Query("fleet", "dead", "stat", "sum(claude_agent_turns_totally{})", True)
    assert figures(ask(stage, dead)) == []


def test_all_is_all_with_and_without_kubernetes(stage: Stage):
    # Of one moment, which all scrapes are over of: agents come and go.
    now = time.time() - 5
    count = lambda expr: sum(figures(stage.prometheus.ask("query", query=expr, time=now)["data"]["result"]))  # noqa: E731
    everywhere = boards.put_in(expand("count(agent_sidecar_build_info{@})"), boards.everything(BOARDS["fleet"]))
    up = count("count(up == 1)")
    assert count(everywhere) == up and count('count(up{namespace=""} == 1)') not in {0, up}
    chosen = boards.put_in(expand("count(agent_sidecar_build_info{@})"), boards.everything(BOARDS["fleet"]) | {"namespace": "agents"})
    assert count(chosen) == count('count(up{namespace="agents"} == 1)') > 0


def total(stage: Stage, panel: str, board: str = "spend") -> float:
    query = next(query for query in boards.queries(board) if query.panel == panel)
    return sum(figures(ask(stage, query)))


def soon(so: Callable[[], bool]) -> None:
    """What was counted last may not have been scraped yet; whether it is so says who asks."""
    deadline = time.monotonic() + LATE
    while not so() and time.monotonic() < deadline:
        time.sleep(1)


def spent(ledger: Path) -> float:
    return json.loads(alerts.output(alerts.binary(), "replay", "--ledger", "--format", "json", ledger))["totals"]["cost_usd"]


def test_money_is_what_the_ledgers_say(stage: Stage):
    """By agents that run, that were ended and that were killed; increase() would have missed what each had spent when it was first seen."""
    written = lambda: {path.parent.name: spent(path) for path in sorted(stage.directory.glob("**/ledger.jsonl"))}  # noqa: E731
    # A counter does not fall: what was counted ahead and taken back when it was confirmed, as on a machine that is late, is told apart.
    back = lambda: sum(figures(stage.prometheus.query('sum(max_over_time(claude_agent_cost_reconciliation_error_usd_total{direction="over"}[1h]))')))  # noqa: E731
    soon(lambda: total(stage, "Spent in this time") - back() == pytest.approx(sum(written().values()), abs=1e-6))
    by_ledger, shown = written(), total(stage, "Spent in this time")
    by_target = stage.prometheus.query("max_over_time(claude_agent_cost_usd_total[1h])")
    assert shown - back() == pytest.approx(sum(by_ledger.values()), abs=1e-6), (by_ledger, [(one["metric"], one["value"][1]) for one in by_target])
    # Each way of dividing it has the same sum.
    assert total(stage, "Containers, the dearest first") == pytest.approx(shown, abs=1e-6)
    plain = figures(stage.prometheus.query("sum(increase(claude_agent_cost_usd_total[1d]))"))
    print(f"spent ${shown:.4f}, increase() says ${plain[0]:.4f}")
    assert plain[0] < 0.9 * shown


def test_native_money_is_what_was_served(stage: Stage):
    served = sum(api.cost_usd("new") for api in stage.apis if api.log_file.parent.name.startswith("native"))
    soon(lambda: total(stage, "Spent in this time", "native") == pytest.approx(served, abs=1e-6))
    assert total(stage, "Spent in this time", "native") == pytest.approx(served, abs=1e-6)


def test_a_budget_of_several_tenants_is_shown_once(stage: Stage):
    for panel, scopes in [("Budgets in dollars", ["container_day", "tenant_day", "tenant_day"]), ("Budgets in tokens", ["container_month", "tenant_day", "tenant_day"])]:
        for query in [query for query in boards.queries("spend") if query.panel == panel]:
            shown = lambda query=query: sorted(one["metric"]["scope"] for one in ask(stage, query))  # noqa: E731
            soon(lambda: shown() == scopes)  # noqa: B023
            assert shown() == scopes, query.expr


def pictures(stage: Stage, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    now = time.time()
    for name, board in BOARDS.items():
        results = {}
        for panel in boards.panels(board):
            for target in panel.get("targets", []):
                query = Query(name, panel["title"], panel["type"], target["expr"], target["instant"])
                # Bars are as wide as what they sum up.
                results[panel["id"], target["refId"]] = ask(stage, query, 15 if "$__interval]" in query.expr else boards.STEP)
        render.draw(board, results, (stage.started, now), directory / f"{name}.png")
