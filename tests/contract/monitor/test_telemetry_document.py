"""The examples of docs/telemetry.md: the programs send events, and the queries have answers."""

from __future__ import annotations

import re
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from brokers.telemetry.schema import ProcessStarted, TaskProcessed, TelemetryEvent, event_from_json
from monitor.points.points import TelemetryPoint
from monitor.points.schema import MEASUREMENTS
from monitor.stores.influx.store import InfluxStore
from monitor.stores.sqlite import SqliteStore
from tests.contract.monitor.test_stores import full_point
from tests.support.environment.external_programs import require_dependency
from tests.support.monitor.influx_servers import InfluxServer, start_influx
from tests.support.monitor.telemetry_document import code_blocks
from tests.support.pipelines.processes import eventually

INFLUXQL = [line for block in code_blocks("sql", "InfluxQL") for line in block.splitlines()]


def recent_points() -> list[TelemetryPoint]:
    """Ten points of each measurement, of the last 10 ms: queries in the document ask for the last 15 minutes."""
    now_ns = time.time_ns()
    return [
        TelemetryPoint(point.measurement, now_ns - 1_000_000 * number, point.tags, {**point.fields, "error": ""})
        for measurement in MEASUREMENTS.values()
        for number in range(1, 11)
        for point in [full_point(measurement, number)]
    ]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InfluxServer]:
    with start_influx(tmp_path_factory.mktemp("influx")) as running:
        store = InfluxStore(running.target, tmp_path_factory.mktemp("spool"))
        store.write(recent_points())
        eventually("all points to be accepted", lambda: not store.waiting)
        store.close()
        assert store.dropped == 0
        yield running


def sent_event(command: list[str], folder: Path) -> TelemetryEvent:
    """The event that a command sends to the monitor's socket."""
    path = folder / "monitor.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as monitor:
        monitor.bind(str(path))
        monitor.settimeout(30)
        subprocess.run(command, env={"SPARSE_MONITOR": str(path), "PATH": "/usr/bin:/bin"}, check=True, timeout=60)
        lines = monitor.recv(1 << 17).splitlines()
    assert len(lines) == 1
    return event_from_json(lines[0])


def test_python_example_sends_an_event(tmp_path: Path) -> None:
    [example] = code_blocks("python", "Sending an event")
    assert isinstance(sent_event([sys.executable, "-c", example], tmp_path), TaskProcessed)


def test_shell_example_sends_an_event(tmp_path: Path) -> None:
    require_dependency("socat")
    [example] = code_blocks("sh", "Sending an event")
    event = sent_event(["sh", "-c", example], tmp_path)
    assert isinstance(event, ProcessStarted)
    assert event.pid > 0


@pytest.mark.parametrize("query", code_blocks("sql", "SQLite"))
def test_sqlite_query_has_an_answer(query: str, tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "telemetry.sqlite")
    store.write(recent_points())
    with closing(sqlite3.connect(store.path)) as file:
        rows = file.execute(query).fetchall()
    store.close()
    assert rows
    assert all(value is not None for row in rows for value in row)


@pytest.mark.parametrize("query", INFLUXQL)
def test_influxql_query_has_an_answer(server: InfluxServer, query: str) -> None:
    answer = server.query(query)
    assert answer
    assert all(value is not None for series in answer for row in series["values"] for value in row)


def test_query_from_a_shell_has_an_answer(server: InfluxServer, tmp_path: Path) -> None:
    [example] = code_blocks("sh", "InfluxQL")
    token = tmp_path / "token"
    token.write_text(server.target.token + "\n")
    environment = {
        "SPARSE_INFLUX_URL": server.target.url,
        "SPARSE_INFLUX_TOKEN_FILE": str(token),
        "PATH": "/usr/bin:/bin",
    }
    require_dependency("curl")
    answer = subprocess.run(
        ["sh", "-c", example], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert re.search(r'"values":\[\[.*,10\]\]', answer.stdout)


def test_number_of_examples() -> None:
    assert len(code_blocks("sql", "SQLite")) == 4
    assert len(INFLUXQL) == 5
