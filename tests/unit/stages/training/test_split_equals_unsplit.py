"""Split equals unsplit: the parts of a network that are trained apart get the weights of the whole, bit for bit.

The whole is torch's own: its model, its optimizer, its loss, in the loop that anybody would write. Ours are two seeds:
that of the weights, and that of what a micro-batch draws.
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
from brokers.protocol.training import LABELS_TENSOR, MicroBatch
from sources.training.export_weights import MODEL_FILE, write_weights
from stages.models.vgg import SmallVgg
from stages.partition.fx_graph import trace
from stages.training.checkpoints import Checkpoint, CheckpointStore
from stages.training.errors import BadGradient, BadLabels, NotFinite, UnknownForward
from stages.training.part_trainer import MicroBatchMetrics, PartTrainer
from stages.training.schedule import ScheduleName
from tests.support.training.in_process_parts import (
    InProcessParts,
    StepBatch,
    UnsplitTrainer,
    assert_bitwise_equal,
    make_training_pipeline,
)
from tests.support.training.residual_networks import DropoutNetwork, SkipNetwork
from tests.support.training.training_network import SmallNetwork

SEED, STEPS = 3, 10


@dataclass
class Net:
    """A network: its name in a pipeline file, how torch builds it, and what it takes."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    classes: int
    settings: dict[str, Any] = field(default_factory=dict)

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
    "small_network": Net("tests.support.training.training_network:small_network", SmallNetwork, (3, 8, 8), 4),
    "skip_network": Net("tests.support.training.residual_networks:skip_network", SkipNetwork, (12,), 5),
    "dropout_network": Net("tests.support.training.residual_networks:dropout_network", DropoutNetwork, (12,), 5),
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


def plain(net: Net, optimizer: str) -> UnsplitTrainer:
    torch.manual_seed(SEED)
    model = net.build()
    return UnsplitTrainer(model, OPTIMIZERS[optimizer][1](model.parameters()))


def split(net: Net, cuts: Sequence[int], optimizer: str) -> InProcessParts:
    settings = OPTIMIZERS[optimizer][0]
    return InProcessParts(make_training_pipeline(net.name, cuts, seed=SEED, model_settings=net.settings, **settings))


def batch(net: Net, number: int, rows: Sequence[int] = (3, 3, 2)) -> StepBatch:
    """The micro-batches of a step, of so many rows each."""
    generator = torch.Generator().manual_seed(number)
    inputs = torch.randn(sum(rows), *net.shape, generator=generator)
    labels = torch.randint(0, net.classes, (sum(rows),), generator=generator)
    return list(zip(torch.split(inputs, list(rows)), torch.split(labels, list(rows)), strict=True))


def random_cuts(net: Net, parts: int, seed: int) -> list[int]:
    return sorted(random.Random(seed).sample(range(1, net.layers), parts - 1))


def uneven(net: Net, number: int) -> StepBatch:
    """The batch of a step, in micro-batches of as many sizes as there may be."""
    return batch(net, number, [(3, 3, 2), (2, 4), (8,), (2, 2, 2, 2)][number % 4])


@lru_cache
def whole_run(name: str, optimizer: str) -> tuple[list[list[float]], dict[str, Tensor]]:
    """What the uncut network comes to: the losses of ten steps, and every parameter and buffer after them."""
    net, whole = NETS[name], plain(NETS[name], optimizer)
    losses = [whole.train_step(number, uneven(net, number)) for number in range(STEPS)]
    return losses, whole.model.state_dict()


# The same ---------------------------------------------------------------------------------------------------------

