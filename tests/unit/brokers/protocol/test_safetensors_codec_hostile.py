"""Malformed safetensors bodies: each raises a `WireError` with a short message, and no memory is allocated for it."""

from __future__ import annotations

import contextlib
import json
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brokers.errors import WireError
from brokers.protocol.safetensors_codec import from_numpy, pack, unpack
from tests.support.errors import raises_error


def body(header: Any, data: bytes = b"", *, length: int | None = None) -> memoryview:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return memoryview((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def entry(dtype: str = "U8", shape: Any = (2,), offsets: Any = (0, 2)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


GOOD = b"".join(
    pack({"a": from_numpy(np.arange(3, dtype=np.int16)), "b": from_numpy(np.ones((), np.float32))}, {"k": "v"})
)


def test_body_truncated_at_any_byte_raises_wire_error() -> None:
    for length in range(len(GOOD)):
        with pytest.raises(WireError):
            unpack(memoryview(GOOD)[:length])


def test_size_errors_have_expected_and_actual_bytes() -> None:
    with raises_error(WireError, "Truncated") as short:
        unpack(memoryview(GOOD)[:-1])
    assert short.value.fields["expected_bytes"] == short.value.fields["actual_bytes"] + 1
    with raises_error(WireError, "Truncated", match="needs 8 bytes, got 7"):
        unpack(memoryview(GOOD)[:7])
    with raises_error(WireError, "ShapeMismatch", match=r"'a' of dtype U8 and shape \[3\] needs 3 bytes, got 2"):
        unpack(body({"a": entry(shape=[3])}, b".."))
    with raises_error(WireError, "TrailingBytes") as long:
        unpack(memoryview(GOOD + b"."))
    assert long.value.fields["actual_bytes"] == long.value.fields["expected_bytes"] + 1


@given(st.integers(0, len(GOOD) - 1), st.integers(0, 255))
def test_changed_byte_unpacks_or_raises_wire_error(position: int, value: int) -> None:
    changed = bytearray(GOOD)
    changed[position] = value
    with contextlib.suppress(WireError):
        tensors, _ = unpack(memoryview(changed))
        assert sum(tensor.data.nbytes for tensor in tensors.values()) == 10


@given(st.binary(max_size=200))
def test_any_bytes_unpack_or_raise_wire_error(data: bytes) -> None:
    for candidate in (data, len(data).to_bytes(8, "little") + data, body(b"{" + data)):
        with contextlib.suppress(WireError):
            unpack(memoryview(candidate))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.sampled_from(["a", "b", "__metadata__"]),
        st.fixed_dictionaries(
            {},
            optional={
                "dtype": st.sampled_from(["U8", "F4", "X"]) | JSON_VALUES,
                "shape": JSON_VALUES,
                "data_offsets": JSON_VALUES,
            },
        )
        | JSON_VALUES,
    ),
    st.binary(max_size=8),
)
def test_any_header_unpacks_or_raises_wire_error(header: dict[str, Any], data: bytes) -> None:
    with contextlib.suppress(WireError):
        unpack(body(header, data))


HOSTILE: dict[str, tuple[memoryview, str]] = {
    "header longer than the body": (body({}, length=1000), "Truncated"),
    "header of a hundred gigabytes": (body({}, length=100_000_000_000), "TooLarge"),
    "header of 2^64-1 bytes": (body({}, length=2**64 - 1), "TooLarge"),
    "no header": (body(b""), "BadHeader"),
    "not JSON": (body(b"hello"), "BadHeader"),
    "UTF-16": (body("{}".encode("utf-16")), "BadHeader"),
    "not UTF-8": (body(b'{"\xff": 1}'), "BadHeader"),
    "half a surrogate pair": (body(b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'), "BadHeader"),
    "half a surrogate pair in metadata": (body(b'{"__metadata__":{"k":"\\udc00"}}'), "BadHeader"),
    "a list": (body([]), "BadHeader"),
    "deep": (body(b"[" * 100_000), "BadHeader"),
    "deep objects": (body(b'{"a":' * 100_000), "BadHeader"),
    "long number": (body(b'{"a":' + b"9" * 5000 + b"}"), "BadHeader"),
    "duplicate name": (body(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2), b".."), "BadHeader"),
    "duplicate key": (body(b'{"a":{"dtype":"U8","dtype":"U8","shape":[0],"data_offsets":[0,0]}}'), "BadHeader"),
    "unknown dtype": (body({"a": entry("F128")}, b".."), "UnknownDtype"),
    "dtype a number": (body({"a": {**entry(), "dtype": 8}}, b".."), "UnknownDtype"),
    "missing shape": (body({"a": {"dtype": "U8", "data_offsets": [0, 2]}}, b".."), "BadHeader"),
    "extra key": (body({"a": {**entry(), "stride": 1}}, b".."), "BadHeader"),
    "negative size": (body({"a": entry(shape=[-2])}, b".."), "BadHeader"),
    "two negative sizes": (body({"a": entry(shape=[-1, -2])}, b".."), "BadHeader"),
    "fractional size": (body({"a": entry(shape=[2.0])}, b".."), "BadHeader"),
    "boolean size": (body({"a": entry(shape=[2, True])}, b".."), "BadHeader"),
    "33 dimensions": (body({"a": entry(shape=[1] * 32 + [2])}, b".."), "BadHeader"),
    "shape and length differ": (body({"a": entry(shape=[3])}, b".."), "ShapeMismatch"),
    "a shape whose product is 2^64": (body({"a": entry(shape=[1 << 32, 1 << 32], offsets=[0, 0])}), "ShapeMismatch"),
    "a shape whose bytes are 2^64": (body({"a": entry("F64", [1 << 61], [0, 0])}), "ShapeMismatch"),
    "half a byte": (body({"a": entry("F4", [3], [0, 1])}, b"."), "ShapeMismatch"),
    "offsets backwards": (body({"a": entry(offsets=[2, 0])}, b".."), "BadHeader"),
    "three offsets": (body({"a": entry(offsets=[0, 2, 2])}, b".."), "BadHeader"),
    "offsets past 2^63": (body({"a": entry(offsets=[1 << 63, (1 << 63) + 2])}, b".."), "BadHeader"),
    "past the end": (body({"a": entry(shape=[9], offsets=[0, 9])}, b".."), "Truncated"),
    "gap at the start": (body({"a": entry(offsets=[1, 3])}, b"..."), "BadHeader"),
    "gap between tensors": (body({"a": entry(), "b": entry(offsets=[3, 5])}, b"....."), "BadHeader"),
    "overlap": (body({"a": entry(), "b": entry(offsets=[1, 3])}, b"..."), "BadHeader"),
    "the same bytes twice": (body({"a": entry(), "b": entry()}, b".."), "BadHeader"),
    "trailing bytes": (body({"a": entry()}, b"..."), "TrailingBytes"),
    "bytes and no tensors": (body({}, b"."), "TrailingBytes"),
    "metadata that is a number": (body({"__metadata__": {"k": 1}}), "BadHeader"),
    "metadata that is a list": (body({"__metadata__": ["k"]}), "BadHeader"),
    "metadata that is null": (body({"__metadata__": None}), "BadHeader"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_malformed_body_raises_its_error_code(case: str) -> None:
    data, expected = HOSTILE[case]
    with raises_error(WireError, expected) as caught:
        unpack(data)
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


def test_claim_of_a_hundred_gigabytes_allocates_nothing() -> None:
    claims = [
        body({"a": entry("F32", [25_000_000_000], [0, 100_000_000_000])}, b"."),
        body({}, b"." * 90, length=100_000_000_000),
    ]
    assert all(claim.nbytes < 150 for claim in claims)
    tracemalloc.start()
    try:
        for claim in claims:
            with pytest.raises(WireError):
                unpack(claim)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_long_names_are_shortened_in_the_message() -> None:
    with raises_error(WireError, "UnknownDtype", match=r"\(100\d\d\d characters\)") as caught:
        unpack(body({"n" * 50_000: entry("D" * 50_000)}, b".."))
    assert len(str(caught.value)) < 500


def test_empty_tensors_may_be_between_others() -> None:
    header = {"z": entry(shape=[0], offsets=[2, 2]), "a": entry(), "b": entry(shape=[0], offsets=[0, 0])}
    assert set(unpack(body(header, b".."))[0]) == {"a", "b", "z"}
