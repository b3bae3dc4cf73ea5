"""Split equals unsplit: a network that is trained in parts gets the weights of the unsplit network, bit for bit.

The unsplit network is trained by plain torch: its model, its optimizer, its loss, in an ordinary loop. It shares two
seeds with ours: that of the initial weights, and that of the random numbers of a micro-batch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn

from brokers.protocol.messages import TensorContent
from brokers.protocol.safetensors_codec import from_array
from sources.training.training_run import MODEL_FILE, write_weights
from stages.models.vgg import SmallVgg
from stages.partition.tracing import trace
from stages.training.checkpoints import Checkpoint, CheckpointStore
from stages.training.part_trainer import MicroBatchMetrics
from stages.training.step_queue import ScheduleName
from tests.support.training.in_process_parts import (
    InProcessParts,
    StepBatch,
    UnsplitTrainer,
    assert_bitwise_equal,
    make_training_pipeline,
)
from tests.support.training.residual_networks import DropoutNetwork, SkipNetwork
from tests.support.training.training_network import SmallNetwork

SEED = 3


@dataclass
class Net:
    """A network: its name in a pipeline file, its factory, the shape of an input row, and the steps of a run."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    classes: int
    settings: dict[str, Any] = field(default_factory=dict)
    steps: int = 4  # one for each way of `uneven_batch`

    @cached_property
    def layers(self) -> int:
        return len(trace(self.build().train()).layer_names)


NETS = {
    "vgg11": Net("vgg11-small", lambda: SmallVgg("vgg11-small"), (3, 32, 32), 10),
    "resnet18": Net(
        "torchvision:resnet18",
        lambda: torchvision.models.resnet18(num_classes=6),
        (3, 32, 32),
        6,
        {"num_classes": 6},
    ),
    "mobilenet": Net(
        "torchvision:mobilenet_v3_small",
        lambda: torchvision.models.mobilenet_v3_small(num_classes=6),
        (3, 32, 32),
        6,
        {"num_classes": 6},
    ),
    "small_network": Net("tests.support.training.training_network:small_network", SmallNetwork, (3, 8, 8), 4, steps=10),
    "skip_network": Net("tests.support.training.residual_networks:skip_network", SkipNetwork, (12,), 5, steps=10),
    "dropout_network": Net(
        "tests.support.training.residual_networks:dropout_network", DropoutNetwork, (12,), 5, steps=10
    ),
}
Optimizer = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, tuple[dict[str, Any], Optimizer]] = {
    "sgd": (
        {"optimizer": "sgd", "lr": 0.05, "settings": {"momentum": 0.9, "weight_decay": 5e-4}},
        lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4),
    ),
    "nesterov": (
        {"optimizer": "sgd", "lr": 0.02, "settings": {"momentum": 0.8, "nesterov": True}},
        lambda parameters: torch.optim.SGD(parameters, lr=0.02, momentum=0.8, nesterov=True),
    ),
    "adam": (
        {"optimizer": "adam", "lr": 1e-3, "settings": {"weight_decay": 1e-4}},
        lambda parameters: torch.optim.Adam(parameters, lr=1e-3, weight_decay=1e-4),
    ),
    "adamw": (
        {"optimizer": "adamw", "lr": 2e-3, "settings": {"amsgrad": True}},
        lambda parameters: torch.optim.AdamW(parameters, lr=2e-3, amsgrad=True),
    ),
}


def unsplit(net: Net, optimizer: str) -> UnsplitTrainer:
    torch.manual_seed(SEED)
    model = net.build()
    return UnsplitTrainer(model, OPTIMIZERS[optimizer][1](model.parameters()))


def split(net: Net, cuts: Sequence[int], optimizer: str) -> InProcessParts:
    settings = OPTIMIZERS[optimizer][0]
    return InProcessParts(make_training_pipeline(net.name, cuts, seed=SEED, model_settings=net.settings, **settings))


def batch(net: Net, number: int, rows: Sequence[int] = (3, 3, 2)) -> StepBatch:
    """Make the micro-batches of step `number`, with these numbers of rows."""
    generator = torch.Generator().manual_seed(number)
    inputs = torch.randn(sum(rows), *net.shape, generator=generator)
    labels = torch.randint(0, net.classes, (sum(rows),), generator=generator)
    return list(zip(torch.split(inputs, list(rows)), torch.split(labels, list(rows)), strict=True))


def random_cuts(net: Net, parts: int, seed: int) -> list[int]:
    return sorted(random.Random(seed).sample(range(1, net.layers), parts - 1))


def uneven_batch(net: Net, number: int) -> StepBatch:
    """Make a batch of 8 or 6 rows, split in one of four ways."""
    return batch(net, number, [(3, 3, 2), (2, 4), (8,), (2, 2, 2, 2)][number % 4])


