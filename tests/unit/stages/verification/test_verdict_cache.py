"""The check runs once for a network, its weights, cuts and settings, and does not need a cache that works."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from brokers.errors import UsageError
from stages.loading import part_loader
from stages.loading.part_loader import load_part
from stages.models.registry import get_model_spec
from stages.partition.partition import Part
from stages.verification import inference_check
from tests.support.errors import raises_error

SOURCE = """
import json
from pathlib import Path

from torch import nn
from helper import scale


class Net(nn.Module):
    input_shape = (1, 4)

    def __init__(self, width=4):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, width), nn.Linear(width, width), nn.Linear(width, 2)
        self.options = json.loads(Path(__file__).with_name("options.json").read_text())

    def forward(self, x):
        return self.c(self.b(scale(self.a(x))))
"""


@pytest.fixture(name="checks")
def _checks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of cuts of each check that has run."""
    checks: list[int] = []
    check = inference_check.check_inference

    def record(traced: Any, cuts: Any, *rest: Any, **options: Any) -> Any:
        checks.append(len(cuts))
        return check(traced, cuts, *rest, **options)

    monkeypatch.setattr(part_loader, "check_inference", record)
    return checks


@pytest.fixture(name="folder")
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("cached_net", "helper"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "cached_net.py").write_text(SOURCE)
    (tmp_path / "options.json").write_text('{"mix": false}')
    (tmp_path / "helper.py").write_text("def scale(x):\n    return x * 2\n")
    torch.manual_seed(0)
    save_weights(tmp_path)
    return tmp_path


def save_weights(folder: Path) -> None:
    layers = {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 2)}
    save_file(nn.ModuleDict(layers).state_dict(), folder / "net.safetensors")


def load(folder: Path, cuts: tuple[int, ...] = (1, 2), index: int = 0, *, max_batch: int = 1, **settings: Any) -> Part:
    spec = get_model_spec("cached_net:Net", settings=settings, folder=str(folder))
    weights = None if settings else folder / "net.safetensors"
    return load_part(spec, cuts, index, weights, 0, "cpu", max_batch=max_batch)


def test_check_runs_once_for_all_parts(folder: Path, checks: list[int]) -> None:
    first = load(folder, max_batch=4)
    again = load(folder, max_batch=4)
    assert load(folder, index=2, max_batch=4).batchable
    assert checks == [2]
    assert (first.batchable, first.layouts) == (again.batchable, again.layouts)
    assert first.batchable
    assert first.layouts


def append_line(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text((folder / name).read_text() + "\n# changed\n")


CHANGES: dict[str, tuple[Callable[[Path], Any], dict[str, Any]]] = {
    "source": (append_line("cached_net.py"), {}),
    "source of an imported module": (append_line("helper.py"), {}),
    "file that an attribute is read from": (
        lambda folder: (folder / "options.json").write_text('{"mix": true}'),
        {},
    ),
    "weights": (save_weights, {}),
    "cuts": (lambda folder: None, {"cuts": (1, 3)}),
    "number of cuts": (lambda folder: None, {"cuts": (1,)}),
    "setting": (lambda folder: None, {"width": 5}),
    "batching": (lambda folder: None, {"max_batch": 4}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_check_runs_again_after_a_change(name: str, folder: Path, checks: list[int]) -> None:
    change, options = CHANGES[name]
    load(folder)
    change(folder)
    load(folder, **options)
    load(folder, **options)
    assert len(checks) == 2


def test_check_runs_again_if_the_cache_is_corrupted(folder: Path, checks: list[int], verdict_folder: Path) -> None:
    load(folder)
    (path,) = (verdict_folder / "verdicts").glob("*.json")
    for text in ("", "{", '{"problem": 3}'):
        path.write_text(text)
        load(folder)
    load(folder)
    assert len(checks) == 4


def test_check_runs_each_time_if_the_cache_is_not_writable(
    folder: Path, checks: list[int], verdict_folder: Path
) -> None:
    (verdict_folder / "verdicts").write_text("a file instead of a folder")
    assert load(folder, max_batch=4).batchable
    assert load(folder, max_batch=4).batchable
    assert len(checks) == 2


def test_refusal_is_not_kept(folder: Path, checks: list[int]) -> None:
    code = SOURCE.replace("x))))", "x)))) + (type(x).__name__ == 'Tensor')")
    (folder / "cached_net.py").write_text(code)
    for _ in range(2):
        with raises_error(UsageError, "PartsDiffer", match="other values"):
            load(folder)
    assert len(checks) == 2 * (1 + (torch.get_num_threads() > 1))  # its reason may be outside of the network
