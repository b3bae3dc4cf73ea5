"""The bytes that cross each cut of a pipeline's network, measured by running its parts once on an example."""

from dataclasses import dataclass

import torch
from torch import Tensor

from brokers.config.pipeline_file import Pipeline
from brokers.config.schema import StageTable
from stages.loading.model_builder import one_at_a_time
from stages.loading.part_loader import Mode, check_parts, example_error, load_model
from stages.models.registry import pipeline_model_spec
from stages.partition.partition import partition
from stages.verification.example import join_requests
from stages.verification.model_state import seeded
from stages.verification.part_chain import PartChain

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class CutSize:
    """The message from a stage to the next one for one request, or for one micro-batch in training."""

    after: int  # layers
    sender: str
    receiver: str
    wire: str
    float32_bytes: int
    wire_bytes: int
    tensors: dict[str, list[int]]  # shapes by name


def rows_per_message(pipeline: Pipeline) -> int:
    """Return the number of examples in one message: 1, or the largest micro-batch in training."""
    training = pipeline.training
    return -(-training.batch // training.micro_batches) if pipeline.is_training else 1


@one_at_a_time
def measure_cuts(pipeline: Pipeline, *, every: bool = False) -> list[CutSize]:
    """Return the sizes of the file's cuts, or of every possible cut as if it were the only one; empty without a model.

    The file's cuts are checked as those of a stage are, with initial weights; with `every` the network is checked in
    one part, since a single cut where it cannot be split would hide the others. Raises `UsageError`: those of
    `load_model`, `partition` and `check_parts`, and "NoExampleInput" also if the example does not work with the rows of
    a message.
    """
    cuts = pipeline.pipeline.cuts
    if pipeline.pipeline.model is None or not (cuts or every):
        return []
    loaded = load_model(pipeline_model_spec(pipeline), None, pipeline.pipeline.seed, training=pipeline.is_training)
    if loaded.example is None:
        raise example_error(loaded.spec)
    traced = loaded.trace(training=pipeline.is_training)
    stages = [stage for stage in pipeline.stage if stage.executor is None]
    links = [(stage, receiver) for stage in stages if (receiver := pipeline.next_stage(stage))]
    if every:
        # With all cuts at once each part passes on the values that later parts need, as it would with its cut alone.
        cuts = tuple(range(1, len(traced.layer_names)))
        links = [(stages[0], stages[-1])] * len(cuts)
    parts = partition(traced, cuts)
    mode: Mode = "training" if pipeline.is_training else "inference"
    check_parts(loaded, traced, () if every else cuts, _CPU, mode=mode)
    rows = join_requests([loaded.example] * rows_per_message(pipeline))
    try:
        with torch.no_grad(), seeded(_CPU):  # dropout draws random numbers
            runs = PartChain(parts).run(rows or loaded.example)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise example_error(loaded.spec, f"{rows_per_message(pipeline)} rows of its example fail: {error}") from error
    return [_cut_size(after, *link, run.outputs) for after, link, run in zip(cuts, links, runs, strict=False)]


def _cut_size(after: int, sender: StageTable, receiver: StageTable, tensors: dict[str, Tensor]) -> CutSize:
    wire_dtype: torch.dtype = getattr(torch, sender.wire)
    return CutSize(
        after=after,
        sender=sender.name,
        receiver=receiver.name,
        wire=sender.wire,
        float32_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        wire_bytes=sum(
            tensor.numel() * (wire_dtype if tensor.dtype is torch.float32 else tensor.dtype).itemsize
            for tensor in tensors.values()
        ),
        tensors={name: list(tensor.shape) for name, tensor in tensors.items()},
    )
