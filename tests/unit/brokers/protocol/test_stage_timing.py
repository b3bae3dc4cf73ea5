"""Hops as metadata: the timing of each stage travels as JSON."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given

from brokers.errors import WireError
from brokers.protocol.stage_timing import STAGE_DURATIONS, Hop, hops_from_json, hops_to_json
from tests.support.errors import raises_error
from tests.unit.brokers.protocol.strategies import HOP, HOP_LISTS

NOT_HOPS = ["", "5", "null", "{}", '"x"', "[5]", "[[]]", "[" * 100_000, '[{"stage":"a"}]', '[{"stage":"a","worker":5}]']
NOT_NUMBERS = ['"1"', "null", "-1", "NaN", "Infinity", "1e999", "true", "[]", "9" * 400]


@given(HOP_LISTS)
def test_hops_from_json_is_the_inverse_of_hops_to_json(hops: tuple[Hop, ...]) -> None:
    assert hops_from_json(hops_to_json(hops)) == hops


def test_fields_may_be_missing_or_unknown() -> None:
    assert hops_from_json('[{"stage": "a", "worker": "b", "colour": "blue"}]') == (Hop("a", "b"),)


@pytest.mark.parametrize(
    "text",
    NOT_HOPS
    + [f'[{{"stage":"a","worker":"b","{key}":{value}}}]' for key in ("queue_ms", "batch") for value in NOT_NUMBERS]
    + ['[{"stage":"a","worker":"b","batch":0}]'],
    ids=lambda text: text[:60],
)
def test_malformed_hops_raise_bad_property(text: str) -> None:
    with raises_error(WireError, "BadProperty", match="JSON list of hops"):
        hops_from_json(text)


def test_durations_are_four_and_add_up() -> None:
    hop = replace(HOP, encode_ms=2.0)
    assert hop.durations() == dict(zip(STAGE_DURATIONS, (0.5, 0.25, 33.125, 2.0), strict=True))
    assert hop.total_ms == 35.875
