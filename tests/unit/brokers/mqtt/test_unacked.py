"""What is in hand: acknowledged in order, not handed out twice, and never so much that nobody could hold it."""

from __future__ import annotations

from brokers.mqtt.publish_packet import PublishHeader
from brokers.mqtt.unacked import Unacked, UnackedPublish
from brokers.protocol.transport import Properties


class Channel:
    """A connection that notes what is asked of it."""

    def __init__(self) -> None:
        self.acknowledged: list[int] = []
        self.held: list[bool] = []
        self.up = True

    def send_puback(self, packet_id: int) -> bool:
        if self.up:
            self.acknowledged.append(packet_id)
        return self.up

    def set_reading_paused(self, paused: bool) -> None:
        self.held.append(paused)


def begun(limit: int = 64, limit_bytes: int = 1000) -> tuple[Unacked, Channel]:
    receipts, channel = Unacked(limit, limit_bytes), Channel()
    receipts.attach(channel, session_present=False)
    return receipts, channel


def take(
    receipts: Unacked, packet_id: int, payload: bytes = b"x", *, again: bool = False, handlers: int = 1
) -> UnackedPublish | None:
    head = PublishHeader("t", Properties(), 10, len(payload), 1, False, packet_id, again)
    return receipts.add(head, memoryview(payload), handlers)


def taken(receipts: Unacked, packet_id: int, payload: bytes = b"x", *, again: bool = False) -> UnackedPublish:
    receipt = take(receipts, packet_id, payload, again=again)
    assert receipt is not None
    return receipt


def test_acknowledgements_go_in_the_order_of_arrival() -> None:
    receipts, channel = begun()
    first, second, third = (taken(receipts, number) for number in (7, 8, 9))
    receipts.ack(third)
    receipts.ack(second)
    assert channel.acknowledged == []
    receipts.ack(first)
    assert channel.acknowledged == [7, 8, 9]
    assert (receipts.pending_count, receipts.pending_bytes) == (0, 0)


def test_what_nobody_settles_is_acknowledged_at_once_but_in_its_turn() -> None:
    receipts, channel = begun()
    take(receipts, 1, handlers=0)
    held = taken(receipts, 2)
    take(receipts, 3, handlers=0)
    assert channel.acknowledged == [1]
    receipts.ack(held)
    assert channel.acknowledged == [1, 2, 3]


def test_two_handlers_must_both_be_done() -> None:
    receipts, channel = begun()
    receipt = take(receipts, 1, handlers=2)
    assert receipt is not None
    receipts.ack(receipt)
    assert channel.acknowledged == []
    receipts.ack(receipt)
    assert channel.acknowledged == [1]


def test_what_is_in_hand_is_not_handed_out_again_and_is_acknowledged_on_the_new_connection() -> None:
    receipts, old = begun()
    first, second = taken(receipts, 1, b"a"), taken(receipts, 2, b"b")
    old.up = False
    receipts.ack(first)  # while there is no connection
    new = Channel()
    receipts.attach(new, session_present=True)
    assert new.acknowledged == []  # the broker must send it first: section 4.4
    assert take(receipts, 1, b"a", again=True) is None
    assert new.acknowledged == [1]
    assert take(receipts, 2, b"b", again=True) is None
    receipts.ack(second)
    assert (old.acknowledged, new.acknowledged) == ([], [1, 2])


def test_it_may_be_in_hand_over_several_connections() -> None:
    receipts, _ = begun()
    receipt = taken(receipts, 1, b"a")
    receipts.attach(Channel(), session_present=True)  # ends before the broker has sent it again
    last = Channel()
    receipts.attach(last, session_present=True)
    assert take(receipts, 1, b"a", again=True) is None
    receipts.ack(receipt)
    assert last.acknowledged == [1]


def test_what_is_not_marked_or_says_something_else_is_new() -> None:
    for payload, again in ((b"a", False), (b"b", True)):
        receipts, _ = begun()
        old = taken(receipts, 1, b"a")
        channel = Channel()
        receipts.attach(channel, session_present=True)
        new = taken(receipts, 1, payload, again=again)
        receipts.ack(old)
        assert channel.acknowledged == []
        receipts.ack(new)
        assert channel.acknowledged == [1]


def test_what_was_acknowledged_and_comes_all_the_same_is_handed_out() -> None:
    """The acknowledgement was lost with the connection, or the identifier has a new owner: nobody here can tell."""
    receipts, _ = begun()
    receipts.ack(taken(receipts, 1, b"a"))
    receipts.attach(Channel(), session_present=True)
    assert take(receipts, 1, b"a", again=True) is not None


def test_a_new_session_does_not_know_the_old_identifiers() -> None:
    receipts, _ = begun()
    old = taken(receipts, 1, b"a")
    channel = Channel()
    receipts.attach(channel, session_present=False)
    assert take(receipts, 1, b"a", again=True) is not None
    receipts.ack(old)
    assert channel.acknowledged == []


def test_too_many_in_hand_stop_the_reading_until_there_is_room() -> None:
    receipts, channel = begun(limit=2)
    first, second = taken(receipts, 1), taken(receipts, 2)
    assert channel.held == [True]
    receipts.ack(second)  # in hand is also what waits for its turn to be acknowledged: it would come again
    assert channel.held == [True]
    receipts.ack(first)
    assert channel.held == [True, False]


def test_too_many_bytes_in_hand_stop_it_too() -> None:
    receipts, channel = begun(limit_bytes=100)
    first = taken(receipts, 1, bytes(60))
    second = taken(receipts, 2, bytes(60))
    assert channel.held == [True]
    receipts.ack(second)
    receipts.ack(first)
    assert channel.held == [True, False]


def test_what_is_left_from_a_lost_session_counts_as_in_hand() -> None:
    receipts, _ = begun(limit=2)
    old = [taken(receipts, number) for number in (1, 2)]
    channel = Channel()
    receipts.attach(channel, session_present=False)
    assert channel.held == [True]
    receipts.ack(old[0])
    assert channel.held == [True, False]
