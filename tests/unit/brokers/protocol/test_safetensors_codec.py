"""Tensors to safetensors bytes and back: inverse, agreed with the real library, not surprised by hostile bytes."""

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

library: Any = safetensors  # it publishes half of its types

NUMPY = ["bool", "u1", "i1", "u2", "i2", "f2", "u4", "i4", "f4", "u8", "i8", "f8", "c8"]
TORCH = [getattr(torch, name) for _, _, name in codec._DTYPES.values()]
NAMES = st.text(max_size=12).filter(lambda name: name != "__metadata__" and name.isprintable())
METADATA = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8), st.text(max_size=20), max_size=4
)


@st.composite
def tensor_views(draw: st.DrawFn) -> TensorView:
    dtype = draw(st.sampled_from(sorted(codec._DTYPES)))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    if dtype == "F4":
        shape = (*shape, 2)
    size = codec.tensor_nbytes(dtype, shape)
    return TensorView(dtype, shape, memoryview(draw(st.binary(min_size=size, max_size=size))))


def joined(tensors: dict[str, TensorView], metadata: dict[str, str] | None = None) -> bytes:
    return b"".join(pack(tensors, metadata or {}))


# Inverse ------------------------------------------------------------------------------------------------------------


@given(st.dictionaries(NAMES, tensor_views(), max_size=5), METADATA)
@example({"größe ☃ \U0001f600": from_numpy(np.ones((), np.float32))}, {"ключ": 'значение\n\x00\t"\\'})
def test_what_is_packed_is_unpacked_again(tensors: dict[str, TensorView], metadata: dict[str, str]) -> None:
    found, told = unpack(memoryview(joined(tensors, metadata)))
    assert (found, told) == (tensors, metadata)


