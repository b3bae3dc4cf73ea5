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

from brokers.config.bridge_rules import rules
from brokers.config.pipeline_file import Pipeline
from brokers.config.schema import StageTable
from brokers.protocol.topics import (
    DOCTOR,
    every_presence,
    everything_of,
    examined,
    ingress,
    results,
    source_inbox,
    source_presence,
)
from brokers.security.principals import (
    MONITOR,
    OPERATOR,
    VIEWER,
    all_sites,
    broker_name,
    camera_name,
    source_name,
    stage_name,
)

Access = Literal["read", "write", "readwrite"]


@dataclass(frozen=True, slots=True)
class Right:
    """What may be done with the topics of one filter."""

    access: Access
    topic_filter: str


def render_access(pipeline: Pipeline, site: str) -> str:
    """Return the acl_file for the broker of a site; those of several pipelines may follow one another in one file."""
    lines = [f"# Who may do what at site {site}, pipeline {pipeline.name}. Whoever is not named may do nothing."]
    for user, rights in users(pipeline, site).items():
        lines += ["", f"user {user}", *(f"topic {access} {topic_filter}" for topic_filter, access in rights.items())]
    return "\n".join([*lines, ""])


def users(pipeline: Pipeline, site: str) -> dict[str, dict[str, Access]]:
    """All who may come to the broker of a site, and what each may do, by filter."""
    found: dict[str, dict[str, Access]] = {}

    def grant(user: str, rights: Iterable[Right]) -> None:
        mine = found.setdefault(user, {})
        for right in rights:
            before = mine.get(right.topic_filter, right.access)
            mine[right.topic_filter] = right.access if right.access == before else "readwrite"

    for stage in pipeline.stage:
        if stage.site == site:
            name = stage_name(pipeline, stage)
            grant(name, _training_stage(pipeline, stage) if pipeline.trains else _stage(pipeline, stage))
    if pipeline.source.site == site:
        grant(source_name(pipeline), _source(pipeline))
        grant(VIEWER, [Right("read", results(site))])
    for table in pipeline.site:
        if table.name == site:
            for camera in table.cameras:
                # The gateway reads at the source's site, wherever the camera is; bridges carry on.
                grant(camera_name(camera), [Right("write", ingress(pipeline.source.site, camera))])
        for link in table.links:
            if link.to == site:
                for user in {broker_name(table.name), link.user or broker_name(table.name)}:
                    grant(user, _bridge(pipeline, table.name, site))
    grant(MONITOR, [Right("read", every_presence(pipeline=pipeline.name))])
    grant(OPERATOR, _operator(pipeline))
    return found


# Stages -----------------------------------------------------------------------------------------------------------


def receivers(pipeline: Pipeline, stage: StageTable) -> list[StageTable]:
    """The stages that `stage` may pass work on to: the next; any, where code of a user's own decides (a detour)."""
    following = pipeline.after(stage)
    if stage.executor is not None:
        return list(pipeline.stage)
    return [following] if following else []


def _presence_of_own(pipeline: Pipeline, stage: StageTable) -> Iterator[Right]:
    topics = pipeline.topics(stage)
    yield Right("readwrite", topics.all_presence)  # its own record, and those of its peers
    yield Right("read", topics.inbox("+"))


def _stage(pipeline: Pipeline, stage: StageTable) -> Iterator[Right]:
    yield from _presence_of_own(pipeline, stage)
    yield Right("read", pipeline.topics(stage).front_door)
    for each in receivers(pipeline, stage):
        yield Right("read", pipeline.topics(each).all_presence)
        yield Right("write", pipeline.topics(each).inbox("+"))
    for each in pipeline.stage:
        if stage in receivers(pipeline, each):  # to say that there is room again
            yield Right("write", pipeline.topics(each).inbox("+"))
    yield _answers(pipeline)


def _training_stage(pipeline: Pipeline, stage: StageTable) -> Iterator[Right]:
    """The first stage conducts: it hears of all and writes to all; the others hear of it, and know their neighbours."""
    yield from _presence_of_own(pipeline, stage)
    first, index = pipeline.stage[0], pipeline.stage.index(stage)
    if stage == first:
        for each in pipeline.stage:
            yield Right("read", pipeline.topics(each).all_presence)
            yield Right("write", pipeline.topics(each).inbox("+"))
        yield Right("read", source_presence(pipeline.source.site, pipeline.name, "+"))
    else:
        yield Right("read", pipeline.topics(first).all_presence)
        for each in (first, *pipeline.stage[index - 1 : index], *pipeline.stage[index + 1 : index + 2]):
            yield Right("write", pipeline.topics(each).inbox("+"))
    yield _answers(pipeline)


def _answers(pipeline: Pipeline) -> Right:
    """To sources of this site; which pipeline a source belongs to is not in its topic."""
    return Right("write", source_inbox(pipeline.source.site, "+"))


# Others -----------------------------------------------------------------------------------------------------------


def _source(pipeline: Pipeline) -> Iterator[Right]:
    site = pipeline.source.site
    yield Right("read", source_inbox(site, "+"))  # each source takes a name of its own
    yield Right("readwrite" if pipeline.trains else "write", source_presence(site, pipeline.name, "+"))
    # What trains hears of the conductor only, and writes to all of the crew; else it is the other way round.
    heard = pipeline.stage[:1] if pipeline.trains else pipeline.stage
    told = pipeline.stage if pipeline.trains else pipeline.stage[:1]
    yield from (Right("read", pipeline.topics(stage).all_presence) for stage in heard)
    yield from (Right("write", pipeline.topics(stage).inbox("+")) for stage in told)
    if pipeline.source.kind == "ingress" and not pipeline.trains:
        yield Right("read", ingress(site))
    yield Right("write", results(site))


def _bridge(pipeline: Pipeline, other: str, site: str) -> Iterator[Right]:
    """What the bridge that the broker of `other` keeps to this one may take from here, and bring."""
    for rule in rules(pipeline.sites.crossing(other, site)):
        yield Right("read" if rule.direction == "in" else "write", rule.topic_filter)


def _operator(pipeline: Pipeline) -> Iterator[Right]:
    """All of the above, so that `sparse run` and whatever it starts do with one identity; and to examine the broker."""
    yield Right("readwrite", examined("#"))
    for each in all_sites(pipeline):
        yield Right("readwrite", everything_of(each, pipeline.name))
        yield Right("readwrite", everything_of(each, DOCTOR))
    home = pipeline.source.site
    yield Right("readwrite", source_inbox(home, "+"))
    yield Right("readwrite", results(home))
    yield Right("readwrite", ingress(home))
