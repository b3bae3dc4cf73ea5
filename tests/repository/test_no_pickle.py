"""No pickle: nothing that comes from a network or a file may run code."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.support.environment.checkout import ROOT, repository_files

PICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
TORCH_PICKLERS = {"load", "save", "load_state_dict_from_url"}
# Where pickle is the thing measured: the pattern of the paper's own code, which Sparse is compared with.
BASELINES = {"tests/bench/roundtrip.py"}


def picklings(source: str) -> list[str]:
    """Each place where the source imports a pickler or calls a function that unpickles, as `line N: what`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            found += [f"line {node.lineno}: import {name}" for name in names if name.split(".")[0] in PICKLERS]
        elif isinstance(node, ast.ImportFrom):
            found += _imported_from(node)
        elif isinstance(node, ast.Call):
            found += _called(node)
    return found


def _imported_from(node: ast.ImportFrom) -> list[str]:
    module = node.module or ""
    if module.split(".")[0] in PICKLERS:
        return [f"line {node.lineno}: from {module} import ..."]
    names = [alias.name for alias in node.names if module.split(".")[0] == "torch" and alias.name in TORCH_PICKLERS]
    return [f"line {node.lineno}: from {module} import {name}" for name in names]


def _called(node: ast.Call) -> list[str]:
    function = ast.unparse(node.func)
    owner, _, name = function.rpartition(".")
    if owner.split(".")[0] == "torch" and name in TORCH_PICKLERS:
        return [f"line {node.lineno}: {function}"]
    if function in ("__import__", "import_module", "importlib.import_module") and node.args:
        named = node.args[0]
        if isinstance(named, ast.Constant) and str(named.value).split(".")[0] in PICKLERS:
            return [f"line {node.lineno}: {function}({named.value!r})"]
    for keyword in node.keywords:
        off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
        if keyword.arg == "allow_pickle" and not off:
            return [f"line {node.lineno}: {function}(allow_pickle=...)"]
    return []


@pytest.mark.parametrize("path", repository_files("*.py"), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_pickles(path: Path) -> None:
    if str(path.relative_to(ROOT)) not in BASELINES:
        assert picklings(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import os, pickle as p",
        "def f():\n    from pickle import loads",
        "from multiprocessing import x; import marshal",
        "import cloudpickle.sub",
        "torch.load(f)",
        "torch.save(x, f)",
        "torch.hub.load('repo', 'model')",
        "from torch import load",
        "numpy.load(f, allow_pickle=True)",
        "np.load(f, allow_pickle=flag)",
        "importlib.import_module('pickle')",
        "__import__('dill')",
    ],
)
def test_the_search_sees_every_way_in(source: str) -> None:
    assert len(picklings(source)) == 1


def test_the_search_lets_the_rest_be() -> None:
    assert picklings("import json\njson.load(f)\nnp.load(f, allow_pickle=False)\nsafetensors.torch.load(b)") == []
