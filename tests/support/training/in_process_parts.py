"""All parts of a network in one process, trained without a broker, event loop or thread; and the unsplit network."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from brokers.config.pipeline_file import Pipeline
from brokers.protocol.training import LABELS_TENSOR, MicroBatch, micro_batch_seed
from sources.datasets.dataset import named_inputs
from stages.training.part_trainer import MicroBatchMetrics, PartTrainer
from stages.training.step_queue import ScheduledOp, ScheduleName, operations
from stages.worker.worker_context import WorkerContext
from tests.support.environment.checkout import ROOT

# The micro-batches of a step: inputs (B, ...), one or by name, and labels (B, ...).
StepBatch = Sequence[tuple[Any, Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]


def make_training_pipeline(
    model: str,
    cuts: Sequence[int],
    *,
    seed: int = 3,
    model_settings: Mapping[str, Any] | None = None,
    name: str = "lesson",
    **training: Any,
) -> Pipeline:
    """A training pipeline of `model` with these cuts; its stages are s0, s1, ..."""
    table = {
        "name": name,
        "kind": "training",
        "model": model,
        "cuts": list(cuts),
        "seed": seed,
        "model_settings": dict(model_settings or {}),
    }
    return Pipeline.model_validate(
        {
            "path": str(ROOT / "lesson.toml"),
            "pipeline": table,
            "stage": [{"name": f"s{index}"} for index in range(len(cuts) + 1)],
            "source": {"kind": "tests.support.training.striped_images:StripedImages", "name": "stripes"},
            "training": training,
        }
    )


class InProcessParts:
    """A `PartTrainer` for each stage of a pipeline. `seed` is that of the source."""

    def __init__(self, pipeline: Pipeline, *, seed: int = 0) -> None:
        self.pipeline = pipeline
        self.seed = seed
        self.part_trainers = [PartTrainer(WorkerContext(pipeline, stage, stage.name)) for stage in pipeline.stage]
        for trainer in self.part_trainers:
            trainer.start()
        self._losses: dict[int, float] = {}

    def train_step(self, number: int, batch: StepBatch, schedule: ScheduleName = "1f1b") -> list[float]:
        """Run and commit a step; return the loss of each micro-batch."""
        self.run_operations(number, batch, schedule)
        for trainer in self.part_trainers:
            assert not trainer.activations
            trainer.commit(self.pipeline.training.lr)
        return [loss for _, loss in sorted(self._losses.items())]

    def run_operations(
        self, number: int, batch: StepBatch, schedule: ScheduleName = "1f1b", limit: int | None = None
    ) -> int:
        """Run the operations of a step, or the first `limit` of them; return how many were run.

        Of the stages that are ready, a random one runs its next operation.
        """
        count = len(batch)
        stages = len(self.part_trainers)
        rows = sum(len(labels) for _, labels in batch)
        pending: list[list[ScheduledOp]] = [list(operations(schedule, stage, stages, count)) for stage in range(stages)]
        forwards: list[dict[int, dict[str, Tensor]]] = [{} for _ in range(stages)]
        forwards[0] = {
            index: {**named_inputs(inputs), LABELS_TENSOR: labels} for index, (inputs, labels) in enumerate(batch)
        }
        gradients: list[dict[int, dict[str, Tensor] | None]] = [{} for _ in range(stages)]
        self._losses = {}
        requests = [index.to_bytes(16, "big") for index in range(count)]
        done = 0
        while any(pending) and done != limit:
            ready = [
                stage
                for stage, ops in enumerate(pending)
                if ops and ops[0][1] in (forwards if ops[0][0] == "forward" else gradients)[stage]
            ]
            stage = random.Random(done).choice(ready)
            kind, index = pending[stage].pop(0)
            trainer = self.part_trainers[stage]
            done += 1
            if kind == "backward":
                input_gradients = trainer.backward(requests[index], gradients[stage].pop(index))
                if stage:
                    gradients[stage - 1][index] = input_gradients
                continue
            seed = micro_batch_seed(self.seed, number, index)
            micro_batch = MicroBatch(
                step="0" * 32, term=1, index=index, count=count, rows=rows, number=number, seed=seed
            )
            outputs = trainer.forward(micro_batch, requests[index], forwards[stage].pop(index))
            if isinstance(outputs, MicroBatchMetrics):
                self._losses[index] = outputs.loss
                gradients[stage][index] = None
            else:
                forwards[stage + 1][index] = outputs
        return done

    def evaluate(self, inputs: Any, labels: Tensor) -> MicroBatchMetrics:
        """Evaluate one micro-batch: inputs (B, ...), one or by name, and labels (B, ...)."""
        tensors: Any = {**named_inputs(inputs), LABELS_TENSOR: labels}
        micro_batch = MicroBatch(
            step="0" * 32, term=1, index=0, count=1, rows=len(labels), number=0, seed=self.seed, mode="evaluate"
        )
        for trainer in self.part_trainers:
            tensors = trainer.forward(micro_batch, bytes(16), tensors)
        assert isinstance(tensors, MicroBatchMetrics)
        return tensors

    def abort(self) -> None:
        for trainer in self.part_trainers:
            trainer.abort()

    def state_dict(self) -> dict[str, Tensor]:
        """All parameters and buffers, by the names of the unsplit network."""
        return {name: tensor for trainer in self.part_trainers for name, tensor in trainer.weights().items()}


class UnsplitTrainer:
    """The unsplit network in an ordinary loop of torch, with its optimizer and loss, and our seeds."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        seed: int = 0,
        loss: Loss = nn.functional.cross_entropy,
    ) -> None:
        torch.set_num_threads(1)
        self.model = model.train()
        self.optimizer = optimizer
        self.seed = seed
        self.loss = loss

    def train_step(self, number: int, batch: StepBatch) -> list[float]:
        rows = sum(len(labels) for _, labels in batch)
        losses = []
        for index, (inputs, labels) in enumerate(batch):
            torch.manual_seed(micro_batch_seed(self.seed, number, index))
            outputs = self.model(**inputs) if isinstance(inputs, Mapping) else self.model(inputs)
            loss = self.loss(outputs, labels)
            torch.autograd.backward([loss * (len(labels) / rows)])
            losses.append(loss.item())
        self.optimizer.step()
        self.optimizer.zero_grad()
        return losses


def assert_bitwise_equal(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    wrong = [name for name, tensor in expected.items() if not torch.equal(actual[name], tensor)]
    assert wrong == [], f"{len(wrong)} of {len(expected)} differ"
