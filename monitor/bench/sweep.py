"""A sweep: one pipeline file at several batch sizes, or cut at several places and not at all; which of them is best."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from brokers.config.schema import LOCAL_SITE
from monitor.bench.case import BenchCase, run_length_overrides
from monitor.bench.errors import NoSweep
from monitor.bench.results import RunResult, spreads_by_case
from monitor.bench.suite import Suite

UNCUT_STAGE = "whole"  # the name of the stage of a network that is not cut


def batch_cases(suite: Suite, sizes: Sequence[int], requests: int | None, warm_up: int) -> list[BenchCase]:
    """`max_batch` of all stages; of a pipeline that trains, rows of a step, in as many micro-batches as it has."""
    pipeline, found = suite.pipeline, []
    for size in sizes:
        name = f"batch-{size}"
        changes = run_length_overrides(name, pipeline, requests, warm_up, size)
        if pipeline.is_training:
            changes |= {"training.batch": size, "training.micro_batches": min(pipeline.training.micro_batches, size)}
        else:
            changes["stage"] = [{**stage, "max_batch": size} for stage in _stages(suite)]
        found.append(BenchCase(name, suite.path, pipeline, changes, {"sweep": "batch", "batch": size}))
    return found


def cut_cases(
    suite: Suite, wanted: Sequence[int] | None, known: Mapping[int, int], requests: int | None, warm_up: int
) -> list[BenchCase]:
    """Each cut between the two stages of a pipeline, and its network uncut where the first is and where the second is.

    `known` has the bytes that cross each cut there is; `wanted` are those to try, all if left out. Raises `NoSweep`.
    """
    pipeline = suite.pipeline
    check_cuttable(suite)
    for cut in wanted or ():
        if cut not in known:
            raise NoSweep(f"{suite.path}: its network has no cut {cut}: expected 1 to {max(known, default=0)}")
    changes = run_length_overrides(suite.name, pipeline, requests, warm_up, pipeline.training.batch)
    found = [
        BenchCase(
            f"cut-{cut}",
            suite.path,
            pipeline,
            {**changes, "pipeline.cuts": [cut]},
            {"sweep": "cut", "cut": cut, "cut_bytes": known[cut]},
        )
        for cut in (known if wanted is None else wanted)
    ]
    places = {stage.get("site", LOCAL_SITE): stage for stage in reversed(_stages(suite))}
    for site, stage in reversed(places.items()):
        whole = {**changes, "pipeline.cuts": None, "stage": [{**stage, "name": UNCUT_STAGE}]}
        about = {"sweep": "cut", "cut": None, "site": site}
        found.append(BenchCase(f"uncut-at-{site}", suite.path, pipeline, whole, about))
    return found


def check_cuttable(suite: Suite) -> None:
    """Raises `NoSweep` for a pipeline that is not one network in two stages."""
    stages = suite.pipeline.stage
    if len(stages) != 2 or any(stage.executor is not None for stage in stages):
        raise NoSweep(f"{suite.path}: cuts are tried in a pipeline of one network in two stages, it has {_told(suite)}")


def _told(suite: Suite) -> str:
    stages = suite.pipeline.stage
    own = sum(stage.executor is not None for stage in stages)
    return f"{len(stages)}{f', {own} of them with an executor of its own' if own else ''}"


def _stages(suite: Suite) -> list[dict[str, Any]]:
    """The file's own `[[stage]]` tables."""
    found: list[dict[str, Any]] = tomllib.loads(suite.path.read_text())["stage"]
    return found


@dataclass(frozen=True, slots=True)
class SweepResult:
    """The point with the highest throughput, and how sure that is."""

    best: str
    throughput_per_s: float
    second: str | None  # None where there is no other
    margin: float  # of the best's median over the second's: 0.1 is a tenth more
    within_noise: bool | None  # whether runs of the two overlap; None: one run of each cannot say

    def __str__(self) -> str:
        said = f"best: {self.best}, {self.throughput_per_s:.4g}/s"
        if self.second is None:
            return said
        over = f"{self.margin:.1%} above {self.second}"
        if self.within_noise is None:
            return f"{said}, {over}; one run of each: what is noise is not known"
        return f"{said}, within noise of {self.second} ({over})" if self.within_noise else f"{said}, {over}"


def find_best(results: Sequence[RunResult]) -> SweepResult | None:
    """Which point has the highest median throughput; None where no run ended well.

    It is within noise of the second when its slowest run is no faster than the other's fastest.
    """
    rates = {case: figures["throughput_per_s"] for case, figures in spreads_by_case(results).items() if figures}
    ranked = sorted(rates, key=lambda case: rates[case].median, reverse=True)
    if not ranked:
        return None
    best = rates[ranked[0]]
    if len(ranked) == 1:
        return SweepResult(ranked[0], best.median, None, 0.0, None)
    second = rates[ranked[1]]
    counts = [sum(result.case == case and result.metrics is not None for result in results) for case in ranked[:2]]
    noise = best.minimum <= second.maximum if min(counts) > 1 else None
    margin = best.median / second.median - 1 if second.median else 0.0
    return SweepResult(ranked[0], best.median, ranked[1], margin, noise)
