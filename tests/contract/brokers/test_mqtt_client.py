"""`MqttTransport` against brokers that refuse, break the protocol or hang; TLS; Unix sockets."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from brokers.errors import BadFile, BrokerUnreachable
from brokers.mqtt import connection, socket_loop
from brokers.mqtt.client import MqttTransport
from brokers.mqtt.socket_connect import AuthenticationFailed, OperationRefused, TlsConfig, connect_socket
from brokers.mqtt.tls_files import utc_now
from brokers.protocol.broker_url import BrokerAddress
from brokers.security.certificates import Identity, create_ca, issue_certificate
from brokers.server.local_broker import LocalBroker, start_broker
from tests.support.brokers.broker_kinds import WAIT_S, DeliveryQueue, reconnected_event, run_async
from tests.support.brokers.mosquitto import start_mosquitto
from tests.support.brokers.ports import free_port
from tests.support.environment.external_programs import require_dependency

CONNACK = b"\x20\x03\x00\x00\x00"
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def fake_broker(serve: Serve) -> AsyncIterator[str]:
    """Serve connections by a function; yields the address."""
    tasks: set[asyncio.Task[None]] = set()

    async def guarded(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await serve(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(guarded, "127.0.0.1", 0)
    try:
        yield f"mqtt://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        if tasks:
            await asyncio.wait(tasks, timeout=WAIT_S)


async def failed_connect(address: str, timeout_s: float = WAIT_S, tls: TlsConfig = TlsConfig()) -> BrokerUnreachable:
    """Return the error of connecting."""
    with pytest.raises(BrokerUnreachable) as caught:
        await MqttTransport(address, tls=tls).connect(timeout_s=timeout_s)
    assert "\n" not in str(caught.value)
    return caught.value


def test_closed_port_is_unreachable() -> None:
    async def test() -> None:
        assert (await failed_connect(f"mqtt://127.0.0.1:{free_port()}")).reason == "connection refused"

    run_async(test())


def test_unknown_host_is_unreachable() -> None:
    async def test() -> None:
        assert "no-such-host.invalid" in str(await failed_connect("mqtt://no-such-host.invalid"))

    run_async(test())


def test_connecting_to_a_silent_server_times_out() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async def test() -> None:
        async with fake_broker(silent) as address:
            assert (await failed_connect(address, 0.1)).reason == "no answer within 0.1 s"

    run_async(test())


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "is it an MQTT 5 broker?"),
        (b"", "is it an MQTT 5 broker?"),
        (b"\x20\x02\x00\x01", "nsupported protocol version"),  # the CONNACK of an MQTT 3.1.1 broker
        (b"\x20\x03\x00\x84\x00", "nsupported protocol version"),
        (b"\x20\x03\x00\x89\x00", "erver busy"),
        (b"\x20\x03\x00", "is it an MQTT 5 broker?"),
    ],
)
def test_server_that_is_no_mqtt_5_broker_is_explained(answer: bytes, reason: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(answer)
        await writer.drain()

    async def test() -> None:
        async with fake_broker(serve) as address:
            assert reason in (await failed_connect(address)).reason

    run_async(test())


def test_refused_subscription_raises_and_is_forgotten() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1000)
        writer.write(CONNACK)
        subscribe = await reader.read(1000)
        writer.write(b"\x90\x04" + subscribe[2:4] + b"\x00\x87")
        await reader.read(1000)

    async def test() -> None:
        async with fake_broker(serve) as address:
            transport = MqttTransport(address)
            await transport.connect()
            with pytest.raises(OperationRefused) as caught:
                await transport.subscribe("a/b", DeliveryQueue())
            assert caught.value.fields == {"topic": "a/b", "reason": "Not authorized"}
            assert "a/b" not in transport._subscriptions
            await transport.close()

    run_async(test())


@pytest.mark.parametrize("failure", [None, BadFile("ca.pem", "is being replaced"), ValueError("a bug of ours")])
def test_failed_reconnection_is_tried_again(monkeypatch: pytest.MonkeyPatch, failure: Exception | None) -> None:
    """The second attempt fails; None: because the broker refuses the subscription."""
    connects, dials = 0, 0
    end_first = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connects
        await reader.read(1000)
        connects += 1
        writer.write(CONNACK)
        subscribe = await reader.read(1000)
        refuse = failure is None and connects == 2
        writer.write(b"\x90\x04" + subscribe[2:4] + (b"\x00\x87" if refuse else b"\x00\x00"))
        if connects == 1:
            await end_first.wait()
        else:
            await reader.read()

    async def failing_connect(address: BrokerAddress, tls: TlsConfig) -> socket.socket:
        nonlocal dials
        dials += 1
        if dials == 2 and failure is not None:
            raise failure
        return await connect_socket(address, tls)

    async def test() -> None:
        monkeypatch.setattr(connection, "connect_socket", failing_connect)
        async with fake_broker(serve) as address:
            transport = MqttTransport(address)
            await transport.connect()
            await transport.subscribe("a/b", DeliveryQueue())
            reconnected = reconnected_event(transport)
            end_first.set()
            await asyncio.wait_for(reconnected.wait(), WAIT_S)
            await transport.publish("t", b"x")
            await transport.close()

    run_async(test())
    assert dials == 3


def test_unacknowledged_publications_stay_within_the_receive_maximum() -> None:
    most = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal most
        await reader.read(1000)
        writer.write(b"\x20\x06\x00\x00\x03\x21\x00\x02")  # Receive Maximum 2
        unacked: list[bytes] = []
        while True:
            try:  # acknowledge only when nothing more arrives
                packet = await asyncio.wait_for(reader.readexactly(8), 0.05)
                assert packet[:5] == b"\x32\x06\x00\x01t"
                unacked.append(packet[5:7])
                most = max(most, len(unacked))
            except TimeoutError:
                if unacked:
                    writer.write(b"\x40\x02" + unacked.pop(0))
            except AssertionError:
                return

    async def test() -> None:
        async with fake_broker(serve) as address:
            transport = MqttTransport(address)
            await transport.connect()
            assert transport.limits.receive_maximum == 2
            await asyncio.gather(*(transport.publish("t", qos=1) for _ in range(5)))
            await transport.close()

    run_async(test())
    assert most == 2


def test_hanging_broker_is_left_and_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    require_dependency("mosquitto")
    monkeypatch.setattr(socket_loop, "TICK_S", 0.05)

    async def test(broker: LocalBroker) -> None:
        transport, queue = MqttTransport(broker.address), DeliveryQueue()
        await transport.connect()
        await transport.subscribe("t", queue)
        first_connection = transport._connection
        assert first_connection is not None
        os.kill(broker.pid, signal.SIGSTOP)
        assert "silent" in await asyncio.wait_for(asyncio.shield(first_connection.lost), WAIT_S)
        reconnected = reconnected_event(transport)
        os.kill(broker.pid, signal.SIGCONT)
        await asyncio.wait_for(reconnected.wait(), WAIT_S)
        await transport.publish("t", b"x")
        await queue.next()
        await transport.close()

    with start_broker(kind="mosquitto") as broker:
        run_async(test(broker))


def test_malformed_packet_ends_the_connection_and_is_followed_by_a_new_one() -> None:
    connects = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connects
        await reader.read(1000)
        connects += 1
        writer.write(CONNACK)
        if connects == 1:
            await malformed.wait()
            writer.write(b"\x36\x06\x00\x03a/b\x00")
        await reader.read()

    async def test() -> None:
        async with fake_broker(serve) as address:
            transport = MqttTransport(address)
            await transport.connect()
            reconnected = reconnected_event(transport)
            malformed.set()
            await asyncio.wait_for(reconnected.wait(), WAIT_S)
            await transport.close()

    malformed = asyncio.Event()
    run_async(test())
    assert connects == 2


def test_callback_waiting_for_a_lost_connection_does_not_block_the_next() -> None:
    connects = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connects
        await reader.read(1000)
        connects += 1
        writer.write(CONNACK)
        if connects >= 3:
            publish = await reader.readexactly(8)
            writer.write(b"\x40\x02" + publish[5:7])
            await reader.read()
        elif connects == 2:
            await reader.read(1000)  # the callback's publication is never acknowledged

    async def test() -> None:
        async with fake_broker(serve) as address:
            transport, acknowledged = MqttTransport(address), asyncio.Event()

            async def publish() -> None:
                await transport.publish("t", qos=1)
                acknowledged.set()

            transport.on_reconnect(publish)
            await transport.connect()
            await asyncio.wait_for(acknowledged.wait(), WAIT_S)
            await transport.close()

    run_async(test())
    assert connects == 3


def test_unix_socket_carries_publications(tmp_path: Path) -> None:
    path = tmp_path / "broker.sock"

    async def test(port: int) -> None:
        first = MqttTransport(f"mqtt://127.0.0.1:{port}")
        await first.connect()  # after which the broker serves all its listeners
        await first.close()
        transport, queue = MqttTransport(f"mqtt+unix://{path}"), DeliveryQueue()
        await transport.connect()
        await transport.subscribe("t", queue)
        await transport.publish("t", bytes(3_000_000))
        assert (await queue.next()).payload.nbytes == 3_000_000
        await transport.close()

    with start_mosquitto(tmp_path, f"listener 0 {path}") as port:
        run_async(test(port))


def test_tls_carries_large_payloads_and_checks_the_broker(tmp_path: Path) -> None:
    ca = create_ca(utc_now())
    certificate = issue_certificate(ca, Identity("broker", ("127.0.0.1",)), utc_now(), days=1)
    ca_file, cert_file, key_file = (tmp_path / name for name in ("ca.pem", "cert.pem", "key.pem"))
    ca_file.write_bytes(ca.certificate_pem)
    cert_file.write_bytes(certificate.certificate_pem)
    key_file.write_bytes(certificate.key_pem)

    async def test(port: int) -> None:
        address = f"mqtts://127.0.0.1:{port}"
        transport, queue = MqttTransport(address, tls=TlsConfig(cafile=str(ca_file))), DeliveryQueue()
        await transport.connect()
        await transport.subscribe("t", queue)
        payload = os.urandom(8_000_000)
        await transport.publish("t", [payload, b"", payload], qos=1)
        assert (await queue.next()).payload == payload + payload
        for _ in range(50):
            await transport.publish("t", payload[:10_000])
        for _ in range(50):
            assert (await queue.next()).payload == payload[:10_000]
        await transport.close()
        assert isinstance(await failed_connect(address), AuthenticationFailed)

    with start_mosquitto(tmp_path, f"certfile {cert_file}", f"keyfile {key_file}") as port:
        run_async(test(port))
