from __future__ import annotations

import pytest

from brokers.mqtt.publish_packet import PublishHeader
from brokers.mqtt.subscriptions import (
    Subscription,
    Subscriptions,
    Unacked,
    UnackedPublish,
    filter_matches,
    split_shared_filter,
)
from brokers.protocol.transport import Properties


@pytest.mark.parametrize(
    ("topic_filter", "topic", "expected"),
    [
        ("sport/tennis/player1/#", "sport/tennis/player1", True),
        ("sport/tennis/player1/#", "sport/tennis/player1/score/wimbledon", True),
        ("sport/#", "sport", True),
        ("#", "a/b", True),
        ("#", "$SYS/x", False),
        ("+/x", "$SYS/x", False),
        ("$SYS/#", "$SYS/x", True),
        ("sport/tennis/+", "sport/tennis/player1", True),
        ("sport/tennis/+", "sport/tennis/player1/ranking", False),
        ("sport/+", "sport", False),
        ("sport/+", "sport/", True),
        ("+/+", "/finance", True),
        ("/+", "/finance", True),
        ("+", "/finance", False),
        ("a/b", "a/b", True),
        ("a/b", "a/B", False),
        ("$share/g/a/+", "a/b", True),
        ("$share/g/a/+", "b/b", False),
    ],
)
def test_filter_matches_as_specified(topic_filter: str, topic: str, expected: bool) -> None:
    assert filter_matches(topic_filter, topic) is expected


def test_shared_filter_is_split_into_group_and_filter() -> None:
    assert split_shared_filter("$share/workers/a/b") == ("workers", "a/b")
    assert split_shared_filter("a/b") == ("", "a/b")


def test_changed_subscriptions_replace_cached_matches() -> None:
    subscriptions = Subscriptions()
    assert subscriptions.matching("a") == ()
    wide, exact = Subscription("+", print), Subscription("a", print)
    subscriptions.add(wide)
    subscriptions.add(exact)
    assert subscriptions.matching("a") == (wide, exact)
    subscriptions.remove("+")
    assert subscriptions.matching("a") == (exact,)


def test_second_handler_for_a_filter_raises_value_error() -> None:
    subscriptions = Subscriptions()
    subscriptions.add(Subscription("a", print))
    with pytest.raises(ValueError, match="subscribed already"):
        subscriptions.add(Subscription("a", print))


class FakeConnection:
    """Records the requests to a connection."""

    def __init__(self) -> None:
        self.acked: list[int] = []
        self.paused: list[bool] = []
        self.is_up = True

    def send_puback(self, packet_id: int) -> bool:
        if self.is_up:
            self.acked.append(packet_id)
        return self.is_up

    def set_reading_paused(self, paused: bool) -> None:
        self.paused.append(paused)


def attached(limit: int = 64, limit_bytes: int = 1000) -> tuple[Unacked, FakeConnection]:
    unacked, connection = Unacked(limit, limit_bytes), FakeConnection()
    unacked.attach(connection, session_present=False)
    return unacked, connection


def add(
    unacked: Unacked, packet_id: int, payload: bytes = b"x", *, dup: bool = False, handlers: int = 1
) -> UnackedPublish | None:
    header = PublishHeader("t", Properties(), 10, len(payload), 1, False, packet_id, dup)
    return unacked.add(header, memoryview(payload), handlers)


def add_new(unacked: Unacked, packet_id: int, payload: bytes = b"x", *, dup: bool = False) -> UnackedPublish:
    publish = add(unacked, packet_id, payload, dup=dup)
    assert publish is not None
    return publish


def test_acknowledgements_are_sent_in_order_of_arrival() -> None:
    unacked, connection = attached()
    first, second, third = (add_new(unacked, number) for number in (7, 8, 9))
    unacked.ack(third)
    unacked.ack(second)
    assert connection.acked == []
    unacked.ack(first)
    assert connection.acked == [7, 8, 9]
    assert (unacked.pending_count, unacked.pending_bytes) == (0, 0)


