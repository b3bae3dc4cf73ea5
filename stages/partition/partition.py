"""Cutting a network into parts that compute, one after the other, what the whole computes.

1. Cut k comes after the first k layers. A value that is made before a cut and used after it crosses it; where the
   user is further on than the next part, it passes through the parts between.
2. Only tensors cross, under the name of the layer that made them: `features.10`. A tuple (a chunk, the state of an
   LSTM) crosses item by item: `chunk[0]`, `chunk[1]`.
3. Shapes, and numbers computed from shapes, do not cross: they would be wrong as soon as a stage batches several
   requests. The receiving part computes them again, from a tensor that crosses anyway or from an empty one
   that has the same shape (`relu:shape`, no bytes).
4. A part never writes into what it is given: an input that some in-place layer might reach is copied first.
5. State keeps the names of the uncut network, and the modules themselves: nothing is copied by cutting.

One thing is lost at a cut: two crossing values that share memory arrive as two. A network that changes one of them in
place afterwards and reads it through the other must be cut elsewhere.
"""

from __future__ import annotations

import builtins
import hashlib
import math
import operator
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn

from stages.errors import CutsNotIncreasing, NoSuchCut
from stages.partition.boundary import expand_shape_tensor, make_shape_tensor, pack_result, pack_values, unpack_value
from stages.partition.fx_graph import TracedModel, trace
from stages.partition.inplace_analysis import copy_mutated_inputs

# What asks a tensor for its shape or kind only, and never for its values.
SHAPE_METHODS = frozenset({"size", "dim", "ndimension", "numel", "nelement", "is_floating_point"})
SHAPE_ATTRIBUTES = frozenset({"shape", "ndim", "dtype", "device", "is_cuda"})
ARITHMETIC_MODULES = frozenset({operator.__name__, "_operator", builtins.__name__, math.__name__})
SHAPE_SUFFIX = ":shape"
FINGERPRINT_DIGITS = 16  # 64 bits: to notice a mistake; it is no defence


