"""Batches of points on disk that wait for a server: a folder of numbered files, bounded in bytes.

Each file is one batch of gzipped lines, as it will be sent: `000000000017-5000.lp.gz` is batch 17 with 5000 points.
Files are written atomically, so a later process can send what a killed one left. They are not flushed to the disk:
while the server is up they are deleted before the system writes them, which spares flash memory. A power failure may
lose the newest batches.
"""

import gzip
import logging
import re
import threading
import zlib
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from brokers.process.files import file_lock, write_atomic
from monitor.errors import BadStore

log = logging.getLogger(__name__)

# About 60 bytes a point (`python -m tests.bench.stores`): more than ten minutes of 5,000 points a second.
SPOOL_LIMIT_BYTES = 256 << 20
_BLOCK_BYTES = 4096  # disk space of the smallest file
_FILE_NAME = re.compile(r"(\d{12,})-(\d+)\.lp\.gz")


@dataclass(frozen=True, slots=True)
class SpooledBatch:
    """One file. `recovered`: a previous process wrote it, and a power failure may have damaged it."""

    number: int
    point_count: int
    size_bytes: int  # on disk
    recovered: bool = False

    @property
    def name(self) -> str:
        return f"{self.number:012d}-{self.point_count}.lp.gz"


class Spool:
    """A queue of batches in one folder; one process at a time, several threads.

    The reader sends the batch of `first`, then calls `ack`. A full spool drops the oldest batches except the first: the
    server may have it already. Raises `BadStore` for a folder that cannot be written or that another process uses.
    """

    def __init__(self, folder: Path, limit_bytes: int = SPOOL_LIMIT_BYTES) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self.dropped = 0  # points of batches that were dropped or lost
        self._mutex = threading.Lock()
        self._lock = ExitStack()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock.enter_context(file_lock(folder / "lock", wait=False))
            self._batches = self._recover()
        except OSError as error:
            self._lock.close()
            in_use = isinstance(error, BlockingIOError)
            problem = "another monitor uses it" if in_use else f"cannot write there: {_reason(error)}"
            raise BadStore(str(folder), problem) from None
        self._size_bytes = sum(batch.size_bytes for batch in self._batches)
        self.point_count = sum(batch.point_count for batch in self._batches)  # points that wait
        self._next_number = 1 + max((batch.number for batch in self._batches), default=0)
        with self._mutex:
            self._drop_oldest(needed_bytes=0)

    def _recover(self) -> list[SpooledBatch]:
        """The batches of a previous process in order."""
        batches = []
        for path in self.folder.iterdir():
            if path.suffix == ".part":  # of an atomic write that did not finish
                path.unlink()
            elif match := _FILE_NAME.fullmatch(path.name):
                size_bytes = _disk_bytes(path.stat().st_size)
                batches.append(SpooledBatch(int(match[1]), int(match[2]), size_bytes, recovered=True))
        return sorted(batches, key=lambda batch: batch.number)

    def put(self, data: bytes, point_count: int) -> None:
        """Append a batch, or drop it if it exceeds the spool. Raises `OSError`; then nothing was added."""
        size_bytes = _disk_bytes(len(data))
        with self._mutex:
            if size_bytes > self.limit_bytes:
                self.dropped += point_count
                return
            self._drop_oldest(needed_bytes=size_bytes)
            batch = SpooledBatch(self._next_number, point_count, size_bytes)
            write_atomic(self.folder / batch.name, data)
            self._next_number += 1
            self._batches.append(batch)
            self.point_count += point_count
            self._size_bytes += size_bytes

    def first(self) -> tuple[SpooledBatch, bytes] | None:
        """The oldest batch that can be read, which stays in the spool until `ack`; None if the spool is empty."""
        while self._batches:
            batch = self._batches[0]
            try:
                data = (self.folder / batch.name).read_bytes()
                if batch.recovered:
                    gzip.decompress(data)
                return batch, data
            except (OSError, EOFError, zlib.error) as error:
                log.warning("lost %d points of %s: %s", batch.point_count, batch.name, error)
                self.ack(lost=batch.point_count)
        return None

    def ack(self, lost: int = 0) -> None:
        """Remove the first batch; `lost` of its points count as dropped."""
        with self._mutex:
            self.dropped += lost
            self._remove(0)

    def close(self) -> None:
        """Unlock the folder. May be called twice."""
        self._lock.close()

    def _drop_oldest(self, needed_bytes: int) -> None:
        while self._size_bytes + needed_bytes > self.limit_bytes and len(self._batches) > 1:
            self.dropped += self._batches[1].point_count
            self._remove(1)

    def _remove(self, index: int) -> None:
        batch = self._batches.pop(index)
        self.point_count -= batch.point_count
        self._size_bytes -= batch.size_bytes
        try:
            (self.folder / batch.name).unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s cannot be removed: %s", batch.name, _reason(error))


def _disk_bytes(size_bytes: int) -> int:
    return -(-size_bytes // _BLOCK_BYTES) * _BLOCK_BYTES


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
