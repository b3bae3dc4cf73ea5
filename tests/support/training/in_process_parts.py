"""All parts of a network in one process, trained as their workers train them: no broker, no threads, every bit."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from brokers.config.pipeline_file import Pipeline
from brokers.protocol.training import LABELS_TENSOR, MicroBatch, micro_batch_seed
from stages.training.part_trainer import MicroBatchMetrics, PartTrainer
from stages.training.schedule import ScheduledOp, ScheduleName, operations
from tests.support.environment.checkout import ROOT

StepBatch = Sequence[tuple[Tensor, Tensor]]  # the micro-batches of a step: inputs (B, ...), labels (B)


def make_training_pipeline(
    model: str,
    cuts: Sequence[int],
    *,
    seed: int = 3,
    model_settings: Mapping[str, Any] | None = None,
    name: str = "lesson",
    **training: Any,
) -> Pipeline:
    """A pipeline that trains `model`, cut there; its stages are called s0, s1, ..."""
    return Pipeline.model_validate(
        {
            "path": str(ROOT / "lesson.toml"),
            "pipeline": {
                "name": name,
                "kind": "training",
                "model": model,
                "cuts": list(cuts),
                "seed": seed,
                "model_settings": dict(model_settings or {}),
            },
            "stage": [{"name": f"s{index}"} for index in range(len(cuts) + 1)],
            "source": {"kind": "tests.support.training.striped_images:StripedImages", "name": "stripes"},
            "training": training,
        }
    )


class InProcessParts:
    """A learner for each stage, and the steps they do together."""

    def __init__(self, pipeline: Pipeline, *, seed: int = 0) -> None:
        self.pipeline, self.seed = pipeline, seed
        self.part_trainers = [PartTrainer(pipeline, stage, device="cpu", threads=1) for stage in pipeline.stage]
        for learner in self.part_trainers:
            learner.start()
        self._losses: dict[int, float] = {}

    def train_step(self, number: int, batch: StepBatch, schedule: ScheduleName = "1f1b") -> list[float]:
        """A whole step; the loss of each of its micro-batches."""
        self.run_operations(number, batch, schedule)
        for learner in self.part_trainers:
            assert len(learner.activations) == 0
            learner.commit(self.pipeline.training.lr)
        return [loss for _, loss in sorted(self._losses.items())]

    def run_operations(
        self, number: int, batch: StepBatch, schedule: ScheduleName = "1f1b", limit: int | None = None
    ) -> int:
        """The operations of a step, or the first `limit` of them; how many were done."""
        count, stages = len(batch), len(self.part_trainers)
        rows = sum(len(labels) for _, labels in batch)
        left: list[list[ScheduledOp]] = [list(operations(schedule, stage, stages, count)) for stage in range(stages)]
        forwards: list[dict[int, dict[str, Tensor]]] = [{} for _ in range(stages)]
        forwards[0] = {index: {"input": inputs, LABELS_TENSOR: labels} for index, (inputs, labels) in enumerate(batch)}
        gradients: list[dict[int, dict[str, Tensor] | None]] = [{} for _ in range(stages)]
        self._losses = {}
        requests = [index.to_bytes(16, "big") for index in range(count)]
        done = 0
        while any(left) and done != limit:
            ready = [
                stage
                for stage, ops in enumerate(left)
                if ops and ops[0][1] in (forwards if ops[0][0] == "forward" else gradients)[stage]
            ]
            stage = random.Random(done).choice(ready)  # whichever worker happens to be the first
            kind, index = left[stage].pop(0)
            done += 1
            if kind == "backward":
                given = self.part_trainers[stage].backward(requests[index], gradients[stage].pop(index))
                if stage:
                    gradients[stage - 1][index] = given
                continue
            seed = micro_batch_seed(self.seed, number, index)
            micro = MicroBatch(step="0" * 32, term=1, index=index, count=count, rows=rows, number=number, seed=seed)
            found = self.part_trainers[stage].forward(micro, requests[index], forwards[stage].pop(index))
            if isinstance(found, MicroBatchMetrics):
                self._losses[index] = found.loss
                gradients[stage][index] = None
            else:
                forwards[stage + 1][index] = found
        return done

    def abort(self) -> None:
        for learner in self.part_trainers:
            learner.abort()

    def state_dict(self) -> dict[str, Tensor]:
        """Every parameter and buffer, by the names of the uncut network."""
        return {name: tensor for learner in self.part_trainers for name, tensor in learner.weights().items()}


class UnsplitTrainer:
    """The uncut network in a plain loop of torch: its own optimizer, its own loss; only seeds are ours."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, seed: int = 0) -> None:
        torch.set_num_threads(1)
        self.model, self.optimizer, self.seed = model.train(), optimizer, seed

    def train_step(self, number: int, batch: StepBatch) -> list[float]:
        rows = sum(len(labels) for _, labels in batch)
        losses = []
        for index, (inputs, labels) in enumerate(batch):
            torch.manual_seed(micro_batch_seed(self.seed, number, index))
            loss = nn.functional.cross_entropy(self.model(inputs), labels)
            torch.autograd.backward([loss * (len(labels) / rows)])
            losses.append(loss.item())
        self.optimizer.step()
        self.optimizer.zero_grad()
        return losses


def assert_bitwise_equal(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Every parameter and buffer, to the last bit."""
    assert actual.keys() == expected.keys()
    wrong = [name for name, tensor in expected.items() if not torch.equal(actual[name], tensor)]
    assert wrong == [], f"{len(wrong)} of {len(expected)} differ"
