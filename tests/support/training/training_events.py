"""The events of a training run, as its source publishes them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

Event = dict[str, Any]
NAMES = {"source": "digits", "pipeline": "digits"}


def stage(name: str, worker: str = "", forward_ms: float = 8.0, backward_ms: float = 12.0) -> Event:
    """The times of one stage in one step of four micro-batches."""
    return {
        "stage": name, "worker": worker or f"{name}-1", "queue_ms": 4.0, "decode_ms": 2.0,
        "compute_ms": forward_ms + backward_ms + 4.0, "encode_ms": 1.0, "forward_ms": forward_ms,
        "backward_ms": backward_ms, "bytes_in": 1000, "bytes_out": 2000,
    }  # fmt: skip


def step(number: int, *, steps: int = 40, epochs: int = 4, loss: float | None = None, **other: Any) -> Event:
    """A step that took 200 ms, of `steps` in `epochs`."""
    return {
        **NAMES, "event": "step", "step": number, "steps": steps, "epoch": (number - 1) * epochs // steps,
        "epochs": epochs, "version": number, "loss": math.exp(-number / 20) if loss is None else loss,
        "accuracy": 1 - math.exp(-number / 10), "lr": 0.05, "rows": 64, "micro_batches": 4, "step_ms": 200.0,
        "rows_per_s": 320.0, "time": {"stages": [stage("head"), stage("tail")], "idle_ms": 9.0}, **other,
    }  # fmt: skip


def evaluation(number: int, accuracy: float | None = 0.8, *, epoch: int = 0, loss: float = 0.5) -> Event:
    return {
        **NAMES, "event": "evaluation", "step": number, "epoch": epoch, "loss": loss, "accuracy": accuracy,
        "rows": 360, "elapsed_ms": 140.0,
    }  # fmt: skip


def rolled_back(to: int, at: int, why: str = "worker tail-1 is gone") -> Event:
    return {
        **NAMES, "event": "rolled_back", "step": to, "from_step": at, "version": to, "why": why, "waited_ms": 900.0
    }  # fmt: skip


def failed(error: str = "NotFinite", reason: str = "the loss is not a number") -> Event:
    return {**NAMES, "event": "failed", "error": error, "reason": reason, "stage": "tail", "worker": "tail-1"}


def whole_run(
    steps: int = 40, epochs: int = 4, kills: Mapping[int, int] | None = None, **other: Any
) -> Iterator[Event]:
    """A run with an evaluation after each epoch; `kills`: after which steps a worker dies, and where it goes on."""
    left, number = dict(kills or {}), 0
    while number < steps:
        number += 1
        event = step(number, steps=steps, epochs=epochs, **other)
        yield event
        if number * epochs % steps == 0:
            yield evaluation(number, 0.5 + 0.1 * event["epoch"], epoch=event["epoch"], loss=2.0 / (1 + event["epoch"]))
        if number in left:
            yield rolled_back(to := left.pop(number), number)
            number = to
