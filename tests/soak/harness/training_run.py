"""`sparse run` of a small training pipeline: its events while it runs, its processes, and its final weights."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file
from torch import Tensor

from sources.datasets.dataset import Batches
from tests.support.pipelines.pipeline_files import stage_table, write_pipeline_file
from tests.support.pipelines.processes import ProcessSandbox, RunningCommand, eventually
from tests.support.training.striped_images import StripedImages
from tests.support.training.training_network import CUTS, MODEL, train_unsplit

STAGES = ("head", "body", "tail")
BATCH = 32
MICRO_BATCHES = 4
SEED = 5
STEPS_PER_EPOCH = 3
_RUN_TIMEOUT_S = 280.0


def write_training_pipeline_file(
    folder: Path,
    *,
    epochs: int,
    workers: int = 1,
    sites: Sequence[str] = ("local",) * 3,
    delays_ms: Sequence[float] = (0, 0),
    **training: Any,
) -> Path:
    """Write a pipeline file of three stages; the source is at the site of the first, and links join sites in a row."""
    path = write_pipeline_file(
        folder,
        [stage_table(name, workers=workers, site=site) for name, site in zip(STAGES, sites, strict=True)],
        {"kind": "tests.support.training.striped_images:StripedImages", "name": "stripes", "site": sites[0]},
        name="training",
        kind="training",
        model=MODEL,
        cuts=list(CUTS),
        seed=SEED,
    )
    settings = {"epochs": epochs, "batch": BATCH, "micro_batches": MICRO_BATCHES, "checkpoint_every": 7, **training}
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    names = list(dict.fromkeys(sites))
    links = [
        f'links = [{{ to = "{name}", delay_ms = {ms} }}]\n' for name, ms in zip(names[1:], delays_ms, strict=False)
    ]
    tables = "".join(f'[[site]]\nname = "{name}"\n{link}' for name, link in zip(names, [*links, ""], strict=True))
    path.write_text(path.read_text() + tables + "\n[training]\nsettings = {momentum = 0.9}\n" + "\n".join(lines) + "\n")
    return path


@cache
def expected_weights(steps: int) -> dict[str, Tensor]:
    """The state of the unsplit network after `steps` steps of plain PyTorch."""
    torch.set_num_threads(1)
    batches = Batches(StripedImages().train(), BATCH, SEED)
    model, _ = train_unsplit(batches, steps, MICRO_BATCHES, seed=SEED)
    return model.state_dict()


def assert_weights_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Assert that two states are equal bit for bit."""
    assert actual.keys() == expected.keys()
    different = [name for name, tensor in expected.items() if not torch.equal(tensor, actual[name])]
    assert different == []


class TrainingRunCommand:
    """One `sparse run` of a training pipeline."""

    def __init__(self, sandbox: ProcessSandbox, path: Path, *options: str, resume: Path | None = None) -> None:
        self.folder = resume or sandbox.folder / "run"
        self._sandbox = sandbox
        self._first_event = len(self.events())
        folder_options = ("--resume", str(resume)) if resume else ("--out", str(self.folder))
        # Drawing the learning curves takes longer than the training; tests/pipeline/training/test_guide.py tests them.
        self.command: RunningCommand = sandbox.start_sparse(
            "run", path, "--json", "--no-pictures", *folder_options, *options
        )

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        """The events so far, of all runs of this folder; with `kinds`, only these."""
        path = self.folder / "training.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        events = [json.loads(line) for line in lines if line.endswith("\n")]
        return [event for event in events if not kinds or event["event"] in kinds]

    @property
    def last_step(self) -> int:
        """The last step that this process completed; 0 before the first."""
        steps = [event["step"] for event in self.events()[self._first_event :] if event["event"] == "step"]
        return steps[-1] if steps else 0

    def worker_of(self, stage: str) -> str:
        """The worker that trained a stage in the last step: the other one is on standby."""
        stages = self.events("step")[-1]["time"]["stages"]
        return str(stages[STAGES.index(stage)]["worker"])

    def wait_for_step(self, step: int) -> None:
        """Wait until a step is completed."""

        def completed() -> bool:
            status = self.command.process.poll()
            done = self.last_step >= step  # read after the status: a run that has exited writes no more
            assert done or status is None, self.command.read_stderr()
            return done

        eventually(f"step {step}", completed, _RUN_TIMEOUT_S)

    def find_process(self, *arguments: str) -> psutil.Process:
        """The newest process with these arguments on its command line."""
        process = eventually(" ".join(arguments), lambda: self._sandbox.find_process(*arguments))
        assert process is not None
        return process

    def kill(self, *arguments: str) -> None:
        self.find_process(*arguments).send_signal(signal.SIGKILL)

    def kill_broker(self) -> None:
        """Kill the Mosquitto that the run has started."""
        brokers = [process for process in self._sandbox.live_processes() if process.name() == "mosquitto"]
        assert len(brokers) == 1
        brokers[0].send_signal(signal.SIGKILL)

    def wait(self, timeout_s: float = _RUN_TIMEOUT_S) -> dict[str, Any]:
        """Wait for the end of the run, check its status and logs, and return its summary."""
        result = self.command.wait(timeout_s=timeout_s)
        assert result.returncode == 0, result.stderr
        logs = {path.name: path.read_text() for path in (self.folder / "logs").iterdir()}
        assert {name: text for name, text in logs.items() if "Traceback" in text} == {}
        return result.json_output

    def load_weights(self) -> dict[str, Tensor]:
        return load_file(self.folder / "model.safetensors")
