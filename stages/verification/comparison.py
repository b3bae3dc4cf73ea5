"""The comparison of results, and the layer after which two runs of a network differ."""

import math
from collections.abc import Callable, Mapping
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from stages.partition.boundary import is_differentiable
from stages.partition.tracing import TracedModel
from stages.verification.model_state import is_same_tensor


def describe_difference(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, allow_rounding: bool = False
) -> str:
    """Return how two sets of named tensors differ, in words; empty if they are the same, bit for bit.

    `allow_rounding`: numbers may differ by the square root of their dtype's epsilon, relative to the largest one: 3e-4
    in float32. That is what other kernels for the same operation may differ by, in a deep network.
    """
    if actual.keys() != expected.keys():
        return f"they return {', '.join(actual) or 'nothing'} instead of {', '.join(expected) or 'nothing'}"
    for name, tensor in expected.items():
        other = actual[name]
        if (tensor.dtype, tensor.shape) != (other.dtype, other.shape):
            return f"{name!r} is {_describe(other)} instead of {_describe(tensor)}"
        if not is_same_tensor(other, tensor) and not (allow_rounding and _is_close(other, tensor)):
            return f"{name!r} has other values"
    return ""


def find_last_equal_layer(traced: TracedModel, run_network: Callable[[], Any], run_parts: Callable[[], Any]) -> str:
    """Return the name of the last module layer up to which two runs compute the same; empty if the first differs."""
    expected = _record_layers(traced, run_network)
    actual = _record_layers(traced, run_parts)
    last = ""
    for left, right in zip_longest(expected, actual):
        if left is None or right is None or left[0] != right[0]:
            break
        if len(left[1]) != len(right[1]) or not all(map(is_same_tensor, left[1], right[1])):
            break
        last = left[0]
    return last


def difference_problem(difference: str, layer: str) -> str:
    """Return why parts that differ from their network must not be used; `layer`: the last equal one, may be empty."""
    place = f", after layer {layer!r}" if layer else ""
    return (
        f"its parts, chained, do not compute what it computes: {difference}{place}. Move the code after that layer "
        "into a separate child module, which is then one layer, or cut elsewhere"
    )


def _record_layers(traced: TracedModel, run: Callable[[], Any]) -> list[tuple[str, list[Tensor]]]:
    """Return the module layers in the order of their calls, with copies of their results."""
    calls: list[tuple[str, list[Tensor]]] = []

    def record(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, arguments: Any, result: Any) -> None:
            calls.append((name, [leaf.detach().clone() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]))

        return hook

    nodes: dict[str, fx.Node] = {str(node.target): node for node in traced.layer_nodes if node.op == "call_module"}
    handles = [traced.model.get_submodule(name).register_forward_hook(record(name)) for name in nodes]
    try:
        run()
    except Exception:  # noqa: BLE001 - the layers before the failing one are recorded
        pass
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _is_close(actual: Tensor, expected: Tensor) -> bool:
    if not is_differentiable(expected):
        return False
    largest = expected.abs().nan_to_num(0.0, 0.0, 0.0).max()
    is_near = (actual - expected).abs() <= math.sqrt(torch.finfo(expected.dtype).eps) * largest
    return bool((is_near | (actual == expected) | (actual.isnan() & expected.isnan())).all())


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
