"""The cases of a sweep, and which of its points is the best."""

from __future__ import annotations

import pytest

from brokers.errors import UsageError
from monitor.bench.results import RunResult
from monitor.bench.suite import BenchCase, find_suites
from monitor.bench.sweep import batch_cases, cut_cases, find_best
from tests.support.environment.checkout import ROOT
from tests.unit.monitor.bench.bench_runs import make_results


def split_suite() -> BenchCase:
    """A detector in two stages, at two sites."""
    (suite,) = find_suites([str(ROOT / "examples" / "split.toml")])
    return suite


def test_batch_size_of_inference_is_that_of_all_stages() -> None:
    one, four = batch_cases(split_suite(), [1, 4], 30, 5)
    assert [stage["max_batch"] for stage in four.overrides["stage"]] == [4, 4]
    assert (one.name, four.name) == ("batch-1", "batch-4")
    assert four.sweep_point == {"sweep": "batch", "batch": 4}


def test_batch_size_of_training_is_the_rows_of_a_step() -> None:
    (suite,) = find_suites(["train-cloud"])
    (case,) = batch_cases(suite, [2], 6, 1)
    assert (case.overrides["training.batch"], case.overrides["training.micro_batches"]) == (2, 2)
    assert case.overrides["source.limit"] * case.overrides["training.epochs"] == 6 * 2


def test_cuts_are_tried_with_the_uncut_network_at_both_sites() -> None:
    cases = cut_cases(split_suite(), None, {8: 346_112, 13: 100}, 30, 5)
    assert [case.name for case in cases] == ["cut-8", "cut-13", "uncut-at-device", "uncut-at-cloud"]
    assert cases[0].overrides["pipeline.cuts"] == [8]
    assert cases[0].sweep_point == {"sweep": "cut", "cut": 8, "cut_bytes": 346_112}
    uncut = cases[2]
    assert [(stage["name"], stage["site"]) for stage in uncut.overrides["stage"]] == [("whole", "device")]
    assert uncut.overrides["pipeline.cuts"] is None
    assert uncut.sweep_point == {"sweep": "cut", "cut": None, "site": "device"}


def test_unknown_cut_raises_usage_error() -> None:
    with pytest.raises(UsageError) as caught:
        cut_cases(split_suite(), [99], {8: 346_112}, 30, 5)
    assert (caught.value.code, caught.value.fields["cut"]) == ("BadSweep", 99)


def test_cuts_need_a_network_in_two_stages() -> None:
    (suite,) = find_suites(["detect-cloud"])
    with pytest.raises(UsageError) as caught:
        cut_cases(suite, [8], {8: 346_112}, 30, 5)
    assert caught.value.code == "BadSweep"


@pytest.mark.parametrize(
    ("runs", "text"),
    [
        ({"a": [10.0, 11.0, 12.0], "b": [7.0, 8.0, 8.8]}, "best: a, 11/s, 37.5% above b"),
        ({"a": [10.0, 11.0, 12.0], "b": [8.0, 10.0, 10.5]}, "best: a, 11/s, within noise of b (10.0% above b)"),
        ({"a": [10.0], "b": [12.0]}, "best: b, 12/s, 20.0% above a; with one run of each, noise is unknown"),
        ({"a": [10.0, 10.0]}, "best: a, 10/s"),
    ],
)
def test_best_point_has_a_margin_or_is_within_noise(runs: dict[str, list[float]], text: str) -> None:
    assert str(find_best(make_results(**runs))) == text


def test_sweep_without_results_has_no_best_point() -> None:
    assert find_best([RunResult("a", "a-1", error="no")]) is None
