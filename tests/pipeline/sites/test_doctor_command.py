"""`sparse broker doctor` as it is typed: its output, its exit status, and the processes it leaves."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from brokers.doctor.probe_client import BrokerProbe
from brokers.protocol.broker_url import parse_address
from tests.support.brokers.mosquitto import start_mosquitto
from tests.support.brokers.ports import free_port
from tests.support.pipelines.pipeline_files import stage_table, write_pipeline_file
from tests.support.pipelines.processes import ProcessSandbox


def doctor(sandbox: ProcessSandbox, port: int, *more: str | Path) -> tuple[int, str, str]:
    said = sandbox.start_sparse("broker", "doctor", f"mqtt://127.0.0.1:{port}", *more).wait()
    return said.returncode, said.stdout, said.stderr


def test_a_good_broker_is_status_0_with_a_line_for_each_finding_and_a_table(
    sandbox: ProcessSandbox, tmp_path: Path
) -> None:
    with start_mosquitto(tmp_path) as port:
        status, out, err = doctor(sandbox, port)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert lines[0].startswith(f"ok    MQTT 5       mqtt://127.0.0.1:{port} ")
    assert [line.split("  ")[0] for line in lines if "iB  " in line] == ["1 KiB", "64 KiB", "1 MiB", "4 MiB", "16 MiB"]
    assert lines[-1].startswith("Sparse works with this broker: ")
    sandbox.assert_nothing_left()


def test_a_broker_that_lacks_something_is_status_1_and_json_comes_last(sandbox: ProcessSandbox, tmp_path: Path) -> None:
    stages = [stage_table("head", wire="float16"), stage_table("tail")]
    path = write_pipeline_file(tmp_path, stages, model="vgg11-small", cuts=[6])
    with start_mosquitto(tmp_path, "retain_available false") as port:
        said = sandbox.start_sparse("broker", "doctor", f"mqtt://127.0.0.1:{port}", "--pipeline", path, "--json").wait()
    assert said.returncode == 1
    assert said.stdout.count("\n") == 1
    assert "FAIL  retained" in said.stderr
    answer = said.json_output
    assert answer["usable"] is False
    (found,) = [each for each in answer["checks"] if each["level"] == "FAIL"]
    assert (found["check"], "retain_available true" in found["fix"]) == ("retained", True)
    (row,) = answer["throughput"]
    assert (row["name"], row["size_bytes"]) == ("head to tail", 2 * 128 * 8 * 8)


def test_nobody_there_is_status_1(sandbox: ProcessSandbox) -> None:
    status, out, _ = doctor(sandbox, free_port())
    assert status == 1
    assert out.startswith("FAIL  reachable")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_that_is_told_to_leave_leaves_nothing_behind(
    sandbox: ProcessSandbox, tmp_path: Path, number: signal.Signals
) -> None:
    async def test(port: int) -> None:
        async with BrokerProbe(parse_address(f"mqtt://127.0.0.1:{port}")).client() as witness:
            await witness.subscribe("sparse/doctor/+/retained")
            running = sandbox.start_sparse("broker", "doctor", f"mqtt://127.0.0.1:{port}")
            heard = await witness.receive(60)
            assert heard is not None
            said = await asyncio.to_thread(running.wait, number)
            assert (said.returncode, "Traceback" in said.stderr) == (130, False)
            assert "this broker" not in said.stdout
        async with BrokerProbe(parse_address(f"mqtt://127.0.0.1:{port}")).client() as late:
            await late.subscribe("sparse/#")
            assert await late.receive(0.5) is None

    with start_mosquitto(tmp_path) as port:
        asyncio.run(test(port))
    sandbox.assert_nothing_left()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "no broker address"),
        (("localhost",), "it has no scheme"),
        (("mqtt://127.0.0.1", "--across", "nowhere"), "it has no scheme"),
        (("mqtt://127.0.0.1", "--across", "mqtt://127.0.0.1:2"), "--from SITE --to SITE"),
        (("mqtt://127.0.0.1", "--across", "mqtt://h", "--from", "a", "--to", "a"), "got 'a' and 'a'"),
        (("mqtt://127.0.0.1", "--across", "mqtt://h", "--from", "a/b", "--to", "c"), "'a/b' is not a name"),
        (("mqtt://127.0.0.1", "--pipeline", "missing.toml"), "missing.toml: no such file"),
    ],
)
def test_bad_usage_is_one_line_and_status_2(sandbox: ProcessSandbox, arguments: tuple[str, ...], told: str) -> None:
    said = sandbox.start_sparse("broker", "doctor", *arguments).wait()
    assert (said.returncode, said.stdout, said.stderr.count("\n")) == (2, "", 1)
    assert told in said.stderr


def test_cuts_that_do_not_fit_the_network_are_one_line_that_names_the_file(
    sandbox: ProcessSandbox, tmp_path: Path
) -> None:
    path = write_pipeline_file(tmp_path, [stage_table("head"), stage_table("tail")], model="vgg11-small", cuts=[999])
    said = sandbox.start_sparse("broker", "doctor", "mqtt://127.0.0.1:1", "--pipeline", path).wait()
    assert (said.returncode, said.stderr.count("\n")) == (2, 1)
    assert said.stderr.startswith(f"sparse: {path}: pipeline.cuts: ")


def test_the_address_of_the_environment_is_used_and_its_password_is_not_shown(
    tmp_path: Path, sandbox: ProcessSandbox
) -> None:
    with start_mosquitto(tmp_path, allow_anonymous=False) as port:
        sandbox._environment["SPARSE_BROKER"] = f"mqtt://ann:secret@127.0.0.1:{port}"
        said = sandbox.start_sparse("broker", "doctor", "--json").wait()
    assert said.returncode == 1
    assert "'ann'" in said.stderr
    assert "secret" not in said.stdout + said.stderr
