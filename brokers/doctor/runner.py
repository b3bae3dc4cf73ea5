"""Runs all checks of `sparse broker doctor`, and then the measurements."""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial

from brokers.doctor.bridge_checks import bridge_paths, check_bridge
from brokers.doctor.check_result import CheckResult, is_usable
from brokers.doctor.checks import check_broker, run_check
from brokers.doctor.connection_checks import check_connection, cut_results
from brokers.doctor.probe_client import BrokerProbe, open_probe
from brokers.doctor.throughput import MessagePath, ThroughputResult, measure_throughput
from brokers.protocol.chunking import MESSAGE_LIMIT_BYTES
from brokers.protocol.transport import BrokerLimits

PathFactory = Callable[[], AbstractAsyncContextManager[tuple[MessagePath, MessagePath]]]

_MEASURE_TIMEOUT_S = 60.0  # for one size, on a slow link


@dataclass(eq=False)
class DoctorRun:
    """The brokers to check, the message sizes to measure by the name of their row, and all results."""

    broker: str = field(repr=False)  # addresses may contain passwords
    sizes_bytes: Mapping[str, int]
    sizes_are_cuts: bool = False  # the sizes are those of the tensors at a pipeline's cuts
    bridged_broker: str | None = field(default=None, repr=False)
    sites: tuple[str, str] = ("", "")  # of the two brokers
    on_result: Callable[[CheckResult], None] = lambda _: None  # called with each result at once
    results: list[CheckResult] = field(default_factory=list)
    throughput: list[ThroughputResult] = field(default_factory=list)

    async def run(self) -> None:
        """Run everything; nothing is left at the brokers, even if this is cancelled."""
        near_site, far_site = self.sites
        async with open_probe(self.broker, near_site) as near:
            limits = await self._check_connection(near)
            if limits is None:
                return
            if self.sizes_are_cuts:
                for result in cut_results(self.sizes_bytes, limits.max_packet_bytes):
                    self._add(result)
            async for result in check_broker(near, limits):
                self._add(result, near)
            if self.bridged_broker is None:
                await self._measure(partial(_local_paths, near))
                return
            async with open_probe(self.bridged_broker, far_site) as far:
                if await self._check_connection(far) is not None:
                    await self._check_bridge(near, far)

    async def _check_connection(self, probe: BrokerProbe) -> BrokerLimits | None:
        results, limits = await check_connection(probe)
        for result in results:
            self._add(result, probe)
        return limits

    async def _check_bridge(self, near: BrokerProbe, far: BrokerProbe) -> None:
        before = len(self.results)
        async for result in check_bridge(near, far):
            self._add(result)
        if is_usable(self.results[before:]):
            await self._measure(partial(bridge_paths, near, far))

    async def _measure(self, open_paths: PathFactory) -> None:
        """Measure the sizes that fit a message, up to the first that fails."""

        async def measure(name: str, size_bytes: int) -> list[CheckResult]:
            async with open_paths() as (outbound, inbound):
                self.throughput.append(await measure_throughput(name, size_bytes, outbound, inbound))
            return []

        for name, size_bytes in self.sizes_bytes.items():
            if size_bytes > MESSAGE_LIMIT_BYTES:
                continue
            failures = await run_check("round trip", partial(measure, name, size_bytes), _MEASURE_TIMEOUT_S)
            for result in failures:
                self._add(replace(result, message=f"{name}: {result.message}"))
            if failures:
                return

    def _add(self, result: CheckResult, probe: BrokerProbe | None = None) -> None:
        if probe is not None:
            result = replace(result, broker=str(probe.address))
        self.results.append(result)
        self.on_result(result)


@asynccontextmanager
async def _local_paths(probe: BrokerProbe) -> AsyncIterator[tuple[MessagePath, MessagePath]]:
    """The two paths of a round trip at one broker."""
    outbound = probe.topic("outbound")
    inbound = probe.topic("inbound")
    async with probe.client() as one, probe.client() as other:
        await one.subscribe(inbound)
        await other.subscribe(outbound)
        yield MessagePath(one, other, outbound), MessagePath(other, one, inbound)
