"""Tensors as bytes: the safetensors format, read and written without a copy, for numpy and torch alike.

The format is that of https://github.com/huggingface/safetensors: eight bytes with the length N of the header (little
endian), N bytes of JSON padded with spaces, then the tensors' bytes, one after the other with no holes, row-major,
little endian. We write it ourselves, because the library's `save` copies every tensor twice and its `load` once; files
on disk are the library's business. Everything a sender can get wrong is a `WireError`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from brokers.errors import BadHeader, BadPayload, ShapeMismatch, TooLarge, TrailingBytes, Truncated, UnknownDtype

if TYPE_CHECKING:
    import numpy as np
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

# A header describes some tens of tensors in some kilobytes; more than this is a mistake or an attack.
HEADER_LIMIT_BYTES = 1 << 20
_METADATA = "__metadata__"
_ALIGNMENT_BYTES = 8


@dataclass(frozen=True, slots=True)
class TensorView:
    """A dtype (safetensors' name), a shape and the bytes: what the wire knows of a tensor."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview

    def __post_init__(self) -> None:
        expected = tensor_nbytes(self.dtype, self.shape)
        if self.data.nbytes != expected:
            raise ShapeMismatch("", self.dtype, self.shape, expected, self.data.nbytes)


def tensor_nbytes(dtype: str, shape: Sequence[int], *, tensor: str = "") -> int:
    """The bytes that a tensor of this dtype and shape has; `tensor` names it in the error."""
    if dtype not in _DTYPES:
        raise UnknownDtype(tensor, dtype)
    bits = _DTYPES[dtype][0] * math.prod(shape)
    if bits % 8:
        raise ShapeMismatch(tensor, dtype, tuple(shape), -(-bits // 8), bits // 8)
    return bits // 8


# numpy and torch ----------------------------------------------------------------------------------------------------


def from_numpy(array: np.ndarray[Any, Any]) -> TensorView:
    """The bytes of `array`, shared where it is contiguous and little-endian, copied where it is not."""
    import numpy as np

    array = np.asarray(array)
    name = _BY_NUMPY.get(array.dtype.name)
    if name is None:
        raise UnknownDtype("", array.dtype.name)
    shape = array.shape
    flat = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).reshape(-1)
    return TensorView(name, shape, flat.view(np.uint8).data)


def to_numpy(tensor: TensorView, *, name: str = "") -> np.ndarray[Any, Any]:
    """An array over the same bytes. BF16, which numpy has not, comes back as float32, exactly."""
    import numpy as np

    if tensor.dtype == "BF16":
        high_halves = np.frombuffer(tensor.data, dtype="<u2").astype(np.uint32) << 16
        return high_halves.view(np.float32).reshape(tensor.shape)
    numpy_name = _DTYPES[tensor.dtype][1]
    if not numpy_name:
        raise UnknownDtype(name, tensor.dtype)
    dtype = np.dtype(numpy_name).newbyteorder("<")
    return np.frombuffer(tensor.data, dtype=dtype).reshape(tensor.shape)


def from_torch(value: torch.Tensor) -> TensorView:
    """The bytes of a torch tensor, shared where it is contiguous on the CPU, copied where it is not."""
    import torch

    name = _BY_TORCH.get(str(value.dtype).removeprefix("torch."))
    if name is None:
        raise UnknownDtype("", str(value.dtype))
    dense = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
    # float4_e2m1fn_x2 is one torch element of two values: on the wire its last dimension counts values.
    shape = tuple(dense.shape)
    if name == "F4" and shape:
        shape = (*shape[:-1], shape[-1] * 2)
    raw = dense.reshape(-1).view(torch.uint8) if dense.numel() else torch.empty(0, dtype=torch.uint8)
    return TensorView(name, shape, raw.numpy().data)


def to_torch(tensor: TensorView, *, name: str = "") -> torch.Tensor:
    """A torch tensor over the same bytes; a copy if they are read-only, which no torch tensor is, or not aligned."""
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
    data = bytearray(tensor.data) if tensor.data.readonly else tensor.data
    raw = torch.frombuffer(data, dtype=torch.uint8)
    if raw.data_ptr() % dtype.itemsize:  # a foreign header need not be padded, and kernels may count on alignment
        raw = raw.clone()
    return raw.view(dtype).reshape(shape)


def from_array(value: Any) -> TensorView:
    """`from_torch` or `from_numpy`, by what `value` is; Python numbers and lists by numpy's rules."""
    if type(value).__module__.partition(".")[0] == "torch":
        return from_torch(value)
    import numpy as np

    return from_numpy(np.asarray(value))


# The safetensors body -----------------------------------------------------------------------------------------------


def pack(tensors: Mapping[str, TensorView], metadata: Mapping[str, str]) -> list[memoryview]:
    """A safetensors body as pieces to be sent one after the other; the tensors' bytes are not copied."""
    # Widest elements first, as the library does: every tensor then starts at a multiple of its element size.
    order = sorted(tensors.items(), key=lambda item: (-_DTYPES[item[1].dtype][0], item[0]))
    header: dict[str, Any] = {_METADATA: _read_metadata(dict(metadata))} if metadata else {}
    end = 0
    for name, tensor in order:
        if name == _METADATA:
            raise BadHeader(f"a tensor cannot be named {_METADATA}")
        begin, end = end, end + tensor.data.nbytes
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (begin, end)}
    text = _utf8(json.dumps(header, separators=(",", ":"), ensure_ascii=False))
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)
    if len(text) > HEADER_LIMIT_BYTES:
        raise TooLarge("the safetensors header", HEADER_LIMIT_BYTES, len(text))
    head = memoryview(len(text).to_bytes(8, "little") + text)
    return [head, *(tensor.data for _, tensor in order if tensor.data.nbytes)]


