"""Which layers modify their arguments, and which modules are one layer."""

import operator

import torch
from torch import fx, nn

LAYER_OPS = frozenset({"call_module", "call_function", "call_method"})
_IN_PLACE_OPERATORS = frozenset(
    getattr(operator, name)
    for name in ("iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor")
) | {operator.setitem}
# Containers of torch whose children are layers; each other module of torch is one layer.
_CONTAINERS = (nn.Sequential, nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder)


def is_leaf(module: nn.Module) -> bool:
    """Return whether a module is one layer: torch's own except containers, and classes with `fx_leaf = True`.

    A class with `fx_leaf` promises not to modify its inputs in place.
    """
    if getattr(type(module), "fx_leaf", False) or isinstance(module, torch.jit.ScriptModule):
        return True
    return type(module).__module__.startswith("torch.nn") and not isinstance(module, _CONTAINERS)


def mutates_input(node: fx.Node, model: nn.Module | None = None) -> bool:
    """Return whether a layer modifies, or may modify, an argument.

    Without a `model`, modules are taken to modify nothing.
    """
    if node.op == "call_module":
        if model is None:
            return False
        module = model.get_submodule(str(node.target))
        return not is_leaf(module) or bool(getattr(module, "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    by_name = node.op in LAYER_OPS and name.endswith("_") and not name.endswith("__")
    has_option = node.kwargs.get("inplace") or node.kwargs.get("out") is not None
    return by_name or node.target in _IN_PLACE_OPERATORS or bool(has_option)


def mutated_inputs(node: fx.Node, model: nn.Module | None = None) -> list[fx.Node]:
    """Return the arguments that a layer modifies, or may modify."""
    if not mutates_input(node, model):
        return []
    if node.op == "call_module":
        return node.all_input_nodes
    results: list[fx.Node] = []
    fx.map_arg(node.kwargs.get("out"), results.append)
    return results or node.all_input_nodes[:1]


def allocates_result(node: fx.Node, model: nn.Module) -> bool:
    """Return whether a layer's result certainly shares no memory with its inputs: convolutions, products, norms."""
    if node.op != "call_module":
        return False
    module = model.get_submodule(str(node.target))
    return is_leaf(module) and not mutates_input(node, model) and any(True for _ in module.parameters())
