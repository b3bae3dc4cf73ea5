"""`sparse source FILE` of a pipeline that trains: the data set, the run, and what it leaves behind."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from brokers.config.pipeline_file import Pipeline, add_error_context
from brokers.dispatch.channel import MessageChannel
from brokers.dispatch.presence import SourceLoad, SourceRecord
from brokers.errors import SparseError
from brokers.mqtt.client_identity import create_transport
from brokers.process.shutdown import ShutdownEvent, exit_with_parent
from brokers.protocol.messages import JSON, new_request_id
from brokers.protocol.result_json import encode_json
from brokers.protocol.topics import results_topic, source_inbox_topic, source_presence_topic
from brokers.protocol.transport import Delivery, Properties
from brokers.telemetry.client import EventClient
from sources.client.source_presence import SourcePresence
from sources.client.telemetry import make_event_client
from sources.datasets.dataset import Dataset
from sources.inputs.factory import make_dataset
from sources.training.errors import DuplicateSource, TermOver
from sources.training.export_weights import write_weights
from sources.training.run_folder import TrainingRunFolder
from sources.training.run_stats import TrainingRunStats
from sources.training.training_loop import TrainingEventDict, TrainingLoop

log = logging.getLogger(__name__)

# A source that is up renews its record each second.
_RETAINED_WAIT_S, _RENEWAL_WAIT_S = 0.15, 2.5
# The step in hand may take so long, once the run is told to end; then it is given up.
STOP_TIMEOUT_S = 10.0
# What the monitor is told of a step.
_FIGURES = ("step", "epoch", "rows", "step_ms", "loss", "accuracy")


def train(
    pipeline: Pipeline, address: str, name: str, folder: Path, *, resume: bool, pictures: bool, with_parent: bool
) -> tuple[dict[str, Any], ShutdownEvent]:
    """Train until the epochs are done, or somebody says stop; the summary, and whether somebody did."""
    with add_error_context(pipeline):
        dataset = make_dataset(pipeline.source, pipeline.folder)
        record = TrainingRunFolder(folder, pipeline.name, pictures)
        with make_event_client(pipeline, name) as events:
            return asyncio.run(_TrainingRun(pipeline, address, name, dataset, record, events).go(resume, with_parent))


class _TrainingRun:
    """One run, on one loop."""

    def __init__(
        self,
        pipeline: Pipeline,
        address: str,
        name: str,
        dataset: Dataset,
        record: TrainingRunFolder,
        events: EventClient,
    ) -> None:
        self._pipeline, self._name, self._dataset, self._record = pipeline, name, dataset, record
        self._monitor = events
        self._line = MessageChannel(create_transport(address, client_id=f"source.{name}.{new_request_id()[:4].hex()}"))
        self._inbox = source_inbox_topic(pipeline.source.site, name)
        self._tally = TrainingRunStats(pipeline.name)
        for event in record.recorded_events():  # of the run that is gone on with
            self._tally.add(event)
        self._events: asyncio.Queue[TrainingEventDict] = asyncio.Queue()
        self._standing = SourcePresence(self._line, pipeline, name, self._load)
        self._training: TrainingLoop | None = None
        self._begun_s = time.monotonic()

    async def go(self, resume: bool, with_parent: bool) -> tuple[dict[str, Any], ShutdownEvent]:
        leaving = ShutdownEvent()
        leaving.install_signal_handlers()
        if with_parent:
            exit_with_parent(leaving)
        await self._line.open(will=self._standing.will)
        publishing = asyncio.create_task(self._publish_all(), name="events")
        try:
            await self._look_for_twin()
            await self._standing.announce()
            self._standing.start()
            training = self._training = TrainingLoop(
                self._pipeline, self._dataset, self._name, self._line, self._inbox, self._tell, resume=resume
            )
            await self._line.subscribe(self._inbox, training.step_runner.on_message)
            await training.membership.subscribe(self._line)
            self._line.transport.on_reconnect(self._reconnected)
            trouble, files = await self._train(training, leaving)
            with suppress(TimeoutError):
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await self._events.join()
        finally:
            publishing.cancel()
            await asyncio.gather(publishing, return_exceptions=True)
            await self._standing.stop()
            await self._line.close()
            self._record.close()
        summary = await asyncio.to_thread(self._record.finish, self._summary(files))
        if trouble is not None:
            raise trouble
        return summary, leaving

    async def _train(self, training: TrainingLoop, leaving: ShutdownEvent) -> tuple[SparseError | None, dict[str, Any]]:
        """Train, and fetch the weights; what went wrong, and the files that were written."""
        running = asyncio.create_task(training.run(), name="training")
        told = asyncio.create_task(leaving.wait(), name="leaving")
        await asyncio.wait({running, told}, return_when=asyncio.FIRST_COMPLETED)
        told.cancel()
        if not running.done():
            training.stop_requested.set()
            training.membership.changed.set()
            await asyncio.wait({running}, timeout=STOP_TIMEOUT_S)
            if not running.done():
                log.warning("the step in hand was given up: what is in the last checkpoint counts")
                running.cancel()
        try:
            await running
            return None, await self._fetch(training)
        except (TermOver, asyncio.CancelledError):
            return None, {}
        except SparseError as error:
            return error, {}

    async def _fetch(self, training: TrainingLoop) -> dict[str, Any]:
        if not training.completed_steps:
            return {}
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S if training.stop_requested.is_set() else None):
                parts = await training.fetch_weights()
        except TimeoutError:
            log.warning("the weights were not fetched: they are in the checkpoints of the stages")
            return {}
        try:
            return dict(await asyncio.to_thread(write_weights, self._record.folder, parts))
        except OSError as error:
            log.warning("the weights could not be written to %s: %s", self._record.folder, error.strerror)
            return {}

    async def _reconnected(self) -> None:
        if self._training:
            self._training.step_runner.on_connection_lost()

    async def _look_for_twin(self) -> None:
        """Raise `DuplicateSource` if a source of this name is up: the two would do one another's steps."""
        heard: list[SourceRecord] = []
        came = asyncio.Event()

        def hear(delivery: Delivery) -> None:
            if delivery.payload:
                with suppress(SparseError):
                    heard.append(SourceRecord.from_bytes(bytes(delivery.payload)))
            else:
                heard.clear()
            came.set()

        topic = source_presence_topic(self._pipeline.source.site, self._pipeline.name, self._name)
        await self._line.transport.subscribe(topic, hear, qos=1)
        await asyncio.sleep(_RETAINED_WAIT_S)
        if heard:
            heard.clear()
            came.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(_RENEWAL_WAIT_S):
                    await came.wait()
            if heard:
                raise DuplicateSource(self._name)
        await self._line.transport.unsubscribe(topic)

    # What is told --------------------------------------------------------------------------------------------------

    def _tell(self, event: TrainingEventDict) -> None:
        whole = {"source": self._name, "pipeline": self._pipeline.name, **event}
        self._tally.add(whole)
        self._record.add(whole)
        self._events.put_nowait(whole)
        if event["event"] == "step":
            self._monitor.emit("step_done", **{figure: event[figure] for figure in _FIGURES})

    async def _publish_all(self) -> None:
        """Events, in order, for any MQTT client; training waits for none of them."""
        topic = results_topic(self._pipeline.source.site, self._name)
        while True:
            event = await self._events.get()
            try:
                await self._line.transport.publish(topic, encode_json(event), Properties(JSON), qos=1)
            except SparseError as error:
                log.warning("could not publish an event: %s", error)
            finally:
                self._events.task_done()

    def _load(self) -> SourceLoad:
        done = self._training.completed_micro_batches if self._training else 0
        return SourceLoad(requests=done, results=done)

    def _summary(self, files: dict[str, Any]) -> dict[str, Any]:
        order = [stage.name for stage in self._pipeline.stage]
        figures = self._tally.summary(order, time.monotonic() - self._begun_s)
        return {"broker": self._line.transport.address, **figures, "files": files}
