"""Micro-batches as metadata, and their random seeds."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from brokers.errors import WireError
from brokers.protocol.messages import JSON_INTEGER_LIMIT
from brokers.protocol.training import (
    MICRO_BATCH_LIMIT,
    ROWS_LIMIT,
    SEED_LIMIT,
    MicroBatch,
    StepMode,
    TrainingStatus,
    micro_batch_seed,
)
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
def test_from_json_is_the_inverse_of_to_json(micro: MicroBatch) -> None:
    assert MicroBatch.from_json(micro.to_json()) == micro


def test_unknown_fields_are_ignored() -> None:
    text = json.dumps({**asdict(MICRO), "colour": "blue"})
    assert MicroBatch.from_json(text) == MICRO


def test_default_mode_is_train() -> None:
    fields = asdict(MICRO)
    del fields["mode"]
    assert MicroBatch.from_json(json.dumps(fields)).mode == "train"


HOSTILE_TEXTS: dict[str, str | None] = {
    "missing": None,
    "empty": "",
    "not JSON": "{",
    "null": "null",
    "list": "[]",
    "number": "7",
    "object without fields": "{}",
    "deep list": "[" * 100_000,
    "long number": "9" * 100_000,
}


@pytest.mark.parametrize("case", HOSTILE_TEXTS)
def test_malformed_micro_batch_raises_bad_property(case: str) -> None:
    with raises_error(WireError, "BadProperty", match=r"sparse\.micro.*must be a JSON object") as caught:
        MicroBatch.from_json(HOSTILE_TEXTS[case])
    assert len(str(caught.value)) < 500


NOT_COUNTS: tuple[Any, ...] = (None, "1", 1.0, True, -1, 1 << 64, [], {}, float("nan"), float("inf"))


@pytest.mark.parametrize("name", ["term", "index", "count", "rows", "number", "seed"])
@pytest.mark.parametrize("value", NOT_COUNTS, ids=repr)
def test_invalid_number_is_refused_by_name(name: str, value: Any) -> None:
    with raises_error(WireError, "BadProperty", match=f"{name}|index must be less than count"):
        MicroBatch.from_json(json.dumps({**asdict(MICRO), name: value}))


@pytest.mark.parametrize("name", ["step", "term", "index", "count", "rows", "number", "seed"])
def test_missing_field_is_refused(name: str) -> None:
    fields = asdict(MICRO)
    del fields[name]
    with raises_error(WireError, "BadProperty", match="JSON object"):
        MicroBatch.from_json(json.dumps(fields))


@pytest.mark.parametrize(
    "step",
    [None, 7, "", "0" * 31, "0" * 33, "z" * 32, "A" * 32, " " * 32, "+" * 32, "\u0660" * 32, ["0"] * 32],
    ids=repr,
)
def test_step_must_be_lower_case_hexadecimal(step: Any) -> None:
    with raises_error(WireError, "BadProperty", match="step: "):
        MicroBatch.from_json(json.dumps({**asdict(MICRO), "step": step}))


@pytest.mark.parametrize("mode", [None, "", "TRAIN", "test", 1, ["train"], {}], ids=repr)
def test_unknown_mode_is_refused(mode: Any) -> None:
    with raises_error(WireError, "BadProperty", match="mode: .*'train' or 'evaluate'"):
        MicroBatch.from_json(json.dumps({**asdict(MICRO), "mode": mode}))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"index": 4}, "index must be less than count, which is 4, is 4"),
        ({"index": 0, "count": 0}, "count"),
        ({"count": MICRO_BATCH_LIMIT + 1}, "count: "),
        ({"rows": 0}, "rows: "),
    ],
)
def test_number_out_of_range_is_refused(changes: dict[str, int], problem: str) -> None:
    with raises_error(WireError, "BadProperty", match=problem):
        MicroBatch.from_json(json.dumps({**asdict(MICRO), **changes}))


@given(st.text(max_size=60) | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps))
def test_any_text_parses_or_raises_wire_error(text: str) -> None:
    try:
        micro = MicroBatch.from_json(text)
    except WireError:
        return
    assert MicroBatch.from_json(micro.to_json()) == micro


@given(st.integers(-(1 << 63), 1 << 63), st.integers(0, JSON_INTEGER_LIMIT), st.integers(0, MICRO_BATCH_LIMIT))
def test_seed_is_deterministic_and_in_range(seed: int, number: int, index: int) -> None:
    drawn = micro_batch_seed(seed, number, index)
    assert 0 <= drawn < SEED_LIMIT
    assert drawn == micro_batch_seed(seed, number, index)


def test_micro_batches_have_different_seeds() -> None:
    seeds = {
        micro_batch_seed(seed, number, index) for seed in (0, 1, 11) for number in range(20) for index in range(20)
    }
    assert len(seeds) == 3 * 20 * 20


def test_seeds_never_change_between_versions() -> None:
    assert micro_batch_seed(0, 0, 0) == 5_346_321_772_774_276_043
    assert micro_batch_seed(5, 7, 3) == 2_423_352_232_263_666_964


def test_smallest_micro_batch_of_a_status_has_a_row() -> None:
    assert TrainingStatus.model_validate({"term": 1}).min_rows == 1  # of earlier versions
    assert TrainingStatus.model_validate_json(TrainingStatus(min_rows=2).model_dump_json()).min_rows == 2
    for wrong in (0, -1, ROWS_LIMIT, "x", None):
        with pytest.raises(ValidationError, match="min_rows"):
            TrainingStatus.model_validate({"min_rows": wrong})
