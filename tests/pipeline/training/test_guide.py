"""docs/training.md: its files and its command work, its keys are those of the code, its links exist."""

from __future__ import annotations

import json
import re

import torch
from safetensors.torch import load_file

from brokers.config.pipeline_file import load_pipeline
from brokers.config.schema import TrainingTable
from brokers.process.import_string import import_string
from tests.pipeline.cli.test_stages_guide import FILES as STAGES_GUIDE_FILES
from tests.support.environment.checkout import ROOT
from tests.support.pipelines.processes import ProcessSandbox

PAGE = (ROOT / "docs" / "training.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
FILES = {text.split()[1]: text for kind, text in BLOCKS if kind in ("python", "toml")}
COMMANDS = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()]


def test_own_data_set_and_network_are_trained(sandbox: ProcessSandbox) -> None:
    for name, text in {"digits.py": STAGES_GUIDE_FILES["digits.py"], **FILES}.items():
        (sandbox.folder / name).write_text(text)
    assert COMMANDS == ["sparse run waves.toml --json"]
    out = sandbox.folder / "run"
    result = sandbox.run_sparse("run", sandbox.folder / "waves.toml", "--json", "--out", out)
    assert result.returncode == 0, result.stderr
    assert result.json_output["test_accuracy"] > 0.95
    assert result.json_output["steps"] == 12
    network = import_string("digits:digits", sandbox.folder)()
    network.load_state_dict(load_file(out / "model.safetensors"), strict=True)
    parts: dict[str, torch.Tensor] = {}
    for stage in ("head", "body", "tail"):
        parts |= load_file(out / "parts" / f"{stage}.safetensors")
    assert parts.keys() == network.state_dict().keys()
    assert (out / "training.png").stat().st_size > 10_000
    events = [json.loads(line)["event"] for line in (out / "training.jsonl").read_text().splitlines()]
    assert (events.count("step"), events.count("evaluation")) == (12, 3)
    sandbox.assert_nothing_left()


def test_documented_keys_are_those_of_the_training_table() -> None:
    section = PAGE[PAGE.index("## Settings") : PAGE.index("Models: ")]
    rows = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    keys = {key for row in rows for key in re.findall(r"`(\w+)`", row)}
    assert keys | {"lr_every", "lr_factor"} == set(TrainingTable.model_fields)


def test_examples_of_the_page_are_training_pipelines() -> None:
    for name in re.findall(r"examples/([a-z-]+\.toml)", PAGE):
        pipeline = load_pipeline(ROOT / "examples" / name)
        assert pipeline.is_training is (name != "digits-inference.toml")
