"""What import-linter cannot see: that the pure files of the language are light enough for a device without torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.checkout import ROOT, files

MODULES = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files("brokers/*.py")]


@pytest.mark.parametrize("module", [name.removesuffix(".__init__") for name in MODULES])
def test_no_module_of_brokers_imports_torch(module: str) -> None:
    program = f"import sys, {module}; sys.exit('torch' in sys.modules or 'torchvision' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr.decode() or f"{module} imports torch"
