"""A training coordinator with the workers that it knows and a clock, without transport."""

from __future__ import annotations

from typing import Any

from brokers.dispatch.presence import WorkerRecord
from brokers.protocol.training import TrainingStatus
from stages.training.coordinator import LISTEN_S, Coordinator, CoordinatorCommand
from tests.support.brokers.presence_records import make_worker_record

STAGES = ("head", "body", "tail")
UNIX_MS = 1_700_000_000_000
LEASE_S = 60.0


def record(worker: str, state: str = "up", *, instance: str = "1", pid: int = 1, **status: Any) -> WorkerRecord:
    """The record of a worker whose id begins with the name of its stage."""
    stage = worker.partition("-")[0]
    training = TrainingStatus.model_validate(status)
    return make_worker_record(worker, stage=stage, pid=pid, instance=instance, state=state, training=training)


class CoordinatorPipeline:
    """A coordinator in the worker `own`, the workers that it knows, and a clock."""

    def __init__(self, *workers: str, own: str = "head-1", is_listening: bool = False) -> None:
        self.now_s = 100.0
        self.coordinator = Coordinator(own, STAGES, LEASE_S)
        for worker in workers or ("head-1", "body-1", "tail-1"):
            self.publish(worker)
        if not is_listening:
            self.tick()
            self.now_s += LISTEN_S

    def publish(self, worker: str, state: str = "up", *, is_live: bool = True, **fields: Any) -> None:
        self.coordinator.on_worker(record(worker, state, **fields), is_live=is_live)

    def lose(self, worker: str) -> None:
        self.coordinator.on_worker_lost(worker.partition("-")[0], worker)

    def tick(self, **sources: Any) -> CoordinatorCommand | None:
        commands = self.coordinator.tick(self.now_s, UNIX_MS, **sources)
        assert len(commands) <= 1
        return commands[0] if commands else None

    def quiesce_all(self, command: CoordinatorCommand, **statuses: TrainingStatus) -> None:
        for stage, worker in command.members.items():
            self.coordinator.on_quiesced(stage, worker, command.term, statuses.get(stage, TrainingStatus(version=0)))

    def restore_all(self, command: CoordinatorCommand, **problems: str) -> None:
        for stage, worker in command.members.items():
            self.coordinator.on_restored(stage, worker, command.term, self.now_s, problems.get(stage, ""))

    def expect_quiesce(self) -> CoordinatorCommand:
        command = self.tick()
        assert command is not None
        assert command.verb == "quiesce"
        assert self.tick() is None  # a command is given once
        return command

    def start_training(self, **statuses: TrainingStatus) -> CoordinatorCommand:
        """Go through a term until sources may train; return the command to restore."""
        self.quiesce_all(self.expect_quiesce(), **statuses)
        command = self.tick()
        assert command is not None
        assert command.verb == "restore"
        self.restore_all(command)
        assert self.tick() is None
        assert self.coordinator.phase == "training"
        return command

    def pass_time(self, seconds: float, **sources: Any) -> None:
        """Tick each second, without a command."""
        for _ in range(int(seconds)):
            self.now_s += 1
            assert self.tick(**sources) is None

    def is_leader(self) -> bool:
        self.tick()
        return self.coordinator.is_leader


def status(*checkpoints: int, memory: int | None = None) -> TrainingStatus:
    return TrainingStatus(checkpoints=checkpoints, version=memory)
