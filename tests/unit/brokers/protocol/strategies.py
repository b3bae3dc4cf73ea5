"""Example messages, and hypothesis strategies for messages and tensors."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from brokers.protocol import safetensors_codec
from brokers.protocol.codec import EncodedMessage
from brokers.protocol.messages import (
    ECHO_LIMIT_BYTES,
    JPEG,
    JSON,
    JSON_INTEGER_LIMIT,
    PNG,
    STEP_VERBS,
    Activation,
    BinaryContent,
    Failure,
    Gradient,
    Message,
    ReplyTo,
    Result,
    StepMessage,
    Task,
    TaskDone,
    TensorContent,
)
from brokers.protocol.safetensors_codec import TensorView, from_numpy
from brokers.protocol.stage_timing import Hop
from brokers.protocol.traceparent import TraceContext
from brokers.protocol.transport import Properties

REQUEST = bytes(range(16))
CONTENT = TensorContent({"x": from_numpy(np.arange(6, dtype=np.float32).reshape(2, 3))}, {"k": "v"})
HOP = Hop("head", "head-1", 0.5, 0.25, 33.125, 0.0, 10, 20, 4)
TASK = Task(request_id=REQUEST, content=CONTENT, reply_to=ReplyTo("a/inbox"), sender_inbox="a/inbox")
FAILURE = Failure(request_id=REQUEST, stage="a", worker="b", error="c", reason="d", retry=True)
DONE = TaskDone(request_id=REQUEST, worker="w")
GRADIENT = Gradient(request_id=REQUEST, content=CONTENT, sender_inbox="sparse/local/t/tail/in/t-1")
STEP = StepMessage(
    request_id=REQUEST, verb="commit", term=1_700_000_000_000, sender_inbox="s/inbox", details={"lr": 0.05, "a": [None]}
)

NAMES = st.text(max_size=12).filter(lambda name: name != "__metadata__" and name.isprintable())
METADATA = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8), st.text(max_size=20), max_size=4
)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
TOPICS = st.text("abcäß☃/", min_size=1, max_size=20)
INBOXES = TOPICS | st.just("")
COUNTS = st.integers(0, 1 << 53)
BATCHES = st.integers(1, 1 << 53)
MILLISECONDS = st.integers(0, 10**9).map(lambda thousandths: thousandths / 1000)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 53), 1 << 53) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
HOP_LISTS = st.lists(
    st.builds(Hop, TEXTS, TEXTS, *[MILLISECONDS] * 4, bytes_in=COUNTS, bytes_out=COUNTS, batch=BATCHES), max_size=3
).map(tuple)


@st.composite
def tensor_views(draw: st.DrawFn) -> TensorView:
    """Tensors of every dtype, with up to three dimensions."""
    dtype = draw(st.sampled_from(sorted(safetensors_codec._DTYPES)))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    if dtype == "F4":
        shape = (*shape, 2)
    size = safetensors_codec._DTYPES[dtype][0] * math.prod(shape) // 8
    return TensorView(dtype, shape, memoryview(draw(st.binary(min_size=size, max_size=size))))


TENSORS = st.builds(TensorContent, st.dictionaries(NAMES, tensor_views(), max_size=3), METADATA)
BINARIES = st.builds(
    BinaryContent, st.sampled_from([JPEG, PNG, JSON, "text/plain"]), st.binary(max_size=40).map(memoryview)
)
TRACES = st.builds(
    lambda trace_id, span_id, sampled: TraceContext(f"{trace_id:032x}", f"{span_id:016x}", sampled),
    st.integers(1, (1 << 128) - 1),
    st.integers(1, (1 << 64) - 1),
    st.booleans(),
)
_BASE: dict[str, Any] = {"request_id": st.binary(min_size=16, max_size=16), "attempt": st.integers(1, 999_999_999)}
_TASK: dict[str, Any] = {
    **_BASE,
    "reply_to": st.builds(
        ReplyTo, TOPICS, st.sampled_from(["safetensors", "json"]), st.binary(max_size=ECHO_LIMIT_BYTES)
    ),
    "sender_inbox": TOPICS,
    "source": TEXTS,
    "deadline_ms": st.none() | MILLISECONDS.filter(bool),
    "priority": st.sampled_from(["interactive", "background"]),
    "trace": st.none() | TRACES,
}
MESSAGES: st.SearchStrategy[Message] = st.one_of(
    st.builds(Task, content=BINARIES, **_TASK),
    st.builds(Task, content=TENSORS, hops=HOP_LISTS, **_TASK),
    st.builds(Activation, content=TENSORS, hops=HOP_LISTS, **_TASK),
    st.builds(Result, content=TENSORS, hops=HOP_LISTS, **_BASE),
    st.builds(Result, content=BINARIES, **_BASE),
    st.builds(Failure, stage=TEXTS, worker=TEXTS, error=TEXTS, reason=TEXTS, retry=st.booleans(), **_BASE),
    st.builds(TaskDone, worker=TEXTS, **_BASE),
    st.builds(Gradient, content=TENSORS, sender_inbox=INBOXES, **_BASE),
    st.builds(
        StepMessage,
        verb=st.sampled_from(STEP_VERBS),
        term=st.integers(0, JSON_INTEGER_LIMIT - 1),
        sender_inbox=INBOXES,
        details=st.dictionaries(st.text(max_size=8), JSON_VALUES, max_size=4),
        **_BASE,
    ),
)


def packet_payload(packet: EncodedMessage) -> memoryview:
    """The payload as one buffer."""
    return memoryview(b"".join(packet.buffers))


def with_user_properties(packet: EncodedMessage, **changes: str | None) -> Properties:
    """The packet's properties with some user properties changed, or removed where the value is None."""
    user = dict(packet.properties.user_properties)
    for name, value in changes.items():
        user[name.replace("_", "-")] = value  # type: ignore[assignment]
    remaining = tuple((name, value) for name, value in user.items() if value is not None)
    return replace(packet.properties, user_properties=remaining)
