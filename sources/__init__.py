"""Sources make the requests of a pipeline: cameras, videos, data sets, any Python program.

Public API, imported on first use, so that `import sources` costs nothing:

* `Offloader`: send requests to a pipeline from Python and await their results.
* `nest_results`: restore the dicts and lists that a network returned.
* `Source`, `Sample`: write a source of your own (`[source] kind = "package.module:Class"`).
* `Dataset`, `Examples`: write a data set of your own, for a pipeline that trains.

Everything else is internal and may change.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sources.client.offloader import Offloader
    from sources.conversion import nest_results
    from sources.datasets.dataset import Dataset, Examples
    from sources.inputs.source import Sample, Source

__all__ = ["Dataset", "Examples", "Offloader", "Sample", "Source", "nest_results"]

_MODULES = {
    "Dataset": "sources.datasets.dataset",
    "Examples": "sources.datasets.dataset",
    "Offloader": "sources.client.offloader",
    "Sample": "sources.inputs.source",
    "Source": "sources.inputs.source",
    "nest_results": "sources.conversion",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
