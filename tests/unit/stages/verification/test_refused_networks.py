"""Networks that do what tracing cannot see are refused, with the reason and the layer after which they differ."""

from __future__ import annotations

import contextlib
import enum
import random
from collections import deque
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from brokers.errors import UsageError
from stages.loading.part_loader import load_part
from stages.models.registry import ModelSpec
from tests.support.errors import raises_error
from tests.support.verification.small_networks import Case, check_at


def count(m: Any, x: Tensor) -> Any:
    m.calls += 1
    y = m.a(x)
    return m.b(y * 2 if m.calls > 1 else y)


def count_to_ten(m: Any, x: Tensor) -> Any:
    m.calls += 1
    y = m.a(x)
    return m.b(y * 2 if m.calls > 10 else y)


def append(m: Any, x: Tensor) -> Any:
    m.seen.append(len(m.seen))
    return m.b(m.a(x)) * (2 if len(m.seen) > 10 else 1)


def remember(m: Any, x: Tensor) -> Any:
    y = m.a(x) + m.memory
    m.memory = y
    return m.b(y)


def remember_if_any(m: Any, x: Tensor) -> Any:
    y = m.a(x) if m.memory is None else m.a(x) + m.memory
    m.memory = y
    return m.b(y)


def remember_in_list(m: Any, x: Tensor) -> Any:
    y = m.a(x) + m.memory[0]
    m.memory[0] = y
    return m.b(y)


def replace_buffer(m: Any, x: Tensor) -> Any:
    y = m.a(x) - m.mean
    m.mean = m.mean * 0.9 + y.mean(0) * 0.1
    return m.b(y)


