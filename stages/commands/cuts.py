"""`sparse cuts FILE`: the bytes that cross each cut of a pipeline's network."""

import json as jsonlib
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from brokers.config.pipeline_file import add_error_context, load_pipeline


def command(
    file: Annotated[Path, typer.Argument(help="The pipeline file.")],
    every: Annotated[bool, typer.Option("--all", help="All possible cuts, not only those of the file.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """List the cuts of a network, with the bytes that cross each.

    Sizes are for one request, or for one micro-batch in training, whose gradient has as many bytes. The source's inputs
    and the results are not included, since a JPEG has no fixed size.

    Example: sparse cuts examples/street.toml
    """
    pipeline = load_pipeline(file)
    with add_error_context(pipeline):
        from stages.loading.cut_sizes import measure_cuts, rows_per_message

        cuts = measure_cuts(pipeline, every=every)
    if json:
        output = {"pipeline": pipeline.name, "rows": rows_per_message(pipeline), "cuts": [asdict(cut) for cut in cuts]}
        print(jsonlib.dumps(output))  # noqa: T201
        return 0
    for cut in cuts:
        shapes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in cut.tensors.items())
        size = f"{cut.wire_bytes:,} bytes as {cut.wire}"
        print(f"after {cut.after}: {cut.sender} to {cut.receiver}, {size}: {shapes}")  # noqa: T201
    if not cuts:
        print(f"{file}: no network that {'can be' if every else 'is'} cut")  # noqa: T201
    return 0
