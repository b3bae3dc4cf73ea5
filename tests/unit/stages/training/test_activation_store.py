"""Forwards that wait for their gradient: each is taken out once, and there are only so many."""

from __future__ import annotations

import pytest

from brokers.errors import WireError
from brokers.protocol.training import MICRO_BATCH_LIMIT
from stages.training.activation_store import ActivationStore
from stages.training.errors import TooManyForwards, UnknownForward

ONE, OTHER = b"." * 16, b":" * 16


def test_what_is_taken_out_is_not_there_any_more() -> None:
    saved: ActivationStore[str] = ActivationStore()
    saved.put(ONE, "kept")
    assert saved.pop(ONE) == "kept"
    assert len(saved) == 0
    with pytest.raises(UnknownForward, match=f"no forward of request {ONE.hex()} is kept"):
        saved.pop(ONE)


def test_a_gradient_for_what_was_never_here_is_a_typed_failure_of_the_message() -> None:
    saved: ActivationStore[str] = ActivationStore()
    saved.put(ONE, "kept")
    with pytest.raises(WireError, match="late, a twin, or not for this worker"):
        saved.pop(OTHER)
    assert len(saved) == 1


def test_there_is_room_for_so_many_and_for_no_more() -> None:
    saved: ActivationStore[int] = ActivationStore(limit=2)
    saved.put(ONE, 1)
    saved.put(OTHER, 2)
    with pytest.raises(TooManyForwards, match="2 forwards wait"):
        saved.put(b"!" * 16, 3)
    assert (saved.pop(ONE), saved.pop(OTHER), len(saved)) == (1, 2, 0)


def test_a_whole_step_of_the_most_micro_batches_fits() -> None:
    saved: ActivationStore[int] = ActivationStore()
    for index in range(MICRO_BATCH_LIMIT):
        saved.put(index.to_bytes(16, "big"), index)
    with pytest.raises(TooManyForwards):
        saved.put(ONE, 0)


def test_a_step_that_is_given_up_leaves_nothing() -> None:
    saved: ActivationStore[str] = ActivationStore()
    saved.put(ONE, "kept")
    saved.clear()
    assert len(saved) == 0
    with pytest.raises(UnknownForward):
        saved.pop(ONE)
