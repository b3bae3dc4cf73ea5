"""`sparse bench sweep FILE`: which batch size, or which cut, is best for a pipeline."""

from __future__ import annotations

import json as jsonlib
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from brokers.process.files import new_run_folder
from monitor.bench.case import BenchCase
from monitor.bench.errors import NoSweep
from monitor.bench.runner import BenchPlan
from monitor.bench.suite import Suite, find_suites
from monitor.bench.sweep import batch_cases, check_cuttable, cut_cases, find_best
from monitor.commands.bench import (
    DEFAULT_REPEATS,
    DEFAULT_WARM_UP,
    JsonOption,
    OutOption,
    RepeatsOption,
    RequestsOption,
    WarmUpOption,
    create_runner,
    print_results,
    wrap_text,
)

ALL_CUTS = "all"
_LARGEST_BATCH = 1024  # of brokers.config.schema


def command(
    file: Annotated[str, typer.Argument(help="A pipeline file, or the name of a suite.")],
    batch: Annotated[
        str | None, typer.Option(help="Batch sizes, as 1,2,4,8: max_batch of all stages; rows of a training step.")
    ] = None,
    cuts: Annotated[
        str | None,
        typer.Option(help="Cuts, as 4,8,13, or all, each in turn, and no cut, of a network in two stages."),
    ] = None,
    requests: RequestsOption = None,
    warm_up: WarmUpOption = DEFAULT_WARM_UP,
    repeats: RepeatsOption = DEFAULT_REPEATS,
    out: OutOption = None,
    json: JsonOption = False,
) -> int:
    """Measure a pipeline at several batch sizes or cuts, and name the best.

    With --cuts the whole network at the first stage's site, and at the second's, are tried too: sometimes it is best
    not to cut. `sparse cuts FILE --all` lists the cuts of a network.

    Example: sparse bench sweep examples/split.toml --cuts 4,8,13 --requests 60
    """
    if (batch is None) == (cuts is None):
        raise NoSweep("what is to be tried? Expected either --batch 1,2,4,8, or --cuts 4,8,13 or --cuts all")
    (suite, *more) = find_suites([file])
    if more:
        raise NoSweep(f"a sweep is of one pipeline, {file!r} are {1 + len(more)}")
    cases = _batches(suite, batch, requests, warm_up) if batch is not None else _cuts(suite, cuts, requests, warm_up)
    plan = BenchPlan(repeats, warm_up, requests)
    bench = create_runner(cases, plan, out or new_run_folder(Path("runs"), "sweep"))
    results = bench.run()
    best = find_best(results)
    status = print_results(bench, results, "point", json, {"best": asdict(best) if best else None})
    if best and not json:
        print(wrap_text(str(best), len("best: ")))  # noqa: T201 - the answer
    return status


def _batches(suite: Suite, batch: str, requests: int | None, warm_up: int) -> list[BenchCase]:
    sizes = _numbers("--batch", batch, _LARGEST_BATCH)
    return batch_cases(suite, sizes, requests, warm_up)


def _cuts(suite: Suite, cuts: str | None, requests: int | None, warm_up: int) -> list[BenchCase]:
    check_cuttable(suite)  # before the network is built to see what crosses its cuts
    wanted = None if cuts == ALL_CUTS else _numbers("--cuts", cuts or "", None)
    return cut_cases(suite, wanted, _known(suite.path), requests, warm_up)


def _numbers(option: str, text: str, limit: int | None) -> list[int]:
    """The numbers of an option, each once."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and 0 < int(word) <= (limit or int(word)) for word in words):
        upto = f" up to {limit}" if limit else ""
        raise NoSweep(f"{option} {text!r}: expected whole numbers from 1{upto} with commas between, as 1,2,4")
    return list(dict.fromkeys(int(word) for word in words))


def _known(file: Path) -> dict[int, int]:
    """The cuts that the network can have, and the bytes that cross each: `sparse cuts` knows."""
    command = [sys.executable, "-m", "brokers.cli", "cuts", str(file), "--all", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise NoSweep((said[-1] if said else f"sparse cuts {file} failed").removeprefix("sparse: "))
    return {cut["after"]: cut["wire_bytes"] for cut in jsonlib.loads(done.stdout.splitlines()[-1])["cuts"]}
