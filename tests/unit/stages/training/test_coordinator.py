"""Who trains what, and from which version: what the first stage's worker decides from what it hears."""

from __future__ import annotations

from typing import Any

import pytest

from brokers.dispatch.presence import WorkerRecord
from brokers.dispatch.worker_registry import PRESENCE_TIMEOUT_S
from brokers.protocol.training import TrainingStatus
from stages.training.coordinator import RETRY_DELAY_S, Coordinator, CoordinatorCommand

STAGES = ("head", "body", "tail")
UNIX_MS = 1_700_000_000_000


def birth(worker: str, state: str = "up", *, instance: str = "1", pid: int = 1, **standing: Any) -> WorkerRecord:
    return WorkerRecord.model_validate(
        {
            "worker": worker, "stage": worker.partition("-")[0], "pipeline": "p", "site": "local", "node": "n",
            "pid": pid, "instance": instance, "device": "cpu", "fingerprint": "f", "capacity": 1, "state": state,
            "training": TrainingStatus(**standing),
        }
    )  # fmt: skip


class World:
    """A conductor, the workers around it, and a clock."""

    def __init__(self, *workers: str, own: str = "head-1") -> None:
        self.now_s = 100.0
        self.conductor = Coordinator(own, STAGES)
        for worker in workers or ("head-1", "body-1", "tail-1"):
            self.hear(worker)

    def hear(self, worker: str, *arguments: Any, retained: bool = False, **fields: Any) -> None:
        record = birth(worker, *arguments, **fields)
        self.conductor.on_presence(record.stage, worker, record, self.now_s, retained=retained)

    def die(self, worker: str) -> None:
        self.conductor.on_presence(worker.partition("-")[0], worker, None, self.now_s)

    def look(self) -> CoordinatorCommand | None:
        return self.conductor.next_command(self.now_s, UNIX_MS)

    def halted(self, order: CoordinatorCommand, **standings: TrainingStatus) -> None:
        for stage, worker in order.members.items():
            self.conductor.on_quiesced(stage, worker, order.term, standings.get(stage, TrainingStatus(version=0)))

    def restored(self, order: CoordinatorCommand, **problems: str) -> None:
        for stage, worker in order.members.items():
            self.conductor.on_restored(stage, worker, order.term, self.now_s, problems.get(stage, ""))

    def halt(self) -> CoordinatorCommand:
        """The next order, which begins a term."""
        order = self.look()
        assert order is not None
        assert order.verb == "quiesce"
        assert self.look() is None  # it is told once
        return order

    def open(self, **standings: TrainingStatus) -> CoordinatorCommand:
        """From waiting to open; the order to restore."""
        self.halted(self.halt(), **standings)
        order = self.look()
        assert order is not None
        assert order.verb == "restore"
        self.restored(order)
        assert self.look() is None
        assert self.conductor.phase == "open"
        return order


def kept(*versions: int, memory: int | None = None) -> TrainingStatus:
    return TrainingStatus(checkpoints=versions, version=memory)


# Who is in the crew ---------------------------------------------------------------------------------------------------


def test_a_term_begins_when_every_stage_has_a_worker() -> None:
    world = World("head-1", "body-1")
    assert world.look() is None
    world.hear("tail-1")
    order = world.halt()
    assert order == CoordinatorCommand("quiesce", UNIX_MS, {"head": "head-1", "body": "body-1", "tail": "tail-1"})


def test_a_retained_record_may_have_outlived_its_worker_and_is_in_no_crew() -> None:
    world = World("head-1", "body-1")
    world.hear("tail-1", retained=True)
    assert world.look() is None
    world.hear("tail-1")
    assert world.halt().members["tail"] == "tail-1"


def test_who_was_heard_live_stays_so_when_the_broker_gives_its_record_once_more() -> None:
    world = World("head-1", "body-1")
    world.hear("tail-1")
    world.hear("tail-1", retained=True)
    assert world.halt().members["tail"] == "tail-1"


