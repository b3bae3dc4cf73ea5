"""The topic grammar: the reader's site first, names that are one level, and no two things on one topic."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brokers.errors import UsageError
from brokers.mqtt.topic_filters import filter_matches
from brokers.protocol import topics
from brokers.protocol.topics import RESERVED_PIPELINE_NAMES, StageTopics, last_level, validate_name
from tests.support.errors import raises_error

NAMES = st.from_regex(r"[A-Za-z0-9_.-]{1,64}", fullmatch=True)
STAGE = StageTopics("cloud", "street", "head")


def test_every_topic_is_where_the_protocol_says() -> None:
    assert STAGE.shared_task_topic == "sparse/cloud/street/head/tasks"
    assert STAGE.shared_task_filter == "$share/street.head/sparse/cloud/street/head/tasks"
    assert STAGE.inbox("w-1") == "sparse/cloud/street/head/in/w-1"
    assert STAGE.presence("w-1") == "sparse/cloud/street/head/up/w-1"
    assert STAGE.presence_filter == "sparse/cloud/street/head/up/+"
    assert topics.ingress_topic("cloud") == "sparse/cloud/ingress/+"
    assert topics.ingress_topic("cloud", "door") == "sparse/cloud/ingress/door"
    assert topics.results_topic("cloud") == "sparse/cloud/results/+"
    assert topics.results_topic("cloud", "door") == "sparse/cloud/results/door"
    assert topics.source_inbox_topic("cloud", "door") == "sparse/cloud/source/door/inbox"
    assert STAGE.peer_presence_filter == "sparse/cloud/street/head/up/#"
    assert topics.source_presence_topic("cloud", "street", "door") == "sparse/cloud/street/source/up/door"
    assert topics.all_presence_filter() == "sparse/+/+/+/up/+"


STAGES = NAMES.filter(lambda name: name != "source")


@given(NAMES, NAMES.filter(lambda name: name not in RESERVED_PIPELINE_NAMES), STAGES, NAMES)
def test_no_two_things_share_a_topic_whatever_their_names(site: str, pipeline: str, stage: str, other: str) -> None:
    one = StageTopics(site, pipeline, stage)
    found = [
        one.shared_task_topic,
        one.inbox(other),
        one.presence(other),
        topics.ingress_topic(site, other),
        topics.results_topic(site, other),
        topics.source_inbox_topic(site, other),
        topics.source_presence_topic(site, pipeline, other),
    ]
    assert len(set(found)) == len(found)
    filters = [
        topics.ingress_topic(site),
        topics.results_topic(site),
        one.presence_filter,
        topics.all_presence_filter(site),
    ]
    heard = {topic: [each for each in filters if filter_matches(each, topic)] for topic in found}
    assert heard[one.presence(other)] == [one.presence_filter, topics.all_presence_filter(site)]
    assert heard[topics.source_presence_topic(site, pipeline, other)] == [topics.all_presence_filter(site)]
    assert [topic for topic in found if topics.is_source_presence(topic)] == [found[-1]]
    assert all(filter_matches(one.peer_presence_filter, topic) == (topic == one.presence(other)) for topic in found)
    assert heard[topics.ingress_topic(site, other)] == [topics.ingress_topic(site)]
    assert heard[topics.results_topic(site, other)] == [topics.results_topic(site)]
    for topic in (one.shared_task_topic, one.inbox(other), topics.source_inbox_topic(site, other)):
        assert heard[topic] == []


@given(NAMES, NAMES, NAMES)
def test_a_bridge_needs_the_prefix_of_a_site_and_no_more(site: str, pipeline: str, stage: str) -> None:
    one = StageTopics(site, pipeline, stage)
    for topic in (one.shared_task_topic, one.inbox("w"), one.presence("w"), topics.source_inbox_topic(site, "s")):
        assert filter_matches(f"sparse/{site}/#", topic)
    for topic in (one.presence("w"), topics.source_presence_topic(site, pipeline, "s")):
        assert filter_matches(f"sparse/{site}/+/+/up/+", topic)


def test_the_last_level_is_the_name() -> None:
    assert last_level(topics.ingress_topic("a", "door")) == "door"
    assert last_level(STAGE.presence("w-1")) == "w-1"


@given(NAMES)
def test_a_name_is_one_level(name: str) -> None:
    assert validate_name("worker", name) == name


@pytest.mark.parametrize("what", ["site", "pipeline", "stage", "source", "worker"])
@pytest.mark.parametrize("name", ["", "a/b", "+", "#", "a b", "a\n", "\n", "ü", "a\0", "$share", "n" * 65])
def test_what_is_no_name_is_told_with_what_it_should_name(what: str, name: str) -> None:
    with raises_error(UsageError, "BadName", match=f"^{what} .* is not a name: expected 1 to 64 letters"):
        validate_name(what, name)


def test_a_stage_is_not_named_source_where_the_presence_of_sources_is() -> None:
    with raises_error(UsageError, "BadName", match=r"^stage 'source' .*; source cannot be used$"):
        validate_name("stage", "source")


def test_words_of_the_grammar_are_no_pipelines_but_may_be_anything_else() -> None:
    for name, what in itertools.product(sorted(RESERVED_PIPELINE_NAMES), ["site", "source", "worker"]):
        assert validate_name(what, name) == name
    for name in RESERVED_PIPELINE_NAMES:
        with raises_error(UsageError, "BadName", match="ingress, results, source cannot be used"):
            validate_name("pipeline", name)
