"""An inference pipeline within one process: workers and offloaders on one event loop, over an in-memory broker."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from brokers.config.pipeline_file import load_pipeline
from sources.client.offloader import Offloader
from stages.commands.stage import make_executor
from stages.executor import TaskContext, TaskExecutor, Tensors
from stages.worker.inference_worker import InferenceWorker
from stages.worker.worker_context import WorkerContext
from tests.support.brokers.broker_kinds import run_async
from tests.support.brokers.in_memory import MemoryBroker, MemoryTransport
from tests.support.pipelines.pipeline_files import write_pipeline_file
from tests.support.pipelines.processes import PROCESS_TIMEOUT_S

_MAX_PACKET_BYTES = 1 << 20  # contents above half of it are sent in chunks


class ServedPipeline:
    """The workers of a pipeline file, which run from `add_worker` to the end of the context."""

    def __init__(self, path: Path) -> None:
        self.pipeline = load_pipeline(path)
        self.broker = MemoryBroker(max_packet_bytes=_MAX_PACKET_BYTES)
        self.workers: list[InferenceWorker] = []
        self.transports: list[MemoryTransport] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self.workers:
            await worker.drain()
        await asyncio.gather(*self._tasks)
        for worker in self.workers:
            await worker.stop()

    async def add_worker(
        self,
        stage: str = "",
        executor: TaskExecutor | None = None,
        *,
        worker: str = "",
        transport: MemoryTransport | None = None,
    ) -> InferenceWorker:
        """Start a worker of a stage (default: the first), with an executor in place of that of the file."""
        table = self.pipeline.find_stage(stage) if stage else self.pipeline.stage[0]
        transport = transport or MemoryTransport(self.broker)
        name = worker or f"{table.name}-{len(self.workers) + 1}"
        context = WorkerContext(self.pipeline, table, name)
        started = InferenceWorker(transport, context, executor or make_executor(context))
        await started.start()
        self.workers.append(started)
        self.transports.append(transport)
        self._tasks.append(asyncio.create_task(started.run(), name=f"run {name}"))
        return started

    async def add_all(self) -> Self:
        """Start one worker of each stage."""
        for stage in self.pipeline.stage:
            await self.add_worker(stage.name)
        return self

    async def remove_worker(self, worker: InferenceWorker) -> None:
        """Drain a worker and stop it."""
        index = self.workers.index(worker)
        await worker.drain()
        await self._tasks.pop(index)
        self.workers.pop(index)
        self.transports.pop(index)
        await worker.stop()

    def kill_worker(self, worker: InferenceWorker) -> None:
        """Disconnect a worker as if its process had been killed."""
        self.broker.kill_client(self.transports[self.workers.index(worker)])

    def offloader(self, **options: Any) -> Offloader:
        return Offloader(self.pipeline, transport=MemoryTransport(self.broker), **options)


class GatedExecutor(TaskExecutor):
    """Records the values of its tasks, and executes none before its gate is open."""

    batchable = True

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.values: list[float] = []

    def execute(self, tensors: Tensors, task: TaskContext) -> Tensors:
        rows = tensors["values"]
        self.values += np.ravel(rows).tolist()
        self.gate.wait(PROCESS_TIMEOUT_S)
        return {"values": 2 * rows, "batch": np.full(len(rows), len(rows))} if rows.ndim else {"values": rows}


def with_pipeline(
    folder: Path,
    test: Callable[[ServedPipeline], Coroutine[Any, Any, None]],
    *stages: Mapping[str, Any],
    source: Mapping[str, Any] | None = None,
    **pipeline: Any,
) -> None:
    """Run a test with a pipeline in this process, which has no workers yet."""

    async def main() -> None:
        async with ServedPipeline(write_pipeline_file(folder, stages, source, **pipeline)) as served:
            await test(served)

    run_async(main(), PROCESS_TIMEOUT_S)


async def wait_until(predicate: Callable[[], object]) -> None:
    """Wait until a predicate holds that other tasks or threads change."""
    async with asyncio.timeout(PROCESS_TIMEOUT_S):
        while not predicate():  # noqa: ASYNC110 - no event is set when it changes
            await asyncio.sleep(0.002)
