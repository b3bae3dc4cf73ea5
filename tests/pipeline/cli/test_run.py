"""`sparse run`: its broker, the environment and restarts of its processes, and its output."""

from __future__ import annotations

import os
import signal
import socket
import sys

import psutil
import pytest

from brokers.config.pipeline_file import load_pipeline
from brokers.errors import SparseError
from brokers.server.local_broker import BrokerKind, LocalBroker
from monitor.launch import sites as run_sites
from monitor.launch.sites import set_up_brokers
from tests.support.environment.external_programs import require_broker
from tests.support.pipelines.pipeline_files import counting_source_table, stage_table, write_pipeline_file
from tests.support.pipelines.processes import ProcessSandbox, eventually

STAGES = [stage_table("first", "double")]
# The command with a shorter timeout for its source.
SHORT_DRAIN_PROGRAM = """
import sys
import monitor.launch.run
from brokers.cli import main
monitor.launch.run.SOURCE_DRAIN_TIMEOUT_S = 1.0
sys.exit(main(sys.argv[1:]))
"""


def test_password_is_not_shown(sandbox: ProcessSandbox, embedded_broker: LocalBroker) -> None:
    """It is not in the output, in files, or in the arguments of processes, which all users of a machine can list."""
    path = write_pipeline_file(sandbox.folder, STAGES, counting_source_table(40, every_s=0.05))
    out = sandbox.folder / "out"
    address = embedded_broker.address.replace("://", "://me:secret@")
    run = sandbox.start_sparse("run", path, "--broker", address, "--json", "--out", out)
    eventually("the source", lambda: sandbox.find_process("source"))
    arguments = [command for process, command in sandbox.live_commands() if process.pid != run.pid]
    assert len(arguments) == 3  # a stage, the source and the monitor
    assert "secret" not in str(arguments)
    result = run.wait()
    assert result.returncode == 0, result.stderr
    assert result.json_output["broker"] == embedded_broker.address.replace("://", "://me@")
    files = [path.read_bytes() for path in out.rglob("*") if path.is_file()]
    assert "secret" not in result.stdout + result.stderr
    assert b"secret" not in b"".join(files)
    sandbox.assert_nothing_left()


def test_folder_of_another_run_is_refused(sandbox: ProcessSandbox, embedded_broker: LocalBroker) -> None:
    path = write_pipeline_file(sandbox.folder, STAGES, counting_source_table(3))
    arguments = ("run", path, "--broker", embedded_broker.address, "--json", "--out", sandbox.folder / "out")
    own_monitor = {"SPARSE_MONITOR": ""}
    assert sandbox.run_sparse(*arguments, environment=own_monitor).returncode == 0
    result = sandbox.run_sparse(*arguments, environment=own_monitor)
    assert result.returncode == 2
    assert "it holds a run already (telemetry.sqlite): name another folder" in result.stderr
    sandbox.assert_nothing_left()


@pytest.mark.parametrize("fails", [False, True])
def test_output_of_an_own_source_is_not_its_summary(
    sandbox: ProcessSandbox, embedded_broker: LocalBroker, fails: bool
) -> None:
    source = {
        "kind": "tests.support.pipelines.example_code:PrintingSource",
        "name": "printing",
        "settings": {"count": 2, "text": '{"a": 1}', "raise_at_end": fails},
    }
    path = write_pipeline_file(sandbox.folder, STAGES, source)
    out = sandbox.folder / "out"
    result = sandbox.run_sparse("run", path, "--broker", embedded_broker.address, "--json", "--out", out)
    assert "Traceback" not in result.stderr
    if fails:
        assert (result.returncode, result.stdout) == (1, "")
        line = f"sparse: source ended with status 1: the cable is out (its log: {out}/logs/source.log)"
        assert result.stderr.splitlines()[-1] == line
    else:
        assert result.returncode == 0, result.stderr
        assert result.json_output["results"] == 2


def test_broker_option_overrides_the_file(sandbox: ProcessSandbox, embedded_broker: LocalBroker) -> None:
    path = write_pipeline_file(sandbox.folder, STAGES, counting_source_table(3))
    path.write_text(path.read_text() + '[[site]]\nname = "local"\nbroker = "mqtt://127.0.0.1:9"\n')
    out = sandbox.folder / "out"
    result = sandbox.run_sparse("run", path, "--broker", embedded_broker.address, "--json", "--out", out)
    assert result.returncode == 0, result.stderr
    assert result.json_output["results"] == 3


@pytest.mark.parametrize("kind", ["embedded", "mosquitto"])
def test_killed_broker_is_restarted_and_nothing_is_lost(sandbox: ProcessSandbox, kind: BrokerKind) -> None:
    require_broker(kind)
    path = write_pipeline_file(sandbox.folder, STAGES, counting_source_table(200, every_s=0.01))
    out = sandbox.folder / "out"
    run = sandbox.start_sparse("run", path, "--broker", kind, "--json", "--out", out)
    results = out / "results.jsonl"
    eventually("some results", lambda: results.exists() and results.read_text().count("\n") >= 5)
    (broker,) = [
        process
        for process in sandbox.live_processes()
        if any(connection.status == psutil.CONN_LISTEN for connection in process.net_connections("tcp"))
    ]
    broker.kill()
    result = run.wait()
    assert result.returncode == 0, result.stderr
    assert f"the {kind} broker exited and was restarted" in result.stderr
    assert (result.json_output["results"], result.json_output["lost"], result.json_output["broker"]) == (200, 0, kind)
    sandbox.wait_until_nothing_left()


def test_broker_whose_port_is_taken_is_not_restarted(sandbox: ProcessSandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    require_broker("embedded")
    monkeypatch.setattr(run_sites, "_PORT_WAIT_S", 0.2)
    pipeline = load_pipeline(write_pipeline_file(sandbox.folder, STAGES, counting_source_table(1)))
    with set_up_brokers(pipeline, "embedded", None) as sites:
        site = sites.source_broker
        assert site.local_broker is not None
        os.kill(site.local_broker.pid, signal.SIGKILL)
        eventually("the exit of the broker", lambda: site.has_exited)
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", site.local_broker.port))
            listener.listen()
            with pytest.raises(SparseError) as caught:
                site.restart()
    assert caught.value.code == "BrokerGone"
    assert f"port {site.local_broker.port} on 127.0.0.1 is taken" in caught.value.fields["reason"]


def test_source_that_does_not_exit_is_killed(sandbox: ProcessSandbox, embedded_broker: LocalBroker) -> None:
    stages = [stage_table("slow", "SleepExecutor", settings={"seconds": 600})]
    path = write_pipeline_file(sandbox.folder, stages, counting_source_table(3))
    out = sandbox.folder / "out"
    arguments = ("run", path, "--broker", embedded_broker.address, "--json", "--out", out)
    run = sandbox.start(sys.executable, "-c", SHORT_DRAIN_PROGRAM, *arguments)
    eventually("the source", (out / "results.jsonl").exists)
    os.killpg(run.pid, signal.SIGINT)
    line = f"the source did not exit within 1 s and was killed: there is no summary; the results so far are in {out}"
    eventually("the message", lambda: line in run.read_stderr())
    result = run.wait(signal.SIGINT)  # does not wait for the stage, either
    assert (result.returncode, result.stdout) == (130, "")
    assert "Traceback" not in result.stderr
    sandbox.assert_nothing_left()
