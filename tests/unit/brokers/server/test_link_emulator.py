"""The relay that stands for a link: all bytes, in order, not before their time, and none while it is cut."""

from __future__ import annotations

import contextlib
import hashlib
import random
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from brokers.server.link_emulator import LinkEmulator


@contextlib.contextmanager
def echo() -> Iterator[int]:
    """A port whose server sends back what it is sent."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while piece := connection.recv(65536):
                connection.sendall(piece)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield server.getsockname()[1]
    finally:
        server.close()


@contextlib.contextmanager
def relay(port: int, **link: float) -> Iterator[LinkEmulator]:
    found = LinkEmulator(port, **link)
    found.start()
    try:
        yield found
    finally:
        found.stop()


def read_exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = sock.recv(65536)
        assert piece, "the other side closed the connection"
        data += piece
    return data


def round_trip(found: LinkEmulator, data: bytes) -> tuple[bytes, float]:
    """What comes back, and after how many seconds."""
    with socket.create_connection(("127.0.0.1", found.port), timeout=30) as sock:
        begun_s = time.monotonic()
        sending = threading.Thread(target=sock.sendall, args=(data,))
        sending.start()
        back = read_exactly(sock, len(data))
        sending.join()
        return back, time.monotonic() - begun_s


def test_what_goes_through_comes_out_whole_and_is_counted() -> None:
    data = random.Random(1).randbytes(3_000_000)
    with echo() as port, relay(port, delay_ms=2) as found:
        back, _ = round_trip(found, data)
        assert hashlib.sha256(back).digest() == hashlib.sha256(data).digest()
        assert (found.byte_counts.outbound, found.byte_counts.inbound) == (len(data), len(data))


def test_who_has_said_all_still_hears_the_answer() -> None:
    data = random.Random(2).randbytes(300_000)
    with (
        echo() as port,
        relay(port, delay_ms=20) as found,
        socket.create_connection(("127.0.0.1", found.port), timeout=10) as sock,
    ):
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        assert read_exactly(sock, len(data)) == data
        with contextlib.suppress(ConnectionError):
            assert sock.recv(1) == b""


def test_nothing_comes_out_before_its_time() -> None:
    with echo() as port, relay(port, delay_ms=40) as found:
        back, took_s = round_trip(found, b"x")
        assert back == b"x"
        assert took_s >= 0.080  # there and back


def test_no_more_comes_out_than_the_rate_lets_through() -> None:
    with echo() as port, relay(port, rate_mbit=16) as found:
        _, took_s = round_trip(found, bytes(1_000_000))  # 2 MB/s: half a second each way, one way beside the other
        assert took_s >= 0.45


def test_a_link_that_is_cut_breaks_what_goes_through_and_takes_nothing_until_it_is_mended() -> None:
    with echo() as port, relay(port, delay_ms=1) as found:
        with socket.create_connection(("127.0.0.1", found.port), timeout=10) as sock:
            sock.sendall(b"x")
            assert read_exactly(sock, 1) == b"x"
            found.disable()
            with contextlib.suppress(ConnectionError):
                assert sock.recv(1) == b""
        refused = contextlib.suppress(ConnectionError)
        with socket.create_connection(("127.0.0.1", found.port), timeout=10) as sock, refused:
            sock.sendall(b"x")
            assert sock.recv(1) == b""
        found.enable()
        assert round_trip(found, b"again")[0] == b"again"


def test_nobody_at_the_other_end_is_as_a_cut() -> None:
    with relay(1) as found, socket.create_connection(("127.0.0.1", found.port), timeout=10) as sock:
        said = b"nothing"
        with contextlib.suppress(ConnectionError):
            said = sock.recv(1)
        assert said in (b"", b"nothing")


def test_a_stopped_relay_leaves_no_thread_and_listens_no_more() -> None:
    found = LinkEmulator(1)
    found.start()
    found.stop()
    found.stop()
    found.disable()
    assert "link to port 1" not in {thread.name for thread in threading.enumerate()}
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", found.port), timeout=1)
