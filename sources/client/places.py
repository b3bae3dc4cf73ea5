"""The workers of all stages of a pipeline, as a source needs them: how many tasks they compute, and which are lost."""

from __future__ import annotations

import time
from collections.abc import Callable

from brokers.config.pipeline_file import Pipeline
from brokers.dispatch.stage_client import StageClient
from brokers.dispatch.worker_registry import PresenceEvent


class PipelineWorkers:
    """Counts the workers of all stages, with the presence listener of the first stage's client.

    `on_worker_lost` is called when a worker of a later stage is lost, or messages to or from one may have been: it may
    have had requests of ours, and the worker that passed them on may be lost too.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        first: StageClient,
        *,
        on_change: Callable[[], None],
        on_worker_lost: Callable[[], None],
    ) -> None:
        self._pipeline = pipeline
        self._on_change = on_change
        self._on_worker_lost = on_worker_lost
        self._presence = first.presence
        self._presence.add_callback(self._on_presence)

    async def subscribe(self) -> None:
        later = self._pipeline.stage[1:]
        await self._presence.subscribe(*(self._pipeline.topics(stage).presence_filter for stage in later))

    @property
    def concurrency(self) -> int:
        """Tasks that are computed at once, over all stages; by the pipeline file while no worker is up."""
        records = self._presence.registry.workers_up(time.monotonic())
        default = sum(stage.workers * stage.max_batch for stage in self._pipeline.stage)
        return sum(record.batch_size for record in records) or default

    @property
    def widest_stage_workers(self) -> int:
        """How many workers are up in the stage that has most; by the pipeline file while no worker is up."""
        most = max(self.worker_count(stage.name) for stage in self._pipeline.stage)
        return most or max(stage.workers for stage in self._pipeline.stage)

    def worker_count(self, stage: str) -> int:
        """How many workers of a stage are up."""
        return len(self._presence.registry.workers_up(time.monotonic(), stage))

    def _on_presence(self, event: PresenceEvent) -> None:
        if event.worker is None:
            return
        is_lost = event.kind == "lost" and event.worker.state != "stopped"
        if event.worker.stage != self._pipeline.stage[0].name and (is_lost or event.kind == "gap"):
            self._on_worker_lost()
        self._on_change()
