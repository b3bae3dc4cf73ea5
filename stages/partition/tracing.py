"""A network as a list of layers: traced by torch.fx, with a wire name for each value.

Every call of a torch function in the forward is recorded, also one without an input among its arguments: a table that
is looked up in a parameter, or a random tensor, is computed again for each request. With each layer the grad mode and
the autocast state are recorded in which the forward calls it.

A module that torch.fx cannot trace, as its control flow depends on values, is one layer. If that is the network itself,
it must be an `nn.Sequential` or a list of modules: its graph then has one layer per child.
"""

import logging
import operator
import threading
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from brokers.errors import UsageError, describe_error
from stages.partition.call_context import CONTEXT_KEY, current_context
from stages.partition.custom_gradients import trace_custom_gradients
from stages.partition.forward_arguments import name_arguments, split_arguments
from stages.partition.in_place import LAYER_OPS, is_leaf
from stages.partition.named_values import name_results
from stages.partition.python_state import CachedFunctions, ModuleAttributes, PythonState
from stages.partition.shape_guards import QUESTIONS, check_answer, is_guard
from stages.partition.state_nodes import find_state_nodes
from stages.partition.traced_value import (
    DependsOnData,
    ExampleValues,
    TracedValue,
    accept_traced_arguments,
    classes_of_examples,
)

log = logging.getLogger(__name__)

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, eq=False)
class TracedModel:
    """A network and its graph; `wire_names` names the inputs and the result of each layer.

    `state_nodes` are computed from parameters, buffers and constants only; they are no layers, and are computed in
    each part that uses them. `constants`: tensors that are no parameters, buffers or attributes, by the target of
    their node.
    """

    model: nn.Module
    graph: fx.Graph
    wire_names: Mapping[fx.Node, str]
    state_nodes: Set[fx.Node] = frozenset()
    constants: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def is_chain(self) -> bool:
        """Whether the network calls its children, each one layer, one after the other."""
        return _is_chain(self.model) and all(node.op == "call_module" for node in self.layer_nodes)

    @property
    def input_nodes(self) -> tuple[fx.Node, ...]:
        return tuple(node for node in self.graph.nodes if node.op == "placeholder")

    @property
    def layer_nodes(self) -> tuple[fx.Node, ...]:
        """The nodes that compute, in order: cut k comes after the first k of them."""
        return tuple(
            node
            for node in self.graph.nodes
            if node.op in LAYER_OPS and node not in self.state_nodes and not is_guard(node)
        )

    @property
    def layer_names(self) -> tuple[str, ...]:
        return tuple(self.wire_names[node] for node in self.layer_nodes)


def trace(
    model: nn.Module | Sequence[nn.Module],
    example: Mapping[str, Tensor] | None = None,
    device: torch.device = _CPU,
) -> TracedModel:
    """Trace the forward of a network in its present mode: branches on `training` are fixed.

    `example`: one request, by the names of the forward's arguments (of one argument the name may be "input"); its
    shapes and dtypes answer questions of the forward. Arguments with a default that it does not name keep the default.
    Raises `UsageError` "CannotTrace" if torch.fx fails and the network is no `nn.Sequential` or list.
    """
    module = model if isinstance(model, nn.Module) else nn.Sequential(*model)
    state, cached_functions = PythonState(module), CachedFunctions(module)
    tracer = _LayerTracer(module, example or {}, device)
    try:
        with torch.set_grad_enabled(module.training), classes_of_examples():
            graph = tracer.trace(module)
    except UsageError:
        raise
    except Exception as error:  # the model's own code, called with traced values, may raise anything
        if not _is_chain(module):
            raise _trace_error(module, _describe(error)) from error
        graph = _chain_graph(module)
    finally:
        state.restore()
        cached_functions.clear_changed()
    if not any(node.op == "placeholder" for node in graph.nodes):
        raise _trace_error(module, "its forward has no argument without a default")
    state_nodes = find_state_nodes(graph)
    for node in reversed(graph.nodes):
        # `out, _ = attention(x)`: the unused item may be None, which cannot cross.
        if not node.users and (node.target is operator.getitem or node in state_nodes):
            graph.erase_node(node)
            state_nodes.discard(node)
    constants = tracer.values.constants
    return TracedModel(module, graph, _wire_names(graph, state_nodes), frozenset(state_nodes), constants)


