"""What only a transport over a socket can meet: brokers that refuse, lie, hang or are slow; TLS; Unix sockets."""

from __future__ import annotations

import asyncio
import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import pytest

from brokers.errors import BadFile, BrokerUnreachable
from brokers.mqtt import client as mqtt
from brokers.mqtt import socket_loop as pump
from brokers.mqtt.client import MqttTransport
from brokers.mqtt.connect_errors import OperationRefused
from brokers.mqtt.socket_connect import TlsConfig, connect_socket
from brokers.protocol.broker_url import BrokerAddress
from brokers.server import mosquitto_conf as mosquitto
from brokers.server.local_broker import start_broker
from tests.contract.conftest import require_mosquitto
from tests.support.brokers.broker_kinds import DeliveryQueue, run_async
from tests.support.brokers.ports import free_port

CONNACK = b"\x20\x03\x00\x00\x00"
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def fake_broker(serve: Serve) -> AsyncIterator[str]:
    """Serve connections with a function until the end of the block; gives the address."""
    serving: set[asyncio.Task[None]] = set()

    async def guarded(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        serving.add(task)
        try:
            await serve(reader, writer)
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(guarded, "127.0.0.1", 0)
    try:
        yield f"mqtt://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        if serving:
            await asyncio.wait(serving, timeout=5)


@contextmanager
def own_mosquitto(folder: Path, config: str) -> Iterator[subprocess.Popen[bytes]]:
    require_mosquitto()
    path = folder / "mosquitto.conf"
    path.write_text(f"user {getpass.getuser()}\n{config}")  # else it leaves root, and may not read the test's folder
    process = subprocess.Popen([mosquitto.find_mosquitto() or "", "-c", str(path)], stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def connect_error_text(address: str, timeout_s: float = 5.0, tls: TlsConfig = TlsConfig()) -> str:
    with pytest.raises(BrokerUnreachable) as caught:
        await MqttTransport(address, tls=tls).connect(timeout_s=timeout_s)
    line = str(caught.value)
    assert "\n" not in line
    return line


async def until_it_answers(address: str, tls: TlsConfig = TlsConfig()) -> MqttTransport:
    end_s = time.monotonic() + 10
    while True:
        transport = MqttTransport(address, tls=tls)
        try:
            await transport.connect(timeout_s=2)
            return transport
        except BrokerUnreachable:
            if time.monotonic() > end_s:
                raise
            await asyncio.sleep(0.05)


def test_a_port_where_nothing_listens_is_told_at_once() -> None:
    async def test() -> None:
        begin = time.monotonic()
        line = await connect_error_text(f"mqtt://127.0.0.1:{free_port()}")
        assert "refused" in line
        assert time.monotonic() - begin < 2

    run_async(test())


def test_a_host_that_does_not_exist_is_told() -> None:
    async def test() -> None:
        assert "no-such-host.invalid" in await connect_error_text("mqtt://no-such-host.invalid")

    run_async(test())


def test_a_server_that_is_silent_is_given_up_in_time() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async def test() -> None:
        async with fake_broker(silent) as address:
            assert "no answer within 0.3 s" in await connect_error_text(address, 0.3)

    run_async(test())


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "is it an MQTT 5 broker?"),
        (b"", "is it an MQTT 5 broker?"),
        (b"\x20\x02\x00\x01", "nsupported protocol version"),  # MQTT 3.1.1: unacceptable protocol version
        (b"\x20\x03\x00\x84\x00", "nsupported protocol version"),
        (b"\x20\x03\x00\x89\x00", "erver busy"),
        (b"\x20\x03\x00", "is it an MQTT 5 broker?"),
    ],
)
def test_a_server_that_does_not_speak_mqtt_5_is_told_plainly(answer: bytes, told: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(answer)
        await writer.drain()

    async def test() -> None:
        async with fake_broker(serve) as address:
            assert told in await connect_error_text(address)

    run_async(test())


def test_the_plain_listener_of_the_embedded_broker_is_for_mqtt_311_only() -> None:
    pytest.importorskip("iotcore")

    async def test() -> None:
        with start_broker(kind="embedded", mqtt311_port=0) as broker:
            await connect_error_text(f"mqtt://127.0.0.1:{broker.mqtt311_port}", 2)

    run_async(test())


def test_a_wrong_password_is_told_and_not_shown(tmp_path: Path) -> None:
    port = free_port()

    async def test() -> None:
        with own_mosquitto(tmp_path, f"listener {port} 127.0.0.1\nallow_anonymous false\n"):
            end_s = time.monotonic() + 5
            line = ""
            while "ot authorized" not in line and time.monotonic() < end_s:
                line = await connect_error_text(f"mqtt://ann:secret@127.0.0.1:{port}")
            assert "ot authorized" in line
            assert "secret" not in line

    run_async(test())


def test_a_subscription_that_is_refused_is_an_error_and_forgotten() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1000)
        writer.write(CONNACK)
        subscribe = await reader.read(1000)
        writer.write(b"\x90\x04" + subscribe[2:4] + b"\x00\x87")
        await reader.read(1000)

    async def test() -> None:
        async with fake_broker(serve) as address:
            line = MqttTransport(address)
            await line.connect()
            with pytest.raises(OperationRefused, match="'a/b': Not authorized"):
                await line.subscribe("a/b", DeliveryQueue())
            assert "a/b" not in line._subscriptions
            await line.close()

    run_async(test())


