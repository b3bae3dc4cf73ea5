"""The dashboard files of deploy/ are up to date, alike, and query only fields and tags of the schema."""

from __future__ import annotations

import pytest

from deploy.dashboards.panels import SECTIONS
from deploy.dashboards.write import dashboard_files
from monitor.points.schema import MEASUREMENTS
from tests.support.environment.checkout import ROOT
from tests.support.monitor.dashboards import chronograf_queries, grafana_queries, referenced_columns

QUERIES = [
    pytest.param(query, id=f"{program}-{title}-{index}")
    for program, panels in {"chronograf": chronograf_queries(), "grafana": grafana_queries()}.items()
    for title, queries in panels.items()
    for index, query in enumerate(queries)
]


@pytest.mark.parametrize("name", list(dashboard_files()))
def test_file_is_up_to_date(name: str) -> None:
    hint = "write it again: python -m deploy.dashboards.write deploy"
    assert (ROOT / "deploy" / name).read_text() == dashboard_files()[name], hint


def test_both_dashboards_have_the_same_panels_and_columns() -> None:
    titles = [panel.title for panels in SECTIONS.values() for panel in panels]
    assert len(titles) == len(set(titles))
    assert list(chronograf_queries()) == list(grafana_queries()) == titles
    for title, queries in chronograf_queries().items():
        columns = [referenced_columns(query) for query in queries]
        assert columns == [referenced_columns(query) for query in grafana_queries()[title]]


@pytest.mark.parametrize("query", QUERIES)
def test_query_is_of_one_run_and_known_columns(query: str) -> None:
    [(name, columns)] = referenced_columns(query)
    measurement = MEASUREMENTS[name]
    fields = {field.name for field in measurement.fields}
    assert columns <= fields | set(measurement.tags)
    assert columns & fields
    assert "run" in columns
