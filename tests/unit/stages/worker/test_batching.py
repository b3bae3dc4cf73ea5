"""Grouping, joining and splitting of requests."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from brokers.errors import SparseError
from stages.worker.batching import group_compatible, join_requests, split_outputs
from tests.support.errors import raises_error


def request(rows: int, width: int = 3, dtype: str = "float32") -> dict[str, Any]:
    return {"x": np.arange(rows * width, dtype=dtype).reshape(rows, width)}


def test_requests_that_differ_in_rows_only_are_grouped() -> None:
    assert group_compatible([request(1), request(4), request(2)]) == [[0, 1, 2]]


@pytest.mark.parametrize(
    "other",
    [
        request(1, width=4),
        request(1, dtype="float64"),
        {"y": request(1)["x"]},
        {**request(1), "y": request(1)["x"]},
        {"x": np.zeros(3, np.float32)},
    ],
)
def test_requests_of_another_kind_are_not_grouped(other: dict[str, Any]) -> None:
    assert group_compatible([request(1), other, request(1)]) == [[0, 2], [1]]


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
def test_request_without_a_common_number_of_rows_stays_alone(alone: dict[str, Any]) -> None:
    assert group_compatible([alone, alone]) == [[0], [1]]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.booleans())
def test_splitting_is_the_inverse_of_joining(counts: list[int], with_torch: bool) -> None:
    requests = [{"x": np.full((count, 2), index), "y": np.full((count,), -index)} for index, count in enumerate(counts)]
    if with_torch:
        requests = [{name: torch.from_numpy(value) for name, value in each.items()} for each in requests]  # type: ignore[misc]
    joined, rows = join_requests(requests)
    split = split_outputs(joined, rows)
    assert len(split) == len(counts)
    for expected, actual in zip(requests, split, strict=True):
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            assert actual[name].shape == value.shape
            assert bool((actual[name] == value).all())


def test_single_request_is_not_copied() -> None:
    single = request(2)
    joined, rows = join_requests([single])
    assert joined["x"] is single["x"]
    assert split_outputs(joined, rows)[0]["x"] is single["x"]


@pytest.mark.parametrize(("value", "actual"), [(np.zeros((2, 3)), 2), (np.float32(1), 0)])
def test_outputs_with_another_number_of_rows_are_refused(value: Any, actual: int) -> None:
    _, rows = join_requests([request(1), request(2)])
    with raises_error(SparseError, "RowsDoNotMatch") as caught:
        split_outputs({"y": value}, rows)
    assert caught.value.fields == {"tensor": "y", "expected_rows": 3, "actual_rows": actual}
