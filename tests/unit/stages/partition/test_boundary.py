"""Tuples cross a cut item by item; other values, and messages without a tensor, are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models
from torchvision.models.resnet import BasicBlock, ResNet

from brokers.errors import UsageError, WireError
from stages.models.yolov3 import yolov3_tiny
from stages.partition.boundary import unpack_value
from stages.partition.fx_graph import trace
from stages.partition.partition import partition
from tests.support.errors import raises_error
from tests.support.training.networks import randomize_parameters
from tests.support.training.partition_checks import Function, FunctionNetwork, check_all_cuts, run_parts, spread_cuts


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


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: ResNet(BasicBlock, [1, 1, 1, 1]),
    "yolov3-tiny": yolov3_tiny,
    "shufflenet": lambda: models.shufflenet_v2_x0_5(weights=None),
    "vit": lambda: models.VisionTransformer(32, 16, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64),
    "swin": lambda: models.SwinTransformer([4, 4], 24, [2, 2], [2, 2], [7, 7]),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_batched_requests_give_the_results_of_single_requests(name: str) -> None:
    traced = trace(randomize_parameters(NETWORKS[name]()).eval())
    generator = torch.Generator().manual_seed(1)
    requests = [{"input": torch.rand(rows, 3, 32, 32, generator=generator)} for rows in (1, 1, 2)]
    parts = partition(traced, spread_cuts(traced, 5), example=requests[0])
    assert sum(part.batchable for part in parts) >= len(parts) - 2
    with torch.inference_mode():
        expected = [run_parts(parts, request) for request in requests]
        batched = requests
        for part in parts:
            if part.batchable:
                rows = [next(iter(tensors.values())).shape[0] for tensors in batched]
                joined = part({key: torch.cat([tensors[key] for tensors in batched]) for key in batched[0]})
                split = {key: tensor.split(rows) for key, tensor in joined.items()}
                batched = [{key: items[index] for key, items in split.items()} for index in range(len(rows))]
            else:
                batched = [part(tensors) for tensors in batched]
    for actual, tensors in zip(batched, expected, strict=True):
        for key, tensor in tensors.items():  # another batch size uses other kernels: the last bits may differ
            torch.testing.assert_close(actual[key], tensor, rtol=1e-3, atol=1e-3)


def test_no_part_is_batchable_without_an_example() -> None:
    assert not any(part.batchable for part in partition(nn.Sequential(nn.ReLU(), nn.Tanh()), [1]))


def test_network_that_cannot_run_on_the_example_is_not_batchable() -> None:
    parts = partition(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), [1], {"input": torch.empty(1, 3)})
    assert not any(part.batchable for part in parts)


def test_value_whose_first_dimension_is_not_the_batch_is_detected() -> None:
    def transposed(m: FunctionNetwork, x: Tensor) -> Tensor:
        return ((x + 1).transpose(0, 1) * 2).transpose(0, 1) - 1

    traced = trace(FunctionNetwork(transposed))
    example = {"input": torch.empty(1, 2, 4, device="meta")}
    by_cut = {cut: [part.batchable for part in partition(traced, [cut], example)] for cut in range(1, 5)}
    assert by_cut == {1: [True, True], 2: [False, False], 3: [False, False], 4: [True, True]}


def test_output_without_a_batch_dimension_is_detected() -> None:
    model = FunctionNetwork(lambda m, x: (x + 1).mean())
    head, tail = partition(model, [1], {"input": torch.empty(1, 4, device="meta")})
    assert (head.batchable, tail.batchable) == (True, False)
