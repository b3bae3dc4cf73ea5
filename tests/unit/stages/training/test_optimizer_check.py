"""Optimizers that train parts otherwise than the whole network are refused before the first step; others are exact."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from brokers.errors import UsageError
from stages.training import optimizer_and_loss
from stages.training.optimizer_check import check_elementwise
from stages.training.optimizer_state import ChangedLearningRate, GroupLearningRates, take_step
from stages.verification.model_state import is_same_tensor
from tests.support.errors import raises_error
from tests.support.training.in_process_parts import (
    InProcessParts,
    StepBatch,
    UnsplitTrainer,
    assert_bitwise_equal,
    make_training_pipeline,
)
from tests.support.training.residual_networks import skip_network

NETWORK = "tests.support.training.residual_networks:skip_network"  # inputs of shape (B, 12), 5 classes
SEED = 3
LR = 0.125
CPU = torch.device("cpu")
Parameters = Iterable[nn.Parameter]


class Sgd(torch.optim.Optimizer):
    """Plain SGD, whose subclasses change the gradients, the update or the learning rates."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})
        self.steps = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.steps += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(self.update(parameter, self.state[parameter]), alpha=-group["lr"])

    def update(self, parameter: nn.Parameter, state: dict[str, Any]) -> Tensor:
        assert parameter.grad is not None
        return parameter.grad

    @property
    def all_parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]


class GlobalClip(Sgd):
    def step(self, closure: Any = None) -> Any:
        nn.utils.clip_grad_norm_(self.all_parameters, 10.0)
        super().step()


class RareGlobalClip(Sgd):
    """Clips far larger gradients than those of the first step."""

    def step(self, closure: Any = None) -> Any:
        nn.utils.clip_grad_norm_(self.all_parameters, 300.0)
        super().step()


class LayerwiseLr(Sgd):
    def __init__(self, params: Parameters, lr: float) -> None:
        super().__init__([{"params": [each], "lr": lr * 0.5**index} for index, each in enumerate(params)], lr)


class HeadLr(Sgd):
    """The last two parameters learn faster."""

    def __init__(self, params: Parameters, lr: float) -> None:
        *body, weight, bias = params
        super().__init__([{"params": body}, {"params": [weight, bias], "lr": 2 * lr}], lr)


class MeanOfAll(Sgd):
    def update(self, parameter: nn.Parameter, state: dict[str, Any]) -> Tensor:
        assert parameter.grad is not None
        return parameter.grad / len(self.all_parameters)


class Noisy(Sgd):
    def update(self, parameter: nn.Parameter, state: dict[str, Any]) -> Tensor:
        return super().update(parameter, state) + torch.randn_like(parameter)


class PythonNoise(Sgd):
    def update(self, parameter: nn.Parameter, state: dict[str, Any]) -> Tensor:
        return super().update(parameter, state) * random.random()


class NumpyNoise(Sgd):
    def update(self, parameter: nn.Parameter, state: dict[str, Any]) -> Tensor:
        return super().update(parameter, state) * float(np.random.rand())


class OwnGenerator(Sgd):
    """Draws the same numbers in each process, but another parameter gets the first ones."""

    def step(self, closure: Any = None) -> Any:
        self.generator = torch.Generator().manual_seed(0)
        super().step()

    def update(self, parameter: nn.Parameter, state: dict[str, Any]) -> Tensor:
        return super().update(parameter, state) + torch.randn(parameter.shape, generator=self.generator)


class OwnSchedule(Sgd):
    def step(self, closure: Any = None) -> Any:
        super().step()
        for group in self.param_groups:
            group["lr"] *= 0.5


class CountsItself(Sgd):
    """Its bias correction is by a counter that no checkpoint has."""

    def update(self, parameter: nn.Parameter, state: dict[str, Any]) -> Tensor:
        return super().update(parameter, state) / (1 - 0.5**self.steps)


class KeepsText(Sgd):
    def update(self, parameter: nn.Parameter, state: dict[str, Any]) -> Tensor:
        state["kind"] = "weight"
        return super().update(parameter, state)


class NeedsClosure(Sgd):
    def step(self, closure: Callable[[], float]) -> Any:  # type: ignore[override]
        closure()
        super().step()


class AssertsClosure(Sgd):
    def step(self, closure: Any = None) -> Any:
        if closure is None:
            raise ValueError("sharpness-aware minimization needs a closure")


class WithoutRates(torch.optim.Optimizer):
    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"rate": lr})


