"""What every source is: something that gives samples until there are no more, or until it is closed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from sources.inputs.sample import Sample


class Source(Protocol):
    """Where samples come from. Derive from it, or look like it; a pipeline file names it as `"package.module:Class"`.

    `samples` is a plain generator, run in a thread of its own, so it may block and sleep as it likes. A whole source:

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
    """One level of a topic: results appear on `sparse/{site}/results/{name}`."""
    live: bool = False
    """True: fresh before complete, the newest sample is wanted, older ones may be dropped. False: each one counts."""
    dropped: int = 0
    """Samples that this source let go by itself, because newer ones came before they were asked for."""
    unreadable: int = 0
    """Samples that could not be read; the log names each."""

    def samples(self) -> Iterator[Sample]:
        """Give the samples in order; `index` counts from 0. Called once. Raise a `UsageError` when it cannot begin."""
        ...

    def close(self) -> None:
        """Have `samples` end soon and free what it holds. Called from any thread, maybe twice, maybe before."""
