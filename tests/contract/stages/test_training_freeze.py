"""A coordinator that is frozen in the middle of a term, and resumes when another worker leads."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from brokers.dispatch import worker_registry
from brokers.protocol.codec import decode
from brokers.protocol.messages import Message, StepMessage
from brokers.protocol.transport import Delivery
from stages.training import coordinator
from tests.support.training.in_process_parts import assert_bitwise_equal
from tests.support.training.in_process_pipeline import (
    InProcessPipeline,
    InProcessWorker,
    run_with_pipeline,
)
from tests.support.training.striped_images import StripedImages

PRESENCE_TIMEOUT_S = 2.0
EPOCHS = 6
STEPS = 4 * EPOCHS


@pytest.fixture(autouse=True)
def _short_presence_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_registry, "PRESENCE_TIMEOUT_S", PRESENCE_TIMEOUT_S)
    monkeypatch.setattr(coordinator, "FROZEN_S", PRESENCE_TIMEOUT_S / 2)


class Freezer:
    """Freezes the coordinator's worker after it has quiesced itself, before it receives the answers of the others."""

    def __init__(self, pipeline: InProcessPipeline, worker: InProcessWorker) -> None:
        self._worker = worker
        self._transport = worker.transport
        self._held_back: list[Any] = []
        self._receive = self._transport.receive
        self._publish = self._transport.publish
        self._resumed = asyncio.Event()
        self.is_frozen = False
        pipeline.on_message = self._on_message

    def resume(self) -> None:
        """Receive all messages that were held back, in order, and send the pending ones."""
        self._transport.receive = self._receive  # type: ignore[method-assign]
        for arguments in self._held_back:
            self._receive(*arguments)
        self._resumed.set()
        self.is_frozen = False

    def _on_message(self, topic: str, message: Message) -> None:
        if not isinstance(message, StepMessage) or self._resumed.is_set():
            return
        if message.verb == "quiesce" and topic == self._worker.inbox:
            self._transport.receive = self._receive_own  # type: ignore[assignment, method-assign]
        if message.verb == "quiesced" and message.details["stage"] == self._worker.stage.name:
            self._freeze()

    def _freeze(self) -> None:
        async def publish(*arguments: Any, **options: Any) -> None:
            await self._resumed.wait()
            await self._publish(*arguments, **options)

        self._transport.publish = publish  # type: ignore[method-assign]
        self.is_frozen = True

    def _receive_own(self, delivery: Delivery, *arguments: Any) -> None:
        message = decode(delivery.properties, delivery.payload) if delivery.topic == self._worker.inbox else None
        is_own = isinstance(message, StepMessage) and message.details.get("worker") == self._worker.name
        if is_own and not self.is_frozen:
            self._receive(delivery, *arguments)
        else:
            self._held_back.append((delivery, *arguments))


def test_coordinator_that_was_frozen_stands_by(tmp_path: Path) -> None:
    async def test(pipeline: InProcessPipeline) -> None:
        former = pipeline.workers[0]
        await pipeline.add_worker(0, "zz-standby")
        source = await pipeline.add_source()
        running = asyncio.create_task(source.training.run())
        await pipeline.wait_for_step(source, 3)
        freezer = Freezer(pipeline, former)
        abort = StepMessage(request_id=bytes(16), verb="abort", term=former.term, details={"reason": "a test"})
        await source.channel.send(former.inbox, abort)
        await pipeline.wait_for("the freeze", lambda: freezer.is_frozen)
        pipeline.on_event = lambda event: freezer.resume() if event.get("step") == 11 and freezer.is_frozen else None
        await running
        assert source.completed_steps == STEPS
        assert source.events_of_kind("rolled_back")[-1]["from_step"] < 11
        # The others may finish before it has processed the messages that were held back.
        await pipeline.wait_for("the standby", lambda: former.worker.step_queue.is_standby)
        assert pipeline.members["s0"] == "zz-standby"
        expected = pipeline.train_unsplit(["source"] * STEPS, {"source": StripedImages()})
        assert_bitwise_equal(await pipeline.weights(source), expected)

    run_with_pipeline(tmp_path, test, epochs=EPOCHS, checkpoint_every=4)
