"""`sparse run FILE`: everything of a pipeline on this machine."""

from __future__ import annotations

import asyncio
import json as jsonlib
from pathlib import Path
from typing import Annotated

import typer

from brokers.config.pipeline_file import Pipeline, load_pipeline, new_run_folder
from brokers.errors import BadFile
from monitor.errors import CannotResume
from monitor.launch.run import CHECKPOINTS_FOLDER, PipelineRun
from monitor.launch.sites import set_up_brokers
from monitor.stores.sqlite import TELEMETRY_FILE
from monitor.terminal.summary import print_summary


def command(
    file: Annotated[Path, typer.Argument(help="The pipeline file.")],
    broker: Annotated[str | None, typer.Option(help="mosquitto, embedded, or an address: mqtt://HOST:PORT.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Where a broker of ours listens.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where results go; left out: a new folder below runs/.")] = None,
    pictures: Annotated[bool, typer.Option(help="Keep annotated pictures of what was found.")] = True,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with the training of a former run: its folder below runs/.")
    ] = None,
    telemetry: Annotated[
        bool, typer.Option(help="Keep what happens in telemetry.sqlite, in the folder of the results.")
    ] = True,
    json: Annotated[bool, typer.Option("--json", help="End with the summary as one line of JSON.")] = False,
    with_parent: Annotated[bool, typer.Option(hidden=True)] = False,
) -> int:
    """Run a whole pipeline on this machine: broker, stages and source, with a live view.

    The broker is the one that the file or SPARSE_BROKER names, else Mosquitto if it is there, else the embedded one; a
    Mosquitto for each site, where there are several, with bridges between them and the links' delays.

    Example: sparse run examples/street.toml
    """
    pipeline = load_pipeline(file)
    folder = _former(pipeline, resume) if resume else _fresh(out) or new_run_folder(Path("runs"), pipeline.name)
    with set_up_brokers(pipeline, broker, port) as sites:
        run = PipelineRun(pipeline, sites, folder, pictures, resume is not None, telemetry)
        status, summary = asyncio.run(run.run(with_parent))
    if summary is None:
        return status
    summary |= {
        "broker": sites.source_broker.label,
        "files": {**summary["files"], "telemetry": run.monitor.telemetry_file},
    }
    if sites.links:
        summary["links"] = [link.summary() for link in sites.links]
    if json:
        print(jsonlib.dumps(summary))  # noqa: T201 - the answer of the command
    else:
        print_summary(summary)
    return status


def _fresh(out: Path | None) -> Path | None:
    """The folder that is asked for: one with a run in it would take the two for one, in all that is counted later."""
    if out is not None and (out / TELEMETRY_FILE).exists():
        raise BadFile(str(out), f"it holds a run already ({TELEMETRY_FILE}): name another folder for this one")
    return out


def _former(pipeline: Pipeline, folder: Path) -> Path:
    """The folder of a run that is to go on."""
    if not pipeline.is_training:
        raise CannotResume(str(folder), f"pipeline {pipeline.name!r} does not train")
    if not (folder / CHECKPOINTS_FOLDER).is_dir() and pipeline.training.checkpoints is None:
        raise CannotResume(
            str(folder), f"there is no {CHECKPOINTS_FOLDER}/ in it: expected the folder of a training run"
        )
    return folder
