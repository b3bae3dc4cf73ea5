"""The command `sparse`: finds a subcommand by name, runs it, and makes one line of whatever goes wrong.

A subcommand is a plain function, named in the entry-point group `sparse.commands` of any installed distribution
(`run = "monitor.launch.run:command"`; `"broker.config"` is asked for as `sparse broker config`). Nothing here imports one
until it is asked for. The convention:

* `def command(file: Annotated[Path, typer.Argument(help="...")], json: Annotated[bool, ...] = False) -> int | None`,
  annotated for typer; never `async` (it calls `asyncio.run` itself).
* The first line of its docstring is its line in `sparse --help`, and is read without importing the module. Later
  paragraphs explain; one begins with `Example:` and holds a command that works.
* It returns its exit status, `None` meaning 0. It raises `SparseError`s and lets `KeyboardInterrupt` out when it has
  cleaned up; it prints no errors itself.
* Results go to standard output, all else to standard error by way of logging; `-v` is handled here.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import logging
import os
import select
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points, version
from pathlib import Path

from brokers.errors import SparseError, UsageError
from brokers.process.log_rate_limit import RateLimitFilter

ENTRY_POINT_GROUP = "sparse.commands"
USAGE = "usage: sparse [-v] COMMAND ..."

# Exit statuses: what docs and scripts rely on; 130 and 141 are what a shell reports for SIGINT and SIGPIPE.
EXIT_OK, EXIT_FAILURE, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 0, 1, 2, 130, 141


@dataclass(eq=False)
class UnknownCommand(UsageError):
    """A subcommand that no installed distribution offers."""

    name: str
    known: tuple[str, ...]

    def __str__(self) -> str:
        near = difflib.get_close_matches(self.name, self.known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(self.known) or 'none'}"
        return f"there is no command {self.name!r}; {hint}"


@dataclass(eq=False)
class UnknownOption(UsageError):
    """An option in front of the subcommand that is none of ours."""

    option: str

    def __str__(self) -> str:
        return f"there is no option {self.option!r} before the command; see `sparse --help`"


@dataclass(eq=False)
class BadArguments(UsageError):
    """Arguments that a subcommand does not take."""

    command: str
    problem: str

    def __str__(self) -> str:
        return f"{self.command}: {self.problem.rstrip('.')}; see `sparse {self.command} --help`"


@dataclass(eq=False)
class CommandNotInstalled(UsageError):
    """A subcommand that a distribution promises and does not bring."""

    command: str
    module: str

    def __str__(self) -> str:
        return f"the command {self.command!r} is not installed: there is no module {self.module}"


@dataclass(frozen=True, slots=True)
class Invocation:
    """A command line, read: `command` is empty where `--help`, `--version` or nothing was asked."""

    command: str
    arguments: tuple[str, ...]
    verbosity: int


def main(argv: Sequence[str] | None = None) -> int:
    """Run `sparse` with these arguments (left out: the process's own) and return its exit status."""
    try:
        status = _run(_read(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()  # here, where a closed pipe can still be told from a failure
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except (SparseError, OSError, BaseExceptionGroup) as error:
        if isinstance(error, BrokenPipeError) and _reader_has_gone():
            return EXIT_BROKEN_PIPE
        if os.environ.get("SPARSE_DEBUG") == "1":
            raise
        cause = _cause(error)
        if cause is None:
            raise
        print(f"sparse: {' '.join(str(cause).split())}", file=sys.stderr)  # noqa: T201 - the one place that does
        return EXIT_USAGE if isinstance(cause, UsageError) else EXIT_FAILURE
    return status


def _read(argv: Sequence[str]) -> Invocation:
    """Split the line into ours and the subcommand's; `-v` counts on both sides, since nobody remembers which."""
    rest = list(argv)
    before: list[str] = []
    while rest and rest[0].startswith("-"):
        before.append(rest.pop(0))
    command = rest.pop(0) if rest else ""
    end = rest.index("--") if "--" in rest else len(rest)
    verbosity = sum(_loudness(word) for word in before + rest[:end])
    before = [word for word in before if not _loudness(word)]
    arguments = tuple(word for word in rest[:end] if not _loudness(word)) + tuple(rest[end:])
    for word in before:
        if word not in ("-h", "--help", "--version"):
            raise UnknownOption(word)
    if before:
        return Invocation("", (before[0],), verbosity)
    return Invocation(command, arguments, verbosity)


def _loudness(word: str) -> int:
    return {"-v": 1, "--verbose": 1, "-vv": 2}.get(word, 0)


def _run(invocation: Invocation) -> int:
    found = sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda entry: entry.name)
    commands = {entry.name.replace(".", " "): entry for entry in found}
    if not invocation.command:
        return _answer(invocation.arguments, commands)
    name, arguments = invocation.command, invocation.arguments
    if arguments and f"{name} {arguments[0]}" in commands:
        name, arguments = f"{name} {arguments[0]}", arguments[1:]
    if name not in commands:
        raise UnknownCommand(name, tuple(commands))
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(invocation.verbosity, 2)]
    said = logging.StreamHandler(sys.stderr)
    said.addFilter(RateLimitFilter())
    logging.basicConfig(handlers=[said], level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    return _invoke(name, commands[name], arguments)


def _invoke(name: str, entry: EntryPoint, arguments: Sequence[str]) -> int:
    import typer  # 0.1 s with what it imports: `sparse --help` does without

    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    spellings = {"help_option_names": ["-h", "--help"]}
    app.command(context_settings=spellings, epilog="-v, -vv: say more on standard error.")(_load(name, entry))
    command = typer.main.get_command(app)
    try:
        # Not `app()`: even when told not to, that ends the process at a broken pipe, a socket's included.
        with command.make_context(f"sparse {name}", list(arguments)) as context:
            status = command.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    except typer.TyperException as error:
        raise BadArguments(name, error.format_message()) from error
    return status if isinstance(status, int) else EXIT_OK


def _load(name: str, entry: EntryPoint) -> Callable[..., object]:
    try:
        function: Callable[..., object] = entry.load()
    except ModuleNotFoundError as error:
        if error.name and f"{entry.module}.".startswith(f"{error.name}."):
            raise CommandNotInstalled(name, entry.module) from error
        raise  # the module is there, and what it imports is not: its own traceback says more
    return function


def _answer(words: tuple[str, ...], commands: dict[str, EntryPoint]) -> int:
    if "--version" in words:
        sys.stdout.write(f"sparse {version('sparse-mqtt')}\n")
        return EXIT_OK
    width = max((len(name) for name in commands), default=0)
    lines = [
        USAGE,
        "",
        "Deep networks cut into parts that run where there is room for them, joined by MQTT.",
        "",
        *(f"  {name:<{width}}  {_summary(entry)}" for name, entry in commands.items()),
        "",
        "  sparse COMMAND --help   what a command takes, with an example",
        "  -v, -vv                 say more on standard error",
        "  --version",
        "",
        "Example: sparse run examples/street.toml",
    ]
    # Asked for, it is the answer; with no command given, it is a complaint, and scripts must see one.
    (sys.stdout if words else sys.stderr).write("\n".join(lines) + "\n")
    return EXIT_OK if words else EXIT_USAGE


def _summary(entry: EntryPoint) -> str:
    """The first line of the function's docstring, out of the source: importing it could take seconds."""
    try:
        spec = importlib.util.find_spec(entry.module)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        return f"(not installed: {entry.module})"
    for node in ast.parse(Path(spec.origin).read_bytes()).body:
        if isinstance(node, ast.FunctionDef) and node.name == entry.attr:
            return (ast.get_docstring(node) or "").partition("\n")[0]
    return f"(not found: {entry.value})"


def _cause(error: BaseException) -> BaseException | None:
    """The failure to tell a person, or None where it is a bug and wants its traceback."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    causes = [_cause(inner) for inner in error.exceptions]
    known = [cause for cause in causes if isinstance(cause, SparseError | OSError)]
    return known[0] if len(known) == len(causes) else None


def _reader_has_gone() -> bool:
    """Whether it is standard output that broke (`sparse status | head`), and not a socket."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    if not poll.poll(0):
        return False
    # Python flushes once more at exit and would complain then: give it a place to write to.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


if __name__ == "__main__":
    sys.exit(main())