class Part(nn.Module):
    """One part of a cut network: a module from named tensors to named tensors.

    `takes` and `gives` are the names of the values that come in and go out. `batchable` says that the first dimension
    of all of them is known to be the batch, so that requests may be put together there and results split again.
    """

    def __init__(
        self, root: nn.Module, graph: fx.Graph, takes: tuple[str, ...], gives: tuple[str, ...], batchable: bool
    ) -> None:
        super().__init__()
        self.graph, self.input_names, self.output_names, self.batchable = graph, takes, gives, batchable
        self.training = root.training
        compiled = fx.GraphModule(root, graph)  # holds of root only what the graph uses
        self._compute = type(compiled).forward
        for name, child in compiled.named_children():
            self.add_module(name, child)
        for name, parameter in compiled.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        kept = root.state_dict().keys()
        for name, buffer in compiled.named_buffers(recurse=False):
            self.register_buffer(name, buffer, persistent=name in kept)

    def forward(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute this part. Raises `TensorMissing` when one of `takes` is not there."""
        result: dict[str, Tensor] = self._compute(self, tensors)
        return result


@dataclass(slots=True, eq=False)
class _Segment:
    """What one part computes, and what it needs from the part before: values, and the shapes of values."""

    nodes: set[fx.Node] = field(default_factory=set)
    takes: set[fx.Node] = field(default_factory=set)
    hollow: set[fx.Node] = field(default_factory=set)

    @property
    def ends(self) -> set[fx.Node]:
        return self.takes | self.hollow


def layer_names(model: nn.Module | Sequence[nn.Module] | TracedModel) -> tuple[str, ...]:
    """The names of the layers, in order: cut k (0 < k < len(layers)) comes after the first k of them."""
    return _traced(model).layer_names


def partition(
    model: nn.Module | Sequence[nn.Module] | TracedModel,
    cuts: Sequence[int],
    example: Mapping[str, Tensor] | None = None,
) -> tuple[Part, ...]:
    """Cut a network, in the mode (training or evaluation) it is in, into `len(cuts) + 1` parts.

    `example` is one request; of it only shapes and dtypes matter, and a meta tensor does. It is how `batchable` is
    found out: without one no part claims to be. Raises `CannotTrace`, `NoSuchCut` and `CutsNotIncreasing`.
    """
    traced = _traced(model)
    _check(cuts, traced.layer_names)
    segments = _segments(traced, cuts)
    ends = set(traced.graph.output_node().all_input_nodes).union(*(segment.ends for segment in segments))
    rows = _has_rows(traced, ends, example) if example is not None else set()
    return tuple(_build(traced, segments, index, rows) for index in range(len(segments)))


def fingerprint(part: Part, extra: str = "") -> str:
    """A short digest of a part's state (names, dtypes, shapes, bytes) and its graph: equal parts, equal digests.

    `extra` is what else two workers of a stage must agree on.
    """
    digest = hashlib.sha256(extra.encode())
    for node in part.graph.nodes:
        digest.update(f"{node.op} {node.name} {node.args}\n".encode())
    for name, tensor in sorted(part.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()[:FINGERPRINT_DIGITS]


def _traced(model: nn.Module | Sequence[nn.Module] | TracedModel) -> TracedModel:
    return model if isinstance(model, TracedModel) else trace(model)


def _check(cuts: Sequence[int], names: tuple[str, ...]) -> None:
    for cut in cuts:
        if not 0 < cut < len(names):
            raise NoSuchCut(cut, names)
    if any(later <= earlier for earlier, later in pairwise(cuts)):
        raise CutsNotIncreasing(tuple(cuts))


def _segments(traced: TracedModel, cuts: Sequence[int]) -> list[_Segment]:
    """Live values at every cut, found from the last part to the first."""
    place = {node: bisect_right(cuts, index) for index, node in enumerate(traced.layer_nodes)}
    place[traced.graph.output_node()] = len(cuts)
    shapes = _shape_nodes(traced.graph)
    segments = [_Segment() for _ in range(len(cuts) + 1)]
    for node, index in place.items():
        segments[index].nodes.add(node)
    for segment, later in zip(reversed(segments), [_Segment(), *reversed(segments)], strict=False):
        for node in list(segment.nodes):
            _have_inputs(node, segment, shapes)
        segment.takes |= later.takes - segment.nodes
        segment.hollow |= later.hollow - segment.nodes
        segment.hollow -= segment.takes
    segments[0].takes |= segments[0].hollow  # the source sends its inputs whole
    segments[0].hollow = set()
    return segments


def _have_inputs(node: fx.Node, segment: _Segment, shapes: set[fx.Node]) -> None:
    """Have what a node reads in its part: from the part before, or made here where it is state or only about shapes."""
    for argument in node.all_input_nodes:
        if argument in segment.nodes:
            continue
        if argument.op == "get_attr":
            segment.nodes.add(argument)
        elif argument in shapes:
            segment.nodes.add(argument)
            _have_inputs(argument, segment, shapes)
        elif node in shapes:
            segment.hollow.add(argument)
        else:
            segment.takes.add(argument)


def _shape_nodes(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose values are shapes, sizes, kinds, or numbers made of such only."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        asks = (node.op == "call_method" and node.target in SHAPE_METHODS) or (
            node.op == "call_function" and node.target is getattr and node.args[1] in SHAPE_ATTRIBUTES
        )
        counts = node.op == "call_function" and getattr(node.target, "__module__", None) in ARITHMETIC_MODULES
        inputs = node.all_input_nodes
        if asks or (counts and inputs and all(argument in found for argument in inputs)):
            found.add(node)
    return found


def _build(traced: TracedModel, segments: list[_Segment], index: int, rows: set[fx.Node]) -> Part:
    """Write the graph of one part: receive, compute in the order of the whole, send."""
    segment = segments[index]
    later = segments[index + 1] if index + 1 < len(segments) else None
    graph = fx.Graph()
    tensors = graph.placeholder("tensors")
    values: dict[fx.Node, fx.Node] = {}  # a node of the whole -> the node of this part that has its value
    shapes: dict[fx.Node, fx.Node] = {}  # ... that has it hollow
    for node, name in _named(traced, segment):
        values[node] = graph.call_function(unpack_value, (tensors, name, False))
        if node in segment.hollow:
            shapes[node] = values[node]
            values[node] = graph.call_function(expand_shape_tensor, (shapes[node],))
    for node in traced.graph.nodes:
        if node in segment.nodes and node.op != "output":
            values[node] = graph.node_copy(node, values.__getitem__)
    if later is None:
        result = traced.graph.output_node().args[0]
        gives = _answer_names(result)
        graph.output(graph.call_function(pack_result, (fx.map_arg(result, values.__getitem__),)))
    else:
        leaving = _named(traced, later)
        gives = tuple(name for _, name in leaving)
        for node, _ in leaving:
            if node in later.hollow and node not in shapes:
                shapes[node] = graph.call_function(make_shape_tensor, (values[node],))
        leave = [shapes[node] if node in later.hollow else values[node] for node, _ in leaving]
        graph.output(graph.call_function(pack_values, (gives, *leave)))
    copy_mutated_inputs(graph, traced.model)
    ends = later.ends if later is not None else set(traced.graph.output_node().all_input_nodes)
    takes = tuple(name for _, name in _named(traced, segment))
    return Part(traced.model, graph, takes, gives, batchable=rows >= ends | segment.ends)


def _named(traced: TracedModel, segment: _Segment) -> list[tuple[fx.Node, str]]:
    """What a part takes, in the order in which the network makes it, with the names it has on the wire."""
    return [
        (node, traced.wire_names[node] + (SHAPE_SUFFIX if node in segment.hollow else ""))
        for node in traced.graph.nodes
        if node in segment.ends
    ]


def _answer_names(result: Any) -> tuple[str, ...]:
    if isinstance(result, Mapping):
        return tuple(str(key) for key, value in result.items() if value is not None)
    if isinstance(result, tuple | list):
        return tuple(str(index) for index, value in enumerate(result) if value is not None)
    return ("output",)


def _has_rows(traced: TracedModel, nodes: set[fx.Node], example: Mapping[str, Tensor]) -> set[fx.Node]:
    """The nodes whose first dimension is the batch: the network is run on meta tensors, with 2 rows and then with 3.

    A network that cannot be run on meta tensors (it looks at values), or on this example, has none.
    """
    if any(traced.wire_names[node] not in example for node in traced.input_nodes):
        return set()
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in traced.graph.nodes:
        if node.op != "output":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    wanted = list(nodes)
    graph.output(tuple(copies[node] for node in wanted))
    network = fx.GraphModule(traced.model, graph)
    state = {name: tensor.to("meta") for name, tensor in (*network.named_parameters(), *network.named_buffers())}
    for rows in (2, 3):
        inputs = tuple(
            tensor.new_empty((rows, *tensor.shape[1:]), device="meta")
            for tensor in (example[traced.wire_names[node]] for node in traced.input_nodes)
        )
        try:
            results = torch.func.functional_call(network, state, inputs)
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):
            return set()
        nodes = nodes - {node for node, value in zip(wanted, results, strict=True) if not _rows(value, rows)}
    return nodes


def _rows(value: Any, count: int) -> bool:
    if isinstance(value, tuple | list):
        return all(_rows(item, count) for item in value if item is not None)
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == count
