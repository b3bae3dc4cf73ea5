"""Faults while a network is trained: the final weights equal those of the undisturbed, unsplit network bit for bit."""

from __future__ import annotations

import asyncio
import random
import signal
import time

import pytest

from brokers.mqtt.client import MqttTransport
from brokers.server.local_broker import start_broker
from tests.soak.conftest import PrintLine, sizes
from tests.soak.harness.hostile_messages import MessageMutator
from tests.soak.harness.training_run import (
    STAGES,
    STEPS_PER_EPOCH,
    TrainingRunCommand,
    assert_weights_equal,
    expected_weights,
    write_training_pipeline_file,
)
from tests.support.pipelines.processes import ProcessSandbox

STEPS = 60
EPOCHS = STEPS // STEPS_PER_EPOCH


@pytest.mark.parametrize("kills", sizes(3, 10))
def test_killed_stages_do_not_change_the_weights(
    sandbox: ProcessSandbox, kills: int, soak_factor: int, print_line: PrintLine
) -> None:
    rng = random.Random(4)
    steps = STEPS * soak_factor
    path = write_training_pipeline_file(sandbox.folder, epochs=steps // STEPS_PER_EPOCH)
    run = TrainingRunCommand(sandbox, path)
    killed = []
    for step in sorted(rng.sample(range(2, steps - 5), kills * soak_factor)):
        run.wait_for_step(step)
        time.sleep(rng.uniform(0, 0.1))  # to hit any phase of a step
        killed.append(rng.choice(STAGES))
        run.kill("stage", killed[-1])
    summary = run.wait()
    assert summary["steps"] == steps
    assert summary["rollbacks"] >= 1
    assert_weights_equal(run.load_weights(), expected_weights(steps))
    print_line(
        f"{len(killed)} kills in {steps} steps: {summary['rollbacks']} rollbacks, "
        f"{summary['repeated_steps']} steps repeated, {summary['elapsed_s']:.0f} s"
    )


def test_killed_broker_does_not_change_the_weights(
    sandbox: ProcessSandbox, require_mosquitto: None, print_line: PrintLine
) -> None:
    path = write_training_pipeline_file(sandbox.folder, epochs=10)
    run = TrainingRunCommand(sandbox, path, "--broker", "mosquitto")
    for step in (5, 14):
        run.wait_for_step(step)
        run.kill_broker()
    summary = run.wait()
    assert_weights_equal(run.load_weights(), expected_weights(30))
    print_line(f"2 brokers killed in 30 steps: {summary['rollbacks']} rollbacks, {summary['elapsed_s']:.0f} s")


def test_run_with_killed_source_is_resumed_without_repeating_steps(sandbox: ProcessSandbox) -> None:
    path = write_training_pipeline_file(sandbox.folder, epochs=10)
    first = TrainingRunCommand(sandbox, path)
    first.wait_for_step(11)
    first.kill("source")
    result = first.command.wait()
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    second = TrainingRunCommand(sandbox, path, resume=first.folder)
    summary = second.wait()
    assert summary["steps"] == 30
    assert second.events()[-1]["step"] == 30
    # The stages may have committed a step of which the source had not been informed: it is not repeated either.
    (resumed,) = second.events("resumed")
    assert resumed["step"] >= 11
    assert_weights_equal(second.load_weights(), expected_weights(30))


def test_standby_worker_replaces_a_killed_worker(sandbox: ProcessSandbox, print_line: PrintLine) -> None:
    path = write_training_pipeline_file(sandbox.folder, epochs=EPOCHS, workers=2)
    run = TrainingRunCommand(sandbox, path)
    for step, name in zip((4, 17, 30), STAGES, strict=True):
        run.wait_for_step(step)
        run.kill("stage", "--worker", run.worker_of(name))
    run.wait()
    assert_weights_equal(run.load_weights(), expected_weights(STEPS))
    waits_ms = [event["waited_ms"] for event in run.events("rolled_back")]
    print_line(f"3 takeovers, after {', '.join(f'{wait_ms:.0f}' for wait_ms in waits_ms)} ms")


def test_hostile_messages_do_not_change_the_weights(
    sandbox: ProcessSandbox, require_mosquitto: None, print_line: PrintLine
) -> None:
    path = write_training_pipeline_file(sandbox.folder, epochs=EPOCHS)
    inboxes = [f"sparse/local/training/{name}/in/{name}-1" for name in STAGES] + ["sparse/local/source/stripes/inbox"]

    async def attack(run: TrainingRunCommand, address: str) -> int:
        """Publish hostile messages to all inboxes until the run ends; return how many."""
        mutator = MessageMutator(3)
        sent = 0
        transport = MqttTransport(address)
        await transport.connect()
        while run.command.process.poll() is None:
            for topic in inboxes:
                message = mutator.next_message(inboxes)
                await transport.publish(topic, message.payload, message.properties)
                sent += 1
            await asyncio.sleep(0.005)
        await transport.close()
        return sent

    with start_broker(kind="mosquitto") as broker:
        run = TrainingRunCommand(sandbox, path, "--broker", broker.address)
        run.wait_for_step(3)
        sent = asyncio.run(attack(run, broker.address))
    summary = run.wait()
    assert sent > 0
    assert_weights_equal(run.load_weights(), expected_weights(STEPS))
    print_line(f"{sent} hostile messages: {summary['rollbacks']} rollbacks")


@pytest.mark.parametrize("stages", sizes(["head"], list(STAGES)))
@pytest.mark.timeout(900)
def test_frozen_worker_is_replaced_and_ignored_when_it_continues(sandbox: ProcessSandbox, stages: list[str]) -> None:
    path = write_training_pipeline_file(sandbox.folder, epochs=EPOCHS, workers=2)
    run = TrainingRunCommand(sandbox, path)
    run.wait_for_step(5)
    for name in stages:
        frozen = run.find_process("stage", "--worker", run.worker_of(name))
        frozen.suspend()
        run.wait_for_step(run.last_step + 3)
        frozen.resume()
        run.wait_for_step(run.last_step + 3)
    summary = run.wait()
    assert summary["rollbacks"] >= len(stages)
    assert_weights_equal(run.load_weights(), expected_weights(STEPS))


def test_terminated_worker_loses_no_step(sandbox: ProcessSandbox) -> None:
    path = write_training_pipeline_file(sandbox.folder, epochs=10)
    run = TrainingRunCommand(sandbox, path)
    run.wait_for_step(5)
    run.find_process("stage", "body").terminate()
    run.wait()
    steps = [event["step"] for event in run.events("step")]
    assert steps == list(range(1, 31))
    assert_weights_equal(run.load_weights(), expected_weights(30))


def test_interrupted_run_is_resumed_at_its_last_step(sandbox: ProcessSandbox) -> None:
    path = write_training_pipeline_file(sandbox.folder, epochs=10)
    first = TrainingRunCommand(sandbox, path)
    first.wait_for_step(5)
    assert first.command.wait(signal.SIGINT).returncode == 130
    last_step = first.events("step")[-1]["step"]
    second = TrainingRunCommand(sandbox, path, resume=first.folder)
    second.wait()
    assert [event["step"] for event in second.events("resumed")] == [last_step]
    assert_weights_equal(second.load_weights(), expected_weights(30))
