"""The rules of Grafana's dashboard-linter that there are for Prometheus, in Python: the linter itself is a Go program that no registry has."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatch

import boards
import promql

FIGURES = {"stat", "timeseries", "gauge", "bargauge", "table", "heatmap", "state-timeline"}
# Of Grafana's units those that occur here.
UNITS = {"none", "short", "percentunit", "currencyUSD", "bytes", "Bps", "s", "cpm", "dateTimeAsIso"}
OURS = {"$datasource", "${datasource}"}


def found(board: dict) -> Iterator[tuple[str, str, str]]:
    """Each breach: the rule, the panel (or nothing) and what is wrong."""
    yield from of_board(board)
    for panel in boards.panels(board):
        if panel["type"] in FIGURES:
            for rule, what in of_panel(panel):
                yield rule, panel["title"], what
            for target in panel.get("targets", []):
                for rule, what in of_target(target["expr"]):
                    yield rule, panel["title"], what


def of_board(board: dict) -> Iterator[tuple[str, str, str]]:
    if board["editable"]:
        yield "uneditable-dashboard", "", "is editable"
    sources = boards.variables(board, "datasource")
    if [(one["name"], one["label"], one["query"]) for one in sources] != [("datasource", "Data source", "prometheus")]:
        yield "template-datasource-rule", "", f"data sources are {sources}"
    queried = {one["name"]: one for one in boards.variables(board, "query")}
    for name in ["job", "instance"]:
        one = queried.get(name)
        if not one or one["datasource"]["uid"] not in OURS or one["label"] != name.title() or not one["multi"] or one["allValue"] != ".+":
            yield f"template-{name}-rule", "", f"{name} is {one}"
    for name, one in queried.items():
        if one["refresh"] != 2:
            yield "template-on-time-change-reload-rule", "", name
        if not re.fullmatch(r"(label_names|label_values|metrics|query_result)\(.*\)", one["query"]):
            yield "template-label-promql-rule", "", name


def of_panel(panel: dict) -> Iterator[tuple[str, str]]:
    if panel.get("datasource", {}).get("uid") not in OURS:
        yield "panel-datasource-rule", f"asks {panel.get('datasource')}"
    if not panel.get("targets"):
        yield "panel-no-targets-rule", "asks nothing"
    if not panel.get("title") or not panel.get("description"):
        yield "panel-title-description-rule", "has no title or no description"
    field = panel["fieldConfig"]
    units = {one["value"] for override in field["overrides"] for one in override["properties"] if one["id"] == "unit"} | {field["defaults"].get("unit")} - {None}
    if not units or units - UNITS:
        yield "panel-units-rule", f"units are {units}"


def of_target(expr: str) -> Iterator[tuple[str, str]]:
    # PromQL as far as names go: a span is a span, and what is found by a pattern has some name.
    plain = re.sub(r"{__name__=~[^,]*, ", "found{", re.sub(r"\$__\w+", "1m", expr))
    for label in ["job", "instance"]:
        for selector in promql.names(plain).selectors:
            if (label, "=~", f"${label}") not in selector.matchers:
                yield f"target-{label}-rule", f"{selector.metric} is not of the chosen {label}"
    for function, span in re.findall(r"\b(i?rate)\([^\[\]]*\[([^\]]*)\]", expr):
        if span != "$__rate_interval":
            yield "target-rate-interval-rule", f"{function} over {span}"
    for function, counter in re.findall(r"(\w*)\((\w+_total){[^}]*}\[", expr):
        if function not in {"rate", "irate", "increase"}:
            yield "target-counter-agg-rule", f"{function} of {counter}"
    for counter in re.findall(r"(\w+_total){[^}]*}(?!\[)", expr):
        yield "target-counter-agg-rule", f"{counter} as it is"


def excluded(exclusions: dict, board: dict, rule: str, panel: str) -> bool:
    one = exclusions.get(rule)
    if one is None:
        return False
    entries = one.get("entries")
    return entries is None or any(fnmatch(board["title"], entry["dashboard"]) and entry.get("panel", panel) == panel for entry in entries)
