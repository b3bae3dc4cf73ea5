"""Sparse in the training benchmark: one worker process for each stage, a broker, and a source in this process."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from statistics import median
from typing import Any

from brokers.config.pipeline_file import load_pipeline
from brokers.dispatch.channel import MessageChannel
from brokers.mqtt.client import MqttTransport
from brokers.server.local_broker import BrokerKind, start_broker
from sources.datasets.dataset import Dataset, Examples
from sources.training.training_loop import TrainingEventDict, TrainingLoop
from stages.training.step_queue import ScheduleName
from tests.bench.harness.processes import start_stages
from tests.bench.training_peers.job import BATCH_COUNT, TrainingJob

STAGE_TIME_KEYS = ("queue_ms", "decode_ms", "forward_ms", "backward_ms", "encode_ms", "commit_ms")
PIPELINE_TEMPLATE = """
[pipeline]
name = "bench"
kind = "training"
model = "{job.model}"
cuts = {cuts}
{stages}
[training]
batch = {job.batch}
micro_batches = {job.micro_batches}
epochs = {epochs}
lr = {job.lr}
settings = {{momentum = {job.momentum}}}
schedule = "{schedule}"
shuffle = false
evaluate_every = 0
checkpoint_every = 1000000
"""


class RandomDataset(Dataset):
    """The examples of a job."""

    name = "random"
    classes = tuple("0123456789")

    def __init__(self, job: TrainingJob) -> None:
        self._examples = Examples(*job.examples())

    def train(self) -> Examples:
        return self._examples

    def test(self) -> Examples:
        return self._examples.first(1)


def run_sparse_pipeline(job: TrainingJob, schedule: ScheduleName, kind: BrokerKind, folder: Path) -> dict[str, Any]:
    """`steps_s`, the duration of each step, `losses`, and `stages`: median milliseconds of a step by stage.

    `folder` must be empty.
    """
    # The last step includes a checkpoint, so one more than the measured steps is needed.
    epochs = -(-(job.warm_up + job.steps + 1) // BATCH_COUNT)
    names = [f"stage-{index}" for index in range(len(job.cuts) + 1)]
    file = folder / "bench.toml"
    stages = "".join(f'[[stage]]\nname = "{name}"\nthreads = 1\n' for name in names)
    file.write_text(
        PIPELINE_TEMPLATE.format(job=job, cuts=list(job.cuts), stages=stages, epochs=epochs, schedule=schedule)
    )
    options = {name: ("--checkpoints", str(folder / name)) for name in names}
    with start_broker(kind=kind) as broker, start_stages(file, broker.address, folder, options):
        return _summarize(job, asyncio.run(_train(job, file, broker.address)))


async def _train(job: TrainingJob, file: Path, address: str) -> list[tuple[float, TrainingEventDict]]:
    """The events of the run, each with its time."""
    events: list[tuple[float, TrainingEventDict]] = []

    def on_event(event: TrainingEventDict) -> None:
        events.append((time.monotonic(), event))

    channel = MessageChannel(MqttTransport(address))
    await channel.open()
    try:
        training = TrainingLoop(load_pipeline(file), RandomDataset(job), "bench", channel, on_event)
        await training.open()
        await training.run()
        await training.close()
    finally:
        await channel.close()
    return events


def _summarize(job: TrainingJob, events: list[tuple[float, TrainingEventDict]]) -> dict[str, Any]:
    if unexpected := [event for _, event in events if event["event"] != "step"]:
        raise RuntimeError(f"the run was disturbed: {unexpected[0]}")
    measured = [event for _, event in events[job.warm_up : job.warm_up + job.steps]]
    return {
        "steps_s": job.step_durations_s([time_s for time_s, _ in events]),
        "losses": [event["loss"] for _, event in events],
        "stages": [
            {key: median(event["time"]["stages"][index][key] for event in measured) for key in STAGE_TIME_KEYS}
            for index in range(len(job.cuts) + 1)
        ],
    }
