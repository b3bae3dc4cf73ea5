"""Limits of files: length, number in a folder, names of classes, and no name of the machine they were written on."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

from tests.support.environment.checkout import PACKAGES, ROOT, repository_files

FILE_LINES = 400
PRODUCT_FUNCTION_LINES = 50
TEST_FUNCTION_LINES = 60
FOLDER_FILES = 16
# Concatenated, so that this file does not contain them.
MACHINE = ["/work" + "/", "/root" + "/", "/home" + "/", "/tmp" + "/"]
HOSTS = ["pypi" + ".org", "python" + "hosted", "npmjs" + ".org", "deb." + "debian"]
PLACES = re.compile("|".join(re.escape(word) for word in MACHINE + HOSTS))


def product_files() -> list[Path]:
    return [path for name in PACKAGES for path in repository_files(f"{name}/*.py")]


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_no_python_file_has_over_400_lines() -> None:
    lengths = {relative(path): len(path.read_text().splitlines()) for path in repository_files("*.py")}
    assert {name: lines for name, lines in lengths.items() if lines > FILE_LINES} == {}


def test_functions_fit_on_a_screen_and_class_names_are_unique() -> None:
    product = set(product_files())
    too_long: dict[str, int] = {}
    classes: Counter[str] = Counter()
    for path in repository_files("*.py"):
        limit = PRODUCT_FUNCTION_LINES if path in product else TEST_FUNCTION_LINES
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > limit:
                    too_long[f"{relative(path)}:{node.name}"] = lines
            elif isinstance(node, ast.ClassDef) and path in product:
                classes[node.name] += 1
    assert too_long == {}
    assert {name for name, count in classes.items() if count > 1} == set()


def test_no_folder_of_the_product_has_over_16_python_files() -> None:
    files = Counter(relative(path.parent) for path in product_files())
    assert {folder: count for folder, count in files.items() if count > FOLDER_FILES} == {}


def test_no_file_names_this_machine_or_a_registry() -> None:
    places = []
    for path in repository_files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue  # pictures
        lines = enumerate(text.splitlines(), start=1)
        places += [f"{relative(path)}:{number}: {line.strip()}" for number, line in lines if PLACES.search(line)]
    assert places == []
