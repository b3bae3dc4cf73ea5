"""A tuple that crosses a cut, item by item, is what the worker behind the cut takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from brokers.config.pipeline_file import Pipeline
from brokers.errors import BadPayload
from brokers.protocol.messages import TensorContent
from brokers.protocol.safetensors_codec import from_torch
from stages.executor import TaskContext
from stages.models.registry import get_model_spec
from stages.partition.partition import layer_names
from stages.worker.model_executor import ModelExecutor

MODEL = "torchvision:shufflenet_v2_x0_5"
NAMES = layer_names(get_model_spec(MODEL).build().eval())
# After these layers two halves of the channels cross, as one tuple.
CUTS = [number for number, name in enumerate(NAMES, start=1) if name.startswith("chunk")][::4]


def executor(index: int, *cuts: int) -> ModelExecutor:
    stages = [{"name": f"part-{number}"} for number in range(len(cuts) + 1)]
    pipeline = Pipeline.model_validate({"pipeline": {"name": "p", "model": MODEL, "cuts": cuts}, "stage": stages})
    made = ModelExecutor(pipeline, pipeline.stage[index], device="cpu", threads=1)
    node: Any = None
    made.start(node)
    return made


def prepared(made: ModelExecutor, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    body = TensorContent({name: from_torch(tensor) for name, tensor in tensors.items()})
    return made.prepare(body, TaskContext(b"", "", 1))


@pytest.mark.parametrize("cut", CUTS)
def test_a_tuple_crosses_from_worker_to_worker(cut: int) -> None:
    context = TaskContext(b"", "", 1)
    head, tail = executor(0, cut), executor(1, cut)
    picture = {"input": torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))}
    crossing = head.execute(prepared(head, picture), context)
    assert {name.partition("[")[2] for name in crossing} >= {"0]", "1]"}
    found = tail.execute(prepared(tail, crossing), context)["output"]
    uncut = executor(0)
    whole = uncut.execute(prepared(uncut, picture), context)["output"]
    assert torch.allclose(found, whole, atol=1e-5)


def test_an_item_that_is_missing_is_told() -> None:
    with pytest.raises(BadPayload, match="takes"):
        prepared(executor(1, CUTS[0]), {"other[0]": torch.zeros(1), "more": torch.zeros(1)})
