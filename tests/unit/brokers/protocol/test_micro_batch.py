"""What a micro-batch says of itself: it survives the way, and whatever else comes in its place is a typed failure."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brokers.errors import WireError
from brokers.protocol.messages import JSON_INTEGER_LIMIT
from brokers.protocol.training import MICRO_BATCH_LIMIT, ROWS_LIMIT, SEED_LIMIT, MicroBatch, StepMode, micro_batch_seed
from tests.support.errors import raises_error

MICRO = MicroBatch(step="0123456789abcdef" * 2, term=1, index=2, count=4, rows=64, number=7, seed=3)


@st.composite
def micro_batches(draw: st.DrawFn) -> MicroBatch:
    count = draw(st.integers(1, MICRO_BATCH_LIMIT))
    modes: list[StepMode] = ["train", "evaluate"]
    return MicroBatch(
        step=draw(st.binary(min_size=16, max_size=16)).hex(),
        term=draw(st.integers(0, JSON_INTEGER_LIMIT - 1)),
        index=draw(st.integers(0, count - 1)),
        count=count,
        rows=draw(st.integers(1, ROWS_LIMIT - 1)),
        number=draw(st.integers(0, JSON_INTEGER_LIMIT - 1)),
        seed=draw(st.integers(0, SEED_LIMIT - 1)),
        mode=draw(st.sampled_from(modes)),
    )


@given(micro_batches())
def test_what_is_said_is_understood(micro: MicroBatch) -> None:
    assert MicroBatch.from_json(micro.to_json()) == micro


def test_what_a_later_version_adds_is_read_over() -> None:
    text = json.dumps({**asdict(MICRO), "colour": "blue"})
    assert MicroBatch.from_json(text) == MICRO


def test_who_says_no_mode_trains() -> None:
    fields = asdict(MICRO)
    del fields["mode"]
    assert MicroBatch.from_json(json.dumps(fields)).mode == "train"


HOSTILE_TEXTS: dict[str, str | None] = {
    "nothing": None,
    "no characters": "",
    "no JSON": "{",
    "null": "null",
    "a list": "[]",
    "a number": "7",
    "an object without fields": "{}",
    "an endless list": "[" * 100_000,
    "an endless number": "9" * 100_000,
}


@pytest.mark.parametrize("case", HOSTILE_TEXTS)
def test_what_is_no_micro_batch_is_refused_with_what_was_expected(case: str) -> None:
    with raises_error(WireError, "BadProperty", match=r"sparse\.micro.*must be a JSON object") as caught:
        MicroBatch.from_json(HOSTILE_TEXTS[case])
    assert len(str(caught.value)) < 500


NO_NUMBERS: tuple[Any, ...] = (None, "1", 1.0, True, -1, 1 << 64, [], {}, float("nan"), float("inf"))


@pytest.mark.parametrize("name", ["term", "index", "count", "rows", "number", "seed"])
@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_a_field_that_is_no_number_of_its_kind_is_refused_by_its_name(name: str, value: Any) -> None:
    with raises_error(WireError, "BadProperty", match=f"{name} must be a whole number"):
        MicroBatch.from_json(json.dumps({**asdict(MICRO), name: value}))


@pytest.mark.parametrize("name", ["step", "term", "index", "count", "rows", "number", "seed"])
def test_a_field_that_is_missing_is_refused(name: str) -> None:
    fields = asdict(MICRO)
    del fields[name]
    with raises_error(WireError, "BadProperty", match="JSON object"):
        MicroBatch.from_json(json.dumps(fields))


@pytest.mark.parametrize(
    "step",
    [None, 7, "", "0" * 31, "0" * 33, "z" * 32, "A" * 32, " " * 32, "+" * 32, "\u0660" * 32, ["0"] * 32],
    ids=repr,
)
def test_a_step_that_is_no_id_in_lower_case_hexadecimal_is_refused(step: Any) -> None:
    with raises_error(WireError, "BadProperty", match=r"step must be 32 .*hexadecimal digits"):
        MicroBatch.from_json(json.dumps({**asdict(MICRO), "step": step}))


@pytest.mark.parametrize("mode", [None, "", "TRAIN", "test", 1, ["train"], {}], ids=repr)
def test_a_mode_that_there_is_not_is_refused(mode: Any) -> None:
    with raises_error(WireError, "BadProperty", match="mode must be train or evaluate"):
        MicroBatch.from_json(json.dumps({**asdict(MICRO), "mode": mode}))


def test_a_micro_batch_is_one_of_those_of_its_step() -> None:
    with raises_error(WireError, "BadProperty", match="index must be a whole number from 0 to 3, is 4"):
        replace(MICRO, index=4)
    with raises_error(WireError, "BadProperty", match="count"):
        replace(MICRO, index=0, count=0)
    with raises_error(WireError, "BadProperty", match="count"):
        replace(MICRO, count=MICRO_BATCH_LIMIT + 1)
    with raises_error(WireError, "BadProperty", match="rows"):
        replace(MICRO, rows=0)


@given(st.text(max_size=60) | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps))
def test_any_text_is_a_micro_batch_or_a_refusal(text: str) -> None:
    try:
        found = MicroBatch.from_json(text)
    except WireError:
        return
    assert MicroBatch.from_json(found.to_json()) == found


@given(st.integers(-(1 << 63), 1 << 63), st.integers(0, JSON_INTEGER_LIMIT), st.integers(0, MICRO_BATCH_LIMIT))
def test_the_seed_of_a_micro_batch_is_one_that_it_may_have(seed: int, number: int, index: int) -> None:
    found = micro_batch_seed(seed, number, index)
    assert 0 <= found < SEED_LIMIT
    assert found == micro_batch_seed(seed, number, index)


def test_no_two_micro_batches_draw_the_same() -> None:
    found = {
        micro_batch_seed(seed, number, index) for seed in (0, 1, 11) for number in range(20) for index in range(20)
    }
    assert len(found) == 3 * 20 * 20


def test_the_seed_of_a_micro_batch_is_the_same_in_every_version() -> None:
    assert micro_batch_seed(0, 0, 0) == 5_346_321_772_774_276_043
    assert micro_batch_seed(5, 7, 3) == 2_423_352_232_263_666_964
