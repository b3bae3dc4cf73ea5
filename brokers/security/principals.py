"""Names of the clients and brokers of a pipeline: common names of their certificates, or their user names.

A name states the role of its bearer, so an access list needs no other table. Names are unique under one CA.
"""

from brokers.config.pipeline_file import Pipeline
from brokers.config.schema import StageTable
from brokers.errors import BadFile

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
    """Return the names of all clients of a pipeline's brokers."""
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
