"""Factories of networks, named in pipeline files as `package.module:factory`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn


class TinyNetwork(nn.Module):
    """Four layers with a skip connection around the second and third: (B, 6) -> (B, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 8)
        self.third = nn.ReLU()
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x + self.third(self.second(x)))  # type: ignore[no-any-return]


def tiny_network() -> nn.Module:
    return TinyNetwork()


tiny_network.input_shape = (1, 6)  # type: ignore[attr-defined]


class ShuffledNetwork(nn.Module):
    """Shuffles its features and restores their order: (B, 6) -> (B, 3). Each process draws another order."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.last = nn.Linear(8, 3)
        self.order = torch.as_tensor(np.random.default_rng().permutation(8))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x)[:, self.order])
        return self.last(x[:, self.order.argsort()])  # type: ignore[no-any-return]


def shuffled_network() -> nn.Module:
    return ShuffledNetwork()


shuffled_network.input_shape = (1, 6)  # type: ignore[attr-defined]


class DataDependentNetwork(nn.Module):
    """Branches on a value, which torch.fx cannot trace, and has no children to cut between."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if bool(torch.sum(x) > 0) else x - 1


def data_dependent_network() -> nn.Module:
    return DataDependentNetwork()