class _LayerTracer(fx.Tracer):
    """Traces with `TracedValue`s; tensors of the network are found by identity."""

    def __init__(self, root: nn.Module, example: Mapping[str, Tensor], device: torch.device) -> None:
        super().__init__()
        named = name_arguments(root, example)
        self._positional, self._keywords = split_arguments(root, named)
        self._device = device
        self._thread = threading.get_ident()
        self.values = ExampleValues(root, named, device)
        self._state_names: dict[int, str] = {}  # of parameters, buffers and attributes, by id
        for path, module in root.named_modules():
            for name, value in (*module._parameters.items(), *module._buffers.items(), *vars(module).items()):
                if isinstance(value, Tensor):
                    self._state_names.setdefault(id(value), f"{path}.{name}" if path else name)
        self._constants: dict[int, str] = {}
        self._guards: dict[tuple[fx.Node, str], fx.Node] = {}  # by the value and the question
        self._unanswered: str | None = None  # why the first question without an answer had none
        self._asked_for_index: fx.Node | None = None  # the value of that question, if it was for an index
        self._recent_guards: dict[fx.Node, fx.Node] = {}  # since the last layer, by the value that was asked

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m)

    def proxy(self, node: fx.Node) -> TracedValue:
        return TracedValue(node, self)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if self.values.is_computing or threading.get_ident() != self._thread:  # torch.fx patches modules of all threads
            return attr_val
        if not isinstance(attr_val, Tensor) or issubclass(type(attr_val), fx.Proxy):
            return attr_val
        return TracedValue(self._tensor_node(attr_val), self)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Record the layers of a module; one whose forward cannot be traced is a layer itself, called as it is."""
        is_child = m in (self.submodule_paths or ())  # or in a plain list, or made by the forward: `nn.ReLU()(x)`
        if self.values.is_computing or not is_child or threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        if is_leaf(m):
            return super().call_module(m, forward, args, kwargs)
        state = ModuleAttributes(m)
        before = next(iter(reversed(self.graph.nodes)))
        unanswered = self._unanswered
        try:
            result = super().call_module(m, forward, args, kwargs)
            if self._unanswered is unanswered:
                return result
            reason = self._unanswered or ""
        except Exception as error:  # noqa: BLE001 - the module's own code, called with traced values, may raise anything
            reason = _describe(error)
        self._unanswered = unanswered
        log.info("module %r cannot be traced and is one layer: %s", self.path_of_module(m), reason)
        state.restore()
        while (node := next(iter(reversed(self.graph.nodes)))) is not before:
            self.graph.erase_node(node)
        return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: object = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Return a function that calls the network with its hooks, as a user does."""
        root: Any = self.root
        values = {name: self.create_proxy("placeholder", name, (), {}) for name in (*self._positional, *self._keywords)}

        def call(*args: Any) -> Any:
            with accept_traced_arguments(), trace_custom_gradients(self), _Recorder(self):
                result = root._call_impl(*args, **{name: values[name] for name in self._keywords})
                self._check_answered()
                return name_results(result)

        return call, [values[name] for name in self._positional]

    def create_arg(self, a: Any) -> Any:
        if issubclass(type(a), fx.Proxy):
            if a.tracer is not self:
                raise TypeError("a function has kept a value of an earlier trace")
            return a.node
        if isinstance(a, torch.Generator):
            raise TypeError("its random numbers are of a separate torch.Generator, which parts cannot share")
        if isinstance(a, Tensor):
            return self._tensor_node(a)
        if isinstance(a, np.generic):
            return a.item()
        return super().create_arg(a)

    def _tensor_node(self, tensor: Tensor) -> fx.Node:
        name = self._state_names.get(id(tensor))
        if name is None:
            name = self._constants.setdefault(id(tensor), f"constant_of_trace_{len(self._constants)}")
            self.values.constants[name] = tensor
        return self.create_node("get_attr", name, (), {})

    def create_node(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any = None,
    ) -> fx.Node:
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        if kind in LAYER_OPS and target is not check_answer:
            self._recent_guards.clear()
            self._asked_for_index = None
            node.meta[CONTEXT_KEY] = current_context(self._device)
        return node

    def record_state_call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record a call of a torch function without inputs of the network, if its result is a tensor."""
        if getattr(function, "__name__", "") == "__get__":
            name = function.__self__.__name__  # type: ignore[attr-defined]
            result = getattr(args[0], name)
            is_tensor = isinstance(result, Tensor)
            return self.create_proxy("call_function", getattr, (args[0], name), {}) if is_tensor else result
        result = self.values.call(function, args, kwargs)
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            return result
        if torch.overrides.is_tensor_method_or_property(function):
            return self.create_proxy("call_method", function.__name__, args, kwargs)
        return self.create_proxy("call_function", function, args, kwargs)

    def class_of(self, node: fx.Node) -> type:
        """Return the class of a value for the example; without one it is taken for a tensor."""
        try:
            return type(self.values.value(node))
        except DependsOnData:
            return Tensor

    def example_of(self, value: TracedValue) -> Any:
        """Return the example of a value. Raises `DependsOnData`."""
        return self._ask(value, lambda example: example)

    def answer(self, value: TracedValue, question: str) -> Any:
        """Answer a question about a value from its example, and record a guard. Raises `DependsOnData`."""
        result = self._ask(value, QUESTIONS[question])
        node = value.node
        guard = self._guards.get((node, question))
        if not self.values.is_computing and (guard is None or guard._erased):
            guard = self.create_node("call_function", check_answer, (node, question, result, node.name), {})
            self._guards[node, question] = self._recent_guards[node] = guard
        return result

    def withdraw_questions_about(self, values: Sequence[Any]) -> None:
        """Withdraw the questions since the last layer about values that are now recorded as arguments of a call.

        They came from torch's C code, which asks each argument for an index: the guard is erased, and an index that
        depends on data is no error.
        """
        for value in values:
            if issubclass(type(value), fx.Proxy) and value.node is self._asked_for_index:
                self._unanswered = self._asked_for_index = None
            guard = self._recent_guards.pop(value.node, None) if issubclass(type(value), fx.Proxy) else None
            if guard is not None and guard.args[1] == "index" and not guard._erased:
                self.graph.erase_node(guard)

    def _ask(self, value: TracedValue, question: Callable[[Any], Any]) -> Any:
        try:
            return question(self.values.value(value.node))
        except (DependsOnData, RuntimeError, NotImplementedError) as error:
            problem = f"its control flow depends on the value of {value.node.name!r} ({error})"
            if self._unanswered is None:
                self._unanswered = problem
                self._asked_for_index = value.node if question is operator.index else None
            raise DependsOnData(problem) from None

    def hash_of(self, value: TracedValue) -> int:
        """Return the hash of a value: of a tensor its identity, of a size that of the example, with a guard."""
        try:
            example = self.values.value(value.node)
        except DependsOnData:
            return object.__hash__(value)
        if isinstance(example, bool | int | float | str | tuple):
            return int(self.answer(value, "hash"))
        return object.__hash__(value) if isinstance(example, Tensor) else hash(example)

    def text_of(self, value: TracedValue) -> str:
        """Return the text of a value: of a number that of the example, with a guard."""
        try:
            is_number = type(self.values.value(value.node)) in (bool, int, float)
        except DependsOnData:
            is_number = False
        return str(self.answer(value, "str")) if is_number else f"Proxy({value.node.name})"

    def _check_answered(self) -> None:
        """Raise `DependsOnData` if a question had no answer and the network's code has caught the error."""
        if self._unanswered is not None:
            raise DependsOnData(self._unanswered)


