"""Checkpoints and autograd functions in the code of a network, as they are traced.

An autograd function is one layer, whose backward is its own. A checkpointed function is traced as if it were called
directly: the same results and gradients, while its activations are stored.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch.utils import checkpoint
from torch.utils._pytree import tree_leaves


class FunctionCall:
    """Calls an autograd function; the target of a node."""

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        self._function = function
        self.__name__ = function.__name__

    def __call__(self, *args: Any) -> Any:
        return self._function.apply(*args)

    def __repr__(self) -> str:
        return f"{self._function.__module__}.{self._function.__qualname__}"


@contextmanager
def trace_custom_gradients(tracer: fx.Tracer) -> Iterator[None]:
    """Have autograd functions with traced arguments recorded, and checkpointed functions called."""
    apply = vars(torch.autograd.Function)["apply"]
    around_checkpoint = checkpoint._checkpoint_without_reentrant_generator_impl

    def trace_apply(function: type[torch.autograd.Function], *args: Any, **options: Any) -> Any:
        if not any(issubclass(type(leaf), fx.Proxy) for leaf in tree_leaves(args)):
            return apply.__func__(function, *args, **options)
        if function is checkpoint.CheckpointFunction:
            called, _, *inputs = args
            return called(*inputs)
        return tracer.create_proxy("call_function", FunctionCall(function), args, {})

    def call_directly(*args: Any, **options: Any) -> Iterator[None]:
        yield

    torch.autograd.Function.apply = classmethod(trace_apply)
    checkpoint._checkpoint_without_reentrant_generator_impl = call_directly
    try:
        yield
    finally:
        torch.autograd.Function.apply = apply
        checkpoint._checkpoint_without_reentrant_generator_impl = around_checkpoint
