"""Networks without memory for their parameters compute, with their state loaded, the same as a complete build."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import register_parametrization

from stages.loading.model_builder import build_from_seed, build_without_parameters
from stages.models.registry import ModelSpec, get_model_spec
from tests.support.training.networks import randomize_parameters

SEED = 3


class Network(nn.Module):
    """A linear layer, and what `add` adds to the network; `use` is the forward after that layer."""

    def __init__(
        self, add: Callable[[Network], object], use: Callable[[Network, Tensor], Tensor] = lambda net, x: x
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.use = use
        add(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, self.linear(x))

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name)


@dataclass(frozen=True, slots=True)
class Holder:
    tensor: Tensor


def add_nested_buffer(net: Network) -> None:
    net.inner = nn.Sequential(nn.Identity())
    net.inner[0].register_buffer("positions", torch.arange(4.0), persistent=False)


def tie(net: Network) -> None:
    net.embedding, net.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
    net.head.weight = net.embedding.weight


def mark(net: Network) -> None:
    net.linear.weight.requires_grad_(False)
    bias: Any = nn.Parameter(torch.zeros(4), requires_grad=False)
    bias.note = "kept"
    net.linear.bias = bias


def write_directly(net: Network) -> None:
    net._parameters["scale"] = nn.Parameter(torch.ones(4))


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


ON_META: dict[str, Callable[[], nn.Module]] = {
    "tensors in a list": partial(
        Network, lambda net: setattr(net, "a", [torch.arange(4.0)]), lambda net, x: x + net.a[0]
    ),
    "values of a new tensor": partial(
        Network, lambda net: setattr(net, "rates", torch.linspace(0, 0.1, 3).tolist()), lambda net, x: x * net.rates[1]
    ),
    "one value of a new tensor": partial(
        Network, lambda net: setattr(net, "rate", torch.linspace(0, 1, 3)[1].item()), lambda net, x: x * net.rate
    ),
    "a nested buffer": partial(Network, add_nested_buffer, lambda net, x: x + net.inner[0].positions),
    "tied weights": partial(Network, tie, lambda net, x: net.head(x)),
    "a parametrization": partial(Network, lambda net: register_parametrization(net.linear, "weight", Doubled())),
    "a parameter list": partial(
        Network,
        lambda net: setattr(net, "scales", nn.ParameterList([nn.Parameter(torch.ones(4)), torch.ones(4)])),
        lambda net, x: x * net.scales[0],
    ),
    "a parameter dict": partial(
        Network,
        lambda net: setattr(net, "scales", nn.ParameterDict({"a": torch.ones(4)})),
        lambda net, x: x * net.scales["a"],
    ),
    "a parameter written directly": partial(Network, write_directly, lambda net, x: x * net.scale),
    "a random parameter": partial(
        Network, lambda net: setattr(net, "token", nn.Parameter(torch.randn(4))), lambda net, x: x + net.token
    ),
    "a numpy table": partial(
        Network,
        lambda net: setattr(net, "table", torch.from_numpy(np.arange(4.0, dtype="f"))),
        lambda net, x: x + net.table,
    ),
}
COMPLETE: dict[str, Callable[[], nn.Module]] = {
    "a buffer computed from a parameter": partial(
        Network, lambda net: net.register_buffer("norm", net.linear.weight.detach().norm()), lambda net, x: x / net.norm
    ),
    "a tensor computed from a parameter": partial(
        Network, lambda net: setattr(net, "h", Holder(net.linear.bias.detach() * 2)), lambda net, x: x + net.h.tensor
    ),
    "a closure with such a tensor": partial(
        Network, lambda net: setattr(net, "f", partial(torch.add, net.linear.bias.detach())), lambda net, x: net.f(x)
    ),
    "a value of a parameter": partial(
        Network, lambda net: setattr(net, "scale", net.linear.weight.max().item()), lambda net, x: x * net.scale
    ),
    "the device of a parameter": partial(
        Network, lambda net: setattr(net, "place", net.linear.weight.device), lambda net, x: x.to(net.place)
    ),
    "a layer that is no child": partial(
        Network, lambda net: setattr(net, "layers", [nn.Linear(4, 4)]), lambda net, x: net.layers[0](x)
    ),
    "a random projection": partial(
        Network, lambda net: setattr(net, "projection", torch.randn(4, 4)), lambda net, x: x @ net.projection
    ),
    "a random permutation as numbers": partial(
        Network, lambda net: setattr(net, "order", torch.randperm(4).tolist()), lambda net, x: x[:, net.order]
    ),
    "random numbers of Python": partial(
        Network, lambda net: setattr(net, "scale", random.random()), lambda net, x: x * net.scale
    ),
    "random numbers of numpy": partial(
        Network, lambda net: setattr(net, "scale", float(np.random.rand())), lambda net, x: x * net.scale
    ),
    "spectral norm": partial(Network, lambda net: parametrizations.spectral_norm(net.linear)),
    "the older weight norm": partial(Network, lambda net: nn.utils.weight_norm(net.linear)),
}


def share_memory(net: Network) -> None:
    values = torch.zeros(4)
    net.offset = nn.Parameter(values)
    nn.init.ones_(net.offset)
    net.constant = values


COMPLETE["a tensor that shares the memory of a parameter"] = partial(
    Network, share_memory, lambda net, x: x * net.constant
)


def without_parameters(build: Callable[[], nn.Module]) -> Any:
    return build_without_parameters(ModelSpec("net", build), SEED)


def check(build: Callable[[], nn.Module], shape: tuple[int, ...] = (2, 4)) -> nn.Module:
    """Check that the network with the state of a complete build equals that, and return it as it was built."""
    spec = ModelSpec("net", build)
    expected = build_from_seed(spec, SEED).eval()
    model, loaded = (build_without_parameters(spec, SEED).eval() for _ in range(2))
    loaded.load_state_dict(expected.state_dict(), assign=True)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), expected.buffers(), strict=True))
    x = torch.rand(shape)
    with torch.inference_mode():
        assert torch.equal(loaded(x), expected(x))
    return model


@pytest.mark.parametrize("kind", ON_META)
def test_parameters_have_no_memory_and_all_else_is_built(kind: str) -> None:
    assert all(parameter.is_meta for parameter in check(ON_META[kind]).parameters())


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", COMPLETE)
def test_network_is_built_completely_if_other_values_would_differ(kind: str) -> None:
    assert not any(parameter.is_meta for parameter in check(COMPLETE[kind]).parameters())


@pytest.mark.parametrize("name", ["regnet_x_400mf", "swin_t", "vit_b_16"])
def test_networks_of_torchvision_are_built_without_parameters(name: str) -> None:
    spec = get_model_spec(f"torchvision:{name}")
    model = check(spec.build, spec.input_shape or ())
    assert all(parameter.is_meta for parameter in model.parameters())


def test_ties_flags_and_attributes_of_parameters_remain() -> None:
    tied = without_parameters(partial(Network, tie))
    assert tied.head.weight is tied.embedding.weight
    linear = without_parameters(partial(Network, mark)).linear
    assert isinstance(linear, nn.Linear)
    assert linear.weight.is_meta
    assert linear.bias.is_meta
    assert not linear.weight.requires_grad
    assert not linear.bias.requires_grad
    assert linear.bias.note == "kept"  # type: ignore[attr-defined]


def test_lazy_parameters_and_subclasses_are_left_as_they_are() -> None:
    class Special(nn.Parameter):
        pass

    def add(net: Network) -> None:
        net.lazy, net.special = nn.LazyLinear(4), Special(torch.ones(4))

    model = without_parameters(partial(Network, add))
    assert isinstance(model.lazy.weight, nn.UninitializedParameter)
    assert type(model.special) is Special
    assert model.linear.weight.is_meta


def test_factory_may_load_a_file(tmp_path: Path) -> None:
    trained = randomize_parameters(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    save_file(trained.state_dict(), tmp_path / "net.safetensors")

    def build() -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        model.load_state_dict(load_file(tmp_path / "net.safetensors"))
        return model

    model = check(build)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(model.state_dict()["1.running_mean"], trained.state_dict()["1.running_mean"])


def test_factory_may_return_a_list_of_modules(tmp_path: Path) -> None:
    (tmp_path / "listed_layers.py").write_text(
        "from torch import nn\n\ndef layers():\n    return [nn.Linear(4, 8), nn.Linear(8, 2)]\n"
    )
    spec = get_model_spec("listed_layers:layers", folder=str(tmp_path))
    assert all(parameter.is_meta for parameter in check(spec.build).parameters())


def test_exceptions_of_the_factory_are_passed_on() -> None:
    raised = LookupError("no such layer")

    def build() -> nn.Module:
        nn.Linear(4, 4)
        raise raised

    with pytest.raises(LookupError) as caught:
        without_parameters(build)
    assert caught.value is raised
    assert not nn.Linear(4, 4).weight.is_meta


@pytest.mark.parametrize("build", [build_from_seed, build_without_parameters])
def test_random_states_of_the_caller_do_not_change(build: Callable[[ModelSpec, int], nn.Module]) -> None:
    def draw() -> list[float]:
        return [torch.rand(()).item(), random.random(), np.random.rand()]

    def seed_all() -> None:
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)

    def drawing_network() -> nn.Module:
        draw()
        return nn.Linear(4, 4)

    seed_all()
    expected = draw()
    seed_all()
    build(ModelSpec("drawing", drawing_network), -5)
    assert draw() == expected


def test_each_build_from_a_seed_draws_the_same_numbers() -> None:
    def build() -> nn.Module:
        model = nn.Linear(4, 4)
        model.numbers = (random.random(), np.random.rand())  # type: ignore[assignment]
        return model

    first: Any = build_from_seed(ModelSpec("drawing", build), SEED)
    for draw in (lambda: torch.rand(1), random.random, np.random.rand):  # the generators of the caller
        draw()
    second: Any = build_from_seed(ModelSpec("drawing", build), SEED)
    assert torch.equal(first.weight, second.weight)
    assert first.numbers == second.numbers


def test_modules_of_other_threads_keep_their_parameters() -> None:
    others: list[nn.Linear] = []

    def build() -> nn.Module:
        thread = threading.Thread(target=lambda: others.append(nn.Linear(4, 4)), name="other-builder")
        thread.start()
        thread.join()
        return nn.Linear(4, 4)

    assert without_parameters(build).weight.is_meta
    assert not others[0].weight.is_meta
