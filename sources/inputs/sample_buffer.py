"""The bounded buffer between a source and the pipeline: every sample in order, or the newest one of each source."""

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Literal

from sources.inputs.source import Sample

# For sources that cannot be made to wait (the ingress): beyond these the oldest sample is dropped. Samples that await
# their acknowledgement are never dropped, and do not count: the broker bounds their number.
BACKLOG_LIMIT = 1024
BACKLOG_LIMIT_BYTES = 256 << 20


class SampleBuffer:
    """A queue of samples, for one event loop. With `keep="latest"` a sample replaces the older one of its source."""

    def __init__(self, keep: Literal["all", "latest"]) -> None:
        self.dropped: Counter[str] = Counter()  # by reason
        self.keeps_latest = keep == "latest"
        self._queue: OrderedDict[object, Sample] = OrderedDict()
        self._droppable = 0
        self._droppable_bytes = 0
        self._changed = asyncio.Event()
        self._closed = False

    async def put(self, sample: Sample) -> None:
        """Add a sample of a source that can wait: with `keep="all"`, wait until the buffer is empty."""
        await self._wait_until(lambda: not self._queue or self._closed or self.keeps_latest)
        self.put_nowait(sample)

    def put_nowait(self, sample: Sample) -> None:
        """Add a sample of a source that cannot wait; samples it displaces are dropped and counted."""
        key = sample.source if self.keeps_latest else object()
        if (older := self._queue.get(key)) is not None:
            # Assigning to an existing key keeps its position in the queue, so no source starves another.
            self.dropped["superseded"] += 1
            self._count(older, -1)
        self._queue[key] = sample
        self._count(sample, 1)
        while self._droppable > BACKLOG_LIMIT or (self._droppable_bytes > BACKLOG_LIMIT_BYTES and self._droppable > 1):
            oldest = next(key for key, waiting in self._queue.items() if waiting.ack is None)
            self._count(self._queue.pop(oldest), -1)
            self.dropped["backlog_full"] += 1
        self._changed.set()

    async def get(self) -> Sample | None:
        """The next sample; None once the buffer is closed and empty."""
        await self._wait_until(lambda: bool(self._queue) or self._closed)
        if not self._queue:
            return None
        _, sample = self._queue.popitem(last=False)
        self._count(sample, -1)
        self._changed.set()
        return sample

    def close(self) -> None:
        """Add no more samples; those in the buffer can still be taken."""
        self._closed = True
        self._changed.set()

    async def _wait_until(self, predicate: Callable[[], bool]) -> None:
        while not predicate():
            self._changed.clear()
            await self._changed.wait()

    def _count(self, sample: Sample, change: Literal[1, -1]) -> None:
        if sample.ack is None:
            self._droppable += change
            self._droppable_bytes += change * sample.nbytes
