"""A part with its weights: from a file only its own tensors, from a seed those of the whole network."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.ops import FrozenBatchNorm2d

from brokers.errors import UsageError
from stages.loading.part_loader import load_part, load_trainable_part
from stages.models.darknet import Darknet, save_darknet_weights
from stages.models.registry import ModelSpec, get_model_spec
from stages.partition.partition import Part
from stages.verification.inference_check import channels_last_weights
from tests.support.errors import raises_error
from tests.support.training.networks import randomize_parameters
from tests.support.training.partition_checks import FunctionNetwork

RESNET = ModelSpec("resnet", partial(ResNet, BasicBlock, [1, 1, 1, 1], num_classes=10), input_shape=(1, 3, 32, 32))
RESNET_CUTS = [12, 20]


def small_network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


SMALL = ModelSpec("small", small_network)


def load_all(spec: ModelSpec, cuts: list[int], weights: Path | None, seed: int = 0) -> list[Part]:
    return [load_part(spec, cuts, index, weights, seed, "cpu") for index in range(len(cuts) + 1)]


def run(parts: list[Part], x: Tensor) -> dict[str, Tensor]:
    tensors = {"input": x}
    with torch.inference_mode():
        for part in parts:
            tensors = part(tensors)
    return tensors


def run_whole(model: nn.Module, x: Tensor) -> Any:
    """Return what a network computes with the memory layout that workers choose for its weights."""
    with channels_last_weights(model), torch.inference_mode():
        return model(x)


@pytest.fixture(name="resnet_file")
def _resnet_file(tmp_path: Path) -> tuple[nn.Module, Path]:
    model = randomize_parameters(RESNET.build()).eval()
    path = tmp_path / "resnet.safetensors"
    save_file(model.state_dict(), path)
    return model, path


# Weights ------------------------------------------------------------------------------------------------------------


def test_parts_from_a_file_are_together_the_network(resnet_file: tuple[nn.Module, Path]) -> None:
    model, path = resnet_file
    x = torch.rand(1, 3, 32, 32)
    parts = load_all(RESNET, RESNET_CUTS, path)
    expected = run_whole(model, x)
    assert torch.equal(run(parts, x)["output"], expected)
    norms = [module for part in parts for module in part.module.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert not any(norm.training for norm in norms)


def test_part_has_only_its_own_tensors(resnet_file: tuple[nn.Module, Path]) -> None:
    model, path = resnet_file
    states = [part.module.state_dict() for part in load_all(RESNET, RESNET_CUTS, path)]
    assert sorted(name for state in states for name in state) == sorted(model.state_dict())
    assert all(
        tensor.untyped_storage().nbytes() == tensor.nbytes for state in states for tensor in state.values()
    )  # copies, not views of the file


def test_parts_from_a_seed_are_together_the_network_of_that_seed() -> None:
    torch.manual_seed(7)
    model = RESNET.build().eval()
    x = torch.rand(1, 3, 32, 32)
    expected = run_whole(model, x)
    assert torch.equal(run(load_all(RESNET, RESNET_CUTS, None, seed=7), x)["output"], expected)
    assert not torch.equal(run(load_all(RESNET, RESNET_CUTS, None, seed=8), x)["output"], expected)


def test_seed_does_not_change_the_random_state_of_the_caller() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    load_part(SMALL, [1], 0, None, 5, "cpu")
    assert torch.equal(torch.rand(3), expected)


class ValueReader(nn.Module):
    """Reads a value while it is built, which the meta device does not allow, as torchvision's Swin does."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = torch.linspace(0, 1, 3)[1].item()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.rate + 1  # type: ignore[no-any-return]


@pytest.mark.parametrize("build", [ValueReader, get_model_spec("torchvision:regnet_x_400mf").build])
def test_network_that_reads_values_while_it_is_built_is_loaded(build: Any, tmp_path: Path) -> None:
    model = randomize_parameters(build()).eval()
    save_file(model.state_dict(), tmp_path / "net.safetensors")
    x = torch.rand(1, 4) if build is ValueReader else torch.rand(1, 3, 64, 64)
    spec = ModelSpec("net", build, input_shape=tuple(x.shape))
    actual = run(load_all(spec, [1], tmp_path / "net.safetensors"), x)["output"]
    assert torch.equal(actual, run_whole(model, x))


def test_tensors_that_no_file_has_are_built(tmp_path: Path) -> None:
    class Positions(nn.Module):
        unsaved: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))
            self.register_buffer("unsaved", torch.arange(4.0), persistent=False)
            self.plain = torch.arange(4.0) * 10

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight + self.unsaved + self.plain

    save_file({"weight": torch.full((4,), 2.0)}, tmp_path / "net.safetensors")
    parts = load_all(ModelSpec("positions", Positions, input_shape=(1, 4)), [1], tmp_path / "net.safetensors")
    assert run(parts, torch.ones(1, 4))["output"].tolist() == [[2.0, 13.0, 24.0, 35.0]]


def test_weights_are_converted_to_the_dtype_of_the_network(tmp_path: Path) -> None:
    state = small_network().state_dict()
    halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    save_file(halves, tmp_path / "half.safetensors")
    weight = load_part(SMALL, [1], 0, tmp_path / "half.safetensors", 0, "cpu").module.state_dict()["0.weight"]
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight, state["0.weight"], rtol=1e-3, atol=1e-3)


