"""In-place layers at the edge of a part: what they may write into is copied as it comes in; the giver's tensor stays.

A value that an in-place layer overwrites (`ReLU(inplace=True)`, `x += y`) belongs to whoever sent it once a cut lies in
between. The search is careful, not clever: what may share memory is copied.
"""

from __future__ import annotations

import operator

from torch import fx, nn

from stages.partition.boundary import unpack_value
from stages.partition.fx_graph import LAYER_OPS, is_leaf

IN_PLACE_OPERATORS = frozenset(
    getattr(operator, name)
    for name in ("iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor")
) | {operator.setitem}


def copy_mutated_inputs(graph: fx.Graph, model: nn.Module) -> None:
    """Let a part copy, as it comes in, whatever one of its in-place layers may reach through views and the like."""
    reached: list[fx.Node] = []
    for node in graph.nodes:
        if _changes_input(node, model):
            reached += node.all_input_nodes if node.op == "call_module" else node.all_input_nodes[:1]
    seen: set[fx.Node] = set()
    while reached:
        node = reached.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.target is unpack_value:
            node.update_arg(2, True)
        elif not _makes_new(node, model):
            reached.extend(node.all_input_nodes)


def _changes_input(node: fx.Node, model: nn.Module) -> bool:
    """Whether a layer writes, or for all we know may write, into its first argument (a module: into any)."""
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        return not is_leaf(module) or bool(getattr(module, "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    by_name = node.op in LAYER_OPS and name.endswith("_") and not name.endswith("__")
    return by_name or node.target in IN_PLACE_OPERATORS or bool(node.kwargs.get("inplace"))


def _makes_new(node: fx.Node, model: nn.Module) -> bool:
    """Whether a layer's result surely shares no memory with its inputs: convolutions, products, norms."""
    if node.op != "call_module":
        return False
    module = model.get_submodule(str(node.target))
    return is_leaf(module) and not _changes_input(node, model) and any(True for _ in module.parameters())
