"""What the contestants of the training benchmark train: the same network, cut, batches, loss and optimizer for all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from stages.models.registry import get_model_spec
from stages.partition.part_loader import load_trainable_part
from stages.partition.partition import Part
from stages.training.schedule import ScheduleName

SHAPE = (3, 32, 32)
CLASSES = 10
# Batches that are taken in turns.
BATCH_COUNT = 4


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """So many steps after those of the warm-up, which do not count."""

    cuts: tuple[int, ...]
    steps: int
    warm_up: int = 3
    batch: int = 64
    micro_batches: int = 4
    model: str = "vgg11-small"
    lr: float = 0.01
    momentum: float = 0.9
    schedules: tuple[ScheduleName, ...] = ("1f1b", "gpipe")
    tune_malloc: bool = True  # torch's contestants have the allocator of our workers: stages/training/malloc_tuning.py

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> TrainingJob:
        found: dict[str, Any] = json.loads(text)
        return cls(**{**found, "cuts": tuple(found["cuts"]), "schedules": tuple(found["schedules"])})

    def examples(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The inputs (N, 3, 32, 32) and labels (N,) of all batches."""
        random = np.random.default_rng(0)
        count = BATCH_COUNT * self.batch
        return random.random((count, *SHAPE), dtype=np.float32), random.integers(0, CLASSES, count)

    def batch_slice(self, step: int) -> slice:
        """Those of a step, among the examples."""
        first = step % BATCH_COUNT * self.batch
        return slice(first, first + self.batch)

    def step_durations_s(self, ends_s: Sequence[float]) -> list[float]:
        """What each step after the warm-up took, from when the steps ended."""
        return [later - earlier for earlier, later in pairwise(ends_s[self.warm_up - 1 : self.warm_up + self.steps])]

    def build_part(self, index: int) -> Part:
        """A part of the network, as one of our workers begins with it."""
        return load_trainable_part(get_model_spec(self.model), self.cuts, index, None, 0, "cpu")[0]

    def build_optimizer(self, part: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(part.parameters(), lr=self.lr, momentum=self.momentum)
