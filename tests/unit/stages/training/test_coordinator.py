"""`Coordinator`: members, the common version, and the end of a term."""

from __future__ import annotations

from typing import Any

import pytest

from brokers.protocol.training import TrainingStatus
from stages.training.coordinator import LISTEN_S, RETRY_DELAY_S, CoordinatorCommand
from tests.support.training.coordinator_pipeline import LEASE_S, UNIX_MS, CoordinatorPipeline, record, status

# Members --------------------------------------------------------------------------------------------------------------


def test_term_begins_when_every_stage_has_a_worker() -> None:
    pipeline = CoordinatorPipeline("head-1", "body-1")
    assert pipeline.tick() is None
    pipeline.publish("tail-1")
    assert pipeline.expect_quiesce() == CoordinatorCommand(
        "quiesce", UNIX_MS, {"head": "head-1", "body": "body-1", "tail": "tail-1"}
    )


def test_worker_of_a_retained_record_is_no_member() -> None:
    pipeline = CoordinatorPipeline("head-1", "body-1")
    pipeline.publish("tail-1", is_live=False)
    assert pipeline.tick() is None
    pipeline.publish("tail-1")
    assert pipeline.expect_quiesce().members["tail"] == "tail-1"


@pytest.mark.parametrize("state", ["draining", "stopped"])
def test_leaving_worker_becomes_no_member(state: str) -> None:
    pipeline = CoordinatorPipeline("head-1", "body-1", "tail-2")
    pipeline.publish("tail-1", state)
    assert pipeline.expect_quiesce().members["tail"] == "tail-2"


def test_draining_member_finishes_its_step() -> None:
    pipeline = CoordinatorPipeline()
    pipeline.start_training()
    pipeline.publish("tail-1", "draining")
    assert pipeline.tick() is None
    assert pipeline.coordinator.phase == "training"


def test_worker_without_a_training_status_is_no_member() -> None:
    pipeline = CoordinatorPipeline("head-1", "body-1")
    pipeline.coordinator.on_worker(record("tail-1").model_copy(update={"training": None}))
    assert pipeline.tick() is None


def test_leader_is_the_member_of_the_first_stage() -> None:
    pipeline = CoordinatorPipeline("body-1", "tail-1")
    pipeline.publish("head-0", "standby", checkpoints=(50,))
    pipeline.publish("head-1", "standby")
    pipeline.coordinator.is_leader = True
    assert pipeline.expect_quiesce().members["head"] == "head-1"


def test_former_member_is_preferred() -> None:
    pipeline = CoordinatorPipeline("head-1", "body-1", "tail-2")
    pipeline.start_training()
    pipeline.publish("tail-1", "standby", checkpoints=(500,))
    pipeline.coordinator.end_term("a test")
    assert pipeline.expect_quiesce().members["tail"] == "tail-2"


def test_newest_checkpoint_then_name_decides_between_new_workers() -> None:
    pipeline = CoordinatorPipeline("head-1", "body-1", "tail-3", "tail-2", is_listening=True)
    pipeline.tick()
    pipeline.now_s += LISTEN_S
    assert pipeline.expect_quiesce().members["tail"] == "tail-2"
    pipeline = CoordinatorPipeline("head-1", "body-1", "tail-3", "tail-2", is_listening=True)
    pipeline.publish("tail-3", checkpoints=(50, 100))
    pipeline.tick()
    pipeline.now_s += LISTEN_S
    assert pipeline.expect_quiesce().members["tail"] == "tail-3"


# The end of a term ----------------------------------------------------------------------------------------------------


def test_standby_replaces_a_lost_member() -> None:
    pipeline = CoordinatorPipeline()
    first = pipeline.start_training()
    pipeline.publish("tail-2", "standby")
    assert pipeline.tick() is None
    pipeline.lose("tail-1")
    command = pipeline.expect_quiesce()
    assert command.members == {"head": "head-1", "body": "body-1", "tail": "tail-2"}
    assert command.term > first.term
    assert pipeline.coordinator.term_reason == "worker tail-1 of stage tail is gone"


def test_next_term_waits_for_a_replacement() -> None:
    pipeline = CoordinatorPipeline()
    pipeline.start_training()
    pipeline.lose("tail-1")
    assert pipeline.tick() is None
    assert pipeline.coordinator.phase == "waiting"
    pipeline.publish("tail-9")
    assert pipeline.expect_quiesce().members["tail"] == "tail-9"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"instance": "2"}, "worker tail-1 of stage tail has restarted"),
        ({"pid": 2}, "worker tail-1 of stage tail has restarted"),
        ({"disconnects": 1}, "worker tail-1 of stage tail was disconnected"),
    ],
)
def test_member_that_may_have_missed_messages_ends_the_term(fields: dict[str, Any], reason: str) -> None:
    pipeline = CoordinatorPipeline()
    first = pipeline.start_training()
    pipeline.publish("tail-1", **fields)
    assert pipeline.expect_quiesce().term > first.term
    assert pipeline.coordinator.term_reason == reason


