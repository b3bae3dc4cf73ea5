"""Each network learns in parts what it learns in an ordinary loop, bit for bit, or is refused with the reason."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from brokers.errors import UsageError
from stages.partition.tracing import trace
from tests.support.training import unusual_modes, unusual_values
from tests.support.training.in_process_parts import (
    InProcessParts,
    StepBatch,
    UnsplitTrainer,
    assert_bitwise_equal,
    make_training_pipeline,
)
from tests.support.training.unusual_modes import CLASSES

SEED = 3
STEPS = 3
SETTINGS: dict[str, Any] = {"momentum": 0.9, "weight_decay": 1e-2}  # a gradient of zeros is not the same as none
# Networks that can be cut at some places only, as a parameter or a buffer belongs to one part.
CUTS = {
    "AutocastTwice": [[2, 10]],
    "StandardisedWeight": [[2, 5]],
    "ScaledTwice": [[2, 6]],
    "ChangedBuffer": [[9, 11]],
    "SharedNorm": [[5]],
    "FlagsOneByOne": [[3, 9]],
    "DropPath": [[3, 12]],
    "DropPathBernoulli": [[3, 13]],
    "NoisyInTraining": [[3, 12]],
}
# A cut, and the code and message of the error.
REFUSED: dict[str, tuple[int, str, str]] = {
    # Plain torch counts a micro-batch twice in the statistics of a checkpointed batch norm.
    "CheckpointedSequence": (2, "PartsDiffer", "'b.1.running_mean' has other values"),
    "ContainerBackwardHook": (2, "PartsDiffer", "takes another path"),
    "RootBackwardHook": (2, "PartsDiffer", "takes another path|gradient"),
    "ValueHook": (2, "PartsDiffer", "takes another path"),
    "ModeSetInForward": (2, "PartsDiffer", "'output' has other values, after layer 'b.0'"),
    "PythonLayerDrop": (2, "PartsDiffer", "draws random numbers of Python or numpy"),
    "NumpyLayerDrop": (2, "PartsDiffer", "draws random numbers of Python or numpy"),
    "NumpyNoise": (2, "PartsDiffer", "draws random numbers of Python or numpy"),
    "TorchLayerDrop": (2, "CannotTrace", "its control flow depends on the value of 'lt'"),
    "TorchLayerDropItem": (2, "CannotTrace", "its control flow depends on the value of 'lt'"),
    "ReplacedBuffer": (2, "PartsDiffer", "replaces buffer 'average', which tracing cannot see: modify it in place"),
    "KeptInTraining": (2, "PartsDiffer", "its second micro-batch differs: .* from one call to the next in 'last'"),
    "DecayedWeight": (2, "PartsDiffer", "modifies its parameters, such as 'c.weight': compute with a copy"),
    "CountedSteps": (2, "PartsDiffer", "keeps numbers or lists from one call to the next"),
    "CountedLater": (2, "PartsDiffer", "keeps numbers or lists from one call to the next"),
    "GrowingScale": (2, "PartsDiffer", "several micro-batches before the first backward, which then fails"),
    "SharedBuffer": (3, "PartsDiffer", "modifies buffer 'average', which several parts use"),
}


def networks() -> dict[str, type[nn.Module]]:
    return {
        name: kind
        for module in (unusual_modes, unusual_values)
        for name, kind in vars(module).items()
        if isinstance(kind, type) and hasattr(kind, "input_shape") and kind.__module__ == module.__name__
    }


NETWORKS = networks()
ACCEPTED = [name for name in NETWORKS if name not in REFUSED]


def make_parts(name: str, cuts: Sequence[int]) -> InProcessParts:
    model = f"{NETWORKS[name].__module__}:{name}"
    return InProcessParts(make_training_pipeline(model, cuts, seed=SEED, optimizer="sgd", lr=0.05, settings=SETTINGS))


def make_whole(name: str) -> UnsplitTrainer:
    torch.manual_seed(SEED)
    model = NETWORKS[name]()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return UnsplitTrainer(model, torch.optim.SGD(trained, lr=0.05, **SETTINGS))


def make_batch(name: str, number: int, rows: Sequence[int] = (3, 2)) -> StepBatch:
    generator = torch.Generator().manual_seed(number)
    shape = NETWORKS[name].input_shape[1:]  # type: ignore[attr-defined]
    inputs = torch.randn(sum(rows), *shape, generator=generator)
    labels = torch.randint(0, CLASSES, (sum(rows),), generator=generator)
    return list(zip(torch.split(inputs, list(rows)), torch.split(labels, list(rows)), strict=True))


def in_its_dtype(model: nn.Module, batch: StepBatch) -> StepBatch:
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return [(inputs.to(dtype), labels) for inputs, labels in batch]


def cuts_of(name: str) -> list[list[int]]:
    """Return cuts into three parts, and between all layers."""
    if name in CUTS:
        return CUTS[name]
    model = NETWORKS[name]().train()
    ((example, _),) = in_its_dtype(model, make_batch(name, 0, (2,)))
    layers = len(trace(model, {"x": example}).layer_names)
    return [[layers // 3, 2 * layers // 3], list(range(1, layers))]


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`", "ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("name", ACCEPTED)
def test_losses_parameters_and_buffers_are_equal(name: str) -> None:
    for cuts in cuts_of(name):
        check_equality(name, cuts)


def check_equality(name: str, cuts: Sequence[int]) -> None:
    whole, parts = make_whole(name), make_parts(name, cuts)
    for number in range(STEPS):
        batch = make_batch(name, number)
        assert parts.train_step(number, batch) == whole.train_step(number, in_its_dtype(whole.model, batch))
    assert_bitwise_equal(parts.state_dict(), whole.model.state_dict())
    (evaluated,) = make_batch(name, 99, (4,))
    metrics = parts.evaluate(*evaluated)
    whole.model.eval()
    ((inputs, labels),) = in_its_dtype(whole.model, [evaluated])
    with torch.no_grad():
        outputs = whole.model(inputs)
    assert metrics.loss == nn.functional.cross_entropy(outputs, labels).item()
    assert_bitwise_equal(parts.state_dict(), whole.model.state_dict())


@pytest.mark.parametrize("name", REFUSED)
def test_network_is_refused_with_the_reason(name: str) -> None:
    cut, code, message = REFUSED[name]
    with pytest.raises(UsageError, match=message) as caught:
        make_parts(name, [cut])
    assert caught.value.code == code
    assert "\n" not in str(caught.value)
