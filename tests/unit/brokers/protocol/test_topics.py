"""The topic grammar: the reader's site comes first, names are one level, and topics are unambiguous."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brokers.errors import UsageError
from brokers.mqtt.subscriptions import filter_matches
from brokers.protocol import topics
from brokers.protocol.topics import RESERVED_PIPELINE_NAMES, StageTopics, last_level, validate_name
from tests.support.errors import raises_error

NAMES = st.from_regex(r"[A-Za-z0-9_.-]{1,64}", fullmatch=True)
STAGE = StageTopics("cloud", "street", "head")


def test_topics_are_those_of_the_protocol() -> None:
    assert STAGE.shared_task_topic == "sparse/cloud/street/head/tasks"
    assert STAGE.shared_task_filter == "$share/street.head/sparse/cloud/street/head/tasks"
    assert STAGE.inbox("w-1") == "sparse/cloud/street/head/in/w-1"
    assert STAGE.presence("w-1") == "sparse/cloud/street/head/up/w-1"
    assert STAGE.presence_filter == "sparse/cloud/street/head/up/+"
    assert topics.ingress_topic("cloud") == "sparse/cloud/ingress/+"
    assert topics.ingress_topic("cloud", "cam") == "sparse/cloud/ingress/cam"
    assert topics.results_topic("cloud") == "sparse/cloud/results/+"
    assert topics.results_topic("cloud", "cam") == "sparse/cloud/results/cam"
    assert topics.source_inbox_topic("cloud", "cam") == "sparse/cloud/source/cam/inbox"
    assert STAGE.peer_presence_filter == "sparse/cloud/street/head/up/#"
    assert topics.source_presence_topic("cloud", "street", "cam") == "sparse/cloud/street/source/up/cam"
    assert topics.all_presence_filter() == "sparse/+/+/+/up/+"


STAGES = NAMES.filter(lambda name: name != "source")


@given(NAMES, NAMES.filter(lambda name: name not in RESERVED_PIPELINE_NAMES), STAGES, NAMES)
def test_topics_of_different_kinds_never_coincide(site: str, pipeline: str, stage: str, other: str) -> None:
    one = StageTopics(site, pipeline, stage)
    all_topics = [
        one.shared_task_topic,
        one.inbox(other),
        one.presence(other),
        topics.ingress_topic(site, other),
        topics.results_topic(site, other),
        topics.source_inbox_topic(site, other),
        topics.source_presence_topic(site, pipeline, other),
    ]
    assert len(set(all_topics)) == len(all_topics)
    filters = [
        topics.ingress_topic(site),
        topics.results_topic(site),
        one.presence_filter,
        topics.all_presence_filter(site),
    ]
    matching = {topic: [each for each in filters if filter_matches(each, topic)] for topic in all_topics}
    assert matching[one.presence(other)] == [one.presence_filter, topics.all_presence_filter(site)]
    assert matching[topics.source_presence_topic(site, pipeline, other)] == [topics.all_presence_filter(site)]
    assert [topic for topic in all_topics if topics.is_source_presence(topic)] == [all_topics[-1]]
    assert all(
        filter_matches(one.peer_presence_filter, topic) == (topic == one.presence(other)) for topic in all_topics
    )
    assert matching[topics.ingress_topic(site, other)] == [topics.ingress_topic(site)]
    assert matching[topics.results_topic(site, other)] == [topics.results_topic(site)]
    for topic in (one.shared_task_topic, one.inbox(other), topics.source_inbox_topic(site, other)):
        assert matching[topic] == []


@given(NAMES, NAMES, NAMES)
def test_bridge_needs_only_the_prefix_of_a_site(site: str, pipeline: str, stage: str) -> None:
    one = StageTopics(site, pipeline, stage)
    for topic in (one.shared_task_topic, one.inbox("w"), one.presence("w"), topics.source_inbox_topic(site, "s")):
        assert filter_matches(f"sparse/{site}/#", topic)
    for topic in (one.presence("w"), topics.source_presence_topic(site, pipeline, "s")):
        assert filter_matches(f"sparse/{site}/+/+/up/+", topic)


def test_last_level_is_the_name() -> None:
    assert last_level(topics.ingress_topic("a", "cam")) == "cam"
    assert last_level(STAGE.presence("w-1")) == "w-1"


@given(NAMES)
def test_valid_name_is_returned(name: str) -> None:
    assert validate_name("worker", name) == name


@pytest.mark.parametrize("what", ["site", "pipeline", "stage", "source", "worker"])
@pytest.mark.parametrize("name", ["", "a/b", "+", "#", "a b", "a\n", "\n", "ü", "a\0", "$share", "n" * 65])
def test_invalid_name_raises_bad_name(what: str, name: str) -> None:
    with raises_error(UsageError, "BadName", match=f"^{what} .* is not a name: expected 1 to 64 letters"):
        validate_name(what, name)


def test_stage_cannot_be_named_source() -> None:
    with raises_error(UsageError, "BadName", match=r"^stage 'source' .*, but not source$"):
        validate_name("stage", "source")


def test_reserved_names_are_refused_for_pipelines_only() -> None:
    for name, what in itertools.product(sorted(RESERVED_PIPELINE_NAMES), ["site", "source", "worker"]):
        assert validate_name(what, name) == name
    for name in RESERVED_PIPELINE_NAMES:
        with raises_error(UsageError, "BadName", match="but not ingress, results, source"):
            validate_name("pipeline", name)
