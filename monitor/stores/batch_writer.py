"""Gives what comes in to one store, in a thread of its own and in batches, so that a slow disk stops nothing else."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Generic, Protocol, TypeVar, runtime_checkable

from monitor.errors import BadStore

log = logging.getLogger(__name__)

QUEUE_LIMIT = 200_000  # items that wait for a store that does not take them: some 100 MB of points
_EVERY_S = 1.0
_BATCH = 20_000
# A store that failed is asked again after so long, twice as long each time.
_FIRST_WAIT_S, _LONGEST_WAIT_S = 1.0, 30.0
_SAID_EVERY_S = 60.0

T = TypeVar("T")
T_contra = TypeVar("T_contra", contravariant=True)


class BatchSink(Protocol[T_contra]):
    """A `monitor.stores.base.Store`, or anything that takes what it takes as it does."""

    def write(self, points: Sequence[T_contra]) -> None: ...

    def close(self) -> None: ...


@runtime_checkable
class BufferedSink(Protocol):
    """What takes things on their way to somewhere else, and counts them."""

    @property
    def waiting(self) -> int: ...

    @property
    def dropped(self) -> int: ...


class BatchWriter(Generic[T]):
    """Never makes a caller wait. What the store has no room for while it fails is dropped, the newest first, and
    counted. Life: `start`, `add`, `stop`; counts are since it was made."""

    def __init__(self, store: BatchSink[T], name: str, queue_limit: int = QUEUE_LIMIT) -> None:
        self.name = name
        self.written = 0
        self._store = store
        self._room = queue_limit
        self._waiting: deque[T] = deque()
        self._dropped = 0
        self._mutex = threading.Lock()
        self._leaving = threading.Event()
        self._end_s = float("inf")  # when a store that fails is asked no more
        self._complained_s = float("-inf")
        self._thread = threading.Thread(target=self._run, name=f"writer to {name}", daemon=True)

    @property
    def waiting(self) -> int:
        """Items that are not where they shall be yet."""
        return len(self._waiting) + (self._store.waiting if isinstance(self._store, BufferedSink) else 0)

    @property
    def dropped(self) -> int:
        """Items that will never be there."""
        return self._dropped + (self._store.dropped if isinstance(self._store, BufferedSink) else 0)

    def start(self) -> None:
        self._thread.start()

    def add(self, items: Iterable[T]) -> None:
        """Have them written soon; from any thread."""
        with self._mutex:
            for item in items:
                if len(self._waiting) < self._room:
                    self._waiting.append(item)
                else:
                    self._dropped += 1

    def drain(self, timeout_s: float) -> None:
        """Begin to stop: write what waits, if that can be done in time. `stop` still has to be called."""
        self._end_s = time.monotonic() + timeout_s
        self._leaving.set()

    def stop(self, timeout_s: float) -> None:
        """Write what waits, if that can be done in time, and close the store. May be called twice."""
        self.drain(timeout_s)
        if self._thread.ident is None:  # never started
            self._close()
            return
        self._thread.join(timeout_s)
        if left := len(self._waiting):
            log.warning("%s did not take the last %d points", self.name, left)

    def _run(self) -> None:
        wait_s = _FIRST_WAIT_S
        while True:
            left = self._leaving.is_set()
            if self._write_all():
                wait_s = _FIRST_WAIT_S
                if left:
                    break
                self._leaving.wait(_EVERY_S)
            else:
                if left and time.monotonic() >= self._end_s:
                    break
                # Told to leave, it asks on until the end; each time is short then.
                time.sleep(0.1) if left else self._leaving.wait(wait_s)
                wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
        self._close()

    def _write_all(self) -> bool:
        """Whether the store took all that waited."""
        while self._waiting:
            with self._mutex:
                batch = list(itertools.islice(self._waiting, _BATCH))
            try:
                self._store.write(batch)
            except BadStore as error:
                self._complain(error)
                return False
            except Exception:  # what is in it would meet the store again and again, and all that comes behind it wait
                log.exception("%s cannot take %d points: they are dropped", self.name, len(batch))
                self._dropped += len(batch)
            else:
                self.written += len(batch)
            with self._mutex:
                for _ in batch:
                    self._waiting.popleft()
        return True

    def _complain(self, error: BadStore) -> None:
        now_s = time.monotonic()
        if now_s - self._complained_s >= _SAID_EVERY_S:
            self._complained_s = now_s
            log.warning("%s; it is tried again, %d points wait", error, len(self._waiting))

    def _close(self) -> None:
        try:
            self._store.close()
        except BadStore as error:
            log.warning("%s", error)
