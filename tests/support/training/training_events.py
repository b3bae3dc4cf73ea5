"""The events of a training run, as its source publishes them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

EventDict = dict[str, Any]
SOURCE_AND_PIPELINE = {"source": "digits", "pipeline": "digits"}


def stage_times(name: str, worker: str = "", forward_ms: float = 8.0, backward_ms: float = 12.0) -> EventDict:
    """The times of one stage in one step of four micro-batches."""
    return {
        "stage": name, "worker": worker or f"{name}-1", "queue_ms": 4.0, "decode_ms": 2.0,
        "compute_ms": forward_ms + backward_ms + 4.0, "encode_ms": 1.0, "forward_ms": forward_ms,
        "backward_ms": backward_ms, "bytes_in": 1000, "bytes_out": 2000,
    }  # fmt: skip


def step_event(number: int, *, steps: int = 40, epochs: int = 4, loss: float | None = None, **other: Any) -> EventDict:
    """A step that took 200 ms, of `steps` in `epochs`."""
    return {
        **SOURCE_AND_PIPELINE, "event": "step", "step": number, "steps": steps, "epoch": (number - 1) * epochs // steps,
        "epochs": epochs, "version": number, "loss": math.exp(-number / 20) if loss is None else loss,
        "accuracy": 1 - math.exp(-number / 10), "lr": 0.05, "rows": 64, "micro_batches": 4, "step_ms": 200.0,
        "rows_per_s": 320.0, "time": {"stages": [stage_times("head"), stage_times("tail")], "idle_ms": 9.0}, **other,
    }  # fmt: skip


def evaluation_event(number: int, accuracy: float | None = 0.8, *, epoch: int = 0, loss: float = 0.5) -> EventDict:
    return {
        **SOURCE_AND_PIPELINE, "event": "evaluation", "step": number, "epoch": epoch, "loss": loss,
        "accuracy": accuracy, "rows": 360, "elapsed_ms": 140.0,
    }  # fmt: skip


def rollback_event(to_step: int, at_step: int, reason: str = "worker tail-1 is gone") -> EventDict:
    return {
        **SOURCE_AND_PIPELINE, "event": "rolled_back", "step": to_step, "from_step": at_step, "version": to_step,
        "why": reason, "waited_ms": 900.0,
    }  # fmt: skip


def failure_event(error: str = "NotFinite", reason: str = "the loss is not a number") -> EventDict:
    return {
        **SOURCE_AND_PIPELINE,
        "event": "failed",
        "error": error,
        "reason": reason,
        "stage": "tail",
        "worker": "tail-1",
    }


def run_events(
    steps: int = 40, epochs: int = 4, rollbacks: Mapping[int, int] | None = None, **other: Any
) -> Iterator[EventDict]:
    """A run with an evaluation after each epoch; `rollbacks` maps steps to those at which the run continues."""
    left, number = dict(rollbacks or {}), 0
    while number < steps:
        number += 1
        event = step_event(number, steps=steps, epochs=epochs, **other)
        yield event
        if number * epochs % steps == 0:
            yield evaluation_event(
                number, 0.5 + 0.1 * event["epoch"], epoch=event["epoch"], loss=2.0 / (1 + event["epoch"])
            )
        if number in left:
            yield rollback_event(to := left.pop(number), number)
            number = to
