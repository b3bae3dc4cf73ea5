"""From samples to published results: keeps the pipeline full, reports in order, and never lets a backlog grow."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from brokers.errors import DeadlinePassed, Disconnected, RequestFailed, SparseError
from brokers.protocol.messages import JSON, BinaryContent, Content
from brokers.protocol.result_json import content_to_dict, encode_json, timing_to_dict
from brokers.protocol.topics import results_topic
from brokers.protocol.transport import Properties
from sources.client.offloader import Offloader, OffloadResult
from sources.conversion import to_content
from sources.inference.run_stats import InferenceRunStats
from sources.inputs.sample import Sample
from sources.inputs.sample_buffer import SampleBuffer
from sources.inputs.source import Source

log = logging.getLogger(__name__)

# Samples that are answered and wait for the recorder, or for those before them; the pipeline waits from here on. Those
# that are still worked on come on top: it is the window that says how many, and it grows with the workers.
_UNRECORDED_LIMIT = 32


@dataclass(frozen=True, slots=True)
class SampleResult:
    """What became of one sample: the JSON that was published for it."""

    sample: Sample
    result: dict[str, Any]


class InferenceRun:
    """Sends what an intake gives through an offloader. `record` gets each report, in a thread of its own.

    In order where every sample counts. Those of a live source as they come: one that waits for a worker that hangs
    holds up no other.
    """

    def __init__(
        self, offloader: Offloader, intake: SampleBuffer, record: Callable[[SampleResult], None] | None = None
    ) -> None:
        self.stats = InferenceRunStats()
        self._offload = offloader
        self._intake = intake
        self._record = record
        self._unrecorded: asyncio.Queue[asyncio.Task[SampleResult]] = asyncio.Queue()
        self._begun = 0  # samples that were taken and are not recorded yet
        self._recorded = asyncio.Event()
        self._working: set[asyncio.Task[SampleResult]] = set()

    async def run(self) -> None:
        """Work until the intake ends, and everything that was sent is answered and recorded."""
        recording = asyncio.create_task(self._record_all(), name="recording")
        try:
            while (sample := await self._next()) is not None:
                working = asyncio.create_task(self._serve(sample), name=f"sample-{sample.source}-{sample.index}")
                self._working.add(working)
                working.add_done_callback(self._working.discard)
                if self._intake.keeps_latest:
                    working.add_done_callback(self._unrecorded.put_nowait)
                else:
                    self._unrecorded.put_nowait(working)
            if self._working:
                await asyncio.wait(self._working)
            await self._unrecorded.join()
        finally:
            recording.cancel()
            await asyncio.gather(recording, return_exceptions=True)

    async def _next(self) -> Sample | None:
        """The next sample, once there is room for it: the newest of a live source is then what is sent."""
        window = self._offload.inflight_limit
        await self._begin()
        await window.acquire(self._offload.pipeline.source.priority)
        sample = None
        try:
            sample = await self._intake.get()
        finally:
            if sample is None:
                window.release()
        return sample

    async def _begin(self) -> None:
        """Wait until so little is unrecorded that one more may come."""
        while self._begun >= self._offload.inflight_limit.limit + _UNRECORDED_LIMIT:
            self._recorded.clear()
            await self._recorded.wait()
        self._begun += 1

    async def _serve(self, sample: Sample) -> SampleResult:
        """Work on a sample until its answer is published; only then is it settled."""
        try:
            report, answered = await self._work(sample)
        except Exception:  # a mistake of ours, which would meet this sample again and again
            if sample.ack:
                sample.ack()
            raise
        if sample.ack and answered:
            sample.ack()
        return report

    async def _work(self, sample: Sample) -> tuple[SampleResult, bool]:
        self.stats.record_request(time.monotonic())
        left = False
        try:
            answer = await self._ask(sample)
            found = self._found(answer)
        except SparseError as error:
            found = _refusal(error)
            self.stats.record_failure(found["error"], time.monotonic())
            left = sample.ack is not None and isinstance(error, Disconnected)  # to whoever takes our place
        else:
            self.stats.record_result(answer.latency_ms, answer.hops, time.monotonic())
        result = {
            "source": sample.source,
            "index": sample.index,
            "pipeline": self._offload.pipeline.name,
            **found,
            "age_ms": round(1000 * (time.monotonic() - sample.timestamp_s), 1),
            "dropped": self._intake.dropped.total(),
            **({"redelivered": True} if sample.redelivered else {}),
        }
        answered = not left and await self.publish(sample.source, result)
        return SampleResult(sample, result), answered

    async def _ask(self, sample: Sample) -> OffloadResult:
        try:
            content = sample_content(sample)
        except BaseException:
            self._offload.inflight_limit.release()
            raise
        return await self._offload.request(content, source=sample.source, slot_acquired=True, parent=sample.trace)

    async def reject(self, source: str, refusal: dict[str, Any]) -> bool:
        """What a client published is nothing to work on: it counts as a request that failed, and is told so.

        Returns as `publish` does.
        """
        now_s = time.monotonic()
        self.stats.record_request(now_s)
        self.stats.record_failure(str(refusal["error"]), now_s)
        answered = await self.publish(source, refusal)

        async def report() -> SampleResult:
            return SampleResult(Sample(source, int(refusal["index"]), b"", ""), refusal)

        await self._begin()
        self._unrecorded.put_nowait(asyncio.create_task(report(), name=f"refused-{source}"))
        return answered

    async def publish(self, source: str, result: dict[str, Any]) -> bool:
        """One JSON object on the results topic of `source`, for any MQTT client.

        Returns False when the line was closed before the broker had it: another time it may get there.
        """
        topic = results_topic(self._offload.pipeline.source.site, source)
        try:
            await self._offload.channel.transport.publish(topic, encode_json(result), Properties(JSON), qos=1)
        except SparseError as error:
            log.warning("could not publish a result of %s: %s", source, error)
            return not isinstance(error, Disconnected)
        return True

    def _found(self, answer: OffloadResult) -> dict[str, Any]:
        return {
            "request": answer.request_id.hex(),
            **content_to_dict(answer.content),
            "latency_ms": round(answer.latency_ms, 1),
            "attempts": answer.attempts,
            "time": timing_to_dict(answer.hops, answer.latency_ms),
        }

    async def _record_all(self) -> None:
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1, thread_name_prefix="recorder") as thread:
            while True:
                working = await self._unrecorded.get()
                try:
                    report = await working
                    if self._record:
                        await loop.run_in_executor(thread, self._record, report)
                except Exception:  # one sample's trouble is not the next one's
                    log.exception("could not record a result")
                finally:
                    self._unrecorded.task_done()
                    self._begun -= 1
                    self._recorded.set()


def sample_content(sample: Sample) -> Content:
    """The sample's payload as it travels."""
    if isinstance(sample.payload, bytes):
        return BinaryContent(sample.content_type, sample.payload)
    return to_content(sample.payload)


