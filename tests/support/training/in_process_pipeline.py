"""A pipeline that trains, within one process: real workers, real sources, a hub that a test may listen to and cut."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from brokers.config.pipeline_file import Pipeline
from brokers.dispatch.channel import MessageChannel
from brokers.dispatch.presence import SourceLoad
from brokers.errors import SparseError, WireError
from brokers.mqtt.in_memory import MemoryBroker, MemoryTransport
from brokers.protocol.codec import decode
from brokers.protocol.messages import Message, StepMessage
from brokers.protocol.safetensors_codec import to_torch
from brokers.protocol.transport import Delivery
from sources.client.source_presence import SourcePresence
from sources.datasets.batches import Batches, split_micro_batches
from sources.datasets.dataset import Dataset
from sources.training.training_loop import TrainingEventDict, TrainingLoop
from stages.training import coordinator
from stages.training.part_trainer import PartTrainer
from stages.training.training_worker import TrainingWorker
from stages.worker import stage_worker
from tests.support.brokers.broker_kinds import WAIT_S
from tests.support.training.in_process_parts import UnsplitTrainer
from tests.support.training.striped_images import StripedImages
from tests.support.training.training_network import CUTS, MODEL, small_network

SEED = 3


def kill_client(hub: MemoryBroker, transport: MemoryTransport) -> None:
    """End a client as when its process is killed: it says nothing more, and its broker tells."""
    hub.kill_client(transport)
    transport._closed = True
    transport._changed.set()


class InProcessWorker:
    """One worker of one stage."""

    def __init__(self, hub: MemoryBroker, pipeline: Pipeline, stage: int, name: str, folder: Path) -> None:
        self.transport = MemoryTransport(hub)
        self.stage = pipeline.stage[stage]
        self.part_trainer = PartTrainer(pipeline, self.stage, device="cpu", threads=1)
        self.trainer = TrainingWorker(
            self.transport, pipeline, self.stage, self.part_trainer, name, "cpu", folder / self.stage.name
        )
        self._hub = hub
        self._running: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self.trainer.start()
        self._running = asyncio.create_task(self.trainer.run(), name=f"run {self.trainer.worker}")

    @property
    def is_running(self) -> bool:
        return self._running is not None and not self._running.done()

    async def drain(self) -> None:
        await self.trainer.drain()
        assert self._running is not None
        await asyncio.wait_for(self._running, WAIT_S)
        await self.trainer.stop()

    def kill(self) -> None:
        """As when its process is killed."""
        kill_client(self._hub, self.transport)

    async def close(self) -> None:
        """Let go of what is left of it. Raises whatever ended it before."""
        await self.transport.close()
        assert self._running is not None
        self._running.cancel()
        with suppress(asyncio.CancelledError, SparseError):
            await self._running
        await self.trainer.stop()


class InProcessSource:
    """A source: what `sparse source` does of a training run, without its files."""

    def __init__(
        self,
        hub: MemoryBroker,
        pipeline: Pipeline,
        name: str,
        dataset: Dataset,
        resume: bool,
        on_event: Callable[[TrainingEventDict], None],
    ) -> None:
        self.name, self.dataset = name, dataset
        self.events: list[TrainingEventDict] = []
        self.transport = MemoryTransport(hub)
        self.channel = MessageChannel(self.transport)
        self._standing = SourcePresence(self.channel, pipeline, name, SourceLoad)
        self._told = on_event
        self.training = TrainingLoop(pipeline, dataset, name, self.channel, self._tell, resume=resume)

    def _tell(self, event: TrainingEventDict) -> None:
        self.events.append(event)
        self._told(event)

    async def start(self) -> None:
        await self.channel.open(will=self._standing.will)
        await self._standing.start()
        await self.training.open()

    async def close(self) -> None:
        await self._standing.stop()
        await self.training.close()
        await self.channel.close()

    def events_of_kind(self, kind: str) -> list[TrainingEventDict]:
        return [event for event in self.events if event["event"] == kind]


class InProcessPipeline:
    """A pipeline of three stages (or as many as it is told), its workers, its sources, and whoever listens."""

    def __init__(self, folder: Path, *, cuts: Iterable[int] = CUTS, **training: Any) -> None:
        self.hub = MemoryBroker(max_packet_bytes=100_000_000)
        self.folder = folder
        settings = {"batch": 24, "micro_batches": 3, "epochs": 2, "checkpoint_every": 4, "evaluate_every": 0}
        self.pipeline = Pipeline.model_validate(
            {
                "path": str(folder / "lesson.toml"),
                "pipeline": {
                    "name": "lesson", "kind": "training", "model": MODEL, "cuts": list(cuts), "seed": SEED,
                    "lease_s": 20.0,
                },
                "stage": [{"name": f"s{index}"} for index in range(len(list(cuts)) + 1)],
                "training": {**settings, "lr": 0.05, "settings": {"momentum": 0.9}, **training},
            }
        )  # fmt: skip
        self.workers: list[InProcessWorker] = []
        self.sources: list[InProcessSource] = []
        self.messages: list[tuple[str, Message]] = []  # all that was said, in order
        self.on_message: Callable[[str, Message], None] = lambda topic, message: None
        self.on_event: Callable[[TrainingEventDict], None] = lambda event: None
        self._ear = MemoryTransport(self.hub)

    async def start(self, *stages: int) -> None:
        """Listen, and start a worker for each stage."""
        await self._ear.connect()
        await self._ear.subscribe("sparse/#", self._hear)
        for stage in stages or range(len(self.pipeline.stage)):
            await self.add_worker(stage)

    async def add_worker(self, stage: int, name: str = "", folder: Path | None = None) -> InProcessWorker:
        made = InProcessWorker(
            self.hub, self.pipeline, stage, name or f"w{stage}-{len(self.workers)}", folder or self.folder / "versions"
        )
        self.workers.append(made)
        await made.start()
        return made

    async def add_source(
        self, name: str = "pupil", dataset: Dataset | None = None, *, resume: bool = False
    ) -> InProcessSource:
        made = InProcessSource(self.hub, self.pipeline, name, dataset or StripedImages(), resume, self._told)
        self.sources.append(made)
        await made.start()
        return made

    async def train(
        self, name: str = "pupil", dataset: Dataset | None = None, *, resume: bool = False
    ) -> InProcessSource:
        """A whole run of one source."""
        made = await self.add_source(name, dataset, resume=resume)
        await made.training.run()
        return made

    async def close(self) -> None:
        for pupil in self.sources:
            await pupil.close()
        for worker in self.workers:
            await worker.close()
        await self._ear.close()

    def _hear(self, delivery: Delivery) -> None:
        with suppress(WireError):
            message = decode(delivery.properties, delivery.payload)
            if "sparse" in dict(delivery.properties.user_properties):
                self.messages.append((delivery.topic, message))
                self.on_message(delivery.topic, message)

    def _told(self, event: TrainingEventDict) -> None:
        self.on_event(event)

    async def wait_for(self, description: str, poll: Callable[[], object]) -> None:
        """Wait until something is so."""
        try:
            async with asyncio.timeout(WAIT_S):
                while not poll():  # noqa: ASYNC110 - it looks at what tells nobody
                    await asyncio.sleep(0.01)
        except TimeoutError:
            raise AssertionError(f"waited {WAIT_S:g} s for {description}") from None

    async def wait_for_step(self, source: InProcessSource, step: int) -> None:
        await self.wait_for(f"step {step}", lambda: source.training.completed_steps >= step)

    async def wait_for_messages(self, count: int = 4) -> None:
        wanted = len(self.messages) + count
        await self.wait_for("more to be said", lambda: len(self.messages) >= wanted)

    # What came of it ----------------------------------------------------------------------------------------------

    @property
    def members(self) -> dict[str, str]:
        """Who trains now, as those who trained last know it."""
        found = [worker.trainer for worker in self.workers if worker.is_running]
        newest = max(found, key=lambda trainer: trainer.step_queue.term)
        return dict(newest.executor.members)

    def active_worker(self, stage: int) -> InProcessWorker:
        """The worker that trains a stage."""
        name = self.members[f"s{stage}"]
        return next(worker for worker in self.workers if worker.trainer.worker == name)

    @property
    def saved_activations(self) -> int:
        """Forwards that wait, at those who train."""
        return sum(len(self.active_worker(stage).part_trainer.activations) for stage in range(len(self.pipeline.stage)))

    async def weights(self, source: InProcessSource) -> dict[str, Tensor]:
        bodies = await source.training.fetch_weights()
        return {name: to_torch(tensor) for body in bodies.values() for name, tensor in body.tensors.items()}

    def sources_by_version(self) -> list[str]:
        """Whose step each version is, from the first: a version that was done again is the last one that was done."""
        found: dict[int, str] = {}
        for topic, message in self.messages:
            if isinstance(message, StepMessage) and message.verb == "committed" and message.details["stage"] == "s0":
                found[message.details["version"]] = topic.split("/")[3]
        return [found[version] for version in sorted(found)]

    def train_unsplit(self, order: Iterable[str], datasets: Mapping[str, Dataset]) -> dict[str, Tensor]:
        """The state of the uncut network in a plain loop, when sources do their steps in this order.

        In the thread that computes for all: what it still does would draw from the same generator.
        """
        with vars(stage_worker)["ThreadPoolExecutor"](1) as thread:
            found: dict[str, Tensor] = thread.submit(self._plainly, order, datasets).result()
            return found

    def _plainly(self, order: Iterable[str], datasets: Mapping[str, Dataset]) -> dict[str, Tensor]:
        table = self.pipeline.training
        torch.manual_seed(SEED)
        model = small_network()
        whole = UnsplitTrainer(model, torch.optim.SGD(model.parameters(), lr=table.lr, momentum=0.9), seed=SEED)
        done = dict.fromkeys(datasets, 0)
        batches = {name: Batches(dataset.train(), table.batch, SEED) for name, dataset in datasets.items()}
        for name in order:
            inputs, labels = batches[name].batch(done[name])
            pieces = split_micro_batches(inputs, labels, table.micro_batches)
            whole.train_step(
                done[name], [(torch.from_numpy(some), torch.from_numpy(theirs)) for some, theirs in pieces]
            )
            done[name] += 1
        return model.state_dict()


class _OneThread(ThreadPoolExecutor):
    """The compute thread of all workers of this process: they share torch's generator, and what torch.fx patches."""

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Not before the process ends: the others compute on."""


def shorten_intervals(monkeypatch: Any) -> None:
    """Workers that report ten times a second: what takes them seconds is done in tenths. All compute in one thread."""
    one_thread = _OneThread(1, thread_name_prefix="compute")
    monkeypatch.setattr(stage_worker, "ThreadPoolExecutor", lambda *_, **__: one_thread)
    monkeypatch.setattr(stage_worker, "REPORT_INTERVAL_S", 0.1)
    monkeypatch.setattr(coordinator, "LISTEN_S", 0.25)
