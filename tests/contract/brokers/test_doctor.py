"""The doctor at one broker: what it says of brokers of all kinds, good, crippled, locked, older, and absent."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from brokers.doctor import checks as probes
from brokers.doctor import mqtt311 as older
from brokers.doctor import probe_client as visitor
from brokers.doctor import verdicts as doctor
from brokers.doctor.check_result import CheckResult
from brokers.doctor.probe_client import BrokerProbe
from brokers.doctor.runner import DoctorOptions, DoctorRun
from brokers.mqtt.publish_packet import MAX_REMAINING_BYTES
from brokers.server.local_broker import start_broker
from tests.support.brokers.mosquitto import start_mosquitto
from tests.support.brokers.ports import free_port
from tests.support.brokers.retained_messages import retained_topics
from tests.support.environment.external_programs import require_dependency

SMALL = {"1 KiB": 1 << 10, "1 MiB": 1 << 20}


def examined(port: int) -> DoctorRun:
    """A whole examination, of small messages."""
    found = DoctorRun(DoctorOptions(f"mqtt://127.0.0.1:{port}", SMALL), lambda _: None)
    asyncio.run(found.run())
    return found


def greeted(address: str | int) -> dict[str, CheckResult]:
    """What a greeting alone finds."""

    async def test() -> list[CheckResult]:
        async with BrokerProbe.from_address(
            f"mqtt://127.0.0.1:{address}" if isinstance(address, int) else address
        ) as visit:
            return (await probes.check_connection(visit))[0]

    return by_what(asyncio.run(test()))


def probed(port: int, probe: Callable[[BrokerProbe], Awaitable[list[CheckResult]]]) -> CheckResult:
    async def test() -> CheckResult:
        async with BrokerProbe.from_address(f"mqtt://127.0.0.1:{port}") as visit:
            (found,) = await probes.run_check("probe", lambda: probe(visit))
            return found

    return asyncio.run(test())


def by_what(findings: list[CheckResult]) -> dict[str, CheckResult]:
    return {finding.check: finding for finding in findings}


def sessions_at(port: int) -> int:
    """How many clients Mosquitto knows that are not connected."""

    async def test() -> int:
        async with BrokerProbe.from_address(f"mqtt://127.0.0.1:{port}").client() as asking:
            await asking.subscribe("$SYS/broker/clients/disconnected")
            end_s = time.monotonic() + 5
            count = -1
            while count and time.monotonic() < end_s:  # it is told once in a while
                heard = await asking.receive(1.5)
                count = int(bytes(heard.payload)) if heard else count
            return count

    return asyncio.run(test())


ALL = ["MQTT 5", "TLS", "packet size", "in flight", "publish", "properties", "retained", "last will", "shared"]
ALL += ["largest", "burst", "session"]


def test_a_mosquitto_as_it_comes_is_good_and_nothing_is_left_there(tmp_path: Path) -> None:
    with start_mosquitto(tmp_path, "sys_interval 1") as port:
        found = examined(port)
        assert [(each.check, each.level) for each in found.results] == [(what, "ok") for what in ALL]
        assert [row.name for row in found.throughput] == list(SMALL)
        assert all(row.frames_per_s > 0 and row.round_trip_ms > 0 for row in found.throughput)
        assert retained_topics(port) == []
        assert sessions_at(port) == 0


def test_the_embedded_broker_is_good_too() -> None:
    require_dependency("iotcore")
    with start_broker(kind="embedded") as broker:
        found = examined(broker.port)
        assert [(each.check, each.level) for each in found.results] == [(what, "ok") for what in ALL]
        assert retained_topics(broker.port) == []


@pytest.mark.parametrize(
    ("lines", "what", "level", "mend"),
    [
        ("max_packet_size 20000", "packet size", "FAIL", f"max_packet_size {MAX_REMAINING_BYTES}"),
        ("max_packet_size 100000", "packet size", "warn", f"max_packet_size {MAX_REMAINING_BYTES}"),
        ("retain_available false", "retained", "FAIL", "retain_available true"),
        ("max_qos 0", "QoS", "FAIL", "max_qos 2"),
        ("max_inflight_messages 1", "in flight", "warn", "max_inflight_messages 100"),
    ],
)
def test_what_a_broker_announces_is_judged_and_mended(
    tmp_path: Path, lines: str, what: str, level: str, mend: str
) -> None:
    with start_mosquitto(tmp_path, lines) as port:
        found = greeted(port)[what]
        assert found.level == level
        assert mend in found.fix
    with start_mosquitto(tmp_path, mend) as port:  # the line that mends it does
        assert greeted(port).get(what, CheckResult("ok", what, "")).level == "ok"


@pytest.mark.parametrize("lines", ["max_packet_size 20000", "retain_available false", "max_qos 0"])
def test_what_a_broker_says_it_cannot_is_not_tried_and_the_rest_is(tmp_path: Path, lines: str) -> None:
    with start_mosquitto(tmp_path, lines) as port:
        found = examined(port)
        assert [each.level for each in found.results].count("FAIL") == 1, found.results
        assert {"publish", "properties", "shared", "burst"} <= set(by_what(found.results))
        assert len(found.throughput) == len(SMALL)  # in chunks that fit


@pytest.mark.parametrize(
    ("probe", "level"), [(probes.check_burst, "FAIL"), (probes.check_session, "warn")], ids=["burst", "session"]
)
def test_a_short_queue_loses_what_waits_for_a_client(
    tmp_path: Path, probe: Callable[[BrokerProbe], Awaitable[list[CheckResult]]], level: str
) -> None:
    with start_mosquitto(tmp_path, "max_queued_messages 10") as port:
        found = probed(port, probe)
        assert found.level == level
        assert "max_queued_messages 1000" in found.fix
    with start_mosquitto(tmp_path, "max_queued_messages 1000") as port:
        assert probed(port, probe).level == "ok"


def test_an_access_list_that_shuts_sparse_out_is_told(tmp_path: Path) -> None:
    access = tmp_path / "acl"
    access.write_text("topic readwrite other/#\n")
    with start_mosquitto(tmp_path, f"acl_file {access}") as port:
        found = probed(port, probes.check_delivery)
        assert (found.level, "sparse/#" in found.fix) == ("FAIL", True)
    access.write_text("topic readwrite sparse/#\n")
    with start_mosquitto(tmp_path, f"acl_file {access}") as port:
        assert probed(port, probes.check_delivery).level == "ok"


def test_a_broker_that_wants_a_password_says_so_and_shows_none(tmp_path: Path) -> None:
    with start_mosquitto(tmp_path, allow_anonymous=False) as port:
        (found,) = greeted(f"mqtt://ann:secret@127.0.0.1:{port}").values()
        assert (found.check, found.level) == ("password", "FAIL")
        assert "'ann'" in found.message
        assert "secret" not in found.message + found.fix


# Older, other, absent ---------------------------------------------------------------------------------------------


@asynccontextmanager
async def server(answers: Callable[[bytes], bytes | None]) -> AsyncIterator[str]:
    """Something that answers what it is told to, to the first that it reads; None: never."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            answer = answers(await reader.read(200))
            if answer is None:
                await reader.read()
            else:
                writer.write(answer)
        finally:  # a test that is over ends it while it waits
            writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listening:
        yield f"mqtt://127.0.0.1:{listening.sockets[0].getsockname()[1]}"