def test_publication_without_manual_handler_is_acknowledged_in_order() -> None:
    unacked, connection = attached()
    add(unacked, 1, handlers=0)
    pending = add_new(unacked, 2)
    add(unacked, 3, handlers=0)
    assert connection.acked == [1]
    unacked.ack(pending)
    assert connection.acked == [1, 2, 3]


def test_all_handlers_must_acknowledge() -> None:
    unacked, connection = attached()
    publish = add(unacked, 1, handlers=2)
    assert publish is not None
    unacked.ack(publish)
    assert connection.acked == []
    unacked.ack(publish)
    assert connection.acked == [1]


def test_redelivery_of_pending_publication_is_acknowledged_on_new_connection() -> None:
    unacked, old = attached()
    first, second = add_new(unacked, 1, b"a"), add_new(unacked, 2, b"b")
    old.is_up = False
    unacked.ack(first)
    new = FakeConnection()
    unacked.attach(new, session_present=True)
    assert new.acked == []  # the broker must redeliver it first: section 4.4
    assert add(unacked, 1, b"a", dup=True) is None
    assert new.acked == [1]
    assert add(unacked, 2, b"b", dup=True) is None
    unacked.ack(second)
    assert (old.acked, new.acked) == ([], [1, 2])


def test_publication_can_stay_pending_over_several_connections() -> None:
    unacked, _ = attached()
    publish = add_new(unacked, 1, b"a")
    unacked.attach(FakeConnection(), session_present=True)  # ends before the redelivery
    last = FakeConnection()
    unacked.attach(last, session_present=True)
    assert add(unacked, 1, b"a", dup=True) is None
    unacked.ack(publish)
    assert last.acked == [1]


def test_without_dup_or_with_other_content_it_is_new() -> None:
    for payload, dup in ((b"a", False), (b"b", True)):
        unacked, _ = attached()
        old = add_new(unacked, 1, b"a")
        connection = FakeConnection()
        unacked.attach(connection, session_present=True)
        new = add_new(unacked, 1, payload, dup=dup)
        unacked.ack(old)
        assert connection.acked == []
        unacked.ack(new)
        assert connection.acked == [1]


def test_redelivery_of_acknowledged_publication_is_new() -> None:
    """The acknowledgement was lost with the connection, or another publication reuses the identifier."""
    unacked, _ = attached()
    unacked.ack(add_new(unacked, 1, b"a"))
    unacked.attach(FakeConnection(), session_present=True)
    assert add(unacked, 1, b"a", dup=True) is not None


def test_new_session_forgets_old_packet_identifiers() -> None:
    unacked, _ = attached()
    old = add_new(unacked, 1, b"a")
    connection = FakeConnection()
    unacked.attach(connection, session_present=False)
    assert add(unacked, 1, b"a", dup=True) is not None
    unacked.ack(old)
    assert connection.acked == []


def test_too_many_pending_publications_pause_reading() -> None:
    unacked, connection = attached(limit=2)
    first, second = add_new(unacked, 1), add_new(unacked, 2)
    assert connection.paused == [True]
    unacked.ack(second)  # it waits for its turn, and counts: it would be redelivered
    assert connection.paused == [True]
    unacked.ack(first)
    assert connection.paused == [True, False]


def test_too_many_pending_bytes_pause_reading() -> None:
    unacked, connection = attached(limit_bytes=100)
    first = add_new(unacked, 1, bytes(60))
    second = add_new(unacked, 2, bytes(60))
    assert connection.paused == [True]
    unacked.ack(second)
    unacked.ack(first)
    assert connection.paused == [True, False]


def test_publications_of_a_lost_session_count_as_pending() -> None:
    unacked, _ = attached(limit=2)
    old = [add_new(unacked, number) for number in (1, 2)]
    connection = FakeConnection()
    unacked.attach(connection, session_present=False)
    assert connection.paused == [True]
    unacked.ack(old[0])
    assert connection.paused == [True, False]
