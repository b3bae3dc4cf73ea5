"""The tasks that wait for a worker's compute thread: in which order, how many, and for how long. Pure.

* The interactive go before the background ones; among equals, who came first.
* So many tasks and so many bytes, and no more: whoever comes then is turned away. One task always has room.
* A task whose deadline has passed is taken out at once: nobody waits for it, and its bytes are wanted.
* A later attempt at a task that still waits takes its place: the sender could not know that it is here.
"""

from __future__ import annotations

from brokers.protocol.messages import PRIORITIES
from stages.worker.batch_runner import QueuedTask

# Beyond what senders were promised (capacity each), foreign clients may fill the queue up to here; then they are told.
QUEUE_LIMIT = 256
QUEUE_LIMIT_BYTES = 512 << 20


_Key = tuple[bytes, int]


def _key(job: QueuedTask) -> _Key:
    """The request, and how far it has come: one that passes this worker twice is two tasks."""
    return job.task.request_id, len(job.task.hops)


class TaskQueue:
    """A bounded queue of jobs."""

    def __init__(self, limit: int = QUEUE_LIMIT, limit_bytes: int = QUEUE_LIMIT_BYTES) -> None:
        self._limit, self._limit_bytes = limit, limit_bytes
        self._lines: dict[str, dict[_Key, QueuedTask]] = {priority: {} for priority in PRIORITIES}
        self.nbytes = 0

    def __len__(self) -> int:
        return sum(len(line) for line in self._lines.values())

    def replace_duplicate(self, job: QueuedTask) -> QueuedTask | None:
        """If another attempt at the same task waits, the later of the two waits on; the other one is returned."""
        line, key = self._lines[job.task.priority], _key(job)
        waiting = line.get(key)
        if waiting is None or waiting.task.attempt >= job.task.attempt:
            return waiting and job
        line[key] = job
        self.nbytes += job.task.content.nbytes - waiting.task.content.nbytes
        return waiting

    def add(self, job: QueuedTask) -> str | None:
        """Take a task in; if there is no room, why."""
        if len(self) >= self._limit:
            return f"{self._limit} tasks wait already"
        if len(self) and self.nbytes + job.task.content.nbytes > self._limit_bytes:
            return f"{self.nbytes} bytes wait already, at most {self._limit_bytes} may"
        self._lines[job.task.priority][_key(job)] = job
        self.nbytes += job.task.content.nbytes
        return None

    def take(self, count: int) -> list[QueuedTask]:
        """The next tasks, up to so many."""
        taken: list[QueuedTask] = []
        for line in self._lines.values():
            while line and len(taken) < count:
                taken.append(self._remove(line, next(iter(line))))
        return taken

    def pop_expired(self, now_s: float) -> list[QueuedTask]:
        """The tasks whose deadline has passed; they wait no more."""
        found: list[QueuedTask] = []
        for line in self._lines.values():
            late = [key for key, job in line.items() if job.is_expired(now_s)]
            found += [self._remove(line, key) for key in late]
        return found

    @property
    def oldest_arrival_s(self) -> float | None:
        """When the task came that has waited longest, by the clock of its arrival; None where none waits."""
        return min((job.arrived_s for line in self._lines.values() for job in line.values()), default=None)

    @property
    def first(self) -> QueuedTask | None:
        """The task whose turn is next."""
        return next((job for line in self._lines.values() for job in line.values()), None)

    def _remove(self, line: dict[_Key, QueuedTask], key: _Key) -> QueuedTask:
        job = line.pop(key)
        self.nbytes -= job.task.content.nbytes
        return job
