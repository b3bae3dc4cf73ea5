"""A benchmark: runs of several cases, round by round, and what comes of them in a folder."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from brokers.config.pipeline_file import resolve_broker_address
from brokers.server import mosquitto_conf as mosquitto
from brokers.telemetry.client import RUN_VARIABLE, SOCKET_VARIABLE
from monitor.bench import manifest
from monitor.bench import results as bench_results
from monitor.bench.case import BenchCase
from monitor.bench.environment import git_revision, hardware, versions
from monitor.bench.errors import BadFolder
from monitor.bench.manifest import Manifest, suite_record
from monitor.bench.results import RunResult
from monitor.bench.run import BenchRun, StopRequest


@dataclass(frozen=True, slots=True)
class BenchPlan:
    """How the cases are measured."""

    repeats: int
    warm_up: int
    requests: int | None = None
    source_only: bool = False


@dataclass(eq=False)
class BenchRunner:
    """Life: `go`. Everything that a finished run gave is written before the next one begins."""

    cases: Sequence[BenchCase]
    plan: BenchPlan
    folder: Path
    console: Console
    results: list[RunResult] = field(default_factory=list)
    stop_request: StopRequest = field(default_factory=StopRequest)
    _begun: str = ""
    _fixed: dict[str, Any] = field(default_factory=dict)  # of the manifest: asked for once

    def run(self) -> list[RunResult]:
        """Run all; the results of the runs that came to their end. Raises `BadFolder`."""
        self._prepare()
        # A monitor of the node would keep what the runs tell; each has one of its own, and a name.
        for variable in (SOCKET_VARIABLE, RUN_VARIABLE):
            os.environ.pop(variable, None)
        before = {
            number: signal.signal(number, self.stop_request.on_signal) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            self._run_all()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        self._write(ended=True)
        return self.results

    def _prepare(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if next(self.folder.iterdir(), None) is not None:
                raise BadFolder(
                    str(self.folder), "it is not empty: expected a folder that is new, or has nothing in it"
                )
            self._begun = _now()
            self._fixed = {"versions": versions(), "revision": git_revision(), "hardware": hardware()}
            self._write()
        except OSError as error:
            raise BadFolder(str(self.folder), error.strerror or str(error)) from None

    def _run_all(self) -> None:
        """Round by round: a busy moment of the machine hits all cases alike."""
        shown = self.console.is_terminal
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f} of {task.total:.0f}"),
        )
        with Progress(*columns, TimeElapsedColumn(), console=self.console, disable=not shown) as progress:
            bar = progress.add_task("", total=len(self.cases) * self.plan.repeats)
            for number in range(1, self.plan.repeats + 1):
                for case in self.cases:
                    if self.stop_request.count:
                        return
                    progress.update(bar, description=f"{case.name} {number}")
                    self._run(case, number)
                    progress.advance(bar)

    def _run(self, case: BenchCase, number: int) -> None:
        name = f"{case.name}-{number}"
        run = BenchRun(case, name, self.folder / name, self.plan.warm_up, self.plan.source_only)
        result = run.run(self.stop_request)
        if self.stop_request.count:
            self.console.print(f"{name}: stopped, it does not count", highlight=False, markup=False)
            return
        self.results.append(result)
        self.console.print(_line(result), highlight=False, markup=False, soft_wrap=True)
        self._write()

    def _write(self, ended: bool = False) -> None:
        """The manifest and the results as they stand."""
        found = Manifest(
            command=("sparse", *sys.argv[1:]),
            mode="source" if self.plan.source_only else "run",
            started_at=self._begun,
            ended_at=_now() if ended else None,
            warm_up=self.plan.warm_up,
            requests=self.plan.requests,
            repeats=self.plan.repeats,
            suites=tuple(
                suite_record(case, self._emulated(case), [each.name for each in self.results if each.case == case.name])
                for case in self.cases
            ),
            **self._fixed,
        )
        (self.folder / manifest.MANIFEST_FILE).write_text(found.to_json())
        answer = json.dumps(bench_results.results_to_json(self.results), indent=1)
        (self.folder / bench_results.RESULTS_FILE).write_text(answer + "\n")
        about = {case.name: case.sweep_point for case in self.cases}
        (self.folder / bench_results.CSV_FILE).write_text(bench_results.results_to_csv(self.results, about))

    def _emulated(self, case: BenchCase) -> bool:
        """Whether `sparse run` puts relays between the sites of a case: where it starts a Mosquitto for each."""
        named = any(resolve_broker_address(case.pipeline, site) for site in case.pipeline.used_sites)
        return not (self.plan.source_only or named or mosquitto.find_mosquitto() is None)


def _line(result: RunResult) -> str:
    """One run, for a person."""
    figures = result.metrics
    if figures is None:
        return f"{result.name}: failed: {result.error}"
    unit, of = ("rows/s", "a step") if figures.kind == "training" else ("/s", "latency")
    latency = ", ".join(f"{name} {value:.0f}" for name, value in figures.latency_ms.items() if name != "mean")
    return f"{result.name}: {figures.throughput_per_s:.1f}{'' if unit == '/s' else ' '}{unit}, {of} {latency} ms"


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
