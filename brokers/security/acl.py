"""Who may do what at the broker of one site, by least right: Mosquitto's acl_file, for 2.0 and 2.1. Pure.

Mosquitto grants every subscription, and then delivers only what its bearer may read; what may not be written is refused
at QoS 1 and dropped at QoS 0. It does not ask of what it receives from, or sends to, a bridge of its own: the broker at
the other end does, which knows this one as `broker.SITE`.

Everybody comes to the broker of their own site, and the topics they use may be those of another: bridges carry on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from brokers.config.bridge_rules import topic_rules
from brokers.config.pipeline_file import Pipeline
from brokers.config.schema import StageTable
from brokers.protocol.topics import (
    DOCTOR_LEVEL,
    all_presence_filter,
    doctor_topic,
    ingress_topic,
    pipeline_filter,
    results_topic,
    source_inbox_topic,
    source_presence_topic,
)
from brokers.security.principals import (
    MONITOR,
    OPERATOR,
    VIEWER,
    all_sites,
    broker_username,
    camera_username,
    source_username,
    stage_username,
)

AccessMode = Literal["read", "write", "readwrite"]


@dataclass(frozen=True, slots=True)
class AclRule:
    """What may be done with the topics of one filter."""

    access: AccessMode
    topic_filter: str


def render_acl(pipeline: Pipeline, site: str) -> str:
    """Return the acl_file for the broker of a site; those of several pipelines may follow one another in one file."""
    lines = [f"# Who may do what at site {site}, pipeline {pipeline.name}. Whoever is not named may do nothing."]
    for user, rights in acl_by_user(pipeline, site).items():
        lines += ["", f"user {user}", *(f"topic {access} {topic_filter}" for topic_filter, access in rights.items())]
    return "\n".join([*lines, ""])


def acl_by_user(pipeline: Pipeline, site: str) -> dict[str, dict[str, AccessMode]]:
    """All who may come to the broker of a site, and what each may do, by filter."""
    found: dict[str, dict[str, AccessMode]] = {}

    def grant(user: str, rights: Iterable[AclRule]) -> None:
        mine = found.setdefault(user, {})
        for right in rights:
            before = mine.get(right.topic_filter, right.access)
            mine[right.topic_filter] = right.access if right.access == before else "readwrite"

    for stage in pipeline.stage:
        if stage.site == site:
            name = stage_username(pipeline, stage)
            grant(name, _training_stage(pipeline, stage) if pipeline.is_training else _stage(pipeline, stage))
    if pipeline.source.site == site:
        grant(source_username(pipeline), _source(pipeline))
        grant(VIEWER, [AclRule("read", results_topic(site))])
    for table in pipeline.site:
        if table.name == site:
            for camera in table.cameras:
                # The gateway reads at the source's site, wherever the camera is; bridges carry on.
                grant(camera_username(camera), [AclRule("write", ingress_topic(pipeline.source.site, camera))])
        for link in table.links:
            if link.to == site:
                for user in {broker_username(table.name), link.user or broker_username(table.name)}:
                    grant(user, _bridge(pipeline, table.name, site))
    grant(MONITOR, [AclRule("read", all_presence_filter(pipeline=pipeline.name))])
    grant(OPERATOR, _operator(pipeline))
    return found


# Stages -----------------------------------------------------------------------------------------------------------


def downstream_stages(pipeline: Pipeline, stage: StageTable) -> list[StageTable]:
    """The stages that `stage` may pass work on to: the next; any, where code of a user's own decides (a detour)."""
    following = pipeline.next_stage(stage)
    if stage.executor is not None:
        return list(pipeline.stage)
    return [following] if following else []


def _presence_of_own(pipeline: Pipeline, stage: StageTable) -> Iterator[AclRule]:
    topics = pipeline.topics(stage)
    yield AclRule("readwrite", topics.presence_filter)  # its own record, and those of its peers
    yield AclRule("read", topics.inbox("+"))


def _stage(pipeline: Pipeline, stage: StageTable) -> Iterator[AclRule]:
    yield from _presence_of_own(pipeline, stage)
    yield AclRule("read", pipeline.topics(stage).shared_task_topic)
    for each in downstream_stages(pipeline, stage):
        yield AclRule("read", pipeline.topics(each).presence_filter)
        yield AclRule("write", pipeline.topics(each).inbox("+"))
    for each in pipeline.stage:
        if stage in downstream_stages(pipeline, each):  # to say that there is room again
            yield AclRule("write", pipeline.topics(each).inbox("+"))
    yield _answers(pipeline)


def _training_stage(pipeline: Pipeline, stage: StageTable) -> Iterator[AclRule]:
    """The first stage conducts: it hears of all and writes to all; the others hear of it, and know their neighbours."""
    yield from _presence_of_own(pipeline, stage)
    first, index = pipeline.stage[0], pipeline.stage.index(stage)
    if stage == first:
        for each in pipeline.stage:
            yield AclRule("read", pipeline.topics(each).presence_filter)
            yield AclRule("write", pipeline.topics(each).inbox("+"))
        yield AclRule("read", source_presence_topic(pipeline.source.site, pipeline.name, "+"))
    else:
        yield AclRule("read", pipeline.topics(first).presence_filter)
        for each in (first, *pipeline.stage[index - 1 : index], *pipeline.stage[index + 1 : index + 2]):
            yield AclRule("write", pipeline.topics(each).inbox("+"))
    yield _answers(pipeline)


def _answers(pipeline: Pipeline) -> AclRule:
    """To sources of this site; which pipeline a source belongs to is not in its topic."""
    return AclRule("write", source_inbox_topic(pipeline.source.site, "+"))


# Others -----------------------------------------------------------------------------------------------------------


def _source(pipeline: Pipeline) -> Iterator[AclRule]:
    site = pipeline.source.site
    yield AclRule("read", source_inbox_topic(site, "+"))  # each source takes a name of its own
    yield AclRule("readwrite" if pipeline.is_training else "write", source_presence_topic(site, pipeline.name, "+"))
    # What trains hears of the conductor only, and writes to all of the crew; else it is the other way round.
    heard = pipeline.stage[:1] if pipeline.is_training else pipeline.stage
    told = pipeline.stage if pipeline.is_training else pipeline.stage[:1]
    yield from (AclRule("read", pipeline.topics(stage).presence_filter) for stage in heard)
    yield from (AclRule("write", pipeline.topics(stage).inbox("+")) for stage in told)
    if pipeline.source.kind == "ingress" and not pipeline.is_training:
        yield AclRule("read", ingress_topic(site))
    yield AclRule("write", results_topic(site))


def _bridge(pipeline: Pipeline, other: str, site: str) -> Iterator[AclRule]:
    """What the bridge that the broker of `other` keeps to this one may take from here, and bring."""
    for rule in topic_rules(pipeline.topology.bridge_sides(other, site)):
        yield AclRule("read" if rule.direction == "in" else "write", rule.topic_filter)


def _operator(pipeline: Pipeline) -> Iterator[AclRule]:
    """All of the above, so that `sparse run` and whatever it starts do with one identity; and to examine the broker."""
    yield AclRule("readwrite", doctor_topic("#"))
    for each in all_sites(pipeline):
        yield AclRule("readwrite", pipeline_filter(each, pipeline.name))
        yield AclRule("readwrite", pipeline_filter(each, DOCTOR_LEVEL))
    home = pipeline.source.site
    yield AclRule("readwrite", source_inbox_topic(home, "+"))
    yield AclRule("readwrite", results_topic(home))
    yield AclRule("readwrite", ingress_topic(home))
