"""In-place operations at the boundary of a part: inputs that one may modify are copied when they arrive.

A cut turns a value that the network overwrites (`ReLU(inplace=True)`, `x += y`) into an input, which belongs to the
caller. The analysis is conservative: a value that may share memory with a modified one is copied.
"""

import operator

from torch import fx, nn

from stages.partition.boundary import unpack_value
from stages.partition.fx_graph import LAYER_OPS, is_leaf

IN_PLACE_OPERATORS = frozenset(
    getattr(operator, name)
    for name in ("iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor")
) | {operator.setitem}


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
