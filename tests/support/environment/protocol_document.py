"""docs/protocol.md as data: its tables, and the packet in its hex dump."""

from __future__ import annotations

import re

from tests.support.environment.checkout import ROOT

TEXT = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")

TableRow = list[str]


def section(heading: str) -> str:
    """The text under a heading of any depth, up to the next heading of the same or a lesser depth."""
    match = re.search(rf"^(#+) {re.escape(heading)}\n(.*?)(?=^#{{1,9}} |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    assert match, f"no heading {heading!r}"
    return match[2]


def tables(heading: str) -> list[list[TableRow]]:
    """The tables under a heading: rows of cells, without the head."""
    rows = re.findall(r"(?:^\|.*\n)+", section(heading), re.MULTILINE)
    return [
        [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines()[2:]] for table in rows
    ]


def code_spans(cell: str) -> list[str]:
    """The code spans of a cell."""
    return re.findall(r"`([^`]+)`", cell)


def column_code_spans(table: list[TableRow], number: int = 0) -> list[str]:
    """The code spans of a column, in order."""
    return [name for row in table for name in code_spans(row[number])]


def example_packet() -> bytes:
    """The bytes of the hex dump; each line begins with its offset."""
    data = b""
    for line in re.findall(r"```text\n(.*?)```", section("One message, byte by byte"), re.DOTALL)[0].splitlines():
        assert int(line[:4], 16) == len(data), line
        data += bytes.fromhex(line[6:53])
    return data
