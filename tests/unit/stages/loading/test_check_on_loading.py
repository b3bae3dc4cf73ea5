"""Loading a part checks the network beside other threads and libraries, and each mistake is one clear error."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from brokers.errors import UsageError
from stages.loading.part_loader import load_part, load_trainable_part
from stages.models.registry import ModelSpec
from stages.partition.partition import Part
from tests.support.errors import raises_error

ROW = torch.linspace(-1, 1, 4)[None]


class Linears(nn.Module):
    """Two linear layers with a method between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def between(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.b(self.between(self.a(x)))
        return result


class TwoConvolutions(nn.Module):
    """Its view fails with channels last, if the batch has several rows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        result: Tensor = self.b(y.view(y.shape[0] * 4, 64).view(-1, 4, 8, 8))
        return result


class CountingClassifier(nn.Module):
    """Counts its calls in a buffer; its view fails with channels last."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(256, 4)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.a(x)
        result: Tensor = self.b(y.view(y.shape[0], 256)) + self.calls
        return result


def spec_of(build: Callable[[], nn.Module], **fields: Any) -> ModelSpec:
    return ModelSpec(build.__name__, build, **({"input_shape": (1, 4)} | fields))


def load(spec: ModelSpec, cut: int = 1, weights: Path | None = None, **options: Any) -> list[Part]:
    return [load_part(spec, [cut], index, weights, 0, "cpu", **options) for index in range(2)]


def run(parts: list[Part], x: Tensor) -> Tensor:
    (tensors,) = [{name: x} for name in parts[0].input_names]
    with torch.inference_mode():
        for part in parts:
            tensors = part(tensors)
    return tensors["output"]


# Other threads, memory, and other libraries ---------------------------------------------------------------------------


def test_two_threads_load_at_once() -> None:
    spec = spec_of(Linears)
    with ThreadPoolExecutor(2) as pool:
        loads = [pool.submit(load, spec) for _ in range(8)]
        results = [run(each.result(timeout=120), ROW) for each in loads]
    assert all(torch.equal(result, results[0]) for result in results)


def test_another_thread_computes_while_a_network_is_traced() -> None:
    network = Linears().eval()
    with torch.inference_mode():
        expected = network(ROW)
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(lambda: [load(spec_of(Linears)) for _ in range(4)])
        while not loading.done():
            with torch.inference_mode():
                assert torch.equal(network(ROW), expected)
        loading.result()


def test_too_little_memory_is_an_error_that_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    fails = True

    class Large(Linears):
        def between(self, x: Tensor) -> Tensor:
            if fails and type(x) is Tensor:
                raise torch.OutOfMemoryError("out of memory: tried to allocate 2 GiB")
            return x

    with raises_error(UsageError, "NotEnoughMemory", match="cpu has too little memory for the whole network"):
        load(spec_of(Large))
    fails = False
    assert run(load(spec_of(Large)), ROW).shape == (1, 4)


def test_module_that_is_blocked_from_import_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    assert run(load(spec_of(Linears)), ROW).shape == (1, 4)


# Channels last --------------------------------------------------------------------------------------------------------


def test_batches_are_checked_in_the_memory_format_that_is_served() -> None:
    torch.manual_seed(0)
    parts = load(spec_of(TwoConvolutions, input_shape=(1, 3, 8, 8)), max_batch=3)
    x = torch.randn(3, 3, 8, 8)
    tensors: dict[str, Tensor] = {parts[0].input_names[0]: x}
    with torch.inference_mode():
        for part in parts:
            if part.batchable:
                tensors = part(tensors)
            else:
                rows = [part({name: tensor[row : row + 1] for name, tensor in tensors.items()}) for row in range(3)]
                tensors = {name: torch.cat([each[name] for each in rows]) for name in rows[0]}
    assert tensors["output"].shape == (3, 4, 8, 8)


def test_failed_trial_of_channels_last_leaves_no_state_behind() -> None:
    parts = load(spec_of(CountingClassifier, input_shape=(1, 3, 8, 8)), cut=5)
    network = CountingClassifier().eval()
    network.load_state_dict({**parts[0].module.state_dict(), **parts[1].module.state_dict()})
    x = torch.randn(1, 3, 8, 8)
    for _ in range(2):
        with torch.inference_mode():
            assert torch.equal(run(parts, x), network(x))


# Declarations and weights of the user ---------------------------------------------------------------------------------


def raise_error() -> Tensor:
    raise ValueError("no data")


@pytest.mark.parametrize(
    ("example", "problem"),
    [
        ({"x": ROW, "maks": ROW}, "has 'x', 'maks', the forward takes x"),
        (raise_error, "`example_inputs`: ValueError: no data"),
        ([ROW], "is a list, expected a tensor or a dict of tensors"),
    ],
)
def test_wrong_example_is_reported(example: Any, problem: str) -> None:
    with raises_error(UsageError, "BadModel", match=problem):
        load(spec_of(Linears, input_shape=None, example_inputs=example))


def test_guess_survives_errors_of_the_network() -> None:
    class Sizes(Linears):
        def between(self, x: Tensor) -> Tensor:
            return x * {3: 2.0}[x.dim()]  # a KeyError for the first guess

    rows = torch.randn(1, 224, 4)
    assert run(load(spec_of(Sizes, input_shape=None)), rows).shape == rows.shape


def test_integers_are_no_weights_of_a_float_network(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save_file({name: tensor.to(torch.int8) for name, tensor in Linears().state_dict().items()}, path)
    with raises_error(UsageError, "WeightsDoNotFit", match=r"expected 'a.weight' as torch.float32.*torch.int8"):
        load(spec_of(Linears), weights=path)


def test_module_may_have_extra_state(tmp_path: Path) -> None:
    class Extra(Linears):
        def get_extra_state(self) -> dict[str, int]:
            return {"version": 2}

        def set_extra_state(self, state: object) -> None:
            raise AssertionError

    path = tmp_path / "net.safetensors"
    torch.manual_seed(1)
    weights = Linears().state_dict()
    save_file(weights, path)
    part = load_trainable_part(spec_of(Extra), [1], 0, path, 0, "cpu").training
    assert torch.equal(part.module.state_dict()["a.weight"], weights["a.weight"])


# Batches and training -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_batch", [2, 3, 8, 12])
def test_all_places_of_a_batch_are_checked(max_batch: int) -> None:
    class LastPlace(Linears):
        def between(self, x: Tensor) -> Tensor:
            return x + (torch.arange(x.shape[0])[:, None] >= max_batch - 1)

    head, tail = load(spec_of(LastPlace), max_batch=max_batch)
    assert head.batchable
    assert not tail.batchable
    head, tail = load(spec_of(Linears), max_batch=max_batch)
    assert head.batchable
    assert tail.batchable


def test_child_that_computes_a_gradient_can_be_trained() -> None:
    class Energy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                y = x.detach().requires_grad_()
                return torch.autograd.grad((y**3).sum(), y)[0]

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), Energy(), nn.Linear(4, 4))

    assert load_trainable_part(spec_of(build), [2], 1, None, 0, "cpu").is_exact


def test_parameter_that_the_forward_creates_is_refused() -> None:
    class Lazy(Linears):
        def between(self, x: Tensor) -> Tensor:
            if not hasattr(self, "scale"):
                self.scale = nn.Parameter(torch.ones(4))
            return x * self.scale

    with raises_error(UsageError, "PartsDiffer", match="its forward creates 'scale': create that in its constructor"):
        load_trainable_part(spec_of(Lazy), [1], 0, None, 0, "cpu")
