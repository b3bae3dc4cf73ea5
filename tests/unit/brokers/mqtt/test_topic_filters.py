"""Which topic matches which filter: the examples of MQTT 5.0 section 4.7."""

from __future__ import annotations

import pytest

from brokers.mqtt.topic_filters import Subscription, Subscriptions, filter_matches, split_shared_filter


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
def test_a_filter_matches_as_the_specification_says(topic_filter: str, topic: str, expected: bool) -> None:
    assert filter_matches(topic_filter, topic) is expected


def test_a_shared_filter_names_its_group() -> None:
    assert split_shared_filter("$share/workers/a/b") == ("workers", "a/b")
    assert split_shared_filter("a/b") == ("", "a/b")


def test_a_change_of_subscriptions_is_seen_for_topics_that_were_asked_for_before() -> None:
    table = Subscriptions()
    assert table.matching("a") == ()
    wide, exact = Subscription("+", print), Subscription("a", print)
    table.add(wide)
    table.add(exact)
    assert table.matching("a") == (wide, exact)
    table.remove("+")
    assert table.matching("a") == (exact,)
