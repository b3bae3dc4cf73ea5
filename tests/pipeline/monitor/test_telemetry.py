"""Telemetry of `sparse run`: complete records, and a monitor that freezes, crashes or is missing delays no run."""

from __future__ import annotations

import json
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from brokers.server.local_broker import LocalBroker
from tests.support.brokers.ports import free_port
from tests.support.monitor.http_client import fetch_metrics, http_get
from tests.support.monitor.prometheus_series import series_value
from tests.support.monitor.telemetry_file import finished_request_ids, read_points
from tests.support.monitor.unix_client import encode_event, encode_task_event, send_datagrams, short_temp_folder
from tests.support.pipelines.pipeline_files import counting_source_table, stage_table, write_pipeline_file
from tests.support.pipelines.processes import ProcessSandbox, RunningCommand, eventually, start_with_slow_monitor

STAGES = ("first", "second")


def start_run(
    sandbox: ProcessSandbox, broker: LocalBroker, count: int, *options: str, **environment: str
) -> RunningCommand:
    """`sparse run` of two stages and `count` requests, with its output in the folder `out`."""
    stages = [stage_table(name, "double") for name in STAGES]
    path = write_pipeline_file(sandbox.folder, stages, counting_source_table(count, every_s=0.005))
    arguments = ("run", path, "--broker", broker.address, "--json", "--out", sandbox.folder / "out")
    return sandbox.start_sparse(*arguments, *options, environment=environment)


def result_ids(folder: Path) -> list[str]:
    """The ids of the requests with a result."""
    path = folder / "results.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line)["request"] for line in lines if line.endswith("\n")]


def wait_for_summary(run: RunningCommand, count: int) -> dict[str, Any]:
    """Wait for the end of a run, and assert that all its requests had results."""
    result = run.wait()
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    summary = result.json_output
    assert (summary["requests"], summary["results"], summary["lost"]) == (count, count, 0)
    return summary


def find_monitor(sandbox: ProcessSandbox) -> psutil.Process:
    process = eventually("the monitor", lambda: sandbox.find_process("monitor"))
    assert process is not None
    return process


def test_records_of_a_run_are_complete(sandbox: ProcessSandbox, embedded_broker: LocalBroker) -> None:
    count = 200
    summary = wait_for_summary(start_run(sandbox, embedded_broker, count), count)
    out = sandbox.folder / "out"
    file = out / summary["files"]["telemetry"]
    requests = result_ids(out)
    assert Counter(finished_request_ids(file)) == Counter(requests)
    for measurement in ("hop", "task"):
        tasks = Counter((point.tags["stage"], str(point.fields["request"])) for point in read_points(file, measurement))
        assert tasks == Counter((name, request) for name in STAGES for request in requests)
    batches: Counter[str] = Counter()
    for point in read_points(file, "batch"):
        batches[point.tags["stage"]] += int(point.fields["tasks"] or 0)
    assert batches == dict.fromkeys(STAGES, count)
    lifecycle_counts = Counter((point.tags["role"], point.fields["event"]) for point in read_points(file, "lifecycle"))
    processes = {"run": 1, "stage": 2, "source": 1}
    assert lifecycle_counts == {
        (role, event): number for role, number in processes.items() for event in ("start", "stop")
    }
    reported = ("request", "hop", "task", "batch", "lifecycle", "node", "process", "stage", "source", "monitor")
    for measurement in reported:
        points = read_points(file, measurement)
        assert points, measurement
        assert {point.tags["run"] for point in points} == {"out"}
    assert {point.tags["role"] for point in read_points(file, "process")} == {"monitor", "run", "stage", "source"}
    last = read_points(file, "monitor")[-1].fields
    assert (last["bad_events"], last["dropped_events"], last["dropped_points"]) == (0, 0, 0)
    sandbox.assert_nothing_left()


def test_source_starts_after_a_slow_monitor(sandbox: ProcessSandbox, embedded_broker: LocalBroker) -> None:
    count = 20
    path = write_pipeline_file(sandbox.folder, [stage_table("first", "double")], counting_source_table(count))
    out = sandbox.folder / "out"
    run = start_with_slow_monitor(sandbox, "run", path, "--broker", embedded_broker.address, "--json", "--out", out)
    summary = wait_for_summary(run, count)
    assert Counter(finished_request_ids(out / summary["files"]["telemetry"])) == Counter(result_ids(out))


