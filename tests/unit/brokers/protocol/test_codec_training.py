"""The messages of training on the wire: gradients and words about steps, and what may come in their place."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brokers.errors import BadPayload, WireError
from brokers.protocol.codec import decode, encode
from brokers.protocol.messages import (
    JPEG,
    JSON,
    JSON_INTEGER_LIMIT,
    SAFETENSORS,
    STEP_VERBS,
    Gradient,
    Message,
    StepMessage,
    StepVerb,
    TensorContent,
)
from brokers.protocol.safetensors_codec import from_numpy
from brokers.protocol.transport import Properties
from tests.support.errors import raises_error
from tests.unit.brokers.protocol.test_codec import (
    ATTEMPTS,
    BODIES,
    REQUEST,
    REQUESTS,
    TOPICS,
    packet_payload,
    with_user_properties,
)

GRADIENT = Gradient(
    request_id=REQUEST,
    content=TensorContent({"cut": from_numpy(np.ones((2, 3), np.float32))}),
    sender_inbox="sparse/local/t/tail/in/t-1",
)
STEP = StepMessage(
    request_id=REQUEST, verb="commit", term=1_700_000_000_000, sender_inbox="s/inbox", details={"lr": 0.05, "a": [None]}
)

JSONS = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 53), 1 << 53) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
GRADIENTS = st.builds(
    Gradient, request_id=REQUESTS, content=BODIES, sender_inbox=TOPICS | st.just(""), attempt=ATTEMPTS
)
STEPS = st.builds(
    StepMessage,
    request_id=REQUESTS,
    verb=st.sampled_from(STEP_VERBS),
    term=st.integers(0, JSON_INTEGER_LIMIT - 1),
    sender_inbox=TOPICS | st.just(""),
    details=st.dictionaries(st.text(max_size=8), JSONS, max_size=4),
    attempt=ATTEMPTS,
)


@given(st.one_of(GRADIENTS, STEPS))
def test_what_is_encoded_is_decoded_again(message: Message) -> None:
    packet = encode(message)
    found = decode(packet.properties, packet_payload(packet))
    assert type(found) is type(message)
    assert found == message
    assert packet.nbytes == len(packet_payload(packet))


def test_a_gradient_is_a_kind_its_request_and_its_tensors() -> None:
    properties = encode(GRADIENT).properties
    user = (("sparse", "1"), ("kind", "gradient"))
    assert properties == Properties(SAFETENSORS, REQUEST, "sparse/local/t/tail/in/t-1", None, user)


def test_a_word_about_a_step_says_its_verb_and_its_term_where_anybody_can_read_them() -> None:
    packet = encode(STEP)
    user = (("sparse", "1"), ("kind", "step"), ("verb", "commit"), ("term", "1700000000000"))
    assert packet.properties == Properties(JSON, REQUEST, "s/inbox", None, user)
    assert json.loads(bytes(packet_payload(packet))) == STEP.details


# Legal on construction ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"request_id": b"." * 15}, "16 bytes, is 15"),
        ({"attempt": 0}, "1 or more, is 0"),
        ({"sender_inbox": "a/+"}, "topic to publish to"),
        ({"sender_inbox": "sparse/local/t/tail/tasks"}, "front door"),
    ],
)
@pytest.mark.parametrize("message", [GRADIENT, STEP], ids=["gradient", "step"])
def test_an_illegal_message_cannot_be_made(message: Gradient | StepMessage, fields: dict[str, Any], text: str) -> None:
    with raises_error(WireError, "BadProperty", match=text):
        replace(message, **fields)


@pytest.mark.parametrize("term", [-1, JSON_INTEGER_LIMIT])
def test_a_term_is_a_whole_number_of_json(term: int) -> None:
    with raises_error(WireError, "BadProperty", match=f"term.*0 to {JSON_INTEGER_LIMIT - 1}, is {term}"):
        replace(STEP, term=term)


def test_there_are_these_verbs_and_no_others() -> None:
    verb: Any = "forget"
    with raises_error(WireError, "BadProperty", match=r"one of prepared, commit, .*, is 'forget'"):
        replace(STEP, verb=verb)


# Hostile --------------------------------------------------------------------------------------------------------------

HOSTILE_STEPS: dict[str, tuple[dict[str, str | None], str]] = {
    "no verb": ({"verb": None}, "'verb' is missing"),
    "an empty verb": ({"verb": ""}, "one of prepared"),
    "a verb in capitals": ({"verb": "COMMIT"}, "is 'COMMIT'"),
    "the verb of a control": ({"verb": "done"}, "is 'done'"),
    "a verb of 60 kB": ({"verb": "v" * 60_000}, "one of prepared"),
    "no term": ({"term": None}, "'term' is missing"),
    "an empty term": ({"term": ""}, "whole number"),
    "a negative term": ({"term": "-1"}, "whole number"),
    "a term with a sign": ({"term": "+1"}, "whole number"),
    "a fractional term": ({"term": "1.0"}, "whole number"),
    "a term in other digits": ({"term": "\N{ARABIC-INDIC DIGIT ONE}"}, "whole number"),
    "an endless term": ({"term": "9" * 5000}, "whole number"),
    "a term past JSON's whole numbers": ({"term": str(JSON_INTEGER_LIMIT)}, f"is {JSON_INTEGER_LIMIT}"),
    "attempt zero": ({"attempt": "0"}, "1 or more"),
}


@pytest.mark.parametrize("case", HOSTILE_STEPS)
def test_a_hostile_word_about_a_step_is_refused_with_its_own_error(case: str) -> None:
    user, text = HOSTILE_STEPS[case]
    packet = encode(STEP)
    with raises_error(WireError, "BadProperty", match=text) as caught:
        decode(with_user_properties(packet, **user), packet_payload(packet))
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "payload",
    [b"", b"null", b"[]", b"7", b'"x"', b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000, b"9" * 5000, b"\x00"],
    ids=lambda payload: repr(payload[:8]),
)
def test_details_that_are_no_object_are_refused(payload: bytes) -> None:
    with pytest.raises(BadPayload, match="needs a JSON object") as caught:
        decode(encode(STEP).properties, memoryview(payload))
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("message", [GRADIENT, STEP], ids=["gradient", "step"])
def test_a_request_id_of_another_length_or_an_answer_to_a_filter_is_refused(message: Gradient | StepMessage) -> None:
    packet = encode(message)
    for properties in (
        replace(packet.properties, correlation_data=b""),
        replace(packet.properties, correlation_data=b"." * 17),
        replace(packet.properties, response_topic="sparse/#"),
        replace(packet.properties, response_topic="a/" * 100),
    ):
        with raises_error(WireError, "BadProperty"):
            decode(properties, packet_payload(packet))


@pytest.mark.parametrize(
    ("content_type", "payload"), [(JPEG, b"\xff\xd8\xff\xe0"), (JSON, b"[1]"), ("text/plain", b"x")]
)
def test_a_gradient_that_is_no_tensors_is_refused(content_type: str, payload: bytes) -> None:
    properties = replace(encode(GRADIENT).properties, content_type=content_type)
    with raises_error(WireError, "BadProperty", match=f"of a gradient must be {SAFETENSORS}, is {content_type}"):
        decode(properties, memoryview(payload))


def test_a_gradient_that_is_cut_off_anywhere_is_refused() -> None:
    packet = encode(GRADIENT)
    payload = packet_payload(packet)
    for length in range(len(payload)):
        with pytest.raises(WireError) as caught:
            decode(packet.properties, payload[:length])
        assert caught.value.code in ("Truncated", "BadHeader")


def test_a_gradient_with_more_behind_it_is_refused() -> None:
    packet = encode(GRADIENT)
    with raises_error(WireError, "TrailingBytes"):
        decode(packet.properties, memoryview(bytes(packet_payload(packet)) + b"."))


@given(st.sampled_from(["gradient", "step"]), st.binary(max_size=200), st.sampled_from(["", SAFETENSORS, JSON]))
def test_any_bytes_are_a_message_or_a_refusal(kind: str, payload: bytes, content_type: str) -> None:
    properties = replace(with_user_properties(encode(STEP), kind=kind), content_type=content_type)
    try:
        found = decode(properties, memoryview(payload))
    except WireError:
        return
    assert isinstance(found, Gradient | StepMessage)


@given(JSONS)
def test_no_details_come_as_others_than_they_were_sent(details: Any) -> None:
    packet = encode(replace(STEP, details={"it": details}))
    found = decode(packet.properties, packet_payload(packet))
    assert isinstance(found, StepMessage)
    assert found.details == {"it": details}


def test_every_verb_is_one_that_may_be_said() -> None:
    said: set[StepVerb] = {replace(STEP, verb=verb).verb for verb in STEP_VERBS}
    assert said == {
        "prepared", "commit", "committed", "abort", "quiesce", "quiesced", "restore", "restored", "fetch_weights"
    }  # fmt: skip
