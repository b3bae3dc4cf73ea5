"""All files and commands of docs/stages.md work as that page says."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.environment.checkout import ROOT
from tests.support.environment.external_programs import require_broker
from tests.support.pipelines.ingress_pipeline import IngressPipeline
from tests.support.pipelines.processes import ProcessSandbox

PAGE = (ROOT / "docs" / "stages.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
FILES = {text.split()[1]: text for kind, text in BLOCKS if kind in ("python", "toml")}
COMMANDS = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()]


@pytest.fixture(name="page_folder")
def _page_folder(sandbox: ProcessSandbox) -> Path:
    """A folder with the files of the page."""
    for name, text in FILES.items():
        (sandbox.folder / name).write_text(text)
    return sandbox.folder


def run_python(folder: Path, *arguments: str) -> str:
    """Run Python in this folder and return its standard output."""
    result = subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_page_contains_the_files_and_commands_of_these_tests() -> None:
    assert {"weather.py", "recent.toml", "triage.toml", "digits.toml", "dice.py", "show_layers.py"} <= set(FILES)
    assert {command.split()[0] for command in COMMANDS} == {"sparse", "mosquitto_sub", "mosquitto_pub", "python"}


def test_functions_serve_mqtt_clients(sandbox: ProcessSandbox, page_folder: Path) -> None:
    assert COMMANDS[0] == "sparse run weather.toml"
    pipeline = IngressPipeline(sandbox, page_folder / "weather.toml")
    reader = pipeline.start_client(f"{COMMANDS[1]} -C 1")
    result = pipeline.run_and_wait(COMMANDS[2])
    assert result["values"] == {"feels": 31.0, "shade": True}
    assert reader.wait(signal.SIGTERM).stderr == ""
    pipeline.interrupt()


def test_class_keeps_state_per_source(sandbox: ProcessSandbox, page_folder: Path) -> None:
    pipeline = IngressPipeline(sandbox, page_folder / "recent.toml")
    means = [pipeline.request("cellar", {"celsius": celsius})["values"]["celsius"] for celsius in (10, 20, 40)]
    assert means == [10.0, 15.0, 30.0]
    assert pipeline.request("attic", {"celsius": 50})["values"] == {"celsius": 50.0}
    pipeline.interrupt()


def test_executor_dispatches_past_a_stage(sandbox: ProcessSandbox, page_folder: Path) -> None:
    pipeline = IngressPipeline(sandbox, page_folder / "triage.toml")
    warm, cold = (pipeline.request("roof", {"celsius": celsius}) for celsius in (10, -10))
    assert warm["values"] == {"celsius": 9.0, "frozen": False}
    assert [timing["stage"] for timing in warm["time"]["stages"]] == ["triage", "thaw", "record"]
    assert cold["values"] == {"celsius": -10.0, "frozen": True}
    assert [timing["stage"] for timing in cold["time"]["stages"]] == ["triage", "record"]
    pipeline.interrupt()


def test_stage_is_tested_without_a_broker(page_folder: Path) -> None:
    (command,) = [command for command in COMMANDS if command.startswith("python")]
    assert "2 passed" in run_python(page_folder, *command.split()[1:], "-p", "no:cacheprovider")


def test_encoder_of_token_ids_can_be_cut(page_folder: Path) -> None:
    table = '[pipeline]\nname = "encoder"\nmodel = "encoder:encoder"\ncuts = [2]\n'
    (page_folder / "encoder.toml").write_text(f'{table}[[stage]]\nname = "head"\n[[stage]]\nname = "tail"\n')
    (cut,) = json.loads(run_python(page_folder, "-m", "brokers.cli", "cuts", "encoder.toml", "--json"))["cuts"]
    assert cut["tensors"] == {"mask": [1, 12], "layers.0": [1, 12, 32]}


def test_own_network_and_source_run(sandbox: ProcessSandbox, page_folder: Path) -> None:
    require_broker("embedded")
    assert COMMANDS[-1] == "sparse run digits.toml --json"
    output_folder = page_folder / "out"
    result = sandbox.start_sparse(
        "run", page_folder / "digits.toml", "--json", "--broker", "embedded", "--out", output_folder
    ).wait()
    assert result.returncode == 0, result.stderr
    assert result.json_output["results"] == 20
    first = json.loads((output_folder / "results.jsonl").read_text().splitlines()[0])
    assert len(first["values"]["output"][0]) == 10
    sandbox.assert_nothing_left()


def test_layers_are_listed_and_a_list_of_modules_is_cut(page_folder: Path) -> None:
    names = ("show_layers.py", "by_hand.py")  # in one process, which imports torch once
    program = f"import runpy; [runpy.run_path(name, run_name='__main__') for name in {names}]"
    lines = run_python(page_folder, "-c", program).splitlines()
    assert [line.split()[0] for line in lines] == [str(number) for number in range(1, len(lines) + 1)]
    assert [line.split()[1] for line in lines] == ["wide", "relu", "again", "relu_1", "add", "out"]
