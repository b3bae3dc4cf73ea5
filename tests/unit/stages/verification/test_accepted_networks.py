"""Networks with unusual forwards whose parts compute, bit by bit, what the network computes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d

from stages.loading.part_loader import load_part
from stages.models.registry import ModelSpec
from stages.partition.partition import fingerprint
from tests.support.training.partition_checks import run_parts
from tests.support.verification.small_networks import Case, assert_equal_at_all_cuts, check_at


def buffer(tensor: Tensor, *, persistent: bool = True) -> Tensor:
    return nn.Buffer(tensor, persistent=persistent)


def count_in_buffer(m: Any, x: Tensor) -> Any:
    m.count += 1
    return m.b(m.a(x) * m.count)


def autocast_one_layer(m: Any, x: Tensor) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = m.a(x)
    return m.b(y.float())


def autocast_all(m: Any, x: Tensor) -> Any:
    return m.b(m.a(x).relu())


def no_gradients(m: Any, x: Tensor) -> Any:
    with torch.no_grad():
        y = m.a(x)
    return m.b(y)


def catch_missing_attribute(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    try:
        return m.b(y.no_such_attribute)
    except AttributeError:
        return m.b(y) + 1


def add_up(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    total = torch.zeros(4)
    total += y.sum(0)
    return m.b(y + total)


def write_to_output(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    z = torch.empty_like(y)
    torch.mul(y, 2, out=z)
    return m.b(z)


def divide_input(m: Any, x: Tensor) -> Any:
    x /= 2
    return m.b(m.a(x))


def set_column(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    y[:, 0] = 0
    return m.b(y) + 1


def keep_shape(m: Any, x: Tensor) -> Any:
    m.columns = x.shape[1]
    return m.b(m.a(x)) * m.columns


def use_anchors(m: Any, x: Tensor) -> Any:
    return m.b(m.a(x) * m.anchors[0] + m.anchors[1])


def expanded(m: Any, x: Tensor) -> Any:
    y = m.a(x)[:, None].expand(-1, 3, -1).transpose(1, 2).relu() @ m.w
    return m.b(y.transpose(1, 2))[:, :4]


def scripted() -> dict[str, Any]:
    return {"c": torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))}


def jit_traced() -> dict[str, Any]:
    layers = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()
    return {"c": torch.jit.trace(layers, torch.zeros(2, 4))}  # type: ignore[no-untyped-call]


def quantized() -> dict[str, Any]:
    layers = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    return {"c": torch.ao.quantization.quantize_dynamic(layers)}  # type: ignore[no-untyped-call]


class LayerDrop(nn.Module):
    """Skips its layer for about half of the requests, which cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y if torch.rand(()) < 0.5 else x


