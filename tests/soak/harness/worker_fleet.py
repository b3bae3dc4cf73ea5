"""Workers of a chain as an operator has them, each a process, to be killed and replaced; and a load that is counted."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from brokers.dispatch.presence import WorkerRecord
from tests.soak.harness.numeric_chain import STAGE_COEFFICIENTS, expected_result
from tests.support.brokers.presence import wait_for_workers
from tests.support.pipelines.pipeline_files import stage_table, write_pipeline_file
from tests.support.pipelines.processes import ProcessSandbox, RunningCommand, eventually

# What no process may say, whatever happens around it.
_PANIC = re.compile(r"Traceback|never retrieved|was never awaited|Task was destroyed|Fatal|Segmentation")


@dataclass(frozen=True)
class FleetWorker:
    """A worker, as it was started."""

    stage: str
    worker: str
    command: RunningCommand

    def matches(self, record: WorkerRecord) -> bool:
        """Whether this record is of this very process: a replacement may have its id."""
        return (record.stage, record.worker, record.pid) == (self.stage, self.worker, self.command.pid)


def write_chain_pipeline_file(folder: Path, *, stage_seconds: float, every_s: float, window: int) -> Path:
    """The pipeline file of the chain; its source ends when there is a file `enough` in `folder`."""
    stages = []
    for name, (factor, offset) in STAGE_COEFFICIENTS.items():
        settings = {"factor": factor, "offset": offset, "seconds": stage_seconds}
        made_by = "MinMaxExecutor" if name == list(STAGE_COEFFICIENTS)[-1] else "AffineExecutor"
        stages.append(stage_table(name, executor=f"tests.soak.harness.numeric_chain:{made_by}", settings=settings))
    pace = {"until": str(folder / "enough"), "every_s": every_s}
    source = {
        "kind": "tests.soak.harness.numeric_chain:NumberSource",
        "name": "numbers",
        "window": window,
        "settings": pace,
    }
    return write_pipeline_file(folder, stages, source, name="chain")


class WorkerFleet:
    """The workers of one pipeline at one broker."""

    def __init__(self, sandbox: ProcessSandbox, path: Path, address: str) -> None:
        self._box, self._path, self._address = sandbox, path, address
        self.kill_count = 0
        self._ever: list[RunningCommand] = []
        self._numbers: Counter[str] = Counter()

    def start(self, stage_name: str, worker: str = "") -> FleetWorker:
        """Start a worker; one without a name gets the next of its stage."""
        self._numbers[stage_name] += 1
        name = worker or f"{stage_name}-{self._numbers[stage_name]}"
        options = ("--broker", self._address, "--worker", name)
        running = self._box.start_sparse("stage", self._path, stage_name, *options)
        self._ever.append(running)
        return FleetWorker(stage_name, name, running)

    def wait_until_up(self, members: Iterable[FleetWorker]) -> None:
        """Wait until the broker says of all of them, these very processes, that they are up."""
        wanted = list(members)

        def all_up(workers: dict[str, WorkerRecord]) -> bool:
            births = [birth for birth in workers.values() if birth.state == "up"]
            return all(any(member.matches(birth) for birth in births) for member in wanted)

        for member in wanted:
            assert member.command.process.poll() is None, f"{member.worker} ended: {member.command.read_stderr()}"
        wait_for_workers(self._address, all_up)

    def kill(self, members: Sequence[FleetWorker]) -> None:
        """SIGKILL them, all before the first is missed."""
        for member in members:
            member.command.process.kill()
        for member in members:
            member.command.process.wait()
        self.kill_count += len(members)

    def assert_clean_logs(self) -> None:
        """Assert that no worker that ever ran said what only a defect makes it say."""
        for running in self._ever:
            assert_clean_log(running)


def assert_clean_log(command: RunningCommand) -> None:
    said = command.read_stderr()
    assert not _PANIC.search(said), said[-4000:]


class ChainLoad:
    """`sparse source` on the chain, in its own process, and what it has written down."""

    def __init__(self, sandbox: ProcessSandbox, path: Path, address: str) -> None:
        self.folder = sandbox.folder / "out"
        self._enough = sandbox.folder / "enough"
        self.command = sandbox.start_sparse("source", path, "--broker", address, "--out", self.folder, "--json")

    def result_lines(self) -> list[dict[str, Any]]:
        """The results so far, in the order of their requests."""
        file = self.folder / "results.jsonl"
        text = file.read_text() if file.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def wait_for_more_results(self, count: int) -> None:
        """Wait until `count` more results are in than now."""
        goal = len(self.result_lines()) + count

        def there() -> bool:
            assert self.command.process.poll() is None, self.command.read_stderr()
            return len(self.result_lines()) >= goal

        eventually(f"{goal} results, of {len(self.result_lines())} now", there)

    def finish(self) -> dict[str, Any]:
        """Have it make no more requests, wait until those made are answered, and check each; its summary."""
        self._enough.touch()
        said = self.command.wait()
        assert said.returncode == 0, f"{said.stderr[-4000:]}\n{said.stdout[-2000:]}"
        assert_clean_log(self.command)
        summary = said.json_output
        lines = self.result_lines()
        assert [line["index"] for line in lines] == list(range(len(lines)))
        wrong = [line for line in lines if line.get("values") != expected_result(line["index"])]
        assert not wrong, f"{len(wrong)} wrong, such as {wrong[0]}"
        assert len({line["request"] for line in lines}) == len(lines)
        counts = [summary[key] for key in ("requests", "results", "failed", "lost", "dropped")]
        assert counts == [len(lines), len(lines), 0, 0, 0], summary
        return summary


def format_summary(summary: dict[str, Any], **more: int) -> str:
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
