"""The event socket between senders that do not wait and daemons that start, stop and are killed."""

from __future__ import annotations

import os
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from brokers.errors import UsageError
from brokers.telemetry.schema import DATAGRAM_LIMIT_BYTES
from monitor.daemon.event_socket import UnixListener
from monitor.errors import SocketUnavailable
from tests.support.monitor.unix_client import send_datagrams, short_temp_folder
from tests.support.pipelines.processes import eventually


@pytest.fixture
def folder() -> Iterator[Path]:
    with short_temp_folder() as path:
        yield path


def open_listener(path: Path) -> UnixListener:
    listener = UnixListener(path)
    listener.open()
    return listener


def take(listener: UnixListener, count: int) -> list[bytes]:
    datagrams: list[bytes] = []

    def all_taken() -> bool:
        datagrams.extend(listener.take(1000))
        return len(datagrams) >= count

    eventually(f"{count} datagrams", all_taken)
    return datagrams


def leave_stale_socket(path: Path) -> None:
    """A socket file whose daemon was killed."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as killed:
        killed.bind(str(path))


def test_datagrams_are_received_in_order_and_the_socket_is_removed(folder: Path) -> None:
    path = folder / "new" / "events"
    listener = open_listener(path)
    assert [stat.S_IMODE(each.stat().st_mode) for each in (path.parent, path)] == [0o700, 0o600]
    datagrams = [b"%d" % number for number in range(2000)]
    send_datagrams(path, *datagrams)
    assert take(listener, 2000) == datagrams
    listener.close()
    listener.close()
    assert os.listdir(path.parent) == ["events.lock"]


def test_datagrams_sent_before_close_are_received(folder: Path) -> None:
    for _ in range(20):
        listener = open_listener(folder / "events")
        send_datagrams(listener.path, *[b"x"] * 10)
        listener.close()
        assert listener.take(100) == [b"x"] * 10


def test_stale_socket_is_replaced(folder: Path) -> None:
    path = folder / "events"
    leave_stale_socket(path)
    (folder / "events.lock").touch()
    listener = open_listener(path)
    send_datagrams(path, b"hello")
    assert take(listener, 1) == [b"hello"]
    listener.close()
    assert not path.exists()


def test_socket_in_use_raises_usage_error(folder: Path) -> None:
    path = folder / "events"
    first, second = open_listener(path), UnixListener(path)
    with pytest.raises(SocketUnavailable) as caught:
        second.open()
    second.close()
    assert isinstance(caught.value, UsageError)
    assert caught.value.code == "SocketTaken"
    assert str(caught.value) == (
        f"{path}: another monitor uses this socket: stop it, or choose another with --socket "
        "(and SPARSE_MONITOR for the senders)"
    )
    send_datagrams(path, b"still received")
    assert take(first, 1) == [b"still received"]
    first.close()


def test_one_of_many_gets_a_stale_socket(folder: Path) -> None:
    path = folder / "events"
    for _ in range(30):
        leave_stale_socket(path)
        listeners = [UnixListener(path) for _ in range(4)]
        opened: list[UnixListener] = []
        barrier = threading.Barrier(len(listeners))

        def open_at_once(
            listener: UnixListener, barrier: threading.Barrier = barrier, opened: list[UnixListener] = opened
        ) -> None:
            barrier.wait()
            try:
                listener.open()
            except SocketUnavailable:
                return
            opened.append(listener)

        threads = [threading.Thread(target=open_at_once, args=(listener,)) for listener in listeners]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(opened) == 1
        send_datagrams(path, b"you")
        assert take(opened[0], 1) == [b"you"]
        opened[0].close()
    assert stat.S_IMODE((folder / "events.lock").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("file", "a file of this name exists and is not a socket"),
        ("file/events", "file exists"),
        ("x" * 120, "the path of a socket has at most 107 bytes"),
    ],
)
def test_unusable_path_raises_usage_error(folder: Path, name: str, problem: str) -> None:
    (folder / "file").write_text("mine")
    with pytest.raises(SocketUnavailable) as caught:
        UnixListener(folder / name).open()
    assert caught.value.code == "BadSocket"
    assert str(caught.value) == f"{folder / name}: cannot receive events there: {problem}"
    assert [path.name for path in folder.iterdir()] == ["file"]
    assert (folder / "file").read_text() == "mine"


def test_symbolic_links_are_not_followed(folder: Path) -> None:
    (folder / "precious").write_text("mine")
    for name in ("events", "events.lock"):
        (folder / name).symlink_to(folder / "precious")
        with pytest.raises(SocketUnavailable):
            UnixListener(folder / "events").open()
        (folder / name).unlink()
    assert (folder / "precious").read_text() == "mine"


def test_oversized_datagram_is_counted_and_next_one_received(folder: Path) -> None:
    listener = open_listener(folder / "events")
    largest = b"y" * DATAGRAM_LIMIT_BYTES
    send_datagrams(listener.path, b"x" * (DATAGRAM_LIMIT_BYTES + 1), largest, b"")
    assert take(listener, 2) == [largest, b""]
    assert listener.too_large == 1
    listener.close()


def test_senders_do_not_wait_for_a_slow_reader_and_buffer_is_bounded(folder: Path) -> None:
    listener = UnixListener(folder / "events", buffer_limit_bytes=100_000)
    listener.open()
    send_datagrams(listener.path, *[b"z" * 999 + b"\n" + b"z" * 1000] * 200)
    listener.close()
    datagrams = listener.take(1000)
    assert len(datagrams) == 100_000 // 2064
    assert listener.dropped == 2 * (200 - len(datagrams))
    assert not listener.path.exists()
