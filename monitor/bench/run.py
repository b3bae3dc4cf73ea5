"""One run of a benchmark: `sparse run` in a folder of its own, and the metrics of its telemetry."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from brokers.process.shutdown import ShutdownEvent
from monitor.analysis.run_metrics import MEASUREMENTS_READ, compute_run_metrics
from monitor.bench.case import BenchCase
from monitor.bench.results import RunResult
from monitor.errors import BadStore, NoSamples
from monitor.launch.child_process import ChildProcess, kill_all, terminate_all
from monitor.launch.monitor_process import RunMonitor
from monitor.launch.sites import set_up_brokers
from monitor.stores.sqlite import TELEMETRY_FILE, SqliteReader

_POLL_S = 0.05
# How long a run may take to end after SIGTERM: its source, then its stages.
_DRAIN_TIMEOUT_S = 45.0


@dataclass(frozen=True, slots=True)
class BenchPlan:
    """How the cases are measured."""

    repeats: int
    warm_up: int  # requests or steps at the start of each run that are not measured
    requests: int | None = None  # requests or steps of each run, the warm-up included
    source_only: bool = False  # stages and brokers are up already


@dataclass(eq=False)
class BenchRun:
    """One run of a case, in a new folder that has the name of the run."""

    case: BenchCase
    plan: BenchPlan
    folder: Path
    _child: ChildProcess = field(init=False)

    def __post_init__(self) -> None:
        command = "source" if self.plan.source_only else "run"
        file = str(self.folder / "pipeline.toml")
        arguments = (command, file, "--json", "--no-pictures", "--out", str(self.folder))
        # The user's modules are beside the original pipeline file.
        paths = [str(self.case.pipeline.folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {"PYTHONPATH": os.pathsep.join(paths)}
        self._child = ChildProcess(command, arguments, self.folder / "logs" / "run.log", environment=environment)

    async def run(self, shutdown: ShutdownEvent) -> RunResult:
        """Run to the end, or until `shutdown` is set; the result of a failed run has an `error`."""
        (self.folder / "logs").mkdir(parents=True)
        file = self.folder / "pipeline.toml"
        file.touch(mode=0o600)  # a broker's address may hold a password
        file.write_text(self.case.to_toml())
        if self.plan.source_only:
            await self._run_source(shutdown)
        else:
            await self._run_child(shutdown)
        if error := self._error():
            return RunResult(self.case.name, self.folder.name, error=error)
        try:
            reader = SqliteReader(self.folder / TELEMETRY_FILE)
            points = {measurement: reader.points(measurement) for measurement in MEASUREMENTS_READ}
            return RunResult(self.case.name, self.folder.name, compute_run_metrics(points, self.plan.warm_up))
        except (BadStore, NoSamples) as error:
            return RunResult(self.case.name, self.folder.name, error=str(error))

    def kill(self) -> None:
        """Kill the run at once; `run` then returns."""
        kill_all([self._child])

    async def _run_child(self, shutdown: ShutdownEvent) -> None:
        self._child.start()
        stopped = asyncio.create_task(shutdown.wait(), name="bench-shutdown")
        while self._child.exit_status is None and not stopped.done():
            await asyncio.wait({stopped}, timeout=_POLL_S)
        stopped.cancel()
        await asyncio.to_thread(terminate_all, [self._child], _DRAIN_TIMEOUT_S)

    async def _run_source(self, shutdown: ShutdownEvent) -> None:
        """Run a source with the telemetry monitor that `sparse run` would give it."""
        pipeline = self.case.pipeline
        with set_up_brokers(pipeline, None, None) as sites:  # all have addresses: nothing is started
            monitor = RunMonitor(pipeline, sites, self.folder)
            self._child.environment = {**self._child.environment, **monitor.environment}
            monitor.start()
            try:
                await self._run_child(shutdown)
            finally:
                await asyncio.to_thread(monitor.stop)

    def _error(self) -> str:
        """The reason why the process failed; empty where it did not."""
        status = self._child.exit_status
        if not status:
            return ""
        last_line = self._child.last_log_line()
        summary: Any = None
        with contextlib.suppress(ValueError, RecursionError):
            summary = json.loads(last_line)
        if not isinstance(summary, dict):
            return last_line or f"it ended with status {status} without a message"
        requests = summary.get("requests", 0)
        missing = requests - summary.get("results", 0)
        return f"{missing} of {requests} requests have no result (its log: {self._child.log_file})"