class Counting(nn.Module):
    """Counts its calls, and has a branch on data."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls if x.sum() < 1e9 else x


IMAGE = (2, 1, 6, 6)


def convolutions(*channels: int) -> Callable[[], dict[str, Any]]:
    return lambda: {"a": nn.Conv2d(channels[0], channels[1], 3), "b": nn.Conv2d(channels[1], channels[2], 3)}


def cnn() -> dict[str, Any]:
    return {"a": nn.Conv2d(1, 4, 3), "b": nn.Linear(64, 3)}


def bfloat16_layers() -> dict[str, Any]:
    return {"a": nn.Linear(4, 4).bfloat16(), "b": nn.Linear(4, 4).bfloat16()}


CASES = {
    "isinstance": Case(lambda m, x: m.b(m.a(x) * 2 if isinstance(x, Tensor) else m.a(x))),
    "hasattr": Case(lambda m, x: m.b(m.a(x) * (1 if hasattr(x, "grad_fn") else 2))),
    "hasattr of a missing attribute": Case(lambda m, x: m.b(m.a(x) * (1 if hasattr(x, "no_such") else 2))),
    "is_tensor": Case(lambda m, x: m.b(m.a(x) * (1 if torch.is_tensor(x) else 2))),
    "dtype": Case(lambda m, x: m.b(m.a(x) * (1 if x.dtype == torch.float32 else 2))),
    "training": Case(lambda m, x: m.b(m.a(x) * (1 if m.training else 2))),
    "is_grad_enabled": Case(lambda m, x: m.b(m.a(x) * (1 if torch.is_grad_enabled() else 2))),
    "requires_grad": Case(lambda m, x: m.b(m.a(x) * (1 if x.requires_grad else 2))),
    "counter in a buffer": Case(count_in_buffer, attributes=lambda: {"count": buffer(torch.zeros(1))}),
    "shape in an attribute": Case(keep_shape),
    "counter in a module that cannot be traced": Case(
        lambda m, x: m.b(m.counting(m.a(x))), attributes=lambda: {"counting": Counting()}
    ),
    "autocast of one layer": Case(autocast_one_layer),
    "autocast of all layers": Case(torch.autocast("cpu", dtype=torch.bfloat16)(autocast_all)),
    "no_grad": Case(no_gradients),
    "caught AttributeError": Case(catch_missing_attribute),
    "rand": Case(lambda m, x: m.b(m.a(x) * torch.rand(1))),
    "randn_like": Case(lambda m, x: m.b(m.a(x) + torch.randn_like(x))),
    "randperm": Case(lambda m, x: m.b(m.a(x)[:, torch.randperm(x.shape[1])])),
    "bernoulli_": Case(lambda m, x: m.b(m.a(x) * torch.empty(2, 4).bernoulli_(0.5))),
    "functional dropout": Case(lambda m, x: m.b(F.dropout(m.a(x), 0.5, training=True))),
    "layer drop in a child": Case(lambda m, x: m.b(m.drop(m.a(x))), attributes=lambda: {"drop": LayerDrop()}),
    "item": Case(lambda m, x: m.b(m.a(x) * x.sum().item())),
    "buffer that is reshaped": Case(
        lambda m, x: m.b(m.a(x / m.std.view(1, -1))), attributes=lambda: {"std": buffer(torch.rand(4) + 1)}
    ),
    "unsaved buffer that is reshaped": Case(
        lambda m, x: m.b(m.a(x / m.std.view(1, -1))),
        attributes=lambda: {"std": buffer(torch.rand(4) + 1, persistent=False)},
    ),
    "frozen batch norm": Case(
        lambda m, x: m.b(m.norm(m.a(x))),
        (1, 3, 8, 8),
        lambda: {**convolutions(3, 4, 2)(), "norm": FrozenBatchNorm2d(4)},
    ),
    "sum in a new tensor": Case(add_up),
    "out=": Case(write_to_output),
    "input that is modified": Case(divide_input),
    "assigned column": Case(set_column),
    "tensors in a list": Case(use_anchors, attributes=lambda: {"anchors": [torch.rand(4), torch.rand(4)]}),
    "zeros of a size": Case(lambda m, x: m.b(m.a(x) + torch.zeros(x.shape[0], 4))),
    "zeros of a shape": Case(lambda m, x: m.b(m.a(x) + torch.zeros(x.shape, dtype=x.dtype, device=x.device))),
    "arange": Case(lambda m, x: m.b(m.a(x) + torch.arange(x.shape[1]))),
    "finfo": Case(lambda m, x: m.b(m.a(x).masked_fill(x > 0, torch.finfo(x.dtype).min).clamp(-2))),
    "numpy.sqrt": Case(lambda m, x: m.b(m.a(x) * np.sqrt(x.shape[-1]))),
    "numpy.linspace": Case(lambda m, x: m.b(m.a(x) * torch.from_numpy(np.linspace(0, 1, x.shape[-1])).float())),
    "number of numpy at the left": Case(lambda m, x: m.b(np.float32(2) * m.a(x))),
    "numpy.sqrt at the left": Case(lambda m, x: m.b(np.sqrt(8) * m.a(x))),
    "divmod": Case(lambda m, x: m.b(m.a(x) * divmod(x.shape[1], 3)[1] + divmod(x.shape[1], 3)[0])),
    "math.sqrt": Case(lambda m, x: m.b(m.a(x) / math.sqrt(x.shape[-1]))),
    "transposed": Case(lambda m, x: m.b((m.a(x).t().relu() * 2).t())),
    "channels_last": Case(
        lambda m, x: m.b(m.a(x).to(memory_format=torch.channels_last).relu()), (2, 3, 6, 6), convolutions(3, 4, 4)
    ),
    "permuted images": Case(
        lambda m, x: m.b(m.a(x).permute(0, 2, 3, 1).relu().permute(0, 3, 1, 2)), (1, 3, 8, 8), convolutions(3, 16, 4)
    ),
    "expanded": Case(expanded, attributes=lambda: {"w": torch.randn(3, 5)}),
    "every second column": Case(lambda m, x: m.b(m.a(x).repeat(1, 2)[:, ::2].relu())),
    "complex": Case(lambda m, x: m.b(torch.fft.ifft(torch.fft.fft(m.a(x)) * 1j).real)),
    "values of a maximum": Case(lambda m, x: m.b(m.a(x)[:, :, None].expand(-1, -1, 4).max(1).values)),
    "view with a fixed size": Case(lambda m, x: m.b(F.relu(m.a(x)).view(-1, 64)), IMAGE, cnn),
    "view with the batch size": Case(lambda m, x: m.b(F.relu(m.a(x)).view(x.size(0), -1)), IMAGE, cnn),
    "Conv3d": Case(
        lambda m, x: m.b(m.a(x).relu()),
        (1, 1, 4, 6, 6),
        lambda: {"a": nn.Conv3d(1, 2, 3), "b": nn.Conv3d(2, 2, 1)},
    ),
    "LSTM": Case(lambda m, x: m.b(m.a(x)[0]), (3, 2, 4), lambda: {"a": nn.LSTM(4, 4)}),
    "child of torch.jit.script": Case(lambda m, x: m.b(m.c(m.a(x))), attributes=scripted),
    "child of torch.jit.trace": Case(lambda m, x: m.b(m.c(m.a(x))), attributes=jit_traced),
    "quantized child": Case(lambda m, x: m.b(m.c(m.a(x))), attributes=quantized),
    "sparse buffer": Case(
        lambda m, x: m.b(torch.sparse.mm(m.adjacency, m.a(x))),
        attributes=lambda: {"adjacency": buffer(torch.eye(2).roll(1, 0).to_sparse())},
    ),
    "keywords as keys": Case(
        lambda m, x: m.b(m.table["if"](m.table["class"](m.a(x)))),
        attributes=lambda: {"table": nn.ModuleDict({"class": nn.Linear(4, 4), "if": nn.ReLU()})},
    ),
    "bfloat16": Case(lambda m, x: m.b(m.a(x.bfloat16()).relu()).float(), attributes=bfloat16_layers),
}


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore:.*quantiz.* deprecated")
@pytest.mark.parametrize("name", CASES)
def test_parts_equal_the_network(name: str) -> None:
    case = CASES[name]
    assert_equal_at_all_cuts(case.build(), case.example())


UNUSUAL_STATE = ["child of torch.jit.script", "child of torch.jit.trace", "quantized child", "sparse buffer"]


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore:.*quantiz.* deprecated")
@pytest.mark.parametrize("name", UNUSUAL_STATE)
def test_parts_with_unusual_state_are_loaded(name: str) -> None:
    spec = ModelSpec(name, CASES[name].build, input_shape=CASES[name].shape)
    parts = [load_part(spec, [1], index, None, 0, "cpu") for index in range(2)]
    example = CASES[name].example()["x"]
    assert torch.equal(run_parts(parts, {"input": example})["output"], CASES[name].build()(example))
    assert fingerprint(parts[0]) != fingerprint(parts[1])


# Hooks --------------------------------------------------------------------------------------------------------------


def double_result(module: nn.Module, arguments: Any, result: Any) -> Any:
    return result * 2


def add_to_input(module: nn.Module, arguments: Any) -> Any:
    return (arguments[0] + 1,)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("path", ["", "0", "0.linear", "1"])
@pytest.mark.parametrize("is_pre_hook", [False, True])
def test_hooks_are_called(path: str, is_pre_hook: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), nn.Linear(4, 4)).eval()
    x = torch.randn(2, 4)
    plain = model(x)
    module = model.get_submodule(path)
    if is_pre_hook:
        module.register_forward_pre_hook(add_to_input)
    else:
        module.register_forward_hook(double_result)
    assert not torch.equal(model(x), plain)
    assert_equal_at_all_cuts(model, {"input": x})


# Names --------------------------------------------------------------------------------------------------------------

NAMES = [
    "graph",
    "takes",
    "gives",
    "batchable",
    "module",
    "layouts",
    "forward_",
    "tensors",
    "output",
    "unpack_value",
    "self",
]


@pytest.mark.parametrize("name", NAMES)
def test_child_may_have_any_name(name: str) -> None:
    case = Case(lambda m, x: m.b(getattr(m, name)(m.a(x))), attributes=lambda: {name: nn.Linear(4, 4)})
    assert_equal_at_all_cuts(case.build(), case.example())
    assert check_at(case.build(), case.example(), [])[2].problem == ""  # all layers in one part


# Inputs and results -------------------------------------------------------------------------------------------------


class Several(nn.Module):
    """Tokens with an optional mask, a size and a keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)
        self.linear = nn.Linear(4, 4)

    def forward(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        scale: float = 2.0,
        bias: Tensor | None = None,
        *,
        shift: Tensor | None = None,
    ) -> Tensor:
        y: Tensor = self.table(ids) * scale
        if mask is not None:
            y = y.masked_fill(mask[..., None], 0.0)
        y = self.linear(y if shift is None else y + shift)
        return y if bias is None else y * bias


