"""Checks that a partitioned network computes what the whole network computes, and small networks to check."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from stages.partition.boundary import find_layout
from stages.partition.partition import Part, partition
from stages.partition.tracing import TracedModel, trace

Function = Callable[["FunctionNetwork", Tensor], Any]


class FunctionNetwork(nn.Module):
    """A network whose forward is a function of itself and its input, with `modules` as attributes."""

    a: nn.Module
    attention: nn.Module
    b: nn.Module
    conv: nn.Module
    dropout: nn.Module
    lstm: nn.Module
    opaque: nn.Module
    relu: nn.Module

    def __init__(self, function: Function, **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> object:
        return self.function(self, x)


def run_parts(parts: Sequence[Part], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run the parts in order, with safetensors between them, and check that none modifies its inputs.

    A part restores the memory layouts that its inputs have where they are computed, as after a check.
    """
    tensors = dict(inputs)
    for part in parts:
        part.layouts = {name: find_layout(tensor) for name, tensor in tensors.items()}
        tensors = {name: load(save({name: tensor.contiguous()}))[name] for name, tensor in tensors.items()}
        before = {name: tensor.clone() for name, tensor in tensors.items()}
        outputs = part(tensors)
        assert list(tensors) == list(before)
        assert all(torch.equal(tensors[name], before[name]) for name in before)
        tensors = outputs
    return tensors


def is_same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 0.0) -> bool:
    """Compare names and values; `tolerance` is relative to the largest value."""
    return list(actual) == list(expected) and all(
        actual[name].shape == tensor.shape and (actual[name] - tensor).abs().max() <= tolerance * tensor.abs().max()
        for name, tensor in expected.items()
    )


def name_outputs(result: Tensor | Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the result of a whole network with the names that its last part gives it."""
    return {"output": result} if isinstance(result, Tensor) else {str(i): item for i, item in enumerate(result)}


def check_all_cuts(model: nn.Module | list[nn.Module], x: Tensor) -> None:
    """Check every single cut, and all cuts at once, against the whole network."""
    traced = trace(model, {"input": x})
    with torch.no_grad():
        expected = name_outputs(traced.model(x.clone()))
        count = len(traced.layer_names)
        for cuts in [*([cut] for cut in range(1, count)), list(range(1, count))]:
            parts = partition(traced, cuts)
            assert is_same(run_parts(parts, {"input": x}), expected), f"cuts {cuts} of {traced.layer_names}"


def spread_cuts(traced: TracedModel, count: int) -> list[int]:
    """Return about `count` cuts at equal distances."""
    last = len(traced.layer_names) - 1
    return sorted({max(1, round(last * (step + 1) / (count + 1))) for step in range(count)})
