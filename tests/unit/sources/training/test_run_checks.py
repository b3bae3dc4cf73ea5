"""Checks of a training run before its first step."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brokers.config.schema import TrainingTable
from brokers.errors import UsageError
from sources.datasets.dataset import Batches, Examples, split_micro_batches
from sources.training.run_checks import check_labels, check_micro_batches
from tests.support.errors import raises_error

VALUES, CLASSES = numpy.zeros(3, numpy.float32), numpy.zeros(3, numpy.int64)


def table(**fields: Any) -> TrainingTable:
    return TrainingTable.model_validate(fields)


@pytest.mark.parametrize(
    ("loss", "labels"),
    [
        ("mse", VALUES),
        ("mse", VALUES[:, None]),
        ("cross_entropy", CLASSES),
        ("cross_entropy", VALUES[:, None]),
        ("own:loss", VALUES),
        ("own:loss", CLASSES),
    ],
)
def test_labels_that_fit_the_loss_are_accepted(loss: str, labels: Any) -> None:
    check_labels(table(loss=loss), labels)


@pytest.mark.parametrize(
    ("loss", "labels", "message"),
    [
        ("mse", CLASSES, r"are int64 \[3\], expected values as float32"),
        ("cross_entropy", VALUES, r"are float32 \[3\], expected classes as int64 \(N,\), or probabilities"),
    ],
)
def test_labels_of_another_kind_are_refused(loss: str, labels: Any, message: str) -> None:
    with raises_error(UsageError, "BadLabels", match=message) as caught:
        check_labels(table(loss=loss), labels)
    assert caught.value.key == "training.loss"


@given(
    rows=st.integers(1, 60),
    batch=st.integers(1, 30),
    micro_batches=st.integers(1, 30),
    min_rows=st.integers(1, 4),
    drop_last=st.booleans(),
)
def test_check_fails_exactly_where_an_epoch_has_a_smaller_micro_batch(
    rows: int, batch: int, micro_batches: int, min_rows: int, drop_last: bool
) -> None:
    drop_last = drop_last and rows >= batch
    settings = table(batch=batch, micro_batches=min(batch, micro_batches), drop_last=drop_last)
    batches = Batches(Examples(numpy.arange(rows), numpy.arange(rows)), batch, drop_last=drop_last)
    sizes = [
        len(labels)
        for step in range(batches.steps_per_epoch)
        for _, labels in split_micro_batches(*batches.batch(step), settings.micro_batches)
    ]
    if min(sizes) >= min_rows:
        check_micro_batches(settings, rows, min_rows)
        return
    with raises_error(UsageError, "TooFewRows") as caught:
        check_micro_batches(settings, rows, min_rows)
    assert caught.value.fields["actual"] in sizes
    assert ("drop_last = true" in str(caught.value)) == (batch <= rows and batch // settings.micro_batches >= min_rows)


def test_number_of_micro_batches_that_the_message_names_is_enough() -> None:
    with raises_error(UsageError, "TooFewRows", match="at most 2 micro_batches"):
        check_micro_batches(table(batch=64), 261, 2)
    check_micro_batches(table(batch=64, micro_batches=2), 261, 2)
    check_micro_batches(table(batch=64, drop_last=True), 261, 2)
