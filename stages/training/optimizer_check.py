"""The check of an optimizer: two steps with the whole network, and with each part alone, from the same gradients.

Parameters are copies, and each optimizer has its own random state, as in separate workers.
"""

import inspect
import random
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from brokers.errors import UsageError, describe_error
from stages.training.optimizer_state import GroupLearningRates, optimizer_tensors, restore_optimizer, take_step
from stages.verification.model_state import GlobalRandomState, is_same_tensor, seeded
from stages.verification.network_run import OUT_OF_MEMORY

Parameters = Mapping[str, nn.Parameter]  # by the name in the whole network
OptimizerFactory = Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]

# As a schedule would scale the rates before the second step; a power of two does not round.
_LR_FACTORS = (1.0, 0.5)
# Of the gradients: those of the second step exceed any usual limit of a norm.
_GRADIENT_SCALES = (1.0, 1000.0)
_SEED, _OTHER_SEED = 0, 1


class UnfitOptimizer(Exception):
    """The optimizer cannot train the parts; the message says why."""


def check_elementwise(
    parameters: Parameters, sparse: Sequence[str], make: OptimizerFactory, lr: float, device: torch.device
) -> None:
    """Check that an optimizer of torch accepts the network's gradients, by the smallest parameter of each kind.

    It updates each parameter by itself. `sparse`: names of parameters with sparse gradients.
    Raises `UnfitOptimizer`, and the errors of `make`.
    """
    kinds: dict[tuple[object, ...], str] = {}
    for name, parameter in sorted(parameters.items(), key=lambda item: item[1].numel()):
        kinds.setdefault((parameter.dtype, parameter.dim(), name in sparse), name)
    _Steps({name: parameters[name] for name in kinds.values()}, sparse, make, lr, device).take(_SEED)


def check_split(
    whole: Parameters,
    parts: Sequence[Parameters],
    sparse: Sequence[str],
    make: OptimizerFactory,
    lr: float,
    device: torch.device,
) -> None:
    """Check that parts, each with its own optimizer, are updated as the whole network is by one, bit for bit.

    Also that a stage can continue from a checkpoint between two steps.
    Raises `UnfitOptimizer`, and the errors of `make`.
    """
    network = _Steps(whole, sparse, make, lr, device)
    expected = network.take(_SEED)
    for index, parameters in enumerate(parts):
        if not parameters:
            continue
        part = _Steps(parameters, sparse, make, lr, device)
        seed = index + 1 if len(parts) > 1 else _SEED
        if difference := _difference(part.take(seed, as_stage=True), expected):
            raise UnfitOptimizer(
                f"it updates {difference} of part {index} otherwise than in the whole network: "
                f"{_reason(network, expected)}"
            )
        if difference := _difference(part.take(seed, as_stage=True, restored=True), expected):
            raise UnfitOptimizer(
                f"it updates {difference} otherwise after a restart from a checkpoint: keep all that changes from step "
                "to step in its `state[parameter]`, as tensors and numbers"
            )


@dataclass(frozen=True, slots=True)
class _Updated:
    """Parameters and the optimizer's state of each, after the steps, by name."""

    parameters: Mapping[str, Tensor]
    state: Mapping[str, Tensor]


class _Steps:
    """Steps of an optimizer with copies of some parameters."""

    def __init__(
        self, parameters: Parameters, sparse: Sequence[str], make: OptimizerFactory, lr: float, device: torch.device
    ) -> None:
        self._parameters = parameters
        self._sparse = frozenset(sparse)
        self._make = make
        self._lr = lr
        self._device = device

    def take(self, seed: int, *, as_stage: bool = False, restored: bool = False) -> _Updated:
        """Take two steps from a random state of this seed, as a stage or as a loop of plain torch does.

        `restored`: the second one by a new optimizer, with the state of the first one.
        """
        copies = {name: _copy(parameter, self._device) for name, parameter in self._parameters.items()}
        with torch.enable_grad(), seeded(self._device, seed), _seeded_python(seed):
            optimizer = self._make(list(copies.values()))
            rates = GroupLearningRates(optimizer, self._lr)
            for number, factor in enumerate(_LR_FACTORS):
                if number and restored:
                    tensors = _checkpoint(optimizer, copies)
                    optimizer = self._make(list(copies.values()))
                    rates = GroupLearningRates(optimizer, self._lr)
                    restore_optimizer(optimizer, copies.items(), tensors)
                if as_stage:
                    rates.set(self._lr * factor)
                else:
                    for group in optimizer.param_groups:
                        group["lr"] = group["lr"] * factor  # new, as it may be a tensor that groups share
                self._take_one(optimizer, copies, number)
            return _Updated({name: copy.detach() for name, copy in copies.items()}, _checkpoint(optimizer, copies))

    def _take_one(self, optimizer: torch.optim.Optimizer, copies: Parameters, number: int) -> None:
        for name, copy in copies.items():
            copy.grad = _gradient(name, copy, number, is_sparse=name in self._sparse)
        try:
            take_step(optimizer)
        except (UsageError, *OUT_OF_MEMORY):
            raise
        except Exception as error:
            if _needs_closure(optimizer):
                raise UnfitOptimizer(
                    "its step needs a closure that computes the loss again, which no stage can: each has one part of "
                    "the network; choose an optimizer that needs the gradients only"
                ) from error
            kinds = "dense and sparse" if self._sparse & copies.keys() else "dense"
            raise UnfitOptimizer(f"its step fails with {kinds} gradients: {describe_error(error)}") from error


def _copy(parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
    copy = nn.Parameter(parameter.detach().to(device, copy=True))
    vars(copy).update(vars(parameter))  # marks by which an optimizer may group them
    return copy


def _gradient(name: str, parameter: nn.Parameter, number: int, *, is_sparse: bool) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {number}".encode()))
    shape = (1, *parameter.shape[1:]) if is_sparse else parameter.shape
    values = torch.randn(shape, generator=generator) * _GRADIENT_SCALES[number]
    values = values.to(parameter.device, parameter.dtype)
    if not is_sparse:
        return values
    row = torch.zeros(1, 1, dtype=torch.int64, device=values.device)
    return torch.sparse_coo_tensor(row, values, parameter.shape, check_invariants=True)


def _needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def _checkpoint(optimizer: torch.optim.Optimizer, parameters: Parameters) -> dict[str, Tensor]:
    try:
        return optimizer_tensors(optimizer, parameters.items())
    except TypeError as error:
        raise UnfitOptimizer(f"{error}, which a checkpoint cannot have: keep tensors and numbers") from error


@contextmanager
def _seeded_python(seed: int) -> Iterator[None]:
    outside = GlobalRandomState()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        outside.restore()


def _difference(actual: _Updated, expected: _Updated) -> str:
    """Return how a part's update differs from the network's; empty if it does not."""
    for name, tensor in actual.parameters.items():
        if not is_same_tensor(tensor, expected.parameters[name]):
            return f"parameter {name!r}"
    for key, tensor in actual.state.items():
        if key not in expected.state or not is_same_tensor(tensor, expected.state[key]):
            return f"the state {key!r}"
    return ""


def _reason(network: _Steps, expected: _Updated) -> str:
    if _difference(network.take(_OTHER_SEED), expected):
        return "it draws random numbers, and each stage has others: draw none"
    return (
        "a stage has only the parameters and gradients of its part, so the update of a parameter must not depend "
        "on other parameters, on their number or their order: choose learning rates by the parameter itself, such as "
        "its shape, and limit each gradient by itself"
    )