class _Recorder(TorchFunctionMode):
    """Records the calls of torch functions, also of those without inputs of the network among their arguments."""

    def __init__(self, tracer: _LayerTracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if self._tracer.values.is_computing:
            return func(*args, **named)
        leaves = tree_leaves((args, named))
        if any(issubclass(type(leaf), fx.Proxy) for leaf in leaves):
            self._tracer.withdraw_questions_about(leaves)
            return TracedValue.__torch_function__(func, types, args, named)
        return self._tracer.record_state_call(func, args, named)


def _describe(error: Exception) -> str:
    return str(error) if isinstance(error, DependsOnData) else describe_error(error)


def _trace_error(module: nn.Module, reason: str) -> UsageError:
    name = type(module).__name__
    message = (
        f"torch.fx cannot trace {name}: {reason}; "
        "move that into a separate child module, which is then one layer, or return an nn.Sequential or a list of "
        "modules"
    )
    return UsageError("CannotTrace", message, key="pipeline.model", model=name)


def _is_chain(module: nn.Module) -> bool:
    return type(module).forward is nn.Sequential.forward


def _chain_graph(module: nn.Module) -> fx.Graph:
    graph = fx.Graph()
    value = graph.placeholder("input")
    for name, _ in module.named_children():
        value = graph.call_module(name, (value,))
    graph.output({"output": value})
    return graph


def _wire_names(graph: fx.Graph, state_nodes: Set[fx.Node]) -> dict[fx.Node, str]:
    """Name inputs and layers: `features.0` for a module, `add_3` for a function, `input` for the only input.

    The second call of a module gets the suffix `_1`, and so on.
    """
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    names = {node: str(node.target) if len(inputs) > 1 else "input" for node in inputs}
    used = set(names.values())
    for node in graph.nodes:
        if node.op in LAYER_OPS and node not in state_nodes and not is_guard(node):
            base = name = str(node.target) if node.op == "call_module" else node.name
            repeats = 0
            while name in used:
                repeats += 1
                name = f"{base}_{repeats}"
            used.add(name)
            names[node] = name
    return names
