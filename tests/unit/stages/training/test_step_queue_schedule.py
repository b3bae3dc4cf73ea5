"""The pipeline schedules: complete, in order, bounded in memory, free of deadlock."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.training.step_queue import ScheduledOp, ScheduleName, operations

NAMES: tuple[ScheduleName, ...] = ("1f1b", "gpipe")
names = st.sampled_from(NAMES)
counts = st.integers(1, 40)
places = st.integers(1, 12).flatmap(lambda stages: st.tuples(st.integers(0, stages - 1), st.just(stages)))


@given(names, places, counts)
def test_each_micro_batch_has_one_forward_then_one_backward_in_order(
    name: ScheduleName, place: tuple[int, int], count: int
) -> None:
    ops = operations(name, *place, count)
    for which in ("forward", "backward"):
        assert [index for kind, index in ops if kind == which] == list(range(count))
    assert all(ops.index(("forward", index)) < ops.index(("backward", index)) for index in range(count))


@given(places, counts)
def test_1f1b_saves_at_most_n_forwards_at_the_nth_stage_from_the_end(place: tuple[int, int], count: int) -> None:
    stage, stages = place
    saved = 0
    most = 0
    for kind, _ in operations("1f1b", stage, stages, count):
        saved += 1 if kind == "forward" else -1
        most = max(most, saved)
    assert most == min(count, stages - stage)


@given(places, counts)
def test_gpipe_runs_all_forwards_first(place: tuple[int, int], count: int) -> None:
    ops = operations("gpipe", *place, count)
    assert [kind for kind, _ in ops] == ["forward"] * count + ["backward"] * count


@given(names, places, counts)
def test_evaluation_has_forwards_only(name: ScheduleName, place: tuple[int, int], count: int) -> None:
    assert operations(name, *place, count, "evaluate") == tuple(("forward", index) for index in range(count))


@pytest.mark.parametrize("name", NAMES)
@given(stages=st.integers(1, 8), count=st.integers(1, 24))
def test_stages_do_not_deadlock(name: ScheduleName, stages: int, count: int) -> None:
    pending = [list(operations(name, stage, stages, count)) for stage in range(stages)]
    done: set[tuple[int, ScheduledOp]] = set()

    def is_ready(stage: int, op: ScheduledOp) -> bool:
        kind, index = op
        if kind == "forward":
            return stage == 0 or (stage - 1, op) in done
        return (stage, ("forward", index)) in done and (stage == stages - 1 or (stage + 1, op) in done)

    progress = True
    while progress:
        progress = False
        for stage, ops in enumerate(pending):
            if ops and is_ready(stage, ops[0]):
                done.add((stage, ops.pop(0)))
                progress = True
    assert pending == [[] for _ in range(stages)]
