"""Networks with other layers in evaluation than in training, with state that no layer uses, and with tied weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.training.unusual_modes import CLASSES, WIDTH, Layers


class AuxiliaryHead(Layers):
    """Returns a second result in training, as GoogLeNet does, from layers that evaluation has not."""

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, CLASSES))

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.a(x))
        side = self.auxiliary(x) if self.training else None
        x = self.out(torch.relu(self.c(self.b(x))))
        return {"logits": x, "side": side} if self.training else x


def auxiliary_loss(outputs: Any, labels: Tensor) -> Tensor:
    if isinstance(outputs, Tensor):
        return F.cross_entropy(outputs, labels)
    return F.cross_entropy(outputs["logits"], labels) + 0.3 * F.cross_entropy(outputs["side"], labels)


class ReversedInEvaluation(Layers):
    """Calls two layers in the opposite order in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.d = nn.Linear(16, 16)

    def middle(self, x: Tensor) -> Any:
        return self.d(torch.relu(self.b(x))) if self.training else self.b(torch.relu(self.d(x)))


class UnusedState(Layers):
    """Has parameters, buffers and whole modules that no layer uses."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.a.register_buffer("unused", torch.ones(2))
        self.token = nn.Parameter(torch.randn(4))
        self.register_buffer("version", torch.tensor(7))


class TiedFirstLayers(Layers):
    """The weight of `c` is that of the first layer of `b`."""

    def __init__(self) -> None:
        super().__init__()
        self.c.weight = self.b[0].weight  # type: ignore[assignment]


class FrozenTiedLayers(TiedFirstLayers):
    def __init__(self) -> None:
        super().__init__()
        self.c.weight.requires_grad_(False)


class TiedEmbedding(nn.Module):
    """An embedding whose weight is that of the last layer, as in language models."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, WIDTH)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Any:
        return self.head(torch.relu(self.hidden(self.embedding(tokens).mean(1))))
