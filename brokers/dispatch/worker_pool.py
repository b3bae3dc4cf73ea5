"""Which worker gets what: the sender's view of the workers of one stage. Pure: the time is an argument.

The sender picks, because only it can keep all chunks of a message with one worker and give unequal workers unequal
shares: a plain broker deals shared subscriptions blindly and never gives a dead worker's messages to another.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from brokers.dispatch.presence import WorkerRecord

# A worker that has not said `done` for so long never will (its word was lost with a connection): its room is free.
LEASE_S = 60.0
# Workers renew their records every second. One that has not for so long is frozen, cut off, or died unnoticed while the
# broker was away; it counts as gone until it is heard again.
PRESENCE_TIMEOUT_S = 10.0
# After so long without a record of a worker that goes on, some were lost on their way, and what else went that way may
# have been lost with them: a bridge between two sites was down.
PRESENCE_GAP_S = 3.0
# What a worker last reported says less and less while it has nothing to do: its first task may have been slow because
# it was the first. The time it is thought to take halves so often, until it is tried again.
ESTIMATE_HALF_LIFE_S = 5.0
# A worker's capacity is a batch that it computes, and so many more on their way to it and from it.
PREFETCH_TASKS = 2
# Anybody who may publish presence records may invent workers: so many are kept at most.
WORKERS_LIMIT = 1024


@dataclass(slots=True)
class _WorkerState:
    birth: WorkerRecord
    heard_s: float
    # request id -> when it was sent, in seconds
    in_hand: dict[bytes, float] = field(default_factory=dict)
    # The same of what it had when records of it were lost: it may be done with these, and the word lost as well.
    uncertain: dict[bytes, float] = field(default_factory=dict)
    settled_done: int = 0  # when it has finished so many tasks, it is done with those
    reserved_for: bytes | None = None  # the one request that it may have, by itself
    idle_since_s: float = 0.0

    @property
    def is_up(self) -> bool:
        return self.birth.state == "up"

    def is_life_of(self, birth: WorkerRecord) -> bool:
        # In containers every process has the same id, and foreign workers may name no instance: either tells.
        return (self.birth.pid, self.birth.instance) == (birth.pid, birth.instance)

    @property
    def batch(self) -> int:
        """How many tasks it computes at once."""
        return max(1, self.birth.capacity - PREFETCH_TASKS)

    @property
    def has_room(self) -> bool:
        # Of the doubtful no more can be left than wait there by its own word: a worker that comes through late, again
        # and again, is not given all that there is.
        held = len(self.in_hand) + min(len(self.uncertain), self.birth.load.queue)
        return self.is_up and self.reserved_for is None and held < self.birth.capacity

    @property
    def all_in_hand(self) -> dict[bytes, float]:
        """What it has, or may have."""
        return self.uncertain | self.in_hand

    def heard(self, birth: WorkerRecord, now_s: float, *, missed: bool) -> None:
        """It goes on; `missed`: records before this one were lost."""
        if missed:
            self.uncertain |= self.in_hand
            self.in_hand.clear()
            self.reserved_for = None
            self.settled_done = birth.load.done + birth.load.queue + self.batch
        elif birth.load.done >= self.settled_done:
            self.uncertain.clear()
        self.birth, self.heard_s = birth, now_s

    def end_leases(self, now_s: float, lease_s: float) -> None:
        for request in [request for request, sent_s in self.all_in_hand.items() if now_s - sent_s > lease_s]:
            self.done(request)

    def sent(self, request: bytes, now_s: float) -> None:
        self.uncertain.pop(request, None)
        self.in_hand[request] = self.idle_since_s = now_s

    def done(self, request: bytes) -> None:
        self.in_hand.pop(request, None)
        self.uncertain.pop(request, None)
        if self.reserved_for == request:
            self.reserved_for = None

    def wait_ms(self, now_s: float) -> float:
        """When one more task would be done; workers that have not reported a time yet count as equals."""
        task_ms = max(self.birth.load.task_ms, 0.001)
        if not self.in_hand:
            return float(task_ms * 0.5 ** ((now_s - self.idle_since_s) // ESTIMATE_HALF_LIFE_S))
        # What should have been done long ago says more than the mean: this worker hangs, or its way on is blocked.
        oldest_ms = 1000 * (now_s - next(iter(self.in_hand.values())))
        return max(len(self.in_hand) * task_ms, oldest_ms) + task_ms


@dataclass(slots=True)
class Dispatcher:
    """Keeps who is up and what each has in hand of this sender's requests."""

    lease_s: float = LEASE_S
    _workers: dict[str, _WorkerState] = field(default_factory=dict)  # the one that was heard of first comes first

    def __len__(self) -> int:
        return sum(worker.is_up for worker in self._workers.values())

    @property
    def total_batch_size(self) -> int:
        """How many tasks the workers that are up compute at once."""
        return sum(worker.batch for worker in self._workers.values() if worker.is_up)

    def update(self, record: WorkerRecord, now_s: float) -> set[bytes]:
        """A worker was born or reported its load; the requests in the hands of its former life, if it had one."""
        worker = self._workers.get(record.worker)
        if worker is not None and worker.is_life_of(record):
            worker.heard(record, now_s, missed=self.has_gap(record, now_s))
            return set()
        if worker is None and len(self._workers) >= WORKERS_LIMIT:
            return set()
        self._workers.pop(record.worker, None)
        self._workers[record.worker] = _WorkerState(record, now_s, idle_since_s=now_s)
        return set(worker.all_in_hand) if worker else set()

    def is_active(self, worker: str) -> bool:
        """Whether this worker is known and has not said that it has stopped."""
        return worker in self._workers and self._workers[worker].birth.state != "stopped"

    def has_gap(self, record: WorkerRecord, now_s: float) -> bool:
        """Whether what went to this worker, or came from it, may be lost, by the record that comes now.

        Records are missing before it; or the worker had lost its broker, which has lost what it held.
        """
        known = self._workers.get(record.worker)
        if known is None or not known.is_life_of(record):
            return False
        return now_s - known.heard_s > PRESENCE_GAP_S or record.reconnects != known.birth.reconnects

    def timed_out(self, now_s: float) -> list[str]:
        """The workers that have not been heard of for too long."""
        return [name for name, worker in self._workers.items() if now_s - worker.heard_s > PRESENCE_TIMEOUT_S]

    def reset(self) -> set[bytes]:
        """The connection broke: nobody is known to be up, nothing to be in anybody's hands; what was."""
        lost = {request for worker in self._workers.values() for request in worker.all_in_hand}
        self._workers.clear()
        return lost

    def remove(self, worker: str) -> set[bytes]:
        """A worker died or left: the requests that were in its hands."""
        lost = self._workers.pop(worker, None)
        return set(lost.all_in_hand) if lost else set()

    def pick(self, now_s: float, avoid: frozenset[str] = frozenset(), isolate: bytes | None = None) -> str | None:
        """The worker with room that would be done first, one not to be avoided if there is a choice.

        `alone` is a request that must have a worker to itself: one is kept free for it until it has ended.
        """
        for worker in self._workers.values():
            worker.end_leases(now_s, self.lease_s)
        if isolate is not None:
            return self._empty_one(avoid, isolate, now_s)
        picked = _soonest([worker for worker in self._alike() if worker.has_room], avoid, now_s)
        return picked.birth.worker if picked else None

    def _alike(self) -> list[_WorkerState]:
        """Those that are up with the same model as the one that was there first: a request gets one model's answer."""
        up = [worker for worker in self._workers.values() if worker.is_up]
        return [worker for worker in up if worker.birth.fingerprint == up[0].birth.fingerprint]

    def _empty_one(self, avoid: frozenset[str], request: bytes, now_s: float) -> str | None:
        up = self._alike()
        kept = next((worker for worker in up if worker.reserved_for == request), None)
        if kept is None:
            self.cancel_reservation(request)  # it was one that is no longer up
            kept = _soonest([worker for worker in up if worker.reserved_for is None], avoid, now_s)
            if kept is None:
                return None
            kept.reserved_for = request
        return None if kept.in_hand else kept.birth.worker

    def cancel_reservation(self, request: bytes) -> None:
        """The request that a worker was kept free for will not come."""
        for worker in self._workers.values():
            if worker.reserved_for == request:
                worker.reserved_for = None

    def max_message_bytes(self, worker: str) -> int | None:
        """The largest message that this worker takes; None of one that is not known."""
        return self._workers[worker].birth.max_message_bytes if worker in self._workers else None

    def task_sent(self, worker: str, request: bytes, now_s: float) -> None:
        if worker in self._workers:
            self._workers[worker].sent(request, now_s)

    def is_assigned(self, worker: str, request: bytes) -> bool:
        """Whether this worker has this request in hand, or may have it."""
        known = self._workers.get(worker)
        return known is not None and (request in known.in_hand or request in known.uncertain)

    def task_done(self, worker: str, request: bytes) -> None:
        """The worker has room again."""
        if worker in self._workers:
            self._workers[worker].done(request)


def _soonest(workers: list[_WorkerState], avoid: frozenset[str], now_s: float) -> _WorkerState | None:
    fitting = [worker for worker in workers if worker.birth.worker not in avoid] or workers
    return min(fitting, key=lambda worker: (worker.wait_ms(now_s), worker.birth.worker), default=None)
