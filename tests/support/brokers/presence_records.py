"""Presence records of workers and sources for tests."""

from __future__ import annotations

from typing import Any

from brokers.dispatch.presence import SourceLoad, SourceRecord, WorkerLoad, WorkerRecord


def make_worker_record(
    worker: str = "w", *, capacity: int = 2, task_ms: float = 10.0, pid: int = 1, **fields: Any
) -> WorkerRecord:
    """The record of a worker of stage `head` of pipeline `street`."""
    default = {"stage": "head", "pipeline": "street", "site": "local", "node": "n", "device": "cpu", "fingerprint": "f"}
    load = {"load": WorkerLoad(task_ms=task_ms)}
    return WorkerRecord.model_validate(
        {**default, **load, "worker": worker, "capacity": capacity, "pid": pid, **fields}
    )


def worker_publication(
    worker: str = "w1", stage: str = "body", *, pipeline: str = "street", site: str = "local", **fields: Any
) -> tuple[str, WorkerRecord]:
    """A presence topic and the record on it; fields of the load may be given as fields of the record."""
    load = {name: fields.pop(name) for name in list(fields) if name in WorkerLoad.model_fields}
    defaults = {"node": "here", "pid": 1, "device": "cpu", "fingerprint": "", "capacity": 3, "load": WorkerLoad(**load)}
    names = {"worker": worker, "stage": stage, "pipeline": pipeline, "site": site}
    record = WorkerRecord.model_validate({**defaults, **names, **fields})
    return record.topic, record


def source_publication(source: str = "cam", *, node: str = "here", **load: Any) -> tuple[str, SourceRecord]:
    """A presence topic and the record on it, of a source of pipeline `street`."""
    record = SourceRecord(
        source=source, pipeline="street", site="local", node=node, pid=1, load=SourceLoad.model_validate(load)
    )
    return record.topic, record