def test_run_without_a_monitor_has_all_results(sandbox: ProcessSandbox, embedded_broker: LocalBroker) -> None:
    run = start_run(sandbox, embedded_broker, 50, SPARSE_MONITOR=str(sandbox.folder / "missing"))
    assert wait_for_summary(run, 50)["files"]["telemetry"] is None
    assert not (sandbox.folder / "out" / "telemetry.sqlite").exists()
    sandbox.assert_nothing_left()


def test_frozen_monitor_receives_all_events_when_it_continues(
    sandbox: ProcessSandbox, embedded_broker: LocalBroker
) -> None:
    run, out = start_run(sandbox, embedded_broker, 600), sandbox.folder / "out"
    eventually("some results", lambda: len(result_ids(out)) >= 20)
    monitor = find_monitor(sandbox)
    monitor.suspend()
    count = len(result_ids(out))
    eventually("more results", lambda: len(result_ids(out)) >= count + 150)
    monitor.resume()
    wait_for_summary(run, 600)
    assert Counter(finished_request_ids(out / "telemetry.sqlite")) == Counter(result_ids(out))


def test_monitor_that_stays_frozen_does_not_delay_the_run(
    sandbox: ProcessSandbox, embedded_broker: LocalBroker
) -> None:
    run, out = start_run(sandbox, embedded_broker, 200), sandbox.folder / "out"
    eventually("some results", lambda: len(result_ids(out)) >= 20)
    find_monitor(sandbox).suspend()
    wait_for_summary(run, 200)
    sandbox.wait_until_nothing_left()


def test_killed_monitor_is_restarted_and_its_records_are_kept(
    sandbox: ProcessSandbox, embedded_broker: LocalBroker
) -> None:
    """The run lasts until the second monitor has records: its source is stopped then."""
    run, out = start_run(sandbox, embedded_broker, 1_000_000), sandbox.folder / "out"
    file = out / "telemetry.sqlite"
    eventually("some records", lambda: len(finished_request_ids(file)) >= 20)
    first = find_monitor(sandbox)
    first.kill()
    kept = set(finished_request_ids(file))
    eventually("another monitor", lambda: (second := sandbox.find_process("monitor")) and second.pid != first.pid)
    eventually("its records", lambda: len(set(finished_request_ids(file)) - kept) >= 100)
    assert "the monitor exited and was restarted" in run.read_stderr()
    result = run.wait(signal.SIGTERM)
    assert result.returncode == 0, result.stderr
    stored, requests = finished_request_ids(file), result_ids(out)
    assert len(stored) == len(set(stored))
    assert kept <= set(stored) <= set(requests)
    assert set(requests[-100:]) <= set(stored)
    sandbox.assert_nothing_left()


def test_monitor_that_cannot_start_is_reported_once(sandbox: ProcessSandbox, embedded_broker: LocalBroker) -> None:
    run = start_run(sandbox, embedded_broker, 50, SPARSE_INFLUX_URL="nonsense")
    wait_for_summary(run, 50)
    (line,) = [line for line in run.read_stderr().splitlines() if "telemetry" in line]
    assert line.startswith("no telemetry from now on: the monitor exited: SPARSE_INFLUX_URL")
    sandbox.assert_nothing_left()


