"""Tuples cross a cut item by item; other values, and messages without a tensor, are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brokers.errors import UsageError, WireError
from stages.partition.boundary import find_layout, restore_layout
from stages.partition.named_values import unpack_value
from stages.partition.partition import partition
from stages.partition.tracing import trace
from tests.support.errors import raises_error
from tests.support.training.partition_checks import Function, FunctionNetwork, check_all_cuts


def test_tuple_crosses_item_by_item() -> None:
    def halves(m: FunctionNetwork, x: Tensor) -> Tensor:
        left, right = (x + 1).chunk(2, dim=1)
        return torch.cat((right * 2, left), dim=1)

    x = torch.rand(2, 4)
    head, _ = partition(trace(FunctionNetwork(halves), {"x": x}), [2])
    assert sorted(head({"input": x})) == ["chunk[0]", "chunk[1]"]
    check_all_cuts(FunctionNetwork(halves), x)


def test_nested_tuple_crosses_item_by_item() -> None:
    def last_state(m: FunctionNetwork, x: Tensor) -> Any:
        output, (hidden, cell) = m.lstm(x)
        return output.sum() + hidden.sum() * 2 + cell.sum() * 3

    model = FunctionNetwork(last_state, lstm=nn.LSTM(3, 4))
    x = torch.rand(5, 2, 3)
    head, _ = partition(trace(model, {"x": x}), [1])
    assert sorted(head({"input": x})) == ["lstm[0]", "lstm[1][0]", "lstm[1][1]"]
    check_all_cuts(model, x)


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
    _, tail = partition(trace(FunctionNetwork(lambda m, x: torch.cat(x.chunk(2))), {"x": torch.rand(2)}), [1])
    with raises_error(WireError, "TensorMissing"):
        tail({name: torch.rand(1) for name in names})


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


@pytest.mark.parametrize(
    ("tensor", "order"),
    [
        (torch.rand(2, 3, 4), None),
        (torch.rand(2, 3, 4).transpose(1, 2), (0, 2, 1)),
        (torch.rand(2, 3, 4, 5)[:, :, :2].transpose(2, 3), (0, 1, 3, 2)),  # with gaps, as the keys of an attention
        (torch.rand(2, 1).expand(2, 3), None),
        (torch.rand(2, 1, 4).expand(2, 3, 4).transpose(0, 2), (2, 0, 1)),
    ],
)
def test_layout_is_restored(tensor: Tensor, order: tuple[int, ...] | None) -> None:
    layout = find_layout(tensor)
    restored = restore_layout(tensor.contiguous(), layout)
    assert layout.order == order
    assert torch.equal(restored, tensor)
    assert [bool(stride) for stride in restored.stride()] == [bool(stride) for stride in tensor.stride()]
    dense = restored[tuple(slice(None) if stride else slice(1) for stride in restored.stride())]
    assert dense.permute(order or tuple(range(tensor.dim()))).is_contiguous()