@pytest.mark.parametrize("names", [(), ("mask",), ("bias",), ("shift",), ("mask", "bias", "shift")])
def test_inputs_may_be_optional_or_keywords(names: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    inputs = {"mask": torch.tensor([[True, False, False]]), "bias": torch.rand(1, 3, 4), "shift": torch.rand(1, 3, 4)}
    example = {"ids": torch.tensor([[1, 7, 3]]), **{name: inputs[name] for name in names}}
    assert_equal_at_all_cuts(Several().eval(), example)


class NamedLikeFunctions(nn.Module):
    """Its arguments have names of functions of Python."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, input: Tensor, mask: Tensor, type: Tensor) -> Any:  # noqa: A002 - as in other people's networks
        return self.b(torch.relu(self.a(input)) * mask) + type


def test_inputs_may_have_names_of_functions() -> None:
    torch.manual_seed(0)
    assert_equal_at_all_cuts(
        NamedLikeFunctions().eval(), {name: torch.rand(2, 4) for name in ("input", "mask", "type")}
    )


@dataclasses.dataclass
class Output:
    logits: Tensor
    scale: float
    hidden: object = None


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


RESULTS = {
    "dict": lambda m, x: {"y": m.b(m.a(x)), "count": 3, "list": [x + 1, {"z": x}], "none": None},
    "dataclass": lambda m, x: Output(m.b(m.a(x)), 0.5, (x, [x * 2])),
    "named tuple": lambda m, x: Pair(m.a(x), m.b(x)),
    "list": lambda m, x: [m.a(x), None, m.b(x)],
    "named tuple of torch": lambda m, x: m.b(m.a(x)).topk(2, dim=1),
    "tuple of a layer": lambda m, x: m.lstm(m.a(x)),
    "number": lambda m, x: (m.b(m.a(x)), x.shape[1]),
}


@pytest.mark.parametrize("name", RESULTS)
def test_results_may_be_collections(name: str) -> None:
    case = Case(RESULTS[name], attributes=lambda: {"lstm": nn.LSTM(4, 4)})
    assert_equal_at_all_cuts(case.build(), case.example())
