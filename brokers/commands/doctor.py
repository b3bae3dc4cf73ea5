"""`sparse broker doctor`: whether a broker is good enough, and what to change where it is not."""

from __future__ import annotations

import asyncio
import json as jsonlib
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from brokers.config.pipeline_file import BROKER_VARIABLE, Pipeline, load_pipeline, resolve_broker_address
from brokers.errors import UsageError
from brokers.process.shutdown import EXIT_INTERRUPTED
from brokers.protocol.broker_url import parse_address
from brokers.protocol.topics import validate_name

if TYPE_CHECKING:
    from brokers.doctor.check_result import CheckResult
    from brokers.doctor.runner import DoctorOptions, DoctorRun

_CUTS_S = 300.0  # to build a large network, and run it once


@dataclass(eq=False)
class NoAddress(UsageError):
    """Nobody said which broker."""

    def __init__(self) -> None:
        problem = f"no broker is named: expected `sparse broker doctor mqtt://HOST:PORT`, or {BROKER_VARIABLE}"
        super().__init__("NoAddress", problem)


@dataclass(eq=False)
class NoSites(UsageError):
    """A bridge of which nobody said whose it is."""

    problem: str

    def __str__(self) -> str:
        return f"{self.problem}: --across needs the sites of the two brokers: --from SITE --to SITE, or --pipeline FILE"


@dataclass(eq=False)
class CutsUnknown(UsageError):
    """`sparse cuts` could not say what crosses the cuts of the pipeline, and told why."""

    told: str

    def __str__(self) -> str:
        return self.told


def command(
    url: Annotated[
        str | None, typer.Argument(help="The broker, mqtt://HOST:PORT; left out: the pipeline's, or SPARSE_BROKER.")
    ] = None,
    pipeline: Annotated[Path | None, typer.Option(help="A pipeline file: messages of the sizes of its cuts.")] = None,
    across: Annotated[str | None, typer.Option(help="A second broker, which a bridge joins to the first.")] = None,
    start: Annotated[str | None, typer.Option("--from", help="The site of the first broker.")] = None,
    to: Annotated[str | None, typer.Option(help="The site of the second one.")] = None,
    json: Annotated[bool, typer.Option("--json", help="End with one JSON object.")] = False,
) -> int:
    """Examine a broker: what will work with it, what will not, and how fast.

    All is tried, under topics that nobody reads, and all is taken away again. What is not ok is told with the line
    that mends it. Exit status: 0 usable, warnings or not; 1 something will not work.

    Example: sparse broker doctor mqtt://127.0.0.1:1883 --pipeline examples/street.toml
    """
    from brokers.doctor.runner import DoctorRun

    question = _question(url, load_pipeline(pipeline) if pipeline else None, across, start, to)
    out = sys.stderr if json else sys.stdout
    examination = DoctorRun(question, lambda finding: _tell(finding, out))
    if not asyncio.run(_run(examination)):
        return EXIT_INTERRUPTED
    return _conclude(examination, out, json)


def _question(
    url: str | None, pipeline: Pipeline | None, across: str | None, start: str | None, to: str | None
) -> DoctorOptions:
    """Read the arguments, and ask for the cuts; raise what is wrong with them before anything is connected to."""
    from brokers.doctor.check_result import format_bytes
    from brokers.doctor.runner import DoctorOptions
    from brokers.doctor.throughput import SIZES_BYTES

    sites = (start or (pipeline.source.site if pipeline else ""), to or _elsewhere(pipeline, start))
    if across is not None:
        parse_address(across)
        if not all(sites):
            raise NoSites("one is not known")
        if sites[0] == sites[1]:
            raise NoSites(f"both are {sites[0]!r}")
        for site in sites:
            validate_name("site", site)
    address = url or (resolve_broker_address(pipeline, sites[0]) if pipeline else os.environ.get(BROKER_VARIABLE))
    if not address:
        raise NoAddress
    parse_address(address)
    sizes = _cuts(pipeline.path) if pipeline else {}
    usual = {format_bytes(size): size for size in SIZES_BYTES}
    return DoctorOptions(address, sizes or usual, bool(sizes), across, sites)


def _elsewhere(pipeline: Pipeline | None, start: str | None) -> str:
    """The first site of a pipeline that is not where the way starts."""
    if pipeline is None:
        return ""
    return next((site for site in pipeline.used_sites if site != (start or pipeline.source.site)), "")


def _cuts(path: str) -> dict[str, int]:
    """What crosses each cut, in bytes; asked of another process, since brokers know nothing of networks."""
    asked = [sys.executable, "-m", "brokers.cli", "cuts", path, "--json"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=_CUTS_S, check=False)
    except subprocess.TimeoutExpired:
        raise CutsUnknown(
            f"{path}: its cuts were not computed within {_CUTS_S:g} s: see `sparse cuts {path}`"
        ) from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"sparse cuts ended with {done.returncode}"]
        raise CutsUnknown(lines[-1].removeprefix("sparse: "))
    cuts = jsonlib.loads(done.stdout.splitlines()[-1])["cuts"]
    return {f"{cut['sender']} to {cut['receiver']}": int(cut["wire_bytes"]) for cut in cuts}


async def _run(examination: DoctorRun) -> bool:
    """Examine; False when told to leave by SIGTERM. A Ctrl-C raises, as everywhere, when all is taken away."""
    running = asyncio.create_task(examination.run(), name="doctor")
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, running.cancel)
    try:
        await running
    except asyncio.CancelledError:
        if asyncio.current_task().cancelling():  # type: ignore[union-attr]
            raise
        return False
    return True


def _tell(finding: CheckResult, out: TextIO) -> None:
    print("\n".join(finding.to_lines()), file=out, flush=True)


def _conclude(examination: DoctorRun, out: TextIO, json: bool) -> int:
    from brokers.doctor.check_result import format_table, is_usable

    findings, fine = examination.results, is_usable(examination.results)
    counts = {level: sum(finding.level == level for finding in findings) for level in ("ok", "warn", "FAIL")}
    if examination.throughput:
        print("", *format_table(examination.throughput), "", sep="\n", file=out)
    verdict = "Sparse will work with it" if fine else "Sparse will not work with it as it is"
    told = f"{verdict}: {counts['ok']} ok, {counts['warn']} to look at, {counts['FAIL']} in the way"
    print(told, file=out)
    if json:
        rows = [
            {
                **asdict(row),
                "frames_per_s": row.frames_per_s,
                "there_mb_s": row.outbound_mb_s,
                "back_mb_s": row.inbound_mb_s,
            }
            for row in examination.throughput
        ]
        shown = str(parse_address(examination.options.broker))
        answer = {"broker": shown, "usable": fine, "findings": [asdict(each) for each in findings], "carried": rows}
        print(jsonlib.dumps(answer))  # noqa: T201 - the answer
    return 0 if fine else 1