def write_item_of_buffer(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    m.count[0] = y.sum()
    return m.b(y) + m.count


def type_of_value(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    return m.b(y * 2 if type(y) is Tensor else y)


def modify_view(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    left = y[:, :2]
    left.mul_(2)
    return m.b(y)


def modify_viewed(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    z = y.view(-1)
    y.relu_()
    return m.b(z.view(2, 4))


def modify_chunk(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    left, right = y.chunk(2, 1)
    left.mul_(3)
    return m.b(y) + right.sum()


def catch_wrong_shape(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    try:
        return m.b(y.view(3, 3))
    except RuntimeError:
        return m.b(y) + 1


def modify_parameter(m: Any, x: Tensor) -> Any:
    m.a.weight.data.mul_(1.5)
    return m.b(m.a(x))


def seed_generator(m: Any, x: Tensor) -> Any:
    torch.manual_seed(3)
    return m.b(m.a(x) * torch.rand(1))


def seed_for_a_while(m: Any, x: Tensor) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        noise = torch.rand(1)
    return m.b(m.a(x) * noise)


def seed_default_generator(m: Any, x: Tensor) -> Any:
    torch.default_generator.manual_seed(3)
    return m.b(m.a(x) * torch.rand(1))


class Counter:
    """Counts; an object that is no module."""

    def __init__(self) -> None:
        self.count = 0

    def next(self) -> int:
        self.count += 1
        return self.count


global_count = 0


class GlobalCounter(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        global global_count  # noqa: PLW0603 - which is to be found
        global_count += 1
        return double_third(x, global_count)


class ClassCounter(nn.Module):
    count: ClassVar[int] = 0

    def forward(self, x: Tensor) -> Tensor:
        ClassCounter.count += 1
        return double_third(x, ClassCounter.count)


def double_third(x: Tensor, count: int) -> Tensor:
    """Return `x`, from the third request on doubled, of which two are checked."""
    return x * 2 if count > 2 else x


def count_in_object(m: Any, x: Tensor) -> Any:
    return m.b(double_third(m.a(x), m.counter.next()))


def count_in_dict(m: Any, x: Tensor) -> Any:
    m.table["requests"]["count"] += 1
    return m.b(double_third(m.a(x), m.table["requests"]["count"]))


def count_in_deque(m: Any, x: Tensor) -> Any:
    m.seen.append(len(m.seen))
    return m.b(double_third(m.a(x), len(m.seen)))


def average(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    m.mean.mul_(0.9).add_(y.mean(0))
    return m.b(y) - m.mean


KEPT = "its second request differs: its forward keeps state from one call to the next"
SEEDS = "sets the seed of torch's random numbers, .* child module"
AFTER_A = "other values, after layer 'a'"
COUNTS = "keeps numbers or lists from one call to the next"
OTHER_RANDOM = "draws random numbers of Python or numpy"
DIFFERENT = {
    "type": (Case(type_of_value), AFTER_A),
    "counter": (Case(count, attributes=lambda: {"calls": 0}), COUNTS),
    "counter that matters later": (Case(count_to_ten, attributes=lambda: {"calls": 0}), COUNTS),
    "growing list": (Case(append, attributes=lambda: {"seen": []}), COUNTS),
    "counter in an object": (Case(count_in_object, attributes=lambda: {"counter": Counter()}), COUNTS),
    "counter in a dict": (Case(count_in_dict, attributes=lambda: {"table": {"requests": {"count": 0}}}), COUNTS),
    "growing deque": (Case(count_in_deque, attributes=lambda: {"seen": deque()}), COUNTS),
    "global counter": (Case(lambda m, x: m.b(m.c(m.a(x))), attributes=lambda: {"c": GlobalCounter()}), COUNTS),
    "counter of a class": (Case(lambda m, x: m.b(m.c(m.a(x))), attributes=lambda: {"c": ClassCounter()}), COUNTS),
    "tensor of the last request": (
        Case(remember, attributes=lambda: {"memory": torch.zeros(2, 4)}),
        KEPT + " in 'memory'",
    ),
    "first state after the first request": (
        Case(remember_if_any, attributes=lambda: {"memory": None}),
        KEPT + " in 'memory'",
    ),
    "tensor in a list": (Case(remember_in_list, attributes=lambda: {"memory": [torch.zeros(2, 4)]}), KEPT + ", which"),
    "replaced buffer": (
        Case(replace_buffer, attributes=lambda: {"mean": nn.Buffer(torch.zeros(4))}),
        KEPT + " in 'mean', .* modify a buffer in place",
    ),
    "random": (Case(lambda m, x: m.b(m.a(x) * random.random())), OTHER_RANDOM),
    "numpy.random": (Case(lambda m, x: m.b(m.a(x) * np.random.rand())), OTHER_RANDOM),
    "buffer that a later part reads": (
        Case(write_item_of_buffer, attributes=lambda: {"count": nn.Buffer(torch.zeros(4))}),
        "modifies buffer 'count', which several parts use",
    ),
    "moving average in a buffer": (
        Case(average, attributes=lambda: {"mean": nn.Buffer(torch.ones(4))}),
        "modifies buffer 'mean', which several parts use",
    ),
    "seed": (Case(seed_generator), SEEDS),
    "seed that is restored": (Case(seed_for_a_while), SEEDS),
    "generator that is seeded": (Case(seed_default_generator), SEEDS),
    "inference mode": (
        Case(lambda m, x: m.b(m.a(x) * (1 if torch.is_inference_mode_enabled() else 2))),
        AFTER_A,
    ),
    "view that is modified": (Case(modify_view), AFTER_A),
    "viewed tensor that is modified": (Case(modify_viewed), AFTER_A),
    "chunk that is modified": (Case(modify_chunk), AFTER_A),
    "caught RuntimeError": (Case(catch_wrong_shape), "they fail: RuntimeError: shape .* is invalid"),
    "buffer of two parts": (
        Case(write_item_of_buffer, attributes=lambda: {"count": nn.Buffer(torch.zeros(4))}),
        "modifies buffer 'count', which several parts use",
    ),
    "parameter that is modified": (Case(modify_parameter), "modifies its parameters, such as 'a.weight'"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_difference_is_found(name: str) -> None:
    case, problem = DIFFERENT[name]
    spec = ModelSpec(name, case.build, input_shape=case.shape)
    cuts = check_at(case.build(), case.example())[1]
    with raises_error(UsageError, "PartsDiffer", match=problem) as caught:
        load_part(spec, list(cuts), 0, None, 0, "cpu")
    assert caught.value.key == "pipeline.model"
    assert "\n" not in str(caught.value)


def catch_branch(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    try:
        if y.max() > 100:
            y = y / 2
    except Exception:  # noqa: BLE001 - as careless code does
        y = y + 0
    return m.b(y)


def suppress_branch(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    with contextlib.suppress(Exception):
        if (y > 100).any():
            y = y.clamp(max=100)
    return m.b(y)


def catch_number(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    try:
        largest = float(y.max())
    except Exception:  # noqa: BLE001 - as careless code does
        largest = 1.0
    return m.b(y / largest)


UNTRACEABLE = {
    "branch on data": (lambda m, x: m.b(m.a(x)) if x.sum() > 0 else m.a(x), "control flow depends on the value"),
    "branch on a random number": (lambda m, x: m.b(m.a(x)) if torch.rand(()) < 0.5 else m.a(x), "control flow"),
    "caught branch on data": (catch_branch, "control flow depends on the value of 'gt'"),
    "suppressed branch on data": (suppress_branch, "control flow depends on the value of 'any_1'"),
    "caught number of data": (catch_number, "control flow depends on the value of 'max_1'"),
    "array": (lambda m, x: m.b(torch.from_numpy(m.a(x).numpy() * 2)), "expected np.ndarray"),
    "generator": (lambda m, x: m.b(m.a(x) * torch.rand(4, generator=torch.Generator())), "torch.Generator"),
}


@pytest.mark.parametrize("name", UNTRACEABLE)
def test_root_that_cannot_be_traced_is_refused(name: str) -> None:
    forward, reason = UNTRACEABLE[name]
    spec = ModelSpec(name, Case(forward).build, input_shape=(2, 4))
    with raises_error(UsageError, "CannotTrace", match=f"cannot trace SmallNetwork: .*{reason}"):
        load_part(spec, [1], 0, None, 0, "cpu")


def test_network_that_fails_for_its_example_is_refused() -> None:
    spec = ModelSpec("net", lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU()), input_shape=(1, 3))
    with raises_error(UsageError, "PartsDiffer", match="it fails for the example: .*shapes cannot be"):
        load_part(spec, [1], 0, None, 0, "cpu")


class Kind(enum.Enum):
    FIRST = 1


RESULTS: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "text": (lambda m, x: {"y": m.b(m.a(x)), "label": "cat"}, "returns 'label' of type str"),
    "enum": (lambda m, x: {"y": m.b(m.a(x)), "kind": Kind.FIRST}, "returns 'kind' of type Kind"),
    "equal keys": (lambda m, x: {1: m.a(x), "1": m.b(x)}, "two values that are both named '1'"),
    "equal paths": (lambda m, x: {"a.b": m.a(x), "a": {"b": m.b(x)}}, "two values that are both named 'a.b'"),
}


@pytest.mark.parametrize("name", RESULTS)
def test_result_that_cannot_be_sent_is_refused(name: str) -> None:
    forward, problem = RESULTS[name]
    spec = ModelSpec(name, Case(forward).build, input_shape=(2, 4))
    with raises_error(UsageError, "NonTensorValue", match=problem) as caught:
        load_part(spec, [1], 0, None, 0, "cpu")
    assert caught.value.key == "pipeline.model"


def test_lazy_layer_without_weights_is_refused() -> None:
    spec = ModelSpec("lazy", lambda: nn.Sequential(nn.LazyLinear(4), nn.ReLU()), input_shape=(2, 4))
    with raises_error(UsageError, "BadModel", match="lazy modules: call it once on an example in its factory"):
        load_part(spec, [1], 0, None, 0, "cpu")
