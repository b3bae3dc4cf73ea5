"""What a user wrote and a pipeline file names, `package.module:name`: found, or told in one line why not."""

from __future__ import annotations

import importlib
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from brokers.errors import SparseError, UsageError


@dataclass(eq=False)
class CannotLoad(UsageError):
    """A name that leads to nothing, or a module that fails as it is imported."""

    address: str
    problem: str

    def __str__(self) -> str:
        return f"{self.address!r}: {self.problem}"


def import_string(address: str, folder: str | Path) -> Any:
    """What stands at `package.module:name`; `folder` (the pipeline file's) is searched beside the installed packages.

    Raises `CannotLoad` with what was wrong: the form, the module, what the module did when it was imported, the name.
    """
    module_name, _, name = address.partition(":")
    if not (name and all(module_name.split("."))):
        raise CannotLoad(address, "expected package.module:name")
    folder = str(folder)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except SparseError:
        raise
    except (Exception, SystemExit) as error:  # it is the user's code that runs, and it may raise anything
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            raise CannotLoad(address, f"{error} (searched in {folder} and the installed packages)") from error
        raise CannotLoad(address, f"importing {module_name} raised {describe_exception(error, folder)}") from error
    try:
        return getattr(module, name)
    except AttributeError:
        raise CannotLoad(address, f"module {module_name} has no {name}") from None


def describe_exception(error: BaseException, folder: str | Path) -> str:
    """What the user's code raised, and its last line that had a part in it: `ValueError: no (mine.py, line 3)`."""
    what = f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
    if isinstance(error, SyntaxError):  # it says itself where
        return what if error.lineno is None or "line " in what else f"{what} (line {error.lineno})"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _machinery(frame.filename)]
    root = Path(folder).resolve()
    own = [frame for frame in frames if root in Path(frame.filename).resolve().parents]
    for frame in (own or frames)[-1:]:
        return f"{what} ({Path(frame.filename).name}, line {frame.lineno})"
    return what


def _machinery(filename: str) -> bool:
    """Whether a frame is of the import itself, and not of what is imported."""
    return filename.startswith("<frozen importlib") or filename in (__file__, importlib.__file__)
