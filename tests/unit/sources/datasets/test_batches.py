"""Batches: what a step sees is decided by its number alone, whatever was asked for before."""

from __future__ import annotations

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from sources.datasets.batches import Batches, split_micro_batches
from sources.datasets.dataset import Examples
from sources.errors import CannotAugment

SIDE = 16


def examples(count: int) -> Examples:
    random = numpy.random.default_rng(0)
    return Examples(random.integers(1, 256, (count, 3, SIDE, SIDE), numpy.uint8), numpy.arange(count))


def seen(batches: Batches, epoch: int) -> list[int]:
    steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
    return [int(label) for step in steps for label in batches.batch(step)[1]]


@given(
    count=st.integers(1, 40),
    batch=st.integers(1, 50),
    seed=st.integers(-(2**70), 2**70),
    shuffle=st.booleans(),
    augment=st.booleans(),
    mirrors=st.booleans(),
    steps=st.lists(st.integers(0, 200), min_size=1, max_size=6),
)
def test_a_step_is_the_same_whenever_and_in_whatever_order_it_is_asked_for(
    count: int, batch: int, seed: int, shuffle: bool, augment: bool, mirrors: bool, steps: list[int]
) -> None:
    def fresh() -> Batches:
        return Batches(examples(count), batch, seed, shuffle=shuffle, augment=augment, horizontal_flip=mirrors)

    one = fresh()
    first = {step: one.batch(step) for step in steps}
    for step in reversed(steps):
        for again in (one.batch(step), fresh().batch(step)):
            assert numpy.array_equal(again[0], first[step][0])
            assert numpy.array_equal(again[1], first[step][1])
        assert first[step][0].dtype == numpy.uint8
        assert first[step][0].flags.c_contiguous
        assert 1 <= len(first[step][1]) <= batch


@given(count=st.integers(1, 60), batch=st.integers(1, 70), epoch=st.integers(0, 3))
def test_an_epoch_has_each_example_once(count: int, batch: int, epoch: int) -> None:
    batches = Batches(examples(count), batch, 7)
    assert batches.steps_per_epoch == -(-count // batch)
    assert sorted(seen(batches, epoch)) == list(range(count))


def test_epochs_and_seeds_differ_in_their_order() -> None:
    data = examples(50)
    orders = [seen(Batches(data, 8, seed), epoch) for seed in (0, 1, -1) for epoch in (0, 1, 2)]
    assert len({tuple(order) for order in orders}) == len(orders)


def test_without_shuffle_and_augment_rows_come_as_they_are() -> None:
    data = examples(10)
    batches = Batches(data, 4, shuffle=False)
    assert [batches.batch(step)[1].tolist() for step in (0, 1, 2, 3)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9],
        [0, 1, 2, 3],
    ]
    assert numpy.array_equal(batches.batch(2)[0], data.inputs[8:])


def test_inputs_leave_the_data_set_as_it_is() -> None:
    data = examples(4)
    before = data.inputs.copy()
    for batches in (Batches(data, 4, shuffle=False), Batches(data, 4, augment=True, horizontal_flip=True)):
        batches.batch(0)[0][:] = 0
    assert numpy.array_equal(data.inputs, before)


@pytest.mark.parametrize("mirrors", [False, True])
def test_augmented_pictures_are_shifted_by_an_eighth_at_most_and_mirrored_only_where_they_may_be(mirrors: bool) -> None:
    data = examples(60)
    inputs, labels = Batches(data, 60, 3, augment=True, horizontal_flip=mirrors).batch(0)
    found = [shift(picture, data.inputs[label]) for picture, label in zip(inputs, labels, strict=True)]
    reach = set(range(-(SIDE // 8), SIDE // 8 + 1))
    assert {down for _, down, _ in found} == reach
    assert {right for _, _, right in found} == reach
    assert {mirrored for mirrored, _, _ in found} == ({False, True} if mirrors else {False})


def shift(picture: NDArray[numpy.uint8], original: NDArray[numpy.uint8]) -> tuple[bool, int, int]:
    """How a picture (C, H, W) was made from its original: mirrored or not, how far down, how far to the right."""
    margin = SIDE // 8
    for mirrored in (False, True):
        # The crop is mirrored as a whole, so what was shifted to the right is then further to the left.
        turned = picture[:, :, ::-1] if mirrored else picture
        padded = numpy.pad(original, ((0, 0), (margin, margin), (margin, margin)))
        for top in range(2 * margin + 1):
            for left in range(2 * margin + 1):
                if numpy.array_equal(padded[:, top : top + SIDE, left : left + SIDE], turned):
                    return mirrored, margin - top, margin - left
    raise AssertionError("a picture that was not made from its original")


def test_only_pictures_can_be_augmented() -> None:
    readings = Examples(numpy.zeros((5, 8), numpy.float32), numpy.zeros(5, numpy.int64))
    assert Batches(readings, 2).batch(0)[0].shape == (2, 8)
    with pytest.raises(CannotAugment, match=r"the inputs of this data set are \[8\]"):
        Batches(readings, 2, augment=True)


@given(rows=st.integers(1, 30), count=st.integers(1, 40))
def test_micro_batches_are_a_batch_in_order_in_nearly_equal_pieces(rows: int, count: int) -> None:
    inputs, labels = numpy.arange(rows * 2, dtype=numpy.float32).reshape(rows, 2), numpy.arange(rows)
    pieces = split_micro_batches(inputs, labels, count)
    sizes = [len(piece[1]) for piece in pieces]
    assert len(pieces) == min(rows, count)
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1
    assert numpy.array_equal(numpy.concatenate([piece[0] for piece in pieces]), inputs)
    assert numpy.array_equal(numpy.concatenate([piece[1] for piece in pieces]), labels)
