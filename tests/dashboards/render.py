"""Pictures of the dashboards' data: each panel in its place with what its queries gave, drawn plainly. It is not Grafana, and does not look like it.

For eyes, and for the picture in the docs: `PICTURES=/DIR tests/dashboards/run -q`.
"""

from __future__ import annotations

import html
import math
import re
import subprocess
from pathlib import Path

CELL, LINE, GAP = 60, 30, 6  # Pixels of a column and a row of the grid.
PALETTE = ["#73bf69", "#f2cc0c", "#8ab8ff", "#ff780a", "#f2495c", "#b877d9", "#5794f2", "#ffa6b0", "#96d98d", "#fade2a", "#c0d8ff", "#ffb357"]
COLORS = {"green": "#73bf69", "yellow": "#f2cc0c", "red": "#f2495c", "text": "#d8d9da", "blue": "#5794f2", "orange": "#ff9830", "purple": "#b877d9", "transparent": "none"}
STYLE = """body{margin:0;background:#111217;color:#d8d9da;font:12px DejaVu Sans,sans-serif;position:relative}
.p{position:absolute;background:#181b1f;border:1px solid #2c3235;box-sizing:border-box;padding:4px 8px;overflow:hidden}
.row{position:absolute;left:8px;font-weight:bold;font-size:14px;color:#8e9ba5}.t{font-weight:bold;white-space:nowrap;overflow:hidden;text-overflow:ellipsis}
.n{font-size:26px;text-align:center;margin-top:12px;line-height:1.1}.n small{font-size:11px;color:#8e9ba5;display:block}.l{font-size:10px;color:#9fa7b3;line-height:1.25}
table{border-collapse:collapse;font-size:11px;width:100%}td,th{border-bottom:1px solid #2c3235;padding:1px 5px;text-align:left;white-space:nowrap}
.none{color:#6e7780;text-align:center;margin-top:20px}"""


def shown(value: float, unit: str, decimals: int | None = None) -> str:
    if math.isnan(value) or math.isinf(value):
        return "–"
    if unit == "currencyUSD":
        return f"${value:.{decimals or (2 if abs(value) >= 1 else 4)}f}"
    if unit == "percentunit":
        return f"{value * 100:.{1 if decimals is None else decimals}f} %"
    if unit in {"bytes", "Bps"}:
        for size in ["B", "KiB", "MiB", "GiB", "TiB"]:
            if abs(value) < 1024 or size == "TiB":
                return f"{value:.3g} {size}" + ("/s" if unit == "Bps" else "")
            value /= 1024
    if unit == "s":
        for name, length in [("d", 86400), ("h", 3600), ("min", 60), ("s", 1)]:
            if abs(value) >= length:
                return f"{value / length:.3g} {name}"
        return f"{value * 1000:.3g} ms"
    if unit == "dateTimeAsIso":
        return subprocess.run(["date", "-u", "-d", f"@{value / 1000:.0f}", "+%F"], capture_output=True, text=True).stdout.strip()
    text = f"{value / 1e6:.3g} M" if abs(value) >= 1e6 else f"{value / 1e3:.3g} k" if abs(value) >= 1e4 else f"{value:.4g}"
    return text + {"cpm": "/min"}.get(unit, "")


def legend(target: dict, metric: dict) -> str:
    text = target["legendFormat"]
    if text in {"", "__auto"}:
        return " ".join(value for name, value in metric.items() if name != "__name__") or target["refId"]
    return " ".join(re.sub(r"{{(\w+)}}", lambda match: metric.get(match[1], ""), text).split()) or "–"


def color_at(value: float, steps: list[dict]) -> str:
    color = "text"
    for step in steps:
        if step["value"] is None or value >= step["value"]:
            color = step["color"]
    return COLORS.get(color, color)


def mappings(panel: dict) -> dict[str, dict]:
    return {key: one for mapping in panel["fieldConfig"]["defaults"].get("mappings") or [] for key, one in mapping["options"].items()}


def unbroken(lower: list, upper: list) -> list[tuple[list, list]]:
    """The parts of a line between its gaps."""
    parts: list[tuple[list, list]] = []
    for under, point in zip(lower, upper):
        if not parts or point[0] - parts[-1][1][-1][0] > 20:
            parts.append(([], []))
        parts[-1][0].append(under)
        parts[-1][1].append(point)
    return parts


