"""A whole examination of a broker, from the first greeting to the last measurement: what is done, in which order."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial

from brokers.doctor import verdicts as doctor
from brokers.doctor.bridge_checks import BridgeEnd, bridge_paths, check_bridge
from brokers.doctor.check_result import CheckResult, ThroughputResult, is_usable
from brokers.doctor.checks import check_broker, check_connection, run_check
from brokers.doctor.probe_client import BrokerProbe
from brokers.doctor.throughput import MessagePath, measure_throughput
from brokers.protocol.chunking import MESSAGE_LIMIT_BYTES

PathFactory = Callable[[], AbstractAsyncContextManager[tuple[MessagePath, MessagePath]]]

_MEASURE_S = 60.0  # for one size: a slow link has its time


@dataclass(frozen=True, slots=True)
class DoctorOptions:
    """What is to be examined. `sizes` has what is sent, by the name that it has in the table."""

    broker: str = field(repr=False)  # addresses may hold passwords
    sizes_bytes: Mapping[str, int]
    sizes_are_cuts: bool = False  # whether the sizes are those of a pipeline's cuts
    bridged_broker: str | None = field(default=None, repr=False)
    sites: tuple[str, str] = ("", "")  # of this broker, and of the one across


@dataclass(eq=False)
class DoctorRun:
    """Every finding, told as it is made, and the measurements."""

    options: DoctorOptions
    on_result: Callable[[CheckResult], None]
    results: list[CheckResult] = field(default_factory=list)
    throughput: list[ThroughputResult] = field(default_factory=list)

    async def run(self) -> None:
        """Examine; what was left at the brokers is taken away, even when this is cancelled."""
        async with BrokerProbe.from_address(self.options.broker) as near:
            if not await self._one(near):
                return
            if self.options.bridged_broker is None:
                await self._measure(partial(_alone, near))
                return
            async with BrokerProbe.from_address(self.options.bridged_broker) as far:
                if await self._one(far, briefly=True):
                    await self._both(BridgeEnd(self.options.sites[0], near), BridgeEnd(self.options.sites[1], far))

    async def _one(self, visit: BrokerProbe, *, briefly: bool = False) -> bool:
        """Examine one broker; return whether it let us in. `briefly`: no more than what it announces."""
        greeting, limits = await check_connection(visit)
        at = str(visit.address)
        for finding in greeting:
            self._found(replace(finding, broker=at))
        if limits is None:
            return False
        if not briefly:
            for finding in (
                doctor.cut_results(self.options.sizes_bytes, limits.max_packet_bytes)
                if self.options.sizes_are_cuts
                else ()
            ):
                self._found(finding)
            async for finding in check_broker(visit, limits):
                self._found(replace(finding, broker=at))
        return True

    async def _both(self, near: BridgeEnd, far: BridgeEnd) -> None:
        before = len(self.results)
        async for finding in check_bridge(near, far):
            self._found(finding)
        if is_usable(self.results[before:]):
            await self._measure(partial(bridge_paths, near, far))

    async def _measure(self, ways: PathFactory) -> None:
        """Measure every size that can be a message; the first that does not come through is a finding, and the last."""

        async def carry(what: str, size_bytes: int) -> list[CheckResult]:
            async with ways() as (there, back):
                self.throughput.append(await measure_throughput(what, size_bytes, there, back))
            return []

        for what, size_bytes in self.options.sizes_bytes.items():
            if size_bytes > MESSAGE_LIMIT_BYTES:
                continue
            failed = await run_check("round trip", partial(carry, what, size_bytes), _MEASURE_S)
            for finding in failed:
                self._found(replace(finding, message=f"{what}: {finding.message}"))
            if failed:
                return

    def _found(self, finding: CheckResult) -> None:
        self.results.append(finding)
        self.on_result(finding)


@asynccontextmanager
async def _alone(visit: BrokerProbe) -> AsyncIterator[tuple[MessagePath, MessagePath]]:
    """The two ways of a round trip at one broker."""
    there, back = visit.topic("there"), visit.topic("back")
    async with AsyncExitStack() as stack:
        one, other = [await stack.enter_async_context(visit.client()) for _ in range(2)]
        await one.subscribe(back)
        await other.subscribe(there)
        yield MessagePath(one, other, there), MessagePath(other, one, back)
