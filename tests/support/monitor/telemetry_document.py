"""The code and tables of docs/telemetry.md; a table is between `<!-- NAME: from the code -->` and `<!-- end -->`.

`python -m tests.support.monitor.telemetry_document` updates the tables.
"""

from __future__ import annotations

import re
from typing import Any, get_args

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from brokers.telemetry.schema import BatchPhase, HopMetrics, ProcessRole, TelemetryEvent
from monitor.points.schema import MEASUREMENTS, Measurement
from tests.support.environment.checkout import ROOT

DOCUMENT_PATH = ROOT / "docs" / "telemetry.md"

# Descriptions of event fields that have none in the model: those of the points' fields, first measurement first.
FIELD_DESCRIPTIONS = {
    **{field.name: field.description for known in reversed(MEASUREMENTS.values()) for field in reversed(known.fields)},
    "site": "site of the sender",
    "pipeline": "name of the pipeline",
    "role": ", ".join(f"`{role}`" for role in get_args(ProcessRole)),
    "name": "name of the process: a worker's id, a source's name",
    "pid": "process id; 0: unknown",
    "stage": "name of the stage",
    "worker": "id of the worker",
    "source": "name of the source",
    "phase": ", ".join(f"`{phase}`" for phase in get_args(BatchPhase)),
    "hops": "the part of each stage, in order; at most 64",
    "trace": "W3C trace id, in hex",
    "span": "W3C id of the request's span, in hex",
    "parent": "W3C id of the parent span, in hex",
    "bytes_out": "size of the output message",
    "from_site": "name of a site",
    "to_site": "name of a site",
}
_KINDS = (("str", "text"), ("int", "int"), ("float", "float"), ("Literal", "text"), ("tuple", "list of hops"))
COMMON_FIELDS = ("time_ns", "run", "site", "pipeline")


def _first_line(model: type) -> str:
    return (model.__doc__ or "").splitlines()[0]


def _kind(field: FieldInfo) -> str:
    return next(kind for name, kind in reversed(_KINDS) if name in str(field.annotation).replace("None", ""))


def _default(field: FieldInfo) -> str:
    default: Any = field.default
    if default is PydanticUndefined:
        return "required"
    if isinstance(default, str):
        return f"`{default}`" if default else "empty"
    return "null" if default is None else "none" if default == () else f"{default:g}"


def _rows(fields: dict[str, FieldInfo]) -> list[str]:
    return [
        f"| `{name}` | {_kind(field)} | {_default(field)} | {field.description or FIELD_DESCRIPTIONS[name]} |"
        for name, field in fields.items()
    ]


def _events() -> str:
    """The fields of all events, then those of each event."""
    events = get_args(TelemetryEvent)
    head = ["| field | type | default | meaning |", "|---|---|---|---|"]
    parts = ["All events have", "", *head]
    parts += _rows({name: events[0].model_fields[name] for name in COMMON_FIELDS})
    for model in events:
        fields = {name: field for name, field in model.model_fields.items() if name not in (*COMMON_FIELDS, "event")}
        parts += ["", f"**`{model.model_fields['event'].default}`**: {_first_line(model)}", "", *head, *_rows(fields)]
    parts += ["", "**Each of `hops`**:", "", *head, *_rows(dict(HopMetrics.model_fields))]
    return "\n".join(["", *parts, "", ""])


def _measurement(known: Measurement) -> list[str]:
    tags = ", ".join(f"`{tag}`" for tag in known.tags)
    rows = [f"| `{field.name}` | {field.type} | {field.unit} | {field.description} |" for field in known.fields]
    head = ["| field | type | unit | meaning |", "|---|---|---|---|"]
    return [f"**`{known.name}`**: {known.description}", "", f"Tags: {tags}.", "", *head, *rows, ""]


def _measurements() -> str:
    return "\n".join(["", *[line for known in MEASUREMENTS.values() for line in _measurement(known)], ""])


TABLE_WRITERS = {"events": _events, "measurements": _measurements}


def update_tables(text: str) -> str:
    """The page with the tables of the code."""
    for name, made in TABLE_WRITERS.items():
        begin, end = f"<!-- {name}: from the code -->\n", "<!-- end -->"
        before, _, rest = text.partition(begin)
        _, separator, after = rest.partition(end)
        assert separator, f"{DOCUMENT_PATH.name} has no table {name}"
        text = before + begin + made() + end + after
    return text


def code_blocks(language: str, heading: str) -> list[str]:
    """The code blocks of one language below a heading of the page."""
    text = DOCUMENT_PATH.read_text(encoding="utf-8")
    match = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ [^\n]*$\n\n|\Z)", text, re.MULTILINE | re.DOTALL)
    assert match, f"no heading {heading!r}"
    return re.findall(rf"^```{language}\n(.*?)^```$", match[1], re.MULTILINE | re.DOTALL)


if __name__ == "__main__":
    DOCUMENT_PATH.write_text(update_tables(DOCUMENT_PATH.read_text(encoding="utf-8")), encoding="utf-8")
