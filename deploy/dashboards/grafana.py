"""The dashboard file of Grafana: JSON, with panels on a grid of 24 columns."""

from __future__ import annotations

from typing import Any

from deploy.dashboards.panels import SECTIONS, Dialect, Panel, PanelStyle, PanelUnit, Query

DIALECT = Dialect("", "$timeFilter", "$__interval", "'$run'")
RUN_NAMES_QUERY = 'SHOW TAG VALUES WITH KEY = "run"'
DATASOURCE = {"type": "influxdb", "uid": "sparse"}  # as in deploy/grafana/provisioning
_SCHEMA_VERSION = 39  # later versions of Grafana read it too
_PER_ROW, _WIDTH, _HEIGHT = 3, 8, 8
# Presence records come once per second and samples twice: a shorter interval would have gaps.
_SHORTEST_INTERVAL = "2s"
_UNITS: dict[PanelUnit, str] = {
    "": "short",
    "1/s": "suffix:/s",
    "ms": "ms",
    "%": "percent",
    "cores": "short",
    "bytes": "bytes",
    "bytes/s": "Bps",
    "W": "watt",
    "J": "joule",
}
_STYLES: dict[PanelStyle, dict[str, Any]] = {
    "lines": {"drawStyle": "line", "fillOpacity": 0, "stacking": {"mode": "none"}},
    "stacked": {"drawStyle": "line", "fillOpacity": 60, "stacking": {"mode": "normal", "group": "A"}},
    "bars": {"drawStyle": "bars", "fillOpacity": 60, "stacking": {"mode": "none"}},
}


def build_dashboard() -> dict[str, Any]:
    """The content of the file."""
    panels: list[dict[str, Any]] = []
    top = 0
    for title, section in SECTIONS.items():
        position = {"x": 0, "y": top, "w": _PER_ROW * _WIDTH, "h": 1}
        panels.append({"id": len(panels) + 1, "type": "row", "title": title, "collapsed": False, "gridPos": position})
        for index, panel in enumerate(section):
            row, column = divmod(index, _PER_ROW)
            panels.append(_panel(panel, len(panels) + 1, column * _WIDTH, top + 1 + row * _HEIGHT))
        top = panels[-1]["gridPos"]["y"] + _HEIGHT
    run_variable = {
        "name": "run",
        "label": "run",
        "type": "query",
        "datasource": DATASOURCE,
        "query": RUN_NAMES_QUERY,
        "refresh": 2,  # when the time range changes
        "sort": 2,  # descending: the newest first of names that end in a date
        "multi": False,
        "includeAll": False,
    }
    return {
        "uid": "sparse",
        "title": "Sparse",
        "schemaVersion": _SCHEMA_VERSION,
        "editable": True,
        "refresh": "5s",
        "time": {"from": "now-15m", "to": "now"},
        "timezone": "browser",
        "templating": {"list": [run_variable]},
        "panels": panels,
    }


def _panel(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    targets = [_target(query, "ABC"[index], len(panel.queries) > 1) for index, query in enumerate(panel.queries)]
    custom = {**_STYLES[panel.style], "lineWidth": 1, "showPoints": "auto", "spanNulls": panel.style != "bars"}
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.note,
        "datasource": DATASOURCE,
        "interval": _SHORTEST_INTERVAL,
        "gridPos": {"x": x, "y": y, "w": _WIDTH, "h": _HEIGHT},
        "fieldConfig": {"defaults": {"unit": _UNITS[panel.unit], "min": 0, "custom": custom}, "overrides": []},
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": targets,
    }


def _target(query: Query, letter: str, is_one_of_several: bool) -> dict[str, Any]:
    """One query. Its lines are named by their tags, and by their column if there are several."""
    names = [f"$tag_{tag}" for tag in query.group_by]
    if is_one_of_several or len(query.columns) > 1:
        names.append("$col")
    return {
        "refId": letter,
        "datasource": DATASOURCE,
        "rawQuery": True,
        "query": query.to_influxql(DIALECT),
        "alias": " ".join(names),
        "resultFormat": "time_series",
    }
