"""Sites and bridges: one path between any two sites, the rules of each bridge, and links that are not a tree."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic_core import PydanticCustomError

from brokers.config.schema import LinkTable, SiteTable
from brokers.config.topology import BridgeSides, SiteTopology, topic_rules


def site(name: str, *to: str) -> SiteTable:
    return SiteTable(name=name, links=tuple(LinkTable(to=other) for other in to))


CHAIN = SiteTopology.from_sites([site("device", "cloudlet"), site("cloudlet", "cloud"), site("cloud")])


def test_bridge_has_the_sites_of_both_sides() -> None:
    assert CHAIN.bridge_sides("device", "cloudlet") == BridgeSides(near=("device",), far=("cloudlet", "cloud"))
    assert CHAIN.bridge_sides("cloudlet", "cloud") == BridgeSides(near=("device", "cloudlet"), far=("cloud",))


def test_path_does_not_depend_on_which_broker_runs_a_bridge() -> None:
    assert CHAIN.path("device", "cloud") == ("device", "cloudlet", "cloud")
    assert CHAIN.path("cloud", "device") == ("cloud", "cloudlet", "device")
    assert CHAIN.path("cloud", "cloud") == ("cloud",)
    assert CHAIN.path("cloud", "moon") == ()
    assert SiteTopology.from_sites([site("a"), site("b")]).path("a", "b") == ()


def test_rules_send_messages_to_their_readers_and_presence_back() -> None:
    rules = {
        f"{rule.topic_filter} {rule.direction} {rule.qos}"
        for rule in topic_rules(CHAIN.bridge_sides("cloudlet", "cloud"))
    }
    assert rules > {
        "sparse/cloud/+/+/in/+ out 0",
        "sparse/cloud/+/+/tasks out 1",
        "sparse/cloud/source/+/inbox out 0",
        "sparse/cloud/+/+/up/+ in 1",
        "sparse/device/+/+/in/+ in 0",
        "sparse/device/+/+/up/+ out 1",
        "sparse/cloudlet/results/+ in 1",
    }


@given(st.lists(st.integers(0, 100), min_size=1, max_size=7))
def test_no_topic_crosses_a_bridge_in_both_directions(parents: list[int]) -> None:
    names = [str(number) for number in range(len(parents) + 1)]
    links = {names[index + 1]: names[parent % (index + 1)] for index, parent in enumerate(parents)}
    topology = SiteTopology.from_sites([site(name, *([links[name]] if name in links else [])) for name in names])
    for name, to in links.items():
        sides = topology.bridge_sides(name, to)
        assert sorted(sides.near + sides.far) == sorted(names)
        out_filters = {rule.topic_filter for rule in topic_rules(sides) if rule.direction == "out"}
        in_filters = {rule.topic_filter for rule in topic_rules(sides) if rule.direction == "in"}
        assert not out_filters & in_filters


@pytest.mark.parametrize(
    ("sites", "expected"),
    [
        ([site("a", "a")], "site.a.links: the link to 'a' makes a loop, a - a: leave one link out"),
        ([site("a", "b"), site("b", "a")], "site.b.links: the link to 'a' makes a loop, b - a - b: leave one link out"),
        ([site("a", "b", "b"), site("b")], "site.a.links: the link to 'b' makes a loop, a - b - a: leave one link out"),
        (
            [site("a", "b", "c"), site("b", "c"), site("c")],
            "site.b.links: the link to 'c' makes a loop, b - c - a - b: leave one link out",
        ),
        ([site("a", "moon"), site("b")], "site.a.links: no site 'moon': expected one of b"),
        ([site("a", "moon")], "site.a.links: no site 'moon': the file has no other [[site]]"),
    ],
    ids=["to itself", "in both directions", "twice", "triangle", "unknown site", "only site"],
)
def test_links_that_are_not_a_tree_raise(sites: list[SiteTable], expected: str) -> None:
    with pytest.raises(PydanticCustomError) as caught:
        SiteTopology.from_sites(sites)
    assert caught.value.message() == expected
