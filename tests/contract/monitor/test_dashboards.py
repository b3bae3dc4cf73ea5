"""The dashboards of deploy/ before a real InfluxDB: every panel has lines, and they say what was written."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from deploy.dashboards.chronograf import RUN_NAMES_QUERY as CHRONOGRAFS_RUNS
from deploy.dashboards.grafana import RUN_NAMES_QUERY as GRAFANAS_RUNS
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
    """All fields that are not given are 1, or "x": a panel that asks for another field than it should shows."""
    known = {field.name: "x" if field.type == "text" else 1 for field in MEASUREMENTS[measurement].fields}
    here = {"node": "box", "site": "local", "pipeline": "street", **tags}
    return TelemetryPoint(measurement, round(at_s * 1e9), here, {**known, **fields})


def second(run: str, number: int, scale: int) -> Iterator[TelemetryPoint]:
    """What one second of a run leaves: four requests, over two stages, and everything else once."""
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
            load = {"queue": 3, "busy": 0.5, "failed": number, "rejected": 2 * number, "expired": 0, "refused": 7}
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
    """With two runs at the same time, so that whatever shows both is found out."""
    found = InfluxServer(tmp_path_factory.mktemp("influx"))
    with start_servers(found):
        points = [
            each for run, scale in (("r1", 1), ("r2", 100)) for s in range(SECONDS) for each in second(run, s, scale)
        ]
        body = "\n".join(LineEncoder().encode(points)).encode()
        with urllib.request.urlopen(f"{found.url}/write?db={BUCKET}", data=body, timeout=30):
            yield found


def lines(database: InfluxServer, queries: list[str], fills_in: Any) -> list[Series]:
    """What a panel shows of the first run."""
    # A millisecond less: Grafana's span has its end in it.
    begin_ms, end_ms = BEGIN_S * 1000, (BEGIN_S + SECONDS) * 1000 - 1
    found = []
    for query in queries:
        found += database.query(fills_in(query, "r1", begin_ms, end_ms, EVERY_S))
    return found


def shown(database: InfluxServer, title: str, column: str, **tags: str) -> list[float]:
    """Every point that a line of a panel goes through, in both dashboards."""
    both = []
    for panels, fills_in in (
        (chronograf_queries(), fill_chronograf_variables),
        (grafana_queries(), fill_grafana_variables),
    ):
        for series in lines(database, panels[title], fills_in):
            if column in series["columns"] and tags.items() <= series.get("tags", {}).items():
                place = series["columns"].index(column)
                both.append([row[place] for row in series["values"] if row[place] is not None])
    first, second_one = both
    assert first == second_one
    return first


@pytest.mark.parametrize("title", list(chronograf_queries()))
def test_each_panel_has_lines_and_both_dashboards_have_the_same(database: InfluxServer, title: str) -> None:
    ours = lines(database, chronograf_queries()[title], fill_chronograf_variables)
    assert ours == lines(database, grafana_queries()[title], fill_grafana_variables)
    for series in ours:
        for place, column in enumerate(series["columns"]):
            assert any(row[place] is not None for row in series["values"]), f"{column} has no value"
    asked = chronograf_queries()[title]
    assert len({series["name"] for series in ours}) >= len(asked), "a query without an answer"


@pytest.mark.parametrize(
    ("title", "column", "tags", "value"),
    [
        ("Requests done", "requests", {"source": "camera"}, 4.0),
        ("Latency of requests", "p99", {}, 100.0),
        ("Where the time goes", "network", {}, 13.0),
        ("Where the time goes", "queue", {}, 2 * 2.0),
        ("Where the time goes", "compute", {}, 2 * 30.0),
        ("Tasks done by stage", "tasks", {"stage": "tail"}, 4.0),
        ("Latency by stage", "p95", {"stage": "head"}, 2.0 + 3.0 + 30.0 + 5.0),
        ("Workers busy", "busy", {"worker": "head-2"}, 50.0),
        ("Tasks that wait", "waiting", {"stage": "tail"}, 2 * 3.0),
        ("Wait in the queue", "wait", {"stage": "tail"}, 2.0),
        ("Retries and drops", "retries", {}, 3 * EVERY_S),
        ("Retries and drops", "failed", {}, 0),
        ("Troubles of workers", "rejected", {"stage": "head"}, 2 * 2 * EVERY_S),
        ("Between sites", "out", {"from": "device", "to": "cloud"}, 5000.0),
        ("Telemetry itself", "lost", {}, EVERY_S),
        ("Telemetry itself", "unheard", {}, 8 * EVERY_S),
        ("CPU", "cpu", {"node": "box"}, 25.0),
        ("Network", "sent", {"interface": "eth0"}, 2e6),
        ("CPU of our processes", "cpu", {"name": "head"}, 1.5),
        ("GPU use", "use", {"gpu": "0"}, 50.0),
        ("Power", "power", {"rail": "package-0"}, 4.0),
        ("Power", "power", {"gpu": "0"}, 10.0),
        ("Energy per sample", "energy", {}, (14.0 + 6.0) / 4),
        ("Loss", "loss", {}, 2.5),
        ("Accuracy", "accuracy", {}, 75.0),
        ("Rows trained", "rows", {}, 64.0),
    ],
)
def test_a_panel_shows_what_was_written(
    database: InfluxServer, title: str, column: str, tags: dict[str, str], value: float
) -> None:
    found = shown(database, title, column, **tags)
    # The first of what is a difference is one of nothing.
    assert len(found) >= SECONDS // EVERY_S - 1
    assert found == pytest.approx([value] * len(found))


@pytest.mark.parametrize("query", [CHRONOGRAFS_RUNS, GRAFANAS_RUNS])
def test_the_runs_to_pick_from_are_all_there_are(database: InfluxServer, query: str) -> None:
    found = {value for series in database.query(query) for _, value in series["values"]}
    assert found == {"r1", "r2"}
