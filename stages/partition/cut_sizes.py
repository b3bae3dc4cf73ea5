"""The bytes that cross each cut of a pipeline's network, measured by running its parts once on an example."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from brokers.config.pipeline_file import Pipeline
from brokers.config.schema import StageTable
from brokers.errors import UsageError
from stages.models.registry import ModelSpec, pipeline_model_spec
from stages.partition.part_loader import META_DEVICE
from stages.partition.partition import layer_names, partition


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


def measure_cuts(pipeline: Pipeline, *, every: bool = False) -> list[CutSize]:
    """Return the sizes of the file's cuts, or of every possible cut as if it were the only one; empty without a model.

    Raises `UsageError` "NoExampleInput" if the model's input shape is unknown or does not work, and the errors of
    `pipeline_model_spec` and `partition`.
    """
    cuts = pipeline.pipeline.cuts
    if pipeline.pipeline.model is None or not (cuts or every):
        return []
    spec = pipeline_model_spec(pipeline)
    if spec.input_shape is None:
        raise _example_error(spec, "its factory has no attribute `input_shape`")
    stages = [stage for stage in pipeline.stage if stage.executor is None]
    links = [(stage, receiver) for stage in stages if (receiver := pipeline.next_stage(stage))]
    if every:
        # With all cuts at once each part passes on the values that later parts need, as it would with its cut alone.
        with torch.random.fork_rng(devices=[]):
            cuts = tuple(range(1, len(layer_names(spec.build().train(pipeline.is_training)))))
        links = [(stages[0], stages[-1])] * len(cuts)
    outputs = _run_parts(spec, cuts, pipeline.is_training, rows_per_message(pipeline))
    return [_cut_size(after, *link, tensors) for after, link, tensors in zip(cuts, links, outputs, strict=False)]


def _run_parts(spec: ModelSpec, cuts: tuple[int, ...], training: bool, rows: int) -> Iterator[dict[str, Tensor]]:
    """Yield the outputs of each part but the last, for `rows` examples of zeros."""
    assert spec.input_shape is not None
    shape = (rows, *spec.input_shape[1:])
    with torch.random.fork_rng(devices=[]):
        model = spec.build().train(training)
    parts = partition(model, cuts, {spec.input_name: torch.empty(spec.input_shape, device=META_DEVICE)})
    tensors = {spec.input_name: torch.zeros(shape)}
    for part in parts[:-1]:
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):  # dropout draws random numbers
                tensors = part(tensors)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise _example_error(spec, f"an input of shape {list(shape)} fails: {error}") from error
        yield tensors


def _example_error(spec: ModelSpec, problem: str) -> UsageError:
    message = f"cannot measure the cuts of model {spec.name!r}: {problem}"
    return UsageError("NoExampleInput", message, key="pipeline.model", model=spec.name)


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
