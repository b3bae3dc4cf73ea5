"""The training job of the benchmark: one network, cut, data, loss and optimizer for all implementations compared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from stages.loading.part_loader import load_trainable_part
from stages.models.registry import get_model_spec
from stages.partition.partition import Part
from stages.training.step_queue import ScheduleName

INPUT_SHAPE = (3, 32, 32)
CLASSES = 10
BATCH_COUNT = 4  # different batches, which are used in turns


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """`steps` measured steps after `warm_up` steps that are left out."""

    cuts: tuple[int, ...]
    steps: int
    warm_up: int = 3
    batch: int = 64
    micro_batches: int = 4
    model: str = "vgg11-small"
    lr: float = 0.01
    momentum: float = 0.9
    schedules: tuple[ScheduleName, ...] = ("1f1b", "gpipe")
    tune_malloc: bool = True  # whether PyTorch's processes use the allocator settings of our workers too

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        fields = json.loads(text)
        return cls(**{**fields, "cuts": tuple(fields["cuts"]), "schedules": tuple(fields["schedules"])})

    def examples(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The inputs (N, 3, 32, 32) and labels (N,) of all batches."""
        rng = np.random.default_rng(0)
        count = BATCH_COUNT * self.batch
        return rng.random((count, *INPUT_SHAPE), dtype=np.float32), rng.integers(0, CLASSES, count)

    def batch_slice(self, step: int) -> slice:
        """The examples of a step."""
        first = step % BATCH_COUNT * self.batch
        return slice(first, first + self.batch)

    def step_durations_s(self, ends_s: Sequence[float]) -> list[float]:
        """The duration of each measured step, from the times at which all steps ended."""
        return [later - earlier for earlier, later in pairwise(ends_s[self.warm_up - 1 : self.warm_up + self.steps])]

    def build_part(self, index: int) -> Part:
        """A part of the network, in the state in which our workers begin."""
        return load_trainable_part(get_model_spec(self.model), self.cuts, index, None, 0, "cpu").training

    def build_optimizer(self, part: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(part.parameters(), lr=self.lr, momentum=self.momentum)