def _refusal(error: SparseError) -> dict[str, Any]:
    if isinstance(error, RequestFailed):
        told = {"request": error.request, "error": error.error, "stage": error.stage, "worker": error.worker}
        return {**told, "reason": error.reason}
    told = {"request": error.request} if isinstance(error, DeadlinePassed) else {}
    return {**told, "error": error.code, "reason": str(error)}


async def run_source(source: Source, intake: SampleBuffer) -> None:
    """Run a source's generator in a thread of its own, into the intake, until it ends; its errors are raised here."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()

    def finish(error: BaseException | None) -> None:
        intake.close()
        if ended.done():
            return
        if error is None:
            ended.set_result(None)
        else:
            ended.set_exception(error)

    def pump() -> None:
        error: BaseException | None = None
        try:
            for sample in source.samples():
                if source.live:
                    loop.call_soon_threadsafe(intake.put_nowait, sample)
                else:
                    asyncio.run_coroutine_threadsafe(intake.put(sample), loop).result()
        except BaseException as problem:  # noqa: BLE001 - handed to the loop, which raises it
            error = problem
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits for this source any more
            loop.call_soon_threadsafe(finish, error)

    threading.Thread(target=pump, name=f"source-{source.name}", daemon=True).start()
    try:
        await ended
    finally:
        source.close()
