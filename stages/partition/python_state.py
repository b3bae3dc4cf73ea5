"""The state of a network outside its tensors: attributes of modules and other objects, containers, variables.

A forward may write to them while it is traced or checked. Afterwards they must be as before: a traced value in a list
of the network would be used by its next forward.
"""

import functools
import itertools
import os
import sys
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Set
from types import CellType, FunctionType, GeneratorType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# Packages whose classes and variables keep no state of a network, and those of their classes that do as attributes.
_FOREIGN_PACKAGES = frozenset({"torch", "torchvision", "numpy", *sys.stdlib_module_names} - {"__main__"})
_PLAIN_OBJECTS = frozenset({"types", "argparse", "collections", "functools"})
_PLAIN_TYPES = (bool, int, float, complex, str)
_CachedFunction = type(functools.lru_cache(lambda: None))


class ModuleAttributes:
    """The attributes, parameters and buffers of a module and its children, without the objects to which they refer."""

    def __init__(self, root: nn.Module) -> None:
        self._saved: list[tuple[dict[str, Any], dict[str, Any]]] = [
            (attributes, dict(attributes))
            for module in root.modules()
            if not isinstance(module, torch.jit.ScriptModule)
            for attributes in (vars(module), *_registries(module))
        ]

    def restore(self) -> None:
        for attributes, saved in self._saved:
            attributes.clear()
            attributes.update(saved)


class CachedFunctions:
    """The functions with `functools.cache` that a network may call, and that may keep traced values."""

    def __init__(self, root: nn.Module) -> None:
        self._packages = {type(module).__module__.partition(".")[0] for module in root.modules()}
        functions = _find_cached_functions(self._packages)
        self._misses = {function: function.cache_info().misses for function in functions}

    def clear_changed(self) -> None:
        """Empty those that have been computed since."""
        for function in _find_cached_functions(self._packages):
            if function.cache_info().misses != self._misses.get(function, 0):
                function.cache_clear()


