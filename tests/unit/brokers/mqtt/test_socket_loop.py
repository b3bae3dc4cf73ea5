"""Sending with a bounded queue, and keep-alive, on a socket whose peer the test controls."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from brokers.mqtt import socket_loop
from brokers.mqtt.publish_packet import PublishHeader
from brokers.mqtt.socket_loop import (
    DEAD_AFTER_TICKS,
    PING_AFTER_TICKS,
    QUEUE_LIMIT_BYTES,
    ConnectionLost,
    PacketSocket,
)
from tests.support.brokers.broker_kinds import WAIT_S, run_async

PINGREQ, PINGRESP = b"\xc0\x00", b"\xd0\x00"


class IgnoringHandler:
    def get_buffer(self, header: PublishHeader) -> memoryview | None:
        return None

    def on_publish(self, header: PublishHeader, payload: memoryview) -> None: ...

    def on_packet(self, data: bytes) -> None: ...


@pytest.fixture(autouse=True)
def _no_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests call `_tick` themselves."""
    monkeypatch.setattr(socket_loop, "TICK_S", 3600.0)


def tick(packets: PacketSocket, count: int) -> None:
    for _ in range(count):
        packets._tick()


@asynccontextmanager
async def packet_socket() -> AsyncIterator[tuple[PacketSocket, socket.socket]]:
    """A started packet socket over TCP, with small kernel buffers, and the non-blocking socket of its peer."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.socket()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        ours.connect(server.getsockname())
        peer, _ = server.accept()
    with ours, peer:
        ours.setblocking(False)
        peer.setblocking(False)
        packets = PacketSocket(ours, IgnoringHandler(), 1 << 20)
        packets.start()
        try:
            yield packets, peer
        finally:
            packets.close("the test is over")


async def until_received(packets: PacketSocket, count: int) -> None:
    async with asyncio.timeout(WAIT_S):
        while packets._reader.received_bytes < count:  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.001)


async def receive(peer: socket.socket) -> bytes:
    return await asyncio.wait_for(asyncio.get_running_loop().sock_recv(peer, 1 << 20), WAIT_S)


def test_quiet_broker_is_pinged_and_then_given_up() -> None:
    async def test() -> None:
        async with packet_socket() as (packets, peer):
            tick(packets, PING_AFTER_TICKS)
            assert await receive(peer) == PINGREQ
            tick(packets, DEAD_AFTER_TICKS - PING_AFTER_TICKS - 1)
            assert not packets.lost.done()
            tick(packets, 1)
            assert "silent" in packets.lost.result()

    run_async(test())


def test_broker_that_answers_pings_is_kept() -> None:
    async def test() -> None:
        async with packet_socket() as (packets, peer):
            for received_bytes in (2, 4, 6):
                tick(packets, PING_AFTER_TICKS)
                assert await receive(peer) == PINGREQ
                peer.send(PINGRESP)
                await until_received(packets, received_bytes)
                tick(packets, 1)
            assert not packets.lost.done()

    run_async(test())


def test_silence_does_not_count_while_reading_is_paused() -> None:
    async def test() -> None:
        async with packet_socket() as (packets, peer):
            packets.set_reading_paused(True)
            tick(packets, 3 * DEAD_AFTER_TICKS)
            assert not packets.lost.done()
            assert (await receive(peer)).startswith(PINGREQ)

    run_async(test())


def test_slow_transfer_counts_as_activity() -> None:
    async def test() -> None:
        async with packet_socket() as (packets, peer):
            packets.push((memoryview(bytes(8 << 20)),))
            for _ in range(2 * DEAD_AFTER_TICKS):
                sent_bytes = packets._writer.sent_bytes
                while packets._writer.sent_bytes == sent_bytes:  # the peer's kernel has acknowledged earlier bytes
                    await receive(peer)
                tick(packets, 1)
            assert not packets.lost.done()
            async with asyncio.timeout(WAIT_S):
                while not packets.lost.done():  # the peer reads no more
                    tick(packets, 1)
                    await asyncio.sleep(0.01)
            assert "silent" in packets.lost.result()

    run_async(test())


def test_cancelled_senders_leave_a_bounded_queue() -> None:
    async def test() -> None:
        async with packet_socket() as (packets, _):
            frame = memoryview(bytes(200_000))
            senders = [asyncio.create_task(packets.send((frame,))) for _ in range(60)]
            for _ in range(3):
                await asyncio.sleep(0)
            for sender in senders:
                sender.cancel()
            await asyncio.wait(senders)
            writer = packets._writer
            assert writer.accepted_bytes - writer.sent_bytes <= QUEUE_LIMIT_BYTES + len(frame)
            assert writer.accepted_bytes < 30 * len(frame)

    run_async(test())


def test_timer_ends_with_the_connection(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A tick on the closed socket would raise ValueError in the loop, which logs it."""
    monkeypatch.setattr(socket_loop, "TICK_S", 0.001)

    async def test() -> None:
        async with packet_socket() as (packets, _):
            packets.start_keepalive()
            await asyncio.wait_for(packets.lost, WAIT_S)  # silent for some ticks
            closed_by_tick = packets._timer
            assert closed_by_tick is not None
            assert closed_by_tick.cancelled()
        async with packet_socket() as (packets, _):
            packets.start_keepalive()
            packets.close("cable cut")
            assert packets._timer is not None
            assert packets._timer.cancelled()

    run_async(test())
    assert not caplog.records


def test_waiting_senders_raise_when_the_connection_ends() -> None:
    async def test() -> None:
        async with packet_socket() as (packets, _):
            senders = [asyncio.create_task(packets.send((memoryview(bytes(4 << 20)),))) for _ in range(3)]
            await asyncio.sleep(0)
            packets.close("cable cut")
            results = await asyncio.gather(*senders, return_exceptions=True)
            assert [(type(result), str(result)) for result in results] == [(ConnectionLost, "cable cut")] * 3

    run_async(test())
