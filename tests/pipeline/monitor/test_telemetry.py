"""Events in, records out: what a monitor keeps of pipelines, which never wait for it and never fail for it."""

from __future__ import annotations

import json
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest

from brokers.server.local_broker import LocalBroker
from tests.support.brokers.ports import free_port
from tests.support.monitor.http_client import fetch_metrics, http_get
from tests.support.monitor.prometheus_series import series_value
from tests.support.monitor.telemetry_file import finished_request_ids, read_points
from tests.support.monitor.unix_client import encode_event, encode_task_event, send_datagrams, short_temp_folder
from tests.support.pipelines.pipeline_files import counting_source_table, stage_table, write_pipeline_file
from tests.support.pipelines.processes import ProcessSandbox, RunningCommand, eventually

COUNT = 300
STAGES = ("first", "second")


def start(
    sandbox: ProcessSandbox, broker: LocalBroker, *words: str, count: int = COUNT, **environment: str
) -> RunningCommand:
    """A run of two stages, with results in sandbox.folder/out."""
    path = write_pipeline_file(
        sandbox.folder, [stage_table(name, "double") for name in STAGES], counting_source_table(count, every_s=0.01)
    )
    out = sandbox.folder / "out"
    return sandbox.start_sparse(
        "run", path, "--broker", broker.address, "--json", "--out", out, *words, environment=environment
    )


