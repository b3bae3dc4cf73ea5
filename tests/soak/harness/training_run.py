"""A training run as an operator has it: real processes, events as they come, and what may be killed."""

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

from sources.datasets.batches import Batches
from tests.support.pipelines.pipeline_files import stage_table, write_pipeline_file
from tests.support.pipelines.processes import ProcessSandbox, RunningCommand, eventually
from tests.support.training.striped_images import StripedImages
from tests.support.training.training_network import CUTS, MODEL, train_unsplit

STAGES = ("head", "body", "tail")
BATCH, MICRO_BATCHES, SEED = 32, 4, 5


def write_training_pipeline_file(
    folder: Path,
    *,
    epochs: int,
    workers: int = 1,
    sites: Sequence[str] = ("local",) * 3,
    delays_ms: Sequence[float] = (0, 0),
    **training: Any,
) -> Path:
    """A pipeline file of three stages, 3 steps an epoch; the source is where the first stage is, links are in a row."""
    path = write_pipeline_file(
        folder,
        [stage_table(name, workers=workers, site=site) for name, site in zip(STAGES, sites, strict=True)],
        {"kind": "tests.support.training.striped_images:StripedImages", "name": "stripes", "site": sites[0]},
        name="lesson",
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
    tables = "".join(f'[[site]]\nname = "{name}"\n{end}' for name, end in zip(names, [*links, ""], strict=True))
    path.write_text(path.read_text() + tables + "\n[training]\nsettings = {momentum = 0.9}\n" + "\n".join(lines) + "\n")
    return path


@cache
def expected_weights(steps: int) -> dict[str, Tensor]:
    """The state of the uncut network after so many steps of plain torch."""
    torch.set_num_threads(1)
    batches = Batches(StripedImages().train(), BATCH, SEED)
    model, _ = train_unsplit(batches, steps, MICRO_BATCHES, seed=SEED)
    return model.state_dict()


def assert_weights_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert actual.keys() == expected.keys()
    wrong = [name for name, tensor in expected.items() if not torch.equal(tensor, actual[name])]
    assert wrong == []


class TrainingRunCommand:
    """One `sparse run` of a lesson."""

    def __init__(self, sandbox: ProcessSandbox, path: Path, *options: str, resume: Path | None = None) -> None:
        self.folder = resume or sandbox.folder / "run"
        self._box = sandbox
        where = ("--resume", str(resume)) if resume else ("--out", str(self.folder))
        self._past = len(self.events())
        # tests/pipeline/training/test_guide.py has one with its picture, which takes longer than many a lesson.
        self.command: RunningCommand = sandbox.start_sparse("run", path, "--json", "--no-pictures", *where, *options)

    def events(self) -> list[dict[str, Any]]:
        """What has happened so far, in all runs of this folder."""
        path = self.folder / "training.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    @property
    def last_step(self) -> int:
        """The step that was done last, by this process."""
        done = [event["step"] for event in self.events()[self._past :] if event["event"] == "step"]
        return done[-1] if done else 0

    def worker_of(self, stage: str) -> str:
        """Who trained a stage in the step that was done last: of two that start together either may."""
        stages = [event["time"]["stages"] for event in self.events() if event["event"] == "step"][-1]
        return str(stages[STAGES.index(stage)]["worker"])

    def wait_for_step(self, step: int) -> None:
        """Wait until a step is done."""

        def there() -> bool:
            assert self.command.process.poll() is None, self.command.read_stderr()
            return self.last_step >= step

        eventually(f"step {step}", there)

    def find_process(self, *words: str) -> psutil.Process:
        """The newest process with these words in its command line."""
        found = eventually(" ".join(words), lambda: self._box.find_process(*words))
        assert found is not None
        return found

    def kill(self, *words: str) -> None:
        self.find_process(*words).send_signal(signal.SIGKILL)

    def kill_broker(self) -> None:
        """The broker that the run has started."""
        brokers = [process for process in self._box.live_processes() if process.name() == "mosquitto"]
        assert len(brokers) == 1
        brokers[0].send_signal(signal.SIGKILL)

    def wait(self, timeout_s: float = 280) -> dict[str, Any]:
        """Wait for its end; its summary."""
        said = self.command.wait(timeout_s=timeout_s)
        assert said.returncode == 0, said.stderr
        logs = {path.name: path.read_text() for path in (self.folder / "logs").iterdir()}
        assert {name: text for name, text in logs.items() if "Traceback" in text} == {}
        return said.json_output

    def load_weights(self) -> dict[str, Tensor]:
        return load_file(self.folder / "model.safetensors")
