"""The command `sparse`: finds a subcommand by name, runs it, and turns its errors into one line and an exit status.

A subcommand is a function registered in the entry-point group `sparse.commands` of any installed distribution
(`run = "monitor.commands.run:command"`; `"broker.config"` is called as `sparse broker config`). It is imported when it
is called. The conventions:

* `def command(file: Annotated[Path, typer.Argument(help="...")], json: Annotated[bool, ...] = False) -> int | None`,
  annotated for typer; never `async` (it calls `asyncio.run` itself).
* The first line of its docstring is its line in `sparse --help`, and is read without importing the module. Later
  paragraphs explain; one begins with `Example:` and holds a command that works.
* It returns its exit status, `None` meaning 0. It raises `SparseError`s, and `KeyboardInterrupt` after cleaning up; it
  prints no errors itself.
* Results go to standard output, everything else is logged to standard error; `-v` is handled here.
"""

import ast
import importlib.util
import logging
import os
import select
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points, version
from pathlib import Path

from brokers.errors import SparseError, UsageError, did_you_mean

ENTRY_POINT_GROUP = "sparse.commands"
USAGE = "usage: sparse [-v] COMMAND ..."

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # what a shell reports for SIGINT
EXIT_BROKEN_PIPE = 141  # and for SIGPIPE

_VERBOSITY = {"-v": 1, "--verbose": 1, "-vv": 2}
_LOG_LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)
# Of log lines: at most 2 lines a second from one call site: enough to diagnose a fault.
MAX_LINES = 20
INTERVAL_S = 10.0
MAX_LINE_CHARACTERS = 1000


def main(argv: Sequence[str] | None = None) -> int:
    """Run `sparse` with these arguments (default: those of the process) and return its exit status."""
    try:
        status = _run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()  # here, where a closed pipe can still be distinguished from a failure
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except (SparseError, OSError, BaseExceptionGroup) as error:
        if isinstance(error, BrokenPipeError) and _is_stdout_closed():
            return EXIT_BROKEN_PIPE
        if os.environ.get("SPARSE_DEBUG") == "1":
            raise
        cause = _expected_cause(error)
        if cause is None:
            raise
        print(f"sparse: {' '.join(str(cause).split())}", file=sys.stderr)  # noqa: T201 - the one place that does
        return EXIT_USAGE if isinstance(cause, UsageError) else EXIT_FAILURE
    return status


