"""Stages of a pipeline: parts of a cut network, or functions and classes of an application, each served by workers.

The public API is what an application's own stages use:

* `TaskExecutor`: base class of a stage, with `start`, `prepare`, `execute`, `finish` and `stop`;
* `Node`: the worker, as its executor sees it;
* `TaskContext`: the request being processed.

They are imported on first use, so that `import stages` costs nothing. All other modules are internal and may change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stages.executor import Node, TaskContext, TaskExecutor

__all__ = ["Node", "TaskContext", "TaskExecutor"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from stages import executor

    return getattr(executor, name)
