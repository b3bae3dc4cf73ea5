"""A part of a cut network as a `TaskExecutor`: pictures or tensors in, activations or findings out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from brokers.config.pipeline_file import Pipeline
from brokers.config.schema import StageTable
from brokers.errors import BadPayload
from brokers.process.image_decode import RgbImage, decode_picture
from brokers.protocol.messages import JPEG, JSON, PNG, SAFETENSORS, BinaryContent, Content
from brokers.protocol.safetensors_codec import to_numpy, to_torch
from stages.errors import BadDevice
from stages.executor import Node, TaskContext, TaskExecutor, Tensors
from stages.models.registry import get_model_spec
from stages.partition.boundary import value_name
from stages.partition.part_loader import load_part
from stages.partition.partition import Part, fingerprint
from stages.partition.weight_files import find_weights

# The one tensor that is a decoded picture, uint8 (H, W, 3), red green blue; everything else is the network's own.
PICTURE = "picture"


def resolve_device(device: str) -> str:
    """`auto` is the first GPU, or the CPU where there is none; a GPU that is asked for and missing is a `BadDevice`."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda"):
        index = int(device.partition(":")[2] or 0)
        if index >= torch.cuda.device_count():
            raise BadDevice(device, torch.cuda.device_count())
    return device


class ModelExecutor(TaskExecutor):
    """Serves one part of the pipeline's model."""

    framework = "torch"

    def __init__(self, pipeline: Pipeline, stage: StageTable, *, device: str, threads: int) -> None:
        self._pipeline, self._stage = pipeline, stage
        self._device = torch.device(device)
        self._threads = threads
        table = pipeline.pipeline
        self._spec = get_model_spec(
            table.model or "",
            settings=table.model_settings,
            labels=table.labels,
            threshold=table.threshold,
            nms=table.nms,
            folder=str(pipeline.folder),
        )
        self._is_first = pipeline.stage[0] is stage
        self._is_last = pipeline.part_index(stage) == len(pipeline.pipeline.cuts)
        self._wire_dtype: torch.dtype = getattr(torch, stage.wire)
        self._part: Part

    def start(self, node: Node) -> None:
        torch.set_num_threads(self._threads)
        table = self._pipeline.pipeline
        weights = find_pipeline_weights(table.weights, self._pipeline.folder)
        # Whether rows may be batched is found by a run on meta tensors, which imports a second's worth of torch: only
        # where the answer matters.
        spec = self._spec if self._stage.max_batch > 1 else replace(self._spec, input_shape=None)
        self._part = load_part(
            spec, table.cuts, self._pipeline.part_index(self._stage), weights, table.seed, self._device
        )
        self.batchable = self._part.batchable
        self.fingerprint = fingerprint(self._part)
        sees = self._spec.preprocess is not None and len(self._part.input_names) == 1
        self.formats = (SAFETENSORS, JPEG, PNG) if sees and self._is_first else (SAFETENSORS,)
        if self._device.type == "cpu":
            # oneDNN's convolutions are 1.1 to 1.7 times faster with channels innermost (tests/bench/layout.py).
            self._part.to(memory_format=torch.channels_last)

    def prepare(self, content: Content, task: TaskContext) -> Tensors:
        """The part's inputs: a picture is decoded and fitted, an activation is widened to float32 again."""
        if isinstance(content, BinaryContent):
            return self._fit(self._decode(content), task)
        task.metadata.update(content.metadata)
        takes = self._part.input_names
        if set(content.tensors) == {PICTURE} and PICTURE not in takes:
            return self._fit(to_numpy(content.tensors[PICTURE], name=PICTURE), task)
        tensors = {name: to_torch(tensor) for name, tensor in content.tensors.items()}
        if {value_name(name) for name in tensors} != set(takes):
            if not len(takes) == len(tensors) == 1:
                raise BadPayload("tensors", f"stage {self._stage.name!r} takes {sorted(takes)}, got {sorted(tensors)}")
            tensors = {takes[0]: next(iter(tensors.values()))}  # the only tensor needs no name
        return {name: _widened(tensor) for name, tensor in tensors.items()}

    @torch.inference_mode()
    def execute(self, tensors: Tensors, task: TaskContext) -> Tensors:
        """The forward of this part; on a GPU with pinned copies both ways and one wait, at the end."""
        if self._device.type == "cpu":
            return self._part(tensors)  # type: ignore[no-any-return]
        moved = {name: tensor.pin_memory().to(self._device, non_blocking=True) for name, tensor in tensors.items()}
        given = {name: self._to_host(tensor) for name, tensor in self._part(moved).items()}
        torch.cuda.current_stream(self._device).synchronize()
        return given

    @torch.inference_mode()
    def finish(self, tensors: Tensors, task: TaskContext) -> Tensors:
        """Findings in pixels of the picture, if one came in; else the outputs as they are, in the wire's dtype."""
        if self._is_last and PICTURE in task.metadata and self._spec.postprocess is not None:
            width, _, height = task.metadata[PICTURE].partition("x")
            found = self._spec.postprocess(tensors, (int(width), int(height)))
            task.metadata.update(found.metadata)
            return found.tensors
        if self._is_last or self._wire_dtype is torch.float32:
            return tensors
        return {name: self._narrowed(tensor) for name, tensor in tensors.items()}

    def _decode(self, blob: BinaryContent) -> RgbImage:
        if blob.content_type == JSON:
            raise BadPayload(JSON, f"stage {self._stage.name!r} takes pictures (JPEG, PNG) or tensors, no readings")
        return decode_picture(blob.data, blob.content_type)

    def _fit(self, picture: RgbImage, task: TaskContext) -> Tensors:
        """The network's input for a picture, uint8 (H, W, 3); its size goes along, to speak of its pixels later."""
        if picture.dtype != "uint8" or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
            kind = f"{picture.dtype} {list(picture.shape)}"
            raise BadPayload("tensors", f"a picture must be uint8 (height, width, 3), got {kind}")
        if self._spec.preprocess is None or len(self._part.input_names) != 1:
            raise BadPayload("picture", f"stage {self._stage.name!r} of {self._spec.name} does not take pictures")
        height, width, _ = picture.shape
        task.metadata[PICTURE] = f"{width}x{height}"
        return {self._part.input_names[0]: self._spec.preprocess(picture)}

    def _narrowed(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._wire_dtype) if tensor.dtype is torch.float32 else tensor

    def _to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return pinned.copy_(tensor, non_blocking=True)


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def find_pipeline_weights(name: str | None, folder: Path) -> Path | None:
    """The weights file: a path beside the pipeline file, else a registered name."""
    if name is None:
        return None
    beside = folder / name
    return beside if beside.is_file() else find_weights(name)
