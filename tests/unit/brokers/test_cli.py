"""The command `sparse`: subcommands, errors and exit statuses; log lines are limited and sanitized."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from brokers.cli import (
    INTERVAL_S,
    MAX_LINE_CHARACTERS,
    MAX_LINES,
    RateLimitFilter,
    main,
    sanitize,
)
from tests.support.environment.checkout import ROOT

# Another distribution with its own subcommands.
COMMANDS = '''
import logging
import sys
from typing import Annotated

import typer

from brokers.errors import BadFile, DeadlinePassed


def greet(name: str, loud: Annotated[bool, typer.Option(help="In capitals.")] = False) -> int:
    """Greet by name.

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
    if how == "group with a bug":
        raise ExceptionGroup("tasks", [BadFile("b.toml", "is missing"), ZeroDivisionError("a bug")])
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
def distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path of this process, in which that distribution is installed."""
    (tmp_path / "others.py").write_text(COMMANDS)
    info = tmp_path / "others-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1\n")
    points = "[sparse.commands]\ngreet = others:greet\nfail = others:fail\nlost = nowhere.at_all:command\n"
    (info / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("SPARSE_DEBUG", raising=False)
    monkeypatch.delitem(sys.modules, "others", raising=False)
    return tmp_path


class Console:
    """Runs `sparse` in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def run(self, *arguments: str) -> tuple[int, str, str]:
        """Return the exit status, standard output and standard error."""
        status = main(arguments)
        return status, *self._capsys.readouterr()


@pytest.fixture
def sparse(distribution: Path, capsys: pytest.CaptureFixture[str]) -> Console:
    return Console(capsys)


def test_help_lists_commands_with_their_first_docstring_line(sparse: Console) -> None:
    status, output, _ = sparse.run("--help")
    assert status == 0
    assert re.search(r"^  greet +Greet by name\.$", output, re.MULTILINE)
    assert re.search(r"^  fail +Fail in one of many ways\.$", output, re.MULTILINE)
    assert re.search(r"^  lost +\(not installed: nowhere\.at_all\)$", output, re.MULTILINE)


def test_no_command_prints_the_help_as_an_error(sparse: Console) -> None:
    status, output, errors = sparse.run()
    assert (status, output) == (2, "")
    assert "usage: sparse" in errors


def test_version_is_that_of_the_distribution(sparse: Console) -> None:
    assert sparse.run("--version") == (0, "sparse 0.1.0\n", "")


def test_command_gets_its_arguments_and_returns_the_exit_status(sparse: Console) -> None:
    assert sparse.run("greet", "Ada", "--loud") == (0, "ADA\n", "")
    assert sparse.run("greet", "seven") == (7, "seven\n", "")
    assert sparse.run("greet", "--", "-v") == (0, "-v\n", "")


def test_help_of_a_command_shows_options_and_example(sparse: Console) -> None:
    status, output, _ = sparse.run("greet", "--help")
    assert status == 0
    assert "sparse greet" in output
    assert "--loud" in output
    assert "Example: sparse greet Ada --loud" in output


def test_unknown_command_suggests_the_nearest(sparse: Console) -> None:
    assert sparse.run("gret") == (2, "", "sparse: no command 'gret' (did you mean 'greet'?)\n")


def test_missing_module_of_a_command_is_named(sparse: Console) -> None:
    message = "sparse: the command 'lost' is not installed: there is no module nowhere.at_all\n"
    assert sparse.run("lost") == (2, "", message)


@pytest.mark.parametrize(
    "arguments", [["greet", "Ada", "--nope"], ["greet"], ["greet", "Ada", "Bob"], ["--nope", "greet"]]
)
def test_bad_arguments_are_one_line_and_status_2(sparse: Console, arguments: list[str]) -> None:
    status, output, errors = sparse.run(*arguments)
    assert (status, output) == (2, "")
    assert errors.startswith("sparse: ")
    assert "--help" in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("how", "status", "errors"),
    [
        ("usage", 2, "sparse: a.toml: line 3: not TOML\n"),
        ("request", 1, "sparse: request ab had 5 ms, which passed at stage tail\n"),
        ("system", 1, "sparse: [Errno 13] Permission denied: 'runs'\n"),
        ("group", 2, "sparse: b.toml: is missing\n"),
        ("interrupt", 130, ""),
    ],
)
def test_failure_is_one_line_and_its_exit_status(sparse: Console, how: str, status: int, errors: str) -> None:
    assert sparse.run("fail", how) == (status, "", errors)