def test_lost_member_ends_the_term_in_every_phase() -> None:
    pipeline = CoordinatorPipeline("head-1", "body-1", "tail-1", "tail-2")
    first = pipeline.expect_quiesce()
    pipeline.lose("tail-1")
    second = pipeline.expect_quiesce()
    assert (second.members["tail"], second.term) == ("tail-2", first.term + 1)
    pipeline.quiesce_all(second)
    assert pipeline.tick() is not None
    pipeline.lose("tail-2")
    assert pipeline.tick() is None
    assert pipeline.coordinator.phase == "waiting"


def test_aborted_step_begins_a_term_with_the_same_members() -> None:
    pipeline = CoordinatorPipeline()
    first = pipeline.start_training()
    pipeline.coordinator.end_term("a source aborted its step")
    command = pipeline.expect_quiesce()
    assert (command.members, command.term) == (first.members, first.term + 1)
    assert pipeline.coordinator.term_reason == "a source aborted its step"


def test_first_reason_is_kept() -> None:
    pipeline = CoordinatorPipeline()
    pipeline.start_training()
    pipeline.coordinator.end_term("one")
    pipeline.coordinator.end_term("other")
    assert pipeline.coordinator.term_reason == "one"


def test_stage_that_does_not_answer_within_a_lease_ends_the_term() -> None:
    pipeline = CoordinatorPipeline()
    first = pipeline.expect_quiesce()
    pipeline.pass_time(LEASE_S - 1)
    pipeline.now_s += 2
    assert pipeline.expect_quiesce().term == first.term + 1
    assert pipeline.coordinator.term_reason == "not all stages have answered within 60 s"


def test_source_that_is_lost_in_its_step_ends_the_term() -> None:
    pipeline = CoordinatorPipeline()
    pipeline.start_training()
    assert pipeline.tick(sources={"one"}, lost_sources=["other"]) is None
    assert pipeline.tick(sources=set(), lost_sources=["one"]) is None
    assert pipeline.tick(sources={"one"}, lost_sources=["one"]) is not None
    assert pipeline.coordinator.term_reason == "source one was lost in the middle of a step"


def test_step_without_progress_for_a_lease_ends_the_term() -> None:
    pipeline = CoordinatorPipeline()
    pipeline.start_training()
    for _ in range(3):
        pipeline.pass_time(LEASE_S - 1, sources={"one"})
        pipeline.coordinator.on_progress(pipeline.now_s)
    pipeline.pass_time(LEASE_S - 1, sources={"one"})
    pipeline.now_s += 2
    assert pipeline.tick(sources={"one"}) is not None
    assert pipeline.coordinator.term_reason == "a step made no progress for 60 s"


# Terms ----------------------------------------------------------------------------------------------------------------


def test_term_is_above_all_known_terms_and_the_clock() -> None:
    pipeline = CoordinatorPipeline("head-1", "tail-1")
    pipeline.publish("body-1", term=UNIX_MS + 500)
    assert pipeline.expect_quiesce().term == UNIX_MS + 501


def test_terms_grow_when_the_clock_stands_still_or_goes_back() -> None:
    pipeline = CoordinatorPipeline("head-1", "body-1")
    pipeline.publish("tail-1")
    terms = []
    for unix_ms in (UNIX_MS, UNIX_MS, UNIX_MS - 10_000, 0):
        [command] = pipeline.coordinator.tick(pipeline.now_s, unix_ms)
        terms.append(command.term)
        pipeline.coordinator.end_term("a test")
    assert terms == [UNIX_MS, UNIX_MS + 1, UNIX_MS + 2, UNIX_MS + 3]


@pytest.mark.parametrize("other", ["term", "worker", "stage", "phase"])
def test_answer_of_another_term_or_worker_is_ignored(other: str) -> None:
    pipeline = CoordinatorPipeline("head-1", "body-1", "tail-1", "tail-2")
    command = pipeline.expect_quiesce()
    coordinator = pipeline.coordinator
    coordinator.on_quiesced("head", "head-1", command.term, status(memory=0))
    coordinator.on_quiesced("body", "body-1", command.term, status(memory=0))
    if other == "phase":
        coordinator.on_restored("tail", "tail-1", command.term, pipeline.now_s)
    else:
        stage = "nose" if other == "stage" else "tail"
        worker = "tail-2" if other == "worker" else "tail-1"
        term = command.term - 1 if other == "term" else command.term
        coordinator.on_quiesced(stage, worker, term, status(memory=0))
    assert pipeline.tick() is None
    assert coordinator.phase == "quiescing"


