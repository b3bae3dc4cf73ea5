"""The queries of the dashboards in deploy/, with the variables that Chronograf and Grafana replace."""

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
    value: dict[str, Any] = json.loads(text)
    return value


def chronograf_queries() -> dict[str, list[str]]:
    """The queries of each cell."""
    cells = _json(CHRONOGRAF_FILE.read_text())["cells"]
    return {cell["name"]: [query["query"] for query in cell["queries"]] for cell in cells}


def grafana_queries() -> dict[str, list[str]]:
    """The queries of each panel, without the headings."""
    panels = [panel for panel in _json(GRAFANA_FILE.read_text())["panels"] if panel["type"] != "row"]
    return {panel["title"]: [target["query"] for target in panel["targets"]] for panel in panels}


def fill_chronograf_variables(query: str, run: str, from_ms: int, to_ms: int, every_s: int) -> str:
    """Replace the variables as Chronograf does for a selected range of time."""
    begin, end = (f"'{datetime.fromtimestamp(each / 1000, UTC):%Y-%m-%dT%H:%M:%S.%fZ}'" for each in (from_ms, to_ms))
    filled = query.replace(":dashboardTime:", begin).replace(":upperDashboardTime:", end)
    return filled.replace(":interval:", f"{every_s * 1000}ms").replace(":run:", run)


def fill_grafana_variables(query: str, run: str, from_ms: int, to_ms: int, every_s: int) -> str:
    """Replace the variables as Grafana does for a selected range of time."""
    filled = query.replace("$timeFilter", f"time >= {from_ms}ms and time <= {to_ms}ms")
    return filled.replace("$__interval", f"{every_s}s").replace("$run", run)


def referenced_columns(query: str) -> list[tuple[str, set[str]]]:
    """Each measurement that a query or its subqueries select from, with the tags and fields that are named there."""
    references = []
    for match in _FROM.finditer(query):
        columns = query[query.rindex("SELECT", 0, match.start()) : match.start()]
        text = re.sub(r' AS "\w+"', "", columns) + _to_closing_bracket(query[match.end() :])
        references.append((match[1], set(re.findall(r'"(\w+)"', text))))
    return references


def _to_closing_bracket(text: str) -> str:
    """The text up to the bracket that closes the query."""
    depth = 0
    for place, character in enumerate(text):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth < 0:
            return text[:place]
    return text
