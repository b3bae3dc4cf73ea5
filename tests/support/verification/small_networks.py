"""Small networks of one function, and the check of their parts at all cuts against the network itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stages.partition.forward_arguments import name_arguments
from stages.partition.named_values import pack_result
from stages.partition.partition import partition
from stages.partition.tracing import TracedModel, trace
from stages.verification.example import call_model
from stages.verification.inference_check import check_inference
from stages.verification.model_state import is_same_tensor
from stages.verification.verdict import Verdict
from tests.support.training.partition_checks import run_parts

CPU = torch.device("cpu")
Forward = Callable[[Any, Tensor], Any]


class SmallNetwork(nn.Module):
    """A network with two linear layers `a` and `b` of 4 features and other attributes, whose forward is a function."""

    def __init__(self, function: Forward, attributes: Mapping[str, Any]) -> None:
        super().__init__()
        self.function = function
        for name, value in {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), **attributes}.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> object:
        return self.function(self, x)


@dataclass(frozen=True, slots=True)
class Case:
    """A forward, the shape of its input, and a function that makes the attributes of the network."""

    forward: Forward
    shape: tuple[int, ...] = (2, 4)
    attributes: Callable[[], Mapping[str, Any]] = field(default=dict)

    def build(self) -> SmallNetwork:
        torch.manual_seed(0)
        return SmallNetwork(self.forward, self.attributes()).eval()

    def example(self) -> dict[str, Tensor]:
        return {"x": torch.randn(self.shape, generator=torch.Generator().manual_seed(1))}


def check_at(
    model: nn.Module, example: Mapping[str, Tensor], cuts: Sequence[int] | None = None, *, max_batch: int = 1
) -> tuple[TracedModel, Sequence[int], Verdict]:
    """Trace a network and check its parts at the given cuts, by default at all."""
    traced = trace(model, example := name_arguments(model, example))
    cuts = range(1, len(traced.layer_names)) if cuts is None else cuts
    return traced, cuts, check_inference(traced, cuts, example, CPU, max_batch=max_batch)


def assert_equal_at_all_cuts(model: nn.Module, example: Mapping[str, Tensor]) -> None:
    """Assert that the check accepts all cuts, and that the parts give, bit by bit, the network's results.

    For the example and three other requests in a row, each with random numbers of the same seed.
    """
    original, example = copy.deepcopy(model), name_arguments(model, example)
    traced, cuts, verdict = check_at(model, example)
    assert verdict.problem == ""
    assert traced.layer_names
    parts = partition(traced, cuts)
    names = parts[0].input_names
    for seed in range(4):
        inputs = {name: _other_values(tensor, seed) for name, tensor in example.items()}
        named = dict(zip(names, inputs.values(), strict=True)) if len(names) == 1 else inputs
        with torch.inference_mode():
            torch.manual_seed(seed)
            expected = pack_result(call_model(original, inputs))
            torch.manual_seed(seed)
            actual = run_parts(parts, named)
        assert list(actual) == list(expected)
        for name, tensor in expected.items():
            assert is_same_tensor(actual[name], tensor), f"request {seed}, {name}"


def _other_values(tensor: Tensor, seed: int) -> Tensor:
    """Return the example itself for seed 0, and other values of its kind for other seeds."""
    if not seed:
        return tensor
    if tensor.is_floating_point():
        return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed), dtype=tensor.dtype)
    return tensor.flip(-1) if tensor.dim() else tensor
