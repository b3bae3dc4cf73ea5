"""Tuples cross a cut item by item; other values, and messages without a tensor, are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from brokers.errors import UsageError, WireError
from stages.partition.partition import partition
from tests.support.errors import raises_error
from tests.support.training.partition_checks import FunctionNetwork, check_all_cuts


def test_tuple_crosses_item_by_item() -> None:
    def halves(m: FunctionNetwork, x: Tensor) -> Tensor:
        left, right = (x + 1).chunk(2, dim=1)
        return torch.cat((right * 2, left), dim=1)

    head, _ = partition(FunctionNetwork(halves), [2])
    assert sorted(head({"input": torch.rand(2, 4)})) == ["chunk[0]", "chunk[1]"]
    check_all_cuts(FunctionNetwork(halves), torch.rand(2, 4))


def test_nested_tuple_crosses_item_by_item() -> None:
    def last_state(m: FunctionNetwork, x: Tensor) -> Any:
        output, (hidden, cell) = m.lstm(x)
        return output.sum() + hidden.sum() * 2 + cell.sum() * 3

    model = FunctionNetwork(last_state, lstm=nn.LSTM(3, 4))
    head, _ = partition(model, [1])
    assert sorted(head({"input": torch.rand(5, 2, 3)})) == ["lstm[0]", "lstm[1][0]", "lstm[1][1]"]
    check_all_cuts(model, torch.rand(5, 2, 3))


def test_trailing_none_of_attention_does_not_cross() -> None:
    def attend(m: FunctionNetwork, x: Tensor) -> Any:
        y, _ = m.attention(x, x, x, need_weights=False)
        return y + x

    check_all_cuts(FunctionNetwork(attend, attention=nn.MultiheadAttention(4, 2)).eval(), torch.rand(3, 2, 4))


class OpaqueLayer(nn.Module):
    """A layer that torch.fx does not trace into."""

    fx_leaf = True

    def __init__(self, function: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> object:
        return self.function(x)


def test_value_that_is_no_tensor_cannot_cross() -> None:
    model = FunctionNetwork(lambda m, x: m.opaque(x)["y"] + 1, opaque=OpaqueLayer(lambda x: {"y": x}))
    head, _ = partition(model, [1])
    with raises_error(UsageError, "NonTensorValue", match="'opaque' is of type dict.* cut elsewhere") as caught:
        head({"input": torch.rand(1)})
    assert caught.value.fields == {"name": "opaque", "kind": "dict"}


def test_missing_tensor_raises_wire_error() -> None:
    head, _ = partition(nn.Sequential(nn.ReLU(), nn.Tanh()), [1])
    with raises_error(WireError, "TensorMissing", match="missing tensor 'input': the message has 'x'") as caught:
        head({"x": torch.rand(1, 3)})
    assert caught.value.fields == {"name": "input", "actual": ("x",)}
    assert not caught.value.retry


@pytest.mark.parametrize("names", [["chunk[1]"], []])
def test_tuple_without_its_first_item_is_missing(names: list[str]) -> None:
    _, tail = partition(FunctionNetwork(lambda m, x: torch.cat(x.chunk(2))), [1])
    with raises_error(WireError, "TensorMissing"):
        tail({name: torch.rand(1) for name in names})
