"""The weights of a trained pipeline on disk: each part, and all of them joined."""

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


def to_content(module: nn.Module) -> TensorContent:
    return TensorContent({name: from_array(tensor.detach()) for name, tensor in module.state_dict().items()})


def parts_of(model: nn.Module) -> dict[str, TensorContent]:
    return {f"part-{index}": to_content(part) for index, part in enumerate(partition(model, CUTS))}


def test_joined_parts_are_the_state_of_the_uncut_network(tmp_path: Path) -> None:
    model = SmallNetwork()
    parts = parts_of(model)
    assert write_weights(tmp_path, parts) == {"model": "model.safetensors", "parts": "parts/"}
    other = SmallNetwork()
    other.load_state_dict(load_file(tmp_path / MODEL_FILE), strict=True)
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())
    names = {stage: set(load_file(tmp_path / "parts" / f"{stage}.safetensors")) for stage in parts}
    assert names == {stage: set(part.tensors) for stage, part in parts.items()}


def test_former_weights_are_replaced(tmp_path: Path) -> None:
    write_weights(tmp_path, {"head": TensorContent({"w": from_array(torch.zeros(3))})})
    write_weights(tmp_path, {"head": TensorContent({"w": from_array(torch.ones(3))})})
    assert load_file(tmp_path / MODEL_FILE)["w"].tolist() == [1, 1, 1]


def test_full_disk_leaves_the_former_weights(tmp_path: Path) -> None:
    write_weights(tmp_path, {"head": TensorContent({"w": from_array(torch.zeros(10_000))})})
    before = sorted(tmp_path.rglob("*"))
    with full_disk(20_000), pytest.raises(OSError, match="File too large"):
        write_weights(tmp_path, {"head": TensorContent({"w": from_array(torch.ones(10_000))})})
    assert sorted(tmp_path.rglob("*")) == before
    assert not load_file(tmp_path / MODEL_FILE)["w"].any()
