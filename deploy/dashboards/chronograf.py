"""A dashboard as Chronograf reads it from a file: JSON of its own, cells on a grid of twelve columns. Pure."""

from __future__ import annotations

from typing import Any

from deploy.dashboards.panels import SECTIONS, Dialect, Panel, PanelStyle, PanelUnit

# The condition is that of Chronograf's own queries. It has no database of its own to ask, so each query names one.
DIALECT = Dialect('"sparse"..', "time > :dashboardTime: AND time < :upperDashboardTime:", ":interval:", "':run:'")
RUN_NAMES_QUERY = 'SHOW TAG VALUES ON "sparse" WITH KEY = "run"'
_ID = 7777  # far from 1, 2, ...: a file whose number one of Chronograf's own dashboards has is passed over
_ACROSS, _WIDTH, _HEIGHT = 3, 4, 4
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
    """The whole file."""
    cells: list[dict[str, Any]] = []
    top = 0
    for panels in SECTIONS.values():
        for number, panel in enumerate(panels):
            row, column = divmod(number, _ACROSS)
            cells.append(_cell(panel, str(len(cells) + 1), column * _WIDTH, top + row * _HEIGHT))
        top = cells[-1]["y"] + _HEIGHT
    return {"id": _ID, "organization": "default", "name": "Sparse", "cells": cells, "templates": [_run()]}


def _run() -> dict[str, Any]:
    return {
        "id": "run",
        "tempVar": ":run:",
        "type": "influxql",
        "label": "the run to look at",
        "sourceID": "dynamic",
        "query": {"influxql": RUN_NAMES_QUERY},
        "values": [],
    }


def _cell(panel: Panel, number: str, x: int, y: int) -> dict[str, Any]:
    # An empty source is the one that is looked at; base 10 writes 3400 as 3.4K.
    queries = [{"query": query.text(DIALECT), "source": "", "type": "influxql"} for query in panel.queries]
    y_axis = {"bounds": ["0", ""], "label": "", "prefix": "", "base": "10", "scale": "linear"}
    return {
        "i": number,
        "x": x,
        "y": y,
        "w": _WIDTH,
        "h": _HEIGHT,
        "name": panel.title,
        "type": _TYPES[panel.kind],
        "queries": queries,
        "axes": {"y": {**y_axis, "suffix": _SUFFIXES.get(panel.unit, "")}},
        "colors": [],
        "legend": {"type": "static", "orientation": "bottom"},
        "note": panel.note,
        "noteVisibility": "default",
    }
