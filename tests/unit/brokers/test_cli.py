"""The umbrella command: what it prints, what it exits with, and what it never imports."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from brokers.cli import main
from tests.support.environment.checkout import ROOT

# A distribution of somebody else's, with subcommands of its own: what any installed package can do.
COMMANDS = '''
import logging
import sys
from typing import Annotated

import typer

from brokers.errors import BadFile, DeadlinePassed


def greet(name: str, loud: Annotated[bool, typer.Option(help="In capitals.")] = False) -> int:
    """Greet somebody.

    Example: sparse greet Ada --loud
    """
    logging.getLogger("greeting").info("about to greet")
    print(name.upper() if loud else name)
    return 7 if name == "seven" else 0


def fail(how: str) -> None:
    """Fail in one of many ways."""
    if how == "usage":
        raise BadFile("a.toml", "not TOML", "line 3")
    if how == "request":
        raise DeadlinePassed("ab", 5.0, "stage tail")
    if how == "system":
        raise PermissionError(13, "Permission denied", "runs")
    if how == "group":
        raise ExceptionGroup("tasks", [BadFile("b.toml", "is missing"), DeadlinePassed("ab", 5.0, "here")])
    if how == "interrupt":
        raise KeyboardInterrupt
    if how == "flood":
        for _ in range(100_000):
            print("line")
    if how == "socket":
        raise BrokenPipeError(32, "Broken pipe")
    raise ZeroDivisionError("a bug")
'''


@pytest.fixture
def world(tmp_path: Path) -> dict[str, str]:
    """The environment of a process in which the distribution above is installed."""
    (tmp_path / "others.py").write_text(COMMANDS)
    info = tmp_path / "others-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1\n")
    points = "[sparse.commands]\ngreet = others:greet\nfail = others:fail\nlost = nowhere.at_all:command\n"
    (info / "entry_points.txt").write_text(points)
    kept = {name: value for name, value in os.environ.items() if name != "SPARSE_DEBUG"}
    return kept | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}


def sparse(world: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "brokers.cli", *arguments]
    return subprocess.run(command, env=world, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_help_lists_every_command_with_the_first_line_of_its_docstring(world: dict[str, str]) -> None:
    done = sparse(world, "--help")
    assert done.returncode == 0
    assert re.search(r"^  greet +Greet somebody\.$", done.stdout, re.MULTILINE)
    assert re.search(r"^  fail +Fail in one of many ways\.$", done.stdout, re.MULTILINE)
    assert re.search(r"^  lost +\(not installed: nowhere\.at_all\)$", done.stdout, re.MULTILINE)


def test_help_imports_neither_the_commands_nor_anything_heavy(world: dict[str, str]) -> None:
    program = (
        "import sys; from brokers.cli import main; main(['--help']); "
        "heavy = {'torch', 'numpy', 'pydantic', 'typer', 'rich', 'paho', 'others'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=world, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_help_takes_less_than_three_tenths_of_a_second_of_processor_time(world: dict[str, str]) -> None:
    # Processor time, the best of three: what the wall says depends on what else this machine does.
    spent = []
    for _ in range(3):
        before = os.times()
        sparse(world, "--help")
        after = os.times()
        spent.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(spent) < 0.3


def test_without_a_command_the_help_is_a_complaint(world: dict[str, str]) -> None:
    done = sparse(world)
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage: sparse" in done.stderr


def test_a_command_gets_its_arguments_and_its_return_is_the_exit_status(world: dict[str, str]) -> None:
    assert sparse(world, "greet", "Ada", "--loud").stdout == "ADA\n"
    assert sparse(world, "greet", "Ada").returncode == 0
    assert sparse(world, "greet", "seven").returncode == 7


def test_a_commands_help_shows_its_options_and_its_example(world: dict[str, str]) -> None:
    done = sparse(world, "greet", "--help")
    assert done.returncode == 0
    assert "sparse greet" in done.stdout
    assert "--loud" in done.stdout
    assert "Example: sparse greet Ada --loud" in done.stdout


def test_an_unknown_command_names_the_nearest(world: dict[str, str]) -> None:
    done = sparse(world, "gret")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "sparse: there is no command 'gret'; did you mean 'greet'?\n"


def test_a_command_whose_module_is_missing_says_which(world: dict[str, str]) -> None:
    done = sparse(world, "lost")
    assert done.returncode == 2
    assert done.stderr == "sparse: the command 'lost' is not installed: there is no module nowhere.at_all\n"


@pytest.mark.parametrize("line", [["greet", "Ada", "--nope"], ["greet"], ["greet", "Ada", "Bob"], ["--nope", "greet"]])
def test_a_bad_option_is_one_line_and_exit_status_2(world: dict[str, str], line: list[str]) -> None:
    done = sparse(world, *line)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("sparse: ")
    assert "--help" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("how", "status", "told"),
    [
        ("usage", 2, "sparse: a.toml: line 3: not TOML\n"),
        ("request", 1, "sparse: request ab had 5 ms, which passed at stage tail\n"),
        ("system", 1, "sparse: [Errno 13] Permission denied: 'runs'\n"),
        ("socket", 1, "sparse: [Errno 32] Broken pipe\n"),
        ("group", 2, "sparse: b.toml: is missing\n"),
        ("interrupt", 130, ""),
    ],
)
def test_a_failure_is_one_line_and_its_exit_status(world: dict[str, str], how: str, status: int, told: str) -> None:
    done = sparse(world, "fail", how)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", told)


def test_a_bug_keeps_its_traceback(world: dict[str, str]) -> None:
    done = sparse(world, "fail", "bug")
    assert done.returncode == 1
    assert "ZeroDivisionError: a bug" in done.stderr


def test_sparse_debug_lets_tracebacks_through(world: dict[str, str]) -> None:
    done = sparse(world | {"SPARSE_DEBUG": "1"}, "fail", "usage")
    assert "Traceback" in done.stderr
    assert "brokers.errors.BadFile: a.toml: line 3: not TOML" in done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_early_is_no_error(world: dict[str, str], unbuffered: str) -> None:
    command = [sys.executable, "-m", "brokers.cli", "fail", "flood"]
    world["PYTHONUNBUFFERED"] = unbuffered
    with subprocess.Popen(command, env=world, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        told = process.stderr.read()
        assert (process.wait(timeout=30), told) == (141, b"")


@pytest.mark.parametrize("line", [["-v", "greet", "Ada"], ["greet", "-v", "Ada"], ["greet", "Ada", "--verbose"]])
def test_verbose_is_heard_on_either_side_of_the_command(world: dict[str, str], line: list[str]) -> None:
    done = sparse(world, *line)
    assert done.stdout == "Ada\n"
    assert "INFO greeting: about to greet" in done.stderr
    assert sparse(world, "greet", "Ada").stderr == ""


def test_what_follows_two_dashes_is_the_commands_alone(world: dict[str, str]) -> None:
    done = sparse(world, "greet", "--", "-v")
    assert (done.stdout, done.stderr) == ("-v\n", "")


def test_version_is_that_of_the_distribution(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == "sparse 0.1.0\n"