@pytest.mark.parametrize("state", ["draining", "stopped"])
def test_who_is_leaving_is_in_no_new_crew(state: str) -> None:
    world = World("head-1", "body-1", "tail-1", "tail-2")
    world.hear("tail-1", state)
    assert world.halt().members["tail"] == "tail-2"


def test_who_drains_finishes_its_step_and_breaks_no_term() -> None:
    world = World()
    world.open()
    world.hear("tail-1", "draining")
    assert world.look() is None
    assert world.conductor.phase == "open"


def test_a_worker_that_does_not_train_is_in_no_crew() -> None:
    world = World("head-1", "body-1")
    record = birth("tail-1").model_copy(update={"training": None})
    world.conductor.on_presence("tail", "tail-1", record, world.now_s)
    assert world.look() is None


def test_the_conductor_takes_itself_for_its_own_stage_and_nobody_else() -> None:
    world = World("head-0", "head-1", "body-1", "tail-1")
    assert world.halt().members["head"] == "head-1"


def test_who_was_in_the_crew_stays_in_it() -> None:
    world = World("head-1", "body-1", "tail-2")
    world.open()
    world.hear("tail-1", "standby", kept=(500,))
    world.conductor.end_term("because")
    assert world.halt().members["tail"] == "tail-2"


def test_of_several_newcomers_the_one_with_the_newest_version_is_taken_and_else_the_first_by_name() -> None:
    world = World("head-1", "body-1", "tail-3", "tail-2")
    assert world.halt().members["tail"] == "tail-2"
    world = World("head-1", "body-1", "tail-3", "tail-2")
    world.hear("tail-3", kept=(50, 100))
    assert world.halt().members["tail"] == "tail-3"


# When a term ends -----------------------------------------------------------------------------------------------------


def test_a_worker_that_dies_ends_the_term_and_its_standby_is_in_the_next() -> None:
    world = World()
    first = world.open()
    world.hear("tail-2", "standby")
    assert world.look() is None
    world.die("tail-1")
    order = world.halt()
    assert order.members == {"head": "head-1", "body": "body-1", "tail": "tail-2"}
    assert order.term > first.term
    assert world.conductor.term_reason == "worker tail-1 of stage tail is gone"


def test_without_a_standby_nothing_is_told_until_there_is_one() -> None:
    world = World()
    world.open()
    world.die("tail-1")
    assert world.look() is None
    assert world.conductor.phase == "waiting"
    world.hear("tail-9")
    assert world.halt().members["tail"] == "tail-9"


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"instance": "2"}, "worker tail-1 of stage tail began anew"),
        ({"pid": 2}, "worker tail-1 of stage tail began anew"),
        ({"breaks": 1}, "worker tail-1 of stage tail was cut off for a while"),
    ],
)
def test_a_worker_that_may_have_missed_messages_ends_the_term(fields: dict[str, Any], why: str) -> None:
    world = World()
    first = world.open()
    world.hear("tail-1", **fields)
    assert world.halt().term > first.term
    assert world.conductor.term_reason == why


def test_a_death_is_seen_in_every_phase() -> None:
    world = World("head-1", "body-1", "tail-1", "tail-2")
    halting = world.halt()
    world.die("tail-1")
    again = world.halt()
    assert (again.members["tail"], again.term) == ("tail-2", halting.term + 1)
    world.halted(again)
    restoring = world.look()
    assert restoring is not None
    world.die("tail-2")
    assert world.look() is None
    assert world.conductor.phase == "waiting"


def test_a_worker_that_falls_silent_is_gone() -> None:
    world = World()
    world.open()
    world.now_s += PRESENCE_TIMEOUT_S + 1
    world.hear("head-1")
    world.hear("body-1")
    assert world.look() is None
    assert world.conductor.term_reason == "worker tail-1 of stage tail is gone"