ACROSS = r"it updates parameter '[\w.]+' of part \d otherwise than in the whole network: "
DEPENDS = ACROSS + ".*must not depend on other parameters"
RANDOM = ACROSS + "it draws random numbers"
REFUSED: dict[str, tuple[str, str]] = {
    "GlobalClip": ("BadTrainingConfig", DEPENDS),
    "RareGlobalClip": ("BadTrainingConfig", DEPENDS),
    "LayerwiseLr": ("BadTrainingConfig", DEPENDS),
    "HeadLr": ("BadTrainingConfig", DEPENDS),
    "MeanOfAll": ("BadTrainingConfig", DEPENDS),
    "Noisy": ("BadTrainingConfig", RANDOM),
    "PythonNoise": ("BadTrainingConfig", RANDOM),
    "NumpyNoise": ("BadTrainingConfig", RANDOM),
    "OwnGenerator": ("BadTrainingConfig", DEPENDS),
    "OwnSchedule": ("ChangedLearningRate", "changes its learning rates in its step: .* `lr_schedule`"),
    "CountsItself": ("BadTrainingConfig", r"after a restart from a checkpoint: .*`state\[parameter\]`"),
    "KeepsText": ("BadTrainingConfig", "its state 'kind' is of type str, which a checkpoint cannot have"),
    "NeedsClosure": ("BadTrainingConfig", "its step needs a closure that computes the loss again"),
    "AssertsClosure": ("BadTrainingConfig", "its step fails with dense gradients: ValueError: sharpness-aware"),
    "WithoutRates": ("BadTrainingConfig", "its parameter groups need a learning rate 'lr'"),
    "torch.optim:LBFGS": ("BadTrainingConfig", "its step needs a closure that computes the loss again"),
    "torch.optim:SparseAdam": ("BadTrainingConfig", "its step fails with dense gradients: .*not support dense"),
}


def make_parts(optimizer: str, cuts: Sequence[int], model: str = NETWORK, **settings: Any) -> InProcessParts:
    address = optimizer if ":" in optimizer else f"{__name__}:{optimizer}"
    return InProcessParts(make_training_pipeline(model, cuts, seed=SEED, optimizer=address, lr=LR, settings=settings))


@pytest.mark.parametrize("name", REFUSED)
def test_optimizer_is_refused_with_the_reason(name: str) -> None:
    code, message = REFUSED[name]
    with raises_error(UsageError, code, match=message) as caught:
        make_parts(name, [4, 9])
    assert caught.value.key == "training.optimizer"
    assert "\n" not in str(caught.value)


# Accepted -------------------------------------------------------------------------------------------------------------


class ClipEach(Sgd):
    def update(self, parameter: nn.Parameter, state: dict[str, Any]) -> Tensor:
        assert parameter.grad is not None
        scaled: Tensor = parameter.grad / parameter.grad.norm().clamp(min=0.01)
        return scaled


class OwnAdam(Sgd):
    """Keeps numbers in its state, which a tensor in a checkpoint must not replace: it would round otherwise."""

    def update(self, parameter: nn.Parameter, state: dict[str, Any]) -> Tensor:
        assert parameter.grad is not None
        if not state:
            state.update(step=0, decay=1.0, mean=torch.zeros_like(parameter), square=torch.zeros_like(parameter))
        state["step"] += 1
        state["decay"] *= 0.9
        state["mean"].lerp_(parameter.grad, 0.1)
        state["square"].mul_(0.99).addcmul_(parameter.grad, parameter.grad, value=0.01)
        corrected = state["square"] / (1 - 0.99 ** state["step"])
        update: Tensor = state["mean"] / (1 - state["decay"]) / (corrected.sqrt() + 1e-8)
        return update


class MarkedGroups(Sgd):
    """Groups by shape and by an attribute."""

    def __init__(self, params: Parameters, lr: float) -> None:
        params = list(params)
        slow = [each for each in params if each.dim() < 2 or getattr(each, "is_slow", False)]
        fast = [each for each in params if not any(each is other for other in slow)]
        super().__init__([{"params": fast}, {"params": slow, "lr": lr / 10}], lr)


def skip_network_with_a_slow_layer() -> nn.Module:
    network = skip_network()
    next(network.parameters()).is_slow = True  # type: ignore[attr-defined]
    return network


def batch_of(number: int) -> StepBatch:
    generator = torch.Generator().manual_seed(number)
    return [
        (torch.randn(rows, 12, generator=generator), torch.randint(0, 5, (rows,), generator=generator))
        for rows in (3, 2)
    ]


