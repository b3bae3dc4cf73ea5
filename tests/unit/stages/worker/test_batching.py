"""Requests that fit go into one call, and come out as they would have alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.errors import RowsDoNotMatch
from stages.worker.batching import group_compatible, join_requests, split_outputs


def rows(count: int, width: int = 3, dtype: str = "float32") -> dict[str, Any]:
    return {"x": np.arange(count * width, dtype=dtype).reshape(count, width)}


def test_equal_kinds_go_together_whatever_their_rows() -> None:
    assert group_compatible([rows(1), rows(4), rows(2)]) == [[0, 1, 2]]


@pytest.mark.parametrize(
    "other",
    [
        rows(1, width=4),
        rows(1, dtype="float64"),
        {"y": rows(1)["x"]},
        {**rows(1), "y": rows(1)["x"]},
        {"x": np.zeros(3, np.float32)},
    ],
)
def test_other_kinds_do_not(other: dict[str, Any]) -> None:
    assert group_compatible([rows(1), other, rows(1)]) == [[0, 2], [1]]


@pytest.mark.parametrize(
    "alone",
    [
        {"x": np.float32(1)},
        {"x": np.zeros((2, 3), np.float32), "y": np.zeros((3, 3), np.float32)},
        {"x": "text"},
        {"x": b"bytes", "y": [1, 2]},
        {},
    ],
)
def test_what_has_no_rows_of_one_number_goes_alone(alone: dict[str, Any]) -> None:
    assert group_compatible([alone, alone]) == [[0], [1]]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.booleans())
def test_splitting_undoes_joining(counts: list[int], with_torch: bool) -> None:
    requests = [{"x": np.full((count, 2), index), "y": np.full((count,), -index)} for index, count in enumerate(counts)]
    if with_torch:
        requests = [{name: torch.from_numpy(value) for name, value in each.items()} for each in requests]  # type: ignore[misc]
    joined, taken = join_requests(requests)
    answers = split_outputs(joined, taken)
    assert len(answers) == len(counts)
    for request, answer in zip(requests, answers, strict=True):
        assert set(answer) == {"x", "y"}
        for name in request:
            assert answer[name].shape == request[name].shape
            assert bool((answer[name] == request[name]).all())


def test_one_request_is_not_copied() -> None:
    one = rows(2)
    joined, taken = join_requests([one])
    assert joined["x"] is one["x"]
    assert split_outputs(joined, taken)[0]["x"] is one["x"]


@pytest.mark.parametrize(("answer", "actual"), [(np.zeros((2, 3)), 2), (np.float32(1), 0)])
def test_an_answer_of_other_rows_is_told(answer: Any, actual: int) -> None:
    _, taken = join_requests([rows(1), rows(2)])
    with pytest.raises(RowsDoNotMatch, match=f"a batch of 3 rows gave {actual} in 'y'"):
        split_outputs({"y": answer}, taken)
