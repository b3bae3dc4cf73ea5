"""`sparse source FILE`: the source of a pipeline, in the foreground."""

import asyncio
import json as jsonlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from brokers.config.pipeline_file import Pipeline, add_error_context, load_pipeline, require_broker_address
from brokers.process.files import new_run_folder
from brokers.process.shutdown import EXIT_INTERRUPTED, ShutdownEvent, exit_with_parent
from brokers.protocol.topics import validate_name
from sources.inference.run_folder import InferenceRunFolder
from sources.inference.source_process import run_inference
from sources.inputs.factory import make_dataset, make_source

_DEFAULT_FRAMES_PER_S = 10.0  # of the clip, for sources without a frame rate


def command(
    file: Annotated[Path, typer.Argument(help="The pipeline file.")],
    broker: Annotated[str | None, typer.Option(help="Broker address, mqtt://HOST:PORT, if the file has none.")] = None,
    out: Annotated[Path | None, typer.Option(help="Output folder; default: a new folder in runs/.")] = None,
    name: Annotated[
        str | None, typer.Option(help="Training only: the name of this source, if not that of the file.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Training only: continue from the checkpoints of the stages.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the summary as one line of JSON at the end.")] = False,
    pictures: Annotated[bool, typer.Option(help="Write annotated pictures of the results.")] = True,
    with_parent: Annotated[bool, typer.Option(hidden=True)] = False,
) -> int:
    """Feed a pipeline: a video, pictures, a camera, a data set, or any MQTT client.

    Results are published as JSON on sparse/SITE/results/SOURCE and written to the output folder.

    Example: sparse source examples/street.toml --broker mqtt://127.0.0.1:1883
    """
    pipeline = load_pipeline(file)
    address = require_broker_address(pipeline, pipeline.source.site, broker, from_parent=with_parent)
    folder = out or new_run_folder(Path("runs"), pipeline.name)
    shutdown = ShutdownEvent()

    async def run() -> dict[str, Any]:
        shutdown.install_signal_handlers()
        if with_parent:
            exit_with_parent(shutdown)
        if pipeline.is_training:
            source_name = validate_name("source", name or pipeline.source.name)
            from sources.training.training_run import TrainingRun, TrainingRunFolder

            dataset = make_dataset(pipeline.source, pipeline.folder)
            training_folder = TrainingRunFolder(folder, pipeline.name, pictures)
            training = TrainingRun(pipeline, address, source_name, dataset, training_folder, resume=resume)
            return await training.run(shutdown)
        source = None if pipeline.source.kind == "ingress" else make_source(pipeline.source, pipeline.folder)
        frames_per_s = getattr(source, "frames_per_s", _DEFAULT_FRAMES_PER_S)
        run_folder = InferenceRunFolder(folder, title=pipeline.name, frames_per_s=frames_per_s, pictures=pictures)
        return await run_inference(pipeline, address, source, run_folder, shutdown)

    with add_error_context(pipeline):
        summary = asyncio.run(run())
    if json:
        print(jsonlib.dumps(summary))  # noqa: T201 - the output of the command
    else:
        print(_summary_line(pipeline, summary), file=sys.stderr)  # noqa: T201 - the output of the command
    if shutdown.interrupted:
        return EXIT_INTERRUPTED
    is_complete = pipeline.is_training or summary["results"] == summary["requests"]
    return 0 if is_complete or shutdown.is_set() else 1


def _summary_line(pipeline: Pipeline, summary: dict[str, Any]) -> str:
    if pipeline.is_training:
        loss, accuracy = summary["loss"], summary["test_accuracy"]
        return f"{summary['steps']} steps, loss {loss}, test accuracy {accuracy}, in {summary['outputs']}"
    return f"{summary['results']} results of {summary['requests']} requests, in {summary['outputs']}"
