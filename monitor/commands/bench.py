"""`sparse bench SUITE...`: deployments of one network, measured and compared."""

import json as jsonlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Annotated, Any

import typer
from rich.console import Console

from brokers.config.pipeline_file import resolve_broker_address
from brokers.errors import UsageError
from brokers.process.files import new_run_folder
from brokers.process.shutdown import EXIT_INTERRUPTED
from monitor.bench.results import LEGEND, comparison_table, results_to_json
from monitor.bench.runner import BenchPlan, BenchRunner
from monitor.bench.suite import BenchCase, find_suites, packaged_suites

DEFAULT_WARM_UP = 20
DEFAULT_REPEATS = 3
TERMINAL_WIDTH = 80  # columns

# Options that `sparse bench` and `sparse bench sweep` share.
RequestsOption = Annotated[
    int | None, typer.Option(min=1, help="Requests (training: steps) of each run, including the warm-up.")
]
WarmUpOption = Annotated[
    int, typer.Option(min=0, help="Requests (training: steps) at the start of each run that are not measured.")
]
RepeatsOption = Annotated[int, typer.Option(min=1, help="Runs of each suite, or of each point of a sweep.")]
OutOption = Annotated[Path | None, typer.Option(help="The folder for results; default: a new folder below runs/.")]
JsonOption = Annotated[bool, typer.Option("--json", help="End with the results as one line of JSON.")]


def command(
    suites: Annotated[
        list[str] | None,
        typer.Argument(help="Pipeline files, names of suites, or tasks (detect, train): all suites of one."),
    ] = None,
    requests: RequestsOption = None,
    warm_up: WarmUpOption = DEFAULT_WARM_UP,
    repeats: RepeatsOption = DEFAULT_REPEATS,
    source_only: Annotated[
        bool, typer.Option("--source-only", help="Start only the source: brokers and stages are up already.")
    ] = False,
    out: OutOption = None,
    list_suites: Annotated[bool, typer.Option("--list", help="List the packaged suites.")] = False,
    json: JsonOption = False,
) -> int:
    """Measure and compare suites: deployments of one network.

    Each run is a `sparse run` with its telemetry.sqlite in a separate folder; the suites take turns. Beside the runs
    are manifest.json (suites, versions, machine), results.json and results.csv; `sparse report FOLDER` plots them.

    Example: sparse bench detect-cloud detect-server --requests 100
    """
    if list_suites:
        _print_suites()
        return 0
    if not suites:
        names = [*packaged_suites(), *(name for names in packaged_suites().values() for name in names)]
        raise UsageError(
            "NoSuite",
            f"which suite? Name pipeline files, or some of {', '.join(names)}; `sparse bench --list` describes them",
        )
    cases = [suite.with_run_length(requests, warm_up) for suite in find_suites(suites)]
    if source_only:
        _check_brokers(cases)
    plan = BenchPlan(repeats, warm_up, requests, source_only)
    bench = BenchRunner(cases, plan, out or new_run_folder(Path("runs"), "bench"), Console(stderr=True))
    bench.run()
    return print_results(bench, "suite", json)


def print_results(bench: BenchRunner, label: str, json: bool, further: Mapping[str, Any] | None = None) -> int:
    """Print the results, or as JSON with the keys of `further`; returns the exit status."""
    results = bench.results
    if json:
        print(jsonlib.dumps({"folder": str(bench.folder), **results_to_json(results), **(further or {})}))  # noqa: T201 - the command's output
    elif results:
        console = Console(highlight=False)
        training = {case.name for case in bench.cases if case.pipeline.is_training}
        for is_training in (False, True):
            if rows := [result for result in results if (result.case in training) == is_training]:
                console.print()
                console.print(comparison_table(rows, label, is_training))
        console.print(LEGEND, style="dim")
        console.print(f"results: {bench.folder}", soft_wrap=True)
    if bench.was_stopped:
        return EXIT_INTERRUPTED
    return 1 if any(result.metrics is None for result in results) else 0


def wrap_text(text: str, indent: int) -> str:
    """Wrap a text for a terminal without breaking names; all lines but the first are indented."""
    return fill(text, TERMINAL_WIDTH, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def _check_brokers(cases: Sequence[BenchCase]) -> None:
    """Raise `UsageError` where the broker of a site that a case uses is not known."""
    for case in cases:
        for site in case.pipeline.used_sites:
            if resolve_broker_address(case.pipeline, site) is None:
                raise UsageError(
                    "NoBroker",
                    f"{case.path}: no broker address for site {site!r}, whose broker --source-only expects to be up: "
                    "set SPARSE_BROKER, or add a [[site]] with name and broker",
                    key="site",
                    path=str(case.path),
                    site=site,
                )


def _print_suites() -> None:
    for task, names in packaged_suites().items():
        print(f"{task}: all of these")  # noqa: T201 - the command's output
        for suite in find_suites(names):
            name = f"  {suite.name:<26} "
            print(wrap_text(name + suite.description, len(name)))  # noqa: T201 - the command's output
