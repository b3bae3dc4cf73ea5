"""The clients and brokers of a pipeline by name, and the access list of a site's broker: Mosquitto's acl_file.

A name is the common name of a certificate, or a user name, and states the role of its bearer. Names are unique under
one CA. Rights are by least privilege, for Mosquitto 2.0 and 2.1.

Mosquitto grants every subscription, and delivers only what the user may read; a publication without the right is
refused at QoS 1 and dropped at QoS 0. It does not check the bridges that it keeps itself: the broker at the other end
does, which knows this one as `broker.SITE`.

Every client connects only to the broker of its site, and may use topics of other sites: bridges forward them.
"""

from collections.abc import Iterable, Iterator
from typing import Literal

from brokers.config.pipeline_file import Pipeline
from brokers.config.schema import StageTable
from brokers.config.topology import topic_rules
from brokers.errors import BadFile
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

VIEWER = "viewer"  # reads results
MONITOR = "monitor"  # reads presence
OPERATOR = "operator"  # has the rights of all others
COMMON_NAME_LIMIT = 64  # characters: RFC 5280, appendix A, ub-common-name


def broker_username(site: str) -> str:
    """The broker of a site, to its clients and to the brokers that it keeps bridges to."""
    return f"broker.{site}"


def stage_username(pipeline: Pipeline, stage: StageTable) -> str:
    """The workers of a stage."""
    return f"{pipeline.name}.{stage.name}"


def source_username(pipeline: Pipeline) -> str:
    """The sources of a pipeline, or its gateway; no stage may be named "source"."""
    return f"{pipeline.name}.source"


def camera_username(camera: str) -> str:
    """An MQTT client that publishes to the ingress of its site."""
    return f"camera.{camera}"


def all_sites(pipeline: Pipeline) -> tuple[str, ...]:
    """Return the sites that have a broker: those of the file, and `local` if it names none."""
    return tuple(dict.fromkeys([*(site.name for site in pipeline.site), *pipeline.used_sites]))


def client_usernames(pipeline: Pipeline) -> list[str]:
    return [
        *(stage_username(pipeline, stage) for stage in pipeline.stage),
        source_username(pipeline),
        *(camera_username(camera) for site in pipeline.site for camera in site.cameras),
        VIEWER,
        MONITOR,
        OPERATOR,
    ]


def check_usernames(pipeline: Pipeline) -> None:
    """Raise `BadFile` for names that are ambiguous, or too long for a certificate."""
    name = pipeline.name
    if name in ("broker", "camera") or "." in name:
        problem = f"{name!r} is ambiguous in an access list: expected a name without a dot, not 'broker' or 'camera'"
        raise BadFile(pipeline.path, problem, "pipeline.name")
    sites: dict[str, str] = {}
    for site in pipeline.site:
        for camera in site.cameras:
            if sites.setdefault(camera, site.name) != site.name:
                problem = f"{camera!r} is at {sites[camera]!r} and at {site.name!r}: a camera has one site"
                raise BadFile(pipeline.path, problem, "site.cameras")
    for username in [*map(broker_username, all_sites(pipeline)), *client_usernames(pipeline)]:
        if len(username) > COMMON_NAME_LIMIT:
            length = len(username)
            problem = f"{username!r} has {length} characters, a certificate's name has at most {COMMON_NAME_LIMIT}"
            raise BadFile(pipeline.path, problem)


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
                    forwarded = topic_rules(pipeline.topology.bridge_sides(table.name, site))
                    grant(
                        user, [("read" if each.direction == "in" else "write", each.topic_filter) for each in forwarded]
                    )
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
