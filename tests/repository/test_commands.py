"""The commands that ship with Sparse: each is found, says what it does, and shows an example that names it."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.metadata import entry_points

import pytest

from tests.support.environment.checkout import ROOT

DECLARED = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["sparse.commands"]
# As they are typed: `broker.config` is `sparse broker config`.
TYPED = [name.replace(".", " ") for name in DECLARED]


def sparse(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "brokers.cli", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_the_installed_commands_are_those_of_this_checkout() -> None:
    installed = {entry.name: entry.value for entry in entry_points(group="sparse.commands")}
    assert installed == DECLARED


@pytest.mark.parametrize("name", TYPED)
def test_help_has_one_line_for_each_command(name: str) -> None:
    (line,) = [line for line in sparse("--help").stdout.splitlines() if line.startswith(f"  {name}  ")]
    assert "(not " not in line
    assert len(line.split()) > 2
    assert len(line) <= 100


@pytest.mark.parametrize("name", TYPED)
def test_each_command_shows_an_example(name: str) -> None:
    done = sparse(*name.split(), "--help")
    assert done.returncode == 0, done.stderr
    assert f"Example: sparse {name}" in " ".join(done.stdout.split())


@pytest.mark.parametrize("name", TYPED)
def test_a_commands_help_does_not_wait_for_torch(name: str) -> None:
    line = [*name.split(), "--help"]
    program = f"import sys; from brokers.cli import main; main({line}); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr.decode()
