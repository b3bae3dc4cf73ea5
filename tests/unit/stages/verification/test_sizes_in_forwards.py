"""Forwards that use a size as a Python object: a request of another size fails if the graph would be another one."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from brokers.errors import BadPayload
from stages.partition.partition import partition
from tests.support.training.partition_checks import run_parts
from tests.support.verification.small_networks import Case, assert_equal_at_all_cuts, check_at

SHAPE = (2, 3, 4)
OTHER_SHAPE = (2, 5, 4)


@functools.lru_cache
def positions(length: int) -> Tensor:
    return torch.arange(length)[:, None] * 0.1


def match_length(m: Any, x: Tensor) -> Any:
    match x.shape[1]:
        case 5:
            return m.b(m.a(x) * 2)
        case _:
            return m.b(m.a(x))


def match_shape(m: Any, x: Tensor) -> Any:
    match x.shape:
        case (_, 5, _):
            return m.b(m.a(x) * 2)
        case _:
            return m.b(m.a(x))


FORWARDS = {
    "item of a set": lambda m, x: m.b(m.a(x) * (2 if x.shape[1] in {5, 9} else 1)),
    "key of a dict": lambda m, x: m.b(m.a(x) * {5: 2.0}.get(x.shape[1], 1.0)),
    "f-string": lambda m, x: m.b(m.a(x) * (2 if f"{x.shape[1]}" == "5" else 1)),
    "text of a shape": lambda m, x: m.b(m.a(x) * (2 if "5" in str(tuple(x.shape)) else 1)),
    "name of an attribute": lambda m, x: m.b(m.a(x) * getattr(m, f"scale_{x.shape[1]}", 1.0)),
    "match of a size": match_length,
    "match of a shape": match_shape,
    "function with a cache": lambda m, x: m.b(m.a(x) + positions(int(x.shape[1]))),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_request_of_another_size_fails(name: str) -> None:
    case = Case(FORWARDS[name], SHAPE, lambda: {"scale_5": 2.0})
    model = case.build()
    assert_equal_at_all_cuts(model, case.example())
    traced, cuts, _ = check_at(model, case.example())
    with pytest.raises(BadPayload, match="the shape of this input takes another path"):
        run_parts(partition(traced, cuts), {"input": torch.zeros(OTHER_SHAPE)})


def test_cached_function_keeps_no_value_of_a_trace() -> None:
    case = Case(FORWARDS["function with a cache"], SHAPE)
    for _ in range(2):
        assert_equal_at_all_cuts(case.build(), case.example())
        assert type(positions(3)) is Tensor
