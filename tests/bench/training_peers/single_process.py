"""The bounds of the training benchmark: single stages, or the whole network, trained alone in this process.

Measured is the processor time of the computing thread: on a quiet machine the same as elapsed time, and on a busy one
the harder bound.
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

# The first step allocates memory that the others reuse.
_WARM_UP = 1


def measure_stages_alone(job: TrainingJob, steps: int) -> list[StageTimes]:
    """The times of each stage alone, one stage after the other: medians over `steps` steps."""
    tune_malloc()
    torch.set_num_threads(1)
    rows = job.batch // job.micro_batches
    inputs, labels = (torch.from_numpy(array[:rows]) for array in job.examples())
    results = []
    for index in range(len(job.cuts) + 1):
        module = SingleTensorPart(job.build_part(index))
        targets = labels if index == len(job.cuts) else None
        results.append(_measure_stage(job, module, inputs, targets, steps, needs_input_gradient=index > 0))
        inputs = module(inputs).detach()
    return results


def _measure_stage(
    job: TrainingJob,
    module: nn.Module,
    inputs: Tensor,
    targets: Tensor | None,
    steps: int,
    *,
    needs_input_gradient: bool,
) -> StageTimes:
    """Train with the same micro-batch again and again; the last stage has `targets`."""
    optimizer = job.build_optimizer(module)
    gradient = torch.full_like(module(inputs), 1e-4) if targets is None else None
    runs: list[tuple[float, float, float]] = []
    for _ in range(_WARM_UP + steps):
        forward_s = 0.0
        backward_s = 0.0
        for _ in range(job.micro_batches):
            leaf = inputs.detach().requires_grad_(needs_input_gradient)
            begin_s = time.thread_time()
            output = module(leaf)
            if targets is not None:
                output = nn.functional.cross_entropy(output, targets) / job.micro_batches
            forward_end_s = time.thread_time()
            torch.autograd.backward(output, gradient)
            forward_s += forward_end_s - begin_s
            backward_s += time.thread_time() - forward_end_s
        begin_s = time.thread_time()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        runs.append((forward_s / job.micro_batches, backward_s / job.micro_batches, time.thread_time() - begin_s))
    return StageTimes(*(median(times) for times in zip(*runs[_WARM_UP:], strict=True)))


def unsplit_losses(job: TrainingJob, steps: int) -> list[float]:
    """The mean losses of the first steps of the unsplit network, which all implementations should have."""
    module = SingleTensorPart(job.build_part(0))
    optimizer = job.build_optimizer(module)
    inputs, labels = map(torch.from_numpy, job.examples())
    losses = []
    for step in range(steps):
        rows = job.batch_slice(step)
        step_loss = 0.0
        micro_batches = (array[rows].chunk(job.micro_batches) for array in (inputs, labels))
        for micro_inputs, targets in zip(*micro_batches, strict=True):
            loss = nn.functional.cross_entropy(module(micro_inputs), targets) / job.micro_batches
            torch.autograd.backward(loss)
            step_loss += float(loss.detach())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(step_loss)
    return losses
