"""What a worker keeps of an optimizer: the learning rates of its groups, and its state in checkpoints."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from brokers.errors import UsageError

NamedParameters = Iterable[tuple[str, nn.Parameter]]
_TENSORS = "optimizer/"
_NUMBERS = "optimizer-numbers/"  # a tensor in place of a number would round otherwise


class ChangedLearningRate(UsageError):
    """The optimizer changes its learning rates itself, which a stage sets before each step."""

    def __init__(self) -> None:
        message = "the optimizer changes its learning rates in its step: leave that to `lr_schedule` and `lr_warmup`"
        super().__init__(type(self).__name__, message, key="training.optimizer")


class GroupLearningRates:
    """The learning rates of an optimizer's groups. They keep their ratio to `lr`, the rate of the pipeline file."""

    def __init__(self, optimizer: torch.optim.Optimizer, lr: float) -> None:
        self._groups = optimizer.param_groups
        self._lr = lr
        self._initial = _rates(optimizer)

    def set(self, lr: float) -> None:
        """Scale all rates as the rate of the pipeline file is scaled to `lr`."""
        for group, rate in zip(self._groups, self._initial, strict=True):
            group["lr"] = lr if rate == self._lr else rate * (lr / self._lr)


def take_step(optimizer: torch.optim.Optimizer) -> None:
    """Update the parameters, and drop their gradients. Raises `ChangedLearningRate`, and what the optimizer raises."""
    before = _rates(optimizer)
    optimizer.step()
    if _rates(optimizer) != before:
        raise ChangedLearningRate
    optimizer.zero_grad(set_to_none=True)


def _rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: NamedParameters) -> dict[str, Tensor]:
    """Copy the optimizer's state, by parameter and key. Raises `TypeError` for other values than tensors and numbers.

    Not included is what an optimizer keeps elsewhere than in `state[parameter]`.
    """
    tensors = {}
    for name, parameter in parameters:
        for key, value in optimizer.state[parameter].items():
            if isinstance(value, Tensor):
                tensors[f"{_TENSORS}{name}/{key}"] = value.detach().cpu().clone()
            elif isinstance(value, bool | int | float):
                dtype = torch.float64 if isinstance(value, float) else None
                tensors[f"{_NUMBERS}{name}/{key}"] = torch.tensor(value, dtype=dtype)
            elif value is not None:
                raise TypeError(f"its state {key!r} is of type {type(value).__name__}")
    return tensors


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: NamedParameters, tensors: Mapping[str, Tensor]
) -> None:
    """Give a new optimizer the state that `optimizer_tensors` has copied."""
    for name, parameter in parameters:
        state: dict[str, object] = {
            key: item if key == "step" else item.to(parameter.device)
            for key, item in _select(tensors, f"{_TENSORS}{name}/")
        }
        state |= {key: item.item() for key, item in _select(tensors, f"{_NUMBERS}{name}/")}
        if state:
            optimizer.state[parameter] = state


def _select(tensors: Mapping[str, Tensor], prefix: str) -> list[tuple[str, Tensor]]:
    return [(name.removeprefix(prefix), item) for name, item in tensors.items() if name.startswith(prefix)]
