"""Training over an in-memory broker: several inputs, values as labels, short batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from brokers.errors import UsageError
from brokers.protocol.messages import Activation, Message, Task, TensorContent
from sources.datasets.dataset import Dataset, Examples
from sources.training.two_phase_step import StepFailed
from stages.training.part_trainer import PartTrainer
from tests.support.errors import raises_error
from tests.support.training.in_process_pipeline import STEPS, InProcessPipeline, assert_weights, run_with_pipeline
from tests.support.training.residual_networks import CLASSES
from tests.support.training.striped_images import OneHotImages, StripedImages
from tests.support.training.token_sequences import FIRST_ID, TokenSequences
from tests.support.training.token_sequences import MODEL as TOKEN_MODEL

TOKENS = {"model": TOKEN_MODEL, "cuts": (2, 4)}
NORM_MODEL = {"model": "tests.support.training.residual_networks:skip_network", "cuts": (4, 9)}


class Readings(Dataset):
    """Rows of 12 numbers for a network with a batch norm over single values."""

    name = "readings"
    classes = tuple("01234")

    def __init__(self, count: int) -> None:
        self._count = count

    def train(self) -> Examples:
        rng = np.random.default_rng(0)
        return Examples(rng.normal(0, 1, (self._count, 12)).astype(np.float32), rng.integers(0, CLASSES, self._count))

    def test(self) -> Examples:
        return self.train().first(25)  # one row more than a batch: the second has a micro-batch of one row


def tensors(message: Message) -> dict[str, str]:
    """The dtypes of the tensors of a message."""
    content = message.content if isinstance(message, Task | Activation) else None
    return {name: view.dtype for name, view in content.tensors.items()} if isinstance(content, TensorContent) else {}


@pytest.mark.parametrize("labels", ["travel", "stay"])
def test_several_inputs_arrive_by_name_and_exactly(tmp_path: Path, labels: str) -> None:
    async def test(pipeline: InProcessPipeline) -> None:
        dataset = TokenSequences()
        assert int(dataset.train().inputs["tokens"].min()) >= FIRST_ID > 1 << 53
        source = await pipeline.train(dataset=dataset)
        await assert_weights(pipeline, source)
        steps = source.events_of_kind("step")
        assert steps[-1]["loss"] < steps[0]["loss"]
        inputs = [tensors(message) for _, message in pipeline.messages if "tokens" in tensors(message)]
        assert {(names["tokens"], names["mask"]) for names in inputs} == {("I64", "BOOL")}

    run_with_pipeline(tmp_path, test, lr=0.5, labels=labels, **TOKENS)


def test_input_that_the_network_has_not_is_an_error(tmp_path: Path) -> None:
    async def test(pipeline: InProcessPipeline) -> None:
        message = r"stage 's0', .*: UnknownInput: the network has no input msk: its inputs are tokens, mask$"
        with pytest.raises(StepFailed, match=message):
            await pipeline.train(dataset=TokenSequences(mask_name="msk"))

    run_with_pipeline(tmp_path, test, **TOKENS)


def test_values_are_trained_with_the_mean_squared_error(tmp_path: Path) -> None:
    async def test(pipeline: InProcessPipeline) -> None:
        source = await pipeline.train(dataset=OneHotImages())
        await assert_weights(pipeline, source)
        assert [event["accuracy"] for event in source.events_of_kind("evaluation")] == [None, None]

    run_with_pipeline(tmp_path, test, loss="mse", evaluate_every=1)


@pytest.mark.parametrize(
    ("dataset", "loss"), [(StripedImages(), "mse"), (Readings(24), "mse")], ids=["pictures", "readings"]
)
def test_labels_that_the_loss_does_not_accept_are_refused_at_once(tmp_path: Path, dataset: Dataset, loss: str) -> None:
    async def test(pipeline: InProcessPipeline) -> None:
        with raises_error(UsageError, "BadLabels", match=r"loss 'mse': the labels of the data set are int64 \[\d+\]"):
            await pipeline.add_source(dataset=dataset)

    run_with_pipeline(tmp_path, test, loss=loss)


# Short batches --------------------------------------------------------------------------------------------------------


def test_short_last_batch_is_left_out(tmp_path: Path) -> None:
    async def test(pipeline: InProcessPipeline) -> None:
        dataset = StripedImages(count=101)
        source = await pipeline.train(dataset=dataset)
        steps = source.events_of_kind("step")
        assert [event["rows"] for event in steps] == [24] * STEPS
        assert [event["epoch"] for event in steps] == [0] * 4 + [1] * 4
        assert {event["steps"] for event in steps} == {STEPS}
        assert [event["step"] for event in source.events_of_kind("evaluation")] == [4, 8]
        assert steps[-1]["lr"] == pytest.approx(0.05 * 0.1)  # `step`, after one epoch of 4 steps
        pipeline.file = pipeline.file.model_copy(
            update={"training": pipeline.file.training.model_copy(update={"epochs": 3})}
        )
        resumed = await pipeline.train(dataset=dataset, resume=True)
        assert [event["step"] for event in resumed.events_of_kind("step")] == [9, 10, 11, 12]
        pipeline.file = pipeline.file.model_copy(
            update={"training": pipeline.file.training.model_copy(update={"drop_last": False})}
        )
        with raises_error(UsageError, "SettingsChanged", match="drop_last was True, is not set"):
            await pipeline.train(dataset=dataset, resume=True)

    training = {"drop_last": True, "evaluate_every": 1, "lr_schedule": "step", "lr_every": 1}
    run_with_pipeline(tmp_path, test, **training)


def test_weights_without_the_last_batch_are_those_of_the_unsplit_network(tmp_path: Path) -> None:
    async def test(pipeline: InProcessPipeline) -> None:
        source = await pipeline.train(dataset=StripedImages(count=101))
        await assert_weights(pipeline, source)

    run_with_pipeline(tmp_path, test, drop_last=True)


@pytest.fixture(name="min_rows")
def _min_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """All stages report that a micro-batch needs two rows."""
    start = PartTrainer.start

    def start_with_min_rows(self: PartTrainer) -> str:
        fingerprint = start(self)
        self.min_rows = 2
        return fingerprint

    monkeypatch.setattr(PartTrainer, "start", start_with_min_rows)


@pytest.mark.usefixtures("min_rows")
@pytest.mark.parametrize(
    ("count", "training", "message"),
    [
        (101, {}, r"101 rows, batch = 24 .* the last batch .* has 5 rows .* micro-batch 2 \(from 0\) 1, .* at least 2"),
        (97, {"micro_batches": 1}, r"the last batch .* has 1 rows .* micro-batch 0 .* drop_last = true, or another"),
        (96, {"batch": 12, "micro_batches": 12}, r"a batch has 12 rows .* choose another batch, or at most 6 micro_"),
    ],
    ids=["last batch", "last row", "every batch"],
)
def test_too_small_micro_batch_is_refused_before_the_first_step(
    tmp_path: Path, count: int, training: dict[str, Any], message: str
) -> None:
    async def test(pipeline: InProcessPipeline) -> None:
        with raises_error(UsageError, "TooFewRows", match=message) as caught:
            await pipeline.train(dataset=Readings(count))
        assert "\n" not in str(caught.value)
        assert not [each for _, each in pipeline.messages if isinstance(each, Task)]

    run_with_pipeline(tmp_path, test, **NORM_MODEL, **training)


@pytest.mark.usefixtures("min_rows")
@pytest.mark.parametrize(("count", "training"), [(101, {"drop_last": True}), (102, {})], ids=["drop_last", "two rows"])
def test_micro_batches_of_enough_rows_are_trained_and_evaluated(
    tmp_path: Path, count: int, training: dict[str, Any]
) -> None:
    async def test(pipeline: InProcessPipeline) -> None:
        source = await pipeline.train(dataset=Readings(count))
        assert len(source.events_of_kind("evaluation")) == 1
        assert source.completed_steps == 4 + (count == 102)

    run_with_pipeline(tmp_path, test, epochs=1, evaluate_every=1, **NORM_MODEL, **training)
