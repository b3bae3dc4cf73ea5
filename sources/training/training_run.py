"""A training run from connecting to the summary: trains, publishes the events, fetches and writes the weights.

Its output folder holds its events as JSON lines, weights, learning curves, a summary.
"""

import asyncio
import logging
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from brokers.config.pipeline_file import Pipeline
from brokers.dispatch.channel import MessageChannel
from brokers.dispatch.presence import SourceLoad
from brokers.dispatch.worker_registry import PresenceListener
from brokers.errors import SparseError, UsageError, describe_error
from brokers.process.files import atomic_path
from brokers.protocol.messages import JSON, TensorContent
from brokers.protocol.result_json import encode_json
from brokers.protocol.safetensors_codec import pack
from brokers.protocol.topics import results_topic, source_presence_topic
from brokers.protocol.transport import Properties
from brokers.telemetry.client import event_client_from_environment
from sources.client.source_presence import SourcePresence, create_source_transport
from sources.datasets.dataset import Dataset
from sources.inference.run_folder import JsonlWriter, read_jsonl, write_summary
from sources.training.learning_curves import plot_learning_curves
from sources.training.run_stats import TrainingRunStats
from sources.training.training_loop import TrainingEventDict, TrainingLoop
from sources.training.two_phase_step import TermOver

log = logging.getLogger(__name__)

EVENTS_FILE = "training.jsonl"
CURVES_FILE = "training.png"
MODEL_FILE = "model.safetensors"
PARTS_FOLDER = "parts"
# Retained presence records follow the SUBACK at once; a source that is up renews its record each second.
_RETAINED_WAIT_S = 0.15
_RENEWAL_WAIT_S = 2.5
# At a shutdown: for the step in progress, for the weights, for the last events.
STOP_TIMEOUT_S = 10.0
_TELEMETRY_KEYS = ("step", "epoch", "rows", "step_ms", "loss", "accuracy")


class TrainingRunFolder:
    """Writes each event as it happens, and keeps the statistics. Events of a run that is resumed come first.

    Raises `BadFile` where the folder cannot be written.
    """

    def __init__(self, folder: Path, title: str, pictures: bool) -> None:
        self.folder = folder
        self.stats = TrainingRunStats(title)
        self._events = JsonlWriter(folder / EVENTS_FILE)
        self._title = title
        self._pictures = pictures
        for event in read_jsonl(folder / EVENTS_FILE):
            self.stats.add(event)

    def add(self, event: Mapping[str, Any]) -> None:
        self.stats.add(event)
        self._events.append(event)

    def finish(self, summary: Mapping[str, Any], files: Mapping[str, Any]) -> dict[str, Any]:
        """Plot the curves and write the summary; return it with the names of all files."""
        self.close()
        return write_summary(self.folder, summary, {**files, "events": EVENTS_FILE, **self._plot()})

    def close(self) -> None:
        self._events.close()

    def _plot(self) -> dict[str, str]:
        if not self._pictures or not self.stats.executed_steps:
            return {}
        try:
            plot_learning_curves(self.stats, self.folder / CURVES_FILE, self._title)
        except ImportError as error:
            log.warning("no learning curves, %s: install the extra 'train' of sparse-mqtt", error)
            return {}
        except Exception as error:  # noqa: BLE001 - the events are written, so the run has not failed
            log.warning("the learning curves could not be plotted: %s", describe_error(error))
            return {}
        return {"curves": CURVES_FILE}


def write_weights(folder: Path, parts: Mapping[str, TensorContent]) -> dict[str, str]:
    """Write the weights of a trained pipeline atomically; return the names of the files by kind.

    `parts/STAGE.safetensors` are those of each stage, `model.safetensors` has the names of the uncut network. Raises
    `OSError`.
    """
    (folder / PARTS_FOLDER).mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor for part in parts.values() for name, tensor in part.tensors.items()}
    files = {f"{PARTS_FOLDER}/{stage}.safetensors": part for stage, part in parts.items()}
    for name, content in {**files, MODEL_FILE: TensorContent(tensors)}.items():
        # Message content has the format of a safetensors file.
        with atomic_path(folder / name) as partial, partial.open("wb") as file:
            file.writelines(pack(content.tensors, content.metadata))
    return {"model": MODEL_FILE, "parts": f"{PARTS_FOLDER}/"}