def unpack(body: memoryview) -> tuple[dict[str, TensorView], dict[str, str]]:
    """The tensors and the metadata of a safetensors body; the tensors share its memory."""
    if body.nbytes < 8:
        raise Truncated("a safetensors body", 8, body.nbytes)
    header_bytes = int.from_bytes(body[:8], "little")
    if header_bytes > HEADER_LIMIT_BYTES:
        raise TooLarge("the safetensors header", HEADER_LIMIT_BYTES, header_bytes)
    if body.nbytes < 8 + header_bytes:
        raise Truncated("the safetensors header", 8 + header_bytes, body.nbytes)
    header = _read_header(bytes(body[8 : 8 + header_bytes]))
    metadata = _read_metadata(header.pop(_METADATA, {}))
    data = body[8 + header_bytes :]
    tensors: dict[str, TensorView] = {}
    end = 0
    entries = [(name, *_read_entry(name, entry)) for name, entry in header.items()]
    for name, dtype, shape, begin, stop in sorted(entries, key=lambda entry: (entry[3], entry[4])):
        if begin != end:
            raise BadHeader(f"tensor {name!r} begins at byte {begin}, expected {end}: no holes, no overlaps")
        expected = tensor_nbytes(dtype, shape, tensor=name)
        if stop - begin != expected:
            raise ShapeMismatch(name, dtype, shape, expected, stop - begin)
        if stop > data.nbytes:
            raise Truncated(f"tensor {name!r}", stop, data.nbytes)
        tensors[name] = TensorView(dtype, shape, data[begin:stop])
        end = stop
    if end != data.nbytes:
        raise TrailingBytes(end, data.nbytes)
    return tensors, metadata


def _read_header(text: bytes) -> dict[str, Any]:
    has_escapes = b"\\u" in text  # half a surrogate pair can only come as an escape

    def checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = dict(pairs)
        if len(names) != len(pairs):
            raise BadHeader("a name stands in it twice")
        if has_escapes:
            _utf8("".join(item for pair in pairs for item in pair if isinstance(item, str)))
        return names

    try:
        header = json.loads(text.decode(), object_pairs_hook=checked)
    except (ValueError, RecursionError) as error:
        raise BadHeader(f"not JSON in UTF-8: {error}") from None
    if not isinstance(header, dict):
        raise BadHeader(f"expected a JSON object, got {type(header).__name__}")
    return header


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise BadHeader("half a surrogate pair stands in it, which is no Unicode text") from None


def _read_metadata(metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(item, str) for pair in metadata.items() for item in pair):
        raise BadHeader(f"{_METADATA} must map strings to strings")
    return metadata


def _read_entry(name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    def is_count(value: Any) -> bool:
        return type(value) is int and 0 <= value < 1 << 63

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise BadHeader(f"tensor {name!r} needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise UnknownDtype(name, str(dtype))
    if not isinstance(shape, list) or len(shape) > 32 or not all(map(is_count, shape)):
        raise BadHeader(f"tensor {name!r} has a shape that is not a list of at most 32 sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_count, offsets)) or offsets[0] > offsets[1]:
        raise BadHeader(f"tensor {name!r} has data_offsets that are not a begin and an end")
    return dtype, tuple(shape), offsets[0], offsets[1]
