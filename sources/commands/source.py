"""`sparse source FILE`: the source of a pipeline, in the foreground."""

from __future__ import annotations

import asyncio
import json as jsonlib
import logging
import sys
from collections import Counter
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer

from brokers.config.pipeline_file import Pipeline, add_error_context, load_pipeline, resolve_broker_address
from brokers.errors import no_broker_error
from brokers.process.files import new_run_folder
from brokers.process.shutdown import EXIT_INTERRUPTED, ShutdownEvent, exit_with_parent
from brokers.protocol.topics import validate_name
from sources.client.offloader import Offloader
from sources.inference.inference_run import InferenceRun, run_source
from sources.inference.run_folder import InferenceRunFolder
from sources.inputs.factory import make_source
from sources.inputs.ingress import IngressGateway, create_session_transport
from sources.inputs.sample_buffer import SampleBuffer
from sources.inputs.source import Source

log = logging.getLogger(__name__)

_LEAVE_S = 10.0  # what is in flight may take, once told to end; then it is given up
_CLOSE_S = 5.0  # for a source to end once it is closed; one that blocks for longer is not waited for
_CAMERA_FRAMES_PER_S = 10.0  # of the clip, where the source does not say how fast its pictures are


def command(
    file: Annotated[Path, typer.Argument(help="The pipeline file.")],
    broker: Annotated[str | None, typer.Option(help="Its address, mqtt://HOST:PORT, if the file has none.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where results are kept; left out: a new folder below runs/.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Of a pipeline that trains: this source's name, if not the file's.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Of a pipeline that trains: go on from what its stages have.")] = False,
    json: Annotated[bool, typer.Option("--json", help="End with the summary as one line of JSON.")] = False,
    pictures: Annotated[bool, typer.Option(help="Keep annotated pictures of what was found.")] = True,
    with_parent: Annotated[bool, typer.Option(hidden=True)] = False,
) -> int:
    """Feed a pipeline from its source: a video, pictures, a camera, any MQTT client.

    Results appear as JSON on sparse/SITE/results/SOURCE, and in the folder of the run.

    Example: sparse source examples/street.toml --broker mqtt://127.0.0.1:1883
    """
    pipeline = load_pipeline(file)
    address = resolve_broker_address(pipeline, pipeline.source.site, broker, from_parent=with_parent)
    if address is None:
        raise no_broker_error(str(file), pipeline.source.site)
    if pipeline.is_training:
        return _train(pipeline, address, name, out, json, resume, pictures, with_parent)
    return _serve(pipeline, address, out, json, pictures, with_parent)


def _serve(pipeline: Pipeline, address: str, out: Path | None, json: bool, pictures: bool, with_parent: bool) -> int:
    """Feed a pipeline that infers."""
    source = None if pipeline.source.kind == "ingress" else _make_source(pipeline)
    folder = InferenceRunFolder(
        out or new_run_folder(Path("runs"), pipeline.name),
        title=pipeline.name,
        frames_per_s=getattr(source, "frames_per_s", _CAMERA_FRAMES_PER_S),
        pictures=pictures,
    )
    summary, leaving = asyncio.run(_feed(pipeline, address, source, folder, with_parent))
    if json:
        print(jsonlib.dumps(summary))  # noqa: T201 - the answer of the command
    else:
        said = f"{summary['results']} results of {summary['requests']} requests, in {summary['outputs']}"
        print(said, file=sys.stderr)  # noqa: T201 - the same for a person
    if leaving.interrupted:
        return EXIT_INTERRUPTED
    return 0 if leaving.is_set() or summary["results"] == summary["requests"] else 1


def _train(
    pipeline: Pipeline,
    address: str,
    name: str | None,
    out: Path | None,
    json: bool,
    resume: bool,
    pictures: bool,
    with_parent: bool,
) -> int:
    from sources.commands.train import train  # its data set may need torch

    summary, leaving = train(
        pipeline,
        address,
        validate_name("source", name or pipeline.source.name),
        out or new_run_folder(Path("runs"), pipeline.name),
        resume=resume,
        pictures=pictures,
        with_parent=with_parent,
    )
    if json:
        print(jsonlib.dumps(summary))  # noqa: T201 - the answer of the command
    else:
        said = f"{summary['steps']} steps, loss {summary['loss']}, test accuracy {summary['test_accuracy']}"
        print(f"{said}, in {summary['outputs']}", file=sys.stderr)  # noqa: T201 - the same for a person
    return EXIT_INTERRUPTED if leaving.interrupted else 0


