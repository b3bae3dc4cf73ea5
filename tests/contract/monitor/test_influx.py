"""Points on their way to real servers that go away, come back, and are not what they should be."""

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
from monitor.stores.influx.config import InfluxTarget
from monitor.stores.influx.spool import SPOOL_LIMIT_BYTES
from monitor.stores.influx.store import InfluxStore, InfluxTimings
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

# A test waits for what happens, but not for half a minute.
QUICK = InfluxTimings(flush_interval_s=0.05, initial_backoff_s=0.05, max_backoff_s=0.2, misconfigured_retry_s=0.2)
NOW_NS = time.time_ns() - 60_000_000_000  # VictoriaMetrics shows nothing of the future


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InfluxServer]:
    with start_influx(tmp_path_factory.mktemp("influx")) as found:
        yield found


@pytest.fixture
def server(database: InfluxServer) -> InfluxServer:
    """An empty bucket."""
    database.query(f'DROP DATABASE "{BUCKET}"')
    database.query(f'CREATE DATABASE "{BUCKET}"')
    return database


@contextmanager
def open_store(target: InfluxTarget, folder: Path, limit_bytes: int = SPOOL_LIMIT_BYTES) -> Iterator[InfluxStore]:
    store = InfluxStore(target, folder / "spool", limit_bytes=limit_bytes, timings=QUICK)
    try:
        yield store
    finally:
        store.close()
        eventually("its thread to end", lambda: not store._thread.is_alive())


def batch(first: int, count: int) -> list[TelemetryPoint]:
    """Points that are told apart by their number; a millisecond apart, since VictoriaMetrics counts those."""
    return [
        TelemetryPoint(
            "batch", NOW_NS + 1_000_000 * number, {"worker": f"w{number % 3}"}, {"tasks": number, "busy_ms": 0.5}
        )
        for number in range(first, first + count)
    ]


def numbers(server: InfluxServer | VictoriaMetricsServer) -> list[int]:
    """The numbers of the points that are there, as often as they are."""
    if isinstance(server, VictoriaMetricsServer):
        return sorted(int(value) for _, _, value in server.export_samples("batch_tasks"))
    found = server.query('SELECT "tasks" FROM "batch"')
    return sorted(row[1] for row in found[0]["values"]) if found else []


def all_taken(store: InfluxStore) -> None:
    eventually("all points to be taken", lambda: not store.waiting)


def attempts(store: InfluxStore) -> list[int]:
    """The sizes of what it tries to send from now on."""
    found: list[int] = []
    write = store._http.write

    def counted(body: bytes) -> None:
        found.append(len(body))
        write(body)

    store._http.write = counted  # type: ignore[method-assign, assignment]
    return found


# A server that is there -----------------------------------------------------------------------------------------------


def test_points_are_there_soon_and_nothing_is_left_of_them_here(server: InfluxServer, tmp_path: Path) -> None:
    with open_store(server.target, tmp_path) as store:
        store.check()
        store.write(batch(0, 12_345))
        store.write([])
        all_taken(store)
        assert numbers(server) == list(range(12_345))
        assert store.dropped == 0
        assert [path.name for path in (tmp_path / "spool").iterdir()] == ["lock"]


def test_what_was_written_just_before_the_end_is_sent(server: InfluxServer, tmp_path: Path) -> None:
    store = InfluxStore(server.target, tmp_path / "spool")
    store.write(batch(0, 10))
    store.close()
    store.close()
    assert (store.waiting, numbers(server)) == (0, list(range(10)))
    with pytest.raises(BadStore, match="it is closed"):
        store.write(batch(0, 1))


def test_a_point_without_any_value_is_no_point(server: InfluxServer, tmp_path: Path) -> None:
    with open_store(server.target, tmp_path) as store:
        store.write(
            [TelemetryPoint("batch", NOW_NS, {}, {"tasks": None}), *batch(0, 2), TelemetryPoint("batch", NOW_NS)]
        )
        all_taken(store)
        assert (numbers(server), store.dropped) == ([0, 1], 0)


