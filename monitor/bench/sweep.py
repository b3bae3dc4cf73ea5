"""A sweep: one pipeline at several batch sizes, or cut at several places and uncut; and which point is the fastest."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from brokers.config.schema import LOCAL_SITE
from brokers.errors import UsageError
from monitor.bench.results import RunResult, spreads_by_case
from monitor.bench.suite import BenchCase

UNCUT_STAGE = "whole"  # the name of the stage of an uncut network


def batch_cases(suite: BenchCase, sizes: Sequence[int], requests: int | None, warm_up: int) -> list[BenchCase]:
    """A case per batch size: `max_batch` of all stages; for training the rows of a step."""
    training = suite.pipeline.training
    cases = []
    for size in sizes:
        overrides: dict[str, Any] = {"stage": [{**stage, "max_batch": size} for stage in _stage_tables(suite)]}
        if suite.pipeline.is_training:
            overrides = {"training.batch": size, "training.micro_batches": min(training.micro_batches, size)}
        point = {"sweep": "batch", "batch": size}
        case = replace(suite, name=f"batch-{size}", overrides=overrides, sweep_point=point)
        cases.append(case.with_run_length(requests, warm_up))
    return cases


def cut_cases(
    suite: BenchCase, cuts: Sequence[int] | None, cut_bytes: Mapping[int, int], requests: int | None, warm_up: int
) -> list[BenchCase]:
    """A case per cut between the two stages of a pipeline, and one per site of a stage with the uncut network there.

    `cut_bytes` has the bytes that cross each cut of the network; `cuts` are those to try, None for all. Raises
    `UsageError` ("BadSweep").
    """
    check_cuttable(suite)
    for cut in cuts or ():
        if cut not in cut_bytes:
            last = max(cut_bytes, default=0)
            raise UsageError("BadSweep", f"{suite.path}: the network has no cut {cut}: expected 1 to {last}", cut=cut)
    cases = []
    for cut in cut_bytes if cuts is None else cuts:
        point = {"sweep": "cut", "cut": cut, "cut_bytes": cut_bytes[cut]}
        cases.append(replace(suite, name=f"cut-{cut}", overrides={"pipeline.cuts": [cut]}, sweep_point=point))
    stage_by_site: dict[str, dict[str, Any]] = {}
    for stage in _stage_tables(suite):
        stage_by_site.setdefault(stage.get("site", LOCAL_SITE), stage)
    for site, stage in stage_by_site.items():
        overrides = {"pipeline.cuts": None, "stage": [{**stage, "name": UNCUT_STAGE}]}
        point = {"sweep": "cut", "cut": None, "site": site}
        cases.append(replace(suite, name=f"uncut-at-{site}", overrides=overrides, sweep_point=point))
    return [case.with_run_length(requests, warm_up) for case in cases]


def check_cuttable(suite: BenchCase) -> None:
    """Raise `UsageError` ("BadSweep") for a pipeline that is not one network in two stages."""
    stages = suite.pipeline.stage
    executors = sum(stage.executor is not None for stage in stages)
    if len(stages) != 2 or executors:
        actual = f"{len(stages)}{f', {executors} of them with an executor' if executors else ''}"
        raise UsageError(
            "BadSweep", f"{suite.path}: a sweep of cuts needs a pipeline of one network in two stages, it has {actual}"
        )


def _stage_tables(suite: BenchCase) -> list[dict[str, Any]]:
    """The `[[stage]]` tables of the file."""
    tables: list[dict[str, Any]] = tomllib.loads(suite.path.read_text())["stage"]
    return tables


@dataclass(frozen=True, slots=True)
class SweepResult:
    """The point of a sweep with the highest throughput, and how it compares with the second."""

    best: str
    throughput_per_s: float  # median of its runs
    second: str | None  # None where no other point has results
    margin: float  # 0.1: ten per cent above the median of the second
    within_noise: bool | None  # whether the runs of the two overlap; None where one of them has a single run

    def __str__(self) -> str:
        text = f"best: {self.best}, {self.throughput_per_s:.4g}/s"
        if self.second is None:
            return text
        margin = f"{self.margin:.1%} above {self.second}"
        if self.within_noise is None:
            return f"{text}, {margin}; with one run of each, noise is unknown"
        return f"{text}, within noise of {self.second} ({margin})" if self.within_noise else f"{text}, {margin}"


def find_best(results: Sequence[RunResult]) -> SweepResult | None:
    """The point with the highest median throughput; None where no run succeeded."""
    throughputs = {case: spreads["throughput_per_s"] for case, spreads in spreads_by_case(results).items() if spreads}
    ranked = sorted(throughputs, key=lambda case: throughputs[case].median, reverse=True)
    if not ranked:
        return None
    best = throughputs[ranked[0]]
    if len(ranked) == 1:
        return SweepResult(ranked[0], best.median, None, 0.0, None)
    second = throughputs[ranked[1]]
    overlap = best.minimum <= second.maximum if min(best.count, second.count) > 1 else None
    margin = best.median / second.median - 1 if second.median else 0.0
    return SweepResult(ranked[0], best.median, ranked[1], margin, overlap)
