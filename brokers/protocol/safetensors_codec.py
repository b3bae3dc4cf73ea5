"""Encode and decode named tensors in the safetensors format, without copying them.

The format is that of https://github.com/huggingface/safetensors: the length N of the header (eight bytes, little
endian), N bytes of JSON padded with spaces, then the tensors' bytes, row-major and little endian, without gaps.

We use our own code because the library's `save` copies each tensor twice and its `load` once; `tests.bench.roundtrip`
measures the difference. Weight files on disk are read and written by the library.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from brokers.errors import BadPayload, TooLarge, WireError
from brokers.process.aligned_memory import ALIGNMENT_BYTES, allocate_aligned

if TYPE_CHECKING:
    import torch

# safetensors' name: (bits an element, numpy's name or "", torch's name). float4 holds two elements a byte, in both.
_DTYPES: dict[str, tuple[int, str, str]] = {
    "BOOL": (8, "bool", "bool"),
    "U8": (8, "uint8", "uint8"),
    "I8": (8, "int8", "int8"),
    "F8_E5M2": (8, "", "float8_e5m2"),
    "F8_E4M3": (8, "", "float8_e4m3fn"),
    "F8_E8M0": (8, "", "float8_e8m0fnu"),
    "F8_E4M3FNUZ": (8, "", "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": (8, "", "float8_e5m2fnuz"),
    "F4": (4, "", "float4_e2m1fn_x2"),
    "U16": (16, "uint16", "uint16"),
    "I16": (16, "int16", "int16"),
    "F16": (16, "float16", "float16"),
    "BF16": (16, "", "bfloat16"),
    "U32": (32, "uint32", "uint32"),
    "I32": (32, "int32", "int32"),
    "F32": (32, "float32", "float32"),
    "U64": (64, "uint64", "uint64"),
    "I64": (64, "int64", "int64"),
    "F64": (64, "float64", "float64"),
    "C64": (64, "complex64", "complex64"),
}
_BY_NUMPY = {numpy_name: name for name, (_, numpy_name, _) in _DTYPES.items() if numpy_name}
_BY_TORCH = {torch_name: name for name, (_, _, torch_name) in _DTYPES.items()}

# A header describes some tens of tensors in some kilobytes; a longer one is a mistake or an attack.
HEADER_LIMIT_BYTES = 1 << 20
_DIMENSION_LIMIT = 32
_METADATA = "__metadata__"


@dataclass(frozen=True, slots=True)
class TensorView:
    """A tensor as it travels: the dtype by safetensors' name, the shape, and the bytes, which are not copied.

    Raises `WireError` ("ShapeMismatch", "UnknownDtype") where the bytes do not fit the dtype and the shape.
    """

    dtype: str
    shape: tuple[int, ...]
    data: memoryview

    def __post_init__(self) -> None:
        _check_size("", self.dtype, self.shape, self.data.nbytes)


def _check_size(tensor: str, dtype: str, shape: Sequence[int], actual_bytes: int) -> None:
    if dtype not in _DTYPES:
        raise _unknown_dtype(dtype, tensor)
    bits = _DTYPES[dtype][0] * math.prod(shape)
    if bits != 8 * actual_bytes:
        expected_bytes = -(-bits // 8)  # rounded up
        sizes = f"needs {expected_bytes} bytes, got {actual_bytes}"
        message = f"tensor {tensor!r} of dtype {dtype} and shape {list(shape)} {sizes}"
        raise WireError("ShapeMismatch", message, expected_bytes=expected_bytes, actual_bytes=actual_bytes)


def from_numpy(array: np.ndarray[Any, Any]) -> TensorView:
    """Return a view of `array`: its own memory if it is contiguous and little-endian, otherwise a copy."""
    array = np.asarray(array)
    name = _BY_NUMPY.get(array.dtype.name)
    if name is None:
        raise _unknown_dtype(array.dtype.name)
    flat = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).reshape(-1)
    return TensorView(name, array.shape, flat.view(np.uint8).data)


def to_numpy(tensor: TensorView, *, name: str = "") -> np.ndarray[Any, Any]:
    """Return an array over the same bytes. BF16, which numpy does not have, is converted to float32 without loss."""
    if tensor.dtype == "BF16":
        high_halves = np.frombuffer(tensor.data, dtype="<u2").astype(np.uint32) << 16
        return high_halves.view(np.float32).reshape(tensor.shape)
    numpy_name = _DTYPES[tensor.dtype][1]
    if not numpy_name:
        raise _unknown_dtype(tensor.dtype, name)
    dtype = np.dtype(numpy_name).newbyteorder("<")
    return np.frombuffer(tensor.data, dtype=dtype).reshape(tensor.shape)


def from_torch(tensor: torch.Tensor) -> TensorView:
    """Return a view of `tensor`: its own memory if it is contiguous on the CPU, otherwise a copy."""
    import torch

    name = _BY_TORCH.get(str(tensor.dtype).removeprefix("torch."))
    if name is None:
        raise _unknown_dtype(str(tensor.dtype))
    dense = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    # An element of torch's float4_e2m1fn_x2 holds two values; on the wire the last dimension counts values.
    shape = tuple(dense.shape)
    if name == "F4" and shape:
        shape = (*shape[:-1], shape[-1] * 2)
    raw = dense.reshape(-1).view(torch.uint8) if dense.numel() else torch.empty(0, dtype=torch.uint8)
    return TensorView(name, shape, raw.numpy().data)


def to_torch(tensor: TensorView, *, name: str = "") -> torch.Tensor:
    """Return a torch tensor over the same bytes; a copy if they are read-only or not aligned as torch's own tensors.

    torch has no read-only tensors, and computes other bits on tensors that are aligned less.
    """
    import torch

    dtype: torch.dtype = getattr(torch, _DTYPES[tensor.dtype][2])
    shape = tensor.shape
    if tensor.dtype == "F4" and shape:
        if shape[-1] % 2:
            problem = f"tensor {name!r} of dtype F4 and shape {list(shape)}: torch needs an even last dimension"
            raise BadPayload("application/x-safetensors", problem)
        shape = (*shape[:-1], shape[-1] // 2)
    if not tensor.data.nbytes:
        return torch.empty(shape, dtype=dtype)
    raw = None if tensor.data.readonly else torch.frombuffer(tensor.data, dtype=torch.uint8)
    if raw is None or raw.data_ptr() % ALIGNMENT_BYTES:
        copy = allocate_aligned(tensor.data.nbytes)
        copy[:] = tensor.data
        raw = torch.frombuffer(copy, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def from_array(value: Any) -> TensorView:
    """Return a view of a torch tensor, a numpy array, or Python numbers (by numpy's conversion rules)."""
    if type(value).__module__.partition(".")[0] == "torch":
        return from_torch(value)
    return from_numpy(np.asarray(value))


def pack(tensors: Mapping[str, TensorView], metadata: Mapping[str, str]) -> list[memoryview]:
    """Return a safetensors body as consecutive buffers; the tensors' bytes are not copied.

    Raises `TooLarge` for a header over `HEADER_LIMIT_BYTES`, `WireError` ("BadHeader") for names it cannot hold.
    """
    # Widest elements first, as the library does: every tensor then starts at a multiple of its element size.
    ordered = sorted(tensors.items(), key=lambda item: (-_DTYPES[item[1].dtype][0], item[0]))
    header: dict[str, Any] = {_METADATA: _check_metadata(dict(metadata))} if metadata else {}
    end = 0
    for name, tensor in ordered:
        if name == _METADATA:
            raise _bad_header(f"a tensor cannot be named {_METADATA}")
        begin = end
        end += tensor.data.nbytes
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (begin, end)}
    text = _encode_utf8(json.dumps(header, separators=(",", ":"), ensure_ascii=False))
    text += b" " * (-(8 + len(text)) % ALIGNMENT_BYTES)
    if len(text) > HEADER_LIMIT_BYTES:
        raise TooLarge("the safetensors header", HEADER_LIMIT_BYTES, len(text))
    head = memoryview(len(text).to_bytes(8, "little") + text)
    return [head, *(tensor.data for _, tensor in ordered if tensor.data.nbytes)]


