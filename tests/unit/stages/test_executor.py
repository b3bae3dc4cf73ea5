"""Stages of an application: how functions and classes are loaded, and which arrays they receive."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from brokers.errors import BadPayload, UsageError
from brokers.protocol.messages import JPEG, JSON, BinaryContent, TensorContent
from brokers.protocol.safetensors_codec import from_array
from stages.executor import FunctionExecutor, TaskContext, TaskExecutor, load_executor, parse_json_arrays

MODULE = """
import torch
from stages import TaskExecutor

def scale(values, factor=2.0): return {"values": values * factor}
def accept_all(**tensors): return tensors
def with_torch(values: torch.Tensor): return {"values": torch.relu(values)}
def positional(values, /): return {"values": values}
def starred(*values): return {}
class Sized(TaskExecutor):
    def __init__(self, size=1): self.size = size
class Failing(TaskExecutor):
    def __init__(self): raise TypeError("no size")
class Unrelated: pass
number = 3
"""


@pytest.fixture(autouse=True)
def _restore_imports(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("app_stages", None)


@pytest.fixture(name="folder")
def _folder(tmp_path: Path) -> str:
    (tmp_path / "app_stages.py").write_text(MODULE)
    return str(tmp_path)


def context() -> TaskContext:
    return TaskContext(b"r" * 16, "kitchen", 1)


def call(executor: TaskExecutor, **arrays: Any) -> dict[str, Any]:
    content = TensorContent({name: from_array(value) for name, value in arrays.items()})
    outputs = executor.execute(executor.prepare(content, context()), context())
    assert outputs is not None
    return outputs


def test_function_is_loaded_from_the_folder(folder: str) -> None:
    executor = load_executor("app_stages:scale", {}, folder)
    np.testing.assert_array_equal(call(executor, values=[1.0, 2.0])["values"], [2.0, 4.0])


def test_parameter_with_default_is_optional(folder: str) -> None:
    executor = load_executor("app_stages:scale", {}, folder)
    assert call(executor, values=3.0, factor=10.0)["values"] == 30.0
    assert call(executor, values=3.0, other=1.0)["values"] == 6.0  # arrays without a parameter are not passed


def test_function_with_var_keyword_receives_all_arrays(folder: str) -> None:
    assert set(call(load_executor("app_stages:accept_all", {}, folder), a=1.0, b=2.0)) == {"a", "b"}


def test_function_annotated_with_torch_receives_torch_tensors(folder: str) -> None:
    executor = load_executor("app_stages:with_torch", {}, folder)
    assert executor.framework == "torch"
    outputs = call(executor, values=np.array([-1.0, 1.0]))
    assert torch.equal(outputs["values"], torch.tensor([0.0, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("name", ["input", "value"])
def test_unnamed_array_is_passed_to_the_only_parameter(name: str) -> None:
    def smooth(celsius: Any) -> dict[str, Any]:
        return {"celsius": celsius}

    assert call(FunctionExecutor(smooth), **{name: 21.5})["celsius"] == 21.5


def test_named_array_is_not_passed_to_another_parameter() -> None:
    def alarm(celsius: Any) -> dict[str, Any]:
        raise AssertionError(celsius)

    with pytest.raises(BadPayload, match=r"expected \['celsius'\], \['celsius'\] missing from \['humidity'\]"):
        call(FunctionExecutor(alarm), humidity=80.0)


def test_settings_are_constructor_arguments(folder: str) -> None:
    executor: Any = load_executor("app_stages:Sized", {"size": 5}, folder)
    assert executor.size == 5


@pytest.mark.parametrize(
    ("address", "settings", "problem"),
    [
        ("app_stages", {}, "expected package.module:name"),
        ("app_stages:Failing", {}, "its constructor raised TypeError: no size \\(app_stages.py, line 13\\)$"),
        ("not_there:scale", {}, "No module named 'not_there' \\(searched in "),
        ("app_stages:missing", {}, ".*app_stages has no .*missing"),
        ("app_stages:scale", {"size": 1}, "a function has no settings"),
        ("app_stages:Sized", {"length": 1}, "its settings do not match its constructor: .*length"),
        ("app_stages:Unrelated", {}, "expected a function or a TaskExecutor, found type"),
        ("app_stages:number", {}, "expected a function or a TaskExecutor, found int"),
        ("app_stages:positional", {}, "arguments are passed by name"),
        ("app_stages:starred", {}, "arguments are passed by name"),
    ],
)
def test_bad_executor_names_its_problem(folder: str, address: str, settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError, match=f"^executor '{address}': {problem}") as caught:
        load_executor(address, settings, folder)
    assert (caught.value.code, caught.value.key) == ("BadExecutor", "stage.executor")


def test_failing_import_names_the_users_line(tmp_path: Path) -> None:
    (tmp_path / "app_stages.py").write_text("x = 1\nimport json\njson.loads('?')")
    with pytest.raises(UsageError) as caught:
        load_executor("app_stages:f", {}, str(tmp_path))
    assert re.search(r"raised JSONDecodeError: .* \(app_stages.py, line 3\)$", str(caught.value))


def test_function_that_returns_no_dict_raises_type_error() -> None:
    def forgetful(values: Any) -> Any:
        return values

    with pytest.raises(TypeError, match="forgetful must return a dict of named arrays, returned ndarray"):
        call(FunctionExecutor(forgetful), values=[1.0])


def test_prepare_copies_metadata_to_the_task() -> None:
    task = context()
    TaskExecutor().prepare(TensorContent({}, {"camera": "north"}), task)
    assert task.metadata == {"camera": "north"}


def test_json_numbers_become_float64_arrays() -> None:
    named = parse_json_arrays(BinaryContent(JSON, b'{"celsius": 21.5, "levels": [[1, 2], [3, 4]], "on": true}'))
    assert {name: (array.dtype.name, array.shape) for name, array in named.items()} == {
        "celsius": ("float64", ()),
        "levels": ("float64", (2, 2)),
        "on": ("float64", ()),
    }
    assert parse_json_arrays(BinaryContent(JSON, b"21.5"))["value"] == 21.5
    assert parse_json_arrays(BinaryContent(JSON, b" [1, 2]"))["value"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    "text",
    [
        *(b"", b"{", b"{}", b'"warm"', b'{"celsius": "warm"}', b'{"celsius": {"in": 1}}', b"[[1], [1, 2]]"),
        *(b"null", b'{"celsius": null}', b'{"celsius": NaN}', b"[1, 1e999]", b"[" * 100_000, b"\xff"),
    ],
)
def test_json_without_finite_numbers_raises_bad_payload(text: bytes) -> None:
    with pytest.raises(BadPayload, match="expected numbers"):
        parse_json_arrays(BinaryContent(JSON, text))


def test_default_prepare_refuses_pictures() -> None:
    with pytest.raises(BadPayload, match="only tensors and JSON numbers"):
        TaskExecutor().prepare(BinaryContent(JPEG, b"\xff\xd8\xff"), context())
