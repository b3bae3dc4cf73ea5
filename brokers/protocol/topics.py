"""The topic grammar: the only place where topics are built and parsed.

A topic starts with the site of its *reader*, so that bridges between sites need prefixes only.
"""

import re
from dataclasses import dataclass
from typing import Literal

from brokers.errors import UsageError

ROOT = "sparse"
# The second level of the topics that are not of a pipeline, and so not names of pipelines.
RESERVED_PIPELINE_NAMES = frozenset({"ingress", "results", "source"})
SOURCE_LEVEL = "source"  # in the presence topic of a source, the level of the stage; not the name of a stage
DOCTOR_LEVEL = "doctor"  # the site that `sparse broker doctor` uses, and its pipeline where it tests a bridge
NAME_PATTERN = r"^[A-Za-z0-9_.-]{1,64}$"
_NAME = re.compile(NAME_PATTERN)


def validate_name(what: str, name: str) -> str:
    """Return `name` if it can be one level of a topic, else raise `UsageError` ("BadName") for this kind of name."""
    reserved = {"pipeline": RESERVED_PIPELINE_NAMES, "stage": {SOURCE_LEVEL}}.get(what, set())
    if not _NAME.fullmatch(name) or name in reserved:
        exceptions = f", but not {', '.join(sorted(reserved))}" if reserved else ""
        message = f"{what} {name!r} is not a name: expected 1 to 64 letters, digits, '_', '-' or '.'{exceptions}"
        raise UsageError("BadName", message, name=name)
    return name


@dataclass(frozen=True, slots=True)
class StageTopics:
    """The topics of one stage of one pipeline at one site."""

    site: str
    pipeline: str
    stage: str

    @property
    def _base(self) -> str:
        return f"{ROOT}/{self.site}/{self.pipeline}/{self.stage}"

    @property
    def shared_task_topic(self) -> str:
        """The topic for whole tasks in one message, from any MQTT 5 client."""
        return f"{self._base}/tasks"

    @property
    def shared_task_filter(self) -> str:
        """The shared subscription of the workers: each message goes to one of them."""
        return f"$share/{self.pipeline}.{self.stage}/{self.shared_task_topic}"

    def inbox(self, worker: str) -> str:
        return f"{self._base}/in/{worker}"

    def presence(self, worker: str) -> str:
        return f"{self._base}/up/{worker}"

    @property
    def presence_filter(self) -> str:
        return self.presence("+")

    @property
    def peer_presence_filter(self) -> str:
        """Equivalent to `presence_filter`, but a different filter: one client can subscribe to both independently."""
        return f"{self._base}/up/#"


def ingress_topic(site: str, source: str = "+") -> str:
    """The topic for raw frames and readings from any MQTT client."""
    return f"{ROOT}/{site}/ingress/{source}"


def results_topic(site: str, source: str = "+") -> str:
    """The topic of results as JSON, for any MQTT client."""
    return f"{ROOT}/{site}/results/{source}"


def source_inbox_topic(site: str, source: str) -> str:
    """The topic of replies to one source."""
    return f"{ROOT}/{site}/source/{source}/inbox"


def source_presence_topic(site: str, pipeline: str, source: str) -> str:
    """The topic of the presence record of a source; the presence filter of a bridge matches it too."""
    return StageTopics(site, pipeline, SOURCE_LEVEL).presence(source)


def all_presence_filter(site: str = "+", pipeline: str = "+") -> str:
    """The filter for the presence records of all workers and sources."""
    return f"{ROOT}/{site}/{pipeline}/+/up/+"


def pipeline_filter(site: str, pipeline: str) -> str:
    """The filter for all topics of a pipeline's stages at a site."""
    return f"{ROOT}/{site}/{pipeline}/#"


def doctor_topic(*levels: str) -> str:
    """A topic that only `sparse broker doctor` uses, and that no bridge carries."""
    return "/".join((ROOT, DOCTOR_LEVEL, *levels))


def inbound_filters(site: str) -> tuple[tuple[str, Literal[0, 1]], ...]:
    """The filters, and the QoS, of all messages from other sites to readers at this site."""
    any_stage = StageTopics(site, "+", "+")
    return (
        (any_stage.inbox("+"), 0),
        (source_inbox_topic(site, "+"), 0),
        (any_stage.shared_task_topic, 1),
        (ingress_topic(site), 1),
        (results_topic(site), 1),
    )


def is_source_presence(topic: str) -> bool:
    """Whether a presence topic is that of a source, not of a worker."""
    return topic.split("/")[3:4] == [SOURCE_LEVEL]


def is_valid_reply_topic(topic: str) -> bool:
    """Whether a worker may reply to this topic: any outside Sparse; of ours, no presence, shared task or ingress topic.

    A worker replies with its own access rights, so a client must not make it publish what that client could not.
    """
    levels = topic.split("/")
    return levels[0] != ROOT or ("ingress" not in levels[2:3] and not {"up", "tasks"} & set(levels[4:5]))


def last_level(topic: str) -> str:
    """The last level: the source of an ingress or results topic, the worker of a presence topic."""
    return topic.rsplit("/", 1)[-1]
