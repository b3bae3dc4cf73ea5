"""Partition a network into parts that, one after the other, compute what the whole network computes.

1. Cut k comes after the first k layers. A value that is computed before a cut and used after it (a live value) crosses
   the cut; it passes through all parts between its producer and its last user.
2. Only tensors cross, named after the layer that computed them: `features.10`. Tuples (a chunk, the state of an LSTM)
   cross item by item: `chunk[0]`, `chunk[1]`.
3. Shapes, and numbers computed from shapes, do not cross: they would be wrong once a stage batches requests. The
   receiving part computes them from a tensor that crosses anyway, or from one of the same shape without data
   (`relu:shape`).
4. A part never modifies its inputs: those that an in-place layer may modify are copied first.
5. Parameters and buffers keep their names; the modules are those of the network, not copies.

Limitation: two live values that share memory arrive as two. A network that then modifies one in place and reads the
change through the other must be cut elsewhere.
"""

import builtins
import hashlib
import math
import operator
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, fx, nn

from brokers.errors import UsageError
from stages.partition.boundary import (
    copy_mutated_inputs,
    expand_shape_tensor,
    find_batched_values,
    make_shape_tensor,
    name_results,
    pack_result,
    pack_values,
    unpack_value,
)
from stages.partition.fx_graph import TracedModel, trace

# Methods and attributes that read the shape or dtype of a tensor, never its values.
SHAPE_METHODS = frozenset({"size", "dim", "ndimension", "numel", "nelement", "is_floating_point"})
SHAPE_ATTRIBUTES = frozenset({"shape", "ndim", "dtype", "device", "is_cuda"})
ARITHMETIC_MODULES = frozenset({operator.__name__, "_operator", builtins.__name__, math.__name__})
SHAPE_SUFFIX = ":shape"
FINGERPRINT_DIGITS = 16  # 64 bits: detects mistakes, not attacks


