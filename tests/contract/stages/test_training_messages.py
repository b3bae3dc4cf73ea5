"""Training over an in-memory broker: stale, hostile and duplicate messages change nothing."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

from brokers.dispatch.channel import MessageChannel
from brokers.protocol.messages import (
    Failure,
    Gradient,
    Message,
    ReplyTo,
    Result,
    StepMessage,
    StepVerb,
    Task,
    TensorContent,
    new_request_id,
)
from brokers.protocol.safetensors_codec import from_array
from brokers.protocol.training import MICRO_BATCH_KEY, MicroBatch
from stages.loading.network_digest import NETWORK_KEY
from tests.support.brokers.channel_ends import MessageRecorder
from tests.support.brokers.in_memory import MemoryTransport
from tests.support.training.in_process_pipeline import (
    STEPS,
    InProcessPipeline,
    assert_weights,
    run_with_pipeline,
)
from tests.support.training.striped_images import StripedImages

FOREIGN_INBOX = "foreign/inbox"


async def open_foreign_client(pipeline: InProcessPipeline) -> tuple[MessageChannel, MessageRecorder]:
    channel = MessageChannel(MemoryTransport(pipeline.hub))
    recorder = MessageRecorder()
    await channel.open()
    await channel.subscribe(FOREIGN_INBOX, recorder.on_message, recorder.on_malformed)
    return channel, recorder


def foreign_task(term: int, micro_batch: str = "", **change: Any) -> Task:
    """A task of one row, for a micro-batch with these changes, or with this text in its place."""
    fields = {"step": new_request_id().hex(), "index": 0, "count": 1, "rows": 1, "number": 0, "seed": 0, **change}
    text = micro_batch or MicroBatch(term=term, **fields).to_json()
    tensors = {"input": from_array(StripedImages().train().inputs[:1])}
    content = TensorContent(tensors, {MICRO_BATCH_KEY: text})
    return Task(
        request_id=new_request_id(), content=content, reply_to=ReplyTo(FOREIGN_INBOX), sender_inbox=FOREIGN_INBOX
    )


def step_message(verb: StepVerb, term: int, **details: Any) -> StepMessage:
    return StepMessage(request_id=new_request_id(), verb=verb, term=term, details=details)


def foreign_messages(term: int) -> list[Message]:
    """Messages that no worker may act on."""
    content = TensorContent({})
    verbs: tuple[StepVerb, ...] = ("commit", "quiesce", "restore", "prepared", "abort", "quiesced", "restored")
    messages: list[Message] = [
        Gradient(request_id=new_request_id(), content=content, sender_inbox=FOREIGN_INBOX),
        foreign_task(term - 1),
        *(replace(step_message(verb, term - 1), sender_inbox=FOREIGN_INBOX) for verb in verbs),
        replace(step_message("commit", term), sender_inbox=FOREIGN_INBOX),
        *(step_message("quiesce", term + 1, members=members) for members in (7, ["s0"], None)),
        step_message("restore", term),
        Failure(request_id=new_request_id(), stage="s", worker="w", error="E", reason="r"),
        Result(request_id=new_request_id(), content=content),
    ]
    versions: tuple[Any, ...] = ("x", None, [], -1, 7)
    for version in versions:
        messages.append(step_message("restore", term, version=version, restored_term=0))
        messages.append(step_message("fetch_weights", term, version=version))
    return messages


def test_stale_and_foreign_messages_change_nothing(tmp_path: Path) -> None:
    async def test(pipeline: InProcessPipeline) -> None:
        channel, recorder = await open_foreign_client(pipeline)
        source = await pipeline.add_source()
        running = asyncio.create_task(source.training.run())
        await pipeline.wait_for_step(source, 1)
        gradients = [message for _, message in pipeline.messages if isinstance(message, Gradient)][:3]
        for worker in pipeline.workers:
            for gradient in gradients:  # again, and to the wrong workers
                await channel.send(worker.inbox, replace(gradient, sender_inbox=FOREIGN_INBOX))
            for message in foreign_messages(pipeline.workers[0].term):
                await channel.send(worker.inbox, message)
        await running
        assert all(worker.is_running for worker in pipeline.workers)
        await assert_weights(pipeline, source)
        assert pipeline.sources_by_version() == ["source"] * STEPS
        failures = set()
        while not recorder.messages.empty():
            failure = recorder.messages.get_nowait()
            if isinstance(failure, Failure):
                failures.add((failure.error, failure.retry))
        assert failures == {("UnknownForward", False), ("StaleTerm", True), ("BadStep", False)}
        await channel.close()

    run_with_pipeline(tmp_path, test)


def test_task_that_is_not_a_micro_batch_is_refused(tmp_path: Path) -> None:
    valid = MicroBatch(step="a" * 32, term=0, index=0, count=1, rows=1, number=0, seed=0).to_json()
    hostile = ("null", "[]", "{}", valid.replace("a" * 32, "z" * 32), valid.replace('"count":1', '"count":"1"'))

    async def test(pipeline: InProcessPipeline) -> None:
        channel, recorder = await open_foreign_client(pipeline)
        source = await pipeline.add_source()
        for worker in pipeline.workers:
            for text in hostile:
                await channel.send(worker.inbox, foreign_task(0, text))
                failure = await recorder.next_message()
                assert isinstance(failure, Failure)
                assert (failure.error, failure.retry) == ("BadProperty", False)
                assert MICRO_BATCH_KEY in failure.reason
        await source.training.run()
        assert {worker.worker.counters["malformed"] for worker in pipeline.workers} == {len(hostile)}
        await channel.close()

    run_with_pipeline(tmp_path, test, epochs=1)


def test_step_that_is_not_the_next_of_its_source_is_refused(tmp_path: Path) -> None:
    async def test(pipeline: InProcessPipeline) -> None:
        channel, recorder = await open_foreign_client(pipeline)
        await pipeline.train()
        head = pipeline.active_worker(0)
        task = replace(foreign_task(head.term, number=5), source="source")
        await channel.send(head.inbox, task)
        failure = await recorder.next_message()
        assert isinstance(failure, Failure)
        assert (failure.error, failure.retry) == ("StaleStep", True)
        assert failure.reason == "the next step of source 'source' is 4 (from 0), not 5"
        assert head.version == 4
        await channel.close()

    run_with_pipeline(tmp_path, test, epochs=1)


def test_activations_of_another_network_are_refused(tmp_path: Path) -> None:
    async def test(pipeline: InProcessPipeline) -> None:
        channel, recorder = await open_foreign_client(pipeline)
        await pipeline.train()
        head = pipeline.active_worker(0)
        task = replace(foreign_task(head.term, number=head.version), source="source")
        assert isinstance(task.content, TensorContent)
        content = TensorContent(task.content.tensors, {**task.content.metadata, NETWORK_KEY: "other"})
        await channel.send(head.inbox, replace(task, content=content))
        failure = await recorder.next_message()
        assert isinstance(failure, Failure)
        assert (failure.error, failure.retry) == ("OtherNetwork", False)
        await channel.close()

    run_with_pipeline(tmp_path, test, epochs=1)


def test_duplicate_messages_change_nothing(tmp_path: Path) -> None:
    """Every message to a stage arrives twice, as it may over a bridge that was disconnected."""

    async def test(pipeline: InProcessPipeline) -> None:
        channel, _ = await open_foreign_client(pipeline)
        sends: set[asyncio.Task[None]] = set()
        seen: set[tuple[str, bytes, type[Message], object]] = set()

        def send_again(topic: str, message: Message) -> None:
            key = (topic, message.request_id, type(message), getattr(message, "verb", None))
            if topic.split("/")[-2] == "in" and key not in seen and not isinstance(message, Failure):
                seen.add(key)
                send = asyncio.create_task(channel.send(topic, message))
                sends.add(send)
                send.add_done_callback(sends.discard)

        pipeline.on_message = send_again
        source = await pipeline.train()
        await assert_weights(pipeline, source)
        assert pipeline.sources_by_version() == ["source"] * STEPS
        assert pipeline.saved_activations == 0
        await asyncio.gather(*sends)
        await channel.close()

    run_with_pipeline(tmp_path, test)
