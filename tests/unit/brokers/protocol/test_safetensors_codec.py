"""Tensors are packed as the safetensors library does it, and unpacked without loss and without copies."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from brokers.errors import BadPayload, TooLarge, WireError
from brokers.process.aligned_memory import allocate_aligned
from brokers.protocol import safetensors_codec as codec
from brokers.protocol.safetensors_codec import (
    HEADER_LIMIT_BYTES,
    TensorView,
    from_numpy,
    from_torch,
    pack,
    to_numpy,
    to_torch,
    unpack,
)
from tests.support.errors import raises_error
from tests.unit.brokers.protocol.strategies import METADATA, NAMES, tensor_views

library: Any = safetensors  # it publishes half of its types

NUMPY = ["bool", "u1", "i1", "u2", "i2", "f2", "u4", "i4", "f4", "u8", "i8", "f8", "c8"]
TORCH = [getattr(torch, name) for _, _, name in codec._DTYPES.values()]


def joined(tensors: dict[str, TensorView], metadata: dict[str, str] | None = None) -> bytes:
    return b"".join(pack(tensors, metadata or {}))


# Inverse ------------------------------------------------------------------------------------------------------------


@given(st.dictionaries(NAMES, tensor_views(), max_size=5), METADATA)
@example({"größe ☃ \U0001f600": from_numpy(np.ones((), np.float32))}, {"ключ": 'значение\n\x00\t"\\'})
def test_unpack_is_the_inverse_of_pack(tensors: dict[str, TensorView], metadata: dict[str, str]) -> None:
    assert unpack(memoryview(joined(tensors, metadata))) == (tensors, metadata)


@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (2, 3)], ids=str)
def test_numpy_arrays_survive_a_round_trip(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(1).integers(0, 2, shape).astype(dtype)
    back = to_numpy(from_numpy(array))
    assert back.dtype == array.dtype
    assert back.shape == shape
    assert back.tobytes() == array.tobytes()


@pytest.mark.parametrize("dtype", TORCH, ids=str)
@pytest.mark.parametrize("shape", [(0,), (3, 0, 2), (2, 3), ()], ids=str)
def test_torch_tensors_of_every_dtype_survive_a_round_trip(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    raw = torch.arange(math.prod(shape) * dtype.itemsize, dtype=torch.uint8)
    value = raw.view(dtype).reshape(shape) if raw.numel() else torch.empty(shape, dtype=dtype)
    if dtype is torch.float4_e2m1fn_x2 and not shape:
        with raises_error(
            WireError, "ShapeMismatch"
        ):  # one torch element holds two values, and a scalar has no dimension to count them
            from_torch(value)
        return
    back = to_torch(unpack(memoryview(joined({"x": from_torch(value)})))[0]["x"])
    assert (back.dtype, back.shape) == (value.dtype, value.shape)
    assert back.reshape(-1).view(torch.uint8).tolist() == value.reshape(-1).view(torch.uint8).tolist()


def test_bytes_are_shared_in_both_directions() -> None:
    array = np.zeros((4, 4), np.float32)
    piece = pack({"x": from_numpy(array)}, {})[1]
    array[1, 1] = 7
    assert np.frombuffer(piece, np.float32)[5] == 7
    body = joined({"x": from_numpy(array)})
    buffer = allocate_aligned(len(body))
    buffer[:] = body
    view = unpack(buffer)[0]["x"]
    as_torch = to_torch(view)
    as_numpy = to_numpy(view)
    buffer[-4:] = np.float32(9).tobytes()
    assert as_torch[3, 3] == 9
    assert as_numpy[3, 3] == 9


def test_strided_and_big_endian_data_is_copied() -> None:
    array = np.arange(6, dtype=">f4").reshape(2, 3).T
    assert to_numpy(from_numpy(array)).tolist() == array.tolist()
    value = torch.arange(6.0).reshape(2, 3).T.requires_grad_()
    assert to_torch(from_torch(value)).tolist() == value.tolist()
    conjugate = torch.view_as_complex(torch.arange(4.0).reshape(2, 2)).conj()
    assert to_torch(from_torch(conjugate)).tolist() == conjugate.tolist()


def test_numpy_reads_bfloat16_as_float32() -> None:
    value = torch.tensor([1.5, -0.0, 3e38, float("inf")], dtype=torch.bfloat16)
    assert to_numpy(from_torch(value)).tolist() == value.tolist()


@pytest.mark.parametrize("offset", [0, 1, 4, 8, 16, 32])
def test_tensors_of_torch_are_aligned_as_its_own(offset: int) -> None:
    buffer = allocate_aligned(offset + 24)
    buffer[offset:] = np.arange(3, dtype=np.float64).tobytes()
    for data in (buffer[offset:], memoryview(bytes(buffer))[offset:]):
        tensor = to_torch(TensorView("F64", (3,), data))
        assert tensor.tolist() == [0, 1, 2]
        assert tensor.data_ptr() % 64 == 0
        tensor += 1  # crashes the process if it lies in memory that belongs to a bytes object


@pytest.mark.parametrize("names", [["x"], ["x", "longer"], [f"tensor {index}" for index in range(9)]])
def test_tensors_of_a_body_begin_at_a_multiple_of_64_bytes(names: list[str]) -> None:
    head, *_ = pack({name: from_numpy(np.zeros(16, np.float32)) for name in names}, {"key": "value"})
    assert head.nbytes % 64 == 0


@pytest.mark.parametrize(
    "value", [np.array(["a"]), np.array([object()]), np.zeros(2, complex)], ids=["str", "object", "c16"]
)
def test_unsupported_dtype_is_refused_by_the_sender(value: np.ndarray[Any, Any]) -> None:
    with raises_error(WireError, "UnknownDtype", match=value.dtype.name):
        from_numpy(value)
    with raises_error(WireError, "UnknownDtype", match="complex128"):
        from_torch(torch.zeros(2, dtype=torch.complex128))


def test_numpy_refuses_dtypes_it_does_not_have() -> None:
    with raises_error(WireError, "UnknownDtype", match=r"'x'.*F8_E4M3"):
        to_numpy(TensorView("F8_E4M3", (2,), memoryview(b"..")), name="x")


def test_torch_refuses_odd_rows_of_float4() -> None:
    with pytest.raises(BadPayload, match=r"'x'.*F4.*\[2, 3\].*even"):
        to_torch(TensorView("F4", (2, 3), memoryview(b"123")), name="x")


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"__metadata__": from_numpy(np.zeros(1))}, {}),
        ({"\ud800": from_numpy(np.zeros(1))}, {}),
        ({"x": from_numpy(np.zeros(1))}, {"k": "\udfff"}),
        ({"x": from_numpy(np.zeros(1))}, {"k": 5}),
        ({"x": from_numpy(np.zeros(1))}, {5: "v"}),
    ],
    ids=["reserved", "half a pair", "half a pair in metadata", "number", "number as key"],
)
def test_invalid_names_are_not_packed(tensors: dict[str, TensorView], metadata: Any) -> None:
    with raises_error(WireError, "BadHeader"):
        pack(tensors, metadata)


def test_header_over_the_limit_is_refused_by_the_sender() -> None:
    with pytest.raises(TooLarge) as caught:
        pack({"x": from_numpy(np.zeros(1))}, {"k": "v" * HEADER_LIMIT_BYTES})
    assert caught.value.fields["limit_bytes"] == HEADER_LIMIT_BYTES < caught.value.fields["actual_bytes"]


# Agreement with the library -----------------------------------------------------------------------------------------


@given(st.dictionaries(NAMES, tensor_views(), max_size=5), METADATA)
def test_library_reads_our_bodies(tensors: dict[str, TensorView], metadata: dict[str, str]) -> None:
    read = dict(library.deserialize(joined(tensors, metadata)))
    assert {name: (item["dtype"], tuple(item["shape"]), bytes(item["data"])) for name, item in read.items()} == {
        name: (tensor.dtype, tensor.shape, bytes(tensor.data)) for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("dtype", TORCH, ids=str)
def test_we_read_the_bodies_of_the_library(dtype: torch.dtype) -> None:
    values = {
        "x": torch.arange(4 * dtype.itemsize, dtype=torch.uint8).view(dtype).reshape(2, 2),
        "ünï": torch.ones(3),
        "none": torch.empty(0, 2),
    }
    theirs = safetensors.torch.save(values, {"kéy": "välue\n"})
    read, metadata = unpack(memoryview(theirs))
    assert metadata == {"kéy": "välue\n"}
    for name, value in values.items():
        raw = to_torch(read[name]).reshape(-1).view(torch.uint8)
        assert raw.tolist() == value.reshape(-1).view(torch.uint8).tolist(), name
        assert read[name] == from_torch(value)
    ours = joined({name: from_torch(value) for name, value in values.items()}, {"kéy": "välue\n"})
    assert 0 <= len(ours) - len(theirs) < 64  # the library orders tensors of one width differently, and pads less


def test_dtypes_are_those_of_the_library() -> None:
    header = b'{"x":{"dtype":"?","shape":[8],"data_offsets":[0,8]}}'
    with pytest.raises(safetensors.SafetensorError) as caught:
        library.deserialize(len(header).to_bytes(8, "little") + header)
    known = set(
        str(caught.value).partition("expected one of ")[2].partition(" at line")[0].replace("`", "").split(", ")
    )
    assert known - set(codec._DTYPES) == {"F6_E2M3", "F6_E3M2"}  # torch has neither
    assert set(codec._DTYPES) <= known
