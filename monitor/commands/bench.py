"""`sparse bench SUITE...`: deployments of a network, measured against one another."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Annotated, Any

import typer
from rich.console import Console

from brokers.config.pipeline_file import resolve_broker_address
from brokers.errors import BadFile
from brokers.process.files import new_run_folder
from brokers.process.shutdown import EXIT_INTERRUPTED
from monitor.bench.case import BenchCase, case_from_suite
from monitor.bench.errors import NoSuite
from monitor.bench.results import RunResult, results_to_json
from monitor.bench.runner import BenchPlan, BenchRunner
from monitor.bench.suite import find_suites, packaged_suites
from monitor.bench.table import LEGEND, comparison_table

DEFAULT_WARM_UP = 20
DEFAULT_REPEATS = 3
TERMINAL_WIDTH = 80  # of a terminal, in columns

# Options of all that measures.
RequestsOption = Annotated[
    int | None, typer.Option(min=1, help="Requests (training: steps) of a run, the warm-up's among them.")
]
WarmUpOption = Annotated[int, typer.Option(min=0, help="Requests (training: steps) at the beginning not to count.")]
RepeatsOption = Annotated[int, typer.Option(min=1, help="Runs of each suite, or of each point of a sweep.")]
OutOption = Annotated[Path | None, typer.Option(help="A folder for all of it; left out: a new folder below runs/.")]
JsonOption = Annotated[bool, typer.Option("--json", help="End with the results as one line of JSON.")]


def command(
    suites: Annotated[
        list[str] | None, typer.Argument(help="Pipeline files, names of suites, or a task: all suites of it.")
    ] = None,
    requests: RequestsOption = None,
    warm_up: WarmUpOption = DEFAULT_WARM_UP,
    repeats: RepeatsOption = DEFAULT_REPEATS,
    source_only: Annotated[
        bool, typer.Option("--source-only", help="Stages and brokers are up already: start the source only.")
    ] = False,
    out: OutOption = None,
    list_suites: Annotated[bool, typer.Option("--list", help="Print the suites that there are, and end.")] = False,
    json: JsonOption = False,
) -> int:
    """Measure suites, deployments of one network, against one another.

    Each run is a `sparse run` of its own, in turns; what it told is in telemetry.sqlite of its folder. Beside the runs
    lie manifest.json (what was run, on what), results.json and results.csv. `sparse report FOLDER` draws it.

    Example: sparse bench detect-cloud detect-server --requests 100
    """
    if list_suites:
        _list()
        return 0
    if not suites:
        raise NoSuite((*packaged_suites(), *(suite for ours in packaged_suites().values() for suite in ours)))
    cases = [case_from_suite(suite, requests, warm_up) for suite in find_suites(suites)]
    plan = BenchPlan(repeats, warm_up, requests, source_only)
    bench = create_runner(cases, plan, out or new_run_folder(Path("runs"), "bench"))
    return print_results(bench, bench.run(), "suite", json)


def create_runner(cases: Sequence[BenchCase], plan: BenchPlan, folder: Path) -> BenchRunner:
    """A benchmark that talks to standard error. Raises `BadFile` where stages should be up and nobody says where."""
    for case in cases if plan.source_only else ():
        for site in case.pipeline.used_sites:
            if resolve_broker_address(case.pipeline, site) is None:
                problem = f"no broker is known for site {site!r}, where --source-only expects what runs already"
                raise BadFile(str(case.path), f"{problem}: set SPARSE_BROKER, or add a [[site]] with name and broker")
    return BenchRunner(cases, plan, folder, Console(stderr=True))


def print_results(
    bench: BenchRunner, results: Sequence[RunResult], what: str, json: bool, more: Mapping[str, Any] | None = None
) -> int:
    """The results on standard output, `more` among them where they are JSON; the exit status."""
    console = Console(highlight=False)
    if json:
        answer = {"folder": str(bench.folder), **results_to_json(results), **(more or {})}
        print(jsonlib.dumps(answer))  # noqa: T201 - the answer
    elif results:
        training = {case.name for case in bench.cases if case.pipeline.is_training}
        for trains in (False, True):
            if some := [result for result in results if (result.case in training) == trains]:
                console.print()
                console.print(comparison_table(some, what, trains))
        console.print(LEGEND, style="dim")
        console.print(f"all of it: {bench.folder}", soft_wrap=True)
    if bench.stop_request.count:
        return EXIT_INTERRUPTED
    return 1 if any(result.metrics is None for result in results) else 0


def _list() -> None:
    for task, names in packaged_suites().items():
        print(f"{task}: all of these")  # noqa: T201 - the answer
        for suite in find_suites(names):
            begin = f"  {suite.name:<26} "
            print(wrap_text(begin + suite.description, len(begin)))  # noqa: T201 - the answer


def wrap_text(text: str, indent: int) -> str:
    """In lines for a terminal, all but the first indented; names stay whole."""
    return fill(text, TERMINAL_WIDTH, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)
