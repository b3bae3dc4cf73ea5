"""`PartTrainer`: bad gradients and labels, values that are not finite, and forwards that are saved once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from brokers.errors import WireError
from brokers.protocol.training import LABELS_TENSOR, MicroBatch
from stages.training.part_trainer import NotFinite, PartTrainer
from tests.support.errors import raises_error
from tests.support.training.in_process_parts import InProcessParts, assert_bitwise_equal, make_training_pipeline

NETWORK = "tests.support.training.residual_networks:skip_network"  # inputs of shape (B, 12), 5 classes


def make_trainers(*cuts: int) -> list[PartTrainer]:
    return InProcessParts(make_training_pipeline(NETWORK, cuts, seed=3, optimizer="sgd", lr=0.05)).part_trainers


def run_forward() -> tuple[PartTrainer, bytes, dict[str, Tensor]]:
    """Run the forward of the first of two parts; return the part, the request and the outputs."""
    request = b"." * 16
    trainer = make_trainers(4)[0]
    inputs = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 3])
    micro_batch = MicroBatch(step="0" * 32, term=1, index=0, count=1, rows=4, number=0, seed=0)
    outputs = trainer.forward(micro_batch, request, {"input": inputs, LABELS_TENSOR: labels})
    assert isinstance(outputs, dict)
    outputs.pop(LABELS_TENSOR)
    return trainer, request, outputs


def test_gradient_of_another_shape_is_refused_and_changes_nothing() -> None:
    trainer, request, outputs = run_forward()
    before = trainer.weights()
    gradients = {name: tensor[:-1] for name, tensor in outputs.items()}
    with raises_error(WireError, "BadGradient") as caught:
        trainer.backward(request, gradients)
    assert (caught.value.fields["expected"], caught.value.fields["actual"]) == ((4, 16), (3, 16))
    trainer.abort()
    assert_bitwise_equal(trainer.weights(), before)


def test_gradients_of_other_tensors_are_ignored() -> None:
    weights = []
    for extra in ({}, {"labels": torch.zeros(4), "input": torch.ones(4, 12)}):
        trainer, request, outputs = run_forward()
        trainer.backward(request, {**outputs, **extra})
        trainer.commit(0.1)
        weights.append(trainer.weights())
    assert_bitwise_equal(*weights)


def test_saved_forward_is_popped_once() -> None:
    trainer, request, outputs = run_forward()
    trainer.backward(request, outputs)
    for unknown in (request, b":" * 16):
        with raises_error(WireError, "UnknownForward"):
            trainer.backward(unknown, outputs)


def compute_loss(labels: Tensor | None, inputs: Tensor | None = None) -> object:
    (trainer,) = make_trainers()
    micro_batch = MicroBatch(step="0" * 32, term=1, index=0, count=1, rows=4, number=7, seed=0)
    tensors = {"input": torch.zeros(4, 12) if inputs is None else inputs}
    if labels is not None:
        tensors[LABELS_TENSOR] = labels
    return trainer.forward(micro_batch, b"." * 16, tensors)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 1, 5, 2]), "label 5 of row 2 is out of range: the network has 5 classes"),
        (torch.tensor([-1, 1, 5, 2]), "label -1 of row 0 is out of range"),
        (torch.tensor([-100, 1, 0, 2]), "label -100 of row 0"),  # torch's mark for rows to ignore
        (torch.tensor([0, 1]), "expected 4 labels, one for each row, got 2"),
        (None, "the micro-batch has no labels"),
    ],
)
def test_bad_labels_are_refused(labels: Tensor | None, message: str) -> None:
    with raises_error(WireError, "BadLabels", match=message):
        compute_loss(labels)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_loss_that_is_not_finite_is_an_error_with_the_step(value: float) -> None:
    with pytest.raises(NotFinite, match=r"the loss is nan in step 7 .*try a lower learning rate"):
        compute_loss(torch.tensor([0, 1, 2, 3]), torch.full((4, 12), value))


def test_parameters_that_are_not_finite_are_not_saved() -> None:
    (trainer,) = make_trainers()
    with torch.no_grad():
        next(iter(trainer._module.parameters()))[0] = float("nan")
    with pytest.raises(NotFinite, match=r"parameter 'first\.weight' is not finite in step 3"):
        trainer.checkpoint_tensors(3)
