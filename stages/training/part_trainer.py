"""Training of one part of a network: forward, backward, commit, abort, restore; without a network or an event loop.

Training is exact: with the same seeds and micro-batches the weights equal those of the unsplit network bit for bit, on
one thread of one kind of CPU. Four rules make it so:

* Gradients of micro-batches accumulate in the order of the backwards; only `commit` changes weights.
* The random state travels with the micro-batch: the first stage seeds it and each stage continues from the state of the
  one before, so that dropout draws the same numbers as in one piece.
* Received tensors are copied: kernels add up in another order when the data starts at an odd address.
* The forward changes the statistics of batch norms; an aborted step restores them.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from brokers.errors import SparseError, WireError
from brokers.protocol.training import LABELS_TENSOR, MICRO_BATCH_LIMIT, RNG_STATE_TENSOR, MicroBatch
from stages.loading.part_loader import InspectParameters, TrainablePart, load_trainable_part
from stages.loading.weights_file import find_weights
from stages.models.registry import pipeline_model_spec
from stages.partition.boundary import convert_float, is_differentiable, restore_layout
from stages.partition.partition import Part, fingerprint
from stages.training.optimizer_and_loss import check_optimizer, find_loss, make_optimizer
from stages.training.optimizer_state import GroupLearningRates, optimizer_tensors, restore_optimizer, take_step
from stages.training.step_queue import unknown_forward_error
from stages.worker.worker_context import WorkerContext

log = logging.getLogger(__name__)

_MODEL_PREFIX = "model/"


class NotFinite(SparseError):
    """A loss or a parameter that is infinite or not a number, in the source's step `number`."""

    def __init__(self, subject: str, number: int) -> None:
        message = (
            f"{subject} in step {number} (from 0): try a lower learning rate or a longer warmup, or check the data of "
            "that step; the last checkpoint is from before it"
        )
        super().__init__(type(self).__name__, message, number=number)


@dataclass(frozen=True, slots=True)
class MicroBatchMetrics:
    """The last stage's result for a micro-batch: mean loss, correct rows (None without classes), number of rows."""

    loss: float
    correct: int | None
    rows: int


@dataclass(frozen=True, slots=True)
class SavedForward:
    """The tensors of a forward that its backward needs: inputs and outputs that require gradients, by name.

    The last stage's only output is the loss.
    """

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]


