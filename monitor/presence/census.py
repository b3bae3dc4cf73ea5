"""Who is up at all of a broker's stages, kept for as long as a daemon lives. Pure.

Anybody who may publish there may make records up, and a daemon sees workers come and go for months. So:

* A record counts only on the topic of whom it names: nobody speaks for a worker of another topic.
* What nobody can read the figures of is not kept, and texts are cut.
* A worker or source that fell silent long ago makes room. A stage that has lost its workers is remembered for longer:
  whoever scales it asks on, and must be told 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from brokers.config.pipeline_file import Pipeline
from brokers.dispatch.presence import Birth, SourceBirth
from brokers.errors import BadPayload
from brokers.protocol.messages import JSON
from brokers.protocol.topics import StageTopics, source_presence
from monitor.presence.presence_table import Roll

# Silent for so long, a worker or source is not spoken of any more, whatever record the broker may still have of it.
FORGOTTEN_S = 300.0
# Without any worker for so long, a stage is not spoken of any more, unless it was asked for by name.
STAGE_FORGOTTEN_S = 3600.0
# Stages that are spoken of: more than anybody watches in one place.
STAGES_LIMIT = 256
TEXT_CHARACTERS = 128


class Place(NamedTuple):
    """A stage of a pipeline, at a site."""

    site: str
    pipeline: str
    stage: str


@dataclass(slots=True)
class Census(Roll):
    """A `Roll` that stays small and true for as long as it is kept."""

    expected: frozenset[Place] = frozenset()  # spoken of whether they have workers or not
    _stages_s: dict[Place, float] = field(default_factory=dict)  # when a worker of it was heard last

    def present(self, now_s: float) -> dict[Place, list[Birth]]:
        """The workers of each stage that are not lost; none, of a stage whose workers are gone."""
        found: dict[Place, list[Birth]] = {place: [] for place in sorted({*self.expected, *self._stages_s})}
        for birth in self.workers_here(now_s):
            found.setdefault(place_of(birth), []).append(birth)
        return found

    def workers_here(self, now_s: float) -> list[Birth]:
        """The workers that are not lost, in the order in which they came."""
        return [birth for topic, birth in self.workers.items() if not self.is_lost(topic, now_s)]

    def workers_lost(self, now_s: float) -> list[Birth]:
        """The others."""
        return [birth for topic, birth in self.workers.items() if self.is_lost(topic, now_s)]

    def sources_here(self, now_s: float) -> list[SourceBirth]:
        """The sources that are not lost, in the order in which they came."""
        return [birth for topic, birth in self.sources.items() if not self.is_lost(topic, now_s)]

    def heard_since(self, since_s: float) -> list[Birth | SourceBirth]:
        """The newest records of the workers and sources that were heard live at that moment or later."""
        births: dict[str, Birth | SourceBirth] = {**self.workers, **self.sources}
        return [birth for topic, birth in births.items() if topic in self._alive and self._heard_s[topic] >= since_s]

    def forget(self, now_s: float) -> None:
        """Let go of whoever has been silent for long; to be called now and then."""
        silent = [topic for topic, heard_s in self._heard_s.items() if now_s - heard_s > FORGOTTEN_S]
        for topic in silent:
            self.heard_birth(topic, b"", now_s)
        for place in [place for place, heard_s in self._stages_s.items() if now_s - heard_s > STAGE_FORGOTTEN_S]:
            del self._stages_s[place]

    def _checked(self, topic: str, record: Birth | SourceBirth, now_s: float) -> Birth | SourceBirth:
        if isinstance(record, SourceBirth):
            if topic != source_presence(record.site, record.pipeline, record.source):
                raise BadPayload(JSON, f"the record of source {record.source!r} is on another's topic")
            return record.model_copy(update={"node": record.node[:TEXT_CHARACTERS]})
        if topic != StageTopics(record.site, record.pipeline, record.stage).presence(record.worker):
            raise BadPayload(JSON, f"the record of worker {record.worker!r} is on another's topic")
        known = (place := place_of(record)) in self._stages_s or place in self.expected
        if not known and len(self._stages_s) >= STAGES_LIMIT:
            raise BadPayload(JSON, f"a worker of one more stage than the {STAGES_LIMIT} that are watched")
        self._stages_s[place] = now_s
        texts = {name: getattr(record, name)[:TEXT_CHARACTERS] for name in ("node", "device", "fingerprint")}
        return record.model_copy(update={**texts, "formats": (), "training": None})


def census(pipeline: Pipeline | None) -> Census:
    """Of everything at a broker, or of one pipeline, whose stages are then spoken of from the beginning."""
    if pipeline is None:
        return Census()
    places = frozenset(Place(stage.site, pipeline.name, stage.name) for stage in pipeline.stage)
    return Census(pipeline.name, expected=places)


def place_of(birth: Birth) -> Place:
    """The stage that a worker serves."""
    return Place(birth.site, birth.pipeline, birth.stage)
