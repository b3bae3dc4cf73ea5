"""What `sparse run` does with its broker and its processes: hands over, watches, starts again, tells."""

from __future__ import annotations

import os
import signal
import socket
import sys

import pytest

from brokers.config.pipeline_file import load_pipeline
from brokers.server.local_broker import LocalBroker
from monitor.errors import BrokerGone
from monitor.launch import broker as run_broker
from monitor.launch.sites import find_sites
from tests.support.environment.external_programs import need
from tests.support.pipelines.pipeline_files import counter, pipeline_file, stage
from tests.support.pipelines.processes import Machine, eventually

# As the command, but for the time that the source gets to end.
_IMPATIENT = "import sys, monitor.launch.run; monitor.launch.run.END_S = 1.0; from brokers.cli import main; sys.exit(main(sys.argv[1:]))"


def test_a_password_is_shown_to_nobody(box: Machine, embedded: LocalBroker) -> None:
    """Not in the summary, not in the live view, not in the arguments of processes, which all users can list."""
    path = pipeline_file(box.folder, [stage("first", "double")], counter(40, every_s=0.05))
    out = box.folder / "out"
    address = embedded.address.replace("://", "://me:secret@")
    run = box.sparse("run", path, "--broker", address, "--json", "--out", out)
    eventually("the source", lambda: box.find("source"))
    words = [" ".join(process.cmdline()) for process in box.alive() if process.pid != run.pid]
    assert len(words) == 3  # the stage, the source, the monitor
    assert "secret" not in " ".join(words)
    said = run.end()
    assert said.status == 0, said.err
    assert said.answer["broker"] == embedded.address.replace("://", "://me@")
    written = [path.read_bytes() for path in out.rglob("*") if path.is_file()]
    assert "secret" not in said.out + said.err
    assert b"secret" not in b"".join(written)
    box.nothing_is_left()


def test_a_folder_that_holds_a_run_is_not_taken_for_another_one(box: Machine, embedded: LocalBroker) -> None:
    path = pipeline_file(box.folder, [stage("first", "double")], counter(3))
    asked = ("run", path, "--broker", embedded.address, "--json", "--out", box.folder / "out")
    own = {"SPARSE_MONITOR": ""}
    assert box.sparse(*asked, environment=own).end().status == 0
    said = box.sparse(*asked, environment=own).end()
    assert said.status == 2
    assert "it holds a run already (telemetry.sqlite): name another folder" in said.err
    box.nothing_is_left()


@pytest.mark.parametrize("says", ["here I am", '{"a": 1}'])
def test_what_a_source_of_ones_own_prints_is_no_summary(box: Machine, embedded: LocalBroker, says: str) -> None:
    source = {"kind": "tests.support.pipelines.example_code:Talker", "name": "talker"}
    for fails in (True, False):
        settings = {"count": 2, "says": says, "fails": fails}
        path = pipeline_file(box.folder, [stage("first", "double")], {**source, "settings": settings})
        out = box.folder / f"out-{fails}"
        said = box.sparse("run", path, "--broker", embedded.address, "--json", "--out", out).end()
        assert "Traceback" not in said.err
        if fails:
            assert (said.status, said.out) == (1, "")
            told = f"sparse: source ended with status 1: the cable is out (its log: {out}/logs/source.log)"
            assert said.err.splitlines()[-1] == told
        else:
            assert said.status == 0, said.err
            assert said.answer["results"] == 2


def test_the_broker_that_was_asked_for_goes_before_the_one_in_the_file(box: Machine, embedded: LocalBroker) -> None:
    path = pipeline_file(box.folder, [stage("first", "double")], counter(3))
    path.write_text(path.read_text() + '[[site]]\nname = "local"\nbroker = "mqtt://127.0.0.1:9"\n')
    said = box.sparse("run", path, "--broker", embedded.address, "--json", "--out", box.folder / "out").end()
    assert said.status == 0, said.err
    assert said.answer["results"] == 3


@pytest.mark.parametrize("kind", ["embedded", "mosquitto"])
def test_a_broker_of_the_runs_own_that_dies_is_started_again_and_nothing_is_lost(box: Machine, kind: str) -> None:
    need({"embedded": "iotcore"}.get(kind, kind))
    path = pipeline_file(box.folder, [stage("first", "double")], counter(300, every_s=0.01))
    out = box.folder / "out"
    run = box.sparse("run", path, "--broker", kind, "--json", "--out", out)
    results = out / "results.jsonl"
    eventually("some results", lambda: results.exists() and results.read_text().count("\n") >= 5)
    (broker,) = [each for each in box.alive() if any(line.status == "LISTEN" for line in each.net_connections("tcp"))]
    broker.kill()
    said = run.end()
    assert said.status == 0, said.err
    assert f"the {kind} broker ended by itself, and was started again" in said.err
    assert (said.answer["results"], said.answer["lost"], said.answer["broker"]) == (300, 0, kind)
    box.nothing_is_left(within_s=5)


def test_a_broker_that_cannot_be_had_back_is_one_clear_line(box: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    need("iotcore")
    monkeypatch.setattr(run_broker, "_PORT_WAIT_S", 0.2)
    pipeline = load_pipeline(pipeline_file(box.folder, [stage("first", "double")], counter(1)))
    with find_sites(pipeline, "embedded", None) as sites:
        site = sites.main
        assert site.own is not None
        os.kill(site.own.pid, signal.SIGKILL)
        eventually("its end", lambda: site.ended)
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind(("127.0.0.1", site.own.port))
            other.listen()
            with pytest.raises(BrokerGone) as caught:
                site.restart()
    assert f"cannot be started again: port {site.own.port} on 127.0.0.1 is taken" in str(caught.value)


def test_a_source_that_does_not_end_after_a_ctrl_c_is_killed(box: Machine, embedded: LocalBroker) -> None:
    path = pipeline_file(box.folder, [stage("slow", "Slow", settings={"seconds": 60})], counter(3))
    out = box.folder / "out"
    words = ("run", path, "--broker", embedded.address, "--json", "--out", out)
    run = box.start(sys.executable, "-c", _IMPATIENT, *words)
    eventually("the source", (out / "results.jsonl").exists)
    os.killpg(run.pid, signal.SIGINT)
    told = f"the source did not end within 1 s and was killed: there is no summary, what came of it so far is in {out}"
    eventually("the line", lambda: told in run.said(), timeout_s=20)
    said = run.end(signal.SIGINT, timeout_s=20)  # nor wait for the stage
    assert (said.status, said.out) == (130, "")
    assert "Traceback" not in said.err
    box.nothing_is_left()
