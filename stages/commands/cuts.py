"""`sparse cuts FILE`: what crosses each cut of a pipeline's network, in bytes."""

from __future__ import annotations

import json as jsonlib
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from brokers.config.pipeline_file import add_error_context, load_pipeline


def command(
    file: Annotated[Path, typer.Argument(help="The pipeline file.")],
    every: Annotated[bool, typer.Option("--all", help="Every cut that the network can have, not only the file's.")] = (
        False
    ),
    json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> int:
    """List the cuts of a network, with the bytes that cross each.

    For one request; of a pipeline that trains, for one micro-batch, whose gradient goes back in as many bytes. What a
    source sends, and what comes back to it, is not among them: a JPEG has any size.

    Example: sparse cuts examples/street.toml
    """
    pipeline = load_pipeline(file)
    with add_error_context(pipeline):
        from stages.partition.cut_sizes import measure_all_cuts, measure_cuts, rows_per_message

        found = measure_all_cuts(pipeline) if every else measure_cuts(pipeline)
    if json:
        answer = {"pipeline": pipeline.name, "rows": rows_per_message(pipeline), "cuts": [asdict(cut) for cut in found]}
        print(jsonlib.dumps(answer))  # noqa: T201 - the answer
        return 0
    for cut in found:
        shapes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in cut.tensors.items())
        sent = f"{cut.wire_bytes:,} bytes as {cut.wire}"
        print(f"after {cut.after}: {cut.sender} to {cut.receiver}, {sent}: {shapes}")  # noqa: T201 - the answer
    if not found:
        print(f"{file}: there is no network in it that {'can be' if every else 'is'} cut")  # noqa: T201 - the answer
    return 0