def test_a_step_that_is_given_up_begins_a_term_with_the_same_crew() -> None:
    world = World()
    first = world.open()
    world.conductor.end_term("a source gave up its step")
    order = world.halt()
    assert (order.members, order.term) == (first.members, first.term + 1)
    assert world.conductor.term_reason == "a source gave up its step"


def test_the_first_reason_counts_while_nothing_has_been_settled() -> None:
    world = World()
    world.open()
    world.conductor.end_term("one")
    world.conductor.end_term("other")
    assert world.conductor.term_reason == "one"


# Terms only grow ------------------------------------------------------------------------------------------------------


def test_a_term_is_above_all_that_anybody_knows_and_above_the_clock() -> None:
    world = World()
    world.hear("body-1", term=UNIX_MS + 500)
    assert world.halt().term == UNIX_MS + 501


def test_terms_grow_when_the_clock_stands_still_or_goes_back() -> None:
    world = World()
    terms = []
    for clock in (UNIX_MS, UNIX_MS, UNIX_MS - 10_000, 0):
        order = world.conductor.next_command(world.now_s, clock)
        assert order is not None
        terms.append(order.term)
        world.conductor.end_term("again")
    assert terms == [UNIX_MS, UNIX_MS + 1, UNIX_MS + 2, UNIX_MS + 3]


@pytest.mark.parametrize("other", ["term", "worker", "stage", "phase"])
def test_what_is_said_of_another_term_or_by_a_stranger_changes_nothing(other: str) -> None:
    world = World("head-1", "body-1", "tail-1", "tail-2")
    order = world.halt()
    stranger = "tail-2" if other == "worker" else "tail-1"
    term = order.term - 1 if other == "term" else order.term
    world.conductor.on_quiesced("head", "head-1", order.term, kept(memory=0))
    world.conductor.on_quiesced("body", "body-1", order.term, kept(memory=0))
    if other == "phase":
        world.conductor.on_restored("tail", "tail-1", order.term, world.now_s)
    else:
        world.conductor.on_quiesced("nose" if other == "stage" else "tail", stranger, term, kept(memory=0))
    assert world.look() is None
    assert world.conductor.phase == "halting"


# Versions -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "body", "tail", "version"),
    [
        (kept(memory=0), kept(memory=0), kept(memory=0), 0),
        (kept(50, memory=63), kept(50, memory=63), kept(50, memory=63), 63),
        (kept(50, memory=63), kept(50, memory=63), kept(50), 50),
        (kept(50, 100, memory=100), kept(50, memory=100), kept(50, 100), 100),
        (kept(50, 100, memory=101), kept(50, 100, memory=100), kept(50, 100, memory=101), 100),
        (kept(50, 100), kept(50, 100), kept(50), 50),
        (kept(50), kept(50), kept(), 0),
        (kept(50, memory=50), kept(memory=50), kept(memory=50), 50),
        (kept(50, 100, memory=None), kept(50, 100, memory=None), kept(100, memory=None), 100),
    ],
)
def test_all_go_to_the_newest_version_that_all_have(
    head: TrainingStatus, body: TrainingStatus, tail: TrainingStatus, version: int
) -> None:
    assert World().open(head=head, body=body, tail=tail).version == version


def test_memory_that_was_not_in_the_last_term_is_no_version_of_it() -> None:
    # tail-1 was frozen at version 101; the others went back to 100, and on, with a standby that has died meanwhile.
    world = World()
    order = world.open(
        head=TrainingStatus(checkpoints=(50, 100), version=101, restored_term=UNIX_MS - 1),
        body=TrainingStatus(checkpoints=(50, 100), version=101, restored_term=UNIX_MS - 1),
        tail=TrainingStatus(checkpoints=(50, 100), version=101, restored_term=UNIX_MS - 5000),
    )
    assert order.version == 100


