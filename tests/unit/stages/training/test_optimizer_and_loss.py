"""The optimizer and the loss that a pipeline file names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from brokers.config.schema import TrainingTable
from brokers.errors import UsageError
from stages.training.optimizer_and_loss import find_loss, make_optimizer
from tests.support.environment.checkout import ROOT
from tests.support.errors import raises_error

PARAMETERS = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1), requires_grad=False)]
STRIPES = "tests.support.training.striped_images"


def table(**fields: Any) -> TrainingTable:
    return TrainingTable.model_validate(fields)


def test_optimizer_has_the_settings_and_the_trainable_parameters() -> None:
    optimizer = make_optimizer(table(optimizer="sgd", lr=0.5, settings={"momentum": 0.9}), PARAMETERS, str(ROOT))
    assert isinstance(optimizer, torch.optim.SGD)
    [group] = optimizer.param_groups
    assert (group["lr"], group["momentum"]) == (0.5, 0.9)
    assert [id(parameter) for parameter in group["params"]] == [id(PARAMETERS[0])]


def test_part_without_parameters_has_no_optimizer_and_still_checks_its_settings() -> None:
    assert make_optimizer(table(), PARAMETERS[1:], str(ROOT)) is None
    with raises_error(UsageError, "BadTrainingConfig"):
        make_optimizer(table(settings={"momentun": 0.9}), [], str(ROOT))


@pytest.mark.parametrize(
    ("fields", "key", "message"),
    [
        ({"optimizer": "sdg"}, "training.optimizer", "'sdg': expected sgd, adam, adamw or package.module:NAME"),
        ({"settings": {"momentum": -1.0}}, "training.settings", "'sgd': ValueError: Invalid momentum value: -1.0"),
        ({"optimizer": f"{STRIPES}:dict"}, "training.optimizer", "has no dict"),
        ({"optimizer": f"{STRIPES}:CLASSES"}, "training.optimizer", "expected a callable, found int"),
        ({"optimizer": "builtins:int"}, "training.settings", "'builtins:int': "),
    ],
)
def test_bad_optimizer_is_an_error(fields: dict[str, Any], key: str, message: str) -> None:
    with raises_error(UsageError, "BadTrainingConfig") as caught:
        make_optimizer(table(**fields), PARAMETERS, str(ROOT))
    assert caught.value.key == key
    assert message in str(caught.value)


def test_factory_must_return_an_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{STRIPES}.CLASSES", lambda parameters, lr: 7)
    with raises_error(UsageError, "BadTrainingConfig", match="the callable returned a int"):
        make_optimizer(table(optimizer=f"{STRIPES}:CLASSES"), PARAMETERS, str(ROOT))


def test_loss_is_found_by_name_or_import_string() -> None:
    assert find_loss(table(loss="mse"), str(ROOT)) is nn.functional.mse_loss
    assert find_loss(table(loss="torch.nn.functional:l1_loss"), str(ROOT)) is nn.functional.l1_loss
    with raises_error(UsageError, "BadTrainingConfig") as caught:
        find_loss(table(loss="cross-entropy"), str(ROOT))
    assert caught.value.key == "training.loss"
