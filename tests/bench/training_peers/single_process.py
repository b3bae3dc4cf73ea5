"""The bounds of the training benchmark: a part, or the whole network, trained in this process with nothing else.

What counts is processor time of the one thread that computes: on a quiet machine the same as the time that passes, and
on another the harder bound.
"""

from __future__ import annotations

import time
from statistics import median

import torch
from torch import Tensor, nn

from stages.training.malloc_tuning import tune_malloc
from tests.bench.training_peers.ideal_pipeline import StageTimes
from tests.bench.training_peers.job import TrainingJob
from tests.bench.training_peers.torch_pipeline import SingleTensorPart

# The first step allocates what the others use again.
_WARM_UP = 1


def measure_stages_alone(job: TrainingJob, steps: int) -> list[StageTimes]:
    """What each part takes, one after the other, each with the machine for itself: medians of so many steps."""
    tune_malloc()
    torch.set_num_threads(1)
    rows = job.batch // job.micro_batches
    inputs, labels = (torch.from_numpy(array[:rows]) for array in job.examples())
    found = []
    for index in range(len(job.cuts) + 1):
        module = SingleTensorPart(job.build_part(index))
        targets = labels if index == len(job.cuts) else None
        found.append(_stage_alone(job, module, inputs, targets, steps, wanting=index > 0))
        inputs = module(inputs).detach()
    return found


def _stage_alone(
    job: TrainingJob, module: nn.Module, value: Tensor, targets: Tensor | None, steps: int, *, wanting: bool
) -> StageTimes:
    """Steps of the same micro-batch again and again; `wanting`: its gradient is wanted by the stage before."""
    optimizer = job.build_optimizer(module)
    gradient = torch.full_like(module(value), 1e-4) if targets is None else None
    runs: list[tuple[float, float, float]] = []
    for _ in range(_WARM_UP + steps):
        forward_s = backward_s = 0.0
        for _ in range(job.micro_batches):
            given = value.detach().requires_grad_(wanting)
            begin_s = time.thread_time()
            output = module(given)
            if targets is not None:
                output = nn.functional.cross_entropy(output, targets) / job.micro_batches
            between_s = time.thread_time()
            torch.autograd.backward(output, gradient)
            forward_s += between_s - begin_s
            backward_s += time.thread_time() - between_s
        begin_s = time.thread_time()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        runs.append((forward_s / job.micro_batches, backward_s / job.micro_batches, time.thread_time() - begin_s))
    return StageTimes(*(median(times) for times in zip(*runs[_WARM_UP:], strict=True)))


def unsplit_losses(job: TrainingJob, steps: int) -> list[float]:
    """The mean losses of the first steps of the whole network: what all contestants should see."""
    module = SingleTensorPart(job.build_part(0))
    optimizer = job.build_optimizer(module)
    inputs, labels = map(torch.from_numpy, job.examples())
    found = []
    for step in range(steps):
        rows = job.batch_slice(step)
        mean = 0.0
        pieces = (array[rows].chunk(job.micro_batches) for array in (inputs, labels))
        for value, targets in zip(*pieces, strict=True):
            loss = nn.functional.cross_entropy(module(value), targets) / job.micro_batches
            torch.autograd.backward(loss)
            mean += float(loss.detach())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        found.append(mean)
    return found
