"""The doctor at one broker: a good one, and brokers that are limited, access-controlled, of MQTT 3.1.1, or absent."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from brokers.doctor import checks, connection_checks, probe_client
from brokers.doctor.probe_client import BrokerProbe, CheckResult, open_probe
from brokers.doctor.runner import DoctorRun
from brokers.mqtt.publish_packet import MAX_REMAINING_BYTES
from brokers.protocol.broker_url import parse_address
from brokers.server.local_broker import start_broker
from tests.support.brokers.broker_kinds import WAIT_S
from tests.support.brokers.mosquitto import start_mosquitto
from tests.support.brokers.ports import free_port
from tests.support.brokers.retained_messages import retained_topics
from tests.support.environment.external_programs import require_dependency

SIZES = {"1 KiB": 1 << 10, "1 MiB": 1 << 20}
ANNOUNCED = ["MQTT 5", "TLS", "packet size", "in flight"]
TRIED = ["publish", "properties", "retained", "last will", "shared", "large packet", "burst", "session"]


def run_doctor(port: int) -> DoctorRun:
    """All checks, and measurements of small messages."""
    run = DoctorRun(f"mqtt://127.0.0.1:{port}", SIZES)
    asyncio.run(run.run())
    return run


def connect(address: str | int) -> dict[str, CheckResult]:
    """The results of connecting, by check."""

    async def test() -> list[CheckResult]:
        url = f"mqtt://127.0.0.1:{address}" if isinstance(address, int) else address
        async with open_probe(url) as probe:
            return (await connection_checks.check_connection(probe))[0]

    return {result.check: result for result in asyncio.run(test())}


def run_one(port: int, check: Callable[[BrokerProbe], Awaitable[CheckResult]]) -> CheckResult:
    async def test() -> CheckResult:
        async with open_probe(f"mqtt://127.0.0.1:{port}") as probe:
            (result,) = await checks.run_check("check", lambda: check(probe))
            return result

    return asyncio.run(test())


def wait_until_no_sessions(port: int) -> None:
    """Return when Mosquitto reports no disconnected clients."""

    async def test() -> None:
        async with BrokerProbe(parse_address(f"mqtt://127.0.0.1:{port}")).client() as client:
            await client.subscribe("$SYS/broker/clients/disconnected")
            while (message := await client.receive(WAIT_S)) is not None and bytes(message.payload) != b"0":
                pass
            assert message is not None

    asyncio.run(test())


# Features -----------------------------------------------------------------------------------------------------------


def test_default_mosquitto_passes_and_nothing_is_left_there(tmp_path: Path) -> None:
    with start_mosquitto(tmp_path, "sys_interval 1") as port:
        run = run_doctor(port)
        assert [(result.check, result.level) for result in run.results] == [(name, "ok") for name in ANNOUNCED + TRIED]
        assert [row.name for row in run.throughput] == list(SIZES)
        assert all(row.frames_per_s > 0 and row.round_trip_ms > 0 for row in run.throughput)
        assert retained_topics(port) == []
        wait_until_no_sessions(port)


def test_embedded_broker_passes() -> None:
    require_dependency("iotcore")
    with start_broker(kind="embedded") as broker:
        run = run_doctor(broker.port)
        assert [(result.check, result.level) for result in run.results] == [(name, "ok") for name in ANNOUNCED + TRIED]
        assert retained_topics(broker.port) == []


@pytest.mark.parametrize(
    ("setting", "check", "level", "fix"),
    [
        ("max_packet_size 20000", "packet size", "FAIL", f"max_packet_size {MAX_REMAINING_BYTES}"),
        ("max_packet_size 100000", "packet size", "warn", f"max_packet_size {MAX_REMAINING_BYTES}"),
        ("retain_available false", "retained", "FAIL", "retain_available true"),
        ("max_qos 0", "QoS", "FAIL", "max_qos 2"),
        ("max_inflight_messages 1", "in flight", "warn", "max_inflight_messages 100"),
    ],
)
def test_announced_limit_is_found_and_its_fix_works(
    tmp_path: Path, setting: str, check: str, level: str, fix: str
) -> None:
    with start_mosquitto(tmp_path, setting) as port:
        result = connect(port)[check]
        assert result.level == level
        assert fix in result.fix
    with start_mosquitto(tmp_path, fix) as port:
        assert connect(port).get(check, CheckResult("ok", check, "")).level == "ok"


def test_unavailable_features_are_not_tried_and_others_are(tmp_path: Path) -> None:
    with start_mosquitto(tmp_path, "max_packet_size 20000", "retain_available false", "max_qos 0") as port:
        run = run_doctor(port)
        failed = {result.check for result in run.results if result.level == "FAIL"}
        assert failed == {"packet size", "retained", "QoS"}, run.results
        assert {"publish", "properties", "shared", "burst"} <= {result.check for result in run.results}
        assert {"last will", "session"}.isdisjoint(result.check for result in run.results)
        assert len(run.throughput) == len(SIZES), "in chunks that fit"


@pytest.mark.parametrize(
    ("check", "level"), [(checks.check_burst, "FAIL"), (checks.check_session, "warn")], ids=["burst", "session"]
)
def test_short_queue_is_found_and_its_fix_works(
    tmp_path: Path, check: Callable[[BrokerProbe], Awaitable[CheckResult]], level: str
) -> None:
    with start_mosquitto(tmp_path, "max_queued_messages 10") as port:
        result = run_one(port, check)
        assert result.level == level
        assert "max_queued_messages 1000" in result.fix
    with start_mosquitto(tmp_path, "max_queued_messages 1000") as port:
        assert run_one(port, check).level == "ok"


def test_access_list_without_sparse_is_found_and_its_fix_works(tmp_path: Path) -> None:
    access = tmp_path / "acl"
    access.write_text("topic readwrite other/#\n")
    with start_mosquitto(tmp_path, f"acl_file {access}") as port:
        result = run_one(port, checks.check_delivery)
        assert (result.level, "sparse/#" in result.fix) == ("FAIL", True)
    access.write_text("topic readwrite sparse/#\n")
    with start_mosquitto(tmp_path, f"acl_file {access}") as port:
        assert run_one(port, checks.check_delivery).level == "ok"


def test_rejected_password_is_reported_and_not_printed(tmp_path: Path) -> None:
    with start_mosquitto(tmp_path, allow_anonymous=False) as port:
        (result,) = connect(f"mqtt://ann:secret@127.0.0.1:{port}").values()
        assert (result.check, result.level) == ("password", "FAIL")
        assert "'ann'" in result.message
        assert "secret" not in result.message + result.fix


def test_check_that_does_not_finish_fails() -> None:
    async def test() -> list[CheckResult]:
        return await checks.run_check("check", asyncio.Event().wait, 0.01)  # type: ignore[arg-type]

    (result,) = asyncio.run(test())
    assert (result.check, result.level) == ("check", "FAIL")


def test_topics_are_unique_to_a_run() -> None:
    probe = BrokerProbe(parse_address("mqtt://127.0.0.1"))
    assert probe.topic("a").startswith("sparse/doctor/doctor-")
    assert probe.topic("a") != BrokerProbe(parse_address("mqtt://127.0.0.1")).topic("a")


# Other servers ------------------------------------------------------------------------------------------------------

Answer = Callable[[bytes], bytes | None]


@asynccontextmanager
async def start_server(answer: Answer) -> AsyncIterator[str]:
    """A server that answers the first bytes of a client, or never if the answer is None."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            data = answer(await reader.read(200))
            if data is None:
                await reader.read()
            else:
                writer.write(data)
        finally:  # cancelled at the end of the test
            writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield f"mqtt://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def connect_to_server(answer: Answer) -> CheckResult:
    async def test() -> CheckResult:
        async with start_server(answer) as address, open_probe(address) as probe:
            (result,), limits = await connection_checks.check_connection(probe)
            assert limits is None
            return result

    return asyncio.run(test())


