"""The dashboard file of Chronograf: JSON, with cells on a grid of twelve columns."""

from __future__ import annotations

from typing import Any

from deploy.dashboards.panels import SECTIONS, Dialect, Panel, PanelStyle, PanelUnit

# The time condition of Chronograf's own queries. Its connection has no default database, so each query names one.
DIALECT = Dialect('"sparse"..', "time > :dashboardTime: AND time < :upperDashboardTime:", ":interval:", "':run:'")
RUN_NAMES_QUERY = 'SHOW TAG VALUES ON "sparse" WITH KEY = "run"'
_ID = 7777  # far from 1, 2, ...: a file with the number of one of Chronograf's own dashboards is ignored
_PER_ROW, _WIDTH, _HEIGHT = 3, 4, 4
_TYPES: dict[PanelStyle, str] = {"lines": "line", "stacked": "line-stacked", "bars": "bar"}
_SUFFIXES: dict[PanelUnit, str] = {
    "1/s": "/s",
    "ms": " ms",
    "%": "%",
    "bytes": "B",
    "bytes/s": "B/s",
    "W": " W",
    "J": " J",
}


def build_dashboard() -> dict[str, Any]:
    """The content of the file."""
    cells: list[dict[str, Any]] = []
    top = 0
    for panels in SECTIONS.values():
        for index, panel in enumerate(panels):
            row, column = divmod(index, _PER_ROW)
            cells.append(_cell(panel, str(len(cells) + 1), column * _WIDTH, top + row * _HEIGHT))
        top = cells[-1]["y"] + _HEIGHT
    run_variable = {
        "id": "run",
        "tempVar": ":run:",
        "type": "influxql",
        "label": "run",
        "sourceID": "dynamic",
        "query": {"influxql": RUN_NAMES_QUERY},
        "values": [],
    }
    return {"id": _ID, "organization": "default", "name": "Sparse", "cells": cells, "templates": [run_variable]}


def _cell(panel: Panel, number: str, x: int, y: int) -> dict[str, Any]:
    # An empty source is the selected one; base 10 formats 3400 as 3.4K.
    queries = [{"query": query.to_influxql(DIALECT), "source": "", "type": "influxql"} for query in panel.queries]
    y_axis = {"bounds": ["0", ""], "label": "", "prefix": "", "base": "10", "scale": "linear"}
    return {
        "i": number,
        "x": x,
        "y": y,
        "w": _WIDTH,
        "h": _HEIGHT,
        "name": panel.title,
        "type": _TYPES[panel.style],
        "queries": queries,
        "axes": {"y": {**y_axis, "suffix": _SUFFIXES.get(panel.unit, "")}},
        "colors": [],
        "legend": {"type": "static", "orientation": "bottom"},
        "note": panel.note,
        "noteVisibility": "default",
    }
