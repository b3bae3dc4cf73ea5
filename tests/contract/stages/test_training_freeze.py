"""A worker that is frozen at an unlucky moment, and wakes when another has taken its place: over one hub."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from brokers.dispatch import worker_registry
from brokers.protocol.codec import decode
from brokers.protocol.messages import Message, StepMessage
from brokers.protocol.transport import Delivery
from sources.training import membership as crew
from stages.training import coordinator
from tests.support.brokers.broker_kinds import run_async
from tests.support.training.in_process_parts import assert_bitwise_equal
from tests.support.training.in_process_pipeline import InProcessPipeline, InProcessWorker, shorten_intervals
from tests.support.training.striped_images import StripedImages

SILENT_S = 2.0
EPOCHS = 6
STEPS = 4 * EPOCHS


@pytest.fixture(autouse=True)
def _in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten_intervals(monkeypatch)
    monkeypatch.setattr(worker_registry, "PRESENCE_TIMEOUT_S", SILENT_S)
    monkeypatch.setattr(crew, "PRESENCE_TIMEOUT_S", SILENT_S)
    monkeypatch.setattr(coordinator, "FROZEN_S", SILENT_S / 2)


class Freezer:
    """Freezes the worker that conducts as soon as it has halted itself, and has not heard that the others have."""

    def __init__(self, room: InProcessPipeline, worker: InProcessWorker) -> None:
        self._worker, self._transport = worker, worker.transport
        self._came: list[Any] = []
        self._take, self._publish = self._transport.receive, self._transport.publish
        self._awake = asyncio.Event()
        self.is_frozen = False
        room.on_message = self._hear

    def wake(self) -> None:
        """Have it hear all that has come meanwhile, in order, and say what it was about to say."""
        self._transport.receive = self._take  # type: ignore[method-assign]
        for given in self._came:
            self._take(*given)
        self._awake.set()
        self.is_frozen = False

    def _hear(self, topic: str, message: Message) -> None:
        if not isinstance(message, StepMessage) or self._awake.is_set():
            return
        if message.verb == "quiesce" and topic == self._worker.trainer.inbox:
            self._transport.receive = self._take_own  # type: ignore[assignment, method-assign]
        if message.verb == "quiesced" and message.details["stage"] == self._worker.stage.name:
            self._freeze()

    def _freeze(self) -> None:
        async def publish(*given: Any, **options: Any) -> None:
            await self._awake.wait()
            await self._publish(*given, **options)

        self._transport.publish = publish  # type: ignore[method-assign]
        self.is_frozen = True

    def _take_own(self, delivery: Delivery, *given: Any) -> None:
        trainer, message = self._worker.trainer, None
        if delivery.topic == trainer.inbox:
            message = decode(delivery.properties, delivery.payload)
        own = isinstance(message, StepMessage) and message.details.get("worker") == trainer.worker
        if own and not self.is_frozen:
            self._take(delivery, *given)
        else:
            self._came.append((delivery, *given))


def test_one_that_conducts_and_wakes_while_it_settles_a_term_finds_that_another_has_and_stands_by(
    tmp_path: Path,
) -> None:
    async def test(room: InProcessPipeline) -> None:
        former = room.workers[0]
        await room.add_worker(0, name="zz-standby")
        pupil = await room.add_source()
        running = asyncio.create_task(pupil.training.run())
        await room.wait_for_step(pupil, 3)
        freezer = Freezer(room, former)
        now = pupil.training.membership.term
        assert now is not None
        give_up = StepMessage(request_id=bytes(16), verb="abort", term=now.term, details={"why": "a test wants it"})
        await pupil.channel.send(former.trainer.inbox, give_up)
        await room.wait_for("the freeze", lambda: freezer.is_frozen)
        room.on_event = lambda event: freezer.wake() if event.get("step") == 11 and freezer.is_frozen else None
        await running
        assert pupil.training.completed_steps == STEPS
        assert pupil.events_of_kind("rolled_back")[-1]["from_step"] < 11
        # The others may be through with their last steps before it has read what came while it was frozen.
        await room.wait_for("the one that woke to stand by", lambda: former.trainer.step_queue.is_standby)
        assert room.members["s0"] == "zz-standby"
        assert_bitwise_equal(await room.weights(pupil), room.train_unsplit(["it"] * STEPS, {"it": StripedImages()}))

    room = InProcessPipeline(tmp_path, epochs=EPOCHS, checkpoint_every=4)

    async def whole() -> None:
        await room.start()
        try:
            await test(room)
        finally:
            await room.close()

    run_async(whole())
