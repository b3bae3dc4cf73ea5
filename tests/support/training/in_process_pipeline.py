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
from brokers.dispatch.channel import Line
from brokers.dispatch.presence import SourceLoad
from brokers.errors import SparseError, WireError
from brokers.mqtt.in_memory import MemoryHub, MemoryTransport
from brokers.protocol.codec import decode
from brokers.protocol.messages import Message, Step
from brokers.protocol.safetensors_codec import to_torch
from brokers.protocol.topics import source_inbox
from brokers.protocol.transport import Delivery
from sources.client.source_presence import Standing
from sources.datasets.batches import Batches, micro
from sources.datasets.dataset import Dataset
from sources.training.training_loop import Event, Training
from stages.training import membership as roles
from stages.training import step_executor as execution
from stages.training import worker as trainer
from stages.training.membership import make_trainer
from stages.training.part_trainer import Learner
from stages.training.worker import Trainer
from tests.support.brokers.broker_kinds import WAIT_S
from tests.support.training.in_process_parts import Plain
from tests.support.training.striped_images import Stripes
from tests.support.training.training_network import CUTS, MODEL, small

SEED = 3


def kill(hub: MemoryHub, transport: MemoryTransport) -> None:
    """End a client as when its process is killed: it says nothing more, and its broker tells."""
    hub.die(transport)
    transport._closed = True
    transport._standing.set()


