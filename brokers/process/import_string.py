"""Import the user's code that a pipeline file names as `package.module:name`."""

import importlib
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from brokers.errors import SparseError, UsageError

# Of the user's mistakes no line of ours is the place.
_ROOT = Path(__file__).parents[2]
_OWN_PACKAGES = tuple(f"{_ROOT / name}{os.sep}" for name in ("brokers", "monitor", "sources", "stages"))


class CannotLoad(UsageError):
    """`address` cannot be imported; `problem` says why."""

    def __init__(self, address: str, problem: str) -> None:
        super().__init__("CannotLoad", f"{address!r}: {problem}", address=address)
        self.problem = problem


def import_string(address: str, folder: str | Path) -> Any:
    """Return the object at `package.module:name`; `folder`, that of the pipeline file, is added to `sys.path`.

    Raises `CannotLoad`: a malformed address, no such module, an exception while importing it, no such name.
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
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            raise CannotLoad(address, f"{error} (searched in {folder} and the installed packages)") from error
        raise CannotLoad(address, f"importing {module_name} raised {describe_exception(error, folder)}") from error
    try:
        return getattr(module, name)
    except AttributeError:
        raise CannotLoad(address, f"module {module_name} has no {name}") from None


def describe_exception(error: BaseException, folder: str | Path) -> str:
    """Return the exception of the user's code with its last line below `folder`: `ValueError: no (mine.py, line 3)`."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
    if isinstance(error, SyntaxError):  # which has its own line number
        return text if error.lineno is None or "line " in text else f"{text} (line {error.lineno})"
    machinery = ("<frozen importlib", importlib.__file__, *_OWN_PACKAGES)
    frames = [each for each in traceback.extract_tb(error.__traceback__) if not each.filename.startswith(machinery)]
    root = Path(folder).resolve()
    paths = {frame.filename: Path(frame.filename).resolve() for frame in frames}
    user_frames = [
        frame
        for frame in frames
        if root in (path := paths[frame.filename]).parents and "site-packages" not in path.relative_to(root).parts
    ]
    for frame in (user_frames or frames)[-1:]:
        return f"{text} ({Path(frame.filename).name}, line {frame.lineno})"
    return text
