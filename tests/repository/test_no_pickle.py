"""No pickle: data from a network or a file must not run code."""

from __future__ import annotations

import ast
import re

import pytest

from tests.support.environment.checkout import ROOT, repository_files

PICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
TORCH_PICKLERS = {"load", "save", "load_state_dict_from_url"}
# Only files with one of these words are parsed, because parsing all of them takes seconds.
WORDS = re.compile("|".join([*PICKLERS, "allow_pickle", r"torch\.(\w+\.)*load", r"torch\.save", "from torch"]))
# One measures pickle, the pattern of the paper's own code; the other tests that pickles are refused.
BASELINES = {"tests/bench/roundtrip.py", "tests/unit/stages/loading/test_weights_file.py"}


def find_pickle_uses(source: str) -> list[str]:
    """Imports of picklers and calls of functions that unpickle, as `line N: expression`."""
    uses = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            uses += [f"line {node.lineno}: import {name}" for name in names if name.split(".")[0] in PICKLERS]
        elif isinstance(node, ast.ImportFrom):
            uses += _imported_from(node)
        elif isinstance(node, ast.Call):
            uses += _called(node)
    return uses


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
        module = node.args[0]
        if isinstance(module, ast.Constant) and str(module.value).split(".")[0] in PICKLERS:
            return [f"line {node.lineno}: {function}({module.value!r})"]
    for keyword in node.keywords:
        is_off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
        if keyword.arg == "allow_pickle" and not is_off:
            return [f"line {node.lineno}: {function}(allow_pickle=...)"]
    return []


def test_no_file_uses_pickle() -> None:
    texts = {str(path.relative_to(ROOT)): path.read_text() for path in repository_files("*.py")}
    suspects = [name for name, text in texts.items() if WORDS.search(text) and name not in BASELINES]
    places = {name: find_pickle_uses(texts[name]) for name in suspects}
    assert {name: lines for name, lines in places.items() if lines} == {}


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
def test_every_form_of_pickle_is_found(source: str) -> None:
    assert WORDS.search(source)
    assert len(find_pickle_uses(source)) == 1


def test_json_safetensors_and_plain_numpy_are_not_found() -> None:
    assert (
        find_pickle_uses("import json\njson.load(f)\nnp.load(f, allow_pickle=False)\nsafetensors.torch.load(b)") == []
    )
