"""Errors have a code, fields and one line of text."""

from __future__ import annotations

import copy

import pytest

from brokers.errors import (
    BadFile,
    BadPayload,
    BrokerUnreachable,
    DeadlinePassed,
    Disconnected,
    NoWorker,
    PortTaken,
    RequestFailed,
    SparseError,
    TooLarge,
    UsageError,
    WireError,
    error_code,
    property_error,
)

ERRORS: list[tuple[SparseError, str, str]] = [
    (UsageError("NotAVideo", "a.txt: not a video", key="source.path", path="a.txt"), "NotAVideo", "a.txt: not a video"),
    (BadFile("a.toml", "is missing", "stage"), "BadFile", "a.toml: stage: is missing"),
    (PortTaken("::1", 1883), "PortTaken", "port 1883 on ::1 is taken: stop the process that listens there"),
    (BrokerUnreachable("mqtt://h:1", "timed out"), "BrokerUnreachable", "no MQTT 5 broker at mqtt://h:1: timed out"),
    (WireError("BadChunk", "bad chunk", retry=True), "BadChunk", "bad chunk"),
    (TooLarge("the message", 10, 11), "TooLarge", "the message has 11 bytes, the limit is 10"),
    (BadPayload("image/png", "damaged"), "BadPayload", "payload of type image/png: damaged"),
    (property_error("echo", "is missing"), "BadProperty", "property 'echo' is missing"),
    (RequestFailed("ab", "s", "w", "E", "why"), "RequestFailed", "request ab failed at stage 's', worker 'w': E: why"),
    (DeadlinePassed("ab", 5.0, "the source"), "DeadlinePassed", "request ab had 5 ms, which passed at the source"),
    (NoWorker("p", "s", 2.5), "NoWorker", "no worker of stage 's' of pipeline 'p' came up within 2.5 s"),
    (Disconnected("mqtt://h:1", "closed"), "Disconnected", "the connection to mqtt://h:1 ended: closed"),
]


@pytest.mark.parametrize(("error", "code", "message"), ERRORS, ids=[code for _, code, _ in ERRORS])
def test_code_message_and_fields_survive_copying(error: SparseError, code: str, message: str) -> None:
    assert (error.code, error_code(error)) == (code, code)
    assert str(error).startswith(message)
    duplicate = copy.copy(error)  # as pickle does it
    assert type(duplicate) is type(error)
    assert (str(duplicate), vars(duplicate)) == (str(error), vars(error))


def test_fields_hold_the_values_of_the_message() -> None:
    error = UsageError("TooMany", "at most 2, got 3", key="stage", limit=2, actual=3)
    assert error.key == "stage"
    assert error.fields == {"limit": 2, "actual": 3}
    assert TooLarge("it", 10, 11).fields == {"limit_bytes": 10, "actual_bytes": 11}


def test_wire_errors_shorten_text_from_the_network() -> None:
    message = str(property_error("n" * 1_000_000, "must be a whole number"))
    assert message.startswith("property 'nnn")
    assert message.endswith("must be a whole number (1000034 characters)")
    assert len(message) < 500


def test_code_of_other_exceptions_is_their_class_name() -> None:
    assert error_code(ValueError("x")) == "ValueError"
