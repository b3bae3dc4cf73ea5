"""Writes the weights of a trained pipeline: one file per stage, and one with the names of the uncut network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from brokers.process.files import atomic_path
from brokers.protocol.messages import TensorContent
from brokers.protocol.safetensors_codec import pack

MODEL_FILE = "model.safetensors"
PARTS_FOLDER = "parts"


def write_weights(folder: Path, parts: Mapping[str, TensorContent]) -> dict[str, str]:
    """Write `parts/STAGE.safetensors` for each stage, and `model.safetensors`, atomically; return their names by kind.

    Raises `OSError`.
    """
    (folder / PARTS_FOLDER).mkdir(parents=True, exist_ok=True)
    for stage, part in parts.items():
        _write(folder / PARTS_FOLDER / f"{stage}.safetensors", part)
    tensors = {name: tensor for part in parts.values() for name, tensor in part.tensors.items()}
    _write(folder / MODEL_FILE, TensorContent(tensors))
    return {"model": MODEL_FILE, "parts": f"{PARTS_FOLDER}/"}


def _write(path: Path, part: TensorContent) -> None:
    # Message content has the format of a safetensors file.
    with atomic_path(path) as partial, partial.open("wb") as file:
        for buffer in pack(part.tensors, part.metadata):
            file.write(buffer)
