"""How many requests a pipeline works on at once, from the presence of its workers: what a window follows."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from brokers.dispatch import Dispatcher
from brokers.errors import WireError
from brokers.line import Line
from brokers.outbox import Outbox
from brokers.pipeline import Pipeline
from brokers.presence import Birth
from brokers.topics import last_level
from brokers.transport import Delivery


class Places:
    """Counts the workers of all stages. The first stage's are known to `first`; of the others we hear for ourselves."""

    def __init__(self, line: Line, pipeline: Pipeline, first: Outbox, changed: Callable[[], None]) -> None:
        self._line, self._pipeline, self._first, self._changed = line, pipeline, first, changed
        self._later = {stage.name: Dispatcher() for stage in pipeline.stage[1:]}

    async def open(self) -> None:
        for stage in self._pipeline.stage[1:]:
            topics = self._pipeline.topics(stage)
            await self._line.transport.subscribe(topics.all_presence, partial(self._heard, stage.name), qos=1)

    @property
    def count(self) -> int:
        """Tasks that are computed at once, over all stages; by the file where nobody is up yet."""
        found = self._first.batches + sum(stage.batches for stage in self._later.values())
        return found or sum(stage.workers * stage.max_batch for stage in self._pipeline.stage)

    def _heard(self, stage: str, delivery: Delivery) -> None:
        known, worker, now_s = self._later[stage], last_level(delivery.topic), time.monotonic()
        for silent in known.silent(now_s):
            known.gone(silent)
        if not delivery.payload:
            known.gone(worker)
            return
        try:
            birth = Birth.from_bytes(bytes(delivery.payload))
        except WireError:
            return  # whoever sends to that stage says so
        if birth.worker == worker:
            known.seen(birth, now_s)
            self._changed()
