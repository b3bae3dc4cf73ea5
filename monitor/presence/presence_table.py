"""The workers and sources at a broker, from their presence records: for the live view, and for the daemon.

`WorkerRegistry` reads the records and decides which count. A daemon keeps the table for months, and any client may
publish to it, so this module adds:

* The texts of a record are cut, and lists that no reader of the table needs are dropped.
* A stage is remembered for an hour after its last worker: an autoscaler goes on asking, and must be answered 0.
* There are at most STAGES_LIMIT stages, beside those of the pipeline file.
"""

import json
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from brokers.config.pipeline_file import Pipeline
from brokers.dispatch.presence import SourceRecord, WorkerRecord
from brokers.dispatch.worker_registry import WorkerRegistry

STAGE_EXPIRY_S = 3600.0
STAGES_LIMIT = 256
TEXT_LIMIT_CHARACTERS = 128
_DEPARTED_SOURCES_LIMIT = 8
_NOTICES_LIMIT = 32


class StageKey(NamedTuple):
    """A stage of a pipeline, at a site."""

    site: str
    pipeline: str
    stage: str


@dataclass(slots=True)
class PresenceTable:
    """The newest record of each worker and source. Times are monotonic seconds of the listener.

    Subclasses add the results of the work: `add_result`.
    """

    pipeline: str = ""  # its results count; empty: those of every pipeline
    expected_stages: frozenset[StageKey] = frozenset()  # listed whether they have workers or not
    rejected: int = 0  # malformed records and results
    results_received: int = 0  # of the pipeline: results, failures and events
    notices: deque[str] = field(default_factory=lambda: deque(maxlen=_NOTICES_LIMIT))  # lines to print once
    registry: WorkerRegistry = field(default_factory=WorkerRegistry)
    _stages_seen_s: dict[StageKey, float] = field(default_factory=dict)  # when a worker of the stage last reported
    _departed: deque[SourceRecord] = field(default_factory=lambda: deque(maxlen=_DEPARTED_SOURCES_LIMIT))

    def on_presence(self, topic: str, payload: bytes, now_s: float, *, retained: bool = False) -> None:
        """Apply one publication on a presence topic."""
        for event in self.registry.on_message(topic, payload, now_s, retained=retained):
            if event.kind == "rejected":
                self.rejected += 1
            elif event.kind == "lost":
                if event.source is not None and event.reason == "removed":
                    self._departed.append(event.source)
            elif event.worker is not None:
                self._keep_worker(topic, event.worker, now_s)
            elif event.source is not None:
                self.registry.sources[topic].record = event.source.model_copy(update={"node": _cut(event.source.node)})

    def _keep_worker(self, topic: str, record: WorkerRecord, now_s: float) -> None:
        key = stage_key(record)
        is_known = key in self._stages_seen_s or key in self.expected_stages
        if not is_known and len(self._stages_seen_s) >= STAGES_LIMIT:
            self.rejected += 1
            del self.registry.workers[topic]
            return
        self._stages_seen_s[key] = now_s
        texts = {name: _cut(getattr(record, name)) for name in ("node", "device", "fingerprint")}
        change = {**texts, "formats": (), "training": None}
        self.registry.workers[topic].record = record.model_copy(update=change)

    def expire(self, now_s: float) -> None:
        """Forget workers and sources that have been silent for long, and stages without workers; call it regularly."""
        self.registry.tick(now_s)
        self._stages_seen_s = {
            key: seen_s for key, seen_s in self._stages_seen_s.items() if now_s - seen_s <= STAGE_EXPIRY_S
        }

    # Records ------------------------------------------------------------------------------------------------------

    @property
    def workers(self) -> dict[str, WorkerRecord]:
        """The workers' records by presence topic, the first to appear first."""
        return {topic: entry.record for topic, entry in self.registry.workers.items()}

    @property
    def sources(self) -> dict[str, SourceRecord]:
        """The sources' records by presence topic, the first to appear first."""
        return {topic: entry.record for topic, entry in self.registry.sources.items()}

    def is_lost(self, topic: str, now_s: float) -> bool:
        """Whether a worker is silent: it is frozen or cut off."""
        return self.registry.workers[topic].is_silent(now_s)

    def stages_up(self) -> set[str]:
        """The stages that have a worker in state "up"."""
        return {record.stage for record in self.workers.values() if record.state == "up"}

    def live_workers(self, now_s: float) -> list[WorkerRecord]:
        """The workers that are not silent."""
        return [entry.record for entry in self.registry.workers.values() if not entry.is_silent(now_s)]

    def lost_workers(self, now_s: float) -> list[WorkerRecord]:
        """The workers that are silent."""
        return [entry.record for entry in self.registry.workers.values() if entry.is_silent(now_s)]

    def live_sources(self, now_s: float) -> list[SourceRecord]:
        """The sources that are not silent."""
        return [entry.record for entry in self.registry.sources.values() if not entry.is_silent(now_s)]

    def live_workers_by_stage(self, now_s: float) -> dict[StageKey, list[WorkerRecord]]:
        """The workers of each stage that are not silent; an empty list for a stage that has none any more."""
        keys = sorted({*self.expected_stages, *self._stages_seen_s})
        result: dict[StageKey, list[WorkerRecord]] = {key: [] for key in keys}
        for record in self.live_workers(now_s):
            result.setdefault(stage_key(record), []).append(record)
        return result

    def updated_since(self, since_s: float) -> list[WorkerRecord | SourceRecord]:
        """The records of the workers and sources that reported at `since_s` or later; retained records do not count."""
        entries = self.registry.entries()
        return [entry.record for entry in entries if entry.is_live and entry.last_seen_s >= since_s]

    def problem_counts(self) -> dict[str, Counter[str]]:
        """The sums over all sources, also those that have left, of retried, dropped and failed, by reason."""
        result = {"retried": Counter[str](), "dropped": Counter[str](), "failed": Counter[str]()}
        for record in (*self._departed, *self.sources.values()):
            result["retried"].update(record.load.retries)
            result["dropped"].update(record.load.dropped)
            result["failed"].update(record.load.failed)
        return result

    def on_result(self, payload: bytes, now_s: float) -> None:
        """Apply a publication on a results topic; ignore one of another pipeline, and count a malformed one."""
        try:
            result = json.loads(payload)
            if not self.pipeline or result.get("pipeline", self.pipeline) == self.pipeline:
                self.add_result(result, now_s)
                self.results_received += 1
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            self.rejected += 1

    def add_result(self, result: dict[str, Any], now_s: float) -> None:
        """Apply a result or an event of the pipeline; raises for a malformed one."""


def create_presence_table(pipeline: Pipeline | None) -> PresenceTable:
    """A table of everything at a broker, or one that lists the stages of a pipeline from the start."""
    if pipeline is None:
        return PresenceTable()
    keys = frozenset(StageKey(stage.site, pipeline.name, stage.name) for stage in pipeline.stage)
    return PresenceTable(pipeline.name, expected_stages=keys)


def stage_key(record: WorkerRecord) -> StageKey:
    """The stage that a worker serves."""
    return StageKey(record.site, record.pipeline, record.stage)


def _cut(text: str) -> str:
    return text[:TEXT_LIMIT_CHARACTERS]
