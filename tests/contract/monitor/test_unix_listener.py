"""The socket of events between senders that do not care and a daemon that lives, dies, and lives again."""

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
from monitor.daemon.unix_listener import UnixListener
from monitor.errors import BadSocket, SocketTaken
from tests.support.monitor.unix_client import send_datagrams, short_temp_folder
from tests.support.pipelines.processes import eventually


@pytest.fixture(name="folder")
def _folder() -> Iterator[Path]:
    with short_temp_folder() as found:
        yield found


def taken(door: UnixListener, count: int) -> list[bytes]:
    found: list[bytes] = []

    def look() -> bool:
        found.extend(door.take(1000))
        return len(found) >= count

    eventually(f"{count} datagrams", look)
    return found


def test_all_that_is_sent_comes_out_in_order_and_nothing_stays_on_disk(folder: Path) -> None:
    path = folder / "made" / "events"
    door = UnixListener(path)
    door.open()
    assert [stat.S_IMODE(each.stat().st_mode) for each in (path.parent, path)] == [0o700, 0o600]
    sent = [b"%d" % number for number in range(2000)]
    send_datagrams(path, *sent)
    assert taken(door, 2000) == sent
    door.close()
    door.close()
    assert list(folder.iterdir()) == []


def test_what_was_sent_before_the_end_is_heard(folder: Path) -> None:
    for _ in range(20):
        door = UnixListener(folder / "events")
        door.open()
        send_datagrams(door.path, *[b"x"] * 10)
        door.close()
        assert door.take(100) == [b"x"] * 10


def test_a_socket_that_a_dead_daemon_left_is_replaced(folder: Path) -> None:
    path = folder / "events"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as dead:
        dead.bind(str(path))
    (folder / "events.lock").touch()
    door = UnixListener(path)
    door.open()
    send_datagrams(path, b"hello")
    assert taken(door, 1) == [b"hello"]
    door.close()
    assert list(folder.iterdir()) == []


def test_a_living_daemon_keeps_its_socket_and_the_other_is_told_how_to_choose(folder: Path) -> None:
    path = folder / "events"
    living, other = UnixListener(path), UnixListener(path)
    living.open()
    with pytest.raises(SocketTaken) as caught:
        other.open()
    other.close()
    assert isinstance(caught.value, UsageError)
    assert str(caught.value) == (
        f"{path}: a monitor that runs listens on this socket: stop it, or choose another with --socket "
        "(and SPARSE_MONITOR for those who send)"
    )
    send_datagrams(path, b"still here")
    assert taken(living, 1) == [b"still here"]
    living.close()


def test_of_many_that_start_over_a_dead_socket_at_once_one_has_it(folder: Path) -> None:
    path = folder / "events"
    for _ in range(30):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as dead:
            dead.bind(str(path))
        doors = [UnixListener(path) for _ in range(4)]
        opened: list[UnixListener] = []
        start = threading.Barrier(len(doors))

        def go(door: UnixListener, start: threading.Barrier = start, opened: list[UnixListener] = opened) -> None:
            start.wait()
            try:
                door.open()
            except SocketTaken:
                return
            opened.append(door)

        threads = [threading.Thread(target=go, args=(door,)) for door in doors]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(opened) == 1
        send_datagrams(path, b"you")
        assert taken(opened[0], 1) == [b"you"]
        opened[0].close()


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("file", "there is a file of that name, and it is no socket"),
        ("file/events", "file exists"),
        ("x" * 120, "a socket's path has at most 107 bytes"),
    ],
)
def test_a_place_where_no_socket_can_be_is_one_clear_line(folder: Path, name: str, problem: str) -> None:
    (folder / "file").write_text("mine")
    with pytest.raises(BadSocket) as caught:
        UnixListener(folder / name).open()
    assert str(caught.value) == f"{folder / name}: events cannot be heard there: {problem}"
    assert [path.name for path in folder.iterdir()] == ["file"]
    assert (folder / "file").read_text() == "mine"


def test_a_link_is_not_followed_to_anothers_file(folder: Path) -> None:
    (folder / "precious").write_text("mine")
    (folder / "events").symlink_to(folder / "precious")
    with pytest.raises(BadSocket):
        UnixListener(folder / "events").open()
    (folder / "events").unlink()
    (folder / "events.lock").symlink_to(folder / "precious")
    with pytest.raises(BadSocket):
        UnixListener(folder / "events").open()
    assert (folder / "precious").read_text() == "mine"


def test_a_datagram_that_is_too_large_is_counted_and_the_next_one_is_heard(folder: Path) -> None:
    door = UnixListener(folder / "events")
    door.open()
    largest = b"y" * DATAGRAM_LIMIT_BYTES
    send_datagrams(door.path, b"x" * (DATAGRAM_LIMIT_BYTES + 1), largest, b"")
    assert taken(door, 2) == [largest, b""]
    assert door.too_large == 1
    door.close()


def test_no_sender_waits_for_a_reader_that_is_slow_and_memory_is_bounded(folder: Path) -> None:
    door = UnixListener(folder / "events", buffer_limit_bytes=100_000)
    door.open()
    send_datagrams(door.path, *[b"z" * 999 + b"\n" + b"z" * 1000] * 200)  # nobody takes any
    door.close()
    kept = door.take(1000)
    assert len(kept) == 100_000 // 2064
    assert door.dropped == 2 * (200 - len(kept))
    assert os.listdir(folder) == []
