"""The topic grammar: the reader's site first, names that are one level, and no two things on one topic."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brokers.errors import BadName
from brokers.mqtt.topic_filters import matches
from brokers.protocol import topics
from brokers.protocol.topics import RESERVED, StageTopics, checked_name, last_level

NAMES = st.from_regex(r"[A-Za-z0-9_.-]{1,64}", fullmatch=True)
STAGE = StageTopics("cloud", "street", "head")


def test_every_topic_is_where_the_protocol_says() -> None:
    assert STAGE.front_door == "sparse/cloud/street/head/tasks"
    assert STAGE.shared_front_door == "$share/street.head/sparse/cloud/street/head/tasks"
    assert STAGE.inbox("w-1") == "sparse/cloud/street/head/in/w-1"
    assert STAGE.presence("w-1") == "sparse/cloud/street/head/up/w-1"
    assert STAGE.all_presence == "sparse/cloud/street/head/up/+"
    assert topics.ingress("cloud") == "sparse/cloud/ingress/+"
    assert topics.ingress("cloud", "door") == "sparse/cloud/ingress/door"
    assert topics.results("cloud") == "sparse/cloud/results/+"
    assert topics.results("cloud", "door") == "sparse/cloud/results/door"
    assert topics.source_inbox("cloud", "door") == "sparse/cloud/source/door/inbox"
    assert STAGE.presence_of_peers == "sparse/cloud/street/head/up/#"
    assert topics.source_presence("cloud", "street", "door") == "sparse/cloud/street/source/up/door"
    assert topics.every_presence() == "sparse/+/+/+/up/+"


STAGES = NAMES.filter(lambda name: name != "source")


@given(NAMES, NAMES.filter(lambda name: name not in RESERVED), STAGES, NAMES)
def test_no_two_things_share_a_topic_whatever_their_names(site: str, pipeline: str, stage: str, other: str) -> None:
    one = StageTopics(site, pipeline, stage)
    found = [
        one.front_door,
        one.inbox(other),
        one.presence(other),
        topics.ingress(site, other),
        topics.results(site, other),
        topics.source_inbox(site, other),
        topics.source_presence(site, pipeline, other),
    ]
    assert len(set(found)) == len(found)
    filters = [topics.ingress(site), topics.results(site), one.all_presence, topics.every_presence(site)]
    heard = {topic: [each for each in filters if matches(each, topic)] for topic in found}
    assert heard[one.presence(other)] == [one.all_presence, topics.every_presence(site)]
    assert heard[topics.source_presence(site, pipeline, other)] == [topics.every_presence(site)]
    assert [topic for topic in found if topics.tells_of_source(topic)] == [found[-1]]
    assert all(matches(one.presence_of_peers, topic) == (topic == one.presence(other)) for topic in found)
    assert heard[topics.ingress(site, other)] == [topics.ingress(site)]
    assert heard[topics.results(site, other)] == [topics.results(site)]
    for topic in (one.front_door, one.inbox(other), topics.source_inbox(site, other)):
        assert heard[topic] == []


@given(NAMES, NAMES, NAMES)
def test_a_bridge_needs_the_prefix_of_a_site_and_no_more(site: str, pipeline: str, stage: str) -> None:
    one = StageTopics(site, pipeline, stage)
    for topic in (one.front_door, one.inbox("w"), one.presence("w"), topics.source_inbox(site, "s")):
        assert matches(f"sparse/{site}/#", topic)
    for topic in (one.presence("w"), topics.source_presence(site, pipeline, "s")):
        assert matches(f"sparse/{site}/+/+/up/+", topic)


def test_the_last_level_is_the_name() -> None:
    assert last_level(topics.ingress("a", "door")) == "door"
    assert last_level(STAGE.presence("w-1")) == "w-1"


@given(NAMES)
def test_a_name_is_one_level(name: str) -> None:
    assert checked_name("worker", name) == name


@pytest.mark.parametrize("what", ["site", "pipeline", "stage", "source", "worker"])
@pytest.mark.parametrize("name", ["", "a/b", "+", "#", "a b", "a\n", "\n", "ü", "a\0", "$share", "n" * 65])
def test_what_is_no_name_is_told_with_what_it_should_name(what: str, name: str) -> None:
    with pytest.raises(BadName, match=f"^{what} .* is not a name: 1 to 64 letters"):
        checked_name(what, name)


def test_a_stage_is_not_named_source_where_the_presence_of_sources_is() -> None:
    with pytest.raises(BadName, match=r"^stage 'source' .*; source is taken$"):
        checked_name("stage", "source")


def test_words_of_the_grammar_are_no_pipelines_but_may_be_anything_else() -> None:
    for name, what in itertools.product(sorted(RESERVED), ["site", "source", "worker"]):
        assert checked_name(what, name) == name
    for name in RESERVED:
        with pytest.raises(BadName, match="ingress, results and source are taken"):
            checked_name("pipeline", name)
