"""`Coordinator`: which worker of the first stage leads."""

from __future__ import annotations

import pytest

from stages.training.coordinator import FROZEN_S, LISTEN_S
from tests.support.training.coordinator_pipeline import UNIX_MS, CoordinatorPipeline, record


def test_coordinator_listens_before_it_decides() -> None:
    pipeline = CoordinatorPipeline(is_listening=True)
    assert not pipeline.is_leader()
    pipeline.now_s += LISTEN_S - 0.01
    assert not pipeline.is_leader()
    pipeline.now_s += 0.01
    assert pipeline.is_leader()


def test_frozen_coordinator_listens_again() -> None:
    pipeline = CoordinatorPipeline()
    pipeline.start_training()
    pipeline.now_s += FROZEN_S + 0.1
    pipeline.lose("tail-1")
    pipeline.publish("tail-2")
    assert pipeline.tick() is None
    assert pipeline.coordinator.phase == "training"
    pipeline.publish("head-2", term=UNIX_MS + 9)  # has led meanwhile
    pipeline.now_s += LISTEN_S
    assert not pipeline.is_leader()


@pytest.mark.parametrize(("own", "leads"), [("head-1", True), ("head-2", False)])
def test_first_worker_by_name_leads_if_none_does(own: str, leads: bool) -> None:
    pipeline = CoordinatorPipeline("body-1", "tail-1", own=own, is_listening=True)
    for worker in ("head-1", "head-2"):
        pipeline.publish(worker, "standby")
    pipeline.tick()
    pipeline.now_s += LISTEN_S
    assert pipeline.is_leader() is leads


@pytest.mark.parametrize("state", ["up", "draining"])
def test_new_worker_does_not_lead_until_the_leader_has_left(state: str) -> None:
    pipeline = CoordinatorPipeline("body-1", "tail-1", "head-2", is_listening=True)
    pipeline.publish("head-2", state, term=UNIX_MS)
    pipeline.tick()
    pipeline.now_s += LISTEN_S
    assert not pipeline.is_leader()
    pipeline.publish("head-2", "stopped")
    assert pipeline.is_leader()


@pytest.mark.parametrize(("terms", "leader"), [((7, 8), "head-2"), ((8, 7), "head-1"), ((7, 7), "head-2")])
def test_of_two_leaders_the_one_with_the_greater_term_and_name_stays(terms: tuple[int, int], leader: str) -> None:
    leaders = []
    for own, term in zip(("head-1", "head-2"), terms, strict=True):
        pipeline = CoordinatorPipeline("body-1", own=own)
        assert pipeline.is_leader()
        pipeline.coordinator.term = term
        for worker, known_term in zip(("head-1", "head-2"), terms, strict=True):
            pipeline.publish(worker, "up", term=known_term)
        if pipeline.is_leader():
            leaders.append(own)
    assert leaders == [leader]


def test_coordinator_that_loses_the_lead_ends_its_term() -> None:
    pipeline = CoordinatorPipeline()
    pipeline.start_training()
    pipeline.publish("head-2", "up", term=UNIX_MS + 9)
    assert not pipeline.is_leader()
    assert pipeline.coordinator.phase == "waiting"


def test_worker_of_another_stage_is_no_rival() -> None:
    pipeline = CoordinatorPipeline("body-1", "tail-1")
    pipeline.coordinator.on_worker(record("body-1").model_copy(update={"worker": "a"}))
    assert pipeline.is_leader()