def test_run_uses_the_monitor_of_its_node(sandbox: ProcessSandbox, embedded_broker: LocalBroker) -> None:
    """The monitor is killed and restarted meanwhile: processes queue the events of that time."""
    with short_temp_folder() as folder:
        file, socket = sandbox.folder / "node.sqlite", folder / "events"
        arguments = ("monitor", "--store", file, "--port", str(free_port()), "--socket", socket)
        first = sandbox.start_sparse(*arguments)
        eventually("the socket", socket.exists)
        environment = {"SPARSE_MONITOR": str(socket), "SPARSE_RUN": "monday"}
        run, out = start_run(sandbox, embedded_broker, 1_000_000, **environment), sandbox.folder / "out"
        eventually("some records", lambda: len(finished_request_ids(file)) >= 20)
        first.wait(signal.SIGKILL)
        kept, count = set(finished_request_ids(file)), len(result_ids(out))
        eventually("results without a monitor", lambda: len(result_ids(out)) >= count + 100)
        second = sandbox.start_sparse(*arguments)
        eventually("new records", lambda: set(finished_request_ids(file)) - kept)
        result = run.wait(signal.SIGTERM)
        assert result.json_output["files"]["telemetry"] is None
        assert second.wait(signal.SIGTERM).returncode == 0
        stored = set(finished_request_ids(file))
        assert kept <= stored
        assert set(result_ids(out)[count + 50 :]) <= stored  # the last events before the crash may be lost
        assert {point.tags["run"] for point in read_points(file, "request")} == {"monday"}
    sandbox.assert_nothing_left()


def test_no_telemetry_sends_no_events(sandbox: ProcessSandbox, embedded_broker: LocalBroker) -> None:
    with short_temp_folder() as folder:
        file, socket, port = sandbox.folder / "node.sqlite", folder / "events", free_port()
        monitor = sandbox.start_sparse("monitor", "--store", file, "--port", str(port), "--socket", socket)
        eventually("the monitor", lambda: http_get(port, "/health")[0] == 200)
        run = start_run(sandbox, embedded_broker, 20, "--no-telemetry", SPARSE_MONITOR=str(socket))
        assert wait_for_summary(run, 20)["files"]["telemetry"] is None
        assert monitor.wait(signal.SIGTERM).returncode == 0
    assert read_points(file, "lifecycle") == []
    assert read_points(file, "node")


def test_monitor_without_a_broker_serves_its_node(sandbox: ProcessSandbox) -> None:
    with short_temp_folder() as folder:
        file, socket, port = sandbox.folder / "node.sqlite", folder / "events", free_port()
        options = ("--socket", socket, "--every", "0.05", "--run", "monday")
        monitor = sandbox.start_sparse("monitor", "--store", file, "--port", str(port), *options)
        eventually("the monitor", lambda: http_get(port, "/health")[0] == 200)
        assert monitor.read_stderr() == (
            f"watching this node, without a broker; events at {socket}; stored in {file}; "
            f"http://127.0.0.1:{port}/metrics; stop with Ctrl-C\n"
        )
        assert http_get(port, "/stages")[0] == 404
        events = (encode_task_event(1), b"nonsense\n", encode_task_event(2, run="tuesday"), encode_event("unknown"))
        send_datagrams(socket, b"".join(events))
        eventually("two events", lambda: series_value(fetch_metrics(port), "sparse_monitor_events_total") == 2)
        eventually("two errors", lambda: series_value(fetch_metrics(port), "sparse_monitor_bad_events_total") == 2)
        eventually("a sample", lambda: series_value(fetch_metrics(port), "sparse_node_memory_used_bytes") > 0)
        result = monitor.wait(signal.SIGINT)
    assert result.returncode == 130
    assert "nonsense" not in result.stderr
    assert [point.tags["run"] for point in read_points(file, "task")] == ["monday", "tuesday"]
    assert read_points(file, "monitor")[-1].fields["bad_events"] == 2
    sandbox.assert_nothing_left()


def test_socket_of_another_monitor_is_refused(sandbox: ProcessSandbox) -> None:
    with short_temp_folder() as folder:
        socket, port = folder / "events", free_port()
        monitor = sandbox.start_sparse("monitor", "--port", str(port), "--socket", socket)
        eventually("the monitor", lambda: http_get(port, "/health")[0] == 200)
        environment = {"SPARSE_MONITOR": str(socket)}
        result = sandbox.run_sparse("monitor", "--port", str(free_port()), environment=environment)
        assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
        assert result.stderr.startswith(f"sparse: {socket}: another monitor uses this socket")
        send_datagrams(socket, encode_task_event(1))
        eventually("an event", lambda: series_value(fetch_metrics(port), "sparse_monitor_events_total") == 1)
        assert monitor.wait(signal.SIGTERM).returncode == 0
    sandbox.assert_nothing_left()
