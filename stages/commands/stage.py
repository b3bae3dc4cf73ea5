"""`sparse stage FILE NAME`: one worker of one stage, in the foreground."""

from __future__ import annotations

import asyncio
import os
import platform
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from brokers.config.pipeline_file import Pipeline, add_error_context, load_pipeline, resolve_broker_address
from brokers.config.schema import LOCAL_SITE, StageTable
from brokers.errors import no_broker_error
from brokers.process.shutdown import EXIT_INTERRUPTED, ShutdownEvent, exit_with_parent
from brokers.protocol.topics import validate_name
from brokers.telemetry.client import EventClient, event_client_from_environment
from stages.executor import TaskExecutor, load_executor

if TYPE_CHECKING:
    from brokers.protocol.transport import Transport
    from stages.worker.inference_worker import InferenceWorker
    from stages.worker.stage_worker import StageWorker

    WorkerFactory = Callable[[Transport], StageWorker]


def command(
    file: Annotated[Path, typer.Argument(help="The pipeline file.")],
    name: Annotated[str, typer.Argument(help="The stage to serve.")],
    broker: Annotated[str | None, typer.Option(help="Its address, mqtt://HOST:PORT, if the file has none.")] = None,
    worker: Annotated[
        str | None, typer.Option(help="This worker's id; left out: the host's name and the process id.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Compute threads; left out: the file's, or one.")] = None,
    checkpoints: Annotated[
        Path | None, typer.Option(help="Of a pipeline that trains: the folder of its checkpoints, if not the file's.")
    ] = None,
    with_parent: Annotated[bool, typer.Option(hidden=True)] = False,
) -> int:
    """Serve one stage of a pipeline with one worker, until told to leave.

    At SIGTERM or Ctrl-C it finishes what it holds first; at a second one it does not.

    Start as many as you like, anywhere the broker can be reached: each is used as soon as it is up.

    Example: sparse stage examples/street.toml body --broker mqtt://127.0.0.1:1883
    """
    pipeline = load_pipeline(file)
    stage = pipeline.find_stage(name)
    address = resolve_broker_address(pipeline, stage.site, broker, from_parent=with_parent)
    if address is None:
        raise no_broker_error(str(file), stage.site)
    worker_id = validate_name("worker", worker or f"{platform.node()[:40] or LOCAL_SITE}-{os.getpid()}")
    # The ending is another each time: a broker ends the connection of a client whose id comes again, and a worker that
    # is up would be thrown out by its twin before that can be refused.
    client_id = f"{pipeline.name}.{stage.name}.{worker_id}.{secrets.token_hex(4)}"
    count = threads or stage.threads or 1
    transport = _transport(address, client_id)
    where = {"site": stage.site, "pipeline": pipeline.name, "stage": stage.name}
    with (
        add_error_context(pipeline),
        event_client_from_environment(os.environ, "stage", worker_id, **where, worker=worker_id) as events,
    ):
        if pipeline.is_training:
            make = _trainer(pipeline, stage, worker_id, count, checkpoints, events)
        else:
            make = _worker(pipeline, stage, worker_id, count, events)
        return asyncio.run(_serve(make, transport, with_parent))


def make_executor(pipeline: Pipeline, stage: StageTable, threads: int) -> tuple[TaskExecutor, str]:
    """The stage's own executor, or its part of the model; and the device it runs on."""
    if stage.executor is not None:
        # `auto` would have to ask torch; an executor that uses it can do so itself.
        device = "cpu" if stage.device == "auto" else stage.device
        return load_executor(stage.executor, stage.settings, str(pipeline.folder)), device
    # Only here: a stage of plain functions starts, and stays small, without torch.
    from stages.worker.model_executor import ModelExecutor, resolve_device

    device = resolve_device(stage.device)
    return ModelExecutor(pipeline, stage, device=device, threads=threads), device


def _worker(pipeline: Pipeline, stage: StageTable, worker_id: str, threads: int, events: EventClient) -> WorkerFactory:
    executor, device = make_executor(pipeline, stage, threads)

    def make(transport: Transport) -> InferenceWorker:
        from stages.worker.inference_worker import InferenceWorker

        return InferenceWorker(transport, pipeline, stage, executor, worker_id, device, events)

    return make


def _trainer(
    pipeline: Pipeline,
    stage: StageTable,
    worker_id: str,
    threads: int,
    checkpoints: Path | None,
    events: EventClient,
) -> WorkerFactory:
    from stages.training.malloc_tuning import tune_malloc
    from stages.training.part_trainer import PartTrainer
    from stages.training.training_worker import TrainingWorker
    from stages.worker.model_executor import resolve_device

    tune_malloc()
    device = resolve_device(stage.device)
    learner = PartTrainer(pipeline, stage, device=device, threads=threads)
    stated = pipeline.training.checkpoints
    folder = checkpoints or (pipeline.folder / stated if stated else Path("checkpoints") / pipeline.name)
    folder = folder / stage.name
    return lambda transport: TrainingWorker(transport, pipeline, stage, learner, worker_id, device, folder, events)


def _transport(address: str, client_id: str) -> Transport:
    """The line to the broker; what is wrong with our credentials is told before a network is loaded."""
    from brokers.mqtt.client_identity import create_transport

    return create_transport(address, client_id=client_id)


async def _serve(make: WorkerFactory, transport: Transport, with_parent: bool) -> int:
    worker = make(transport)
    leaving = ShutdownEvent()
    leaving.install_signal_handlers()
    if with_parent:
        exit_with_parent(leaving)
    try:
        await worker.start()
        if not with_parent:
            where = f"stage {worker.stage!r} of {worker.pipeline!r} at {transport.address}"
            print(f"worker {worker.worker} serves {where}; Ctrl-C ends it", file=sys.stderr)  # noqa: T201 - for a person
        await _work(worker, leaving)
    finally:
        await worker.stop()
    return EXIT_INTERRUPTED if leaving.interrupted else 0


async def _work(worker: StageWorker, shutdown: ShutdownEvent) -> None:
    """Run the worker until the process is asked to exit. Raises the error of a worker that ends by itself."""
    running = asyncio.create_task(worker.run(), name="run")
    waiting = asyncio.create_task(shutdown.wait(), name="shutdown")
    await asyncio.wait({running, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if not running.done():
        await worker.drain()
    await running