@pytest.mark.parametrize("name", ["ClipEach", "OwnAdam", "MarkedGroups"])
def test_own_optimizer_trains_parts_as_the_network_also_from_checkpoints(name: str) -> None:
    parts = make_parts(name, [4, 9], f"{__name__}:skip_network_with_a_slow_layer")
    torch.manual_seed(SEED)
    plain = skip_network_with_a_slow_layer()
    whole = UnsplitTrainer(plain, globals()[name](list(plain.parameters()), lr=LR))
    for number in range(6):
        if number in {2, 4}:
            for trainer in parts.part_trainers:
                trainer.restore(number, trainer.checkpoint_tensors(number))
        assert parts.train_step(number, batch_of(number)) == whole.train_step(number, batch_of(number))
    assert_bitwise_equal(parts.state_dict(), plain.state_dict())


@pytest.mark.parametrize("optimizer", ["torch.optim:Rprop", "torch.optim:NAdam", "torch.optim:ASGD"])
def test_optimizers_of_torch_are_not_run_with_the_whole_network(
    optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizer_and_loss, "check_split", None)
    make_parts(optimizer, [4])


def test_network_without_cuts_may_have_any_optimizer() -> None:
    for name in ("GlobalClip", "LayerwiseLr", "Noisy", "HeadLr"):
        make_parts(name, [])


def test_check_changes_neither_parameters_nor_random_states() -> None:
    torch.manual_seed(SEED)
    initial = skip_network().state_dict()
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    expected = (random.random(), np.random.rand(), torch.rand(1).item())
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    parts = make_parts("OwnAdam", [4])
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected
    assert_bitwise_equal(parts.state_dict(), initial)
    for trainer in parts.part_trainers:
        assert not trainer._optimizer or not trainer._optimizer.state
        assert all(parameter.grad is None for parameter in trainer._module.parameters())


# Sparse gradients -----------------------------------------------------------------------------------------------------


class SparseWords(nn.Module):
    """(B, 6) tokens -> (B, 5). Gradients of the embedding are sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(20, 16, sparse=True)
        self.middle = nn.Linear(16, 16)
        self.out = nn.Linear(16, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        output: Tensor = self.out(torch.relu(self.middle(self.words(tokens))))
        return output


def sparse_words() -> SparseWords:
    return SparseWords()


sparse_words.example_inputs = torch.arange(6)[None]  # type: ignore[attr-defined]


def test_optimizer_that_accepts_no_sparse_gradients_is_refused() -> None:
    model = f"{__name__}:sparse_words"
    message = "its step fails with dense and sparse gradients: .*Adam does not support sparse gradients"
    with raises_error(UsageError, "BadTrainingConfig", match=message):
        make_parts("torch.optim:Adam", [2], model)
    parts = make_parts("torch.optim:SGD", [2], model)
    torch.manual_seed(SEED)
    plain = sparse_words()
    whole = UnsplitTrainer(plain, torch.optim.SGD(plain.parameters(), lr=LR))
    for number in range(3):
        batch = [(torch.randint(0, 20, (4, 6), generator=torch.Generator().manual_seed(number)), torch.arange(4))]
        assert parts.train_step(number, batch) == whole.train_step(number, batch)
    assert_bitwise_equal(parts.state_dict(), plain.state_dict())


def test_one_parameter_of_each_kind_is_tried() -> None:
    sizes: list[torch.Size] = []

    def make(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        sizes.extend(parameter.shape for parameter in parameters)
        return torch.optim.SGD(parameters, lr=LR)

    shapes = [(1000, 1000), (3, 2), (2,), (5,), (7, 2)]
    parameters = {str(index): nn.Parameter(torch.zeros(shape)) for index, shape in enumerate(shapes)}
    check_elementwise(parameters, ["4"], make, LR, CPU)
    assert sorted(sizes) == [(2,), (3, 2), (7, 2)]


# Learning rates -------------------------------------------------------------------------------------------------------


class LateSchedule(Sgd):
    def step(self, closure: Any = None) -> Any:
        super().step()
        if self.steps == 3:
            for group in self.param_groups:
                group["lr"] *= 0.5


def test_schedule_of_an_optimizer_that_begins_later_stops_the_training() -> None:
    parts = make_parts("LateSchedule", [4])
    for number in range(2):
        parts.train_step(number, batch_of(number))
    with pytest.raises(ChangedLearningRate, match="`lr_schedule`"):
        parts.train_step(2, batch_of(2))


def test_rates_of_groups_keep_their_ratio() -> None:
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in (0.3, 0.1, 0.0)]
    optimizer = torch.optim.SGD(groups, lr=0.3)
    rates = GroupLearningRates(optimizer, 0.3)
    rates.set(0.15)
    take_step(optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == [0.15, 0.05, 0.0]
    assert is_same_tensor(groups[0]["params"][0], torch.zeros(1))  # type: ignore[index]
