"""The weights of a pipeline that was trained: each part by itself, and joined, as the uncut network names them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from brokers.protocol.messages import TensorContent
from brokers.protocol.safetensors_codec import pack

MODEL_FILE = "model.safetensors"
PARTS_FOLDER = "parts"


def write_weights(folder: Path, parts: Mapping[str, TensorContent]) -> dict[str, str]:
    """Write `parts/STAGE.safetensors` for each stage, and `model.safetensors`; return what was written, by kind.

    Raises `OSError`; a file is there as a whole or not at all.
    """
    (folder / PARTS_FOLDER).mkdir(parents=True, exist_ok=True)
    for stage, body in parts.items():
        _write(folder / PARTS_FOLDER / f"{stage}.safetensors", body)
    joined = {name: tensor for body in parts.values() for name, tensor in body.tensors.items()}
    _write(folder / MODEL_FILE, TensorContent(joined))
    return {"model": MODEL_FILE, "parts": f"{PARTS_FOLDER}/"}


def _write(path: Path, body: TensorContent) -> None:
    """The bytes of a body are those of a safetensors file."""
    partial = path.with_name(f".{path.name}.part")
    try:
        with partial.open("wb") as file:
            for piece in pack(body.tensors, body.metadata):
                file.write(piece)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
