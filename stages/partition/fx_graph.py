"""A network as a list of layers: traced by torch.fx, with a wire name for each value.

A network that torch.fx cannot trace (its control flow depends on values) can be cut between the children of an
`nn.Sequential` or of a list of modules; its graph then has one layer per child.
"""

import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from brokers.errors import UsageError

LAYER_OPS = frozenset({"call_module", "call_function", "call_method"})


@dataclass(frozen=True, slots=True, eq=False)
class TracedModel:
    """A network and its graph; `wire_names` names the inputs and the result of each layer."""

    model: nn.Module
    graph: fx.Graph
    wire_names: Mapping[fx.Node, str]

    @property
    def input_nodes(self) -> tuple[fx.Node, ...]:
        return tuple(node for node in self.graph.nodes if node.op == "placeholder")

    @property
    def layer_nodes(self) -> tuple[fx.Node, ...]:
        """The nodes that compute, in order: cut k comes after the first k of them."""
        return tuple(node for node in self.graph.nodes if node.op in LAYER_OPS)

    @property
    def layer_names(self) -> tuple[str, ...]:
        return tuple(self.wire_names[node] for node in self.layer_nodes)


def trace(model: nn.Module | Sequence[nn.Module]) -> TracedModel:
    """Trace the forward of a network in its present mode: branches on `training` are fixed.

    Raises `UsageError` "CannotTrace" if torch.fx fails and the network is no `nn.Sequential` or list.
    """
    module = model if isinstance(model, nn.Module) else nn.Sequential(*model)
    try:
        graph = _LayerTracer().trace(module)
    except Exception as error:  # the model's own code, called with proxies, may raise anything
        if not isinstance(module, nn.Sequential):
            raise _trace_error(module, " ".join(str(error).split())) from error
        graph = _chain_graph(module)
    if not any(node.op == "placeholder" for node in graph.nodes):
        raise _trace_error(module, "its forward has no argument without a default")
    for node in reversed(graph.nodes):  # `out, _ = attention(x)`: the unused item may be None, which cannot cross
        if node.target is operator.getitem and not node.users:
            graph.erase_node(node)
    return TracedModel(module, graph, _wire_names(graph))


def is_leaf(module: nn.Module) -> bool:
    """Return whether a module is one layer: torch's own except containers, and classes with `fx_leaf = True`.

    A class with `fx_leaf` promises not to modify its inputs in place.
    """
    if getattr(type(module), "fx_leaf", False):
        return True
    return type(module).__module__.startswith("torch.nn") and not isinstance(module, nn.Sequential)


class _LayerTracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: object = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Keep the defaults of arguments: a proxy for `targets=None` would take the wrong branch."""
        _, *parameters = inspect.signature(root_fn).parameters.values()  # the first is self
        required = [
            parameter.name
            for parameter in parameters
            if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        ]
        return root_fn, [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in required)]


def _trace_error(module: nn.Module, reason: str) -> UsageError:
    name = type(module).__name__
    message = (
        f"torch.fx cannot trace {name}: {reason}; "
        "return an nn.Sequential or a list of modules instead, which can be cut between its children"
    )
    return UsageError("CannotTrace", message, key="pipeline.model", model=name)


def _chain_graph(module: nn.Sequential) -> fx.Graph:
    graph = fx.Graph()
    value = graph.placeholder("input")
    for name, _ in module.named_children():
        value = graph.call_module(name, (value,))
    graph.output(value)
    return graph


def _wire_names(graph: fx.Graph) -> dict[fx.Node, str]:
    """Name inputs and layers: `features.0` for a module, `add_3` for a function, `input` for the only input.

    The second call of a module gets the suffix `_1`, and so on.
    """
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    names = {node: node.name if len(inputs) > 1 else "input" for node in inputs}
    used = set(names.values())
    for node in graph.nodes:
        if node.op in LAYER_OPS:
            base = name = str(node.target) if node.op == "call_module" else node.name
            repeats = 0
            while name in used:
                repeats += 1
                name = f"{base}_{repeats}"
            used.add(name)
            names[node] = name
    return names
