"""Batch analysis: find the values of a network whose first dimension is the batch, so that requests can be batched."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from stages.partition.fx_graph import TracedModel


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
