"""Values at the boundaries of parts: shapes that cross without data, memory layouts, copies of overwritten inputs.

A cut turns a value that the network overwrites (`ReLU(inplace=True)`, `x += y`) into an input, which belongs to the
caller, so it is copied when it arrives; so is a value that may share memory with a modified one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from stages.partition.in_place import allocates_result, mutated_inputs
from stages.partition.named_values import unpack_value


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """The dtype and the strides of a tensor at a boundary.

    `order`: its dimensions by stride, the largest first; None if it is that of a contiguous tensor. `expanded`: the
    dimensions with stride 0, along which all elements are one.
    """

    dtype: str
    order: tuple[int, ...] | None = None
    expanded: tuple[int, ...] = ()


def find_layout(tensor: Tensor) -> TensorLayout:
    """Return the layout of a tensor; gaps between its elements are not kept."""
    strides = tensor.stride()
    dimensions = range(tensor.dim())
    order = tuple(sorted(dimensions, key=lambda dimension: (-strides[dimension], dimension)))
    return TensorLayout(
        dtype=str(tensor.dtype).removeprefix("torch."),
        order=None if tensor.is_contiguous() or order == tuple(dimensions) else order,
        expanded=tuple(each for each in dimensions if not strides[each] and tensor.shape[each] > 1),
    )


def restore_layout(tensor: Tensor, layout: TensorLayout | None) -> Tensor:
    """Return a tensor with the strides of a layout, and the same values; as it is, if it has fewer dimensions."""
    if layout is None or any(dimension >= tensor.dim() for dimension in (*(layout.order or ()), *layout.expanded)):
        return tensor
    original = tensor
    for dimension in layout.expanded:
        tensor = tensor.narrow(dimension, 0, min(1, tensor.shape[dimension]))
    if layout.expanded and not torch.equal(tensor.expand_as(original), original):
        tensor = original  # the values of this request are not repeated: another branch has computed them
    order = layout.order or tuple(range(tensor.dim()))
    inverse = [order.index(dimension) for dimension in range(tensor.dim())]
    return tensor.permute(order).contiguous().permute(inverse).expand_as(original)


def convert_float(tensor: Tensor, layout: TensorLayout | None) -> Tensor:
    """Return a tensor of floats with the dtype of a layout: a data set has others than the network."""
    if layout is None:
        return tensor
    expected: torch.dtype = getattr(torch, layout.dtype)
    return tensor.to(expected) if tensor.is_floating_point() and expected.is_floating_point else tensor


def is_differentiable(tensor: Tensor) -> bool:
    """Return whether gradients of a tensor of this dtype exist."""
    return tensor.is_floating_point() or tensor.is_complex()


def make_shape_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor without data that has the shape and dtype of another, with a last dimension of 0 added."""
    return tensor.new_empty((*tensor.shape, 0))


def expand_shape_tensor(shape_tensor: Tensor) -> Tensor:
    """Return a tensor of the shape, dtype and device that `make_shape_tensor` encoded; it stores one element."""
    return shape_tensor.new_zeros(()).expand(shape_tensor.shape[:-1])


def copy_mutated_inputs(graph: fx.Graph, model: nn.Module) -> None:
    """Make `unpack_value` copy each input of a part's graph that an in-place operation may modify."""
    pending: list[fx.Node] = []
    for node in graph.nodes:
        pending += mutated_inputs(node, model)
    visited: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if node in visited:
            continue
        visited.add(node)
        if node.target is unpack_value:
            node.update_arg(2, True)
        elif not allocates_result(node, model):
            pending.extend(node.all_input_nodes)