class PartTrainer:
    """Trains the part of the pipeline's model that belongs to a worker's stage. All methods run in one thread.

    `version` is the number of steps in the weights; None while they are not a version (after a failed restore or
    commit). `activations` holds the saved forwards by request id; a backward pops its own. `min_rows` is the smallest
    number of rows of a micro-batch with which the whole network can be trained.
    """

    def __init__(self, context: WorkerContext) -> None:
        pipeline = context.pipeline
        self.version: int | None = 0
        self.min_rows = 1
        self.activations: dict[bytes, SavedForward] = {}
        self._pipeline = pipeline
        self._index = pipeline.part_index(context.stage)
        self._is_last = self._index == len(pipeline.pipeline.cuts)
        self._device = torch.device(context.device)
        self._threads = context.threads
        self._folder = str(pipeline.folder)
        self._spec = pipeline_model_spec(pipeline)
        self._loss = find_loss(pipeline.training, self._folder)
        self._initial_buffers: dict[str, Tensor] | None = None  # as they were when the step began
        self._parts: TrainablePart

    @property
    def network(self) -> str:
        """The digest of the whole network as it is before training."""
        return self._parts.network

    @property
    def _module(self) -> nn.Module:
        return self._parts.training.module

    def start(self) -> str:
        """Build version 0; return the fingerprint of the part and its training recipe."""
        torch.set_num_threads(self._threads)
        self._build(partial(check_optimizer, self._pipeline.training, self._folder, self._device))
        self.min_rows = self._parts.min_rows
        if not self._parts.is_exact:
            log.info("the parts add up gradients in another order than the unsplit network: they differ by rounding")
        recipe = self._pipeline.training.model_dump_json(include={"optimizer", "settings", "loss"})
        return fingerprint(self._parts.training, extra=recipe)

    def _build(self, inspect: InspectParameters | None = None) -> None:
        table = self._pipeline.pipeline
        weights = find_weights(table.weights, self._pipeline.folder) if table.weights else None
        training = self._pipeline.training
        self._parts = load_trainable_part(
            self._spec, table.cuts, self._index, weights, table.seed, self._device, inspect=inspect
        )
        parameters = list(self._parts.trainable.values())
        self._optimizer = make_optimizer(training, parameters, self._folder) if parameters else None
        if self._optimizer is not None:
            self._learning_rates = GroupLearningRates(self._optimizer, training.lr)
        self.version = 0

    def forward(
        self, micro_batch: MicroBatch, request: bytes, tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor] | MicroBatchMetrics:
        """Run the forward of a micro-batch of B rows, and save it for its backward if it is trained.

        `tensors`: the values that cross the cut before this part, (B, ...) each, with labels (B, ...) and the random
        state where there are such. Returns the same for the next part; the metrics at the last part.
        """
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        labels = tensors.pop(LABELS_TENSOR, None)
        random_state = tensors.pop(RNG_STATE_TENSOR, None)
        training = micro_batch.mode == "train"
        part = self._parts.training if training else self._parts.evaluation
        part.set_mode()
        if training and self._initial_buffers is None:
            self._initial_buffers = {name: buffer.clone() for name, buffer in self._module.named_buffers()}
        inputs = self._prepare_inputs(part, tensors, training)
        random = _RandomState(self._device, micro_batch.seed, random_state)
        metrics = None
        with torch.set_grad_enabled(training):
            outputs = part(inputs)
            if self._is_last:
                loss, metrics = self._compute_loss(outputs, labels, micro_batch.number)
                # The step's loss is the mean over its rows, for micro-batches of any sizes.
                outputs = {"loss": loss * (metrics.rows / micro_batch.rows)}
        if training:
            assert len(self.activations) < MICRO_BATCH_LIMIT  # the step queue runs one step at a time
            self.activations[request] = SavedForward(_requiring_grad(inputs), _requiring_grad(outputs))
        if metrics is not None:
            return metrics
        results = {name: output.detach() for name, output in outputs.items()}
        if labels is not None:
            results[LABELS_TENSOR] = labels
        if (state := random.state_to_send()) is not None:
            results[RNG_STATE_TENSOR] = state
        return results

    def _prepare_inputs(self, part: Part, tensors: Mapping[str, Tensor], training: bool) -> dict[str, Tensor]:
        inputs = {name: tensor.to(self._device) for name, tensor in tensors.items()}
        if self._index == 0:
            names = part.input_names
            if len(names) == len(inputs) == 1:  # a single tensor needs no name
                inputs = {names[0]: next(iter(inputs.values()))}
            if unknown := [name for name in inputs if name not in names]:  # a mask must not be left out unnoticed
                message = f"the network has no input {', '.join(unknown)}: its inputs are {', '.join(names)}"
                raise WireError("UnknownInput", message)
            normalise = self._spec.normalise
            if normalise is not None and {tensor.dtype for tensor in inputs.values()} == {torch.uint8}:
                inputs = {name: normalise(tensor) for name, tensor in inputs.items()}
            inputs = {name: convert_float(tensor, part.layouts.get(name)) for name, tensor in inputs.items()}
        elif training:
            for tensor in inputs.values():
                tensor.requires_grad_(is_differentiable(tensor))
        return inputs

    def _compute_loss(
        self, outputs: Mapping[str, Tensor], labels: Tensor | None, number: int
    ) -> tuple[Tensor, MicroBatchMetrics]:
        if labels is None:
            raise _labels_error("the micro-batch has no labels, which the last stage needs for the loss")
        labels = labels.to(self._device)
        output: object = outputs["output"] if set(outputs) == {"output"} else outputs
        correct = _count_correct(output, labels)
        loss = self._loss(output, labels)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise NotFinite(f"the loss is {value}", number)
        return loss, MicroBatchMetrics(value, correct, len(labels))

    def backward(self, request: bytes, gradients: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """Run the backward of a saved forward; return the gradients of its inputs, by name and of their shapes.

        `gradients`: those of its outputs, by name and of their shapes; None at the last stage. Raises `WireError` with
        the code "UnknownForward" or "BadGradient".
        """
        if request not in self.activations:
            raise unknown_forward_error(request)
        saved = self.activations.pop(request)
        outputs = saved.outputs
        output_gradients = None
        if gradients is not None:
            outputs = {name: output for name, output in outputs.items() if name in gradients}
            for name, output in outputs.items():
                if gradients[name].shape != output.shape:
                    expected, actual = tuple(output.shape), tuple(gradients[name].shape)
                    message = f"the gradient of {name!r} must have shape {list(expected)}, it has {list(actual)}"
                    raise WireError("BadGradient", message, name=name, expected=expected, actual=actual)
            layouts = self._parts.training.gradient_layouts
            output_gradients = [
                restore_layout(gradients[name].clone().to(self._device), layouts.get(name)) for name in outputs
            ]
        if outputs:
            torch.autograd.backward(list(outputs.values()), output_gradients)
        return {name: tensor.grad for name, tensor in saved.inputs.items() if tensor.grad is not None}

    def commit(self, lr: float) -> int:
        """Apply the accumulated gradients with the learning rate `lr`; return the number of the new version."""
        assert self.version is not None
        assert not self.activations
        version = self.version + 1
        self.version = None  # until the optimizer is done, the weights are not a version
        if self._optimizer is not None:
            self._learning_rates.set(lr)
            take_step(self._optimizer)
        self._initial_buffers = None
        self.version = version
        return version

    def abort(self) -> None:
        """Discard the current step: gradients, saved forwards and changed buffers."""
        self.activations.clear()
        if self._optimizer is not None:
            self._optimizer.zero_grad(set_to_none=True)
        if self._initial_buffers is not None:
            with torch.no_grad():
                for name, buffer in self._module.named_buffers():
                    buffer.copy_(self._initial_buffers[name])
            self._initial_buffers = None

    def weights(self) -> dict[str, Tensor]:
        """Copy the part's state as of its version, on the CPU, with the names of the unsplit network."""
        initial_buffers = self._initial_buffers or {}  # a step in progress changes buffers
        state = self._module.state_dict()
        return {name: initial_buffers.get(name, tensor).detach().cpu().clone() for name, tensor in state.items()}

    def checkpoint_tensors(self, number: int) -> dict[str, Tensor]:
        """Copy the state of the part and of its optimizer, for the checkpoint of version `number`.

        Raises `NotFinite`: a checkpoint must be usable.
        """
        tensors = {f"{_MODEL_PREFIX}{name}": tensor for name, tensor in self.weights().items()}
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise NotFinite(f"parameter {name.removeprefix(_MODEL_PREFIX)!r} is not finite", number)
        if self._optimizer is not None:
            tensors |= optimizer_tensors(self._optimizer, self._parts.trainable.items())
        return tensors

    def restore(self, number: int, tensors: Mapping[str, Tensor] | None) -> None:
        """Load version `number` from the tensors of a checkpoint; from the initial weights if `tensors` is None."""
        self.activations.clear()
        self._initial_buffers = None
        self._build()
        self.version = None  # until everything is loaded, the weights are not a version
        if tensors is not None:
            self._module.load_state_dict(model_state_dict(tensors))
            if self._optimizer is not None:
                restore_optimizer(self._optimizer, self._parts.trainable.items(), tensors)
        self.version = number


def model_state_dict(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Select the parameters and buffers among the tensors of a checkpoint, by their names in the network."""
    return {name.removeprefix(_MODEL_PREFIX): item for name, item in tensors.items() if name.startswith(_MODEL_PREFIX)}


class _RandomState:
    """The generator's state during one forward: seeded, or continued from the stage before."""

    def __init__(self, device: torch.device, seed: int, state: Tensor | None) -> None:
        is_cuda = device.type == "cuda"
        index = torch.cuda.current_device() if is_cuda and device.index is None else device.index
        self._generator = torch.cuda.default_generators[index] if is_cuda else torch.default_generator
        self._generator.manual_seed(seed)
        self._is_continued = state is not None and state.numel() == self._generator.get_state().numel()
        if state is not None and self._is_continued:
            self._generator.set_state(state)
        self._initial_state = self._generator.get_state()

    def state_to_send(self) -> Tensor | None:
        """The state that the next stage continues from; None if it equals the freshly seeded one."""
        state = self._generator.get_state()
        return state if self._is_continued or not torch.equal(state, self._initial_state) else None


def _count_correct(output: object, labels: Tensor) -> int | None:
    """Count the rows whose largest output is at their label; None if labels are not classes.

    `output` (B, classes), `labels` (B). Raises `WireError` with the code "BadLabels".
    """
    if not isinstance(output, Tensor) or output.dim() != 2 or labels.is_floating_point() or labels.dim() != 1:
        return None
    classes = output.shape[1]
    if len(labels) != len(output):
        raise _labels_error(f"expected {len(output)} labels, one for each row, got {len(labels)}")
    out_of_range = (labels < 0) | (labels >= classes)
    if bool(out_of_range.any()):
        row = int(out_of_range.nonzero()[0])
        raise _labels_error(f"label {int(labels[row])} of row {row} is out of range: the network has {classes} classes")
    return int((output.argmax(1) == labels).sum())


def _labels_error(problem: str) -> WireError:
    return WireError("BadLabels", problem)


def _requiring_grad(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
