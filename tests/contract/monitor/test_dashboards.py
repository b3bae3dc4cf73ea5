"""The dashboards of deploy/ with a real InfluxDB: each query of each panel has the right answer."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from deploy.dashboards import chronograf, grafana
from monitor.points.points import FieldValue, TelemetryPoint
from monitor.points.schema import MEASUREMENTS
from monitor.stores.influx.http import LineEncoder
from tests.support.monitor.dashboards import (
    chronograf_queries,
    fill_chronograf_variables,
    fill_grafana_variables,
    grafana_queries,
)
from tests.support.monitor.influx_servers import BUCKET, InfluxServer, start_servers

BEGIN_S, SECONDS, EVERY_S = 1_700_000_000, 40, 10
STAGES = ("head", "tail")
Series = dict[str, Any]


def point(measurement: str, at_s: float, tags: dict[str, str], /, **fields: FieldValue) -> TelemetryPoint:
    """Other fields are 1 or "x", so that a panel which reads the wrong field shows a wrong value."""
    known = {field.name: "x" if field.type == "text" else 1 for field in MEASUREMENTS[measurement].fields}
    all_tags = {"node": "box", "site": "local", "pipeline": "street", **tags}
    return TelemetryPoint(measurement, round(at_s * 1e9), all_tags, {**known, **fields})


def second(run: str, number: int, scale: int) -> Iterator[TelemetryPoint]:
    """The points of one second of a run: four requests through two stages, and one of each other measurement."""
    at_s = BEGIN_S + number + 0.25
    own = {"run": run, "source": "camera"}
    for quarter in range(4):
        moment_s = at_s + quarter / 8
        yield point("request", moment_s, own, latency_ms=100.0 * scale, network_ms=13.0 * scale, error="")
        for stage in STAGES:
            tags = {**own, "stage": stage, "worker": f"{stage}-1"}
            times = {"queue_ms": 2.0, "decode_ms": 3.0, "compute_ms": 30.0, "encode_ms": 5.0}
            spent = {name: value * scale for name, value in times.items()}
            yield point("hop", moment_s, tags, **spent)
            yield point("task", moment_s, tags, **spent)
    for stage in STAGES:
        for worker in (1, 2):
            load = {"queue": 3, "busy": 0.5, "failed": number, "rejected": 2 * number, "expired": 0, "malformed": 7}
            yield point("stage", at_s, {"run": run, "stage": stage, "worker": f"{stage}-{worker}"}, **load)
    yield point("source", at_s, own, retries=5 + 3 * number, dropped=number * scale, failed=0)
    yield point("step", at_s, own, rows=64, loss=2.5 * scale, accuracy=0.75, step_ms=250.0)
    yield point(
        "link", at_s, {"run": run, "from": "device", "to": "cloud"}, bytes_out=5000 * number, bytes_in=9 * number
    )
    yield point("energy", at_s, {"run": run}, energy_j=14.0 * scale, samples=4)
    yield point("energy", at_s, {"run": run, "node": "other"}, energy_j=6.0, samples=0)
    yield point("gpu", at_s, {"run": run, "gpu": "0", "model": "some"}, use=0.5, power_w=10.0 * scale)
    yield point("power", at_s, {"run": run, "rail": "package-0"}, power_w=4.0)
    yield point("interface", at_s, {"run": run, "interface": "eth0"}, sent_bytes_per_s=2e6)
    yield point("process", at_s, {"run": run, "role": "stage", "name": "head"}, cpu=1.5)
    yield point("node", at_s, {"run": run}, cpu=0.25)
    yield point("monitor", at_s, {"run": run}, waiting_points=12, dropped_points=number)
    yield point("dropped_events", at_s, {"run": run}, count=8)


@pytest.fixture(scope="module", name="database")
def _database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InfluxServer]:
    """Has two runs at the same time, so that a query which mixes them has a wrong answer."""
    server = InfluxServer(tmp_path_factory.mktemp("influx"))
    with start_servers(server):
        points = [
            each for run, scale in (("r1", 1), ("r2", 100)) for s in range(SECONDS) for each in second(run, s, scale)
        ]
        body = "\n".join(LineEncoder().encode(points)).encode()
        with urllib.request.urlopen(f"{server.url}/write?db={BUCKET}", data=body, timeout=30):
            yield server


def panel_series(database: InfluxServer, queries: list[str], fill_variables: Any) -> list[Series]:
    """The series that a panel shows of the first run."""
    # A millisecond less: Grafana's time range includes its end.
    begin_ms, end_ms = BEGIN_S * 1000, (BEGIN_S + SECONDS) * 1000 - 1
    series = []
    for query in queries:
        series += database.query(fill_variables(query, "r1", begin_ms, end_ms, EVERY_S))
    return series


def panel_values(database: InfluxServer, title: str, column: str, **tags: str) -> list[float]:
    """The values of one line of a panel, which are equal in both dashboards."""
    both = []
    for panels, fill_variables in (
        (chronograf_queries(), fill_chronograf_variables),
        (grafana_queries(), fill_grafana_variables),
    ):
        for series in panel_series(database, panels[title], fill_variables):
            if column in series["columns"] and tags.items() <= series.get("tags", {}).items():
                place = series["columns"].index(column)
                both.append([row[place] for row in series["values"] if row[place] is not None])
    first, second_one = both
    assert first == second_one
    return first


@pytest.mark.parametrize("title", list(chronograf_queries()))
def test_panel_has_values_equal_in_both_dashboards(database: InfluxServer, title: str) -> None:
    series_of_panel = panel_series(database, chronograf_queries()[title], fill_chronograf_variables)
    assert series_of_panel == panel_series(database, grafana_queries()[title], fill_grafana_variables)
    for series in series_of_panel:
        for place, column in enumerate(series["columns"]):
            assert any(row[place] is not None for row in series["values"]), f"{column} has no value"
    queries = chronograf_queries()[title]
    assert len({series["name"] for series in series_of_panel}) >= len(queries), "a query without an answer"


@pytest.mark.parametrize(
    ("title", "column", "tags", "value"),
    [
        ("Requests", "requests", {"source": "camera"}, 4.0),
        ("Request latency", "p99", {}, 100.0),
        ("Time by stage", "network", {}, 13.0),
        ("Time by stage", "queue", {}, 2 * 2.0),
        ("Time by stage", "compute", {}, 2 * 30.0),
        ("Tasks by stage", "tasks", {"stage": "tail"}, 4.0),
        ("Task latency by stage", "p95", {"stage": "head"}, 2.0 + 3.0 + 30.0 + 5.0),
        ("Worker utilisation", "busy", {"worker": "head-2"}, 50.0),
        ("Queue length", "tasks", {"stage": "tail"}, 2 * 3.0),
        ("Queueing time", "wait", {"stage": "tail"}, 2.0),
        ("Retries and drops", "retries", {}, 3 * EVERY_S),
        ("Retries and drops", "failed", {}, 0),
        ("Worker errors", "rejected", {"stage": "head"}, 2 * 2 * EVERY_S),
        ("Traffic between sites", "out", {"from": "device", "to": "cloud"}, 5000.0),
        ("Telemetry", "lost", {}, EVERY_S),
        ("Telemetry", "dropped_events", {}, 8 * EVERY_S),
        ("CPU", "cpu", {"node": "box"}, 25.0),
        ("Network", "sent", {"interface": "eth0"}, 2e6),
        ("CPU by process", "cpu", {"name": "head"}, 1.5),
        ("GPU use", "use", {"gpu": "0"}, 50.0),
        ("Power", "power", {"rail": "package-0"}, 4.0),
        ("Power", "power", {"gpu": "0"}, 10.0),
        ("Energy per sample", "energy", {}, (14.0 + 6.0) / 4),
        ("Loss", "loss", {}, 2.5),
        ("Accuracy", "accuracy", {}, 75.0),
        ("Rows trained", "rows", {}, 64.0),
    ],
)
def test_panel_shows_written_values(
    database: InfluxServer, title: str, column: str, tags: dict[str, str], value: float
) -> None:
    values = panel_values(database, title, column, **tags)
    assert len(values) >= SECONDS // EVERY_S - 1  # a difference has no first value
    assert values == pytest.approx([value] * len(values))


@pytest.mark.parametrize("query", [chronograf.RUN_NAMES_QUERY, grafana.RUN_NAMES_QUERY])
def test_all_runs_can_be_selected(database: InfluxServer, query: str) -> None:
    runs = {value for series in database.query(query) for _, value in series["values"]}
    assert runs == {"r1", "r2"}
