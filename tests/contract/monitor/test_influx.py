"""Points on their way to real servers that stop, return, or refuse them."""

from __future__ import annotations

import logging
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from monitor.errors import BadStore
from monitor.points.points import TelemetryPoint
from monitor.stores.influx import http
from monitor.stores.influx import store as influx_store
from monitor.stores.influx.config import InfluxTarget
from monitor.stores.influx.spool import SPOOL_LIMIT_BYTES
from monitor.stores.influx.store import InfluxStore
from tests.support.brokers.ports import free_port
from tests.support.environment.full_disk import full_disk
from tests.support.monitor.influx_servers import (
    BUCKET,
    InfluxServer,
    VictoriaMetricsServer,
    start_influx,
    start_victoria_metrics,
)
from tests.support.pipelines.processes import eventually, process_sandbox

NOW_NS = time.time_ns() - 60_000_000_000  # VictoriaMetrics does not return points of the future


@pytest.fixture(autouse=True)
def _short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"INITIAL_BACKOFF_S": 0.02, "MAX_BACKOFF_S": 0.1, "MISCONFIGURED_RETRY_S": 0.1}.items():
        monkeypatch.setattr(influx_store, name, seconds)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InfluxServer]:
    with start_influx(tmp_path_factory.mktemp("influx")) as running:
        yield running


@pytest.fixture
def server(database: InfluxServer) -> InfluxServer:
    """A server with an empty bucket."""
    database.query(f'DROP DATABASE "{BUCKET}"')
    database.query(f'CREATE DATABASE "{BUCKET}"')
    return database


@contextmanager
def open_store(target: InfluxTarget, folder: Path, limit_bytes: int = SPOOL_LIMIT_BYTES) -> Iterator[InfluxStore]:
    store = InfluxStore(target, folder / "spool", limit_bytes=limit_bytes)
    try:
        yield store
    finally:
        store.close()
        eventually("the sender thread to end", lambda: not store._thread.is_alive())


def unreachable_target() -> InfluxTarget:
    return InfluxTarget(f"http://127.0.0.1:{free_port()}")


def make_points(first: int, count: int) -> list[TelemetryPoint]:
    """Numbered points, a millisecond apart, which is VictoriaMetrics' resolution."""
    return [
        TelemetryPoint(
            "batch", NOW_NS + 1_000_000 * number, {"worker": f"w{number % 3}"}, {"tasks": number, "busy_ms": 0.5}
        )
        for number in range(first, first + count)
    ]


def stored_numbers(server: InfluxServer | VictoriaMetricsServer) -> list[int]:
    """The numbers of the points in the server, each as often as it is there."""
    if isinstance(server, VictoriaMetricsServer):
        return sorted(int(value) for _, _, value in server.export_samples("batch_tasks"))
    series = server.query('SELECT "tasks" FROM "batch"')
    return sorted(row[1] for row in series[0]["values"]) if series else []


def wait_until_accepted(store: InfluxStore) -> None:
    eventually("all points to be accepted", lambda: not store.waiting)


def record_attempts(store: InfluxStore) -> list[int]:
    """The sizes of the requests from now on."""
    sizes: list[int] = []
    write = store._client.write

    def recording_write(body: bytes) -> None:
        sizes.append(len(body))
        write(body)

    store._client.write = recording_write  # type: ignore[method-assign, assignment]
    return sizes


# A server that is up --------------------------------------------------------------------------------------------------


def test_points_are_sent_and_spool_is_emptied(server: InfluxServer, tmp_path: Path) -> None:
    with open_store(server.target, tmp_path) as store:
        store.check()
        store.write(make_points(0, 12_345))
        store.write([])
        wait_until_accepted(store)
        assert stored_numbers(server) == list(range(12_345))
        assert store.dropped == 0
        assert [path.name for path in (tmp_path / "spool").iterdir()] == ["lock"]


def test_close_sends_the_last_points(server: InfluxServer, tmp_path: Path) -> None:
    store = InfluxStore(server.target, tmp_path / "spool")
    store.write(make_points(0, 10))
    store.close()
    store.close()
    assert (store.waiting, stored_numbers(server)) == (0, list(range(10)))
    with pytest.raises(BadStore, match="the store is closed"):
        store.write(make_points(0, 1))


