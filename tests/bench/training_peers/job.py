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

from stages.models.registry import model_spec
from stages.partition.part_loader import load_trainable
from stages.partition.partition import Part
from stages.training.schedule import Name

SHAPE = (3, 32, 32)
CLASSES = 10
# Batches that are taken in turns.
BATCHES = 4


@dataclass(frozen=True, slots=True)
class Job:
    """So many steps after those of the warm-up, which do not count."""

    cuts: tuple[int, ...]
    steps: int
    warm_up: int = 3
    batch: int = 64
    micro_batches: int = 4
    model: str = "vgg11-small"
    lr: float = 0.01
    momentum: float = 0.9
    schedules: tuple[Name, ...] = ("1f1b", "gpipe")
    keeps_memory: bool = True  # torch's contestants have the allocator of our workers: stages/training/malloc_tuning.py

    def to_text(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> Job:
        found: dict[str, Any] = json.loads(text)
        return cls(**{**found, "cuts": tuple(found["cuts"]), "schedules": tuple(found["schedules"])})

    def examples(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The inputs (N, 3, 32, 32) and labels (N,) of all batches."""
        random = np.random.default_rng(0)
        count = BATCHES * self.batch
        return random.random((count, *SHAPE), dtype=np.float32), random.integers(0, CLASSES, count)

    def rows(self, step: int) -> slice:
        """Those of a step, among the examples."""
        first = step % BATCHES * self.batch
        return slice(first, first + self.batch)

    def counted(self, ends_s: Sequence[float]) -> list[float]:
        """What each step after the warm-up took, from when the steps ended."""
        return [later - earlier for earlier, later in pairwise(ends_s[self.warm_up - 1 : self.warm_up + self.steps])]

    def part(self, index: int) -> Part:
        """A part of the network, as one of our workers begins with it."""
        return load_trainable(model_spec(self.model), self.cuts, index, None, 0, "cpu")[0]

    def optimizer(self, part: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(part.parameters(), lr=self.lr, momentum=self.momentum)
