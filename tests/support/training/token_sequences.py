"""A network with two inputs, token ids and a mask, and its data set."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from sources.datasets.dataset import Dataset, Examples

MODEL = "tests.support.training.token_sequences:token_network"
CLASSES = 4
TOKENS = 50
LENGTH = 6
# Rows of the embedding are found by id modulo TOKENS: as floats, which hold 24 bits, these ids would be others.
FIRST_ID = 50 * (1 << 55)


class TokenNetwork(nn.Module):
    """Token ids int64 (B, T) and a mask bool (B, T), which is used behind the middle: (B, CLASSES)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, 16)
        self.hidden = nn.Linear(16, 16)
        self.out = nn.Linear(16, CLASSES)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        hidden = torch.relu(self.hidden(self.embedding(tokens % TOKENS)))
        pooled = (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        return self.out(pooled)  # type: ignore[no-any-return]


def token_network() -> nn.Module:
    return TokenNetwork()


token_network.example_inputs = {  # type: ignore[attr-defined]
    "tokens": torch.arange(LENGTH).view(1, LENGTH),
    "mask": torch.ones(1, LENGTH, dtype=torch.bool),
}


class TokenSequences(Dataset):
    """Sequences whose class is that of most tokens which the mask selects. `mask_name` is the name of the mask."""

    name = "tokens"
    classes = tuple("0123")

    def __init__(self, count: int = 96, mask_name: str = "mask") -> None:
        self._count, self._mask_name = count, mask_name

    def train(self) -> Examples:
        return self._examples(self._count, 0)

    def test(self) -> Examples:
        return self._examples(32, 1)

    def _examples(self, count: int, seed: int) -> Examples:
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, CLASSES, count)
        mask = rng.random((count, LENGTH)) < 0.6
        mask[:, 0] = True
        noise = rng.integers(0, TOKENS, (count, LENGTH))
        tokens = np.where(mask, CLASSES * (noise // CLASSES) + labels[:, np.newaxis], noise)
        return Examples({"tokens": FIRST_ID + tokens, self._mask_name: mask}, labels)
