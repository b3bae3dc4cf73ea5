"""Results as JSON, for any MQTT client: what was found, in which picture, and where the time went."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from brokers.errors import BadPayload
from brokers.protocol.messages import SAFETENSORS, BinaryContent, Content, TensorContent
from brokers.protocol.safetensors_codec import TensorView, to_numpy
from brokers.protocol.stage_timing import Hop

# Larger tensors than this are described, not spelled out: JSON is for what a person or a rule engine reads.
_SPELLED_VALUES = 4096
_DIGITS = 4
# What numpy can hold, or float32 in its place, and JSON can say.
_IN_JSON = frozenset(["BOOL", "U8", "I8", "U16", "I16", "F16", "BF16", "U32", "I32", "F32", "U64", "I64", "F64"])


def content_to_dict(content: Content) -> dict[str, Any]:
    """The findings of a result: `objects`, `classes`, or named `values`, by the `format` in its metadata.

    Raises `BadPayload` for metadata, which may be anybody's, that the tensors do not bear out.
    """
    if isinstance(content, BinaryContent):
        return {"content_type": content.content_type, "bytes": content.nbytes}
    try:
        return _describe(content)
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        problem = f"its metadata does not fit its tensors: {type(error).__name__}: {error}"
        raise BadPayload(SAFETENSORS, problem) from None


def encode_json(result: Mapping[str, Any]) -> bytes:
    return json.dumps(result, separators=(", ", ": "), allow_nan=False).encode()


def _describe(content: TensorContent) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if picture := content.metadata.get("picture"):
        width, _, height = picture.partition("x")
        found["picture"] = {"width": int(width), "height": int(height)}
    match content.metadata.get("format"):
        case "detections":
            found["objects"] = _objects(content)
        case "classes":
            found["classes"] = _classes(content)
        case _:
            found["values"] = {name: _spell(tensor) for name, tensor in content.tensors.items()}
    return found


def timing_to_dict(hops: Sequence[Hop], total_ms: float | None = None) -> dict[str, Any]:
    """Each stage's durations; and where the round trip of `total_ms` is known, the network's, which is what is left."""
    stages = [
        {
            "stage": hop.stage,
            "worker": hop.worker,
            **{key: round(getattr(hop, key), 3) for key in ("queue_ms", "decode_ms", "compute_ms", "encode_ms")},
        }
        for hop in hops
    ]
    if total_ms is None:
        return {"stages": stages}
    network_ms = max(0.0, total_ms - sum(hop.total_ms for hop in hops))
    return {"stages": stages, "network_ms": round(network_ms, 3)}


def _objects(body: TensorContent) -> list[dict[str, Any]]:
    boxes = to_numpy(body.tensors["boxes"]).tolist()  # (N, 4)
    return [
        {**found, "box": [_rounded(side, 1) for side in box]} for found, box in zip(_classes(body), boxes, strict=True)
    ]


def _classes(body: TensorContent) -> list[dict[str, Any]]:
    labels = json.loads(body.metadata["labels"])
    scores = to_numpy(body.tensors["scores"]).tolist()  # (N,)
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise TypeError("labels must be a JSON list of texts")
    return [{"label": label, "score": _rounded(score, _DIGITS)} for label, score in zip(labels, scores, strict=True)]


def _rounded(value: float, digits: int) -> float | None:
    return round(value, digits) if math.isfinite(value) else None


def _spell(tensor: TensorView) -> Any:
    if math.prod(tensor.shape) > _SPELLED_VALUES or tensor.dtype not in _IN_JSON:
        return {"dtype": tensor.dtype, "shape": list(tensor.shape)}
    values = to_numpy(tensor)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        # RFC 8259 section 6: JSON has neither NaN nor infinity, and many a reader stops at them.
        spelled = values.astype(object)
        spelled[~np.isfinite(values)] = None
        return spelled.tolist()
    return values.tolist()