class Worker:
    """One worker of one stage."""

    def __init__(self, hub: MemoryHub, pipeline: Pipeline, stage: int, name: str, folder: Path) -> None:
        self.transport = MemoryTransport(hub)
        self.stage = pipeline.stage[stage]
        self.learner = Learner(pipeline, self.stage, device="cpu", threads=1)
        self.trainer: Trainer = make_trainer(
            self.transport, pipeline, self.stage, self.learner, name, "cpu", folder / self.stage.name
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

    def die(self) -> None:
        """As when its process is killed."""
        kill(self._hub, self.transport)

    async def end(self) -> None:
        """Let go of what is left of it. Raises whatever ended it before."""
        await self.transport.close()
        assert self._running is not None
        self._running.cancel()
        with suppress(asyncio.CancelledError, SparseError):
            await self._running
        await self.trainer.stop()


class Pupil:
    """A source: what `sparse source` does of a training run, without its files."""

    def __init__(
        self,
        hub: MemoryHub,
        pipeline: Pipeline,
        name: str,
        dataset: Dataset,
        resume: bool,
        told: Callable[[Event], None],
    ) -> None:
        self.name, self.dataset = name, dataset
        self.events: list[Event] = []
        self.transport = MemoryTransport(hub)
        self.line = Line(self.transport)
        self._standing = Standing(self.line, pipeline, name, SourceLoad)
        self._inbox = source_inbox(pipeline.source.site, name)
        self._told = told
        self.training = Training(pipeline, dataset, name, self.line, self._inbox, self._tell, resume=resume)

    def _tell(self, event: Event) -> None:
        self.events.append(event)
        self._told(event)

    async def start(self) -> None:
        await self.line.open(will=self._standing.will)
        self._standing.open()
        await self.line.listen(self._inbox, self.training.stepper.heard)
        await self.training.watch.open(self.line)

        async def broken() -> None:
            self.training.stepper.broken()

        self.transport.on_reconnect(broken)

    async def end(self) -> None:
        await self._standing.close()
        await self.line.close()

    def of(self, kind: str) -> list[Event]:
        return [event for event in self.events if event["event"] == kind]


class Classroom:
    """A pipeline of three stages (or as many as it is told), its workers, its sources, and whoever listens."""

    def __init__(self, folder: Path, *, cuts: Iterable[int] = CUTS, **training: Any) -> None:
        self.hub = MemoryHub(max_packet_bytes=100_000_000)
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
        self.workers: list[Worker] = []
        self.pupils: list[Pupil] = []
        self.heard: list[tuple[str, Message]] = []  # all that was said, in order
        self.on_message: Callable[[str, Message], None] = lambda topic, message: None
        self.on_event: Callable[[Event], None] = lambda event: None
        self._ear = MemoryTransport(self.hub)

    async def open(self, *stages: int) -> None:
        """Listen, and start a worker for each stage."""
        await self._ear.connect()
        await self._ear.subscribe("sparse/#", self._hear)
        for stage in stages or range(len(self.pipeline.stage)):
            await self.add(stage)

    async def add(self, stage: int, name: str = "", folder: Path | None = None) -> Worker:
        made = Worker(
            self.hub, self.pipeline, stage, name or f"w{stage}-{len(self.workers)}", folder or self.folder / "versions"
        )
        self.workers.append(made)
        await made.start()
        return made

    async def pupil(self, name: str = "pupil", dataset: Dataset | None = None, *, resume: bool = False) -> Pupil:
        made = Pupil(self.hub, self.pipeline, name, dataset or Stripes(), resume, self._told)
        self.pupils.append(made)
        await made.start()
        return made

    async def learn(self, name: str = "pupil", dataset: Dataset | None = None, *, resume: bool = False) -> Pupil:
        """A whole run of one source."""
        made = await self.pupil(name, dataset, resume=resume)
        await made.training.run()
        return made

    async def close(self) -> None:
        for pupil in self.pupils:
            await pupil.end()
        for worker in self.workers:
            await worker.end()
        await self._ear.close()

    def _hear(self, delivery: Delivery) -> None:
        with suppress(WireError):
            message = decode(delivery.properties, delivery.payload)
            if "sparse" in dict(delivery.properties.user):
                self.heard.append((delivery.topic, message))
                self.on_message(delivery.topic, message)

    def _told(self, event: Event) -> None:
        self.on_event(event)

    async def until(self, what: str, look: Callable[[], object]) -> None:
        """Wait until something is so."""
        try:
            async with asyncio.timeout(WAIT_S):
                while not look():  # noqa: ASYNC110 - it looks at what tells nobody
                    await asyncio.sleep(0.01)
        except TimeoutError:
            raise AssertionError(f"waited {WAIT_S:g} s for {what}") from None

    async def until_step(self, pupil: Pupil, step: int) -> None:
        await self.until(f"step {step}", lambda: pupil.training.done >= step)

    async def until_something_is_said(self, messages: int = 4) -> None:
        wanted = len(self.heard) + messages
        await self.until("more to be said", lambda: len(self.heard) >= wanted)

    # What came of it ----------------------------------------------------------------------------------------------

    @property
    def crew(self) -> dict[str, str]:
        """Who trains now, as those who trained last know it."""
        found = [worker.trainer for worker in self.workers if worker.is_running]
        newest = max(found, key=lambda trainer: trainer.steps.term)
        return dict(newest._execution.crew)

    def active(self, stage: int) -> Worker:
        """The worker that trains a stage."""
        name = self.crew[f"s{stage}"]
        return next(worker for worker in self.workers if worker.trainer.worker == name)

    @property
    def saved(self) -> int:
        """Forwards that wait, at those who train."""
        return sum(len(self.active(stage).learner.saved) for stage in range(len(self.pipeline.stage)))

    async def weights(self, pupil: Pupil) -> dict[str, Tensor]:
        bodies = await pupil.training.weights()
        return {name: to_torch(tensor) for body in bodies.values() for name, tensor in body.tensors.items()}

    def order(self) -> list[str]:
        """Whose step each version is, from the first: a version that was done again is the last one that was done."""
        found: dict[int, str] = {}
        for topic, message in self.heard:
            if isinstance(message, Step) and message.verb == "committed" and message.details["stage"] == "s0":
                found[message.details["version"]] = topic.split("/")[3]
        return [found[version] for version in sorted(found)]

    def plainly(self, order: Iterable[str], datasets: Mapping[str, Dataset]) -> dict[str, Tensor]:
        """The state of the uncut network in a plain loop, when sources do their steps in this order.

        In the thread that computes for all: what it still does would draw from the same generator.
        """
        with vars(execution)["ThreadPoolExecutor"](1) as thread:
            found: dict[str, Tensor] = thread.submit(self._plainly, order, datasets).result()
            return found

    def _plainly(self, order: Iterable[str], datasets: Mapping[str, Dataset]) -> dict[str, Tensor]:
        table = self.pipeline.training
        torch.manual_seed(SEED)
        model = small()
        whole = Plain(model, torch.optim.SGD(model.parameters(), lr=table.lr, momentum=0.9), seed=SEED)
        done = dict.fromkeys(datasets, 0)
        batches = {name: Batches(dataset.train(), table.batch, SEED) for name, dataset in datasets.items()}
        for name in order:
            inputs, labels = batches[name].batch(done[name])
            pieces = micro(inputs, labels, table.micro_batches)
            whole.step(done[name], [(torch.from_numpy(some), torch.from_numpy(theirs)) for some, theirs in pieces])
            done[name] += 1
        return model.state_dict()


class _OneThread(ThreadPoolExecutor):
    """The compute thread of all workers of this process: they share torch's generator, and what torch.fx patches."""

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Not before the process ends: the others compute on."""


def hurry(monkeypatch: Any) -> None:
    """Workers that report ten times a second: what takes them seconds is done in tenths. All compute in one thread."""
    one_thread = _OneThread(1, thread_name_prefix="compute")
    monkeypatch.setattr(execution, "ThreadPoolExecutor", lambda *_, **__: one_thread)
    monkeypatch.setattr(trainer, "REPORT_EVERY_S", 0.1)
    monkeypatch.setattr(roles, "_LISTEN_S", 0.25)
