"""Imports that import-linter and mypy do not see.

No module of brokers imports torch: gateways and brokers run on devices without it. What Dockerfiles, the Makefile and
documents import exists.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.environment.checkout import PACKAGES, ROOT, repository_files

MODULES = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in repository_files("brokers/*.py")]
PROGRAM = """\
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    if {"torch", "torchvision"} & set(sys.modules):
        sys.exit(f"{name} imports torch")
"""


def test_no_module_of_brokers_imports_torch() -> None:
    command = [sys.executable, "-c", PROGRAM, *(name.removesuffix(".__init__") for name in MODULES)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr.decode()


def test_worker_imports_torchvision_only_for_its_networks() -> None:
    """It takes as long as torch itself, at each start of a stage."""
    program = "import sys, stages.worker.model_executor; sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=240, check=False).returncode == 0


MODULE = rf"(?P<module>(?:{'|'.join((*PACKAGES, 'tests'))})(?:\.\w+)*)"
IMPORT = re.compile(rf"\bfrom {MODULE} import (?P<names>\w+(?:, *\w+)*)")
RUN = re.compile(rf"-m {MODULE}(?![\w.])")


def imports_of_other_files() -> Iterator[tuple[str, str, str]]:
    """Yield the file, the module, and the name that it imports from it, if any, of all files but Python's."""
    for path in repository_files():
        if path.suffix == ".py":
            continue
        text = path.read_text(errors="replace")
        name = str(path.relative_to(ROOT))
        yield from ((name, match["module"], each) for match in IMPORT.finditer(text) for each in names(match))
        yield from ((name, match["module"], "") for match in RUN.finditer(text))


def names(match: re.Match[str]) -> list[str]:
    return re.split(", *", match["names"])


def exists(module: str) -> bool:
    path = Path(ROOT, *module.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def test_modules_in_other_files_exist() -> None:
    found = set(imports_of_other_files())
    assert {file for file, _, _ in found} >= {"deploy/Dockerfile", "docs/stages.md", "README.md", ".ci/run"}
    assert [(file, module) for file, module, _ in sorted(found) if not exists(module)] == []


@pytest.mark.parametrize("file", sorted({file for file, _, name in imports_of_other_files() if name}))
def test_names_that_other_files_import_exist(file: str) -> None:
    wanted = {(module, name) for path, module, name in imports_of_other_files() if path == file and name}
    missing = [(module, name) for module, name in sorted(wanted) if not hasattr(importlib.import_module(module), name)]
    assert missing == []