@lru_cache
def expected_run(name: str, optimizer: str) -> tuple[list[list[float]], dict[str, Tensor]]:
    """Train the unsplit network; return the losses of each step, and the final parameters and buffers."""
    net = NETS[name]
    whole = unsplit(net, optimizer)
    losses = [whole.train_step(number, uneven_batch(net, number)) for number in range(net.steps)]
    return losses, whole.model.state_dict()


# Equality -------------------------------------------------------------------------------------------------------------

CASES: list[tuple[str, list[int], str, ScheduleName]] = [
    ("vgg11", random_cuts(NETS["vgg11"], 5, 5), "sgd", "1f1b"),
    ("vgg11", [1, 2, 3], "sgd", "gpipe"),  # parts of one layer, one of them without parameters
    ("resnet18", [5, 8, 20, 41], "sgd", "gpipe"),  # within blocks: skip connections cross the cuts
    ("mobilenet", random_cuts(NETS["mobilenet"], 3, 1), "adam", "1f1b"),
    *[
        ("small_network", random_cuts(NETS["small_network"], parts, parts), "nesterov", "1f1b")
        for parts in (1, 2, 3, 5)
    ],
    *[
        ("skip_network", random_cuts(NETS["skip_network"], parts, seed), "adam", "1f1b")
        for parts in (2, 3, 5)
        for seed in (0, 1)
    ],
    ("skip_network", list(range(1, NETS["skip_network"].layers)), "sgd", "gpipe"),  # a stage for each layer
    *[
        ("dropout_network", random_cuts(NETS["dropout_network"], parts, parts), "adam", "1f1b")
        for parts in (1, 2, 3, 5)
    ],
    ("dropout_network", [3, 6, 9], "sgd", "gpipe"),
    ("dropout_network", list(range(1, NETS["dropout_network"].layers)), "sgd", "1f1b"),
]


@pytest.mark.parametrize(("name", "cuts", "optimizer", "schedule"), CASES)
def test_all_losses_parameters_and_buffers_are_equal(
    name: str, cuts: list[int], optimizer: str, schedule: ScheduleName
) -> None:
    net = NETS[name]
    parts = split(net, cuts, optimizer)
    assert len(parts.part_trainers) == len(cuts) + 1
    losses = [parts.train_step(number, uneven_batch(net, number), schedule) for number in range(net.steps)]
    expected_losses, expected = expected_run(name, optimizer)
    assert losses == expected_losses
    assert_bitwise_equal(parts.state_dict(), expected)


