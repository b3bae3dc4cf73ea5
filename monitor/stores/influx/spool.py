"""Batches of points that wait on disk for a server: a folder of numbered files, bounded in bytes; the oldest give way.

Each file is one batch of lines, gzip, as it will be sent: `000000000017-5000.lp.gz` is batch 17, of 5000 points. A file
has its name only when it is whole, so what a killed process leaves behind can be sent by the next one. It is not
forced to the disk: while the server is there it is gone again before the system would have written it, which spares
flash memory; a power cut may cost what was written last.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import threading
from collections import deque
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from monitor.errors import BadStore

log = logging.getLogger(__name__)

# A point takes about 60 bytes (`python -m tests.bench.stores` measures it): 5,000 a second for more than ten minutes.
SPOOL_LIMIT_BYTES = 256 << 20
_BLOCK_BYTES = 4096  # what the smallest file takes of a disk
_NAME = re.compile(r"(\d{12,})-(\d+)\.lp\.gz")
_LOCK = "lock"
_HALF = ".half"


@dataclass(frozen=True, slots=True)
class SpooledBatch:
    """One file. `found`: it was there when the spool was opened, and may be broken by a power cut."""

    number: int
    point_count: int
    size_bytes: int  # of the disk
    recovered: bool = False

    @property
    def name(self) -> str:
        return f"{self.number:012d}-{self.point_count}.lp.gz"


class Spool:
    """The batches of one folder, for one process at a time; several threads may use it.

    Raises `BadStore` for a folder that cannot be written, or that another process uses.
    """

    def __init__(self, folder: Path, limit_bytes: int = SPOOL_LIMIT_BYTES) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes
        self.dropped = 0  # points for which there was no room, or whose file was lost
        self._guard = threading.Lock()
        self._in_hand: SpooledBatch | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise BadStore(str(folder), f"points cannot wait there: {_reason(error)}") from None
        try:
            self._waiting = deque(self._take_over())
        except OSError as error:
            os.close(self._lock)
            busy = isinstance(error, BlockingIOError)
            problem = "another monitor uses it" if busy else f"points cannot wait there: {_reason(error)}"
            raise BadStore(str(folder), problem) from None
        self._points = sum(batch.point_count for batch in self._waiting)
        self._bytes = sum(batch.size_bytes for batch in self._waiting)
        self._next = 1 + max((batch.number for batch in self._waiting), default=0)
        with self._guard:
            self._make_room(0)

    def _take_over(self) -> list[SpooledBatch]:
        """What a former process left, in order; raises `OSError` where we may not write."""
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        found = []
        for path in self.folder.iterdir():
            if path.name.endswith(_HALF):
                path.unlink()
            elif match := _NAME.fullmatch(path.name):
                found.append(SpooledBatch(int(match[1]), int(match[2]), _on_disk(path.stat().st_size), recovered=True))
        probe = self.folder / f"probe{_HALF}"
        probe.write_bytes(b"")
        probe.unlink()
        return sorted(found, key=lambda batch: batch.number)

    @property
    def point_count(self) -> int:
        """Points that wait."""
        return self._points

    def put(self, data: bytes, points: int) -> None:
        """Add a batch; the oldest give way where there is no room. Raises `OSError`, and then nothing was added."""
        size_bytes = _on_disk(len(data))
        with self._guard:
            if size_bytes > self.limit_bytes:
                self.dropped += points
                return
            batch = SpooledBatch(self._next, points, size_bytes)
            half = self.folder / f"{batch.name}{_HALF}"
            self._make_room(size_bytes)
            try:
                half.write_bytes(data)
                half.rename(self.folder / batch.name)
            except OSError:
                half.unlink(missing_ok=True)
                raise
            self._next += 1
            self._waiting.append(batch)
            self._points += points
            self._bytes += size_bytes

    def take(self) -> tuple[SpooledBatch, bytes] | None:
        """The oldest batch, which stays in hand, and so in the folder, until it is `done` or `give_back`."""
        while True:
            with self._guard:
                if not self._waiting:
                    return None
                batch = self._in_hand = self._waiting[0]
            try:
                return batch, (self.folder / batch.name).read_bytes()
            except OSError as error:
                log.warning("lost %d points of %s: %s", batch.point_count, batch.name, _reason(error))
                self.ack(lost=batch.point_count)

    def release(self) -> None:
        """What is in hand waits again."""
        with self._guard:
            self._in_hand = None

    def ack(self, lost: int = 0) -> None:
        """What is in hand can go; `lost` of its points count as dropped."""
        with self._guard:
            batch, self._in_hand = self._in_hand, None
            if batch is not None:
                self.dropped += lost
                self._remove(batch)

    def close(self) -> None:
        """Another process may have the folder. May be called twice."""
        with self._guard:
            if self._lock >= 0:
                os.close(self._lock)
                self._lock = -1

    def _make_room(self, size_bytes: int) -> None:
        while self._bytes + size_bytes > self.limit_bytes:
            # The batch in hand may be with the server by now: to drop it would be to count what is not lost.
            oldest = next((batch for batch in islice(self._waiting, 2) if batch is not self._in_hand), None)
            if oldest is None:
                return
            self.dropped += oldest.point_count
            self._remove(oldest)

    def _remove(self, batch: SpooledBatch) -> None:
        self._waiting.remove(batch)  # the first, or the second: found at once
        self._points -= batch.point_count
        self._bytes -= batch.size_bytes
        try:
            (self.folder / batch.name).unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s cannot be removed: %s", batch.name, _reason(error))


def _on_disk(size_bytes: int) -> int:
    return -(-size_bytes // _BLOCK_BYTES) * _BLOCK_BYTES


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
