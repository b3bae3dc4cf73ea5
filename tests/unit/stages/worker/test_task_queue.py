"""What waits at a worker: in which order, how much of it, for how long, and each task once."""

from __future__ import annotations

from brokers.protocol.messages import BinaryContent, Priority, ReplyTo, Task
from brokers.protocol.stage_timing import Hop
from stages.executor import TaskContext
from stages.worker.batch_runner import QueuedTask
from stages.worker.task_queue import TaskQueue


def job(
    number: int,
    priority: Priority = "interactive",
    *,
    attempt: int = 1,
    deadline_ms: float | None = None,
    nbytes: int = 1,
    arrived_s: float = 0.0,
) -> QueuedTask:
    request = bytes([number]) * 16
    task = Task(
        request_id=request, content=BinaryContent("image/jpeg", b"x" * nbytes), reply_to=ReplyTo("back"),
        attempt=attempt, deadline_ms=deadline_ms, priority=priority,
    )  # fmt: skip
    return QueuedTask(task, arrived_s, TaskContext(request, "", attempt))


def numbers(jobs: list[QueuedTask]) -> list[int]:
    return [each.task.request_id[0] for each in jobs]


def test_the_interactive_go_first_and_among_equals_who_came_first() -> None:
    backlog = TaskQueue()
    for number, priority in enumerate(("background", "interactive", "background", "interactive")):
        assert backlog.add(job(number, priority)) is None  # type: ignore[arg-type]
    first = backlog.first
    assert first is not None
    assert first.task.request_id[0] == 1
    assert numbers(backlog.take(3)) == [1, 3, 0]
    assert numbers(backlog.take(3)) == [2]
    assert (len(backlog), backlog.nbytes, backlog.first) == (0, 0, None)


def test_the_oldest_is_known_whatever_its_turn() -> None:
    backlog = TaskQueue()
    seen = [backlog.oldest_arrival_s]
    for each in (job(0, "background", arrived_s=5.0), job(1, arrived_s=7.0), job(2, arrived_s=6.0)):
        backlog.add(each)
        seen.append(backlog.oldest_arrival_s)
    for _ in range(3):
        backlog.take(1)
        seen.append(backlog.oldest_arrival_s)
    assert seen == [None, 5.0, 5.0, 5.0, 5.0, 5.0, None]


def test_no_more_tasks_wait_than_may() -> None:
    backlog = TaskQueue(limit=2)
    assert [backlog.add(job(number)) for number in range(3)] == [None, None, "2 tasks wait already"]
    assert numbers(backlog.take(9)) == [0, 1]


def test_no_more_bytes_wait_than_may_but_one_task_always_has_room() -> None:
    backlog = TaskQueue(limit_bytes=100)
    assert backlog.add(job(0, nbytes=500)) is None
    assert backlog.add(job(1)) == "500 bytes wait already, at most 100 may"
    backlog.take(1)
    assert backlog.add(job(1, nbytes=100)) is None
    assert backlog.add(job(2)) is not None


def test_what_is_late_waits_no_more() -> None:
    backlog = TaskQueue()
    backlog.add(job(0, deadline_ms=50, nbytes=10))
    backlog.add(job(1, deadline_ms=500))
    backlog.add(job(2, "background", deadline_ms=50, nbytes=10))
    backlog.add(job(3))
    assert backlog.pop_expired(0.049) == []
    assert numbers(backlog.pop_expired(0.05)) == [0, 2]
    assert (numbers(backlog.take(9)), backlog.nbytes) == ([1, 3], 0)


def test_a_later_attempt_takes_the_place_of_the_one_that_waits_and_an_earlier_one_does_not() -> None:
    backlog = TaskQueue()
    first, second = job(0, nbytes=10), job(0, attempt=2, nbytes=20)
    for each in (first, job(1)):
        assert backlog.replace_duplicate(each) is None
        backlog.add(each)
    assert backlog.replace_duplicate(second) is first
    assert backlog.nbytes == 21
    assert backlog.replace_duplicate(first) is first
    assert backlog.take(1) == [second]


def test_a_request_that_passes_a_worker_twice_is_two_tasks() -> None:
    backlog = TaskQueue()
    backlog.add(job(0))
    again = job(0)
    object.__setattr__(again.task, "hops", (Hop("there", "w"),))
    assert backlog.replace_duplicate(again) is None
