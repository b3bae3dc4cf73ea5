"""The parts of a network run one after the other, as stages would run them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.partition.boundary import find_layout, is_differentiable
from stages.partition.partition import Part
from stages.verification.model_state import is_same_tensor
from stages.verification.network_run import CheckFailed
from stages.verification.verdict import Layouts

Tensors = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class PartRun:
    """The tensors that a part received and returned."""

    inputs: Tensors
    outputs: Tensors


class PartChain:
    """Parts in order. Between them tensors are copied to contiguous memory, as they are on the wire.

    `layouts`, by part: those of its inputs in the last run, before they were copied; the part restores them.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts
        self.layouts: list[Layouts] = []
        self._shared_buffers = _shared_buffers(parts)

    def run(self, inputs: Mapping[str, Tensor]) -> list[PartRun]:
        """Run all parts. Where gradients are recorded, the inputs of each part but the first require them.

        Raises `CheckFailed` if a part modifies a buffer that another one uses: each stage has its own copy.
        """
        self.layouts = []
        contents = {name: buffer.clone() for name, buffer in self._shared_buffers.items()}
        runs: list[PartRun] = []
        tensors = dict(inputs)
        names = self.parts[0].input_names
        if len(names) == len(tensors) == 1:  # on the wire a single input has one name for all networks
            tensors = dict(zip(names, tensors.values(), strict=True))
        for part in self.parts:
            part.layouts = {name: find_layout(tensor) for name, tensor in tensors.items()}
            self.layouts.append(part.layouts)
            received = {name: receive(tensor) for name, tensor in tensors.items()}
            if runs and torch.is_grad_enabled():
                for tensor in received.values():
                    tensor.requires_grad_(is_differentiable(tensor))
            tensors = part(received)
            runs.append(PartRun(received, tensors))
        for name, buffer in self._shared_buffers.items():
            if not is_same_tensor(buffer, contents[name]):
                raise CheckFailed(f"the forward modifies buffer {name!r}, which several parts use: cut elsewhere")
        return runs


def _shared_buffers(parts: Sequence[Part]) -> dict[str, Tensor]:
    """Return the buffers whose memory several parts use, by their names."""
    buffers = [{name: each for name, each in part.module.named_buffers() if isinstance(each, Tensor)} for part in parts]
    counts = Counter(memory for named in buffers for memory in set(map(_memory, named.values())))
    return {name: buffer for named in buffers for name, buffer in named.items() if counts[_memory(buffer)] > 1}


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided and tensor.numel() else id(tensor)


def receive(tensor: Tensor) -> Tensor:
    """Return a tensor as the next stage receives it: a contiguous copy."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)