class TrainingRun:
    """Runs `TrainingLoop` as source `name`. Raises what the data set raises."""

    def __init__(
        self, pipeline: Pipeline, address: str, name: str, dataset: Dataset, folder: TrainingRunFolder, *, resume: bool
    ) -> None:
        self._pipeline = pipeline
        self._name = name
        self._folder = folder
        self._channel = MessageChannel(create_source_transport(name, address))
        self._loop = TrainingLoop(pipeline, dataset, name, self._channel, self._on_event, resume=resume)
        self._presence = SourcePresence(self._channel, pipeline, name, self._load)
        self._telemetry = event_client_from_environment(
            os.environ, "source", name, site=pipeline.source.site, pipeline=pipeline.name, source=name
        )
        self._unpublished: asyncio.Queue[TrainingEventDict] = asyncio.Queue()

    async def run(self, shutdown: asyncio.Event) -> dict[str, Any]:
        """Train to the end or to `shutdown`; return the summary.

        Raises `UsageError` ("DuplicateSource") if a source of this name is running, and what `TrainingLoop.run`
        raises, after the summary is written.
        """
        begin_s = time.monotonic()
        await self._channel.open(will=self._presence.will)
        self._telemetry.open()
        publisher = asyncio.create_task(self._publish_events(), name="event-publisher")
        try:
            await self._check_unique()
            await self._presence.start()
            await self._loop.open()
            error, files = await self._train(shutdown)
            with suppress(TimeoutError):
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await self._unpublished.join()
        finally:
            publisher.cancel()
            await asyncio.gather(publisher, return_exceptions=True)
            await self._presence.stop()
            await self._loop.close()
            await self._channel.close()
            await asyncio.to_thread(self._telemetry.close)
            self._folder.close()
        stages = [stage.name for stage in self._pipeline.stage]
        statistics = self._folder.stats.summary(stages, time.monotonic() - begin_s)
        summary = {"broker": self._channel.transport.address, **statistics}
        summary = await asyncio.to_thread(self._folder.finish, summary, files)
        if error is not None:
            raise error
        return summary

    async def _train(self, shutdown: asyncio.Event) -> tuple[SparseError | None, dict[str, str]]:
        """Train and fetch the weights; return the error that ended the run, and the files that were written."""
        training = asyncio.create_task(self._loop.run(), name="training")
        stopping = asyncio.create_task(shutdown.wait(), name="shutdown")
        await asyncio.wait({training, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not training.done():
            self._loop.stop()
            await asyncio.wait({training}, timeout=STOP_TIMEOUT_S)
            if not training.done():
                log.warning("the step in progress was given up: a resumed run continues from the last checkpoint")
                training.cancel()
        try:
            await training
            return None, await self._export_weights()
        except (TermOver, asyncio.CancelledError):
            return None, {}
        except SparseError as error:
            return error, {}

    async def _export_weights(self) -> dict[str, str]:
        if not self._loop.completed_steps:
            return {}
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S if self._loop.stop_requested.is_set() else None):
                parts = await self._loop.fetch_weights()
        except TimeoutError:
            log.warning("the weights were not fetched in time: they are in the checkpoints of the stages")
            return {}
        try:
            return await asyncio.to_thread(write_weights, self._folder.folder, parts)
        except OSError as error:
            log.warning("the weights could not be written to %s: %s", self._folder.folder, error.strerror)
            return {}

    async def _check_unique(self) -> None:
        """Two sources of one name would take each other's steps for their own."""
        listener = PresenceListener(self._channel.transport)
        await listener.subscribe(source_presence_topic(self._pipeline.source.site, self._pipeline.name, self._name))
        try:
            await asyncio.sleep(_RETAINED_WAIT_S)
            if not listener.registry.sources:
                return
            # The retained record may be a leftover of a source that was killed; a running one renews it.
            if await listener.wait_for(
                lambda registry: any(entry.is_renewed for entry in registry.sources.values()), _RENEWAL_WAIT_S
            ):
                message = f"a source {self._name!r} trains this pipeline: stop it, or choose another name with --name"
                raise UsageError("DuplicateSource", message, source=self._name)
        finally:
            await listener.unsubscribe()

    def _on_event(self, event: TrainingEventDict) -> None:
        event = {"source": self._name, "pipeline": self._pipeline.name, **event}
        self._folder.add(event)
        self._unpublished.put_nowait(event)
        if event["event"] == "step":
            self._telemetry.emit("step_done", **{key: event[key] for key in _TELEMETRY_KEYS})

    async def _publish_events(self) -> None:
        """Publish the events in order, for any MQTT client; training does not wait for it."""
        topic = results_topic(self._pipeline.source.site, self._name)
        while True:
            event = await self._unpublished.get()
            try:
                await self._channel.transport.publish(topic, encode_json(event), Properties(JSON), qos=1)
            except SparseError as error:
                log.warning("could not publish an event: %s", error)
            finally:
                self._unpublished.task_done()

    def _load(self) -> SourceLoad:
        done = self._loop.completed_micro_batches
        return SourceLoad(requests=done, results=done)
