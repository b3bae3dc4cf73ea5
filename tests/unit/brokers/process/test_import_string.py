"""Importing the user's code by `package.module:name`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from brokers.errors import UsageError
from brokers.process import import_string as import_string_module
from brokers.process.import_string import CannotLoad, describe_exception, import_string


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """The folder of a pipeline file; modules imported from it are forgotten afterwards."""
    path = list(sys.path)
    loaded = set(sys.modules)
    yield tmp_path
    sys.path[:] = path
    for name in set(sys.modules) - loaded:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def test_name_is_found_beside_the_pipeline_file(folder: Path) -> None:
    (folder / "own_stages.py").write_text("class Smooth: pass\n")
    assert import_string("own_stages:Smooth", folder).__name__ == "Smooth"
    assert import_string("pathlib:Path", folder) is Path


@pytest.mark.parametrize("address", ["", "module", ":name", "module:", ".module:name", "package..module:name"])
def test_malformed_address_says_the_expected_form(folder: Path, address: str) -> None:
    with pytest.raises(CannotLoad, match=r"expected package\.module:name"):
        import_string(address, folder)


@pytest.mark.parametrize(
    ("source", "address", "problem"),
    [
        ("", "no_such_module:x", r"No module named 'no_such_module' \(searched in .* and the installed packages\)"),
        ("", "own_broken:x", "module own_broken has no x"),
        ("1 / 0", "own_broken:x", r"importing own_broken raised ZeroDivisionError: .* \(own_broken\.py, line 1\)"),
        ("import no_such_module", "own_broken:x", r"raised ModuleNotFoundError: .* \(own_broken\.py, line 1\)"),
        ("\nx = = 1", "own_broken:x", r"raised SyntaxError: .*line 2"),
        ("raise SystemExit(3)", "own_broken:x", "raised SystemExit: 3"),
    ],
)
def test_failed_import_says_the_reason(folder: Path, source: str, address: str, problem: str) -> None:
    (folder / "own_broken.py").write_text(source)
    with pytest.raises(CannotLoad, match=problem) as caught:
        import_string(address, folder)
    assert "\n" not in str(caught.value)


def test_usage_errors_of_the_module_pass_through(folder: Path) -> None:
    (folder / "own_usage.py").write_text(
        "from brokers.errors import UsageError\nraise UsageError('Mine', 'no camera')\n"
    )
    with pytest.raises(UsageError, match="no camera"):
        import_string("own_usage:x", folder)


def test_exception_elsewhere_is_described_by_its_last_line(folder: Path) -> None:
    with pytest.raises(ValueError) as caught:
        int("x")
    text = describe_exception(caught.value, folder)
    assert text.startswith("ValueError: invalid literal")
    assert "(test_import_string.py, line " in text


def test_place_of_an_exception_is_the_users_code_not_an_installed_package_or_ours(folder: Path) -> None:
    package = folder / ".venv" / "lib" / "site-packages"
    package.mkdir(parents=True)
    (package / "installed.py").write_text("def f():\n    raise ValueError('no')\n")
    (folder / "own_caller.py").write_text("def g(f):\n    f()\n")
    f = import_string("installed:f", package)
    g = import_string("own_caller:g", folder)
    with pytest.raises(ValueError) as caught:
        g(f)
    assert describe_exception(caught.value, folder) == "ValueError: no (own_caller.py, line 2)"
    with pytest.raises(CannotLoad) as refused:
        import_string("", folder)
    own = refused.value.with_traceback(refused.tb.tb_next)
    assert "import_string.py" not in describe_exception(own, Path(import_string_module.__file__).parents[2])
