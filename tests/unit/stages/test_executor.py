"""What an application developer writes: functions and classes, how they are found, and what they are given."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from brokers.errors import BadPayload
from brokers.protocol.messages import JPEG, JSON, BinaryContent, TensorContent
from brokers.protocol.safetensors_codec import from_array
from stages.errors import BadExecutor
from stages.executor import FunctionExecutor, TaskContext, TaskExecutor, load_executor, parse_json_arrays

MODULE = """
import torch
from stages.executor import TaskExecutor

def plain(values, scale=2.0): return {"values": values * scale}
def everything(**tensors): return tensors
def with_torch(values: torch.Tensor): return {"values": torch.relu(values)}
def positional(values, /): return {"values": values}
def starred(*values): return {}
class Mine(TaskExecutor):
    def __init__(self, size=1): self.size = size
class Fussy(TaskExecutor):
    def __init__(self): raise TypeError("no size")
class Other: pass
number = 3
"""


@pytest.fixture(autouse=True)
def _paths(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("mine_to_load", None)


@pytest.fixture(name="folder")
def _folder(tmp_path: Path) -> str:
    (tmp_path / "mine_to_load.py").write_text(MODULE)
    return str(tmp_path)


def context() -> TaskContext:
    return TaskContext(b"r" * 16, "kitchen", 1)


def call(executor: TaskExecutor, **arrays: Any) -> dict[str, Any]:
    content = TensorContent({name: from_array(value) for name, value in arrays.items()})
    given = executor.execute(executor.prepare(content, context()), context())
    assert given is not None
    return given


def test_a_function_beside_the_pipeline_file_is_found(folder: str) -> None:
    executor = load_executor("mine_to_load:plain", {}, folder)
    np.testing.assert_array_equal(call(executor, values=[1.0, 2.0])["values"], [2.0, 4.0])


def test_a_parameter_with_a_default_may_be_given_or_not(folder: str) -> None:
    executor = load_executor("mine_to_load:plain", {}, folder)
    assert call(executor, values=3.0, scale=10.0)["values"] == 30.0
    assert call(executor, values=3.0, other=1.0)["values"] == 6.0  # what it has no parameter for is not passed


def test_a_function_that_takes_everything_is_given_everything(folder: str) -> None:
    assert set(call(load_executor("mine_to_load:everything", {}, folder), a=1.0, b=2.0)) == {"a", "b"}


def test_a_function_annotated_with_torch_is_given_torch(folder: str) -> None:
    executor = load_executor("mine_to_load:with_torch", {}, folder)
    assert executor.framework == "torch"
    given = call(executor, values=np.array([-1.0, 1.0]))
    assert torch.equal(given["values"], torch.tensor([0.0, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("name", ["input", "value"])
def test_a_bare_array_goes_to_the_only_parameter(name: str) -> None:
    def smooth(celsius: Any) -> dict[str, Any]:
        return {"celsius": celsius}

    assert call(FunctionExecutor(smooth), **{name: 21.5})["celsius"] == 21.5


def test_a_named_array_never_goes_to_a_parameter_of_another_name() -> None:
    def alarm(celsius: Any) -> dict[str, Any]:
        raise AssertionError(celsius)

    with pytest.raises(BadPayload, match=r"expected \['celsius'\], \['celsius'\] missing from \['humidity'\]"):
        call(FunctionExecutor(alarm), humidity=80.0)


def test_settings_are_the_arguments_of_a_class(folder: str) -> None:
    mine: Any = load_executor("mine_to_load:Mine", {"size": 5}, folder)
    assert mine.size == 5


@pytest.mark.parametrize(
    ("address", "settings", "problem"),
    [
        ("mine_to_load", {}, "expected package.module:name"),
        ("mine_to_load:", {}, "expected package.module:name"),
        (".mine_to_load:plain", {}, "expected package.module:name"),
        ("mine_to_load..x:plain", {}, "expected package.module:name"),
        (":plain", {}, "expected package.module:name"),
        ("mine_to_load:Fussy", {}, "making it raised TypeError: no size \\(mine_to_load.py, line 13\\)$"),
        ("not_there:plain", {}, "No module named 'not_there' \\(searched in "),
        ("mine_to_load:no", {}, "module mine_to_load has no no"),
        ("mine_to_load:plain", {"size": 1}, "a function takes no settings"),
        ("mine_to_load:Mine", {"length": 1}, "its settings do not fit: .*length"),
        ("mine_to_load:Other", {}, "expected a function or a TaskExecutor, found type"),
        ("mine_to_load:number", {}, "expected a function or a TaskExecutor, found int"),
        ("mine_to_load:positional", {}, "its parameters are given by name"),
        ("mine_to_load:starred", {}, "its parameters are given by name"),
    ],
)
def test_what_cannot_be_an_executor_is_told(folder: str, address: str, settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(BadExecutor, match=f"^executor '{address}': {problem}"):
        load_executor(address, settings, folder)


# What a module does when it is imported, and what is said of it.
BROKEN = {
    "import os\nos.no_such\ndef f(): pass": "raised AttributeError: module 'os' has no attribute 'no_such'.*line 2",
    "import no_such_package": "raised ModuleNotFoundError: No module named 'no_such_package' .*one.py, line 1",
    "from os import no_such": "raised ImportError: cannot import name 'no_such' from 'os'.*one.py, line 1",
    "x = 1\nimport json\njson.loads('?')": "raised JSONDecodeError: .* \\(.*one.py, line 3\\)$",
    "import sys\nsys.exit('no such camera')": "raised SystemExit: no such camera \\(.*one.py, line 2\\)$",
    "def f(:": "raised SyntaxError: .*\\(.*one.py, line 1\\)$",
}


@pytest.mark.parametrize("text", BROKEN)
def test_a_module_that_fails_as_it_is_imported_is_told_with_its_own_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "broken_one.py").write_text(text)
    with pytest.raises(BadExecutor) as caught:
        load_executor("broken_one:f", {}, str(tmp_path))
    said = str(caught.value)
    assert re.match(f"executor 'broken_one:f': importing broken_one {BROKEN[text]}", said), said
    assert "\n" not in said


def test_what_a_function_returns_must_be_a_dict() -> None:
    def forgets(values: Any) -> Any:
        return values

    with pytest.raises(TypeError, match="forgets must return a dict of named arrays, returned ndarray"):
        call(FunctionExecutor(forgets), values=[1.0])


def test_metadata_travels_into_the_task() -> None:
    task = context()
    TaskExecutor().prepare(TensorContent({}, {"camera": "north"}), task)
    assert task.metadata == {"camera": "north"}


def test_readings_are_named_or_bare_numbers_and_lists_of_them() -> None:
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
def test_readings_that_are_no_numbers_are_refused(text: bytes) -> None:
    with pytest.raises(BadPayload, match="expected numbers"):
        parse_json_arrays(BinaryContent(JSON, text))


def test_a_stage_of_numbers_takes_no_picture() -> None:
    with pytest.raises(BadPayload, match="this stage takes numbers"):
        TaskExecutor().prepare(BinaryContent(JPEG, b"\xff\xd8\xff"), context())