@pytest.mark.parametrize("problem", [None, BadFile("ca.pem", "it is being replaced"), ValueError("a mistake of ours")])
def test_whatever_goes_wrong_while_reconnecting_it_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, problem: Exception | None
) -> None:
    """None: a subscription that stood is refused, once, by a broker that has forgotten who may what."""
    greeted, dialled = 0, 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal greeted
        await reader.read(1000)
        greeted += 1
        writer.write(CONNACK)
        subscribe = await reader.read(1000)
        refuse = problem is None and greeted == 2
        writer.write(b"\x90\x04" + subscribe[2:4] + (b"\x00\x87" if refuse else b"\x00\x00"))
        if greeted == 1:
            await asyncio.sleep(0.05)
        else:
            await reader.read()

    async def unlucky(address: BrokerAddress, tls: TlsConfig) -> socket.socket:
        nonlocal dialled
        dialled += 1
        if dialled == 2 and problem is not None:
            raise problem
        return await connect_socket(address, tls)

    async def test() -> None:
        monkeypatch.setattr(mqtt, "connect_socket", unlucky)
        async with fake_broker(serve) as address:
            line = MqttTransport(address)
            await line.connect()
            await line.subscribe("a/b", DeliveryQueue())
            assert line._connection is not None
            await asyncio.shield(line._connection.lost)
            await asyncio.wait_for(line.publish("t", b"x"), 5)
            await line.close()

    run_async(test())
    assert dialled == 3


def test_no_more_than_the_receive_maximum_is_unacknowledged() -> None:
    most = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal most
        await reader.read(1000)
        writer.write(b"\x20\x06\x00\x00\x03\x21\x00\x02")  # Receive Maximum 2
        waiting: list[bytes] = []
        while True:
            try:
                packet = await asyncio.wait_for(reader.readexactly(8), 0.1)
                assert packet[:5] == b"\x32\x06\x00\x01t"
                waiting.append(packet[5:7])
                most = max(most, len(waiting))
            except TimeoutError:
                if waiting:
                    writer.write(b"\x40\x02" + waiting.pop(0))
            except (asyncio.IncompleteReadError, AssertionError):
                return

    async def test() -> None:
        async with fake_broker(serve) as address:
            line = MqttTransport(address)
            await line.connect()
            assert line.limits.receive_maximum == 2
            await asyncio.gather(*(line.publish("t", qos=1) for _ in range(5)))
            await line.close()

    run_async(test())
    assert most == 2


def test_a_broker_that_hangs_is_noticed_and_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pump, "TICK_S", 0.1)
    port = free_port()

    async def test() -> None:
        with own_mosquitto(tmp_path, f"listener {port} 127.0.0.1\nallow_anonymous true\n") as broker:
            line, inbox, again = await until_it_answers(f"mqtt://127.0.0.1:{port}"), DeliveryQueue(), asyncio.Event()

            async def back() -> None:
                again.set()

            line.on_reconnect(back)
            await line.subscribe("t", inbox)
            await asyncio.sleep(1.0)  # ten quiet ticks with pings: a broker that answers is not left
            assert not again.is_set()
            connection = line._connection
            assert connection is not None
            os.kill(broker.pid, signal.SIGSTOP)
            assert "silent" in await asyncio.wait_for(asyncio.shield(connection.lost), 3)
            os.kill(broker.pid, signal.SIGCONT)
            await asyncio.wait_for(again.wait(), 10)
            await line.publish("t", b"x")
            await inbox.next()
            await line.close()

    run_async(test())


def test_a_long_transfer_over_a_slow_link_is_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pump, "TICK_S", 0.1)

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        await reader.read(1000)
        writer.write(CONNACK)
        while True:
            await asyncio.sleep(0.02)
            if not await reader.read(1 << 16):
                return

    async def test() -> None:
        async with fake_broker(slow) as address:
            line = MqttTransport(address)
            await line.connect()
            connection = line._connection
            assert connection is not None
            begin = time.monotonic()
            await line.publish("t", bytes(9_000_000))
            await asyncio.sleep(max(0.0, begin + 2 - time.monotonic()))
            assert not connection.lost.done()
            await line.close()

    run_async(test())


