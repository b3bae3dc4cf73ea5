"""`sparse broker doctor`: its output, its exit status, and the messages it leaves at the broker."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

from brokers.doctor.probe_client import BrokerProbe
from brokers.protocol.broker_url import parse_address
from tests.support.brokers.mosquitto import start_mosquitto
from tests.support.brokers.ports import free_port
from tests.support.pipelines.pipeline_files import stage_table, write_pipeline_file
from tests.support.pipelines.processes import PROCESS_TIMEOUT_S, ProcessSandbox


def test_usable_broker_is_status_0(sandbox: ProcessSandbox, tmp_path: Path) -> None:
    with start_mosquitto(tmp_path) as port:
        result = sandbox.run_sparse("broker", "doctor", f"mqtt://127.0.0.1:{port}")
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert lines[0].startswith(f"ok    MQTT 5       mqtt://127.0.0.1:{port} ")
    sizes = [line.split("  ")[0] for line in lines if "iB  " in line]
    assert sizes == ["1 KiB", "64 KiB", "1 MiB", "4 MiB", "16 MiB"]
    assert lines[-1].startswith("Sparse works with this broker: ")
    sandbox.assert_nothing_left()


def test_missing_feature_is_status_1_and_json_comes_last(sandbox: ProcessSandbox, tmp_path: Path) -> None:
    stages = [stage_table("head", wire="float16"), stage_table("tail")]
    path = write_pipeline_file(tmp_path, stages, model="vgg11-small", cuts=[6])
    with start_mosquitto(tmp_path, "retain_available false") as port:
        address = f"mqtt://127.0.0.1:{port}"
        result = sandbox.run_sparse("broker", "doctor", address, "--pipeline", path, "--json")
    assert result.returncode == 1
    assert result.stdout.count("\n") == 1
    assert "FAIL  retained" in result.stderr
    report = result.json_output
    assert report["usable"] is False
    (failed,) = [check for check in report["checks"] if check["level"] == "FAIL"]
    assert failed["check"] == "retained"
    assert "retain_available true" in failed["fix"]
    (row,) = report["throughput"]
    assert (row["name"], row["size_bytes"]) == ("head to tail", 2 * 128 * 8 * 8)


def test_unreachable_broker_is_status_1(sandbox: ProcessSandbox) -> None:
    result = sandbox.run_sparse("broker", "doctor", f"mqtt://127.0.0.1:{free_port()}")
    assert result.returncode == 1
    assert result.stdout.startswith("FAIL  reachable")


def test_interrupted_doctor_leaves_no_message(sandbox: ProcessSandbox, tmp_path: Path) -> None:
    async def main(address: str) -> None:
        probe = BrokerProbe(parse_address(address))
        async with probe.client() as client:
            await client.subscribe("sparse/doctor/+/retained")
            doctor = sandbox.start_sparse("broker", "doctor", address)
            assert await client.receive(PROCESS_TIMEOUT_S) is not None
            result = await asyncio.to_thread(doctor.wait, signal.SIGINT)
            assert result.returncode == 130
            assert "Traceback" not in result.stderr
            assert "this broker" not in result.stdout
        async with probe.client() as client:
            await client.subscribe("sparse/#")  # retained messages come at once
            assert await client.receive(0.5) is None

    with start_mosquitto(tmp_path) as port:
        asyncio.run(main(f"mqtt://127.0.0.1:{port}"))
    sandbox.assert_nothing_left()


def test_cut_that_does_not_exist_is_one_line(sandbox: ProcessSandbox, tmp_path: Path) -> None:
    path = write_pipeline_file(tmp_path, [stage_table("head"), stage_table("tail")], model="vgg11-small", cuts=[999])
    result = sandbox.run_sparse("broker", "doctor", "mqtt://127.0.0.1:1", "--pipeline", path)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.startswith(f"sparse: {path}: pipeline.cuts: ")


def test_password_of_the_environment_is_not_shown(sandbox: ProcessSandbox, tmp_path: Path) -> None:
    with start_mosquitto(tmp_path, allow_anonymous=False) as port:
        environment = {"SPARSE_BROKER": f"mqtt://ann:secret@127.0.0.1:{port}"}
        result = sandbox.run_sparse("broker", "doctor", "--json", environment=environment)
    assert result.returncode == 1
    assert "'ann'" in result.stderr
    assert "secret" not in result.stdout + result.stderr
