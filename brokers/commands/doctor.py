"""`sparse broker doctor`: whether a broker meets the needs of Sparse, and what to change if not."""

import asyncio
import json as jsonlib
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, TextIO

import typer

from brokers.config.pipeline_file import BROKER_VARIABLE, Pipeline, load_pipeline, resolve_broker_address
from brokers.doctor.probe_client import format_bytes, is_usable
from brokers.doctor.runner import SIZES_BYTES, DoctorRun, format_table
from brokers.errors import UsageError
from brokers.process.shutdown import EXIT_INTERRUPTED
from brokers.protocol.broker_url import parse_address
from brokers.protocol.topics import validate_name

_CUTS_TIMEOUT_S = 300.0  # to build a large network, and run it once


def command(
    url: Annotated[
        str | None, typer.Argument(help="The broker, mqtt://HOST:PORT; default: the pipeline's, or SPARSE_BROKER.")
    ] = None,
    pipeline: Annotated[
        Path | None, typer.Option(help="A pipeline file: measure messages of the sizes at its cuts.")
    ] = None,
    across: Annotated[str | None, typer.Option(help="A second broker, which a bridge connects with the first.")] = None,
    start: Annotated[str | None, typer.Option("--from", help="The site of the first broker.")] = None,
    to: Annotated[str | None, typer.Option(help="The site of the second broker.")] = None,
    json: Annotated[bool, typer.Option("--json", help="End with one JSON object.")] = False,
) -> int:
    """Check a broker: features that work with it, fixes for the others, throughput.

    Every feature is tried, on topics that no other client uses, and everything is removed again. Exit status: 0 if the
    broker is usable, with warnings or not; 1 if something will not work.

    Example: sparse broker doctor mqtt://127.0.0.1:1883 --pipeline examples/street.toml
    """
    run = _parse_options(url, load_pipeline(pipeline) if pipeline else None, across, start, to)
    out = sys.stderr if json else sys.stdout
    run.on_result = lambda result: print("\n".join(result.to_lines()), file=out, flush=True)
    if not asyncio.run(_run_until_sigterm(run)):
        return EXIT_INTERRUPTED
    return _print_summary(run, out, json)


def _parse_options(
    url: str | None, pipeline: Pipeline | None, across: str | None, start: str | None, to: str | None
) -> DoctorRun:
    """The run; raises `UsageError` before any connection is made."""
    first = start or (pipeline.source.site if pipeline else "")
    others = [site for site in pipeline.used_sites if site != first] if pipeline else []
    second = to or (others[0] if others else "")
    if across is not None:
        parse_address(across)
        if not first or not second or first == second:
            raise UsageError(
                "NoSites",
                "--across needs the sites of the two brokers: expected --from SITE --to SITE with two sites, "
                f"or --pipeline FILE, got {first!r} and {second!r}",
            )
        for site in (first, second):
            validate_name("site", site)
    address = url or (resolve_broker_address(pipeline, first) if pipeline else os.environ.get(BROKER_VARIABLE))
    if not address:
        message = f"no broker address: expected `sparse broker doctor mqtt://HOST:PORT`, or {BROKER_VARIABLE}"
        raise UsageError("NoAddress", message)
    parse_address(address)
    cuts = _cut_sizes(pipeline.path) if pipeline else {}
    sizes = cuts or {format_bytes(size): size for size in SIZES_BYTES}
    return DoctorRun(address, sizes, bool(cuts), across, (first, second))


def _cut_sizes(path: str) -> dict[str, int]:
    """Bytes of a message at each cut, from `sparse cuts` in a separate process: brokers do not import torch."""
    arguments = [sys.executable, "-m", "brokers.cli", "cuts", path, "--json"]
    try:
        process = subprocess.run(arguments, capture_output=True, text=True, timeout=_CUTS_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        message = f"{path}: `sparse cuts {path}` did not finish within {_CUTS_TIMEOUT_S:g} s"
        raise UsageError("CutsUnknown", message, path=path) from None
    if process.returncode:
        lines = process.stderr.strip().splitlines() or [f"sparse cuts ended with status {process.returncode}"]
        raise UsageError("CutsUnknown", lines[-1].removeprefix("sparse: "), path=path)
    cuts = jsonlib.loads(process.stdout.splitlines()[-1])["cuts"]
    return {f"{cut['sender']} to {cut['receiver']}": int(cut["wire_bytes"]) for cut in cuts}


async def _run_until_sigterm(run: DoctorRun) -> bool:
    """Run; False if SIGTERM ended it. Ctrl-C raises, after everything is removed from the broker."""
    running = asyncio.create_task(run.run(), name="doctor")
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, running.cancel)
    try:
        await running
    except asyncio.CancelledError:
        if asyncio.current_task().cancelling():  # type: ignore[union-attr]
            raise
        return False
    return True


def _print_summary(run: DoctorRun, out: TextIO, json: bool) -> int:
    usable = is_usable(run.results)
    if run.throughput:
        print("", *format_table(run.throughput), "", sep="\n", file=out)
    ok, warnings, failures = (sum(each.level == level for each in run.results) for level in ("ok", "warn", "FAIL"))
    verdict = "Sparse works with this broker" if usable else "Sparse does not work with this broker"
    print(f"{verdict}: {ok} ok, {warnings} warnings, {failures} failures", file=out)
    if json:
        derived = ("frames_per_s", "outbound_mb_s", "inbound_mb_s")
        answer = {
            "broker": str(parse_address(run.broker)),
            "usable": usable,
            "checks": [asdict(each) for each in run.results],
            "throughput": [asdict(row) | {name: getattr(row, name) for name in derived} for row in run.throughput],
        }
        print(jsonlib.dumps(answer))  # noqa: T201 - the result
    return 0 if usable else 1
