"""The commands of Sparse: installed as declared, one line of help and an example for each, without importing torch."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.metadata import entry_points

import pytest

from brokers.cli import main
from tests.support.environment.checkout import ROOT

DECLARED = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["sparse.commands"]
# As they are typed: `broker.config` is `sparse broker config`.
COMMANDS = [name.replace(".", " ") for name in DECLARED]
# One process for all, since a start takes longer than a command's imports.
PROGRAM = """\
import sys
from brokers.cli import main
for command in sys.argv[1:]:
    assert main([*command.split(), "--help"]) == 0, command
    assert "torch" not in sys.modules, command
"""


def test_installed_commands_are_the_declared_ones() -> None:
    installed = {entry.name: entry.value for entry in entry_points(group="sparse.commands")}
    assert installed == DECLARED


def test_help_has_one_line_for_each_command(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    for name in COMMANDS:
        (line,) = [line for line in lines if line.startswith(f"  {name}  ")]
        assert "(not " not in line
        assert len(line.split()) > 2
        assert len(line) <= 100


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_command_shows_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*name.split(), "--help"]) == 0
    assert f"Example: sparse {name}" in " ".join(capsys.readouterr().out.split())


def test_help_of_commands_does_not_import_torch() -> None:
    command = [sys.executable, "-c", PROGRAM, *COMMANDS]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr.decode()
