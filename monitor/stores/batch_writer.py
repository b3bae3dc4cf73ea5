"""A thread that writes to one store in batches, so that a slow store blocks nothing else."""

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Generic, Protocol, TypeVar

from brokers.process.backoff import Backoff
from monitor.errors import BadStore

log = logging.getLogger(__name__)

QUEUE_LIMIT = 200_000  # items that wait for a store that fails: about 100 MB of points
_INTERVAL_S = 1.0
_BATCH_ITEMS = 20_000
_FIRST_RETRY_S, _LONGEST_RETRY_S = 1.0, 30.0
_RETRY_WHILE_STOPPING_S = 0.1

T = TypeVar("T")
T_contra = TypeVar("T_contra", contravariant=True)


class Sink(Protocol[T_contra]):
    """Accepts items in batches, such as a store of points; used by one thread at a time."""

    @property
    def waiting(self) -> int:
        """Items accepted and not yet delivered."""

    @property
    def dropped(self) -> int:
        """Items lost."""

    def write(self, items: Sequence[T_contra]) -> None:
        """Accept all items, or raise `BadStore`."""

    def close(self) -> None:
        """Deliver what waits, as far as that is possible soon. May be called twice."""


class BatchWriter(Generic[T]):
    """Queues items for a store; `add` never blocks.

    A store that fails is retried with exponential back-off. Items beyond `queue_limit` are dropped, the newest first.
    Lifecycle: `start`, `add`, `drain`, `stop`. Counts are since construction.
    """

    def __init__(self, store: Sink[T], name: str, queue_limit: int = QUEUE_LIMIT) -> None:
        self.name = name
        self._store = store
        self._queue_limit = queue_limit
        self._queue: deque[T] = deque()
        self._dropped = 0
        self._problem = ""  # the last failure that was logged; empty while the store accepts items
        self._mutex = threading.Lock()
        self._stopping = threading.Event()
        self._deadline_s = float("inf")  # of the retries while stopping
        self._thread = threading.Thread(target=self._run, name=f"writer to {name}", daemon=True)

    @property
    def waiting(self) -> int:
        """Items queued here or in the store."""
        return len(self._queue) + self._store.waiting

    @property
    def dropped(self) -> int:
        """Items lost here or in the store."""
        return self._dropped + self._store.dropped

    def start(self) -> None:
        self._thread.start()

    def add(self, items: Iterable[T]) -> None:
        """Queue items; from any thread."""
        with self._mutex:
            for item in items:
                if len(self._queue) < self._queue_limit:
                    self._queue.append(item)
                else:
                    self._dropped += 1

    def drain(self, timeout_s: float) -> None:
        """Begin to stop: write the queue, with retries until the timeout. `stop` must still be called."""
        self._deadline_s = time.monotonic() + timeout_s
        self._stopping.set()

    def stop(self, timeout_s: float) -> None:
        """Write the queue, with retries until the timeout, and close the store. May be called twice."""
        self.drain(timeout_s)
        if self._thread.ident is None:  # never started
            self._close()
            return
        self._thread.join(timeout_s)
        if unwritten := len(self._queue):
            log.warning("%s did not accept the last %d points", self.name, unwritten)

    def _run(self) -> None:
        backoff = Backoff(_FIRST_RETRY_S, _LONGEST_RETRY_S)
        while True:
            stopping = self._stopping.is_set()
            if self._write_queue():
                backoff.reset()
                if stopping:
                    break
                self._stopping.wait(_INTERVAL_S)
            elif not stopping:
                self._stopping.wait(backoff.next_s())
            elif time.monotonic() >= self._deadline_s:
                break
            else:
                time.sleep(_RETRY_WHILE_STOPPING_S)
        self._close()

    def _write_queue(self) -> bool:
        """Whether the store accepted all that waited."""
        while self._queue:
            with self._mutex:
                batch = list(itertools.islice(self._queue, _BATCH_ITEMS))
            try:
                self._store.write(batch)
            except BadStore as error:
                if str(error) != self._problem:
                    log.warning("%s; retrying, %d points wait", error, len(self._queue))
                    self._problem = str(error)
                return False
            except Exception:  # an item that the store cannot hold: retrying would block all later ones
                log.exception("%s cannot store %d points: dropped", self.name, len(batch))
                self._dropped += len(batch)
            else:
                self._problem = ""
            with self._mutex:
                for _ in batch:
                    self._queue.popleft()
        return True

    def _close(self) -> None:
        try:
            self._store.close()
        except BadStore as error:
            log.warning("%s", error)