CASES: list[tuple[str, list[int], str, ScheduleName]] = [
    *[("vgg11", random_cuts(NETS["vgg11"], parts, parts), "sgd", "1f1b") for parts in (1, 2, 3, 5)],
    ("vgg11", [1, 2, 3], "sgd", "gpipe"),  # parts of one layer, one of them without anything to train
    *[("resnet18", random_cuts(NETS["resnet18"], parts, parts), "sgd", "1f1b") for parts in (2, 3)],
    ("resnet18", [5, 8, 20, 41], "sgd", "gpipe"),  # within blocks, whose skip connections cross the cuts
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
def test_after_ten_steps_every_parameter_and_buffer_is_that_of_the_whole_and_so_was_every_loss(
    name: str, cuts: list[int], optimizer: str, schedule: ScheduleName
) -> None:
    net, parts = NETS[name], split(NETS[name], cuts, optimizer)
    assert len(parts.part_trainers) == len(cuts) + 1
    losses = [parts.train_step(number, uneven(net, number), schedule) for number in range(STEPS)]
    expected_losses, expected = whole_run(name, optimizer)
    assert losses == expected_losses
    assert_bitwise_equal(parts.state_dict(), expected)


@pytest.mark.parametrize("net", NETS.values(), ids=NETS.keys())
def test_the_test_would_see_a_difference(net: Net) -> None:
    """Another seed of a micro-batch, or another row more, is not the same: equality above is no accident."""
    whole, parts = plain(net, "sgd"), split(net, [net.layers // 2], "sgd")
    whole.train_step(0, batch(net, 0))
    parts.train_step(0, batch(net, 0, (3, 3, 3)))
    with pytest.raises(AssertionError, match="differ"):
        assert_bitwise_equal(parts.state_dict(), whole.model.state_dict())


@pytest.mark.parametrize("name", ["small_network", "dropout_network"])
def test_what_is_drawn_depends_on_the_seed_of_the_micro_batch(name: str) -> None:
    net = NETS[name]
    found = []
    for seed in (0, 0, 1):
        parts = split(net, [net.layers // 2], "sgd")
        parts.seed = seed
        found.append(parts.train_step(0, batch(net, 0)))
    assert found[0] == found[1] != found[2]


# Given up, and done again -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vgg11", "resnet18", "small_network", "dropout_network", "skip_network"])
def test_a_step_that_is_given_up_half_way_and_done_again_gives_the_same_bits(name: str) -> None:
    net = NETS[name]
    whole, parts = plain(net, "sgd"), split(net, random_cuts(net, 3, 7), "sgd")
    everything = 2 * 3 * 3
    for number in range(3):
        before = parts.state_dict()
        for done in random.Random(number).sample(range(1, everything + 1), 3):
            assert parts.run_operations(number, batch(net, number), limit=done) == done
            parts.abort()
            assert all(len(learner.activations) == 0 for learner in parts.part_trainers)
            assert all(parameter.grad is None for each in parts.part_trainers for parameter in each._part.parameters())
            now = {name: tensor for each in parts.part_trainers for name, tensor in each._part.state_dict().items()}
            assert_bitwise_equal(now, before)
        assert parts.train_step(number, batch(net, number)) == whole.train_step(number, batch(net, number))
    assert_bitwise_equal(parts.state_dict(), whole.model.state_dict())


def test_the_statistics_of_a_batch_norm_move_in_a_step_and_are_put_back_when_it_is_given_up() -> None:
    parts = split(NETS["small_network"], [4, 9], "sgd")
    before = parts.state_dict()
    part = parts.part_trainers[0]._part
    parts.run_operations(0, batch(NETS["small_network"], 0))
    moved = part.state_dict()
    assert not torch.equal(moved["norm.running_mean"], before["norm.running_mean"])
    assert int(moved["norm.num_batches_tracked"]) == 3
    assert_bitwise_equal(parts.state_dict(), before)  # whoever asks meanwhile gets the version
    parts.abort()
    assert_bitwise_equal(parts.state_dict(), before)
    assert not part.state_dict()["norm.running_mean"].any()


def test_an_evaluation_moves_nothing_and_judges_as_the_whole_network_does() -> None:
    net = NETS["small_network"]
    whole, parts = plain(net, "sgd"), split(net, [3, 6], "sgd")
    for number in range(2):
        whole.train_step(number, batch(net, number))
        parts.train_step(number, batch(net, number))
    before = parts.state_dict()
    (inputs, labels), *_ = batch(net, 9, (8,))
    tensors: dict[str, Tensor] | MicroBatchMetrics = {"input": inputs, LABELS_TENSOR: labels}
    micro = MicroBatch(step="0" * 32, term=1, index=0, count=1, rows=8, number=2, seed=0, mode="evaluate")
    for learner in parts.part_trainers:
        assert isinstance(tensors, dict)
        tensors = learner.forward(micro, b"." * 16, tensors)
        assert len(learner.activations) == 0
    whole.model.eval()
    with torch.no_grad():
        outputs = whole.model(inputs)
    expected = nn.functional.cross_entropy(outputs, labels).item()
    assert tensors == MicroBatchMetrics(expected, int((outputs.argmax(1) == labels).sum()), 8)
    assert_bitwise_equal(parts.state_dict(), before)
    whole.model.train()
    assert parts.train_step(2, batch(net, 2)) == whole.train_step(2, batch(net, 2))
    assert_bitwise_equal(parts.state_dict(), whole.model.state_dict())


# Versions -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("name", ["small_network", "skip_network"])
def test_a_run_that_goes_on_from_a_checkpoint_gives_the_same_bits(tmp_path: Path, name: str, optimizer: str) -> None:
    net = NETS[name]
    cuts = random_cuts(net, 3, 5)
    whole, parts = plain(net, optimizer), split(net, cuts, optimizer)
    for number in range(8):
        if number in (2, 5):
            folders = [CheckpointStore(tmp_path / f"{number}-{index}", "f") for index in range(3)]
            for folder, learner in zip(folders, parts.part_trainers, strict=True):
                folder.save(Checkpoint(number, learner.checkpoint_tensors(number), {}))
            parts.run_operations(number, batch(net, number), limit=7)  # which the one that dies takes with it
            # New processes at one of the two, and the old ones, which go back, at the other.
            parts = split(net, cuts, optimizer) if number == 2 else parts
            for folder, learner in zip(folders, parts.part_trainers, strict=True):
                learner.restore(number, folder.load(number).tensors)
                assert learner.version == number
                assert len(learner.activations) == 0
        assert parts.train_step(number, batch(net, number)) == whole.train_step(number, batch(net, number))
    assert_bitwise_equal(parts.state_dict(), whole.model.state_dict())
    assert [learner.version for learner in parts.part_trainers] == [8, 8, 8]


def test_a_run_that_goes_back_to_its_beginning_gives_the_same_bits() -> None:
    net = NETS["small_network"]
    whole, parts = plain(net, "adam"), split(net, [4, 9], "adam")
    for number in range(3):
        parts.train_step(number, batch(net, 100 + number))
    for learner in parts.part_trainers:
        learner.restore(0, None)
    for number in range(3):
        assert parts.train_step(number, batch(net, number)) == whole.train_step(number, batch(net, number))
    assert_bitwise_equal(parts.state_dict(), whole.model.state_dict())


def test_a_checkpoint_that_does_not_fit_leaves_no_version_in_memory() -> None:
    learner = split(NETS["small_network"], [4], "sgd").part_trainers[0]
    tensors = learner.checkpoint_tensors(1)
    del tensors["model/norm.weight"]
    with pytest.raises(RuntimeError, match=r"norm\.weight"):
        learner.restore(1, tensors)
    assert learner.version is None
    learner.restore(0, None)
    assert learner.version == 0


@pytest.mark.parametrize(("name", "cuts"), [("resnet18", [5, 41]), ("mobilenet", [60]), ("vgg11", [6, 11])])
def test_the_joined_weights_load_into_the_model_that_was_never_cut(tmp_path: Path, name: str, cuts: list[int]) -> None:
    net = NETS[name]
    parts = split(net, cuts, "sgd")
    parts.train_step(0, batch(net, 0))
    bodies = {
        f"s{index}": TensorContent({key: from_array(tensor) for key, tensor in learner.weights().items()})
        for index, learner in enumerate(parts.part_trainers)
    }
    write_weights(tmp_path, bodies)
    model = net.build()
    model.load_state_dict(load_file(tmp_path / MODEL_FILE), strict=True)
    assert_bitwise_equal(model.state_dict(), parts.state_dict())


# What does not fit --------------------------------------------------------------------------------------------------


def learner_with_forward() -> tuple[PartTrainer, bytes, dict[str, Tensor]]:
    """The first of two parts, a forward that it keeps, and what that gave."""
    net, request = NETS["skip_network"], b"." * 16
    learner = split(net, [4], "sgd").part_trainers[0]
    ((inputs, labels),) = batch(net, 0, (4,))
    micro = MicroBatch(step="0" * 32, term=1, index=0, count=1, rows=4, number=0, seed=0)
    given = learner.forward(micro, request, {"input": inputs, LABELS_TENSOR: labels})
    assert isinstance(given, dict)
    given.pop(LABELS_TENSOR)
    return learner, request, given


def test_a_gradient_of_another_shape_is_refused_and_moves_no_weight() -> None:
    learner, request, given = learner_with_forward()
    before = learner.weights()
    gradients = {name: tensor[:-1] for name, tensor in given.items()}
    with pytest.raises(BadGradient, match=r"must have the shape \[4, 16\], has \[3, 16\]"):
        learner.backward(request, gradients)
    learner.abort()
    assert_bitwise_equal(learner.weights(), before)


def test_a_gradient_of_what_wants_none_is_read_over() -> None:
    found = []
    for more in ({}, {"labels": torch.zeros(4), "input": torch.ones(4, 12)}):
        learner, request, given = learner_with_forward()
        learner.backward(request, {**given, **more})
        learner.commit(0.1)
        found.append(learner.weights())
    assert_bitwise_equal(*found)


def test_a_gradient_of_a_forward_that_was_taken_out_is_unknown() -> None:
    learner, request, given = learner_with_forward()
    learner.backward(request, given)
    with pytest.raises(UnknownForward):
        learner.backward(request, given)
    with pytest.raises(UnknownForward):
        learner.backward(b":" * 16, given)


def judge(labels: Tensor, inputs: Tensor | None = None) -> object:
    net = NETS["skip_network"]
    (learner,) = split(net, [], "sgd").part_trainers
    micro = MicroBatch(step="0" * 32, term=1, index=0, count=1, rows=4, number=7, seed=0)
    return learner.forward(
        micro, b"." * 16, {"input": torch.zeros(4, 12) if inputs is None else inputs, LABELS_TENSOR: labels}
    )


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (torch.tensor([0, 1, 5, 2]), "label 5 of row 2 is out of range: the network has 5 classes"),
        (torch.tensor([-1, 1, 5, 2]), "label -1 of row 0 is out of range"),
        (torch.tensor([-100, 1, 0, 2]), "label -100 of row 0"),  # torch's own mark for rows that do not count
        (torch.tensor([0, 1]), "2 labels came for 4 rows"),
    ],
)
def test_labels_that_the_loss_cannot_take_are_told_by_their_row(labels: Tensor, text: str) -> None:
    with pytest.raises(BadLabels, match=text):
        judge(labels)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_says_in_which_step_and_what_to_try(value: float) -> None:
    with pytest.raises(NotFinite, match=r"the loss is nan in step 7 .*try a lower learning rate"):
        judge(torch.tensor([0, 1, 2, 3]), torch.full((4, 12), value))


def test_a_version_that_is_no_number_any_more_is_in_no_checkpoint() -> None:
    learner = split(NETS["skip_network"], [], "sgd").part_trainers[0]
    with torch.no_grad():
        next(iter(learner._part.parameters()))[0] = float("nan")
    with pytest.raises(NotFinite, match=r"parameter 'first\.weight' is not finite in step 3"):
        learner.checkpoint_tensors(3)
