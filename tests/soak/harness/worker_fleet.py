"""Workers of a chain as an operator has them, each a process, to be killed and replaced; and a load that is counted."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from brokers.dispatch.presence import Birth
from tests.soak.harness.numeric_chain import CHAIN, expected
from tests.support.brokers.presence import await_workers
from tests.support.pipelines.pipeline_files import pipeline_file, stage
from tests.support.pipelines.processes import Machine, Running, eventually

# What no process may say, whatever happens around it.
_PANIC = re.compile(r"Traceback|never retrieved|was never awaited|Task was destroyed|Fatal|Segmentation")


@dataclass(frozen=True)
class Member:
    """A worker, as it was started."""

    stage: str
    worker: str
    running: Running

    def is_it(self, birth: Birth) -> bool:
        """Whether this record is of this very process: a replacement may have its id."""
        return (birth.stage, birth.worker, birth.pid) == (self.stage, self.worker, self.running.pid)


def chain_file(folder: Path, *, seconds: float, every_s: float, window: int) -> Path:
    """The pipeline file of the chain; its source ends when there is a file `enough` in `folder`."""
    stages = []
    for name, (factor, offset) in CHAIN.items():
        settings = {"factor": factor, "offset": offset, "seconds": seconds}
        made_by = "Ends" if name == list(CHAIN)[-1] else "Affine"
        stages.append(stage(name, executor=f"tests.soak.harness.numeric_chain:{made_by}", settings=settings))
    pace = {"until": str(folder / "enough"), "every_s": every_s}
    source = {"kind": "tests.soak.harness.numeric_chain:Numbers", "name": "numbers", "window": window, "settings": pace}
    return pipeline_file(folder, stages, source, name="chain")


class Fleet:
    """The workers of one pipeline at one broker."""

    def __init__(self, box: Machine, path: Path, address: str) -> None:
        self._box, self._path, self._address = box, path, address
        self.killed = 0
        self._ever: list[Running] = []
        self._numbers: Counter[str] = Counter()

    def start(self, stage_name: str, worker: str = "") -> Member:
        """Start a worker; one without a name gets the next of its stage."""
        self._numbers[stage_name] += 1
        name = worker or f"{stage_name}-{self._numbers[stage_name]}"
        options = ("--broker", self._address, "--worker", name)
        running = self._box.sparse("stage", self._path, stage_name, *options)
        self._ever.append(running)
        return Member(stage_name, name, running)

    def await_up(self, members: Iterable[Member]) -> None:
        """Wait until the broker says of all of them, these very processes, that they are up."""
        wanted = list(members)

        def all_up(workers: dict[str, Birth]) -> bool:
            births = [birth for birth in workers.values() if birth.state == "up"]
            return all(any(member.is_it(birth) for birth in births) for member in wanted)

        for member in wanted:
            assert member.running.process.poll() is None, f"{member.worker} ended: {member.running.said()}"
        await_workers(self._address, all_up)

    def kill(self, members: Sequence[Member]) -> None:
        """SIGKILL them, all before the first is missed."""
        for member in members:
            member.running.process.kill()
        for member in members:
            member.running.process.wait()
        self.killed += len(members)

    def assert_nobody_panicked(self) -> None:
        """Assert that no worker that ever ran said what only a defect makes it say."""
        for running in self._ever:
            assert_calm(running)


def assert_calm(running: Running) -> None:
    said = running.said()
    assert not _PANIC.search(said), said[-4000:]


class Load:
    """`sparse source` on the chain, in its own process, and what it has written down."""

    def __init__(self, box: Machine, path: Path, address: str) -> None:
        self.folder = box.folder / "out"
        self._enough = box.folder / "enough"
        self.running = box.sparse("source", path, "--broker", address, "--out", self.folder, "--json")

    def lines(self) -> list[dict[str, Any]]:
        """The results so far, in the order of their requests."""
        file = self.folder / "results.jsonl"
        text = file.read_text() if file.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def await_more(self, count: int) -> None:
        """Wait until `count` more results are in than now."""
        goal = len(self.lines()) + count

        def there() -> bool:
            assert self.running.process.poll() is None, self.running.said()
            return len(self.lines()) >= goal

        eventually(f"{goal} results, of {len(self.lines())} now", there)

    def end(self) -> dict[str, Any]:
        """Have it make no more requests, wait until those made are answered, and check each; its summary."""
        self._enough.touch()
        said = self.running.end()
        assert said.status == 0, f"{said.err[-4000:]}\n{said.out[-2000:]}"
        assert_calm(self.running)
        summary = said.answer
        lines = self.lines()
        assert [line["index"] for line in lines] == list(range(len(lines)))
        wrong = [line for line in lines if line.get("values") != expected(line["index"])]
        assert not wrong, f"{len(wrong)} wrong, such as {wrong[0]}"
        assert len({line["request"] for line in lines}) == len(lines)
        counts = [summary[key] for key in ("requests", "results", "failed", "lost", "dropped")]
        assert counts == [len(lines), len(lines), 0, 0, 0], summary
        return summary


def figures(summary: dict[str, Any], **more: int) -> str:
    """One line of what a load went through."""
    latency = summary["latency_ms"]
    said = (
        f"{summary['requests']} requests in {summary['elapsed_s']:.0f} s, {summary['results']} results, "
        f"{summary['failed']} failed, {summary['lost']} lost; {summary['throughput_per_s']:.1f} results/s, "
        f"latency p50 {latency['p50']:.0f} ms, p99 {latency['p99']:.0f} ms; "
        f"{summary['retries']} retries, {summary['twins']} twins dropped"
    )
    if isinstance(reasons := summary.get("retried"), dict):
        said += f" (retried by reason: {reasons})"
    return "; ".join([said, *(f"{count} {what.replace('_', ' ')}" for what, count in more.items())])
