"""No module of brokers imports torch: gateways and brokers run on devices without it. import-linter cannot show it."""

from __future__ import annotations

import subprocess
import sys

from tests.support.environment.checkout import ROOT, repository_files

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
