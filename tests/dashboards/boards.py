"""The dashboards as Grafana reads them: their panels and queries, with variables put in."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "dashboards").glob("*.json"))
BOARDS = {path.stem: json.loads(path.read_text()) for path in FILES}
# Scraped every two seconds: what Grafana makes of that for some minutes on a screen.
INTERVAL, STEP = "15s", 5
# As if a day were on the screen, of which the first hours have nothing.
RANGE = 86400


@dataclass(frozen=True)
class Query:
    board: str
    panel: str
    kind: str
    expr: str
    instant: bool
    legend: str = ""

    def __str__(self) -> str:
        return f"{self.board}: {self.panel}"


def panels(board: dict) -> Iterator[dict]:
    for panel in board["panels"]:
        yield panel
        yield from panel.get("panels") or []


def queries(name: str) -> Iterator[Query]:
    """Of every panel, annotation and variable."""
    board = BOARDS[name]
    for panel in panels(board):
        for target in panel.get("targets", []):
            yield Query(name, panel["title"], panel["type"], target["expr"], target["instant"], target["legendFormat"])
    for one in board.get("annotations", {}).get("list", []):
        yield Query(name, one["name"], "annotation", one["expr"], False)
    for one in variables(board, "query"):
        yield Query(name, one["name"], "variable", label_values(one)[0], True, label_values(one)[1])


def variables(board: dict, kind: str) -> list[dict]:
    return [one for one in board["templating"]["list"] if one["type"] == kind]


def label_values(variable: dict) -> tuple[str, str]:
    """The selector and the label that a variable is read from."""
    selector, label = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]).groups()
    return selector, label


def everything(board: dict) -> dict[str, str]:
    """All chosen, of each variable."""
    return {one["name"]: one["allValue"] for one in variables(board, "query")}


def put_in(expr: str, values: dict[str, str]) -> str:
    """A query as Grafana sends it."""
    builtin = {"__rate_interval": INTERVAL, "__interval_ms": str(int(INTERVAL[:-1]) * 1000), "__interval": INTERVAL,
               "__range_s": str(RANGE), "__range_ms": str(RANGE * 1000), "__range": f"{RANGE}s"}  # fmt: skip
    for name, value in (builtin | values).items():
        expr = re.sub(rf"\$(?:{name}\b|{{{name}}})", lambda _, value=value: value, expr)
    assert "$" not in expr, f"a variable is not defined: {expr}"
    return expr
