"""Settings of a training run, and the learning rate of each step."""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from brokers.config.pipeline_file import Pipeline
from brokers.config.schema import TrainingTable

# Longer settings of a data set are replaced by a digest: the source's progress is part of a bounded presence record.
_SETTINGS_CHARACTERS = 100


def learning_rate(table: TrainingTable, step: int, steps_per_epoch: int) -> float:
    """The learning rate of `step`, counted from 0: linear during the warm-up, then by `table.lr_schedule`.

    `cosine` decays from `lr` to 0 over all epochs; `step` multiplies by `lr_factor` every `lr_every` epochs.
    """
    if step < table.lr_warmup:
        return table.lr * (step + 1) / table.lr_warmup
    if table.lr_schedule == "cosine":
        total = max(1, table.epochs * steps_per_epoch - table.lr_warmup)
        return table.lr * 0.5 * (1 + math.cos(math.pi * (step - table.lr_warmup) / total))
    if table.lr_schedule == "step":
        return table.lr * table.lr_factor ** (step // steps_per_epoch // table.lr_every)
    return table.lr


def relevant_settings(pipeline: Pipeline, rows: int) -> dict[str, str | int | float | bool | None]:
    """The settings that steps depend on: a run can only be resumed with the same ones."""
    table, source = pipeline.training, pipeline.source
    names = ["batch", "micro_batches", "lr", "lr_schedule", "lr_warmup", "shuffle", "augment"]
    names += {"cosine": ["epochs"], "step": ["lr_every", "lr_factor"]}.get(table.lr_schedule, [])
    names += ["drop_last"] if table.drop_last else []  # earlier versions do not record it
    source_settings = json.dumps(source.settings, sort_keys=True, default=str)
    if len(source_settings) > _SETTINGS_CHARACTERS:
        source_settings = hashlib.sha256(source_settings.encode()).hexdigest()[:16]
    return {
        **{name: getattr(table, name) for name in names},
        "seed": pipeline.pipeline.seed,
        "kind": source.kind,
        "limit": source.limit,
        "source.settings": source_settings,
        "rows": rows,
    }


def settings_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Each setting that differs, as text."""
    names = dict.fromkeys([*before, *now])
    return [
        f"{name} was {_describe(before.get(name))}, is {_describe(now.get(name))}"
        for name in names
        if before.get(name) != now.get(name)
    ]


def _describe(value: object) -> str:
    return "not set" if value is None else repr(value)
