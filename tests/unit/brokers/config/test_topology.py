"""Sites and the bridges between them: one way between any two, what each bridge carries, and what is no tree."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brokers.config.bridge_rules import topic_rules
from brokers.config.topology import SiteTopology


@dataclass(frozen=True)
class Link:
    to: str


@dataclass(frozen=True)
class Site:
    name: str
    links: tuple[Link, ...] = ()


def site(name: str, *to: str) -> Site:
    return Site(name, tuple(Link(other) for other in to))


ROW = SiteTopology.from_sites([site("device", "cloudlet"), site("cloudlet", "cloud"), site("cloud")])


def test_a_bridge_carries_what_is_for_those_behind_it_and_brings_what_is_for_those_before_it() -> None:
    near, far = ROW.bridge_sides("device", "cloudlet"), ROW.bridge_sides("cloudlet", "cloud")
    assert (near.near, near.far) == (("device",), ("cloudlet", "cloud"))
    assert (far.near, far.far) == (("device", "cloudlet"), ("cloud",))


def test_there_is_one_way_between_two_sites_whoever_keeps_the_bridges() -> None:
    assert ROW.path("device", "cloud") == ("device", "cloudlet", "cloud")
    assert ROW.path("cloud", "device") == ("cloud", "cloudlet", "device")
    assert ROW.path("cloud", "moon") == ()
    assert SiteTopology.from_sites([site("a"), site("b")]).path("a", "b") == ()


def test_the_rules_of_a_bridge() -> None:
    said = {
        f"{rule.topic_filter} {rule.direction} {rule.qos}"
        for rule in topic_rules(ROW.bridge_sides("cloudlet", "cloud"))
    }
    assert {
        "sparse/cloud/+/+/in/+ out 0",
        "sparse/cloud/+/+/tasks out 1",
        "sparse/cloud/source/+/inbox out 0",
        "sparse/cloud/+/+/up/+ in 1",
        "sparse/device/+/+/in/+ in 0",
        "sparse/device/+/+/up/+ out 1",
        "sparse/cloudlet/results/+ in 1",
    } < said


@given(st.lists(st.integers(0, 100), min_size=1, max_size=7))
def test_in_any_tree_nothing_that_crosses_a_bridge_can_come_back_over_it(parents: list[int]) -> None:
    names = [str(number) for number in range(len(parents) + 1)]
    up = {names[index + 1]: names[parent % (index + 1)] for index, parent in enumerate(parents)}
    tree = SiteTopology.from_sites([site(name, *([up[name]] if name in up else [])) for name in names])
    for name, to in up.items():
        crossing = tree.bridge_sides(name, to)
        assert sorted(crossing.near + crossing.far) == sorted(names)
        there = {rule.topic_filter for rule in topic_rules(crossing) if rule.direction == "out"}
        back = {rule.topic_filter for rule in topic_rules(crossing) if rule.direction == "in"}
        assert not there & back


BAD = {
    "a loop of one": ([site("a", "a")], "site 'a': its link to 'a' makes a bridge loop, a - a: leave one of them out"),
    "there and back": (
        [site("a", "b"), site("b", "a")],
        "site 'b': its link to 'a' makes a bridge loop, b - a - b: leave one of them out",
    ),
    "twice": (
        [site("a", "b", "b"), site("b")],
        "site 'a': its link to 'b' makes a bridge loop, a - b - a: leave one of them out",
    ),
    "a triangle": (
        [site("a", "b", "c"), site("b", "c"), site("c")],
        "site 'b': its link to 'c' makes a bridge loop, b - c - a - b: leave one of them out",
    ),
    "nowhere": (
        [site("a", "moon"), site("b")],
        "site 'a': links to 'moon', and there is no such [[site]]: expected one of b",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_tree_is_told_in_one_line(case: str) -> None:
    sites, expected = BAD[case]
    with pytest.raises(ValueError) as caught:
        SiteTopology.from_sites(sites)
    assert str(caught.value) == expected
