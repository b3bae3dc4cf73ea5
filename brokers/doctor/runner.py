"""A whole examination of a broker, from the first greeting to the last measurement: what is done, in which order."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial

from brokers.doctor import verdicts as doctor
from brokers.doctor.bridge_checks import End, examine_across, ways_between
from brokers.doctor.check_result import Carried, Finding, usable
from brokers.doctor.checks import examine, greet, tried
from brokers.doctor.probe_client import Visit
from brokers.doctor.throughput import Way, measure
from brokers.protocol.chunking import MESSAGE_LIMIT_BYTES

Ways = Callable[[], AbstractAsyncContextManager[tuple[Way, Way]]]

_MEASURE_S = 60.0  # for one size: a slow link has its time


@dataclass(frozen=True, slots=True)
class Question:
    """What is to be examined. `sizes` has what is sent, by the name that it has in the table."""

    broker: str = field(repr=False)  # addresses may hold passwords
    sizes: Mapping[str, int]
    cuts: bool = False  # whether the sizes are those of a pipeline's cuts
    across: str | None = field(default=None, repr=False)
    sites: tuple[str, str] = ("", "")  # of this broker, and of the one across


@dataclass(eq=False)
class Examination:
    """Every finding, told as it is made, and the measurements."""

    question: Question
    tell: Callable[[Finding], None]
    findings: list[Finding] = field(default_factory=list)
    carried: list[Carried] = field(default_factory=list)

    async def run(self) -> None:
        """Examine; what was left at the brokers is taken away, even when this is cancelled."""
        async with Visit.to(self.question.broker) as near:
            if not await self._one(near):
                return
            if self.question.across is None:
                await self._measure(partial(_alone, near))
                return
            async with Visit.to(self.question.across) as far:
                if await self._one(far, briefly=True):
                    await self._both(End(self.question.sites[0], near), End(self.question.sites[1], far))

    async def _one(self, visit: Visit, *, briefly: bool = False) -> bool:
        """Examine one broker; return whether it let us in. `briefly`: no more than what it announces."""
        greeting, limits = await greet(visit)
        at = str(visit.address)
        for finding in greeting:
            self._found(replace(finding, at=at))
        if limits is None:
            return False
        if not briefly:
            for finding in doctor.cuts(self.question.sizes, limits.max_packet_bytes) if self.question.cuts else ():
                self._found(finding)
            async for finding in examine(visit, limits):
                self._found(replace(finding, at=at))
        return True

    async def _both(self, near: End, far: End) -> None:
        before = len(self.findings)
        async for finding in examine_across(near, far):
            self._found(finding)
        if usable(self.findings[before:]):
            await self._measure(partial(ways_between, near, far))

    async def _measure(self, ways: Ways) -> None:
        """Measure every size that can be a message; the first that does not come through is a finding, and the last."""

        async def carry(what: str, size_bytes: int) -> list[Finding]:
            async with ways() as (there, back):
                self.carried.append(await measure(what, size_bytes, there, back))
            return []

        for what, size_bytes in self.question.sizes.items():
            if size_bytes > MESSAGE_LIMIT_BYTES:
                continue
            failed = await tried("round trip", partial(carry, what, size_bytes), _MEASURE_S)
            for finding in failed:
                self._found(replace(finding, said=f"{what}: {finding.said}"))
            if failed:
                return

    def _found(self, finding: Finding) -> None:
        self.findings.append(finding)
        self.tell(finding)


@asynccontextmanager
async def _alone(visit: Visit) -> AsyncIterator[tuple[Way, Way]]:
    """The two ways of a round trip at one broker."""
    there, back = visit.topic("there"), visit.topic("back")
    async with AsyncExitStack() as stack:
        one, other = [await stack.enter_async_context(visit.visitor()) for _ in range(2)]
        await one.subscribe(back)
        await other.subscribe(there)
        yield Way(one, other, there), Way(other, one, back)