class Part(nn.Module):
    """One part of a network: a module from named tensors to named tensors.

    `input_names` and `output_names` are the names of the values (a tuple is one value). `batchable`: the first
    dimension of all of them is known to be the batch, so that requests can be joined and results split there.
    """

    def __init__(
        self,
        root: nn.Module,
        graph: fx.Graph,
        input_names: tuple[str, ...],
        output_names: tuple[str, ...],
        batchable: bool,
    ) -> None:
        super().__init__()
        self.graph = graph
        self.input_names = input_names
        self.output_names = output_names
        self.batchable = batchable
        self.training = root.training
        compiled = fx.GraphModule(root, graph)  # has only those modules of root that the graph uses
        self._compute = type(compiled).forward
        for name, child in compiled.named_children():
            self.add_module(name, child)
        for name, parameter in compiled.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        persistent = root.state_dict().keys()
        for name, buffer in compiled.named_buffers(recurse=False):
            self.register_buffer(name, buffer, persistent=name in persistent)

    def forward(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute this part. Raises `WireError` "TensorMissing" if an input is missing."""
        outputs: dict[str, Tensor] = self._compute(self, tensors)
        return outputs


@dataclass(slots=True, eq=False)
class _Segment:
    """The nodes that one part computes, and the values, or only their shapes, that it needs from the part before."""

    nodes: set[fx.Node] = field(default_factory=set)
    inputs: set[fx.Node] = field(default_factory=set)
    shape_inputs: set[fx.Node] = field(default_factory=set)

    def wire_inputs(self, traced: TracedModel) -> list[tuple[fx.Node, str]]:
        """Return all inputs in the order in which the network computes them, with their names on the wire."""
        return [
            (node, traced.wire_names[node] + (SHAPE_SUFFIX if node in self.shape_inputs else ""))
            for node in traced.graph.nodes
            if node in self.inputs or node in self.shape_inputs
        ]


def layer_names(model: nn.Module | Sequence[nn.Module] | TracedModel) -> tuple[str, ...]:
    """Return the names of the layers, in order: cut k (0 < k < len(layers)) comes after the first k of them."""
    return _traced(model).layer_names


def partition(
    model: nn.Module | Sequence[nn.Module] | TracedModel,
    cuts: Sequence[int],
    example: Mapping[str, Tensor] | None = None,
) -> tuple[Part, ...]:
    """Partition a network, in its present mode (training or evaluation), into `len(cuts) + 1` parts.

    `example` is one request, of which shapes and dtypes are used (it may be on the meta device) to find out which parts
    are batchable; without it none is. Raises `UsageError` "CannotTrace", "NoSuchCut" or "CutsNotIncreasing".
    """
    traced = _traced(model)
    _check_cuts(cuts, traced.layer_names)
    segments = _find_live_values(traced, cuts)
    boundary = set(traced.graph.output_node().all_input_nodes)
    for segment in segments:
        boundary |= segment.inputs | segment.shape_inputs
    batched = find_batched_values(traced, boundary, example) if example is not None else set()
    return tuple(_build_part(traced, segments, index, batched) for index in range(len(segments)))


def fingerprint(part: Part, extra: str = "") -> str:
    """Return a digest of a part's graph and state (names, dtypes, shapes, bytes): equal for equal parts.

    `extra` is other text that the workers of a stage must agree on.
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


def _check_cuts(cuts: Sequence[int], names: tuple[str, ...]) -> None:
    last = len(names) - 1
    for cut in cuts:
        if last < 1:
            message = f"cut {cut} does not exist: a network of {len(names)} layer cannot be cut"
        elif not 0 < cut <= last:
            nearest = min(max(cut, 1), last)
            message = (
                f"cut {cut} does not exist: the network has {len(names)} layers and cuts 1 to {last}; "
                f"the nearest, {nearest}, is between {names[nearest - 1]!r} and {names[nearest]!r}"
            )
        else:
            continue
        raise UsageError("NoSuchCut", message, key="pipeline.cuts", cut=cut, layers=len(names))
    if any(later <= earlier for earlier, later in pairwise(cuts)):
        message = f"cuts {list(cuts)} must be in increasing order, each once"
        raise UsageError("CutsNotIncreasing", message, key="pipeline.cuts", cuts=tuple(cuts))


def _find_live_values(traced: TracedModel, cuts: Sequence[int]) -> list[_Segment]:
    """Backward live-variable analysis over the segments between cuts."""
    segment_index = {node: bisect_right(cuts, position) for position, node in enumerate(traced.layer_nodes)}
    segment_index[traced.graph.output_node()] = len(cuts)
    shape_nodes = _find_shape_nodes(traced.graph)
    segments = [_Segment() for _ in range(len(cuts) + 1)]
    for node, index in segment_index.items():
        segments[index].nodes.add(node)
    for segment, later in zip(reversed(segments), [_Segment(), *reversed(segments)], strict=False):
        for node in list(segment.nodes):
            _add_inputs(node, segment, shape_nodes)
        segment.inputs |= later.inputs - segment.nodes
        segment.shape_inputs |= later.shape_inputs - segment.nodes
        segment.shape_inputs -= segment.inputs
    segments[0].inputs |= segments[0].shape_inputs  # the source sends its inputs complete
    segments[0].shape_inputs = set()
    return segments


def _add_inputs(node: fx.Node, segment: _Segment, shape_nodes: set[fx.Node]) -> None:
    """Add the arguments of a node to its segment: inputs, or nodes of it if they are state or depend only on shapes."""
    for argument in node.all_input_nodes:
        if argument in segment.nodes:
            continue
        if argument.op == "get_attr":
            segment.nodes.add(argument)
        elif argument in shape_nodes:
            segment.nodes.add(argument)
            _add_inputs(argument, segment, shape_nodes)
        elif node in shape_nodes:
            segment.shape_inputs.add(argument)
        else:
            segment.inputs.add(argument)


def _find_shape_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes whose values are shapes or dtypes, or are computed only from those."""
    shape_nodes: set[fx.Node] = set()
    for node in graph.nodes:
        is_query = (node.op == "call_method" and node.target in SHAPE_METHODS) or (
            node.op == "call_function" and node.target is getattr and node.args[1] in SHAPE_ATTRIBUTES
        )
        is_arithmetic = node.op == "call_function" and getattr(node.target, "__module__", None) in ARITHMETIC_MODULES
        inputs = node.all_input_nodes
        if is_query or (is_arithmetic and inputs and all(argument in shape_nodes for argument in inputs)):
            shape_nodes.add(node)
    return shape_nodes


def _build_part(traced: TracedModel, segments: list[_Segment], index: int, batched: set[fx.Node]) -> Part:
    """Build the graph of one part: unpack the inputs, compute in the network's order, pack the outputs."""
    segment = segments[index]
    inputs = segment.wire_inputs(traced)
    graph = fx.Graph()
    tensors = graph.placeholder("tensors")
    values: dict[fx.Node, fx.Node] = {}  # by node of the network: its value in this part
    shapes: dict[fx.Node, fx.Node] = {}  # by node of the network: its shape tensor in this part
    for node, name in inputs:
        values[node] = graph.call_function(unpack_value, (tensors, name, False))
        if node in segment.shape_inputs:
            shapes[node] = values[node]
            values[node] = graph.call_function(expand_shape_tensor, (shapes[node],))
    for node in traced.graph.nodes:
        if node in segment.nodes and node.op != "output":
            values[node] = graph.node_copy(node, values.__getitem__)
    boundary = {node for node, _ in inputs}
    if index + 1 < len(segments):
        later = segments[index + 1]
        outputs = later.wire_inputs(traced)
        output_names = tuple(name for _, name in outputs)
        boundary |= {node for node, _ in outputs}
        for node, _ in outputs:
            if node in later.shape_inputs and node not in shapes:
                shapes[node] = graph.call_function(make_shape_tensor, (values[node],))
        packed = [shapes[node] if node in later.shape_inputs else values[node] for node, _ in outputs]
        graph.output(graph.call_function(pack_values, (output_names, *packed)))
    else:
        output = traced.graph.output_node()
        result = output.args[0]
        output_names = tuple(name_results(result))
        boundary |= set(output.all_input_nodes)
        graph.output(graph.call_function(pack_result, (fx.map_arg(result, values.__getitem__),)))
    copy_mutated_inputs(graph, traced.model)
    return Part(traced.model, graph, tuple(name for _, name in inputs), output_names, batchable=batched >= boundary)