def greeted_by(answers: Callable[[bytes], bytes | None]) -> CheckResult:
    async def test() -> CheckResult:
        async with server(answers) as address, BrokerProbe.from_address(address) as visit:
            (found,), limits = await probes.check_connection(visit)
            assert limits is None
            return found

    return asyncio.run(test())


def only_311(code: int, refusal: bytes = b"\x20\x02\x00\x01") -> Callable[[bytes], bytes]:
    """A broker of MQTT 3.1.1: how it answers to its own version, and how to another."""
    return lambda connect: bytes((0x20, 2, 0, code)) if connect[2:9] == b"\x00\x04MQTT\x04" else refusal


@pytest.mark.parametrize("refusal", [b"\x20\x02\x00\x01", b"\x20\x03\x00\x84\x00", b""])
def test_a_broker_that_speaks_only_311_is_one_clear_line(refusal: bytes) -> None:
    found = greeted_by(only_311(0, refusal))
    assert (found.check, found.level) == ("MQTT 5", "FAIL")
    assert "speaks only MQTT 3.1.1" in found.message
    assert "enable MQTT 5" in found.fix


def test_a_broker_that_speaks_only_311_may_want_a_password_too() -> None:
    assert "wants a user and password" in greeted_by(only_311(5)).message


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"", b"\x20\x03\x00\x89\x00"])
def test_what_is_no_broker_or_lets_nobody_in_is_told(answer: bytes) -> None:
    found = greeted_by(lambda _: answer)
    assert (found.check, found.level) == ("reachable", "FAIL")
    assert "sparse broker" in found.fix


def test_nothing_that_listens_is_told() -> None:
    (found,) = greeted(free_port()).values()
    assert (found.check, found.level) == ("reachable", "FAIL")
    assert "refused" in found.message


def test_something_that_never_answers_takes_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visitor, "CONNECT_TIMEOUT_S", 0.3)
    monkeypatch.setattr(older, "CONNACK_TIMEOUT_S", 0.3)
    began_s = time.monotonic()
    found = greeted_by(lambda _: None)
    assert "no answer within 0.3 s" in found.message
    assert time.monotonic() - began_s < 3


def test_a_probe_that_never_ends_is_ended() -> None:
    async def test() -> list[CheckResult]:
        return await probes.run_check("it", asyncio.Event().wait, 0.1)  # type: ignore[arg-type]

    (found,) = asyncio.run(test())
    assert (found.check, found.level) == ("it", "FAIL")


# TLS --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("days", "level"), [(10, "warn"), (100, "ok")])
def test_a_certificate_is_judged_by_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, days: int, level: str
) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", str(days), "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    subprocess.run(command, check=True, capture_output=True)
    with start_mosquitto(tmp_path, f"certfile {cert}", f"keyfile {key}") as port:
        (stranger,) = greeted(f"mqtts://127.0.0.1:{port}").values()
        assert (stranger.check, stranger.level) == ("TLS", "FAIL")
        assert "not trusted" in stranger.message
        monkeypatch.setenv("SSL_CERT_FILE", str(cert))
        found = greeted(f"mqtts://127.0.0.1:{port}")["TLS"]
        assert (found.level, found.message[:9]) == (level, "TLSv1.3, ")


def test_the_names_of_its_topics_are_no_site_of_anybodys() -> None:
    visit = BrokerProbe.from_address("mqtt://127.0.0.1")
    assert visit.topic("a").startswith("sparse/doctor/doctor-")
    assert visit.topic("a") != BrokerProbe.from_address("mqtt://127.0.0.1").topic("a")
    assert doctor.MIN_PACKET_BYTES < doctor.CHUNK_PACKET_BYTES
