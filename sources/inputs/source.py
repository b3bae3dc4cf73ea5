"""Samples, the inputs of a pipeline; Source, the interface of everything that yields them; the buffer in between."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from brokers.protocol.messages import BinaryContent, Content
from brokers.protocol.traceparent import TraceContext
from sources.conversion import to_content

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from brokers.process.image_decode import RgbImage
# For sources that cannot be made to wait (the ingress): beyond these the oldest sample is dropped. Samples that await
# their acknowledgement are never dropped, and do not count: the broker bounds their number.
BACKLOG_LIMIT = 1024
BACKLOG_LIMIT_BYTES = 256 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One input of a pipeline.

    Args:
        source: the source's name; the result is published on `sparse/{site}/results/{source}`.
        index: position among the samples of this source, from 0.
        payload: encoded bytes (a JPEG, a PNG, JSON) or named arrays of any shape, which travel as safetensors.
        content_type: the media type of `payload`; `SAFETENSORS` for arrays.
        load_image: decodes the picture, (H, W, 3) uint8 RGB, for the gallery; None for other inputs.
        timestamp_s: capture time, monotonic clock of this machine.
        ack: acknowledges the sample after its result was published; until then the broker keeps a copy.
        redelivered: the broker delivered the sample before, so its result may have been published already.
        trace: the span of the producer, parent of the request's span.
    """

    source: str
    index: int
    payload: bytes | Mapping[str, NDArray[Any]]
    content_type: str
    load_image: Callable[[], RgbImage] | None = None
    timestamp_s: float = field(default_factory=time.monotonic)
    ack: Callable[[], None] | None = None
    redelivered: bool = False
    trace: TraceContext | None = None

    @property
    def nbytes(self) -> int:
        """Size of the payload in memory."""
        if isinstance(self.payload, bytes):
            return len(self.payload)
        return sum(array.nbytes for array in self.payload.values())

    def to_content(self) -> Content:
        """The payload as message content. Raises `BadPayload` for arrays that safetensors cannot hold."""
        if isinstance(self.payload, bytes):
            return BinaryContent(self.content_type, self.payload)
        return to_content(self.payload)


class Source(Protocol):
    """Yields samples until it is exhausted or closed. Subclass it, or provide the same attributes.

    A pipeline file names your class as `kind = "package.module:Class"`; it is created as `Class(name, **settings)`.
    `samples` runs in its own thread, so it may block. A complete source:

        class Thermometer(Source):
            def __init__(self, name: str) -> None:
                self.name = name
                self.open = True

            def samples(self) -> Iterator[Sample]:
                for index in itertools.takewhile(lambda _: self.open, itertools.count()):
                    yield Sample(self.name, index, {"celsius": numpy.array([read_sensor()])}, SAFETENSORS)

            def close(self) -> None:
                self.open = False
    """

    name: str
    """One topic level: results are published on `sparse/{site}/results/{name}`."""
    live: bool = False
    """True: only the newest sample matters, and older ones may be dropped. False: every sample is processed."""
    dropped: int = 0
    """Samples that the source itself dropped because a newer one arrived first."""
    unreadable: int = 0
    """Samples that could not be read; each is named in the log."""

    def samples(self) -> Iterator[Sample]:
        """Yield the samples, with `index` counting from 0. Called once. Raise `UsageError` if it cannot start."""
        ...

    def close(self) -> None:
        """Make `samples` end soon, and release resources. Called from any thread, at any time, possibly twice."""


class SampleBuffer:
    """A bounded queue of samples between a source and the pipeline, for one event loop.

    With `keep="all"` it keeps every sample in order; with `keep="latest"` one replaces the older one of its source.
    """

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
