"""A network with two inputs, of which the second crosses the cuts, is trained in parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from brokers.errors import WireError
from brokers.protocol.training import MicroBatch
from sources.datasets.dataset import Batches, map_inputs, split_micro_batches
from tests.support.errors import raises_error
from tests.support.training.in_process_parts import (
    InProcessParts,
    UnsplitTrainer,
    assert_bitwise_equal,
    make_training_pipeline,
)
from tests.support.training.token_sequences import MODEL, TokenSequences, token_network

SEED = 3
STEPS = 4
SETTINGS: dict[str, Any] = {"lr": 0.5, "optimizer": "adam"}


@pytest.mark.parametrize("cuts", [(), (1,), (3,), (5,), (2, 4, 7)], ids=str)
def test_parts_get_the_weights_of_the_plain_loop(cuts: tuple[int, ...]) -> None:
    parts = InProcessParts(make_training_pipeline(MODEL, cuts, seed=SEED, **SETTINGS))
    torch.manual_seed(SEED)
    model = token_network()
    unsplit = UnsplitTrainer(model, torch.optim.Adam(model.parameters(), lr=0.5))
    batches = Batches(TokenSequences().train(), 20)  # the fifth has 16 rows
    for step in range(1, 1 + STEPS):
        batch = [
            (map_inputs(inputs, torch.from_numpy), torch.from_numpy(labels))
            for inputs, labels in split_micro_batches(*batches.batch(step), 3)
        ]
        assert parts.train_step(step, batch) == unsplit.train_step(step, batch)
    assert_bitwise_equal(parts.state_dict(), model.state_dict())


def test_input_of_an_unknown_name_is_refused() -> None:
    trainer = InProcessParts(make_training_pipeline(MODEL, (3,))).part_trainers[0]
    micro_batch = MicroBatch(step="0" * 32, term=1, index=0, count=1, rows=2, number=0, seed=0)
    tensors = {name: torch.ones(2, 6, dtype=torch.int64) for name in ("tokens", "mask", "types")}
    with raises_error(WireError, "UnknownInput", match="no input types: its inputs are tokens, mask"):
        trainer.forward(micro_batch, bytes(16), tensors)
    del tensors["types"], tensors["mask"]
    with raises_error(WireError, "TensorMissing", match="mask"):
        trainer.forward(micro_batch, bytes(16), tensors)
