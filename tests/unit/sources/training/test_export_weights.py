"""The weights of a trained pipeline on disk: each part, all joined, and whole or not there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from brokers.protocol.messages import TensorContent
from brokers.protocol.safetensors_codec import from_array
from sources.training.export_weights import MODEL_FILE, write_weights
from stages.partition.partition import partition
from tests.support.environment.full_disk import full_disk
from tests.support.training.training_network import CUTS, SmallNetwork


def body(module: nn.Module) -> TensorContent:
    return TensorContent({name: from_array(tensor.detach()) for name, tensor in module.state_dict().items()})


def parts_of(model: nn.Module) -> dict[str, TensorContent]:
    return {f"part-{index}": body(part) for index, part in enumerate(partition(model, CUTS))}


def test_the_joined_parts_are_the_state_of_the_uncut_network(tmp_path: Path) -> None:
    model = SmallNetwork()
    write_weights(tmp_path, parts_of(model))
    other = SmallNetwork()
    other.load_state_dict(load_file(tmp_path / MODEL_FILE), strict=True)
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_each_part_has_a_file_of_its_own_with_what_is_the_parts_alone(tmp_path: Path) -> None:
    parts = parts_of(SmallNetwork())
    assert write_weights(tmp_path, parts) == {"model": "model.safetensors", "parts": "parts/"}
    names = {stage: set(load_file(tmp_path / "parts" / f"{stage}.safetensors")) for stage in parts}
    assert names == {stage: set(part.tensors) for stage, part in parts.items()}
    assert sum(len(each) for each in names.values()) == len(load_file(tmp_path / MODEL_FILE))


def test_what_was_there_before_is_replaced(tmp_path: Path) -> None:
    write_weights(tmp_path, {"head": TensorContent({"w": from_array(torch.zeros(3))})})
    write_weights(tmp_path, {"head": TensorContent({"w": from_array(torch.ones(3))})})
    assert load_file(tmp_path / MODEL_FILE)["w"].tolist() == [1, 1, 1]


def test_on_a_full_disk_the_old_weights_stay_and_nothing_half_written_is_left(tmp_path: Path) -> None:
    write_weights(tmp_path, {"head": TensorContent({"w": from_array(torch.zeros(10_000))})})
    before = sorted(tmp_path.rglob("*"))
    with full_disk(20_000), pytest.raises(OSError, match="File too large"):
        write_weights(tmp_path, {"head": TensorContent({"w": from_array(torch.ones(10_000))})})
    assert sorted(tmp_path.rglob("*")) == before
    assert not load_file(tmp_path / MODEL_FILE)["w"].any()
