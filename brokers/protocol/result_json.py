"""Results as JSON objects for any MQTT client: detections, classes or values, and the time spent at each stage."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from brokers.errors import BadPayload
from brokers.protocol.messages import SAFETENSORS, BinaryContent, Content, TensorContent
from brokers.protocol.safetensors_codec import TensorView, to_numpy
from brokers.protocol.stage_timing import Hop

_VALUES_LIMIT = 4096  # of a larger tensor only dtype and shape are given: JSON is for users and rule engines
_SCORE_DIGITS = 4
_BOX_DIGITS = 1
# The dtypes that numpy (BF16 as float32) and JSON can represent.
_JSON_DTYPES = frozenset(["BOOL", "U8", "I8", "U16", "I16", "F16", "BF16", "U32", "I32", "F32", "U64", "I64", "F64"])


def content_to_dict(content: Content) -> dict[str, Any]:
    """Return `objects`, `classes` or named `values`, by the `format` in the metadata of a result.

    Raises `BadPayload` where the metadata, which any stage may set, does not fit the tensors.
    """
    if isinstance(content, BinaryContent):
        return {"content_type": content.content_type, "bytes": content.nbytes}
    try:
        return _tensors_to_dict(content)
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        problem = f"its metadata does not fit its tensors: {type(error).__name__}: {error}"
        raise BadPayload(SAFETENSORS, problem) from None


def timing_to_dict(hops: Sequence[Hop], total_ms: float | None = None) -> dict[str, Any]:
    """Return the durations of each stage and, where the round trip took `total_ms`, the rest of it as `network_ms`."""
    stages: list[dict[str, Any]] = []
    for hop in hops:
        durations = {name: round(value, 3) for name, value in hop.durations().items()}
        stages.append({"stage": hop.stage, "worker": hop.worker, **durations})
    if total_ms is None:
        return {"stages": stages}
    network_ms = max(0.0, total_ms - sum(hop.total_ms for hop in hops))
    return {"stages": stages, "network_ms": round(network_ms, 3)}


def encode_json(result: Mapping[str, Any]) -> bytes:
    """Encode a result. Raises `ValueError` for NaN and infinity, which JSON does not have."""
    return json.dumps(result, allow_nan=False).encode()


def _tensors_to_dict(content: TensorContent) -> dict[str, Any]:
    result: dict[str, Any] = {}
    if picture := content.metadata.get("picture"):
        width, _, height = picture.partition("x")
        result["picture"] = {"width": int(width), "height": int(height)}
    match content.metadata.get("format"):
        case "detections":
            boxes = to_numpy(content.tensors["boxes"]).tolist()  # (N, 4): left, top, width, height
            result["objects"] = [
                {**label, "box": [_round(side, _BOX_DIGITS) for side in box]}
                for label, box in zip(_labels(content), boxes, strict=True)
            ]
        case "classes":
            result["classes"] = _labels(content)
        case _:
            result["values"] = {name: _values(tensor) for name, tensor in content.tensors.items()}
    return result


def _labels(content: TensorContent) -> list[dict[str, Any]]:
    """Return the label and score of each of the N detections or classes."""
    labels = json.loads(content.metadata["labels"])
    scores = to_numpy(content.tensors["scores"]).tolist()  # (N,)
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise TypeError("labels must be a JSON list of texts")
    return [
        {"label": label, "score": _round(score, _SCORE_DIGITS)} for label, score in zip(labels, scores, strict=True)
    ]


def _round(value: float, digits: int) -> float | None:
    return round(value, digits) if math.isfinite(value) else None


def _values(tensor: TensorView) -> Any:
    if math.prod(tensor.shape) > _VALUES_LIMIT or tensor.dtype not in _JSON_DTYPES:
        return {"dtype": tensor.dtype, "shape": list(tensor.shape)}
    values = to_numpy(tensor)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        # JSON has neither NaN nor infinity (RFC 8259 section 6), and many parsers reject them: null instead.
        finite = np.isfinite(values)
        values = values.astype(object)
        values[~finite] = None
    return values.tolist()