# Versions -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "body", "tail", "version"),
    [
        (status(memory=0), status(memory=0), status(memory=0), 0),
        (status(50, memory=63), status(50, memory=63), status(50, memory=63), 63),
        (status(50, memory=63), status(50, memory=63), status(50), 50),
        (status(50, 100, memory=100), status(50, memory=100), status(50, 100), 100),
        (status(50, 100, memory=101), status(50, 100, memory=100), status(50, 100, memory=101), 100),
        (status(50, 100), status(50, 100), status(50), 50),
        (status(50), status(50), status(), 0),
        (status(50, memory=50), status(memory=50), status(memory=50), 50),
        (status(50, 100, memory=None), status(50, 100, memory=None), status(100, memory=None), 100),
    ],
)
def test_all_members_restore_the_newest_common_version(
    head: TrainingStatus, body: TrainingStatus, tail: TrainingStatus, version: int
) -> None:
    assert CoordinatorPipeline().start_training(head=head, body=body, tail=tail).version == version


def test_memory_of_an_earlier_term_is_not_a_version() -> None:
    # tail-1 was frozen at version 101. The others went back to 100, and trained on with a standby that has died since.
    def member(restored_term: int) -> TrainingStatus:
        return TrainingStatus(checkpoints=(50, 100), version=101, restored_term=restored_term)

    command = CoordinatorPipeline().start_training(
        head=member(UNIX_MS - 1), body=member(UNIX_MS - 1), tail=member(UNIX_MS - 5000)
    )
    assert (command.version, command.restored_term) == (100, UNIX_MS - 1)


def test_lost_checkpoint_folder_is_a_problem_and_nothing_is_rolled_back() -> None:
    pipeline = CoordinatorPipeline()
    statuses = {"head": status(50, 100), "body": status(50, 100), "tail": status(memory=0)}
    pipeline.quiesce_all(pipeline.expect_quiesce(), **statuses)
    assert pipeline.tick() is None
    assert pipeline.coordinator.phase == "waiting"
    problem = pipeline.coordinator.problem
    assert "stage 'head' has checkpoints of 50 and 100, stage 'tail' has none" in problem
    assert "\n" not in problem
    assert pipeline.coordinator.extend_status(status()).problem == problem
    assert pipeline.tick() is None  # not retried at once
    pipeline.now_s += RETRY_DELAY_S
    command = pipeline.start_training(head=status(50, 100), body=status(50, 100), tail=status(50, 100))
    assert command.version == 100
    assert pipeline.coordinator.problem == ""


def test_failed_restore_is_a_problem_and_is_retried() -> None:
    pipeline = CoordinatorPipeline()
    pipeline.quiesce_all(pipeline.expect_quiesce())
    command = pipeline.tick()
    assert command is not None
    pipeline.restore_all(command, tail="the disk is full")
    assert pipeline.tick() is None
    assert pipeline.coordinator.problem == "stage 'tail', worker 'tail-1': the disk is full"
    pipeline.now_s += RETRY_DELAY_S
    assert pipeline.start_training().term > command.term
    assert pipeline.coordinator.problem == ""


# The status of the leader ---------------------------------------------------------------------------------------------


def test_leader_publishes_the_members_while_sources_may_train() -> None:
    pipeline = CoordinatorPipeline("body-1", "tail-1")
    own = status(50)
    assert pipeline.coordinator.extend_status(own) == own
    pipeline.publish("head-1")
    command = pipeline.expect_quiesce()
    extended = pipeline.coordinator.extend_status(own)
    assert (extended.term, extended.members, extended.checkpoints) == (command.term, {}, (50,))
    pipeline.coordinator.end_term("a test")
    pipeline.start_training()
    extended = pipeline.coordinator.extend_status(own)
    assert (extended.members, extended.term_reason) == (command.members, "a test")


def test_long_texts_fit_the_record() -> None:
    pipeline = CoordinatorPipeline()
    pipeline.quiesce_all(pipeline.expect_quiesce())
    command = pipeline.tick()
    assert command is not None
    pipeline.restore_all(command, tail="x" * 1000)
    extended = pipeline.coordinator.extend_status(status())
    TrainingStatus.model_validate_json(extended.model_dump_json())
