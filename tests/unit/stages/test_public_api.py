"""The public names of `stages`, and the cost of importing them."""

from __future__ import annotations

import subprocess
import sys

import stages
import stages.executor


def test_exported_names_are_the_documented_three() -> None:
    assert stages.__all__ == ["Node", "TaskContext", "TaskExecutor"]
    assert all(getattr(stages, name) is getattr(stages.executor, name) for name in stages.__all__)
    assert not hasattr(stages, "FunctionExecutor")


def test_import_costs_neither_numpy_nor_torch_until_a_name_is_used() -> None:
    program = """
import sys
import stages
print(sorted({"torch", "numpy"} & set(sys.modules)))
stages.TaskExecutor
print("torch" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.split() == ["[]", "False"]
