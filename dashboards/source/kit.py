"""What every dashboard is made of: panels in rows, the variables, the links, and two shorthands in their PromQL.

`{@}` stands for the matchers of the variables. `grown(COUNTER[RANGE])` is by how much a counter grew, what it had when it was first seen
included; `increase()` leaves that out, and of a pod that ran for two minutes it may be all there is. See docs/dashboards.md.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from grafana_foundation_sdk.builders import bargauge, common, dashboard, heatmap, prometheus, stat, statetimeline, table, text, timeseries
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import heatmap as heatmap_models
from grafana_foundation_sdk.models import prometheus as prometheus_models

ROOT = Path(__file__).resolve().parents[2]
RUNBOOKS = "https://github.com/agent-sidecar/agent-sidecar/blob/main/docs/runbooks"
DATASOURCE = common_models.DataSourceRef(type_val="prometheus", uid="${datasource}")
GREEN, YELLOW, RED, GREY, BLUE = "green", "yellow", "red", "text", "blue"
WHERE = "cluster, namespace, pod, instance"
PLACE = ["cluster", "namespace", "job", "pod", "instance"]
BAD_TURNS = "no_result|stuck_killed|crashed|error_during_execution|success_is_error|error_structured_output"
# What of the fleet's alerts has no instance belongs to every instance.
FIRING = 'ALERTS{alertname=~"ClaudeAgent.+|AgentSidecar.+", alertstate="firing", namespace=~"$namespace", pod=~"$pod|", instance=~"$instance|"}'

ALERTS = {
    rule["alert"]: rule
    for rules in ["agent-sidecar", "agent-fleet"]
    for group in yaml.safe_load((ROOT / f"alerts/{rules}.rules.yaml").read_text())["groups"]
    for rule in group["rules"]
    if "alert" in rule
}


def threshold(alert: str, nth: int = 0) -> float:
    """The nth number that the alert compares with: a dashboard turns red where it fires."""
    found = re.findall(r"(?:[<>]=?|==)\s*((?:[\d.e]+\s*\*\s*)*[\d.e]+)(?![\w(])", ALERTS[alert]["expr"])
    product = 1.0
    for factor in found[nth].split("*"):
        product *= float(factor)
    return round(product, 9)


def expand(query: str) -> str:
    """PromQL with the shorthands written out."""
    query = re.sub(r"\s+", " ", query).strip().replace("@where", WHERE)

    def matchers(match: re.Match) -> str:
        # Tenants are on the agents' series alone.
        labels = PLACE + (["tenant"] if match[1].startswith("claude_agent_") else [])
        return match[1] + "{" + ", ".join(f'{label}=~"${label}"' for label in labels)

    query = re.sub(r"(\w+)\{@", matchers, query)

    def grown(match: re.Match) -> str:
        counter, span = match[1], match[2]
        seen = f"last_over_time({counter}[{span}])"
        return f"(((({seen} - last_over_time({counter}[1d] offset {span})) >= 0) or {seen}) unless resets({counter}[{span}]) > 0 or increase({counter}[{span}]))"

    return re.sub(r"grown\((\w*\{[^}]*\})\[([^\]]+)\]\)", grown, query)


def states(values: dict[str, tuple[int, str]]) -> list[models.ValueMap]:
    return [models.ValueMap({str(n): models.ValueMappingResult(text=name, color=color, index=n) for name, (n, color) in values.items()})]


def to_agent(labels: str) -> str:
    """From a series or a row to its container, at the same time."""
    picked = "&".join(f"var-{name}=${{{labels}.{name}}}" for name in ["namespace", "pod", "instance"])
    return f"/d/agent-sidecar-agent?${{__url_time_range}}&var-datasource=${{datasource}}&{picked}"


AGENT_OF_SERIES = dashboard.DashboardLink("This container").url(to_agent("__field.labels"))
AGENT_OF_ROW = {"title": "This container", "url": to_agent("__data.fields")}


@dataclass
class Row:
    title: str
    panels: list = field(default_factory=list)
    collapsed: bool = False


@dataclass
class Limits:
    """Where a panel turns yellow and red."""

    yellow: float | None = None
    red: float | None = None
    falling: bool = False

    def steps(self, calm: str) -> models.ThresholdsConfig:
        marks = [(self.yellow, YELLOW), (self.red, RED)]
        marks = [(at, color) for at, color in marks if at is not None]
        if self.falling:
            # The first color holds up to the first mark.
            marks.sort(key=lambda mark: mark[0])
            colors = [color for _, color in marks] + [calm]
            steps = [models.Threshold(None, colors[0])] + [models.Threshold(at, color) for (at, _), color in zip(marks, colors[1:])]
        else:
            marks.sort(key=lambda mark: mark[0])
            steps = [models.Threshold(None, calm)] + [models.Threshold(at, color) for at, color in marks]
        return dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps)


def above(red: float | None = None, yellow: float | None = None) -> Limits:
    return Limits(yellow, red)


def over(alert: str, nth: int = 0, *, worse: bool = True, yellow: float | None = None) -> Limits:
    """Red (or yellow) above what the alert compares with. Grafana colors from a mark on: above nothing is a little more than nothing."""
    at = threshold(alert, nth) or 0.001
    return above(at, yellow) if worse else above(None, at)


def below(red: float | None = None, yellow: float | None = None) -> Limits:
    return Limits(yellow, red, falling=True)


def asked(query: str, legend: str = "__auto", *, ref: str = "A", instant: bool = False, form: str = "time_series", exemplar: bool = False, every: str = ""):
    target = prometheus.Dataquery().expr(expand(query)).legend_format(legend).ref_id(ref).datasource(DATASOURCE)
    target = target.format(prometheus_models.PromQueryFormat(form)).editor_mode(prometheus_models.QueryEditorMode.CODE)
    target = target.instant() if instant else target.range()
    if exemplar:
        target = target.exemplar(True)
    return target.interval(every) if every else target


def dressed(panel, title: str, about: str, w: int, h: int, runbook: str | None):
    panel = panel.title(title).description(" ".join(about.split())).datasource(DATASOURCE).grid_pos(models.GridPos(h=h, w=w))
    if runbook:
        assert runbook in ALERTS, runbook
        panel = panel.links([dashboard.DashboardLink(f"Runbook: {runbook}").type(models.DashboardLinkType.LINK).url(f"{RUNBOOKS}/{runbook}.md").target_blank(True)])
    return panel


def number(title: str, about: str, query: str, unit: str = "short", *, limits: Limits | None = None, runbook: str | None = None, legend: str = "__auto",
           w: int = 3, h: int = 4, decimals: int | None = None, mappings=None, name: bool = False, none: str | None = None):  # fmt: skip
    """One figure, and its color says whether it is fine. No color: it is neither."""
    panel = dressed(stat.Panel(), title, about, w, h, runbook).unit(unit).with_target(asked(query, legend, instant=True))
    panel = panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).fields("").values(False)).graph_mode(common_models.BigValueGraphMode.NONE)
    panel = panel.thresholds((limits or Limits()).steps(GREEN if limits else GREY)).color_mode(common_models.BigValueColorMode.VALUE)
    if decimals is not None:
        panel = panel.decimals(decimals)
    if mappings:
        panel = panel.mappings(mappings)
    if none:
        panel = panel.no_value(none)
    return panel.text_mode(common_models.BigValueTextMode.VALUE_AND_NAME) if name else panel


def graph(title: str, about: str, *queries: tuple[str, str], unit: str = "short", limits: Limits | None = None, runbook: str | None = None, w: int = 8, h: int = 8,
          stack: bool = False, bars: bool = False, exemplar: bool = False, low: float | None = 0, high: float | None = None, link: bool = False, every: str = ""):  # fmt: skip
    panel = dressed(timeseries.Panel(), title, about, w, h, runbook).unit(unit)
    for n, (query, legend) in enumerate(queries):
        panel = panel.with_target(asked(query, legend, ref=chr(65 + n), exemplar=exemplar, every=every))
    panel = panel.draw_style(common_models.GraphDrawStyle.BARS if bars else common_models.GraphDrawStyle.LINE)
    panel = panel.fill_opacity(60 if bars else 25 if stack else 0).show_points(common_models.VisibilityMode.AUTO).line_width(1)
    panel = panel.legend(common.VizLegendOptions().show_legend(True).display_mode(common_models.LegendDisplayMode.LIST).placement(common_models.LegendPlacement.BOTTOM).calcs([]))
    panel = panel.tooltip(common.VizTooltipOptions().mode(common_models.TooltipDisplayMode.MULTI).sort(common_models.SortOrder.DESCENDING))
    if stack or bars:
        panel = panel.stacking(common.StackingConfig().mode(common_models.StackingMode.NORMAL).group("A"))
    if limits:
        panel = panel.thresholds(limits.steps("transparent")).thresholds_style(common.GraphThresholdsStyleConfig().mode(common_models.GraphThresholdsStyleMode.LINE))
    panel = panel.min(low) if low is not None else panel
    panel = panel.max(high) if high is not None else panel
    return panel.data_links([AGENT_OF_SERIES]) if link else panel


def quantiles(title: str, about: str, histogram: str, by: str = "", *, unit: str = "s", shares: tuple = (0.5, 0.95, 0.99), **how):
    """Of a histogram, `NAME{@}` without `_bucket`."""
    name, _, matchers = histogram.partition("{")
    labels = f"le, {by}" if by else "le"
    asks = [
        (f"histogram_quantile({q}, sum by ({labels}) (rate({name}_bucket{{{matchers}[$__rate_interval])))", f"{{{{{by}}}}} p{q * 100:g}" if by else f"p{q * 100:g}")
        for q in shares
    ]
    return graph(title, about, *asks, unit=unit, exemplar=True, **how)


def heat(title: str, about: str, histogram: str, unit: str = "s", *, w: int = 8, h: int = 8, runbook: str | None = None):
    # Agents' turns and stops are rare: each counts, the first, too.
    query = f"sum by (le) (grown({histogram.replace('{', '_bucket{', 1)}[$__interval]))"
    panel = dressed(heatmap.Panel(), title, about, w, h, runbook).with_target(asked(query, "{{le}}", form="heatmap", exemplar=True, every="1m"))
    panel = panel.calculate(False).unit("short").y_axis(heatmap.YAxisConfig().unit(unit)).cell_gap(1).show_legend()
    color = heatmap.HeatmapColorOptions().mode(heatmap_models.HeatmapColorMode.SCHEME).scheme("Blues").exponent(0.5).steps(32).reverse(False).fill("blue")
    return panel.color(color).exemplars_color("rgba(255,0,255,0.7)")


def listing(title: str, about: str, columns: dict[str, tuple[str, str]], *, w: int = 24, h: int = 8, sort: str | None = None, link: bool = False,
            limits: dict[str, Limits] | None = None, runbook: str | None = None, hide: tuple = ()):  # fmt: skip
    """A table: rows are what the queries share in labels, columns what each says, with a unit."""
    panel = dressed(table.Panel(), title, about, w, h, runbook)
    names, order = {}, {}
    for n, (name, (query, unit)) in enumerate(columns.items()):
        ref = chr(65 + n)
        panel = panel.with_target(asked(query, "", ref=ref, instant=True, form="table"))
        names |= {f"Value #{ref}": name} | ({"Value": name} if len(columns) == 1 else {})
        properties = [models.DynamicConfigValue("unit", unit)]
        if limits and name in limits:
            properties += [models.DynamicConfigValue("thresholds", limits[name].steps("transparent").build().to_json() | {"mode": "absolute"}),
                           models.DynamicConfigValue("custom.cellOptions", {"type": "color-background", "mode": "basic"})]  # fmt: skip
        panel = panel.override_by_name(name, properties)
    order = {name: n for n, name in enumerate(["Time", "cluster", "namespace", "pod", "instance", "tenant", "team", "cost_center"])}
    excluded = {"Time": True, "__name__": True} | {name: True for name in hide}
    panel = panel.with_transformation(models.DataTransformerConfig(id_val="merge", options={}))
    panel = panel.with_transformation(models.DataTransformerConfig(id_val="organize", options={"excludeByName": excluded, "renameByName": names, "indexByName": order}))
    if sort:
        panel = panel.sort_by([common.TableSortByFieldState().display_name(sort).desc(True)])
    if link:
        panel = panel.override_by_name("instance", [models.DynamicConfigValue("links", [AGENT_OF_ROW])])
    return panel.cell_height(common_models.TableCellHeight.SM).filterable(True)


def timeline(title: str, about: str, query: str, legend: str, mappings, *, w: int = 24, h: int = 6, runbook: str | None = None, link: bool = False):
    panel = dressed(statetimeline.Panel(), title, about, w, h, runbook).with_target(asked(query, legend)).mappings(mappings).unit("none")
    panel = panel.show_value(common_models.VisibilityMode.NEVER).merge_values(True).row_height(0.8).fill_opacity(80).line_width(0)
    panel = panel.legend(common.VizLegendOptions().show_legend(True).display_mode(common_models.LegendDisplayMode.LIST).placement(common_models.LegendPlacement.BOTTOM).calcs([]))
    panel = panel.color_scheme(dashboard.FieldColor().mode(models.FieldColorModeId.THRESHOLDS)).thresholds(Limits().steps(GREY))
    return panel.data_links([AGENT_OF_SERIES]) if link else panel


def levels(title: str, about: str, query: str, legend: str, unit: str = "percentunit", *, limits: Limits, w: int = 8, h: int = 8, runbook: str | None = None, high: float | None = 1):
    panel = dressed(bargauge.Panel(), title, about, w, h, runbook).unit(unit).with_target(asked(query, legend, instant=True)).min(0)
    panel = panel.max(high) if high else panel
    panel = panel.orientation(common_models.VizOrientation.HORIZONTAL).display_mode(common_models.BarGaugeDisplayMode.BASIC).value_mode(common_models.BarGaugeValueMode.TEXT)
    return panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).values(False).fields("")).thresholds(limits.steps(GREEN))


def note(title: str, markdown: str, *, w: int = 24, h: int = 3):
    lines = "\n".join(line.strip() for line in markdown.strip().splitlines())
    return text.Panel().title(title).content(lines).grid_pos(models.GridPos(h=h, w=w))


def variable(name: str, metric: str, matched: list[str], *, all_value: str, include_all: bool = True):
    matchers = ", ".join(f'{label}=~"${label}"' for label in matched)
    query = f"label_values({metric}{{{matchers}}}, {name})" if matchers else f"label_values({metric}, {name})"
    one = dashboard.QueryVariable(name).label(name.title()).datasource(DATASOURCE).multi(True).refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
    one = one.query(query).definition(query).sort(models.VariableSort.ALPHABETICAL_ASC)
    if include_all:
        one = one.include_all(True).all_value(all_value).current(models.VariableOption(selected=True, text=["All"], value=["$__all"]))
    else:
        one = one.include_all(False).all_value(all_value)
    return one


def place_variables(metric: str, *, one_agent: bool = False) -> list:
    """Absent labels are matched by All, so that they need no Kubernetes; a job and an instance there always is."""
    source = dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus").current(models.VariableOption(text="default", value="default"))
    out = [source]
    for n, name in enumerate(PLACE):
        alone = one_agent and name == "instance"
        out.append(variable(name, metric, PLACE[:n], all_value=".+" if name in {"job", "instance"} else ".*", include_all=not alone))
    return out


def annotation(name: str, query: str, color: str, title: str, text_format: str, tags: str):
    target = asked(query, "", ref="Anno")
    one = dashboard.AnnotationQuery().name(name).datasource(DATASOURCE).enable(True).icon_color(color).target(target)
    return one.expr(expand(query)).step("60s").title_format(title).text_format(text_format).tag_keys(tags)


def annotations(*, tenants: bool = True, enforcement: bool = True) -> list:
    kept = 'claude_agent_enforcements_total{@, mode="enforce", action!="warn"}'
    made = [
        annotation("CLI versions", """
            group by (cli_version) (claude_agent_info{@}) unless on (cli_version) group by (cli_version) (last_over_time(claude_agent_info{@}[1d] offset $__rate_interval))
            """, BLUE, "CLI {{cli_version}}", "First seen for a day", "cli_version"),
        annotation("Enforcement", f"""
            sum by (limit, scope, action) (grown({kept}[$__rate_interval])) > 0
            """, "orange", "{{limit}} ({{scope}}): {{action}}", "A limit was enforced", "limit,action"),
        annotation("Firing alerts", f"group by (alertname, severity) ({FIRING})", RED, "{{alertname}}", "{{severity}}", "severity"),
    ]  # fmt: skip
    for one in made:
        if not tenants:
            built = one.build()
            built.expr = built.target.expr = built.expr.replace(', tenant=~"$tenant"', "")
    return made if enforcement else [made[0], made[2]]


def board(uid: str, title: str, about: str, rows: list[Row], variables: list, *, marks: list | None = None, since: str = "now-6h", until: str = "now",
          tags: tuple = ("agent-sidecar",), refresh: str = "30s"):  # fmt: skip
    made = dashboard.Dashboard(title).uid(uid).description(" ".join(about.split())).tags(list(tags)).editable().timezone("browser")
    made = made.tooltip(models.DashboardCursorSync.CROSSHAIR).time(since, until).refresh(refresh).version(1)
    others = dashboard.DashboardLink("Agents").type(models.DashboardLinkType.DASHBOARDS).tags(["agent-sidecar"]).include_vars(True).keep_time(True).as_dropdown(False)
    made = made.link(others)
    books = dashboard.DashboardLink("Runbooks").type(models.DashboardLinkType.LINK).url(f"{RUNBOOKS}/README.md").target_blank(True).icon("doc")
    made = made.link(books)
    for one in variables:
        made = made.with_variable(one)
    for one in marks or []:
        made = made.annotation(one)
    y, number_of = 0, 1
    for row in rows:
        head = dashboard.Row(row.title).collapsed(row.collapsed).grid_pos(models.GridPos(x=0, y=y, w=24, h=1)).id(number_of)
        y, number_of, x, tallest, placed = y + 1, number_of + 1, 0, 0, []
        for panel in row.panels:
            built = panel.build()
            if x + built.grid_pos.w > 24:
                x, y, tallest = 0, y + tallest, 0
            built.grid_pos.x, built.grid_pos.y, built.id_val = x, y, number_of
            x, tallest, number_of = x + built.grid_pos.w, max(tallest, built.grid_pos.h), number_of + 1
            placed.append(Built(built))
        y += tallest
        if row.collapsed:
            for panel in placed:
                head = head.with_panel(panel)
            made = made.with_row(head)
        else:
            made = made.with_row(head)
            for panel in placed:
                made = made.with_panel(panel)
    return made.build()


class Built:
    """A panel that has its place already."""

    def __init__(self, panel: models.Panel):
        self.panel = panel

    def build(self) -> models.Panel:
        return self.panel
