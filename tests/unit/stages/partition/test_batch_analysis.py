"""A part is batchable if the first dimension of its inputs and outputs is known to be the batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.resnet import BasicBlock, ResNet

from stages.models.yolov3 import yolov3_tiny
from stages.partition.fx_graph import trace
from stages.partition.partition import partition
from tests.support.training.networks import randomize_parameters
from tests.support.training.partition_checks import FunctionNetwork, run_parts, spread_cuts

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
