"""Why a network computes something else than its parts: state that its forward keeps, which tracing cannot see."""

import hashlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stages.partition.partition import tensor_bytes

_WAY_OUT = "move that code into a separate child module, which is then one layer"


def find_cause(model: nn.Module, run: Callable[[], Any]) -> str:
    """Return what a run of the network's own forward does that parts cannot repeat; empty if nothing is found."""
    before = _parameter_digests(model)
    if _sets_seed(model, run):
        return f"its forward sets the seed of torch's random numbers, which tracing does only once: {_WAY_OUT}"
    after = _parameter_digests(model)
    changed = [name for name, digest in before.items() if after.get(name) != digest]
    return f"its forward modifies its parameters, such as {changed[0]!r}: compute with a copy" if changed else ""


def kept_state_problem(model: nn.Module, run: Callable[[], Any], call: str = "request") -> str:
    """Return the refusal of a network that differs from its second `call` on; `run`: its own forward."""
    names = ", ".join(map(repr, find_replaced(model, run)))
    return (
        f"its second {call} differs: its forward keeps state from one call to the next"
        f"{f' in {names}' if names else ''}, which tracing cannot see: modify a buffer in place (`copy_`) instead, or "
        f"{_WAY_OUT}"
    )


def find_replaced(model: nn.Module, run: Callable[[], Any]) -> list[str]:
    """Return the paths of attributes that refer to another tensor after a call of the network."""
    before = _attributes(model)
    replaced: dict[str, None] = {}

    def compare(*_: object) -> None:
        now = _attributes(model).items()
        replaced.update({name: None for name, value in now if isinstance(value, Tensor) and value is not before[name]})

    handle = model.register_forward_hook(compare)
    try:
        run()
    finally:
        handle.remove()
    return list(replaced)


def _attributes(model: nn.Module) -> dict[str, Any]:
    return {
        f"{path}.{name}".removeprefix("."): value
        for path, module in model.named_modules()
        for name, value in {**vars(module), **module._parameters, **module._buffers}.items()
    }


def _parameter_digests(model: nn.Module) -> dict[str, bytes]:
    return {name: hashlib.sha256(tensor_bytes(each)).digest() for name, each in model.named_parameters()}


def _sets_seed(model: nn.Module, run: Callable[[], Any]) -> bool:
    """Whether the forward seeds a generator, also one that it restores afterwards."""
    seeds = 0
    previous = sys.getprofile()

    def profile(frame: object, event: str, argument: Any) -> None:
        nonlocal seeds
        if event == "c_call" and isinstance(getattr(argument, "__self__", None), torch.Generator):
            seeds += argument.__name__ in {"manual_seed", "seed"}

    handles = [
        model.register_forward_pre_hook(lambda *_: sys.setprofile(profile)),
        model.register_forward_hook(lambda *_: sys.setprofile(previous), always_call=True),
    ]
    try:
        run()
    finally:
        sys.setprofile(previous)
        for handle in handles:
            handle.remove()
    return seeds > 0
