"""Presence records of workers and sources, on the topics where they belong."""

from __future__ import annotations

from typing import Any

from brokers.dispatch.presence import SourceLoad, SourceRecord, WorkerLoad, WorkerRecord
from brokers.protocol.topics import StageTopics, source_presence_topic


def worker_record(
    worker: str = "w1", stage: str = "body", *, pipeline: str = "street", site: str = "local", **fields: Any
) -> tuple[str, WorkerRecord]:
    """Its topic, and a record; what is a field of a load is one of its own."""
    load = {name: fields.pop(name) for name in list(fields) if name in WorkerLoad.model_fields}
    given = {"node": "here", "pid": 1, "device": "cpu", "fingerprint": "", "capacity": 3, "load": WorkerLoad(**load)}
    names = {"worker": worker, "stage": stage, "pipeline": pipeline, "site": site}
    return StageTopics(site, pipeline, stage).presence(worker), WorkerRecord.model_validate(
        {**given, **names, **fields}
    )


def source_record(source: str = "cam", *, node: str = "here", **load: Any) -> tuple[str, SourceRecord]:
    """Its topic, and a record of a source of `street`."""
    birth = SourceRecord(
        source=source, pipeline="street", site="local", node=node, pid=1, load=SourceLoad.model_validate(load)
    )
    return source_presence_topic("local", "street", source), birth
