"""One part of a network that is trained: forward, backward, commit, and back to a former version. No network, no loop.

Exact: the same seeds and the same micro-batches give the weights of the uncut network, to the last bit on one thread of
one kind of CPU.

* Gradients of micro-batches add up as the backwards are done, and nothing else touches the weights until `commit`.
* The random state travels with the micro-batch: the first stage seeds it, each stage goes on where the one before it
  ended, so that dropout draws what it would have drawn in one piece.
* What arrives is copied into memory of its own: kernels add up in another order from an odd address.
* Statistics of batch norms change in the forward: they are put back when a step is given up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from brokers.config.pipeline_file import Pipeline
from brokers.config.schema import StageTable
from brokers.protocol.training import LABELS_TENSOR, RNG_STATE_TENSOR, MicroBatch
from stages.models.registry import ModelSpec, get_model_spec
from stages.partition.part_loader import load_trainable_part
from stages.partition.partition import Part, fingerprint
from stages.training.activation_store import ActivationStore
from stages.training.errors import BadGradient, BadLabels, NotFinite
from stages.training.optimizer_and_loss import find_loss, make_optimizer
from stages.worker.model_executor import find_pipeline_weights

_MODEL, _OPTIMIZER = "model/", "optimizer/"


@dataclass(frozen=True, slots=True)
class MicroBatchMetrics:
    """What the last stage says of a micro-batch: the mean loss of its rows, and how many it had right."""

    loss: float
    correct: int | None
    rows: int


@dataclass(frozen=True, slots=True)
class _SavedForward:
    """What a backward needs: inputs that want a gradient, and what to begin from (at the last stage, the loss)."""

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]


class PartTrainer:
    """Trains part `index` of the pipeline's model. All methods run in one thread."""

    def __init__(self, pipeline: Pipeline, stage: StageTable, *, device: str, threads: int) -> None:
        self.version: int | None = 0
        self.activations: ActivationStore[_SavedForward] = ActivationStore()
        self._pipeline = pipeline
        self._index = pipeline.part_index(stage)
        self._is_last = self._index == len(pipeline.pipeline.cuts)
        self._device = torch.device(device)
        self._threads = threads
        self._folder = str(pipeline.folder)
        table = pipeline.pipeline
        self._spec: ModelSpec = get_model_spec(table.model or "", settings=table.model_settings, folder=self._folder)
        self._loss = find_loss(pipeline.training, self._folder)
        self._buffers: dict[str, Tensor] | None = None  # as the step began
        self._part: Part
        self._evaluation: Part | None

    def start(self) -> str:
        """Build version 0; returns what tells this part and its recipe from others."""
        torch.set_num_threads(self._threads)
        self._build()
        recipe = self._pipeline.training.model_dump_json(include={"optimizer", "settings", "loss"})
        return fingerprint(self._part, extra=recipe)

    def _build(self) -> None:
        table = self._pipeline.pipeline
        weights = find_pipeline_weights(table.weights, self._pipeline.folder)
        self._part, self._evaluation = load_trainable_part(
            self._spec, table.cuts, self._index, weights, table.seed, self._device
        )
        self._optimizer = make_optimizer(self._pipeline.training, self._part.parameters(), self._folder)
        self.version = 0

    # A step --------------------------------------------------------------------------------------------------------

    def forward(
        self, micro: MicroBatch, request: bytes, tensors: dict[str, Tensor]
    ) -> dict[str, Tensor] | MicroBatchMetrics:
        """The forward of a micro-batch, kept for its backward if it is trained.

        Takes what crosses the cut before this part, (B, ...) each, with labels (B) and the random state if there are
        any; gives the same for the next part, or, at the end, what came of it.
        """
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        labels, random = tensors.pop(LABELS_TENSOR, None), tensors.pop(RNG_STATE_TENSOR, None)
        training = micro.mode == "train"
        part = self._part if training or self._evaluation is None else self._evaluation
        part.train(training)
        if training and self._buffers is None:
            self._buffers = {name: buffer.clone() for name, buffer in part.named_buffers()}
        inputs = self._inputs(tensors, training)
        drawing = _RandomState(self._device, micro.seed, random)
        with torch.set_grad_enabled(training):
            outputs = part(inputs)
            if self._is_last:
                return self._judge(micro, request, inputs, outputs, labels)
        if training:
            self._keep(request, inputs, outputs)
        given = {name: output.detach() for name, output in outputs.items()}
        if labels is not None:
            given[LABELS_TENSOR] = labels
        if (state := drawing.state()) is not None:
            given[RNG_STATE_TENSOR] = state
        return given

    def _inputs(self, tensors: Mapping[str, Tensor], training: bool) -> dict[str, Tensor]:
        found = {name: tensor.to(self._device) for name, tensor in tensors.items()}
        if self._index == 0:
            takes = self._part.input_names
            if len(takes) == len(found) == 1:  # the only tensor needs no name
                found = {takes[0]: next(iter(found.values()))}
            normalise = self._spec.normalise
            bytes_of_pictures = normalise is not None and {tensor.dtype for tensor in found.values()} == {torch.uint8}
            return {name: normalise(tensor) for name, tensor in found.items()} if bytes_of_pictures else found  # type: ignore[misc]
        if training:
            for tensor in found.values():
                if tensor.is_floating_point():
                    tensor.requires_grad_(True)
        return found

    def _judge(
        self,
        micro: MicroBatch,
        request: bytes,
        inputs: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
        labels: Tensor | None,
    ) -> MicroBatchMetrics:
        if labels is None:
            raise BadLabels("the micro-batch has no labels: the last stage needs them for the loss")
        labels = labels.to(self._device)
        output: object = outputs["output"] if set(outputs) == {"output"} else outputs
        correct = _correct(output, labels)
        loss = self._loss(output, labels)
        value = float(loss.detach())
        if value != value or value in (float("inf"), float("-inf")):
            raise NotFinite(f"the loss is {value}", micro.number)
        if micro.mode == "train":
            # The mean over the step's rows, whatever the sizes of its micro-batches.
            self._keep(request, inputs, {"loss": loss * (len(labels) / micro.rows)})
        return MicroBatchMetrics(value, correct, len(labels))

    def _keep(self, request: bytes, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        wanting = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}
        self.activations.put(
            request, _SavedForward(wanting, {name: tensor for name, tensor in outputs.items() if tensor.requires_grad})
        )

    def backward(self, request: bytes, gradients: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """The backward of a forward that is kept: from the gradients of what it gave, None at the last stage.

        Gives the gradients of what it took. Raises `UnknownForward` or `BadGradient`.
        """
        kept = self.activations.pop(request)
        if gradients is None:
            begin, grads = list(kept.outputs.values()), [None] * len(kept.outputs)
        else:
            names = [name for name in kept.outputs if name in gradients]
            for name in names:
                expected, actual = tuple(kept.outputs[name].shape), tuple(gradients[name].shape)
                if expected != actual:
                    raise BadGradient(name, expected, actual)
            begin = [kept.outputs[name] for name in names]
            grads = [gradients[name].clone().to(self._device) for name in names]  # type: ignore[misc]
        if begin:
            torch.autograd.backward(begin, grads)
        return {name: tensor.grad for name, tensor in kept.inputs.items() if tensor.grad is not None}

    def commit(self, lr: float) -> int:
        """Make the gradients that have added up a step of the optimizer: the next version; its number."""
        version, self.version = self.version, None  # until it is done, memory holds no version
        assert version is not None
        assert not len(self.activations)
        if self._optimizer is not None:
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
        self._buffers = None
        self.version = version + 1
        return self.version

    def abort(self) -> None:
        """Let go of the step in hand: everything is as the last version left it."""
        self.activations.clear()
        if self._optimizer is not None:
            self._optimizer.zero_grad(set_to_none=True)
        if self._buffers is not None:
            with torch.no_grad():
                for name, buffer in self._part.named_buffers():
                    buffer.copy_(self._buffers[name])
            self._buffers = None

    # Versions ------------------------------------------------------------------------------------------------------

    def weights(self) -> dict[str, Tensor]:
        """The part's state as of its version, with the names of the uncut network."""
        begun = self._buffers or {}  # a step in hand moves statistics
        state = self._part.state_dict()
        return {name: begun.get(name, tensor).detach().cpu().clone() for name, tensor in state.items()}

    def checkpoint_tensors(self, number: int) -> dict[str, Tensor]:
        """All that makes a version, for a checkpoint. Raises `NotFinite` rather than give what nobody can use."""
        found = {f"{_MODEL}{name}": tensor for name, tensor in self.weights().items()}
        for name, tensor in found.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise NotFinite(f"parameter {name.removeprefix(_MODEL)!r} is not finite", number)
        if self._optimizer is not None:
            for name, parameter in self._trained():
                for key, value in self._optimizer.state[parameter].items():
                    if value is not None:
                        found[f"{_OPTIMIZER}{name}/{key}"] = torch.as_tensor(value).detach().cpu().clone()
        return found

    def restore(self, number: int, tensors: Mapping[str, Tensor] | None) -> None:
        """Be at this version: by what a checkpoint holds, or, for version 0, from the beginning."""
        self.activations.clear()
        self._buffers = None
        self._build()
        self.version = None  # until it is done, memory holds no version
        if tensors is not None:
            self._part.load_state_dict(model_state_dict(tensors))
            self._restore_optimizer(tensors)
        self.version = number

    def _restore_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        if self._optimizer is None:
            return
        for name, parameter in self._trained():
            prefix = f"{_OPTIMIZER}{name}/"
            found = {key.removeprefix(prefix): item for key, item in tensors.items() if key.startswith(prefix)}
            if found:
                self._optimizer.state[parameter] = {
                    key: item if key == "step" else item.to(parameter.device) for key, item in found.items()
                }

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, parameter) for name, parameter in self._part.named_parameters() if parameter.requires_grad]


