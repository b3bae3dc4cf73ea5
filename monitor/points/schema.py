"""The schema of telemetry: every measurement with its tags, fields, types and units, from schema.toml.

Tags identify a series and are indexed by databases; fields are the values. All points have the tags `node` and `run`;
a tag that does not apply is empty.
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

FieldType = Literal["float", "int", "text"]


class FieldSpec(NamedTuple):
    """One field of a measurement; `unit` is empty for counts, ratios and text."""

    name: str
    type: FieldType
    unit: str
    description: str


@dataclass(frozen=True, slots=True)
class Measurement:
    """A kind of point."""

    name: str
    description: str
    tags: tuple[str, ...]
    fields: tuple[FieldSpec, ...]


_SCHEMA_FILE = Path(__file__).with_name("schema.toml")
MEASUREMENTS = {
    name: Measurement(name, table["description"], tuple(table["tags"]), tuple(map(FieldSpec._make, table["fields"])))
    for name, table in tomllib.loads(_SCHEMA_FILE.read_text(encoding="utf-8")).items()
}
