"""The topic grammar: the only place where a topic is put together or taken apart.

The site that comes first is the site of the one who *reads* the topic, so that a bridge needs only prefixes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from brokers.errors import BadName

ROOT = "sparse"
# The second level of a topic that is not a pipeline; a pipeline of such a name could not be told apart.
RESERVED = frozenset({"ingress", "results", "source"})
# The level of a stage in the presence of a source; a stage of this name could not be told apart.
SOURCE = "source"
# The site, and across a bridge the pipeline, of what `sparse broker doctor` tries.
DOCTOR = "doctor"
NAME_PATTERN = r"^[A-Za-z0-9_.-]{1,64}$"
_NAME = re.compile(NAME_PATTERN)


def checked_name(what: str, name: str) -> str:
    """`name`, if it can be one level of a topic; `what` says in the error what was being named."""
    taken = {"pipeline": RESERVED, "stage": {SOURCE}}.get(what, ())
    if not _NAME.fullmatch(name) or name in taken:
        raise BadName(what, name)
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
    def front_door(self) -> str:
        """Whole messages from any MQTT 5 client."""
        return f"{self._base}/tasks"

    @property
    def shared_front_door(self) -> str:
        """The subscription of the workers: each message goes to one of them."""
        return f"$share/{self.pipeline}.{self.stage}/{self.front_door}"

    def inbox(self, worker: str) -> str:
        return f"{self._base}/in/{worker}"

    def presence(self, worker: str) -> str:
        return f"{self._base}/up/{worker}"

    @property
    def all_presence(self) -> str:
        return self.presence("+")

    @property
    def presence_of_peers(self) -> str:
        """The same topics in other words: a client that sends to its own stage listens there twice, by two filters."""
        return f"{self._base}/up/#"


def ingress(site: str, source: str = "+") -> str:
    """Raw frames and readings, from any MQTT client."""
    return f"{ROOT}/{site}/ingress/{source}"


def results(site: str, source: str = "+") -> str:
    """Results as JSON, for any MQTT client."""
    return f"{ROOT}/{site}/results/{source}"


def source_inbox(site: str, source: str) -> str:
    """Replies to one source."""
    return f"{ROOT}/{site}/source/{source}/inbox"


def source_presence(site: str, pipeline: str, source: str) -> str:
    """The record of one source: where a bridge that carries presence finds it too."""
    return StageTopics(site, pipeline, SOURCE).presence(source)


def every_presence(site: str = "+", pipeline: str = "+") -> str:
    """The records of all workers and sources."""
    return f"{ROOT}/{site}/{pipeline}/+/up/+"


def everything_of(site: str, pipeline: str) -> str:
    """All topics of a pipeline's stages at a site, as a filter."""
    return f"{ROOT}/{site}/{pipeline}/#"


def examined(*levels: str) -> str:
    """What `sparse broker doctor` tries a broker with: nobody else reads or writes it, and no bridge carries it."""
    return "/".join((ROOT, DOCTOR, *levels))


def for_readers(site: str) -> tuple[tuple[str, Literal[0, 1]], ...]:
    """All that others may have for those who read at a site, as filters, and at which QoS."""
    anybody = StageTopics(site, "+", "+")
    return (
        (anybody.inbox("+"), 0),
        (source_inbox(site, "+"), 0),
        (anybody.front_door, 1),
        (ingress(site), 1),
        (results(site), 1),
    )


def tells_of_source(topic: str) -> bool:
    """Whether a presence topic is that of a source, not of a worker."""
    return topic.split("/")[3:4] == [SOURCE]


def is_answerable(topic: str) -> bool:
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
