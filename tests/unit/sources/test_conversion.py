"""Results of a network at the caller: the dicts and lists that it returned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from sources import nest_results
from stages.partition.named_values import pack_result

ONE, TWO, THREE = (torch.full((2,), float(value)) for value in (1, 2, 3))


@dataclass
class Detections:
    boxes: Tensor
    levels: list[Tensor]


class State(NamedTuple):
    hidden: Tensor
    cell: Tensor


@pytest.mark.parametrize(
    ("returned", "restored"),
    [
        (ONE, 1.0),
        ((ONE, TWO), [1.0, 2.0]),
        ({"a": ONE, "b": {"c": TWO, "d": [THREE, ONE]}}, {"a": 1.0, "b": {"c": 2.0, "d": [3.0, 1.0]}}),
        (Detections(ONE, [TWO, THREE]), {"boxes": 1.0, "levels": [2.0, 3.0]}),
        ((ONE, State(TWO, THREE)), [1.0, [2.0, 3.0]]),
        ({"mean": ONE, "count": 7, "absent": None}, {"mean": 1.0, "count": 7.0}),
        ([[ONE], [{"x": TWO}]], [[1.0], [{"x": 2.0}]]),
        ([torch.tensor([float(index)]) for index in range(12)], [float(index) for index in range(12)]),
        ({"boxes": (ONE, torch.tensor([7]))}, {"boxes": [1.0, 7.0]}),
    ],
)
def test_nested_results_are_restored(returned: object, restored: object) -> None:
    assert first_values(nest_results(as_received(returned))) == restored


def test_keys_with_dots_remain_names() -> None:
    assert first_values(nest_results(as_received({"a": ONE, "a.b": TWO}))) == {"a": 1.0, "a.b": 2.0}


def as_received(returned: object) -> dict[str, Any]:
    """Return the results of a network in the order in which a message has them: by dtype and name."""
    message = load(save({name: tensor.clone() for name, tensor in pack_result(returned).items()}))
    return {name: message[name].numpy() for name in sorted(message)}


def first_values(value: Any) -> object:
    """Replace the arrays of a nested value by their first elements."""
    if isinstance(value, dict):
        return {key: first_values(item) for key, item in value.items()}
    if isinstance(value, list):
        return [first_values(item) for item in value]
    return float(np.ravel(value)[0])
