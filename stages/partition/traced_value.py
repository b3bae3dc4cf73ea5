"""A value of a network while it is traced: operations on it become nodes of the graph; its kind is known by an example.

torch.fx traces with values of which nothing is known: `isinstance(x, Tensor)` is false, `if x.dim() == 3` fails. Here a
question about a value is answered by computing it for the example input on the meta device, where tensors have
shapes and dtypes, but no data. So a branch on a shape is taken as it would be for the example, and a branch on data is
an error.
"""

import builtins
import functools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

META_DEVICE = torch.device("meta")
EXAMPLE_KEY = "example"  # in the meta data of a node: its value for the example
_DEVICE_ATTRIBUTES: Mapping[str, Callable[[torch.device], object]] = {
    "device": lambda device: device,
    "is_cuda": lambda device: device.type == "cuda",
    "is_cpu": lambda device: device.type == "cpu",
    "is_meta": lambda device: False,
}
# Functions of these modules compute with Python's own objects, and with tensors by their methods.
PYTHON_MODULES = frozenset({operator.__name__, "_operator", builtins.__name__, math.__name__})
_ABSENT_MARKS = frozenset({"_is_param"})  # torch asks each value that becomes an attribute of a module
# Of the named tuples that functions of torch return: `x.max(dim=1).values`.
_FIELD_NAMES = frozenset(
    name for kind in vars(torch.return_types).values() for name in getattr(kind, "__match_args__", ())
)
_SIZED_FACTORIES = ("zeros", "ones", "empty", "rand", "randn")
_DTYPE_LIMITS = ("finfo", "iinfo")
_IN_PLACE_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor")


class DependsOnData(Exception):
    """A question about a value whose answer needs its data, which an example on the meta device has not."""