class Picture:
    """`results` are per panel id and refId what Prometheus answered."""

    def __init__(self, board: dict, results: dict[tuple[int, str], list[dict]], span: tuple[float, float]):
        self.board, self.results, self.span = board, results, span

    def page(self) -> str:
        parts, deepest = [], 0
        for panel in self.board["panels"]:
            inside = panel.get("panels") or []
            for one in [panel, *inside]:
                parts.append(self.place(one))
                deepest = max(deepest, (one["gridPos"]["y"] + one["gridPos"]["h"]) * LINE)
        self.height = deepest + 10
        return f"<!doctype html><meta charset=utf-8><style>{STYLE}</style><body style='height:{self.height}px'>{''.join(parts)}"

    def place(self, panel: dict) -> str:
        at = panel["gridPos"]
        box = f"left:{at['x'] * CELL + GAP}px;top:{at['y'] * LINE + GAP}px;width:{at['w'] * CELL - GAP}px;height:{at['h'] * LINE - GAP}px"
        if panel["type"] == "row":
            return f"<div class=row style='{box}'>{'▸' if panel.get('collapsed') else '▾'} {html.escape(panel['title'])}</div>"
        width, height = at["w"] * CELL - GAP - 18, at["h"] * LINE - GAP - 26
        draw = getattr(self, panel["type"].replace("-", ""))
        found = [(target, self.results.get((panel["id"], target["refId"]), [])) for target in panel.get("targets", [])]
        body = draw(panel, found, width, height) if found and any(result for _, result in found) or panel["type"] == "text" else "<div class=none>No data</div>"
        return f"<div class=p style='{box}'><div class=t>{html.escape(panel.get('title') or '')}</div>{body}</div>"

    def text(self, panel: dict, *_) -> str:
        return f"<div class=l style='font-size:12px'>{html.escape(panel['options']['content'])}</div>"

    def stat(self, panel: dict, found: list, width: int, height: int) -> str:
        defaults, names, out = panel["fieldConfig"]["defaults"], mappings(panel), []
        results = [(target, one) for target, result in found for one in result]
        for target, one in results:
            value = float(one["value"][1])
            known = names.get(f"{value:g}")
            color = COLORS.get(known["color"], known["color"]) if known else color_at(value, defaults["thresholds"]["steps"])
            said = known["text"] if known else shown(value, defaults["unit"], defaults.get("decimals"))
            name = f"<small>{html.escape(legend(target, one['metric']))}</small>" if panel["options"]["textMode"] == "value_and_name" else ""
            out.append(f"<span style='color:{color};display:inline-block;padding:0 8px;{'font-size:15px' if len(results) > 1 else ''}'>{name}{html.escape(said)}</span>")
        return f"<div class=n>{''.join(out)}</div>"

    def bargauge(self, panel: dict, found: list, width: int, height: int) -> str:
        defaults, out = panel["fieldConfig"]["defaults"], []
        for target, one in ((target, one) for target, result in found for one in result):
            value = float(one["value"][1])
            color, share = color_at(value, defaults["thresholds"]["steps"]), min(1, value / (defaults.get("max") or 1))
            out.append(f"<div class=l>{html.escape(legend(target, one['metric']))}<div style='background:{color};height:10px;width:{max(1, share * (width - 70)):.0f}px;display:inline-block;margin:0 6px'></div>"
                       f"<span style='color:{color}'>{shown(value, defaults['unit'])}</span></div>")  # fmt: skip
        return "".join(out)

    def table(self, panel: dict, found: list, width: int, height: int) -> str:
        organize = next(one["options"] for one in panel["transformations"] if one["id"] == "organize")
        units = {one["matcher"]["options"]: {prop["id"]: prop["value"] for prop in one["properties"]} for one in panel["fieldConfig"]["overrides"]}
        rows: dict[tuple, dict] = {}
        for target, result in found:
            name = organize["renameByName"].get("Value" if len(found) == 1 else f"Value #{target['refId']}", "?")
            for one in result:
                metric = {key: value for key, value in one["metric"].items() if not organize["excludeByName"].get(key)}
                rows.setdefault(tuple(sorted(metric.items())), dict(metric))[name] = float(one["value"][1])
        labels = sorted({key for row in rows.values() for key in row if isinstance(row[key], str)}, key=lambda key: organize["indexByName"].get(key, 9))
        columns = labels + [name for name in organize["renameByName"].values() if any(name in row for row in rows.values())]
        sort = (panel["options"].get("sortBy") or [{}])[0].get("displayName")
        ordered = sorted(rows.values(), key=lambda row: -row.get(sort, -1) if sort else 0)

        def cell(name: str, value) -> str:
            if not isinstance(value, float):
                return f"<td>{html.escape(value)}</td>"
            how = units.get(name, {})
            color = color_at(value, how["thresholds"]["steps"]) if "thresholds" in how else "inherit"
            return f"<td style='color:{color if color != 'none' else 'inherit'}'>{shown(value, how.get('unit', 'short'))}</td>"

        head = "".join(f"<th>{html.escape(name)}</th>" for name in dict.fromkeys(columns))
        return f"<table><tr>{head}</tr>" + "".join("<tr>" + "".join(cell(name, row.get(name, "")) for name in dict.fromkeys(columns)) + "</tr>" for row in ordered) + "</table>"

    def lines(self, found: list) -> list[tuple[str, list[tuple[float, float]]]]:
        out = []
        for target, result in found:
            for one in result:
                points = [(at, float(value)) for at, value in one["values"]]
                out.append((legend(target, one["metric"]), [(at, value) for at, value in points if math.isfinite(value)]))
        return out

    def x(self, at: float, width: int) -> float:
        return (at - self.span[0]) / (self.span[1] - self.span[0]) * width

    def timeseries(self, panel: dict, found: list, width: int, height: int) -> str:
        defaults, series = panel["fieldConfig"]["defaults"], self.lines(found)
        custom, left, room = defaults["custom"], 56, 16 + 13 * min(3, 1 + sum(len(name) + 4 for name, _ in series) * 6 // width)
        stacked, bars = custom.get("stacking", {}).get("mode") == "normal", custom["drawStyle"] == "bars"
        base: dict[float, float] = {}
        shapes, top = [], 0.0
        for name, points in series:
            lower = [(at, base.get(at, 0.0) if stacked else 0.0) for at, _ in points]
            upper = [(at, under + value) for (at, value), (_, under) in zip(points, lower)]
            if stacked:
                base |= dict(upper)
            top = max([top, *(value for _, value in upper)])
            shapes.append((name, lower, upper))
        lines = [step for step in defaults.get("thresholds", {}).get("steps", []) if step["value"] is not None] if custom.get("thresholdsStyle", {}).get("mode") == "line" else []
        drawn_lines = [step for step in lines if step["value"] <= max(top * 20, 1e-12) or defaults.get("max")]
        top = defaults.get("max") or max([top, *(step["value"] * 1.05 for step in drawn_lines)]) or 1
        bottom = min([defaults.get("min", 0) or 0, *(value for _, _, upper in shapes for _, value in upper)])
        tall = height - room
        y = lambda value: tall - (value - bottom) / ((top - bottom) or 1) * (tall - 8)
        out = []
        for share in (0, 0.5, 1):
            value = bottom + share * (top - bottom)
            out.append(f"<line x1={left} x2={width} y1={y(value):.1f} y2={y(value):.1f} stroke='#2c3235'/><text x={left - 4} y={y(value) + 4:.1f} fill='#8e9ba5' font-size=9 text-anchor=end>{shown(value, defaults['unit'])}</text>")
        wide = width - left
        for n, (_, lower, upper) in enumerate(shapes):
            color = PALETTE[n % len(PALETTE)]
            if bars:
                every = min((b[0] - a[0] for _, _, one in shapes for a, b in zip(one, one[1:])), default=15)
                step = max(2.0, self.x(self.span[0] + every, wide) - 2)
                out += [f"<rect x={left + self.x(at, wide) - step / 2:.1f} width={step:.1f} y={y(value):.1f} height={max(0, y(under) - y(value)):.1f} fill='{color}' opacity=.8 />" for (at, under), (_, value) in zip(lower, upper)]
            for lower, upper in [] if bars else unbroken(lower, upper):
                path = " ".join(f"{left + self.x(at, wide):.1f},{y(value):.1f}" for at, value in upper)
                back = " ".join(f"{left + self.x(at, wide):.1f},{y(value):.1f}" for at, value in reversed(lower))
                out.append(f"<polygon points='{path} {back}' fill='{color}' opacity=.35 />" if stacked else "")
                out.append(f"<polyline points='{path}' fill=none stroke='{color}' stroke-width=1.5 />")
                out.append("".join(f"<circle cx={left + self.x(at, wide):.1f} cy={y(value):.1f} r=2 fill='{color}' />" for at, value in upper) if len(upper) < 3 else "")
        for step in drawn_lines:
            out.append(f"<line x1={left} x2={width} y1={y(step['value']):.1f} y2={y(step['value']):.1f} stroke='{COLORS.get(step['color'], '#888')}' stroke-dasharray='4 3'/>")
        names = " ".join(f"<span style='color:{PALETTE[n % len(PALETTE)]}'>■</span> {html.escape(name)}" for n, (name, _, _) in enumerate(shapes))
        return f"<svg width={width} height={tall + 2}>{''.join(out)}</svg><div class=l>{names}</div>"

    def statetimeline(self, panel: dict, found: list, width: int, height: int) -> str:
        names, left, out = mappings(panel), 150, []
        series = self.lines(found)
        tall = min(26, (height - 16) / max(1, len(series)))
        for n, (name, points) in enumerate(sorted(series)):
            out.append(f"<text x=0 y={n * tall + tall / 2 + 4:.1f} fill='#9fa7b3' font-size=10>{html.escape(name)}</text>")
            for at, value in points:
                known = names.get(f"{value:g}", {"color": "#555"})
                out.append(f"<rect x={left + self.x(at, width - left):.1f} y={n * tall + 2:.1f} width={self.x(self.span[0] + 5, width - left) + 1:.1f} height={tall - 4:.1f} fill='{COLORS.get(known['color'], known['color'])}'/>")
        key = " ".join(f"<span style='color:{COLORS.get(one['color'], one['color'])}'>■</span> {html.escape(one['text'])}" for one in names.values())
        return f"<svg width={width} height={height - 16}>{''.join(out)}</svg><div class=l>{key}</div>"

    def heatmap(self, panel: dict, found: list, width: int, height: int) -> str:
        rows = sorted(((float(one["metric"]["le"].replace("+Inf", "inf")), [(at, float(value)) for at, value in one["values"]]) for _, result in found for one in result))
        out, left, before, most = [], 56, {}, 0.0
        cells = []
        for n, (bound, points) in enumerate(rows):
            for at, value in points:
                inside = value - before.get(at, 0)
                most = max(most, inside)
                cells.append((n, at, inside))
            before = dict(points)
        tall = (height - 4) / max(1, len(rows))
        for n, (bound, _) in enumerate(rows):
            label = "more" if math.isinf(bound) else shown(bound, panel["options"]["yAxis"]["unit"])
            out.append(f"<text x={left - 4} y={height - n * tall - tall / 2 + 2:.1f} fill='#8e9ba5' font-size=9 text-anchor=end>{label}</text>")
        for n, at, inside in cells:
            if inside > 0:
                out.append(f"<rect x={left + self.x(at, width - left):.1f} y={height - (n + 1) * tall:.1f} width={self.x(self.span[0] + 5, width - left) + 1:.1f} height={tall - 1:.1f} fill='#5794f2' opacity={0.25 + 0.75 * (inside / most) ** 0.5:.2f} />")
        return f"<svg width={width} height={height}>{''.join(out)}</svg>"


def draw(board: dict, results: dict, span: tuple[float, float], to: Path) -> None:
    picture = Picture(board, results, span)
    page = to.with_suffix(".html")
    page.write_text(picture.page())
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={24 * CELL + GAP},{picture.height}", f"--screenshot={to}"]
    subprocess.run(["chromium", *flags, page.as_uri()], check=True, capture_output=True, timeout=60)
