"""Which parts may batch requests, and the results of batched requests through workers' executors."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.resnet import BasicBlock, ResNet

from brokers.config.pipeline_file import load_pipeline
from brokers.protocol.messages import Content, ReplyTo, Task, TensorContent
from brokers.protocol.safetensors_codec import from_torch, to_torch
from stages.executor import TaskContext
from stages.models.yolov3 import yolov3_tiny
from stages.partition.partition import partition
from stages.worker.batch_runner import BatchRunner, QueuedTask
from stages.worker.model_executor import ModelExecutor
from stages.worker.worker_context import WorkerContext
from tests.support.pipelines.pipeline_files import stage_table, write_pipeline_file
from tests.support.training.networks import randomize_parameters
from tests.support.training.partition_checks import run_parts, spread_cuts
from tests.support.verification.small_networks import Case, check_at

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: ResNet(BasicBlock, [1, 1, 1, 1]),
    "yolov3-tiny": yolov3_tiny,
    "shufflenet": lambda: models.shufflenet_v2_x0_5(weights=None),
    "vit": lambda: models.VisionTransformer(32, 16, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64),
    "swin": lambda: models.SwinTransformer([4, 4], 24, [2, 2], [2, 2], [7, 7]),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_batched_requests_give_the_results_of_single_requests(name: str) -> None:
    model = randomize_parameters(NETWORKS[name]()).eval()
    generator = torch.Generator().manual_seed(1)
    requests = [{"input": torch.rand(rows, 3, 32, 32, generator=generator)} for rows in (1, 1, 2)]
    traced, _, _ = check_at(model, requests[0], [])
    cuts = spread_cuts(traced, 5)
    _, _, verdict = check_at(model, requests[0], cuts, max_batch=4)
    assert sum(verdict.batchable) >= len(cuts)
    parts = partition(traced, cuts)
    with torch.inference_mode():
        expected = [run_parts(parts, request) for request in requests]
        batched = requests
        for part, is_batchable in zip(parts, verdict.batchable, strict=True):
            if is_batchable:
                rows = [len(next(iter(tensors.values()))) for tensors in batched]
                joined = part({key: torch.cat([tensors[key] for tensors in batched]) for key in batched[0]})
                split = {key: torch.split(tensor, rows) for key, tensor in joined.items()}
                batched = [{key: items[index] for key, items in split.items()} for index in range(len(rows))]
            else:
                batched = [part(tensors) for tensors in batched]
    for actual, tensors in zip(batched, expected, strict=True):
        for key, tensor in tensors.items():  # another batch size uses other kernels: the last bits may differ
            torch.testing.assert_close(actual[key], tensor, rtol=1e-3, atol=1e-3)


def attend_to_points(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    return m.b(torch.softmax(y @ y.t(), -1) @ y)


def center(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    return m.b(y - y.mean(0))


def skip_layer(m: Any, x: Tensor) -> Any:
    return m.b(m.drop(m.a(x)))


def sort_rows(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    return m.b(y[x.abs().sum(1).argsort(descending=True)])


def add_part_of_mean(factor: float) -> Callable[[Any, Tensor], Any]:
    return lambda m, x: m.b(m.a(x) + factor * x.mean(0))


def select_positive(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    return y[y > 0][None]


def mark_large_sums(m: Any, x: Tensor) -> Any:
    return m.b(m.a(x)) + torch.where(x.sum(0) > 30, 1.0, 0.0)


class LayerDrop(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if torch.rand(()) < 0.5 else x


CNN = {"a": nn.Conv2d(1, 4, 3), "b": nn.Linear(64, 3)}
# Whether the whole network as one part is batchable.
KINDS = {
    "linear layers": (Case(lambda m, x: m.b(m.a(x).relu())), True),
    "view with a fixed size": (Case(lambda m, x: m.b(m.a(x).relu().view(-1, 64)), (1, 1, 6, 6), lambda: CNN), True),
    "LSTM with the batch first": (
        Case(lambda m, x: m.a(x)[0], (1, 5, 4), lambda: {"a": nn.LSTM(4, 4, batch_first=True)}),
        True,
    ),
    "LSTM": (Case(lambda m, x: m.a(x)[0], (1, 5, 4), lambda: {"a": nn.LSTM(4, 4)}), False),
    "attention over rows": (Case(attend_to_points), False),
    "mean of rows": (Case(center), False),
    "mean of all numbers": (Case(lambda m, x: m.b(m.a((x - x.mean()) / x.std())), (1, 4)), False),
    "maximum of all numbers": (Case(lambda m, x: m.b(m.a(x / x.abs().max())), (1, 4)), False),
    "batch norm without running statistics": (
        Case(
            lambda m, x: m.b(m.norm(m.a(x))), attributes=lambda: {"norm": nn.BatchNorm1d(4, track_running_stats=False)}
        ),
        False,
    ),
    "dropout": (Case(lambda m, x: m.b(nn.functional.dropout(m.a(x)))), False),
    "branch on a random number": (Case(skip_layer, attributes=lambda: {"drop": LayerDrop()}), False),
    "batch size": (Case(lambda m, x: m.b(m.a(x)) * x.shape[0]), False),
    "result without rows": (Case(lambda m, x: m.b(m.a(x)).mean()), False),
    "result of other rows": (Case(lambda m, x: m.b(m.a(x)).repeat_interleave(2, dim=0)), False),
    "table by row": (
        Case(
            lambda m, x: m.b(m.a(x) + m.table[: x.shape[0]]),
            (1, 4),
            lambda: {"table": nn.Buffer(torch.tensor([0.0, 0.0, 1.0, 2.0])[:, None])},
        ),
        False,
    ),
    "number of the row": (
        Case(lambda m, x: m.b(m.a(x) + (torch.arange(x.shape[0])[:, None] > 1)), (1, 4)),
        False,
    ),
    "sorted rows": (Case(sort_rows, (1, 4)), False),
    "small part of the mean of rows": (Case(add_part_of_mean(1e-4), (1, 4)), False),
    "tiny part of the mean of rows": (Case(add_part_of_mean(1e-7), (1, 4)), False),
    "threshold of the sum of rows": (Case(mark_large_sums, (1, 4)), False),
    "number of rows that depends on values": (Case(lambda m, x: m.b(m.a(x)[x.sum(-1) > 0])), False),
    "number of columns that depends on values": (Case(select_positive, (1, 4)), False),
    "indices of values": (Case(lambda m, x: (m.a(x) > 0).nonzero()), False),
    "rows swapped with columns": (Case(lambda m, x: m.b(m.a(x)).t(), (4, 4)), False),
}


@pytest.mark.parametrize("name", KINDS)
def test_rows_that_influence_each_other_are_not_batched(name: str) -> None:
    case, expected = KINDS[name]
    _, _, verdict = check_at(case.build(), case.example(), [], max_batch=4)
    assert (verdict.problem, verdict.batchable) == ("", (expected,))


def test_integers_that_influence_other_rows_are_detected() -> None:
    model = Case(lambda m, x: m.table(x) * x.max(), attributes=lambda: {"table": nn.Embedding(10, 4)}).build()
    _, _, verdict = check_at(model, {"x": torch.tensor([[1, 7, 3]])}, [], max_batch=4)
    assert (verdict.problem, verdict.batchable) == ("", (False,))


def test_value_whose_first_dimension_is_not_the_batch_is_detected() -> None:
    case = Case(lambda m, x: ((x + 1).transpose(0, 1) * 2).transpose(0, 1) - 1, (1, 2, 4))
    by_cut = {cut: check_at(case.build(), case.example(), [cut], max_batch=4)[2].batchable for cut in range(1, 5)}
    assert by_cut == {1: (True, True), 2: (False, False), 3: (False, False), 4: (True, True)}


def test_part_that_changes_the_number_of_rows_is_not_batched() -> None:
    case = Case(lambda m, x: m.b((m.a(x).reshape(-1, 8) * 2).reshape(-1, 4)))
    verdict = check_at(case.build(), case.example(), [2], max_batch=4)[2]
    assert (verdict.problem, verdict.batchable) == ("", (False, False))


def center_words(m: Any, x: Tensor) -> Any:
    y = m.words(x)
    return m.b(y - y.mean(0))


CONSTANT_EXAMPLES = {
    "ones": (center, torch.ones(1, 4)),
    "zeros": (center, torch.zeros(1, 4)),
    "token 0": (center_words, torch.zeros(1, 6, dtype=torch.long)),
    "mask of ones": (lambda m, x: m.b(m.a(x * x.min(0).values)), torch.ones(1, 4)),
    "mask of integers 1": (lambda m, x: m.b(m.a((x * x.min(0).values).float())), torch.ones(1, 4, dtype=torch.long)),
    "mask of True": (lambda m, x: m.b(m.a((x & x.all(0)).float())), torch.ones(1, 4, dtype=torch.bool)),
}


@pytest.mark.parametrize("name", CONSTANT_EXAMPLES)
def test_rows_of_equal_numbers_do_not_hide_their_influence(name: str) -> None:
    forward, example = CONSTANT_EXAMPLES[name]
    case = Case(forward, attributes=lambda: {"words": nn.Embedding(9, 4)})
    verdict = check_at(case.build(), {"x": example}, [], max_batch=4)[2]
    assert (verdict.problem, verdict.batchable) == ("", (False,))


def test_parts_are_not_batchable_unless_asked_for() -> None:
    case = Case(lambda m, x: m.b(m.a(x)))
    assert check_at(case.build(), case.example())[2].batchable == (False, False)


# Workers ------------------------------------------------------------------------------------------------------------

SOURCE = """
import torch
from torch import nn
from torch.nn import functional as F