def _run(argv: Sequence[str]) -> int:
    """Find the subcommand and run it; `-v` counts before and after its name, up to `--`."""
    end = argv.index("--") if "--" in argv else len(argv)
    verbosity = sum(_VERBOSITY.get(word, 0) for word in argv[:end])
    words = [word for word in argv[:end] if word not in _VERBOSITY] + list(argv[end:])
    points = sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda point: point.name)
    commands = {point.name.replace(".", " "): point for point in points}
    if not words or words[0].startswith("-"):
        return _run_option(words[0] if words else "", commands)
    name, *arguments = words
    if arguments and f"{name} {arguments[0]}" in commands:
        name = f"{name} {arguments.pop(0)}"
    if name not in commands:
        hint = did_you_mean(name, list(commands)) or f": expected one of {', '.join(commands)}"
        raise UsageError("UnknownCommand", f"no command {name!r}{hint}", name=name)
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(RateLimitFilter())
    level = _LOG_LEVELS[min(verbosity, len(_LOG_LEVELS) - 1)]
    logging.basicConfig(handlers=[handler], level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    return _run_command(name, _load(name, commands[name]), arguments)


def _run_option(option: str, commands: Mapping[str, EntryPoint]) -> int:
    if option == "--version":
        sys.stdout.write(f"sparse {version('sparse-mqtt')}\n")
        return EXIT_OK
    if option not in ("", "-h", "--help"):
        message = f"there is no option {option!r} before the command; see `sparse --help`"
        raise UsageError("UnknownOption", message, option=option)
    width = max((len(name) for name in commands), default=0)
    lines = [
        USAGE,
        "",
        "Deep networks cut into parts that run on devices, at the edge and in the cloud, joined by MQTT.",
        "",
        *(f"  {name:<{width}}  {_summary(point)}" for name, point in commands.items()),
        "",
        "  sparse COMMAND --help   the arguments of a command, with an example",
        "  -v, -vv                 log more to standard error",
        "  --version",
        "",
        "Example: sparse run examples/street.toml",
    ]
    # Without an option it is an error message, and scripts must see a failure.
    (sys.stdout if option else sys.stderr).write("\n".join(lines) + "\n")
    return EXIT_OK if option else EXIT_USAGE


def _summary(point: EntryPoint) -> str:
    """Return the first line of the function's docstring, from the source: importing it could take seconds."""
    try:
        spec = importlib.util.find_spec(point.module)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        return f"(not installed: {point.module})"
    for node in ast.parse(Path(spec.origin).read_bytes()).body:
        if isinstance(node, ast.FunctionDef) and node.name == point.attr:
            return (ast.get_docstring(node) or "").partition("\n")[0]
    return f"(not found: {point.value})"


def _load(name: str, point: EntryPoint) -> Callable[..., object]:
    try:
        function: Callable[..., object] = point.load()
    except ModuleNotFoundError as error:
        if error.name and f"{point.module}.".startswith(f"{error.name}."):
            message = f"the command {name!r} is not installed: there is no module {point.module}"
            raise UsageError("CommandNotInstalled", message, name=name, module=point.module) from error
        raise  # an import of the module failed: the traceback says which
    return function


def _run_command(name: str, function: Callable[..., object], arguments: Sequence[str]) -> int:
    import typer  # 0.1 s, which `sparse --help` must not cost

    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    settings = {"help_option_names": ["-h", "--help"]}
    app.command(context_settings=settings, epilog="-v, -vv: log more to standard error.")(function)
    command = typer.main.get_command(app)
    try:
        # Not `app()`: even with standalone_mode=False, it ends the process at any broken pipe, a socket's included.
        with command.make_context(f"sparse {name}", list(arguments)) as context:
            status = command.invoke(context)
    except typer.Exit as exit_request:
        return exit_request.exit_code
    except typer.TyperException as error:
        message = f"{name}: {error.format_message().rstrip('.')}; see `sparse {name} --help`"
        raise UsageError("BadArguments", message, name=name) from error
    return status if isinstance(status, int) else EXIT_OK


def _expected_cause(error: BaseException) -> BaseException | None:
    """Return the first failure of an exception group, or the error itself; None if any of them is a bug."""
    if not isinstance(error, BaseExceptionGroup):
        return error if isinstance(error, SparseError | OSError) else None
    causes = [_expected_cause(inner) for inner in error.exceptions]
    return causes[0] if all(causes) else None


def _is_stdout_closed() -> bool:
    """Whether the broken pipe is standard output (`sparse status | head`), and not a socket."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    if not poll.poll(0):
        return False
    # Python flushes standard output again at exit, and would print an error.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


@dataclass(slots=True)
class _Window:
    """The present interval of one call site."""

    begin_s: float
    lines: int = 0
    suppressed: int = 0


class RateLimitFilter(logging.Filter):
    """Logging filter that rate-limits warnings per call site (20 per 10 s), and sanitizes all lines.

    Senders of messages from the network decide how often they cause warnings: without a limit, one client could fill
    the disk, or hide a line that matters among a million others. The next line that passes says how many were
    suppressed.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._windows: dict[tuple[str, int], _Window] = {}  # by file and line: bounded by the size of the code

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the line is written; its text is sanitized."""
        suppressed = 0
        if record.levelno >= logging.WARNING:
            now_s = self._clock()
            window = self._windows.setdefault((record.pathname, record.lineno), _Window(now_s))
            if now_s - window.begin_s >= INTERVAL_S:
                window.begin_s = now_s
                window.lines = 0
            if window.lines >= MAX_LINES:
                window.suppressed += 1
                return False
            window.lines += 1
            suppressed = window.suppressed
            window.suppressed = 0
        record.msg = sanitize(record.getMessage())
        record.args = ()
        if suppressed:
            record.msg += f" ({suppressed} lines from the same place were suppressed before)"
        return True


def sanitize(text: str) -> str:
    """Return `text` as one line of at most `MAX_LINE_CHARACTERS` characters, with control characters escaped.

    A name from the network must not forge a log line, nor send escape sequences to a terminal.
    """
    if len(text) > MAX_LINE_CHARACTERS:
        text = f"{text[:MAX_LINE_CHARACTERS]}... ({len(text)} characters)"
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


if __name__ == "__main__":
    sys.exit(main())
