"""The optimizer and the loss of a training pipeline: by name, or from a module of the user."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from brokers.config.schema import TrainingTable
from brokers.errors import UsageError, WireError
from brokers.process.import_string import CannotLoad, describe_exception, import_string

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


def make_optimizer(
    table: TrainingTable, parameters: Iterable[nn.Parameter], folder: str
) -> torch.optim.Optimizer | None:
    """Build the optimizer of the parameters that require gradients; None without any.

    Raises `UsageError` with the code "BadTrainingConfig".
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    factory: Any = OPTIMIZERS.get(table.optimizer) or _import("training.optimizer", table.optimizer, OPTIMIZERS, folder)
    try:
        # Built for a part without parameters too, so that every stage reports a wrong setting.
        optimizer = factory(trainable or [nn.Parameter(torch.zeros(1))], lr=table.lr, **table.settings)
    except Exception as error:  # a class of the user may raise anything
        raise _config_error("training.settings", table.optimizer, describe_exception(error, folder)) from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        problem = f"expected a torch.optim.Optimizer, the callable returned a {type(optimizer).__name__}"
        raise _config_error("training.optimizer", table.optimizer, problem)
    return optimizer if trainable else None


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
