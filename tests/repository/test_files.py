"""What any file may hold: one noun's worth of lines, and nothing of the machine it was written on."""

from __future__ import annotations

import ast
import re

import pytest

from tests.support.environment.checkout import ROOT, repository_files

LINES = 400
FUNCTION_LINES = 40
# A longer file or function, and the noun that explains it. A name here is `path` or `path:function`.
LONGER: dict[str, str] = {}
# Put together from parts, so that this file does not hold what it looks for.
MACHINE = ["/work" + "/", "/root" + "/", "/home" + "/", "/tmp" + "/"]
HOSTS = ["pypi" + ".org", "python" + "hosted", "npmjs" + ".org", "deb." + "debian"]
PLACES = re.compile("|".join(re.escape(word) for word in MACHINE + HOSTS))


def _code() -> list[str]:
    return [name for path in repository_files("*.py") if not (name := str(path.relative_to(ROOT))).startswith("tests/")]


@pytest.mark.parametrize("name", _code())
def test_a_file_holds_one_noun(name: str) -> None:
    lines = (ROOT / name).read_text().splitlines()
    assert len(lines) <= LINES or name in LONGER, f"{name} has {len(lines)} lines, {LINES} is the budget"


@pytest.mark.parametrize("name", _code())
def test_a_function_fits_on_a_screen(name: str) -> None:
    tree = ast.parse((ROOT / name).read_text())
    long = [
        f"{name}:{node.name} has {(node.end_lineno or node.lineno) - node.lineno + 1} lines"
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or node.lineno) - node.lineno + 1 > FUNCTION_LINES
        and f"{name}:{node.name}" not in LONGER
    ]
    assert long == []


def test_every_exception_from_the_budgets_is_still_needed() -> None:
    gone = [name for name in LONGER if not (ROOT / name.partition(":")[0]).is_file()]
    assert gone == []


def test_no_file_names_this_machine_or_a_registry() -> None:
    found = []
    for path in repository_files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue  # pictures
        for number, line in enumerate(text.splitlines(), start=1):
            if PLACES.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert found == []
