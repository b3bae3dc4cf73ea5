"""Pipeline files for tests."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

EXAMPLE_CODE_MODULE = "tests.support.pipelines.example_code"


def stage_table(name: str, executor_name: str = "", **settings: Any) -> dict[str, Any]:
    """A `[[stage]]`; `executor_name` is a name in tests/support/pipelines/example_code.py."""
    executor = {"executor": f"{EXAMPLE_CODE_MODULE}:{executor_name}"} if executor_name else {}
    return {"name": name, **executor, **settings}


def write_pipeline_file(
    folder: Path, stages: Sequence[Mapping[str, Any]], source: Mapping[str, Any] | None = None, **pipeline: Any
) -> Path:
    """Write a pipeline file in `folder`, named after the pipeline."""
    tables = [_table("[pipeline]", {"name": "test", **pipeline}), *(_table("[[stage]]", each) for each in stages)]
    if source is not None:
        tables.append(_table("[source]", source))
    path = folder / f"{pipeline.get('name', 'test')}.toml"
    path.write_text("\n".join(tables))
    return path


def counting_source_table(count: int, **settings: Any) -> dict[str, Any]:
    """A `[source]` of the class CountingSource, with its settings and those of all sources."""
    own = {key: settings.pop(key) for key in ("every_s", "live", "sign") if key in settings}
    return {
        "kind": f"{EXAMPLE_CODE_MODULE}:CountingSource",
        "name": "counter",
        "settings": {"count": count, **own},
        **settings,
    }


def _table(header: str, items: Mapping[str, Any]) -> str:
    return "\n".join([header, *(f"{key} = {_value(value)}" for key, value in items.items())]) + "\n"


def _value(value: Any) -> str:
    """A value in TOML, which differs from JSON in objects only."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {_value(item)}" for key, item in value.items()) + "}"
    return json.dumps(value)
