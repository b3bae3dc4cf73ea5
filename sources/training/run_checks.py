"""Checks of a training run before its first step: mistakes that would end it later, in the middle of an epoch."""

import numpy

from brokers.config.schema import TrainingTable
from brokers.errors import UsageError
from sources.datasets.dataset import Labels, smallest_micro_batch


def check_labels(table: TrainingTable, labels: Labels) -> None:
    """Raise `UsageError` ("BadLabels") for labels (N, ...) of a kind that the loss does not accept."""
    is_float = labels.dtype == numpy.float32
    if table.loss == "mse" and not is_float:
        expected = "values as float32: labels.astype(numpy.float32)"
    elif table.loss == "cross_entropy" and is_float and labels.ndim == 1:
        expected = "classes as int64 (N,), or probabilities of the classes as float32 (N, C)"
    else:
        return
    found = f"{labels.dtype} {list(labels.shape)}"
    message = f"loss {table.loss!r}: the labels of the data set are {found}, expected {expected}"
    raise UsageError("BadLabels", message, key="training.loss")


def check_micro_batches(table: TrainingTable, rows: int, min_rows: int) -> None:
    """Raise `UsageError` ("TooFewRows") if an epoch of `rows` has a micro-batch of fewer than `min_rows`.

    `min_rows` is the smallest number with which the network can be trained, as its stages report it.
    """
    full, rest = divmod(rows, table.batch)
    batches = [(table.batch, "a batch")] if full else []
    if rest and not table.drop_last:
        batches.append((rest, "the last batch of an epoch"))
    for batch_rows, place in batches:
        size, index = smallest_micro_batch(batch_rows, table.micro_batches)
        if size >= min_rows:
            continue
        cures = ["another batch"]
        if batch_rows >= min_rows:
            cures.append(f"at most {batch_rows // min_rows} micro_batches")
        if full and batch_rows == rest:
            cures.insert(0, "drop_last = true")
        message = (
            f"with {rows} rows, batch = {table.batch} and micro_batches = {table.micro_batches}, {place} has "
            f"{batch_rows} rows and its micro-batch {index} (from 0) {size}, but the network needs at least {min_rows} "
            f"to be trained, for its batch norm: choose {', or '.join(cures)}"
        )
        raise UsageError("TooFewRows", message, key="training.micro_batches", expected=min_rows, actual=size)