def test_a_checkpoint_folder_that_was_lost_is_told_in_one_line_and_nothing_is_rolled_back() -> None:
    world = World()
    world.halted(world.halt(), head=kept(50, 100), body=kept(50, 100, memory=None), tail=kept(memory=0))
    assert world.look() is None
    assert world.conductor.phase == "waiting"
    problem = world.conductor.problem
    assert "stage 'head' has checkpoints of 50 and 100, stage 'tail' has none" in problem
    assert "start that stage where its checkpoints are, or move all of them away" in problem
    assert "\n" not in problem
    assert len(problem) <= 400  # what a record holds


def test_a_folder_that_is_found_again_mends_it() -> None:
    world = World()
    world.halted(world.halt(), head=kept(50, 100), body=kept(50, 100), tail=kept(memory=0))
    assert world.look() is None
    assert world.look() is None  # not at once
    world.now_s += RETRY_DELAY_S
    order = world.open(head=kept(50, 100), body=kept(50, 100), tail=kept(50, 100))
    assert order.version == 100
    assert world.conductor.problem == ""


def test_a_version_that_cannot_be_restored_is_told_and_tried_again_later() -> None:
    world = World()
    world.halted(world.halt())
    order = world.look()
    assert order is not None
    world.restored(order, tail="no checkpoint at x: the disk is full")
    assert world.look() is None
    assert world.conductor.problem == "stage 'tail', worker 'tail-1': no checkpoint at x: the disk is full"
    world.now_s += RETRY_DELAY_S
    assert world.open().term > order.term
    assert world.conductor.problem == ""


# Who leads ------------------------------------------------------------------------------------------------------------


def leads(world: World, *, leading: bool) -> bool:
    return world.conductor.is_leader(world.now_s, was_leader=leading)


def test_the_only_worker_of_the_first_stage_leads() -> None:
    assert leads(World(), leading=False)
    assert leads(World(), leading=True)


def test_of_those_that_begin_together_the_first_by_name_leads() -> None:
    for own, expected in (("head-1", True), ("head-2", False)):
        world = World("body-1", "tail-1", own=own)
        world.hear("head-1", "standby")
        world.hear("head-2", "standby")
        assert leads(world, leading=False) is expected


def test_who_comes_later_leaves_the_lead_to_whoever_has_it() -> None:
    world = World("body-1", "tail-1", own="head-1")
    world.hear("head-2", "up", term=UNIX_MS)
    assert not leads(world, leading=False)
    world.die("head-2")
    assert leads(world, leading=False)


def test_one_that_drains_leads_until_it_has_gone() -> None:
    world = World("body-1", "tail-1", own="head-1")
    world.hear("head-2", "draining")
    assert not leads(world, leading=False)
    world.hear("head-2", "stopped")
    assert leads(world, leading=False)


@pytest.mark.parametrize(("terms", "leader"), [((7, 8), "head-2"), ((8, 7), "head-1"), ((7, 7), "head-2")])
def test_of_two_leaders_one_stays(terms: tuple[int, int], leader: str) -> None:
    found = []
    for own, term in zip(("head-1", "head-2"), terms, strict=True):
        world = World("body-1", "tail-1", own=own)
        world.conductor.term = term
        for worker, theirs in zip(("head-1", "head-2"), terms, strict=True):
            world.hear(worker, "up", term=theirs)
        if leads(world, leading=True):
            found.append(own)
    assert found == [leader]


@pytest.mark.parametrize("retained", [False, True], ids=["it froze", "its record outlived it"])
def test_a_leader_that_has_fallen_silent_leads_no_more(retained: bool) -> None:
    world = World("body-1", "tail-1", own="head-1")
    world.hear("head-0", "up", term=UNIX_MS, retained=retained)
    world.hear("head-1", "standby")
    assert not leads(world, leading=False)
    world.now_s += PRESENCE_TIMEOUT_S + 1
    assert leads(world, leading=False)


def test_a_worker_of_another_stage_is_no_rival() -> None:
    world = World("body-1", "tail-1", own="head-1")
    record = birth("body-1").model_copy(update={"worker": "a"})
    world.conductor.on_presence("body", "a", record, world.now_s)
    assert leads(world, leading=False)
