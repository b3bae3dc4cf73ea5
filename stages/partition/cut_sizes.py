"""What crosses the cuts of a pipeline's network, in bytes: its parts are run once, on one example."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from brokers.config.pipeline_file import Pipeline
from brokers.config.schema import StageTable
from brokers.errors import UsageError
from stages.models.registry import ModelSpec, get_model_spec
from stages.partition.part_loader import META_DEVICE
from stages.partition.partition import Part, layer_names, partition


@dataclass(frozen=True, slots=True)
class CutSize:
    """What one stage sends to the next for one request, or for one micro-batch of a pipeline that trains."""

    after: int  # layers
    sender: str
    receiver: str
    wire: str
    float32_bytes: int
    wire_bytes: int
    tensors: dict[str, list[int]]  # the shape of each


@dataclass(eq=False)
class NoExampleInput(UsageError):
    """A network of which nobody knows what it eats."""

    key = "pipeline.model"

    name: str
    problem: str

    def __str__(self) -> str:
        return f"what crosses the cuts of model {self.name!r} cannot be computed: {self.problem}"


def rows_per_message(pipeline: Pipeline) -> int:
    """How many examples one message has."""
    training = pipeline.training
    return -(-training.batch // training.micro_batches) if pipeline.is_training else 1


def measure_cuts(pipeline: Pipeline) -> list[CutSize]:
    """Return what crosses each cut, in order; none where there is no model.

    Raises `NoExampleInput` for a network with no known input shape, or that cannot compute one of it; and what
    `get_model_spec` and `partition` raise.
    """
    table = pipeline.pipeline
    if table.model is None or not table.cuts:
        return []
    spec = _spec(pipeline)
    served = [stage for stage in pipeline.stage if stage.executor is None]
    given = list(_given(spec, table.cuts, pipeline.is_training, rows_per_message(pipeline)))
    return [
        _cut(after, sender, pipeline.next_stage(sender) or receiver, tensors)
        for after, sender, receiver, tensors in zip(table.cuts, served, served[1:], given, strict=False)
    ]


def measure_all_cuts(pipeline: Pipeline) -> list[CutSize]:
    """Return what would cross each cut that the network can have, each as the only one: from its first stage on.

    Raises as `measure_cuts` does.
    """
    if pipeline.pipeline.model is None:
        return []
    spec = _spec(pipeline)
    with torch.random.fork_rng(devices=[]):
        count = len(layer_names(spec.build().train(pipeline.is_training)))
    cuts = tuple(range(1, count))
    served = [stage for stage in pipeline.stage if stage.executor is None]
    # A value that is used further on than the next part passes through it: all cuts at once carry what each would.
    given = _given(spec, cuts, pipeline.is_training, rows_per_message(pipeline)) if cuts else ()
    return [_cut(after, served[0], served[-1], tensors) for after, tensors in zip(cuts, given, strict=True)]


def _spec(pipeline: Pipeline) -> ModelSpec:
    """Raises `NoExampleInput` for a network with no known input shape."""
    table = pipeline.pipeline
    spec = get_model_spec(
        table.model or "",
        settings=table.model_settings,
        labels=table.labels,
        threshold=table.threshold,
        nms=table.nms,
        folder=str(pipeline.folder),
    )
    if spec.input_shape is None:
        raise NoExampleInput(spec.name, "it does not say its input's shape: expected an attribute `input_shape`")
    return spec


def _given(spec: ModelSpec, cuts: tuple[int, ...], trains: bool, count: int) -> Iterator[dict[str, Tensor]]:
    """Yield what each part gives for `count` empty examples."""
    assert spec.input_shape is not None
    shape = (count, *spec.input_shape[1:])
    with torch.random.fork_rng(devices=[]):
        model = spec.build().train(trains)
    parts: tuple[Part, ...] = partition(
        model, cuts, {spec.input_name: torch.empty(spec.input_shape, device=META_DEVICE)}
    )
    tensors = {spec.input_name: torch.zeros(shape)}
    for part in parts[:-1]:
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):  # dropout draws
                tensors = part(tensors)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise NoExampleInput(spec.name, f"it fails on an input of shape {list(shape)}: {error}") from error
        yield tensors


def _cut(after: int, sender: StageTable, receiver: StageTable, tensors: dict[str, Tensor]) -> CutSize:
    full = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    wire: torch.dtype = getattr(torch, sender.wire)
    sent = sum(
        tensor.numel() * (wire.itemsize if tensor.dtype is torch.float32 else tensor.element_size())
        for tensor in tensors.values()
    )
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    return CutSize(after, sender.name, receiver.name, sender.wire, full, sent, shapes)
