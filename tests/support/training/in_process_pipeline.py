"""A training pipeline within one process: real workers and sources over an in-memory broker that a test controls."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from brokers.config.pipeline_file import Pipeline
from brokers.dispatch.channel import MessageChannel
from brokers.dispatch.presence import SourceLoad
from brokers.errors import SparseError, WireError
from brokers.process.import_string import import_string
from brokers.protocol.codec import decode
from brokers.protocol.messages import Message, StepMessage, new_request_id
from brokers.protocol.safetensors_codec import to_torch
from brokers.protocol.transport import Delivery
from sources.client.source_presence import SourcePresence
from sources.datasets.dataset import Batches, Dataset, map_inputs, split_micro_batches
from sources.training import training_loop
from sources.training.training_loop import TrainingEventDict, TrainingLoop
from stages.training import coordinator
from stages.training.part_trainer import PartTrainer
from stages.training.training_worker import TrainingWorker
from stages.worker import stage_worker, worker_presence
from stages.worker.worker_context import WorkerContext
from tests.support.brokers.broker_kinds import WAIT_S, run_async
from tests.support.brokers.in_memory import MemoryBroker, MemoryTransport
from tests.support.training.in_process_parts import UnsplitTrainer, assert_bitwise_equal
from tests.support.training.striped_images import StripedImages
from tests.support.training.training_network import CUTS, MODEL

SEED = 3
STEPS = 8  # of a run: 2 epochs of 96 rows in batches of 24


class InProcessWorker:
    """One worker of one stage. `versions` are those of its checkpoints."""

    def __init__(self, hub: MemoryBroker, pipeline: Pipeline, stage: int, name: str, folder: Path) -> None:
        self.transport = MemoryTransport(hub)
        self.stage = pipeline.stage[stage]
        context = WorkerContext(pipeline, self.stage, name)
        self.part_trainer = PartTrainer(context)
        self.worker = TrainingWorker(self.transport, context, self.part_trainer, folder / self.stage.name)
        self.name = name
        self.inbox = context.inbox
        self.executor = self.worker.executor
        self._hub = hub
        self._running: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self.worker.start()
        self._running = asyncio.create_task(self.worker.run(), name=f"run {self.name}")

    @property
    def is_running(self) -> bool:
        return self._running is not None and not self._running.done()

    @property
    def term(self) -> int:
        return self.worker.step_queue.term

    @property
    def version(self) -> int | None:
        """The version in memory."""
        return self.part_trainer.version

    @property
    def versions(self) -> tuple[int, ...]:
        return self.executor.checkpoints.versions

    async def drain(self) -> None:
        await self.worker.drain()
        assert self._running is not None
        await asyncio.wait_for(self._running, WAIT_S)
        await self.worker.stop()

    async def kill(self) -> None:
        self._hub.kill_client(self.transport)
        await self.close()

    async def close(self) -> None:
        """Release everything. Raises the error that ended `run`, unless it is a `SparseError`."""
        await self.transport.close()
        assert self._running is not None
        self._running.cancel()
        with suppress(asyncio.CancelledError, SparseError):
            await self._running
        await self.worker.stop()


class InProcessSource:
    """A source that trains as `sparse source` does, without files. `events` are those of its run."""

    def __init__(
        self,
        hub: MemoryBroker,
        pipeline: Pipeline,
        name: str,
        dataset: Dataset,
        resume: bool,
        on_event: Callable[[TrainingEventDict], None],
    ) -> None:
        self.name = name
        self.dataset = dataset
        self.events: list[TrainingEventDict] = []
        self.transport = MemoryTransport(hub)
        self.channel = MessageChannel(self.transport)
        self._presence = SourcePresence(self.channel, pipeline, name, SourceLoad)
        self._on_event = on_event
        self.training = TrainingLoop(pipeline, dataset, name, self.channel, self._record, resume=resume)

    def _record(self, event: TrainingEventDict) -> None:
        self.events.append(event)
        self._on_event(event)

    async def start(self) -> None:
        await self.channel.open(will=self._presence.will)
        await self._presence.start()
        await self.training.open()

    async def close(self) -> None:
        await self._presence.stop()
        await self.training.close()
        await self.channel.close()

    @property
    def completed_steps(self) -> int:
        return self.training.completed_steps

    def events_of_kind(self, kind: str) -> list[TrainingEventDict]:
        return [event for event in self.events if event["event"] == kind]


class InProcessPipeline:
    """A pipeline of three stages, or of those that `cuts` make; `training` are keys of its table of this name.

    `model` names the network in the pipeline file.

    `messages` are all messages on the broker, in order; `on_message` and `on_event` are called for each of them and for
    each event of a source.
    """

    def __init__(self, folder: Path, *, model: str = MODEL, cuts: Iterable[int] = CUTS, **training: Any) -> None:
        self.hub = MemoryBroker(max_packet_bytes=100_000_000)
        self.folder = folder
        cuts = list(cuts)
        table = {"name": "lesson", "kind": "training", "model": model, "cuts": cuts, "seed": SEED, "lease_s": 20.0}
        defaults = {"batch": 24, "micro_batches": 3, "epochs": 2, "checkpoint_every": 4, "evaluate_every": 0}
        self.file = Pipeline.model_validate(
            {
                "path": str(folder / "lesson.toml"),
                "pipeline": table,
                "stage": [{"name": f"s{index}"} for index in range(len(cuts) + 1)],
                "training": {**defaults, "lr": 0.05, "settings": {"momentum": 0.9}, **training},
            }
        )
        self.workers: list[InProcessWorker] = []
        self.sources: list[InProcessSource] = []
        self.messages: list[tuple[str, Message]] = []
        self.on_message: Callable[[str, Message], None] = lambda topic, message: None
        self.on_event: Callable[[TrainingEventDict], None] = lambda event: None
        self._listener = MemoryTransport(self.hub)

    async def start(self, *stages: int) -> None:
        """Start a worker for each of these stages, by default all."""
        await self._listener.connect()
        await self._listener.subscribe("sparse/#", self._on_delivery)
        await asyncio.gather(*(self.add_worker(stage) for stage in stages or range(len(self.file.stage))))

    async def add_worker(self, stage: int, name: str = "", folder: Path | None = None) -> InProcessWorker:
        name = name or f"w{stage}-{len(self.workers)}"
        worker = InProcessWorker(self.hub, self.file, stage, name, folder or self.folder / "versions")
        self.workers.append(worker)
        await worker.start()
        return worker

    async def replace_worker(self, stage: int, folder: Path | None = None) -> InProcessWorker:
        """Kill the worker that trains a stage, and start another with the same checkpoints, or those of `folder`."""
        killed = self.active_worker(stage)
        await killed.kill()
        self.workers.remove(killed)
        return await self.add_worker(stage, f"new{stage}-{len(self.messages)}", folder)

    async def add_source(
        self, name: str = "source", dataset: Dataset | None = None, *, resume: bool = False
    ) -> InProcessSource:
        """Start a source; an earlier one of the same name is closed, as its process would have exited."""
        for earlier in [source for source in self.sources if source.name == name]:
            await earlier.close()
            self.sources.remove(earlier)

        def on_event(event: TrainingEventDict) -> None:
            self.on_event(event)  # as it is set then

        source = InProcessSource(self.hub, self.file, name, dataset or StripedImages(), resume, on_event)
        self.sources.append(source)
        await source.start()
        return source

    async def train(
        self, name: str = "source", dataset: Dataset | None = None, *, resume: bool = False
    ) -> InProcessSource:
        """Run a source to its end."""
        source = await self.add_source(name, dataset, resume=resume)
        await source.training.run()
        return source

    async def close(self) -> None:
        for source in self.sources:
            await source.close()
        for worker in self.workers:
            await worker.close()
        await self._listener.close()

    def _on_delivery(self, delivery: Delivery) -> None:
        with suppress(WireError):
            message = decode(delivery.properties, delivery.payload)
            if "sparse" in dict(delivery.properties.user_properties):
                self.messages.append((delivery.topic, message))
                self.on_message(delivery.topic, message)

    async def wait_for(self, description: str, predicate: Callable[[], object]) -> None:
        try:
            async with asyncio.timeout(WAIT_S):
                while not predicate():  # noqa: ASYNC110 - a predicate of any state, which has no event
                    await asyncio.sleep(0.01)
        except TimeoutError:
            raise AssertionError(f"waited {WAIT_S:g} s for {description}") from None

    async def wait_for_messages(self, count: int) -> None:
        expected = len(self.messages) + count
        await self.wait_for("more messages", lambda: len(self.messages) >= expected)

    async def wait_for_step(self, source: InProcessSource, step: int) -> None:
        await self.wait_for(f"step {step}", lambda: source.completed_steps >= step)

    # Results ----------------------------------------------------------------------------------------------------------

    @property
    def members(self) -> dict[str, str]:
        """The worker of each stage in the newest term."""
        newest = max((worker for worker in self.workers if worker.is_running), key=lambda worker: worker.term)
        return dict(newest.executor.members)

    def active_worker(self, stage: int) -> InProcessWorker:
        """The worker that trains a stage."""
        name = self.members[f"s{stage}"]
        return next(worker for worker in self.workers if worker.name == name)

    @property
    def saved_activations(self) -> int:
        """The saved forwards of all members."""
        return sum(len(self.active_worker(stage).part_trainer.activations) for stage in range(len(self.file.stage)))

    async def weights(self, source: InProcessSource) -> dict[str, Tensor]:
        contents = await source.training.fetch_weights()
        return {name: to_torch(tensor) for content in contents.values() for name, tensor in content.tensors.items()}

    def sources_by_version(self) -> list[str]:
        """The source whose step made each version, from the first; of a repeated version, the last source."""
        sources: dict[int, str] = {}
        for topic, message in self.messages:
            if isinstance(message, StepMessage) and message.verb == "committed" and message.details["stage"] == "s0":
                sources[message.details["version"]] = topic.split("/")[3]
        return [sources[version] for version in sorted(sources)]

    def train_unsplit(self, order: Iterable[str], datasets: Mapping[str, Dataset]) -> dict[str, Tensor]:
        """Train the unsplit network in an ordinary loop, with the steps of sources in this order; return its state.

        Runs in the compute thread of the workers, which may use torch's random generator at the same time.
        """
        with vars(stage_worker)["ThreadPoolExecutor"](1) as thread:
            state: dict[str, Tensor] = thread.submit(self._train_unsplit, order, datasets).result()
            return state

    def _train_unsplit(self, order: Iterable[str], datasets: Mapping[str, Dataset]) -> dict[str, Tensor]:
        table = self.file.training
        torch.manual_seed(SEED)
        model = import_string(str(self.file.pipeline.model), self.folder)()
        optimizer = torch.optim.SGD(model.parameters(), lr=table.lr, momentum=0.9)
        loss = nn.functional.mse_loss if table.loss == "mse" else nn.functional.cross_entropy
        trainer = UnsplitTrainer(model, optimizer, seed=SEED, loss=loss)
        steps = dict.fromkeys(datasets, 0)
        batches = {
            name: Batches(dataset.train(), table.batch, SEED, drop_last=table.drop_last)
            for name, dataset in datasets.items()
        }
        for name in order:
            inputs, labels = batches[name].batch(steps[name])
            micro_batches = split_micro_batches(inputs, labels, table.micro_batches)
            trainer.train_step(
                steps[name], [(map_inputs(x, torch.from_numpy), torch.from_numpy(y)) for x, y in micro_batches]
            )
            steps[name] += 1
        state: dict[str, Tensor] = model.state_dict()
        return state


PipelineTest = Callable[[InProcessPipeline], Awaitable[None]]


def run_with_pipeline(folder: Path, test: PipelineTest, *stages: int, **training: Any) -> None:
    """Run a coroutine with a pipeline whose stages all have a worker, or those of `stages`."""

    async def run() -> None:
        pipeline = InProcessPipeline(folder, **training)
        await pipeline.start(*stages)
        try:
            await test(pipeline)
        finally:
            await pipeline.close()

    run_async(run())


class _SharedThread(ThreadPoolExecutor):
    """One compute thread for all workers of this process: torch's random generator and torch.fx are not thread-safe."""

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Continue: the thread is that of other workers too."""


def shorten_intervals(monkeypatch: Any) -> None:
    """Make workers report ten times a second, and decide accordingly earlier; compute in one thread for all workers."""
    thread = _SharedThread(1, thread_name_prefix="compute")
    monkeypatch.setattr(stage_worker, "ThreadPoolExecutor", lambda *_, **__: thread)
    monkeypatch.setattr("brokers.dispatch.presence_publisher.REPORT_INTERVAL_S", 0.1)
    monkeypatch.setattr(coordinator, "LISTEN_S", 0.25)
    monkeypatch.setattr(worker_presence, "_RETAINED_WAIT_S", 0.01)
    # Terms and fetches are retried ten times as often, too.
    monkeypatch.setattr(training_loop, "MAX_CONSECUTIVE_TERMS", 10 * training_loop.MAX_CONSECUTIVE_TERMS)


async def assert_weights(pipeline: InProcessPipeline, source: InProcessSource, steps: int = STEPS) -> None:
    """Assert that the weights are those of the unsplit network after so many steps of the source."""
    expected = pipeline.train_unsplit([source.name] * steps, {source.name: source.dataset})
    assert_bitwise_equal(await pipeline.weights(source), expected)


def abort_message(pipeline: InProcessPipeline) -> StepMessage:
    """The message of a source that aborts its step."""
    details = {"reason": "a test"}
    return StepMessage(request_id=new_request_id(), verb="abort", term=pipeline.active_worker(0).term, details=details)
