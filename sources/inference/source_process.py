"""The source process of an inference pipeline: feeds samples until the input ends or a shutdown, then drains."""

import asyncio
import contextlib
import itertools
import logging
import threading
from collections import Counter
from collections.abc import Coroutine
from typing import Any

from brokers.config.pipeline_file import Pipeline
from sources.client.offloader import Offloader
from sources.inference.inference_run import InferenceRun
from sources.inference.run_folder import InferenceRunFolder
from sources.inputs.ingress import IngressGateway, create_session_transport
from sources.inputs.source import SampleBuffer, Source

log = logging.getLogger(__name__)

_DRAIN_TIMEOUT_S = 10.0  # for the requests in flight at a shutdown; then they are given up
_CLOSE_TIMEOUT_S = 5.0  # for a closed source to end, and for the last results to be published


async def run_inference(
    pipeline: Pipeline, address: str, source: Source | None, folder: InferenceRunFolder, shutdown: asyncio.Event
) -> dict[str, Any]:
    """Run a pipeline's source, or without one the ingress gateway, to its end or `shutdown`; return the summary.

    An error of the source is raised after the results so far are written.
    """
    keep = pipeline.source.keep or ("latest" if source is None or source.live else "all")
    buffer = SampleBuffer(keep)

    def drop_counts() -> Counter[str]:
        return buffer.dropped + Counter(superseded=source.dropped if source else 0)

    async with (
        Offloader(pipeline, broker=address, live=keep == "latest") as offloader,
        contextlib.AsyncExitStack() as stack,
    ):
        offloader.get_drop_counts = drop_counts
        run = InferenceRun(offloader, buffer, folder.add)
        if source is not None:
            feeding = feed_from_source(source, buffer, shutdown, pipeline.source.limit)
        else:
            durable = pipeline.source.keep == "all"
            transport = create_session_transport(pipeline, address) if durable else offloader.channel.transport
            gateway = IngressGateway(transport, pipeline.source.site, buffer, run.reject, durable=durable)
            stack.push_async_callback(gateway.stop)
            feeding = _feed_from_ingress(gateway, pipeline.source.site, shutdown)
        error = await _feed_and_drain(feeding, run, buffer, offloader, shutdown)
        counters = offloader.counters
    dropped = drop_counts()
    summary = {
        "pipeline": pipeline.name,
        "broker": offloader.channel.transport.address,
        **run.stats.summary([stage.name for stage in pipeline.stage]),
        "unreadable": source.unreadable if source else 0,
        "dropped": dropped.total(),
        "dropped_by_reason": dict(dropped),
        "retries": counters["retries"],
        "retries_by_reason": dict(offloader.retries_by_reason),
        "duplicates": counters["duplicates"],
    }
    summary = await asyncio.to_thread(folder.finish, summary)
    if error is not None:
        raise error
    return summary


async def _feed_and_drain(
    feeding: Coroutine[Any, Any, None],
    run: InferenceRun,
    buffer: SampleBuffer,
    offloader: Offloader,
    shutdown: asyncio.Event,
) -> Exception | None:
    """Feed the run until the input ends, wait for the results, and return the error that the input raised."""
    error: Exception | None = None
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(run.run(), name="inference-run")
        try:
            await feeding
        except Exception as raised:  # noqa: BLE001 - raised by `run_inference` once the results are written
            error = raised
            buffer.close()
        if shutdown.is_set():
            await asyncio.wait({running}, timeout=_DRAIN_TIMEOUT_S)
            await offloader.abort("the source was shut down")
            if not running.done() and not (await asyncio.wait({running}, timeout=_CLOSE_TIMEOUT_S))[0]:
                log.warning("results not published: %s does not respond", offloader.channel.transport.address)
                running.cancel()
    return error


async def _feed_from_ingress(gateway: IngressGateway, site: str, shutdown: asyncio.Event) -> None:
    await gateway.start()
    log.info("publish pictures or readings to sparse/%s/ingress/NAME", site)
    await shutdown.wait()
    await gateway.drain()


async def feed_from_source(
    source: Source, buffer: SampleBuffer, shutdown: asyncio.Event, limit: int | None = None
) -> None:
    """Run a source's generator in its own thread, into the buffer; raise what it raises.

    Returns when it is exhausted, after `limit` samples, and at `shutdown`.
    """
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[BaseException | None] = loop.create_future()

    def generate() -> None:
        error: BaseException | None = None
        try:
            for sample in itertools.islice(source.samples(), limit):
                if source.live:
                    loop.call_soon_threadsafe(buffer.put_nowait, sample)
                else:
                    asyncio.run_coroutine_threadsafe(buffer.put(sample), loop).result()
        except BaseException as raised:  # noqa: BLE001 - raised by `feed_from_source`
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop is closed: the run was cancelled
            loop.call_soon_threadsafe(ended.set_result, error)

    # Not an executor's thread: those are joined at exit, and a source may block for long.
    threading.Thread(target=generate, name=f"source-{source.name}", daemon=True).start()
    stopping = asyncio.create_task(shutdown.wait(), name="shutdown")
    futures: set[asyncio.Future[Any]] = {ended, stopping}
    try:
        await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopping.cancel()
        source.close()
        buffer.close()
    await asyncio.wait({ended}, timeout=_CLOSE_TIMEOUT_S)
    if not ended.done():
        log.warning("source %s did not end %g s after it was closed", source.name, _CLOSE_TIMEOUT_S)
    elif (error := ended.result()) is not None:
        raise error
