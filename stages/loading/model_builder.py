"""A network as its factory builds it: complete, or without memory for its parameters."""

import functools
import gc
import random
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from stages.models.registry import ModelSpec
from stages.partition.traced_value import META_DEVICE

P = ParamSpec("P")
T = TypeVar("T")

# One build, trace or check at a time: the random generators, the hooks of torch.nn and the functions that are replaced
# while tracing belong to the process.
_LOAD_LOCK = threading.RLock()
_NUMPY_SEED_LIMIT = 2**32
# Methods by which a constructor turns the values of a tensor into Python's numbers or numpy's arrays.
_READING_METHODS: frozenset[Callable[..., Any]] = frozenset(
    getattr(Tensor, name)
    for name in ("item", "tolist", "numpy", "__array__", "__float__", "__int__", "__bool__", "__index__")
)


def one_at_a_time(load: Callable[P, T]) -> Callable[P, T]:
    """Have a function wait while another thread builds, traces or checks a network."""

    @functools.wraps(load)
    def locked(*args: P.args, **kwargs: P.kwargs) -> T:
        with _LOAD_LOCK:
            return load(*args, **kwargs)

    return locked


def build_from_seed(spec: ModelSpec, seed: int) -> nn.Module:
    """Build the network with the generators of torch, numpy and Python seeded; those of the caller do not change."""
    with _seeded(seed):
        return spec.build()


def build_without_parameters(spec: ModelSpec, seed: int) -> nn.Module:
    """Build the network with its parameters on the meta device: they have neither memory nor initial values.

    Buffers and all other values are those of `build_from_seed`, except persistent buffers that are random, which a
    weights file has. Where that cannot be guaranteed, the result of `build_from_seed` is returned:

    * the constructor fails with meta parameters, as it reads their values;
    * a tensor that no weights file has depends on a parameter, or shares its memory;
    * the constructor draws random numbers, and has tensors that no weights file has, or has read values of tensors
      after that: they may be random, and initialising the parameters would have drawn numbers before them;
    * the constructor draws random numbers from Python or numpy.

    Subclasses of `nn.Parameter`, such as those of lazy modules, are left as they are.
    """
    with _seeded(seed):
        model = _build_on_meta(spec)
    return build_from_seed(spec, seed) if model is None else model


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with _LOAD_LOCK, torch.random.fork_rng(devices=[]):  # built on the CPU: the generators of GPUs are not used
        python_state, numpy_state = random.getstate(), np.random.get_state()
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed % _NUMPY_SEED_LIMIT)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def _build_on_meta(spec: ModelSpec) -> nn.Module | None:
    """Return the network with meta parameters; None if its other values could differ from those of a complete build."""
    thread = threading.get_ident()
    storages: set[StorageWeakRef] = set()  # of the parameters before they were moved

    def move_registered(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        if threading.get_ident() == thread:  # torch calls the hook for the modules of all threads
            _move_to_meta(parameter, storages)

    start, other_start = torch.default_generator.get_state(), _other_random_states()
    reads = _RandomReads(start)
    hook = register_module_parameter_registration_hook(move_registered)
    try:
        with reads, warnings.catch_warnings():
            # Of a factory that loads a state dict: the weights file replaces these parameters.
            warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")
            model = spec.build()
        for parameter in model.parameters():  # those that were written to `_parameters` without a registration
            _move_to_meta(parameter, storages)
        unsaved = list(_unsaved_values(model))
        tensors = [value for value in unsaved if isinstance(value, Tensor)]
        depends_on_parameters = any(map(_is_meta, unsaved)) or any(_storage(tensor) in storages for tensor in tensors)
    except Exception:  # noqa: BLE001 - a mistake of the factory is raised again by the complete build
        return None
    finally:
        hook.remove()
    drawn = not torch.equal(start, torch.default_generator.get_state())
    may_be_random = (drawn and (tensors or reads.found)) or other_start != _other_random_states()
    return None if depends_on_parameters or may_be_random else model


def _move_to_meta(parameter: nn.Parameter, storages: set[StorageWeakRef]) -> None:
    """Make this object a meta parameter, so that all modules that share it continue to do so."""
    if type(parameter) is not nn.Parameter or parameter.is_meta:
        return
    storages.add(_storage(parameter))
    moved = nn.Parameter(torch.empty_like(parameter, device=META_DEVICE), parameter.requires_grad)
    moved.__dict__.update(parameter.__dict__)
    torch.utils.swap_tensors(parameter, moved)  # type: ignore[no-untyped-call]


class _RandomReads(TorchFunctionMode):
    """Finds out whether the values of a tensor are read after torch's generator has left its state `start`."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.found = False
        self._start = start

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in _READING_METHODS and not torch.equal(self._start, torch.default_generator.get_state()):
            self.found = True
        return function(*args, **(kwargs or {}))


def _other_random_states() -> tuple[object, ...]:
    name, keys, *position = np.random.get_state(legacy=True)
    return random.getstate(), name, np.asarray(keys).tobytes(), position


def _unsaved_values(model: nn.Module) -> Iterator[Tensor | torch.device]:
    """Yield the tensors and devices to which a network refers at any depth, without the tensors of its state dict.

    Buffers on the meta device are among the results, as they were computed from parameters.
    """
    state = [value for value in model.state_dict(keep_vars=True).values() if isinstance(value, Tensor)]
    saved = {id(tensor) for tensor in state if isinstance(tensor, nn.Parameter) or not tensor.is_meta}
    seen: set[int] = set()
    remaining: list[Any] = [model]
    while remaining:
        value = remaining.pop()
        if id(value) in seen or id(value) in saved:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor | torch.device):
            yield value
        elif isinstance(value, FunctionType):  # not its globals
            remaining += value.__closure__ or ()
        elif not isinstance(value, type | ModuleType):
            remaining += gc.get_referents(value)


def _is_meta(value: Tensor | torch.device) -> bool:
    return (value.device if isinstance(value, Tensor) else value).type == "meta"


def _storage(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