def results(out: Path) -> list[str]:
    """The ids of the requests that were answered."""
    file = out / "results.jsonl"
    whole = (
        [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")] if file.exists() else []
    )
    return [json.loads(line)["request"] for line in whole]


def finished(run: RunningCommand, count: int = COUNT) -> dict[str, Any]:
    """The summary of a run that has answered everything, whatever became of its monitor."""
    said = run.wait()
    assert said.returncode == 0, said.stderr
    assert "Traceback" not in said.stderr
    assert (said.json_output["requests"], said.json_output["results"], said.json_output["lost"]) == (count, count, 0)
    return said.json_output


def monitor_of(sandbox: ProcessSandbox) -> psutil.Process:
    found = eventually("the monitor", lambda: sandbox.find_process("monitor"))
    assert found is not None
    return found


def test_what_a_run_does_is_in_its_folder_and_the_counts_are_right(
    sandbox: ProcessSandbox, embedded_broker: LocalBroker
) -> None:
    summary = finished(start(sandbox, embedded_broker))
    out = sandbox.folder / "out"
    file = out / summary["files"]["telemetry"]
    assert Counter(finished_request_ids(file)) == Counter(results(out))
    for measurement in ("hop", "task"):
        found = Counter((point.tags["stage"], str(point.fields["request"])) for point in read_points(file, measurement))
        assert found == Counter((name, request) for name in STAGES for request in results(out))
    batches: Counter[str] = Counter()
    for point in read_points(file, "batch"):
        batches[point.tags["stage"]] += int(point.fields["tasks"] or 0)
    assert batches == dict.fromkeys(STAGES, COUNT)
    life = [(point.tags["role"], point.fields["event"]) for point in read_points(file, "life")]
    expected = {"run": 1, "stage": 2, "source": 1}
    assert Counter(life) == {(role, word): number for role, number in expected.items() for word in ("start", "stop")}
    for measurement in ("request", "hop", "task", "batch", "life", "node", "process", "stage", "source", "monitor"):
        found_points = read_points(file, measurement)
        assert found_points, measurement
        assert {point.tags["run"] for point in found_points} == {"out"}
    assert {point.tags["role"] for point in read_points(file, "process")} == {"monitor", "run", "stage", "source"}
    last = read_points(file, "monitor")[-1].fields
    assert (last["bad_events"], last["dropped_events"], last["dropped_points"]) == (0, 0, 0)
    sandbox.assert_nothing_left()


def test_without_a_monitor_nothing_is_missing_but_its_records(
    sandbox: ProcessSandbox, embedded_broker: LocalBroker
) -> None:
    summary = finished(start(sandbox, embedded_broker, SPARSE_MONITOR=str(sandbox.folder / "nobody")))
    assert summary["files"]["telemetry"] is None
    assert not (sandbox.folder / "out" / "telemetry.sqlite").exists()
    sandbox.assert_nothing_left()


def test_a_monitor_that_is_frozen_for_a_while_gets_all_of_it_later(
    sandbox: ProcessSandbox, embedded_broker: LocalBroker
) -> None:
    run, out = start(sandbox, embedded_broker, count=600), sandbox.folder / "out"
    eventually("some results", lambda: len(results(out)) >= 20)
    monitor = monitor_of(sandbox)
    monitor.suspend()
    frozen = len(results(out))
    eventually("many more results meanwhile", lambda: len(results(out)) >= frozen + 150)
    monitor.resume()
    finished(run, 600)
    assert Counter(finished_request_ids(out / "telemetry.sqlite")) == Counter(results(out))


def test_a_monitor_that_stays_frozen_holds_up_nothing(sandbox: ProcessSandbox, embedded_broker: LocalBroker) -> None:
    run, out = start(sandbox, embedded_broker), sandbox.folder / "out"
    eventually("some results", lambda: len(results(out)) >= 20)
    monitor_of(sandbox).suspend()
    finished(run)
    sandbox.wait_until_nothing_left()


def test_a_monitor_that_is_killed_is_started_again_and_what_it_had_kept_is_there(
    sandbox: ProcessSandbox, embedded_broker: LocalBroker
) -> None:
    run, out = start(sandbox, embedded_broker, count=1000), sandbox.folder / "out"
    file = out / "telemetry.sqlite"
    eventually("some records", lambda: len(finished_request_ids(file)) >= 20)
    first = monitor_of(sandbox)
    first.kill()
    kept = set(finished_request_ids(file))
    eventually("another monitor", lambda: (found := sandbox.find_process("monitor")) and found.pid != first.pid)
    again = len(results(out))
    eventually("its records", lambda: set(finished_request_ids(file)) - kept)
    assert "the monitor exited and was restarted" in run.read_stderr()
    finished(run, 1000)
    stored, answered = finished_request_ids(file), results(out)
    assert len(stored) == len(set(stored))
    assert kept <= set(stored) <= set(answered)
    assert set(answered[-100:]) <= set(stored)
    assert len(answered[again:]) > 100
    sandbox.assert_nothing_left()


def test_a_monitor_that_cannot_live_is_said_once_and_the_run_goes_on(
    sandbox: ProcessSandbox, embedded_broker: LocalBroker
) -> None:
    run = start(sandbox, embedded_broker, SPARSE_INFLUX_URL="nonsense")
    finished(run)
    (line,) = [line for line in run.read_stderr().splitlines() if "telemetry" in line]
    assert line.startswith("no telemetry from now on: the monitor exited: SPARSE_INFLUX_URL: not the address")
    sandbox.assert_nothing_left()


def test_a_node_that_has_a_monitor_needs_no_other_and_it_may_die_and_come_back(
    sandbox: ProcessSandbox, embedded_broker: LocalBroker
) -> None:
    with short_temp_folder() as folder:
        file, socket = sandbox.folder / "node.sqlite", folder / "events"
        words = ("monitor", "--store", file, "--port", str(free_port()), "--socket", socket)
        first = sandbox.start_sparse(*words)
        eventually("its socket", socket.exists)
        run, out = (
            start(sandbox, embedded_broker, count=1000, SPARSE_MONITOR=str(socket), SPARSE_RUN="monday"),
            sandbox.folder / "out",
        )
        eventually("some records", lambda: len(finished_request_ids(file)) >= 20)
        first.process.kill()
        first.wait()
        kept, answered = set(finished_request_ids(file)), len(results(out))
        eventually("results without it", lambda: len(results(out)) >= answered + 100)
        second = sandbox.start_sparse(*words)
        eventually("its records", lambda: set(finished_request_ids(file)) - kept)
        assert finished(run, 1000)["files"]["telemetry"] is None
        assert second.wait(signal.SIGTERM).returncode == 0
        stored = set(finished_request_ids(file))
        assert kept <= stored
        # The senders had kept what happened while it was away.
        assert set(results(out)[answered + 50 :]) <= stored
        assert {point.tags["run"] for point in read_points(file, "request")} == {"monday"}
    sandbox.assert_nothing_left()


def test_without_telemetry_nobody_is_told(sandbox: ProcessSandbox, embedded_broker: LocalBroker) -> None:
    with short_temp_folder() as folder:
        file, socket, port = sandbox.folder / "node.sqlite", folder / "events", free_port()
        monitor = sandbox.start_sparse("monitor", "--store", file, "--port", str(port), "--socket", socket)
        eventually("the monitor", lambda: http_get(port, "/health")[0] == 200)
        summary = finished(start(sandbox, embedded_broker, "--no-telemetry", SPARSE_MONITOR=str(socket)))
        assert summary["files"]["telemetry"] is None
        assert monitor.wait(signal.SIGTERM).returncode == 0
    assert read_points(file, "life") == []
    assert read_points(file, "node")


def test_a_monitor_without_a_broker_serves_its_node(sandbox: ProcessSandbox) -> None:
    with short_temp_folder() as folder:
        file, socket, port = sandbox.folder / "node.sqlite", folder / "events", free_port()
        words = ("--socket", socket, "--every", "0.05", "--run", "monday")
        monitor = sandbox.start_sparse("monitor", "--store", file, "--port", str(port), *words)
        eventually("the monitor", lambda: http_get(port, "/health")[0] == 200)
        assert monitor.read_stderr() == (
            f"watching this node, without a broker; events at {socket}; stored in {file}; "
            f"http://127.0.0.1:{port}/metrics; stop with Ctrl-C\n"
        )
        assert http_get(port, "/stages")[0] == 404
        send_datagrams(
            socket,
            encode_task_event(1) + b"nonsense\n" + encode_task_event(2, run="tuesday") + encode_event("links_carried"),
        )
        eventually("the events", lambda: series_value(fetch_metrics(port), "sparse_monitor_events_total") == 2)
        eventually("the others", lambda: series_value(fetch_metrics(port), "sparse_monitor_bad_events_total") == 2)
        eventually("a sample", lambda: series_value(fetch_metrics(port), "sparse_node_memory_used_bytes") > 0)
        said = monitor.wait(signal.SIGINT)
    assert said.returncode == 130
    assert "nonsense" not in said.stderr
    assert [point.tags["run"] for point in read_points(file, "task")] == ["monday", "tuesday"]
    assert read_points(file, "monitor")[-1].fields["bad_events"] == 2
    sandbox.assert_nothing_left()


def test_a_socket_of_a_living_monitor_is_one_line_and_it_lives_on(sandbox: ProcessSandbox) -> None:
    with short_temp_folder() as folder:
        socket, port = folder / "events", free_port()
        monitor = sandbox.start_sparse("monitor", "--port", str(port), "--socket", socket)
        eventually("the monitor", lambda: http_get(port, "/health")[0] == 200)
        for words, environment in [(("--socket", socket), {}), ((), {"SPARSE_MONITOR": str(socket)})]:
            said = sandbox.start_sparse("monitor", "--port", str(free_port()), *words, environment=environment).wait()
            assert (said.returncode, said.stdout) == (2, "")
            assert said.stderr == (
                f"sparse: {socket}: another monitor uses this socket: stop it, or choose another with "
                "--socket (and SPARSE_MONITOR for the senders)\n"
            )
        send_datagrams(socket, encode_task_event(1))
        eventually("the event", lambda: series_value(fetch_metrics(port), "sparse_monitor_events_total") == 1)
        assert monitor.wait(signal.SIGTERM).returncode == 0
    sandbox.assert_nothing_left()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--socket", "/dev/null/events"), "sparse: /dev/null/events: cannot receive events there: file exists"),
        (("--store", "pyproject.toml"), "sparse: telemetry in pyproject.toml: file is not a database"),
        (("--every", "0"), "sparse: monitor: Invalid value for '--every'"),
        (("--limit", "0"), "sparse: monitor: Invalid value for '--limit'"),
        (("--traces", "nowhere"), "sparse: --traces 'nowhere': expected the address of a collector"),
    ],
)
def test_what_a_monitor_cannot_do_is_one_clear_line(sandbox: ProcessSandbox, words: tuple[str, ...], said: str) -> None:
    ended = sandbox.start_sparse("monitor", "--port", str(free_port()), *words).wait()
    assert ended.returncode in (1, 2)
    assert (ended.stderr.count("\n"), ended.stdout) == (1, "")
    assert ended.stderr.startswith(said)
    sandbox.assert_nothing_left()
