"""`sparse run FILE`: a whole pipeline on this machine."""

import asyncio
import json as jsonlib
from pathlib import Path
from typing import Annotated

import typer

from brokers.config.pipeline_file import Pipeline, load_pipeline
from brokers.errors import UsageError
from brokers.process.files import new_run_folder
from monitor.errors import bad_folder
from monitor.launch.run import CHECKPOINTS_FOLDER, PipelineRun
from monitor.launch.sites import set_up_brokers
from monitor.stores.sqlite import TELEMETRY_FILE
from monitor.terminal.summary import print_summary


def command(
    file: Annotated[Path, typer.Argument(help="The pipeline file.")],
    broker: Annotated[
        str | None, typer.Option(help="A kind to start (mosquitto, embedded) or an address (mqtt://HOST:PORT).")
    ] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="The port of a broker that is started.")] = None,
    out: Annotated[Path | None, typer.Option(help="The folder for results; default: a new folder below runs/.")] = None,
    pictures: Annotated[bool, typer.Option(help="Save annotated images of detections.")] = True,
    resume: Annotated[
        Path | None, typer.Option(help="Continue the training run in this folder from its checkpoints.")
    ] = None,
    telemetry: Annotated[bool, typer.Option(help="Store telemetry in telemetry.sqlite, in the results folder.")] = True,
    json: Annotated[bool, typer.Option("--json", help="End with the summary as one line of JSON.")] = False,
    with_parent: Annotated[bool, typer.Option(hidden=True)] = False,
) -> int:
    """Run a whole pipeline on this machine: broker, stages and source, with a live view.

    Uses the broker that the file or SPARSE_BROKER names. Without one it starts Mosquitto, or the embedded broker where
    Mosquitto is not installed; for several sites one Mosquitto each, with the bridges, delays and rates of the file.

    Example: sparse run examples/street.toml
    """
    pipeline = load_pipeline(file)
    folder = _resumed_folder(pipeline, resume) if resume else _results_folder(pipeline, out)
    with set_up_brokers(pipeline, broker, port) as sites:
        run = PipelineRun(pipeline, sites, folder, pictures=pictures, resume=resume is not None, telemetry=telemetry)
        status, summary = asyncio.run(run.run(with_parent=with_parent))
    if summary is None:
        return status
    summary["broker"] = sites.source_broker.label
    summary["files"]["telemetry"] = TELEMETRY_FILE if (folder / TELEMETRY_FILE).exists() else None
    if sites.links:
        summary["links"] = [link.summary() for link in sites.links]
    if json:
        print(jsonlib.dumps(summary))  # noqa: T201 - the command's output
    else:
        print_summary(summary)
    return status


def _results_folder(pipeline: Pipeline, out: Path | None) -> Path:
    if out is None:
        return new_run_folder(Path("runs"), pipeline.name)
    if (out / TELEMETRY_FILE).exists():  # a second run in the same file would be counted with the first
        raise bad_folder(out, f"it holds a run already ({TELEMETRY_FILE}): name another folder for this one")
    return out


def _resumed_folder(pipeline: Pipeline, folder: Path) -> Path:
    problem = ""
    if not pipeline.is_training:
        problem = f"pipeline {pipeline.name!r} is one of inference; only training is resumed"
    elif not (folder / CHECKPOINTS_FOLDER).is_dir() and pipeline.training.checkpoints is None:
        problem = f"it has no {CHECKPOINTS_FOLDER}/; expected the folder of a training run"
    if problem:
        raise UsageError("CannotResume", f"cannot resume {folder}: {problem}", path=str(folder))
    return folder