def test_publications_that_were_given_up_on_a_slow_link_do_not_pile_up() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        await reader.read(1000)
        writer.write(CONNACK)
        await done.wait()

    async def test() -> None:
        async with fake_broker(silent) as address:
            line = MqttTransport(address)
            await line.connect()
            connection = line._connection
            assert connection is not None
            frame = bytes(200_000)
            for _ in range(60):
                with suppress(TimeoutError):
                    await asyncio.wait_for(line.publish("camera", frame), 0.01)
            queue = connection._pump._out
            assert queue.accepted_bytes - queue.sent_bytes <= pump.QUEUE_LIMIT_BYTES + 2 * len(frame)
            assert queue.accepted_bytes < 30 * len(frame), "most never got so far"
            done.set()
            await line.close()

    done = asyncio.Event()
    run_async(test())


def test_garbage_in_the_middle_ends_the_connection_and_not_the_line() -> None:
    greeted = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal greeted
        await reader.read(1000)
        greeted += 1
        writer.write(CONNACK)
        if greeted == 1:
            writer.write(b"\x36\x06\x00\x03a/b\x00")
        await reader.read()

    async def test() -> None:
        async with fake_broker(serve) as address:
            line, again = MqttTransport(address), asyncio.Event()

            async def back() -> None:
                again.set()

            line.on_reconnect(back)
            await line.connect()
            await asyncio.wait_for(again.wait(), 5)
            await line.close()

    run_async(test())
    assert greeted == 2


def test_a_callback_that_waits_for_a_connection_that_ends_again_does_not_block_the_next() -> None:
    greeted = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal greeted
        await reader.read(1000)
        greeted += 1
        writer.write(CONNACK)
        if greeted >= 3:
            publish = await reader.readexactly(8)
            writer.write(b"\x40\x02" + publish[5:7])
            await reader.read()
        elif greeted == 2:
            await reader.read(1000)  # the callback's publication is never acknowledged

    async def test() -> None:
        async with fake_broker(serve) as address:
            line, again = MqttTransport(address), asyncio.Event()

            async def back() -> None:
                await line.publish("t", qos=1)
                again.set()

            line.on_reconnect(back)
            await line.connect()
            await asyncio.wait_for(again.wait(), 10)
            await line.close()

    run_async(test())
    assert greeted == 3


def test_a_unix_socket_is_an_address(tmp_path: Path) -> None:
    path = tmp_path / "broker.sock"

    async def test() -> None:
        with own_mosquitto(tmp_path, f"listener 0 {path}\nallow_anonymous true\n"):
            line, inbox = await until_it_answers(f"mqtt+unix://{path}"), DeliveryQueue()
            await line.subscribe("t", inbox)
            await line.publish("t", bytes(3_000_000))
            assert (await inbox.next()).payload.nbytes == 3_000_000
            await line.close()

    run_async(test())


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A key and a certificate of its own for 127.0.0.1."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    subprocess.run(command, check=True, capture_output=True)
    return key, cert


def test_tls_carries_large_payloads_both_ways_and_refuses_strangers(
    tmp_path: Path, certificate: tuple[Path, Path]
) -> None:
    key, cert = certificate
    port = free_port()
    config = f"listener {port} 127.0.0.1\nallow_anonymous true\ncertfile {cert}\nkeyfile {key}\n"

    async def test() -> None:
        with own_mosquitto(tmp_path, config):
            line, inbox = (
                await until_it_answers(f"mqtts://127.0.0.1:{port}", TlsConfig(cafile=str(cert))),
                DeliveryQueue(),
            )
            await line.subscribe("t", inbox)
            payload = os.urandom(8_000_000)
            await line.publish("t", [payload, b"", payload], qos=1)
            assert (await inbox.next()).payload == payload + payload
            for _ in range(50):
                await line.publish("t", payload[:10_000])
            for _ in range(50):
                assert (await inbox.next()).payload == payload[:10_000]
            await line.close()
            assert "certificate" in await connect_error_text(f"mqtts://127.0.0.1:{port}")

    run_async(test())


def test_a_certificate_file_that_is_none_is_told(tmp_path: Path) -> None:
    wrong = tmp_path / "ca.pem"
    wrong.write_text("hello")

    async def test() -> None:
        for path in (wrong, tmp_path / "missing.pem"):
            with pytest.raises(BadFile, match=path.name):
                await MqttTransport("mqtts://127.0.0.1:1", tls=TlsConfig(cafile=str(path))).connect()

    run_async(test())