class Net(nn.Module):
    input_shape = {shape}

    def __init__(self):
        super().__init__()
        {attributes}

    def forward(self, x):
        {forward}
"""


@cache
def served_networks() -> dict[str, tuple[tuple[int, ...], str, str, int]]:
    """Return, by name, the shape of the input, the attributes, the forward and the cut."""
    linear = "self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)"
    return {
        "bfloat16": ((1, 4), f"{linear}; self.bfloat16()", "return self.b(self.a(x) / 3)", 1),
        "view with a fixed size": (
            (1, 1, 6, 6),
            "self.a, self.b = nn.Conv2d(1, 4, 3), nn.Linear(64, 3)",
            "return self.b(F.relu(self.a(x)).view(-1, 64))",
            2,
        ),
        "LSTM": ((5, 1, 4), "self.a, self.b = nn.LSTM(4, 4), nn.Linear(4, 4)", "return self.b(self.a(x)[0])", 2),
        "attention over rows": (
            (3, 4),
            linear,
            "y = self.a(x); return self.b(torch.softmax(y @ y.t(), -1) @ y)",
            1,
        ),
        "batch norm without running statistics": (
            (3, 4),
            f"{linear}; self.norm = nn.BatchNorm1d(4, track_running_stats=False)",
            "return self.b(self.norm(self.a(x)))",
            1,
        ),
        "mean of all numbers": ((1, 4), linear, "return self.b(self.a((x - x.mean()) / x.std()))", 1),
    }


def start_executors(folder: Path, name: str) -> list[ModelExecutor]:
    shape, attributes, forward, cut = served_networks()[name]
    module = f"net_{name.replace(' ', '_')}"
    (folder / f"{module}.py").write_text(SOURCE.format(shape=shape, attributes=attributes, forward=forward))
    stages = [stage_table("head", max_batch=4, device="cpu"), stage_table("tail", max_batch=4, device="cpu")]
    pipeline = load_pipeline(write_pipeline_file(folder, stages, model=f"{module}:Net", cuts=[cut]))
    executors = [ModelExecutor(WorkerContext(pipeline, stage, "w")) for stage in pipeline.stage]
    node: Any = None
    for executor in executors:
        executor.start(node)
    return executors


def serve(executors: Sequence[ModelExecutor], requests: Sequence[Tensor]) -> list[Tensor]:
    """Run all requests in one batch through the executors of all stages."""
    contents: list[Content] = [TensorContent({"input": from_torch(request)}) for request in requests]
    for executor in executors:
        tasks = [queue(content, index) for index, content in enumerate(contents)]
        BatchRunner(executor, "stage", "worker").run(tasks)
        assert [task.error for task in tasks] == [None] * len(tasks)
        contents = [task.outputs for task in tasks if task.outputs is not None]
    return [to_torch(content.tensors["output"]) for content in contents if isinstance(content, TensorContent)]


def queue(content: Content, index: int) -> QueuedTask:
    request = bytes([index]) * 16
    task = Task(request_id=request, content=content, reply_to=ReplyTo("answers"), source="s")
    return QueuedTask(task, time.monotonic(), TaskContext(request, "s", 1))


@pytest.mark.parametrize("name", served_networks())
def test_batched_requests_are_served_as_the_network_computes_them(name: str, tmp_path: Path) -> None:
    executors = start_executors(tmp_path, name)
    shape = served_networks()[name][0]
    requests = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * (seed + 1) for seed in range(4)]
    spec = executors[0]._spec
    torch.manual_seed(0)  # the seed of a pipeline file without one
    model = spec.build().eval()
    dtype = next(model.parameters()).dtype
    with torch.inference_mode():
        expected = [model(request.to(dtype)) for request in requests]
    actual = serve(executors, requests)
    for left, right in zip(actual, expected, strict=True):
        assert left.dtype == right.dtype
        torch.testing.assert_close(left, right)
    assert all(torch.equal(*pair) for pair in zip(serve(executors, requests[:1]), expected, strict=False))
