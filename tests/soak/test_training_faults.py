"""Whatever is killed while a network is trained: its final weights are those of the undisturbed, uncut run."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path

import pytest

from brokers.mqtt.client import MqttTransport
from brokers.server.local_broker import start_broker
from tests.soak.conftest import PrintLine
from tests.soak.harness.hostile_messages import MessageMutator
from tests.soak.harness.training_run import (
    STAGES,
    TrainingRunCommand,
    assert_weights_equal,
    expected_weights,
    write_training_pipeline_file,
)
from tests.support.pipelines.processes import ProcessSandbox

STEPS = 60
KILLS, SHORT_KILLS = 10, 3


def test_stages_that_are_killed_at_random_moments_change_no_bit(
    sandbox: ProcessSandbox, is_long_run: bool, print_line: PrintLine
) -> None:
    chance = random.Random(4)
    path = write_training_pipeline_file(sandbox.folder, epochs=STEPS // 3)
    lesson = TrainingRunCommand(sandbox, path)
    killed = []
    for moment in sorted(chance.sample(range(2, STEPS - 5), KILLS if is_long_run else SHORT_KILLS)):
        lesson.wait_for_step(moment)
        time.sleep(chance.uniform(0, 0.1))  # anywhere in a step
        killed.append(chance.choice(STAGES))
        lesson.kill("stage", killed[-1])
    summary = lesson.wait()
    assert summary["steps"] == STEPS
    assert summary["rollbacks"] >= 1
    assert_weights_equal(lesson.load_weights(), expected_weights(STEPS))
    print_line(
        f"{len(killed)} kills in {STEPS} steps ({', '.join(killed)}): {summary['rollbacks']} times back, "
        f"{summary['repeated_steps']} steps done again, {summary['elapsed_s']:.0f} s; weights equal bit for bit"
    )


def test_a_broker_that_is_killed_while_a_network_is_trained_changes_no_bit(
    sandbox: ProcessSandbox, mosquitto: None, print_line: PrintLine
) -> None:
    path = write_training_pipeline_file(sandbox.folder, epochs=10)
    lesson = TrainingRunCommand(sandbox, path, "--broker", "mosquitto")
    for step in (5, 14):
        lesson.wait_for_step(step)
        lesson.kill_broker()
    summary = lesson.wait()
    assert_weights_equal(lesson.load_weights(), expected_weights(30))
    print_line(f"2 brokers killed in 30 steps: {summary['rollbacks']} times back, {summary['elapsed_s']:.0f} s")


def test_a_run_whose_source_is_killed_goes_on_with_resume_and_changes_no_bit(sandbox: ProcessSandbox) -> None:
    path = write_training_pipeline_file(sandbox.folder, epochs=10)
    first = TrainingRunCommand(sandbox, path)
    first.wait_for_step(11)
    first.kill("source")
    said = first.command.wait()
    assert said.returncode == 1
    assert "Traceback" not in said.stderr
    second = TrainingRunCommand(sandbox, path, resume=first.folder)
    summary = second.wait()
    assert summary["steps"] == 30
    assert second.events()[-1]["step"] == 30
    # The others had what the source had not heard of any more: nothing that was committed is done again.
    (resumed,) = [event["step"] for event in second.events() if event["event"] == "resumed"]
    assert resumed >= 11
    assert_weights_equal(second.load_weights(), expected_weights(30))


def test_a_second_worker_stands_by_and_takes_over_at_once(sandbox: ProcessSandbox, print_line: PrintLine) -> None:
    path = write_training_pipeline_file(sandbox.folder, epochs=20, workers=2)
    lesson = TrainingRunCommand(sandbox, path)
    for step, name in zip((4, 17, 30), STAGES, strict=True):
        lesson.wait_for_step(step)
        lesson.kill("stage", "--worker", lesson.worker_of(name))
    lesson.wait()
    assert_weights_equal(lesson.load_weights(), expected_weights(STEPS))
    waits = [event["waited_ms"] for event in lesson.events() if event["event"] == "rolled_back"]
    print_line(f"3 takeovers, each after {', '.join(f'{wait:.0f}' for wait in waits)} ms")


def test_whatever_strangers_write_to_workers_that_train_and_their_source_changes_no_bit(
    sandbox: ProcessSandbox, mosquitto: None, print_line: PrintLine
) -> None:
    path = write_training_pipeline_file(sandbox.folder, epochs=20)
    with start_broker(kind="mosquitto") as broker:
        lesson, sent = _taught_among_strangers(sandbox, path, broker.address)
    summary = lesson.wait()
    assert sent > 200
    assert_weights_equal(lesson.load_weights(), expected_weights(STEPS))
    print_line(f"{sent} hostile messages: {summary['rollbacks']} times back, weights equal bit for bit")


def _taught_among_strangers(sandbox: ProcessSandbox, path: Path, address: str) -> tuple[TrainingRunCommand, int]:
    """A lesson that has come to its end, and how many messages strangers have written meanwhile."""
    lesson = TrainingRunCommand(sandbox, path, "--broker", address)
    lesson.wait_for_step(3)
    inboxes = [f"sparse/local/lesson/{name}/in/{name}-1" for name in STAGES] + ["sparse/local/source/stripes/inbox"]

    async def attack() -> int:
        mutator, sent = MessageMutator(3), 0
        transport = MqttTransport(address)
        await transport.connect()
        while lesson.command.process.poll() is None:
            for topic in inboxes:
                message = mutator.next_message(inboxes)
                await transport.publish(topic, message.payload, message.properties)
                sent += 1
            await asyncio.sleep(0.005)
        await transport.close()
        return sent

    return lesson, asyncio.run(attack())


def test_a_frozen_worker_is_replaced_and_what_it_says_when_it_wakes_changes_nothing(
    sandbox: ProcessSandbox, is_long_run: bool
) -> None:
    path = write_training_pipeline_file(sandbox.folder, epochs=20, workers=2)
    lesson = TrainingRunCommand(sandbox, path)
    lesson.wait_for_step(5)
    for name in ("head", "body") if is_long_run else ("head",):
        frozen = lesson.find_process("stage", "--worker", lesson.worker_of(name))
        frozen.suspend()
        lesson.wait_for_step(lesson.last_step + 3)
        frozen.resume()
        lesson.wait_for_step(lesson.last_step + 3)
    summary = lesson.wait()
    assert summary["rollbacks"] >= 1
    assert_weights_equal(lesson.load_weights(), expected_weights(STEPS))


@pytest.mark.parametrize("how", ["interrupted", "told to leave"])
def test_a_worker_or_a_run_that_is_told_to_leave_loses_no_step(sandbox: ProcessSandbox, how: str) -> None:
    path = write_training_pipeline_file(sandbox.folder, epochs=10)
    lesson = TrainingRunCommand(sandbox, path)
    lesson.wait_for_step(5)
    if how == "told to leave":
        lesson.find_process("stage", "body").terminate()
        lesson.wait()
        done = [event["step"] for event in lesson.events() if event["event"] == "step"]
        assert done == sorted(set(done)), "a step was done twice"
    else:
        said = lesson.command.wait(2)
        assert said.returncode == 130
        left = [event["step"] for event in lesson.events() if event["event"] == "step"][-1]
        lesson = TrainingRunCommand(sandbox, path, resume=lesson.folder)
        lesson.wait()
        assert [event["step"] for event in lesson.events() if event["event"] == "resumed"] == [left]
    assert_weights_equal(lesson.load_weights(), expected_weights(30))
