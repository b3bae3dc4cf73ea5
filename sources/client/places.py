"""The workers of all stages, as a source hears of them: how many requests they work on at once, and who has died."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from brokers.config.pipeline_file import Pipeline
from brokers.dispatch.channel import MessageChannel
from brokers.dispatch.presence import WorkerRecord
from brokers.dispatch.stage_client import StageClient
from brokers.dispatch.worker_pool import Dispatcher
from brokers.errors import WireError
from brokers.protocol.topics import last_level
from brokers.protocol.transport import Delivery


class PipelineWorkers:
    """Counts the workers. Those of the first stage are known to `first`; of the others we hear for ourselves.

    `died` is called when a worker of a later stage has died or fallen silent: it may have had requests of ours that
    nobody tells us of, since whoever passed them on to it may have died with it. So it is when records of one were lost
    on their way, or its broker was: a bridge to its site was down, and what else went there is lost as well.
    """

    def __init__(
        self,
        line: MessageChannel,
        pipeline: Pipeline,
        first: StageClient,
        *,
        on_change: Callable[[], None],
        on_worker_lost: Callable[[], None],
    ) -> None:
        self._line, self._pipeline, self._first = line, pipeline, first
        self._changed, self._died = on_change, on_worker_lost
        self._later = {stage.name: Dispatcher() for stage in pipeline.stage[1:]}

    async def subscribe(self) -> None:
        for stage in self._pipeline.stage[1:]:
            topics = self._pipeline.topics(stage)
            await self._line.transport.subscribe(topics.presence_filter, partial(self._heard, stage.name), qos=1)

    @property
    def concurrency(self) -> int:
        """Tasks that are computed at once, over all stages; by the file where nobody is up yet."""
        found = self._first.total_batch_size + sum(stage.total_batch_size for stage in self._later.values())
        return found or sum(stage.workers * stage.max_batch for stage in self._pipeline.stage)

    @property
    def widest_stage_workers(self) -> int:
        """How many workers are up in the stage that has most; by the file where nobody is up yet."""
        found = max(len(self._first), *(len(stage) for stage in self._later.values()), 0)
        return found or max(stage.workers for stage in self._pipeline.stage)

    def worker_count(self, stage: str) -> int:
        """How many workers of a stage are up."""
        return len(self._later.get(stage, self._first))

    def _heard(self, stage: str, delivery: Delivery) -> None:
        known, worker, now_s = self._later[stage], last_level(delivery.topic), time.monotonic()
        for each in self._later.values():
            for silent in each.timed_out(now_s):
                self._forget(each, silent)
        if not delivery.payload:
            self._forget(known, worker)
            return
        try:
            birth = WorkerRecord.from_bytes(bytes(delivery.payload))
        except WireError:
            return  # whoever sends to that stage says so
        if birth.worker == worker:
            if known.has_gap(birth, now_s):
                self._died()
            known.update(birth, now_s)
            self._changed()

    def _forget(self, known: Dispatcher, worker: str) -> None:
        died = known.is_active(worker)
        known.remove(worker)
        if died:
            self._died()
