"""Ours in the training benchmark: a worker for each stage, in a process of its own, a broker, and a source here."""

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
from monitor.launch.child_process import ChildProcess, terminate_all
from sources.datasets.dataset import Dataset, Examples
from sources.training.training_loop import TrainingEventDict, TrainingLoop
from stages.training.schedule import ScheduleName
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

    name = "drawn"
    classes = tuple("0123456789")

    def __init__(self, job: TrainingJob) -> None:
        self._examples = Examples(*job.examples())

    def train(self) -> Examples:
        return self._examples

    def test(self) -> Examples:
        return self._examples.first(1)


def run_sparse_pipeline(job: TrainingJob, schedule: ScheduleName, kind: BrokerKind, folder: Path) -> dict[str, Any]:
    """`steps_s`, what each step took, the `losses`, and what the `stages` say of a step: medians, in milliseconds.

    `folder` is empty.
    """
    # The last step leaves a checkpoint behind: it is beyond those that count.
    epochs = -(-(job.warm_up + job.steps + 1) // BATCH_COUNT)
    names = [f"stage-{index}" for index in range(len(job.cuts) + 1)]
    file = folder / "bench.toml"
    stages = "".join(f'[[stage]]\nname = "{name}"\nthreads = 1\n' for name in names)
    file.write_text(
        PIPELINE_TEMPLATE.format(job=job, cuts=list(job.cuts), stages=stages, epochs=epochs, schedule=schedule)
    )
    with start_broker(kind=kind) as broker:
        common = ("--broker", broker.address, "--checkpoints")
        children = [
            ChildProcess(name, ("stage", str(file), name, *common, str(folder / name)), folder / f"{name}.log")
            for name in names
        ]
        try:
            for child in children:
                child.start()
            events = asyncio.run(_train(job, file, broker.address))
        finally:
            terminate_all(children)
    return _figures(job, events)


async def _train(job: TrainingJob, file: Path, address: str) -> list[tuple[float, TrainingEventDict]]:
    """The events of the steps, with the time at which each was done."""
    pipeline = load_pipeline(file)
    events: list[tuple[float, TrainingEventDict]] = []
    line = MessageChannel(MqttTransport(address))
    await line.open()
    try:
        tell = lambda event: events.append((time.monotonic(), event))  # noqa: E731
        training = TrainingLoop(pipeline, RandomDataset(job), "bench", line, tell)
        await training.open()
        await training.run()
        await training.close()
    finally:
        await line.close()
    return events


def _figures(job: TrainingJob, events: list[tuple[float, TrainingEventDict]]) -> dict[str, Any]:
    if wrong := [event for _, event in events if event["event"] != "step"]:
        raise RuntimeError(f"the run was disturbed: {wrong[0]}")
    counted = [event for _, event in events[job.warm_up : job.warm_up + job.steps]]
    return {
        "steps_s": job.step_durations_s([at_s for at_s, _ in events]),
        "losses": [event["loss"] for _, event in events],
        "stages": [
            {name: median(event["time"]["stages"][index][name] for event in counted) for name in STAGE_TIME_KEYS}
            for index in range(len(job.cuts) + 1)
        ],
    }
