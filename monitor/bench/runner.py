"""A benchmark: repeated runs of several cases, each a `sparse run`, with manifest and results in one folder."""

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from brokers.config.pipeline_file import resolve_broker_address
from brokers.process.files import write_atomic
from brokers.process.shutdown import ShutdownEvent
from brokers.server.mosquitto_conf import find_mosquitto
from brokers.telemetry.client import RUN_VARIABLE, SOCKET_VARIABLE
from monitor.analysis.run_metrics import METRIC_INPUTS, compute_run_metrics
from monitor.bench.manifest import MANIFEST_FILE, Manifest, git_revision, hardware, suite_record, versions
from monitor.bench.results import CSV_FILE, RESULTS_FILE, RunResult, format_run, results_to_csv, results_to_json
from monitor.bench.suite import BenchCase
from monitor.errors import BadStore, NoSamples, bad_folder
from monitor.launch.child_process import ChildProcess, kill_all, terminate_all
from monitor.launch.monitor_process import RunMonitor
from monitor.launch.sites import set_up_brokers
from monitor.stores.sqlite import TELEMETRY_FILE, SqliteReader

_POLL_S = 0.05
# How long a run may take to end after SIGTERM: its source, then its stages.
_DRAIN_TIMEOUT_S = 45.0


@dataclass(frozen=True, slots=True)
class BenchPlan:
    """Measurement settings of a benchmark."""

    repeats: int
    warm_up: int  # requests or steps at the start of each run that are not measured
    requests: int | None = None  # requests or steps of each run, the warm-up included
    source_only: bool = False  # start only sources: stages and brokers are up already


