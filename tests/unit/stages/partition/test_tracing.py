"""Tracing of networks to layers with names, and the cut between children of those that cannot be traced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models

from brokers.errors import UsageError
from stages.partition.partition import layer_names, partition
from tests.support.errors import raises_error
from tests.support.training.partition_checks import FunctionNetwork, check_all_cuts, is_same, run_parts


def test_layers_are_named_after_modules_and_functions() -> None:
    with torch.device("meta"):
        names = layer_names(models.vgg11())
    assert names[:3] == ("features.0", "features.1", "features.2")
    assert names[20:24] == ("features.20", "avgpool", "flatten", "classifier.0")


def test_module_called_twice_has_two_names() -> None:
    with torch.device("meta"):
        names = layer_names(models.resnet18())
    assert {"layer1.0.relu", "layer1.0.relu_1"} <= set(names)
    assert len(set(names)) == len(names)


def test_argument_with_a_default_keeps_it() -> None:
    class WithTargets(nn.Module):
        def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
            y = x * 2 + 1
            return y if targets is None else F.mse_loss(y, targets)

    parts = partition(WithTargets(), [1])
    assert parts[0].input_names == ("input",)
    assert is_same(run_parts(parts, {"input": torch.ones(1, 2)}), {"output": torch.full((1, 2), 3.0)})


class DataDependent(nn.Module):
    """Branches on values, which torch.fx cannot trace, and modifies its input."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(scale))

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x += 1
        return x * self.weight


def test_untraceable_network_names_the_reason_and_the_remedy() -> None:
    with raises_error(UsageError, "CannotTrace", match="DataDependent.*control flow.*nn.Sequential") as caught:
        partition(DataDependent(2.0), [1])
    assert "\n" not in str(caught.value)
    assert caught.value.key == "pipeline.model"


def test_network_without_a_required_argument_is_refused() -> None:
    class Constant(nn.Module):
        def forward(self, x: Tensor | None = None) -> Tensor:
            return torch.ones(1)

    with raises_error(UsageError, "CannotTrace", match="no argument without a default"):
        partition(Constant(), [])


@pytest.mark.parametrize("container", [list, lambda children: nn.Sequential(*children)])
def test_untraceable_children_are_cut_between(container: Callable[..., object]) -> None:
    children: Sequence[nn.Module] = [DataDependent(2.0), nn.Conv2d(3, 4, 1), DataDependent(-3.0)]
    model = container(children)
    assert isinstance(model, nn.Sequential | list)
    assert layer_names(model) == ("0", "1", "2")
    check_all_cuts(model, torch.rand(2, 3, 4, 4))
    assert set(partition(model, [1])[1].module.state_dict()) == {"1.weight", "1.bias", "2.weight"}


def test_untraceable_children_may_pass_tuples() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return (x + 1, x) if x.sum() > 0 else (x, x)

    class Join(nn.Module):
        def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
            return pair[0] * pair[1]

    check_all_cuts([Pair(), Join(), DataDependent(1.5)], torch.rand(2, 3))


@pytest.mark.parametrize("scalar", [3.0, 2])
def test_function_with_overload_for_scalars(scalar: float) -> None:
    model = FunctionNetwork(lambda m, x: 2 * torch.pow(x, scalar) + torch.pow(scalar, x))
    check_all_cuts(model, torch.rand(2, 3))


def test_device_type_as_argument() -> None:
    def in_full_precision(m: FunctionNetwork, x: Tensor) -> Tensor:
        with torch.autocast(device_type=x.device.type, enabled=False):
            return torch.exp(2 * x)

    check_all_cuts(FunctionNetwork(in_full_precision), torch.rand(2, 3))


def test_modules_that_are_no_children() -> None:
    hidden = [nn.Linear(3, 3), nn.BatchNorm1d(3).eval()]

    def through_list(m: FunctionNetwork, x: Tensor) -> Any:
        for module in hidden:
            x = module(x)
        return nn.Softmax(dim=-1)(x)

    check_all_cuts(FunctionNetwork(through_list), torch.rand(2, 3))