def _make_source(pipeline: Pipeline) -> Source:
    with add_error_context(pipeline):
        return make_source(pipeline.source, pipeline.folder)


async def _feed(
    pipeline: Pipeline, address: str, source: Source | None, folder: InferenceRunFolder, with_parent: bool
) -> tuple[dict[str, Any], ShutdownEvent]:
    """Feed until the source ends or somebody says stop; the summary, and whether somebody did, and how."""
    leaving = ShutdownEvent()
    leaving.install_signal_handlers()
    if with_parent:
        exit_with_parent(leaving)
    keep = pipeline.source.keep or ("latest" if source is None or source.live else "all")
    intake = SampleBuffer(keep)
    async with Offloader(pipeline, broker=address, live=keep == "latest") as offloader:
        feed = InferenceRun(offloader, intake, folder.add)
        drops = offloader.get_drop_counts = lambda: intake.dropped + Counter(superseded=source.dropped if source else 0)
        if source is not None:
            trouble = await _work(_draw(source, intake, leaving), feed, intake, offloader, leaving)
        else:
            gateway = _gateway(pipeline, address, offloader, feed, intake)
            try:
                trouble = await _work(_listen(pipeline, gateway, leaving), feed, intake, offloader, leaving)
            finally:
                await gateway.stop()
        counters = offloader.counters
    summary = {
        "pipeline": pipeline.name,
        "broker": offloader.channel.transport.address,
        **feed.stats.summary([stage.name for stage in pipeline.stage]),
        "unreadable": source.unreadable if source else 0,
        "dropped": drops().total(),
        "dropped_by_reason": dict(drops()),
        "retries": counters["retries"],
        "retries_by_reason": dict(offloader.retries_by_reason),
        "duplicates": counters["duplicates"],
    }
    summary = await asyncio.to_thread(folder.finish, summary)
    if trouble is not None:
        with add_error_context(pipeline):
            raise trouble
    return summary, leaving


async def _work(
    giving: Coroutine[Any, Any, None],
    feed: InferenceRun,
    intake: SampleBuffer,
    offloader: Offloader,
    leaving: asyncio.Event,
) -> Exception | None:
    """Feed what is given until no more is; return what went wrong with it, when what was sent is answered."""
    trouble: Exception | None = None
    async with asyncio.TaskGroup() as tasks:
        feeding = tasks.create_task(feed.run(), name="feed")
        try:
            await giving
        except Exception as error:  # noqa: BLE001 - for the caller to raise, when the results are written down
            trouble = error
            intake.close()
        if leaving.is_set():
            await asyncio.wait({feeding}, timeout=_LEAVE_S)
            await offloader.abort("its source was told to end")
            if not feeding.done() and not (await asyncio.wait({feeding}, timeout=_CLOSE_S))[0]:
                log.warning("results could not be published: %s does not answer", offloader.channel.transport.address)
                feeding.cancel()
    return trouble


def _gateway(
    pipeline: Pipeline, address: str, offloader: Offloader, feed: InferenceRun, intake: SampleBuffer
) -> IngressGateway:
    """The ingress gateway of the site: a complete one for who asks for it."""
    complete = pipeline.source.keep == "all"
    transport = create_session_transport(pipeline, address) if complete else offloader.channel.transport
    return IngressGateway(transport, pipeline.source.site, intake, feed.reject, durable=complete)


async def _listen(pipeline: Pipeline, gateway: IngressGateway, leaving: asyncio.Event) -> None:
    """Be the ingress gateway of the site until told to leave."""
    await gateway.start()
    log.info("publish pictures or readings to sparse/%s/ingress/NAME", pipeline.source.site)
    await leaving.wait()
    await gateway.drain()


async def _draw(source: Source, intake: SampleBuffer, leaving: asyncio.Event) -> None:
    """Draw samples from the source until it has no more, or until told to leave."""
    drawing = asyncio.create_task(run_source(source, intake), name="draw")
    left = asyncio.create_task(leaving.wait(), name="leaving")
    try:
        await asyncio.wait({drawing, left}, return_when=asyncio.FIRST_COMPLETED)
        source.close()
        intake.close()
        await asyncio.wait({drawing}, timeout=_CLOSE_S)
        if drawing.done():
            drawing.result()
        else:
            log.warning("source %s does not end when it is closed: it is left behind", source.name)
    finally:
        left.cancel()
        drawing.cancel()
