"""A dashboard as Grafana reads it from a file: JSON of its own, panels on a grid of 24 columns. Pure."""

from __future__ import annotations

from typing import Any

from deploy.dashboards.panels import SECTIONS, Dialect, Panel, PanelStyle, PanelUnit, Query

DIALECT = Dialect("", "$timeFilter", "$__interval", "'$run'")
RUN_NAMES_QUERY = 'SHOW TAG VALUES WITH KEY = "run"'
DATASOURCE = {"type": "influxdb", "uid": "sparse"}  # as deploy/grafana/provisioning has it
_SCHEMA = 39  # of the JSON; later versions of Grafana read it, too
_ACROSS, _WIDTH, _HEIGHT = 3, 8, 8
# Presence comes once a second, samples of a node twice: anything finer would be holes.
_FINEST = "2s"
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
    """The whole file."""
    panels: list[dict[str, Any]] = []
    top = 0
    for title, section in SECTIONS.items():
        place = {"x": 0, "y": top, "w": _ACROSS * _WIDTH, "h": 1}
        panels.append({"id": len(panels) + 1, "type": "row", "title": title, "collapsed": False, "gridPos": place})
        for number, panel in enumerate(section):
            row, column = divmod(number, _ACROSS)
            panels.append(_panel(panel, len(panels) + 1, column * _WIDTH, top + 1 + row * _HEIGHT))
        top = panels[-1]["gridPos"]["y"] + _HEIGHT
    return {
        "uid": "sparse",
        "title": "Sparse",
        "schemaVersion": _SCHEMA,
        "editable": True,
        "refresh": "5s",
        "time": {"from": "now-15m", "to": "now"},
        "timezone": "browser",
        "templating": {"list": [_run()]},
        "panels": panels,
    }


def _run() -> dict[str, Any]:
    return {
        "name": "run",
        "label": "run",
        "type": "query",
        "datasource": DATASOURCE,
        "query": RUN_NAMES_QUERY,
        "refresh": 2,  # whenever another time is looked at
        "sort": 2,  # Z first: of names that end in a date, the newest
        "multi": False,
        "includeAll": False,
    }


def _panel(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    targets = [_target(query, "ABC"[place], len(panel.queries) > 1) for place, query in enumerate(panel.queries)]
    custom = {**_STYLES[panel.kind], "lineWidth": 1, "showPoints": "auto", "spanNulls": panel.kind != "bars"}
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.note,
        "datasource": DATASOURCE,
        "interval": _FINEST,
        "gridPos": {"x": x, "y": y, "w": _WIDTH, "h": _HEIGHT},
        "fieldConfig": {"defaults": {"unit": _UNITS[panel.unit], "min": 0, "custom": custom}, "overrides": []},
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": targets,
    }


def _target(query: Query, letter: str, with_others: bool) -> dict[str, Any]:
    """One query, and how its lines are called: by their tags, and by what they are unless the panel's title says it."""
    words = [f"$tag_{tag}" for tag in query.by]
    if with_others or len(query.columns) > 1:
        words.append("$col")
    return {
        "refId": letter,
        "datasource": DATASOURCE,
        "rawQuery": True,
        "query": query.text(DIALECT),
        "alias": " ".join(words),
        "resultFormat": "time_series",
    }