def test_point_without_values_is_left_out(server: InfluxServer, tmp_path: Path) -> None:
    empty = [TelemetryPoint("batch", NOW_NS, {}, {"tasks": None}), TelemetryPoint("batch", NOW_NS)]
    with open_store(server.target, tmp_path) as store:
        store.write([*empty, *make_points(0, 2)])
        wait_until_accepted(store)
        assert (stored_numbers(server), store.dropped) == ([0, 1], 0)


# A server that is down ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["influx", "victoria"])
def test_outage_loses_and_duplicates_nothing(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    if kind == "influx":
        _check_outage(request.getfixturevalue("server"), signal.SIGKILL, tmp_path, caplog)
    else:  # it loses the latest points when it is killed
        with start_victoria_metrics(tmp_path / "victoria") as server:
            _check_outage(server, signal.SIGTERM, tmp_path, caplog)


def _check_outage(
    server: InfluxServer | VictoriaMetricsServer, end: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with open_store(server.target, tmp_path) as store, caplog.at_level(logging.INFO):
        store.write(make_points(0, 100))
        wait_until_accepted(store)
        server.stop(end)
        for number in range(100, 6_100, 100):  # several batches, in many writes
            store.write(make_points(number, 100))
        eventually("the outage to be logged", lambda: "points wait in" in caplog.text)
        attempts = record_attempts(store)
        eventually("more attempts", lambda: len(attempts) > 3)
        store.write(make_points(6_100, 100))
        assert store.waiting == 6_100
        server.start()
        wait_until_accepted(store)
        assert store.dropped == 0
    assert stored_numbers(server) == list(range(6_200))
    assert caplog.text.count("points wait in") <= 3  # unreachable, and two problems while it starts: not each attempt
    eventually("its return to be logged", lambda: "points are accepted again" in caplog.text)


def test_long_outage_drops_oldest_points_and_counts_them(server: InfluxServer, tmp_path: Path) -> None:
    with open_store(server.target, tmp_path, limit_bytes=10 * 4096) as store:
        spool = store._spool
        server.stop(signal.SIGKILL)
        for number in range(0, 3_000, 100):
            store.write(make_points(number, 100))
            assert spool.point_count + spool.dropped == number + 100
        dropped = store.dropped
        assert dropped > 0
        assert store.waiting == 3_000 - dropped
        server.start()
        wait_until_accepted(store)
        assert store.dropped == dropped
    assert len(stored_numbers(server)) == 3_000 - dropped
    # The batch that was being sent when the spool became full is kept too: the server may have had it.
    assert stored_numbers(server)[100:] == list(range(dropped + 100, 3_000))


def test_next_monitor_sends_what_a_killed_one_left(server: InfluxServer, tmp_path: Path) -> None:
    folder = tmp_path / "spool"
    script = f"""
import sys, time
from pathlib import Path
from monitor.points.points import TelemetryPoint
from monitor.stores.influx.config import InfluxTarget
from monitor.stores.influx.store import InfluxStore
folder = Path(sys.argv[1])
store = InfluxStore(InfluxTarget("{unreachable_target().url}"), folder)
store.write([TelemetryPoint("batch", {NOW_NS} + number, {{}}, {{"tasks": number}}) for number in range(7000)])
print("spooled", flush=True)
time.sleep(1000)
"""
    with process_sandbox(tmp_path) as sandbox:
        monitor = sandbox.start(sys.executable, "-c", script, folder)
        eventually("its points to be on disk", lambda: "spooled" in monitor.read_stdout())
        monitor.wait(signal.SIGKILL)
    with open_store(server.target, tmp_path) as store:
        wait_until_accepted(store)
        assert (stored_numbers(server), store.dropped) == (list(range(7000)), 0)


def test_damaged_file_is_counted_and_others_are_sent(
    server: InfluxServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with open_store(unreachable_target(), tmp_path) as store:
        store.write(make_points(0, 12_000))
    damaged, *_ = sorted((tmp_path / "spool").glob("*.gz"))
    damaged.write_bytes(damaged.read_bytes()[:-5])
    with open_store(server.target, tmp_path) as store:
        wait_until_accepted(store)
        assert store.dropped == 5_000
    assert stored_numbers(server) == list(range(5_000, 12_000))
    assert "lost 5000 points" in caplog.text


def test_write_does_not_wait_for_a_server_that_never_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "READ_TIMEOUT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        target = InfluxTarget(f"http://127.0.0.1:{silent.getsockname()[1]}")
        store = InfluxStore(target, tmp_path / "spool")
        store.write(make_points(0, 5_000))
        connection, _ = silent.accept()  # its thread waits for an answer from now on
        for number in range(5_000, 25_000, 5_000):
            store.write(make_points(number, 5_000))
        assert (store.waiting, store._thread.is_alive()) == (25_000, True)
        store.check()  # not a mistake of the user
        connection.close()
        store.close()
        eventually("the sender thread to end", lambda: not store._thread.is_alive())
        assert (store.waiting, store.dropped) == (25_000, 0)


# A server that refuses ------------------------------------------------------------------------------------------------


def test_check_names_the_misconfiguration(server: InfluxServer, tmp_path: Path) -> None:
    correct = server.target
    for target, problem in [
        (replace(correct, token="wrong"), "the token is not accepted (401)"),
        (replace(correct, token=""), "a token is required (401): set SPARSE_INFLUX_TOKEN_FILE"),
        (replace(correct, bucket="nope"), 'database not found: "nope" (404)'),
        (replace(correct, url=server.url), "not an InfluxDB 1.8 or later: 404 page not found (404)"),
    ]:
        with open_store(target, tmp_path) as store, pytest.raises(BadStore) as caught:
            store.check()
        assert str(caught.value) == f"telemetry in {target}: {problem}"
    with open_store(unreachable_target(), tmp_path) as store:
        store.check()


def test_wrong_token_loses_nothing_and_is_logged_once(
    server: InfluxServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with open_store(replace(server.target, token="new-token"), tmp_path) as store:
        store.write(make_points(0, 50))
        eventually("the log", lambda: "the token is not accepted (401); points wait in" in caplog.text)
        store.write(make_points(50, 50))
        attempts = record_attempts(store)
        eventually("more attempts", lambda: len(attempts) > 3)
        server.proxy.stop()
        server.proxy.token = "new-token"
        server.proxy.start()
        try:
            wait_until_accepted(store)
        finally:
            server.proxy.stop()
            server.proxy.token = server.target.token
            server.proxy.start()
    assert (stored_numbers(server), store.dropped) == (list(range(100)), 0)
    assert caplog.text.count("the token is not accepted") == 1
    assert "new-token" not in caplog.text


def test_missing_bucket_loses_nothing(server: InfluxServer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with open_store(replace(server.target, bucket="later"), tmp_path) as store:
        store.write(make_points(0, 50))
        eventually("the log", lambda: 'database not found: "later" (404); points wait' in caplog.text)
        server.query('CREATE DATABASE "later"')
        wait_until_accepted(store)
    assert server.query('SELECT count("tasks") FROM "batch"', bucket="later")[0]["values"][0][1] == 50


def test_rejected_points_are_counted_and_others_are_stored(
    server: InfluxServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with open_store(server.target, tmp_path) as store:
        # Another program wrote text where numbers belong, and InfluxDB keeps a field's first type.
        store._encoder.encode = lambda points: [f'batch,worker=w0 tasks="x" {NOW_NS}']  # type: ignore[method-assign]
        store.write(make_points(0, 1))
        wait_until_accepted(store)
        del store._encoder.encode
        nodes = [TelemetryPoint("node", NOW_NS + number, {}, {"load": 1.0}) for number in range(5)]
        store.write([*make_points(0, 9), *nodes])
        wait_until_accepted(store)
        store.write(make_points(20, 3))
        wait_until_accepted(store)
        assert store.dropped == 9 + 3
    assert server.count_points("node", "load") == 5
    assert "the server rejects points: partial write: field type conflict" in caplog.text


def test_full_disk_loses_points_and_is_logged_once(
    server: InfluxServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with open_store(server.target, tmp_path) as store:
        with full_disk(10):
            store.write(make_points(0, 5_000))
            store.write(make_points(5_000, 5_000))
        store.write(make_points(10_000, 5_000))
        wait_until_accepted(store)
        assert store.dropped == 10_000
    assert stored_numbers(server) == list(range(10_000, 15_000))
    assert caplog.text.count("points are lost") == 1
