"""What `sparse run` does with its broker and its processes: hands over, watches, starts again, tells."""

from __future__ import annotations

import os
import signal
import socket
import sys

import pytest

from brokers.config.pipeline_file import load_pipeline
from brokers.errors import SparseError
from brokers.server.local_broker import LocalBroker
from monitor.launch import sites as run_sites
from monitor.launch.sites import set_up_brokers
from tests.support.environment.external_programs import require_dependency
from tests.support.pipelines.pipeline_files import counting_source_table, stage_table, write_pipeline_file
from tests.support.pipelines.processes import ProcessSandbox, eventually

# As the command, but for the time that the source gets to end.
_IMPATIENT = (
    "import sys, monitor.launch.run; monitor.launch.run.SOURCE_DRAIN_TIMEOUT_S = 1.0;"
    " from brokers.cli import main; sys.exit(main(sys.argv[1:]))"
)


def test_a_password_is_shown_to_nobody(sandbox: ProcessSandbox, embedded_broker: LocalBroker) -> None:
    """Not in the summary, not in the live view, not in the arguments of processes, which all users can list."""
    path = write_pipeline_file(
        sandbox.folder, [stage_table("first", "double")], counting_source_table(40, every_s=0.05)
    )
    out = sandbox.folder / "out"
    address = embedded_broker.address.replace("://", "://me:secret@")
    run = sandbox.start_sparse("run", path, "--broker", address, "--json", "--out", out)
    eventually("the source", lambda: sandbox.find_process("source"))
    words = [" ".join(process.cmdline()) for process in sandbox.live_processes() if process.pid != run.pid]
    assert len(words) == 3  # the stage, the source, the monitor
    assert "secret" not in " ".join(words)
    said = run.wait()
    assert said.returncode == 0, said.stderr
    assert said.json_output["broker"] == embedded_broker.address.replace("://", "://me@")
    written = [path.read_bytes() for path in out.rglob("*") if path.is_file()]
    assert "secret" not in said.stdout + said.stderr
    assert b"secret" not in b"".join(written)
    sandbox.assert_nothing_left()


def test_a_folder_that_holds_a_run_is_not_taken_for_another_one(
    sandbox: ProcessSandbox, embedded_broker: LocalBroker
) -> None:
    path = write_pipeline_file(sandbox.folder, [stage_table("first", "double")], counting_source_table(3))
    asked = ("run", path, "--broker", embedded_broker.address, "--json", "--out", sandbox.folder / "out")
    own = {"SPARSE_MONITOR": ""}
    assert sandbox.start_sparse(*asked, environment=own).wait().returncode == 0
    said = sandbox.start_sparse(*asked, environment=own).wait()
    assert said.returncode == 2
    assert "it holds a run already (telemetry.sqlite): name another folder" in said.stderr
    sandbox.assert_nothing_left()


@pytest.mark.parametrize("says", ["here I am", '{"a": 1}'])
def test_what_a_source_of_ones_own_prints_is_no_summary(
    sandbox: ProcessSandbox, embedded_broker: LocalBroker, says: str
) -> None:
    source = {"kind": "tests.support.pipelines.example_code:PrintingSource", "name": "talker"}
    for fails in (True, False):
        settings = {"count": 2, "text": says, "raise_at_end": fails}
        path = write_pipeline_file(sandbox.folder, [stage_table("first", "double")], {**source, "settings": settings})
        out = sandbox.folder / f"out-{fails}"
        said = sandbox.start_sparse("run", path, "--broker", embedded_broker.address, "--json", "--out", out).wait()
        assert "Traceback" not in said.stderr
        if fails:
            assert (said.returncode, said.stdout) == (1, "")
            told = f"sparse: source ended with status 1: the cable is out (its log: {out}/logs/source.log)"
            assert said.stderr.splitlines()[-1] == told
        else:
            assert said.returncode == 0, said.stderr
            assert said.json_output["results"] == 2


def test_the_broker_that_was_asked_for_goes_before_the_one_in_the_file(
    sandbox: ProcessSandbox, embedded_broker: LocalBroker
) -> None:
    path = write_pipeline_file(sandbox.folder, [stage_table("first", "double")], counting_source_table(3))
    path.write_text(path.read_text() + '[[site]]\nname = "local"\nbroker = "mqtt://127.0.0.1:9"\n')
    said = sandbox.start_sparse(
        "run", path, "--broker", embedded_broker.address, "--json", "--out", sandbox.folder / "out"
    ).wait()
    assert said.returncode == 0, said.stderr
    assert said.json_output["results"] == 3


@pytest.mark.parametrize("kind", ["embedded", "mosquitto"])
def test_a_broker_of_the_runs_own_that_dies_is_started_again_and_nothing_is_lost(
    sandbox: ProcessSandbox, kind: str
) -> None:
    require_dependency({"embedded": "iotcore"}.get(kind, kind))
    path = write_pipeline_file(
        sandbox.folder, [stage_table("first", "double")], counting_source_table(300, every_s=0.01)
    )
    out = sandbox.folder / "out"
    run = sandbox.start_sparse("run", path, "--broker", kind, "--json", "--out", out)
    results = out / "results.jsonl"
    eventually("some results", lambda: results.exists() and results.read_text().count("\n") >= 5)
    (broker,) = [
        each
        for each in sandbox.live_processes()
        if any(line.status == "LISTEN" for line in each.net_connections("tcp"))
    ]
    broker.kill()
    said = run.wait()
    assert said.returncode == 0, said.stderr
    assert f"the {kind} broker exited and was restarted" in said.stderr
    assert (said.json_output["results"], said.json_output["lost"], said.json_output["broker"]) == (300, 0, kind)
    sandbox.wait_until_nothing_left()


def test_a_broker_that_cannot_be_had_back_is_one_clear_line(
    sandbox: ProcessSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_dependency("iotcore")
    monkeypatch.setattr(run_sites, "_PORT_WAIT_S", 0.2)
    pipeline = load_pipeline(
        write_pipeline_file(sandbox.folder, [stage_table("first", "double")], counting_source_table(1))
    )
    with set_up_brokers(pipeline, "embedded", None) as sites:
        site = sites.source_broker
        assert site.local_broker is not None
        os.kill(site.local_broker.pid, signal.SIGKILL)
        eventually("its end", lambda: site.has_exited)
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind(("127.0.0.1", site.local_broker.port))
            other.listen()
            with pytest.raises(SparseError) as caught:
                site.restart()
    assert caught.value.code == "BrokerGone"
    assert f"port {site.local_broker.port} on 127.0.0.1 is taken" in caught.value.fields["reason"]


def test_a_source_that_does_not_end_after_a_ctrl_c_is_killed(
    sandbox: ProcessSandbox, embedded_broker: LocalBroker
) -> None:
    path = write_pipeline_file(
        sandbox.folder, [stage_table("slow", "SleepExecutor", settings={"seconds": 60})], counting_source_table(3)
    )
    out = sandbox.folder / "out"
    words = ("run", path, "--broker", embedded_broker.address, "--json", "--out", out)
    run = sandbox.start(sys.executable, "-c", _IMPATIENT, *words)
    eventually("the source", (out / "results.jsonl").exists)
    os.killpg(run.pid, signal.SIGINT)
    told = f"the source did not exit within 1 s and was killed: there is no summary; the results so far are in {out}"
    eventually("the line", lambda: told in run.read_stderr(), timeout_s=20)
    said = run.wait(signal.SIGINT, timeout_s=20)  # nor wait for the stage
    assert (said.returncode, said.stdout) == (130, "")
    assert "Traceback" not in said.stderr
    sandbox.assert_nothing_left()
