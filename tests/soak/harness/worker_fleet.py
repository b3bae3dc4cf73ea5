"""The numeric chain as real processes: workers that are killed and replaced, and a load whose results are checked."""

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

# Lines that only a defect writes, with any injected fault.
_DEFECT = re.compile(r"Traceback|never retrieved|was never awaited|Task was destroyed|Fatal|Segmentation")


@dataclass(frozen=True)
class FleetWorker:
    """One worker process."""

    stage: str
    worker: str
    command: RunningCommand

    def matches(self, record: WorkerRecord) -> bool:
        """Whether the record is of this process: a replacement may have the same worker id."""
        return (record.stage, record.worker, record.pid) == (self.stage, self.worker, self.command.pid)


def write_chain_pipeline_file(
    folder: Path, *, stage_seconds: float, every_s: float, window: int | None = None, live: bool = False
) -> Path:
    """Write the pipeline file of the chain; its source ends when the file `stop` exists in `folder`."""
    stages = []
    for name, (factor, offset) in STAGE_COEFFICIENTS.items():
        settings = {"factor": factor, "offset": offset, "seconds": stage_seconds}
        executor = "MinMaxExecutor" if name == list(STAGE_COEFFICIENTS)[-1] else "AffineExecutor"
        stages.append(stage_table(name, executor=f"tests.soak.harness.numeric_chain:{executor}", settings=settings))
    source = {
        "kind": "tests.soak.harness.numeric_chain:NumberSource",
        "name": "numbers",
        "settings": {"stop_file": str(folder / "stop"), "every_s": every_s, "live": live},
        **({"window": window} if window else {}),
    }
    return write_pipeline_file(folder, stages, source, name="chain")


class WorkerFleet:
    """The workers of one pipeline at one broker."""

    def __init__(self, sandbox: ProcessSandbox, path: Path, address: str) -> None:
        self._sandbox = sandbox
        self._path = path
        self._address = address
        self._commands: list[RunningCommand] = []
        self._numbers: Counter[str] = Counter()
        self.kill_count = 0

    def start(self, stage_name: str, worker: str = "") -> FleetWorker:
        """Start a worker; one without a name gets the next number of its stage."""
        self._numbers[stage_name] += 1
        name = worker or f"{stage_name}-{self._numbers[stage_name]}"
        options = ("--broker", self._address, "--worker", name)
        command = self._sandbox.start_sparse("stage", self._path, stage_name, *options)
        self._commands.append(command)
        return FleetWorker(stage_name, name, command)

    def wait_until_up(self, workers: Iterable[FleetWorker]) -> None:
        """Wait until each of these processes has a presence record with the state "up"."""
        expected = list(workers)

        def all_up(records: dict[str, WorkerRecord]) -> bool:
            up = [record for record in records.values() if record.state == "up"]
            return all(any(worker.matches(record) for record in up) for worker in expected)

        for worker in expected:
            assert worker.command.process.poll() is None, f"{worker.worker} exited: {worker.command.read_stderr()}"
        wait_for_workers(self._address, all_up)

    def kill(self, workers: Sequence[FleetWorker]) -> None:
        """Send SIGKILL to all of them, then wait for their ends."""
        for worker in workers:
            worker.command.process.kill()
        for worker in workers:
            worker.command.process.wait()
        self.kill_count += len(workers)

    def assert_clean_logs(self) -> None:
        """Assert that no worker, killed ones included, logged a defect."""
        for command in self._commands:
            assert_clean_log(command)


def assert_clean_log(command: RunningCommand) -> None:
    log = command.read_stderr()
    assert not _DEFECT.search(log), log[-4000:]


class ChainLoad:
    """`sparse source` of the chain, in a separate process, and its results so far."""

    def __init__(self, sandbox: ProcessSandbox, path: Path, address: str) -> None:
        self.folder = sandbox.folder / "out"
        self._stop_file = sandbox.folder / "stop"
        self.command = sandbox.start_sparse("source", path, "--broker", address, "--out", self.folder, "--json")

    def result_lines(self) -> list[dict[str, Any]]:
        """The results so far, in the order of their requests."""
        file = self.folder / "results.jsonl"
        text = file.read_text() if file.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def wait_for_more_results(self, count: int) -> None:
        """Wait until there are `count` more results than now."""
        target = len(self.result_lines()) + count

        def reached() -> bool:
            assert self.command.process.poll() is None, self.command.read_stderr()
            return len(self.result_lines()) >= target

        eventually(f"{target} results", reached)

    def finish(self) -> dict[str, Any]:
        """Stop the source, wait for the results of all its requests, and check each; return the summary."""
        self._stop_file.touch()
        result = self.command.wait()
        assert result.returncode == 0, f"{result.stderr[-4000:]}\n{result.stdout[-2000:]}"
        assert_clean_log(self.command)
        summary = result.json_output
        lines = self.result_lines()
        assert [line["index"] for line in lines] == list(range(len(lines)))
        wrong = [line for line in lines if line.get("values") != expected_result(line["index"])]
        assert not wrong, f"{len(wrong)} wrong results, the first is {wrong[0]}"
        assert len({line["request"] for line in lines}) == len(lines)
        counts = [summary[key] for key in ("requests", "results", "failed", "lost", "dropped")]
        assert counts == [len(lines), len(lines), 0, 0, 0], summary
        return summary


def format_summary(summary: dict[str, Any], **counts: int) -> str:
    """One line about a load."""
    latency_ms = summary["latency_ms"]
    parts = [
        f"{summary['requests']} requests in {summary['elapsed_s']:.0f} s, {summary['results']} results",
        f"{summary['throughput_per_s']:.1f} results/s",
        f"latency p50 {latency_ms['p50']:.0f} ms, p99 {latency_ms['p99']:.0f} ms",
        f"{summary['retries']} retries {summary['retries_by_reason']}",
        f"{summary['duplicates']} duplicates dropped",
        *(f"{count} {name}" for name, count in counts.items()),
    ]
    return "; ".join(parts)
