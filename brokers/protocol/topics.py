"""The topic grammar: the only place where a topic is put together or taken apart.

The site that comes first is the site of the one who *reads* the topic, so that a bridge needs only prefixes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from brokers.errors import UsageError

ROOT = "sparse"
# The second level of a topic that is not a pipeline; a pipeline of such a name could not be told apart.
RESERVED_PIPELINE_NAMES = frozenset({"ingress", "results", "source"})
# The level of a stage in the presence of a source; a stage of this name could not be told apart.
SOURCE_LEVEL = "source"
# The site, and across a bridge the pipeline, of what `sparse broker doctor` tries.
DOCTOR_LEVEL = "doctor"
NAME_PATTERN = r"^[A-Za-z0-9_.-]{1,64}$"
_NAME = re.compile(NAME_PATTERN)


def validate_name(what: str, name: str) -> str:
    """`name`, if it can be one level of a topic; `what` says in the error what was being named."""
    taken = {"pipeline": RESERVED_PIPELINE_NAMES, "stage": {SOURCE_LEVEL}}.get(what, ())
    if not _NAME.fullmatch(name) or name in taken:
        reserved = f"; {', '.join(sorted(taken))} cannot be used" if taken else ""
        message = f"{what} {name!r} is not a name: expected 1 to 64 letters, digits, '_', '-' or '.'{reserved}"
        raise UsageError("BadName", message, name=name)
    return name


@dataclass(frozen=True, slots=True)
class StageTopics:
    """Where one stage of one pipeline at one site is reached."""

    site: str
    pipeline: str
    stage: str

    @property
    def _base(self) -> str:
        return f"{ROOT}/{self.site}/{self.pipeline}/{self.stage}"

    @property
    def shared_task_topic(self) -> str:
        """Whole messages from any MQTT 5 client."""
        return f"{self._base}/tasks"

    @property
    def shared_task_filter(self) -> str:
        """The subscription of the workers: each message goes to one of them."""
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
        """The same topics in other words: a client that sends to its own stage listens there twice, by two filters."""
        return f"{self._base}/up/#"


def ingress_topic(site: str, source: str = "+") -> str:
    """Raw frames and readings, from any MQTT client."""
    return f"{ROOT}/{site}/ingress/{source}"


def results_topic(site: str, source: str = "+") -> str:
    """Results as JSON, for any MQTT client."""
    return f"{ROOT}/{site}/results/{source}"


def source_inbox_topic(site: str, source: str) -> str:
    """Replies to one source."""
    return f"{ROOT}/{site}/source/{source}/inbox"


def source_presence_topic(site: str, pipeline: str, source: str) -> str:
    """The record of one source: where a bridge that carries presence finds it too."""
    return StageTopics(site, pipeline, SOURCE_LEVEL).presence(source)


def all_presence_filter(site: str = "+", pipeline: str = "+") -> str:
    """The records of all workers and sources."""
    return f"{ROOT}/{site}/{pipeline}/+/up/+"


def pipeline_filter(site: str, pipeline: str) -> str:
    """All topics of a pipeline's stages at a site, as a filter."""
    return f"{ROOT}/{site}/{pipeline}/#"


def doctor_topic(*levels: str) -> str:
    """What `sparse broker doctor` tries a broker with: nobody else reads or writes it, and no bridge carries it."""
    return "/".join((ROOT, DOCTOR_LEVEL, *levels))


def inbound_filters(site: str) -> tuple[tuple[str, Literal[0, 1]], ...]:
    """All that others may have for those who read at a site, as filters, and at which QoS."""
    anybody = StageTopics(site, "+", "+")
    return (
        (anybody.inbox("+"), 0),
        (source_inbox_topic(site, "+"), 0),
        (anybody.shared_task_topic, 1),
        (ingress_topic(site), 1),
        (results_topic(site), 1),
    )


def is_source_presence(topic: str) -> bool:
    """Whether a presence topic is that of a source, not of a worker."""
    return topic.split("/")[3:4] == [SOURCE_LEVEL]


def is_valid_reply_topic(topic: str) -> bool:
    """Whether an answer may go there; of our own topics, not those whose readers would take it for something else.

    A worker answers where it is told to, with its own rights: it must not be made to speak for others.
    """
    levels = topic.split("/")
    if levels[0] != ROOT:
        return True
    return "ingress" not in levels[2:3] and not {"up", "tasks"} & set(levels[4:5])


def last_level(topic: str) -> str:
    """The name at the end: the source of an ingress or results topic, the worker of a presence topic."""
    return topic.rsplit("/", 1)[-1]
