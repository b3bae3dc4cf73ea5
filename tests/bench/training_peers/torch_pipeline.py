"""The peer of the training benchmark: `torch.distributed.pipelining` on gloo, a process of one thread for each stage.

The processes are `python -m tests.bench.training_peers.torch_pipeline JOB RANK`, where JOB is a file with a `TrainingJob`; each ends with
one JSON object on standard output: by schedule, how long each step took, and, of the last stage, the losses.
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
    """A part with one tensor in and one out, called with the tensor itself."""

    def __init__(self, part: Part) -> None:
        super().__init__()
        self.part = part
        (self.input_name,), (self.output_name,) = part.input_names, part.output_names

    def forward(self, value: Tensor) -> Tensor:
        found: Tensor = self.part({self.input_name: value})[self.output_name]
        return found


def run_torch_pipeline(job: TrainingJob, folder: Path) -> dict[str, dict[str, Any]]:
    """By schedule: `steps_s`, what each step took, and the `losses`. `folder` is empty."""
    file = folder / "job.json"
    file.write_text(job.to_json())
    command = (sys.executable, "-m", "tests.bench.training_peers.torch_pipeline", str(file))
    processes = [subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE) for rank in range(len(job.cuts) + 1)]
    try:
        said = [process.communicate(timeout=_TIMEOUT_S)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if any(process.returncode for process in processes):
        raise RuntimeError("torch.distributed.pipelining failed; its processes have said why")
    first, last = (json.loads(lines.splitlines()[-1]) for lines in (said[0], said[-1]))
    # The first stage's last backward ends a step.
    return {name: {"steps_s": first[name]["steps_s"], "losses": last[name]["losses"]} for name in job.schedules}


def _train(job: TrainingJob, rank: int, name: str) -> dict[str, Any]:
    count = len(job.cuts) + 1
    module = SingleTensorPart(job.build_part(rank))
    optimizer = job.build_optimizer(module)
    stage = PipelineStage(module, rank, count, torch.device("cpu"))
    schedule = _SCHEDULES[name](stage, n_microbatches=job.micro_batches, loss_fn=nn.functional.cross_entropy)
    inputs, labels = map(torch.from_numpy, job.examples())
    means: list[float] = []
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
            means.append(float(torch.stack(losses).detach().mean()))
        ends_s.append(time.monotonic())
    return {"steps_s": job.step_durations_s(ends_s), "losses": means}


def _main(file: Path, rank: int) -> None:
    job = TrainingJob.from_json(file.read_text())
    if job.tune_malloc:
        tune_malloc()
    torch.set_num_threads(1)
    meeting = f"file://{file.with_suffix('.meeting')}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=len(job.cuts) + 1)
    try:
        found = {name: _train(job, rank, name) for name in job.schedules}
    finally:
        dist.destroy_process_group()
    print(json.dumps(found))


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]))
