"""One run of a benchmark: a `sparse run` of its own in a folder of its own, and its figures when it has ended."""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from monitor.analysis.run_metrics import MEASUREMENTS_READ, compute_run_metrics
from monitor.bench.case import BenchCase
from monitor.bench.errors import RunFailed
from monitor.bench.overrides import apply_overrides
from monitor.bench.results import RunResult
from monitor.errors import BadStore, NoSamples
from monitor.launch.child_process import ChildProcess
from monitor.launch.monitor_process import RunMonitor
from monitor.launch.sites import set_up_brokers
from monitor.stores.sqlite import TELEMETRY_FILE as TELEMETRY
from monitor.stores.sqlite import SqliteReader

_POLL_S = 0.05
# What a run that is told to end may take: its source, then its stages.
_END_S = 45.0


@dataclass(eq=False)
class StopRequest:
    """Whether somebody said stop: the first Ctrl-C ends the run in hand in good order, a second one kills it."""

    count: int = 0

    def on_signal(self, *_: object) -> None:
        """A handler of signals."""
        self.count += 1


@dataclass(eq=False)
class BenchRun:
    """One run of a case. `source_only`: its stages are up already, somewhere; its source is all that is started."""

    case: BenchCase
    name: str
    folder: Path
    warm_up: int
    source_only: bool = False
    summary: dict[str, Any] = field(default_factory=dict)  # what the run said of itself

    def run(self, stopping: StopRequest) -> RunResult:
        """Run it to its end; a run that failed, or that was stopped, says so in its `error`."""
        try:
            self._run(stopping)
            points = {name: SqliteReader(self.folder / TELEMETRY).points(name) for name in MEASUREMENTS_READ}
            return RunResult(self.case.name, self.name, compute_run_metrics(points, self.warm_up))
        except (RunFailed, BadStore, NoSamples) as error:
            return RunResult(self.case.name, self.name, error=str(error))

    def _run(self, stopping: StopRequest) -> None:
        logs = self.folder / "logs"
        logs.mkdir(parents=True)
        file = self.folder / "pipeline.toml"
        beside = self.case.pipeline.folder
        file.touch(mode=0o600)  # a broker's address may hold a password
        file.write_text(apply_overrides(self.case.path.read_text(), beside, self.case.overrides))
        paths = [str(beside), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {"PYTHONPATH": os.pathsep.join(paths)}
        options = (str(file), "--json", "--no-pictures", "--out", str(self.folder))
        what = "source" if self.source_only else "run"
        child = ChildProcess(what, (what, *options), logs / "run.log", environment=environment)
        status = self._of_source(child, stopping) if self.source_only else _wait(child, stopping)
        self.summary = _summary(child.last_log_line())
        if stopping.count:
            raise RunFailed("it was stopped")
        if status:
            raise RunFailed(self._why(child, status))

    def _of_source(self, child: ChildProcess, stopping: StopRequest) -> int:
        """With a monitor of its own, as `sparse run` would have given it."""
        pipeline = self.case.pipeline
        with set_up_brokers(pipeline, None, None) as sites:  # all have brokers that run already: nothing is started
            monitor = RunMonitor(pipeline, sites, self.folder, True)
            child.environment = {**child.environment, **monitor.environment}
            monitor.start()
            try:
                return _wait(child, stopping)
            finally:
                monitor.stop()

    def _why(self, child: ChildProcess, status: int) -> str:
        if not self.summary:
            return child.last_log_line() or f"it ended with status {status} and said nothing"
        lacking = self.summary.get("requests", 0) - self.summary.get("results", 0)
        return f"{lacking} of {self.summary.get('requests')} requests have no result (its log: {child.log_file})"


def _wait(child: ChildProcess, stopping: StopRequest) -> int:
    """Wait for its end, and see to it once told to stop."""
    child.start()
    told, end_s = 0, float("inf")
    while (status := child.exit_status) is None:
        if stopping.count > told:
            told = stopping.count
            if told == 1:
                child.terminate()
                end_s = time.monotonic() + _END_S
            else:
                end_s = 0.0
        if time.monotonic() > end_s:
            child.process.kill()
        time.sleep(_POLL_S)
    for stream in (child.process.stdin, child.process.stdout):
        if stream is not None:
            stream.close()
    return status


def _summary(line: str) -> dict[str, Any]:
    """The summary of a run, its last line, if it came to one."""
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(line)
        if isinstance(found, dict):
            return found
    return {}
