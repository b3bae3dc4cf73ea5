"""Conversion between a Python user's values and message content: arrays, dicts of arrays, bytes of a picture."""

import re
from collections.abc import Mapping
from typing import Any

from brokers.errors import BadPayload, SparseError
from brokers.protocol import safetensors_codec as codec
from brokers.protocol.messages import BinaryContent, Content, TensorContent, detect_content_type
from brokers.protocol.result_json import content_to_dict

_PATH_STEP = re.compile(r"[^.\[\]]+")  # of "hidden[0].scores": hidden, 0, scores


def to_content(value: Any) -> Content:
    """Encode picture bytes, a dict of arrays, or one array, which is named `input`. Raises `BadPayload`."""
    if isinstance(value, BinaryContent | TensorContent):
        return value
    if isinstance(value, bytes | bytearray | memoryview):
        data = memoryview(value)
        return BinaryContent(detect_content_type("", data), data)
    arrays = value if isinstance(value, Mapping) else {"input": value}
    try:
        return TensorContent({str(name): codec.from_array(array) for name, array in arrays.items()})
    except (SparseError, ValueError, TypeError) as error:
        problem = f"expected arrays, a dict of arrays, or picture bytes: {error}"
        raise BadPayload(type(value).__name__, problem) from None


def from_content_like(value: Any, content: Content) -> Any:
    """Decode `content` to arrays of the library of `value`; to a dict of plain values where `value` is bytes."""
    if isinstance(content, BinaryContent) or isinstance(value, bytes | bytearray | memoryview):
        return content_to_dict(content)
    first = next(iter(value.values()), None) if isinstance(value, Mapping) else value
    is_torch = type(first).__module__.partition(".")[0] == "torch"
    convert = codec.to_torch if is_torch else codec.to_numpy
    arrays = {name: convert(tensor) for name, tensor in content.tensors.items()}
    if len(arrays) == 1 and not isinstance(value, Mapping):
        return next(iter(arrays.values()))
    return arrays


def nest_results(arrays: Mapping[str, Any]) -> Any:
    """Return results as the network returned them: `hidden[0]` and `boxes.scores` in dicts and lists.

    Tuples become lists, dataclasses become dicts, numbers remain arrays without dimensions; None is absent.
    """
    if set(arrays) == {"output"}:
        return arrays["output"]
    root: dict[str, Any] = {}
    for name, array in arrays.items():
        *path, last = _PATH_STEP.findall(name) or [name]
        items = root
        for step in path:
            items = items.setdefault(step, {})
            if not isinstance(items, dict):  # a key of the network's result has a dot: its names are not paths
                return dict(arrays)
        items[last] = array
    return _restore_lists(root)


def _restore_lists(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    indices = [str(index) for index in range(len(value))]
    if value.keys() == set(indices):  # in the order of the message, which is another one
        return [_restore_lists(value[index]) for index in indices]
    return {key: _restore_lists(item) for key, item in value.items()}
