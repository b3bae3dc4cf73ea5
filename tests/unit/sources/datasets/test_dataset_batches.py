"""Batches: a function of the step number only."""

from __future__ import annotations

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from brokers.errors import UsageError
from sources.datasets.dataset import Batches, Examples, smallest_micro_batch, split_micro_batches
from tests.support.errors import raises_error

SIDE = 16


def examples(count: int) -> Examples:
    random = numpy.random.default_rng(0)
    return Examples(random.integers(1, 256, (count, 3, SIDE, SIDE), numpy.uint8), numpy.arange(count))


def epoch_order(batches: Batches, epoch: int) -> list[int]:
    steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
    return [int(label) for step in steps for label in batches.batch(step)[1]]


@settings(max_examples=40)
@given(
    count=st.integers(1, 40),
    batch=st.integers(1, 50),
    seed=st.integers(-(2**70), 2**70),
    shuffle=st.booleans(),
    augment=st.booleans(),
    flip=st.booleans(),
    steps=st.lists(st.integers(0, 200), min_size=1, max_size=6),
)
def test_batch_depends_on_the_step_only(
    count: int, batch: int, seed: int, shuffle: bool, augment: bool, flip: bool, steps: list[int]
) -> None:
    def make_batches() -> Batches:
        return Batches(examples(count), batch, seed, shuffle=shuffle, augment=augment, horizontal_flip=flip)

    batches = make_batches()
    first = {step: batches.batch(step) for step in steps}
    for step in reversed(steps):
        for inputs, labels in (batches.batch(step), make_batches().batch(step)):
            assert numpy.array_equal(inputs, first[step][0])
            assert numpy.array_equal(labels, first[step][1])
        assert first[step][0].dtype == numpy.uint8
        assert first[step][0].flags.c_contiguous
        assert 1 <= len(first[step][1]) <= batch


@given(count=st.integers(1, 60), batch=st.integers(1, 70), epoch=st.integers(0, 3))
def test_epoch_has_each_example_once(count: int, batch: int, epoch: int) -> None:
    batches = Batches(examples(count), batch, 7)
    assert batches.steps_per_epoch == -(-count // batch)
    assert sorted(epoch_order(batches, epoch)) == list(range(count))


def test_order_differs_by_epoch_and_seed() -> None:
    data = examples(50)
    orders = [epoch_order(Batches(data, 8, seed), epoch) for seed in (0, 1, -1) for epoch in (0, 1, 2)]
    assert len({tuple(order) for order in orders}) == len(orders)


def test_rows_come_in_order_without_shuffle() -> None:
    data = examples(10)
    batches = Batches(data, 4, shuffle=False)
    labels = [batches.batch(step)[1].tolist() for step in (0, 1, 2, 3)]
    assert labels == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [0, 1, 2, 3]]
    assert numpy.array_equal(batches.batch(2)[0], data.inputs[8:])


def test_batches_are_copies_of_the_data_set() -> None:
    data = examples(4)
    before = data.inputs.copy()
    for batches in (Batches(data, 4, shuffle=False), Batches(data, 4, augment=True, horizontal_flip=True)):
        batches.batch(0)[0][:] = 0
    assert numpy.array_equal(data.inputs, before)


@pytest.mark.parametrize("flip", [False, True])
def test_augmentation_shifts_by_an_eighth_and_flips_only_if_allowed(flip: bool) -> None:
    data = examples(60)
    inputs, labels = Batches(data, 60, 3, augment=True, horizontal_flip=flip).batch(0)
    changes = [find_change(picture, data.inputs[label]) for picture, label in zip(inputs, labels, strict=True)]
    shifts = set(range(-(SIDE // 8), SIDE // 8 + 1))
    assert {down for _, down, _ in changes} == shifts
    assert {right for _, _, right in changes} == shifts
    assert {flipped for flipped, _, _ in changes} == ({False, True} if flip else {False})


def find_change(picture: NDArray[numpy.uint8], original: NDArray[numpy.uint8]) -> tuple[bool, int, int]:
    """How a picture (C, H, W) was made from its original: whether it was flipped, the shift down and to the right."""
    margin = SIDE // 8
    padded = numpy.pad(original, ((0, 0), (margin, margin), (margin, margin)))
    for flipped in (False, True):
        unflipped = picture[:, :, ::-1] if flipped else picture  # the crop was flipped as a whole
        for top in range(2 * margin + 1):
            for left in range(2 * margin + 1):
                if numpy.array_equal(padded[:, top : top + SIDE, left : left + SIDE], unflipped):
                    return flipped, margin - top, margin - left
    raise AssertionError("the picture was not made from its original")


@given(count=st.integers(1, 60), batch=st.integers(1, 60), epoch=st.integers(0, 3))
def test_last_batch_is_left_out_if_it_is_smaller(count: int, batch: int, epoch: int) -> None:
    if count < batch:
        with raises_error(UsageError, "NoBatches", match=rf"has {count} rows, expected at least batch = {batch}"):
            Batches(examples(count), batch, drop_last=True)
        return
    batches = Batches(examples(count), batch, 7, drop_last=True)
    order = epoch_order(batches, epoch)
    assert batches.steps_per_epoch == count // batch
    assert len(set(order)) == len(order) == batches.steps_per_epoch * batch
    assert order == epoch_order(Batches(examples(count), batch, 7), 0)[: len(order)] or epoch > 0


def test_several_inputs_are_shuffled_and_split_together() -> None:
    ids = numpy.arange(11) + (1 << 62)
    batches = Batches(Examples({"ids": ids, "mask": ids % 2 == 0}, numpy.arange(11)), 4, 1)
    inputs, labels = batches.batch(1)
    assert (inputs["ids"] - (1 << 62)).tolist() == labels.tolist()
    parts = split_micro_batches(inputs, labels, 3)
    assert [len(part[1]) for part in parts] == [2, 1, 1]
    for part, targets in parts:
        assert part["ids"].dtype == numpy.int64
        assert (part["ids"] - (1 << 62)).tolist() == targets.tolist()
        assert part["mask"].tolist() == (targets % 2 == 0).tolist()
    with raises_error(UsageError, "CannotAugment", match=r"inputs of this data set are \['ids', 'mask'\]"):
        Batches(batches.examples, 4, augment=True)


def test_inputs_that_are_not_pictures_cannot_be_augmented() -> None:
    readings = Examples(numpy.zeros((5, 8), numpy.float32), numpy.zeros(5, numpy.int64))
    assert Batches(readings, 2).batch(0)[0].shape == (2, 8)
    with raises_error(UsageError, "CannotAugment", match=r"the inputs of this data set are \[8\]"):
        Batches(readings, 2, augment=True)


@given(rows=st.integers(1, 30), count=st.integers(1, 40))
def test_micro_batches_split_a_batch_in_order_and_evenly(rows: int, count: int) -> None:
    inputs, labels = numpy.arange(rows * 2, dtype=numpy.float32).reshape(rows, 2), numpy.arange(rows)
    parts = split_micro_batches(inputs, labels, count)
    sizes = [len(part[1]) for part in parts]
    assert len(parts) == min(rows, count)
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1
    assert smallest_micro_batch(rows, count) == (min(sizes), sizes.index(min(sizes)))
    assert numpy.array_equal(numpy.concatenate([part[0] for part in parts]), inputs)
    assert numpy.array_equal(numpy.concatenate([part[1] for part in parts]), labels)
