"""Assertions about the errors of Sparse, and the list of their codes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from types import ModuleType
from typing import TypeVar

import pytest

from brokers.errors import SparseError
from tests.support.environment.checkout import ROOT

Kind = TypeVar("Kind", bound=SparseError)


def raises_error(kind: type[Kind], code: str, *, match: str | None = None) -> pytest.RaisesExc[Kind]:
    """Expect an error of this class and code: `with raises_error(WireError, "BadHeader") as caught`."""
    return pytest.raises(kind, match=match, check=lambda error: error.code == code)


def error_codes(*packages: ModuleType) -> dict[str, bool]:
    """Return the code of each error that the packages raise, and whether it asks the sender to retry.

    Codes are found in the source, in calls such as `WireError("BadChunk", ..., retry=True)`, and among the subclasses
    of `SparseError` that are imported.
    """
    codes = {each.__name__: getattr(each, "retry", False) for each in _subclasses(SparseError)}
    for package in packages:
        for path in (ROOT / package.__name__).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_bytes())):
                match node:
                    case ast.Call(func=ast.Name(id=name), args=[ast.Constant(value=str(code)), *_], keywords=keywords):
                        if name in ("SparseError", "WireError", "UsageError", "RequestError"):
                            retry = [each.value for each in keywords if each.arg == "retry"]
                            codes[code] = bool(retry) and ast.literal_eval(retry[0])
    return codes


def _subclasses(kind: type[SparseError]) -> Iterator[type[SparseError]]:
    for each in kind.__subclasses__():
        yield each
        yield from _subclasses(each)
