"""Networks of libraries, auxiliary results, unused state and tied weights: trained in parts, evaluated, exported."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from brokers.errors import UsageError
from brokers.process.import_string import import_string
from brokers.protocol.messages import TensorContent
from brokers.protocol.safetensors_codec import from_array
from sources.training.training_run import MODEL_FILE, write_weights
from stages.loading.part_loader import load_part
from stages.models.registry import get_model_spec
from stages.partition.named_values import pack_result
from tests.support.environment.checkout import ROOT
from tests.support.errors import raises_error
from tests.support.training.in_process_parts import (
    InProcessParts,
    StepBatch,
    UnsplitTrainer,
    assert_bitwise_equal,
    make_training_pipeline,
)
from tests.support.training.library_networks import TOKENS
from tests.support.training.unusual_modes import CLASSES, WIDTH
from tests.support.training.unusual_states import auxiliary_loss

SEED = 3
STEPS = 3
SUPPORT = "tests.support.training"
ROWS = (3, 2)
Inputs = Callable[[int, torch.Generator], Any]


def floats(*shape: int) -> Inputs:
    return lambda rows, generator: torch.randn(rows, *shape, generator=generator)


def tokens(rows: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, TOKENS, (rows, 6), generator=generator)


def encoder_inputs(rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"tokens": tokens(rows, generator), "ignored": torch.arange(6) >= 4 + torch.arange(rows)[:, None] % 3}


def bert_inputs(rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    mask = torch.arange(6) < 3 + torch.arange(rows)[:, None] % 4
    return {"tokens": tokens(rows, generator), "mask": mask.long()}


def few_tokens(rows: int, generator: torch.Generator) -> Tensor:
    return tokens(rows, generator) % CLASSES


# Module and factory, cuts, inputs.
CASES: dict[str, tuple[str, Sequence[int], Inputs]] = {
    "encoder": ("library_networks:Encoder", [4, 9], encoder_inputs),
    "bert": ("library_networks:Bert", [9, 40], bert_inputs),
    "torchvision-vit": ("library_networks:torchvision_vit", [12, 30], floats(3, 32, 32)),
    "torchvision-swin": ("library_networks:torchvision_swin", [15, 40], floats(3, 32, 32)),
    "timm-vit": ("library_networks:timm_vit", [12, 50], floats(3, 32, 32)),
    "timm-swin": ("library_networks:timm_swin", [15, 80], floats(3, 64, 64)),
    "timm-mobilenet": ("library_networks:timm_mobilenet", [10, 60], floats(3, 64, 64)),
    "auxiliary-head": ("unusual_states:AuxiliaryHead", [4, 10], floats(WIDTH)),
    "unused-state": ("unusual_states:UnusedState", [3, 6], floats(WIDTH)),
    "tied-in-one-part": ("unusual_states:TiedFirstLayers", [2, 7], floats(WIDTH)),
    "frozen-and-tied": ("unusual_states:FrozenTiedLayers", [3, 6], floats(WIDTH)),
    "tied-without-cuts": ("unusual_states:TiedEmbedding", [], few_tokens),
}


def loss_of(name: str) -> dict[str, Any]:
    return {"loss": f"{SUPPORT}.unusual_states:auxiliary_loss"} if name == "auxiliary-head" else {}


def make_parts(name: str, cuts: Sequence[int]) -> InProcessParts:
    address = f"{SUPPORT}.{CASES[name][0]}"
    return InProcessParts(
        make_training_pipeline(
            address, cuts, seed=SEED, optimizer="sgd", lr=0.05, settings={"momentum": 0.9}, **loss_of(name)
        )
    )


def make_batch(name: str, number: int, rows: Sequence[int] = ROWS) -> StepBatch:
    generator = torch.Generator().manual_seed(number)
    make_inputs = CASES[name][2]
    return [(make_inputs(count, generator), torch.randint(0, CLASSES, (count,), generator=generator)) for count in rows]


@pytest.mark.parametrize("name", CASES)
def test_trained_network_is_that_of_the_plain_loop_and_can_be_served(name: str, tmp_path: Path) -> None:
    address, cuts, _ = CASES[name]
    address = f"{SUPPORT}.{address}"
    parts = make_parts(name, cuts)
    torch.manual_seed(SEED)
    model: nn.Module = import_string(address, str(ROOT))()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = auxiliary_loss if loss_of(name) else nn.functional.cross_entropy
    whole = UnsplitTrainer(model, torch.optim.SGD(trained, lr=0.05, momentum=0.9), loss=loss)
    for number in range(STEPS):
        assert parts.train_step(number, make_batch(name, number)) == whole.train_step(number, make_batch(name, number))
    assert_bitwise_equal(parts.state_dict(), model.state_dict())

    ((inputs, labels),) = make_batch(name, 99, (4,))
    named = inputs if isinstance(inputs, Mapping) else {"input": inputs}
    model.eval()
    with torch.no_grad():
        outputs = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    assert parts.evaluate(inputs, labels).loss == loss(outputs, labels).item()

    contents = {
        f"s{index}": TensorContent({key: from_array(tensor) for key, tensor in trainer.weights().items()})
        for index, trainer in enumerate(parts.part_trainers)
    }
    write_weights(tmp_path, contents)
    spec = get_model_spec(address, folder=str(ROOT))
    tensors = dict(named)
    served_cuts = cuts if name != "auxiliary-head" else [4]
    for index in range(len(served_cuts) + 1):
        part = load_part(spec, served_cuts, index, tmp_path / MODEL_FILE, 0, "cpu")
        if index == 0 and len(tensors) == 1:
            tensors = dict(zip(part.input_names, tensors.values(), strict=True))
        with torch.inference_mode():
            tensors = part(tensors)
    served = tensors["output"]
    expected = pack_result(outputs)["output"]
    assert torch.allclose(served, expected, rtol=1e-5, atol=1e-6)  # weights with channels innermost round otherwise


def test_trained_weights_that_two_parts_share_are_refused() -> None:
    for name, cuts, parameter in (("tied-in-one-part", [4], "weight"), ("tied-without-cuts", [2], "weight")):
        with raises_error(UsageError, "SharedWeights", match=f"{parameter}' is used by parts 0 and 1"):
            make_parts(name, cuts)


def test_network_whose_layers_evaluation_calls_in_another_order_is_refused() -> None:
    model = f"{SUPPORT}.unusual_states:ReversedInEvaluation"
    with raises_error(UsageError, "CannotEvaluate", match="evaluation has other layers than training"):
        InProcessParts(make_training_pipeline(model, [7], seed=SEED, optimizer="sgd", lr=0.05))


def test_batch_norm_over_one_pixel_needs_two_rows() -> None:
    model = f"{SUPPORT}.unusual_values:OnePixelNorm"
    parts = InProcessParts(make_training_pipeline(model, [3], seed=SEED, optimizer="sgd", lr=0.05))
    assert [trainer.min_rows for trainer in parts.part_trainers] == [2, 2]
    assert [trainer.min_rows for trainer in make_parts("auxiliary-head", [4]).part_trainers] == [2, 2]
    assert [trainer.min_rows for trainer in make_parts("encoder", [4]).part_trainers] == [1, 1]


# A user's optimizer ---------------------------------------------------------------------------------------------------


def grouped_optimizer(parameters: Sequence[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """Biases learn at a tenth of the rate."""
    groups: list[dict[str, Any]] = [
        {"params": [each for each in parameters if each.dim() > 1]},
        {"params": [each for each in parameters if each.dim() <= 1], "lr": lr / 10},
    ]
    return torch.optim.SGD(groups, lr=lr, momentum=0.9)


@pytest.mark.parametrize("restored", [False, True])
def test_learning_rates_of_groups_are_scaled_as_by_torch(restored: bool) -> None:
    factors = [0.25, 0.5, 1.0, 0.5]  # powers of two: products of other numbers round in the order of their operations
    model = f"{SUPPORT}.residual_networks:skip_network"
    optimizer = f"{__name__}:grouped_optimizer"
    parts = InProcessParts(make_training_pipeline(model, [4, 9], seed=SEED, optimizer=optimizer, lr=0.05))
    torch.manual_seed(SEED)
    plain = import_string(model, str(ROOT))()
    whole = UnsplitTrainer(plain, grouped_optimizer(list(plain.parameters()), 0.05))
    schedule = torch.optim.lr_scheduler.LambdaLR(whole.optimizer, factors.__getitem__)
    for number, factor in enumerate(factors):
        batch = make_batch("auxiliary-head", number)  # of the same shape
        if restored and number == 2:
            for trainer in parts.part_trainers:
                trainer.restore(number, trainer.checkpoint_tensors(number))
        parts.run_operations(number, batch)
        for trainer in parts.part_trainers:
            trainer.commit(0.05 * factor)
        whole.train_step(number, batch)
        if number + 1 < len(factors):
            schedule.step()
    assert_bitwise_equal(parts.state_dict(), plain.state_dict())
