"""`TaskQueue`: order, limits, deadlines and duplicates."""

from __future__ import annotations

from brokers.protocol.messages import BinaryContent, Priority, ReplyTo, Task
from brokers.protocol.stage_timing import Hop
from stages.executor import TaskContext
from stages.worker.batch_runner import QueuedTask
from stages.worker.task_queue import TaskQueue


def task(
    number: int,
    priority: Priority = "interactive",
    *,
    attempt: int = 1,
    deadline_ms: float | None = None,
    nbytes: int = 1,
    arrived_s: float = 0.0,
    hops: tuple[Hop, ...] = (),
) -> QueuedTask:
    request = bytes([number]) * 16
    message = Task(
        request_id=request,
        content=BinaryContent("image/jpeg", b"x" * nbytes),
        reply_to=ReplyTo("back"),
        attempt=attempt,
        deadline_ms=deadline_ms,
        priority=priority,
    )
    object.__setattr__(message, "hops", hops)  # of an activation, which has tensors
    return QueuedTask(message, arrived_s, TaskContext(request, "", attempt))


def numbers(tasks: list[QueuedTask]) -> list[int]:
    return [queued.task.request_id[0] for queued in tasks]


def test_interactive_tasks_come_first_then_order_of_arrival() -> None:
    queue = TaskQueue()
    priorities: list[Priority] = ["background", "interactive", "background", "interactive"]
    for number, priority in enumerate(priorities):
        assert queue.add(task(number, priority)) is None
    assert queue.first is not None
    assert numbers([queue.first]) == [1]
    assert numbers(queue.take(3)) == [1, 3, 0]
    assert numbers(queue.take(3)) == [2]
    assert (len(queue), queue.nbytes) == (0, 0)
    assert queue.first is None


def test_oldest_arrival_is_that_of_any_priority() -> None:
    queue = TaskQueue()
    oldest = [queue.oldest_arrival_s]
    for queued in (task(0, "background", arrived_s=5.0), task(1, arrived_s=7.0), task(2, arrived_s=6.0)):
        queue.add(queued)
        oldest.append(queue.oldest_arrival_s)
    for _ in range(3):
        queue.take(1)
        oldest.append(queue.oldest_arrival_s)
    assert oldest == [None, 5.0, 5.0, 5.0, 5.0, 5.0, None]


def test_number_of_tasks_is_limited() -> None:
    queue = TaskQueue(limit=2)
    assert [queue.add(task(number)) for number in range(3)] == [None, None, "the queue is full: 2 tasks"]
    assert numbers(queue.take(9)) == [0, 1]


def test_number_of_bytes_is_limited_except_for_a_single_task() -> None:
    queue = TaskQueue(limit_bytes=100)
    assert queue.add(task(0, nbytes=500)) is None
    assert queue.add(task(1)) == "the queue is full: 500 of 100 bytes"
    queue.take(1)
    assert queue.add(task(1, nbytes=100)) is None
    assert queue.add(task(2)) is not None


def test_expired_tasks_are_removed() -> None:
    queue = TaskQueue()
    queue.add(task(0, deadline_ms=50, nbytes=10))
    queue.add(task(1, deadline_ms=500))
    queue.add(task(2, "background", deadline_ms=50, nbytes=10))
    queue.add(task(3))
    assert queue.pop_expired(0.049) == []
    assert numbers(queue.pop_expired(0.05)) == [0, 2]
    assert (numbers(queue.take(9)), queue.nbytes) == ([1, 3], 0)


def test_later_attempt_replaces_the_queued_one() -> None:
    queue = TaskQueue()
    first, second = task(0, nbytes=10), task(0, attempt=2, nbytes=20)
    for queued in (first, task(1)):
        assert queue.replace_duplicate(queued) is None
        queue.add(queued)
    assert queue.replace_duplicate(second) is first
    assert queue.nbytes == 21
    assert queue.replace_duplicate(first) is first
    assert queue.take(1) == [second]


def test_request_that_visits_a_worker_twice_is_two_tasks() -> None:
    queue = TaskQueue()
    queue.add(task(0))
    assert queue.replace_duplicate(task(0, hops=(Hop("elsewhere", "w"),))) is None
