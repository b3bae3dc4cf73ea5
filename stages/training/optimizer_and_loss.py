"""The optimizer and the loss of a training pipeline: by name, or from a module of the user."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from brokers.config.schema import TrainingTable
from brokers.errors import UsageError, WireError, describe_error
from brokers.process.import_string import CannotLoad, describe_exception, import_string
from stages.training.optimizer_check import Parameters, UnfitOptimizer, check_elementwise, check_split
from stages.verification.network_run import OUT_OF_MEMORY

OPTIMIZERS: Mapping[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}
# (outputs (B, ...), labels (B, ...)) -> a scalar, the mean over the B rows.
LossFunction = Callable[[Any, Tensor], Tensor]


def _mse_loss(outputs: Any, labels: Tensor) -> Tensor:
    """The mean squared error of outputs and labels of one shape; (B, 1) and (B,) count as one.

    torch's own function would broadcast (B, 1) and (B,) to (B, B). Raises `WireError` ("BadLabels").
    """
    shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else ()
    actual = tuple(labels.shape)
    rows = shape[:1]
    if not isinstance(outputs, Tensor) or (shape != actual and {shape, actual} != {rows, (*rows, 1)}):
        found = f"an output of shape {list(shape)}" if isinstance(outputs, Tensor) else f"{len(outputs)} outputs"
        message = (
            f"loss 'mse' needs labels of the shape of the output: the network has {found}, the labels {list(actual)}"
        )
        raise WireError("BadLabels", message, expected=shape, actual=actual)
    if not labels.is_floating_point():
        raise WireError("BadLabels", f"loss 'mse' needs labels of float32, they are {labels.dtype}")
    return nn.functional.mse_loss(outputs, labels.reshape(shape))


LOSSES: Mapping[str, LossFunction] = {
    "cross_entropy": nn.functional.cross_entropy,
    "mse": _mse_loss,
}


def make_optimizer(table: TrainingTable, parameters: Sequence[nn.Parameter], folder: str) -> torch.optim.Optimizer:
    """Build the optimizer of these parameters. Raises `UsageError` with the code "BadTrainingConfig"."""
    try:
        optimizer = _find_optimizer(table, folder)(parameters, lr=table.lr, **table.settings)
    except UsageError:
        raise
    except Exception as error:  # a class of the user may raise anything
        raise _config_error("training.settings", table.optimizer, describe_exception(error, folder)) from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        problem = f"expected a torch.optim.Optimizer, the callable returned a {type(optimizer).__name__}"
        raise _config_error("training.optimizer", table.optimizer, problem)
    if not all("lr" in group for group in optimizer.param_groups):
        raise _config_error("training.optimizer", table.optimizer, "its parameter groups need a learning rate 'lr'")
    return optimizer


def check_optimizer(
    table: TrainingTable,
    folder: str,
    device: torch.device,
    whole: Parameters,
    parts: Sequence[Parameters],
    sparse: Sequence[str],
) -> None:
    """Check that the optimizer trains parts as it trains the whole network, by the parameters' names there.

    An optimizer class of torch updates each parameter by itself: only a few are tried. `sparse`: the names of those
    with sparse gradients. Raises `UsageError` "BadTrainingConfig", "ChangedLearningRate" or "NotEnoughMemory".
    """
    target = _find_optimizer(table, folder)
    if not whole:
        return
    is_of_torch = isinstance(target, type) and target.__module__.partition(".")[0] == "torch"
    make = partial(make_optimizer, table, folder=folder)
    try:
        if is_of_torch:
            check_elementwise(whole, sparse, make, table.lr, device)
        else:
            check_split(whole, parts, sparse, make, table.lr, device)
    except UnfitOptimizer as error:
        raise _config_error("training.optimizer", table.optimizer, str(error)) from error
    except OUT_OF_MEMORY as error:
        message = (
            f"{table.optimizer!r}: {device} has too little memory for steps with the whole network, with which those "
            f"of the parts are compared: {describe_error(error)}"
        )
        raise UsageError("NotEnoughMemory", message, key="training.optimizer") from error


def _find_optimizer(table: TrainingTable, folder: str) -> Any:
    return OPTIMIZERS.get(table.optimizer) or _import("training.optimizer", table.optimizer, OPTIMIZERS, folder)


def find_loss(table: TrainingTable, folder: str) -> LossFunction:
    """Return the loss function that `table` names. Raises `UsageError` with the code "BadTrainingConfig"."""
    loss: LossFunction = LOSSES.get(table.loss) or _import("training.loss", table.loss, LOSSES, folder)
    return loss


def _import(key: str, name: str, known: Mapping[str, Any], folder: str) -> Any:
    if ":" not in name:
        raise _config_error(key, name, f"expected {', '.join(known)} or package.module:NAME")
    try:
        target = import_string(name, folder)
    except CannotLoad as error:
        raise _config_error(key, name, error.problem) from error
    if not callable(target):
        raise _config_error(key, name, f"expected a callable, found {type(target).__name__}")
    return target


def _config_error(key: str, name: str, problem: str) -> UsageError:
    return UsageError("BadTrainingConfig", f"{name!r}: {problem}", key=key, name=name)
