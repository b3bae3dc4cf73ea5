"""The other workers of a stage, as one that joins it hears them: whether it may come, and whether it may stay. Pure.

Two that start at the same instant see no record of one another, and both join. So each goes on listening for a while,
on probation, and exactly one of the two leaves: their clocks and the delays between them do not tell who was first, so
of two on probation the one with the smaller name stays, by what both of their records say.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from brokers.dispatch.presence import WorkerRecord
from brokers.errors import WireError
from brokers.protocol.topics import last_level
from brokers.protocol.transport import Delivery
from stages.errors import WorkerConflict

# Ample for every worker to be heard twice: they renew their records each second.
CONFLICT_WATCH_S = 3.0


@dataclass(slots=True)
class _Peer:
    birth: WorkerRecord | None = None  # None: its record cannot be read
    records: int = 0

    @property
    def lives(self) -> bool:
        """Whether it renews its record; a retained one alone may have outlived its worker."""
        return self.records > 1


class PeerWorkers:
    """What the presence topics of a stage say to one worker of it. `own` is its record."""

    def __init__(self, own: WorkerRecord) -> None:
        self.changed = asyncio.Event()
        self._own = own
        self._peers: dict[str, _Peer] = {}

    def on_presence(self, delivery: Delivery) -> WorkerRecord | None:
        """Note a change; the record of another life, if this is one and a sign of life."""
        name = last_level(delivery.topic)
        birth: WorkerRecord | None = None
        if delivery.payload.nbytes:
            peer = self._peers.setdefault(name, _Peer())
            # A retained record comes once more when the connection broke meanwhile.
            peer.records = max(peer.records, 1) if delivery.retain else peer.records + 1
            try:
                birth = WorkerRecord.from_bytes(bytes(delivery.payload))
            except WireError:
                birth = None
            peer.birth = birth
        else:
            self._peers.pop(name, None)
        self.changed.set()
        if birth is None or delivery.retain or birth.worker != name or birth.instance == self._own.instance:
            return None
        return birth

    @property
    def is_uncertain(self) -> bool:
        """Whether it must still be heard if one lives that would object."""
        others = [peer for _, peer in self._objectors()]
        return bool(others) and not any(peer.lives for peer in others)

    def find_conflict(self) -> WorkerConflict | None:
        """Why the worker may not join; None if nobody lives who objects."""
        for name, peer in self._objectors():
            if peer.lives:
                return self._twin(name, peer.birth)
        return None

    def conflict_with(self, other: WorkerRecord) -> WorkerConflict | None:
        """Why the worker, which is up and on probation, must leave now that `other` is heard; None if it may stay."""
        own = self._own
        if other.state == "stopped" or (other.worker != own.worker and other.fingerprint == own.fingerprint):
            return None
        on_probation = other.up_s is not None and other.up_s < CONFLICT_WATCH_S
        if on_probation and (own.worker, own.instance) < (other.worker, other.instance):
            return None
        return self._twin(other.worker, other)

    def _objectors(self) -> list[tuple[str, _Peer]]:
        """Those of the same id, and those with another model; the former first."""
        own = self._own
        same = [(name, peer) for name, peer in self._peers.items() if name == own.worker]
        return same + [
            (name, peer)
            for name, peer in sorted(self._peers.items())
            if name != own.worker and peer.birth is not None and peer.birth.fingerprint != own.fingerprint
        ]

    def _twin(self, name: str, other: WorkerRecord | None) -> WorkerConflict:
        own = self._own
        if name == own.worker:
            place = f" (process {other.pid} on {other.node!r})" if other else ""
            return WorkerConflict(
                own.worker, f"another worker of this id{place} is up: stop it, or choose another with --worker"
            )
        assert other is not None
        return WorkerConflict(
            own.worker,
            f"worker {other.worker!r} serves stage {other.stage!r} with the model {other.fingerprint!r}, "
            f"this one has {own.fingerprint!r}: same weights and cuts for all, or another pipeline name",
        )
