"""`sparse stage FILE NAME`: one worker of one stage, in the foreground."""

from __future__ import annotations

import asyncio
import os
import platform
import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from brokers.config.pipeline_file import add_error_context, load_pipeline, require_broker_address
from brokers.config.schema import LOCAL_SITE, StageTable
from brokers.process.shutdown import EXIT_INTERRUPTED, ShutdownEvent, exit_with_parent
from brokers.protocol.topics import validate_name
from brokers.telemetry.client import event_client_from_environment
from stages.worker.worker_context import WorkerContext

# Imported where they are used: a stage of plain functions starts, and stays small, without torch.
if TYPE_CHECKING:
    from brokers.protocol.transport import Transport
    from stages.executor import TaskExecutor
    from stages.worker.stage_worker import StageWorker


def command(
    file: Annotated[Path, typer.Argument(help="The pipeline file.")],
    name: Annotated[str, typer.Argument(help="The stage to serve.")],
    broker: Annotated[str | None, typer.Option(help="Broker address, mqtt://HOST:PORT, if the file has none.")] = None,
    worker: Annotated[str | None, typer.Option(help="Worker id; by default the host name and the process id.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Compute threads; by default the file's, or 1.")] = None,
    checkpoints: Annotated[
        Path | None, typer.Option(help="Folder of the checkpoints in training; by default the file's.")
    ] = None,
    with_parent: Annotated[bool, typer.Option(hidden=True)] = False,
) -> int:
    """Serve one stage of a pipeline with one worker, until SIGTERM or Ctrl-C.

    The worker finishes the tasks that it has accepted first; a second signal ends it at once.

    Any number of workers can serve a stage, wherever the broker can be reached; each gets tasks as soon as it is up.

    Example: sparse stage examples/street.toml body --broker mqtt://127.0.0.1:1883
    """
    from brokers.mqtt.client import create_transport

    pipeline = load_pipeline(file)
    stage = pipeline.find_stage(name)
    address = require_broker_address(pipeline, stage.site, broker, from_parent=with_parent)
    worker_id = validate_name("worker", worker or f"{platform.node()[:40] or LOCAL_SITE}-{os.getpid()}")
    # The client id is unique: with a repeated one the broker would disconnect a worker of the same worker id, before
    # this worker is refused.
    client_id = f"{pipeline.name}.{stage.name}.{worker_id}.{secrets.token_hex(4)}"
    transport = create_transport(address, client_id=client_id)  # bad credentials are reported before a model is loaded
    place = {"site": stage.site, "pipeline": pipeline.name, "stage": stage.name, "worker": worker_id}
    with (
        add_error_context(pipeline),
        event_client_from_environment(os.environ, "stage", worker_id, **place) as events,
    ):
        compute_threads = threads or stage.threads or 1
        context = WorkerContext(pipeline, stage, worker_id, _resolve_device(stage), compute_threads, events)
        return asyncio.run(_serve(_make_worker(transport, context, checkpoints), transport.address, with_parent))


def _resolve_device(stage: StageTable) -> str:
    if stage.executor is None:
        from stages.worker.model_executor import resolve_device

        return resolve_device(stage.device)
    # "auto" is not resolved, which needs torch: an executor that uses torch can do so itself.
    return "cpu" if stage.device == "auto" else stage.device


def _make_worker(transport: Transport, context: WorkerContext, checkpoints: Path | None) -> StageWorker:
    pipeline = context.pipeline
    if not pipeline.is_training:
        executor = make_executor(context)
        from stages.worker.inference_worker import InferenceWorker

        return InferenceWorker(transport, context, executor)
    from stages.training.malloc_tuning import tune_malloc
    from stages.training.part_trainer import PartTrainer
    from stages.training.training_worker import TrainingWorker

    tune_malloc()
    configured = pipeline.training.checkpoints
    default = pipeline.folder / configured if configured else Path("checkpoints") / pipeline.name
    folder = (checkpoints or default) / context.stage.name
    return TrainingWorker(transport, context, PartTrainer(context), folder)


def make_executor(context: WorkerContext) -> TaskExecutor:
    """Return the stage's own executor, or that of its part of the model."""
    stage = context.stage
    if stage.executor is not None:
        from stages.executor import load_executor

        return load_executor(stage.executor, stage.settings, str(context.pipeline.folder))
    from stages.worker.model_executor import ModelExecutor

    return ModelExecutor(context)


async def _serve(worker: StageWorker, address: str, with_parent: bool) -> int:
    """Run the worker until the process is asked to exit, then drain it. Raises the error of a worker that fails."""
    shutdown = ShutdownEvent()
    shutdown.install_signal_handlers()
    if with_parent:
        exit_with_parent(shutdown)
    try:
        await worker.start()
        if not with_parent:
            place = f"stage {worker.stage!r} of {worker.pipeline!r} at {address}"
            print(f"worker {worker.worker} serves {place}; stop with Ctrl-C", file=sys.stderr)  # noqa: T201
        running = asyncio.create_task(worker.run(), name="run")
        waiting = asyncio.create_task(shutdown.wait(), name="shutdown")
        await asyncio.wait({running, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if not running.done():
            await worker.drain()
        await running
    finally:
        await worker.stop()
    return EXIT_INTERRUPTED if shutdown.interrupted else 0