@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (2, 3)], ids=str)
def test_numpy_arrays_come_back_as_they_were(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(1).integers(0, 2, shape).astype(dtype)
    back = to_numpy(from_numpy(array))
    assert back.dtype == array.dtype
    assert back.shape == shape
    assert back.tobytes() == array.tobytes()


@pytest.mark.parametrize("dtype", TORCH, ids=str)
@pytest.mark.parametrize("shape", [(0,), (3, 0, 2), (2, 3), ()], ids=str)
def test_torch_tensors_of_every_dtype_come_back_as_they_were(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    raw = torch.arange(math.prod(shape) * dtype.itemsize, dtype=torch.uint8)
    value = raw.view(dtype).reshape(shape) if raw.numel() else torch.empty(shape, dtype=dtype)
    if dtype is torch.float4_e2m1fn_x2 and not shape:
        with raises_error(WireError, "ShapeMismatch"):  # one torch element is two values, and no dimension could say so
            from_torch(value)
        return
    back = to_torch(unpack(memoryview(joined({"x": from_torch(value)})))[0]["x"])
    assert (back.dtype, back.shape) == (value.dtype, value.shape)
    assert back.reshape(-1).view(torch.uint8).tolist() == value.reshape(-1).view(torch.uint8).tolist()


def test_bytes_are_shared_not_copied_in_both_directions() -> None:
    array = np.zeros((4, 4), np.float32)
    piece = pack({"x": from_numpy(array)}, {})[1]
    array[1, 1] = 7
    assert np.frombuffer(piece, np.float32)[5] == 7
    buffer = bytearray(joined({"x": from_numpy(array)}))
    found = unpack(memoryview(buffer))[0]["x"]
    as_torch, as_numpy = to_torch(found), to_numpy(found)
    buffer[-4:] = np.float32(9).tobytes()
    assert as_torch[3, 3] == 9
    assert as_numpy[3, 3] == 9


def test_what_is_not_dense_and_little_endian_is_made_so() -> None:
    array = np.arange(6, dtype=">f4").reshape(2, 3).T
    assert to_numpy(from_numpy(array)).tolist() == array.tolist()
    value = torch.arange(6.0).reshape(2, 3).T.requires_grad_()
    assert to_torch(from_torch(value)).tolist() == value.tolist()
    twisted = torch.view_as_complex(torch.arange(4.0).reshape(2, 2)).conj()
    assert to_torch(from_torch(twisted)).tolist() == twisted.tolist()


def test_bfloat16_is_read_by_numpy_as_the_same_numbers() -> None:
    value = torch.tensor([1.5, -0.0, 3e38, float("inf")], dtype=torch.bfloat16)
    assert to_numpy(from_torch(value)).tolist() == value.tolist()


def test_read_only_and_unaligned_bytes_become_torch_tensors_of_their_own() -> None:
    whole = bytearray(b"." + np.arange(3, dtype=np.float64).tobytes())
    for data in (memoryview(whole)[1:], memoryview(bytes(whole))[1:]):
        found = to_torch(TensorView("F64", (3,), data))
        assert found.tolist() == [0, 1, 2]
        assert found.data_ptr() % 8 == 0
        found += 1  # crashes the process if it lies in memory that belongs to a bytes object


@pytest.mark.parametrize(
    "value", [np.array(["a"]), np.array([object()]), np.zeros(2, complex)], ids=["str", "object", "c16"]
)
def test_what_safetensors_cannot_hold_is_refused_where_it_is_sent(value: np.ndarray[Any, Any]) -> None:
    with raises_error(WireError, "UnknownDtype", match=value.dtype.name):
        from_numpy(value)
    with raises_error(WireError, "UnknownDtype", match="complex128"):
        from_torch(torch.zeros(2, dtype=torch.complex128))


def test_numpy_refuses_what_it_cannot_hold_by_name() -> None:
    with raises_error(WireError, "UnknownDtype", match=r"'x'.*F8_E4M3"):
        to_numpy(TensorView("F8_E4M3", (2,), memoryview(b"..")), name="x")


def test_odd_rows_of_float4_are_refused_by_torch_in_one_line() -> None:
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
def test_what_no_receiver_would_take_is_not_packed(tensors: dict[str, TensorView], metadata: Any) -> None:
    with raises_error(WireError, "BadHeader"):
        pack(tensors, metadata)


def test_a_header_over_the_limit_is_refused_before_it_is_sent_with_both_numbers() -> None:
    with pytest.raises(TooLarge) as caught:
        pack({"x": from_numpy(np.zeros(1))}, {"k": "v" * HEADER_LIMIT_BYTES})
    assert caught.value.fields["limit_bytes"] == HEADER_LIMIT_BYTES < caught.value.fields["actual_bytes"]


# Agreement with the library -----------------------------------------------------------------------------------------


@given(st.dictionaries(NAMES, tensor_views(), max_size=5), METADATA)
def test_the_library_reads_what_we_write(tensors: dict[str, TensorView], metadata: dict[str, str]) -> None:
    found = dict(library.deserialize(joined(tensors, metadata)))
    assert {name: (item["dtype"], tuple(item["shape"]), bytes(item["data"])) for name, item in found.items()} == {
        name: (tensor.dtype, tensor.shape, bytes(tensor.data)) for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("dtype", TORCH, ids=str)
def test_we_read_what_the_library_writes_and_write_the_same_tensors(dtype: torch.dtype) -> None:
    values = {
        "x": torch.arange(4 * dtype.itemsize, dtype=torch.uint8).view(dtype).reshape(2, 2),
        "ünï": torch.ones(3),
        "none": torch.empty(0, 2),
    }
    theirs = safetensors.torch.save(values, {"kéy": "välue\n"})
    found, metadata = unpack(memoryview(theirs))
    assert metadata == {"kéy": "välue\n"}
    for name, value in values.items():
        raw = to_torch(found[name]).reshape(-1).view(torch.uint8)
        assert raw.tolist() == value.reshape(-1).view(torch.uint8).tolist(), name
        assert found[name] == from_torch(value)
    ours = joined({name: from_torch(value) for name, value in values.items()}, {"kéy": "välue\n"})
    assert len(ours) == len(theirs)  # among tensors of one width it has an order of its own


def test_the_library_and_we_know_the_same_dtypes_but_six_bits() -> None:
    header = b'{"x":{"dtype":"?","shape":[8],"data_offsets":[0,8]}}'
    with pytest.raises(safetensors.SafetensorError) as caught:
        library.deserialize(len(header).to_bytes(8, "little") + header)
    known = set(
        str(caught.value).partition("expected one of ")[2].partition(" at line")[0].replace("`", "").split(", ")
    )
    assert known - set(codec._DTYPES) == {"F6_E2M3", "F6_E3M2"}  # torch has none
    assert set(codec._DTYPES) <= known
