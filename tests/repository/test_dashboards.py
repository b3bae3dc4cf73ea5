"""The dashboards of deploy/: written by the project, of one table, and of nothing that the schema does not have."""

from __future__ import annotations

import pytest

from deploy.dashboards.panels import SECTIONS
from deploy.dashboards.write import dashboard_files
from monitor.points.schema import MEASUREMENTS
from tests.support.environment.checkout import ROOT
from tests.support.monitor.dashboards import chronograf_queries, grafana_queries, referenced_columns

PANELS = [panel for panels in SECTIONS.values() for panel in panels]
QUERIES = [
    pytest.param(query, id=f"{program}-{title}-{number}")
    for program, panels in {"chronograf": chronograf_queries(), "grafana": grafana_queries()}.items()
    for title, queries in panels.items()
    for number, query in enumerate(queries)
]


@pytest.mark.parametrize("place", list(dashboard_files()))
def test_each_file_is_what_the_project_writes(place: str) -> None:
    hint = "write them again: python -m deploy.dashboards.write deploy"
    assert (ROOT / "deploy" / place).read_text() == dashboard_files()[place], hint


def test_both_dashboards_have_every_panel_once_and_ask_the_same_of_it() -> None:
    titles = [panel.title for panel in PANELS]
    assert len(titles) == len(set(titles))
    assert list(chronograf_queries()) == list(grafana_queries()) == titles
    for title, queries in chronograf_queries().items():
        assert [referenced_columns(query) for query in queries] == [
            referenced_columns(query) for query in grafana_queries()[title]
        ]


@pytest.mark.parametrize("query", QUERIES)
def test_every_query_asks_one_measurement_for_fields_and_tags_that_it_has(query: str) -> None:
    [(name, used)] = referenced_columns(query)
    measurement = MEASUREMENTS[name]
    fields = {field.name for field in measurement.fields}
    assert used <= fields | set(measurement.tags), used
    assert used & fields
    assert "run" in used, "whatever was picked, all runs would be shown"