@pytest.mark.parametrize("name", ["small_network", "skip_network", "dropout_network"])
def test_one_more_row_makes_a_difference(name: str) -> None:
    """The equality above is no accident."""
    net = NETS[name]
    whole, parts = unsplit(net, "sgd"), split(net, [net.layers // 2], "sgd")
    whole.train_step(0, batch(net, 0))
    parts.train_step(0, batch(net, 0, (3, 3, 3)))
    with pytest.raises(AssertionError, match="differ"):
        assert_bitwise_equal(parts.state_dict(), whole.model.state_dict())


@pytest.mark.parametrize("name", ["small_network", "dropout_network"])
def test_random_numbers_depend_on_the_seed_of_the_micro_batch(name: str) -> None:
    net = NETS[name]
    losses = []
    for seed in (0, 0, 1):
        parts = split(net, [net.layers // 2], "sgd")
        parts.seed = seed
        losses.append(parts.train_step(0, batch(net, 0)))
    assert losses[0] == losses[1] != losses[2]


# Aborted steps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["small_network", "dropout_network", "skip_network"])
def test_step_that_is_aborted_and_repeated_gives_the_same_bits(name: str) -> None:
    net = NETS[name]
    whole, parts = unsplit(net, "sgd"), split(net, random_cuts(net, 3, 7), "sgd")
    operations_of_a_step = 2 * 3 * 3
    for number in range(2):
        before = parts.state_dict()
        for limit in random.Random(number).sample(range(1, operations_of_a_step + 1), 3):
            assert parts.run_operations(number, batch(net, number), limit=limit) == limit
            parts.abort()
            assert all(not trainer.activations for trainer in parts.part_trainers)
            assert all(
                parameter.grad is None for each in parts.part_trainers for parameter in each._module.parameters()
            )
            after = {name: tensor for each in parts.part_trainers for name, tensor in each._module.state_dict().items()}
            assert_bitwise_equal(after, before)
        assert parts.train_step(number, batch(net, number)) == whole.train_step(number, batch(net, number))
    assert_bitwise_equal(parts.state_dict(), whole.model.state_dict())


def test_abort_restores_the_statistics_of_batch_norms() -> None:
    parts = split(NETS["small_network"], [4, 9], "sgd")
    before = parts.state_dict()
    part = parts.part_trainers[0]._module
    parts.run_operations(0, batch(NETS["small_network"], 0))
    changed = part.state_dict()
    assert not torch.equal(changed["norm.running_mean"], before["norm.running_mean"])
    assert int(changed["norm.num_batches_tracked"]) == 3
    assert_bitwise_equal(parts.state_dict(), before)  # `weights` returns the version, not the step in progress
    parts.abort()
    assert_bitwise_equal(parts.state_dict(), before)
    assert not part.state_dict()["norm.running_mean"].any()


def test_evaluation_changes_nothing_and_equals_the_unsplit_one() -> None:
    net = NETS["small_network"]
    whole, parts = unsplit(net, "sgd"), split(net, [3, 6], "sgd")
    for number in range(2):
        whole.train_step(number, batch(net, number))
        parts.train_step(number, batch(net, number))
    before = parts.state_dict()
    (inputs, labels), *_ = batch(net, 9, (8,))
    metrics = parts.evaluate(inputs, labels)
    assert not any(trainer.activations for trainer in parts.part_trainers)
    whole.model.eval()
    with torch.no_grad():
        outputs = whole.model(inputs)
    expected = nn.functional.cross_entropy(outputs, labels).item()
    assert metrics == MicroBatchMetrics(expected, int((outputs.argmax(1) == labels).sum()), 8)
    assert_bitwise_equal(parts.state_dict(), before)
    whole.model.train()
    assert parts.train_step(2, batch(net, 2)) == whole.train_step(2, batch(net, 2))
    assert_bitwise_equal(parts.state_dict(), whole.model.state_dict())


# Versions -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("name", ["small_network", "skip_network"])
def test_run_that_continues_from_a_checkpoint_gives_the_same_bits(tmp_path: Path, name: str, optimizer: str) -> None:
    net = NETS[name]
    cuts = random_cuts(net, 3, 5)
    whole, parts = unsplit(net, optimizer), split(net, cuts, optimizer)
    for number in range(8):
        if number in (2, 5):
            stores = [CheckpointStore(tmp_path / f"{number}-{index}", "f") for index in range(3)]
            for store, trainer in zip(stores, parts.part_trainers, strict=True):
                store.save(Checkpoint(number, trainer.checkpoint_tensors(number), {}))
            parts.run_operations(number, batch(net, number), limit=7)  # lost
            # First in new processes, then in the old ones, which roll back.
            parts = split(net, cuts, optimizer) if number == 2 else parts
            for store, trainer in zip(stores, parts.part_trainers, strict=True):
                trainer.restore(number, store.load(number).tensors)
                assert trainer.version == number
                assert not trainer.activations
        assert parts.train_step(number, batch(net, number)) == whole.train_step(number, batch(net, number))
    assert_bitwise_equal(parts.state_dict(), whole.model.state_dict())
    assert [trainer.version for trainer in parts.part_trainers] == [8, 8, 8]


def test_run_that_is_restored_to_version_0_gives_the_same_bits() -> None:
    net = NETS["small_network"]
    whole, parts = unsplit(net, "adam"), split(net, [4, 9], "adam")
    for number in range(3):
        parts.train_step(number, batch(net, 100 + number))
    for trainer in parts.part_trainers:
        trainer.restore(0, None)
    for number in range(3):
        assert parts.train_step(number, batch(net, number)) == whole.train_step(number, batch(net, number))
    assert_bitwise_equal(parts.state_dict(), whole.model.state_dict())


def test_checkpoint_that_does_not_fit_leaves_no_version_in_memory() -> None:
    trainer = split(NETS["small_network"], [4], "sgd").part_trainers[0]
    tensors = trainer.checkpoint_tensors(1)
    del tensors["model/norm.weight"]
    with pytest.raises(RuntimeError, match=r"norm\.weight"):
        trainer.restore(1, tensors)
    assert trainer.version is None
    trainer.restore(0, None)
    assert trainer.version == 0


@pytest.mark.parametrize(("name", "cuts"), [("resnet18", [5, 41]), ("mobilenet", [60])])
def test_joined_weights_load_into_the_unsplit_model(tmp_path: Path, name: str, cuts: list[int]) -> None:
    net = NETS[name]
    parts = split(net, cuts, "sgd")
    parts.train_step(0, batch(net, 0))
    bodies = {
        f"s{index}": TensorContent({key: from_array(tensor) for key, tensor in trainer.weights().items()})
        for index, trainer in enumerate(parts.part_trainers)
    }
    write_weights(tmp_path, bodies)
    model = net.build()
    model.load_state_dict(load_file(tmp_path / MODEL_FILE), strict=True)
    assert_bitwise_equal(model.state_dict(), parts.state_dict())
