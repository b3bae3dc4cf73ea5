"""The bound that the training benchmark compares with."""

from __future__ import annotations

import pytest

from stages.training.step_queue import ScheduleName
from tests.bench.training_peers.ideal_pipeline import StageTimes, ideal_step_s

SCHEDULES: tuple[ScheduleName, ...] = ("gpipe", "1f1b")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_stage_never_waits(schedule: ScheduleName) -> None:
    stage = StageTimes(1.0, 2.0, 0.5)
    assert ideal_step_s([stage], schedule, 4) == stage.step_s(4) == 12.5


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 4), (2, 1), (3, 4), (3, 8)])
def test_equal_stages_wait_once_for_each_other_stage(schedule: ScheduleName, stages: int, micro_batches: int) -> None:
    """GPipe's figure, (m + s - 1) turns of a forward and a backward, with the last optimizer behind it."""
    stage = StageTimes(1.0, 2.0, 0.5)
    assert ideal_step_s([stage] * stages, schedule, micro_batches) == 3.0 * (micro_batches + stages - 1) + 0.5


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_slow_last_stage_is_waited_for(schedule: ScheduleName) -> None:
    fast, slow = StageTimes(1.0, 1.0, 0.0), StageTimes(10.0, 10.0, 0.0)
    assert ideal_step_s([fast, slow], schedule, 4) == 1.0 + slow.step_s(4) + 1.0


def test_an_optimizer_counts_only_where_it_is_waited_for() -> None:
    """The last stage's is done while the first one does its last backward."""
    first, last = StageTimes(1.0, 2.0, 0.0), StageTimes(1.0, 2.0, 2.0)
    assert ideal_step_s([first, last], "1f1b", 4) == 15.0
