"""A part of a model as a `TaskExecutor`: pictures or tensors in, activations or detections out."""

import torch

from brokers.errors import BadPayload, UsageError
from brokers.process.image_decode import RgbImage, decode_picture
from brokers.protocol.messages import JPEG, JSON, PNG, SAFETENSORS, BinaryContent, Content
from brokers.protocol.safetensors_codec import to_numpy, to_torch
from stages.executor import Node, TaskContext, TaskExecutor, Tensors
from stages.loading.network_digest import NETWORK_KEY, check_network
from stages.loading.part_loader import load_part
from stages.loading.weights_file import find_weights
from stages.models.registry import pipeline_model_spec
from stages.partition.named_values import value_name
from stages.partition.partition import Part, fingerprint
from stages.worker.worker_context import WorkerContext

# Name of the tensor that is a decoded picture, uint8 (H, W, 3), RGB; all other names are those of the network.
PICTURE = "picture"
_FLOAT_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32})


def resolve_device(device: str) -> str:
    """Return the torch device of a pipeline file; "auto" is the first GPU, or the CPU without one.

    Raises `UsageError` "BadDevice" for a GPU that this machine does not have.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda"):
        available = torch.cuda.device_count()
        if int(device.partition(":")[2] or 0) >= available:
            message = f"device {device!r}: this machine has {available} CUDA devices; use 'auto' or 'cpu'"
            raise UsageError("BadDevice", message, key="stage.device", device=device, available=available)
    return device


class ModelExecutor(TaskExecutor):
    """Runs the part of the pipeline's model that belongs to the worker's stage."""

    framework = "torch"

    def __init__(self, context: WorkerContext) -> None:
        self._pipeline = context.pipeline
        self._stage = context.stage
        self._device = torch.device(context.device)
        self._threads = context.threads
        self._spec = pipeline_model_spec(context.pipeline)
        self._index = self._pipeline.part_index(self._stage)
        self._is_first = self._pipeline.stage[0] is self._stage
        self._is_last = self._index == len(self._pipeline.pipeline.cuts)
        self._wire_dtype: torch.dtype = getattr(torch, self._stage.wire)
        self._part: Part

    def start(self, node: Node) -> None:
        torch.set_num_threads(self._threads)
        table = self._pipeline.pipeline
        weights = find_weights(table.weights, self._pipeline.folder) if table.weights else None
        max_batch = max(stage.max_batch for stage in self._pipeline.stage if stage.executor is None)
        self._part = load_part(
            self._spec, table.cuts, self._index, weights, table.seed, self._device, max_batch=max_batch
        )
        self.batchable = self._part.batchable
        self.fingerprint = fingerprint(self._part)
        accepts_pictures = self._is_first and self._spec.preprocess is not None and len(self._part.input_names) == 1
        self.formats = (SAFETENSORS, JPEG, PNG) if accepts_pictures else (SAFETENSORS,)

    def prepare(self, content: Content, task: TaskContext) -> Tensors:
        """Return the part's inputs: a picture is decoded and preprocessed, a half-precision activation widened."""
        if isinstance(content, BinaryContent):
            if content.content_type == JSON:
                problem = f"stage {self._stage.name!r} accepts pictures (JPEG, PNG) or tensors, not JSON"
                raise BadPayload(JSON, problem)
            return self._preprocess(decode_picture(content.data, content.content_type), task)
        check_network(content.metadata, self._part.network, self._stage.name)
        task.metadata.update(content.metadata)
        names = self._part.input_names
        if set(content.tensors) == {PICTURE} and PICTURE not in names:
            return self._preprocess(to_numpy(content.tensors[PICTURE], name=PICTURE), task)
        tensors = {name: to_torch(tensor) for name, tensor in content.tensors.items()}
        if {value_name(name) for name in tensors} != set(names):
            if not len(names) == len(tensors) == 1:
                problem = f"stage {self._stage.name!r} expects {sorted(names)}, got {sorted(tensors)}"
                raise BadPayload("tensors", problem)
            tensors = {names[0]: next(iter(tensors.values()))}  # a single tensor needs no name
        return {name: self._widen(name, tensor) for name, tensor in tensors.items()}

    @torch.inference_mode()
    def execute(self, tensors: Tensors, task: TaskContext) -> Tensors:
        """Run the forward of the part; on a GPU with pinned copies both ways, and one synchronisation at the end."""
        if self._device.type == "cpu":
            return self._part(tensors)
        inputs = {name: tensor.pin_memory().to(self._device, non_blocking=True) for name, tensor in tensors.items()}
        outputs = {name: _copy_to_host(tensor) for name, tensor in self._part(inputs).items()}
        torch.cuda.current_stream(self._device).synchronize()
        return outputs

    @torch.inference_mode()
    def finish(self, tensors: Tensors, task: TaskContext) -> Tensors:
        """Postprocess the last part's outputs, in pixels of the picture if there was one; narrow other outputs."""
        if self._is_last:
            task.metadata.pop(NETWORK_KEY, None)
        else:
            task.metadata[NETWORK_KEY] = self._part.network
        if self._is_last and PICTURE in task.metadata and self._spec.postprocess is not None:
            width, _, height = task.metadata[PICTURE].partition("x")
            content = self._spec.postprocess(tensors, (int(width), int(height)))
            task.metadata.update(content.metadata)
            return content.tensors
        if self._is_last:
            return tensors
        return {
            name: tensor.to(self._wire_dtype) if tensor.dtype is torch.float32 else tensor
            for name, tensor in tensors.items()
        }

    def _widen(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Convert a tensor to the float dtype that the part expects: on the wire it may have half the precision."""
        layout = self._part.layouts.get(name)
        expected: torch.dtype = getattr(torch, layout.dtype) if layout else torch.float32
        is_convertible = tensor.dtype in _FLOAT_DTYPES and expected in _FLOAT_DTYPES
        return tensor.to(expected) if is_convertible else tensor

    def _preprocess(self, picture: RgbImage, task: TaskContext) -> Tensors:
        """Convert a picture, uint8 (H, W, 3), to the network's input; its size travels on with the request."""
        if picture.dtype != "uint8" or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
            actual = f"{picture.dtype} {list(picture.shape)}"
            raise BadPayload("tensors", f"a picture must be uint8 (height, width, 3), got {actual}")
        if self._spec.preprocess is None or len(self._part.input_names) != 1:
            raise BadPayload("picture", f"stage {self._stage.name!r} of {self._spec.name} does not accept pictures")
        height, width, _ = picture.shape
        task.metadata[PICTURE] = f"{width}x{height}"
        return {name: self._widen(name, self._spec.preprocess(picture)) for name in self._part.input_names}


def _copy_to_host(tensor: torch.Tensor) -> torch.Tensor:
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)
