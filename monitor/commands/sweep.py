"""`sparse bench sweep FILE`: the best batch size, or the best cut, of a pipeline."""

import json as jsonlib
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from brokers.errors import UsageError
from brokers.process.files import new_run_folder
from monitor.bench.runner import BenchPlan, BenchRunner
from monitor.bench.suite import find_suites
from monitor.bench.sweep import batch_cases, check_cuttable, cut_cases, find_best
from monitor.commands.bench import (
    DEFAULT_REPEATS,
    DEFAULT_WARM_UP,
    JsonOption,
    OutOption,
    RepeatsOption,
    RequestsOption,
    WarmUpOption,
    print_results,
    wrap_text,
)

ALL_CUTS = "all"
_MAX_BATCH = 1024  # of brokers.config.schema


def command(
    file: Annotated[str, typer.Argument(help="A pipeline file, or the name of a suite.")],
    batch: Annotated[
        str | None,
        typer.Option(help="Batch sizes, such as 1,2,4,8: max_batch of all stages; for training, the rows of a step."),
    ] = None,
    cuts: Annotated[
        str | None, typer.Option(help="Cuts, such as 4,8,13 or all, of a network in two stages; also tries it uncut.")
    ] = None,
    requests: RequestsOption = None,
    warm_up: WarmUpOption = DEFAULT_WARM_UP,
    repeats: RepeatsOption = DEFAULT_REPEATS,
    out: OutOption = None,
    json: JsonOption = False,
) -> int:
    """Measure a pipeline at several batch sizes or cuts, and name the best.

    With --cuts the uncut network is measured too, at the site of either stage: sometimes it is best not to cut.
    `sparse cuts FILE --all` lists the cuts of a network.

    Example: sparse bench sweep examples/split.toml --cuts 4,8,13 --requests 60
    """
    if (batch is None) == (cuts is None):
        raise UsageError("BadSweep", "what shall vary? Pass either --batch 1,2,4,8, or --cuts 4,8,13 or --cuts all")
    suite, *others = find_suites([file])
    if others:
        raise UsageError("BadSweep", f"a sweep is of one pipeline: {file!r} names {1 + len(others)} suites")
    if batch is not None:
        cases = batch_cases(suite, _parse_numbers("--batch", batch, _MAX_BATCH), requests, warm_up)
    else:
        check_cuttable(suite)  # before the network is built for its cuts
        numbers = None if cuts == ALL_CUTS else _parse_numbers("--cuts", cuts or "", None)
        cases = cut_cases(suite, numbers, _cut_bytes(suite.path), requests, warm_up)
    plan = BenchPlan(repeats, warm_up, requests)
    bench = BenchRunner(cases, plan, out or new_run_folder(Path("runs"), "sweep"), Console(stderr=True))
    best = find_best(bench.run())
    status = print_results(bench, "point", json, {"best": asdict(best) if best else None})
    if best and not json:
        print(wrap_text(str(best), len("best: ")))  # noqa: T201 - the command's output
    return status


def _parse_numbers(option: str, text: str, limit: int | None) -> list[int]:
    """The numbers in the value of an option, without repetitions."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and 0 < int(word) <= (limit or int(word)) for word in words):
        maximum = f" up to {limit}" if limit else ""
        raise UsageError(
            "BadSweep", f"{option} {text!r}: expected whole numbers from 1{maximum}, separated by commas, such as 1,2,4"
        )
    return list(dict.fromkeys(int(word) for word in words))


def _cut_bytes(file: Path) -> dict[int, int]:
    """The cuts of a network and the bytes that cross each; `sparse cuts` builds the network to find them."""
    command = [sys.executable, "-m", "brokers.cli", "cuts", str(file), "--all", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"sparse cuts {file} failed without a message"]
        raise UsageError("BadSweep", lines[-1].removeprefix("sparse: "))
    return {cut["after"]: cut["wire_bytes"] for cut in jsonlib.loads(done.stdout.splitlines()[-1])["cuts"]}
