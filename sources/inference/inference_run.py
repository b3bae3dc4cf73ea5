"""An inference run: samples in, published results out, with the pipeline kept full and every queue bounded."""

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from brokers.errors import DeadlinePassed, Disconnected, RequestFailed, SparseError
from brokers.protocol.messages import JSON
from brokers.protocol.result_json import content_to_dict, encode_json, timing_to_dict
from brokers.protocol.topics import results_topic
from brokers.protocol.transport import Properties
from sources.client.inflight_limit import Slot
from sources.client.offloader import Offloader
from sources.client.pending_request import PendingRequest, failure_code
from sources.inference.run_stats import InferenceRunStats
from sources.inputs.source import Sample, SampleBuffer

log = logging.getLogger(__name__)

# Results that wait for the recorder, or for earlier ones, before the run stops taking samples. Samples in flight come
# on top: their number is that of the window, which grows with the workers.
_UNRECORDED_LIMIT = 32

_Outcome = tuple[Sample, dict[str, Any]]  # and the result that was published for it


class InferenceRun:
    """Sends the samples of a buffer through an offloader and publishes each result as JSON.

    `record` is called with each sample and its result in a thread, in order; with `keep = "latest"` in the order of
    completion, so that a sample that waits for a frozen worker delays no other.
    """

    def __init__(
        self,
        offloader: Offloader,
        buffer: SampleBuffer,
        record: Callable[[Sample, dict[str, Any]], None] = lambda sample, result: None,
    ) -> None:
        self.stats = InferenceRunStats()
        self._offloader = offloader
        self._buffer = buffer
        self._record = record
        self._tasks: set[asyncio.Task[_Outcome | None]] = set()
        self._unrecorded: asyncio.Queue[asyncio.Future[_Outcome | None]] = asyncio.Queue()
        self._unrecorded_count = 0  # samples that were taken and are not recorded yet
        self._recorded = asyncio.Event()

    async def run(self) -> None:
        """Process samples until the buffer is closed and every result is published and recorded."""
        recorder = asyncio.create_task(self._record_results(), name="recorder")
        try:
            while await self._start_next():
                pass
            if self._tasks:
                await asyncio.wait(self._tasks)
            await self._unrecorded.join()
        finally:
            unfinished = [recorder, *self._tasks]
            for task in unfinished:
                task.cancel()
            await asyncio.gather(*unfinished, return_exceptions=True)

    async def reject(self, source: str, rejection: dict[str, Any]) -> bool:
        """Publish the rejection of an input that could not be decoded; it counts as a failed request.

        Returns what `publish` returns.
        """
        now_s = time.monotonic()
        self.stats.record_request(now_s)
        self.stats.record_failure(str(rejection["error"]), now_s)
        published = await self.publish(source, rejection)
        await self._bound_unrecorded()
        outcome = asyncio.get_running_loop().create_future()
        outcome.set_result((Sample(source, int(rejection["index"]), b"", ""), rejection))
        self._unrecorded.put_nowait(outcome)
        return published

    async def publish(self, source: str, result: dict[str, Any]) -> bool:
        """Publish a JSON object on the results topic of `source`.

        Returns False if the connection was closed before the broker acknowledged it: it should be tried again later.
        """
        topic = results_topic(self._offloader.pipeline.source.site, source)
        try:
            await self._offloader.channel.transport.publish(topic, encode_json(result), Properties(JSON), qos=1)
        except SparseError as error:
            log.warning("could not publish a result of source %s: %s", source, error)
            return not isinstance(error, Disconnected)
        return True

    async def _start_next(self) -> bool:
        """Start the task of the next sample and wait until it has taken the sample; False without one."""
        await self._bound_unrecorded()
        taken: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(self._process_next(taken), name="sample")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        waiting: set[asyncio.Future[Any]] = {task, taken}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if not taken.done() or not taken.result():
            await task
            return False
        if self._buffer.keeps_latest:
            task.add_done_callback(self._unrecorded.put_nowait)
        else:
            self._unrecorded.put_nowait(task)
        return True

    async def _bound_unrecorded(self) -> None:
        while self._unrecorded_count >= self._offloader.inflight_limit.limit + _UNRECORDED_LIMIT:
            self._recorded.clear()
            await self._recorded.wait()
        self._unrecorded_count += 1

    async def _process_next(self, taken: asyncio.Future[bool]) -> _Outcome | None:
        """Take the next sample once there is a slot (of a live source the newest then), and publish its result."""
        sample = None
        try:
            async with self._offloader.slot() as slot:
                sample = await self._buffer.get()
                taken.set_result(sample is not None)
                if sample is None:
                    return None
                response, disconnected = await self._request(sample, slot)
            return await self._respond(sample, response, disconnected)
        except Exception:  # a bug: without the acknowledgement it would meet this sample at each redelivery
            if sample and sample.ack:
                sample.ack()
            raise

    async def _request(self, sample: Sample, slot: Slot) -> tuple[dict[str, Any], bool]:
        """Send a sample; return the response as JSON, and whether the connection was closed before it arrived."""
        self.stats.record_request(time.monotonic())
        try:
            content = sample.to_content()
            request = await self._offloader.request(content, source=sample.source, slot=slot, parent=sample.trace)
            response = _result_to_dict(request)
        except SparseError as error:
            self.stats.record_failure(failure_code(error), time.monotonic())
            return _error_to_dict(error), isinstance(error, Disconnected)
        self.stats.record_result(request.latency_ms, request.result.hops, time.monotonic())
        return response, False

    async def _respond(self, sample: Sample, response: dict[str, Any], disconnected: bool) -> _Outcome:
        result = {
            "source": sample.source,
            "index": sample.index,
            "pipeline": self._offloader.pipeline.name,
            **response,
            "age_ms": round(1000 * (time.monotonic() - sample.timestamp_s), 1),
            "dropped": self._buffer.dropped.total(),
            **({"redelivered": True} if sample.redelivered else {}),
        }
        if sample.ack is None:
            await self.publish(sample.source, result)
        elif not disconnected and await self.publish(sample.source, result):
            sample.ack()  # else the broker redelivers the sample to the next gateway
        return sample, result

    async def _record_results(self) -> None:
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1, thread_name_prefix="recorder") as thread:
            while True:
                outcome = await self._unrecorded.get()
                try:
                    if (processed := await outcome) is not None:
                        await loop.run_in_executor(thread, self._record, *processed)
                except Exception:  # one result that cannot be recorded must not stop the others
                    log.exception("could not record a result")
                finally:
                    self._unrecorded.task_done()
                    self._unrecorded_count -= 1
                    self._recorded.set()


def _result_to_dict(request: PendingRequest) -> dict[str, Any]:
    return {
        "request": request.request_id.hex(),
        **content_to_dict(request.result.content),
        "latency_ms": round(request.latency_ms, 1),
        "attempts": request.attempt,
        "time": timing_to_dict(request.result.hops, request.latency_ms),
    }


def _error_to_dict(error: SparseError) -> dict[str, Any]:
    if isinstance(error, RequestFailed):
        names = ("request", "error", "stage", "worker", "reason")
        return {name: getattr(error, name) for name in names}
    request = {"request": error.request} if isinstance(error, DeadlinePassed) else {}
    return {**request, "error": error.code, "reason": str(error)}