def test_bug_is_not_caught(sparse: Console) -> None:
    with pytest.raises(ZeroDivisionError):
        sparse.run("fail", "bug")
    with pytest.raises(ExceptionGroup):
        sparse.run("fail", "group with a bug")


def test_sparse_debug_shows_tracebacks(sparse: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSE_DEBUG", "1")
    with pytest.raises(Exception, match=r"a\.toml: line 3: not TOML"):
        sparse.run("fail", "usage")


# In a separate process -----------------------------------------------------------------------------------------------


def start(distribution: Path, *arguments: str, unbuffered: str = "") -> subprocess.Popen[str]:
    environment = {"PYTHONPATH": os.pathsep.join([str(distribution), str(ROOT)]), "PYTHONUNBUFFERED": unbuffered}
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=os.environ | environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_help_imports_neither_commands_nor_heavy_modules(distribution: Path) -> None:
    program = (
        "import sys; from brokers.cli import main; main(['--help']); "
        "heavy = {'torch', 'numpy', 'pydantic', 'typer', 'rich', 'paho', 'others'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    process = start(distribution, "-c", program)
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 0


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_reader_that_closes_early_is_status_141(distribution: Path, unbuffered: str) -> None:
    with start(distribution, "-m", "brokers.cli", "fail", "flood", unbuffered=unbuffered) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=60) == 141


def test_broken_socket_is_a_failure(distribution: Path) -> None:
    process = start(distribution, "-m", "brokers.cli", "fail", "socket")
    assert process.communicate(timeout=60) == ("", "sparse: [Errno 32] Broken pipe\n")
    assert process.returncode == 1


def test_verbose_logs_to_standard_error_on_either_side(distribution: Path) -> None:
    for arguments in (["-v", "greet", "Ada"], ["greet", "Ada", "--verbose"]):
        output, errors = start(distribution, "-m", "brokers.cli", *arguments).communicate(timeout=60)
        assert output == "Ada\n"
        assert "INFO greeting: about to greet" in errors


class FilteredLog:
    """The lines that pass a `RateLimitFilter`, whose clock the test sets."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.lines: list[str] = []
        self._filter = RateLimitFilter(lambda: self.now_s)

    def log(self, text: str, *arguments: object, level: int = logging.WARNING, line: int = 1) -> None:
        record = logging.LogRecord("name", level, "file.py", line, text, arguments, None)
        if self._filter.filter(record):
            self.lines.append(record.getMessage())


def test_first_lines_pass_and_the_suppressed_are_counted() -> None:
    log = FilteredLog()
    for number in range(10_000):
        log.log("refused %d", number)
    assert log.lines == [f"refused {number}" for number in range(MAX_LINES)]
    log.now_s += INTERVAL_S
    log.log("refused %d", 1)
    log.log("refused %d", 2)
    assert log.lines[MAX_LINES:] == ["refused 1 (9980 lines from the same place were suppressed before)", "refused 2"]


def test_call_sites_are_limited_separately() -> None:
    log = FilteredLog()
    for number in range(1000):
        log.log("refused %d", number)
    log.log("the broker is gone", line=2)
    assert log.lines[-1] == "the broker is gone"


def test_different_texts_of_one_call_site_share_its_limit() -> None:
    log = FilteredLog()
    for number in range(1000):
        log.log(f"text {number}")
    assert len(log.lines) == MAX_LINES


def test_info_lines_are_not_limited() -> None:
    log = FilteredLog()
    for number in range(1000):
        log.log("request %d", number, level=logging.INFO)
    assert len(log.lines) == 1000


def test_control_characters_are_escaped_and_long_lines_cut() -> None:
    log = FilteredLog()
    log.log("worker %s", "a\n2026 ERROR all is lost \x1b[2J\x9b %s größer")
    assert log.lines == ["worker a\\n2026 ERROR all is lost \\x1b[2J\\x9b %s größer"]
    assert len(sanitize("a" * 1_000_000)) < MAX_LINE_CHARACTERS + 50
