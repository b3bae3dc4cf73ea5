"""Sample and Source: one input of a pipeline, and the interface of everything that yields samples."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from brokers.protocol.messages import BinaryContent, Content
from brokers.protocol.traceparent import TraceContext
from sources.conversion import to_content

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from brokers.process.image_decode import RgbImage


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