def mqtt311_server(code: int, refusal: bytes = b"\x20\x02\x00\x01") -> Answer:
    """Answers CONNECT of MQTT 3.1.1 with this return code, and of other versions with `refusal`."""
    return lambda connect: bytes((0x20, 2, 0, code)) if connect[2:9] == b"\x00\x04MQTT\x04" else refusal


@pytest.mark.parametrize(
    "refusal", [b"\x20\x02\x00\x01", b"\x20\x03\x00\x84\x00", b""], ids=["3.1.1", "MQTT 5", "disconnects"]
)
def test_broker_of_mqtt_311_is_recognized(refusal: bytes) -> None:
    result = connect_to_server(mqtt311_server(0, refusal))
    assert (result.check, result.level) == ("MQTT 5", "FAIL")
    assert "supports only MQTT 3.1.1" in result.message
    assert "enable MQTT 5" in result.fix


def test_broker_of_mqtt_311_may_require_a_password() -> None:
    assert "requires a user name and password" in connect_to_server(mqtt311_server(5)).message


@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"", b"\x20\x03\x00\x89\x00"], ids=["HTTP", "disconnects", "busy"]
)
def test_server_that_is_not_a_usable_broker_is_unreachable(answer: bytes) -> None:
    result = connect_to_server(lambda _: answer)
    assert (result.check, result.level) == ("reachable", "FAIL")
    assert "sparse broker" in result.fix


def test_closed_port_is_unreachable() -> None:
    (result,) = connect(free_port()).values()
    assert (result.check, result.level) == ("reachable", "FAIL")
    assert "refused" in result.message


def test_server_that_never_answers_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_client, "CONNECT_TIMEOUT_S", 0.1)
    monkeypatch.setattr(connection_checks, "MQTT311_TIMEOUT_S", 0.1)
    assert "no answer within 0.1 s" in connect_to_server(lambda _: None).message


@pytest.mark.parametrize(("days", "level"), [(10, "warn"), (100, "ok")])
def test_certificate_is_judged_by_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, days: int, level: str
) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    key = tmp_path / "key.pem"
    cert = tmp_path / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", str(days), "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    subprocess.run(command, check=True, capture_output=True)
    with start_mosquitto(tmp_path, f"certfile {cert}", f"keyfile {key}") as port:
        (untrusted,) = connect(f"mqtts://127.0.0.1:{port}").values()
        assert (untrusted.check, untrusted.level) == ("TLS", "FAIL")
        assert "not trusted" in untrusted.message
        monkeypatch.setenv("SSL_CERT_FILE", str(cert))
        result = connect(f"mqtts://127.0.0.1:{port}")["TLS"]
        assert (result.level, result.message[:9]) == (level, "TLSv1.3, ")
