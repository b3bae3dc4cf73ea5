"""A benchmark: repeated runs of several cases, with manifest and results in one folder."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from brokers.config.pipeline_file import resolve_broker_address
from brokers.errors import UsageError
from brokers.process.files import write_atomic
from brokers.process.shutdown import ShutdownEvent
from brokers.server.mosquitto_conf import find_mosquitto
from brokers.telemetry.client import RUN_VARIABLE, SOCKET_VARIABLE
from monitor.bench.case import BenchCase
from monitor.bench.environment import git_revision, hardware, versions
from monitor.bench.manifest import MANIFEST_FILE, Manifest, suite_record
from monitor.bench.results import CSV_FILE, RESULTS_FILE, RunResult, results_to_csv, results_to_json
from monitor.bench.run import BenchPlan, BenchRun
from monitor.bench.table import format_run


@dataclass(eq=False)
class BenchRunner:
    """Measures cases; after each run the manifest and the results so far are in `folder`."""

    cases: Sequence[BenchCase]
    plan: BenchPlan
    folder: Path
    console: Console
    results: list[RunResult] = field(default_factory=list)  # of the runs that were not interrupted
    was_stopped: bool = False
    _current: BenchRun | None = None
    _provenance: dict[str, Any] = field(default_factory=dict)

    def run(self) -> list[RunResult]:
        """Run everything. The first SIGINT or SIGTERM ends the current run in order, a second one kills it.

        Raises `UsageError` ("BadFolder") for a folder that cannot be written or is not empty.
        """
        self._prepare_folder()
        # Each run has a monitor and a name of its own, instead of those of the node.
        for variable in (SOCKET_VARIABLE, RUN_VARIABLE):
            os.environ.pop(variable, None)
        asyncio.run(self._run_all())
        self._write(ended_at=_now())
        return self.results

    def _prepare_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if next(self.folder.iterdir(), None) is not None:
                raise self._bad_folder("it is not empty: name a new or an empty folder")
            self._provenance = {
                "command": ("sparse", *sys.argv[1:]),
                "started_at": _now(),
                "versions": versions(),
                "revision": git_revision(),
                "hardware": hardware(),
            }
            self._write()
        except OSError as error:
            raise self._bad_folder(error.strerror or str(error)) from None

    def _bad_folder(self, problem: str) -> UsageError:
        message = f"{self.folder}: results cannot be written there: {problem}"
        return UsageError("BadFolder", message, path=str(self.folder), problem=problem)

    async def _run_all(self) -> None:
        """Run one repeat of every case, then the next, so that a busy moment of the machine affects all cases."""
        shutdown = ShutdownEvent()
        shutdown.install_signal_handlers(force=self._kill)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f} of {task.total:.0f}"),
        )
        hidden = not self.console.is_terminal
        with Progress(*columns, TimeElapsedColumn(), console=self.console, disable=hidden) as progress:
            bar = progress.add_task("", total=len(self.cases) * self.plan.repeats)
            for number in range(1, self.plan.repeats + 1):
                for case in self.cases:
                    name = f"{case.name}-{number}"
                    progress.update(bar, description=name)
                    self._current = BenchRun(case, self.plan, self.folder / name)
                    result = await self._current.run(shutdown)
                    if shutdown.is_set():
                        self.was_stopped = True
                        self._print(f"{name}: interrupted, not counted")
                        return
                    self.results.append(result)
                    self._print(format_run(result))
                    self._write()
                    progress.advance(bar)

    def _kill(self) -> None:
        if self._current is not None:
            self._current.kill()

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _write(self, ended_at: str | None = None) -> None:
        """Write the manifest and the results so far."""
        manifest = Manifest(
            mode="source" if self.plan.source_only else "run",
            ended_at=ended_at,
            warm_up=self.plan.warm_up,
            requests=self.plan.requests,
            repeats=self.plan.repeats,
            suites=tuple(
                suite_record(
                    case, self._emulates_links(case), [each.name for each in self.results if each.case == case.name]
                )
                for case in self.cases
            ),
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


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