# A server that goes away ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["influx", "victoria"])
def test_an_outage_loses_nothing_and_doubles_nothing(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    if kind == "influx":
        found: InfluxServer | VictoriaMetricsServer = request.getfixturevalue("server")
        _outage(found, signal.SIGKILL, tmp_path, caplog)
    else:  # which forgets what it took last when it is killed, so it is told to end
        with start_victoria_metrics(tmp_path / "victoria") as found:
            _outage(found, signal.SIGTERM, tmp_path, caplog)


def _outage(
    server: InfluxServer | VictoriaMetricsServer, end: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with open_store(server.target, tmp_path) as store, caplog.at_level(logging.INFO):
        store.write(batch(0, 100))
        all_taken(store)
        server.stop(end)
        for number in range(100, 6_100, 100):  # a few batches, in many writes
            store.write(batch(number, 100))
        eventually("it to be missed", lambda: "points wait in" in caplog.text)
        tried = attempts(store)
        eventually("more attempts", lambda: len(tried) > 3)
        store.write(batch(6_100, 100))
        assert store.waiting == 6_100
        server.start()
        all_taken(store)
        assert store.dropped == 0
    assert numbers(server) == list(range(6_200))
    assert caplog.text.count("points wait in") <= 2  # refused, and while it started: not once for each attempt
    eventually("its return to be told", lambda: "it takes points again" in caplog.text)


def _in_files(store: InfluxStore) -> int:
    """How many points have come to the spool, those that it has dropped among them."""
    return store._spool.point_count + store._spool.dropped


def test_an_outage_that_is_too_long_costs_the_oldest_and_the_count_is_exact(
    server: InfluxServer, tmp_path: Path
) -> None:
    with open_store(server.target, tmp_path, limit_bytes=10 * 4096) as store:
        server.stop(signal.SIGKILL)
        for number in range(0, 3_000, 100):
            store.write(batch(number, 100))
            eventually("a file of its own", lambda: _in_files(store) == number + 100)  # noqa: B023  # asked at once
        lost = store.dropped
        assert lost > 0
        assert store.waiting == 3_000 - lost
        server.start()
        all_taken(store)
        assert store.dropped == lost
    assert len(numbers(server)) == 3_000 - lost
    # The one in hand when the room ran out is kept, too: it may have been with the server.
    assert numbers(server)[100:] == list(range(lost + 100, 3_000))


def test_what_a_killed_monitor_left_is_sent_by_the_next_one(server: InfluxServer, tmp_path: Path) -> None:
    script = f"""
import sys, time
from pathlib import Path
from monitor.stores.influx.store import InfluxStore, InfluxTimings
from monitor.stores.influx.config import InfluxTarget
from monitor.points.points import TelemetryPoint
store = InfluxStore(InfluxTarget("http://127.0.0.1:{free_port()}"), Path(sys.argv[1]), timings=InfluxTimings(flush_interval_s=0.05))
store.write([Point("batch", {NOW_NS} + number, {{}}, {{"tasks": number}}) for number in range(7000)])
while len(list(Path(sys.argv[1]).glob("*.gz"))) < 2: time.sleep(0.01)
print("kept", flush=True)
time.sleep(1000)
"""
    folder = tmp_path / "spool"
    with process_sandbox(tmp_path) as here:
        monitor = here.start(sys.executable, "-c", script, folder)
        eventually("its points to be on disk", lambda: "kept" in monitor.read_stdout())
        monitor.wait(signal.SIGKILL)
    with open_store(server.target, tmp_path) as store:
        all_taken(store)
        assert (numbers(server), store.dropped) == (list(range(7000)), 0)


def test_a_file_that_a_power_cut_broke_is_counted_and_the_others_are_sent(
    server: InfluxServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with open_store(InfluxTarget(f"http://127.0.0.1:{free_port()}"), tmp_path) as store:
        store.write(batch(0, 12_000))
    broken, *_ = sorted((tmp_path / "spool").glob("*.gz"))
    broken.write_bytes(broken.read_bytes()[:-5])
    with open_store(server.target, tmp_path) as store:
        all_taken(store)
        assert store.dropped == 5_000
    assert numbers(server) == list(range(5_000, 12_000))
    assert "lost 5000 points" in caplog.text


def test_a_server_that_never_answers_keeps_nobody_waiting(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        store = InfluxStore(
            InfluxTarget(f"http://127.0.0.1:{silent.getsockname()[1]}"), tmp_path / "spool", timings=QUICK
        )
        store.write(batch(0, 5_000))
        connection, _ = silent.accept()  # its thread waits for an answer now, and so it does below
        for number in range(5_000, 25_000, 5_000):
            store.write(batch(number, 5_000))
        assert (store.waiting, store._thread.is_alive()) == (25_000, True)
        store.check()  # no mistake of anybody
        connection.close()
        store.close()
        eventually("its thread to end", lambda: not store._thread.is_alive())
        assert (store.waiting, store.dropped) == (25_000, 0)


# What a person has to mend --------------------------------------------------------------------------------------------


def test_what_is_wrong_is_one_line_when_it_is_asked_for(server: InfluxServer, tmp_path: Path) -> None:
    right = server.target
    for target, problem in [
        (replace(right, token="wrong"), "the token is not accepted (401)"),
        (replace(right, token=""), "it wants a token, and none is given (401)"),
        (replace(right, bucket="nope"), 'database not found: "nope" (404)'),
        (replace(right, url=server.url), "no InfluxDB 1.8 or later is there: 404 page not found (404)"),
    ]:
        with open_store(target, tmp_path) as store, pytest.raises(BadStore) as caught:
            store.check()
        assert str(caught.value) == f"telemetry in {target}: {problem}"
    with open_store(replace(right, url=f"http://127.0.0.1:{free_port()}"), tmp_path) as store:
        store.check()


def test_a_wrong_token_loses_nothing_and_is_said_once(
    server: InfluxServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with open_store(replace(server.target, token="new-token"), tmp_path) as store:
        store.write(batch(0, 50))
        eventually("it to be said", lambda: "the token is not accepted (401); points wait in" in caplog.text)
        store.write(batch(50, 50))
        tried = attempts(store)
        eventually("more attempts", lambda: len(tried) > 3)
        server.proxy.stop()
        server.proxy.token = "new-token"
        server.proxy.start()
        try:
            all_taken(store)
        finally:
            server.proxy.stop()
            server.proxy.token = server.target.token
            server.proxy.start()
    assert (numbers(server), store.dropped) == (list(range(100)), 0)
    assert caplog.text.count("the token is not accepted") == 1
    assert "new-token" not in caplog.text


def test_a_bucket_that_is_not_there_yet_loses_nothing(
    server: InfluxServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with open_store(replace(server.target, bucket="later"), tmp_path) as store:
        store.write(batch(0, 50))
        eventually("it to be said", lambda: 'database not found: "later" (404); points wait' in caplog.text)
        server.query('CREATE DATABASE "later"')
        all_taken(store)
    assert server.query('SELECT count("tasks") FROM "batch"', bucket="later")[0]["values"][0][1] == 50


def test_points_that_a_server_refuses_for_good_are_counted_and_the_others_go_on(
    server: InfluxServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with open_store(server.target, tmp_path) as store:
        # Somebody wrote texts where numbers belong; InfluxDB keeps what a field was first.
        store._lines.encode = lambda points: [f'batch,worker=w0 tasks="x" {NOW_NS}']  # type: ignore[method-assign]
        store.write(batch(0, 1))
        all_taken(store)
        del store._lines.encode
        store.write(
            [*batch(0, 9), *[TelemetryPoint("node", NOW_NS + number, {}, {"load": 1.0}) for number in range(5)]]
        )
        all_taken(store)
        store.write(batch(20, 3))
        all_taken(store)
        assert store.dropped == 9 + 3
    assert server.count_points("node", "load") == 5
    assert caplog.text.count("refused for good") == 1
    assert "9 points of 14 are refused for good: partial write: field type conflict" in caplog.text


def test_a_disk_that_is_full_costs_points_and_says_so_once(
    server: InfluxServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with open_store(server.target, tmp_path) as store:
        with full_disk(10):
            store.write(batch(0, 5_000))
            store.write(batch(5_000, 5_000))
        store.write(batch(10_000, 5_000))
        all_taken(store)
        assert store.dropped == 10_000
    assert numbers(server) == list(range(10_000, 15_000))
    assert caplog.text.count("points are lost") == 1
