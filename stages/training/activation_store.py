"""The forwards that wait for their gradient: by request id, so many at most, and each is taken out once."""

from __future__ import annotations

from typing import Generic, TypeVar

from brokers.protocol.training import MICRO_BATCH_LIMIT
from stages.training.errors import TooManyForwards, UnknownForward

T = TypeVar("T")


class ActivationStore(Generic[T]):
    """A bounded store of what a backward needs."""

    def __init__(self, limit: int = MICRO_BATCH_LIMIT) -> None:
        self._limit = limit
        self._items: dict[bytes, T] = {}

    def __len__(self) -> int:
        return len(self._items)

    def put(self, request: bytes, item: T) -> None:
        """Keep one; raises `TooManyForwards`."""
        if len(self._items) >= self._limit:
            raise TooManyForwards(self._limit)
        self._items[request] = item

    def pop(self, request: bytes) -> T:
        """Take one out; raises `UnknownForward` for one that was never here, or is no longer."""
        try:
            return self._items.pop(request)
        except KeyError:
            raise UnknownForward(request.hex()) from None

    def clear(self) -> None:
        """Let go of all: their step has been given up."""
        self._items.clear()
