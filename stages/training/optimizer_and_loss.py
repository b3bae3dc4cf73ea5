"""What a part is trained by: the optimizer and the loss, by name or from a user's own module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from brokers.config.schema import TrainingTable
from brokers.process.import_string import CannotLoad, describe_exception, import_string
from stages.training.errors import BadTrainingConfig

OPTIMIZERS: Mapping[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}
# (outputs (B, ...), labels (B, ...)) -> a scalar, the mean over the rows.
LossFunction = Callable[[Any, Tensor], Tensor]
LOSSES: Mapping[str, LossFunction] = {
    "cross_entropy": nn.functional.cross_entropy,
    "mse": nn.functional.mse_loss,
}


def make_optimizer(
    table: TrainingTable, parameters: Iterable[nn.Parameter], folder: str
) -> torch.optim.Optimizer | None:
    """The optimizer of these parameters; None where there are none. Raises `BadTrainingConfig`."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    make: Any = OPTIMIZERS.get(table.optimizer) or _own("training.optimizer", table.optimizer, OPTIMIZERS, folder)
    try:
        # Made even where there is nothing to train, so that a wrong setting is told by every stage.
        optimizer = make(trained or [nn.Parameter(torch.zeros(1))], lr=table.lr, **table.settings)
    except Exception as error:  # a user's own class may raise anything
        raise BadTrainingConfig(table.optimizer, describe_exception(error, folder), "training.settings") from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        kind = type(optimizer).__name__
        raise BadTrainingConfig(
            table.optimizer, f"expected a torch.optim.Optimizer, it made a {kind}", "training.optimizer"
        )
    return optimizer if trained else None


def find_loss(table: TrainingTable, folder: str) -> LossFunction:
    """The loss by that name. Raises `BadTrainingConfig`."""
    loss: LossFunction = LOSSES.get(table.loss) or _own("training.loss", table.loss, LOSSES, folder)
    return loss


def _own(key: str, name: str, known: Mapping[str, Any], folder: str) -> Any:
    if ":" not in name:
        raise BadTrainingConfig(name, f"is not known: there are {', '.join(known)}, package.module:NAME", key)
    try:
        found = import_string(name, folder)
    except CannotLoad as error:
        raise BadTrainingConfig(name, error.problem, key) from error
    if not callable(found):
        raise BadTrainingConfig(name, f"expected something to call, found {type(found).__name__}", key)
    return found
