"""In which order a stage does its forwards and backwards: each once, gradients in one order, and so many kept."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.training.schedule import ScheduledOp, ScheduleName, operations

NAMES: tuple[ScheduleName, ...] = ("1f1b", "gpipe")
names = st.sampled_from(NAMES)
counts = st.integers(1, 40)
places = st.integers(1, 12).flatmap(lambda stages: st.tuples(st.integers(0, stages - 1), st.just(stages)))


def most_kept(ops: tuple[ScheduledOp, ...]) -> int:
    """How many forwards wait for their backward at most."""
    kept = most = 0
    for kind, _ in ops:
        kept += 1 if kind == "forward" else -1
        most = max(most, kept)
    return most


@given(names, places, counts)
def test_every_micro_batch_has_one_forward_and_then_one_backward(
    name: ScheduleName, place: tuple[int, int], count: int
) -> None:
    ops = operations(name, *place, count)
    assert sorted(ops) == sorted((kind, index) for kind in ("forward", "backward") for index in range(count))
    assert all(ops.index(("forward", index)) < ops.index(("backward", index)) for index in range(count))


@given(names, places, counts)
def test_forwards_and_backwards_are_each_in_the_order_of_the_micro_batches(
    name: ScheduleName, place: tuple[int, int], count: int
) -> None:
    ops = operations(name, *place, count)
    for which in ("forward", "backward"):
        assert [index for kind, index in ops if kind == which] == list(range(count))


@given(places, counts)
def test_1f1b_never_has_more_than_n_forwards_in_hand_at_the_nth_stage_from_the_end(
    place: tuple[int, int], count: int
) -> None:
    stage, stages = place
    assert most_kept(operations("1f1b", stage, stages, count)) == min(count, stages - stage)


@given(places, counts)
def test_gpipe_does_all_forwards_first(place: tuple[int, int], count: int) -> None:
    ops = operations("gpipe", *place, count)
    assert [kind for kind, _ in ops] == ["forward"] * count + ["backward"] * count


@given(names, places, counts)
def test_an_evaluation_has_forwards_only(name: ScheduleName, place: tuple[int, int], count: int) -> None:
    assert operations(name, *place, count, "evaluate") == tuple(("forward", index) for index in range(count))


@pytest.mark.parametrize("name", NAMES)
@given(stages=st.integers(1, 8), count=st.integers(1, 24))
def test_no_stage_waits_for_another_that_waits_for_it(name: ScheduleName, stages: int, count: int) -> None:
    left = [list(operations(name, stage, stages, count)) for stage in range(stages)]
    done: set[tuple[int, ScheduledOp]] = set()

    def can_be_done(stage: int, op: ScheduledOp) -> bool:
        kind, index = op
        if kind == "forward":
            return stage == 0 or (stage - 1, op) in done
        return (stage, ("forward", index)) in done and (stage == stages - 1 or (stage + 1, op) in done)

    moved = True
    while moved:
        moved = False
        for stage, ops in enumerate(left):
            if ops and can_be_done(stage, ops[0]):
                done.add((stage, ops.pop(0)))
                moved = True
    assert left == [[] for _ in range(stages)]
