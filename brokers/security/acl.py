"""Access list of the broker of a site, by least privilege: Mosquitto's acl_file, for 2.0 and 2.1.

Mosquitto grants every subscription, and delivers only what the user may read; a publication without the right is
refused at QoS 1 and dropped at QoS 0. It does not check the bridges that it keeps itself: the broker at the other end
does, which knows this one as `broker.SITE`.

Every client connects only to the broker of its site, and may use topics of other sites: bridges forward them.
"""

from collections.abc import Iterable, Iterator
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
AclRule = tuple[AccessMode, str]  # the access to the topics that match a filter


def render_acl(pipeline: Pipeline, site: str) -> str:
    """Return the acl_file for the broker of a site; those of several pipelines can be joined into one file."""
    lines = [f"# Access list of site {site}, pipeline {pipeline.name}. A user that is not listed has no access."]
    for user, rights in acl_by_user(pipeline, site).items():
        lines += ["", f"user {user}", *(f"topic {access} {topic_filter}" for topic_filter, access in rights.items())]
    return "\n".join([*lines, ""])


def acl_by_user(pipeline: Pipeline, site: str) -> dict[str, dict[str, AccessMode]]:
    """Return the rights of each user at the broker of a site, by topic filter."""
    users: dict[str, dict[str, AccessMode]] = {}

    def grant(user: str, rules: Iterable[AclRule]) -> None:
        rights = users.setdefault(user, {})
        for access, topic_filter in rules:
            rights[topic_filter] = access if rights.get(topic_filter, access) == access else "readwrite"

    for stage in pipeline.stage:
        if stage.site == site:
            rules = _training_stage_rules if pipeline.is_training else _stage_rules
            grant(stage_username(pipeline, stage), rules(pipeline, stage))
    if pipeline.source.site == site:
        grant(source_username(pipeline), _source_rules(pipeline))
        grant(VIEWER, [("read", results_topic(site))])
    for table in pipeline.site:
        if table.name == site:
            for camera in table.cameras:  # the gateway reads at the source's site; bridges forward
                grant(camera_username(camera), [("write", ingress_topic(pipeline.source.site, camera))])
        for link in table.links:
            if link.to == site:
                for user in {broker_username(table.name), link.user or broker_username(table.name)}:
                    grant(user, _bridge_rules(pipeline, table.name, site))
    grant(MONITOR, [("read", all_presence_filter(pipeline=pipeline.name))])
    grant(OPERATOR, _operator_rules(pipeline))
    return users


def downstream_stages(pipeline: Pipeline, stage: StageTable) -> list[StageTable]:
    """Return the stages that `stage` may send to: the next; all, if a user's executor may choose the route."""
    if stage.executor is not None:
        return list(pipeline.stage)
    following = pipeline.next_stage(stage)
    return [following] if following else []


def _own_rules(pipeline: Pipeline, stage: StageTable) -> Iterator[AclRule]:
    topics = pipeline.topics(stage)
    yield "readwrite", topics.presence_filter  # its own record, and those of its peers
    yield "read", topics.inbox("+")


def _stage_rules(pipeline: Pipeline, stage: StageTable) -> Iterator[AclRule]:
    yield from _own_rules(pipeline, stage)
    yield "read", pipeline.topics(stage).shared_task_topic
    for each in downstream_stages(pipeline, stage):
        yield "read", pipeline.topics(each).presence_filter
        yield "write", pipeline.topics(each).inbox("+")
    for each in pipeline.stage:
        if stage in downstream_stages(pipeline, each):  # to return credit
            yield "write", pipeline.topics(each).inbox("+")
    yield _reply_rule(pipeline)


def _training_stage_rules(pipeline: Pipeline, stage: StageTable) -> Iterator[AclRule]:
    """The first stage is the coordinator: it exchanges messages with all; the others with it and their neighbours."""
    yield from _own_rules(pipeline, stage)
    first, index = pipeline.stage[0], pipeline.stage.index(stage)
    if stage == first:
        for each in pipeline.stage:
            yield "read", pipeline.topics(each).presence_filter
            yield "write", pipeline.topics(each).inbox("+")
        yield "read", source_presence_topic(pipeline.source.site, pipeline.name, "+")
    else:
        yield "read", pipeline.topics(first).presence_filter
        for each in (first, *pipeline.stage[index - 1 : index], *pipeline.stage[index + 1 : index + 2]):
            yield "write", pipeline.topics(each).inbox("+")
    yield _reply_rule(pipeline)


def _reply_rule(pipeline: Pipeline) -> AclRule:
    """Any source of the site: the topic of a source's inbox does not name its pipeline."""
    return "write", source_inbox_topic(pipeline.source.site, "+")


def _source_rules(pipeline: Pipeline) -> Iterator[AclRule]:
    """A source reads all presence and writes to the first stage; in training it is the other way round."""
    site = pipeline.source.site
    yield "read", source_inbox_topic(site, "+")  # each source chooses its own id
    yield "readwrite" if pipeline.is_training else "write", source_presence_topic(site, pipeline.name, "+")
    first = pipeline.stage[:1]
    for stage in first if pipeline.is_training else pipeline.stage:
        yield "read", pipeline.topics(stage).presence_filter
    for stage in pipeline.stage if pipeline.is_training else first:
        yield "write", pipeline.topics(stage).inbox("+")
    if pipeline.source.kind == "ingress" and not pipeline.is_training:
        yield "read", ingress_topic(site)
    yield "write", results_topic(site)


def _bridge_rules(pipeline: Pipeline, other: str, site: str) -> Iterator[AclRule]:
    """The bridge that the broker of `other` keeps to that of `site`."""
    for rule in topic_rules(pipeline.topology.bridge_sides(other, site)):
        yield "read" if rule.direction == "in" else "write", rule.topic_filter


def _operator_rules(pipeline: Pipeline) -> Iterator[AclRule]:
    """All of the above, so that `sparse run` and its child processes need one identity; and `sparse broker doctor`."""
    yield "readwrite", doctor_topic("#")
    for each in all_sites(pipeline):
        yield "readwrite", pipeline_filter(each, pipeline.name)
        yield "readwrite", pipeline_filter(each, DOCTOR_LEVEL)
    site = pipeline.source.site
    yield "readwrite", source_inbox_topic(site, "+")
    yield "readwrite", results_topic(site)
    yield "readwrite", ingress_topic(site)
