"""docs/stages.md does what it says: every file on that page is written out, every command run."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.environment.checkout import ROOT
from tests.support.environment.external_programs import require_dependency
from tests.support.pipelines.ingress_pipeline import IngressPipeline
from tests.support.pipelines.processes import ProcessSandbox

PAGE = (ROOT / "docs" / "stages.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
FILES = {text.split()[1]: text for kind, text in BLOCKS if kind in ("python", "toml")}
COMMANDS = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()]


@pytest.fixture(name="page")
def _page(sandbox: ProcessSandbox) -> Path:
    """The files of the page, in a folder."""
    for name, text in FILES.items():
        (sandbox.folder / name).write_text(text)
    return sandbox.folder


def python(page: Path, *words: str) -> str:
    """What Python says, run in the folder as the page has it."""
    done = subprocess.run([sys.executable, *words], cwd=page, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_page_has_what_these_tests_run() -> None:
    assert {"weather.py", "recent.toml", "triage.toml", "digits.toml", "dice.py", "show_layers.py"} <= set(FILES)
    programs = {command.split()[0] for command in COMMANDS}
    assert programs == {"sparse", "mosquitto_sub", "mosquitto_pub", "python"}


def test_a_function_is_a_stage(sandbox: ProcessSandbox, page: Path) -> None:
    assert COMMANDS[0] == "sparse run weather.toml"
    gateway = IngressPipeline(sandbox, page / "weather.toml")
    reader = gateway.start_client(f"{COMMANDS[1]} -C 1")
    result = gateway.publish_and_wait(COMMANDS[2])
    assert result["values"] == {"feels": 31.0, "shade": True}
    assert reader.wait(signal.SIGTERM).stderr == ""
    gateway.interrupt()


def test_a_class_remembers(sandbox: ProcessSandbox, page: Path) -> None:
    gateway = IngressPipeline(sandbox, page / "recent.toml")
    means = [gateway.request("cellar", {"celsius": celsius})["values"]["celsius"] for celsius in (10, 20, 40)]
    assert means == [10.0, 15.0, 30.0]
    assert gateway.request("attic", {"celsius": 50})["values"] == {"celsius": 50.0}
    gateway.interrupt()


def test_an_executor_takes_another_way(sandbox: ProcessSandbox, page: Path) -> None:
    gateway = IngressPipeline(sandbox, page / "triage.toml")
    warm, cold = (gateway.request("roof", {"celsius": celsius}) for celsius in (10, -10))
    assert warm["values"] == {"celsius": 9.0, "frozen": False}
    assert [spent["stage"] for spent in warm["time"]["stages"]] == ["triage", "thaw", "record"]
    assert cold["values"] == {"celsius": -10.0, "frozen": True}
    assert [spent["stage"] for spent in cold["time"]["stages"]] == ["triage", "record"]
    gateway.interrupt()


def test_a_stage_is_tested_without_a_broker(page: Path) -> None:
    (command,) = [command for command in COMMANDS if command.startswith("python")]
    assert "2 passed" in python(page, *command.split()[1:], "-p", "no:cacheprovider")


def test_a_network_and_a_source_of_ones_own(sandbox: ProcessSandbox, page: Path) -> None:
    require_dependency("iotcore")
    assert COMMANDS[-1] == "sparse run digits.toml --json"
    said = sandbox.start_sparse(
        "run", page / "digits.toml", "--json", "--broker", "embedded", "--out", page / "out"
    ).wait()
    assert said.returncode == 0, said.stderr
    assert said.json_output["results"] == 20
    result = json.loads((page / "out" / "results.jsonl").read_text().splitlines()[0])
    assert len(result["values"]["output"][0]) == 10
    sandbox.assert_nothing_left()


def test_layers_are_counted_and_a_network_is_cut_by_hand(page: Path) -> None:
    lines = python(page, "show_layers.py").splitlines()
    assert [line.split()[0] for line in lines] == [str(number) for number in range(1, len(lines) + 1)]
    assert [line.split()[1] for line in lines] == ["wide", "relu", "again", "relu_1", "add", "out"]
    python(page, "by_hand.py")


def test_the_examples_are_what_the_page_links_to() -> None:
    prose = re.sub(r"^```.*?^```$", "", PAGE, flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\(([^)]+)\)", prose)
    assert links
    for link in links:
        assert (ROOT / "docs" / link).exists(), link
