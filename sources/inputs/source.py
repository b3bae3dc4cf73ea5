"""Source: the interface of everything that yields samples."""

from collections.abc import Iterator
from typing import Protocol

from sources.inputs.sample import Sample


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
