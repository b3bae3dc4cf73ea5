"""The link emulator: all bytes in order, not before they are due, and none while the link is disabled."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from brokers.server.link_emulator import LinkEmulator


@pytest.fixture
def echo_port() -> Iterator[int]:
    """A server that sends back what it receives."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve(connection: socket.socket) -> None:
            with connection, contextlib.suppress(OSError):
                while piece := connection.recv(65536):
                    connection.sendall(piece)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1]


@contextlib.contextmanager
def started(port: int, **settings: float) -> Iterator[LinkEmulator]:
    link = LinkEmulator(port, **settings)
    link.start()
    try:
        yield link
    finally:
        link.stop()


def connect(link: LinkEmulator) -> socket.socket:
    return socket.create_connection(("127.0.0.1", link.port), timeout=30)


def read_exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = sock.recv(65536)
        assert piece, "the other side closed the connection"
        data += piece
    return data


def assert_closed(sock: socket.socket) -> None:
    with contextlib.suppress(ConnectionError):
        assert sock.recv(1) == b""


def round_trip(link: LinkEmulator, data: bytes) -> tuple[bytes, float]:
    """Return the echo, and the seconds that it took."""
    with connect(link) as sock:
        start_s = time.monotonic()
        sender = threading.Thread(target=sock.sendall, args=(data,))
        sender.start()
        echo = read_exactly(sock, len(data))
        sender.join()
        return echo, time.monotonic() - start_s


def test_bytes_arrive_in_order_and_are_counted(echo_port: int) -> None:
    data = random.Random(1).randbytes(3_000_000)
    with started(echo_port, delay_ms=2) as link:
        tapped = {"outbound": 0, "inbound": 0}

        def tap(direction: str, piece: bytes) -> None:
            tapped[direction] += len(piece)

        link.tap = tap
        assert round_trip(link, data)[0] == data
    assert (link.byte_counts["outbound"], link.byte_counts["inbound"]) == (len(data), len(data))
    assert tapped == {"outbound": len(data), "inbound": len(data)}


def test_half_closed_connection_still_receives(echo_port: int) -> None:
    data = random.Random(2).randbytes(300_000)
    with started(echo_port, delay_ms=20) as link, connect(link) as sock:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        assert read_exactly(sock, len(data)) == data
        assert_closed(sock)


def test_delay_applies_to_both_directions(echo_port: int) -> None:
    with started(echo_port, delay_ms=40) as link:
        echo, duration_s = round_trip(link, b"x")
    assert echo == b"x"
    assert duration_s >= 0.080


def test_rate_limits_each_direction(echo_port: int) -> None:
    with started(echo_port, rate_mbit=16) as link:
        _, duration_s = round_trip(link, bytes(500_000))  # 2 MB/s in each direction, at the same time
    assert duration_s >= 0.22


def test_disabled_link_closes_connections_until_enabled(echo_port: int) -> None:
    with started(echo_port, delay_ms=1) as link:
        with connect(link) as sock:
            sock.sendall(b"x")
            assert read_exactly(sock, 1) == b"x"
            link.disable()
            assert_closed(sock)
        with connect(link) as sock:
            assert_closed(sock)
        link.enable()
        assert round_trip(link, b"again")[0] == b"again"


def test_unreachable_target_closes_the_connection() -> None:
    with started(1) as link, connect(link) as sock:
        assert_closed(sock)


def test_stop_ends_the_thread_and_the_listener() -> None:
    link = LinkEmulator(1)
    link.start()
    link.stop()
    link.stop()
    link.disable()
    assert not link._thread.is_alive()
    with pytest.raises(ConnectionRefusedError):
        connect(link)