@dataclass(eq=False)
class BenchRunner:
    """Measures cases; after each run the manifest and the results so far are in `folder`."""

    cases: Sequence[BenchCase]
    plan: BenchPlan
    folder: Path
    console: Console
    results: list[RunResult] = field(default_factory=list)  # of the runs that were not interrupted
    was_stopped: bool = False
    _children: list[ChildProcess] = field(default_factory=list)
    _provenance: dict[str, Any] = field(default_factory=dict)

    def run(self) -> list[RunResult]:
        """Run everything. The first SIGINT or SIGTERM ends the current run in order, a second one kills it.

        Raises `UsageError` ("BadFolder") for a folder that cannot be written or is not empty.
        """
        self._prepare_folder()
        # Each run has its own monitor and name, instead of those of the node.
        for variable in (SOCKET_VARIABLE, RUN_VARIABLE):
            os.environ.pop(variable, None)
        asyncio.run(self._run_all())
        self._write(ended_at=_now())
        return self.results

    def _prepare_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if next(self.folder.iterdir(), None) is not None:
                raise bad_folder(
                    self.folder, "results cannot be written there: it is not empty: name a new or an empty folder"
                )
            self._provenance = {
                "command": ("sparse", *sys.argv[1:]),
                "started_at": _now(),
                "versions": versions(),
                "revision": git_revision(),
                "hardware": hardware(),
            }
            self._write()
        except OSError as error:
            raise bad_folder(self.folder, f"results cannot be written there: {error.strerror}") from None

    async def _run_all(self) -> None:
        """Run one repeat of every case, then the next, so that a busy moment of the machine affects all cases."""
        shutdown = ShutdownEvent()
        shutdown.install_signal_handlers(force=lambda: kill_all(self._children))
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal) as progress:
            bar = progress.add_task("", total=len(self.cases) * self.plan.repeats)
            for number in range(1, self.plan.repeats + 1):
                for case in self.cases:
                    folder = self.folder / f"{case.name}-{number}"
                    progress.update(bar, description=folder.name)
                    result = await self._run_case(case, folder, shutdown)
                    if shutdown.is_set():
                        self.was_stopped = True
                        self._print(f"{folder.name}: interrupted, not counted")
                        return
                    self.results.append(result)
                    self._print(format_run(result))
                    self._write()
                    progress.advance(bar)

    async def _run_case(self, case: BenchCase, folder: Path, shutdown: ShutdownEvent) -> RunResult:
        """One run to its end, or until `shutdown` is set; the result of a failed run has an `error`."""
        (folder / "logs").mkdir(parents=True)
        file = folder / "pipeline.toml"
        file.touch(mode=0o600)  # a broker's address may hold a password
        file.write_text(case.to_toml())
        command = "source" if self.plan.source_only else "run"
        arguments = (command, str(file), "--json", "--no-pictures", "--out", str(folder))
        # The user's modules are beside the original pipeline file.
        paths = [str(case.pipeline.folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {"PYTHONPATH": os.pathsep.join(paths)}
        child = ChildProcess(command, arguments, folder / "logs" / "run.log", environment=environment)
        if self.plan.source_only:
            await self._run_with_monitor(child, case, folder, shutdown)
        else:
            await self._run_child(child, shutdown)
        if error := _exit_reason(child):
            return RunResult(case.name, folder.name, error=error)
        try:
            reader = SqliteReader(folder / TELEMETRY_FILE)
            points = {measurement: reader.points(measurement) for measurement in METRIC_INPUTS}
            return RunResult(case.name, folder.name, compute_run_metrics(points, self.plan.warm_up))
        except (BadStore, NoSamples) as error:
            return RunResult(case.name, folder.name, error=str(error))

    async def _run_child(self, child: ChildProcess, shutdown: ShutdownEvent) -> None:
        self._children = [child]
        child.start()
        stopped = asyncio.create_task(shutdown.wait(), name="bench-shutdown")
        while child.exit_status is None and not stopped.done():
            await asyncio.wait({stopped}, timeout=_POLL_S)
        stopped.cancel()
        await asyncio.to_thread(terminate_all, [child], _DRAIN_TIMEOUT_S)

    async def _run_with_monitor(
        self, child: ChildProcess, case: BenchCase, folder: Path, shutdown: ShutdownEvent
    ) -> None:
        """Run a source with the telemetry monitor that `sparse run` would give it."""
        with set_up_brokers(case.pipeline, None, None) as sites:  # all have addresses: nothing is started
            monitor = RunMonitor(case.pipeline, sites, folder)
            child.environment = {**child.environment, **monitor.environment}
            monitor.start()
            try:
                while monitor.is_starting and not shutdown.is_set():  # noqa: ASYNC110 - it has no event
                    await asyncio.sleep(_POLL_S)
                await self._run_child(child, shutdown)
            finally:
                await asyncio.to_thread(monitor.stop)

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _write(self, ended_at: str | None = None) -> None:
        """Write the manifest and the results so far."""
        suites = [
            suite_record(
                case, self._emulates_links(case), [each.name for each in self.results if each.case == case.name]
            )
            for case in self.cases
        ]
        manifest = Manifest(
            mode="source" if self.plan.source_only else "run",
            ended_at=ended_at,
            warm_up=self.plan.warm_up,
            requests=self.plan.requests,
            repeats=self.plan.repeats,
            suites=tuple(suites),
            **self._provenance,
        )
        sweep_points = {case.name: case.sweep_point for case in self.cases}
        for name, text in (
            (MANIFEST_FILE, manifest.to_json()),
            (RESULTS_FILE, json.dumps(results_to_json(self.results), indent=1) + "\n"),
            (CSV_FILE, results_to_csv(self.results, sweep_points)),
        ):
            write_atomic(self.folder / name, text.encode())

    def _emulates_links(self, case: BenchCase) -> bool:
        """Whether `sparse run` starts a Mosquitto per site for a case, with link emulators between them."""
        named = any(resolve_broker_address(case.pipeline, site) for site in case.pipeline.used_sites)
        return not (self.plan.source_only or named or find_mosquitto() is None)


def _exit_reason(child: ChildProcess) -> str:
    """Why a run failed; empty where it did not."""
    if not child.exit_status:
        return ""
    last_line = child.last_log_line()
    summary: Any = None
    with contextlib.suppress(ValueError, RecursionError):
        summary = json.loads(last_line)
    if not isinstance(summary, dict):
        return last_line or f"it ended with status {child.exit_status} without a message"
    requests = summary.get("requests", 0)
    return f"{requests - summary.get('results', 0)} of {requests} requests have no result (its log: {child.log_file})"


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
