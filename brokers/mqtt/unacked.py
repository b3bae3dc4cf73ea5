"""What is in hand: QoS 1 publications that were received and not yet acknowledged. Pure.

1. They are acknowledged in the order in which they came on the connection (MQTT 5.0 section 4.6), each once it is
   settled. Mosquitto does not mind another order; rumqttd ends the connection.
2. On the next connection of the same session the broker sends again what was not acknowledged, with the same packet
   identifier and DUP set (section 4.4). What is still in hand here is not handed out a second time: its
   acknowledgement goes to the new connection. What DUP does not mark is taken for new, as is what differs from what
   had its identifier: rather twice than not at all.
3. A new session knows nothing of the old one's identifiers. What is in hand stays so, and nobody waits for its end.
4. Too much in hand stops the reading. A Receive Maximum alone does not: Mosquitto 2.0.11 sends that many more for each
   acknowledgement as soon as there is a backlog, and rumqttd does not look at it.
"""

from __future__ import annotations

import zlib
from collections import deque
from dataclasses import dataclass
from typing import Protocol

from brokers.mqtt.publish_packet import PublishHeader

UNACKED_LIMIT_BYTES = 256 << 20


class AckConnection(Protocol):
    """The connection that stands, as receipts see it."""

    def send_puback(self, packet_id: int) -> bool:
        """Send a PUBACK; False when the connection has ended."""
        ...

    def set_reading_paused(self, paused: bool) -> None:
        """Read nothing from now on, or read on."""
        ...


@dataclass(eq=False, slots=True)
class UnackedPublish:
    """One publication in hand, known by its packet identifier and by what it says."""

    packet_id: int
    content_key: tuple[str, int, int]
    pending_handlers: int = 1  # handlers that have not settled it
    nbytes: int = 0


class Unacked:
    """The publications that one client has in hand; at most about `limit`, and `limit_bytes` of payload."""

    def __init__(self, limit: int, limit_bytes: int = UNACKED_LIMIT_BYTES) -> None:
        self._limit = limit
        self._limit_bytes = limit_bytes
        self._order: deque[UnackedPublish] = deque()  # of this connection
        self._before: dict[int, UnackedPublish] = {}  # of former ones of this session, by packet identifier
        self._channel: AckConnection | None = None
        self._full = False
        self.pending_count = 0
        self.pending_bytes = 0

    def attach(self, connection: AckConnection, session_present: bool) -> None:
        """A new connection stands; `resumed`: with the session of the last one."""
        self._before = {**self._before, **{each.packet_id: each for each in self._order}} if session_present else {}
        self._order.clear()
        self._channel = connection
        self._full = False
        self._flush()

    def add(self, head: PublishHeader, payload: memoryview, handlers: int) -> UnackedPublish | None:
        """A receipt for what has come, which so many handlers will settle; None for what is in hand already."""
        mark = (head.topic, payload.nbytes, zlib.crc32(payload))
        known = self._before.pop(head.packet_id, None)
        if known is not None and head.dup and known.content_key == mark:
            self._order.append(known)
            self._flush()
            return None
        receipt = UnackedPublish(head.packet_id, mark, handlers, payload.nbytes)
        self._order.append(receipt)
        if handlers:
            self.pending_count += 1
            self.pending_bytes += receipt.nbytes
        self._flush()
        return receipt

    def ack(self, receipt: UnackedPublish) -> None:
        """One handler is done with it."""
        receipt.pending_handlers -= 1
        if receipt.pending_handlers == 0:
            self.pending_count -= 1
            self.pending_bytes -= receipt.nbytes
            self._flush()

    def _flush(self) -> None:
        if self._channel is None:
            return
        while (
            self._order and self._order[0].pending_handlers <= 0 and self._channel.send_puback(self._order[0].packet_id)
        ):
            self._order.popleft()
        full = max(len(self._order), self.pending_count) >= self._limit or self.pending_bytes >= self._limit_bytes
        if full != self._full:
            self._full = full
            self._channel.set_reading_paused(full)
