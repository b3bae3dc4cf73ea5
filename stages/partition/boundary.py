"""Values at the boundaries of parts: flattened into named tensors where they leave, rebuilt where they arrive.

A cut turns a value that the network overwrites (`ReLU(inplace=True)`, `x += y`) into an input, which belongs to the
caller, so it is copied when it arrives; so is a value that may share memory with a modified one. Requests can be
batched where all values at the boundary of a part have the batch as their first dimension.
"""

import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from brokers.errors import UsageError, WireError
from stages.partition.fx_graph import LAYER_OPS, TracedModel, is_leaf

IN_PLACE_OPERATORS = frozenset(
    getattr(operator, name)
    for name in ("iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor")
) | {operator.setitem}


def unpack_value(tensors: Mapping[str, Tensor], name: str, copy: bool) -> Any:
    """Return the value `name`: one tensor, or a tuple rebuilt from `name[0]`, `name[1]`, ...

    Raises `WireError` "TensorMissing".
    """
    if name in tensors:
        return tensors[name].clone() if copy else tensors[name]
    items: list[Any] = []
    while any(key == (item := f"{name}[{len(items)}]") or key.startswith(f"{item}[") for key in tensors):
        items.append(unpack_value(tensors, item, copy))
    if not items:
        actual = ", ".join(map(repr, tensors)) or "none"
        message = f"missing tensor {name!r}: the message has {actual}"
        raise WireError("TensorMissing", message, name=name, actual=tuple(tensors))
    return tuple(items)


def value_name(tensor_name: str) -> str:
    """Return the name of the value that a tensor belongs to: "chunk" for "chunk[0]"."""
    return tensor_name.partition("[")[0]


def pack_values(names: tuple[str, ...], *values: Any) -> dict[str, Tensor]:
    """Flatten the outputs of a part to named tensors. Raises `UsageError` "NonTensorValue"."""
    return {key: tensor for name, value in zip(names, values, strict=True) for key, tensor in _flatten(name, value)}


def name_results(result: Any) -> dict[str, Any]:
    """Name the results of a network: `output` for one, `0`, `1`, ... for a tuple, the keys of a dict; omit None."""
    if isinstance(result, tuple | list):
        result = dict(enumerate(result))
    if not isinstance(result, Mapping):
        result = {"output": result}
    return {str(key): value for key, value in result.items() if value is not None}


def pack_result(result: Any) -> dict[str, Tensor]:
    """Flatten the result of a network to named tensors, as `name_results` names them."""
    values = name_results(result)
    return pack_values(tuple(values), *values.values())


def make_shape_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor without data that has the shape and dtype of another, with a last dimension of 0 added."""
    return tensor.new_empty((*tensor.shape, 0))


def expand_shape_tensor(shape_tensor: Tensor) -> Tensor:
    """Return a tensor of the shape, dtype and device that `make_shape_tensor` encoded; it stores one element."""
    return shape_tensor.new_zeros(()).expand(shape_tensor.shape[:-1])


def _flatten(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, tuple | list) and not isinstance(value, torch.Size):
        items = list(value)
        while items and items[-1] is None:  # attention without weights returns (output, None)
            items.pop()
        for index, item in enumerate(items):
            yield from _flatten(f"{name}[{index}]", item)
    else:
        kind = type(value).__name__
        message = f"{name!r} is of type {kind}, only tensors and tuples of tensors can cross a cut: cut elsewhere"
        raise UsageError("NonTensorValue", message, key="pipeline.cuts", name=name, kind=kind)


def copy_mutated_inputs(graph: fx.Graph, model: nn.Module) -> None:
    """Make `unpack_value` copy each input of a part's graph that an in-place operation may modify."""
    pending: list[fx.Node] = []
    for node in graph.nodes:
        if _mutates_input(node, model):
            pending += node.all_input_nodes if node.op == "call_module" else node.all_input_nodes[:1]
    visited: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if node in visited:
            continue
        visited.add(node)
        if node.target is unpack_value:
            node.update_arg(2, True)
        elif not _allocates_result(node, model):
            pending.extend(node.all_input_nodes)


def _mutates_input(node: fx.Node, model: nn.Module) -> bool:
    """Return whether a layer modifies, or may modify, its first argument (a module: any argument)."""
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        return not is_leaf(module) or bool(getattr(module, "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    by_name = node.op in LAYER_OPS and name.endswith("_") and not name.endswith("__")
    return by_name or node.target in IN_PLACE_OPERATORS or bool(node.kwargs.get("inplace"))


def _allocates_result(node: fx.Node, model: nn.Module) -> bool:
    """Return whether a layer's result certainly shares no memory with its inputs: convolutions, products, norms."""
    if node.op != "call_module":
        return False
    module = model.get_submodule(str(node.target))
    return is_leaf(module) and not _mutates_input(node, model) and any(True for _ in module.parameters())


def find_batched_values(traced: TracedModel, nodes: set[fx.Node], example: Mapping[str, Tensor]) -> set[fx.Node]:
    """Return those of `nodes` whose first dimension follows the batch size, found by two runs on meta tensors.

    `example` is one request. The result is empty for a network that cannot run on meta tensors, because it reads
    values, or not on this example.
    """
    if any(traced.wire_names[node] not in example for node in traced.input_nodes):
        return set()
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in traced.graph.nodes:
        if node.op != "output":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    ordered = list(nodes)
    graph.output(tuple(copies[node] for node in ordered))
    network = fx.GraphModule(traced.model, graph)
    state = {name: tensor.to("meta") for name, tensor in (*network.named_parameters(), *network.named_buffers())}
    batched = set(nodes)
    for batch_size in (2, 3):
        shapes = (example[traced.wire_names[node]] for node in traced.input_nodes)
        inputs = tuple(tensor.new_empty((batch_size, *tensor.shape[1:]), device="meta") for tensor in shapes)
        try:
            values = torch.func.functional_call(network, state, inputs)
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):
            return set()
        batched -= {node for node, value in zip(ordered, values, strict=True) if not _has_rows(value, batch_size)}
    return batched


def _has_rows(value: Any, count: int) -> bool:
    if isinstance(value, tuple | list):
        return all(_has_rows(item, count) for item in value if item is not None)
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == count
