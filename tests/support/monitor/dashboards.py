"""The dashboards of deploy/ as data: each query of each panel, with everything filled in that a program fills in."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from typing import Any

from tests.support.environment.checkout import ROOT

CHRONOGRAF_FILE = ROOT / "deploy/chronograf/sparse.dashboard"
GRAFANA_FILE = ROOT / "deploy/grafana/dashboards/sparse.json"
_FROM = re.compile(r'FROM (?:"sparse"\.\.)?"(\w+)"')


def _json(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text)
    return found


def chronograf_queries() -> dict[str, list[str]]:
    """The queries of each cell, as the file has them."""
    cells = _json(CHRONOGRAF_FILE.read_text())["cells"]
    return {cell["name"]: [query["query"] for query in cell["queries"]] for cell in cells}


def grafana_queries() -> dict[str, list[str]]:
    """The queries of each panel that is no headline."""
    panels = [panel for panel in _json(GRAFANA_FILE.read_text())["panels"] if panel["type"] != "row"]
    return {panel["title"]: [target["query"] for target in panel["targets"]] for panel in panels}


def fill_chronograf_variables(query: str, run: str, from_ms: int, to_ms: int, every_s: int) -> str:
    """As Chronograf does, when a span of time was drawn with the mouse."""
    begin, end = (f"'{datetime.fromtimestamp(each / 1000, UTC):%Y-%m-%dT%H:%M:%S.%fZ}'" for each in (from_ms, to_ms))
    filled = query.replace(":dashboardTime:", begin).replace(":upperDashboardTime:", end)
    return filled.replace(":interval:", f"{every_s * 1000}ms").replace(":run:", run)


def fill_grafana_variables(query: str, run: str, from_ms: int, to_ms: int, every_s: int) -> str:
    """As Grafana does with a span of time."""
    filled = query.replace("$timeFilter", f"time >= {from_ms}ms and time <= {to_ms}ms")
    return filled.replace("$__interval", f"{every_s}s").replace("$run", run)


def referenced_columns(query: str) -> list[tuple[str, set[str]]]:
    """Which measurement a query asks, itself or a query within it, and each tag and field that is named there."""
    found = []
    for match in _FROM.finditer(query):
        columns = query[query.rindex("SELECT", 0, match.start()) : match.start()]
        named = re.sub(r' AS "\w+"', "", columns) + _to_the_end(query[match.end() :])
        found.append((match[1], set(re.findall(r'"(\w+)"', named))))
    return found


def _to_the_end(text: str) -> str:
    """As far as the bracket that was opened before."""
    depth = 0
    for place, character in enumerate(text):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth < 0:
            return text[:place]
    return text