def test_file_may_lack_the_counters_of_batch_norms(tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in small_network().state_dict().items() if "num_batches" not in name}
    save_file(state, tmp_path / "net.safetensors")
    part = load_part(SMALL, [1], 1, tmp_path / "net.safetensors", 0, "cpu")
    assert part.module.state_dict()["1.num_batches_tracked"].item() == 0


def test_parts_from_a_darknet_file_are_together_the_network(tmp_path: Path) -> None:
    spec = get_model_spec("yolov3-tiny")
    model = randomize_parameters(spec.build()).eval()
    assert isinstance(model, Darknet)
    path = tmp_path / "tiny.weights"
    save_darknet_weights(model, path)
    x = torch.rand(1, 3, 64, 64)
    actual = run(load_all(spec, [8, 13], path), x)
    expected = run_whole(model, x)
    assert all(torch.equal(actual[str(index)], tensor) for index, tensor in enumerate(expected))
    path.write_bytes(path.read_bytes()[:1_000_000])
    with raises_error(UsageError, "DarknetTruncated"):
        load_part(spec, [8, 13], 0, path, 0, "cpu")


def test_state_is_the_same_from_a_file_and_from_the_network(tmp_path: Path) -> None:
    spec = ModelSpec("small", partial(randomize_parameters, small_network()), input_shape=(1, 4))
    save_file(spec.build().state_dict(), tmp_path / "net.safetensors")
    from_file = load_part(spec, [2], 0, tmp_path / "net.safetensors", 0, "cpu").module.state_dict()
    built = load_part(spec, [2], 0, None, 3, "cpu").module.state_dict()
    assert from_file.keys() == built.keys()
    assert all(torch.equal(tensor, built[name]) for name, tensor in from_file.items())


# Errors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        ({"3.weight": torch.zeros(5, 8)}, {"tensor": "3.weight", "expected": (3, 8), "actual": (5, 8)}),
        ({"3.bias": None}, {"tensor": "3.bias", "expected": (3,), "actual": None}),
        ({"4.bias": torch.zeros(1)}, {"tensor": "4.bias", "expected": None, "actual": (1,)}),
    ],
)
@pytest.mark.parametrize("index", [0, 1])
def test_every_part_refuses_weights_of_another_network(
    index: int, change: dict[str, Tensor | None], fields: dict[str, object], tmp_path: Path
) -> None:
    state = {**small_network().state_dict(), **change}
    path = tmp_path / "other.safetensors"
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, path)
    with raises_error(UsageError, "WeightsDoNotFit") as caught:
        load_part(SMALL, [1], index, path, 0, "cpu")
    assert caught.value.fields == {"path": str(path), **fields}
    assert caught.value.key == "pipeline.weights"


# Training -----------------------------------------------------------------------------------------------------------


def test_trainable_part_shares_its_modules_with_the_evaluation_part() -> None:
    part = load_trainable_part(SMALL, [1], 1, None, 0, "cpu")
    state = part.evaluation.module.state_dict(keep_vars=True)
    assert state
    assert all(tensor is state[name] for name, tensor in part.training.module.state_dict(keep_vars=True).items())
    for mode in (part.training, part.evaluation):
        mode.set_mode()
        assert {module.training for module in mode.module.children()} == {mode is part.training}


def test_trainable_part_with_shared_parameters_is_refused() -> None:
    spec = ModelSpec(
        "shared", lambda: FunctionNetwork(lambda m, x: m.a(m.relu(m.a(x))), a=nn.Linear(4, 4), relu=nn.ReLU())
    )
    with raises_error(UsageError, "SharedWeights") as caught:
        load_trainable_part(spec, [2], 0, None, 0, "cpu")
    assert caught.value.fields == {"parameter": "a.weight", "first": 0, "second": 1}


def test_cut_that_evaluation_cannot_have_is_refused() -> None:
    def double_in_training(m: FunctionNetwork, x: Tensor) -> Tensor:
        return m.a(x * 2 if m.training else x)  # type: ignore[no-any-return]

    spec = ModelSpec("mode", lambda: FunctionNetwork(double_in_training, a=nn.Linear(4, 4)))
    with raises_error(UsageError, "CannotEvaluate") as caught:
        load_trainable_part(spec, [1], 1, None, 0, "cpu")
    assert caught.value.fields == {"cut": 1, "layer": "mul"}


class Normalised(nn.Module):
    """Computes with expressions of saved and unsaved buffers, and with a frozen batch norm."""

    std: Tensor
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("std", torch.ones(3))
        self.register_buffer("mean", torch.tensor([0.1, 0.2, 0.3]), persistent=False)
        self.conv, self.norm = nn.Conv2d(3, 4, 3), FrozenBatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.norm(self.conv((x - self.mean.view(3, 1, 1)) / self.std.view(3, 1, 1)))
        return result


def test_expressions_of_buffers_have_the_values_of_the_file(tmp_path: Path) -> None:
    network = Normalised().eval()
    state = {name: torch.rand_like(tensor) + 0.5 for name, tensor in network.state_dict().items()}
    network.load_state_dict(state)
    save_file(state, tmp_path / "net.safetensors")
    spec = ModelSpec("normalised", Normalised, input_shape=(1, 3, 8, 8))
    x = torch.rand(1, 3, 8, 8)
    for cut in range(1, 5):
        parts = load_all(spec, [cut], tmp_path / "net.safetensors")
        assert torch.equal(run(parts, x)["output"], run_whole(network, x))
