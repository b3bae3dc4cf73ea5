"""Networks that are difficult to cut: skip connections over many layers, dropout of both kinds, batch norms."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CLASSES = 5


class SkipNetwork(nn.Module):
    """The output of the first layer is an operand of every later layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 16)
        self.second = nn.Linear(16, 16)
        self.third = nn.Linear(16, 16)
        self.norm = nn.BatchNorm1d(16)
        self.fourth = nn.Linear(16, 16)
        self.out = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        first = torch.tanh(self.first(x))
        second = torch.tanh(self.second(first)) + first
        third = first * torch.sigmoid(self.third(second))
        fourth = self.norm(self.fourth(third) + second + first)
        return self.out(torch.relu(fourth) * first + third)  # type: ignore[no-any-return]


class DropoutNetwork(nn.Module):
    """Dropout as a module and as a function, before, between and after layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 24)
        self.drop = nn.Dropout(0.3)
        self.second = nn.Linear(24, 24)
        self.third = nn.Linear(24, 24)
        self.out = nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        first = self.drop(torch.relu(self.first(x)))
        more = nn.functional.dropout(torch.relu(self.second(first)), 0.4, self.training)
        last = nn.functional.dropout(torch.relu(self.third(more)), 0.2, training=self.training)
        return self.out(self.drop(last))  # type: ignore[no-any-return]


def skip_network() -> nn.Module:
    return SkipNetwork()


def dropout_network() -> nn.Module:
    return DropoutNetwork()


def wide_network() -> nn.Module:
    """A network for pictures (3, 8, 8) whose first three layers have most of its weights."""
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 1024), nn.ReLU(), nn.Linear(1024, 4))
