"""matplotlib with its own defaults, so that the plots of a run do not depend on the settings of the user."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_BACKEND_VARIABLE = "MPLBACKEND"


def import_matplotlib() -> None:
    """Import matplotlib without the backend that the environment names: an unknown name makes the import fail.

    Raises `ImportError` where it is not installed.
    """
    backend = os.environ.pop(_BACKEND_VARIABLE, None)
    try:
        import matplotlib  # noqa: F401 - figures are drawn by Agg, which needs no display
    finally:
        if backend is not None:
            os.environ[_BACKEND_VARIABLE] = backend


@contextmanager
def default_style(*styles: Path | dict[Any, Any]) -> Iterator[None]:
    """Within the block, matplotlib's settings are its defaults and `styles`, not those of a `matplotlibrc`."""
    import_matplotlib()
    from matplotlib import style

    with style.context(["default", *styles]):
        yield
