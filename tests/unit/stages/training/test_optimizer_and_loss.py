"""The optimizer and the loss that a pipeline file names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from brokers.config.schema import TrainingTable
from brokers.errors import UsageError, WireError
from stages.training.optimizer_and_loss import find_loss, make_optimizer
from stages.training.part_trainer import PartTrainer
from stages.worker.worker_context import WorkerContext
from tests.support.environment.checkout import ROOT
from tests.support.errors import raises_error
from tests.support.training.in_process_parts import InProcessParts, make_training_pipeline

PARAMETERS = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1), requires_grad=False)]
STRIPES = "tests.support.training.striped_images"


def table(**fields: Any) -> TrainingTable:
    return TrainingTable.model_validate(fields)


def test_optimizer_has_the_settings_and_the_parameters() -> None:
    optimizer = make_optimizer(table(optimizer="sgd", lr=0.5, settings={"momentum": 0.9}), PARAMETERS[:1], str(ROOT))
    assert isinstance(optimizer, torch.optim.SGD)
    [group] = optimizer.param_groups
    assert (group["lr"], group["momentum"]) == (0.5, 0.9)
    assert [id(parameter) for parameter in group["params"]] == [id(PARAMETERS[0])]


def test_each_stage_reports_a_wrong_setting_also_without_parameters() -> None:
    model = "tests.support.training.residual_networks:skip_network"
    pipeline = make_training_pipeline(model, [1, 2], settings={"momentun": 0.9})
    for stage in pipeline.stage:  # the second one is a ReLU
        with raises_error(UsageError, "BadTrainingConfig", match="momentun"):
            PartTrainer(WorkerContext(pipeline, stage, stage.name)).start()
    InProcessParts(make_training_pipeline(model, [1, 2], settings={"momentum": 0.9}))


def test_mistake_in_an_optimizer_of_torch_has_no_place_in_our_code() -> None:
    with raises_error(UsageError, "BadTrainingConfig", match="Muon only supports 2D parameters") as caught:
        make_optimizer(table(optimizer="torch.optim:Muon"), PARAMETERS, str(ROOT))
    assert "optimizer_and_loss" not in str(caught.value)


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
    assert find_loss(table(loss="cross_entropy"), str(ROOT)) is nn.functional.cross_entropy
    assert find_loss(table(loss="torch.nn.functional:l1_loss"), str(ROOT)) is nn.functional.l1_loss
    with raises_error(UsageError, "BadTrainingConfig") as caught:
        find_loss(table(loss="cross-entropy"), str(ROOT))
    assert caught.value.key == "training.loss"


@pytest.mark.parametrize(("output", "labels"), [((4, 1), (4,)), ((4,), (4, 1)), ((4, 3), (4, 3)), ((1, 1), (1,))])
def test_mean_squared_error_pairs_each_output_with_its_label(output: tuple[int, ...], labels: tuple[int, ...]) -> None:
    outputs, targets = torch.rand(output), torch.rand(labels)
    expected = nn.functional.mse_loss(outputs.reshape(-1), targets.reshape(-1))
    assert find_loss(table(loss="mse"), str(ROOT))(outputs, targets) == expected


@pytest.mark.parametrize(
    ("output", "labels", "message"),
    [
        (torch.zeros(4, 3), torch.zeros(4), r"the network has an output of shape \[4, 3\], the labels \[4\]$"),
        (torch.zeros(4, 1), torch.zeros(3), r"an output of shape \[4, 1\], the labels \[3\]$"),
        (torch.zeros(4, 1, 1), torch.zeros(4), r"an output of shape \[4, 1, 1\], the labels \[4\]$"),
        ({"a": torch.zeros(4), "b": torch.zeros(4)}, torch.zeros(4), r"the network has 2 outputs, the labels \[4\]$"),
        (torch.zeros(4), torch.zeros(4, dtype=torch.int64), "labels of float32, they are torch.int64"),
    ],
)
def test_mean_squared_error_refuses_labels_of_another_shape_or_kind(output: Any, labels: Any, message: str) -> None:
    with raises_error(WireError, "BadLabels", match=message):
        find_loss(table(loss="mse"), str(ROOT))(output, labels)