class ExampleValues:
    """The values of a graph's nodes for one example input, on the meta device; computed when one is asked for.

    `inputs`: by placeholder name; empty if no example is known. `device`: where the network runs, which its forward may
    ask for.
    """

    def __init__(self, root: nn.Module, inputs: Mapping[str, Tensor], device: torch.device) -> None:
        self._root = root
        self._inputs = inputs
        self.device = device
        self.constants: dict[str, Tensor] = {}  # by the target of their get_attr node
        self.is_computing = False  # the functions that are called then are no layers of the network

    def value(self, node: fx.Node) -> Any:
        """Compute the value of a node. Raises `DependsOnData`."""
        pending = [node]
        with self._compute_only():
            while pending:  # a loop: a network may have more layers in a row than Python allows nested calls
                first = pending[-1]
                missing = [each for each in first.all_input_nodes if EXAMPLE_KEY not in each.meta]
                if missing:
                    pending += missing
                else:
                    pending.pop()
                    if EXAMPLE_KEY not in first.meta:
                        first.meta[EXAMPLE_KEY] = self._compute(first)
        return node.meta[EXAMPLE_KEY]

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call a function with tensors on the meta device. Raises `DependsOnData`."""
        is_python = getattr(function, "__module__", None) in PYTHON_MODULES
        with self._compute_only(), META_DEVICE:
            try:
                if is_python:  # devices are compared, or asked for their type, as they are
                    return function(*args, **kwargs)
                return self._to_meta(function(*self._to_meta(args), **self._to_meta(dict(kwargs))))
            except Exception as error:  # of torch's kernels for the meta device, or of the network's own code
                raise DependsOnData(" ".join(str(error).split())) from error

    @contextmanager
    def _compute_only(self) -> Iterator[None]:
        was_computing, self.is_computing = self.is_computing, True
        try:
            yield
        finally:
            self.is_computing = was_computing

    def _compute(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            if node.target not in self._inputs:
                raise DependsOnData("no example of this input is known")
            return self._to_meta(self._inputs[str(node.target)])
        target: Any = node.target
        if node.op == "get_attr":
            return self._to_meta(
                self.constants[target] if target in self.constants else find_attribute(self._root, target)
            )
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda each: each.meta[EXAMPLE_KEY])
        if target is getattr and isinstance(args[0], Tensor) and (answer := _DEVICE_ATTRIBUTES.get(str(args[1]))):
            return answer(self.device)
        if node.op == "call_method":
            return self.call(lambda *rest, **named: getattr(rest[0], target)(*rest[1:], **named), args, kwargs)
        if node.op == "call_module":
            module = self._root.get_submodule(target)
            state = {
                name: self._to_meta(tensor) for name, tensor in (*module.named_parameters(), *module.named_buffers())
            }
            return self.call(
                lambda *rest, **named: torch.func.functional_call(module, state, rest, named), args, kwargs
            )
        return self.call(target, args, kwargs)

    def _to_meta(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            with torch._C.DisableTorchFunction():
                return value.detach().to(META_DEVICE)
        if isinstance(value, torch.device):
            return META_DEVICE
        if type(value) in (tuple, list):
            return type(value)(self._to_meta(each) for each in value)
        if type(value) is dict:
            return {key: self._to_meta(each) for key, each in value.items()}
        return value


def find_attribute(root: nn.Module, path: str) -> Any:
    """Return the attribute of a module at a path such as "blocks.0.scale"."""
    module, _, name = path.rpartition(".")
    return getattr(root.get_submodule(module), name)


@contextmanager
def classes_of_examples() -> Iterator[None]:
    """Have `isinstance` answer for a traced value as for its example.

    Not by a property `__class__`: torch's C code would take the value for a tensor with data, and crash.
    """
    builtin = builtins.isinstance

    def is_instance(value: Any, kinds: Any) -> bool:
        kind = type(value)
        if not issubclass(kind, TracedValue):
            return builtin(value, kinds)
        of_proxies = (each for each in (kinds if type(kinds) is tuple else (kinds,)) if type(each) is type)
        if any(issubclass(each, fx.Proxy) and issubclass(kind, each) for each in of_proxies):
            return True
        return issubclass(value.tracer.class_of(value.node), kinds)

    builtins.isinstance = is_instance
    try:
        yield
    finally:
        builtins.isinstance = builtin


class TracedValue(fx.Proxy):
    """A value of the network: an operation on it is recorded, a question about it is answered by its example."""

    tracer: Any
    __array_priority__ = 1000.0  # numpy's numbers at the left leave the operation to this class, as for tensors

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(Tensor, name):
            return self._private_attribute(name)
        return TracedAttribute(self, name)

    def _private_attribute(self, name: str) -> Any:
        """Return an attribute that tensors have not: an item of a named tuple, or a mark of torch or of the network."""
        if name.startswith("__") or name in _ABSENT_MARKS:
            raise AttributeError(name)
        try:
            value = self.tracer.values.value(self.node)
        except DependsOnData:
            return TracedAttribute(self, name)
        if not hasattr(value, name):
            raise AttributeError(f"{type(value).__name__!r} object has no attribute {name!r}")
        return TracedAttribute(self, name)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self.tracer.answer(self, "index"), dtype)  # a size, in numpy's arithmetic

    def __bool__(self) -> bool:
        return bool(self.tracer.answer(self, "bool"))

    def __len__(self) -> int:
        return int(self.tracer.answer(self, "len"))

    def __index__(self) -> int:
        return int(self.tracer.answer(self, "index"))

    def __int__(self) -> int:
        return int(self.tracer.answer(self, "int"))

    def __float__(self) -> float:
        return float(self.tracer.answer(self, "float"))

    def __round__(self, digits: int | None = None) -> Any:
        return self.tracer.answer(self, "round") if digits is None else round(float(self), digits)

    def __ceil__(self) -> int:
        return int(self.tracer.answer(self, "ceil"))

    def __floor__(self) -> int:
        return int(self.tracer.answer(self, "floor"))

    def __contains__(self, item: Any) -> bool:
        return any(bool(each == item) for each in self)

    def __iter__(self) -> Iterator[Any]:
        return iter([operator.getitem(self, index) for index in range(len(self))])

    def __reversed__(self) -> Iterator[Any]:
        return iter([operator.getitem(self, index) for index in reversed(range(len(self)))])

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __deepcopy__(self, memo: dict[int, Any]) -> "TracedValue":
        return self  # the network copies its configuration, not its activations

    def __hash__(self) -> int:
        return int(self.tracer.hash_of(self))

    def __str__(self) -> str:
        return str(self.tracer.text_of(self))

    __repr__ = __str__

    def __format__(self, specification: str) -> str:
        return format(str(self), specification)

    def __divmod__(self, other: Any) -> tuple[Any, Any]:
        return operator.floordiv(self, other), operator.mod(self, other)


class TracedAttribute(TracedValue):
    """An attribute of a value: a node once it is used as a value, unless it is called as a method."""

    def __init__(self, owner: TracedValue, name: str) -> None:
        self.tracer = owner.tracer
        self._owner = owner
        self._name = name
        self._node: fx.Node | None = None

    def __getattr__(self, name: str) -> Any:
        # The type of a device chooses an implementation: torch reads it in C.
        return getattr(self.tracer.values.device, name) if self._name == "device" else super().__getattr__(name)

    @property
    def node(self) -> fx.Node:  # type: ignore[override]
        if self._node is None or self._node._erased:  # with the layers of a module that cannot be traced
            function, key = self._access()
            self._node = self.tracer.create_proxy("call_function", function, (self._owner, key), {}).node
        return self._node

    def _access(self) -> tuple[Callable[..., Any], str | int]:
        """Return how to get the attribute: an item of a named tuple by its index, as it crosses a cut without names."""
        if self._name in _FIELD_NAMES:
            kind = self.tracer.class_of(self._owner.node)
            if issubclass(kind, tuple) and self._name in (names := kind.__match_args__):
                return operator.getitem, names.index(self._name)
        return getattr, self._name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.tracer.create_proxy("call_method", self._name, (self._owner, *args), kwargs)


@contextmanager
def accept_traced_arguments() -> Iterator[None]:
    """Let functions of torch that read their arguments in C accept traced values: sizes one by one, dtypes."""
    with META_DEVICE:  # torch collects its factories when they are first called with a default device, and keeps them
        torch.empty(0)
    original = {name: getattr(torch, name) for name in (*_SIZED_FACTORIES, *_DTYPE_LIMITS)}
    try:
        for name in _SIZED_FACTORIES:
            setattr(torch, name, _join_sizes(original[name]))
        for name in _DTYPE_LIMITS:
            setattr(torch, name, _find_dtype(original[name]))
        yield
    finally:
        for name, function in original.items():
            setattr(torch, name, function)


def _join_sizes(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def call(*sizes: Any, **options: Any) -> Any:
        if any(issubclass(type(size), TracedValue) for size in sizes) and type(sizes[0]) is not tuple:
            is_single = len(sizes) == 1 and not isinstance(sizes[0], int)
            return factory(sizes[0] if is_single else sizes, **options)
        return factory(*sizes, **options)

    return call


def _find_dtype(limits: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(limits, updated=())
    def call(dtype: Any = None) -> Any:
        if issubclass(type(dtype), TracedValue):
            dtype = dtype.tracer.example_of(dtype)
        return limits() if dtype is None else limits(dtype)

    return call


def _add_in_place_operator(name: str) -> None:
    function = getattr(operator, f"i{name}")

    def apply(self: TracedValue, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    setattr(TracedValue, f"__i{name}__", apply)


Sequence.register(TracedAttribute)  # for `match x.shape`
for _name in _IN_PLACE_OPERATORS:
    _add_in_place_operator(_name)