class PythonState:
    """The containers, objects and arrays that a network refers to at any depth, and variables of its code."""

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._owners = _find_owners(root)
        found = list(self._walk())
        self._containers = [(value, _items(value)) for value in found if isinstance(value, dict | list | set | deque)]
        self._arrays = [(value, value.copy()) for value in found if isinstance(value, np.ndarray)]
        named = [(owner, name) for owner in (*self._owners, *found) for name in _variable_names(owner)]
        self._variables = [(owner, name, getattr(owner, name)) for owner, name in named]

    @property
    def values(self) -> list[object]:
        """The numbers and texts in all containers, arrays and variables now, and the sizes of the containers."""
        values: list[object] = []
        for owner, name, _ in self._variables:
            value = getattr(owner, name, None)
            values += [(name, value)] if type(value) in _PLAIN_TYPES else []
        for value in self._walk():
            if isinstance(value, np.ndarray):
                values.append(value.tobytes())
            elif isinstance(value, dict | list | set | deque):
                items = _items(value)
                values.append(len(items))
                values += [item for item in items if type(item[1]) in _PLAIN_TYPES]
        return values

    @property
    def positions(self) -> list[object]:
        """The positions of counters and generators now, which cannot be restored."""
        return [_position(value) for value in self._walk() if isinstance(value, itertools.count | GeneratorType)]

    @property
    def is_changed(self) -> bool:
        """Whether a container or a variable refers to another object, or an array has other numbers."""
        if any(getattr(owner, name, None) is not value for owner, name, value in self._variables):
            return True
        if any(not np.array_equal(array, saved) for array, saved in self._arrays):
            return True
        pairs = [(_items(container), saved) for container, saved in self._containers]
        return any(len(now) != len(saved) or not all(map(_is_same_item, now, saved)) for now, saved in pairs)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors but parameters."""
        values = [value for _, saved in self._containers for _, value in saved]
        values += [value for _, _, value in self._variables]
        found = (value for value in values if isinstance(value, Tensor) and not isinstance(value, nn.Parameter))
        return list({id(tensor): tensor for tensor in found}.values())

    def restore(self) -> None:
        for container, items in self._containers:
            _refill(container, items)
        for array, saved in self._arrays:
            np.copyto(array, saved)
        for owner, name, value in self._variables:
            if getattr(owner, name, None) is not value:
                set_value = setattr if isinstance(owner, type | ModuleType | CellType) else object.__setattr__
                set_value(owner, name, value)  # also of a frozen dataclass

    def _walk(self) -> Iterator[Any]:
        """Yield containers, dicts of attributes, arrays, counters, cells of closures, and objects with slots.

        Objects are followed from the network; from the variables of its code only those of classes of that code.
        """
        seen: set[int] = set()
        yield from _walk_from([self._root], seen, None)
        values = [value for owner in self._owners for name, value in _attributes(owner).items() if name[:2] != "__"]
        own = {owner.__name__ for owner in self._owners if isinstance(owner, ModuleType)}
        yield from _walk_from([value for value in values if not isinstance(value, nn.Module)], seen, own)


def _walk_from(pending: list[Any], seen: set[int], code: Set[str] | None) -> Iterator[Any]:
    """`code`: the Python modules to whose objects the search is limited, None for those of all but foreign packages."""
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, np.ndarray | itertools.count | GeneratorType):
            yield value
        elif isinstance(value, tuple):
            pending += value
        elif isinstance(value, FunctionType):
            pending += (value.__closure__, value.__defaults__, value.__kwdefaults__, vars(value))
        elif isinstance(value, MethodType):
            pending += (value.__self__, value.__func__)
        elif isinstance(value, functools.partial):
            pending += (value.func, value.args, value.keywords)
        elif isinstance(value, dict | list | set | deque):
            yield value
            pending += [item for _, item in _items(value)]
        is_object = _is_object_with_state(value) and (code is None or type(value).__module__ in code)
        if is_object or isinstance(value, CellType):
            yield value
            pending += [getattr(value, name) for name in _variable_names(value)]
            if hasattr(value, "__dict__"):
                yield vars(value)
                pending += [item for name, item in vars(value).items() if "hooks" not in name]


def _position(value: Any) -> object:
    if isinstance(value, GeneratorType):
        return None if value.gi_frame is None else (value.gi_frame.f_lasti, repr(value.gi_frame.f_locals))
    return repr(value)


def _is_object_with_state(value: Any) -> bool:
    if isinstance(value, nn.Module):
        return not isinstance(value, torch.jit.ScriptModule)
    if isinstance(value, Tensor | type | ModuleType | FunctionType | MethodType):
        return False
    package = type(value).__module__.partition(".")[0]
    return package not in _FOREIGN_PACKAGES or package in _PLAIN_OBJECTS


def _items(container: Any) -> list[tuple[object, Any]]:
    if isinstance(container, dict):
        return list(dict.items(container))
    if isinstance(container, set):
        return [(repr(value), value) for value in sorted(container, key=repr)]
    return list(enumerate(container))


def _refill(container: Any, items: list[tuple[Any, Any]]) -> None:
    """Give a container its former items, by the methods of its base class: subclasses may refuse changes."""
    if isinstance(container, OrderedDict):
        OrderedDict.clear(container)
        for key, value in items:
            OrderedDict.__setitem__(container, key, value)
    elif isinstance(container, dict):
        dict.clear(container)
        dict.update(container, items)
    else:
        container.clear()
        values = [value for _, value in items]
        container.update(values) if isinstance(container, set) else container.extend(values)


def _is_same_item(now: tuple[object, Any], saved: tuple[object, Any]) -> bool:
    return now[0] == saved[0] and now[1] is saved[1]


def _variable_names(owner: Any) -> list[str]:
    """Return the names of the variables of a class, a Python module, a cell, or an object with slots."""
    if isinstance(owner, CellType):
        try:
            return ["cell_contents"] if not isinstance(owner.cell_contents, type) else []
        except ValueError:  # empty
            return []
    if isinstance(owner, type | ModuleType):
        return [name for name, value in _attributes(owner).items() if type(value) in _PLAIN_TYPES and name[:2] != "__"]
    if isinstance(owner, dict | list | set | deque | np.ndarray | itertools.count | nn.Module):
        return []
    slots = (vars(each).get("__slots__", ()) for each in type(owner).__mro__)
    names = itertools.chain.from_iterable((each,) if isinstance(each, str) else each for each in slots)
    return [name for name in names if name[:2] != "__" and hasattr(owner, name)]


def _find_owners(root: nn.Module) -> list[Any]:
    """Return the classes of a network's modules, the Python modules that define them, and their neighbours."""
    classes = {base for module in root.modules() for base in type(module).__mro__ if not _is_foreign(base.__module__)}
    names = {each.__module__ for each in classes} & sys.modules.keys()
    folders = {os.path.dirname(file) for name in names if "site-packages" not in (file := _file(name))} - {""}
    names |= {name for name in list(sys.modules) if os.path.dirname(_file(name)) in folders}
    ordered = sorted(classes, key=lambda each: (each.__module__, each.__qualname__))
    return [*ordered, *(sys.modules[name] for name in sorted(names))]


def _file(module_name: str) -> str:
    return getattr(sys.modules.get(module_name), "__file__", None) or ""


def _find_cached_functions(packages: Set[str]) -> Iterator[Any]:
    """Yield the cached functions of these packages, and of all Python modules that are not installed ones."""
    for name, module in list(sys.modules.items()):
        is_own = name.partition(".")[0] in packages or "site-packages" not in _file(name)
        if is_own and not _is_foreign(name):
            for value in list(_attributes(module).values()):
                if isinstance(value, type):
                    yield from (each for each in list(vars(value).values()) if type(each) is _CachedFunction)
                elif type(value) is _CachedFunction:
                    yield value


def _registries(module: nn.Module) -> list[Any]:
    return [module._parameters, module._buffers, module._modules]


def _attributes(owner: Any) -> Mapping[str, Any]:
    return getattr(owner, "__dict__", {})


def _is_foreign(name: str) -> bool:
    return name.partition(".")[0] in _FOREIGN_PACKAGES
