"""A small network for training tests, named in their pipeline files."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from brokers.protocol.training import micro_batch_seed
from sources.datasets.dataset import Batches, split_micro_batches
from tests.support.training.striped_images import CLASSES

MODEL = "tests.support.training.training_network:small_network"
# Between these cuts are a batch norm, dropouts of both kinds and a skip connection.
CUTS = (4, 9)


class SmallNetwork(nn.Module):
    """Convolutions with a batch norm, a skip connection, and dropout as a module and as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.25)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.out = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        skipped = self.drop(self.relu(self.norm(self.first(x))))
        more = torch.relu(self.second(skipped)) + skipped
        flat = torch.flatten(self.pool(more), 1)
        return self.out(nn.functional.dropout(flat, 0.1, self.training))  # type: ignore[no-any-return]


def small_network() -> nn.Module:
    return SmallNetwork()


def train_unsplit(
    batches: Batches, steps: int, micro_batches: int, *, seed: int = 0, lr: float = 0.05, momentum: float = 0.9
) -> tuple[nn.Module, list[float]]:
    """The unsplit network after `steps` steps of plain PyTorch, and the loss of each."""
    torch.manual_seed(seed)
    model = small_network().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    losses = []
    for step in range(steps):
        inputs, labels = batches.batch(step)
        total = 0.0
        for index, (rows, targets) in enumerate(split_micro_batches(inputs, labels, micro_batches)):
            torch.manual_seed(micro_batch_seed(seed, step, index))
            loss = nn.functional.cross_entropy(model(torch.from_numpy(rows)), torch.from_numpy(targets))
            torch.autograd.backward([loss * (len(targets) / len(labels))])
            total += loss.item() * len(targets)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total / len(labels))
    return model, losses
