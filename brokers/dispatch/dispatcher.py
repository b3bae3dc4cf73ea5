"""Dispatch to the workers of one stage: credit-based flow control with leases, decided by the sender.

The sender decides, because only a sender can keep all chunks of a message with one worker and give unequal workers
unequal shares. A broker distributes the messages of a shared subscription regardless of the load of the subscribers,
and does not give the messages of a lost worker to another.
"""

from dataclasses import dataclass, field
from typing import Literal

from brokers.dispatch.presence import WorkerRecord
from brokers.protocol.messages import ReplyTo

LEASE_S = 60.0  # lease: if `done` has not arrived after this long, assume that the message was lost and free the slot
# The task time that a worker last reported becomes outdated while the worker is idle (its first task includes warm-up).
# The estimate halves this often, until the worker is tried again.
ESTIMATE_HALF_LIFE_S = 5.0


@dataclass(frozen=True, slots=True)
class LostTask:
    """A task that was sent to a worker and may be lost with it; the owner of the request should know."""

    request: bytes
    attempt: int
    reply: ReplyTo
    stage: str
    worker: str
    cause: Literal["died", "disconnected"] = "died"


@dataclass(slots=True)
class _WorkerState:
    record: WorkerRecord
    assigned: dict[bytes, float] = field(default_factory=dict)  # request id -> when it was sent, in seconds
    # The same for requests sent before a gap in the worker's records: their `done` messages may be lost.
    uncertain: dict[bytes, float] = field(default_factory=dict)
    settled_done: int = 0  # count of finished tasks from which on the uncertain requests are finished too
    reserved_for: bytes | None = None  # the one request that the worker may be given
    idle_since_s: float = 0.0

    @property
    def has_credit(self) -> bool:
        # Of the uncertain requests no more can be unfinished than the worker has in its queue. Counting those keeps a
        # worker whose records arrive late repeatedly from being given every request.
        held = len(self.assigned) + min(len(self.uncertain), self.record.load.queue)
        return self.record.state == "up" and self.reserved_for is None and held < self.record.capacity

    @property
    def all_requests(self) -> dict[bytes, float]:
        return self.uncertain | self.assigned

    def update(self, record: WorkerRecord, *, gap: bool) -> list[bytes]:
        """Take the next record into account; return the uncertain requests that are now known to be finished."""
        self.record = record
        if gap:
            self.uncertain |= self.assigned
            self.assigned.clear()
            self.reserved_for = None
            self.settled_done = record.load.done + record.load.queue + record.batch_size
        return list(self.uncertain) if record.load.done >= self.settled_done else []

    def remove(self, request: bytes) -> None:
        self.assigned.pop(request, None)
        self.uncertain.pop(request, None)
        if self.reserved_for == request:
            self.reserved_for = None

    def finish_ms(self, now_s: float) -> float:
        """Estimate of the time until one more task would be finished; workers without a reported time are equal."""
        task_ms = max(self.record.load.task_ms, 0.001)
        if not self.assigned:
            return float(task_ms * 0.5 ** ((now_s - self.idle_since_s) // ESTIMATE_HALF_LIFE_S))
        # A task that is long overdue says more than the mean: the worker hangs, or its next stage is blocked.
        oldest_ms = 1000 * (now_s - next(iter(self.assigned.values())))
        return max(len(self.assigned) * task_ms, oldest_ms) + task_ms


@dataclass(slots=True)
class Dispatcher:
    """The workers of one stage, and the requests of this sender that each of them has. Times are monotonic seconds."""

    lease_s: float = LEASE_S
    _workers: dict[str, _WorkerState] = field(default_factory=dict)  # the first to appear first
    _tasks: dict[bytes, LostTask] = field(default_factory=dict)  # request id -> its newest attempt

    def __len__(self) -> int:
        """How many workers are up."""
        return sum(worker.record.state == "up" for worker in self._workers.values())

    def update(self, record: WorkerRecord, now_s: float, *, gap: bool = False) -> None:
        """Take a worker's record into account; `gap`: messages to or from the worker may have been lost before it."""
        worker = self._workers.get(record.worker)
        if worker is None:
            self._workers[record.worker] = _WorkerState(record, idle_since_s=now_s)
            return
        for request in worker.update(record, gap=gap):
            self.task_done(record.worker, request)

    def remove(self, name: str) -> list[LostTask]:
        """Remove a worker that was lost; return the tasks that may be lost with it."""
        worker = self._workers.pop(name, None)
        if worker is None:
            return []
        tasks = [self._tasks[request] for request in worker.all_requests if request in self._tasks]
        lost = [task for task in tasks if task.worker == name]  # else a later attempt is at another worker
        for task in lost:
            del self._tasks[task.request]
        return lost

    def pick(
        self, now_s: float, avoid: frozenset[str] = frozenset(), isolate: bytes | None = None
    ) -> WorkerRecord | None:
        """The worker with credit that would finish one more task first; None if no worker has credit.

        A worker in `avoid` is picked only if there is no other. `isolate` is a request that must have a worker to
        itself: one is reserved for it, and picked once it is empty.
        """
        for name, worker in self._workers.items():
            for request in [each for each, sent_s in worker.all_requests.items() if now_s - sent_s > self.lease_s]:
                self.task_done(name, request)
        up = self._workers_of_one_model()
        if isolate is None:
            picked = _first_to_finish([worker for worker in up if worker.has_credit], avoid, now_s)
            return picked.record if picked else None
        reserved = next((worker for worker in up if worker.reserved_for == isolate), None)
        if reserved is None:
            self.cancel_reservation(isolate)  # of a worker that is no longer up
            reserved = _first_to_finish([worker for worker in up if worker.reserved_for is None], avoid, now_s)
            if reserved is None:
                return None
            reserved.reserved_for = isolate
        return None if reserved.assigned else reserved.record

    def cancel_reservation(self, request: bytes) -> None:
        """Free the worker that was reserved for a request."""
        for worker in self._workers.values():
            if worker.reserved_for == request:
                worker.reserved_for = None

    def task_sent(self, task: LostTask, now_s: float) -> None:
        """A task is about to be sent: it uses one credit of its worker until `task_done`, or until its lease ends."""
        worker = self._workers.get(task.worker)
        if worker is not None:
            worker.uncertain.pop(task.request, None)
            worker.assigned[task.request] = now_s
            worker.idle_since_s = now_s
            self._tasks[task.request] = task

    def task_done(self, name: str, request: bytes) -> None:
        """Return the credit that a request used at a worker."""
        worker = self._workers.get(name)
        if worker is not None:
            worker.remove(request)
        task = self._tasks.get(request)
        if task is not None and task.worker == name:  # a late message about an earlier attempt leaves a later one alone
            del self._tasks[request]

    def _workers_of_one_model(self) -> list[_WorkerState]:
        """The workers that are up with the model of the first of them: all attempts of a request get one model."""
        up = [worker for worker in self._workers.values() if worker.record.state == "up"]
        return [worker for worker in up if worker.record.fingerprint == up[0].record.fingerprint]


def _first_to_finish(workers: list[_WorkerState], avoid: frozenset[str], now_s: float) -> _WorkerState | None:
    preferred = [worker for worker in workers if worker.record.worker not in avoid] or workers
    return min(preferred, key=lambda worker: (worker.finish_ms(now_s), worker.record.worker), default=None)
