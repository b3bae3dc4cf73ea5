"""The peer of the training benchmark: `torch.distributed.pipelining` on gloo, one process of one thread for each stage.

Each process is `python -m tests.bench.training_peers.torch_pipeline JOB_FILE RANK` and ends with one JSON object on
standard output: by schedule, the duration of each step and, of the last stage, the losses.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from stages.partition.partition import Part
from stages.training.malloc_tuning import tune_malloc
from tests.bench.training_peers.job import TrainingJob

_SCHEDULES: Mapping[str, Any] = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
_TIMEOUT_S = 600.0


class SingleTensorPart(nn.Module):
    """A part with one input and one output, called with the tensor instead of a dict."""

    def __init__(self, part: Part) -> None:
        super().__init__()
        self.part = part
        self.state = part.module  # whose parameters the optimizer changes
        (self.input_name,) = part.input_names
        (self.output_name,) = part.output_names

    def forward(self, value: Tensor) -> Tensor:
        output: Tensor = self.part({self.input_name: value})[self.output_name]
        return output


def run_torch_pipeline(job: TrainingJob, folder: Path) -> dict[str, dict[str, Any]]:
    """By schedule: `steps_s`, the duration of each step, and `losses`. `folder` must be empty."""
    job_file = folder / "job.json"
    job_file.write_text(job.to_json())
    command = (sys.executable, "-m", "tests.bench.training_peers.torch_pipeline", str(job_file))
    processes = [subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE) for rank in range(len(job.cuts) + 1)]
    try:
        outputs = [process.communicate(timeout=_TIMEOUT_S)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if any(process.returncode for process in processes):
        raise RuntimeError("torch.distributed.pipelining failed; see the output of its processes above")
    first, last = (json.loads(output.splitlines()[-1]) for output in (outputs[0], outputs[-1]))
    # A step ends with the last backward of the first stage.
    return {name: {"steps_s": first[name]["steps_s"], "losses": last[name]["losses"]} for name in job.schedules}


def _train(job: TrainingJob, rank: int, name: str) -> dict[str, Any]:
    module = SingleTensorPart(job.build_part(rank))
    optimizer = job.build_optimizer(module)
    stage = PipelineStage(module, rank, len(job.cuts) + 1, torch.device("cpu"))
    schedule = _SCHEDULES[name](stage, n_microbatches=job.micro_batches, loss_fn=nn.functional.cross_entropy)
    inputs, labels = map(torch.from_numpy, job.examples())
    step_losses: list[float] = []
    ends_s = []
    for step in range(job.warm_up + job.steps):
        losses: list[Tensor] = []
        if rank == 0:
            schedule.step(inputs[job.batch_slice(step)])
        else:
            schedule.step(target=labels[job.batch_slice(step)], losses=losses)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if losses:
            step_losses.append(float(torch.stack(losses).detach().mean()))
        ends_s.append(time.monotonic())
    return {"steps_s": job.step_durations_s(ends_s), "losses": step_losses}


def _main(job_file: Path, rank: int) -> None:
    job = TrainingJob.from_json(job_file.read_text())
    if job.tune_malloc:
        tune_malloc()
    torch.set_num_threads(1)
    rendezvous = f"file://{job_file.with_suffix('.rendezvous')}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=len(job.cuts) + 1)
    try:
        results = {name: _train(job, rank, name) for name in job.schedules}
    finally:
        dist.destroy_process_group()
    print(json.dumps(results))


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]))
