"""The public API of `sources`."""

from __future__ import annotations

import subprocess
import sys

import pytest

import sources


def test_exported_names_are_these() -> None:
    assert sources.__all__ == ["Dataset", "Examples", "Offloader", "Sample", "Source", "nest_results"]
    for name in sources.__all__:
        exported = getattr(sources, name)
        assert exported.__name__ == name
        assert exported.__doc__


def test_unknown_name_raises_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'sources' has no attribute 'Sauce'"):
        sources.Sauce  # noqa: B018


def test_import_of_the_package_imports_no_library() -> None:
    script = "import sys, sources; print(*(name for name in sys.modules if '.' not in name))"
    output = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert not {"torch", "numpy", "av", "PIL", "pydantic"} & set(output.split())
