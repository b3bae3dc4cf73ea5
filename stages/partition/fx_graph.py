"""A network as a list of layers: torch.fx follows its forward once, and each operation gets its name on the wire.

A network that torch.fx cannot follow (it branches on values) can still be cut between the children of an
`nn.Sequential`, or of a list of modules: its graph is then written down by hand, one layer a child.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from stages.errors import CannotTrace

LAYER_OPS = frozenset({"call_module", "call_function", "call_method"})


@dataclass(frozen=True, slots=True, eq=False)
class TracedModel:
    """A network and its graph. `names` holds what each input, and the result of each layer, is called on the wire."""

    model: nn.Module
    graph: fx.Graph
    wire_names: Mapping[fx.Node, str]

    @property
    def input_nodes(self) -> tuple[fx.Node, ...]:
        return tuple(node for node in self.graph.nodes if node.op == "placeholder")

    @property
    def layer_nodes(self) -> tuple[fx.Node, ...]:
        """The nodes that compute something, in order: cut k comes after the first k of them."""
        return tuple(node for node in self.graph.nodes if node.op in LAYER_OPS)

    @property
    def layer_names(self) -> tuple[str, ...]:
        return tuple(self.wire_names[node] for node in self.layer_nodes)


def trace(model: nn.Module | Sequence[nn.Module]) -> TracedModel:
    """Follow the forward of a network in the mode it is in: what depends on `training` is fixed here.

    Raises `CannotTrace` where torch.fx cannot follow and there are no children to cut between.
    """
    module = model if isinstance(model, nn.Module) else nn.Sequential(*model)
    try:
        graph = _LayerTracer().trace(module)
    except Exception as error:  # whatever the model's own forward does with a proxy: TraceError, TypeError, ...
        if not isinstance(module, nn.Sequential):
            raise CannotTrace(type(module).__name__, " ".join(str(error).split())) from error
        graph = _chain(module)
    if not any(node.op == "placeholder" for node in graph.nodes):
        raise CannotTrace(type(module).__name__, "its forward takes no argument without a default")
    for node in reversed(graph.nodes):  # `out, _ = attention(x)`: the item that nobody reads may be None
        if node.target is operator.getitem and not node.users:
            graph.erase_node(node)
    return TracedModel(module, graph, _names(graph))


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is one layer: torch's own are, except containers, and those that say so (`fx_leaf = True`).

    A module of one's own with `fx_leaf` promises not to write into the tensors that it is given.
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
        """Arguments with a default keep it: a proxy in place of `targets=None` would take the wrong branch."""
        _, *parameters = inspect.signature(root_fn).parameters.values()  # the first is self
        required = [
            parameter.name
            for parameter in parameters
            if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        ]
        return root_fn, [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in required)]


def _chain(module: nn.Sequential) -> fx.Graph:
    graph = fx.Graph()
    value = graph.placeholder("input")
    for name, _ in module.named_children():
        value = graph.call_module(name, (value,))
    graph.output(value)
    return graph


def _names(graph: fx.Graph) -> dict[fx.Node, str]:
    """`features.0` for a module, `add_3` for a function; a module called again gets a number; one input is `input`."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    names = {node: node.name if len(inputs) > 1 else "input" for node in inputs}
    taken = set(names.values())
    for node in graph.nodes:
        if node.op in LAYER_OPS:
            base = name = str(node.target) if node.op == "call_module" else node.name
            times = 0
            while name in taken:
                times += 1
                name = f"{base}_{times}"
            taken.add(name)
            names[node] = name
    return names
