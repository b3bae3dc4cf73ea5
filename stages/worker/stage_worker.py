"""The lifecycle that inference and training workers share: start, run, drain, stop.

The event loop owns the network; computations run in one thread, so that they never block it.
"""

import asyncio
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Literal, TypeVar

from brokers.dispatch.channel import MessageChannel
from brokers.errors import SparseError
from brokers.protocol.transport import Transport
from stages.worker.worker_context import WorkerContext
from stages.worker.worker_presence import DuplicateCheck, WorkerPresence

log = logging.getLogger(__name__)

# How long a worker that drains or stops tries to announce it; the broker may be gone for good.
_ANNOUNCE_TIMEOUT_S = 2.0

T = TypeVar("T")


class StageWorker(ABC):
    """One worker of one stage: an inbox, a compute thread, and a presence record that is renewed every second.

    `counters` counts tasks ("failed", "rejected", "expired") and messages ("malformed", "unexpected").
    """

    def __init__(self, transport: Transport, context: WorkerContext) -> None:
        self.context = context
        self.pipeline = context.pipeline.name
        self.stage = context.stage.name
        self.worker = context.worker
        self.device = context.device
        self.counters: Counter[str] = Counter()
        self.channel = MessageChannel(transport)
        self.presence = WorkerPresence(transport, context)
        self._duplicate_check = DuplicateCheck(transport, context.topics, self.presence)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"compute-{self.stage}")
        self._is_draining = False
        self._wake = asyncio.Event()  # set when `_work` may have something to do

    async def start(self) -> None:
        """Load the model, connect and join the stage.

        Raises `UsageError` "WorkerConflict" if another worker prevents that, and the errors of loading and connecting.
        """
        self.presence.set_model(*await self._load())
        await self.channel.open(will=self.presence.will)
        await self._duplicate_check.check()
        await self._subscribe()
        self.channel.transport.on_reconnect(self._on_reconnect)
        await self.report()

    async def run(self) -> None:
        """Work until `drain` is called and the accepted work is done; `start` must have returned.

        Raises `UsageError` "WorkerConflict" if another worker joined at the same time and this one has to leave.
        """
        working = asyncio.create_task(self._work(), name="work")
        reporting = asyncio.create_task(self.presence.report_periodically(self._tick_and_report), name="report")
        watching = asyncio.create_task(self._duplicate_check.watch(), name="duplicate-check")
        tasks = (working, reporting, watching)
        try:
            pending: set[asyncio.Task[None]] = set(tasks)
            while not working.done():
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()  # a worker that cannot report is lost to the others: it ends with the error
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def drain(self) -> None:
        """Accept no further work; `run` returns when the accepted work is done. May be called twice."""
        if self._is_draining:
            return
        self.presence.state = "draining"
        await self._try_to_announce("draining", self._announce_drain())
        self._is_draining = True
        self._wake.set()

    async def stop(self) -> None:
        """Leave the stage and release everything; `run` must have returned, or failed."""
        try:
            await self._close()
        finally:
            await self._duplicate_check.close()
            if self.channel.is_open:
                await self._try_to_announce("stopped", self.presence.remove())
                await self.channel.close()
            self._thread.shutdown()

    async def _try_to_announce(self, state: str, announcement: Coroutine[Any, Any, None]) -> None:
        try:
            async with asyncio.timeout(_ANNOUNCE_TIMEOUT_S):
                await announcement
        except TimeoutError:
            log.warning("worker %s could not announce that it is %s: no broker", self.worker, state)
        except SparseError as error:
            log.warning("worker %s could not announce that it is %s: %s", self.worker, state, error)

    @abstractmethod
    async def _load(self) -> tuple[str, tuple[str, ...]]:
        """Load the model; return its fingerprint and the Content Types that it accepts."""

    @abstractmethod
    async def _subscribe(self) -> None:
        """Subscribe to the inbox and other topics."""

    @abstractmethod
    async def _work(self) -> None:
        """Work until `_is_draining` is set and the accepted work is done."""

    @abstractmethod
    async def report(self) -> None:
        """Publish the presence record."""

    @abstractmethod
    async def _close(self) -> None:
        """Stop sending, and release the model."""

    @abstractmethod
    def _tick(self) -> None:
        """Run the periodic tasks of every second."""

    async def _announce_drain(self) -> None:
        await self.report()

    async def _on_reconnect(self) -> None:
        await self.report()

    async def run_in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function in the compute thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    def set_state(self, state: Literal["up", "standby"]) -> None:
        """Set the state of the presence record, unless this worker drains."""
        if self.presence.state != "draining":
            self.presence.state = state

    async def _wait_for_wake(self, timeout_s: float | None = None) -> None:
        """Wait for the next change, or the timeout; call it right after looking for work, without an await between."""
        self._wake.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._wake.wait()

    async def _tick_and_report(self) -> None:
        self._tick()
        await self.report()
