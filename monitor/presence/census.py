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
from brokers.dispatch.presence import SourceRecord, WorkerRecord
from brokers.errors import BadPayload
from brokers.protocol.messages import JSON
from brokers.protocol.topics import StageTopics, source_presence_topic
from monitor.presence.presence_table import PresenceTable

# Silent for so long, a worker or source is not spoken of any more, whatever record the broker may still have of it.
EXPIRY_S = 300.0
# Without any worker for so long, a stage is not spoken of any more, unless it was asked for by name.
STAGE_EXPIRY_S = 3600.0
# Stages that are spoken of: more than anybody watches in one place.
STAGES_LIMIT = 256
TEXT_LIMIT_CHARACTERS = 128


class StageKey(NamedTuple):
    """A stage of a pipeline, at a site."""

    site: str
    pipeline: str
    stage: str


@dataclass(slots=True)
class ExpiringPresenceTable(PresenceTable):
    """A `PresenceTable` that stays small and true for as long as it is kept."""

    expected_stages: frozenset[StageKey] = frozenset()  # spoken of whether they have workers or not
    _stages_s: dict[StageKey, float] = field(default_factory=dict)  # when a worker of it was heard last

    def live_workers_by_stage(self, now_s: float) -> dict[StageKey, list[WorkerRecord]]:
        """The workers of each stage that are not lost; none, of a stage whose workers are gone."""
        found: dict[StageKey, list[WorkerRecord]] = {
            place: [] for place in sorted({*self.expected_stages, *self._stages_s})
        }
        for birth in self.live_workers(now_s):
            found.setdefault(stage_key(birth), []).append(birth)
        return found

    def live_workers(self, now_s: float) -> list[WorkerRecord]:
        """The workers that are not lost, in the order in which they came."""
        return [birth for topic, birth in self.workers.items() if not self.is_lost(topic, now_s)]

    def lost_workers(self, now_s: float) -> list[WorkerRecord]:
        """The others."""
        return [birth for topic, birth in self.workers.items() if self.is_lost(topic, now_s)]

    def live_sources(self, now_s: float) -> list[SourceRecord]:
        """The sources that are not lost, in the order in which they came."""
        return [birth for topic, birth in self.sources.items() if not self.is_lost(topic, now_s)]

    def updated_since(self, since_s: float) -> list[WorkerRecord | SourceRecord]:
        """The newest records of the workers and sources that were heard live at that moment or later."""
        births: dict[str, WorkerRecord | SourceRecord] = {**self.workers, **self.sources}
        return [
            birth for topic, birth in births.items() if topic in self._confirmed and self._last_seen_s[topic] >= since_s
        ]

    def expire(self, now_s: float) -> None:
        """Let go of whoever has been silent for long; to be called now and then."""
        silent = [topic for topic, heard_s in self._last_seen_s.items() if now_s - heard_s > EXPIRY_S]
        for topic in silent:
            self.on_presence(topic, b"", now_s)
        for place in [place for place, heard_s in self._stages_s.items() if now_s - heard_s > STAGE_EXPIRY_S]:
            del self._stages_s[place]

    def _validate(self, topic: str, record: WorkerRecord | SourceRecord, now_s: float) -> WorkerRecord | SourceRecord:
        if isinstance(record, SourceRecord):
            if topic != source_presence_topic(record.site, record.pipeline, record.source):
                raise BadPayload(JSON, f"the record of source {record.source!r} is on another's topic")
            return record.model_copy(update={"node": record.node[:TEXT_LIMIT_CHARACTERS]})
        if topic != StageTopics(record.site, record.pipeline, record.stage).presence(record.worker):
            raise BadPayload(JSON, f"the record of worker {record.worker!r} is on another's topic")
        known = (place := stage_key(record)) in self._stages_s or place in self.expected_stages
        if not known and len(self._stages_s) >= STAGES_LIMIT:
            raise BadPayload(JSON, f"a worker of one more stage than the {STAGES_LIMIT} that are watched")
        self._stages_s[place] = now_s
        texts = {name: getattr(record, name)[:TEXT_LIMIT_CHARACTERS] for name in ("node", "device", "fingerprint")}
        return record.model_copy(update={**texts, "formats": (), "training": None})


def create_presence_table(pipeline: Pipeline | None) -> ExpiringPresenceTable:
    """Of everything at a broker, or of one pipeline, whose stages are then spoken of from the beginning."""
    if pipeline is None:
        return ExpiringPresenceTable()
    places = frozenset(StageKey(stage.site, pipeline.name, stage.name) for stage in pipeline.stage)
    return ExpiringPresenceTable(pipeline.name, expected_stages=places)


def stage_key(birth: WorkerRecord) -> StageKey:
    """The stage that a worker serves."""
    return StageKey(birth.site, birth.pipeline, birth.stage)
