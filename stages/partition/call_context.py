"""The modes in which a forward calls its layers, `torch.no_grad` and `torch.autocast`: recorded, and set in parts."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Self

import torch
from torch import fx

CONTEXT_KEY = "context"  # in the meta data of a node: the `CallContext` of its call


@dataclass(frozen=True, slots=True)
class CallContext:
    """Whether gradients are recorded; the dtype of autocast on devices of `device_type`, None where it is off."""

    grad: bool
    autocast: torch.dtype | None
    device_type: str


def current_context(device: torch.device) -> CallContext:
    """Return the modes that are set in this thread, for layers on `device`."""
    is_autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if is_autocast else None
    return CallContext(torch.is_grad_enabled(), dtype, device.type)


class ContextNodes:
    """Adds nodes to the graph of a part that enter and leave the contexts of its layers."""

    def __init__(self, graph: fx.Graph, records_gradients: bool) -> None:
        self._graph = graph
        self._records_gradients = records_gradients
        self._current: CallContext | None = None  # None: that of the caller
        self._entered: fx.Node | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.set(None)

    def set(self, context: CallContext | None) -> None:
        """Have the following nodes computed in a context; that of the whole forward needs no nodes."""
        if context and context.autocast is None and context.grad == self._records_gradients:
            context = None
        if context == self._current:
            return
        if self._entered is not None:
            self._graph.call_function(_leave, (self._entered,))
            self._entered = None
        if context is not None:
            arguments = (context.grad, context.autocast, context.device_type)
            self._entered = self._graph.call_function(_enter, arguments)
        self._current = context


class _Entered(threading.local):
    """The contexts that were entered in this thread and not left."""

    def __init__(self) -> None:
        self.stacks: list[ExitStack] = []


_entered = _Entered()


def _enter(grad: bool, autocast: torch.dtype | None, device_type: str) -> ExitStack:
    stack = ExitStack()
    stack.enter_context(torch.set_grad_enabled(grad))
    if autocast is not None:
        stack.enter_context(torch.autocast(device_type, dtype=autocast))
    _entered.stacks.append(stack)
    return stack


def _leave(stack: ExitStack) -> None:
    _entered.stacks.remove(stack)
    stack.close()


@contextmanager
def leave_contexts() -> Iterator[None]:
    """Leave the contexts that a part has entered, if a layer fails."""
    count = len(_entered.stacks)
    try:
        yield
    finally:
        while len(_entered.stacks) > count:
            _leave(_entered.stacks[-1])
