"""Topic filters, by the examples of MQTT 5.0 section 4.7."""

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
