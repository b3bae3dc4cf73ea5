"""A variant of a pipeline file: some of its keys changed, and good in any folder. Pure but for which files exist."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import tomli_w

# By `table.key`, as `training.epochs`, or a whole list, as `stage`; None takes it out.
Overrides = Mapping[str, Any]
# Keys that may name a file below the pipeline file's folder.
_PATHS = (("pipeline", "weights"), ("source", "path"), ("training", "checkpoints"))


def apply_overrides(text: str, folder: Path, changes: Overrides) -> str:
    """The pipeline file with `changes` made, as text for a file anywhere: `folder` is where the original is.

    Comments are lost. `package.module:name`s beside the original need its folder on Python's path.
    """
    tables = tomllib.loads(text)
    for key, value in changes.items():
        _change(tables, key, value)
    for table, key in _path_places(tables):
        named = table.get(key)
        if isinstance(named, str) and (folder / named).exists():  # else a name that Sparse knows
            table[key] = str((folder / named).absolute())
    return tomli_w.dumps(tables)


def _change(tables: dict[str, Any], key: str, value: Any) -> None:
    *way, last = key.split(".")
    for name in way:
        tables = tables.setdefault(name, {})
    if value is None:
        tables.pop(last, None)
    else:
        tables[last] = deepcopy(value)


def _path_places(tables: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    for table, key in _PATHS:
        if table in tables:
            yield tables[table], key
    for site in tables.get("site", ()):
        yield from ((link, "password_file") for link in site.get("links", ()))
