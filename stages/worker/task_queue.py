"""Queue of the tasks that wait for a worker's compute thread.

* Interactive tasks come before background ones; within a priority the order is that of arrival.
* The number of tasks and of bytes is limited; further tasks are refused. A single task of any size is accepted.
* A task past its deadline is removed: its result is not awaited any more.
* A later attempt at a queued task replaces it: the sender does not know that the earlier one is still here.
"""

from brokers.protocol.messages import PRIORITIES
from stages.worker.batch_runner import QueuedTask

# Senders that respect a worker's capacity stay far below; foreign clients may fill the queue up to here.
QUEUE_LIMIT = 256
QUEUE_LIMIT_BYTES = 512 << 20

# The request id and the number of stages it has passed: a request that visits a worker twice is two tasks.
_Key = tuple[bytes, int]


def _key(queued: QueuedTask) -> _Key:
    return queued.task.request_id, len(queued.task.hops)


class TaskQueue:
    """Bounded priority queue of tasks; `nbytes` is the size of their contents."""

    def __init__(self, limit: int = QUEUE_LIMIT, limit_bytes: int = QUEUE_LIMIT_BYTES) -> None:
        self.nbytes = 0
        self._limit = limit
        self._limit_bytes = limit_bytes
        self._queues: dict[str, dict[_Key, QueuedTask]] = {priority: {} for priority in PRIORITIES}

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    def replace_duplicate(self, queued: QueuedTask) -> QueuedTask | None:
        """Keep the later of two attempts at a task, and return the other one; None if no other attempt is queued."""
        queue = self._queues[queued.task.priority]
        key = _key(queued)
        present = queue.get(key)
        if present is None or present.task.attempt >= queued.task.attempt:
            return present and queued
        queue[key] = queued
        self.nbytes += queued.task.content.nbytes - present.task.content.nbytes
        return present

    def add(self, queued: QueuedTask) -> str | None:
        """Append a task. Returns None, or the reason why the queue is full."""
        if len(self) >= self._limit:
            return f"the queue is full: {self._limit} tasks"
        if len(self) and self.nbytes + queued.task.content.nbytes > self._limit_bytes:
            return f"the queue is full: {self.nbytes} of {self._limit_bytes} bytes"
        self._queues[queued.task.priority][_key(queued)] = queued
        self.nbytes += queued.task.content.nbytes
        return None

    def take(self, count: int) -> list[QueuedTask]:
        """Remove and return the next tasks, at most `count`."""
        taken: list[QueuedTask] = []
        for queue in self._queues.values():
            while queue and len(taken) < count:
                taken.append(self._remove(queue, next(iter(queue))))
        return taken

    def pop_expired(self, now_s: float) -> list[QueuedTask]:
        """Remove and return the tasks whose deadline has passed."""
        expired: list[QueuedTask] = []
        for queue in self._queues.values():
            keys = [key for key, queued in queue.items() if queued.is_expired(now_s)]
            expired += [self._remove(queue, key) for key in keys]
        return expired

    @property
    def oldest_arrival_s(self) -> float | None:
        """The earliest arrival of a queued task (monotonic seconds); None if the queue is empty."""
        return min((queued.arrived_s for queue in self._queues.values() for queued in queue.values()), default=None)

    @property
    def first(self) -> QueuedTask | None:
        """The next task."""
        return next((queued for queue in self._queues.values() for queued in queue.values()), None)

    def _remove(self, queue: dict[_Key, QueuedTask], key: _Key) -> QueuedTask:
        queued = queue.pop(key)
        self.nbytes -= queued.task.content.nbytes
        return queued
