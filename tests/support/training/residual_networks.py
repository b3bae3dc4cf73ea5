"""Networks with what is easily lost at a cut: values that many later layers use, dropout of both kinds, statistics."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CLASSES = 5


class SkipNetwork(nn.Module):
    """What the first layer gives is used by every later one, and by each of them at another place of its sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 16)
        self.second = nn.Linear(16, 16)
        self.third = nn.Linear(16, 16)
        self.norm = nn.BatchNorm1d(16)
        self.fourth = nn.Linear(16, 16)
        self.out = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        begun = torch.tanh(self.first(x))
        second = torch.tanh(self.second(begun)) + begun
        third = begun * torch.sigmoid(self.third(second))
        fourth = self.norm(self.fourth(third) + second + begun)
        return self.out(torch.relu(fourth) * begun + third)  # type: ignore[no-any-return]


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
        begun = self.drop(torch.relu(self.first(x)))
        more = nn.functional.dropout(torch.relu(self.second(begun)), 0.4, self.training)
        last = nn.functional.dropout(torch.relu(self.third(more)), 0.2, training=self.training)
        return self.out(self.drop(last))  # type: ignore[no-any-return]


def skip_network() -> nn.Module:
    return SkipNetwork()


def dropout_network() -> nn.Module:
    return DropoutNetwork()


def wide_network() -> nn.Module:
    """For pictures (3, 8, 8): its first three layers have most of its weights."""
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 1024), nn.ReLU(), nn.Linear(1024, 4))
