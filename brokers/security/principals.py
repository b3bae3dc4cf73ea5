"""Who comes to a pipeline's brokers, and under which name: that of its certificate, or of its password. Pure.

A name says what its bearer is, so that an access list needs no other table; no two of one authority may be alike.
"""

from __future__ import annotations

from brokers.config.pipeline_file import Pipeline
from brokers.config.schema import StageTable
from brokers.errors import BadFile

VIEWER = "viewer"  # reads results
MONITOR = "monitor"  # reads presence
OPERATOR = "operator"  # may do whatever any of the others may
_BROKER, _CAMERA = "broker", "camera"
# RFC 5280, appendix A: ub-common-name.
COMMON_NAME_LIMIT = 64


def broker_username(site: str) -> str:
    """The broker of a site: to its clients, and to the brokers that it keeps bridges to."""
    return f"{_BROKER}.{site}"


def stage_username(pipeline: Pipeline, stage: StageTable) -> str:
    """The workers of a stage."""
    return f"{pipeline.name}.{stage.name}"


def source_username(pipeline: Pipeline) -> str:
    """The sources of a pipeline, or its gateway; no stage has this name."""
    return f"{pipeline.name}.source"


def camera_username(camera: str) -> str:
    """An MQTT client that publishes to the ingress of its site."""
    return f"{_CAMERA}.{camera}"


def all_sites(pipeline: Pipeline) -> tuple[str, ...]:
    """The sites that have a broker: those of the file, and `local` where it names none."""
    return tuple(dict.fromkeys([*(site.name for site in pipeline.site), *pipeline.used_sites]))


def check_usernames(pipeline: Pipeline) -> None:
    """Raise `BadFile` for names that could be taken for others, or that do not fit into a certificate."""
    name = pipeline.name
    if name in (_BROKER, _CAMERA) or "." in name:
        raise BadFile(
            pipeline.path,
            f"{name!r} cannot be told apart where doors are locked: expected a name without a dot, "
            f"and neither {_BROKER!r} nor {_CAMERA!r}",
            "pipeline.name",
        )
    sites = {camera: site.name for site in pipeline.site for camera in site.cameras}
    names = [
        *(stage_username(pipeline, stage) for stage in pipeline.stage),
        *map(broker_username, all_sites(pipeline)),
        *map(camera_username, sites),
    ]
    for each in names:
        if len(each) > COMMON_NAME_LIMIT:
            raise BadFile(
                pipeline.path,
                f"{each!r} has {len(each)} characters, a certificate's name has at most {COMMON_NAME_LIMIT}",
            )
    for site in pipeline.site:
        for camera in site.cameras:
            if sites[camera] != site.name:
                raise BadFile(
                    pipeline.path,
                    f"{camera!r} is at {site.name!r} and at {sites[camera]!r}: one camera has one site",
                    "site.cameras",
                )
