"""Parts copy the inputs that an in-place layer may modify, and no others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages.partition.boundary import unpack_value
from stages.partition.partition import partition
from tests.support.training.partition_checks import Function, FunctionNetwork, check_all_cuts


def _iadd(m: FunctionNetwork, x: Tensor) -> Tensor:
    y: Tensor = m.conv(x)
    y += x
    return y * x


def _read_again(m: FunctionNetwork, x: Tensor) -> Tensor:
    y = m.conv(x)
    return m.relu(y) + y  # type: ignore[no-any-return]


IN_PLACE: dict[str, Function] = {
    "module": lambda m, x: m.relu(m.conv(x)) + x,
    "module on the input": lambda m, x: m.conv(m.relu(x)) * 2,
    "operator": _iadd,
    "function with inplace=True": lambda m, x: F.relu(m.conv(x), inplace=True) + x,
    "function with an underscore": lambda m, x: torch.relu_(m.conv(x)) + x,
    "method on a view": lambda m, x: m.conv(x).flatten(1).sub_(1.0).sum(1) + 1,
    "module after an identity": lambda m, x: m.relu(m.dropout(m.conv(x))) + x,
    "item of a tuple": lambda m, x: m.conv(x).chunk(2, dim=1)[1].mul_(3.0) + 1,
    "value that is read again": _read_again,
}


@pytest.mark.parametrize("kind", IN_PLACE)
def test_in_place_layer_does_not_modify_the_inputs_of_a_part(kind: str) -> None:
    conv = nn.Conv2d(4, 4, 1)
    model = FunctionNetwork(IN_PLACE[kind], conv=conv, relu=nn.ReLU(inplace=True), dropout=nn.Dropout()).eval()
    check_all_cuts(model, torch.randn(2, 4, 3, 3))


def test_only_mutated_inputs_are_copied() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True))
    copied = [
        [node.args[2] for node in part.graph.nodes if node.target is unpack_value] for part in partition(model, [1, 2])
    ]
    assert copied == [[False], [True], [False]]
