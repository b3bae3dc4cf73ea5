"""A part of a model as an executor: the tensors it accepts, and the settings of the pipeline file that reach it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from brokers.config.pipeline_file import Pipeline
from brokers.errors import BadPayload, WireError
from brokers.protocol.messages import TensorContent
from brokers.protocol.safetensors_codec import from_torch
from stages.executor import TaskContext
from stages.loading.network_digest import NETWORK_KEY
from stages.models.registry import get_model_spec
from stages.partition.tracing import trace
from stages.worker.model_executor import PICTURE, ModelExecutor
from stages.worker.worker_context import WorkerContext
from tests.support.errors import raises_error

SHUFFLENET = "torchvision:shufflenet_v2_x0_5"


def start_executor(index: int, model: str, *cuts: int, **table: Any) -> ModelExecutor:
    stages = [{"name": f"part-{number}"} for number in range(len(cuts) + 1)]
    pipeline = Pipeline.model_validate(
        {"pipeline": {"name": "p", "model": model, "cuts": cuts, **table}, "stage": stages}
    )
    executor = ModelExecutor(WorkerContext(pipeline, pipeline.stage[index], "w"))
    node: Any = None
    executor.start(node)
    return executor


def prepare(executor: ModelExecutor, tensors: dict[str, Tensor]) -> dict[str, Any]:
    content = TensorContent({name: from_torch(tensor) for name, tensor in tensors.items()})
    return executor.prepare(content, TaskContext(b"", "", 1))


@pytest.fixture(scope="module")
def tuple_cut() -> int:
    """A cut that the two halves of the channels cross, as one tuple."""
    names = trace(get_model_spec(SHUFFLENET).build().eval(), {"input": torch.rand(1, 3, 64, 64)}).layer_names
    return [number for number, name in enumerate(names, start=1) if name.startswith("chunk")][4]


def test_tuple_crosses_from_executor_to_executor(tuple_cut: int) -> None:
    context = TaskContext(b"", "", 1)
    head = start_executor(0, SHUFFLENET, tuple_cut)
    tail = start_executor(1, SHUFFLENET, tuple_cut)
    whole = start_executor(0, SHUFFLENET)
    inputs = {"input": torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))}
    crossing = head.execute(prepare(head, inputs), context)
    assert {name.partition("[")[2] for name in crossing} >= {"0]", "1]"}
    actual = tail.execute(prepare(tail, crossing), context)["output"]
    expected = whole.execute(prepare(whole, inputs), context)["output"]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_other_tensors_than_those_of_the_part_are_refused(tuple_cut: int) -> None:
    executor = start_executor(1, SHUFFLENET, tuple_cut)
    with pytest.raises(BadPayload, match=r"got \['more', 'other\[0\]'\]"):
        prepare(executor, {"other[0]": torch.zeros(1), "more": torch.zeros(1)})


def test_activations_of_another_network_are_refused() -> None:
    seeds = (0, 0, 1)
    head, tail, other = (start_executor(min(i, 1), "vgg11-small", 4, seed=seed) for i, seed in enumerate(seeds))
    task = TaskContext(b"", "", 1, {"unit": "C"})
    crossing = head.finish(head.execute(prepare(head, {"input": torch.rand(1, 3, 32, 32)}), task), task)
    content = TensorContent({name: from_torch(tensor) for name, tensor in crossing.items()}, dict(task.metadata))
    with raises_error(WireError, "OtherNetwork"):
        other.prepare(content, TaskContext(b"", "", 1))
    task = TaskContext(b"", "", 1)
    tail.finish(tail.execute(tail.prepare(content, task), task), task)
    assert task.metadata["unit"] == "C"
    assert NETWORK_KEY not in task.metadata  # it is of no use to the source


def test_labels_and_settings_of_the_file_reach_the_result() -> None:
    executor = start_executor(0, "vgg11-small", labels=("a", "b"), model_settings={"num_classes": 2})
    task = TaskContext(b"", "", 1, {PICTURE: "32x32"})
    executor.finish({"output": torch.tensor([[0.0, 1.0]])}, task)
    assert json.loads(task.metadata["labels"]) == ["b", "a"]
