"""Which worker gets what: the sender's view of the workers of one stage. Pure: the time is an argument.

The sender picks, because only it can keep all chunks of a message with one worker and give unequal workers unequal
shares: a plain broker deals shared subscriptions blindly and never gives a dead worker's messages to another.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from brokers.presence import Birth

# A worker that has not said `done` for so long never will (its word was lost with a connection): its room is free.
LEASE_S = 60.0
# Workers renew their records every second. One that has not for so long is frozen, cut off, or died unnoticed while the
# broker was away; it counts as gone until it is heard again.
SILENT_S = 10.0


@dataclass(slots=True)
class _Worker:
    birth: Birth
    heard_s: float
    # request id -> when it was sent, in seconds
    in_hand: dict[bytes, float] = field(default_factory=dict)

    def has_room(self, now_s: float) -> bool:
        for request in [request for request, sent_s in self.in_hand.items() if now_s - sent_s > LEASE_S]:
            del self.in_hand[request]
        return self.birth.state == "up" and len(self.in_hand) < self.birth.capacity

    @property
    def wait_ms(self) -> float:
        """When one more task would be done; workers that have not reported a time yet count as equals."""
        return (len(self.in_hand) + 1) * max(self.birth.load.task_ms, 0.001)


@dataclass(slots=True)
class Dispatcher:
    """Keeps who is up and what each has in hand of this sender's requests."""

    _workers: dict[str, _Worker] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(worker.birth.state == "up" for worker in self._workers.values())

    def seen(self, birth: Birth, now_s: float) -> set[bytes]:
        """A worker was born or reported its load; the requests in the hands of its former life, if it had one."""
        worker = self._workers.get(birth.worker)
        # In containers every process has the same id, and foreign workers may name no instance: either tells.
        if worker is not None and (worker.birth.pid, worker.birth.instance) == (birth.pid, birth.instance):
            worker.birth, worker.heard_s = birth, now_s
            return set()
        self._workers[birth.worker] = _Worker(birth, now_s)
        return set(worker.in_hand) if worker else set()

    def silent(self, now_s: float) -> list[str]:
        """The workers that have not been heard of for too long."""
        return [name for name, worker in self._workers.items() if now_s - worker.heard_s > SILENT_S]

    def forget(self) -> set[bytes]:
        """The connection broke: nobody is known to be up, nothing to be in anybody's hands; what was."""
        lost = {request for worker in self._workers.values() for request in worker.in_hand}
        self._workers.clear()
        return lost

    def gone(self, worker: str) -> set[bytes]:
        """A worker died or left: the requests that were in its hands."""
        lost = self._workers.pop(worker, None)
        return set(lost.in_hand) if lost else set()

    def pick(self, now_s: float, avoid: frozenset[str] = frozenset()) -> str | None:
        """The worker with room that would be done first, one not to be avoided if there is a choice."""
        ready = [worker for worker in self._workers.values() if worker.has_room(now_s)]
        fitting = [worker for worker in ready if worker.birth.worker not in avoid] or ready
        if not fitting:
            return None
        return min(fitting, key=lambda worker: (worker.wait_ms, worker.birth.worker)).birth.worker

    def sent(self, worker: str, request: bytes, now_s: float) -> None:
        if worker in self._workers:
            self._workers[worker].in_hand[request] = now_s

    def done(self, worker: str, request: bytes) -> None:
        """The worker has room again."""
        if worker in self._workers:
            self._workers[worker].in_hand.pop(request, None)
