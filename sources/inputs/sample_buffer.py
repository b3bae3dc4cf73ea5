"""Samples that wait for room in the pipeline: all of them, one after the other, or only the newest of each source."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from typing import Literal

from sources.inputs.sample import Sample

# What sources that cannot be made to wait (the ingress) may pile up; beyond it the oldest goes, but for what is to be
# settled: that is never dropped, and whoever keeps it bounds it.
BACKLOG_LIMIT = 1024
BACKLOG_LIMIT_BYTES = 256 << 20


class SampleBuffer:
    """A bounded buffer between whoever makes samples and whoever sends them. Used from one loop."""

    def __init__(self, keep: Literal["all", "latest"]) -> None:
        self.dropped: Counter[str] = Counter()
        self.keeps_latest = keep == "latest"
        self._waiting: OrderedDict[object, Sample] = OrderedDict()
        self._loose = 0  # those of the waiting that may be dropped
        self._loose_bytes = 0
        self._changed = asyncio.Condition()
        self._ended = False

    async def put(self, sample: Sample) -> None:
        """Hand in a sample of a source that can wait: returns when it may make the next."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._waiting or self._ended or self.keeps_latest)
            self._add(sample)
            self._changed.notify_all()

    def put_nowait(self, sample: Sample) -> None:
        """Hand in a sample of a source that cannot wait: what it displaces is dropped, and counted."""
        self._add(sample)
        self._wake()

    async def get(self) -> Sample | None:
        """The sample whose turn it is; None when no more will come."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._waiting or self._ended)
            if not self._waiting:
                return None
            sample = self._pop()
            self._changed.notify_all()
            return sample

    def close(self) -> None:
        """No more samples will come; those that wait are still given out."""
        self._ended = True
        self._wake()

    def _add(self, sample: Sample) -> None:
        key = sample.source if self.keeps_latest else (sample.source, sample.index)
        if (older := self._waiting.get(key)) is not None:
            # The newer sample takes the place of the older one in the queue, so no source starves another.
            self.dropped["superseded"] += 1
            self._count(older, -1)
        self._waiting[key] = sample
        self._count(sample, 1)
        while self._loose > BACKLOG_LIMIT or (self._loose_bytes > BACKLOG_LIMIT_BYTES and self._loose > 1):
            oldest = next(key for key, waiting in self._waiting.items() if waiting.ack is None)
            self._count(self._waiting.pop(oldest), -1)
            self.dropped["backlog_full"] += 1

    def _pop(self) -> Sample:
        _, sample = self._waiting.popitem(last=False)
        self._count(sample, -1)
        return sample

    def _count(self, sample: Sample, one: Literal[1, -1]) -> None:
        if sample.ack is None:
            self._loose += one
            self._loose_bytes += one * sample.nbytes

    def _wake(self) -> None:
        async def notify() -> None:
            async with self._changed:
                self._changed.notify_all()

        self._notifying = asyncio.get_running_loop().create_task(notify(), name="intake-notify")
