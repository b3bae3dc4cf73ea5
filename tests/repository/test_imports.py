"""What import-linter cannot see: that the pure files of the language are light enough for a device without torch."""

from __future__ import annotations

import subprocess
import sys

from tests.support.environment.checkout import ROOT, repository_files

MODULES = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in repository_files("brokers/*.py")]
# One process for all, since a start takes longer than an import: each module finds none of the others imported.
PROGRAM = """\
import importlib, sys
for name in sys.argv[1:]:
    for other in [other for other in sys.modules if other.partition(".")[0] == "brokers"]:
        del sys.modules[other]
    importlib.import_module(name)
    if {"torch", "torchvision"} & set(sys.modules):
        sys.exit(f"{name} imports torch")
"""


def test_no_module_of_brokers_imports_torch() -> None:
    names = [name.removesuffix(".__init__") for name in MODULES]
    command = [sys.executable, "-c", PROGRAM, *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr.decode()