def unpack(body: memoryview) -> tuple[dict[str, TensorView], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors body; the tensors share its memory.

    Raises `WireError` ("Truncated", "TrailingBytes", "BadHeader", "UnknownDtype", "ShapeMismatch") or `TooLarge`.
    """
    if body.nbytes < 8:
        raise _truncated("a safetensors body", 8, body.nbytes)
    header_bytes = int.from_bytes(body[:8], "little")
    if header_bytes > HEADER_LIMIT_BYTES:
        raise TooLarge("the safetensors header", HEADER_LIMIT_BYTES, header_bytes)
    if body.nbytes < 8 + header_bytes:
        raise _truncated("the safetensors header", 8 + header_bytes, body.nbytes)
    header = _parse_header(bytes(body[8 : 8 + header_bytes]))
    metadata = _check_metadata(header.pop(_METADATA, {}))
    data = body[8 + header_bytes :]
    tensors: dict[str, TensorView] = {}
    previous_end = 0
    entries = [(name, *_parse_entry(name, entry)) for name, entry in header.items()]
    for name, dtype, shape, begin, end in sorted(entries, key=lambda entry: (entry[3], entry[4])):
        if begin != previous_end:
            raise _bad_header(f"tensor {name!r} begins at byte {begin}, expected {previous_end}: no gaps, no overlaps")
        _check_size(name, dtype, shape, end - begin)
        if end > data.nbytes:
            raise _truncated(f"tensor {name!r}", end, data.nbytes)
        tensors[name] = TensorView(dtype, shape, data[begin:end])
        previous_end = end
    if previous_end != data.nbytes:
        message = f"the header describes {previous_end} bytes of tensors, {data.nbytes} follow it"
        raise WireError("TrailingBytes", message, expected_bytes=previous_end, actual_bytes=data.nbytes)
    return tensors, metadata


def _parse_header(text: bytes) -> dict[str, Any]:
    has_escapes = b"\\u" in text  # a lone surrogate can only be written as an escape

    def check_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            raise _bad_header("a name occurs twice")
        if has_escapes:
            _encode_utf8("".join(item for pair in pairs for item in pair if isinstance(item, str)))
        return entries

    try:
        header = json.loads(text.decode(), object_pairs_hook=check_object)
    except (ValueError, RecursionError) as error:
        raise _bad_header(f"not JSON in UTF-8: {error}") from None
    if not isinstance(header, dict):
        raise _bad_header(f"expected a JSON object, got {type(header).__name__}")
    return header


def _encode_utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise _bad_header("it contains half a surrogate pair, which is not Unicode text") from None


def _check_metadata(metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(item, str) for pair in metadata.items() for item in pair):
        raise _bad_header(f"{_METADATA} must map strings to strings")
    return metadata


def _parse_entry(name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:

    def is_count(value: Any) -> bool:
        return type(value) is int and 0 <= value < 1 << 63

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _bad_header(f"tensor {name!r} needs exactly dtype, shape and data_offsets")
    dtype = entry["dtype"]
    shape = entry["shape"]
    offsets = entry["data_offsets"]
    if not isinstance(dtype, str):
        raise _unknown_dtype(str(dtype), name)
    if not isinstance(shape, list) or len(shape) > _DIMENSION_LIMIT or not all(map(is_count, shape)):
        raise _bad_header(f"tensor {name!r} needs a shape of at most {_DIMENSION_LIMIT} sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_count, offsets)) or offsets[0] > offsets[1]:
        raise _bad_header(f"tensor {name!r} needs data_offsets of a begin and an end")
    return dtype, tuple(shape), offsets[0], offsets[1]


def _bad_header(problem: str) -> WireError:
    return WireError("BadHeader", f"bad safetensors header: {problem}")


def _truncated(what: str, expected_bytes: int, actual_bytes: int) -> WireError:
    message = f"{what} needs {expected_bytes} bytes, got {actual_bytes}"
    return WireError("Truncated", message, expected_bytes=expected_bytes, actual_bytes=actual_bytes)


def _unknown_dtype(dtype: str, tensor: str = "") -> WireError:
    return WireError("UnknownDtype", f"tensor {tensor!r} has dtype {dtype!r}, which this receiver does not know")