def model_state_dict(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a checkpoint holds of the network itself."""
    return {name.removeprefix(_MODEL): item for name, item in tensors.items() if name.startswith(_MODEL)}


class _RandomState:
    """The random state during one forward: begun from the seed, or where the stage before ended."""

    def __init__(self, device: torch.device, seed: int, state: Tensor | None) -> None:
        is_cuda = device.type == "cuda"
        index = torch.cuda.current_device() if is_cuda and device.index is None else device.index
        self._generator = torch.cuda.default_generators[index] if is_cuda else torch.default_generator
        self._generator.manual_seed(seed)
        self._continues = state is not None and state.numel() == self._generator.get_state().numel()
        if state is not None and self._continues:
            self._generator.set_state(state)
        self._begin = self._generator.get_state()

    def state(self) -> Tensor | None:
        """What the next stage goes on from; None where it is what the seed gives."""
        state = self._generator.get_state()
        return state if self._continues or not torch.equal(state, self._begin) else None


def _correct(output: object, labels: Tensor) -> int | None:
    """How many rows have their label as the largest output; None where labels are not classes. Raises `BadLabels`."""
    if not isinstance(output, Tensor) or output.dim() != 2 or labels.is_floating_point() or labels.dim() != 1:
        return None
    classes = output.shape[1]
    if len(labels) != len(output):
        raise BadLabels(f"{len(labels)} labels came for {len(output)} rows")
    wrong = (labels < 0) | (labels >= classes)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise BadLabels(f"label {int(labels[row])} of row {row} is out of range: the network has {classes} classes")
    return int((output.argmax(1) == labels).sum())
